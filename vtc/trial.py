"""One question about one image, with and without a reducer: answers, times, kept tokens. What ``vtc run`` shows."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vtc.core import Reducer
from vtc.doors import GREEDY, check_length, check_prompt
from vtc.engine import upstream
from vtc.engine.patch import bind, patch, unpatch
from vtc.errors import VtcError
from vtc.families import family_of
from vtc.stats import ImageStats, KeptTokens

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Side:
    """What one of the two runs gave.

    Attributes
    ----------
    answer : str
        Generated text, special tokens removed.
    new_tokens : int
        Its length in tokens.
    ttft_ms, total_ms : list of float
        Milliseconds to the first token and of the whole answer, one entry per timed run.
    reducer_ms : float
        Milliseconds spent on signals and selection in the last run; part of the times above.
    """

    answer: str = ""
    new_tokens: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    reducer_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; times as median, smallest and largest."""
        return asdict(self) | {"ttft_ms": _spread(self.ttft_ms), "total_ms": _spread(self.total_ms)}


@dataclass
class Outcome:
    """The comparison.

    Attributes
    ----------
    before, after : Side
        Without and with the reducer.
    image : ImageStats
        Tokens of the reduced run.
    kept : KeptTokens
        Which tokens survived.
    views : list of Image
        The image as the vision tower was given it.
    conditions : dict
        How the times were taken; ``"text"`` says it in a sentence.
    """

    before: Side
    after: Side
    image: ImageStats
    kept: KeptTokens
    views: list[Image.Image]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "same_answer": self.before.answer == self.after.answer,
            "tokens": asdict(self.image) | {"avg_tokens": self.image.avg_tokens},
            "conditions": self.conditions,
        }

    def picture(self, caption: str = "") -> Image.Image:
        """Draw the kept tokens (:func:`vtc.viz.overlay`)."""
        from vtc.viz import overlay

        return overlay(self.views, self.kept.layout, self.kept.entries, self.kept.owner, caption=caption)


def encode(model: Any, processor: Any, image: Image.Image, prompt: str) -> dict[str, Any]:
    """Return the model's inputs for one image and one question, through the processor's chat template.

    Raises
    ------
    VtcError
        The processor has no chat template, or the question cannot be asked.
    """
    if not getattr(processor, "chat_template", None):
        raise VtcError(
            "this model's processor has no chat template: save one with it (processor.chat_template = ...), then try again"
        )
    check_prompt(processor, prompt)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    check_length(model.config, inputs[upstream.IDS].shape[1])
    return {k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device) for k, v in inputs.items()}


def trial(
    model: Any,
    processor: Any,
    image: Image.Image,
    prompt: str,
    reducer: Reducer,
    *,
    max_new_tokens: int = 32,
    runs: int = 5,
) -> Outcome:
    """Ask one question with and without ``reducer``.

    Runs of both kinds alternate, so that a machine that slows down or speeds up meanwhile treats them alike; the first pair
    warms up and is not counted. Decoding is greedy; the image is processed once, outside the times.

    Parameters
    ----------
    model, processor : object
        A Hugging Face vision-language model, not patched, and its processor.
    image : Image
        RGB picture.
    prompt : str
        Question in plain words.
    reducer : Reducer
        What to compare with the unreduced model.
    max_new_tokens : int
        Longest answer.
    runs : int
        Timed runs of each kind.

    Returns
    -------
    Outcome

    Raises
    ------
    VtcError
        The model cannot serve the reducer (before anything runs).
    """
    family = family_of(model)
    bind(reducer, family.facts)
    upstream.check_implementation(family.text.config)
    inputs = encode(model, processor, image, prompt)
    before, after = Side(), Side()
    unpatch(model)
    for n in range(runs + 1):
        _once(model, processor, inputs, before, max_new_tokens, counted=n > 0)
        with patch(model, reducer) as handle:
            _once(model, processor, inputs, after, max_new_tokens, counted=n > 0)
            call, kept = handle.stats.last, handle.stats.kept
            after.reducer_ms = call.reducer_ms
    from vtc.viz import unprocess

    return Outcome(
        before,
        after,
        call.images[0],
        kept[0],
        unprocess(inputs[upstream.PIXELS], processor.image_processor),
        _conditions(model, runs),
    )


def _once(model: Any, processor: Any, inputs: dict[str, Any], side: Side, length: int, counted: bool) -> None:
    """Generate one token, then the whole answer, under the clock."""
    first, _ = _timed(model, inputs, 1)
    total, output = _timed(model, inputs, length)
    if counted:
        side.ttft_ms.append(first)
        side.total_ms.append(total)
    new = output[0, inputs[upstream.IDS].shape[1] :]
    side.answer = processor.batch_decode([new], skip_special_tokens=True)[0].strip()
    side.new_tokens = len(new)


def _timed(model: Any, inputs: dict[str, Any], length: int) -> tuple[float, torch.Tensor]:
    _wait(model.device)
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=length, **GREEDY)
    _wait(model.device)
    return (time.perf_counter() - start) * 1e3, output


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _conditions(model: Any, runs: int) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(model.dtype).removeprefix("torch.")
    attention = upstream.attention_of(model.config)
    text = (
        f"times: median (smallest..largest) of {runs} runs after one warm-up, alternating with and without, batch 1, greedy, "
        f"{name}, {dtype}, {attention} attention; vision tower included, image processing not"
    )
    return {"runs": runs, "warm_up": 1, "batch": 1, "device": name, "dtype": dtype, "attention": attention, "text": text}
