"""What is shipped: the wheel's contents, the package map, and that our `kernels/` never passes for Hugging Face's package."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vtc

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"vtc": "vtc", "kernels": "vtc/kernels", "eval": "vtc/eval"}
"""Folder of the checkout to folder of the wheel."""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(*suffixes: str) -> list[Path]:
    """Files of the packages in the checkout, relative to its root."""
    found = [p for top in FOLDERS for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return sorted(p.relative_to(ROOT) for p in found if not suffixes or p.suffix in suffixes)


def shipped_as(path: Path) -> str:
    """Place of a checkout file in the wheel."""
    return "/".join((FOLDERS[path.parts[0]], *path.parts[1:]))


# started outside the copy: with it on sys.path, our `kernels/` would be importable under Hugging Face's name
BUILD = "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]); build_meta.build_wheel(sys.argv[2])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy of the tree, so that nothing is left in the checkout; return it and its unpacked folder."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "tree"
    copy.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-c", BUILD, str(copy), str(place)], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = place.glob("*.whl")
    unpacked = place / "unpacked"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return built, unpacked


def contents(unpacked: Path) -> set[str]:
    return {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------------------------------------- wheel
def test_the_wheel_holds_every_module_and_data_file(wheel):
    built, unpacked = wheel
    files = contents(unpacked)
    assert built.name.startswith(f"vtc_reducers-{vtc.__version__}-py3-none-any")
    wanted = {shipped_as(p) for p in sources(".py")}
    assert wanted == {f for f in files if f.endswith(".py")}, "every module, and no other"
    assert {"vtc/__init__.py", "vtc/__main__.py", "vtc/kernels/__init__.py", "vtc/eval/__init__.py"} <= wanted
    assert "vtc/py.typed" in files
    for folder in ("vtc/assets", "eval/templates", "eval/tasks"):
        data = [p for p in sources() if p.as_posix().startswith(f"{folder}/")]
        assert data and {shipped_as(p) for p in data} <= files, folder
    tops = {f.split("/")[0] for f in files}
    assert tops == {"vtc", next(t for t in tops if t.endswith(".dist-info"))}, "no top-level kernels/ or eval/"
    assert built.stat().st_size < 20 * 2**20


def test_the_wheel_declares_command_licence_and_extras(wheel, project):
    _, unpacked = wheel
    (info,) = unpacked.glob("*.dist-info")
    points = (info / "entry_points.txt").read_text()
    assert "vtc = vtc.cli:main" in points and "[vtc.commands]" in points
    metadata = (info / "METADATA").read_text()
    assert "Name: vtc-reducers" in metadata and "License-Expression: Apache-2.0" in metadata
    assert f"Requires-Python: {project['project']['requires-python']}" in metadata
    assert {"eval", "plot", "ray", "dev"} <= {x.split()[-1] for x in metadata.splitlines() if x.startswith("Provides-Extra")}
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_wheel_runs(wheel, tmp_path):
    """From the unpacked wheel alone, in a folder that is not the checkout: commands, kernels, the embedded model, a patch."""
    _, unpacked = wheel
    code = (
        "import sys, pathlib, vtc, vtc.kernels, vtc.eval, vtc.cli\n"
        f"root = pathlib.Path({str(unpacked)!r})\n"
        "for module in (vtc, vtc.kernels, vtc.eval): assert root in pathlib.Path(module.__file__).parents, module\n"
        "model, _ = vtc.load_pocket()\n"
        "assert root in vtc.pocket.pocket_path().parents\n"
        "with vtc.patch(model, 'uniform', keep=9): pass\n"
        "vtc.cli.main(['check', 'pocket', 'fastv', '--keep', '49'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(unpacked), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "196 visual tokens -> 49" in done.stdout
    assert not list(tmp_path.iterdir()), "nothing is written"


# -------------------------------------------------------------------------------------------------------------- project
def test_package_list_equals_the_folders(project):
    packages = {shipped_as(p.parent).replace("/", ".") for p in sources(".py") if p.name == "__init__.py"}
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages) and len(listed) == len(set(listed))
    stray = {p.parent for p in sources(".py")} - {p.parent for p in sources(".py") if p.name == "__init__.py"}
    assert not stray, f"modules in folders without __init__.py are not shipped: {stray}"


def test_top_level_holds_no_other_package():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages == set(FOLDERS)


def test_entry_points_lead_somewhere(project):
    points = {**project["project"]["scripts"]}
    for group in project["project"].get("entry-points", {}).values():
        points |= group
    assert "vtc" in points and len(points) >= 2
    for value in points.values():
        module, _, name = value.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), value


# -------------------------------------------------------------------------------------------------------------- kernels
PROBE = """
import importlib.util, pathlib, sys
def test_probe():
    spec = importlib.util.find_spec("kernels")
    places = [pathlib.Path(p).resolve() for p in (spec.submodule_search_locations or [])] if spec else []
    assert pathlib.Path({ours!r}) not in places, "our kernels/ is importable as `kernels`"
    assert pathlib.Path({root!r}) not in [pathlib.Path(p).resolve() for p in sys.path if p]
    from transformers.utils import is_kernels_available
    is_kernels_available()
    import vtc.kernels
    assert pathlib.Path(vtc.kernels.__file__).resolve().parent == pathlib.Path({ours!r})
"""


def test_our_kernels_do_not_pass_for_hugging_faces_under_pytest(tmp_path):
    """As ``make test`` and plain ``pytest`` run: with the project's own pytest settings, from its root."""
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE.format(ours=str(ROOT / "kernels"), root=str(ROOT)))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("pytest")),
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            str(probe),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_shadowing_does_no_harm_where_python_puts_the_checkout_on_the_path():
    """``python -m`` from the root makes our folder importable as `kernels`; transformers must still import and vtc must work."""
    code = (
        "import importlib.util, sys\n"
        "assert sys.path[0] in ('', sys.argv[1]) and importlib.util.find_spec('kernels') is not None\n"
        "from transformers.utils import is_kernels_available\n"
        "is_kernels_available()\n"
        "import vtc, transformers.modeling_utils\n"
        "model, _ = vtc.load_pocket()\n"
        "with vtc.patch(model, 'uniform', keep=9): pass\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
