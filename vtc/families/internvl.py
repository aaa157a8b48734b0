"""InternVL (HF): tiles of one size, each an image of its own here, whose patches a pixel shuffle joins 2 x 2.

The model is told tiles, not which of them are cut from one picture: ``keep`` counts tokens per tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.core import Layout
from vtc.families.base import (
    SHUFFLE,
    Family,
    VisionCall,
    assemble,
    clip_tower,
    feature_layer,
    grid_of,
    multimodal_parts,
    refused,
    shuffled,
    single_views,
    square,
)

TYPES = ("internvl",)


def build(model: nn.Module) -> Family:
    """Describe an ``InternVLForConditionalGeneration`` (or ``InternVLModel``)."""
    config = model.config
    base, _ = multimodal_parts(model)
    layers, attention, has_cls = clip_tower(base.vision_tower, model)
    rows, cols = grid_of(config.vision_config)
    factor = round(1 / config.downsample_ratio)
    grid, cells = shuffled(
        (rows, cols), factor, lambda t: base.pixel_shuffle(t.view(1, rows, cols, 1), scale_factor=config.downsample_ratio)
    )
    layout = Layout.grid(*grid)

    def describe(call: Mapping[str, Any]) -> VisionCall:
        return single_views(call["pixel_values"], layout, cells)

    used = feature_layer(config, len(layers))
    return assemble(
        model,
        tower=base.vision_tower,
        layers=layers,
        attention=attention,
        projector=base.multi_modal_projector,
        describe=describe,
        example=square(config),
        unit="tile",
        feature_layer=used,
        tokens=len(layout),
        max_tokens=len(layout),
        grid=grid,
        has_cls=has_cls,
        provides=frozenset({"attention"} | ({"cls"} if has_cls else set())),
        stages=refused(image=SHUFFLE, encoder=SHUFFLE),
    )
