"""What the command line asks about models and images: structure from a config alone, loading, readable errors.

Nothing here downloads: a model is a folder, ``"pocket"``, or a hub id that is already in the local cache.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.core import Compose, EncoderReducer, Facts, Reducer, Stage
from vtc.errors import UnsupportedModelError, VtcError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from vtc.counts import Count
    from vtc.families.base import Family, Retriever

POCKET = "pocket"
SIDE = 448
"""Pixels of the picture tokens are counted for where none is named."""

NOMINAL = Facts(
    family="llava",
    layers=32,
    encoder_layers=24,
    feature_layer=22,
    tokens=576,
    max_tokens=576,
    grid=(24, 24),
    has_cls=True,
    provides=frozenset({"attention", "cls"}),
    stages=dict.fromkeys(Stage, ""),
)
"""LLaVA-1.5-7B: the model a reducer is described on when none is at hand."""


class InputFileError(VtcError, OSError):
    """An image or a model folder that is missing or cannot be read."""


def needs_of(name: str) -> list[str]:
    """Return the names of the signals a reducer taps on a LLaVA-1.5 at its default options; empty if it looks at features only."""
    from vtc.registry import create

    names: list[str] = []
    for part in create(name, keep=0.5).bind(NOMINAL).parts():
        names += [n.name for n in part.needs]
        if isinstance(part, EncoderReducer):
            names += [n.name for layer in range(NOMINAL.feature_layer) for n in part.encoder_needs(layer)]
        names += [extra for extra in ("text", "cls") if getattr(part, f"wants_{extra}")]
    return list(dict.fromkeys(names))


def positions_of(name: str) -> str:
    """Return the position policy of a reducer's parts, for example ``"compact"``."""
    from vtc.registry import create

    policies = dict.fromkeys(p.position_policy for p in create(name, keep=0.5).bind(NOMINAL).parts())
    return ", ".join(policies)


def label(reducer: Reducer) -> str:
    """Return a reducer as people write it: name and the options that differ from the defaults, ``"fastv(keep=64, layer=3)"``."""
    if isinstance(reducer, Compose):
        return " + ".join(label(member) for member in reducer.members)
    set_ = {f.name: getattr(reducer, f.name) for f in dataclasses.fields(reducer) if f.name[0] != "_"}
    defaults = {f.name: f.default for f in dataclasses.fields(reducer)}
    return f"{reducer.name}({', '.join(f'{k}={v!r}' for k, v in set_.items() if v != defaults[k])})"


# ------------------------------------------------------------------------------------------------------------- models
def locate(model: str) -> str:
    """Turn what the user typed into something ``from_pretrained`` takes.

    Raises
    ------
    InputFileError
        A path that does not exist, or a folder without ``config.json``.
    """
    if model == POCKET:
        from vtc.pocket import pocket_path

        return str(pocket_path())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputFileError(f"the folder '{model}' has no config.json: give the folder a model was saved to")
        return str(path)
    if path.exists():
        raise InputFileError(f"'{model}' is a file: give the folder a model was saved to, a hub id, or '{POCKET}'")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputFileError(f"there is no folder '{model}': give a model's folder, a hub id in the local cache, or '{POCKET}'")
    return model


def load_config(model: str) -> Any:
    """Return a model's configuration, without touching the network.

    Raises
    ------
    InputFileError
        Nothing of that name here.
    UnsupportedModelError
        A configuration that the installed transformers does not know, or that is not complete.
    """
    from transformers import AutoConfig, PretrainedConfig

    place = locate(model)
    try:
        fields, _ = PretrainedConfig.get_config_dict(place, local_files_only=True)
        kind = fields.get("model_type")
        if not kind:
            raise UnsupportedModelError(
                f"the config.json of '{model}' has no model_type: give the folder or hub id of a transformers model"
            )
        _check_native(model, kind, fields)
        return AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except OSError:
        if Path(place).is_dir():
            raise InputFileError(f"the config.json of '{model}' cannot be read: save or download the model again") from None
        raise InputFileError(
            f"no model '{model}' here: give a folder, '{POCKET}', or a hub id that is in the local cache (`hf download {model}`)"
        ) from None
    except VtcError:
        raise
    except Exception as error:  # what a file says may break anywhere in transformers
        raise UnsupportedModelError(
            f"the config.json of '{model}' is not complete, or not one of a '{kind}' that this transformers knows "
            f"({first_line(error)}): save or download the model again"
        ) from None


def _check_native(model: str, kind: str, fields: dict[str, Any]) -> None:
    """Refuse a type of model that transformers has no class for: the code beside its weights is never run."""
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as installed

    if kind in CONFIG_MAPPING:
        return
    if fields.get("auto_map"):
        raise UnsupportedModelError(
            f"'{model}' is a '{kind}', whose code lies beside its weights, and vtc hooks into the classes of transformers only: "
            "use the version of this checkpoint that was converted to them (its name often ends in -hf)"
        )
    raise UnsupportedModelError(
        f"'{model}' is a '{kind}', which transformers {installed} does not have: use a release that has it (`vtc doctor` lists "
        "what vtc supports)"
    )


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error of somebody else's."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]


