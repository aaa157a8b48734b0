"""Tables derived from a store.

Nothing in them is typed in or estimated; what was not measured is "–".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.eval.config import BASELINES, UNREDUCED
from vtc.eval.flops import TOLERANCE
from vtc.eval.formats import MISSING, Grid, Line, clean, csv_text, format_grids, rank_note
from vtc.eval.results import RANDOM, Asked, Results, Row
from vtc.eval.stats import Interval, Paired

MARK = "!"
"""Put after FLOPs on which torch's counter and the formula disagree."""

SURE = "*"
"""Put after a difference that stands after correction for all comparisons of its column."""


# ----------------------------------------------------------------------------------------------------------- columns
@dataclass(frozen=True)
class Column:
    """One column: heading, how a row's entry reads, the raw numbers behind it for CSV, what the best of a group is judged by."""

    title: str
    show: Callable[[Row], str]
    raw: tuple[tuple[str, Callable[[Row], Any]], ...]
    left: bool = False
    rank: Callable[[Row], float | None] | None = None


def _dash(value: Any, text: Callable[[Any], str]) -> str:
    return MISSING if value is None else text(value)


def _percent(interval: Interval | None) -> str:
    return _dash(interval, lambda i: f"{100 * i.value:.1f} [{100 * i.low:.0f}–{100 * i.high:.0f}]")


