"""Budget search: the smallest budget of every reducer whose loss of accuracy stays below a target, with confidence.

**The test.** Questions come image by image in a random order. For every image the unreduced and the reduced model answer the same
questions, and ``d`` is the loss: the share answered right before, minus the share answered right after. That the mean loss is at
least the target is rejected by betting (:class:`vtc.eval.betting.Betting`), which may look after every image and stop as soon as
the answer is clear. The same bet on the other side stops early where the loss is clearly above the target.

**The search.** Budgets are tried from the largest down, each at level ``alpha``, and a reducer's search ends at the first one that
is not accepted. This fixed sequence needs no correction, and no assumption that accuracy falls with the budget: the chance that any
accepted budget of a reducer loses the target or more is at most ``alpha``.

Images are the independent units, so many images with few questions each tell more than the reverse: at most :data:`PER_IMAGE` are
asked of each. At 95 % even a reducer that loses nothing needs about ``4.5 / target`` of them: 450 for one point, 90 for five.

Answers go to a store as they come; a second run reads them, and goes on where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import vtc
from vtc.doors import short
from vtc.errors import BudgetError, ConfigError, DamagedCellError, VtcError
from vtc.eval import env, models
from vtc.eval.betting import Betting
from vtc.eval.cells import reducer_identity, unlisted
from vtc.eval.config import ALL, MADE, UNREDUCED, BudgetConfig, ModelConfig, ReducerConfig, TaskConfig
from vtc.eval.formats import MISSING, Grid, Line, csv_text, format_grids
from vtc.eval.questions import digest, image_of, task_questions
from vtc.eval.store import SCHEMA, Store, cell_id, write_json
from vtc.eval.sweepfile import load_sweep
from vtc.eval.worker import ask, threads
from vtc.families import family_of
from vtc.pocket import Batches

SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03)
"""Budgets tried where none are given, as shares of an image's tokens."""

PER_IMAGE = 2
"""Most questions asked about one image."""

FILE = "tune.json"
"""Result of a search in its store."""


@dataclass
class Trial:
    """One reducer at one budget.

    Attributes
    ----------
    budget : str
        As tables print it.
    verdict : {"accepted", "rejected", "undecided", "refused"}
        Loss below the target with confidence; at least the target with confidence; neither; or the model refuses the budget.
    drop : float or None
        Loss, averaged over images.
    low, high : float or None
        Anytime-valid bounds of it, each with the confidence asked for.
    tokens, avg : float or None
        Visual tokens entering the last layer, and averaged over the layers.
    questions, images : int
        Asked until the verdict.
    seconds : float
        Time spent answering under it, also in earlier runs.
    note : str
        Why the model refuses it.
    """

    budget: str
    verdict: str = "undecided"
    drop: float | None = None
    low: float | None = None
    high: float | None = None
    tokens: float | None = None
    avg: float | None = None
    questions: int = 0
    images: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass
class Search:
    """What was found for one reducer: its trials, from the largest budget down."""

    label: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The smallest accepted budget."""
        return next((t for t in reversed(self.trials) if t.verdict == "accepted"), None)


@dataclass(frozen=True)
class Settings:
    """What to search.

    Attributes
    ----------
    model, task : ModelConfig, TaskConfig
        What is asked of what; a task of lmms-eval cannot be asked one question at a time.
    reducers : tuple of ReducerConfig
        Methods; a method's own budgets replace ``budgets``.
    budgets : tuple of BudgetConfig
        Tried from the largest down.
    target : float
        Loss of accuracy that is too much, 0.01 for one point.
    confidence : float
        Of every accepted budget of one reducer together.
    questions : int
        Most questions asked for one budget.
    batch_size, max_new_tokens, seed, threads
        As in a sweep; the seed also orders the images.
    """

    model: ModelConfig
    task: TaskConfig
    reducers: tuple[ReducerConfig, ...]
    budgets: tuple[BudgetConfig, ...]
    target: float
    confidence: float = 0.95
    questions: int = 2400
    batch_size: int = 16
    max_new_tokens: int = 4
    seed: int = 0
    threads: int | None = 1


class Tuner:
    """A search, ready to run.

    Parameters
    ----------
    settings : Settings
        What to search.
    store : Store
        Where answers are kept.
    say : callable
        Told a line after every trial.

    Raises
    ------
    VtcError
        If the model or the questions cannot be had, or the target makes no sense.
    """

    def __init__(self, settings: Settings, store: Store, say: Callable[[str], object] = lambda _: None) -> None:
        _check_target(settings.target)
        if settings.task.kind == "lmms":
            raise ConfigError(
                f"the task '{settings.task.title}' of lmms-eval cannot be searched, it is scored as a whole: use a built-in task "
                "or your own images"
            )
        if any(b.flops is not None for r in settings.reducers for b in r.budgets or settings.budgets):
            raise BudgetError(
                "budgets of equal FLOPs cannot be searched: give tokens or shares, for example --budgets 98,49,22"
            )
        self.settings, self.store, self.say = settings, store, say
        questions = task_questions(settings.task)
        by_image: dict[str, list[Any]] = {}
        for q in questions:
            by_image.setdefault(image_of(q.id), []).append(q)
        rng = random.Random(settings.seed)
        self.images = [rng.sample(about, min(PER_IMAGE, len(about))) for about in by_image.values()]
        rng.shuffle(self.images)
        while len(self.images) > 1 and sum(map(len, self.images)) > settings.questions:
            self.images.pop()
        models.fetch(settings.model)
        planned = models.identity(settings.model)
        self.model, self.processor = models.load(settings.model, planned)
        self.identity = {
            "schema": SCHEMA,
            "kind": "tune",
            "model": planned,
            "task": {
                "questions": digest([q for image in self.images for q in image]),
                "batch_size": settings.batch_size,
                "max_new_tokens": settings.task.max_new_tokens or settings.max_new_tokens,
                "seed": settings.seed,
            },
            "engine": env.engine_version(),
        }
        store.sweep_up()
        self.full = _Run(self, UNREDUCED, None)

    def run(self) -> list[Search]:
        """Search every reducer and write ``tune.json``."""
        found = []
        with threads(self.settings.threads):
            for reducer in self.settings.reducers:
                found.append(self._search(reducer))
        write_json(self.store.root / FILE, self.record(found))
        return found

    def _search(self, reducer: ReducerConfig) -> Search:
        search = Search(reducer.title)
        for budget in sorted(reducer.budgets or self.settings.budgets, key=self._size, reverse=True):
            try:
                made = reducer.build(budget.options, self.settings.seed)
                with vtc.patch(self.model, made):
                    pass
            except VtcError as error:
                trial = Trial(budget.text, "refused", note=str(error))
            else:
                trial = self._try(reducer, budget, _Run(self, reducer.method, made))
            search.trials.append(trial)
            self.say(f"{search.label} {trial.budget}: {describe(trial)}")
            if trial.verdict in ("rejected", "undecided"):
                break
        return search

    def _size(self, budget: BudgetConfig) -> float:
        """Tokens a budget stands for, to order budgets by."""
        amount = next(iter(budget.options.values()))
        return amount if isinstance(amount, int) else amount * (family_of(self.model).facts.tokens or 1)

    def _try(self, reducer: ReducerConfig, budget: BudgetConfig, run: _Run) -> Trial:
        alpha = 1 - self.settings.confidence
        below, above = Betting(alpha, self.settings.target), Betting(alpha, self.settings.target)
        trial = Trial(budget.text)
        losses: list[float] = []
        asked = 0
        target = self.settings.target
        while len(losses) < len(self.images):
            count = 0
            end = len(losses)
            while end < len(self.images) and count < 2 * self.settings.batch_size:  # whole images, about two batches
                count += len(self.images[end])
                end += 1
            before, after = self.full.correct(end), run.correct(end)
            new = [_mean(before[i]) - _mean(after[i]) for i in range(len(losses), end)]
            losses += new
            below.add(new)
            above.add([-d for d in new])
            asked += count
            if below.bound <= target:
                trial.verdict = "accepted"
                break
            if -above.bound >= target:
                trial.verdict = "rejected"
                break
        self.full.save()
        run.save()
        trial.drop = float(np.mean(losses))
        trial.low, trial.high = -above.bound, below.bound
        trial.questions, trial.images = asked, len(losses)
        trial.tokens, trial.avg = run.tokens(trial.images)
        trial.seconds = run.seconds
        return trial

    def record(self, found: Sequence[Search]) -> dict[str, Any]:
        """Return the result as plain data, with its conditions."""
        s = self.settings
        return {
            "model": s.model.title,
            "task": s.task.title,
            "target_drop": s.target,
            "confidence": s.confidence,
            "images_available": len(self.images),
            "questions_available": sum(map(len, self.images)),
            "unreduced": {"questions": len(self.full.samples), "seconds": self.full.seconds},
            "reducers": [
                {
                    "label": f.label,
                    "smallest": dataclasses.asdict(f.best) if f.best is not None else None,
                    "trials": [dataclasses.asdict(t) for t in f.trials],
                }
                for f in found
            ],
            "env": env.describe(s.seed),
        }


class _Run:
    """Answers of one reducer (or none) to the images in order, from the store as far as they are there."""

    def __init__(self, tuner: Tuner, name: str, reducer: Any) -> None:
        self.tuner, self.reducer = tuner, reducer
        self.config = {**tuner.identity, "reducer": reducer_identity(name, reducer)}
        self.id = cell_id(self.config)
        self.samples: list[dict[str, Any]] = []
        self.seconds = 0.0
        try:
            stored = tuner.store.get(self.id)
        except DamagedCellError:
            tuner.store.quarantine(self.id)
            stored = None
        if stored is not None and stored.metrics:
            self.samples, self.seconds = stored.samples, stored.metrics["seconds"]
        self.saved = len(self.samples)

    def correct(self, end: int) -> list[list[bool]]:
        """Return the marks of the first ``end`` images, asking what has not been asked yet."""
        images = self.tuner.images[:end]
        missing = [q for q in (q for image in images for q in image)][len(self.samples) :]
        if missing:
            self._ask(missing)
        marks = iter(self.samples)
        return [[next(marks)["correct"] for _ in image] for image in images]

    def _ask(self, questions: Sequence[Any]) -> None:
        tuner, settings = self.tuner, self.tuner.settings
        start = time.perf_counter()
        batches = Batches(tuner.processor, questions, settings.batch_size)
        longest = settings.task.max_new_tokens or settings.max_new_tokens
        self.samples += ask(tuner.model, tuner.processor, settings.task, batches, self.reducer, longest, settings.seed)
        self.seconds += time.perf_counter() - start
        if len(self.samples) >= 1.25 * self.saved + 16:  # now and then: a kill loses little, and little is written twice
            self.save()

    def save(self) -> None:
        """Write what is not in the store yet."""
        if len(self.samples) == self.saved:
            return
        claim = self.tuner.store.claim(self.id)
        if claim is None:  # another search writes the same answers: these are kept here, and written next time
            return
        n, correct = len(self.samples), sum(s["correct"] for s in self.samples)
        metrics = {"n": n, "correct": correct, "accuracy": correct / n, "seconds": self.seconds}
        try:
            self.tuner.store.put(self.id, self.config, env.describe(self.tuner.settings.seed), metrics, self.samples)
        finally:
            claim.release()
        self.saved = n

    def tokens(self, images: int) -> tuple[float, float]:
        """Mean tokens of the first images' questions: entering the last layer, and over the layers."""
        asked = self.samples[: sum(len(i) for i in self.tuner.images[:images])]
        return float(np.mean([s["kept"] for s in asked])), float(np.mean([s["avg_tokens"] for s in asked]))


