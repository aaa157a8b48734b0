"""Scores of a store's cells, read one after the other: only they are kept, so that ten thousand cells take megabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtc.eval.contents import score_of
from vtc.eval.stats import Bootstrap, Draws
from vtc.eval.store import CellResult, Store


@dataclass(frozen=True)
class Listed:
    """A cell of ``sweep.json``; one without model, task or seed belongs to a sweep over one of each."""

    id: str
    label: str
    reducer: str
    budget: str
    model: str
    task: str
    seed: int


def listed_cells(store: Store) -> tuple[dict[str, Any], list[Listed]]:
    """Return ``sweep.json`` and its cells.

    Raises
    ------
    StoreError
        If it is absent or damaged.
    """
    sweep = store.read_sweep()
    seed = sweep["config"].get("seed", 0)
    return sweep, [
        Listed(
            c["id"],
            c["label"],
            c["reducer"],
            c["budget"],
            c.get("model") or sweep["model"]["name"],
            c.get("task") or "questions",
            c.get("seed", seed),
        )
        for c in sweep["cells"]
    ]


class Questions:
    """Questions that some cells share: ids, images and types, and one bootstrap for all."""

    def __init__(self, ids: Sequence[tuple[str, ...]], number: int) -> None:
        self.number = number
        self.images = [image for _, image, _ in ids]
        self.sources = [identity.partition("/")[0] for identity, _, _ in ids]
        kinds: dict[str, list[int]] = {}
        for i, (_, _, kind) in enumerate(ids):
            kinds.setdefault(kind, []).append(i)
        self.kinds = {kind: np.asarray(at) for kind, at in kinds.items()}
        self.boot: Bootstrap | None = None

    def bootstrap(self, settings: Mapping[str, Any], seed: int) -> Bootstrap:
        """Return the draws that all comparisons of these questions share."""
        if self.boot is None:
            # other questions, other draws: those of two tasks must not go up and down together
            stream = seed if self.number == 0 else (seed, self.number)
            self.boot = Bootstrap(self.images, settings["resamples"], settings["confidence"], stream)
        return self.boot


@dataclass
class Scored:
    """What is kept of a cell; without questions where nothing is scored by itself."""

    listed: Listed
    questions: Questions | None
    scores: Draws
    metrics: dict[str, Any]
    speed: dict[str, Any] | None
    error: str
    version: tuple[str, str]  # of engine and reducer


def version_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the code versions of engine and reducer that a cell's config names."""
    reducer = config.get("reducer")
    return str(config.get("engine", "")), str(reducer.get("code", "")) if isinstance(reducer, Mapping) else ""


class Reader:
    """Reads cells, sharing what they have in common."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.known: dict[bytes, Questions] = {}
        self.merged: dict[tuple[int, ...], Questions] = {}
        self.ids: dict[int, list[tuple[str, ...]]] = {}
        self.envs: list[dict[str, Any]] = []
        self.speed_envs: list[dict[str, Any]] = []

    def read(self, listed: Listed) -> Scored | None:
        """Return a cell; ``None`` where it has not been run."""
        found = self.store.get(listed.id)
        if found is None:
            return None
        if found.metrics:
            _add(self.envs, found.env)
        if found.speed:
            _add(self.speed_envs, found.speed["env"])
        questions, scores = None, np.zeros(0)
        if found.metrics and found.samples:
            scores = np.array([score_of(s) for s in found.samples])
            if not np.isnan(scores).all():  # of some tasks all answers are scored together
                # what was asked counts, not its number only: a data set may change under a sweep
                asked = [(str(s.get("question", "")), str(s.get("gold", ""))) for s in found.samples]
                questions = self._questions([(s["id"], s["image"], s["type"]) for s in found.samples], asked)
                scores = np.nan_to_num(scores)  # an answer that could not be scored is wrong
        return Scored(listed, questions, scores, _slim(found), found.speed, found.error, version_of(found.config))

    def _questions(self, ids: list[tuple[str, ...]], asked: list[tuple[str, ...]]) -> Questions:
        text = "\0".join("\1".join(i + a) for i, a in zip(ids, asked, strict=True))
        key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        if key not in self.known:
            self.known[key] = Questions(ids, len(self.known) + len(self.merged))
            self.ids[id(self.known[key])] = ids
        return self.known[key]

    def join(self, parts: Sequence[tuple[Questions, Draws]]) -> tuple[Questions, Draws]:
        """Put the seeds of one row together: the mean where they asked the same questions, one after the other where not."""
        first = parts[0][0]
        if all(q is first for q, _ in parts):
            return first, np.mean([s for _, s in parts], axis=0) if len(parts) > 1 else parts[0][1]
        key = tuple(id(q) for q, _ in parts)
        if key not in self.merged:
            every = [i for q, _ in parts for i in self.ids[id(q)]]
            self.merged[key] = Questions(every, len(self.known) + len(self.merged))
        return self.merged[key], np.concatenate([s for _, s in parts])


def _slim(found: CellResult) -> dict[str, Any]:
    """Numbers of ``metrics.json`` that rows need."""
    if not found.metrics:
        return {}
    m = found.metrics
    flops = m.get("flops") or {}
    return {
        "tokens": m["tokens"],
        "kv_bytes": m.get("kv_bytes"),
        "flops": flops.get("counted", {}).get("total"),
        "mismatch": flops.get("mismatch", 0.0),
        "decoder": flops.get("tokens", {}).get("decoder"),
        "reported": _reported(m),
    }


def _reported(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value of a benchmark's own metric, unless it is the mean score of the answers."""
    name = metrics.get("main")
    given = (metrics.get("scores") or {}).get(name)
    if given is None or name == "accuracy":
        return None
    return str(name), given["value"] * (given.get("scale") or 1)


def _add(items: list[dict[str, Any]], item: dict[str, Any]) -> None:
    if item not in items:
        items.append(item)
