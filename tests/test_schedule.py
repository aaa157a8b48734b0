"""Where cuts lie and how many tokens they leave."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.core import Budget
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.schedule import TOLERANCE, layer_average, place_cuts, stage_counts

PYRAMID = (0.5, 0.25, 0.125)


def facts(layers: int) -> SimpleNamespace:
    return SimpleNamespace(layers=layers, first_layer=1)


def test_average_by_hand():
    # layers 0 and 1 hold 10 tokens, layer 2 holds 4, layers 3 and 4 hold 1: (20 + 4 + 2) / 5
    assert layer_average(10, (2, 3), (4, 1), 5) == pytest.approx(5.2)


def test_shares_of_the_paper_are_rounded_down():
    assert stage_counts(Budget(keep=0.125), 100, (7, 9, 12), (0.875, 0.625, 0.125), 32) == (87, 62, 12)


def test_a_smaller_budget_bends_the_shape():
    # 576 -> 9 is the factor 1/64, twice the exponent of 1/8: shares 1/4, 1/16, 1/64
    assert stage_counts(Budget(keep=9), 576, (8, 16, 24), PYRAMID, 32) == (144, 36, 9)
    assert stage_counts(Budget(keep=72), 576, (8, 16, 24), PYRAMID, 32) == (288, 144, 72)


def test_everything_and_one_token():
    assert stage_counts(Budget(keep=1.0), 30, (1, 2), PYRAMID[:2], 4) == (30, 30)
    assert stage_counts(Budget(avg_tokens=1.0), 30, (1, 2), PYRAMID[:2], 4) == (30, 30)
    assert stage_counts(Budget(keep=1), 30, (1, 2), (0.5, 0.25), 4)[-1] == 1
    assert stage_counts(Budget(keep=0.25), 1, (1, 2), (0.5, 0.25), 4) == (1, 1)


def test_paper_average():
    # PyramidDrop: (8*1 + 8/2 + 8/4 + 8/8) / 32 = 46.9 % of the tokens
    assert stage_counts(Budget(avg_tokens=270), 576, (8, 16, 24), PYRAMID, 32) == (288, 144, 72)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(64, 3000),
    layers=st.integers(6, 48),
    share=st.floats(0.02, 0.98),
    data=st.data(),
)
def test_average_is_met_within_one_percent(n, layers, share, data):
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, layers - 1), min_size=1, max_size=5))))
    shape = tuple(0.9 * 0.6**i for i in range(len(cuts)))
    least = layer_average(n, cuts, (1,) * len(cuts), layers)
    wanted = least + share * (n - least)
    counts = stage_counts(Budget(avg_tokens=wanted / n), n, cuts, shape, layers)
    step = min(end - start for start, end in zip(cuts, [*cuts[1:], layers], strict=True)) / layers  # of one token
    assert abs(layer_average(n, cuts, counts, layers) - wanted) <= max(TOLERANCE * wanted, step)
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] <= n
    assert counts[-1] >= 1


@pytest.mark.parametrize("n", [576, 2880])
@pytest.mark.parametrize("wanted", [0.3, 0.33, 0.5, 0.7, 0.9])
def test_average_of_real_models_is_met_within_one_percent(n, wanted):
    for cuts, shape in (((8, 16, 24), PYRAMID), ((7, 9, 12), (0.875, 0.625, 0.125)), ((3, 7, 16), (0.54, 0.35, 0.2))):
        counts = stage_counts(Budget(avg_tokens=wanted), n, cuts, shape, 32)
        assert layer_average(n, cuts, counts, 32) == pytest.approx(wanted * n, rel=TOLERANCE)


def test_average_below_the_first_layers_is_refused():
    with pytest.raises(BudgetError, match="use at least 145 or earlier layers"):
        stage_counts(Budget(avg_tokens=64), 576, (8, 16, 24), PYRAMID, 32)


def test_layers_as_shares():
    assert place_cuts((0.25, 0.5, 0.75), facts(32), "x") == (8, 16, 24)
    assert place_cuts((7 / 32, 9 / 32, 12 / 32), facts(5), "x") == (1, 2, 3)  # would coincide: moved up
    assert place_cuts((2, 0.5), facts(8), "x") == (2, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((3, 2), "must ascend"), ((0,), "does not fit"), ((5,), "does not fit"), ((), "does not fit"), ((1.5,), "share 1.5")],
)
def test_layers_that_make_no_sense(layers, message):
    with pytest.raises(UnknownArgumentError, match=message):
        place_cuts(layers, facts(5), "x")
