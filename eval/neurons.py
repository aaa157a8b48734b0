"""What decoding with core neurons costs and saves: ``python -m vtc.eval.neurons [--output results/corematching.csv]``.

``corematching`` with and without ``neurons`` in turns, batch 1, one thread, on the embedded model and on a wider model with random
weights (four Llama layers 1024 wide with 2,816 neurons, 576 visual tokens): CPU time of the prompt, which pays for choosing the
neurons and cutting the projections, and of a decode step, which saves. For the embedded model also how many of its answers stay
the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import vtc
from vtc.engine import upstream
from vtc.eval.env import machine, versions
from vtc.eval.hooks import markdown, random_llava
from vtc.files import write_whole

SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of the neurons that decode steps run on; those of the paper's table."""
STEPS = 24
"""Decode steps timed after each prompt."""


@dataclass(frozen=True)
class Row:
    """One row of the result.

    Attributes
    ----------
    model : str
        Which model.
    neurons : float
        Share of the neurons that decode steps run on.
    prompt_ms : str
        Time of the prompt, median and [20th, 80th percentile].
    extra_ms : float
        What choosing and cutting adds to it: median of the paired differences.
    step_ms : str
        Time of a decode step, likewise.
    step_speedup : float
        Median ratio to a step on all neurons, paired.
    break_even : str
        Decode steps after which the extra time of the prompt is earned back.
    same_answers : str
        Greedy answers equal to those on all neurons (embedded model only).
    right : str
        Right answers (exact match), and in brackets those on all neurons.
    """

    model: str
    neurons: float
    prompt_ms: str
    extra_ms: float
    step_ms: str
    step_speedup: float
    break_even: str
    same_answers: str = "-"
    right: str = "-"


def wide_model() -> torch.nn.Module:
    """Return a LLaVA whose decoder layers are wide enough for the MLP's weights to leave the caches."""
    return random_llava(
        image_size=336,
        image_token=200,
        vision_width=32,
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def wide_inputs() -> dict[str, torch.Tensor]:
    """Return a prompt with one image and 40 words."""
    ids = torch.tensor([[1, *range(3, 13), *[200] * 576, *range(13, 43)]])
    return upstream.prompt(ids, pixels=torch.randn(1, 3, 336, 336))


def once(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the CPU time of the prompt and the median one of a decode step, in ms (other processes do not count)."""
    with torch.no_grad():
        start = time.thread_time()
        cache = upstream.cache_of(model(**inputs, **{upstream.USE_CACHE: True}))
        prompt, steps, token = time.thread_time() - start, [], torch.tensor([[7]])
        for _ in range(STEPS):
            start = time.thread_time()
            model(**{upstream.IDS: token, upstream.cache_argument(model): cache})
            steps.append(time.thread_time() - start)
    return prompt * 1e3, statistics.median(steps[2:]) * 1e3


def spread(values: list[float]) -> str:
    """Return median and percentiles as text."""
    ordered = sorted(values)
    n = len(ordered)
    return f"{statistics.median(ordered):.2f} [{ordered[n // 5]:.2f}, {ordered[-1 - n // 5]:.2f}]"


def timed(name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], options: dict[str, Any], pairs: int) -> list[Row]:
    """Alternate prompts with and without core neurons."""
    rows = []
    for share in SHARES:
        base, core = [], []
        for i in range(pairs + 1):
            for target, extra in ((base, {}), (core, {"neurons": share})):
                with vtc.patch(model, "corematching", **options, **extra):
                    found = once(model, inputs)
                if i:  # the first pair warms up
                    target.append(found)
        extra_ms = statistics.median(c[0] - b[0] for b, c in zip(base, core, strict=True))
        saved = statistics.median(b[1] - c[1] for b, c in zip(base, core, strict=True))
        ratio = statistics.median(b[1] / c[1] for b, c in zip(base, core, strict=True))
        even = f"{max(0.0, extra_ms) / saved:.0f}" if saved > 0 else "never"
        prompts, steps = (spread([c[k] for c in core]) for k in (0, 1))
        rows.append(Row(name, share, prompts, round(extra_ms, 1), steps, round(ratio, 2), even))
    return rows


def answers(model: torch.nn.Module, processor: Any, count: int) -> Callable[[dict[str, Any]], list[tuple[str, bool]]]:
    """Return a function that answers the first test questions with some options: answer, and whether it is right."""
    from vtc.pocket.scenes import scene_questions

    asked = scene_questions("test", n=count)

    def ask(options: dict[str, Any]) -> list[tuple[str, bool]]:
        out = []
        with vtc.patch(model, "corematching", **options), torch.no_grad():
            for q in asked:
                chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.prompt}]}]
                text = processor.apply_chat_template(chat, add_generation_prompt=True)
                inputs = processor(images=[q.image], text=[text], return_tensors="pt")
                ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs[upstream.IDS].shape[1] :]
                answer = processor.decode(ids, skip_special_tokens=True).strip()
                out.append((answer, answer == q.answer))
        return out

    return ask


def measure(pairs: int = 7, questions: int = 150) -> list[Row]:
    """Measure both models."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, processor = vtc.load_pocket()
    options = {"keep": 49, "layer": 2, "rule": "topk", "reference": -1}
    ask = answers(model, processor, questions)
    full, rows = ask(options), []
    inputs = {
        upstream.IDS: torch.tensor([[1, 5, *[model.config.image_token_id] * 196, *range(10, 22)]]),
        upstream.PIXELS: torch.randn(1, 3, 112, 112),
    }
    for row in timed("pocket (6 layers, 128 wide)", model, inputs, options, pairs):
        found = ask({**options, "neurons": row.neurons})
        same = sum(a[0] == b[0] for a, b in zip(found, full, strict=True))
        right = f"{sum(ok for _, ok in found)} [{sum(ok for _, ok in full)}]"
        rows.append(replace(row, same_answers=f"{same} of {len(full)}", right=right))
    options = {"keep": 64, "layer": 1, "rule": "topk", "reference": -1}
    return rows + timed("random weights (4 layers, 1024 wide)", wide_model(), wide_inputs(), options, pairs)


def main(
    output: Annotated[Path | None, typer.Option(help="CSV file to write; the machine and versions are in every row.")] = None,
    pairs: Annotated[int, typer.Option(help="Alternations per case.")] = 7,
    questions: Annotated[int, typer.Option(help="Questions the embedded model answers.")] = 150,
) -> None:
    """Print (and write) what decoding with core neurons costs and saves."""
    import pandas

    table = pandas.DataFrame([asdict(row) for row in measure(pairs, questions)])
    print(table.to_string(index=False))
    if output is not None:
        where, made = machine(), versions()
        write_whole(output, table.assign(**where, **made).to_csv(index=False))
        lines = [
            markdown(table.columns, table.itertuples(index=False)),
            "",
            f"CPU time of the calling thread; batch 1, float32, 1 thread, {pairs} alternations after one of warm-up, {STEPS} steps",
            f"each. {'; '.join(f'{key}: {value}' for key, value in {**where, **made}.items())}.",
        ]
        write_whole(output.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