def _mean(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)


def default_budgets() -> tuple[BudgetConfig, ...]:
    """Return :data:`SHARES` as budgets."""
    return tuple(BudgetConfig(keep=share, label=f"{100 * share:g}%") for share in SHARES)


def read_settings(
    what: str,
    target: str,
    reducers: str | None,
    budgets: str | None,
    questions: int,
    confidence: float,
    *,
    trust_remote_code: bool = False,
) -> Settings:
    """Read what the command line says.

    Parameters
    ----------
    what : str
        Name of a model, or a sweep file: the first of its models and of its tasks is used.
    target : str
        ``"1%"`` or ``"0.01"``.
    reducers, budgets : str or None
        Comma-separated; the file's when None, and :data:`SHARES` without a file.
    questions : int
        Most questions asked for one budget.
    confidence : float
        Confidence of the search.
    trust_remote_code : bool
        Whether Python code that comes with the model may run.

    Raises
    ------
    VtcError
        For anything that makes no sense.
    """
    drop = _share(target)
    _check_target(drop)
    if not 0.5 <= confidence < 1:
        raise BudgetError(f"the confidence {confidence:g} is not between 0.5 and 1: give for example --confidence 0.95")
    if questions > MADE // 4:
        raise ConfigError(f"--questions {questions} is more than can be made: ask for at most {MADE // 4}")
    given = tuple(_budget(text.strip()) for text in budgets.split(",")) if budgets else ()
    names = [name.strip() for name in reducers.split(",")] if reducers else []
    for name in names:
        vtc.info(name.partition(".")[0])
    rows = tuple(ReducerConfig(name=name) for name in names)
    if what.endswith((".yaml", ".yml")):
        config = load_sweep(what, trust_remote_code=trust_remote_code)
        return Settings(
            config.all_models[0],
            config.all_tasks[0],
            rows or _expanded(config.reducers),
            given or tuple(config.budgets),
            drop,
            confidence,
            questions,
            config.batch_size,
            config.max_new_tokens,
            config.seed,
            config.threads,
        )
    try:
        model = ModelConfig(name=what)
    except ValueError:
        raise ConfigError(f"'{short(what)}' names no model: give a folder, a hub id, or 'pocket'") from None
    models.check_model(model)
    model = model.trusting() if trust_remote_code else model
    if not rows:
        raise ConfigError("name the reducers to search, for example --reducers fastv,divprune, or give a sweep file")
    task = TaskConfig(name="scenes", n=4 * questions)  # about seven on a scene, of which two are asked
    return Settings(model, task, rows, given or default_budgets(), drop, confidence, questions)


