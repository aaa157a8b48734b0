"""FlowCut: the criterion by hand, the encoder and the cut in the language model against slow references, batches, errors."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from golden_limits import PROBES, SPREAD, jolted
from models import build, image_spans, make_inputs, visual_of
from reference import (
    Plan,
    hidden_reference,
    oracle_model,
    slot_sources,
    text_of,
    tower_layers,
    views_of,
)
from torch import Tensor, nn

import vtc
from vtc.core import EncoderReducer, EncoderState, Kind, Need
from vtc.errors import BudgetError, InvalidSignalError, UnknownArgumentError, UnsupportedFeatureError
from vtc.families import family_of
from vtc.reducers import flowcut
from vtc.signals import values

STEPS = 4


# ---------------------------------------------------------------------------------------------------------- the criterion
def test_score_by_hand():
    attention, affinity = torch.tensor([[0.3, 0.1, 0.1]]), torch.tensor([[0.1, 0.1, 0.2]])
    value = torch.tensor([[[1.0, -1.0], [3.0, 0.0], [-2.0, 2.0]]])
    # (0.6 + 0.25) * 2, (0.2 + 0.25) * 3, (0.2 + 0.5) * 4
    torch.testing.assert_close(flowcut.token_score(attention, affinity, value), torch.tensor([[1.7, 1.35, 2.8]]))
    # without a class token: nothing is normalised, and there is no second term
    torch.testing.assert_close(flowcut.token_score(attention, None, value), torch.tensor([[0.6, 0.3, 0.4]]))
    torch.testing.assert_close(flowcut.accumulate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])), torch.tensor([0.5, 1.5]))


def count_of(attention, target, remaining, **options) -> int:
    a = torch.tensor([attention])
    valid = torch.ones_like(a, dtype=torch.bool)
    group = torch.zeros(1, dtype=torch.long)
    return int(flowcut.drop_count(a, valid, torch.tensor([target]), remaining, group, **options))


def test_drop_count_by_hand():
    # all attention on one patch: relative entropy 0, so (N - target) / sqrt(remaining), rounded half to even
    one = [0.7, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert count_of(one, 1, 4) == 2  # 2.5
    assert count_of(one, 3, 4) == 2  # 1.5
    assert count_of(one, 2, 1) == 4
    # even attention: relative entropy 1, nothing leaves
    assert count_of([0.1] * 6, 1, 1) == 0
    # two of four patches share it: h = log 2 / log 4 = 1/2, (4 - 1) / 1 * (1 - 1/4) = 2.25
    assert count_of([0.4, 0.4, 0.0, 0.0], 1, 1) == 2


def test_zero_attention_is_no_error():
    """The release computes 0 * log 0 = NaN here and stops."""
    a = torch.tensor([[0.5, 0.25, 0.0, 0.0, 0.0]])
    h = (2 / 3 * math.log(1.5) + 1 / 3 * math.log(3)) / math.log(5)
    assert count_of(a[0].tolist(), 1, 1) == round(4 * (1 - h**2))


def test_entropy_without_class_token():
    a = [0.7, 0.2, 0.1]
    h = -sum(p * math.log(p + 1e-7) for p in a) / math.log(3)
    exact = 200 * (1 - h**2)  # many patches cannot be told from three here: check the formula through a larger surplus
    got = flowcut.drop_count(
        torch.tensor([a], dtype=torch.float64),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([3 - 200]),
        1,
        torch.zeros(1, dtype=torch.long),
        has_cls=False,
    )
    assert int(got) == round(exact)
    scaled = flowcut.drop_count(  # not normalised: another entropy
        torch.tensor([a], dtype=torch.float64) / 2,
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([3 - 200]),
        1,
        torch.zeros(1, dtype=torch.long),
        has_cls=False,
    )
    assert int(scaled) != int(got)


def test_groups_share_the_largest_number():
    a = torch.tensor([[0.9, 0.05, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25], [0.4, 0.4, 0.1, 0.1]])
    valid, target = torch.ones_like(a, dtype=torch.bool), torch.ones(3, dtype=torch.long)
    alone = [int(flowcut.drop_count(a[i : i + 1], valid[:1], target[:1], 1, torch.zeros(1).long())) for i in range(3)]
    assert alone[1] == 0 < alone[2] < alone[0]
    together = flowcut.drop_count(a, valid, target, 1, torch.tensor([0, 0, 1]))
    assert together.tolist() == [alone[0], alone[0], alone[2]]


@pytest.mark.parametrize("has_cls", [True, False])
def test_step_of_a_padded_view_equals_the_view_alone(has_cls):
    g = torch.Generator().manual_seed(3)
    part = flowcut.FlowCutEncoder(keep=3, last_layer=4, has_cls=has_cls)
    name = "cls_attn" if has_cls else "mean_query_attn"

    def taps(n, v):
        a = torch.softmax(2 * torch.randn(v, n, generator=g), 1)
        more = {"cls_value_affinity": torch.softmax(torch.randn(v, n, generator=g), 1)} if has_cls else {}
        return {name: a, "values": torch.randn(v, n, 5, generator=g), **more}

    batch = taps(12, 2)
    cum = torch.rand(2, 12, generator=g)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 9:] = False
    carry, alive = part.step(EncoderState(2, batch, valid, torch.tensor([0, 1]), {"cum": cum}, torch.tensor([3, 3])))
    for view, n in ((0, 12), (1, 9)):
        one = {k: t[view : view + 1, :n] for k, t in batch.items()}
        c, a = part.step(
            EncoderState(
                2, one, valid[view : view + 1, :n], torch.tensor([0]), {"cum": cum[view : view + 1, :n]}, torch.tensor([3])
            )
        )
        torch.testing.assert_close(carry["cum"][view, :n], c["cum"][0])
        assert torch.equal(alive[view, :n], a[0]) and not alive[view, n:].any()
        assert 3 < int(a.sum()) < n


def test_reached_target_changes_nothing():
    part = flowcut.FlowCutEncoder(keep=4, last_layer=5)
    a = torch.rand(1, 4)
    state = EncoderState(
        1,
        {"cls_attn": a, "cls_value_affinity": a, "values": torch.rand(1, 4, 2)},
        torch.ones(1, 4, dtype=torch.bool),
        torch.tensor([0]),
        {"cum": torch.arange(4.0)[None]},
        torch.tensor([4]),
    )
    carry, alive = part.step(state)
    assert alive is None and torch.equal(carry["cum"], state.carry["cum"])
    both = EncoderState(  # beside a view that still has a patch to lose
        1,
        {k: torch.cat([t, t]) for k, t in state.taps.items()},
        torch.ones(2, 4, dtype=torch.bool),
        torch.tensor([0, 1]),
        {"cum": state.carry["cum"].repeat(2, 1)},
        torch.tensor([4, 3]),
    )
    carry, alive = part.step(both)
    assert torch.equal(carry["cum"][0], both.carry["cum"][0]) and not torch.equal(carry["cum"][1], both.carry["cum"][1])
    assert alive[0].all()


def test_targets():
    assert flowcut.encoder_target(320) == 320
    assert flowcut.encoder_target(321, anyres=True) == 160
    assert flowcut.encoder_target(5, merge=4) == 40


# -------------------------------------------------------------------------------------------------- models and references
@functools.cache
def tiny(family: str, impl: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Eight tower layers and 49 patches per view: three cuts, the first two of them by entropy."""
    model = build(family, impl, dtype, vision=dict(num_hidden_layers=8, patch_size=4))
    with torch.no_grad():  # attention as uneven as a trained tower's, and different from image to image
        for layer in tower_layers(model):
            layer.self_attn.q_proj.weight.mul_(2.5)
    return model


