"""Sweep files: every bad input gets one sentence that names the place and the fix."""

from __future__ import annotations

import textwrap

import pytest

from vtc.errors import ConfigError
from vtc.eval.cells import cells
from vtc.eval.config import BASELINES
from vtc.eval.sweepfile import load_sweep, parse_sweep

GOOD = """\
data:
  scenes: {n: 22}
budgets: [49, 11]
reducers:
  - fastv
  - name: divprune
    label: DivPrune
"""


def refuse(text: str, *parts: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(textwrap.dedent(text), overrides, source="file.yaml")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_a_good_file_gives_every_row_once_with_the_baselines_first():
    rows = [(c.label, c.budget) for c in cells(parse_sweep(GOOD))]
    group = [*BASELINES, "fastv", "DivPrune"]
    assert rows == [("none", ""), *((name, "49") for name in group), *((name, "11") for name in group)]


def test_a_listed_baseline_is_not_doubled_and_its_options_make_another_row():
    text = GOOD + "  - random\n  - {name: random, options: {seed: 3}}\n"
    rows = [(c.label, c.budget) for c in cells(parse_sweep(text)) if c.name == "random"]
    assert rows == [("random", "49"), ("random seed=3", "49"), ("random", "11"), ("random seed=3", "11")]


def test_budgets_of_one_reducer_and_of_other_kinds():
    text = GOOD.replace("    label: DivPrune", "    budgets: [0.5, {avg_tokens: 20}]")
    rows = [(c.label, c.budget) for c in cells(parse_sweep(text))]
    assert ("divprune", "0.5") in rows and ("divprune", "avg 20") in rows and ("divprune", "49") not in rows
    # the floors are at these budgets too: a row without its baselines could not be judged
    made = {c.budget: c.reducer for c in cells(parse_sweep(text)) if c.label == "divprune"}
    assert made["avg 20"].avg_tokens == 20 and made["0.5"].keep == 0.5


def test_every_budget_in_use_has_all_baselines():
    text = GOOD.replace("    label: DivPrune", "    budgets: [0.5, 7]")
    rows = cells(parse_sweep(text))
    for budget in {c.budget for c in rows if c.reducer is not None}:
        assert {c.label for c in rows if c.budget == budget} >= set(BASELINES)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("budgets: [49, 11]\n", ""), ("budgets", "missing", "add it")),
        (("data:\n  scenes: {n: 22}\n", ""), ("data", "missing")),
        (("{n: 22}", "{}"), ("line 2", "data.scenes.n", "missing")),
        (("data:\n  scenes: {n: 22}\n", "data: {}\n"), ("line 1", "data", "at least one source")),
        (("budgets:", "budget:"), ("line 3", "unknown key 'budget'", "did you mean 'budgets'")),
        (("{n: 22}", "{n: 22, typs: [color]}"), ("line 2", "data.scenes.typs", "did you mean 'types'")),
        (("label: DivPrune", "lable: DivPrune"), ("line 7", "reducers[1].lable", "did you mean 'label'")),
        (("[49, 11]", "[49, 0]"), ("line 3", "budgets[1]", "at least one")),
        (("[49, 11]", "[-3]"), ("line 3", "budgets[0]", "at least one")),
        (("[49, 11]", "[.nan]"), ("budgets[0]", "nan", "share in (0, 1]")),
        (("[49, 11]", "[1.5]"), ("budgets[0]", "1.5", "share in (0, 1]")),
        (("[49, 11]", "[true]"), ("budgets[0]", "not a number")),
        (("[49, 11]", "[many]"), ("budgets[0]", "'many'", "not a number")),
        (("[49, 11]", "[{keep: 4, avg_tokens: 4}]"), ("budgets[0]", "exactly one")),
        (("[49, 11]", "[{kep: 4}]"), ("budgets[0].kep", "did you mean 'keep'")),
        (("[49, 11]", "[]"), ("line 3", "budgets", "at least 1")),
        (("[49, 11]", "49"), ("line 3", "budgets", "list")),
        (("{n: 22}", "{n: 0}"), ("data.scenes.n", "greater than or equal to 1")),
        (("{n: 22}", "{n: lots}"), ("data.scenes.n", "integer", "'lots'")),
        (("{n: 22}", "{n: 22, split: train}"), ("data.scenes.split", "'test' or 'val'")),
        (("- fastv", "- fastvv"), ("line 5", "reducers[0].name", "fastvv", "did you mean 'fastv'")),
        (("- fastv", "- fastv.papr"), ("reducers[0].name", "did you mean 'paper'")),
        (("- fastv", "- none"), ("line 5", "always there")),
        (("- fastv", "- {name: fastv, options: {layr: 1}}"), ("reducers[0].options", "did you mean 'layer'")),
        (("- fastv", "- {name: fastv, options: {keep: 1}}"), ("reducers[0].options.keep", "under 'budgets'")),
        (("- fastv", "- {name: fastv, budgets: [0]}"), ("reducers[0].budgets[0]", "at least one")),
        (("- fastv", "- {options: {layer: 1}}"), ("reducers[0].name", "missing")),
        (("- fastv", "- 7"), ("line 5", "reducers[0]")),
        (("label: DivPrune", "label: fastv"), ("line 6", "two rows are called 'fastv'", "label")),
    ],
)
def test_bad_values(change, parts):
    assert change[0] in GOOD
    refuse(GOOD.replace(*change), "file.yaml", *parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("sped: {repeats: 3}", ("line 8", "did you mean 'speed'")),
        ("speed: {repeets: 3}", ("speed.repeets", "did you mean 'repeats'")),
        ("speed: {repeats: 1}", ("speed.repeats", "greater than or equal to 3")),
        ("speed: true", ("speed", "false")),
        ("seed: -1", ("seed", "greater than or equal to 0")),
        ("threads: 0", ("threads", "greater than or equal to 1")),
        ("bootstrap: {confidence: 2}", ("bootstrap.confidence", "less than 1")),
        ("model: [a]", ("model", "string")),
        ("budgets: [3]", ("line 8", "second time", "line 3")),
    ],
)
def test_bad_settings(line, parts):
    refuse(GOOD + line + "\n", *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("empty", "data, budgets and reducers")),
        ("- a\n- b\n", ("list", "mapping")),
        ("just words", ("str", "mapping")),
        ("data: [1, 2\nbudgets: 3", ("line 2", "not valid YAML")),
        ("data:\n\tn: 1", ("line 2", "not valid YAML")),
        ("!!python/object/apply:os.system [echo]", ("not valid YAML",)),
    ],
)
def test_corrupt_yaml(text, parts):
    refuse(text, "file.yaml", *parts)


