"""The language-model side: BOUNDARY and DECODER reducers, and the one owner of compaction.

Outside the decoder layers everything stays logical; inside, hidden states, RoPE rows, masks and KV caches hold the survivors only
(see :mod:`vtc.engine.cache`). Per-forward state is a :class:`Context` that travels down to the layers as a keyword argument, so
threads, gradient checkpointing and compiled forwards see one consistent decision.
"""

from __future__ import annotations

import functools
import threading
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Reducer, Stage, settle
from vtc.engine import parallel, upstream
from vtc.engine.cache import Pruned, PrunedSlidingLayer, check_cache, held_by, learn_fronts, promised, pruned_layer
from vtc.engine.choose import Chooser, find_instances, keep_table, write
from vtc.engine.context import CURRENT, LABELS, Context, Step
from vtc.engine.listen import TextTaps
from vtc.engine.rope import positions_for, rope_of, rotate
from vtc.engine.segment import Segment, cut, remap_mask
from vtc.engine.tower import MADE, TowerSide, VisionRecord
from vtc.engine.undo import Undo
from vtc.engine.upstream import CONTEXT, AnyCache, Call, FixedLayer, ModelNames
from vtc.errors import NotReducedError, UnknownArgumentError, UnsupportedFeatureError
from vtc.families.base import Family
from vtc.kernels import take
from vtc.signals import question_of
from vtc.stats import CallStats, Clock, ImageStats, KeptTokens, StatsLog


