"""VScan: patches that stand out in the whole picture or in their window, then, late in the model, those the text looks at."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import (
    Budget,
    Facts,
    Need,
    Newlines,
    Positions,
    Reducer,
    Schedule,
    Scorer,
    Selection,
    Signals,
    Stage,
    check_bounds,
)
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import compacted, merge_scatter, pairwise_top1, topk_mask, topk_per_group
from vtc.registry import register
from vtc.schedule import TOLERANCE, checked, closest_count, layer_average, place_cuts
from vtc.signals import AttentionTap, cls_attn, next_last_attn, received_attn, turned_back
from vtc.views import each_view, on_host


def _placeless_last_attention(tap: AttentionTap) -> Tensor:
    """Attention row of the last prompt token without rotary positions, mean over heads, ``(B, K)``."""
    query, key = turned_back(tap.query, tap.rope), turned_back(tap.key, tap.rope)
    return next_last_attn(0).measure(dataclasses.replace(tap, query=query, key=key))


def placeless_last_attn(layer: int) -> Need:
    """As :func:`vtc.signals.next_last_attn`, of queries and keys that are not rotated."""
    return Need("placeless_last_attn", "text", layer, _placeless_last_attention, of="preview")


@dataclass(frozen=True, kw_only=True)
class Course:
    """How many of an image's visual tokens each stage of :class:`VScan` leaves.

    Parameters
    ----------
    cuts : tuple of int
        Decoder layers before which tokens leave.
    late : tuple of int or float
        Tokens each cut leaves, or the share of those there before it.
    """

    cuts: tuple[int, ...]
    late: tuple[int | float, ...]

    def after(self, first: int) -> list[int]:
        """Return what each cut leaves of the ``first`` tokens that enter the language model."""
        counts = []
        for amount in self.late:
            left = counts[-1] if counts else first
            share = math.floor(amount * left + 1e-9) if isinstance(amount, float) else amount  # 1/3 of 96 is 32
            counts.append(max(1, min(share, left)))
        return counts

    def first(self, budget: Budget, n: int, layers: int) -> int:
        """Return how many of ``n`` tokens enter the language model.

        Raises
        ------
        BudgetError
            An average above the one that all ``n`` tokens give.
        """
        if budget.keep is not None:
            return budget.tokens(n, rounding=math.floor)
        amount = budget.avg_tokens
        wanted = amount * n if isinstance(amount, float) else amount

        def average(first: int) -> float:
            return layer_average(first, self.cuts, self.after(first), layers) if self.cuts else first

        if not budget.exceeds(n) and wanted > average(n) * (1 + TOLERANCE):
            raise BudgetError(
                f"avg_tokens={amount} cannot be met, since the cuts before the layers {self.cuts} leave {average(n):.0f} of {n} "
                f"tokens on average even where all of them enter: use at most {math.floor(average(n))}, or a larger late="
            )
        return closest_count(wanted, n, average)


@dataclass(frozen=True, kw_only=True)
class VScanBoundary(Reducer):
    """First stage of :class:`VScan`: the two scans in the tower, and the merging of what they leave out.

    Parameters
    ----------
    course : Course
        What the later stages leave, which an average budget depends on.
    local_layer : int
        Tower layer of the local scan.
    scan : {"equal", "quota"}
        Rule of the local scan.
    window : int
        Side of a window.
    local_share : float
        Share of the budget of the local scan.
    merge : bool
        Average the tokens left out into those kept.
    official : bool
        As released.
    """

    name: ClassVar[str] = "vscan"
    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "all"
    kind: ClassVar[str] = "merge"

    course: Course = Course(cuts=(), late=())  # noqa: RUF009  frozen
    local_layer: int = 5
    scan: Literal["equal", "quota"] = "equal"
    window: int = 6
    local_share: float = 0.5
    merge: bool = True
    official: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of a shallow layer and of the penultimate one, or the attention received in them and in the last one."""
        shallow = dataclasses.replace(cls_attn(self.local_layer), name="low_attn")
        return shallow, dataclasses.replace(cls_attn(-2), name="high_attn", substitute=received_attn(-1))

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens that enter the language model; a share is rounded down."""
        return self.course.first(self.budget, n, facts.layers)

    def windows(self, signals: Signals) -> tuple[Tensor, int]:
        """Return the window of every token of one view ``(1, N)``, and the number of windows.

        Rows and columns left over belong to the last windows.
        """
        view = int(on_host(signals, "view")[0][0])
        if view < 0:  # newlines that compete have no place
            return torch.zeros_like(signals.entries), 1
        rows, cols = (max(1, side // self.window) for side in signals.layout.grids[view])
        row, col = signals.of("row") // self.window, signals.of("col") // self.window
        return row.clamp(max=rows - 1) * cols + col.clamp(max=cols - 1), rows * cols

    def local(self, signals: Signals) -> Tensor:
        """Mark the tokens of one view that stand out in their window, ``(1, N)`` bool."""
        score, count = signals.low_attn, int(signals.budget * self.local_share)
        window, many = self.windows(signals)
        each = count // many if self.scan == "equal" else -(-count // many)
        quota = torch.full((1, many), each, device=score.device)
        best = topk_per_group(score, window, quota)
        if self.scan == "equal":
            return best
        most = torch.full((1,), count, device=score.device)
        return topk_mask(score.masked_fill(~best, -torch.inf), most) & best

    def overall(self, signals: Signals, local: Tensor) -> Tensor:
        """Return the scores of the global scan of one view ``(1, N)``: those of local picks are out of the race."""
        return signals.high_attn.masked_fill(local, 0.0 if self.official else -torch.inf)

    def overall_count(self, signals: Signals, local: Tensor) -> Tensor:
        """Return how many tokens the global scan of one view takes, ``(1,)``."""
        if self.official:
            return torch.full((1,), signals.budget - int(signals.budget * self.local_share), device=local.device)
        return signals.budget - local.sum(1)

    def scans(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Mark the local and the global picks of one view, ``(1, N)`` each; as released a token may be both."""
        local = self.local(signals)
        return local, topk_mask(self.overall(signals, local), self.overall_count(signals, local))

    def choose(self, signals: Signals) -> Selection:
        """Keep the picks of one view, and average every other token into the most similar one of them."""
        with torch.no_grad():
            local, overall = self.scans(signals)
            index, _ = compacted(local | overall, None if self.official else signals.budget)
            if not self.merge:
                return Selection(index)
            kept = signals.features[:, index[0]]
            owner = pairwise_top1(signals.features, kept)[1]
            owner = owner.scatter(1, index, torch.arange(index.shape[1], device=index.device)[None])
        return Selection(index, merge_scatter(signals.features, owner, index.shape[1]), owner)

    def select(self, signals: Signals) -> Selection:
        """Scan every view by itself."""
        return each_view(signals, self.choose, floor=self.official)