def vision_language(config: Any) -> Any:
    """Return the configuration of the model that reads pictures and writes text: the thinker of one that speaks, too."""
    return getattr(config, "thinker_config", config)


def skeleton(config: Any) -> Any:
    """Build a model from its configuration on torch's meta device: structure without weights or memory.

    Raises
    ------
    UnsupportedModelError
        Not a vision-language model, or a configuration no model can be built from.
    """
    import torch
    import transformers

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    inside = vision_language(config)
    kind = config.model_type
    if inside is not config:
        raise UnsupportedModelError(
            f"a '{kind}' speaks, too: patch `model.thinker`, a '{inside.model_type}', which reads the pictures and writes the text"
        )
    make = transformers.AutoModelForImageTextToText.from_config
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        if not named.endswith("ForRetrieval") or not hasattr(transformers, named):
            raise UnsupportedModelError(
                f"a '{kind}' is not a vision-language model: give one that AutoModelForImageTextToText can load, such as "
                "a LLaVA (`vtc doctor` lists the supported families)"
            )
        make = getattr(transformers, named)
    try:
        with torch.device("meta"):
            return make(config)
    except Exception as error:  # what a file says may break anywhere in transformers
        raise UnsupportedModelError(
            f"no '{kind}' can be built from this configuration ({first_line(error)}): its config.json is not complete, or made for "
            "another release of transformers"
        ) from None


def answering(model: str, family: Any) -> Family:
    """Return the description of a model that writes text; raise :class:`UnsupportedModelError` for a retriever."""
    from vtc.families.base import Family

    if not isinstance(family, Family):
        raise UnsupportedModelError(
            f"'{model}' is a retriever and answers nothing: patch it in Python, or pool vectors with vtc.retrieval.pool_vectors"
        )
    return family


