"""Documentation that is generated: what the registry and the reducers' docstrings say, and results from files.

A block stands between ``<!-- vtc:begin NAME -->`` and ``<!-- vtc:end NAME -->`` in README.md or a page of docs/. Run
``python -m vtc.docs README.md docs/*.md`` after adding a method or refreshing results; a test compares the blocks with what this
module renders. ``vtc info NAME`` prints the same entry (:class:`Sheet`) in the terminal.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc import _window
from vtc.core import Reducer
from vtc.files import write_whole
from vtc.registry import Entry, create, entries

_BLOCK = re.compile(r"(<!-- vtc:begin (?P<name>[\w./-]+) -->\n).*?(<!-- vtc:end (?P=name) -->)", re.DOTALL)
_ITEM = re.compile(r"^(\w+(?:, \w+)*) : (.*)$")
_LIST = re.compile(r"(\d+\.|[-*]) ")
_SENTENCE = re.compile(r"(?<=[.;])\s+(?=[A-Z`*])")
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
"""Recorded outputs of the official implementations; in a checkout only."""


# ---------------------------------------------------------------------------------------------------------------- entries
@dataclass(frozen=True)
class Parameter:
    """One option of a reducer, or several that the docstring describes together.

    Attributes
    ----------
    names : tuple of str
        Names of the options.
    kind, text : str
        Type and description, from the docstring.
    default : Any
        Default of the first of them, from the class.
    """

    names: tuple[str, ...]
    kind: str
    text: str
    default: Any


@dataclass(frozen=True)
class Sheet:
    """What the documentation says about one reducer.

    Attributes
    ----------
    entry : Entry
        Name, paper, code, licence and presets.
    summary, idea : str
        First sentence of the docstring, and what follows up to the deviations.
    deviates : str
        Where the reducer differs from the release, from ``Deviates:`` on.
    unconfirmed : tuple of str
        Sentences of the docstring that call something unconfirmed.
    parameters : tuple of Parameter
        Options of its own, in the docstring's order.
    needs : tuple of str
        Signals tapped on a LLaVA-1.5 at the default options.
    positions, newlines : str
        What becomes of RoPE positions and of AnyRes newline tokens.
    golden : tuple of str or None
        Golden files it is tested against; ``None`` where the tests are not at hand.
    """

    entry: Entry
    summary: str
    idea: str
    deviates: str
    unconfirmed: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    needs: tuple[str, ...]
    positions: str
    newlines: str
    golden: tuple[str, ...] | None

    @property
    def missing(self) -> list[str]:
        """Fields the docstring or the registration leaves out; empty when the entry is complete."""
        options = {o for o in self.entry.options if not o.startswith("_")} - _inherited()
        said = [name for p in self.parameters for name in p.names]
        found = {
            "summary": self.summary.endswith("."),
            "idea": self.idea or self.entry.paper == "baseline",
            "deviates": self.deviates,
            "paper": self.entry.paper,
            "licence": self.entry.licence or not self.entry.code,
            **{f"parameter {name}": name in said for name in sorted(options)},
            **{f"description of {', '.join(p.names)}": p.text for p in self.parameters},
            **{f"option {name}, which does not exist": name in self.entry.options for name in said},
        }
        return [name for name, there in found.items() if not there]


def _inherited() -> set[str]:
    """Options that every reducer has and that are described once, except ``keep``, which means something else in each."""
    return set(Reducer.__dataclass_fields__) - {"keep"}


def sheet(entry: Entry) -> Sheet:
    """Read a reducer's registration and docstring."""
    from vtc.inspect import needs_of, positions_of

    head, _, listing = (inspect.getdoc(entry.cls) or "").partition("\nParameters\n----------\n")
    summary, *paragraphs = [p if _LIST.match(p) else " ".join(p.split()) for p in head.strip().split("\n\n")]
    at = next((i for i, p in enumerate(paragraphs) if p.startswith("Deviates:")), len(paragraphs))
    idea, deviates = "\n\n".join(paragraphs[:at]), "\n\n".join(paragraphs[at:]).removeprefix("Deviates:").strip()
    spoken = [summary, *(s for p in paragraphs for s in _SENTENCE.split(" ".join(p.split())))]
    return Sheet(
        entry,
        summary,
        idea,
        deviates,
        tuple(s.removeprefix("Deviates: ") for s in spoken if "unconfirmed" in s.lower()),
        tuple(_parameters(listing, entry.options)),
        tuple(needs_of(entry.name)),
        positions_of(entry.name),
        create(entry.name, keep=0.5).newline_policy,
        golden(entry.name),
    )


