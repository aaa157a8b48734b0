"""Prompt and answer in one forward: only the prompt decides what stays, as in ``generate``. And features merged beforehand."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from models import build, make_inputs, shared

import vtc
from vtc.errors import UnknownArgumentError

STEPS = 5
ROUNDING = 5e-5
"""``generate`` keeps logits in float32; one token more or less that is kept makes over a thousand times as much."""


def taught(inputs, sequences):
    """Prompt and answer as one batch, and its labels."""
    new = sequences[:, inputs["input_ids"].shape[1] :]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), new], 1)
    return {**inputs, "input_ids": sequences, "attention_mask": mask}, labels


def answered(model, inputs, **options):
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", [n for n in vtc.list_reducers() if n in CASES])
def test_teaching_and_generating_give_the_same_logits(name):
    """Left-padded rows with one and two pictures; by labels, and by the length of the prompt."""
    model = shared("llava")
    inputs = make_inputs("llava", model, batch=2)
    start = inputs["input_ids"].shape[1]
    with vtc.patch(model, name, **CASES[name].harsh) as handle:
        sequences, logits = answered(model, inputs)
        kept = [(i.row, i.tokens_per_layer) for i in handle.stats.last.images]
        whole, labels = taught(inputs, sequences)
        by_labels = model(**whole, labels=labels).logits[:, start - 1 : -1]
        assert [(i.row, i.tokens_per_layer) for i in handle.stats.last.images] == kept
        handle.prompt_length = start
        by_length = model(**whole).logits[:, start - 1 : -1]
    assert (by_labels - logits).abs().max() < ROUNDING and torch.equal(by_labels, by_length)


@pytest.mark.parametrize("name", ["aim", "cdpruner", "corematching", "fastv", "ptp", "pyramiddrop", "script", "sparsevlm"])
def test_without_either_the_answer_has_a_say(name):
    """These look at the last token, the question or all of the text: the tests above would notice."""
    model = shared("llava")
    inputs = make_inputs("llava", model, batch=2)
    start = inputs["input_ids"].shape[1]
    with vtc.patch(model, name, **CASES[name].harsh):
        sequences, logits = answered(model, inputs)
        whole, _ = taught(inputs, sequences)
        assert (model(**whole).logits[:, start - 1 : -1] - logits).abs().max() > 1000 * ROUNDING


def test_rows_padded_on_the_right_have_a_prompt_of_their_own_length():
    model = shared("llava")
    single = make_inputs("llava", model, images=[1], seed=3)
    with vtc.patch(model, "fastv", keep=5, layer=1) as handle:
        sequences, logits = answered(model, single)
        start = single["input_ids"].shape[1]
        whole, labels = taught(single, sequences)
        short = start + 2  # the second row's answer has two tokens, and padding behind
        both = {k: torch.cat([v, v]) for k, v in whole.items()}
        both["attention_mask"][1, short:] = 0
        labels = torch.cat([labels, labels])
        labels[1, short:] = -100
        out = model(**both, labels=labels).logits[:, start - 1 :]
        handle.prompt_length = [start, start]
        again = model(**both).logits[:, start - 1 :]
    for got in (out, again):
        assert (got[0, :-1] - logits[0]).abs().max() < ROUNDING and (got[1, :2] - logits[0, :2]).abs().max() < ROUNDING


@pytest.mark.parametrize("labels", ["whole", "text", "none"])
def test_labels_that_mark_no_prompt_change_nothing(labels):
    """Those of a whole text, with and without its placeholders, and such that mask everything."""
    model = shared("llava")
    inputs = make_inputs("llava", model, batch=2)
    ids = inputs["input_ids"]
    masked = {
        "whole": inputs["attention_mask"] == 0,
        "text": ids == model.config.image_token_id,
        "none": torch.ones_like(ids) > 0,
    }
    with vtc.patch(model, "fastv", keep=5, layer=1):
        plain = model(**inputs).logits
        given = model(**inputs, labels=ids.masked_fill(masked[labels], -100)).logits
    assert torch.equal(plain, given)


def test_labels_of_one_call_are_gone_in_the_next_also_after_an_error():
    from vtc.engine.context import LABELS

    model = build("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, "uniform", keep=5):
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever torch says of labels of another shape
            model(**inputs, labels=torch.zeros(1, 3, 4, dtype=torch.long))
        assert LABELS.get() is None
        model(**inputs, labels=inputs["input_ids"])
        assert LABELS.get() is None


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (0, "give the number of prompt tokens, or one for each row, or None"),
        (2.5, "give the number of prompt tokens"),
        ([[3]], "give the number of prompt tokens"),
        ([40, 40, 40], "has 3 numbers and the batch 2 rows"),
        (3, "prompt_length=3 of row 0 ends in front of its last visual token, at"),
    ],
)
def test_lengths_that_are_none_are_refused(length, said):
    model = shared("llava")
    with vtc.patch(model, "uniform", keep=5) as handle, pytest.raises(UnknownArgumentError, match=said):
        handle.prompt_length = length
        model(**make_inputs("llava", model, batch=2))


def test_the_length_reads_as_it_was_given_and_ends_with_the_patch():
    model = shared("llava")
    with vtc.patch(model, "uniform", keep=5) as handle:
        assert handle.prompt_length is None
        handle.prompt_length = torch.tensor([30, 31])
        assert handle.prompt_length == (30, 31)
        handle.prompt_length = 30
        assert handle.prompt_length == 30
        handle.prompt_length = None
        assert handle.prompt_length is None


# --------------------------------------------------------------------------------------------------- merged beforehand
def merged(model, inputs):
    """Embeddings with the picture's features at their places, as some callers prepare them."""
    features = model.get_image_features(inputs["pixel_values"])
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().clone()
    embeds[inputs["input_ids"] == model.config.image_token_id] = features.detach().reshape(-1, embeds.shape[-1])
    return embeds


