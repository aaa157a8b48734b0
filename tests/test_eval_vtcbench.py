"""The VTC-Bench protocol on stores whose groups are known."""

from __future__ import annotations

import pytest
from stores import cell, finish

from vtc.errors import StoreError
from vtc.eval.store import Store
from vtc.eval.vtcbench import notes, render_vtc, split

#     question: 0  1  2  3  4  5  6  7
FULL = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
SMALL = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]  # A: 2 3 4 5, B: 0 1; 6 and 7 are in neither
METHOD = [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


@pytest.fixture
def store(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", FULL)
    cell(store, listed, "downsample", "downsample", "49", SMALL, kept=42)
    cell(store, listed, "fastv", "fastv", "49", [0.0] * 8, avg=122.5)
    cell(store, listed, "fastv", "fastv", "11", METHOD, avg=44)
    cell(store, listed, "late", "fastv", "20", METHOD, avg=150)
    return finish(store, listed)


def test_groups_sizes_and_scores(store):
    (group,) = split(store).groups
    assert (group.total, group.tokens) == (8, 42)
    by = {e.label: e for e in group.entries}
    assert (by["none"].hard.questions, by["none"].easy.questions) == (4, 2)
    assert (by["none"].hard.images, by["none"].easy.images) == (2, 1)
    assert by["none"].hard.interval.value == by["none"].easy.interval.value == 1
    assert by["downsample"].hard.interval.value == 0 and by["downsample"].easy.interval.value == 1
    assert by["fastv"].hard.interval.value == 0.75 and by["fastv"].easy.interval.value == 0.5
    assert by["fastv"].hard.interval.low < 0.35  # two images, not four questions


def test_rows_are_matched_by_measured_tokens(store):
    (group,) = split(store).groups
    fastv = next(e for e in group.entries if e.label == "fastv")
    assert (fastv.budget, fastv.tokens) == ("11", 44)  # not the row of the same nominal budget
    assert group.unmatched == ["late (150)"]
    text = render_vtc(store, "md")
    assert "late \\(150\\)" in text or "late (150)" in text


def test_guessing_is_scored_on_the_group_itself(store):
    (group,) = split(store).groups
    guess = next(e for e in group.entries if e.kind == "guess")
    assert guess.hard.interval.value == 1.0  # every question of a type has the same answer in this store


def test_a_second_downsampled_run_is_the_floor(tmp_path, store):
    assert any(n.startswith("No floor") for n in notes(split(store)))
    second, listed = Store(tmp_path / "t", create=True), []
    cell(second, listed, "none", "none", "", FULL)
    cell(second, listed, "downsample", "downsample", "49", SMALL, kept=42)
    cell(second, listed, "downsample again", "downsample", "45", [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], kept=40)
    found = split(finish(second, listed))
    floor = next(e for e in found.groups[0].entries if e.kind == "floor")
    assert floor.label == "downsample again" and floor.hard.interval.value == 0.25
    assert not any(n.startswith("No floor") for n in notes(found))


def test_the_discriminator_is_the_same_model_and_code(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", FULL, model="a")
    cell(store, listed, "downsample", "downsample", "49", SMALL, model="b")
    cell(store, listed, "downsample", "downsample", "49", SMALL, model="a", engine="other")
    assert split(finish(store, listed)) is None
    with pytest.raises(StoreError, match="to split the questions by"):
        render_vtc(store, "terminal")


def test_an_empty_group_has_no_number(tmp_path):
    store, listed = Store(tmp_path / "s", create=True), []
    cell(store, listed, "none", "none", "", FULL)
    cell(store, listed, "downsample", "downsample", "49", FULL)
    cell(store, listed, "fastv", "fastv", "49", METHOD)
    text = render_vtc(finish(store, listed), "csv")
    assert next(line for line in text.splitlines() if ",fastv," in line).split(",")[8:13] == ["0", "0", "", "", ""]
    assert "A: 0 questions on 0 images" in render_vtc(store, "terminal")
