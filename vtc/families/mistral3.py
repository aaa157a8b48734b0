"""Mistral 3: a Pixtral tower that packs images of any size in one sequence; a merger joins 2 x 2 patches (none in Pixtral 12B).

``[IMG_BREAK]`` and ``[IMG_END]`` between the rows are text tokens and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.core import Layout
from vtc.errors import UnsupportedFeatureError
from vtc.families.base import PACKED, Family, VisionCall, assemble, feature_layer, multimodal_parts, offsets, pooled, refused

TYPES = ("mistral3",)


def build(model: nn.Module) -> Family:
    """Describe a ``Mistral3ForConditionalGeneration`` (or ``Mistral3Model``), or a LLaVA with a Pixtral tower."""
    config = model.config
    base, _ = multimodal_parts(model)
    tower = base.vision_tower
    layers = tower.transformer.layers
    patch = config.vision_config.patch_size
    merge = getattr(config, "spatial_merge_size", 1)
    step = patch * merge
    packed = PACKED if merge > 1 else "its tower packs images of any size in one sequence"

    def describe(call: Mapping[str, Any]) -> VisionCall:
        if call.get("image_sizes") is None:
            raise UnsupportedFeatureError("pictures come without image_sizes here: pass what the processor returns beside them")
        sizes = torch.as_tensor(call["image_sizes"]).reshape(-1, 2).tolist()
        layouts = [Layout.grid(int(h) // step, int(w) // step) for h, w in sizes]
        blocks = [pooled((int(h) // patch, int(w) // patch), merge)[1] for h, w in sizes]
        pieces = [cells.numel() for cells in blocks]
        cells = torch.cat([block + start for block, start in zip(blocks, offsets(pieces), strict=True)])
        pixels = [p[:, : int(h), : int(w)] for p, (h, w) in zip(call["pixel_values"], sizes, strict=True)]
        return VisionCall([1] * len(sizes), layouts, layouts, pixels, cells, pieces)

    most = config.vision_config.image_size // step
    used = feature_layer(config, len(layers))
    return assemble(
        model,
        tower=tower,
        layers=layers,
        attention=[layer.attention for layer in layers],
        projector=None,
        describe=describe,
        processing={"patch_size": {"height": step, "width": step}},
        feature_layer=len(layers) - 1 if used is None else used,
        tokens=None,
        max_tokens=most * most,
        grid=(most, most),
        has_cls=False,
        provides=frozenset({"attention"}),
        stages=refused(packed, packed, packed),
        missing=dict.fromkeys(("projection", "pixels"), packed),
    )
