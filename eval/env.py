"""Where and with what a result was made."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import vtc
from vtc.core import Reducer

_ENGINE_MODULES = ("vtc.core", "vtc.signals", "vtc.stats")
_ENGINE_PACKAGES = ("vtc.engine", "vtc.families", "vtc.kernels")
_APART = ("builtins", "vtc.registry", "vtc.errors")
"""Modules a reducer's file mentions and no result depends on."""


def describe(seed: int) -> dict[str, Any]:
    """Return the provenance of a run as plain data: commit, machine, versions, seed."""
    return {"commit": commit(), "machine": machine(), "versions": versions(), "seed": seed}


@functools.cache
def commit() -> dict[str, Any]:
    """Return commit and dirty flag of the checkout vtc runs from; both None for an installed package."""
    folder = Path(inspect.getfile(vtc)).resolve().parent
    try:
        if _git(folder, "rev-parse", "--show-prefix").strip() not in ("vtc/", ""):
            return {"id": None, "dirty": None}  # a checkout of something else around a site-packages folder
        return {
            "id": _git(folder, "rev-parse", "HEAD").strip(),
            "dirty": bool(_git(folder, "status", "--porcelain", "..").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return {"id": None, "dirty": None}


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return run.stdout


def machine() -> dict[str, Any]:
    """Return processor, thread counts and GPU."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


@functools.cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return versions of Python and of what the numbers depend on."""
    found = {"python": platform.python_version(), "vtc": vtc.__version__}
    for name in ("torch", "transformers", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


def digest(paths: Iterable[Path]) -> str:
    """Hash of file contents, independent of where they lie: names count, the order does not."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


@functools.cache
def engine_version() -> str:
    """Hash of the code every cell depends on: engine, families, kernels, core types."""
    files = [Path(inspect.getfile(importlib.import_module(m))) for m in _ENGINE_MODULES]
    for package in _ENGINE_PACKAGES:
        folder = Path(inspect.getfile(importlib.import_module(package))).parent
        files += [p for p in folder.rglob("*.py")]
    return digest(files)


def reducer_version(reducer: Reducer | None) -> str:
    """Hash of the source a reducer is made of: its module and the modules of the same package that one uses, engine apart."""
    if reducer is None:
        return "none"
    classes = {type(reducer), *(type(m) for m in getattr(reducer, "members", ()))}
    return _source_version(frozenset(base.__module__ for c in classes for base in c.__mro__))


@functools.lru_cache(maxsize=1024)
def _source_version(modules: frozenset[str]) -> str:
    found: set[str] = set()
    waiting = [m for m in modules if not _of_engine(m)]
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in found or getattr(module, "__file__", None) is None:
            continue
        found.add(name)
        package = name.partition(".")[0]
        used = {getattr(v, "__module__", None) or getattr(v, "__name__", None) for v in vars(module).values()}
        waiting += [m for m in used if isinstance(m, str) and m.partition(".")[0] == package and not _of_engine(m)]
    return digest(Path(sys.modules[m].__file__) for m in found) if found else "unknown"  # type: ignore[arg-type]


def _of_engine(module: str) -> bool:
    """Whether :func:`engine_version` covers a module (or nobody's code depends on it)."""
    packages = (*_ENGINE_PACKAGES, *_APART)
    return module in _ENGINE_MODULES or any(module == p or module.startswith(p + ".") for p in packages)
