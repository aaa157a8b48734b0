"""What the Triton ops share: checks, precision of matrix products, block sizes, row lengths."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.dispatch import Unsupported

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TOKENS = 65536
LARGE = 1024
"""Rows on both sides from which products are made in large tiles."""
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(*tensors: Tensor | None, tokens: int) -> None:
    """Raise :class:`Unsupported` unless all floating-point ``tensors`` have a type, and a number of tokens, the kernels serve."""
    for t in tensors:
        if t is not None and t.is_floating_point() and t.dtype not in DTYPES:
            raise Unsupported(f"{t.dtype} is not one of float32, float16 and bfloat16")
    if not 1 <= tokens <= MOST_TOKENS:
        raise Unsupported(f"{tokens} tokens are not within 1..{MOST_TOKENS}")


def precision(*tensors: Tensor) -> str:
    """Return how :func:`dot` multiplies so that products of these tensors' values are as good as float32.

    ``"half"``: values that all are float16, or all bfloat16, go to the tensor cores as they are; their products are exact and are
    added up in float32. All others are widened to float32 and take three TF32 products (AMD has none: plain float32 there).
    Triton's interpreter cannot multiply bfloat16: there it is widened, too, and its products still are exact (``"tf32"``).
    """
    kinds = {t.dtype for t in tensors}
    if len(kinds) == 1 and torch.float32 not in kinds:
        return "tf32" if _INTERPRETED and torch.bfloat16 in kinds else "half"
    return "ieee" if torch.version.hip else "tf32x3"


def one_product(how: str) -> bool:
    """Whether a product takes one pass of the tensor cores; the other ways need more registers, and so smaller tiles."""
    return how in ("half", "tf32")


def tile(m: int, t: int, how: str) -> dict[str, int | str]:
    """Return block sizes of a product of ``m`` with ``t`` rows, as arguments of a kernel; they do not depend on the batch.

    Many rows take large tiles, which read each row less often; few rows small ones, or most of the GPU would have nothing to do.
    """
    large = one_product(how) and min(m, t) >= LARGE
    side = 128 if large else 64
    return {"M": side, "T": side, "D": 64 if one_product(how) else 32, "HOW": how, "num_warps": 8 if large else 4}


def power(n: int, least: int = 16, most: int = MOST_TOKENS) -> int:
    """Return the smallest power of two of at least ``n``, within bounds."""
    return max(least, min(most, triton.next_power_of_2(n)))


def strip(d: int) -> tuple[int, int]:
    """Return rows and columns that a program reads at a time of rows of width ``d``: 16 numbers per thread."""
    block = power(d, 16, 512)
    return 2048 // block, block


@triton.jit
def _row_squares(x, out, n, d, sxb, sxn, sxd, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``out (B, n)``: sum of squares of every row of ``x (B, n, d)``, each row added up in the same order.

    INVERSE: one over its root instead, 1 for zero rows.
    """
    b = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = x + b * sxb + rows.to(tl.int64)[:, None] * sxn
    total = tl.zeros((ROWS,), tl.float32)
    for lo in range(0, d, BLOCK):
        cols = lo + tl.arange(0, BLOCK)
        value = tl.load(at + cols[None, :] * sxd, mask=(rows < n)[:, None] & (cols < d)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
    if INVERSE:
        total = tl.div_rn(1.0, tl.where(total > 0, tl.sqrt_rn(total), 1.0))
    tl.store(out + b * n + rows, total, mask=rows < n)


def row_squares(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Sum of squares of every row of ``x (B, N, D)``, ``(B, N)`` float32; equal rows give equal bits."""
    b, n, d = x.shape
    out = torch.empty(b, n, dtype=torch.float32, device=x.device)
    rows, block = strip(d)
    _row_squares[(b, triton.cdiv(n, rows))](x, out, n, d, *x.stride(), INVERSE=inverse, ROWS=rows, BLOCK=block)
    return out


def inverse_lengths(x: Tensor) -> Tensor:
    """One over the length of every row, ``(B, N)`` float32; 1 for zero rows."""
    return row_squares(x, inverse=True)


@triton.jit
def dot(
    a, rows, m, b, cols, t, d, sam, sad, sbt, sbd,
    M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr, ONCE: tl.constexpr = False,
):  # fmt: skip
    """Products ``(M, T)`` of the rows of ``a`` and ``b`` with the given numbers; HOW: :func:`precision`.

    ONCE: ``d`` is not above D, so that a caller's own loop is the innermost one, which Triton pipelines.
    """
    left = a + rows.to(tl.int64)[:, None] * sam
    right = b + cols.to(tl.int64)[None, :] * sbt
    total = tl.zeros((M, T), tl.float32)
    if ONCE:
        total = _add_products(total, left, rows, m, right, cols, t, 0, d, sad, sbd, D, HOW)
    else:
        for lo in range(0, d, D):
            total = _add_products(total, left, rows, m, right, cols, t, lo, d, sad, sbd, D, HOW)
    return total


@triton.jit
def _add_products(total, left, rows, m, right, cols, t, lo, d, sad, sbd, D: tl.constexpr, HOW: tl.constexpr):
    at = lo + tl.arange(0, D)
    u = tl.load(left + at[None, :] * sad, mask=(rows < m)[:, None] & (at < d)[None, :], other=0.0)
    v = tl.load(right + at[:, None] * sbd, mask=(cols < t)[None, :] & (at < d)[:, None], other=0.0)
    if HOW == "half":
        return tl.dot(u, v, total)
    else:
        return tl.dot(u.to(tl.float32), v.to(tl.float32), total, input_precision=HOW)


@triton.jit
def _added(x, out, many, size, over, MANY: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``out (B, size)``: sums over the middle of ``x (B, many, size)``, divided by ``over``."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for lo in range(0, many, MANY):
        i = lo + tl.arange(0, MANY)
        inside = (i < many)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(x + (b * many + i[:, None]) * size + at[None, :], mask=inside, other=0.0), 0)
    tl.store(out + b * size + at, total / over, mask=at < size)


def add_up(x: Tensor, over: int) -> Tensor:
    """Sum over the second dimension of ``x (B, G, ...)`` float32, over ``over``; torch may add in an order that depends on B."""
    out = torch.empty(len(x), *x.shape[2:], dtype=torch.float32, device=x.device)
    size = out.shape[1:].numel()
    _added[(len(x), triton.cdiv(size, 128))](x, out, x.shape[1], size, over, MANY=16, BLOCK=128)
    return out
