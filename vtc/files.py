"""Files that appear whole or not at all, and reading files that may be somebody else's.

Whatever vtc writes for a user goes through :func:`write_whole`: a full disk, a kill or a link put in the way by somebody else costs
the new file, never the old one or another one. What is read from a folder that may come from a stranger goes through
:func:`read_plain`: plain files of a bounded size, no links, no waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path

from vtc.errors import StoreError

PART = re.compile(r"\.[0-9a-f]{16}\.part")
"""Names of files that are not whole yet: those of a killed process stay."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when there is no room."""

_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_SYSTEM = tuple(Path(p) for p in ("/dev", "/proc", "/sys"))


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file aside and rename it into place.

    The bytes go to a new file in the same folder, under a name nobody can guess, opened so that nothing that lies there is used or
    followed; they are on the disk before the rename, which is one step. What was at ``path`` before stays if anything fails. A link
    at ``path`` is replaced, never followed.

    Parameters
    ----------
    path : Path
        Where to; missing folders are made.
    content : str or bytes
        Text is written as UTF-8.
    durable : bool
        Wait until it is on the disk; what nobody needs after a power cut need not be.

    Raises
    ------
    OSError
        The file cannot be written: no room, no rights, a folder or a device in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent.resolve()
    if any(folder.is_relative_to(p) for p in _SYSTEM):  # a rename would put a file in the place of a device
        raise OSError(errno.EINVAL, "no place for files", str(path))
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
            raise OSError(errno.EINVAL, "not a file", str(path))
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        create(part, content, durable=durable)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    if durable:
        sync_folder(folder)


def create(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a new file under a name that nothing has yet, not even a link; see :func:`write_whole`.

    Raises
    ------
    OSError
        The name is taken, or the file cannot be written; a part of it may be there then.
    """
    rest = memoryview(content.encode("utf-8") if isinstance(content, str) else content)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the system write a folder's entries down, where it can: a rename then outlives a power cut."""
    with contextlib.suppress(OSError):  # network file systems and Windows refuse; the file itself is whole
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: Path, content: str | bytes, remedy: str) -> None:
    """Write a file as :func:`write_whole` does.

    Parameters
    ----------
    path : Path
        Where to.
    content : str or bytes
        What.
    remedy : str
        End of the error's sentence: what to do where the place is to blame, such as ``"name another file with --output"``.

    Raises
    ------
    StoreError
        The disk is full, or the file cannot be written; what was there before is still there.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise unwritable(path, error, remedy) from None


def unwritable(path: Path, error: OSError, remedy: str) -> StoreError:
    """Return the one sentence about a file that cannot be written."""
    if error.errno in FULL:
        return StoreError(
            f"the disk is full ({path} could not be written): free some space and run the same command again, what is there is kept"
        )
    return StoreError(f"cannot write {path} ({error.strerror or error}): {remedy}")


def read_plain(path: Path, most: int) -> bytes:
    """Read a plain file.

    Parameters
    ----------
    path : Path
        The file; its last part may not be a link.
    most : int
        Bytes; a longer file is refused without reading it.

    Raises
    ------
    OSError
        There is none, it is a link, a folder, a pipe or a device (``EINVAL``), too long (``EFBIG``), or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.EINVAL, "a link, not a plain file", str(path)) from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"more than {most >> 20} MiB", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(descriptor)
