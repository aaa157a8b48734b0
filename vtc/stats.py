"""What a patched model did: per call and per image, slots in, tokens kept, tokens per layer, reducer milliseconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core import Layout
from vtc.errors import VtcError

HISTORY = 4096
"""Calls remembered by one handle; older ones are forgotten."""


SHORT = "fewer tokens than the budget: kept whole"
"""Note on an image that has fewer visual tokens than it may keep."""


@dataclass
class StageStats:
    """One reducer acting on one image.

    Attributes
    ----------
    reducer : str
        Method name.
    stage : str
        Value of :class:`vtc.core.Stage`.
    layer : int
        Decoder layer (0 for everything before the decoder).
    before, after : int
        Visual tokens of the image entering and leaving the stage.
    requested : int or None
        Tokens asked for; ``None`` where the stage decides itself.
    note : str
        Substituted signals, an image below its budget, and the like.
    """

    reducer: str
    stage: str
    layer: int
    before: int
    after: int
    requested: int | None = None
    note: str = ""


@dataclass
class ImageStats:
    """One image of one call.

    Attributes
    ----------
    row : int
        Batch row.
    slots : int
        Visual tokens before reduction.
    kept : int
        Visual tokens that enter the last decoder layer.
    tokens_per_layer : list of int
        Visual tokens in each decoder layer.
    avg_tokens : float
        Their average: the compute-equivalent budget.
    stages : list of StageStats
        What each reducer did, in order.
    fired : bool
        Whether every part of the reducer acted on this image.
    """

    row: int
    slots: int
    kept: int
    tokens_per_layer: list[int]
    stages: list[StageStats] = field(default_factory=list)
    fired: bool = True

    @property
    def avg_tokens(self) -> float:
        """Visual tokens averaged over the decoder layers."""
        return sum(self.tokens_per_layer) / max(1, len(self.tokens_per_layer))


@dataclass
class CallStats:
    """One forward with a prompt (decode steps are not listed).

    Attributes
    ----------
    images : list of ImageStats
        Empty for a text-only prompt.
    text_only : bool
        The prompt had no visual tokens and passed through untouched.
    """

    images: list[ImageStats] = field(default_factory=list)
    text_only: bool = False
    _clock: Clock | None = field(default=None, repr=False)

    @property
    def fired(self) -> bool:
        """Whether the reducer acted on every image (False for a text-only call)."""
        return bool(self.images) and all(i.fired for i in self.images)

    @property
    def reducer_ms(self) -> float:
        """Milliseconds spent computing signals and selecting, all images together. Synchronises a GPU when read."""
        return self._clock.milliseconds() if self._clock is not None else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "text_only": self.text_only,
            "fired": self.fired,
            "reducer_ms": self.reducer_ms,
            "images": [asdict(i) | {"avg_tokens": i.avg_tokens} for i in self.images],
        }


@dataclass(eq=False)
class KeptTokens:
    """Where the surviving tokens of one image sit; kept for the most recent call with images only.

    Attributes
    ----------
    row : int
        Batch row.
    layout : Layout
        Slot layout of the image.
    entries : Tensor
        ``(n,)`` slots that hold a token in the last decoder layer, ascending.
    merges : list of (Tensor, Tensor, Tensor)
        Per merging stage: the slot of every candidate ``(N,)`` (-1: it has none), the survivors' positions among the candidates
        ``(K,)``, and the survivor each candidate went into ``(N,)`` (-1: discarded).
    """

    row: int
    layout: Layout
    entries: Tensor
    merges: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        """``(slots,)`` bool on the CPU: the slot holds a token in the last decoder layer."""
        return torch.zeros(len(self.layout), dtype=torch.bool).index_fill(0, self.entries.cpu(), True)

    @property
    def owner(self) -> Tensor | None:
        """``(slots,)`` on the CPU: the surviving slot each slot ended up in, -1 if dropped; None if nothing was merged."""
        if not self.merges:
            return None
        owner = torch.arange(len(self.layout))
        for slot, index, group in self.merges:
            slot, index, group = slot.cpu(), index.cpu(), group.cpu()
            into = torch.where(group >= 0, slot[index[group.clamp(min=0)]], -1)
            target = torch.arange(len(self.layout))  # what was not a candidate stands for itself
            target[slot[slot >= 0]] = into[slot >= 0]
            owner = torch.where(owner >= 0, target[owner.clamp(min=0)], -1)
        return torch.where(torch.isin(owner, self.entries.cpu()), owner, -1)


class Clock:
    """Adds up the time of marked spans: wall clock on the CPU, CUDA events (read lazily, without stalling) on a GPU.

    Attributes
    ----------
    observers : list of callable
        Called with True when any span begins and False when it ends: how a measurement tells a reducer's work from the model's.
    """

    observers: ClassVar[list[Callable[[bool], object]]] = []

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def span(self, device: torch.device) -> AbstractContextManager[None]:
        """Time the body of a ``with`` block that works on ``device``; not in compiled code, which a clock would break up."""
        return nullcontext() if torch.compiler.is_compiling() else self._span(device)

    @contextmanager
    def _span(self, device: torch.device) -> Iterator[None]:
        for observer in self.observers:
            observer(True)
        try:
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                try:
                    yield
                finally:
                    end.record()
                    self._events.append((start, end))
            else:
                begin = time.perf_counter()
                try:
                    yield
                finally:
                    self._seconds += time.perf_counter() - begin
        finally:
            for observer in self.observers:
                observer(False)

    def add(self, other: Clock) -> None:
        """Add another clock's spans."""
        self._seconds += other._seconds
        self._events += other._events

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """Copy the milliseconds, not the CUDA events."""
        new = Clock()
        new._seconds = self.milliseconds() / 1e3
        return new

    def milliseconds(self) -> float:
        """Total of all spans."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
            self._events = []
        return self._seconds * 1e3


class StatsLog:
    """The calls of one handle, oldest first; at most :data:`HISTORY`.

    Attributes
    ----------
    kept : list of KeptTokens
        Which tokens survived, per image of the most recent call with images.
    """

    def __init__(self) -> None:
        self._calls: deque[CallStats] = deque(maxlen=HISTORY)
        self.kept: list[KeptTokens] = []

    def append(self, call: CallStats) -> None:
        """Add one call."""
        self._calls.append(call)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
        self.kept = []

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    def __iter__(self) -> Iterator[CallStats]:
        """Iterate over the calls, oldest first."""
        return iter(list(self._calls))

    def __getitem__(self, index: int) -> CallStats:
        """Return one call."""
        return self._calls[index]

    @property
    def last(self) -> CallStats:
        """The most recent call."""
        if not self._calls:
            raise VtcError("no call has been recorded yet: run the patched model first")
        return self._calls[-1]

    @property
    def images(self) -> list[ImageStats]:
        """All images of all calls."""
        return [i for c in self._calls for i in c.images]

    def summary(self) -> dict[str, float]:
        """Return means over all images: ``slots``, ``kept``, ``avg_tokens``; ``reducer_ms`` per call; counts."""
        images, calls = self.images, [c for c in self._calls if not c.text_only]
        if not images:
            return {"images": 0, "calls": len(self._calls), "slots": 0.0, "kept": 0.0, "avg_tokens": 0.0, "reducer_ms": 0.0}
        n = len(images)
        return {
            "images": n,
            "calls": len(self._calls),
            "slots": sum(i.slots for i in images) / n,
            "kept": sum(i.kept for i in images) / n,
            "avg_tokens": sum(i.avg_tokens for i in images) / n,
            "reducer_ms": sum(c.reducer_ms for c in calls) / max(1, len(calls)),
        }

    def __repr__(self) -> str:
        """Show the summary."""
        s = self.summary()
        return (
            f"StatsLog({s['calls']} calls, {s['images']} images: {s['slots']:.1f} slots -> {s['kept']:.1f} kept, "
            f"{s['avg_tokens']:.1f} per layer on average, {s['reducer_ms']:.2f} ms per call)"
        )