def test_features_merged_into_embeddings_are_not_passed_over_in_silence():
    model = shared("llava")
    inputs = make_inputs("llava", model)
    embeds, mask = merged(model, inputs), inputs["attention_mask"]
    with vtc.patch(model, "uniform", keep=5) as handle:
        with pytest.warns(UserWarning, match="inputs_embeds came without pixel_values: .* not reduced") as seen:
            model(inputs_embeds=embeds, attention_mask=mask)
            model(inputs_embeds=embeds, attention_mask=mask)
        assert len([w for w in seen if "inputs_embeds" in str(w.message)]) == 1 and handle.stats.last.text_only
    with (
        vtc.patch(model, "uniform", keep=5),
        pytest.raises(vtc.NotReducedError, match="has 16 visual tokens whose features are"),
    ):
        model.generate(input_ids=inputs["input_ids"], inputs_embeds=embeds, attention_mask=mask, max_new_tokens=1)
    with vtc.patch(model, "uniform", keep=5, strict=False), pytest.warns(UserWarning, match="has 16 visual tokens"):
        model.generate(input_ids=inputs["input_ids"], inputs_embeds=embeds, attention_mask=mask, max_new_tokens=1)


def test_embeddings_of_text_with_its_ids_are_fine(recwarn):
    model = shared("llava")
    text = make_inputs("llava", model, images=[0])
    embeds = model.get_input_embeddings()(text["input_ids"]).detach()
    with vtc.patch(model, "uniform", keep=5):
        model.generate(
            input_ids=text["input_ids"], inputs_embeds=embeds, attention_mask=text["attention_mask"], max_new_tokens=2
        )
    assert not [w for w in recwarn if "inputs_embeds" in str(w.message)]


# ------------------------------------------------------------------------------------------------ no words to look at
@pytest.mark.parametrize("name", ["cdpruner", "ptp", "script", "sparsevlm"])
def test_a_prompt_that_is_a_picture_and_nothing_else_is_reduced(name):
    """These look for words; sparsevlm's stand-in, the last token of the picture, may be gone after its first cut."""
    model = shared("llava")
    inputs = make_inputs("llava", model)
    place = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    bare = {k: v[:, place[0] : place[-1] + 1] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with vtc.patch(model, name, **CASES[name].harsh) as handle, torch.no_grad():
        logits = model(**bare).logits
    assert logits.isfinite().all() and handle.stats.last.images[0].kept == 3
