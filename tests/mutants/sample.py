"""Change the code at random and say which changes no test notices: ``python tests/mutants/sample.py [--count 150] [--seed 0]``.

The changes (``operators.py``) are drawn from the modules that decide numbers. One run of the tests says first which of them reach
which line; then each change runs, in a copy, only tests that reach its line: of every test function the cheapest cases, in turns,
until one fails or their time is up. Everything is remembered in ``.mutants``, so that a run can be stopped at any time and goes on
where it was; what is known of a file is forgotten when the file changes, and survivors are tried again when a test does. Writes
``results/mutants.md`` from all that is known of the sample.

mutmut and cosmic-ray were looked at: the first leaves out decorated functions (properties, cached ones) and what a class or a
module computes, and takes a file's path for its module's name; the second starts an interpreter and torch for every change.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from copies import ROOT, alone, copy, place, run
from explained import EXPLAINED
from operators import Change, changes

MODULES = (
    "vtc/core.py", "vtc/schedule.py", "vtc/signals.py", "vtc/stats.py", "vtc/views.py", "vtc/engine/*.py", "vtc/families/*.py",
    "kernels/ref/*.py", "eval/stats.py", "eval/scores.py", "eval/speed.py", "eval/store.py", "eval/results.py", "eval/cost.py",
    "eval/questions.py", "eval/betting.py",
)  # fmt: skip
"""What decides numbers."""
TESTS = "tests/test_*.py"
FIRST, MORE = 4, 60.0
"""Tests of the first look at a change, and CPU seconds of those of the second."""
CASES = 3
"""Of each test function, as many of the cheapest cases that reach a line."""


# ------------------------------------------------------------------------------------------------------ who reaches what
class Reach:
    """A plugin of pytest that notes which lines of which files each test runs, and how long it takes."""

    def __init__(self, root: Path, files: Iterable[str], out: Path) -> None:
        self.files = {str(place(root, f)): f for f in files}
        self.out = out
        self.tests: dict[str, float] = {}
        self.lines: dict[str, dict[str, list[int]]] = {}
        self.now: dict[str, set[int]] = {}

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        seen = self.now.get(frame.f_code.co_filename)
        if seen is None:
            return None

        def within(frame: Any, event: str, _: Any) -> Any:
            seen.add(frame.f_lineno)
            return within

        seen.add(frame.f_lineno)
        return within

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and not report.passed:
            self.tests.pop(report.nodeid, None)  # skipped: says nothing

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        self.now = {path: set() for path in self.files}
        self.start = time.process_time()
        sys.settrace(self.trace)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: Any) -> None:
        sys.settrace(None)
        self.tests[item.nodeid] = round(time.process_time() - self.start, 3)
        for path, seen in self.now.items():
            if seen:
                self.lines.setdefault(self.files[path], {})[item.nodeid] = sorted(seen)
        self.now = {}

    def pytest_sessionfinish(self) -> None:
        with gzip.open(self.out, "wt") as file:
            json.dump({"tests": self.tests, "lines": self.lines}, file)


def reached(memory: Path, root: Path, chosen: list[Path], files: list[str]) -> dict[str, Any]:
    """Which lines each test reaches: remembered for each file of tests, renewed where it or what it reached is another."""
    found: dict[str, Any] = {"tests": {}, "lines": {}}
    for test in chosen:
        mark = digest(test.read_bytes(), *[(ROOT / f).read_bytes() for f in files])
        kept = memory / f"{test.stem}-{mark}.json.gz"
        if not kept.exists():
            print(f"which lines {test.name} reaches ...", flush=True)
            part = kept.with_suffix(".part")
            status, said = run(root, [test.name], "-q", plugins=[Reach(root, files, part)])
            if status not in (0, 5):
                print(f"{test.name} fails without any change, and is left out:\n{said[-2000:]}", flush=True)
                continue
            if not part.exists():
                continue
            part.rename(kept)
        with gzip.open(kept, "rt") as file:
            new = json.load(file)
        found["tests"] |= new["tests"]
        for name, tests in new["lines"].items():
            found["lines"].setdefault(name, {}).update(tests)
    return found


def digest(*parts: bytes) -> str:
    """Twelve hexadecimal digits of what is given."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:12]


