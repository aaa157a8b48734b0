"""The language-model side: BOUNDARY and DECODER reducers, and the one owner of compaction.

Outside the decoder layers everything stays logical; inside, hidden states, RoPE rows, masks and KV caches hold the survivors only
(see :mod:`vtc.engine.cache`). Per-forward state is a :class:`Context` that travels down to the layers as a keyword argument, so
threads, gradient checkpointing and compiled forwards see one consistent decision.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from vtc import compat
from vtc.core import Kind, Layout, Need, Reducer, Selection, Signals, Stage
from vtc.engine import taps
from vtc.engine.cache import _Pruned, check_cache, pruned_layer
from vtc.engine.segment import Segment, cut, remap_mask, take
from vtc.engine.tower import MADE, TowerSide, VisionRecord, add_newlines
from vtc.errors import NotReducedError, UnsupportedFeatureError
from vtc.families.base import Family
from vtc.signals import AttentionTap, StateTap
from vtc.stats import SHORT, CallStats, Clock, ImageStats, KeptTokens, StageStats, StatsLog
from vtc.views import ask

_CURRENT: contextvars.ContextVar[Context | None] = contextvars.ContextVar("vtc_context", default=None)
_INSIDE: contextvars.ContextVar[Context | None] = contextvars.ContextVar("vtc_inside", default=None)  # modules get no kwargs
# by "is a video"
_FEATURE_ARGUMENTS = {False: ("pixel_values", "image_patches", "image_hidden_states"), True: ("pixel_values_videos",)}


@dataclass(eq=False)
class Instance:
    """One image in one batch row (beams repeat rows, so one image may have several instances).

    Attributes
    ----------
    row : int
        Batch row.
    image : int
        Index into the vision record.
    record : VisionRecord
        That record: of the call's images, or of its videos.
    columns : Tensor
        ``(slots,)`` logical column of every slot.
    layout : Layout
        Slot layout.
    entries : Tensor
        ``(n,)`` slots still alive, ascending.
    stages : list of StageStats
        What reducers did to it.
    merges : list
        What merging reducers did to it, for pictures.
    """

    row: int
    image: int
    record: VisionRecord
    columns: Tensor
    layout: Layout
    entries: Tensor
    stages: list[StageStats]
    merges: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class Context:
    """State of one forward of the text model."""

    visual: Tensor | None = None  # (B, q) bool; None: no new visual tokens in this forward
    real: Tensor | None = None  # (B, q) bool, not padding
    q: int = 0
    places: dict[bool, Tensor] = field(default_factory=dict)  # "are videos" -> (B, q) bool: their part of `visual`
    records: dict[bool, VisionRecord] = field(default_factory=dict)  # the same key
    instances: list[Instance] = field(default_factory=list)
    keep: dict[int, tuple[Segment | None, Tensor | None]] = field(default_factory=dict)  # replayed on recomputation
    current: Segment | None = None
    memo: list[tuple[Any, tuple[Any, ...], Any]] = field(default_factory=list)
    tapped: dict[tuple[str, str, int], tuple[Tensor, Segment | None, int]] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    per_layer: list[list[int]] = field(default_factory=list)  # [layer][instance] visual tokens
    clock: Clock | None = None  # prefill only: dynamo cannot trace its construction, and decode must compile
    rope: tuple[Tensor, Tensor] | None = None  # rotations of the layer that runs
    static: bool = False  # its keys come with empty slots behind them
    step: _Step | None = None  # decode: what the layer before was given

    def once(self, key: Any, refs: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Make a value once per forward: consecutive layers need the same mask and RoPE rows. Compared by identity."""
        for k, r, value in self.memo:
            if k == key and all(a is b for a, b in zip(r, refs, strict=True)):
                return value
        self.memo.append((key, refs, make()))
        return self.memo[-1][2]


