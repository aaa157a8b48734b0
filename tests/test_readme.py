"""The README's first ten minutes: every block of it runs as written, and nothing in it is out of date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vtc
from vtc import cli
from vtc.pocket import pocket_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
"""Lines of all bash blocks, without their remarks."""


def of(*starts: str) -> list[str]:
    return [line for line in LINES if line.startswith(starts)]


def test_it_is_short_and_every_line_of_it_has_a_test():
    assert len(README.splitlines()) <= 155
    assert [kind for kind, _ in BLOCKS] == ["bash", "python", "python", "bash", "bash", "bash", "bibtex"]
    assert len(of("pip ", "git ", "vtc ", "make ", "lmms-eval ")) == len(LINES)


@pytest.fixture(scope="module")
def scope():
    """Names the first program leaves behind."""
    return {"__name__": "readme"}


def test_the_first_program_answers_with_and_without_a_reducer(scope, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[1][1], "README.md", "exec"), scope)  # noqa: S102
    said = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert said["visual tokens"].split() == ["196", "->", "49"]
    assert said["all tokens"].strip() == said["a quarter"].strip() == said["by generate"].strip() == "blue"
    assert "_vtc_handle" not in vars(scope["model"])


def test_the_program_for_a_model_of_the_hub_runs_on_one_of_its_class(scope):
    """The embedded model is a LLaVA-1.5, too, and stands in for the one named, which is not at hand."""
    program = BLOCKS[2][1].replace("llava-hf/llava-1.5-7b-hf", str(pocket_path()))
    assert program != BLOCKS[2][1]
    scope["vtc"] = vtc
    exec(compile(program, "README.md", "exec"), scope)  # noqa: S102
    assert type(scope["model"]).__name__ == "LlavaForConditionalGeneration"
    vtc.unpatch(scope["model"])


@pytest.mark.parametrize("line", of("vtc "))
def test_the_commands_run(line, tmp_path, monkeypatch, capsys):
    if line.startswith("vtc sweep"):
        assert line in (ROOT / "docs/cookbook.md").read_text(encoding="utf-8"), "test_cookbook.py runs it"
        line += " --dry-run"
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/scene.png").symlink_to(ROOT / "results/scene.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(line)[1:])
    out, err = capsys.readouterr()
    assert not stop.value.code and out and not err, err
    assert "--show" not in line or (tmp_path / "kept.png").exists()


def test_make_knows_the_two_commands():
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert of("make ") == ["make demo", "make test"]
    for line in of("make "):
        assert re.search(rf"^{line.split()[1]}:", rules, re.MULTILINE)


def test_what_is_installed_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    release, checkout = of("pip ", "git ")
    assert release.split()[-1] == project["name"]
    assert project["urls"]["Documentation"].startswith(re.search(r"git clone (\S+)", checkout)[1])
    for name in re.search(r"\.\[([\w,]+)\]", checkout)[1].split(",") + ["eval", "ray"]:
        assert name in project["optional-dependencies"]
    assert project["requires-python"] == ">=3.10" and "Python 3.10 or newer" in README


def test_the_line_for_lmms_eval_reaches_the_plugin(capsys):
    pytest.importorskip("lmms_eval")
    from vtc.eval.lmms.model import PatchedChat
    from vtc.eval.lmms.run import _manager

    (line,) = of("lmms-eval ")
    words = shlex.split(line.replace("$(vtc tasks --path)", "TASKS"))
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert given["--model"] == "vtc" and given["--tasks"] in _manager(False).task_index
    lm = PatchedChat.create_from_arg_string(given["--model_args"])
    assert lm.reducer == vtc.create("fastv", keep=49) and lm.handle.active
    with pytest.raises(SystemExit):
        cli.main(["tasks", "--path"])
    assert list(Path(capsys.readouterr().out.strip()).glob(f"{given['--tasks']}.yaml"))


def test_everything_it_names_exists():
    for name in re.findall(r"`((?:configs|results|tests|kernels|eval|vtc)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    from typer.main import get_command

    cli.load_plugins(cli.app)
    for name in re.findall(r"`vtc (\w+)", README):
        assert name in get_command(cli.app).commands, name


def test_the_row_that_waits_for_a_gpu_still_waits():
    bars = (ROOT / "results/bars.md").read_text(encoding="utf-8")
    assert "waits for one: see *waiting* in [docs/kernels.md]" in README and "| GPU |" in bars and "| waiting |" in bars


def test_it_is_cited_with_the_version_there_is():
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    bibtex = BLOCKS[-1][1]
    assert f"version: {vtc.__version__}\n" in cff and f"version = {{{vtc.__version__}}}" in bibtex
    title, url = re.search(r'title: "(.*)"', cff)[1], re.search(r'repository-code: "(.*)"', cff)[1]
    assert f"{{{title}}}" in bibtex and f"{{{url}}}" in bibtex


def test_python_blocks_are_formatted():
    for kind, text in BLOCKS:
        if kind == "python":
            done = subprocess.run([sys.executable, "-m", "ruff", "format", "-"], input=text, capture_output=True, text=True)
            assert done.stdout == text
