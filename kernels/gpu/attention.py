"""Rows and column sums of an attention map that is never in memory.

Two passes: the logarithm of every row's softmax denominator first, by the running maximum and sum of FlashAttention; then every
probability is ``exp(logit - that)``, and is added up where it belongs. Logits are made twice, in tiles, and never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.gpu.common import add_up, check, dot, one_product, power, precision

SPLIT, MOST_PARTS = 256, 64
"""Keys that one program looks at for the denominators of few rows; longer sequences have more programs, up to a number."""
FILLED = 128
"""Programs that keep a GPU busy: where rows and keys alone give fewer, programs share the heads of an average, too."""


@triton.jit
def _logits(
    q, k, mask, rows, cols, r, n, d, scale, sqr, sqd, skn, skd, smr, smn,
    MASK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Scaled and masked logits ``(R, N)`` of one head; -inf behind the last key. MASK: 0 none, 1 boolean, 2 additive."""
    value = dot(q, rows, r, k, cols, n, d, sqr, sqd, skn, skd, R, N, D, HOW, ONCE) * scale
    inside = (rows < r)[:, None] & (cols < n)[None, :]
    if MASK > 0:
        place = mask + rows.to(tl.int64)[:, None] * smr + cols.to(tl.int64)[None, :] * smn
        if MASK == 1:
            allowed = tl.load(place, mask=inside, other=0) != 0
            value = tl.where(allowed | (rows >= r)[:, None], value, float("-inf"))
        else:
            value = value + tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return tl.where((cols < n)[None, :], value, float("-inf"))


