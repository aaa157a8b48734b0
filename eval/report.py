"""A self-contained HTML report of a store: summary, sortable tables, plots, sample browser, conditions.

The page needs no other file and no network. Its policy lets nothing run but the one script written here, known by its hash, so that
a question or a file name that smuggles in markup stays text even if an escape were missing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vtc.eval import vtcbench
from vtc.eval.browser import SAMPLES, Browser, browse
from vtc.eval.config import BASELINES, UNREDUCED
from vtc.eval.formats import Grid, Line, clean
from vtc.eval.plots import NoMatplotlibError, available, draw, inline_svg
from vtc.eval.results import Results, Row, collect
from vtc.eval.store import Store
from vtc.eval.tables import columns, conditions, grid, guesses, type_columns
from vtc.files import save

if TYPE_CHECKING:
    from vtc.pocket import Question

_PLOTS = {
    "tokens": (
        "Accuracy against visual tokens",
        "One line per method, baselines grey and dashed; bars are bootstrap intervals, the band is that of the unreduced model.",
    ),
    "flops": ("Accuracy against FLOPs", "FLOPs of one prefill with vision tower and reducer; bars are bootstrap intervals."),
    "time": ("Accuracy against time", "Median time of one prefill on the machine named below, with its spread."),
    "pareto": (
        "Pareto front",
        "Rows that no other row beats in both accuracy and cost, by FLOPs and, where it was measured, by prefill time.",
    ),
    "types": ("Question types", "Points gained or lost against the unreduced model, by question type and budget."),
    "layers": ("Tokens by layer", "Visual tokens that every decoder layer runs on; methods that cut alike share a line."),
}


def write_report(
    store: Store,
    output: Path | None = None,
    *,
    samples: int = SAMPLES,
    overlays: bool = True,
    asked: Mapping[str, Sequence[Question]] | None = None,
    data: Path | None = None,
) -> Path:
    """Write the report of a store.

    Parameters
    ----------
    store : Store
        Results.
    output : Path or None
        HTML file; by default ``report.html`` in the store, of another sweep than the store's latest ``report-SWEEP.html``.
    samples : int
        Most samples in the browser; none leaves the browser out.
    overlays : bool
        Whether to run the embedded model on those samples to show which tokens each method kept.
    asked : mapping or None
        Questions by task that the caller has at hand, because it has just asked them.
    data : Path or None
        Folder below which the images and CSV files of the user's own tasks may be looked for.

    Returns
    -------
    Path
        Where the report is.

    Raises
    ------
    StoreError
        The store cannot be read, or the file cannot be written.
    """
    path = output or store.root / (f"report-{store.sweep}.html" if store.sweep and not store.is_latest() else "report.html")
    browser = browse(store, samples, overlays=overlays, asked=asked or {}, data=data) if samples else None
    text = render_report(collect(store), browser=browser, vtc=vtcbench.split(store))
    save(path, text, "name another file with --output")
    return path


def render_report(results: Results, *, browser: Browser | None = None, vtc: vtcbench.Split | None = None) -> str:
    """Return the report as one HTML page that needs no other file."""
    environment = Environment(
        loader=PackageLoader("vtc.eval", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (importlib.resources.files("vtc.eval") / "templates" / "report.js").read_text(encoding="utf-8")
    several = len(results.models) > 1
    tables, type_tables = [], []
    for model in results.models:
        mine = results.of(model)
        cols = columns(mine)
        name = f"model {model}" if several else "accuracy and cost"
        tables.append((clean(f"Table: {name}"), grid(mine.rows, cols)))
        named = [c for c in cols if c.title in ("reducer", "keep", "code")]
        if len(mine.types) > 1:
            by_type = grid(mine.rows, [*named, *type_columns(mine)])
            type_tables.append((clean(f"Question types{f': model {model}' if several else ''}"), by_type, len(named)))
    guess = guesses(results)
    return environment.get_template("report.html.j2").render(
        sweep={key: clean(str(results.sweep.get(key) or "")) for key in ("source", "written")},
        script=Markup(script),  # noqa: S704  our own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        warnings=[clean(line) for line in results.warnings],
        summary=summary(results),
        tables=tables,
        type_tables=type_tables,
        guess=[f"{100 * guess[t]:.0f}" if t in guess else "–" for t in results.types] if guess else None,
        plots=_plots(results),
        extra=[(clean(g.heading), g) for g in vtcbench.grids(vtc)] if vtc is not None else [],
        extra_notes=[clean(line) for line in vtcbench.notes(vtc)] if vtc is not None else [],
        browser=browser,
        kinds=list(dict.fromkeys(clean(s.kind) for s in browser.samples)) if browser is not None else [],
        several_models=several,
        several_tasks=len(results.tasks) > 1,
        conditions=[clean(line) for line in conditions(results)],
        groups=_groups,
        ranked=_ranked,
        shade=_shade,
        clean=clean,
    )


def _groups(table: Grid) -> list[tuple[str, list[Line]]]:
    """Groups with a heading: the budget, which the second column holds."""
    out = []
    for lines in table.groups:
        title = clean(lines[0].entries[1])
        if lines[0].kind == "full" or len(table.groups) == 1:
            title = ""
        elif table.titles[1] == "keep":
            title = f"{title} tokens" if title.isdecimal() else title
        out.append((title, lines))
    return out


def _ranked(entry: str, rank: int) -> Markup:
    """Mark the number of an entry, not the interval behind it."""
    head, space, tail = clean(entry).partition(" ")
    before, after = (("", ""), (Markup("<b>"), Markup("</b>")), (Markup("<u>"), Markup("</u>")))[rank]
    return Markup("{}{}{}{}{}").format(before, escape(head), after, space, tail)


def _shade(entry: str) -> int:
    """Strength of a percentage's background, 0..9."""
    return min(9, int(entry) // 10) if entry.isdecimal() else 0


def _plots(results: Results) -> list[tuple[str, str, Markup]] | None:
    out = []
    several = len(results.models) > 1
    try:
        for number, model in enumerate(results.models):
            mine = results.of(model)
            for kind in available(mine):
                title, text = _PLOTS[kind]
                svg = inline_svg(draw(mine, kind), f"p{number}-{kind}")
                heading = clean(f"{title}, model {model}") if several else title
                out.append((heading, text, Markup(svg)))  # noqa: S704  matplotlib escapes its texts
    except NoMatplotlibError:
        return None
    return out


def summary(results: Results) -> list[str]:
    """Return a few sentences: what the numbers say, drawn from the rows."""
    several = len(results.models) > 1
    out = []
    for model in results.models:
        lines = _summary(results.of(model))
        out += [f"{clean(model)}: {line[0].lower()}{line[1:]}" for line in lines] if several else lines
    return out


def _summary(results: Results) -> list[str]:
    full = results.unreduced
    done = [r for r in results.rows if r.accuracy is not None and r.reducer != UNREDUCED]
    out = []
    if full is not None and full.accuracy is not None:
        a = full.accuracy
        tasks = f" ({len(results.tasks)} tasks, averaged)" if len(results.tasks) > 1 else ""
        out.append(
            f"Unreduced, the model answers {100 * a.value:.1f} % of the questions{tasks} [{100 * a.low:.0f}–{100 * a.high:.0f}] "
            f"from {full.slots:.0f} visual tokens per image."
        )
    for budget in dict.fromkeys(r.budget for r in done):
        group = [r for r in done if r.budget == budget]
        floor = [r for r in group if r.reducer in BASELINES]
        # a method that cuts late runs most layers on more tokens than the baselines: it answers another question
        least = max((r.avg or 0.0 for r in floor), default=0.0)
        alike = [r for r in group if not least or (r.avg or 0.0) <= 1.25 * least] or group
        best = max(alike, key=_accuracy)
        line = f"Budget {budget}: {best.label} is ahead with {100 * _accuracy(best):.1f} %"
        if best.paired is not None and best.paired.ratio is not None:
            line += f" ({100 * best.paired.ratio.value:.0f} % of the unreduced accuracy)"
        if best.reducer in BASELINES:
            line += ", a baseline: no method at a like number of tokens per layer beats it here"
        elif floor:
            top = max(floor, key=_accuracy)
            line += f"; the best baseline, {top.label}, reaches {100 * _accuracy(top):.1f} %"
        late = [f"{r.label} ({100 * _accuracy(r):.1f} % from {r.avg:.0f} tokens per layer)" for r in group if r not in alike]
        if late:
            line += f"; apart, because more tokens per layer are at work: {_list(late)}"
        out.append(clean(line) + ".")
    return out


def _list(items: Sequence[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _accuracy(row: Row) -> float:
    return -1.0 if row.accuracy is None else row.accuracy.value
