"""The table of tiny models, one entry for each family (two where it also takes videos), and what their prompts look like.

A new family is one adapter file and one entry here: everything else of the tests is the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from vtc import compat

VOCABULARY = 120
IMAGE_TOKEN, VIDEO_TOKEN, PAD, START, END, BREAK = 100, 101, 0, 102, 103, 104
SPECIAL = [IMAGE_TOKEN, VIDEO_TOKEN, START, END, BREAK]
DECODER_LAYERS, TOWER_LAYERS = 5, 4
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SIZES = [[40, 56], [56, 30], [40, 56]]
"""Image sizes (height, width) of the first images of a batch (AnyRes families)."""

TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=DECODER_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
VISION = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=TOWER_LAYERS, num_attention_heads=3, image_size=28, patch_size=7
)

Config = tuple[type[nn.Module], Any]


def _plain(side: int = 28) -> Callable[..., dict[str, Tensor]]:
    def pixels(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
        return {"pixel_values": draw(sum(images), 3, side, side)}

    return pixels


def _one_plain(inputs: dict[str, Tensor], model: nn.Module, i: int) -> dict[str, Tensor]:
    return {k: inputs[k][i : i + 1] for k in ("pixel_values", "pixel_values_videos") if k in inputs}


def _mark(images: Sequence[int], lengths: Sequence[int], words: Callable[[int], list[int]], token: int) -> list[list[int]]:
    return [[token] * n for n in lengths]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    family : str
        ``config.model_type``.
    make : callable
        ``(text options, vision options, outer options)`` to model class and config.
    pixels : callable
        ``(model, images of each row, draw, sizes)`` to the pixel arguments of a prompt.
    one : callable
        ``(inputs, model, i)`` to the pixel arguments of its image ``i`` alone.
    run : callable
        ``(model, image, slots, pixel arguments)`` to the token ids of one image in the prompt.
    extra : callable
        ``(input_ids, prompt length)`` to further arguments with one entry per token.
    positions : callable or None
        ``(model, inputs, counted positions)`` to ``position_ids``; ``None``: the counted ones.
    video : bool
        Whether the images are clips.
    anyres : bool
        Whether images are cut into crops by their size.
    exact : bool
        Whether every slot holds one row of the projector's output, or a newline.
    projector : str
        The module before which ``VISION`` reducers act.
    float32 : bool
        The model cannot run in float64.
    steps : int
        Greedy steps in which an unpatched model without KV cache computes what one with a cache does.
    """

    family: str
    make: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Config]
    pixels: Callable[..., dict[str, Tensor]] = _plain()
    one: Callable[..., dict[str, Tensor]] = _one_plain
    run: Callable[[nn.Module, int, int, dict[str, Tensor]], list[int]] | None = None
    extra: Callable[[Tensor, int], dict[str, Tensor]] = lambda ids, prompt: {}
    positions: Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor] | None = None
    video: bool = False
    anyres: bool = False
    exact: bool = True
    projector: str = "multi_modal_projector"
    float32: bool = False
    steps: int = 8


# --------------------------------------------------------------------------------------------------------- LLaVA's kin
IDS = dict(image_token_id=IMAGE_TOKEN, image_token_index=IMAGE_TOKEN)
VIDEO_IDS = dict(video_token_id=VIDEO_TOKEN, video_token_index=VIDEO_TOKEN)


def _siglip(eyes: dict[str, Any]) -> Any:
    return hf.SiglipVisionConfig(**eyes, vision_use_head=False)


