"""Ready-made signals: what a reducer can ask for, each a small tensor computed from tapped q, k, v rows.

Attention maps are never requested from the model, so SDPA and FlashAttention stay on. A measure gets an :class:`AttentionTap` with
the q, k, v exactly as the attention kernel of that layer gets them (after bias, norms, RoPE and cache update) and returns a tensor
with one entry per key (``axis="keys"``) or per sequence (``axis="row"``). All arithmetic is float32 whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import Need
from vtc.kernels import attention_colsum, attention_rows


@dataclass(frozen=True, eq=False)
class AttentionTap:
    """q, k, v of one attention layer in one forward pass.

    Attributes
    ----------
    query : Tensor
        ``(B, H, Q, d)``. In the vision tower ``B`` counts views.
    key, value : Tensor
        ``(B, Hkv, K, d)``; with a KV cache ``K >= Q`` and the last ``Q`` keys belong to the queries.
    scaling : float
        Factor the layer puts on its logits.
    mask : Tensor or None
        The layer's attention mask broadcastable to ``(B, 1, Q, K)`` (boolean or additive), ``None`` if everything allowed by
        causality may be attended.
    causal : bool
        Whether query ``i`` may attend only up to its own key.
    last : Tensor or None
        Text only: ``(B,)`` query index of the last real (not padding) token.
    visual, valid : Tensor or None
        Text only: ``(B, Q)`` the query is a visual token / is not padding.
    cls : bool
        Vision only: key and query 0 are the class token; results then cover the patches only.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None = None
    causal: bool = False
    last: Tensor | None = None
    visual: Tensor | None = None
    valid: Tensor | None = None
    cls: bool = False

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return query rows ``(B, H, R, d)`` and their mask ``(B, 1 or H, R, K)`` (or None) for ``index (B, R)``."""
        b, h, q, d = self.query.shape
        rows = self.query.gather(2, index[:, None, :, None].expand(-1, h, -1, d))
        keys = self.key.shape[2]
        mask = None
        if self.mask is not None:
            full = self.mask.expand(b, -1, q, keys) if self.mask.shape[-2] in (1, q) else self.mask
            mask = full.gather(2, index[:, None, :, None].expand(-1, full.shape[1], -1, keys))
        elif self.causal:
            mask = (torch.arange(keys, device=index.device) <= (index + keys - q)[..., None])[:, None]
        return rows, mask

    def patches(self, t: Tensor) -> Tensor:
        """Drop the class token from the key axis (the second axis) of ``t (B, K, ...)`` where there is one."""
        return t[:, 1:] if self.cls else t


# ------------------------------------------------------------------------------------------------------ vision measures
def _cls_attention(tap: AttentionTap) -> Tensor:
    """CLS row of the softmax, mean over heads; the softmax runs over CLS and patches, then the CLS column is dropped."""
    rows, mask = tap.rows(torch.zeros(tap.query.shape[0], 1, dtype=torch.long, device=tap.query.device))
    return tap.patches(attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask)[:, 0])


def _received_attention(tap: AttentionTap) -> Tensor:
    """Mean over heads, then over all queries, of the attention each key receives."""
    return tap.patches(attention_colsum(tap.query, tap.key, scaling=tap.scaling, mask=tap.mask) / tap.query.shape[2])


def _mean_keys(tap: AttentionTap) -> Tensor:
    """Keys averaged over heads, unscaled, ``(B, K, d)``."""
    return tap.patches(tap.key.float().mean(1) if tap.key.dtype != torch.float64 else tap.key.mean(1))


def _mean_values(tap: AttentionTap) -> Tensor:
    """Values averaged over heads, ``(B, K, d)``."""
    return tap.patches(tap.value.float().mean(1) if tap.value.dtype != torch.float64 else tap.value.mean(1))


def _cls_value_affinity(tap: AttentionTap) -> Tensor:
    """``softmax(V_cls . V_j)`` per head without scaling, over CLS and patches, mean over heads, CLS entry dropped."""
    mask = None if tap.mask is None else tap.mask[..., :1, :]
    return tap.patches(attention_rows(tap.value[:, :, :1], tap.value, scaling=1.0, mask=mask)[:, 0])


def _mean_query_attention(tap: AttentionTap) -> Tensor:
    """Softmax row of the mean query over all tokens, mean over heads (towers without a class token)."""
    mask = None if tap.mask is None else tap.mask[..., :1, :]
    query = tap.query.float() if tap.query.dtype != torch.float64 else tap.query
    return attention_rows(query.mean(2, keepdim=True), tap.key, scaling=tap.scaling, mask=mask)[:, 0]


# -------------------------------------------------------------------------------------------------------- text measures
def _last_attention(tap: AttentionTap) -> Tensor:
    """Softmax row of the last real token over all admissible keys, mean over heads, ``(B, K)``."""
    rows, mask = tap.rows(tap.last[:, None])
    return attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask)[:, 0]


def _last_logits(tap: AttentionTap) -> Tensor:
    """Scaled logits of the last real token against every key, ``(B, K, H)``: softmax over any subset of keys comes later."""
    rows, _ = tap.rows(tap.last[:, None])
    return attention_rows(rows, tap.key, scaling=tap.scaling, reduce="logits")[:, :, 0].transpose(1, 2)


def _last_value_logits(tap: AttentionTap) -> Tensor:
    """Scaled dot products of the last real token's value with every value, ``(B, K, Hkv)``."""
    at = tap.last + tap.value.shape[2] - tap.query.shape[2]
    row = tap.value.gather(2, at[:, None, None, None].expand(-1, tap.value.shape[1], 1, tap.value.shape[3]))
    return attention_rows(row, tap.value, scaling=tap.value.shape[-1] ** -0.5, reduce="logits")[:, :, 0].transpose(1, 2)


