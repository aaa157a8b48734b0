"""Methods that act inside the language model: examples with the answer worked out by hand, edge cases, and their signals."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers
from golden_decoder import FACTS, Several, facts_of, signals_of
from models import build, make_inputs, shared, visual_of
from reference import hidden_reference
from selected import generate_and_note, plan_of_choices
from torch import Tensor, nn

import vtc
from vtc.core import Need, Reducer, Schedule, Scorer, Selection, Signals, Stage
from vtc.engine.upstream import fixed_layers_count
from vtc.errors import BudgetError, InvalidSignalError, UnknownArgumentError, UnsupportedFeatureError
from vtc.families import family_of
from vtc.kernels import attention_walk, transition_score
from vtc.reducers import aim, corematching, sparsevlm, transprune
from vtc.signals import AttentionTap, StateTap, next_last_attn, next_question_attn, places, question_of

METHODS = {
    "dart": {},
    "pyramiddrop": {},
    "transprune": {},
    "sparsevlm": {},
    "aim": {"start": 2, "stop": 12},
    "corematching": {"rule": "topk"},
}
FAMILIES = ("llava", "llava_next")


def rays(*degrees: float) -> Tensor:
    """Unit vectors of the plane, ``(1, n, 2)``."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


# ---------------------------------------------------------------------------------------------------------------- DART
def dart_signals(states: Tensor, norm: list[float], budget: int, text: Tensor, where: list[int]) -> Signals:
    n = states.shape[1]
    return signals_of(
        states,
        budget,
        key_norm=torch.tensor([norm]),
        final_states=states,
        places=torch.arange(n)[None] + 3,
        text_pivots=text,
        text_places=torch.tensor([where]),
    )


def test_dart_by_hand():
    # Largest key: token 0, at 0 degrees. Least like it: token 4 at 180 degrees. The text pivot points to 90 degrees; of the
    # tokens left (10, 90, 150 and 60 degrees: cosines 0.17, 1, 0.5, 0.87) the least like it is token 1. Kept: 0, 1, 4.
    states = rays(0, 10, 90, 150, 180, 60)
    reducer = vtc.create("dart", keep=3, image_pivots=1, text_pivots=1)
    signals = dart_signals(states, [9, 1, 2, 3, 4, 5], 3, rays(90), [20])
    assert reducer.select(signals).index.tolist() == [[0, 1, 4]]
    image, _, where = reducer.pivots(signals)
    assert image.tolist() == [[0]]
    assert where.tolist() == [[3, 20]]


def test_dart_without_enough_text_uses_the_pivots_there_are():
    # the second text pivot does not exist: the image pivot takes both tokens, 4 (180) and 3 (150)
    states = rays(0, 10, 90, 150, 180, 60)
    text = torch.zeros(1, 2, 2, dtype=torch.float64)
    reducer = vtc.create("dart", keep=3, image_pivots=1, text_pivots=2)
    assert reducer.select(dart_signals(states, [9, 1, 2, 3, 4, 5], 3, text, [-1, -1])).index.tolist() == [[0, 3, 4]]


def test_dart_budget_is_exact_and_the_release_misses_it():
    generator = torch.Generator().manual_seed(0)
    states, norm = torch.randn(1, 200, 8, generator=generator), torch.rand(200, generator=generator).tolist()
    signals = dart_signals(states, norm, 128, torch.randn(1, 4, 8, generator=generator), [300, 301, 302, 303])
    assert vtc.create("dart", keep=128).select(signals).index.shape == (1, 128)
    assert vtc.create("dart", keep=128, official=True).select(signals).index.shape == (1, 132)  # 4 + 8 * (128 // 8)


@pytest.mark.parametrize("budget", [1, 2, 6])
def test_dart_on_identical_and_empty_tokens(budget):
    for states in (rays(30, 30, 30, 30, 30, 30), torch.zeros(1, 6, 2)):
        reducer = vtc.create("dart", keep=budget, image_pivots=2, text_pivots=1)
        index = reducer.select(dart_signals(states, [1.0] * 6, budget, states[:, :1], [9])).index
        assert index.tolist() == [list(range(budget))]  # ties go to the lowest index


def test_dart_of_one_token():
    reducer = vtc.create("dart", keep=1)
    assert reducer.select(dart_signals(rays(5), [1.0], 1, torch.zeros(1, 4, 2), [-1] * 4)).index.tolist() == [[0]]


@pytest.mark.parametrize("options", [{"image_pivots": 0}, {"text_pivots": -1}, {"image_pivots": 1.5}])
def test_dart_refuses_other_numbers_of_pivots(options):
    with pytest.raises(UnknownArgumentError, match=r"out of range|image_pivots=1\.5 is not possible; use a whole number"):
        vtc.create("dart", keep=8, **options)


