"""Counting and timing what a model class of lmms-eval does, without knowing the class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import vtc
from vtc.engine import upstream

Document = tuple[str, str, int]
"""Task, split and number of a document."""


class GenerateFailedError(BaseException):
    """An error inside ``generate``; not an ``Exception``, because model classes of lmms-eval swallow those and answer ""."""


@dataclass
class SampleCounts(TokenCounts):
    """Token counts of one answer; lmms-eval writes what :meth:`to_dict` returns into the logged sample."""

    record: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return lmms-eval's counts and ours."""
        return {**super().to_dict(), **self.record}


class _Documents:
    """A view of ``lm.task_dict`` that reports which documents are read: the rows of the next ``generate``, in order."""

    def __init__(self, data: Any, note: Callable[[Document], None], path: tuple[Any, ...] = ()) -> None:
        self._data, self._note, self._path = data, note, path

    def __getitem__(self, key: Any) -> Any:
        value, path = self._data[key], (*self._path, key)
        if len(path) == 3:
            self._note(path)
            return value
        return _Documents(value, self._note, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


class _FirstToken(StoppingCriteria):
    """Stops nothing; remembers when the first new token was there."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync, self.time = sync, None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.time is None:
            self._sync()
            self.time = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Meter:
    """What happened to each document while :meth:`watching`.

    Attributes
    ----------
    records : dict
        Document -> counts and times of its row.
    error : Exception or None
        The first error inside ``generate``.
    """

    def __init__(self, model: torch.nn.Module, handle: vtc.Handle | None) -> None:
        self.model, self.handle = model, handle
        self.records: dict[Document, dict[str, Any]] = {}
        self.error: Exception | None = None
        self._read: list[Document] = []

    def documents(self, task_dict: Any) -> _Documents:
        """Return ``task_dict`` as the model class should see it."""
        return _Documents(task_dict, self._read.append)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap ``generate`` of the instance for the duration of a ``with`` block."""
        model, before = self.model, vars(self.model).get("generate")
        inner = model.generate
        object.__setattr__(model, "generate", lambda *args, **kwargs: self._generate(inner, args, kwargs))
        try:
            yield
        finally:
            if before is None:
                object.__delattr__(model, "generate")
            else:
                object.__setattr__(model, "generate", before)

    def _generate(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self.model.device
        sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        first = _FirstToken(sync)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), first])
        documents = self._read.copy()
        self._read.clear()
        if self.handle is not None:
            self.handle.stats.clear()  # what is in it afterwards is this call
        try:
            sync()
            start = time.perf_counter()
            output = inner(*args, **kwargs)
            sync()
            end = time.perf_counter()
            self._note(documents, args, kwargs, output, end - start, (first.time or end) - start)
            return output
        except Exception as error:
            numbers = ", ".join(str(number) for _, _, number in documents)
            where = f" on document {numbers} of task '{documents[0][0]}'" if documents else ""
            self.error = RuntimeError(f"generate failed{where}: {type(error).__name__}: {error}")
            self.error.__cause__ = error
            raise GenerateFailedError from error

    def _note(
        self, documents: list[Document], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, seconds: float, ttft: float
    ) -> None:
        ids = kwargs.get(upstream.IDS, args[0] if args else None)
        if ids is not None and len(documents) != len(ids):
            documents = list(dict.fromkeys(documents))  # some classes read a document for its images and again for its text
        if ids is None or len(documents) != len(ids):
            rows = "no input_ids" if ids is None else f"{len(ids)} rows"
            raise ValueError(
                f"this model class read {len(documents)} documents and called generate with {rows}, so counts cannot be "
                "told apart: use --batch_size 1, or base=vtc_hf"
            )
        sequences = output if isinstance(output, Tensor) else output.sequences
        mask = kwargs.get(upstream.MASK)
        pad = kwargs.get("pad_token_id", upstream.generation_option(self.model, "pad_token_id"))
        beams = kwargs.get("num_beams") or 1
        for row, document in enumerate(documents):
            slots, kept, average = self._tokens(ids, row, beams)
            new = sequences[row, ids.shape[1] :]
            self.records[document] = {
                "slots": slots,
                "kept": kept,
                "avg_tokens": average,
                "prompt_tokens": int(mask[row].sum()) if mask is not None else ids.shape[1],
                "new_tokens": len(new) if pad is None else int((new != pad).sum()),
                "ttft_s": ttft,
                "generate_s": seconds,
                "batch": len(documents),
            }

    def _tokens(self, ids: Tensor, row: int, beams: int) -> tuple[int, int, float]:
        """Slots, tokens entering the last layer, and layer average of one row, all images together."""
        if self.handle is None:
            config = self.model.config
            names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
            marks = {mark for name in names if (mark := getattr(config, name, None)) is not None}
            slots = sum(int((ids[row] == mark).sum()) for mark in marks)
            return slots, slots, float(slots)
        images = [image for image in self.handle.stats.images if image.row == row * beams]
        return sum(i.slots for i in images), sum(i.kept for i in images), sum(i.avg_tokens for i in images)
