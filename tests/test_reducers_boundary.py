"""Examples small enough to check by hand, and edge cases, of the methods that prune or pool before the language model."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from models import build, make_inputs, shared
from plain import check_batch_mates, check_inside_a_model, crops, signals
from torch import Tensor

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.engine.project import Projection
from vtc.kernels import (
    absorb_neighbours,
    drop_duplicates,
    farthest_point_weighted,
    greedy_dpp,
    k_means,
    k_medoids,
    seat_clusters,
    similarity_rows,
    ward,
)
from vtc.kernels.ref.hierarchy import _merge_tree
from vtc.reducers.flexpool import target_grid
from vtc.reducers.prumerge_plus import released_samples
from vtc.reducers.tokenpooling import third_party_start
from vtc.signals import AttentionTap, ProjectionTap, sensitivity, wide_cls_attn, wide_keys, zeroth_order_sensitivity
from vtc.views import each_view, in_first_slots, outliers

CASES: dict[str, dict[str, Any]] = {
    "vispruner": {},
    "vispruner-attention": {"important": 1.0},
    "vispruner-duplicates": {"important": 0.0, "official": True},
    "hiprune": {"alpha": 0.8},
    "hiprune-crowded": {"alpha": 1.0, "object_layer": 1},
    "cdpruner": {},
    "cdpruner-negated": {"negate": True},
    "prumerge": {},
    "prumerge_plus": {},
    "zooprune": {"directions": 3},
    "zooprune-lowrank": {"directions": 2, "rank": 5, "newlines": "none"},
    "tokenpooling": {},
    "tokenpooling-kmeans": {"method": "kmeans"},
    "tokenpooling-plain": {"method": "kmeans", "weighted": False},
    "hierpool": {},
    "hierpool-kmeans": {"method": "kmeans"},
    "hierpool-sequential": {"method": "sequential", "renormalize": True},
}
"""Reducers and options the edge cases run: ``name`` or ``name-variant``."""

methods = pytest.mark.parametrize("case", CASES)


def make(case: str, **budget: Any) -> vtc.Reducer:
    return vtc.create(case.partition("-")[0], **CASES[case], **budget).bind(facts())


def facts() -> Any:
    from vtc.families import family_of

    return family_of(shared("llava")).facts


def random_signals(case: str, batch: int, n: int, budget: int, *, seed: int = 0, layout: Layout | None = None) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    taps = {}
    for need in make(case, keep=1).needs:
        shape = (batch, n, 6) if need.name in ("wide_keys",) else (batch, n)
        taps[need.name] = torch.rand(shape, generator=generator)
    return signals(torch.randn(batch, n, 5, generator=generator), budget, layout, **taps)


def changed(s: Signals, budget: int, **taps: Tensor) -> Signals:
    return dataclasses.replace(s, budget=budget, taps={**s.taps, **taps})


def on_circle(*degrees: float) -> Tensor:
    """``(1, N, 2)`` unit vectors."""
    turn = torch.tensor(degrees) * math.pi / 180
    return torch.stack([turn.cos(), turn.sin()], 1)[None]


# ------------------------------------------------------------------------------------------------------ all of them
@methods
@pytest.mark.parametrize("n", [1, 2, 6, 13])
def test_every_budget_is_met(case: str, n: int) -> None:
    for budget in range(1, n + 1):
        s = random_signals(case, 2, n, budget, seed=n)
        chosen = make(case, keep=budget).select(s)
        assert chosen.index.shape == (2, budget)
        assert (chosen.index[:, 1:] > chosen.index[:, :-1]).all()
        assert 0 <= int(chosen.index.min())
        assert int(chosen.index.max()) < n
        if chosen.features is not None:
            assert torch.isfinite(chosen.features).all()
        if budget == n:
            assert chosen.index.tolist() == [list(range(n))] * 2
            assert chosen.features is None or torch.equal(chosen.features, s.features)


@methods
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_tokens_and_attention_of_zero(case: str, value: float) -> None:
    s = random_signals(case, 1, 9, 4)
    same = signals(torch.full((1, 9, 5), value), 4, **{name: torch.zeros_like(t) for name, t in s.taps.items()})
    chosen = make(case, keep=4).select(same)
    assert chosen.index.shape == (1, 4)
    assert len(set(chosen.index[0].tolist())) == 4
    if chosen.features is not None:
        assert torch.isfinite(chosen.features).all()


@methods
@pytest.mark.parametrize("views", [1, 3])
def test_batch_mates_change_nothing(case: str, views: int) -> None:
    layout = crops(3, 4, 3, hidden=(24, 25, 26, 27)) if views == 3 else Layout.grid(3, 4)
    check_batch_mates(make(case, keep=7), random_signals(case, 3, len(layout), 7, layout=layout))


@methods
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 7, 0.5])
def test_inside_a_model(case: str, family: str, keep: float) -> None:
    check_inside_a_model(family, case.partition("-")[0], keep, exact="official" not in CASES[case], **CASES[case])


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("cdpruner")])
def test_prefill_and_decode_agree(case: str) -> None:
    """Token by token with the reduced cache gives the logits of one pass over prompt and answer.

    Not so where the choice depends on the text, and so on whether the answer is part of the prompt.
    """
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 1)
    with vtc.patch(model, case.partition("-")[0], keep=9, **CASES[case]), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
        whole = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        logits = model(**whole).logits[:, -6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), logits.double(), atol=1e-5, rtol=1e-5)


TOWER = ("vispruner", "hiprune", "prumerge", "prumerge_plus", "tokenpooling")
AFTER = ("cdpruner", "zooprune", "hierpool", "flexpool")


@pytest.mark.parametrize("first", TOWER)
@pytest.mark.parametrize("second", AFTER)
def test_one_before_and_one_after_the_projector(first: str, second: str) -> None:
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 2)
    before, after = vtc.create(first, keep=21), vtc.create(second, keep=8)
    with vtc.patch(model, [before, after]) as handle, torch.no_grad():
        together = model(**inputs).logits
        images = handle.stats.last.images
        real = inputs["attention_mask"][0].bool()
        one = {k: inputs[k][:1, real] for k in ("input_ids", "attention_mask")}
        alone = model(**one, pixel_values=inputs["pixel_values"][:1], image_sizes=inputs["image_sizes"][:1]).logits
    assert torch.isfinite(together[inputs["attention_mask"].bool()]).all()
    for image in images:
        assert [s.reducer for s in image.stages] == [first, second]
        assert image.stages[0].after == image.stages[1].before == 21
        assert image.kept == 8 or (second == "flexpool" and 1 <= image.kept <= 8)
    torch.testing.assert_close(together[0, real], alone[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- view by view
def test_views_share_the_budget_and_padding_has_no_part_in_it() -> None:
    layout = crops(1, 4, 3, hidden=(5, 6, 7))  # the first crop has one patch left
    s = signals(torch.randn(1, 12, 2), 7, layout, score=torch.arange(12.0)[None])
    asked = []

    def best(view: Signals) -> Any:
        asked.append((view.entries[0].tolist(), view.budget))
        return vtc.Selection(view.score.topk(view.budget, dim=1).indices.sort(1).values)

    # 7 for three views of 4, 1 and 4: the small one is kept whole without being asked, the others get three each
    assert each_view(s, best).index.tolist() == [[1, 2, 3, 4, 9, 10, 11]]
    assert asked == [([0, 1, 2, 3], 3), ([8, 9, 10, 11], 3)]
    asked.clear()
    # 7 // 3 each; the small view cannot use its second token
    assert each_view(s, best, floor=True).index.tolist() == [[2, 3, 4, 10, 11]]


def test_merged_tokens_fill_the_first_slots_view_after_view() -> None:
    # a thumbnail and two crops of 1 x 2, entries 0 1 | 2 3 | 4 5; in the stitched picture crops alternate: slots 0 1 | 2 4 | 3 5
    layout = dataclasses.replace(crops(1, 2, 3), slot=torch.tensor([0, 1, 2, 4, 3, 5]))
    s = signals(torch.zeros(1, 6, 1), 4, layout)
    index, owner = torch.tensor([[0, 2, 4, 5]]), torch.tensor([[0, 0, 1, -1, 2, 3]])
    tokens = torch.tensor([[[10.0], [20.0], [30.0], [40.0]]])
    moved = in_first_slots(s, vtc.Selection(index, tokens, owner))
    # the first four slots are the entries 0, 1, 2 and 4
    assert moved.index.tolist() == [[0, 1, 2, 4]]
    assert moved.features.flatten().tolist() == [10, 20, 30, 40]
    # only two crops, in reversed order of slots: entry 2 is slot 1, entry 1 slot 2
    layout = dataclasses.replace(crops(1, 2, 2), slot=torch.tensor([0, 2, 1, 3]))
    s = signals(torch.zeros(1, 4, 1), 3, layout)
    moved = in_first_slots(s, vtc.Selection(torch.tensor([[0, 2, 3]]), tokens[:, :3], torch.tensor([[0, 2, 1, -1]])))
    assert moved.index.tolist() == [[0, 1, 2]]  # slots 0, 2, 1
    assert moved.features.flatten().tolist() == [10, 30, 20]  # read in slot order: 10, 20, 30
    assert moved.owner.tolist() == [[0, 1, 2, -1]]


# -------------------------------------------------------------------------------------------------------- vispruner
def test_vispruner_by_hand() -> None:
    # by attention: 9 8 7 6 | 5 4 3 2 1 0. The four first stay; of the others the even places hold 5, 3, 1, the odd ones 4, 2, 0
    attention = torch.arange(1.0, 11.0)[None]
    degrees = dict.fromkeys(range(6, 10), 50.0)
    degrees |= {5: 0.0, 4: 5.0}  # five degrees apart
    degrees |= {3: 100.0, 2: 102.0}  # two degrees apart
    degrees |= {1: 200.0, 0: 300.0}  # far from anything
    features = on_circle(*(degrees[i] for i in range(10)))
    # eight of ten: two go, 3 (the closest to an odd one) and 5
    chosen = vtc.create("vispruner", keep=8).select(signals(features, 8, cls_attn=attention))
    assert chosen.index.tolist() == [[0, 1, 2, 4, 6, 7, 8, 9]]
    # what is left is 1 (the even one), then 4, 2, 0
    important, others = vtc.create("vispruner", keep=8).split(signals(features, 8, cls_attn=attention))
    assert important.tolist() == [[9, 8, 7, 6]]
    assert others.tolist() == [[1, 4, 2, 0]]


def test_vispruner_second_round_goes_on_with_the_new_order() -> None:
    # step 1: round one compares 0, 2, 4 with 1, 3: drops 2 (it equals 3); left: 4 (cos 10), 0 (cos 20), then 1, 3
    # round two compares 4, 1 with 0, 3: 4 is 30 from 0 and 60 from 3; 1 is 20 from 0 and 90 from 3 -> 1 goes
    features = on_circle(0, 20, 110, 110, 30)
    left = drop_duplicates(features, torch.arange(5)[None], 4, step=1)
    assert left.tolist() == [[4, 0, 1, 3]]
    # 4 (30) against 0 (0) and 3 (110): 30; 1 (20) against 0 and 3: 20, the closer one, goes
    assert drop_duplicates(features, torch.arange(5)[None], 3, step=1).tolist() == [[4, 0, 3]]


def test_vispruner_takes_an_odd_list() -> None:
    attention = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    features = on_circle(0, 0, 90, 2)  # of 1, 2, 3: even places 1 and 3, odd place 2; 3 is 88 degrees from it, 1 is 90
    chosen = vtc.create("vispruner", keep=3, important=0.4).select(signals(features, 3, cls_attn=attention))
    assert chosen.index.tolist() == [[0, 1, 2]]


def test_neighbour_lists_have_no_influence() -> None:
    features = torch.randn(2, 90, 6, generator=torch.Generator().manual_seed(5))
    features[:, 40:] = features[:, :50] + 0.01 * torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(6))
    order = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(i)) for i in (1, 2)])
    long = drop_duplicates(features, order, 9, near=89)
    assert torch.equal(long, drop_duplicates(features, order, 9, near=1))
    assert torch.equal(long, drop_duplicates(features, order, 9, near=7))


# ---------------------------------------------------------------------------------------------------------- hiprune
def test_hiprune_by_hand() -> None:
    # grid 3 x 4:  0  1  2  3      anchor: patch 4 (row 1, column 0); neighbours 0 above, 8 below, 5 to the right
    #              4  5  6  7      (patch 3, the end of the row above, is no neighbour)
    #              8  9 10 11
    middle, deep = torch.zeros(1, 12), torch.zeros(1, 12)
    middle[0, 4] = 1.0
    deep[0, [4, 11, 3, 7]] = torch.tensor([0.9, 0.5, 0.4, 0.3])
    s = signals(torch.zeros(1, 12, 2), 6, Layout.grid(3, 4), object_attn=middle, deep_attn=deep)
    reducer = vtc.create("hiprune", keep=6, alpha=0.8)  # round(6 * 0.8 / 5) = round(0.96) = 1 anchor
    anchors, buffers, registers = (group[0].nonzero()[:, 0].tolist() for group in reducer.groups(s))
    assert anchors == [4]
    assert buffers == [0, 5, 8]
    assert registers == [3, 11]  # two are left for the deep layer, and 4 is kept already
    assert reducer.select(s).index.tolist() == [[0, 3, 4, 5, 8, 11]]
    # the release counts patch numbers: 4 - 1 = 3 is a neighbour
    as_released = vtc.create("hiprune", keep=6, alpha=0.8, official=True)
    assert as_released.groups(s)[1][0].nonzero()[:, 0].tolist() == [0, 3, 5, 8]
    assert as_released.select(s).index.tolist() == [[0, 3, 4, 5, 8, 11]]


def test_hiprune_official_border_patch_counts_its_clamped_neighbours() -> None:
    middle, deep = torch.zeros(1, 9), torch.linspace(0.1, 0.9, 9)[None].clone()
    middle[0, 1] = 1.0  # neighbours of 1 in a 3 x 3 grid: 0, 2, 4, and above the picture 1 - 3 -> clamped to 0
    s = signals(torch.zeros(1, 9, 2), 5, Layout.grid(3, 3), object_attn=middle, deep_attn=deep)
    reducer = vtc.create("hiprune", keep=5, alpha=1.0, official=True)
    assert reducer.select(s).index.tolist() == [[0, 1, 2, 4, 8]]
    # on a sum of attention the release may choose an anchor again: 1 has 3.0 - 1 = 2.0, more than any other
    deep[0, 1] = 3.0
    s = signals(torch.zeros(1, 9, 2), 5, Layout.grid(3, 3), object_attn=middle, deep_attn=deep)
    assert reducer.select(s).index.tolist() == [[0, 1, 2, 4]]
    assert vtc.create("hiprune", keep=5, alpha=1.0).select(s).index.tolist() == [[0, 1, 2, 4, 8]]


def test_hiprune_cuts_an_excess_of_buffers_by_their_score() -> None:
    middle = torch.tensor([[0.1, 0.6, 0.2, 0.3, 1.0, 0.4, 0.0, 0.5, 0.0]])  # anchor 4 in the centre; around it 1, 3, 5, 7
    s = signals(torch.zeros(1, 9, 2), 3, Layout.grid(3, 3), object_attn=middle, deep_attn=torch.zeros(1, 9))
    groups = vtc.create("hiprune", keep=3, alpha=1.0).groups(s)
    assert [group[0].nonzero()[:, 0].tolist() for group in groups] == [[4], [1, 7], []]


def test_hiprune_layer_is_a_number_from_one_or_a_share() -> None:
    assert [n.layer for n in vtc.create("hiprune", keep=9).needs] == [8, -2]
    assert [n.layer for n in vtc.create("hiprune", keep=9, object_layer=16).needs] == [15, -2]
    assert make("hiprune", keep=9).object_layer == 1  # 0.375 of 4 layers
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(vtc.errors.UnknownArgumentError, match="object_layer"):
            vtc.create("hiprune", keep=9, object_layer=wrong)
    with pytest.raises(vtc.errors.UnknownArgumentError, match="the vision tower has 4 layers"):
        vtc.patch(shared("llava"), "hiprune", keep=9, object_layer=9)


# --------------------------------------------------------------------------------------------------------- cdpruner
AXES = torch.eye(4)[[0, 0, 1, 2, 2, 3]][None]
"""Six tokens on four axes: 0 and 1 are equal, so are 3 and 4."""


def test_cdpruner_by_hand() -> None:
    # relevance is the negative cosine: 1, 0.9, 0.5, 0.25, 0, 0.1 (already between 0 and 1); the determinant of a set is the product
    # of squared relevances as long as no two tokens lie on one axis, and 0 otherwise. So: 0, then 2, 3, 5; nothing adds anything
    # any more, and the others follow by relevance: 1, 4
    cosine = torch.tensor([[-1.0, -0.9, -0.5, -0.25, 0.0, -0.1]])
    s = signals(AXES, 4, clip_cosine=cosine)
    reducer = vtc.create("cdpruner", keep=4)
    relevance, note = reducer.relevance(s)
    torch.testing.assert_close(relevance, -cosine + 1e-6)
    assert note == ""
    assert reducer.pick(AXES, relevance, 6).tolist() == [[0, 2, 3, 5, 1, 4]]
    assert reducer.select(s).index.tolist() == [[0, 2, 3, 5]]


def test_cdpruner_takes_the_prompt_where_no_clip_text_is_given() -> None:
    # text: the third axis, and padding that must not count. Tokens 3 and 4 point there
    text = torch.stack([torch.eye(4)[2], torch.eye(4)[0]])[None]
    s = Signals(AXES, Layout.flat(6), torch.arange(6)[None], 1, 6, text=text, text_mask=torch.tensor([[True, False]]))
    chosen = vtc.create("cdpruner", keep=1).select(s)
    assert chosen.index.tolist() == [[3]]
    assert "no CLIP text tower" in chosen.note
    assert vtc.create("cdpruner", keep=1, negate=True).select(s).index.tolist() == [[0]]
    without = vtc.create("cdpruner", keep=1).select(signals(AXES, 1))
    assert "no text" in without.note


def test_cdpruner_tells_in_the_statistics_what_it_used() -> None:
    model = shared("llava")
    with vtc.patch(model, "cdpruner", keep=4) as handle, torch.no_grad():
        model(**make_inputs("llava", model, 1))
    assert "no CLIP text tower" in handle.stats.last.images[0].stages[0].note


def test_cdpruner_scales_relevance_over_the_views_of_an_image_but_not_over_the_batch() -> None:
    cosine = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, 0.0, -8.0, 0.0]])
    s = signals(torch.ones(2, 4, 2), 2, crops(1, 2, 2), clip_cosine=cosine)
    torch.testing.assert_close(
        vtc.create("cdpruner", keep=2).relevance(s)[0], torch.tensor([[0, 0.25, 0.5, 1], [0, 0, 1, 0]]), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        vtc.create("cdpruner", keep=2, official=True).relevance(s)[0],
        torch.tensor([[0, 0.125, 0.25, 0.5], [0, 0, 1, 0]]),
        atol=2e-6,
        rtol=0,
    )


def test_dpp_beyond_its_rank_is_guarded_and_as_released_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(1, 60, 4, generator=generator), dim=-1)  # rank 4
    weight = torch.rand(1, 60, generator=generator)
    bare = greedy_dpp(features, weight, 40, guard=False)[0].tolist()
    kept = greedy_dpp(features, weight, 40)[0].tolist()
    assert bare[:4] == kept[:4]
    assert len(set(bare)) < 40
    assert len(set(kept)) == 40
    by_weight = [i for i in weight[0].argsort(descending=True).tolist() if i not in kept[:4]]
    assert kept[4:] == by_weight[:36]
    chosen = vtc.create("cdpruner", keep=40, official=True).select(signals(features, 40, clip_cosine=-weight))
    assert chosen.index.shape[1] < 40


def test_greedy_dpp_maximises_the_determinant_step_by_step() -> None:
    generator = torch.Generator().manual_seed(3)
    features, weight = torch.randn(9, 5, generator=generator).double(), torch.rand(9, generator=generator).double()
    unit = features / features.norm(dim=1, keepdim=True)
    kernel = weight[:, None] * (unit @ unit.T) * weight
    chosen: list[int] = []
    for _ in range(4):
        rest = [i for i in range(9) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert greedy_dpp(features[None], weight[None], 4)[0].tolist() == chosen


# --------------------------------------------------------------------------------------------------------- prumerge
def test_wide_attention_is_one_head_of_full_width() -> None:
    # two heads of width 1: q_cls = (2, 0 | in one head: (2, 0)), keys (0, 5), (1, 0), (0, 1), (1, 1); scale sqrt(2)
    query, key = torch.tensor([[2.0, 0.0]]).repeat(4, 1), torch.tensor([[0.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    tap = AttentionTap(*(t.T[None, :, :, None] for t in (query, key, key)), scaling=1.0, cls=True)
    e = math.exp(2 / math.sqrt(2))
    torch.testing.assert_close(wide_cls_attn().measure(tap), torch.tensor([[e, 1.0, e]]) / (2 + 2 * e))
    assert wide_keys().measure(tap).tolist() == [[[1, 0], [0, 1], [1, 1]]]


def merge_example() -> Signals:
    # eight tokens whose feature is a power of ten; keys on a circle: 0 1 2 close together, 3 4 5, and 6 7
    features = 10.0 ** torch.arange(8)[None, :, None]
    attention = torch.tensor([[0.5, 0.0, 0.1, 0.2, 0.0, 0.1, 0.05, 0.05]])
    return signals(features, 3, wide_cls_attn=attention, wide_keys=on_circle(0, 1, 2, 120, 121, 122, 240, 241))


def test_prumerge_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.views.AbsorbingReducer.neighbours", 2)
    s = merge_example()
    chosen = vtc.create("prumerge", keep=3).select(s)
    # kept: 0 (neighbours 1 and 2: 0 * 10 + 0.1 * 100) and 3 (neighbours 4 and 5: 0 + 0.1 * 1e5); the rest: 1 2 4 5 6 7
    rest = 0.1 * 1e2 + 0.1 * 1e5 + 0.05 * 1e6 + 0.05 * 1e7
    torch.testing.assert_close(chosen.features.flatten(), torch.tensor([1 + 10, 1e3 + 1e4, rest]))
    assert chosen.index.tolist() == [[0, 1, 2]]
    assert chosen.owner.tolist() == [[0, 2, 2, 1, 2, 2, 2, 2]]


def test_prumerge_kept_tokens_may_be_neighbours_and_all_of_few_are() -> None:
    # fewer than 32 others: a kept token absorbs all of them, whether kept or not
    s = merge_example()
    total = (s.wide_cls_attn * s.features[..., 0]).sum()
    chosen = vtc.create("prumerge", keep=3).select(s)
    torch.testing.assert_close(chosen.features[0, 0, 0], total + 1 - 0.5)
    # one token: the most attended with its neighbours, and no sum of the rest
    alone = vtc.create("prumerge", keep=1).select(dataclasses.replace(s, budget=1))
    torch.testing.assert_close(alone.features.flatten(), (total + 1 - 0.5)[None])
    assert alone.owner.tolist() == [[0, -1, -1, -1, -1, -1, -1, -1]]


def test_prumerge_adaptive_counts_the_outliers() -> None:
    # 1..8: quartiles 2.75 and 6.25, range 3.5, threshold 11.5. With 8 -> 12 there is one outlier of eight
    assert outliers(torch.arange(1.0, 9.0)) == 0
    attention = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 12]])
    assert outliers(attention) == 1 / 8
    s = changed(merge_example(), 8, wide_cls_attn=attention)
    assert vtc.create("prumerge", keep=1.0, adaptive=True).select(s).index.shape == (1, 2)  # the outlier and the rest
    none = changed(s, 8, wide_cls_attn=torch.arange(1.0, 9.0)[None])
    assert vtc.create("prumerge", keep=1.0, adaptive=True).select(none).index.shape == (1, 2)
    released = vtc.create("prumerge", keep=1.0, adaptive=True, official=True)
    assert released.select(none).index.shape == (1, 1)  # no outlier: only the sum of all
    # the release pools a batch: no outlier in the first image, one in the second, one of sixteen together: int(8 / 16) = 0 each
    both = signals(
        s.features.repeat(2, 1, 1),
        8,
        wide_cls_attn=torch.cat([none.wide_cls_attn, attention]),
        wide_keys=s.wide_keys.repeat(2, 1, 1),
    )
    assert released.select(both).valid is None
    assert released.select(both).index.shape == (2, 1)
    own = vtc.create("prumerge", keep=1.0, adaptive=True).select(both)
    assert own.index.shape == (2, 2)


def test_prumerge_adaptive_in_a_model_has_no_request_to_meet() -> None:
    for name in ("prumerge", "prumerge_plus"):
        for family in ("llava", "llava_next", "llava_siglip"):
            model = shared(family)
            with vtc.patch(model, name, keep=9, adaptive=True) as handle, torch.no_grad():
                model(**make_inputs(family, model, 2))
            for image in handle.stats.last.images:
                assert 1 <= image.kept <= 9
                assert image.stages[0].requested is None


def test_prumerge_plus_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.views.AbsorbingReducer.neighbours", 0)
    s = dataclasses.replace(merge_example(), budget=5)
    chosen = vtc.create("prumerge_plus", keep=5).select(s)
    # four kept: two by attention (0, 3); of 1 2 4 5 6 7 two at even distances, the places 1 and 4: 2 and 6
    assert chosen.features[0, :4, 0].tolist() == [1, 1e3, 1e2, 1e6]
    torch.testing.assert_close(chosen.features[0, 4, 0], torch.tensor(0.1 * 1e5 + 0.05 * 1e7))
    assert chosen.owner.tolist() == [[0, 4, 2, 1, 4, 4, 3, 4]]


def test_prumerge_plus_as_released_keeps_a_patch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.views.AbsorbingReducer.neighbours", 1)
    attention = torch.tensor([[0.0, 0.1, 0.4, 0.2, 0.1, 0.1, 0.3, 0.1]])
    s = changed(merge_example(), 5, wide_cls_attn=attention)
    # two by attention: 2, 6; two sampled of eight at steps of 4 from 2: 2 and 6 again, so each is the nearest to itself
    assert released_samples(8, 2).tolist() == [2, 6]
    got = vtc.create("prumerge_plus", keep=5, official=True).select(s).features.flatten()
    # two patches are kept twice, so the two lowest of the others, 0 and 1, are forgotten by the last token
    rest = 0.2 * 1e3 + 0.1 * 1e4 + 0.1 * 1e5 + 0.1 * 1e7
    torch.testing.assert_close(got, torch.tensor([1.4 * 1e2, 1.3 * 1e6, 1.4 * 1e2, 1.3 * 1e6, rest]))


def test_prumerge_plus_says_what_the_release_cannot_do() -> None:
    assert len(released_samples(576, 72)) == 72
    assert released_samples(576, 72)[:2].tolist() == [4, 12]
    with pytest.raises(vtc.errors.BudgetError, match="a keep such as 145"):
        released_samples(576, 500)


def test_absorbing_goes_to_the_lowest_index_among_equals() -> None:
    features = 10.0 ** torch.arange(4)[None, :, None]
    keys, ones = torch.ones(1, 4, 2), torch.ones(1, 4)
    rows = torch.tensor([[2, 0]])
    assert absorb_neighbours(features, keys, ones, rows, 2).flatten().tolist() == [111, 111]
    assert absorb_neighbours(features, keys, ones, rows, 2, block=1).flatten().tolist() == [111, 111]
    assert absorb_neighbours(features, keys, ones, rows, 9).flatten().tolist() == [1111, 1111]


# --------------------------------------------------------------------------------------------------------- zooprune
def test_sensitivity_by_hand() -> None:
    # the square of every coordinate: ((x + h u)^2 - (x - h u)^2) / 2h = 2 x u, along the axes 2 |x_0| and 2 |x_1|; their mean
    x = torch.tensor([[3.0, 0.0], [1.0, -1.0], [0.0, 0.5]])
    got = zeroth_order_sensitivity(x, torch.square, torch.tensor([[5.0, 0.0], [0.0, 0.1]]), 0.25)
    torch.testing.assert_close(got, torch.tensor([3.0, 2.0, 0.5]))


def test_zooprune_by_hand() -> None:
    # first the most sensitive, 0. Then weight times distance 1 - cos: 1: 0.9 * (1 - cos 30) = 0.12; 2: 0.5 * 1 = 0.5;
    # 3: 0.2 * 2 = 0.4; 4: weight 0. -> 2. Then 3: 0.2 * (1 - cos 90) = 0.2, 1: 0.12 -> 3; then 1, at last 4
    features = on_circle(0, 30, 90, 180, 270)
    s = signals(features, 3, sensitivity=torch.tensor([[11.0, 10.0, 6.0, 3.0, 1.0]]))
    reducer = vtc.create("zooprune", keep=3)
    assert reducer.pick(dataclasses.replace(s, budget=5)).tolist() == [[0, 2, 3, 1, 4]]
    assert reducer.select(s).index.tolist() == [[0, 2, 3]]


def test_zooprune_takes_the_lowest_of_equals() -> None:
    weight = torch.zeros(1, 5)
    assert farthest_point_weighted(on_circle(0, 90, 180, 270, 45), weight, 5).tolist() == [[0, 1, 2, 3, 4]]
    # equal sensitivities count as 1: plain farthest point from token 0; in a release's crop as 0
    layout, features = crops(1, 3, 2), on_circle(0, 10, 180, 0, 10, 180)
    s = signals(features, 4, layout, sensitivity=torch.full((1, 6), 7.0))
    assert vtc.create("zooprune", keep=4).select(s).index.tolist() == [[0, 2, 3, 5]]
    assert vtc.create("zooprune", keep=4, official=True).select(s).index.tolist() == [[0, 1, 3, 4]]
    plain = signals(features[:, :3], 2, sensitivity=torch.full((1, 3), 7.0))
    assert vtc.create("zooprune", keep=2, official=True).select(plain).index.tolist() == [[0, 2]]


def test_sensitivity_in_a_model_is_that_of_its_projector() -> None:
    for dtype in (torch.float32, torch.float16):
        model = shared("llava", "sdpa", dtype)
        inputs = make_inputs("llava", model, 1)
        seen = []
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _m, a, seen=seen: seen.append(a[0]))
        with vtc.patch(model, "zooprune", keep=4, directions=2) as handle, torch.no_grad():
            inner = handle.family.text.register_forward_hook(
                lambda _m, _a, k, _o, seen=seen: seen.append(k["_vtc"].records[False].signals), with_kwargs=True
            )
            model(**inputs)
            inner.remove()
        hook.remove()
        assert len(seen) == 2, "the measure must not run the model's own hooks"
        (need,) = handle.reducer.needs
        draw = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
        wide = copy.deepcopy(model.model.multi_modal_projector).float()
        with torch.no_grad():
            want = zeroth_order_sensitivity(seen[0], wide, draw, 0.01)
        torch.testing.assert_close(seen[1][need.key][0], want[0])
        assert model.model.multi_modal_projector.linear_1.weight.dtype == dtype


def test_low_rank_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.GELU(), torch.nn.Linear(6, 6))
    projection, x = Projection(projector), torch.randn(3, 8, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(projection.function()(x), projector(x))
        assert projection.function(6)[0].weight.data_ptr() == projector[0].weight.data_ptr(), "full rank: nothing to factor"
        cut = projection.function(2)
        u, s, v = torch.linalg.svd(projector[0].weight)
        best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
        torch.testing.assert_close(cut[0](x), x @ best.T + projector[0].bias)
        assert projection.function(2)[0].first is cut[0].first, "factors are made once"
        projector[0].weight.mul_(2)
        torch.testing.assert_close(projection.function(2)[0](x), 2 * x @ best.T + projector[0].bias)


def test_directions_depend_on_the_seed_only() -> None:
    tap = ProjectionTap(torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)), lambda _rank: torch.tanh)
    once, again, other = (sensitivity(directions=4, seed=seed).measure(tap) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    alone = sensitivity(directions=4).measure(dataclasses.replace(tap, features=tap.features[1:]))
    assert torch.equal(alone[0], once[1])


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("zooprune", "directions", 0), ("zooprune", "rank", 0), ("zooprune", "step", 0.0), ("vispruner", "important", 1.5)],
)
def test_senseless_options_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(vtc.errors.UnknownArgumentError, match=f"{name}: {option}"):
        vtc.create(name, keep=4, **{option: value})


# ----------------------------------------------------------------------------------------------------- tokenpooling
def line(*x: float) -> Tensor:
    """``(1, N, 1)`` points on a line."""
    return torch.tensor(x, dtype=torch.float32)[None, :, None]


def test_weighted_k_medoids_by_hand() -> None:
    # the most significant ones are 0 (w 5) and 3 (w 4). Round one: 0 1 2 | 10 11 15.
    # sums of w * distance, left: 0 -> 1*1 + 1*2 = 3; 1 -> 5*1 + 1*1 = 6; 2 -> 11: stays 0.
    # right, w 4 3 2: 10 -> 3*1 + 2*5 = 13; 11 -> 4*1 + 2*4 = 12; 15 -> 4*5 + 3*4 = 32: moves to 11. Then nothing changes.
    points, weight = line(0, 1, 2, 10, 11, 15), torch.tensor([[5.0, 1, 1, 4, 3, 2]])
    medoids, owner = k_medoids(points, torch.tensor([[0, 3]]), 5, weight=weight)
    assert medoids.tolist() == [[0, 4]]
    assert owner.tolist() == [[0, 0, 0, 1, 1, 1]]
    chosen = vtc.create("tokenpooling", keep=2).select(signals(points, 2, received_attn=weight))
    assert chosen.index.tolist() == [[0, 4]]
    assert chosen.features is None
    # without weights: left 0 -> 3, 1 -> 2, 2 -> 3; right 10 -> 6, 11 -> 5, 15 -> 9
    plain = vtc.create("tokenpooling", keep=2, weighted=False).select(signals(points, 2, received_attn=weight))
    assert plain.index.tolist() == [[1, 4]]


def test_third_party_medoids_weight_themselves() -> None:
    # sums of all distances: 0: 39, 1: 35, 2: 33, 10: 33, 11: 35, 15: 51; times the own weight 195 35 33 132 105 102
    # clusters of 0 and 3: 0 1 2 | 3 4 5: cheapest 2 (33) and 15 (102). Then |x - 2| against |x - 15|: 10 and 11 go to 15
    points, weight = line(0, 1, 2, 10, 11, 15), torch.tensor([[5.0, 1, 1, 4, 3, 2]])
    s = signals(points, 2, received_attn=weight)
    reducer = vtc.create("tokenpooling", keep=2, compat="tokenreduction")
    assert reducer.select(s).index.tolist() == [[2, 5]]
    medoids, owner = reducer.medoids(points, weight, torch.tensor([[0, 3]]))
    assert medoids.tolist() == [[2, 5]]
    assert owner.tolist() == [[0, 0, 0, 1, 1, 1]]
    # of two equal centres the second gets nothing, and jumps to token 0
    medoids, _ = vtc.create("tokenpooling", keep=2, compat="tokenreduction", iterations=1).medoids(
        line(5, 5, 7), torch.ones(1, 3), torch.tensor([[0, 1]])
    )
    assert medoids.tolist() == [[0, 0]]


def test_third_party_start_takes_the_largest_distance() -> None:
    # from 4: distances 4 3 0 6 -> 3 (at 10). Largest distances then: 10, 9, 0 (chosen), 0 (chosen) -> 0, although 1 is as far
    # from its nearest chosen one
    assert third_party_start(line(0, 1, 4, 10)[0], torch.tensor([2]), 3).tolist() == [2, 3, 0]
    chosen = vtc.create("tokenpooling", keep=3, compat="tokenreduction", weighted=False)
    s = dataclasses.replace(signals(torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)), 3), fingerprint=(7, 8))
    assert chosen.needs == ()
    assert torch.equal(chosen.select(s).index, chosen.select(s).index)
    assert not torch.equal(chosen.select(s).index, chosen.select(dataclasses.replace(s, fingerprint=(9, 8))).index)


def test_weighted_k_means_by_hand() -> None:
    # starts 0 and 10; left mean (3*0 + 1*4) / 4 = 1, right (1*10 + 1*12) / 2 = 11; nothing changes any more
    points, weight = line(0, 4, 10, 12), torch.tensor([[3.0, 1, 1, 1]])
    centres, owner = k_means(points, torch.tensor([[0, 2]]), 5, weight=weight)
    assert centres.flatten().tolist() == [1, 11]
    assert owner.tolist() == [[0, 0, 1, 1]]
    reducer = vtc.create("tokenpooling", keep=2, method="kmeans")
    chosen = reducer.select(signals(points, 2, received_attn=torch.tensor([[3.0, 1, 2, 1]])))
    # weights 2 and 1 on the right: 32 / 3; the nearest patches are 0 (1 away from the mean, 4 is 3 away) and 10
    torch.testing.assert_close(chosen.features.flatten(), torch.tensor([1.0, 32 / 3]))
    assert chosen.index.tolist() == [[0, 2]]
    assert chosen.owner.tolist() == [[0, 0, 1, 1]]


def test_k_means_conserves_the_weighted_sum() -> None:
    generator = torch.Generator().manual_seed(2)
    features, weight = torch.randn(2, 40, 6, generator=generator), torch.rand(2, 40, generator=generator)
    s = signals(features, 9, received_attn=weight)
    chosen = vtc.create("tokenpooling", keep=9, method="kmeans").select(s)
    mass = torch.zeros(2, 9).scatter_add(1, chosen.owner, weight)
    torch.testing.assert_close((chosen.features * mass[..., None]).sum(1), (features * weight[..., None]).sum(1))


def test_a_cluster_without_members_gets_a_place_of_its_own() -> None:
    features = line(5, 5, 5, 9)[0]
    anchors, owner = seat_clusters(features, torch.tensor([[5.0], [5.0], [9.0]]), torch.tensor([0, 0, 0, 2]))
    assert anchors.tolist() == [0, 1, 3]
    assert owner.tolist() == [0, 1, 0, 2]


def test_tokenpooling_options_that_do_not_go_together() -> None:
    for options in ({"method": "median"}, {"compat": "x"}, {"compat": "tokenreduction", "method": "kmeans"}, {"iterations": 0}):
        with pytest.raises(vtc.errors.UnknownArgumentError, match="tokenpooling"):
            vtc.create("tokenpooling", keep=4, **options)


# --------------------------------------------------------------------------------------------------------- hierpool
def test_ward_by_hand() -> None:
    # squared heights: 3 4 (0 and 1): 1; 1 2 (10 and 12): 4; these two together: 2 * 2 * 2 / 4 * (11 - 0.5)^2 = 220.5, less than
    # 30 with the right one: 2 * 2 * 1 / 3 * 19^2 = 481. So node 5 = {3, 4}, 6 = {1, 2}, 7 = {5, 6}, 8 = {0, 7}
    points = line(30, 10, 12, 0, 1)
    tree, heights = _merge_tree(points[0].double())
    assert tree == [(3, 4), (1, 2), (5, 6), (0, 7)]
    assert heights[:3] == pytest.approx([1, 4, 220.5])
    # three clusters: the inner children of the root come before its leaf
    assert ward(points, 3).tolist() == [[2, 1, 1, 0, 0]]
    # four: node 6 is undone, its leaves are numbered in turn
    assert ward(points, 4).tolist() == [[3, 1, 2, 0, 0]]
    assert ward(points, 1).tolist() == [[0, 0, 0, 0, 0]]


def test_ward_ties_are_merged_together_on_request_only() -> None:
    points = line(0, 1, 10, 11, 30)
    assert len(ward(points, 4).unique()) == 4
    assert ward(points, 4, ties=True).tolist() == [[0, 0, 1, 1, 2]]


@pytest.mark.parametrize("n", [2, 3, 17, 40])
def test_ward_equals_trying_all_pairs(n: int) -> None:
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    groups = [[i] for i in range(n)]
    for clusters in range(n - 1, 0, -1):

        def cost(pair: tuple[int, int], groups: list[list[int]] = groups) -> float:
            a, b = (points[groups[i]] for i in pair)
            return float(len(a) * len(b) / (len(a) + len(b)) * (a.mean(0) - b.mean(0)).square().sum())

        a, b = min(((i, j) for i in range(len(groups)) for j in range(i)), key=cost)
        groups = [g for i, g in enumerate(groups) if i not in (a, b)] + [groups[a] + groups[b]]
        labels = ward(points[None], clusters)[0]
        assert sorted(sorted(g) for g in groups) == sorted((labels == c).nonzero()[:, 0].tolist() for c in range(clusters))


def test_ward_without_a_matrix_gives_the_same_tree() -> None:
    points = torch.randn(120, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with_table, heights = _merge_tree(points)
    without, others = _merge_tree(points, matrix=0)
    assert with_table == without
    assert heights == pytest.approx(others)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_similarity_rows_keep_the_distances(shape: tuple[int, int]) -> None:
    e = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).double()
    rows = 1 - e @ e.transpose(1, 2)
    points = similarity_rows(e)
    assert points.shape[2] == 4
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(rows, rows), atol=1e-9, rtol=1e-9)


def test_hierpool_by_hand() -> None:
    # three directions; lengths have no influence on the clusters, but the mean is that of the tokens as they are
    length = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])
    features = on_circle(90, 0, 2, 180, 92) * length[:, None]
    chosen = vtc.create("hierpool", keep=3).select(signals(features, 3))
    assert chosen.index.tolist() == [[0, 1, 3]]
    assert chosen.owner.tolist() == [[0, 1, 1, 2, 0]]
    want = torch.stack([(features[0, 0] + features[0, 4]) / 2, (features[0, 1] + features[0, 2]) / 2, features[0, 3]])
    torch.testing.assert_close(chosen.features[0], want)
    scaled = vtc.create("hierpool", keep=3, renormalize=True).select(signals(features, 3)).features[0]
    torch.testing.assert_close(scaled, want / want.norm(dim=1, keepdim=True))
    # k-means from tokens 0, 2 and 4: 180 degrees falls to 92, whose centre so moves to 136, and 92 itself goes over to 90
    means = vtc.create("hierpool", keep=3, method="kmeans").select(signals(features, 3))
    owner = means.owner[0].tolist()
    assert owner[0] == owner[4] != owner[1] == owner[2] != owner[3]
    torch.testing.assert_close(means.features[0, [owner[0], owner[1], owner[3]]], want)


def test_hierpool_sequential_runs_are_even() -> None:
    features = line(0, 1, 2, 3, 4, 5, 6)
    chosen = vtc.create("hierpool", keep=3, method="sequential").select(signals(features, 3))
    assert chosen.owner.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert chosen.features.flatten().tolist() == [1, 3.5, 5.5]
    assert chosen.index.tolist() == [[0, 3, 5]]


def test_hierpool_as_released_pools_all_views_as_one_document() -> None:
    features = on_circle(0, 90, 1, 91)
    s = signals(features, 2, crops(1, 2, 2))
    assert vtc.create("hierpool", keep=2).select(s).owner.tolist() == [[0, 0, 1, 1]]
    released = vtc.create("hierpool", keep=2, official=True).select(s)
    assert released.owner[0, 0] == released.owner[0, 2] != released.owner[0, 1] == released.owner[0, 3]
    torch.testing.assert_close(released.features.norm(dim=2), torch.ones(1, 2))
    model = shared("llava_next")
    with vtc.patch(model, "hierpool", keep=6, official=True) as handle, torch.no_grad():
        model(**make_inputs("llava_next", model, 2))
    assert [i.kept for i in handle.stats.last.images] == [6, 6, 6]


def test_hierpool_options_that_do_not_go_together() -> None:
    for options in ({"method": "single"}, {"method": "kmeans", "official": True}):
        with pytest.raises(vtc.errors.UnknownArgumentError, match="hierpool"):
            vtc.create("hierpool", keep=4, **options)


# --------------------------------------------------------------------------------------------------------- flexpool
@pytest.mark.parametrize(
    ("budget", "grid", "want"),
    [
        (64, (24, 24), (8, 8)),
        (144, (24, 24), (12, 12)),
        (256, (24, 24), (16, 16)),
        (7, (4, 4), (3, 2)),  # round(2.65) rows, two columns fit
        (8, (2, 8), (1, 8)),  # round(1.41) = 1
        (1, (5, 9), (1, 1)),
        (60, (3, 30), (2, 30)),  # round(2.45) = 2
        (99, (3, 30), (3, 30)),
    ],
)
def test_flexpool_grid(budget: int, grid: tuple[int, int], want: tuple[int, int]) -> None:
    assert target_grid(budget, *grid) == want


def test_flexpool_by_hand() -> None:
    # 3 x 3 to 2 x 2: cells overlap, rows 0-1 and 1-2, columns likewise
    #   0 1 2      means of 0 1 3 4 | 1 2 4 5 | 3 4 6 7 | 4 5 7 8
    #   3 4 5      centres 0.75 and 2.25 (of 3): rows and columns 0 and 2
    #   6 7 8
    s = signals(line(*range(9)), 4, Layout.grid(3, 3))
    chosen = vtc.create("flexpool", keep=4).select(s)
    assert chosen.features.flatten().tolist() == [2, 3, 5, 6]
    assert chosen.index.tolist() == [[0, 2, 6, 8]]
    # the token in the middle is shown with the last of the four cells it is part of
    assert chosen.owner.tolist() == [[0, 1, 1, 2, 3, 3, 2, 3, 3]]


def test_flexpool_with_holes_averages_what_is_there() -> None:
    # of 2 x 4, tokens 1 and 2 are gone: two cells of 1 column pair each; the left one has 0, 4, 5, the right one 3, 6, 7
    at = torch.tensor([[0, 3, 4, 5, 6, 7]])
    s = dataclasses.replace(signals(at[..., None].float(), 2, Layout.grid(2, 4)), entries=at)
    chosen = vtc.create("flexpool", keep=2).select(s)
    torch.testing.assert_close(chosen.features.flatten(), torch.tensor([9 / 3, 16 / 3]))
    assert chosen.owner.tolist() == [[0, 1, 0, 0, 1, 1]]
    # a cell that lost all its tokens is left out: of 1 x 8, columns 2 to 5 are gone; three cells hold 0-2, 2-5 and 5-7
    at = torch.tensor([[0, 1, 6, 7]])
    s = dataclasses.replace(signals(at[..., None].float(), 3, Layout.grid(1, 8)), entries=at)
    few = vtc.create("flexpool", keep=3).select(s)
    assert few.features.flatten().tolist() == [0.5, 6.5]
    assert few.index.tolist() == [[1, 2]]
    assert few.owner.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("place", ["projected", "tower"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 5, 0.5])
def test_flexpool_inside_a_model(place: str, family: str, keep: float) -> None:
    model = shared(family)
    inputs = make_inputs(family, model, 2)
    with vtc.patch(model, "flexpool", keep=keep, place=place) as handle, torch.no_grad():
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
    for image in handle.stats.last.images:
        assert image.stages[0].stage == {"projected": "boundary", "tower": "vision"}[place]
        assert 1 <= image.kept < image.slots
        if family != "llava_next":
            assert image.kept <= (keep if isinstance(keep, int) else keep * image.slots)


def test_flexpool_before_and_after_a_linear_projector_are_the_same() -> None:
    model = build("llava")
    model.model.multi_modal_projector.act = torch.nn.Identity()
    inputs = make_inputs("llava", model, 1)
    logits = []
    for place in ("projected", "tower"):
        with vtc.patch(model, "flexpool", keep=4, place=place), torch.no_grad():
            logits.append(model(**inputs).logits)
    with torch.no_grad():
        assert not torch.allclose(logits[0], model(**inputs).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=1e-6)


def test_flexpool_keeps_one_newline_per_pooled_row() -> None:
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 1)
    seen = []
    with vtc.patch(model, "flexpool", keep=20) as handle, torch.no_grad():
        hook = handle.family.text.register_forward_hook(
            lambda _m, _a, k, _o: seen.append(k["_vtc"].instances[0]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
    (it,) = seen
    kind, view, y = (getattr(it.layout, name)[it.entries] for name in ("kind", "view", "y"))
    newline = kind == Kind.NEWLINE
    assert y[newline].tolist() == sorted(set(y[~newline & (view > 0)].tolist()))
    assert int(newline.sum()) >= 1
    assert int((~newline).sum()) <= 20


def test_flexpool_batch_mates_change_nothing() -> None:
    layout = crops(3, 4, 3)
    s = signals(torch.randn(3, 36, 4, generator=torch.Generator().manual_seed(0)), 11, layout)
    together = vtc.create("flexpool", keep=11).select(s)
    for b in range(3):
        alone = vtc.create("flexpool", keep=11).select(signals(s.features[b : b + 1].clone(), 11, layout))
        assert torch.equal(alone.index[0], together.index[b])
        assert torch.equal(alone.features[0], together.features[b])


def test_flexpool_refuses_other_places() -> None:
    with pytest.raises(vtc.errors.UnknownArgumentError, match="flexpool: place="):
        vtc.create("flexpool", keep=4, place="moon")
