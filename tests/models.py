"""Tiny random vision-language models, built from configs (no downloads), with hand-made inputs.

The weights are scaled so that attention is far from uniform: with the default initialisation every token looks alike, dropping
some changes nothing, and any test passes. :mod:`family_cases` is the table of all families.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from family_cases import (
    CASES,
    DECODER_LAYERS,
    IMAGE_TOKEN,
    OTHERS,
    PAD,
    PINPOINTS,
    SIZES,
    SPECIAL,
    TEXT,
    TOWER_LAYERS,
    VIDEO_TOKEN,
    VISION,
    VOCABULARY,
    case_of,
    view_count,
)
from torch import Tensor, nn

from vtc.engine import upstream
from vtc.families.llava_onevision import newline_in_features

__all__ = ["DECODER_LAYERS", "PINPOINTS", "SIZES", "TOWER_LAYERS", "VOCABULARY", "view_count"]

FAMILIES = ("llava", "llava_next", "llava_siglip")
"""The models that run the whole of test_oracle. ``llava_siglip``: LLaVA with a tower that has no class token."""

GRID = 4
"""Rows and columns of one view's grid of visual tokens."""


def build(
    name: str,
    impl: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **over: Any,
) -> nn.Module:
    """Build a tiny model in eval mode.

    Parameters
    ----------
    name : str
        One of :data:`family_cases.CASES` or :data:`family_cases.OTHERS`.
    impl : str
        Attention implementation of language model and tower.
    dtype : torch.dtype
        Type of weights.
    seed : int
        Seed of the weights.
    text, vision : dict, optional
        Changes to the text and vision configs.
    **over
        Changes to the outer config.
    """
    kind, config = (CASES | OTHERS)[name].make(TEXT | (text or {}), VISION | (vision or {}), over)
    model = kind(config)
    model.tiny_case = name
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = SPECIAL
    _randomize(model, seed)
    model = model.to(dtype).eval()
    set_attention(model, impl)
    return model


def where(condition: Any) -> Callable[[Any], Any]:
    """Decorator: collect a test only where the installed transformers has the feature. Put it on the outside."""
    return lambda test: test if condition else None


@functools.cache
def shared(name: str, impl: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return :func:`build`'s model, built once per process: for tests that leave it as they found it."""
    return build(name, impl, dtype, seed)


def set_attention(model: nn.Module, impl: str) -> None:
    """Use attention implementation ``impl`` in every part of ``model``, by the registered name (also one of the tests' own)."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = impl


def _randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() >= 2:
                scale = 1.0 if "embed_tokens" in name else 1.6 / math.sqrt(weight[0].numel())
                weight.copy_(noise * scale)
            elif "norm" in name.lower() and name.endswith("weight"):
                weight.copy_(weight + 0.1 * noise)
            else:
                weight.copy_(0.1 * noise)


def make_inputs(
    name: str,
    model: nn.Module,
    batch: int = 1,
    seed: int = 0,
    images: Sequence[int] | None = None,
    sizes: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and pixels for ``model.forward`` and ``model.generate``.

    Parameters
    ----------
    batch : int
        1: one prompt with one image. 2: left padded, rows with one and two images.
    seed : int
        Seed of pixels and text.
    images : sequence of int, optional
        Images (or clips) of each row; 0 gives a row without image. Overrides ``batch``.
    sizes : sequence of (height, width), optional
        Sizes of all images in order (AnyRes families).
    """
    generator = torch.Generator().manual_seed(seed)
    images = list(images) if images is not None else ([1] if batch == 1 else [1, 2])
    dtype, case = next(model.parameters()).dtype, (CASES | OTHERS)[name]
    extra: dict[str, Tensor] = {}
    if sum(images):
        extra = case.pixels(model, images, lambda *shape: torch.randn(*shape, generator=generator), sizes)
        extra = {k: v.to(dtype) if v.is_floating_point() else v for k, v in extra.items()}
    lengths = iter(enumerate([len(f) for f in image_features(model, extra)] if sum(images) else []))

    def words(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    rows = []
    for row, k in enumerate(images):
        ids = words(6 if row == 0 else 3)
        for _ in range(k):
            ids += image_ids(model, *next(lengths), extra) + words(2)
        rows.append(ids + words(5 if row == 0 else 2))
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask, **extra, **case.extra(ids, longest)}


def image_ids(model: nn.Module, image: int, slots: int, pixels: dict[str, Tensor]) -> list[int]:
    """Token ids that stand for one image in a prompt."""
    case = case_of(model)
    if case.run is not None:
        return case.run(model, image, slots, pixels)
    return [VIDEO_TOKEN if case.video else IMAGE_TOKEN] * slots


def image_features(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the unpatched model's features of every image (or clip), ``(slots, D)`` each, in placeholder order."""
    base, case = model.model if hasattr(model.model, "get_image_features") else model, case_of(model)
    make = base.get_video_features if case.video else base.get_image_features
    names = inspect.signature(make).parameters
    call: dict[str, Any] = {k: v for k, v in inputs.items() if k in names}
    if "image_sizes" in inputs and "kwargs" in names:  # 4.57's LLaVA hands them to its tower
        call["image_sizes"] = inputs["image_sizes"]
    if "pixel_values_videos" in inputs and "pixel_values_videos" not in names:  # 4.57
        call["pixel_values"] = inputs["pixel_values_videos"]
    for key in ("vision_feature_layer", "vision_feature_select_strategy"):  # 4.57 has no default here
        if key in names:
            call[key] = getattr(model.config, key)
    with torch.no_grad():
        out = upstream.features_of(make(**call))
    features = [f.reshape(-1, f.shape[-1]) for f in out]
    if case.newline_ends and not newline_in_features(base):
        features = [torch.cat([f, base.image_newline[None].detach()]) for f in features]
    if case.tiles:  # made per row
        features = torch.cat(features).split(GRID * GRID)
    return list(features)


def visual_of(inputs: dict[str, Tensor]) -> Tensor:
    """``(B, S)`` bool: the placeholder slots."""
    return (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["input_ids"] == VIDEO_TOKEN)


def image_spans(inputs: dict[str, Tensor], model: nn.Module) -> list[tuple[int, Tensor]]:
    """Return ``(row, columns)`` of every image in order; ``columns`` are its slots' places in the sequence."""
    lengths = [len(f) for f in image_features(model, inputs)] if any(k.startswith("pixel_values") for k in inputs) else []
    row, column = visual_of(inputs).nonzero(as_tuple=True)
    out, start = [], 0
    for n in lengths:
        out.append((int(row[start]), column[start : start + n]))
        start += n
    return out
