"""FrameFusion: merge tokens into their like of the frame before, layer after layer, then prune once by attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Need, Positions, Reducer, Schedule, Selection, Signals, Stage, check_bounds
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import attention_rows, compacted, merge_scatter, topk_per_group, topk_sorted, widened
from vtc.registry import register
from vtc.signals import AttentionTap
from vtc.video import ClipReducer, check_number, cosines, spread
from vtc.views import frame_quotas, joined, members, narrow

RELEASED_LAYERS = 28
"""Decoder layers the release counts with, whatever the model has."""
SHORT = "fewer tokens than the budget: kept whole"


@dataclass(frozen=True)
class TailAttention:
    """Measure: attention of the row's last real tokens, mean over heads and these tokens, ``(B, K)``.

    Parameters
    ----------
    queries : int
        How many tokens.
    """

    queries: int = 1

    def __call__(self, tap: AttentionTap) -> Tensor:
        """Leave out what stands before the row's first token."""
        index = tap.last[:, None] - torch.arange(self.queries, device=tap.last.device)
        there = index >= 0
        if tap.valid is not None:
            there = there & tap.valid.gather(1, index.clamp(min=0))
        rows, mask = tap.rows(index.clamp(min=0))
        weight = there[..., None].float()
        return (attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask) * weight).sum(1) / weight.sum(1)


# --------------------------------------------------------------------------------------------------------------- one call
@dataclass(frozen=True)
class State:
    """How far a clip has come.

    Attributes
    ----------
    shares : tuple of float
        Share of the tokens merged by each call so far.
    merged, pruned : bool
        Nothing more is to be merged, or pruned.
    """

    shares: tuple[float, ...] = ()
    merged: bool = False
    pruned: bool = False


@dataclass(frozen=True)
class Rule:
    """Settings of the merging, and what may still go.

    Attributes
    ----------
    similar, dry : float
        Cosine from which on tokens are merged; share merged below which merging has dried up.
    cost : float or None
        Tokens averaged over ``layers``, as a share; ``None``: ``left`` counts.
    layers : int
        Decoder layers.
    left : int
        Tokens to be left in the end.
    """

    similar: float
    dry: float
    cost: float | None
    layers: int
    left: int = 0

    def allowed(self, shares: Sequence[float], n: int) -> float:
        """Share of ``n`` tokens that may go when these shares went before."""
        if self.cost is None:
            return max(0.0, (n - self.left) / n)
        return sparsity(shares, self.cost, self.layers)

    def count(self, allowed: float, n: int) -> int:
        """How many of ``n`` tokens may go, rounded down."""
        return max(0, n - self.left) if self.cost is None else int(allowed * n)

    def kept(self, shares: Sequence[float], n: int) -> int:
        """How many of ``n`` tokens pruning leaves, rounded half to even; one at least."""
        if self.cost is None:
            return max(1, min(self.left, n))
        return max(1, round(n * (1 - self.allowed(shares, n))))

    def after(self, state: State, shown: int, went: int) -> State:
        """Return the state behind a merging call that removed ``went`` of ``shown`` tokens.

        Where just as many as allowed are similar by chance, this cannot be told from having reached the budget.
        """
        allowed = self.allowed(state.shares, shown)
        share = went / shown
        if share >= allowed or went == self.count(allowed, shown) > 0:
            return State(state.shares, True, True)
        return State((*state.shares, share), share < self.dry, False)


def sparsity(shares: Sequence[float], cost: float, layers: int, *, strict: bool = False) -> float:
    """Share of the tokens there that must go now for the average over all layers to be ``cost``.

    Parameters
    ----------
    shares : sequence of float
        What went before each layer so far.
    cost : float
        Share of the visual tokens, averaged over the layers.
    layers : int
        Decoder layers.
    strict : bool, default False
        Raise :class:`BudgetError` where the layers so far have used up more than that; otherwise everything must go.
    """
    spent, now = 0.0, 1.0
    for share in shares:
        now *= 1 - share
        spent += now
    rest = layers * cost - spent
    if rest < 0 and strict:
        raise BudgetError(f"framefusion: an average of {cost} cannot be met, since the layers so far took {spent / layers:.3f}")
    part = max(rest, 0.0) / ((layers - len(shares)) * now)
    return 0.0 if part > 1 else 1 - part


