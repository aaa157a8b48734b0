"""PTP and the methods beside it: examples with the answer worked out by hand, edge cases, and runs inside models."""

from __future__ import annotations

import math

import pytest
import torch
from models import build, make_inputs, shared, visual_of
from torch import Tensor

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.errors import UnknownArgumentError
from vtc.reducers.ptp import covered_by, tile_budgets, to_unit
from vtc.signals import AttentionTap, peak_text_attn


def signals_of(layout: Layout, budget: int, features: Tensor | None = None, **taps: Tensor) -> Signals:
    batch, n = next(iter(taps.values())).shape[:2]
    return Signals(
        features=torch.zeros(batch, n, 4) if features is None else features,
        layout=layout,
        entries=torch.arange(n).expand(batch, n),
        budget=budget,
        slots=n,
        taps=taps,
    )


def crops(count: int, rows: int, cols: int, newlines: bool = False) -> Layout:
    """A thumbnail and ``count`` crops side by side, each ``rows x cols``, view after view; then one newline per stitched row."""
    per = rows * cols
    n = torch.arange(per * (count + 1))
    view, r, c = n // per, n % per // cols, n % cols
    kind, x = torch.zeros_like(n), c + (view - 1).clamp(min=0) * cols
    parts = [kind, view, r, c, r, x]
    if newlines:
        end = torch.arange(rows)
        more = [torch.full_like(end, int(Kind.NEWLINE)), torch.full_like(end, -1), end, end * 0, end, end * 0 + count * cols]
        parts = [torch.cat(t) for t in zip(parts, more, strict=True)]
    return Layout(*parts, torch.arange(len(parts[0])), ((rows, cols),) * (count + 1), True)


# ----------------------------------------------------------------------------------------------------------------- PTP
def test_ptp_by_hand():
    # Thumbnail 1 x 2: its patches cover crop 1 and crop 2; attention 0.2 and 0.6, so the weights are 0.8, 0.2, 0.6 of 1.6, that is
    # 0.5, 0.125, 0.375. Of 4 tokens: 2, max(1, 0) = 1, 1 (rounded down from 1.5). The thumbnail keeps both of its patches.
    # Salience scaled over the image by (a - 0.1) / 0.8: crop 1 (0.1, 0.3) -> 0, 0.25; crop 2 (0.9, 0.5) -> 1, 0.5.
    # Instruction scaled by c / 0.04: crop 1 (0.04, 0) -> 1, 0; crop 2 (0.01, 0.03) -> 0.25, 0.75.
    # Fused, half and half: crop 1 0.5, 0.125 keeps token 2; crop 2 0.625, 0.625 is a tie, and token 4 comes first.
    taps = {
        "cls_attn": torch.tensor([[0.2, 0.6, 0.1, 0.3, 0.9, 0.5]]),
        "peak_text_attn": torch.tensor([[0.0, 0.0, 0.04, 0.0, 0.01, 0.03]]),
    }
    signals = signals_of(crops(2, 1, 2), 4, **taps)
    reducer = vtc.create("ptp", keep=4)
    assert reducer.weights(signals, 0) == pytest.approx([0.5, 0.125, 0.375])
    assert reducer.score(signals)[0].tolist() == pytest.approx([0.0625, 0.3125, 0.5, 0.125, 0.625, 0.625])
    assert reducer.select(signals).index.tolist() == [[0, 1, 2, 4]]
    # by salience alone crop 1 keeps its second patch; by instruction alone crop 2 keeps its second
    assert vtc.create("ptp", keep=4, alpha=0.0).select(signals).index.tolist() == [[0, 1, 3, 4]]
    assert vtc.create("ptp", keep=4, alpha=1.0).select(signals).index.tolist() == [[0, 1, 2, 5]]
    # not scaled, the instruction adds 0.02 to the token that needs 0.125 more
    assert vtc.create("ptp", keep=4, scale="salience").select(signals).index.tolist() == [[0, 1, 3, 4]]


