"""How much a module changes each token: lengths and cosine of two states in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.gpu.common import check, strip


@triton.jit
def _transition(
    x, y, valid, grown, turned, s, d, sxb, sxs, sxd, syb, sys, syd, svb, svs,
    VALID: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``grown`` and ``turned (B, s)``: the ratio of the lengths of both states, and ``exp(1 - cos)``, 0 on padding."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    left = x + b * sxb + rows.to(tl.int64)[:, None] * sxs
    right = y + b * syb + rows.to(tl.int64)[:, None] * sys
    xx = tl.zeros((ROWS,), tl.float32)
    yy = tl.zeros((ROWS,), tl.float32)
    xy = tl.zeros((ROWS,), tl.float32)
    for lo in range(0, d, BLOCK):
        cols = lo + tl.arange(0, BLOCK)
        inside = (rows < s)[:, None] & (cols < d)[None, :]
        u = tl.load(left + cols[None, :] * sxd, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(right + cols[None, :] * syd, mask=inside, other=0.0).to(tl.float32)
        xx += tl.sum(u * u, 1)
        yy += tl.sum(v * v, 1)
        xy += tl.sum(u * v, 1)
    nx = tl.sqrt(xx)
    ny = tl.sqrt(yy)
    cosine = xy / (tl.maximum(nx, 1e-8) * tl.maximum(ny, 1e-8))
    ratio = tl.where(nx > 0, ny / tl.where(nx > 0, nx, 1.0), 0.0)
    tl.store(grown + b * s + rows, ratio, mask=rows < s)
    change = tl.exp(1 - cosine)
    if VALID:
        change *= tl.load(valid + b * svb + rows * svs, mask=rows < s, other=0).to(tl.float32)
    tl.store(turned + b * s + rows, change, mask=rows < s)


@triton.jit
def _shares(grown, turned, out, s, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``out (B, s)``: ``grown`` times the share of ``turned`` in its sum over the sequence, or (SHARED) the batch.

    Every program adds up all of it, in the same order.
    """
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    whole = turned if SHARED else turned + b * s
    many = s * tl.num_programs(0) if SHARED else s
    total = tl.zeros((BLOCK,), tl.float32)
    for lo in range(0, many, BLOCK):
        total += tl.load(whole + lo + at, mask=lo + at < many, other=0.0)
    mine = tl.program_id(1) * BLOCK + at
    value = tl.load(grown + b * s + mine, mask=mine < s, other=0.0) * tl.load(turned + b * s + mine, mask=mine < s, other=0.0)
    tl.store(out + b * s + mine, value / tl.sum(total, 0), mask=mine < s)


def transition_score(before: Tensor, after: Tensor, valid: Tensor | None = None, *, shared: bool = False) -> Tensor:
    """:func:`vtc.kernels.transition_score`."""
    b, s, d = before.shape
    check(before, after, tokens=s)
    grown, turned = torch.empty(2, b, s, dtype=torch.float32, device=before.device).unbind()
    out = torch.empty(b, s, dtype=torch.float32, device=before.device)
    flags, steps = before, (0, 0)
    if valid is not None:
        flags, steps = valid.view(torch.uint8) if valid.dtype == torch.bool else valid, valid.stride()
    rows, block = strip(d)
    _transition[(b, triton.cdiv(s, rows))](
        before, after, flags, grown, turned, s, d, *before.stride(), *after.stride(), *steps,
        VALID=valid is not None, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    _shares[(b, triton.cdiv(s, 1024))](grown, turned, out, s, SHARED=shared, BLOCK=1024)
    return out
