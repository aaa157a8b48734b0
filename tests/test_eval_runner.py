"""What a sweep counts and measures again, what cells share, what is called right, matched or sure: small exact examples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fakes import FakeWorker
from models import build, make_inputs, shared
from rich.console import Console

import vtc
from vtc.eval import env
from vtc.eval.betting import Betting
from vtc.eval.cells import Cell
from vtc.eval.config import ReducerConfig, TaskConfig
from vtc.eval.executors import InProcess
from vtc.eval.questions import image_of, is_correct
from vtc.eval.run import Summary, Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep
from vtc.eval.worker import MATCHED, Job, Outcome, SharedFeatures, equal_flops, may_share

QUIET = Console(quiet=True)
YAML = """\
data: {scenes: {n: 2, types: [color]}}
budgets: [49]
reducers: [fastv]
speed: {repeats: 3, warmup: 1, decode_steps: 1}
"""
LABELS = ("none", "random", "uniform", "downsample", "fastv")


class Failing(FakeWorker):
    """Fails in the passes it is told, and notes what it was asked."""

    fails: frozenset[tuple[str, str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def run(self, job: Job, progress=None) -> Outcome:
        self.asked.append((job.cell.label, job.kind))
        if self.asked[-1] in self.fails:
            return Outcome({}, env.describe(job.seed), "RuntimeError: told so")
        return super().run(job, progress)


@pytest.fixture
def local():
    executor = InProcess()
    executor.worker = Failing()
    return executor


@pytest.fixture(scope="module")
def sweep():
    found = Sweep(parse_sweep(YAML), "sweep.yaml")
    assert tuple(p.cell.label for p in found.planned) == LABELS
    return found


def counts(outcome: Summary) -> tuple[int, int, int]:
    assert len(outcome.errors) == outcome.failed
    return outcome.done, outcome.skipped, outcome.failed


# -------------------------------------------------------------------------------------------------------------- counting
def test_every_cell_is_done_skipped_or_failed_and_counted_once(sweep, local, tmp_path):
    store = Store(tmp_path / "s", create=True)
    assert counts(sweep.run(store, QUIET, executor=local, only=sweep.planned[:1])) == (1, 0, 0)
    local.worker.fails = frozenset({("uniform", "accuracy"), ("fastv", "speed")})
    outcome = sweep.run(store, QUIET, executor=local)
    assert counts(outcome) == (2, 1, 2)
    assert outcome.errors == ("uniform 49: RuntimeError: told so", "fastv 49: speed pass: RuntimeError: told so")
    assert [sweep.state(store, p) for p in sweep.planned] == ["done", "done", "failed before", "done", "speed missing"]
    local.worker.fails = frozenset({("uniform", "speed")})
    assert counts(sweep.run(store, QUIET, executor=local)) == (1, 3, 1), "fastv at last; uniform fails in the other pass"
    local.worker.fails = frozenset()
    assert counts(sweep.run(store, QUIET, executor=local)) == (1, 4, 0)
    local.worker.asked.clear()
    assert counts(sweep.run(store, QUIET, executor=local)) == (0, 5, 0) and not local.worker.asked


def test_nothing_is_measured_twice(sweep, local, tmp_path):
    store = Store(tmp_path / "s", create=True)
    local.worker.fails = frozenset({("fastv", "speed"), ("random", "accuracy")})
    sweep.run(store, QUIET, executor=local)
    assert local.worker.asked == [(n, "accuracy") for n in LABELS] + [(n, "speed") for n in LABELS if n != "random"]
    local.worker.fails, local.worker.asked = frozenset(), []
    sweep.run(store, QUIET, executor=local)
    assert local.worker.asked == [("random", "accuracy"), ("random", "speed"), ("fastv", "speed")]


@pytest.mark.parametrize("changed", ["cpu", "cores", "gpu"])
def test_timings_of_another_machine_are_measured_again(sweep, local, tmp_path, monkeypatch, changed):
    """Accuracies are not; threads are a setting, not a machine; of a cluster any machine's timings will do."""
    store, here = Store(tmp_path / "s", create=True), env.machine()
    assert counts(sweep.run(store, QUIET, executor=local)) == (5, 0, 0)
    monkeypatch.setattr(env, "machine", lambda: {**here, "torch_threads": 77, "system": "Other"})
    assert {sweep.state(store, p) for p in sweep.planned} == {"done"}
    another = 999 if changed == "cores" else "another"
    monkeypatch.setattr(env, "machine", lambda: {**here, changed: another})
    assert {sweep.state(store, p) for p in sweep.planned} == {"speed missing"}
    monkeypatch.setattr(sweep, "anywhere", True)
    assert {sweep.state(store, p) for p in sweep.planned} == {"done"}
    local.worker.asked.clear()
    assert counts(sweep.run(store, QUIET, executor=local)) == (5, 0, 0)
    assert local.worker.asked == [(n, "speed") for n in LABELS]
    assert store.get(sweep.planned[0].id).speed["host"][changed] == another


