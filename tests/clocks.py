"""A clock of our own: whatever is timed takes exactly as long as a test says, so that timings are numbers one can work out."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


class Clock:
    """Stands still, or moves by itself whenever it is looked at.

    Parameters
    ----------
    tick : float
        Seconds by which a look moves the hands, after they were read.

    Attributes
    ----------
    at : float
        What the clock shows.
    looks : int
        How often it was read.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.at, self.tick, self.looks = 0.0, tick, 0

    def __call__(self) -> float:
        now = self.at
        self.at, self.looks = now + self.tick, self.looks + 1
        return now

    def put_into(self, monkeypatch: Any, *modules: ModuleType) -> Clock:
        """Be the only clock that these modules can read."""
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=self, monotonic=self))
        return self


class Script(Clock):
    """Shows given times one after the other, and refuses to be looked at more often."""

    def __init__(self, *times: float) -> None:
        super().__init__()
        self.times = iter(times)

    def __call__(self) -> float:
        self.looks += 1
        return next(self.times)