def test_key_norms_do_not_depend_on_padding():
    # positions shifted by padding turn every key, which changes an L1 norm: two rows with the same words
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    pad = 5
    ids = torch.cat([torch.zeros(1, pad, dtype=torch.long), inputs["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.long), inputs["attention_mask"]], 1)
    padded = {**inputs, "input_ids": ids, "attention_mask": mask}
    found = []
    for call in (inputs, padded):
        taps = tapped(model, call, "dart", keep=5)
        value = taps["key_norm", "text", 1][0]
        found.append(value[:, -inputs["input_ids"].shape[1] :])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- PyramidDrop
def test_pyramiddrop_schedule_of_the_paper():
    parts = vtc.create("pyramiddrop.llava15").bind(FACTS).parts()
    assert [p.layer for p in parts] == [8, 16, 24]
    assert [p.count(576, FACTS) for p in parts] == [288, 144, 72]
    assert [p.layer for p in vtc.create("pyramiddrop", keep=0.125).bind(facts_of(28)).parts()] == [7, 14, 21]


def test_pyramiddrop_keeps_the_tokens_looked_at():
    (part,) = vtc.create("pyramiddrop", keep=2, layers=(3,), ratios=(0.5,)).bind(FACTS).parts()
    row = torch.tensor([[0.1, 0.3, 0.0, 0.2, 0.3, 0.1]])
    assert part.select(signals_of(torch.zeros(1, 6, 2), 2, next_last_attn=row)).index.tolist() == [[1, 4]]
    assert part.select(signals_of(torch.zeros(1, 6, 2), 2, next_last_attn=0 * row)).index.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.5, 0.25)}, "one descending share"),
        ({"ratios": (0.25, 0.5, 0.1)}, "one descending share"),
        ({"ratios": (1.5, 0.5, 0.1)}, "one descending share"),
        ({"layers": (8, 8, 9)}, "must ascend"),
        ({"layers": (8, 16, 32)}, "does not fit"),
    ],
)
def test_schedules_that_make_no_sense(options, message):
    for name in ("pyramiddrop", "transprune", "sparsevlm"):
        with pytest.raises(UnknownArgumentError, match=message):
            vtc.create(name, keep=0.1, **options).bind(FACTS)


# ---------------------------------------------------------------------------------------------------------- TransPrune
def test_transition_by_hand():
    # lengths grow by 2, 1, 1; cosines are 1, 0, -1, so that the softmax has the terms 1, e, e^2
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]]])
    after = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [-3.0, -4.0]]])
    total = 1 + math.e + math.e**2
    expected = torch.tensor([[2 / total, math.e / total, math.e**2 / total]])
    torch.testing.assert_close(transition_score(before, after), expected)
    padded = transition_score(torch.cat([before, before], 1), torch.cat([after, after], 1), torch.arange(6)[None] < 3)
    torch.testing.assert_close(padded[:, :3], expected)
    both = transition_score(before.repeat(2, 1, 1), after.repeat(2, 1, 1), shared=True)
    torch.testing.assert_close(both, expected.repeat(2, 1) / 2)
    assert torch.isfinite(transition_score(torch.zeros(1, 3, 2), after)).all()


def test_transprune_score_by_hand():
    # transitions add up to 2, 4, 2 (shares 1/4, 1/2, 1/4), attention has shares 1/2, 0, 1/2
    moved, looked = torch.tensor([[[1.0, 1.0, 1.0]], [[1.0, 3.0, 1.0]]]), torch.tensor([[0.3, 0.0, 0.3]])
    torch.testing.assert_close(transprune.combine(moved, looked), torch.tensor([[0.75, 0.5, 0.75]]))
    torch.testing.assert_close(transprune.combine(moved, None), torch.tensor([[0.25, 0.5, 0.25]]))
    assert torch.isfinite(transprune.combine(moved * 0, looked * 0)).all()


def test_transprune_schedule_of_the_paper():
    parts = vtc.create("transprune.high").bind(FACTS).parts()
    assert [p.layer for p in parts] == [7, 9, 12]
    assert [p.count(576, FACTS) for p in parts] == [504, 360, 72]
    assert parts[0].watched == (6, 7, 8, 9, 10, 11)  # layers 7 to 12, counted from one
    assert [n.layer for n in parts[0].needs] == [6, 6, 7]
    assert len(parts[2].needs) == 13
    alone = vtc.create("transprune.ttv").bind(FACTS).parts()
    assert {n.of for n in alone[2].needs} == {"attention_update", "mlp_update"}


@pytest.mark.parametrize("watch", [(), (9, 10), (-1, 5), (5, 12)])
def test_transprune_refuses_layers_it_cannot_watch(watch):
    with pytest.raises(UnknownArgumentError, match="watch="):
        vtc.create("transprune", keep=0.125, watch=watch).bind(FACTS)


