"""Examples small enough to check by hand, and edge cases, of the methods that weigh views or the question."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from golden_views import anyres_layout
from models import make_inputs, shared
from plain import check_batch_mates, check_inside_a_model, crops, signals

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import connectivity, shrinking_picks
from vtc.reducers.globalcom2 import crop_grid, unpadded
from vtc.signals import AttentionTap, ProjectionTap, cls_logits

CASES: dict[str, dict[str, Any]] = {
    "globalcom2": {},
    "globalcom2-cold": {"temperature": 0.5, "alpha": 0.2},
    "script": {},
    "script-joint": {"rule": "joint"},
    "script-merge": {"merge": True, "scaling": 2.0},
}
"""Reducers and options the edge cases run: ``name`` or ``name-variant``."""

methods = pytest.mark.parametrize("case", CASES)


def make(case: str, **budget: Any) -> vtc.Reducer:
    return vtc.create(case.partition("-")[0], **CASES[case], **budget)


def random_signals(batch: int, n: int, budget: int, *, seed: int = 0, layout: Layout | None = None) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(batch, n, generator=generator)
    return signals(torch.randn(batch, n, 5, generator=generator), budget, layout, cls_logits=score, clip_dot=score)


# ------------------------------------------------------------------------------------------------------ all of them
@methods
@pytest.mark.parametrize("n", [1, 2, 6, 13])
def test_every_budget_is_met(case: str, n: int) -> None:
    for budget in range(1, n + 1):
        chosen = make(case, keep=budget).select(random_signals(2, n, budget, seed=n))
        assert chosen.index.shape == (2, budget)
        assert (chosen.index[:, 1:] > chosen.index[:, :-1]).all()
        assert 0 <= int(chosen.index.min())
        assert int(chosen.index.max()) < n


@methods
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("views", [1, 3])
def test_identical_tokens_and_scores_of_zero(case: str, value: float, views: int) -> None:
    layout = crops(3, 1, 3) if views == 3 else Layout.grid(3, 3)
    zero = torch.zeros(1, 9)
    chosen = make(case, keep=4).select(signals(torch.full((1, 9, 5), value), 4, layout, cls_logits=zero, clip_dot=zero))
    assert len(set(chosen.index[0].tolist())) == 4
    if views == 1 and "joint" not in case:
        assert chosen.index.tolist() == [[0, 1, 2, 3]], "equal scores: the lowest index first"
    if chosen.features is not None:
        assert torch.isfinite(chosen.features).all()


@methods
@pytest.mark.parametrize("views", [1, 3, 5])
def test_batch_mates_change_nothing(case: str, views: int) -> None:
    if views == 5:
        layout, _ = anyres_layout(4, (2, 2), (40, 30))
    else:
        layout = crops(3, 4, 3) if views == 3 else Layout.grid(3, 4)
    check_batch_mates(make(case, keep=7), random_signals(3, len(layout), 17 if views > 1 else 7, layout=layout))


@methods
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 7, 0.5])
def test_inside_a_model(case: str, family: str, keep: float) -> None:
    check_inside_a_model(family, case.partition("-")[0], keep, newlines="none", **CASES[case])


# ------------------------------------------------------------------------------------------------------- globalcom2
def test_globalcom2_by_hand() -> None:
    # a thumbnail of 2 x 2 and two crops of 2 x 2 side by side: its left column stands for the first crop
    thumbnail = [3.0, 0.0, 1.0, 0.0]  # sums: left 4, right 0
    local = [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 4.0, 3.0]
    s = signals(torch.zeros(1, 12, 2), 6, crops(2, 2, 3), cls_logits=torch.tensor([thumbnail + local]))
    reducer = vtc.create("globalcom2", keep=6, temperature=4.0)
    # softmax of (0, -1): 0.731, 0.269; less their mean of a half: crops weigh 1.231 and 0.769, the thumbnail 1
    weight = reducer.shares(torch.tensor(thumbnail).view(2, 2), (1, 2))
    p = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(weight, torch.tensor([0.5 + p, 1.5 - p], dtype=torch.float64), atol=1e-6, rtol=0)
    # six tokens among 4, 4.92 and 3.08 of 12: 2, 2.46 and 1.54, so 2, 2 and 1, and the one left goes to the largest rest, .54
    scored = reducer.image(s, 0)
    assert reducer.quota(scored, 6) == [2, 2, 2, 0]  # the last for newlines
    assert reducer.quota(scored, 7) == [2, 3, 2, 0]  # 2.33, 2.87, 1.79
    # the thumbnail over 2 x 4 cells: centres at -1/4, 1/4, 3/4, 5/4 of its columns, so weights 1, 3/4, 1/4, 0 of the left one
    assert scored.overall[4:].tolist() == [3.0, 2.25, 1.0, 0.75, 0.75, 0.0, 0.25, 0.0]
    # crop 1: local (.6, .8, 0, 0), global (3, 2.25, 1, .75) / 3.953 = (.759, .569, .253, .190): 1.359, 1.369, .253, .190
    # crop 2: local (0, 0, .8, .6), global (.75, 0, .25, 0) / .791 = (.949, 0, .316, 0): .949, 0, 1.116, .6
    expected = [1.359, 1.369, 0.253, 0.190, 0.949, 0.0, 1.116, 0.6]
    torch.testing.assert_close(scored.score[4:], torch.tensor(expected), atol=1e-3, rtol=0)
    assert reducer.select(s).index.tolist() == [[0, 2, 4, 5, 8, 10]]
    # the local scores alone would take the last patch instead of the first of crop 2
    assert vtc.create("globalcom2", keep=6, temperature=4.0, alpha=0.0).select(s).index.tolist() == [[0, 2, 4, 5, 10, 11]]


def test_globalcom2_gives_on_what_a_crop_cannot_take() -> None:
    # the second crop wins all of the softmax: weights 1, 1/2, 3/2. Ten of twelve tokens: 3.33, 1.67, 5 -> it is full with 4,
    # and the 6 others are shared 2 : 1
    thumbnail = [0.0, 900.0, 0.0, 900.0]
    s = signals(torch.zeros(1, 12, 2), 10, crops(2, 2, 3), cls_logits=torch.tensor([thumbnail + [0.0] * 8]))
    reducer = vtc.create("globalcom2", keep=10)
    assert reducer.quota(reducer.image(s, 0), 10) == [4, 2, 4, 0]
    # the release gives it up, and rounds down: 10 of 12 is a ratio of 5 / 6, int(3.33), int(1.67), and at most 4
    official = vtc.create("globalcom2", keep=10, official=True)
    assert [len(p) for p in official.official_picks(s, official.image(s, 0))] == [3, 1, 4]


def test_globalcom2_regions_are_even_and_the_last_takes_the_rest() -> None:
    # 5 columns for 2 crops: regions of 2 and 3 columns; 3 rows for 3: one each
    base = torch.tensor([[1.0, 1.0, 0.0, 0.0, 2.0]] * 3)
    even = vtc.create("globalcom2", keep=1).shares(base, (1, 2))
    torch.testing.assert_close(even, torch.ones(2, dtype=torch.float64))  # both sum to 6
    base = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    weight = vtc.create("globalcom2", keep=1, temperature=2.0).shares(base, (3, 1))
    total = math.e + 2
    torch.testing.assert_close(weight, 1 + torch.tensor([math.e, 1, 1], dtype=torch.float64) / total - 1 / 3, atol=1e-6, rtol=0)


def test_globalcom2_as_released_misplaces_tokens() -> None:
    # two crops of 4 x 4, one above the other, of a square picture: rows 2 to 5 of the 8 are real
    layout, patch = anyres_layout(4, (2, 1), (40, 40))
    assert crop_grid(layout) == (2, 1)
    (top, high), (left, wide) = unpadded(layout)
    assert (top, high, left, wide) == (2, 4, 0, 4)
    real = patch >= 0
    score = torch.where(real, -torch.arange(len(patch)).float(), 0.0)[None]  # the first patches are the best
    features = torch.arange(len(patch)).float()[None, :, None]
    reducer = vtc.create("globalcom2", keep=0.25, official=True)
    s = signals(features, 12, layout, cls_logits=score)
    order, thumbnail = reducer.official_order(s, reducer.image(s, 0))
    assert thumbnail == 4
    assert order[:4].tolist() == [0, 1, 2, 3]
    rows = "".join("|" if t < 0 else "x" for t in order[4:].tolist())
    assert rows.count("|") == 8, "every row of both crops is closed, four padding rows of them"
    assert rows.startswith("x"), "the first real row is row 2 of the picture; its patches stand in row 0"
    chosen = reducer.select(s)
    assert chosen.index.tolist() == [list(range(len(order)))]
    newline = int((layout.kind == Kind.NEWLINE).nonzero()[0])
    assert chosen.features[0, :, 0].tolist() == [float(t) if t >= 0 else float(newline) for t in order.tolist()]
    # the sets are those the sane mode chooses within the views
    plain = vtc.create("globalcom2", keep=0.25)
    ranked = plain.image(s, 0)
    for tokens, picks in zip(ranked.members, reducer.official_picks(s, ranked), strict=False):
        assert sorted(picks.tolist()) == sorted(tokens[ranked.score[tokens].argsort(descending=True)[: len(picks)]].tolist())


def test_globalcom2_as_released_rounds_crops_to_half_precision() -> None:
    layout, _ = anyres_layout(4, (1, 2), (80, 40))
    s = random_signals(2, len(layout), 20, layout=layout)
    chosen = vtc.create("globalcom2", keep=0.5, official=True).select(s)
    thumbnail = 8
    tokens = chosen.features[:, thumbnail:]
    assert torch.equal(tokens, tokens.half().float())
    assert not torch.equal(chosen.features[:, :thumbnail], chosen.features[:, :thumbnail].half().float())
    # one image alone, and as the other of two, gives the same
    for b in range(2):
        one = signals(s.features[b : b + 1], 20, layout, cls_logits=s.cls_logits[b : b + 1])
        alone = vtc.create("globalcom2", keep=0.5, official=True).select(one)
        count = slice(None) if chosen.valid is None else chosen.valid[b]
        assert torch.equal(alone.features[0], chosen.features[b, count])


@pytest.mark.parametrize("keep", [0.5, 40])
def test_globalcom2_as_released_in_a_model(keep: float) -> None:
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 2)
    real = inputs["attention_mask"].bool()
    with vtc.patch(model, "globalcom2", keep=keep, official=True) as handle, torch.no_grad():
        together = model(**inputs).logits
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        images = handle.stats.last.images
    assert torch.isfinite(together[real]).all()
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    for image in images:
        assert image.kept < image.slots


def test_globalcom2_scores_are_logits_of_the_class_token() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    got = cls_logits().measure(AttentionTap(query, key, key, 0.5, cls=True))
    want = torch.stack([0.5 * sum(query[b, h, 0] @ key[b, h, 1:].T for h in range(3)) / 3 for b in range(2)])
    torch.testing.assert_close(got, want)
    assert float(got.min()) < 0


def test_globalcom2_without_class_token_takes_what_is_unlike_the_mean() -> None:
    need = cls_logits().resolve(frozenset({"attention"}))
    # the mean is (2, 1) / 3, or without the third patch (1, 0)
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    got = need.measure(ProjectionTap(features, lambda _: torch.tanh))
    torch.testing.assert_close(got, -torch.tensor([[2.0, 2.0, 1.0]]) / 5**0.5)
    valid = torch.tensor([[True, True, False]])
    got = need.measure(ProjectionTap(features, lambda _: torch.tanh, valid))
    torch.testing.assert_close(got, -torch.tensor([[1.0, 1.0, 0.0]]))
    model = shared("llava_siglip")
    with vtc.patch(model, "globalcom2", keep=4) as handle, torch.no_grad():
        model(**make_inputs("llava_siglip", model, 1))
    assert "cls" in handle.stats.last.images[0].stages[0].note


def test_globalcom2_keeps_newlines_on_top() -> None:
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 1, sizes=[[56, 56]])
    with vtc.patch(model, "globalcom2", keep=10) as handle, torch.no_grad():
        model(**inputs)
    assert handle.stats.last.images[0].kept == 18  # eight rows


def test_globalcom2_views_without_a_thumbnail() -> None:
    layout = dataclasses.replace(crops(2, 2, 2), thumbnail=False)
    s = signals(torch.zeros(1, 8, 2), 3, layout, cls_logits=torch.tensor([[9.0, 8, 7, 6, 1, 2, 3, 4]]))
    chosen = vtc.create("globalcom2", keep=3).select(s)
    assert chosen.index.tolist() == [[0, 1, 7]]
    assert "no thumbnail" in chosen.note


def test_globalcom2_after_a_reducer_of_the_tower() -> None:
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 2)
    before, after = vtc.create("hiprune", keep=21), vtc.create("globalcom2", keep=8)
    with vtc.patch(model, [before, after]) as handle, torch.no_grad():
        logits = model(**inputs).logits
        for image in handle.stats.last.images:
            assert image.kept == 8
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"alpha": 1.5}, {"official": True, "newlines": "none"}])
def test_globalcom2_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnknownArgumentError, match="globalcom2"):
        vtc.create("globalcom2", keep=4, **wrong)


def test_globalcom2_as_released_needs_room_and_newlines() -> None:
    layout, patch = anyres_layout(4, (2, 1), (40, 40))
    s = signals(torch.zeros(1, len(patch), 2), 5, layout, cls_logits=torch.zeros(1, len(patch)))
    with pytest.raises(BudgetError, match="use a smaller keep"):
        vtc.create("globalcom2", keep=1.0, official=True).select(s)
    kept = (layout.kind == Kind.PATCH).nonzero()[:, 0]
    bare = dataclasses.replace(
        s, features=s.features[:, kept], entries=s.entries[:, kept], taps={"cls_logits": s.cls_logits[:, kept]}
    )
    with pytest.raises(BudgetError, match="newline tokens"):
        vtc.create("globalcom2", keep=0.25, official=True).select(bare)


# ----------------------------------------------------------------------------------------------------------- script
AXES = torch.eye(4)[[0, 0, 1, 2, 2, 3]][None]
"""Six tokens on four axes: 0 and 1 are equal, so are 3 and 4."""


def test_script_by_hand() -> None:
    # relevance is the negative dot product, already between 0 and 1. No two tokens of an axis can add to the determinant: 0, then
    # 2, 3, 5; nothing adds anything any more, and the others follow by relevance
    dot = torch.tensor([[-1.0, -0.9, -0.5, -0.25, 0.0, -0.1]])
    s = signals(AXES, 4, clip_dot=dot)
    reducer = vtc.create("script", keep=4)
    relevance, note = reducer.relevance(s)
    torch.testing.assert_close(relevance, -dot)
    assert note == ""
    assert reducer.pick(AXES, relevance, 6).tolist() == [[0, 2, 3, 5, 1, 4]]
    assert reducer.select(s).index.tolist() == [[0, 2, 3, 5]]


def test_script_as_released_is_not_orthogonal() -> None:
    # unit tokens at 0, 30 and 61 degrees, and r = 1, 1, .9: gains 1, 1, .81. First 0; it takes cos^2(30) = 3/4 from the second
    # and .81 cos^2(61) = .190 from the third: .25 and .620. Then the third; it takes .81 cos^2(31) / .620 * ... of the second
    degrees = torch.tensor([0.0, 30.0, 61.0, 180.0]) * math.pi / 180
    tokens = torch.stack([degrees.cos(), degrees.sin()], 1)[None]
    weight = torch.tensor([[1.0, 1.0, 0.9, 0.8]])
    # the last is the first turned round: 0 takes all of its gain .64, and the third .64 * .81 * .235 / .620 more
    assert shrinking_picks(tokens, weight, 2).tolist() == [[0, 2]]
    # left: .25 - .81 * .735 / .620 = -.71 and 0 - .197: both negative, so nothing shrinks any more and the order is theirs
    assert shrinking_picks(tokens, weight, 4).tolist() == [[0, 2, 3, 1]]
    # orthogonal to 0 and 2 nothing is left either, and the guarded process goes on by relevance
    assert vtc.create("script", keep=4).pick(tokens, weight, 4).tolist() == [[0, 2, 1, 3]]
    assert vtc.create("script", keep=4, official=True).pick(tokens, weight, 4).tolist() == [[0, 2, 3, 1]]


def test_script_graph_by_hand() -> None:
    # threshold .5, cosines: 0 and 1 equal; 2 is 45 degrees from both; 3 is at right angles to 0 and 1, 45 degrees from 2
    degrees = torch.tensor([0.0, 0.0, 45.0, 90.0]) * math.pi / 180
    tokens = torch.stack([degrees.cos(), degrees.sin()], 1)[None]
    c = 0.5**0.5
    count, within, mean = connectivity(tokens, 0.5, block=3)
    assert count.tolist() == [[3, 3, 4, 2]]
    torch.testing.assert_close(within, torch.tensor([[2 + c, 2 + c, 1 + 3 * c, 1 + c]]))
    torch.testing.assert_close(mean, torch.tensor([[2 + c, 2 + c, 1 + 3 * c, 1 + c]]) / 4, atol=1e-6, rtol=0)
    # hubs have at least 3 neighbours: c exp(gamma (closeness - .5)); the last is averaged with its mean cosine
    got = vtc.create("script", keep=1, threshold=0.5, hub=3, gamma=2.0).redundancy(tokens)
    last = (2 * math.exp(2 * ((1 + c) / 2 - 0.5)) + (1 + c) / 4) / 2
    edge, middle = 3 * math.exp(2 * ((2 + c) / 3 - 0.5)), 4 * math.exp(2 * ((1 + 3 * c) / 4 - 0.5))
    torch.testing.assert_close(got, torch.tensor([[edge, edge, middle, last]]))


def test_script_joint_takes_what_both_keep() -> None:
    # five tokens on two axes: 0, 1, 2 are equal and redundant, so are 3 and 4 but less. Relevance 1, .9, .8, .7, .6
    tokens = torch.eye(2)[[0, 0, 0, 1, 1]][None]
    s = signals(tokens, 2, clip_dot=torch.tensor([[-1.0, -0.9, -0.8, -0.7, 0.0]]))
    reducer = vtc.create("script", keep=2, rule="joint")
    relevance, _ = reducer.relevance(s)
    assert relevance.tolist()[0][0] == 1.0
    assert reducer.pick(tokens, relevance, 4).tolist() == [[0, 3, 1, 2]]
    # the graph keeps 3, 4, 0, 1 (four of five; equal scores, lowest index first); both: 0, 3 and 1, by relevance 0 and 1
    assert reducer.joint(tokens, relevance, 2).tolist() == [[0, 1]]
    # one wanted of two each: the process names 0 and 3, the graph 3 and 4
    assert reducer.joint(tokens, relevance, 1).tolist() == [[3]]


def test_script_joint_fills_up_with_picks_of_the_process() -> None:
    tokens = torch.eye(4)[[0, 0, 0, 0, 0, 1, 2, 3]][None]
    weight = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6, 0.01, 0.0, 0.0]])
    # four picks: 0, 5, then by relevance 1, 2; the graph keeps 5, 6, 7 and 0; both name 0 and 5
    reducer = vtc.create("script", keep=2, rule="joint")
    assert reducer.pick(tokens, weight, 4).tolist() == [[0, 5, 1, 2]]
    assert reducer.joint(tokens, weight, 2).tolist() == [[0, 5]]
    # two picks: 0 and 5; the graph keeps 5 and 6
    assert reducer.joint(tokens, weight, 1).tolist() == [[5]]


def test_script_keeps_the_better_half_of_the_text() -> None:
    patches = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 2.0]]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, -1.0]])
    # means: image 0 (2, 0): fits 2, 0, -2, 4 -> 3 and 0; image 1 (0, 1.5): 0, 1.5, 0, -1.5 -> 1, then 0 before its equal 2
    reducer = vtc.create("script", keep=1)
    assert reducer.chosen_text(patches, text).tolist() == [[0, 3], [0, 1]]
    assert reducer.chosen_text(patches, text[:1]).tolist() == [[0], [0]]
    assert reducer.clip_dot(patches, text).tolist() == [[1.5, 4.5], [0.5, 1.0]]


def test_script_merges_into_the_closest_kept_token() -> None:
    tokens = torch.tensor([[[2.0, 0.0], [4.0, 1.0], [0.0, 3.0], [1.0, 5.0], [0.0, 1.0]]])
    index = torch.tensor([[0, 2]])
    merged, owner = vtc.create("script", keep=2, merge=True, scaling=2.0).absorb(tokens, index)
    assert owner.tolist() == [[0, 0, 1, 1, 1]]
    # (2 (2, 0) + (4, 1)) / 3 and (2 (0, 3) + (1, 5) + (0, 1)) / 4
    torch.testing.assert_close(merged, torch.tensor([[[8 / 3, 1 / 3], [0.25, 3.0]]]))


def test_script_takes_the_prompt_where_no_clip_text_is_given() -> None:
    text = torch.stack([torch.eye(4)[2], torch.eye(4)[0]])[None]  # the third axis, and padding that must not count
    s = Signals(AXES, Layout.flat(6), torch.arange(6)[None], 1, 6, text=text, text_mask=torch.tensor([[True, False]]))
    chosen = vtc.create("script", keep=1).select(s)
    assert chosen.index.tolist() == [[3]]
    assert "no CLIP text tower" in chosen.note
    without = vtc.create("script", keep=1).select(signals(AXES, 1))
    assert "no text" in without.note
    model = shared("llava")
    with vtc.patch(model, "script", keep=4) as handle, torch.no_grad():
        model(**make_inputs("llava", model, 1))
    assert "no CLIP text tower" in handle.stats.last.images[0].stages[0].note


def test_script_as_released_serves_every_crop_alike() -> None:
    s = random_signals(2, 36, 8, layout=crops(3, 4, 3))
    chosen = vtc.create("script", keep=8, official=True).select(s)
    assert (chosen.index // 12).tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert vtc.create("script", keep=8).select(s).index.shape == (2, 8)


@pytest.mark.parametrize("wrong", [{"rule": "graph"}, {"official": True, "rule": "joint"}, {"scaling": 0.0}])
def test_script_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnknownArgumentError, match="script"):
        vtc.create("script", keep=4, **wrong)
