"""What cannot work is refused with one clear sentence before anything runs, and leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import threading
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from models import DECODER_LAYERS, build, make_inputs, shared, where
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, Picker, TwoLayerPicker, VisionPicker
from test_oracle import snapshot
from torch import nn
from transformers import DynamicCache, GenerationConfig

import vtc
from vtc.core import Facts, Need, Reducer, Scorer, Selection, Stage
from vtc.engine import patch as engine_patch
from vtc.engine import taps, upstream
from vtc.errors import (
    BudgetError,
    InvalidSignalError,
    NotReducedError,
    PatchError,
    UnknownArgumentError,
    UnsupportedFeatureError,
    UnsupportedModelError,
    UnsupportedSignalError,
    VtcError,
)
from vtc.signals import cls_attn, keys, last_attn


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


ENCODED = "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
"""Whether features can be handed to the model at all (newer releases)."""


class Guarded:
    """A patched model whose modules count their calls: a refusal must come before any of them ran."""

    def __init__(self, reducer="fastv", family="llava", batch=1, **options):
        self.model = build(family)
        self.inputs = make_inputs(family, self.model, batch)
        self.base = logits(self.model, self.inputs)
        self.clean = snapshot(self.model)
        options = options or ({"keep": 5} if isinstance(reducer, str) else {})
        self.handle = vtc.patch(self.model, reducer, **options)
        self.works = logits(self.model, self.inputs)
        assert not torch.equal(self.works, self.base)
        self.ran = 0

    def refuses(self, call, error, match):
        """``call`` raises one sentence before a layer ran; the patch still works; un-patching restores everything."""
        layers = [*self.model.model.language_model.layers, self.model.model.vision_tower]
        hooks = [layer.register_forward_pre_hook(self.count) for layer in layers]
        with pytest.raises(error, match=match) as caught, torch.no_grad():
            call()
        for hook in hooks:
            hook.remove()
        assert self.ran == 0
        assert isinstance(caught.value, VtcError)
        sentence = str(caught.value)
        assert sentence and "\n" not in sentence and not sentence.endswith(".") and len(sentence) < 300
        self.still_works()

    def still_works(self):
        assert torch.equal(logits(self.model, self.inputs), self.works)
        vtc.unpatch(self.model)
        assert torch.equal(logits(self.model, self.inputs), self.base)
        assert snapshot(self.model) == self.clean

    def count(self, *_):
        self.ran += 1


# ------------------------------------------------------------------------------------------------------- generate options
def test_chunked_prefill():
    g = Guarded()
    generate = g.model.generate
    g.refuses(lambda: generate(**g.inputs, prefill_chunk_size=8), UnsupportedFeatureError, "prefill_chunk_size")


@pytest.mark.parametrize("how", ["keyword", "positional", "own"])
def test_chunked_prefill_in_a_generation_config(how):
    g = Guarded()
    config = GenerationConfig(max_new_tokens=2)
    config.prefill_chunk_size = 8
    if how == "own":
        g.model.generation_config.prefill_chunk_size = 8

        def call():
            g.model.generate(**g.inputs)
    elif how == "keyword":

        def call():
            g.model.generate(**g.inputs, generation_config=config)
    else:

        def call():
            rest = {k: v for k, v in g.inputs.items() if k != "input_ids"}
            g.model.generate(g.inputs["input_ids"], config, **rest)

    g.refuses(call, UnsupportedFeatureError, "prefill_chunk_size")


CACHES = ["quantized", "offloaded", "offloaded_static", "hybrid_chunked", "sliding_window", "paged"]
if not upstream.fixed_layers_count():  # older static layers write at a logical cache_position
    CACHES.append("static")


@pytest.mark.parametrize("cache", CACHES)
def test_cache_implementations(cache):
    g = Guarded()
    g.refuses(lambda: g.model.generate(**g.inputs, cache_implementation=cache), UnsupportedFeatureError, f"'{cache}'")


def test_hybrid_in_a_models_files_is_taken_for_unset():
    """Files of Gemma 3, Aya-Vision and Command-A-Vision say so; transformers itself unsets it."""
    g = Guarded()
    want = g.model.generate(**g.inputs, max_new_tokens=4, do_sample=False)
    g.model.generation_config.cache_implementation = "hybrid"
    assert torch.equal(g.model.generate(**g.inputs, max_new_tokens=4, do_sample=False), want)


def odd_cache():
    class QuantizedLayer(type(DynamicCache().layer_class_to_replicate())):
        pass

    cache = DynamicCache()
    cache.layers.append(QuantizedLayer())
    return cache


class LegacyCache:
    def get_seq_length(self, *_):
        return 0


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize(("cache", "words"), [(odd_cache, "QuantizedLayer"), (LegacyCache, "LegacyCache")])
def test_foreign_caches(how, cache, words):
    g = Guarded()
    call = g.model.generate if how == "generate" else g.model
    g.refuses(lambda: call(**g.inputs, past_key_values=cache()), UnsupportedFeatureError, words)


def test_offloaded_cache_object():
    g = Guarded()
    cache = DynamicCache()
    cache.offloading = True
    g.refuses(lambda: g.model(**g.inputs, past_key_values=cache), UnsupportedFeatureError, "offloaded")


BATCHING = [
    n
    for n in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    if hasattr(transformers.LlavaForConditionalGeneration, n)
]


@pytest.mark.parametrize("name", BATCHING)
def test_continuous_batching(name):
    g = Guarded()
    g.refuses(lambda: getattr(g.model, name)(inputs=[[1, 2, 3]]), UnsupportedFeatureError, "continuous batching")


def test_there_is_continuous_batching_to_refuse():
    assert "generate_batch" in BATCHING


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "cu_seq_lens_k"])
def test_packed_sequences(key):
    g = Guarded()
    g.refuses(lambda: g.model(**g.inputs, **{key: torch.tensor([0, 5])}), UnsupportedFeatureError, "packed sequences")


# --------------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("impl", ["flex_attention", "paged|sdpa"])
def test_attention_that_cannot_be_shortened(impl):
    model = build("llava")
    before = snapshot(model)
    inner = model.model.language_model.config
    inner._attn_implementation_internal = impl
    with pytest.raises(UnsupportedFeatureError, match="attn_implementation='sdpa'"):
        vtc.patch(model, "uniform", keep=5)
    inner._attn_implementation_internal = "sdpa"
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_flex_attention_switched_on_later(how):
    g = Guarded("uniform")
    config = g.model.model.language_model.config

    def call():
        config._attn_implementation_internal = "flex_attention"
        try:
            if how == "generate":
                g.model.generate(**g.inputs, max_new_tokens=2)
            else:
                g.model(**g.inputs)
        finally:
            config._attn_implementation_internal = "sdpa"

    g.refuses(call, UnsupportedFeatureError, "flex_attention")


# ------------------------------------------------------------------------------------------------------------------ images
@where(ENCODED)
def test_features_encoded_before_patching():
    model = build("llava")
    inputs = make_inputs("llava", model)
    base = logits(model, inputs)
    with torch.no_grad():
        encoded = model.model.get_image_features(inputs["pixel_values"])
    given = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": encoded}}
    with vtc.patch(model, "uniform", keep=5), torch.no_grad():
        with pytest.raises(UnsupportedFeatureError, match="encoded before"):
            model(**given)
        with pytest.raises(UnsupportedFeatureError, match="encoded before"):
            model.generate(**given, max_new_tokens=2)
        assert model(**inputs).logits.isfinite().all()
    assert torch.equal(logits(model, inputs), base)


def test_padding_over_image_tokens():
    g = Guarded("uniform")
    mask = g.inputs["attention_mask"].clone()
    mask[0, :12] = 0
    with pytest.raises(UnsupportedFeatureError, match="padding must not hide image tokens"):
        logits(g.model, g.inputs | {"attention_mask": mask})
    g.still_works()


def test_cls_token_among_the_slots():
    """vision_feature_select_strategy='full' makes the class token a slot: tower stages refuse, the others work."""
    model = build("llava", vision_feature_select_strategy="full")
    inputs = make_inputs("llava", model)
    for part in (VisionPicker(keep=3), EncoderPicker(keep=3)):
        with pytest.raises(UnsupportedFeatureError, match="class token"):
            vtc.patch(model, part)
    with vtc.patch(model, BoundaryPicker(keep=3)) as handle:
        assert logits(model, inputs).isfinite().all()
        assert handle.stats.last.images[0].slots == 17 and handle.stats.last.images[0].kept == 3


def test_several_feature_layers():
    model = build("llava", vision_feature_layer=[-2, -3])
    inputs = make_inputs("llava", model)
    with pytest.raises(UnsupportedFeatureError, match="several tower layers"):
        vtc.patch(model, EncoderPicker(keep=3))
    for part in (BoundaryPicker(keep=3), VisionPicker(keep=3)):
        with vtc.patch(model, part) as handle:
            assert logits(model, inputs).isfinite().all() and handle.stats.last.images[0].kept == 3


# ------------------------------------------------------------------------------------------------------- models and requests
def test_unsupported_models():
    text = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for model, words in ((text, "'llama' are not supported"), (nn.Linear(2, 2), "no config.model_type")):
        before = snapshot(model)
        with pytest.raises(UnsupportedModelError, match=words):
            vtc.patch(model, "uniform", keep=5)
        assert snapshot(model) == before
    model = build("llava")
    model.config.model_type = "lava"  # its structure is looked at
    with pytest.warns(UserWarning, match="did you mean 'llava'"):
        vtc.patch(model, "uniform", keep=5)
    vtc.unpatch(model)
    model.config.image_token_id = None
    with pytest.raises(UnsupportedModelError, match="did you mean 'llava'"):
        vtc.patch(model, "uniform", keep=5)
    assert vtc.unpatch(text) is text  # a model that is not patched is returned as it is


@pytest.mark.parametrize(
    ("reducer", "options", "error", "match"),
    [
        ("unifrom", {"keep": 5}, vtc.UnknownReducerError, "did you mean 'uniform'"),
        ("uniform", {"kep": 5}, UnknownArgumentError, "did you mean 'keep'"),
        ("uniform", {}, BudgetError, "exactly one"),
        ("uniform", {"keep": 5, "avg_tokens": 5}, BudgetError, "exactly one"),
        ("uniform", {"keep": 0}, BudgetError, "keep=0"),
        ("uniform", {"keep": -1}, BudgetError, "keep=-1"),
        ("uniform", {"keep": 17}, BudgetError, "at most 16"),
        ("uniform", {"keep": 1.5}, BudgetError, "out of range"),
        ("uniform", {"keep": float("nan")}, BudgetError, "nan"),
        ("uniform", {"keep": True}, BudgetError, "not a number"),
        ("uniform", {"keep": "five"}, BudgetError, "not a number"),
        ("fastv", {"keep": 5, "layer": DECODER_LAYERS}, UnknownArgumentError, "layer 5 is out of range, use 1..4"),
        ("fastv", {"keep": 5, "layer": 0}, UnknownArgumentError, "layer 0 is out of range"),
        ("fastv", {"keep": 5, "layer": -1}, UnknownArgumentError, "layer -1 is out of range"),
        ("fastv", {"keep": 5, "positions": "wrong"}, UnknownArgumentError, "positions='wrong'"),
        ("fastv", {"keep": 5, "newlines": "wrong"}, UnknownArgumentError, "newlines='wrong'"),
        (["uniform", "random"], {"keep": 5}, UnknownArgumentError, "both act at the stage 'boundary'"),
        ([DecoderPicker(keep=5), TwoLayerPicker(keep=5)], {}, UnknownArgumentError, "both act at the stage 'decoder'"),
        ([VisionPicker(keep=5), EncoderPicker(keep=5)], {}, UnknownArgumentError, "before the projector"),
        (["uniform", "fastv"], {"keep": 5, "wrong": 1}, UnknownArgumentError, "'wrong'"),
        (BoundaryPicker(keep=5), {"keep": 6}, UnknownArgumentError, "ready-made"),
        ([], {}, UnknownArgumentError, "empty list"),
        (7, {}, vtc.UnknownReducerError, "cannot make a reducer of a int"),
    ],
)
def test_requests_that_make_no_sense(reducer, options, error, match):
    """Also as a re-patch: the old patch stays."""
    model = build("llava")
    before = snapshot(model)
    with pytest.raises(error, match=match):
        vtc.patch(model, reducer, **options)
    assert snapshot(model) == before
    g = Guarded()
    with pytest.raises(error, match=match):
        vtc.patch(g.model, reducer, **options)
    assert g.handle.active
    g.still_works()


@dataclass(frozen=True, kw_only=True)
class WantsCls(Scorer):
    name: ClassVar[str] = "wants_cls_only"
    stage: ClassVar[Stage] = Stage.BOUNDARY

    @property
    def needs(self):
        return (cls_attn(-2, substitute=False),)

    def score(self, signals):
        return signals.cls_attn


def test_signal_the_model_lacks():
    model = build("llava_siglip")
    before = snapshot(model)
    with pytest.raises(UnsupportedSignalError, match="'wants_cls_only': signal 'cls_attn' needs 'cls'.*uniform"):
        vtc.patch(model, WantsCls(keep=5))
    assert snapshot(model) == before
    with vtc.patch(build("llava"), WantsCls(keep=5)):
        pass


@pytest.mark.parametrize("layer", [DECODER_LAYERS, -DECODER_LAYERS - 1])
def test_signal_of_a_layer_out_of_range(layer):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(DecoderPicker):
        name: ClassVar[str] = "wrong_layer"

        @property
        def needs(self) -> tuple[Need, ...]:
            return (last_attn(layer),)

    model = build("llava")
    before = snapshot(model)
    with pytest.raises(VtcError, match="layer"):
        vtc.patch(model, Wrong(keep=5))
    assert snapshot(model) == before


def test_compact_positions_under_mrope():
    facts = vtc.families.family_of(shared("llava")).facts
    multi = Facts(**{**{f.name: getattr(facts, f.name) for f in dataclasses.fields(facts)}, "mrope": True})
    with pytest.raises(UnknownArgumentError, match="M-RoPE, pass positions='original'"):
        engine_patch.bind(BoundaryPicker(keep=5, positions="compact"), multi)
    assert engine_patch.bind(BoundaryPicker(keep=5, positions="original"), multi)


# ---------------------------------------------------------------------------------------------------------------- patching
def test_repatching_replaces():
    g = Guarded("uniform", keep=5)
    second = vtc.patch(g.model, "fastv", keep=3)
    assert not g.handle.active and second.active and engine_patch.handle_of(g.model) is second
    logits(g.model, g.inputs)
    assert second.stats.last.images[0].tokens_per_layer == [16, 16, 3, 3, 3] and len(g.handle.stats) == 1
    g.handle.remove()  # the old handle is spent: harmless
    assert second.active
    second.remove(), second.remove()
    assert torch.equal(logits(g.model, g.inputs), g.base) and snapshot(g.model) == g.clean


def test_failure_in_the_middle_of_installing(monkeypatch):
    g = Guarded("uniform", keep=5)
    model = build("llava")
    before = snapshot(model)

    def broken(*_):
        raise RuntimeError("broken tap")

    monkeypatch.setattr(taps, "attach", broken)
    with pytest.raises(RuntimeError, match="broken tap"):
        vtc.patch(model, "fastv", keep=5)
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="broken tap"):
        vtc.patch(g.model, "fastv", keep=5)
    monkeypatch.undo()
    assert g.handle.active
    g.still_works()


def test_context_manager_unpatches_after_an_error():
    g = Guarded("uniform", keep=5)
    with pytest.raises(KeyError), g.handle:
        raise KeyError
    assert torch.equal(logits(g.model, g.inputs), g.base) and snapshot(g.model) == g.clean


@pytest.mark.parametrize("how", ["patch", "unpatch", "remove"])
@pytest.mark.parametrize("call", ["forward", "generate", "decode", "text"])
def test_patching_while_running(how, call):
    """From inside a hook, and from another thread, during a prompt, generate, a decode step or a text-only prompt."""
    g = Guarded("uniform", keep=5)
    caught = []
    with torch.no_grad():
        cache = g.model(**g.inputs, use_cache=True).past_key_values
    text = {"input_ids": torch.tensor([[3, 4, 5]])}

    def act():
        try:
            if how == "patch":
                vtc.patch(g.model, "fastv", keep=5)
            elif how == "unpatch":
                vtc.unpatch(g.model)
            else:
                g.handle.remove()
        except PatchError as error:
            caught.append(str(error))

    def meddle(*_):
        act()
        thread = threading.Thread(target=act)
        thread.start(), thread.join()

    hook = g.model.model.language_model.layers[3].register_forward_pre_hook(meddle)
    with torch.no_grad():
        if call == "forward":
            got = g.model(**g.inputs).logits
            assert torch.equal(got, g.works)
        elif call == "generate":
            g.model.generate(**g.inputs, max_new_tokens=2, do_sample=False)
        elif call == "decode":
            g.model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        else:
            g.model(**text)
    hook.remove()
    assert len(caught) >= 2 and all("the model is running" in message for message in caught)
    assert g.handle.active
    g.still_works()


def test_an_error_inside_a_call_does_not_block_unpatching():
    g = Guarded("uniform", keep=5)

    def broken(*_):
        raise KeyError("broken layer")

    for module in (g.model.model.language_model.layers[2], g.model.model.vision_tower, g.model.model.multi_modal_projector):
        hook = module.register_forward_pre_hook(broken)
        with pytest.raises(KeyError, match="broken layer"):
            logits(g.model, g.inputs)
        with pytest.raises(KeyError, match="broken layer"):
            g.model.generate(**g.inputs, max_new_tokens=2)
        hook.remove()
    g.still_works()


def test_attributes_of_the_instance_come_back():
    """A user's own wrapper around generate and get_image_features is wrapped, and put back."""
    model = build("llava")
    inputs = make_inputs("llava", model)
    calls = []
    plain, encode = model.generate, model.model.get_image_features

    def mine(*args, **kwargs):
        calls.append("generate")
        return plain(*args, **kwargs)

    def my_features(*args, **kwargs):
        calls.append("features")
        return encode(*args, **kwargs)

    my_features.__signature__ = inspect.signature(encode)
    model.generate, model.model.get_image_features = mine, my_features
    with vtc.patch(model, "uniform", keep=5):
        model.generate(**inputs, max_new_tokens=2)
    assert model.generate is mine and model.model.get_image_features is my_features
    assert "generate" in calls and "features" in calls


