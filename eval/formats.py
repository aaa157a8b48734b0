"""Grids of text in four formats: terminal, Markdown, CSV, LaTeX (booktabs). Whatever a label holds stays text in all of them."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FORMATS: tuple[str, ...] = ("terminal", "md", "csv", "latex")
MISSING = "–"
RANKS = ("", "¹", "²")
"""What the terminal puts after the best and the second-best number."""


@dataclass(frozen=True)
class Line:
    """One line of a grid.

    Attributes
    ----------
    entries : tuple of str
        Text by column.
    ranks : tuple of int
        1 for the best, 2 for the second best of a column, else 0.
    kind : str
        ``"full"`` for the unreduced run, ``"base"`` for a baseline, ``"failed"``, ``"group"`` for a line that names the lines below
        it, else ``"method"``.
    """

    entries: tuple[str, ...]
    ranks: tuple[int, ...]
    kind: str = "method"


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes
    ----------
    titles : tuple of str
        Column headings.
    left : tuple of bool
        Whether a column is aligned left.
    groups : list of list of Line
        Lines, with a rule between groups.
    heading : str
        Above the table, where there are several.
    """

    titles: tuple[str, ...]
    left: tuple[bool, ...]
    groups: list[list[Line]]
    heading: str = ""


def format_grids(
    grids: Sequence[Grid],
    notes: Sequence[str],
    fmt: str,
    *,
    warnings: Sequence[str] = (),
    width: int | None = None,
    color: bool = False,
) -> str:
    """Return grids and the notes below them as text; warnings stand above. CSV has its own function, :func:`csv_text`."""
    if fmt == "md":
        blocks = [f"**{_md(w)}**" for w in warnings]
        for grid in grids:
            blocks += [f"### {_md(grid.heading)}"] * bool(grid.heading) + [_markdown(grid)]
        return "\n\n".join([*blocks, *(_md(n) for n in notes)]) + "\n"
    if fmt == "latex":
        return _latex(grids, notes, warnings)
    if fmt != "terminal":
        raise ValueError(f"format {fmt!r} is not one of {', '.join(FORMATS)}")
    return _terminal(grids, notes, warnings, width, color)


def rank_note(fmt: str) -> str:
    """Say how a format marks the best and the second-best number."""
    best, second = {"md": ("bold", "italic"), "latex": ("bold", "underlined")}.get(fmt, RANKS[1:])
    return f"{best}, {second}: best and second best of a budget, baselines included."


def clean(text: str) -> str:
    """Replace control characters (terminal escapes, line breaks, direction marks) by spaces."""
    if text.isprintable():
        return text  # the common case, quickly: printable characters are in none of the categories below
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") else c for c in text)


def _marked(text: str, before: str, after: str) -> str:
    """Mark the number of an entry, not the interval behind it."""
    head, space, tail = text.partition(" ")
    return f"{before}{head}{after}{space}{tail}"


# ----------------------------------------------------------------------------------------------------------- terminal
def _terminal(grids: Sequence[Grid], notes: Sequence[str], warnings: Sequence[str], width: int | None, color: bool) -> str:
    made = []
    needed = least = 0
    for grid in grids:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        lines = [line for group in grid.groups for line in group]
        full = 0
        for i, (title, left) in enumerate(zip(grid.titles, grid.left, strict=True)):
            entries = [title, *(clean(line.entries[i]) + RANKS[line.ranks[i]] for line in lines)]
            shortest = max((len(word) for entry in entries for word in entry.split()), default=1)
            table.add_column(Text(title), justify="left" if left else "right", min_width=shortest)
            full += max(Text(part).cell_len for entry in entries for part in entry.split("\n")) + 3
        needed = max(needed, full)
        least = max(least, sum((c.min_width or 0) + 3 for c in table.columns))  # below that, rich cuts words
        for group in grid.groups:
            for line in group:
                style = {"full": "bold", "failed": "red"}.get(line.kind, "")
                table.add_row(*(_ranked(clean(e), r) for e, r in zip(line.entries, line.ranks, strict=True)), style=style)
            table.add_section()
        made.append((grid.heading, table))
    # a terminal too narrow for the table folds entries at their spaces; a pipe gets the whole width
    columns = max(needed, 100) if width is None else max(width, least)
    out = io.StringIO()
    console = Console(file=out, width=columns, force_terminal=color, no_color=not color, highlight=False, legacy_windows=False)
    narrow = min(width or columns, max(min(needed, 160), 100))
    for warning in warnings:
        console.print(Text(clean(warning), style="bold yellow" if color else ""), width=narrow)
    for heading, table in made:
        if heading:
            console.print(Text(f"\n{clean(heading)}", style="bold" if color else ""))
        console.print(table)
    for note in notes:
        console.print(Text(clean(note), style="dim" if color else ""), width=narrow)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _ranked(text: str, rank: int) -> Text:
    if not rank:
        return Text(text)
    head, space, tail = text.partition(" ")
    return Text.assemble((head, "bold" if rank == 1 else "underline"), RANKS[rank], space, tail)


# ----------------------------------------------------------------------------------------------------------- Markdown
_MD = str.maketrans({c: "\\" + c for c in "\\`*_{}[]<>#|~$!&"})


def _md(text: str) -> str:
    return clean(text).translate(_MD)


def _markdown(grid: Grid) -> str:
    lines = [
        "| " + " | ".join(_md(t) for t in grid.titles) + " |",
        "|" + "|".join(":--" if left else "--:" for left in grid.left) + "|",
    ]
    for group in grid.groups:
        for line in group:
            entries = (
                _marked(_md(e), *(("", ""), ("**", "**"), ("_", "_"))[r]) for e, r in zip(line.entries, line.ranks, strict=True)
            )
            lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- LaTeX
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "^": r"\textasciicircum{}",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "%": r"\%",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "[": "{[}",  # after \\ a bracket would be read as its argument
        "]": "{]}",
        "×": r"$\times$",
        "–": "--",
        "−": "$-$",
        "≤": r"$\leq$",
    }
)


def _tex(text: str) -> str:
    return clean(text).translate(_LATEX)


def _latex(grids: Sequence[Grid], notes: Sequence[str], warnings: Sequence[str]) -> str:
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}[t]", "\\centering\\small"]
    lines += [f"\\parbox{{\\linewidth}}{{\\textbf{{{_tex(w)}}}}}\\par" for w in warnings]
    for grid in grids:
        if grid.heading:
            lines.append(f"\\textbf{{{_tex(grid.heading)}}}\\par")
        lines += [f"\\begin{{tabular}}{{{''.join('l' if left else 'r' for left in grid.left)}}}", "\\toprule"]
        lines.append(" & ".join(_tex(t) for t in grid.titles) + " \\\\")
        for group in grid.groups:
            lines.append("\\midrule")
            for line in group:
                entries = (
                    _marked(_tex(e), *(("", ""), ("\\textbf{", "}"), ("\\underline{", "}"))[r])
                    for e, r in zip(line.entries, line.ranks, strict=True)
                )
                lines.append(" & ".join(entries) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}", "\\par\\medskip"]
    lines += [f"\\parbox{{\\linewidth}}{{\\footnotesize {_tex(note)}}}\\par" for note in notes]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


# ---------------------------------------------------------------------------------------------------------------- CSV
def csv_text(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return CSV; None is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_field(name) for name in names])
    for row in rows:
        writer.writerow([_field(value) for value in row])
    return out.getvalue()


def _field(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        value = clean(value)
        return "'" + value if value[:1] in ("=", "+", "-", "@") else value  # spreadsheets run those as formulas
    return value
