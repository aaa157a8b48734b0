"""Every family of the table against the references of test_oracle, and everything else a family must do.

Thinned: left-padded batches of two rows with one and two images unless a test says otherwise, two kinds of reducers (all that act
in the tower where the family has such stages), eager attention once. The families of test_oracle run the full product there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import warnings
from pathlib import Path

import families_report
import pytest
import torch
import transformers as hf
from cases import CASES as METHODS
from family_cases import CASES, DECODER_LAYERS, IMAGE_TOKEN, VIDEO_TOKEN
from models import build, image_features, image_spans, make_inputs, shared, visual_of
from pickers import BoundaryPicker, DecoderPicker, marks_of
from reference import hidden_generate, hidden_reference, oracle_model, plan_of
from test_oracle import KINDS, TOLERANCE, equal_to_reference, patched_generate, reducer_of, snapshot, unpatched
from torch import Tensor, nn

import vtc
from vtc.core import Kind
from vtc.engine.patch import handle_of
from vtc.families import adapters, family_of
from vtc.inspect import examine, reason_against
from vtc.signals import keys

NEW = [name for name in CASES if name not in ("llava_siglip", "unknown")]
"""All but a variant that runs all of test_oracle, and the model without adapter."""
NEWER = int(hf.__version__.split(".")[0]) >= 5

families = pytest.mark.parametrize("name", NEW)


def model_of(name: str, impl: str = "sdpa") -> nn.Module:
    return shared(name, impl, torch.float32 if CASES[name].float32 else torch.float64)


def facts_of(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return family_of(model_of(name)).facts


def tolerance(name: str) -> float:
    return 2e-4 if CASES[name].float32 else TOLERANCE


def kinds(name: str) -> list[str]:
    """What a family is run with."""
    facts = facts_of(name)
    wanted = ["boundary-merge", "boundary+decoder", "encoder-ragged", "vision-merge", "image"]
    if CASES[name].video or not CASES[name].exact or facts.merge > 1:
        wanted = wanted[:2]  # these calls refuse the stages of the tower; test_packed has those of packed towers
    if facts.merge > 1:  # inside a tower that merges squares: test_packed
        wanted = [k for k in wanted if k != "encoder-ragged"]
    return [k for k in wanted if all(not facts.stages[p.stage] for p in KINDS[k])]


def plans():
    for name in NEW:
        policies = ["original"] if facts_of(name).mrope else ["compact", "original"]
        for kind in kinds(name):
            runs = zip((2, 1) if kind == "boundary+decoder" else (2,), policies, strict=False)
            yield from ((name, batch, kind, positions, "sdpa") for batch, positions in runs)
        yield name, 2, "boundary+decoder", "original", "eager"


@pytest.mark.parametrize(("name", "batch", "kind", "positions", "impl"), plans())
def test_equals_reference(name, batch, kind, positions, impl, record_property):
    equal_to_reference(name, batch, kind, positions, impl, record=record_property)


# ------------------------------------------------------------------------------------------------------------- geometry
def described(name: str, model: nn.Module, inputs: dict[str, Tensor]):
    family = family_of(model)
    describe = family.describe_video if CASES[name].video else family.describe
    return describe({k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")})


def last_linear(module: nn.Module) -> nn.Linear:
    return [m for m in module.modules() if isinstance(m, nn.Linear)][-1]


def seen_keys(model: nn.Module, name: str, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """The tower's keys as a reducer is given them, for the slots of all images in order."""
    caught = []

    class Spy(BoundaryPicker):
        @property
        def needs(self):
            return (keys(layer),)

        def select(self, signals):
            caught.append((signals.entries, signals.keys))
            return super().select(signals)

    with vtc.patch(model, Spy(keep=1, newlines="compete")) as handle, torch.no_grad():
        handle.tower.on_record = lambda record, then=handle.tower.on_record: (caught.append(record), then(record))
        model(**inputs)
    record = next(c for c in caught if not isinstance(c, tuple))
    return torch.cat(next(iter(record.signals.values())))


