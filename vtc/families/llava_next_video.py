"""LLaVA-NeXT-Video: images as LLaVA-NeXT; the frames of a clip are pooled 2 x 2 in front of the projector and have no newlines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vtc.families import llava_next
from vtc.families.base import Family, VisionCall, clip_pixels, frames, pooled

TYPES = ("llava_next_video",)


def build(model: nn.Module) -> Family:
    """Describe a ``LlavaNextVideoForConditionalGeneration`` (or ``LlavaNextVideoModel``)."""
    family = llava_next.build(model)
    grid, cells = pooled(family.facts.grid, model.config.spatial_pool_stride)

    def describe_video(call: Mapping[str, Any]) -> VisionCall:
        pixels = clip_pixels(call)
        clips, t = pixels.shape[:2]
        layout = frames(t, grid)
        why = "is given pooled video frames on this model: use a reducer of the stage boundary or decoder for videos"
        return VisionCall([t] * clips, [layout] * clips, [layout] * clips, pixels.flatten(0, 1), cells, refuses=why)

    family.describe_video = describe_video
    return family
