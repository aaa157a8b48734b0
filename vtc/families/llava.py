"""LLaVA-1.5 and its like: one CLIP or SigLIP view per image, a fixed grid of patches, 1-D RoPE."""

from __future__ import annotations

from torch import nn

from vtc.core import Layout
from vtc.errors import UnsupportedModelError
from vtc.families import mistral3
from vtc.families.base import (
    Family,
    clip_tower,
    feature_layer,
    grid_of,
    multimodal_parts,
    of_one_size,
    require,
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
    if kind == "pixtral":
        return mistral3.build(model)
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(
            f"{config.model_type} with a '{kind}' tower is not supported: CLIP, SigLIP and Pixtral towers are"
        )
    layers, _, has_cls = clip_tower(tower, model)
    grid = grid_of(config.vision_config)
    full = has_cls and getattr(config, "vision_feature_select_strategy", "default") == "full"
    used = len(layers) - 1 if last else feature_layer(config, len(layers))
    return of_one_size(
        model,
        tower,
        grid,
        slots=Layout.flat(grid[0] * grid[1] + 1) if full else None,  # the class token occupies the first slot
        feature_layer=used,
        projector=base.multi_modal_projector,
        stages=tower_stages(used is not None, full),
    )
