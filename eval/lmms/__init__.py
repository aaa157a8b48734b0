"""lmms-eval as the harness: a plugin on the released package, its benchmarks as a table, and one function that runs a task.

* ``--model vtc`` patches any model class of lmms-eval, ``--model vtc_hf`` is our own batching one; both come through the entry
  point group ``lmms_eval.models`` (:func:`vtc.eval.lmms.plugin.manifests`), so the plain ``lmms-eval`` command line knows them.
* :func:`run_task` answers one task with a model that is in memory; :func:`known_tasks` and :func:`check_task` are the table.

Importing this package imports neither lmms-eval nor torch: public names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.eval.lmms.benchmarks import Benchmark, known_tasks
    from vtc.eval.lmms.run import TaskRun, check_task, run_task

_LAZY = {
    "Benchmark": "benchmarks",
    "known_tasks": "benchmarks",
    "TaskRun": "run",
    "check_task": "run",
    "run_task": "run",
}

__all__ = ["Benchmark", "TaskRun", "check_task", "known_tasks", "run_task"]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use (PEP 562)."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