def _points(value: float) -> str:
    """A signed difference in percentage points; what rounds to zero has no sign."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text[1:] if text[1:] == "0.0" else text


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _timing(row: Row, *keys: str) -> dict[str, float] | None:
    at: Any = row.speed
    for key in keys:
        at = None if at is None else at.get(key)
    return at


def _show_timing(*keys: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        t = _timing(row, *keys)
        return MISSING if t is None else f"{_ms(t['value'])} [{_ms(t['low'])}–{_ms(t['high'])}]"

    return show


def _show_ratio(*keys: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        t = _timing(row, *keys)
        return MISSING if t is None else f"{t['value']:.2f}×"

    return show


def _raw_timing(name: str, *keys: str) -> tuple[tuple[str, Callable[[Row], Any]], ...]:
    def get(which: str) -> Callable[[Row], Any]:
        return lambda row: None if _timing(row, *keys) is None else _timing(row, *keys)[which]  # type: ignore[index]

    return ((name, get("value")), (f"{name}_p20", get("low")), (f"{name}_p80", get("high")))


def _raw_interval(name: str, pick: Callable[[Row], Interval | None]) -> tuple[tuple[str, Callable[[Row], Any]], ...]:
    def get(which: str) -> Callable[[Row], Any]:
        return lambda row: None if pick(row) is None else getattr(pick(row), which)

    return ((name, get("value")), (f"{name}_low", get("low")), (f"{name}_high", get("high")))


def _ratio(row: Row) -> Interval | None:
    return row.paired.ratio if row.paired is not None else None


def _value(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def _accuracy(row: Row) -> str:
    return "failed" if row.accuracy is None and row.error else _percent(row.accuracy)


def _difference_column(title: str, name: str, pick: Callable[[Row], Paired | None], p: Callable[[Row], float | None]) -> Any:
    def build(alpha: float) -> Column:
        def show(row: Row) -> str:
            paired = pick(row)
            if paired is None or row.reducer == UNREDUCED:
                return MISSING
            d, sure = paired.difference, SURE if (p(row) or 0.0) < alpha and p(row) is not None else ""
            return f"{_points(d.value)}{sure} [{_points(d.low)}, {_points(d.high)}]"

        raw = _raw_interval(name, lambda r: None if pick(r) is None else pick(r).difference)  # type: ignore[union-attr]
        return Column(title, show, (*raw, (f"{name}_p_holm", p)))

    return build


_TO_NONE = _difference_column("to none", "difference", lambda r: r.paired, lambda r: r.p_none)
_TO_RANDOM = _difference_column("to random", "difference_random", lambda r: r.over_random, lambda r: r.p_random)


def columns(results: Results, *, accuracy_only: bool = False, by_type: bool = False, terminal: bool = False) -> list[Column]:
    """Return the columns of a table."""
    alpha = 1 - results.sweep["config"]["bootstrap"]["confidence"]
    out = [
        Column("reducer", lambda r: r.label, (("reducer", lambda r: r.label),), left=True),
        Column("keep", lambda r: r.budget or "all", (("budget", lambda r: r.budget or "all"),)),
    ]
    if results.mixed:
        out.append(Column("code", lambda r: r.code, (("code", lambda r: r.code),)))
    several = len(results.tasks) > 1
    if several:
        out += [_task_column(task) for task in results.tasks]
    out += [
        Column(
            "mean %" if several else "accuracy %",
            _accuracy,
            _raw_interval("accuracy", lambda r: r.accuracy),
            rank=lambda r: _value(r.accuracy),
        ),
        Column(
            "of full %",
            lambda r: MISSING if _ratio(r) is None else f"{100 * _ratio(r).value:.1f}",  # type: ignore[union-attr]
            _raw_interval("share_of_full", _ratio),
            rank=lambda r: _value(_ratio(r)),
        ),
        _TO_NONE(alpha),
        _TO_RANDOM(alpha),
        Column("tokens", lambda r: _dash(r.kept, _number), (("tokens_kept", lambda r: r.kept),)),
        Column("avg", lambda r: _dash(r.avg, _number), (("tokens_avg_layers", lambda r: r.avg),)),
    ]
    if not accuracy_only:
        out += _cost_columns(results, terminal)
    if by_type:
        out += type_columns(results)
    return out


def _task_column(task: str) -> Column:
    def get(row: Row) -> Interval | None:
        return row.tasks[task].accuracy if task in row.tasks else None

    return Column(
        clean(task),
        lambda r: _dash(get(r), lambda i: f"{100 * i.value:.1f}"),
        (
            *_raw_interval(f"accuracy:{task}", get),
            (f"metric:{task}", lambda r: r.tasks[task].reported if task in r.tasks else None),
        ),
        rank=lambda r: _value(get(r)),
    )


def type_columns(results: Results) -> list[Column]:
    """Return one column per question type."""
    return [
        Column(
            t,
            lambda r, t=t: _dash(r.by_type.get(t), lambda v: f"{100 * v:.0f}"),
            ((f"accuracy:{t}", lambda r, t=t: r.by_type.get(t)),),
            rank=lambda r, t=t: r.by_type.get(t),
        )
        for t in results.types
    ]


def _cost_columns(results: Results, terminal: bool) -> list[Column]:
    most = max((r.flops for r in results.rows if r.flops is not None), default=0.0)
    unit, scale = next(((u, s) for u, s in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if most >= s), ("M", 1e6))
    digits = 0 if most / scale >= 100 else 2

    def flops(row: Row) -> str:
        if row.flops is None:
            return MISSING
        share = "" if row.flops_share is None else f" ({100 * row.flops_share:.0f}%)"
        return f"{row.flops / scale:.{digits}f}{MARK if row.mismatch > TOLERANCE else ''}{share}"

    def kv(row: Row) -> str:
        return _dash(row.kv_bytes, lambda b: f"{b / 1e6:.2f}" if b < 1e8 else f"{b / 1e6:.0f}")

    return [
        Column(
            f"{unit}FLOPs",
            flops,
            (("flops", lambda r: r.flops), ("flops_share", lambda r: r.flops_share), ("flops_mismatch", lambda r: r.mismatch)),
        ),
        Column("KV MB", kv, (("kv_bytes", lambda r: r.kv_bytes),)),
        Column("prefill ms", _show_timing("reduced", "prefill_ms"), _raw_timing("prefill_ms", "reduced", "prefill_ms")),
        Column("speed-up", _show_ratio("speedup", "prefill"), _raw_timing("prefill_speedup", "speedup", "prefill")),
        Column(
            "TTFT",
            _show_ratio("speedup", "ttft"),
            _raw_timing("ttft_ms", "reduced", "ttft_ms")
            + _raw_timing("ttft_speedup", "speedup", "ttft")
            + _raw_timing("vision_ms", "reduced", "vision_ms")
            + _raw_timing("decode_ms", "reduced", "decode_ms"),
        ),
        Column(
            "reduction\nms" if terminal else "reduction ms",
            lambda r: (
                MISSING if r.reducer == UNREDUCED else _dash(_timing(r, "reduced", "reducer_ms"), lambda t: _ms(t["value"]))
            ),
            _raw_timing("reduction_ms", "reduced", "reducer_ms"),
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- grids
def grids(results: Results, *, accuracy_only: bool = False, by_type: bool = False, terminal: bool = False) -> list[Grid]:
    """Return the tables of a sweep as text: one per model, and one more with the question types."""
    out = []
    several = len(results.models) > 1
    for model in results.models:
        mine = results.of(model)
        main = columns(mine, accuracy_only=accuracy_only, terminal=terminal)
        out.append(grid(mine.rows, main, f"Model {model}" if several else ""))
        if by_type:
            named = [c for c in main if c.title in ("reducer", "keep", "code")]
            out.append(grid(mine.rows, [*named, *type_columns(mine)], f"Model {model}, by question type" if several else ""))
    return out


def grid(rows: Sequence[Row], cols: Sequence[Column], heading: str = "") -> Grid:
    """Lay rows out, with the best two of every group and column marked."""
    groups = []
    for group in _groups(rows):
        ranks = [_ranks(group, c) for c in cols]
        groups.append(
            [Line(tuple(c.show(row) for c in cols), tuple(r[i] for r in ranks), _kind(row)) for i, row in enumerate(group)]
        )
    return Grid(tuple(c.title for c in cols), tuple(c.left for c in cols), groups, heading)


def _kind(row: Row) -> str:
    if row.accuracy is None and row.error:
        return "failed"
    return "full" if row.reducer == UNREDUCED else "base" if row.reducer in BASELINES else "method"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    out: list[list[Row]] = []
    for row in rows:
        if out and out[-1][0].budget == row.budget:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _ranks(group: Sequence[Row], column: Column) -> list[int]:
    """Rank by value: equal values share a rank, and a value alone is no winner."""
    values = [column.rank(row) if column.rank is not None else None for row in group]
    distinct = sorted({round(v, 9) for v in values if v is not None}, reverse=True)
    if len(distinct) < 2:
        return [0] * len(group)
    places = {v: place for place, v in enumerate(distinct[:2], 1)}
    return [0 if v is None else places.get(round(v, 9), 0) for v in values]


# -------------------------------------------------------------------------------------------------------- conditions
def conditions(results: Results, *, accuracy_only: bool = False) -> list[str]:
    """Return the lines under a table: what was run, where, and what the columns mean."""
    boot = results.sweep["config"]["bootstrap"]
    several = len(results.tasks) > 1
    lines = [
        *_asked(results),
        f"{'mean' if several else 'accuracy'}: [{100 * boot['confidence']:.0f} % bootstrap interval over images, "
        f"{boot['resamples']} draws]. of full: "
        + ("the tasks' shares of the unreduced accuracy, averaged. " if several else "share of the unreduced accuracy. ")
        + "tokens: visual tokens entering the last layer. avg: over the layers.",
        *_difference_conditions(results),
        *_metric_conditions(results),
    ]
    if not accuracy_only:
        lines += [_flops_condition(results), _speed_condition(results)]
    if results.missing:
        lines.append(f"Not run yet: {', '.join(results.missing)} (run the sweep again to add them).")
    lines += [f"Failed: {r.label} {r.budget}: {r.error}" for r in results.rows if r.error]
    if not accuracy_only:
        lines += _machines(results)
    return lines


def _asked(results: Results) -> list[str]:
    sweep = results.sweep
    known = {m["name"]: m for m in sweep.get("models") or [sweep["model"]]}
    seeds = results.seeds or [sweep["config"].get("seed", 0)]
    seeded = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    facts = []
    for name in results.models:
        m = known.get(name, {})
        parts = []
        if m.get("parameters"):
            parts.append(f"{m['parameters'] / 1e6:.1f} M parameters")
        if m.get("visual_tokens"):
            parts.append(f"{m['visual_tokens']} visual tokens per image")
        if m.get("decoder_layers"):
            parts.append(f"{m['decoder_layers']} decoder layers")
        facts.append(f"Model '{name}'{': ' if parts else ''}{', '.join(parts)}.")
    if len(results.asked) == 1:
        task, asked = next(iter(results.asked.items()))
        named = "" if task == "questions" else f"Task {task}: "
        return [f"{' '.join(facts)} {named}{_count_questions(asked)}, {seeded}."]
    tasks = [f"{task}: {_count_questions(a)}" for task, a in results.asked.items()]
    return [f"{' '.join(facts)} {'; '.join(tasks)}; {seeded}."] if tasks else facts


def _count_questions(asked: Asked) -> str:
    named = [f"{count} {source}" for source, count in asked.sources.items() if source]
    sources = f" ({' and '.join(named)})" if named else ""
    return f"{asked.questions} questions{sources} on {asked.images} images"


def _difference_conditions(results: Results) -> list[str]:
    alpha = 1 - results.sweep["config"]["bootstrap"]["confidence"]
    families = [
        (UNREDUCED, sum(r.p_none is not None for r in results.rows)),
        (RANDOM, sum(r.p_random is not None for r in results.rows)),
    ]
    if not any(count for _, count in families):
        return []
    counts = " and ".join(f"{count} to {name}" for name, count in families if count)
    return [
        "to none, to random: difference in points to the unreduced model and to random tokens of the same budget, paired on the "
        f"same questions [bootstrap interval of this one comparison]. {SURE} stands after Holm's correction for all {counts} "
        f"comparisons (sign-flip test over images{', each model for itself' if len(results.models) > 1 else ''}; chance of any "
        f"false {SURE} in a column below {100 * alpha:.0f} %)."
    ]


def _metric_conditions(results: Results) -> list[str]:
    """Say where a benchmark's own metric is not the mean score that the table shows."""
    out = []
    for task in results.tasks:
        found = next((r.tasks[task] for r in results.rows if task in r.tasks and r.tasks[task].reported is not None), None)
        if found is None or abs(found.reported - 100 * found.accuracy.value) < 0.05:  # type: ignore[operator]
            continue
        listed = ", ".join(
            f"{r.label} {r.budget}".strip() + f" {r.tasks[task].reported:.1f}"
            for r in results.rows
            if task in r.tasks and r.tasks[task].reported is not None
        )
        out.append(
            f"{task}: the table shows the mean score of the answers, which can be compared question by question; the benchmark's "
            f"own metric is {found.metric}: {listed}."
        )
    return out


