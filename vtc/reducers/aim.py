"""AIM: merge similar visual tokens before the language model, and drop more and more of the rest inside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Schedule, Scorer, Selection, Signals, Stage, check_bounds
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import apportion, attention_walk, merge_scatter, pairwise_top1, take
from vtc.registry import register
from vtc.schedule import checked, closest_count, layer_average
from vtc.signals import AttentionTap, all_keys
from vtc.views import members

STEPS, TEMPERATURE = 5, 0.1
"""Steps of the importance, and the temperature of its attention."""
RELEASED = {28: (14, 22), 32: (13, 21)}
"""First layer after which tokens leave and first layer without visual tokens, by the number of decoder layers."""


# --------------------------------------------------------------------------------------------------------------- merging
@dataclass(frozen=True, eq=False)
class Merged:
    """Tokens of ``n`` independent groups during merging.

    Attributes
    ----------
    metric, tokens : Tensor
        ``(n, t, c)`` what is compared, and what is handed on.
    slot : Tensor
        ``(n, t)`` the original token each one stands in the place of.
    owner : Tensor
        ``(n, N)`` which of the ``t`` every original token went into.
    """

    metric: Tensor
    tokens: Tensor
    slot: Tensor
    owner: Tensor


def merge_once(now: Merged, r: int, *, official: bool = False) -> Merged:
    """Merge the ``r`` tokens at even places that are most similar to one at an odd place into it, by a plain mean.

    The others keep their order (``official``: remaining even tokens in front, by falling similarity, then the odd ones).
    """
    n, t, _ = now.metric.shape
    r = min(r, t // 2)
    best, target = pairwise_top1(now.metric[:, ::2], now.metric[:, 1::2])
    order = torch.sort(best, dim=1, descending=True, stable=True).indices
    gone, left = order[:, :r], order[:, r:]
    odd = torch.arange(t // 2, device=best.device).expand(n, -1)
    stay = torch.cat([left * 2, odd * 2 + 1], 1)  # places of the survivors, in the order of the release
    if not official:
        stay = stay.sort(1).values
    rank = torch.full((n, t), -1, device=best.device).scatter(1, stay, torch.arange(t - r, device=best.device).expand(n, -1))
    rank = rank.scatter(1, gone * 2, rank.gather(1, target.gather(1, gone) * 2 + 1))
    metric, tokens = (merge_scatter(x, rank, t - r) for x in (now.metric, now.tokens))
    return Merged(metric, tokens, now.slot.gather(1, stay), rank.gather(1, now.owner))


def merge_to(metric: Tensor, tokens: Tensor, target: int, *, official: bool = False) -> Merged:
    """Merge ``(n, t, c)`` tokens down to ``target``, halving at most in every step."""
    n, t, _ = metric.shape
    identity = torch.arange(t, device=metric.device).expand(n, -1)
    now = Merged(metric, tokens, identity, identity)
    while now.metric.shape[1] > target:
        now = merge_once(now, now.metric.shape[1] - target, official=official)
    return now


# ------------------------------------------------------------------------------------------------------------ importance
def importance(tap: AttentionTap, steps: int = STEPS, temperature: float = TEMPERATURE) -> Tensor:
    """Measure: mass each token holds after a few steps along the attention, root mean square over heads, ``(B, K)``.

    All real tokens start alike; attention is that of the layer at a tenth of its temperature.
    """
    start = tap.valid.to(torch.float32) / tap.valid.sum(1, keepdim=True)
    scaling = tap.scaling / temperature
    walked = attention_walk(tap.query, tap.key, start, steps=steps, scaling=scaling, mask=tap.mask, causal=tap.causal)
    return (walked**2).mean(1).sqrt()


def share_after(layer: int, start: int, stop: int) -> float:
    """Return the share of visual tokens still there after decoder layer ``layer``: one before ``start``, none from ``stop``."""
    return 1.0 if layer < start else max(0.0, 1 - (layer - start + 1) / (stop - start))


def entering(budget: Any, n: int, start: int, stop: int, layers: int, prune: bool) -> int:
    """Return how many of an image's ``n`` tokens enter the language model.

    Raises
    ------
    BudgetError
        A layer average above what an image that enters whole has.
    """
    if budget.keep is not None or not prune:
        return budget.tokens(n)
    wanted = budget.amount * n if isinstance(budget.amount, float) else min(budget.amount, n)

    def average(v: int) -> float:
        cuts = range(start + 1, min(stop, layers - 1) + 1)
        return layer_average(v, cuts, [int(v * share_after(cut - 1, start, stop)) for cut in cuts], layers)

    found = closest_count(wanted, n, average)
    if found == n and average(n) < wanted * 0.99:
        raise BudgetError(
            f"avg_tokens={budget.amount} cannot be met while tokens leave after layers {start}..{stop - 1}: use at most "
            f"{average(n) / n:.2f}, a later stop, or prune=False"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True, kw_only=True)
class AIMMerge(Reducer):
    """Merging stage of :class:`AIM`; options as there.

    Parameters
    ----------
    start, stop, layers : int
        First layer after which tokens leave, first without any, and number of decoder layers (for ``avg_tokens``).
    prune, official : bool
        As in :class:`AIM`.
    """

    name: ClassVar[str] = "aim"
    stage: ClassVar[Stage] = Stage.VISION
    kind: ClassVar[str] = "merge"
    default_newlines: ClassVar[Newlines] = "none"

    start: int
    stop: int
    layers: int
    prune: bool = True
    official: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """Keys of the tower's last layer."""
        return (all_keys(-1),)

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens that enter the language model."""
        return entering(self.budget, n, self.start, self.stop, self.layers, self.prune)

    def select(self, signals: Signals) -> Selection:
        """Merge every view on its own."""
        *views, newlines = members(signals)[0]  # the same in all images: nothing was dropped yet
        groups = [newlines, *views]
        sizes = [len(own) for own in groups]
        quota = apportion(signals.budget, sizes, sizes)
        slots, tokens, owner, done = [], [], torch.full_like(signals.entries, -1), 0
        for own, target in zip(groups, quota, strict=True):
            if not target:
                continue
            out = merge_to(signals.all_keys[:, own], signals.features[:, own], target, official=self.official)
            slots.append(own[out.slot])
            tokens.append(out.tokens)
            owner[:, own] = done + out.owner
            done += target
        at, values = torch.cat(slots, 1), torch.cat(tokens, 1)
        order = at.argsort(1)
        if not self.official:  # each in the place of the token it grew from; the release lines them up in the order of merging
            rank = order.argsort(1)
            values = take(values, order)
            owner = torch.where(owner >= 0, rank.gather(1, owner.clamp(min=0)), owner)
        return Selection(at.gather(1, order), values, owner)


@dataclass(frozen=True, kw_only=True)
class AIMPackedMerge(AIMMerge):
    """The same between projector and language model, for images of several views."""

    stage: ClassVar[Stage] = Stage.BOUNDARY


@dataclass(frozen=True, kw_only=True)
class AIMPrune(Scorer):
    """One pruning stage of :class:`AIM`, after decoder layer ``after``; options as there.

    Parameters
    ----------
    after : int
        Decoder layer that decides.
    start, stop, layers : int
        First layer after which tokens leave, first without any, and number of decoder layers.
    """

    name: ClassVar[str] = "aim"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "compete"

    after: int
    start: int
    stop: int
    layers: int

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.after + 1

    @property
    def needs(self) -> tuple[Need, ...]:
        """Importance in the layer before."""
        return (Need("importance", "text", self.after, importance),)

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens left, possibly none."""
        v = entering(self.budget, n, self.start, self.stop, self.layers, True)
        return int(v * share_after(self.after, self.start, self.stop))

    def score(self, signals: Signals) -> Tensor:
        """Return the importance."""
        return signals.importance