def slow_encoder(
    model: nn.Module, pixels: Tensor, images: list[int], target: int, last: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Run the unpatched tower by hand at full length, hiding what was dropped; follows the specification line by line.

    Parameters
    ----------
    images : list of int
        Views with the same number share how many patches are dropped.

    Returns
    -------
    hide : dict
        Tower layer -> ``(views, tokens)`` bool, class token included.
    alive : Tensor
        ``(views, patches)`` bool.
    """
    layers = tower_layers(model)
    caught = []
    hook = layers[0].register_forward_pre_hook(
        lambda m, a, k: caught.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model.vision_tower(pixels)
    hook.remove()
    x = caught[0]
    head = int(family_of(model).facts.has_cls)
    views, n = x.shape[0], x.shape[1] - head
    alive, hide = torch.ones(views, n, dtype=torch.bool), {}
    cum = torch.full((views, n), math.nan, dtype=x.dtype)
    for i, layer in enumerate(layers):
        gone = torch.cat([torch.zeros(views, head, dtype=torch.bool), ~alive], 1)
        hide[i] = gone
        if i > last:
            continue
        at = layer.self_attn
        y = layer.layer_norm1(x)
        q, k, v = (p(y).view(views, head + n, at.num_heads, -1).transpose(1, 2) for p in (at.q_proj, at.k_proj, at.v_proj))
        d = q.shape[-1]
        logits = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(gone[:, None, None], -1e30)
        out = torch.softmax(logits, -1) @ v
        x = x + at.out_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
        remaining, wish = last - i, {}
        score, count = {}, {}
        for view in range(views):
            ids = alive[view].nonzero()[:, 0]
            count[view] = len(ids)
            if len(ids) <= target:
                continue
            size = v[view][:, head + ids].mean(0).abs().sum(-1)
            if head:
                a = torch.softmax(logits[view, :, 0], -1).mean(0)[1 + ids]
                with_cls = torch.cat([torch.tensor([0]), 1 + ids])
                s = torch.stack([torch.softmax(h[with_cls] @ h[0], 0) for h in v[view]]).mean(0)[1:]
                new = (a / a.sum() + s / s.sum()) * size
                p = (a / a.sum()).tolist()
                entropy = -sum(t * math.log(t) for t in p if t > 0) / math.log(len(p))
            else:
                rows = [
                    torch.softmax(kk[ids] @ qq[ids].mean(0) / math.sqrt(d), 0) for qq, kk in zip(q[view], k[view], strict=True)
                ]
                a = torch.stack(rows).mean(0)
                new = a * size
                entropy = -sum(t * math.log(t + 1e-7) for t in a.tolist()) / math.log(len(ids))
            cum[view, ids] = new if i == 0 else (cum[view, ids] + new) / 2
            score[view] = ids
            if remaining > 0:
                exact = (len(ids) - target) / math.sqrt(remaining) * (1 - entropy**2)
                wish[images[view]] = max(exact, wish.get(images[view], -math.inf))
        if remaining % 2:
            continue
        for view, ids in score.items():
            left = target if remaining == 0 else max(count[view] - round(wish[images[view]]), target)
            order = sorted(ids.tolist(), key=lambda j: (-cum[view, j].item(), j))  # noqa: B023
            alive[view] = False
            alive[view, order[:left]] = True
    return hide, alive


def slow_cut(model: nn.Module, inputs: dict[str, Tensor], plan: Plan, at: int, keep: int) -> None:
    """Work out the cut in the language model from a plain run with hidden columns, and add it to the plan."""
    caught: dict[str, Any] = {}
    mask = inputs["attention_mask"]
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    with oracle_model(model, plan) as twin, torch.no_grad():
        attention = text_of(twin).layers[at - 1].self_attn
        hook = attention.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
        twin(**inputs, position_ids=positions, use_cache=False)
        hook.remove()
        x, (cos, sin) = caught["hidden_states"], caught["position_embeddings"]
        d = attention.head_dim
        q, k, v = (p(x).unflatten(-1, (-1, d)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))

        def turn(t: Tensor) -> Tensor:
            return t * cos[:, None] + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin[:, None]

        groups = q.shape[1] // k.shape[1]
        q, k, v = turn(q), turn(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    gone = plan.hide[at - 1].clone()
    end = x.shape[1] - 1  # left padding: every row ends with its last token
    for row, columns in image_spans(inputs, model):
        here = columns[~gone[row, columns]]
        if len(here) <= keep:
            continue
        rel = torch.softmax((q[row, :, end, None] * k[row][:, here]).sum(-1) / math.sqrt(d), -1).mean(0)
        sem = torch.softmax((v[row, :, end, None] * v[row][:, here]).sum(-1) / math.sqrt(d), -1).mean(0)
        score = (rel / rel.sum() + sem / sem.sum()) * v[row][:, here].mean(0).abs().sum(-1)
        order = sorted(range(len(here)), key=lambda j: (-score[j].item(), j))  # noqa: B023
        gone[row, here[order[keep:]]] = True
    for i in range(at, len(text_of(model).layers)):
        plan.hide[i], plan.compact[i] = gone, gone


def slow_plan(model: nn.Module, inputs: dict[str, Tensor], keep: int, *, official: bool = False, positions: str = "compact"):
    """What FlowCut does to a prompt; also the patches alive per view after every layer."""
    count, pixels = views_of(model, inputs)
    facts = family_of(model).facts
    images = [0] * len(pixels) if official else [i for i, n in enumerate(count) for _ in range(n)]
    target = keep // 2 if facts.anyres else keep
    hide, alive = slow_encoder(model, pixels, images, target, facts.feature_layer - 1)
    gone = visual_of(inputs).clone()
    for (row, columns), (view, source) in zip(image_spans(inputs, model), slot_sources(model, inputs), strict=True):
        held = (source >= 0) & alive.flatten()[view * alive.shape[1] + source.clamp(min=0)]
        gone[row, columns[held]] = False
    layers = range(len(text_of(model).layers))
    compact = positions == "compact"
    plan = Plan(hide=dict.fromkeys(layers, gone), compact=dict.fromkeys(layers, gone) if compact else {}, tower=hide)
    if facts.anyres:
        slow_cut(model, inputs, plan, 2, keep)
    if not compact:
        plan.compact = {}
    return plan


def generate(model: nn.Module, inputs: dict[str, Tensor]):
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), out


KEEP = {"llava": 9, "llava_siglip": 9, "llava_next": 30}


@pytest.mark.parametrize(
    ("impl", "positions"), [("sdpa", "compact"), ("sdpa", "original"), ("eager64", "compact"), ("fake_flash", "compact")]
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
def test_equals_reference(family, batch, impl, positions):
    model = tiny(family, impl)
    plain = tiny(family)
    inputs = make_inputs(family, plain, batch)
    plan = slow_plan(plain, inputs, KEEP[family], positions=positions)
    tokens, logits, prompt = hidden_reference(plain, inputs, plan, STEPS)
    with vtc.patch(model, "flowcut", keep=KEEP[family], positions=positions) as handle:
        got_tokens, got, out = generate(model, inputs)
    assert torch.equal(got_tokens, tokens)
    assert (got - logits).abs().max() < 1e-5
    with torch.no_grad():
        assert (plain(**inputs).logits[:, -1] - got[:, 0]).abs().max() > 1e-2  # dropping did change something
    real = inputs["attention_mask"].bool()
    for i, layer in enumerate(out.past_key_values.layers):
        assert layer.keys.shape[-2] == int((real & ~plan.hide[i]).sum(1).max()) + STEPS - 1
    for image, (row, columns) in zip(handle.stats[0].images, image_spans(inputs, plain), strict=True):
        assert image.tokens_per_layer == [int((~plan.hide[i][row, columns]).sum()) for i in plan.hide]
        first = image.stages[0]
        assert (first.reducer, first.stage, first.before) == ("flowcut", "encoder", len(columns))
        if family == "llava_next":
            assert first.requested >= first.after == image.tokens_per_layer[0] > image.tokens_per_layer[2] == KEEP[family]
            assert image.stages[1].stage == "decoder" and image.stages[1].requested == KEEP[family] == image.kept
        else:
            assert first.requested == first.after == KEEP[family] == image.kept and len(image.stages) == 1
    if batch == 2:  # images went through the tower with different numbers of patches
        assert any(len(set(hide.sum(1).tolist())) > 1 for hide in plan.tower.values())


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_eager_float32(family):
    """In float32, logits are as far from the reference's as rounding weights and pixels moves the reference itself."""
    model, plain = tiny(family, "eager", torch.float32), tiny(family)
    inputs = make_inputs(family, plain, 2)
    plan = slow_plan(plain, inputs, KEEP[family])
    tokens, logits, _ = hidden_reference(plain, inputs, plan, STEPS)
    moved = logits.new_zeros(())
    for seed in range(PROBES):
        other = copy.deepcopy(plain)
        other.load_state_dict(jolted(plain.state_dict(), seed))
        pixels = jolted({"pixel_values": inputs["pixel_values"]}, PROBES + seed)
        moved = moved.maximum((hidden_reference(other, inputs | pixels, plan, STEPS)[1] - logits).abs().max())
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with vtc.patch(model, "flowcut", keep=KEEP[family]):
        got_tokens, got, _ = generate(model, inputs)
    assert torch.equal(got_tokens, tokens)
    assert (got.double() - logits).abs().max() < SPREAD * moved < 0.01 * logits.abs().max()


# ---------------------------------------------------------------------------------------------------------------- batches
def kept_slots(model: nn.Module, inputs: dict[str, Tensor], **options) -> list[list[int]]:
    """Slots of every image that leave the encoder."""
    with vtc.patch(model, "flowcut", **options) as handle, torch.no_grad():
        records = []
        take, handle.tower.on_record = handle.tower.on_record, lambda r: (records.append(r), take(r))
        model(**inputs)
    return [e.tolist() for e in records[0].entries]


def one_image(model: nn.Module, inputs: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    count, _ = views_of(model, inputs)
    row, columns = image_spans(inputs, model)[image]
    ids = inputs["input_ids"][row, columns]
    one = {"input_ids": torch.cat([torch.tensor([3]), ids, torch.tensor([4, 5])])[None]}
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    one["pixel_values"] = inputs["pixel_values"][image : image + 1]
    if "image_sizes" in inputs:
        one["image_sizes"] = inputs["image_sizes"][image : image + 1]
        one["pixel_values"] = one["pixel_values"][:, : count[image]]
    return one


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next"])
def test_an_image_does_not_depend_on_its_batch(family):
    model = tiny(family)
    inputs = make_inputs(family, model, images=[1, 2, 1], sizes=[[40, 56], [56, 30], [28, 56], [56, 50]])
    views, _ = views_of(model, inputs)
    assert family != "llava_next" or len(set(views)) > 1
    together = kept_slots(model, inputs, keep=KEEP[family])
    for image, kept in enumerate(together):
        assert kept == kept_slots(model, one_image(model, inputs, image), keep=KEEP[family])[0]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_official_couples_the_batch(family):
    """The release shares the number of dropped patches over the batch: an image's tokens depend on its neighbours."""
    model = tiny(family)
    coupled = False
    for seed in range(3):
        inputs = make_inputs(family, model, images=[1, 1, 1], seed=seed)
        together = kept_slots(model, inputs, keep=KEEP[family], official=True)
        plan = slow_plan(model, inputs, KEEP[family], official=True)
        for (row, columns), kept in zip(image_spans(inputs, model), together, strict=True):
            assert (~plan.hide[0][row, columns]).nonzero()[:, 0].tolist() == kept
        assert all(len(set(hide.sum(1).tolist())) == 1 for hide in plan.tower.values())
        alone = kept_slots(model, one_image(model, inputs, 0), keep=KEEP[family], official=True)[0]
        assert alone == kept_slots(model, one_image(model, inputs, 0), keep=KEEP[family])[0]  # the same at batch size one
        coupled |= together != kept_slots(model, inputs, keep=KEEP[family])
    assert coupled


@dataclass(frozen=True, kw_only=True)
class OnlyOdd(EncoderReducer):
    """Drops patches of every second image only: some views keep all they have while others shrink."""

    name: ClassVar[str] = "only_odd"
    odd: int = 1
    log: list[int] = field(default_factory=list, compare=False)

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        return (values(layer),)

    def step(self, state: EncoderState):
        if state.layer % 2:
            return {}, None
        self.log.append(state.valid.shape[1])
        less = torch.where(state.image % 2 == self.odd, 3, 0)
        rank = state.valid.long().cumsum(1) - 1
        return {}, state.valid & (rank < (state.valid.sum(1) - less)[:, None])


def test_views_that_keep_everything_beside_views_that_do_not():
    model = tiny("llava")
    inputs = make_inputs("llava", model, images=[1, 1])

    def logits(reducer, call):
        with vtc.patch(model, reducer) as handle, torch.no_grad():
            out = model(**call).logits[:, -1]
        return out, [i.kept for i in handle.stats[0].images]

    both, kept = logits(OnlyOdd(keep=0.5), inputs)
    first, k0 = logits(OnlyOdd(keep=0.5), one_row(inputs, 0))
    second, k1 = logits(OnlyOdd(keep=0.5, odd=0), one_row(inputs, 1))
    assert kept == k0 + k1 == [49, 40]
    assert (both - torch.cat([first, second])).abs().max() < 1e-5  # padding moves the float32 angles of RoPE


def one_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row : row + 1, real],
        "attention_mask": inputs["attention_mask"][row : row + 1, real],
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }


