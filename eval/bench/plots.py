"""``vtc bench plot``: pictures of ``kernels.csv`` and ``model.csv``, from these files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.doors import place
from vtc.errors import StoreError, short
from vtc.eval.bench.common import Table, read
from vtc.eval.bench.kernels import PROVIDERS
from vtc.eval.plots import COLORS, MARKERS, new_figure, style, tidy, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MADE_BY = {"triton": "Triton", "torch": "torch twin", "compile": "torch.compile of the twin", "plain": "plain algorithm"}


def ops(rows: Table, column: str, title: str, providers: Sequence[str]) -> Figure | None:
    """Draw a column of the kernels' rows on a logarithmic axis: a panel per device and size, a line per op, a mark per provider.

    Returns
    -------
    Figure or None
        None where no row has a number.
    """
    there = [r for r in rows if r.get(column) and r["provider"] in providers]
    panels = list(dict.fromkeys((r["device"], r["n"]) for r in there))
    names = list(dict.fromkeys(r["op"] for r in there))[::-1]
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, grid = new_figure(2.2 + 3.6 * across, 0.9 + down * (0.24 * len(names) + 0.9), down, across, sharey=True)
    for axes, (device, n) in zip(grid.flat, panels, strict=False):
        for name in providers:
            mine = {r["op"]: r[column] for r in there if (r["device"], r["n"], r["provider"]) == (device, n, name)}
            i = PROVIDERS.index(name)
            axes.plot(
                list(mine.values()), [names.index(op) for op in mine], MARKERS[i], color=COLORS[i], ms=6, label=_MADE_BY[name]
            )
        axes.axvline(1, color="#222222", lw=1.1, ls=(0, (4, 3)))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"{device}, {n:,} tokens", fontsize=10, loc="left")
        tidy(axes)
    _finish(figure, grid, len(panels))
    figure.supxlabel(title, fontsize=10)
    return figure


def speedups(rows: Table) -> Figure | None:
    """Draw the prefill's speed-up by reducer and budget, and how far FLOPs alone would let it go; a panel per device and model."""
    there = [r for r in rows if r.get("speedup_prefill") and r["batch"] == 1 and r["reducer"] != "none"]
    panels = list(dict.fromkeys((r["device"], r["model"]) for r in there))
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    longest = max(len({r["reducer"] for r in there if (r["device"], r["model"]) == p}) for p in panels)
    figure, grid = new_figure(1.6 + 5.2 * across, 1.0 + down * (0.26 * longest + 0.9), down, across)
    for axes, (device, model) in zip(grid.flat, panels, strict=False):
        mine = [r for r in there if (r["device"], r["model"]) == (device, model)]
        names = list(dict.fromkeys(r["reducer"] for r in mine))[::-1]
        budgets = sorted({r["keep"] for r in mine}, reverse=True)
        for i, keep in enumerate(budgets):
            some = [r for r in mine if r["keep"] == keep]
            at = [names.index(r["reducer"]) for r in some]
            color, slots = COLORS[i % len(COLORS)], some[0]["visual_tokens"]
            axes.hlines(
                at, [r["speedup_prefill"] for r in some], [r["bound_prefill"] for r in some], color=color, lw=1, alpha=0.6
            )
            axes.plot(
                [r["speedup_prefill"] for r in some], at, MARKERS[i], color=color, ms=6, label=f"{slots:,.0f} to {keep:,.0f}"
            )
            axes.plot([r["bound_prefill"] for r in some], at, "|", color=color, ms=11, mew=2)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(left=0)
        axes.set_title(f"{model} on {device}", fontsize=10, loc="left")
        axes.legend(
            title="visual tokens", fontsize=8, title_fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
        tidy(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("speed-up of the prefill; the upright stroke is the bound by FLOPs", fontsize=10)
    return figure


def throughput(rows: Table) -> Figure | None:
    """Draw prompts per second up to their first token against the batch size, reduced and not; a panel per device and model."""
    timed = [r for r in rows if r.get("prompts_s") and r["reducer"] != "none"]
    lines: dict[tuple[Any, ...], Table] = {}
    for r in timed:
        lines.setdefault((r["device"], r["model"], r["reducer"], r["keep"]), []).append(r)
    lines = {key: sorted(some, key=lambda r: r["batch"]) for key, some in lines.items() if len({r["batch"] for r in some}) > 1}
    panels = list(dict.fromkeys(key[:2] for key in lines))
    if not panels:
        return None
    figure, grid = new_figure(0.6 + 5.4 * len(panels), 4.0, 1, len(panels))
    for axes, panel in zip(grid.flat, panels, strict=True):
        for i, (key, some) in enumerate((key, some) for key, some in lines.items() if key[:2] == panel):
            batches = [r["batch"] for r in some]
            if not i:
                unreduced = [r["unreduced_prompts_s"] for r in some]
                axes.plot(batches, unreduced, "s", color="#4d4d4d", ls="--", label="unreduced")
            color = COLORS[i % len(COLORS)]
            label = f"{key[2]}, {some[0]['visual_tokens']:,.0f} to {key[3]:,.0f} tokens"
            axes.plot(batches, [r["prompts_s"] for r in some], MARKERS[i % len(MARKERS)], color=color, ls="-", label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [f"{b:.0f}" for b in batches])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prompts in a batch")
        axes.set_title(f"{panel[1]} on {panel[0]}", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    grid[0, 0].set_ylabel("first tokens per second")
    return figure


def _finish(figure: Figure, grid: Any, used: int) -> None:
    """Hide what has no panel, and put one legend above all."""
    for axes in list(grid.flat)[used:]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in list(grid.flat)[:used]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if len(handle.get_xdata()):
                handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)


def draw(folder: Path) -> dict[str, Figure]:
    """Draw all that the CSV files in a folder have numbers for; by name."""
    kernels, models = read(folder / "kernels.csv"), read(folder / "model.csv")
    with style():
        found = {
            "kernels-speedup": ops(kernels, "speedup_vs_plain", "speed-up over the plain algorithm (log scale)", PROVIDERS[:3]),
            "kernels-roofline": ops(kernels, "roofline_share", "share of the measured roofline (log scale)", PROVIDERS),
            "model-speedup": speedups(models),
            "model-throughput": throughput(models),
        }
    return {name: figure for name, figure in found.items() if figure is not None}


def plot(
    folder: Annotated[Path, typer.Argument(help="Folder with kernels.csv or model.csv, as `vtc bench bars --out` leaves it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the pictures; the same by default.")] = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help="png, svg or pdf.")] = "png",
) -> None:
    """Draw what `vtc bench` measured: kernels beside their alternatives, models beside the FLOP bound, throughput."""
    folder, shown = place(folder), short(folder)
    try:
        figures = draw(folder)
    except (KeyError, TypeError, ValueError, IndexError) as error:  # columns or numbers that `vtc bench` does not write
        raise StoreError(
            f"the CSV files in {shown} are not those of `vtc bench` ({short(repr(error))}): measure them anew"
        ) from None
    if not figures:
        raise StoreError(f"there is nothing to draw in {shown}: measure with `vtc bench bars --out {shown}`")
    for name, figure in figures.items():
        print(write_picture(figure, out if out is not None else folder, name, fmt))
