"""``vtc bench kernels``: every op that has a Triton version, by provider: Triton, torch twin, compiled twin, plain algorithm.

One case is one op at one size. Its providers run in turns, on the same inputs; only the compiled twins, which take long to make,
come after everything else. ``GB/s`` and ``TFLOP/s`` count what the op must at least move and compute, not what a provider does. The
roofline is measured here, too: a copy of a large tensor, and a matrix product in the inputs' type; a row's share of it is the time
these two would need at least, over the time taken (inputs that stay in a cache can be read faster than that copy).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from vtc import kernels as ops
from vtc.errors import UnknownArgumentError
from vtc.eval.bench.cases import PRESETS, SIZES, Case, Preset, chosen
from vtc.eval.bench.common import (
    CsvOption,
    JsonOption,
    MinutesOption,
    PresetOption,
    before,
    device_of,
    milliseconds,
    peak_on,
    provenance,
    reason,
    settle,
    timed,
    write,
)

PROVIDERS = ("triton", "torch", "compile", "plain")
COMPILED = ("compile",)
HOST_LOOPS = {"farthest_point", "farthest_point_weighted", "greedy_dpp", "k_means", "k_medoids", "max_sum", "most_isolated"}
"""Ops whose twins decide on the host how to go on: a compiler has nothing to fuse there."""


@dataclass
class Row:
    """One line of the result; times in milliseconds, memory in 10^6 bytes on top of the inputs, speed-ups of medians."""

    op: str
    provider: str
    n: int
    shape: str
    dtype: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline_share: float | None = None
    peak_mb: float | None = None
    compile_s: float | None = None
    speedup_vs_plain: float | None = None
    speedup_vs_twin: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------------------------------ measurement
def roofline(preset: Preset, device: torch.device) -> tuple[float, float]:
    """Measured bytes per second of a copy, and FLOP per second of a matrix product in the preset's type."""
    a = torch.randn(preset.edge, preset.edge, device=device).to(preset.dtype)
    source = torch.empty(64 * preset.edge**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for work in (lambda: a @ a, lambda: target.copy_(source)):
        work()
    product = statistics.median(timed(lambda: a @ a, device) for _ in range(7))
    copy = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.numel() / copy, 2 * preset.edge**3 / product


def provider(name: str, case: Case, n: int, preset: Preset, device: torch.device) -> Callable[[], Any] | str:
    """Return what to run for a provider, or why it is not run."""
    op = getattr(ops, case.op)
    twin = op.__wrapped__
    if name == "plain":
        return case.plain
    if name == "torch":
        return lambda: case.call(twin)
    if name == "compile":
        if case.op in HOST_LOOPS:
            return "not run: the twin decides on the host"
        if n not in preset.compile_at:
            return f"not run: compiled at N={', '.join(map(str, preset.compile_at))} only"
        fast = torch.compile(twin, dynamic=False)
        return lambda: case.call(fast)
    if device.type != "cuda":
        return "not run: no GPU"

    def on_triton() -> Any:
        with ops.use("triton"):
            return case.call(op)

    return on_triton


def measure(
    case: Case, n: int, preset: Preset, device: torch.device, roof: tuple[float, float], names: Collection[str]
) -> list[Row]:
    """Measure the named providers of one case in turns."""
    base = dict(op=case.op, n=n, shape=case.shape, dtype=str(preset.dtype).removeprefix("torch."))
    rows = {name: Row(provider=name, **base) for name in names}
    works: dict[str, Callable[[], Any]] = {}
    spent: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for name in names:
        work = provider(name, case, n, preset, device)
        if isinstance(work, str):
            rows[name].note = work
            continue
        try:
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            first[name] = time.perf_counter() - begin
            rows[name].peak_mb = peak_on(work, device)
        except Exception as error:  # a provider that cannot do it is a result, too
            rows[name].note = f"failed: {reason(error)}"
        else:
            works[name], spent[name] = work, []
    if any(row.note.startswith("failed") for row in rows.values()):
        settle(device)  # what a failed run held; not in the handler, where its frames are alive
    for _ in range(200):
        for name, work in works.items():
            if len(spent[name]) < 3 or sum(spent[name]) < preset.seconds:
                spent[name].append(timed(work, device))
    for name, times in spent.items():
        row, middle = rows[name], statistics.median(times)
        for column, value in milliseconds(times).items():
            setattr(row, column, value)
        row.gb_s, row.tflop_s = case.moved / middle / 1e9, case.flops / middle / 1e12
        row.roofline_share = max(case.moved / roof[0], case.flops / roof[1]) / middle
        # what the first call took longer than the others: compiling, for Triton and torch.compile
        row.compile_s = max(0.0, first[name] - middle) if name in ("triton", "compile") else None
        row.note = f"{len(times)} runs"
    return list(rows.values())


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


class Results:
    """The rows found so far.

    Parameters
    ----------
    preset : Preset
        What is measured.
    device : torch.device
        Where.
    """

    def __init__(self, preset: Preset, device: torch.device) -> None:
        self.preset, self.device = preset, device
        self.roof = roofline(preset, device)
        self._rows: dict[tuple[int, str, str], Row] = {}

    def measure(self, wanted: Sequence[tuple[int, Collection[str]]], names: Collection[str], end: float) -> Iterator[Case]:
        """Measure sizes and their ops before ``end`` (:func:`time.monotonic`); yield every case when its rows are there.

        Parameters
        ----------
        wanted : sequence of (int, collection of str)
            Tokens and names of ops.
        names : collection of str
            Providers.
        end : float
            No case is begun that might not be done by then.
        """
        for n, case in before(end, chosen(wanted, self.preset, self.device)):
            for row in measure(case, n, self.preset, self.device, self.roof, names):
                self._rows[n, row.op, row.provider] = row
            yield case

    @property
    def rows(self) -> list[Row]:
        """All rows, by size, op and provider, with their speed-ups over the plain algorithm and over the torch twin."""
        order = {op: i for i, op in enumerate(ops.ACCELERATED)}
        keys = sorted(self._rows, key=lambda key: (key[0], order[key[1]], PROVIDERS.index(key[2])))
        for n, op, name in keys:
            row = self._rows[n, op, name]
            for other, column in (("plain", "speedup_vs_plain"), ("torch", "speedup_vs_twin")):
                there = self._rows.get((n, op, other))
                if row.ms_p50 and there is not None and there.ms_p50:
                    setattr(row, column, there.ms_p50 / row.ms_p50)
        return [self._rows[key] for key in keys]

    @property
    def origin(self) -> dict[str, Any]:
        """Device, versions, commit and measured roofline, the same in every row."""
        gigabytes, teraflops = round(self.roof[0] / 1e9, 1), round(self.roof[1] / 1e12, 3)
        return provenance(self.device, roof_gb_s=gigabytes, roof_tflop_s=teraflops, triton=_triton_version())

    def table(self) -> list[dict[str, Any]]:
        """The rows as the CSV file has them."""
        origin = self.origin
        return [asdict(row) | origin for row in self.rows]


def summary(rows: Sequence[Row]) -> list[str]:
    """A short table: milliseconds by provider and the ratios the bars are about."""
    lines = [f"{'op':<24}{'N':>6}{'triton':>10}{'torch':>10}{'compile':>10}{'plain':>10}  vs plain  vs twin"]
    for op, n in dict.fromkeys((r.op, r.n) for r in rows):
        found = {r.provider: r.ms_p50 for r in rows if (r.op, r.n) == (op, n)}
        best = found.get("triton") or found.get("torch")
        cells = "".join(f"{found[p]:>10.3f}" if found.get(p) is not None else f"{'-':>10}" for p in PROVIDERS)
        ratios = [found["plain"] / best if found.get("plain") and best else math.nan]
        ratios.append(found["torch"] / found["triton"] if found.get("triton") and found.get("torch") else math.nan)
        lines.append(f"{op:<24}{n:>6}{cells}" + "".join(f"{r:>9.1f}x" if r == r else f"{'-':>10}" for r in ratios))
    failed = [f"{r.op} N={r.n} {r.provider}: {r.note}" for r in rows if r.note.startswith("failed")]
    return lines + failed


# ---------------------------------------------------------------------------------------------------------------- command
def kernels(
    preset: PresetOption = None,
    out: CsvOption = None,
    n: Annotated[list[int] | None, typer.Option("--n", help=f"Tokens; one or more of {', '.join(map(str, SIZES))}.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Op to measure; may be repeated.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile of the twins, too.")] = True,
    minutes: MinutesOption = 9.0,
    as_json: JsonOption = False,
) -> None:
    """Time, memory and share of the measured roofline of every op that has a Triton version, beside its alternatives."""
    end = time.monotonic() + 60 * minutes
    device = device_of(preset)
    what = PRESETS["gpu" if device.type == "cuda" else "cpu"]
    for name in only or ():
        if name not in ops.ACCELERATED:
            raise UnknownArgumentError(f"no op '{name}' has a Triton version: use one of {', '.join(ops.ACCELERATED)}")
    for size in n or ():
        if size not in SIZES:
            raise UnknownArgumentError(f"there is no size {size}: use one or more of {', '.join(map(str, SIZES))}")
    wanted = [(size, only or ops.ACCELERATED) for size in n or what.sizes]
    found, done = Results(what, device), 0
    with torch.no_grad():
        for names in ([p for p in PROVIDERS if p not in COMPILED], COMPILED if compiled else ()):
            for case in found.measure(wanted, names, end) if names else ():
                done += 1
                write(out, found.table())  # what is there stays if the rest is interrupted
                if not as_json:
                    print(f"{case.op} {case.shape}", file=sys.stderr, flush=True)
    late = (1 + compiled) * sum(len(names) for _, names in wanted) - done
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in found.rows], "left_out": late, **found.origin}, indent=2))
        return
    print("\n".join(summary(found.rows)))
    if late:
        print(f"{late} cases were left out after {minutes:g} minutes: raise --minutes, or name fewer ops with --only")
