"""The tested window: the versions of what vtc stands on with which its suite was green.

``pyproject.toml`` declares the same bounds (a test compares them), ``make newest`` raises both together with the lock in
``requirements/``, ``vtc doctor`` says what lies outside. Pure Python: none of the packages named is imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings

TESTED: dict[str, tuple[str, str]] = {
    "transformers": ("4.57", "5.24"),
    "torch": ("2.6", "2.14"),
    "torchvision": ("0.21", "0.29"),
    "accelerate": ("1.0", "1.15"),
    "timm": ("1.0", "1.0"),
    "lmms-eval": ("0.7", "0.7"),
    "filelock": ("3.20", "4.2"),
}
"""Oldest and newest minor, both inside, of every package whose minors have broken what is built on them.

The suite runs on all of the newest, and on transformers' oldest; the other oldest are what ``pyproject.toml`` asks for.
"""

HELD: dict[str, str] = {
    "filelock": "lmms-eval 0.7 reaches into a private module of filelock, which is not in 4.3",
}
"""Why ``make newest`` leaves a bound where it is although vtc itself works with newer releases."""


def minor(version: str) -> tuple[int, int]:
    """Return major and minor number, of ``"5"``, ``"5.24.0.dev0"`` and ``"2.14.1+cpu"``, too; (0, 0) where there is none."""
    numbers = [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]
    return (*numbers, 0, 0)[:2]  # type: ignore[return-value]


def above(version: str) -> str:
    """Return the minor after that of a version, the bound that still lets it in: ``"5.25"`` for ``"5.24.0"``."""
    major, second = minor(version)
    return f"{major}.{second + 1}"


def requirement(name: str) -> str:
    """Return a package's window as pip reads it: ``transformers>=4.57,<5.25``."""
    oldest, newest = TESTED[name]
    return f"{name}>={oldest},<{above(newest)}"


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def outside(name: str) -> str | None:
    """Say in one sentence that the installed version of a package lies outside its window.

    Parameters
    ----------
    name : str
        A key of :data:`TESTED`.

    Returns
    -------
    str or None
        None for a version inside, and for a package that is not installed.
    """
    version = installed(name)
    oldest, newest = TESTED[name]
    if version is None or minor(oldest) <= minor(version) <= minor(newest):
        return None
    side = "newer" if minor(version) > minor(newest) else "older"
    return (
        f"{name} {version} is {side} than what this vtc was tested with ({oldest} to {newest}): should anything fail, "
        f"pip install '{requirement(name)}'"
    )


@functools.cache
def warn(name: str) -> None:
    """Issue the sentence of :func:`outside` as a UserWarning, if there is one: once per process, at who called our caller."""
    if said := outside(name):
        warnings.warn(said, UserWarning, stacklevel=3)
