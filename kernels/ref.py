"""Torch implementations of every op: the specification the accelerated versions are tested against.

All arithmetic is float32 (float64 stays float64) whatever the input's dtype; ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from vtc.kernels.linear import Cosines, dot, lengths, own_images, unit_rows, widened


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest entries of each row, ascending by index; among equal scores the lowest index wins.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)``.
    k : int
        ``0 <= k <= N``.

    Returns
    -------
    Tensor
        ``(B, k)`` int64.
    """
    full, n = widened(scores), scores.shape[-1]
    best = torch.topk(full, min(k + 1, n), dim=-1)
    index = best.indices[..., :k].sort(-1).values
    edge = [] if k in (0, n) else best.values[..., k - 1 : k + 1].flatten().tolist()
    if all(last > first for last, first in zip(edge[::2], edge[1::2], strict=True)):
        return index
    least = best.values[..., k - 1 : k]  # more tokens have it than there are places: the lowest ones of these
    above, equal = full > least, full == least
    above |= equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True))
    return above.nonzero()[:, -1].view(index.shape)


def smallest(values: Tensor, k: int) -> Tensor:
    """The ``k`` smallest entries of every row, ascending.

    Parameters
    ----------
    values : Tensor
        ``(M, N)``.
    k : int
        ``1 <= k <= N``.

    Returns
    -------
    Tensor
        ``(M, k)``.
    """
    if values.device.type != "cpu":
        return values.topk(k, largest=False).values
    return torch.from_numpy(np.sort(np.partition(values.numpy(), k - 1, axis=1)[:, :k], axis=1))  # several times as fast


