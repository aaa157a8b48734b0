"""ToDRE: the worked example, the pivot, the exit on hand-made attention and inside models, rows without visual tokens."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from models import DECODER_LAYERS, build, image_features, image_spans, make_inputs, shared, visual_of
from plain import signals
from reference import Plan, hidden_reference, set_attention, slot_sources, text_of
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.core import Facts, Layout, Signals
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.families import family_of
from vtc.reducers.todre import ToDREDiversity, ToDREExit, cls_pivot, random_pivot
from vtc.signals import AttentionTap, modality_mass

STEPS = 4
EXAMPLE = torch.tensor([[1, 0], [0.9, 0.3], [0.2, 1], [-0.6, 0.8], [-1, -0.1], [0.1, -1], [0.7, -0.7]])


def signals_of(features: Tensor, budget: int, layout: Layout | None = None, **taps: Tensor) -> Signals:
    return signals(features, budget, layout, marks=tuple(range(100, 100 + len(features))), **taps)


# ------------------------------------------------------------------------------------------------------------- diversity
@pytest.mark.parametrize(
    ("pivot", "diversity", "order"),
    [
        (0, "max_sum", [0, 4, 2, 5, 3]),
        (0, "kcenter", [0, 4, 5, 2, 3]),
        (2, "max_sum", [2, 5, 4, 1, 3]),
        (2, "kcenter", [2, 5, 4, 0, 3]),
    ],
)
def test_worked_example(pivot, diversity, order):
    attention = torch.full((1, 7), 0.1)
    attention[0, pivot] = 0.3
    part = ToDREDiversity(keep=5, diversity=diversity)
    signals = signals_of(EXAMPLE[None], 5, cls_attn=attention)
    assert part.order(signals)[0].tolist() == order
    assert part.select(signals).index[0].tolist() == sorted(order)


def test_lengths_do_not_matter():
    attention = torch.tensor([[0.3, *[0.1] * 6]])
    stretched = EXAMPLE * torch.tensor([1, 5, 0.1, 2, 30, 0.5, 1])[:, None]
    assert ToDREDiversity(keep=5).order(signals_of(stretched[None], 5, cls_attn=attention))[0].tolist() == [0, 4, 2, 5, 3]


def test_images_of_a_batch_have_their_own_pivots():
    attention = torch.full((2, 7), 0.1)
    attention[0, 0] = attention[1, 2] = 0.3
    part = ToDREDiversity(keep=5)
    order = part.order(signals_of(EXAMPLE.expand(2, 7, 2), 5, cls_attn=attention))
    assert order.tolist() == [[0, 4, 2, 5, 3], [2, 5, 4, 1, 3]]


def test_pivot_lies_in_the_thumbnail():
    """Patches 0..3 are the thumbnail, 4..7 a crop, 8 a newline."""
    layout = Layout(
        kind=torch.tensor([0] * 8 + [1]),
        view=torch.tensor([0] * 4 + [1] * 4 + [-1]),
        row=torch.tensor([0, 0, 1, 1] * 2 + [-1]),
        col=torch.tensor([0, 1, 0, 1] * 2 + [-1]),
        y=torch.tensor([0, 0, 1, 1] * 2 + [1]),
        x=torch.tensor([0, 1, 0, 1] * 2 + [2]),
        slot=torch.arange(9),
        grids=((2, 2), (2, 2)),
        thumbnail=True,
    )
    attention = torch.tensor([[0.1, 0.1, 0.2, 0.1, 0.1, 0.9, 0.1, 0.1, 2.0]])
    features = torch.randn(1, 9, 3)
    assert cls_pivot(signals_of(features, 2, layout, cls_attn=attention)).tolist() == [2]
    assert cls_pivot(signals_of(features, 2, replace(layout, thumbnail=False), cls_attn=attention)).tolist() == [5]
    tie = torch.tensor([[0.1, 0.2, 0.2, 0.1, 0.1, 0.9, 0.1, 0.1, 2.0]])
    assert cls_pivot(signals_of(features, 2, layout, cls_attn=tie)).tolist() == [1]
    crop_only = Signals(  # an earlier stage dropped the whole thumbnail
        features=features[:, 4:],
        layout=layout,
        entries=torch.arange(4, 9)[None],
        budget=2,
        slots=9,
        taps={"cls_attn": attention[:, 4:]},
    )
    assert cls_pivot(crop_only).tolist() == [1]
    some = torch.tensor([[0, 1, 4, 5, 8], [4, 5, 6, 7, 8]])  # of one image, not of its neighbour
    mixed = replace(crop_only, features=features[0, some], entries=some, taps={"cls_attn": attention[0, some]})
    assert cls_pivot(mixed).tolist() == [0, 1]


def test_random_pivot_depends_on_seed_and_image():
    signals = signals_of(torch.randn(2, 50, 3), 4)
    both = random_pivot(signals, 0)
    second = replace(signals, features=signals.features[1:], entries=signals.entries[1:], fingerprint=(101,))
    assert random_pivot(second, 0)[0] == both[1]
    assert len({int(random_pivot(signals, seed)[0]) for seed in range(20)}) > 5
    assert len(set(random_pivot(signals_of(torch.randn(20, 50, 3), 4), 0).tolist())) > 5


def test_share_is_rounded_down():
    facts = family_of(shared("llava")).facts
    part = ToDREDiversity(keep=0.25)
    assert [part.count(n, facts) for n in (2880, 2883, 7, 3)] == [720, 720, 1, 1]
    assert ToDREDiversity(keep=0.1).count(2880, facts) == 288


# -------------------------------------------------------------------------------------------------- first stage in a model
def greedy(features: Tensor, pivot: int, k: int, diversity: str) -> list[int]:
    """Python loop after the specification."""
    unit = (features / features.norm(dim=1, keepdim=True)).tolist()

    def cos(u: int, v: int) -> float:
        return sum(a * b for a, b in zip(unit[u], unit[v], strict=True))

    taken = [pivot]
    while len(taken) < k:
        rest = [v for v in range(len(unit)) if v not in taken]
        if diversity == "max_sum":
            taken.append(min(rest, key=lambda v: sum(cos(v, c) for c in taken)))
        else:
            taken.append(max(rest, key=lambda v: min(1 - cos(v, c) for c in taken)))
    return sorted(taken)


def last_layer_cls_attention(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """``(views, patches)`` from the unpatched tower's own attention maps."""
    pixels = inputs["pixel_values"]
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    set_attention(tower, "eager")
    try:
        with torch.no_grad():
            maps = tower(pixels if pixels.dim() == 4 else pixels.flatten(0, 1), output_attentions=True).attentions
    finally:
        set_attention(tower, before)
    return maps[-1].mean(1)[:, 0, 1:]


