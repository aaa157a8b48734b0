"""The registry is the single list, and nothing imports what it must not know."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from cases import CASES

import vtc
import vtc.eval
import vtc.kernels
import vtc.reducers
from vtc import registry
from vtc.core import EncoderReducer, ImageReducer, Reducer, Schedule, Scorer, Selection, Stage
from vtc.errors import BudgetError, DuplicateReducerError, UnknownArgumentError, UnknownReducerError

REDUCERS = vtc.list_reducers()
reducers = pytest.mark.parametrize("name", REDUCERS)


# ------------------------------------------------------------------------------------------------------ every reducer
def test_cases_and_registry_list_the_same() -> None:
    assert sorted(CASES) == REDUCERS, "every registered reducer has one line in tests/cases.py, and nothing else has"


@reducers
def test_entry_is_complete(name: str) -> None:
    entry = vtc.info(name)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert entry.name == entry.cls.name == name
    assert entry.paper == "baseline" or re.fullmatch(r"arXiv:\d{4}\.\d{5}", entry.paper), "name the paper"
    if entry.code:
        assert re.fullmatch(r"https://\S+ @ [0-9a-f]{7,40}( \(\S+\))?", entry.code), "name the code and its commit"
        assert entry.licence, "name the licence of the official code"
    assert dataclasses.is_dataclass(entry.cls)
    assert entry.cls.__dataclass_params__.frozen
    assert set(entry.stages) <= {s.value for s in Stage}
    assert entry.stages


@reducers
def test_docstring_explains(name: str) -> None:
    entry = vtc.info(name)
    doc = inspect.getdoc(entry.cls)
    assert entry.summary.endswith("."), "one sentence first"
    assert re.search(r"^Parameters\n-{10}$", doc, re.M)
    assert "Deviates:" in doc
    inherited = {f.name for f in dataclasses.fields(Reducer)} - {"keep"}
    for option in set(entry.options) - inherited:
        if not option.startswith("_"):
            assert re.search(rf"^(\w+, )*{option}(, \w+)* : ", doc, re.M), f"option '{option}' is not described"


@reducers
def test_implements_its_stage(name: str) -> None:
    bases = {Stage.IMAGE: ImageReducer, Stage.ENCODER: EncoderReducer}
    cls = vtc.info(name).cls
    if issubclass(cls, Schedule):
        assert cls.parts is not Schedule.parts
        return
    assert issubclass(cls, bases.get(cls.stage, Reducer))
    if cls.stage not in bases:
        assert cls.select is not Reducer.select
        assert not issubclass(cls, Scorer) or cls.score is not Scorer.score


@reducers
def test_presets_and_cases_can_be_made(name: str) -> None:
    for preset, options in vtc.info(name).presets.items():
        assert vtc.create(f"{name}.{preset}").name == name
        if options.get("official"):  # a release may know its own budgets only
            continue
        assert vtc.create(f"{name}.{preset}", keep=7).keep == 7, "a budget given overrides the preset's"
    for options in (CASES[name].mild, CASES[name].harsh, CASES[name].whole):
        assert vtc.create(name, **options) == vtc.create(name, **options)


# budgets of the papers' and releases' tables (the specifications', settings of later comparisons included)
BUDGETS: dict[str, set[int | float]] = {
    "aim": {252, 72, 49 / 196, 25 / 196, 13 / 196, 7 / 196, 4 / 196, 0.5, 0.25, 0.125, 0.031},
    "cdpruner": {192, 128, 64, 32, 640, 320, 160},
    "corematching": {64, 1.0},
    "dart": {128, 320, 1 - 0.778},
    "divprune": {0.098, 128, 64, 32, 0.1},
    "docprune": {1.0},
    "fastervlm": {288, 144, 58, 29, 192, 128, 64, 640, 320, 160},
    "fastv": {0.5, 0.25, 192, 128, 64},
    "fastvid": {0.1, 0.27},
    "flexpool": {256, 144, 64},
    "flowcut": {192, 128, 64, 640, 320, 160, 1 / 3, 2 / 9, 1 / 9},
    "globalcom2": {0.75, 0.5, 0.25, 0.1, 640, 320, 160},
    "hierpool": {1 / 2, 1 / 3, 1 / 4},
    "holitom": {0.25, 0.2, 0.15, 0.1},
    "hiprune": {192, 128, 64, 640, 320, 160, 0.334, 0.223, 0.112},
    "holov": {192, 128, 64},
    "ivcprune": {0.31, 0.5},
    "pact": {1.0},
    "prumerge": {1.0, 73, 32},
    "prumerge_plus": {1.0, 145, 144},
    "ptp": {0.5},
    "pyramiddrop": {0.125},
    "scope": {192, 128, 64, 640, 320, 160},
    "script": {192, 128, 64, 32, 640, 320, 160},
    "sparsevlm": {192, 128, 96, 64},
    "todre": {0.25, 0.1, 720, 288, 1.0},
    "tokencorr": {1.0},
    "transprune": {0.125, 0.0625},
    "vidcom2": {0.25, 0.15},
    "visionzip": {192, 128, 64, 640, 320, 160},
    "vispruner": {192, 128, 64, 32, 640, 320, 160},
    "vscan": {96, 480, 0.167},
    "zooprune": {192, 128, 64, 640, 320, 160, 0.2, 0.1},
}


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_of_the_tables_is_a_preset(name: str) -> None:
    assert BUDGETS[name] <= {options.get("keep") for options in vtc.info(name).presets.values()}


def test_methods_without_settings_say_why() -> None:
    for name in REDUCERS:
        entry = vtc.info(name)
        if not entry.presets and entry.paper != "baseline":
            assert "no setting to make a preset of" in " ".join(inspect.getdoc(entry.cls).split()), name


def test_official_where_a_release_has_defects_that_can_be_run() -> None:
    """Defects that only raise, or that need what the engine does not do (masking instead of dropping), have no option."""
    there = {name for name in REDUCERS if {"official", "compat"} & set(vtc.info(name).options)}
    assert there >= {
        *(
            "aim",
            "cdpruner",
            "dart",
            "divprune",
            "fastervlm",
            "fastv",
            "flowcut",
            "globalcom2",
            "hierpool",
            "hiprune",
            "prumerge",
        ),
        *("prumerge_plus", "script", "sparsevlm", "tokenpooling", "visionzip", "vispruner", "zooprune"),
    }
    for name in REDUCERS:
        entry = vtc.info(name)
        if not entry.code and entry.paper != "baseline":
            assert re.search("unconfirmed|Unconfirmed|inference only", inspect.getdoc(entry.cls)), f"{name} has no public code"


def test_one_file_per_method() -> None:
    modules = [m.name for m in pkgutil.iter_modules(vtc.reducers.__path__)]
    for module in modules:
        source = Path(importlib.import_module(f"vtc.reducers.{module}").__file__)
        mine = [n for n in REDUCERS if vtc.info(n).cls.__module__ == f"vtc.reducers.{module}"]
        assert mine == [module], f"{source.name} registers {mine}: one method per file, of the same name"
    assert sorted(modules) == REDUCERS


# ----------------------------------------------------------------------------------------------------- bad requests
def test_unknown_names_show_close_ones() -> None:
    with pytest.raises(UnknownReducerError, match="no reducer named 'fastvv'; did you mean 'fastv'"):
        vtc.create("fastvv", keep=3)
    with pytest.raises(UnknownReducerError, match=r"'fastv' has no preset 'papr'; did you mean 'paper'.*presets: paper"):
        vtc.create("fastv.papr")
    with pytest.raises(UnknownArgumentError, match=r"'fastv' has no option 'layr'; did you mean 'layer'.*options: keep"):
        vtc.create("fastv", keep=3, layr=2)
    with pytest.raises(UnknownReducerError):
        vtc.info("nothing_like_it_at_all")


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, float("nan"), float("inf"), True, "64"])
@reducers
def test_impossible_budgets_are_refused(name: str, keep: object) -> None:
    with pytest.raises(BudgetError, match="keep="):
        vtc.create(name, keep=keep)


def test_both_or_no_budget_is_refused() -> None:
    for options in ({}, {"keep": 3, "avg_tokens": 3}):
        with pytest.raises(BudgetError, match="exactly one"):
            vtc.create("random", **options)


def test_none_means_not_given() -> None:
    assert vtc.create("fastv", keep=3, layer=None, positions=None) == vtc.create("fastv", keep=3)


# ------------------------------------------------------------------------------------------------------ registering
@pytest.fixture
def scratch() -> Iterator[None]:
    """Restore the registry afterwards."""
    before, loaded = dict(registry._ENTRIES), registry._LOADED
    yield
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)
    registry._LOADED = loaded


def new_class(title: str = "Scratch") -> type[Reducer]:
    @dataclass(frozen=True, kw_only=True)
    class Scratch(Reducer):
        stage: ClassVar[Stage] = Stage.BOUNDARY

        def select(self, signals: object) -> Selection:
            raise NotImplementedError

    Scratch.__qualname__ = Scratch.__name__ = title
    return Scratch


@pytest.mark.usefixtures("scratch")
def test_registering() -> None:
    add = registry.register("scratch", paper="arXiv:0000.00000")
    cls = add(new_class())
    assert "scratch" in vtc.list_reducers()
    assert vtc.info("scratch").cls is cls
    again = new_class()
    assert add(again) is again, "a reloaded module may register its class again"
    with pytest.raises(DuplicateReducerError, match="'scratch' is already registered"):
        add(new_class("Other"))
    elsewhere = new_class()
    elsewhere.__module__ = "somebody.else"
    with pytest.raises(DuplicateReducerError):
        add(elsewhere)
    registry.unregister("scratch")
    assert "scratch" not in vtc.list_reducers()


@pytest.mark.parametrize("name", ["FastV", "fast-v", "2fast", "fast.v", "", "fast v"])
def test_names_are_lower_snake_case(name: str) -> None:
    with pytest.raises(ValueError, match="lower snake case"):
        registry.register(name, paper="baseline")(new_class())


@pytest.mark.usefixtures("scratch")
def test_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load() -> None:
        registry.register("from_outside", paper="arXiv:0000.00000")(new_class())

    def entry_points(*, group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return [SimpleNamespace(name="from_outside", load=load)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_LOADED", False)
    assert "from_outside" in vtc.list_reducers()
    assert asked == ["vtc.reducers"]
    assert vtc.create("from_outside", keep=3).name == "from_outside"


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("error", [ImportError("this plugin is broken"), SystemExit(0), KeyError("x")])
def test_a_broken_entry_point_costs_a_warning_that_names_it(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    before = vtc.list_reducers()

    def load() -> None:
        @vtc.register("half_there", paper="baseline")
        class HalfThere(Reducer):
            """Registered before its module fails."""

        raise error

    point = SimpleNamespace(name="x", value="x:y", dist=SimpleNamespace(name="third-party"), load=load)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    monkeypatch.setattr(registry, "_LOADED", False)
    with pytest.warns(
        RuntimeWarning, match=r"the reducers 'x' of third-party are missing \(.+\): reinstall or remove third-party"
    ):
        assert vtc.list_reducers() == before


# ------------------------------------------------------------------------------------------------------- import laws
PACKAGES = {"vtc": Path(vtc.__file__).parent, "vtc.kernels": Path(vtc.kernels.__file__).parent}
PACKAGES["vtc.eval"] = Path(vtc.eval.__file__).parent


@dataclass(frozen=True)
class Arrow:
    """One import: which module, of what, and whether it runs at import time."""

    source: str
    target: str
    top: bool


def arrows_of(source: str, module: str, package: bool) -> Iterator[Arrow]:
    """All imports of one file, also those inside functions and of type checkers."""
    home = module.split(".") if package else module.split(".")[:-1]
    for node, inside in nodes_of(ast.parse(source), expressions="import_module" in source or "__import__" in source):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from vtc import eval` names a module, too
            targets = [f"{stem}.{a.name}" if is_module(f"{stem}.{a.name}") else stem for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.JoinedStr):  # only the fixed beginning is known
                first = first.values[0]
            if isinstance(first, ast.FormattedValue) and getattr(first.value, "id", "") == "__name__":
                first = ast.Constant(module)
            if not isinstance(first, ast.Constant):
                continue
            targets = [str(first.value).rstrip(".")]
        else:
            continue
        for target in targets:
            yield Arrow(module, target, not inside)


def nodes_of(tree: ast.AST, *, expressions: bool, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All statements, all ``expressions`` where they matter, and whether each is in a function. Every node is met once."""
    for node in ast.iter_child_nodes(tree):
        if expressions or not isinstance(node, ast.expr):
            yield node, inside
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from nodes_of(node, expressions=expressions, inside=inside or function)


