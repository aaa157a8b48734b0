"""Mistral 3: a Pixtral tower that packs images of any size in one sequence; a merger joins 2 x 2 patches.

``[IMG_BREAK]`` and ``[IMG_END]`` between the rows are text tokens and stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.core import Layout
from vtc.families.base import PACKED, Family, VisionCall, assemble, feature_layer, multimodal_parts, offsets, pooled, refused

TYPES = ("mistral3",)


def build(model: nn.Module) -> Family:
    """Describe a ``Mistral3ForConditionalGeneration`` (or ``Mistral3Model``)."""
    config = model.config
    base, _ = multimodal_parts(model)
    tower = base.vision_tower
    layers = tower.transformer.layers
    patch = config.vision_config.patch_size
    step = patch * config.spatial_merge_size

    def describe(call: Mapping[str, Any]) -> VisionCall:
        sizes = torch.as_tensor(call["image_sizes"]).reshape(-1, 2).tolist()
        layouts = [Layout.grid(int(h) // step, int(w) // step) for h, w in sizes]
        blocks = [pooled((int(h) // patch, int(w) // patch), config.spatial_merge_size)[1] for h, w in sizes]
        pieces = [cells.numel() for cells in blocks]
        cells = torch.cat([block + start for block, start in zip(blocks, offsets(pieces), strict=True)])
        pixels = [p[:, : int(h), : int(w)] for p, (h, w) in zip(call["pixel_values"], sizes, strict=True)]
        return VisionCall([1] * len(sizes), layouts, layouts, pixels, cells, pieces)

    def example(height: int, width: int, processor: Mapping[str, Any]) -> dict[str, Any]:
        side = (processor.get("size") or {}).get("longest_edge", config.vision_config.image_size)
        ratio = max(height / side, width / side, 1)
        size = [math.ceil(int(n / ratio) / step) * step for n in (height, width)]
        return {"pixel_values": torch.empty(1, 3, *size, device="meta"), "image_sizes": torch.tensor([size])}

    most = config.vision_config.image_size // step
    used = feature_layer(config, len(layers))
    return assemble(
        model,
        tower=tower,
        layers=layers,
        attention=[layer.attention for layer in layers],
        projector=None,
        describe=describe,
        example=example,
        feature_layer=len(layers) - 1 if used is None else used,
        tokens=None,
        max_tokens=most * most,
        grid=(most, most),
        has_cls=False,
        provides=frozenset({"attention"}),
        stages=refused(PACKED, PACKED, PACKED),
        missing=dict.fromkeys(("projection", "pixels"), PACKED),
    )
