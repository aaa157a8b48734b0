"""PACT: weights, clusters and recovery by hand, the budget, and attention that counts members in prompts, answers and caches."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from models import make_inputs, shared, visual_of
from plain import check_batch_mates, check_inside_a_model, signals
from reference import text_of
from torch import Tensor, nn

import vtc
from vtc.core import Reducer, Selection, Signals, Stage
from vtc.engine import upstream
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.reducers import pact
from vtc.reducers.pact import PACT, Distances, _mean_query_weight, centres_of
from vtc.signals import AttentionTap


def on_circle(*degrees: float) -> Tensor:
    """Unit vectors ``(1, n, 2)``; two of them are ``1 - cos`` of the angle between them apart."""
    angle = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


def asked(keys: Tensor, weight: Tensor, budget: int | None = None, features: Tensor | None = None) -> Signals:
    n = keys.shape[1]
    tokens = torch.ones(len(keys), n, 4) if features is None else features
    return signals(tokens, budget or n, all_keys=keys, importance=weight)


# ----------------------------------------------------------------------------------------------------------- one image
def test_weight_is_attention_of_the_mean_query_times_length() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 7, 6, generator=generator), torch.randn(1, 2, 7, 6, generator=generator)
    visual = torch.tensor([[0, 0, 1, 1, 0, 0, 0]]).bool()
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]).bool()
    tap = AttentionTap(query, key, key, 0.5, None, True, torch.tensor([6]), visual, valid)
    # the span is 1, 2, 3: from the first real token to the last visual one
    mean, span = query[0, :, 1:4].mean(1), key[0, [0, 0, 1, 1], 1:4]
    want = torch.softmax(torch.einsum("hd,hnd->hn", mean, span) * 0.5, 1).mean(0)
    got = _mean_query_weight(tap)
    torch.testing.assert_close(got[0, 1:4], want)
    assert (got[0, [0, 4, 5, 6]] == 0).all()
    assert (_mean_query_weight(dataclasses.replace(tap, visual=torch.zeros_like(visual))) == 0).all(), "a row without image"
    s = asked(on_circle(0, 0, 0), got[:, 1:4], features=torch.tensor([[[1.0], [2.0], [-3.0]]]))
    torch.testing.assert_close(PACT(keep=3, layer=4).scores(s)[0], want * torch.tensor([1.0, 2.0, 3.0]))


def test_clusters_by_hand() -> None:
    # 0 and 2 are 0.106 from 1 and 0.4 from each other; 3 and 4 are 0.042 apart; the two groups are orthogonal. Densest is 1, which
    # covers 0 and 2; of 3 and 4, which are equally dense, the first becomes a centre
    keys = torch.tensor([[[1.0, 0.5, 0, 0], [1, 0, 0, 0], [1, -0.5, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0.3]]])
    s = asked(keys, torch.ones(1, 5), features=torch.arange(20.0).view(1, 5, 4))
    chosen = PACT(keep=1.0, layer=4, share=1.0).select(s)
    assert chosen.index.tolist() == [[1, 3]] and chosen.owner.tolist() == [[0, 0, 0, 1, 1]]
    assert chosen.weight.tolist() == [[3.0, 2.0]] and chosen.features[0, :, 0].tolist() == [4.0, 14.0]
    # 0.1 is less than the distance of 0 and 2 to 1: two centres more
    chosen = PACT(keep=1.0, layer=4, share=1.0, cutoff=0.1).select(s)
    assert chosen.index.tolist() == [[0, 1, 2, 3]] and chosen.weight.tolist() == [[1.0, 1.0, 1.0, 2.0]]
    own = PACT(keep=1.0, layer=4, share=1.0, mean=False, proportional=False).select(s)
    assert own.features is None and own.weight is None and own.index.tolist() == [[1, 3]]


def test_a_token_joins_its_nearest_centre_not_the_one_that_covered_it() -> None:
    distance = np.array([[0, 0.2, 0.5], [0.2, 0, 0.1], [0.5, 0.1, 0]], dtype=np.float32)
    assert centres_of(distance, np.array([0, 1, 2]), 0.2).tolist() == [0, 2]  # 1 is at the cutoff from 0: covered
    assert centres_of(distance, np.array([0, 1, 2]), 0.19).tolist() == [0, 1]
    assert centres_of(distance, np.array([0, 1, 2]), 0.19, most=1) is None
    # 1 is the densest and covers 0 (30 degrees); 2 (50 degrees from 1) is a centre as well, and nearer to 0 (20 degrees)
    keys = torch.cat([on_circle(30, 0, 50), torch.zeros(1, 3, 1)], 2)
    keys = torch.cat(
        [keys, torch.tensor([[[1.0, 0, 0.3], [1, 0, -0.3], [1, 0, 0.2], [1, 0, -0.2], [1, 0, 0.1], [1, -0.3, 0]]])], 1
    )
    chosen = PACT(keep=1.0, layer=4, share=1.0).select(asked(keys, torch.ones(1, 9)))
    assert chosen.index.tolist() == [[1, 2]] and chosen.owner.tolist() == [[1, 0, 1, 0, 0, 0, 0, 0, 0]]


def test_dropped_tokens_come_back_within_a_multiple_of_the_cutoff() -> None:
    # of six the three best survive: 0, 90, 180. Dropped ones at 40 (0.23), 235 (0.43) and 45 (0.29) degrees; 1.5 cutoffs are 0.315
    keys, weight = on_circle(0, 90, 180, 40, 235, 45), torch.tensor([[9.0, 8, 7, 1, 2, 3]])
    part = PACT(keep=1.0, layer=4, share=0.5)
    chosen = part.select(asked(keys, weight))
    assert chosen.index.tolist() == [[0, 1, 2]] and chosen.owner.tolist()[0][:5] == [0, 1, 2, 0, -1]
    assert dataclasses.replace(part, recover=False).select(asked(keys, weight)).owner.tolist() == [[0, 1, 2, -1, -1, -1]]
    assert dataclasses.replace(part, coefficient=3.0).select(asked(keys, weight)).owner[0, 4] == 2
    # one always survives
    assert dataclasses.replace(part, share=0.0).select(asked(keys, weight)).index.tolist() == [[0]]


@pytest.mark.parametrize("budget", [1, 2, 5, 11, 40])
def test_the_cutoff_gives_way_to_the_budget(budget: int) -> None:
    keys = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(1))
    part = PACT(keep=budget, layer=4, share=1.0)
    s = asked(keys, torch.ones(2, 40), budget, torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(2)))
    chosen, free = part.select(s), PACT(keep=1.0, layer=4, share=1.0).select(dataclasses.replace(s, budget=40))
    for b in range(2):
        kept = chosen.index[b] if chosen.valid is None else chosen.index[b, chosen.valid[b]]
        alone = free.index[b] if free.valid is None else free.index[b, free.valid[b]]
        assert 1 <= len(kept) <= budget and len(kept) <= len(alone)
        assert len(alone) > budget or torch.equal(kept, alone)
    check_batch_mates(part, s)


def test_equal_tokens_become_the_first_of_them() -> None:
    chosen = PACT(keep=1.0, layer=4, share=1.0).select(asked(torch.ones(1, 9, 3), torch.ones(1, 9)))
    assert chosen.index.tolist() == [[0]] and chosen.weight.tolist() == [[9.0]]


@pytest.mark.parametrize("n", [1, 2, 60])
def test_rows_made_when_wanted_give_the_same(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    keys = torch.randn(1, n, 5, generator=torch.Generator().manual_seed(3))
    s = asked(keys, torch.rand(1, n, generator=torch.Generator().manual_seed(4)), max(1, n // 6))
    whole = PACT(keep=1.0, layer=4).select(s)
    monkeypatch.setattr(pact, "_WHOLE", 0)
    monkeypatch.setattr(pact, "_BLOCK", 7)
    rows = PACT(keep=1.0, layer=4).select(s)
    assert torch.equal(whole.index, rows.index) and torch.equal(whole.owner, rows.owner)
    assert sorted(Distances(keys[0]).densest_first().tolist()) == list(range(n))


# ------------------------------------------------------------------------------------------- attention counts members
LAYER = 2


@dataclass(frozen=True, kw_only=True)
class Weighing(Reducer):
    """Keeps every other visual token; each counts for one to four."""

    name: ClassVar[str] = "weighing"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar = "original"
    default_newlines: ClassVar = "compete"
    decides_itself: ClassVar[bool] = True

    @property
    def layer(self) -> int:
        return LAYER

    def select(self, signals: Signals) -> Selection:
        index = torch.arange(0, signals.shape[1], 2).expand(signals.shape[0], -1).contiguous()
        return Selection(index, weight=1.0 + index % 4)


def spans(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which columns :class:`Weighing` drops, and the logarithms it adds, ``(B, q)``; one image per row."""
    visual = visual_of(inputs)
    place = visual.cumsum(1) - 1
    dropped = visual & (place % 2 == 1)
    return dropped, torch.where(visual & ~dropped, (1.0 + place % 4).log(), 0.0)


