"""Tables derived from a store: terminal, Markdown, CSV, LaTeX.

Nothing in them is typed in or estimated; what was not measured is "–".
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtc.errors import StoreError
from vtc.eval.config import UNREDUCED
from vtc.eval.flops import TOLERANCE
from vtc.eval.stats import Bootstrap, Interval, Paired
from vtc.eval.store import CellResult, Store

Format = Literal["terminal", "md", "csv", "latex"]
FORMATS: tuple[str, ...] = ("terminal", "md", "csv", "latex")
MISSING = "–"
MARK = "!"
"""Put after FLOPs on which torch's counter and the formula disagree."""


@dataclass(frozen=True)
class Row:
    """One row of a table; ``None`` where nothing was measured.

    Attributes
    ----------
    label, reducer, budget : str
        Name in tables, registered name, budget requested.
    accuracy : Interval or None
        Share of correct answers.
    paired : Paired or None
        Against the unreduced run.
    slots, kept, avg : float
        Visual tokens per image: before, entering the last layer, averaged over the decoder layers.
    flops, flops_share : float or None
        Of one prompt's prefill with vision tower and reducer; its share of the unreduced run's.
    mismatch : float
        Relative difference between counter and formula.
    kv_bytes : int or None
        KV cache of one prompt.
    speed : dict or None
        Contents of ``speed.json``.
    by_type : dict
        Accuracy by question type.
    error : str
        Why the cell failed, or ``""``.
    """

    label: str
    reducer: str
    budget: str
    accuracy: Interval | None = None
    paired: Paired | None = None
    slots: float = 0.0
    kept: float | None = None
    avg: float | None = None
    flops: float | None = None
    flops_share: float | None = None
    mismatch: float = 0.0
    kv_bytes: int | None = None
    speed: dict[str, Any] | None = None
    by_type: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Results:
    """What a table shows.

    Attributes
    ----------
    rows : list of Row
        Unreduced first, then by budget.
    sweep : dict
        Contents of ``sweep.json``.
    types : list of str
        Question types in order of first appearance.
    missing : list of str
        Cells of the sweep that have not been run.
    envs, speed_envs : list of dict
        The distinct environments the accuracy and the speed numbers come from.
    """

    rows: list[Row]
    sweep: dict[str, Any]
    types: list[str]
    missing: list[str]
    envs: list[dict[str, Any]]
    speed_envs: list[dict[str, Any]]

    @property
    def unreduced(self) -> Row | None:
        """The unreduced row, where it has been run."""
        return next((r for r in self.rows if r.reducer == UNREDUCED), None)


def collect(store: Store) -> Results:
    """Read the latest sweep of a store and compare every cell with the unreduced one.

    Raises
    ------
    StoreError
        If there is no sweep, nothing has been run, or a cell is damaged.
    """
    sweep = store.read_sweep()
    try:
        listed = [(c["id"], c["label"], c["reducer"], c["budget"]) for c in sweep["cells"]]
        settings, seed = sweep["config"]["bootstrap"], sweep["config"]["seed"]
    except (KeyError, TypeError):
        raise StoreError(
            f"{store.root / 'sweep.json'} is damaged: run the sweep again, finished cells are not repeated"
        ) from None
    found = {cell: store.get(cell) for cell, *_ in listed}
    missing = [f"{label} {budget}".strip() for cell, label, _, budget in listed if found[cell] is None]
    if len(missing) == len(listed):
        raise StoreError(f"none of the cells of {store.root} has been run: run the sweep again")
    base = next((found[cell] for cell, _, reducer, _ in listed if reducer == UNREDUCED), None)
    base = base if base is not None and base.metrics else None
    first = base or next((f for f in found.values() if f is not None and f.metrics), None)
    boot = None
    if first is not None:
        boot = Bootstrap([s["image"] for s in first.samples], settings["resamples"], settings["confidence"], seed)
    rows = []
    for cell, label, reducer, budget in listed:
        result = found[cell]
        if result is None:
            continue
        rows.append(_row(label, reducer, budget, result, base, boot))
    types = list(dict.fromkeys(t for r in rows for t in r.by_type))
    done = [f for f in found.values() if f is not None]
    envs = _distinct([f.env for f in done if f.metrics])
    return Results(rows, sweep, types, missing, envs, _distinct([f.speed["env"] for f in done if f.speed]))


def _distinct(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for i, item in enumerate(items) if item not in items[:i]]


def _row(label: str, reducer: str, budget: str, result: CellResult, base: CellResult | None, boot: Bootstrap | None) -> Row:
    if not result.metrics or boot is None:
        return Row(label, reducer, budget, error=result.error)
    m = result.metrics
    correct = [s["correct"] for s in result.samples]
    paired = None
    if base is not None and [s["id"] for s in base.samples] == [s["id"] for s in result.samples]:
        paired = boot.paired(correct, [s["correct"] for s in base.samples])
    total = m["flops"]["counted"]["total"]
    share = total / base.metrics["flops"]["counted"]["total"] if base is not None else None
    return Row(
        label,
        reducer,
        budget,
        boot.accuracy(correct),
        paired,
        m["tokens"]["slots"],
        m["tokens"]["kept"],
        m["tokens"]["avg"],
        total,
        share,
        m["flops"]["mismatch"],
        m["kv_bytes"],
        result.speed,
        {kind: v["accuracy"] for kind, v in m["by_type"].items()},
        result.error,
    )


