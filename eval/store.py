"""The results store: one folder per cell, complete or absent.

::

    STORE/store.json                  what this folder is, with its schema version
    STORE/sweep.json                  the latest sweep: its settings and its cells, in table order
    STORE/cells/ID/config.json        what was run; ID is a hash of it
    STORE/cells/ID/env.json           commit, machine, versions, seed
    STORE/cells/ID/samples.jsonl      one line per question
    STORE/cells/ID/metrics.json       accuracy by type, tokens, FLOPs, KV-cache bytes
    STORE/cells/ID/speed.json         timings, once the speed pass has run
    STORE/cells/ID/status.json        written last, with a checksum of every other file
    STORE/locks/ID.lock               held by the runner that works on the cell
    STORE/quarantine/                 damaged cells, moved out of the way

Files appear by renaming complete temporary ones, so that a process killed at any moment leaves finished cells and nothing else.
Any number of runners may share a store: each claims a cell before it works on it, and the system frees the claims of a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtc import doors
from vtc.errors import StoreError

SCHEMA = 1
"""Version of the layout above; another one is refused."""

STATUS = "status.json"


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
    address = hashlib.sha256(canonical(settings).encode()).hexdigest()[:16]
    return f"{address}-{hashlib.sha256(canonical(code).encode()).hexdigest()[:8]}" if code else address


def write_json(path: Path, data: Any) -> None:
    """Write JSON by renaming a complete temporary file.

    Raises
    ------
    StoreError
        If the disk is full or the file cannot be written; what was there before is still there.
    """
    _replace(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"the disk is full ({path} could not be written): free some space and run the same command again, finished cells "
                "are kept"
            ) from None
        raise StoreError(f"{path} cannot be written ({error.strerror or error}): check the folder and run again") from None


FILE_BYTES = 512 * doors.MIB
"""Largest file of a store that is read."""

ROWS = 500_000
"""Most samples of a cell that are read: twice the questions of the largest benchmark."""


def _checksum(path: Path) -> str:
    return hashlib.sha256(doors.read_bytes(path, FILE_BYTES)).hexdigest()


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


class Store:
    """A folder of results.

    Parameters
    ----------
    root : Path or str
        The folder.
    create : bool
        Make it if it is absent or empty.

    Raises
    ------
    StoreError
        If it is not a store, or one of another schema version.
    """

    def __init__(self, root: Path | str, *, create: bool = False) -> None:
        self.root = Path(root)
        self.cells = self.root / "cells"
        marker = self.root / "store.json"
        if not marker.exists():
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise StoreError(f"{self.root} is not a vtc results store (it has no store.json): name another folder")
            if not create:
                raise StoreError(
                    f"there is no results store at {self.root}: make one with `vtc sweep FILE.yaml --out {self.root}`"
                )
            try:
                self.cells.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"cannot make the results store {self.root}: {error.strerror or error}") from None
            write_json(marker, {"kind": "vtc results store", "schema": SCHEMA})
        try:
            found = json.loads(doors.read_text(marker, doors.MIB)).get("schema")
        except (ValueError, AttributeError, OSError, RecursionError):
            raise StoreError(f"{marker} is damaged: move {self.root} away and run the sweep again") from None
        if found != SCHEMA:
            raise StoreError(
                f"the results store {self.root} has schema version {found!r}, and this vtc reads version {SCHEMA}: sweep into "
                "another folder with --out, or read it with the vtc that wrote it"
            )
        if create and not self.cells.exists():
            self.cells.mkdir()
        if not self.cells.is_dir():
            raise StoreError(f"the results store {self.root} has no folder cells/: run the sweep again, or get the whole store")

    def claim(self, name: str) -> FileLock | None:
        """Claim a cell (or another name) for this runner; release the lock to give it back.

        Returns
        -------
        FileLock or None
            ``None`` where another runner holds it.

        Raises
        ------
        StoreError
            If the folder cannot be written.
        """
        folder = self.root / "locks"
        lock = FileLock(str(folder / f"{name}.lock"))
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise StoreError(
                f"cannot lock {folder / name} ({error.strerror or error}): check the folder and run again"
            ) from None
        return lock

    def sweep_up(self) -> None:
        """Remove what killed runners left half-written."""
        for left in (*self.cells.glob(".new-*"), *self.cells.glob(".old-*")):
            lock = self.claim(left.name[5:])
            if lock is not None:  # nobody is writing it
                shutil.rmtree(left, ignore_errors=True)
                lock.release()

    # ------------------------------------------------------------------------------------------------------- sweep
    def write_sweep(self, data: Mapping[str, Any]) -> None:
        """Record which cells make up the latest sweep."""
        write_json(self.root / "sweep.json", data)

    def read_sweep(self) -> dict[str, Any]:
        """Return what :meth:`write_sweep` wrote."""
        path = self.root / "sweep.json"
        try:
            return json.loads(doors.read_text(path, FILE_BYTES))
        except FileNotFoundError:
            raise StoreError(
                f"the results store {self.root} holds no sweep yet: run `vtc sweep FILE.yaml --out {self.root}`"
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            reason = doors.short(error)
            raise StoreError(f"{path} is damaged ({reason}): run the sweep again, finished cells are not repeated") from None

    # ------------------------------------------------------------------------------------------------------- cells
    def put(
        self,
        cell: str,
        config: Mapping[str, Any],
        env: Mapping[str, Any],
        metrics: Mapping[str, Any],
        samples: list[dict[str, Any]],
    ) -> None:
        """Store the accuracy pass of a cell the caller has claimed: built aside, then renamed into place."""
        lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
        self._put(cell, {"config.json": config, "env.json": env, "metrics.json": metrics, "samples.jsonl": lines})

    def put_failure(self, cell: str, config: Mapping[str, Any], env: Mapping[str, Any], error: str) -> None:
        """Record that a cell failed; the next sweep tries it again."""
        self._put(cell, {"config.json": config, "env.json": env}, error)

    def _put(self, cell: str, files: Mapping[str, Any], error: str = "") -> None:
        new = self.cells / f".new-{cell}"
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            for name, content in files.items():
                if isinstance(content, str):
                    _replace(new / name, content)
                else:
                    write_json(new / name, content)
            self._finish(new, error)
            place, old = self.cells / cell, self.cells / f".old-{cell}"
            if place.exists():  # aside first: a reader finds the old cell, none, or the new one
                place.replace(old)
            new.replace(place)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException as problem:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(problem, OSError):
                raise StoreError(f"{new} cannot be written ({problem.strerror or problem}): free space and run again") from None
            raise

    def put_speed(self, cell: str, speed: Mapping[str, Any], error: str = "") -> None:
        """Add the speed pass to a stored cell; with ``error``, record that it failed."""
        folder = self.cells / cell
        if error:
            (folder / "speed.json").unlink(missing_ok=True)
        else:
            write_json(folder / "speed.json", speed)
        self._finish(folder, error)

    def _finish(self, folder: Path, error: str = "") -> None:
        files = {p.name: _checksum(p) for p in sorted(folder.iterdir()) if p.name != STATUS and not p.name.startswith(".")}
        write_json(folder / STATUS, {"schema": SCHEMA, "state": "failed" if error else "done", "error": error, "files": files})

    def addresses(self) -> dict[str, list[str]]:
        """Return the ids of all stored cells by their settings: more than one were measured with different code."""
        found: dict[str, list[str]] = {}
        for name in sorted(os.listdir(self.cells)):
            if not name.startswith("."):
                found.setdefault(name.partition("-")[0], []).append(name)
        return found

    def get(self, cell: str, *, samples: bool = True) -> CellResult | None:
        """Return a stored cell, or None where there is none or it is incomplete.

        Parameters
        ----------
        cell : str
            Its address.
        samples : bool
            Parse the samples (they are checked in any case).

        Raises
        ------
        StoreError
            If its files do not match the checksums written with them, or an earlier vtc wrote them.
        """
        folder = self.cells / cell
        if not (folder / STATUS).exists():
            if folder.exists():
                raise StoreError(f"the cell {cell} of {self.root} has no status: run the sweep again to redo it")
            return None
        try:
            status = json.loads(doors.read_text(folder / STATUS, doors.MIB))
            files = status["files"]
            # a speed.json newer than the status is one whose pass was cut short: not there yet
            content = {}
            for name, checksum in files.items():
                if _checksum(folder / name) != checksum:
                    if name == "speed.json":
                        continue
                    raise ValueError(f"{name} was changed")
                if name != "samples.jsonl" or samples:
                    content[name] = doors.read_text(folder / name, FILE_BYTES)
            if content.get("samples.jsonl", "").count("\n") > ROWS:
                raise ValueError(f"it has more than {ROWS:,} samples")
            config = json.loads(content["config.json"])
            if cell_id(config) != cell:
                if "engine" in config and "-" not in cell:  # ids had no part for the code at first
                    raise StoreError(
                        f"the cells of {self.root} were written by an earlier vtc, which addressed them otherwise: run the sweep "
                        "again, it measures them anew and leaves the old ones where they are"
                    )
                raise ValueError("config.json belongs to another cell")
            if status["state"] == "failed" and "metrics.json" not in content:
                return CellResult(config, json.loads(content["env.json"]), {}, None, [], status["error"] or "unknown error")
            return CellResult(
                config,
                json.loads(content["env.json"]),
                json.loads(content["metrics.json"]),
                json.loads(content["speed.json"]) if "speed.json" in content else None,
                [json.loads(line) for line in content["samples.jsonl"].split("\n") if line] if samples else [],
                status["error"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not (folder / STATUS).exists() and not folder.exists():
                return None  # another runner is putting it anew
            raise StoreError(
                f"the cell {cell} of {self.root} is damaged ({error}): run the sweep again, it moves the cell aside and redoes it"
            ) from None

    def quarantine(self, cell: str) -> Path:
        """Move a damaged cell out of the way; returns where it went."""
        folder = self.root / "quarantine"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be made ({error.strerror or error}): move what is there away") from None
        number = 0
        while (target := folder / f"{cell}-{number}").exists():
            number += 1
        (self.cells / cell).replace(target)
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
