"""Where files of other people come in: bounded reads, paths that stay in their folder, pictures of a few known formats.

Sweep files, tables of questions, pictures, stores and model folders are data. A door looks at what a file is before it reads it (a
pipe would be waited for, a device never ends), reads no more than a stated number of bytes, follows no name out of the folder it
belongs to, and answers with the content or with one sentence.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vtc.errors import UNPRINTABLE, InputFileError, PromptError, short

if TYPE_CHECKING:
    from PIL.Image import Image

MIB = 2**20
"""Bytes of a mebibyte."""

PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name ends with: its other readers start programs, or read other files."""

PICTURE_BYTES = 512 * MIB
"""Largest picture file; the pixels have a bound of their own (Pillow's)."""

PICTURE_RATIO = 200
"""How many times longer than the other a side may be: a processor that scales the short side would blow up the long one."""

GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
"""Arguments of ``generate`` for one greedy answer, whatever the generation_config.json of a model's folder asks for."""

_MARK = re.compile(r"(image|img|video|vision|audio|boi|eoi).*token$|^(boi|eoi)_token$")
"""Names of a processor's attributes that hold marks for pictures and the like."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def unprintable(text: str) -> str:
    r"""Return the first character that no text needs (escape sequences, half a surrogate pair), as ``"'\\x1b'"``; or ``""``."""
    found = UNPRINTABLE.search(text)
    return ascii(found[0]) if found else ""


# -------------------------------------------------------------------------------------------------------------- paths
def place(name: str | os.PathLike[str]) -> Path:
    """Return what the user named as a path, with ``~`` expanded; it need not exist.

    Raises
    ------
    InputFileError
        Nothing can have that name: a user who does not exist, a NUL, more characters than the file system takes.
    """
    try:
        path = Path(name).expanduser()
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputFileError(f"'{short(name)}' is longer than a file name can be: give a shorter one") from None
        return path  # absent, or not ours to look at: whoever opens it says so
    except (RuntimeError, ValueError) as error:
        raise InputFileError(f"'{short(name)}' cannot be a path ({short(error)}): give another one") from None
    return path


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder``, links followed.

    Raises
    ------
    InputFileError
        It lies elsewhere: by ``..``, as an absolute path, or by a link.
    """
    try:
        root = folder.resolve()
        found = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a NUL, a name too long
        raise InputFileError(f"'{short(name)}' cannot be a path ({short(error)}): give another one") from None
    if not found.is_relative_to(root):
        raise InputFileError(
            f"'{short(name)}' is not in the folder '{short(folder)}': put a copy there, or name the folder it is in"
        )
    return found


# ------------------------------------------------------------------------------------------------------------ reading
@contextmanager
def opened(path: str | os.PathLike[str], most: int, what: str = "file") -> Iterator[BinaryIO]:
    """Open an ordinary file for reading, whose size is at most ``most`` bytes; messages call it ``what``.

    Raises
    ------
    InputFileError
        It is a folder, a pipe, a device or a socket, it is too large, or nothing can have that name.
    OSError
        It is not there, or cannot be read.
    """
    try:
        _check_kind(path, os.stat(path), most, what)  # before it is opened: opening a device may do something
        number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:
        raise InputFileError(f"'{short(path)}' cannot be a path ({short(error)}): give another one") from None
    with os.fdopen(number, "rb") as file:
        _check_kind(path, os.fstat(number), most, what)  # what was opened may be something else by now
        yield file


def read_bytes(path: str | os.PathLike[str], most: int, what: str = "file") -> bytes:
    """Return the content of an ordinary file of at most ``most`` bytes; see :func:`opened` for what is raised."""
    with opened(path, most, what) as file:
        data = file.read(most + 1)  # a file that grows, or one of /proc, says nothing true about its size
    if len(data) > most:
        raise _too_large(path, len(data), most)
    return data


