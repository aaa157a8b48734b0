"""What the methods for clips promise: on any clip, on pictures, in every family that has clips, and each by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from cases import CASES
from family_cases import CASES as FAMILY_CASES
from golden_evs import clip
from models import image_spans, make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.core import Layout, Reducer, Selection, Signals
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError, VtcError
from vtc.families import family_of
from vtc.inspect import NOMINAL, reason_against
from vtc.reducers import dycoke, fastvid, framefusion, holitom, sttm, vidcom2
from vtc.reducers.frames import sampled
from vtc.reducers.temporalpool import borders
from vtc.video import cosines, density_scores, frame_similarity, place_similarity, previous, segments

METHODS = ("dycoke", "evs", "fastvid", "framefusion", "frames", "holitom", "sttm", "temporalpool", "vidcom2")
EXACT = ("dycoke", "evs", "vidcom2")
FAMILIES = ("llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FACTS = dataclasses.replace(NOMINAL, tokens=None, max_tokens=None)

methods = pytest.mark.parametrize("name", METHODS)


def drawn(frames: int, rows: int, cols: int, kind: str, width: int = 12) -> Tensor:
    """Tokens ``(N, D)`` of a clip in which much stays as it is."""
    g = torch.Generator().manual_seed(frames * 100 + rows * 10 + cols)
    scene = torch.randn(rows * cols, width, generator=g)
    x = torch.stack([scene + 0.3 * torch.randn(rows * cols, width, generator=g) * (t % 3 > 0) for t in range(frames)])
    if kind == "black":
        x[frames // 2] = 0
    elif kind == "still":
        x = x[:1].expand_as(x)
    elif kind == "cut":
        x[frames // 2 :] += 3 * torch.randn(rows * cols, width, generator=g)
    return x.flatten(0, 1)


def first_part(name: str, **options: Any) -> Reducer:
    return vtc.create(name, **options).bind(FACTS).parts()[0]


def shown(part: Reducer, features: Tensor, layout: Layout, budget: int, history: tuple = ()) -> Signals:
    """Signals of ``B`` whole clips ``(B, N, D)``; what the method taps follows from each clip's features."""
    batch, n = features.shape[:2]
    taps = {}
    for need in part.needs:
        if need.name == "probe_keys":
            taps[need.name] = torch.stack([features[..., :6], features[..., :6].mean(1, keepdim=True).expand(-1, n, -1)], 2)
            taps[need.name] = taps[need.name].unflatten(-1, (2, 3))
        else:
            taps[need.name] = torch.softmax(features.sum(-1), 1)
    entries = torch.arange(n).expand(batch, n)
    return Signals(features, layout, entries, budget, n, taps, history=history * batch)


def kept(chosen: Selection, row: int = 0) -> Tensor:
    return chosen.index[row] if chosen.valid is None else chosen.index[row][chosen.valid[row]]


