"""The Qwen-VLs and their kin, GLM-4V and EXAONE 4.5: images and clips of any size in one packed sequence, 2 x 2 merger.

Positions are three-dimensional (not on EXAONE) and stay the original ones. The merged tokens of an image come in raster order,
whatever the order inside the tower (Qwen2.5-VL permutes windows). Qwen3-VL adds visual features between the first decoder layers
(DeepStack): their rows are shortened with the tokens, and tokens can be dropped inside the decoder only behind the last of them.
GLM-4V writes clips with the placeholders of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Layout
from vtc.families.base import PACKED, Family, VisionCall, assemble, frames, multimodal_parts, offsets, refused

WINDOWS = "its tower attends within windows, whose borders would move"
DEEP = "its tower hands features of several layers on, of all patches"
FILTERS = "its tower merges squares of patches by a convolution behind its last layer"
TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v", "exaone4_5")


def build(model: nn.Module) -> Family:
    """Describe a model ``...ForConditionalGeneration`` of one of these kinds (or the model inside)."""
    base, text = multimodal_parts(model)
    tower = base.visual
    merge = tower.spatial_merge_size
    whole = getattr(tower, "fullatt_block_indexes", None)
    window = 0 if whole is None else tower.window_size // merge // tower.patch_size

    def layouts(thw: Any, video: bool) -> list[Layout]:
        grids = [(int(t), (int(h) // merge, int(w) // merge)) for t, h, w in thw.tolist()]
        return [frames(t, grid) if video else Layout.grid(*grid) for t, grid in grids]

    def describer(pixels: str, grids: str, video: bool) -> Any:
        def describe(call: Mapping[str, Any]) -> VisionCall:
            slots = layouts(call[grids], video)
            rows = call[pixels].split(call[grids].prod(-1).tolist())
            frames_of = [grid for s in slots for grid in s.grids]
            starts = offsets([h * w for h, w in frames_of])
            order = torch.cat([place(*grid) + start for grid, start in zip(frames_of, starts, strict=True)])
            cells = order[:, None] * merge * merge + torch.arange(merge * merge)
            pieces = [h * w * merge * merge for h, w in frames_of]
            return VisionCall([s.views for s in slots], slots, slots, list(rows), cells, pieces)

        return describe

    def place(rows: int, cols: int) -> Tensor:
        """Places inside the tower of a frame's tokens in raster order: window by window where there are windows."""
        y, x = torch.arange(rows)[:, None], torch.arange(cols)
        side = window or max(rows, cols)
        return (y // side * cols + x // side).flatten().argsort(stable=True).argsort()

    deep = len(getattr(tower, "deepstack_visual_indexes", ()))
    glm = model.config.model_type.startswith("glm")
    plain = whole is None and not deep and not glm  # Qwen2-VL: patches can be dropped between the layers
    rope = getattr(text.config, "rope_parameters", None) or getattr(text.config, "rope_scaling", None) or {}
    family = assemble(
        model,
        tower=tower,
        layers=tower.blocks,
        attention=[block.attn for block in tower.blocks],
        projector=None,
        describe=describer("pixel_values", "image_grid_thw", False),
        describe_video=describer("pixel_values_videos", "video_grid_thw", True),
        between_layers=("visual_pos_masks", "deepstack_visual_embeds") if deep else None,
        feature_layer=len(tower.blocks) - 1,
        tokens=None,
        max_tokens=None,
        grid=(1, 1),
        has_cls=False,
        provides=frozenset({"attention"}),
        stages=refused(PACKED, "" if plain else WINDOWS if whole is not None else DEEP if deep else FILTERS, PACKED),
        merger=tower.merger if plain else None,
        merge=merge * merge,
        no_merging="where a merged patch would have no place to be rotated by here",
        missing=dict.fromkeys(("projection", "pixels"), PACKED),
        windowed=() if whole is None else tuple(i for i in range(len(tower.blocks)) if i not in whole),
        mrope=model.config.model_type.startswith("qwen") or "mrope_section" in rope,
        first_layer=max(1, deep),
    )
    if glm:
        family.video_token_ids = family.image_token_ids
    return family
