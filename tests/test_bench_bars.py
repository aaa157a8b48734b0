"""``vtc bench bars`` and ``plot``: verdicts follow the rows, the run measures what the bars ask for, nothing stops it half-way."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from vtc import kernels as ops
from vtc.errors import StoreError
from vtc.eval.bench import bars, cases, common, equality, model, plots, register
from vtc.inspect import reason_against, skeleton
from vtc.registry import create

app = typer.Typer()
register(app)
HERE = Path(__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
OPS = dataclasses.replace(cases.PRESETS["cpu"], sizes=(48,), width=32, heads=2, head_width=16, seconds=0.0, edge=64)


def bar(what: str, device: str = "cuda") -> bars.Bar:
    (found,) = [b for b in bars.BARS if b.what.startswith(what) and b.device == device]
    return found


def tiny(name: str) -> model.Shape:
    """The shape of a model, with layers next to nothing."""
    shape = model.MODELS[name]
    words = dict(shape.config["text_config"], hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3)
    eyes = dict(shape.config["vision_config"], hidden_size=32, intermediate_size=64, image_size=56, num_hidden_layers=3)
    config = {**shape.config, "text_config": words, "vision_config": eyes}
    return dataclasses.replace(shape, config=config, picture=(56, 56), keep=(4,))


@pytest.fixture
def small(monkeypatch):
    """The benches for a CPU, small."""
    monkeypatch.setitem(cases.PRESETS, "cpu", OPS)
    monkeypatch.setitem(cases.SIZES, 48, 6)
    monkeypatch.setitem(model.MODELS, "wide-and-flat", tiny("wide-and-flat"))
    preset = dataclasses.replace(model.PRESETS["cpu"], reducers=("divprune", "fastv"), repeats=1, decode_steps=1)
    monkeypatch.setitem(model.PRESETS, "cpu", preset)
    monkeypatch.setattr(model, "PAIRS", 2)


# --------------------------------------------------------------------------------------------------------------- verdicts
def far(**speedups: float | None) -> list[dict[str, object]]:
    base = {"provider": "triton", "n": 2880, "device_type": "cuda"}
    return [base | {"op": op, "speedup_vs_plain": x, "note": "" if x else "failed: Boom"} for op, x in speedups.items()]


@pytest.mark.parametrize(
    ("rows", "state", "said"),
    [
        (far(farthest_point=25.0, max_sum=20.0), "met", "20.0x max_sum .. 25.0x farthest_point"),
        (far(farthest_point=25.0, max_sum=19.9), "NOT met", "1 of 2 miss it: 19.9x max_sum; best 25.0x farthest_point"),
        (far(farthest_point=9.0, max_sum=8.0), "NOT met", "2 of 2 miss it: 8.0x max_sum, 9.0x farthest_point"),
        (far(farthest_point=25.0), "open", "25.0x (1); 1 of 2 without a number, such as max_sum: not measured"),
        (far(farthest_point=25.0, max_sum=None), "open", "25.0x (1); 1 of 2 without a number, such as max_sum: failed: Boom"),
        (far(farthest_point=2.0, max_sum=None), "NOT met", "1 of 1 miss it: 2.0x farthest_point; 1 of 2 without a number"),
        ([], "waiting", "not measured: `vtc bench bars` on a GPU does it"),
        ([r | {"device_type": "cpu"} for r in far(farthest_point=25.0, max_sum=25.0)], "waiting", "on a GPU"),
        ([r | {"n": 576} for r in far(farthest_point=25.0, max_sum=25.0)], "waiting", "on a GPU"),
        ([r | {"provider": "torch"} for r in far(farthest_point=25.0, max_sum=25.0)], "waiting", "on a GPU"),
    ],
)
def test_a_verdict_follows_the_rows(rows, state, said):
    verdict = bars.judge(bar("farthest_point, max_sum"), rows)
    assert verdict.state == state and said in verdict.measured


def added(reducer: str, share: float | None, **more: object) -> dict[str, object]:
    where = {
        "model": "llava-next-7b",
        "keep": 160.0,
        "batch": 1,
        "device_type": "cuda",
        "note": "7 rounds",
        "avg_tokens": 160.0,
    }
    return where | {"reducer": reducer, "overhead_share": share, "speedup_prefill": 7.0, "share_prefill": 0.95} | more


def test_selection_and_hooks_of_every_reducer_before_the_decoder():
    before = model.before_the_decoder()
    assert {"random", "divprune", "visionzip", "tome", "downsample"} <= set(before) and not {"fastv", "todre", "aim"} & set(
        before
    )
    mine = bar("selection + hooks, 2,880")
    rows = [added(name, 0.004) for name in before]
    assert bars.judge(mine, rows).state == "met"
    rows[0]["overhead_share"] = 0.012
    verdict = bars.judge(mine, rows)
    assert verdict.state == "NOT met" and f"1.20% {before[0]}" in verdict.measured
    rows[0] |= {"overhead_share": None, "note": "out of memory: OutOfMemoryError"}
    verdict = bars.judge(mine, rows)
    assert verdict.state == "open" and verdict.missing == {before[0]: "out of memory: OutOfMemoryError"}
    rows[0]["note"] = "does not apply: because"
    assert bars.judge(mine, rows).state == "met", "what does not run on this model is not asked for"
    assert bars.judge(mine, [r | {"keep": 320.0} for r in rows]).state == "waiting", "other budgets are other rows"


def test_prefill_is_judged_where_the_decoder_got_no_more_than_the_budget():
    before = model.before_the_decoder()
    rows = [added(name, 0.004) for name in before]
    rows[1] |= {"avg_tokens": 2928.0, "speedup_prefill": 1.0}
    fast, share = [b for b in bars.BARS if b.what.startswith("prefill")]
    assert bars.judge(fast, rows).state == bars.judge(share, rows).state == "met"
    rows[2] |= {"speedup_prefill": 6.7, "share_prefill": 0.89}
    assert bars.judge(fast, rows).state == bars.judge(share, rows).state == "NOT met"
    assert bars.judge(fast, [r | {"avg_tokens": None, "speedup_prefill": None} for r in rows]).state == "open"


def test_memory_is_judged_per_token_and_equality_by_mismatches():
    row = {"provider": "triton", "op": "attention_colsum", "n": 7290, "device_type": "cuda"}
    memory = bar("attention_colsum")
    assert bars.judge(memory, [row | {"peak_mb": 0.5}]).state == "met"
    square = 4e-6 * 7290 * 7290  # one map of one head
    assert bars.judge(memory, [row | {"peak_mb": square}]).state == "NOT met"
    alike = [
        {"op": op, "n": n, "device_type": "cuda", "mismatches": 0} for op in ops.ACCELERATED for n in cases.PRESETS["gpu"].sizes
    ]
    assert bars.judge(bar("every Triton op against"), alike).state == "met"
    assert bars.judge(bar("every Triton op against"), [*alike[1:], alike[0] | {"mismatches": 3}]).state == "NOT met"
    assert bars.judge(bar("every Triton op against"), alike[1:]).state == "open"


def test_bars_of_a_cpu():
    row = {"provider": "torch", "device_type": "cpu", "speedup_vs_plain": 1.0}
    rows = [row | {"op": op, "n": n} for op in ops.ACCELERATED for n in cases.PRESETS["cpu"].sizes]
    assert bars.judge(bar("every op", "cpu"), rows).state == "met"
    rows[3]["speedup_vs_plain"] = 0.99
    assert bars.judge(bar("every op", "cpu"), rows).state == "NOT met"
    row = {"model": "wide-and-flat", "batch": 1, "device_type": "cpu", "visual_tokens": 576, "share_ttft": 0.86}
    rows = [row | {"reducer": r, "keep": float(k)} for r in model.PRESETS["cpu"].reducers for k in (144, 64)]
    assert bars.judge(bar("first token", "cpu"), rows).state == "met"
    rows[0]["share_ttft"] = 0.84
    assert bars.judge(bar("first token", "cpu"), rows).state == "NOT met"


@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
def test_the_plan_measures_what_the_bars_ask_for_and_that_first(device):
    preset = model.PRESETS["gpu" if device.type == "cuda" else "cpu"]
    order = [(name, row) for name, rows in bars.plan(preset, device) for row in rows]
    assert len(order) == len(set(order)), "nothing is measured twice"
    for one in bars.BARS:
        if one.table == "model" and one.device == device.type:
            name = one.where["model"]
            there = {
                f"{r} {k}" if len(one.by) > 1 else r for n, (r, k, b) in order if n == name and k in (one.where.get("keep", k),)
            }
            assert set(one.items()) <= there
    if device.type == "cuda":
        asked = [i for i, (n, (_, k, b)) in enumerate(order) if k == bars.BUDGETS.get(n) and b == 1]
        wanted = sum(len(model.before_the_decoder()) for _ in bars.BUDGETS)
        assert asked[:wanted][-1] < wanted + len(bars.BUDGETS), "all rows of bars stand in front, with a row of noise per model"
        assert {(n, row) for n in preset.models for row in model.rows_of(n, preset)} <= set(order), "and the rest follows"


# -------------------------------------------------------------------------------------------------------------- the command
def test_one_command_measures_writes_and_judges(small, tmp_path):
    out = tmp_path / "new" / "folder"
    common.write(out / "model.csv", [{"model": "of before", "device_type": d} for d in (None, "cpu", "cuda")])
    run = CliRunner().invoke(app, ["bench", "bars", "--preset", "cpu", "--minutes", "600", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert {p.name for p in out.iterdir()} == {"kernels.csv", "model.csv", "bars.md", "bars.json"}, "no GPU: no equality.csv"
    last = run.stdout.splitlines()
    assert last[-1].endswith("8 waiting") and sum(line.startswith("waiting GPU") for line in last) == 8
    verdicts = json.loads((out / "bars.json").read_text())
    mine = {v["what"]: v for v in verdicts if v["device"] == "cpu"}
    kernels = list(csv.DictReader((out / "kernels.csv").open()))
    assert set(mine["every op, at every size"]["found"]) == {f"{op} 48" for op in ops.ACCELERATED}
    by = {(r["op"], r["provider"]): r for r in kernels}
    assert by["max_sum", "compile"]["note"] == "not run: the twin decides on the host"
    twin, plain = by["merge_scatter", "torch"], by["merge_scatter", "plain"]
    assert float(twin["speedup_vs_plain"]) == pytest.approx(float(plain["ms_p50"]) / float(twin["ms_p50"]), rel=1e-3)
    assert float(twin["speedup_vs_twin"]) == 1 and twin["device_type"] == "cpu" and twin["triton"] is not None
    other, *rows = csv.DictReader((out / "model.csv").open())
    assert (other["model"], other["device_type"]) == ("of before", "cuda"), "new rows take the place of this device's old ones"
    assert [(r["reducer"], r["keep"].removesuffix(".0")) for r in rows] == [("none", ""), ("divprune", "4"), ("fastv", "4")]
    assert mine["first token, keep <= 25 % (wide-and-flat)"]["found"].keys() == {"divprune 4", "fastv 4"}
    table = (out / "bars.md").read_text()
    assert table.count("| waiting |") == 8 and "CPU: " in table and torch.__version__.partition("+")[0] in table

    # rows of a GPU that are in the folder stay, and are judged; nothing is measured
    gpu = [dict.fromkeys(kernels[0]) | r | {"device": "H100", "torch": "2"} for r in far(farthest_point=25.0, max_sum=2.0)]
    common.write(out / "kernels.csv", common.read(out / "kernels.csv") + gpu)
    run = CliRunner().invoke(app, ["bench", "bars", "--preset", "cpu", "--minutes", "0", "--out", str(out), "--json"])
    again = {(v["what"], v["device"]): v for v in json.loads(run.stdout)}
    assert again["farthest_point, max_sum, 2,880 -> 160", "cuda"]["found"] == {"farthest_point": 25.0, "max_sum": 2.0}
    assert again["every op, at every size", "cpu"]["found"] == pytest.approx(mine["every op, at every size"]["found"], rel=1e-3)
    assert "GPU: H100" in (out / "bars.md").read_text()


def test_strict_ends_with_one_where_a_bar_of_this_device_is_not_met(tmp_path):
    command = ["bench", "bars", "--preset", "cpu", "--minutes", "0", "--strict", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 1, "what was not measured is not met"
    row = {"device": "x", "device_type": "cpu", "threads": 1, "torch": "2", "transformers": "5", "commit": ""}
    kernels = [
        row | {"op": op, "n": n, "provider": "torch", "speedup_vs_plain": 2}
        for op in ops.ACCELERATED
        for n in cases.PRESETS["cpu"].sizes
    ]
    models = [
        row | {"model": "wide-and-flat", "batch": 1, "visual_tokens": 576, "share_ttft": 0.9, "reducer": r, "keep": k}
        for r in model.PRESETS["cpu"].reducers
        for k in (144, 64)
    ]
    common.write(tmp_path / "kernels.csv", kernels)
    common.write(tmp_path / "model.csv", models)
    assert CliRunner().invoke(app, command).exit_code == 0


def test_the_branch_for_gpus_runs_from_end_to_end():
    """On a GPU that is not there: every line runs, tensors stay on their devices, and all rows have numbers."""
    # -P: with the checkout on sys.path our kernels/ would be importable under Hugging Face's name
    run = subprocess.run([sys.executable, "-P", str(HERE / "bars_on_a_gpu.py")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert {r["op"] for r in found["equality"] if r["mismatches"] == 0} == set(ops.ACCELERATED), found["equality"]
    ran = {(r["op"], r["provider"]) for r in found["kernels"] if r["ms_p50"]}
    lists = {(op, "plain") for op in ("farthest_point", "farthest_point_weighted", "max_sum")}  # as indices: they need a driver
    assert ran == {(op, name) for op in ops.ACCELERATED for name in ("triton", "torch", "plain")} - lists, found["kernels"]
    assert all(r["dtype"] == "bfloat16" and r["device_type"] == "cuda" for r in found["kernels"])
    assert [r["note"] for r in found["model"] if not r["ttft_ms"] or r["note"] != "1 rounds"] == []
    assert {(r["model"], r["reducer"], r["batch"]) for r in found["model"]} == {
        (name, reducer, 1) for name in bars.BUDGETS for reducer in ("none", "divprune", "fastervlm", "visionzip", "fastv")
    } | {("llava-next-7b", "divprune", 2)}
    assert all(r["peak_mb"] and r["overhead_ms"] for r in found["model"] if r["reducer"] == "divprune" and r["batch"] == 1)


# ------------------------------------------------------------------------------------------------------------- robustness
def test_what_does_not_fit_or_fails_is_a_row_and_the_run_goes_on(small, monkeypatch):
    from vtc.eval import speed

    real = speed.measure

    def measure(built, inputs, reducer, **how):
        if reducer is not None and reducer.name == "divprune":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 50.00 GiB.\nmore")
        if reducer is not None and reducer.name == "random":
            raise RuntimeError  # without a word
        return real(built, inputs, reducer, **how)

    monkeypatch.setattr(speed, "measure", measure)
    wanted = [("divprune", 4, 2), ("random", 4, 1), ("fastv", 4, 1), ("flowcut", 40, 1)]
    plan = [("wide-and-flat", wanted)]
    rows = list(model.run(plan, model.PRESETS["cpu"], CPU, math.inf))
    assert rows[0].note == "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 GiB."
    assert rows[1].note == "failed: RuntimeError: " and rows[2].ttft_ms > 0
    assert rows[3].note.startswith(("does not apply: ", "1 rounds"))
    assert "out of memory" in model.summary(rows)[1]
    monkeypatch.setattr(model, "build", lambda *_: torch.empty(2**62))  # a model that does not fit
    rows = list(model.run(plan, model.PRESETS["cpu"], CPU, math.inf))
    assert len(rows) == 4 and all(r.note.startswith("failed: RuntimeError") for r in rows)


def test_nothing_is_begun_that_may_not_be_done_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    done = []
    for seconds in common.before(100, (3, 5, 40, 30, 1)):
        done.append(seconds)
        now[0] += seconds
    assert done == [3, 5, 40], "after 48 seconds another item of that length might take until the 128th"


def test_tables_keep_what_is_missing_and_refuse_what_is_none(tmp_path):
    rows = [{"a": 1.5, "note": "", "b": "none"}, {"a": math.nan, "note": "x, y", "b": "NA"}]
    common.write(tmp_path / "t.csv", rows)
    assert common.read(tmp_path / "t.csv") == [{"a": 1.5, "note": None, "b": "none"}, {"a": None, "note": "x, y", "b": "NA"}]
    assert common.read(tmp_path / "nothing.csv") == []
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(StoreError, match="cannot read .*empty.csv"):
        common.read(tmp_path / "empty.csv")
    with pytest.raises(StoreError, match="cannot write"):
        common.write(tmp_path / "t.csv" / "t.csv", rows)


# ------------------------------------------------------------------------------------------------------------------ shapes
@pytest.mark.parametrize(
    ("name", "tokens", "parameters"),
    [("llava-1.5-7b", 576, 7.06e9), ("llava-next-7b", 2928, 7.06e9), ("qwen2.5-vl-7b", 1296, 8.29e9)],
)
def test_shapes_of_7b(name, tokens, parameters):
    from transformers import AutoConfig

    from vtc.families import family_of

    sizes = dict(model.MODELS[name].config)
    built = skeleton(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    weights = sum(p.numel() for p in built.parameters())
    assert weights == pytest.approx(parameters, rel=0.01)
    inputs = model.prompt(built, model.MODELS[name], 32)
    token = getattr(built.config, "image_token_id", None) or built.config.image_token_index
    assert (inputs["input_ids"] == token).sum(1).tolist() == [tokens] * 32
    assert inputs["input_ids"].shape[1] == tokens + model.TEXT + 2 * (name == "qwen2.5-vl-7b")
    text = built.config.text_config
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    mlp = 3 * text.intermediate_size  # of one layer at a time
    total = 2 * (weights + inputs["input_ids"].numel() * (cached + mlp + 4 * text.hidden_size))
    assert total < 76 * 2**30, "a batch of 32 fits a GPU of 78 GiB"
    if name in bars.BUDGETS:
        facts = family_of(built).facts
        against = {r: reason_against(create(r, keep=bars.BUDGETS[name]), facts) for r in model.before_the_decoder()}
        assert not any(against.values()), "every reducer of the bars runs on this model"


def test_the_ideal_run_is_an_unpatched_one_on_fewer_tokens():
    shape = tiny("wide-and-flat")
    built = model.build(shape, CPU, torch.float32)
    inputs = model.prompt(built, shape, 1)
    with torch.no_grad():
        whole = built(**inputs, use_cache=True, output_hidden_states=True)
        with model.shortened(built, 30):
            short = built(**inputs, use_cache=True, logits_to_keep=1)
        assert torch.equal(built(**inputs).logits, whole.logits), "and leaves nothing behind"
    assert short.past_key_values.get_seq_length() == 30
    torch.testing.assert_close(
        short.logits[:, -1], whole.logits[:, 29], atol=1e-4, rtol=1e-4
    )  # causal: what follows is not seen


# --------------------------------------------------------------------------------------------------------------- equality
@pytest.fixture(scope="module")
def results():
    """Every op on small inputs, and what its twin says."""
    cases.SIZES[96] = 12
    made = {case.op: (case, case.call(getattr(ops, case.op).__wrapped__)) for case in cases.cases(96, OPS, CPU)}
    del cases.SIZES[96]
    return made


@pytest.mark.parametrize("op", ops.ACCELERATED)
def test_a_wrong_result_is_seen(results, op):
    case, twin = results[op]
    checked, wrong, first = equality.judge(case, twin, twin)
    assert checked > 0 and (wrong, first) == (0, "")
    tensors = equality.flat(twin)
    part = 1 if op == "pairwise_top1" else 0  # the index, which is judged by its cosine
    value = tensors[part]
    if value.is_floating_point():
        bad = value.clone()
        bad.view(-1)[-1] += 0.01 * value.abs().max()
    elif op in ("nearest_centre", "pairwise_top1"):
        bad = (value + 1) % 12
    elif op == "most_isolated":
        bad = (value + 1) % 96
    else:
        bad = value.flip(-1)  # of greedy subsets: the right tokens in the wrong order
    if op == "k_medoids":
        bad = value.roll(1, -1)
    found = [bad if i == part else t for i, t in enumerate(tensors)]
    _, wrong, first = equality.judge(case, found, twin)
    assert wrong > 0 and first.startswith(f"result {'' if op in ('k_means', 'pairwise_top1') else 0}"), first
    _, wrong, first = equality.judge(case, [tensors[0][..., :1], *tensors[1:]], twin)
    assert wrong or op == "most_isolated", "another shape"


def test_an_op_that_does_not_run_is_a_row(monkeypatch):
    monkeypatch.setitem(cases.SIZES, 48, 6)
    (row,) = equality.check([(48, ["max_sum"])], OPS, CPU, math.inf)
    assert row.mismatches is None and row.note.startswith("failed: KernelError: 'max_sum' cannot run in Triton")


# ------------------------------------------------------------------------------------------------------------------ plots
def test_plots_come_from_the_files(tmp_path):
    kernels = [
        {"op": op, "provider": p, "n": n, "device": "H100", "speedup_vs_plain": x, "roofline_share": x}
        for op in ("max_sum", "merge_scatter")
        for n in (576, 2880)
        for p, x in (("triton", 30.0), ("torch", 3.0), ("compile", None), ("plain", 1.0))
    ]
    row = {"device": "H100", "model": "llava-next-7b", "visual_tokens": 2928, "bound_prefill": 13.5}
    models = [
        row | {"reducer": r, "keep": k, "batch": b, "speedup_prefill": s, "prompts_s": 40.0 * b, "unreduced_prompts_s": 9.0 * b}
        for r, k, b, s in (("none", None, 1, 1.0), ("divprune", 160, 1, 7.0), ("fastv", 160, 1, 2.0), ("divprune", 160, 8, 7.0))
    ]
    with pytest.raises(StoreError, match="nothing to draw in .*vtc bench bars --out"):
        plots.plot(tmp_path)
    common.write(tmp_path / "kernels.csv", kernels)
    common.write(tmp_path / "model.csv", models)
    figures = plots.draw(tmp_path)
    assert list(figures) == ["kernels-speedup", "kernels-roofline", "model-speedup", "model-throughput"]
    first = figures["kernels-speedup"].axes[0]
    assert first.get_title(loc="left") == "H100, 576 tokens"
    drawn = {line.get_label(): list(line.get_xdata()) for line in first.lines}
    assert drawn["Triton"] == [30.0, 30.0] and drawn["torch twin"] == [3.0, 3.0] and drawn["torch.compile of the twin"] == []
    (panel,) = [a for a in figures["model-speedup"].axes if a.get_visible()]
    assert [t.get_text() for t in panel.get_yticklabels()] == ["fastv", "divprune"]
    assert list(panel.lines[0].get_xdata()) == [7.0, 2.0] and list(panel.lines[1].get_xdata()) == [13.5, 13.5]
    (panel,) = figures["model-throughput"].axes
    assert {line.get_label(): list(line.get_ydata()) for line in panel.lines}["unreduced"] == [9.0, 72.0]
    run = CliRunner().invoke(app, ["bench", "plot", str(tmp_path), "--out", str(tmp_path / "p"), "--format", "svg"])
    assert (
        run.exit_code == 0 and len(run.stdout.split()) == 4 and all(Path(p).stat().st_size > 3000 for p in run.stdout.split())
    )
    run = CliRunner().invoke(app, ["bench", "plot", str(tmp_path), "--format", "gif"])
    assert run.exit_code != 0 and "no picture format 'gif'" in str(run.exception)