def is_module(name: str) -> bool:
    for root in ("vtc.kernels", "vtc.eval", "vtc"):
        if name == root:
            return True
        if name.startswith(root + "."):
            path = PACKAGES[root].joinpath(*name[len(root) + 1 :].split("."))
            return path.is_dir() or path.with_suffix(".py").is_file()
    return False


def files() -> list[tuple[str, Path]]:
    found = []
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join([package, *parts]).removesuffix(".__init__")
            if package == "vtc" and module.startswith(("vtc.kernels", "vtc.eval")):
                continue  # an installed copy has them inside vtc
            found.append((module, path))
    return found


@functools.cache
def arrows() -> list[Arrow]:
    return [a for module, path in files() for a in arrows_of(path.read_text("utf-8"), module, path.name == "__init__.py")]


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


# pure helpers that reducers share
HELPERS = ("vtc.signals", "vtc.views", "vtc.video", "vtc.schedule")
# the one function on plain tensors that patches use, too
VECTORS = "vtc.retrieval"
STANDARD = tuple(sys.stdlib_module_names)
# who may import what of ours, and which third parties; checked for every file of the package
LAWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vtc.reducers": (("vtc.core", "vtc.kernels", "vtc.registry", "vtc.errors", *HELPERS), ("torch", "safetensors")),
    **{helper: (("vtc.core", "vtc.kernels", "vtc.errors"), ("torch",)) for helper in HELPERS},
    "vtc.video": (("vtc.core", "vtc.kernels", "vtc.errors", "vtc.views"), ("torch",)),
    "vtc.core": (("vtc.errors", "vtc.kernels"), ("torch",)),
    "vtc.families": (("vtc.core", "vtc.errors", "vtc.families"), ("torch", "transformers")),
    "vtc.engine": (
        (
            "vtc._window",
            "vtc.core",
            "vtc.engine",
            "vtc.errors",
            "vtc.signals",
            "vtc.stats",
            "vtc.registry",
            "vtc.families",
            "vtc.kernels",
            "vtc.views",
            "vtc.verify.memory",
            VECTORS,
        ),
        ("torch", "transformers", "safetensors"),
    ),
    "vtc.verify.reference": ((), ("torch", "transformers")),
    VECTORS: (("vtc.core", "vtc.errors", "vtc.registry", "vtc.views"), ("torch",)),
    "vtc.kernels": (("vtc.kernels",), ("torch", "triton", "numpy", "scipy")),
}


