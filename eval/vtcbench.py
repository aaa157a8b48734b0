"""The VTC-Bench protocol: whether a method helps where a smaller picture fails.

Average accuracy rewards answering questions that need no detail, which a smaller picture answers as well. The protocol splits the
questions that the unreduced model gets right: **A**, difficult, those the same model gets wrong from a downsampled picture; **B**,
simple, those it still gets right. A method worth its name scores on A.

Done here with what the original leaves out: the discriminator is the same model in the same store; methods are matched by
*measured* tokens per layer, not by nominal ratios; group sizes, intervals and the score of blind guessing on that very group are
always shown, and so is the floor where the store has it: another downsampled run of like cost, which scores above nothing on A
because A was chosen by failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vtc.errors import StoreError
from vtc.eval.config import UNREDUCED
from vtc.eval.formats import MISSING, Grid, Line, csv_text, format_grids
from vtc.eval.scores import Listed, listed_cells, score_of, version_of
from vtc.eval.stats import Interval, wilson
from vtc.eval.store import CellResult, Store

DISCRIMINATOR = "downsample"
TOLERANCE, SLACK = 0.15, 2.0
"""A row is compared with a downsampled run if its layer-average tokens differ by at most this share, or this number: a grid of
patches cannot meet every count."""


@dataclass(frozen=True)
class Score:
    """One row on one group: interval (None for an empty group) and the numbers behind it."""

    interval: Interval | None
    questions: int
    images: int


@dataclass(frozen=True)
class Entry:
    """One row of a split.

    Attributes
    ----------
    label, budget : str
        The row.
    kind : str
        ``"discriminator"``, ``"floor"`` (another downsampled run), ``"full"``, ``"guess"`` or ``"method"``.
    tokens : float or None
        Measured visual tokens per image, averaged over the layers.
    hard, easy : Score
        On group A and on group B.
    """

    label: str
    budget: str
    kind: str
    tokens: float | None
    hard: Score
    easy: Score


@dataclass(frozen=True)
class Group:
    """The split by one downsampled run, with every row of like cost.

    Attributes
    ----------
    model, task : str
        Where it belongs.
    budget : str
        The downsampled run's.
    tokens : float
        Its measured tokens.
    total : int
        Questions asked; only those the unreduced model gets right are split.
    entries : list of Entry
        Rows.
    unmatched : list of str
        Methods without a row of like cost, with their nearest.
    """

    model: str
    task: str
    budget: str
    tokens: float
    total: int
    entries: list[Entry]
    unmatched: list[str]


@dataclass(frozen=True)
class Split:
    """All groups of a store."""

    groups: list[Group]
    confidence: float


@dataclass(frozen=True)
class _Run:
    listed: Listed
    right: dict[str, bool]
    tokens: float
    result: CellResult


def split(store: Store) -> Split | None:
    """Split the questions of the latest sweep by its downsampled runs; None where it has none, or no unreduced run.

    Raises
    ------
    StoreError
        If there is no sweep, or a cell is damaged.
    """
    sweep, listed = listed_cells(store)
    by_task: dict[tuple[str, str, int, str], list[_Run]] = {}
    for item in listed:
        found = store.get(item.id)
        if found is None or not found.samples:
            continue
        right = {s["id"]: score_of(s) >= 0.5 for s in found.samples}
        run = _Run(item, right, found.metrics["tokens"]["avg"], found)
        by_task.setdefault((item.model, item.task, item.seed, version_of(found.config)[0]), []).append(run)
    seen: set[tuple[str, str]] = set()
    groups = []
    for (model, task, _, _), runs in by_task.items():
        full = next((r for r in runs if r.listed.reducer == UNREDUCED), None)
        if full is None or (model, task) in seen:  # further seeds ask the same of a model that answers greedily
            continue
        seen.add((model, task))
        first: dict[str, _Run] = {}
        for run in runs:
            if run.listed.reducer == DISCRIMINATOR:
                first.setdefault(run.listed.budget, run)
        groups += [_group(full, run, runs, sweep["config"]["bootstrap"]["confidence"]) for run in first.values()]
    return Split(groups, sweep["config"]["bootstrap"]["confidence"]) if groups else None


def _group(full: _Run, small: _Run, runs: Sequence[_Run], confidence: float) -> Group:
    samples = {s["id"]: s for s in full.result.samples}
    shared = [i for i in samples if i in small.right]
    hard = [i for i in shared if full.right[i] and not small.right[i]]
    easy = [i for i in shared if full.right[i] and small.right[i]]

    def score(right: Mapping[str, bool], ids: Sequence[str]) -> Score:
        images = len({samples[i]["image"] for i in ids})
        if not ids:
            return Score(None, 0, 0)
        # an interval with a width at 0 and 1; as wide as if every image were one question, since those of one image go together
        share = sum(right.get(i, False) for i in ids) / len(ids)
        return Score(wilson(share, images, confidence), len(ids), images)

    def entry(run: _Run, kind: str) -> Entry:
        at = run.listed
        return Entry(at.label, at.budget or "all", kind, run.tokens, score(run.right, hard), score(run.right, easy))

    entries = [entry(full, "full"), entry(small, "discriminator")]
    others = [r for r in runs if r is not full and r is not small]
    unmatched = []
    for label in dict.fromkeys(r.listed.label for r in others):
        mine = [r for r in others if r.listed.label == label]
        best = min(mine, key=lambda r: abs(r.tokens - small.tokens))
        second = best.listed.reducer == DISCRIMINATOR
        if abs(best.tokens - small.tokens) <= max(TOLERANCE * small.tokens, SLACK):
            entries.append(entry(best, "floor" if second else "method"))
        elif not second:
            unmatched.append(f"{label} ({best.tokens:.0f})")
    guess = _guesses(full.result)
    blind = {i: guess.get(samples[i]["type"]) == samples[i].get("gold") for i in shared}
    entries.append(Entry("most frequent answer", MISSING, "guess", None, score(blind, hard), score(blind, easy)))
    at = small.listed
    return Group(at.model, at.task, at.budget, small.tokens, len(shared), entries, unmatched)


def _guesses(full: CellResult) -> dict[str, str]:
    """Most frequent right answer of every question type; ties go to the one that sorts first."""
    counts: dict[str, Counter[str]] = {}
    for s in full.samples:
        counts.setdefault(s["type"], Counter())[str(s.get("gold", ""))] += 1
    return {kind: min(c, key=lambda answer: (-c[answer], answer)) for kind, c in counts.items()}


# ------------------------------------------------------------------------------------------------------------- tables
_NAMES = {
    "full": "{label} (right by construction)",
    "discriminator": "{label} (the split itself)",
    "floor": "{label} (floor: a second downsampled run)",
}


def grids(found: Split) -> list[Grid]:
    """Lay the groups out, one table per model and task."""
    out = []
    titles = ("reducer", "keep", "avg tokens", "A difficult %", "B simple %")
    for model, task in dict.fromkeys((g.model, g.task) for g in found.groups):
        mine = [g for g in found.groups if (g.model, g.task) == (model, task)]
        groups = []
        for g in mine:
            size = g.entries[0]
            head = f"A: {_size(size.hard)}; B: {_size(size.easy)}"
            lines = [Line((head, "", "", "", ""), (0,) * 5, "group")]
            ranks = _ranks(g.entries)
            for entry, rank in zip(g.entries, ranks, strict=True):
                label = _NAMES.get(entry.kind, "{label}").format(label=entry.label)
                tokens = MISSING if entry.tokens is None else f"{entry.tokens:.0f}"
                made = entry.kind in ("full", "discriminator")
                texts = (label, entry.budget, tokens, _text(entry.hard, made), _text(entry.easy, made))
                lines.append(Line(texts, (0, 0, 0, *rank), "full" if entry.kind == "full" else "method"))
            groups.append(lines)
        several = len({(g.model, g.task) for g in found.groups}) > 1
        heading = f"VTC-Bench groups: model {model}, task {task}" if several else "VTC-Bench groups"
        out.append(Grid(titles, (True, False, False, False, False), groups, heading))
    return out


def _size(score: Score) -> str:
    return f"{score.questions} questions on {score.images} images"


def _text(score: Score, by_construction: bool) -> str:
    if score.interval is None:
        return MISSING
    i = score.interval
    if by_construction:
        return f"{100 * i.value:.0f}"
    return f"{100 * i.value:.1f} [{100 * i.low:.0f}–{100 * i.high:.0f}]"


def _ranks(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Best and second best among what can win: neither the unreduced model nor the discriminator, which score by construction."""
    out = [[0, 0] for _ in entries]
    for column, get in enumerate((lambda e: e.hard, lambda e: e.easy)):
        values = {
            i: get(e).interval.value  # type: ignore[union-attr]
            for i, e in enumerate(entries)
            if e.kind in ("method", "floor") and get(e).interval is not None
        }
        best = sorted({round(v, 9) for v in values.values()}, reverse=True)
        for i, v in values.items():
            if len(best) > 1 and round(v, 9) in best[:2]:
                out[i][column] = best.index(round(v, 9)) + 1
    return [(a, b) for a, b in out]