# ----------------------------------------------------------------------------------------------------------- SparseVLM
def test_raters_by_hand():
    # one row: word, two visual tokens, three words. Products with the words behind the image: token (1, 0): 0, 2, 0; token (0,
    # 1): 0, 0, 0. Softmax: (1, e^2, 1) / (2 + e^2) and thirds; the middle word alone is above the mean of 1/3.
    hidden = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    visual = torch.tensor([[False, True, True, False, False, False]])
    valid = torch.ones_like(visual)
    found = sparsevlm.raters(StateTap(hidden, torch.tensor([5]), visual, valid, lambda t: t))
    assert found.nonzero()[:, 1].tolist() == [4]
    alike = sparsevlm.raters(StateTap(hidden * 0, torch.tensor([5]), visual, valid, lambda t: t))
    assert alike.nonzero()[:, 1].tolist() == [3, 4, 5]  # nobody is above the mean: all rate


def test_rating_by_hand():
    # two heads, two raters, three keys; the second rater is padding in the second case
    attention = torch.tensor([[[[0.2, 0.3, 0.5], [0.4, 0.1, 0.5]], [[0.0, 0.0, 1.0], [0.0, 0.2, 0.8]]]])
    torch.testing.assert_close(sparsevlm.rate(attention, torch.ones(1, 2)), torch.tensor([[0.15, 0.15, 0.7]]))
    torch.testing.assert_close(sparsevlm.rate(attention, torch.tensor([[1.0, 0.0]])), torch.tensor([[0.1, 0.15, 0.75]]))
    # keys 0 and 1 are visual: the first head gives them 1.0, the second 0.2
    seen = torch.tensor([[True, True, False]])
    torch.testing.assert_close(sparsevlm.rate(attention, torch.ones(1, 2), 1, seen), torch.tensor([[0.3, 0.2, 0.5]]))


def test_rope_prior_is_the_product_of_rotated_ones():
    d, theta = 8, 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    angle = torch.arange(6)[:, None] * theta
    table = torch.cat([angle, angle], -1)[None]
    vectors = sparsevlm.rope_prior((table.cos(), table.sin()))[0]
    gap = (torch.arange(6)[:, None] - torch.arange(6))[..., None] * theta
    torch.testing.assert_close(vectors @ vectors.T, 2 / d**0.5 * gap.cos().sum(-1))


def test_density_peaks_by_hand():
    # Three heaps of three on a line, 1, 1.5 and 2 wide. Mean squared distance to the three nearest (itself included): 2/3, 3/2
    # and 8/3 for the middle ones, 5/3, 15/4 and 20/3 for the ends: densities 0.51, 0.22, 0.07 and 0.19, 0.02, 0.001. Distance
    # to the nearest denser token: 34 (nobody is denser: the widest), 10.5, 20.5 for the middle ones, at most 2 for the ends.
    # Products 17.5, 2.3, 1.4.
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.5], [13.0], [30.0], [32.0], [34.0]])
    centres, owner = sparsevlm.density_peaks(line, 3)
    assert centres.tolist() == [1, 4, 7]
    assert owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(sparsevlm.merge(line, owner, 3), torch.tensor([[1.0], [11.5], [32.0]]), atol=1e-4, rtol=0)
    blocks = sparsevlm.density_peaks(line, 3, block=2)  # passes over rows
    assert [t.tolist() for t in blocks] == [centres.tolist(), owner.tolist()]
    # a tie broken by the noise: two pairs; without it all four are as dense, and the first two are centres
    pairs = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    assert sparsevlm.density_peaks(pairs, 2)[0].tolist() == [0, 1]
    assert sparsevlm.density_peaks(pairs, 2, torch.tensor([0.0, 0.5, 0.0, 1.0]))[0].tolist() == [3, 1]


@pytest.mark.parametrize("n", [1, 2, 7, 50, 576])
def test_kept_and_merged_tokens_add_up(n):
    for total in range(1, n):
        kept, merged = sparsevlm.split(total, n)
        assert kept + merged == total
        assert 0 <= kept < n
        assert 1 <= merged <= max(1, n - kept)


def test_sparsevlm_lists_of_the_release():
    def counts(**options) -> list[int]:
        return [p.count(576, FACTS) for p in vtc.create("sparsevlm", official=True, **options).bind(FACTS).parts()]

    assert counts(keep=192) == [309, 204, 113]
    assert counts(keep=64) == [82, 32, 18]
    assert counts(keep=192, version="2") == [300, 200, 118]
    assert [p.layer for p in vtc.create("sparsevlm.llava15-192").bind(FACTS).parts()] == [3, 7, 16]
    for options in ({"keep": 100}, {"keep": 0.3}, {"avg_tokens": 192}):
        with pytest.raises(BudgetError, match="has lists for keep=192, 128, 96, 64"):
            vtc.create("sparsevlm", official=True, **options)


