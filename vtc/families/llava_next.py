"""LLaVA-NeXT: AnyRes views (thumbnail, then crops row by row), unpadding, one newline token per row of the stitched picture.

The slot layout comes from running the model's own ``pack_image_features`` on coordinates instead of features, so unpadding and
newlines are right by construction, for any grid of crops.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.core import Facts, Kind, Layout
from vtc.families import llava
from vtc.families.base import Family, VisionCall, view_layout


def build(model: nn.Module) -> Family:
    """Describe a ``LlavaNextForConditionalGeneration`` (or ``LlavaNextModel``)."""
    family = llava.build(model)
    config, base = model.config, family.base
    module = sys.modules[type(base).__module__]
    grid = family.facts.grid
    cached: dict[tuple[int, int], tuple[Layout, Layout]] = {}

    def views_of(size: tuple[int, int]) -> int:
        return int(module.image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))

    def layouts(size: tuple[int, int]) -> tuple[Layout, Layout]:
        if size not in cached:
            cached[size] = _layouts(size)
        return cached[size]

    def _layouts(size: tuple[int, int]) -> tuple[Layout, Layout]:
        n, (rows, cols) = views_of(size), grid
        per = rows * cols
        entry = torch.arange(n * per)
        y, x = entry % per // cols, entry % per % cols
        high, wide = 1, n - 1
        if n > 1:
            high, wide = module.get_anyres_image_grid_shape(
                list(size), config.image_grid_pinpoints, config.vision_config.image_size
            )
            crop = (entry // per - 1).clamp(min=0)
            y = torch.where(entry >= per, y + crop // wide * rows, y)
            x = torch.where(entry >= per, x + crop % wide * cols, x)
        # the model's own packing, run on entry numbers; newline = -1
        numbers = entry.to(torch.float64).reshape(n, per, 1)
        packed, _ = base.pack_image_features(
            [numbers],
            torch.tensor([size]),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.full((1,), -1.0, dtype=torch.float64),
        )
        source = packed[0][:, 0].round().long()
        new = source < 0
        at = source.clamp(min=0)
        # a newline closes the stitched row of the token before it
        before = torch.where(new, torch.roll(at, 1), at)
        slots = Layout(
            kind=torch.where(new, int(Kind.NEWLINE), int(Kind.PATCH)),
            view=torch.where(new, -1, at // per),
            row=torch.where(new, -1, at % per // cols),
            col=torch.where(new, -1, at % per % cols),
            y=y[before],
            x=torch.where(new, x.max() + 1, x[at]),
            slot=torch.arange(len(source)),
            grids=(grid,) * n,
            thumbnail=n > 1,
        )
        slot_of = torch.full((n * per,), -1)
        slot_of[source[~new]] = torch.arange(len(source))[~new]
        return slots, view_layout(n, grid, slot_of, y, x, n > 1)

    def describe(call: Mapping[str, Any]) -> VisionCall:
        sizes = [(int(s[0]), int(s[1])) for s in torch.as_tensor(call["image_sizes"]).reshape(-1, 2).tolist()]
        pairs = [layouts(s) for s in sizes]
        views = [views_of(s) for s in sizes]
        pixels = call["pixel_values"]
        if pixels.dim() == 5:
            pixels = torch.cat([p[:v] for p, v in zip(pixels, views, strict=True)])
        return VisionCall(views, [s for s, _ in pairs], [p for _, p in pairs], pixels)

    side = config.vision_config.image_size
    most = max((h // side) * (w // side) for h, w in config.image_grid_pinpoints)
    most_rows = max(h // side for h, _ in config.image_grid_pinpoints) * grid[0]
    family.name = "llava_next"
    family.facts = Facts(
        **{
            **vars(family.facts),
            "family": "llava_next",
            "tokens": None,
            "max_tokens": (most + 1) * grid[0] * grid[1] + most_rows,
            "max_views": most + 1,
            "anyres": True,
        }
    )
    family.describe = describe
    return family
