"""Greedy subsets without a host synchronisation: one program per image that makes all picks, or one launch per pick.

A pick depends on the one before, so the steps cannot run side by side. With the cosines of all pairs at hand (made once, on tensor
cores) a step reads one row of N numbers, which is little enough for one program, and no other one has to hear of the pick. They
take ``4 N^2`` bytes per image: this is for images whose cosines fit :data:`WORKSPACE`; batches are done in groups that fit it.

Above that every pick is a launch of its own, over blocks of tokens. All programs first find the pick among the blocks' best of the
launch before, then bring their own block up to date with the pick's cosines, which they make on the spot, and note its best.
Memory is O(N) (:func:`greedy_dpp`: O(N k)). A launch writes no place that another program of it reads, whence two sets of notes.

Which of the two is faster on an H100 depends on the picks. All cosines cost ``2 N^2 D`` operations at some 300 TFLOP/s, and then 2
us per pick. A launch per pick reads ``2 N D`` bytes at 3 TB/s (some 5 out of L2, below 50 MB), after 5 us, and takes 10 us of
Python. At the widths of language models the launches win below about ``N / 70`` picks; reducers keep ``N / 20`` and more. So
memory alone decides: N = 8,192. The steps of :func:`greedy_dpp` also read all earlier rows of the Cholesky factor, for which one
program has some 110 GB/s: at N = 2,880 and 160 picks 8 us per step on average, and rising with N. Above :data:`ALONE` its picks
are launches, with all cosines where they fit. These are estimates from the data sheet, not measurements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.kernels.dispatch import Unsupported
from vtc.kernels.gpu.common import check, inverse_lengths, power, row_squares
from vtc.kernels.gpu.similarity import cosines

WORKSPACE = 2**28
"""Most bytes of cosines held at a time: 8,192 tokens of one image."""
ALONE = 2048
"""Most tokens of which one program reads the Cholesky factor."""
ROWS = 32
"""Tokens per program of a step: more would leave an H100 idle at 8,192 tokens, fewer would make more notes for all to read."""
SLIGHT = tl.constexpr(8 * 2.0**-23)
"""Share of a token's gain at the start that may be rounding of one that is really zero."""


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
        pick = _within(pick, n)
        tl.store(picks + b * k + step, pick)
        row = tl.load(cosine + pick * n + at, mask=at < n, other=0.0)
        free = tl.where(at == pick, 0, free)
        if SUM:
            value = value - row
        else:
            value = tl.minimum(value, 1 - row)
        pick = tl.argmax(tl.where(free > 0, value * heavy, float("-inf")), 0).to(tl.int64)


@triton.jit
def _within(pick, n):
    """NaN among the features must not lead out of bounds."""
    return tl.minimum(tl.maximum(pick, 0), n - 1)


