"""Prefill of every family before and after a reduction to a quarter, interleaved: ``python tests/families_speed.py``.

Random models with a language model of real width and few layers; 24 images in one prompt. Writes ``results/families-speed.md``.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import transformers
from family_cases import CASES
from models import build, make_inputs, visual_of

import vtc

WIDTH, LAYERS, IMAGES, RUNS = 1024, 3, 24, 5


def prefill(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward."""
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def row(name: str) -> str:
    """One line of the table."""
    text = dict(hidden_size=WIDTH, intermediate_size=2816, num_attention_heads=128, num_key_value_heads=128)
    text |= dict(num_hidden_layers=LAYERS, max_position_embeddings=4096)
    kinds = getattr(build(name).config.get_text_config(), "layer_types", None) or ()
    text |= dict(sliding_window=512) if "sliding_attention" in kinds else {}  # wider than the prompt
    model = build(name, dtype=torch.float32, text=text)
    inputs = make_inputs(name, model, images=[IMAGES])
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(RUNS + 1):
        before = prefill(model, inputs)
        with vtc.patch(model, "uniform", keep=0.25):
            after = prefill(model, inputs)
        if run:  # the first is for warming up
            times[0].append(before)
            times[1].append(after)
    before, after = map(statistics.median, times)
    tokens = int(visual_of(inputs).sum())
    length = inputs["input_ids"].shape[1]
    return f"| `{name}` | {tokens} of {length} | {before * 1e3:.0f} | {after * 1e3:.0f} | {before / after:.2f}× |"


def main() -> None:
    """Measure all and write the table."""
    names = [name for name in CASES if ":" not in name and name not in ("llava_siglip", "unknown")]
    lines = ["| family | visual tokens of the prompt | prefill ms | at a quarter of them | faster |", "|---|--:|--:|--:|--:|"]
    for name in sorted(names):
        lines.append(row(name))
        print(lines[-1], flush=True)
    note = (
        f"`uniform` at `keep=0.25`; {LAYERS} decoder layers of width {WIDTH}, a tiny vision tower, float32, "
        f"{torch.get_num_threads()} thread; medians of {RUNS} interleaved runs on a shared machine; tower and projector included. "
        f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}."
    )
    file = Path(__file__).resolve().parent.parent / "results" / "families-speed.md"
    file.write_text("\n".join([*lines, "", note]) + "\n")


if __name__ == "__main__":
    main()
