"""The cookbook's recipes run as they are written: every ``bash`` block, with the files that the other blocks are."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vtc.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
RECIPES = [re.findall(r"^```(\w+)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL) for part in TEXT.split("\n## ")[1:]]


def test_every_block_is_of_a_known_kind():
    assert len(RECIPES) == 3 and {kind for kind, _ in BLOCKS} == {"bash", "console", "python", "yaml"}
    assert sum(kind == "console" for kind, _ in BLOCKS) == 1  # what needs a GPU and the hub; validated by its --dry-run
    method = next(text for kind, text in BLOCKS if "class Outlier" in text)
    body = method[method.index("@register") : method.index("main(")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("number", range(3))
def test_a_recipe_runs_as_written(number, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for kind, text in RECIPES[number]:
        if kind in ("python", "yaml"):
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    for kind, text in RECIPES[number]:
        for line in text.splitlines() if kind == "bash" else ():
            words = shlex.split(line)
            if words[0] == "python":  # a process of its own: it registers a reducer
                done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                out = done.stdout
            else:
                assert words[0] == "vtc"
                with pytest.raises(SystemExit) as stop:
                    main(words[1:])
                captured = capfd.readouterr()
                assert not stop.value.code, captured.err
                out = captured.out
            for flag in ("--output", "--out"):
                if flag in words:
                    assert Path(words[words.index(flag) + 1]).exists()
            if words[:2] == ["vtc", "table"] and "--output" not in words:
                assert "fastv" in out
            if words == ["vtc", "table", "results/store/mine"]:
                assert "outlier" in out
