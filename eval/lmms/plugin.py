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
        ModelManifest("vtc_hf", chat_class_path=f"{_CLASSES}.ChatModel"),
    ]