def _parameters(listing: str, options: Mapping[str, Any]) -> list[Parameter]:
    """Read the list of options of a NumPy-style docstring."""
    out: list[Parameter] = []
    for line in listing.splitlines():
        item = _ITEM.match(line)
        if item is not None:
            names = tuple(item[1].split(", "))
            out.append(Parameter(names, item[2].partition(", default")[0], "", options.get(names[0])))
        elif out:
            out[-1] = dataclasses.replace(out[-1], text=f"{out[-1].text} {line.strip()}".strip())
    return out


@functools.cache
def _golden_files() -> dict[str, tuple[str, ...]]:
    """Golden files by reducer. ``prumerge/plus_x`` belongs to ``prumerge_plus``: a first word that makes another method's name."""
    found: dict[str, list[str]] = {}
    for path in sorted(GOLDEN.glob("*/*.safetensors")):
        variant = f"{path.parent.name}_{path.stem.split('_')[0]}"
        found.setdefault(variant if variant in entries() else path.parent.name, []).append(path.stem)
    return {name: tuple(files) for name, files in found.items()}


def golden(name: str) -> tuple[str, ...] | None:
    """Return the golden files of a reducer, or ``None`` outside a checkout."""
    return _golden_files().get(name, ()) if GOLDEN.is_dir() else None


def settings(options: Mapping[str, Any]) -> str:
    """Return options as people write them: ``keep=64, layer=2``."""
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def entry_text(page: Sheet, title: str = "", mark: str = "") -> str:
    """Return one reducer's entry in Markdown.

    Parameters
    ----------
    title : str
        Heading; the name if not given.
    mark : str
        Preset to point out.
    """
    entry = page.entry
    code = _link(entry.code) if entry.code else "none public" if entry.paper != "baseline" else "our own baseline"
    licence = f" (licence: {entry.licence})" if entry.code else ""
    lines = [f"### {title or f'`{entry.name}`'}", "", _text(page.summary), ""]
    if page.idea:
        lines += [_text(page.idea), ""]
    lines += [
        f"- **Acts at**: {', '.join(entry.stages)}",
        f"- **Needs**: {', '.join(page.needs) or 'features only'}",
        f"- **Positions**: {page.positions}; **AnyRes newline tokens**: {page.newlines}",
        f"- **Paper**: {_source(entry)}; **code**: {code}{licence}",
    ]
    if page.golden is not None:
        names = f" ({', '.join(f'`{n}`' for n in page.golden)})" if page.golden else ""
        lines.append(f"- **Golden files matched**: {len(page.golden)}{names}")
    lines += ["", f"**Deviates**: {_text(page.deviates)}", ""]
    if page.unconfirmed:
        lines += ["**Unconfirmed**:", "", *(f"- {_text(sentence)}" for sentence in page.unconfirmed), ""]
    lines += ["**Parameters**", ""]
    for p in page.parameters:
        default = "" if p.names == ("keep",) else f", default `{p.default!r}`"
        lines.append(f"- {', '.join(f'`{n}`' for n in p.names)} ({_text(p.kind)}{default}): {_text(p.text)}")
    lines += ["", "**Presets**" if entry.presets else "**Presets**: none", ""]
    for key, options in entry.presets.items():
        chosen = " (chosen)" if key == mark else ""
        lines.append(f"- `{entry.name}.{key}`: `{settings(options)}`{chosen}")
    return "\n".join(lines).rstrip() + "\n"


def _text(text: str) -> str:
    """Turn docstring text into Markdown: roles and double backticks become single ones."""
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")


def _link(code: str) -> str:
    """Turn ``URL @ commit (remark)`` into a link."""
    address, _, rest = code.partition(" ")
    return f"[{address.removeprefix('https://github.com/')}]({address}) {rest}".rstrip()


# ----------------------------------------------------------------------------------------------------------------- blocks
def methods_table() -> str:
    """Return the Markdown table of all registered methods."""
    lines = ["| reducer | acts at | what it does | source |", "|---|---|---|---|"]
    for entry in entries().values():
        lines.append(f"| `{entry.name}` | {', '.join(entry.stages)} | {_text(entry.summary.rstrip('.'))} | {_source(entry)} |")
    return "\n".join(lines)


def _source(entry: Entry) -> str:
    paper = entry.paper
    if paper.startswith("arXiv:"):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return paper


def reducers_pages() -> str:
    """Return the entries of all registered methods, one after the other."""
    sheets = [sheet(entry) for entry in entries().values()]
    files = sum(len(page.golden or ()) for page in sheets)
    head = (
        f"{len(sheets)} reducers, {files} golden files. A budget is `keep` (tokens entering the stage) or `avg_tokens` (averaged "
        "over the decoder layers); every reducer takes either, and also `positions` and `newlines` (see `vtc.core.Reducer`)."
    )
    return "\n".join([head, "", *(entry_text(page) for page in sheets)]).rstrip()


