"""A row of a batch gets what it gets alone: every reducer, padding on either side, rows with two pictures, one and none.

Two families and sides for each reducer, drawn the same every time; ``VTC_EVERY_FAMILY=1`` runs all (``make rows``, minutes).
"""

from __future__ import annotations

import functools
import math
import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES as REDUCERS
from family_cases import CASES, OTHERS, case_of
from models import make_inputs, shared
from pickers import BoundaryPicker, DecoderPicker
from torch import Tensor, nn

import vtc
from vtc.core import Selection, Signals
from vtc.engine import upstream
from vtc.families import family_of
from vtc.inspect import reason_against

pytestmark = pytest.mark.filterwarnings("ignore:models of type")
IMAGES = {"left": (2, 1, 0), "right": (1, 0, 2)}
PLACES = [(name, side) for name in (*CASES, *OTHERS) for side in IMAGES]
DRAW = random.Random(12)
DRAWN = [
    (reducer, *place)
    for reducer in REDUCERS
    for place in (PLACES if os.environ.get("VTC_EVERY_FAMILY") else sorted(DRAW.sample(PLACES, 2)))
]


@functools.cache
def model_of(name: str) -> nn.Module:
    return shared(name, "sdpa", torch.float32 if (CASES | OTHERS)[name].float32 else torch.float64)


def with_positions(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt with the positions its tokens have without padding."""
    mask = inputs["attention_mask"]
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    place = case_of(model).positions
    return inputs | {"position_ids": counted if place is None else place(model, inputs, counted)}


@functools.cache
def batch(name: str, side: str) -> dict[str, Tensor]:
    """Three rows, padded on one side."""
    model = model_of(name)
    inputs = make_inputs(name, model, images=IMAGES[side])
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).tolist()
    if side == "right":
        for key in ("input_ids", "attention_mask"):
            inputs[key] = torch.stack([row.roll(n - length) for row, n in zip(inputs[key], real, strict=True)])
        inputs |= case_of(model).extra(inputs["input_ids"], length)
    return inputs


@functools.cache
def alone(name: str, side: str, row: int) -> dict[str, Tensor]:
    """One of the rows, without padding, with its own pictures."""
    model, inputs, images = model_of(name), batch(name, side), IMAGES[side]
    case, real = case_of(model), inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row : row + 1, real]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    first, count = sum(images[:row]), images[row]
    if count and case.tiles:
        one["pixel_values"] = inputs["pixel_values"][row : row + 1, :count]
    elif count and (case.anyres or name.startswith(("mistral", "ministral", "pixtral"))):
        one |= {key: inputs[key][first : first + count] for key in ("pixel_values", "image_sizes")}
    elif count:
        each = [case.one(inputs, model, i) for i in range(first, first + count)]
        one |= {key: torch.cat([pixels[key] for pixels in each]) for key in each[0]}
    return one | case.extra(ids, ids.shape[1])


def answer(model: nn.Module, inputs: dict[str, Tensor], handle: Any) -> tuple[Tensor, list[list[int]]]:
    """Logits, and visual tokens per layer of every picture."""
    with torch.no_grad():
        logits = model(**with_positions(model, inputs)).logits
    return logits, [image.tokens_per_layer for image in handle.stats.last.images]


@pytest.mark.parametrize(("reducer", "name", "side"), DRAWN)
def test_rows_do_not_depend_on_each_other(reducer: str, name: str, side: str) -> None:
    model = model_of(name)
    reason = reason_against(reducer, family_of(model).facts)
    if reason:
        with pytest.raises(vtc.VtcError):
            vtc.patch(model, reducer, keep=0.5)
        return
    inputs = batch(name, side)
    limit = 2e-4 if (CASES | OTHERS)[name].float32 else 1e-5
    with vtc.patch(model, reducer, keep=0.5) as handle:
        try:
            together, counts = answer(model, inputs, handle)
        except vtc.UnsupportedFeatureError as error:
            assert any(words in str(error) for words in ("boundary or decoder", "upgrade transformers")), error
            return
        seen = []
        for row in range(3):
            single, own = answer(model, alone(name, side, row), handle)
            real = inputs["attention_mask"][row].bool()
            assert (single[0] - together[row, real]).abs().max() < limit, row
            seen += own
    assert seen == counts


# ----------------------------------------------------------------------------------- prompts that begin with their picture
class Last:
    """Keep the last tokens."""

    def select(self, signals: Signals) -> Selection:
        rows, n = signals.shape
        return Selection(torch.arange(n - signals.budget, n).expand(rows, -1))


@dataclass(frozen=True, kw_only=True)
class LastAtTheBoundary(Last, BoundaryPicker):
    pass


@dataclass(frozen=True, kw_only=True)
class LastInTheDecoder(Last, DecoderPicker):
    pass


KINDS = {
    "boundary": [LastAtTheBoundary(keep=0.3)],
    "decoder": [LastInTheDecoder(keep=0.3)],
    "both": [LastAtTheBoundary(keep=0.8), LastInTheDecoder(keep=0.2, layer=3)],
}


def picture_first(name: str, side: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One row that begins with its picture: alone, and beside a longer row without picture, padded on one side."""
    model = model_of(name)
    one = make_inputs(name, model)
    ids = one["input_ids"][:, 6:]  # without the words in front
    assert (ids[0, 0] == 100) and not (ids[0, -3:] == 100).any()
    longer = torch.arange(20, 20 + ids.shape[1] + 4)[None].remainder(80) + 3
    pad = torch.zeros(1, 4, dtype=torch.long)
    row = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    both = torch.cat([row, longer])
    pixels = {k: v for k, v in one.items() if k.startswith(("pixel", "image"))}
    single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **case_of(model).extra(ids, ids.shape[1])}
    whole = {"input_ids": both, "attention_mask": (both != 0).long(), **pixels, **case_of(model).extra(both, both.shape[1])}
    return single, whole


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "llava_next"])
def test_the_loss_of_a_prompt_that_begins_with_its_picture(name: str, kind: str, side: str) -> None:
    """Labels on placeholders too: the same loss in any batch, and zero states in front of the first kept token."""
    model = model_of(name)
    limit = 2e-4 if CASES[name].float32 else 1e-5
    single, whole = picture_first(name, side)
    where = whole["attention_mask"][0].bool()
    states = []
    with vtc.patch(model, KINDS[kind]) as handle, torch.no_grad():
        handle.family.text.register_forward_hook(lambda _m, _a, out: states.append(upstream.states_of(out)))
        alone_logits = model(**with_positions(model, single)).logits[0]
        kept = handle.stats.kept[0].entries.tolist()
        together = model(**with_positions(model, whole)).logits[0, where]
        handle.family.text._forward_hooks.popitem()
    assert kept[0] > 0, "the first slots are gone"
    assert (alone_logits - together).abs().max() < limit
    for seen, first in ((states[0][0], 0), (states[1][0], int(where.long().argmax()))):
        assert not seen[: first + kept[0]].any(), "nothing is predicted there"
        assert seen[first + kept[0]].abs().max() > 1e-3
    labels = single["input_ids"][0, 1:]
    losses = [torch.nn.functional.cross_entropy(logits[:-1], labels) for logits in (alone_logits, together)]
    assert losses[0].isfinite() and abs(losses[0] - losses[1]) < limit
    even = torch.nn.functional.cross_entropy(alone_logits[: kept[0]], labels[: kept[0]])
    assert abs(even - math.log(alone_logits.shape[-1])) < limit or model.lm_head.bias is not None
