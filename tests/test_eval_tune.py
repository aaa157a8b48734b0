"""Budget search: the test's error and power by simulation, the search on the embedded model, resuming, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vtc.cli import main
from vtc.errors import BudgetError, ConfigError, StoreError, UnknownReducerError
from vtc.eval import tune as tuning
from vtc.eval.betting import Betting
from vtc.eval.config import BudgetConfig, ReducerConfig, TaskConfig
from vtc.eval.store import Store
from vtc.eval.tune import Settings, Tuner, read_settings, render_tune


# ------------------------------------------------------------------------------------------------------------ the test
def losses(rng, mean: float, n: int) -> np.ndarray:
    """-1, 0 or 1 with a given mean: answers lost and gained."""
    return rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.05, 0.9 - mean, 0.05 + mean])


@pytest.mark.parametrize("target", [0.05, 0.1])
def test_a_true_loss_is_rarely_accepted_however_often_one_looks(target):
    """The loss is exactly the target: the bound may fall to it, after any image, in at most 10 % of the runs."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(120):
        test = Betting(0.1, target)
        for block in np.split(losses(rng, target, 200), 10):
            test.add(block)
            if test.bound <= target:
                wrong += 1
                break
    assert wrong / 120 <= 0.1 + 3 * (0.1 * 0.9 / 120) ** 0.5


def test_a_budget_that_loses_nothing_is_accepted_early():
    rng = np.random.default_rng(1)
    needed = []
    for _ in range(10):
        test, asked = Betting(0.05, 0.1), 0
        while test.bound > 0.1 and asked < 1000:
            test.add(losses(rng, 0.0, 10))
            asked += 10
        needed.append(asked)
    assert max(needed) < 500 and np.median(needed) < 200  # a fixed-size test of this power asks 270 whatever it sees


def test_the_bound_falls_to_the_mean_and_is_never_below_what_was_sure():
    test = Betting(0.05)
    rng = np.random.default_rng(2)
    bounds = []
    for _ in range(6):
        test.add(losses(rng, 0.03, 250))
        bounds.append(test.bound)
    assert bounds == sorted(bounds, reverse=True) and 0.03 < bounds[-1] < 0.09


def test_no_loss_at_all_needs_the_images_the_docstring_says():
    test, images = Betting(0.05, 0.05), 0
    while test.bound > 0.05:
        test.add([0.0])
        images += 1
    assert 80 <= images <= 95
    assert Betting(0.05).bound == 1.0  # nothing seen, nothing known


# ---------------------------------------------------------------------------------------------------------- the search
def settings(**changes) -> Settings:
    given = dict(
        model=tuning.ModelConfig(name="pocket"),
        task=TaskConfig(name="scenes", n=160, types=["color", "count"]),
        reducers=(ReducerConfig(name="uniform"),),
        budgets=(BudgetConfig(keep=11), BudgetConfig(keep=0.75)),
        target=0.4,
        questions=80,
    )
    return Settings(**(given | changes))


def test_the_search_goes_down_stops_and_resumes_without_asking_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "s", create=True)
    asked: list[int] = []
    original = tuning._Run._ask
    monkeypatch.setattr(tuning._Run, "_ask", lambda self, q: asked.append(len(q)) or original(self, q))
    tuner = Tuner(settings(), store)
    (found,) = tuner.run()
    assert [t.budget for t in found.trials] == ["0.75", "11"]  # the largest first, whatever the order given
    first = found.trials[0]
    assert first.verdict == "accepted" and found.best is not found.trials[1]
    assert first.high <= 0.4 + 1e-9 and first.low <= first.drop <= first.high and first.tokens == first.avg == 147
    assert all(len(image) <= 2 for image in tuner.images) and first.questions < 80  # it stopped early
    record = json.loads((store.root / "tune.json").read_text())
    assert record["reducers"][0]["smallest"]["budget"] == "0.75" and record["unreduced"]["questions"] == len(tuner.full.samples)
    before = sum(asked)
    again = Tuner(settings(), store)
    (same,) = again.run()
    assert sum(asked) == before and same == found  # every answer was in the store
    text = render_tune(again.record([same]), "md")
    assert "0.75✓" in text and "| uniform | 0.75 |" in text and "95 %" in text
    with pytest.raises(StoreError, match="no sweep yet"):
        store.read_sweep()  # not a sweep's table: the cells are of another kind


