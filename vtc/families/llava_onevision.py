"""LLaVA-OneVision: SigLIP, AnyRes with bilinear shrinking of large pictures; several images per prompt stay whole; video."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Layout
from vtc.families import llava_next
from vtc.families.base import Family, VisionCall, clip_pixels, frames

TYPES = ("llava_onevision",)


def build(model: nn.Module) -> Family:
    """Describe a ``LlavaOnevisionForConditionalGeneration`` (or ``LlavaOnevisionModel``)."""
    config = model.config

    def packing(call: Mapping[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": call.get("vision_aspect_ratio") or config.vision_aspect_ratio}

    def whole(call: Mapping[str, Any], images: int) -> list[bool]:
        counts = call.get("batch_num_images")
        return [False] * images if counts is None else [int(n) != 1 for n in counts for _ in range(int(n))]

    family = llava_next.anyres(model, packing, whole)
    describe, (rows, cols) = family.describe, family.facts.grid
    appended = 0 if newline_in_features(family.base) else 1
    grid, cells = (math.ceil(rows / 2), math.ceil(cols / 2)), _neighbours(family.base, rows, cols)

    def describe_image(call: Mapping[str, Any]) -> VisionCall:
        made = describe(call)
        if any(_shrunk(slots, patches) for slots, patches in zip(made.slots, made.patches, strict=True)):
            made.refuses = (
                "is followed by bilinear shrinking of a picture this large: use a reducer of the stage boundary or decoder, "
                "or a smaller picture"
            )
        return made

    def describe_video(call: Mapping[str, Any]) -> VisionCall:
        pixels = clip_pixels(call)
        clips, t = pixels.shape[:2]
        slots, patches = frames(t, grid, newline=True), frames(t, grid)
        why = "is followed by bilinear pooling of video frames: use a reducer of the stage boundary or decoder for videos"
        return VisionCall(
            [t] * clips, [slots] * clips, [patches] * clips, pixels.flatten(0, 1), cells, refuses=why, appended=appended
        )

    family.describe, family.describe_video = describe_image, describe_video
    return family


def newline_in_features(base: nn.Module) -> bool:
    """Whether ``get_video_features`` appends the newline token; older releases do so in ``forward``."""
    return "image_newline" in inspect.unwrap(type(base).get_video_features).__code__.co_names


def _shrunk(slots: Layout, patches: Layout) -> bool:
    """Whether patches inside the picture have no slot of their own (those outside are whole rows or columns)."""
    crops = slots.is_patch & (slots.view > 0)
    if not crops.any():
        return False
    y, x = slots.y[crops], slots.x[crops]
    inside = (patches.view > 0) & (patches.y >= y.min()) & (patches.y <= y.max())
    inside &= (patches.x >= x.min()) & (patches.x <= x.max())
    return bool((patches.slot[inside] < 0).any())


def _neighbours(base: nn.Module, rows: int, cols: int) -> Tensor:
    """Return the four patches around the centre of every pooled token, from the model's own pooling run on coordinates."""
    at = torch.arange(rows * cols)
    centre = base.apply_pooling(torch.stack([at // cols, at % cols], -1).double()[None])[0]
    low, high = centre.floor().long(), centre.ceil().long()
    corners = [y[:, 0] * cols + x[:, 1] for y in (low, high) for x in (low, high)]
    return torch.stack(corners, 1)
