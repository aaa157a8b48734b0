"""What the fuzzing tests throw at the doors, and what they hold of the answers; also run under atheris (see ``fuzz_doors.py``).

Every door is a function of bytes, text or arguments. It must end in a result or in one sentence of ours, within bounds of time and
memory, and must open and write nothing outside the folders it was given.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from fakes import fake_executor
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from stores import bless

from vtc import cli, doors, inspect
from vtc.errors import VtcError
from vtc.eval import config, questions, sweepfile
from vtc.eval.browser import browse
from vtc.eval.config import TaskConfig
from vtc.eval.report import render_report
from vtc.eval.results import collect
from vtc.eval.run import Sweep
from vtc.eval.store import CellResult, Store
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.tables import render

SECONDS = 60
"""Longest that one input may take of a processor, and four times as long by the clock: machines are shared and differ."""

BYTES = 1500 * 2**20
"""Most memory that one input may add to the process."""

SENTENCE = 1500
"""Longest sentence."""


class BrokenPropertyError(AssertionError):
    """A door did what it must not do."""


# --------------------------------------------------------------------------------------------------------- the property
@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if the body takes too long, waits for ever, or takes too much memory."""

    def late(*_: Any) -> None:
        raise BrokenPropertyError("it takes too long, or waits")

    alone = threading.current_thread() is threading.main_thread()
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late) if alone else None
    if alone:
        signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    try:
        yield
    finally:
        if alone:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
    assert time.process_time() - start < SECONDS, f"it took {time.process_time() - start:.0f} s"
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert more < BYTES, f"it took {more / 2**20:.0f} MiB"


