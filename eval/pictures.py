"""Pictures of the user's own data: what is kept of one is its path and its digest, and it is decoded when a batch needs it.

A thousand photos of twelve megapixels would take 36 GB. A picture that is no longer the one that was looked at is refused, so that
no answer is stored under another picture's address.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import ConfigError
from vtc.eval.digests import settled
from vtc.inspect import InputFileError, open_image
from vtc.pocket import Question

if TYPE_CHECKING:
    from PIL.Image import Image

_KEPT = 2
"""Decoded pictures at hand: questions about one often follow each other."""

_MOST = 100_000
"""Digests remembered; those of a later look take decoding again."""

_known: dict[tuple[Any, ...], Picture] = {}


@dataclass(frozen=True)
class Picture:
    """A picture file as it was when it was looked at.

    Attributes
    ----------
    path : Path
        Where it lies.
    digest : str
        Hash of its size and of its pixels as RGB.
    """

    path: Path
    digest: str

    def open(self) -> Image:
        """Decode the file again; the result may be shared, treat it as read-only.

        Raises
        ------
        ConfigError
            It is gone, or shows something else now.
        """
        try:
            return _decoded(self)
        except InputFileError as error:
            problem = str(error).partition(": ")[0]
            raise ConfigError(
                f"{problem}, and it could be read when the sweep was planned: put it back, or run again"
            ) from None


@functools.lru_cache(maxsize=_KEPT)
def _decoded(picture: Picture) -> Image:
    image = open_image(picture.path)
    if _digest(image) != picture.digest:
        raise ConfigError(
            f"the picture {picture.path} has changed since the sweep was planned: run the sweep again, it measures the new one "
            "under an address of its own"
        )
    return image


def _digest(image: Image) -> str:
    total = hashlib.sha256(str(image.size).encode())
    total.update(image.tobytes())
    return total.hexdigest()[:32]


def look_at(path: Path) -> Picture:
    """Decode a picture once and return what is kept of it.

    Raises
    ------
    InputFileError
        No such file, not an image, a damaged one, or one too large to decode.
    """
    before = _times(path)
    if before is not None and _key(path, before) in _known:
        return _known[_key(path, before)]
    picture = Picture(path, _digest(open_image(path)))
    after = _times(path)
    if before and after and _key(path, before) == _key(path, after) and settled(after) and len(_known) < _MOST:
        _known[_key(path, after)] = picture
    return picture


def _times(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return None


def _key(path: Path, found: os.stat_result) -> tuple[Any, ...]:
    return (path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileQuestion(Question):
    """A question about a picture file, which is decoded whenever its image is asked for."""

    picture: Picture

    def __init__(self, picture: Picture, prompt: str, answer: str, type: str, id: str) -> None:  # noqa: A002  the fields' names
        for name, value in (("picture", picture), ("prompt", prompt), ("answer", answer), ("type", type), ("id", id)):
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def image(self) -> Image:  # type: ignore[override]
        """The picture, decoded.

        Raises
        ------
        ConfigError
            It is gone, or shows something else than it did.
        """
        return self.picture.open()