@dataclass(eq=False)
class _Step:
    """What one decoder layer was given in a decode step: the next layer gets the same if its cache and inputs are the same."""

    held: tuple[Any, ...]  # cols, valid, shift and end of the cache layer
    given: dict[str, Any]  # arguments as they came
    changed: dict[str, Any]  # and as they went on

    @staticmethod
    def state(layer: _Pruned) -> tuple[Any, ...]:
        """What a reduced cache layer's mask and positions depend on."""
        return layer.cols, layer.valid, layer.shift, layer.end

    def fits(self, layer: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a layer with this cache and these arguments gets the same."""
        return (
            isinstance(layer, _Pruned)
            and layer.cols is self.held[0]
            and layer.valid is self.held[1]
            and layer.shift is self.held[2]
            and layer.end == self.held[3]
            and all(kwargs.get(k) is v for k, v in self.given.items())
        )


class _Preview:
    """Stands in the place of the context where a layer's forward runs only up to its attention."""


class _Seen(Exception):  # noqa: N818  carries a result, not a mishap
    """q, k, v and scaling of an attention that was only looked at."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = parts


class TextSide:
    """Hooks on one model's multimodal base, text model and decoder layers."""

    def __init__(self, family: Family, parts: tuple[Reducer, ...], tower: TowerSide, stats: StatsLog, strict: bool) -> None:
        self.family, self.facts, self.tower, self.stats, self.strict = family, family.facts, tower, stats, strict
        self.parts = parts
        self.running: dict[int, bool] = {}  # threads inside a forward
        self.boundary = [p for p in parts if p.stage is Stage.BOUNDARY]
        self.decoder: dict[int, list[Reducer]] = {}
        for p in parts:
            if p.stage is Stage.DECODER:
                self.decoder.setdefault(p.layer, []).append(p)
        self.needs: dict[int, list[Need]] = {}
        self.notes: dict[int, str] = {}  # part -> substituted signals
        self.looks: dict[int, list[Need]] = {}  # taken when a layer is entered, before its reducers act
        self.inside: dict[int, list[Need]] = {}  # taken from the modules of a layer
        for p in parts:
            for need in p.needs:
                used = need.resolve(self.facts.provides)
                if used != need:
                    self.notes[id(p)] = (
                        f"{need.name}: this tower lacks '{need.requires}', {used.measure.__name__.strip('_')} used"
                    )
                if need.source == "text":
                    self.want(used)
        self.token_ids = {False: family.image_token_ids, True: family.video_token_ids}
        self.undo: list[Callable[[], None]] = []

    def want(self, need: Need) -> None:
        """Note a signal, and first those its measure reads."""
        for other in need.uses:
            self.want(other)
        layer = need.layer if need.layer >= 0 else self.facts.layers + need.layer
        place = self.needs if need.of == "attention" else self.looks if need.of in ("preview", "hidden") else self.inside
        if need not in place.setdefault(layer, []):
            place[layer].append(need)

    # ----------------------------------------------------------------------------------------------------- installing
    def install(self) -> None:
        """Put all hooks on; :meth:`remove` takes them off, also after a failure half-way."""
        family = self.family
        self.tower.on_record = self.on_record
        hooks = [
            family.base.register_forward_pre_hook(self.before_base, with_kwargs=True),
            family.base.register_forward_hook(self.after_base, with_kwargs=True, always_call=True),
            family.text.register_forward_pre_hook(self.before_text, with_kwargs=True),
            family.text.register_forward_hook(self.after_text, with_kwargs=True),
        ]
        hooks += [
            layer.register_forward_pre_hook(functools.partial(self.before_layer, i), with_kwargs=True)
            for i, layer in enumerate(family.layers)
        ]
        self.undo += [h.remove for h in hooks]
        for i in sorted({*self.needs, *(i for i, wanted in self.looks.items() if any(n.of == "preview" for n in wanted))}):
            self.undo.append(taps.attach(family.text_attention[i], functools.partial(self.observe, i)))
        for i, wanted in self.inside.items():
            self.undo += self.watch_modules(i, {n.of for n in wanted})

    def remove(self) -> None:
        """Take all hooks off, in reverse order."""
        while self.undo:
            self.undo.pop()()

    @staticmethod
    def on_record(record: VisionRecord) -> None:
        """Take the vision record of a forward that encodes its own images."""
        ctx = _CURRENT.get()
        if ctx is not None:
            ctx.records[record.video] = record

    # ------------------------------------------------------------------------------------------ multimodal base model
    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the visual tokens and the padding of this call; refuse what cannot work before anything runs."""
        if not torch.compiler.is_compiling():  # (a graph break, and a compiled decode step cannot be interrupted)
            self.running[threading.get_ident()] = True
        call = kwargs
        if args:
            call = dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)) | kwargs
        encoded = call.get("mm_encoder_outputs")
        encoded = encoded if isinstance(encoded, dict) else {}
        made = {False: encoded.get("image"), True: encoded.get("video")}
        given = [v for v, n in _FEATURE_ARGUMENTS.items() if made[v] is not None or any(call.get(k) is not None for k in n)]
        if not given:
            return  # a decode step or a text-only prompt (an image token *generated* in decode is not visual)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if ids is None and embeds is None:
            return
        places = {video: self.placeholders(ids, embeds, self.token_ids[video]) for video in given}
        visual = torch.stack(list(places.values())).any(0)
        check_cache(call.get("past_key_values"))
        taps.check_implementation(self.family.text.config)
        if any(k.startswith("cu_seq_lens") and v is not None for k, v in call.items()):
            raise UnsupportedFeatureError("packed sequences (cu_seq_lens_*) cannot be shortened: pass padded batches")
        real = self.real_tokens(call, visual)
        if not bool(visual.any()):
            return
        places = {video: place & real for video, place in places.items()}
        ctx = Context(visual & real, real, visual.shape[1], places, clock=Clock())
        for video, features in made.items():
            if features is not None:  # encoded by generate before this forward
                lost = next((r for r in MADE.get() or () if r.video == video), None)
                record = getattr(features, "vtc", lost)
                ctx.records |= {} if record is None else {video: record}
        _CURRENT.set(ctx)  # not in decode steps: setting a ContextVar breaks compiled graphs

    def placeholders(self, ids: Tensor | None, embeds: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """Boolean ``(B, q)``: where one of the placeholder ``tokens`` is, found by ids or, as the models do, by embeddings."""
        if ids is not None:
            return torch.isin(ids, torch.tensor(tokens, device=ids.device))
        table = self.family.text.get_input_embeddings()
        marks = [table(torch.tensor(t, device=embeds.device)) for t in tokens]
        return torch.stack([(embeds == m).all(-1) for m in marks]).any(0)

    @staticmethod
    def real_tokens(call: dict[str, Any], visual: Tensor) -> Tensor:
        """Boolean ``(B, q)``: not padding."""
        mask, cache, q = call.get("attention_mask"), call.get("past_key_values"), visual.shape[1]
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        if not isinstance(mask, Tensor):
            return torch.ones_like(visual)
        if mask.dim() == 2:
            return mask[:, -q:].bool()
        seen = int(cache.get_seq_length()) if cache is not None else 0  # 4-D: what the last token may attend to
        last = mask[:, 0, -1, seen : seen + q]
        last = last if mask.dtype == torch.bool else last > -1
        return (last | ~last.any(1, keepdim=True)).expand(visual.shape)

    def after_base(self, _module: nn.Module, _args: Any, _kwargs: Any, _out: Any) -> None:
        """Leave no context behind, also when the forward raised."""
        if self.running:
            self.running.pop(threading.get_ident(), None)
        if self.inside and _INSIDE.get() is not None:
            _INSIDE.set(None)
        if _CURRENT.get() is not None:
            _CURRENT.set(None)

    # ---------------------------------------------------------------------------------------------------- text model
    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the BOUNDARY reducers and hand the context down to the layers."""
        ctx = _CURRENT.get()
        embeds = kwargs.get("inputs_embeds")
        if ctx is None:
            tokens = embeds if embeds is not None else (args[0] if args else kwargs["input_ids"])
            cache = kwargs.get("past_key_values")
            if tokens.shape[1] > 1 and (cache is None or cache.get_seq_length() == 0):
                self.stats.append(CallStats(text_only=True))
            shortcut = self.shortcut(kwargs, tokens)
            if shortcut is not None:
                return args, shortcut
            ctx = Context(q=tokens.shape[1])
        else:
            _CURRENT.set(None)
            kwargs = dict(kwargs)
            ctx.visual, ctx.real = ctx.visual.to(embeds.device), ctx.real.to(embeds.device)
            kwargs["inputs_embeds"] = self.reduce_inputs(ctx, embeds)
            if ctx.current is not None and self.family.between_layers is not None:
                kwargs |= shorten_between(ctx.current, kwargs, *self.family.between_layers)
        return args, {**kwargs, "_vtc": ctx}

    def shortcut(self, kwargs: dict[str, Any], tokens: Tensor) -> dict[str, Any] | None:
        """Return keyword arguments with which a forward without new images needs no work in the layers, or None.

        That is the case without a reduced cache, and in the usual decode step: one token, no padding, and either original positions
        or one shift for all layers, which is then applied here once.
        """
        cache = kwargs.get("past_key_values")
        layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, _Pruned)]
        if not layers:
            return kwargs
        first = layers[0]
        implementation = self.family.text.config._attn_implementation or "eager"
        if (
            tokens.shape[1] != 1
            or kwargs.get("attention_mask") is not None
            or not ("sdpa" in implementation or "flash" in implementation)
            or isinstance(first, StaticLayer)
            or any(layer.valid is not None or getattr(layer, "is_sliding", False) for layer in layers)
        ):
            return None
        if all(layer.shift is None for layer in layers):
            return kwargs
        if len(layers) != len(cache.layers) or any(layer.shift is not first.shift for layer in layers):
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((tokens.shape[0], 1), first.get_seq_length(), device=tokens.device)
        return {**kwargs, "position_ids": positions - first.shift[:, None].to(positions.device)}

    def find_instances(self, ctx: Context) -> None:
        """Match the images of the vision record with the runs of placeholder tokens."""
        for video, visual in ctx.places.items():
            visual = visual.to(ctx.visual.device)
            if video not in ctx.records:
                if not visual.any():
                    continue
                raise UnsupportedFeatureError(
                    f"the {'video' if video else 'image'} features of this call were not made by the patched model (encoded before "
                    "vtc.patch, or a prompt processed in chunks): pass the pixels, or encode after patching"
                )
            self.match(ctx, ctx.records[video], visual)

    def match(self, ctx: Context, record: VisionRecord, visual: Tensor) -> None:
        """Give every image (or video) of a record its placeholders, in order."""
        total, found = sum(record.lengths), int(visual.sum())
        if not total or not found or found % total:
            raise UnsupportedFeatureError(
                f"the prompt has {found} visual tokens and the images {total}: padding must not hide image tokens"
            )
        repeat = found // total  # beams and num_return_sequences repeat rows
        rows, columns = visual[::repeat].nonzero(as_tuple=True)
        row_list = rows.tolist()
        start = 0
        for image, layout in enumerate(record.slots):
            end = start + len(layout)
            if end == start:
                continue
            if row_list[start] != row_list[end - 1]:
                raise UnsupportedFeatureError("an image's placeholder tokens are spread over two batch rows: check the prompt")
            for r in range(repeat):
                ctx.instances.append(
                    Instance(
                        row_list[start] * repeat + r,
                        image,
                        record,
                        columns[start:end],
                        layout,
                        record.entries[image].to(visual.device),
                        list(record.stages[image]),
                        list(record.merges[image]),
                    )
                )
            start = end
        ctx.fired |= record.fired
        ctx.clock.add(record.clock)

    def reduce_inputs(self, ctx: Context, embeds: Tensor) -> Tensor:
        """Apply what the tower decided and the BOUNDARY reducers; return the (possibly merged) input embeddings."""
        self.find_instances(ctx)
        compact = any(p.position_policy == "compact" for p in self.parts if p.stage.in_tower)
        for part in self.boundary:
            with ctx.clock.span(embeds.device):
                writes = self.reduce(ctx, part, embeds, 0)
            embeds = write(embeds, writes)
            compact = compact or part.position_policy == "compact"
        keep = self.keep_table(ctx)
        if not bool((keep | ~ctx.real).all()):
            ctx.current, relative = cut(keep, ctx.real, None, compact)
            ctx.keep[0] = (ctx.current, relative)
        return embeds

    def keep_table(self, ctx: Context) -> Tensor:
        """Boolean ``(B, q)``: text, and the visual tokens still alive."""
        keep = ~ctx.visual
        for it in ctx.instances:
            keep[it.row, it.columns[it.entries]] = True
        return keep

    def reduce(self, ctx: Context, part: Reducer, hidden: Tensor, layer: int) -> list[tuple[int, Tensor, Tensor]]:
        """Ask one reducer about all images, one batch per geometry and count; update the instances.

        Returns ``(row, physical positions, new values)`` for every merged image.
        """
        groups: dict[tuple[int, int], list[Instance]] = {}
        shown: dict[int, Tensor] = {}
        for it in ctx.instances:
            candidates = it.entries
            asked = part.wanted(it.layout, self.facts)
            if not part.decides_itself and asked >= len(candidates):  # newlines included: nothing to do
                n = len(candidates)
                note = SHORT if asked > n or part.budget.exceeds(n) else ""
                it.stages.append(StageStats(part.name, part.stage.value, layer, n, n, asked, note))
                continue
            if part.newline_policy != "compete" and it.layout.has_newlines:
                candidates = candidates[it.layout.kind.to(candidates.device)[candidates] == Kind.PATCH]
            shown[id(it)] = candidates
            groups.setdefault((id(it.layout), len(candidates)), []).append(it)
        writes = []
        for (_, n), members in groups.items():
            entries = torch.stack([shown[id(it)] for it in members])
            rows = torch.tensor([it.row for it in members], device=hidden.device)
            columns = torch.stack([it.columns for it in members]).gather(1, entries)
            where = columns if ctx.current is None else ctx.current.inverse[rows[:, None], columns]
            slots = len(members[0].layout)
            signals = Signals(
                features=hidden[rows[:, None], where],
                layout=members[0].layout,
                entries=entries,
                budget=min(n, part.wanted(members[0].layout, self.facts)),
                slots=slots,
                taps=self.signals_of(ctx, part, members, rows, columns, entries),
                text=self.text_of(ctx, hidden)[0][rows] if part.wants_text else None,
                text_mask=self.text_of(ctx, hidden)[1][rows] if part.wants_text else None,
                fingerprint=tuple(it.record.fingerprint[it.image] for it in members) if part.wants_fingerprint else (),
            )
            selection = ask(part, signals.check(where_of(part, layer))) if n else Selection(entries[:, :0])
            for j, it in enumerate(members):
                at = selection.index[j]
                if selection.valid is not None:
                    at = at[selection.valid[j]]
                if selection.features is not None:
                    values = selection.features[j]
                    values = values if selection.valid is None else values[selection.valid[j]]
                    writes.append((it.row, where[j][at], values))
                if selection.owner is not None:
                    it.merges.append((shown[id(it)], selection.index[j], selection.owner[j]))
                before, kept = len(it.entries), shown[id(it)][at]
                it.entries = add_newlines(it.layout, kept, it.entries, part.newline_policy) if len(at) else kept
                asked = None if part.decides_itself else part.wanted(it.layout, self.facts)
                note = "; ".join(x for x in (self.notes.get(id(part), ""), selection.note) if x)
                it.stages.append(StageStats(part.name, part.stage.value, layer, before, len(it.entries), asked, note))
        ctx.fired.add(id(part))
        return writes

    def signals_of(
        self, ctx: Context, part: Reducer, members: list[Instance], rows: Tensor, columns: Tensor, entries: Tensor
    ) -> dict[str, Tensor]:
        """Narrow every signal the part needs to the candidates of ``members``."""
        out: dict[str, Tensor] = {}
        for need in part.needs:
            if need.source == "vision":
                stacked = torch.stack(
                    [it.record.signals[need.resolve(self.facts.provides).key][it.image] for it in members]
                ).to(entries.device)
                index = entries.view(*entries.shape, *[1] * (stacked.dim() - 2)).expand(-1, -1, *stacked.shape[2:])
                out[need.name] = stacked.gather(1, index)
                continue
            if need.key not in ctx.tapped:
                raise NotReducedError(
                    f"'{part.name}' needs '{need.name}' of decoder layer {need.layer}, which was not computed in this forward"
                )
            value, seg, offset = ctx.tapped[need.key]
            if need.axis == "row":
                out[need.name] = value[rows]
                continue
            at = columns if seg is None else seg.inverse[rows[:, None], columns]
            out[need.name] = value[rows[:, None], at + offset]
        return out

    def text_of(self, ctx: Context, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, T, D)`` hidden states of the prompt's text tokens at this place, left-aligned, and their validity."""

        def make() -> tuple[Tensor, Tensor]:
            visual, valid, _ = self.tokens_of(ctx, ctx.current)
            text = valid & ~visual
            order = torch.argsort((~text).to(torch.int8), dim=1, stable=True)[:, : int(text.sum(1).max())]
            return take(hidden, order, 1), text.gather(1, order)

        return ctx.once("text", (hidden, ctx.current), make)

    def after_text(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Expand the last hidden states to logical length, and account for what happened.

        A dropped slot shows the last kept token before it: the one that predicts the next text token.
        """
        ctx = kwargs.get("_vtc")
        if ctx is None or ctx.visual is None:
            return out
        self.account(ctx)
        seg = ctx.current
        if seg is None:
            return out
        p = seg.rows.shape[1]
        held = seg.inverse >= 0
        first = 0 if seg.valid is None else p - seg.valid.sum(1, keepdim=True)
        index = (held.cumsum(1) - 1 + first).clamp(min=0)
        if isinstance(out, tuple):
            return (take(out[0], index, 1), *out[1:])
        out.last_hidden_state = take(out.last_hidden_state, index, 1)
        return out

    def account(self, ctx: Context) -> None:
        """Write the statistics; complain about a part that did not act."""
        missing = [p for p in self.parts if id(p) not in ctx.fired]
        call = CallStats(_clock=ctx.clock)
        for n, it in enumerate(ctx.instances):
            per_layer = [counts[n] for counts in ctx.per_layer]
            kept = per_layer[-1] if per_layer else len(it.entries)
            call.images.append(ImageStats(it.row, len(it.layout), kept, per_layer, it.stages, not missing))
        self.stats.append(call)
        self.stats.kept = [KeptTokens(it.row, it.layout, it.entries, it.merges) for it in ctx.instances]
        if missing:
            message = (
                f"{', '.join(sorted({repr(p.name) for p in missing}))} did not act on a call with images "
                f"(stage {missing[0].stage.value}): the model ran without the expected hook; report this, or pass strict=False"
            )
            if self.strict:
                raise NotReducedError(message)
            warnings.warn(message, stacklevel=2)

    # -------------------------------------------------------------------------------------------------- decoder layers
    def before_layer(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the DECODER reducers of layer ``i``; give the layer its shorter inputs, mask, RoPE rows and cache entry."""
        ctx = kwargs.get("_vtc")
        if ctx is None:
            return None
        if ctx.step is not None and i not in self.needs:
            held = kwargs["past_key_values"].layers
            if i < len(held) and ctx.step.fits(held[i], kwargs):
                kwargs = {**kwargs, **ctx.step.changed}
                del kwargs["_vtc"]
                return args, kwargs
        asked = kwargs
        kwargs = dict(kwargs)
        fresh = ctx.visual is not None and not (i in ctx.keep and i < len(ctx.per_layer))  # not a recomputation
        if i in self.needs and fresh:
            held = getattr(kwargs.get("past_key_values"), "layers", ())
            ctx.static = i < len(held) and isinstance(held[i], StaticLayer)
        if self.inside and fresh:
            _INSIDE.set(ctx if i in self.inside else None)
        if i not in self.needs:  # only tapped attentions want it
            del kwargs["_vtc"]
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        seg: Segment | None = None
        if ctx.visual is not None:
            if i in self.looks and fresh:
                self.look(ctx, i, module, kwargs, hidden)
            hidden, seg = self.enter(ctx, i, hidden)
        layer = None
        if seg is not None and cache is not None:
            layer = pruned_layer(cache, i)
            before = layer.shift
            layer.begin(seg, ctx.q)
            cols, valid, total = layer.cols, layer.valid, getattr(layer, "logical_max", layer.end)
        elif seg is not None:
            before, cols, valid, total = None, seg.rows, seg.valid, ctx.q
        elif cache is not None and i < len(cache.layers) and isinstance(cache.layers[i], _Pruned):
            layer = cache.layers[i]
            before = layer.shift
            total = layer.get_mask_sizes(ctx.q)[0]
            if kwargs.get("attention_mask") is None and layer.valid is None:
                cols, valid = layer.cols, None  # nothing to remap: the columns are not looked at
            else:
                cols, valid = ctx.once(("columns", layer.stored()), (layer.cols,), functools.partial(layer.columns, ctx.q))
        else:
            if i in self.needs:
                ctx.rope = rope_of(module, kwargs)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        mask = kwargs.get("attention_mask")
        if mask is not None or valid is not None:
            implementation = self.family.text.config._attn_implementation or "eager"
            static = isinstance(layer, StaticLayer)
            if static and "flash" in implementation:
                raise UnsupportedFeatureError(
                    "a static cache with FlashAttention cannot hold a reduced sequence: use the default DynamicCache"
                )
            kwargs["attention_mask"] = ctx.once(
                ("mask", hidden.device),
                (mask, cols, seg),
                lambda: remap_mask(
                    mask,
                    seg,
                    cols.to(hidden.device),
                    None if valid is None else valid.to(hidden.device),
                    total=total,
                    q=ctx.q,
                    implementation=implementation,
                    dtype=hidden.dtype,
                    device=hidden.device,
                    static=static,
                ),
            )
        self.rotate(ctx, i, kwargs, hidden, seg, before)
        if i in self.needs:
            ctx.rope = rope_of(module, kwargs)
        kwargs["position_ids"] = None  # inside a layer these only serve packed-sequence detection: never right here
        if ctx.visual is None and not isinstance(layer, StaticLayer):  # (static layers run compiled: nothing to save there)
            names = ["attention_mask", "position_ids", *(k for k in asked if k.startswith("position_embeddings"))]
            ctx.step = _Step(_Step.state(layer), {k: asked.get(k) for k in names}, {k: kwargs[k] for k in names if k in kwargs})
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def enter(self, ctx: Context, i: int, hidden: Tensor) -> tuple[Tensor, Segment | None]:
        """Decide (or replay) what layer ``i`` holds; return its hidden states and segment."""
        replay = i in ctx.keep and i < len(ctx.per_layer)
        if not replay:
            if i in self.decoder:
                compact, layer = False, self.family.layers[i]
                # a recomputation that runs hooks again replays the decision: choosing must leave nothing for the backward
                again = layer.training and getattr(layer, "gradient_checkpointing", False) and compat.checkpoint_repeats_hooks()
                for part in self.decoder[i]:
                    with ctx.clock.span(hidden.device), torch.set_grad_enabled(torch.is_grad_enabled() and not again):
                        writes = self.reduce(ctx, part, hidden, i)
                    if writes and again:
                        raise UnsupportedFeatureError(
                            "gradient checkpointing with a reducer that merges tokens inside the decoder needs transformers >= "
                            "5.2, where hooks are not run again: upgrade, or disable gradient checkpointing"
                        )
                    hidden = write(hidden, writes)
                    compact = compact or part.position_policy == "compact"
                ctx.keep[i] = (ctx.current, None)
                keep = self.keep_table(ctx)
                held = ctx.current
                table = ctx.real if held is None else held.inverse >= 0
                if bool((table & ~keep).any()):
                    ctx.current, relative = cut(keep, ctx.real, held, compact)
                    ctx.keep[i] = (ctx.current, relative)
            elif i not in ctx.keep:
                ctx.keep[i] = (ctx.current, None)
            if len(ctx.per_layer) == i:
                ctx.per_layer.append([len(it.entries) for it in ctx.instances])
        seg, relative = ctx.keep[i]
        if relative is not None:
            hidden = take(hidden, relative, 1)
        return hidden, seg

    def rotate(
        self, ctx: Context, i: int, kwargs: dict[str, Any], hidden: Tensor, seg: Segment | None, before: Tensor | None
    ) -> None:
        """Give the layer the RoPE rows of its tokens: gathered, or recomputed where positions are compacted."""
        tables = [k for k in kwargs if k.startswith("position_embeddings") and kwargs[k] is not None]
        if not tables:
            raise UnsupportedFeatureError("the decoder layers take no position_embeddings: this text model is not supported")
        delta = None if seg is None else seg.delta
        if before is None and delta is None:
            if seg is not None:
                for k in tables:
                    table = kwargs[k]
                    kwargs[k] = ctx.once(
                        ("rope", hidden.device),
                        (table, seg),
                        lambda table=table: tuple(take(t, seg.rows.to(t.device), t.dim() - 2) for t in table),
                    )
            return
        text = self.family.text
        kind = (getattr(text.config, "layer_types", None) or [None] * (i + 1))[i]
        extra = (kind,) if "layer_type" in _rope_parameters(type(text.rotary_emb)) else ()
        positions = kwargs["position_ids"]

        def make(rotary: nn.Module) -> tuple[Tensor, Tensor]:
            pos = positions.expand(hidden.shape[0], -1).to(hidden.device)
            if before is not None:  # tokens dropped in earlier forwards
                pos = pos - before[:, None].to(pos.device)
            if seg is not None:
                pos = pos.gather(1, seg.rows.to(pos.device))
                if delta is not None:
                    pos = pos - delta.to(pos.device)
            return rotary(hidden, pos.clamp(min=0), *extra)

        for k in tables:  # 4.57's Gemma 3 has two
            rotary = text.rotary_emb_local if k.endswith("_local") else text.rotary_emb
            kwargs[k] = ctx.once(("compact", k, kind, hidden.device), (seg, before), functools.partial(make, rotary))

    # ------------------------------------------------------------------------------------------------------ tapping
    def observe(
        self,
        i: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        ctx: Context | None,
    ) -> None:
        """Compute the signals wanted of decoder layer ``i`` (prefill with images only)."""
        if isinstance(ctx, _Preview):
            raise _Seen(query, key, value, scaling)
        if ctx is None or ctx.visual is None or i not in self.needs:
            return
        if all(need.key in ctx.tapped for need in self.needs[i]):  # a recomputation for the backward pass
            return
        with torch.no_grad(), ctx.clock.span(query.device):
            q = query.shape[2]
            seg = ctx.keep[i][0] if i in ctx.keep else None
            visual, valid, last = self.tokens_of(ctx, seg)
            if ctx.static:  # only ever empty before a prompt that is reduced
                key, value = key[:, :, :q], value[:, :, :q]
                mask = mask[..., :q] if isinstance(mask, Tensor) else mask
            keys = key.shape[2]
            full = mask
            if isinstance(mask, Tensor) and mask.dim() == 2:  # FlashAttention: padding only
                causal = (
                    torch.arange(keys, device=query.device)[None] <= (torch.arange(q, device=query.device) + keys - q)[:, None]
                )
                full = mask.bool()[:, None, None, :] & causal
            tap = AttentionTap(query, key, value, scaling, full, True, last, visual, valid, rope=ctx.rope)
            for need in self.needs[i]:
                own = replace(tap, given=self.given(ctx, need, seg)) if need.uses else tap
                ctx.tapped[need.key] = (need.measure(own), seg, keys - q)

    @staticmethod
    def tokens_of(ctx: Context, seg: Segment | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``visual (B, P)``, ``valid (B, P)`` and ``last (B,)`` of the tokens a layer holds."""
        if seg is None:
            visual, valid = ctx.visual, ctx.real
        else:
            valid = torch.ones_like(seg.rows, dtype=torch.bool) if seg.valid is None else seg.valid
            visual = ctx.visual.gather(1, seg.rows) & valid
        index = torch.arange(valid.shape[1], device=valid.device)
        return visual, valid, torch.where(valid, index, -1).max(1).values

    @staticmethod
    def given(ctx: Context, need: Need, seg: Segment | None) -> dict[str, Tensor]:
        """Return the earlier signals ``need`` reads, narrowed to the tokens of ``seg``."""
        out = {}
        for other in need.uses:
            value, held, offset = ctx.tapped[other.key]
            if other.axis == "keys":
                rows = torch.arange(ctx.q, device=value.device).expand(value.shape[0], -1) if seg is None else seg.rows
                at = rows if held is None else held.inverse.gather(1, rows).clamp(min=0)  # padding was held nowhere
                value = take(value, at + offset, 1)
            out[other.name] = value
        return out

    def look(self, ctx: Context, i: int, layer: nn.Module, kwargs: dict[str, Any], hidden: Tensor) -> None:
        """Compute the signals that layer ``i`` gives of the tokens there before its reducers act.

        Tokens of earlier forwards (a KV cache handed in) have no part in a preview.
        """
        seg = ctx.current
        with torch.no_grad(), ctx.clock.span(hidden.device):
            if i in ctx.keep and ctx.keep[i][1] is not None:  # layer 0, after a cut at the boundary
                hidden = take(hidden, ctx.keep[i][1], 1)
            visual, valid, last = self.tokens_of(ctx, seg)
            state = StateTap(hidden, last, visual, valid, self.family.text.norm)
            ahead: AttentionTap | None = None
            for need in self.looks[i]:
                if need.of == "hidden":
                    tap: Any = state
                else:
                    if ahead is None:
                        ahead = self.preview(ctx, i, layer, kwargs, hidden, seg)
                    tap = ahead
                ctx.tapped[need.key] = (need.measure(replace(tap, given=self.given(ctx, need, seg))), seg, 0)

    def preview(
        self, ctx: Context, i: int, layer: nn.Module, kwargs: dict[str, Any], hidden: Tensor, seg: Segment | None
    ) -> AttentionTap:
        """Return q, k, v of layer ``i`` for ``hidden``: its forward runs up to the attention, and without the KV cache."""
        cache, before = kwargs.get("past_key_values"), None
        if cache is not None and i < len(cache.layers) and isinstance(cache.layers[i], _Pruned):
            before = cache.layers[i].shift
        own = {k: v for k, v in kwargs.items() if k.startswith("position_embeddings")}
        own["position_ids"] = kwargs.get("position_ids")
        self.rotate(ctx, i, own, hidden, seg, before)
        own["position_ids"] = None
        try:
            layer.forward(hidden, attention_mask=None, past_key_values=None, use_cache=False, _vtc=_Preview(), **own)
        except _Seen as seen:
            query, key, value, scaling = seen.parts
        else:
            raise UnsupportedFeatureError(
                f"decoder layer {i} did not call its attention: this text model's layers cannot be looked into"
            )
        visual, valid, last = self.tokens_of(ctx, seg)
        mask = None
        if not bool(valid.all()):
            at = torch.arange(valid.shape[1], device=valid.device)
            # padding rows see themselves: no empty softmax row
            mask = ((at <= at[:, None]) & (valid[:, None, :] | (at == at[:, None])))[:, None]
        return AttentionTap(query, key, value, scaling, mask, True, last, visual, valid, rope=rope_of(layer, own))

    def watch_modules(self, i: int, places: set[str]) -> list[Callable[[], None]]:
        """Hook the modules of layer ``i`` that the signals of ``places`` come from; return what takes the hooks off."""
        mlp = getattr(self.family.layers[i], "mlp", None)
        modules = {
            "attention_update": self.family.text_attention[i],
            "mlp_update": mlp,
            "neurons": getattr(mlp, "down_proj", None),
        }
        off = []
        for place in sorted(places):
            if modules[place] is None:
                raise UnsupportedFeatureError(
                    f"decoder layer {i} has no module for '{place}' signals: this text model's MLP is not of a known form"
                )
            hook = functools.partial(self.observe_module, i, place)
            off.append(modules[place].register_forward_hook(hook, with_kwargs=True).remove)
        return off

    def observe_module(
        self, i: int, place: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Compute the signals of one module of decoder layer ``i`` (prefill with images only)."""
        ctx = _INSIDE.get()
        if ctx is None:
            return
        before = args[0] if args else kwargs["hidden_states"]
        hidden = before if place == "neurons" else out[0] if isinstance(out, tuple) else out
        with torch.no_grad(), ctx.clock.span(hidden.device):
            seg = ctx.keep[i][0]
            visual, valid, last = self.tokens_of(ctx, seg)
            tap = StateTap(hidden, last, visual, valid, self.family.text.norm, before=before)
            for need in self.inside[i]:
                if need.of == place:
                    own = replace(tap, given=self.given(ctx, need, seg)) if need.uses else tap
                    ctx.tapped[need.key] = (need.measure(own), seg, 0)


def where_of(part: Reducer, layer: int) -> str:
    """Name a place for an error message."""
    return (
        f"decoder layer {layer} ('{part.name}')" if part.stage is Stage.DECODER else f"the {part.stage.value} ('{part.name}')"
    )


def write(hidden: Tensor, writes: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Return ``hidden`` with merged values at their places (out of place: gradients flow to both)."""
    if not writes:
        return hidden
    rows = torch.cat([torch.full_like(at, row) for row, at, _ in writes])
    at = torch.cat([at for _, at, _ in writes])
    values = torch.cat([v for _, _, v in writes]).to(hidden.dtype)
    return hidden.index_put((rows, at), values)


def shorten_between(seg: Segment, kwargs: dict[str, Any], rows: str, values: str) -> dict[str, Any]:
    """Narrow what a text model adds to its visual tokens between layers: the mask of their rows and the values for each layer."""
    mask = kwargs.get(rows)
    if mask is None:
        return {}
    mask = mask.to(seg.rows.device)
    short = mask.gather(1, seg.rows)
    short = short if seg.valid is None else short & seg.valid
    kept = (seg.inverse >= 0)[mask]
    return {rows: short, values: [v[kept.to(v.device)] for v in kwargs[values]]}


def rope_of(layer: nn.Module, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the cosines and sines ``(B or 1, q, d)`` that a decoder layer's queries and keys are rotated by."""
    tables = {k: v for k, v in kwargs.items() if k.startswith("position_embeddings") and v is not None}
    if len(tables) > 1:  # 4.57's Gemma 3 hands both kinds to every layer
        local = getattr(layer.self_attn, "is_sliding", False)
        tables = {k: v for k, v in tables.items() if k.endswith("_local") == local}
    table = next(iter(tables.values()), None)
    return None if table is None else compat.one_rotation(table, layer.self_attn)


@functools.cache
def _rope_parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)