def test_sparsevlm_merges_by_hand():
    # 12 tokens, 8 left after the cut: 7 kept and one merged. Of the 5 dropped ones int(0.3 * 5) + 1 = 2 are recycled, the best:
    # 7 and 8.
    tokens = torch.arange(12.0)[None, :, None].repeat(1, 1, 2)
    score = 12 - torch.arange(12.0)[None]
    (part,) = vtc.create("sparsevlm", keep=8, layers=(3,), ratios=(0.5,)).bind(FACTS).parts()
    selection = part.select(signals_of(tokens, 8, rater_attention=score))
    assert selection.index.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    expected = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7.5])[None, :, None].repeat(1, 1, 2)
    torch.testing.assert_close(selection.features, expected, atol=1e-4, rtol=0)
    assert selection.owner.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 7, -1, -1, -1]]


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_sparsevlm_merged_tokens_hold_their_group(positions):
    generator = torch.Generator().manual_seed(1)
    tokens, score = torch.randn(2, 90, 4, generator=generator), torch.rand(2, 90, generator=generator)
    (part,) = vtc.create("sparsevlm", keep=20, layers=(3,), ratios=(0.5,), positions=positions).bind(FACTS).parts()
    selection = part.select(signals_of(tokens, 20, rater_attention=score))
    for image in range(2):
        for place in range(20):
            group = tokens[image, selection.owner[image] == place]
            assert len(group)
            torch.testing.assert_close(selection.features[image, place], group.mean(0), atol=1e-5, rtol=1e-5)
        alone = part.select(signals_of(tokens[image : image + 1], 20, rater_attention=score[image : image + 1]))
        assert torch.equal(alone.index[0], selection.index[image])
    if positions == "compact":  # tokens kept as they were come first
        assert bool((selection.owner == torch.arange(17)[:, None, None]).sum(-1).eq(1).all())


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_sparsevlm_on_identical_tokens(budget):
    (part,) = vtc.create("sparsevlm", keep=budget, layers=(3,), ratios=(0.5,)).bind(FACTS).parts()
    selection = part.select(signals_of(torch.ones(1, 6, 3), budget, rater_attention=torch.zeros(1, 6)))
    assert selection.index.shape == (1, budget)
    torch.testing.assert_close(selection.features, torch.ones(1, budget, 3), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------------ AIM
def test_aim_merge_by_hand():
    # even places: 0, 2, 4 at 0, 90, 45 degrees; odd places: 1, 3, 5 at 5, 60, 200. Closest partners: 0 -> 1 (5 degrees apart),
    # 4 -> 3 (15), 2 -> 3 (30). Two merges: 0 into 1 and 4 into 3; token 2 is left alone.
    metric = rays(0, 5, 90, 60, 45, 200)
    tokens = torch.arange(6.0, dtype=torch.float64)[None, :, None]
    start = aim.Merged(metric, tokens, torch.arange(6)[None], torch.arange(6)[None])
    now = aim.merge_once(start, 2)
    assert now.slot.tolist() == [[1, 2, 3, 5]]
    assert now.tokens.flatten().tolist() == [0.5, 2.0, 3.5, 5.0]
    assert now.owner.tolist() == [[0, 0, 1, 2, 2, 3]]
    torch.testing.assert_close(now.metric[0, 0], (metric[0, 0] + metric[0, 1]) / 2)
    released = aim.merge_once(start, 2, official=True)  # tokens left alone in front
    assert released.tokens.flatten().tolist() == [2.0, 0.5, 3.5, 5.0]
    assert released.owner.tolist() == [[1, 1, 0, 2, 2, 3]]


@pytest.mark.parametrize(("n", "target"), [(576, 252), (576, 72), (196, 49), (7, 1), (7, 7), (2, 1), (1, 1)])
def test_aim_merges_to_any_number(n, target):
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(n))
    for official in (False, True):
        out = aim.merge_to(x, x, target, official=official)
        assert out.tokens.shape == (2, target, 5)
        assert bool((out.owner.sort(1).values.diff(dim=1) <= 1).all())
        assert out.owner.unique().tolist() == list(range(target))  # everybody ends somewhere, nobody is left empty
    same = aim.merge_to(torch.ones(1, n, 3), torch.ones(1, n, 3), target)
    torch.testing.assert_close(same.tokens, torch.ones(1, target, 3))


def test_aim_walk_by_hand():
    # uniform attention of two tokens: the first sees itself, the second both. Mass of the second halves in every step: 0.5 ->
    # 0.5^6.
    zero = torch.zeros(1, 1, 2, 4)
    tap = AttentionTap(zero, zero, zero, 1.0, None, True, None, torch.ones(1, 2) > 0, torch.ones(1, 2) > 0)
    torch.testing.assert_close(aim.importance(tap), torch.tensor([[1 - 0.5**6, 0.5**6]]))


