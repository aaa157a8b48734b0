"""README stays true: generated blocks equal what the registry and the result files say, the first example runs, files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vtc
from vtc import docs
from vtc.docs import render
from vtc.registry import Entry, entries

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["README.md", "docs/reducers.md", "docs/families.md", "docs/kernels.md", "docs/parallel.md", "docs/upstream.md"]
)
def test_generated_blocks_are_fresh(name):
    text = (ROOT / name).read_text()
    assert "<!-- vtc:begin " in text
    assert render(text, ROOT) == text, f"run: python -m vtc.docs {name}"


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


# --------------------------------------------------------------------------------------------------- one entry per reducer
@pytest.mark.parametrize("name", entries())
def test_every_reducer_has_a_complete_entry(name):
    page = docs.sheet(entries()[name])
    assert not page.missing, f"the docstring of '{name}' lacks: {', '.join(page.missing)}"
    text = docs.entry_text(page)
    for preset in page.entry.presets:
        assert f"`{name}.{preset}`" in text
    for field in (
        "Acts at",
        "Needs",
        "Positions",
        "Paper",
        "code",
        "Golden files matched",
        "Deviates",
        "Parameters",
        "Presets",
    ):
        assert f"**{field}**" in text
    assert "``" not in text and ":class:" not in text and ":func:" not in text, "Markdown, not reStructuredText"
    assert text in (ROOT / "docs" / "reducers.md").read_text() + "\n"


def test_every_golden_file_is_counted_once():
    files = list((ROOT / "tests" / "golden").rglob("*.safetensors"))
    counted = [docs.golden(name) for name in entries()]
    assert sum(len(c) for c in counted) == len(files) >= 102
    assert docs.golden("prumerge_plus") == ("plus_adaptive_576", "plus_fixed_576_b2")
    assert "adaptive_576" in docs.golden("prumerge")
    assert docs.golden("random") == ()


COMPLETE = """Do a thing.

How it does it, with ``x`` (unconfirmed).

Deviates: nothing.

Parameters
----------
keep : int or float
    Tokens.
one, two : int, default 3
    Numbers of
    something.
"""


def entry_of(doc: str, **registered: str) -> Entry:
    from dataclasses import dataclass

    from vtc.core import Reducer, Selection, Stage

    @dataclass(frozen=True, kw_only=True)
    class Thing(Reducer):
        stage = Stage.BOUNDARY
        one: int = 3
        two: int = 3

        def select(self, signals):
            return Selection.all(1, 1)

    Thing.__doc__ = doc
    # the name of a reducer that can be bound: its needs and positions are not what these tests are about
    return Entry("uniform", Thing, **{"paper": "arXiv:0000.00000", "code": "u @ abcdef0", "licence": "MIT"} | registered)


def test_an_entry_is_read_from_the_docstring():
    page = docs.sheet(entry_of(COMPLETE))
    assert page.missing == []
    assert (page.summary, page.deviates) == ("Do a thing.", "nothing.")
    assert page.idea == "How it does it, with ``x`` (unconfirmed)." == page.unconfirmed[0]
    assert [(p.names, p.kind, p.text) for p in page.parameters] == [
        (("keep",), "int or float", "Tokens."),
        (("one", "two"), "int", "Numbers of something."),
    ]
    assert "- `one`, `two` (int, default `3`): Numbers of something." in docs.entry_text(page)


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        (lambda d: d.replace("Do a thing.\n\nHow it does it, with ``x`` (unconfirmed).", "Do a thing."), "idea"),
        (lambda d: d.replace("Do a thing.", "Do a thing"), "summary"),
        (lambda d: d.replace("Deviates: nothing.\n", ""), "deviates"),
        (lambda d: d.replace("one, two", "one"), "parameter two"),
        (lambda d: d.replace("    Tokens.\n", ""), "description of keep"),
        (lambda d: d.replace("one, two", "one, two, three"), "option three, which does not exist"),
    ],
)
def test_a_field_missing_in_a_docstring_is_found(change, lacking):
    assert docs.sheet(entry_of(change(COMPLETE))).missing == [lacking]


@pytest.mark.parametrize("field", ["paper", "licence"])
def test_a_field_missing_in_the_registration_is_found(field):
    assert docs.sheet(entry_of(COMPLETE, **{field: ""})).missing == [field]
