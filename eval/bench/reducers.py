"""``vtc bench reducers``: the selection's own time and memory of every registered reducer, beside a plain transcription.

What is timed is a reducer's arithmetic alone, on one synthetic image (batch 1, one view): signals and features go in, the selection
comes out; of a method with several stages the sum over all of them, each on what the one before left. Features are smooth fields
over the token grid plus a common mean and noise, so that neighbours are alike as in a picture; the shape, type and sign of every
other signal are found by running its measure on a tiny attention layer. The transcriptions are in :mod:`vtc.eval.bench.plain`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vtc.core import EncoderReducer, EncoderState, Facts, ImageReducer, Layout, Need, Reducer, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.eval.bench.common import JsonOption, commit_name, milliseconds, peak_of, timed, write
from vtc.eval.bench.plain import PLAIN, Plain
from vtc.eval.env import machine, versions
from vtc.registry import create, entries, info
from vtc.signals import AttentionTap, PixelTap, ProjectionTap, RotationTap, StateTap

SIZES: dict[int, tuple[int, int, int]] = {576: (24, 24, 64), 2880: (48, 60, 160), 7290: (81, 90, 640), 50000: (200, 250, 1024)}
"""Tokens to rows, columns, and the budget measured with."""
TOWER, LANGUAGE, LARGE = 1024, 4096, 50000
"""Feature widths before and behind the projector; from ``LARGE`` tokens on both are ``TOWER``."""
LAYERS, ENCODER_LAYERS = 32, 24
CPU = torch.device("cpu")
SECONDS, GIGABYTES = 60.0, 8.0
"""What is estimated to need more is not run."""
ENOUGH_S = 2.0
"""Seconds after which a row needs no more repeats."""


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes
    ----------
    reducer : str
        Name, and the options that differ from the defaults.
    n, keep, width, batch : int
        Visual tokens, budget, width of the features at the reducer's (first) stage, images.
    provider : {"vtc", "plain"}
        The product, or the transcription.
    ms_p20, ms_p50, ms_p80 : float or None
        Milliseconds over the repeats; ``None``: not run.
    peak_mb : float or None
        Largest memory (10^6 bytes) held on top of the inputs.
    speedup_vs_plain : float or None
        The transcription's median over the product's.
    note : str
        Why there are no numbers, or how many runs there were.
    """

    reducer: str
    n: int
    keep: int
    width: int
    batch: int
    provider: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    peak_mb: float | None = None
    speedup_vs_plain: float | None = None
    note: str = ""


