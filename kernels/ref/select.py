"""The best tokens: which they are, and their states gathered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vtc.kernels.ref.linear import widened


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
    if not full.is_cpu or not 0 < k < n or torch.compiler.is_compiling():
        return torch.sort(full, dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
    values = full.detach().numpy()  # NumPy takes less time to start so little work
    least = values.copy()
    least.partition(n - k)
    least = least[:, n - k, None]
    at = (~(values < least)).ravel().nonzero()[0]  # a NaN is below nothing
    if len(at) > k * len(values):  # more tokens have the least score than there are places: the lowest ones of these
        above, equal = ~(values <= least), values == least
        free = k - above.sum(1, keepdims=True)
        at = (above | equal & (equal.cumsum(1) <= free)).ravel().nonzero()[0]
    return torch.from_numpy((at % n if len(values) > 1 else at).reshape(len(values), k))


def topk(scores: Tensor, k: int) -> Tensor:
    """Indices ``(B, k)`` of the ``k`` largest entries of each row, the largest first; among equal scores the lowest index first.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)``.
    k : int
        ``0 <= k <= N``.
    """
    if scores.device.type != "cpu" or scores.numel() < 2048 or 4 * k > scores.shape[-1]:
        return torch.sort(widened(scores), dim=-1, descending=True, stable=True).indices[:, :k]
    index = topk_sorted(scores, k)  # less to sort
    return index.gather(1, torch.sort(widened(scores).gather(1, index), dim=-1, descending=True, stable=True).indices)


def topk_mask(scores: Tensor, count: Tensor) -> Tensor:
    """Mark the ``count`` highest scores of every row; among equal scores the lowest index wins. No host synchronisation.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)``.
    count : Tensor
        ``(B,)`` int64, ``0 <= count``; all are marked where it exceeds ``N``.

    Returns
    -------
    Tensor
        ``(B, N)`` bool.
    """
    order = torch.sort(widened(scores), dim=-1, descending=True, stable=True).indices
    chosen = (torch.arange(order.shape[1], device=order.device) < count[:, None]).expand_as(order)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def compacted(mask: Tensor, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Where each row is True, without gaps.

    Parameters
    ----------
    mask : Tensor
        ``(B, N)`` bool.
    count : int or None
        Length of the result, at least the number of True entries in any row. ``None``: that number, which the host asks for.

    Returns
    -------
    index : Tensor
        ``(B, K)`` int64, ascending; 0 behind the last one of a row with fewer than ``K``.
    valid : Tensor or None
        ``(B, K)`` bool, False on these; ``None`` where no row has fewer, and where ``count`` is given.
    """
    valid = None
    if count is None:
        size = mask.sum(1)
        found = size.tolist()
        count = max(found, default=0)
        if min(found, default=0) < count:
            valid = torch.arange(count, device=mask.device) < size[:, None]
    place = torch.where(mask, mask.cumsum(1) - 1, count)  # the others share a place that is cut off
    index = place.new_zeros(len(mask), count + 1).scatter(
        1, place, torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    )
    return index[:, :count], valid


def take(t: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather whole rows: what lies at ``index`` along one dimension of a batch. O(result).

    Parameters
    ----------
    t : Tensor
        ``(..., B, N, ...)``, or ``(..., 1, N, ...)`` where all share it.
    index : Tensor
        ``(B, K)`` int64.
    dim : int, default 1
        The dimension of ``N``; the batch is the one before.

    Returns
    -------
    Tensor
        ``(..., B, K, ...)``.
    """
    batch, index = dim - 1, index.to(t.device)
    if t.shape[batch] == 1:
        return t.squeeze(batch).index_select(batch, index.flatten()).unflatten(batch, index.shape)
    if t.device.type == "cpu":  # row by row: about 20 times as fast as number by number
        at = index + t.shape[dim] * torch.arange(len(index))[:, None]
        return t.flatten(batch, dim).index_select(batch, at.flatten()).unflatten(batch, index.shape)
    shape, view = list(t.shape), [1] * t.dim()
    shape[dim] = index.shape[1]
    view[batch], view[dim] = index.shape
    return t.gather(dim, index.view(view).expand(shape))


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


def select_compact(
    scores: Tensor, k: int, states: Sequence[Tensor] = (), *, dims: Sequence[int] = (), count: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Choose the ``k`` best tokens of every row and gather their hidden states, RoPE tables, masks, keys and values.

    O(N + k) per row and O(k) per gathered column; no host synchronisation. Among equal scores the lowest index wins. Rows may
    keep different numbers of tokens: shorter ones are padded on the left, so that the last token stays last.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)`` float32, float16 or bfloat16.
    k : int
        Length of the result, ``0 <= k <= N``.
    states : sequence of Tensor
        What is gathered, of any type: ``(B, ..., N, ...)``, or ``(1, ..., N, ...)`` where all rows share it.
    dims : sequence of int
        The token dimension of each, at least 1; default 1 for all.
    count : Tensor or None
        ``(B,)`` int64 tokens that each row keeps, ``0 <= count <= k``; ``None``: ``k``.

    Returns
    -------
    index : Tensor
        ``(B, k)`` int64, ascending; -1 on padding.
    gathered : list of Tensor
        The states of these tokens ``(B, ..., k, ...)``; zeros on padding.
    """
    if count is None:
        index = topk_sorted(scores, k)
    else:
        order = torch.sort(widened(scores), dim=-1, descending=True, stable=True).indices[:, :k]
        index = torch.where(torch.arange(k, device=order.device) < count[:, None], order, -1).sort(dim=-1).values
    gathered = []
    for t, dim in zip(states, dims or [1] * len(states), strict=True):
        # a choice: padding takes any row, and is zero in the end
        rows = zip(t.expand(len(index), *t.shape[1:]), index.clamp(min=0), strict=True)
        taken = torch.stack([row.index_select(dim - 1, at) for row, at in rows])
        if count is not None:
            kept = (index >= 0).view(len(index), *[1] * (dim - 1), k, *[1] * (t.dim() - dim - 1))
            taken = torch.where(kept, taken, torch.zeros_like(taken))
        gathered.append(taken)
    return index, gathered
