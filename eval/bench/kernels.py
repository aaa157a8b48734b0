"""``vtc bench kernels``: every op that has a Triton version, by provider: Triton, torch twin, compiled twin, plain algorithm.

One case is one op at one size. All its providers run in turns, on the same inputs, and a ratio is that of medians of the same run.
``GB/s`` and ``TFLOP/s`` count what the op must at least move and compute, not what a provider does. The roofline is measured here,
too: a copy of a large tensor, and a matrix product in the inputs' type; a row's share of it is the time these two would need at
least, over the time taken. The plain algorithms are those of the papers' releases: full matrices, and loops that ask the device for
every pick.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from vtc import kernels as ops
from vtc.errors import StoreError, UnknownArgumentError
from vtc.eval.bench.reducers import peak_of
from vtc.eval.env import commit, machine, versions
from vtc.eval.stats import spread

SIZES = {576: 64, 2880: 160, 7290: 640}
"""Tokens and the budget measured with."""
PROVIDERS = ("triton", "torch", "compile", "plain")
HOST_LOOPS = {"farthest_point", "farthest_point_weighted", "greedy_dpp", "k_means", "k_medoids", "max_sum", "most_isolated"}
"""Ops whose twins decide on the host how to go on: a compiler has nothing to fuse there."""


@dataclass(frozen=True)
class Preset:
    """What is measured on a kind of device.

    Attributes
    ----------
    sizes : tuple of int
        Tokens.
    width, heads, head_width : int
        Of features and attention.
    dtype : torch.dtype
        Of features, queries and keys.
    compile_at : int
        The only size at which the compiled twin is measured: compiling takes long.
    seconds : float
        Time for the repeats of one provider.
    edge : int
        Edge of the matrices that the roofline is measured with.
    """

    sizes: tuple[int, ...]
    width: int
    heads: int
    head_width: int
    dtype: torch.dtype
    compile_at: int
    seconds: float
    edge: int


PRESETS = {
    "cpu": Preset((576, 2880), 1024, 16, 64, torch.float32, 576, 1.0, 1024),
    "gpu": Preset((576, 2880, 7290), 4096, 16, 64, torch.bfloat16, 2880, 0.4, 8192),
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes
    ----------
    op, shape : str
        Name, and sizes for the table.
    call : callable
        ``call(function)`` runs the op, or a function of the same signature, on the inputs.
    plain : callable
        The published algorithm on the same inputs.
    moved, flops : float
        Bytes and FLOPs it cannot do without.
    """

    op: str
    shape: str
    call: Callable[[Callable[..., Any]], Any]
    plain: Callable[[], Any]
    moved: float
    flops: float


@dataclass
class Row:
    """One line of the result; times in milliseconds, memory in 10^6 bytes on top of the inputs."""

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
    note: str = ""


# ------------------------------------------------------------------------------------------------------- plain algorithms
def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True)


def _plain_rows(query: Tensor, key: Tensor, at: Tensor) -> Tensor:
    """The whole attention map, of which some rows are taken."""
    full = torch.softmax((query @ key.mT).float() * query.shape[-1] ** -0.5, -1)
    return full.mean(1)[:, at]