def _llava(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    shared = IDS | dict(vision_feature_layer=-2, text_config=hf.LlamaConfig(**words), vision_config=hf.CLIPVisionConfig(**eyes))
    return hf.LlavaForConditionalGeneration, hf.LlavaConfig(**(shared | over))


def _llava_siglip(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    shared = IDS | dict(vision_feature_layer=-1, text_config=hf.LlamaConfig(**words), vision_config=_siglip(eyes))
    shared |= dict(vision_feature_select_strategy="full")  # there is no class token to leave out
    return hf.LlavaForConditionalGeneration, hf.LlavaConfig(**(shared | over))


def _vipllava(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    layers = dict.fromkeys(("vision_feature_layer", "vision_feature_layers"), [-2, -3, 1])  # the second is the older name
    shared = IDS | layers | dict(text_config=hf.LlamaConfig(**words), vision_config=hf.CLIPVisionConfig(**eyes))
    return hf.VipLlavaForConditionalGeneration, hf.VipLlavaConfig(**(shared | over))


def _llava_next(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any], video: bool = False) -> Config:
    language = hf.LlamaConfig(**words) if video else hf.MistralConfig(**({"sliding_window": None} | words))
    shared = IDS | dict(text_config=language, vision_config=hf.CLIPVisionConfig(**eyes), vision_feature_layer=-2)
    shared |= dict(image_grid_pinpoints=PINPOINTS)
    if video:
        return hf.LlavaNextVideoForConditionalGeneration, hf.LlavaNextVideoConfig(**(shared | VIDEO_IDS | over))
    return hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig(**(shared | over))


def _onevision(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    shared = IDS | VIDEO_IDS | dict(text_config=hf.Qwen2Config(**words), vision_config=_siglip(eyes), vision_feature_layer=-1)
    shared |= dict(image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="full")
    return hf.LlavaOnevisionForConditionalGeneration, hf.LlavaOnevisionConfig(**(shared | over))


def view_count(model: nn.Module, size: Sequence[int]) -> int:
    """Views (thumbnail and crops) of an image of this size (AnyRes families)."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    return int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def _anyres(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    count = sum(images)
    sizes = [list(s) for s in (sizes or [SIZES[i % len(SIZES)] for i in range(count)])][:count]
    views = [view_count(model, size) for size in sizes]
    pixels = torch.zeros(count, max(views), 3, 28, 28)
    for i, n in enumerate(views):  # the processor pads with zero views
        pixels[i, :n] = draw(n, 3, 28, 28)
    return {"image_sizes": torch.tensor(sizes), "pixel_values": pixels}


def _one_anyres(inputs: dict[str, Tensor], model: nn.Module, i: int) -> dict[str, Tensor]:
    size = inputs["image_sizes"][i : i + 1]
    return {"image_sizes": size, "pixel_values": inputs["pixel_values"][i : i + 1, : view_count(model, size[0].tolist())]}


def _clips(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    return {"pixel_values_videos": draw(sum(images), 3, 3, 28, 28)}


# ------------------------------------------------------------------------------------------------------------- PaliGemma
def _paligemma(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    tower = _siglip(eyes)
    tower.projection_dim = 32
    shared = IDS | dict(text_config=hf.GemmaConfig(**words | dict(head_dim=8)), vision_config=tower)
    shared |= dict(projection_dim=32, hidden_size=32)
    return hf.PaliGemmaForConditionalGeneration, hf.PaliGemmaConfig(**(shared | over))


def _prefix(ids: Tensor, prompt: int) -> dict[str, Tensor]:
    """PaliGemma: the prompt is one block without causality."""
    return {"token_type_ids": (torch.arange(ids.shape[1]) >= prompt).long().expand_as(ids).contiguous()}


_OLD = compat.transformers_version() < (5, 0, 0)

CASES: dict[str, Case] = {
    "llava": Case("llava", _llava),
    "llava_siglip": Case("llava", _llava_siglip),
    "llava_next": Case("llava_next", _llava_next, _anyres, _one_anyres, anyres=True),
    "vipllava": Case("vipllava", _vipllava),
    "llava_next_video": Case("llava_next_video", functools.partial(_llava_next, video=True), _anyres, _one_anyres, anyres=True),
    "llava_next_video:clips": Case("llava_next_video", functools.partial(_llava_next, video=True), _clips, video=True),
    "llava_onevision": Case("llava_onevision", _onevision, _anyres, _one_anyres, anyres=True),
    "llava_onevision:shrunk": Case(
        "llava_onevision",
        lambda words, eyes, over: _onevision(words, eyes, {"vision_aspect_ratio": "anyres_max_1"} | over),
        _anyres,
        _one_anyres,
        anyres=True,
        exact=False,
    ),
    "llava_onevision:clips": Case("llava_onevision", _onevision, _clips, video=True),
    # 4.57 builds a float32 mask, and without a KV cache its generated tokens see each other in both directions
    "paligemma": Case(
        "paligemma",
        _paligemma,
        extra=_prefix,
        positions=lambda model, inputs, counted: counted + 1,
        float32=_OLD,
        steps=1 if _OLD else 8,
    ),
}


def case_of(model: nn.Module) -> Case:
    """The case a tiny model was built from."""
    return CASES[model.tiny_case]
