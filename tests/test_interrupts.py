"""A KeyboardInterrupt at any line of ``patch`` or ``unpatch``: the model is whole, or the next ``unpatch`` makes it so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import build, make_inputs
from pickers import DecoderPicker, EncoderPicker, VisionPicker
from test_oracle import snapshot
from torch import nn

import vtc
from vtc.engine.patch import handle_of
from vtc.engine.undo import strays

STRIDE = {"decoder": 1}
"""Every line for one of them, every seventh for the others: most lines are the same."""
ENGINE = str(Path(vtc.__file__).parent / "engine")
# undo.py's own removal is the last line of defence: one interrupt in it is tried, too
PATCHES: dict[str, Any] = {
    "decoder": DecoderPicker(keep=0.5),
    "encoder": EncoderPicker(keep=0.5),
    "vision+sparsevlm": [VisionPicker(keep=0.8), vtc.create("sparsevlm", keep=0.4)],
    "corematching": vtc.create("corematching", keep=0.5, layer=2, rule="topk", neurons=0.5),
}


def interrupted(action: Callable[[], object], at: int) -> tuple[bool, BaseException | None]:
    """Run ``action``, raise KeyboardInterrupt at the ``at``-th line of the engine; return whether it came so far, and the error."""
    left = [at]

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ENGINE):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt as error:
        return True, error
    finally:
        sys.settrace(before)
    return left[0] <= 0, None


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("what", PATCHES)
@pytest.mark.parametrize("during", ["patch", "unpatch", "patch over a patch"])
def test_interrupts_leave_a_whole_model(what, during):
    model = build("llava")
    inputs = make_inputs("llava", model)
    clean, plain = snapshot(model), logits(model, inputs)
    with vtc.patch(model, PATCHES[what]):
        reduced = logits(model, inputs)
    assert not torch.equal(reduced, plain) and snapshot(model) == clean
    at, came, step = 0, True, STRIDE.get(what, 7)
    while came:
        at += step
        if during == "unpatch":
            vtc.patch(model, PATCHES[what])
            came, _ = interrupted(lambda: vtc.unpatch(model), at)
        elif during == "patch":
            came, _ = interrupted(lambda: vtc.patch(model, PATCHES[what]), at)
        else:
            vtc.patch(model, DecoderPicker(keep=0.3))
            came, _ = interrupted(lambda: vtc.patch(model, PATCHES[what]), at)
        if at % 10 == 0 or not came:  # as it was left: one of the two models there should be, or unreduced, never between
            now = logits(model, inputs)
            if handle_of(model) is None:
                assert torch.equal(now, plain), at
        vtc.unpatch(model)
        assert handle_of(model) is None and not list(strays(model)), at
        if at % 10 == 0 or not came:
            assert snapshot(model) == clean, at
    assert at > 30 if during != "unpatch" else at > 8, "lines of the engine were really interrupted"
    assert torch.equal(logits(model, inputs), plain)
    with vtc.patch(model, PATCHES[what]):
        assert torch.equal(logits(model, inputs), reduced)


def test_hooks_without_a_handle_are_found():
    model = build("llava")
    inputs = make_inputs("llava", model)
    clean, plain = snapshot(model), logits(model, inputs)
    handle = vtc.patch(model, DecoderPicker(keep=0.5))
    for name in ("generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        vars(model).pop(name, None)
    vars(model.model).pop("get_image_features", None), vars(model.model).pop("get_video_features", None)
    object.__delattr__(model, "_vtc_handle")
    assert list(strays(model)) and handle is not None
    vtc.unpatch(model)
    assert not list(strays(model)) and torch.equal(logits(model, inputs), plain)
    vars_now = [kind for _, kind, *_ in (entry for entry in snapshot(model) if isinstance(entry, tuple) and len(entry) == 5)]
    assert vars_now == [kind for _, kind, *_ in (entry for entry in clean if isinstance(entry, tuple) and len(entry) == 5)]