def answer(door: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a door gives, or None where it refuses with one sentence; anything else is raised."""
    with bounded():
        try:
            return door(*arguments)
        except VtcError as error:
            check_sentence(str(error))
            return None


def check_sentence(text: str) -> None:
    """One line, not empty, no novel, nothing that a terminal would obey."""
    assert text.strip() and "\n" not in text, repr(text)
    assert len(text) < SENTENCE, len(text)
    assert not doors.unprintable(text), repr(text)
    assert "Traceback" not in text and "(unexpected:" not in text, text


def everything_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what lies in a folder, with sizes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path)] = (about.st_size, about.st_mtime_ns)
    return found


# ------------------------------------------------------------------------------------------------------------ sweep files
GOOD: tuple[dict[str, Any], ...] = (
    {"data": {"scenes": {"n": 6}}, "budgets": [49], "reducers": ["fastv"], "speed": False},
    {
        "models": [
            "pocket",
            {"name": "pocket-next", "dtype": "float32", "processor": {"max_pixels": 4000}, "attention": "sdpa"},
        ],
        "tasks": [
            {"name": "scenes", "n": 7, "types": ["color"], "seed": 1},
            {"name": "m", "data": {"details": {"n": 3}}, "max_new_tokens": 3},
        ],
        "budgets": ["25%", {"avg_tokens": 60}, {"flops": 0.5, "label": "half"}],
        "reducers": [
            {"name": "fastv", "options": {"layer": 2}, "label": "x"},
            ["divprune", "fastv"],
            {"name": "random", "budgets": [7]},
        ],
        "seeds": [0, 1],
        "bootstrap": {"resamples": 200, "confidence": 0.9},
        "speed": {"repeats": 3, "warmup": 1},
        "batch_size": 4,
        "threads": 1,
    },
)
"""Files that are fine; the tests change something in them."""

_KEYS = sorted(
    {
        name
        for kind in (
            config.SweepConfig,
            config.ModelConfig,
            config.TaskConfig,
            config.SceneData,
            config.ReducerConfig,
            config.BudgetConfig,
            config.SpeedConfig,
            config.BootstrapConfig,
        )
        for name in kind.model_fields
    }
    | {"trust_remote_code", "revision", "token", "code_revision", "max_pixels", "layer", "seed", "<<", "_trusted", "x", ""}
)
TEXTS = st.sampled_from(
    [
        *(
            "pocket",
            "org/model",
            "org/kernel",
            "org/kernel:fn",
            "../x",
            "/etc/hostname",
            "~nobody-at-all/x",
            "all",
            "none",
            "fastv",
        ),
        *(
            "fastv.paper",
            "a" * 300,
            "x" * 5000,
            "meta",
            "cuda:99",
            "true",
            "50%",
            "nan%",
            "1e999%",
            "lmms:gqa",
            "[/x]",
            "\\",
            "é\u202e",
        ),
        *(
            "a\tb",
            "a\nb",
            "\x00",
            "\x1b[2J",
            "{{7*7}}",
            "$(id)",
            "",
            " ",
            "²",
            "1/2",
            "2020-01-01",
            "%",
            "'\"",
            ".",
            "..",
            "a.b.c",
        ),
    ]
) | st.text(max_size=12)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 49, 10**9, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**30)]) | st.sampled_from(
    [0.0, 0.5, 1.0, 1.5, -0.1, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_KEYS) | NUMBERS.filter(lambda n: n == n), inner, max_size=3)
    ),
    max_leaves=6,
)


def _places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _places(value, (*at, key))


def _copied(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _copied(v) for k, v in data.items()}
    return [_copied(v) for v in data] if isinstance(data, list) else data


@st.composite
def sweep_texts(draw: st.DrawFn) -> str:
    """A good sweep file with a few things changed; or fragments of YAML that are easy to get wrong."""
    if draw(st.integers(0, 4)) == 0:
        return draw(yaml_fragments())
    data = _copied(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(_places(data))))
        holder = data
        for step in at[:-1]:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "add", "remove"]))
        target = holder[at[-1]] if at else data
        if what == "add" and isinstance(target, dict):
            target[draw(st.sampled_from(_KEYS))] = draw(VALUES)
        elif what == "add" and isinstance(target, list):
            target.append(draw(VALUES))
        elif not at:
            continue
        elif what == "remove":
            del holder[at[-1]]
        else:
            holder[at[-1]] = draw(VALUES)
    with contextlib.suppress(ValueError):  # a number with more digits than the interpreter prints
        text = yaml.safe_dump(data, allow_unicode=draw(st.booleans()), sort_keys=False)
        if draw(st.integers(0, 9)) == 0:  # a typing error
            position = draw(st.integers(0, len(text)))
            text = text[:position] + draw(st.sampled_from(list("{}[]:,&*!|>'\"%@`-?#\t\n\\"))) + text[position:]
        return text
    return "seed: " + "9" * 5000


@st.composite
def yaml_fragments(draw: st.DrawFn) -> str:
    """Aliases that multiply, contain themselves or merge, deep nesting, odd tags."""
    kind = draw(st.sampled_from(["aliases", "merges", "self", "deep", "tags", "raw"]))
    wide, levels = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    if kind == "aliases":
        lines = [f"l0: &l0 [{', '.join(['x'] * wide)}]"]
        return "\n".join(lines + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * wide)}]" for i in range(1, levels)])
    if kind == "merges":
        return "a0: &a0 {x: 1}\n" + "".join(
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * wide)}]}}\n" for i in range(1, levels)
        )
    if kind == "self":
        return draw(
            st.sampled_from(["a: &a [*a]", "&a {b: *a}", "a: &a {<<: *a}", "a: &a [[[*a]]]", "? &a [*a]\n: b", "&a {*a : b}"])
        )
    if kind == "deep":
        text = draw(st.sampled_from(["[", "{a: ", "- ", "? ", "!!seq ["])) * draw(st.sampled_from([5, 40, 400, 4000]))
        return draw(st.sampled_from(["", "a: "])) + text
    if kind == "tags":
        tag = draw(
            st.sampled_from(
                ["int", "float", "bool", "timestamp", "binary", "set", "omap", "pairs", "null", "str", "python/name:os.system"]
            )
        )
        return f"seed: !!{tag} {draw(st.sampled_from(['x', '', '2020-99-99', '[a]', '{a: b}', '1:99:99', '0x', '____', '=']))}"
    return draw(st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@`?#,. \t\n01~<="), max_size=60))


OVERRIDES = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from(
            [
                "seed",
                "data.scenes.n",
                "reducers.0",
                "reducers.0.name",
                "a.b.c",
                "models.1.processor.x",
                "",
                ".",
                "budgets.99999999999",
            ]
        ),
        st.sampled_from(
            ["1", "[", "&a [*a]", "!!int x", "1000000000", "{a: 1}", "'\\x1b'", '"\\ud800"', "9" * 5000, "[" * 3000]
        ),
    ),
    max_size=2,
)


def sweep_door(text: str, overrides: list[str], folder: Path) -> None:
    """Hold that a sweep file is read or refused, and what one that is read can ask for."""
    found = answer(sweepfile.parse_sweep, text, overrides, "s.yaml", folder)
    if found is None:
        return
    assert sum(made(task) for task in found.all_tasks) <= 200_000, "no end of questions"
    for model in found.all_models:
        given = {k for k, v in dict(model.processor).items() if v is not None}
        assert not given & {"trust_remote_code", "revision", "token", "code_revision"}, (
            "code, or where from, asked for by a file"
        )
        assert "/" not in (model.attention or ""), "a kernel of the hub asked for by a file"
        assert model.device != "meta"
    for seed in found.all_seeds:
        assert 0 <= seed < 2**63, "a seed that no generator takes"
    for task in found.all_tasks:
        assert not doors.unprintable(task.title)


def made(task: TaskConfig) -> int:
    """Questions that have to be made for a task."""
    if task.kind != "questions":
        return 0
    return sum(part.n for part in (task.sources.scenes, task.sources.details) if part is not None)


# ---------------------------------------------------------------------------------------------------------- CSV of questions
@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[tuple[str, str, str]] | None]:
    """The text of a CSV file, and the rows it was written from, where they are rows at all."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.text(st.sampled_from('image,question,answer"\n\r\t \x00\x1b;|0.png\ufeff'), max_size=80)), None
    words = st.text(st.sampled_from('ab ,"\n|.?\x1bé'), min_size=1, max_size=10) | st.sampled_from(
        ["is it red, or blue?", "red", "x" * 30_000]
    )
    names = st.sampled_from(
        ["0.png", "1.png", "deep/2.png", "../secret.png", "SECRET", "link.png", "up/secret.png", "pipe.png", "none.png"]
    )
    rows = draw(st.lists(st.tuples(names, words, words), min_size=1, max_size=4))
    text = io.StringIO()
    if draw(st.booleans()):
        writer = csv.writer(text, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
        writer.writerow(["image", "question", "answer"])
        writer.writerows(rows)
    else:  # by hand, without a thought for commas
        text.write("image,question,answer\n" + "".join(",".join(row) + "\n" for row in rows))
    return text.getvalue(), rows


def question_folder(root: Path) -> Path:
    """Make a folder of pictures, with ways out of it; return it."""
    pics = root / "pics"
    (pics / "deep").mkdir(parents=True)
    for name in ("0.png", "1.png", "deep/2.png"):
        Image.new("RGB", (8, 8), (10, 20, 30)).save(pics / name)
    Image.new("RGB", (8, 8), (250, 0, 250)).save(root / "secret.png")
    os.symlink(root / "secret.png", pics / "link.png")
    os.symlink(root, pics / "up")
    os.mkfifo(pics / "pipe.png")
    return pics


def table_door(text: str, rows: list[tuple[str, str, str]] | None, root: Path) -> None:
    """Hold that questions are those that were written, each with its own answer, and that no picture comes from elsewhere."""
    text = text.replace("SECRET", str(root / "secret.png"))
    (root / "qa.csv").write_bytes(text.encode("utf-8", "surrogatepass"))
    task = TaskConfig(name="m", folder=str(root / "pics"), questions=str(root / "qa.csv"))
    found = answer(questions.task_questions, task)
    if found is None:
        return
    for question in found:
        assert question.image.getpixel((0, 0)) != (250, 0, 250), "a picture from outside the folder"
        assert not doors.unprintable(question.prompt + question.answer)
    if rows is not None:
        wanted = [tuple(part.replace("\r\n", "\n").strip() for part in row[1:]) for row in rows]
        assert [(q.prompt, q.answer) for q in found] == wanted, "question and answer were shifted"


# --------------------------------------------------------------------------------------------------------------- pictures
_OTHERS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    b"8BPS\0\1" + bytes(30),
    b"icns\0\0\0\x10",
    b"SIMPLE  =                    T",
    b"\x0a\x05\x01\x08" + bytes(124),
    b"GIMP" + bytes(20),
    b"\xd7\xcd\xc6\x9a" + bytes(40),
)


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A small picture in one of the formats with bytes changed, cut off or added; or one of a format that is not read."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(_OTHERS)) + draw(st.binary(max_size=40))
    mode = draw(st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"]))
    kind = draw(st.sampled_from(doors.PICTURE_FORMATS))
    rng = random.Random(draw(st.integers(0, 50)))
    image = Image.frombytes("L", (9, 7), rng.randbytes(63)).convert(mode if mode != "I;16" else "L")
    out = io.BytesIO()
    with contextlib.suppress(OSError, KeyError, ValueError):  # a format that has no such mode
        image.save(out, kind)
    data = bytearray(out.getvalue() or b"\x89PNG\r\n\x1a\n")
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["set", "cut", "repeat", "size"]))
        if how == "set":
            data[at : at + 1] = bytes([draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))])
        elif how == "cut":
            del data[at:]
        elif how == "repeat":
            data[at:at] = data[at : at + 20] * draw(st.integers(1, 50))
        else:
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0"])
            )
    return bytes(data)


