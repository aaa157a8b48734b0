"""Any model proves itself on this machine, with these versions: a tiny twin of it, patched, against a slow reference.

>>> import vtc
>>> verdict = vtc.verify("llava-hf/llava-1.5-7b-hf")
>>> verdict.ok
>>> print(verdict)

:mod:`~vtc.verify.twin` makes the small model, :mod:`~vtc.verify.inputs` prompts for it, :mod:`~vtc.verify.reference` is the slow
reference, :mod:`~vtc.verify.check` compares, :mod:`~vtc.verify.memory` remembers what came out.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.verify.check import verify
    from vtc.verify.verdict import Item, Verdict

__all__ = ["Item", "Verdict", "verify"]

_PLACES = {"verify": "vtc.verify.check", "Item": "vtc.verify.verdict", "Verdict": "vtc.verify.verdict"}


def __getattr__(name: str) -> Any:
    """Import what needs transformers on first use."""
    import importlib

    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


class _Callable(ModuleType):
    """``vtc.verify(model)`` is :func:`verify`: a package and a function of one name."""

    def __call__(self, model: Any, **options: Any) -> Verdict:
        """Call :func:`verify`."""
        return self.verify(model, **options)


sys.modules[__name__].__class__ = _Callable
