"""What the command line asks about models and images: structure from a config alone, loading, readable errors.

Nothing here downloads: a model is a folder, ``"pocket"``, or a hub id that is already in the local cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc import doors
from vtc.core import Compose, EncoderReducer, Facts, Need, Reducer, Stage
from vtc.doors import open_image as open_image  # the command line's, and of whoever imported it from here
from vtc.errors import InputFileError, UnsupportedModelError, VtcError, short

if TYPE_CHECKING:
    import torch

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


def _parts_needs(name: str) -> Iterator[tuple[Reducer, list[Need]]]:
    """Yield the parts of a reducer on a LLaVA-1.5 at its default options, each with what it taps."""
    from vtc.registry import create

    for part in create(name, keep=0.5).bind(NOMINAL).parts():
        inner = (
            [n for layer in range(NOMINAL.feature_layer) for n in part.encoder_needs(layer)]
            if isinstance(part, EncoderReducer)
            else []
        )
        yield part, [*part.needs, *inner]


def needs_of(name: str) -> list[str]:
    """Return the names of the signals a reducer taps on a LLaVA-1.5 at its default options; empty if it looks at features only."""
    names: list[str] = []
    for part, needs in _parts_needs(name):
        names += [n.name for n in needs]
        names += [extra for extra in ("text", "cls") if getattr(part, f"wants_{extra}")]
    return list(dict.fromkeys(names))


def text_aware(name: str) -> bool:
    """Whether what a reducer keeps depends on the words of the prompt: it reads them, or signals of the language model."""
    return any(part.wants_text or any(n.source == "text" for n in needs) for part, needs in _parts_needs(name))


def reads_attention(name: str) -> bool:
    """Whether a reducer reads anything of an attention: weights, queries, keys or values."""
    return any(n.of in ("attention", "preview") for _, needs in _parts_needs(name) for n in needs)


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
CONFIG_BYTES = 16 * doors.MIB
"""Largest config.json or preprocessor_config.json."""

MODULES = 150_000
"""Most modules of a model that is built from its config alone: several times those of the largest mixtures of experts."""


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
    path, shown = doors.place(model), doors.short(model)
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputFileError(f"the folder '{shown}' has no config.json: give the folder a model was saved to")
        return str(path)
    if model and path.exists():
        raise InputFileError(f"'{shown}' is a file: give the folder a model was saved to, a hub id, or '{POCKET}'")
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputFileError(f"there is no folder '{shown}': give a model's folder, a hub id in the local cache, or '{POCKET}'")
    return model


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's client off the network while the body runs, also from what it looks up besides the files asked for."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def explained(model: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises over the files of a model folder into one sentence; ``what``: their name in it.

    Raises
    ------
    UnsupportedModelError
        With the reason; for code that the folder brings, with the flag that allows it. ``OSError`` and our own errors pass.
    """
    try:
        yield
    except (VtcError, OSError, MemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{what} of '{doors.short(model)}' needs Python code that comes with the model, and it was not run: read that "
                "code, and give --trust-remote-code if you trust who wrote it"
            ) from None
        reason = doors.short(next(iter(str(error).strip().splitlines()), ""), 200)
        raise UnsupportedModelError(
            f"{what} of '{doors.short(model)}' cannot be read by this transformers ({type(error).__name__}: {reason}): save or "
            "download the model again, or update transformers"
        ) from error


def read_config(model: str, place: str, *, trust_remote_code: bool = False, **where: Any) -> Any:
    """Return the configuration in a folder or hub repository; nothing in it may reach for code.

    Parameters
    ----------
    model : str
        As the user named it.
    place : str
        From :func:`locate`.
    trust_remote_code : bool
        The user's word that Python code of the model may run.
    **where
        Passed on: ``revision``, ``local_files_only``.

    Raises
    ------
    OSError
        Nothing of that name.
    InputFileError, UnsupportedModelError
        A file that is too large or no file, or a configuration that the installed transformers does not know or that asks for code.
    """
    from transformers import AutoConfig

    if Path(place).is_dir():
        doors.read_bytes(Path(place) / "config.json", CONFIG_BYTES)
    with explained(model, "the configuration"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **where)
    if kernel := _hub_kernel(config):
        raise UnsupportedModelError(
            f"the configuration of '{doors.short(model)}' asks for '{doors.short(kernel)}', code from the hub: replace it in "
            "config.json with sdpa or eager"
        )
    return config