def picture_door(data: bytes, path: Path) -> None:
    """Hold that a picture is read as RGB or refused, and that no program is started for it."""
    path.write_bytes(data)
    image = answer(doors.open_image, path)
    if image is not None:
        assert image.mode == "RGB" and image.size[0] * image.size[1] <= Image.MAX_IMAGE_PIXELS


@contextlib.contextmanager
def no_programs() -> Iterator[None]:
    """Fail where something starts a program."""
    armed = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if armed and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"):
            raise BrokenPropertyError(f"a program was started: {arguments!r:.200}")

    sys.addaudithook(watch)
    try:
        yield
    finally:
        armed = False  # a hook of the interpreter cannot be taken off


# ---------------------------------------------------------------------------------------------------------- command line
class ReachedError(VtcError):
    """All doors were passed: what would follow is work, not reading."""


def _reached(*_: Any, **__: Any) -> None:
    raise ReachedError("all doors were passed")


WORK = (
    "vtc.trial.trial",
    "vtc.eval.run.Sweep.run",
    "vtc.eval.tune.Tuner.run",
    "vtc.eval.models.load",
    "vtc.eval.bench.kernels.Results",
    "vtc.eval.bench.reducers.bench",
    "vtc.eval.bench.model.run",
    "vtc.eval.lmms.run.load_task",
)
"""What takes long behind the doors; tests put :func:`_reached` there."""

