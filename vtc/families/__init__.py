"""One adapter per model family, found by ``config.model_type``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from torch import nn

from vtc.errors import UnsupportedModelError
from vtc.families.base import Family, Retriever, Transformer
from vtc.families.probing import probe


@functools.cache
def adapters() -> dict[str, ModuleType]:
    """Return the adapter of every ``config.model_type``: each module here with ``TYPES`` and ``build(model)`` is one."""
    return {kind: module for module in _modules() if hasattr(module, "build") for kind in getattr(module, "TYPES", ())}


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]


def list_families() -> list[str]:
    """Return the supported values of ``config.model_type``, with ``"timm"`` for that package's vision transformers."""
    return sorted({kind for module in _modules() for kind in getattr(module, "TYPES", ())})


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT, DistributedDataParallel or torch.compile wrappers."""
    if hasattr(model, "_orig_mod"):
        return unwrap(model._orig_mod)
    if hasattr(model, "get_base_model"):
        return unwrap(model.get_base_model())
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(model.module)
    return model


def family_of(model: nn.Module) -> Family | Transformer | Retriever:
    """Return the adapter's description of ``model``: a :class:`Family`, unless it has no language model that generates.

    A model whose ``config.model_type`` no adapter knows is looked at, and a warning names what was assumed: see
    :mod:`vtc.families.probing`.

    Raises
    ------
    UnsupportedModelError
        If nothing is known of it and its structure is none that vtc can hook into.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if any(cls.__module__.partition(".")[0] == "timm" for cls in type(model).__mro__):
        kind = "timm"
    if kind is None:
        raise UnsupportedModelError(
            f"a {type(model).__name__} is not a transformers vision-language model (no config.model_type): pass the model that "
            "`AutoModelForImageTextToText.from_pretrained` returns"
        )
    adapter = adapters().get(kind)
    return probe(model) if adapter is None else adapter.build(model)
