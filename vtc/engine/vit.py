"""Reducers inside vision transformers without a language model (timm): between and inside the blocks."""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import EncoderReducer, Layout, Reducer, Selection, Signals, Stage, explained, settle
from vtc.engine import parallel
from vtc.engine.encoder import EncoderRun, EncoderStage
from vtc.engine.handle import BaseHandle
from vtc.errors import NotReducedError, UnsupportedFeatureError
from vtc.families.base import Transformer
from vtc.kernels import take
from vtc.signals import AttentionTap
from vtc.stats import SHORT, CallStats, Clock, ImageStats, KeptTokens, StageStats
from vtc.views import ask

_PASS: contextvars.ContextVar[tuple[object, EncoderRun] | None] = contextvars.ContextVar("vtc_vit_pass", default=None)
_DONE: contextvars.ContextVar[tuple[weakref.ref[Tensor], Tensor | None] | None] = contextvars.ContextVar(
    "vtc_vit_done", default=None
)
"""Features of the last pass, and the sizes of their patches ``(B, n)``; ``None``: nothing was merged."""


class VitHandle(BaseHandle):
    """One patch on one vision transformer."""

    family: Transformer

    def attach(self, model: nn.Module) -> None:
        """Wrap ``forward_features`` of the instance, and hook the blocks."""
        family, part, undo = self.family, self.reducer, self._undo
        undo.pre_hook(model, self.check_original)
        self.wrap(model, "forward_features", self.forward_features)
        for name in ("forward_intermediates", "get_intermediate_layers"):
            if hasattr(model, name):
                self.wrap(model, name, self.refuse)
        if getattr(part, "weighs_pool", False):
            self.wrap(model, family.pooling, self.average)
        if isinstance(part, EncoderReducer):
            stage = EncoderStage(part, family.layers, family.attention, family.mlp_branch, family.facts, self.current)
            wanted = stage.wanted()
            stage.install(undo)
        else:
            wanted = {part.tower_layer - 1: part.needs}
            undo.pre_hook(family.layers[part.tower_layer], self.pool)
        for i, needs in wanted.items():
            if needs:
                family.tap(family.attention[i], functools.partial(self.observe, family.attention[i], needs), undo.hook)
        for layer in family.layers:  # behind the hooks that shorten: what a block is given
            undo.pre_hook(layer, self.count)

    def wrap(self, model: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        """Put a wrapper around a method of the instance."""
        original = getattr(model, name)
        self._undo.attribute(model, name, functools.wraps(original)(functools.partial(wrapper, original)))

    def check_original(self, module: nn.Module, _args: Any) -> None:
        """Refuse replicas, whose wrapped methods are the original's."""
        parallel.check_original(module, self._model())

    def current(self) -> EncoderRun | None:
        """State of this model's pass under way."""
        found = _PASS.get()
        return found[1] if found is not None and found[0] is self else None

    def refuse(self, original: Callable[..., Any], *_args: Any, **_kwargs: Any) -> Any:
        """Features of several blocks have different lengths under a reducer."""
        raise UnsupportedFeatureError(
            f"{original.__name__}() returns features of several blocks, which have different lengths under '{self.reducer.name}': "
            "unpatch the model for it"
        )

    def forward_features(self, original: Callable[..., Any], pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own method with a pass open; account for what happened."""
        model = self._model()
        if model.training and getattr(model, "grad_checkpointing", False):
            raise UnsupportedFeatureError(
                f"gradient checkpointing of blocks that '{self.reducer.name}' shortens is not possible: switch it off with "
                "model.set_grad_checkpointing(False)"
            )
        if args or any(v is not None and v is not False for v in kwargs.values()):
            raise UnsupportedFeatureError(
                f"forward_features() with an attention mask cannot be combined with '{self.reducer.name}': drop the mask"
            )
        run = EncoderRun([1] * pixels.shape[0], None, Clock())
        token = _PASS.set((self, run))
        try:
            with explained(run.answers), self.running():
                out = original(pixels, *args, **kwargs)
        finally:
            _PASS.reset(token)
        settle(run.answers)
        self.account(run)
        if getattr(self.reducer, "weighs_pool", False):
            sizes = run.size if run.size is None or run.valid is None else run.size * run.valid
            _DONE.set((weakref.ref(out), sizes))
        return out

    def average(self, original: Callable[..., Any], tokens: Tensor, pool_type: str | None = None) -> Any:
        """Average the tokens behind the last block, each counted as often as it has patches."""
        done = _DONE.get()
        if done is None or done[0]() is not tokens:
            raise UnsupportedFeatureError(
                f"'{self.reducer.name}' knows the sizes of the tokens that forward_features() has just returned, and no others: "
                "call the model as a whole, or forward_head() on those"
            )
        if pool_type is not None or done[1] is None:
            return original(tokens, pool_type)
        return self.family.average(tokens, done[1]).to(tokens.dtype)

    def observe(self, attention: nn.Module, needs: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Compute the signals wanted of one block."""
        run = self.current()
        if run is None:
            return
        parallel.check_running(self.family, self.reducer.parts(), attention)
        with torch.no_grad(), run.clock.span(query.device):
            head = int(self.family.facts.has_cls)
            mask = None
            if run.valid is not None:
                mask = torch.cat([torch.ones_like(run.valid[:, :head]), run.valid], 1)[:, None, None, :]
            tap = AttentionTap(query, key, value, scale, mask=mask, cls=bool(head))
            run.taps = {need.name: need.resolve(self.family.facts.provides).measure(tap) for need in needs}

    def count(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember how many patches of each picture enter a block."""
        run = self.current()
        if run is not None:
            n = args[0].shape[1] - int(self.family.facts.has_cls)
            run.lengths.append([n] * args[0].shape[0] if run.counts is None else run.counts)

    def pool(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Let a reducer made for the tower's output act between two blocks."""
        run, part = self.current(), self.reducer
        if run is None:
            return None
        hidden, head = args[0], int(self.family.facts.has_cls)
        patches, n = hidden[:, head:], hidden.shape[1] - head
        layout = self.layout(n)
        budget = min(n, part.wanted(layout, self.family.facts))
        run.fired = True
        if budget == n:
            return None
        with run.clock.span(hidden.device):
            entries = torch.arange(n, device=hidden.device).expand(hidden.shape[0], -1)
            signals = Signals(patches, layout, entries, budget, n, run.taps, cls=hidden[:, None, 0] if head else None)
            chosen: Selection = ask(part, signals.check(f"block {part.tower_layer} ('{part.name}')", run.answers))
            if chosen.valid is not None:
                raise UnsupportedFeatureError(
                    f"'{part.name}' keeps different numbers of tokens of a batch's pictures here: use another option or batch 1"
                )
            run.ids, run.owner = chosen.index, chosen.owner
            kept = chosen.features
            if kept is None:
                kept = take(patches, chosen.index)
        run.taps = {}
        return (torch.cat([hidden[:, :head], kept.to(hidden.dtype)], 1), *args[1:])

    def layout(self, n: int) -> Layout:
        """Layout of a picture with ``n`` patches."""
        rows, cols = self.family.facts.grid
        return Layout.grid(rows, cols) if rows * cols == n else Layout.flat(n)

    def account(self, run: EncoderRun) -> None:
        """Write the statistics; complain if the reducer did not act."""
        part, facts = self.reducer, self.family.facts
        call, self.stats.kept = CallStats(_clock=run.clock), []
        for i in range(len(run.views)):
            per_layer = [counts[i] for counts in run.lengths]
            n = per_layer[0]
            layout = self.layout(n)
            ids = torch.arange(n) if run.ids is None else run.patches(i)
            merges = [] if run.owner is None else [(torch.arange(n), ids, run.owner[i])]
            encoder = isinstance(part, EncoderReducer)
            asked = part.view_budgets(1, n, facts)[0] if encoder else part.wanted(layout, facts)
            notes = (part.note(asked, n) if encoder else "", SHORT if part.budget.exceeds(n) else "")
            requested = None if part.decides_itself else min(n, asked)
            stage = StageStats(part.name, part.stage.value, 0, n, len(ids), requested, "; ".join(filter(None, notes)))
            call.images.append(ImageStats(i, n, len(ids), per_layer, [stage], run.fired))
            self.stats.kept.append(KeptTokens(i, layout, ids.sort().values, merges))
        self.stats.append(call)
        if not run.fired and self.strict:
            raise NotReducedError(
                f"'{part.name}' did not act on a call: the model ran without the expected hook; report this, or pass strict=False"
            )


def bind_vit(reducer: Reducer, family: Transformer) -> Reducer:
    """Resolve a reducer for a vision transformer; raise where it cannot act there."""
    facts = family.facts
    stages = getattr(reducer, "stages", None) or (getattr(reducer, "stage", Stage.DECODER),)
    part, reason = reducer, facts.stages[stages[0]]
    if not reason:
        part, *others = reducer.bind(facts).parts()
        if others:
            reason = "it has several stages"
        elif not isinstance(part, EncoderReducer) and part.tower_layer is None:
            reason = "it acts on features on their way to a language model"
    if not reason and getattr(part, "weighs_pool", False) and not family.pooling:
        raise UnsupportedFeatureError(
            f"'{reducer.name}' is to weight the average of the head by size, and this model's head takes none: drop the option"
        )
    if reason:
        raise UnsupportedFeatureError(
            f"'{reducer.name}' cannot act in a vision transformer: {reason}; 'tome', 'tokenpooling', 'skipspan' and "
            "'flowcut' can"
        )
    return part
