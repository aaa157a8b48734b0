"""Ready-made signals: what a reducer can ask for, each a small tensor computed from tapped q, k, v rows.

Attention maps are never requested from the model, so SDPA and FlashAttention stay on. A measure gets an :class:`AttentionTap`
with the q, k, v exactly as the attention kernel of that layer gets them (after bias, norms, RoPE and cache update) and returns
a tensor with one entry per key (``axis="keys"``) or per sequence (``axis="row"``). All arithmetic is float32 whatever the
model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.core import Need
from vtc.kernels import attention_colsum, attention_rows, compacted, widened


class _Prompt:
    """What taps of the language model know of the prompt's text."""

    visual: Tensor | None
    valid: Tensor | None
    text: tuple[int, int] | None

    @property
    def question(self) -> Tensor:
        """``(B, Q)`` bool: see :func:`question_of`."""
        return question_of(self.visual, self.valid)

    def listed(self, *, question: bool) -> tuple[Tensor, Tensor]:
        """Indices ``(B, T)`` of the text tokens, or of the question's alone, in order, and which of them exist, ``(B, T)`` bool."""
        asked = self.question if question else self.valid & ~self.visual
        count = asked.sum(1)
        longest = int(count.max()) if self.text is None else self.text[question]
        index, _ = compacted(asked, max(1, longest))
        return index, torch.arange(index.shape[1], device=count.device) < count[:, None]


@dataclass(frozen=True, eq=False)
class AttentionTap(_Prompt):
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
    given : mapping
        Text only: the signals of earlier layers named in ``Need.uses``, of the tokens of this forward.
    rope : (Tensor, Tensor) or None
        Text only: cosines and sines ``(B or 1, Q, d)`` the queries are rotated by.
    text : (int, int) or None
        Text only: the most text tokens, and the most tokens of a question, in any row. ``None``: a GPU is asked where they matter.
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
    given: Mapping[str, Tensor] = field(default_factory=dict)
    rope: tuple[Tensor, Tensor] | None = None
    text: tuple[int, int] | None = None

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


@dataclass(frozen=True, eq=False)
class StateTap(_Prompt):
    """Hidden states at one place of a decoder layer in one forward pass (:attr:`vtc.core.Need.of` says which place).

    Attributes
    ----------
    hidden : Tensor
        ``(B, Q, D)`` the states entering the layer, the output of one of its modules, or the neurons of its MLP.
    before : Tensor or None
        ``(B, Q, D)`` the input of the module whose output ``hidden`` is.
    last : Tensor
        ``(B,)`` index of the last real token.
    visual, valid : Tensor
        ``(B, Q)`` the token is a visual one / is not padding.
    norm : callable
        The language model's final norm.
    given : mapping
        The signals of earlier layers named in ``Need.uses``.
    text : (int, int) or None
        As in :class:`AttentionTap`.
    """

    hidden: Tensor
    last: Tensor
    visual: Tensor
    valid: Tensor
    norm: Callable[[Tensor], Tensor]
    before: Tensor | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)
    text: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class RotationTap:
    """Rotary cosines and sines of the tokens that enter a decoder layer.

    Attributes
    ----------
    cos, sin : Tensor
        ``(A, B or 1, Q, d)`` float32 at least: for each of the ``A`` axes positions have (1, or 3 under M-RoPE), all frequencies at
        a token's position on this axis.
    """

    cos: Tensor
    sin: Tensor


def question_of(visual: Tensor, valid: Tensor) -> Tensor:
    """``(B, Q)`` bool: the text behind the row's last visual token.

    In a row that ends with an image the last real token stands in.
    """
    after = valid & ~visual & (visual.flip(1).cumsum(1).flip(1) == 0)
    index = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, index, -1).max(1, keepdim=True).values
    return torch.where(after.any(1, keepdim=True), after, index == last)


