"""The slow reference: an unpatched copy on the full sequence, without a KV cache, in which dropped tokens are hidden.

Whoever a layer must not see is hidden from everybody in that layer by an attention function of this file. So the sequence never
gets shorter here, nothing is gathered or moved, and no code is shared with what is tested: this file imports torch and transformers
only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NAME = "vtc_reference"
"""Of the attention function, among those of transformers."""
_GONE, _SEEN = "_vtc_gone", "_vtc_seen"
_FAR = -1e30


class NoReferenceError(RuntimeError):
    """The reference cannot be run on this model; the message says what was not found."""


@dataclass
class Plan:
    """What happens to a prompt, in logical coordinates, by decoder layer.

    Attributes
    ----------
    hide : dict
        Layer -> ``(B, P)`` bool: columns of the prompt that are gone.
    compact : dict
        Layer -> ``(B, P)`` bool: columns that do not count in the positions of this layer.
    write : dict
        Layer -> function of the hidden states entering it, ``(B, S, D)``, that returns them with merged values.
    """

    hide: dict[int, Tensor] = field(default_factory=dict)
    compact: dict[int, Tensor] = field(default_factory=dict)
    write: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------- attention function
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention in the dtype of its inputs: ``(B, S, H, d)`` and the weights ``(B, H, S, S)``.

    Parameters
    ----------
    query, key, value : Tensor
        ``(B, H, S, d)``; keys and values may have fewer heads.
    mask : Tensor or None
        Bool (True: visible) or additive, broadcastable to ``(B, H, S, S)``.
    scaling : float or None
        Factor of the logits; ``None``: one over the root of ``d``.
    softcap : float, optional
        Bound of the logits by a hyperbolic tangent.
    sinks : Tensor, optional
        ``(H,)`` logits of one more key whose value is zero.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, _FAR) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _hiding(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`attend` without the columns that :func:`hidden_copy` marked as gone in this module's layer."""
    setattr(module, _SEEN, True)
    gone: Tensor | None = getattr(module, _GONE, None)
    if gone is not None:
        columns = query.new_zeros(key.shape[0], 1, 1, key.shape[2])
        columns[:, 0, 0, : gone.shape[1]].masked_fill_(gone, _FAR)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = query.new_zeros(()).masked_fill(~attention_mask, _FAR)
        attention_mask = columns if attention_mask is None else attention_mask + columns
    return attend(query, key, value, attention_mask, scaling, softcap, s_aux)


