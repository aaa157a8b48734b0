"""Tiny random vision-language models, built from configs (no downloads), with hand-made inputs.

The weights are scaled so that attention is far from uniform: with the default initialisation every token looks alike, dropping
some changes nothing, and any test passes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

torch.set_num_threads(1)

FAMILIES = ("llava", "llava_next", "llava_siglip")
"""Names :func:`build` knows. ``llava_siglip``: LLaVA with a tower that has no class token."""

VOCABULARY = 120
IMAGE_TOKEN, VIDEO_TOKEN, PAD = 100, 101, 0
DECODER_LAYERS, TOWER_LAYERS = 5, 4
GRID = 4
"""Rows and columns of one view's patch grid."""
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
SIZES = [[40, 56], [56, 30], [40, 56]]
"""Image sizes (height, width) of the first images of a batch (LLaVA-NeXT)."""

_TEXT = dict(
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
_VISION = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=TOWER_LAYERS, num_attention_heads=3, image_size=28, patch_size=7
)


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
        One of :data:`FAMILIES`.
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
    words = _TEXT | (text or {})
    eyes = _VISION | (vision or {})
    shared: dict[str, Any] = dict(image_token_id=IMAGE_TOKEN, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2)
    if name == "llava":
        shared |= dict(text_config=transformers.LlamaConfig(**words), vision_config=transformers.CLIPVisionConfig(**eyes))
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**(shared | over)))
    elif name == "llava_siglip":
        tower = transformers.SiglipVisionConfig(**eyes, vision_use_head=False)
        shared |= dict(text_config=transformers.LlamaConfig(**words), vision_config=tower, vision_feature_layer=-1)
        shared |= dict(vision_feature_select_strategy="full")  # there is no class token to leave out
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**(shared | over)))
    elif name == "llava_next":
        language = transformers.MistralConfig(**({"sliding_window": None} | words))
        shared |= dict(text_config=language, vision_config=transformers.CLIPVisionConfig(**eyes))
        shared |= dict(image_grid_pinpoints=PINPOINTS)
        model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(**(shared | over)))
    else:
        raise KeyError(f"no tiny model '{name}' (there are {', '.join(FAMILIES)})")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE_TOKEN, VIDEO_TOKEN]
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
        Images of each row; 0 gives a row without image. Overrides ``batch``.
    sizes : sequence of (height, width), optional
        Sizes of all images in order (LLaVA-NeXT only).
    """
    generator = torch.Generator().manual_seed(seed)
    images = list(images) if images is not None else ([1] if batch == 1 else [1, 2])
    dtype = next(model.parameters()).dtype
    count = sum(images)
    extra: dict[str, Tensor] = {}
    if count and name == "llava_next":
        sizes = [list(s) for s in (sizes or [SIZES[i % len(SIZES)] for i in range(count)])][:count]
        extra["image_sizes"] = torch.tensor(sizes)
        views = [view_count(model, size) for size in sizes]
        pixels = torch.zeros(count, max(views), 3, 28, 28)
        for i, n in enumerate(views):  # the processor pads with zero views
            pixels[i, :n] = torch.randn(n, 3, 28, 28, generator=generator)
        extra["pixel_values"] = pixels.to(dtype)
    elif count:
        extra["pixel_values"] = torch.randn(count, 3, 28, 28, generator=generator).to(dtype)
    lengths = iter([len(f) for f in image_features(model, extra)] if count else [])

    def words(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    rows = []
    for row, k in enumerate(images):
        ids = words(6 if row == 0 else 3)
        for _ in range(k):
            ids += [IMAGE_TOKEN] * next(lengths) + words(2)
        rows.append(ids + words(5 if row == 0 else 2))
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask, **extra}


def image_features(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the unpatched model's features of every image, ``(slots, D)`` each, in placeholder order."""
    base = model.model if hasattr(model.model, "get_image_features") else model
    names = inspect.signature(base.get_image_features).parameters
    call: dict[str, Any] = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    for key in ("vision_feature_layer", "vision_feature_select_strategy"):  # 4.57 has no default here
        if key in names:
            call[key] = getattr(model.config, key)
    with torch.no_grad():
        out = base.get_image_features(**call)
    out = getattr(out, "pooler_output", out)
    return [f.reshape(-1, f.shape[-1]) for f in out]


def view_count(model: nn.Module, size: Sequence[int]) -> int:
    """Views (thumbnail and crops) of an image of this size (LLaVA-NeXT)."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    return int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def visual_of(inputs: dict[str, Tensor]) -> Tensor:
    """``(B, S)`` bool: the placeholder slots."""
    return inputs["input_ids"] == IMAGE_TOKEN


def image_spans(inputs: dict[str, Tensor], model: nn.Module) -> list[tuple[int, Tensor]]:
    """Return ``(row, columns)`` of every image in order; ``columns`` are its slots' places in the sequence."""
    lengths = [len(f) for f in image_features(model, inputs)] if "pixel_values" in inputs else []
    row, column = visual_of(inputs).nonzero(as_tuple=True)
    out, start = [], 0
    for n in lengths:
        out.append((int(row[start]), column[start : start + n]))
        start += n
    return out
