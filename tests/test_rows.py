"""A row of a batch gets what it gets alone: every reducer, padding on either side, rows with two pictures, one and none.

Two families stand for the others; ``VTC_EVERY_FAMILY=1`` runs all of the table (about two minutes).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from cases import CASES as REDUCERS
from family_cases import CASES, OTHERS, case_of
from models import make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.families import family_of
from vtc.inspect import reason_against

pytestmark = pytest.mark.filterwarnings("ignore:models of type")
FAMILIES = [*CASES, *OTHERS] if os.environ.get("VTC_EVERY_FAMILY") else ["llava_next", "qwen2_vl"]
IMAGES = {"left": (2, 1, 0), "right": (1, 0, 2)}


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
    elif count and (case.anyres or name.startswith(("mistral", "ministral"))):
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


@pytest.mark.parametrize("side", IMAGES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reducer", REDUCERS)
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
