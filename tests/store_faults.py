"""Runs a small sweep again and again, with one system call failing or the process ending after it; for ``test_eval_faults.py``.

``python store_faults.py FOLDER`` prints one JSON object: how many calls and trials there were, and what went wrong in which.

The sweep has one cell that is finished and one that is not, with answers and timings, so that one trial goes through all that a
runner does to a store: its record, its notes, claims, reading, answers, timings. Failures are a full disk, a broken one, no rights,
an interruption (calls that only look: a broken disk), and the end of the process right after the call. After each the sweep runs
again, undisturbed, and its table must be that of a sweep without failures.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from fakes import fake_executor
from rich.console import Console

from vtc.errors import StoreError
from vtc.eval import env
from vtc.eval.results import collect
from vtc.eval.run import Sweep
from vtc.eval.store import Store, sweep_id
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.tables import render

YAML = """\
data: {scenes: {n: 1, types: [color]}}
budgets: [49]
reducers: []
bootstrap: {resamples: 100}
speed: {repeats: 3, warmup: 1}
"""
CHANGES = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir", "flock")
LOOKS = ("scandir", "listdir", "stat", "lstat")
KILL, LOOK = "kill", "look"
FILES = ("store.py", "files.py", "pathlib.py", "shutil.py", "_unix.py", "_api.py")
"""Code whose calls count: ours, and what it is done with."""

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EINTR)
EVERY = 1
"""How often a line of the code is tried with every error; further passes through it take turns."""


class Faults:
    """Counts calls, and lets one of them fail."""

    def __init__(self) -> None:
        self.armed = False
        for name in (*CHANGES[:-1], *LOOKS):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        fcntl.flock = self.wrap("flock", fcntl.flock)

    def wrap(self, name: str, real):
        def call(*args, **kwargs):
            frame = sys._getframe(1)
            file = Path(frame.f_code.co_filename).name
            # letting go of a lock cannot fail, and the end of a process does it anyway
            if not self.armed or file not in FILES or (name == "flock" and not args[1] & fcntl.LOCK_EX):
                return real(*args, **kwargs)
            looks = name in LOOKS or (name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR))
            looks = looks or (name == "close" and not fcntl.fcntl(args[0], fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR))
            self.count += 1
            self.places.append(f"{LOOK if looks else name} {file}:{frame.f_lineno}")
            if self.count != self.number:
                return real(*args, **kwargs)
            if self.kind == KILL or name == "close":  # a descriptor is gone, whatever closing it says
                with contextlib.suppress(OSError):
                    real(*args, **kwargs)
            if self.kind == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.kind, os.strerror(self.kind))

        return call

    @contextlib.contextmanager
    def at(self, number: int, kind: int | str):
        """Let the ``number``-th call from here on fail."""
        self.number, self.kind, self.count, self.places, self.armed = number, kind, 0, [], True
        try:
            yield
        finally:
            self.armed = False


def table(store: Store) -> str:
    return render(collect(store), "csv", accuracy_only=True, by_type=True) + json.dumps(
        [store.get(p["id"]).speed is not None for p in store.read_sweep()["cells"][:2]]
    )


OTHER = YAML.replace("[49]", "[11, 49]").replace("reducers: []", "reducers: [fastv]")


def overlapping(folder: Path) -> dict:
    """Two runners at once in one store, over sweeps that share cells: each must end with the table it has when alone."""
    quiet = Console(quiet=True)
    sweeps = [Sweep(parse_sweep(text), f"{number}.yaml") for number, text in enumerate((YAML, OTHER))]
    alone, together = [], []
    for number, sweep in enumerate(sweeps):
        store = Store(folder / f"alone-{number}", create=True)
        alone.append(table(store.at(sweep.run(store, quiet, executor=fake_executor()).sweep)))
    children = []
    for sweep in sweeps:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store = Store(folder / "both", create=True)
                code = sweep.run(store, quiet, executor=fake_executor(folder / "log", meet=2)).failed
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    store = Store(folder / "both")
    together = [table(store.at(sweep_id(sweep.record()))) for sweep in sweeps]
    done = Counter(line.split()[0] for line in (folder / "log").read_text().splitlines())
    return {
        "codes": codes,
        "same": [a == b for a, b in zip(alone, together, strict=True)],
        "cells": [len(sweep.planned) for sweep in sweeps],
        "shared": len({p.id for p in sweeps[0].planned} & {p.id for p in sweeps[1].planned}),
        "done": len(done),
        "twice": sum(count > 1 for count in done.values()),
    }


def main(folder: Path) -> dict:
    os.fsync = lambda _: None  # no power is cut here, and a busy disk takes its time
    env.versions, env.machine = functools.cache(env.versions), functools.cache(env.machine)
    faults, quiet = Faults(), Console(quiet=True)
    sweep = Sweep(parse_sweep(YAML), "faults.yaml")
    items = sweep.planned[:2]

    def run(root: Path, number: int = 0, kind: int | str = 0) -> int:
        """0: done; 1: refused with one sentence; anything else is wrong."""
        with faults.at(number, kind):
            try:
                outcome = sweep.run(Store(root, create=True), quiet, executor=fake_executor(), only=items)
            except StoreError as error:
                return 1 if "\n" not in str(error) else 4
        return 5 if outcome.failed else 0

    def killed(root: Path, number: int) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                run(root, number, KILL)
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    template = folder / "template"
    sweep.run(Store(template, create=True), quiet, executor=fake_executor(), only=items[:1])
    shutil.copytree(template, folder / "whole")
    assert run(folder / "whole") == 0
    places, wanted = faults.places, table(Store(folder / "whole"))
    passes: Counter[str] = Counter()
    found: Counter[str] = Counter()
    problems = []
    for number, place in enumerate(places, 1):
        passes[place] += 1
        looks = place.partition(" ")[0] == LOOK
        if looks:
            kinds = ERRORS[1:2]
        else:
            kinds = ERRORS if passes[place] <= EVERY else (ERRORS[passes[place] % len(ERRORS)],)
        for kind in (*kinds, *(() if looks else (KILL,))):
            root = folder / "trial"
            shutil.copytree(template, root)
            what = f"call {number} ({place}), {kind if kind == KILL else errno.errorcode[kind]}"
            try:
                code = killed(root, number) if kind == KILL else run(root, number, kind)
                if code not in ((-signal.SIGKILL,) if kind == KILL else (0, 1)):
                    problems.append(f"{what}: ended with {code}")
                if run(root) != 0:
                    problems.append(f"{what}: the next run was refused")
                elif table(Store(root)) != wanted:
                    problems.append(f"{what}: another table")
                found["kills" if kind == KILL else "refused" if code else "harmless"] += 1
            except Exception as error:  # noqa: BLE001  told to the test
                problems.append(f"{what}: {type(error).__name__}: {error}")
            if (root / "quarantine").exists():
                problems.append(f"{what}: a whole cell was moved aside")
            if left := [str(p.relative_to(root)) for p in root.rglob(".*") if not p.name.endswith(".part")]:
                problems.append(f"{what}: {left} stay")
            shutil.rmtree(root)
    return {"calls": len(places), "places": len(passes), **found, "problems": problems, "overlapping": overlapping(folder)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
