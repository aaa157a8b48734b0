"""Fewer patches between the layers of a tower that packs images of any size in one sequence (ENCODER; Qwen2-VL).

Every block of the sequence (an image, or a frame of a clip) attends to itself only. Its layers are told where blocks end and how
patches are rotated; both are shortened with the states. The last module of the tower merges squares of patches: it is given
the survivors in their order, four by four, and what it returns is put back to full length, so that the model sees what it expects.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import EncoderReducer, EncoderState, Facts, Need
from vtc.engine import upstream
from vtc.engine.encoder import check_finite
from vtc.engine.undo import Undo
from vtc.engine.upstream import Call, Names
from vtc.errors import UnsupportedFeatureError
from vtc.signals import AttentionTap
from vtc.stats import Clock


@dataclass(eq=False)
class PackedRun:
    """State of one pass through the tower.

    Attributes
    ----------
    views : list of int
        Blocks of each image or clip.
    pieces : list of int
        Patches of each block that are there.
    clock : Clock
        Time spent on signals and selection.
    video : bool
        Whether the images are clips.
    taps : dict
        Signals of the layer that has just run: of every block ``(1, n, ...)``.
    carry : list of dict
        What the reducer carries from layer to layer, of every block.
    rows : Tensor or None
        Row of the full sequence that each patch left has; ``None``: all are there.
    targets : list of int or None
        Patches each block is to end with.
    left : Tensor or None
        The full sequence when some patches left for a while.
    tokens : list of Tensor or None
        Per image, which of its merged tokens are there, ascending; known at the end.
    answers : list of (str, Tensor)
        Whether signals were finite, where a GPU has yet to tell (see :func:`vtc.core.settle`).
    fired : bool
        Whether the reducer has acted.
    """

    views: list[int]
    pieces: list[int]
    clock: Clock
    video: bool = False
    taps: dict[str, list[Tensor]] = field(default_factory=dict)
    carry: list[dict[str, Tensor]] = field(default_factory=list)
    rows: Tensor | None = None
    targets: list[int] | None = None
    left: Tensor | None = None
    tokens: list[Tensor] | None = None
    answers: list[tuple[str, Tensor]] = field(default_factory=list)
    fired: bool = False

    def __post_init__(self) -> None:
        """Remember how long the blocks were."""
        self.full = list(self.pieces)
        self.carry = [{} for _ in self.pieces]

    def spread(self, values: Tensor) -> Tensor:
        """Put values of the patches left ``(1, n, ...)`` back on the full sequence, zeros elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(1, sum(self.full), *values.shape[2:]).index_copy(1, self.rows, values)

    def observe(self, needs: tuple[Need, ...], taps: list[AttentionTap]) -> None:
        """Compute signals of one layer; blocks come one by one, or together."""
        for need in needs:
            self.taps.setdefault(need.name, []).extend(need.measure(tap) for tap in taps)


