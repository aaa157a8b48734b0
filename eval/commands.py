"""The commands ``vtc sweep``, ``vtc table`` and ``vtc report`` (registered through the entry point group ``vtc.commands``)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.errors import StoreError, UnknownArgumentError, did_you_mean

RESULTS = Path("results/store")
"""Where stores go when none is named."""

StoreArgument = Annotated[
    Path | None, typer.Argument(help=f"Results store; the most recent one in {RESULTS}/ by default.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the ``vtc`` application."""
    app.command("sweep")(sweep)
    app.command("table")(table)
    app.command("report")(report)


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: data, budgets, reducers (see configs/).")],
    out: Annotated[Path | None, typer.Option("--out", help=f"Results store; {RESULTS}/<name of the file> by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the file: data.scenes.n=110")] = None,
) -> None:
    """Measure reducers x budgets: accuracy, tokens, FLOPs, speed. Finished cells are not run again."""
    from rich.console import Console

    from vtc.eval.config import load_sweep
    from vtc.eval.store import Store

    config = load_sweep(file, overrides or ())
    root = out if out is not None else RESULTS / file.stem
    used = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if used:
        Store(root)  # a folder that cannot be used is refused before the model is loaded
    from vtc.eval.run import Sweep

    console = Console(stderr=True)
    running = Sweep(config, str(file))
    if dry_run:
        store = Store(root) if used else None
        rows = [
            {"label": p.cell.label, "budget": p.cell.budget, "id": p.id, "state": running.state(store, p)}
            for p in running.planned
        ]
        if as_json:
            print(json.dumps({"store": str(root), "questions": len(running.questions), "cells": rows}, indent=2))
            return
        for row in rows:
            print(f"{row['label']:<20} {row['budget']:>8}  {row['id']}  {row['state']}")
        todo = sum(r["state"] != "done" for r in rows)
        print(f"{todo} of {len(rows)} cells to run on {len(running.questions)} questions, into {root}")
        return
    store = Store(root, create=True)
    outcome = running.run(store, console)
    from vtc.eval.report import write_report
    from vtc.eval.tables import collect

    results = collect(store)
    path = write_report(store)
    if as_json:
        print(json.dumps(_json(results, root, path, outcome), indent=2, ensure_ascii=False))
    else:
        _print_terminal(results)
        print(f"\nReport: {path}\nThis table again: vtc table {root}")
    console.print(f"{outcome.done} cells run, {outcome.skipped} finished before, {outcome.failed} failed", highlight=False)
    if outcome.failed:
        for line in outcome.errors:
            console.print(line, style="red", markup=False, highlight=False)
        raise typer.Exit(1)


def table(
    store: StoreArgument = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help="terminal, md, csv or latex.")] = "terminal",
    accuracy_only: Annotated[bool, typer.Option("--accuracy-only", help="Leave out costs and timings.")] = False,
    by_type: Annotated[bool, typer.Option("--by-type", help="Add accuracy by question type.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
) -> None:
    """Print the table of a results store."""
    from vtc.eval.store import Store, latest_store
    from vtc.eval.tables import FORMATS, collect, render

    if fmt not in FORMATS:
        raise UnknownArgumentError(
            f"there is no table format '{fmt}'{did_you_mean(fmt, FORMATS)} (formats: {', '.join(FORMATS)})"
        )
    results = collect(Store(store if store is not None else latest_store(RESULTS)))
    if output is None and fmt == "terminal":
        _print_terminal(results, accuracy_only=accuracy_only, by_type=by_type)
        return
    text = render(results, fmt, accuracy_only=accuracy_only, by_type=by_type)
    if output is None:
        sys.stdout.write(text)
    else:
        _write(output, text)
        print(output)


def report(
    store: StoreArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the store by default.")
    ] = None,
) -> None:
    """Write the HTML report of a results store."""
    from vtc.eval.report import render_report, write_report
    from vtc.eval.store import Store, latest_store
    from vtc.eval.tables import collect

    opened = Store(store if store is not None else latest_store(RESULTS))
    if output is None:
        print(write_report(opened))
    else:
        _write(output, render_report(collect(opened)))
        print(output)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error.strerror or error}): name another file with --output") from None


def _print_terminal(results: Any, **options: bool) -> None:
    from vtc.eval.tables import render

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    sys.stdout.write(render(results, "terminal", width=width, color=terminal, **options))


def _json(results: Any, root: Path, path: Path, outcome: Any) -> dict[str, Any]:
    """Everything a script wants of a sweep."""
    from vtc.eval.tables import columns

    raw = [pair for c in columns(results, by_type=True) for pair in c.raw]
    return {
        "store": str(root),
        "report": str(path),
        "done": outcome.done,
        "skipped": outcome.skipped,
        "failed": outcome.failed,
        "errors": list(outcome.errors),
        "rows": [{name: get(row) for name, get in raw} | {"error": row.error or None} for row in results.rows],
    }