def topk_per_group(scores: Tensor, group: Tensor, quota: Tensor) -> Tensor:
    """Mark the ``quota`` highest scores of every group; among equal scores the lowest index wins.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)``.
    group : Tensor
        ``(B, N)`` int64 in ``0..G-1``.
    quota : Tensor
        ``(B, G)`` int64; a group smaller than its quota is marked whole.

    Returns
    -------
    Tensor
        ``(B, N)`` bool.
    """
    order = torch.sort(widened(scores), dim=-1, descending=True, stable=True).indices
    by_group = torch.sort(group.gather(1, order), dim=-1, stable=True)
    order = order.gather(1, by_group.indices)
    size = torch.zeros_like(quota).scatter_add(1, group, torch.ones_like(group))
    start = size.cumsum(1) - size
    rank = torch.arange(group.shape[1], device=group.device) - start.gather(1, by_group.values)
    chosen = rank < quota.gather(1, by_group.values)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "mean",
    lse: Tensor | None = None,
) -> Tensor:
    """Softmax rows of ``Q K^T`` for a few query rows, without the ``N x N`` matrix.

    Parameters
    ----------
    query : Tensor
        ``(B, H, R, d)``: only the rows wanted.
    key : Tensor
        ``(B, Hkv, N, d)``; ``H`` is a multiple of ``Hkv`` (grouped-query attention; keys are not repeated in memory).
    scaling : float or None
        Factor on the logits; default ``d ** -0.5``.
    mask : Tensor or None
        Boolean (True = may attend) or additive, broadcastable to ``(B, H, R, N)``.
    reduce : {"mean", "none", "logits"}
        ``"mean"``: average over heads, ``(B, R, N)``; ``"none"``: ``(B, H, R, N)``; ``"logits"``: scaled logits before mask and
        softmax, ``(B, H, R, N)``.
    lse : Tensor or None
        ``(B, H, R)`` logarithm of every row's softmax denominator, where the caller has it (FlashAttention returns it).
    """
    q, k = widened(query), widened(key)
    b, h, r, d = q.shape
    kv = k.shape[1]
    logits = torch.einsum("bgrd,bgnd->bgrn", q.reshape(b, kv, (h // kv) * r, d), k).reshape(b, h, r, -1)
    logits = logits * (d**-0.5 if scaling is None else scaling)
    if reduce == "logits":
        return logits
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    probs = torch.softmax(logits, dim=-1) if lse is None else torch.exp(logits - lse[..., None])
    return probs if reduce == "none" else probs.mean(1)


def attention_colsum(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    block: int = 256,
) -> Tensor:
    """Head-averaged column sums of ``softmax(Q K^T)`` over (weighted) query rows, in row blocks: O(N) memory per block row.

    Parameters
    ----------
    query, key : Tensor
        ``(B, H, R, d)`` and ``(B, Hkv, N, d)``.
    mask : Tensor or None
        As in :func:`attention_rows`.
    weight : Tensor or None
        ``(B, R)`` weight of every query row (0 leaves a row out); default all ones.
    block : int
        Query rows per block.

    Returns
    -------
    Tensor
        ``(B, N)``.
    """
    b, _, r, _ = query.shape
    total = torch.zeros(b, key.shape[2], dtype=widened(key).dtype, device=key.device)
    for lo in range(0, r, block):
        hi = min(lo + block, r)
        part = mask
        if mask is not None and mask.shape[-2] != 1:
            part = mask[..., lo:hi, :]
        rows = attention_rows(query[:, :, lo:hi], key, scaling=scaling, mask=part)
        if weight is not None:
            # rows that see nothing (padding) are NaN after softmax; their weight is 0
            rows = torch.where((weight[:, lo:hi] > 0)[..., None], rows, 0.0) * weight[:, lo:hi, None]
        total += rows.sum(1)
    return total


def attention_walk(
    query: Tensor,
    key: Tensor,
    start: Tensor,
    *,
    steps: int,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int | None = None,
) -> Tensor:
    """Send mass along ``softmax(Q K^T)`` for some steps, each head on its own: ``p <- p M``, in row blocks.

    Rows that may attend to nothing pass nothing on. With more keys than queries (a KV cache) the last keys are the queries' own,
    and mass that reaches the others stays out of the following steps.

    Parameters
    ----------
    query, key : Tensor
        ``(B, H, R, d)`` and ``(B, Hkv, N, d)``.
    start : Tensor
        ``(B, R)`` mass of every row before the first step.
    steps : int
        Steps, at least 1.
    scaling, mask : float, Tensor
        As in :func:`attention_rows`.
    causal : bool
        Without a mask: a row sees no key behind its own.
    block : int or None
        Query rows per block; ``None``: as many as keep a block below 128 MiB.

    Returns
    -------
    Tensor
        ``(B, H, N)`` mass of every key after the last step.
    """
    b, h, r, _ = query.shape
    n = key.shape[2]
    block = max(1, min(256, 2**25 // (b * h * n))) if block is None else block
    at = torch.arange(n, device=key.device)
    mass = start.to(widened(key).dtype)[:, None].expand(b, h, r)
    for _ in range(steps):
        total = torch.zeros(b, h, n, dtype=widened(key).dtype, device=key.device)
        for lo in range(0, r, block):
            hi = min(lo + block, r)
            part = mask[..., lo:hi, :] if mask is not None and mask.shape[-2] != 1 else mask
            if mask is None and causal:
                part = (at <= at[n - r + lo : n - r + hi, None])[None, None]
            rows = attention_rows(query[:, :, lo:hi], key, scaling=scaling, mask=part, reduce="none")
            total += torch.einsum("bhr,bhrn->bhn", mass[:, :, lo:hi], torch.nan_to_num(rows, nan=0.0))
        mass = total[..., n - r :]
    return total


def cosine_distance(features: Tensor, row: Tensor) -> Tensor:
    """Distance ``1 - cos`` of every token to one token of its image.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    row : Tensor
        ``(B,)`` int64, the token measured from.

    Returns
    -------
    Tensor
        ``(B, N)``.
    """
    return torch.cat([1 - Cosines(x).rows(at) for x, at in zip(own_images(widened(features)), row.split(1), strict=True)])


def pairwise_top1(source: Tensor, target: Tensor, *, block: int = 512) -> tuple[Tensor, Tensor]:
    """Nearest neighbour by cosine of every ``source`` row among the ``target`` rows, in blocks (no full matrix).

    Parameters
    ----------
    source, target : Tensor
        ``(B, M, D)`` and ``(B, T, D)``.

    Returns
    -------
    value, index : Tensor
        ``(B, M)``; among equal cosines the lowest index.
    """
    values, indices = [], []
    for a, b in zip(own_images(widened(source)), own_images(unit_rows(target)), strict=True):
        found = [dot(rows, b).max(1) for rows in a.split(block)] if len(a) else []
        values.append(torch.cat([v for v, _ in found]) / lengths(a) if found else a.new_zeros(0))
        indices.append(torch.cat([i for _, i in found]) if found else torch.zeros(0, dtype=torch.long, device=a.device))
    return torch.stack(values), torch.stack(indices)


def merge_scatter(features: Tensor, owner: Tensor, groups: int, *, weight: Tensor | None = None, mean: bool = True) -> Tensor:
    """Weighted mean (or sum) of the tokens of each group; deterministic, differentiable in ``features``.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    owner : Tensor
        ``(B, N)`` int64: group of every token, -1 leaves it out.
    groups : int
        Number of groups ``K``.
    weight : Tensor or None
        ``(B, N)`` token weights, default 1.
    mean : bool
        Divide by the group's weight (empty groups give zeros), or return the sum.

    Returns
    -------
    Tensor
        ``(B, K, D)`` in the dtype of ``features``.
    """
    wide = widened(features)
    batch, width = wide.shape[0], wide.shape[2]
    slot = (owner + groups * torch.arange(batch, device=owner.device)[:, None]).flatten()
    rows, w = wide.reshape(-1, width), None if weight is None else widened(weight).to(wide.dtype).flatten()
    slot = torch.where(
        owner.flatten() >= 0, slot, batch * groups
    )  # what is left out goes to one more group: no copy of the rest
    total = wide.new_zeros(batch * groups + 1, width).index_add_(0, slot, rows if w is None else rows * w[:, None])[:-1]
    if mean:
        size = wide.new_zeros(batch * groups + 1).index_add_(0, slot, wide.new_ones(len(slot)) if w is None else w)[:-1]
        total = total / size.clamp(min=torch.finfo(wide.dtype).tiny)[:, None]
    return total.view(batch, groups, width).to(features.dtype)


def apportion(total: int, weight: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Share a whole number of tokens out in proportion to ``weight`` by the largest remainder, no group above its capacity.

    What a full group cannot take goes to the others, again in proportion; groups of weight 0 get tokens only when all others are
    full. Equal remainders: the lowest index first. Exact arithmetic.

    Parameters
    ----------
    total : int
        Tokens to share out.
    weight : sequence of float
        Non-negative weight of each group.
    capacity : sequence of int
        Most each group can take.

    Returns
    -------
    list of int
        Sums to ``min(total, sum(capacity))``.
    """
    given = [0] * len(capacity)
    left = min(total, sum(capacity))
    while left > 0:
        room = [g for g, most in enumerate(capacity) if given[g] < most]
        if any(weight[g] > 0 for g in room):
            room = [g for g in room if weight[g] > 0]
            shares = {g: Fraction(weight[g]) for g in room}
        else:
            shares = {g: Fraction(1) for g in room}
        whole = sum(shares.values())
        ideal = {g: left * shares[g] / whole for g in room}
        full = [g for g in room if ideal[g] >= capacity[g] - given[g]]
        if full:  # fill these, then share the rest out anew
            for g in full:
                left -= capacity[g] - given[g]
                given[g] = capacity[g]
            continue
        for g in room:
            given[g] += int(ideal[g])
            left -= int(ideal[g])
        for g in sorted(room, key=lambda g: int(ideal[g]) - ideal[g])[:left]:
            given[g] += 1
        left = 0
    return given


def coarse_grid(budget: int, rows: int, cols: int) -> tuple[int, int]:
    """Return the grid of at most ``budget`` cells over a ``rows x cols`` grid whose cells are the most alike in both directions.

    The axis that is coarsened most stays as fine as possible; then as many cells as fit; then more columns than rows.

    Parameters
    ----------
    budget : int
        Most cells, at least 1.
    rows, cols : int
        The fine grid; the result never exceeds it.
    """
    best = (Fraction(0), 0, 0), (1, 1)
    for r in range(1, min(rows, budget) + 1):
        c = min(cols, budget // r)
        best = max(best, ((min(Fraction(r, rows), Fraction(c, cols)), r * c, -r), (r, c)))
    return best[1]


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
    return torch.from_numpy(name[alive[:keep]]).to(device)


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
        self.matrix = dot(unit, unit).fill_diagonal_(-torch.inf) if len(unit) <= whole else None
        parts = [self.nearest(self.cosines(at)) for at in torch.arange(len(unit), device=unit.device).split(block)]
        self.values = np.concatenate([v for v, _ in parts])
        self.places = np.concatenate([p for _, p in parts])

    def keep(self, alive: np.ndarray) -> None:
        """Go on with the rows ``alive`` alone."""
        at = torch.from_numpy(alive).to(self.unit.device)
        place = np.full(len(self.unit) + 1, len(alive))
        place[alive] = np.arange(len(alive))
        self.unit, self.width = self.unit[at], max(1, min(self.width, len(alive) - 1))
        self.values, self.places = self.values[alive, : self.width], place[self.places[alive, : self.width]]
        if self.matrix is not None:
            self.matrix = self.matrix[at][:, at]
        elif len(alive) <= self.whole:
            self.matrix = dot(self.unit, self.unit).fill_diagonal_(-torch.inf)

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
        gone = torch.from_numpy(~there[:-1]).to(self.unit.device)
        for lo in range(0, len(short), block):
            at = short[lo : lo + block]
            cosine = self.cosines(torch.from_numpy(at).to(gone.device)).masked_fill(gone, -torch.inf)
            self.values[at], self.places[at] = self.nearest(cosine)

    def largest(self, of: np.ndarray, among: np.ndarray, block: int = 512) -> np.ndarray:
        """Return the largest cosine of every row ``of`` with the rows marked in ``among``."""
        mask = torch.from_numpy(~among).to(self.unit.device)
        parts = [self.cosines(torch.from_numpy(of[lo : lo + block]).to(mask.device)) for lo in range(0, len(of), block)]
        return np.concatenate([c.masked_fill(mask, -torch.inf).amax(1).cpu().numpy() for c in parts])


def _falling(values: np.ndarray) -> np.ndarray:
    """Order ``(n,)`` of descending values, the lowest index first among equals."""
    if values.dtype != np.float32:
        return np.argsort(-values, kind="stable")
    # one whole number for value and index, whose order is that of float32 bits; these sort several times as fast
    bits = (values + np.float32(0)).view(np.int32)  # no negative zeros
    key = (-(bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32) + np.arange(len(values))
    return np.sort(key) & 0xFFFFFFFF


def absorb_neighbours(features: Tensor, keys: Tensor, weight: Tensor, rows: Tensor, count: int, *, block: int = 256) -> Tensor:
    """Add to some tokens the weighted sum of their nearest neighbours, in blocks (no full matrix).

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    keys : Tensor
        ``(B, N, d)``: nearest by their cosine; a token is no neighbour of its own, among equals the lowest index comes first.
    weight : Tensor
        ``(B, N)`` factor of every neighbour; the weights are not normalised.
    rows : Tensor
        ``(B, M)`` int64: the tokens that absorb.
    count : int
        Neighbours of each, at most N - 1.
    block : int
        Rows per block.

    Returns
    -------
    Tensor
        ``(B, M, D)``, at least float32.
    """
    wide, count, out = widened(features), min(count, features.shape[1] - 1), []
    for x, u, w, own in zip(own_images(wide), own_images(unit_rows(keys)), widened(weight).to(wide.dtype), rows, strict=True):
        parts = []
        for at in own.split(block):
            total = x[at]
            if count:
                cosine = dot(u[at], u)
                cosine[torch.arange(len(at), device=at.device), at] = -torch.inf
                near = topk_sorted(cosine, count)
                total = total + torch.nn.functional.embedding_bag(near, x, mode="sum", per_sample_weights=w[near])
            parts.append(total)
        out.append(torch.cat(parts) if parts else x[own])
    return torch.stack(out)


def nearest_centre(points: Tensor, centres: Tensor, *, block: int = 4096) -> Tensor:
    """Index of the Euclidean nearest centre of every point, in blocks; the lowest among equals.

    Parameters
    ----------
    points, centres : Tensor
        ``(B, N, D)`` and ``(B, K, D)``.

    Returns
    -------
    Tensor
        ``(B, N)`` int64.
    """
    return torch.stack(
        [_nearest(p, c, block) for p, c in zip(own_images(widened(points)), own_images(widened(centres)), strict=True)]
    )


def k_means(points: Tensor, start: Tensor, iterations: int, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from given tokens, O(N D + K D) memory; an empty cluster keeps its centre.

    Parameters
    ----------
    points : Tensor
        ``(B, N, D)``.
    start : Tensor
        ``(B, K)`` int64, tokens whose features are the first centres.
    iterations : int
        Most updates, at least 1; stops early when nothing changes.
    weight : Tensor or None
        ``(B, N)`` weights of the means, not negative; a cluster without weight takes the plain mean.

    Returns
    -------
    centres, owner : Tensor
        ``(B, K, D)``, at least float32, and ``(B, N)`` the cluster of every token that these centres are the means of.
    """
    out = []
    wide = widened(points)
    weights = torch.ones_like(wide[..., 0]) if weight is None else widened(weight).to(wide.dtype)
    for p, w, first in zip(own_images(wide), weights, start, strict=True):
        centres, owner, clusters = p[first], None, len(first)
        for _ in range(iterations):
            previous, owner = owner, _nearest(p, centres, 4096)
            if previous is not None and torch.equal(previous, owner):
                break
            mass = w.new_zeros(clusters).index_add(0, owner, w)
            used = torch.where(mass[owner] > 0, w, torch.ones_like(w))
            size = w.new_zeros(clusters).index_add(0, owner, used)
            mean = torch.zeros_like(centres).index_add(0, owner, p * used[:, None])
            centres = torch.where(size[:, None] > 0, mean / size.clamp(min=torch.finfo(w.dtype).tiny)[:, None], centres)
        out.append((centres, owner))
    return torch.stack([c for c, _ in out]), torch.stack([o for _, o in out])


def k_medoids(points: Tensor, start: Tensor, iterations: int, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Alternating weighted k-medoids under Euclidean distance, no matrix larger than a cluster's block.

    A medoid is the member of its cluster with the smallest weighted sum of distances to the members; the weights are those of the
    members served. A medoid always belongs to its own cluster, so no cluster is empty.

    Parameters
    ----------
    points, start, iterations, weight
        As in :func:`k_means`; the weights are those of the sums.

    Returns
    -------
    medoids, owner : Tensor
        ``(B, K)`` int64 in the order of ``start``, and ``(B, N)`` the cluster of every token under these medoids.
    """
    out = []
    wide = widened(points)
    weights = torch.ones_like(wide[..., 0]) if weight is None else widened(weight).to(wide.dtype)
    for p, w, first in zip(own_images(wide), weights, start, strict=True):
        medoids, places = first.clone(), torch.arange(len(first), device=p.device)
        for turn in range(iterations + 1):
            owner = _nearest(p, p[medoids], 4096)
            owner[medoids] = places
            if turn == iterations:
                break
            by_cluster = torch.sort(owner, stable=True).indices.split(owner.bincount(minlength=len(first)).tolist())
            moved = torch.stack([members[_central(p[members], w[members])] for members in by_cluster])
            if torch.equal(moved, medoids):
                break
            medoids = moved
        out.append((medoids, owner))
    return torch.stack([m for m, _ in out]), torch.stack([o for _, o in out])


def _nearest(points: Tensor, centres: Tensor, block: int) -> Tensor:
    """:func:`nearest_centre` of one image."""
    offset = centres.square().sum(1)
    return torch.cat([torch.sub(offset, dot(p, centres), alpha=2).argmin(1) for p in points.split(block)])


def _central(points: Tensor, weight: Tensor, block: int = 1024) -> Tensor:
    """Index of the point with the smallest weighted sum of distances to all ``points (n, D)``."""
    n, some = len(points), torch.arange(len(points), device=points.device)
    if n == 1:
        return some[0]
    if n > 64:  # only those that may be the best, given how far products of this precision can be off, are summed up exactly
        apart = points - points.mean(0)
        square, eps = apart.square().sum(1), torch.finfo(points.dtype).eps
        off = 4 * points.shape[1] * eps * square.max()
        shift = 4 * eps * points.norm(dim=1).max()
        cost, slack = torch.empty_like(weight), torch.empty_like(weight)
        for at in some.split(block):
            distance = torch.sub(square[at, None] + square, dot(apart[at], apart), alpha=2).clamp_(min=0).sqrt_()
            cost[at] = distance @ weight
            slack[at] = (off / distance.clamp_(min=float(off.sqrt()) or 1.0) + shift) @ weight
        some = (cost - slack <= (cost + slack).min()).nonzero()[:, 0]
    exact = "donot_use_mm_for_euclid_dist"  # a point's distance to itself, and to its copies, is exactly zero
    total = torch.cat([torch.cdist(points[at], points, compute_mode=exact) @ weight for at in some.split(block)])
    return some[total.argmin()]


def seat_clusters(features: Tensor, centres: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Give every cluster of one image a token to sit in, all different.

    A cluster sits in its member nearest to its centre; one without members takes the lowest-numbered token in which no other sits.

    Parameters
    ----------
    features, centres : Tensor
        ``(N, D)`` and ``(K, D)``, ``K <= N``.
    owner : Tensor
        ``(N,)`` int64 cluster of every token.

    Returns
    -------
    anchors, owner : Tensor
        ``(K,)`` int64 tokens, and ``(N,)`` clusters, none of them empty.
    """
    distance = (features.to(centres.dtype) - centres[owner]).square().sum(1)
    near = torch.sort(distance, stable=True).indices
    near = near[torch.sort(owner[near], stable=True).indices]  # cluster by cluster, the nearest first
    size = owner.bincount(minlength=len(centres))
    anchors = near[(size.cumsum(0) - size).clamp(max=len(owner) - 1)]
    empty = (size == 0).nonzero()[:, 0]
    if len(empty):
        free = torch.ones_like(owner, dtype=torch.bool)
        free[anchors[size > 0]] = False
        anchors[empty] = free.nonzero()[: len(empty), 0]
        owner = owner.scatter(0, anchors[empty], empty)
    return anchors, owner


def ward(points: Tensor, clusters: int, *, ties: bool = False) -> Tensor:
    """Ward's hierarchical clustering, cut at a number of clusters, on the CPU in float64.

    A nearest-neighbour chain: SciPy's on the distances of all pairs up to 15,000 tokens; above, where these do not fit, on
    centroids in O(N D) memory, which takes a pass over all tokens per step.

    Parameters
    ----------
    points : Tensor
        ``(B, N, D)``.
    clusters : int
        Clusters wanted, ``1 <= clusters <= N``.
    ties : bool, default False
        Apply all merges of the same height together, so that fewer clusters may be left; otherwise exactly ``clusters`` are.

    Returns
    -------
    Tensor
        ``(B, N)`` int64 labels, numbered as :func:`scipy.cluster.hierarchy.fcluster` does.
    """
    return torch.stack([_ward(p.detach().double().cpu(), clusters, ties) for p in points]).to(points.device)


def _ward(points: Tensor, clusters: int, ties: bool) -> Tensor:
    """Labels ``(N,)`` of one image."""
    n = len(points)
    tree, heights = _merge_tree(points)
    applied = n - clusters
    while ties and 0 < applied < n - 1 and heights[applied] <= heights[applied - 1]:
        applied += 1
    labels = torch.zeros(n, dtype=torch.long)
    count, stack = 0, [(2 * n - 2, False)] if n > 1 else []
    while stack:
        node, take = stack.pop()
        if not take and node >= n + applied:  # undone: first the inner children, the lower number first, then the leaves
            children = tree[node - n]
            order = [c for c in children if c >= n] + [c for c in children if c < n]
            stack += [(c, False) for c in reversed(order)]
            continue
        members = [node]
        while members:
            m = members.pop()
            if m < n:
                labels[m] = count
            else:
                members += tree[m - n]
        count += 1
    return labels


def _merge_tree(points: Tensor, matrix: int = 15000) -> tuple[list[tuple[int, int]], list[float]]:
    """Children of every merge (node ``N + t`` is merge ``t``, in order of height) and the squared heights."""
    n = len(points)
    if 1 < n <= matrix:
        from scipy.cluster.hierarchy import linkage  # takes longer to import than the rest of vtc

        found = linkage(_condensed(points), "ward")
        return [(int(a), int(b)) for a, b in found[:, :2]], (found[:, 2] ** 2).tolist()
    size, alive = points.new_ones(n), torch.ones(n, dtype=torch.bool)
    sizes = [1.0] * n
    centre, square = points.clone(), points.square().sum(1)

    def row(x: int) -> Tensor:
        apart = (square[x] + square - 2 * (centre @ centre[x])).clamp(min=0)
        apart = (apart * (2 * sizes[x] * size / (sizes[x] + size))).masked_fill(~alive, torch.inf)
        apart[x] = torch.inf
        return apart

    chain: list[int] = []
    found: list[tuple[float, int, int]] = []
    for _ in range(n - 1):
        if not chain:
            chain.append(int(alive.int().argmax()))
        while True:
            x = chain[-1]
            apart = row(x)
            y = int(apart.argmin())
            height = float(apart[y])
            if len(chain) > 1 and float(apart[chain[-2]]) <= height:
                y = chain[-2]
                break
            chain.append(y)
        del chain[-2:]
        found.append((height, x, y))
        alive[x] = False
        mine, other = sizes[x], sizes[y]
        centre[y] = (mine * centre[x] + other * centre[y]) / (mine + other)
        square[y] = centre[y].square().sum()
        sizes[y] = mine + other
        size[y] = mine + other
    root, tree = list(range(2 * n - 1)), []

    def top(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    found.sort(key=lambda merge: merge[0])  # stable: equal heights in the order they were found
    for t, (_, x, y) in enumerate(found):
        a, b = sorted((top(x), top(y)))
        root[a] = root[b] = n + t
        tree.append((a, b))
    return tree, [height for height, _, _ in found]


def _condensed(points: Tensor, block: int = 512) -> np.ndarray:
    """Euclidean distances of all pairs of float64 ``points (N, D)`` in SciPy's order, without a square matrix."""
    n, square = len(points), points.square().sum(1)
    out = np.empty(n * (n - 1) // 2)
    for lo in range(0, n, block):
        rows = points[lo : lo + block]
        apart = (square[lo : lo + block, None] + square[lo:] - 2 * rows @ points[lo:].T).clamp_(min=0).sqrt_().numpy()
        for i in range(len(rows)):
            place = (lo + i) * n - (lo + i) * (lo + i + 1) // 2
            out[place : place + n - lo - i - 1] = apart[i, i + 1 :]
    return out


def similarity_rows(features: Tensor) -> Tensor:
    """Points whose mutual distances are those of the rows of ``E E^T``, in at most ``min(N, D)`` dimensions, float64.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    """
    return torch.stack([_similarity_rows(x) for x in own_images(widened(features.detach()))])


def _similarity_rows(x: Tensor) -> Tensor:
    """:func:`similarity_rows` of one image; products have the precision of ``x (N, D)``."""
    if x.shape[0] <= x.shape[1]:
        return dot(x, x).double()
    gram = dot(x.T, x.T).double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):  # of lower rank
        values, vectors = torch.linalg.eigh(gram)
        factor = vectors * values.clamp(min=0).sqrt()
    return dot(x, factor.T.to(x.dtype)).double()


def connectivity(features: Tensor, threshold: float, *, block: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbourhood of every token in the graph of cosines of at least ``threshold``, in blocks (no full matrix).

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    threshold : float
        Least cosine of neighbours; a token is compared with itself, too.
    block : int
        Rows and columns per block.

    Returns
    -------
    count, within, mean : Tensor
        ``(B, N)`` number of neighbours, sum of their cosines, and mean cosine with all tokens.
    """
    out = []
    for u in own_images(unit_rows(features)):
        count, within = u.new_zeros(2, len(u)).unbind()
        for at, other, cosine in _tiles(u, block):
            near = (cosine >= threshold).to(u.dtype)
            cosine *= near
            count[at] += near.sum(1)
            within[at] += cosine.sum(1)
            if other != at:
                count[other] += near.sum(0)
                within[other] += cosine.sum(0)
        out.append(torch.stack([count, within, u @ u.mean(0)]))
    count, within, mean = torch.stack(out, 1)
    return count, within, mean


def _tiles(unit: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the matrix of cosines between unit rows ``(N, D)`` on and above the diagonal; the others are their transposes."""
    places = [slice(lo, lo + block) for lo in range(0, len(unit), block)]
    for i, at in enumerate(places):
        for other in places[i:]:
            yield at, other, dot(unit[at], unit[other])


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


def count_similar(features: Tensor, threshold: float, *, block: int = 1024) -> Tensor:
    """For every token, how many others have a cosine above ``threshold`` with it; in blocks (no full matrix).

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    threshold : float
        A cosine.
    block : int
        Rows per block.

    Returns
    -------
    Tensor
        ``(B, N)`` int64.
    """
    out = []
    for u in own_images(unit_rows(features)):
        count = torch.zeros(len(u), dtype=torch.long, device=u.device)
        for at, other, cosine in _tiles(u, block):
            if other == at:
                cosine.fill_diagonal_(-torch.inf)
            near = (cosine > threshold).to(u.dtype)
            count[at] += near.sum(1).long()
            if other != at:
                count[other] += near.sum(0).long()
        out.append(count)
    return torch.stack(out)