# ------------------------------------------------------------------------------------------------------- shared features
def test_features_are_shared_by_the_pictures_themselves():
    """Batches of one shape with other pictures, in other order, of another type: each gets the features of its own."""
    model = build("llava", dtype=torch.float32)
    one, other = (make_inputs("llava", model, images=[1, 1], seed=s)["pixel_values"] for s in (0, 1))
    batches = [one, other, one.flip(0), one.flip(-1), one + 2**-20, torch.cat([one, one]), one.transpose(2, 3).contiguous()]
    with torch.no_grad():
        expected = [model.model.get_image_features(pixel_values=b) for b in batches]
        made, features = [], SharedFeatures()
        hook = model.model.vision_tower.register_forward_hook(lambda *_: made.append(1))
        with features.sharing(model):
            for _ in range(2):
                for batch, want in zip(batches, expected, strict=True):
                    got = model.model.get_image_features(pixel_values=batch.clone())
                    assert all(map(torch.equal, flat(got), flat(want)))
        hook.remove()
    assert len(made) == len(batches)
    assert features.bytes == sum(t.nbytes for e in expected for t in flat(e))


def flat(value) -> list[torch.Tensor]:
    if value is None or isinstance(value, torch.Tensor):
        return [] if value is None else [value]
    return [t for v in (value.values() if hasattr(value, "values") else value) for t in flat(v)]


def test_only_cells_that_leave_the_tower_alone_share():
    model = shared("llava")
    assert all(may_share(model, r and vtc.create(r, keep=4)) for r in (None, "random", "divprune", "fastv"))
    assert not any(may_share(model, vtc.create(r, keep=4)) for r in ("downsample", "visionzip", "fastervlm", "tome"))


# ---------------------------------------------------------------------------------------------------- right and matched
@pytest.mark.parametrize(
    ("answer", "gold", "built_in", "own"),
    [
        ("red", "red", True, True),
        ("Red", "red", True, True),
        ("red", "RED", True, True),
        (" red\n", "red", True, True),
        ("red.", "red", False, True),
        ("red", "red!", False, True),
        ("a red one", "red", False, False),
        ("re d", "red", False, False),
        ("", "red", False, False),
        ("", "", True, True),
        ("blue", "red|Blue", False, True),
        ("red|blue", "red|blue", True, False),
    ],
)
def test_what_a_right_answer_is(tmp_path, answer, gold, built_in, own):
    (tmp_path / "q.csv").write_text("image,question,answer\n")
    files = TaskConfig(name="own", folder=str(tmp_path), questions=str(tmp_path / "q.csv"))
    assert (is_correct(TaskConfig(name="scenes"), answer, gold), is_correct(files, answer, gold)) == (built_in, own)


def test_the_image_of_a_question():
    assert [image_of(q) for q in ("scene/3/color", "a.png/7", "alone", "/x")] == ["scene/3", "a.png", "alone", "/x"]


@pytest.mark.parametrize("share", [0.68, 0.7, 0.78, 0.9, 0.97])
def test_a_budget_is_matched_only_within_one_per_cent(share):
    """A prompt of 16 visual tokens: whole tokens come as close as they can, and say so where that is not close."""
    model = shared("llava")
    inputs, layers = make_inputs("llava", model), 5
    text, total = model.config.text_config, inputs["input_ids"].shape[1]
    wide = text.hidden_size * (4 + 2) * 8 * 2 + 3 * text.hidden_size * text.intermediate_size

    def cost(tokens: int) -> int:  # layer 2 cuts
        counts = [total] * 2 + [total - 16 + tokens] * (layers - 2)
        return sum(2 * n * wide + 4 * n * n * 32 for n in counts) + 2 * text.hidden_size * text.vocab_size

    costs = {n: cost(n) / cost(16) for n in range(1, 17)}
    best = min(costs, key=lambda n: abs(costs[n] - share))
    cell = Cell("fastv", None, "fastv", "", flops=share, spec=ReducerConfig(name="fastv", options={"layer": 2}))
    found, matched = equal_flops(model, inputs, cell)
    assert found.reducer == vtc.create("fastv", layer=2, keep=best) and matched["keep"] == best
    assert matched["achieved"] == pytest.approx(costs[best], rel=1e-12) and matched["target"] == share
    assert MATCHED == 0.01 and matched["matched"] == (abs(costs[best] / share - 1) <= 0.01)
    assert dataclasses.replace(found, amount=(), reducer=None) == cell


def test_some_budgets_are_matched_and_some_are_not():
    model, inputs = shared("llava"), make_inputs("llava", shared("llava"))
    spec = ReducerConfig(name="fastv", options={"layer": 2})
    found = [equal_flops(model, inputs, Cell("", None, "", "", flops=0.7 + i / 100, spec=spec))[1] for i in range(0, 30, 3)]
    assert {m["matched"] for m in found} == {True, False}


# ---------------------------------------------------------------------------------------------------------------- betting
@pytest.mark.parametrize("values", [[], [0.0] * 30, [-1.0] * 8, [0, 0, 1, 0, -1, 0] * 12, [0.5] * 40])
def test_the_bound_is_the_lowest_candidate_that_was_ruled_out(values):
    """Written out: bet by bet, candidate by candidate, value by value."""
    test = Betting(0.05)
    test.add(values)
    ruled_out = []
    for mean in test.means:
        middle = (1 - mean) / 2
        stakes = [min(share / max(middle, 1e-9), 1e6) for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)]
        purses, highest = [1.0] * 7, 1.0
        for d in values:
            purses = [min(p * max(1 + s * ((1 - d) / 2 - middle), 1e-12), 1e200) for p, s in zip(purses, stakes, strict=True)]
            highest = max(highest, np.mean(purses))
        ruled_out.append(highest >= 20)
    expected = next((m for i, m in enumerate(test.means) if all(ruled_out[i:])), 1.0)
    assert test.bound == expected and (not values or min(values) > 0.4 or test.bound < 1)
    assert Betting(0.05).bound == 1.0
