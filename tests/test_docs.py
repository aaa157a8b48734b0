"""The pages stay true: generated blocks equal what registry and result files say, files exist. test_readme.py has the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vtc import docs
from vtc.docs import render
from vtc.registry import Entry, entries

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    name
    for name in ("README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
    if "<!-- vtc:begin " in (ROOT / name).read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", PAGES)
def test_generated_blocks_are_fresh(name):
    text = (ROOT / name).read_text()
    assert "<!-- vtc:begin " in text
    assert render(text, ROOT) == text, f"run: python -m vtc.docs {name}"


def test_blocks_are_filled():
    assert {"README.md", "docs/families.md", "docs/how.md", "docs/kernels.md", "docs/reducers.md", "docs/results.md"} <= set(
        PAGES
    )
    methods = (ROOT / "docs/reducers.md").read_text(encoding="utf-8")
    for name in entries():
        assert f"| `{name}` |" in methods
    for name in ("README.md", "docs/results.md"):
        assert "\n| none |" in (ROOT / name).read_text(encoding="utf-8")  # the demo's table


def test_every_page_names_files_that_exist():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_an_excerpt_says_what_its_source_says():
    """Row by row, of the columns chosen; the marks of the best of all rows are left out where not all rows are shown."""
    source = (ROOT / "results/demo.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in source.splitlines() if line.startswith("| ")]
    shown = [line.strip("| ").split(" | ") for line in docs.demo_excerpt(ROOT).splitlines() if line.startswith("| ")]
    places = [rows[0].index(column) for column in shown[0]]
    assert [row[0].split()[0] for row in shown[1:]] == list(docs.SHORT)
    for row in shown[1:]:
        full = next(r for r in rows if r[:2] == row[:2])
        assert row == [re.sub(r"(?<!\\)\*\*|(?<!\w)_|_(?!\w)", "", full[i]) for i in places]


def test_the_speed_excerpt_names_the_model_that_was_measured():
    from vtc.eval.bench.model import MODELS

    sizes = MODELS["wide-and-flat"].config["text_config"]
    said = f"{sizes['num_hidden_layers']} decoder layers of width {sizes['hidden_size']}"
    text = docs.speed_excerpt(ROOT)
    assert f"`wide-and-flat` of `vtc bench model`: random weights, {said}" in text
    assert text.count("\n| ") == 6 and "| visionzip | 144 | " in text


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
