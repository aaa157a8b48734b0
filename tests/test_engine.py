"""Parts of the engine on their own: cuts, masks, caches, statistics, fingerprints, and what the hooks cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_inputs, shared
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, ImagePicker, TwoLayerPicker, VisionPicker, marks_of
from transformers import DynamicCache

import vtc
from vtc.engine.cache import PrunedLayer, pruned_layer
from vtc.engine.segment import cut, remap_mask
from vtc.errors import UnsupportedFeatureError, VtcError
from vtc.eval.hooks import LAYERS, measure, step_lines, toy_inputs, toy_model
from vtc.kernels import take
from vtc.stats import HISTORY, CallStats, StatsLog


# -------------------------------------------------------------------------------------------------------------------- cut
def tables(batch: int, q: int):
    return st.lists(st.lists(st.booleans(), min_size=q, max_size=q), min_size=batch, max_size=batch).map(torch.tensor)


@st.composite
def cuts(draw):
    batch, q = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    real = torch.arange(q) >= torch.tensor([draw(st.integers(0, q - 1)) for _ in range(batch)])[:, None]
    first, second = draw(tables(batch, q)), draw(tables(batch, q))
    first[:, -1] = second[:, -1] = True  # the last token is text
    return first, first & second, real, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_two_cuts_in_a_row(case):
    """Against a list comprehension per row: rows, padding, inverse, positions and the gather from one segment to the next."""
    first, second, real, compact_one, compact_two = case
    batch, q = real.shape
    one, _ = cut(first, (first & real).sum(1).tolist(), real, None, compact_one)
    two, relative = cut(second, (second & real).sum(1).tolist(), real, one, compact_two)
    at = [[c for c in range(q) if (second & real)[b, c]] for b in range(batch)]
    p = max(map(len, at))
    assert two.rows.shape == (batch, p)
    assert (two.valid is None) == all(len(a) == p for a in at)
    tokens = torch.arange(q).expand(batch, q)
    held = torch.ones_like(two.rows, dtype=torch.bool) if two.valid is None else two.valid
    assert torch.equal(take(take(tokens, one.rows, 1), relative, 1)[held], two.rows[held])
    for b, mine in enumerate(at):
        n = len(mine)
        assert two.rows[b, p - n :].tolist() == mine  # right-aligned, in order
        if two.valid is not None:
            assert two.valid[b].tolist() == [False] * (p - n) + [True] * n
        inverse = [mine.index(c) + p - n if c in mine else -1 for c in range(q)]
        assert two.inverse[b].tolist() == inverse
        table = second if compact_two else first if compact_one else None
        if table is None:
            assert two.delta is None and two.shift is None
            continue
        gone = [c for c in range(q) if real[b, c] and not table[b, c]]
        assert two.shift[b] == len(gone)
        assert two.delta[b, p - n :].tolist() == [sum(g < c for g in gone) for c in mine]


def test_a_cut_that_leaves_nothing():
    with pytest.raises(UnsupportedFeatureError, match="prefill_chunk_size"):
        cut(torch.zeros(1, 4, dtype=torch.bool), [0], torch.ones(1, 4, dtype=torch.bool), None, False)


# ------------------------------------------------------------------------------------------------------------------- mask
@pytest.mark.parametrize("form", ["bool", "float", "flash", "none", "window"])
@pytest.mark.parametrize("padded", [False, True])
def test_remap_mask(form, padded):
    """Entry by entry: query slot i may see key slot j where their logical tokens may, and neither is padding."""
    q, seen = 7, 4
    real = torch.ones(2, q, dtype=torch.bool)
    keep = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1, 1] if not padded else [1, 0, 0, 0, 0, 1, 1]]).bool()
    seg, _ = cut(keep, keep.sum(1).tolist(), real, None, False)
    past = torch.tensor([[0, 2, 3], [0, 1, 3]])  # keys of an earlier, reduced forward
    cols = torch.cat([past, seg.rows + seen], 1)
    valid = None if seg.valid is None else torch.cat([torch.ones_like(past, dtype=torch.bool), seg.valid], 1)
    total = seen + q
    allowed = torch.arange(total) <= torch.arange(seen, total)[:, None]
    window = 5
    if form == "window":
        allowed = allowed & (torch.arange(total) > torch.arange(seen, total)[:, None] - window)
        given_mask = allowed[:, -(q + 2) :].expand(2, 1, -1, -1)  # a sliding layer's mask covers its last columns only
        allowed = allowed & (torch.arange(total) >= total - q - 2)
    elif form == "bool":
        given_mask = allowed.expand(2, 1, -1, -1)
    elif form == "float":
        given_mask = torch.zeros(q, total).masked_fill(~allowed, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    elif form == "flash":
        given_mask = torch.ones(2, total, dtype=torch.bool)
    else:
        given_mask = None
    implementation = "flash_attention_2" if form == "flash" else "sdpa"
    got = remap_mask(
        given_mask, seg, cols, valid, total=total, q=q, implementation=implementation, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    if form == "none" and not padded:
        assert got is None
        return
    keys = cols.shape[1]
    if form == "flash":
        assert got.shape == (2, keys)
        assert torch.equal(got, torch.ones(2, keys, dtype=torch.bool) if valid is None else valid)
        return
    assert got.dtype == (torch.float32 if form == "float" else torch.bool)
    see = got == 0 if form == "float" else got
    queries = seg.rows.shape[1]
    for b in range(2):
        for i in range(queries):
            is_pad = seg.valid is not None and not seg.valid[b, i]
            for j in range(keys):
                if is_pad:  # no empty softmax row
                    assert not (j == keys - queries + i) or see[b, 0, i, j]
                    continue
                ok = bool(allowed[seg.rows[b, i], cols[b, j]]) and (valid is None or bool(valid[b, j]))
                assert bool(see[b, 0, i, j]) == ok


def test_remap_mask_makes_an_additive_mask_for_eager():
    keep = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 1]]).bool()
    seg, _ = cut(keep, keep.sum(1).tolist(), torch.ones(2, 4, dtype=torch.bool), None, False)
    got = remap_mask(
        None, seg, seg.rows, seg.valid, total=4, q=4, implementation="eager", dtype=torch.float32, device=torch.device("cpu")
    )
    lowest = torch.finfo(torch.float32).min
    assert got.dtype == torch.float32 and set(got.unique().tolist()) == {lowest, 0.0}
    assert (got == 0).any(-1).all()


def test_remap_mask_refuses_block_masks():
    with pytest.raises(UnsupportedFeatureError, match="flex_attention"):
        remap_mask(
            object(), None, torch.zeros(1, 2, dtype=torch.long), None, total=2, q=2, implementation="flex_attention",
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ cache
def filled(batch=2, held=3):
    cache = DynamicCache()
    rows = torch.randn(batch, 2, held, 4)
    keep = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1]]).bool()[:batch]
    seg, _ = cut(keep, keep.sum(1).tolist(), torch.ones(batch, 5, dtype=torch.bool), None, True)
    layer = pruned_layer(cache, 0)
    layer.begin(seg, 5)
    layer.update(rows, rows.clone())
    return cache, layer, seg


def test_cache_layer_lengths_and_columns():
    cache, layer, seg = filled()
    assert isinstance(layer, PrunedLayer) and cache.layers[0] is layer
    assert layer.keys.shape[-2] == layer.stored() == 3 and layer.get_seq_length() == cache.get_seq_length() == 5
    assert layer.get_mask_sizes(2) == (7, 0) and layer.get_mask_sizes(torch.arange(2)) == (7, 0)  # 4.57 passes cache_position
    assert torch.equal(layer.columns()[0], seg.rows)
    assert layer.columns(2)[0].tolist() == [[0, 2, 4, 5, 6], [0, 1, 4, 5, 6]] and layer.columns(2)[1] is None
    new = torch.randn(2, 2, 1, 4)
    layer.update(new, new)
    assert layer.get_seq_length() == 6 and layer.stored() == 4
    assert layer.shift.tolist() == [2, 2]


def test_cache_layer_rows():
    _, layer, seg = filled()
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape[0] == 4 and torch.equal(layer.cols, seg.rows.repeat_interleave(2, 0))
    layer.reorder_cache(torch.tensor([2, 0, 1, 3]))
    assert torch.equal(layer.cols, seg.rows[[1, 0, 0, 1]])
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.cols, seg.rows[[1, 1]]) and layer.shift.shape == (2,) and layer.keys.shape[0] == 2


def test_cache_layer_second_reduction_and_reset():
    cache, layer, first = filled()
    keep = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    seg, _ = cut(keep, keep.sum(1).tolist(), torch.ones(2, 3, dtype=torch.bool), None, True)
    layer.begin(seg, 3)
    layer.update(*[torch.randn(2, 2, 2, 4)] * 2)
    assert layer.get_seq_length() == 8 and layer.stored() == 5
    assert layer.columns()[0].tolist() == [[0, 2, 4, 5, 7], [0, 1, 4, *(seg.rows[1] + 5).tolist()]]
    assert layer.columns()[1].tolist() == [[True] * 5, [True] * 3 + [False, True]]
    assert layer.shift.tolist() == [3, 4]
    layer.crop(-1)
    assert layer.get_seq_length() == 7 and layer.columns()[0].shape == (2, 4)
    with pytest.raises(UnsupportedFeatureError, match="fresh cache"):
        layer.crop(-2)
    assert layer.get_seq_length() == 7  # a refused crop changes nothing
    layer.reset()
    assert layer.cols is None and layer.shift is None and layer.valid is None and layer.dropped == 0


# ------------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(
    ("reducer", "per_layer", "stages"),
    [
        (BoundaryPicker(keep=5), [5, 5, 5, 5, 5], [("boundary", 0, 16, 5, 5)]),
        (VisionPicker(keep=5), [5, 5, 5, 5, 5], [("vision", 0, 16, 5, 5)]),
        (EncoderPicker(keep=5), [5, 5, 5, 5, 5], [("encoder", 0, 16, 5, 5)]),
        (ImagePicker(keep=6), [6, 6, 6, 6, 6], [("image", 0, 16, 6, 6)]),
        (DecoderPicker(keep=5, layer=3), [16, 16, 16, 5, 5], [("decoder", 3, 16, 5, 5)]),
        (TwoLayerPicker(keep=0.5), [16, 16, 10, 10, 5], [("decoder", 2, 16, 10, 10), ("decoder", 4, 10, 5, 5)]),
        (
            [VisionPicker(keep=12), BoundaryPicker(keep=8, salt=2), DecoderPicker(keep=3, salt=3)],
            [8, 8, 3, 3, 3],
            [("vision", 0, 16, 12, 12), ("boundary", 0, 12, 8, 8), ("decoder", 2, 8, 3, 3)],
        ),
        # an image with fewer tokens than the budget is kept whole, and the statistics say so
        (
            [BoundaryPicker(keep=4), DecoderPicker(keep=9)],
            [4, 4, 4, 4, 4],
            [("boundary", 0, 16, 4, 4), ("decoder", 2, 4, 4, 9)],
        ),
    ],
)
def test_statistics_of_one_image(reducer, per_layer, stages):
    model = shared("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, reducer) as handle, torch.no_grad():
        with pytest.raises(VtcError, match="no call"):
            _ = handle.stats.last
        model(**inputs)
        model(**inputs)
        call = handle.stats.last
    (image,) = call.images
    assert image.slots == 16 and image.kept == per_layer[-1] and image.tokens_per_layer == per_layer
    assert image.avg_tokens == sum(per_layer) / 5 and image.fired and call.fired and not call.text_only
    assert [(s.stage, s.layer, s.before, s.after, s.requested) for s in image.stages] == stages
    assert [bool(s.note) for s in image.stages] == [s[4] > s[2] for s in stages]
    assert call.reducer_ms > 0
    assert len(handle.stats) == 2 and len(handle.stats.images) == 2
    summary = handle.stats.summary()
    assert summary["slots"] == 16 and summary["avg_tokens"] == image.avg_tokens and summary["images"] == summary["calls"] == 2
    data = call.to_dict()
    assert data["images"][0]["avg_tokens"] == image.avg_tokens and data["fired"] and data["reducer_ms"] > 0


def test_statistics_of_decode_and_text():
    model = shared("llava")
    inputs = make_inputs("llava", model, images=[0, 1])
    text = {"input_ids": torch.tensor([[3, 4, 5]])}
    with vtc.patch(model, "uniform", keep=5) as handle, torch.no_grad():
        model.generate(**inputs, max_new_tokens=5)
        assert len(handle.stats) == 1  # decode steps are not calls
        model.generate(**text, max_new_tokens=5)
        assert [c.text_only for c in handle.stats] == [False, True]
        assert handle.stats[0].images[0].row == 1
        assert not handle.stats.last.fired and handle.stats.last.images == [] and handle.stats.last.reducer_ms == 0
        handle.stats.clear()
        assert len(handle.stats) == 0 and handle.stats.summary()["images"] == 0


def test_history_is_bounded():
    log = StatsLog()
    for _ in range(HISTORY + 5):
        log.append(CallStats())
    assert len(log) == HISTORY


def test_average_budget_is_met():
    model = shared("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, DecoderPicker(avg_tokens=10, layer=2)) as handle, torch.no_grad():
        model(**inputs)
    assert handle.stats.last.images[0].tokens_per_layer == [16, 16, 6, 6, 6] and handle.stats.last.images[0].avg_tokens == 10


# ------------------------------------------------------------------------------------------------------------ fingerprints
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fingerprints_do_not_depend_on_the_batch(family, dtype):
    model = shared(family, "sdpa", dtype)
    inputs = make_inputs(family, model, images=[1, 2])
    alone = marks_of(model, inputs)
    assert len(set(alone)) == 3
    sizes = inputs["image_sizes"].flip(0).tolist() if family == "llava_next" else None
    ids = make_inputs(family, model, images=[2, 1], sizes=sizes)
    record = []
    side = vtc.patch(model, "random", keep=5)
    try:
        inner = side.tower.on_record
        side.tower.on_record = lambda r: (record.append(r), inner(r))
        with torch.no_grad():
            model(**inputs)
            flipped = {k: v.flip(0) for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
            model(**ids | flipped)
    finally:
        side.remove()
    assert record[0].fingerprint == alone and record[1].fingerprint == alone[::-1]
    changed = dict(inputs)
    changed["pixel_values"] = inputs["pixel_values"].clone()
    changed["pixel_values"][(1, 0, 0, 3, 3)[: changed["pixel_values"].dim()]] += 1
    other = marks_of(model, changed)
    assert other[0] == alone[0] and other[2] == alone[2] and other[1] != alone[1]


# ------------------------------------------------------------------------------------------------------------------- speed
LINES = {
    "boundary, original positions": 286,
    "boundary, compact positions": 307,
    "decoder layer 2 (fastv)": 309,
    "boundary, original positions, padded": 808,
    "boundary, compact positions, padded": 866,
}
"""Lines of vtc in a decode step of 32 layers (transformers 4.57 or 5.24, whichever takes more)."""


def test_cost_of_the_hooks_per_decode_step():
    """Lines are counted, since a machine that does other things shows any time (results/hooks.csv has a quiet one's)."""
    rows = {row.case: row for row in measure(pairs=1, steps=6)}
    for row in rows.values():
        print(row)
    assert {case: row.lines for case, row in rows.items() if not LAYERS <= row.lines <= 1.1 * LINES[case]} == {}
    assert rows.keys() == LINES.keys()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_decode_step_costs_the_same_whatever_was_decoded_before(batch):
    model, inputs = toy_model(), toy_inputs(batch)
    assert step_lines(model, inputs, 1) == 0, "not patched"
    with vtc.patch(model, "uniform", keep=35):
        assert step_lines(model, inputs, 1) == step_lines(model, inputs, 12) > 0