# ----------------------------------------------------------------------------------------------------- synthetic signals
class Maker:
    """Makes signals of one size from needs.

    Parameters
    ----------
    rows, cols : int
        Token grid.
    seed : int
        Of all random numbers.
    """

    def __init__(self, rows: int, cols: int, seed: int = 0) -> None:
        self.grid = (rows, cols)
        self.n = rows * cols
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator)

    def fields(self, width: int) -> Tensor:
        """``(n, width)``: a common mean, fields that change slowly over the grid, and noise; mean cosine about 0.3."""
        rows, cols = self.grid
        coarse = self.normal(1, width, max(2, rows // 6), max(2, cols // 6))
        smooth = torch.nn.functional.interpolate(coarse, size=self.grid, mode="bilinear", align_corners=True)
        return smooth[0].flatten(1).T + 0.6 * self.normal(1, width) + 0.5 * self.normal(self.n, width)

    def like(self, sample: Tensor) -> Tensor:
        """Return a signal of all tokens that resembles ``sample (1, m, ...)`` of a few."""
        values = sample[0].flatten()
        if sample.dtype == torch.bool:
            return (torch.rand(1, self.n, generator=self.generator) < values.double().mean()) | (torch.arange(self.n) == 0)
        if not sample.is_floating_point():  # places in the sequence
            return (torch.arange(self.n) + int(values.min()))[None]
        made = self.fields(math.prod(sample.shape[2:])).view(1, self.n, *sample.shape[2:])
        if sample.dim() > 2:
            return made
        made = (made - made.mean()) / made.std()
        if bool((sample == sample.round()).all()):  # a count
            return (made * values.std() + values.mean()).round().clamp(min=0)
        return torch.softmax(2 * made, 1) if bool((sample >= 0).all()) else made

    def tap(self, need: Need, width: int, given: dict[str, Tensor]) -> Any:
        """Return what a measure is given, of 16 patches (and, in the language model, text around them)."""
        if need.of == "pixels":
            return PixelTap(self.normal(1, 3, 56, 56), (4, 4))
        if need.of == "projection":
            weight = self.normal(64, 64)
            return ProjectionTap(self.normal(1, 16, 64), lambda rank: lambda x: x @ weight)
        vision = need.source == "vision"
        length, heads, size = (17, 16, 64) if vision else (32, 32, 128)
        query, key, value = (self.normal(1, heads, length, size) for _ in range(3))
        if vision:
            return AttentionTap(query, key, value, size**-0.5, cls=True)
        at = torch.arange(length)
        visual, valid = ((at >= 4) & (at < 20))[None], torch.ones(1, length, dtype=torch.bool)
        last = torch.tensor([length - 1])
        if need.of in ("attention", "preview"):
            angle = at[:, None] * 10000 ** (-torch.arange(0, size, 2) / size)
            rope = (torch.cat([angle, angle], 1).cos()[None], torch.cat([angle, angle], 1).sin()[None])
            return AttentionTap(query, key, value, size**-0.5, None, True, last, visual, valid, given=given, rope=rope)
        if need.of == "rotation":
            angle = at[:, None] * 10000 ** (-torch.arange(0, size, 2) / size)
            return RotationTap(*(torch.cat([t, t], 1)[None, None] for t in (angle.cos(), angle.sin())))
        hidden, before = self.normal(1, length, width), self.normal(1, length, width)
        return StateTap(hidden, last, visual, valid, lambda x: x, before, given)

    def measure(self, need: Need, width: int) -> Tensor:
        """Run a measure on a tiny tap."""
        need = need.resolve(frozenset({"attention", "cls"}))
        return need.measure(self.tap(need, width, {other.name: self.measure(other, width) for other in need.uses}))

    def signal(self, need: Need, width: int) -> Tensor:
        """Return one signal of all tokens, or of the row."""
        sample = self.measure(need, width)
        if need.axis == "row":
            return sample
        return self.like(sample[:, 4:20] if need.source == "text" else sample)


def facts_of(rows: int, cols: int) -> Facts:
    """Return the facts of a model with 32 decoder layers, 24 tower layers, a class token and one view of ``rows x cols``."""
    return Facts(
        family="bench",
        layers=LAYERS,
        encoder_layers=ENCODER_LAYERS,
        feature_layer=ENCODER_LAYERS - 2,
        tokens=rows * cols,
        max_tokens=rows * cols,
        grid=(rows, cols),
        has_cls=True,
        provides=frozenset({"attention", "cls"}),
        stages={stage: "" for stage in Stage},
    )


# ------------------------------------------------------------------------------------------------------------ the work
@dataclass
class Task:
    """One reducer on one size: its stages and what each is given.

    Attributes
    ----------
    label : str
        Name and options.
    keep, width : int
        Budget, and width at the first stage.
    steps : list of (Reducer, object)
        Bound parts and their inputs.
    plain : Plain or None
        The transcription.
    """

    label: str
    keep: int
    width: int
    steps: list[tuple[Reducer, Any]] = field(default_factory=list)
    plain: Plain | None = None

    def product(self) -> list[Any]:
        """Run the product."""
        return [run_step(part, given) for part, given in self.steps]

    def transcription(self) -> list[Any]:
        """Run the transcription."""
        return [self.plain.run(part, given) for part, given in self.steps]


def run_step(part: Reducer, given: Any) -> Any:
    """Let one part do its work on what it is given."""
    if isinstance(part, ImageReducer):
        return part.resize(*given)
    if isinstance(part, EncoderReducer):
        return part.merge(given) if part.kind == "merge" else part.step(given)
    return part.select(given)


def prepare(name: str, options: dict[str, Any], rows: int, cols: int, keep: int, widths: tuple[int, int]) -> Task:
    """Bind a reducer to a model with a grid of tokens, and make the inputs of all its stages.

    Parameters
    ----------
    name, options : str, dict
        Reducer and options.
    rows, cols, keep : int
        Token grid and budget.
    widths : (int, int)
        Feature widths before and behind the projector.
    """
    facts, maker = facts_of(rows, cols), Maker(rows, cols)
    parts = create(name, keep=keep, **options).bind(facts).parts()
    label = " ".join([name, *(f"{k}={v}" for k, v in options.items())])
    task = Task(label, keep, widths[parts[0].stage in (Stage.BOUNDARY, Stage.DECODER)])
    task.plain = PLAIN.get((name, label.partition(" ")[2]))
    entries = torch.arange(maker.n)[None]
    shared: dict[tuple[Any, ...], Tensor] = {}
    with torch.no_grad():
        for part in parts:
            width = widths[part.stage in (Stage.BOUNDARY, Stage.DECODER)]
            if isinstance(part, ImageReducer):
                small = part.target_grid((rows, cols), facts)
                task.steps.append((part, (maker.normal(1, 3, 14 * rows, 14 * cols), (14 * small[0], 14 * small[1]))))
            elif isinstance(part, EncoderReducer):
                task.steps += _tower_steps(part, maker, facts, width)
            else:
                for need in part.needs:
                    if need.key not in shared:
                        shared[need.key] = maker.signal(need, width)
                if ("features", width) not in shared:
                    shared["features", width] = maker.fields(width)[None]
                k = part.count(len(entries[0]), facts)
                taps = {n.name: v if n.axis == "row" else v[:, entries[0]] for n in part.needs for v in [shared[n.key]]}
                given = Signals(
                    features=shared["features", width][:, entries[0]],
                    layout=Layout.grid(rows, cols),
                    entries=entries,
                    budget=k,
                    slots=maker.n,
                    taps=taps,
                    cls=maker.normal(1, 1, width) if part.wants_cls else None,
                    text=maker.normal(1, 24, width) if part.wants_text else None,
                    text_mask=torch.ones(1, 24, dtype=torch.bool) if part.wants_text else None,
                    fingerprint=(12345,) if part.wants_fingerprint else (),
                )
                task.steps.append((part, given))
                if part is not parts[-1] and not part.decides_itself:
                    entries = entries[:, part.select(given).index[0]]
    return task


def _tower_steps(part: EncoderReducer, maker: Maker, facts: Facts, width: int) -> list[tuple[Reducer, Any]]:
    """Return the states a reducer between tower layers is given, layer by layer."""
    target = torch.tensor(part.view_budgets(1, maker.n, facts))
    alive, carry, size, steps = torch.arange(maker.n)[None], {}, torch.ones(1, maker.n), []
    whole: dict[str, Tensor] = {}
    for layer in range(facts.feature_layer + 1):
        needs = part.encoder_needs(layer)
        if not needs:
            continue
        for need in needs:
            if need.name not in whole:
                whole[need.name] = maker.signal(need, width)
        taps = {need.name: whole[need.name][:, alive[0]] for need in needs}
        valid = torch.ones_like(alive, dtype=torch.bool)
        merger = part.kind == "merge"
        state = EncoderState(layer, taps, valid, torch.zeros(1, dtype=torch.long), carry, target, size if merger else None)
        steps.append((part, state))
        out = run_step(part, state)
        if merger:
            if out is not None:  # the first token of every group stands for it
                owner, left = out[0][0], int(out[1])
                first = torch.full((left,), len(owner)).scatter_reduce(0, owner, torch.arange(len(owner)), "amin")
                size = torch.zeros(1, left).index_add(1, owner, size)
                alive = alive[:, first]
            continue
        carry, stays = out
        if stays is not None:
            alive = alive[:, stays[0]]
            carry = {name: value[:, stays[0]] for name, value in carry.items()}
    return steps


# --------------------------------------------------------------------------------------------------------- measurement
@dataclass
class Trend:
    """Times of one provider over growing sizes, to foresee the next."""

    seen: list[tuple[int, float]] = field(default_factory=list)

    def expect(self, n: int) -> float:
        """Return the seconds to expect: the last ones, continued with the growth between the last two sizes, at least linear."""
        if not self.seen:
            return 0.0
        last_n, last = self.seen[-1]
        order = 2.0
        if len(self.seen) > 1:
            first_n, first = self.seen[-2]
            order = min(3.0, max(1.0, math.log(last / first) / math.log(last_n / first_n)))
        return last * (n / last_n) ** order


def measure(task: Task, n: int, repeats: int, trends: dict[str, Trend]) -> list[Row]:
    """Measure product and transcription of one task in turns.

    The first run of each warms up and gives the memory; where it alone is long enough it is also the only one.
    """
    base = Row(task.label, n, task.keep, task.width, 1, "")
    works = {"vtc": task.product} | ({"plain": task.transcription} if task.plain is not None else {})
    times: dict[str, list[float]] = {}
    peaks: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for provider, work in works.items():
        trend = trends.setdefault(provider, Trend())
        needed = 4 * n * n * task.plain.matrices / 1e9 if provider == "plain" else 0.0
        expected = trend.expect(n)
        if needed > GIGABYTES:
            notes[provider] = f"not run: needs {needed:.0f} GB"
        elif expected > SECONDS:
            notes[provider] = f"not run: > {SECONDS:.0f} s estimated"
        else:
            with torch.no_grad():
                seconds, peaks[provider] = peak_of(work)
            times[provider] = [seconds] if seconds > ENOUGH_S else []
        if provider in notes:
            trend.seen.append((n, max(expected, SECONDS + 1)))
    for _ in range(repeats):
        for provider, spent in times.items():
            if sum(spent) > ENOUGH_S:
                continue
            with torch.no_grad():
                spent.append(timed(works[provider], CPU))
    rows = []
    for provider in works:
        if provider in notes:
            rows.append(dataclasses.replace(base, provider=provider, note=notes[provider]))
            continue
        spent = times[provider]
        middle = statistics.median(spent)
        trends[provider].seen.append((n, middle))
        ratio = statistics.median(times["plain"]) / middle if "plain" in times else None
        peak = peaks[provider]
        rows.append(
            dataclasses.replace(
                base,
                provider=provider,
                **milliseconds(spent),
                peak_mb=None if peak is None else round(peak, 1),
                speedup_vs_plain=None if ratio is None else round(ratio, 2),
                note=f"{len(spent)} runs" if len(spent) > 1 else "1 run",
            )
        )
    return rows


def cases(only: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return reducers and options to measure: every registered reducer, then the variants that have a transcription."""
    for name in only:
        info(name)
    wanted = list(only) or list(entries())
    known = [(name, {}) for name in wanted]
    known += [(name, dict(p.options)) for (name, label), p in PLAIN.items() if label and name in wanted]
    return sorted(known, key=lambda case: wanted.index(case[0]))


def bench(sizes: Sequence[int], only: Sequence[str] = (), repeats: int = 7) -> Iterator[Row]:
    """Measure reducers on growing sizes; yield the rows of each as soon as they are there."""
    for name, options in cases(only):
        trends: dict[str, Trend] = {}
        for n in sorted(sizes):
            rows, cols, keep = SIZES[n]
            widths = (TOWER, LANGUAGE if n < LARGE else TOWER)
            task = prepare(name, options, rows, cols, keep, widths)
            yield from measure(task, n, repeats, trends)


# ----------------------------------------------------------------------------------------------------------- command
def reducers(
    out: Annotated[Path | None, typer.Option("--out", help="CSV file; machine and versions are in every row.")] = None,
    n: Annotated[list[int] | None, typer.Option("--n", help=f"Tokens; one or more of {', '.join(map(str, SIZES))}.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Reducer to measure; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs per row; fewer where one takes long.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Time and memory of every reducer's own arithmetic on this CPU, beside a plain transcription of the published algorithm."""
    sizes = n or list(SIZES)
    for size in sizes:
        if size not in SIZES:
            raise UnknownArgumentError(f"there is no size {size}: use one or more of {', '.join(map(str, SIZES))}")
    found, origin = [], provenance()
    for row in bench(sizes, only or (), repeats):
        found.append(row)
        if not as_json:
            print(_line(row), flush=True)
        if out is not None:
            write(out, [asdict(r) | origin for r in found])  # what is there stays if the rest is interrupted
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in found], **origin}, indent=2))
    else:
        for line in summary(found):
            print(line)
    if out is not None:
        print(out, file=sys.stderr)


