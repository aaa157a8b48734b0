"""Which of a forward's tokens a run of decoder layers holds, and the gathers that get there."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.engine import upstream
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import select_compact


@dataclass(eq=False)
class Segment:
    """The tokens a run of decoder layers holds.

    Attributes
    ----------
    rows : Tensor
        ``(B, P)`` ascending indices into this forward's ``q`` logical tokens, padding on the left.
    valid : Tensor or None
        ``(B, P)`` False on padding; ``None`` when every row keeps the same number.
    delta : Tensor or None
        ``(B, P)`` number subtracted from each token's position id (compact positions); ``None`` means 0.
    shift : Tensor or None
        ``(B,)`` the same for tokens that come later.
    kept : Tensor
        ``(B, q)`` bool, the same tokens as a table.
    gaps : bool
        Whether positions keep gaps where tokens were dropped.
    bias : Tensor or None
        ``(B, P)`` float32 added to the attention logits of each token's key; ``None``: nothing.
    """

    rows: Tensor
    valid: Tensor | None
    delta: Tensor | None
    shift: Tensor | None
    kept: Tensor = field(repr=False)
    gaps: bool = True
    bias: Tensor | None = None

    @functools.cached_property
    def rank(self) -> Tensor:
        """``(B, q)`` physical index of the last token held at or before each logical one; negative where there is none."""
        rank = self.kept.cumsum(1) - 1
        if self.valid is None:
            return rank
        padding = self.valid.shape[1] - self.valid.sum(1, keepdim=True)  # slots in front of the row's first token
        return torch.where(rank < 0, rank, rank + padding)

    @functools.cached_property
    def inverse(self) -> Tensor:
        """``(B, q)`` physical index of every logical token, -1 where it is dropped."""
        return torch.where(self.kept, self.rank, -1)


def cut(keep: Tensor, counts: list[int], real: Tensor | None, prev: Segment | None, compact: bool) -> tuple[Segment, Tensor]:
    """Build the segment that holds the tokens marked in ``keep``.

    Parameters
    ----------
    keep : Tensor
        ``(B, q)`` bool over the logical tokens of this forward.
    counts : list of int
        How many of each row are kept, padding left out: known to the host, which then need not wait for the device.
    real : Tensor or None
        ``(B, q)`` bool, False on padding (padding is thrown away); ``None``: there is none.
    prev : Segment or None
        What the layers before held; ``None`` = everything.
    compact : bool
        Renumber positions ``0..n-1``, or keep those of ``prev``.

    Returns
    -------
    segment : Segment
    relative : Tensor
        ``(B, P)`` index of the segment's tokens inside ``prev``.
    """
    current = keep = keep if real is None else keep & real
    if prev is not None:
        current = keep.gather(1, prev.rows)
        if prev.valid is not None:
            current = current & prev.valid
    p = max(counts)
    if p == 0:
        raise UnsupportedFeatureError(
            "nothing is left of this forward: reducers do not go together with chunked prefill (prefill_chunk_size)"
        )
    n = None if min(counts) == p else torch.tensor(counts).to(keep.device, non_blocking=True)
    # the kept tokens in order, on the right: logits[:, -1] stays the last token
    relative, taken = select_compact(current.to(torch.float32), p, [] if prev is None else [prev.rows], count=n)
    valid = None
    if n is not None:
        valid, relative = relative >= 0, relative.clamp(min=0)  # a choice: padding holds any token, and is marked
    rows = relative if prev is None else taken[0]

    delta, shift = None, None
    if compact and real is None and n is None:  # the gaps closed so far: what follows in fewer operations
        delta, shift = rows - torch.arange(p, device=rows.device), rows.new_full(rows.shape[:1], keep.shape[1] - p)
    elif compact:
        gone = ~keep if real is None else real & ~keep
        delta, shift = gone.cumsum(1).gather(1, rows), gone.sum(1)
    elif prev is not None and prev.delta is not None:
        delta, shift = prev.delta.gather(1, relative), prev.shift
    return Segment(rows, valid, delta, shift, keep, gaps=not compact), relative


def remap_mask(
    mask: Any,
    seg: Segment | None,
    cols: Tensor,
    valid: Tensor | None,
    *,
    total: int,
    q: int,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
    static: bool = False,
    bias: Tensor | None = None,
) -> Tensor | None:
    """Turn the logical attention mask into that of a layer whose keys are ``cols`` and whose queries are ``seg.rows`` (or all).

    Parameters
    ----------
    mask : Tensor or None
        4-D boolean or additive mask, 2-D padding mask (FlashAttention), or ``None`` (causal, nothing padded).
    cols, valid : Tensor
        ``(B, K)`` logical columns of the layer's physical keys and their validity.
    total : int
        Logical key length; a sliding window's mask covers only its last columns.
    q : int
        Logical query length.
    bias : Tensor or None
        ``(B, K)`` added to the logits of the keys: the result is additive then.
    """
    kv = cols.shape[1]
    nq = q if seg is None else seg.rows.shape[1]
    own = torch.arange(nq, device=device) + (0 if static else kv - nq)  # key slots of the queries themselves
    if mask is None:
        if valid is None and bias is None:
            return None
        if upstream.is_flash(implementation):
            return valid
        real = torch.ones_like(cols, dtype=torch.bool) if valid is None else valid
        out = real.to(device)[:, None, None, :] & (torch.arange(kv, device=device) <= own[:, None])
    elif not isinstance(mask, Tensor):
        raise UnsupportedFeatureError(
            f"attention masks of type {type(mask).__name__} (flex_attention) cannot be shortened: load the model with "
            f"attn_implementation='{upstream.SDPA}'"
        )
    else:
        index = cols.to(mask.device) - (total - mask.shape[-1])
        ok = index >= 0 if valid is None else (index >= 0) & valid.to(mask.device)
        index = index.clamp(min=0)  # a choice: columns in front of a window's mask are not seen, as `ok` says
        if mask.dim() == 2:
            return mask.gather(1, index) & ok
        out = mask.expand(cols.shape[0], -1, -1, -1)
        if seg is not None:
            at = seg.rows.to(out.device)[:, None, :, None]
            out = out.gather(2, at.expand(-1, out.shape[1], -1, out.shape[3]))
        out = out.gather(3, index[:, None, None, :].expand(-1, out.shape[1], out.shape[2], -1))
        ok = ok[:, None, None, :]
        out = out & ok if out.dtype == torch.bool else out.masked_fill(~ok, torch.finfo(out.dtype).min)
    if seg is not None and seg.valid is not None:  # padding queries see themselves: no empty softmax row
        pad = torch.zeros(len(cols), nq, kv, dtype=torch.bool, device=out.device)
        pad[:, torch.arange(nq, device=out.device), own.to(out.device)] = ~seg.valid.to(out.device)
        pad = pad[:, None]
        out = out | pad if out.dtype == torch.bool else out.masked_fill(pad, 0.0)
    if (bias is not None or upstream.is_eager(implementation)) and out.dtype == torch.bool:
        out = torch.zeros((), dtype=dtype, device=out.device).masked_fill(~out, torch.finfo(dtype).min)
    return out if bias is None else out + bias[:, None, None, :].to(out.device, out.dtype)
