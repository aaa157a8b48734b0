"""What a store says: one row per method and budget, compared with the unreduced run and with random tokens.

Cells of different code versions never end up in one row, and are never compared with one another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vtc.errors import StoreError
from vtc.eval.config import UNREDUCED
from vtc.eval.scores import Listed, Questions, Reader, Scored, listed_cells
from vtc.eval.stats import Draws, Interval, Paired, compare, holm
from vtc.eval.store import Store, sweep_id

NOTHING = "it holds no question that is scored by itself"
"""Error of a row without anything to compare."""

RANDOM = "random"
"""Baseline that every other row is compared with, next to the unreduced run."""

_SOURCES = {"scene": "scene", "easy": "easy-VQA", "wide": "wide scene"}


@dataclass(frozen=True)
class TaskScore:
    """One row on one task.

    Attributes
    ----------
    accuracy : Interval
        Mean score in 0..1.
    paired : Paired or None
        Against the unreduced run.
    by_type : dict
        Mean score by question type.
    reported : float or None
        The benchmark's own metric as papers print it, where that is something else than the mean score of the answers.
    metric : str
        Name of that metric.
    """

    accuracy: Interval
    paired: Paired | None
    by_type: dict[str, float]
    reported: float | None = None
    metric: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table; ``None`` where nothing was measured.

    Attributes
    ----------
    label, reducer, budget : str
        Name in tables, registered name, budget requested.
    accuracy : Interval or None
        Share of correct answers; with several tasks their mean.
    paired, over_random : Paired or None
        Against the unreduced run and against random tokens at the same budget; means over the tasks.
    p_none, p_random : float or None
        p-values of those differences, corrected by Holm's method over the rows of this model.
    slots, kept, avg : float
        Visual tokens per image: before, entering the last layer, averaged over the decoder layers.
    layers : list of float or None
        Visual tokens of every decoder layer, for one prompt.
    flops, flops_share : float or None
        Of one prompt's prefill with vision tower and reducer; its share of the unreduced run's.
    mismatch : float
        Relative difference between counter and formula.
    kv_bytes : int or None
        KV cache of one prompt.
    speed : dict or None
        Contents of ``speed.json``.
    tasks : dict
        Scores by task.
    error : str
        Why a cell failed, or ``""``.
    model : str
        Name of the model.
    code : str
        Short name of the code version (engine and reducer).
    several : bool
        Whether the table has several tasks, also where this row was measured on one.
    """

    label: str
    reducer: str
    budget: str
    accuracy: Interval | None = None
    paired: Paired | None = None
    over_random: Paired | None = None
    p_none: float | None = None
    p_random: float | None = None
    slots: float = 0.0
    kept: float | None = None
    avg: float | None = None
    layers: list[float] | None = None
    flops: float | None = None
    flops_share: float | None = None
    mismatch: float = 0.0
    kv_bytes: int | None = None
    speed: dict[str, Any] | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    error: str = ""
    model: str = ""
    code: str = ""
    several: bool = False

    @property
    def by_type(self) -> dict[str, float]:
        """Scores by question type; with several tasks the names say which."""
        return {f"{t}: {k}" if self.several else k: v for t, s in self.tasks.items() for k, v in s.by_type.items()}


@dataclass(frozen=True)
class Asked:
    """The questions of one task: how many, on how many images, from where."""

    questions: int
    images: int
    sources: dict[str, int]


@dataclass(frozen=True)
class Results:
    """What a table shows.

    Attributes
    ----------
    rows : list of Row
        By model; unreduced first, then by budget.
    sweep : dict
        Contents of ``sweep.json``.
    types : list of str
        Question types in order of first appearance.
    missing : list of str
        Cells of the sweep that have not been run.
    envs, speed_envs : list of dict
        The distinct environments the accuracy and the speed numbers come from.
    asked : dict
        Questions by task, in order of first appearance.
    seeds : list of int
        Seeds of the cells.
    warnings : list of str
        What a reader must know before comparing rows: mixed code, other questions.
    """

    rows: list[Row]
    sweep: dict[str, Any]
    types: list[str]
    missing: list[str]
    envs: list[dict[str, Any]]
    speed_envs: list[dict[str, Any]]
    asked: dict[str, Asked] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mixed: bool = False

    @property
    def unreduced(self) -> Row | None:
        """The (first) unreduced row, where it has been run."""
        return next((r for r in self.rows if r.reducer == UNREDUCED), None)

    @property
    def models(self) -> list[str]:
        """Names of the models, in order."""
        return list(dict.fromkeys(r.model for r in self.rows))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(self.asked)

    def of(self, model: str) -> Results:
        """Return the same results with the rows of one model only."""
        return replace(self, rows=[r for r in self.rows if r.model == model])


