"""HoloV: crops, shares and what overflows by hand, the sequence as released, towers that merge patches, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import make_inputs, shared
from plain import check_batch_mates, check_inside_a_model, signals
from torch import Tensor

import vtc
from vtc.core import Facts
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.families import family_of
from vtc.reducers.holov import crop_budgets, crop_score, crop_sizes, handed_on


def facts(**other: object) -> Facts:
    return dataclasses.replace(family_of(shared("llava")).facts, max_tokens=None, **other)


def test_crops_cover_the_sequence() -> None:
    assert crop_sizes(10, 4) == [3, 3, 2, 2]
    assert crop_sizes(3, 5) == [1, 1, 1]
    assert crop_sizes(6, 1) == [6]


def test_score_by_hand() -> None:
    # cosines of 0, 1, 2: 0-1 are alike (1), 2 is orthogonal to both. Means over the others: 0.5, 0.5, 0; squares, with the
    # diagonal's 0: (0.25 + 0.25 + 0.25) / 2 = 0.375 for 0 and 1, 0 for 2; mean 0.25
    tokens, attention = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([0.1, 0.2, 0.3])
    for bare in (True, False):
        score = crop_score(tokens, attention, 0.5, bare=bare)
        assert float(score) == pytest.approx(200 * (1 + 0.5 * 0.25 / (0.25 + 1e-6)), rel=1e-5)
    # all orthogonal: no variance at all; one alone: its attention
    assert float(crop_score(torch.eye(3), attention, 0.5, bare=True)) == pytest.approx(200, rel=1e-6)
    assert float(crop_score(tokens[:1], attention[:1], 0.5, bare=True)) == pytest.approx(0.1)
    assert float(crop_score(tokens[:1], attention[:1], 0.5, bare=False)) == pytest.approx(100)


def test_what_is_left_goes_to_the_largest_weights() -> None:
    weight = torch.tensor([0.16, 0.42, 0.16, 0.26], dtype=torch.float64)
    # 1.6, 4.2, 1.6, 2.6 rounded down are 8 of 10: one more for the two largest, not for the largest remainders
    assert crop_budgets(weight, 10).tolist() == [1, 5, 1, 3]
    assert crop_budgets(torch.full((4,), 0.24, dtype=torch.float64), 10).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("size", "want"),
    [([9, 9, 9, 9], [1, 5, 1, 3]), ([9, 2, 9, 9], [2, 2, 2, 4]), ([2, 2, 9, 3], [2, 2, 3, 3]), ([4, 1, 2, 3], [4, 1, 2, 3])],
)
def test_what_does_not_fit_is_handed_on_round_by_round(size: list[int], want: list[int]) -> None:
    weight = torch.tensor([0.16, 0.42, 0.16, 0.26], dtype=torch.float64)
    assert handed_on(crop_budgets(weight, 10), weight, torch.tensor(size), 10).tolist() == want


def peaked() -> tuple[Tensor, Tensor]:
    """Eight tokens in four crops of two; nearly all attention is on the second crop."""
    attention = torch.tensor([[1.0, 2.0, 90.0, 95.0, 3.0, 2.0, 1.0, 4.0]])
    return torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)), attention / attention.sum()


def test_as_released_and_by_default() -> None:
    features, attention = peaked()
    s = signals(features, 5, cls_attn=attention)
    released = vtc.create("holov", keep=5, crops=4, official=True)
    budget = released.budgets(s, released.scores(s))
    assert budget.tolist() == [[0, 5, 0, 0]]  # 4.6 rounded down, and the one that is left
    assert released.released_order(s, budget).tolist() == [[2, 3, -1, -1, -1]]
    chosen = released.select(s)
    assert chosen.index.tolist() == [[0, 1, 2, 3, 4]] and chosen.owner.tolist() == [[-1, -1, 0, 1, -1, -1, -1, -1]]
    assert torch.equal(chosen.features[0], torch.cat([features[0, 2:4], torch.zeros(3, 4)])) and "3 vectors" in chosen.note
    # three are handed on, to the crops of the largest score: the fourth or third, then the first
    chosen = vtc.create("holov", keep=5, crops=4).select(s)
    assert chosen.index.tolist() == [[1, 2, 3, 4, 7]] and chosen.note == ""


def test_as_released_tokens_of_a_crop_come_by_falling_attention() -> None:
    s = signals(torch.eye(6)[None], 4, cls_attn=torch.tensor([[1.0, 3.0, 2.0, 1.0, 2.0, 3.0]]))
    released = vtc.create("holov", keep=4, crops=2, official=True)
    assert released.released_order(s, released.budgets(s, released.scores(s))).tolist() == [[1, 2, 5, 4]]
    assert vtc.create("holov", keep=4, crops=2).select(s).index.tolist() == [[1, 2, 4, 5]]


def test_equal_tokens_are_spread_evenly_the_lowest_first() -> None:
    s = signals(torch.ones(1, 32, 3), 8, cls_attn=torch.full((1, 32), 1 / 32))
    assert vtc.create("holov", keep=8, crops=4).select(s).index.tolist() == [[0, 1, 8, 9, 16, 17, 24, 25]]
    s = dataclasses.replace(s, taps={"cls_attn": torch.zeros(1, 32)})
    assert vtc.create("holov", keep=8, crops=4).select(s).index.tolist() == [[0, 1, 8, 9, 16, 17, 24, 25]]


def test_tokens_alone_among_longer_crops_count_as_the_others() -> None:
    # five tokens in three crops of 2, 2 and 1; the last one has most attention
    s = signals(torch.eye(5)[None], 2, cls_attn=torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.6]]))
    assert vtc.create("holov", keep=2, crops=3).select(s).index.tolist() == [[0, 4]]
    released = vtc.create("holov", keep=2, crops=3, official=True)
    assert released.budgets(s, released.scores(s)).tolist() == [[1, 1, 0]]


def test_crops_of_a_tower_that_merges_patches_follow_the_budget() -> None:
    assert vtc.create("holov", keep=4).bind(facts()).crops == 16
    reducer = vtc.create("holov", keep=49).bind(facts(merge=4))
    assert len(reducer.sizes(196, 49)) == 7 and len(reducer.sizes(196, 196)) == 1
    assert vtc.create("holov", keep=49, crops=5).bind(facts(merge=4)).crops == 5
    assert reducer.count(196, facts()) == 49 and vtc.create("holov", keep=0.33).count(10, facts()) == 3


def test_images_of_a_batch_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(1)
    features, attention = torch.randn(3, 30, 8, generator=generator), torch.rand(3, 30, generator=generator) ** 8
    s = signals(features, 12, cls_attn=attention)
    for official in (False, True):
        check_batch_mates(vtc.create("holov", keep=12, crops=7, official=official), s)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip", "qwen2_5_vl"])
def test_inside_a_model(family: str) -> None:
    check_inside_a_model(family, "holov", 6, crops=4)


def test_as_released_inside_a_model() -> None:
    check_inside_a_model("llava", "holov", 6, crops=4, official=True)
    model = shared("qwen2_5_vl")
    with pytest.raises(UnsupportedFeatureError, match="leave official unset"):
        vtc.patch(model, "holov", keep=3, official=True)
    with vtc.patch(model, "holov", keep=3) as handle, torch.no_grad():
        model(**make_inputs("qwen2_5_vl", model))
    assert "received_attention used" in handle.stats.last.images[0].stages[0].note


@pytest.mark.parametrize(
    "options",
    [
        {"crops": 0},
        {"crops": 2.0},
        {"crops": True},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"official": True, "newlines": "all"},
    ],
)
def test_senseless_options_are_refused(options: dict) -> None:
    with pytest.raises(UnknownArgumentError, match=f"holov: {next(iter(options))}"):
        vtc.create("holov", keep=4, **options)
