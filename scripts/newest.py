"""``make newest`` and ``make drift``: what the newest releases break, and the way to raise the window.

``make newest`` lifts the upper bounds of the packages in ``vtc/_window.py``, resolves the newest of everything, installs it in a
scratch environment (deleted afterwards) and runs the whole suite there. Failures are printed by the upstream change they come from:
the package whose version differs from the lock and whose code stands deepest in the traceback. When all is green, the window, the
bounds in pyproject.toml and the lock are rewritten; a person reads the diff, runs ``make test`` and commits.

``make drift`` is the cheap look ahead for CI: the newest transformers over the locked environment it runs in, a part of the suite,
the same report, exit status 0 whatever comes of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from lock import EXTRAS, FOLDER, ROOT, compile_lock, pins, write

PROJECT = ROOT / "pyproject.toml"
WINDOW = ROOT / "vtc" / "_window.py"
SMOKE = ("tests/test_engine.py", "tests/test_generate.py", "tests/test_cli.py", "tests/test_eval_lmms.py")
"""What ``make drift`` runs: hooks, caches, generation, the command line, lmms-eval."""


def _window() -> ModuleType:
    """Load the window alone: the environment that holds uv has no torch, which the package around it imports."""
    spec = importlib.util.spec_from_file_location("_window", WINDOW)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


window = _window()


# -------------------------------------------------------------------------------------------------------------- bounds
def bounded(project: str, name: str, upper: str | None) -> str:
    """Set the upper bound of a package wherever pyproject.toml has one; None takes it away."""
    line = re.compile(rf'("{re.escape(name)}>=[\d.]+),<[\d.]+"')
    return line.sub(rf'\1,<{upper}"' if upper else r'\1"', project)


def with_newest(text: str, name: str, newest: str) -> str:
    """Set the newest tested minor of a package in the text of ``vtc/_window.py``."""
    return re.sub(rf'("{re.escape(name)}": \("[\d.]+", )"[\d.]+"\)', rf'\1"{newest}")', text)


def raised(installed: Mapping[str, str]) -> dict[str, str]:
    """Return the packages of the window that are installed in a newer minor than it says, with that minor."""
    tested = {n: window.minor(v) for n, v in installed.items() if n in window.TESTED}
    return {n: f"{v[0]}.{v[1]}" for n, v in tested.items() if v > window.minor(window.TESTED[n][1])}


def raise_window(installed: Mapping[str, str], lock: str) -> None:
    """Rewrite window, bounds and locks to what a green suite ran on."""
    project, tested = PROJECT.read_text(), WINDOW.read_text()
    for name, newest in raised(installed).items():
        project, tested = bounded(project, name, window.above(newest)), with_newest(tested, name, newest)
        print(f"raised: {name} {window.TESTED[name][1]} -> {newest}")
    PROJECT.write_text(project)
    WINDOW.write_text(tested)
    write(lock)
    print("requirements/ written. Next: read the diff, run `make test` (the oldest supported transformers, too), commit.")


# -------------------------------------------------------------------------------------------------------------- report
def changes(installed: Mapping[str, str], locked: Mapping[str, set[str]]) -> dict[str, str]:
    """Return ``{package: "old -> new"}`` for everything installed in a version that the lock does not name."""
    differs = {n: v for n, v in installed.items() if n in locked and v.partition("+")[0] not in locked[n]}
    return {name: f"{' / '.join(sorted(locked[name]))} -> {version}" for name, version in sorted(differs.items())}


def failures(junit: Path) -> list[tuple[str, str, str]]:
    """Return ``(test, exception in one line, traceback)`` of everything red in pytest's JUnit file."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        for bad in (*case.iter("failure"), *case.iter("error")):
            said = (bad.get("message") or "").strip().splitlines() or ["?"]
            module = case.get("classname")  # none where a file could not be collected
            test = f"{module.replace('.', '/')}.py::{case.get('name')}" if module else str(case.get("name"))
            found.append((test, re.sub(r"0x[0-9a-f]+", "0x..", said[0])[:160], bad.text or ""))
    return found


def blamed(traceback: str, changed: Iterable[str], owners: Mapping[str, Sequence[str]]) -> str | None:
    """Return the changed package whose file stands deepest in a traceback; None where there is none.

    Parameters
    ----------
    traceback : str
        As pytest prints it.
    changed : iterable of str
        Packages that differ from the lock.
    owners : mapping
        Import name to the distributions that bring it.
    """
    changed = set(changed)
    places = re.findall(r"^(?:\S*[/\\])?(?:site-packages|overlay)[/\\](\w+)", traceback, re.MULTILINE)
    for top in reversed(places):
        for owner in owners.get(top, (top,)):
            if canonical(owner) in changed:
                return canonical(owner)
    return None


