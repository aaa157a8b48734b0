"""The ``vtc`` command: list and explain reducers, check models, try a reducer on one image, diagnose the installation.

Everything that needs transformers is imported inside the commands, so that ``vtc --help`` and ``vtc list`` answer quickly. Other
packages add commands through the entry point group ``vtc.commands``: each value is a callable ``register(app)`` that gets the typer
application.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import inspect as pyinspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vtc._version import __version__
from vtc.core import Stage, amount
from vtc.doors import short
from vtc.errors import BudgetError, InputFileError, UnknownArgumentError, UnknownReducerError, VtcError, did_you_mean
from vtc.registry import plugin_failed

COMMANDS = "vtc.commands"
"""Entry point group of further commands."""

REDUCER, SHARE = "visionzip", "25%"
"""What ``vtc run`` and ``vtc check`` take where no reducer or budget is named."""

LONGEST_SIDE = 16_384
"""Largest side of a picture whose tokens ``vtc check`` counts."""

app = typer.Typer(
    name="vtc",
    help="Visual-token reducers for Hugging Face vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let Python code that comes with the model run: read it first, it may do anything."
    ),
]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors (works after the command, too).")] = False,
) -> None:
    """Visual-token reducers for Hugging Face vision-language models."""


# --------------------------------------------------------------------------------------------------------------- list
@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a wildcard such as 'd*'.")] = "",
    stage: Annotated[str, typer.Option(help="Only reducers acting at this stage: " + ", ".join(s.value for s in Stage))] = "",
    text_aware: Annotated[bool, typer.Option("--text-aware", help="Only reducers that look at the question.")] = False,
    no_attention: Annotated[
        bool, typer.Option("--no-attention", help="Only reducers that read nothing of an attention.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", "-a", help="All columns: kind, signals and positions, too.")] = False,
    as_json: Json = False,
) -> None:
    """List the reducers: where they act, where they come from, what they do."""
    from vtc import inspect as look
    from vtc.registry import entries

    stages = [s.value for s in Stage]
    if stage and stage not in stages:
        raise UnknownArgumentError(f"there is no stage '{stage}'{did_you_mean(stage, stages)} (stages: {', '.join(stages)})")
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [e for e in entries().values() if fnmatch.fnmatch(e.name, glob) and (not stage or stage in e.stages)]
    chosen = [e for e in chosen if not text_aware or look.text_aware(e.name)]
    chosen = [e for e in chosen if not no_attention or not look.reads_attention(e.name)]
    if not chosen:
        asked = [f"'{pattern}'"] * bool(pattern) + [f"--stage {stage}"] * bool(stage)
        asked += ["--text-aware"] * text_aware + ["--no-attention"] * no_attention
        raise UnknownReducerError(
            f"no reducer matches {' '.join(asked)}{did_you_mean(pattern, entries())} (`vtc list` shows all)"
        )
    rows = [
        {
            "name": e.name,
            "stages": list(e.stages),
            "kind": e.cls.kind,
            "needs": look.needs_of(e.name),
            "positions": look.positions_of(e.name),
            "paper": e.paper,
            "summary": e.summary,
        }
        for e in chosen
    ]
    if as_json:
        _json(rows)
        return
    columns = ["name", "stages", *(["kind", "needs", "positions"] if everything else []), "paper", "summary"]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        cells = {k: ", ".join(v) or "-" if isinstance(v, list) else v for k, v in row.items()}
        table.add_row(Text(row["name"], "bold"), *(cells[column] for column in columns[1:]))
    console = _console()
    console.print(table)
    console.print(f"\n{len(rows)} reducers; details: vtc info NAME{'' if everything else ', more columns: --all'}", style="dim")


# --------------------------------------------------------------------------------------------------------------- info
@app.command()
def info(name: Annotated[str, typer.Argument(help="A reducer, or reducer.preset.")], as_json: Json = False) -> None:
    """Explain one reducer: the idea, where it acts, where it deviates, options, presets, source; Markdown if piped."""
    from vtc import registry
    from vtc.docs import sheet

    base, _, preset = name.partition(".")
    entry = registry.info(base)
    budget = {} if {"keep", "avg_tokens"} & set(entry.presets.get(preset, {})) else {"keep": 0.5}
    registry.create(name, **budget)  # an unknown preset fails here
    page = sheet(entry)
    data = {
        "name": entry.name,
        "stages": list(entry.stages),
        "kind": entry.cls.kind,
        "needs": list(page.needs),
        "positions": page.positions,
        "newlines": page.newlines,
        "paper": entry.paper,
        "code": entry.code,
        "licence": entry.licence,
        "options": {k: v for k, v in entry.options.items() if not k.startswith("_")},
        "presets": {k: dict(v) for k, v in entry.presets.items()},
        "deviates": page.deviates,
        "unconfirmed": list(page.unconfirmed),
        "golden": None if page.golden is None else list(page.golden),
        "doc": pyinspect.getdoc(entry.cls) or "",
    }
    if preset:
        data["preset"] = {"name": preset, **entry.presets[preset]}
    if as_json:
        _json(data)
        return
    from rich.markdown import Markdown

    from vtc.docs import entry_text

    text, console = entry_text(page, title=name, mark=preset), _console()
    if console.is_terminal:
        console.print(Markdown(text), width=min(console.width, 120))
    else:
        print(text, end="")


# -------------------------------------------------------------------------------------------------------------- check
@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A folder, 'pocket', or a hub id in the local cache; only its config is read.")],
    reducer: Annotated[str, typer.Argument(help="A reducer or reducer.preset to try.")] = "",
    keep: Annotated[str, typer.Option(help=f"Tokens per image or share of them: 64, 0.25 or 25%; by default {SHARE}.")] = "",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Option of the reducer, name=value.")] = None,
    image_size: Annotated[str, typer.Option(help="WxH: count the visual tokens of an image of this size.")] = "",
    prove: Annotated[
        bool, typer.Option("--verify", help="Run a small copy against a slow reference; exit 1 if it fails.")
    ] = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what vtc can do with a model, from its config alone: structure, stages, tokens per image, reducers that run.

    Nothing is downloaded or asked of the network, and no code of the model runs.
    """
    from vtc.inspect import examine, label, load_config

    size = _size(image_size) if image_size else None
    wanted = _reducer([reducer], keep, "", option) if reducer else None
    _quiet()
    report = examine(model, size, trust_remote_code=trust)
    bound = None
    error: VtcError | None = None
    if wanted is not None:
        from vtc.engine.patch import bind, late_enough
        from vtc.engine.upstream import check_implementation
        from vtc.retrieval import check_vector_reducer

        try:
            if report.retriever:
                bound = check_vector_reducer(wanted)
            else:
                with _option_names():
                    bound = bind(wanted, report.family.facts)
                check_implementation(report.family.text.config)
        except VtcError as refusal:
            error = refusal
    verdict = None
    if prove and error is None:
        from vtc.verify import verify

        verdict = verify(load_config(model, trust_remote_code=trust))
    if as_json:
        data = report.to_dict()
        if wanted is not None:
            data["asked"] = {"reducer": reducer, "runs": error is None, "reason": str(error or "")}
        if verdict is not None:
            data["verify"] = verdict.to_dict()
        _json(data)
        raise typer.Exit(1 if error or (verdict is not None and not verdict.ok) else 0)
    if wanted is None:
        _print_report(report)
        _print_verdict(verdict)
        return
    if error is not None:
        raise error
    if not report.retriever:
        wanted = late_enough(wanted, report.family.facts.first_layer)  # says at which layer it acts by default
    slots = None if report.retriever else report.budgeted or report.family.facts.max_tokens
    facts = None if report.retriever else report.family.facts
    counts = [p.count(slots, facts) for p in bound.parts() if not p.decides_itself] if slots else []
    tokens = f": {slots} visual tokens -> {' -> '.join(str(c) for c in counts)}" if counts else ""
    _console().print(Text.assemble(("yes", "bold green"), f", {label(wanted)} runs on {model}{tokens}"))
    _print_verdict(verdict)


