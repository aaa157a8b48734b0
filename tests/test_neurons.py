"""Decoding with core neurons: the same tokens as a slow reference, per row, nothing left behind, full MLPs everywhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.engine import upstream
from vtc.engine.neurons import PROJECTIONS
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.reducers.corematching import CoreNeurons
from vtc.signals import StateTap

STEPS = 5
OPTIONS = {"keep": 8, "rule": "topk", "layer": 2}


def tap_of(neurons: Tensor, valid: Tensor | None = None) -> StateTap:
    valid = torch.ones(neurons.shape[:2], dtype=torch.bool) if valid is None else valid
    return StateTap(neurons, valid.sum(1) - 1, torch.zeros_like(valid), valid, nn.Identity(), before=neurons)


# ------------------------------------------------------------------------------------------------------------- measure
def test_core_by_hand():
    # quantile 0.5 of the positive values: token 0: median of 1 2 3 is 2 -> neurons 1, 2; token 1: of 4 8 is 6 -> neuron 0;
    # token 2: 5 alone -> neuron 2. Counts: 1 1 2 0
    x = torch.tensor([[[1.0, 2.0, 3.0, -9.0], [8.0, 4.0, -1.0, -1.0], [-1.0, 0.0, 5.0, -2.0]]])
    assert CoreNeurons(0.5, 0.5).count(x[0]).tolist() == [1, 1, 2, 0]
    assert CoreNeurons(0.5, 0.5)(tap_of(x)).tolist() == [[0, 2]], "the lowest index among equals"
    assert CoreNeurons(0.25, 0.5)(tap_of(x)).tolist() == [[2]]
    assert CoreNeurons(1.0, 0.5)(tap_of(x)).tolist() == [[0, 1, 2, 3]]
    assert CoreNeurons(0.01, 0.0)(tap_of(x)).tolist() == [[0]], "at least one; with quantile 0 all that fire count"


@pytest.mark.parametrize("active", [0.0, 0.2, 0.77, 1.0])
def test_core_equals_torch_quantile(active):
    x = torch.randn(2, 70, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    for row in x:
        expected = torch.zeros(40)
        for token in row:
            bound = torch.quantile(token[token > 0], active)
            expected += (token > 0) & (token >= bound - 1e-6)
        assert torch.equal(CoreNeurons(0.5, active).count(row), expected)


def test_padding_does_not_count():
    x = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((1, 3, 10), 50.0), x], 1)
    valid = (torch.arange(9) >= 3)[None]
    assert torch.equal(CoreNeurons(0.3, 0.2)(tap_of(padded, valid)), CoreNeurons(0.3, 0.2)(tap_of(x)))


# -------------------------------------------------------------------------------------------------------------- engine
def generate(model: nn.Module, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor, object]:
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1), out.past_key_values


def reference(model: nn.Module, inputs: dict[str, Tensor], share: float, active: float = 0.2) -> Tensor:
    """Logits of a model whose one-token forwards zero all but the core neurons, which were looked at in the prompt's forward."""
    twin, core = copy.deepcopy(model), {}
    hooks = []
    for i, layer in enumerate(twin.model.language_model.layers):

        def look(_module, args, i=i):
            (x,) = args
            if x.shape[1] == 1:
                return (x * core[i],)
            index = CoreNeurons(share, active)(tap_of(x))[0]
            core[i] = torch.zeros(x.shape[-1], dtype=x.dtype).index_fill(0, index, 1)
            return None

        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(look))
    with vtc.patch(twin, "corematching", **OPTIONS):
        return generate(twin, inputs)[1]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_decode_equals_the_reference(family, share):
    model = shared(family)
    inputs = make_inputs(family, model, 1)
    expected = reference(model, inputs, share)
    with vtc.patch(model, "corematching", **OPTIONS, neurons=share):
        _, logits, cache = generate(model, inputs)
    with vtc.patch(model, "corematching", **OPTIONS):
        _, full, _ = generate(model, inputs)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(logits[:, 0], full[:, 0]), "the prompt runs on all neurons"
    assert (logits[:, 1:] - full[:, 1:]).abs().max() > 1e-3, "the steps do not"
    layers = model.model.language_model.layers
    for i, held in cache._vtc_neurons.items():
        size = layers[i].mlp.down_proj.in_features
        assert held.index.shape == (1, round(share * size)) and held.weights["down_proj"][0].shape[1] == round(share * size)


def test_rows_of_a_batch_are_independent():
    model = shared("llava")
    inputs = make_inputs("llava", model, images=(1, 1))
    with vtc.patch(model, "corematching", **OPTIONS, neurons=0.3):
        tokens, logits, cache = generate(model, inputs)
        assert all(held.weights is None for held in cache._vtc_neurons.values())
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
            one, own, _ = generate(model, alone | {"pixel_values": inputs["pixel_values"][row : row + 1]})
            assert torch.equal(one[0], tokens[row])
            torch.testing.assert_close(own[0], logits[row], atol=1e-5, rtol=1e-5)


