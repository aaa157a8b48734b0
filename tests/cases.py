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
    waits : tuple of str
        Functions in which the host waits for a GPU between the tower and the last layer: only where the number of tokens, and with
        it the host's next step, depends on what the GPU finds.
    presets : dict
        Options, by hand, of presets that are not what the number in their name says (test_presets has those of the first methods).
    """

    mild: dict[str, Any]
    harsh: dict[str, Any]
    whole: dict[str, Any] = field(default_factory=lambda: {"keep": 1.0})
    count: Literal["exact", "at_most", "all"] = "exact"
    waits: tuple[str, ...] = ()
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "aim": Case({"keep": 10, "start": 2, "stop": 12}, {"keep": 0.3, "start": 1, "stop": 12}, {"keep": 1.0, "prune": False}),
    "cdpruner": Case({"keep": 10}, {"keep": 0.2}),
    # as many tokens as the knee of a curve says
    "corematching": Case(
        {"keep": 10}, {"keep": 0.2, "rule": "topk"}, {"keep": 1.0, "rule": "topk"}, "at_most", waits=("compacted", "reduce")
    ),
    "dart": Case({"keep": 10}, {"keep": 0.2, "layer": 1}),
    "divprune": Case({"keep": 10}, {"keep": 0.2}),
    # as many as show text
    "docprune": Case(
        {"keep": 10}, {"keep": 0.2, "dilate": False}, {"keep": 1.0, "threshold": float("-inf")}, "at_most", waits=("compacted",)
    ),
    "downsample": Case({"keep": 12}, {"keep": 5}, count="at_most"),
    "dycoke": Case({"keep": 10}, {"keep": 0.2}, presets={"release-k70": {"keep": 1.0, "ratio": 0.7, "official": True}}),
    "evs": Case({"keep": 10}, {"keep": 0.2}),
    "fastervlm": Case({"keep": 10}, {"keep": 0.2}),
    # few frames of a still scene may keep tokens
    "fastvid": Case(
        {"keep": 10},
        {"keep": 0.2, "version": "qwen", "tau": 0.84},
        count="at_most",
        presets={"qwen-r27": {"keep": 0.27, "version": "qwen", "tau": 0.84}}
        | {"llavavideo-r10": {"keep": 0.1, "version": "llavavideo"}, "release-r10": {"keep": 0.1, "official": True}},
    ),
    "fastv": Case({"keep": 10}, {"keep": 0.2, "layer": 1}),
    # newlines of rows that keep a token
    "flexpool": Case({"keep": 10}, {"keep": 0.2, "place": "tower"}, count="at_most", waits=("add_newlines",)),
    # views drop by their own scores; padding may survive
    "flowcut": Case({"keep": 10}, {"keep": 0.2}, count="at_most", waits=("narrow", "slots_of", "only_patches")),
    # as many as differ from what surrounds them and from the frame before
    "sttm": Case(
        {"keep": 10},
        {"keep": 0.2, "layer": 0},
        count="at_most",
        waits=("measure",),
        presets={
            f"{model}-{part}": {"keep": 1.0, "adaptive": True, "spatial": spatial, "temporal": temporal}
            for model, part, spatial, temporal in (
                ("llavavideo", "half", 0.85, 0.55),
                ("llavavideo", "third", 0.8, 0.5),
                ("qwen2vl", "half", 0.85, 0.6),
                ("qwen2vl", "third", 0.8, 0.6),
            )
        },
    ),
    # as many as resemble the frame before
    "framefusion": Case(
        {"keep": 10},
        {"keep": 0.2, "queries": 4},
        count="at_most",
        waits=("add_newlines",),
        presets={"release": {"avg_tokens": 0.3}, "qwen2vl": {"avg_tokens": 0.3, "similar": 0.5, "queries": 4}},
    ),
    # whole frames
    "frames": Case({"keep": 10}, {"keep": 0.2, "fill": True}, count="at_most"),
    # crops share the budget by their scores
    "globalcom2": Case({"keep": 10}, {"keep": 0.2}, waits=("quota",)),
    "gridpool": Case({"keep": 10}, {"keep": 0.2}, count="at_most"),
    # SciPy's clustering
    "hierpool": Case({"keep": 10}, {"keep": 0.2, "method": "kmeans"}, waits=("ward",)),
    "hiprune": Case({"keep": 10}, {"keep": 0.2, "alpha": 0.8}),
    "holov": Case({"keep": 10}, {"keep": 0.2, "crops": 3}),
    # overlaps count once
    "ivcprune": Case(
        {"keep": 10},
        {"keep": 0.2, "layer": 1, "rule": "fill"},
        count="at_most",
        waits=("compacted", "reduce"),
        presets={
            "llava15": {"keep": 0.31, "layer": 16, "rule": "union"},
            "qwen25vl-7b": {"keep": 0.5, "layer": 16, "rule": "fill"},
            "qwen25vl-3b": {"keep": 0.5, "layer": 22, "rule": "fill"},
        },
    ),
    # static places of a clip are averaged first
    "holitom": Case(
        {"keep": 10},
        {"keep": 0.2, "inner": 0.0},
        {"keep": 1.0, "inner": 0.0},
        "at_most",
        waits=("add_newlines",),
        presets={
            "r10": {"keep": 0.1, "tau": 0.65},
            "outer-r10": {"keep": 0.1, "tau": 0.65, "inner": 0.0},
            "release-r25": {"keep": 0.25, "official": True},
        },
    ),
    # as many as lie within a distance of each other
    "pact": Case(
        {"keep": 10, "layer": 2},
        {"keep": 0.2, "layer": 1},
        {"keep": 1.0, "share": 1.0, "cutoff": 0.0},
        "at_most",
        waits=("rows", "reduce"),
        presets={"paper": {"keep": 1.0, "layer": 4}},
    ),
    "prumerge": Case({"keep": 10}, {"keep": 0.2}),
    "prumerge_plus": Case({"keep": 10}, {"keep": 0.2}),
    # crops share by salience; newlines as in flexpool
    "ptp": Case({"keep": 10}, {"keep": 0.2, "layer": 1, "region": "mean"}, waits=("weights", "add_newlines")),
    "pyramiddrop": Case({"keep": 8}, {"avg_tokens": 0.5}),
    "random": Case({"keep": 10}, {"keep": 0.2, "seed": 3}),
    "scope": Case({"keep": 10}, {"keep": 0.2, "combine": "add"}),
    "script": Case({"keep": 10}, {"keep": 0.2, "rule": "joint"}),
    # as many as the class token attends to
    "skipspan": Case({"keep": 10}, {"keep": 0.2}, count="all", waits=("narrow",)),
    # as many as the words that match
    "sparsevlm": Case({"keep": 10}, {"keep": 0.2, "version": "2"}, waits=("raters",)),
    "temporalpool": Case({"keep": 10}, {"keep": 0.2, "windows": "fixed", "norm": True}, count="at_most"),
    # all or none, as the text's attention says
    "todre": Case({"keep": 10}, {"keep": 0.2, "diversity": "kcenter"}, waits=("reduce",)),
    # as many as do not repeat each other
    "tokencorr": Case(
        {"keep": 10},
        {"keep": 0.2, "sampling": "random"},
        {"keep": 1.0, "adaptive": False},
        "at_most",
        waits=("select", "add_newlines"),
    ),
    "tokenpooling": Case({"keep": 10}, {"keep": 0.2, "method": "kmeans"}),
    # padding may be among what is left
    "tome": Case({"keep": 10}, {"keep": 0.4, "proportional": False}, {"keep": 1.0}, "at_most", waits=("slots_of",)),
    "transprune": Case({"keep": 10}, {"keep": 0.2, "iga": False}),
    "uniform": Case({"keep": 10}, {"keep": 0.2}),
    "visionzip": Case({"keep": 10}, {"keep": 0.2, "contextual": 1}),
    "vscan": Case(
        {"keep": 10, "window": 2},
        {"keep": 0.2, "layers": (1,), "late": (2,)},
        {"keep": 1.0, "layers": (), "late": ()},
        presets={
            "llava15-64": {"keep": 96, "layers": (16,), "late": (32,)},  # 64 on average
            "llavanext-320": {"keep": 480, "layers": (16,), "late": (160,)},
            "qwen25vl": {"keep": 0.167, "layers": (14,), "late": (0.333,)},
        },
    ),
    "vidcom2": Case({"keep": 10}, {"keep": 0.2}, presets={"release-r25": {"keep": 0.25, "rule": "release"}}),
    # rounds of removal
    "vispruner": Case({"keep": 10}, {"keep": 0.2, "important": 0.25}, waits=("nearest", "largest")),
    "zooprune": Case({"keep": 10, "directions": 4}, {"keep": 0.2, "directions": 2, "rank": 5}),
}
