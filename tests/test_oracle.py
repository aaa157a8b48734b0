"""The patched model against slow references that use none of the engine's code."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from family_cases import CASES
from models import DECODER_LAYERS, FAMILIES, GRID, SIZES, build, image_spans, make_inputs, shared, view_count, visual_of
from pickers import (
    BoundaryPicker,
    DecoderPicker,
    EncoderPicker,
    ImagePicker,
    TwoLayerPicker,
    VisionPicker,
    marks_of,
)
from reference import Plan, embeddings, hidden_reference, plan_of, shorter_prompt, slot_sources, text_of
from torch import Tensor, nn

import vtc
from vtc.core import Kind, Reducer
from vtc.engine.upstream import window_of

TOLERANCE = 1e-5
STEPS = 8

KINDS: dict[str, tuple[Reducer, ...]] = {
    "encoder": (EncoderPicker(keep=0.4),),
    "encoder-ragged": (EncoderPicker(keep=0.5, ragged=True),),
    "vision": (VisionPicker(keep=0.4),),
    "vision-ragged": (VisionPicker(keep=0.4, ragged=True),),
    "vision-merge": (VisionPicker(keep=0.3, merge=True),),
    "image": (ImagePicker(keep=0.5),),
    "boundary": (BoundaryPicker(keep=0.4),),
    "boundary-ragged": (BoundaryPicker(keep=0.4, ragged=True),),
    "boundary-merge": (BoundaryPicker(keep=0.3, merge=True, ragged=True),),
    "decoder": (DecoderPicker(keep=0.4),),
    "decoder-merge": (DecoderPicker(keep=0.4, merge=True, ragged=True),),
    "boundary+decoder": (BoundaryPicker(keep=0.6, ragged=True), DecoderPicker(keep=0.3, layer=3, salt=2, ragged=True)),
    "vision+decoder": (VisionPicker(keep=0.6), DecoderPicker(keep=0.3, salt=2, merge=True)),
    "two-layers": (TwoLayerPicker(keep=0.6, ragged=True),),
    "encoder+boundary+two-layers": (
        EncoderPicker(keep=0.9, ragged=True),
        BoundaryPicker(keep=0.8),
        TwoLayerPicker(keep=0.6),
    ),
}
SHORT = ("encoder-ragged", "vision-merge", "boundary-merge", "boundary+decoder")
"""Kinds that every attention implementation and family runs; the others run under sdpa."""


def reducer_of(kind: str, positions: str, newlines: str | None = None) -> Reducer:
    members = [replace(p, positions=positions, newlines=newlines) for p in KINDS[kind]]
    return vtc.registry.resolve(members)


def patched_generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS, **options):
    """Greedy tokens, logits ``(B, steps, V)`` and the whole output of ``generate``."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), out


@functools.cache
def unpatched(family: str, batch: int, impl: str, dtype: torch.dtype):
    model = shared(family, impl, dtype)
    return patched_generate(model, make_inputs(family, model, batch))[:2]


@functools.cache
def expected(family: str, batch: int, kind: str, positions: str, newlines: str | None = None, dtype=torch.float64):
    """Plan and reference outputs in float64. ``dtype``: of the model whose image fingerprints decide."""
    model = shared(family, dtype=torch.float32 if CASES[family].float32 else torch.float64)
    inputs = make_inputs(family, model, batch)
    other = shared(family, "sdpa", dtype)
    marks = marks_of(other, make_inputs(family, other, batch))
    plan = plan_of(model, inputs, reducer_of(kind, positions, newlines).parts(), marks)
    return plan, reference_of(family, batch, plan, STEPS)


def reference_of(family: str, batch: int, plan: Plan, steps: int):
    """What :func:`hidden_reference` returns, in float64 where the model can."""
    model = shared(family, dtype=torch.float32 if CASES[family].float32 else torch.float64)
    return hidden_reference(model, make_inputs(family, model, batch), plan, steps)


