"""Every door under inputs that nobody wrote: a result or one sentence, bounded in time and memory, nothing outside the folder.

A few inputs for each door in the suite; more of them with ``VTC_FUZZ=2000 pytest tests/test_doors_fuzz.py``. Inputs that were found
to be special are kept as examples.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import door_cases as cases
import pytest
from fakes import fake_executor
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from stores import fixed_store

from vtc import cli
from vtc.eval.run import Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep
from vtc.pocket import pocket_path

MORE = int(os.environ.get("VTC_FUZZ", "0"))
"""Inputs for every door, where more are wanted than the suite has time for."""


def examples(count: int) -> settings:
    return settings(
        max_examples=MORE or count,
        deadline=None,
        derandomize=not MORE,
        database=None,
        phases=[p for p in Phase if MORE or p is not Phase.shrink],  # (which takes minutes)
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(autouse=True)
def nothing_else(root, monkeypatch):
    """Work in a folder of its own; fail if anything is written beside it."""
    inside = root / "inside"
    inside.mkdir(exist_ok=True)
    monkeypatch.chdir(inside)
    before = cases.everything_in(root)
    yield
    after = {k: v for k, v in cases.everything_in(root).items() if not k.startswith(str(inside))}
    assert after == {k: v for k, v in before.items() if not k.startswith(str(inside))}, "something was written elsewhere"


NINE = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
START = "data: {scenes: {n: 6}}\nbudgets: [49]\nreducers: [fastv]\n"


@examples(150)
@given(cases.sweep_texts(), cases.OVERRIDES)
@example(NINE, [])
@example("a: &a [*a]", [])
@example(START + "model: {name: pocket, processor: {trust_remote_code: true}}", [])
@example(START + "model: {name: pocket, attention: org/kernel}", [])
@example(START.replace("6", "1000000000"), [])
@example(START + f"seed: {2**64}", [])
@example(START + "seed: 2020-99-99", [])
@example(START + "model: {name: pocket, device: meta}", [])
@example(START, ["seed=" + "[" * 3000])
@example(START.replace("[fastv]", "[{name: fastv, options: {layer: two}}]"), [])
def test_sweep_files(text, overrides):
    cases.sweep_door(text, overrides, Path.cwd())


@pytest.fixture(scope="module")
def pics(root):
    folder = root / "inside"
    folder.mkdir(exist_ok=True)
    return cases.question_folder(folder / "own").parent


def test_tables_of_questions(pics):
    @examples(150)
    @given(cases.tables())
    @example(
        ("image,question,answer\n0.png,Is the square red, or blue?,red\n", [("0.png", "Is the square red, or blue?", "red")])
    )
    @example(("image,question,answer\n../secret.png,a,b\n", None))
    @example(("image,question,answer\nSECRET,a,b\n", None))
    @example(("image,question,answer\nlink.png,a,b\n", None))
    @example(("image,question,answer\npipe.png,a,b\n", None))
    def run(made):
        text, rows = made
        cases.table_door(text, rows, pics)

    run()


def test_pictures(root):
    path = root / "inside" / "a.png"

    @examples(300)
    @given(cases.pictures())
    @example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    @example(b"P6 65000 65000 255\n")
    @example(b"P6 9000 9000 255\n" + bytes(20))
    @example(b"")
    def run(data):
        cases.picture_door(data, path)

    with cases.no_programs():
        run()


@pytest.fixture(scope="module")
def places(root):
    """Files that command lines name."""
    folder = root / "inside"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (12, 12), (9, 99, 199)).save(folder / "p.png")
    (folder / "s.yaml").write_text(START + "speed: false\nthreads: 1\n")
    os.mkfifo(folder / "pipe")
    fixed_store(folder / "fixed")
    store = Store(folder / "store", create=True)
    sweep = Sweep(parse_sweep(START + "speed: false\nthreads: 1\n"), "s.yaml")
    assert sweep.run(store, Console(quiet=True), executor=fake_executor()).failed == 0
    names = {"PICTURE": "p.png", "SWEEP": "s.yaml", "PIPE": "pipe", "STORE": "store", "FOLDER": ".", "NEW": "new"}
    return {name: str(folder / at) for name, at in names.items()}


def test_command_lines(places, monkeypatch):
    for name in cases.WORK:
        monkeypatch.setattr(name, cases._reached)
    cli.load_plugins(cli.app) if not getattr(cli.app, "_vtc_plugins", False) else None
    cli.app._vtc_plugins = True
    commands = [c for c in cases.commands_of(cli.app) if c[0] not in ("doctor", "tasks", "bench bars")]
    assert {"check", "run", "sweep", "table", "plot", "report", "tune", "list", "info", "bench plot"} <= {
        c[0] for c in commands
    }
    folder = Path(places["FOLDER"]) / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)  # whoever writes `--out ..` means it: the folder above is ours, too

    @examples(60)
    @given(cases.command_lines(commands))
    @example(["check", "pocket", "--image-size", "²x²"])
    @example(["run", "--image", "PICTURE", "--prompt", "x", "--reducer", "fastv", "--keep", "9", "-o", "layer=x"])
    @example(["run", "--image", "PIPE", "--prompt", "x", "--reducer", "fastv", "--keep", "9"])
    @example(["sweep", "PIPE"])
    @example(["sweep", "SWEEP", "--out", "a" * 300])
    @example(["sweep", "SWEEP", "--shard", "1/" + "9" * 5000])
    @example(["check", "~nobody-at-all/x"])
    @example(["table", "a" * 300])
    def run(line):
        cases.command_door(line, places)
        for left in ("new", "results"):
            shutil.rmtree(folder / left, ignore_errors=True)

    run()


def test_configs_of_models(root):
    folder = root / "inside" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    good = json.loads((pocket_path() / "config.json").read_text())

    @examples(20)
    @given(cases.configs(good))
    def run(data):
        (folder / "config.json").write_text(json.dumps(data))
        cases.config_door(folder)

    run()


@pytest.fixture(scope="module")
def stored(root):
    return cases.StoreDoor(root / "inside" / "stores")


def test_files_of_stores(stored):
    @examples(100)
    @given(cases.store_changes(), st.booleans())
    @example([("metrics.json", (9, float("nan"), "put"))], True)
    @example([("samples.jsonl", (0, {}, "put"))], True)
    @example([("samples.jsonl", (0, None, "remove"))], True)
    @example([("sweep.json", (3, "../../../etc/passwd", "put"))], False)
    @example([("status.json", "zero")], False)
    @example([("samples.jsonl", "zero")], False)
    @example([("sweep.json", "link")], False)
    @example([("metrics.json", "pipe")], False)
    def run(changes, fitting):
        stored(changes, fitting)

    run()


@pytest.mark.parametrize("door", ["sweep", "table", "picture", "store"])
def test_the_corpus(root, pics, door):
    """What the coverage-guided fuzzer found worth keeping (``python tests/fuzz_doors.py``)."""
    import fuzz_doors

    files = sorted((Path(__file__).parent / "fuzz_corpus" / door).iterdir())
    assert files
    run = fuzz_doors.doors(root / "inside" / "corpus", pics)[door]
    run(b"")  # makes what the door needs
    with cases.no_programs():
        for path in files:
            run(path.read_bytes())


def test_the_property_can_fail(root):
    for broken in (
        lambda: cases.answer(int, "x"),
        lambda: cases.check_sentence("two\nlines"),
        lambda: cases.check_sentence("\x1b[2J"),
        lambda: cases.table_door("image,question,answer\n0.png,a,b\n", [("0.png", "a", "c")], root / "inside" / "own"),
    ):
        with pytest.raises((AssertionError, ValueError)):
            broken()
    with cases.no_programs(), pytest.raises(cases.BrokenPropertyError):
        os.system("true")
    assert functools.reduce(lambda a, b: a | b, [st.none()]) is not None
