"""Greedy subsets, the whole loop on the device: cosines of all pairs once, on tensor cores, then one program per image that picks.

A pick depends on the one before, so the steps cannot run side by side, and a step that reads all features again is bound by memory.
With the cosines at hand a step reads one row of N numbers. They take ``4 N^2`` bytes per image; images are done in groups that stay
below :data:`WORKSPACE`, and an image that does not fit alone is left to the torch twin, which takes O(N D) memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.dispatch import Unsupported
from vtc.kernels.gpu.common import check, power
from vtc.kernels.gpu.similarity import cosines

WORKSPACE = 2**28
"""Most bytes of cosines held at a time: 8,192 tokens of one image."""


@triton.jit
def _spread(cosine, first, weight, picks, n, k, SUM: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``picks (B, k)``: largest distance to the nearest pick, or (SUM) smallest sum of cosines with the picks.

    Starts with ``first``, or (WEIGHTED) with the heaviest; distances are then multiplied by ``weight (B, n)``.
    """
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    cosine += b * n * n
    free = (at < n).to(tl.int32)
    value = tl.full((BLOCK,), 0.0, tl.float32)  # of every token: the larger, the sooner chosen
    if not SUM:
        value += float("inf")
    heavy = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        heavy = tl.load(weight + b * n + at, mask=at < n, other=0.0).to(tl.float32)
        pick = tl.argmax(tl.where(free > 0, heavy, float("-inf")), 0).to(tl.int64)
    else:
        pick = tl.load(first + b).to(tl.int64)
    for step in range(k):
        pick = tl.minimum(tl.maximum(pick, 0), n - 1)  # NaN among the features must not lead out of bounds
        tl.store(picks + b * k + step, pick)
        row = tl.load(cosine + pick * n + at, mask=at < n, other=0.0)
        free = tl.where(at == pick, 0, free)
        if SUM:
            value = value - row
        else:
            value = tl.minimum(value, 1 - row)
        pick = tl.argmax(tl.where(free > 0, value * heavy, float("-inf")), 0).to(tl.int64)


@triton.jit
def _dpp(cosine, square, weight, factor, picks, n, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``picks (B, k)`` of the guarded greedy MAP; ``factor (B, k, n)`` is scratch for the rows of the Cholesky factor.

    ``square (B, n)`` is the diagonal of the matrix of cosines.
    """
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    cosine += b * n * n
    factor += b * k * n
    heavy = tl.load(weight + b * n + at, mask=at < n, other=0.0).to(tl.float32)
    whole = heavy * tl.load(square + b * n + at, mask=at < n, other=0.0) * heavy
    least = 8 * 1.1920928955078125e-07 * whole  # rounding of a gain that is really zero
    gain = tl.where(at < n, whole, float("-inf"))
    free = (at < n).to(tl.int32)
    count = tl.full((), 0, tl.int32)  # rows of the factor so far
    for step in range(k):
        pick = tl.argmax(gain, 0).to(tl.int64)
        spent = tl.sum(tl.where((at == pick) & (gain <= least), 1, 0), 0)
        heaviest = tl.argmax(tl.where(free > 0, heavy, float("-inf")), 0).to(tl.int64)
        pick = tl.where(spent > 0, heaviest, pick)
        pick = tl.minimum(tl.maximum(pick, 0), n - 1)
        own = tl.sum(tl.where(at == pick, gain, 0.0), 0)
        # 1 if the token adds anything: then its row joins the factor
        adds = tl.sum(tl.where((at == pick) & (gain > least), 1, 0), 0)
        tl.store(picks + b * k + step, pick)
        mine = tl.sum(tl.where(at == pick, heavy, 0.0), 0)
        row = heavy * mine * tl.load(cosine + pick * n + at, mask=at < n, other=0.0)
        for lo in range(0, count, ROWS):
            s = lo + tl.arange(0, ROWS)
            inside = (s < count)[:, None] & (at < n)[None, :]
            known = tl.load(factor + s.to(tl.int64)[:, None] * n + at[None, :], mask=inside, other=0.0)
            here = tl.load(factor + s.to(tl.int64) * n + pick, mask=s < count, other=0.0)
            row -= tl.sum(known * here[:, None], 0)
        row = row / tl.sqrt(own)
        gain = tl.where(at < n * adds, gain - row * row, gain)
        gain = tl.where(at == pick, float("-inf"), gain)
        free = tl.where(at == pick, 0, free)
        tl.store(factor + count.to(tl.int64) * n + at, row, mask=at < n * adds)
        count += adds
        tl.debug_barrier()  # rows are read by other threads than those that wrote them


def _in_groups(features: Tensor, k: int, pick: Callable[[Tensor, slice, int], Tensor]) -> Tensor:
    """Let ``pick(cosines, images, block)`` choose for groups of images whose cosines fit the workspace."""
    b, n, _ = features.shape
    check(features, tokens=n)
    if not 1 <= k <= n:
        raise Unsupported(f"{k} of {n} tokens")
    group = WORKSPACE // (4 * n * n)
    if not group:
        raise Unsupported(f"{n} tokens: their cosines take more than {WORKSPACE // 2**20} MiB")
    parts = [slice(lo, lo + group) for lo in range(0, b, group)]
    return torch.cat([pick(cosines(features[part]), part, power(n)) for part in parts])


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def _pick(features: Tensor, k: int, first: Tensor, weight: Tensor | None, add_up: bool) -> Tensor:
    def run(cosine: Tensor, part: slice, block: int) -> Tensor:
        picks = torch.empty(len(cosine), k, dtype=torch.int64, device=cosine.device)
        given = first[part].contiguous()
        heavy = given if weight is None else weight[part].contiguous()
        _spread[(len(cosine),)](
            cosine, given, heavy, picks, cosine.shape[1], k,
            SUM=add_up, WEIGHTED=weight is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return picks

    return _in_groups(features, k, run)


def farthest_point(features: Tensor, k: int, first: Tensor) -> Tensor:
    """:func:`vtc.kernels.greedy.farthest_point`."""
    return _pick(features, k, first, None, add_up=False)


def max_sum(features: Tensor, k: int, first: Tensor) -> Tensor:
    """:func:`vtc.kernels.greedy.max_sum`."""
    return _pick(features, k, first, None, add_up=True)


def farthest_point_weighted(features: Tensor, weight: Tensor, k: int) -> Tensor:
    """:func:`vtc.kernels.greedy.farthest_point_weighted`."""
    check(weight, tokens=weight.shape[1])
    return _pick(features, k, weight, weight, add_up=False)


def greedy_dpp(features: Tensor, relevance: Tensor, k: int, *, guard: bool = True) -> Tensor:
    """:func:`vtc.kernels.greedy.greedy_dpp`."""
    if not guard:
        raise Unsupported("guard=False, whose result past the kernel's rank depends on how the twin rounds")
    check(relevance, tokens=relevance.shape[1])

    def run(cosine: Tensor, part: slice, block: int) -> Tensor:
        b, n, _ = cosine.shape
        picks = torch.empty(b, k, dtype=torch.int64, device=cosine.device)
        factor = torch.empty(b, k, n, dtype=torch.float32, device=cosine.device)
        square = cosine.diagonal(dim1=1, dim2=2).contiguous()
        _dpp[(b,)](
            cosine, square, relevance[part].contiguous(), factor, picks, n, k,
            ROWS=min(16, 32768 // block), BLOCK=block, num_warps=8 if block <= 1024 else 16,
        )  # fmt: skip
        return picks

    return _in_groups(features, k, run)
