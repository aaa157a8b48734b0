"""Digests of model folders: every byte that ``from_pretrained`` may read is part of a result's address.

Weights are hashed whole. Reading gigabytes takes seconds, so the digest of a large file is remembered, in this process and for the
user's next one, under what the system changes whenever the file does: host, device, inode, size, time of the last change of its
bytes and time of the last change of its entry (which no program sets). A file younger than the clock's resolution is hashed again.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from vtc.errors import ConfigError
from vtc.files import read_plain, write_whole

LARGE = 32 * 2**20
"""Files from this size on are remembered for later processes."""

_NEVER_READ = (
    *("*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", "*.ipynb"),  # about the model
    *("optimizer*", "scheduler*.pt", "scaler*.pt", "rng_state*", "trainer_state.json", "training_args.bin"),  # of its training
    "events.out.tfevents*",
)
"""Names of files that no ``from_pretrained`` opens; everything else counts, in sub-folders too."""

_FILES = 10_000
"""Most files of one model."""

_FRESH = 2 * 10**9
"""Nanoseconds within which a file may change again without its times showing it."""

_MOST = 4096
"""Digests kept for later processes."""

_known: dict[str, str] = {}


def folder_digest(folder: Path, leave: Iterable[str] = ()) -> str:
    """Hash everything in a model's folder that decides what the model answers.

    That is every file but pictures, notes and states of a training, also in sub-folders that are not models themselves (processors
    keep tokenizers and chat templates there), and the folder of the base model where an adapter names one.

    Parameters
    ----------
    folder : Path
        With a ``config.json``.
    leave : iterable of str
        Further patterns of names that do not count.

    Returns
    -------
    str
        32 hexadecimal digits: names and bytes count, the place of the folder does not.

    Raises
    ------
    ConfigError
        A file that cannot be read, or changes meanwhile.
    """
    total = hashlib.sha256()
    for name, path in _files(folder, (*_NEVER_READ, *leave)):
        total.update(f"{name}\0{file_digest(path)}\0".encode())
    base = _adapted(folder)
    if base is not None:
        total.update(f"base\0{folder_digest(base, leave)}\0".encode())
    return total.hexdigest()[:32]


def _files(top: Path, unread: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Files that count, by their names below ``top``."""
    found: list[tuple[str, Path]] = []
    waiting, seen = [top], {top.resolve()}
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise ConfigError(f"the model's folder {folder} cannot be read ({error.strerror or error}): check it") from None
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in unread):
                continue
            if entry.is_dir():
                # one with a config.json is a model of its own, such as a checkpoint of the training
                if not (path / "config.json").exists() and (real := path.resolve()) not in seen:
                    seen.add(real)
                    waiting.append(path)
            elif entry.is_file():  # links into the hub's cache are followed; pipes and dangling links are nothing to read
                found.append((path.relative_to(top).as_posix(), path))
        if len(found) > _FILES:
            raise ConfigError(f"the folder {top} holds more than {_FILES} files: give a folder that holds the model alone")
    return sorted(found)


def _adapted(folder: Path) -> Path | None:
    """Folder of the base model that an adapter in this one is for."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = Path(named).expanduser()
        other = base.is_dir() and base.resolve() != folder.resolve() and not (base / "adapter_config.json").exists()
        return base if other else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, from memory where the file is unchanged since it was taken.

    Raises
    ------
    ConfigError
        It cannot be read, or changes while it is read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            key = _key(before)
            if found := _recall(key, before):
                return found
            total = hashlib.sha256()
            while chunk := file.read(4 * 2**20):
                total.update(chunk)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ConfigError(f"the model's file {path} cannot be read ({error.strerror or error}): check it") from None
    if _key(after) != key:
        raise ConfigError(f"the model's file {path} changed while it was read: wait until it is written, and run again")
    if settled(after):
        _remember(key, total.hexdigest(), after)
    return total.hexdigest()


def settled(found: os.stat_result) -> bool:
    """Whether a file has been unchanged for long enough that its times would show the next change."""
    return time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _FRESH


def _key(found: os.stat_result) -> str:
    parts = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return ":".join((platform.node(), *map(str, parts)))


def _store() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vtc" / "digests.json"


def _stored() -> dict[str, str]:
    try:
        found = json.loads(read_plain(_store(), 4 * 2**20))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and len(v) == 64}


def _recall(key: str, found: os.stat_result) -> str | None:
    if key not in _known and found.st_size >= LARGE and stat.S_ISREG(found.st_mode):
        _known.update(_stored())
    return _known.get(key)


def _remember(key: str, digest: str, found: os.stat_result) -> None:
    _known[key] = digest
    if found.st_size >= LARGE:
        with contextlib.suppress(OSError):  # without a cache it takes longer
            kept = {**_stored(), key: digest}
            write_whole(_store(), json.dumps(dict(list(kept.items())[-_MOST:]), indent=0))
