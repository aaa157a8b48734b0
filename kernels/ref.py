"""Torch implementations of every op: the specification the accelerated versions are tested against.

All arithmetic is float32 (float64 stays float64) whatever the input's dtype; ties go to the lowest index.
"""

from __future__ import annotations

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
    near = 1 - torch.einsum("bnd,bd->bn", unit, unit[batch, first])
    taken = torch.zeros_like(near, dtype=torch.bool)
    taken[batch, first] = True
    for _ in range(k - 1):
        pick = near.masked_fill(taken, -torch.inf).argmax(-1)
        picks.append(pick)
        taken[batch, pick] = True
        near = torch.minimum(near, 1 - torch.einsum("bnd,bd->bn", unit, unit[batch, pick]))
    return torch.stack(picks, 1)


def max_sum(features: Tensor, k: int, first: Tensor) -> Tensor:
    """Greedy max-sum diversification: every step adds the token with the smallest *sum* of cosines to the chosen ones.

    Arguments and result as in :func:`farthest_point`.
    """
    unit = _unit(features)
    batch = torch.arange(unit.shape[0], device=unit.device)
    picks = [first]
    total = torch.einsum("bnd,bd->bn", unit, unit[batch, first])
    taken = torch.zeros_like(total, dtype=torch.bool)
    taken[batch, first] = True
    for _ in range(k - 1):
        pick = total.masked_fill(taken, torch.inf).argmin(-1)
        picks.append(pick)
        taken[batch, pick] = True
        total = total + torch.einsum("bnd,bd->bn", unit, unit[batch, pick])
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
    values, indices = [], []
    for lo in range(0, a.shape[1], block):
        value, index = torch.einsum("bmd,btd->bmt", a[:, lo : lo + block], b).max(-1)
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
    w = torch.ones_like(owner, dtype=wide.dtype) if weight is None else _wide(weight)
    w = torch.where(owner >= 0, w, torch.zeros_like(w))
    slot = owner.clamp(min=0)
    total = wide.new_zeros(wide.shape[0], groups, wide.shape[2])
    total = total.scatter_add(1, slot[..., None].expand_as(wide), wide * w[..., None])
    if mean:
        size = wide.new_zeros(wide.shape[0], groups).scatter_add(1, slot, w)
        total = total / size.clamp(min=torch.finfo(wide.dtype).tiny)[..., None]
    return total.to(features.dtype)


def _unit(t: Tensor) -> Tensor:
    """Rows scaled to length one; zero rows stay zero."""
    wide = _wide(t)
    norm = wide.norm(dim=-1, keepdim=True)
    return wide / torch.where(norm > 0, norm, torch.ones_like(norm))
