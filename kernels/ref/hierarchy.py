"""Ward's hierarchical clustering."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
    labels = [_ward(p, clusters, ties) for p in points.detach().double().cpu()]
    return torch.stack(labels).to(points.device, non_blocking=True)


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