# --------------------------------------------------------------------------------------------------------- collecting
def collect(store: Store) -> Results:
    """Read the latest sweep of a store and compare every row with the unreduced one and with random tokens.

    Raises
    ------
    StoreError
        If there is no sweep, nothing has been run, or a cell is damaged.
    """
    sweep, listed = listed_cells(store)
    reader = Reader(store)
    cells: list[Scored] = []
    missing = []
    several = len({(c.model, c.task, c.seed) for c in listed}) > 1
    for item in listed:
        cell = reader.read(item)
        if cell is None:
            where = f" ({item.model}, {item.task}, seed {item.seed})" if several else ""
            missing.append(f"{item.label} {item.budget}".strip() + where)
        else:
            cells.append(cell)
    if not cells:
        raise StoreError(f"none of the cells of {store.root} has been run: run the sweep again")
    rows = _Rows(cells, reader, sweep["config"]["bootstrap"], sweep["config"].get("seed", 0))
    made = _with_holm(rows.make())
    asked = {}
    for cell in cells:
        if cell.questions is not None and cell.listed.task not in asked:
            named = Counter(_SOURCES.get(s, "") for s in cell.questions.sources)
            asked[cell.listed.task] = Asked(len(cell.scores), len(set(cell.questions.images)), dict(named))
    types = list(dict.fromkeys(t for r in made for t in r.by_type))
    seeds = sorted({c.listed.seed for c in cells})
    warnings = [*rows.warnings, *_environment_warning(reader.envs), *_others(store, listed), *_unscored(cells)]
    return Results(made, sweep, types, missing, reader.envs, reader.speed_envs, asked, seeds, warnings, rows.mixed)


@dataclass
class _Measured:
    """A row on a task: its cells put together, with the bootstrap draws."""

    questions: Questions
    scores: Draws
    value: float
    draws: Draws
    seeds: int


