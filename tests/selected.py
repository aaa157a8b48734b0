"""What a registered method chose inside a model, as a plan for the slow reference: whatever it is, the model must act on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import image_spans, visual_of
from reference import Plan, text_of
from torch import Tensor, nn

import vtc
from vtc.core import Reducer, Selection, Signals, Stage

Chosen = list[tuple[Reducer, Tensor, Tensor | None]]


def generate_and_note(
    model: nn.Module, inputs: dict[str, Tensor], members: Reducer | Sequence[Reducer], steps: int, **options: Any
) -> tuple[Any, Any, Chosen]:
    """Generate greedily from a prompt with one picture; return the output, the handle, and what every part chose.

    Of each part that was asked: itself, the slots left ``(n,)``, and their new features where it merged.
    """
    chosen: Chosen = []

    def noting(kind: type[Reducer]) -> Any:
        select = kind.select

        def noted(self: Reducer, signals: Signals) -> Selection:
            found = select(self, signals)
            assert len(signals.entries) == 1, "one picture"
            real = slice(None) if found.valid is None else found.valid[0]
            index = found.index[0, real]
            chosen.append((self, signals.entries[0, index], None if found.features is None else found.features[0, real]))
            return found

        return noted

    with pytest.MonkeyPatch.context() as patched, vtc.patch(model, members) as handle, torch.no_grad():
        for kind in {type(p) for p in handle.reducer.parts()}:
            patched.setattr(kind, "select", noting(kind))
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
    return out, handle, chosen


def plan_of_choices(model: nn.Module, inputs: dict[str, Tensor], chosen: Chosen) -> Plan:
    """The plan that hides what was not chosen, from the layer of each choice on, and writes what was merged."""
    ((row, columns),) = image_spans(inputs, model)
    plan, uncounted, gone = Plan(), None, visual_of(inputs)
    for i in range(len(text_of(model).layers)):
        for part, slots, features in (c for c in chosen if c[0].layer == i):
            gone = visual_of(inputs)
            gone[row, columns[slots]] = False
            uncounted = gone if part.position_policy == "compact" else uncounted
            if features is not None and part.stage is Stage.VISION:  # of the tower: its slots are its patches, without crops
                plan.projector = projecting(slots, features)
            elif features is not None:
                assert i not in plan.write
                plan.write[i] = writing(row, columns[slots], features)
        if any(part.layer <= i for part, _, _ in chosen):
            plan.hide[i] = gone
            if uncounted is not None:
                plan.compact[i] = uncounted
    return plan


def projecting(patches: Tensor, features: Tensor) -> Any:
    def project(projector: nn.Module, given: Tensor) -> Tensor:
        given = given.clone()
        assert len(given) == 1
        given[0, patches] = features.to(given.dtype)
        return projector(given)

    return project


def writing(row: int, columns: Tensor, features: Tensor) -> Any:
    def write(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[row, columns] = features.to(hidden.dtype)
        return hidden

    return write
