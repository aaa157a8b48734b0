"""Samples for the report: pictures made again from the questions' sources, every method's answer, and which tokens it kept.

A store holds answers, not pictures and not kept tokens. Both are made again here for the few samples that are shown: pictures by
the task's own generator, kept tokens by running the embedded model once per row. Files are read only where the reader says so: a
store may come from somebody else, and its record names paths. Where something is not possible the report says why.
"""

from __future__ import annotations

import base64
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.doors import inside, short
from vtc.errors import VtcError
from vtc.eval.config import UNREDUCED
from vtc.eval.scores import Listed, listed_cells, score_of, version_of
from vtc.eval.store import CellResult, Store

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.eval.config import TaskConfig
    from vtc.pocket import Question

SAMPLES = 24
"""Most samples a report shows."""

OVERLAYS = 1200
"""Most pictures of kept tokens in a report: with many rows, fewer samples are shown."""

SIDE = 224
"""Pictures are shrunk to this many pixels a side."""


@dataclass
class Entry:
    """What one row answered to one sample.

    Attributes
    ----------
    text : str
        The answer.
    score : float
        0..1.
    dropped, merged : str
        SVG paths of the patches that were discarded, and of those that share a token with others, in units of patches; both
        ``""`` where unknown.
    kept : int
        Visual tokens entering the last layer.
    """

    text: str
    score: float
    kept: int
    dropped: str = ""
    merged: str = ""


@dataclass
class Sample:
    """One question with everything that was answered to it.

    Attributes
    ----------
    model, task, id, kind, question, gold : str
        Where it belongs, and what was asked.
    image : str
        ``data:`` address of the picture, ``""`` where there is none.
    grid : tuple of int
        Rows and columns of patches.
    labels, budgets : list of str
        Rows and columns of ``entries``.
    entries : dict
        By (label, budget).
    full : Entry or None
        The unreduced run.
    """

    model: str
    task: str
    id: str
    kind: str
    question: str
    gold: str
    image: str = ""
    grid: tuple[int, int] = (1, 1)
    labels: list[str] = field(default_factory=list)
    budgets: list[str] = field(default_factory=list)
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    full: Entry | None = None

    @property
    def right(self) -> int:
        """How many rows are right."""
        return sum(e.score >= 0.5 for e in self.entries.values())


@dataclass
class Browser:
    """Samples, and what must be said about them."""

    samples: list[Sample]
    notes: list[str]