@triton.jit
def _dpp(cosine, square, weight, factor, picks, n, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``picks (B, k)`` of the guarded greedy MAP; ``factor (B, k, n)`` is scratch for the rows of the Cholesky factor.

    ``square (B, n)`` is the diagonal of the matrix of cosines. A pick that adds nothing has a row of zeros.
    """
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    cosine += b * n * n
    factor += b * k * n
    weight += b * n
    square += b * n
    heavy = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
    gain = tl.where(at < n, heavy * tl.load(square + at, mask=at < n, other=0.0) * heavy, float("-inf"))
    for step in range(k):
        own, pick = tl.max(gain, 0, return_indices=True)
        pick = _within(pick.to(tl.int64), n)
        mine = tl.load(weight + pick).to(tl.float32)
        least = SLIGHT * (mine * tl.load(square + pick) * mine)
        if own <= least:  # nothing adds anything: by weight
            free = (at < n) & (gain > float("-inf"))
            pick = _within(tl.argmax(tl.where(free, heavy, float("-inf")), 0).to(tl.int64), n)
            own = tl.sum(tl.where(at == pick, gain, 0.0), 0)
            mine = tl.load(weight + pick).to(tl.float32)
            least = SLIGHT * (mine * tl.load(square + pick) * mine)
        tl.store(picks + b * k + step, pick)
        row = heavy * mine * tl.load(cosine + pick * n + at, mask=at < n, other=0.0)
        for lo in range(0, step, ROWS):
            s = lo + tl.arange(0, ROWS)
            inside = (s < step)[:, None] & (at < n)[None, :]
            known = tl.load(factor + s.to(tl.int64)[:, None] * n + at[None, :], mask=inside, other=0.0)
            here = tl.load(factor + s.to(tl.int64) * n + pick, mask=s < step, other=0.0)
            row -= tl.sum(known * here[:, None], 0)
        row = tl.where(own > least, row / tl.sqrt(own), 0.0)
        gain = tl.where(at == pick, float("-inf"), gain - row * row)
        tl.store(factor + step * n + at, row, mask=at < n)
        tl.debug_barrier()  # rows are read by other threads than those that wrote them


@triton.jit
def _products(x, rows, n, pick, d, sxn, sxd, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Products ``(ROWS,)`` of some rows of ``x (n, d)`` with the row ``pick``; equal rows give equal bits."""
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    place = x + rows.to(tl.int64)[:, None] * sxn
    for lo in tl.range(0, d, WIDTH, num_stages=3):
        cols = lo + tl.arange(0, WIDTH)
        own = tl.load(x + pick * sxn + cols * sxd, mask=cols < d, other=0.0).to(tl.float32)
        some = tl.load(place + cols[None, :] * sxd, mask=(rows < n)[:, None] & (cols < d)[None, :], other=0.0)
        total += some.to(tl.float32) * own[None, :]
    return tl.sum(total, 1)


@triton.jit
def _best_note(best, blocks, BLOCKS: tl.constexpr):
    """Number of the block with the best, the first among equals, and that best."""
    at = tl.arange(0, BLOCKS)
    top, block = tl.max(tl.load(best + at, mask=at < blocks, other=float("-inf")), 0, return_indices=True)
    return _within(block, blocks), top


@triton.jit(do_not_specialize=["step"])
def _spread_step(
    x, scale, first, weight, value, best, where, picks, step, n, d, k, sxb, sxn, sxd,
    SUM: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Make one pick of :func:`_spread` and take note of it.

    ``value (B, n)``: what :func:`_spread` calls so, -inf for chosen tokens. ``best``, ``where (2, B, blocks)``: notes of even and
    of odd steps.
    """
    b, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    notes = tl.num_programs(0) * blocks
    before, after = ((step + 1) & 1) * notes + b * blocks, (step & 1) * notes + b * blocks
    if step == 0:
        pick = tl.load(first + b)
    else:
        winner, _ = _best_note(best + before, blocks, BLOCKS)
        pick = tl.load(where + before + winner)
    pick = _within(pick, n)
    if block == 0:
        tl.store(picks + b * k + step, pick)
    if step + 1 < k:
        lane = tl.arange(0, ROWS)
        rows = block * ROWS + lane
        inside = rows < n
        cosine = _products(x + b * sxb, rows, n, pick, d, sxn, sxd, ROWS, WIDTH)
        cosine = cosine * tl.load(scale + b * n + rows, mask=inside, other=0.0) * tl.load(scale + b * n + pick)
        now = tl.load(value + b * n + rows, mask=rows < tl.where(step > 0, n, 0), other=0.0 if SUM else float("inf"))
        now = now - cosine if SUM else tl.minimum(now, 1 - cosine)
        now = tl.where(rows == pick, float("-inf"), now)
        tl.store(value + b * n + rows, now, mask=inside)
        score = now
        if WEIGHTED:
            score = now * tl.load(weight + b * n + rows, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(inside & (now > float("-inf")), score, float("-inf"))
        top, at = tl.max(score, 0, return_indices=True)
        tl.store(best + after + block, top)
        tl.store(where + after + block, (block * ROWS + at).to(tl.int64))


@triton.jit(do_not_specialize=["step"])
def _dpp_step(
    x, scale, square, weight, factor, gain, best, where, picks, step, n, d, k, sxb, sxn, sxd,
    START: tl.constexpr, MATRIX: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Make one pick of :func:`_dpp` and take note of it, or (START) only take notes.

    ``x``: features, or (MATRIX) all cosines. ``factor (B, n, k)``. ``gain (B, n)``: -inf for chosen tokens. Notes are the best gain
    and its token, the heaviest free token's weight and that token, and its gain: ``best (2, 3, B, blocks)``, ``where (2, 2, ...)``.
    """
    b, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    notes = tl.num_programs(0) * blocks
    lane = tl.arange(0, ROWS)
    rows = block * ROWS + lane
    inside = rows < n
    heavy = tl.load(weight + b * n + rows, mask=inside, other=0.0).to(tl.float32)
    if START:
        now = heavy * tl.load(square + b * n + rows, mask=inside, other=0.0) * heavy
        now = tl.where(inside, now, float("-inf"))
    else:
        values = best + ((step + 1) & 1) * 3 * notes + b * blocks
        tokens = where + ((step + 1) & 1) * 2 * notes + b * blocks
        winner, own = _best_note(values, blocks, BLOCKS)
        pick = _within(tl.load(tokens + winner), n)
        mine = tl.load(weight + b * n + pick).to(tl.float32)
        least = SLIGHT * (mine * tl.load(square + b * n + pick) * mine)
        if own <= least:  # nothing adds anything: by weight
            winner, _ = _best_note(values + notes, blocks, BLOCKS)
            pick = _within(tl.load(tokens + notes + winner), n)
            own = tl.load(values + 2 * notes + winner)
            mine = tl.load(weight + b * n + pick).to(tl.float32)
            least = SLIGHT * (mine * tl.load(square + b * n + pick) * mine)
        if block == 0:
            tl.store(picks + b * k + step, pick)
        if MATRIX:
            cosine = tl.load(x + b * sxb + pick * sxn + rows * sxd, mask=inside, other=0.0)
        else:
            cosine = _products(x + b * sxb, rows, n, pick, d, sxn, sxd, ROWS, WIDTH)
            cosine = cosine * tl.load(scale + b * n + rows, mask=inside, other=0.0) * tl.load(scale + b * n + pick)
        row = heavy * mine * cosine - _products(factor + b * n * k, rows, n, pick, step, k, 1, ROWS, WIDTH)
        row = tl.where(own > least, row / tl.sqrt(own), 0.0)
        tl.store(factor + (b * n + rows) * k + step, row, mask=inside)
        now = tl.load(gain + b * n + rows, mask=inside, other=float("-inf"))
        now = tl.where(rows == pick, float("-inf"), now - row * row)
    tl.store(gain + b * n + rows, now, mask=inside)
    top, at = tl.max(now, 0, return_indices=True)
    heaviest, other = tl.max(tl.where(now > float("-inf"), heavy, float("-inf")), 0, return_indices=True)
    values = best + (step & 1) * 3 * notes + b * blocks + block
    tokens = where + (step & 1) * 2 * notes + b * blocks + block
    tl.store(values, top)
    tl.store(values + notes, heaviest)
    tl.store(values + 2 * notes, tl.sum(tl.where(lane == other, now, 0.0), 0))
    tl.store(tokens, (block * ROWS + at).to(tl.int64))
    tl.store(tokens + notes, (block * ROWS + other).to(tl.int64))


def _parts(features: Tensor, k: int, each: int) -> Iterator[slice]:
    """Groups of images of which every one takes ``each`` bytes, and all together no more than :data:`WORKSPACE`, but for one."""
    b, n, _ = features.shape
    check(features, tokens=n)
    if not 1 <= k <= n:
        raise Unsupported(f"{k} of {n} tokens")
    group = max(1, WORKSPACE // each)
    return (slice(lo, lo + group) for lo in range(0, b, group))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def _sizes(n: int, d: int) -> dict[str, int]:
    """Block sizes of a step."""
    return {"BLOCKS": power(triton.cdiv(n, ROWS), 1), "ROWS": ROWS, "WIDTH": power(d, 16, 128), "num_warps": 8}


def _pick(features: Tensor, k: int, first: Tensor, weight: Tensor | None, add_up: bool) -> Tensor:
    n = features.shape[1]
    whole = 4 * n * n <= WORKSPACE
    found = []
    for part in _parts(features, k, 4 * n * n if whole else 4 * n):
        heavy = None if weight is None else weight[part].contiguous()
        make = _all_picks if whole else _pick_by_pick
        found.append(make(features[part], k, first[part].contiguous(), heavy, add_up))
    return _joined(found)


def _all_picks(x: Tensor, k: int, first: Tensor, weight: Tensor | None, add_up: bool) -> Tensor:
    b, n, _ = x.shape
    picks = torch.empty(b, k, dtype=torch.int64, device=x.device)
    block = power(n)
    _spread[(b,)](
        cosines(x), first, first if weight is None else weight, picks, n, k,
        SUM=add_up, WEIGHTED=weight is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return picks


def _pick_by_pick(x: Tensor, k: int, first: Tensor, weight: Tensor | None, add_up: bool) -> Tensor:
    b, n, d = x.shape
    blocks = triton.cdiv(n, ROWS)
    picks = torch.empty(b, k, dtype=torch.int64, device=x.device)
    value = torch.empty(b, n, dtype=torch.float32, device=x.device)
    best = torch.empty(2, b, blocks, dtype=torch.float32, device=x.device)
    where = torch.empty(2, b, blocks, dtype=torch.int64, device=x.device)
    scale, heavy, start = inverse_lengths(x), first, first
    if weight is not None:
        heavy, start = weight, weight.argmax(1)
    launch, sizes = _spread_step[(b, blocks)], _sizes(n, d)
    for step in range(k):
        launch(
            x, scale, start, heavy, value, best, where, picks, step, n, d, k, *x.stride(),
            SUM=add_up, WEIGHTED=weight is not None, **sizes,
        )  # fmt: skip
    return picks


def farthest_point(features: Tensor, k: int, first: Tensor) -> Tensor:
    """:func:`vtc.kernels.farthest_point`."""
    return _pick(features, k, first, None, add_up=False)


def max_sum(features: Tensor, k: int, first: Tensor) -> Tensor:
    """:func:`vtc.kernels.max_sum`."""
    return _pick(features, k, first, None, add_up=True)


def farthest_point_weighted(features: Tensor, weight: Tensor, k: int) -> Tensor:
    """:func:`vtc.kernels.farthest_point_weighted`."""
    check(weight, tokens=weight.shape[1])
    return _pick(features, k, weight, weight, add_up=False)


def greedy_dpp(features: Tensor, relevance: Tensor, k: int, *, guard: bool = True) -> Tensor:
    """:func:`vtc.kernels.greedy_dpp`."""
    if not guard:
        raise Unsupported("guard=False, whose result past the kernel's rank depends on how the twin rounds")
    check(relevance, tokens=relevance.shape[1])
    n = features.shape[1]
    whole = 4 * n * n <= WORKSPACE
    found = []
    for part in _parts(features, k, 4 * n * (k + n if whole else k)):
        x, weight = features[part], relevance[part].contiguous()
        found.append(_dpp_by_one(x, weight, k) if whole and n <= ALONE else _dpp_by_step(x, weight, k, whole))
    return _joined(found)


def _dpp_by_one(x: Tensor, weight: Tensor, k: int) -> Tensor:
    b, n, _ = x.shape
    cosine = cosines(x)
    picks = torch.empty(b, k, dtype=torch.int64, device=x.device)
    factor = torch.empty(b, k, n, dtype=torch.float32, device=x.device)
    square = cosine.diagonal(dim1=1, dim2=2).contiguous()
    block = power(n)
    _dpp[(b,)](
        cosine, square, weight, factor, picks, n, k, ROWS=16, BLOCK=block, num_warps=8 if block <= 1024 else 16
    )  # fmt: skip
    return picks


def _dpp_by_step(x: Tensor, weight: Tensor, k: int, matrix: bool) -> Tensor:
    b, n, d = x.shape
    blocks = triton.cdiv(n, ROWS)
    picks = torch.empty(b, k, dtype=torch.int64, device=x.device)
    factor = torch.empty(b, n, k, dtype=torch.float32, device=x.device)
    gain = torch.empty(b, n, dtype=torch.float32, device=x.device)
    best = torch.empty(2, 3, b, blocks, dtype=torch.float32, device=x.device)
    where = torch.empty(2, 2, b, blocks, dtype=torch.int64, device=x.device)
    if matrix:
        x = scale = cosines(x)
        square = x.diagonal(dim1=1, dim2=2).contiguous()
    else:
        scale = inverse_lengths(x)
        square = row_squares(x) * scale * scale
    launch, sizes = _dpp_step[(b, blocks)], _sizes(n, max(d, k))
    for step in range(-1, k):
        launch(
            x, scale, square, weight, factor, gain, best, where, picks, step, n, d, k, *x.stride(),
            START=step < 0, MATRIX=matrix, **sizes,
        )  # fmt: skip
    return picks