# ----------------------------------------------------------------------------------------------------------- columns
@dataclass(frozen=True)
class Column:
    """One column: heading, how a row's entry reads, and the raw numbers behind it for CSV."""

    title: str
    show: Callable[[Row], str]
    raw: tuple[tuple[str, Callable[[Row], Any]], ...]
    left: bool = False


def _dash(value: Any, text: Callable[[Any], str]) -> str:
    return MISSING if value is None else text(value)


def _percent(interval: Interval | None, digits: int = 1) -> str:
    return _dash(interval, lambda i: f"{100 * i.value:.{digits}f} [{100 * i.low:.0f}–{100 * i.high:.0f}]")


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


def _difference(row: Row) -> Interval | None:
    return row.paired.difference if row.paired is not None else None


def _accuracy(row: Row) -> str:
    return "failed" if row.accuracy is None and row.error else _percent(row.accuracy)


def columns(results: Results, *, accuracy_only: bool = False, by_type: bool = False, terminal: bool = False) -> list[Column]:
    """Return the columns of a table."""
    out = [
        Column("reducer", lambda r: r.label, (("reducer", lambda r: r.label),), left=True),
        Column("keep", lambda r: r.budget or "all", (("budget", lambda r: r.budget or "all"),)),
        Column("accuracy %", _accuracy, _raw_interval("accuracy", lambda r: r.accuracy)),
        Column(
            "of full %",
            lambda r: _percent(_ratio(r)) if r.reducer != UNREDUCED else "100.0" if r.paired else MISSING,
            _raw_interval("share_of_full", _ratio) + _raw_interval("difference", _difference),
        ),
        Column("tokens", lambda r: _dash(r.kept, _number), (("tokens_kept", lambda r: r.kept),)),
        Column("avg", lambda r: _dash(r.avg, _number), (("tokens_avg_layers", lambda r: r.avg),)),
    ]
    if not accuracy_only:
        out += _cost_columns(results, terminal)
    if by_type:
        out += [
            Column(
                t,
                lambda r, t=t: _dash(r.by_type.get(t), lambda v: f"{100 * v:.0f}"),
                ((f"accuracy:{t}", lambda r, t=t: r.by_type.get(t)),),
            )
            for t in results.types
        ]
    return out


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


# -------------------------------------------------------------------------------------------------------- conditions
def conditions(results: Results, *, accuracy_only: bool = False) -> list[str]:
    """Return the lines under a table: what was run, where, and what the columns mean."""
    sweep, config = results.sweep, results.sweep["config"]
    model, asked, boot = sweep["model"], sweep["questions"], config["bootstrap"]
    n = asked["scenes"] + asked["easy_vqa"]
    sources = " and ".join(
        text
        for count, text in ((asked["scenes"], f"{asked['scenes']} scene"), (asked["easy_vqa"], f"{asked['easy_vqa']} easy-VQA"))
        if count
    )
    lines = [
        f"Model '{model['name']}': {model['parameters'] / 1e6:.1f} M parameters, {model['visual_tokens']} visual tokens per image, "
        f"{model['decoder_layers']} decoder layers. {n} questions ({sources}) on {asked['images']} images, seed {config['seed']}.",
        f"accuracy: [{100 * boot['confidence']:.0f} % bootstrap interval over images, {boot['resamples']} draws]. "
        "of full: share of the unreduced accuracy, paired on the same questions. "
        "tokens: visual tokens entering the last layer. avg: over the layers.",
    ]
    if not accuracy_only:
        lines += [_flops_condition(results), _speed_condition(results)]
    if results.missing:
        lines.append(f"Not run yet: {', '.join(results.missing)} (run the sweep again to add them).")
    lines += [f"Failed: {r.label} {r.budget}: {r.error}" for r in results.rows if r.error]
    if not accuracy_only:
        lines += _machines(results)
    return lines


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
    accuracy = [_machine(e) for e in results.envs]
    timed = [_machine(e) for e in results.speed_envs]
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
        From :func:`collect`.
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
    main = columns(results, accuracy_only=accuracy_only, terminal=fmt == "terminal")
    tables = [main]
    if by_type:
        tables.append([main[0], main[1], *columns(results, accuracy_only=True, by_type=True)[6:]])
        notes = [*notes, _guess_note(results)] if results.sweep.get("constant_guess") else notes
    if fmt == "md":
        return "\n\n".join([*(_markdown(results.rows, t) for t in tables), *(_md(n) for n in notes)]) + "\n"
    if fmt == "latex":
        return _latex(results.rows, tables, notes)
    if fmt != "terminal":
        raise ValueError(f"format {fmt!r} is not one of {', '.join(FORMATS)}")
    return _terminal(results.rows, tables, notes, width, color)


