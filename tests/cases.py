"""One line per reducer: the options the test matrix runs it with. Everything else about a reducer comes from the registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """How the tests run one reducer.

    Parameters
    ----------
    mild, harsh : dict
        Options that keep about half, and only a few, of the visual tokens of any tiny model.
    whole : dict
        Options that keep everything.
    count : {"exact", "at_most"}
        Whether every image keeps exactly the tokens the stage reports as requested, or at most that many.
    """

    mild: dict[str, Any]
    harsh: dict[str, Any]
    whole: dict[str, Any] = field(default_factory=lambda: {"keep": 1.0})
    count: Literal["exact", "at_most"] = "exact"


CASES: dict[str, Case] = {
    "divprune": Case({"keep": 10}, {"keep": 0.2}),
    "downsample": Case({"keep": 12}, {"keep": 5}, count="at_most"),
    "fastervlm": Case({"keep": 10}, {"keep": 0.2}),
    "fastv": Case({"keep": 10}, {"keep": 0.2, "layer": 1}),
    "flowcut": Case({"keep": 10}, {"keep": 0.2}, count="at_most"),
    "gridpool": Case({"keep": 10}, {"keep": 0.2}, count="at_most"),
    "random": Case({"keep": 10}, {"keep": 0.2, "seed": 3}),
    "todre": Case({"keep": 10}, {"keep": 0.2}),
    "uniform": Case({"keep": 10}, {"keep": 0.2}),
    "visionzip": Case({"keep": 10}, {"keep": 0.2, "contextual": 1}),
}
