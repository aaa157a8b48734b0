"""Torch implementations of every op: the specification the accelerated versions are tested against.

All arithmetic is float32 (float64 stays float64) whatever the input's dtype; ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    """At least float32: selection must not depend on the model's dtype."""
    return t if t.dtype == torch.float64 else t.float()


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest entries of each row, ascending by index; among equal scores the lowest index wins.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)``.
    k : int
        ``1 <= k <= N``.

    Returns
    -------
    Tensor
        ``(B, k)`` int64.
    """
    order = torch.sort(_wide(scores), dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


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
    order = torch.sort(_wide(scores), dim=-1, descending=True, stable=True).indices
    by_group = torch.sort(group.gather(1, order), dim=-1, stable=True)
    order = order.gather(1, by_group.indices)
    size = torch.zeros_like(quota).scatter_add(1, group, torch.ones_like(group))
    start = size.cumsum(1) - size
    rank = torch.arange(group.shape[1], device=group.device) - start.gather(1, by_group.values)
    chosen = rank < quota.gather(1, by_group.values)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def attention_rows(
    query: Tensor, key: Tensor, *, scaling: float | None = None, mask: Tensor | None = None, reduce: str = "mean"
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
    """
    q, k = _wide(query), _wide(key)
    b, h, r, d = q.shape
    kv = k.shape[1]
    logits = torch.einsum("bgrd,bgnd->bgrn", q.reshape(b, kv, (h // kv) * r, d), k).reshape(b, h, r, -1)
    logits = logits * (d**-0.5 if scaling is None else scaling)
    if reduce == "logits":
        return logits
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    probs = torch.softmax(logits, dim=-1)
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
    total = torch.zeros(b, key.shape[2], dtype=_wide(key).dtype, device=key.device)
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
    mass = start.to(_wide(key).dtype)[:, None].expand(b, h, r)
    for _ in range(steps):
        total = torch.zeros(b, h, n, dtype=_wide(key).dtype, device=key.device)
        for lo in range(0, r, block):
            hi = min(lo + block, r)
            part = mask[..., lo:hi, :] if mask is not None and mask.shape[-2] != 1 else mask
            if mask is None and causal:
                part = (at <= at[n - r + lo : n - r + hi, None])[None, None]
            rows = attention_rows(query[:, :, lo:hi], key, scaling=scaling, mask=part, reduce="none")
            total += torch.einsum("bhr,bhrn->bhn", mass[:, :, lo:hi], torch.nan_to_num(rows, nan=0.0))
        mass = total[..., n - r :]
    return total


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
    unit = _unit(features)
    batch = torch.arange(unit.shape[0], device=unit.device)
    picks = [first]
    images = _images(unit)
    near = 1 - _cosine(images, first)
    taken = torch.zeros_like(near, dtype=torch.bool)
    taken[batch, first] = True
    for _ in range(k - 1):
        pick = near.masked_fill(taken, -torch.inf).argmax(-1)
        picks.append(pick)
        taken[batch, pick] = True
        near = torch.minimum(near, 1 - _cosine(images, pick))
    return torch.stack(picks, 1)


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
    return 1 - _cosine(_images(_unit(features)), row)


def nearest_distance(features: Tensor, *, block: int = 1024) -> Tensor:
    """Distance ``1 - cos`` of every token to its nearest *other* token, in blocks (no full matrix); infinite if it is alone.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    block : int
        Rows per block.

    Returns
    -------
    Tensor
        ``(B, N)``.
    """
    unit = _unit(features)
    n, images = unit.shape[1], _images(unit)
    parts = []
    for lo in range(0, n, block):
        cosine = torch.stack([u[lo : lo + block] @ u.T for u in images])
        own = torch.arange(lo, lo + cosine.shape[1], device=unit.device)
        cosine[:, own - lo, own] = -torch.inf
        parts.append(1 - cosine.amax(-1))
    return torch.cat(parts, 1)


def max_sum(features: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy max-sum diversification: every step adds the token with the smallest *sum* of cosines to the chosen ones.

    Arguments and result as in :func:`farthest_point`.
    """
    unit = _unit(features)
    batch = torch.arange(unit.shape[0], device=unit.device)
    picks = [first]
    images = _images(unit)
    total = _cosine(images, first)
    taken = torch.zeros_like(total, dtype=torch.bool)
    taken[batch, first] = True
    for _ in range(k - 1):
        pick = total.masked_fill(taken, torch.inf).argmin(-1)
        picks.append(pick)
        taken[batch, pick] = True
        total = total + _cosine(images, pick)
    return torch.stack(picks, 1)


def pairwise_top1(source: Tensor, target: Tensor, *, block: int = 1024) -> tuple[Tensor, Tensor]:
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
    a, b = _unit(source), _unit(target)
    left, right = _images(a), _images(b)
    values, indices = [], []
    for lo in range(0, a.shape[1], block):
        value, index = torch.stack([m[lo : lo + block] @ t.T for m, t in zip(left, right, strict=True)]).max(-1)
        values.append(value)
        indices.append(index)
    if not values:
        empty = a.new_zeros(a.shape[0], 0)
        return empty, empty.long()
    return torch.cat(values, 1), torch.cat(indices, 1)


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
    wide = _wide(features)
    w = torch.ones_like(owner, dtype=wide.dtype) if weight is None else weight.to(wide.dtype)
    w = torch.where(owner >= 0, w, torch.zeros_like(w))
    slot = owner.clamp(min=0)
    total = wide.new_zeros(wide.shape[0], groups, wide.shape[2])
    total = total.scatter_add(1, slot[..., None].expand_as(wide), wide * w[..., None])
    if mean:
        size = wide.new_zeros(wide.shape[0], groups).scatter_add(1, slot, w)
        total = total / size.clamp(min=torch.finfo(wide.dtype).tiny)[..., None]
    return total.to(features.dtype)


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


def _cosine(images: list[Tensor], row: Tensor) -> Tensor:
    """Cosines of the unit rows ``(N, D)`` of ``B`` images with one row ``(B,)`` of the same image, ``(B, N)``."""
    return torch.stack([u @ u.index_select(0, r)[0] for u, r in zip(images, row.split(1), strict=True)])


def _images(t: Tensor) -> list[Tensor]:
    """The entries of a batch, each in memory of its own.

    Products are made image by image: how they round depends on the batch size and on where in memory an operand starts, and equal
    similarities (repeated tokens) must be broken in the same way in any batch.
    """
    return [t[0]] if len(t) == 1 else [i.clone() for i in t]


def _unit(t: Tensor) -> Tensor:
    """Rows scaled to length one; zero rows stay zero."""
    wide = _wide(t)
    norm = wide.norm(dim=-1, keepdim=True)
    return wide / torch.where(norm > 0, norm, torch.ones_like(norm))


def drop_duplicates(features: Tensor, order: Tensor, keep: int, *, step: int = 8, near: int = 32) -> Tensor:
    """Thin a list of tokens by repeatedly removing near duplicates, O(N ``near``) memory.

    A round compares the tokens at even places of the list with those at odd places, removes the up to ``step`` even ones with the
    highest cosine to an odd one, and continues with the remaining even ones by descending cosine, followed by the odd ones.

    Each token's nearest neighbours are looked up once in a list of ``near``; rounds in which none of them stands at an odd place
    compute that token's maximum afresh, so the result is that of comparing all pairs in every round.

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
        [o[_thinned(u, keep, step, near)] for o, u in zip(order, _images(_unit(features.gather(1, rows))), strict=True)]
    )


def _thinned(unit: Tensor, keep: int, step: int, near: int, block: int = 1024) -> Tensor:
    """Places ``(keep,)`` that :func:`drop_duplicates` leaves of unit rows ``(R, D)``."""
    alive = torch.arange(len(unit), device=unit.device)
    listed, values, neighbours = 0, unit, alive  # of how many tokens the lists were made
    while len(alive) > keep:
        if 2 * len(alive) <= listed or not listed:
            listed, width = len(alive), min(near, len(alive) - 1)
            values, neighbours = unit.new_zeros(len(unit), width), alive.new_zeros(len(unit), width)
            some = unit[alive]
            for lo in range(0, listed, block):
                cosine = some[lo : lo + block] @ some.T
                own = torch.arange(len(cosine), device=unit.device)
                cosine[own, own + lo] = -torch.inf
                best = cosine.topk(width, dim=1)
                values[alive[lo : lo + block]], neighbours[alive[lo : lo + block]] = best.values, alive[best.indices]
        even, odd = alive[0::2], alive[1::2]
        if not len(odd):  # one token left and none wanted of it
            return alive[:keep]
        opposite = torch.zeros(len(unit), dtype=torch.bool, device=unit.device).index_fill(0, odd, True)
        hit = opposite[neighbours[even]]
        best, found = values[even].masked_fill(~hit, -torch.inf).amax(1), hit.any(1)
        if not bool(found.all()):
            lost = (~found).nonzero()[:, 0]
            for part in lost.split(block):
                best[part] = (unit[even[part]] @ unit[odd].T).amax(1)
        by_value = torch.sort(best, descending=True, stable=True).indices
        alive = torch.cat([even[by_value[min(step, len(alive) - keep) :]], odd])
    return alive


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
    unit = _unit(features) if guard else _wide(features)
    weight = _wide(relevance).to(unit.dtype)
    return torch.stack([_dpp(u, w, k, guard) for u, w in zip(_images(unit), _images(weight), strict=True)])


def _dpp(unit: Tensor, weight: Tensor, k: int, guard: bool) -> Tensor:
    """Picks ``(k,)`` of one image with unit rows ``(N, D)`` and weights ``(N,)``."""
    n = len(unit)
    whole = weight * unit.square().sum(1) * weight  # the kernel's diagonal; what each token adds shrinks from there
    gain, factor, picks = whole.clone(), unit.new_zeros(k, n), []
    taken = torch.zeros(n, dtype=torch.bool, device=unit.device)
    least = 8 * torch.finfo(unit.dtype).eps * whole  # rounding of a gain that is really zero
    for t in range(k):
        pick = gain.argmax()
        if guard:
            alive = gain.index_select(0, pick[None]) > least.index_select(0, pick[None])
            pick = torch.where(alive[0], pick, weight.masked_fill(taken, -torch.inf).argmax())
        at = pick[None]
        row = weight * weight.index_select(0, at) * (unit @ unit.index_select(0, at)[0])
        row = row - factor[:t].T @ factor[:t].index_select(1, at)[:, 0]
        row = row / gain.index_select(0, at).sqrt()
        if guard:
            row = torch.where(alive, row, torch.zeros_like(row))
            taken.index_fill_(0, at, True)
        factor[t] = row
        gain = (gain - row.square()).index_fill(0, at, -torch.inf)
        if guard:
            gain = gain.masked_fill(taken, -torch.inf)
        picks.append(pick)
    return torch.stack(picks)


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
    wide, count, out = _wide(features), min(count, features.shape[1] - 1), []
    for x, u, w, own in zip(_images(wide), _images(_unit(keys)), _wide(weight).to(wide.dtype), rows, strict=True):
        parts = []
        for at in own.split(block):
            total = x[at]
            if count:
                cosine = u[at] @ u.T
                cosine[torch.arange(len(at), device=at.device), at] = -torch.inf
                least = cosine.topk(count, dim=1).values[:, -1:]
                near, equal = cosine > least, cosine == least
                near |= equal & (equal.cumsum(1) <= count - near.sum(1, keepdim=True))
                total = total + (near * w) @ x
            parts.append(total)
        out.append(torch.cat(parts) if parts else x[own])
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
    images, weight = _images(_unit(features)), _wide(weight)
    batch = torch.arange(len(images), device=weight.device)
    picks = [weight.argmax(-1)]
    near = 1 - _cosine(images, picks[0])
    taken = torch.zeros_like(weight, dtype=torch.bool)
    taken[batch, picks[0]] = True
    for _ in range(k - 1):
        pick = (weight * near).masked_fill(taken, -torch.inf).argmax(-1)
        picks.append(pick)
        taken[batch, pick] = True
        near = torch.minimum(near, 1 - _cosine(images, pick))
    return torch.stack(picks, 1)


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
    return torch.stack([_nearest(p, c, block) for p, c in zip(_images(_wide(points)), _images(_wide(centres)), strict=True)])


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
    wide = _wide(points)
    weights = torch.ones_like(wide[..., 0]) if weight is None else _wide(weight).to(wide.dtype)
    for p, w, first in zip(_images(wide), weights, start, strict=True):
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
    wide = _wide(points)
    weights = torch.ones_like(wide[..., 0]) if weight is None else _wide(weight).to(wide.dtype)
    for p, w, first in zip(_images(wide), weights, start, strict=True):
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
    return torch.cat([(offset - 2 * p @ centres.T).argmin(1) for p in points.split(block)])


def _central(points: Tensor, weight: Tensor, block: int = 1024) -> Tensor:
    """Index of the point with the smallest weighted sum of distances to all ``points (n, D)``."""
    exact = "donot_use_mm_for_euclid_dist"  # a point's distance to itself, and to its copies, is exactly zero
    return torch.cat([torch.cdist(p, points, compute_mode=exact) @ weight for p in points.split(block)]).argmin()


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

    A nearest-neighbour chain: O(N^2) steps with a distance matrix up to 4,096 tokens, O(N D) memory with centroids above.

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


def _merge_tree(points: Tensor, matrix: int = 4096) -> tuple[list[tuple[int, int]], list[float]]:
    """Children of every merge (node ``N + t`` is merge ``t``, in order of height) and the squared heights."""
    n = len(points)
    size, alive = points.new_ones(n), torch.ones(n, dtype=torch.bool)
    sizes = [1.0] * n
    centre, square, table = points.clone(), points.square().sum(1), None
    if n <= matrix:
        table = (square[:, None] + square - 2 * points @ points.T).clamp(min=0).fill_diagonal_(torch.inf)

    def row(x: int) -> Tensor:
        if table is not None:
            return table[x]
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
        if table is not None:  # the distance to a union follows from those to its parts
            new = torch.addcmul((mine + size) * table[x], other + size, table[y])
            new = ((new - height * size) / (mine + other + size)).masked_fill_(~alive, torch.inf)
            new[y] = torch.inf
            table[y], table[:, y] = new, new
            table[x], table[:, x] = torch.inf, torch.inf
        else:
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


def similarity_rows(features: Tensor) -> Tensor:
    """Points whose mutual distances are those of the rows of ``E E^T``, in at most ``min(N, D)`` dimensions, float64.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    """
    wide = features.detach().double()
    if wide.shape[1] <= wide.shape[2]:
        return wide @ wide.transpose(1, 2)
    values, vectors = torch.linalg.eigh(wide.transpose(1, 2) @ wide)
    return wide @ (vectors * values.clamp(min=0).sqrt()[:, None])


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
    for u in _images(_unit(features)):
        count, within = u.new_zeros(2, len(u)).unbind()
        for i, rows in enumerate(u.split(block)):
            at = slice(i * block, i * block + len(rows))
            for columns in u.split(block):  # tiles that fit the cache
                cosine = rows @ columns.T
                near = cosine >= threshold
                count[at] += near.sum(1)
                within[at] += cosine.mul_(near).sum(1)
        out.append(torch.stack([count, within, u @ u.mean(0)]))
    count, within, mean = torch.stack(out, 1)
    return count, within, mean


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
    unit = _unit(features)
    for u, w in zip(_images(unit), _images(_wide(relevance).to(unit.dtype)), strict=True):
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
    for u in _images(_unit(features)):
        parts = []
        for at in torch.arange(len(u), device=u.device).split(block):
            cosine = u[at] @ u.T
            cosine[torch.arange(len(at), device=at.device), at] = -torch.inf
            parts.append((cosine > threshold).sum(1))
        out.append(torch.cat(parts))
    return torch.stack(out)