def _print_verdict(verdict: Any) -> None:
    """Show what ``--verify`` found; exit code 1 unless it is all well."""
    if verdict is None:
        return
    console = _console()
    console.print()
    console.print(verdict.table())
    console.print(Text(f"\n{verdict.headline}", "bold green" if verdict.ok else "bold red"))
    if not verdict.ok:
        raise typer.Exit(1)


def _print_report(report: Any) -> None:
    data, console = report.to_dict(), _console()
    if report.retriever:
        _print_retriever(data, console)
        return
    tower, decoder = data["tower"], data["decoder"]
    rows, cols = tower["grid"]
    cls = "with" if tower["cls"] else "without"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("model", escape(f"{data['model']} ({data['architecture']}, family {data['family']})"))
    grid.add_row("language model", f"{escape(str(decoder['type']))}, {decoder['layers']} decoder layers")
    grid.add_row(
        "vision tower",
        f"{escape(str(tower['type']))}, {tower['layers']} layers, features of layer {tower['feature_layer']}, "
        + (f"{rows}x{cols} tokens a view, " if data["anyres"] or data["max_visual_tokens"] else "pictures of any size, ")
        + f"{cls} class token",
    )
    grid.add_row("visual tokens", Text(_tokens_of(data)))
    video = "yes" if data["video"] else "no"
    if data["frames"]:
        video = f"its frames are {data['frames']}, each a picture of its own (methods that compare frames spread tokens evenly)"
    grid.add_row("video", video)
    grid.add_row("signals", ", ".join(data["signals"]))
    served = [s for s, reason in data["stages"].items() if not reason]
    grid.add_row("stages", ", ".join(served))
    for stage, reason in data["stages"].items():
        if reason:
            grid.add_row("", Text(f"not {stage}: {reason}", "yellow"))
    _add_reducers(grid, data)
    console.print(grid)