@families
def test_slots_hold_their_patches(name):
    """Without mixing between patches, a changed pixel changes the feature and the signals of one and the same slot."""
    facts = facts_of(name)
    model = build(name, dtype=next(model_of(name).parameters()).dtype)
    family = family_of(model)
    for attention in family.encoder_attention:
        with torch.no_grad():
            for weight in last_linear(attention).parameters():
                weight.zero_()
    inputs = make_inputs(name, model, images=[2, 1])
    call = described(name, model, inputs)
    features = torch.cat(image_features(model, inputs))
    assert [len(s) for s in call.slots] == [len(f) for f in image_features(model, inputs)]
    assert sum(len(p) for p in call.patches) * (1 if call.cells is None else call.cells.shape[1]) >= sum(map(len, call.slots))
    layer = max(i for i in range(facts.encoder_layers) if i not in facts.windowed)
    before = seen_keys(model, name, inputs, layer)
    assert before.shape[0] == len(features)
    key = next(k for k in inputs if k.startswith("pixel_values"))
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(12):
        pixels = inputs[key].clone()
        place = int(torch.randint(pixels.numel(), (1,), generator=generator))
        if pixels.view(-1)[place] == 0:
            continue  # padding
        pixels.view(-1)[place] += 3
        moved = (torch.cat(image_features(model, inputs | {key: pixels})) - features).abs().amax(1) > 1e-9
        felt = (seen_keys(model, name, inputs | {key: pixels}, layer) - before).abs().amax(1) > 1e-9
        hits += int(moved.any())
        assert moved.sum() <= 1 or not CASES[name].exact
        assert torch.equal(moved, felt) if CASES[name].exact else not (felt & ~moved).any()
    assert hits > 3


@families
def test_layouts_are_in_raster_order(name):
    model = model_of(name)
    inputs = make_inputs(name, model, images=[2, 1])
    for slots, features in zip(described(name, model, inputs).slots, image_features(model, inputs), strict=True):
        assert slots.video == CASES[name].video and torch.equal(slots.slot, torch.arange(len(features)))
        patch = slots.kind == Kind.PATCH
        assert sum(r * c for r, c in slots.grids) >= int(patch.sum())
        new = (slots.view[1:] != slots.view[:-1]) | (slots.y[1:] > slots.y[:-1])
        if not CASES[name].anyres:
            assert ((slots.col.diff() == 1) | new)[patch[1:] & patch[:-1]].all()
            assert len(slots.grids) == slots.view.max() + 1
    four = make_inputs(name, model, images=[4])
    slots = described(name, model, four).slots
    assert any(slots[3] is other for other in slots[:3])  # geometries repeat: they share the object


# ------------------------------------------------------------------------------------------------------- keep all, unpatch
@families
def test_keeping_everything_and_unpatching_change_nothing(name):
    model = model_of(name)
    inputs = make_inputs(name, model, 2)
    dtype = next(model.parameters()).dtype
    tokens, logits = unpatched(name, 2, "sdpa", dtype)
    with vtc.patch(model, [BoundaryPicker(keep=1.0), DecoderPicker(keep=1.0, layer=3)]) as handle:
        got_tokens, got, _ = patched_generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and torch.equal(got, logits)
    assert all(image.kept == image.slots for image in handle.stats.images)
    before, deltas = snapshot(model), vars(model.model).get("rope_deltas")
    for kind in kinds(name):
        vtc.patch(model, reducer_of(kind, None))
        assert snapshot(model) != before
        patched_generate(model, inputs, 2)
        vtc.unpatch(model)
        if deltas is not None:  # the model's own memory of its last prompt
            model.model.rope_deltas = deltas
        assert snapshot(model) == before
    got_tokens, got, out = patched_generate(model, inputs)
    assert torch.equal(got_tokens, tokens) and torch.equal(got, logits)
    assert all(type(layer).__module__.startswith("transformers") for layer in out.past_key_values.layers)


