"""One adapter per model family, found by ``config.model_type``."""

from __future__ import annotations

import importlib

from torch import nn

from vtc.errors import UnsupportedModelError, did_you_mean
from vtc.families.base import Family

# model_type -> module of this package with a build(model) function
FAMILIES: dict[str, str] = {
    "llava": "llava",
    "llava_next": "llava_next",
    "llava_next_video": "llava_next_video",
    "llava_onevision": "llava_onevision",
    "paligemma": "paligemma",
    "vipllava": "vipllava",
}


def list_families() -> list[str]:
    """Return the supported values of ``config.model_type``."""
    return sorted(FAMILIES)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT, DistributedDataParallel or torch.compile wrappers."""
    if hasattr(model, "_orig_mod"):
        return unwrap(model._orig_mod)
    if hasattr(model, "get_base_model"):
        return unwrap(model.get_base_model())
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(model.module)
    return model


def family_of(model: nn.Module) -> Family:
    """Return the adapter's description of ``model``.

    Raises
    ------
    UnsupportedModelError
        If no adapter knows ``config.model_type``.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise UnsupportedModelError(
            f"a {type(model).__name__} is not a transformers vision-language model (no config.model_type): pass the model that "
            "`AutoModelForImageTextToText.from_pretrained` returns"
        )
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"models of type '{kind}' are not supported{did_you_mean(kind, FAMILIES)} (supported: {', '.join(list_families())})"
        )
    return importlib.import_module(f"vtc.families.{FAMILIES[kind]}").build(model)
