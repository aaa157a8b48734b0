"""What a sweep will cost, before it runs: FLOPs from the closed formula, seconds from stored cells or from this machine's speed.

Nothing is loaded: tokens of every decoder layer follow from a reducer's budget and the model's configuration. What cannot be known
that way (pictures that decide their number of tokens, a task whose size is not on record) is said, not guessed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtc import bind
from vtc.core import Facts, Reducer, Stage
from vtc.errors import StoreError, VtcError
from vtc.eval import flops
from vtc.eval.cells import Cell
from vtc.eval.config import ModelConfig
from vtc.eval.models import KNOWN, Outline, outline
from vtc.eval.questions import clips
from vtc.eval.run import Planned, Sweep
from vtc.eval.store import Store
from vtc.eval.worker import threads
from vtc.schedule import closest_count

TEXT = 64
"""Text tokens of a prompt that nobody has tokenized yet."""

ASSUMED_GPU = 1e14
"""FLOP/s assumed of a GPU that is not here: about a third of what the datasheet of an A100 promises in bfloat16."""

_BATCHED = 2.5
"""How much slower than one large matrix product a model runs on a CPU, roughly."""


def predict(reducer: Reducer | None, facts: Facts, slots: int) -> list[int]:
    """Return the visual tokens of every decoder layer that a reducer's budget promises for an image of ``slots`` tokens.

    Methods that find their own number, or only reach coarse grids, end up near it.
    """
    layers = [slots] * facts.layers
    if reducer is None:
        return layers
    for part in bind(reducer, facts).parts():
        if part.decides_itself:
            continue
        count = part.count(slots, facts)
        layers[part.layer :] = [min(n, count) for n in layers[part.layer :]]
    return layers


def settle(cell: Cell, known: Outline) -> Cell:
    """Return a cell for equal FLOPs with the budget that the formula gives it; any other as it is.

    Raises
    ------
    VtcError
        If even one token costs more than asked for.
    """
    if cell.flops is None or known.facts is None or known.slots is None:
        return cell
    facts, slots = known.facts, known.slots
    full = flops.language_flops(known.config, [slots * known.pieces + TEXT] * facts.layers).model

    def keep(tokens: int) -> int | float:
        return tokens if facts.tokens is not None else tokens / slots

    @functools.cache
    def cost(tokens: int) -> float:
        layers = predict(cell.keeping(keep(tokens)).reducer, facts, slots)
        return flops.language_flops(known.config, [n * known.pieces + TEXT for n in layers]).model / full

    return cell.keeping(keep(closest_count(cell.flops, slots, cost)))


def prompt_flops(reducer: Reducer | None, known: Outline) -> int | None:
    """FLOPs of one prompt's prefill, vision tower included where the formula knows it; None where the tokens are not known."""
    if known.facts is None or known.slots is None:
        return None
    facts = known.facts
    layers = predict(reducer, facts, known.slots)
    decoder = [n * known.pieces + TEXT for n in layers]
    if not flops.describes(known.config):
        return flops.language_flops(known.config, decoder).total
    grid = facts.grid[0] * facts.grid[1]
    views = max(1, round(known.slots * known.pieces / grid))
    parts = bind(reducer, facts).parts() if reducer is not None else ()
    share = layers[0] / known.slots if any(p.stage is Stage.IMAGE for p in parts) else 1.0
    patches = round(views * grid * share)
    tower = [round(grid * share) + int(facts.has_cls)] * (facts.feature_layer + 1)
    one = flops.closed_form(known.config, flops.Tokens(patches // views, tower, round(grid * share), decoder))
    return one.decoder + one.head + views * (one.tower + one.projector)


class Rates:
    """FLOP/s by model: from cells in the store where there are any, else from the device."""

    def __init__(self, store: Store | None, sweep: Sweep) -> None:
        self.measured: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        for item in sweep.planned if store is not None else ():
            if item.model.title not in self.measured:
                self._learn(store, sweep, item)

    def _learn(self, store: Store | None, sweep: Sweep, item: Planned) -> None:
        assert store is not None
        if not (store.cells / item.id).exists():
            return
        try:
            found = store.get(item.id, samples=False)
        except StoreError:
            return
        if found is None or not found.metrics.get("seconds") or not found.metrics.get("flops"):
            return
        n, one = found.metrics["n"], found.metrics["flops"]["counted"]["total"]
        if not one:
            return
        self.measured[item.model.title] = n * one / found.metrics["seconds"]
        self.notes[item.model.title] = "seconds from a cell that is in the store"

    def of(self, model: ModelConfig) -> float:
        """FLOP/s of a model."""
        if model.title not in self.measured:
            self.measured[model.title], self.notes[model.title] = _device_rate(model)
        return self.measured[model.title]


def _device_rate(model: ModelConfig) -> tuple[float, str]:
    gpu = torch.cuda.is_available() and model.device != "cpu"
    if not gpu and (model.name in KNOWN or model.device.startswith("cuda")):
        return ASSUMED_GPU, f"seconds on a GPU assumed to do {ASSUMED_GPU:.0e} FLOP/s, since there is none here"
    device = "cuda" if gpu else "cpu"
    return _matmul_rate(device), f"seconds from a matrix product timed on this machine's {'GPU' if gpu else 'CPU'}"


@functools.cache
def _matmul_rate(device: str) -> float:
    """FLOP/s of a few matrix products, slowed down by what a model's other operations take."""
    size = 4096 if device == "cuda" else 384
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    times = []
    with threads(1 if device == "cpu" else None):
        for _ in range(6):
            start = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / _BATCHED


def price(sweep: Sweep, store: Store | None, items: Sequence[Planned] | None = None) -> dict[str, Any]:
    """Return the cells of a sweep (or of a shard of it) with their state and estimated cost, as plain data.

    FLOPs are those of the prefills of all questions; seconds those of the accuracy pass and of the speed pass, without loading.
    """
    items = sweep.planned if items is None else items
    rates = Rates(store, sweep)
    stored = store.addresses() if store is not None else {}
    costs: dict[tuple[Any, ...], int | None] = {}
    rows: list[dict[str, Any]] = []
    unknown: set[str] = set()
    videos: set[str] = set()
    for item in items:
        known = outline(item.model)
        key = (item.model.title, item.cell.label, item.cell.budget)
        if key not in costs:
            try:
                costs[key] = prompt_flops(settle(item.cell, known).reducer, known)
            except VtcError:  # refused when it runs, with the reason
                costs[key] = None
        one, n = costs[key], sweep.size(item.task)
        total = one * n if one is not None and n is not None else None
        if n is None:
            unknown.add(item.task.title)
        if clips(item.task):  # so many frames, so many tokens: nothing in the file says
            total, one = None, None
            videos.add(item.task.title)
        settings = sweep.config.speed
        seconds = total / rates.of(item.model) if total is not None else None
        speed = None
        if settings and one is not None:
            pairs = settings.repeats + settings.warmup
            speed = pairs * 2 * one * settings.batch_size * (1 + 0.1 * settings.decode_steps) / rates.of(item.model)
        ids = stored.get(item.id.partition("-")[0], ())
        state = sweep.state(store, item) if item.id in ids else "to do"
        rows.append(
            {
                "model": item.model.title,
                "task": item.task.title,
                "seed": item.seed,
                "label": item.cell.label,
                "budget": item.cell.budget,
                "id": item.id,
                "state": state,
                "other_code": any(i != item.id for i in ids),
                "flops": total,
                "seconds": None if seconds is None else seconds + (speed or 0.0),
            }
        )
    notes = [f"{m.title}: {outline(m).note}" for m in sweep.config.all_models if outline(m).note]
    notes += [f"{m}: {note}" for m, note in rates.notes.items() if any(r["model"] == m and r["seconds"] for r in rows)]
    notes += [f"{task}: the number of questions is not known before its data are there" for task in sorted(unknown)]
    notes += [f"{task}: FLOPs of clips are not estimated, their tokens depend on the frames sampled" for task in sorted(videos)]
    if any(r["seconds"] is None for r in rows):
        notes.append("totals leave out the cells whose cost is not known")
    return {
        "questions": sum(sweep.size(t) or 0 for t in sweep.config.all_tasks),
        "cells": rows,
        "left_out": [vars(x) for x in sweep.left_out],
        "notes": notes,
    }


def plan_text(plan: dict[str, Any], root: Path) -> str:
    """Return a plan as lines to read."""
    rows = plan["cells"]
    several = [name for name in ("model", "task", "seed") if len({r[name] for r in rows}) > 1]
    widths = {name: max(len(str(r[name])) for r in rows) for name in ("label", "budget", *several)} if rows else {}
    lines = []
    for r in rows:
        where = "".join(f"{r[name]!s:<{widths[name]}}  " for name in several)
        state = r["state"] + (" (measured with other code before)" if r["other_code"] and r["state"] == "to do" else "")
        lines.append(
            f"{where}{r['label']:<{max(20, widths['label'])}} {r['budget']:>{max(8, widths['budget'])}}  {r['id']}  "
            f"{_flops(r['flops']):>9} {_time(r['seconds']):>8}  {state}"
        )
    for group, count in Counter((x["label"], x["model"], x["reason"]) for x in plan["left_out"]).items():
        lines.append(f"left out: {group[0]} on {group[1]} ({count} cells): {group[2]}")
    todo = [r for r in rows if r["state"] != "done"]
    known = [r for r in todo if r["flops"] is not None]
    cost = f"about {_flops(sum(r['flops'] for r in known))}FLOPs, {_time(sum(r['seconds'] for r in known))} on one worker"
    lines.append(
        f"{len(todo)} of {len(rows)} cells to run on {plan['questions']} questions, into {root}"
        + (f": {cost}" if known else ": cost not known" if todo else "")
    )
    return "\n".join([*lines, *(f"note: {n}" for n in plan["notes"])])


def _flops(value: float | None) -> str:
    if value is None:
        return "?"
    unit, scale = next(((u, s) for u, s in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)) if value >= s), ("M", 1e6))
    return f"{value / scale:.3g} {unit}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