# --------------------------------------------------------------------------------------------------------------- reducers
@families
def test_every_reducer_runs_or_is_refused(name):
    """Each registered reducer keeps fewer tokens, the same number in a batch as alone, or says why it cannot."""
    model, facts = model_of(name), facts_of(name)
    inputs = make_inputs(name, model, 2)
    slots = [len(c) for _, c in image_spans(inputs, model)]
    ran, fewer = 0, 0
    with torch.no_grad():
        base = model(**inputs).logits
    for reducer in vtc.list_reducers():
        if reason_against(reducer, facts):
            with pytest.raises(vtc.VtcError):
                vtc.patch(model, reducer, keep=0.5)
            continue
        with vtc.patch(model, reducer, keep=0.5) as handle, torch.no_grad():
            if handle.tower.part is not None and described(name, model, inputs).refuses:
                with pytest.raises(vtc.UnsupportedFeatureError, match="boundary or decoder"):
                    model(**inputs)
                continue
            try:
                logits = model(**inputs).logits
            except vtc.UnsupportedFeatureError as error:  # towers of 4.57 hand on what no hook can shorten
                assert not NEWER and "upgrade transformers" in str(error), reducer
                continue
            images = handle.stats.last.images
        assert logits[inputs["attention_mask"].bool()].isfinite().all(), reducer
        assert [image.slots for image in images] == slots, reducer
        assert all(image.fired for image in images), reducer
        assert (logits - base)[:, -1].abs().max() > 1e-5, reducer
        for image, kept in zip(images, handle.stats.kept, strict=True):
            last = image.stages[-1]
            newlines = int((kept.layout.kind[kept.entries] == Kind.NEWLINE).sum())
            counted = len(kept.entries) - newlines * (handle.reducer.newline_policy in ("all", "with_row"))
            if last.requested is not None and METHODS[reducer].count != "all":
                room = min(last.requested, last.before)
                assert counted == room if METHODS[reducer].count == "exact" else 1 <= counted <= room, reducer
        fewer += sum(image.kept for image in images) < sum(slots)
        ran += 1
    assert ran - 1 <= fewer >= 15  # one brings its tokens back behind the tower
    assert handle_of(model) is None


# ------------------------------------------------------------------------------------------------------------------ decode
PARTS = [BoundaryPicker(keep=0.7, ragged=True, positions="original"), DecoderPicker(keep=0.3, layer=3, positions="original")]


@functools.cache
def case(name: str, images: tuple[int, ...]):
    model = model_of(name)
    if getattr(model.config.get_text_config(), "sliding_window", None):  # the full-length reference cache must not evict
        model = build(name, text=dict(sliding_window=200))
    inputs = make_inputs(name, model, images=list(images))
    return model, inputs, plan_of(model, inputs, PARTS, marks_of(model, inputs))


@families
def test_rows_with_several_images_and_none(name):
    """Logits of every kept position, with a KV cache and without."""
    model, inputs, plan = case(name, (3, 1, 0))
    _, logits, prompt = hidden_reference(model, inputs, plan, 1)
    with vtc.patch(model, PARTS), torch.no_grad():
        _, got, _ = patched_generate(model, inputs, 1)
        whole = model(**inputs, use_cache=False).logits
    assert whole.shape == prompt.shape
    assert (got - logits).abs().max() < tolerance(name)
    if CASES[name].positions is not None:  # (without positions, models count padding)
        keep = inputs["attention_mask"].bool() & ~plan.hide[DECODER_LAYERS - 1]
        if facts_of(name).mrope:
            assert (whole - prompt)[keep].abs().max() < tolerance(name)


# 4.57 cannot expand the clips of Qwen3-VL for beams, patched or not
@pytest.mark.parametrize("name", [name for name in NEW if NEWER or name != "qwen3_vl:clips"])
def test_beams_and_sampling(name):
    # before 5.0 generate mixes up the images of rows with several, patched or not
    images = (1, 2) if NEWER else (1,)
    model, inputs, plan = case(name, images)
    beams = dict(max_new_tokens=5, num_beams=3, do_sample=False)
    want = hidden_generate(model, inputs, plan, 3, **beams)
    plain = hidden_generate(model, inputs, type(plan)(), 3, **beams)
    draws = dict(max_new_tokens=5, num_return_sequences=2, do_sample=True, output_logits=True, return_dict_in_generate=True)
    torch.manual_seed(3)
    drawn = hidden_generate(model, inputs, plan, 2, **{k: v for k, v in draws.items() if k != "return_dict_in_generate"})
    rows = itertools.cycle(drawn.sequences.tolist())  # asked row by row; the number handed in counts prompts in some releases
    with vtc.patch(model, PARTS), torch.no_grad():
        got = model.generate(**inputs, return_dict_in_generate=True, output_scores=True, **beams)
        # whatever the seed draws: the same tokens are forced on both, and what they are drawn from is compared
        forced = model.generate(**inputs, **draws, prefix_allowed_tokens_fn=lambda _, ids: [next(rows)[len(ids)]])
    assert torch.equal(got.sequences, want.sequences)
    assert (got.sequences_scores - want.sequences_scores).abs().max() < tolerance(name)
    assert (got.sequences_scores - plain.sequences_scores).abs().max() > 2 * tolerance(name)
    assert torch.equal(forced.sequences, drawn.sequences)
    for step, (mine, theirs) in enumerate(zip(forced.logits, drawn.logits, strict=True)):
        assert (mine - theirs).abs().max() < tolerance(name), step


