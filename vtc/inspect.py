"""What the command line asks about models and images: structure from a config alone, loading, readable errors.

Nothing here downloads: a model is a folder, ``"pocket"``, or a hub id that is already in the local cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
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
            f"{what} of '{doors.short(model)}' is not complete, or cannot be read by this transformers ({type(error).__name__}: "
            f"{reason}): save or download the model again, or update transformers"
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
    from transformers import AutoConfig, PretrainedConfig

    if Path(place).is_dir():
        doors.read_bytes(Path(place) / "config.json", CONFIG_BYTES)
    with explained(model, "the configuration"):
        fields, _ = PretrainedConfig.get_config_dict(place, **where)
        if not trust_remote_code:
            _check_native(doors.short(model), fields)
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
        A configuration the installed transformers does not know, one that needs code, or one that is not complete.
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


def _check_native(model: str, fields: dict[str, Any]) -> None:
    """Refuse a type of model that transformers has no class for."""
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as installed

    kind = fields.get("model_type")
    if not kind:
        raise UnsupportedModelError(
            f"the config.json of '{model}' has no model_type: give the folder or hub id of a transformers model"
        )
    if kind in CONFIG_MAPPING:
        return
    kind = doors.short(str(kind))
    if fields.get("auto_map"):
        raise UnsupportedModelError(
            f"'{model}' is a '{kind}' and needs Python code that comes with the model, and it was not run: use the version of this "
            "checkpoint that was converted to transformers' own classes (its name often ends in -hf), or read that code, and give "
            "--trust-remote-code if you trust who wrote it"
        )
    raise UnsupportedModelError(
        f"'{model}' is a '{kind}', which transformers {installed} does not have: use a release that has it (`vtc doctor` lists "
        "what vtc supports)"
    )


def vision_language(config: Any) -> Any:
    """Return the configuration of the model that reads pictures and writes text: the thinker of one that speaks, too."""
    return getattr(config, "thinker_config", config)


def skeleton(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Build a model from its configuration on torch's meta device: structure without weights or memory.

    Raises
    ------
    UnsupportedModelError
        Not a vision-language model, or a configuration that no model can be built from.
    """
    import torch
    import transformers
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def bounded(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise UnsupportedModelError(
                f"the configuration of this '{kind}' describes more than {MODULES:,} modules: no model has as many, correct its "
                "numbers of layers"
            )

    inside, kind = vision_language(config), doors.short(config.model_type)
    if inside is not config:
        raise UnsupportedModelError(
            f"a '{kind}' speaks, too: patch `model.thinker`, a '{doors.short(inside.model_type)}', which reads the pictures and "
            "writes the text"
        )
    make = functools.partial(transformers.AutoModelForImageTextToText.from_config, trust_remote_code=trust_remote_code)
    brought = trust_remote_code and getattr(config, "auto_map", None)
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not brought:
        named = next(iter(getattr(config, "architectures", None) or ()), "")
        if not named.endswith("ForRetrieval") or not hasattr(transformers, named):
            raise UnsupportedModelError(
                f"a '{kind}' is not a vision-language model: give one that AutoModelForImageTextToText can load, such as "
                "a LLaVA (`vtc doctor` lists the supported families)"
            )
        make = getattr(transformers, named)
    watch = register_module_module_registration_hook(bounded)
    try:
        with torch.device("meta"), explained(config.model_type, "the configuration"):
            return make(config)
    finally:
        watch.remove()


def answering(model: str, family: Any) -> Family:
    """Return the description of a model that writes text; raise :class:`UnsupportedModelError` for a retriever."""
    from vtc.families.base import Family

    if not isinstance(family, Family):
        raise UnsupportedModelError(
            f"'{model}' is a retriever and answers nothing: patch it in Python, or pool vectors with vtc.retrieval.pool_vectors"
        )
    return family


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
        answering(model, family_of(skeleton(config, trust_remote_code=trust_remote_code)))  # refuse before gigabytes are read
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
    from vtc.counts import Count, count
    from vtc.families import family_of
    from vtc.families.base import Family

    config = load_config(model, trust_remote_code=trust_remote_code)
    skeletal = skeleton(config, trust_remote_code=trust_remote_code)
    kind = type(skeletal).__name__
    with explained(model, "the configuration"):
        family = family_of(skeletal)
    if not isinstance(family, Family):
        reasons = {name: reason_against_vectors(name) for name in _names()}
        return Report(model, config.model_type, kind, family, None, Count(), reasons)
    size = image_size
    if size is None and (family.facts.tokens is None or family.unit != "image"):  # it matters: count for a common one
        side = config.vision_config.image_size if family.facts.anyres else SIDE
        size = (side, side)
    with explained(model, "the configuration"), offline():
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
