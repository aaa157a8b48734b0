"""Every reducer inside the embedded models: prompt and decode steps against a model that hides the dropped tokens.

What was kept, layer by layer, comes from the statistics and the cache; merged values and what the tower made of its shorter
sequence come from the states entering the decoder. All else (masks, positions, caches, generation) the reference does on its own,
on the full sequence and without a cache.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import CASES
from reference import Plan, oracle_model
from torch import Tensor, nn

import vtc
from vtc.registry import entries

STEPS = 3
SHARES = {"skipspan": {"keep": 0.5}, "tome": {"keep": 0.4}, "pact": {"keep": 40, "layer": 2, "proportional": False}}
"""Options that mean something on these models where those of the tiny ones do not. What PACT adds to attention logits no hidden
token shows: test_pact.py has a reference of its own for it."""


@functools.cache
def loaded(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in float64 and one question about a picture."""
    from vtc.pocket.scenes import detail_questions, scene_questions

    model, processor = vtc.load_pocket(name, dtype=torch.float64)
    (question,) = (scene_questions if name == "pocket" else detail_questions)("test", n=1)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    picture = question.image.crop((0, 0, question.image.width, 112))  # two crops at most: quicker
    inputs = dict(processor(images=[picture], text=[text], return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    return model, inputs


def generate(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )


def plan_of(handle: Any, cache: Any, entering: dict[int, Tensor], visual: Tensor) -> Plan:
    """What the patched run says it dropped, in logical coordinates."""
    plan, uncounted, shift = Plan(), None, None
    length = len(visual)
    merging = {p.layer for p in handle.reducer.parts() if p.kind == "merge" or p.stage.in_tower}
    for i, layer in enumerate(cache.layers):
        cols = getattr(layer, "cols", None)
        held = torch.arange(length) if cols is None else cols[0][cols[0] < length]
        gone = torch.ones(1, length, dtype=torch.bool)
        gone[0, held] = False
        assert not (gone[0] & ~visual).any(), "text is never dropped"
        own = getattr(layer, "shift", None)
        if own is not None and (shift is None or not torch.equal(own, shift)):
            uncounted, shift = gone, own
            assert int(own) == int(gone.sum())
        if gone.any():
            plan.hide[i] = gone
            if uncounted is not None:
                plan.compact[i] = uncounted
        if i in merging and i in entering:
            at, states = held[visual[held]], entering[i][0, visual[held]]
            plan.write[i] = functools.partial(written, at=at, states=states)
    return plan


def written(hidden: Tensor, at: Tensor, states: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[0, at] = states
    return hidden


def reference(model: nn.Module, inputs: dict[str, Tensor], plan: Plan, tokens: Tensor) -> Tensor:
    """Logits ``(STEPS, V)`` of the places that predict ``tokens``, in one forward without a cache."""
    ids = torch.cat([inputs["input_ids"], tokens[None, :-1]], 1)
    with oracle_model(model, plan) as twin, torch.no_grad():
        out = twin(
            **{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)},
            position_ids=torch.arange(ids.shape[1])[None],
            use_cache=False,
        ).logits
    return out[0, -STEPS:]


@pytest.mark.parametrize("name", ["pocket", "pocket-next"])
@pytest.mark.parametrize("reducer", entries())
def test_prompt_and_decode_equal_the_reference(reducer: str, name: str) -> None:
    model, inputs = loaded(name)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    options = SHARES.get(reducer, {**CASES[reducer].mild, "keep": 40})
    options = {k: v for k, v in options.items() if k not in ("start", "stop")}
    entering: dict[int, Tensor] = {}

    def look(i: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        entering.setdefault(i, args[0] if args else kwargs["hidden_states"])

    with vtc.patch(model, reducer, **options) as handle:
        layers = model.model.language_model.layers
        hooks = [m.register_forward_pre_hook(functools.partial(look, i), with_kwargs=True) for i, m in enumerate(layers)]
        try:
            out = generate(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
    (image,) = handle.stats[0].images
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    plan = plan_of(handle, out.past_key_values, entering, visual)
    dropped = [int(plan.hide[i].sum()) if i in plan.hide else 0 for i in range(len(image.tokens_per_layer))]
    assert [image.slots - d for d in dropped] == image.tokens_per_layer
    assert CASES[reducer].count == "all" or image.tokens_per_layer[-1] < image.slots
    torch.testing.assert_close(torch.cat(out.logits).double(), reference(model, inputs, plan, tokens), atol=1e-4, rtol=1e-4)


def test_the_reference_sees_what_is_dropped() -> None:
    model, inputs = loaded("pocket")
    with vtc.patch(model, "uniform", keep=40):
        out = generate(model, inputs)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    visual = inputs["input_ids"][0] == model.config.image_token_id
    with vtc.patch(model, "uniform", keep=40) as handle:
        plan = plan_of(handle, out.past_key_values, {}, visual)
    plain, hidden = reference(model, inputs, Plan(), tokens), reference(model, inputs, plan, tokens)
    plan.compact.clear()
    gaps = reference(model, inputs, plan, tokens)
    assert (plain - hidden).abs().max() > 1e-2, "hiding tokens matters"
    assert (gaps - hidden).abs().max() > 1e-3, "so do their positions"
