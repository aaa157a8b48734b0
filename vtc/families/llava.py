"""LLaVA-1.5 and its like: one CLIP or SigLIP view per image, a fixed grid of patches, 1-D RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.core import Layout
from vtc.errors import UnsupportedModelError
from vtc.families.base import (
    Family,
    VisionCall,
    assemble,
    clip_tower,
    feature_layer,
    grid_of,
    multimodal_parts,
    require,
    single_views,
    square,
    tower_stages,
)

TYPES = ("llava",)


def build(model: nn.Module, *, last: bool = False) -> Family:
    """Describe a ``LlavaForConditionalGeneration`` (or ``LlavaModel``).

    ``last``: the features are the tower's last hidden state, whatever the configuration says (PaliGemma).
    """
    config = model.config
    base, _ = multimodal_parts(model)
    tower = require(getattr(base, "vision_tower", None), "vision tower", model)
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(f"{config.model_type} with a '{kind}' tower is not supported: CLIP and SigLIP towers are")
    layers, attention, has_cls = clip_tower(tower, model)
    grid = grid_of(config.vision_config)
    full = has_cls and getattr(config, "vision_feature_select_strategy", "default") == "full"
    n = grid[0] * grid[1] + full  # the class token occupies the first slot
    patches = Layout.grid(*grid)
    slots = Layout.flat(n) if full else patches
    used = len(layers) - 1 if last else feature_layer(config, len(layers))

    def describe(call: Mapping[str, Any]) -> VisionCall:
        views = single_views(call["pixel_values"], patches)
        views.slots = [slots] * len(views.slots)
        return views

    return assemble(
        model,
        tower=tower,
        layers=layers,
        attention=attention,
        projector=base.multi_modal_projector,
        describe=describe,
        example=square(config),
        feature_layer=used if used is not None else len(layers) - 1,
        tokens=n,
        max_tokens=n,
        grid=grid,
        has_cls=has_cls,
        provides=frozenset({"attention"} | ({"cls"} if has_cls else set())),
        stages=tower_stages(used is not None, full),
    )
