"""No private name of another package: such a name goes without notice, and what uses it breaks at the next release."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vtc", "eval", "kernels")
GATES = {"vtc/engine/upstream.py", "vtc/engine/taps.py"}
"""Where names of transformers stand; tests of their own guard them."""

ALLOWED = {
    ("kernels/ref/linear.py", "_linear_pointwise"): "torch has no public name for oneDNN's product; without it `@` serves",
    ("vtc/engine/project.py", "_parameters"): "a module's own entries, those that are None included, as torch.nn keeps them",
    ("vtc/engine/project.py", "_buffers"): "the same",
    ("vtc/engine/project.py", "_version"): "torch's count of writes into a tensor; there is no other",
    (
        "vtc/families/base.py",
        "_can_record_outputs",
    ): "what transformers 4.57 marks a tower with whose layers it records too early",
    ("eval/executors.py", "_exit"): "os._exit is documented, and the way to end a process in the middle of what it does",
    ("vtc/families/__init__.py", "_orig_mod"): "what torch.compile wrapped; there is no other way to it",
}
"""(file, name) -> why there is no public way."""

READERS = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "__setattr__"}
HIDDEN = re.compile(r"(?!vtc\.)[a-z]\w*(\.\w+)*\._[a-z]\w*(\.\w+)*")
"""A dotted path through something private, in a string: what ``import_module`` and ``sys.modules`` take."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and not name.startswith("_vtc")


@functools.cache
def trees() -> dict[str, ast.Module]:
    files = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in files}


def bound(tree: ast.Module) -> set[str]:
    """Private names a file gives its own objects: members of its classes, attributes of ``self`` and ``cls``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found.add(member.name)
                targets = member.targets if isinstance(member, ast.Assign) else [getattr(member, "target", None)]
                found |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__setattr__":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in found if private(name)}


def used(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield ``(line, name, whether it may be one of ours)`` for every private name reached through another object or module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.lineno, node.attr, True
        elif isinstance(node, ast.ImportFrom):
            for path in (f"{node.module}.{alias.name}" for alias in node.names):
                if path.split(".")[0] != "vtc":
                    yield from ((node.lineno, part, False) for part in path.split(".") if private(part))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from ((node.lineno, part, False) for part in alias.name.split(".") if private(part))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if called in READERS:
                yield from ((node.lineno, text, True) for text in texts if private(text))
            yield from ((node.lineno, text, False) for text in texts if HIDDEN.fullmatch(text))


def findings(sources: dict[str, ast.Module], ours: set[str]) -> list[tuple[str, int, str]]:
    return [
        (file, line, name)
        for file, tree in sources.items()
        for line, name, may_be_ours in used(tree)
        if not (may_be_ours and name in ours)
    ]


@functools.cache
def found_here() -> list[tuple[str, int, str]]:
    return findings({f: t for f, t in trees().items() if f not in GATES}, set().union(*map(bound, trees().values())))


def test_no_private_name_of_another_package():
    foreign = [f"{f}:{line} {name}" for f, line, name in found_here() if (f, name) not in ALLOWED]
    assert not foreign, f"private names of other packages: {foreign}"


def test_every_exception_is_still_needed():
    assert set(ALLOWED) <= {(file, name) for file, _, name in found_here()}


def test_what_lmms_eval_keeps_for_itself_in_a_model_class_is_not_ours_to_set():
    """Attributes of ``self`` look like ours in a source file; in a subclass of lmms-eval's model some would be its own."""
    from lmms_eval.api.model import lmms

    class Bare(lmms):
        generate_until = loglikelihood = generate_until_multi_round = None

    theirs = {name for name in (*vars(Bare()), *dir(lmms)) if private(name)} - set(dir(object)) - {"_abc_impl"}
    assert theirs, "nothing to compare with"
    for file, tree in trees().items():
        if file.startswith("eval/lmms/"):
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & theirs, f"{file} uses {names & theirs}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from filelock._api import FileLockMeta", "_api"),
        ("import torch._dynamo", "_dynamo"),
        ("from lmms_eval.evaluator import _enable_reentrant_filelocks", "_enable_reentrant_filelocks"),
        ("import sys\nsys._getframe(1)", "_getframe"),
        ("def f(task):\n    return task._filters", "_filters"),
        ("def f(task):\n    task._filters = 1", "_filters"),
        ("def f(op):\n    return getattr(op, '_hidden', None)", "_hidden"),
        ("import importlib\nimportlib.import_module('filelock._api')", "filelock._api"),
        ("def _make(): ...\nfrom pool import _make", "_make"),
    ],
)
def test_a_private_name_is_found_in_every_spelling(source, name):
    tree = ast.parse(source)
    assert [n for _, _, n in findings({"x.py": tree}, bound(tree))] == [name]


def test_names_of_ones_own_are_no_findings():
    body = "class A:\n    _c: int = 0\n    def _d(self):\n        self._e = self._c\n"
    tree = ast.parse(f"from vtc.a import _b\n{body}def f(a):\n    return a._d(), a._e, a._c")
    assert not findings({"x.py": tree}, bound(tree))