def equal_to_reference(family, batch, kind, positions, impl, newlines=None, record=None):
    case = CASES[family]
    dtype = torch.float32 if impl == "eager" or case.float32 else torch.float64
    model = shared(family, impl, dtype)
    inputs = make_inputs(family, model, batch)
    plan, (tokens, logits, _) = expected(family, batch, kind, positions, newlines, dtype)
    base_tokens, base = unpatched(family, batch, impl, dtype)
    with vtc.patch(model, reducer_of(kind, positions, newlines)) as handle:
        got_tokens, got, out = patched_generate(model, inputs)
    limit = TOLERANCE
    if dtype is torch.float32:  # what rounding alone does to the unpatched model
        plain = (
            reference_of(family, batch, Plan(), 1)[1] if case.float32 else unpatched(family, batch, "sdpa", torch.float64)[1]
        )
        limit = max(limit, 8 * (base - plain)[:, 0].abs().max().item())
    error = (got - logits)[:, : case.steps].abs().max().item()
    effect = (got[:, 0] - base[:, 0]).abs().max().item()
    if record:
        record("max_error", error), record("effect", effect)
    assert torch.equal(got_tokens[:, : case.steps], tokens[:, : case.steps])
    assert error < limit
    assert effect > 1e-2  # the dropped tokens did matter
    real, prompt = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    for i, layer in enumerate(out.past_key_values.layers):
        held = (real & ~plan.hide[i]) if i in plan.hide else torch.ones_like(real)
        held = torch.cat([held, torch.ones(len(held), STEPS - 1, dtype=torch.bool)], 1)
        window = window_of(text_of(model).config, i)
        seen = held if window is None else held[:, max(held.shape[1] - window + 1, 0) :]  # by the next token
        assert layer.keys.shape[-2] == layer.values.shape[-2] == int(seen.sum(1).max())
        assert out.past_key_values.get_seq_length(i) == prompt + STEPS - 1
    counts = [
        [len(c) if i not in plan.hide else int((~plan.hide[i][r, c]).sum()) for i in range(DECODER_LAYERS)]
        for r, c in image_spans(inputs, model)
    ]
    call = handle.stats[0]
    assert [image.tokens_per_layer for image in call.images] == counts
    assert [image.slots for image in call.images] == [len(c) for _, c in image_spans(inputs, model)]
    assert call.fired and not call.text_only and len(handle.stats) == 1
    return error


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_equals_reference(family, batch, kind, positions, record_property):
    equal_to_reference(family, batch, kind, positions, "sdpa", record=record_property)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("impl", ["eager64", "fake_flash", "eager"])
@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_other_attention_equals_reference(family, batch, kind, positions, impl, record_property):
    equal_to_reference(family, batch, kind, positions, impl, record=record_property)


@pytest.mark.parametrize("newlines", ["compete", "all", "with_row", "none"])
@pytest.mark.parametrize("kind", ["vision", "image", "encoder-ragged", "boundary-ragged", "decoder-merge", "boundary+decoder"])
def test_newline_policies(kind, newlines, record_property):
    equal_to_reference("llava_next", 2, kind, "original", "sdpa", newlines, record=record_property)


