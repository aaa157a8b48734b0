"""Plots from a store: every kind in every format, honest intervals, front, hostile labels, what is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from stores import CELLS, STORE, fixed_store

from vtc.errors import StoreError, UnknownArgumentError
from vtc.eval import plots
from vtc.eval.plots import KINDS, available, draw, front, inline_svg, save
from vtc.eval.results import collect
from vtc.eval.store import Store

HEAD = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture(scope="module")
def results():
    return collect(Store(STORE / "store"))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_every_kind_is_drawn_in_every_format(results, tmp_path, ending):
    paths = save(results, tmp_path, (), ending)
    assert [p.name for p in paths] == [f"{kind}.{ending}" for kind in KINDS]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(HEAD[ending]) and len(data) > 3000


def test_the_same_store_gives_the_same_picture(results, tmp_path):
    one, two = (save(results, tmp_path / n, ("tokens", "pareto"), "svg") for n in "ab")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_bars_are_the_bootstrap_intervals(results):
    figure = draw(results, "flops")
    row = next(r for r in results.rows if r.reducer == "fastv" and r.budget == "49")
    bars = [c for c in figure.axes[0].collections if hasattr(c, "get_segments")]
    spans = [(segment[0][1], segment[1][1]) for c in bars for segment in c.get_segments()]
    assert any(span == pytest.approx((100 * row.accuracy.low, 100 * row.accuracy.high)) for span in spans)


def test_front_is_what_nothing_beats():
    points = [(1, 50), (2, 60), (2, 55), (3, 60), (4, 80), (0.5, 10), (5, 79)]
    chosen = front(points)
    assert chosen == [5, 0, 1, 4]
    for i, (x, y) in enumerate(points):
        beaten = any((a <= x and b >= y) and (a, b) != (x, y) for a, b in points)
        assert beaten == (i not in chosen)


def test_many_methods_get_panels_of_their_own(results):
    many = [replace(r, label=f"method {i}") for r in results.rows if r.reducer == "fastv" for i in range(12)]
    figure = draw(replace(results, rows=results.rows + many), "tokens")
    titles = [a.get_title(loc="left") for a in figure.axes if a.get_visible()]
    assert titles == ["fastv layer=2", *(f"method {i}" for i in range(12))]  # baselines are in every panel


def test_methods_that_cut_alike_share_a_line_of_the_staircase(results):
    rows = [*results.rows, *(replace(r, label="twin") for r in results.rows if r.reducer == "fastv")]
    labels = [t.get_text() for t in draw(replace(results, rows=rows), "layers").axes[0].get_legend().get_texts()]
    assert "fastv layer=2, twin" in labels and "unreduced" in labels


def test_the_heat_map_shows_points_against_the_unreduced_model(results):
    texts = [t.get_text() for t in draw(results, "types").axes[0].texts]
    row = next(r for r in results.rows if r.label == "random" and r.budget == "49")
    first = results.types[0]
    delta = 100 * (row.by_type[first] - results.unreduced.by_type[first])
    assert texts[0] == f"{delta:+.0f}".replace("-", "−")


def test_hostile_labels_are_text(tmp_path):
    evil = '$\\frac{1}{0}$ --><script>alert(1)</script><a href="x">\x1b\u202e]]>&amp;'
    store = fixed_store(tmp_path / "s", [CELLS[0], (evil, *CELLS[4][1:7], 5.0), CELLS[1]])
    for kind in available(collect(store)):
        svg = inline_svg(draw(collect(store), kind), "p")
        assert "<script" not in svg and "<a " not in svg and "\x1b" not in svg
        assert all(i.startswith("p-") for i in re.findall(r'id="([^"]*)"', svg))


def test_what_the_store_lacks_is_not_drawn_and_says_so(tmp_path):
    untimed = collect(fixed_store(tmp_path / "s", [(*c[:7], None) for c in CELLS[:5]]))
    assert "time" not in available(untimed) and "layers" not in available(untimed) and "tokens" in available(untimed)
    with pytest.raises(StoreError, match="run the sweep with its speed pass"):
        draw(untimed, "time")
    with pytest.raises(StoreError, match="token counts by layer"):
        draw(untimed, "layers")
    only = collect(fixed_store(tmp_path / "t", CELLS[:1]))
    assert available(only) == []


def test_bad_input(results, tmp_path, monkeypatch):
    with pytest.raises(UnknownArgumentError, match="did you mean 'pareto'"):
        draw(results, "paretto")
    with pytest.raises(UnknownArgumentError, match="formats: png, svg, pdf"):
        save(results, tmp_path, (), "gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--out"):
        save(results, tmp_path / "file", ("layers",), "svg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(plots.NoMatplotlibError, match="pip install"):
        draw(results, "tokens")


def test_several_models_do_not_overwrite_each_other(results, tmp_path):
    both = replace(results, rows=[*results.rows, *(replace(r, model="../b/c") for r in results.rows)])
    names = [p.relative_to(tmp_path) for p in save(both, tmp_path, ("layers",), "svg")]
    assert names == [Path("pocket-layers.svg"), Path("b-c-layers.svg")]
