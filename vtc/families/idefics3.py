"""Idefics3 and SmolVLM: tiles of one size whose patches a pixel shuffle joins; row and column markers between them are text.

The model is told tiles, not which of them are cut from one picture: ``keep`` counts tokens per tile. Video frames are tiles, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtc.families.base import SHUFFLE, Family, grid_of, multimodal_parts, of_one_size, refused, shuffled

TYPES = ("idefics3", "smolvlm")


def build(model: nn.Module) -> Family:
    """Describe an ``Idefics3ForConditionalGeneration`` or ``SmolVLMForConditionalGeneration`` (or the model inside)."""
    base, _ = multimodal_parts(model)
    connector = base.connector
    factor = connector.scale_factor
    grid, cells = shuffled(grid_of(model.config.vision_config), factor, lambda t: connector.pixel_shuffle(t, factor))

    def pixels(call: Mapping[str, Any]) -> Tensor:
        tiles = call["pixel_values"].flatten(0, 1)
        return tiles[(tiles != 0).flatten(1).any(1)]  # without the padding of rows with fewer tiles

    return of_one_size(
        model,
        base.vision_model,
        grid,
        cells=cells,
        pixels=pixels,
        projector=connector.modality_projection,
        unit="tile",
        frames="tiles" if model.config.model_type == "smolvlm" else "",
        stages=refused(image=SHUFFLE, encoder=SHUFFLE),
    )
