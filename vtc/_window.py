"""The versions vtc was tested with: oldest and newest minor of each package, both inside the window."""

from __future__ import annotations

import importlib.metadata
import re

TESTED = {"transformers": ("4.57", "5.24")}


def outside(name: str) -> str | None:
    """Return one sentence if the installed version of a package is outside the window it was tested in, else None."""
    oldest, newest = TESTED[name]
    installed = importlib.metadata.version(name)
    minor = _minor(installed)
    if _minor(oldest) <= minor <= _minor(newest):
        return None
    return f"{name} {installed} is outside the tested window {oldest} to {newest}"


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = (int(p) for p in re.findall(r"\d+", version + ".0"))
    return major, minor