def _flops_condition(results: Results) -> str:
    worst = max((r.mismatch for r in results.rows), default=0.0)
    if worst > TOLERANCE:
        check = (
            f"{MARK} marks a disagreement above {100 * TOLERANCE:.0f} % with the closed formula (worst: {100 * worst:.1f} %)"
        )
    else:
        check = "agrees with the closed formula" + (f" to {100 * worst:.2g} %" if worst > 0 else " exactly")
    return (
        "FLOPs: prefill of one prompt, vision tower and reducer included; 1 multiply-add = 2 FLOPs; torch's counter, "
        f"which {check}. KV: cache after that prefill, 1 MB = 10^6 bytes."
    )


def _speed_condition(results: Results) -> str:
    timed = next((r.speed for r in results.rows if r.speed is not None), None)
    if timed is None:
        return f"Speed was not measured ({MISSING})."
    s = timed["settings"]
    return (
        f"Speed: batch {timed['batch_size']}, {timed['prompt_tokens']} prompt tokens, "
        f"{_count(timed['env']['machine']['torch_threads'], 'thread')}, {s['repeats']} runs after {s['warmup']} of warm-up, "
        "median [20th–80th percentile]. prefill: language model from embeddings to the last position's logits, reducers in it "
        "included; speed-up: of the prefill. TTFT: speed-up of vision, reduction and prefill together. Both are median ratios to "
        "unreduced runs interleaved in the same process; the row 'none' is timed against itself and shows the noise."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _machines(results: Results) -> list[str]:
    """One line per environment; one for both passes where they ran in the same one."""
    accuracy = list(dict.fromkeys(_machine(e) for e in results.envs))
    timed = list(dict.fromkeys(_machine(e) for e in results.speed_envs))
    if timed in ([], accuracy):
        return [f"Run on {line}" for line in accuracy]
    return [f"Accuracy on {line}" for line in accuracy] + [f"Speed on {line}" for line in timed]


def _machine(e: dict[str, Any]) -> str:
    m, v, c = e["machine"], e["versions"], e["commit"]
    commit = "installed package" if c["id"] is None else f"commit {c['id'][:10]}{' with local changes' if c['dirty'] else ''}"
    return (
        f"{m['gpu'] or m['cpu']}, {_count(m['cores'], 'core')}, {_count(m['torch_threads'], 'torch thread')}; "
        f"Python {v['python']}, torch {v['torch']}, transformers {v['transformers']}, vtc {v['vtc']} ({commit})."
    )


# ----------------------------------------------------------------------------------------------------------- formats
def render(
    results: Results,
    fmt: str,
    *,
    accuracy_only: bool = False,
    by_type: bool = False,
    width: int | None = None,
    color: bool = False,
) -> str:
    """Render a table.

    Parameters
    ----------
    results : Results
        From :func:`vtc.eval.results.collect`.
    fmt : {"terminal", "md", "csv", "latex"}
        Output format.
    accuracy_only : bool
        Leave out costs and timings; the text is then the same on every machine that gives the same answers.
    by_type : bool
        Add accuracy by question type.
    width : int or None
        Terminal only: columns there are; as many as the table needs when None.
    color : bool
        Terminal only: ANSI styles.
    """
    if fmt == "csv":
        return _csv(results, columns(results, accuracy_only=accuracy_only, by_type=by_type), accuracy_only)
    notes = conditions(results, accuracy_only=accuracy_only)
    made = grids(results, accuracy_only=accuracy_only, by_type=by_type, terminal=fmt == "terminal")
    if any(rank for g in made for group in g.groups for line in group for rank in line.ranks):
        notes.insert(1, rank_note(fmt))
    if by_type and (guess := guesses(results)):
        listed = ", ".join(f"{t} {100 * v:.0f}" for t, v in guess.items())
        notes.append(f"Always giving the most frequent answer of a type would score: {listed}.")
    return format_grids(made, notes, fmt, warnings=results.warnings, width=width, color=color)


def guesses(results: Results) -> dict[str, float]:
    """Return the score of always giving the most frequent answer, by question type, as far as the sweep recorded it."""
    found = results.sweep.get("constant_guess") or {}
    return {t: found[t] for t in results.types if isinstance(found.get(t), (int, float))}


def _csv(results: Results, cols: Sequence[Column], accuracy_only: bool) -> str:
    """One line per row with the raw numbers; the conditions are columns, so that every line stands for itself."""
    shared: list[tuple[str, Any]] = [
        ("questions", sum(a.questions for a in results.asked.values())),
        ("seed", "+".join(map(str, results.seeds))),
    ]
    if not accuracy_only:
        where = (results.speed_envs or results.envs or [results.sweep["env"]])[0]
        shared += [
            ("commit", where["commit"]["id"]),
            ("dirty", where["commit"]["dirty"]),
            ("machine", where["machine"]["gpu"] or where["machine"]["cpu"]),
            ("torch_threads", where["machine"]["torch_threads"]),
            *((name, where["versions"][name]) for name in ("python", "torch", "transformers", "vtc")),
        ]
    raw = [pair for c in cols for pair in c.raw]
    names = [*(name for name, _ in raw), "error", "model", *(name for name, _ in shared)]
    values = [v for _, v in shared]
    return csv_text(names, ([*(get(row) for _, get in raw), row.error, row.model, *values] for row in results.rows))
