"""Greedy subsets: one token after the other, each the best given those before.

A pick needs its cosines with all tokens. Taken one at a time they cost a pass over all features, so they are made for several
tokens in one product: the picks that are likely to come next. What is likely is found out by playing the next steps on the few
tokens with the best scores. Every pick is the exact best of all tokens; the guess decides no more than whether its cosines are
there already.

Products are made where the features are, decisions on the host: a step takes a few operations on short vectors, which NumPy does
in a fraction of the time that torch takes to start them, and a device is asked once per guess instead of once per step.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtc.kernels.ref.linear import Cosines, own_images, unit_rows, widened

_FEWEST, _MOST = 4, 64
"""Rows of cosines made at a time. One would be a matrix-vector product, which rounds equal tokens differently."""
_WHOLE = 1 << 26
"""Multiplications that all cosines of an image may cost to be made at once."""


@dataclass
class _Rule(abc.ABC):
    """What is chosen next, and what a pick changes.

    Attributes
    ----------
    closed : array
        ``(N,)`` added to the scores: minus infinity for tokens chosen already, 0 for the others.
    """

    closed: np.ndarray

    @abc.abstractmethod
    def score(self) -> np.ndarray:
        """Return ``(N,)``: the larger, the sooner chosen."""

    def reduced(self, picks: np.ndarray, cosine: np.ndarray, at: np.ndarray | slice) -> np.ndarray:
        """Turn cosines ``(M, n)`` of some tokens with those ``at`` into what :meth:`add` takes, row by row."""
        return cosine

    def add(self, pick: int, row: np.ndarray) -> None:
        """Take note of a pick."""
        self.closed[pick] = -np.inf

    def narrow(self, at: np.ndarray) -> _Rule:
        """Return the same of the tokens ``at`` alone, to play with."""
        return dataclasses.replace(self, **{f.name: getattr(self, f.name)[at] for f in dataclasses.fields(self)})

    def best(self) -> int:
        """Return the token to choose next, the lowest among equals."""
        return int((self.score() + self.closed).argmax())


def _run(rule: _Rule, cosines: Cosines, k: int, first: int | None = None) -> Tensor:
    """Return ``(k,)`` picks, in order."""
    n, picks, place, served, ahead, device = len(cosines), [], {}, 0, _FEWEST, cosines.tokens.device
    if cosines.cost <= _WHOLE:  # cheaper than guessing
        of = np.arange(n)
        rows, place = rule.reduced(of, _on_host(cosines.among, of, device), slice(None)), {i: i for i in range(n)}
    for step in range(k):
        pick = first if step == 0 and first is not None else rule.best()
        if pick not in place:
            if step == 0:
                guess = [pick, *(i for i in range(0, n, -(-n // _FEWEST)) if i != pick)][:_FEWEST]
            else:
                ahead = min(max(_FEWEST, 2 * served), _MOST, max(_FEWEST, k - step))
                guess = _ahead(rule, cosines, pick, ahead)
            of = np.array(guess)
            rows = rule.reduced(of, _on_host(cosines.rows, of, device), slice(None))
            place, served = {token: i for i, token in enumerate(guess)}, 0
        rule.add(pick, rows[place[pick]])
        picks.append(pick)
        served += 1
    return torch.tensor(picks, device=device)


def _on_host(made: Callable[[Tensor], Tensor], of: np.ndarray, device: torch.device) -> np.ndarray:
    """Return what is ``made`` of some tokens on the device."""
    return made(torch.from_numpy(of).to(device, non_blocking=True)).cpu().numpy()


def _ahead(rule: _Rule, cosines: Cosines, pick: int, count: int) -> list[int]:
    """Return ``pick`` and the ``count - 1`` tokens that would follow if there were only those with the best scores."""
    score = rule.score() + rule.closed
    many = min(3 * count, len(score))
    pool = np.sort(np.argpartition(score, -many)[-many:])
    pool = np.concatenate([[pick], pool[pool != pick]])
    small = rule.narrow(pool)
    rows = rule.reduced(pool, _on_host(cosines.among, pool, cosines.tokens.device), pool)
    chosen = [0]
    for _ in range(min(count, len(pool)) - 1):
        small.add(chosen[-1], rows[chosen[-1]])
        chosen.append(small.best())
    return pool[chosen + list(range(_FEWEST - len(chosen)))].tolist()


@dataclass
class _Farthest(_Rule):
    """Weight times distance to the nearest chosen token."""

    near: np.ndarray
    weight: np.ndarray

    def score(self) -> np.ndarray:
        return self.weight * self.near

    def reduced(self, picks: np.ndarray, cosine: np.ndarray, at: np.ndarray | slice) -> np.ndarray:
        return np.subtract(1, cosine, out=cosine)

    def add(self, pick: int, row: np.ndarray) -> None:
        super().add(pick, row)
        np.minimum(self.near, row, out=self.near)


@dataclass
class _LeastSum(_Rule):
    """Smallest sum of cosines with the chosen tokens."""

    total: np.ndarray

    def score(self) -> np.ndarray:
        return -self.total

    def add(self, pick: int, row: np.ndarray) -> None:
        super().add(pick, row)
        self.total += row


class _Determinant(_Rule):
    """What a token adds to the determinant of the kernel ``w_i cos_ij w_j``; by weight once nothing adds anything.

    Rows of the Cholesky factor are appended pick by pick; ``base`` of them are in the rows that :meth:`add` gets already.
    """

    def __init__(self, weight: np.ndarray, whole: np.ndarray, k: int) -> None:
        super().__init__(np.zeros_like(weight))
        self.weight, self.gain = weight, whole.copy()
        self.least = 8 * np.finfo(whole.dtype).eps * whole  # rounding of a gain that is really zero
        self.factor = np.empty((k, len(weight)), weight.dtype)
        self.base = self.count = 0

    def score(self) -> np.ndarray:
        return self.gain

    def best(self) -> int:
        pick = super().best()
        if self.gain[pick] > self.least[pick]:
            return pick
        return int((self.weight + self.closed).argmax())

    def reduced(self, picks: np.ndarray, cosine: np.ndarray, at: np.ndarray | slice) -> np.ndarray:
        cosine *= self.weight[at]
        cosine *= self.weight[picks][:, None]
        if self.count:
            known = self.factor[: self.count]
            torch.from_numpy(cosine).addmm_(torch.from_numpy(known[:, picks]).T, torch.from_numpy(known[:, at]), alpha=-1)
        if isinstance(at, slice):
            self.base = self.count
        return cosine

    def add(self, pick: int, row: np.ndarray) -> None:
        super().add(pick, row)
        if self.gain[pick] > self.least[pick]:
            new = self.factor[self.count]
            new[:] = row
            if self.base < self.count:
                since = torch.from_numpy(self.factor[self.base : self.count])
                new -= (since[:, pick] @ since).numpy()
            new /= np.sqrt(self.gain[pick])
            self.gain -= new * new
            self.count += 1

    def narrow(self, at: np.ndarray) -> _Determinant:
        small = _Determinant(self.weight[at], self.gain[at], min(len(at), _MOST))
        small.closed, small.least = self.closed[at], self.least[at]
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
    for x, start in zip(own_images(widened(features.detach())), first.tolist(), strict=True):
        one = np.ones(len(x), np.float64 if x.dtype == torch.float64 else np.float32)
        out.append(_run(_Farthest(0 * one, np.inf * one, one), Cosines(x), k, start))
    return torch.stack(out)


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
    for x, w in zip(own_images(widened(features.detach())), widened(weight.detach()), strict=True):
        heavy = w.cpu().numpy()
        rule = _Farthest(np.zeros_like(heavy), np.full_like(heavy, np.inf), heavy)
        out.append(_run(rule, Cosines(x), k, int(heavy.argmax())))
    return torch.stack(out)


def max_sum(features: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy max-sum diversification: every step adds the token with the smallest *sum* of cosines to the chosen ones.

    Arguments and result as in :func:`farthest_point`.
    """
    out = []
    for x, start in zip(own_images(widened(features.detach())), first.tolist(), strict=True):
        zero = np.zeros(len(x), np.float64 if x.dtype == torch.float64 else np.float32)
        out.append(_run(_LeastSum(zero, zero.copy()), Cosines(x), k, start))
    return torch.stack(out)


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
    wide = widened(features.detach())
    pairs = zip(own_images(wide), own_images(widened(relevance.detach()).to(wide.dtype)), strict=True)
    if not guard:
        return torch.stack([_bare_dpp(x, w, k) for x, w in pairs])
    out = []
    for x, w in pairs:
        cosines = Cosines(x)
        whole = w.square() * (x.square().sum(1) * cosines.scale.square())
        out.append(_run(_Determinant(w.cpu().numpy(), whole.cpu().numpy(), k), cosines, k))
    return torch.stack(out)


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


