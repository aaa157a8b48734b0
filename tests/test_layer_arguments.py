"""What decoder layers are given beside states, mask, rotations and cache: shortened by rule, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import OTHERS, TEXT
from models import build, make_inputs, set_attention, shared
from pickers import BoundaryPicker, DecoderPicker, marks_of
from reference import hidden_reference, plan_of
from test_oracle import TOLERANCE, patched_generate
from torch import Tensor, nn

import vtc
from vtc.engine import upstream
from vtc.engine.text import sizes_of
from vtc.errors import UnsupportedFeatureError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:models of type")
STEPS = 6
SCALED = [name for name in ("ministral3", "mistral4") if name in OTHERS]
"""Models whose attention scales queries by position."""
PLANS = {
    "boundary-original": [BoundaryPicker(keep=0.4, ragged=True, positions="original")],
    "boundary-compact": [BoundaryPicker(keep=0.4, ragged=True)],
    "decoder-original": [DecoderPicker(keep=0.4, ragged=True, merge=True, positions="original")],
    "both-compact": [BoundaryPicker(keep=0.7, ragged=True), DecoderPicker(keep=0.3, layer=3, salt=2, positions="compact")],
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("impl", ["sdpa", "eager64"])
@pytest.mark.parametrize("name", OTHERS)
def test_equals_reference(name: str, impl: str, batch: int, kind: str) -> None:
    """Greedy tokens and logits, prompt included, are those of the full-length model with hidden columns."""
    model, parts = shared(name), PLANS[kind]
    inputs = make_inputs(name, model, batch)
    plan = plan_of(model, inputs, parts, marks_of(shared(name, impl), inputs))  # of features, where there is no adapter
    tokens, logits, prompt = hidden_reference(model, inputs, plan, STEPS)
    base = patched_generate(model, inputs, 1)[1]
    model = shared(name, impl)
    with vtc.patch(model, parts), torch.no_grad():
        got_tokens, got, _ = patched_generate(model, inputs, STEPS)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        whole = model(**inputs, position_ids=positions, use_cache=False).logits
    assert torch.equal(got_tokens, tokens) and (got - logits).abs().max() < TOLERANCE
    assert (got[:, 0] - base[:, 0]).abs().max() > 1e-2, "the dropped tokens did matter"
    kept = inputs["attention_mask"].bool() & ~plan.hide[len(model.model.language_model.layers) - 1]
    assert (whole - prompt)[kept].abs().max() < TOLERANCE


# ------------------------------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize("name", SCALED)
def test_the_scale_of_queries_is_that_of_their_own_positions(name: str) -> None:
    """A later turn and assisted decoding (several queries at once) go on from where the prompt logically ended."""
    model = shared(name)
    inputs = make_inputs(name, model)
    with vtc.patch(model, BoundaryPicker(keep=0.4)), torch.no_grad():
        want = patched_generate(model, inputs, 8)
        first = model(**inputs, use_cache=True)
        tail = model(input_ids=want[0][:, :7], past_key_values=first.past_key_values).logits
    assert (tail[0] - want[1][0, 1:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_flash_attention_is_refused_where_queries_are_scaled(name: str, call: str) -> None:
    model = shared(name)
    inputs, ran = make_inputs(name, model), []
    with vtc.patch(model, BoundaryPicker(keep=0.4)):
        model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
        try:
            set_attention(model, "fake_flash")
            with pytest.raises(UnsupportedFeatureError, match="scales queries by their position.*attn_implementation='sdpa'"):
                (model if call == "forward" else model.generate)(**inputs)
        finally:
            set_attention(model, "sdpa")
            model.model.vision_tower._forward_pre_hooks.clear()
    assert not ran, "before anything runs"


@pytest.mark.parametrize("impl", ["fake_flash", "sdpa"])
def test_flash_attention_sees_no_gaps_for_packed_prompts(impl: str) -> None:
    """Batch 1, original positions: layers are given positions, but not under FlashAttention."""
    model = build("llava", impl)
    inputs, seen = make_inputs("llava", model), []
    layer = model.model.language_model.layers[3]
    with vtc.patch(model, BoundaryPicker(keep=0.4, positions="original")), torch.no_grad():
        layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    if impl == "fake_flash":
        assert seen[0] is None
    else:
        assert torch.equal(seen[0], cache.layers[3].cols) and seen[1].item() == inputs["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------------- further arguments
def told(layer: nn.Module, argument: str, where: str) -> None:
    """Let a decoder layer (or a module inside it) name one more argument; the layer notes what it is given under that name."""
    space: dict[str, Any] = {"real": type(layer)}
    taken = f"{argument}=None, " if where == "layer" else ""
    exec(
        f"def forward(self, hidden_states, attention_mask=None, position_ids=None, {KV}=None, position_embeddings=None, "
        f"{taken}**kwargs):\n"
        f"    self.seen = {argument if taken else f'kwargs.pop({argument!r}, None)'}\n"
        f"    return real.forward(self, hidden_states, attention_mask=attention_mask, position_ids=position_ids, {KV}={KV}, "
        "position_embeddings=position_embeddings, **kwargs)",
        space,
    )
    layer.__class__ = type(f"Told{type(layer).__name__}", (type(layer),), {"forward": space["forward"]})
    if where == "module":
        exec(
            f"def read(self, x, {argument}=None): return real_mlp.forward(self, x)",
            space | {"real_mlp": type(layer.mlp)},
            space,
        )
        space["read"].__globals__["real_mlp"] = type(layer.mlp)
        layer.mlp.__class__ = type("ToldMLP", (type(layer.mlp),), {"forward": space["read"]})


KV = upstream.cache_argument(build("llava").model.language_model)
NOTHING = "nothing"


def with_argument(argument: str, where: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose decoder layer 3 names one more argument, and inputs."""
    model = build("llava")
    layer = model.model.language_model.layers[3]
    if where != NOTHING:
        told(layer, argument, where)
    return model, make_inputs("llava", model, 2)


