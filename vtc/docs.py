"""Fill the generated blocks of README.md: the table of methods from the registry, results from files under ``results/``.

A block stands between ``<!-- vtc:begin NAME -->`` and ``<!-- vtc:end NAME -->``. Run ``python -m vtc.docs README.md`` after
adding a method or refreshing results; a test compares the blocks with what this module renders.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from vtc.registry import Entry, entries

_BLOCK = re.compile(r"(<!-- vtc:begin (?P<name>[\w./-]+) -->\n).*?(<!-- vtc:end (?P=name) -->)", re.DOTALL)


def methods_table() -> str:
    """Return the Markdown table of all registered methods."""
    lines = ["| reducer | acts at | what it does | source |", "|---|---|---|---|"]
    for entry in entries().values():
        lines.append(f"| `{entry.name}` | {', '.join(entry.stages)} | {_text(entry.summary)} | {_source(entry)} |")
    return "\n".join(lines)


def _text(summary: str) -> str:
    """Turn a docstring line into Markdown."""
    return summary.rstrip(".").replace("``", "`")


def _source(entry: Entry) -> str:
    paper = entry.paper
    if paper.startswith("arXiv:"):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return paper


def families_table() -> str:
    """Return the Markdown table of supported model families."""
    from vtc.families import list_families

    return "\n".join(["| `config.model_type` |", "|---|", *(f"| `{name}` |" for name in list_families())])


def blocks(root: Path) -> dict[str, Callable[[], str]]:
    """Return the renderers by block name; any other name is a file below ``root``."""
    return {"methods": methods_table, "families": families_table}


def render(text: str, root: Path) -> str:
    """Return ``text`` with every generated block renewed."""
    known = blocks(root)

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        body = known[name]() if name in known else (root / name).read_text().strip()
        return f"{match[1]}{body}\n{match[3]}"

    return _BLOCK.sub(fill, text)


def main() -> None:
    """Renew the blocks of the files named on the command line."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(render(path.read_text(), path.resolve().parent))


if __name__ == "__main__":
    main()