@families
def test_second_turn(name):
    """A text-only turn continues the returned cache."""
    model, inputs, plan = case(name, (1,))
    more = torch.tensor([[11, 12, 13, 14]])
    with vtc.patch(model, PARTS):
        _, _, one = patched_generate(model, inputs, 4)
        ids = torch.cat([one.sequences, more], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": copy.deepcopy(one.past_key_values)}
        tokens, logits, out = patched_generate(model, turn, 4)
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    whole |= CASES[name].extra(ids, inputs["input_ids"].shape[1])
    steps = 4 if CASES[name].steps > 1 else 0  # (see the table)
    want_tokens, want, _ = hidden_reference(model, whole, plan, max(steps, 1), first=inputs["input_ids"].shape[1])
    assert torch.equal(tokens[:, :steps], want_tokens[:, :steps])
    assert not steps or (logits - want).abs().max() < tolerance(name)
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 3
    assert out.past_key_values.layers[DECODER_LAYERS - 1].keys.shape[-2] < ids.shape[1]


# ---------------------------------------------------------------------------------------------------------------- training
@families
def test_training_step(name):
    """Loss and gradients equal those of the model with hidden columns; with gradient checkpointing, too."""
    dtype = torch.float32 if CASES[name].float32 else torch.float64
    model = build(name, dtype=dtype)
    inputs = make_inputs(name, model, images=[1, 1])
    plan = plan_of(model, inputs, PARTS, marks_of(model, inputs))
    visual = visual_of(inputs)
    after = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], 1)  # predicted by the last *kept* token
    first = inputs["attention_mask"].cumsum(1) == 1  # "predicted" by a pad
    labels = inputs["input_ids"].masked_fill(visual | after | first | (inputs["attention_mask"] == 0), -100)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if CASES[name].positions is not None:
        positions = CASES[name].positions(model, inputs, positions)

    def step(m: nn.Module, checkpoint: bool = False):
        m.train()
        m.zero_grad()
        if checkpoint:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = m(**inputs, labels=labels, position_ids=positions, use_cache=False).loss
        loss.backward()
        if checkpoint:
            m.gradient_checkpointing_disable()
        return loss.item(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    with oracle_model(model, plan) as twin:
        want, gradients = step(twin)
    plain, _ = step(model)
    assert abs(plain - want) > 1e-4
    with vtc.patch(model, PARTS):
        for checkpoint in (False, True):
            loss, got = step(model, checkpoint)
            assert abs(loss - want) < tolerance(name)
            assert set(got) >= {n for n in gradients if "vis" not in n}
            worst = max((got[n] - gradients[n]).abs().max() / gradients[n].abs().max().clamp(min=1) for n in got)
            assert worst < 10 * tolerance(name), checkpoint


# ------------------------------------------------------------------------------------------------- dispatch and compilation
@families
def test_accelerate_dispatch(name):
    """Hooks that move weights and inputs from module to module, put on before the patch."""
    from accelerate import cpu_offload, dispatch_model

    model = build(name, dtype=next(model_of(name).parameters()).dtype)
    inputs = make_inputs(name, model, 2)
    with vtc.patch(model, PARTS), torch.no_grad():
        want = model(**inputs).logits
    # idefics3, and in 4.57 others, ask weights for their values or devices, which offloading hides, patched or not
    if name == "idefics3" or not NEWER:
        dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    else:
        cpu_offload(model, execution_device="cpu")
    with vtc.patch(model, PARTS), torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("where_to", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_a_projector_that_accelerate_keeps_elsewhere(name, where_to, tmp_path):
    """Zooprune computes with the projector's weights, which are on the meta device between calls."""
    from accelerate import cpu_offload, disk_offload

    model = build(name, dtype=torch.float32)
    inputs = make_inputs(name, model, 2)
    with vtc.patch(model, "zooprune", keep=0.4), torch.no_grad():
        want = model(**inputs).logits
    if where_to == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path), execution_device="cpu")
    with vtc.patch(model, "zooprune", keep=0.4), torch.no_grad():
        for _ in range(2):  # what the first call computed is not kept for other weights
            assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_vl"])