def _expanded(reducers: Sequence[ReducerConfig]) -> tuple[ReducerConfig, ...]:
    """Replace ``all`` by every registered reducer that is not listed."""
    rest = [ReducerConfig(name=n) for n in unlisted(reducers)]
    return tuple(x for r in reducers for x in (rest if r.name == ALL else [r]))


def _check_target(target: float) -> None:
    if not 0 < target < 1:
        raise BudgetError(f"the target {target:g} is not between 0 and 1 (100 %): give for example --target-drop 1%")


def _share(text: str) -> float:
    try:
        return float(text.rstrip("% ")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise BudgetError(f"the target '{short(text)}' is not a number: give for example --target-drop 1%") from None


def _budget(text: str) -> BudgetConfig:
    try:
        if text.endswith("%"):
            return BudgetConfig.model_validate(text)
        return BudgetConfig(keep=int(text) if text.isdecimal() else float(text))
    except ValueError:
        raise BudgetError(
            f"the budget '{short(text)}' is neither a number of tokens nor a share: give for example 49, 0.25 or 25%"
        ) from None


# ------------------------------------------------------------------------------------------------------------- output
def describe(trial: Trial) -> str:
    """Return one trial as a line."""
    if trial.verdict == "refused":
        return f"refused: {trial.note}"
    return (
        f"{trial.verdict}, loss {100 * trial.drop:.1f} points [{100 * trial.low:.1f}, {100 * trial.high:.1f}] "  # type: ignore[operator]
        f"after {trial.questions} questions on {trial.images} images, {trial.seconds:.0f} s"
    )


_SIGNS = {"accepted": "✓", "rejected": "✗", "undecided": "?", "refused": "–"}


def render_tune(record: dict[str, Any], fmt: str, *, width: int | None = None, color: bool = False) -> str:
    """Render a result (contents of ``tune.json``)."""
    if fmt == "csv":
        names = ["model", "task", "reducer", *(f.name for f in dataclasses.fields(Trial)), "smallest"]
        rows = []
        for r in record["reducers"]:
            best = r["smallest"]["budget"] if r["smallest"] else None
            rows += [[record["model"], record["task"], r["label"], *t.values(), int(t["budget"] == best)] for t in r["trials"]]
        return csv_text(names, rows)
    titles = ("reducer", "smallest", "tokens", "avg", "loss, points", "tried", "questions", "seconds")
    lines = []
    for r in record["reducers"]:
        best = r["smallest"]
        tried = " ".join(f"{t['budget']}{_SIGNS[t['verdict']]}" for t in r["trials"])
        shown = best or (r["trials"][-1] if r["trials"] and r["trials"][-1]["drop"] is not None else None)
        loss = MISSING if shown is None else f"{100 * shown['drop']:.1f} [{100 * shown['low']:.1f}, {100 * shown['high']:.1f}]"
        entries = (
            r["label"],
            best["budget"] if best else "none",
            f"{best['tokens']:.0f}" if best else MISSING,
            f"{best['avg']:.0f}" if best else MISSING,
            loss.replace("-", "−"),
            tried,
            str(sum(t["questions"] for t in r["trials"])),
            f"{sum(t['seconds'] for t in r['trials']):.0f}",
        )
        lines.append(Line(entries, (0,) * len(entries)))
    grid = Grid(titles, (True, *(False,) * 4, True, False, False), [lines])
    return format_grids([grid], tune_notes(record), fmt, width=width, color=color)


def tune_notes(record: dict[str, Any]) -> list[str]:
    """Say what a result claims and what it cost."""
    confidence = f"{100 * record['confidence']:g} %"
    cost = record["unreduced"]
    total = sum(t["questions"] for r in record["reducers"] for t in r["trials"])
    seconds = sum(t["seconds"] for r in record["reducers"] for t in r["trials"])
    notes = [
        f"smallest: the smallest budget whose loss against the unreduced model is below {100 * record['target_drop']:g} points, "
        f"with {confidence} confidence for all accepted budgets of one reducer together. Budgets are tried from the largest down "
        "until one is not accepted.",
        "loss: share of right answers lost, averaged over images, of the smallest budget (of the last one tried where there is "
        f"none) [bounds of {confidence} confidence each, valid however early the test stops]. tried: ✓ accepted, ✗ loss at least "
        "the target, ? undecided after all questions, – refused by the model.",
        f"Model '{record['model']}', task '{record['task']}': {record['questions_available']} questions on "
        f"{record['images_available']} images at hand. Asked: {total} under the reducers and {cost['questions']} of the unreduced "
        f"model (once for all), {seconds + cost['seconds']:.0f} s together.",
    ]
    if any(t["verdict"] == "undecided" for r in record["reducers"] for t in r["trials"]):
        notes.append("Undecided budgets may well be good enough: ask more questions (--questions), or accept a larger loss.")
    return notes