def test_all_neurons_are_the_identity():
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    with vtc.patch(model, "corematching", **OPTIONS):
        expected = generate(model, inputs)[1]
    with vtc.patch(model, "corematching", **OPTIONS, neurons=1.0):
        torch.testing.assert_close(generate(model, inputs)[1], expected, atol=1e-9, rtol=1e-9)


def test_beams_sampling_and_the_contract_of_generate():
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    with vtc.patch(model, "corematching", **OPTIONS, neurons=0.4) as handle, torch.no_grad():
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
        assert torch.equal(beams[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        torch.manual_seed(0)
        drawn = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3)
        assert drawn.shape[0] == 3 and len(handle.stats) == 2


def test_a_cache_of_other_rows_is_refused():
    model = shared("llava")
    inputs = make_inputs("llava", model, images=(1, 1))
    with vtc.patch(model, "corematching", **OPTIONS, neurons=0.4), torch.no_grad():
        cache = generate(model, inputs)[2]
        cache.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedFeatureError, match="core neurons of 2 rows and the step has 4"):
            model(input_ids=torch.full((4, 1), 5), past_key_values=cache)


def test_other_forwards_run_on_all_neurons():
    """Text-only prompts, forwards without a cache, and several tokens on the same cache."""
    model = shared("llava")
    inputs = make_inputs("llava", model, 1)
    text = {"input_ids": torch.tensor([[1, 5, 6, 7, 8]])}
    with torch.no_grad():
        plain = generate(model, text)[1]
        with vtc.patch(model, "corematching", **OPTIONS):
            cache = generate(model, inputs)[2]
            turn = model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=copy.deepcopy(cache)).logits
            single = model(**inputs, use_cache=False).logits
        with vtc.patch(model, "corematching", **OPTIONS, neurons=0.2):
            assert torch.equal(generate(model, text)[1], plain)
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, single)
            own = copy.deepcopy(cache)
            own._vtc_neurons = generate(model, inputs)[2]._vtc_neurons
            torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=own).logits, turn)


def test_nothing_is_left_behind():
    model = build("llava")
    inputs = make_inputs("llava", model, 1)
    before = [(n, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    expected = generate(model, inputs)[1]
    handle = vtc.patch(model, "corematching", **OPTIONS, neurons=0.2)
    assert "forward" in vars(model.model.language_model.layers[0].mlp.gate_proj)
    generate(model, inputs)
    twin = copy.deepcopy(model)
    handle.remove()
    assert [(n, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()] == before
    assert torch.equal(generate(model, inputs)[1], expected)
    vtc.unpatch(twin)
    assert torch.equal(generate(twin, inputs)[1], expected), "a copy is un-patched on its own"
    with vtc.patch(model, "corematching", **OPTIONS):
        assert all(
            "forward" not in vars(getattr(layer.mlp, n)) for layer in model.model.language_model.layers for n in PROJECTIONS
        )


@pytest.mark.parametrize("option", [{"neurons": 0}, {"neurons": 1.5}, {"neurons": True}, {"active": -0.1}, {"active": "most"}])
def test_shares_out_of_range_are_refused(option):
    with pytest.raises(UnknownArgumentError, match=rf"'?: {next(iter(option))}=.* (out of range|is not possible; use)"):
        vtc.create("corematching", keep=4, **option)


def test_what_cannot_be_sliced_is_refused():
    model = build("llava")
    inputs = make_inputs("llava", model, 1)
    with vtc.patch(model, "corematching", **OPTIONS, neurons=0.5):
        if upstream.fixed_layers_count():
            with pytest.raises(UnsupportedFeatureError, match="core neurons does not go together with a static cache"):
                generate(model, inputs, cache_implementation="static")

    class Adapted(nn.Linear):
        pass

    mlp = model.model.language_model.layers[1].mlp
    mlp.up_proj = Adapted(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False, dtype=torch.float64)
    with pytest.raises(UnsupportedFeatureError, match="decoder layer 1 has no MLP of plain"):
        vtc.patch(model, "corematching", **OPTIONS, neurons=0.5)


def test_measuring_command(monkeypatch):
    from vtc.eval import hooks, neurons

    monkeypatch.setattr(neurons, "STEPS", 4)
    monkeypatch.setattr(neurons, "SHARES", (0.25, 1.0))
    options = {"keep": 9, "layer": 1, "rule": "topk"}
    rows = neurons.timed("toy", hooks.toy_model(), hooks.toy_inputs(1), options, pairs=1)
    assert [row.neurons for row in rows] == [0.25, 1.0]
    assert all(row.step_speedup > 0 and row.prompt_ms and row.break_even for row in rows)
    assert neurons.spread([3.0, 1.0, 2.0]) == "2.00 [1.00, 3.00]"