def _tokens_of(data: dict[str, Any]) -> str:
    """Say how many visual tokens a picture becomes, of which pieces."""
    unit, each = data["unit"], data["tokens_per_unit"]
    size = " for an image of {}x{}".format(*data["image_size"]) if data["image_size"] else ""
    if data["visual_tokens"] is None:
        return f"unknown{size}: {data['unknown_since']}" + ("" if unit == "image" else f"; {each} per {unit}")
    if unit != "image":
        pieces = f"{data['units']} {unit}{'s' * (data['units'] != 1)} of {each}"
        return f"{data['visual_tokens']}{size}: {pieces} (keep counts per {unit})"
    return f"{data['visual_tokens']}{size}" + (
        f" ({data['views']} views; at most {data['max_visual_tokens']})" if data["anyres"] else ""
    )


def _print_retriever(data: dict[str, Any], console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("model", escape(f"{data['model']} ({data['architecture']}, family {data['family']})"))
    grid.add_row("stages", "the vectors of a document (`vtc.patch`, or `vtc.retrieval.pool_vectors` on stored ones)")
    _add_reducers(grid, data)
    console.print(grid)


def _add_reducers(grid: Table, data: dict[str, Any]) -> None:
    """Add which reducers run, and why the others do not."""
    runs = [n for n, reason in data["reducers"].items() if not reason]
    grid.add_row("reducers", f"{len(runs)} of {len(data['reducers'])}: {', '.join(runs)}")
    for name, reason in data["reducers"].items():
        if reason:
            grid.add_row("", Text(f"not {name}: {reason}", "yellow"))


# ---------------------------------------------------------------------------------------------------------------- run
@app.command()
def run(
    image: Annotated[str | None, typer.Argument(help="Image file.", metavar="IMAGE")] = None,
    question: Annotated[str | None, typer.Argument(help="Question about it.", metavar="QUESTION")] = None,
    image_option: Annotated[str | None, typer.Option("--image", hidden=True)] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", hidden=True)] = None,
    reducer: Annotated[
        list[str] | None,
        typer.Option(help=f"A reducer or reducer.preset, {REDUCER} by default; several compose (different stages)."),
    ] = None,
    keep: Annotated[str, typer.Option(help=f"Tokens per image or share of them: 64, 0.25 or 25%; by default {SHARE}.")] = "",
    avg_tokens: Annotated[str, typer.Option(help="Instead of --keep: average tokens over the decoder layers.")] = "",
    model: Annotated[str, typer.Option(help="A folder, 'pocket', or a hub id in the local cache.")] = "pocket",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Option of the reducer, name=value.")] = None,
    show: Annotated[str, typer.Option(help="Write a picture of the kept tokens to this file.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=32768, help="Longest answer.")] = 32,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Timed runs of each kind.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask one question with and without a reducer: answers, time, tokens, and a picture of what was kept."""
    from vtc.doors import open_image
    from vtc.inspect import label, load_model, save_picture, writable_picture

    file, asked = _image_and_question([image, question], image_option, prompt)
    wanted = _reducer(reducer or [REDUCER], keep, avg_tokens, option)
    picture = open_image(file)
    target = writable_picture(show) if show else None
    _quiet()
    loaded, processor = load_model(model, device, dtype, trust_remote_code=trust)
    from vtc.trial import trial

    with _option_names():
        outcome = trial(loaded, processor, picture, asked, wanted, max_new_tokens=max_new_tokens, runs=runs)
    data = {"model": model, "reducer": label(wanted), **outcome.to_dict()}
    if note := _foreign(model, picture.size):
        data["note"] = note
    if target is not None:
        save_picture(outcome.picture(caption=_caption(data)), target)
        data["picture"] = str(target)
    if as_json:
        _json(data)
        return
    _print_run(data)


def _image_and_question(positional: Sequence[str | None], image: str | None, prompt: str | None) -> tuple[str, str]:
    """Return what is given by place or by name; what is missing or too much is wrong usage."""
    rest = [value for value in positional if value is not None]
    given = [image if image is not None else rest.pop(0) if rest else None]
    given.append(prompt if prompt is not None else rest.pop(0) if rest else None)
    if rest or None in given:
        raise typer.BadParameter('give an image and a question, as in vtc run photo.jpg "what is this?"')
    return given[0], given[1]  # type: ignore[return-value]


def _foreign(model: str, size: tuple[int, int]) -> str:
    """Return a remark where an embedded model is shown a picture that is none of those it knows, by its size; else ``""``."""
    from vtc.pocket import POCKET_MODELS
    from vtc.pocket.objects import IMAGE_SIZE

    sides = (IMAGE_SIZE, 2 * IMAGE_SIZE)  # the larger ones are those of the model that sees several crops
    known = {(64, 64), *((width, height) for width in sides for height in sides)}  # easy-VQA's, and the generator's
    if model not in POCKET_MODELS or size in known:
        return ""
    return f"'{model}' knows generated scenes only; for photos give --model"


def _caption(data: dict[str, Any]) -> str:
    tokens = data["tokens"]
    count = f"{tokens['kept']} of {tokens['slots']} visual tokens"
    return f"{data['reducer']}: {count}, {tokens['avg_tokens']:.1f} per layer on average"


def _print_run(data: dict[str, Any]) -> None:
    console = _console()
    before, after, tokens = data["before"], data["after"], data["tokens"]
    table = Table("", "unreduced", "reduced", "", box=None, pad_edge=False)
    table.add_row(
        "answer", Text(before["answer"], "bold"), Text(after["answer"], "bold"), "same" if data["same_answer"] else "differs"
    )
    for key, label in (("ttft_ms", "time to first token"), ("total_ms", "whole answer")):
        b, a = before[key], after[key]
        table.add_row(label, _ms(b), _ms(a), f"{b['median'] / a['median']:.2f}x")
    table.add_row("tokens generated", str(before["new_tokens"]), str(after["new_tokens"]), "")
    kept = f"{tokens['kept']} ({tokens['kept'] / tokens['slots']:.1%})"
    table.add_row("visual tokens, last layer", str(tokens["slots"]), kept, "")
    average = f"{tokens['avg_tokens']:.1f} ({tokens['avg_tokens'] / tokens['slots']:.1%})"
    table.add_row("visual tokens, layer average", str(tokens["slots"]), average, "")
    table.add_row("signals and selection", "", f"{after['reducer_ms']:.2f} ms", "inside the times above")
    console.print(Text(f"{data['reducer']} on {data['model']}", "bold"))
    console.print(table)
    for stage in tokens["stages"]:
        layer = f" {stage['layer']}" if stage["stage"] == "decoder" else ""
        note = f" ({stage['note']})" if stage["note"] else ""
        line = f"{stage['reducer']} at {stage['stage']}{layer}: {stage['before']} -> {stage['after']} tokens{note}"
        console.print(Text(line, "dim"))
    console.print(Text(data["conditions"]["text"], "dim"))
    if "note" in data:
        _say(f"note: {data['note']}", "yellow")
    if "picture" in data:
        console.print(Text(f"picture: {data['picture']}"))


def _ms(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ms ({spread['min']:.1f}..{spread['max']:.1f})"


# ------------------------------------------------------------------------------------------------------------- doctor
@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the installation: versions, devices, models and reducers found, extras; exit code 1 if something is broken."""
    from vtc.doctor import diagnose

    _quiet()
    findings = diagnose()
    broken = [f for f in findings if f.state == "problem"]
    if as_json:
        _json({"ok": not broken, "findings": [vars(f) for f in findings]})
        raise typer.Exit(1 if broken else 0)
    console = _console()
    marks = {"ok": ("ok", "green"), "note": ("--", "yellow"), "problem": ("!!", "bold red")}
    table = Table.grid(padding=(0, 2))
    for f in findings:
        table.add_row(Text(*marks[f.state]), f.what, Text(f.text))
    console.print(table)
    if broken:
        console.print(Text(f"\n{len(broken)} problem{'s' * (len(broken) > 1)} found", "bold red"))
        raise typer.Exit(1)
    console.print(Text("\neverything works", "bold green"))


# ------------------------------------------------------------------------------------------------------------ parsing
def _reducer(names: Sequence[str], keep: str, avg_tokens: str, options: Sequence[str] | None) -> Any:
    """Make the reducer the options describe; :data:`SHARE` counts only where no preset brings a budget."""
    from vtc.registry import info as entry_of
    from vtc.registry import resolve

    given: dict[str, Any] = {}
    for text in options or ():
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UnknownArgumentError(f"--option {short(text)!r} is not name=value: write for example --option layer=3")
        given[key.strip()] = _value(value.strip())
    if avg_tokens:
        given["avg_tokens"] = _amount("avg-tokens", avg_tokens)
    if keep:
        given["keep"] = _amount("keep", keep)
    elif not {"keep", "avg_tokens"} & set(given):
        presets = [entry_of(base).presets.get(preset, {}) for base, _, preset in (name.partition(".") for name in names)]
        if not any({"keep", "avg_tokens"} & set(brought) for brought in presets):
            given["keep"] = amount(SHARE)
    with _option_names():
        return resolve(names[0] if len(names) == 1 else list(names), **given)


@contextlib.contextmanager
def _option_names() -> Iterator[None]:
    """Let a refused budget be called by the name of its option."""
    try:
        yield
    except BudgetError as error:
        said = re.sub(r"\b(keep|avg_tokens)=", lambda m: f"--{m[1].replace('_', '-')} ", str(error))
        raise BudgetError(said) from error


def _value(text: str) -> Any:
    """Read an option's value: JSON where it is JSON (numbers, true, false, null, lists), else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def _amount(name: str, text: str) -> int | float:
    """Read a budget: a number of tokens or a share."""
    value = amount(text)
    if isinstance(value, str):
        raise BudgetError(f"--{name} {short(text)!r} is not a number: write tokens, as in 64, or a share, as in 0.25 or 25%")
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(n.isdecimal() and len(n) < 10 and 0 < int(n) <= LONGEST_SIDE for n in (width, height)):
        raise UnknownArgumentError(
            f"--image-size {short(text)!r} is not WxH with sides of 1 to {LONGEST_SIDE} pixels: "
            "write for example --image-size 672x448"
        )
    return int(width), int(height)


# ------------------------------------------------------------------------------------------------------------ output
def _json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=str))


def _console() -> Console:
    """Return a console as wide as the terminal, or wide enough for our tables where there is none (pipes, logs)."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=160, highlight=False)


def _quiet() -> None:
    """Keep transformers' progress bars and advice out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _say(message: str, style: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(message, style))


# --------------------------------------------------------------------------------------------------------------- entry
def load_plugins(target: typer.Typer) -> None:
    """Let every entry point of the group :data:`COMMANDS` add its commands; one that fails costs a line of warning."""
    for point in importlib.metadata.entry_points(group=COMMANDS):
        lists = (target.registered_commands, target.registered_groups)
        before = [len(some) for some in lists]
        try:
            point.load()(target)
        except (Exception, SystemExit) as error:  # a broken plugin must not take the other commands with it
            for some, count in zip(lists, before, strict=True):
                del some[count:]
            _say(f"warning: {plugin_failed('the commands', point, error)}", "yellow")


class _Patient:
    """A standard stream whose reader may have had enough: what is written after that goes nowhere, the command goes on.

    The exit code of ``vtc check MODEL --verify | head -1`` thus is the verdict, and no traceback follows the first line.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _unless_closed(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._stream, name)(*args)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is left in the stream's buffer, too
            os.close(nowhere)
            return len(args[0]) if args else None

    def write(self, text: str) -> int:
        """Write text."""
        return self._unless_closed("write", text)

    def flush(self) -> None:
        """Flush the stream."""
        self._unless_closed("flush")


def _open_streams() -> None:
    """Make standard input and output usable: nothing of ours takes the number of a closed one, no character ends a command."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _refuse_undecodable(arguments: Sequence[str]) -> None:
    for text in arguments:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UnknownArgumentError(f"the argument '{short(text)}' is not UTF-8 text: rename the file, or write it anew")


def _reason(error: Exception) -> str:
    """One sentence for an error that is not ours."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        where = "memory" if isinstance(error, MemoryError) else "the memory of the device"
        return f"{where} ran out: take a smaller model, picture or batch"
    if isinstance(error, OSError) and error.strerror:
        name = f"'{short(error.filename)}'" if error.filename is not None else "a file"
        return f"{name} cannot be used ({error.strerror}): check the name, the permissions and the space there"
    said = f"{type(error).__name__}: {short(error, 500)}"
    return f"{said} (unexpected: add --debug for the traceback, and report it)"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process if not given.
    """
    _open_streams()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Patient(stream)) for stream in streams)
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
    finally:
        sys.stdout, sys.stderr = streams
    sys.exit(code)


def _main(arguments: list[str]) -> int | str | None:
    """Run the command line and return the exit code."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not getattr(app, "_vtc_plugins", False):
        app._vtc_plugins = True  # type: ignore[attr-defined]
        load_plugins(app)
    code: int | str | None = 0
    try:
        _refuse_undecodable(arguments)
        try:
            code = typer.main.get_command(app).main(args=arguments, prog_name="vtc", standalone_mode=False)
            code = code if isinstance(code, int) else 0
        except SystemExit as stop:
            code = stop.code
        try:
            sys.stdout.flush()  # a full disk is an error here, not a note of the interpreter at its end
        except OSError as error:
            raise InputFileError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from None
    except VtcError as error:
        if debug:
            raise
        _say(f"error: {short(error, 1200)}", "red")
        code = 1
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:  # the end of an input that was asked for
        code = 1
    except Exception as error:
        if hasattr(
            error, "format_message"
        ):  # wrong usage; the class is click's in some releases of typer, and its own in others
            command = getattr(getattr(error, "ctx", None), "command_path", "vtc")
            said = short(error.format_message().removeprefix("Invalid value: "), 1200).rstrip(".")
            _say(f"error: {said} (see {command} --help)", "red")
            return int(error.exit_code)  # type: ignore[attr-defined]
        if debug:
            raise
        _say(f"error: {_reason(error)}", "red")
        code = 1
    return code