def _hub_kernel(config: Any) -> str:
    """Return the first implementation that a configuration, or one inside it, wants from a hub repository; ``""`` for none."""
    from transformers import PretrainedConfig

    for key, value in vars(config).items():
        if "_implementation" in key and "/" in str(value):
            return str(value)
        if isinstance(value, PretrainedConfig) and (found := _hub_kernel(value)):
            return found
    return ""


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration, without touching the network.

    Raises
    ------
    InputFileError
        Nothing of that name here.
    UnsupportedModelError
        A configuration the installed transformers does not know, or one that needs code.
    """
    place = locate(model)
    shown = doors.short(model)
    try:
        with offline():
            return read_config(model, place, trust_remote_code=trust_remote_code, local_files_only=True)
    except InputFileError:
        raise
    except OSError:
        if Path(place).is_dir():
            raise InputFileError(f"the config.json of '{shown}' cannot be read: save or download the model again") from None
        raise InputFileError(
            f"no model '{shown}' here: give a folder, '{POCKET}', or a hub id that is in the local cache (`hf download {shown}`)"
        ) from None


def skeleton(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Build a model from its configuration on torch's meta device: structure without weights or memory.

    Raises
    ------
    UnsupportedModelError
        Not a vision-language model, or a configuration that no model can be built from.
    """
    import torch
    from torch.nn.modules.module import register_module_module_registration_hook
    from transformers import AutoModelForImageTextToText

    count = 0

    def bounded(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise UnsupportedModelError(
                f"the configuration of this '{doors.short(config.model_type)}' describes more than {MODULES:,} modules: no model "
                "has as many, correct its numbers of layers"
            )

    watch = register_module_module_registration_hook(bounded)
    try:
        with torch.device("meta"), explained(config.model_type, "the configuration"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except UnsupportedModelError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedModelError(
            f"a '{doors.short(config.model_type)}' is not a vision-language model: give one that AutoModelForImageTextToText can "
            "load, such as a LLaVA (`vtc doctor` lists the supported families)"
        ) from None
    finally:
        watch.remove()


def load_model(model: str, device: str = "auto", dtype: str = "auto", *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model and its processor, without touching the network.

    Parameters
    ----------
    model : str
        A folder, ``"pocket"``, or a hub id in the local cache.
    device : str
        ``"auto"`` takes a GPU if there is one; otherwise a torch device.
    dtype : str
        ``"auto"`` takes what the checkpoint says (float32 for the pocket model); otherwise the name of a torch dtype.
    trust_remote_code : bool
        Whether Python code that comes with the model may run.

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

    config = load_config(model, trust_remote_code=trust_remote_code)
    with explained(model, "the configuration"):
        family_of(skeleton(config, trust_remote_code=trust_remote_code))  # refuse before gigabytes are read
    place = locate(model)
    try:
        with offline():
            with explained(model, "the processor"):
                processor = AutoProcessor.from_pretrained(place, local_files_only=True, trust_remote_code=trust_remote_code)
            with explained(model, "the model"):
                loaded = AutoModelForImageTextToText.from_pretrained(
                    place, dtype=kind or "auto", local_files_only=True, trust_remote_code=trust_remote_code
                )
    except OSError as error:
        first = doors.short(next(iter(str(error).strip().splitlines()), ""), 200)
        raise InputFileError(
            f"the model '{doors.short(model)}' cannot be loaded ({first}): save or download it again, complete"
        ) from None
    if where.type == "cpu" and kind is None and loaded.dtype == torch.float16:
        loaded = loaded.float()  # half precision is slow and incomplete on CPUs
    return loaded.to(where).eval(), processor


def _dtype(name: str) -> torch.dtype | None:
    import torch

    if name == "auto":
        return None
    value = getattr(torch, name, None)
    if value not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise VtcError(f"'{doors.short(name)}' is not a floating point dtype: use auto, float32, bfloat16 or float16")
    return value


def device_named(name: str) -> torch.device:
    """Return the device a user asked for; ``"auto"`` is a GPU where there is one.

    Raises
    ------
    VtcError
        It is not there, or does not compute.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        there = torch.zeros(1, device=device)
        there.item()  # the meta device, for one, has tensors without numbers
    except Exception:  # noqa: BLE001  every kind of device has its own way to be absent
        there = None
    if there is None or there.device.type != device.type or (device.type == "cpu" and device.index):
        raise VtcError(f"the device '{doors.short(name)}' is not available here: use --device auto or cpu")
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


def examine(model: str, image_size: tuple[int, int] | None = None, *, trust_remote_code: bool = False) -> Report:
    """Describe a model from its configuration alone, without touching the network.

    Parameters
    ----------
    model : str
        A folder, ``"pocket"``, or a hub id in the local cache.
    image_size : (int, int), optional
        Width and height of the image to count visual tokens for; if not given and it matters, the tower's own input size (AnyRes),
        or 448 x 448.
    trust_remote_code : bool
        Whether Python code that comes with the model may run.

    Raises
    ------
    InputFileError, UnsupportedModelError
        Not found, or not supported.
    """
    from vtc.families import family_of

    config = load_config(model, trust_remote_code=trust_remote_code)
    skeletal = skeleton(config, trust_remote_code=trust_remote_code)
    with explained(model, "the configuration"):
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
        with offline():
            path = cached_file(locate(model), "preprocessor_config.json", local_files_only=True)
        found = json.loads(doors.read_text(path, CONFIG_BYTES))
    except (OSError, TypeError, ValueError, RecursionError):  # not there, not in the cache, not JSON
        return {}
    return found if isinstance(found, dict) else {}


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
def writable_picture(path: str | Path) -> Path:
    """Return ``path`` if a picture can be written there, so that a long run does not fail at its end; its folder is made.

    Raises
    ------
    InputFileError
        The folder cannot be made, or Pillow does not write files with this ending.
    """
    from PIL import Image

    target = doors.place(path)
    Image.init()
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise InputFileError(f"'{path}' does not end like a picture: use a name such as {target.stem or 'kept'}.png")
    try:
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFileError(
            f"'{short(path)}' cannot be written, its folder cannot be made ({error.strerror}): choose another name"
        ) from None
    if target.is_dir():
        raise InputFileError(f"'{short(path)}' cannot be written, it is a folder: choose another name")
    return target
