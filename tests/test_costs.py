"""FLOPs and costs, worked out by hand: what the counter is told, what the formula adds up, what a plan says of a sweep."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeWorker
from models import make_inputs, shared
from rich.console import Console

import vtc
from vtc.eval import cost, flops
from vtc.eval.executors import InProcess
from vtc.eval.flops import Count, Flops, Tokens
from vtc.eval.models import outline
from vtc.eval.run import Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import parse_sweep
from vtc.families import family_of

# text: width 32, MLP 48, 4 heads and 2 key-value heads of 8, 120 words; vision: width 24, MLP 32, patches of 7 x 7 x 3 numbers
DECODER = {"linear": 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48), "square": 4 * 4 * 8}
TOWER = {"attention": 2 * 4 * 24 * 24, "square": 4 * 24, "mlp": 2 * 2 * 24 * 32}
HEAD, PROJECTOR, PATCH = 2 * 32 * 120, 2 * (24 * 32 + 32 * 32), 2 * 24 * 147


def decoder(counts: list[int]) -> int:
    return sum(n * DECODER["linear"] + n * n * DECODER["square"] for n in counts)


def tower(layers: list[int], mlp: list[int]) -> int:
    return sum(n * TOWER["attention"] + n * n * TOWER["square"] for n in layers) + sum(n * TOWER["mlp"] for n in mlp)


def test_every_part_of_the_formula():
    config = shared("llava").config
    found = flops.closed_form(config, Tokens(patches=16, tower=[17, 9], projector=5, decoder=[20, 11, 3], tower_mlp=[17, 4]))
    assert found == Flops(16 * PATCH + tower([17, 9], [17, 4]), 5 * PROJECTOR, decoder([20, 11, 3]), HEAD), (
        "the head on one position, an MLP on the tokens it had"
    )
    same = flops.closed_form(config, Tokens(patches=16, tower=[17, 9], projector=5, decoder=[20]))
    assert same.tower == 16 * PATCH + tower([17, 9], [17, 9])
    assert flops.language_flops(config, [20, 11]) == Flops(0, 0, decoder([20, 11]), HEAD)
    several = flops.closed_form(shared("vipllava").config, Tokens(projector=5))
    assert several.projector == 5 * 2 * (3 * 24 * 32 + 32 * 32), "features of three layers side by side"
    assert (found.model, found.total) == (found.tower + found.projector + found.decoder + found.head,) * 2
    assert dataclasses.replace(found, reducer=7).total == found.model + 7 == found.to_dict()["total"] + 7


@pytest.mark.parametrize(
    ("reducer", "text_side", "projected", "tower_side"),
    [
        (None, [29] * 5, 16, [17] * 3),
        (("uniform", {"keep": 6}), [19] * 5, 16, [17] * 3),
        (("fastv", {"keep": 6, "layer": 2}), [29, 29, 19, 19, 19], 16, [17] * 3),
        (("visionzip", {"keep": 6}), [19] * 5, 6, [17] * 3),
        (("downsample", {"keep": 4}), [17] * 5, 4, [5] * 3),
    ],
)
def test_the_counter_counts_what_ran(reducer, text_side, projected, tower_side):
    """Layer by layer, for reducers before, in and behind the tower, and inside the decoder; both ways."""
    model = shared("llava", dtype=torch.float32)
    inputs = make_inputs("llava", model)
    assert inputs["input_ids"].shape[1] == 29
    if reducer is None:
        found = flops.count(model, inputs, None)
    else:
        with vtc.patch(model, reducer[0], **reducer[1]) as handle:
            found = flops.count(model, inputs, handle)
    layers = len(tower_side)  # up to the one whose output is used; the tower's last layer runs for nobody
    ran = [tower_side[0]] * len(found.tokens.tower)
    assert len(ran) in (layers, layers + 1)
    patches = tower_side[0] - 1
    want = Flops(patches * PATCH + tower(ran, ran), projected * PROJECTOR, decoder(text_side), HEAD)
    assert found.tokens == Tokens(patches, ran, projected, text_side, ran)
    assert found.formula == want == dataclasses.replace(found.counted, reducer=0, decoder=found.formula.decoder)
    assert abs(found.counted.decoder - want.decoder) <= 1e-3 * want.decoder  # some releases write RoPE's angles as a product
    assert found.mismatch == abs(found.counted.model - want.model) / want.model < 1e-3


def test_the_mismatch_is_relative_to_the_formula():
    nothing, full = Flops(0, 0, 0, 0), Flops(0, 0, 100, 0)
    pairs = [(Flops(0, 0, 110, 0), full, 0.1), (Flops(0, 0, 90, 0), full, 0.1), (Flops(50, 0, 0, 0), full, 0.5)]
    pairs += [(Flops(1, 2, 3, 4, 99), Flops(4, 3, 2, 1), 0.0), (nothing, nothing, 0.0)]
    for counted, formula, wanted in pairs:
        assert Count(counted, formula, Tokens(), None).mismatch == pytest.approx(wanted)


def test_products_that_torchs_counter_passes_over_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    a, x, y = torch.randn(5, 7), torch.randn(7), torch.randn(5)
    for work, wanted in (
        (lambda: a @ x, 2 * 35),
        (lambda: torch.dot(x, x), 2 * 7),
        (lambda: torch.addmv(y, a, x), 2 * 35),
        (lambda: a @ torch.randn(7, 3), 2 * 5 * 7 * 3),
    ):
        counter = FlopCounterMode(display=False, custom_mapping=flops._uncounted())
        with torch.no_grad(), counter:
            work()
        assert counter.get_total_flops() == wanted


# ----------------------------------------------------------------------------------------------------------------- plans
FACTS = family_of(shared("llava")).facts


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (None, {}, [16] * 5),
        ("uniform", {"keep": 6}, [6] * 5),
        ("uniform", {"keep": 0.5}, [8] * 5),
        ("fastv", {"keep": 6, "layer": 2}, [16, 16, 6, 6, 6]),
        ("fastv", {"avg_tokens": 10, "layer": 2}, [16, 16, 6, 6, 6]),
        ("downsample", {"keep": 4}, [4] * 5),
        ("visionzip", {"keep": 16}, [16] * 5),
    ],
)
def test_tokens_that_a_budget_promises(name, options, expected):
    reducer = None if name is None else vtc.create(name, **options)
    assert cost.predict(reducer, FACTS, 16) == expected
    if name is not None:
        both = vtc.registry.resolve([vtc.create("divprune", keep=9), vtc.create("fastv", keep=5, layer=3)])
        assert cost.predict(both, FACTS, 16) == [9, 9, 9, 5, 5]


@pytest.mark.parametrize(
    ("reducer", "visual", "patches"),
    [
        (None, [16] * 5, 16),
        (vtc.create("uniform", keep=6), [6] * 5, 16),
        (vtc.create("fastv", keep=6, layer=2), [16, 16, 6, 6, 6], 16),
        (vtc.create("downsample", keep=4), [4] * 5, 4),
    ],
)
def test_an_estimate_is_the_formula_of_a_prompt_with_64_words(reducer, visual, patches):
    config = shared("llava").config
    known = SimpleNamespace(config=config, facts=FACTS, slots=16, pieces=1)
    layers = [patches + 1] * (FACTS.feature_layer + 1)
    wanted = patches * PATCH + tower(layers, layers) + patches * PROJECTOR + decoder([n + 64 for n in visual]) + HEAD
    assert cost.prompt_flops(reducer, known) == wanted and cost.TEXT == 64
    assert cost.prompt_flops(reducer, SimpleNamespace(config=config, facts=FACTS, slots=None, pieces=1)) is None


YAML = """\
data: {scenes: {n: 3, types: [color]}}
budgets: [49]
reducers: []
speed: {repeats: 3, warmup: 1, decode_steps: 5, batch_size: 2}
"""


def test_a_plan_is_questions_times_prompts_and_timed_pairs_twice(monkeypatch):
    sweep = Sweep(parse_sweep(YAML))
    monkeypatch.setattr(cost, "_device_rate", lambda model: (1e6, "so fast"))
    plan = cost.price(sweep, None)
    known = outline(sweep.planned[0].model)
    for row, item in zip(plan["cells"], sweep.planned, strict=True):
        one = cost.prompt_flops(item.cell.reducer, known)
        assert row["flops"] == 3 * one and row["state"] == "to do" and not row["other_code"]
        assert row["seconds"] == pytest.approx((3 * one + (3 + 1) * 2 * one * 2 * (1 + 0.1 * 5)) / 1e6)
    assert plan["questions"] == 3 and any("so fast" in n for n in plan["notes"])


def test_a_stored_cell_says_how_fast_the_machine_is(tmp_path):
    """Questions times FLOPs by the seconds they took."""

    class Slow(FakeWorker):
        def answers(self, job):
            made = super().answers(job)
            made["metrics"] |= {"seconds": 4.0}
            return made

    sweep = Sweep(parse_sweep(YAML.replace("speed: {repeats: 3, warmup: 1, decode_steps: 5, batch_size: 2}", "speed: false")))
    store, local = Store(tmp_path / "s", create=True), InProcess()
    local.worker = Slow()
    sweep.run(store, Console(quiet=True), executor=local, only=sweep.planned[:1])
    metrics = store.get(sweep.planned[0].id).metrics
    rate = metrics["n"] * metrics["flops"]["counted"]["total"] / 4
    plan = cost.price(sweep, store)
    assert [r["state"] for r in plan["cells"]] == ["done"] + ["to do"] * (len(sweep.planned) - 1)
    assert all(r["seconds"] == pytest.approx(r["flops"] / rate) for r in plan["cells"])
