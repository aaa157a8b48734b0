"""The only file that looks at transformers versions. Supported: 4.57 up to, and not including, 6."""

from __future__ import annotations

import functools
import inspect
from typing import Any

OLDEST = "4.57"
NEWEST_EXCLUSIVE = "6"


@functools.cache
def transformers_version() -> tuple[int, int, int]:
    """Return the installed transformers version as three integers."""
    import transformers

    head = transformers.__version__.split(".dev")[0].split("rc")[0].split(".")
    return tuple(int(p) for p in (head + ["0", "0"])[:3])  # type: ignore[return-value]


@functools.cache
def static_cache_tracks_length() -> bool:
    """Whether static cache layers count their own tokens (newer releases); older ones write at a logical ``cache_position``."""
    from transformers.cache_utils import StaticLayer

    return "cache_kwargs" not in inspect.signature(StaticLayer.update).parameters


@functools.cache
def generate_continues_with_images() -> bool:
    """Whether ``generate`` accepts new images on top of a non-empty cache (4.57 drops ``pixel_values`` then)."""
    return transformers_version() >= (5, 0, 0)


def features_of(out: Any) -> Any:
    """Return the features of every image or video from what ``get_image_features`` or ``get_video_features`` returned."""
    features = getattr(out, "pooler_output", out)
    deep = isinstance(features, tuple) and len(features) == 2 and isinstance(features[1], list)
    return features[0] if deep else features  # 4.57 puts DeepStack features beside those of the last layer


def one_rotation(table: Any, attention: Any) -> Any:
    """Return cosines and sines with one row per token; under M-RoPE, 4.57 hands three to the layers, which take a part of each."""
    if table[0].dim() == 3:
        return table
    import torch

    sections = list(attention.rope_scaling["mrope_section"]) * 2
    return tuple(torch.cat([part[i % 3] for i, part in enumerate(t.split(sections, -1))], -1) for t in table)


def video_newline_in_features(base: Any) -> bool:
    """Whether LLaVA-OneVision's ``get_video_features`` appends the newline token; older releases do so in ``forward``."""
    return "image_newline" in inspect.unwrap(type(base).get_video_features).__code__.co_names


@functools.cache
def checkpoint_repeats_hooks() -> bool:
    """Whether gradient checkpointing wraps a layer together with its hooks, so that a recomputation runs them again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__init_subclass__" not in vars(GradientCheckpointingLayer)


def records_before_hooks(tower: Any) -> bool:
    """Whether the outputs of a tower's layers are recorded inside their ``forward``, where no hook can change them (4.57)."""
    return transformers_version() < (5, 0, 0) and any(getattr(m, "_can_record_outputs", None) for m in tower.modules())