_ANYTHING = [
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "9",
        "2",
        "1e3",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 5000,
        "²",
        "٣",
        "true",
        "None",
        "[1]",
        "[" * 3000,
    ),
    *(
        "a" * 300,
        "x" * 70_000,
        "../x",
        "/dev/zero",
        "/dev/null",
        ".",
        "..",
        "~nobody-at-all/x",
        "\x1b[2J",
        "[/x]",
        "é",
        "\udcff",
        "a\nb",
    ),
    *(
        "pocket",
        "pocket-next",
        "org/none",
        "fastv",
        "fastv.paper",
        "divprune",
        "random",
        "f*",
        "[",
        "decoder",
        "md",
        "latex",
        "csv",
        "png",
    ),
    *(
        "layer=2",
        "layer=x",
        "layer=[1]",
        "seed=99999999999999999999",
        "=",
        "x=",
        "1/2",
        "2/1",
        "672x448",
        "0x0",
        "10%",
        "%",
        "98,49",
        ",",
        "cpu",
    ),
    *("PICTURE", "SWEEP", "STORE", "STORE/sweep.json", "PIPE", "FOLDER", "NEW"),
]
ARGUMENTS = st.sampled_from(_ANYTHING)


@st.composite
def command_lines(draw: st.DrawFn, commands: list[tuple[str, list[tuple[str, bool]], int]]) -> list[str]:
    """A command with options and arguments of any kind; half of the time with what it needs to go far."""
    name, options, positional = draw(st.sampled_from(commands))
    line = name.split()
    if draw(st.booleans()):
        line += {
            "run": ["--image", "PICTURE", "--prompt", "what?", "--reducer", "fastv", "--keep", "9"],
            "sweep": ["SWEEP"],
            "tune": ["pocket", "--reducers", "uniform", "--target-drop", "10%"],
            "check": ["pocket", "fastv"],
            "info": ["fastv"],
            "bench plot": ["FOLDER"],
        }.get(name, ["STORE"] if name in ("table", "plot", "report") else [])
    else:
        line += [draw(ARGUMENTS) for _ in range(draw(st.integers(0, positional + 1)))]
    for option, takes in draw(st.lists(st.sampled_from(options), max_size=3)):
        line += [option, draw(ARGUMENTS)] if takes else [option]
    return line


