"""PTP, docprune and tokencorr: examples with the answer worked out by hand, edge cases, and runs inside models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import build, make_inputs, shared, visual_of
from torch import Tensor

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.errors import UnknownArgumentError
from vtc.kernels import count_similar
from vtc.reducers.docprune import PatchClassifier, contrast, fit, kept_tokens, shorten_prompt, token_blocks, window_order
from vtc.reducers.ptp import covered_by, tile_budgets, to_unit
from vtc.signals import AttentionTap, PixelTap, peak_text_attn


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


# ------------------------------------------------------------------------------------------------------------ docprune
class Bright(torch.nn.Module):
    """Says how much brighter than one half a block is."""

    def forward(self, blocks: Tensor) -> Tensor:
        return blocks.mean((1, 2, 3)) - 0.5


def blocks_signal(own: list[float], near: list[float] | None = None) -> Tensor:
    return torch.tensor([own, near or own]).T[None]


def test_docprune_by_hand():
    # qualified (neighbour above 0): tokens 1 2 3 5; by their own logits 2, 5, 3, 1
    taps = {"text_blocks": blocks_signal([-3.0, -2.0, 4.0, -1.0, -1.0, 2.0], [-2.0, 4.0, 4.0, 4.0, -1.0, 2.0])}
    layout = Layout.grid(2, 3)
    for budget, kept in ((6, [1, 2, 3, 5]), (4, [1, 2, 3, 5]), (3, [2, 3, 5]), (1, [2])):
        chosen = vtc.create("docprune", keep=budget).select(signals_of(layout, budget, **taps))
        assert chosen.index.tolist() == [kept]
        assert chosen.valid is None
    assert vtc.create("docprune", keep=6, threshold=3.0).select(signals_of(layout, 6, **taps)).index.tolist() == [[1, 2, 3]]
    whole = vtc.create("docprune", keep=5, threshold=-math.inf)  # the best by their own logits, ties to the lowest
    assert whole.select(signals_of(layout, 5, **taps)).index.tolist() == [[1, 2, 3, 4, 5]]
    assert vtc.create("docprune", keep=6).decides_itself
    assert not whole.decides_itself
    assert vtc.create("docprune", keep=6, threshold=9.0).select(signals_of(layout, 6, **taps)).index.tolist() == [[2]]


def test_docprune_keeps_as_many_as_each_page_needs():
    pages = torch.cat([blocks_signal([1.0, -1.0, 1.0, 1.0]), blocks_signal([-1.0, -1.0, -1.0, 2.0]), blocks_signal([-1.0] * 4)])
    chosen = vtc.create("docprune", keep=1.0).select(signals_of(Layout.grid(2, 2), 4, text_blocks=pages))
    assert chosen.valid.sum(1).tolist() == [3, 1, 1]
    assert [i[v].tolist() for i, v in zip(chosen.index, chosen.valid, strict=True)] == [[0, 2, 3], [3], [0]]
    assert "trained on generated pages" in chosen.note
    assert (
        not vtc.create("docprune", keep=1.0, classifier=Bright())
        .select(signals_of(Layout.grid(2, 2), 4, text_blocks=pages))
        .note
    )


@pytest.mark.parametrize(("grid", "patch"), [((6, 6), 14), ((5, 7), 14), ((6, 6), 7), ((1, 1), 14)])
def test_docprune_classifies_blocks_of_two_by_two_patches(grid, patch):
    rows, cols = grid
    pixels = torch.zeros(2, 3, rows * patch, cols * patch)
    pixels[1, :, : 2 * patch, : 2 * patch] = 1.0  # the first block of the second view is white
    for dilate, reach in ((False, 2), (True, 4)):
        (need,) = vtc.create("docprune", keep=1.0, classifier=Bright(), dilate=dilate).needs
        own, near = need.measure(PixelTap(pixels, grid)).unbind(2)
        white = near.view(2, rows, cols) > 0
        assert not white[0].any()
        expected = torch.zeros(rows, cols, dtype=torch.bool)
        expected[:reach, :reach] = True
        assert torch.equal(white[1], expected)
        assert int((own > 0).sum()) == min(2, rows) * min(2, cols)


def test_contrast_knows_blank_from_written():
    blocks = torch.full((3, 3, 28, 28), 1.5)
    blocks[1, :, 10:14, 4:24] = -1.5  # a stroke
    blocks[2] += 0.01 * torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0))  # paper
    assert (contrast(blocks) > 0).tolist() == [False, True, False]
    assert torch.isfinite(contrast(blocks)).all()


def test_classifier_learns_from_blocks():
    generator = torch.Generator().manual_seed(0)

    def page(n: int) -> tuple[Tensor, Tensor]:
        label = (torch.arange(n) % 4 == 0).float()  # one in four shows strokes
        noise = 0.1 * torch.randn(n, 1, 8, 8, generator=generator)
        strokes = (torch.arange(8) % 4 < 2).float().expand(8, 8)
        return noise + 0.5 * label[:, None, None, None] * strokes + torch.rand(n, 1, 1, 1, generator=generator), label

    torch.manual_seed(0)
    train, held_out = page(160), page(60)
    classifier = PatchClassifier(8, 8, 1)
    right = fit(classifier, train, held_out, epochs=40, rate=1e-2)
    assert right >= 0.95
    assert not classifier.training
    assert float(((classifier(held_out[0]) > 0) == (held_out[1] > 0)).double().mean()) == pytest.approx(right)
    with pytest.raises(ValueError, match="0 and 1"):
        fit(classifier, (train[0], torch.ones(160)), held_out, epochs=1)


def test_blocks_of_processor_layout():
    picture = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)  # 2 slices, 3 colours, patches of 2: 4 x 6, tokens 2 x 3
    patches = picture.view(
        2, 3, 2, 2, 2, 3, 2, 2
    )  # slice, colour, token row, patch row, pixel row, token col, patch col, pixel col
    rows = patches.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(24, -1)
    blocks = token_blocks(rows, 2)
    assert blocks.shape == (12, 3, 4, 4)
    for token in range(6):
        r, c = token // 3 * 4, token % 3 * 4
        for time in range(2):
            assert torch.equal(blocks[2 * token + time], picture[time, :, r : r + 4, c : c + 4])


def test_kept_tokens_by_hand():
    # 3 x 4 tokens, text in the corner token 0 alone: with its neighbours 0 1 4 5
    logits = torch.full((12, 2), -1.0)
    logits[0] = 1.0
    grid = torch.tensor([[1, 6, 8]])
    for official in (True, False):
        assert kept_tokens(logits.flatten(), grid, official=official).tolist() == [0, 1, 4, 5]
        assert kept_tokens(logits.flatten(), grid, dilate=False, official=official).tolist() == [0]
    # no text at all: the release keeps nothing, ours the likeliest token of each image
    both = torch.tensor([[1, 4, 4], [1, 4, 6]])
    blank = torch.full((10, 2), -5.0)
    blank[2], blank[8, 1] = -4.0, -1.0
    assert kept_tokens(blank.flatten(), both, official=True).tolist() == []
    assert kept_tokens(blank.flatten(), both).tolist() == [2, 8]
    # slices that disagree: any hit counts, where the release takes every second hit
    split = torch.full((4, 2), -1.0)
    split[1, 0], split[2, 1], split[3, 0] = 1.0, 1.0, 1.0
    one = torch.tensor([[1, 4, 4]])
    assert kept_tokens(split.flatten(), one, dilate=False).tolist() == [1, 2, 3]
    assert kept_tokens(split.flatten(), one, dilate=False, official=True).tolist() == [1, 3]


def test_windows_by_hand():
    # 3 x 4 tokens in windows of 2: window rows {0, 1} and {2}, columns {0, 1}, {2, 3} and an empty third
    index, rank, bounds = window_order(torch.tensor([0, 3, 5, 6, 8]), torch.tensor([[1, 6, 8]]), window=2)
    assert index.tolist() == [0, 5, 3, 6, 8]
    assert rank.tolist() == [0, 2, 1, 3, 4]
    assert bounds.tolist() == [0, 8, 16, 16, 20, 20, 20]


def test_prompt_by_hand():
    # words 1 2, an image of 2 x 3 tokens of which 1 (0, 1) and 3 (1, 0) stay, words 3 4
    ids = torch.tensor([[1, 2, 9, 9, 9, 9, 9, 9, 3, 4]])
    short, positions, delta, per_image = shorten_prompt(ids, torch.tensor([1, 3]), torch.tensor([[1, 4, 6]]), 9)
    assert short.tolist() == [[1, 2, 9, 9, 3, 4]]
    assert positions[:, 0].tolist() == [[0, 1, 2, 2, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 3, 2, 4, 5]]
    assert delta.tolist() == [[0]]  # the next position is 6, and there are 6 tokens
    assert per_image.tolist() == [2]
    with pytest.raises(ValueError, match="10 placeholders|6 placeholders"):
        shorten_prompt(ids, torch.tensor([1]), torch.tensor([[1, 4, 4]]), 9)


@pytest.mark.parametrize("options", [{"classifier": "weights.pt"}, {"threshold": math.nan}, {"threshold": "high"}])
def test_docprune_refuses_what_cannot_classify(options):
    with pytest.raises(UnknownArgumentError, match=f"docprune: {next(iter(options))}="):
        vtc.create("docprune", keep=4, **options)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
def test_docprune_inside_models(family):
    model = shared(family)
    inputs = make_inputs(family, model, 2, images=(1, 2))
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    inputs["pixel_values"][..., :14, :14] = 1.0  # the first of the 2 x 2 blocks of every view
    with vtc.patch(model, "docprune.mask-only", classifier=Bright()) as handle, torch.no_grad():
        model(**inputs)
        call = handle.stats.last
        kept = handle.stats.kept
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert call.fired
    for image, record in zip(call.images, kept, strict=True):
        layout, entries = record.layout, record.entries
        wanted = (layout.kind == Kind.NEWLINE) | ((layout.row < 2) & (layout.col < 2) & (layout.kind == Kind.PATCH))
        assert entries.tolist() == wanted.nonzero()[:, 0].tolist()
        assert image.kept == int(wanted.sum()) < image.slots


# ----------------------------------------------------------------------------------------------------------- tokencorr
def rays(*degrees: float) -> Tensor:
    """Unit vectors of the plane, ``(1, n, 2)``."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