def test_absent_and_unreadable_files(tmp_path):
    (tmp_path / "demo.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"no sweep file .*dmo\.yaml; did you mean .*demo\.yaml"):
        load_sweep(tmp_path / "dmo.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_sweep(tmp_path / "image.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_sweep(tmp_path)


def test_overrides_reach_nested_keys_and_lists():
    config = parse_sweep(GOOD, ["data.scenes.n=44", "reducers.0=uniform", "budgets=[7]", "speed.repeats=5", "threads=1"])
    assert config.data.scenes.n == 44 and config.reducers[0].name == "uniform" and config.budgets[0].keep == 7
    assert config.speed.repeats == 5 and config.threads == 1
    assert parse_sweep(GOOD, ["speed=false"]).speed is False


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("threads", ("KEY=VALUE",)),
        ("=3", ("KEY=VALUE",)),
        ("a..b=3", ("KEY=VALUE",)),
        ("reducers.5=fastv", ("list of 2", "'5'")),
        ("reducers.x=fastv", ("list of 2", "'x'")),
        ("budgets.0.keep.x=1", ("plain value",)),
        ("threads=[1", ("not valid YAML",)),
        ("dta.scenes.n=3", ("unknown key 'dta'", "did you mean 'data'")),
    ],
)
def test_bad_overrides(item, parts):
    refuse(GOOD, *parts, overrides=(item,))


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_the_shipped_files_are_valid(name):
    from pathlib import Path

    config = load_sweep(Path(__file__).parent.parent / "configs" / f"{name}.yaml")
    assert len(cells(config)) >= 7
