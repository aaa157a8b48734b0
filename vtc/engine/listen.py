"""Signals of the language model: tapped while its layers run, or looked at when a layer is entered."""

from __future__ import annotations

import contextvars
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Need, Reducer
from vtc.engine import parallel, taps, upstream
from vtc.engine.cache import held_by
from vtc.engine.context import Context, Group
from vtc.engine.rope import positions_for, rope_of, rotate
from vtc.engine.segment import Segment
from vtc.engine.undo import Undo
from vtc.engine.upstream import Call
from vtc.errors import NotReducedError, UnsupportedFeatureError
from vtc.families.base import Family
from vtc.kernels import take, widened
from vtc.signals import AttentionTap, RotationTap, StateTap

_INSIDE: contextvars.ContextVar[Context | None] = contextvars.ContextVar("vtc_inside", default=None)  # modules get no kwargs


class _Preview:
    """Stands in the place of the context where a layer's forward runs only up to its attention."""


class _Seen(Exception):  # noqa: N818  carries a result, not a mishap
    """q, k, v and scaling of an attention that was only looked at."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = parts


class TextTaps:
    """All taps of one model's decoder layers.

    Attributes
    ----------
    needs : dict
        By layer: signals of its attention.
    looks : dict
        By layer: signals taken when it is entered, before its reducers act.
    inside : dict
        By layer: signals of its modules.
    """

    def __init__(self, family: Family, parts: tuple[Reducer, ...]) -> None:
        self.family, self.facts, self.parts = family, family.facts, parts
        self.needs: dict[int, list[Need]] = {}
        self.looks: dict[int, list[Need]] = {}
        self.inside: dict[int, list[Need]] = {}
        for part in parts:
            for need in part.needs:
                if need.source == "text":
                    self.want(need.resolve(self.facts.provides))

    def want(self, need: Need) -> None:
        """Note a signal, and first those its measure reads."""
        for other in need.uses:
            self.want(other)
        layer = need.layer if need.layer >= 0 else self.facts.layers + need.layer
        place = (
            self.needs
            if need.of == "attention"
            else self.looks
            if need.of in ("preview", "hidden", "rotation")
            else self.inside
        )
        if need not in place.setdefault(layer, []):
            place[layer].append(need)

    def install(self, undo: Undo) -> None:
        """Put the hooks on."""
        for i in sorted({*self.needs, *(i for i, wanted in self.looks.items() if any(n.of == "preview" for n in wanted))}):
            taps.attach(undo, self.family.text_attention[i], functools.partial(self.observe, i))
        for i, wanted in self.inside.items():
            self.watch_modules(i, {n.of for n in wanted}, undo)

    def entered(self, i: int, ctx: Context) -> None:
        """Note which forward enters layer ``i``, for the hooks of its modules."""
        if self.inside:
            _INSIDE.set(ctx if i in self.inside else None)

    def left(self) -> None:
        """Forget it."""
        if self.inside and _INSIDE.get() is not None:
            _INSIDE.set(None)

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
            query, key, value = parallel.whole_attention(self.family, self.parts, module, query, key, value)
            q = query.shape[2]
            seg = ctx.keep[i][0] if i in ctx.keep else None
            visual, valid, last = tokens_of(ctx, seg)
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
            tap = AttentionTap(query, key, value, scaling, full, True, last, visual, valid, rope=ctx.rope, text=ctx.longest)
            for need in self.needs[i]:
                own = replace(tap, given=self.given(ctx, need, seg)) if need.uses else tap
                ctx.tapped[need.key] = (need.measure(own), seg, keys - q)

    @staticmethod
    def given(ctx: Context, need: Need, seg: Segment | None) -> dict[str, Tensor]:
        """Return the earlier signals ``need`` reads, narrowed to the tokens of ``seg``; zero (False) where there is no token."""
        out, (_, valid, _) = {}, tokens_of(ctx, seg)
        for other in need.uses:
            value, held, offset = ctx.tapped[other.key]
            if other.axis == "keys":
                rows = torch.arange(ctx.q, device=value.device).expand(value.shape[0], -1) if seg is None else seg.rows
                # a choice: only padding was held nowhere, and any place does for what is set to zero
                at = rows if held is None else held.inverse.gather(1, rows).clamp(min=0)
                value = take(value, at + offset, 1)
                if ctx.padded if seg is None else seg.valid is not None:
                    value = value.masked_fill(~valid.view(*valid.shape, *[1] * (value.dim() - 2)), 0)
            out[other.name] = value
        return out

    def look(self, ctx: Context, i: int, layer: nn.Module, call: Call, hidden: Tensor) -> None:
        """Compute the signals that layer ``i`` gives of the tokens there before its reducers act.

        Tokens of earlier forwards (a KV cache handed in) have no part in a preview.
        """
        seg = ctx.current
        with torch.no_grad(), ctx.clock.span(hidden.device):
            if i in ctx.keep and ctx.keep[i][1] is not None:  # layer 0, after a cut at the boundary
                hidden = take(hidden, ctx.keep[i][1], 1)
            visual, valid, last = tokens_of(ctx, seg)
            state = StateTap(hidden, last, visual, valid, self.family.text.norm, text=ctx.longest)
            ahead: AttentionTap | None = None
            for need in self.looks[i]:
                if need.of == "hidden":
                    tap: Any = state
                elif need.of == "rotation":
                    tap = self.rotation(ctx, i, call, hidden, seg)
                    ctx.tapped[need.key] = (need.measure(tap), seg, 0)
                    continue
                else:
                    if ahead is None:
                        ahead = self.preview(ctx, i, layer, call, hidden, seg)
                    tap = ahead
                ctx.tapped[need.key] = (need.measure(replace(tap, given=self.given(ctx, need, seg))), seg, 0)

    def rotation(self, ctx: Context, i: int, call: Call, hidden: Tensor, seg: Segment | None) -> RotationTap:
        """Return cosines and sines at the positions of the tokens of ``seg``, in float32 whatever the model's type."""
        text, positions = self.family.text, ctx.positions
        if positions is None:
            held = getattr(call["kv"], "layers", ())
            past = held[i].get_seq_length() if i < len(held) else 0
            positions = past + (ctx.real.to(hidden.device).cumsum(1) - 1).clamp(min=0)  # a choice: padding has no number
        axes = positions[-3:] if positions.dim() == 3 else positions[None]  # (a fourth, in front, numbers the text)
        axes = axes.expand(-1, hidden.shape[0], -1).to(hidden.device)
        if ctx.padded:  # a model that is told no positions numbers padding, too: a row's own must not depend on the others
            first = ctx.real.int().argmax(1)[None, :, None]
            start = axes.gather(2, first.expand(len(axes), -1, -1))
            axes = axes - torch.where(start - axes[..., :1] == first, first, 0)
        if seg is not None:
            axes = take(axes, seg.rows, 2)
            axes = axes if seg.delta is None else axes - seg.delta.to(axes.device)
        rotary, kind = upstream.rotary_of(text, call.names.rotary[0]), upstream.layer_type(text.config, i)
        like, made = widened(hidden[:1, :1]), []
        for axis in axes.clamp(min=0):
            table = upstream.rotate_at(rotary, like, axis if positions.dim() == 2 else axis.expand(3, -1, -1), kind)
            made.append(tuple(t[0] if t.dim() == 4 else t for t in table))  # 4.57: one table for each axis, all the same here
        return RotationTap(*(torch.stack(tables) for tables in zip(*made, strict=True)))

    def preview(self, ctx: Context, i: int, layer: nn.Module, call: Call, hidden: Tensor, seg: Segment | None) -> AttentionTap:
        """Return q, k, v of layer ``i`` for ``hidden``: its forward runs up to the attention, and without the KV cache."""
        held = held_by(call["kv"], i)
        own = Call(call.names, call.args, call.kwargs)
        own.set("hidden", hidden)
        before = None if held is None else held.shift
        rotate(self.family.text, ctx, i, own, hidden, seg, before)
        own.update(
            {"positions": positions_for(self.family.text, ctx, call["positions"], seg, before), "mask": None, "kv": None}
        )
        if "caching" in own.names.roles:
            own.set("caching", False)
        own.kwargs = {**own.kwargs, upstream.CONTEXT: _Preview()}
        try:
            layer.forward(*own.args, **own.kwargs)
        except _Seen as seen:
            query, key, value, scaling = seen.parts
            attention = self.family.text_attention[i]
            query, key, value = parallel.whole_attention(self.family, self.parts, attention, query, key, value)
        else:
            raise UnsupportedFeatureError(
                f"decoder layer {i} did not call its attention: this text model's layers cannot be looked into"
            )
        visual, valid, last = tokens_of(ctx, seg)
        mask = None
        if ctx.padded if seg is None else seg.valid is not None:
            at = torch.arange(valid.shape[1], device=valid.device)
            # padding rows see themselves: no empty softmax row
            mask = ((at <= at[:, None]) & (valid[:, None, :] | (at == at[:, None])))[:, None]
        return AttentionTap(
            query, key, value, scaling, mask, True, last, visual, valid, rope=rope_of(layer, own), text=ctx.longest
        )

    def watch_modules(self, i: int, places: set[str], undo: Undo) -> None:
        """Hook the modules of layer ``i`` that the signals of ``places`` come from."""
        mlp = getattr(self.family.layers[i], "mlp", None)
        modules = {
            "attention_update": self.family.text_attention[i],
            "mlp_update": mlp,
            "neurons": getattr(mlp, "down_proj", None),
        }
        for place in sorted(places):
            if modules[place] is None:
                raise UnsupportedFeatureError(
                    f"decoder layer {i} has no module for '{place}' signals: this text model's MLP is not of a known form"
                )
            undo.hook(modules[place], functools.partial(self.observe_module, i, place), with_kwargs=True)

    def observe_module(
        self, i: int, place: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Compute the signals of one module of decoder layer ``i`` (prefill with images only)."""
        ctx = _INSIDE.get()
        if ctx is None:
            return
        before = args[0] if args else kwargs[upstream.HIDDEN]
        hidden = before if place == "neurons" else upstream.states_of(out)
        with torch.no_grad(), ctx.clock.span(hidden.device):
            if place == "neurons":
                mlp = self.family.layers[i].mlp
                hidden = before = parallel.whole_neurons(self.family, self.parts, mlp, before, mlp.down_proj.in_features)
            seg = ctx.keep[i][0]
            visual, valid, last = tokens_of(ctx, seg)
            tap = StateTap(hidden, last, visual, valid, self.family.text.norm, before=before, text=ctx.longest)
            for need in self.inside[i]:
                if need.of == place:
                    own = replace(tap, given=self.given(ctx, need, seg)) if need.uses else tap
                    ctx.tapped[need.key] = (need.measure(own), seg, 0)

    def signals_of(self, ctx: Context, part: Reducer, group: Group) -> dict[str, Tensor]:
        """Narrow every signal the part needs to the candidates of a group."""
        out: dict[str, Tensor] = {}
        for need in part.needs:
            if need.source == "vision":
                key = need.resolve(self.facts.provides).key
                out[need.name] = group.chosen([it.record.signals[key][it.image] for it in group.members])
                continue
            if need.key not in ctx.tapped:
                raise NotReducedError(
                    f"'{part.name}' needs '{need.name}' of decoder layer {need.layer}, which was not computed in this forward"
                )
            value, seg, offset = ctx.tapped[need.key]
            out[need.name] = value[group.rows] if need.axis == "row" else group.narrow(value, seg, offset)
        return out


def tokens_of(ctx: Context, seg: Segment | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``visual (B, P)``, ``valid (B, P)`` and ``last (B,)`` of the tokens a layer holds.

    Tokens of an answer are to the reducers what padding is: not valid, and none of them is the last.
    """
    if seg is None:
        visual, valid = ctx.visual, ctx.real if ctx.asked is None else ctx.asked
    else:
        valid = torch.ones_like(seg.rows, dtype=torch.bool) if seg.valid is None else seg.valid
        visual = ctx.visual.gather(1, seg.rows)
        visual = visual if seg.valid is None else visual & valid
        valid = valid if ctx.asked is None else valid & ctx.asked.gather(1, seg.rows)
    held = valid.shape[1]
    if ctx.asked is not None or (ctx.padded and seg is None):
        index = torch.arange(held, device=valid.device)
        return visual, valid, torch.where(valid, index, -1).max(1).values
    return visual, valid, torch.full_like(valid[:, 0], held - 1, dtype=torch.long)  # a segment's padding is on the left
