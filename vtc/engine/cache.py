"""KV-cache layers that hold fewer tokens than they say.

Everything outside the decoder layers (``generate``, mask builders, position ids) works with the **logical** sequence, every
placeholder included; a decoder layer and its cache hold only the **physical** one. Transformers sizes masks by
``cache.get_mask_sizes`` and positions by ``cache.get_seq_length``, so a layer that reports its logical length while storing less
keeps every caller right. All per-sequence state lives here, in the cache object: nothing is kept on the model between steps.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
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
    skip : int
        Slots at the front that are gone for good (sliding windows). ``cols`` and ``valid`` still speak of them: layers go on
        sharing these tensors, and with them one mask.
    """

    cols: Tensor | None = None
    valid: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    end: int = 0
    skip: int = 0

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
        held = self.stored() + self.skip
        return held + self.dropped if held else 0

    def total(self, query: int) -> int:
        """Logical key length once ``query`` tokens are added: where masks end."""
        return self.get_seq_length() + query

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Logical key length for ``query`` new tokens (a count, or 4.57's ``cache_position``)."""
        return self.total(count_of(query)), 0

    def columns(self, new: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return ``(cols, valid)`` of all physical slots plus ``new`` coming ones; ``valid`` is None without padding."""
        mapped = self.cols.shape[1]
        first = max(self.skip - mapped, 0)  # of the tail
        last = self.skip + self.stored() + new - mapped
        tail = torch.arange(self.end + first, self.end + last, device=self.cols.device).expand(self.cols.shape[0], -1)
        valid = None
        if self.valid is not None and self.skip < mapped:
            valid = torch.cat([self.valid[:, self.skip :], torch.ones_like(tail, dtype=torch.bool)], 1)
        return torch.cat([self.cols[:, self.skip :], tail], 1), valid

    def biases(self, slots: int) -> Tensor | None:
        """Return what is added to the logits of the first ``slots`` physical keys, ``(B, slots)``; ``None``: nothing."""
        if self.bias is None:
            return None
        bias = self.bias[:, self.skip :]
        return torch.nn.functional.pad(bias, (0, slots - bias.shape[1]))

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
            self.skip = 0
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
        mapped = 0 if self.cols is None else self.cols.shape[1]
        into = mapped - (self.skip + self.stored() - n)  # how far the cut reaches into the mapped prefix
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
        self.end = self.skip = 0


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
class PrunedSlidingLayer(Pruned, WindowLayer):
    """A sliding-window layer: holds what the next token may look at, which is the last logical columns, not the last slots.

    Slots leave from the front, as many as no row needs any more. The host knows which once :func:`learn_fronts` has read the
    columns, at the end of a prefill. Until then, and in compiled steps, which cannot look, as many slots stay as the window is
    long: never too few, since every slot has a column of its own.

    Attributes
    ----------
    front : list of int or None
        The last column that any row has in each mapped slot, ascending; -1 where all have padding. ``None``: not read yet.
    floor : int
        No column behind it has been thrown away.
    """

    record_past = False  # 4.57 does not know it
    front: list[int] | None = None
    floor: int = 0

    def adopt(self) -> None:
        """Take over what a plain layer has thrown away already."""
        self.skip = self.floor = upstream.seen_by_window(self) - self.stored()

    @property
    def window(self) -> int:
        """How many tokens back a token looks, itself included."""
        return upstream.window_of_layer(self)

    def begin(self, seg: Segment, q: int) -> None:
        """Prepare for a forward that will append fewer tokens than it has."""
        super().begin(seg, q)
        self.front = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them with those there, and keep what later tokens may look at."""
        length, _ = self.get_mask_sizes(keys.shape[-2])
        whole = GrowingLayer.update(self, keys, values, *args, **kwargs)
        if self.cols is None:  # emptied, and used for text: nobody remaps the mask
            whole = tuple(t[..., -length:, :] for t in whole)
        if not self.record_past:
            self.evict()
        return whole

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and first column of the mask, as a plain layer of the same logical length has them."""
        seen, reach = self.get_seq_length(), self.window - 1
        return min(seen, reach) + count_of(query), max(seen - reach, 0)

    def evict(self) -> None:
        """Throw away what no later token may look at."""
        lowest = self.get_seq_length() - self.window + 1  # the first column that the next token sees
        if lowest <= 0:
            return
        n, floor = self.stored() - self.window + 1, lowest
        if self.front is not None and not torch.compiler.is_compiling():
            n, floor = self.behind(lowest)
        if n > 0:
            self.keys, self.values = self.keys[..., n:, :], self.values[..., n:, :]
            self.skip += n
            self.floor = max(self.floor, floor)

    def behind(self, lowest: int) -> tuple[int, int]:
        """Return how many slots lie before column ``lowest`` in every row, and the column behind the last of them."""
        mapped = len(self.front)
        slots = bisect.bisect_left(self.front, lowest)
        if slots == mapped:  # what was added later is one to one
            slots = max(slots, min(mapped + lowest - self.end, self.skip + self.stored()))
        last = self.end + slots - mapped if slots > mapped else self.front[slots - 1] + 1 if slots else 0
        return slots - self.skip, last

    def crop(self, max_length: int) -> None:
        """Remove the last tokens, and then what the window has passed; what it left behind earlier cannot come back."""
        n = -max_length if max_length <= 0 else max(self.get_seq_length() - max_length, 0)
        lowest = self.get_seq_length() - n - self.window + 1  # the first column that will be seen
        if n > 0 and max(lowest, 0) < self.floor:
            raise UnsupportedFeatureError(
                "cannot crop a KV cache back behind what its sliding windows have thrown away: call activate_past_recording() on "
                "it before the tokens that may have to go, or start from a fresh cache"
            )
        super().crop(max_length)
        if self.front is not None:
            self.front = self.front[: 0 if self.cols is None else self.cols.shape[1]]
        self.evict()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.front, self.floor = None, 0


def learn_fronts(layers: Iterable[PrunedSlidingLayer]) -> None:
    """Read once, for all layers that share them, which columns sliding-window layers hold; throw away what only that shows.

    Reading makes the host wait for a GPU.
    """
    known: list[tuple[PrunedSlidingLayer, list[int]]] = []
    for layer in layers:
        front = next((f for other, f in known if other.cols is layer.cols and other.valid is layer.valid), None)
        if front is None:
            last = layer.cols if layer.valid is None else torch.where(layer.valid, layer.cols, -1)
            front = last.amax(0).tolist()
            known.append((layer, front))
        layer.front = front
        if not layer.record_past:
            layer.evict()


def count_of(query: int | Tensor) -> int:
    """Return how many queries there are; 4.57 hands over their positions."""
    return query if isinstance(query, int) else query.shape[0]


@upstream.check_overrides
class PrunedStaticLayer(Pruned, FixedLayer):
    """A preallocated layer: one reducing prefill, buffers allocated smaller; tensors only after that, so that decode compiles."""

    gone = 0  # logical columns without a slot

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

    def reset(self) -> None:
        """Forget everything; buffers are made anew, as long as they were."""
        super().reset()
        if self.gone:
            self.gone, self.max_cache_len = 0, self.logical_max
            self.keys = self.values = None
            self.is_initialized = False

    def get_seq_length(self, *_: Any) -> Any:
        """Logical length (a tensor once the layer runs)."""
        return upstream.fixed_length(self) + self.gone if self.is_initialized else 0

    def total(self, _query: int) -> int:
        """Full logical length."""
        return self.logical_max

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
        if isinstance(new, PrunedSlidingLayer):
            new.adopt()
        cache.layers[i] = layer = new
    return layer


def held_by(cache: AnyCache | None, i: int) -> Pruned | None:
    """Return layer ``i`` of ``cache`` if it is a reduced one."""
    if cache is None or i >= len(cache.layers):
        return None
    layer = cache.layers[i]
    return layer if isinstance(layer, Pruned) and layer.cols is not None else None  # (emptied, it is like a plain one)


def promised(cache: AnyCache | None, i: int, physical: int, logical: int) -> str:
    """Return what is wrong with layer ``i`` of a cache that should store ``physical`` tokens and report ``logical``, or ``""``."""
    layer = held_by(cache, i)
    if layer is None:
        kind = type(cache.layers[i]).__name__ if cache is not None and i < len(cache.layers) else "missing"
        return f"its cache layer is not vtc's ({kind})"
    if isinstance(layer, PrunedStaticLayer):  # its length is a tensor, for which a GPU would be waited
        fits = layer.physical() == layer.logical_max - layer.gone
        return "" if fits else f"its buffers have {layer.physical()} slots and should have {layer.logical_max - layer.gone}"
    if layer.stored() + layer.skip != physical:
        return f"its cache stores {layer.stored() + layer.skip} tokens and should store {physical}"
    if layer.get_seq_length() != logical:
        return f"its cache reports {layer.get_seq_length()} tokens and should report {logical}"
    return ""