def shrinking_picks(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Greedy choice by a gain that every pick shrinks by the squared kernel entry over its own gain, O(N D) memory.

    The kernel is ``r_i cos_ij r_j``, and gains start as its diagonal. Unlike in :func:`greedy_dpp` a pick is not made orthogonal
    to earlier ones. A pick whose gain is not positive shrinks nothing.

    Parameters
    ----------
    features, relevance, k
        As in :func:`greedy_dpp`.

    Returns
    -------
    Tensor
        ``(B, k)`` int64 in pick order, no token twice.
    """
    out = []
    unit = unit_rows(features)
    for u, w in zip(own_images(unit), own_images(widened(relevance).to(unit.dtype)), strict=True):
        gain, picks = w * u.square().sum(1) * w, []
        taken = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        for _ in range(k):
            pick = gain.masked_fill(taken, -torch.inf).argmax()[None]
            own = gain.index_select(0, pick)
            row = w * w.index_select(0, pick) * (u @ u.index_select(0, pick)[0])
            loss = (row / (own.clamp(min=0).sqrt() + 1e-6)).square()
            gain = gain - torch.where(own > 0, loss, torch.zeros_like(loss))
            taken = taken.index_fill(0, pick, True)
            picks.append(pick)
        out.append(torch.cat(picks))
    return torch.stack(out)