def breaks_law(arrow: Arrow) -> str:
    """Why an import is not allowed, or an empty string."""
    source, target = arrow.source, arrow.target
    for package, (ours, others) in LAWS.items():
        if within(source, package):
            allowed = within(target, *ours) if within(target, "vtc") else within(target, *others, *STANDARD)
            if not allowed:
                return f"{package} may not import {target}"
    if within(source, "vtc.engine") and within(target, "vtc.families") and target not in ("vtc.families", "vtc.families.base"):
        return "the engine knows no family by name"
    if within(source, "vtc.verify") and within(target, "vtc.engine", "vtc.reducers"):
        return "what checks the engine uses vtc.patch, and nothing of what it checks"
    if within(target, "vtc.reducers") and source not in ("vtc.registry", "vtc.reducers", "vtc.train_docprune"):
        return "only the registry knows the reducers' folder (and the command that makes docprune's weights)"
    if within(source, "vtc.eval"):
        gate = within(target, "vtc.engine.upstream")  # the one place that knows transformers' names
        return "eval uses the public API, not the engine" if within(target, "vtc.engine") and not gate else ""
    if within(target, "vtc.eval", "eval", "kernels"):
        return "vtc never imports eval, nor the folders by their top-level names"
    if within(target, "lmms_eval"):
        return "only eval knows lmms-eval"
    if within(target, "transformers", "triton") and arrow.top and not within(source, "vtc.engine", "vtc.kernels"):
        return f"{target} is imported when needed, not on import"
    return ""