def neighbours(features: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens by place and time ``(n,)``, and each one's cosine with the one before in its place; -2 for the first.

    Parameters
    ----------
    features : Tensor
        ``(n, D)``, in the order of time.
    patch : Tensor
        ``(n,)`` place of each in its frame.
    """
    order = torch.sort(patch, stable=True).indices
    found = features.new_full((len(order),), -2.0, dtype=torch.float64)
    for lo in range(1, len(order), 8192):
        here = order[lo : lo + 8192]
        before = order[lo - 1 : lo - 1 + len(here)]
        cosine = cosines(features[before], features[here])
        found[lo : lo + len(here)] = torch.where(patch[before] == patch[here], cosine, -2.0)
    return order, found


def to_merge(similarity: Tensor, rule: Rule, shares: Sequence[float]) -> tuple[Tensor, float, float]:
    """Return which tokens ``(n,)`` bool go into the one before, the share of similar ones, and the share allowed."""
    n = len(similarity)
    similar = similarity >= rule.similar
    share, allowed = int(similar.sum()) / n, rule.allowed(shares, n)
    if share < allowed:
        return similar, share, allowed
    count = rule.count(allowed, n)
    best = torch.zeros_like(similar)
    if count:
        best[topk_sorted(similarity[None], count)[0]] = True
    return best, share, allowed


def runs(order: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens left ``(k,)``, ascending, and which of them ``(n,)`` each token goes to: the last before it that stays."""
    head = ~gone
    left, turn = order[head].sort()
    rank = torch.empty_like(turn).scatter(0, turn, torch.arange(len(turn), device=turn.device))
    return left, torch.empty_like(order).scatter(0, order, rank[head.cumsum(0) - 1])


# ----------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True, kw_only=True)
class FusionStage(ClipReducer):
    """One call of :class:`FrameFusion`, in front of the language model; options as there.

    Parameters
    ----------
    number : int
        Of the call.
    calls : tuple of int
        Decoder layers in front of which the calls are.
    layers : int
        Decoder layers counted with.
    """

    name: ClassVar[str] = "framefusion"
    kind: ClassVar[str] = "merge"
    decides_itself: ClassVar[bool] = True
    default_positions: ClassVar[Positions] = "original"

    number: int = 0
    calls: tuple[int, ...] = (0,)
    layers: int = RELEASED_LAYERS
    similar: float = 0.6
    dry: float = 0.1
    queries: int = 1

    def count(self, n: int, facts: Facts) -> int:
        """No more than there are: what goes follows from the clip."""
        return n

    def rule(self, slots: int) -> Rule:
        """Return the settings for a clip of so many tokens."""
        if self.keep is not None:
            return Rule(self.similar, self.dry, None, self.layers, self.budget.tokens(slots))
        amount = self.budget.amount
        return Rule(self.similar, self.dry, amount if isinstance(amount, float) else min(1.0, amount / slots), self.layers)

    def state(self, rule: Rule, signals: Signals) -> State:
        """Return what the earlier calls on one clip have come to; layers without a call count as calls that found nothing."""
        state, n = State(), signals.shape[1]
        if not signals.layout.video:  # nothing comes before a picture: the first call that knows attention prunes
            return State((0.0,) * self.calls[min(self.number, 1)], self.number > 0, self.number > 1)
        history = signals.history[0] if signals.history else ()
        for i, (shown, kept) in enumerate([*history, *[(n, n)] * (self.number - len(history))]):
            if state.merged:
                state = State(state.shares, True, True)
                continue
            state = rule.after(state, shown, shown - kept)
            skipped = self.calls[i + 1] - self.calls[i] - 1
            if not state.pruned:
                state = State((*state.shares, *[0.0] * skipped), state.merged, state.pruned)
        return state

    def choose(self, signals: Signals) -> Selection:
        """Merge or prune one clip, or the views of one image."""
        n = signals.shape[1]
        whole = Selection.all(n, 1, signals.features.device)
        if self.budget.exceeds(signals.slots) and self.number == 0 and signals.budget == n:
            return Selection(whole.index, note=SHORT)
        rule = self.rule(signals.slots)
        state = self.state(rule, signals)
        if state.merged:
            return whole if state.pruned else self.prune(signals, rule.kept(state.shares, n))
        if not signals.layout.video or n == 0:
            return whole
        rows, cols = signals.layout.grids[0]
        patch = (signals.of("row") * cols + signals.of("col"))[0]
        with torch.no_grad():
            order, similarity = neighbours(signals.features[0], patch)
            gone, _, _ = to_merge(similarity, rule, state.shares)
            if not bool(gone.any()):
                return whole
            left, owner = runs(order, gone)
        merged = merge_scatter(widened(signals.features), owner[None], len(left))
        return Selection(left[None], merged.to(signals.features.dtype), owner[None])

    def prune(self, signals: Signals, count: int) -> Selection:
        """Keep the most attended tokens; without attention, evenly spread ones."""
        if count >= signals.shape[1]:
            return Selection.all(signals.shape[1], 1, signals.features.device)
        with torch.no_grad():
            if "tail_attn" in signals.taps:
                return Selection(topk_sorted(signals.tail_attn, count))
            every = torch.arange(signals.shape[1], device=signals.entries.device)
            return Selection(spread(every, count)[None])

    def select(self, signals: Signals) -> Selection:
        """Choose the survivors of every clip or image by itself; never more than the budget."""
        every = torch.arange(signals.shape[1], device=signals.entries.device)
        parts = []
        for b in range(signals.shape[0]):
            own = narrow(signals, b, every, signals.budget, 0)
            part = self.choose(own)
            parts.append(part if part.index.shape[1] <= signals.budget else self.prune(own, signals.budget))
        return joined(signals, parts)

    def select_frames(self, signals: Signals) -> Selection:
        """Prune every frame to its own budget, in the first call that knows attention."""
        batch, n = signals.shape
        if "tail_attn" not in signals.taps or self.number != 1:
            return Selection.all(n, batch, signals.features.device)
        frame, _ = frame_quotas(signals)
        quota = [
            [self.budget.tokens(max(1, len(m)), start=self.calls[1], layers=self.layers) for m in own[:-1]] + [len(own[-1])]
            for own in members(signals)
        ]
        chosen = topk_per_group(signals.tail_attn, frame, torch.tensor(quota).to(frame.device, non_blocking=True))
        index, valid = compacted(chosen)
        return Selection(index, valid=valid)


@dataclass(frozen=True, kw_only=True)
class FusionLayer(FusionStage):
    """The same in front of a later decoder layer."""

    stage: ClassVar[Stage] = Stage.DECODER

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.calls[self.number]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention of the last tokens in the layer before."""
        return (Need("tail_attn", "text", self.layer - 1, TailAttention(self.queries)),)


@register(
    "framefusion",
    paper="arXiv:2501.01986",
    code="https://github.com/thu-nics/FrameFusion @ fbec1d2",
    licence="MIT",
    presets={
        "release": {"avg_tokens": 0.3},
        "qwen2vl": {"avg_tokens": 0.3, "similar": 0.5, "queries": 4},
    },
)
@dataclass(frozen=True, kw_only=True)
class FrameFusion(Schedule):
    """Merge each token into its like of the frame before, layer after layer until that dries up; then prune once by attention.

    In front of every decoder layer a token is compared with the one before it in its place of the picture (in the frame before, or
    the last that is left), and those with a cosine of at least ``similar`` go into it: a run of them becomes the plain mean, in
    the place and at the position of its first. When less than the share ``dry`` was merged, the next call prunes: it keeps the
    tokens the last ``queries`` tokens attend to most, as many as the budget leaves. Where more are alike than may go, the most
    similar go, and all is done.

    The release's budget is the share of the visual tokens averaged over the layers: ``avg_tokens``. With ``keep`` the number left
    in the end counts.

    Deviates: the release acts inside a layer, behind its attention; here behind the layer, whose MLP still runs on all tokens. It
    counts with 28 layers, whatever the model has (``official=True``), and raises where the layers so far took too much; here the
    depth is the model's, and all that may go then goes. What earlier calls did is told from the numbers they left: where just as
    many tokens as may go are alike by chance, merging counts as done. Newline tokens, which it merges over time in
    LLaVA-Video, stay. In layers where visual features still enter (Qwen3-VL) there is no call. A picture has no frame
    before, and is pruned once; with ``per="frame"`` so is every frame.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip left in the end; ``avg_tokens``, the release's budget, averages over the layers.
    similar : float, default 0.6
        Cosine from which on tokens are merged; the paper tunes it per model.
    dry : float, default 0.1
        Share of tokens merged below which merging ends.
    queries : int, default 1
        Last tokens whose attention counts in pruning; the release takes 4 on Qwen2-VL.
    official : bool, default False
        Count with 28 layers.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.BOUNDARY, Stage.DECODER)

    similar: float = 0.6
    dry: float = 0.1
    queries: int = 1
    official: bool = False
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        check_number("framefusion", "similar", self.similar, -1, 1)
        check_number("framefusion", "dry", self.dry, 0, 1)
        check_number("framefusion", "queries", self.queries, 1, whole=True)
        if self.newlines == "compete":
            raise UnknownArgumentError(
                "framefusion: newlines='compete' is not possible, since newline tokens are in no frame; use all, with_row or none"
            )

    def bind(self, facts: Facts) -> FrameFusion:
        """Place a call in front of every decoder layer."""
        check_bounds(self.budget, facts)
        calls = (0, *range(facts.first_layer, facts.layers))
        if len(calls) < 2:
            raise UnknownArgumentError("'framefusion' needs a decoder layer to prune in front of, and this model has none")
        shared: dict[str, Any] = {
            k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per", "similar", "dry", "queries")
        }
        shared |= {"calls": calls, "layers": RELEASED_LAYERS if self.official else facts.layers}
        bound = copy.copy(self)
        made = [(FusionLayer if i else FusionStage)(**shared, number=i) for i in range(len(calls))]
        object.__setattr__(bound, "_parts", tuple(made))
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """All calls; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'framefusion' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
