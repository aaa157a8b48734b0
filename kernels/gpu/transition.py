"""How much a module changes each token: lengths and cosine of two states in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.gpu.common import check, power


@triton.jit
def _transition(x, y, grown, turned, s, d, sxb, sxs, sxd, syb, sys, syd, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``grown`` and ``turned (B, s)``: the ratio of the lengths of both states, and ``exp(1 - cos)``."""
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
    tl.store(turned + b * s + rows, tl.exp(1 - cosine), mask=rows < s)


def transition_score(before: Tensor, after: Tensor, valid: Tensor | None = None, *, shared: bool = False) -> Tensor:
    """:func:`vtc.kernels.compact.transition_score`."""
    b, s, d = before.shape
    check(before, after, tokens=s)
    grown, turned = torch.empty(2, b, s, dtype=torch.float32, device=before.device).unbind()
    _transition[(b, triton.cdiv(s, 4))](
        before, after, grown, turned, s, d, *before.stride(), *after.stride(), ROWS=4, BLOCK=power(d, 16, 512)
    )
    if valid is not None:
        turned = turned * valid
    return grown * turned / (turned.sum() if shared else turned.sum(1, keepdim=True))
