"""Errors of the embedded model and its data."""

from __future__ import annotations

from vtc.errors import VtcError


class PocketError(VtcError, ValueError):
    """An unknown embedded model, split, question type or recipe, or a value out of range."""


class MissingPocketDataError(VtcError, ImportError):
    """A package that the pocket data come from is not installed; the message names the extra to install."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} need the package {package}; install it with: pip install 'vtc-reducers[pocket]'")
