"""The models of a sweep: names checked early, structure known without weights, loading.

A sweep is planned, and its cost estimated, from :class:`Outline` alone: no weights, no network. For hub ids that are not in the
local cache, :data:`KNOWN` holds the sizes of the models that the shipped sweep files name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc import doors
from vtc.core import Facts
from vtc.counts import count
from vtc.engine import upstream
from vtc.errors import ConfigError, InputFileError, UnsupportedModelError, VtcError, did_you_mean
from vtc.eval.config import ModelConfig
from vtc.eval.digests import folder_digest
from vtc.inspect import SIDE, answering, device_named, explained, load_config, locate, read_config, skeleton
from vtc.pocket import POCKET_MODELS, load_pocket, pocket_path

if TYPE_CHECKING:
    import torch

    from vtc.pocket import Question

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

UNKNOWN = "not in the cache"
"""Version of a hub model that nothing here knows; results need a known one."""

_NOTES = ("MANIFEST.json", "curves.json", "measured.json", "training.jsonl")
"""Files of the embedded models that say how they were made and how good they are."""

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "Qwen2VLImageProcessor",
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
    )
}
"""Image processors of those whose pictures become more or fewer tokens: class and settings."""


def check_model(model: ModelConfig) -> None:
    """Refuse names that cannot be a model's, before anything else is done.

    Raises
    ------
    ConfigError
        With close matches.
    """
    if model.attention is not None:
        from transformers import AttentionInterface

        there = sorted({upstream.EAGER, *AttentionInterface().keys()})
        if model.attention not in there:
            raise ConfigError(
                f"transformers has no attention implementation '{model.attention}'{did_you_mean(model.attention, there)} (use one "
                f"of {', '.join(there)})"
            )
    if model.name in POCKET_MODELS:
        return
    known = [*POCKET_MODELS, *KNOWN]
    try:
        folder = doors.place(model.name)
        if folder.is_dir():
            locate(model.name)
    except InputFileError as error:
        raise ConfigError(str(error)) from None
    if folder.is_dir():
        pass
    elif model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ConfigError(
            f"there is no folder '{doors.short(model.name)}': give a model's folder, a hub id, or {' or '.join(POCKET_MODELS)}"
        )
    elif "/" not in model.name:
        raise ConfigError(
            f"no embedded model is named '{doors.short(model.name, 80)}'{did_you_mean(model.name, known)} (use one of "
            f"{', '.join(POCKET_MODELS)}, a folder, or a hub id such as llava-hf/llava-1.5-7b-hf)"
        )
    elif not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", model.name, re.ASCII) or ".." in model.name or "--" in model.name:
        raise ConfigError(f"'{doors.short(model.name)}' is neither a folder nor a name that the hub has, such as {known[-1]}")


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
def _outline(name: str, trusted: bool) -> Outline:
    import transformers
    from transformers import AutoConfig

    from vtc.families import family_of

    notes: list[str] = []
    place = str(pocket_path(name)) if name in POCKET_MODELS else name
    processor: Any = place
    try:
        config = load_config(place, trust_remote_code=trusted)
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
        skeletal = skeleton(config, trust_remote_code=trusted)
        parameters = sum(p.numel() for p in skeletal.parameters())
        with explained(name, "the configuration"):
            family = answering(name, family_of(skeletal))
            facts = family.facts
    except UnsupportedModelError as error:
        return Outline(config, None, None, parameters, "; ".join([*notes, f"budgets cannot be checked: {error}"]))
    size = (2 * config.vision_config.image_size,) * 2 if facts.anyres else (SIDE, SIDE)
    with explained(name, "the configuration"):
        counted = count(family, size, processor)
    slots = facts.tokens if counted.tokens is not None and family.unit != "image" else counted.tokens
    if slots is None:
        notes.append(f"the number of visual tokens is not known ({counted.why}), so that FLOPs are not estimated")
    elif facts.tokens is None or family.unit != "image":
        notes.append(f"FLOPs of pictures of {size[0]}x{size[1]} pixels ({counted.tokens} visual tokens)")
    return Outline(config, facts, slots, parameters, "; ".join(notes), counted.pieces or 1)


def outline(model: ModelConfig) -> Outline:
    """Describe a model from its configuration: an embedded one, a folder, the hub cache, or :data:`KNOWN`."""
    return _outline(model.name, model.trusted)


def identity(model: ModelConfig) -> dict[str, Any]:
    """Return what makes results of this model comparable, as plain data: name, all files that are read, settings.

    Of a hub id it is the commit that the local cache holds, :data:`UNKNOWN` where it holds none.

    Raises
    ------
    ConfigError
        A file of the model's folder that cannot be read.
    """
    out: dict[str, Any] = {"name": model.name, **_files(model.name, model.revision)}
    if model.trusted:
        out["remote_code"] = True  # other code of the same folder
    chosen = model.model_dump(exclude={"name", "label"}, exclude_defaults=True)
    return {**out, "settings": chosen} if chosen else out


def _files(name: str, revision: str | None) -> dict[str, str]:
    if name in POCKET_MODELS:
        return {"folder": folder_digest(pocket_path(name), _NOTES)}
    folder = doors.place(name)
    if folder.is_dir():
        return {"folder": folder_digest(folder)}
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return {"revision": revision}
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return {"revision": Path(found).parent.name if isinstance(found, str) else UNKNOWN}


def fetch(model: ModelConfig) -> bool:
    """Ask the hub which version of a model it serves, where the local cache does not say.

    Returns
    -------
    bool
        Whether something new is known, so that a plan made before is to be made again.

    Raises
    ------
    ConfigError
        The hub cannot be reached, or has no such model.
    """
    if identity(model).get("revision") != UNKNOWN:
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model.name, "config.json", revision=model.revision)
    except Exception:  # noqa: BLE001  offline, absent, gated: the client's versions have their own errors
        raise _absent(model) from None
    _outline.cache_clear()
    return True


def _check_same(model: ModelConfig, planned: Mapping[str, Any]) -> None:
    """Refuse a folder whose files are not those that a sweep was planned with."""
    if planned.get("revision") == UNKNOWN:
        raise _absent(model)
    if "folder" in planned and identity(model) != planned:
        raise ConfigError(
            f"the files of the model '{doors.short(model.title)}' are not those the sweep was planned with (changed since, or "
            "others on this machine): run the sweep again, it measures the new ones under addresses of their own"
        )


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_available(model: ModelConfig) -> None:
    """Make sure, as far as that goes without loading it, that a model can be had on this machine.

    Raises
    ------
    VtcError
        Its device is not there, its folder is incomplete, or it is neither in the cache nor to be reached.
    """
    device_of(model)
    if model.name in POCKET_MODELS:
        return
    place = locate(model.name)
    if Path(place).is_dir():
        if not any(p.name.startswith(_WEIGHTS) or p.suffix in (".safetensors", ".bin") for p in Path(place).iterdir()):
            raise ConfigError(
                f"the model folder '{doors.short(model.name)}' holds no weights: save or download the model again"
            )
        return
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        read_config(model.name, place, trust_remote_code=model.trusted, **_where(model))
    except InputFileError:
        raise
    except OSError:
        raise _absent(model) from None
    found = (try_to_load_from_cache(model.name, name, revision=model.revision) for name in _WEIGHTS)
    if constants.HF_HUB_OFFLINE and not any(isinstance(path, str) for path in found):
        raise _absent(model)


_LONGEST = 50
"""Of so many questions, those with the most characters, tokens are counted before a sweep."""


def check_prompts(model: ModelConfig, questions: Sequence[Question]) -> None:
    """Make sure that a model can be asked the user's own questions, as far as its tokenizer and its configuration tell.

    Raises
    ------
    VtcError
        The processor cannot be had, or a question is too long for the model or holds its mark for a picture.
    """
    known = outline(model)
    processor = load_processor(model)
    for q in questions:
        doors.check_prompt(processor, q.prompt, f"the question '{doors.short(q.id)}'")
    tokenizer = getattr(processor, "tokenizer", None)
    for q in sorted(questions, key=lambda q: -len(q.prompt))[:_LONGEST]:
        if known.config is not None and tokenizer is not None:
            tokens = len(tokenizer(q.prompt)[upstream.IDS]) + (known.slots or 0)
            doors.check_length(known.config, tokens, f"the question '{doors.short(q.id)}'")


def load_processor(model: ModelConfig) -> Any:
    """Load a model's processor; see :func:`load` for what is raised."""
    from transformers import AutoProcessor

    if model.name in POCKET_MODELS:
        return load_pocket(model.name)[1]
    try:
        with explained(model.name, "the processor"):
            place = locate(model.name)
            return AutoProcessor.from_pretrained(
                place, trust_remote_code=model.trusted, **_where(model), **model.processor.given
            )
    except VtcError:
        raise
    except OSError:
        raise _absent(model) from None