def commands_of(app: Any) -> list[tuple[str, list[tuple[str, bool]], int]]:
    """Every command, with its options (and whether they take a value) and its number of arguments."""
    import typer.main

    found = []

    def visit(command: Any, name: str) -> None:
        if hasattr(command, "commands"):
            for key, inner in command.commands.items():
                visit(inner, f"{name} {key}".strip())
            return
        options = [(p.opts[0], not getattr(p, "is_flag", False)) for p in command.params if p.param_type_name == "option"]
        found.append((name, options, sum(p.param_type_name == "argument" for p in command.params)))

    visit(typer.main.get_command(app), "")
    return sorted(found)


def command_door(line: list[str], places: dict[str, str]) -> None:
    """Hold that a command line ends with a known code, and with one sentence where it is refused."""
    given = [places.get(a, a) if not a.startswith("STORE/") else places["STORE"] + a[5:] for a in line]
    out, err = io.StringIO(), io.StringIO()
    code: Any = "no end"
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(given)
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 1, 2, None), code
    said = err.getvalue()
    assert "Traceback" not in said + out.getvalue() and "(unexpected:" not in said, said
    if code == 1:
        last = said.strip().splitlines()[-1:]
        if last and last[0].startswith("error: "):
            check_sentence(last[0])


# ------------------------------------------------------------------------------------------------------ a model's config
@st.composite
def configs(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """A model's config.json with a few things changed."""
    data = _copied(good)
    odd = st.sampled_from([None, True, 0, -1, 1.5, 3, 10**4, 10**9, 2**70, "x", "", [], [1], {}, "org/kernel", float("nan")])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from([p for p in _places(data) if p]))
        holder = data
        for step in at[:-1]:
            holder = holder[step]
        holder[at[-1]] = draw(odd)
    return data


def config_door(folder: Path) -> None:
    """Hold that a model folder is described or refused."""
    answer(inspect.examine, str(folder))


# ------------------------------------------------------------------------------------------------------------ a store's files
SECRET = "the reader's own secret"
STORED = ("store.json", "sweep.json", "config.json", "env.json", "metrics.json", "samples.jsonl", "speed.json", "status.json")
"""Files of a store: the first two, and those of a cell."""

_ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 10**400, 2**63, float("nan"), float("inf"), "", "x" * 3000]
    + ["\x1b[2J", "\ud800", "<script>alert(1)</script>", "../../../etc/passwd", "/dev/zero", "[/x]", "done", "failed", "0" * 64]
    + [[], {}, [[]], [1], {"a": {}}, {"value": 1.0}]
)
_BYTES = (b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 50_000, b'{"a": NaN}', b'{"a": 1e999}', b"9" * 5000, b"\x00")
_LINKS = ("link", "pipe", "zero", "folder", "absent")


@st.composite
def store_changes(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """What is done to a store: a file's name with what happens to its JSON, its bytes, or the file itself."""
    changes = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(STORED))
        kind = draw(st.integers(0, 9))
        if kind < 6:  # where, what, and how
            changes.append((name, (draw(st.integers(0, 10_000)), draw(_ODD), draw(st.sampled_from(["put", "add", "remove"])))))
        elif kind < 8:
            changes.append((name, draw(st.sampled_from(_BYTES) | st.binary(max_size=40))))
        else:
            changes.append((name, draw(st.sampled_from(_LINKS))))
    return changes


