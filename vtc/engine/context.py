"""State of one forward of the text model: which images there are, which of their tokens are left, what was tapped."""

from __future__ import annotations

import contextvars
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core import Kind, Layout
from vtc.engine.cache import Pruned, PrunedSlidingLayer
from vtc.engine.parallel import Peers
from vtc.engine.segment import Segment
from vtc.engine.tower import VisionRecord
from vtc.engine.upstream import CONTEXT, Call, Names
from vtc.kernels import take
from vtc.stats import Clock, StageStats

CURRENT: contextvars.ContextVar[Context | None] = contextvars.ContextVar("vtc_context", default=None)
"""Of the multimodal forward that runs, until its text model takes it."""

LABELS: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("vtc_labels", default=None)
"""Those the whole model was given, while its base runs."""


@dataclass(eq=False)
class Instance:
    """One image in one batch row (beams repeat rows, so one image may have several instances).

    Attributes
    ----------
    row : int
        Batch row.
    image : int
        Index into the vision record.
    record : VisionRecord
        That record: of the call's images, or of its videos.
    columns : Tensor
        ``(slots,)`` logical column of every slot.
    run : slice or None
        The same, where they are one run of columns.
    layout : Layout
        Slot layout.
    entries : Tensor
        ``(n,)`` slots still alive, ascending.
    patches : Tensor or None
        Those of them that are patches, where it is known without asking the device.
    stages : list of StageStats
        What reducers did to it.
    merges : list
        What merging reducers did to it, for pictures.
    history : list of (str, int, int)
        Name of every part asked so far, how many tokens it was shown, and how many it kept.
    """

    row: int
    image: int
    record: VisionRecord
    columns: Tensor
    run: slice | None
    layout: Layout
    entries: Tensor
    patches: Tensor | None
    stages: list[StageStats]
    merges: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    history: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether all slots are alive."""
        return len(self.entries) == len(self.layout)

    def only_patches(self) -> Tensor:
        """Return the slots alive that are patches."""
        if self.patches is not None:
            return self.patches
        return self.entries[self.layout.on(self.entries.device).kind[self.entries] == Kind.PATCH]


class Context:
    """State of one forward of the text model.

    What the host decides (how many tokens each row holds, which images there are) follows from one look at ids and padding before
    anything runs, and from shapes: a GPU is not waited for again until the last layer is under way.

    No dataclass: FSDP2 takes dataclasses among a layer's arguments apart and hands every layer a copy.

    Parameters
    ----------
    q : int
        Tokens of each row in this forward.
    visual, real : Tensor or None
        ``(B, q)`` bool: new visual tokens (``None``: there are none), and what is not padding.
    asked : Tensor or None
        ``(B, q)`` bool, the part of ``real`` that is the prompt; ``None``: all of it.
    padded : bool
        Whether ``real`` is not True everywhere.
    bare : bool
        Whether some row may have nothing kept in front of a logical token: it begins with an image, or padding.
    places : dict
        "Are videos" to their part of ``visual``, on the CPU.
    text, held : list of int
        Tokens of each row that are text, and that the layers hold; padding left out.
    clock : Clock or None
        Prefill only: dynamo cannot trace its construction, and decode must compile.
    peers : Peers or None
        The ranks that share the model; ``None``: there is one rank.
    """

    def __init__(
        self,
        q: int = 0,
        visual: Tensor | None = None,
        real: Tensor | None = None,
        asked: Tensor | None = None,
        padded: bool = False,
        bare: bool = False,
        places: dict[bool, Tensor] | None = None,
        text: list[int] | None = None,
        held: list[int] | None = None,
        clock: Clock | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.q, self.visual, self.real, self.asked, self.padded, self.bare = q, visual, real, asked, padded, bare
        self.places, self.text, self.held = places or {}, text or [], held or []
        self.clock, self.peers = clock, peers
        self.longest: tuple[int, int] | None = None  # the most text tokens, and the most of a question, in any row
        self.answers: list[tuple[str, Tensor]] = []  # whether signals were finite, to be looked at in the end
        self.records: dict[bool, VisionRecord] = {}  # by "are videos"
        self.instances: list[Instance] = []
        self.keep: dict[int, tuple[Segment | None, Tensor | None]] = {}  # replayed on recomputation
        self.current: Segment | None = None
        self.memo: list[tuple[Any, tuple[Any, ...], Any]] = []
        self.tapped: dict[tuple[str, str, int], tuple[Tensor, Segment | None, int]] = {}
        self.fired: set[int] = set()
        self.per_layer: list[list[int]] = []  # [layer][instance] visual tokens
        self.positions: Tensor | None = None  # (B or 1, q) or (axes, B, q), as the text model was given them; None: one by one
        self.rope: tuple[Tensor, Tensor] | None = None  # rotations of the layer that runs
        self.bias: Tensor | None = None  # (B, q) what is added to the attention logits of each logical column's key
        self.static = False  # its keys come with empty slots behind them
        self.windows: list[PrunedSlidingLayer] = []  # cache layers that were shortened and will throw tokens away
        self.step: Step | None = None  # what the layer before was given
        self.promises: dict[int, tuple[int, int]] = {}  # decoder layer -> tokens its cache is to store, and to report

    def alive(self) -> list[int]:
        """Tokens of each row that are text or still chosen."""
        counts = list(self.text)
        for it in self.instances:
            counts[it.row] += len(it.entries)
        return counts

    def weigh(self, row: int, columns: Tensor, weight: Tensor, hidden: Tensor) -> None:
        """Let the keys of some logical columns of a row count for ``weight`` tokens from here on."""
        if self.bias is None:
            self.bias = torch.zeros(hidden.shape[0], self.q, dtype=torch.float32, device=hidden.device)
        self.bias[row, columns] = weight.to(self.bias.dtype).log()

    def once(self, key: Any, refs: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Make a value once per forward: consecutive layers need the same mask and RoPE rows. Compared by identity."""
        for k, r, value in self.memo:
            if k == key and all(_same(a, b) for a, b in zip(r, refs, strict=True)):
                return value
        self.memo.append((key, refs, make()))
        return self.memo[-1][2]