def test_attention_walk_equals_the_dense_product():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 3, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, 9, 3, generator=generator, dtype=torch.float64)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    start = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    dense = torch.softmax((q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.7).masked_fill(~mask, -torch.inf), -1)
    expected = start[:, None, None].expand(2, 4, 1, 9)
    for _ in range(3):
        expected = expected @ dense
    for block in (4, None):
        got = attention_walk(q, k, start, steps=3, scaling=0.7, mask=mask[None, None], block=block)
        torch.testing.assert_close(got, expected[:, :, 0])
        got = attention_walk(q, k, start, steps=3, scaling=0.7, causal=True, block=block)
        torch.testing.assert_close(got, expected[:, :, 0])
    blind = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) > 0)  # the first row sees nothing
    assert torch.isfinite(attention_walk(q, k, start, steps=3, mask=blind[None, None])).all()


def test_aim_schedule_of_the_release():
    parts = vtc.create("aim", keep=576).bind(FACTS).parts()
    assert [p.layer for p in parts[1:]] == list(range(14, 22))
    assert [p.count(576, FACTS) for p in parts[1:]] == [504, 432, 360, 288, 216, 144, 72, 0]
    assert [p.layer for p in vtc.create("aim", keep=9).bind(facts_of(28)).parts()[1:]] == list(range(15, 23))
    assert len(vtc.create("aim", keep=9, prune=False).bind(FACTS).parts()) == 1
    for options in ({"start": 20, "stop": 20}, {"start": 31}, {"start": -1}):
        with pytest.raises(UnknownArgumentError, match="start="):
            vtc.create("aim", keep=9, **options).bind(FACTS)


@pytest.mark.parametrize("wanted", [10, 64, 128, 0.25, 0.5])
def test_aim_average_counts_the_pruning(wanted):
    parts = vtc.create("aim", avg_tokens=wanted).bind(FACTS).parts()
    counts = {p.layer: p.count(576, FACTS) for p in parts}
    held, total = 0, 0
    for layer in range(32):
        held = counts.get(layer, held)
        total += held
    exact = wanted * 576 if isinstance(wanted, float) else wanted
    assert total / 32 == pytest.approx(exact, rel=0.01, abs=0.25)
    with pytest.raises(BudgetError, match="use at most 0.5"):
        vtc.create("aim", avg_tokens=0.9).bind(FACTS).parts()[0].count(576, FACTS)


def test_aim_leaves_no_visual_token_in_the_last_layers():
    model = shared("llava")
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, "aim", keep=8, start=1, stop=3) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
    # after layer 1 half of the 8 tokens are left, after layer 2 none
    assert [i.tokens_per_layer for i in handle.stats[0].images] == [[8, 8, 4, 0, 0]] * 3
    text = int((inputs["attention_mask"].bool() & ~visual_of(inputs)).sum(1).max())
    assert out.past_key_values.layers[4].keys.shape[2] == text
    assert torch.isfinite(out.logits[inputs["attention_mask"].bool()]).all()


# -------------------------------------------------------------------------------------------------------- CoreMatching
def test_knee_by_hand():
    # line from (0, 10) to (4, 0); distances go with |-10 i - 4 (s - 10)|: 0, 6, 12, 6, 0. Knee at 2: above its value lie 10 and
    # 9.
    overlap = torch.tensor([[1.0, 10.0, 0.0, 9.0, 2.0]])
    place, value = corematching.knee(overlap)
    assert place.tolist() == [2]
    assert value.tolist() == [2.0]
    reducer = vtc.create("corematching", keep=1.0, layer=6)
    assert reducer.select(signals_of(torch.zeros(1, 5, 1), 5, overlap=overlap)).index.tolist() == [[1, 3]]
    assert reducer.select(signals_of(torch.zeros(1, 5, 1), 1, overlap=overlap)).index.tolist() == [
        [1]
    ]  # the budget is the limit
    exact = vtc.create("corematching", keep=4, layer=6, rule="topk")
    assert exact.select(signals_of(torch.zeros(1, 5, 1), 4, overlap=overlap)).index.tolist() == [[0, 1, 3, 4]]


def test_knee_of_a_flat_curve_says_nothing():
    reducer = vtc.create("corematching", keep=2, layer=6)
    for n, expected in ((5, [[0, 1]]), (1, [[0]])):
        signals = signals_of(torch.zeros(1, n, 1), min(n, 2), overlap=torch.full((1, n), 3.0))
        assert reducer.select(signals).index.tolist() == expected


