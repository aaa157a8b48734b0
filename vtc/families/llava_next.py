"""LLaVA-NeXT: AnyRes views (thumbnail, then crops row by row), unpadding, one newline token per row of the stitched picture."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Layout
from vtc.families import llava
from vtc.families.base import Family, VisionCall, anyres_layouts

TYPES = ("llava_next",)


def build(model: nn.Module) -> Family:
    """Describe a ``LlavaNextForConditionalGeneration`` (or ``LlavaNextModel``)."""
    strategy = model.config.vision_feature_select_strategy
    return anyres(model, lambda call: {"vision_feature_select_strategy": strategy})


def anyres(
    model: nn.Module,
    packing: Callable[[Mapping[str, Any]], dict[str, Any]],
    whole: Callable[[Mapping[str, Any], int], list[bool]] | None = None,
) -> Family:
    """Describe a model that cuts images into crops by ``image_grid_pinpoints``.

    Parameters
    ----------
    packing : callable
        A call of ``get_image_features`` to the further arguments of the model's ``pack_image_features``.
    whole : callable, optional
        A call and its number of images to which of them are not cut into crops.
    """
    family = llava.build(model)
    config, base = model.config, family.base
    module = sys.modules[type(base).__module__]
    grid, side = family.facts.grid, config.vision_config.image_size
    cached: dict[tuple[Any, ...], tuple[Layout, Layout]] = {}

    def views_of(size: tuple[int, int]) -> int:
        return int(module.image_size_to_num_patches(list(size), config.image_grid_pinpoints, side))

    def layouts(size: tuple[int, int], n: int, options: dict[str, Any]) -> tuple[Layout, Layout]:
        def pack(views: Tensor, newline: Tensor) -> Tensor:
            return base.pack_image_features([views], torch.tensor([size]), image_newline=newline, **options)[0][0]

        key = (size, n, *options.values())
        if key not in cached:
            shape = module.get_anyres_image_grid_shape(list(size), config.image_grid_pinpoints, side) if n > 1 else (1, 1)
            cached[key] = anyres_layouts(n, grid, shape, pack)
        return cached[key]

    def describe(call: Mapping[str, Any]) -> VisionCall:
        sizes = [(int(s[0]), int(s[1])) for s in torch.as_tensor(call["image_sizes"]).reshape(-1, 2).tolist()]
        uncut = whole(call, len(sizes)) if whole is not None else [False] * len(sizes)
        views = [1 if one else views_of(s) for s, one in zip(sizes, uncut, strict=True)]
        options = packing(call)
        pairs = [layouts(s, n, options) for s, n in zip(sizes, views, strict=True)]
        pixels = call["pixel_values"]
        if pixels.dim() == 5:
            pixels = torch.cat([p[:v] for p, v in zip(pixels, views, strict=True)])
        return VisionCall(views, [s for s, _ in pairs], [p for _, p in pairs], pixels)

    most = max((h // side) * (w // side) for h, w in config.image_grid_pinpoints)
    most_rows = max(h // side for h, _ in config.image_grid_pinpoints) * grid[0]
    most_tokens = (most + 1) * grid[0] * grid[1] + most_rows
    family.facts = dataclasses.replace(family.facts, tokens=None, max_tokens=most_tokens, max_views=most + 1, anyres=True)
    family.describe = describe
    family.example = lambda height, width: {
        "pixel_values": torch.empty(1, most + 1, 3, side, side, device="meta"),
        "image_sizes": torch.tensor([[height, width]]),
    }
    return family