LOW, HIGH = [5.0, 9.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0], [1.0, 1.1, 1.2, 9.0, 1.1, 1.2, 1.0, 1.1]
KEYS = (0, 1, 2, 3, 4, 90, 180, 270)


def page(low: list[float] = LOW, high: list[float] = HIGH, keys: tuple[float, ...] = KEYS) -> dict[str, Tensor]:
    return {"all_keys": rays(*keys), "low_attn": torch.tensor([low]), "high_attn": torch.tensor([high])}


def test_tokencorr_by_hand():
    # Keys: five patches within 4 degrees (each has 4 look-alikes of 8), three far from all (none). With beta 0.5 four look-alikes
    # are enough: five are redundant, three are not. The three highest of the shallow attention: 1 (9), 7 (7), 6 (6).
    # Deep attention: quartiles of 1 1 1.1 1.1 1.1 1.2 1.2 9 are 1.075 and 1.2; outliers are above 1.3875: patch 3.
    reducer = vtc.create("tokencorr", keep=1.0, beta=0.5)
    signals = signals_of(Layout.grid(2, 4), 8, **page())
    assert reducer.different(signals.all_keys[0]) == 3
    assert reducer.outstanding(signals.high_attn[0]).nonzero().tolist() == [[3]]
    assert reducer.select(signals).index.tolist() == [[1, 3, 6, 7]]
    # no patch has more look-alikes than 4 of 8: with beta above a half none is redundant, and all stay
    assert vtc.create("tokencorr", keep=1.0, beta=0.51).select(signals).index.tolist() == [list(range(8))]
    # a budget of three: the outlier first, then the shallow attention
    assert reducer.select(signals_of(Layout.grid(2, 4), 3, **page())).index.tolist() == [[1, 3, 7]]
    assert reducer.select(signals_of(Layout.grid(2, 4), 1, **page())).index.tolist() == [[3]]
    # not adaptive: exactly the budget, in the same order of preference (3, 1, 7, 6, 0, 5)
    exact = vtc.create("tokencorr", keep=6, beta=0.5, adaptive=False)
    assert exact.select(signals_of(Layout.grid(2, 4), 6, **page())).index.tolist() == [[0, 1, 3, 5, 6, 7]]