def notes(found: Split) -> list[str]:
    """Say how to read the groups."""
    out = [
        "A: questions that the unreduced model gets right and the same model gets wrong from the downsampled picture; B: those it "
        "gets right from both. Questions that the unreduced model gets wrong are in neither.",
        "Rows: of every method the run whose measured tokens per layer come nearest to the downsampled run's, at most "
        f"{100 * TOLERANCE:.0f} % or {SLACK:.0f} tokens away.",
        f"[{100 * found.confidence:.0f} % Wilson interval with the number of images as sample size]. most frequent answer: what "
        "always giving the most frequent answer of a question's type scores on that very group.",
    ]
    if not any(e.kind == "floor" for g in found.groups for e in g.entries):
        out.append(
            "No floor: A is chosen by failure, so a second, slightly different downsampled run would score above 0 on it, and the "
            "store holds none. Add one with a budget within the tolerance (`{name: downsample, label: downsample again, budgets: "
            "[...]}`) before taking small scores on A for skill."
        )
    for g in found.groups:
        if g.unmatched:
            out.append(
                f"Not compared at {DISCRIMINATOR} {g.budget} ({g.tokens:.0f} tokens), because no run of theirs is near (nearest in "
                f"brackets): {', '.join(g.unmatched)}."
            )
        if 0 < g.entries[0].hard.images < 30:
            out.append(
                f"Group A of {DISCRIMINATOR} {g.budget} is small ({_size(g.entries[0].hard)}): its intervals decide little; ask "
                "more questions."
            )
    return list(dict.fromkeys(out))


