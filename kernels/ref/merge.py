"""Sums and means of tokens, by owner or by neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.ref.linear import dot, own_images, unit_rows, widened
from vtc.kernels.ref.select import topk_sorted


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