def test_knee_is_each_images_own():
    overlap = torch.tensor([[1.0, 10.0, 0.0, 9.0, 2.0], [5.0, 5.0, 5.0, 5.0, 0.0]])
    selection = vtc.create("corematching", keep=1.0, layer=6).select(signals_of(torch.zeros(2, 5, 1), 5, overlap=overlap))
    kept = [i[v].tolist() for i, v in zip(selection.index, selection.valid, strict=True)]
    # second curve: line from (0, 5) to (4, 0), distances |-5 i|: the farthest point before the fall is 3, of value 5: none
    # above, all stay
    assert kept == [[1, 3], [0, 1, 2, 3, 4]]


def test_overlap_by_hand():
    # neurons that fire (are positive) at the reference, the second token from the end: 0 and 2; padding comes first
    neurons = torch.tensor([[[9.0, 9.0, 9.0], [1.0, -1.0, 2.0], [1.0, 5.0, 0.0], [0.5, -0.5, 0.5], [-1.0, -1.0, -1.0]]])
    valid = torch.tensor([[False, True, True, True, True]])
    tap = StateTap(neurons, torch.tensor([4]), ~valid, valid, lambda t: t)
    assert corematching.Overlap(-2)(tap)[0, 1:].tolist() == [2.0, 1.0, 2.0, 0.0]
    assert corematching.Overlap(-9)(tap)[0, 1:].tolist() == [
        2.0,
        1.0,
        2.0,
        0.0,
    ]  # shorter than that: its first token, 0 and 2 as well


@pytest.mark.parametrize("options", [{"rule": "best"}, {"reference": 0}, {"reference": 1.5}])
def test_corematching_refuses_other_options(options):
    with pytest.raises(UnknownArgumentError, match="corematching"):
        vtc.create("corematching", keep=4, **options)


# ------------------------------------------------------------------------------------------- signals in a running model
def tapped(model, inputs, *reducer, **options):
    """Everything tapped in one forward of the patched model."""
    seen = {}
    with vtc.patch(model, *reducer, **options) as handle, torch.no_grad():
        hook = handle.family.text.register_forward_hook(
            lambda _m, _a, kwargs, _o: seen.update(kwargs["_vtc"].tapped), with_kwargs=True
        )
        try:
            model(**inputs)
        finally:
            hook.remove()
    return seen


@dataclass(frozen=True, kw_only=True)
class Asks(Scorer):
    """Asks for signals, notes what it is given, and keeps the first tokens."""

    name: ClassVar[str] = "asks"
    stage: ClassVar[Stage] = Stage.DECODER

    asked: tuple[Need, ...] = ()
    layer: int = 2
    log: list[Signals] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.asked

    def score(self, signals: Signals) -> Tensor:
        self.log.append(signals)
        return -torch.arange(signals.shape[1], dtype=torch.float32).expand(signals.shape)


@pytest.mark.parametrize("batch", [1, 2])
def test_previewed_attention_is_what_the_layer_would_compute(batch):
    model = build("llava", "eager", torch.float32)
    inputs = make_inputs("llava", model, batch)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[2].double().mean(1)
    real, visual = inputs["attention_mask"].bool(), visual_of(inputs)
    taps = tapped(model, inputs, Several(keep=1.0, given=(Asks(keep=4, asked=(next_last_attn(2), next_question_attn(2))),)))
    last, asked = taps["next_last_attn", "text", 2][0], taps["next_question_attn", "text", 2][0]
    question = question_of(visual, real)
    for row in range(batch):
        own = maps[row][:, real[row]]
        torch.testing.assert_close(last[row, real[row]].double(), own[-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(asked[row, real[row]].double(), own[question[row]].mean(0), atol=1e-5, rtol=1e-4)


def test_updates_are_what_the_modules_take_and_give():
    model = shared("llava")
    inputs = make_inputs("llava", model, 2)
    layer = model.model.language_model.layers[1]
    seen: dict[str, Tensor] = {}

    def note(name):
        def hook(_module, args, kwargs, out):
            seen[f"{name} in"] = args[0] if args else kwargs["hidden_states"]
            seen[f"{name} out"] = out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp), ("neurons", layer.mlp.down_proj))
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    asked = (
        Need("attention in", "text", 1, lambda tap: tap.before, of="attention_update"),
        Need("attention out", "text", 1, lambda tap: tap.hidden, of="attention_update"),
        Need("mlp in", "text", 1, lambda tap: tap.before, of="mlp_update"),
        Need("mlp out", "text", 1, lambda tap: tap.hidden, of="mlp_update"),
        Need("neurons in", "text", 1, lambda tap: tap.hidden, of="neurons"),
    )
    taps = tapped(model, inputs, Several(keep=1.0, given=(Asks(keep=4, asked=asked),)))
    for need in asked:
        assert torch.equal(taps[need.key][0], seen[need.name]), need.name


