"""Sliding windows: a shortened cache holds what the next token may look at, counted in logical columns, and no more."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from typing import Any

import pytest
import torch
import transformers
import transformers as hf
from family_cases import CASES, OTHERS
from models import build, make_inputs, set_attention, shared, where
from pickers import BoundaryPicker, DecoderPicker, marks_of
from reference import hidden_reference, plan_of
from test_oracle import TOLERANCE, patched_generate
from torch import Tensor, nn
from transformers import DynamicCache

import vtc
from vtc.engine import upstream
from vtc.engine.cache import PrunedLayer, PrunedSlidingLayer, learn_fronts, pruned_layer
from vtc.engine.segment import cut
from vtc.errors import UnsupportedFeatureError

pytestmark = pytest.mark.filterwarnings("ignore:models of type")
EVERY = [*CASES, *OTHERS]
WINDOWED = ["gemma3", *(n for n in OTHERS if n not in ("ministral3", "mistral4", "pixtral"))]
"""Families whose tiny models have windows shorter than their prompts."""
PARTS = {
    "boundary": [BoundaryPicker(keep=0.4, ragged=True)],
    "decoder": [DecoderPicker(keep=0.4, ragged=True, positions="original")],
    "both": [BoundaryPicker(keep=0.7, ragged=True), DecoderPicker(keep=0.3, layer=3, salt=2)],
}
RECORDS = hasattr(upstream.WindowLayer, "activate_past_recording")
"""Before, assisted decoding is given a cache without windows."""


def parts_of(name: str, kind: str) -> list[Any]:
    mrope = name.startswith("qwen")
    return [dataclasses.replace(p, positions="original") if mrope else p for p in PARTS[kind]]


@functools.cache
def model_of(name: str) -> nn.Module:
    return shared(name, "sdpa", torch.float32 if (CASES | OTHERS)[name].float32 else torch.float64)


def held(cache: Any) -> list[tuple[int, int]]:
    """Bytes of each layer's keys and values: of their elements, and of the memory they keep."""
    out = []
    for layer in cache.layers:
        tensors = (layer.keys, layer.values)
        out.append((sum(t.nbytes for t in tensors), sum(t.untyped_storage().nbytes() for t in tensors)))
    return out


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", EVERY)
def test_no_family_holds_more_than_unpatched(name: str, kind: str) -> None:
    """After the prompt, after every step, after a second turn; layer by layer."""
    model = model_of(name)
    inputs = make_inputs(name, model, 2)
    more = torch.tensor([[11, 12, 13, 14, 15]] * 2)
    step = [torch.full((2, 1), t) for t in range(20, 36)]

    def sizes() -> list[list[tuple[int, int]]]:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            out = [held(cache)]
            for ids in (*step[:8], more, *step[8:]):
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                out.append(held(cache))
        return out

    plain = sizes()
    with vtc.patch(model, parts_of(name, kind)):
        mine = sizes()
    for a, b in zip(mine, plain, strict=True):
        assert all(x <= y for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))
    assert sum(n for n, _ in mine[0]) < sum(n for n, _ in plain[0])


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", WINDOWED)
def test_what_no_later_token_sees_is_gone(name: str, batch: int, kind: str) -> None:
    """Answers are the reference's, and each layer stores the columns the next token may look at, those of the neediest row."""
    model = model_of(name)
    inputs, steps = make_inputs(name, model, batch), 14
    plan = plan_of(model, inputs, PARTS[kind], marks_of(model, inputs))
    tokens, logits, _ = hidden_reference(model, inputs, plan, steps)
    with vtc.patch(model, PARTS[kind]):
        for n in (1, steps // 2, steps):
            got_tokens, got, out = patched_generate(model, inputs, n)
            assert torch.equal(got_tokens, tokens[:, :n]) and (got - logits[:, :n]).abs().max() < TOLERANCE
            real = inputs["attention_mask"].bool()
            shorter = 0
            for i, layer in enumerate(out.past_key_values.layers):
                there = (real & ~plan.hide[i]) if i in plan.hide else torch.ones_like(real)
                there = torch.cat([there, torch.ones(batch, n - 1, dtype=torch.bool)], 1)
                window = upstream.window_of(model.model.language_model.config, i)
                if window is not None:
                    assert there.shape[1] > window
                    shorter += int(there[:, -window + 1 :].sum(1).max()) < min(int(there.sum(1).max()), window - 1)
                    there = there[:, -window + 1 :]
                assert layer.keys.shape[-2] == int(there.sum(1).max()), i
                assert layer.get_seq_length() == real.shape[1] + n - 1
            assert n > 1 or shorter or kind == "decoder", "the window's edge lies among visual tokens"


# ------------------------------------------------------------------------------------------------- turns, beams, cropping
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("more", [(7,), (0, 9), (3, 30)], ids=str)
def test_turns(name: str, more: tuple[int, ...]) -> None:
    """Text in front that is longer than the window, then the picture, then more text: evicting at each stage changes nothing."""
    model = model_of(name)
    window = min(w for w in (upstream.window_of(model.model.language_model.config, i) for i in range(5)) if w)
    inputs = make_inputs(name, model)
    before = torch.arange(30, 30 + window + 6)[None]
    whole = torch.cat([before, inputs["input_ids"], torch.arange(10, 10 + sum(more))[None]], 1)
    start = before.shape[1] + inputs["input_ids"].shape[1]
    text = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    text |= {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    text |= (CASES | OTHERS)[name].extra(whole, start)
    plan = plan_of(model, text, PARTS["both"], marks_of(model, inputs))
    _, _, want = hidden_reference(model, text, plan, 1, first=start)

    def talk(cache: DynamicCache) -> tuple[Tensor, list[int]]:
        model(input_ids=before, past_key_values=cache)
        got = [model(**inputs | {"attention_mask": None}, past_key_values=cache).logits[:, -1]]
        assert cache.get_seq_length() == start
        at, ends = start, [start - 1]
        for n in filter(None, more):
            got.append(model(input_ids=whole[:, at : at + n], past_key_values=cache).logits[:, -1])
            at += n
            ends.append(at - 1)
        assert {cache.get_seq_length(i) for i in range(5)} == {at}
        return torch.stack(got, 1), ends

    cache, whole_cache = DynamicCache(config=model.config), DynamicCache()
    if name == "gemma3" and hf.__version__ < "5":  # which takes no picture behind a cache
        with torch.no_grad(), pytest.raises(IndexError):
            talk(cache)
        return
    with torch.no_grad(), vtc.patch(model, PARTS["both"]):
        got, ends = talk(cache)
        assert (got - talk(whole_cache)[0]).abs().max() < TOLERANCE
    if name != "gemma3":  # a picture behind a cache is not seen both ways there, patched or not
        assert (got - want[:, ends]).abs().max() < TOLERANCE
    for i, layer in enumerate(cache.layers):
        reach = upstream.window_of(model.model.language_model.config, i)
        assert reach is None or layer.keys.shape[-2] < reach < whole_cache.layers[i].keys.shape[-2]


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", WINDOWED)
def test_beams(name: str, kind: str) -> None:
    """A cache whose layers all keep everything gives the same beams and scores."""
    model = model_of(name)
    inputs = make_inputs(name, model, images=[1, 1])
    options = dict(max_new_tokens=14, num_beams=3, num_return_sequences=2, do_sample=False, return_dict_in_generate=True)
    with vtc.patch(model, PARTS[kind]), torch.no_grad():
        want = model.generate(**inputs, past_key_values=DynamicCache(), output_scores=True, **options)
        got = model.generate(**inputs, output_scores=True, **options)
    assert torch.equal(got.sequences, want.sequences) and (got.sequences_scores - want.sequences_scores).abs().max() < TOLERANCE
    sizes = [
        (a.keys.shape[-2], b.keys.shape[-2])
        for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True)
    ]
    assert any(a < b for a, b in sizes) and all(a <= b for a, b in sizes)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", WINDOWED)
def test_prompt_lookup_decoding(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are verified together and rejected ones cropped off; afterwards no layer holds more than it needs."""
    model = build(name)
    inputs = make_inputs(name, model)
    model.generation_config.eos_token_id = 103  # 4.57 needs one here; it is suppressed
    repeat = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 7, 8]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], repeat], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs |= (CASES | OTHERS)[name].extra(inputs["input_ids"], inputs["input_ids"].shape[1])
    crops, plain = [], PrunedSlidingLayer.crop
    monkeypatch.setattr(PrunedSlidingLayer, "crop", lambda self, n: (crops.append(n), plain(self, n))[1])
    with vtc.patch(model, PARTS[kind]), torch.no_grad():
        want = patched_generate(model, inputs, 16)
        got = patched_generate(model, inputs, 16, prompt_lookup_num_tokens=3)
    assert torch.equal(got[0], want[0])
    if RECORDS:
        assert any(crops)
        for a, b in zip(got[2].past_key_values.layers, want[2].past_key_values.layers, strict=True):
            assert a.get_seq_length() - b.get_seq_length() == got[2].past_key_values.get_seq_length() - b.get_seq_length()
            assert a.keys.shape[-2] <= b.keys.shape[-2] + 1


def test_cropping_comes_back_only_to_what_is_there() -> None:
    model = model_of("gemma3")
    inputs, ids = make_inputs("gemma3", model), torch.arange(10, 30)[None]
    with vtc.patch(model, PARTS["boundary"]), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for i in range(4):  # 12 tokens beyond the prompt: the window has passed the picture
            model(input_ids=ids[:, 3 * i : 3 * i + 3], past_key_values=cache)
        same, other = copy.deepcopy(cache), copy.deepcopy(cache)
        if RECORDS:
            same.activate_past_recording()
            model(input_ids=ids[:, 12:17], past_key_values=same)
            assert same.layers[0].keys.shape[-2] > cache.layers[0].keys.shape[-2]
            same.crop(-5)
            for a, b in zip(cache.layers, same.layers, strict=True):
                assert torch.equal(a.keys, b.keys) and a.get_seq_length() == b.get_seq_length()
            want = model(input_ids=ids[:, 12:13], past_key_values=cache).logits
            assert (model(input_ids=ids[:, 12:13], past_key_values=same).logits - want).abs().max() < TOLERANCE
        model(input_ids=ids[:, 12:17], past_key_values=other)
        sizes = [layer.keys.shape[-2] for layer in other.layers]
        with pytest.raises(UnsupportedFeatureError, match="sliding windows have thrown away"):
            other.crop(-5)
        assert [layer.keys.shape[-2] for layer in other.layers] == sizes


@where(int(transformers.__version__.split(".")[0]) >= 5)  # 4.57's reset() leaves zeros in place, reduced or not
def test_an_emptied_cache_serves_text_and_pictures() -> None:
    """reset(): text with padding, longer than the window, then a prompt with a picture once more."""
    model = model_of("gemma3")
    inputs = make_inputs("gemma3", model)
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with vtc.patch(model, PARTS["boundary"]), torch.no_grad():
        want = model(**inputs, use_cache=True)
        cache = want.past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        plain = DynamicCache(config=model.config)
        for tokens, padding in ((ids, mask), (ids[:, :1], torch.cat([mask, mask[:, -1:]], 1))):
            a, b = (model(input_ids=tokens, attention_mask=padding, past_key_values=c).logits for c in (cache, plain))
            assert torch.equal(a[padding[:, -a.shape[1] :].bool()], b[padding[:, -a.shape[1] :].bool()])
        assert [a.keys.shape for a in cache.layers] == [b.keys.shape for b in plain.layers]
        cache.reset()
        again = model(**inputs, past_key_values=cache)
        assert torch.equal(again.logits, want.logits)


# ----------------------------------------------------------------------------------------- hybrid, static and flash
@pytest.mark.parametrize("where", ["generation_config", "config"])
@pytest.mark.parametrize("name", [n for n in WINDOWED if n != "gemma4"])
def test_a_hybrid_cache_of_the_models_files_is_what_transformers_makes_of_it(name: str, where: str) -> None:
    """Gemma 3, Aya-Vision and Command-A-Vision ship with ``cache_implementation: hybrid``, which stands for nothing now."""
    model = build(name, text=dict(cache_implementation="hybrid") if where == "config" else {})
    if where == "generation_config":
        model.generation_config.cache_implementation = "hybrid"
    inputs = make_inputs(name, model)
    with vtc.patch(model_of(name), PARTS["both"]):
        want = patched_generate(model_of(name), inputs, 6)
    with vtc.patch(model, PARTS["both"]):
        assert model.generation_config.cache_implementation == "hybrid"
        got = patched_generate(model, inputs, 6)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert {type(layer) for layer in got[2].past_key_values.layers} <= {PrunedLayer, PrunedSlidingLayer}


def test_a_hybrid_cache_that_the_call_asks_for() -> None:
    """Newer releases take it for unset there, too; 4.57 makes a static cache of it, which is refused before anything runs."""
    model, ran = model_of("gemma3"), []
    inputs = make_inputs("gemma3", model)
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with vtc.patch(model, PARTS["boundary"]), torch.no_grad():
        try:
            model.generate(**inputs, max_new_tokens=2, cache_implementation="hybrid")
            assert ran
        except UnsupportedFeatureError as error:
            assert not ran and "cache layers of type Static" in str(error)
    hook.remove()


@pytest.mark.parametrize("name", WINDOWED)
def test_static_caches_of_windows_are_refused_before_anything_runs(name: str) -> None:
    model, ran = model_of(name), []
    inputs = make_inputs(name, model)
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with vtc.patch(model, PARTS["boundary"]), pytest.raises(UnsupportedFeatureError, match="DynamicCache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    hook.remove()
    assert not ran


MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def with_text_under(impl: str, name: str, window: int) -> nn.Module:
    kinds = {} if name.startswith("mistral3") else dict(use_sliding_window=True, layer_types=MIXED)
    model = build(name, text=dict(sliding_window=window, **kinds))
    set_attention(model.model.language_model, impl)
    return model


@pytest.mark.parametrize("images", [[1], [1, 1], [0, 1], "first"], ids=str)
@pytest.mark.parametrize("name", ["mistral3:windowed", "internvl"])
def test_flash_attention_within_and_beyond_the_window(name: str, images: list[int] | str) -> None:
    """Decode steps beyond the window are right (its window counts tokens that are there); longer prompts are refused.

    In the last batches, what has left one row's window stands beside what has not left another's.
    """
    parts = [BoundaryPicker(keep=3), DecoderPicker(keep=1, positions="original")]
    inputs = make_inputs(name, shared(name), images=[1, 1] if images == "first" else images)
    if images == "first":  # no padding, and the second row begins with its picture
        ids = inputs["input_ids"][:1]
        inputs["input_ids"] = torch.cat([ids, ids.roll(-6)])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs |= {"image_sizes": inputs["image_sizes"][:1].repeat(2, 1)} if "image_sizes" in inputs else {}
    window = inputs["input_ids"].shape[1] + 3
    want_of, model = with_text_under("sdpa", name, window), with_text_under("fake_flash", name, window)
    with vtc.patch(want_of, parts):
        want = patched_generate(want_of, inputs, 24)
    with vtc.patch(model, parts):
        got = patched_generate(model, inputs, 24)
        assert torch.equal(got[0], want[0]) and (got[1] - want[1]).abs().max() < TOLERANCE
        longer = make_inputs(name, model, images=[3])
        with pytest.raises(UnsupportedFeatureError, match="FlashAttention counts the window.*attn_implementation='sdpa'"):
            model(**longer)
        with pytest.raises(UnsupportedFeatureError, match="FlashAttention counts the window"):
            model(**longer, use_cache=False)


# ------------------------------------------------------------------------------------------------------ one cache layer
class Book:
    """What a layer should hold: for every row the keys of all columns it was ever given, as numbers."""

    def __init__(self, rows: int) -> None:
        self.rows: list[dict[int, float]] = [{} for _ in range(rows)]
        self.length = 0


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_of_operations(seed: int) -> None:
    """Prompts, steps, turns with and without pictures, beams, repeated and chosen rows, cropping: what is visible is there."""
    dice, window = random.Random(seed), random.Random(seed).choice([2, 5, 9, 30])
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    cache.layers = [upstream.WindowLayer(sliding_window=window)]
    book, number = Book(dice.choice([1, 3])), [0.0]

    def numbers(rows: int, n: int) -> Tensor:
        number[0] += 1
        return number[0] + torch.rand(rows, 1, n, 2, generator=generator, dtype=torch.float64)

    def add(keep: Tensor | None, q: int) -> None:
        rows = len(book.rows)
        if keep is None:
            keys = numbers(rows, q)
            columns = torch.arange(q).expand(rows, -1)
            valid = torch.ones(rows, q, dtype=torch.bool)
        else:
            seg, _ = cut(keep, keep.sum(1).tolist(), None, None, False)
            layer = pruned_layer(cache, 0)
            layer.begin(seg, q)
            keys, columns = numbers(rows, seg.rows.shape[1]), seg.rows
            valid = torch.ones_like(columns, dtype=torch.bool) if seg.valid is None else seg.valid
        for r in range(rows):
            book.rows[r] |= {
                book.length + int(c): float(k[0]) for c, k, v in zip(columns[r], keys[r, 0], valid[r], strict=True) if v
            }
        book.length += q
        layer = cache.layers[0]
        layer.update(keys, keys)
        if keep is not None and dice.random() < 0.7:
            learn_fronts([layer])
        check()

    def check() -> None:
        layer, lowest = cache.layers[0], book.length - window + 1
        assert layer.get_seq_length() == book.length
        if not isinstance(layer, PrunedSlidingLayer):
            return
        cols, valid = layer.columns()
        assert cols.shape[1] == layer.keys.shape[-2] == layer.stored()
        assert layer.get_mask_sizes(1) == (min(book.length, window - 1) + 1, max(lowest, 0))
        for r, row in enumerate(book.rows):
            mine = {
                int(c): float(k[0])
                for j, (c, k) in enumerate(zip(cols[r], layer.keys[r, 0], strict=True))
                if valid is None or valid[r, j]
            }
            assert mine.items() <= row.items(), "columns have their own keys"
            assert {c for c in row if c >= lowest} <= mine.keys(), "what the next token sees is there"
        if not layer.record_past:
            assert layer.stored() <= max(window - 1, 0)
            if layer.front is not None:
                needed = max(sum(c >= max(lowest, 0) for c in row) for row in book.rows)
                exact = all(len(book.rows) == n for n in counts)
                assert layer.stored() == needed if exact else layer.stored() >= needed

    counts: list[int] = [len(book.rows)]
    for _ in range(24):
        what, rows = dice.choice(["step", "step", "text", "picture", "beams", "repeat", "select", "crop"]), len(book.rows)
        layer = cache.layers[0]
        if what in ("beams", "repeat", "select") and not book.length:
            continue
        if what == "step":
            add(None, 1)
        elif what == "text":
            add(None, dice.randint(2, 12))
        elif what == "picture":
            q = dice.randint(4, 20)
            keep = torch.rand(rows, q, generator=generator) < 0.5
            keep[:, -1] = True
            add(keep, q)
        elif what == "crop" and book.length and isinstance(layer, PrunedSlidingLayer):
            if RECORDS:
                layer.activate_past_recording()
            n = dice.randint(1, 3)
            add(None, n + dice.randint(0, 2))
            if RECORDS:
                layer.crop(-n)
                book.length -= n
                book.rows = [{c: k for c, k in row.items() if c < book.length} for row in book.rows]
                layer.record_past = False
            check()
        elif what == "beams":
            index = torch.tensor([dice.randrange(rows) for _ in range(rows)])
            layer.reorder_cache(index)
            book.rows = [dict(book.rows[i]) for i in index.tolist()]
            counts.append(0 if len({*index.tolist()}) < rows else rows)
            check()
        elif what == "repeat" and rows == 1:
            layer.batch_repeat_interleave(2)
            book.rows = [dict(book.rows[0]) for _ in range(2)]
            counts.append(0)
            check()
        elif what == "select" and rows > 1:
            layer.batch_select_indices(torch.tensor([rows - 1]))
            book.rows = [book.rows[-1]]
            counts.append(0)
            check()


def test_only_windows_evict() -> None:
    """Layers that see everything keep everything."""
    model = model_of("gemma3")
    inputs = make_inputs("gemma3", model)
    with vtc.patch(model, PARTS["boundary"]):
        out = patched_generate(model, inputs, 12)[2]
    kinds = [type(layer) for layer in out.past_key_values.layers]
    assert kinds == [PrunedSlidingLayer, PrunedSlidingLayer, PrunedLayer, PrunedSlidingLayer, PrunedLayer]
    assert all(layer.skip == 0 for layer in out.past_key_values.layers if type(layer) is PrunedLayer)
    assert len({id(layer.cols) for layer in out.past_key_values.layers}) == 1, "layers share columns, and so their masks"
