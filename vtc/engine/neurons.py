"""Decode steps whose MLPs run on some of their neurons only, which a reducer names after the prefill.

A reducer asks for it through :attr:`vtc.core.Reducer.decode_neurons`: signals of a prompt with images that give, for some decoder
layers, the indices of the neurons to go on with. What was found is kept in the cache object, as all state of a sequence is: slices
of the projections (one prompt row) or a mask (several). Forwards of one token on such a cache run on these neurons; all others (a
new turn, the candidates of assisted decoding, prompts without images, forwards without a cache) run on all of them.

The projections of the layers concerned get an instance attribute ``forward`` that hands on to the one there was; taking it off is
one ``delattr``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vtc.core import Need, Reducer
from vtc.engine import upstream
from vtc.engine.text import TextSide
from vtc.engine.undo import Undo
from vtc.engine.upstream import Call, FixedLayer
from vtc.errors import UnsupportedFeatureError
from vtc.families.base import Family

_NOW = threading.local()
_ATTRIBUTE = "_vtc_neurons"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(eq=False)
class Slice:
    """The neurons one decoder layer goes on with.

    Attributes
    ----------
    index : Tensor
        ``(B, M)`` int64, ascending.
    weights : dict or None
        One row: weight and bias of each projection, cut down to these neurons.
    mask : Tensor or None
        Several rows: ``(B, 1, I)`` bool. All neurons are computed and the others set to zero: rows agree with rows run alone, but
        nothing gets faster.
    """

    index: Tensor
    weights: dict[str, tuple[Tensor, Tensor | None]] | None
    mask: Tensor | None

    @staticmethod
    def of(index: Tensor, mlp: nn.Module) -> Slice:
        """Cut the projections of ``mlp``, or note which neurons each row has."""
        if len(index) > 1:
            size = mlp.down_proj.in_features
            mask = torch.zeros(len(index), size, dtype=torch.bool, device=index.device).scatter_(1, index, True)
            return Slice(index, None, mask[:, None])
        weights = {}
        for name in PROJECTIONS:
            linear, at = getattr(mlp, name), index[0].to(mlp.down_proj.weight.device)
            if name == "down_proj":
                weights[name] = (linear.weight.detach()[:, at].contiguous(), linear.bias)
            else:
                weights[name] = (linear.weight.detach()[at], None if linear.bias is None else linear.bias.detach()[at])
        return Slice(index, weights, None)

    def project(self, name: str, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply one projection."""
        if self.weights is not None:
            return F.linear(x, *self.weights[name])
        if name != "down_proj":
            return original(x)
        if len(self.mask) != len(x):
            raise UnsupportedFeatureError(
                f"the cache holds core neurons of {len(self.mask)} rows and the step has {len(x)}: start from a fresh cache, or "
                "drop the option that decodes with core neurons"
            )
        return original(x * self.mask)


def _project(original: Callable[[Tensor], Tensor], name: str, x: Tensor) -> Tensor:
    """Stand in for a projection's ``forward``."""
    now: Slice | None = getattr(_NOW, "slice", None)
    return original(x) if now is None else now.project(name, original, x)


class NeuronSide:
    """Hooks that make decode steps run on the neurons the reducers name."""

    def __init__(self, family: Family, parts: tuple[Reducer, ...], text: TextSide) -> None:
        self.family, self.names = family, text.names
        self.needs: dict[int, Need] = {need.layer: need for part in parts for need in part.decode_neurons(family.facts)}
        for layer, need in self.needs.items():
            mlp = getattr(family.layers[layer], "mlp", None)
            if any(type(getattr(mlp, name, None)) is not nn.Linear for name in PROJECTIONS):
                raise UnsupportedFeatureError(
                    f"decoder layer {layer} has no MLP of plain gate, up and down projections (quantized, adapted or of another "
                    "form): drop the option that decodes with core neurons"
                )
            text.taps.want(need)

    def install(self, undo: Undo) -> None:
        """Put everything on; nothing at all if no reducer asks for it."""
        if not self.needs:
            return
        undo.pre_hook(self.family.text, self.before_text, with_kwargs=True)
        undo.hook(self.family.text, self.after_text, with_kwargs=True)
        for i in self.needs:
            layer = self.family.layers[i]
            undo.pre_hook(layer, functools.partial(self.before_layer, i), with_kwargs=True)
            undo.hook(layer, self.after_layer, always_call=True)
            for name in PROJECTIONS:
                linear = getattr(layer.mlp, name)
                undo.attribute(linear, "forward", functools.partial(_project, linear.forward, name))

    def before_text(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse caches this cannot work with; forget what an emptied cache held."""
        cache = Call(self.names.text, args, kwargs)["kv"]
        if cache is None:
            return
        if any(isinstance(layer, FixedLayer) for layer in cache.layers):
            raise UnsupportedFeatureError(
                "decoding with core neurons does not go together with a static cache: use the default DynamicCache"
            )
        if hasattr(cache, _ATTRIBUTE) and int(cache.get_seq_length()) == 0:
            delattr(cache, _ATTRIBUTE)

    def after_text(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """After a prompt with images: keep in its cache the neurons to go on with."""
        ctx, cache = kwargs.get(upstream.CONTEXT), upstream.cache_in(Call(self.names.text, args, kwargs), out)
        if ctx is None or ctx.visual is None or cache is None:
            return
        with torch.no_grad(), ctx.clock.span(ctx.visual.device):
            found = {i: ctx.tapped[need.key][0] for i, need in self.needs.items()}
            setattr(cache, _ATTRIBUTE, {i: Slice.of(index, self.family.layers[i].mlp) for i, index in found.items()})

    def before_layer(self, i: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say which neurons a step of one token runs on."""
        call = Call(self.names.layers[i], args, kwargs)
        held = getattr(call["kv"], _ATTRIBUTE, None)
        _NOW.slice = held[i] if held is not None and call["hidden"].shape[1] == 1 else None

    @staticmethod
    def after_layer(*_: Any) -> None:
        """All other modules run on everything."""
        _NOW.slice = None