@pytest.mark.parametrize("where", ["layer", "module"])
@pytest.mark.parametrize(
    "shape", [lambda b, q: (b, q), lambda b, q: (b, q, 3), lambda b, q: (1, 1, q, q), lambda b, q: (b * q,)]
)
@pytest.mark.parametrize("nest", [lambda t: t, lambda t: (None, t), lambda t: {"a": [t]}])
def test_an_unknown_argument_as_long_as_the_sequence_is_refused(where, shape, nest) -> None:
    model, inputs = with_argument("colours", where)
    value = nest(torch.zeros(shape(*inputs["input_ids"].shape)))
    with vtc.patch(model, BoundaryPicker(keep=0.4)) as handle, torch.no_grad():
        with pytest.raises(UnsupportedFeatureError, match="given 'colours', which is as long as the sequence"):
            model(**inputs, colours=value)
        assert len(handle.stats) == 0
        model(**inputs)  # where it is not given, nothing is refused
        model(**inputs, colours=nest(torch.zeros(7, 3)))  # nor where it is about something else
        assert len(handle.stats) == 2
    with vtc.patch(model, BoundaryPicker(keep=1.0)), torch.no_grad():
        model(**inputs, colours=value)  # nothing is dropped


def test_what_no_module_names_is_left_alone() -> None:
    """Keywords of a call that reach the layers because models hand all of them on, and that nobody there reads."""
    model, inputs = with_argument("colours", NOTHING)
    value = torch.zeros(inputs["input_ids"].shape)
    with vtc.patch(model, BoundaryPicker(keep=0.4)), torch.no_grad():
        want = model(**inputs).logits
        assert torch.equal(model(**inputs, colours=value).logits, want)


@pytest.mark.parametrize("argument", upstream.PER_TOKEN)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_known_to_be_one_for_each_token_is_shortened(argument: str, rows: int) -> None:
    model, inputs = with_argument(argument, "layer")
    q = inputs["input_ids"].shape[1]
    value = torch.arange(rows * q * 2.0).view(rows, q, 2)
    with vtc.patch(model, DecoderPicker(keep=0.4)), torch.no_grad():
        cache = model(**inputs, use_cache=True, **{argument: value}).past_key_values
    layer = model.model.language_model.layers[3]
    assert layer.seen.shape == (2, cache.layers[3].keys.shape[-2], 2)
    for row in range(2):
        assert torch.equal(layer.seen[row], value[row % rows, cache.layers[3].cols[row]])


def test_layers_that_change_the_sequence_are_refused() -> None:
    model = build("llava")
    inputs, layer = make_inputs("llava", model), model.model.language_model.layers[1]
    layer.register_forward_hook(lambda m, a, out: out[:, 1:])
    with (
        vtc.patch(model, BoundaryPicker(keep=0.4)),
        torch.no_grad(),
        pytest.raises(
            UnsupportedFeatureError, match=r"given states of shape \(1, \d+, 32\) where \d+ tokens .* cannot be shortened"
        ),
    ):
        model(**inputs, use_cache=False)


# ---------------------------------------------------------------------------------------- what is refused when patching
@pytest.mark.parametrize("sharing", [1, 2])
def test_layers_that_share_keys_and_values_are_refused(sharing: int) -> None:
    if "gemma4" not in OTHERS:
        return
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = build("gemma4", text=dict(num_kv_shared_layers=sharing, layer_types=kinds))
    with pytest.raises(
        UnsupportedModelError, match=f"{sharing} of the {TEXT['num_hidden_layers']} decoder layers .* read keys"
    ):
        vtc.patch(model, "uniform", keep=0.5)


def test_attention_that_counts_positions_itself_is_refused() -> None:
    model = build("llava")
    attention = model.model.language_model.layers[2].self_attn
    real = type(attention)

    class Counting(real):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get(KV)
            self.first = 0 if cache is None else cache.get_seq_length(2)
            return super().forward(*args, **kwargs)

    attention.__class__ = Counting
    with pytest.raises(UnsupportedModelError, match="Counting counts positions itself"):
        vtc.patch(model, "uniform", keep=0.5)


def test_sizes_are_found_in_any_nest() -> None:
    one, two, three = torch.zeros(2, 3), torch.zeros(5), torch.zeros(7, 11)
    assert sizes_of(one) == {2, 3} and sizes_of(None) == sizes_of(4) == sizes_of("x") == set()
    assert sizes_of({"a": (one, [two, None]), "b": {"c": three}}) == {2, 3, 5, 7, 11}
