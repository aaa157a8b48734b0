"""Fewer tokens between the layers of a vision tower (ENCODER): dropping, merging, and bringing back.

The class token, where there is one, is never touched. Views may hold different numbers of tokens; the rest is padding, which a
mask hides from attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import EncoderMerger, EncoderReducer, EncoderState, Facts, all_finite, tell
from vtc.engine import upstream
from vtc.engine.undo import Undo
from vtc.engine.upstream import Call, Names
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import merge_scatter, take
from vtc.stats import Clock


@dataclass(eq=False)
class EncoderRun:
    """State of one pass through the tower.

    Attributes
    ----------
    views : list of int
        Views of each image; their sum is ``V``.
    real : Tensor or None
        ``(V, patches)`` bool: patches that have a slot; ``None``: all.
    clock : Clock
        Time spent on signals and selection.
    video : bool
        Whether the images are clips and their views frames.
    taps : dict
        Signals of the layer that is running or has just run.
    carry : dict
        What the reducer carries from layer to layer.
    ids, valid : Tensor or None
        ``(V, n)`` patch each token stands at, and whether it is not padding, which comes last. ``None``: all patches, no padding.
    counts : list of int or None
        Tokens of each view, padding left out, as the host knows them. ``None``: all patches.
    size, owner : Tensor or None
        Merging: ``(V, n)`` patches each token stands for; ``(V, patches)`` token each patch is in.
    image, target : Tensor or None
        ``(V,)`` image each view belongs to, and patches it is to end with.
    targets : tuple of int
        The latter, for the host.
    left : Tensor or None
        States of all tokens when some of them left for a while.
    merged, branch : Tensor or None
        Merged tokens of the layer that is running, and what its MLP makes of them.
    lengths : list of list of int
        Patches of each view entering each layer, where somebody counts them.
    answers : list of (str, Tensor)
        Whether signals were finite, where a GPU has yet to tell (see :func:`vtc.core.settle`).
    fired : bool
        Whether the reducer has acted.
    """

    views: list[int]
    real: Tensor | None
    clock: Clock
    video: bool = False
    taps: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None
    valid: Tensor | None = None
    counts: list[int] | None = None
    size: Tensor | None = None
    owner: Tensor | None = None
    image: Tensor | None = None
    target: Tensor | None = None
    targets: tuple[int, ...] = ()
    left: Tensor | None = None
    merged: Tensor | None = None
    branch: Tensor | None = None
    lengths: list[list[int]] = field(default_factory=list)
    answers: list[tuple[str, Tensor]] = field(default_factory=list)
    fired: bool = False

    def patches(self, view: int) -> Tensor:
        """Return the patches ``(n,)`` at which the tokens of one view stand."""
        return self.ids[view] if self.counts is None else self.ids[view, : self.counts[view]]


class EncoderStage:
    """Hooks between and inside the layers of one tower.

    Parameters
    ----------
    part : EncoderReducer
        The reducer.
    layers, attention : sequence of Module
        The tower's layers and their attention modules.
    mlp_branch : callable
        A layer to the modules between which its second residual branch runs, or None.
    facts : Facts
        Of the model.
    current : callable
        Returns the pass under way, or None.
    """

    def __init__(
        self,
        part: EncoderReducer,
        layers: Sequence[nn.Module],
        attention: Sequence[nn.Module],
        mlp_branch: Callable[[nn.Module], tuple[nn.Module, nn.Module] | None],
        facts: Facts,
        current: Callable[[], EncoderRun | None],
    ) -> None:
        self.part, self.layers, self.attention, self.facts, self.current = part, layers, attention, facts, current
        self.names = [Names.of(layer).need("hidden") for layer in layers]
        self.head = int(facts.has_cls)
        self.merges = isinstance(part, EncoderMerger)
        self.branches = [mlp_branch(layer) for layer in layers[: facts.feature_layer + 1]] if self.merges else []

    def install(self, undo: Undo) -> None:
        """Put the hooks on."""
        for i in range(1, len(self.layers)):
            before = functools.partial(self.before_layer, i)
            undo.pre_hook(self.layers[i], before, with_kwargs=True)
        for i, (first, last) in enumerate(self.branches):
            undo.pre_hook(first, functools.partial(self.before_mlp, i))
            undo.hook(last, self.after_mlp)
            # in front of transformers' own hooks, which record what a layer returns
            undo.hook(self.layers[i], self.after_layer, prepend=True)

    def wanted(self) -> dict[int, tuple[Any, ...]]:
        """Signals to tap, by tower layer."""
        count = self.facts.feature_layer + int(self.merges)
        return {i: tuple(n.resolve(self.facts.provides) for n in self.part.encoder_needs(i)) for i in range(count)}

    # ------------------------------------------------------------------------------------------------- between layers
    def before_layer(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Between layer ``i - 1`` and layer ``i``: drop patches or bring them back, mask the padding, weigh by size."""
        run = self.current()
        if run is None:
            return None
        if upstream.checkpointed(module) and (self.merges or upstream.checkpoint_repeats_hooks()):
            raise UnsupportedFeatureError(
                f"gradient checkpointing of a vision tower in which '{self.part.name}' shortens the sequence "
                + ("is not possible" if self.merges else "needs transformers >= 5.2, where hooks are not run again: upgrade")
                + ", or disable gradient checkpointing"
            )
        call = Call(self.names[i], args, kwargs)
        hidden = call["hidden"]
        if run.taps and not self.merges:
            hidden = self.drop(run, hidden, i - 1)
        if i == self.part.returns:
            hidden = self.bring_back(run, hidden)
        mask = self.mask(run, i, hidden)
        if mask is not None:
            if "mask" not in call.names.roles:
                raise UnsupportedFeatureError(
                    f"'{self.part.name}' needs an attention mask, which {type(module).__name__} does not take: upgrade timm, or "
                    "switch sizes off with proportional=False"
                )
            call.set("mask", mask)
        call.set("hidden", hidden)
        return call.result()

    def state(self, run: EncoderRun, layer: int, hidden: Tensor) -> EncoderState:
        """What the reducer is shown after (or in) a layer."""
        views, n = hidden.shape[0], hidden.shape[1] - self.head
        device = hidden.device
        if run.target is None:
            each = [b for count in run.views for b in self.part.patch_budgets(count, n, self.facts, video=run.video)]
            run.target, run.targets = torch.tensor(each).to(device, non_blocking=True), tuple(each)
            image = [i for i, count in enumerate(run.views) for _ in range(count)]
            run.image = torch.tensor(image).to(device, non_blocking=True)
        valid = run.valid if run.valid is not None else torch.ones(views, n, dtype=torch.bool, device=device)
        counts = tuple(run.counts or [n] * views)
        return EncoderState(layer, run.taps, valid, run.image, run.carry, run.target, run.size, counts, run.targets)

    def drop(self, run: EncoderRun, hidden: Tensor, layer: int) -> Tensor:
        """Let the reducer drop patches after ``layer``."""
        with torch.no_grad(), run.clock.span(hidden.device):
            state = self.state(run, layer, hidden)
            run.carry, alive = self.part.step(state)
            run.taps = {}
            run.fired = True
            if alive is None:
                return hidden
            check_finite(self.part.name, {**state.taps, **run.carry}, run.valid, layer, run.answers)
            index = narrow(run, alive & state.valid)
        if index is None:
            return hidden
        if self.part.returns is not None and run.left is None:
            run.left = hidden
        gather = index if not self.head else torch.cat([torch.zeros_like(index[:, :1]), index + 1], 1)
        return take(hidden, gather)

    def bring_back(self, run: EncoderRun, hidden: Tensor) -> Tensor:
        """Write the tokens back to their patches; those that had left are as they were then."""
        if run.left is None or run.ids is None:
            return hidden
        at = run.ids + self.head
        if self.head:
            at = torch.cat([torch.zeros_like(at[:, :1]), at], 1)
        at = at[..., None].expand_as(hidden)
        if run.valid is not None:  # padding lies on patches that have left
            hidden = torch.where(self.with_head(run.valid, True)[..., None], hidden, run.left.gather(1, at))
        back = run.left.scatter(1, at, hidden)
        run.ids = run.valid = run.counts = run.left = None
        return back

    def mask(self, run: EncoderRun, i: int, hidden: Tensor) -> Tensor | None:
        """Attention mask of layer ``i``: padding is hidden, large tokens count more; ``None`` where neither is needed."""
        weigh = run.size is not None and self.part.weighs_sizes
        if run.valid is None and not weigh:
            return None
        implementation = upstream.attention_of(getattr(self.attention[i], "config", None))
        if upstream.is_flash(implementation):
            if weigh:
                raise UnsupportedFeatureError(
                    f"'{self.part.name}' adds the sizes of merged tokens to attention logits, which FlashAttention cannot do: load "
                    "the model with attn_implementation='sdpa', or switch the sizes off with proportional=False"
                )
            return self.with_head(run.valid, True)
        bias = hidden.new_zeros(hidden.shape[:2])
        if weigh:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            bias = self.with_head(run.size, 1.0).to(wide).log().to(hidden.dtype)
        if run.valid is not None:
            bias = bias.masked_fill(~self.with_head(run.valid, True), torch.finfo(hidden.dtype).min)
        return bias[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)

    def with_head(self, values: Tensor, first: Any) -> Tensor:
        """Put the class token's value in front of those of the patches."""
        return torch.cat([torch.full_like(values[:, :1], first), values], 1) if self.head else values

    # ------------------------------------------------------------------------------------------------- inside a layer
    # x + mlp(norm(x)) is made m + mlp(norm(m)) with the merged m: the norm is given m, the branch hands a zero to the sum that
    # still holds x, and the layer's output is replaced by the sum that was meant.
    def before_mlp(self, i: int, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Merge; give the merged tokens to the MLP."""
        run = self.current()
        if run is None or not run.taps:
            return None
        hidden = args[0]
        with torch.no_grad(), run.clock.span(hidden.device):
            state = self.state(run, i, hidden)
            check_finite(self.part.name, state.taps, run.valid, i, run.answers)
            found = self.part.merge(state)
            run.taps = {}
            run.fired = True
        if found is None:
            return None
        with run.clock.span(hidden.device):
            run.merged = self.merge(run, hidden, state.valid, *found)
        return (run.merged, *args[1:])

    def merge(self, run: EncoderRun, hidden: Tensor, valid: Tensor, owner: Tensor, count: Tensor) -> Tensor:
        """Return the merged states; bring the record of patches, sizes and padding up to date."""
        run.counts = count.tolist()  # no wait where the reducer, who knows them, leaves them on the host
        places = max(run.counts)
        size = run.size if run.size is not None else torch.ones_like(owner, dtype=torch.float32)
        whole = self.with_head(torch.where(owner >= 0, owner + self.head, owner), 0)
        merged = merge_scatter(hidden, whole, places + self.head, weight=self.with_head(size, 1.0))
        ids = run.ids if run.ids is not None else torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
        to = owner.clamp(min=0)  # a choice: padding goes nowhere, and adds nothing to the first token
        sizes = torch.zeros_like(size[:, :1]).expand(-1, places)
        run.size = sizes.scatter_add(1, to, torch.where(owner >= 0, size, torch.zeros_like(size)))
        patches = ids.shape[1] if run.owner is None else run.owner.shape[1]
        if run.real is None:
            first = ids
        else:
            run.real = run.real.to(ids.device, non_blocking=True)
            first = torch.where(run.real.gather(1, ids), ids, ids + patches)
        first = torch.where(owner >= 0, first, 2 * patches)
        first = torch.full_like(first[:, :1], 2 * patches).expand(-1, places).scatter_reduce(1, to, first, "amin")
        run.ids = torch.where(first < 2 * patches, first % patches, 0)
        run.owner = owner if run.owner is None else owner.gather(1, run.owner)
        run.valid = prefix(run.counts, owner.device)
        run.size = run.size.clamp(min=1)  # padding
        return merged

    def after_mlp(self, _module: nn.Module, _args: Any, out: Tensor) -> Any:
        """Keep the branch's output; hand a zero to the sum that still holds the tokens before merging."""
        run = self.current()
        if run is None or run.merged is None:
            return None
        run.branch = out
        return out.new_zeros(1, 1, 1)

    def after_layer(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        """Replace the layer's output by the merged tokens plus the branch."""
        run = self.current()
        if run is None or run.merged is None:
            return None
        hidden = run.merged + run.branch
        run.merged = run.branch = None
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def check_finite(
    name: str, signals: dict[str, Tensor], valid: Tensor | None, layer: int, later: list[tuple[str, Tensor]]
) -> None:
    """Raise where patches are chosen by numbers that are not finite; a GPU's answers go to ``later`` (:func:`vtc.core.settle`)."""
    answers = []
    for signal, value in signals.items():
        if not value.is_floating_point():
            continue
        if valid is not None:  # padding may hold anything
            value = value.masked_fill(~valid.view(*valid.shape, *[1] * (value.dim() - 2)), 0)
        answers.append((f"signal '{signal}' of '{name}' at tower layer {layer}", all_finite(value)))
    tell(answers, later)


def narrow(run: EncoderRun, alive: Tensor) -> Tensor | None:
    """Record the survivors; return their ``(views, n)`` index, or None when nothing is dropped.

    How many of each view are alive follows from the picture: this is the one place where the host waits for it.
    """
    views, n = alive.shape
    counts = alive.sum(1).tolist()
    if counts == (run.counts or [n] * views):
        return None
    # survivors first, in order; padding holds some of the leftovers
    index = torch.argsort((~alive).to(torch.int8), dim=1, stable=True)[:, : max(counts)]
    ids = run.ids if run.ids is not None else torch.arange(n, device=alive.device).expand_as(alive)
    run.ids, run.valid, run.counts = ids.gather(1, index), prefix(counts, alive.device), counts
    run.carry = {k: take(v, index) for k, v in run.carry.items()}
    return index


def prefix(counts: list[int], device: torch.device) -> Tensor | None:
    """Return ``(V, n)`` bool, the first ``counts`` of every view; ``None`` where all have the same."""
    longest = max(counts)
    if min(counts) == longest:
        return None
    return torch.arange(longest, device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None]
