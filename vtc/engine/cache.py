"""KV-cache layers that hold fewer tokens than they say.

Everything outside the decoder layers (``generate``, mask builders, position ids) works with the **logical** sequence, every
placeholder included; a decoder layer and its cache hold only the **physical** one. Transformers sizes masks by
``cache.get_mask_sizes`` and positions by ``cache.get_seq_length``, so a layer that reports its logical length while storing less
keeps every caller right. All per-sequence state lives here, in the cache object: nothing is kept on the model between steps.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from vtc.engine import upstream
from vtc.engine.segment import Segment
from vtc.engine.upstream import AnyCache, FixedLayer, GrowingLayer, WindowLayer
from vtc.errors import UnsupportedFeatureError


class Pruned:
    """Mixin for a cache layer whose first ``cols.shape[1]`` physical slots stand for the logical columns ``cols``.

    Attributes
    ----------
    cols : Tensor or None
        ``(B, P)`` logical column of each mapped physical slot; later slots follow one to one.
    valid : Tensor or None
        ``(B, P)``, False on padding slots; ``None`` when there is none.
    shift : Tensor or None
        ``(B,)`` number subtracted from later tokens' position ids in this layer (compact positions); ``None`` means 0.
    bias : Tensor or None
        ``(B, P)`` float32 added to the attention logits of each mapped slot's key; later slots have 0. ``None``: nothing is added.
    end : int
        Logical length at the end of the mapped prefix.
    """

    cols: Tensor | None = None
    valid: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    end: int = 0

    @property
    def dropped(self) -> int:
        """How many logical columns of the longest row have no physical slot."""
        return 0 if self.cols is None else self.end - self.cols.shape[1]

    def stored(self) -> int:
        """Physical length."""
        if not self.is_initialized or self.keys is None or self.keys.numel() == 0:
            return 0
        return self.keys.shape[-2]

    def get_seq_length(self, *_: Any) -> int:
        """Logical length."""
        return self.stored() + self.dropped if self.stored() else 0

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Logical key length for ``query`` new tokens (a count, or 4.57's ``cache_position``)."""
        return self.get_seq_length() + (query if isinstance(query, int) else query.shape[0]), 0

    def columns(self, new: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return ``(cols, valid)`` of all physical slots plus ``new`` coming ones; ``valid`` is None without padding."""
        n = self.stored() + new - self.cols.shape[1]
        tail = torch.arange(self.end, self.end + n, device=self.cols.device).expand(self.cols.shape[0], -1)
        valid = None
        if self.valid is not None:
            valid = torch.cat([self.valid, torch.ones_like(tail, dtype=torch.bool)], 1)
        return torch.cat([self.cols, tail], 1), valid

    def biases(self, slots: int) -> Tensor | None:
        """Return what is added to the logits of the first ``slots`` physical keys, ``(B, slots)``; ``None``: nothing."""
        if self.bias is None:
            return None
        return torch.nn.functional.pad(self.bias, (0, slots - self.bias.shape[1]))

    def begin(self, seg: Segment, q: int) -> None:
        """Prepare for a forward of ``q`` logical tokens that will append ``seg.rows`` physical ones."""
        seen = self.get_seq_length()
        if seen == 0:  # layers of one segment share its tensors, so that one mask serves them all
            self.cols, self.valid, self.bias = seg.rows, seg.valid, seg.bias
        else:
            if self.cols is None:  # everything so far is one to one (or the last slots of a sliding window)
                cols = torch.arange(seen - self.stored(), seen, device=seg.rows.device).expand(seg.rows.shape[0], -1)
                valid = None
            else:
                cols, valid = self.columns()
            if valid is not None or seg.valid is not None:
                old = torch.ones_like(cols, dtype=torch.bool) if valid is None else valid
                new = torch.ones_like(seg.rows, dtype=torch.bool) if seg.valid is None else seg.valid
                valid = torch.cat([old, new], 1)
            if self.bias is not None or seg.bias is not None:
                old = seg.rows.new_zeros(cols.shape, dtype=torch.float32) if self.bias is None else self.biases(cols.shape[1])
                new = seg.rows.new_zeros(seg.rows.shape, dtype=torch.float32) if seg.bias is None else seg.bias
                self.bias = torch.cat([old, new], 1)
            self.cols, self.valid = torch.cat([cols, seg.rows + seen], 1), valid
        self.end = seen + q
        if seg.shift is not None:
            self.shift = seg.shift if self.shift is None else self.shift + seg.shift

    def _each(self, fn: Any) -> None:
        for name in ("cols", "valid", "shift", "bias"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, fn(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows (beam search)."""
        super().reorder_cache(beam_idx)
        self._each(lambda t: _reordered(t, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices])

    def crop(self, max_length: int) -> None:
        """Remove the last tokens (negative: how many; positive: logical length to keep), as assisted decoding does."""
        n = -max_length if max_length <= 0 else max(self.get_seq_length() - max_length, 0)
        if n <= 0:
            return
        into = self.cols.shape[1] - (self.stored() - n)  # how far the cut reaches into the mapped prefix
        if into > 0:
            tail = torch.arange(self.end - into, self.end, device=self.cols.device)
            if not (self.cols[:, -into:] == tail).all():
                raise UnsupportedFeatureError(
                    "cannot crop a KV cache back into visual tokens that were reduced: start from a fresh cache"
                )
            self.cols, self.end = self.cols[:, :-into], self.end - into
            self.valid = None if self.valid is None else self.valid[:, :-into]
            self.bias = None if self.bias is None else self.bias[:, :-into]
        self.keys, self.values = self.keys[..., :-n, :], self.values[..., :-n, :]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cols = self.valid = self.shift = self.bias = None
        self.end = 0


_LAST = threading.local()


def _reordered(t: Tensor, index: Tensor) -> Tensor:
    """Select rows; layers that share a tensor go on sharing it, so that one mask still serves them all."""
    known = getattr(_LAST, "made", [])
    for source, by, made in known:
        if source is t and by is index:
            return made
    made = t.index_select(0, index.to(t.device))
    # entries of this reordering only: nothing of an earlier one is kept alive
    _LAST.made = [entry for entry in known if entry[1] is index] + [(t, index, made)]
    return made


@upstream.check_overrides
class PrunedLayer(Pruned, GrowingLayer):
    """A plain layer with fewer slots than logical tokens."""


@upstream.check_overrides
class PrunedSlidingLayer(Pruned, GrowingLayer):
    """A sliding-window layer: never evicts, since the logical mask does the windowing."""

    is_sliding = True


@upstream.check_overrides
class PrunedStaticLayer(Pruned, FixedLayer):
    """A preallocated layer: one reducing prefill, buffers allocated smaller; tensors only after that, so that decode compiles."""

    def begin(self, seg: Segment, q: int) -> None:
        """Shrink the buffers before they are allocated."""
        if self.is_initialized:
            raise UnsupportedFeatureError(
                "reducing visual tokens on top of a non-empty or pre-allocated static cache is not supported: use DynamicCache"
            )
        p = seg.rows.shape[1]
        self.gone, self.logical_max, self.max_cache_len = q - p, self.max_cache_len, self.max_cache_len - (q - p)
        tail = torch.arange(p, self.max_cache_len, device=seg.rows.device).expand(seg.rows.shape[0], -1)
        self.cols = torch.cat([seg.rows, tail + self.gone], 1)
        self.valid = None if seg.valid is None else torch.cat([seg.valid, torch.ones_like(tail, dtype=torch.bool)], 1)
        self.shift, self.end = seg.shift, q
        self.bias = None if seg.bias is None else torch.nn.functional.pad(seg.bias, (0, tail.shape[1]))

    def get_seq_length(self, *_: Any) -> Any:
        """Logical length (a tensor once the layer runs)."""
        return upstream.fixed_length(self) + self.gone if self.is_initialized else 0

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Full logical length."""
        return self.logical_max, 0

    def columns(self, new: int = 0) -> tuple[Tensor, Tensor | None]:
        """All columns, allocated from the start."""
        return self.cols, self.valid

    def physical(self) -> int:
        """Slots there are, filled or not."""
        return self.max_cache_len

    def crop(self, max_length: int) -> None:
        """Remove the last tokens (how many, as a negative number), as assisted decoding does; the buffers stay."""
        n = int(-max_length)
        if n <= 0:
            return
        length = int(self.get_seq_length()) - n
        into = self.end - length  # how far the cut reaches into the first forward, which may have ended in candidates
        if into > 0:
            held = self.cols[:, : self.end - self.gone][:, -into:]
            if held.shape[1] < into or not (held == torch.arange(length, self.end, device=held.device)).all():
                raise UnsupportedFeatureError(
                    "cannot crop a static KV cache back into visual tokens that were reduced: start from a fresh cache"
                )
            self.end = length
        upstream.shorten_fixed(self, n)


_KINDS: dict[type, type] = {GrowingLayer: PrunedLayer, WindowLayer: PrunedSlidingLayer}
if upstream.fixed_layers_count():
    _KINDS[FixedLayer] = PrunedStaticLayer


def check_cache(cache: Any) -> None:
    """Raise :class:`UnsupportedFeatureError`, before anything runs, if a layer of ``cache`` cannot be shortened."""
    upstream.check_cache(cache, _KINDS, Pruned)


def pruned_layer(cache: AnyCache, i: int) -> Pruned:
    """Return layer ``i`` of ``cache`` as a pruned layer, replacing it in place by one with the same contents if needed."""
    layer = upstream.cache_layer(cache, i)
    if not isinstance(layer, Pruned):
        if type(layer) not in _KINDS:
            check_cache(cache)
        new = object.__new__(_KINDS[type(layer)])
        new.__dict__.update(layer.__dict__)
        cache.layers[i] = layer = new
    return layer


def held_by(cache: AnyCache | None, i: int) -> Pruned | None:
    """Return layer ``i`` of ``cache`` if it is a reduced one."""
    if cache is None or i >= len(cache.layers):
        return None
    layer = cache.layers[i]
    return layer if isinstance(layer, Pruned) else None


def promised(cache: AnyCache | None, i: int, physical: int, logical: int) -> str:
    """Return what is wrong with layer ``i`` of a cache that should store ``physical`` tokens and report ``logical``, or ``""``."""
    layer = held_by(cache, i)
    if layer is None:
        kind = type(cache.layers[i]).__name__ if cache is not None and i < len(cache.layers) else "missing"
        return f"its cache layer is not vtc's ({kind})"
    if isinstance(layer, PrunedStaticLayer):  # its length is a tensor, for which a GPU would be waited
        fits = layer.physical() == layer.logical_max - layer.gone
        return "" if fits else f"its buffers have {layer.physical()} slots and should have {layer.logical_max - layer.gone}"
    if layer.stored() != physical:
        return f"its cache stores {layer.stored()} tokens and should store {physical}"
    if layer.get_seq_length() != logical:
        return f"its cache reports {layer.get_seq_length()} tokens and should report {logical}"
    return ""