# ------------------------------------------------------------------------------------------------ a really shorter prompt
@pytest.mark.parametrize("kind", ["encoder-ragged", "vision-merge", "image", "boundary-ragged", "boundary-merge"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_a_shorter_prompt(family, batch, kind):
    model = shared(family)
    inputs = make_inputs(family, model, batch)
    plan, _ = expected(family, batch, kind, "compact")
    keep = ~plan.hide[0] & inputs["attention_mask"].bool()
    tokens, logits = shorter_prompt(model, embeddings(model, inputs, plan), keep, STEPS)
    with vtc.patch(model, reducer_of(kind, "compact")):
        got_tokens, got, out = patched_generate(model, inputs)
    assert torch.equal(got_tokens, tokens)
    assert (got - logits).abs().max() < TOLERANCE
    longest = int(keep.sum(1).max())  # nobody holds more keys than the shorter prompt would
    assert {layer.keys.shape[-2] for layer in out.past_key_values.layers} == {longest + STEPS - 1}


# -------------------------------------------------------------------------------------------------------------- identity
@pytest.mark.parametrize("kind", ["encoder", "vision", "boundary", "decoder", "boundary+decoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family, kind):
    model = shared(family)
    inputs = make_inputs(family, model, 2)
    tokens, logits = unpatched(family, 2, "sdpa", torch.float64)
    whole = [replace(p, keep=1.0, **({"ragged": False} if hasattr(p, "ragged") else {})) for p in KINDS[kind]]
    with vtc.patch(model, whole) as handle:
        got_tokens, got, out = patched_generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and torch.equal(got, logits)
    assert all(image.kept == image.slots for image in handle.stats.images)
    length = inputs["input_ids"].shape[1] + STEPS - 1
    assert {layer.keys.shape[-2] for layer in out.past_key_values.layers} == {length}


def snapshot(model: nn.Module) -> list:
    """Everything un-patching must restore: attributes, hooks and classes of every module, and the model's configs."""
    seen = []
    for name, module in model.named_modules():
        mine = dict(vars(module))
        hooks = {k: list(v) for k, v in mine.items() if k.endswith("_hooks") or k.endswith("_hooks_with_kwargs")}
        plain = {k: v for k, v in mine.items() if k not in hooks}
        seen.append((name, type(module), {k: id(v) for k, v in plain.items()}, hooks, dict(vars(type(module)))))
        seen.append({k: id(v) for part in ("_parameters", "_buffers", "_modules") for k, v in mine[part].items()})
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        seen.append((type(config), copy.deepcopy(config.to_dict()), config._attn_implementation))
    return seen


REAL = ["fastv", "uniform", "random"]


@pytest.mark.parametrize("kind", [*KINDS, *REAL])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_leaves_nothing_behind(family, kind):
    model = shared(family)
    inputs = make_inputs(family, model, 2)
    tokens, logits = unpatched(family, 2, "sdpa", torch.float64)
    before = snapshot(model)
    handle = vtc.patch(model, kind, keep=0.3) if kind in REAL else vtc.patch(model, reducer_of(kind, "original"))
    assert snapshot(model) != before
    patched_generate(model, inputs, 2)
    assert vtc.unpatch(model) is model
    assert snapshot(model) == before
    assert not handle.active
    got_tokens, got, out = patched_generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and torch.equal(got, logits)
    assert all(type(layer).__module__.startswith("transformers") for layer in out.past_key_values.layers)


def test_other_instances_are_untouched():
    model, other = build("llava"), shared("llava")
    inputs = make_inputs("llava", other, 2)
    before = snapshot(other)
    with vtc.patch(model, reducer_of("boundary+decoder", "original")):
        assert snapshot(other) == before
        assert torch.equal(patched_generate(other, inputs)[1], unpatched("llava", 2, "sdpa", torch.float64)[1])


# ------------------------------------------------------------------------------------------------- batches, runs, dtypes
def one_row(inputs: dict[str, Tensor], row: int, images: list[int]) -> dict[str, Tensor]:
    """One row of a batch, without its padding, with its own images."""
    real = inputs["attention_mask"][row].bool()
    out = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
    first = sum(images[:row])
    for key in ("pixel_values", "image_sizes"):
        if key in inputs and images[row]:
            out[key] = inputs[key][first : first + images[row]]
    return out


@pytest.mark.parametrize("kind", [*KINDS, *REAL])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_batch_equals_singles_and_runs_repeat(family, kind):
    model = shared(family)
    images = [1, 2, 0]
    inputs = make_inputs(family, model, images=images)
    handle = vtc.patch(model, kind, keep=0.3) if kind in REAL else vtc.patch(model, reducer_of(kind, "compact"))
    with handle:
        tokens, logits, _ = patched_generate(model, inputs)
        again = patched_generate(model, inputs)
        assert torch.equal(again[0], tokens) and torch.equal(again[1], logits)
        counts = [image.tokens_per_layer for image in handle.stats[0].images]
        handle.stats.clear()
        for row in range(3):
            alone, single, _ = patched_generate(model, one_row(inputs, row, images))
            assert torch.equal(alone[0], tokens[row])
            assert (single[0] - logits[row]).abs().max() < TOLERANCE
        assert [image.tokens_per_layer for image in handle.stats.images] == counts
        assert [call.text_only for call in handle.stats] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, *REAL])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_half_precision_has_no_nan(kind, impl, dtype):
    model = shared("llava_next", impl, dtype)
    inputs = make_inputs("llava_next", model, 2)
    handle = vtc.patch(model, kind, keep=0.3) if kind in REAL else vtc.patch(model, reducer_of(kind, "compact"))
    with handle, torch.no_grad():
        logits = model(**inputs).logits
        _, steps, _ = patched_generate(model, inputs, 3)
    assert logits.dtype == dtype and logits[inputs["attention_mask"].bool()].isfinite().all() and steps.isfinite().all()


@pytest.mark.parametrize("kind", ["boundary-ragged", "decoder-merge", "encoder-ragged"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_wide_batches(family, kind):
    """Rows with three images, one and none: forward logits of every kept position equal the reference's."""
    model = shared(family)
    inputs = make_inputs(family, model, images=[3, 1, 0], seed=4)
    marks = marks_of(model, inputs)
    reducer = reducer_of(kind, "original")
    plan = plan_of(model, inputs, reducer.parts(), marks)
    _, _, prompt = hidden_reference(model, inputs, plan, 1)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with vtc.patch(model, reducer), torch.no_grad():
        got = model(**inputs, position_ids=positions).logits
        plain = model(**inputs, position_ids=positions, use_cache=False).logits
    keep = inputs["attention_mask"].bool() & ~plan.hide[DECODER_LAYERS - 1]
    assert got.shape == prompt.shape
    assert (got - prompt)[keep].abs().max() < TOLERANCE
    assert (got - plain)[inputs["attention_mask"].bool()].abs().max() < TOLERANCE
    # a dropped slot shows the last kept token before it
    for row in range(len(keep)):
        last = None
        for column in inputs["attention_mask"][row].nonzero()[:, 0].tolist():
            last = column if keep[row, column] else last
            assert torch.equal(got[row, column], got[row, last])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("impl", ["sdpa", "eager64"])
def test_sliding_window_layers(impl, batch, positions):
    """Every layer slides (Mistral-7B-v0.1): the window counts logical tokens."""
    model = build("llava_next", impl, text=dict(sliding_window=40))
    inputs = make_inputs("llava_next", model, batch)
    marks = marks_of(model, inputs)
    reducer = reducer_of("boundary+decoder", positions)
    plan = plan_of(model, inputs, reducer.parts(), marks)
    tokens, logits, _ = hidden_reference(model, inputs, plan, STEPS)
    base = patched_generate(model, inputs)[1]
    with vtc.patch(model, reducer):
        got_tokens, got, _ = patched_generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and (got - logits).abs().max() < TOLERANCE
    assert (got - base)[:, 0].abs().max() > 1e-2


def test_fastv_keeps_what_the_last_token_looks_at():
    """End to end with a tapped signal: the same tokens that attention maps of an eager model rank highest."""
    for family in ("llava", "llava_next"):
        for batch, images in ((1, [1]), (2, [1, 2])):
            model = shared(family)
            inputs = make_inputs(family, model, batch)
            eager = shared(family, "eager64")
            maps = []
            attention = text_of(eager).layers[1].self_attn
            hook = attention.register_forward_hook(lambda m, a, out, maps=maps: maps.append(out[1]))
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                eager(**inputs, position_ids=positions)
            hook.remove()
            row = maps[0][:, :, -1].mean(1)
            gone = visual_of(inputs)
            for r, columns in image_spans(inputs, model):
                gone[r, columns[row[r, columns].topk(5).indices]] = False
            assert sum(images) == len(image_spans(inputs, model))
            plan = Plan(hide={i: gone for i in range(2, DECODER_LAYERS)})
            tokens, logits, _ = hidden_reference(model, inputs, plan, STEPS)
            with vtc.patch(model, "fastv", keep=5, layer=2):
                got_tokens, got, _ = patched_generate(model, inputs)
            assert torch.equal(got_tokens, tokens) and (got - logits).abs().max() < TOLERANCE


# ---------------------------------------------------------------------------------------------------------------- AnyRes
GRIDS = {
    "default": None,
    "wide": [[28, 28], [28, 84], [84, 28], [56, 84], [28, 112]],
    "one": [[28, 28]],
}
IMAGE_SIZES = [*SIZES, [28, 28], [5, 200], [200, 5], [56, 56], [57, 113], [113, 31], [90, 28], [28, 90], [1, 1]]


@functools.cache
def anyres(grid: str) -> nn.Module:
    return build("llava_next", **({} if GRIDS[grid] is None else {"image_grid_pinpoints": GRIDS[grid]}))


@pytest.mark.parametrize("size", IMAGE_SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("grid", GRIDS)
def test_slot_layout_of_anyres(grid, size):
    """Every slot of the layout names the projector row it holds, and its place in the stitched picture."""
    model = anyres(grid)
    inputs = make_inputs("llava_next", model, sizes=[size])
    ((_, source),) = slot_sources(model, inputs)
    family = vtc.families.family_of(model)
    call = family.describe({"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]})
    slots, patches = call.slots[0], call.patches[0]
    views = view_count(model, size)
    per = GRID * GRID
    assert call.views == [views] == [slots.views] and slots.thumbnail and len(slots) == len(source)
    new = source < 0
    assert torch.equal(slots.kind == Kind.NEWLINE, new)
    assert torch.equal((slots.view * per + slots.row * GRID + slots.col)[~new], source[~new])
    assert (slots.view[new] == -1).all() and torch.equal(slots.slot, torch.arange(len(source)))
    # y, x: raster order of the stitched picture, one newline at the end of each row
    assert torch.equal(slots.y[:per], torch.arange(per) // GRID) and torch.equal(slots.x[:per], torch.arange(per) % GRID)
    ends = new.nonzero()[:, 0].tolist()
    start, width, tops = per, None, []
    for end in ends:
        y, x = slots.y[start:end], slots.x[start:end]
        assert width in (None, len(x))
        width = len(x)
        start = end + 1
        if width:  # nothing is left of an image thinner than a patch
            assert (y == y[0]).all() and (x.diff() == 1).all() and slots.y[end] == y[0]
            tops.append(int(y[0]))
    assert start == len(slots) and (not tops or tops == list(range(tops[0], tops[0] + len(tops))))
    # a crop's place in the picture: crops lie row by row
    crops = ~new & (slots.view > 0)
    down, across = (int(v[crops].max()) // GRID + 1 if crops.any() else 1 for v in (slots.y, slots.x))
    fits = [w // 28 for h, w in model.config.image_grid_pinpoints if (h // 28) * (w // 28) == views - 1]
    fits = [w for w in fits if w >= across and (views - 1) // w >= down]
    wide = fits[0]
    assert len(set(fits)) == 1 or not crops.any()
    assert torch.equal(slots.y[crops], (slots.view[crops] - 1) // wide * GRID + slots.row[crops])
    assert torch.equal(slots.x[crops], (slots.view[crops] - 1) % wide * GRID + slots.col[crops])
    # the view layout is the inverse
    assert len(patches) == views * per and patches.views == views
    assert torch.equal(patches.slot[source[~new]], (~new).nonzero()[:, 0])
    assert (patches.slot >= 0).sum() == (~new).sum()
    held = patches.slot >= 0
    for name in ("view", "row", "col", "y", "x"):
        assert torch.equal(getattr(patches, name)[held], getattr(slots, name)[patches.slot[held]]), name
    # images of one geometry share the object
    again = family.describe({"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"].clone()})
    assert again.slots[0] is slots and again.patches[0] is patches


@pytest.mark.parametrize("newlines", ["all", "with_row", "none", "compete"])
def test_newlines_in_statistics(newlines):
    """Newlines kept by policy come on top of the budget, and are reported."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, sizes=[[50, 25]])
    ((_, source),) = slot_sources(model, inputs)
    rows = int((source < 0).sum())
    with vtc.patch(model, "uniform", keep=10, newlines=newlines) as handle, torch.no_grad():
        model(**inputs)
    image = handle.stats.last.images[0]
    assert image.stages[0].requested == 10 and image.stages[0].before == len(source)
    expected_kept = {"all": 10 + rows, "none": 10, "compete": 10}.get(newlines)
    assert image.kept == expected_kept if expected_kept else 10 < image.kept <= 10 + rows
    assert image.stages[0].after == image.kept
