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
    STORE/quarantine/                 damaged cells, moved out of the way

Files appear by renaming complete temporary ones, so that a process killed at any moment leaves finished cells and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtc.errors import StoreError

SCHEMA = 1
"""Version of the layout above; another one is refused."""

STATUS = "status.json"


def canonical(data: Any) -> str:
    """Return JSON that is the same text for the same data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def cell_id(config: Mapping[str, Any]) -> str:
    """Content address of a cell."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:16]


def write_json(path: Path, data: Any) -> None:
    """Write JSON by renaming a complete temporary file."""
    _replace(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
            found = json.loads(marker.read_text(encoding="utf-8")).get("schema")
        except (ValueError, AttributeError, OSError):
            raise StoreError(f"{marker} is damaged: move {self.root} away and run the sweep again") from None
        if found != SCHEMA:
            raise StoreError(
                f"the results store {self.root} has schema version {found!r}, and this vtc reads version {SCHEMA}: sweep into "
                "another folder with --out, or read it with the vtc that wrote it"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for writing.

        Raises
        ------
        StoreError
            If another process holds it.
        """
        lock = FileLock(str(self.root / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"another sweep is writing to {self.root}: wait for it, or choose another folder with --out"
            ) from None
        try:
            for left in self.cells.glob(".new-*"):  # of a killed run
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            lock.release()

    # ------------------------------------------------------------------------------------------------------- sweep
    def write_sweep(self, data: Mapping[str, Any]) -> None:
        """Record which cells make up the latest sweep."""
        write_json(self.root / "sweep.json", data)

    def read_sweep(self) -> dict[str, Any]:
        """Return what :meth:`write_sweep` wrote."""
        path = self.root / "sweep.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(
                f"the results store {self.root} holds no sweep yet: run `vtc sweep FILE.yaml --out {self.root}`"
            ) from None
        except ValueError:
            raise StoreError(f"{path} is damaged: run the sweep again, finished cells are not repeated") from None

    # ------------------------------------------------------------------------------------------------------- cells
    def put(
        self,
        cell: str,
        config: Mapping[str, Any],
        env: Mapping[str, Any],
        metrics: Mapping[str, Any],
        samples: list[dict[str, Any]],
    ) -> None:
        """Store the accuracy pass of a cell: built aside, then renamed into place."""
        new = self.cells / f".new-{cell}-{os.getpid()}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write_json(new / "config.json", config)
        write_json(new / "env.json", env)
        write_json(new / "metrics.json", metrics)
        _replace(new / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        self._finish(new)
        self._move(new, cell)

    def put_failure(self, cell: str, config: Mapping[str, Any], env: Mapping[str, Any], error: str) -> None:
        """Record that a cell failed; the next sweep tries it again."""
        new = self.cells / f".new-{cell}-{os.getpid()}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write_json(new / "config.json", config)
        write_json(new / "env.json", env)
        self._finish(new, error)
        self._move(new, cell)

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

    def _move(self, new: Path, cell: str) -> None:
        old = self.cells / cell
        if old.exists():
            shutil.rmtree(old)
        new.replace(old)

    def get(self, cell: str) -> CellResult | None:
        """Return a stored cell, or None where there is none or it is incomplete.

        Raises
        ------
        StoreError
            If its files do not match the checksums written with them.
        """
        folder = self.cells / cell
        if not (folder / STATUS).exists():
            if folder.exists():
                raise StoreError(f"the cell {cell} of {self.root} has no status: run the sweep again to redo it")
            return None
        try:
            status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
            files = status["files"]
            # a speed.json newer than the status is one whose pass was cut short: not there yet
            content = {}
            for name, checksum in files.items():
                if _checksum(folder / name) != checksum:
                    if name == "speed.json":
                        continue
                    raise ValueError(f"{name} was changed")
                content[name] = (folder / name).read_text(encoding="utf-8")
            config = json.loads(content["config.json"])
            if cell_id(config) != cell:
                raise ValueError("config.json belongs to another cell")
            if status["state"] == "failed" and "metrics.json" not in content:
                return CellResult(config, json.loads(content["env.json"]), {}, None, [], status["error"] or "unknown error")
            return CellResult(
                config,
                json.loads(content["env.json"]),
                json.loads(content["metrics.json"]),
                json.loads(content["speed.json"]) if "speed.json" in content else None,
                [json.loads(line) for line in content["samples.jsonl"].splitlines()],
                status["error"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"the cell {cell} of {self.root} is damaged ({error}): run the sweep again, it moves the cell aside and redoes it"
            ) from None

    def quarantine(self, cell: str) -> Path:
        """Move a damaged cell out of the way; returns where it went."""
        folder = self.root / "quarantine"
        folder.mkdir(exist_ok=True)
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
