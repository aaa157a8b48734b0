"""Torch twins of two ops around the selection itself: choose and gather in one call, and the transition score of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.kernels.linear import widened
from vtc.kernels.ref import topk_sorted


def select_compact(
    scores: Tensor, k: int, states: Sequence[Tensor] = (), *, dims: Sequence[int] = (), count: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Choose the ``k`` best tokens of every row and gather their hidden states, RoPE tables, masks, keys and values.

    O(N + k) per row and O(k) per gathered column; no host synchronisation. Among equal scores the lowest index wins. Rows may
    keep different numbers of tokens: shorter ones are padded on the left, so that the last token stays last.

    Parameters
    ----------
    scores : Tensor
        ``(B, N)`` float32, float16 or bfloat16.
    k : int
        Length of the result, ``0 <= k <= N``.
    states : sequence of Tensor
        What is gathered, of any type: ``(B, ..., N, ...)``, or ``(1, ..., N, ...)`` where all rows share it.
    dims : sequence of int
        The token dimension of each, at least 1; default 1 for all.
    count : Tensor or None
        ``(B,)`` int64 tokens that each row keeps, ``0 <= count <= k``; ``None``: ``k``.

    Returns
    -------
    index : Tensor
        ``(B, k)`` int64, ascending; -1 on padding.
    gathered : list of Tensor
        The states of these tokens ``(B, ..., k, ...)``; zeros on padding.
    """
    if count is None:
        index = topk_sorted(scores, k)
    else:
        order = torch.sort(widened(scores), dim=-1, descending=True, stable=True).indices[:, :k]
        index = torch.where(torch.arange(k, device=order.device) < count[:, None], order, -1).sort(dim=-1).values
    gathered = []
    for t, dim in zip(states, dims or [1] * len(states), strict=True):
        rows = zip(t.expand(len(index), *t.shape[1:]), index.clamp(min=0), strict=True)
        taken = torch.stack([row.index_select(dim - 1, at) for row, at in rows])
        if count is not None:
            kept = (index >= 0).view(len(index), *[1] * (dim - 1), k, *[1] * (t.dim() - dim - 1))
            taken = torch.where(kept, taken, torch.zeros_like(taken))
        gathered.append(taken)
    return index, gathered


def transition_score(before: Tensor, after: Tensor, valid: Tensor | None = None, *, shared: bool = False) -> Tensor:
    """How much a module changes each token: ratio of lengths times the softmax of ``1 - cos`` over the sequence, O(B S D).

    Parameters
    ----------
    before, after : Tensor
        ``(B, S, D)`` normalised input of an attention or MLP, and its output before the residual sum.
    valid : Tensor or None
        ``(B, S)`` False on padding, which has no part in the softmax.
    shared : bool, default False
        Let the softmax run over all sequences of the batch together.

    Returns
    -------
    Tensor
        ``(B, S)``, at least float32; 0 where ``before`` is zero.
    """
    x, y = widened(before), widened(after)
    length, after_length = x.norm(dim=-1), y.norm(dim=-1)
    cosine = torch.linalg.vecdot(x, y) / (length.clamp(min=1e-8) * after_length.clamp(min=1e-8))
    turned = torch.exp(1 - cosine)
    if valid is not None:
        turned = turned * valid
    grown = torch.where(length > 0, after_length / torch.where(length > 0, length, 1.0), 0.0)
    return grown * turned / (turned.sum() if shared else turned.sum(1, keepdim=True))
