"""Clusters around means or medoids."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.ref.linear import dot, own_images, widened
from vtc.kernels.ref.similarity import nearest_centre


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
            previous, owner = owner, nearest_centre(p[None], centres[None])[0]
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
            owner = nearest_centre(p[None], p[None, medoids])[0]
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
    size = torch.zeros(len(centres), dtype=torch.long, device=owner.device).index_add(0, owner, torch.ones_like(owner))
    # a choice: behind the last token begin only clusters without any, which get another one below
    anchors = near[(size.cumsum(0) - size).clamp(max=len(owner) - 1)]
    empty = size == 0
    # those without a seat come first, by number; every empty cluster takes the next one
    seated = torch.zeros(len(owner) + 1, dtype=torch.bool, device=owner.device)
    seated = seated.scatter(0, torch.where(empty, len(owner), anchors), torch.ones_like(empty))[:-1]
    free = torch.sort(seated.to(torch.int8), stable=True).indices
    # a choice: -1 stands only in front of the first empty cluster, where nothing is taken
    anchors = torch.where(empty, free[(empty.cumsum(0) - 1).clamp(min=0)], anchors)
    return anchors, owner.scatter(0, anchors, torch.arange(len(centres), device=owner.device))
