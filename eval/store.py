"""The results store: one folder per cell, complete or absent.

::

    STORE/store.json                  what this folder is, with its schema version
    STORE/sweep.json                  the latest sweep: its settings and its cells, in table order
    STORE/sweeps/ID.json              the same for every sweep that used this store; ID is a hash of settings and cells
    STORE/cells/ID/config.json        what was run; ID is a hash of it
    STORE/cells/ID/env.json           commit, machine, versions, seed
    STORE/cells/ID/samples.jsonl      one line per question
    STORE/cells/ID/metrics.json       accuracy by type, tokens, FLOPs, KV-cache bytes
    STORE/cells/ID/speed.json         timings, once the speed pass has run
    STORE/cells/ID/status.json        written last, with a checksum of every other file
    STORE/locks/NAME.lock             held by the runner that works on a cell, or by one that is alive
    STORE/locks/NAME.json             which host and process that is, and since when
    STORE/quarantine/                 damaged cells, moved out of the way

Files appear by renaming complete temporary ones (:mod:`vtc.files`), so that a process killed at any moment leaves finished cells
and nothing else. Any number of runners may share a store: each claims a cell before it works on it, and the system frees the claims
of a dead one. Only files of these names are read, none through a link, and only if what they hold can be what a sweep wrote
(:mod:`vtc.eval.contents`): a store may be somebody else's.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from vtc import doors
from vtc.errors import DamagedCellError, StoreError, shown
from vtc.eval.contents import (
    ADDRESS,
    SCHEMA,
    ContentError,
    check_cell,
    check_speed,
    check_status,
    check_sweep,
    parse,
    parse_lines,
)
from vtc.files import PART, create, read_plain, save, sync_folder, unwritable, write_whole

STATUS = "status.json"
FILES = ("config.json", "env.json", "metrics.json", "samples.jsonl", "speed.json")
"""What a cell may consist of, besides its status."""

FILE_BYTES = 512 * doors.MIB
"""Largest file of a store that is read."""

_STALE = 3600
"""Seconds after which a file that never became whole belongs to a dead process."""

_LONGEST = 64
"""Characters of a name that is claimed: addresses have 25."""

_REMEDY = "check the folder and run again"

P = ParamSpec("P")
T = TypeVar("T")


def canonical(data: Any) -> str:
    """Return JSON that is the same text for the same data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def cell_id(config: Mapping[str, Any]) -> str:
    """Content address of a cell: ``SETTINGS-CODE``, hashes of what was asked for and of the code that did it.

    Cells that differ in their code only share the first part, so that they are never taken for one another and easy to find.
    """
    settings, code = dict(config), {}
    if "engine" in settings:
        code["engine"] = settings.pop("engine")
        if isinstance(settings.get("reducer"), Mapping):
            settings["reducer"] = {k: v for k, v in settings["reducer"].items() if k != "code"}
            code["reducer"] = config["reducer"].get("code")

    def digest(part: Mapping[str, Any], length: int) -> str:
        return hashlib.sha256(canonical(part).encode(errors="surrogatepass")).hexdigest()[:length]

    return f"{digest(settings, 16)}-{digest(code, 8)}" if code else digest(settings, 16)


def sweep_id(record: Mapping[str, Any]) -> str:
    """Return the name of a sweep in its store: all runners and shards of one sweep share it."""
    cells = [c.get("id") if isinstance(c, Mapping) else None for c in record.get("cells") or ()]
    return hashlib.sha256(canonical({"config": record.get("config"), "cells": cells}).encode()).hexdigest()[:12]


