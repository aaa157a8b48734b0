"""Gemma 3: SigLIP views of one size averaged to a fixed number of tokens; sliding-window layers; images see both ways.

Pan-and-scan crops come as images of their own: ``keep`` counts tokens per crop.
"""

from __future__ import annotations

import math

from torch import nn

from vtc.families.base import Family, grid_of, multimodal_parts, of_one_size, pooled, refused

TYPES = ("gemma3",)
_POOLED = "its projector averages blocks of patches, so patches cannot be dropped one by one in front of it"


def build(model: nn.Module) -> Family:
    """Describe a ``Gemma3ForConditionalGeneration`` (or ``Gemma3Model``)."""
    config = model.config
    base, _ = multimodal_parts(model)
    patches = grid_of(config.vision_config)
    grid, cells = pooled(patches, patches[0] // math.isqrt(config.mm_tokens_per_image))
    return of_one_size(
        model,
        base.vision_tower,
        grid,
        cells=cells,
        projector=None,
        unit="crop",
        stages=refused(_POOLED, _POOLED, _POOLED),
        missing={"projection": _POOLED},
    )