@dataclass(frozen=True, eq=False)
class ProjectionTap:
    """What the projector is given in one forward pass.

    Attributes
    ----------
    features : Tensor
        ``(V, P, D_v)`` tower features of the views' patches.
    function : callable
        ``function(rank)`` returns the projector in float32 as a function of tokens ``(..., D_v)``; ``rank`` (int or None)
        replaces its linear layers by factors of that rank.
    valid : Tensor or None
        ``(V, P)`` bool: real patches, where views hold different numbers; ``None``: all.
    """

    features: Tensor
    function: Callable[[int | None], Callable[[Tensor], Tensor]]
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PixelTap:
    """The pixels the vision tower is given in one forward pass.

    Attributes
    ----------
    pixels : Tensor
        ``(V, C, H, W)`` normalised views.
    grid : tuple of (int, int)
        Rows and columns of a view's patches.
    """

    pixels: Tensor
    grid: tuple[int, int]


# ------------------------------------------------------------------------------------------------------ vision measures
def _cls_attention(tap: AttentionTap) -> Tensor:
    """CLS row of the softmax, mean over heads; the softmax runs over CLS and patches, then the CLS column is dropped."""
    rows, mask = tap.rows(torch.zeros(tap.query.shape[0], 1, dtype=torch.long, device=tap.query.device))
    return tap.patches(attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask)[:, 0])


def _received_attention(tap: AttentionTap) -> Tensor:
    """Mean over heads, then over all queries, of the attention each key receives."""
    if tap.mask is None:
        return tap.patches(attention_colsum(tap.query, tap.key, scaling=tap.scaling) / tap.query.shape[2])
    real = tap.mask[:, 0, 0].to(
        torch.float32
    )  # padded views: the mask is the same for every row, and padding pays no attention
    total = attention_colsum(tap.query, tap.key, scaling=tap.scaling, mask=tap.mask, weight=real)
    return tap.patches(total / real.sum(1, keepdim=True))


def _mean_keys(tap: AttentionTap) -> Tensor:
    """Keys averaged over heads, unscaled, ``(B, K, d)``."""
    return tap.patches(widened(tap.key).mean(1))


def _mean_values(tap: AttentionTap) -> Tensor:
    """Values averaged over heads, ``(B, K, d)``."""
    return tap.patches(widened(tap.value).mean(1))


def _cls_value_affinity(tap: AttentionTap) -> Tensor:
    """``softmax(V_cls . V_j)`` per head without scaling, over CLS and patches, mean over heads, CLS entry dropped."""
    mask = None if tap.mask is None else tap.mask[..., :1, :]
    return tap.patches(attention_rows(tap.value[:, :, :1], tap.value, scaling=1.0, mask=mask)[:, 0])