def _register() -> None:
    """Give transformers the attention function under its name; masks are made as for the eager one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _hiding)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)


# ---------------------------------------------------------------------------------------------------------------- copy
@contextmanager
def hidden_copy(model: nn.Module, plan: Plan, text: str, repeat: int = 1, share_weights: bool = False) -> Iterator[nn.Module]:
    """Give a copy of an unpatched model on which a plan is carried out by hiding columns.

    Parameters
    ----------
    model : Module
        The model; left as it is.
    plan : Plan
        What is hidden where.
    text : str
        Path of the text model inside ``model``: the module whose ``layers`` are the decoder layers.
    repeat : int
        How many rows each of the plan's stands for (beams).
    share_weights : bool
        The copy has the model's own parameters: cheaper, where nobody computes gradients.

    Raises
    ------
    NoReferenceError
        The positions of a layer are to be compacted, and nothing was found that makes its rotations; or, when the body is done, an
        attention did not go through transformers' registry, so that nothing was hidden in it.
    """
    _register()
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()} if share_weights else None)
    twin.set_attn_implementation(NAME)  # type: ignore[operator]
    inner = twin.get_submodule(text)
    layers = list(inner.layers)  # type: ignore[arg-type]
    rotations = _Rotations(inner, layers) if plan.compact else None
    ran: list[bool] = []
    inner.register_forward_hook(lambda *_: ran.append(True))
    for i, layer in enumerate(layers):
        if i in plan.hide:
            hide_in(layer, plan.hide[i].repeat_interleave(repeat, 0))
        if i in plan.compact or i in plan.write:
            _rewrite(layer, i, plan, rotations, repeat)
    yield twin
    blind = [i for i, layer in enumerate(layers) if not any(hasattr(m, _SEEN) for m in layer.modules())]
    if ran and blind:
        raise NoReferenceError(
            f"the attention of decoder layer {blind[0]} ({type(layers[blind[0]]).__name__}) does not take its function from "
            "transformers' registry, so the reference cannot hide tokens in it"
        )


def hide_in(layer: nn.Module, gone: Tensor) -> None:
    """Hide the columns ``gone (B, P)`` from everybody in the attention of one layer, of a copy that :func:`hidden_copy` made."""
    for module in layer.modules():
        setattr(module, _GONE, gone)


def _rewrite(layer: nn.Module, i: int, plan: Plan, rotations: _Rotations | None, repeat: int) -> None:
    """Before a layer runs: merged values, and positions that do not count what is gone."""
    signature = inspect.signature(layer.forward)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = dict(zip(signature.parameters, args, strict=False)) | kwargs
        hidden = next(iter(signature.parameters))
        if i in plan.write:
            call[hidden] = plan.write[i](call[hidden])
        if i in plan.compact:
            assert rotations is not None
            rotations.compact(i, call, hidden, plan.compact[i].repeat_interleave(repeat, 0))
        placed = list(signature.parameters)[: len(args)]
        return tuple(call.pop(name) for name in placed), call

    layer.register_forward_pre_hook(before, with_kwargs=True)


class _Rotations:
    """Whatever modules of a text model turn positions into something its layers are given; can be asked for other positions."""

    def __init__(self, text: nn.Module, layers: list[nn.Module]) -> None:
        inside = {id(m) for layer in layers for m in layer.modules()}
        self.made: list[tuple[nn.Module, inspect.BoundArguments, Any]] = []
        text.register_forward_pre_hook(lambda *_: self.made.clear())
        for module in text.modules():
            if module is not text and id(module) not in inside and not isinstance(module, (nn.Embedding, nn.ModuleList)):
                module.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        if any(_is_positions(v) for v in call.arguments.values()):
            self.made.append((module, call, out))

    def compact(self, i: int, call: dict[str, Any], hidden: str, gone: Tensor) -> None:
        """Replace the rotations among a layer's arguments, and its position ids."""
        found = False
        for name, value in call.items():
            if name == "position_ids" and _is_positions(value):
                call[name] = _without(value, gone)
            elif name != hidden and isinstance(value, (Tensor, tuple)):
                again = self._again(value, gone)
                if again is not None:
                    call[name], found = again, True
        if not found:
            raise NoReferenceError(f"nothing was found that makes the rotations which decoder layer {i} is given")

    def _again(self, value: Any, gone: Tensor) -> Any:
        """Rotations for compacted positions, if ``value`` are ones that a module made for full positions."""
        first = _first(value)
        for module, call, out in self.made:
            if first is not None and first is _first(out):
                arguments = {k: _without(v, gone) if _is_positions(v) else v for k, v in call.arguments.items()}
                with torch.no_grad():
                    return module.forward(**arguments)
        return None


def _is_positions(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool


def _first(value: Any) -> Tensor | None:
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) else None


def _without(positions: Tensor, gone: Tensor) -> Tensor:
    """Positions ``(B, S)`` less the number of columns gone before; ``gone (B, P)`` concerns the first ``P`` columns."""
    less = gone.cumsum(1) - gone.long()
    later = gone.sum(1, keepdim=True).expand(-1, positions.shape[1] - gone.shape[1])
    return (positions.expand(len(gone), -1) - torch.cat([less, later], 1)).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------------- run
def logits_after(
    model: nn.Module,
    plan: Plan,
    text: str,
    inputs: Mapping[str, Any],
    positions: Tensor | None,
    steps: int,
) -> Tensor:
    """Logits ``(B, steps, V)`` of the last ``steps`` tokens of a full sequence, with a plan carried out, without a KV cache.

    Parameters
    ----------
    model, plan, text
        As in :func:`hidden_copy`.
    inputs : mapping
        Arguments of the model's ``forward`` for the whole sequence: a prompt and what was generated after it.
    positions : Tensor or None
        Position ids of the whole sequence that the text model is to use; ``None``: those it makes itself.
    steps : int
        How many.
    """
    call = {**inputs, "use_cache": False}
    known = inspect.signature(model.forward).parameters
    if "logits_to_keep" in known:
        call["logits_to_keep"] = steps
    if positions is not None and "position_ids" in known:
        call["position_ids"] = positions
    with hidden_copy(model, plan, text, share_weights=True) as twin, torch.no_grad():
        inner = twin.get_submodule(text)
        if positions is not None and "position_ids" in inspect.signature(inner.forward).parameters:
            inner.register_forward_pre_hook(lambda _m, a, k: (a, {**k, "position_ids": positions}), with_kwargs=True)
        return twin(**call).logits[:, -steps:]
