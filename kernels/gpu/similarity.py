"""Nearest neighbours by cosine or distance without the matrix of all pairs, and tiles of that matrix where one is wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.gpu.common import check, dot, inverse_lengths, precision, row_squares, tile

SPLIT = 8
"""Parts the targets are searched in, if there are many: more programs than rows alone give."""


@triton.jit
def _nearest(
    a, b, scale_a, scale_b, values, indices, m, t, d, part, parts, sab, sam, sad, sbb, sbt, sbd,
    EUCLIDEAN: tl.constexpr, OTHERS: tl.constexpr, M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """Write ``values``, ``indices (B, m, parts)``: the best target of every row of ``a`` within each part of ``b``.

    EUCLIDEAN: by ``2 a.b - |b|^2`` (``scale_b`` holds the squares), otherwise by cosine (both hold inverse lengths).
    OTHERS: a row's own number is left out.
    """
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * M + tl.arange(0, M)
    piece = tl.program_id(2)
    best = tl.full((M,), float("-inf"), tl.float32)
    where = tl.zeros((M,), tl.int32)
    for lo in range(piece * part, tl.minimum((piece + 1) * part, t), T):
        cols = lo + tl.arange(0, T)
        value = dot(a + image * sab, rows, m, b + image * sbb, cols, t, d, sam, sad, sbt, sbd, M, T, D, HOW)
        factor = tl.load(scale_b + image * t + cols, mask=cols < t, other=0.0)
        if EUCLIDEAN:
            value = 2 * value - factor[None, :]
        else:
            value = value * tl.load(scale_a + image * m + rows, mask=rows < m, other=0.0)[:, None] * factor[None, :]
        allowed = (cols < t)[None, :]
        if OTHERS:
            allowed = allowed & (rows[:, None] != cols[None, :])
        value = tl.where(allowed, value, float("-inf"))
        top, at = tl.max(value, 1, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(top > best, lo + at, where)
        best = tl.maximum(best, top)
    place = (image * m + rows) * parts + piece
    tl.store(values + place, best, mask=rows < m)
    tl.store(indices + place, where.to(tl.int64), mask=rows < m)


@triton.jit
def _cosines(
    x, scale, out, n, d, sxb, sxn, sxd, M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr
):  # fmt: skip
    """Write ``out (B, n, n)``: cosines of all pairs of rows of ``x``."""
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * M + tl.arange(0, M)
    cols = tl.program_id(2) * T + tl.arange(0, T)
    value = dot(x + image * sxb, rows, n, x + image * sxb, cols, n, d, sxn, sxd, sxn, sxd, M, T, D, HOW)
    value = value * tl.load(scale + image * n + rows, mask=rows < n, other=0.0)[:, None]
    value = value * tl.load(scale + image * n + cols, mask=cols < n, other=0.0)[None, :]
    at = out + (image * n + rows)[:, None] * n + cols[None, :]
    tl.store(at, value, mask=(rows < n)[:, None] & (cols < n)[None, :])


def _search(a: Tensor, b: Tensor, *, euclidean: bool = False, others: bool = False) -> tuple[Tensor, Tensor]:
    """Value and index of the best target within each part of ``b (B, T, D)`` of every row of ``a (B, M, D)``, ``(B, M, parts)``."""
    (images, m, d), t = a.shape, b.shape[1]
    check(a, b, tokens=max(m, t))
    if euclidean:
        scale_b = row_squares(b)
        scale_a = scale_b
    else:
        scale_a = inverse_lengths(a)
        scale_b = scale_a if a is b else inverse_lengths(b)
    sizes = tile(m, t, precision(a, b))
    part = triton.cdiv(triton.cdiv(t, SPLIT), sizes["T"]) * sizes["T"]
    parts = triton.cdiv(t, part)
    values = torch.empty(images, m, parts, dtype=torch.float32, device=a.device)
    indices = torch.empty(images, m, parts, dtype=torch.int64, device=a.device)
    _nearest[(images, triton.cdiv(m, sizes["M"]), parts)](
        a, b, scale_a, scale_b, values, indices, m, t, d, part, parts, *a.stride(), *b.stride(),
        EUCLIDEAN=euclidean, OTHERS=others, **sizes,
    )  # fmt: skip
    return values, indices


def _first(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Value and index ``(B, M)`` of the best part, the first among equal ones."""
    if values.shape[-1] == 1:
        return values[..., 0], indices[..., 0]
    best, piece = values.max(-1, keepdim=True)
    return best[..., 0], indices.gather(-1, piece)[..., 0]


def cosines(x: Tensor) -> Tensor:
    """Cosines of all pairs of rows of ``x (B, N, D)``, ``(B, N, N)`` float32."""
    b, n, d = x.shape
    out = torch.empty(b, n, n, dtype=torch.float32, device=x.device)
    sizes = tile(n, n, precision(x)) | {"num_warps": 8}  # with 4, Triton 3.8 spills registers on an A100
    _cosines[(b, triton.cdiv(n, sizes["M"]), triton.cdiv(n, sizes["T"]))](
        x, inverse_lengths(x), out, n, d, *x.stride(), **sizes
    )
    return out


def pairwise_top1(source: Tensor, target: Tensor, *, block: int = 0) -> tuple[Tensor, Tensor]:
    """:func:`vtc.kernels.pairwise_top1`; ``block`` means nothing here."""
    if not source.shape[1]:
        empty = source.new_zeros(source.shape[0], 0, dtype=torch.float32)
        return empty, empty.long()
    return _first(*_search(source, target))


def most_isolated(features: Tensor, *, block: int = 0) -> Tensor:
    """:func:`vtc.kernels.most_isolated`; ``block`` means nothing here."""
    return (1 - _search(features, features, others=True)[0].amax(-1)).argmax(1)


def nearest_centre(points: Tensor, centres: Tensor, *, block: int = 0) -> Tensor:
    """:func:`vtc.kernels.nearest_centre`; ``block`` means nothing here."""
    return _first(*_search(points, centres, euclidean=True))[1]
