"""What every patch has: a handle that knows its model, undoes itself, and survives copying."""

from __future__ import annotations

import abc
import copy
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vtc import saved
from vtc.core import Reducer
from vtc.engine.undo import Undo
from vtc.errors import PatchError
from vtc.stats import StatsLog

ATTRIBUTE = "_vtc_handle"


class BaseHandle(abc.ABC):
    """One patch on one model; also a context manager that removes it on exit.

    Attributes
    ----------
    reducer : Reducer
        The reducer in force, resolved for this model.
    family : object
        What vtc knows about the model.
    stats : StatsLog
        What every call did.
    strict : bool
        Whether a reducer that did not act raises :class:`vtc.errors.NotReducedError`.
    """

    def __init__(self, model: nn.Module, family: Any, reducer: Reducer, strict: bool) -> None:
        self._model = weakref.ref(model)
        self.family, self.reducer, self.strict = family, reducer, strict
        self.stats = StatsLog()
        self._undo = Undo()
        self._lock = threading.Lock()
        self._running = 0

    @abc.abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Put the hooks on; all through ``_undo``."""

    def install(self, model: nn.Module) -> None:
        """Put everything on the model, or nothing."""
        try:
            object.__setattr__(model, ATTRIBUTE, self)  # first: whatever interrupts what follows, ``unpatch`` finds it
            self.attach(model)
        except BaseException:
            self._take_off(model)
            raise

    def _take_off(self, model: nn.Module) -> None:
        try:
            self._undo.run()
        finally:  # last: until nothing is left, ``unpatch`` finds it
            if not len(self._undo) and vars(model).get(ATTRIBUTE) is self:
                object.__delattr__(model, ATTRIBUTE)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write reducer and options as ``vtc_config.json`` into a folder; :func:`vtc.patch_from` reads it.

        Returns
        -------
        Path
            The file.
        """
        model = self._model()
        if model is None:
            raise PatchError("the model is gone, and with it what the setting is for: keep a reference to the model")
        return saved.save(self.reducer, self.strict, model, folder)

    @property
    def active(self) -> bool:
        """Whether the patch is on."""
        model = self._model()
        return model is not None and vars(model).get(ATTRIBUTE) is self

    def check_idle(self) -> None:
        """Raise :class:`PatchError` while a call is running."""
        if self._running:
            raise PatchError("the model is running: patch and unpatch between calls, not during one")

    def remove(self) -> None:
        """Take the patch off; doing it twice is harmless.

        Raises
        ------
        PatchError
            While a call of the model is running.
        """
        model = self._model()
        if model is not None and self.active:
            self.check_idle()
            self._take_off(model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A call of the model: nobody may patch or unpatch meanwhile."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def __enter__(self) -> BaseHandle:
        """Return the handle."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the patch."""
        self.remove()

    def __repr__(self) -> str:
        """Show reducer, family and state."""
        return f"<vtc.Handle {self.reducer} on {self.family.name}, {'active' if self.active else 'removed'}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseHandle:
        """Copy the handle together with its model, so that a copied model can be un-patched on its own."""
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in vars(self).items():
            if key == "_model":
                model = self._model()
                new._model = weakref.ref(memo.get(id(model), model))
            elif key == "_lock":
                new._lock = threading.Lock()
            else:
                setattr(new, key, 0 if key == "_running" else copy.deepcopy(value, memo))
        return new