@pytest.mark.parametrize("diversity", ["max_sum", "kcenter"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_first_stage_in_a_model(family, diversity):
    model = shared(family)
    inputs = make_inputs(family, model)
    features = image_features(model, inputs)[0]
    attention = last_layer_cls_attention(model, inputs)
    (_, source), columns = slot_sources(model, inputs)[0], image_spans(inputs, model)[0][1]
    patches = (source >= 0).nonzero()[:, 0]
    # the thumbnail is view 0 in both families: its patches come first
    pivot = int(attention[0].argmax())
    assert source[pivot] == pivot
    k = math.floor(0.3 * len(source))
    kept = patches[torch.tensor(greedy(features[patches], pivot, k, diversity))]
    gone = visual_of(inputs).clone()
    gone[0, columns[kept]] = False
    layers = range(DECODER_LAYERS)
    plan = Plan(hide=dict.fromkeys(layers, gone), compact=dict.fromkeys(layers, gone))
    tokens, logits, _ = hidden_reference(model, inputs, plan, STEPS)
    with vtc.patch(model, "todre", keep=0.3, diversity=diversity, exit=False) as handle:
        got_tokens, got, _ = generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and (got - logits).abs().max() < 1e-5
    image = handle.stats[0].images[0]
    assert image.kept == k == image.stages[0].requested and len(image.stages) == 1 and image.stages[0].note == ""


def generate(model: nn.Module, inputs: dict[str, Tensor], **options):
    with torch.no_grad():
        out = model.generate(
            **inputs,
            **{"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | options,
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), out


def test_tower_without_class_token_starts_at_random_and_says_so():
    model = shared("llava_siglip")
    inputs = make_inputs("llava_siglip", model, 2)
    with vtc.patch(model, "todre", keep=5) as handle, torch.no_grad():
        one = model(**inputs).logits
        two = model(**inputs).logits
    assert torch.equal(one, two)
    assert all("random" in i.stages[0].note and i.stages[0].after == 5 for i in handle.stats.images)
    kept = set()
    for seed in range(6):
        with vtc.patch(model, "todre", keep=1, seed=seed, exit=False), torch.no_grad():
            kept.add(round(model(**inputs).logits[0, -1, 5].item(), 6))
    assert len(kept) > 2
    with vtc.patch(shared("llava"), "todre", keep=5, pivot="random") as handle, torch.no_grad():
        shared("llava")(**make_inputs("llava", shared("llava")))
    assert handle.stats.images[0].stages[0].note == ""  # asked for, no substitute


# ----------------------------------------------------------------------------------------------- exit: hand-made attention
def tap_of(attention: Tensor, visual: list[int], valid: list[int] | None = None) -> AttentionTap:
    """A tap whose softmax rows are exactly ``attention (H, Q, Q)`` (causal): queries are unit vectors, keys logarithms."""
    heads, q, _ = attention.shape
    key = torch.log(attention.clamp(min=1e-30)).transpose(1, 2)  # key j holds log A[i, j] at dimension i
    query = torch.eye(q).expand(1, heads, q, q)
    mark = torch.zeros(1, q, dtype=torch.bool)
    mark[0, visual] = True
    real = torch.ones(1, q, dtype=torch.bool) if valid is None else torch.tensor([valid]).bool()
    return AttentionTap(query, key[None], key[None], 1.0, causal=True, visual=mark, valid=real)


def test_masses_by_hand():
    # columns: system 0, visual 1 and 2, text 3, visual 4, text 5
    rows = [
        [1, 0, 0, 0, 0, 0],
        [0.5, 0.5, 0, 0, 0, 0],
        [0.2, 0.4, 0.4, 0, 0, 0],
        [0.6, 0.1, 0.1, 0.2, 0, 0],
        [0.3, 0.1, 0.1, 0.4, 0.1, 0],
        [0.2, 0.1, 0.0, 0.3, 0.2, 0.2],
    ]
    a = torch.tensor(rows)
    mass = modality_mass(0).measure(tap_of(a[None], [1, 2, 4]))[0]
    # text rows 3, 5 on visual columns: 0.2 + 0.3 of 2; visual rows 1, 2, 4 on text columns: 0.4 of 3
    assert mass.tolist() == pytest.approx([0.25, 0.4 / 3], abs=1e-6)
    # two heads: their mean
    b = a.clone()
    b[5] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    mass = modality_mass(0).measure(tap_of(torch.stack([a, b]), [1, 2, 4]))[0]
    assert mass.tolist() == pytest.approx([(0.25 + 0.1) / 2, 0.4 / 3], abs=1e-6)


def test_usual_order_has_no_visual_to_text_mass():
    a = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.9, 0.05, 0.05, 0], [0.8, 0.1, 0.1, 0]])
    mass = modality_mass(0).measure(tap_of(a[None], [1, 2]))[0]
    assert mass.tolist() == pytest.approx([0.2, 0.0], abs=1e-6)