class Group:
    """Images of one geometry that show a reducer equally many of their tokens.

    Attributes
    ----------
    members : list of Instance
        The images.
    layout : Layout
        Their slot layout.
    entries : Tensor
        ``(B, n)`` slots shown.
    whole : bool
        Whether these are all their slots. Then a slice does for a gather, where the columns are one run.
    """

    def __init__(self, members: list[Instance], shown: list[Tensor]) -> None:
        self.members, self.layout = members, members[0].layout
        self.entries = _stacked(shown)
        self.whole = self.entries.shape[1] == len(self.layout)

    @functools.cached_property
    def rows(self) -> Tensor:
        """``(B,)`` batch row of each."""
        return torch.tensor([it.row for it in self.members]).to(self.entries.device, non_blocking=True)

    @functools.cached_property
    def columns(self) -> Tensor:
        """``(B, n)`` logical columns of the slots shown."""
        columns = _stacked([it.columns for it in self.members])
        return columns if self.whole else columns.gather(1, self.entries)

    def places(self, seg: Segment | None) -> Tensor:
        """``(B, n)`` their columns among the tokens of ``seg``."""
        return self.columns if seg is None else seg.inverse[self.rows[:, None], self.columns]

    def narrow(self, values: Tensor, seg: Segment | None, offset: int = 0) -> Tensor:
        """Return ``(B, n, ...)`` of values ``(batch, offset + tokens of seg, ...)``."""
        runs = [it.run for it in self.members]
        if seg is None and self.whole and None not in runs:
            parts = zip(self.members, runs, strict=True)
            return _stacked([values[it.row, offset + run.start : offset + run.stop] for it, run in parts])
        return values[self.rows[:, None], self.places(seg) + offset]

    def chosen(self, values: list[Tensor]) -> Tensor:
        """Return ``(B, n, ...)`` of values per image ``(slots, ...)``."""
        stacked = _stacked(values).to(self.entries.device)
        if self.whole:
            return stacked
        return take(stacked, self.entries)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


class Step:
    """What one decoder layer was given: the next layer gets the same if its cache and inputs are the same.

    Parameters
    ----------
    names : Names
        Of the layer's class.
    layer : Pruned
        Its reduced cache.
    seg, before : Segment, Tensor or None
        In a prefill: the segment it holds, and the shift of its cache before this forward.
    given, changed : dict
        By role: its arguments as they came, and as they went on.
    """

    def __init__(
        self,
        names: Names,
        layer: Pruned,
        seg: Segment | None,
        before: Tensor | None,
        given: dict[str, Any],
        changed: dict[str, Any],
    ) -> None:
        self.cols, self.valid, self.shift, self.bias = layer.cols, layer.valid, layer.shift, layer.bias
        self.end, self.skip = layer.end, layer.skip
        self.seg, self.before, self.given, self.changed = seg, before, given, changed
        self.names, self.cache = names if names.roles.keys() >= given.keys() else None, names.roles["kv"]
        if self.names is not None:  # else some come with a layer's further keywords, where :meth:`again` does not look
            self.given_names = [names.roles[role] for role in given]
            self.given_values = list(given.values())
            self.keywords = {names.roles[role]: value for role, value in changed.items()}

    def again(self, names: Names, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the keywords of layer ``i`` in a decode step if they are those of the layer before, else None.

        What :meth:`fits` says, without a :class:`~vtc.engine.upstream.Call`: this runs per layer and token.
        """
        if names is not self.names or len(args) > 1 or self.seg is not None or self.cache not in kwargs:
            return None
        held = kwargs[self.cache].layers
        layer = held[i] if i < len(held) else None
        if not isinstance(layer, Pruned) or layer.cols is not self.cols or layer.valid is not self.valid:
            return None
        if layer.shift is not self.shift or layer.bias is not self.bias or layer.end != self.end or layer.skip != self.skip:
            return None
        if not all(map(operator.is_, map(kwargs.get, self.given_names), self.given_values)):
            return None
        again = {**kwargs, **self.keywords}
        del again[CONTEXT]
        return again

    def fits(self, layer: Pruned, seg: Segment | None, before: Tensor | None, call: Call) -> bool:
        """Whether a layer with this cache and these arguments gets the same. Runs per layer and token: plain comparisons."""
        if not (
            layer.cols is self.cols
            and layer.valid is self.valid
            and layer.shift is self.shift
            and layer.bias is self.bias
            and layer.end == self.end
            and layer.skip == self.skip
            and seg is self.seg
            and before is self.before
        ):
            return False
        for role, value in self.given.items():
            other = call[role]
            if isinstance(value, tuple):  # cosines and sines come together; a tuple's own identity torch.compile cannot tell
                if not isinstance(other, tuple) or other[0] is not value[0]:
                    return False
            elif other is not value:
                return False
        return True


def _same(a: Any, b: Any) -> bool:
    """Identity; of the first tensor in it for a tuple (see :meth:`Step.fits`)."""
    return a[0] is b[0] if isinstance(a, tuple) and isinstance(b, tuple) else a is b