def provenance() -> dict[str, Any]:
    """Return device, threads, versions and commit."""
    where = machine()
    return {
        "device": "cpu",
        "cpu": where["cpu"],
        "cores": where["cores"],
        "threads": where["torch_threads"],
        "commit": commit_name(),
    } | versions()


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a line per size: median and smallest speed-up, and what is slower than its transcription."""
    lines = []
    for n in sorted({row.n for row in rows}):
        mine = [r for r in rows if r.n == n and r.provider == "vtc"]
        ratios = {r.reducer: r.speedup_vs_plain for r in mine if r.speedup_vs_plain is not None}
        if ratios:
            slower = ", ".join(f"{name} {ratio}x" for name, ratio in ratios.items() if ratio < 1) or "none"
            lines.append(
                f"n={n}: median {statistics.median(ratios.values()):.2f}x, smallest {min(ratios.values()):.2f}x, slower: {slower}"
            )
        peak = max((r.peak_mb for r in mine if r.peak_mb is not None), default=None)
        slow = max((r.ms_p50 for r in mine if r.ms_p50 is not None), default=None)
        if peak is not None and slow is not None:
            lines.append(f"n={n}: largest memory {peak:.0f} MB, longest {slow / 1e3:.2f} s")
    return lines


def _line(row: Row) -> str:
    if row.ms_p50 is None:
        return f"{row.reducer:<28} n={row.n:<6} {row.provider:<6} {row.note}"
    ratio = f"{row.speedup_vs_plain:8.2f}x" if row.speedup_vs_plain is not None and row.provider == "vtc" else " " * 9
    memory = f"{row.peak_mb:9.1f} MB" if row.peak_mb is not None else " " * 12
    return f"{row.reducer:<28} n={row.n:<6} {row.provider:<6} {row.ms_p50:11.3f} ms {memory} {ratio}  {row.note}"