def _guess_note(results: Results) -> str:
    guess = results.sweep["constant_guess"]
    listed = ", ".join(f"{t} {100 * guess[t]:.0f}" for t in results.types if t in guess)
    return f"Always giving the most frequent answer of a type would score: {listed}."


def clean(text: str) -> str:
    """Replace control characters (terminal escapes, line breaks, direction marks) by spaces."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    out: list[list[Row]] = []
    for row in rows:
        if out and out[-1][0].budget == row.budget:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _terminal(
    rows: Sequence[Row], tables: Sequence[Sequence[Column]], notes: Sequence[str], width: int | None, color: bool
) -> str:
    made = []
    for cols in tables:
        table = Table(box=_box(), pad_edge=False, padding=(0, 1, 0, 0))
        for c in cols:
            words = [w for entry in (c.title, *(clean(c.show(row)) for row in rows)) for w in entry.split()]
            table.add_column(Text(c.title), justify="left" if c.left else "right", min_width=max(map(len, words)))
        for group in _groups(rows):
            for row in group:
                style = "bold" if row.reducer == UNREDUCED else "red" if row.error and row.accuracy is None else ""
                table.add_row(*(Text(clean(c.show(row))) for c in cols), style=style)
            table.add_section()
        made.append(table)
    out = io.StringIO()
    probe = Console(width=10_000, file=io.StringIO())
    needed = max(probe.measure(t).maximum for t in made)
    least = max(sum((c.min_width or 0) + 3 for c in t.columns) for t in made)  # below that, rich cuts words
    # a terminal too narrow for the table folds entries at their spaces; a pipe gets the whole width
    columns_ = max(needed, 100) if width is None else max(width, least)
    console = Console(file=out, width=columns_, force_terminal=color, no_color=not color, highlight=False, legacy_windows=False)
    for table in made:
        console.print(table)
    for note in notes:
        console.print(Text(clean(note), style="dim" if color else ""), width=min(width or columns_, max(needed, 100)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


_MD = str.maketrans({c: "\\" + c for c in "\\`*_{}[]<>#|~$!&"})


def _md(text: str) -> str:
    return clean(text).translate(_MD)


def _markdown(rows: Sequence[Row], cols: Sequence[Column]) -> str:
    lines = [
        "| " + " | ".join(_md(c.title) for c in cols) + " |",
        "|" + "|".join(":--" if c.left else "--:" for c in cols) + "|",
    ]
    lines += ["| " + " | ".join(_md(c.show(row)) for c in cols) + " |" for row in rows]
    return "\n".join(lines)


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
    }
)


def _tex(text: str) -> str:
    return clean(text).translate(_LATEX)


def _latex(rows: Sequence[Row], tables: Sequence[Sequence[Column]], notes: Sequence[str]) -> str:
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}[t]", "\\centering\\small"]
    for cols in tables:
        lines += [f"\\begin{{tabular}}{{{''.join('l' if c.left else 'r' for c in cols)}}}", "\\toprule"]
        lines.append(" & ".join(_tex(c.title) for c in cols) + " \\\\")
        for group in _groups(rows):
            lines.append("\\midrule")
            lines += [" & ".join(_tex(c.show(row)) for c in cols) + " \\\\" for row in group]
        lines += ["\\bottomrule", "\\end{tabular}", "\\par\\medskip"]
    lines += [f"\\parbox{{\\linewidth}}{{\\footnotesize {_tex(note)}}}\\par" for note in notes]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _csv(results: Results, cols: Sequence[Column], accuracy_only: bool) -> str:
    """One line per row with the raw numbers; the conditions are columns, so that every line stands for itself."""
    sweep = results.sweep
    asked = sweep["questions"]
    conditions_: list[tuple[str, Any]] = [
        ("model", sweep["model"]["name"]),
        ("questions", asked["scenes"] + asked["easy_vqa"]),
        ("seed", sweep["config"]["seed"]),
    ]
    if not accuracy_only:
        where = (results.speed_envs or results.envs or [sweep["env"]])[0]
        conditions_ += [
            ("commit", where["commit"]["id"]),
            ("dirty", where["commit"]["dirty"]),
            ("machine", where["machine"]["gpu"] or where["machine"]["cpu"]),
            ("torch_threads", where["machine"]["torch_threads"]),
            *((name, where["versions"][name]) for name in ("python", "torch", "transformers", "vtc")),
        ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    raw = [pair for c in cols for pair in c.raw]
    writer.writerow([name for name, _ in raw] + ["error"] + [name for name, _ in conditions_])
    for row in results.rows:
        writer.writerow([_field(get(row)) for _, get in raw] + [_field(row.error)] + [_field(v) for _, v in conditions_])
    return out.getvalue()


def _field(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        value = clean(value)
        return "'" + value if value[:1] in ("=", "+", "-", "@") else value  # spreadsheets run those as formulas
    return value
