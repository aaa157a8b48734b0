"""What every registered reducer promises, on every family, attention implementation, batch and budget.

The matrix is the registry times ``cases.CASES``; nobody adds a test by hand for a new method.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import IMAGE_TOKEN, image_features, make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.core import Kind, Layout, Reducer, Signals, Stage

REDUCERS = vtc.list_reducers()
FAMILIES = ("llava", "llava_next")
IMAGES = {1: (1,), 2: (1, 2)}
"""Images of each row: batch 2 is left padded, with unequal image counts."""

reducers = pytest.mark.parametrize("reducer", REDUCERS)
families = pytest.mark.parametrize("family", FAMILIES)
impls = pytest.mark.parametrize("impl", ["sdpa", "eager"])
batches = pytest.mark.parametrize("batch", [1, 2])
budgets = pytest.mark.parametrize("budget", ["mild", "harsh"])


# Hugging Face's eager attention takes its softmax in float32, where the float64 mask value of padding is -inf: NaN, also unpatched
DTYPE = {"sdpa": torch.float64, "eager": torch.float32}
TOLERANCE = {"sdpa": 1e-5, "eager": 1e-4}
"""Of logits of the same tokens in another batch: norms and rotations are float32 in any model."""


@functools.cache
def inputs_of(family: str, impl: str, batch: int) -> dict[str, Tensor]:
    return make_inputs(family, model_of(family, impl), batch, seed=batch, images=IMAGES[batch])


def model_of(family: str, impl: str) -> nn.Module:
    return shared(family, impl, DTYPE[impl])


@functools.cache
def plain_logits(family: str, impl: str, batch: int) -> Tensor:
    with torch.no_grad():
        return model_of(family, impl)(**inputs_of(family, impl, batch)).logits


def run(model: nn.Module, inputs: dict[str, Tensor], reducer: str, options: dict[str, Any]) -> tuple[Tensor, Any, list[Any]]:
    """Return logits, the call's statistics and the engine's record of each image."""
    seen = []
    with vtc.patch(model, reducer, **options) as handle, torch.no_grad():
        hook = handle.family.text.register_forward_hook(
            lambda _m, _a, kwargs, _o: seen.append(kwargs["_vtc"].instances), with_kwargs=True
        )
        try:
            logits = model(**inputs).logits
        finally:
            hook.remove()
        return logits, handle.stats.last, seen[-1]


# -------------------------------------------------------------------------------------------------- counts and statistics
@reducers
@families
@impls
@batches
@budgets
def test_tokens_and_statistics(reducer: str, family: str, impl: str, batch: int, budget: str) -> None:
    model, inputs = model_of(family, impl), inputs_of(family, impl, batch)
    options, rule = getattr(CASES[reducer], budget), CASES[reducer].count
    logits, call, instances = run(model, inputs, reducer, options)
    bound = vtc.create(reducer, **options).bind(facts_of(model))
    parts = {(p.stage.value, p.layer): p for p in bound.parts()}

    assert logits.shape == plain_logits(family, impl, batch).shape
    assert not torch.equal(logits, plain_logits(family, impl, batch)), "dropping tokens changes nothing: the test is blind"
    assert call.fired
    assert not call.text_only
    assert call.reducer_ms > 0
    assert len(call.images) == len(instances) == sum(IMAGES[batch])
    lengths = [len(f) for f in image_features(model, inputs)]
    layers = len(model.model.language_model.layers)
    for image, it, slots in zip(call.images, instances, lengths, strict=True):
        assert image.fired
        assert image.slots == slots
        assert image.kept == slots if rule == "all" else 1 <= image.kept < slots
        assert len(image.tokens_per_layer) == layers
        assert image.tokens_per_layer[-1] == image.kept == len(it.entries)
        assert image.tokens_per_layer == sorted(image.tokens_per_layer, reverse=True)
        assert image.avg_tokens == sum(image.tokens_per_layer) / layers
        entries = it.entries.tolist()
        assert entries == sorted(set(entries))
        assert 0 <= entries[0]
        assert entries[-1] < slots
        assert [s.stage for s in image.stages] == [p.stage.value for p in bound.parts()]
        before = slots
        for stage in image.stages:
            part = parts[stage.stage, stage.layer]
            assert stage.reducer == reducer
            assert stage.before == before
            assert 1 <= stage.after <= before
            if stage.requested is not None:
                extra = newlines_kept(it.layout, it.entries, part)
                patches = int((it.layout.kind == Kind.PATCH).sum()) if part.newline_policy == "none" else before
                if rule == "exact":
                    assert stage.after == min(stage.requested, patches, before) + extra
                else:
                    assert stage.after <= stage.requested + extra
            else:
                assert part.decides_itself
            layer = stage.layer if part.stage is Stage.DECODER else 0
            later = [s.layer for s in image.stages if s.stage == Stage.DECODER.value and s.layer > layer]
            for i in range(layer, min([*later, layers])):
                if stage is image.stages[-1] or later:
                    assert image.tokens_per_layer[i] == stage.after
            before = stage.after
    plain = call.to_dict()
    assert plain["images"][0]["kept"] == call.images[0].kept


def newlines_kept(layout: Layout, entries: Tensor, part: Reducer) -> int:
    """Newline tokens that come on top of the budget."""
    if part.newline_policy not in ("all", "with_row"):
        return 0
    return int((layout.kind.to(entries.device)[entries] == Kind.NEWLINE).sum())


def facts_of(model: nn.Module) -> Any:
    from vtc.families import family_of

    return family_of(model).facts


# ----------------------------------------------------------------------------------------------------------- identities
@reducers
@families
@impls
@batches
def test_keeping_everything_changes_nothing(reducer: str, family: str, impl: str, batch: int) -> None:
    model = model_of(family, impl)
    logits, call, _ = run(model, inputs_of(family, impl, batch), reducer, CASES[reducer].whole)
    torch.testing.assert_close(logits, plain_logits(family, impl, batch), atol=1e-6, rtol=0)
    assert all(i.kept == i.slots for i in call.images)


@reducers
@families
@impls
@budgets
def test_batch_equals_singles(reducer: str, family: str, impl: str, budget: str) -> None:
    model, inputs = model_of(family, impl), inputs_of(family, impl, 2)
    options = getattr(CASES[reducer], budget)
    together, call, instances = run(model, inputs, reducer, options)
    image = 0
    for row, count in enumerate(IMAGES[2]):
        real = inputs["attention_mask"][row].bool()
        alone = {k: v[image : image + count] for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
        alone |= {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
        logits, single, own = run(model, alone, reducer, options)
        torch.testing.assert_close(logits[0], together[row, real], atol=TOLERANCE[impl], rtol=TOLERANCE[impl])
        for i in range(count):
            assert torch.equal(own[i].entries, instances[image + i].entries)
            assert single.images[i].tokens_per_layer == call.images[image + i].tokens_per_layer
        image += count
    assert image == len(instances)


@reducers
@families
@impls
@budgets
def test_two_runs_are_equal(reducer: str, family: str, impl: str, budget: str) -> None:
    model, inputs, options = model_of(family, impl), inputs_of(family, impl, 2), getattr(CASES[reducer], budget)
    first, second = (run(model, inputs, reducer, options)[0] for _ in range(2))
    assert torch.equal(first, second)


@reducers
@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@budgets
def test_half_precision_has_no_nan(reducer: str, family: str, dtype: torch.dtype, budget: str) -> None:
    model, inputs = shared(family, "sdpa", dtype), dict(inputs_of(family, "sdpa", 2))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    logits, call, _ = run(model, inputs, reducer, getattr(CASES[reducer], budget))
    assert logits.dtype == dtype
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
    assert call.fired


@pytest.mark.parametrize("reducer", [n for n in REDUCERS if vtc.info(n).cls.default_newlines == "none"])
@pytest.mark.parametrize("short", [1, 8, 9])
def test_newlines_are_not_kept_to_fill_the_budget(reducer: str, short: int) -> None:
    """80 patches and 8 newlines: a budget of 87, 80 or 79 keeps patches only where newlines are dropped."""
    model = model_of("llava_next", "sdpa")
    inputs = make_inputs("llava_next", model, 1, sizes=[[56, 56]])
    with vtc.patch(model, reducer, keep=88 - short) as handle, torch.no_grad():
        model(**inputs)
    (image,) = handle.stats.last.images
    assert image.slots == 88
    for stage in image.stages:
        part = next(p for p in handle.reducer.parts() if (p.stage.value, p.layer) == (stage.stage, stage.layer))
        if part.newline_policy == "none" and part.stage is not Stage.ENCODER and not part.decides_itself:
            assert stage.after <= min(80, stage.requested)


# ------------------------------------------------------------------------------------------------------------- generate
@reducers
@families
@impls
@batches
def test_generate_keeps_the_prompt(reducer: str, family: str, impl: str, batch: int) -> None:
    model, inputs = model_of(family, impl), inputs_of(family, impl, batch)
    with vtc.patch(model, reducer, **CASES[reducer].harsh) as handle, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    prompt = inputs["input_ids"]
    assert out.shape == (batch, prompt.shape[1] + 3)
    assert torch.equal(out[:, : prompt.shape[1]], prompt)
    assert len(handle.stats) == 1, "decode steps are not calls"
    assert handle.stats.last.fired


# -------------------------------------------------------------------------------------------------------------- unpatch
HOOKS = [k for k in vars(nn.Module()) if "hook" in k]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a patch could leave behind: hooks, attributes, configs and classes of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = vars(module)
        found[name] = (
            type(module),
            sorted(own),
            [(k, [(i, id(h)) for i, h in own[k].items()] if isinstance(own[k], dict) else own[k]) for k in HOOKS],
            {k: id(v) for k, v in own.items() if k not in ("_parameters", "_buffers", "_modules", *HOOKS)},
        )
        for cls in type(module).__mro__:
            if cls.__module__.startswith(("transformers", "torch")):
                found[f"class {cls.__module__}.{cls.__qualname__}"] = {k: id(v) for k, v in vars(cls).items()}
    return found


@reducers
@families
@impls
def test_unpatch_leaves_nothing(reducer: str, family: str, impl: str) -> None:
    model, inputs = model_of(family, impl), inputs_of(family, impl, 2)
    expected, generated = plain_logits(family, impl, 2), first_token_logits(model, inputs)
    before = state_of(model)
    handle = vtc.patch(model, reducer, **CASES[reducer].harsh)
    patched = state_of(model)
    assert patched != before, "a patch that changes nothing cannot show that unpatching works"
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, expected)
    assert vtc.unpatch(model) is model
    assert not handle.active
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(first_token_logits(model, inputs), generated)


def first_token_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.logits[0]


# ----------------------------------------------------------------------------------------- selection on plain tensors
# what follows the batch and the tokens in the shape of a signal; a part that needs another one is run by the matrix above only
SHAPES: dict[str, tuple[int, ...]] = {
    "cls_attn": (),
    "cls_value_affinity": (),
    "keys": (6,),
    "last_attn": (),
    "last_logits": (2,),
    "last_value_logits": (2,),
    "mean_query_attn": (),
    "text_values": (6,),
    "values": (6,),
    **dict.fromkeys(("next_last_attn", "next_question_attn", "rater_attention", "importance", "overlap"), ()),
    "cls_logits": (),
    "peak_text_attn": (),
    **{f"{place}_transition_{n}": () for place in ("attention", "mlp") for n in range(4)},
}


def taps_of(part: Reducer, batch: int, n: int, generator: torch.Generator, values: str) -> dict[str, Tensor]:
    return {need.name: draw((batch, n, *SHAPES[need.name]), generator, values).abs() for need in part.needs}


def draw(shape: tuple[int, ...], generator: torch.Generator, values: str) -> Tensor:
    """Numbers from a normal distribution, or (``ties``) from a handful of whole ones, so that many are equal."""
    if values == "ties":
        return torch.randint(0, 3, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def selecting() -> list[tuple[str, Reducer]]:
    """Every single-stage part that picks tokens by ``select`` and merges nothing."""
    found = []
    for name in sorted({*REDUCERS} & {*CASES}):  # that both list the same is test_registry's business
        reducer = vtc.create(name, **CASES[name].mild)
        parts = reducer.bind(facts_of(shared("llava"))).parts()
        found += [
            (f"{name}-{p.stage.value}", p)
            for p in parts
            if p.stage in (Stage.BOUNDARY, Stage.DECODER, Stage.VISION)
            and p.kind != "merge"
            and not p.decides_itself
            and {need.name for need in p.needs} <= {*SHAPES}
        ]
    return found


SELECTING = selecting()


@pytest.mark.parametrize("part", [p for _, p in SELECTING], ids=[n for n, _ in SELECTING])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    batch=st.integers(1, 3),
    views=st.sampled_from([1, 1, 3]),
    share=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    values=st.sampled_from(["spread", "ties"]),
    seed=st.integers(0, 2**16),
)
def test_selection_is_exact(
    part: Reducer, rows: int, cols: int, batch: int, views: int, share: float, dtype: torch.dtype, values: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = rows * cols * views
    k = max(1, math.ceil(share * n))
    layout = several(rows, cols, views)
    features = (draw((batch, n, 5), generator, values) + (values == "ties")).to(dtype)
    tapped = {name: t.to(dtype) if t.dim() == 3 else t for name, t in taps_of(part, batch, n, generator, values).items()}
    marks = tuple(torch.randint(0, 2**31, (batch,), generator=generator).tolist())

    def ask(rows_of: slice) -> Any:
        return part.select(
            Signals(
                features=features[rows_of],
                layout=layout,
                entries=torch.arange(n).expand(batch, n)[rows_of],
                budget=k,
                slots=n,
                taps={name: t[rows_of] for name, t in tapped.items()},
                fingerprint=marks[rows_of] if part.wants_fingerprint else (),
            )
        )

    together = ask(slice(None))
    index = together.index
    assert together.valid is None
    assert index.shape == (batch, k), "exactly the budget"
    assert (index[:, 1:] > index[:, :-1]).all(), "ascending and unique"
    assert 0 <= int(index.min())
    assert int(index.max()) < n
    assert torch.equal(index, ask(slice(None)).index), "deterministic"
    for b in range(batch):
        assert torch.equal(index[b], ask(slice(b, b + 1)).index[0]), "batch-independent"


def several(rows: int, cols: int, views: int) -> Layout:
    """A layout of equal views: a thumbnail and crops side by side, or one plain image."""
    if views == 1:
        return Layout.grid(rows, cols)
    n = torch.arange(rows * cols * views)
    view, r, c = n // (rows * cols), n % (rows * cols) // cols, n % cols
    zero = torch.zeros_like(n)
    return Layout(zero, view, r, c, r, c + (view - 1).clamp(min=0) * cols, n, ((rows, cols),) * views, True)


def test_the_matrix_is_not_empty() -> None:
    assert len(REDUCERS) >= 10
    assert len(SELECTING) >= 5
    assert (inputs_of("llava", "sdpa", 2)["attention_mask"] == 0).any(), "batch 2 must be padded"
    assert (inputs_of("llava_next", "sdpa", 2)["input_ids"] == IMAGE_TOKEN).sum() > 100