def _plain_colsum(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax((query @ key.mT).float() * query.shape[-1] ** -0.5, -1).mean(1).sum(1)


def _plain_far(x: Tensor, k: int, first: int, weight: Tensor | None = None) -> list[int]:
    """Full distance matrix; every step looks at the distances to all chosen tokens."""
    unit = _unit(x[0])
    distance = 1 - unit @ unit.T
    picks = [first if weight is None else int(weight[0].argmax())]
    while len(picks) < k:
        near = distance[picks].min(0).values
        near = near if weight is None else near * weight[0]
        near[picks] = -torch.inf
        picks.append(int(near.argmax()))
    return picks


def _plain_sum(x: Tensor, k: int, first: int) -> list[int]:
    unit = _unit(x[0])
    cosine, picks = unit @ unit.T, [first]
    while len(picks) < k:
        total = cosine[picks].sum(0)
        total[picks] = torch.inf
        picks.append(int(total.argmin()))
    return picks


def _plain_dpp(x: Tensor, weight: Tensor, k: int) -> list[int]:
    """Greedy MAP on the full kernel."""
    unit, w = _unit(x[0]), weight[0]
    kernel = w[:, None] * (unit @ unit.T) * w
    gain, rows, picks = kernel.diagonal().clone(), kernel.new_zeros(k, len(w)), []
    for t in range(k):
        pick = int(gain.argmax())
        rows[t] = (kernel[pick] - rows[:t, pick] @ rows[:t]) / gain[pick].sqrt()
        gain = gain - rows[t].square()
        gain[pick] = -torch.inf
        picks.append(pick)
    return picks


def _plain_isolated(x: Tensor) -> int:
    unit = _unit(x[0])
    return int((1 - unit @ unit.T).topk(2, dim=0, largest=False).values[1].argmax())


def _plain_means(x: Tensor, k: int, rounds: int) -> Tensor:
    points = x[0].float()
    centres = points[:k]
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(1)
        centres = torch.stack([points[owner == c].mean(0) if bool((owner == c).any()) else centres[c] for c in range(k)])
    return centres


def _plain_medoids(x: Tensor, k: int, rounds: int) -> Tensor:
    points = x[0].float()
    distance = torch.cdist(points, points)
    medoids = torch.arange(k, device=x.device)
    for _ in range(rounds):
        owner = distance[:, medoids].argmin(1)
        groups = [(owner == c).nonzero()[:, 0] for c in range(k)]
        medoids = torch.stack([g[distance[g][:, g].sum(1).argmin()] if len(g) else medoids[c] for c, g in enumerate(groups)])
    return medoids


def _plain_merge(x: Tensor, owner: Tensor, k: int) -> Tensor:
    """A product with the one-hot matrix of owners."""
    hot = torch.nn.functional.one_hot(owner, k).to(x.dtype)
    return hot.mT @ x / hot.sum(1)[..., None].clamp(min=1)


def _plain_transition(x: Tensor, y: Tensor) -> Tensor:
    turn = torch.softmax(1 - torch.cosine_similarity(x.float(), y.float(), dim=-1), 1)
    return y.float().norm(dim=-1) / x.float().norm(dim=-1) * turn


def _plain_compact(scores: Tensor, k: int, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    index = scores.topk(k).indices.sort().values
    return index, [s[torch.arange(len(s), device=s.device)[:, None], index] for s in states]


# ------------------------------------------------------------------------------------------------------------------ cases
def cases(n: int, preset: Preset, device: torch.device) -> Iterator[Case]:
    """Yield every op at ``n`` tokens."""
    k, d, dtype = SIZES[n], preset.width, preset.dtype
    size = torch.finfo(dtype).bits // 8
    generator = torch.Generator(device).manual_seed(n)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    x = draw(1, n, d) + draw(1, 1, d)
    y = x + draw(1, n, d)
    weight = draw(1, n, kind=torch.float32).abs()
    first, start = torch.zeros(1, dtype=torch.long, device=device), torch.arange(k, device=device)[None]
    owner = torch.randint(0, k, (1, n), generator=generator, device=device)
    query, key = draw(1, preset.heads, n, preset.head_width), draw(1, preset.heads, n, preset.head_width)
    some = torch.tensor([0], device=device)
    rows = query[:, :, :1].contiguous()
    features, dims = f"N={n} D={d}", f"H={preset.heads} d={preset.head_width} N={n}"
    attention, pairs = preset.heads * preset.head_width * n, float(n) * n
    read = size * n * d

    yield Case("topk_sorted", f"N={n} k={k}", lambda f: f(weight, k), lambda: weight.topk(k).indices.sort().values, 4 * n, 0)
    yield Case(
        "select_compact", f"{features} k={k}", lambda f: f(weight, k, [x, y]), lambda: _plain_compact(weight, k, [x, y]),
        4 * n + 4 * k * d * size, 0,
    )  # fmt: skip
    yield Case(
        "merge_scatter", f"{features} k={k}", lambda f: f(x, owner, k), lambda: _plain_merge(x, owner, k),
        read + k * d * size, 2.0 * n * d,
    )  # fmt: skip
    yield Case("transition_score", features, lambda f: f(x, y), lambda: _plain_transition(x, y), 2 * read, 6.0 * n * d)
    yield Case(
        "attention_rows", f"{dims} R=1", lambda f: f(rows, key), lambda: _plain_rows(query, key, some),
        size * attention, 2.0 * attention,
    )  # fmt: skip
    yield Case(
        "attention_colsum", dims, lambda f: f(query, key), lambda: _plain_colsum(query, key),
        2 * size * attention, 2.0 * attention * n,
    )  # fmt: skip
    yield Case(
        "pairwise_top1", f"{features} T={k}", lambda f: f(x, x[:, :k]), lambda: (_unit(x) @ _unit(x[:, :k]).mT).max(-1),
        read, 2.0 * n * k * d,
    )  # fmt: skip
    yield Case(
        "nearest_centre", f"{features} k={k}", lambda f: f(x, x[:, :k]),
        lambda: torch.cdist(x.float(), x[:, :k].float()).argmin(-1), read, 2.0 * n * k * d,
    )  # fmt: skip
    yield Case("most_isolated", features, lambda f: f(x), lambda: _plain_isolated(x), read, pairs * d)
    one_pass = 2.0 * n * k * d  # the cosines of the picks with all tokens
    picks = f"{features} k={k}"
    yield Case("farthest_point", picks, lambda f: f(x, k, first), lambda: _plain_far(x, k, 0), read, one_pass)
    yield Case("farthest_point_weighted", picks, lambda f: f(x, weight, k), lambda: _plain_far(x, k, 0, weight), read, one_pass)
    yield Case("max_sum", picks, lambda f: f(x, k, first), lambda: _plain_sum(x, k, 0), read, one_pass)
    yield Case(
        "greedy_dpp", picks, lambda f: f(x, weight, k), lambda: _plain_dpp(x, weight, k), read, one_pass + 1.0 * n * k * k
    )
    yield Case("k_means", picks + " 5 rounds", lambda f: f(x, start, 5), lambda: _plain_means(x, k, 5), read, 5 * one_pass)
    yield Case("k_medoids", picks + " 5 rounds", lambda f: f(x, start, 5), lambda: _plain_medoids(x, k, 5), read, 6 * one_pass)


# ------------------------------------------------------------------------------------------------------------ measurement
def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, by CUDA events on a GPU."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak(work: Callable[[], Any], device: torch.device) -> float | None:
    """10^6 bytes on top of what there was."""
    if device.type != "cuda":
        return peak_of(work)[1]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


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


def providers(case: Case, n: int, preset: Preset, device: torch.device, compiled: bool) -> dict[str, Callable[[], Any] | str]:
    """What to run for each provider, or why it is not run."""
    op = getattr(ops, case.op)
    twin = op.__wrapped__
    why: dict[str, Callable[[], Any] | str] = {}

    def on_triton() -> Any:
        with ops.use("triton"):
            return case.call(op)

    why["triton"] = on_triton if device.type == "cuda" else "not run: no GPU"
    why["torch"] = lambda: case.call(twin)
    if case.op in HOST_LOOPS:
        why["compile"] = "not run: the twin decides on the host"
    elif not compiled or n != preset.compile_at:
        why["compile"] = f"not run: compiled at N={preset.compile_at} only" if compiled else "not run: --no-compile"
    else:
        fast = torch.compile(twin, dynamic=False)
        why["compile"] = lambda: case.call(fast)
    why["plain"] = case.plain
    return why


def measure(case: Case, n: int, preset: Preset, device: torch.device, roof: tuple[float, float], compiled: bool) -> list[Row]:
    """Measure all providers of one case in turns."""
    base = dict(op=case.op, n=n, shape=case.shape, dtype=str(preset.dtype).removeprefix("torch."))
    rows = {name: Row(provider=name, **base) for name in PROVIDERS}
    works: dict[str, Callable[[], Any]] = {}
    spent: dict[str, list[float]] = {}
    for name, work in providers(case, n, preset, device, compiled).items():
        if isinstance(work, str):
            rows[name].note = work
            continue
        try:
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rows[name].compile_s = time.perf_counter() - begin
            rows[name].peak_mb = _peak(work, device)
        except Exception as error:  # a provider that cannot do it is a result, too
            rows[name].note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            rows[name].compile_s = None
            continue
        works[name], spent[name] = work, []
    for _ in range(200):
        for name, work in works.items():
            if len(spent[name]) < 3 or sum(spent[name]) < preset.seconds:
                spent[name].append(timed(work, device))
    for name, times in spent.items():
        row, took = rows[name], spread([1e3 * t for t in times])
        middle = took.value / 1e3
        row.ms_p20, row.ms_p50, row.ms_p80 = (round(v, 5) for v in (took.low, took.value, took.high))
        row.gb_s, row.tflop_s = case.moved / middle / 1e9, case.flops / middle / 1e12
        row.roofline_share = max(case.moved / roof[0], case.flops / roof[1]) / middle
        # what the first call took longer than the others: compiling, for Triton and torch.compile
        row.compile_s = max(0.0, row.compile_s - middle) if name in ("triton", "compile") else None
        if "plain" in spent:
            row.speedup_vs_plain = statistics.median(spent["plain"]) / middle
        row.note = f"{len(times)} runs"
    return list(rows.values())


def provenance(device: torch.device, preset: Preset, roof: tuple[float, float]) -> dict[str, Any]:
    """Device, versions, commit and measured roofline, the same in every row."""
    here, where = commit(), machine()
    try:
        import triton

        release = triton.__version__
    except ImportError:
        release = ""
    return {
        "device": where["gpu"] if device.type == "cuda" else where["cpu"],
        "threads": where["torch_threads"],
        "roof_gb_s": round(roof[0] / 1e9, 1),
        "roof_tflop_s": round(roof[1] / 1e12, 3),
        "commit": f"{here['id'][:12]}{'+' if here['dirty'] else ''}" if here["id"] else "",
        "triton": release,
        **versions(),
    }


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
    preset: Annotated[Literal["cpu", "gpu"] | None, typer.Option("--preset", help="By default what this machine has.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file; device and versions are in every row.")] = None,
    n: Annotated[list[int] | None, typer.Option("--n", help=f"Tokens; one or more of {', '.join(map(str, SIZES))}.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Op to measure; may be repeated.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile of the twins, too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")] = False,
) -> None:
    """Time, memory and share of the measured roofline of every op that has a Triton version, beside its alternatives."""
    chosen = PRESETS[preset or ("gpu" if torch.cuda.is_available() else "cpu")]
    device = torch.device("cuda" if chosen is PRESETS["gpu"] else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnknownArgumentError("--preset gpu needs a CUDA device, and there is none: use --preset cpu")
    for name in only or ():
        if name not in ops.ACCELERATED:
            raise UnknownArgumentError(f"no op '{name}' has a Triton version: use one of {', '.join(ops.ACCELERATED)}")
    for size in n or ():
        if size not in SIZES:
            raise UnknownArgumentError(f"there is no size {size}: use one or more of {', '.join(map(str, SIZES))}")
    roof, rows = roofline(chosen, device), []
    with torch.no_grad():
        for size in n or chosen.sizes:
            for case in cases(size, chosen, device):
                if only and case.op not in only:
                    continue
                rows += measure(case, size, chosen, device, roof, compiled)
                if not as_json:
                    print(f"{case.op} {case.shape}", file=sys.stderr, flush=True)
    origin = provenance(device, chosen, roof)
    write(out, [asdict(row) | origin for row in rows])
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], **origin}, indent=2))
    else:
        print("\n".join(summary(rows)))


def write(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, if a file is wanted."""
    if path is None:
        return
    try:
        import pandas as pd

        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error.strerror or error}): name another file with --out") from None
