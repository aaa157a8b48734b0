"""``vtc bench bars``: what vtc promises about speed, measured and judged in one run of less than ten minutes.

First every Triton op is compared with its torch twin (:mod:`vtc.eval.bench.equality`), then the ops are timed
(:mod:`vtc.eval.bench.kernels`), then models of real shape (:mod:`vtc.eval.bench.model`). What a bar speaks of comes before all
else, and what time is left goes to the rest of both benches. The bars are data, judged on the rows alone: :data:`BARS`.

With ``--out`` a folder gets ``equality.csv``, ``kernels.csv``, ``model.csv`` and the verdicts in ``bars.md`` and ``bars.json``.
Rows of the other kind of device that are there already stay and are judged, too, so that the folder can hold what a GPU and what a
CPU measured; ``--minutes 0`` judges what is there and measures nothing.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from vtc import kernels as ops
from vtc.eval.bench import cases, common, equality, kernels, model
from vtc.files import save

NAMES = {"cuda": "GPU", "cpu": "CPU"}
TABLES = ("equality", "kernels", "model")
BUDGETS = {"llava-1.5-7b": 64, "llava-next-7b": 160}
"""Models and budgets of the bars: 576 and 2,880 patches (with the newlines of AnyRes 2,928 tokens) down to these."""
REPEATS, DECODED = 5, 1
"""Rounds and decoded tokens per row of a 7B model."""


# ------------------------------------------------------------------------------------------------------------------- bars
def applies(row: Mapping[str, Any]) -> bool:
    """Whether the reducer of a row runs on its model."""
    return not str(row.get("note") or "").startswith("does not apply")


def reaches_its_budget(row: Mapping[str, Any]) -> bool:
    """Whether a row is about a decoder on no more tokens than its budget (newlines may be kept on top; towers alone may be cut)."""
    return applies(row) and (row.get("avg_tokens") is None or row["avg_tokens"] <= row["keep"])


@dataclass(frozen=True)
class Bar:
    """A promise: one number of every row it speaks of keeps to a limit.

    Attributes
    ----------
    what, promise : str
        What is measured, and the limit in words.
    device : {"cuda", "cpu"}
        Where it is measured.
    table : str
        One of :data:`TABLES`.
    where : mapping
        Column to value: the rows it speaks of.
    by : tuple of str
        Columns that name a row.
    items : callable
        Returns the names of all rows that must be there.
    number : callable
        A row to its number; None where it has none.
    limit, at_least : float, bool
        The largest number that will do; with ``at_least`` the smallest.
    shown : str
        Format of a number.
    asked : callable
        Whether the promise is about a row at all.
    """

    what: str
    promise: str
    device: Literal["cuda", "cpu"]
    table: str
    where: Mapping[str, Any]
    by: tuple[str, ...]
    items: Callable[[], list[str]]
    number: Callable[[Mapping[str, Any]], float | None]
    limit: float
    at_least: bool
    shown: str
    asked: Callable[[Mapping[str, Any]], bool] = applies

    def holds(self, number: float) -> bool:
        """Whether a number keeps to the limit."""
        return number >= self.limit if self.at_least else number <= self.limit


def column(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Return what reads a number from a row."""
    return lambda row: row.get(name)


def _each_op(preset: str) -> Callable[[], list[str]]:
    return lambda: [f"{op} {n}" for n in cases.PRESETS[preset].sizes for op in ops.ACCELERATED]


def _per_token(row: Mapping[str, Any]) -> float | None:
    peak = row.get("peak_mb")
    return None if peak is None else 1e6 * peak / row["n"]


def _quarter(row: Mapping[str, Any]) -> float | None:
    """Share of the bound end to end, of rows that keep no more than a quarter of the tokens."""
    return row["share_ttft"] if row["keep"] is not None and 4 * row["keep"] <= row["visual_tokens"] else None


def _small_rows() -> list[str]:
    """Reducers and budgets of at most a quarter of the 576 tokens of the model for CPUs."""
    rows = model.rows_of("wide-and-flat", model.PRESETS["cpu"])
    return [f"{reducer} {keep}" for reducer, keep, _ in rows if keep is not None and 4 * keep <= 576]


def _added(name: str, slots: str) -> Bar:
    keep = BUDGETS[name]
    return Bar(
        f"selection + hooks, {slots} -> {keep} ({name}), every pre-LLM reducer", "<= 1 % of the unreduced prefill", "cuda", "model",
        {"model": name, "keep": keep, "batch": 1}, ("reducer",), model.before_the_decoder, column("overhead_share"),
        0.01, False, "{:.2%}",
    )  # fmt: skip