def test_tokencorr_views_by_hand():
    # view 0 wants 4 as above; view 1 has patches that all differ but no outlier, and wants all 8: of 6 tokens 2 and 4
    both = {
        k: torch.cat([v, w], 1)
        for (k, v), w in zip(page().items(), page(keys=tuple(range(0, 360, 45)), high=[1.0] * 8).values(), strict=True)
    }
    reducer = vtc.create("tokencorr", keep=6, beta=0.5)
    chosen = reducer.select(signals_of(crops(1, 2, 4), 6, **both)).index[0]
    assert chosen.tolist() == [1, 3, 8, 9, 14, 15]
    assert reducer.select(signals_of(crops(1, 2, 4), 16, **both)).index[0].tolist() == [1, 3, 6, 7, *range(8, 16)]


def test_tokencorr_pages_keep_different_numbers():
    pages = {
        k: torch.cat([v, w]) for (k, v), w in zip(page().items(), page(keys=(0, 0, 0, 0, 0, 0, 0, 0)).values(), strict=True)
    }
    chosen = vtc.create("tokencorr", keep=1.0, beta=0.5).select(signals_of(Layout.grid(2, 4), 8, **pages))
    # identical patches are all redundant: one local patch, and the outlier
    assert [i[v].tolist() for i, v in zip(chosen.index, chosen.valid, strict=True)] == [[1, 3, 6, 7], [1, 3]]


