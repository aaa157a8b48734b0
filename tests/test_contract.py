"""What every registered reducer promises, on every family, attention implementation, batch and budget.

The matrix is the registry times ``cases.CASES``; nobody adds a test by hand for a new method.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import IMAGE_TOKEN, build, image_features, make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.core import Kind, Layout, Reducer, Selection, Signals, Stage

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
    """Newline tokens that come on top of the budget; a later stage may drop them again."""
    if part.newline_policy not in ("all", "with_row"):
        return 0
    if part.newline_policy == "all":
        return int((layout.kind == Kind.NEWLINE).sum())
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
# what follows the batch and the tokens in the shape of a signal; a new signal needs a line here
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("cls_attn", "cls_logits", "cls_value_affinity", "mean_query_attn", "received_attn", "wide_cls_attn"), ()),
    **dict.fromkeys(
        (
            "deep_attn",
            "object_attn",
            "low_attn",
            "high_attn",
            "sensitivity",
            "key_norm",
            "overlap",
            "importance",
            "cos_mean",
            "sin_mean",
        ),
        (),
    ),
    **dict.fromkeys(
        ("last_attn", "next_last_attn", "next_question_attn", "peak_text_attn", "rater_attention", "tail_attn"), ()
    ),
    **{f"{place}_transition_{n}": () for place in ("attention", "mlp") for n in range(4)},
    **dict.fromkeys(("all_keys", "keys", "wide_keys", "values", "text_values", "final_states"), (6,)),
    **dict.fromkeys(("last_logits", "last_value_logits", "text_blocks"), (2,)),
    "image_values": (2, 3),
    "probe_keys": (2, 2, 3),
}
OFFERED = ("clip_cosine", "clip_dot")
"""Signals that callers may provide to methods that look at the text."""
ROWS = {"modality_mass": (2,), "text_pivots": (4, 6), "word_values": (4, 2, 3)}
"""Shape of a signal with one entry per sequence, after the batch."""


def taps_of(part: Reducer, batch: int, n: int, generator: torch.Generator, values: str) -> dict[str, Tensor]:
    made = {}
    for need in part.needs:
        if need.name == "places":
            made[need.name] = (5 + torch.arange(n)).expand(batch, n)
        elif need.name == "text_places":
            made[need.name] = torch.tensor([9 + n, 7 + n, -1, 8 + n]).expand(batch, 4)
        else:
            shape = (batch, *ROWS[need.name]) if need.axis == "row" else (batch, n, *SHAPES[need.name])
            made[need.name] = draw(shape, generator, values).abs()
    return made | {name: draw((batch, n), generator, values) for name in OFFERED if part.wants_text}


def draw(shape: tuple[int, ...], generator: torch.Generator, values: str) -> Tensor:
    """Numbers from a normal distribution; ``ties``: a handful of whole ones; ``same``: one number; ``zero``: none at all."""
    if values == "ties":
        return torch.randint(0, 3, shape, generator=generator).float()
    if values in ("same", "zero"):
        return torch.full(shape, 0.5 * (values == "same"))
    return torch.randn(shape, generator=generator)


def selecting() -> list[tuple[str, Reducer, str]]:
    """Every single-stage part that works by ``select``, with the rule of its count."""
    found = []
    for name in sorted({*REDUCERS} & {*CASES}):  # that both list the same is test_registry's business
        reducer = vtc.create(name, **CASES[name].mild)
        parts = [p for p in reducer.bind(facts_of(shared("llava"))).parts() if p.stage in SELECT_STAGES]
        rule = CASES[name].count
        found += [(f"{name}-{p.stage.value}-{p.layer}", p, "at_most" if p.decides_itself else rule) for p in parts]
    return found


SELECT_STAGES = (Stage.BOUNDARY, Stage.DECODER, Stage.VISION)
SELECTING = selecting()
parts = pytest.mark.parametrize(("part", "rule"), [(p, r) for _, p, r in SELECTING], ids=[n for n, _, _ in SELECTING])
drawn = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**16)


@dataclass(frozen=True)
class Question:
    """Images to select from, made of plain tensors."""

    part: Reducer
    features: Tensor
    layout: Layout
    budget: int
    taps: dict[str, Tensor]
    marks: tuple[int, ...]
    cls: Tensor

    def ask(self, rows: slice = slice(None), order: Tensor | None = None) -> Selection:
        """Select for some of the images, their tokens in another ``order``."""
        batch, n = self.features.shape[:2]
        order = torch.arange(n) if order is None else order
        tokens = {*OFFERED, *(need.name for need in self.part.needs if need.axis == "keys")}
        return self.part.select(
            Signals(
                features=self.features[rows][:, order],
                layout=self.layout,
                entries=torch.arange(n).expand(batch, n)[rows],
                budget=self.budget,
                slots=n,
                taps={name: t[rows][:, order] if name in tokens else t[rows] for name, t in self.taps.items()},
                fingerprint=self.marks[rows] if self.part.wants_fingerprint else (),
                cls=self.cls[rows] if self.part.wants_cls else None,
            )
        )


def question(part: Reducer, layout: Layout, batch: int, share: float, dtype: torch.dtype, values: str, seed: int) -> Question:
    generator = torch.Generator().manual_seed(seed)
    n = len(layout)
    features = draw((batch, n, 5), generator, values) + (values == "ties")
    taps = taps_of(part, batch, n, generator, values)
    return Question(
        part,
        features.to(dtype),
        layout,
        max(1, math.ceil(share * n)),
        {name: t.to(dtype) if t.dim() == 3 and t.is_floating_point() else t for name, t in taps.items()},
        tuple(torch.randint(0, 2**31, (batch,), generator=generator).tolist()),
        draw((batch, layout.views, 5), generator, values).to(dtype),
    )


@parts
@drawn
@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    batch=st.integers(1, 3),
    views=st.sampled_from([1, 1, 3]),
    share=st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    values=st.sampled_from(["spread", "spread", "ties", "same", "zero"]),
    seed=seeds,
)
def test_selection_is_exact(
    part: Reducer,
    rule: str,
    rows: int,
    cols: int,
    batch: int,
    views: int,
    share: float,
    dtype: torch.dtype,
    values: str,
    seed: int,
) -> None:
    """Any shape, dtype and budget (one token and all of them included), duplicates, identical tokens and empty attention."""
    layout = several(rows, cols, views)
    asked = question(part, layout, batch, share, dtype, values, seed)
    n, k = len(layout), asked.budget
    together, again = asked.ask(), asked.ask()
    assert same(together, again), "deterministic"
    for b in range(batch):
        alone, mine = asked.ask(slice(b, b + 1)), kept_of(together, b)
        assert torch.equal(kept_of(alone, 0), mine), "batch-independent"
        assert (mine[1:] > mine[:-1]).all(), "ascending and unique"
        assert ((mine >= 0) & (mine < n)).all()
        if together.features is not None:
            assert torch.equal(alone.features[0], together.features[b, : len(mine)]), "batch-independent values"
        if rule == "exact":
            assert len(mine) == k, "exactly the budget"
        elif "modality_mass" in asked.taps:
            assert len(mine) in (0, n), "all or nothing"
        else:
            assert 1 <= len(mine) <= k
        if together.owner is not None:
            owner = together.owner[b]
            assert owner.shape == (n,)
            assert -1 <= int(owner.min())
            assert int(owner.max()) < len(mine)
        if k == n and rule == "exact" and together.features is None:
            assert len(mine) == n, "keeping everything is the identity"
    if together.features is not None:
        assert together.features.shape == (*together.index.shape, 5)
        assert together.features.dtype == dtype
        assert torch.isfinite(together.features).all()


def kept_of(selection: Selection, image: int) -> Tensor:
    index = selection.index[image]
    return index if selection.valid is None else index[selection.valid[image]]


def same(a: Selection, b: Selection) -> bool:
    return all(
        (x is None and y is None) or torch.equal(x, y)
        for x, y in ((a.index, b.index), (a.features, b.features), (a.owner, b.owner), (a.valid, b.valid))
    )


# methods that look at a token's signals only, never at its place
PLACELESS = (
    "aim-decoder", "cdpruner", "corematching", "fastervlm", "fastv", "globalcom2", "ptp", "pyramiddrop", "script",
    "todre-boundary", "transprune", "vispruner", "zooprune",
)  # fmt: skip


@pytest.mark.parametrize("part", [p for n, p, _ in SELECTING if n.startswith(PLACELESS)],
                         ids=[n for n, _, _ in SELECTING if n.startswith(PLACELESS)])  # fmt: skip
@drawn
@given(n=st.integers(2, 40), share=st.floats(0.0, 1.0), seed=seeds)
def test_order_of_the_tokens_does_not_matter(part: Reducer, n: int, share: float, seed: int) -> None:
    asked = question(part, Layout.flat(n), 1, share, torch.float64, "spread", seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(order[kept_of(asked.ask(order=order), 0)].sort().values, kept_of(asked.ask(), 0))


CONSERVING = [
    ("hierpool", {}),
    ("hierpool", {"method": "kmeans"}),
    ("hierpool", {"method": "sequential"}),
    ("tokenpooling", {"method": "kmeans", "weighted": False}),
    ("script", {"merge": True}),
    ("tokencorr", {"merge": True, "adaptive": False}),
]


@pytest.mark.parametrize(("name", "options"), CONSERVING, ids=lambda v: str(v))
@drawn
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), views=st.sampled_from([1, 2]), share=st.floats(0.0, 1.0), seed=seeds)
def test_merging_conserves_mass(
    name: str, options: dict[str, Any], rows: int, cols: int, views: int, share: float, seed: int
) -> None:
    """Means weighted by the tokens they stand for add up to the sum of all tokens; nothing is left out while views keep any."""
    part = vtc.create(name, keep=1.0, **options).bind(facts_of(shared("llava")))
    asked = question(part, several(rows, cols, views), 2, max(share, 1 / (rows * cols)), torch.float64, "spread", seed)
    chosen = asked.ask()
    if chosen.features is None:  # everything is kept
        assert chosen.index.shape[1] == asked.features.shape[1]
        return
    for image in range(2):
        kept = kept_of(chosen, image)
        owned = chosen.owner[image] >= 0
        size = torch.bincount(chosen.owner[image][owned], minlength=len(kept)).double()
        assert (size > 0).all(), "every survivor stands for something"
        assert owned.all() or asked.budget < asked.layout.views
        total = (chosen.features[image, : len(kept)] * size[:, None]).sum(0)
        torch.testing.assert_close(total, asked.features[image][owned].sum(0))


@drawn
@given(rows=st.integers(1, 9), cols=st.integers(1, 9), share=st.floats(0.0, 1.0), seed=seeds)
def test_cells_of_equal_size_conserve_the_mean(rows: int, cols: int, share: float, seed: int) -> None:
    asked = question(vtc.create("gridpool", keep=1.0), Layout.grid(rows, cols), 1, share, torch.float64, "spread", seed)
    chosen = asked.ask()
    values = asked.features if chosen.features is None else chosen.features
    torch.testing.assert_close(values.mean(1), asked.features.mean(1))


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
    assert len(SELECTING) >= 25
    unasked = {n for n in REDUCERS if not any(m.startswith(f"{n}-") for m, _, _ in SELECTING)}
    assert all(vtc.info(n).stages[0] in ("image", "encoder") for n in unasked), unasked
    assert (inputs_of("llava", "sdpa", 2)["attention_mask"] == 0).any(), "batch 2 must be padded"
    assert (inputs_of("llava_next", "sdpa", 2)["input_ids"] == IMAGE_TOKEN).sum() > 100


# ------------------------------------------------------------------------------------------------------- layer averages
@functools.cache
def wide_model() -> tuple[nn.Module, dict[str, Tensor]]:
    """Twelve decoder layers and 400 visual tokens: one percent of an average is a whole number of tokens."""
    model = build("llava", dtype=torch.float32, text={"num_hidden_layers": 12}, vision={"image_size": 140})
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * 400, 7, 8, 9, 10, 11, 12]])
    pixels = torch.randn(1, 3, 140, 140, generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("reducer", [n for n in REDUCERS if "avg_tokens" in vtc.info(n).cls.budget_options])
@pytest.mark.parametrize("average", [220, 0.5])
def test_layer_average_is_met_within_one_percent(reducer: str, average: int | float) -> None:
    model, inputs = wide_model()
    options: dict[str, Any] = {}
    half_way = average == 0.5 and vtc.info(reducer).cls.layer == 0.5
    if half_way:
        with vtc.patch(model, reducer, avg_tokens=average), pytest.raises(vtc.BudgetError, match="or an earlier layer"):
            model(**inputs)  # half of the layers run on all tokens: the sentence says what to do
        options = {"layer": 2}
    with vtc.patch(model, reducer, avg_tokens=average, **options) as handle, torch.no_grad():
        model(**inputs)
    (image,) = handle.stats.last.images
    wanted = average * image.slots if isinstance(average, float) else average
    assert image.slots == 400
    if CASES[reducer].count == "exact" and not any(p.decides_itself for p in handle.reducer.parts()):
        assert image.avg_tokens == pytest.approx(wanted, rel=0.01)
    elif CASES[reducer].count != "all":  # fewer where the picture decides
        assert image.avg_tokens <= 1.01 * wanted


# -------------------------------------------------------------------------------------------------- official, two readings
@pytest.mark.parametrize("name", ["fastv", "divprune"])
def test_official_gives_every_image_the_first_ones_choice(name: str) -> None:
    for official in (False, True):
        part = vtc.create(name, keep=5, official=official)
        asked = question(part, Layout.flat(20), 3, 0.25, torch.float32, "spread", 1)
        together = asked.ask()
        rows = [kept_of(together, b).tolist() for b in range(3)]
        assert rows[0] == kept_of(asked.ask(slice(0, 1)), 0).tolist()
        assert (rows[0] == rows[1] == rows[2]) == official


def test_tokencorr_merges_the_rest_into_the_most_similar_by_key() -> None:
    # one view, four patches; kept are 1 (outlier of `high`) and 0 (most attention in `low`): 2 is like 0, 3 like 1
    part = vtc.create("tokencorr", keep=2, merge=True, adaptive=False, beta=0.5, factor=0.0)
    taps = {
        "all_keys": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]]]),
        "low_attn": torch.tensor([[0.4, 0.1, 0.3, 0.2]]),
        "high_attn": torch.tensor([[0.1, 0.9, 0.1, 0.1]]),
    }
    features = torch.tensor([[[1.0], [10.0], [3.0], [20.0]]])
    chosen = Question(part, features, Layout.grid(2, 2), 2, taps, (), torch.zeros(1, 1, 1)).ask()
    assert chosen.index.tolist() == [[0, 1]]
    assert chosen.owner.tolist() == [[0, 1, 0, 1]]
    assert chosen.features.flatten().tolist() == [2.0, 15.0]
