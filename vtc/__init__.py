"""vtc: visual-token reducers for Hugging Face vision-language models.

>>> import vtc
>>> model, processor = vtc.load_pocket()
>>> with vtc.patch(model, "fastv", keep=49) as handle:
...     output = model.generate(**inputs)
>>> handle.stats.last.images[0].avg_tokens
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vtc.core import Budget, Compose, Layout, Merger, Need, Reducer, Schedule, Scorer, Selection, Signals, Stage
from vtc.errors import (
    BudgetError,
    ConfigError,
    InputFileError,
    InvalidSignalError,
    NotReduced,
    NotReducedError,
    PatchError,
    PromptError,
    StoreError,
    UnknownArgumentError,
    UnknownReducerError,
    UnsupportedFeatureError,
    UnsupportedModelError,
    UnsupportedSignalError,
    VtcError,
)
from vtc.registry import create, info, list_reducers, register

if TYPE_CHECKING:
    from vtc.engine.patch import Handle, bind, patch, patch_from, unpatch
    from vtc.families import list_families
    from vtc.pocket import load_pocket
    from vtc.retrieval import maxsim, pool_vectors
    from vtc.verify import verify

from vtc._version import __version__

# these need transformers: imported when first used, so that `import vtc` stays light
_LAZY = {
    "bind": "vtc.engine.patch",
    "patch": "vtc.engine.patch",
    "patch_from": "vtc.engine.patch",
    "unpatch": "vtc.engine.patch",
    "Handle": "vtc.engine.patch",
    "list_families": "vtc.families",
    "load_pocket": "vtc.pocket",
    "maxsim": "vtc.retrieval",
    "pool_vectors": "vtc.retrieval",
    "verify": "vtc.verify",
}

__all__ = [
    "Budget",
    "BudgetError",
    "Compose",
    "ConfigError",
    "Handle",
    "InputFileError",
    "InvalidSignalError",
    "Layout",
    "Merger",
    "Need",
    "NotReduced",
    "NotReducedError",
    "PatchError",
    "PromptError",
    "Reducer",
    "Schedule",
    "Scorer",
    "Selection",
    "Signals",
    "Stage",
    "StoreError",
    "UnknownArgumentError",
    "UnknownReducerError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "UnsupportedSignalError",
    "VtcError",
    "__version__",
    "bind",
    "create",
    "info",
    "list_families",
    "list_reducers",
    "load_pocket",
    "maxsim",
    "patch",
    "patch_from",
    "pool_vectors",
    "register",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the parts that need transformers on first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vtc' has no attribute '{name}'")
