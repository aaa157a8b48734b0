"""Running a sweep: which cells there are, which are still to do, and who does them.

Cells are planned from configurations alone, without weights. The accuracy pass over all cells comes first, then the speed pass:
accuracy wants large batches and every core, timing wants one fixed prompt, repeats, and an unreduced run right next to every
reduced one. The runner claims a cell in the store, gives it to an executor, and writes what comes back.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import vtc
from vtc import bind
from vtc.core import Facts
from vtc.errors import ConfigError, DamagedCellError, VtcError
from vtc.eval import env, executors
from vtc.eval.cells import Cell, cells, reducer_identity
from vtc.eval.config import BASELINES, ModelConfig, SweepConfig, TaskConfig
from vtc.eval.formats import clean
from vtc.eval.models import check_available, check_prompts, fetch, identity, outline
from vtc.eval.questions import check_data, digest, image_of, question_count, task_questions
from vtc.eval.stats import WEIGHTS
from vtc.eval.store import SCHEMA, CellResult, Claim, Holder, Store, cell_id
from vtc.eval.worker import Job, Outcome, host
from vtc.pocket import Question, majority_baseline

_NOT_MINE = 0.5
"""Seconds between looks at cells that another runner works on."""

_SAY_AFTER = 10.0
"""Seconds of waiting for another runner before a line says for whom."""


@dataclass(frozen=True)
class Planned:
    """A cell on a model and a task, with its address and the settings that address hashes."""

    cell: Cell
    model: ModelConfig
    task: TaskConfig
    seed: int
    id: str
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class LeftOut:
    """A row of ``reducers: all``, or a baseline, that a model refuses."""

    model: str
    label: str
    budget: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """What a sweep did.

    Attributes
    ----------
    done, skipped, failed : int
        Cells finished now, found finished (or finished by another runner meanwhile), and failed (in either pass).
    errors : tuple of str
        One line per failed cell.
    sweep : str
        Name of the sweep's record in the store, for :meth:`vtc.eval.store.Store.at`.
    """

    done: int
    skipped: int
    failed: int
    errors: tuple[str, ...]
    sweep: str = ""


class Sweep:
    """One sweep, planned: every cell checked against what is known of its model, every question made.

    Parameters
    ----------
    config : SweepConfig
        What to run.
    source : str
        Name of the file, for the record.

    Attributes
    ----------
    planned : list of Planned
        Every cell, in table order: by model, task and seed.
    left_out : list of LeftOut
        Rows of ``reducers: all``, and baselines, that a model refuses.
    anywhere : bool
        Timings of any machine will do, not of this one only: those of a cluster come from its nodes.

    Raises
    ------
    ConfigError
        If the questions or a reducer of the file cannot be had, before anything is written.
    """

    def __init__(self, config: SweepConfig, source: str = "the sweep") -> None:
        self.config, self.source, self.anywhere = config, source, False
        self.questions: dict[str, list[Question]] = {}
        for task in config.all_tasks:
            if task.kind != "lmms":
                try:
                    self.questions[task.title] = task_questions(task)
                except VtcError as error:
                    raise ConfigError(f"{source}: {error}") from None
        self.left_out: list[LeftOut] = []
        self.planned = self._plan()

    def _plan(self) -> list[Planned]:
        config, planned = self.config, []
        rows = cells(config)
        seeded = {seed: [c.seeded(seed) for c in rows] for seed in config.all_seeds}
        engine = env.engine_version()
        tasks = {t.title: self._task(t) for t in config.all_tasks}
        for model in config.all_models:
            facts, identified = outline(model).facts, identity(model)
            refused = {n for n, c in enumerate(rows) if not self._fits(model, c, facts)}
            for task in config.all_tasks:
                for seed in config.all_seeds:
                    asked = {**tasks[task.title], "seed": seed}
                    for n, cell in enumerate(seeded[seed]):
                        if n in refused:
                            continue
                        data = {
                            "schema": SCHEMA,
                            "model": identified,
                            "task": asked,
                            "reducer": reducer_identity(cell.name, cell.reducer, cell.flops),
                            "engine": engine,
                        }
                        planned.append(Planned(cell, model, task, seed, cell_id(data), data))
        return planned

    def _task(self, task: TaskConfig) -> dict[str, Any]:
        """What of a task makes results comparable, as plain data."""
        config = self.config
        common = {"batch_size": config.batch_size, "max_new_tokens": task.max_new_tokens or config.max_new_tokens}
        if task.kind == "lmms":
            version = importlib.metadata.version("lmms-eval")
            common["max_new_tokens"] = task.max_new_tokens
            return {"lmms": task.lmms, "limit": task.n, "metric": task.metric, "version": version, **common}
        questions = self.questions[task.title]
        return {"questions": digest(questions), "n": len(questions), **common}

    def _fits(self, model: ModelConfig, cell: Cell, facts: Facts | None) -> bool:
        """Whether a model can serve a row; one that the file names is refused here, before any cell runs."""
        if cell.reducer is None or facts is None:
            return True
        try:
            bind(cell.reducer, facts)
        except VtcError as error:
            reason = str(error).partition("; these reducers work here")[0]
            refused = isinstance(error, (vtc.UnsupportedFeatureError, vtc.UnsupportedSignalError))
            if cell.optional or (cell.name in BASELINES and refused):  # nobody asked for this very row
                self.left_out.append(LeftOut(model.title, cell.label, cell.budget, reason))
                return False
            key = cell.budget_key if isinstance(error, vtc.BudgetError) else cell.key
            where = f" on '{model.title}'" if self.config.models else ""
            raise ConfigError(f"{key}{where}: {error}") from None
        return True

    def check_data(self) -> None:
        """Make sure that the versions of the models are known and the data sets of lmms-eval's tasks are there.

        Nothing has run yet. Where the hub had to be asked for a model's version, the plan is made again.

        Raises
        ------
        VtcError
            With what to prepare.
        """
        for task in self.config.all_tasks:
            if task.kind == "lmms":
                check_data(task)
        if any([fetch(model) for model in self.config.all_models]):  # a list: all of them are asked
            self.left_out = []
            self.planned = self._plan()

    def check_models(self) -> None:
        """Make sure that every model can be had on this machine, and asked the questions of own data, before any is loaded.

        Raises
        ------
        VtcError
            With what to do instead.
        """
        own = [q for t in self.config.all_tasks if t.kind == "files" for q in self.questions[t.title]]
        for model in self.config.all_models:
            check_available(model)
            if own:
                check_prompts(model, own)
        draws, most = self.config.bootstrap.resamples, max(map(len, self.questions.values()), default=0)
        if draws * most > WEIGHTS:
            raise ConfigError(
                f"{draws} bootstrap resamples of {most} questions need too much memory: set `bootstrap.resamples` lower"
            )

    # ------------------------------------------------------------------------------------------------------- states
    def state(self, store: Store | None, item: Planned) -> str:
        """Return ``"done"``, ``"speed missing"``, ``"damaged"``, ``"failed before"`` or ``"to do"``."""
        if store is None:
            return "to do"
        try:
            found = store.get(item.id, samples=False)
        except DamagedCellError:
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
        timed = found.speed
        return timed is not None and timed["settings"] == wanted and (self.anywhere or timed["host"] == host())

    def shard(self, number: int, of: int) -> list[Planned]:
        """Return every ``of``-th cell from the ``number``-th (1-based) on: the shards together are the sweep, none twice."""
        return self.planned[number - 1 :: of]

    # ---------------------------------------------------------------------------------------------------------- run
    def run(
        self,
        store: Store,
        console: Console | None = None,
        *,
        executor: executors.Executor | None = None,
        only: Sequence[Planned] | None = None,
        as_json: bool = False,
    ) -> Summary:
        """Run what is not in the store yet; a failing cell is recorded and the others go on.

        Parameters
        ----------
        store : Store
            Where results go; other runners may use it at the same time.
        console : Console or None
            For progress; standard error when None.
        executor : Executor or None
            Where the jobs run; in this process when None.
        only : sequence of Planned or None
            A shard of :attr:`planned`; all of it when None.
        as_json : bool
            Print one JSON object per finished cell instead of a line to read.
        """
        console = console or Console(stderr=True)
        own = executor is None
        executor = executor or executors.InProcess()
        self.anywhere = executor.remote
        items = list(self.planned if only is None else only)
        store.sweep_up()
        name = store.write_sweep(self.record())
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
        runner = _Runner(self, store, executor, bar, console, as_json)
        try:
            runner.announce(name)
            with bar:
                runner.accuracy(items)
                if self.config.speed is not False:
                    runner.speed(items)
            runner.others(name)
        finally:
            runner.release()
            if own:
                executor.close()
        errors, touched = runner.errors, runner.touched
        skipped = len(items) - len(touched | set(errors))
        return Summary(len(touched - set(errors)), skipped, len(errors), tuple(errors.values()), name)

    def job(self, item: Planned, kind: str, keep: int | float | None = None) -> Job:
        """Return what a worker is told."""
        config, timed = self.config, kind == "speed"
        return Job(
            item.id,
            kind,  # type: ignore[arg-type]
            item.model,
            item.task,
            item.cell,
            item.seed,
            config.batch_size,
            config.max_new_tokens,
            config.speed.threads if timed and config.speed else config.threads,
            item.config,
            config.speed if timed and config.speed else None,
            keep,
        )

    def record(self) -> dict[str, Any]:
        """What ``sweep.json`` says: settings, provenance, and the cells in table order."""
        models = [_outlined(m) for m in self.config.all_models]
        tasks = [self._asked(t) for t in self.config.all_tasks]
        guesses = {t["name"]: t.pop("constant_guess") for t in tasks}
        several = len(guesses) > 1
        return {
            "schema": SCHEMA,
            "source": Path(self.source).name,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "config": self.config.model_dump() | {"seeds": self.config.all_seeds},
            "env": env.describe(self.config.seed),
            "model": models[0],
            "models": models,
            "questions": {key: sum(t[key] for t in tasks) for key in ("scenes", "easy_vqa", "images")},
            "tasks": tasks,
            "constant_guess": {f"{t}: {k}" if several else k: v for t, g in guesses.items() for k, v in g.items()},
            "left_out": [dataclasses.asdict(x) for x in self.left_out],
            "cells": [
                {
                    "id": p.id,
                    "label": p.cell.label,
                    "reducer": p.cell.name,
                    "budget": p.cell.budget,
                    "model": p.model.title,
                    "task": p.task.title,
                    "seed": p.seed,
                }
                for p in self.planned
            ],
        }

    def size(self, task: TaskConfig) -> int | None:
        """Number of questions of a task, where that is known."""
        return question_count(task) if task.kind == "lmms" else len(self.questions[task.title])

    def _asked(self, task: TaskConfig) -> dict[str, Any]:
        questions = self.questions.get(task.title, [])
        sources = [q.id.partition("/")[0] for q in questions]
        return {
            "name": task.title,
            "source": task.name,
            "kind": task.kind,
            "questions": self.size(task),
            "images": len({image_of(q.id) for q in questions}),
            "scenes": sources.count("scene") if task.kind == "questions" else 0,
            "easy_vqa": sources.count("easy") if task.kind == "questions" else 0,
            "constant_guess": majority_baseline(questions, questions),
        }


def _outlined(model: ModelConfig) -> dict[str, Any]:
    """What a table says of a model; the same whether or not it has been loaded."""
    known = outline(model)
    return {
        "name": model.title,
        "source": model.name,
        "parameters": known.parameters,
        "decoder_layers": known.facts.layers if known.facts else None,
        "visual_tokens": known.facts.tokens if known.facts else None,
    }


class _Runner:
    """Takes cells through an executor into a store."""

    def __init__(
        self, sweep: Sweep, store: Store, executor: executors.Executor, bar: Progress, console: Console, as_json: bool
    ) -> None:
        self.sweep, self.store, self.executor = sweep, store, executor
        self.bar, self.console, self.as_json = bar, console, as_json
        self.errors: dict[str, str] = {}
        self.touched: set[str] = set()
        self.held: dict[str, list[Claim]] = {}
        self.here: Claim | None = None
        self.seen: set[str] = set()
        self.began = 0

    def announce(self, name: str) -> None:
        """Say in the store that a runner works on the sweep ``name``, and here who else works in the store."""
        self.here = self.store.announce(name, Path(self.sweep.source).name)
        self.began = self.store.written(name)
        for holder in self.store.runners(self.here):
            if holder.sweep == name:
                text = f"{holder} works on the same sweep: every cell is done by one of the runners"
            else:
                text = f"{holder} works in this store on another sweep ({holder.source}): this one is reported by itself"
            self.seen.add(holder.sweep)
            self._note(f"{text}.", "others")

    def others(self, name: str) -> None:
        """Say which other sweeps began in the store since this one did."""
        for other, (source, written) in self.store.sweeps().items():
            if other != name and written >= self.began and other not in self.seen:
                text = f"meanwhile another sweep ({source}) began in this store: what follows is this one's"
                self._note(f"{text} (again: vtc table --sweep {name})", "others")

    def release(self, cell: str | None = None) -> None:
        """Give back the claim on one cell, or all claims."""
        for name in [cell] if cell is not None else list(self.held):
            for claim in self.held.pop(name, []):
                claim.release()
        if cell is None and self.here is not None:
            self.here.release()

    # --------------------------------------------------------------------------------------------------------- passes
    def accuracy(self, items: Sequence[Planned]) -> None:
        """Bring every cell's answers into the store."""
        before = {p.id: self.sweep.state(self.store, p) for p in items}
        todo = [p for p in items if before[p.id] not in ("done", "speed missing")]
        self._flag(todo)

        def start(item: Planned) -> Job | None:
            state = self.sweep.state(self.store, item)
            if state in ("done", "speed missing"):  # another runner did it
                return None
            if state == "failed before" and before[item.id] != "failed before":
                found = self.store.get(item.id, samples=False)
                self.errors[item.id] = f"{self._name(item)}: {found.error if found else 'failed'} (in another runner)"
                return None
            if state == "damaged":
                moved = self.store.quarantine(item.id)
                self._say(item, f"was damaged: moved to {moved}, running it again", "yellow", "quarantined")
            return self.sweep.job(item, "accuracy")

        def finish(item: Planned, outcome: Outcome) -> None:
            if outcome.error:
                self.errors[item.id] = f"{self._name(item)}: {outcome.error}"
                self.store.put_failure(item.id, item.config, outcome.env or env.describe(item.seed), outcome.error)
                self._say(item, f"failed: {outcome.error}", "red", "failed")
                return
            metrics, samples = outcome.data["metrics"], outcome.data["samples"]
            try:
                self.store.put(item.id, item.config, outcome.env, metrics, samples)
            except DamagedCellError as error:
                finish(item, Outcome({}, outcome.env, str(error)))
                return
            self.touched.add(item.id)
            self._say(
                item, _accuracy_line(metrics), "green", "accuracy", accuracy=metrics["accuracy"], seconds=metrics["seconds"]
            )

        sizes = {p.id: self.sweep.size(p.task) or 1 for p in todo}
        self._pass("accuracy", todo, sizes, start, finish, self.executor.slots)

    def speed(self, items: Sequence[Planned]) -> None:
        """Bring every cell's timings into the store: one at a time on one machine, whoever runs."""
        settings = self.sweep.config.speed
        assert settings is not False
        todo = [p for p in items if p.id not in self.errors and self.sweep.state(self.store, p) == "speed missing"]

        def start(item: Planned) -> Job | None:
            if self.sweep.state(self.store, item) != "speed missing":
                return None
            turn = self.store.claim(turn_of_this_machine())
            if turn is None:
                raise _BusyError
            self.held[item.id].append(turn)
            found = self.store.get(item.id, samples=False)
            matched = found.metrics.get("flops_budget") if found else None
            return self.sweep.job(item, "speed", matched["keep"] if matched else None)

        def finish(item: Planned, outcome: Outcome) -> None:
            if outcome.error:
                self.errors[item.id] = f"{self._name(item)}: speed pass: {outcome.error}"
                self.store.put_speed(item.id, {}, f"speed pass: {outcome.error}")
                self._say(item, f"speed pass failed: {outcome.error}", "red", "failed")
                return
            measured = outcome.data
            try:
                self.store.put_speed(item.id, measured)
            except DamagedCellError as error:
                finish(item, Outcome({}, outcome.env, str(error)))
                return
            self.touched.add(item.id)
            prefill, times = measured["reduced"]["prefill_ms"]["value"], measured["speedup"]["prefill"]["value"]
            text = f"prefill {prefill:.1f} ms, {times:.2f} times as fast as unreduced"
            self._say(item, text, "green", "speed", prefill_ms=prefill, speedup=times)

        sizes = dict.fromkeys((p.id for p in todo), settings.repeats + settings.warmup)
        self._pass("speed", todo, sizes, start, finish, 1)

    def _pass(self, name: str, todo: Sequence[Planned], sizes: dict[str, int], start: Any, finish: Any, slots: int) -> None:
        """Claim, run and write until nothing is left; what another runner works on is looked at again later."""
        if not todo:
            return
        waiting, running = list(todo), {}
        finished = 0
        patience = _Patience(self)
        task = self.bar.add_task(name, total=sum(sizes.values()))

        def done(item: Planned) -> None:
            nonlocal finished
            self.release(item.id)
            finished += sizes[item.id]
            self.bar.update(task, completed=finished)

        while waiting or running:
            claimed, busy = 0, False
            for item in list(waiting):
                if len(running) >= slots:
                    break
                lock = self.store.claim(item.id)
                if lock is None:
                    continue
                self.held[item.id] = [lock]
                try:
                    job = start(item)
                except _BusyError:
                    self.release(item.id)
                    busy = True
                    break
                waiting.remove(item)
                claimed += 1
                if job is None:
                    done(item)
                    continue
                self.bar.update(task, description=f"{name}: {escape(self._name(item))}")
                running[item.id] = item
                self.executor.submit(job, _advance(self.bar, task, finished))
            if running:
                for job, outcome in self.executor.wait():
                    item = running.pop(job.id)
                    finish(item, outcome)
                    done(item)
            elif waiting and not claimed:
                patience.wait(waiting, busy)
            if running or claimed:
                patience.reset()
        self.bar.update(task, description=name)

    # -------------------------------------------------------------------------------------------------------- talking
    def _name(self, item: Planned) -> str:
        config = self.sweep.config
        where = [
            text
            for text, several in (
                (item.model.title, len(config.all_models) > 1),
                (item.task.title, len(config.all_tasks) > 1),
                (f"seed {item.seed}", len(config.all_seeds) > 1),
            )
            if several
        ]
        return f"{item.cell.label} {item.cell.budget}".strip() + (f" ({', '.join(where)})" if where else "")

    def _say(self, item: Planned, text: str, style: str, event: str, **data: Any) -> None:
        if self.as_json:
            said = {"event": event, "cell": item.id, "name": self._name(item), **data}
            self.console.print(
                json.dumps(said if data else {**said, "text": text}), markup=False, highlight=False, soft_wrap=True
            )
            return
        plain = self._name(item) == f"{item.cell.label} {item.cell.budget}".strip()
        name = f"{item.cell.label:<18} {item.cell.budget:>6}" if plain else f"{self._name(item):<40}"
        self.console.print(f"[bold]{escape(name)}[/]  [{style}]{escape(text)}[/]", highlight=False, soft_wrap=True)

    def _note(self, text: str, event: str) -> None:
        if self.as_json:
            self.console.print(json.dumps({"event": event, "text": clean(text)}), markup=False, highlight=False, soft_wrap=True)
        else:
            self.console.print(clean(text), style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _flag(self, todo: Sequence[Planned]) -> None:
        """Say when the store holds the same cells measured with other code, or addressed otherwise: they are not used."""
        stored = self.store.addresses()
        other = sum(any(i != p.id for i in stored.get(p.id.partition("-")[0], ())) for p in todo)
        if other and not self.as_json:
            self.console.print(
                f"{other} of the {len(todo)} cells to run are in the store already, measured with other code: those stay there, "
                "apart, and no table mixes them with new ones",
                style="yellow",
                highlight=False,
            )
        if earlier := self._earlier(todo, stored):
            self._note(
                f"{earlier} cells in this store have addresses of an earlier vtc, which covered only some of the model's files: "
                "they stay there, their own sweep's table shows them, and here they are measured anew under new addresses.",
                "earlier addresses",
            )

    def _earlier(self, todo: Sequence[Planned], stored: Mapping[str, Sequence[str]]) -> int:
        """Number of cells of the models to run whose address an earlier vtc made."""
        models = {p.model.name for p in todo}
        settings = {p.id.partition("-")[0] for p in self.sweep.planned}
        found = [self.store.config(i).get("model") for s, ids in stored.items() if s not in settings and models for i in ids]
        return sum(isinstance(m, dict) and "files" in m and m.get("name") in models for m in found)


def turn_of_this_machine() -> str:
    """Name of the claim under which one runner at a time takes timings on this machine."""
    return f"speed-{re.sub('[^0-9A-Za-z._-]', '-', platform.node()) or 'here'}"


class _Patience:
    """Waits for what other runners hold, and says whom for when that takes long."""

    def __init__(self, runner: _Runner) -> None:
        self.runner = runner
        self.named: set[Holder | None] = set()
        self.reset()

    def reset(self) -> None:
        """Begin to count anew: something was done."""
        self.since = time.monotonic()

    def wait(self, waiting: Sequence[Planned], busy: bool) -> None:
        """Sleep a little; after :data:`_SAY_AFTER` seconds, name every holder once."""
        if time.monotonic() - self.since >= _SAY_AFTER:
            held: dict[Holder | None, list[str]] = {}
            turn = [("its turn to measure on this machine", turn_of_this_machine())] if busy else []
            for what, name in turn or [(f"the cell '{self.runner._name(p)}'", p.id) for p in waiting]:
                held.setdefault(self.runner.store.holder(name), []).append(what)
            for holder, what in held.items():
                if holder not in self.named:
                    self.named.add(holder)
                    more = f" and {len(what) - 1} more" if len(what) > 1 else ""
                    self.runner._note(
                        f"waiting for {what[0]}{more}, held by {holder or 'another runner, which left no note'}: if that process "
                        "hangs or is stopped, end it, and its claim is free.",
                        "waiting",
                    )
        time.sleep(_NOT_MINE)


class _BusyError(Exception):
    """Another runner times something on this machine."""


def _advance(bar: Progress, task: TaskID, before: int) -> executors.Progress:
    return lambda done: bar.update(task, completed=before + done)


def _accuracy_line(metrics: dict[str, Any]) -> str:
    main = metrics["scores"][metrics["main"]]
    text = f"accuracy {100 * metrics['accuracy']:.1f} %"
    if metrics["main"] != "accuracy":
        text = f"{metrics['main']} {main['value']:.4g}"
    text += f", {metrics['tokens']['kept']:.0f} visual tokens"
    if matched := metrics.get("flops_budget"):
        text += f", {100 * matched['achieved']:.1f} % of the prefill's FLOPs" + ("" if matched["matched"] else " (not matched)")
    return text
