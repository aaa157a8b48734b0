"""Sums and means of tokens by group, without atomics: tokens are sorted by group, and one program adds up one group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.gpu.common import check, power


@triton.jit
def _segments(
    x, order, start, weight, out, n, groups, d, sxb, sxn, sxd, swb, swn,
    WEIGHTED: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``out (B, groups, d)``: weighted sum or mean of the rows of ``x`` listed in ``order[start[g] : start[g + 1]]``."""
    pid = tl.program_id(0).to(tl.int64)
    b, g = pid // groups, pid % groups
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lo = tl.load(start + b * (groups + 1) + g).to(tl.int32)
    hi = tl.load(start + b * (groups + 1) + g + 1).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    size = 0.0
    for first in range(lo, hi, ROWS):
        place = first + tl.arange(0, ROWS)
        token = tl.load(order + b * n + place, mask=place < hi, other=0)
        part = (place < hi).to(tl.float32)
        if WEIGHTED:
            part = tl.load(weight + b * swb + token * swn, mask=place < hi, other=0.0).to(tl.float32)
        at = x + b * sxb + token[:, None] * sxn + cols[None, :] * sxd
        value = tl.load(at, mask=(place < hi)[:, None] & (cols < d)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * part[:, None], 0)
        size += tl.sum(part, 0)
    if MEAN:
        total = total / tl.maximum(size, 1.1754943508222875e-38)
    tl.store(out + pid * d + cols, total.to(out.dtype.element_ty), mask=cols < d)


def by_group(owner: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by group ``(B, N)``, in order within a group, and where each group starts, ``(B, groups + 1)``."""
    ascending = torch.sort(owner, dim=1, stable=True)
    ends = torch.arange(groups + 1, device=owner.device).expand(len(owner), -1).contiguous()
    return ascending.indices, torch.searchsorted(ascending.values, ends)


def segment_sum(
    x: Tensor,
    order: Tensor,
    start: Tensor,
    weight: Tensor | None = None,
    *,
    mean: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum (or mean) of the rows of ``x (B, N, D)`` by group, ``(B, groups, D)``; see :func:`by_group`."""
    b, n, d = x.shape
    groups = start.shape[1] - 1
    out = torch.empty(b, groups, d, dtype=x.dtype if dtype is None else dtype, device=x.device)
    if out.numel():
        block = power(d, 16, 256)
        w = x[..., 0] if weight is None else weight
        _segments[(b * groups, triton.cdiv(d, block))](
            x, order, start, w, out, n, groups, d, *x.stride(), *w.stride(),
            WEIGHTED=weight is not None, MEAN=mean, ROWS=16, BLOCK=block,
        )  # fmt: skip
    return out


def merge_scatter(features: Tensor, owner: Tensor, groups: int, *, weight: Tensor | None = None, mean: bool = True) -> Tensor:
    """:func:`vtc.kernels.merge_scatter`."""
    check(features, weight, tokens=features.shape[1])
    order, start = by_group(owner, groups)
    return segment_sum(features, order, start, weight, mean=mean)
