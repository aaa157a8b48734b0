"""Reading q, k, v of single attention layers while the model runs SDPA, FlashAttention or eager attention as configured.

One attention module gets a thin proxy as its ``config``, whose attention implementation is called ``vtc_tap_<the real one>``. The
function registered under that name looks at the final q, k, v (after bias, norms, RoPE, cache update) and then calls the real
attention. Nothing changes for other modules or other models; taking it off is one assignment. No layer runs twice, no attention
map is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtc.engine import upstream
from vtc.engine.undo import Undo
from vtc.errors import PatchError

# "flash" must survive in the name: transformers looks for that substring
PREFIX = "vtc_tap_"

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, Any, float, Any], None]


class _TappedConfig:
    """Everything the real config says, except the name of the attention implementation."""

    def __init__(self, real: Any, observe: Observer) -> None:
        self.__dict__.update(_real=real, _observe=observe)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_real" not in self.__dict__:  # copying and pickling protocols probe a bare object
            raise AttributeError(name)
        if name == upstream.IMPLEMENTATION:
            name = PREFIX + upstream.attention_of(self._real)
            if name not in upstream.ATTENTION:
                upstream.ATTENTION.register(name, _observe_and_attend)
            return name
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


class _RealModule:
    """The attention module as the real attention function must see it: with its real config."""

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(_module=module, config=module.config._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _observe_and_attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    ctx = kwargs.pop(upstream.CONTEXT, None)
    config = module.config
    attend = upstream.attend(module, upstream.attention_of(config._real))
    mask, scaling = upstream.attention_arguments(query, args, kwargs)
    config._observe(module, query, key, value, mask, scaling, ctx)
    return attend(_RealModule(module), query, key, value, *args, **kwargs)


def attach(undo: Undo, attention: nn.Module, observe: Observer) -> None:
    """Tap one attention module."""
    if isinstance(attention.config, _TappedConfig):
        raise PatchError("this attention layer is tapped already: call vtc.unpatch(model) first")
    upstream.check_implementation(attention.config)
    tapped = _TappedConfig(attention.config, observe)
    undo.step(functools.partial(_detach, attention, tapped))  # not a closure: a deep copy must take off its own tap
    attention.config = tapped


def _detach(attention: nn.Module, tapped: _TappedConfig) -> None:
    if attention.config is tapped:
        attention.config = tapped._real
