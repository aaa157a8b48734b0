"""The command ``vtc tasks`` (registered through the entry point group ``vtc.commands``)."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from typing import Annotated

import typer

from vtc.errors import UnknownArgumentError, did_you_mean


def register(app: typer.Typer) -> None:
    """Add the command to the ``vtc`` application."""
    app.command("tasks")(tasks)


def tasks(
    pattern: Annotated[str, typer.Argument(help="Part of a name, a wildcard, or a kind: offline, image, video ...")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    path: Annotated[
        bool, typer.Option("--path", help="Print the folder of the offline tasks, for lmms-eval's --include_path.")
    ] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Download the data sets of the tasks, for use without network.")
    ] = False,
) -> None:
    """List the benchmarks: task name of lmms-eval, headline metric, scale, number of questions, data set."""
    from vtc.eval.lmms.benchmarks import JUDGES, TASKS, known_tasks

    if path:
        print(TASKS)
        return
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    rows = [b for b in known_tasks().values() if b.kind == pattern or fnmatch.fnmatch(b.name, glob)]
    if not rows:
        raise UnknownArgumentError(f"no task matches '{pattern}'{did_you_mean(pattern, known_tasks())} (`vtc tasks` shows all)")
    if prepare:
        from vtc.eval.lmms.run import check_task, load_task

        for benchmark in rows:
            check_task(benchmark.name)
            load_task(benchmark.name)
            print(f"{benchmark.name}: ready")
        return
    if as_json:
        print(json.dumps([dataclasses.asdict(b) for b in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "benchmark", "metric", "scale", "n", "data set", "needs and notes", box=None, pad_edge=False)
    for column in table.columns[:3]:
        column.no_wrap = True
    for b in rows:
        scale = f"x{b.scale:g}" + ("" if b.higher_is_better else ", lower is better")
        data = ", ".join(filter(None, (b.dataset, b.config, b.split))) if b.dataset else "offline"
        notes = "; ".join(filter(None, (JUDGES.get(b.judge), b.note)))
        table.add_row(b.name, b.title, "+".join(b.metrics), scale, f"{b.n:,}", data, notes)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=200, highlight=False)  # pipes and logs have no width
    console.print(table)
    console.print(f"\n{len(rows)} tasks; any other task of lmms-eval works, too (`lmms-eval tasks`)", style="dim")
