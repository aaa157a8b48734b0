"""Figures of a store, from its files alone: accuracy against cost, Pareto front, question types, tokens by layer.

Colours stay apart for colour-blind readers (Okabe and Ito's palette) and never carry a meaning alone: every line also has a marker,
baselines are grey and dashed. Where more methods are compared than colours can tell apart, every method gets a panel of its own in
front of the others. Bars are bootstrap intervals.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.errors import StoreError, UnknownArgumentError, VtcError, did_you_mean
from vtc.eval.config import BASELINES, UNREDUCED
from vtc.eval.formats import clean
from vtc.eval.results import Results, Row
from vtc.files import save as save_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("tokens", "flops", "time", "pareto", "types", "layers")
"""What :func:`draw` can draw."""

ENDINGS = ("png", "svg", "pdf")
"""File formats."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3fa0", "#8c6d31")
GREYS = ("#4d4d4d", "#7a7a7a", "#a0a0a0", "#616161")
MARKERS = "osD^vPX*<>"
_FAINT = "#d7dbe0"
_STYLE = {
    "svg.hashsalt": "vtc",
    "svg.fonttype": "path",
    "font.size": 10,
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
}


class NoMatplotlibError(VtcError, ImportError):
    """Plots need matplotlib."""

    def __init__(self) -> None:
        super().__init__("plots need matplotlib: pip install 'vtc-reducers[plot]'")


@dataclass(frozen=True)
class _Axis:
    """What accuracy is drawn against."""

    title: str
    get: Callable[[Row], float | None]
    log: bool
    spread: Callable[[Row], tuple[float, float] | None] = lambda _: None


def _prefill(row: Row) -> dict[str, float] | None:
    return None if row.speed is None else row.speed["reduced"]["prefill_ms"]


def _flops_axis(rows: Sequence[Row]) -> _Axis:
    most = max((r.flops for r in rows if r.flops), default=0.0)
    unit, scale = next(((u, s) for u, s in (("T", 1e12), ("G", 1e9)) if most >= s), ("M", 1e6))
    return _Axis(f"{unit}FLOPs of one prefill, vision tower included", lambda r: r.flops / scale if r.flops else None, False)


def _axis(kind: str, rows: Sequence[Row]) -> _Axis:
    if kind == "tokens":
        return _Axis(
            "visual tokens, averaged over the decoder layers (log scale)",
            lambda r: r.avg,
            True,
        )
    if kind == "flops":
        return _flops_axis(rows)

    def spread(row: Row) -> tuple[float, float] | None:
        t = _prefill(row)
        return None if t is None else (t["low"], t["high"])

    return _Axis(
        "prefill, ms (median, 20th to 80th percentile)",
        lambda r: None if (t := _prefill(r)) is None else t["value"],
        False,
        spread,
    )


# --------------------------------------------------------------------------------------------------------------- entry
def draw(results: Results, kind: str) -> Figure:
    """Draw one figure of one model.

    Parameters
    ----------
    results : Results
        Of one model (:meth:`vtc.eval.results.Results.of`).
    kind : str
        One of :data:`KINDS`.

    Raises
    ------
    VtcError
        Without matplotlib, for an unknown kind, or where the store lacks what the figure shows.
    """
    if kind not in KINDS:
        raise UnknownArgumentError(f"there is no plot '{kind}'{did_you_mean(kind, KINDS)} (plots: {', '.join(KINDS)})")
    makers: dict[str, Callable[[Results], Figure]] = {"pareto": _pareto, "types": _types, "layers": _layers}
    with style():
        return makers[kind](results) if kind in makers else _curves(results, kind)