def render_vtc(store: Store, fmt: str, *, width: int | None = None, color: bool = False) -> str:
    """Render the groups of a store.

    Raises
    ------
    StoreError
        If the store has no downsampled or no unreduced run.
    """
    found = split(store)
    if found is None:
        raise StoreError(
            f"{store.root} has no runs of '{UNREDUCED}' and '{DISCRIMINATOR}' to split the questions by: every sweep has them, "
            "run it again"
        )
    if fmt == "csv":
        return _csv(found)
    made = grids(found)
    if len(made) == 1:
        made = [replace(made[0], heading="")]
    return format_grids(made, notes(found), fmt, width=width, color=color)


def _csv(found: Split) -> str:
    names = ["model", "task", "split_budget", "split_tokens", "reducer", "budget", "kind", "tokens"]
    for group in "AB":
        names += [f"{group}_questions", f"{group}_images", f"{group}_accuracy", f"{group}_low", f"{group}_high"]
    rows = []
    for g in found.groups:
        for e in g.entries:
            row = [g.model, g.task, g.budget, g.tokens, e.label, e.budget, e.kind, e.tokens]
            for s in (e.hard, e.easy):
                interval = [None] * 3 if s.interval is None else list(s.interval.to_dict().values())
                row += [s.questions, s.images, *interval]
            rows.append(row)
    return csv_text(names, rows)