def _prefill(promise: str, name: str, limit: float, shown: str) -> Bar:
    where = {"model": "llava-next-7b", "keep": BUDGETS["llava-next-7b"], "batch": 1}
    return Bar(
        "prefill, 2,880 -> 160 (llava-next-7b), every pre-LLM reducer that gets there", promise, "cuda", "model",
        where, ("reducer",), model.before_the_decoder, column(name), limit, True, shown, reaches_its_budget,
    )  # fmt: skip


BARS = (
    Bar(
        "every Triton op against its torch twin", "no mismatch", "cuda", "equality",
        {}, ("op", "n"), _each_op("gpu"), column("mismatches"), 0, False, "{:.0f} mismatches",
    ),
    _added("llava-1.5-7b", "576"),
    _added("llava-next-7b", "2,880"),
    Bar(
        "farthest_point, max_sum, 2,880 -> 160", ">= 20x the published loop", "cuda", "kernels",
        {"provider": "triton", "n": 2880}, ("op",), lambda: ["farthest_point", "max_sum"], column("speedup_vs_plain"),
        20, True, "{:.1f}x",
    ),
    Bar(
        "attention_colsum at 7,290 tokens: memory on top of the inputs", "O(N): <= 4,096 bytes per token, as queries and keys take",
        "cuda", "kernels", {"provider": "triton", "n": 7290, "op": "attention_colsum"}, ("op",), lambda: ["attention_colsum"],
        _per_token, 4096, False, "{:,.0f} bytes per token",
    ),
    Bar(
        "every Triton op, at every size", "faster than its torch twin", "cuda", "kernels",
        {"provider": "triton"}, ("op", "n"), _each_op("gpu"), column("speedup_vs_twin"), 1, True, "{:.2f}x",
    ),
    _prefill(">= 6.8x as fast as unreduced", "speedup_prefill", 6.8, "{:.2f}x"),
    _prefill(">= 0.9 of the FLOP bound", "share_prefill", 0.9, "{:.3f}"),
    Bar(
        "every op, at every size", "not slower than the plain algorithm", "cpu", "kernels",
        {"provider": "torch"}, ("op", "n"), _each_op("cpu"), column("speedup_vs_plain"), 1, True, "{:.2f}x",
    ),
    Bar(
        "first token, keep <= 25 % (wide-and-flat)", ">= 0.85 of the FLOP bound", "cpu", "model",
        {"model": "wide-and-flat", "batch": 1}, ("reducer", "keep"), _small_rows, _quarter, 0.85, True, "{:.3f}",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a bar.

    Attributes
    ----------
    bar : Bar
        The promise.
    state : {"met", "NOT met", "open", "waiting"}
        ``"open"``: some rows are missing and no other breaks it; ``"waiting"``: nothing was measured.
    measured : str
        The numbers, or why there are none.
    found : dict
        Name of a row to its number.
    missing : dict
        Name of a row to the reason, where it has none.
    """

    bar: Bar
    state: Literal["met", "NOT met", "open", "waiting"]
    measured: str
    found: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        said = {name: getattr(self.bar, name) for name in ("what", "promise", "device", "limit", "at_least")}
        return said | {"state": self.state, "measured": self.measured, "found": self.found, "missing": self.missing}


def judge(bar: Bar, rows: Iterable[Mapping[str, Any]]) -> Verdict:
    """Judge one bar on the rows of its table."""
    mine = [r for r in rows if r.get("device_type") == bar.device and all(r.get(k) == v for k, v in bar.where.items())]
    by_name = {" ".join(_text(r[c]) for c in bar.by): r for r in mine}
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in bar.items():
        row = by_name.get(name)
        number = None if row is None else bar.number(row)
        if row is None:
            missing[name] = "not measured"
        elif not bar.asked(row):
            continue
        elif number is None or not math.isfinite(number):
            missing[name] = str(row.get("note") or "no number")
        else:
            found[name] = float(number)
    if not mine:
        how = "on a GPU" if bar.device == "cuda" else "--preset cpu"
        return Verdict(bar, "waiting", f"not measured: `vtc bench bars` {how} does it", found, missing)
    broken = {name: n for name, n in found.items() if not bar.holds(n)}
    state: Literal["met", "NOT met", "open"] = "NOT met" if broken else "open" if missing else "met"
    return Verdict(bar, state, _measured(bar, found, broken, missing), found, missing)


def _measured(bar: Bar, found: Mapping[str, float], broken: Mapping[str, float], missing: Mapping[str, str]) -> str:
    """Return the range of the numbers, what breaks the bar (the worst first) and what is missing."""

    def named(name: str) -> str:
        return f"{bar.shown.format(found[name])} {name}"

    ordered = sorted(found, key=found.__getitem__, reverse=not bar.at_least)  # the worst first
    parts = []
    if broken:
        most = [name for name in ordered if name in broken]
        rest = f", +{len(most) - 4} more" if len(most) > 4 else ""
        parts.append(f"{len(most)} of {len(found)} miss it: {', '.join(map(named, most[:4]))}{rest}")
    elif ordered:
        ends = dict.fromkeys((ordered[0], ordered[-1]))
        same = len({bar.shown.format(n) for n in found.values()}) == 1
        parts.append(f"{bar.shown.format(found[ordered[0]])} ({len(found)})" if same else " .. ".join(map(named, ends)))
    if broken and len(broken) < len(found):
        parts.append(f"best {named(ordered[-1])}")
    if missing:
        name, why = next(iter(missing.items()))
        parts.append(f"{len(missing)} of {len(found) + len(missing)} without a number, such as {name}: {why}")
    return "; ".join(parts)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------------- tables
def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the short table for a terminal."""
    out = []
    for v in verdicts:
        out.append(f"{v.state:<8}{NAMES[v.bar.device]}  {v.bar.what}: {v.bar.promise}")
        out.append(f"{'':<13}{v.measured}")
    counts = {s: sum(v.state == s for v in verdicts) for s in ("met", "NOT met", "open", "waiting")}
    return [*out, ", ".join(f"{n} {s}" for s, n in counts.items() if n)]


def markdown(verdicts: Sequence[Verdict], tables: Mapping[str, common.Table]) -> str:
    """Return the table for documents, with the conditions under which each device's numbers were measured."""
    rows = [f"| {v.bar.what} | {NAMES[v.bar.device]} | {v.bar.promise} | {v.measured} | {v.state} |" for v in verdicts]
    out = ["| what | on | bar | measured | verdict |", "|---|---|---|---|---|", *rows, ""]
    for kind, name in NAMES.items():
        if any(v.bar.device == kind and v.state != "waiting" for v in verdicts):
            out.append(f"{name}: {'; '.join(_conditions(tables, kind))}.")
    return "\n".join(out).rstrip() + "\n"


def _conditions(tables: Mapping[str, common.Table], kind: str) -> list[str]:
    """Where and with what the rows of a device were measured, tables that agree together."""
    seen: dict[str, list[str]] = {}
    for table, rows in tables.items():
        for r in rows:
            if r.get("device_type") == kind:
                threads = f", {r['threads']} threads" if kind == "cpu" else ""
                at = (
                    f"{r['device']}{threads}, torch {r['torch']}, transformers {r['transformers']}, commit {r['commit'] or '?'}"
                )
                names = seen.setdefault(at, [])
                if table not in names:
                    names.append(table)
    return [f"{at} ({', '.join(names)})" for at, names in seen.items()]


# ------------------------------------------------------------------------------------------------------------ measurement
class Session:
    """One run: what was measured in it, and in its folder before.

    Parameters
    ----------
    device : torch.device
        Where to measure.
    out : Path or None
        Folder of the result.
    quiet : bool
        Print no progress.
    """

    def __init__(self, device: torch.device, out: Path | None, quiet: bool) -> None:
        self.device, self.out, self.quiet = device, out, quiet
        self.preset = "gpu" if device.type == "cuda" else "cpu"
        self.tables: dict[str, common.Table] = {t: common.read(out / f"{t}.csv") if out is not None else [] for t in TABLES}

    def put(self, table: str, rows: common.Table, line: str) -> None:
        """Take the rows of a table found so far for those of this device, write them, and say what was done."""
        others = [r for r in self.tables[table] if r.get("device_type") not in (self.device.type, None)]
        self.tables[table] = others + [{k: None if v != v else v for k, v in row.items()} for row in rows]  # NaN: no number
        if self.out is not None:
            common.write(self.out / f"{table}.csv", self.tables[table])
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def measure(self, minutes: float) -> None:
        """Measure for so long, what the bars speak of first."""
        start = time.monotonic()
        end = start + 60 * minutes
        what = cases.PRESETS[self.preset]
        # ops that bars name come first, the largest size last
        sizes = sorted(what.sizes, key=lambda n: (n == 7290, -n))
        wanted: list[tuple[int, Sequence[str]]] = [(n, ops.ACCELERATED) for n in sizes]
        first = [(2880, ("farthest_point", "max_sum")), (7290, ("attention_colsum",))]
        rest = [(n, [op for op in names if (n, op) not in {(m, o) for m, os in first for o in os}]) for n, names in wanted]
        if equality.possible(self.device):
            self.compare(wanted, start + 0.3 * (end - start))
        with torch.no_grad():
            timed = kernels.Results(what, self.device)
            alike = [p for p in kernels.PROVIDERS if p not in kernels.COMPILED]
            ordered = [(n, names) for n, names in first if n in what.sizes] + rest
            self.time(timed, ordered, alike, start + 0.55 * (end - start))
        common.settle(self.device)
        self.models(end)
        with torch.no_grad():
            self.time(timed, wanted, kernels.COMPILED, end)

    def compare(self, wanted: Sequence[tuple[int, Sequence[str]]], end: float) -> None:
        """Compare the Triton ops with their twins."""
        origin, rows = common.provenance(self.device), []
        for row in equality.check(wanted, cases.PRESETS[self.preset], self.device, end):
            rows.append(asdict(row) | origin)
            self.put("equality", rows, f"equality {row.op} {row.shape}: {row.mismatches} of {row.checked} {row.note}")

    def time(
        self, timed: kernels.Results, wanted: Sequence[tuple[int, Sequence[str]]], names: Sequence[str], end: float
    ) -> None:
        """Time ops."""
        for case in timed.measure(wanted, names, end):
            self.put("kernels", timed.table(), f"{'/'.join(names)} {case.op} {case.shape}")

    def models(self, end: float) -> None:
        """Time models."""
        preset = model.PRESETS[self.preset]
        if self.device.type == "cuda":
            preset = replace(preset, repeats=REPEATS, decode_steps=DECODED)
        origin, rows = common.provenance(self.device), []
        for row in model.run(plan(preset, self.device), preset, self.device, end):
            rows.append(asdict(row) | origin)
            self.put("model", rows, model.summary([row])[-1])

    def verdicts(self) -> list[Verdict]:
        """Judge all bars on what there is, and write the verdicts."""
        found = [judge(bar, self.tables[bar.table]) for bar in BARS]
        if self.out is not None:
            data = json.dumps([v.to_dict() for v in found], indent=2) + "\n"
            for name, text in (("bars.md", markdown(found, self.tables)), ("bars.json", data)):
                save(self.out / name, text, "name another folder with --out")
        return found


def plan(preset: model.Preset, device: torch.device) -> list[tuple[str, list[model.Wanted]]]:
    """Return models and rows in the order they are measured in: those of the bars, then the rest of ``vtc bench model``."""
    rows = {name: model.rows_of(name, preset) for name in preset.models}
    if device.type != "cuda":
        return list(rows.items())
    first: dict[str, list[model.Wanted]] = {
        name: [("none", None, 1), *((reducer, keep, 1) for reducer in model.before_the_decoder())]
        for name, keep in BUDGETS.items()
    }
    rest = {name: [row for row in wanted if row not in first.get(name, ())] for name, wanted in rows.items()}
    last = list(first)[-1]  # it is on the device already: its other rows follow
    return [
        *((name, wanted + (rest[name] if name == last else [])) for name, wanted in first.items()),
        *((name, wanted) for name, wanted in rest.items() if name != last),
    ]


# ---------------------------------------------------------------------------------------------------------------- command
def bars(
    preset: common.PresetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the tables and verdicts, such as results.")] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0, help="In all; 0: only judge what is in the folder.")] = 9.5,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 unless all bars of this device are met.")] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Compare the kernels with their twins, measure kernels and models, and judge the speed that vtc promises."""
    session = Session(common.device_of(preset), out, as_json)
    if minutes > 0:
        session.measure(minutes)
    found = session.verdicts()
    print(json.dumps([v.to_dict() for v in found], indent=2) if as_json else "\n".join(lines(found)))
    if strict and any(v.state != "met" for v in found if v.bar.device == session.device.type):
        raise typer.Exit(1)
