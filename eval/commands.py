"""The commands ``vtc sweep``, ``table``, ``plot``, ``report`` and ``tune``, registered through the entry point ``vtc.commands``."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc import doors
from vtc.cli import Trust
from vtc.errors import UnknownArgumentError, did_you_mean
from vtc.eval import bench
from vtc.files import save

if TYPE_CHECKING:
    from vtc.eval.store import Store

RESULTS = Path("results/store")
"""Where stores go when none is named."""

StoreArgument = Annotated[
    Path | None, typer.Argument(help=f"Results store; the most recent one in {RESULTS}/ by default.", show_default=False)
]

SweepOption = Annotated[
    str,
    typer.Option("--sweep", help="Of a store that several sweeps use: which one; the latest by default.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the ``vtc`` application."""
    app.command("sweep")(sweep)
    app.command("table")(table)
    app.command("plot")(plot)
    app.command("report")(report)
    app.command("tune")(tune)
    bench.register(app)


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: models, tasks, budgets, reducers (see configs/).")],
    out: Annotated[Path | None, typer.Option("--out", help=f"Results store; {RESULTS}/<name of the file> by default.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on standard output and nothing else; progress is JSON on standard error.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and what they cost, and run nothing.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the file: data.scenes.n=110")] = None,
    shard: Annotated[str, typer.Option("--shard", help="Only part I of N of the cells: I/N, such as 1/8.")] = "",
    executor: Annotated[str, typer.Option("--executor", help="Where cells run: local, or ray (a cluster).")] = "local",
    workers: Annotated[
        int | None,
        typer.Option("--workers", max=1024, help="Cells at a time: 1 (local); one for every GPU or CPU of the cluster (ray)."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Measure models x tasks x reducers x budgets: accuracy, tokens, FLOPs, speed. Finished cells are not run again."""
    from rich.console import Console

    from vtc.eval.store import Store
    from vtc.eval.sweepfile import load_sweep

    config = load_sweep(file, overrides or (), trust_remote_code=trust)
    part = _shard(shard)
    root = doors.place(out if out is not None else RESULTS / file.stem)
    used = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if used:
        Store(root)  # a folder that cannot be used is refused before any question is made
    from vtc.eval import executors
    from vtc.eval.run import Sweep

    console = Console(stderr=True)
    running = Sweep(config, str(file))
    only = running.shard(*part)
    if dry_run:
        from vtc.eval.cost import plan_text, price

        running.anywhere = executor == "ray"
        plan = price(running, Store(root) if used else None, only)
        print(json.dumps({"store": str(root), **plan}, indent=2) if as_json else plan_text(plan, root))
        return
    with ended_like_ctrl_c():
        running.check_data()
        if executor != "ray":  # the nodes of a cluster have devices and caches of their own
            running.check_models()
        only = running.shard(*part)  # the plan may be a new one
        slots = executors.make(executor, workers)
        try:
            store = Store(root, create=True)
            outcome = running.run(store, console, executor=slots, only=only, as_json=as_json)
        finally:
            slots.close()
    from vtc.eval.report import write_report
    from vtc.eval.results import collect

    store = store.at(outcome.sweep)  # whatever else was recorded meanwhile
    results = collect(store)
    path = write_report(store, asked=running.questions)
    if as_json:
        print(json.dumps(_json(results, root, path, outcome), indent=2))
    else:
        _print_terminal(results)
        print(f"\nReport: {path}\nThis table again: vtc table {root}")
        for line in dict.fromkeys(f"{x.label} {x.budget} on {x.model} was left out: {x.reason}" for x in running.left_out):
            console.print(line, style="dim", markup=False, highlight=False)
        console.print(f"{outcome.done} cells run, {outcome.skipped} finished before, {outcome.failed} failed", highlight=False)
    if outcome.failed:
        for line in outcome.errors:
            console.print(line, style="red", markup=False, highlight=False)
        raise typer.Exit(1)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, with which clusters end their jobs, as Ctrl-C: claims are given back, and workers end."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shard(text: str) -> tuple[int, int]:
    """Read ``I/N``; the whole when empty."""
    number, slash, of = (text or "1/1").partition("/")
    right = slash and all(n.isdecimal() and len(n) < 7 for n in (number, of)) and 1 <= int(number) <= int(of)
    if not right:
        raise UnknownArgumentError(
            f"--shard {doors.short(text)!r} is not of the form I/N with 1 <= I <= N: write for example --shard 3/8"
        )
    return int(number), int(of)


def table(
    store: StoreArgument = None,
    which: SweepOption = "",
    fmt: Annotated[str, typer.Option("--format", "-f", help="terminal, md, csv or latex.")] = "terminal",
    accuracy_only: Annotated[bool, typer.Option("--accuracy-only", help="Leave out costs and timings.")] = False,
    by_type: Annotated[bool, typer.Option("--by-type", help="Add accuracy by question type.")] = False,
    paper: Annotated[
        str | None, typer.Option("--paper", help="Published numbers beside ours: a name in configs/paper/, or a YAML file.")
    ] = None,
    vtc_groups: Annotated[
        bool, typer.Option("--vtc", help="Accuracy on difficult and simple questions (VTC-Bench protocol).")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
) -> None:
    """Print the table of a results store."""
    from vtc.eval.formats import FORMATS
    from vtc.eval.results import collect
    from vtc.eval.tables import render

    if fmt not in FORMATS:
        raise UnknownArgumentError(
            f"there is no table format '{fmt}'{did_you_mean(fmt, FORMATS)} (formats: {', '.join(FORMATS)})"
        )
    if paper is not None and vtc_groups:
        raise UnknownArgumentError("--paper and --vtc are two tables: ask for one at a time")
    if (paper is not None or vtc_groups) and (accuracy_only or by_type):
        raise UnknownArgumentError("--accuracy-only and --by-type belong to the plain table: leave them out here")
    shown = _terminal() if output is None and fmt == "terminal" else {}
    if paper is not None:
        from vtc.eval.paper import load_paper, render_paper

        published = load_paper(paper)  # before a large store is read
    opened = _opened(store, which)
    if vtc_groups:
        from vtc.eval.vtcbench import render_vtc

        text = render_vtc(opened, fmt, **shown)
    elif paper is not None:
        text = render_paper(published, collect(opened), fmt, name=paper, **shown)
    else:
        text = render(collect(opened), fmt, accuracy_only=accuracy_only, by_type=by_type, **shown)
    _put_out(text, output)


def plot(
    store: StoreArgument = None,
    which: SweepOption = "",
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", "-k", help="tokens, flops, time, pareto, types, layers; everything there are numbers for by default."
        ),
    ] = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help="png, svg or pdf.")] = "png",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; plots/ in the store by default.")] = None,
) -> None:
    """Draw accuracy against cost, the Pareto front, question types and tokens by layer, from a results store."""
    from vtc.eval.plots import ENDINGS, KINDS, save
    from vtc.eval.results import collect

    for given, known, what in ((kinds or [], KINDS, "plot"), ([fmt], ENDINGS, "picture format")):
        for name in given:
            if name not in known:
                raise UnknownArgumentError(
                    f"there is no {what} '{name}'{did_you_mean(name, known)} ({what}s: {', '.join(known)})"
                )
    opened = _opened(store, which)
    for path in save(collect(opened), out if out is not None else opened.root / "plots", kinds or (), fmt):
        print(path)


def report(
    store: StoreArgument = None,
    which: SweepOption = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the store by default.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, max=2000, help="Most questions in the sample browser.")] = 24,
    overlays: Annotated[
        bool, typer.Option("--overlays/--no-overlays", help="Run the embedded model to show which tokens each method kept.")
    ] = True,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with the images and CSV files of your own tasks; not read without.")
    ] = None,
) -> None:
    """Write the HTML report of a results store: one file, everything in it.

    Of your own images and questions it shows what the store holds, which is the answers. With --data it looks for the rest below
    that folder, and nowhere else: a store that somebody sent you cannot name files of yours.
    """
    from vtc.eval.report import write_report

    opened = _opened(store, which)
    print(write_report(opened, output, samples=samples, overlays=overlays, data=data))


def tune(
    what: Annotated[str, typer.Argument(metavar="MODEL|FILE.yaml", help="A model, or a sweep file (its model, task, rows).")],
    target_drop: Annotated[str, typer.Option("--target-drop", help="Loss of accuracy that is too much: 1% or 0.01.")],
    reducers: Annotated[
        str | None, typer.Option("--reducers", help="Names with commas between; those of the file by default.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="Tokens or shares with commas between: 98,49 or 50%,25%.")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Most questions asked for one budget.")] = 2400,
    confidence: Annotated[float, typer.Option("--confidence", min=0.5, max=0.9999, help="Of every accepted budget.")] = 0.95,
    out: Annotated[Path | None, typer.Option("--out", help=f"Store; {RESULTS}/tune-<model or file> by default.")] = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help="terminal, md, csv or latex.")] = "terminal",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")] = False,
    trust: Trust = False,
) -> None:
    """Find the smallest budget of every reducer whose loss of accuracy stays below a target, asking no more than it takes."""
    from rich.console import Console

    from vtc.eval import models
    from vtc.eval.formats import FORMATS
    from vtc.eval.store import Store
    from vtc.eval.tune import Tuner, read_settings, render_tune

    if fmt not in FORMATS:
        raise UnknownArgumentError(
            f"there is no table format '{fmt}'{did_you_mean(fmt, FORMATS)} (formats: {', '.join(FORMATS)})"
        )
    settings = read_settings(what, target_drop, reducers, budgets, questions, confidence, trust_remote_code=trust)
    root = doors.place(out if out is not None else RESULTS / f"tune-{Path(what).stem}")
    models.check_available(settings.model)  # before a folder is made for its results
    console = Console(stderr=True)
    tuner = Tuner(
        settings, Store(root, create=True), lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    )
    with ended_like_ctrl_c():
        record = tuner.record(tuner.run())
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        sys.stdout.write(render_tune(record, fmt, **(_terminal() if fmt == "terminal" else {})))
        console.print(f"Answers and result: {root}", markup=False, highlight=False)


def _opened(root: Path | None, which: str) -> Store:
    from vtc.eval.store import Store, latest_store

    store = Store(root if root is not None else latest_store(RESULTS))
    return store.at(which) if which else store


def _put_out(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        save(output, text, "name another file with --output")
        print(output)


def _terminal() -> dict[str, Any]:
    """How to render for standard output."""
    there = sys.stdout.isatty()
    return {"width": shutil.get_terminal_size().columns if there else None, "color": there}


def _print_terminal(results: Any) -> None:
    from vtc.eval.tables import render

    sys.stdout.write(render(results, "terminal", **_terminal()))


def _json(results: Any, root: Path, path: Path, outcome: Any) -> dict[str, Any]:
    """Everything a script wants of a sweep."""
    from vtc.eval.tables import columns

    raw = [pair for c in columns(results, by_type=True) for pair in c.raw]
    return {
        "store": str(root),
        "sweep": outcome.sweep,
        "report": str(path),
        "done": outcome.done,
        "skipped": outcome.skipped,
        "failed": outcome.failed,
        "errors": list(outcome.errors),
        "rows": [
            {name: get(row) for name, get in raw} | {"model": row.model, "error": row.error or None} for row in results.rows
        ],
    }
