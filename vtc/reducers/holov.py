"""HoloV: every part of the picture gets a share of the budget, and keeps its best-attended tokens, before the language model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.kernels import compacted, dot, take, topk, topk_per_group, widened
from vtc.registry import register
from vtc.signals import cls_attn, received_attn

EPS = 1e-6
PRECISE = 1000.0
"""Factor of the release on attention."""


def crop_sizes(n: int, crops: int) -> list[int]:
    """Return how many of ``n`` consecutive tokens each crop holds: the first ones may hold one more, none is empty."""
    each, more = divmod(n, crops)
    return [size for size in [each + 1] * more + [each] * (crops - more) if size]


def crop_score(tokens: Tensor, attention: Tensor, beta: float, *, bare: bool) -> Tensor:
    """Return the score of one crop, a float64 number.

    Parameters
    ----------
    tokens, attention : Tensor
        ``(n, D)`` and ``(n,)``.
    beta : float
        Weight of the variance of similarities.
    bare : bool
        As released: the attention of a token that is alone is not multiplied by 1000.
    """
    attention, n = attention.double(), len(tokens)
    if n == 1:
        return attention[0] if bare else PRECISE * attention[0]
    full = widened(tokens)
    unit = full / (full.norm(dim=1, keepdim=True) + EPS)
    alike = dot(unit, unit).double()
    alike[torch.arange(n, device=alike.device), torch.arange(n, device=alike.device)] = 0
    mean = alike.sum(1, keepdim=True) / (n - 1)
    variance = (alike - mean).square().sum(1) / (n - 1)  # the zero of the diagonal included
    attention = PRECISE * attention
    gamma = attention.abs().mean() / (variance.abs().mean() + EPS)
    return (attention + beta * gamma * variance).mean()


def crop_weights(score: Tensor) -> Tensor:
    """Return every crop's share of the budget, ``(P,)``."""
    return score / (score.sum() + EPS)


def crop_budgets(weight: Tensor, tokens: int) -> Tensor:
    """Return how many tokens each crop is to keep, ``(P,)`` int64: some may be more than it holds.

    Shares are rounded down, and what is left goes to the crops of the largest weight, one each. Equal weights: the first.
    """
    budget = (weight * tokens).floor().long()
    return budget + (falling_rank(weight) < tokens - budget.sum())


def falling_rank(weight: Tensor) -> Tensor:
    """Return the place of every crop ``(P,)`` when the largest weight comes first; among equals the first."""
    order = torch.sort(weight, descending=True, stable=True).indices
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def handed_on(budget: Tensor, weight: Tensor, size: Tensor, tokens: int) -> Tensor:
    """Return budgets ``(P,)`` that all crops can use and that sum to ``tokens``. No host synchronisation.

    What a crop cannot take goes to those with room, one each in the order of falling weight, round after round.
    """
    got = torch.minimum(budget, size)
    left, room, rank = tokens - got.sum(), size - got, falling_rank(weight)
    order = rank.argsort()
    rounds = torch.arange(tokens + 1, device=size.device)
    full = (torch.minimum(room[None], rounds[:, None]).sum(1) <= left).sum() - 1  # rounds in which everybody with room gets one
    more = torch.minimum(room, full)
    waiting = room > full
    turn = waiting[order].cumsum(0)[rank]
    return got + more + (waiting & (turn <= left - more.sum()))