# ------------------------------------------------------------------------------------------------------------- not reduced
def break_boundary(handle):
    handle.text.boundary = []


def break_decoder(handle):
    handle.text.decoder = {}


def break_vision(handle):
    handle.family.projector._forward_pre_hooks.clear()


def break_encoder(handle):
    for layer in handle.family.encoder_layers:
        layer._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("reducer", "damage"),
    [
        (BoundaryPicker(keep=5), break_boundary),
        (DecoderPicker(keep=5), break_decoder),
        (VisionPicker(keep=5), break_vision),
        (EncoderPicker(keep=5), break_encoder),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_reducer_that_did_not_act(reducer, damage):
    model = build("llava")
    inputs = make_inputs("llava", model)
    base = logits(model, inputs)
    handle = vtc.patch(model, reducer)
    damage(handle)
    with pytest.raises(NotReducedError, match=f"'{reducer.name}' did not act"):
        logits(model, inputs)
    assert not handle.stats.last.fired and not handle.stats.last.images[0].fired
    with pytest.raises(NotReducedError), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
    text = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert logits(model, text).isfinite().all()  # a text-only prompt needs no reduction
    vtc.unpatch(model)
    handle = vtc.patch(model, reducer, strict=False)
    damage(handle)
    with pytest.warns(UserWarning, match="did not act"):
        got = logits(model, inputs)
    assert not handle.stats.last.fired and torch.equal(got, base)
    vtc.unpatch(model)
    assert torch.equal(logits(model, inputs), base)


def test_strict_false_does_not_warn_when_all_is_well():
    g = Guarded("uniform", keep=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtc.patch(g.model, "uniform", keep=5, strict=False)
        assert torch.equal(logits(g.model, g.inputs), g.works)


# ----------------------------------------------------------------------------------------------------------- broken numbers
@dataclass(frozen=True, kw_only=True)
class BadSignal(DecoderPicker):
    """Taps a signal whose measure gives ``value`` for one token."""

    name: ClassVar[str] = "bad_signal"

    value: float = 0.0
    source: str = "text"

    @property
    def needs(self) -> tuple[Need, ...]:
        def measure(tap):
            mass = tap.key.float().mean(1).sum(-1)
            mass[:, 7] = self.value
            return tap.patches(mass) if self.source == "vision" else mass

        return (Need("mass", self.source, 1, measure),)


def bad(part):
    """Give a module's output one broken token."""

    def poison(module, args, out):
        out = out.clone()
        out[:, min(10, out.shape[1] - 1)] = part  # a visual token everywhere
        return out

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["text", "vision"])
def test_broken_signals(source, value):
    g = Guarded(BadSignal(keep=5, source=source))
    with vtc.patch(g.model, BadSignal(keep=5, source=source, value=value)):
        with pytest.raises(InvalidSignalError, match=r"signal 'mass' at decoder layer 2 \('bad_signal'\)"):
            logits(g.model, g.inputs)
    assert torch.equal(logits(g.model, g.inputs), g.base) and snapshot(g.model) == g.clean


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("reducer", "where", "words"),
    [
        (EncoderPicker(keep=5), "tower1", "'keys'.*tower layer 1"),
        (BoundaryPicker(keep=5), "projector", "'features'.*boundary"),
        (VisionPicker(keep=5), "tower2", "'features'.*vision tower"),
        (DecoderPicker(keep=5), "decoder1", "'features'.*decoder layer 2"),
    ],
    ids=["encoder", "boundary", "vision", "decoder"],
)
def test_broken_features(reducer, where, words, value):
    g = Guarded(reducer)
    base = g.model.model
    tower = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder.layers
    module = {
        "tower1": tower[1].self_attn.k_proj,
        "tower2": tower[2].mlp,
        "projector": base.multi_modal_projector,
        "decoder1": base.language_model.layers[1].mlp,
    }[where]
    hook = module.register_forward_hook(bad(value))
    with pytest.raises(InvalidSignalError, match=words):
        logits(g.model, g.inputs)
    hook.remove()
    g.still_works()