def test_compiled_decode_step_breaks_no_graph(name):
    """One for each kind of language model: a compiled step on a reduced cache is right, in as many graphs as unpatched."""
    model = build(name, text=dict(num_hidden_layers=3))
    parts_on = [BoundaryPicker(keep=0.7), DecoderPicker(keep=0.3, layer=2)]
    inputs = make_inputs(name, model)
    extra = {k: v for k, v in CASES[name].extra(torch.full((1, 1), 7), 0).items() if k == "token_type_ids"}

    def step(m: nn.Module, cache):
        return m(input_ids=torch.full((1, 1), 7), past_key_values=cache, use_cache=True, **extra).logits

    counts, outputs = [], []
    for parts in (None, parts_on):
        torch._dynamo.reset()
        handle = None if parts is None else vtc.patch(model, parts)
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            want = step(model, copy.deepcopy(cache))
            torch._dynamo.utils.counters.clear()
            got = step(torch.compile(model, backend="eager"), copy.deepcopy(cache))
        counts.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
        outputs.append(got)
        assert (got - want).abs().max() < TOLERANCE
        if handle is not None:
            handle.remove()
    torch._dynamo.reset()
    assert counts[1] <= counts[0] and (outputs[0] - outputs[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- refusals
def test_video_and_images_in_one_prompt():
    """Placeholders of both kinds, interleaved: each gets the features and the budget of its own."""
    for name in ("llava_next_video", "llava_onevision", "qwen2_vl", "qwen3_vl"):
        model = model_of(name)
        pictures, clips = (
            make_inputs(name, model, images=[1]),
            make_inputs(f"{name}:clips", shared(f"{name}:clips"), images=[1]),
        )
        ids = torch.cat([clips["input_ids"], pictures["input_ids"]], 1)
        inputs = {**clips, **pictures, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= CASES[name].extra(ids, ids.shape[1])
        with torch.no_grad():
            base = model(**inputs).logits
            with vtc.patch(model, "uniform", keep=0.5) as handle:
                got = model(**inputs).logits
        counts = {t: int((ids == t).sum()) for t in (IMAGE_TOKEN, VIDEO_TOKEN)}
        assert [image.slots for image in handle.stats.last.images] == list(counts.values())
        assert all(abs(image.kept - image.slots / 2) <= 1 for image in handle.stats.last.images)
        layouts = [k.layout for k in handle.stats.kept]
        assert [layout.video for layout in layouts] == [False, True] and got.shape == base.shape


@pytest.mark.parametrize("name", ["llava_next_video:clips", "qwen2_vl:clips", "qwen3_vl:clips"])
def test_budget_per_frame(name):
    model = model_of(name)
    inputs = make_inputs(name, model, images=[1])
    with vtc.patch(model, "uniform", keep=1, per="frame") as handle, torch.no_grad():
        model(**inputs)
    kept = handle.stats.kept[0]
    frames = kept.layout.view[kept.entries]
    assert kept.layout.video and torch.equal(frames.unique(), torch.arange(kept.layout.views))
    assert (frames.bincount() == 1).all()


def test_windowed_layers_give_no_signals():
    model = model_of("qwen2_5_vl")  # layers 1 and 3 see everything
    with pytest.raises(vtc.UnsupportedSignalError, match=r"tower layer -2, where attention sees only a window.*layers 1, 3"):
        vtc.patch(model, "fastervlm", keep=4)


def test_compact_positions_are_refused_under_mrope():
    with pytest.raises(vtc.UnknownArgumentError, match="M-RoPE"):
        vtc.patch(model_of("qwen2_vl"), "divprune", keep=4, positions="compact")
    with vtc.patch(model_of("qwen2_vl"), "divprune", keep=4) as handle:
        assert handle.reducer.positions == "original"


def test_deepstack_layers_are_not_shortened():
    with pytest.raises(vtc.UnknownArgumentError, match="layer 1 is out of range, use 2"):
        vtc.patch(model_of("qwen3_vl"), "fastv", keep=4, layer=1)


# ----------------------------------------------------------------------------------------------------------- odd inputs
@pytest.mark.parametrize("name", ["vipllava", "internvl", "idefics3", "mistral3", "llava_onevision"])
def test_embeddings_instead_of_ids(name):
    model, inputs, _ = case(name, (1, 2))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with vtc.patch(model, PARTS), torch.no_grad():
        want = model(**inputs).logits
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        assert torch.equal(model(inputs_embeds=embeds, **rest).logits, want)


@families
def test_placeholders_without_pixels_are_text_and_a_wrong_number_is_refused(name):
    model = model_of(name)
    inputs = make_inputs(name, model)
    ids = torch.tensor([[5, 6, VIDEO_TOKEN if CASES[name].video else IMAGE_TOKEN, 7]])
    stray = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer = {**inputs, **{k: torch.cat([inputs[k], v], 1) for k, v in stray.items()}}
    longer |= CASES[name].extra(longer["input_ids"], longer["input_ids"].shape[1])
    with torch.no_grad():
        want, whole = model(**stray).logits, model(**inputs).logits
        with pytest.raises((ValueError, RuntimeError)):
            model(**longer)
        with vtc.patch(model, "uniform", keep=0.5) as handle:
            assert torch.equal(model(**stray).logits, want) and handle.stats.last.text_only
            with pytest.raises((ValueError, RuntimeError)):
                model(**longer)
            assert (model(**inputs).logits - whole)[:, -1].abs().max() > 1e-6  # and goes on as if nothing had happened


# the Qwens cannot number the positions of such a row, patched or not
@pytest.mark.parametrize("name", [name for name in NEW if not name.startswith("qwen")])
def test_a_row_of_padding_only(name):
    model = model_of(name)
    inputs = make_inputs(name, model, images=[1])
    two = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            two[key] = torch.cat([inputs[key], torch.zeros_like(inputs[key])])
    if CASES[name].tiles:
        two["pixel_values"] = torch.cat([inputs["pixel_values"], torch.zeros_like(inputs["pixel_values"])])
    with vtc.patch(model, PARTS), torch.no_grad():
        want, got = model(**inputs).logits, model(**two).logits
    assert (got[:1] - want).abs().max() < tolerance(name) and got[0].isfinite().all()


@families
def test_features_made_before_patching_are_refused(name):
    model = model_of(name)
    inputs = make_inputs(name, model)
    taken = inspect.signature(model.model.forward).parameters
    if "mm_encoder_outputs" not in taken and "image_hidden_states" not in taken:
        return  # this release takes no features
    pixels = {k: v for k, v in inputs.items() if k.startswith("pixel_values") or k in ("image_sizes", "batch_num_images")}
    rest = {k: v for k, v in inputs.items() if k not in pixels}
    grid = {k: v for k, v in inputs.items() if k.endswith("_grid_thw")}

    def features():
        make = model.model.get_video_features if CASES[name].video else model.model.get_image_features
        with torch.no_grad():
            out = make(**pixels, **grid)
        if "mm_encoder_outputs" not in taken:
            return {"image_hidden_states": out}
        return {"mm_encoder_outputs": {"video" if CASES[name].video else "image": out}}

    before = features()
    with torch.no_grad():
        model(**rest, **before)
        with vtc.patch(model, "uniform", keep=0.5) as handle:
            with pytest.raises(vtc.UnsupportedFeatureError, match="were not made by the patched model"):
                model(**rest, **before)
            if "mm_encoder_outputs" in taken:
                assert torch.equal(model(**rest, **features()).logits, model(**inputs).logits)
                assert handle.stats.last.fired


def test_hooks_of_others_stay():
    model = build("internvl")
    inputs = make_inputs("internvl", model)
    lengths = []
    layer = model.model.language_model.layers[4]
    hook = layer.register_forward_hook(
        lambda m, args, out: lengths.append((out[0] if isinstance(out, tuple) else out).shape[-2])
    )
    with torch.no_grad():
        base = model(**inputs).logits
        with vtc.patch(model, PARTS):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, base)
    assert lengths[0] == lengths[2] == inputs["input_ids"].shape[1] > lengths[1]
    hook.remove()


# ------------------------------------------------------------------------------------------------------- unknown families
@pytest.mark.filterwarnings("ignore:models of type")
@pytest.mark.parametrize("kind", ["boundary-merge", "boundary+decoder"])
def test_a_model_without_adapter_equals_the_reference(kind):
    equal_to_reference("unknown", 2, kind, "compact", "sdpa")


def test_a_model_without_adapter_says_what_is_assumed():
    model = build("unknown")
    with pytest.warns(UserWarning, match="'deepseek_vl' have no adapter.*vtc assumes .*one entry per image.*square grid"):
        handle = vtc.patch(model, "uniform", keep=4)
    handle.remove()
    with pytest.warns(UserWarning, match="no adapter"), pytest.raises(vtc.UnsupportedSignalError, match="not known to vtc"):
        vtc.patch(model, "fastervlm", keep=4)
    with pytest.warns(UserWarning, match="no adapter"), pytest.raises(vtc.UnsupportedFeatureError, match="not known to vtc"):
        vtc.patch(model, "visionzip", keep=4)


def test_a_model_whose_structure_does_not_fit_is_refused():
    def refused(words: str) -> None:
        with pytest.raises(vtc.UnsupportedModelError, match=f"'deepseek_vl' are not supported.*{words}"):
            vtc.patch(model, "uniform", keep=4)

    model = build("unknown")
    object.__setattr__(model.model, "get_image_features", None)
    refused("get_image_features")
    model = build("unknown")
    del model.model.language_model.layers[1].self_attn
    refused("self_attn in every decoder layer")
    del model.model.language_model
    refused("no language model")
    model = build("unknown")
    vars(model.config)["image_token_id"] = None
    refused("id of the image token")


# ------------------------------------------------------------------------------------------------------------- vtc check
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)


def published(name: str):
    """Configs with the vision settings of well-known checkpoints (and a small language model)."""
    kin = dict(text_config=SMALL | {"model_type": "llama", "vocab_size": 40000}, image_token_index=32000)
    clip = dict(
        model_type="clip_vision_model",
        image_size=336,
        patch_size=14,
        num_hidden_layers=4,
        hidden_size=32,
        num_attention_heads=4,
    )
    siglip = dict(model_type="siglip_vision_model", num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    mrope = SMALL | dict(rope_scaling=dict(type="mrope", rope_type="default", mrope_section=[2, 1, 1]), vocab_size=160000)
    pins = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return {
        "llava-1.5": lambda: hf.LlavaConfig(**kin, vision_config=clip),
        "llava-next": lambda: hf.LlavaNextConfig(**kin, vision_config=clip, image_grid_pinpoints=pins),
        "paligemma-224": lambda: hf.PaliGemmaConfig(
            text_config=SMALL | {"model_type": "gemma", "vocab_size": 257300},
            vision_config=siglip | dict(image_size=224, patch_size=14, projection_dim=32),
        ),
        "gemma-3": lambda: hf.Gemma3Config(
            text_config=SMALL | dict(vocab_size=262300), vision_config=siglip | dict(image_size=896, patch_size=14)
        ),
        "internvl-3": lambda: hf.InternVLConfig(
            text_config=SMALL | {"model_type": "qwen2", "vocab_size": 160000},
            vision_config=dict(image_size=448, patch_size=14, num_hidden_layers=2, hidden_size=32, num_attention_heads=4),
        ),
        "smolvlm": lambda: hf.SmolVLMConfig(
            text_config=SMALL | {"model_type": "llama", "vocab_size": 130000},
            vision_config=dict(image_size=512, patch_size=16, num_hidden_layers=2, hidden_size=32, num_attention_heads=4),
            scale_factor=4,
        ),
        "mistral-3": lambda: hf.Mistral3Config(
            text_config=SMALL | {"model_type": "mistral", "head_dim": 8},
            vision_config=dict(model_type="pixtral", image_size=1540, patch_size=14, num_hidden_layers=2, hidden_size=32),
        ),
        "qwen2-vl": lambda: hf.Qwen2VLConfig(text_config=mrope, vision_config=dict(depth=2, embed_dim=32, num_heads=4)),
        "qwen2.5-vl": lambda: hf.Qwen2_5_VLConfig(text_config=mrope, vision_config=dict(depth=2, hidden_size=32, num_heads=4)),
    }[name]()


QWEN = dict(image_processor_type="Qwen2VLImageProcessor", min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
SETTINGS = {
    "gemma-3": dict(image_processor_type="Gemma3ImageProcessor", size=dict(height=896, width=896)),
    "internvl-3": dict(image_processor_type="GotOcr2ImageProcessor", size=dict(height=448, width=448)),
    "smolvlm": dict(
        image_processor_type="SmolVLMImageProcessor",
        do_image_splitting=True,
        max_image_size=dict(longest_edge=512),
        size=dict(longest_edge=2048),
    ),
    "mistral-3": dict(image_processor_type="PixtralImageProcessor", patch_size=14, size=dict(longest_edge=1540)),
    "qwen2-vl": QWEN,
    "qwen2.5-vl": QWEN,
}
"""Settings of the image processors of those checkpoints, where they decide."""


@pytest.mark.parametrize(
    ("name", "size", "tokens", "views"),
    [
        ("llava-1.5", (640, 480), 576, 1),
        ("llava-next", (640, 480), 2340, 5),  # documented for this model: 576 + 36 rows of 48 + 36 newlines
        ("paligemma-224", (640, 480), 256, 1),
        ("gemma-3", (640, 480), 256, 1),
        ("internvl-3", (640, 480), 13 * 256, 13),
        ("smolvlm", (640, 480), 13 * 64, 13),
        ("mistral-3", (1540, 1540), 3025, 1),
        ("mistral-3", (640, 480), 23 * 18, 1),
        ("qwen2-vl", (448, 448), 256, 1),
        ("qwen2.5-vl", (1000, 700), 36 * 25, 1),
        ("qwen2.5-vl", (20, 20), 4, 1),  # enlarged to 56 x 56
    ],
)
def test_check_counts_tokens_as_the_processor_does(name, size, tokens, views, tmp_path):
    published(name).save_pretrained(tmp_path)
    if name in SETTINGS:
        unknown = examine(str(tmp_path), size).count
        assert unknown.tokens is None and "whose settings (preprocessor_config.json) are not here" in unknown.why
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS[name]))
    report = examine(str(tmp_path), size)
    assert (report.count.tokens, report.count.views) == (tokens, views)
    ran = [reducer for reducer, reason in report.reducers.items() if not reason]
    assert {"uniform", "fastv", "divprune"} <= set(ran) and json.dumps(report.to_dict())


def test_check_reads_the_processor_of_the_folder(tmp_path):
    published("qwen2-vl").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 28 * 28 * 64}))
    assert examine(str(tmp_path), (1000, 1000)).count.tokens == 64


