"""LLaVA-1.5: one CLIP view per image, a fixed grid of patches, 1-D RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.core import Facts, Layout
from vtc.errors import UnsupportedModelError
from vtc.families.base import (
    Family,
    VisionCall,
    clip_tower,
    feature_layer,
    grid_of,
    multimodal_parts,
    require,
    tower_stages,
)


def build(model: nn.Module) -> Family:
    """Describe a ``LlavaForConditionalGeneration`` (or ``LlavaModel``)."""
    config = model.config
    base, text = multimodal_parts(model)
    tower = require(getattr(base, "vision_tower", None), "vision tower", model)
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(
            f"LLaVA with a '{config.vision_config.model_type}' tower is not supported: CLIP and SigLIP towers are"
        )
    layers, attention, has_cls = clip_tower(tower, model)
    grid = grid_of(config.vision_config)
    full = config.vision_feature_select_strategy == "full"
    extra = int(full and has_cls)  # the class token occupies the first slot
    n = grid[0] * grid[1] + extra
    patches = Layout.grid(*grid)
    slots = patches if not extra else Layout.flat(n)
    used = feature_layer(config, len(layers))

    def describe(call: Mapping[str, Any]) -> VisionCall:
        pixels = call["pixel_values"]
        images = pixels.shape[0]
        return VisionCall([1] * images, [slots] * images, [patches] * images, pixels)

    provides = {"attention"} | ({"cls"} if has_cls else set())
    facts = Facts(
        family="llava",
        layers=len(text.layers),
        encoder_layers=len(layers),
        feature_layer=used if used is not None else len(layers) - 1,
        tokens=n,
        max_tokens=n,
        grid=grid,
        has_cls=has_cls,
        provides=frozenset(provides),
        stages=tower_stages(used is not None, full and has_cls),
    )
    return Family(
        name="llava",
        base=base,
        text=text,
        layers=text.layers,
        text_attention=[layer.self_attn for layer in text.layers],
        tower=tower,
        encoder_layers=layers,
        encoder_attention=attention,
        projector=base.multi_modal_projector,
        image_token_ids=(config.image_token_id,),
        facts=facts,
        describe=describe,
    )
