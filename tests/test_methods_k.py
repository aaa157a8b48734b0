"""Examples small enough to check by hand, and edge cases, of the methods that prune or pool before the language model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from models import image_features, make_inputs, shared
from torch import Tensor

import vtc
from vtc.core import Layout, Signals
from vtc.kernels import absorb_neighbours, drop_duplicates, greedy_dpp
from vtc.reducers.prumerge import outliers
from vtc.reducers.prumerge_plus import released_samples
from vtc.signals import AttentionTap, wide_cls_attn, wide_keys
from vtc.views import each_view, in_first_slots

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
}
"""Reducers and options the edge cases run: ``name`` or ``name-variant``."""

methods = pytest.mark.parametrize("case", CASES)


def make(case: str, **budget: Any) -> vtc.Reducer:
    return vtc.create(case.partition("-")[0], **CASES[case], **budget).bind(facts())


def facts() -> Any:
    from vtc.families import family_of

    return family_of(shared("llava")).facts


def signals(features: Tensor, budget: int, layout: Layout | None = None, **taps: Tensor) -> Signals:
    batch, n = features.shape[:2]
    return Signals(
        features=features,
        layout=layout or Layout.flat(n),
        entries=torch.arange(n).expand(batch, n),
        budget=budget,
        slots=n,
        taps=taps,
    )


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


def crops(rows: int, cols: int, views: int, *, hidden: tuple[int, ...] = ()) -> Layout:
    """A thumbnail and crops side by side; ``hidden`` entries are padding without a slot."""
    n = torch.arange(rows * cols * views)
    view, r, c = n // (rows * cols), n % (rows * cols) // cols, n % cols
    slot = torch.ones_like(n)
    slot[list(hidden)] = 0
    slot = torch.where(slot > 0, slot.cumsum(0) - 1, -1)
    x = c + (view - 1).clamp(min=0) * cols
    return Layout(torch.zeros_like(n), view, r, c, r, x, slot, ((rows, cols),) * views, True)


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
    s = random_signals(case, 3, len(layout), 7, layout=layout)
    together = make(case, keep=7).select(s)
    for b in range(3):
        at = slice(b, b + 1)
        one = signals(s.features[at].clone(), 7, layout, **{k: v[at].clone() for k, v in s.taps.items()})
        alone = make(case, keep=7).select(one)
        real = slice(None) if together.valid is None else together.valid[b]
        assert torch.equal(alone.index[0], together.index[b, real])
        if alone.features is not None:
            assert torch.equal(alone.features[0], together.features[b, real])
        if alone.owner is not None:
            assert torch.equal(alone.owner[0], together.owner[b])


@methods
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("keep", [1, 7, 0.5])
def test_inside_a_model(case: str, family: str, keep: float) -> None:
    model = shared(family)
    inputs = make_inputs(family, model, 2)
    lengths = [len(f) for f in image_features(model, inputs)]
    name, options = case.partition("-")[0], CASES[case]
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtc.patch(model, name, keep=keep, **options) as handle:
            short = model(**inputs).logits
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        call = handle.stats.last
    real = inputs["attention_mask"].bool()
    assert torch.isfinite(short[real]).all()
    assert not torch.equal(short[real], plain[real])
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    for image, slots in zip(call.images, lengths, strict=True):
        assert 1 <= image.kept < slots
        if not options.get("official") and handle.reducer.newline_policy == "none":
            assert image.kept == (keep if isinstance(keep, int) else round(keep * slots))


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
    anchors, buffers, registers = reducer.groups(s)
    assert anchors.tolist() == [4]
    assert sorted(buffers.tolist()) == [0, 5, 8]
    assert registers.tolist() == [11, 3]  # two are left for the deep layer, and 4 is kept already
    assert reducer.select(s).index.tolist() == [[0, 3, 4, 5, 8, 11]]
    # the release counts patch numbers: 4 - 1 = 3 is a neighbour
    as_released = vtc.create("hiprune", keep=6, alpha=0.8, official=True)
    assert sorted(as_released.groups(s)[1].tolist()) == [0, 3, 5, 8]
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
    anchors, buffers, registers = vtc.create("hiprune", keep=3, alpha=1.0).groups(s)
    assert (anchors.tolist(), buffers.tolist(), registers.tolist()) == ([4], [1, 7], [])


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
    features = torch.randn(1, 60, 4, generator=generator)  # rank 4
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
    monkeypatch.setattr("vtc.reducers.prumerge.NEIGHBOURS", 2)
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
            with vtc.patch(model, name, keep=1.0, adaptive=True) as handle, torch.no_grad():
                model(**make_inputs(family, model, 2))
            for image in handle.stats.last.images:
                assert 2 <= image.kept < image.slots
                assert image.stages[0].requested is None


def test_prumerge_plus_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.reducers.prumerge.NEIGHBOURS", 0)
    s = dataclasses.replace(merge_example(), budget=5)
    chosen = vtc.create("prumerge_plus", keep=5).select(s)
    # four kept: two by attention (0, 3); of 1 2 4 5 6 7 two at even distances, the places 1 and 4: 2 and 6
    assert chosen.features[0, :4, 0].tolist() == [1, 1e3, 1e2, 1e6]
    torch.testing.assert_close(chosen.features[0, 4, 0], torch.tensor(0.1 * 1e5 + 0.05 * 1e7))
    assert chosen.owner.tolist() == [[0, 4, 2, 1, 4, 4, 3, 4]]


def test_prumerge_plus_as_released_keeps_a_patch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.reducers.prumerge.NEIGHBOURS", 1)
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