def style() -> contextlib.AbstractContextManager[None]:
    """Return the context in which figures are made.

    Raises
    ------
    VtcError
        Without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise NoMatplotlibError from None
    return matplotlib.rc_context(_STYLE)


def available(results: Results) -> list[str]:
    """Return the kinds that the store has numbers for."""
    full = results.unreduced
    rows = [r for r in results.rows if r.accuracy is not None and r.reducer != UNREDUCED]
    has = {
        "tokens": any(r.avg for r in rows),
        "flops": any(r.flops for r in rows),
        "time": any(r.speed for r in rows),
        "pareto": any(r.flops for r in rows),
        "types": full is not None and len(full.by_type) > 1 and bool(rows),
        "layers": full is not None and bool(full.layers) and any(r.layers for r in rows),
    }
    return [kind for kind in KINDS if has[kind]]


def save(results: Results, folder: Path, kinds: Sequence[str], ending: str) -> list[Path]:
    """Write figures into a folder, one file per model and kind, and return their paths.

    Raises
    ------
    VtcError
        See :func:`draw`; also for an unknown ending or a folder that cannot be written.
    """
    paths = []
    several = len(results.models) > 1
    for model in results.models:
        mine = results.of(model)
        for kind in kinds or available(mine):
            name = f"{_file_name(model)}-{kind}" if several else kind
            paths.append(write_picture(draw(mine, kind), folder, name, ending))
    return paths


def write_picture(figure: Figure, folder: Path, name: str, ending: str) -> Path:
    """Write a figure into a folder and return its path.

    Raises
    ------
    VtcError
        For an unknown ending, or a folder that cannot be written.
    """
    if ending not in ENDINGS:
        raise UnknownArgumentError(
            f"there is no picture format '{ending}'{did_you_mean(ending, ENDINGS)} (formats: {', '.join(ENDINGS)})"
        )
    path = folder / f"{name}.{ending}"
    save_file(path, _bytes(figure, ending), "name another folder with --out")
    return path


def inline_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an ``<svg>`` element whose ids start with ``prefix``, so that several fit in one page."""
    svg = _bytes(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    for attribute in ('id="', 'href="#', "url(#"):
        svg = svg.replace(attribute, f"{attribute}{prefix}-")
    return svg


def _bytes(figure: Figure, ending: str) -> bytes:
    import matplotlib

    out = io.BytesIO()
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format=ending, metadata=dated, dpi=150)
    return out.getvalue()


def _file_name(text: str) -> str:
    """Turn a label into part of a file name."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text).strip("-.") or "model"


# -------------------------------------------------------------------------------------------------------------- curves
def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of so many inches and its grid of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _labels(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Names of the methods and of the baselines, in table order."""
    names = dict.fromkeys((r.label, r.reducer in BASELINES) for r in rows if r.reducer != UNREDUCED)
    return [n for n, base in names if not base], [n for n, base in names if base]