def in_turns(tests: dict[str, float]) -> Iterator[str]:
    """Of every test function its cheapest case, then the next of each; cheap functions first."""
    functions: dict[str, list[str]] = {}
    for test in sorted(tests, key=lambda t: (tests[t], t)):
        functions.setdefault(test.partition("[")[0], []).append(test)
    for turn in range(CASES):
        yield from (cases[turn] for cases in functions.values() if len(cases) > turn)


# --------------------------------------------------------------------------------------------------------------- sample
@dataclass(frozen=True)
class Mutant:
    """A change of a file, and what it is remembered by."""

    file: str
    change: Change
    before: str
    after: str
    key: str

    @property
    def what(self) -> tuple[str, str, str]:
        """File, line without and line with the change: what an explanation is found by."""
        return self.file, self.before, self.after


def population(files: list[str]) -> list[Mutant]:
    """All changes of all files."""
    found = []
    for file in files:
        text = (ROOT / file).read_bytes()
        mark = digest(text)
        for change in changes(text):
            new = change(text)
            before, after = (t.splitlines()[change.line - 1].decode().strip() for t in (text, new))
            try:
                ast.parse(new)
            except SyntaxError:
                continue
            found.append(
                Mutant(file, change, before, after, f"{file}:{mark}:{change.start}:{change.end}:{change.new.decode()}")
            )
    return found


def judge(mutant: Mutant, root: Path, reach: dict[str, Any]) -> dict[str, Any]:
    """Run the tests that reach a change; say what came of it."""
    lines = reach["lines"].get(mutant.file, {})
    here = {t: reach["tests"][t] for t, seen in lines.items() if mutant.change.line in seen and t in reach["tests"]}
    if not here and mutant.change.body:  # the interpreter counts several lines of one statement as its first
        here = {t: reach["tests"][t] for t, seen in lines.items() if mutant.change.first in seen and t in reach["tests"]}
    if not here and not mutant.change.body:  # what a file computes once, when it is imported
        here = {t: reach["tests"][t] for t in lines if t in reach["tests"]}
    if not here:
        return {"verdict": "not reached"}
    order, spent, batches = list(in_turns(here)), 0.0, [[], []]
    for number, test in enumerate(order):
        spent += here[test]
        if number < FIRST or spent < MORE:
            batches[number >= FIRST].append(test.removeprefix("tests/"))
    path = place(root, mutant.file)
    text = path.read_bytes()
    path.write_bytes(mutant.change(text))
    try:
        ran = 0
        for batch in filter(None, batches):
            limit = 60 + 4 * int(sum(here[f"tests/{t}"] for t in batch))
            status, said = run(root, batch, "-x", "-q", seconds=limit)
            ran += len(batch)
            if status:
                how = "by time" if status < 0 else "" if status == 1 else "it cannot be imported"
                return {"verdict": "noticed", "by": next(_failed(said), how or "?"), "tests": ran}
        return {"verdict": "survived", "tests": ran, "reach": len(here)}
    finally:
        path.write_bytes(text)


def _failed(said: str) -> Iterator[str]:
    yield from (line.removeprefix("FAILED ").partition(" - ")[0] for line in said.splitlines() if line.startswith("FAILED "))


