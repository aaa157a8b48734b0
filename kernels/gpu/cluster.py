"""k-means and k-medoids without a host synchronisation: all rounds run, since one that changes nothing changes nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.gpu.common import check, power
from vtc.kernels.gpu.merge import by_group, segment_sum
from vtc.kernels.gpu.similarity import nearest_centre


@triton.jit
def _distance_sums(
    x, order, sorted_owner, start, weight, out, n, groups, d, sxb, sxn, sxd, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write ``out (B, n)``, in the order of ``order``: weighted sum of a token's distances to the members of its group."""
    pid = tl.program_id(0).to(tl.int64)
    b, place = pid // n, pid % n
    token = tl.load(order + b * n + place)
    group = tl.load(sorted_owner + b * n + place)
    lo = tl.load(start + b * (groups + 1) + group).to(tl.int32)
    hi = tl.load(start + b * (groups + 1) + group + 1).to(tl.int32)
    x += b * sxb
    total = 0.0
    for first in range(lo, hi, ROWS):
        at = first + tl.arange(0, ROWS)
        member = tl.load(order + b * n + at, mask=at < hi, other=0)
        square = tl.zeros((ROWS,), tl.float32)
        for c in range(0, d, BLOCK):
            cols = c + tl.arange(0, BLOCK)
            own = tl.load(x + token * sxn + cols * sxd, mask=cols < d, other=0.0).to(tl.float32)
            inside = (at < hi)[:, None] & (cols < d)[None, :]
            theirs = tl.load(x + member[:, None] * sxn + cols[None, :] * sxd, mask=inside, other=0.0).to(tl.float32)
            apart = tl.where(inside, theirs - own[None, :], 0.0)
            square += tl.sum(apart * apart, 1)
        part = tl.load(weight + b * n + member, mask=at < hi, other=0.0)
        total += tl.sum(tl.sqrt(square) * part, 0)
    tl.store(out + b * n + place, total)


@triton.jit
def _central(cost, order, start, out, n, groups, BLOCK: tl.constexpr):
    """Write ``out (B, groups)``: the member with the smallest cost, the lowest token among equals."""
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // groups, pid % groups
    lo = tl.load(start + b * (groups + 1) + g).to(tl.int32)
    hi = tl.load(start + b * (groups + 1) + g + 1).to(tl.int32)
    least = float("inf")
    where = lo
    for first in range(lo, hi, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(cost + b * n + at, mask=at < hi, other=float("inf"))
        low, place = tl.min(value, 0, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(low < least, first + place, where)
        least = tl.minimum(least, low)
    tl.store(out + pid, tl.load(order + b * n + where))


def k_means(points: Tensor, start: Tensor, iterations: int, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`vtc.kernels.k_means`."""
    check(points, weight, tokens=points.shape[1])
    clusters, d = start.shape[1], points.shape[2]
    ones = torch.ones(points.shape[:2], dtype=torch.float32, device=points.device)
    heavy = ones if weight is None else weight.float()
    centres = points.gather(1, start[..., None].expand(-1, -1, d)).float()
    owner = start
    for _ in range(iterations):
        owner = nearest_centre(points, centres)
        order, begin = by_group(owner, clusters)
        used = heavy
        if weight is not None:
            mass = segment_sum(heavy[..., None], order, begin)[..., 0]
            used = torch.where(mass.gather(1, owner) > 0, heavy, ones)
        mean = segment_sum(points, order, begin, used, mean=True, dtype=torch.float32)
        size = begin[:, 1:] - begin[:, :-1]
        centres = torch.where((size > 0)[..., None], mean, centres)
    return centres, owner


def k_medoids(points: Tensor, start: Tensor, iterations: int, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`vtc.kernels.k_medoids`."""
    (b, n, d), clusters = points.shape, start.shape[1]
    check(points, weight, tokens=n)
    heavy = torch.ones(b, n, device=points.device) if weight is None else weight.float().contiguous()
    places = torch.arange(clusters, device=points.device).expand(b, -1)
    medoids, owner = start, start
    for turn in range(iterations + 1):
        chosen = points.gather(1, medoids[..., None].expand(-1, -1, d))
        owner = nearest_centre(points, chosen).scatter(1, medoids, places)
        if turn == iterations:
            break
        order, begin = by_group(owner, clusters)
        cost = torch.empty(b, n, dtype=torch.float32, device=points.device)
        _distance_sums[(b * n,)](
            points, order, owner.gather(1, order), begin, heavy, cost, n, clusters, d, *points.stride(),
            ROWS=16, BLOCK=power(d, 16, 256),
        )  # fmt: skip
        medoids = torch.empty(b, clusters, dtype=torch.int64, device=points.device)
        _central[(b * clusters,)](cost, order, begin, medoids, n, clusters, BLOCK=128)
    return medoids, owner