def load_model(model: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its processor, without touching the network.

    Parameters
    ----------
    model : str
        A folder, ``"pocket"``, or a hub id in the local cache.
    device : str
        ``"auto"`` takes a GPU if there is one; otherwise a torch device.
    dtype : str
        ``"auto"`` takes what the checkpoint says (float32 for the pocket model); otherwise the name of a torch dtype.

    Raises
    ------
    InputFileError, UnsupportedModelError, VtcError
        Not found, not supported, or a device or dtype that does not exist.
    """
    import torch

    kind = _dtype(dtype)
    where = device_named(device)
    if model == POCKET:
        from vtc.pocket import load_pocket

        return load_pocket(dtype=kind, device=where)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vtc.families import family_of

    answering(model, family_of(skeleton(load_config(model))))  # refuse before gigabytes are read
    place = locate(model)
    try:
        offline = {"local_files_only": True, "trust_remote_code": False}
        processor = AutoProcessor.from_pretrained(place, **offline)
        loaded = AutoModelForImageTextToText.from_pretrained(place, dtype=kind or "auto", **offline)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise InputFileError(f"the model '{model}' cannot be loaded ({first}): save or download it again, complete") from None
    if where.type == "cpu" and kind is None and loaded.dtype == torch.float16:
        loaded = loaded.float()  # half precision is slow and incomplete on CPUs
    return loaded.to(where).eval(), processor


def _dtype(name: str) -> torch.dtype | None:
    import torch

    if name == "auto":
        return None
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise VtcError(f"'{name}' is not a floating point dtype: use auto, float32, bfloat16 or float16")
    return value


def device_named(name: str) -> torch.device:
    """Return the device a user asked for; ``"auto"`` is a GPU where there is one.

    Raises
    ------
    VtcError
        It is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise VtcError(f"the device '{name}' is not available here: use --device auto or cpu") from None
    return device


# ------------------------------------------------------------------------------------------------------------- report
@dataclass(frozen=True)
class Report:
    """What vtc knows about one model.

    Attributes
    ----------
    model, model_type, architecture : str
        As given, ``config.model_type``, class name.
    family : Family or Retriever
        The adapter's description of the weightless model.
    image_size : tuple of int or None
        Width and height of the image the token count is for.
    count : Count
        Visual tokens of one image.
    reducers : dict
        Registered reducers: ``""`` if it runs on this model, else why not.
    """

    model: str
    model_type: str
    architecture: str
    family: Family | Retriever
    image_size: tuple[int, int] | None
    count: Count
    reducers: dict[str, str]

    @property
    def retriever(self) -> bool:
        """Whether the model makes vectors of documents, and writes no text."""
        return not hasattr(self.family, "facts")

    @property
    def budgeted(self) -> int | None:
        """Visual tokens that a budget is a share of: those of the image, or of one of its tiles or crops."""
        return self.count.tokens if self.family.unit == "image" else self.family.facts.tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        named = {"model": self.model, "model_type": self.model_type, "architecture": self.architecture}
        if self.retriever:
            return {**named, "family": self.family.name, "retriever": True, "reducers": self.reducers}
        facts, count = self.family.facts, self.count
        return {
            **named,
            "family": facts.family,
            "adapter": not self.family.probed,
            "decoder": {"type": self.family.text.config.model_type, "layers": facts.layers},
            "tower": {
                "type": getattr(getattr(self.family.tower, "config", None), "model_type", type(self.family.tower).__name__),
                "layers": facts.encoder_layers,
                "feature_layer": facts.feature_layer,
                "grid": list(facts.grid),
                "cls": facts.has_cls,
            },
            "anyres": facts.anyres,
            "signals": sorted(facts.provides),
            "stages": {stage.value: reason for stage, reason in facts.stages.items()},
            "image_size": list(self.image_size) if self.image_size else None,
            "visual_tokens": count.tokens,
            "unknown_since": count.why,
            "unit": self.family.unit,
            "units": count.pieces,
            "tokens_per_unit": self.budgeted,
            "video": self.family.describe_video is not None,
            "frames": self.family.frames,
            "views": count.views,
            "max_visual_tokens": facts.max_tokens,
            "reducers": self.reducers,
        }


def examine(model: str, image_size: tuple[int, int] | None = None) -> Report:
    """Describe a model from its configuration alone.

    Parameters
    ----------
    model : str
        A folder, ``"pocket"``, or a hub id in the local cache.
    image_size : (int, int), optional
        Width and height of the image to count visual tokens for; if not given and it matters, the tower's own input size (AnyRes),
        or 448 x 448.

    Raises
    ------
    InputFileError, UnsupportedModelError
        Not found, or not supported.
    """
    from vtc.counts import Count, count
    from vtc.families import family_of
    from vtc.families.base import Family

    config = load_config(model)
    skeletal = skeleton(config)
    kind, family = type(skeletal).__name__, family_of(skeletal)
    if not isinstance(family, Family):
        reasons = {name: reason_against_vectors(name) for name in _names()}
        return Report(model, config.model_type, kind, family, None, Count(), reasons)
    size = image_size
    if size is None and (family.facts.tokens is None or family.unit != "image"):  # it matters: count for a common one
        side = config.vision_config.image_size if family.facts.anyres else SIDE
        size = (side, side)
    counted = count(family, size or (SIDE, SIDE), locate(model))
    reasons = {name: reason_against(name, family.facts) for name in _names()}
    if family.probed:
        reasons |= _checked(skeletal, family.facts, [name for name, reason in reasons.items() if not reason])
    return Report(model, config.model_type, kind, family, size, counted, reasons)


def _checked(skeletal: Any, facts: Facts, names: list[str]) -> dict[str, str]:
    """Return why reducers would be refused after the check of a small copy that a model without an adapter has to pass."""
    from vtc.engine.patch import bind
    from vtc.registry import create
    from vtc.verify.memory import refusals

    return refusals(skeletal, {name: bind(create(name, keep=0.5), facts) for name in names})


def reason_against_vectors(reducer: str) -> str:
    """Return why a reducer cannot run on the vectors of a retriever (at half of them, default options), or ``""``."""
    from vtc.registry import create
    from vtc.retrieval import check_vector_reducer

    try:
        check_vector_reducer(create(reducer, keep=0.5))
    except VtcError as error:
        return str(error)
    return ""


def _names() -> list[str]:
    from vtc.registry import list_reducers

    return list_reducers()


def reason_against(reducer: str | Reducer, facts: Facts) -> str:
    """Return why a reducer cannot run on a model with these facts (at half the tokens, default options), or ``""``."""
    from vtc.engine.patch import bind
    from vtc.registry import create

    try:
        bind(create(reducer, keep=0.5) if isinstance(reducer, str) else reducer, facts)
    except VtcError as error:
        return str(error).partition("; these reducers work here")[0]
    return ""


# ------------------------------------------------------------------------------------------------------------- images
def open_image(path: str | Path) -> Image:
    """Read an image file completely, as RGB.

    Raises
    ------
    InputFileError
        It does not exist, is not an image, or is damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not Path(path).is_file():
        raise InputFileError(f"there is no image file '{path}': check the path given to --image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise InputFileError(f"'{path}' is not an image that Pillow can read: convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports damage with all three
        raise InputFileError(f"the image '{path}' is damaged ({error}): get the file again or save it anew") from None


def writable_picture(path: str | Path) -> Path:
    """Return ``path`` if a picture can be written there, so that a long run does not fail at its end.

    Raises
    ------
    InputFileError
        The folder does not exist, or Pillow does not write files with this ending.
    """
    from PIL import Image

    target = Path(path)
    Image.init()
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise InputFileError(f"'{path}' does not end like a picture: use a name such as {target.stem or 'kept'}.png")
    if target.is_dir() or not target.resolve().parent.is_dir():
        raise InputFileError(f"'{path}' cannot be written, its folder does not exist: create the folder or choose another name")
    return target
