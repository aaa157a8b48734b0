"""What vtc's hooks cost per decode step: ``python -m vtc.eval.hooks [--output results/hooks.csv]``.

A 32-layer toy LLaVA with random weights decodes with and without a patch, in turns. The reducers keep all visual tokens but one:
the reduced path is taken in full, while the KV cache is as long as before, so that the difference is the hooks' own time. Reported
is the median over the pairs of the difference in CPU time of the calling thread, per decoder layer, and the length of a decode
step of which 32 layers of it are 2 %. Beside the time, which hangs on the machine, stands a count that does not: lines of this
package that Python executes in a decode step.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer

import vtc
from vtc.engine import upstream
from vtc.eval.env import machine, versions
from vtc.files import write_whole

LAYERS = 32
"""Decoder layers of the toy model; a 7B model has as many."""
SHARE = 0.02
"""What the hooks may cost of a decode step."""

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "boundary, original positions": ("uniform", {"positions": "original"}, 1),
    "boundary, compact positions": ("uniform", {"positions": "compact"}, 1),
    "decoder layer 2 (fastv)": ("fastv", {"layer": 2}, 1),
    "boundary, original positions, padded": ("uniform", {"positions": "original"}, 2),
    "boundary, compact positions, padded": ("uniform", {"positions": "compact"}, 2),
}
"""Name to reducer, options and batch size; batch 2 is left-padded."""


@dataclass(frozen=True)
class Cost:
    """One row of the result.

    Attributes
    ----------
    case : str
        What was patched.
    us_per_layer, us_p20, us_p80 : float
        Microseconds per decoder layer and decode step: median and spread over the pairs.
    unpatched_us_per_layer : float
        The toy layer itself.
    step_ms_for_2_percent : float
        Decode steps at least this long lose at most 2 % to the hooks of 32 layers.
    lines : int
        Lines of vtc that Python executes in a decode step, all layers together: the same on every machine.
    """

    case: str
    us_per_layer: float
    us_p20: float
    us_p80: float
    unpatched_us_per_layer: float
    step_ms_for_2_percent: float
    lines: int


def random_llava(image_size: int, image_token: int, vision_width: int, **text: int) -> torch.nn.Module:
    """Return a LLaVA with random weights: a CLIP tower of two layers, and a Llama decoder with these settings."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=vision_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, pad_token_id=0),
        vision_config=vision,
        image_token_id=image_token,
        image_token_index=image_token,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def toy_model() -> torch.nn.Module:
    """Return a LLaVA whose layers cost as little as possible beside the hooks."""
    return random_llava(
        image_size=84,
        image_token=100,
        vision_width=16,
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


def toy_inputs(batch: int) -> dict[str, torch.Tensor]:
    """Return a prompt with one image per row; rows after the first are left-padded."""
    rows = [[0] * (3 * b) + [1] + [100] * 36 + list(range(3, 20 - 3 * b)) for b in range(batch)]
    ids = torch.tensor(rows)
    return upstream.prompt(ids, (ids != 0).long(), torch.randn(batch, 3, 84, 84))


def decode(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int) -> Iterator[Any]:
    """Prefill, then yield ``steps`` calls without arguments, each of which runs one decode step."""
    with torch.no_grad():
        cache = upstream.cache_of(model(**inputs, **{upstream.USE_CACHE: True}))
        name = upstream.cache_argument(model)
        mask = inputs[upstream.MASK]
        token = torch.full((len(mask), 1), 7)
        for _ in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            given = {upstream.IDS: token, name: cache, upstream.MASK: mask if len(mask) > 1 else None}
            yield functools.partial(model, **given)


def step_seconds(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int) -> float:
    """Return the median thread time of a decode step."""
    times = []
    for step in decode(model, inputs, steps):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return statistics.median(times[4:])


def step_lines(model: torch.nn.Module, inputs: dict[str, torch.Tensor], steps: int = 6) -> int:
    """Return how many lines of this package Python executes in a decode step, at most: 0 for a model without a patch."""
    package, counts = f"{Path(vtc.__file__).parent}{os.sep}", []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            counts[-1] += 1
        return trace if event != "call" or frame.f_code.co_filename.startswith(package) else None

    for step in decode(model, inputs, steps):
        counts.append(0)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            step()
        finally:
            sys.settrace(before)
    return max(counts)


def measure(pairs: int = 9, steps: int = 24) -> list[Cost]:
    """Measure every case in ``pairs`` alternations of unpatched and patched decoding, ``steps`` each, the first 4 to warm up."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, rows = toy_model(), []
    for name, (reducer, options, batch) in CASES.items():
        inputs = toy_inputs(batch)
        plain, extra = [], []
        for _ in range(pairs):
            plain.append(step_seconds(model, inputs, steps))
            with vtc.patch(model, reducer, keep=35, **options):
                extra.append(step_seconds(model, inputs, steps) - plain[-1])
        with vtc.patch(model, reducer, keep=35, **options):
            lines = step_lines(model, inputs)
        per_layer = sorted(x / LAYERS * 1e6 for x in extra)
        middle = statistics.median(per_layer)
        rows.append(
            Cost(
                name,
                round(middle, 2),
                round(per_layer[len(per_layer) // 5], 2),
                round(per_layer[-1 - len(per_layer) // 5], 2),
                round(statistics.median(plain) / LAYERS * 1e6, 1),
                round(max(0.0, middle) * LAYERS / SHARE / 1e3, 2),
                lines,
            )
        )
    return rows


def markdown(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    head = list(columns)
    lines = [head, ["---"] * len(head), *([str(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    output: Annotated[Path | None, typer.Option(help="CSV file to write; the machine and versions are in every row.")] = None,
    pairs: Annotated[int, typer.Option(help="Alternations per case.")] = 9,
) -> None:
    """Print (and write) what the hooks cost per decoder layer and decode step."""
    import pandas

    table = pandas.DataFrame([asdict(row) for row in measure(pairs)])
    print(table.to_string(index=False))
    if output is not None:
        write_whole(output, table.assign(**machine(), **versions()).to_csv(index=False))
        write_whole(output.with_suffix(".md"), markdown(table.columns, table.itertuples(index=False)) + "\n")


if __name__ == "__main__":
    typer.run(main)
