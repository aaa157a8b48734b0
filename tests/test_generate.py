"""``generate`` and ``forward`` keep their contract on a patched model."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
import transformers
from models import DECODER_LAYERS, IMAGE_TOKEN, build, image_spans, make_inputs, shared, visual_of, where
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, TwoLayerPicker, VisionPicker, marks_of
from reference import hidden_generate, hidden_reference, oracle_model, plan_of
from torch import nn
from transformers import DynamicCache

import vtc
from vtc.engine import upstream
from vtc.engine.cache import PrunedLayer, PrunedStaticLayer
from vtc.errors import UnsupportedFeatureError

TOLERANCE = 1e-5
NEW = int(transformers.__version__.split(".")[0]) >= 5
# StaticLayer counts its own tokens from 5.2x on; older ones write at a logical cache_position and are refused
STATIC = upstream.fixed_layers_count()
# generate drops pixel_values once the cache is not empty in 4.57, patched or not
CONTINUES = NEW

PARTS = {
    "boundary+two-layers": [
        BoundaryPicker(keep=0.8, ragged=True, positions="original"),
        TwoLayerPicker(keep=0.6, positions="original"),
    ],
    "compact": [BoundaryPicker(keep=0.5, ragged=True), DecoderPicker(keep=0.3, ragged=True)],
    "encoder": [EncoderPicker(keep=0.5, ragged=True)],
    "merge": [VisionPicker(keep=0.5, merge=True), DecoderPicker(keep=0.3, merge=True)],
}


def flat(parts):
    return [q for p in parts for q in p.parts()]


def run(model, inputs, steps=8, **options):
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            return_dict_in_generate=True,
            output_logits=True,
            **({"do_sample": False} | options),
        )
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    assert "input_ids" not in inputs or torch.equal(out.sequences[0, :prompt], inputs["input_ids"][0])
    return out.sequences[:, prompt:], torch.stack(out.logits, 1), out


@functools.cache
def case(family: str, batch: int, kind: str = "boundary+two-layers", seed: int = 0):
    model = shared(family)
    inputs = make_inputs(family, model, batch, seed)
    return model, inputs, plan_of(model, inputs, flat(PARTS[kind]), marks_of(model, inputs))


# --------------------------------------------------------------------------------------------------------------- decoding
def test_prompt_ids_come_back_whole():
    for batch in (1, 2):
        model, inputs, _ = case("llava", batch)
        with vtc.patch(model, PARTS["compact"]):
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(ids[:, :-4], inputs["input_ids"]) and ids.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_sampling_and_return_sequences(family, batch):
    # 4.57 mixes up the images of rows with several images when it expands pixel_values, patched or not
    batch = batch if NEW else 1
    model, inputs, plan = case(family, batch)
    torch.manual_seed(3)
    want = hidden_generate(model, inputs, plan, 3, max_new_tokens=8, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    plain = hidden_generate(model, inputs, type(plan)(), 3, max_new_tokens=8, do_sample=True, num_return_sequences=3)
    with vtc.patch(model, PARTS["boundary+two-layers"]) as handle:
        torch.manual_seed(3)
        got = model.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=3)
        images = len(handle.stats.last.images)
    assert torch.equal(got, want.sequences) and not torch.equal(got, plain.sequences)
    assert images == 3 * len(image_spans(inputs, model))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_beam_search(family, batch):
    batch = batch if NEW else 1  # as above
    model, inputs, plan = case(family, batch)
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    want = hidden_generate(model, inputs, plan, 3, **options)
    plain = hidden_generate(model, inputs, type(plan)(), 3, **options)
    with vtc.patch(model, PARTS["boundary+two-layers"]), torch.no_grad():
        got = model.generate(**inputs, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert (got.sequences_scores - want.sequences_scores).abs().max() < TOLERANCE
    assert (got.sequences_scores - plain.sequences_scores).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["compact", "encoder", "merge"])
def test_beam_search_scores_are_those_of_the_sequences(kind):
    """Where the reference has no cache: the score of each returned beam equals the sum of its own log-probabilities."""
    model, inputs, plan = case("llava", 1, kind)
    with vtc.patch(model, PARTS[kind]), torch.no_grad():
        got = model.generate(
            **inputs, max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=False, return_dict_in_generate=True,
            output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    with oracle_model(model, plan) as twin, torch.no_grad():
        for ids, score in zip(got.sequences, got.sequences_scores, strict=True):
            out = twin(**inputs | {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}, use_cache=False)
            steps = out.logits[0, prompt - 1 : -1].log_softmax(-1)
            own = steps.gather(1, ids[prompt:, None]).sum()
            assert abs(own - score) < TOLERANCE


def test_streaming():
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.clone())

        def end(self):
            self.ended = True

    model, inputs, _ = case("llava", 1)
    streamer = Streamer()
    with vtc.patch(model, PARTS["compact"]):
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.ended and torch.equal(streamer.seen[0].reshape(-1), inputs["input_ids"][0])
    assert torch.equal(torch.cat([s.reshape(-1) for s in streamer.seen]), ids[0])


def repeating(model):
    """A prompt whose end repeats itself, so that its own words are proposed as candidates."""
    inputs = make_inputs("llava", model)
    model.generation_config.eos_token_id = 103  # 4.57 needs one here; it is suppressed
    model.generation_config.suppress_tokens = [100, 101, 103]
    repeat = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 7, 8]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], repeat], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@pytest.mark.parametrize("kind", ["boundary+two-layers", "compact", "merge"])
def test_prompt_lookup_decoding(kind, monkeypatch):
    """Candidates are verified in one forward and rejected ones are cropped off the cache."""
    model = build("llava")
    inputs, crops = repeating(model), []
    plain = PrunedLayer.crop
    monkeypatch.setattr(PrunedLayer, "crop", lambda self, n: (crops.append(n), plain(self, n))[1])
    with vtc.patch(model, PARTS[kind]):
        want = run(model, inputs, 12)[0]
        got, _, out = run(model, inputs, 12, prompt_lookup_num_tokens=3)
    assert torch.equal(got, want) and any(crops)
    lengths = {out.past_key_values.get_seq_length(i) for i in range(DECODER_LAYERS)}
    assert len(lengths) == 1


@where(hasattr(transformers.cache_utils.StaticLayer, "crop"))  # from 5.24 on
@pytest.mark.parametrize("kind", ["boundary+two-layers", "compact"])
def test_prompt_lookup_over_a_static_cache(kind, monkeypatch):
    model = build("llava")
    inputs, crops = repeating(model), []
    plain = PrunedStaticLayer.crop
    monkeypatch.setattr(PrunedStaticLayer, "crop", lambda self, n: (crops.append(n), plain(self, n))[1])
    # room behind the answer: 5.24 writes candidates past the end of its buffers, unpatched, too
    static = {"cache_implementation": "static", "disable_compile": True, "max_cache_len": inputs["input_ids"].shape[1] + 40}
    with vtc.patch(model, PARTS[kind]):
        want = run(model, inputs, 12)[0]
        got, _, out = run(model, inputs, 12, prompt_lookup_num_tokens=3, **static)
        cache = out.past_key_values
        with pytest.raises(UnsupportedFeatureError, match="crop a static KV cache back into visual tokens"):
            cache.crop(-int(cache.get_seq_length()) + 3)
    assert torch.equal(got, want) and any(crops)
    assert len({int(cache.get_seq_length(i)) for i in range(DECODER_LAYERS)}) == 1


def test_crop_restores_the_cache_and_refuses_reduced_tokens():
    model, inputs, _ = case("llava", 1)
    with vtc.patch(model, PARTS["boundary+two-layers"]), torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = out.past_key_values
        short = copy.deepcopy(cache)
        model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=short)
        short.crop(-3)
        for a, b in zip(cache.layers, short.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.cols, b.cols) and a.get_seq_length() == b.get_seq_length()
        short.crop(-2)  # text after the image
        assert short.get_seq_length() == inputs["input_ids"].shape[1] - 2
        a = model(input_ids=inputs["input_ids"][:, -2:], past_key_values=short).logits
        assert (a[:, -1] - out.logits[:, -1]).abs().max() < TOLERANCE
        with pytest.raises(vtc.UnsupportedFeatureError, match="start from a fresh cache"):
            short.crop(-15)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_manual_decode_loop_with_a_user_cache(kind, batch):
    model, inputs, _ = case("llava_next", batch)
    with vtc.patch(model, PARTS[kind]), torch.no_grad():
        tokens, logits, _ = run(model, inputs)
        cache, mask = DynamicCache(), inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(**inputs, past_key_values=cache, position_ids=positions, use_cache=True)
        assert out.past_key_values is cache
        for i in range(7):
            assert (out.logits[:, -1] - logits[:, i]).abs().max() < TOLERANCE
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
            out = model(input_ids=tokens[:, i : i + 1], attention_mask=mask, position_ids=positions, past_key_values=cache)


@pytest.mark.parametrize("kind", PARTS)
def test_positions_are_derived_from_the_cache(kind):
    """No position_ids and no mask: the text model asks the cache for its logical length."""
    model, inputs, _ = case("llava", 1)
    with vtc.patch(model, PARTS[kind]), torch.no_grad():
        tokens, logits, _ = run(model, inputs)
        out = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], use_cache=True)
        for i in range(7):
            assert (out.logits[:, -1] - logits[:, i]).abs().max() < TOLERANCE
            out = model(input_ids=tokens[:, i : i + 1], past_key_values=out.past_key_values)
        assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + 7


@pytest.mark.parametrize("kind", PARTS)
def test_without_a_cache(kind):
    model, inputs, _ = case("llava", 2)
    with vtc.patch(model, PARTS[kind]) as handle:
        want = run(model, inputs)
        handle.stats.clear()
        got = run(model, inputs, use_cache=False)
        assert len(handle.stats) == 8 and all(call.fired for call in handle.stats)  # reduced again at each step
    assert torch.equal(want[0], got[0]) and (want[1] - got[1]).abs().max() < TOLERANCE


# ------------------------------------------------------------------------------------------------------------ multi-turn
@pytest.mark.parametrize("kind", ["boundary+two-layers", "compact", "encoder", "merge"])
@pytest.mark.parametrize("family", ["llava", "llava_next"] if CONTINUES else ["llava"])
def test_multi_turn(family, kind):
    """Turn 2 continues the returned cache; where transformers can, with a second image, else with text only."""
    model = shared(family)
    first = make_inputs(family, model)
    second = make_inputs(family, model, seed=5) if CONTINUES else make_inputs(family, model, images=[0], seed=5)
    parts = PARTS[kind]
    with vtc.patch(model, parts):
        _, _, one = run(model, first, 6)
        ids = torch.cat([one.sequences, second["input_ids"]], 1)
        told = {k: v for k, v in second.items() if k in ("pixel_values", "image_sizes")}
        cache = copy.deepcopy(one.past_key_values)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache, **told}
        tokens, logits, out = run(model, turn, 6)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("pixel_values", "image_sizes"):
        if key in first:
            both = [first[key], *([told[key]] if key in told else [])]
            width = max(b.shape[1] for b in both)
            if key == "pixel_values" and family == "llava_next":
                both = [torch.cat([b, b.new_zeros(1, width - b.shape[1], *b.shape[2:])], 1) for b in both]
            whole[key] = torch.cat(both)
    # queries of turn 1 saw only turn 1, so one run over the whole conversation covers both turns
    plan = plan_of(model, whole, flat(parts), marks_of(model, whole))
    want_tokens, want, _ = hidden_reference(model, whole, plan, 6)
    assert torch.equal(tokens, want_tokens) and (logits - want).abs().max() < TOLERANCE
    for i in range(DECODER_LAYERS):
        gone = int(plan.hide[i].sum()) if i in plan.hide else 0
        layer = out.past_key_values.layers[i]
        assert layer.keys.shape[-2] == ids.shape[1] - gone + 5 and layer.get_seq_length() == ids.shape[1] + 5


@where(CONTINUES)
@pytest.mark.parametrize("kind", ["boundary+two-layers", "compact"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_text_prefix_already_cached(family, kind):
    """A system prompt was run before, even before patching; then text and image come on top."""
    model, inputs, plan = case(family, 1, kind)
    want_tokens, want, _ = hidden_reference(model, inputs, plan, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :4], past_key_values=cache)
    with vtc.patch(model, PARTS[kind]):
        tokens, logits, out = run(model, inputs | {"past_key_values": cache})
    assert torch.equal(tokens, want_tokens) and (logits - want).abs().max() < TOLERANCE
    assert out.past_key_values is cache and cache.get_seq_length() == inputs["input_ids"].shape[1] + 7


def test_caches_of_several_conversations_do_not_mix():
    model, inputs, _ = case("llava", 1)
    other = make_inputs("llava", model, seed=9)
    with vtc.patch(model, PARTS["compact"]), torch.no_grad():
        want = [run(model, d)[1] for d in (inputs, other)]
        tokens = [run(model, d)[0] for d in (inputs, other)]
        outs = [model(**d, use_cache=True) for d in (inputs, other)]
        for i in range(6):
            for n in (0, 1):
                assert (outs[n].logits[:, -1] - want[n][:, i]).abs().max() < TOLERANCE
                outs[n] = model(input_ids=tokens[n][:, i : i + 1], past_key_values=outs[n].past_key_values)


# ---------------------------------------------------------------------------------------------------------- static cache
@where(STATIC)
@pytest.mark.parametrize("impl", ["sdpa", "eager64"])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_static_cache(family, batch, kind, impl):
    model, inputs, _ = case(family, batch)
    model = shared(family, impl)
    with vtc.patch(model, PARTS[kind]):
        want = run(model, inputs)
        got = run(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(want[0], got[0]) and (want[1] - got[1]).abs().max() < TOLERANCE
    sizes = [[layer.keys.shape[-2] for layer in out.past_key_values.layers] for _, _, out in (want, got)]
    assert sizes[0] == sizes[1]  # the buffers themselves are smaller


@where(STATIC)
@pytest.mark.parametrize("kind", ["boundary+two-layers", "compact"])
@pytest.mark.parametrize("family", ["llava"])
def test_static_cache_compiled_decode(family, kind):
    from transformers import CompileConfig

    model, inputs = build(family), make_inputs(family, shared(family), 2)
    settings = CompileConfig(backend="aot_eager", mode=None)
    settings._compile_all_devices = True
    with vtc.patch(model, PARTS[kind]):
        want = run(model, inputs)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        got = run(model, inputs, cache_implementation="static", compile_config=settings)
    assert torch.equal(want[0], got[0]) and (want[1] - got[1]).abs().max() < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# --------------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("kind", PARTS)
def test_right_padding(kind):
    model, inputs, _ = case("llava", 2)
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).tolist()
    roll = {
        k: torch.stack([r.roll(n - length) for r, n in zip(inputs[k], real, strict=True)])
        for k in ("input_ids", "attention_mask")
    }
    with vtc.patch(model, PARTS[kind]), torch.no_grad():
        got = model(**inputs | roll).logits
        for row, n in enumerate(real):
            pixels = inputs["pixel_values"][:1] if row == 0 else inputs["pixel_values"][1:]
            alone = model(input_ids=roll["input_ids"][row : row + 1, :n], pixel_values=pixels).logits
            assert (alone[0] - got[row, :n]).abs().max() < TOLERANCE


def test_inputs_embeds_instead_of_ids():
    for family in ("llava", "llava_next"):
        model, inputs, _ = case(family, 2)
        embeds = {k: v for k, v in inputs.items() if k != "input_ids"}
        embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        with vtc.patch(model, PARTS["compact"]), torch.no_grad():
            assert torch.equal(model(**inputs).logits, model(**embeds).logits)


def test_logits_to_keep_and_inner_outputs():
    model, inputs, plan = case("llava", 2)
    model = shared("llava", "eager64")
    at = torch.tensor([3, 30, 40])
    with vtc.patch(model, PARTS["boundary+two-layers"]), torch.no_grad():
        full = model(**inputs, output_hidden_states=True, output_attentions=True)
        part = model(**inputs, logits_to_keep=at).logits
        last = model(**inputs, logits_to_keep=1).logits
        bare = model(**inputs, return_dict=False)
    assert (full.logits[:, at] - part).abs().max() < 1e-9 and (full.logits[:, -1:] - last).abs().max() < 1e-9
    assert torch.equal(bare[0], full.logits)
    real = inputs["attention_mask"].bool()
    held = [int((real & ~plan.hide[i]).sum(1).max()) for i in range(DECODER_LAYERS)]
    assert [a.shape[-1] for a in full.attentions] == held
    assert full.hidden_states[-1].shape[1] <= inputs["input_ids"].shape[1]
    assert held[0] < inputs["input_ids"].shape[1] and held[-1] < held[0]


@pytest.mark.parametrize("images", [[2, 0], [0, 1], [0, 3, 1]])
@pytest.mark.parametrize("kind", PARTS)
def test_rows_without_images(kind, images):
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, images=images)
    plan = plan_of(model, inputs, flat(PARTS[kind]), marks_of(model, inputs))
    want_tokens, want, _ = hidden_reference(model, inputs, plan, 6)
    with vtc.patch(model, PARTS[kind]) as handle:
        tokens, logits, _ = run(model, inputs, 6)
        assert len(handle.stats.last.images) == sum(images)
        rows = [row for row, n in enumerate(images) for _ in range(n)]
        assert [image.row for image in handle.stats.last.images] == rows
    assert torch.equal(tokens, want_tokens) and (logits - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_text_only_prompt(batch):
    model = shared("llava")
    inputs = make_inputs("llava", model, images=[0] * batch)
    want = run(model, inputs)
    with vtc.patch(model, ["uniform", "fastv"], keep=3) as handle:
        got = run(model, inputs)
        assert [call.text_only for call in handle.stats] == [True]
        assert not handle.stats.last.fired and handle.stats.last.images == []
    assert torch.equal(want[1], got[1]) and torch.equal(want[0], got[0])
    assert all(type(layer) is transformers.cache_utils.DynamicLayer for layer in got[2].past_key_values.layers)


def test_image_token_generated_in_decode_is_text():
    model, inputs, plan = case("llava", 1)
    with vtc.patch(model, PARTS["boundary+two-layers"]) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        before = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        out = model(input_ids=torch.tensor([[IMAGE_TOKEN]]), past_key_values=out.past_key_values)
        assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [n + 1 for n in before]
        assert len(handle.stats) == 1
    embeds = model.get_input_embeddings()(torch.tensor([[IMAGE_TOKEN]]))
    with vtc.patch(model, PARTS["boundary+two-layers"]), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        same = model(inputs_embeds=embeds, past_key_values=cache)
    assert torch.equal(same.logits, out.logits)


# -------------------------------------------------------------------------------------------------- copies, threads, hooks
@pytest.mark.parametrize(
    "wanted", [PARTS["boundary+two-layers"], PARTS["merge"], PARTS["encoder"], "fastv", ["uniform", "fastv"]]
)
def test_deepcopy_of_a_patched_model(wanted):
    model = build("llava")
    inputs = make_inputs("llava", model)
    base = run(model, inputs)[1]
    options = {"keep": 5} if isinstance(wanted, str) or isinstance(wanted[0], str) else {}
    vtc.patch(model, wanted, **options)
    want = run(model, inputs)[1]
    assert not torch.equal(want, base)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs)[1], want)
    vtc.unpatch(model)
    assert torch.equal(run(model, inputs)[1], base)
    assert torch.equal(run(twin, inputs)[1], want)
    vtc.unpatch(twin)
    assert torch.equal(run(twin, inputs)[1], base)
    fresh = {k: type(v) for k, v in vars(build("llava").model.language_model.layers[1].self_attn).items()}
    for left in (model, twin):
        assert {k: type(v) for k, v in vars(left.model.language_model.layers[1].self_attn).items()} == fresh


def test_deepcopy_then_unpatch_the_copy_first():
    model = build("llava")
    inputs = make_inputs("llava", model)
    base = run(model, inputs)[1]
    handle = vtc.patch(model, "fastv", keep=5)
    want = run(model, inputs)[1]
    twin = copy.deepcopy(model)
    vtc.unpatch(twin)
    assert torch.equal(run(twin, inputs)[1], base)
    handle.stats.clear()
    assert torch.equal(run(model, inputs)[1], want) and len(handle.stats) == 1
    vtc.unpatch(model)
    assert torch.equal(run(model, inputs)[1], base)


@pytest.mark.parametrize("kind", PARTS)
def test_threads(kind):
    model = shared("llava_next")
    prompts = [make_inputs("llava_next", model, 1 + i % 2, seed=i) for i in range(4)]
    errors = []
    with vtc.patch(model, PARTS[kind]) as handle:
        want = [run(model, d, 4)[1] for d in prompts]
        handle.stats.clear()

        def work(i):
            try:
                for _ in range(2):
                    assert torch.equal(run(model, prompts[i], 4)[1], want[i])
            except Exception as error:  # noqa: BLE001  reported by the main thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert not errors
        assert len(handle.stats) == 8 and all(call.fired for call in handle.stats)


def test_accelerate_hooks_in_any_order():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = build("llava")
    inputs = make_inputs("llava", model, 2)
    base = run(model, inputs)[1]
    with vtc.patch(model, PARTS["compact"]):
        want = run(model, inputs)[1]
    cpu_offload(model, execution_device="cpu")  # replaces every module's forward
    with vtc.patch(model, PARTS["compact"]):
        assert torch.equal(run(model, inputs)[1], want)
    assert torch.equal(run(model, inputs)[1], base)
    remove_hook_from_submodules(model)
    handle = vtc.patch(model, PARTS["compact"])
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(run(model, inputs)[1], want)
    remove_hook_from_submodules(model)  # removed in the other order
    assert torch.equal(run(model, inputs)[1], want)
    handle.remove()
    assert torch.equal(run(model, inputs)[1], base)


def test_quantized_linear_layers():
    """Weights are never touched, so quantized Linear modules are all the same to the hooks."""
    from torch.ao import quantization

    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", model)
    model.model.language_model = quantization.quantize_dynamic(model.model.language_model, {nn.Linear}, dtype=torch.qint8)
    base = run(model, inputs, 4)
    with vtc.patch(model, "fastv", keep=5) as handle:
        got = run(model, inputs, 4)
        assert handle.stats.last.images[0].tokens_per_layer == [16, 16, 5, 5, 5]
    assert got[1].isfinite().all() and not torch.equal(got[1], base[1])
    assert [layer.keys.shape[-2] for layer in got[2].past_key_values.layers] == [32, 32, 21, 21, 21]
    assert torch.equal(run(model, inputs, 4)[1], base[1])


def test_wrappers_are_looked_through():
    class Peft(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.base_model = inner

        def get_base_model(self):
            return self.base_model

    class Compiled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    model, inputs, _ = case("llava", 1)
    with vtc.patch(model, "fastv", keep=5):
        want = run(model, inputs)[1]
    for wrapped in (Peft(model), Compiled(Peft(model))):
        handle = vtc.patch(wrapped, "fastv", keep=5)
        assert torch.equal(run(model, inputs)[1], want) and handle.active
        assert vtc.unpatch(wrapped) is wrapped and not handle.active


def test_changing_the_attention_implementation_while_patched():
    model = build("llava", "eager", torch.float32)
    inputs = make_inputs("llava", model, 2)
    with vtc.patch(model, "fastv", keep=5):
        want = run(model, inputs)[1]
        model.set_attn_implementation("sdpa")
        got = run(model, inputs)[1]
    assert model.model.language_model.layers[1].self_attn.config._attn_implementation == "sdpa"
    assert (got - want).abs().max() < 1e-3
    assert not torch.equal(got, want)  # another kernel did run


def test_a_patched_model_can_be_saved(tmp_path):
    model, inputs, _ = case("llava", 1)
    model.save_pretrained(tmp_path / "plain")
    with vtc.patch(model, ["uniform", "fastv"], keep=5):
        model.save_pretrained(tmp_path / "patched")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes(), file.name


# ---------------------------------------------------------------------------------------------------- training and compile
@pytest.mark.parametrize("kind", ["boundary+two-layers", "compact", "encoder"])
def test_training_loss_and_gradients(kind):
    model = build("llava")
    inputs = make_inputs("llava", model, 2)
    plan = plan_of(model, inputs, flat(PARTS[kind]), marks_of(model, inputs))
    visual = visual_of(inputs)
    after = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], 1)  # predicted by the last *kept* token
    first = inputs["attention_mask"].cumsum(1) == 1  # "predicted" by a pad
    labels = inputs["input_ids"].masked_fill(visual | after | first | (inputs["attention_mask"] == 0), -100)

    def step(m, checkpoint=None):
        m.train()
        m.zero_grad()
        if checkpoint is not None:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpoint})
            m.enable_input_require_grads()
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        loss = m(**inputs, labels=labels, position_ids=positions, use_cache=False).loss
        loss.backward()
        if checkpoint is not None:
            m.gradient_checkpointing_disable()
            m.disable_input_require_grads()
        return loss.item(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    with oracle_model(model, plan) as twin:
        want, gradients = step(twin)
    plain, _ = step(model)
    assert abs(plain - want) > 1e-4
    with vtc.patch(model, PARTS[kind]):
        for checkpoint in (None, False, True):
            if checkpoint is not None and kind == "encoder" and upstream.checkpoint_repeats_hooks():
                # the recomputation comes when the call that chose is over
                with pytest.raises(vtc.UnsupportedFeatureError, match="disable gradient checkpointing"):
                    step(model, checkpoint)
                model.gradient_checkpointing_disable()
                continue
            loss, got = step(model, checkpoint)
            assert abs(loss - want) < 1e-6
            text = {n for n in gradients if "vision" not in n}
            assert set(got) >= text
            worst = max((got[n] - gradients[n]).abs().max().item() for n in got)
            assert worst < TOLERANCE, checkpoint


@where(upstream.checkpoint_repeats_hooks())
def test_checkpointing_of_merges_inside_the_decoder_is_refused():
    model = build("llava").train()
    inputs = make_inputs("llava", model)
    with vtc.patch(model, DecoderPicker(keep=5, merge=True)):
        want = model(**inputs, use_cache=False).logits
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pytest.raises(vtc.UnsupportedFeatureError, match="disable gradient checkpointing"):
            model(**inputs, use_cache=False)
        model.gradient_checkpointing_disable()
        assert torch.equal(model(**inputs, use_cache=False).logits, want)


@where(not upstream.checkpoint_repeats_hooks())
def test_checkpointing_of_merges_inside_the_decoder():
    model = build("llava").train()
    inputs = make_inputs("llava", model)

    def gradients():
        model.zero_grad()
        model(**inputs, use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with vtc.patch(model, [VisionPicker(keep=0.6, merge=True), DecoderPicker(keep=5, merge=True)]):
        want = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = gradients()
    assert want.keys() == got.keys() and all((got[n] - want[n]).abs().max() < TOLERANCE for n in want)


@pytest.mark.parametrize("kind", ["boundary-merge", "decoder-merge", "vision-merge"])
def test_gradients_through_merged_features(kind):
    part = {
        "boundary-merge": BoundaryPicker(keep=0.3, merge=True),
        "decoder-merge": DecoderPicker(keep=0.3, merge=True),
        "vision-merge": VisionPicker(keep=0.3, merge=True),
    }[kind]
    model = build("llava")
    inputs = make_inputs("llava", model)
    pixels = inputs["pixel_values"].requires_grad_()
    with vtc.patch(model, part):

        def loss(x):
            return model(**inputs | {"pixel_values": x}).logits[:, -1].logsumexp(-1).sum()

        (gradient,) = torch.autograd.grad(loss(pixels), pixels)
        direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=pixels.dtype)
        assert (gradient.flatten(1).abs().sum(1) > 0).all()
    # the choice follows the pixels' fingerprint, so a finite difference needs a frozen choice: compare with the reference
    marks = marks_of(model, {k: v.detach() for k, v in inputs.items()})
    plan = plan_of(model, {k: v.detach() for k, v in inputs.items()}, [part], marks)
    if kind != "vision-merge":  # there the reference's merged features are constants
        with oracle_model(model, plan) as twin:
            out = twin(**inputs, use_cache=False).logits[:, -1].logsumexp(-1).sum()
            (want,) = torch.autograd.grad(out, pixels)
        assert ((gradient - want) * direction).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["fastervlm", "fastv"])
def test_layers_compiled_one_by_one(name):
    """Every decoder layer becomes one graph without a break, and a second prompt of that length needs no other: for serving."""
    model = build("llava", dtype=torch.float32)
    inputs, others = make_inputs("llava", model), make_inputs("llava", model, seed=1)
    torch._dynamo.reset()
    with torch.no_grad(), vtc.patch(model, name, keep=6):
        want = [model(**x).logits for x in (inputs, others)]
        torch._dynamo.utils.counters.clear()
        layers = model.model.language_model.layers
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=False)
        got = [model(**x).logits for x in (inputs, others)]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(layers)
        assert not torch._dynamo.utils.counters["graph_break"]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_compiled_forward_and_patching_after_compiling():
    """A compiled patched forward is right, and a graph compiled before patching is not run unreduced behind the user's back."""
    model = build("llava", text=dict(num_hidden_layers=2), vision=dict(num_hidden_layers=2))
    inputs = make_inputs("llava", model)
    parts = [BoundaryPicker(keep=0.6), DecoderPicker(keep=0.3, layer=1)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        base = compiled(**inputs).logits
        with vtc.patch(model, parts):
            want = model(**inputs).logits
        with vtc.patch(compiled, parts) as handle:
            got = compiled(**inputs).logits
            assert len(handle.stats) == 1 and handle.stats.last.fired
        assert (got - want).abs().max() < TOLERANCE and (got - base).abs().max() > 1e-2
        assert (compiled(**inputs).logits - base).abs().max() < TOLERANCE
    torch._dynamo.reset()
