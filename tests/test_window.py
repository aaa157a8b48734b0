"""The tested window, the ranges of pyproject.toml and the locks say the same; the scripts that raise them do what they say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vtc import _window

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
LOCKS = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ("test", "demo", "oldest")}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def declared() -> list[Requirement]:
    project = tomllib.loads(PROJECT)["project"]
    lines = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    return [Requirement(line) for line in lines]


def pinned(lock: str) -> list[Requirement]:
    return [Requirement(line) for line in LOCKS[lock].splitlines() if not line.startswith("#")]


def version(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == "==" and "*" not in pin.version
    return pin.version


def locked(lock: str, python: str) -> dict[str, str]:
    """Versions a lock installs on Linux."""
    here = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    rows = [r for r in pinned(lock) if r.marker is None or r.marker.evaluate(here)]
    assert len({r.name for r in rows}) == len(rows), "two versions of one package"
    return {r.name: version(r) for r in rows}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("lock", "newest"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("lock"), importlib.import_module("newest")
    for name in ("lock", "newest"):
        sys.modules.pop(name)


# -------------------------------------------------------------------------------------------------------------- window
@pytest.mark.parametrize("name", _window.TESTED)
def test_the_ranges_of_the_project_are_the_window(name):
    ranges = [r.specifier for r in declared() if r.name == name]
    lower = {_window.minor(s.version) for spec in ranges for s in spec if s.operator == ">="}
    upper = {s.version for spec in ranges for s in spec if s.operator == "<"}
    oldest, newest = _window.TESTED[name]
    assert ranges and lower == {_window.minor(oldest)} and upper == {_window.above(newest)}
    assert all(len(spec) == 2 for spec in ranges) or name in _window.HELD, (
        "every range is closed, but for what another package breaks on"
    )


@pytest.mark.parametrize("name", _window.TESTED)
def test_the_lock_is_the_newest_of_the_window(name):
    found = [_window.minor(version(r)) for r in pinned("test") if r.name == name]
    oldest, newest = _window.TESTED[name]
    assert max(found) == _window.minor(newest) and min(found) >= _window.minor(oldest)


def test_the_oldest_of_transformers_is_tested():
    found = {r.name: version(r) for r in pinned("oldest")}
    assert _window.minor(found["transformers"]) == _window.minor(_window.TESTED["transformers"][0])
    newest = locked("test", "3.11")
    assert all(Requirement(f"x<{newest[name]}").specifier.contains(v) for name, v in found.items()), (
        "each differs from the lock"
    )


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("5.24.0", None),
        ("5.24.7", None),
        ("4.57", None),
        ("5.0.0rc1", None),
        (None, None),
        ("5.25.0.dev0", "newer"),
        ("6.0", "newer"),
        ("4.56.2", "older"),
    ],
)
def test_a_version_outside_is_one_sentence(monkeypatch, installed, said):
    monkeypatch.setattr(_window, "installed", lambda name: installed)
    found = _window.outside("transformers")
    if said is None:
        assert found is None
    else:
        assert f"transformers {installed} is {said} than" in found and "4.57 to 5.24" in found and "\n" not in found
        assert found.endswith("pip install 'transformers>=4.57,<5.25'")


@pytest.fixture
def untested(tmp_path):
    """A folder in front of the path in which transformers says that it is of tomorrow."""
    info = tmp_path / "transformers-5.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.99.0\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))}


def test_an_untested_transformers_is_warned_of_once_and_only_where_it_is_used(untested, tmp_path):
    def said(code):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=untested, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return re.findall(r"UserWarning: (.*)", done.stderr)

    patch = (
        "import vtc\nmodel, _ = vtc.load_pocket()\nfor _ in 'ab': vtc.patch(model, 'uniform', keep=9)\nimport vtc.engine.patch"
    )
    (found,) = said(patch)
    assert found.startswith("transformers 5.99.0 is newer than") and found.endswith("pip install 'transformers>=4.57,<5.25'")
    for harmless in (
        "import vtc; vtc.list_reducers()",
        "from vtc.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ):
        assert not said(harmless)


def test_the_window_is_read_without_any_package(tmp_path):
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += f"exec(open({str(ROOT / 'vtc' / '_window.py')!r}).read())\nassert TESTED"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, check=True)


# --------------------------------------------------------------------------------------------------------------- locks
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_versions_and_nothing_of_the_machine_it_was_made_on(lock, scripts):
    rows = "".join(line + "\n" for line in LOCKS[lock].splitlines() if not line.startswith("#"))
    assert scripts[0].cleaned(LOCKS[lock]) == rows
    assert not re.search(r"file:|https?:|://|@|^-|/(?:tmp|opt|home|root|work)\b", LOCKS[lock], re.MULTILINE)
    assert not re.search(r"\+\w", rows), "local versions (+cpu) are of one index"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_hold_all_that_the_project_declares(python):
    project = tomllib.loads(PROJECT)["project"]
    covered = {"test": ("pocket", "plot", "eval", "dev"), "demo": ("pocket", "plot")}
    for lock, extras in covered.items():
        versions = locked(lock, python)
        build = tomllib.loads(PROJECT)["build-system"]["requires"]
        lines = [*project["dependencies"], *build, *(d for extra in extras for d in project["optional-dependencies"][extra])]
        for wanted in map(Requirement, lines):
            if wanted.name != "vtc-reducers":
                name = canonicalize_name(wanted.name)
                assert wanted.specifier.contains(versions[name]), f"{lock}.txt, Python {python}: {wanted} is {versions[name]}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_demo_is_installed_from_versions_of_the_test_lock(python):
    assert locked("demo", python).items() <= locked("test", python).items()


# ------------------------------------------------------------------------------------------------------------- scripts
def test_pip_says_where_packages_come_from_and_the_lock_does_not(scripts):
    lock, _ = scripts
    listed = ":env:.find-links='/wheels /more'\nglobal.extra-index-url='file:///a file:///b'\nuser.index-url='mirror'\nglobal.cert='c.pem'"
    assert lock.pip_settings(listed) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "mirror",
        "UV_INDEX": "file:///a file:///b",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "c.pem",
    }
    assert lock.cleaned("# by uv\ntorch==2.14.1+cpu ; python_version < '3.11'\n\nray[default]==2.0\n") == (
        "torch==2.14.1 ; python_version < '3.11'\nray==2.0\n"
    )
    for foreign in ("--index-url https://x", "--find-links /opt", "torch @ file:///w.whl", "-e .", "torch>=2", "./torch.whl"):
        with pytest.raises(ValueError, match="not a pinned version"):
            lock.cleaned(f"torch==2.0\n{foreign}\n")


def test_raising_the_window_rewrites_bounds_window_and_lock(scripts, monkeypatch, tmp_path, capsys):
    lock, newest = scripts
    project, window = tmp_path / "pyproject.toml", tmp_path / "_window.py"
    project.write_text(PROJECT)
    window.write_text((ROOT / "vtc" / "_window.py").read_text())
    monkeypatch.setattr(newest, "PROJECT", project)
    monkeypatch.setattr(newest, "WINDOW", window)
    written = []
    monkeypatch.setattr(newest, "write", written.append)
    newest.raise_window(
        {"transformers": "5.31.2", "torch": "2.14.1", "timm": "1.2.0", "numpy": "9.0"}, "transformers==5.31.2\n"
    )
    scope: dict = {}
    exec(window.read_text(), scope)  # noqa: S102
    assert scope["TESTED"] == {**_window.TESTED, "transformers": ("4.57", "5.31"), "timm": ("1.0", "1.2")}
    changed = dict(zip(PROJECT.splitlines(), project.read_text().splitlines(), strict=True))
    assert {new.strip(' ",') for old, new in changed.items() if old != new} == {"transformers>=4.57,<5.32", "timm>=1.0.16,<1.3"}
    assert written == ["transformers==5.31.2\n"] and "raised: transformers 5.24 -> 5.31" in capsys.readouterr().out


@pytest.mark.parametrize("green", [True, False])
def test_the_newest_of_everything_is_tried_and_taken_when_the_suite_is_green(scripts, monkeypatch, tmp_path, capsys, green):
    """All but the installations and the suite itself, which take minutes."""
    lock, newest = scripts
    tomorrow = re.sub(r"^timm==.*$", "timm==1.9.9", LOCKS["test"], flags=re.MULTILINE)
    commands, resolved, raised = [], [], []

    def resolve(project, extras):
        resolved.append((project.read_text(), extras))
        return lock.cleaned(tomorrow)

    def suite(python, tests, workers, environment, junit):
        trace = "/x/lib/python3.11/site-packages/timm/layers.py:3: TypeError"
        red = f'<failure message="TypeError: gone">{trace}</failure>'
        junit.write_text(f'<s><testcase classname="tests.test_vit" name="test_a">{"" if green else red}</testcase></s>')

    monkeypatch.setattr(newest, "compile_lock", resolve)
    monkeypatch.setattr(newest.subprocess, "run", lambda command, **_: commands.append([str(c) for c in command]))
    monkeypatch.setattr(newest, "inventory", lambda *_: ({"timm": "1.9.9"}, {"timm": ["timm"]}))
    monkeypatch.setattr(newest, "suite", suite)
    monkeypatch.setattr(newest, "raise_window", lambda installed, text: raised.append((installed, text)))
    assert newest.newest(1, ()) == (0 if green else 1)
    out = capsys.readouterr().out
    (given,) = resolved
    assert '"timm>=1.0.16"' in given[0] and '"filelock>=3.20.3,<4.3"' in given[0] and given[1] == ("dev",)
    assert "held: filelock stays below 4.3" in out and "newer than the lock: timm 1.9.9\n" in out
    assert [c[3] for c in commands[1:3]] == ["install"] * 2 and "--no-deps" in commands[2]
    assert raised == ([({"timm": "1.9.9"}, lock.cleaned(tomorrow))] if green else [])
    was = next(iter({version(r) for r in pinned("test") if r.name == "timm"}))
    assert (f"timm {was} -> 1.9.9: 1 failing tests\n  TypeError: gone (1)\n    tests/test_vit.py::test_a" in out) != green
    monkeypatch.setattr(newest, "compile_lock", lambda *_: lock.cleaned(LOCKS["test"]))
    assert newest.newest(1, ()) == 0 and "nothing is newer than the lock" in capsys.readouterr().out


def test_bounds_are_lifted_but_for_the_held(scripts):
    _, newest = scripts
    text = PROJECT
    for name in _window.TESTED.keys() - _window.HELD.keys():
        text = newest.bounded(text, name, None)
    closed = {d for d in tomllib.loads(text)["project"]["dependencies"] if "<" in d}
    assert not closed and '"filelock>=3.20.3,<4.3"' in text and '"timm>=1.0.16"' in text


def test_failures_are_grouped_by_the_upstream_change_they_come_from(scripts, tmp_path):
    """A real run of pytest: two tests break in a package that changed, one in one that did not, one in the test itself."""
    _, newest = scripts
    site = tmp_path / "lib" / "site-packages"
    site.mkdir(parents=True)
    (site / "trans_formers.py").write_text(
        "def call(f=None):\n    if f: return f()\n    raise TypeError('no argument cache')\n"
    )
    (site / "steady.py").write_text("def call(): raise KeyError('steady')\n")
    (tmp_path / "test_a.py").write_text(
        "import sys; sys.path.insert(0, 'lib/site-packages')\nimport pytest, steady, trans_formers\n"
        "@pytest.mark.parametrize('i', range(2))\ndef test_one(i): trans_formers.call()\n"
        "def test_two(): steady.call()\n"
        "def test_three(): trans_formers.call(steady.call)\n"
        "def test_four(): assert 1 == 2\n"
        "def test_five(): pass\n"
    )
    junit = tmp_path / "junit.xml"
    options = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={junit}", "--rootdir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *options, "test_a.py"], cwd=tmp_path, capture_output=True)
    red = newest.failures(junit)
    assert len(red) == 5
    changed = newest.changes({"trans-formers": "2.0", "steady": "1.0"}, {"trans-formers": {"1.0"}, "steady": {"1.0"}})
    assert changed == {"trans-formers": "1.0 -> 2.0"}
    lines = newest.report(red, changed, {"trans_formers": ["trans_formers"]}).splitlines()
    assert lines[0] == "trans-formers 1.0 -> 2.0: 3 failing tests"
    assert lines[1:4] == [
        "  TypeError: no argument cache (2)",
        "    test_a.py::test_one[0]",
        "    test_a.py::test_one[1]",
    ]
    assert lines[4:6] == ["  KeyError: 'steady' (1)", "    test_a.py::test_three"]
    assert lines[6] == "no changed package in the traceback: 2 failing tests"


def test_drift_has_nothing_to_try_where_nothing_is_newer_and_never_fails(scripts, monkeypatch, capsys):
    _, newest = scripts
    asked = []

    def pip(command, **_):
        asked.append(command)
        Path(command[command.index("--report") + 1]).write_text('{"install": []}')

    monkeypatch.setattr(newest.subprocess, "run", pip)
    monkeypatch.setattr(sys, "argv", ["newest.py", "--drift"])
    assert newest.main() == 0 and "is the newest there is, nothing to try" in capsys.readouterr().out and len(asked) == 1

    def broken(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(newest.subprocess, "run", broken)
    assert newest.main() == 0 and "nothing could be tried: CalledProcessError" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ commands
def test_the_two_commands_install_from_the_lock():
    make = (ROOT / "Makefile").read_text()
    for command, lock in (("demo", "demo"), ("dev", "test")):
        recipe = re.search(rf"^\$\(VENV\)/\.{command}: (.*)\n((?:\t.*\n)+)", make, re.MULTILINE)
        assert f"requirements/{lock}.txt" in recipe[1] and f"install --quiet -r requirements/{lock}.txt\n" in recipe[2]
        assert recipe[2].count("pip install") == 2 and "$(EDITABLE)" in recipe[2]
    assert "EDITABLE := --no-deps --no-build-isolation --editable ." in make
    ci = (ROOT / ".ci" / "run").read_text()
    assert [line for line in ci.splitlines() if line.startswith("make")] == ["make lint", "make test", "make drift"]