def upstream_tables() -> str:
    """Return what vtc relies on in transformers as two tables: arguments by role, and the rest."""
    from vtc.engine.upstream import RELIANCE, ROLES

    lines = ["| what vtc reads or writes | its names, the newest first |", "|---|---|"]
    lines += [f"| {role.what} | {', '.join(f'`{name}`' for name in role.names)} |" for role in ROLES.values()]
    lines += ["", "| what else vtc relies on | how |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {how} |" for what, how in RELIANCE.items()])


def window_table() -> str:
    """Return the tested window as a table."""
    lines = ["| package | from | to |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {oldest} | {newest} |" for name, (oldest, newest) in _window.TESTED.items()])


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "reducers": reducers_pages,
    "upstream": upstream_tables,
    "window": window_table,
}
"""Renderers by block name; any other name is a file below the root."""


SHORT = ("none", "random", "uniform", "fastv", "divprune", "visionzip")
"""Rows of the demo's table that the README shows."""


def demo_excerpt(root: Path) -> str:
    """Return six rows of results/demo.md at a quarter of the tokens, the columns anyone asks for first, and what they stand for."""
    lines = (root / "results/demo.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    columns = ("reducer", "keep", "accuracy %", "of full %", "to none", "GFLOPs", "KV MB", "speed-up")
    at = [table[0].index(column) for column in columns]
    rows = {row[0].split()[0]: [row[i] for i in at] for row in table[1:] if row[1] in ("all", "49")}
    marked = {name: [re.sub(r"[*_]{1,2}([\d.]+)[*_]{1,2}", r"\1", cell) for cell in row] for name, row in rows.items()}
    out = [f"| {' | '.join(columns)} |", "|:--" + "|--:" * (len(columns) - 1) + "|"]
    out += [f"| {' | '.join(marked[name])} |" for name in SHORT]
    model = next(line for line in lines if line.startswith("Model "))
    machine = next(line for line in lines if line.startswith("Run on "))
    said = (
        "accuracy: \\[95 % interval\\]; to none: difference to the unreduced model in points, \\* stands after correction for all "
        "comparisons of the whole table; speed-up: of the prefill."
    )
    return "\n".join([*out, "", model, said, machine])


def speed_excerpt(root: Path) -> str:
    """Return what ``vtc bench`` measured of the model of real width on a CPU, and under which conditions."""
    import csv

    with open(root / "results/model.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "wide-and-flat" and row["device_type"] == "cpu"]
    full = next(row for row in rows if row["reducer"] == "none")
    out = ["| reducer | keep | prefill | time to first token | what its FLOPs allow | KV MB |", "|:--|--:|--:|--:|--:|--:|"]
    for row in rows:
        if row["reducer"] in SHORT[3:]:
            times = " | ".join(f"{float(row[key]):.2f}×" for key in ("speedup_prefill", "speedup_ttft", "bound_ttft"))
            out.append(f"| {row['reducer']} | {row['keep']} | {times} | {float(row['kv_mb']):.1f} |")
    out += [
        "",
        f"{full['visual_tokens']} visual tokens in a prompt of {full['prompt_tokens']}; unreduced: prefill "
        f"{float(full['unreduced_prefill_ms']):.0f} ms, first token {float(full['unreduced_ttft_ms']):.0f} ms, "
        f"{float(full['unreduced_kv_mb']):.1f} MB. Model `wide-and-flat` of `vtc bench model`: random weights, 3 decoder layers of "
        f"width 1024, {full['dtype']}, {full['device']}, {full['threads']} thread, torch {full['torch']}, transformers "
        f"{full['transformers']}, commit {full['commit'][:10]}.",
    ]
    return "\n".join(out)


EXCERPTS: dict[str, Callable[[Path], str]] = {"demo": demo_excerpt, "speed": speed_excerpt}
"""Renderers of parts of result files, by block name; they are given the root."""


def render(text: str, root: Path) -> str:
    """Return ``text`` with every generated block renewed.

    Blocks that are neither in :data:`BLOCKS` nor in :data:`EXCERPTS` are files below ``root``.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name in BLOCKS:
            body = BLOCKS[name]()
        else:
            body = EXCERPTS[name](root) if name in EXCERPTS else (root / name).read_text().strip()
        return f"{match[1]}{body}\n{match[3]}"

    return _BLOCK.sub(fill, text)


def main() -> None:
    """Renew the blocks of the files named on the command line; results are looked for below the current folder."""
    for name in sys.argv[1:]:
        path = Path(name)
        write_whole(path, render(path.read_text(), Path.cwd()))


if __name__ == "__main__":
    main()