def test_prompt_without_text_after_the_image_stays():
    a = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.9, 0.05, 0.05]])
    assert modality_mass(0).measure(tap_of(a[None], [1, 2]))[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("mass", "leaves"),
    [([0.05, 0.0], True), ([0.05, 0.2], False), ([0.2, 0.05], False), ([0.1, 0.0], False), ([0.0999, 0.0999], True)],
)
def test_both_shares_must_be_below_tau(mass, leaves):
    part = ToDREExit(keep=3, exit_layer=3, tau=0.1)
    chosen = part.select(signals_of(torch.randn(1, 5, 4), 5, modality_mass=torch.tensor([mass], dtype=torch.float64)))
    assert bool((~chosen.valid).all()) is leaves and bool(chosen.valid.all()) is not leaves


# ------------------------------------------------------------------------------------------------------- exit: in a model
@functools.cache
def deep(family: str, impl: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Eight decoder layers: the default exit layer would be the last one, so the tests see the clamp and explicit layers."""
    return build(family, impl, dtype, text=dict(num_hidden_layers=8))


_MAPS: dict[int, Tensor] = {}


def _attend(module, query, key, value, attention_mask, scaling=None, **_kwargs):
    """Dense attention that remembers its map (the eager form keeps it too, but has NaN for padding in float64)."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    _MAPS[id(module)] = weights = torch.softmax(weights if attention_mask is None else weights + attention_mask, -1)
    return (weights @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("maps", _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("maps", eager_mask)


def masses(model: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """``(B, 2)`` from the attention maps of an unpatched copy: nothing is dropped before ``layer`` (``keep=1.0``)."""
    twin = copy.deepcopy(model)
    set_attention(twin, "maps")
    with torch.no_grad():
        twin(**inputs)
    out = []
    for row, a in enumerate(_MAPS[id(text_of(twin).layers[layer].self_attn)].mean(1)):
        real = inputs["attention_mask"][row].bool().nonzero()[:, 0].tolist()
        visual = [j for j in real if visual_of(inputs)[row, j]]
        text = [j for j in real if j > visual[0] and j not in visual]
        tv = sum(a[i, j].item() for i in text for j in visual) / sum(a[i, j].item() for i in text for j in real)
        vt = sum(a[i, j].item() for i in visual for j in text) / sum(a[i, j].item() for i in visual for j in real)
        out.append([tv, vt])
    return torch.tensor(out)


@pytest.mark.parametrize("impl", ["sdpa", "eager64", "fake_flash"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
def test_exit_equals_reference(family, impl):
    """One row exits, the other does not: tau lies between their masses."""
    plain, model, layer = deep(family), deep(family, impl), 4
    inputs = make_inputs(family, plain, 2)
    mass = masses(plain, inputs, layer)
    assert mass[1, 1] > 0.01  # text between the images of row 1
    worst = mass.max(1).values
    tau = worst.mean().item()
    leaves = worst < tau
    assert leaves.sum() == 1 and (worst - tau).abs().min() > 1e-3
    gone = visual_of(inputs) & leaves[:, None]
    plan = Plan(hide=dict.fromkeys(range(layer + 1, 8), gone))
    tokens, logits, _ = hidden_reference(plain, inputs, plan, STEPS)
    with vtc.patch(model, "todre", keep=1.0, exit_layer=layer, tau=tau) as handle:
        got_tokens, got, out = generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and (got - logits).abs().max() < 1e-5
    with torch.no_grad():
        assert (plain(**inputs).logits[:, -1] - got[:, 0]).abs().max() > 1e-2
    real = inputs["attention_mask"].bool()
    for i, entry in enumerate(out.past_key_values.layers):
        held = (real & ~plan.hide[i]).sum(1).max() if i in plan.hide else real.shape[1]
        assert entry.keys.shape[-2] == int(held) + STEPS - 1
        assert out.past_key_values.get_seq_length(i) == real.shape[1] + STEPS - 1
    for image, (row, columns) in zip(handle.stats[0].images, image_spans(inputs, plain), strict=True):
        n = len(columns)
        assert image.tokens_per_layer == [n] * 5 + [0 if leaves[row] else n] * 3
        assert image.stages[1].requested is None and image.stages[1].layer == 5


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_forced_and_denied_exit_after_the_first_stage(family, batch, positions):
    """All visual tokens gone from layer 5 on, on top of a first stage; text keeps its positions."""
    model = deep(family)
    inputs = make_inputs(family, model, batch)
    kept = kept_slots(model, inputs, keep=6)
    spans = image_spans(inputs, model)
    one = visual_of(inputs).clone()
    for (row, columns), entries in zip(spans, kept, strict=True):
        one[row, columns[entries]] = False
    everything = visual_of(inputs)
    compact = dict.fromkeys(range(8), one) if positions == "compact" else {}
    for tau in (1.0, 0.0):
        late = everything if tau else one
        plan = Plan(hide={i: one if i < 5 else late for i in range(8)}, compact=compact)
        tokens, logits, _ = hidden_reference(model, inputs, plan, STEPS)
        with vtc.patch(model, "todre", keep=6, exit_layer=4, tau=tau, positions=positions) as handle:
            got_tokens, got, out = generate(model, inputs)
        assert torch.equal(got_tokens, tokens) and (got - logits).abs().max() < 1e-5
        for image in handle.stats[0].images:
            assert image.tokens_per_layer == [6] * 5 + [0 if tau else 6] * 3
            assert image.fired and image.kept == (0 if tau else 6)
            assert [s.requested for s in image.stages] == [6, None]
        text = int((inputs["attention_mask"].bool() & ~everything).sum(1).max())
        if tau:
            assert {e.keys.shape[-2] for e in out.past_key_values.layers[5:]} == {text + STEPS - 1}


def kept_slots(model: nn.Module, inputs: dict[str, Tensor], **options) -> list[Tensor]:
    """Slots of every image that the first stage keeps."""
    caught = {}
    with vtc.patch(model, "todre", exit=False, **options), torch.no_grad():
        hook = text_of(model).register_forward_hook(lambda m, a, k, out: caught.update(ctx=k["_vtc"]), with_kwargs=True)
        model(**inputs)
        hook.remove()
    return [it.entries for it in caught["ctx"].instances]


def test_newlines_stay_with_the_others():
    """The exit must not take newline tokens away from rows that keep their patches."""
    model = deep("llava_next")
    inputs = make_inputs("llava_next", model)
    counts = {}
    for policy in ("all", "with_row", "none"):
        with vtc.patch(model, "todre", keep=8, newlines=policy, exit_layer=4, tau=0.0) as handle, torch.no_grad():
            model(**inputs)
        counts[policy] = handle.stats[0].images[0].tokens_per_layer
        assert len(set(counts[policy])) == 1
        with vtc.patch(model, "todre", keep=8, newlines=policy, exit_layer=4, tau=1.0) as handle, torch.no_grad():
            model(**inputs)
        assert handle.stats[0].images[0].tokens_per_layer[5:] == [0, 0, 0]
    assert counts["all"][0] > counts["none"][0] == 8


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.7}], ids=["beams", "sampling"])
def test_generate_after_an_exit(options):
    model = deep("llava")
    inputs = make_inputs("llava", model, 2)
    worst = masses(model, inputs, 4).max(1).values
    for tau in (1.0, worst.mean().item()):
        with vtc.patch(model, "todre", keep=1.0, exit_layer=4, tau=tau):
            torch.manual_seed(0)
            with torch.no_grad():
                cached = model.generate(**inputs, max_new_tokens=5, **options)
            torch.manual_seed(0)
            with torch.no_grad():
                again = model.generate(**inputs, max_new_tokens=5, **options)
        assert torch.equal(cached, again) and cached.shape[1] == inputs["input_ids"].shape[1] + 5
        assert torch.equal(cached[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_second_turn_after_an_exit():
    """A follow-up question on the returned cache equals one prompt with hidden columns."""
    model = deep("llava")
    inputs = make_inputs("llava", model)
    gone = visual_of(inputs)
    plan = Plan(hide=dict.fromkeys(range(5, 8), gone))
    more = torch.tensor([[11, 12, 13]])
    with vtc.patch(model, "todre", keep=1.0, exit_layer=4, tau=1.0), torch.no_grad():
        first = model(**inputs, use_cache=True)
        second = model(input_ids=more, past_key_values=first.past_key_values).logits
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    _, _, prompt = hidden_reference(model, longer, plan, 1)
    assert (second - prompt[:, -3:]).abs().max() < 1e-5


def test_rows_do_not_depend_on_the_batch():
    model = deep("llava")
    inputs = make_inputs("llava", model, images=[1, 1])
    tau = masses(model, inputs, 4).max(1).values.mean().item()
    with vtc.patch(model, "todre", keep=1.0, exit_layer=4, tau=tau) as handle:
        _, both, _ = generate(model, inputs)
        together = [i.kept for i in handle.stats[0].images]
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            one = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
            _, alone, _ = generate(model, one | {"pixel_values": inputs["pixel_values"][row : row + 1]})
            assert (alone[0] - both[row]).abs().max() < 1e-5
        assert [i.kept for c in list(handle.stats)[1:] for i in c.images] == together
    assert sorted(together) == [0, 16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = deep("llava", "sdpa", dtype)
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, "todre", keep=5, exit_layer=4, tau=1.0), torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


# ------------------------------------------------------------------------------------------------------ layers and errors
def bound_layer(layers: int, **options) -> int:
    facts: Facts = replace(family_of(shared("llava")).facts, layers=layers)
    return vtc.create("todre", keep=4, **options).bind(facts).parts()[1].layer


def test_exit_layer():
    assert bound_layer(32) == 29  # layer 28 decides, counted from 0
    assert bound_layer(28) == 25  # 24.5 is rounded down
    assert bound_layer(5) == 4  # at least one layer is left without visual tokens
    assert bound_layer(32, exit_layer=16) == 17 and bound_layer(32, exit_layer=0.5) == 17
    assert bound_layer(2) == 1
    for layer in (31, -1):
        with pytest.raises(UnknownArgumentError, match="0..30"):
            bound_layer(32, exit_layer=layer)
    with pytest.raises(UnknownArgumentError, match="exit=False"):
        bound_layer(1)
    assert len(vtc.create("todre", keep=4, exit=False).bind(family_of(shared("llava")).facts).parts()) == 1


def test_refusals():
    model = shared("llava")
    for options in (
        {"pivot": "middle"},
        {"diversity": "sum"},
        {"exit_layer": 1.0},
        {"tau": 1.5},
        {"tau": math.nan},
        {"tua": 1},
    ):
        with pytest.raises(UnknownArgumentError):
            vtc.create("todre", keep=4, **options)
    with pytest.raises(BudgetError, match="above the 16"):
        vtc.patch(model, "todre", keep=17)
    with pytest.raises(BudgetError):
        vtc.patch(model, "todre")
    with pytest.raises(TypeError, match="bind"):
        vtc.create("todre", keep=4).parts()
    assert not hasattr(model, "_vtc_handle")


def test_average_budget_is_the_first_stage():
    model = shared("llava")
    with vtc.patch(model, "todre", avg_tokens=5, tau=0.0) as handle, torch.no_grad():
        model(**make_inputs("llava", model))
    assert handle.stats[0].images[0].avg_tokens == 5


def test_presets():
    entry = vtc.registry.info("todre")
    assert entry.stages == ("boundary", "decoder") and not any(n.startswith("_") for n in entry.options)
    assert vtc.create("todre.r25").keep == 0.25 and vtc.create("todre.r10").keep == 0.1
    assert vtc.create("todre.v1-r25").diversity == "kcenter"