def _where(model: ModelConfig) -> dict[str, str]:
    return {"revision": model.revision} if model.revision else {}


def _absent(model: ModelConfig) -> ConfigError:
    name = doors.short(model.name)
    if doors.place(model.name).is_dir():
        return ConfigError(f"files are missing in the model folder '{name}': save or download the model again, complete")
    return ConfigError(
        f"the model '{name}' is neither a folder nor in the local cache, and the hub cannot be reached: run `hf download {name}` "
        f"where there is a network, or correct the name{did_you_mean(model.name, KNOWN)}"
    )


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
        title = doors.short(model.title)
        raise ConfigError(f"the device '{model.device}' of the model '{title}' is not available here: use auto") from None


def load(model: ModelConfig, planned: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Load a model and its processor, from the hub where it is not in the cache.

    Parameters
    ----------
    model : ModelConfig
        Which.
    planned : mapping or None
        :func:`identity` of the model that results are to be stored under: another version is not loaded.

    Raises
    ------
    VtcError
        No such model, no network, a model that vtc does not support, a device that is not there, or other files than planned.
    """
    if planned is None:
        return _load(model)
    _check_same(model, planned)
    loaded = _load(model.model_copy(update={"revision": planned.get("revision")}))
    _check_same(model, planned)  # nothing changed while it was read
    return loaded


def _load(model: ModelConfig) -> tuple[Any, Any]:
    import torch

    device = device_of(model)
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    if model.name in POCKET_MODELS:
        return load_pocket(model.name, dtype=dtype, device=device, attn_implementation=model.attention)
    from transformers import AutoModelForImageTextToText

    from vtc.families import family_of

    place, where, trusted = locate(model.name), _where(model), model.trusted
    attention = {"attn_implementation": model.attention} if model.attention else {}
    try:
        config = read_config(model.name, place, trust_remote_code=trusted, **where)
        with explained(model.name, "the configuration"):
            answering(model.name, family_of(skeleton(config, trust_remote_code=trusted)))  # refuse before gigabytes are read
        processor = load_processor(model)
        with explained(model.name, "the model"):
            loaded = AutoModelForImageTextToText.from_pretrained(
                place, dtype=dtype or "auto", trust_remote_code=trusted, **where, **attention
            )
    except VtcError:
        raise
    except OSError:
        raise _absent(model) from None
    if device.type == "cpu" and dtype is None and loaded.dtype == torch.float16:
        loaded = loaded.float()  # half precision is slow and incomplete on CPUs
    return loaded.to(device).eval(), processor
