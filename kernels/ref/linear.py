"""What the other ops share: float32 at least, rows of length one, and products of many rows with many."""

from __future__ import annotations

import torch
from torch import Tensor

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's product, which torch offers under no public name: None where it is not there, and ``@`` serves. Looked up here only."""


def widened(t: Tensor) -> Tensor:
    """At least float32: selection must not depend on the model's dtype."""
    return t if t.dtype == torch.float64 else t.float()


def unit_rows(t: Tensor) -> Tensor:
    """Rows scaled to length one; zero rows stay zero."""
    full = widened(t)
    return full / lengths(full)[..., None]


def lengths(t: Tensor) -> Tensor:
    """Euclidean length of every row, 1 for zero rows."""
    norm = t.norm(dim=-1)
    return torch.where(norm > 0, norm, torch.ones_like(norm))


def own_images(t: Tensor) -> list[Tensor]:
    """The entries of a batch, each in memory of its own, without gaps.

    Products are made image by image: how they round depends on the batch size and on where in memory an operand starts, and equal
    similarities (repeated tokens) must be broken in the same way in any batch.
    """
    return [t[0].contiguous()] if len(t) == 1 else [i.clone(memory_format=torch.contiguous_format) for i in t]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``a (n, D)`` times ``b (m, D)`` transposed, ``(n, m)``; outside of autograd.

    Float32 on a CPU goes to oneDNN, which uses wide vector units on processors of every vendor; the library behind ``@`` often does
    not. Equal rows give equal products, which a matrix-vector product does not promise.
    """
    a, b = a.detach(), b.detach()
    wide = ONEDNN is not None and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
    if (
        wide and min(len(a), len(b), a.shape[1]) > 0 and not torch.compiler.is_compiling()
    ):  # Inductor wants constant weights there
        return ONEDNN(a.contiguous(), b.contiguous(), None, "none", [], "")
    return a @ b.T


def gram(rows: Tensor, block: int = 64) -> Tensor:
    """``rows (n, D)`` times themselves transposed, ``(n, n)``: half of it is made, the rest is a reflection."""
    n = len(rows)
    if n <= 2 * block or rows.shape[1] < 4 * block:  # copying would cost more than it saves
        return dot(rows, rows)
    whole = rows.new_empty(n, n)
    for lo in range(0, n, block):
        hi = min(lo + block, n)
        part = dot(rows[lo:], rows[lo:hi])
        whole[lo:, lo:hi] = part
        whole[lo:hi, hi:] = part[hi - lo :].T
    return whole


def along(tokens: Tensor, vector: Tensor) -> Tensor:
    """Dot products ``(N,)`` of the tokens ``(N, D)``, scaled to length one, with ``vector (D,)``; 0 for zero tokens."""
    full = widened(tokens)
    return dot(full, vector[None].to(full.dtype))[:, 0] / lengths(full)


class Cosines:
    """Cosines between the tokens of one image, a few rows at a time and without a normalised copy of all tokens.

    Parameters
    ----------
    tokens : Tensor
        ``(N, D)``, at least float32; zero rows have cosine 0 with everything.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.scale = 1 / lengths(tokens)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def cost(self) -> int:
        """Multiplications that all of them take."""
        return self.tokens.shape[0] * self.tokens.numel()

    def rows(self, of: Tensor) -> Tensor:
        """Return ``(M, N)``: cosines of the tokens ``of (M,)`` with all tokens."""
        return dot(self.tokens[of], self.tokens).mul_(self.scale[of, None]).mul_(self.scale)

    def among(self, of: Tensor) -> Tensor:
        """Return ``(M, M)``: cosines of the tokens ``of (M,)`` with each other."""
        some, scale = self.tokens[of], self.scale[of]
        return gram(some).mul_(scale[:, None]).mul_(scale)
