"""The commands ``vtc bench ...``: what vtc's own arithmetic costs, measured here and now."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="bench",
    help="Measure vtc's own arithmetic on this machine: the quick one is `bars`, all that vtc promises in less than ten minutes.",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Keep ``vtc bench`` a group, however many commands it has."""


def register(parent: typer.Typer) -> None:
    """Add ``vtc bench`` with its sub-commands to the ``vtc`` application; a new one is one more line here."""
    from vtc.eval.bench.bars import bars
    from vtc.eval.bench.kernels import kernels
    from vtc.eval.bench.model import model
    from vtc.eval.bench.plots import plot
    from vtc.eval.bench.reducers import reducers

    app.command("reducers")(reducers)
    app.command("bars")(bars)
    app.command("kernels")(kernels)
    app.command("model")(model)
    app.command("plot")(plot)
    parent.add_typer(app)
