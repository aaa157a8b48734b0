"""Models whose linear layers hold 8-bit or 4-bit weights (bitsandbytes, on the CPU)."""

from __future__ import annotations

import functools

import pytest
import torch
from models import build, make_inputs, visual_of
from torch import Tensor, nn

import vtc

kinds = pytest.mark.parametrize("bits", [8, 4])


@functools.cache
def quantized(bits: int) -> nn.Module:
    """A LLaVA whose language model is quantized."""
    model = build("llava", dtype=torch.float32)
    _swap(model.model.language_model, bits)
    return model


def _swap(module: nn.Module, bits: int) -> None:
    import bitsandbytes as bnb  # seconds of CPU time, for these few tests alone

    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _swap(child, bits)
            continue
        size, bias = (child.in_features, child.out_features), child.bias is not None
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=torch.float32)
        new.load_state_dict(child.state_dict())
        setattr(module, name, new.to("cpu"))  # which quantizes


def short_run(model: nn.Module, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Last logits of the language model on the text and the ``kept`` visual tokens alone, one row, no vtc."""
    base = model.model
    ids = inputs["input_ids"]
    embeds = base.get_input_embeddings()(ids)
    features = torch.cat([f.reshape(-1, f.shape[-1]) for f in _features(base, inputs)])
    visual = visual_of(inputs)
    embeds = embeds.masked_scatter(visual[..., None], features)
    slots = visual[0].nonzero()[:, 0]
    stay = ~visual[0]
    stay[slots[kept]] = True
    short = embeds[:, stay]
    out = base.language_model(inputs_embeds=short, position_ids=torch.arange(short.shape[1])[None])
    return model.lm_head(out.last_hidden_state[:, -1])


def _features(base: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    config = base.config
    out = base.get_image_features(
        pixel_values=inputs["pixel_values"],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    return list(getattr(out, "pooler_output", out))


@kinds
@pytest.mark.parametrize("reducer", ["uniform", "divprune"])
def test_equals_a_run_on_the_short_sequence(bits: int, reducer: str) -> None:
    model, inputs = quantized(bits), make_inputs("llava", quantized(bits), 1, seed=2)
    assert {type(m).__name__ for m in model.model.language_model.layers[0].mlp.children()} & {"Linear8bitLt", "Linear4bit"}
    with torch.no_grad():
        with vtc.patch(model, reducer, keep=5, positions="compact") as handle:
            logits = model(**inputs).logits[:, -1]
            (kept,) = handle.stats.kept
        torch.testing.assert_close(logits, short_run(model, inputs, kept.entries), atol=1e-4, rtol=1e-4)


@kinds
@pytest.mark.parametrize("reducer", ["fastv", "visionzip", "pyramiddrop"])
def test_generates_and_comes_off(bits: int, reducer: str) -> None:
    model, inputs = quantized(bits), make_inputs("llava", quantized(bits), 2, seed=2)
    with torch.no_grad():
        want = model(**inputs).logits
        with vtc.patch(model, reducer, keep=4) as handle:
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert all(i.kept == 4 for i in handle.stats.last.images)
            assert not torch.allclose(model(**inputs).logits, want, atol=1e-2)
        assert out.shape == (2, inputs["input_ids"].shape[1] + 3)
        assert torch.equal(model(**inputs).logits, want)