class PackedStage:
    """Hooks between the layers of one tower, and around the module that merges.

    Parameters
    ----------
    part : EncoderReducer
        The reducer.
    layers : sequence of Module
        The tower's layers.
    merger : Module
        The module behind them.
    facts : Facts
        Of the model.
    current : callable
        Returns the pass under way, or None.
    """

    def __init__(
        self,
        part: EncoderReducer,
        layers: Sequence[nn.Module],
        merger: nn.Module,
        facts: Facts,
        current: Callable[[], PackedRun | None],
    ) -> None:
        self.part, self.layers, self.merger, self.facts, self.current = part, layers, merger, facts, current
        self.names = [Names.of(layer).need("hidden", "blocks", "rotary") for layer in layers]

    def install(self, undo: Undo) -> None:
        """Put the hooks on."""
        for i, layer in enumerate(self.layers):
            if i:
                before = functools.partial(self.before_layer, i)
                undo.pre_hook(layer, before, with_kwargs=True)
        undo.pre_hook(self.merger, self.before_merger)
        undo.hook(self.merger, self.after_merger)

    def wanted(self) -> dict[int, tuple[Need, ...]]:
        """Signals to tap, by tower layer; the last one counts, too."""
        provides = self.facts.provides
        return {i: tuple(n.resolve(provides) for n in self.part.encoder_needs(i)) for i in range(len(self.layers))}

    def before_layer(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Between layer ``i - 1`` and layer ``i``: drop patches or bring them back; shorten what the layer is told."""
        run = self.current()
        if run is None:
            return None
        if upstream.checkpointed(module) and upstream.checkpoint_repeats_hooks():
            raise UnsupportedFeatureError(
                f"gradient checkpointing of a vision tower in which '{self.part.name}' shortens the sequence needs transformers >= "
                "5.2, where hooks are not run again: upgrade, or disable gradient checkpointing"
            )
        call = Call(self.names[i], args, kwargs)
        hidden = self.drop(run, call["hidden"], i - 1)
        if i == self.part.returns and run.left is not None:
            hidden = run.left.index_copy(0, run.rows, hidden)
            run.pieces, run.rows, run.left = list(run.full), None, None
        if run.rows is not None:
            ends, given = torch.tensor([0, *run.pieces]).cumsum(0), call["blocks"]
            call.set("blocks", ends.to(given.device, given.dtype, non_blocking=True))
            call.set("rotary", tuple(t[run.rows] for t in call["rotary"]))
            if call.beside("longest") is not None:
                call.set_beside("longest", max(run.pieces))
        call.set("hidden", hidden)
        return call.result()

    def drop(self, run: PackedRun, hidden: Tensor, layer: int) -> Tensor:
        """Let the reducer drop patches after ``layer``, block by block."""
        if not run.taps:
            return hidden
        with torch.no_grad(), run.clock.span(hidden.device):
            if run.targets is None:
                starts = [sum(run.views[:i]) for i in range(len(run.views))]
                each = zip(run.views, starts, strict=True)
                run.targets = [
                    target
                    for count, at in each
                    for target in self.part.patch_budgets(count, run.full[at], self.facts, video=run.video)
                ]
            marks = []
            for piece, n in enumerate(run.pieces):
                taps = {name: values[piece] for name, values in run.taps.items()}
                valid = torch.ones(1, n, dtype=torch.bool, device=hidden.device)
                image, target = (torch.full((1,), v, device=hidden.device) for v in (0, run.targets[piece]))
                known = (n,), (run.targets[piece],)
                state = EncoderState(layer, taps, valid, image, run.carry[piece], target, None, *known)
                run.carry[piece], alive = self.part.step(state)
                if alive is not None:
                    check_finite(self.part.name, {**taps, **run.carry[piece]}, None, layer, run.answers)
                marks.append(alive)
            run.taps, run.fired = {}, True
            index = self.survivors(run, marks)
        if index is None:
            return hidden
        if self.part.returns is not None:
            run.left = hidden
        run.rows = index if run.rows is None else run.rows[index]
        return hidden[index]

    @staticmethod
    def survivors(run: PackedRun, marks: list[Tensor | None]) -> Tensor | None:
        """Shorten the record of every block to the patches marked ``(1, n)`` (``None``: all); return their rows, None for all."""
        if all(m is None for m in marks):
            return None
        device = next(m.device for m in marks if m is not None)
        sums = [torch.full((), n, device=device) if m is None else m.sum() for m, n in zip(marks, run.pieces, strict=True)]
        counts, kept, start = torch.stack(sums).tolist(), [], 0  # the one place where the host waits
        if counts == run.pieces:
            return None
        for piece, (alive, n, count) in enumerate(zip(marks, run.pieces, counts, strict=True)):
            index = torch.arange(n, device=device)
            if count < n:
                index = torch.argsort((~alive[0]).to(torch.int8), stable=True)[:count]
                run.carry[piece] = {name: t[:, index] for name, t in run.carry[piece].items()}
            kept.append(index + start)
            start += n
        run.pieces = counts
        return torch.cat(kept)

    def before_merger(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Drop behind the last layer; the merger must be given whole squares."""
        run = self.current()
        if run is None:
            return None
        hidden = self.drop(run, args[0], len(self.layers) - 1)
        if any(n % self.facts.merge for n in run.pieces):
            raise UnsupportedFeatureError(
                f"'{self.part.name}' left {run.pieces} patches, and the tower of '{self.facts.family}' merges {self.facts.merge} "
                "into one token: use a budget that is a multiple of it"
            )
        return (hidden, *args[1:])

    def after_merger(self, _module: nn.Module, _args: Any, out: Tensor) -> Any:
        """Put the tokens back to full length, each where its first patch was; note which are there."""
        run = self.current()
        if run is None or run.rows is None:
            return None
        merge = self.facts.merge
        starts = torch.tensor([0, *run.full]).cumsum(0).tolist()  # rows of the blocks
        if self.part.fills_first_slots:
            place = torch.cat([torch.arange(n // merge) + at // merge for n, at in zip(run.pieces, starts, strict=False)])
            place = place.to(out.device, non_blocking=True)
        else:
            place = run.rows[::merge] // merge
        blocks = torch.tensor([0, *run.views]).cumsum(0).tolist()  # of the images
        left = [sum(run.pieces[a:b]) // merge for a, b in itertools.pairwise(blocks)]
        run.tokens = [mine - starts[a] // merge for mine, a in zip(place.split(left), blocks, strict=False)]
        return out.new_zeros(sum(run.full) // merge, out.shape[-1]).index_copy(0, place, out)
