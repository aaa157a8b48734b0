"""``vtc bench bars --preset gpu`` on a GPU that isn't there, on models next to nothing; run by test_bench_bars.py.

Prints the tables as JSON. It has a process of its own because :mod:`pretend_gpu` changes torch for good.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch._dynamo  # before torch.Generator is replaced: it is in the type hints of what this imports

sys.path.insert(0, str(Path(__file__).parent))

from pretend_gpu import PretendGPU  # noqa: E402

from vtc.eval import speed  # noqa: E402
from vtc.eval.bench import bars, cases, common, model  # noqa: E402

SIDE = 56


REAL = torch.Generator


class Generator(REAL):
    """Random numbers for any device, made on the CPU."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return REAL.__new__(REAL)


def shrink(name: str, views: int) -> None:
    """Make a model next to nothing."""
    shape = model.MODELS[name]
    words = dict(shape.config["text_config"], hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=3)
    eyes = dict(shape.config["vision_config"], hidden_size=32, intermediate_size=32, num_attention_heads=2, image_size=SIDE)
    eyes["num_hidden_layers"] = 3
    config = {**shape.config, "text_config": words, "vision_config": eyes}
    if views > 1:
        config["image_grid_pinpoints"] = [[views * SIDE, views * SIDE]]
    model.MODELS[name] = dataclasses.replace(shape, config=config, picture=(views * SIDE, views * SIDE), keep=(4,))
    bars.BUDGETS[name] = 4


def main() -> None:
    shrink("llava-1.5-7b", 1)
    shrink("llava-next-7b", 2)
    cases.SIZES[48] = 6
    cases.PRESETS["gpu"] = dataclasses.replace(
        cases.PRESETS["gpu"], sizes=(48,), width=32, heads=2, head_width=16, seconds=0, edge=64, compile_at=()
    )
    model.PRESETS["gpu"] = dataclasses.replace(
        model.PRESETS["gpu"], models=tuple(bars.BUDGETS)[::-1], reducers=("divprune", "fastv"), batches=(2,)
    )
    bars.REPEATS = bars.DECODED = 1
    model.WARMUP, model.PAIRS = 0, 1
    model.before_the_decoder = lambda: ["divprune", "fastervlm", "visionzip"]
    torch.Generator = Generator
    torch.cuda.get_device_name = lambda: "pretended"
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *_: 2**20
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    speed.kv_cache_bytes = lambda _: 2**20  # pretended tensors have no memory
    with PretendGPU():
        session = bars.Session(common.device_of("gpu"), None, quiet=True)
        session.measure(5)
    print(json.dumps(session.tables))


if __name__ == "__main__":
    main()