class _Rows:
    """Groups cells into rows and compares them."""

    def __init__(self, cells: Sequence[Scored], reader: Reader, settings: Mapping[str, Any], seed: int) -> None:
        self.reader, self.settings, self.seed = reader, settings, seed
        self.rows: dict[tuple[str, ...], list[Scored]] = {}
        versions: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
        engines: dict[str, set[str]] = {}
        self.references: dict[tuple[str, ...], list[Scored]] = {}
        self.several = len({c.listed.task for c in cells if c.questions is not None}) > 1
        for cell in cells:
            at = cell.listed
            self.rows.setdefault((at.model, at.label, at.budget, *cell.version), []).append(cell)
            versions.setdefault((at.model, at.label, at.budget), set()).add(cell.version)
            engines.setdefault(at.model, set()).add(cell.version[0])
            if cell.questions is not None and at.reducer in (UNREDUCED, RANDOM):
                self.references.setdefault((at.model, at.reducer, at.budget, at.task, cell.version[0]), []).append(cell)
        self.mixed = any(len(v) > 1 for v in (*versions.values(), *engines.values()))
        self.warnings = []
        if self.mixed:
            count = max(len(v) for v in (*versions.values(), *engines.values()))
            self.warnings.append(
                f"MIXED CODE: the cells of this table were made by {count} versions of the code. Rows of different versions are "
                "kept apart (column code) and are compared only with the unreduced and random rows of their own version; sweep "
                "into a fresh store for one version."
            )
        self.cache: dict[tuple[int, ...], _Measured] = {}
        self.unpaired: list[str] = []

    def make(self) -> list[Row]:
        out = [self._row(list(cells)) for cells in self.rows.values()]
        if self.unpaired:
            self.warnings.append(
                "Not compared, because the unreduced run of the same code did not answer the same questions: "
                f"{_some(self.unpaired)}."
            )
        return out

    def _row(self, cells: list[Scored]) -> Row:
        at = cells[0].listed
        code = hashlib.sha256("\0".join(cells[0].version).encode()).hexdigest()[:7] if self.mixed else ""
        good = [c for c in cells if c.questions is not None]
        error = next((c.error for c in cells if c.error), "")
        if not good:
            return Row(at.label, at.reducer, at.budget, error=error or NOTHING, model=at.model, code=code)
        tasks: dict[str, list[Scored]] = {}
        for cell in good:
            tasks.setdefault(cell.listed.task, []).append(cell)
        measured = {task: self._measure(of) for task, of in tasks.items()}
        bases = {task: self._reference(of, UNREDUCED, "") for task, of in tasks.items()}
        chances = {task: self._reference(of, RANDOM, at.budget) for task, of in tasks.items()}
        boot = next(iter(measured.values())).questions.bootstrap(self.settings, self.seed)
        scores = {}
        for task, m in measured.items():
            mine = m.questions.bootstrap(self.settings, self.seed)
            base = bases[task]
            paired = self._compare([(m, base)]) if base is not None else None
            kinds = {k: float(m.scores[where].mean()) for k, where in m.questions.kinds.items()}
            own = [c.metrics["reported"] for c in tasks[task] if c.metrics["reported"] is not None]
            reported = sum(v for _, v in own) / len(own) if own else None
            name = own[0][0] if own else ""
            scores[task] = TaskScore(mine.interval(m.value, m.draws), paired, kinds, reported, name)
        if len(measured) == 1:
            only = next(iter(scores.values()))
            accuracy, paired = only.accuracy, only.paired
        else:
            every = list(measured.values())
            accuracy = boot.interval(float(np.mean([m.value for m in every])), np.mean([m.draws for m in every], axis=0))
            paired = self._compare_all(measured, bases)
        if paired is None and any(b is None for b in bases.values()):
            self.unpaired.append(f"{at.label} {at.budget}".strip())
        over = self._compare_all(measured, chances) if at.reducer not in (UNREDUCED, RANDOM) else None
        return Row(
            at.label,
            at.reducer,
            at.budget,
            accuracy,
            paired,
            over,
            speed=next((c.speed for c in good if c.speed is not None), None),
            tasks=scores,
            error=error,
            model=at.model,
            code=code,
            several=self.several,
            **self._costs(good),
        )

    def _costs(self, cells: Sequence[Scored]) -> dict[str, Any]:
        """Token counts and costs, averaged over tasks and seeds."""

        def mean(values: Iterable[Any]) -> Any:
            found = [v for v in values if v is not None]
            return sum(found) / len(found) if found else None

        at = cells[0].listed
        base = [c for c in self._candidates(cells[0], UNREDUCED, "") if c.metrics]
        flops = mean(c.metrics["flops"] for c in cells)
        # of the same tasks: their prompts differ in length
        full = [mean(b.metrics["flops"] for b in self._candidates(c, UNREDUCED, "") if b.metrics) for c in cells]
        whole = None if None in full else mean(full)
        layers = None
        if cells[0].metrics["decoder"] and base and base[0].metrics["decoder"]:
            text = base[0].metrics["decoder"][0] - base[0].metrics["tokens"]["slots"]
            layers = [n - text for n in cells[0].metrics["decoder"]]
        kv = mean(c.metrics["kv_bytes"] for c in cells)
        return {
            "slots": mean(c.metrics["tokens"]["slots"] for c in cells),
            "kept": mean(c.metrics["tokens"]["kept"] for c in cells),
            "avg": mean(c.metrics["tokens"]["avg"] for c in cells),
            "layers": layers,
            "flops": flops if flops is None or flops % 1 else int(flops),
            "flops_share": 1.0 if at.reducer == UNREDUCED and flops else flops / whole if flops and whole else None,
            "mismatch": max(c.metrics["mismatch"] for c in cells),
            "kv_bytes": kv if kv is None or kv % 1 else int(kv),
        }

    def _candidates(self, cell: Scored, reducer: str, budget: str) -> list[Scored]:
        at = cell.listed
        return self.references.get((at.model, reducer, budget, at.task, cell.version[0]), [])

    def _measure(self, cells: Sequence[Scored]) -> _Measured:
        key = tuple(id(c) for c in cells)
        if key not in self.cache:
            questions, scores = self.reader.join([(c.questions, c.scores) for c in cells if c.questions is not None])
            value, draws = questions.bootstrap(self.settings, self.seed).draws(scores)
            measured = _Measured(questions, scores, value, draws, len(cells))
            if cells[0].listed.reducer not in (UNREDUCED, RANDOM):
                return measured  # used once: not worth the memory
            self.cache[key] = measured
        return self.cache[key]

    def _reference(self, cells: Sequence[Scored], reducer: str, budget: str) -> _Measured | None:
        """The reference's run on the same questions: of the same seed where there is one, else of any."""
        chosen = []
        for cell in cells:
            alike = [c for c in self._candidates(cell, reducer, budget) if c.questions is cell.questions]
            if not alike:
                return None
            chosen.append(next((c for c in alike if c.listed.seed == cell.listed.seed), alike[0]))
        return self._measure(chosen)

    def _compare(self, pairs: Sequence[tuple[_Measured, _Measured]]) -> Paired:
        """Mean over the tasks of difference and ratio."""
        boots = [m.questions.bootstrap(self.settings, self.seed) for m, _ in pairs]
        apart = []
        for boot, (m, base) in zip(boots, pairs, strict=True):
            # whole numbers where answers are right or wrong and there is one task: the test is exact then
            scale = m.seeds if len(pairs) == 1 else 1 / len(m.scores)
            apart.append(np.round(boot.sums(m.scores - base.scores) * scale, 12))
        if len(pairs) == 1:
            m, base = pairs[0]
            return compare(boots[0], m.value, m.draws, base.value, base.draws, apart[0])
        mine, base = (float(np.mean([p[i].value for p in pairs])) for i in (0, 1))
        my_draws, base_draws = (np.mean([p[i].draws for p in pairs], axis=0) for i in (0, 1))
        paired = compare(boots[0], mine, my_draws, base, base_draws, np.concatenate(apart))
        # the average of the tasks' ratios, not the ratio of the averages: that is what papers report
        ratio = None
        if all(b.value > 0 for _, b in pairs):
            with np.errstate(divide="ignore", invalid="ignore"):
                draws = np.mean([m.draws / b.draws for m, b in pairs], axis=0)
            ratio = boots[0].interval(float(np.mean([m.value / b.value for m, b in pairs])), draws[np.isfinite(draws)])
        return replace(paired, ratio=ratio)

    def _compare_all(self, measured: Mapping[str, _Measured], bases: Mapping[str, _Measured | None]) -> Paired | None:
        pairs = [(m, b) for task, m in measured.items() if (b := bases[task]) is not None]
        return self._compare(pairs) if len(pairs) == len(measured) else None


