"""What lmms-eval does to file locks, and what we do about it: the one place that knows.

lmms-eval 0.7 wants a lock to be taken twice by one process. At the start of an evaluation it reaches into a private module of
filelock, for which it declares neither a dependency nor a bound, and replaces how lock classes are called, once and for the rest
of the process. Two things follow:

* filelock 4.3 has no such module, and every evaluation ends there in a ModuleNotFoundError, while all imports still work. Our extra
  ``eval`` therefore bounds filelock, and :func:`require_locks` refuses before a model is loaded.
* Our own locks (on the cells of a results store) would no longer exclude anybody in the same process. :func:`own_locks` confines
  the replacement to the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import filelock

from vtc import _window
from vtc.errors import ConfigError

_theirs: Callable[..., Any] | None = None
"""How lmms-eval calls a lock class: it puts this in place once, so it has to be kept for the next evaluation."""


def require_locks() -> None:
    """Make sure that an evaluation can start.

    Raises
    ------
    ConfigError
        The installed filelock is one that lmms-eval does not work with.
    """
    if _window.outside("filelock"):
        raise ConfigError(
            f"lmms-eval cannot run with filelock {_window.installed('filelock')} ({_window.HELD['filelock']}): "
            f"pip install '{_window.requirement('filelock')}'"
        )


@contextmanager
def own_locks() -> Iterator[None]:
    """Let lmms-eval's locks be taken twice inside, and give the process its own back afterwards."""
    global _theirs
    made_by: Any = type(filelock.FileLock)
    before = made_by.__call__
    if _theirs is not None:
        made_by.__call__ = _theirs
    try:
        yield
    finally:
        if made_by.__call__ is not before:
            _theirs, made_by.__call__ = made_by.__call__, before