@triton.jit
def _denominators(
    q, k, mask, out, heads, share, r, n, d, part, parts, scale,
    sqb, sqh, sqr, sqd, skb, skh, skn, skd, smb, smh, smr, smn,
    MASK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Write ``out (B, heads, r, parts)``: log of the sum of the exponentials of every row's logits, over parts of the keys."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(1) * R + tl.arange(0, R)
    piece = tl.program_id(2)
    top = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    for lo in range(piece * part, tl.minimum((piece + 1) * part, n), N):
        cols = lo + tl.arange(0, N)
        value = _logits(
            q + b * sqb + h * sqh, k + b * skb + (h // share) * skh, mask + b * smb + h * smh, rows, cols, r, n, d, scale,
            sqr, sqd, skn, skd, smr, smn, MASK, R, N, D, HOW, ONCE,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(value, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that may attend to nothing so far
        total = total * tl.exp(top - base) + tl.sum(tl.exp(value - base[:, None]), 1)
        top = new
    found = tl.where(top == float("-inf"), top, top + tl.log(total))
    tl.store(out + (bh * r + rows) * parts + piece, found, mask=rows < r)


@triton.jit
def _denominator(lse, at, parts, inside, PARTED: tl.constexpr):
    """Logarithms of the denominators of the rows ``at``, from those over parts of the keys."""
    if PARTED:
        top = tl.full(at.shape, float("-inf"), tl.float32)
        for part in range(parts):
            top = tl.maximum(top, tl.load(lse + at * parts + part, mask=inside, other=0.0))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros(at.shape, tl.float32)
        for part in range(parts):
            total += tl.exp(tl.load(lse + at * parts + part, mask=inside, other=0.0) - base)
        return tl.where(top == float("-inf"), top, top + tl.log(total))
    else:
        return tl.load(lse + at, mask=inside, other=0.0)


@triton.jit
def _rows(
    q, k, mask, lse, parts, out, heads, many, over, share, r, n, d, scale,
    sqb, sqh, sqr, sqd, skb, skh, skn, skd, smb, smh, smr, smn,
    SOFTMAX: tl.constexpr, PARTED: tl.constexpr,
    MASK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Write ``out (B, heads / many, r, n)``: probabilities (or logits) summed over ``many`` heads, divided by ``over``."""
    pid = tl.program_id(0).to(tl.int64)
    groups = heads // many
    b, group = pid // groups, pid % groups
    rows = tl.program_id(1) * R + tl.arange(0, R)
    cols = tl.program_id(2) * N + tl.arange(0, N)
    total = tl.zeros((R, N), tl.float32)
    for i in range(0, many):
        h = group * many + i
        value = _logits(
            q + b * sqb + h * sqh, k + b * skb + (h // share) * skh, mask + b * smb + h * smh, rows, cols, r, n, d, scale,
            sqr, sqd, skn, skd, smr, smn, MASK, R, N, D, HOW, ONCE,
        )  # fmt: skip
        if SOFTMAX:
            value = tl.exp(value - _denominator(lse, (b * heads + h) * r + rows, parts, rows < r, PARTED)[:, None])
        total += value
    place = out + (pid * r + rows)[:, None] * n + cols[None, :]
    tl.store(place, total / over, mask=(rows < r)[:, None] & (cols < n)[None, :])


@triton.jit
def _columns(
    q, k, mask, lse, parts, weight, out, heads, share, r, n, d, scale,
    sqb, sqh, sqr, sqd, skb, skh, skn, skd, smb, smh, smr, smn, swb, swr,
    WEIGHTED: tl.constexpr, PARTED: tl.constexpr,
    MASK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HOW: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Write ``out (B, heads, n)``: sums over the rows of the probabilities, times the rows' weights."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    cols = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for lo in range(0, r, R):
        rows = lo + tl.arange(0, R)
        value = _logits(
            q + b * sqb + h * sqh, k + b * skb + (h // share) * skh, mask + b * smb + h * smh, rows, cols, r, n, d, scale,
            sqr, sqd, skn, skd, smr, smn, MASK, R, N, D, HOW, ONCE,
        )  # fmt: skip
        value = tl.exp(value - _denominator(lse, bh * r + rows, parts, rows < r, PARTED)[:, None])
        if WEIGHTED:
            factor = tl.load(weight + b * swb + rows * swr, mask=rows < r, other=0.0).to(tl.float32)
            value = tl.where((factor > 0)[:, None], value, 0.0) * factor[:, None]  # rows that see nothing are NaN, and weigh 0
        total += tl.sum(tl.where((rows < r)[:, None], value, 0.0), 0)
    tl.store(out + bh * n + cols, total, mask=cols < n)


class _Call:
    """Arguments that all three kernels share."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None) -> None:
        (self.b, self.h, self.r, d), (kv, self.n) = query.shape, key.shape[1:3]
        check(query, key, mask, tokens=max(self.n, self.r))
        self.query, self.key = query, key
        kind, full = 0, query
        strides = (0, 0, 0, 0)
        if mask is not None:
            kind = 1 if mask.dtype == torch.bool else 2
            full = mask.expand(self.b, self.h, self.r, self.n)
            strides = full.stride()
            full = full.view(torch.uint8) if kind == 1 else full
        self.mask, self.sizes = full, (self.h // kv, self.r, self.n, d)
        self.scale = d**-0.5 if scaling is None else float(scaling)
        self.strides = (*query.stride(), *key.stride(), *strides)
        how = precision(query, key)
        keys, depth = (64, power(d, 16, 128)) if one_product(how) else (32, power(d, 16, 32))
        self.tile = {"MASK": kind, "R": power(self.r, 16, 64), "N": keys, "D": depth, "HOW": how, "ONCE": d <= depth}

    def denominators(self) -> Tensor:
        """Logarithms of the softmax denominators over parts of the keys, ``(B, H, R, parts)``."""
        part = self.n
        if self.r <= 64:
            keys = self.tile["N"]
            part = triton.cdiv(max(SPLIT, triton.cdiv(self.n, MOST_PARTS)), keys) * keys  # (parts are whole tiles)
        parts = triton.cdiv(self.n, part)
        out = torch.empty(self.b, self.h, self.r, parts, dtype=torch.float32, device=self.key.device)
        _denominators[(self.b * self.h, triton.cdiv(self.r, self.tile["R"]), parts)](
            self.query, self.key, self.mask, out, self.h, *self.sizes, part, parts, self.scale, *self.strides, **self.tile
        )
        return out


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "mean",
    lse: Tensor | None = None,
) -> Tensor:
    """:func:`vtc.kernels.attention_rows`."""
    call = _Call(query, key, scaling, None if reduce == "logits" else mask)
    row_tiles, key_tiles = triton.cdiv(call.r, call.tile["R"]), triton.cdiv(call.n, call.tile["N"])
    groups = call.h
    if reduce == "mean":  # as few as keep the GPU busy
        groups = next(
            g for g in range(1, call.h + 1) if call.h % g == 0 and (g * row_tiles * key_tiles >= FILLED or g == call.h)
        )
    over = call.h if reduce == "mean" else 1
    softmax = reduce != "logits"
    out = torch.empty(call.b, groups, call.r, call.n, dtype=torch.float32, device=key.device)
    given = out
    if softmax:
        given = call.denominators() if lse is None else lse.float().contiguous()[..., None]
    _rows[(call.b * groups, row_tiles, key_tiles)](
        query, key, call.mask, given, given.shape[-1], out, call.h, call.h // groups, over if groups == 1 else 1,
        *call.sizes, call.scale, *call.strides, SOFTMAX=softmax, PARTED=softmax and given.shape[-1] > 1, **call.tile,
    )  # fmt: skip
    if reduce != "mean":
        return out
    return out[:, 0] if groups == 1 else add_up(out, over)


def attention_colsum(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    block: int = 0,
) -> Tensor:
    """:func:`vtc.kernels.attention_colsum`; ``block`` means nothing here."""
    check(weight, tokens=query.shape[2])
    call = _Call(query, key, scaling, mask)
    lse = call.denominators()
    out = torch.empty(call.b, call.h, call.n, dtype=torch.float32, device=key.device)
    given, steps = (query, (0, 0)) if weight is None else (weight, weight.stride())
    warps = 4 if call.tile["ONCE"] or one_product(call.tile["HOW"]) else 8  # with 4, Triton 3.8 spills registers on an A100
    _columns[(call.b * call.h, triton.cdiv(call.n, call.tile["N"]))](
        query, key, call.mask, lse, lse.shape[-1], given, out, call.h, *call.sizes, call.scale, *call.strides, *steps,
        WEIGHTED=weight is not None, PARTED=lse.shape[-1] > 1, num_warps=warps, **call.tile,
    )  # fmt: skip
    return add_up(out, call.h)
