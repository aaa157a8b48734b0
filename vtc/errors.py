"""Every error vtc raises on purpose.

Each message is one sentence that says what is wrong and what to do instead. All errors derive from :class:`VtcError`, and from
the builtin a caller would expect (``ValueError`` for a bad value, ``TypeError`` for a bad argument), so ordinary ``except``
clauses keep working.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no text needs and some terminals obey; tabs and line breaks apart."""


class VtcError(Exception):
    """Base class of all errors raised by vtc."""


class BudgetError(VtcError, ValueError):
    """A token budget that cannot be met: zero, negative, NaN, a share above one, or above the tokens there are."""


class UnknownReducerError(VtcError, LookupError):
    """A reducer name (or preset) that is not registered."""


class UnknownArgumentError(VtcError, TypeError):
    """An option the reducer does not have, or a value it does not accept."""


class DuplicateReducerError(VtcError, ValueError):
    """Two reducers (or presets) registered under one name."""


class UnsupportedModelError(VtcError, TypeError):
    """The model's structure is not one vtc knows how to hook into."""


class UnsupportedSignalError(VtcError, ValueError):
    """A reducer needs a signal (for example CLS attention) that this model does not have."""


class UnsupportedFeatureError(VtcError, ValueError):
    """A run-time feature that cannot work with a reduced sequence; refused before anything runs."""


class InvalidSignalError(VtcError, ValueError):
    """A signal contains NaN or infinite values; the message names the signal and the layer."""


class NotReducedError(VtcError, RuntimeError):
    """A call contained visual tokens and a reducer did not act on them."""


class UnverifiableError(VtcError, RuntimeError):
    """:func:`vtc.verify` cannot make a small copy of a model, or cannot feed it, and so proves nothing about it."""


class PatchError(VtcError, RuntimeError):
    """Patching or un-patching at a moment when it cannot be done cleanly."""


class ConfigError(VtcError, ValueError):
    """A sweep file with an unknown, missing or invalid key."""


class InputFileError(VtcError, OSError):
    """A file or folder of the user's that is missing, cannot be read, or is not what it should be."""


class PromptError(VtcError, ValueError):
    """A question that a model cannot be asked: longer than its context, or with the mark in it that stands for a picture."""


class StoreError(VtcError, RuntimeError):
    """A results store that cannot be read (another schema version, not a store at all), or a file that cannot be written."""


class DamagedCellError(StoreError):
    """A stored cell whose files are not what was written, or cannot be: a sweep moves it aside and measures it again."""


NotReduced = NotReducedError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for close matches of ``name`` in ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def short(text: object, most: int = 120) -> str:
    """Return text for a message: on one line, printable, and no longer than ``most`` characters."""
    plain = UNPRINTABLE.sub("?", " ".join(str(text).split()))
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def shown(value: Any, most: int = 80) -> str:
    """Return a value for a message as Python writes it, at most ``most`` characters of it."""
    try:
        return short(repr(value), most)
    except ValueError:  # the interpreter refuses to print integers of many digits
        return f"a {type(value).__name__} of too many digits"
