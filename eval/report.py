"""A self-contained HTML report of a store: summary, table, accuracy-versus-tokens plot, accuracy by type, conditions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vtc.eval.config import BASELINES, UNREDUCED
from vtc.eval.store import Store
from vtc.eval.tables import Results, Row, clean, collect, columns, conditions

# blue, orange, green ... chosen to stay apart for colour-blind readers; baselines are grey
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3fa0", "#8c6d31", "#c0392b", "#2f4b7c")
_GREYS = ("#8a8a8a", "#b0b0b0", "#5a5a5a")
_MARKERS = "osD^vPX*<>"


def write_report(store: Store, output: Path | None = None) -> Path:
    """Write the report of a store and return its path (``report.html`` in the store by default)."""
    path = output or store.root / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(collect(store)), encoding="utf-8")
    return path


def render_report(results: Results) -> str:
    """Return the report as one HTML page that needs no other file."""
    environment = Environment(
        loader=PackageLoader("vtc.eval", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cols = columns(results)
    types = columns(results, accuracy_only=True, by_type=True)[6:]
    drawn = plot(results)
    return environment.get_template("report.html.j2").render(
        sweep=results.sweep,
        summary=summary(results),
        headings=[(c.title, c.left) for c in cols],
        groups=_grouped(results, cols),
        plot=Markup(drawn) if drawn is not None else None,  # noqa: S704  made by matplotlib from escaped labels
        type_headings=[c.title for c in types],
        type_groups=_grouped(results, [cols[0], cols[1], *types]),
        shades=_shades(results),
        guess=[_guess(results, t) for t in results.types],
        conditions=[clean(line) for line in conditions(results)],
    )


def _grouped(results: Results, cols: list[Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    groups: list[tuple[str, list[tuple[str, list[str]]]]] = []
    for row in results.rows:
        title = "unreduced" if row.reducer == UNREDUCED else f"{row.budget} tokens" if row.budget.isdecimal() else row.budget
        if not groups or groups[-1][0] != title:
            groups.append((title, []))
        kind = "full" if row.reducer == UNREDUCED else "base" if row.reducer in BASELINES else "method"
        groups[-1][1].append((kind, [clean(c.show(row)) for c in cols]))
    return groups


def _shades(results: Results) -> dict[str, int]:
    """Text of a per-type entry -> strength of its background, 0..9."""
    return {str(n): min(9, n // 10) for n in range(101)}


def _guess(results: Results, kind: str) -> str:
    value = results.sweep.get("constant_guess", {}).get(kind)
    return "–" if value is None else f"{100 * value:.0f}"


def summary(results: Results) -> list[str]:
    """Return a few sentences: what the numbers say, drawn from the rows."""
    full = results.unreduced
    done = [r for r in results.rows if r.accuracy is not None and r.reducer != UNREDUCED]
    out = []
    if full is not None and full.accuracy is not None:
        a = full.accuracy
        out.append(
            f"Unreduced, the model answers {100 * a.value:.1f} % of the questions [{100 * a.low:.0f}–{100 * a.high:.0f}] from "
            f"{full.slots:.0f} visual tokens per image."
        )
    for budget in dict.fromkeys(r.budget for r in done):
        group = [r for r in done if r.budget == budget]
        floor = [r for r in group if r.reducer in BASELINES]
        # a method that cuts late runs most layers on more tokens than the baselines: it answers another question
        least = max((r.avg or 0.0 for r in floor), default=0.0)
        alike = [r for r in group if not least or (r.avg or 0.0) <= 1.25 * least]
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
            line += f"; apart, because more tokens per layer are at work: {', '.join(late)}"
        out.append(clean(line) + ".")
    return out


def _accuracy(row: Row) -> float:
    return -1.0 if row.accuracy is None else row.accuracy.value


def plot(results: Results) -> str | None:
    """Return an inline SVG of accuracy over tokens (layer average), or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(r.label for r in results.rows if r.reducer != UNREDUCED and r.accuracy is not None))
    methods = [name for name in labels if all(r.reducer not in BASELINES for r in results.rows if r.label == name)]
    with matplotlib.rc_context({"svg.hashsalt": "vtc", "svg.fonttype": "path", "font.size": 10, "text.parse_math": False}):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figure.subplots()
        full = results.unreduced
        if full is not None and full.accuracy is not None:
            a = full.accuracy
            axes.axhspan(100 * a.low, 100 * a.high, color="#000000", alpha=0.06, lw=0)
            axes.axhline(100 * a.value, color="#333333", lw=1.2, ls=(0, (4, 3)), label=f"unreduced ({full.slots:.0f} tokens)")
        for name in labels:
            rows = sorted((r for r in results.rows if r.label == name and r.accuracy is not None), key=lambda r: r.avg or 0)
            baseline = name not in methods
            order = [x for x in labels if (x not in methods) == baseline].index(name)
            palette = _GREYS if baseline else _COLORS
            axes.plot(
                [r.avg for r in rows],
                [100 * r.accuracy.value for r in rows],  # type: ignore[union-attr]
                color=palette[order % len(palette)],
                marker=_MARKERS[labels.index(name) % len(_MARKERS)],
                ms=5,
                lw=1.4 if baseline else 1.8,
                ls="--" if baseline else "-",
                label=clean(name),
                zorder=2 if baseline else 3,
            )
        axes.set_xscale("log")
        asked = sorted({int(r.budget) for r in results.rows if r.budget.isdecimal()}, reverse=True)
        ticks: list[int] = []
        for tick in (
            ([round(full.slots)] if full is not None else []) + asked + sorted({round(r.avg) for r in results.rows if r.avg})
        ):
            if all(max(t, tick) > 1.2 * min(t, tick) for t in ticks):
                ticks.append(tick)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("visual tokens, averaged over the decoder layers (log scale)")
        axes.set_ylabel("accuracy, %")
        axes.grid(True, color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]
