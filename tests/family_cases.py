"""The table of tiny models, one entry for each family (two where it also takes videos), and what their prompts look like.

A new family is one adapter file and one entry here: everything else of the tests is the same for all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

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
    tiles : bool
        Whether the model makes the features of all images of a row at once.
    projector : str
        The module before which ``VISION`` reducers act.
    newline_ends : bool
        Whether a newline token ends every clip.
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
    tiles: bool = False
    projector: str = "multi_modal_projector"
    newline_ends: bool = False
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
    width = tower.projection_dim = words["hidden_size"]
    shared = IDS | dict(text_config=hf.GemmaConfig(**words | dict(head_dim=8)), vision_config=tower)
    shared |= dict(projection_dim=width, hidden_size=width)
    return hf.PaliGemmaForConditionalGeneration, hf.PaliGemmaConfig(**(shared | over))


def _prefix(ids: Tensor, prompt: int) -> dict[str, Tensor]:
    """PaliGemma: the prompt is one block without causality."""
    return {"token_type_ids": (torch.arange(ids.shape[1]) >= prompt).long().expand_as(ids).contiguous()}


# ------------------------------------------------------------------------------------------- tiles, pixel shuffle, pooling
def _internvl(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    tower = hf.InternVLVisionConfig(**eyes | dict(image_size=[32, 32], patch_size=[4, 4]))
    shared = IDS | dict(text_config=hf.Qwen2Config(**words), vision_config=tower, downsample_ratio=0.5)
    return hf.InternVLForConditionalGeneration, hf.InternVLConfig(**(shared | over))


def _idefics(name: str, words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    tower = getattr(hf, f"{name}VisionConfig")(**eyes | dict(image_size=32, patch_size=4))
    shared = dict(image_token_id=IMAGE_TOKEN, text_config=hf.LlamaConfig(**words), vision_config=tower, scale_factor=2)
    shared |= dict(pad_token_id=PAD)
    return getattr(hf, f"{name}ForConditionalGeneration"), getattr(hf, f"{name}Config")(**(shared | over))


def _rows_of_tiles(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    pixels = draw(len(images), max(images), 3, 32, 32)
    for row, n in enumerate(images):
        pixels[row, n:] = 0
    return {"pixel_values": pixels}


def _one_tile(inputs: dict[str, Tensor], model: nn.Module, i: int) -> dict[str, Tensor]:
    tiles = inputs["pixel_values"].flatten(0, 1)
    return {"pixel_values": tiles[(tiles != 0).flatten(1).any(1)][i][None, None]}


def _gemma3(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    words = dict(head_dim=8, sliding_window=12, layer_types=kinds[: words["num_hidden_layers"]]) | words
    shared = IDS | dict(text_config=hf.Gemma3TextConfig(**words), vision_config=_siglip(eyes | dict(image_size=56)))
    return hf.Gemma3ForConditionalGeneration, hf.Gemma3Config(**(shared | dict(mm_tokens_per_image=16) | over))


def _mistral3(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    tower = hf.PixtralVisionConfig(**eyes | dict(image_size=32, patch_size=4))
    language = hf.MistralConfig(**({"sliding_window": None} | words))
    shared = IDS | dict(text_config=language, vision_config=tower, spatial_merge_size=2, vision_feature_layer=-1)
    return hf.Mistral3ForConditionalGeneration, hf.Mistral3Config(**(shared | over))


def _mixed_sizes(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    sizes = [[32, 32], [16, 32], [32, 16]] * sum(images)
    return {"image_sizes": torch.tensor(sizes[: sum(images)]), "pixel_values": draw(sum(images), 3, 32, 32)}


def _one_sized(inputs: dict[str, Tensor], model: nn.Module, i: int) -> dict[str, Tensor]:
    h, w = inputs["image_sizes"][i].tolist()
    return {"image_sizes": inputs["image_sizes"][i : i + 1], "pixel_values": inputs["pixel_values"][i : i + 1, :, :h, :w]}


def _broken_rows(model: nn.Module, image: int, slots: int, pixels: dict[str, Tensor]) -> list[int]:
    """Pixtral: a row ends with [IMG_BREAK], the last one with [IMG_END]; both are text."""
    width = int(pixels["image_sizes"][image, 1]) // 8
    return ([IMAGE_TOKEN] * width + [BREAK]) * (slots // width - 1) + [IMAGE_TOKEN] * width + [END]


# ------------------------------------------------------------------------------------------------------------------ Qwen
def _qwen(name: str, words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    tower = dict(depth=TOWER_LAYERS, num_heads=3, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
    if name == "Qwen2VL":
        tower |= dict(embed_dim=24, hidden_size=words["hidden_size"], mlp_ratio=2)
    else:
        tower |= dict(hidden_size=24, intermediate_size=32, out_hidden_size=words["hidden_size"])
    if name == "Qwen2_5_VL":
        tower |= dict(window_size=16, fullatt_block_indexes=[1, 3], tokens_per_second=2)
    if name == "Qwen3VL":
        tower |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 2])
        rope["mrope_interleaved"] = True
        words = dict(head_dim=8) | words
    words = dict(rope_scaling=dict(rope), rope_parameters=dict(rope)) | words
    shared = dict(image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=START, vision_end_token_id=END)
    shared |= dict(text_config=words, vision_config=tower)
    return getattr(hf, f"{name}ForConditionalGeneration"), getattr(hf, f"{name}Config")(**(shared | over))


def _grids(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    grids = torch.tensor([[1, 8, 8], [1, 4, 8], [1, 8, 4]] * sum(images))[: sum(images)]
    return {"image_grid_thw": grids, "pixel_values": draw(int(grids.prod(1).sum()), 3 * 2 * 16)}


def _clip_grids(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    grids = torch.tensor([[2, 4, 4], [2, 4, 8]] * sum(images))[: sum(images)]
    clips = {"video_grid_thw": grids, "pixel_values_videos": draw(int(grids.prod(1).sum()), 3 * 2 * 16)}
    return clips | ({"second_per_grid_ts": torch.ones(len(grids))} if model.config.model_type == "qwen2_5_vl" else {})


def _one_grid(inputs: dict[str, Tensor], model: nn.Module, i: int) -> dict[str, Tensor]:
    grids, pixels = (
        ("video_grid_thw", "pixel_values_videos") if "video_grid_thw" in inputs else ("image_grid_thw", "pixel_values")
    )
    rows = inputs[pixels].split(inputs[grids].prod(1).tolist())
    one = {grids: inputs[grids][i : i + 1], pixels: rows[i]}
    return one | ({"second_per_grid_ts": torch.ones(1)} if "second_per_grid_ts" in inputs else {})


def _spans(per_frame: bool, model: nn.Module, image: int, slots: int, pixels: dict[str, Tensor]) -> list[int]:
    """<vision_start> ... <vision_end>; Qwen3-VL puts a pair around each frame of a clip."""
    token = VIDEO_TOKEN if "video_grid_thw" in pixels else IMAGE_TOKEN
    spans = int(pixels["video_grid_thw"][image, 0]) if per_frame and "video_grid_thw" in pixels else 1
    return [START, *[token] * (slots // spans), END] * spans


def _three_dimensional(model: nn.Module, inputs: dict[str, Tensor], counted: Tensor) -> Tensor:
    names = inspect.signature(model.model.get_rope_index).parameters
    positions, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k in names})
    return torch.cat([counted[None], positions])


def _modalities(kind: type[nn.Module], ids: Tensor, prompt: int) -> dict[str, Tensor]:
    if "mm_token_type_ids" not in inspect.signature(kind.forward).parameters:  # 4.57
        return {}
    return {"mm_token_type_ids": (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()}


def _qwen_cases(family: str, name: str) -> dict[str, Case]:
    kind = getattr(hf, f"{name}ForConditionalGeneration")
    shared = dict(
        one=_one_grid,
        run=functools.partial(_spans, name == "Qwen3VL"),
        extra=functools.partial(_modalities, kind),
        positions=_three_dimensional,
    )
    make = functools.partial(_qwen, name)
    clips = Case(family, make, _clip_grids, video=True, **shared)
    return {family: Case(family, make, _grids, **shared), f"{family}:clips": clips}


def _deepseek(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    shared = dict(image_token_id=IMAGE_TOKEN, text_config=hf.LlamaConfig(**words), vision_config=_siglip(eyes))
    return hf.DeepseekVLForConditionalGeneration, hf.DeepseekVLConfig(**(shared | over))


_OLD = int(hf.__version__.split(".")[0]) < 5

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
    "llava_onevision:clips": Case("llava_onevision", _onevision, _clips, video=True, newline_ends=True),
    # 4.57 builds a float32 mask, and without a KV cache its generated tokens see each other in both directions
    "paligemma": Case(
        "paligemma",
        _paligemma,
        extra=_prefix,
        positions=lambda model, inputs, counted: counted + 1,
        float32=_OLD,
        steps=1 if _OLD else 8,
    ),
    "internvl": Case("internvl", _internvl, _plain(32)),
    "idefics3": Case(
        "idefics3",
        functools.partial(_idefics, "Idefics3"),
        _rows_of_tiles,
        _one_tile,
        tiles=True,
        projector="connector.modality_projection",
    ),
    "smolvlm": Case(
        "smolvlm",
        functools.partial(_idefics, "SmolVLM"),
        _rows_of_tiles,
        _one_tile,
        tiles=True,
        projector="connector.modality_projection",
    ),
    "gemma3": Case("gemma3", _gemma3, _plain(56), extra=lambda ids, prompt: {"token_type_ids": (ids == IMAGE_TOKEN).long()}),
    "mistral3": Case("mistral3", _mistral3, _mixed_sizes, _one_sized, _broken_rows),
    **_qwen_cases("qwen2_vl", "Qwen2VL"),
    **_qwen_cases("qwen2_5_vl", "Qwen2_5_VL"),
    **_qwen_cases("qwen3_vl", "Qwen3VL"),
    "unknown": Case("deepseek_vl", _deepseek),  # no adapter: its structure is looked at
}


# ---------------------------------------------------------------------------------- other language models, other releases
def _windowed(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    return _mistral3(dict(sliding_window=14) | words, eyes, over)


def _cohere(name: str, words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    words = dict(sliding_window=12, layer_types=kinds[: words["num_hidden_layers"]], logit_scale=1.0) | words
    shared = IDS | dict(text_config=hf.Cohere2Config(**words), downsample_factor=2)
    if name == "AyaVision":
        shared |= dict(vision_config=_siglip(eyes | dict(image_size=32, patch_size=4)), vision_feature_layer=-1)
        shared |= dict(vision_feature_select_strategy="full", alignment_intermediate_size=32)
    else:
        shared |= dict(vision_config=_siglip(eyes | dict(image_size=32, patch_size=4)), alignment_intermediate_size=32)
    return getattr(hf, f"{name}ForConditionalGeneration"), getattr(hf, f"{name}Config")(**(shared | over))


def _pixtral(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    tower = hf.PixtralVisionConfig(**eyes | dict(image_size=32, patch_size=8))
    shared = IDS | dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    shared |= dict(text_config=hf.MistralConfig(**({"sliding_window": None} | words)), vision_config=tower)
    return hf.LlavaForConditionalGeneration, hf.LlavaConfig(**(shared | over))


SCALED = dict(rope_type="yarn", type="yarn", rope_theta=10000.0, factor=16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0)
SCALED |= dict(mscale_all_dim=1.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.5)
"""Queries grow with their position, as Ministral 3's do; from the eighth token on instead of the 16384th."""