# --------------------------------------------------------------------------------------------------------- faulty reducers
@pytest.mark.parametrize(
    "selection",
    [
        lambda: Selection(torch.zeros(3, dtype=torch.int64)),
        lambda: Selection(torch.zeros(1, 3)),
        lambda: Selection(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, 4)),
    ],
)
def test_selection_checks_shapes(selection):
    with pytest.raises(ValueError, match="Selection"):
        selection()


def test_absent_signal_names_the_fix():
    @dataclass(frozen=True, kw_only=True)
    class Forgot(Picker):
        name: ClassVar[str] = "forgot"

        def select(self, signals):
            return signals.cls_attn

    g = Guarded("uniform", keep=5)
    with vtc.patch(g.model, Forgot(keep=5)), pytest.raises(AttributeError, match="declare it in the reducer's `needs`"):
        logits(g.model, g.inputs)
    assert torch.equal(logits(g.model, g.inputs), g.base)
    assert isinstance(copy.deepcopy(Forgot(keep=5)), Reducer) and keys(0).source == "vision"


def test_signals_of_a_tower_that_was_shrunk():
    g = Guarded("uniform", keep=5)
    with pytest.raises(UnsupportedFeatureError, match="which 'downsample' shrinks"):
        vtc.patch(g.model, ["downsample", "fastervlm"], keep=5)
    assert torch.equal(logits(g.model, g.inputs), g.works), "the patch there was is still in force"
    with vtc.patch(g.model, ["downsample", "divprune"], keep=5):
        logits(g.model, g.inputs)