@pytest.mark.parametrize("sampling", ["top", "random"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_tokencorr_on_identical_tokens(sampling, value):
    taps = {
        "all_keys": torch.full((1, 7, 4), value),
        "low_attn": torch.full((1, 7), value),
        "high_attn": torch.full((1, 7), value),
    }
    reducer = vtc.create("tokencorr", keep=1.0, sampling=sampling)
    count = 7 if value == 0 else 1  # zero keys are like nothing: their cosines are 0
    index = reducer.select(signals_of(Layout.grid(1, 7), 7, **taps)).index
    assert index.shape == (1, count)
    if sampling == "top":
        assert index.tolist() == [list(range(count))]


def test_tokencorr_of_one_token():
    taps = {"all_keys": torch.ones(1, 1, 4), "low_attn": torch.ones(1, 1), "high_attn": torch.ones(1, 1)}
    assert vtc.create("tokencorr", keep=1).select(signals_of(Layout.grid(1, 1), 1, **taps)).index.tolist() == [[0]]


def test_tokencorr_leaves_padding_out():
    layout = dataclasses.replace(Layout.grid(2, 4), slot=torch.tensor([0, -1, 1, -1, 2, 3, 4, 5]))
    chosen = vtc.create("tokencorr", keep=1.0).select(signals_of(layout, 6, **page()))
    assert not {1, 3} & {*chosen.index[0].tolist()}


def test_tokencorr_draws_by_attention():
    # three of eight are drawn; the attention of patch 1 outweighs the rest by far, patch 2 has none
    low = [1.0, 1e6, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    reducer = vtc.create("tokencorr", keep=1.0, beta=0.5, sampling="random")
    assert reducer.wants_fingerprint
    drawn = set()
    for mark in range(30):
        signals = signals_of(Layout.grid(2, 4), 8, **page(low=low, high=[1.0] * 8))
        signals = dataclasses.replace(signals, fingerprint=(mark,))
        index = reducer.select(signals).index
        assert torch.equal(index, reducer.select(signals).index)
        assert index.shape == (1, 3)
        assert 1 in index[0].tolist()
        assert 2 not in index[0].tolist()
        drawn.add(tuple(index[0].tolist()))
    assert len(drawn) > 5


def test_count_similar_equals_the_full_matrix():
    features = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    features[:, 7] = features[:, 9]
    features[:, 11] = 0
    unit = torch.nn.functional.normalize(features, dim=-1)
    full = (unit @ unit.transpose(1, 2) > 0.8).sum(2) - (unit.norm(dim=-1) > 0.9).long()
    for block in (7, 50, 1024):
        assert torch.equal(count_similar(features, 0.8, block=block), full)


@pytest.mark.parametrize(
    "options", [{"alpha": 2.0}, {"beta": -0.1}, {"factor": math.nan}, {"sampling": "best"}, {"low": 1.5}, {"alpha": True}]
)
def test_tokencorr_refuses_what_means_nothing(options):
    with pytest.raises(UnknownArgumentError, match=f"tokencorr: {next(iter(options))}="):
        vtc.create("tokencorr", keep=4, **options)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
def test_tokencorr_inside_models(family):
    model = shared(family)
    inputs = make_inputs(family, model, 2, images=(1, 2))
    # half of the cosines of random keys exceed 0, so that about half of the patches have that many look-alikes
    with vtc.patch(model, "tokencorr", keep=1.0, alpha=0.0, beta=0.5) as handle, torch.no_grad():
        assert handle.reducer.low == 2  # half of four layers
        out = model(**inputs)
        call = handle.stats.last
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.isfinite(out.logits[inputs["attention_mask"].bool()]).all()
    assert all(1 <= i.kept < i.slots for i in call.images)
    assert ("class token" in call.images[0].stages[0].note) == (family == "llava_siglip")
    with vtc.patch(model, "tokencorr", keep=7, adaptive=False) as handle, torch.no_grad():
        model(**inputs)
    for image, record in zip(handle.stats.last.images, handle.stats.kept, strict=True):
        assert image.stages[0].requested == 7
        assert int((record.layout.kind[record.entries] == Kind.PATCH).sum()) == 7


@pytest.mark.parametrize("seed", range(6))
def test_tokencorr_is_independent_of_the_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    layout, budget = crops(2, 3, 4), 1 + 7 * seed
    taps = {name: torch.rand(3, 36, generator=generator) for name in ("low_attn", "high_attn")}
    taps["all_keys"] = torch.randn(3, 36, 3, generator=generator)
    for options in ({}, {"adaptive": False}, {"sampling": "random"}):
        reducer = vtc.create("tokencorr", keep=budget, beta=0.1, **options)
        together = reducer.select(dataclasses.replace(signals_of(layout, budget, **taps), fingerprint=(5, 6, 7)))
        valid = torch.ones_like(together.index, dtype=torch.bool) if together.valid is None else together.valid
        for b in range(3):
            own = signals_of(layout, budget, **{k: v[b : b + 1] for k, v in taps.items()})
            alone = reducer.select(dataclasses.replace(own, fingerprint=(5 + b,))).index[0]
            assert torch.equal(together.index[b, valid[b]], alone)
            assert (alone[1:] > alone[:-1]).all()
            assert len(alone) == budget if "adaptive" in options else 1 <= len(alone) <= budget


@pytest.mark.parametrize("seed", range(6))
def test_docprune_is_independent_of_the_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    taps = {"text_blocks": torch.randn(3, 20, 2, generator=generator) - 0.5}
    for threshold in (0.0, -math.inf):
        reducer = vtc.create("docprune", keep=1 + 3 * seed, threshold=threshold)
        together = reducer.select(signals_of(Layout.grid(4, 5), 1 + 3 * seed, **taps))
        valid = torch.ones_like(together.index, dtype=torch.bool) if together.valid is None else together.valid
        for b in range(3):
            alone = reducer.select(
                signals_of(Layout.grid(4, 5), 1 + 3 * seed, text_blocks=taps["text_blocks"][b : b + 1])
            ).index[0]
            assert torch.equal(together.index[b, valid[b]], alone)
            assert (alone[1:] > alone[:-1]).all()
            assert len(alone) == 1 + 3 * seed if threshold < 0 else 1 <= len(alone) <= 1 + 3 * seed