def test_earlier_signals_follow_the_tokens():
    # places noted at the model's input reach a measure two cuts later, for the tokens still there
    model = shared("llava")
    inputs = make_inputs("llava", model, 2)
    first = places(0)
    echo = Need("echo", "text", 3, lambda tap: tap.given["places"], of="hidden", uses=(first,))
    ahead = Need("ahead", "text", 3, lambda tap: tap.given["places"], of="preview", uses=(first,))
    inside = Need("inside", "text", 2, lambda tap: tap.given["places"], of="mlp_update", uses=(first,))
    attention = Need("attention", "text", 2, lambda tap: tap.given["places"], uses=(first,))
    part = Asks(keep=3, layer=3, asked=(first, echo, ahead, inside, attention))
    tapped(model, inputs, Several(keep=1.0, given=(Asks(keep=9, layer=1), Asks(keep=6, layer=2, positions="compact"), part)))
    assert part.log
    for signals in part.log:
        assert signals.shape[1] == 6
        for name in ("echo", "ahead", "inside", "attention"):
            assert torch.equal(signals.taps[name], signals.taps["places"]), name
        assert torch.equal(signals.places.diff(dim=1), torch.ones_like(signals.places[:, 1:]))  # the first of a run of slots


def test_signals_at_the_input_come_after_the_boundary():
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    part = Asks(keep=2, layer=1, asked=(places(0),))
    members = [vtc.create("uniform", keep=4), Several(keep=1.0, given=(part,))]
    taps = tapped(model, inputs, members)
    start = int(visual_of(inputs)[0].nonzero()[0])
    assert part.log[0].places.tolist() == [[start, start + 1, start + 2, start + 3]]
    assert taps["places", "text", 0][0].shape[1] == inputs["input_ids"].shape[1] - 12


def test_the_question():
    visual = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0]]).bool()
    valid = torch.tensor([[1] * 7, [1] * 7, [1] * 6 + [0]]).bool()
    assert question_of(visual, valid).int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 6 + [1], [0] * 5 + [1, 0]]


