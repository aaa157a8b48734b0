"""Budgets by hand: rounding, limits, averages over layers, and what is said of images that have no more than they may keep."""

from __future__ import annotations

import math

import pytest
import torch
from models import image_features, make_inputs, shared
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, VisionPicker

import vtc
from vtc.core import Budget
from vtc.errors import BudgetError
from vtc.stats import SHORT


@pytest.mark.parametrize(
    ("amount", "n", "tokens"),
    [
        (0.33, 10, 3),
        (0.67, 10, 7),
        (0.333, 100, 33),
        (0.667, 100, 67),
        (0.5, 9, 4),  # halves go to the even number
        (0.5, 7, 4),
        (0.249, 10, 2),
        (0.251, 10, 3),
        (0.01, 10, 1),  # at least one
        (1.0, 10, 10),
        (1, 10, 1),
        (7, 10, 7),
        (10, 10, 10),
        (11, 10, 10),  # at most all
        (0.9999, 576, 576),
        (0.1111, 576, 64),
        (0.2222, 576, 128),
        (0.3333, 576, 192),
    ],
)
def test_tokens_of_a_budget(amount, n, tokens):
    assert Budget(keep=amount).tokens(n) == tokens == Budget(avg_tokens=amount).tokens(n)
    assert Budget(keep=amount).tokens(n, start=3, layers=4) == tokens, "the layer matters for averages only"


def test_a_method_may_round_its_own_way():
    assert [Budget(keep=0.27).tokens(10, rounding=r) for r in (round, int, math.ceil)] == [3, 2, 3]
    assert [Budget(keep=0.23).tokens(10, rounding=r) for r in (round, int, math.ceil)] == [2, 2, 3]
    assert Budget(avg_tokens=0.6).tokens(100, start=1, layers=4, rounding=int) == 46


@pytest.mark.parametrize(
    ("amount", "n", "start", "layers", "tokens"),
    [
        (0.5, 100, 1, 4, 33),  # (200 - 100) / 3
        (0.6, 100, 1, 4, 47),  # (240 - 100) / 3
        (60, 100, 1, 4, 47),
        (0.75, 100, 2, 4, 50),
        (75, 100, 2, 4, 50),
        (0.67, 10, 1, 3, 5),  # of 6.7, not of 7: 10.1 / 2
        (99, 100, 2, 4, 98),
        (100, 100, 2, 4, 100),
        (120, 100, 2, 4, 100),
        (52, 100, 2, 4, 4),
        (51, 100, 2, 4, 2),
    ],
)
def test_an_average_pays_for_the_layers_before_the_cut(amount, n, start, layers, tokens):
    assert Budget(avg_tokens=amount).tokens(n, start=start, layers=layers) == tokens
    if tokens < n:
        average = (start * n + (layers - start) * tokens) / layers
        assert abs(average - (amount * n if isinstance(amount, float) else amount)) <= (layers - start) / layers / 2 + 1e-9


def test_an_average_below_those_layers_names_the_least_there_is():
    with pytest.raises(BudgetError, match="use at least 51 or an earlier layer"):
        Budget(avg_tokens=50).tokens(100, start=2, layers=4)
    assert Budget(avg_tokens=51).tokens(100, start=2, layers=4) >= 1
    with pytest.raises(BudgetError, match="first 2 of 4 layers run on all 100 tokens"):
        Budget(avg_tokens=0.5).tokens(100, start=2, layers=4)


@pytest.mark.parametrize(("amount", "above"), [(9, False), (10, False), (11, True), (1.0, False), (0.5, False)])
def test_a_budget_is_above_what_there_is_if_it_is_more_and_a_number(amount, above):
    assert Budget(keep=amount).exceeds(10) is above is Budget(avg_tokens=amount).exceeds(10)


@pytest.mark.parametrize("amount", [0, -1, 0.0, -0.1, 1.0000001, 1.5, math.nan, math.inf, True, "3", None])
def test_what_is_no_budget(amount):
    for name in ("keep", "avg_tokens"):
        with pytest.raises(BudgetError):
            Budget(**{name: amount})
    with pytest.raises(BudgetError, match="exactly one"):
        Budget(keep=3, avg_tokens=3)


@pytest.mark.parametrize(
    "picker", [BoundaryPicker, DecoderPicker, VisionPicker, EncoderPicker], ids=["boundary", "decoder", "vision", "encoder"]
)
def test_an_image_below_its_budget_is_noted_and_one_at_it_is_not(picker):
    """Two pictures of different size: the budget is what the larger one has."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, images=[1, 1], sizes=[[28, 56], [10, 56]])
    slots = [len(f) for f in image_features(model, inputs)]
    assert 88 > slots[0] > slots[1]  # which is the most an image of this model can have

    def notes(keep: int | float) -> list[str]:
        with vtc.patch(model, picker(keep=keep, newlines="compete")) as handle, torch.no_grad():
            model(**inputs)
        images = handle.stats.last.images
        assert [i.slots for i in images] == slots
        return [SHORT in i.stages[0].note for i in images]

    assert notes(slots[0]) == [False, True]
    assert notes(slots[1]) == notes(1.0) == [False, False]
    assert notes(slots[0] + 1) == [True, True]