def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    given = settings(budgets=(BudgetConfig(keep=147),), target=0.25)
    original, calls, dies = tuning._Run._ask, [], []

    def counting(self, questions):
        if dies and len(calls) == dies[0]:
            raise KeyboardInterrupt
        calls.append(len(questions))
        original(self, questions)

    monkeypatch.setattr(tuning._Run, "_ask", counting)
    whole = Tuner(given, Store(tmp_path / "whole", create=True)).run()
    total = sum(calls)
    calls.clear()
    dies.append(1)  # after the unreduced model's first answers
    store = Store(tmp_path / "s", create=True)
    with pytest.raises(KeyboardInterrupt):
        Tuner(given, store).run()
    dies.clear()
    done = Tuner(given, store).run()
    assert sum(calls) == total  # nothing was asked twice
    plain = [[(t.budget, t.verdict, t.drop, t.questions) for t in s.trials] for s in done]
    assert plain == [[(t.budget, t.verdict, t.drop, t.questions) for t in s.trials] for s in whole]


def test_a_budget_the_model_refuses_is_named_and_skipped(tmp_path):
    store = Store(tmp_path / "s", create=True)
    made = Tuner(
        settings(budgets=(BudgetConfig(keep=400), BudgetConfig(keep=147)), reducers=(ReducerConfig(name="fastv"),)), store
    )
    (found,) = made.run()
    assert [t.verdict for t in found.trials] == ["refused", "accepted"] and "400" in found.trials[0].note


def test_the_command(tmp_path, capsys):
    arguments = [
        "tune",
        "pocket",
        "--reducers",
        "uniform",
        "--budgets",
        "147",
        "--questions",
        "60",
        "--out",
        str(tmp_path / "s"),
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--target-drop", "45%", "--json"])
    assert not stop.value.code
    record = json.loads(capsys.readouterr().out)
    assert record["target_drop"] == 0.45 and record["reducers"][0]["trials"][0]["questions"] <= 60


def test_settings_come_from_a_sweep_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("data: {scenes: {n: 30}}\nbudgets: [49, 11]\nreducers: [fastv, {name: divprune, budgets: [22]}]\nseed: 3\n")
    read = read_settings(str(path), "0.02", None, None, 100, 0.9)
    assert [r.name for r in read.reducers] == ["fastv", "divprune"] and [b.keep for b in read.budgets] == [49, 11]
    assert (read.target, read.seed, read.confidence, read.questions) == (0.02, 3, 0.9, 100)
    own = read_settings(str(path), "1%", "uniform", "50%,98", 100, 0.95)
    assert [r.name for r in own.reducers] == ["uniform"] and [b.text for b in own.budgets] == ["50%", "98"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("pocket", "much", "fastv", None), BudgetError, "target 'much' is not a number"),
        (("pocket", "1%", None, None), ConfigError, "name the reducers"),
        (("pocket", "1%", "fastvv", None), UnknownReducerError, "fastv"),
        (("pocket", "1%", "fastv", "many"), BudgetError, "budget 'many'"),
        (("pockett", "1%", "fastv", None), ConfigError, "pocket"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        read_settings(*arguments, 100, 0.95)


def test_impossible_searches_are_refused_before_anything_runs(tmp_path):
    store = Store(tmp_path / "s", create=True)
    with pytest.raises(BudgetError, match="between 0 and 1"):
        Tuner(settings(target=1.5), store)
    with pytest.raises(BudgetError, match="equal FLOPs"):
        Tuner(settings(budgets=(BudgetConfig(flops=0.5),)), store)
    with pytest.raises(ConfigError, match="scored as a whole"):
        Tuner(settings(task=TaskConfig(name="gqa")), store)
