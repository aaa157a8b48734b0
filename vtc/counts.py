"""How many visual tokens a picture becomes: what the model's own image processor makes of it, counted as the model counts.

Nothing is assumed. A processor whose settings are not here, or that cannot be built, gives no number but a reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc import doors
from vtc.engine import upstream
from vtc.errors import VtcError

if TYPE_CHECKING:
    from vtc.families.base import Family

SETTINGS_BYTES = 16 * doors.MIB
"""Largest file of a processor's settings."""
LARGEST = 50_000_000
"""Pixels of the largest picture that is counted."""


class UncountableError(VtcError):
    """The number of visual tokens is not known; the message says why."""


@dataclass(frozen=True)
class Count:
    """Visual tokens of one picture.

    Attributes
    ----------
    tokens : int or None
        All of them; ``None``: not known.
    pieces : int or None
        Tiles or crops that the picture is cut into and that the model takes for pictures of their own; 1 where it is not cut.
    views : int or None
        Views the tower sees: thumbnail and crops of an AnyRes picture, or the pieces.
    why : str
        Why it is not known; empty if it is.
    """

    tokens: int | None = None
    pieces: int | None = None
    views: int | None = None
    why: str = ""


def count(family: Family, size: tuple[int, int], processor: Any = None) -> Count:
    """Count the visual tokens of a picture.

    Parameters
    ----------
    family : Family
        The adapter's description of the model.
    size : (int, int)
        Width and height.
    processor : str, Path, image processor or None
        Folder or hub id of the model, whose processor is loaded where it matters (nothing is downloaded); or its image processor.
    """
    if family.unit == "image" and family.facts.tokens is not None:
        return Count(family.facts.tokens, 1, 1)  # every picture becomes what the tower takes
    try:
        if family.example is not None:
            call = family.example(size[1], size[0])
        elif family.probed:
            return Count(_placeholders(family, size, processor), 1, None)
        else:
            call = _processed(family, size, processor)
    except UncountableError as unknown:
        return Count(why=str(unknown))
    made = family.describe(call)
    return Count(sum(map(len, made.slots)), len(made.slots), sum(made.views))


# ---------------------------------------------------------------------------------------------------------- processors
def _processed(family: Family, size: tuple[int, int], processor: Any) -> dict[str, Any]:
    """Return what the image processor makes of a picture: arguments of ``get_image_features``."""
    if processor is None:
        raise UncountableError("it depends on the image processor, which is not here")
    if isinstance(processor, (str, Path)):
        processor = image_processor(str(processor))
    try:
        return dict(processor(images=[_picture(size)], return_tensors="pt", **family.processing))
    except UncountableError:
        raise
    except Exception as error:  # of code and settings that are not ours
        raise UncountableError(f"its image processor refuses such a picture ({_first(error)})") from None


def image_processor(model: str) -> Any:
    """Load a model's image processor, without touching the network or running code of its folder.

    Raises
    ------
    UncountableError
        No settings here, or a processor that cannot be built.
    """
    from transformers import AutoImageProcessor

    if not _has_settings(model):
        raise UncountableError("it depends on the image processor, whose settings (preprocessor_config.json) are not here")
    try:
        return AutoImageProcessor.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of files and code that are not ours
        raise UncountableError(f"its image processor cannot be built here ({_first(error)})") from None


def _has_settings(model: str) -> bool:
    """Whether the settings of an image processor are here: a file of their own, or inside those of the whole processor.

    Older releases take the settings of a processor for those of its image processor where they find no others.
    """
    from transformers.utils import cached_file

    def there(name: str, key: str = "") -> bool:
        try:
            path = cached_file(model, name, local_files_only=True)
            return bool(path) and (not key or key in json.loads(doors.read_text(path, SETTINGS_BYTES)))
        except (OSError, TypeError, ValueError, RecursionError, VtcError):  # not there, not in the cache, not JSON
            return False

    return there("preprocessor_config.json") or there("processor_config.json", "image_processor")


def _placeholders(family: Family, size: tuple[int, int], model: Any) -> int:
    """Count the placeholders that a model's whole processor writes for a picture, where no adapter knows how it is cut."""
    from transformers import AutoProcessor

    if model is None:
        raise UncountableError("it depends on the processor, which is not here")
    picture = _picture(size)
    try:
        processor = model
        if isinstance(model, (str, Path)):
            processor = AutoProcessor.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        text = getattr(processor, "image_token", None)
        if text is None:
            raise UncountableError("its processor does not say how a picture is written in a prompt")
        ids = processor(images=[picture], text=[text], return_tensors="pt")[upstream.IDS]
    except UncountableError:
        raise
    except Exception as error:  # of files and code that are not ours
        raise UncountableError(f"its processor cannot be built or run here ({_first(error)})") from None
    found = sum(int((ids == token).sum()) for token in family.image_token_ids)
    if found < 2:  # the text itself
        raise UncountableError("its processor, as it is here, writes no placeholders of the model")
    return found


def _picture(size: tuple[int, int]) -> Any:
    from PIL import Image

    if size[0] * size[1] > LARGEST:
        raise UncountableError(f"pictures of more than {LARGEST // 10**6} megapixels are not counted")
    return Image.new("RGB", size, "white")  # no normalization makes zeros of it, which stand for padding


def _first(error: BaseException) -> str:
    """Return the first line of an error, with its kind."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]