# -------------------------------------------------------------------------------------------------- budgets and identity
@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next"])
def test_keeping_everything_changes_nothing(family):
    model = tiny(family)
    inputs = make_inputs(family, model, 2)
    tokens, logits, _ = generate(model, inputs)
    with vtc.patch(model, "flowcut", keep=1.0) as handle:
        got_tokens, got, _ = generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and torch.equal(got, logits)
    assert all(i.kept == i.slots == i.avg_tokens for i in handle.stats.images)


def test_large_budget_on_anyres_cuts_in_the_language_model_only():
    model = tiny("llava_next")
    inputs = make_inputs("llava_next", model)
    with vtc.patch(model, "flowcut", keep=120) as handle, torch.no_grad():  # 60 per view of 49
        model(**inputs)
    image = handle.stats[0].images[0]
    assert image.tokens_per_layer[:2] == [image.slots] * 2 and set(image.tokens_per_layer[2:]) == {120}


def test_share_and_average():
    model = tiny("llava")
    inputs = make_inputs("llava", model)
    for options, kept in (({"keep": 0.25}, 12), ({"avg_tokens": 12}, 12), ({"avg_tokens": 0.5}, 24)):
        with vtc.patch(model, "flowcut", **options) as handle, torch.no_grad():
            model(**inputs)
        assert handle.stats[0].images[0].kept == kept == handle.stats[0].images[0].avg_tokens


