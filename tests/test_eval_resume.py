"""Killed at any moment, a sweep goes on where it was; two runners on one store share the work; a full disk loses one cell."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import fake_executor
from rich.console import Console

from vtc.cli import main
from vtc.errors import StoreError
from vtc.eval.results import collect
from vtc.eval.run import Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.tables import render

YAML = """\
data: {scenes: {n: 2, types: [color]}}
budgets: [49, 11]
reducers: [fastv]
seeds: [0, 1]
speed: false
"""
QUIET = Console(quiet=True)

# one process imports everything once; its children do the work and are killed
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from rich.console import Console
from fakes import FakeWorker, fake_executor
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.run import Sweep
from vtc.eval.store import Store

sweep = Sweep(parse_sweep(Path(sys.argv[1]).read_text()), "sweep.yaml")
sweep.record()  # what is cached by process is asked for once
root = Path(sys.argv[2])

def dying(after):
    # every place where a file appears, or an answer is being made, is a place to die at
    count = 0
    def wrap(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return call
    Path.replace, os.fsync, FakeWorker.answers = wrap(Path.replace), wrap(os.fsync), wrap(FakeWorker.answers)

def child(store, after=None, meet=None):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dying(after)
            executor = fake_executor(place / "log", meet=meet)
            outcome = sweep.run(Store(store, create=True), Console(quiet=True), executor=executor)
            code = 0 if outcome.failed == 0 else 2
        finally:
            os._exit(code)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def whole(store):
    if not (store / "store.json").exists():
        return set()
    found = Store(store)
    names = [p.name for p in found.cells.iterdir() if not p.name.startswith(".")]
    return {name for name in names if found.get(name) is not None}  # raises for a damaged cell
"""

KILLS = """
place = root / "kills"
place.mkdir()
assert ended(child(place / "whole")) == 0
(place / "log").unlink()
draw, finished = random.Random(7), set()
for kill in range(1, 21):
    assert ended(child(place / "killed", draw.randint(1, 30))) == -signal.SIGKILL
    now = whole(place / "killed")
    assert finished <= now, "a finished cell was lost"
    begun = len((place / "log").read_text().splitlines()) if (place / "log").exists() else 0
    assert begun - len(now) <= kill, "more than the cell in flight was lost"
    finished = now
(root / "finished").write_text(str(len(finished)))
assert ended(child(place / "killed")) == 0
"""

TWO = """
place = root / "two"
place.mkdir()
first, second = child(place / "shared", meet=2), child(place / "shared", meet=2)
assert ended(first) == 0 and ended(second) == 0
"""


@pytest.fixture(scope="module")
def sweep():
    return Sweep(parse_sweep(YAML), "sweep.yaml")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Where one process let its children be killed, and let two of them share a store."""
    place = tmp_path_factory.mktemp("ran")
    (place / "sweep.yaml").write_text(YAML)
    (place / "script.py").write_text(SCRIPT + KILLS + TWO)
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(place / "script.py"), str(place / "sweep.yaml"), str(place)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return place


def tables(root: Path) -> str:
    results = collect(Store(root))
    return "".join(render(results, fmt, accuracy_only=True, by_type=True) for fmt in ("md", "csv", "latex"))


def test_twenty_kills_and_the_table_is_the_same_to_the_byte(sweep, ran):
    finished = int((ran / "finished").read_text())
    assert len(sweep.planned) / 3 < finished < len(sweep.planned)
    ran /= "kills"
    assert tables(ran / "killed") == tables(ran / "whole")
    assert not (ran / "killed" / "quarantine").exists()
    assert not list((ran / "killed" / "cells").glob(".*"))


def test_two_runners_share_a_store_and_do_every_cell_once(sweep, ran):
    ran /= "two"
    lines = [line.split() for line in (ran / "log").read_text().splitlines()]
    assert sorted(cell for cell, _ in lines) == sorted(p.id for p in sweep.planned)
    assert len({pid for _, pid in lines}) == 2  # both worked
    assert sweep.run(Store(ran / "shared"), QUIET, executor=fake_executor()).skipped == len(sweep.planned)


def test_a_runner_waits_for_a_cell_that_another_one_holds(sweep, tmp_path, monkeypatch):
    store = Store(tmp_path / "s", create=True)
    lock = store.claim(sweep.planned[3].id)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            lock.release()

    monkeypatch.setattr("vtc.eval.run.time.sleep", nap)
    outcome = sweep.run(store, QUIET, executor=fake_executor())
    assert outcome.done == len(sweep.planned) and len(naps) >= 2


def test_a_full_disk_ends_the_sweep_and_the_next_one_goes_on(sweep, tmp_path, monkeypatch):
    store, real, count = Store(tmp_path / "s", create=True), os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count > 23:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="the disk is full"):
            sweep.run(store, QUIET, executor=fake_executor())
    kept = [p.id for p in sweep.planned if store.get(p.id) is not None]
    assert 0 < len(kept) < 6
    lock = store.claim(sweep.planned[len(kept)].id)  # nothing is held by the sweep that gave up
    lock.release()
    outcome = sweep.run(store, QUIET, executor=fake_executor())
    assert (outcome.done, outcome.skipped) == (len(sweep.planned) - len(kept), len(kept))


def test_cells_of_other_code_are_kept_apart_and_flagged(tmp_path, monkeypatch, capsys):
    from vtc.eval import env

    store = Store(tmp_path / "s", create=True)
    with monkeypatch.context() as patched:
        patched.setattr(env, "engine_version", lambda: "0" * 16)
        old = Sweep(parse_sweep(YAML), "sweep.yaml")
        old.run(store, QUIET, executor=fake_executor())
    new = Sweep(parse_sweep(YAML), "sweep.yaml")
    assert {p.id for p in old.planned}.isdisjoint(p.id for p in new.planned)
    said = Console(record=True, width=200, quiet=False, file=open(os.devnull, "w"))
    outcome = new.run(store, said, executor=fake_executor())
    assert outcome.done == len(new.planned) and outcome.skipped == 0
    assert f"{outcome.done} of the {outcome.done} cells to run are in the store already, measured with other code" in (
        said.export_text().replace("\n", " ")
    )
    assert all(store.get(p.id) is not None for p in old.planned)  # nothing was overwritten
    assert {c["id"] for c in store.read_sweep()["cells"]} == {p.id for p in new.planned}


def test_a_store_of_another_schema_version_is_refused_by_the_command(tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(YAML)
    Store(tmp_path / "s", create=True)
    (tmp_path / "s" / "store.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(SystemExit):
        main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "s")])
    assert "schema version 99" in " ".join(capsys.readouterr().err.split())