def test_ptp_mean_weights_by_hand():
    # means 0.4, 0.2, 0.7 of 1.3: of 3 tokens max(1, 0), max(1, 0), 1; one more token would go to crop 2, the heaviest
    taps = {"cls_attn": torch.tensor([[0.2, 0.6, 0.1, 0.3, 0.9, 0.5]]), "peak_text_attn": torch.zeros(1, 6)}
    reducer = vtc.create("ptp", keep=3, region="mean", alpha=0.0)
    signals = signals_of(crops(2, 1, 2), 3, **taps)
    assert reducer.weights(signals, 0) == pytest.approx([0.4 / 1.3, 0.2 / 1.3, 0.7 / 1.3])
    assert reducer.select(signals).index.tolist() == [[1, 3, 4]]
    assert reducer.select(signals_of(crops(2, 1, 2), 4, **taps)).index.tolist() == [[1, 3, 4, 5]]


def test_tile_budgets_by_hand():
    assert tile_budgets(10, [0.5, 0.3, 0.2], [9, 9, 9]) == [5, 3, 2]
    assert tile_budgets(10, [0.34, 0.33, 0.33], [9, 9, 9]) == [4, 3, 3]  # 3, 3, 3, and the heaviest gets the last
    assert tile_budgets(10, [0.8, 0.1, 0.1], [4, 9, 9]) == [4, 3, 3]  # 8 are capped at 4; of the other 4, two go to each
    assert tile_budgets(4, [0.9, 0.05, 0.05], [9, 9, 9]) == [2, 1, 1]  # 3, 1, 1 is one too many
    assert tile_budgets(2, [0.2, 0.5, 0.3], [9, 9, 9]) == [0, 1, 1]  # fewer tokens than views: the lightest goes without
    assert tile_budgets(1, [0.25] * 4, [9] * 4) == [1, 0, 0, 0]
    assert tile_budgets(3, [0.5, 0.0, 0.5], [9, 0, 9]) == [2, 0, 1]  # a view without tokens
    assert tile_budgets(4, [0.5 + 1e-9, 0.5 - 1e-9], [9, 9]) == [2, 2]  # equal up to rounding


@pytest.mark.parametrize("total", range(1, 28))
def test_tile_budgets_add_up(total):
    generator = torch.Generator().manual_seed(total)
    weight = torch.rand(4, generator=generator)
    given = tile_budgets(total, (weight / weight.sum()).tolist(), [3, 12, 0, 12])
    assert sum(given) == total
    assert all(0 <= g <= most for g, most in zip(given, [3, 12, 0, 12], strict=True))


def test_thumbnail_patches_know_their_crop():
    assert covered_by(crops(2, 2, 4))[:8].tolist() == [1, 1, 2, 2] * 2
    assert covered_by(crops(1, 2, 2))[:4].tolist() == [1] * 4
    assert covered_by(crops(2, 2, 4))[8:].tolist() == [-1] * 16
    assert covered_by(Layout.grid(2, 2)).tolist() == [-1] * 4


def test_scaling_leaves_out_what_does_not_count():
    which = torch.tensor([[True, True, True, False]])
    assert to_unit(torch.tensor([[1.0, 3.0, 2.0, 90.0]]), which).tolist() == [[0.0, 1.0, 0.5, 0.0]]
    assert to_unit(torch.ones(1, 4), which).tolist() == [[0.0] * 4]


def test_ptp_on_one_view_is_plain_ranking():
    score = torch.tensor([[0.3, 0.1, 0.4, 0.1, 0.5, 0.9, 0.2]])
    signals = signals_of(Layout.grid(1, 7), 3, cls_attn=score, peak_text_attn=torch.zeros(1, 7))
    assert vtc.create("ptp", keep=3).select(signals).index.tolist() == [[2, 4, 5]]


@pytest.mark.parametrize("layout", [Layout.grid(1, 6), crops(2, 1, 2), crops(1, 3, 1)], ids=["plain", "crops", "tall"])
@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("budget", [1, 2, 5, 6])
def test_ptp_on_identical_tokens(layout, value, budget):
    taps = {"cls_attn": torch.full((1, 6), value), "peak_text_attn": torch.full((1, 6), value)}
    index = vtc.create("ptp", keep=budget).select(signals_of(layout, budget, **taps)).index[0].tolist()
    assert len(index) == len(set(index)) == budget
    assert index == sorted(index)
    for view in range(layout.views):  # ties go to the lowest index of the view
        mine = [i for i in index if layout.view[i] == view]
        first = int((layout.view == view).nonzero()[0])
        assert mine == list(range(first, first + len(mine)))


def test_ptp_of_one_token():
    signals = signals_of(Layout.grid(1, 1), 1, cls_attn=torch.ones(1, 1), peak_text_attn=torch.ones(1, 1))
    assert vtc.create("ptp", keep=1).select(signals).index.tolist() == [[0]]


