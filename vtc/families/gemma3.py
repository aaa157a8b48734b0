"""Gemma 3: SigLIP views of one size averaged to a fixed number of tokens; sliding-window layers; images see both ways.

Pan-and-scan crops come as images of their own: ``keep`` counts tokens per crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.core import Layout
from vtc.families.base import (
    Family,
    VisionCall,
    assemble,
    clip_tower,
    grid_of,
    multimodal_parts,
    pooled,
    refused,
    single_views,
    square,
)

TYPES = ("gemma3",)
_POOLED = "its projector averages blocks of patches, so patches cannot be dropped one by one in front of it"


def build(model: nn.Module) -> Family:
    """Describe a ``Gemma3ForConditionalGeneration`` (or ``Gemma3Model``)."""
    config = model.config
    base, _ = multimodal_parts(model)
    layers, attention, has_cls = clip_tower(base.vision_tower, model)
    patches = grid_of(config.vision_config)
    grid, cells = pooled(patches, patches[0] // math.isqrt(config.mm_tokens_per_image))
    layout = Layout.grid(*grid)

    def describe(call: Mapping[str, Any]) -> VisionCall:
        return single_views(call["pixel_values"], layout, cells)

    return assemble(
        model,
        tower=base.vision_tower,
        layers=layers,
        attention=attention,
        projector=None,
        describe=describe,
        example=square(config),
        unit="crop",
        feature_layer=len(layers) - 1,
        tokens=len(layout),
        max_tokens=len(layout),
        grid=grid,
        has_cls=has_cls,
        provides=frozenset({"attention"}),
        stages=refused(_POOLED, _POOLED, _POOLED),
        missing={"projection": _POOLED},
    )
