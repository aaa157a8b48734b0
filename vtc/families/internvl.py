"""InternVL (HF): tiles of one size, each an image of its own here, whose patches a pixel shuffle joins 2 x 2.

The model is told tiles, not which of them are cut from one picture: ``keep`` counts tokens per tile. Video frames are tiles, too.
"""

from __future__ import annotations

from torch import nn

from vtc.families.base import (
    SHUFFLE,
    Family,
    clip_tower,
    feature_layer,
    grid_of,
    multimodal_parts,
    of_one_size,
    refused,
    shuffled,
)

TYPES = ("internvl",)


def build(model: nn.Module) -> Family:
    """Describe an ``InternVLForConditionalGeneration`` (or ``InternVLModel``)."""
    config = model.config
    base, _ = multimodal_parts(model)
    layers, _, _ = clip_tower(base.vision_tower, model)
    rows, cols = grid_of(config.vision_config)
    factor = round(1 / config.downsample_ratio)
    grid, cells = shuffled(
        (rows, cols), factor, lambda t: base.pixel_shuffle(t.view(1, rows, cols, 1), scale_factor=config.downsample_ratio)
    )
    return of_one_size(
        model,
        base.vision_tower,
        grid,
        cells=cells,
        feature_layer=feature_layer(config, len(layers)),
        projector=base.multi_modal_projector,
        processing={"crop_to_patches": True},
        unit="tile",
        frames="tiles",
        stages=refused(image=SHUFFLE, encoder=SHUFFLE),
    )