def _with_holm(rows: list[Row]) -> list[Row]:
    """Add corrected p-values; one family per model and reference."""
    out = list(rows)
    for model in dict.fromkeys(r.model for r in rows):
        for name, get in (("p_none", lambda r: r.paired), ("p_random", lambda r: r.over_random)):
            family = [i for i, r in enumerate(out) if r.model == model and r.reducer != UNREDUCED and get(r) is not None]
            for i, p in zip(family, holm([get(out[i]).p for i in family]), strict=True):
                out[i] = replace(out[i], **{name: p})
    return out


def _unscored(cells: Sequence[Scored]) -> list[str]:
    """Give the numbers of tasks that score all answers together (CIDEr and the like): there is nothing to compare by question."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.questions is None and cell.metrics.get("reported") is not None:
            at, (name, value) = cell.listed, cell.metrics["reported"]
            found.setdefault(f"{at.task} ({name})", []).append(f"{at.label} {at.budget}".strip() + f" {value:.1f}")
    return [
        f"{task} scores all answers together, so that rows cannot be compared question by question; it is not in the means: "
        f"{', '.join(values)}."
        for task, values in found.items()
    ]


def _environment_warning(envs: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = {(str(e["commit"]), str(sorted(e["versions"].items()))) for e in envs}
    if len(kinds) < 2:
        return []
    return [
        f"MIXED ENVIRONMENTS: these accuracies come from {len(kinds)} combinations of commit and library versions (listed below); "
        "the cells' own code is the same unless a line says otherwise."
    ]


def _others(store: Store, listed: Sequence[Listed]) -> list[str]:
    """Say when the store holds more than the table shows: cells of other code of the same rows, and anything else."""
    ids = {c.id for c in listed}
    settings = {i.partition("-")[0] for i in ids}  # an id is SETTINGS-CODE
    others = [name for name in store.stored() if name not in ids]
    older = sum("-" in name and name.partition("-")[0] in settings for name in others)
    out = []
    if older:
        out.append(
            f"OTHER CODE: the store also holds {_cells(older)} of rows of this table, made by other versions of the code. They are "
            "left out, not merged in."
        )
    if rest := len(others) - older:
        shown = sweep_id(store.read_sweep())
        sweeps = [f"{source} (--sweep {name})" for name, (source, _) in store.sweeps().items() if name != shown]
        named = f" Other sweeps of this store: {_some(sweeps)}." if sweeps else ""
        out.append(f"The store also holds {_cells(rest)} of other settings, not in this table.{named}")
    return out


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
