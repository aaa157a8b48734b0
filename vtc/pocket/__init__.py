"""The embedded pocket models: tiny LLaVAs with the data that trained them, for CPU-only checks.

`load_pocket` returns an ordinary ``LlavaForConditionalGeneration`` (112x112 images, 196 visual tokens, six decoder
layers) or, for ``"pocket-next"``, a ``LlavaNextForConditionalGeneration`` (thumbnail and crops, up to 1008 visual
tokens) and its processor from files inside the package: no download. `scene_questions`, `detail_questions` and
`easy_vqa_questions` give questions whose answers depend on the image, and `answer_questions` scores a model on them
through plain ``generate``, so that a full pruning curve takes minutes on two CPU cores. ``vtc/assets/pocket/README.md``
is the model card.

Importing this package imports neither transformers nor the optional data packages (scikit-learn, easy-vqa): every
public name but the loader is resolved on first use.
"""

from __future__ import annotations

import importlib
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import did_you_mean
from vtc.pocket.errors import MissingPocketDataError, PocketError

if TYPE_CHECKING:
    import torch

    from vtc.pocket.answer import (
        Answer,
        Batches,
        PreparedBatch,
        accuracy_by_type,
        answer_questions,
        encode_questions,
    )
    from vtc.pocket.easyvqa import easy_vqa_questions
    from vtc.pocket.questions import Question, majority_baseline
    from vtc.pocket.scenes import DETAIL_QUESTION_TYPES, QUESTION_TYPES, detail_questions, scene_questions

POCKET_MODELS: tuple[str, ...] = ("pocket", "pocket-next")
"""Names that `load_pocket` and `pocket_path` accept."""

_LAZY = {
    "Answer": "answer",
    "Batches": "answer",
    "PreparedBatch": "answer",
    "accuracy_by_type": "answer",
    "answer_questions": "answer",
    "encode_questions": "answer",
    "easy_vqa_questions": "easyvqa",
    "Question": "questions",
    "majority_baseline": "questions",
    "DETAIL_QUESTION_TYPES": "scenes",
    "QUESTION_TYPES": "scenes",
    "detail_questions": "scenes",
    "scene_questions": "scenes",
}

__all__ = [
    "POCKET_MODELS",
    "DETAIL_QUESTION_TYPES",
    "QUESTION_TYPES",
    "Answer",
    "Batches",
    "MissingPocketDataError",
    "PocketError",
    "PreparedBatch",
    "Question",
    "accuracy_by_type",
    "answer_questions",
    "detail_questions",
    "easy_vqa_questions",
    "encode_questions",
    "load_pocket",
    "majority_baseline",
    "pocket_path",
    "scene_questions",
]


def __getattr__(name: str) -> Any:
    """Resolve the public names of the submodules on first use (PEP 562)."""
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List lazy names next to the eager ones."""
    return sorted(set(globals()) | set(__all__))


def pocket_path(name: str = "pocket") -> Path:
    """Folder of an embedded checkpoint, usable with any ``from_pretrained``.

    Parameters
    ----------
    name
        One of `POCKET_MODELS`.

    Returns
    -------
    Path
        A directory holding config, weights, tokenizer and processor files.

    Raises
    ------
    PocketError
        If no embedded model has that name (a ValueError; the message lists the names and close matches).
    FileNotFoundError
        If the installation lacks the files (package data left out, or imported from a zip archive).
    """
    if name not in POCKET_MODELS:
        hint = did_you_mean(str(name), POCKET_MODELS)
        raise PocketError(f"no embedded model is named {name!r}{hint}; available: {', '.join(POCKET_MODELS)}")
    folder = Path(str(importlib.resources.files("vtc") / "assets" / name))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the files of embedded model {name!r} are missing from this installation: {folder}")
    return folder


def load_pocket(
    name: str = "pocket",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load an embedded model and its processor.

    Parameters
    ----------
    name
        One of `POCKET_MODELS`.
    dtype
        Floating type of the weights; float32 when None (they are stored as float16).
    device
        Where to put the model; left on the CPU when None.
    attn_implementation
        ``"sdpa"``, ``"eager"``, ...; the library's default when None.

    Returns
    -------
    model, processor
        A ``LlavaForConditionalGeneration`` in eval mode and its ``LlavaProcessor`` (left padding), or for
        ``"pocket-next"`` the ``LlavaNext`` pair.

    Raises
    ------
    PocketError
        If `name` is unknown.
    ImportError
        If transformers or Pillow is not installed.

    Examples
    --------
    >>> model, processor = load_pocket()
    >>> model.config.image_seq_length
    196
    """
    folder = pocket_path(name)

    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    model_arguments: dict[str, Any] = {"dtype": torch.float32 if dtype is None else dtype}
    if attn_implementation is not None:
        model_arguments["attn_implementation"] = attn_implementation
    # The PIL image processor on every installation: with torchvision present the library would switch to another
    # resampler, and answers would depend on what else is installed. The argument's name changed in transformers 5.
    major = int(transformers.__version__.split(".")[0])
    processor_arguments: dict[str, Any] = {"use_fast": False} if major < 5 else {"backend": "pil"}

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a bar for 130 tensors that load in 50 ms is noise
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False, **processor_arguments)
        kind = (
            transformers.LlavaNextForConditionalGeneration
            if name == "pocket-next"
            else transformers.LlavaForConditionalGeneration
        )
        model = kind.from_pretrained(folder, trust_remote_code=False, **model_arguments)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model.eval()
    if device is not None:
        model.to(device)
    return model, processor