def _all_values(tap: AttentionTap) -> Tensor:
    """Values averaged over heads, ``(B, K, d)``."""
    return tap.value.mean(1) if tap.value.dtype == torch.float64 else tap.value.float().mean(1)


def _modality_mass(tap: AttentionTap) -> Tensor:
    """Share of attention mass that text rows put on visual columns and visual rows on text columns, ``(B, 2)``.

    Text is everything real after the first visual token that is not visual; what comes before it is the system prompt. Row and
    column sums run over the tokens of this forward (no earlier cache).
    """
    q = tap.query.shape[2]
    keys = tap.key.shape[2]
    real = tap.valid if tap.valid is not None else torch.ones_like(tap.visual)
    text = real & ~tap.visual & (tap.visual.cumsum(1) > 0)
    visual = tap.visual & real
    mask = tap.mask
    if mask is None and tap.causal:
        at = torch.arange(q, device=text.device)
        mask = (torch.arange(keys, device=text.device)[None] <= (at + keys - q)[:, None])[None, None]
    out = []
    for rows, cols in ((text, visual), (visual, text)):
        total = attention_colsum(tap.query, tap.key, scaling=tap.scaling, mask=mask, weight=rows.to(torch.float32))[:, -q:]
        mass = (total * cols).sum(1) / (total * real).sum(1).clamp(min=1e-12)
        out.append(mass)
    return torch.stack(out, 1)


# ---------------------------------------------------------------------------------------------------------------- needs
def cls_attn(layer: int = -2, *, substitute: bool = True) -> Need:
    """CLS attention of a tower layer, mean over heads, ``(B, N)``.

    With ``substitute`` the mean attention every token receives takes its place on towers without a class token.
    """
    other = Need("cls_attn", "vision", layer, _received_attention) if substitute else None
    return Need("cls_attn", "vision", layer, _cls_attention, requires="cls", substitute=other)


def keys(layer: int = -2) -> Need:
    """Head-averaged keys of a tower layer, ``(B, N, d)``."""
    return Need("keys", "vision", layer, _mean_keys)


def values(layer: int = -2) -> Need:
    """Head-averaged values of a tower layer, ``(B, N, d)``."""
    return Need("values", "vision", layer, _mean_values)


def cls_value_affinity(layer: int = -2) -> Need:
    """Softmax of unscaled value dot products with the class token, mean over heads, ``(B, N)``."""
    return Need("cls_value_affinity", "vision", layer, _cls_value_affinity, requires="cls")


def mean_query_attn(layer: int = -2) -> Need:
    """Attention of the averaged query, ``(B, N)``; for towers without a class token."""
    return Need("mean_query_attn", "vision", layer, _mean_query_attention)


def last_attn(layer: int) -> Need:
    """Attention of the last prompt token in a decoder layer, mean over heads, ``(B, N)``; softmax over all keys it may see."""
    return Need("last_attn", "text", layer, _last_attention)


def last_logits(layer: int) -> Need:
    """Scaled attention logits of the last prompt token, per head, ``(B, N, H)``."""
    return Need("last_logits", "text", layer, _last_logits)


def last_value_logits(layer: int) -> Need:
    """Scaled value dot products with the last prompt token, per key-value head, ``(B, N, Hkv)``."""
    return Need("last_value_logits", "text", layer, _last_value_logits)


def text_values(layer: int) -> Need:
    """Head-averaged values of a decoder layer, ``(B, N, d)``."""
    return Need("text_values", "text", layer, _all_values)


def modality_mass(layer: int) -> Need:
    """Share of attention from text to visual tokens and from visual to text tokens, ``(B, 2)``."""
    return Need("modality_mass", "text", layer, _modality_mass, axis="row")