def reference(model: nn.Module, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a copy whose later layers get the whole sequence and a mask that hides and weighs; no cache."""
    twin, more = copy.deepcopy(model), ids.shape[1] - inputs["input_ids"].shape[1]
    dropped, bias = (nn.functional.pad(t, (0, more)) for t in spans(inputs))
    real = nn.functional.pad(inputs["attention_mask"].bool(), (0, more), value=True)
    at = torch.arange(ids.shape[1])
    seen = (at <= at[:, None]) & (real & ~dropped)[:, None] | (at == at[:, None])
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min) + bias[:, None].to(dtype)

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, "attention_mask": mask[:, None]}

    for layer in text_of(twin).layers[LAYER:]:
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return twin(input_ids=ids, attention_mask=real.long(), **pixels, use_cache=False).logits


def answer(model: nn.Module, inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("impl", ["sdpa", "eager64"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_later_layer_and_step_adds_the_logarithms(impl: str, batch: int) -> None:
    model = shared("llava", impl)
    inputs = make_inputs("llava", model, images=[1] * batch)
    assert batch == 1 or (inputs["attention_mask"] == 0).any(), "padded"
    with vtc.patch(model, Weighing(keep=1.0)):
        ids, logits = answer(model, inputs)
        fixed = answer(model, inputs, cache_implementation="static") if upstream.fixed_layers_count() else (ids, logits)
        beams = [model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=c) for c in (True, False)]
    want = reference(model, ids, inputs)[:, -5:-1]
    assert (want - logits).abs().max() < 1e-5
    assert torch.equal(fixed[0], ids) and (fixed[1] - logits).abs().max() < 1e-5
    assert torch.equal(*beams), "rows are reordered with their logarithms"


def test_the_logarithms_matter() -> None:
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    logits = {}
    for proportional in (True, False):
        with vtc.patch(model, "pact", keep=5, layer=LAYER, proportional=proportional), torch.no_grad():
            logits[proportional] = model(**inputs).logits[:, -1]
    assert (logits[True] - logits[False]).abs().max() > 1e-3


def test_a_second_turn_goes_on_with_the_logarithms() -> None:
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    more = torch.tensor([[11, 12, 13]])
    with vtc.patch(model, Weighing(keep=1.0)), torch.no_grad():
        first = model(**inputs, use_cache=True)
        second = model(input_ids=more, past_key_values=first.past_key_values).logits
    want = reference(model, torch.cat([inputs["input_ids"], more], 1), inputs)
    assert (second - want[:, -3:]).abs().max() < 1e-5


def test_flash_attention_is_refused_unless_nothing_is_counted() -> None:
    model = shared("llava", "fake_flash")
    inputs = make_inputs("llava", model, 1)
    with vtc.patch(model, "pact", keep=5, layer=LAYER), pytest.raises(UnsupportedFeatureError, match="proportional=False"):
        model(**inputs)
    with vtc.patch(model, "pact", keep=5, layer=LAYER, proportional=False), torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


# ------------------------------------------------------------------------------------------------------------ in models
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_inside_a_model(family: str) -> None:
    check_inside_a_model(family, "pact", 5, exact=False)


def test_layers_follow_the_model() -> None:
    model = shared("llava")
    assert vtc.create("pact", keep=5).bind(vtc.families.family_of(model).facts).layer >= 1
    facts = dataclasses.replace(vtc.families.family_of(model).facts, layers=28)
    assert vtc.create("pact", keep=5).bind(facts).layer == 4
    with pytest.raises(UnknownArgumentError, match="layer"):
        vtc.patch(model, "pact", keep=5, layer=40)


@pytest.mark.parametrize("options", [{"share": 1.5}, {"cutoff": -0.1}, {"coefficient": float("nan")}, {"share": True}])
def test_senseless_options_are_refused(options: dict) -> None:
    with pytest.raises(UnknownArgumentError, match=f"pact: {next(iter(options))}"):
        vtc.create("pact", keep=4, **options)