# ------------------------------------------------------------------------------------------------------------- every method
@methods
@pytest.mark.parametrize("kind", ["black", "still", "cut"])
@pytest.mark.parametrize(("frames", "rows", "cols"), [(1, 4, 4), (2, 3, 5), (7, 5, 4), (9, 1, 4)])
def test_any_clip(name: str, kind: str, frames: int, rows: int, cols: int) -> None:
    """Odd and even numbers of frames, black and repeated ones, batches, both types: in bounds, in order, alone as in a batch."""
    layout = clip(frames, rows, cols)
    x = torch.stack([drawn(frames, rows, cols, kind), drawn(frames, rows, cols, "cut")])
    n = len(layout)
    for budget in sorted({1, n // 5, n // 2, n - 1} - {0}):
        part = first_part(name, keep=budget)
        both = part.select(shown(part, x, layout, budget))
        for row in range(2):
            index = kept(both, row)
            assert (index[1:] > index[:-1]).all()
            assert 0 <= int(index[0]) and int(index[-1]) < n
            assert len(index) == budget if name in EXACT else 1 <= len(index) <= budget
            alone = part.select(shown(part, x[row : row + 1], layout, budget))
            assert torch.equal(kept(alone), index)
            if both.features is not None:
                values = both.features[row, : len(index)]
                own = x[row][index] if alone.features is None else alone.features[0]  # (a clip alone may merge nothing)
                assert values.isfinite().all() and torch.equal(values, own)
                assert (both.owner[row][index] >= 0).all()
        single, double = (kept(part.select(shown(part, x[:1].to(t), layout, budget))) for t in (torch.float32, torch.float64))
        if name != "evs" or kind not in ("still", "black"):  # whose cosines of repeated tokens are float32's
            assert torch.equal(single, double)


@pytest.mark.parametrize("name", [m for m in METHODS if m != "sttm"])  # whose trees are of neighbours in the picture
def test_the_shape_of_a_frame_does_not_matter(name: str) -> None:
    """The same twelve tokens a frame in rows of three, four and six: the same choice."""
    x, found = drawn(4, 3, 4, "moving")[None], []
    for rows, cols in ((3, 4), (4, 3), (2, 6)):
        part = first_part(name, keep=20)
        found.append(kept(part.select(shown(part, x, clip(4, rows, cols), 20))).tolist())
    assert found[0] == found[1] == found[2], found


@pytest.mark.parametrize("name", [m for m in METHODS if m != "evs"])  # which compares what it is given
def test_newlines_are_no_candidates(name: str) -> None:
    with pytest.raises(UnknownArgumentError, match="newline tokens are in no frame"):
        vtc.create(name, keep=5, newlines="compete")


@pytest.mark.parametrize("name", ["dycoke", "fastvid", "holitom", "sttm", "temporalpool"])
def test_frames_with_holes_are_refused(name: str) -> None:
    layout = clip(3, 2, 2)
    entries = torch.tensor([[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]])
    part = first_part(name, keep=5)
    whole = shown(part, drawn(3, 2, 2, "moving")[None], layout, 5)
    holes = Signals(whole.features[:, entries[0]], layout, entries, 5, 12, {k: t[:, entries[0]] for k, t in whole.taps.items()})
    with pytest.raises(UnsupportedFeatureError, match=f"'{name}' compares whole frames.*use '{name}' alone"):
        part.select(holes)


# --------------------------------------------------------------------------------------------------------------- families
def model_of(name: str) -> nn.Module:
    return shared(name, "sdpa", torch.float32 if FAMILY_CASES[name].float32 else torch.float64)


@functools.cache
def usable(family: str) -> list[str]:
    facts = family_of(model_of(family)).facts
    return [m for m in METHODS if not reason_against(m, facts)]


def rows_of(family: str, model: nn.Module, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = inputs["attention_mask"][row].bool()
    out = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
    if row == 0:
        out |= {k: v for k, v in inputs.items() if k.startswith(("pixel", "video", "second"))}
    return out | FAMILY_CASES[family].extra(out["input_ids"], out["input_ids"].shape[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_of_a_clip_and_text(family: str) -> None:
    """Every method in every family that has clips: the clip gets shorter, and both rows give what they give alone."""
    name = f"{family}:clips"
    model = model_of(name)
    inputs = make_inputs(name, model, images=[1, 0], seed=2)
    ((_, columns),) = image_spans(inputs, model)
    with torch.no_grad():
        plain = model(**inputs).logits
    assert {"frames", "vidcom2", "dycoke", "holitom"} <= set(usable(name))
    for method in usable(name):
        with vtc.patch(model, method, keep=0.4) as handle, torch.no_grad():
            together = model(**inputs).logits
            (image,) = handle.stats.last.images
            assert image.slots == len(columns) and 1 <= image.kept < image.slots, method
            real = inputs["attention_mask"].bool()
            for row in range(2):
                alone = model(**rows_of(name, model, inputs, row)).logits[0]
                error = (together[row, real[row]] - alone).abs().max()
                assert error < 2e-4, (method, row, float(error))
        assert (together[0, -1] - plain[0, -1]).abs().max() > 1e-5, method


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_and_a_clip_in_one_prompt(family: str) -> None:
    """Both get their own budget; one after the other they are decoded."""
    model = model_of(family)
    pictures = make_inputs(family, model, images=[1])
    clips = make_inputs(f"{family}:clips", model_of(f"{family}:clips"), images=[1])
    ids = torch.cat([clips["input_ids"], pictures["input_ids"]], 1)
    inputs = {**clips, **pictures, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= FAMILY_CASES[family].extra(ids, ids.shape[1])
    for method in usable(family):
        with vtc.patch(model, method, keep=0.4) as handle, torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
            assert all(step.isfinite().all() for step in out.logits)
            images = handle.stats[0].images
        assert len(images) == 2 and all(1 <= i.kept < i.slots for i in images), method


# ------------------------------------------------------------------------------------------------------------- vocabulary
def test_time_by_hand() -> None:
    assert segments(torch.tensor([False, True, False, True])) == [(0, 2), (2, 4), (4, 5)]
    assert segments(torch.zeros(0, dtype=torch.bool)) == [(0, 1)]
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert frame_similarity(x).tolist() == [1.0, 0.0]
    assert cosines(x[:1], torch.zeros(1, 2)).tolist() == [0.0]
    assert place_similarity(x, torch.tensor([[0], [1], [2]])).tolist() == [[1.0], [0.0]]
    signals = Signals(torch.randn(1, 5, 2), clip(3, 1, 2), torch.tensor([[0, 1, 3, 4, 5]]), 2, 6)
    assert previous(signals).tolist() == [[-1, -1, 1, -1, 2]]


def test_equal_tokens_have_equal_cosines_and_densities() -> None:
    x = torch.randn(1, 37, generator=torch.Generator().manual_seed(0)).expand(64, -1).contiguous()
    assert (cosines(x, x) == 1).all()
    twins = torch.cat([x[:3], x[:3] + 1, torch.randn(5, 37, generator=torch.Generator().manual_seed(1))])
    density, score = density_scores(twins, 2)
    assert density[0] == density[1] == density[2] and score[1] == score[2] == 0, "of twins the first counts as denser"
    assert torch.equal(density_scores(twins, 2, block=3)[1], score)


# ------------------------------------------------------------------------------------------------------------ one by one
def test_frames_by_hand() -> None:
    assert sampled(8, 3) == [1, 4, 6] and sampled(5, 5) == [0, 1, 2, 3, 4]
    assert sampled(8, 3, ends=True) == [0, 4, 7] and sampled(8, 1, ends=True) == [0]
    layout, x = clip(8, 2, 2), drawn(8, 2, 2, "moving")[None]

    def choose(budget: int, **options: Any) -> Selection:
        part = first_part("frames", keep=budget, **options)
        return part.select(shown(part, x, layout, budget))

    assert layout.view[choose(15).index[0]].unique().tolist() == [1, 4, 6]
    assert choose(15).note == "3 of 8 frames"
    filled = choose(15, fill=True)
    assert layout.view[filled.index[0]].bincount(minlength=8).tolist() == [0, 4, 0, 0, 4, 0, 4, 3]
    few = choose(3)
    assert layout.view[few.index[0]].tolist() == [4, 4, 4] and "spread evenly" in few.note


def test_temporalpool_by_hand() -> None:
    assert borders(7, 4, 12, even=True) == [0, 2, 4] and borders(7, 4, 12, even=False) == [0, 3, 6]
    layout, x = clip(7, 2, 2), drawn(7, 2, 2, "moving")[None]
    for windows, stops in (("even", [2, 4, 7]), ("fixed", [3, 6, 7])):
        part = first_part("temporalpool", keep=12, windows=windows)
        chosen = part.select(shown(part, x, layout, 12))
        starts = [0, *stops[:-1]]
        want = torch.cat([x[0].view(7, 4, -1)[a:b].mean(0) for a, b in zip(starts, stops, strict=True)])
        torch.testing.assert_close(chosen.features[0], want)
        assert layout.view[chosen.index[0]].tolist() == [s for s in starts for _ in range(4)]
    part = first_part("temporalpool", keep=12, norm=True, seat="middle")
    chosen = part.select(shown(part, x, layout, 12))
    assert layout.view[chosen.index[0]].unique().tolist() == [0, 2, 5]
    lengths = x[0].view(7, 4, -1).norm(dim=-1)
    torch.testing.assert_close(chosen.features[0, :4].norm(dim=-1), lengths[:2].mean(0))


def test_gridpool_meets_the_check_values_per_frame() -> None:
    for (rows, cols), keep, cells in (((14, 14), 49, 49), ((6, 8), 12, 12), ((5, 7), 8, 8)):
        layout = clip(3, rows, cols)
        part = vtc.create("gridpool", keep=keep, per="frame")
        budget = part.wanted(layout, FACTS)
        chosen = vtc.views.ask(part, shown(part, torch.randn(1, len(layout), 4), layout, budget))
        assert layout.view[chosen.index[0]].bincount().tolist() == [cells] * 3


def test_vidcom2_counts() -> None:
    layout, x = clip(7, 3, 3), drawn(7, 3, 3, "cut")[None]
    for rule, wanted in (("exact", 24), ("served", 23)):
        part = first_part("vidcom2", keep=0.375, rule=rule)
        assert part.wanted(layout, FACTS) == wanted  # 0.375 * 63 = 23.6
    assert first_part("vidcom2", keep=0.01, rule="served").wanted(layout, FACTS) == 7, "one per frame"
    part = first_part("vidcom2", keep=0.375, rule="release")
    released = part.select(shown(part, x, layout, 63))
    found = vidcom2.likeness(x[0], list(torch.arange(63).view(7, 9)))
    quota = vidcom2.budgets(vidcom2.scales(found.clip, list(torch.arange(63).view(7, 9)), 0.375), torch.full((7,), 9))
    assert layout.view[released.index[0]].bincount(minlength=7).tolist() == quota.tolist()
    assert vidcom2.budgets(torch.tensor([0.25, 0.01]), torch.tensor([42, 42])).tolist() == [10, 1], "half to even, at least one"


def test_dycoke_windows() -> None:
    assert dycoke.references(8) == {0: None, 1: 0, 2: 0, 3: 2, 4: None, 5: 4, 6: 4, 7: 6}
    assert dycoke.references(9, official=True) == {0: None, 1: 0, 2: 0, 3: 2, 4: None, 5: 4, 6: 4, 7: 6}
    assert dycoke.references(8, official=True)[6] is None, "the last of four windows' frames"
    layout, x = clip(9, 2, 5), drawn(9, 2, 5, "moving")[None]
    for official, counts in ((True, [10, 3, 3, 3, 10, 3, 3, 3, 0]), (False, [10, 3, 3, 3, 10, 3, 3, 3, 10])):
        part = first_part("dycoke", keep=1.0, ratio=0.7, official=official)
        chosen = part.select(shown(part, x, layout, 90))
        assert layout.view[chosen.index[0]].bincount(minlength=9).tolist() == counts  # int(0.3 * 10) is 3
    part = first_part("dycoke", keep=1.0, ratio=0.7, official=True)
    with pytest.raises(UnsupportedFeatureError, match="more than 4 frames"):
        part.select(shown(part, x[:, :40], clip(4, 2, 5), 40))
    with pytest.raises(UnknownArgumentError, match="give keep=1.0"):
        vtc.create("dycoke", keep=5, ratio=0.7)


def test_holitom_windows_and_halving() -> None:
    same = torch.tensor([[True, True], [True, False], [True, True]])
    found = holitom.windows_of(same, 1024)
    assert found.spans == [(0, 1), (2, 3)] and found.best == [0.0, 2.0, 2.0, 4.0]
    assert found.gain[0, 3] == 3 and found.gain[0, 1] == 2
    assert holitom.windows_of(same, 1).spans == [(t, t) for t in range(4)]
    still = drawn(6, 3, 3, "still")[None]
    part = first_part("holitom", keep=30)
    chosen = part.select(shown(part, still, clip(6, 3, 3), 30))
    assert chosen.index.tolist() == [list(range(9))], "a still clip is one frame, whatever the budget"
    torch.testing.assert_close(chosen.features[0], still[0, :9])
    x = torch.randn(1, 20, 5, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([[1, 4, 9, 15]])
    owner, weight = holitom.halved(x, index)
    want = x[0].clone()
    for i in (i for i in range(20) if i not in index):
        to = index[0, owner[0, i]]
        want[to] = (want[to] + want[i]) / 2
    got = torch.zeros(4, 5).index_add_(0, owner[0], x[0] * weight[0, :, None])
    torch.testing.assert_close(got, want[index[0]])


def test_fastvid_plans() -> None:
    part = first_part("fastvid", keep=0.25, scenes=3, tau=-1.0)
    assert part.cut(torch.tensor([0.9, 0.2, 0.8, 0.1, 0.7])) == [(0, 2), (2, 4), (4, 6)]
    assert first_part("fastvid", keep=0.25).cut(torch.full((2,), 0.99)) == [(0, 1), (1, 2), (2, 3)], "fewer frames than scenes"
    assert part.seats(9) == [0, 4, 8] and part.seats(6) == [1, 5]
    (seg,) = first_part("fastvid", keep=30, scenes=1, tau=-1.0).plan(torch.full((4,), 0.9), 12, 30)
    assert seg.anchors == (6, 0, 0, 0, 6) and sum(seg.salient) == 18
    alike = torch.tensor([0.99, 0.5, 0.99, 0.99])
    (seg,) = first_part("fastvid", keep=20, scenes=1, tau=-1.0, version="qwen").plan(alike, 12, 20)
    assert [s + a > 0 for s, a in zip(seg.salient, seg.anchors, strict=True)] == [False, True, False, False, True]
    assert fastvid.filled([2, 2], [1, 0], 9, 4) == [3, 4]


def test_sttm_trees_and_links() -> None:
    assert sttm.sizes_of(14, 14) == ((2, 2), (4, 4), (7, 7), (14, 14)) and sttm.sizes_of(9, 12)[1] == (3, 3)
    assert sttm.sizes_of(1, 9) == ((1, 9),) and sttm.parents_of(5).tolist() == [0, 1, 1, 2, 2]
    edges = torch.tensor([[1, 2], [0, 2]])
    assert sttm.representatives(edges, 3, official=False).tolist() == [0, 0, 0]
    chain = torch.tensor([[0, 2], [1, 2]])
    assert sttm.representatives(chain, 3, official=True).tolist() == [0, 1, 0], "the release leaves 1 apart"
    x = drawn(4, 8, 8, "still")[None]
    part = vtc.create("sttm", keep=1.0, adaptive=True, spatial=0.99, temporal=0.5)
    chosen = part.select(shown(part, x, clip(4, 8, 8), 256))
    assert int(chosen.index.max()) < 64, "repeated frames add nothing"
    torch.testing.assert_close(chosen.features[0], x[0, chosen.index[0]])
    flat = torch.ones(1, 256, 3)
    assert part.select(shown(part, flat, clip(4, 8, 8), 256)).index.shape[1] == 16, "an even picture: the root's cells"


def test_framefusion_schedule() -> None:
    """A chain goes into its first; the numbers alone tell how far a clip is; the average is met."""
    order, cosine = framefusion.neighbours(
        torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [0, 1], [0, 1]]), torch.tensor([0, 1] * 3)
    )
    assert order.tolist() == [0, 2, 4, 1, 3, 5] and cosine.tolist() == [-2, 1, 0, -2, 1, 1]
    left, owner = framefusion.runs(order, cosine >= 0.6)
    assert left.tolist() == [0, 1, 4] and owner.tolist() == [0, 1, 0, 1, 2, 1]
    rule = framefusion.Rule(0.6, 0.1, 0.3, 28)
    assert rule.after(framefusion.State(), 100, 20) == framefusion.State((0.2,), False, False)
    assert rule.after(framefusion.State(), 100, 5) == framefusion.State((0.05,), True, False)
    assert rule.after(framefusion.State(), 100, 70) == framefusion.State((), True, True)
    assert framefusion.sparsity((), 0.3, 28) == pytest.approx(0.7) and framefusion.sparsity((0.0,), 0.01, 28) == 1.0
    model = model_of("llava_onevision:clips")
    inputs = make_inputs("llava_onevision:clips", model, images=[1])
    with vtc.patch(model, "framefusion", keep=6) as handle, torch.no_grad():
        model(**inputs)
    (image,) = handle.stats.last.images
    assert image.kept == 6 + 1, "the newline stays"
    assert image.tokens_per_layer == sorted(image.tokens_per_layer, reverse=True)


@methods
def test_impossible_options_say_what_to_use(name: str) -> None:
    wrong = {
        "dycoke": {"ratio": 2.0},
        "fastvid": {"version": "other"},
        "framefusion": {"similar": 3},
        "holitom": {"inner": -0.5},
        "sttm": {"root": -1},
        "temporalpool": {"windows": "odd"},
        "vidcom2": {"rule": "other"},
    }
    if name in wrong:
        with pytest.raises(VtcError, match="is not possible; use"):
            vtc.create(name, keep=1.0, **wrong[name])
    assert name in CASES
