"""Result stores made by hand: what tables, plots and reports are tested on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vtc.eval.store import SCHEMA, STATUS, Store, cell_id

STORE = Path(__file__).parent / "golden_store"
ENV = {
    "commit": {"id": "0123456789abcdef", "dirty": False},
    "machine": {"cpu": "Example CPU", "cores": 2, "torch_threads": 1, "gpu": None, "system": "Linux"},
    "versions": {"python": "3.11.7", "vtc": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0", "numpy": "2.0.0"},
    "seed": 0,
}
TYPES = ("color", "count")
# label, reducer, budget, right answers of 40, tokens kept, layer average, FLOPs, prefill ms (None: not timed)
CELLS = (
    ("none", "none", "", 36, 196, 196.0, 930_000_000, 12.0),
    ("random", "random", "49", 27, 49, 49.0, 613_000_000, 6.0),
    ("uniform", "uniform", "49", 28, 49, 49.0, 613_000_000, 6.2),
    ("downsample", "downsample", "49", 24, 49, 49.0, 214_000_000, 6.1),
    ("fastv layer=2", "fastv", "49", 34, 49, 122.5, 771_000_000, None),
    ("random", "random", "11", 20, 11, 11.0, 545_000_000, 4.0),
    ("divprune", "divprune", "11", 0, 0, 0.0, 0, None),  # failed
)


def result(right: int, n: int = 1) -> tuple[dict, list[dict]]:
    """Metrics and samples of the fewest keys a store takes, with ``right`` of ``n`` answers right."""
    samples = [{"id": f"a/{i}", "image": "a", "type": "color", "correct": i < right, "answer": "ja – sí"} for i in range(n)]
    tokens = {"slots": 196.0, "kept": 4.0, "avg": 4.0}
    return {"n": n, "correct": right, "accuracy": right / n, "tokens": tokens}, samples


def bless(folder: Path) -> None:
    """Make the checksums of a cell those of its files, as whoever changed them on purpose would."""
    status = json.loads((folder / STATUS).read_text())
    files = [p for p in folder.iterdir() if p.name != STATUS and p.is_file() and not p.is_symlink()]  # a pipe would never end
    status["files"] |= {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / STATUS).write_text(json.dumps(status))


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.2 * value}


def timings(ms: float, kv: int) -> dict:
    parts = {f"{p}_ms": interval(x) for p, x in (("vision", 14.0), ("prefill", ms), ("ttft", 14.5 + ms), ("decode", 1.25))}
    return {**parts, "reducer_ms": interval(0.4), "kv_bytes": kv, "peak_bytes": None}


def timed(ms: float, avg: float) -> dict:
    """Contents of ``speed.json``."""
    return {
        "settings": {"repeats": 7, "warmup": 2, "decode_steps": 4, "batch_size": 1, "threads": 1},
        "host": {},
        "env": ENV,
        "batch_size": 1,
        "prompt_tokens": 207,
        "unreduced": timings(12.0, 1),
        "reduced": timings(ms, int(avg * 4096)),
        "speedup": {p: interval(12.0 / ms) for p in ("vision", "prefill", "ttft", "decode")},
    }


def finish(store: Store, listed: list, **more) -> Store:
    """Write ``sweep.json``."""
    store.write_sweep(
        {
            "schema": SCHEMA,
            "source": "golden.yaml",
            "written": "2026-11-21T12:00:00+00:00",
            "config": {"seed": 0, "bootstrap": {"resamples": 400, "confidence": 0.95}},
            "env": ENV,
            "model": {"name": "pocket", "parameters": 1_902_848, "decoder_layers": 4, "visual_tokens": 196},
            "questions": {"scenes": 0, "easy_vqa": 0, "images": 0},
            "cells": listed,
            **more,
        }
    )
    return store


def fixed_store(root: Path, cells=CELLS, types=TYPES, mismatch: float = 0.0) -> Store:
    store = Store(root, create=True)
    listed = []
    for label, reducer, budget, right, kept, avg, count, ms in cells:
        config = {"schema": SCHEMA, "reducer": [label, budget]}
        cell = cell_id(config)
        listed.append({"id": cell, "label": label, "reducer": reducer, "budget": budget})
        if not count:
            store.put_failure(cell, config, ENV, "RuntimeError: out of luck")
            continue
        marks = [(7 * i) % 40 < right for i in range(40)]
        samples = [
            {"id": f"scene/{i // 4}/{i}", "image": f"scene/{i // 4}", "type": types[i % 2], "correct": ok}
            for i, ok in enumerate(marks)
        ]
        by_type = {t: {"n": 20, "correct": sum(marks[j::2]), "accuracy": sum(marks[j::2]) / 20} for j, t in enumerate(types)}
        parts = {"tower": 1, "projector": 1, "decoder": 1, "head": 1, "reducer": 0, "total": count}
        metrics = {
            "n": 40,
            "correct": right,
            "accuracy": right / 40,
            "by_type": by_type,
            "tokens": {"slots": 196.0, "kept": float(kept), "avg": avg},
            "flops": {"counted": parts, "formula": parts, "mismatch": mismatch if reducer == "random" else 0.0, "tokens": {}},
            "kv_bytes": int(avg * 4096),
        }
        store.put(cell, config, ENV, metrics, samples)
        if ms is not None:
            store.put_speed(cell, timed(ms, avg))
    return finish(
        store,
        listed,
        source="demo.yaml",
        config={"seed": 0, "bootstrap": {"resamples": 500, "confidence": 0.95}},
        questions={"scenes": 40, "easy_vqa": 0, "images": 10},
        constant_guess=dict.fromkeys(types, 0.25),
    )


def cell(store: Store, listed: list, label: str, reducer: str, budget: str, scores, *, task="scenes", seed=0, **more) -> str:
    """Put a cell with the given scores (one per question) into a store; ``groups``: their images, by default two questions each."""
    code, groups = more.pop("code", "c0"), more.pop("groups", None) or [i // 2 for i in range(len(scores))]
    config = {
        "schema": SCHEMA,
        "model": {"name": more.get("model", "pocket")},
        "task": {"name": task, "seed": seed},
        "reducer": None
        if reducer == "none"
        else {"name": reducer, "options": {"budget": budget, "label": label}, "code": code},
        "engine": more.pop("engine", "e0"),
    }
    kept = more.pop("kept", 196 if reducer == "none" else int(budget))
    kinds, golds = ("color", "count"), ("red", "2")
    samples = [
        {
            "id": f"{task}/{groups[i]}/{i}",
            "image": f"{task}/{groups[i]}",
            "type": kinds[i % 2],
            "gold": golds[i % 2],
            "answer": "red",
            "correct": score == 1,
            "score": score,
        }
        for i, score in enumerate(scores)
    ]
    avg = more.pop("avg", kept)
    count = more.pop("flops", int(5e8 + 3e6 * avg))
    parts = {"tower": 1, "projector": 1, "decoder": 1, "head": 1, "reducer": 0, "total": count}
    metrics = {
        "n": len(samples),
        "correct": sum(s["correct"] for s in samples),
        "accuracy": sum(scores) / len(scores),
        "by_type": {},
        "tokens": {"slots": 196.0, "kept": float(kept), "avg": float(avg)},
        "flops": {"counted": parts, "formula": parts, "mismatch": 0.0, "tokens": {"decoder": [int(avg) + 12] * 4}},
        "kv_bytes": int(avg * 4096),
    }
    name = cell_id(config)
    store.put(name, config, {**ENV, "seed": seed}, metrics, samples)
    ms = more.pop("ms", None)
    if ms is not None:
        store.put_speed(name, timed(ms, avg))
    listed.append({"id": name, "label": label, "reducer": reducer, "budget": budget, "task": task, "seed": seed, **more})
    return name


def marks(right: int, n: int = 24, step: int = 7) -> list[float]:
    """``right`` of ``n`` questions, spread out."""
    return [float((step * i) % n < right) for i in range(n)]


def golden_store(root: Path) -> Store:
    """Two tasks (one of them graded), two seeds of random, two budgets, two tokens counts of downsample that lie close."""
    store, listed = Store(root, create=True), []
    for task, half in (("scenes", 0.0), ("reading", 0.5)):
        cell(store, listed, "none", "none", "", marks(22), task=task, ms=12.0)
        for budget, right in (("49", (16, 20, 12)), ("11", (10, 18, 8))):
            for seed in (0, 1):
                cell(
                    store, listed, "random", "random", budget, marks(right[0], step=5 + 6 * seed), task=task, seed=seed, ms=6.0
                )
            cell(store, listed, "downsample", "downsample", budget, marks(right[2], step=11), task=task, ms=5.5)
            graded = [max(x, half) for x in marks(right[1])]
            cell(
                store, listed, "fastv layer=2", "fastv", budget, graded, task=task, avg=122.5 if budget == "49" else 49, ms=8.0
            )
        cell(store, listed, "downsample again", "downsample", "50", marks(11, step=13), task=task, kept=50)
    return finish(store, listed)
