"""Rows, column sums and walks of the softmax of ``Q K^T``, without the ``N x N`` matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.kernels.ref.linear import dot, widened

_SMALL = 1 << 14
"""Entries of a head's attention below which all heads are better done at once than one after the other."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "mean",
    lse: Tensor | None = None,
) -> Tensor:
    """Softmax rows of ``Q K^T`` for a few query rows, without the ``N x N`` matrix.

    Parameters
    ----------
    query : Tensor
        ``(B, H, R, d)``: only the rows wanted.
    key : Tensor
        ``(B, Hkv, N, d)``; ``H`` is a multiple of ``Hkv`` (grouped-query attention; keys are not repeated in memory).
    scaling : float or None
        Factor on the logits; default ``d ** -0.5``.
    mask : Tensor or None
        Boolean (True = may attend) or additive, broadcastable to ``(B, H, R, N)``.
    reduce : {"mean", "none", "logits"}
        ``"mean"``: average over heads, ``(B, R, N)``; ``"none"``: ``(B, H, R, N)``; ``"logits"``: scaled logits before mask and
        softmax, ``(B, H, R, N)``.
    lse : Tensor or None
        ``(B, H, R)`` logarithm of every row's softmax denominator, where the caller has it (FlashAttention returns it).
    """
    q, k = widened(query), widened(key)
    b, h, r, d = q.shape
    kv = k.shape[1]
    logits = torch.einsum("bgrd,bgnd->bgrn", q.reshape(b, kv, (h // kv) * r, d), k).reshape(b, h, r, -1)
    logits = logits * (d**-0.5 if scaling is None else scaling)
    if reduce == "logits":
        return logits
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    probs = torch.softmax(logits, dim=-1) if lse is None else torch.exp(logits - lse[..., None])
    return probs if reduce == "none" else probs.mean(1)


def attention_colsum(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    block: int = 256,
) -> Tensor:
    """Head-averaged column sums of ``softmax(Q K^T)`` over (weighted) query rows, in row blocks: O(N) memory per row of a block.

    Parameters
    ----------
    query, key : Tensor
        ``(B, H, R, d)`` and ``(B, Hkv, N, d)``.
    mask : Tensor or None
        As in :func:`attention_rows`.
    weight : Tensor or None
        ``(B, R)`` weight of every query row (0 leaves a row out); default all ones.
    block : int
        Query rows per block.

    Returns
    -------
    Tensor
        ``(B, N)``.
    """
    b, h, r, _ = query.shape
    total = torch.zeros(b, key.shape[2], dtype=widened(key).dtype, device=key.device)
    if _one_by_one(query, key):
        for i, _, at, probs in _tiles(query, key, scaling, mask, False, block):
            if weight is not None:
                w = weight[i, at, None]
                probs = torch.where(w > 0, probs * w, 0.0)
            total[i] += probs.sum(0)
        return total / h
    for lo in range(0, r, block):
        hi = min(lo + block, r)
        part = mask
        if mask is not None and mask.shape[-2] != 1:
            part = mask[..., lo:hi, :]
        rows = attention_rows(query[:, :, lo:hi], key, scaling=scaling, mask=part)
        if weight is not None:
            # rows that see nothing (padding) are NaN after softmax; their weight is 0
            rows = torch.where((weight[:, lo:hi] > 0)[..., None], rows, 0.0) * weight[:, lo:hi, None]
        total += rows.sum(1)
    return total


def _one_by_one(query: Tensor, key: Tensor) -> bool:
    """Whether to take one head after the other: on a CPU, a few rows of one head stay in the cache, those of all heads do not."""
    if query.device.type != "cpu" or torch.compiler.is_compiling() or query.shape[2] * key.shape[2] < _SMALL:
        return False
    return not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))


def _tiles(
    query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None, causal: bool, block: int
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Yield image, head, rows, and their softmax ``(rows, N)``, a block at a time; arguments as in :func:`attention_walk`."""
    q, k = widened(query), widened(key)
    (b, h, r, d), (kv, n) = q.shape, k.shape[1:3]
    mask = None if mask is None else mask.expand(b, h, r, n)
    places = torch.arange(n)
    for i in range(b):
        for head in range(h):
            rows, keys = q[i, head] * (d**-0.5 if scaling is None else scaling), k[i, head // (h // kv)].contiguous()
            for lo in range(0, r, block):
                at = slice(lo, min(lo + block, r))
                logits = dot(rows[at], keys)
                if mask is not None:
                    part = mask[i, head, at]
                    logits = logits.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else logits.add_(part)
                elif causal:
                    logits.masked_fill_(places > places[n - r :][at, None], -torch.inf)
                yield i, head, at, torch.softmax(logits, -1)


def attention_walk(
    query: Tensor,
    key: Tensor,
    start: Tensor,
    *,
    steps: int,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int | None = None,
) -> Tensor:
    """Send mass along ``softmax(Q K^T)`` for some steps, each head on its own: ``p <- p M``, in row blocks.

    Rows that may attend to nothing pass nothing on. With more keys than queries (a KV cache) the last keys are the queries' own,
    and mass that reaches the others stays out of the following steps.

    Parameters
    ----------
    query, key : Tensor
        ``(B, H, R, d)`` and ``(B, Hkv, N, d)``.
    start : Tensor
        ``(B, R)`` mass of every row before the first step.
    steps : int
        Steps, at least 1.
    scaling, mask : float, Tensor
        As in :func:`attention_rows`.
    causal : bool
        Without a mask: a row sees no key behind its own.
    block : int or None
        Query rows per block; ``None``: 256, or fewer where a block of all heads would be larger than 128 MiB.

    Returns
    -------
    Tensor
        ``(B, H, N)`` mass of every key after the last step.
    """
    b, h, r, _ = query.shape
    n = key.shape[2]
    block = max(1, min(256, 2**25 // (b * h * n))) if block is None else block
    at = torch.arange(n, device=key.device)
    mass = start.to(widened(key).dtype)[:, None].expand(b, h, r)
    for _ in range(steps):
        total = torch.zeros(b, h, n, dtype=widened(key).dtype, device=key.device)
        if _one_by_one(query, key):
            for i, head, some, probs in _tiles(query, key, scaling, mask, causal, block):
                total[i, head] += mass[i, head, some] @ torch.nan_to_num_(probs, nan=0.0)
            mass = total[..., n - r :]
            continue
        for lo in range(0, r, block):
            hi = min(lo + block, r)
            part = mask[..., lo:hi, :] if mask is not None and mask.shape[-2] != 1 else mask
            if mask is None and causal:
                part = (at <= at[n - r + lo : n - r + hi, None])[None, None]
            rows = attention_rows(query[:, :, lo:hi], key, scaling=scaling, mask=part, reduce="none")
            total += torch.einsum("bhr,bhrn->bhn", mass[:, :, lo:hi], torch.nan_to_num(rows, nan=0.0))
        mass = total[..., n - r :]
    return total