@register(
    "holov",
    paper="arXiv:2510.02912",
    code="https://github.com/obananas/HoloV @ 1d2e65e",
    licence="Apache-2.0",
    presets={
        "llava15-192": {"keep": 192},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llavanext-64": {"keep": 64},
    },
)
@dataclass(frozen=True, kw_only=True)
class HoloV(Reducer):
    """Cut the visual sequence into crops, share the budget among them, and keep the best-attended tokens of each.

    A crop is a run of consecutive tokens: a band of rows. Its score is the mean of its tokens' CLS attention in the tower's
    penultimate layer plus ``beta`` times the variance of each token's cosines with the others of the crop, scaled to the same mean.
    Budgets are proportional to the scores, rounded down, and what is left goes to the crops of the largest score; within a crop
    attention alone decides. Since the scaling takes the variance's size away, budgets follow attention unless a crop's tokens are
    all orthogonal. AnyRes images are one sequence: the thumbnail, then the stitched crops row by row; newline tokens are dropped.

    Towers without a class token are scored by the mean attention a patch receives in the last layer, as in the release for
    Qwen2.5-VL, whose merged tokens have the mean of their four patches.

    Deviates: a crop with a larger budget than tokens hands the rest on, to the crops of the largest score that have room, so that
    exactly ``keep`` tokens stay; the release fills up with vectors of zeros (``official=True``). A crop of one token has its
    attention multiplied by 1000 as all others have; in the release it has not, and gets nothing (``official=True``). Tokens stay in
    sequence order, where the release lists crop by crop, within a crop by falling attention (``official=True``). Scores are float64
    from float32 similarities. On Qwen2.5-VL the release pairs scores in window order with tokens in raster order and takes the span
    of the image one token too early; here neither happens. The paper speaks of spatial crops, the code cuts the flat sequence (the
    paper's text unconfirmed). 64 tokens are fixed in the release; 192 and 128 are budgets of the usual protocol.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model; a share is rounded down.
    crops : int or "auto", default "auto"
        Crops of an image. ``"auto"``: 16, and on towers that merge patches 16/9 of the number of tokens over the budget, the rule
        of the release for Qwen2.5-VL.
    beta : float, default 0.09
        Weight of the variance, at least 0.
    official : bool, default False
        As released: the order described above, crops of one token nearly without weight, and zero vectors for what a crop cannot
        take. Needs positions that are renumbered, and no newlines.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"

    crops: int | Literal["auto"] = "auto"
    beta: float = 0.09
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no number of crops or weight, and orders the release does not have."""
        super().__post_init__()
        if self.crops != "auto" and (isinstance(self.crops, bool) or not isinstance(self.crops, int) or self.crops < 1):
            raise UnknownArgumentError(f"holov: crops={self.crops!r} is not possible; use an int of at least 1, or 'auto'")
        if isinstance(self.beta, bool) or not 0 <= self.beta < math.inf:
            raise UnknownArgumentError(f"holov: beta={self.beta!r} is not possible; use a number of at least 0")
        if self.official and self.newlines not in (None, "none"):
            raise UnknownArgumentError(f"holov: official=True drops newlines, newlines={self.newlines!r} is not possible")

    def bind(self, facts: Facts) -> Reducer:
        """Resolve the number of crops for the model's tower."""
        super().bind(facts)
        if self.official and facts.mrope:
            raise UnsupportedFeatureError(
                "holov: official=True lists tokens in another order than the picture's, which multi-dimensional positions do not "
                "follow: leave official unset"
            )
        if self.official and self.position_policy != "compact":
            raise UnknownArgumentError(
                "holov: official=True renumbers positions, positions='original' is not possible: leave it unset"
            )
        return dataclasses.replace(self, crops=16) if self.crops == "auto" and facts.merge == 1 else self

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of the penultimate layer, or the attention received in the last one."""
        return (dataclasses.replace(cls_attn(-2), substitute=received_attn(-1)),)

    def count(self, n: int, facts: Facts) -> int:
        """Return the number of tokens; a share is rounded down, to at least one token."""
        return self.budget.tokens(n, rounding=math.floor)

    def sizes(self, n: int, tokens: int) -> list[int]:
        """Return the sizes of the crops of ``n`` tokens of which ``tokens`` are to stay."""
        return crop_sizes(n, max(1, 1024 * n // (576 * tokens)) if self.crops == "auto" else self.crops)

    def scores(self, signals: Signals) -> Tensor:
        """Return ``(B, P)`` scores of the crops, float64."""
        size = self.sizes(signals.shape[1], signals.budget)
        rows = [
            [crop_score(x, a, self.beta, bare=self.official) for x, a in zip(f.split(size), s.split(size), strict=True)]
            for f, s in zip(signals.features.detach(), signals.cls_attn.detach(), strict=True)
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def budgets(self, signals: Signals, score: Tensor) -> Tensor:
        """Return ``(B, P)`` tokens that each crop is to keep, given the scores."""
        size = torch.tensor(self.sizes(signals.shape[1], signals.budget)).to(score.device, non_blocking=True)
        out = []
        for weight in map(crop_weights, score):
            budget = crop_budgets(weight, signals.budget)
            out.append(budget if self.official else handed_on(budget, weight, size, signals.budget))
        return torch.stack(out)

    def released_order(self, signals: Signals, budget: Tensor) -> Tensor:
        """Return ``(B, K)`` tokens of the release's sequence given the budgets of the crops; -1 for a vector of zeros."""
        size, rows = self.sizes(signals.shape[1], signals.budget), []
        start = [sum(size[:crop]) for crop in range(len(size))]
        for attention, quota in zip(signals.cls_attn.detach(), budget.tolist(), strict=True):
            row = [
                torch.arange(n, device=attention.device) + at if k >= n else topk(attention[None, at : at + n], k)[0] + at
                for n, at, k in zip(size, start, quota, strict=True)
            ]
            row = torch.cat(row)[: signals.budget]
            rows.append(torch.nn.functional.pad(row, (0, signals.budget - len(row)), value=-1))
        return torch.stack(rows)

    def released(self, signals: Signals) -> Selection:
        """Return the release's sequences in the images' first slots."""
        order = self.released_order(signals, self.budgets(signals, self.scores(signals)))
        batch, n = signals.shape
        place = torch.arange(signals.budget, device=order.device).expand(batch, -1).contiguous()
        tokens = torch.where(order[..., None] >= 0, take(signals.features, order.clamp(min=0)), 0)
        owner = torch.full((batch, n + 1), -1, device=order.device).scatter(1, torch.where(order >= 0, order, n), place)
        empty = int((order < 0).sum())
        return Selection(
            place, tokens, owner[:, :n], note=f"{empty} vectors of zeros among the tokens, as released" if empty else ""
        )

    def select(self, signals: Signals) -> Selection:
        """Keep the best-attended tokens of every crop."""
        if self.official:
            return self.released(signals)
        with torch.no_grad():
            size = torch.tensor(self.sizes(signals.shape[1], signals.budget))
            crop = torch.arange(len(size)).repeat_interleave(size).to(signals.features.device, non_blocking=True)
            quota = self.budgets(signals, self.scores(signals))
            chosen = topk_per_group(signals.cls_attn, crop.expand(signals.shape), quota)
            return Selection(compacted(chosen, signals.budget)[0])
