"""What the command line asks about models and images: structure from a config alone, loading, readable errors.

Nothing here downloads: a model is a folder, ``"pocket"``, or a hub id that is already in the local cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.core import Compose, EncoderReducer, Facts, Reducer, Stage
from vtc.errors import UnsupportedModelError, VtcError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from vtc.families.base import Family

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
        A configuration the installed transformers does not know.
    """
    from transformers import AutoConfig

    place = locate(model)
    try:
        return AutoConfig.from_pretrained(place, local_files_only=True)
    except OSError:
        if Path(place).is_dir():
            raise InputFileError(f"the config.json of '{model}' cannot be read: save or download the model again") from None
        raise InputFileError(
            f"no model '{model}' here: give a folder, '{POCKET}', or a hub id that is in the local cache (`hf download {model}`)"
        ) from None
    except (ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"the configuration of '{model}' cannot be read by this transformers: {first}") from None


def skeleton(config: Any) -> Any:
    """Build a model from its configuration on torch's meta device: structure without weights or memory.

    Raises
    ------
    UnsupportedModelError
        Not a vision-language model.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except ValueError:
        raise UnsupportedModelError(
            f"a '{config.model_type}' is not a vision-language model: give one that AutoModelForImageTextToText can load, such as "
            "a LLaVA (`vtc doctor` lists the supported families)"
        ) from None


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

    family_of(skeleton(load_config(model)))  # refuse before gigabytes are read
    place = locate(model)
    try:
        processor = AutoProcessor.from_pretrained(place, local_files_only=True)
        loaded = AutoModelForImageTextToText.from_pretrained(place, dtype=kind or "auto", local_files_only=True)
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
    family : Family
        The adapter's description of the weightless model.
    image_size : tuple of int or None
        Width and height of the image the token count is for.
    slots, views : int or None
        Visual tokens and views of one image.
    reducers : dict
        Registered reducers: ``""`` if it runs on this model, else why not.
    """

    model: str
    model_type: str
    architecture: str
    family: Family
    image_size: tuple[int, int] | None
    slots: int | None
    views: int | None
    reducers: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        facts = self.family.facts
        return {
            "model": self.model,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "family": facts.family,
            "decoder": {"type": self.family.text.config.model_type, "layers": facts.layers},
            "tower": {
                "type": getattr(self.family.tower.config, "model_type", type(self.family.tower).__name__),
                "layers": facts.encoder_layers,
                "feature_layer": facts.feature_layer,
                "grid": list(facts.grid),
                "cls": facts.has_cls,
            },
            "anyres": facts.anyres,
            "signals": sorted(facts.provides),
            "stages": {stage.value: reason for stage, reason in facts.stages.items()},
            "image_size": list(self.image_size) if self.image_size else None,
            "visual_tokens": self.slots,
            "unit": self.family.unit,
            "video": self.family.describe_video is not None,
            "views": self.views,
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
    from vtc.families import family_of

    config = load_config(model)
    skeletal = skeleton(config)
    family = family_of(skeletal)
    size = image_size
    if size is None and family.facts.tokens is None:  # depends on the picture: count for a common one
        side = config.vision_config.image_size if family.facts.anyres else SIDE
        size = (side, side)
    slots, views = visual_tokens(family, size or (SIDE, SIDE), processor_settings(model))
    reasons = {name: reason_against(name, family.facts) for name in _names()}
    return Report(model, config.model_type, type(skeletal).__name__, family, size, slots, views, reasons)


def visual_tokens(family: Family, size: tuple[int, int], processor: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return visual tokens and views of an image of ``size`` (width, height), from the adapter's own description.

    ``processor``: settings of the image processor where they are known; its usual ones otherwise.
    """
    if family.example is None:
        return None, None
    width, height = size
    call = family.describe(family.example(height, width, processor))
    return len(call.slots[0]), call.views[0]


def processor_settings(model: str) -> dict[str, Any]:
    """Return the content of a model's ``preprocessor_config.json``, empty if it has none here."""
    from transformers.utils import cached_file

    try:
        path = cached_file(locate(model), "preprocessor_config.json", local_files_only=True)
        return json.loads(Path(path).read_text())
    except (OSError, TypeError, ValueError):  # not there, not in the cache, not JSON
        return {}


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
        It does not exist, is not an image, is damaged, or holds more pixels than Pillow takes for an honest picture.
    """
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    if not Path(path).is_file():
        raise InputFileError(f"there is no image file '{path}': check the path given to --image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except (
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ):  # the one above the limit, the other above its double
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise InputFileError(f"the image '{path}' has more than {most:.0f} million pixels: shrink it first") from None
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


def save_picture(image: Image, target: Path) -> None:
    """Write a picture to a file that :func:`writable_picture` has accepted.

    Raises
    ------
    StoreError
        It cannot be written; what was there before is still there.
    """
    import io

    from PIL import Image as pillow  # noqa: N813

    from vtc.files import save

    out = io.BytesIO()
    image.save(out, format=pillow.registered_extensions()[target.suffix.lower()])
    save(target, out.getvalue(), "choose another file with --show")
