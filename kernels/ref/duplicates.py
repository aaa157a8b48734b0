"""Near duplicates of a list, removed round by round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtc.kernels.ref.linear import dot, gram, own_images, unit_rows


def drop_duplicates(features: Tensor, order: Tensor, keep: int, *, step: int = 8, near: int = 32) -> Tensor:
    """Thin a list of tokens by repeatedly removing near duplicates, O(N ``near``) memory.

    A round compares the tokens at even places of the list with those at odd places, removes the up to ``step`` even ones with the
    highest cosine to an odd one, and continues with the remaining even ones by descending cosine, followed by the odd ones.

    Each token's ``near`` nearest neighbours are listed; a token none of whose listed ones stands at an odd place is compared with
    all afresh, so the result is that of comparing all pairs in every round.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    order : Tensor
        ``(B, R)`` int64 distinct tokens in the order of the first round.
    keep : int
        Tokens to leave, ``0 <= keep <= R``.
    step : int
        Most tokens removed per round.
    near : int
        Length of the neighbour lists; no influence on the result.

    Returns
    -------
    Tensor
        ``(B, keep)`` int64 in the order of the last round.
    """
    if keep == 0:
        return order[:, :0]
    rows = order[..., None].expand(-1, -1, features.shape[2])
    return torch.stack(
        [o[_thinned(u, keep, step, near)] for o, u in zip(order, own_images(unit_rows(features.gather(1, rows))), strict=True)]
    )


def _thinned(unit: Tensor, keep: int, step: int, near: int, few: int = 4) -> Tensor:
    """Places ``(keep,)`` that :func:`drop_duplicates` leaves of unit rows ``(R, D)``."""
    name, device = np.arange(len(unit)), unit.device  # the place of every row there is still
    alive = np.arange(len(unit))
    lists = _NeighbourLists(unit, near)
    while len(alive) > keep:
        if 2 * len(alive) <= len(name):
            name = name[alive]
            lists.keep(alive)
            alive = np.arange(len(alive))
        even, odd = alive[0::2], alive[1::2]
        if not len(odd):  # one token left and none wanted of it
            break
        opposite = np.zeros(len(name) + 1, dtype=bool)
        opposite[odd] = True
        best = np.empty(len(even), dtype=lists.values.dtype)
        left = np.arange(len(even))
        for width in (few, near):  # lists are descending: most tokens find an odd one among the first
            token = even[left]
            hit = opposite[lists.places[token, :width]]
            first = hit.argmax(1)
            found = hit[np.arange(len(left)), first]
            best[left] = lists.values[token, first]
            left = left[~found]
            if not len(left):
                break
        if len(left):
            lists.renew(alive)
            best[left] = lists.largest(even[left], opposite[:-1])
        alive = np.concatenate([even[_falling(best)[min(step, len(alive) - keep) :]], odd])
    return torch.from_numpy(name[alive[:keep]]).to(device, non_blocking=True)


class _NeighbourLists:
    """The nearest others of every unit row, nearest first.

    Parameters
    ----------
    unit : Tensor
        ``(R, D)``.
    width : int
        Length of the lists, less where there are fewer rows.
    whole : int
        Rows up to which all cosines are kept.

    Attributes
    ----------
    values, places : array
        ``(R, width)`` cosines and places; the place ``R`` is that of rows that are gone.
    """

    def __init__(self, unit: Tensor, width: int, *, whole: int = 8192, block: int = 512) -> None:
        self.unit, self.width, self.whole = unit, max(1, min(width, len(unit) - 1)), whole
        self.matrix = gram(unit).fill_diagonal_(-torch.inf) if len(unit) <= whole else None
        parts = [self.nearest(self.cosines(at)) for at in torch.arange(len(unit), device=unit.device).split(block)]
        self.values = np.concatenate([v for v, _ in parts])
        self.places = np.concatenate([p for _, p in parts])

    def keep(self, alive: np.ndarray) -> None:
        """Go on with the rows ``alive`` alone."""
        at = torch.from_numpy(alive).to(self.unit.device, non_blocking=True)
        place = np.full(len(self.unit) + 1, len(alive))
        place[alive] = np.arange(len(alive))
        self.unit, self.width = self.unit[at], max(1, min(self.width, len(alive) - 1))
        self.values, self.places = self.values[alive, : self.width], place[self.places[alive, : self.width]]
        if self.matrix is not None:
            self.matrix = self.matrix[at][:, at]
        elif len(alive) <= self.whole:
            self.matrix = gram(self.unit).fill_diagonal_(-torch.inf)

    def cosines(self, of: Tensor) -> Tensor:
        """Return ``(M, R)`` cosines of the rows ``of (M,)`` with all others."""
        if self.matrix is not None:
            return self.matrix[of]
        cosine = dot(self.unit[of], self.unit)
        cosine[torch.arange(len(of), device=of.device), of] = -torch.inf
        return cosine

    def nearest(self, cosine: Tensor, chunk: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest ``(M, R)`` cosines of every row and their places."""
        at, count = None, self.width
        if cosine.shape[1] > 4 * chunk * count:  # the largest lie in the chunks with the largest maxima
            cosine = torch.nn.functional.pad(cosine, (0, -cosine.shape[1] % chunk), value=-torch.inf).unflatten(1, (-1, chunk))
            chunks = cosine.amax(2).topk(count, dim=1).indices
            cosine = cosine.gather(1, chunks[..., None].expand(-1, -1, chunk)).flatten(1)
            at = (chunks[..., None] * chunk + torch.arange(chunk, device=cosine.device)).flatten(1)
        best = cosine.topk(count, dim=1)
        places = best.indices if at is None else at.gather(1, best.indices)
        return best.values.cpu().numpy(), places.cpu().numpy()

    def renew(self, alive: np.ndarray, block: int = 512) -> None:
        """Make those lists anew, of rows that are ``alive``, in which few are left."""
        there = np.zeros(len(self.unit) + 1, dtype=bool)
        there[alive] = True
        short = alive[there[self.places[alive]].sum(1) < self.width // 3]
        gone = torch.from_numpy(~there[:-1]).to(self.unit.device, non_blocking=True)
        for lo in range(0, len(short), block):
            at = short[lo : lo + block]
            cosine = self.cosines(torch.from_numpy(at).to(gone.device, non_blocking=True)).masked_fill(gone, -torch.inf)
            self.values[at], self.places[at] = self.nearest(cosine)

    def largest(self, of: np.ndarray, among: np.ndarray, block: int = 512) -> np.ndarray:
        """Return the largest cosine of every row ``of`` with the rows marked in ``among``."""
        mask = torch.from_numpy(~among).to(self.unit.device, non_blocking=True)
        parts = [
            self.cosines(torch.from_numpy(of[lo : lo + block]).to(mask.device, non_blocking=True))
            for lo in range(0, len(of), block)
        ]
        return np.concatenate([c.masked_fill(mask, -torch.inf).amax(1).cpu().numpy() for c in parts])


def _falling(values: np.ndarray) -> np.ndarray:
    """Order ``(n,)`` of descending values, the lowest index first among equals."""
    if values.dtype != np.float32:
        return np.argsort(-values, kind="stable")
    # one whole number for value and index, whose order is that of float32 bits; these sort several times as fast
    bits = (values + np.float32(0)).view(np.int32)  # no negative zeros
    key = (-(bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32) + np.arange(len(values))
    return np.sort(key) & 0xFFFFFFFF