def as_json(data: Any, indent: int | None = 2) -> bytes:
    """Return what a JSON file of a store holds.

    Raises
    ------
    ContentError
        A number that is NaN or infinite.
    """
    try:
        text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ContentError(str(error)) from None
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character, as in the name of a file that is not UTF-8
        return (json.dumps(data, indent=indent) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    """Write JSON by renaming a complete temporary file.

    Raises
    ------
    StoreError
        If the disk is full or the file cannot be written; what was there before is still there.
    """
    try:
        save(path, as_json(data), _REMEDY)
    except ContentError as error:
        raise StoreError(f"{path} cannot be written ({error}): report this") from None


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _status(files: Mapping[str, str], error: str) -> bytes:
    state = "failed" if error else "done"
    return as_json({"schema": SCHEMA, "state": state, "error": error, "files": dict(sorted(files.items()))})


def _remove(folder: Path) -> None:
    """Remove a folder, or a link that lies in its place, as far as that goes."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(folder.lstat().st_mode):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink()


def _told(method: Callable[P, T]) -> Callable[P, T]:
    """Let a store's method end with one sentence where the system refuses what it is asked for."""

    @functools.wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except OSError as error:
            root = args[0].root  # type: ignore[attr-defined]
            raise StoreError(f"the results store {root} cannot be used ({error.strerror or error}): {_REMEDY}") from None

    return told


@dataclass(frozen=True)
class CellResult:
    """What is stored of one cell.

    Attributes
    ----------
    config, env, metrics : dict
        Contents of the files.
    speed : dict or None
        ``None`` before the speed pass.
    samples : list of dict
        One entry per question.
    error : str
        Why the cell failed, ``""`` where it did not.
    """

    config: dict[str, Any]
    env: dict[str, Any]
    metrics: dict[str, Any]
    speed: dict[str, Any] | None
    samples: list[dict[str, Any]]
    error: str = ""


@dataclass(frozen=True)
class Holder:
    """Who holds a claim.

    Attributes
    ----------
    host, since : str
        Machine, and when the claim was made (UTC, ISO 8601).
    process : int
        Its number on that machine.
    sweep, source : str
        Name of its sweep in the store and of its file, where it is a runner's.
    """

    host: str
    process: int
    since: str
    sweep: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since[11:19]} UTC on {self.since[:10]})"


class Claim:
    """A claim on a name in a store, with a note that says whose it is; the system frees it if this process dies."""

    def __init__(self, lock: FileLock, note: Path, once: bool = False) -> None:
        self.lock, self.note, self.once = lock, note, once

    def release(self) -> None:
        """Give the claim back."""
        with contextlib.suppress(OSError):  # a note without a lock says nothing
            self.note.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if self.once:  # nobody will claim this name again
                Path(self.lock.lock_file).unlink()
        with contextlib.suppress(OSError):  # the system frees it with the process, at the latest
            self.lock.release()