@register(
    "aim",
    paper="arXiv:2412.03248",
    code="https://github.com/LaVi-Lab/AIM @ edc24e9",
    licence="Apache-2.0",
    presets={
        "llava15-252": {"keep": 252, "start": 13, "stop": 21},
        "llava15-72": {"keep": 72, "start": 13, "stop": 21},
        "r25": {"keep": 0.25},
        **{f"frame-{k}": {"keep": k / 196} for k in (49, 25, 13, 7, 4)},
        "merge-r50": {"keep": 0.5, "prune": False},
        "merge-r25": {"keep": 0.25, "prune": False},
        "merge-r12": {"keep": 0.125, "prune": False},
        "merge-r3": {"keep": 0.031, "prune": False},
    },
)
@dataclass(frozen=True, kw_only=True)
class AIM(Schedule):
    """Merge similar visual tokens in front of the projector, then drop more of them after every layer until none is left.

    **Merging.** Tokens at even places are compared (cosine of the keys of the tower's last layer, all heads) with those at odd
    places; the most similar ones are merged into their partner by a plain mean, the keys too, in as many rounds as needed, each
    of which halves at most. Images of several views are merged view by view after packing, without newline tokens, since
    packing needs whole views.

    **Pruning.** After layer ``i`` from ``start`` on, ``max(0, 1 - (i - start + 1) / (stop - start))`` of the tokens that
    entered are left: those with the most mass after five steps along the layer's attention at temperature 0.1, all tokens
    starting alike, root mean square over heads. Text stays; positions stay; layers from ``stop`` on run without visual tokens.

    Deviates: the release hides pruned tokens from later layers but goes on computing them and keeps them in the cache; here
    they are gone, and the speed is real. Their rows no longer pass mass on, so that from the second pruned layer on the choice
    is an approximation of the released one. The release's masks leak into decoding (Qwen2) and turn to NaN under left padding,
    where it drops text; both are absent here. It merges images of LLaVA-1.5 and videos only: other images are an adaptation.
    Merged tokens stay in raster order; the release puts unmerged ones in front, by similarity (``official=True``). For
    LLaVA-1.5 the released code keeps 252 tokens, a commented line 72: which the paper's table shows is unconfirmed. Presets
    ``frame-K`` are the release's for LLaVA-OneVision, whose frames have 196 tokens. Schedules are given for 28 and 32 layers;
    other depths use the same shares as 32. In a conversation over several turns mass starts at the tokens of the turn that
    brings the image.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model, after merging. ``avg_tokens`` counts the pruning too, within 1 %.
    prune : bool, default True
        Whether tokens leave inside the language model.
    start, stop : int or None
        First layer after which tokens leave, and first layer without visual tokens (above the last layer: some stay to the
        end). ``None``: 14 and 22 for 28 layers, else 13/32 and 21/32 of the depth.
    official : bool, default False
        Order of merged tokens of the release.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.VISION, Stage.DECODER)

    prune: bool = True
    start: int | None = None
    stop: int | None = None
    official: bool = False
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def bind(self, facts: Facts) -> AIM:
        """Choose the place of the merging and the pruning layers.

        Raises
        ------
        BudgetError
            A budget above the tokens there are, or an average this schedule cannot meet.
        UnknownArgumentError
            ``start`` and ``stop`` that do not fit the model.
        """
        check_bounds(self.budget, facts)
        first, end = RELEASED.get(facts.layers, (round(13 / 32 * facts.layers), round(21 / 32 * facts.layers)))
        start = max(first, facts.first_layer - 1) if self.start is None else self.start
        stop = max(end, start + 1) if self.stop is None else self.stop
        if self.prune and not facts.first_layer - 1 <= start < min(stop, facts.layers - 1):
            raise UnknownArgumentError(
                f"'aim': start={start} and stop={stop} do not fit this model, give start in {facts.first_layer - 1}.."
                f"{facts.layers - 2} and a larger stop, or prune=False"
            )
        shared: dict[str, Any] = {k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per")}
        shared |= {"start": start, "stop": stop, "layers": facts.layers}
        kind = AIMPackedMerge if facts.anyres else AIMMerge
        parts: tuple[Reducer, ...] = (kind(**shared, prune=self.prune, official=self.official),)
        if self.prune:
            shared["newlines"] = None
            parts += tuple(AIMPrune(**shared, after=i) for i in range(start, min(stop, facts.layers - 1)))
        bound = copy.copy(self)
        object.__setattr__(bound, "_parts", checked(parts, facts))
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """Merging, then every pruning layer; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'aim' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
