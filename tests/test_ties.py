"""Among equals the lowest index: every op that picks, against its definition, on vectors whose cosines are exact quarters.

A row has four entries of the same size and zeros: its length is a power of two, every product is exact, and ties are everywhere,
also between tokens that an op meets in different blocks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vtc import kernels

sizes = pytest.mark.parametrize(("n", "seed"), [(2, 0), (5, 1), (9, 2), (40, 3), (40, 4), (150, 5), (150, 6)])


def quarters(n: int, seed: int, width: int = 8) -> Tensor:
    """``(n, width)`` rows whose cosines are multiples of 1/4, and exact."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((n, width), np.float32)
    for row in rows:
        row[rng.choice(width, 4, replace=False)] = rng.choice([-1.0, 1.0], 4) * 2.0 ** rng.integers(-2, 3)
    return torch.from_numpy(rows)


def cosines(x: Tensor) -> np.ndarray:
    u = x.double().numpy()
    u = u / np.sqrt((u * u).sum(1, keepdims=True))
    return u @ u.T


def lowest(values, best=max) -> int:
    """The first of the best."""
    values = list(values)
    return values.index(best(values))


def batched(seed: int, n: int) -> Tensor:
    return torch.stack([quarters(n, seed), quarters(n, 100 + seed)])


@sizes
@pytest.mark.parametrize("block", [1, 2, 3, 64])
def test_most_isolated(n, seed, block):
    x = batched(seed, n)
    expected = []
    for image in x:
        c = cosines(image)
        np.fill_diagonal(c, -np.inf)
        expected.append(lowest(1 - c.max(1)))
    assert kernels.ref.most_isolated(x, block=block).tolist() == expected
    assert kernels.most_isolated(x).tolist() == expected


@pytest.mark.parametrize(("n", "alike"), [(4, (2, 3)), (70, (60, 69)), (200, (65, 130, 199)), (200, (0, 199)), (150, (149,))])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_most_isolated_of_equals_far_behind(n, alike, block):
    """All tokens are copies of one, but a few that are at right angles to it and to each other: the first of these wins."""
    x = torch.zeros(1, n, 8)
    x[0, :, 0] = 1
    for axis, token in enumerate(alike, 1):
        x[0, token] = torch.eye(8)[axis] * 2**axis
    assert kernels.ref.most_isolated(x, block=block).tolist() == [alike[0]]


@sizes
def test_greedy_picks(n, seed):
    x, k = batched(seed, n), max(1, (2 * n) // 3)
    weight = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (2, n)).astype(np.float32))
    first = torch.tensor([n - 1, n // 2])
    expected = {"far": [], "weighted": [], "sum": []}
    for image in range(2):
        c, w = cosines(x[image]), weight[image].tolist()
        for name, start in (("far", int(first[image])), ("sum", int(first[image])), ("weighted", lowest(w))):
            picks = [start]
            while len(picks) < k:
                free = [i for i in range(n) if i not in picks]
                gain = {
                    "far": lambda i: min(1 - c[i, j] for j in picks),  # noqa: B023
                    "weighted": lambda i: w[i] * min(1 - c[i, j] for j in picks),  # noqa: B023
                    "sum": lambda i: -sum(c[i, j] for j in picks),  # noqa: B023
                }[name]
                picks.append(free[lowest(map(gain, free))])
            expected[name].append(picks)
    assert kernels.farthest_point(x, k, first).tolist() == expected["far"]
    assert kernels.farthest_point_weighted(x, weight, k).tolist() == expected["weighted"]
    assert kernels.max_sum(x, k, first).tolist() == expected["sum"]


@sizes
def test_the_first_of_a_determinant_is_the_heaviest(n, seed):
    """Of a kernel with orthogonal rows all picks are in the order of their weight, equals in that of their index."""
    weight = torch.from_numpy(np.random.default_rng(seed).integers(1, 4, (1, n)).astype(np.float32))
    order = sorted(range(n), key=lambda i: (-float(weight[0, i]), i))
    x = torch.eye(n)[None] * 2.0
    assert kernels.greedy_dpp(x, weight, n).tolist() == [order] == kernels.shrinking_picks(x, weight, n).tolist()


@sizes
@pytest.mark.parametrize("block", [1, 4, 512])
def test_nearest(n, seed, block):
    x, other = batched(seed, n), batched(seed + 50, n + 3)
    both = [cosines(torch.cat([a, b]))[:n, n:] for a, b in zip(x, other, strict=True)]
    value, index = kernels.ref.pairwise_top1(x, other, block=block)
    assert index.tolist() == [[lowest(row) for row in c] for c in both]
    np.testing.assert_array_equal(value.numpy(), [c.max(1) for c in both])
    square = [((a[:, None] - b[None]) ** 2).sum(-1).tolist() for a, b in zip(x, other, strict=True)]
    assert kernels.ref.nearest_centre(x, other, block=block).tolist() == [[lowest(r, min) for r in s] for s in square]


@sizes
@pytest.mark.parametrize("threshold", [-0.25, 0.0, 0.25, 0.5, 1.0])
def test_a_cosine_at_the_threshold(n, seed, threshold):
    """Similar is above it, and nobody to oneself; neighbours reach it, and everybody is one's own."""
    x = batched(seed, n)
    for block in (1 + n // 4, 1024):
        similar, (count, within, _) = (
            op(x, threshold, block=block) for op in (kernels.ref.count_similar, kernels.ref.connectivity)
        )
        for image in range(2):
            c = cosines(x[image])
            assert similar[image].tolist() == [int((np.delete(row, i) > threshold).sum()) for i, row in enumerate(c)]
            assert count[image].tolist() == (c >= threshold).sum(1).tolist()
            np.testing.assert_allclose(within[image], (c * (c >= threshold)).sum(1), rtol=1e-6, atol=1e-6)


@sizes
def test_best_of_every_group(n, seed):
    rng = np.random.default_rng(seed)
    scores, group = rng.integers(0, 4, (2, n)).astype(np.float32), rng.integers(0, 5, (2, n))
    quota = rng.integers(0, 1 + n // 3, (2, 5))
    chosen = kernels.topk_per_group(*map(torch.from_numpy, (scores, group, quota)))
    for s, g, q, got in zip(scores, group, quota, chosen, strict=True):
        members = [sorted((i for i in range(n) if g[i] == k), key=lambda i: (-s[i], i)) for k in range(5)]  # noqa: B023
        assert got.nonzero()[:, 0].tolist() == sorted(i for k in range(5) for i in members[k][: q[k]])