def test_a_preview_leaves_cache_and_logits_alone():
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    with torch.no_grad():
        plain = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    everything = Asks(keep=0.999, asked=(next_last_attn(2), places(2)), layer=2)
    object.__setattr__(everything, "select", lambda s: (everything.log.append(s), Selection.all(s.shape[1], s.shape[0]))[1])
    with vtc.patch(model, Several(keep=1.0, given=(everything,))), torch.no_grad():
        got = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for a, b in zip(plain.logits, got.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- in patched models
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_averages_are_met(method, family):
    model = shared(family)
    inputs = make_inputs(family, model, 2)
    with vtc.patch(model, method, **METHODS[method], avg_tokens=0.7) as handle, torch.no_grad():
        model(**inputs)
    for image in handle.stats[0].images:
        steps = 1.0 if method != "corematching" else 2.0  # whole tokens in layers of five
        assert abs(image.avg_tokens - 0.7 * image.slots) <= max(0.01 * image.slots, steps)


def equals_the_reference(model: nn.Module, members: list[Reducer] | Reducer, steps: int = 3) -> tuple[Any, Any]:
    """What is generated equals what the slow reference generates that hides what was not chosen; return image and choices."""
    inputs = make_inputs(model.tiny_case, model)
    out, handle, chosen = generate_and_note(model, inputs, members, steps)
    tokens, logits, _ = hidden_reference(model, inputs, plan_of_choices(model, inputs, chosen), steps)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-5
    (image,) = handle.stats[0].images
    with torch.no_grad():
        assert image.kept == image.slots or (model(**inputs).logits[:, -1] - logits[:, 0]).abs().max() > 1e-3
    left = {part.layer: len(slots) for part, slots, _ in chosen}
    assert all(image.tokens_per_layer[layer] == count for layer, count in left.items())
    assert torch.equal(handle.stats.kept[0].entries, chosen[-1][1] if chosen else torch.arange(image.slots))
    return image, chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", ["divprune", "fastervlm"])
def test_composed_with_a_reducer_in_front(method, first):
    members: list[Reducer] = [vtc.create(first, keep=9), vtc.create(method, keep=4, **METHODS[method])]
    if method == "aim":
        members = [vtc.create(method, keep=9, prune=False), vtc.create(first, keep=4)]
    image, chosen = equals_the_reference(shared("llava"), members)
    assert len({id(part) for part, _, _ in chosen}) == len(chosen) > 1
    assert image.tokens_per_layer[0] <= 9 and image.kept <= 4
    for (_, before, _), (_, after, _) in itertools.pairwise(chosen):
        assert set(after.tolist()) <= set(before.tolist()), "nothing comes back"


def test_two_methods_inside_the_decoder_are_refused():
    with pytest.raises(UnknownArgumentError, match="both act at the stage 'decoder'"):
        vtc.patch(shared("llava"), ["pyramiddrop", "dart"], keep=4)


VERSIONS = {
    "1": {"version": "1"},
    "2": {"version": "2", "heads": 2},
    "original": {"positions": "original"},
    "official": {"keep": 64, "official": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_versions_of_sparsevlm_run_everywhere(family):
    """Each acts on what it chose; they choose differently, and as many as their schedules say."""
    model, kept, counts = shared(family), {}, {}
    for name, options in VERSIONS.items():
        reducer = vtc.create("sparsevlm", **{"keep": 5, **options})
        image, chosen = equals_the_reference(model, reducer)
        if family == "llava" and name == "official":  # its lists are for more tokens than there are
            assert not chosen and image.kept == image.slots
            continue
        kept[name], counts[name] = chosen[-1][1].tolist(), image.tokens_per_layer
        parts = reducer.bind(family_of(model).facts).parts()
        assert [part.layer for part, _, _ in chosen] == [p.layer for p in parts if p.layer]
        merges = [features is not None for _, _, features in chosen]
        assert all(merges) if options.get("version") != "2" else not any(merges)
    assert counts["1"] == counts["original"] and counts["1"][-1] == counts["2"][-1] == 5
    assert kept["1"] != kept["2"], "other attention ranks other tokens"


@pytest.mark.parametrize("method", ["pyramiddrop", "transprune", "sparsevlm", "aim"])
def test_averages_that_cannot_be_met_are_refused_when_patching(method):
    wanted = {"aim": 0.99}.get(method, 0.01)
    with pytest.raises(BudgetError, match="avg_tokens=.* cannot be met"):
        vtc.patch(shared("llava"), method, avg_tokens=wanted, **({"start": 1, "stop": 3} if method == "aim" else {}))


def test_schedules_need_a_model():
    for method in ("pyramiddrop", "transprune", "sparsevlm", "aim"):
        reducer = vtc.create(method, keep=4)
        assert isinstance(reducer, Schedule)
        with pytest.raises(TypeError, match="call bind"):
            reducer.parts()


def greedy(model, inputs, **options) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("method", ["fastv", *METHODS])
def test_static_cache_decode_equals_dynamic(method):
    if not fixed_layers_count():
        with (
            pytest.raises(UnsupportedFeatureError, match="cache_implementation='static'"),
            vtc.patch(shared("llava"), method, keep=5, **METHODS.get(method, {})),
        ):
            greedy(shared("llava"), make_inputs("llava", shared("llava"), 2), cache_implementation="static")
        return
    model = shared("llava")
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, method, keep=5, **METHODS.get(method, {})):
        want = greedy(model, inputs)
        got = greedy(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(want[0], got[0])
    torch.testing.assert_close(want[1], got[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["transprune", "corematching", "sparsevlm"])
def test_compiled_decode_has_no_graph_break(method):
    if not fixed_layers_count():
        return  # static caches are refused there, see above
    model = build("llava")
    inputs = make_inputs("llava", model, 2)
    settings = transformers.CompileConfig(backend="aot_eager", mode=None)
    settings._compile_all_devices = True
    with vtc.patch(model, method, keep=5, **METHODS[method]):
        want = greedy(model, inputs)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        got = greedy(model, inputs, cache_implementation="static", compile_config=settings)
    assert torch.equal(want[0], got[0])
    torch.testing.assert_close(want[1], got[1], atol=1e-6, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_choice(method, reentrant):
    model = build("llava")
    inputs = make_inputs("llava", model, 1)
    labels = inputs["input_ids"].masked_fill(visual_of(inputs), -100)

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone()

    options = {**METHODS[method], **({"version": "2"} if method == "sparsevlm" else {})}
    model.train()
    with vtc.patch(model, method, keep=5, **options):
        want = step()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        got = step()
        with torch.no_grad():  # nothing of the recomputation is left behind
            ids = inputs["input_ids"][:, -4:]
            assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_returned_sequences(method):
    model = shared("llava")
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, method, keep=5, **METHODS[method]), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        alone = model.generate(**inputs, max_new_tokens=3, num_beams=1, num_return_sequences=1, do_sample=False)
    assert out.shape == alone.shape == (2, inputs["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_named(method):
    model = build("llava")
    inputs = make_inputs("llava", model, 1)
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with vtc.patch(model, method, keep=5, **METHODS[method]), pytest.raises(InvalidSignalError, match="NaN or infinite"):
        model(**inputs)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_ends_with_its_image(method):
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    end = int(visual_of(inputs)[0].nonzero()[-1]) + 1
    inputs = {**inputs, "input_ids": inputs["input_ids"][:, :end], "attention_mask": inputs["attention_mask"][:, :end]}
    with vtc.patch(model, method, keep=5, **METHODS[method]) as handle, torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    assert handle.stats[0].images[0].kept <= 5
