"""Models without an adapter: their structure is looked at, and what cannot be seen is assumed aloud."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.errors import UnsupportedModelError, did_you_mean
from vtc.families.base import Family, UnshortenableError, VisionCall, assemble, find, multimodal_parts, placeholder, refused

_UNKNOWN = "the vision side of this kind of model is not known to vtc, only that it makes features for placeholder tokens"
_CROSS = ("cross_attention_layers", "cross_layer_interval")
_DEEP = ("visual_pos_masks", "deepstack_visual_embeds")


def probe(model: nn.Module) -> Family:
    """Describe a model by its structure alone: the stages boundary and decoder, without signals of the vision tower.

    Warns
    -----
    UserWarning
        Names what was assumed.

    Raises
    ------
    UnsupportedModelError
        Something that is needed was not found; the message says what.
    """
    from vtc.families import list_families

    config = model.config
    kind = config.model_type
    if any(getattr(c, name, None) for c in (config, config.get_text_config()) for name in _CROSS):
        raise UnsupportedModelError(
            f"models of type '{kind}' look at pictures through cross-attention, so no visual tokens stand in the prompt that a "
            f"reducer could drop: use a model that puts them there (supported: {', '.join(list_families())})"
        )
    close = did_you_mean(kind, list_families())
    unknown = f"models of type '{kind}' are not supported{close} (supported: {', '.join(list_families())})"

    def need(value: Any, what: str) -> Any:
        if not value:
            raise UnsupportedModelError(f"{unknown}, and without an adapter {what} is needed, which was not found")
        return value

    if isinstance(getattr(model, "thinker", None), nn.Module):
        raise UnsupportedModelError(
            f"a '{kind}' speaks, too: patch `model.thinker`, a '{config.thinker_config.model_type}', which reads the pictures and "
            "writes the text"
        )
    try:
        base, text = multimodal_parts(model)
    except UnshortenableError:
        raise
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{unknown}, and {error}") from None
    need(callable(getattr(base, "get_image_features", None)), "get_image_features")
    need(placeholder(config, "image"), "the id of the image token (config.image_token_id)")
    taken = inspect.signature(text.forward).parameters
    need(any(p.kind is p.VAR_KEYWORD for p in taken.values()), "a text model that hands keyword arguments to its layers")
    for layer in text.layers:
        need(hasattr(layer, "self_attn"), "self_attn in every decoder layer")
        known = inspect.signature(layer.forward).parameters
        need(any(k.startswith("position_embeddings") for k in known), "position_embeddings among the arguments of every layer")
    rope = getattr(text.config, "rope_parameters", None) or getattr(text.config, "rope_scaling", None) or {}
    tower = find(base, ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")) or nn.Identity()
    deep = len(getattr(tower, "deepstack_visual_indexes", ())) if set(_DEEP) <= set(taken) else 0
    need(deep or not set(_DEEP) & set(taken), "the number of layers with DeepStack features")

    def describe(call: Mapping[str, Any]) -> VisionCall:
        return VisionCall([], [], [], torch.empty(0), from_features=True)

    warnings.warn(
        f"models of type '{kind}' have no adapter{close}: vtc assumes that get_image_features returns one entry per image, in the "
        "order of the placeholders, and that a square number of tokens is a square grid; vtc.verify(model) checks a small copy",
        stacklevel=4,
    )
    return assemble(
        model,
        tower=tower,
        probed=True,
        layers=nn.ModuleList(),
        attention=[],
        projector=None,
        describe=describe,
        describe_video=describe if hasattr(base, "get_video_features") and placeholder(config, "video") else None,
        between_layers=_DEEP if deep else None,
        feature_layer=0,
        tokens=None,
        max_tokens=None,
        grid=(1, 1),
        has_cls=False,
        provides=frozenset({"attention"}),
        stages=refused(_UNKNOWN, _UNKNOWN, _UNKNOWN),
        missing=dict.fromkeys(("attention", "projection", "pixels"), _UNKNOWN),
        mrope="mrope_section" in rope,
        first_layer=max(1, deep),
    )