# --------------------------------------------------------------------------------------------------------------- one entry
def test_the_table_is_that_of_these_families():
    """Run the tests as tests/families_report.py says after adding a family or changing what one supports."""
    data = json.loads((families_report.RESULTS / "families.json").read_text())
    for run in data.values():
        assert set(run) == {c.family for name, c in CASES.items() if name != "unknown"}
    for family, run in data[max(data, key=lambda v: [int(p) for p in v.split(".")])].items():
        name = next(n for n, c in CASES.items() if c.family == family)
        assert run["stages"] == {stage.value: reason for stage, reason in facts_of(name).stages.items()}
    assert (families_report.RESULTS / "families.md").read_text() == families_report.table(data) + "\n"
    assert (families_report.RESULTS / "families-reasons.md").read_text() == families_report.reasons(data) + "\n"


def test_a_family_is_one_file_and_one_entry():
    """Nothing but its adapter and the test table names a family."""
    root = Path(vtc.__file__).parent
    prompts = {"paligemma": {"inputs.py"}}  # vtc.verify's: what its token types say of a prompt, no class tells
    mine = {case.family for name, case in CASES.items() if name != "unknown"}
    # kin of one that is in the table, by the same adapter: tests/test_released.py runs them
    kin = {"qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v", "exaone4_5"}
    assert (
        len(mine) >= 14 and set(adapters()) - mine <= {"timm", "colpali", "colqwen2", *kin} and mine <= set(vtc.list_families())
    )
    for kind in mine - {"llava", "llava_next"}:
        shared_files = [f for f in Path(__file__).parent.glob("*.py") if not f.name.startswith("test_")]
        naming = {f.name for f in [*root.rglob("*.py"), *shared_files] if f'"{kind}"' in f.read_text()}
        ours = {f.name for f in (root / "families").glob("*.py")}
        assert naming - ours == {"family_cases.py"} | prompts.get(kind, set()) and len(naming & ours) == 1, (kind, naming)
    for kind in mine:
        assert len(Path(adapters()[kind].__file__).read_text().splitlines()) <= 100, kind


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_methods_that_compare_frames_say_where_there_are_none(name):
    """InternVL and SmolVLM take a video as tiles: whoever patches is told, before any statistics."""
    with pytest.warns(UserWarning, match=f"'evs' compares the frames of a clip, and to '{name}' they are tiles"):
        vtc.patch(model_of(name), "evs", keep=0.5).remove()
    assert "InternVL and SmolVLM" in vtc.info("evs").cls.__doc__
    for other, reducer in ((name, "uniform"), ("llava_onevision", "evs"), ("llava", "evs"), ("idefics3", "evs")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vtc.patch(model_of(other), reducer, keep=0.5).remove()