def tidy(axes: Axes) -> None:
    """Give axes a faint grid and no frame."""
    axes.grid(True, color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _full_line(axes: Axes, full: Row | None, label: bool) -> None:
    if full is None or full.accuracy is None:
        return
    a = full.accuracy
    axes.axhspan(100 * a.low, 100 * a.high, color="#000000", alpha=0.06, lw=0)
    axes.axhline(100 * a.value, color="#222222", lw=1.1, ls=(0, (4, 3)), label="unreduced" if label else None)


def _line(
    axes: Axes,
    rows: Sequence[Row],
    axis: _Axis,
    color: str,
    marker: str,
    name: str | None,
    *,
    baseline: bool,
    bars: bool = True,
    aside: float = 0.0,
) -> None:
    at = sorted(((axis.get(r), r) for r in rows), key=lambda p: p[0])  # type: ignore[arg-type, return-value]
    x = [p * (1 + aside) if axis.log else p for p, _ in at]  # type: ignore[operator]  bars of one budget beside each other
    y = [100 * r.accuracy.value for _, r in at]  # type: ignore[union-attr]
    low = [100 * (r.accuracy.value - r.accuracy.low) for _, r in at]  # type: ignore[union-attr]
    high = [100 * (r.accuracy.high - r.accuracy.value) for _, r in at]  # type: ignore[union-attr]
    ends = [axis.spread(r) for _, r in at]
    sideways = None
    if bars and all(e is not None for e in ends):
        sideways = [
            [max(0.0, v - e[0]) for v, e in zip(x, ends, strict=True)],
            [max(0.0, e[1] - v) for v, e in zip(x, ends, strict=True)],
        ]  # type: ignore[index]
    axes.errorbar(
        x,
        y,
        yerr=[low, high] if bars else None,
        xerr=sideways,
        color=color,
        marker=marker,
        ms=5 if bars else 0,
        lw=1.3 if baseline else 1.8,
        ls="--" if baseline else "-",
        elinewidth=0.8,
        capsize=2,
        label=name,
        zorder=(2 if baseline else 3) if bars or baseline else 1,
    )


def _curves(results: Results, kind: str) -> Figure:
    axis = _axis(kind, results.rows)
    rows = [r for r in results.rows if r.accuracy is not None and axis.get(r)]
    reduced = [r for r in rows if r.reducer != UNREDUCED]
    if not reduced:
        raise StoreError(
            f"there is nothing to plot against {kind}: the store has no such numbers (run the sweep with its speed pass)"
        )
    methods, baselines = _labels(reduced)
    groups = {name: [r for r in reduced if r.label == name] for name in (*baselines, *methods)}
    full = results.unreduced
    if len(methods) <= len(COLORS):
        figure, grid = new_figure(9, 4.8)
        axes = grid[0, 0]
        _full_line(axes, full, True)
        for i, name in enumerate(groups):
            baseline = name in baselines
            n = i if baseline else i - len(baselines)
            color, marker = (GREYS[n % len(GREYS)], MARKERS[-1 - n]) if baseline else (COLORS[n], MARKERS[n])
            aside = 0.014 * (i - (len(groups) - 1) / 2)
            _line(axes, groups[name], axis, color, marker, clean(name), baseline=baseline, aside=aside)
        _scale(axes, axis, rows)
        axes.set_xlabel(axis.title.replace("(log scale)", "(log scale; equal counts drawn side by side)"))
        axes.set_ylabel(_accuracy_title(results))
        tidy(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return figure
    columns = 5
    count = math.ceil(len(methods) / columns)
    figure, grid = new_figure(12, 2.1 * count + 0.9, count, columns, sharex=True, sharey=True)
    for i, axes in enumerate(grid.flat):
        if i >= len(methods):
            axes.set_visible(False)
            continue
        _full_line(axes, full, i == 0)
        for name in methods:
            _line(axes, groups[name], axis, _FAINT, "", None, baseline=False, bars=False)
        for j, name in enumerate(baselines):
            _line(
                axes,
                groups[name],
                axis,
                GREYS[j % len(GREYS)],
                MARKERS[-1 - j],
                clean(name) if i == 0 else None,
                baseline=True,
                bars=False,
            )
        mine = methods[i]
        _line(axes, groups[mine], axis, COLORS[0], "o", None, baseline=False)
        axes.set_title(textwrap.shorten(clean(mine), 28), fontsize=10, color=COLORS[0], fontweight="bold", loc="left")
        _scale(axes, axis, rows, few=True)
        tidy(axes)
        if i + columns >= len(methods):
            axes.tick_params(labelbottom=True)
    figure.supxlabel(axis.title, fontsize=10)
    figure.supylabel(_accuracy_title(results), fontsize=10)
    figure.legend(loc="outside upper center", ncols=len(baselines) + 1, frameon=False)
    return figure


def _accuracy_title(results: Results) -> str:
    return "mean accuracy over tasks, %" if len(results.tasks) > 1 else "accuracy, %"


def _scale(axes: Axes, axis: _Axis, rows: Sequence[Row], few: bool = False) -> None:
    if not axis.log:
        return
    axes.set_xscale("log")
    asked = sorted({int(r.budget) for r in rows if r.budget.isdecimal()}, reverse=True)
    ticks: list[int] = []
    for tick in (
        [round(r.slots) for r in rows if r.reducer == UNREDUCED] + asked + sorted({round(r.avg) for r in rows if r.avg})
    ):
        if tick > 0 and all(max(t, tick) > (1.9 if few else 1.2) * min(t, tick) for t in ticks):
            ticks.append(tick)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()


# -------------------------------------------------------------------------------------------------------------- Pareto
def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats: as cheap or cheaper and as good or better, one of them strictly."""
    best, out = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            out.append(i)
    return out


def _pareto(results: Results) -> Figure:
    rows = [r for r in results.rows if r.accuracy is not None and r.flops]
    if not any(r.reducer != UNREDUCED for r in rows):
        raise StoreError("there is nothing for a Pareto front: no reduced run of the store has FLOPs (run the sweep again)")
    panels = [("flops", _flops_axis(rows), rows)]
    timed = [r for r in rows if r.speed is not None]
    if any(r.reducer != UNREDUCED for r in timed):
        panels.append(("time", _axis("time", timed), timed))
    figure, grid = new_figure(6.2 * len(panels) + 0.4, 5.2, 1, len(panels), sharey=True)
    for axes, (_, axis, mine) in zip(grid[0], panels, strict=True):
        points = [(axis.get(r), 100 * r.accuracy.value) for r in mine]  # type: ignore[union-attr]
        chosen = front(points)  # type: ignore[arg-type]
        for i, (row, (x, y)) in enumerate(zip(mine, points, strict=True)):
            base = row.reducer in BASELINES
            bar = [[y - 100 * row.accuracy.low], [100 * row.accuracy.high - y]]  # type: ignore[union-attr]
            on = i in chosen
            axes.errorbar(
                [x],
                [y],
                yerr=bar,
                fmt="s" if base else "*" if row.reducer == UNREDUCED else "o",
                ms=9 if row.reducer == UNREDUCED else 6 if on else 4,
                color=("#4d4d4d" if base or row.reducer == UNREDUCED else COLORS[0]) if on else "#b9c0c8",
                elinewidth=0.9 if on else 0.5,
                capsize=2 if on else 0,
                zorder=4 if on else 2,
            )
        ordered = sorted(chosen, key=lambda i: points[i][0])  # type: ignore[arg-type, return-value]
        axes.step(
            [points[i][0] for i in ordered], [points[i][1] for i in ordered], where="post", color=COLORS[1], lw=1.4, zorder=3
        )
        _name_points(axes, [(points[i], f"{mine[i].label} {mine[i].budget}".strip()) for i in ordered])
        axes.set_xlabel(axis.title)
        tidy(axes)
    grid[0, 0].set_ylabel(_accuracy_title(results))
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[
            Line2D([], [], color=COLORS[1], lw=1.4, label="Pareto front"),
            Line2D([], [], color=COLORS[0], marker="o", ls="", label="method on it"),
            Line2D([], [], color="#4d4d4d", marker="s", ls="", label="baseline on it"),
            Line2D([], [], color="#b9c0c8", marker="o", ls="", label="dominated"),
        ],
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    return figure


def _name_points(axes: Axes, named: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write names to the lower right of the points of a rising front, where none of it lies; each below the one it would hide."""
    axes.margins(x=0.16)
    axes.figure.draw_without_rendering()  # settles where points are on the page
    placed: list[tuple[float, float, float]] = []
    for (x, y), name in reversed(named):
        text = textwrap.shorten(clean(name), 30)
        left, top = axes.transData.transform((x, y)) * 72 / axes.figure.dpi + (7, -4)
        width, start = 4.6 * len(text), top
        while any(left < r and left + width > at and abs(top - t) < 10 for at, r, t in placed):
            top -= 10
        placed.append((left, left + width, top))
        axes.annotate(
            text,
            (x, y),
            xytext=(7, -4 + top - start),
            textcoords="offset points",
            fontsize=8,
            va="top",
            zorder=5,
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
        )


# ------------------------------------------------------------------------------------------------------------ heat map
def _types(results: Results) -> Figure:
    rows = [r for r in results.rows if r.accuracy is not None]
    full = results.unreduced
    kinds = [t for t in results.types if any(t in r.by_type for r in rows)]
    if full is None or not full.by_type or len(rows) < 2 or not kinds:
        raise StoreError("there is nothing to compare by question type: the store has no unreduced run with question types")
    budgets = list(dict.fromkeys(r.budget for r in rows if r.reducer != UNREDUCED))
    names = list(dict.fromkeys(r.label for r in rows if r.reducer != UNREDUCED))
    by = {(r.label, r.budget): r for r in rows}
    across = min(len(budgets), 2)
    down = math.ceil(len(budgets) / across)
    # wide enough for the numbers, high enough for the names
    figure, grid = new_figure(
        across * (0.42 * len(kinds) + 0.6) + 2.2, down * (0.27 * len(names) + 1.3) + 0.6, down, across, sharey=True, sharex=True
    )
    from matplotlib.colors import TwoSlopeNorm

    deltas = [100 * (r.by_type[k] - full.by_type[k]) for r in rows for k in kinds if k in r.by_type and k in full.by_type]
    most = max(10.0, *(abs(d) for d in deltas))
    image = None
    for n, axes in enumerate(grid.flat):
        if n >= len(budgets):
            axes.set_visible(False)
            continue
        values = [[_delta(by.get((name, budgets[n])), full, k) for k in kinds] for name in names]
        image = axes.imshow(values, cmap="PuOr", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
        for i, line in enumerate(values):
            for j, v in enumerate(line):
                if not math.isnan(v):
                    dark = abs(v) > 0.62 * most
                    text = f"{v:+.0f}".replace("-", "−") if round(v) else "0"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "#1c2733")
        axes.set_title(f"budget {clean(budgets[n])}", fontsize=10, loc="left")
        axes.set_yticks(range(len(names)), [textwrap.shorten(clean(x), 30) for x in names], fontsize=8)
        axes.set_xticks(range(len(kinds)), [textwrap.shorten(clean(k), 24) for k in kinds], rotation=45, ha="right", fontsize=8)
        if n + across >= len(budgets):
            axes.tick_params(labelbottom=True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    assert image is not None
    figure.colorbar(image, ax=grid, label="accuracy minus unreduced, points", shrink=0.7, pad=0.02, aspect=35)
    return figure


def _delta(row: Row | None, full: Row, kind: str) -> float:
    if row is None or kind not in row.by_type or kind not in full.by_type:
        return math.nan
    return 100 * (row.by_type[kind] - full.by_type[kind])


# ----------------------------------------------------------------------------------------------------------- staircase
def _layers(results: Results) -> Figure:
    rows = [r for r in results.rows if r.layers and r.reducer != UNREDUCED]
    full = results.unreduced
    if not rows or full is None or not full.layers:
        raise StoreError(
            "there is nothing to plot by layer: the store's cells hold no token counts by layer (run the sweep again)"
        )
    budgets = list(dict.fromkeys(r.budget for r in rows))
    across = min(len(budgets), 2)
    down = math.ceil(len(budgets) / across)
    figure, grid = new_figure(6.0 * across, 3.4 * down + 0.3, down, across, sharex=True)
    from matplotlib.ticker import MaxNLocator

    for n, axes in enumerate(grid.flat):
        if n >= len(budgets):
            axes.set_visible(False)
            continue
        alike: dict[tuple[float, ...], list[str]] = {}  # methods that cut at the same place share a line
        for r in rows:
            if r.budget == budgets[n]:
                alike.setdefault(tuple(r.layers or ()), []).append(r.label)
        axes.step(
            range(len(full.layers) + 1),
            [*full.layers, full.layers[-1]],
            where="post",
            color="#222222",
            lw=1.1,
            ls=(0, (4, 3)),
            label="unreduced",
        )
        ordered = sorted(alike.items(), key=lambda item: -sum(item[0]))
        for i, (layers, names) in enumerate(ordered):
            axes.step(
                range(len(layers) + 1),
                [*layers, layers[-1]],
                where="post",
                color=COLORS[i % len(COLORS)],
                ls=("-", "--", "-.", ":")[i // len(COLORS) % 4],
                lw=1.8,
                marker=MARKERS[i % len(MARKERS)],
                markevery=max(1, len(layers) // 6),
                ms=4.5,
                label=_short([clean(x) for x in names]),
            )
        axes.set_title(f"budget {clean(budgets[n])}", fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        axes.set_ylabel("visual tokens")
        if n + across >= len(budgets):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("decoder layer")
        tidy(axes)
        axes.legend(fontsize=7.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    return figure


def _short(names: Sequence[str]) -> str:
    shown, length = [], 0
    for name in names:
        if shown and length + len(name) > 34:
            return f"{', '.join(shown)}, +{len(names) - len(shown)} more"
        shown.append(textwrap.shorten(name, 34))
        length += len(name) + 2
    return ", ".join(shown)
