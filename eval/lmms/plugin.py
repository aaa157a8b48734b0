"""Entry point ``lmms_eval.models``: names and class paths only, since it is loaded while ``lmms_eval.models`` is being imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

_CLASSES = "vtc.eval.lmms.model"


def manifests() -> list[ModelManifest]:
    """Return what lmms-eval registers: ``vtc`` (any base class, patched) and ``vtc_hf`` (our batching chat model)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("vtc", simple_class_path=f"{_CLASSES}.PatchedSimple", chat_class_path=f"{_CLASSES}.PatchedChat"),
        ModelManifest("vtc_hf", simple_class_path=f"{_CLASSES}.SimpleModel", chat_class_path=f"{_CLASSES}.ChatModel"),
    ]


def check() -> str:
    """Let lmms-eval do what it does with the plugin: find it, load its classes, and evaluate the embedded model on one question.

    ``vtc doctor`` calls this through the entry point. Importing lmms-eval shows little: it imports more while it evaluates.

    Returns
    -------
    str
        What was run.

    Raises
    ------
    Exception
        Whatever went wrong on the way.
    """
    from importlib.metadata import version

    import datasets

    import vtc
    from vtc.eval.lmms.locks import require_locks

    require_locks()
    from lmms_eval import models

    for manifest in manifests():
        models.get_model(manifest.model_id)
    from vtc.eval.lmms.run import run_task

    reducer, silent = vtc.create("uniform", keep=49), datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        result = run_task(*vtc.load_pocket(), "vtc_scenes", reducer=reducer, batch_size=1, limit=1, seed=0)
    finally:
        if not silent:
            datasets.enable_progress_bars()
    if result is None or result.samples[0]["kept"] != 49:
        raise RuntimeError(f"the plugin did not reduce to 49 tokens: {result}")
    return f"answers inside the evaluator of lmms-eval {version('lmms-eval')}, on 49 of {result.samples[0]['slots']} tokens"
