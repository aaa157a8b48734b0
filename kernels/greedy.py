"""Greedy subsets: one token after the other, each the best given those before.

A pick needs its cosines with all tokens. Taken one at a time they cost a pass over all features, so they are made for several
tokens in one product: the picks that are likely to come next. What is likely is found out by playing the next steps on the few
tokens with the best scores. Every pick is the exact best of all tokens; the guess decides no more than whether its cosines are
there already.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.kernels.linear import Cosines, dot, lengths, own_images, widened

_FEWEST, _MOST = 4, 64
"""Rows of cosines made at a time. One would be a matrix-vector product, which rounds equal tokens differently."""
_WHOLE = 1 << 26
"""Multiplications that all cosines of an image may cost to be made at once."""


@dataclass
class _Rule(abc.ABC):
    """What is chosen next, and what a pick changes.

    Attributes
    ----------
    taken : Tensor
        ``(N,)`` bool: chosen already.
    """

    taken: Tensor

    @abc.abstractmethod
    def score(self) -> Tensor:
        """Return ``(N,)``: the larger, the sooner chosen."""

    def reduced(self, picks: Tensor, cosine: Tensor, at: Tensor | slice) -> Tensor:
        """Turn cosines ``(M, n)`` of some tokens with those ``at`` into what :meth:`add` takes, row by row."""
        return cosine

    def add(self, pick: int, row: Tensor) -> None:
        """Take note of a pick."""
        self.taken[pick] = True

    def narrow(self, at: Tensor) -> _Rule:
        """Return the same of the tokens ``at`` alone, to play with."""
        return dataclasses.replace(self, **{f.name: getattr(self, f.name)[at] for f in dataclasses.fields(self)})

    def best(self) -> int:
        """Return the token to choose next, the lowest among equals."""
        return int(self.score().masked_fill(self.taken, -torch.inf).argmax())


def _run(rule: _Rule, cosines: Cosines, k: int, first: int | None = None) -> list[int]:
    """Return ``k`` picks, in order."""
    n, picks, place, served, ahead = len(cosines), [], {}, 0, _FEWEST
    if cosines.cost <= _WHOLE:  # cheaper than guessing
        of = torch.arange(n, device=rule.taken.device)
        rows, place = rule.reduced(of, cosines.rows(of), slice(None)), {i: i for i in range(n)}
    for step in range(k):
        pick = first if step == 0 and first is not None else rule.best()
        if pick not in place:
            if step == 0:
                guess = [pick, *(i for i in range(0, n, -(-n // _FEWEST)) if i != pick)][:_FEWEST]
            else:
                ahead = min(max(_FEWEST, 2 * served), _MOST, max(_FEWEST, k - step))
                guess = _ahead(rule, cosines, pick, ahead)
            of = torch.tensor(guess, device=rule.taken.device)
            rows = rule.reduced(of, cosines.rows(of), slice(None))
            place, served = {token: i for i, token in enumerate(guess)}, 0
        rule.add(pick, rows[place[pick]])
        picks.append(pick)
        served += 1
    return picks


def _ahead(rule: _Rule, cosines: Cosines, pick: int, count: int) -> list[int]:
    """Return ``pick`` and the ``count - 1`` tokens that would follow if there were only those with the best scores."""
    score = rule.score().masked_fill(rule.taken, -torch.inf)
    pool = score.topk(min(4 * count, len(score))).indices
    pool = torch.cat([pool.new_tensor([pick]), pool[pool != pick]])
    small, cosine = rule.narrow(pool), cosines.among(pool)
    rows = rule.reduced(pool, cosine, pool)
    chosen = [0]
    for _ in range(min(count, len(pool)) - 1):
        small.add(chosen[-1], rows[chosen[-1]])
        chosen.append(small.best())
    return pool[chosen + list(range(_FEWEST - len(chosen)))].tolist()


@dataclass
class _Farthest(_Rule):
    """Weight times distance to the nearest chosen token."""

    near: Tensor
    weight: Tensor

    def score(self) -> Tensor:
        return self.weight * self.near

    def reduced(self, picks: Tensor, cosine: Tensor, at: Tensor | slice) -> Tensor:
        return 1 - cosine

    def add(self, pick: int, row: Tensor) -> None:
        super().add(pick, row)
        torch.minimum(self.near, row, out=self.near)


@dataclass
class _LeastSum(_Rule):
    """Smallest sum of cosines with the chosen tokens."""

    total: Tensor

    def score(self) -> Tensor:
        return -self.total

    def add(self, pick: int, row: Tensor) -> None:
        super().add(pick, row)
        self.total += row


class _Determinant(_Rule):
    """What a token adds to the determinant of the kernel ``w_i cos_ij w_j``; by weight once nothing adds anything.

    Rows of the Cholesky factor are appended pick by pick; ``base`` of them are in the rows that :meth:`add` gets already.
    """

    def __init__(self, weight: Tensor, whole: Tensor, k: int) -> None:
        super().__init__(torch.zeros_like(weight, dtype=torch.bool))
        self.weight, self.gain = weight, whole.clone()
        self.least = 8 * torch.finfo(whole.dtype).eps * whole  # rounding of a gain that is really zero
        self.factor = weight.new_empty(k, len(weight))
        self.base = self.count = 0

    def score(self) -> Tensor:
        return self.gain

    def best(self) -> int:
        pick = super().best()
        if self.gain[pick] > self.least[pick]:
            return pick
        return int(self.weight.masked_fill(self.taken, -torch.inf).argmax())

    def reduced(self, picks: Tensor, cosine: Tensor, at: Tensor | slice) -> Tensor:
        rows = cosine.mul_(self.weight[at]).mul_(self.weight[picks][:, None])
        if self.count:
            known = self.factor[: self.count]
            rows.addmm_(known[:, picks].T, known[:, at], alpha=-1)
        if isinstance(at, slice):
            self.base = self.count
        return rows

    def add(self, pick: int, row: Tensor) -> None:
        super().add(pick, row)
        if self.gain[pick] > self.least[pick]:
            since = self.factor[self.base : self.count]
            new = self.factor[self.count]
            torch.sub(row, since[:, pick] @ since, out=new)
            new /= self.gain[pick].sqrt()
            self.gain -= new.square()
            self.count += 1

    def narrow(self, at: Tensor) -> _Determinant:
        small = _Determinant(self.weight[at], self.gain[at], min(len(at), _MOST))
        small.taken, small.least = self.taken[at], self.least[at]
        return small


def farthest_point(features: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy max-min diversification (k-center) under cosine distance, O(N D) memory.

    Starts with ``first``; every step adds the token whose smallest distance ``1 - cos`` to the chosen ones is largest. Chosen
    tokens are never picked again.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    k : int
        Tokens to choose, ``1 <= k <= N``.
    first : Tensor
        ``(B,)`` int64, the seed of each image.

    Returns
    -------
    Tensor
        ``(B, k)`` int64 in pick order.
    """
    out = []
    for x, start in zip(own_images(widened(features)), first.tolist(), strict=True):
        one = x.new_ones(len(x))
        rule = _Farthest(torch.zeros_like(one, dtype=torch.bool), one * torch.inf, one)
        out.append(_run(rule, Cosines(x), k, start))
    return torch.tensor(out, device=features.device)