@dataclass(frozen=True, kw_only=True)
class VScanLate(Scorer):
    """A later stage of :class:`VScan`: the tokens the last prompt token looks at stay.

    Parameters
    ----------
    course : Course
        All cuts.
    number : int
        Which cut this is.
    rotary : bool
        Whether queries and keys are rotated by their positions.
    """

    name: ClassVar[str] = "vscan"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "compete"

    course: Course
    number: int = 0
    rotary: bool = True

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.course.cuts[self.number]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention of the last prompt token in the layer about to run."""
        return ((next_last_attn if self.rotary else placeless_last_attn)(self.layer),)

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens this cut leaves of an image that had ``n``."""
        return self.course.after(self.course.first(self.budget, n, facts.layers))[self.number]

    def score(self, signals: Signals) -> Tensor:
        """Return the previewed attention row."""
        return signals.next_last_attn if self.rotary else signals.placeless_last_attn


@register(
    "vscan",
    paper="arXiv:2505.22654",
    code="https://github.com/Tencent/SelfEvolvingAgent @ a82450e (VScan)",
    licence="MIT",
    presets={
        "llava15-64": {"keep": 96, "layers": (16,), "late": (32,)},
        "llavanext-320": {"keep": 480, "layers": (16,), "late": (160,)},
        "qwen25vl": {"keep": 0.167, "layers": (14,), "late": (0.333,)},
    },
)
@dataclass(frozen=True, kw_only=True)
class VScan(Schedule):
    """Two scans in the tower choose patches and absorb the others; in the middle of the language model the text chooses again.

    **Before the language model**, view by view. The local scan takes half of the budget: the patches with the highest CLS attention
    of a shallow tower layer, equally many in every window of the picture. The global scan takes the rest: the highest CLS attention
    of the penultimate layer among the others. Every patch left out joins the kept one whose projected token is most similar
    (cosine), and each kept token becomes the mean of itself and those that joined it. Newline tokens stay, on top of the budget.

    **Inside.** Before the decoder layers ``layers`` the visual tokens are ranked by the attention of the last prompt token in the
    layer about to run (softmax over all tokens, mean over heads), and ``late`` of them stay, in order; newline tokens compete.
    Positions are renumbered.

    Towers without a class token are scored by the mean attention a patch receives, in the last layer in place of the penultimate
    one, as the release does for Qwen2.5-VL. There windows have 4 x 4 tokens, the local scan takes tokens by falling score, from no
    window more than its share rounded up (``scan="quota"``), and ranking inside the language model leaves the rotation of queries
    and keys out. The former holds here for all towers that merge patches, the latter for all models with multi-dimensional
    positions.

    Deviates: what equal windows cannot share evenly goes to the global scan, and no patch is taken twice, so that exactly ``keep``
    tokens stay; the release loses tokens there, and where attention underflows to zeros takes local picks again
    (``official=True``). Below two tokens per window there is no local scan, the release fails. The budget counts an image and is
    shared by its views; the release gives all of it to each, and preset ``llavanext-320`` is its 96 and 32 tokens for five views.
    Windows of an AnyRes crop hold the patches that are no padding; in the release padding competes and merges. Sides shorter than
    a window make one window. Rotation is taken out of queries and keys after the fact, which costs a rounding.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model; a share is rounded down. ``avg_tokens`` counts the later cuts.
    layers : tuple of int or float, default (0.5,)
        Decoder layers before which the text chooses: indices, or shares of the model's layers. Empty: nowhere.
    late : tuple of int or float, default (1/3,)
        What each of them leaves: tokens per image, or a share of those there, rounded down.
    local_layer : int or float, default 0.25
        Tower layer of the local scan: its number counted from 1, or the share of the tower's layers it stands at (rounded down;
        0.25 is layer 6 of CLIP-L's 24 and layer 8 of Qwen2.5-VL's 32), or the next one that attends to the whole picture.
    local_share : float, default 0.5
        Share of the budget of the local scan.
    scan : {"equal", "quota"} or None
        Rule of the local scan; ``None``: ``"quota"`` on towers that merge patches, otherwise ``"equal"``.
    window : int or None
        Side of a window; ``None``: 4 with ``"quota"``, 6 with ``"equal"``.
    merge : bool, default True
        Whether patches left out are averaged into kept ones.
    rotary : bool or None
        Whether ranking inside the language model rotates queries and keys; ``None``: where positions are one-dimensional.
    official : bool, default False
        As released: fewer tokens where windows do not share evenly, local picks that may be taken twice, and ``keep // views``
        tokens per view.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.BOUNDARY, Stage.DECODER)

    layers: tuple[int | float, ...] = (0.5,)
    late: tuple[int | float, ...] = (1 / 3,)
    local_layer: int | float = 0.25
    local_share: float = 0.5
    scan: Literal["equal", "quota"] | None = None
    window: int | None = None
    merge: bool = True
    rotary: bool | None = None
    official: bool = False
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that mean nothing on any model."""
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "late", tuple(self.late))
        good = all(not isinstance(x, bool) and (0 < x <= 1 if isinstance(x, float) else x >= 1) for x in self.late)
        if len(self.late) != len(self.layers) or not good:
            raise UnknownArgumentError(
                f"vscan: late={self.late!r} is not possible; give tokens (an int) or a share in (0, 1] for each of the "
                f"{len(self.layers)} layers"
            )
        layer = self.local_layer
        if isinstance(layer, bool) or layer <= 0 or (isinstance(layer, float) and not layer <= 1.0):
            raise UnknownArgumentError(
                f"vscan: local_layer={layer!r} is not a layer; use its number from 1, or a share of the depth in (0, 1]"
            )
        if isinstance(self.local_share, bool) or not 0 <= self.local_share <= 1:
            raise UnknownArgumentError(f"vscan: local_share={self.local_share!r} is not a share; use a number from 0 to 1")
        if self.scan not in (None, "equal", "quota"):
            raise UnknownArgumentError(f"vscan: scan={self.scan!r} is not possible; use one of equal, quota")
        if self.window is not None and (isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1):
            raise UnknownArgumentError(f"vscan: window={self.window!r} is not a side; use an int of at least 1")

    def bind(self, facts: Facts) -> VScan:
        """Choose the rules for this tower, and place the cuts.

        Raises
        ------
        BudgetError
            A budget above the tokens there are, or an average that cannot be met.
        UnknownArgumentError
            Layers this model does not have.
        """
        check_bounds(self.budget, facts)
        number = self.local_layer
        if isinstance(number, float):
            number = max(1, int(number * facts.encoder_layers))
            while number - 1 in facts.windowed and number < facts.encoder_layers:
                number += 1
        if number > facts.encoder_layers:
            raise UnknownArgumentError(
                f"vscan: local_layer={number} is out of range, the vision tower has {facts.encoder_layers} layers: use "
                f"1..{facts.encoder_layers}, or a share of the depth such as 0.25"
            )
        scan = self.scan or ("quota" if facts.merge > 1 else "equal")
        course = Course(cuts=place_cuts(self.layers, facts, "vscan") if self.layers else (), late=self.late)
        rotary = not facts.mrope if self.rotary is None else self.rotary
        shared: dict[str, Any] = {k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per")}
        first = VScanBoundary(
            **shared,
            course=course,
            local_layer=number - 1,
            scan=scan,
            window=self.window or (4 if scan == "quota" else 6),
            local_share=self.local_share,
            merge=self.merge,
            official=self.official,
        )
        cuts = (VScanLate(**shared, course=course, number=i, rotary=rotary) for i in range(len(self.layers)))
        bound = copy.copy(self)
        object.__setattr__(bound, "_parts", checked((first, *cuts), facts))
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """The stages; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'vscan' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
