"""``vtc bench kernels`` and ``vtc bench model``: they measure what they say, and refuse what they cannot."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from vtc import kernels
from vtc.eval.bench import cases, register
from vtc.eval.bench import kernels as bench
from vtc.eval.bench import model as models

app = typer.Typer()
register(app)
SMALL = dataclasses.replace(cases.PRESETS["cpu"], sizes=(48,), width=32, heads=2, head_width=16, seconds=0.0, edge=64)
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(cases.PRESETS, "cpu", SMALL)
    monkeypatch.setitem(cases.SIZES, 48, 6)


def test_the_plain_algorithms_do_what_the_ops_do(small):
    seen = {}
    for case in cases.cases(48, SMALL, CPU):
        seen[case.op] = case.call(getattr(kernels, case.op)), case.plain()
    assert sorted(seen) == sorted(kernels.ACCELERATED)
    for op in ("farthest_point", "farthest_point_weighted", "greedy_dpp", "max_sum"):
        assert seen[op][0][0].tolist() == seen[op][1]
    for op in ("topk_sorted", "nearest_centre"):
        assert torch.equal(*seen[op])
    for op in ("merge_scatter", "transition_score", "attention_rows", "attention_colsum"):
        torch.testing.assert_close(*seen[op], atol=1e-4, rtol=1e-4)
    assert int(seen["most_isolated"][0]) == seen["most_isolated"][1]
    assert torch.equal(seen["pairwise_top1"][0][1], seen["pairwise_top1"][1].indices)
    assert torch.equal(seen["k_medoids"][0][0][0], seen["k_medoids"][1])
    torch.testing.assert_close(seen["k_means"][0][0][0], seen["k_means"][1], atol=1e-4, rtol=1e-4)
    for mine, plain in zip(seen["select_compact"][0][1], seen["select_compact"][1][1], strict=True):
        assert torch.equal(mine, plain)


def test_rows_of_kernels(small, tmp_path):
    file = tmp_path / "new" / "kernels.csv"
    command = ["bench", "kernels", "--preset", "cpu", "--no-compile", "--only", "merge_scatter", "--only", "max_sum"]
    run = CliRunner().invoke(app, [*command, "--out", str(file)])
    assert run.exit_code == 0, run.output
    assert len([line for line in run.stdout.splitlines() if line.startswith(("merge_scatter", "max_sum"))]) == 2
    rows = list(csv.DictReader(file.open()))
    assert [r["provider"] for r in rows] == [p for p in bench.PROVIDERS if p != "compile"] * 2
    by = {(r["op"], r["provider"]): r for r in rows}
    assert by["max_sum", "triton"]["note"] == "not run: no GPU" and not by["max_sum", "triton"]["ms_p50"]
    torch_row = by["merge_scatter", "torch"]
    assert 0 < float(torch_row["ms_p20"]) <= float(torch_row["ms_p50"]) <= float(torch_row["ms_p80"])
    moved = 4 * 48 * 32 + 6 * 32 * 4  # what goes in and what comes out
    assert float(torch_row["gb_s"]) == pytest.approx(moved / float(torch_row["ms_p50"]) / 1e6, rel=1e-2)
    assert {"device", "torch", "roof_gb_s", "commit"} <= set(torch_row)


def test_rows_of_a_model(monkeypatch):
    shape = models.MODELS["wide-and-flat"]
    words = dict(shape.config["text_config"], hidden_size=32, intermediate_size=64, num_attention_heads=2)
    eyes = dict(shape.config["vision_config"], hidden_size=32, intermediate_size=64, image_size=56)
    config = {**shape.config, "text_config": words, "vision_config": eyes}
    monkeypatch.setitem(models.MODELS, "wide-and-flat", dataclasses.replace(shape, config=config, picture=(56, 56), keep=(4,)))
    command = ["bench", "model", "--preset", "cpu", "--reducer", "divprune", "--reducer", "fastv", "--repeats", "1", "--json"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    rows = json.loads(run.stdout)["rows"]
    assert [(r["reducer"], r["keep"]) for r in rows] == [("none", None), ("divprune", 4), ("fastv", 4)]
    none, before, inside = rows
    assert none["visual_tokens"] == 16 and none["bound_ttft"] == none["bound_prefill"] == 1
    assert before["avg_tokens"] == 4 and before["bound_prefill"] > inside["bound_prefill"] > 1
    assert before["kv_mb"] / before["unreduced_kv_mb"] == pytest.approx((4 + models.TEXT) / (16 + models.TEXT))
    assert before["share_ttft"] == pytest.approx(before["speedup_ttft"] / before["bound_ttft"])
    assert before["reducer_ms"] > 0 == none["reducer_ms"] and before["attention"] == "sdpa"


@pytest.mark.parametrize(
    "command, said",
    [
        (["kernels", "--only", "max_sun"], "no op 'max_sun' has a Triton version"),
        (["kernels", "--n", "77"], "there is no size 77"),
        (["model", "--model", "llava-15-7b"], "did you mean 'llava-1.5-7b'"),
        (["model", "--reducer", "fastw"], "did you mean 'fastv'"),
        *([] if torch.cuda.is_available() else [(["kernels", "--preset", "gpu"], "--preset cpu")]),
        *([] if torch.cuda.is_available() else [(["model", "--preset", "gpu"], "--preset cpu")]),
    ],
)
def test_refusals(command, said):
    run = CliRunner().invoke(app, ["bench", *command])
    assert run.exit_code != 0 and said in " ".join((run.output + str(run.exception)).split())