def report(red: Sequence[tuple[str, str, str]], changed: Mapping[str, str], owners: Mapping[str, Sequence[str]]) -> str:
    """Return the failures as text: by upstream change, then by exception, then the tests."""
    groups: dict[str | None, dict[str, list[str]]] = {}
    for test, said, traceback in red:
        groups.setdefault(blamed(traceback, changed, owners), {}).setdefault(said, []).append(test)
    lines = []
    for package, kinds in sorted(groups.items(), key=lambda item: -sum(map(len, item[1].values()))):
        title = f"{package} {changed[package]}" if package else "no changed package in the traceback"
        lines.append(f"{title}: {sum(map(len, kinds.values()))} failing tests")
        for said, tests in sorted(kinds.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {said} ({len(tests)})")
            lines += [f"    {test}" for test in tests[:5]] + ([f"    and {len(tests) - 5} more"] if len(tests) > 5 else [])
    return "\n".join(lines)


def canonical(name: str) -> str:
    """Return a distribution's name as locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --------------------------------------------------------------------------------------------------------------- running
INVENTORY = """
import importlib.metadata as m, json
versions = {d.metadata["Name"]: d.version for d in reversed(list(m.distributions()))}  # of two, the one in front counts
print(json.dumps([versions, m.packages_distributions()]))
"""


def inventory(python: str, environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return versions by package, and packages by import name, of an environment."""
    said = subprocess.check_output([python, "-c", INVENTORY], env=dict(environment), text=True)
    versions, owners = json.loads(said)
    return {canonical(name): version for name, version in versions.items()}, owners


def suite(python: str, tests: Sequence[str], workers: int, environment: Mapping[str, str], junit: Path) -> None:
    """Run tests; what came of them lies in ``junit``. The output is pytest's own where somebody waits for it."""
    pytest = str(Path(python).with_name("pytest"))
    subprocess.run(
        [pytest, *tests, "-n", str(workers), f"--junitxml={junit}", "-o", "junit_family=xunit1"],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL if tests else None,
    )
    if not junit.exists():
        raise RuntimeError("pytest did not get as far as running a test")


def newest(workers: int, lifted: Sequence[str]) -> int:
    """Run the suite on the newest of everything; raise the window when it is green.

    Parameters
    ----------
    workers : int
        Processes of the suite.
    lifted : sequence of str
        Packages of ``HELD`` to try all the same.

    Returns
    -------
    int
        Exit status: 0 green (or nothing newer), 1 red.
    """
    held = {name: why for name, why in window.HELD.items() if name not in lifted}
    for name, why in held.items():
        print(f"held: {name} stays below {window.above(window.TESTED[name][1])}, since {why} (--try {name} lifts it)")
    with tempfile.TemporaryDirectory(prefix="vtc-newest-") as scratch:
        project = Path(scratch, "pyproject.toml")
        text = PROJECT.read_text()
        for name in window.TESTED.keys() - held.keys():
            text = bounded(text, name, None)
        project.write_text(text)
        lock = Path(scratch, "newest.txt")
        lock.write_text(compile_lock(project, EXTRAS["test"]))
        locked = pins((FOLDER / "test.txt").read_text())
        news = {n: v - locked.get(n, set()) for n, v in pins(lock.read_text()).items() if v - locked.get(n, set())}
        if not news:
            print("nothing is newer than the lock")
            return 0
        print(f"newer than the lock: {', '.join(f'{n} {max(v)}' for n, v in sorted(news.items()))}")
        python = str(Path(scratch, "venv", "bin", "python"))
        subprocess.run([sys.executable, "-m", "venv", Path(scratch, "venv")], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "-r", str(lock)], check=True)
        subprocess.run([*install, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)
        installed, owners = inventory(python, os.environ)
        suite(python, (), workers, os.environ, Path(scratch, "junit.xml"))
        red = failures(Path(scratch, "junit.xml"))
        if red:
            print(f"\n{report(red, changes(installed, locked), owners)}")
            return 1
        raise_window(installed, lock.read_text())
        subprocess.run([python, "-m", "vtc.docs", "docs/upstream.md"], cwd=ROOT, check=True)  # its table of the window
    return 0


def drift(workers: int) -> None:
    """Run a part of the suite on the newest transformers over the environment this runs in, and say what breaks."""
    with tempfile.TemporaryDirectory(prefix="vtc-drift-") as scratch:
        plan = Path(scratch, "plan.json")
        install = [sys.executable, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--dry-run", "--upgrade", "--report", str(plan), "transformers"], check=True)
        wanted = {canonical(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(plan.read_text())["install"]}
        here = importlib.metadata.version("transformers")
        if "transformers" not in wanted:
            print(f"drift: transformers {here} is the newest there is, nothing to try")
            return
        overlay = Path(scratch, "overlay")
        named = [f"{name}=={version}" for name, version in wanted.items()]
        subprocess.run([*install, "--no-deps", "--target", str(overlay), *named], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")]))}
        installed, owners = inventory(sys.executable, environment)
        suite(sys.executable, SMOKE, workers, environment, Path(scratch, "junit.xml"))
        red = failures(Path(scratch, "junit.xml"))
        tried = f"transformers {here} -> {wanted['transformers']}"
        if not red:
            print(f"drift: {tried} breaks nothing in {len(SMOKE)} test files; `make newest` runs all and raises the window")
            return
        locked = pins((FOLDER / "test.txt").read_text())
        print(f"drift: {tried} breaks {len(red)} tests\n{report(red, changes(installed, locked), owners)}")


def main() -> int:
    """Read the arguments and run one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drift", action="store_true", help="the newest transformers only, a part of the suite; never fails")
    parser.add_argument(
        "--try", dest="lifted", action="append", default=[], choices=sorted(window.HELD), help="lift a held bound"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of the suite")
    arguments = parser.parse_args()
    if not arguments.drift:
        return newest(arguments.workers, arguments.lifted)
    try:
        drift(arguments.workers)
    except Exception as error:  # a report must not fail what it reports to
        print(f"drift: nothing could be tried: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
