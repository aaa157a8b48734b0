"""Top-k to sorted indices, and the gather of what belongs to the chosen tokens.

The k-th largest score is found bit by bit: scores become integers of the same order, and 32 counts of "how many are at least this"
fix its bits from the highest to the lowest. One more pass writes the indices in order. No sort, one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.dispatch import Unsupported
from vtc.kernels.gpu.common import check, power


@triton.jit
def _ordered(scores, at, n, stride):
    """Scores as uint32 of the same order (both zeros equal); 0, below all of them, behind the end."""
    x = tl.load(scores + at.to(tl.int64) * stride, mask=at < n, other=0.0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    unsigned = bits.to(tl.uint32, bitcast=True) ^ (tl.full((), 1, tl.uint32) << 31)
    return tl.where(at < n, unsigned, tl.zeros_like(unsigned))


@triton.jit
def _topk(
    scores, counts, out, n, k, ssb, ssn, COUNTED: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Write ``out (B, k)``: indices of the largest scores, ascending, -1 in front where a row keeps fewer than ``k``."""
    b = tl.program_id(0).to(tl.int64)
    scores += b * ssb
    out += b * k
    lane = tl.arange(0, BLOCK)
    keep = k
    if COUNTED:
        keep = tl.load(counts + b).to(tl.int32)
        for lo in range(0, k, BLOCK):
            tl.store(out + lo + lane, tl.full((BLOCK,), -1, tl.int64), mask=lo + lane < k - keep)
    whole = _ordered(scores, lane, n, ssn)  # all there is, if ONE
    one = tl.full((), 1, tl.uint32)
    limit = tl.full((), 0, tl.uint32)  # largest number that at least `keep` scores reach
    for i in range(32):
        trial = limit | (one << (31 - i))
        reach = 0
        if ONE:
            reach += tl.sum((whole >= trial).to(tl.int32), 0)
        else:
            for lo in range(0, n, BLOCK):
                reach += tl.sum((_ordered(scores, lo + lane, n, ssn) >= trial).to(tl.int32), 0)
        limit = tl.where(reach >= keep, trial, limit)
    above = 0
    if ONE:
        above += tl.sum((whole > limit).to(tl.int32), 0)
    else:
        for lo in range(0, n, BLOCK):
            above += tl.sum((_ordered(scores, lo + lane, n, ssn) > limit).to(tl.int32), 0)
    place = k - keep  # where the next index goes
    equal = 0  # scores at the limit seen so far: only the first of them are taken
    for lo in range(0, n, LAST):  # (of 8,192 the running numbers would not fit the registers)
        at = lo + tl.arange(0, LAST)
        key = _ordered(scores, at, n, ssn)
        tie = ((key == limit) & (at < n)).to(tl.int32)
        chosen = (key > limit) | ((tie > 0) & (equal + tl.cumsum(tie, 0) <= keep - above))
        chosen = chosen & (at < n)
        mark = chosen.to(tl.int32)
        tl.store(out + place + tl.cumsum(mark, 0) - 1, at.to(tl.int64), mask=chosen)
        place += tl.sum(mark, 0)
        equal += tl.sum(tie, 0)


@triton.jit
def _gather(x, index, out, outer, k, inner, sxb, sxo, sxn, sxi, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``out (B, outer, k, inner)``: the rows ``index (B, k)`` of ``x (B, outer, n, inner)``, zeros where that is -1."""
    blocks = tl.cdiv(k, ROWS)
    bo = tl.program_id(0).to(tl.int64) // blocks
    b, o = bo // outer, bo % outer
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + b * k + rows, mask=rows < k, other=-1)
    inside = (rows < k)[:, None] & (cols < inner)[None, :]
    source = x + b * sxb + o * sxo + at[:, None] * sxn + cols[None, :].to(tl.int64) * sxi
    value = tl.load(source, mask=inside & (at >= 0)[:, None], other=0)
    tl.store(out + (bo * k + rows)[:, None] * inner + cols[None, :], value, mask=inside)


def _best(scores: Tensor, k: int, count: Tensor | None) -> Tensor:
    b, n = scores.shape
    check(scores, tokens=n)
    if not scores.is_floating_point():
        raise Unsupported("scores that are not floating-point numbers")
    if not 0 <= k <= n:
        raise Unsupported(f"{k} of {n} tokens")
    block = power(n, 16, 8192)
    out = torch.empty(b, k, dtype=torch.int64, device=scores.device)
    if not k:
        return out
    _topk[(b,)](
        scores,
        scores if count is None else count,
        out,
        n,
        k,
        *scores.stride(),
        COUNTED=count is not None,
        ONE=n <= block,
        BLOCK=block,
        LAST=min(block, 4096),
        num_warps=4 if block <= 1024 else 16,
    )
    return out


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """:func:`vtc.kernels.topk_sorted`."""
    return _best(scores, k, None)


def select_compact(
    scores: Tensor, k: int, states: Sequence[Tensor] = (), *, dims: Sequence[int] = (), count: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """:func:`vtc.kernels.select_compact`."""
    index = _best(scores, k, None if count is None else count.contiguous())
    return index, [_gathered(t, index, dim) for t, dim in zip(states, dims or [1] * len(states), strict=True)]


def _gathered(t: Tensor, index: Tensor, dim: int) -> Tensor:
    b, k = index.shape
    x = t.expand(b, *t.shape[1:])
    out = torch.empty(*x.shape[:dim], k, *x.shape[dim + 1 :], dtype=t.dtype, device=t.device)
    if t.dtype == torch.bool:
        x = x.view(torch.uint8)
    outer, inner = x.shape[1:dim].numel(), x.shape[dim + 1 :].numel()
    if not out.numel():
        return out
    x = x.reshape(b, outer, x.shape[dim], inner)  # a view for the usual layouts
    block = power(inner, 16, 1024)
    rows = max(1, 1024 // block)
    into = out.view(torch.uint8) if t.dtype == torch.bool else out
    _gather[(b * outer * triton.cdiv(k, rows), triton.cdiv(inner, block))](
        x, index, into, outer, k, inner, *x.stride(), ROWS=rows, BLOCK=block
    )
    return out