def farthest_point_weighted(features: Tensor, weight: Tensor, k: int) -> Tensor:
    """Greedy choice by weight times cosine distance to the nearest chosen token, O(N D) memory.

    The first token is the heaviest; every further one has the largest ``w_i min_c (1 - cos(i, c))`` of those not chosen yet.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    weight : Tensor
        ``(B, N)``, not negative.
    k : int
        Tokens to choose, ``1 <= k <= N``.

    Returns
    -------
    Tensor
        ``(B, k)`` int64 in pick order.
    """
    out = []
    for x, w in zip(own_images(widened(features)), widened(weight), strict=True):
        far = torch.full_like(w, torch.inf)
        rule = _Farthest(torch.zeros_like(w, dtype=torch.bool), far, w)
        out.append(_run(rule, Cosines(x), k, int(w.argmax())))
    return torch.tensor(out, device=features.device)


def max_sum(features: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy max-sum diversification: every step adds the token with the smallest *sum* of cosines to the chosen ones.

    Arguments and result as in :func:`farthest_point`.
    """
    out = []
    for x, start in zip(own_images(widened(features)), first.tolist(), strict=True):
        zero = x.new_zeros(len(x))
        out.append(_run(_LeastSum(torch.zeros_like(zero, dtype=torch.bool), zero), Cosines(x), k, start))
    return torch.tensor(out, device=features.device)


def greedy_dpp(features: Tensor, relevance: Tensor, k: int, *, guard: bool = True) -> Tensor:
    """Greedy MAP of a determinantal point process with the kernel ``r_i cos_ij r_j``, O(N D + N k) memory.

    Every step adds the token that raises the determinant of the chosen ones' kernel most, by an incremental Cholesky factor.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    relevance : Tensor
        ``(B, N)`` weight ``r`` of every token.
    k : int
        Tokens to choose, ``1 <= k <= N``.
    guard : bool, default True
        Once no token adds anything (the kernel's numerical rank is used up) choose by relevance, and never choose a token twice.
        ``False``: the bare recurrence on rows that are taken as normalised, whose result may hold repetitions from there on.

    Returns
    -------
    Tensor
        ``(B, k)`` int64 in pick order.
    """
    pairs = zip(own_images(widened(features)), own_images(widened(relevance).to(widened(features).dtype)), strict=True)
    if not guard:
        return torch.stack([_bare_dpp(x, w, k) for x, w in pairs])
    out = []
    for x, w in pairs:
        cosines = Cosines(x)
        whole = w.square() * (x.square().sum(1) * cosines.scale.square())
        out.append(_run(_Determinant(w, whole, k), cosines, k))
    return torch.tensor(out, device=features.device)


def _bare_dpp(unit: Tensor, weight: Tensor, k: int) -> Tensor:
    """Picks ``(k,)`` of the unguarded recurrence, step by step: past the kernel's rank its rounding decides."""
    gain, factor, picks = weight * unit.square().sum(1) * weight, unit.new_zeros(k, len(unit)), []
    for t in range(k):
        pick = gain.argmax()
        at = pick[None]
        row = weight * weight.index_select(0, at) * (unit @ unit.index_select(0, at)[0])
        row = row - factor[:t].T @ factor[:t].index_select(1, at)[:, 0]
        factor[t] = row / gain.index_select(0, at).sqrt()
        gain = (gain - factor[t].square()).index_fill(0, at, -torch.inf)
        picks.append(pick)
    return torch.stack(picks)


def most_isolated(features: Tensor, *, block: int = 64) -> Tensor:
    """Return ``(B,)``: the token whose nearest other token (``1 - cos``) is farthest, the lowest among equals.

    Every row of cosines bounds all other tokens' nearest distance from above, and tokens that cannot win any more are never
    compared with all others. At worst somewhat more than half of the cosines are computed.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    block : int
        Tokens compared with the others at a time.
    """
    return torch.tensor([_most_isolated(x, block) for x in own_images(widened(features))], device=features.device)


def _most_isolated(x: Tensor, block: int) -> int:
    scale = 1 / lengths(x)
    token = torch.arange(len(x), device=x.device)  # whose rows x has: those not compared with all others yet, and some that are
    done = torch.zeros_like(token, dtype=torch.bool)
    near = x.new_full((len(x),), -torch.inf)  # largest cosine found so far
    farthest, winner = -torch.inf, len(x)
    some = token[:: -(-len(x) // block)]
    while len(some):
        cosine = dot(x, x[some]).mul_(scale[some]).mul_(scale[:, None])
        cosine[some, torch.arange(len(some), device=x.device)] = -torch.inf
        cosine[done] = -torch.inf  # counted when these were compared
        distance = 1 - torch.maximum(near[some], cosine.amax(0))
        best = float(distance.max())
        which = int(token[some[distance == best]].min())
        if best > farthest or (best == farthest and which < winner):
            farthest, winner = best, which
        torch.maximum(near, cosine.amax(1), out=near)
        done[some] = True
        if int(done.sum()) * 3 > len(done):  # their columns are no longer needed
            left = ~done
            x, scale, token, near, done = x[left], scale[left], token[left], near[left], done[left]
        open_ = (~done & (1 - near >= farthest)).nonzero()[:, 0]
        some = open_[near[open_].topk(min(block, len(open_)), largest=False).indices]
    return winner
