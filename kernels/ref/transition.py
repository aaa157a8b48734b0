"""How much a module changes each token."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.kernels.ref.linear import widened


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
