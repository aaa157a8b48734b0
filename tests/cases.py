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
    count : {"exact", "at_most", "all"}
        Whether every image keeps exactly the tokens the stage reports as requested, at most that many, or all (they skip layers).
    """

    mild: dict[str, Any]
    harsh: dict[str, Any]
    whole: dict[str, Any] = field(default_factory=lambda: {"keep": 1.0})
    count: Literal["exact", "at_most", "all"] = "exact"


CASES: dict[str, Case] = {
    "aim": Case({"keep": 10, "start": 2, "stop": 12}, {"keep": 0.3, "start": 1, "stop": 12}, {"keep": 1.0, "prune": False}),
    "cdpruner": Case({"keep": 10}, {"keep": 0.2}),
    "corematching": Case({"keep": 10}, {"keep": 0.2, "rule": "topk"}, {"keep": 1.0, "rule": "topk"}, "at_most"),
    "dart": Case({"keep": 10}, {"keep": 0.2, "layer": 1}),
    "divprune": Case({"keep": 10}, {"keep": 0.2}),
    "docprune": Case({"keep": 10}, {"keep": 0.2, "dilate": False}, {"keep": 1.0, "threshold": float("-inf")}, "at_most"),
    "downsample": Case({"keep": 12}, {"keep": 5}, count="at_most"),
    "evs": Case({"keep": 10}, {"keep": 0.2}),
    "fastervlm": Case({"keep": 10}, {"keep": 0.2}),
    "fastv": Case({"keep": 10}, {"keep": 0.2, "layer": 1}),
    "flexpool": Case({"keep": 10}, {"keep": 0.2, "place": "tower"}, count="at_most"),
    "flowcut": Case({"keep": 10}, {"keep": 0.2}, count="at_most"),
    "globalcom2": Case({"keep": 10}, {"keep": 0.2}),
    "gridpool": Case({"keep": 10}, {"keep": 0.2}, count="at_most"),
    "hierpool": Case({"keep": 10}, {"keep": 0.2, "method": "kmeans"}),
    "hiprune": Case({"keep": 10}, {"keep": 0.2, "alpha": 0.8}),
    "prumerge": Case({"keep": 10}, {"keep": 0.2}),
    "prumerge_plus": Case({"keep": 10}, {"keep": 0.2}),
    "ptp": Case({"keep": 10}, {"keep": 0.2, "layer": 1, "region": "mean"}),
    "pyramiddrop": Case({"keep": 8}, {"avg_tokens": 0.5}),
    "random": Case({"keep": 10}, {"keep": 0.2, "seed": 3}),
    "script": Case({"keep": 10}, {"keep": 0.2, "rule": "joint"}),
    "skipspan": Case({"keep": 10}, {"keep": 0.2}, count="all"),
    "sparsevlm": Case({"keep": 10}, {"keep": 0.2, "version": "2"}),
    "todre": Case({"keep": 10}, {"keep": 0.2, "diversity": "kcenter"}),
    "tokencorr": Case({"keep": 10}, {"keep": 0.2, "sampling": "random"}, {"keep": 1.0, "adaptive": False}, "at_most"),
    "tokenpooling": Case({"keep": 10}, {"keep": 0.2, "method": "kmeans"}),
    "tome": Case({"keep": 10}, {"keep": 0.4, "proportional": False}, {"keep": 1.0}, "at_most"),
    "transprune": Case({"keep": 10}, {"keep": 0.2, "iga": False}),
    "uniform": Case({"keep": 10}, {"keep": 0.2}),
    "visionzip": Case({"keep": 10}, {"keep": 0.2, "contextual": 1}),
    "vispruner": Case({"keep": 10}, {"keep": 0.2, "important": 0.25}),
    "zooprune": Case({"keep": 10, "directions": 4}, {"keep": 0.2, "directions": 2, "rank": 5}),
}
