"""A tiny sweep on the pocket model from end to end: table, resume after a kill, damage, failing cells, the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import vtc
from vtc.cli import main
from vtc.core import Reducer
from vtc.errors import ConfigError, StoreError
from vtc.eval.executors import InProcess
from vtc.eval.results import collect
from vtc.eval.run import Sweep
from vtc.eval.speed import run_once
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.tables import render
from vtc.eval.worker import Worker

YAML = """\
data: {scenes: {n: 12, types: [color, count]}, easy_vqa: {n: 4}}
budgets: [49]
reducers: [fastv]
threads: 1
speed: {repeats: 3, warmup: 1, decode_steps: 2}
"""
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sweep():
    return Sweep(parse_sweep(YAML), "tiny.yaml")


@pytest.fixture(scope="module")
def local():
    """One worker for all sweeps of this module: the model is loaded once."""
    return InProcess()


@pytest.fixture(scope="module")
def prepared(sweep, local):
    """The worker with model and questions."""
    local.worker.prepare(sweep.job(sweep.planned[0], "accuracy"))
    return local.worker


@pytest.fixture(scope="module")
def finished(sweep, local, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("sweep") / "store", create=True)
    outcome = sweep.run(store, QUIET, executor=local)
    assert (outcome.done, outcome.skipped, outcome.failed) == (5, 0, 0)
    return store


def accuracy_table(store: Store) -> str:
    return render(collect(store), "md", accuracy_only=True, by_type=True)


def test_the_cells_hold_what_was_measured(finished):
    results = collect(finished)
    assert [r.label for r in results.rows] == ["none", "random", "uniform", "downsample", "fastv"]
    full = results.unreduced
    assert full.kept == full.avg == 196 and full.paired.ratio.value == 1 and full.accuracy.value > 0.6
    for row in results.rows[1:]:
        assert row.kept == 49 and row.flops < full.flops and row.mismatch < 1e-4 and row.kv_bytes < full.kv_bytes
        assert row.speed["reduced"]["prefill_ms"]["value"] > 0 and row.speed["reduced"]["reducer_ms"]["value"] > 0
        assert row.speed["reduced"]["kv_bytes"] == row.kv_bytes and row.speed["unreduced"]["kv_bytes"] == full.kv_bytes
    assert results.rows[-1].avg == (2 * 196 + 4 * 49) / 6  # layer 2 of six
    assert set(results.types) == {"color", "count", "easy_yesno", "easy_open"}
    for cell in finished.read_sweep()["cells"]:
        found = finished.get(cell["id"])
        assert len(found.samples) == 16 and found.metrics["correct"] == sum(s["correct"] for s in found.samples)
        assert {"id", "type", "gold", "answer", "correct", "kept"} <= set(found.samples[0])
        assert all(s["kept"] == found.metrics["tokens"]["kept"] for s in found.samples)
        assert found.env["machine"]["torch_threads"] == 1 and found.env["versions"]["vtc"] == vtc.__version__
        assert {"commit", "machine", "versions", "seed"} <= set(found.env)


def test_finished_cells_are_skipped(sweep, finished, monkeypatch):
    monkeypatch.setattr(Worker, "run", None)
    outcome = sweep.run(finished, QUIET)
    assert (outcome.done, outcome.skipped, outcome.failed) == (0, 5, 0)


def test_a_sweep_broken_off_goes_on_where_it_was_and_ends_with_the_same_table(sweep, local, finished, tmp_path, monkeypatch):
    """At the third cell, by what no handler of errors stops. (Processes that are killed: test_eval_resume.)"""
    put, begun = Store.put, []

    def breaking(self, *args):
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt
        put(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "put", breaking)
        sweep.run(Store(tmp_path / "s", create=True), QUIET, executor=local)
    store = Store(tmp_path / "s")
    whole = {p.name for p in store.cells.iterdir() if store.get(p.name)}
    assert len(whole) == 2
    assert [r.label for r in collect(store).rows] == ["none", "random"] and len(collect(store).missing) == 3
    answered = []
    original = Worker.accuracy
    monkeypatch.setattr(
        Worker, "accuracy", lambda self, job, *rest: answered.append(job.cell.label) or original(self, job, *rest)
    )
    assert sweep.run(store, QUIET, executor=local).failed == 0
    assert answered == ["uniform", "downsample", "fastv"]
    assert accuracy_table(store) == accuracy_table(finished)


def copy(store: Store, target) -> Store:
    import shutil

    shutil.copytree(store.root, target)
    return Store(target)


def test_a_damaged_cell_is_moved_aside_and_redone(sweep, local, finished, tmp_path):
    store = copy(finished, tmp_path / "s")
    broken = sweep.planned[2].id
    (store.cells / broken / "samples.jsonl").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        collect(store)
    outcome = sweep.run(store, QUIET, executor=local)
    assert (outcome.done, outcome.skipped, outcome.failed) == (1, 4, 0)
    assert (store.root / "quarantine" / f"{broken}-0" / "samples.jsonl").read_text() == "{"
    assert accuracy_table(store) == accuracy_table(finished)


def test_other_speed_settings_repeat_the_speed_pass_only(sweep, local, finished, tmp_path, monkeypatch):
    store = copy(finished, tmp_path / "s")
    other = Sweep.__new__(Sweep)
    other.__dict__.update(sweep.__dict__)
    other.config = sweep.config.model_copy(update={"speed": sweep.config.speed.model_copy(update={"decode_steps": 1})})
    monkeypatch.setattr(Worker, "accuracy", None)
    assert {other.state(store, p) for p in other.planned} == {"speed missing"}
    assert other.run(store, QUIET, executor=local).done == 5
    assert {other.state(store, p) for p in other.planned} == {"done"}


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(sweep, local, finished, tmp_path, monkeypatch):
    from vtc.reducers.uniform import Uniform

    def broken(self, signals):
        raise RuntimeError("no such luck")

    store = Store(tmp_path / "s", create=True)
    with monkeypatch.context() as patched:
        patched.setattr(Uniform, "select", broken)
        outcome = sweep.run(store, QUIET, executor=local)
    assert (outcome.done, outcome.failed) == (4, 1) and outcome.errors == ("uniform 49: RuntimeError: no such luck",)
    row = collect(store).rows[2]
    assert row.accuracy is None and row.error == "RuntimeError: no such luck"
    assert not hasattr(local.worker.model, "_vtc_handle")
    again = sweep.run(store, QUIET, executor=local)  # tried again, and well this time
    assert (again.done, again.skipped, again.failed) == (1, 4, 0)
    assert accuracy_table(store) == accuracy_table(finished)


def test_what_the_model_refuses_is_refused_before_anything_is_written(tmp_path):
    text = YAML.replace("[49]", "[49, 500]")
    with pytest.raises(ConfigError, match=r"^tiny.yaml line 2: budgets\[1\]: keep=500 is above the 196 visual tokens"):
        Sweep(parse_sweep(text, source="tiny.yaml"), "tiny.yaml")
    text = YAML.replace("[fastv]", "[{name: fastv, options: {layer: 9}}]")
    with pytest.raises(ConfigError, match=r"^tiny.yaml line 3: reducers\[0\]: .*layer 9 is out of range"):
        Sweep(parse_sweep(text, source="tiny.yaml"), "tiny.yaml")
    with pytest.raises(ConfigError, match="data.scenes.*shade"):
        Sweep(parse_sweep(YAML.replace("[color, count]", "[shade]")), "tiny.yaml")


# -------------------------------------------------------------------------------------------------------------- speed
def test_the_parts_of_a_run_add_up(prepared):
    run = run_once(prepared.model, prepared.fixed, vtc.create("fastv", keep=49), 2)
    t = run.times
    assert 0 < t["vision_ms"] and 0 < t["prefill_ms"] and t["vision_ms"] + t["prefill_ms"] <= t["ttft_ms"]
    assert 0 < run.reducer_ms < t["ttft_ms"] and 0 < t["decode_ms"] and run.peak_bytes is None
    assert not hasattr(prepared.model, "_vtc_handle")


def test_a_cell_changes_its_address_with_its_code_and_options(sweep):
    from vtc.eval import env

    ids = {p.cell.label: p.id for p in sweep.planned}
    assert len(set(ids.values())) == 5
    assert len({i.partition("-")[0] for i in ids.values()}) == 5
    assert env.reducer_version(vtc.create("random", keep=4)) == env.reducer_version(vtc.create("random", keep=5))
    assert env.reducer_version(vtc.create("random", keep=4)) != env.reducer_version(vtc.create("uniform", keep=4))
    fastv = next(p for p in sweep.planned if p.cell.label == "fastv")
    changed = json.loads(json.dumps(fastv.config))
    changed["reducer"]["code"] = "0" * 16
    from vtc.eval.store import cell_id

    assert cell_id(json.loads(json.dumps(fastv.config))) == fastv.id != cell_id(changed)
    assert isinstance(replace(fastv.cell.reducer, keep=3), Reducer)


# ------------------------------------------------------------------------------------------------------- command line
def run_cli(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_sweep_command(finished, tmp_path, capsys, monkeypatch):
    file = tmp_path / "tiny.yaml"
    file.write_text(YAML)
    store = copy(finished, tmp_path / "s")
    code, out, err = run_cli(capsys, "sweep", str(file), "--out", str(store.root))
    assert code == 0 and "downsample" in out and "Report: " in out and "5 finished before" in err
    assert "<svg" in (store.root / "report.html").read_text()
    code, out, err = run_cli(capsys, "sweep", str(file), "--out", str(store.root), "--json")
    data = json.loads(out)
    assert code == 0 and data["skipped"] == 5 and [r["reducer"] for r in data["rows"]][0] == "none"
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(capsys, "sweep", str(file), "--dry-run", "--set", "budgets=[49, 22]", "--out", str(store.root))
    assert code == 0 and "4 of 9 cells to run on 16 questions" in out
    code, out, err = run_cli(capsys, "sweep", str(file), "--dry-run")
    assert code == 0 and "5 of 5 cells to run" in out and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "absent.yaml"], "no sweep file absent.yaml"),
        (["sweep", "{yaml}", "--set", "budgets=[0]"], "keep at least one visual token"),
        (["sweep", "{yaml}", "--set", "reducers=[fastvv]"], "did you mean 'fastv'"),
        (["sweep", "{yaml}", "--out", "{folder}"], "not a vtc results store"),
        (["sweep", "{yaml}", "--set", "budgets=[197]"], "budgets[0]: keep=197 is above the 196 visual tokens"),
        (["table", "absent"], "no results store at absent"),
        (["table", "{store}", "--format", "latx"], "did you mean 'latex'"),
        (["table"], "no results store in"),
        (["report"], "no results store in"),
        (["table", "{store}", "--output", "{yaml}/x.md", "--format", "md"], "cannot write"),
    ],
)
def test_refusals_are_one_line_and_a_code(finished, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(YAML)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    fill = {"yaml": str(tmp_path / "tiny.yaml"), "folder": str(tmp_path / "photos"), "store": str(finished.root)}
    code, out, err = run_cli(capsys, *(a.format(**fill) for a in arguments))
    assert code == 1 and out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err and not (tmp_path / "results").exists()


def test_a_failing_cell_makes_the_command_fail(tmp_path, capsys, monkeypatch):
    from vtc.reducers.uniform import Uniform

    def broken(self, signals):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Uniform, "select", broken)
    (tmp_path / "tiny.yaml").write_text(
        YAML.replace("[fastv]", "[]").replace("n: 12", "n: 2").replace("repeats: 3, ", "repeats: 3, ")
    )
    code, out, err = run_cli(capsys, "sweep", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "s"), "--set", "speed=false")
    assert code == 1 and "failed" in out and "1 failed" in err and "uniform 49: RuntimeError: no such luck" in err


def test_table_and_report_commands(finished, tmp_path, capsys):
    for fmt, mark in (("terminal", "downsample"), ("md", "|:--|"), ("csv", "prefill_ms"), ("latex", "\\toprule")):
        code, out, _ = run_cli(capsys, "table", str(finished.root), "--format", fmt)
        assert code == 0 and mark in out
    one = run_cli(capsys, "table", str(finished.root), "--accuracy-only")
    assert one == run_cli(capsys, "table", str(finished.root), "--accuracy-only") and "prefill" not in one[1]
    code, out, _ = run_cli(capsys, "table", str(finished.root), "--format", "csv", "--output", str(tmp_path / "deep" / "t.csv"))
    assert code == 0 and (tmp_path / "deep" / "t.csv").read_text().startswith("reducer,budget")
    code, out, _ = run_cli(capsys, "report", str(finished.root), "--output", str(tmp_path / "r.html"))
    assert code == 0 and (tmp_path / "r.html").read_text().startswith("<!doctype html>")
