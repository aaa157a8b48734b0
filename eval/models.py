"""The models of a sweep: names checked early, structure known without weights, loading.

A sweep is planned, and its cost estimated, from :class:`Outline` alone: no weights, no network. For hub ids that are not in the
local cache, :data:`KNOWN` holds the sizes of the models that the shipped sweep files name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.core import Facts
from vtc.counts import count
from vtc.errors import ConfigError, UnsupportedModelError, VtcError, did_you_mean
from vtc.eval import env
from vtc.eval.config import ModelConfig
from vtc.inspect import SIDE, InputFileError, answering, device_named, load_config, locate, skeleton
from vtc.pocket import POCKET_MODELS, load_pocket, pocket_path

if TYPE_CHECKING:
    import torch

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
_CROPS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

KNOWN: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {"model_type": "llava", "vision_config": _CLIP, "text_config": _VICUNA},
    "llava-hf/llava-1.5-13b-hf": {
        "model_type": "llava",
        "vision_config": _CLIP,
        "text_config": _VICUNA
        | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    },
    "llava-hf/llava-v1.6-vicuna-7b-hf": {
        "model_type": "llava_next",
        "vision_config": _CLIP,
        "text_config": _VICUNA,
        "image_grid_pinpoints": _CROPS,
    },
    "llava-hf/LLaVA-NeXT-Video-7B-hf": {
        "model_type": "llava_next_video",
        "vision_config": _CLIP,
        "text_config": _VICUNA,
        "image_grid_pinpoints": _CROPS,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    },
}
"""Configurations of hub models, as far as sizes go."""

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "Qwen2VLImageProcessor",
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
    )
}
"""Image processors of those whose pictures become more or fewer tokens: class and settings."""

_WHOLE = 64 * 2**20
"""Weight files up to this size are hashed whole; of larger ones, size, head and tail."""


def check_model(model: ModelConfig) -> None:
    """Refuse names that cannot be a model's, before anything else is done.

    Raises
    ------
    ConfigError
        With close matches.
    """
    if model.name in POCKET_MODELS:
        return
    known = [*POCKET_MODELS, *KNOWN]
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        try:
            locate(model.name)
        except InputFileError as error:
            raise ConfigError(str(error)) from None
    elif model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ConfigError(
            f"there is no folder '{model.name}': give a model's folder, a hub id, or {' or '.join(POCKET_MODELS)}"
        )
    elif "/" not in model.name:
        raise ConfigError(
            f"no embedded model is named '{model.name}'{did_you_mean(model.name, known)} (use one of {', '.join(POCKET_MODELS)}, "
            "a folder, or a hub id such as llava-hf/llava-1.5-7b-hf)"
        )


@dataclass(frozen=True, eq=False)
class Outline:
    """What is known of a model without its weights.

    Attributes
    ----------
    config : PretrainedConfig or None
        Sizes; None where they are not known here.
    facts : Facts or None
        The adapter's; None where there is no adapter, or no config.
    slots : int or None
        Visual tokens of one image, or of one of its tiles or crops, where budgets count those; None where that is not known.
    parameters : int or None
        How many.
    note : str
        What is missing and why, or what the numbers assume.
    pieces : int
        Tiles or crops of one image.
    """

    config: Any
    facts: Facts | None
    slots: int | None
    parameters: int | None = None
    note: str = ""
    pieces: int = 1


@functools.lru_cache(maxsize=32)
def _outline(name: str) -> Outline:
    import transformers
    from transformers import AutoConfig

    from vtc.families import family_of

    notes: list[str] = []
    place = str(pocket_path(name)) if name in POCKET_MODELS else name
    processor: Any = place
    try:
        config = load_config(place)
        processor = locate(place)
    except InputFileError as error:
        if name not in KNOWN:
            return Outline(None, None, None, None, f"{error}; without its configuration nothing can be checked or estimated")
        sizes = dict(KNOWN[name])
        try:
            config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        except ValueError:
            return Outline(None, None, None, None, f"this transformers has no model of the type '{KNOWN[name]['model_type']}'")
        notes.append("sizes from vtc's own table, since the model is not in the local cache")
        processor = None
        if name in PROCESSORS:
            kind, settings = PROCESSORS[name]
            processor = getattr(transformers, kind)(**settings)
    parameters = None
    try:
        skeletal = skeleton(config)
        parameters = sum(p.numel() for p in skeletal.parameters())
        family = answering(name, family_of(skeletal))
    except UnsupportedModelError as error:
        return Outline(config, None, None, parameters, "; ".join([*notes, f"budgets cannot be checked: {error}"]))
    facts = family.facts
    size = (2 * config.vision_config.image_size,) * 2 if facts.anyres else (SIDE, SIDE)
    counted = count(family, size, processor)
    slots = facts.tokens if counted.tokens is not None and family.unit != "image" else counted.tokens
    if slots is None:
        notes.append(f"the number of visual tokens is not known ({counted.why}), so that FLOPs are not estimated")
    elif facts.tokens is None or family.unit != "image":
        notes.append(f"FLOPs of pictures of {size[0]}x{size[1]} pixels ({counted.tokens} visual tokens)")
    return Outline(config, facts, slots, parameters, "; ".join(notes), counted.pieces or 1)


def outline(model: ModelConfig) -> Outline:
    """Describe a model from its configuration: an embedded one, a folder, the hub cache, or :data:`KNOWN`."""
    return _outline(model.name)


def identity(model: ModelConfig) -> dict[str, Any]:
    """Return what makes results of this model comparable, as plain data: name, weights, settings."""
    out: dict[str, Any] = {"name": model.name, **_files(model.name, model.revision)}
    chosen = model.model_dump(exclude={"name", "label"}, exclude_defaults=True)
    return {**out, "settings": chosen} if chosen else out


@functools.lru_cache(maxsize=32)
def _files(name: str, revision: str | None) -> dict[str, str]:
    if name in POCKET_MODELS:
        folder = pocket_path(name)
        return {"files": env.digest([folder / "config.json", folder / "model.safetensors"])}
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {"files": env.digest([folder / "config.json", *sorted(folder.glob("*.safetensors"))], whole=_WHOLE)}
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return {"revision": Path(found).parent.name if isinstance(found, str) else revision or "not in the cache"}


def device_of(model: ModelConfig) -> torch.device:
    """Return the device a model goes to.

    Raises
    ------
    VtcError
        It is not there.
    """
    try:
        return device_named(model.device)
    except VtcError:
        raise ConfigError(f"the device '{model.device}' of the model '{model.title}' is not available here: use auto") from None


def load(model: ModelConfig) -> tuple[Any, Any]:
    """Load a model and its processor, from the hub where it is not in the cache.

    Raises
    ------
    VtcError
        No such model, no network, a model that vtc does not support, or a device that is not there.
    """
    import torch

    device = device_of(model)
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    if model.name in POCKET_MODELS:
        return load_pocket(model.name, dtype=dtype, device=device, attn_implementation=model.attention)
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vtc.families import family_of

    place = locate(model.name)
    where = {"revision": model.revision} if model.revision else {}
    attention = {"attn_implementation": model.attention} if model.attention else {}
    try:
        answering(
            model.name, family_of(skeleton(AutoConfig.from_pretrained(place, **where)))
        )  # refuse before gigabytes are read
        processor = AutoProcessor.from_pretrained(place, **where, **model.processor)
        loaded = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype or "auto", **where, **attention)
    except OSError:
        raise ConfigError(
            f"the model '{model.name}' is neither a folder nor in the local cache, and the hub cannot be reached: run "
            f"`hf download {model.name}` where there is a network, or correct the name{did_you_mean(model.name, KNOWN)}"
        ) from None
    except VtcError:
        raise
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the model '{model.name}' cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if device.type == "cpu" and dtype is None and loaded.dtype == torch.float16:
        loaded = loaded.float()  # half precision is slow and incomplete on CPUs
    return loaded.to(device).eval(), processor