class TextSide:
    """Hooks on one model's multimodal base, text model and decoder layers."""

    def __init__(self, family: Family, parts: tuple[Reducer, ...], tower: TowerSide, stats: StatsLog, strict: bool) -> None:
        self.family, self.tower, self.stats, self.strict = family, tower, stats, strict
        self.parts = parts
        self.names = ModelNames.of(family.base, family.text, family.layers)
        self.scaled = any(map(upstream.needs_positions, family.text_attention))
        self.untold = any("positions" not in names.roles for names in self.names.layers)
        self.windows = [upstream.window_of(family.text.config, i) for i in range(len(family.layers))]
        self.alike = len({*self.windows}) == 1
        self.running: dict[int, bool] = {}  # threads inside a forward
        self.boundary = [p for p in parts if p.stage is Stage.BOUNDARY]
        self.decoder: dict[int, list[Reducer]] = {}
        for p in parts:
            if p.stage is Stage.DECODER:
                self.decoder.setdefault(p.layer, []).append(p)
        self.taps = TextTaps(family, parts)
        self.chooser = Chooser(self.taps, parts)
        self.token_ids = {False: family.image_token_ids, True: family.video_token_ids}
        self.prompt_length: tuple[int, ...] | None = None  # of each row, or one for all

    # ----------------------------------------------------------------------------------------------------- installing
    def install(self, undo: Undo) -> None:
        """Put all hooks on."""
        family = self.family
        self.tower.on_record = self.on_record
        undo.pre_hook(family.base, self.before_base, with_kwargs=True)
        undo.hook(family.base, self.after_base, with_kwargs=True, always_call=True)
        undo.pre_hook(family.text, self.before_text, with_kwargs=True)
        undo.hook(family.text, self.after_text, with_kwargs=True)
        for i, layer in enumerate(family.layers):
            undo.pre_hook(layer, functools.partial(self.before_layer, i), with_kwargs=True)
        self.taps.install(undo)

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
        parallel.check_original(module, self.family.base)
        if len(args) < 2 and upstream.brings_nothing(kwargs):
            return  # most decode steps
        call = Call(self.names.base, args, kwargs)
        given = [video for video in (False, True) if upstream.given(call, video)]
        if not given:
            return  # a decode step or a text-only prompt (an image token *generated* in decode is not visual)
        ids, embeds = call.beside("ids"), call.beside("embeds")
        if ids is None and embeds is None:
            return
        check_cache(call.beside("kv"))
        self.check_implementation()
        if upstream.is_packed(call):
            raise UnsupportedFeatureError("packed sequences (cu_seq_lens_*) cannot be shortened: pass padded batches")
        several = parallel.several()
        if several:
            parallel.check_stages(self.family)
            parallel.check_sequence(
                upstream.plain_mask(call.beside("mask")), call.beside("kv"), (embeds if ids is None else ids).shape[1]
            )
        # the host's one look at ids and padding, while a GPU has little to do yet
        found = {video: self.placeholders(ids, embeds, self.token_ids[video]) for video in given}
        image = torch.stack(list(found.values())).any(0)
        if not bool(image.any()):
            return
        real = self.real_tokens(call, image.shape)
        asked = prompt_of(image & real, real, self.prompt_length)
        text, held = (real & ~image).sum(1).tolist(), real.sum(1).tolist()
        ctx = Context(
            visual=image & real,
            real=real,
            asked=asked,
            q=image.shape[1],
            padded=sum(held) < real.numel(),
            bare=bool((image | ~real)[:, 0].any()),
            places={video: place & real for video, place in found.items()},
            text=text,
            held=held,
            clock=Clock(),
            peers=parallel.Peers() if several else None,
        )
        if self.taps.needs or self.taps.looks or self.taps.inside:
            ctx.longest = max(text), int(question_of(ctx.visual, real if asked is None else asked).sum(1).max())
        for video in given:
            features = upstream.encoded(call, video)
            if features is not None:  # made by generate before this forward
                lost = next((r for r in MADE.get() or () if r.video == video), None)
                record = getattr(features, "vtc", lost)
                ctx.records |= {} if record is None else {video: record}
        CURRENT.set(ctx)  # not in decode steps: setting a ContextVar breaks compiled graphs

    def check_implementation(self) -> None:
        """Refuse attention implementations under which this text model's layers cannot be shortened."""
        config = self.family.text.config
        upstream.check_implementation(config)
        if self.scaled and upstream.is_flash(upstream.attention_of(config)):
            raise UnsupportedFeatureError(
                f"{type(self.family.text_attention[0]).__name__} scales queries by their position, and FlashAttention, given the "
                f"positions of what is left, takes gaps for borders of packed prompts: load the model with "
                f"attn_implementation='{upstream.SDPA}'"
            )

    def placeholders(self, ids: Tensor | None, embeds: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """Boolean ``(B, q)``, on the CPU: where one of the ``tokens`` is, by ids or, as the models do, by embeddings."""
        if ids is not None:
            return torch.isin(ids.cpu(), torch.tensor(tokens))
        table = self.family.text.get_input_embeddings()
        marks = [table(torch.full((), t, device=embeds.device)) for t in tokens]
        return torch.stack([(embeds == m).all(-1) for m in marks]).any(0).cpu()

    @staticmethod
    def real_tokens(call: Call, shape: torch.Size) -> Tensor:
        """Boolean ``(B, q)``, on the CPU: not padding."""
        mask, cache, q = upstream.plain_mask(call.beside("mask")), call.beside("kv"), shape[1]
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
    def before_text(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the BOUNDARY reducers and hand the context down to the layers."""
        ctx, call = CURRENT.get(), Call(self.names.text, args, kwargs)
        embeds = call["embeds"]
        if ctx is None:
            tokens = embeds if embeds is not None else call.beside("ids")
            cache = call["kv"]
            if tokens.shape[1] > 1 and (cache is None or cache.get_seq_length() == 0):
                self.stats.append(CallStats(text_only=True))
            if self.shortcut(call, tokens):
                return call.result()
            ctx = Context(q=tokens.shape[1])
        else:
            CURRENT.set(None)
        if self.untold:
            ctx.positions = self.counted(call, embeds if embeds is not None else call.beside("ids"))
        elif ctx.visual is not None:
            ctx.positions = call["positions"]
        if ctx.visual is not None:
            if ctx.peers is not None:
                parallel.check_states(embeds, ctx.q, "the text model")
            sets = [ctx.visual, ctx.real] if ctx.asked is None else [ctx.visual, ctx.real, ctx.asked]
            ctx.visual, ctx.real, *asked = torch.stack(sets).to(embeds.device, non_blocking=True)
            ctx.asked = asked[0] if asked else None
            call.set("embeds", self.reduce_inputs(ctx, embeds))
            if ctx.current is not None and self.family.between_layers is not None:
                call.kwargs = {**call.kwargs, **shorten_between(ctx, call.kwargs, *self.family.between_layers)}
        return call.args, {**call.kwargs, CONTEXT: ctx}

    @staticmethod
    def counted(call: Call, tokens: Tensor) -> Tensor:
        """Return the positions of this forward, for layers that may not be given them (4.57's Cohere 2)."""
        cache, given = call["kv"], call["positions"]
        if given is not None:
            return given
        seen = 0 if cache is None else int(cache.get_seq_length())
        return torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]

    def shortcut(self, call: Call, tokens: Tensor) -> bool:
        """Whether a forward without new images needs no work in the layers; its positions are shifted here where that is all.

        That is the case without a reduced cache, and in the usual decode step: one token, no padding, and either original positions
        or one shift for all layers.
        """
        layers = getattr(call["kv"], "layers", ())
        first = next((layer for layer in layers if isinstance(layer, Pruned)), None)
        if first is None:
            return True
        if (
            tokens.shape[1] != 1
            or call["mask"] is not None
            or not upstream.needs_no_mask(upstream.attention_of(self.family.text.config))
            or isinstance(first, FixedLayer)
        ):
            return False
        shift, everywhere = first.shift, True
        for layer in layers:  # one plain loop: it runs for every token
            if not isinstance(layer, Pruned):
                everywhere = False
            elif layer.shift is not shift or layer.valid is not None or layer.bias is not None or layer.is_sliding:
                return False
        if shift is None:
            return True
        if not everywhere:
            return False
        positions = call["positions"]
        if positions is None:
            positions = torch.full((tokens.shape[0], 1), first.get_seq_length(), device=tokens.device)
        call.set("positions", positions - shift[:, None].to(positions.device))
        return True

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
        if ctx.bias is not None:
            ctx.current = replace(ctx.current, bias=ctx.bias.gather(1, ctx.current.rows))
        return ctx.current, relative

    def after_text(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Expand the last hidden states to logical length, and account for what happened.

        A dropped slot has no prediction of its own. It shows the last kept token before it, the one that predicts the next text
        token; where there is none, in front of a row's first kept token, its state is zero, whatever else is in the batch.
        """
        ctx = kwargs.get(CONTEXT)
        if ctx is None or ctx.visual is None:
            return out
        if ctx.peers is not None:
            ctx.peers.ask()
        if ctx.current is not None:
            self.keep_promises(ctx, Call(self.names.text, args, kwargs), out)
            out = upstream.with_states(out, self.expand(ctx, upstream.states_of(out)))
        self.account(ctx)
        settle(ctx.answers)  # last: a GPU has its work by now
        if ctx.peers is not None:
            ctx.peers.agree()
        if ctx.windows and not torch.compiler.is_compiling():
            learn_fronts(ctx.windows)
        return out

    @staticmethod
    def expand(ctx: Context, states: Tensor) -> Tensor:
        """Return the states ``(B, P, D)`` of what is left at logical length, ``(B, q, D)``."""
        rank = ctx.current.rank
        out = take(states, rank.clamp(min=0), 1)  # a choice: what is negative is set to zero
        return out.masked_fill(rank[..., None] < 0, 0) if ctx.bare else out

    def keep_promises(self, ctx: Context, call: Call, out: Any) -> None:
        """Assert on the model what its layers were to hold: every layer was entered, and each cache layer is as promised.

        Comparisons of integers, once in a prefill that was shortened. Raises :class:`NotReducedError` also where ``strict`` is off:
        what follows would be wrong without a word.
        """
        name, layers, held = type(self.family.text).__name__, len(self.family.layers), upstream.states_of(out).shape[1]
        wrong = ""
        if len(ctx.per_layer) != layers:
            wrong = f"{len(ctx.per_layer)} of its {layers} decoder layers were told what was dropped"
        elif held != ctx.current.rows.shape[1]:
            wrong = f"its last layer returned {held} tokens where {ctx.current.rows.shape[1]} are left"
        cache, named = upstream.cache_in(call, out), call["kv"]
        if not wrong and named is not None and cache is not named:
            wrong = f"the KV cache it was given is not the {type(cache).__name__} among its arguments and outputs"
        if not wrong and cache is not None:
            cut_at = [i for i in range(layers) if ctx.keep[i][0] is not None]
            missing = [i for i in cut_at if i not in ctx.promises]
            if missing:
                wrong = (
                    f"it fills a {type(cache).__name__} that decoder layer {missing[0]} was not given under a name vtc knows"
                )
            for i in cut_at if not wrong else ():
                why = promised(cache, i, *ctx.promises[i])
                if why:
                    wrong = f"decoder layer {i}: {why}"
                    break
        if wrong:
            raise NotReducedError(
                f"{name} did not keep what vtc promises (transformers {upstream.version()}): {wrong}; run `vtc check MODEL "
                "--verify` and use a release inside the tested window"
            )

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
        ctx: Context | None = kwargs.get(CONTEXT)
        if ctx is None:
            return None
        if ctx.step is not None and ctx.visual is None and i not in self.taps.needs:
            again = ctx.step.again(self.names.layers[i], i, args, kwargs)
            if again is not None:
                return args, again
        call, tapped = Call(self.names.layers[i], args, kwargs), i in self.taps.needs
        cache, seg = call["kv"], None
        if not tapped:  # only tapped attentions want it
            call.without_context()
        if ctx.visual is not None:
            seg = self.shorten_states(ctx, i, module, call, cache)
        layer, before = self.hold(ctx, i, cache, seg)
        if layer is not None or seg is not None:
            if seg is not None:
                self.shorten_others(ctx, i, call, seg)
            if layer is not None and ctx.step is not None and ctx.step.fits(layer, seg, before, call):
                call.update(ctx.step.changed)
            else:
                self.shorten_arguments(ctx, i, call, layer, seg, before)
        if tapped:
            ctx.rope = rope_of(module, call)
        return call.result()

    def shorten_states(self, ctx: Context, i: int, module: nn.Module, call: Call, cache: AnyCache | None) -> Segment | None:
        """Take the signals that layer ``i`` gives on entering, let its reducers act, and give it the states of what is left."""
        hidden = call["hidden"]
        if not (i in ctx.keep and i < len(ctx.per_layer)):  # not a recomputation
            if ctx.peers is not None:
                there = ctx.q if i == 0 or ctx.current is None else ctx.current.rows.shape[1]
                parallel.check_states(hidden, there, f"decoder layer {i}")
                if not ctx.peers.groups:
                    self.meet(ctx, module)
            if i in self.taps.needs:
                held = getattr(cache, "layers", ())
                ctx.static = i < len(held) and isinstance(held[i], FixedLayer)
            self.taps.entered(i, ctx)
            if i in self.taps.looks:
                self.taps.look(ctx, i, module, call, hidden)
        if ctx.current is not None or i in self.decoder:
            self.check_states(ctx, i, hidden)
        states, seg = self.enter(ctx, i, hidden)
        if states is not hidden:
            call.set("hidden", states)
        return seg

    def meet(self, ctx: Context, layer: nn.Module) -> None:
        """Find the ranks that share a layer; compare with them what was kept so far."""
        ctx.peers.groups = parallel.groups_of(layer)
        if self.decoder or self.taps.looks:  # where one rank tells the others what it chose
            ctx.peers.compare_prompts(ctx.instances)
        self.compare(ctx, [p for p in self.parts if p.stage is not Stage.DECODER])

    @staticmethod
    def compare(ctx: Context, parts: list[Reducer]) -> None:
        """Note what ``parts`` left, for the ranks to compare at the end; at once where they may have left different numbers."""
        if not ctx.peers.groups:
            return
        ctx.peers.note(ctx.instances)
        if any(parallel.count_may_differ(p) for p in parts):
            ctx.peers.ask()
            ctx.peers.agree()

    @staticmethod
    def hold(ctx: Context, i: int, cache: AnyCache | None, seg: Segment | None) -> tuple[Pruned | None, Tensor | None]:
        """Return the reduced cache layer that layer ``i`` writes to, told what comes if tokens go, and its shift so far."""
        if seg is None or cache is None:
            layer = held_by(cache, i)
            return layer, None if layer is None else layer.shift
        layer = pruned_layer(cache, i)
        stored, before = layer.stored(), layer.shift
        layer.begin(seg, ctx.q)
        ctx.promises[i] = stored + seg.rows.shape[1], layer.end
        if isinstance(layer, PrunedSlidingLayer):
            ctx.windows.append(layer)
        return layer, before

    def shorten_arguments(
        self, ctx: Context, i: int, call: Call, layer: Pruned | None, seg: Segment | None, before: Tensor | None
    ) -> None:
        """Remap mask and rotations to what the layer holds; remember the result for layers that are given the same."""
        roles = ("mask", "positions", *call.names.rotary)
        given = {role: call[role] for role in roles}
        hidden, mask = call["hidden"], given["mask"]
        cols, valid, total = self.columns(ctx, layer, seg, mask)
        window, flash = self.windows[i], upstream.is_flash(upstream.attention_of(self.family.text.config))
        if flash and window is not None and total > window:
            cols, valid = self.in_window(ctx, i, layer, window, total)
        bias = seg.bias if layer is None else layer.bias  # one tensor for all layers that share it
        if bias is not None and layer is not None:
            slots = cols.shape[1]
            bias = ctx.once(("bias", slots, layer.skip), (bias,), functools.partial(layer.biases, slots))
        if mask is not None or valid is not None or bias is not None:
            static = isinstance(layer, FixedLayer)
            call.set("mask", self.mask(ctx, hidden, mask, cols, valid, total, seg, window, static, bias))
        rotate(self.family.text, ctx, i, call, hidden, seg, before)
        call.set("positions", positions_for(self.family.text, ctx, given["positions"], seg, before))
        told_alike = not flash or self.alike  # else masks say nothing of windows
        if (
            layer is not None and told_alike and not isinstance(layer, FixedLayer)
        ):  # (those run compiled: nothing to save there)
            ctx.step = Step(call.names, layer, seg, before, given, {role: call[role] for role in roles})

    @staticmethod
    def in_window(ctx: Context, i: int, layer: Pruned | None, window: int, total: int) -> tuple[Tensor, Tensor]:
        """Return the keys of a sliding-window layer and which of them one new token sees, where FlashAttention must be told.

        It counts its window in tokens that are there, and would see further once some are not.
        """
        if layer is None or ctx.q > 1:
            raise UnsupportedFeatureError(
                f"FlashAttention counts the window of decoder layer {i} in tokens that are there, and would see past it in a "
                f"shortened sequence of more than {window} tokens: load the model with attn_implementation='{upstream.SDPA}'"
            )

        def make() -> tuple[Tensor, Tensor]:
            cols, valid = layer.columns(ctx.q)
            seen = cols >= total - window
            return cols, seen if valid is None else seen & valid

        return ctx.once(("window", window, layer.stored(), layer.skip), (layer.cols,), make)

    def check_states(self, ctx: Context, i: int, hidden: Tensor) -> None:
        """Refuse a text model whose layers are not given one state of each token there, in order."""
        last = ctx.keep[i - 1][0] if i else None
        there = ctx.q if last is None else last.rows.shape[1]
        if hidden.dim() != 3 or hidden.shape[:2] != (len(ctx.visual), there):
            raise UnsupportedFeatureError(
                f"{self.names.layers[i].kind.__name__} is given states of shape {tuple(hidden.shape)} where {there} tokens are in "
                f"{len(ctx.visual)} rows: this text model changes the sequence between its layers, and cannot be shortened"
            )

    def shorten_others(self, ctx: Context, i: int, call: Call, seg: Segment) -> None:
        """Shorten what else layer ``i`` is given of every token; refuse what is as long as the sequence and not known."""
        lengths = {ctx.q, ctx.q * len(seg.rows), *(s.rows.shape[1] for s, _ in ctx.keep.values() if s is not None)}
        for name, value in [*call.others(self.names.read[i])]:
            if name in upstream.PER_TOKEN and isinstance(value, Tensor) and value.shape[1] == ctx.q:
                rows = functools.partial(take, value, seg.rows, 1)
                call.set_other(name, ctx.once(name, (value, seg), rows))
            elif lengths & sizes_of(value):
                raise UnsupportedFeatureError(
                    f"{self.names.layers[i].kind.__name__} is given '{name}', which is as long as the sequence and which vtc does "
                    f"not know how to shorten (transformers {upstream.version()}): this text model is not supported"
                )

    @staticmethod
    def columns(ctx: Context, layer: Pruned | None, seg: Segment | None, mask: Any) -> tuple[Tensor, Tensor | None, int]:
        """Return logical columns ``(B, K)`` and validity of the keys a layer attends to, and their logical length."""
        if layer is None:
            return seg.rows, seg.valid, ctx.q
        if seg is not None:
            return layer.cols, layer.valid, getattr(layer, "logical_max", layer.end)
        total = layer.total(ctx.q)
        if mask is None and layer.valid is None and layer.bias is None:
            return layer.cols, None, total  # nothing to remap: the columns are not looked at
        made = functools.partial(layer.columns, ctx.q)
        return *ctx.once(("columns", layer.stored(), layer.skip), (layer.cols,), made), total

    def mask(
        self,
        ctx: Context,
        hidden: Tensor,
        mask: Any,
        cols: Tensor,
        valid: Tensor | None,
        total: int,
        seg: Segment | None,
        window: int | None,
        static: bool,
        bias: Tensor | None,
    ) -> Tensor | None:
        """Return the attention mask of a layer with these keys, made once for all layers that share them."""
        implementation = upstream.attention_of(self.family.text.config)
        # longer ones are cut by the attention itself: PaliGemma of 4.57 makes them one token longer
        if isinstance(mask, Tensor) and window is None and mask.shape[-1] < total:
            raise UnsupportedFeatureError(
                f"an attention mask covers {mask.shape[-1]} tokens where there are {total}: pass one for all tokens, those in the "
                "KV cache included"
            )
        if bias is not None and upstream.is_flash(implementation):
            raise UnsupportedFeatureError(
                "FlashAttention cannot count a merged token as often as it has members: load the model with "
                f"attn_implementation='{upstream.SDPA}', or switch the counting off with proportional=False"
            )
        if static and upstream.is_flash(implementation):
            raise UnsupportedFeatureError(
                "a static cache with FlashAttention cannot hold a reduced sequence: use the default DynamicCache"
            )
        return ctx.once(
            ("mask", hidden.device),
            (mask, cols, seg, bias),
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
                bias=bias,
            ),
        )

    def enter(self, ctx: Context, i: int, hidden: Tensor) -> tuple[Tensor, Segment | None]:
        """Decide (or replay) what layer ``i`` holds; return its hidden states and segment."""
        replay = i in ctx.keep and i < len(ctx.per_layer)
        if not replay:
            if i in self.decoder:
                compact, layer = False, self.family.layers[i]
                # a recomputation that runs hooks again replays the decision: choosing must leave nothing for the backward
                again = upstream.checkpointed(layer) and upstream.checkpoint_repeats_hooks()
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
                if ctx.peers is not None:
                    self.compare(ctx, self.decoder[i])
                # gaps are closed even if this layer drops nothing: it may in another row, and a row does not depend on others
                closes = compact and ctx.current is not None and ctx.current.gaps
                ctx.keep[i] = self.shorten(ctx, compact) if closes or ctx.alive() != ctx.held else (ctx.current, None)
            elif i not in ctx.keep:
                ctx.keep[i] = (ctx.current, None)
            if len(ctx.per_layer) == i:
                ctx.per_layer.append([len(it.entries) for it in ctx.instances])
        seg, relative = ctx.keep[i]
        if relative is not None:
            hidden = take(hidden, relative, 1)
        return hidden, seg


def sizes_of(value: Any) -> set[int]:
    """Return the sizes of all axes of a tensor, or of those in a tuple, list or dictionary."""
    if isinstance(value, Tensor):
        return set(value.shape)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return set().union(*map(sizes_of, values))


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


def prompt_of(visual: Tensor, real: Tensor, lengths: tuple[int, ...] | None) -> Tensor | None:
    """Boolean ``(B, q)``: the part of ``real`` in front of the answer, which alone decides what stays; ``None``: all of it.

    Parameters
    ----------
    visual, real : Tensor
        ``(B, q)`` bool, on the CPU: visual tokens, tokens that are no padding.
    lengths : tuple of int or None
        Where each row's answer starts (padding in front counted), or one place for all. ``None``: by the labels of the call. They
        mark an answer where they are masked behind the row's last visual token and unmasked further on; a row whose labels follow
        the picture at once (those of a whole text) is prompt throughout.

    Raises
    ------
    UnknownArgumentError
        The lengths are not those of the rows, or an answer starts in front of a visual token.
    """
    rows, q = real.shape
    at = torch.arange(q)
    behind = torch.where(visual, at, -1).max(1).values + 1  # the first place behind the pictures
    labels = LABELS.get()
    if lengths is not None:
        if len(lengths) not in (1, rows):
            raise UnknownArgumentError(
                f"prompt_length has {len(lengths)} numbers and the batch {rows} rows: give one for each row"
            )
        start = torch.tensor(lengths).expand(rows)
        short = (start < behind).nonzero()
        if len(short):
            raise UnknownArgumentError(
                f"prompt_length={int(start[short[0]])} of row {int(short[0])} ends in front of its last visual token, at "
                f"{int(behind[short[0]]) - 1}: count placeholders and padding in front, too"
            )
    elif labels is not None and labels.shape == real.shape:
        answer = (labels.cpu() != upstream.MASKED) & real & (at >= behind[:, None])
        first = torch.where(answer.any(1), answer.to(torch.int8).argmax(1), q)
        start = torch.where(first > behind, first, q)  # nothing masked behind the picture: no prompt is marked
    else:
        return None
    asked = real & (at < start[:, None])
    return None if torch.equal(asked, real) else asked