def test_average_on_anyres_is_met_without_padding():
    model = tiny("llava_next")
    inputs = make_inputs("llava_next", model, sizes=[[56, 56]])  # five views, nothing padded
    for average in (20, 40, 150, 0.3):
        with vtc.patch(model, "flowcut", avg_tokens=average) as handle, torch.no_grad():
            model(**inputs)
        image = handle.stats[0].images[0]
        wanted = average if isinstance(average, int) else average * image.slots
        assert image.avg_tokens == pytest.approx(wanted, rel=0.06)


def test_share_on_anyres():
    model = tiny("llava_next")
    inputs = make_inputs("llava_next", model, sizes=[[56, 56]])
    with vtc.patch(model, "flowcut", keep=0.2) as handle, torch.no_grad():
        model(**inputs)
    image = handle.stats[0].images[0]
    assert image.kept == round(0.2 * image.slots)
    assert image.tokens_per_layer[0] == 5 * (round(0.2 * 5 * 49) // 2)


def test_few_tokens_are_left_alone_by_the_cut():
    """Padding can leave fewer tokens than the budget: the sample stays as it is."""
    model = tiny("llava_next")
    inputs = make_inputs("llava_next", model, sizes=[[6, 56]])  # a thin stripe: most of the crops are padding
    with vtc.patch(model, "flowcut", keep=60) as handle, torch.no_grad():
        model(**inputs)
    image = handle.stats[0].images[0]
    assert len(set(image.tokens_per_layer)) == 1 and image.kept <= 60
    assert "fewer tokens" in image.stages[1].note


def test_newline_policy():
    model = tiny("llava_next")
    inputs = make_inputs("llava_next", model, sizes=[[56, 56]])
    counts = {}
    for policy in ("none", "with_row", "all"):
        with vtc.patch(model, "flowcut", keep=30, newlines=policy) as handle, torch.no_grad():
            model(**inputs)
        counts[policy] = handle.stats[0].images[0].tokens_per_layer[0]
    rows = int((family_of(model).describe(inputs).slots[0].kind == Kind.NEWLINE).sum())
    assert counts["none"] == 75 and counts["all"] == 75 + rows and 75 < counts["with_row"] <= 75 + rows


# ----------------------------------------------------------------------------------------------------------------- errors
def test_refusals():
    model, wide = tiny("llava"), tiny("llava_next")
    with pytest.raises(BudgetError, match="above the 49"):
        vtc.patch(model, "flowcut", keep=50)
    with pytest.raises(BudgetError):
        vtc.patch(model, "flowcut.llava15-64")
    with pytest.raises(BudgetError):
        vtc.patch(model, "flowcut")
    with pytest.raises(UnknownArgumentError, match="AnyRes models and Qwen2-VL have"):
        vtc.patch(model, "flowcut", keep=9, layer=2)
    for layer in (0, 5):
        with pytest.raises(UnknownArgumentError, match="out of range"):
            vtc.patch(wide, "flowcut", keep=9, layer=layer)
    first = build("llava", vision_feature_layer=1)
    with pytest.raises(UnsupportedFeatureError, match="boundary"):
        vtc.patch(first, "flowcut", keep=4)
    with pytest.raises(TypeError, match="bind"):
        vtc.create("flowcut", keep=4).parts()
    assert not hasattr(model, "_vtc_handle") and not hasattr(wide, "_vtc_handle")


def test_layer_option():
    model = tiny("llava_next")
    inputs = make_inputs("llava_next", model)
    with vtc.patch(model, "flowcut", keep=20, layer=3) as handle, torch.no_grad():
        model(**inputs)
    counts = handle.stats[0].images[0].tokens_per_layer
    assert counts[2] > counts[3] == 20


def test_nan_pixels_are_an_error():
    model = tiny("llava")
    inputs = make_inputs("llava", model)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 0, 3, 3] = math.nan
    with vtc.patch(model, "flowcut", keep=9), pytest.raises(InvalidSignalError, match="tower layer 1"), torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny("llava", "sdpa", dtype)
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, "flowcut", keep=9), torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_registry_entry():
    entry = vtc.registry.info("flowcut")
    assert entry.stages == ("encoder", "decoder")
    assert not any(name.startswith("_") for name in entry.options)
    assert entry.presets["llava15-64"] == {"keep": 64} and entry.presets["llavanext-160"] == {"keep": 160}
    facts = family_of(tiny("llava_next")).facts
    bound = vtc.create("flowcut", keep=20).bind(facts)
    assert [p.name for p in bound.parts()] == ["flowcut", "flowcut"]
    assert [p.stage for p in replace(bound, keep=10).bind(facts).parts()] == list(bound.stages)


# ---------------------------------------------------------------------------------------------- geometry of AnyRes images
def test_crop_layout_agrees_with_the_model():
    """The release's padding arithmetic against the model's own packing; they may differ where a product is nearly whole."""
    model = tiny("llava_next")
    family = family_of(model)
    equal = total = 0
    for height in range(8, 80, 5):
        for width in range(9, 80, 7):
            call = {"image_sizes": torch.tensor([[height, width]]), "pixel_values": torch.zeros(1, 5, 3, 28, 28)}
            patches = family.describe(call).patches[0]
            crops = int(patches.y.max() + 1) // 7, int(patches.x.max() + 1) // 7
            mine = flowcut.crop_layout(crops, (width, height), 7)
            model_y, model_x, real = patches.y[49:], patches.x[49:], patches.slot[49:] >= 0
            assert torch.equal(mine.y, model_y) and torch.equal(mine.x, model_x)
            total += 1
            if torch.equal(mine.slot >= 0, real):
                equal += 1
                order = torch.argsort(patches.slot[49:][real])
                assert torch.equal(order, torch.argsort(mine.slot[real]))
    assert equal > 0.9 * total
