"""Adding a reducer takes one new file and one line of ``tests/cases.py``: done here, in a copy, and counted."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vtc
import vtc.eval
import vtc.kernels

METHOD = "every_other"
SOURCE = '''"""Every other: a reducer that exists in this test only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Scorer, Signals, Stage
from vtc.registry import register


@register("every_other", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class EveryOther(Scorer):
    """Prefer tokens of even number.

    Deviates: nothing; it exists in a test.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY

    def score(self, signals: Signals) -> Tensor:
        """1 for even tokens, 0 for odd ones."""
        batch, n = signals.shape
        return (torch.arange(n, device=signals.features.device) % 2 == 0).float().expand(batch, n)
'''
LINE = '    "every_other": Case({"keep": 10}, {"keep": 0.2}),\n'


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and tests, laid out as installed."""
    root = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__", "assets", "golden", ".hypothesis", ".pytest_cache")
    # first the parts that live elsewhere in the repository
    package = Path(vtc.__file__).parent
    shutil.copytree(package, root / "vtc", ignore=skip)
    for name, module in (("kernels", vtc.kernels), ("eval", vtc.eval)):
        if not (root / "vtc" / name).exists():
            shutil.copytree(Path(module.__file__).parent, root / "vtc" / name, ignore=skip)
    shutil.copytree(Path(__file__).parent, root / "tests", ignore=skip)
    return root


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, with the copy's vtc in front."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        env.pop(variable, None)
    return subprocess.run(
        [sys.executable, *command], cwd=root, capture_output=True, text=True, env=env, timeout=900, check=False
    )


def pytest_in(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--import-mode=importlib", "-o", "pythonpath=tests", "-p", "no:cacheprovider", "-q", "--rootdir", str(root)]
    return run(root, "-m", "pytest", *options, *arguments)


def tree(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts and ".hypothesis" not in p.parts
    }


def test_adding_a_reducer(copy: Path) -> None:
    before, cases = tree(copy), (copy / "tests" / "cases.py").read_text("utf-8")
    assert METHOD not in vtc.list_reducers()

    # the one file
    (copy / "vtc" / "reducers" / f"{METHOD}.py").write_text(SOURCE, "utf-8")
    code = f"import vtc, json; print(json.dumps([vtc.__file__, vtc.info('{METHOD}').summary, vtc.list_reducers()]))"
    seen = run(copy, "-c", code)
    assert seen.returncode == 0, seen.stderr
    where, summary, listed = json.loads(seen.stdout)
    assert Path(where).is_relative_to(copy), "the copy must be the one that runs"
    assert summary == "Prefer tokens of even number."
    assert listed == sorted([*vtc.list_reducers(), METHOD])
    listing = run(copy, "-m", "vtc", "list")
    assert listing.returncode == 0, listing.stderr
    assert METHOD in listing.stdout

    # without its line the suite complains
    line_missing = pytest_in(copy, "tests/test_registry.py", "-k", "cases_and_registry")
    assert line_missing.returncode == 1, line_missing.stdout + line_missing.stderr
    assert "one line in tests/cases.py" in line_missing.stdout

    # the one line
    end = cases.rindex("}")
    (copy / "tests" / "cases.py").write_text(cases[:end] + LINE + cases[end:], "utf-8")
    after = tree(copy)
    assert sorted(set(after) - set(before)) == [f"vtc/reducers/{METHOD}.py"], "one new file"
    assert [p for p in before if after.get(p) != before[p]] == ["tests/cases.py"], "one changed file"
    changes = difflib.unified_diff(cases.splitlines(), (copy / "tests" / "cases.py").read_text("utf-8").splitlines(), n=0)
    assert [c for c in changes if re.match(r"[+-](?![+-]{2} )", c)] == ["+" + LINE.rstrip("\n")], "one line in it"

    # and every test there is about reducers runs it
    names = f"{METHOD} or cases_and_registry or one_file_per_method or import_laws"
    full = pytest_in(copy, "tests/test_registry.py", "tests/test_contract.py", "-rA", "-k", names)
    assert full.returncode == 0, full.stdout + full.stderr
    passed = [line for line in full.stdout.splitlines() if line.startswith("PASSED ")]
    ran = {line.split("::")[1].split("[")[0] for line in passed if METHOD in line}
    assert ran == reducer_tests(copy)
    assert {line.split("::")[1] for line in passed} > {
        "test_cases_and_registry_list_the_same",
        "test_one_file_per_method",
        "test_import_laws",
    }


def reducer_tests(root: Path) -> set[str]:
    """Names of the tests that are parametrised by reducer."""
    found = set()
    for name in ("test_registry.py", "test_contract.py"):
        for node in ast.parse((root / "tests" / name).read_text("utf-8")).body:
            marks = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
            if {"reducers", "parts"} & set(marks) or any("REDUCERS" in m for m in marks):
                found.add(node.name)
    assert len(found) > 10
    return found