def _mean_query_attention(tap: AttentionTap) -> Tensor:
    """Softmax row of the mean query over all tokens, mean over heads (towers without a class token)."""
    query = widened(tap.query)
    if tap.mask is None:
        mask, mean = None, query.mean(2, keepdim=True)
    else:  # padded views: the mask is the same for every row, and padding has no say in the mean
        mask = tap.mask[..., :1, :]
        real = mask[:, :, 0, :, None]
        mean = (query * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
    return tap.patches(attention_rows(mean, tap.key, scaling=tap.scaling, mask=mask)[:, 0])


def _wide(t: Tensor) -> Tensor:
    """``(B, H, K, d)`` to ``(B, K, H d)``: the heads side by side, as the layer's projection made them."""
    return widened(t.transpose(1, 2).flatten(2))


def _wide_keys(tap: AttentionTap) -> Tensor:
    """Keys of all heads side by side, ``(B, K, H d)``."""
    return tap.patches(_wide(tap.key))


def _wide_cls_attention(tap: AttentionTap) -> Tensor:
    """CLS row of the softmax of one head as wide as all of them together, over CLS and patches, CLS column dropped."""
    query, heads = _wide(tap.query[:, :, :1])[:, None], tap.query.shape[1]
    mask = None if tap.mask is None else tap.mask[..., :1, :]
    return tap.patches(attention_rows(query, _wide(tap.key)[:, None], scaling=tap.scaling * heads**-0.5, mask=mask)[:, 0])


def _cls_logits(tap: AttentionTap) -> Tensor:
    """Scaled CLS row of the logits, mean over heads, CLS column dropped: what the softmax is given."""
    return tap.patches(attention_rows(tap.query[:, :, :1], tap.key, scaling=tap.scaling, reduce="logits").mean(1)[:, 0])


def _unlike_mean(tap: ProjectionTap) -> Tensor:
    """Negative cosine of every patch with the mean patch of its view, ``(V, P)``."""
    x = widened(tap.features)
    real = torch.ones_like(x[..., :1]) if tap.valid is None else tap.valid[..., None].to(x.dtype)
    mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    return -torch.nn.functional.cosine_similarity(x, mean, dim=-1)


def zeroth_order_sensitivity(features: Tensor, project: Callable[[Tensor], Tensor], directions: Tensor, step: float) -> Tensor:
    """Mean length of the projector's central differences along some directions, ``(...)`` for tokens ``(..., D_v)``.

    Parameters
    ----------
    directions : Tensor
        ``(m, D_v)``, scaled to length one here; the same for every token.
    step : float
        Length of the step to either side.
    """
    x = widened(features)
    total = x.new_zeros(x.shape[:-1])
    for u in directions.to(x.device, x.dtype, non_blocking=True):
        u = step * u / (u.norm() + 1e-12)
        total += (project(x + u) - project(x - u)).norm(dim=-1)
    return total / (2 * step * len(directions))


@dataclass(frozen=True)
class _Sensitivity:
    """:func:`zeroth_order_sensitivity` along random directions that are the same in every call."""

    directions: int
    step: float
    seed: int
    rank: int | None

    def __call__(self, tap: ProjectionTap) -> Tensor:
        """Return ``(V, P)``."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(self.directions, tap.features.shape[-1], generator=generator)
        return zeroth_order_sensitivity(tap.features, tap.function(self.rank), draw, self.step)


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
    return widened(tap.value).mean(1)


def _modality_mass(tap: AttentionTap) -> Tensor:
    """Share of attention mass that text rows put on visual columns and visual rows on text columns, ``(B, 2)``.

    Text is everything real after the first visual token that is not visual; what comes before it is the system prompt. Row and
    column sums run over the tokens of this forward (no earlier cache). Where there are no such rows (no text after the image)
    the share is undefined, and given as 1: nothing shows that the other side is no longer looked at.
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
        out.append(torch.where(rows.any(1), mass, torch.ones_like(mass)))
    return torch.stack(out, 1)


def _all_keys(tap: AttentionTap) -> Tensor:
    """Keys of all heads side by side, ``(B, K, H d)``."""
    return tap.patches(tap.key.transpose(1, 2).flatten(2))


def _key_norm(tap: AttentionTap) -> Tensor:
    """Sum of the absolute entries of each token's key over all key-value heads, ``(B, K)``.

    The sum depends on the rotation. Keys are turned back by that of the row's first real token, which changes nothing unless
    padding shifts the row's positions.
    """
    key = widened(tap.key)
    if tap.rope is not None:
        first = tap.valid.int().argmax(1)
        cos, sin = (t.to(key.dtype).expand(len(key), -1, -1)[torch.arange(len(key), device=t.device), first] for t in tap.rope)
        size = (cos**2 + sin**2).sqrt()  # some models scale their rotations
        cos, sin = (cos / size)[:, None, None], (sin / size)[:, None, None]
        turned = key[..., : cos.shape[-1]]
        half = turned.shape[-1] // 2
        other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        key = torch.cat([turned * cos - other * sin, key[..., cos.shape[-1] :]], -1)
    return key.abs().sum((1, 3))


def _final_states(tap: StateTap) -> Tensor:
    """States under the language model's final norm, ``(B, Q, D)``."""
    return tap.norm(tap.hidden)


def _places(tap: StateTap) -> Tensor:
    """Index of every token among the real tokens of its row, ``(B, Q)`` int64."""
    return tap.valid.cumsum(1) - 1


def _question_attention(tap: AttentionTap) -> Tensor:
    """Attention of the text behind the last visual token, mean over heads, then over these rows, ``(B, K)``."""
    index, real = tap.listed(question=True)
    rows, mask = tap.rows(index)
    weight = real.to(torch.float32)
    return attention_colsum(rows, tap.key, scaling=tap.scaling, mask=mask, weight=weight) / weight.sum(1, keepdim=True)


@dataclass(frozen=True)
class _PeakTextAttention:
    """Largest attention of any text token to each key, mean over heads first, ``(B, K)``; ``question``: see :func:`question_of`."""

    question: bool
    block: int = 64

    def __call__(self, tap: AttentionTap) -> Tensor:
        """Return ``(B, K)``; text tokens are taken a block at a time."""
        index, real = tap.listed(question=self.question)
        best = None
        for at, use in zip(index.split(self.block, 1), real.split(self.block, 1), strict=True):
            rows, mask = tap.rows(at)
            found = attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask)
            found = torch.where(use[..., None], found, torch.zeros_like(found)).max(1).values
            best = found if best is None else torch.maximum(best, found)
        return best