class Store:
    """A folder of results.

    Parameters
    ----------
    root : Path or str
        The folder.
    create : bool
        Make it if it is absent or empty.

    Attributes
    ----------
    sweep : str or None
        The sweep that :meth:`read_sweep` returns, see :meth:`at`; the latest when None.

    Raises
    ------
    StoreError
        If it is not a store, or one of another schema version.
    """

    @_told
    def __init__(self, root: Path | str, *, create: bool = False) -> None:
        self.root = Path(root)
        self.cells = self.root / "cells"
        self.sweep: str | None = None
        marker = self.root / "store.json"
        if not os.path.lexists(marker):
            self._refuse_foreign()
            if not create:
                raise StoreError(
                    f"there is no results store at {self.root}: make one with `vtc sweep FILE.yaml --out {self.root}`"
                )
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                write_whole(marker, as_json({"kind": "vtc results store", "schema": SCHEMA}))
            except OSError as error:
                raise StoreError(f"cannot make the results store {self.root}: {error.strerror or error}") from None
        try:
            found = parse(read_plain(marker, FILE_BYTES)).get("schema")
        except (ContentError, AttributeError, OSError):
            raise StoreError(f"{marker} is damaged: move {self.root} away and run the sweep again") from None
        if found != SCHEMA:
            raise StoreError(
                f"the results store {self.root} has schema version {shown(found)}, and this vtc reads version {SCHEMA}: sweep into "
                "another folder with --out, or read it with the vtc that wrote it"
            )
        if create or os.path.lexists(self.cells):
            self._part("cells", create)

    def _refuse_foreign(self) -> None:
        """Refuse a folder that holds something, but for what the making of a store may have left."""
        there = [p.name for p in self.root.iterdir()] if self.root.is_dir() else [""] if os.path.lexists(self.root) else []
        if any(name not in ("cells", "locks") and not PART.fullmatch(name) for name in there):
            raise StoreError(f"{self.root} is not a vtc results store (it has no store.json): name another folder")

    def _part(self, name: str, create: bool = True) -> Path:
        """Return one of the store's own folders, and make sure that it is one: a link would lead elsewhere."""
        folder = self.root / name
        try:
            if create:
                folder.mkdir(exist_ok=True)
            kind = folder.lstat().st_mode
        except FileExistsError:
            kind = 0
        except OSError as error:
            raise unwritable(folder, error, _REMEDY) from None
        if not stat.S_ISDIR(kind):
            raise StoreError(f"{folder} is not a folder of this store: move it away and run the sweep again")
        return folder

    def at(self, sweep: str) -> Store:
        """Return this store with another sweep's record in the place of the latest.

        Parameters
        ----------
        sweep : str
            Its name, or the beginning of one, see :meth:`sweeps`.

        Raises
        ------
        StoreError
            If there is none, or several.
        """
        names = self.sweeps()
        found = [n for n in names if n.startswith(sweep)] if sweep else []
        if len(found) != 1:
            there = ", ".join(names) or "none"
            raise StoreError(
                f"the results store {self.root} has {'several sweeps' if found else 'no sweep'} '{sweep}' (sweeps: {there}): "
                "name one of these"
            )
        store = Store(self.root)
        store.sweep = found[0]
        return store

    # ------------------------------------------------------------------------------------------------------- claims
    @_told
    def claim(self, name: str, **more: str) -> Claim | None:
        """Claim a cell (or another name) for this runner; release the claim to give it back.

        Parameters
        ----------
        name : str
            What for.
        **more : str
            Further fields of the note, see :class:`Holder`.

        Returns
        -------
        Claim or None
            ``None`` where another runner holds it.

        Raises
        ------
        StoreError
            If the folder cannot be written.
        """
        folder = self._part("locks")
        lock = FileLock(str(folder / f"{name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise StoreError(f"cannot lock {folder / name} ({error.strerror or error}): {_REMEDY}") from None
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        claim = Claim(lock, folder / f"{name}.json")
        try:
            note = {"host": platform.node() or "this machine", "process": os.getpid(), "since": now, **more}
            write_whole(claim.note, as_json(note), durable=False)
        except OSError as error:
            claim.release()
            raise unwritable(claim.note, error, _REMEDY) from None
        except BaseException:
            claim.release()
            raise
        return claim

    def holder(self, name: str) -> Holder | None:
        """Return who holds a claim, as far as its note says."""
        try:
            note = parse(read_plain(self.root / "locks" / f"{name}.json", 2**16))
            text = {k: str(note.get(k, ""))[:200] for k in ("host", "since", "sweep", "source")}
            return Holder(process=int(note["process"]), **text)
        except (OSError, ContentError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def announce(self, sweep: str, source: str) -> Claim:
        """Say that a runner is at work here, until the claim is released."""
        claim = None
        while claim is None:  # somebody may look at the new lock just when it is made
            claim = self.claim(f"runner-{secrets.token_hex(8)}", sweep=sweep, source=source)
        claim.once = True
        return claim

    @_told
    def runners(self, mine: Claim | None = None) -> list[Holder]:
        """Return the runners at work here, but for the one that announced itself with ``mine``; what dead ones left is removed."""
        found = []
        for path in sorted((self.root / "locks").glob("runner-*.lock")):
            if mine is not None and path == Path(mine.lock.lock_file):
                continue
            lock = FileLock(str(path))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if (holder := self.holder(path.stem)) is not None:
                    found.append(holder)
                continue
            except OSError:
                continue
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE:  # one that is just starting has the file before the lock
                    path.unlink()
                    path.with_suffix(".json").unlink(missing_ok=True)
            lock.release()
        return found

    @_told
    def sweep_up(self) -> None:
        """Put away what killed runners left half-written; a cell that was whole, but not in its place, is put there."""
        for left in sorted((*self.cells.glob(".new-*"), *self.cells.glob(".old-*"))):  # the new one first
            cell = left.name[5:].partition(".")[0]
            if len(cell) > _LONGEST:
                continue  # nothing of ours
            claim = self.claim(cell)
            if claim is None:  # somebody is writing it
                continue
            try:
                if re.fullmatch(ADDRESS, cell) and not os.path.lexists(self.cells / cell):
                    with contextlib.suppress(StoreError, OSError):
                        self._read(left, cell, samples=False)
                        left.replace(self.cells / cell)
                _remove(left)
            finally:
                claim.release()
        for folder in (self.root, self.root / "locks", self.root / "sweeps"):
            for part in folder.glob(".*.part"):
                with contextlib.suppress(OSError):
                    if PART.fullmatch(part.name) and time.time() - part.lstat().st_mtime > _STALE:
                        part.unlink()

    # ------------------------------------------------------------------------------------------------------- sweeps
    @_told
    def write_sweep(self, data: Mapping[str, Any]) -> str:
        """Record which cells make up a sweep, which is the latest then.

        Returns
        -------
        str
            The sweep's name in this store, for :meth:`at`.
        """
        name, folder = sweep_id(data), self._part("sweeps")
        with contextlib.suppress(StoreError):  # one that an earlier vtc recorded has no file of its own
            earlier = self._record(self.root / "sweep.json")
            if not os.path.lexists(folder / f"{sweep_id(earlier)}.json"):
                write_json(folder / f"{sweep_id(earlier)}.json", earlier)
        write_json(folder / f"{name}.json", data)
        write_json(self.root / "sweep.json", data)
        return name

    @_told
    def read_sweep(self) -> dict[str, Any]:
        """Return the record of the latest sweep, or of the one chosen by :meth:`at`.

        Raises
        ------
        StoreError
            There is none, it is damaged, or a later vtc wrote it.
        """
        name = "sweep.json" if self.sweep is None else f"sweeps/{self.sweep}.json"
        found = self._record(self.root / name)
        if not os.path.lexists(self.cells):
            raise StoreError(f"the results store {self.root} has no folder cells/: run the sweep again, or get the whole store")
        return found

    def is_latest(self) -> bool:
        """Whether the record that :meth:`read_sweep` returns is that of the store's latest sweep."""
        if self.sweep is None:
            return True
        try:
            return sweep_id(self._record(self.root / "sweep.json")) == self.sweep
        except StoreError:
            return False

    def _record(self, path: Path) -> dict[str, Any]:
        try:
            found = parse(read_plain(path, FILE_BYTES))
            check_sweep(found)
            return found
        except FileNotFoundError:
            raise StoreError(
                f"the results store {self.root} holds no sweep yet: run `vtc sweep FILE.yaml --out {self.root}`"
            ) from None
        except ContentError as error:
            why = doors.short(error, 500)
            raise StoreError(f"{path} is damaged ({why}): run the sweep again, finished cells are not repeated") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror or error}): run the sweep again") from None

    def written(self, sweep: str) -> int:
        """Return when a sweep was last recorded, in nanoseconds of this file system's clock; 0 where that is not known."""
        try:
            return (self.root / "sweeps" / f"{sweep}.json").lstat().st_mtime_ns
        except OSError:
            return 0

    @_told
    def sweeps(self) -> dict[str, tuple[str, int]]:
        """Return name, source and time of writing (nanoseconds) of the sweeps in this store, the latest last."""
        found = {}
        for path in (self.root / "sweeps").glob("*.json"):
            with contextlib.suppress(StoreError, OSError):
                if re.fullmatch("[0-9a-f]{12}", path.stem):
                    found[path.stem] = (self._record(path).get("source") or "", self.written(path.stem))
        return dict(sorted(found.items(), key=lambda item: item[1][1]))

    # ------------------------------------------------------------------------------------------------------- cells
    @_told
    def put(
        self,
        cell: str,
        config: Mapping[str, Any],
        env: Mapping[str, Any],
        metrics: Mapping[str, Any],
        samples: list[dict[str, Any]],
    ) -> None:
        """Store the accuracy pass of a cell the caller has claimed: built aside, then renamed into place.

        Raises
        ------
        DamagedCellError
            What is to be stored cannot be a result: a number is not finite, or the metrics do not follow from the samples.
        StoreError
            It cannot be written; what was there before is still there.
        """
        try:
            files = {
                "config.json": as_json(config),
                "env.json": as_json(env),
                "metrics.json": as_json({"cell": cell, **metrics}),
                "samples.jsonl": b"".join(as_json(s, None) for s in samples),
            }
            self._understand(cell, files)
        except ContentError as error:
            raise DamagedCellError(f"the results of the cell {cell} cannot be stored ({error}): report this") from None
        self._put(cell, files)

    @_told
    def put_failure(self, cell: str, config: Mapping[str, Any], env: Mapping[str, Any], error: str) -> None:
        """Record that a cell failed; the next sweep tries it again."""
        self._put(cell, {"config.json": as_json(config), "env.json": as_json(env)}, error)

    def _put(self, cell: str, files: Mapping[str, bytes], error: str = "") -> None:
        token = secrets.token_hex(4)
        new, old = self.cells / f".new-{cell}.{token}", self.cells / f".old-{cell}.{token}"
        place = self.cells / cell
        try:
            new.mkdir()
            for name, content in files.items():
                create(new / name, content)
            create(new / STATUS, _status({name: _sum(content) for name, content in files.items()}, error))
            sync_folder(new)
            if os.path.lexists(place):  # aside first: a reader finds the old cell, none, or the new one
                place.replace(old)
            try:
                new.replace(place)
            except OSError:
                with contextlib.suppress(OSError):
                    old.replace(place)
                raise
            sync_folder(self.cells)
        except OSError as problem:
            _remove(new)
            raise unwritable(place, problem, "free space and run again") from None
        except BaseException:
            _remove(new)
            raise
        _remove(old)

    @_told
    def put_speed(self, cell: str, speed: Mapping[str, Any], error: str = "") -> None:
        """Add the speed pass to a stored cell the caller has claimed; with ``error``, record that it failed.

        Raises
        ------
        DamagedCellError
            See :meth:`put`.
        StoreError
            It cannot be written; the answers stay as they were.
        """
        folder = self.cells / cell
        try:
            check_speed(speed) if not error else None
            content = as_json({"cell": cell, **speed})
            files = dict(check_status(parse(read_plain(folder / STATUS, FILE_BYTES)))["files"])
        except ContentError as problem:
            raise DamagedCellError(f"the timings of the cell {cell} cannot be stored ({problem}): report this") from None
        except OSError as problem:
            raise StoreError(
                f"the cell {cell} of {self.root} cannot be read ({problem.strerror}): run the sweep again"
            ) from None
        try:
            for part in folder.glob(".*.part"):  # of a process that was killed here
                part.unlink()
            files.pop("speed.json", None)
            if error:
                (folder / "speed.json").unlink(missing_ok=True)
            else:
                write_whole(folder / "speed.json", content)
                files["speed.json"] = _sum(content)
            write_whole(folder / STATUS, _status(files, error))
        except OSError as problem:
            raise unwritable(folder / "speed.json", problem, _REMEDY) from None

    def addresses(self) -> dict[str, list[str]]:
        """Return the ids of all stored cells by their settings: more than one were measured with different code."""
        found: dict[str, list[str]] = {}
        for name in self.stored():
            found.setdefault(name.partition("-")[0], []).append(name)
        return found

    @_told
    def stored(self) -> list[str]:
        """Return the ids of all cells here, whole or damaged."""
        try:
            return sorted(name for name in os.listdir(self.cells) if re.fullmatch(ADDRESS, name))
        except FileNotFoundError:
            return []

    def config(self, cell: str) -> dict[str, Any]:
        """Return what a cell's ``config.json`` says, unchecked; empty where it cannot be read."""
        try:
            found = parse(read_plain(self.cells / cell / "config.json", FILE_BYTES))
        except (OSError, ContentError):
            return {}
        return found if isinstance(found, dict) else {}

    @_told
    def get(self, cell: str, *, samples: bool = True) -> CellResult | None:
        """Return a stored cell, or None where there is none or it is incomplete.

        Parameters
        ----------
        cell : str
            Its address.
        samples : bool
            Return the samples (they are checked in any case).

        Raises
        ------
        DamagedCellError
            If its files do not match the checksums written with them, or cannot be what a sweep wrote.
        StoreError
            If it cannot be read, or an earlier vtc wrote it.
        """
        if not re.fullmatch(ADDRESS, cell):
            raise StoreError(f"{cell!r} is not the address of a cell: run the sweep again")
        return self._read(self.cells / cell, cell, samples)

    def _read(self, folder: Path, cell: str, samples: bool) -> CellResult | None:
        try:
            first = self._status_of(folder)
            try:
                found = None if first is None else self._checked(folder, cell, first)
            except (ContentError, FileNotFoundError):
                again = self._status_of(folder)
                if again == first:
                    raise
                found = None if again is None else self._checked(folder, cell, again)  # somebody had just put it anew
            if found is None or samples:
                return found
            return CellResult(found.config, found.env, found.metrics, found.speed, [], found.error)
        except (ContentError, FileNotFoundError) as error:
            if not os.path.lexists(folder):
                return None  # another runner is putting it anew
            raise self._damaged(cell, str(error)) from None
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EFBIG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
                raise self._damaged(cell, str(error.strerror)) from None
            raise StoreError(
                f"the cell {cell} of {self.root} cannot be read ({error.strerror or error}): {_REMEDY}, or move {folder} away"
            ) from None

    def _status_of(self, folder: Path) -> bytes | None:
        """Contents of a cell's status; None where there is no cell."""
        try:
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise ContentError("it is a link, or no folder")
        except FileNotFoundError:
            return None
        try:
            return read_plain(folder / STATUS, FILE_BYTES)
        except FileNotFoundError:
            if os.path.lexists(folder):
                raise ContentError("it has no status") from None
            return None

    def _checked(self, folder: Path, cell: str, text: bytes) -> CellResult:
        """Read the files that a status names, and check them."""
        status = check_status(parse(text))
        content = {}
        for name, checksum in status["files"].items():
            if name not in FILES:
                raise ContentError(f"no cell has a file {shown(name)}")
            data = read_plain(folder / name, FILE_BYTES)
            if _sum(data) == checksum:
                content[name] = data
            elif name != "speed.json":  # one newer than the status is of a pass that was cut short: not there yet
                raise ContentError(f"{name} was changed")
        return self._understand(cell, content, status)

    def _damaged(self, cell: str, why: str) -> DamagedCellError:
        return DamagedCellError(
            f"the cell {cell} of {self.root} is damaged ({doors.short(why, 500)}): run the sweep again, it moves the cell "
            "aside and redoes it"
        )

    def _understand(self, cell: str, content: Mapping[str, bytes], status: Mapping[str, Any] | None = None) -> CellResult:
        """Parse a cell's files and check that they belong together."""
        failed = status is not None and status["state"] == "failed" and "metrics.json" not in content
        needed = FILES[:2] if failed else FILES[:4]
        if missing := [name for name in needed if name not in content]:
            raise ContentError(f"{missing[0]} is missing")
        data = {n: parse_lines(text) if n == "samples.jsonl" else parse(text) for n, text in content.items()}
        config, metrics, speed = data["config.json"], data.get("metrics.json"), data.get("speed.json")
        for name, part in (("metrics.json", metrics), ("speed.json", speed)):
            if isinstance(part, dict) and part.pop("cell", cell) != cell:
                raise ContentError(f"{name} belongs to another cell")
        check_cell(config, data["env.json"], None if failed else metrics, data.get("samples.jsonl"), speed)
        if cell_id(config) != cell:
            if "engine" in config and "-" not in cell:  # ids had no part for the code at first
                raise StoreError(
                    f"the cells of {self.root} were written by an earlier vtc, which addressed them otherwise: run the sweep "
                    "again, it measures them anew and leaves the old ones where they are"
                )
            raise ContentError("config.json belongs to another cell")
        error = "" if status is None else status["error"]
        if failed:
            return CellResult(config, data["env.json"], {}, None, [], error or "unknown error")
        return CellResult(config, data["env.json"], metrics, speed, data["samples.jsonl"], error)

    @_told
    def quarantine(self, cell: str) -> Path:
        """Move a damaged cell out of the way; returns where it went.

        Raises
        ------
        StoreError
            If it cannot be moved.
        """
        folder = self._part("quarantine")
        number = 0
        while os.path.lexists(target := folder / f"{cell}-{number}"):
            number += 1
        try:
            (self.cells / cell).replace(target)
        except OSError as error:
            raise unwritable(target, error, _REMEDY) from None
        return target


def latest_store(folder: Path) -> Path:
    """Return the store below ``folder`` (or that folder itself) whose sweep is the most recent.

    Raises
    ------
    StoreError
        If there is none.
    """
    found = [p.parent for p in (*folder.glob("sweep.json"), *folder.glob("*/sweep.json"))]
    if not found:
        raise StoreError(f"there is no results store in {folder}: run `vtc sweep configs/demo.yaml` first, or name a store")
    return max(found, key=lambda p: ((p / "sweep.json").stat().st_mtime_ns, p.name))
