"""README stays true: generated blocks equal what the registry and the result files say, the first example runs, files exist."""

from __future__ import annotations

import re
from pathlib import Path

import vtc
from vtc.docs import render
from vtc.registry import entries

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_generated_blocks_are_fresh():
    assert render(README, ROOT) == README, "run: python -m vtc.docs README.md"


def test_blocks_are_filled():
    for name in entries():
        assert f"| `{name}` |" in README
    assert "| none |" in README or "`none`" in README  # the demo's table


def test_the_first_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert "load_pocket" in code
    _, processor = vtc.load_pocket()
    from vtc.pocket.scenes import scene_questions

    question = scene_questions("test", n=1)[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[question.image], text=[text], return_tensors="pt")
    scope = {"inputs": inputs}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    assert (
        scope["handle"].stats.last.images[0].tokens_per_layer
        == [196, 196, 49, 49, 49, 49][: len(scope["model"].model.language_model.layers)]
    )


def test_every_file_named_exists():
    for name in re.findall(r"`((?:configs|results|tests|kernels|eval|vtc)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_named_exist():
    from typer.main import get_command

    from vtc.cli import app, load_plugins

    load_plugins(app)
    known = set(get_command(app).commands)
    for name in re.findall(r"^vtc (\w+)", README, re.MULTILINE):
        assert name in known, name