def browse(
    store: Store,
    count: int = SAMPLES,
    *,
    overlays: bool = True,
    asked: Mapping[str, Sequence[Question]] | None = None,
    data: Path | None = None,
) -> Browser:
    """Choose samples of the latest sweep and gather what is shown of them.

    Parameters
    ----------
    store : Store
        Results.
    count : int
        Most samples.
    overlays : bool
        Whether to find out which tokens were kept, by running the model.
    asked : mapping or None
        Questions by task that are at hand.
    data : Path or None
        Folder below which images and CSV files of the user's own tasks may be looked for.
    """
    sweep, listed = listed_cells(store)
    chosen: list[Sample] = []
    notes: list[str] = []
    groups: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    for item in listed:
        if item.seed == next(c.seed for c in listed if (c.model, c.task) == (item.model, item.task)):
            groups[item.model, item.task].append(item)
    total = 0
    for (model, task), cells in groups.items():
        if (share := count // len(groups)) == 0:
            continue
        found = {c: r for c in cells if (r := store.get(c.id)) is not None and r.samples}
        share = max(1, min(share, OVERLAYS // max(1, len(found) * len(groups))))
        samples = _choose(model, task, found, share)
        total += max((len(r.samples) for r in found.values()), default=0)
        questions, problem = _questions(sweep, task, found, (asked or {}).get(task), data)
        known = []
        for sample in samples:
            try:
                sample.image = _address(questions[sample.id].image)
            except KeyError:
                continue
            except VtcError as error:  # a file that has changed since it was asked about
                notes.append(f"Task {task}: {short(error, 500)}")
                continue
            sample.question = questions[sample.id].prompt
            known.append(sample)
        if problem:
            notes.append(f"Task {task}: pictures and questions cannot be shown ({problem}).")
        if overlays and known:
            notes += _add_kept(sweep, model, found, known, questions)
        chosen += samples
    notes.insert(
        0,
        f"{len(chosen)} of {total} questions are shown (at most {count}, fewer with many rows so that this file stays small): "
        "first those on which the rows disagree most, the question types in turn.",
    )
    if not overlays:
        notes.append("Kept tokens are not shown: the report was written without running the model.")
    return Browser(chosen, notes)


def _choose(model: str, task: str, found: Mapping[Listed, CellResult], count: int) -> list[Sample]:
    """Take the samples the rows disagree on most, the types in turn."""
    if not found:
        return []
    by_id = {cell: {s["id"]: s for s in result.samples} for cell, result in found.items()}
    base = next((r for c, r in found.items() if c.reducer == UNREDUCED), next(iter(found.values())))
    rows = [c for c in found if c.reducer != UNREDUCED]
    full = next((c for c in found if c.reducer == UNREDUCED), None)
    waiting: dict[str, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
    for position, sample in enumerate(base.samples):
        right = sum(score_of(by_id[c][sample["id"]]) >= 0.5 for c in rows if sample["id"] in by_id[c])
        waiting[sample["type"]].append((-min(right, len(rows) - right), position, sample))
    queues = [sorted(w, key=lambda item: item[:2]) for w in waiting.values()]
    out = []
    while len(out) < count and any(queues):
        for queue in queues:
            if queue and len(out) < count:
                sample = queue.pop(0)[2]
                made = Sample(
                    model, task, sample["id"], sample["type"], sample.get("question", ""), str(sample.get("gold", ""))
                )
                made.labels = list(dict.fromkeys(c.label for c in rows))
                made.budgets = list(dict.fromkeys(c.budget for c in rows))
                for c in rows:
                    if (said := by_id[c].get(sample["id"])) is not None:
                        made.entries[c.label, c.budget] = _entry(said)
                if full is not None:
                    made.full = _entry(by_id[full][sample["id"]])
                out.append(made)
    return out


def _entry(sample: Mapping[str, Any]) -> Entry:
    return Entry(str(sample.get("answer", "")), score_of(sample), int(sample.get("kept") or 0))


# ------------------------------------------------------------------------------------------------------------ pictures
def _questions(
    sweep: Mapping[str, Any],
    task: str,
    found: Mapping[Listed, CellResult],
    asked: Sequence[Question] | None,
    data: Path | None,
) -> tuple[dict[str, Question], str]:
    """Make the questions of a task again; by id, or why not."""
    from vtc.eval.config import DATA, TaskConfig
    from vtc.eval.questions import digest, task_questions

    if asked:
        return {q.id: q for q in asked}, ""
    try:
        config = sweep["config"]
        sources = {k: v for k, v in (config.get("data") or {}).items() if v is not None}
        given = config.get("tasks") or [{"name": DATA, "data": sources}]
        tasks = {t.title: t for t in map(TaskConfig.model_validate, given)}
        if task not in tasks:
            return {}, "the sweep's settings do not describe it"
        chosen = tasks[task]
        if chosen.kind == "lmms":
            return {}, "they belong to lmms-eval and are not stored"
        most = max((len(r.samples) for r in found.values()), default=0)
        if chosen.made > most:
            return {}, "the sweep's settings ask for other questions than the store has answers to"
        if chosen.kind == "files":
            if data is None:
                return {}, "they are files, and not in the store: name the folder they are in with --data"
            chosen = _below(chosen, data)
        questions = task_questions(chosen)
        if digest(questions) not in {str(r.config.get("task", {}).get("questions")) for r in found.values()}:
            return {}, "those that are there now are not those that were answered"
        return {q.id: q for q in questions}, ""
    except (VtcError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        return {}, short(error, 500)


def _below(task: TaskConfig, data: Path) -> TaskConfig:
    """Return a task whose files lie below ``data`` as they lay to one another when it was asked: nothing else is read."""
    assert task.folder is not None and task.questions is not None
    top = Path(os.path.commonpath([task.folder, Path(task.questions).parent]))
    moved = {name: str(inside(data, str(Path(getattr(task, name)).relative_to(top)))) for name in ("folder", "questions")}
    return task.model_copy(update=moved)


def _address(image: Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------- kept tokens
def _add_kept(
    sweep: Mapping[str, Any],
    model_name: str,
    found: Mapping[Listed, CellResult],
    samples: Sequence[Sample],
    questions: Mapping[str, Question],
) -> list[str]:
    """Run the embedded model under every row's reducer and note which patches hold a token; returns what must be said."""
    import torch

    import vtc
    from vtc.engine import upstream
    from vtc.eval import env
    from vtc.pocket import POCKET_MODELS, encode_questions, load_pocket
    from vtc.viz import unprocess

    embedded = _embedded(sweep, model_name)
    if embedded is None:
        return [
            f"Model {model_name}: kept tokens are not shown, because that takes a run of the model and only the embedded ones "
            f"({', '.join(POCKET_MODELS)}) are at hand for a report."
        ]
    reducers = _reducers(sweep)
    engine = env.engine_version()
    rows = {c: reducers.get((c.label, c.budget)) for c in found if c.reducer != UNREDUCED}
    same = [
        (c, r) for c, r in rows.items() if r is not None and version_of(found[c].config) == (engine, env.reducer_version(r))
    ]
    changed, failed = sum(r is not None for r in rows.values()) - len(same), sum(r is None for r in rows.values())
    model, processor = load_pocket(embedded)
    batches = encode_questions(processor, [questions[s.id] for s in samples], 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more make a small model wait for the slowest of them
    for cell, reducer in same:
        try:
            with vtc.patch(model, reducer) as handle, torch.no_grad():
                for batch in batches:
                    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
                    model(**inputs, logits_to_keep=1)
                    for kept in handle.stats.kept:
                        sample = samples[batch.positions[kept.row]]
                        if (entry := sample.entries.get((cell.label, cell.budget))) is not None:
                            sample.grid, entry.dropped, entry.merged = _fates(kept)
        except VtcError:
            failed += 1
    torch.set_num_threads(threads)
    for batch in batches:  # a picture that the processor cropped is shown as the tower saw it
        for row, position in enumerate(batch.positions):
            pixels = batch.inputs[upstream.PIXELS]
            if pixels.dim() == 4 and len(pixels) == len(batch.positions):
                samples[position].image = _address(unprocess(pixels[row : row + 1], processor.image_processor)[0])
    notes = ["Small pictures: dark patches have no token in the last decoder layer, half-dark ones share a token with others."]
    if changed:
        notes.append(f"{changed} rows show no kept tokens, because the code has changed since they were measured.")
    if failed:
        notes.append(f"{failed} rows show no kept tokens, because their reducer cannot be set up again.")
    return notes


def _embedded(sweep: Mapping[str, Any], title: str) -> str | None:
    """Name of the embedded model that a table calls ``title``."""
    from vtc.pocket import POCKET_MODELS

    config = sweep["config"]
    several = config.get("models")
    for given in [*(several if isinstance(several, list) else []), config.get("model")]:
        name = given.get("name") if isinstance(given, Mapping) else given
        label = (given.get("label") if isinstance(given, Mapping) else None) or name
        if label == title and isinstance(name, str) and name in POCKET_MODELS:
            return name
    return title if title in POCKET_MODELS else None


def _reducers(sweep: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Build the reducers of a sweep again, by label and budget."""
    from vtc.eval.cells import cells
    from vtc.eval.config import SweepConfig

    try:
        return {
            (c.label, c.budget): c.reducer for c in cells(SweepConfig.model_validate(sweep["config"])) if c.reducer is not None
        }
    except (VtcError, ValueError):
        return {}


def _fates(kept: Any) -> tuple[tuple[int, int], str, str]:
    """Grid, and SVG paths of the patches without a token and of those merged with others; of crops, as they lie in the picture."""
    import torch

    from vtc.core import Kind

    layout, owner = kept.layout, kept.owner
    patch = layout.kind == Kind.PATCH
    if layout.views > 1 and layout.thumbnail:
        patch = patch & (layout.view > 0)
        row, col = layout.y[patch], layout.x[patch]
    else:
        patch = patch & (layout.view == 0)
        row, col = layout.row[patch], layout.col[patch]
    row, col = row - row.min(), col - col.min()
    if owner is None:  # nothing was merged: a slot keeps its own patch or has none
        slots = torch.arange(len(layout))
        owner = torch.where(torch.isin(slots, kept.entries.cpu()), slots, -1)
    sizes = torch.bincount(owner[owner >= 0], minlength=len(layout))
    shared = (owner >= 0) & (sizes[owner.clamp(min=0)] > 1)
    rows, cols = int(row.max()) + 1, int(col.max()) + 1
    paths = []
    for mark in ((owner < 0)[patch], shared[patch]):
        grid = torch.zeros(rows, cols, dtype=torch.bool)
        grid[row[mark], col[mark]] = True
        paths.append(_path(grid.tolist()))
    return (rows, cols), *paths


def _path(grid: Sequence[Sequence[bool]]) -> str:
    """SVG path around the marked cells, one bar for every run of them in a row."""
    out = []
    for y, line in enumerate(grid):
        x = 0
        while x < len(line):
            if not line[x]:
                x += 1
                continue
            start = x
            while x < len(line) and line[x]:
                x += 1
            out.append(f"M{start} {y}h{x - start}v1h-{x - start}z")
    return "".join(out)
