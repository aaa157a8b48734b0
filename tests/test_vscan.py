"""VScan: both scans and what joins whom by hand, windows that do not fit, counts and averages, the later cuts inside models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import make_inputs, shared
from plain import check_batch_mates, check_inside_a_model, crops, signals
from torch import Tensor

import vtc
from vtc.core import Budget, Facts, Layout, Signals
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.families import family_of
from vtc.reducers.vscan import Course, VScanBoundary, VScanLate, placeless_last_attn
from vtc.signals import AttentionTap, next_last_attn, turned_back


def facts(**other: object) -> Facts:
    return dataclasses.replace(family_of(shared("llava")).facts, tokens=None, max_tokens=None, **other)


def asked(low: Tensor, high: Tensor, budget: int, layout: Layout, features: Tensor | None = None) -> Signals:
    tokens = torch.eye(low.shape[1])[None].expand(len(low), -1, -1) if features is None else features
    return signals(tokens, budget, layout, low_attn=low, high_attn=high)


def test_both_scans_by_hand() -> None:
    # 4 x 4 in windows of 2: of the shallow scores each window's best, of the deep ones the best of the others
    low = torch.tensor([[1.0, 9, 8, 1, 1, 1, 1, 1, 2, 2, 0, 0, 2, 3, 0, 5]])
    high = torch.tensor([[9.0, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 7, 6, 5, 4]])
    view = asked(low, high, 8, Layout.grid(4, 4))
    part = VScanBoundary(keep=8, window=2)
    local, overall = part.scans(view)
    assert local[0].nonzero()[:, 0].tolist() == [1, 2, 13, 15]
    assert overall[0].nonzero()[:, 0].tolist() == [0, 3, 12, 14]  # of the ones the lowest
    # of nine tokens four are for the local scan, one in each window: five are left
    view = dataclasses.replace(view, budget=9)
    assert part.select(view).index.tolist() == [[0, 1, 2, 3, 4, 12, 13, 14, 15]]
    # as released: 11 // 2 = 5 for four windows, so one is lost
    view = dataclasses.replace(view, budget=11)
    assert part.select(view).index.shape[1] == 11
    assert dataclasses.replace(part, official=True).select(view).index.shape[1] == 10
    # a budget below two per window leaves the choice to the global scan
    assert part.select(dataclasses.replace(view, budget=6)).index.tolist() == [[0, 1, 12, 13, 14, 15]]


def test_as_released_zeros_may_take_local_picks_again() -> None:
    low, high = torch.tensor([[4.0, 1, 1, 1]]), torch.tensor([[0.0, 1, 0, 0]])
    view, part = asked(low, high, 3, Layout.grid(2, 2)), VScanBoundary(keep=3, window=2)
    assert part.select(view).index.tolist() == [[0, 1, 2]]
    assert dataclasses.replace(part, official=True).select(view).index.tolist() == [[0, 1]]


def test_quota_takes_by_score_from_no_window_too_many() -> None:
    # 4 x 9 in windows of 4: two of them, the second one with five columns; 5 of the budget of 10, at most 3 each
    score = torch.zeros(36)
    score[[0, 1, 2, 3, 9]] = torch.tensor([9.0, 8, 7, 6, 5])  # the first window
    score[[8, 35]] = torch.tensor([1.0, 2])  # the second one, up to the last column
    part = VScanBoundary(keep=10, scan="quota", window=4)
    view = asked(score[None], torch.zeros(1, 36), 10, Layout.grid(4, 9))
    assert part.windows(view)[1] == 2
    assert part.local(view)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 8, 35]
    # all scores equal: the lowest tokens of each window, the lowest of all first
    view = dataclasses.replace(view, taps={"low_attn": torch.ones(1, 36), "high_attn": torch.zeros(1, 36)})
    assert part.local(view)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5]


def test_sides_shorter_than_a_window_make_one() -> None:
    part = VScanBoundary(keep=4, window=6)
    view = asked(torch.rand(1, 15), torch.rand(1, 15), 4, Layout.grid(3, 5))
    assert part.windows(view)[1] == 1 and part.select(view).index.shape == (1, 4)


def test_what_is_left_out_joins_the_most_similar_one() -> None:
    features = torch.tensor([[[4.0, 0.0], [0.0, 2.0], [1.0, 0.1], [3.0, 1.0], [1.0, 1.0]]])
    # kept are 0 and 1; 2 and 3 are nearer to 0, 4 is as near to both: it joins the first
    view = asked(torch.zeros(1, 5), torch.tensor([[5.0, 4, 0, 0, 0]]), 2, Layout.flat(5), features)
    chosen = VScanBoundary(keep=2, local_share=0.0).select(view)
    assert chosen.index.tolist() == [[0, 1]] and chosen.owner.tolist() == [[0, 1, 0, 0, 0]]
    torch.testing.assert_close(chosen.features[0], torch.tensor([[9 / 4, 2.1 / 4], [0.0, 2.0]]))
    alone = VScanBoundary(keep=2, local_share=0.0, merge=False).select(view)
    assert alone.features is None and alone.index.tolist() == [[0, 1]]


def test_views_share_the_budget_and_windows_have_no_padding() -> None:
    layout = crops(4, 4, 3, hidden=(16, 17, 20))
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(2, 48, generator=generator), torch.rand(2, 48, generator=generator)
    view = asked(low, high, 20, layout, torch.randn(2, 48, 6, generator=generator))
    chosen = VScanBoundary(keep=20, window=2).select(view)
    assert torch.bincount(chosen.index[0] // 16).tolist() == [7, 7, 6]
    assert not {16, 17, 20} & set(chosen.index.flatten().tolist())
    assert (chosen.owner[:, [16, 17, 20]] == -1).all() and (chosen.owner[:, :16] >= 0).all()
    official = VScanBoundary(keep=20, window=2, official=True).select(view)
    assert (torch.bincount(official.index[0] // 16) <= 6).all()
    check_batch_mates(VScanBoundary(keep=20, window=2), view)


def test_counts_and_averages() -> None:
    course = Course(cuts=(16,), late=(1 / 3,))
    assert course.after(96) == [32] and course.after(2) == [1]
    assert Course(cuts=(8, 16), late=(0.5, 3)).after(9) == [4, 3]
    assert course.first(Budget(0.167), 192, 32) == 32  # rounded down
    # x before layer 16 and x / 3 behind: an average of 64 takes 96
    assert course.first(Budget(None, 64), 576, 32) == 96
    assert course.first(Budget(None, 600), 576, 32) == 576  # an image with so few is kept
    with pytest.raises(BudgetError, match="use at most 384"):
        course.first(Budget(None, 500), 576, 32)
    with pytest.raises(BudgetError, match="cannot be met"):
        vtc.patch(shared("llava"), "vscan", avg_tokens=16)


def test_rules_follow_the_tower() -> None:
    for merge, mrope, want in ((1, False, ("equal", 6, True)), (4, True, ("quota", 4, False))):
        first, late = vtc.create("vscan", keep=9).bind(facts(merge=merge, mrope=mrope, layers=32)).parts()
        assert (first.scan, first.window, late.rotary) == want and late.layer == 16
    for layers, number in ((24, 5), (32, 7), (4, 0)):
        assert vtc.create("vscan", keep=9).bind(facts(encoder_layers=layers)).parts()[0].local_layer == number
    windowed = facts(encoder_layers=32, windowed=tuple(i for i in range(32) if i % 8 != 3))
    assert vtc.create("vscan", keep=9).bind(windowed).parts()[0].local_layer == 11, "the next layer that sees everything"
    assert len(vtc.create("vscan", keep=9, layers=(), late=()).bind(facts()).parts()) == 1
    with pytest.raises(UnknownArgumentError, match="local_layer=9 is out of range"):
        vtc.create("vscan", keep=9, local_layer=9).bind(facts(encoder_layers=8))
    with pytest.raises(TypeError, match="bind"):
        vtc.create("vscan", keep=9).parts()


def test_rotation_is_taken_out_again() -> None:
    generator = torch.Generator().manual_seed(3)
    plain, angle = torch.randn(2, 3, 7, 10, generator=generator), torch.rand(2, 7, 4, generator=generator) * 6
    cos, sin = (1.3 * torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))  # scaled, and of eight of ten numbers
    turned = plain[..., :8] * cos[:, None] + torch.cat([-plain[..., 4:8], plain[..., :4]], -1) * sin[:, None]
    key = torch.cat([turned, plain[..., 8:]], -1)
    torch.testing.assert_close(turned_back(key, (cos, sin)), plain)
    last = torch.tensor([6, 6])
    with_rope = AttentionTap(key, key, key, 1.0, causal=True, last=last, rope=(cos, sin))
    without = AttentionTap(plain, plain, plain, 1.0, causal=True, last=last)
    torch.testing.assert_close(placeless_last_attn(1).measure(with_rope), next_last_attn(1).measure(without))
    assert torch.equal(placeless_last_attn(1).measure(without), next_last_attn(1).measure(without))


def test_a_later_cut_takes_the_lowest_of_equals() -> None:
    part = VScanLate(keep=6, course=Course(cuts=(1,), late=(3,)))
    assert part.count(10, facts()) == 3
    assert part.select(signals(torch.eye(6)[None], 3, next_last_attn=torch.ones(1, 6))).index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "qwen2_5_vl"])
def test_inside_a_model(family: str) -> None:
    check_inside_a_model(family, "vscan", 7, exact=False)
    model = shared(family)
    with vtc.patch(model, "vscan", keep=7) as handle, torch.no_grad():
        model(**make_inputs(family, model))
    for image in handle.stats.last.images:
        assert [s.after for s in image.stages] == [7, 2]


def test_newlines_stay_until_the_text_chooses() -> None:
    model = shared("llava_next")
    with vtc.patch(model, "vscan", keep=9, late=(4,)) as handle, torch.no_grad():
        model(**make_inputs("llava_next", model))
    first, late = handle.stats.last.images[0].stages
    assert first.after > first.requested == 9 and late.before == first.after and late.after == 4


@pytest.mark.parametrize(
    "options",
    [
        {"late": (0,)},
        {"late": (1.5,)},
        {"late": (2, 3)},
        {"local_layer": 0},
        {"local_layer": 1.5},
        {"local_share": 1.2},
        {"scan": "all"},
        {"window": 0},
    ],
)
def test_senseless_options_are_refused(options: dict) -> None:
    with pytest.raises(UnknownArgumentError, match=f"vscan: {next(iter(options))}"):
        vtc.create("vscan", keep=4, **options)