def _changed(text: bytes, where: int, what: Any, how: str) -> bytes:
    """JSON (or lines of it) with one place changed."""
    lines = [json.loads(line) for line in text.decode().splitlines()] if text.count(b"\n{") else [json.loads(text)]
    places = [p for p in _places(lines) if p]
    at = places[where % len(places)]
    holder = lines
    for step in at[:-1]:
        holder = holder[step]
    if how == "remove":
        del holder[at[-1]]
    elif how == "add" and isinstance(holder[at[-1]], dict):
        holder[at[-1]]["x"] = what
    elif how == "add" and isinstance(holder[at[-1]], list):
        holder[at[-1]] += [what, *holder[at[-1]][:1]]
    else:
        holder[at[-1]] = what
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class StoreDoor:
    """A finished store that is changed in a copy, read, and gone on with.

    Parameters
    ----------
    folder : Path
        Where the store and its copies lie.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        text = "data: {scenes: {n: 2}}\nbudgets: [49]\nreducers: []\nthreads: 1\nbootstrap: {resamples: 100}\n"
        self.sweep = Sweep(parse_sweep(text + "speed: {repeats: 3, warmup: 1}\n"), "s.yaml")
        self.good = Store(folder / "good", create=True)
        assert self._go_on(self.good) == 0
        self.wanted = self.table(self.good)
        (folder / "secret").write_text(SECRET)

    def _go_on(self, store: Store) -> int:
        with mock.patch("os.fsync", lambda _: None):  # no power is cut here, and a busy disk takes its time
            return self.sweep.run(store, Console(quiet=True), executor=fake_executor(), only=self.sweep.planned[:2]).failed

    @staticmethod
    def table(store: Store) -> str:
        """What a store's table says."""
        return render(collect(store), "csv", by_type=True)

    @staticmethod
    def page(store: Store) -> str:
        """A store's report, without plots."""
        with mock.patch("vtc.eval.report.available", lambda _: ()):  # a second of drawing
            return render_report(collect(store), browser=browse(store, 4, overlays=False))

    def __call__(self, changes: list[tuple[str, Any]], fitting: bool, go_on: bool = True) -> None:
        """Hold what must hold of a changed store, and of a sweep that goes on with it.

        Parameters
        ----------
        changes : list
            See :func:`store_changes`.
        fitting : bool
            Make the checksums fit the changed files, as somebody would who means to deceive.
        go_on : bool
            Whether the sweep goes on.
        """
        root = self.folder / "copy"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.good.root, root)
        cell = root / "cells" / self.sweep.planned[1].id
        for name, change in changes:
            path = root / name if name in STORED[:2] else cell / name
            self._change(path, change)
            if fitting and name not in (*STORED[:2], "status.json"):
                bless(cell)
        store = answer(Store, root)
        if store is None:
            return
        said = f"{answer(self.table, store)}{answer(self.page, store)}"
        assert SECRET not in said and "<script>alert" not in said, "a file outside the store is shown, or text is code"
        for item in self.sweep.planned[:2]:
            if (found := answer(store.get, item.id)) is not None:
                self._hold(found)
        failed = answer(self._go_on, store) if go_on else None
        if failed is None:  # refused as a whole, with a sentence
            return
        assert failed == 0, "a damaged cell was not measured again"
        again = answer(self.table, store)
        assert again is not None, "a sweep ran, and its store cannot be read"
        assert fitting or again == self.wanted, "damage with wrong checksums is in the table"

    @staticmethod
    def _change(path: Path, change: Any) -> None:
        if not path.is_file() or path.is_symlink():
            return  # the change before this one took it away
        if isinstance(change, tuple):
            with contextlib.suppress(ValueError, RecursionError, IndexError):
                path.write_bytes(_changed(path.read_bytes(), *change))
        elif isinstance(change, bytes):
            path.write_bytes(change)
        else:
            path.unlink()
            if change in ("link", "zero"):
                path.symlink_to(
                    "/dev/zero" if change == "zero" else next(p for p in path.parents if p.name == "copy").parent / "secret"
                )
            elif change == "pipe":
                os.mkfifo(path)
            elif change == "folder":
                path.mkdir()

    @staticmethod
    def _hold(found: CellResult) -> None:
        """Numbers that are accepted follow from the answers beside them."""
        if not found.metrics:
            return
        scores = [s["score"] if s.get("score") is not None else s["correct"] for s in found.samples]
        assert found.metrics["n"] == len(scores) and abs(found.metrics["accuracy"] - sum(scores) / len(scores)) < 1e-6
        assert "Infinity" not in json.dumps(found.metrics) and "NaN" not in json.dumps(
            [found.metrics, found.samples, found.speed]
        )