def _ministral3(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    kind, config = _mistral3(words, eyes, {})
    language = hf.Ministral3Config(**dict(head_dim=8, rope_parameters=dict(SCALED)) | words)
    shared = IDS | dict(text_config=language, vision_config=config.vision_config, spatial_merge_size=2, vision_feature_layer=-1)
    return kind, hf.Mistral3Config(**(shared | over))


def _mistral4(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    kind, config = _mistral3(words, eyes, {})
    heads = dict(kv_lora_rank=12, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    # its layers of experts do not run in float64
    experts = dict(n_routed_experts=4, moe_intermediate_size=24, num_experts_per_tok=2, first_k_dense_replace=99)
    language = hf.Mistral4Config(**heads | experts | dict(rope_parameters=dict(SCALED)) | words | dict(num_key_value_heads=4))
    shared = IDS | dict(text_config=language, vision_config=config.vision_config, spatial_merge_size=2, vision_feature_layer=-1)
    return kind, hf.Mistral3Config(**(shared | over))


def _gemma4(words: dict[str, Any], eyes: dict[str, Any], over: dict[str, Any]) -> Config:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    words = dict(head_dim=8, global_head_dim=16, sliding_window=12, layer_types=kinds, hidden_size_per_layer_input=6) | words
    words |= dict(vocab_size_per_layer_input=VOCABULARY, pad_token_id=PAD)
    tower = hf.Gemma4VisionConfig(
        **eyes | dict(num_key_value_heads=3, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=32)
    )
    shared = dict(text_config=hf.Gemma4TextConfig(**words), vision_config=tower, audio_config=None, image_token_id=IMAGE_TOKEN)
    shared |= dict(video_token_id=VIDEO_TOKEN, audio_token_id=START, boi_token_id=END, eoi_token_id=BREAK)
    return hf.Gemma4ForConditionalGeneration, hf.Gemma4Config(**(shared | over))


def _placed_patches(model: nn.Module, images: Sequence[int], draw: Callable[..., Tensor], sizes: Any) -> dict[str, Tensor]:
    at = torch.stack([torch.arange(64) % 8, torch.arange(64) // 8], -1)
    return {"pixel_values": draw(sum(images), 64, 48), "image_position_ids": at.expand(sum(images), -1, -1).contiguous()}


def _one_placed(inputs: dict[str, Tensor], model: nn.Module, i: int) -> dict[str, Tensor]:
    return {k: inputs[k][i : i + 1] for k in ("pixel_values", "image_position_ids")}


def _seen_both_ways(ids: Tensor, prompt: int) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()}


OTHERS: dict[str, Case] = {
    "mistral3:windowed": Case("mistral3", _windowed, _mixed_sizes, _one_sized, _broken_rows),
    "pixtral": Case("llava", _pixtral, _mixed_sizes, _one_sized, _broken_rows),
    "aya_vision": Case("aya_vision", functools.partial(_cohere, "AyaVision"), _plain(32)),
}
if hasattr(hf, "Cohere2VisionConfig"):
    OTHERS["cohere2_vision"] = Case("cohere2_vision", functools.partial(_cohere, "Cohere2Vision"), _plain(32))
if hasattr(hf, "Ministral3Config"):
    OTHERS["ministral3"] = Case("mistral3", _ministral3, _mixed_sizes, _one_sized, _broken_rows)
if hasattr(hf, "Mistral4Config"):
    OTHERS["mistral4"] = Case("mistral3", _mistral4, _mixed_sizes, _one_sized, _broken_rows)
if hasattr(hf, "Gemma4Config"):
    OTHERS["gemma4"] = Case("gemma4", _gemma4, _placed_patches, _one_placed, extra=_seen_both_ways)
"""Models that share a family with one above or have no adapter, as far as the installed transformers knows them."""


def case_of(model: nn.Module) -> Case:
    """The case a tiny model was built from."""
    return (CASES | OTHERS)[model.tiny_case]