def read_text(path: str | os.PathLike[str], most: int, what: str = "file") -> str:
    """Return the UTF-8 text of an ordinary file of at most ``most`` bytes; see :func:`opened` for what is raised.

    Raises
    ------
    UnicodeDecodeError
        It is not UTF-8.
    """
    return read_bytes(path, most, what).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _check_kind(path: str | os.PathLike[str], found: os.stat_result, most: int, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise InputFileError(f"there is no {what} '{short(path)}' ({kind} cannot be read): give an ordinary file")
    if found.st_size > most:
        raise _too_large(path, found.st_size, most)


def _too_large(path: str | os.PathLike[str], size: int, most: int) -> InputFileError:
    def amount(n: int) -> str:
        return f"{n / MIB:,.0f} MiB" if n >= MIB else f"{n / 1024:,.0f} KiB"

    return InputFileError(f"'{short(path)}' is larger than such a file may be ({amount(size)}, at most {amount(most)})")


# ----------------------------------------------------------------------------------------------------------- pictures
def open_image(path: str | os.PathLike[str]) -> Image:
    """Read an image file completely, as RGB, turned as its EXIF data say.

    Raises
    ------
    InputFileError
        It does not exist, is none of :data:`PICTURE_FORMATS`, is damaged, has more pixels or longer sides than any picture that a
        vision tower is shown, or pixels whose white nobody knows (:func:`as_rgb`).
    """
    from PIL import Image, UnidentifiedImageError

    shown = short(path)
    try:
        with opened(path, PICTURE_BYTES, "image file") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, for one: the picture decides, not its notes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            there = [name for name in PICTURE_FORMATS if name in Image.OPEN]  # a Pillow may be built without one of them
            with Image.open(file, formats=there) as image:
                width, height = image.size
                if max(width, height) > PICTURE_RATIO * max(1, min(width, height)):
                    raise InputFileError(
                        f"the image '{shown}' is {width}x{height} pixels: one side may be at most {PICTURE_RATIO} times the other"
                    )
                return as_rgb(image, f"the image '{shown}'")
    except (FileNotFoundError, NotADirectoryError):
        raise InputFileError(f"there is no image file '{shown}': check the path") from None
    except (InputFileError, MemoryError):
        raise
    except UnidentifiedImageError:
        known = ", ".join(PICTURE_FORMATS)
        raise InputFileError(f"'{shown}' is not an image that vtc reads ({known}): convert it to PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = f"{Image.MAX_IMAGE_PIXELS or 0:,}"
        raise InputFileError(f"the image '{shown}' has more pixels than a picture may have ({most}): make it smaller") from None
    except Exception as error:  # noqa: BLE001  on damaged files Pillow's readers raise whatever they stumble over
        reason = short(error) or type(error).__name__
        raise InputFileError(f"the image '{shown}' is damaged ({reason}): get the file again or save it anew") from None


def as_rgb(image: Image, what: str = "a picture") -> Image:
    """Return a picture as RGB with 8 bits, turned as its EXIF data say; 16 bits are scaled, not cut off.

    Raises
    ------
    InputFileError
        Its pixels are fractions or 32-bit numbers: which of them is white, the file does not say. ``what`` names the picture.
    """
    import numpy as np
    from PIL import Image as pillow  # noqa: N813
    from PIL import ImageOps

    kind = image.format  # a turned copy has none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.int64)
        image = pillow.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        held = "32-bit whole numbers" if image.mode == "I" else "fractions"
        raise InputFileError(f"{what} holds {held} of which none is known to be white: save it with 8 or 16 bits per colour")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------- questions
def check_prompt(processor: Any, prompt: str, what: str = "the question") -> None:
    """Refuse a question that holds one of the processor's marks for a picture or a video: it would count as one more.

    Raises
    ------
    PromptError
        With the mark; ``what`` names the question.
    """
    for name, mark in vars(processor).items():
        if _MARK.search(name) and isinstance(mark, str) and mark and mark in prompt:
            raise PromptError(f"{what} holds '{short(mark)}', which stands for a picture in this model's prompts: leave it out")


def check_length(config: Any, tokens: int, what: str = "the question") -> None:
    """Refuse a prompt of so many ``tokens``, pictures included, if the model was not made for as many.

    Raises
    ------
    PromptError
        With both numbers; ``what`` names the question.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and tokens >= most:
        raise PromptError(
            f"{what} takes {tokens:,} tokens with its picture, and the model was made for {most:,} with the answer: shorten it"
        )