def test_ptp_competing_newlines_come_last():
    layout = crops(1, 2, 2, newlines=True)
    taps = {"cls_attn": torch.rand(1, 10), "peak_text_attn": torch.ones(1, 10) * torch.arange(10)}
    reducer = vtc.create("ptp", keep=8, newlines="compete")
    assert reducer.select(signals_of(layout, 8, **taps)).index.tolist() == [list(range(8))]
    assert reducer.select(signals_of(layout, 9, **taps)).index.tolist() == [[*range(8), 9]]


@pytest.mark.parametrize("options", [{}, {"region": "mean"}, {"scale": "salience"}])
@pytest.mark.parametrize("seed", range(6))
def test_ptp_is_exact_and_independent_of_the_batch(options, seed):
    generator = torch.Generator().manual_seed(seed)
    layout = crops(3, 2, 3, newlines=seed % 2 == 1)
    n, budget = len(layout), 1 + 5 * seed
    taps = {name: torch.rand(3, n, generator=generator) for name in ("cls_attn", "peak_text_attn")}
    reducer = vtc.create("ptp", keep=budget, **options)
    index = reducer.select(signals_of(layout, min(budget, n), **taps)).index
    assert index.shape == (3, min(budget, n))
    assert (index[:, 1:] > index[:, :-1]).all()
    for b in range(3):
        alone = signals_of(layout, min(budget, n), **{k: v[b : b + 1] for k, v in taps.items()})
        assert torch.equal(reducer.select(alone).index[0], index[b])


@pytest.mark.parametrize("question", [True, False])
def test_peak_text_attention_is_the_largest_of_the_rows(question):
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 4, 150, 6, generator=generator), torch.randn(2, 2, 150, 6, generator=generator)
    visual = torch.zeros(2, 150, dtype=torch.bool)
    visual[0, 8:20], visual[1, 30:50] = True, True
    valid = torch.ones_like(visual)
    valid[1, :10] = False
    allowed = torch.ones(150, 150, dtype=torch.bool).tril() & valid[:, None, None, :]
    tap = AttentionTap(query, key, key, 0.4, allowed, False, torch.tensor([149, 149]), visual, valid)
    got = peak_text_attn(0, question=question).measure(tap)
    logits = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.4).masked_fill(~allowed, -torch.inf)
    full = logits.softmax(-1).mean(1)
    for b, first in enumerate((20, 50)):
        rows = torch.arange(150)[valid[b] & ~visual[b]]
        rows = rows[rows >= first] if question else rows
        assert len(rows) > 64  # more than one block
        torch.testing.assert_close(got[b], full[b, rows].max(0).values)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 1.5}, {"alpha": math.nan}, {"alpha": True}, {"region": "crop"}, {"scale": 1}, {"rows": "all"}, {"layer": 1.5}],
)
def test_ptp_refuses_what_means_nothing(options):
    with pytest.raises(UnknownArgumentError, match=f"ptp: {next(iter(options))}="):
        vtc.create("ptp", keep=4, **options)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("rows", ["question", "text"])
def test_ptp_inside_models(family, rows):
    model = shared(family)
    inputs = make_inputs(family, model, 2, images=(1, 2))
    slots = int(visual_of(inputs).sum())
    with vtc.patch(model, "ptp", keep=0.5, rows=rows) as handle, torch.no_grad():
        out = model(**inputs)
        prefill = handle.stats.last
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.isfinite(out.logits[inputs["attention_mask"].bool()]).all()
    assert slots == sum(i.slots for i in prefill.images)
    for image in prefill.images:
        asked = image.stages[0].requested
        assert asked == math.floor(image.slots / 2)
        assert image.tokens_per_layer[:2] == [image.slots] * 2  # both layers before run on everything
        assert asked <= image.kept < image.slots
        if family != "llava_next":
            assert image.kept == asked
        assert ("cls_attn" in image.stages[0].note) == (family == "llava_siglip")


def test_ptp_meets_a_layer_average():
    model = build("llava")
    inputs = make_inputs("llava", model, 1)
    with vtc.patch(model, "ptp", avg_tokens=0.7) as handle, torch.no_grad():
        model(**inputs)
    (image,) = handle.stats.last.images
    assert abs(image.avg_tokens - 0.7 * image.slots) <= 0.5 * 3 / 5  # three of five layers move in whole tokens
