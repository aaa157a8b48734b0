"""The language-model side: BOUNDARY and DECODER reducers, and the one owner of compaction.

Outside the decoder layers everything stays logical; inside, hidden states, RoPE rows, masks and KV caches hold the survivors only
(see :mod:`vtc.engine.cache`). Per-forward state is a :class:`Context` that travels down to the layers as a keyword argument, so
threads, gradient checkpointing and compiled forwards see one consistent decision.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from vtc import compat
from vtc.core import Reducer, Stage, settle
from vtc.engine import taps
from vtc.engine.cache import _Pruned, check_cache, pruned_layer
from vtc.engine.choose import Chooser, find_instances, keep_table, write
from vtc.engine.context import CURRENT, Context, Step
from vtc.engine.listen import TextTaps
from vtc.engine.rope import rope_of, rotate
from vtc.engine.segment import Segment, cut, remap_mask
from vtc.engine.tower import MADE, TowerSide, VisionRecord
from vtc.errors import NotReducedError, UnsupportedFeatureError
from vtc.families.base import Family
from vtc.kernels import take
from vtc.signals import question_of
from vtc.stats import CallStats, Clock, ImageStats, KeptTokens, StatsLog

# by "is a video"
_FEATURE_ARGUMENTS = {False: ("pixel_values", "image_patches", "image_hidden_states"), True: ("pixel_values_videos",)}


class TextSide:
    """Hooks on one model's multimodal base, text model and decoder layers."""

    def __init__(self, family: Family, parts: tuple[Reducer, ...], tower: TowerSide, stats: StatsLog, strict: bool) -> None:
        self.family, self.tower, self.stats, self.strict = family, tower, stats, strict
        self.parts = parts
        self.running: dict[int, bool] = {}  # threads inside a forward
        self.boundary = [p for p in parts if p.stage is Stage.BOUNDARY]
        self.decoder: dict[int, list[Reducer]] = {}
        for p in parts:
            if p.stage is Stage.DECODER:
                self.decoder.setdefault(p.layer, []).append(p)
        self.taps = TextTaps(family, parts)
        self.chooser = Chooser(self.taps, parts)
        self.token_ids = {False: family.image_token_ids, True: family.video_token_ids}
        self.undo: list[Callable[[], None]] = []

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
        self.taps.install(self.undo)

    def remove(self) -> None:
        """Take all hooks off, in reverse order."""
        while self.undo:
            self.undo.pop()()

    @staticmethod
    def on_record(record: VisionRecord) -> bool:
        """Take the vision record of a forward that encodes its own images; return whether this is one."""
        ctx = CURRENT.get()
        if ctx is not None:
            ctx.records[record.video] = record
        return ctx is not None

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
        check_cache(call.get("past_key_values"))
        taps.check_implementation(self.family.text.config)
        if any(k.startswith("cu_seq_lens") and v is not None for k, v in call.items()):
            raise UnsupportedFeatureError("packed sequences (cu_seq_lens_*) cannot be shortened: pass padded batches")
        # the host's one look at ids and padding, while a GPU has little to do yet
        found = {video: self.placeholders(ids, embeds, self.token_ids[video]) for video in given}
        image = torch.stack(list(found.values())).any(0)
        if not bool(image.any()):
            return
        real = self.real_tokens(call, image.shape)
        text, held = (real & ~image).sum(1).tolist(), real.sum(1).tolist()
        ctx = Context(
            visual=image & real,
            real=real,
            q=image.shape[1],
            padded=sum(held) < real.numel(),
            places={video: place & real for video, place in found.items()},
            text=text,
            held=held,
            clock=Clock(),
        )
        if self.taps.needs or self.taps.looks or self.taps.inside:
            ctx.longest = max(text), int(question_of(ctx.visual, real).sum(1).max())
        for video, features in made.items():
            if features is not None:  # encoded by generate before this forward
                lost = next((r for r in MADE.get() or () if r.video == video), None)
                record = getattr(features, "vtc", lost)
                ctx.records |= {} if record is None else {video: record}
        CURRENT.set(ctx)  # not in decode steps: setting a ContextVar breaks compiled graphs

    def placeholders(self, ids: Tensor | None, embeds: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """Boolean ``(B, q)``, on the CPU: where one of the ``tokens`` is, by ids or, as the models do, by embeddings."""
        if ids is not None:
            return torch.isin(ids.cpu(), torch.tensor(tokens))
        table = self.family.text.get_input_embeddings()
        marks = [table(torch.full((), t, device=embeds.device)) for t in tokens]
        return torch.stack([(embeds == m).all(-1) for m in marks]).any(0).cpu()

    @staticmethod
    def real_tokens(call: dict[str, Any], shape: torch.Size) -> Tensor:
        """Boolean ``(B, q)``, on the CPU: not padding."""
        mask, cache, q = call.get("attention_mask"), call.get("past_key_values"), shape[1]
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        if not isinstance(mask, Tensor):
            return torch.ones(shape, dtype=torch.bool)
        if mask.dim() == 2:
            return mask[:, -q:].cpu().bool()
        seen = int(cache.get_seq_length()) if cache is not None else 0  # 4-D: what the last token may attend to
        last = mask[:, 0, -1, seen : seen + q].cpu()
        last = last if mask.dtype == torch.bool else last > -1
        return (last | ~last.any(1, keepdim=True)).expand(shape)

    def after_base(self, _module: nn.Module, _args: Any, _kwargs: Any, _out: Any) -> None:
        """Leave no context behind, also when the forward raised."""
        if self.running:
            self.running.pop(threading.get_ident(), None)
        self.taps.left()
        if CURRENT.get() is not None:
            CURRENT.set(None)

    # ---------------------------------------------------------------------------------------------------- text model
    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the BOUNDARY reducers and hand the context down to the layers."""
        ctx = CURRENT.get()
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
            CURRENT.set(None)
            kwargs = dict(kwargs)
            ctx.visual, ctx.real = torch.stack([ctx.visual, ctx.real]).to(embeds.device, non_blocking=True)
            kwargs["inputs_embeds"] = self.reduce_inputs(ctx, embeds)
            if ctx.current is not None and self.family.between_layers is not None:
                kwargs |= shorten_between(ctx, kwargs, *self.family.between_layers)
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

    def reduce_inputs(self, ctx: Context, embeds: Tensor) -> Tensor:
        """Apply what the tower decided and the BOUNDARY reducers; return the (possibly merged) input embeddings."""
        find_instances(ctx)
        compact = any(p.position_policy == "compact" for p in self.parts if p.stage.in_tower)
        for part in self.boundary:
            with ctx.clock.span(embeds.device):
                writes = self.chooser.reduce(ctx, part, embeds, 0)
            embeds = write(embeds, writes)
            compact = compact or part.position_policy == "compact"
        if ctx.alive() != ctx.held:
            ctx.keep[0] = self.shorten(ctx, compact)
        return embeds

    def shorten(self, ctx: Context, compact: bool) -> tuple[Segment, Tensor]:
        """Let the layers from here on hold the tokens alive; return their segment, and their places in the one before."""
        ctx.held = ctx.alive()
        ctx.current, relative = cut(keep_table(ctx), ctx.held, ctx.real if ctx.padded else None, ctx.current, compact)
        return ctx.current, relative

    def after_text(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Expand the last hidden states to logical length, and account for what happened.

        A dropped slot shows the last kept token before it: the one that predicts the next text token.
        """
        ctx = kwargs.get("_vtc")
        if ctx is None or ctx.visual is None:
            return out
        if ctx.current is not None:
            index = ctx.current.rank.clamp(min=0)
            if isinstance(out, tuple):
                out = take(out[0], index, 1), *out[1:]
            else:
                out.last_hidden_state = take(out.last_hidden_state, index, 1)
        self.account(ctx)
        settle(ctx.answers)  # last: a GPU has its work by now
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
        if ctx.step is not None and ctx.visual is None and i not in self.taps.needs:
            held = kwargs["past_key_values"].layers
            if i < len(held) and isinstance(held[i], _Pruned) and ctx.step.fits(held[i], None, None, kwargs):
                kwargs = {**kwargs, **ctx.step.changed}
                del kwargs["_vtc"]
                return args, kwargs
        asked = kwargs
        kwargs = dict(kwargs)
        fresh = ctx.visual is not None and not (i in ctx.keep and i < len(ctx.per_layer))  # not a recomputation
        if i in self.taps.needs and fresh:
            held = getattr(kwargs.get("past_key_values"), "layers", ())
            ctx.static = i < len(held) and isinstance(held[i], StaticLayer)
        if fresh:
            self.taps.entered(i, ctx)
        if i not in self.taps.needs:  # only tapped attentions want it
            del kwargs["_vtc"]
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        seg: Segment | None = None
        if ctx.visual is not None:
            if i in self.taps.looks and fresh:
                self.taps.look(ctx, i, module, kwargs, hidden)
            hidden, seg = self.enter(ctx, i, hidden)
        layer = None
        if seg is not None and cache is not None:
            layer = pruned_layer(cache, i)
            before = layer.shift
            layer.begin(seg, ctx.q)
            if ctx.step is not None and ctx.step.fits(layer, seg, before, kwargs):
                kwargs |= ctx.step.changed
                if i in self.taps.needs:
                    ctx.rope = rope_of(module, kwargs)
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
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
            if i in self.taps.needs:
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
        rotate(self.family.text, ctx, i, kwargs, hidden, seg, before)
        if i in self.taps.needs:
            ctx.rope = rope_of(module, kwargs)
        kwargs["position_ids"] = None  # inside a layer these only serve packed-sequence detection: never right here
        if isinstance(layer, _Pruned) and not isinstance(layer, StaticLayer):  # (those run compiled: nothing to save there)
            names = ["attention_mask", "position_ids", *(k for k in asked if k.startswith("position_embeddings"))]
            given, changed = {k: asked.get(k) for k in names}, {k: kwargs[k] for k in names if k in kwargs}
            ctx.step = Step(layer, seg, before if seg is not None else None, given, changed)
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
                        writes = self.chooser.reduce(ctx, part, hidden, i)
                    if writes and again:
                        raise UnsupportedFeatureError(
                            "gradient checkpointing with a reducer that merges tokens inside the decoder needs transformers >= "
                            "5.2, where hooks are not run again: upgrade, or disable gradient checkpointing"
                        )
                    hidden = write(hidden, writes)
                    compact = compact or part.position_policy == "compact"
                ctx.keep[i] = self.shorten(ctx, compact) if ctx.alive() != ctx.held else (ctx.current, None)
            elif i not in ctx.keep:
                ctx.keep[i] = (ctx.current, None)
            if len(ctx.per_layer) == i:
                ctx.per_layer.append([len(it.entries) for it in ctx.instances])
        seg, relative = ctx.keep[i]
        if relative is not None:
            hidden = take(hidden, relative, 1)
        return hidden, seg


def shorten_between(ctx: Context, kwargs: dict[str, Any], rows: str, values: str) -> dict[str, Any]:
    """Narrow what a text model adds to its visual tokens between layers: the mask of their rows and the values for each layer."""
    mask, seg = kwargs.get(rows), ctx.current
    if mask is None:
        return {}
    short = mask.to(seg.rows.device).gather(1, seg.rows)
    short = short if seg.valid is None else short & seg.valid
    every = torch.stack(list(ctx.places.values())).any(0).flatten().nonzero()[:, 0]
    dropped = seg.inverse.flatten()[every.to(seg.rows.device, non_blocking=True)] < 0
    kept = torch.argsort(dropped.to(torch.int8), stable=True)[: sum(len(it.entries) for it in ctx.instances)]
    return {rows: short, values: [v[kept.to(v.device)] for v in kwargs[values]]}
