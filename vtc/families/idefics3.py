"""Idefics3 and SmolVLM: tiles of one size whose patches a pixel shuffle joins; row and column markers between them are text.

The model is told tiles, not which of them are cut from one picture: ``keep`` counts tokens per tile. Video frames are tiles, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.core import Layout
from vtc.families.base import (
    SHUFFLE,
    Family,
    VisionCall,
    assemble,
    clip_tower,
    grid_of,
    multimodal_parts,
    refused,
    shuffled,
    single_views,
)

TYPES = ("idefics3", "smolvlm")


def build(model: nn.Module) -> Family:
    """Describe an ``Idefics3ForConditionalGeneration`` or ``SmolVLMForConditionalGeneration`` (or the model inside)."""
    base, _ = multimodal_parts(model)
    connector = base.connector
    layers, attention, has_cls = clip_tower(base.vision_model, model)
    factor = connector.scale_factor
    grid, cells = shuffled(grid_of(model.config.vision_config), factor, lambda t: connector.pixel_shuffle(t, factor))
    layout, side = Layout.grid(*grid), model.config.vision_config.image_size

    def describe(call: Mapping[str, Any]) -> VisionCall:
        tiles = call["pixel_values"].flatten(0, 1)
        real = (tiles != 0).flatten(1).any(1)  # padding of rows with fewer tiles
        return single_views(tiles[real], layout, cells)

    return assemble(
        model,
        tower=base.vision_model,
        layers=layers,
        attention=attention,
        projector=connector.modality_projection,
        describe=describe,
        example=lambda *_: {"pixel_values": torch.ones(1, 1, 3, side, side)},
        unit="tile",
        feature_layer=len(layers) - 1,
        tokens=len(layout),
        max_tokens=len(layout),
        grid=grid,
        has_cls=has_cls,
        provides=frozenset({"attention"}),
        stages=refused(image=SHUFFLE, encoder=SHUFFLE),
    )