def turned_back(t: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return queries or keys ``(B, H, Q, d)`` as they were before the layer rotated them."""
    if rope is None:
        return t
    full = widened(t)
    cos, sin = (x.to(full.dtype)[:, None] for x in rope)
    turned, half = full[..., : cos.shape[-1]], cos.shape[-1] // 2
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    size = cos.square() + sin.square()  # some models scale their rotations
    return torch.cat([(turned * cos - other * sin) / size, full[..., cos.shape[-1] :]], -1)


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


def wide_cls_attn(layer: int = -1) -> Need:
    """CLS attention of a tower layer with all heads taken as one, ``(B, N)``; without a class token the attention received."""
    other = Need("wide_cls_attn", "vision", layer, _received_attention)
    return Need("wide_cls_attn", "vision", layer, _wide_cls_attention, requires="cls", substitute=other)


def wide_keys(layer: int = -1) -> Need:
    """Keys of a tower layer, all heads side by side, ``(B, N, H d)``."""
    return Need("wide_keys", "vision", layer, _wide_keys)


def cls_logits(layer: int = -1) -> Need:
    """Scaled attention logits of the class token in a tower layer, mean over heads, ``(B, N)``.

    On towers without a class token: the negative cosine of what the projector is given with its mean over the view.
    """
    other = Need("cls_logits", "vision", layer, _unlike_mean, of="projection")
    return Need("cls_logits", "vision", layer, _cls_logits, requires="cls", substitute=other)


def sensitivity(*, directions: int = 64, step: float = 0.01, seed: int = 0, rank: int | None = None) -> Need:
    """How far the projected token moves when the patch is nudged, ``(B, N)``: mean over random directions."""
    return Need("sensitivity", "vision", -1, _Sensitivity(directions, step, seed, rank), of="projection")


def received_attn(layer: int, name: str = "received_attn") -> Need:
    """Attention every patch of a tower layer receives, mean over heads and over all queries, ``(B, N)``; needs no class token."""
    return Need(name, "vision", layer, _received_attention)


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


def all_keys(layer: int = -1) -> Need:
    """Keys of a tower layer, all heads side by side, ``(B, N, H d)``."""
    return Need("all_keys", "vision", layer, _all_keys)


def key_norm(layer: int) -> Need:
    """L1 norm of the keys of a decoder layer, all heads together, ``(B, N)``."""
    return Need("key_norm", "text", layer, _key_norm)


def final_states(layer: int) -> Need:
    """States entering a decoder layer, under the model's final norm, ``(B, N, D)``."""
    return Need("final_states", "text", layer, _final_states, of="hidden")


def places(layer: int) -> Need:
    """Position of every token in the sequence a decoder layer is given, padding not counted, ``(B, N)`` int64."""
    return Need("places", "text", layer, _places, of="hidden")


def next_last_attn(layer: int) -> Need:
    """Attention of the last prompt token in a decoder layer that has yet to run, mean over heads, ``(B, N)``.

    Of the tokens there before the reducers of this layer act.
    """
    return Need("next_last_attn", "text", layer, _last_attention, of="preview")


def next_question_attn(layer: int) -> Need:
    """Attention of the question in a decoder layer that has yet to run, mean over heads and rows, ``(B, N)``.

    The question is the text behind the row's last visual token; tokens are those there before the reducers of this layer act.
    """
    return Need("next_question_attn", "text", layer, _question_attention, of="preview")


def peak_text_attn(layer: int, *, question: bool = True) -> Need:
    """Largest attention any text token of a decoder layer pays to each token, mean over heads before the maximum, ``(B, N)``.

    With ``question`` only the text behind the row's last visual token counts, otherwise all text of the row.
    """
    return Need("peak_text_attn", "text", layer, _PeakTextAttention(question))
