"""Running a sweep: one model in memory, an accuracy pass over all cells, then a speed pass.

The passes are separate because they want different things: accuracy wants large batches and all cores, timing wants one fixed
prompt, repeats, and an unreduced run right next to every reduced one.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import vtc
from vtc.core import Reducer
from vtc.errors import ConfigError, StoreError, VtcError
from vtc.eval import env, flops, speed
from vtc.eval.config import Cell, SweepConfig, cells
from vtc.eval.store import SCHEMA, CellResult, Store, cell_id
from vtc.families import family_of
from vtc.pocket import (
    POCKET_MODELS,
    Question,
    answer_questions,
    easy_vqa_questions,
    encode_questions,
    load_pocket,
    majority_baseline,
    pocket_path,
    scene_questions,
)


@dataclass(frozen=True)
class Planned:
    """A cell with its address and the settings that address hashes."""

    cell: Cell
    id: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a sweep did.

    Attributes
    ----------
    done, skipped, failed : int
        Cells finished now, found finished, and failed (in either pass).
    errors : tuple of str
        One line per failed cell.
    """

    done: int
    skipped: int
    failed: int
    errors: tuple[str, ...]


class Sweep:
    """One sweep, ready to run: model loaded, questions prepared, every cell checked against the model.

    Parameters
    ----------
    config : SweepConfig
        What to run.
    source : str
        Name of the file, for the record.

    Raises
    ------
    ConfigError
        If the model, the questions or a reducer of the file cannot be had, before anything is written.
    """

    def __init__(self, config: SweepConfig, source: str = "the sweep") -> None:
        self.config, self.source = config, source
        if config.model not in POCKET_MODELS:
            raise ConfigError(
                f"{source}: model: no embedded model is named '{config.model}' (use one of {', '.join(POCKET_MODELS)})"
            )
        self.questions = _questions(config, source)
        self.model, self.processor = load_pocket(config.model, device="cuda" if torch.cuda.is_available() else None)
        self.fixed = encode_questions(self.processor, self.questions[:1], 1)[0].inputs
        self.planned = self._plan()

    def _plan(self) -> list[Planned]:
        config = self.config
        task = {
            "questions": _digest(self.questions),
            "n": len(self.questions),
            "batch_size": config.batch_size,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
        }
        folder = pocket_path(config.model)
        model = {"name": config.model, "files": env.digest([folder / "config.json", folder / "model.safetensors"])}
        planned = []
        for cell in cells(config):
            reducer = None
            if cell.reducer is not None:
                code = env.reducer_version(self._bound(cell))
                reducer = {"name": cell.name, "options": dataclasses.asdict(cell.reducer), "code": code}
            data = {"schema": SCHEMA, "model": model, "task": task, "reducer": reducer, "engine": env.engine_version()}
            planned.append(Planned(cell, cell_id(data), data))
        return planned

    def _bound(self, cell: Cell) -> Reducer:
        """The reducer resolved for the model; an impossible one is refused here, before any cell runs."""
        try:
            with vtc.patch(self.model, cell.reducer) as handle:
                return handle.reducer
        except VtcError as error:
            key = cell.budget_key if isinstance(error, vtc.BudgetError) else cell.key
            raise ConfigError(f"{self.source}: {key}: {error}") from None

    # ------------------------------------------------------------------------------------------------------- states
    def state(self, store: Store | None, item: Planned) -> str:
        """Return ``"done"``, ``"speed missing"``, ``"damaged"``, ``"failed before"`` or ``"to do"``."""
        if store is None:
            return "to do"
        try:
            found = store.get(item.id)
        except StoreError:
            return "damaged"
        if found is None:
            return "to do"
        if found.error and not found.metrics:
            return "failed before"
        return "done" if self._has_speed(found) else "speed missing"

    def _has_speed(self, found: CellResult) -> bool:
        if self.config.speed is False:
            return True
        wanted = self.config.speed.model_dump()
        return found.speed is not None and found.speed["settings"] == wanted and found.speed["host"] == _host()

    # ---------------------------------------------------------------------------------------------------------- run
    def run(self, store: Store, console: Console | None = None) -> Outcome:
        """Run what is not in the store yet; a failing cell is recorded and the others go on."""
        console = console or Console(stderr=True)
        errors: dict[str, str] = {}
        touched: set[str] = set()
        bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        with store.locked(), bar, _threads(self.config.threads):
            todo = [item for item in self.planned if self._needs_accuracy(store, item, console)]
            store.write_sweep(self.record())
            self._accuracy_pass(store, todo, bar, console, errors, touched)
            if self.config.speed is not False:
                with _threads(self.config.speed.threads):
                    self._speed_pass(store, bar, console, errors, touched)
        done = len(touched - set(errors))
        return Outcome(done, len(self.planned) - len(touched | set(errors)), len(errors), tuple(errors.values()))

    def record(self) -> dict[str, Any]:
        """What ``sweep.json`` says: settings, provenance, and the cells in table order."""
        facts = family_of(self.model).facts
        data = self.config.data
        return {
            "schema": SCHEMA,
            "source": Path(self.source).name,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "config": self.config.model_dump(),
            "env": env.describe(self.config.seed),
            "model": {
                "name": self.config.model,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "decoder_layers": facts.layers,
                "visual_tokens": facts.tokens,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "attention": self.model.config.text_config._attn_implementation,
                "device": self.model.device.type,
            },
            "questions": {
                "scenes": 0 if data.scenes is None else sum(q.id.startswith("scene/") for q in self.questions),
                "easy_vqa": sum(q.id.startswith("easy/") for q in self.questions),
                "images": len({image_of(q.id) for q in self.questions}),
            },
            "constant_guess": majority_baseline(self.questions, self.questions),
            "cells": [
                {"id": p.id, "label": p.cell.label, "reducer": p.cell.name, "budget": p.cell.budget} for p in self.planned
            ],
        }

    def _needs_accuracy(self, store: Store, item: Planned, console: Console) -> bool:
        state = self.state(store, item)
        if state == "damaged":
            moved = store.quarantine(item.id)
            _say(console, item, f"was damaged: moved to {moved}, running it again", "yellow")
        return state in ("damaged", "failed before", "to do")

    def _accuracy_pass(
        self, store: Store, todo: Sequence[Planned], bar: Progress, console: Console, errors: dict[str, str], touched: set[str]
    ) -> None:
        if not todo:
            return
        where = env.describe(self.config.seed)
        batches = encode_questions(self.processor, self.questions, self.config.batch_size)
        task = bar.add_task("accuracy", total=len(todo) * len(self.questions))
        for number, item in enumerate(todo):
            bar.update(
                task,
                description=f"accuracy: {escape(item.cell.label)} {item.cell.budget}",
                completed=number * len(self.questions),
            )
            try:
                metrics, samples = self._answer(item.cell, batches, lambda: bar.advance(task, self.config.batch_size))
            except Exception as error:  # noqa: BLE001  recorded; the other cells go on, and the exit code tells
                vtc.unpatch(self.model)
                errors[item.id] = f"{item.cell.label} {item.cell.budget}: {type(error).__name__}: {error}"
                store.put_failure(item.id, item.config, where, f"{type(error).__name__}: {error}")
                _say(console, item, f"failed: {type(error).__name__}: {error}", "red")
                continue
            store.put(item.id, item.config, where, metrics, samples)
            touched.add(item.id)
            tokens = metrics["tokens"]
            _say(console, item, f"accuracy {100 * metrics['accuracy']:.1f} %, {tokens['kept']:.0f} visual tokens", "green")
        bar.update(task, completed=len(todo) * len(self.questions), description="accuracy")

    def _answer(self, cell: Cell, batches: Sequence[Any], advance: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Answer all questions under one reducer; count tokens, FLOPs and cache bytes."""
        handle = vtc.patch(self.model, cell.reducer) if cell.reducer is not None else None
        tokens: dict[int, tuple[int, int, float]] = {}
        try:
            remaining = iter(batches)

            def after_batch(_done: int, _total: int) -> None:
                batch = next(remaining)
                for row, position in enumerate(batch.positions):
                    tokens[position] = self._tokens(handle, batch.inputs["input_ids"], row)
                advance()

            answers = answer_questions(
                self.model,
                self.processor,
                list(batches),
                max_new_tokens=self.config.max_new_tokens,
                seed=self.config.seed,
                progress=after_batch,
            )
            inputs = _to(self.fixed, self.model)
            counted = flops.count(self.model, inputs, handle)
        finally:
            if handle is not None:
                handle.remove()
        samples = [
            {
                "id": a.id,
                "image": image_of(a.id),
                "type": a.type,
                "gold": a.gold,
                "answer": a.text,
                "correct": a.correct,
                "slots": tokens[i][0],
                "kept": tokens[i][1],
                "avg_tokens": tokens[i][2],
            }
            for i, a in enumerate(answers)
        ]
        metrics = {
            **_score(samples),
            "tokens": {key: sum(s[name] for s in samples) / len(samples) for key, name in _TOKENS.items()},
            "flops": {
                "counted": counted.counted.to_dict(),
                "formula": counted.formula.to_dict(),
                "mismatch": counted.mismatch,
                "tokens": dataclasses.asdict(counted.tokens),
            },
            "kv_bytes": speed.kv_cache_bytes(counted.cache),
        }
        return metrics, samples

    def _tokens(self, handle: Any, ids: Tensor, row: int) -> tuple[int, int, float]:
        """Slots, tokens entering the last layer, and layer average of one question."""
        if handle is None:
            slots = int((ids[row] == self.model.config.image_token_id).sum())
            return slots, slots, float(slots)
        images = [i for i in handle.stats.last.images if i.row == row]
        return sum(i.slots for i in images), sum(i.kept for i in images), sum(i.avg_tokens for i in images)

    def _speed_pass(self, store: Store, bar: Progress, console: Console, errors: dict[str, str], touched: set[str]) -> None:
        settings = self.config.speed
        assert settings is not False
        todo = []
        for item in self.planned:
            if item.id in errors:
                continue
            found = store.get(item.id)
            if found is not None and not self._has_speed(found):
                todo.append(item)
        if not todo:
            return
        inputs = {k: v.repeat(settings.batch_size, *[1] * (v.dim() - 1)) for k, v in self.fixed.items()}
        runs = settings.repeats + settings.warmup
        task = bar.add_task("speed", total=len(todo) * runs)
        for number, item in enumerate(todo):
            bar.update(task, description=f"speed: {escape(item.cell.label)} {item.cell.budget}", completed=number * runs)
            try:
                measured = speed.measure(
                    self.model,
                    inputs,
                    item.cell.reducer,
                    repeats=settings.repeats,
                    warmup=settings.warmup,
                    decode_steps=settings.decode_steps,
                    progress=lambda: bar.advance(task),
                )
            except Exception as error:  # noqa: BLE001  as above
                vtc.unpatch(self.model)
                message = f"{type(error).__name__}: {error}"
                errors[item.id] = f"{item.cell.label} {item.cell.budget}: speed pass: {message}"
                store.put_speed(item.id, {}, f"speed pass: {message}")
                _say(console, item, f"speed pass failed: {message}", "red")
                continue
            where = env.describe(self.config.seed)
            store.put_speed(item.id, {"settings": settings.model_dump(), "host": _host(), "env": where, **measured})
            touched.add(item.id)
            prefill, times = measured["reduced"]["prefill_ms"]["value"], measured["speedup"]["prefill"]["value"]
            _say(console, item, f"prefill {prefill:.1f} ms, {times:.2f} times as fast as unreduced", "green")
        bar.update(task, completed=len(todo) * runs, description="speed")


_TOKENS = {"slots": "slots", "kept": "kept", "avg": "avg_tokens"}


def image_of(question: str) -> str:
    """Image part of a question's id (all but the last component)."""
    return question.rpartition("/")[0] or question


def _say(console: Console, item: Planned, text: str, style: str) -> None:
    name = escape(f"{item.cell.label:<18} {item.cell.budget:>6}")
    console.print(f"[bold]{name}[/]  [{style}]{escape(text)}[/]", highlight=False, soft_wrap=True)


def _score(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_type: dict[str, list[bool]] = {}
    for sample in samples:
        by_type.setdefault(sample["type"], []).append(sample["correct"])
    correct = sum(bool(s["correct"]) for s in samples)
    return {
        "n": len(samples),
        "correct": correct,
        "accuracy": correct / len(samples),
        "by_type": {
            kind: {"n": len(marks), "correct": sum(marks), "accuracy": sum(marks) / len(marks)}
            for kind, marks in by_type.items()
        },
    }


def _questions(config: SweepConfig, source: str) -> list[Question]:
    found: list[Question] = []
    try:
        if (scenes := config.data.scenes) is not None:
            found += scene_questions(scenes.split, scenes.n, scenes.types, scenes.seed)
    except ValueError as error:
        raise ConfigError(f"{source}: data.scenes: {error}") from None
    try:
        if (easy := config.data.easy_vqa) is not None:
            found += easy_vqa_questions(easy.split, easy.n)
    except ValueError as error:
        raise ConfigError(f"{source}: data.easy_vqa: {error}") from None
    return found


def _digest(questions: Sequence[Question]) -> str:
    """Hash of what is asked, pictures included: another generator makes other cells."""
    total = hashlib.sha256()
    for q in questions:
        total.update("\0".join((q.id, q.type, q.prompt, q.answer, str(q.image.size))).encode() + q.image.tobytes())
    return total.hexdigest()[:16]


def _host() -> dict[str, Any]:
    """The part of the environment that makes timings comparable."""
    found = env.machine()
    return {key: found[key] for key in ("cpu", "cores", "gpu")} | {"torch": torch.__version__}


def _to(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device) for k, v in inputs.items()}


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set torch's CPU threads for a while, at most the cores this process may use."""
    before = torch.get_num_threads()
    if number is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or number
        torch.set_num_threads(min(number, cores))
    try:
        yield
    finally:
        torch.set_num_threads(before)
