"""What the Triton ops share: checks, precision of matrix products, block sizes, row lengths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.dispatch import Unsupported

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TOKENS = 65536
TILE = {"M": 64, "T": 64, "D": 64}
"""Rows, columns and depth of one product. The same for all types: another tile would round, and break near-ties, differently."""


def check(*tensors: Tensor | None, tokens: int) -> None:
    """Raise :class:`Unsupported` unless all floating-point ``tensors`` have a type, and a number of tokens, the kernels serve."""
    for t in tensors:
        if t is not None and t.is_floating_point() and t.dtype not in DTYPES:
            raise Unsupported(f"{t.dtype} is not one of float32, float16 and bfloat16")
    if not 1 <= tokens <= MOST_TOKENS:
        raise Unsupported(f"{tokens} tokens are not within 1..{MOST_TOKENS}")


def precision(*tensors: Tensor) -> str:
    """Return the input precision of ``tl.dot`` under which products of these tensors' values are as good as float32.

    Kernels load every type as float32. Values that were float16 or bfloat16 fit TF32 without loss, so that their products are exact
    on tensor cores; those of float32 values take three TF32 products (AMD has none: plain float32 there).
    """
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if any(t.dtype == torch.float32 for t in tensors) else "tf32"


def power(n: int, least: int = 16, most: int = MOST_TOKENS) -> int:
    """Return the smallest power of two of at least ``n``, within bounds."""
    return max(least, min(most, triton.next_power_of_2(n)))


@triton.jit
def _row_squares(x, out, n, d, sxb, sxn, sxd, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``out (B, n)``: sum of squares of every row of ``x (B, n, d)``, each row added up in the same order."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = x + b * sxb + rows.to(tl.int64)[:, None] * sxn
    total = tl.zeros((ROWS,), tl.float32)
    for lo in range(0, d, BLOCK):
        cols = lo + tl.arange(0, BLOCK)
        value = tl.load(at + cols[None, :] * sxd, mask=(rows < n)[:, None] & (cols < d)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
    tl.store(out + b * n + rows, total, mask=rows < n)


def row_squares(x: Tensor) -> Tensor:
    """Sum of squares of every row of ``x (B, N, D)``, ``(B, N)`` float32; equal rows give equal bits."""
    b, n, d = x.shape
    out = torch.empty(b, n, dtype=torch.float32, device=x.device)
    _row_squares[(b, triton.cdiv(n, 4))](x, out, n, d, *x.stride(), ROWS=4, BLOCK=power(d, 16, 512))
    return out


def inverse_lengths(x: Tensor) -> Tensor:
    """One over the length of every row, ``(B, N)`` float32; 1 for zero rows."""
    length = row_squares(x).sqrt()
    return 1 / torch.where(length > 0, length, 1.0)


@triton.jit
def dot(a, rows, m, b, cols, t, d, sam, sad, sbt, sbd, M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr):
    """Products ``(M, T)`` of the rows of ``a`` and ``b`` with the given numbers."""
    left = a + rows.to(tl.int64)[:, None] * sam
    right = b + cols.to(tl.int64)[None, :] * sbt
    total = tl.zeros((M, T), tl.float32)
    for lo in range(0, d, D):
        at = lo + tl.arange(0, D)
        u = tl.load(left + at[None, :] * sad, mask=(rows < m)[:, None] & (at < d)[None, :], other=0.0).to(tl.float32)
        v = tl.load(right + at[:, None] * sbd, mask=(cols < t)[None, :] & (at < d)[:, None], other=0.0).to(tl.float32)
        total = tl.dot(u, v, total, input_precision=HOW)
    return total
