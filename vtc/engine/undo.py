"""How a patch is taken off: every step is noted before its change is made, and dropped only after it ran.

An interrupt may come between any two lines. What is noted can be undone whether or not the change was made, and more than once; so
a removal that was broken off is finished by the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_CALLED = ("_forward_pre_hooks", "_forward_hooks")
_MARKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""Where torch keeps the hooks of a module. It has no public way to find one whose registration was broken off."""


class _Absent:
    """Marks an attribute the instance did not have (a class: deep copies keep its identity)."""


class Undo:
    """The changes one patch has made to a model, and how each is undone. Deep copies belong to the copied model."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def step(self, undo: Callable[[], None]) -> None:
        """Note what undoes a change that is about to be made; it must do nothing if the change was not made, or is undone."""
        self._steps.append(undo)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """Register a forward pre-hook; ``options`` are torch's."""
        self.step(functools.partial(_unhook, module, hook))
        module.register_forward_pre_hook(hook, **options)

    def hook(self, module: nn.Module, hook: Callable[..., Any], **options: Any) -> None:
        """Register a forward hook; ``options`` are torch's."""
        self.step(functools.partial(_unhook, module, hook))
        module.register_forward_hook(hook, **options)

    def attribute(self, owner: nn.Module, name: str, wrapper: Any) -> None:
        """Set an attribute of the instance; undone, the instance has what it had (often nothing)."""
        self.step(functools.partial(_restore, owner, name, wrapper, vars(owner).get(name, _Absent)))
        object.__setattr__(owner, name, wrapper)

    def run(self) -> None:
        """Undo everything, the last change first; an interrupt is raised when all is done."""
        try:
            self._run()
        except BaseException:
            self._run()
            raise

    def _run(self) -> None:
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def __len__(self) -> int:
        """Return the number of changes not yet undone."""
        return len(self._steps)


def _unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    for place in _CALLED:
        for key, held in list(getattr(module, place).items()):
            if held is hook:
                for other in (*_MARKS, *_CALLED):
                    getattr(module, other).pop(key, None)


def _restore(owner: nn.Module, name: str, wrapper: Any, before: Any) -> None:
    if vars(owner).get(name) is not wrapper:  # not made, undone, or somebody wrapped it again
        return
    if before is _Absent:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, before)


def is_ours(function: Any) -> bool:
    """Whether a hook or wrapper is one of vtc's."""
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").startswith("vtc.")


def strays(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield hooks of vtc's on a model that has no handle, with their modules: what a patch left that lost its handle."""
    for module in model.modules():
        for place in _CALLED:
            for hook in list(getattr(module, place).values()):
                if is_ours(hook):
                    yield module, hook


def sweep(model: nn.Module) -> int:
    """Take off all of :func:`strays`; return how many there were."""
    found = list(strays(model))
    for module, hook in found:
        _unhook(module, hook)
    return len(found)