def test_import_laws() -> None:
    broken = [f"{a.source} imports {a.target}: {why}" for a in arrows() if (why := breaks_law(a))]
    assert not broken, "\n".join(broken)


def test_the_walk_sees_everything() -> None:
    modules = {m for m, _ in files()}
    assert {"vtc", "vtc.core", "vtc.engine.text", "vtc.reducers.fastv", "vtc.kernels.ref", "vtc.eval"} <= modules
    assert Arrow("vtc.engine.text", "vtc.core", True) in arrows()
    assert Arrow("vtc.registry", "vtc.reducers", False) in arrows()
    assert Arrow("vtc.families", "vtc.families", False) in arrows(), "a dynamic import, by its fixed beginning"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vtc.reducers.x", "import transformers"),
        ("vtc.reducers.x", "def f():\n    from vtc.engine import patch"),
        ("vtc.reducers.x", "from vtc.families import family_of"),
        ("vtc.reducers.x", "from . import fastv"),
        ("vtc.reducers.x", "from .fastv import FastV"),
        ("vtc.reducers.x", "from vtc import patch"),
        ("vtc.families.x", "from vtc import reducers"),
        ("vtc.families.x", "import importlib\nimportlib.import_module('vtc.engine.patch')"),
        ("vtc.engine.x", "from vtc.families import llava"),
        ("vtc.engine.x", "from vtc.reducers.fastv import FastV"),
        ("vtc.core", "from vtc.stats import StatsLog"),
        ("vtc.signals", "import transformers"),
        ("vtc.kernels.x", "from vtc.core import Stage"),
        ("vtc.kernels.x", "import transformers"),
        ("vtc.x", "from vtc import eval"),
        ("vtc.x", "import kernels"),
        ("vtc.x", "import transformers"),
        ("vtc.x", "from vtc.reducers import fastv"),
        ("vtc.eval.x", "from vtc.engine.text import TextSide"),
        ("vtc.verify.x", "def f():\n    from vtc.engine.cache import check_cache"),
        ("vtc.verify.reference", "from vtc.core import Stage"),
    ],
)
def test_forbidden_arrows_are_seen(module: str, source: str) -> None:
    assert any(breaks_law(a) for a in arrows_of(source, module, False))


@pytest.mark.parametrize("statement", ["import vtc", "import vtc; vtc.list_reducers(); vtc.create('fastv', keep=3)"])
def test_import_is_light(statement: str) -> None:
    code = f"import sys; {statement}; print(*[m for m in ('transformers', 'triton', 'lmms_eval') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
