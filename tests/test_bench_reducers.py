"""The bench compares like with like: product and plain transcription make the same choice, and every reducer gets its rows."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import vtc
from vtc.core import Selection
from vtc.eval import bench
from vtc.eval.bench import plain, reducers
from vtc.eval.bench.reducers import Row, Task, Trend, cases, measure, prepare

CASES = cases()
runner = CliRunner()


def indices(chosen: Selection) -> list[list[int]]:
    """Kept positions of every image, padding left out."""
    valid = torch.ones_like(chosen.index, dtype=torch.bool) if chosen.valid is None else chosen.valid
    return [row[real].tolist() for row, real in zip(chosen.index, valid, strict=True)]


@pytest.mark.parametrize(("rows", "cols", "keep"), [(6, 8, 12), (13, 11, 37)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[" ".join([n, *map(str, o.values())]) for n, o in CASES])
def test_product_and_transcription_make_the_same_choice(name, options, rows, cols, keep) -> None:
    task = prepare(name, options, rows, cols, keep, (48, 128))
    assert task.plain is not None, f"{name} has no transcription: write one in eval/bench/plain.py"
    for (part, _), got, want in zip(task.steps, task.product(), task.transcription(), strict=True):
        if isinstance(got, Selection):
            assert indices(got) == indices(want), part
            assert (got.features is None) == (want.features is None)
            if got.features is not None:
                torch.testing.assert_close(got.features, want.features, atol=1e-4, rtol=1e-4)
        elif isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, want)
        elif got is not None and isinstance(got[0], torch.Tensor):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        elif got is not None and got[1] is not None:
            assert torch.equal(got[1], want[1])
        else:
            assert (got is None) == (want is None)
    kept = [len(indices(s)[0]) for s in task.product() if isinstance(s, Selection)]
    assert not kept or min(kept) < rows * cols or name in ("skipspan", "todre"), (
        "the comparison is of something that was chosen"
    )


def test_every_registered_reducer_is_measured() -> None:
    assert {name for name, _ in CASES} == set(vtc.list_reducers())
    assert {name for name, _ in plain.PLAIN} <= set(vtc.list_reducers())


def test_equal_scores_go_to_the_first_in_both() -> None:
    task = prepare("fastv", {}, 4, 4, 5, (8, 8))
    part, given = task.steps[0]
    flat = dataclasses.replace(given, taps={"last_attn": torch.ones(1, 16)})
    task.steps = [(part, flat)]
    assert indices(task.product()[0]) == indices(task.transcription()[0]) == [[0, 1, 2, 3, 4]]


def test_rows_of_a_reducer_without_a_transcription() -> None:
    task = dataclasses.replace(prepare("uniform", {}, 4, 4, 5, (8, 8)), plain=None)
    (row,) = measure(task, 16, 2, {})
    assert (row.reducer, row.provider, row.speedup_vs_plain) == ("uniform", "vtc", None)
    assert row.ms_p20 <= row.ms_p50 <= row.ms_p80


def test_what_does_not_fit_or_takes_too_long_is_not_run() -> None:
    def never(part, given):
        raise AssertionError("run in spite of the estimate")

    base = prepare("uniform", {}, 4, 4, 5, (8, 8))
    big = dataclasses.replace(base, plain=plain.Plain(never, matrices=1.0))
    product, other = measure(big, 50_000, 1, {})
    assert product.ms_p50 > 0 and other.ms_p50 is None and other.note == "not run: needs 10 GB"
    slow = dataclasses.replace(base, plain=plain.Plain(never, matrices=0.0))
    trends = {"plain": Trend([(1000, 1.0), (2000, 8.0)])}
    _, other = measure(slow, 8000, 1, trends)
    assert other.note == "not run: > 60 s estimated"
    _, other = measure(slow, 8000, 1, trends)
    assert other.note == "not run: > 60 s estimated", "larger sizes stay out, too"


def test_trend_continues_the_growth() -> None:
    assert Trend().expect(10) == 0.0
    assert Trend([(10, 1.0), (20, 4.0)]).expect(40) == pytest.approx(16.0)
    assert Trend([(10, 1.0), (20, 1.0)]).expect(40) == pytest.approx(2.0), "never below linear"


def test_peak_memory_sees_a_large_tensor() -> None:
    _, peak = reducers.peak_of(lambda: torch.ones(64, 1024, 1024).sum())
    if peak is not None:  # systems that tell
        assert peak > 200


def test_signals_resemble_what_is_tapped() -> None:
    task = prepare("dart", {}, 4, 5, 8, (16, 24))
    _, given = task.steps[0]
    assert given.final_states.shape == (1, 20, 24) and given.text_pivots.shape == (1, 4, 24)
    assert given.places[0].diff().eq(1).all() and given.key_norm.gt(0).all()
    _, given = prepare("aim", {}, 4, 5, 8, (16, 24)).steps[0]
    assert given.features.shape == (1, 20, 16) and given.all_keys.shape == (1, 20, 1024)


def test_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reducers, "SIZES", {64: (8, 8, 9), 100: (10, 10, 12)})
    app = typer.Typer()
    bench.register(app)
    out = tmp_path / "deep" / "rows.csv"
    done = runner.invoke(
        app, ["bench", "reducers", "--only", "divprune", "--only", "fastv", "--repeats", "2", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["reducer"], r["n"], r["provider"]) for r in rows] == [
        (name, n, provider) for name in ("divprune", "fastv") for n in ("64", "100") for provider in ("vtc", "plain")
    ]
    assert all(float(r["ms_p50"]) > 0 and r["torch"] and r["threads"] and r["device"] == "cpu" for r in rows)
    assert "n=64: median" in done.output
    done = runner.invoke(app, ["bench", "reducers", "--only", "uniform", "--n", "64", "--repeats", "1", "--json"])
    data = json.loads(done.stdout)
    assert {f.name for f in dataclasses.fields(Row)} == set(data["rows"][0])
    assert data["commit"] is not None and len(data["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "error"), [(["--n", "7"], vtc.UnknownArgumentError), (["--only", "divprun"], vtc.UnknownReducerError)]
)
def test_unknown_sizes_and_reducers_are_refused(arguments, error) -> None:
    app = typer.Typer()
    bench.register(app)
    done = runner.invoke(app, ["bench", "reducers", *arguments])
    assert isinstance(done.exception, error)


def test_task_label_names_the_options() -> None:
    task = prepare("todre", {"diversity": "kcenter"}, 4, 4, 5, (8, 8))
    assert isinstance(task, Task) and task.label == "todre diversity=kcenter" and task.keep == 5