# --------------------------------------------------------------------------------------------------------------- report
def report(sample: list[Mutant], known: dict[str, dict[str, Any]], conditions: str) -> str:
    """The table of the sample, and every survivor."""
    groups: dict[str, dict[str, int]] = {}
    left = []
    for mutant in sample:
        verdict = known.get(mutant.key, {"verdict": "not run"})["verdict"]
        why = EXPLAINED.get(mutant.what)
        if verdict in ("survived", "not reached"):
            left.append((mutant, verdict, why))
            verdict = "without an effect" if why and why.startswith("no effect") else verdict
        group = groups.setdefault("/".join(mutant.file.split("/")[:-1]) if mutant.file.count("/") > 1 else mutant.file, {})
        group[verdict] = group.get(verdict, 0) + 1
    columns = ("noticed", "survived", "not reached", "without an effect", "not run")
    total = {c: sum(g.get(c, 0) for g in groups.values()) for c in columns}
    with_effect = total["noticed"] + total["survived"] + total["not reached"]
    lines = ["# Changes of the code, and whether a test notices", "", conditions, ""]
    if with_effect:
        lines += [f"Of {with_effect} with an effect {total['noticed']} are noticed: {total['noticed'] / with_effect:.0%}.", ""]
    lines += [f"| where | {' | '.join(columns)} |", f"| --- |{' --: |' * len(columns)}"]
    lines += [f"| `{name}` | {' | '.join(str(group.get(c, 0)) for c in columns)} |" for name, group in sorted(groups.items())]
    lines += [f"| all | {' | '.join(str(total[c]) for c in columns)} |", "", "## Not noticed", ""]
    for mutant, verdict, why in left:
        lines += [f"- `{mutant.file}` line {mutant.change.line}, {mutant.change.kind}, {verdict}: {why or 'not explained yet'}"]
        lines += ["", "      " + mutant.before, "      " + mutant.after, ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Draw, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150, help="changes of the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no other change after this long")
    parser.add_argument("--modules", nargs="*", default=MODULES, help="what is changed: patterns")
    parser.add_argument("--tests", nargs="*", default=[TESTS], help="files of tests that may notice: patterns")
    parser.add_argument("--memory", type=Path, default=ROOT / ".mutants")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mutants.md")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    files = sorted({str(p.relative_to(ROOT)) for m in given.modules for p in ROOT.glob(m)})
    tests = sorted({p for t in given.tests for p in ROOT.glob(t)})
    given.memory.mkdir(exist_ok=True)
    everything = population(files)
    sample = random.Random(given.seed).sample(everything, min(given.count, len(everything)))
    book = given.memory / f"verdicts-{digest(*[p.name.encode() for p in tests])}.jsonl"
    now = digest(*[p.read_bytes() for p in tests])
    known = {r["key"]: r for r in map(json.loads, book.read_text().splitlines())} if book.exists() else {}
    known = {key: r for key, r in known.items() if r["verdict"] == "noticed" or r["now"] == now}
    print(f"{len(sample)} of {len(everything)} changes, {sum(m.key in known for m in sample)} known", flush=True)
    alone()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        reach = reached(given.memory, root, tests, files)
        for mutant in sample:
            if mutant.key in known or time.monotonic() > end:
                continue
            known[mutant.key] = verdict = {"key": mutant.key, "now": now, **judge(mutant, root, reach)}
            with book.open("a") as file:
                file.write(json.dumps(verdict) + "\n")
            print(
                f"{verdict['verdict']:<11} {mutant.file}:{mutant.change.line} {mutant.before}  ->  {mutant.after}", flush=True
            )
    given.out.write_text(report(sample, known, conditions(given, tests, len(everything))), encoding="utf-8")
    return 0


def conditions(given: argparse.Namespace, tests: list[Path], population: int) -> str:
    """What was run, in words."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    which = "all files of tests" if given.tests == [TESTS] else ", ".join(f"`{t.stem}`" for t in tests)
    return (
        f"`make mutants`: {given.count} of {population} changes, seed {given.seed}; {which}; for each at most {FIRST} tests, then "
        f"{MORE:.0f} CPU seconds of others that reach its line. Commit {commit.stdout.strip() or 'unknown'}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}."
    )


if __name__ == "__main__":
    sys.exit(main())
