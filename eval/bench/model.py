"""``vtc bench model``: what reducers save on models of real shape with random weights, against what their FLOPs would allow.

Speed does not depend on the weights, so nothing is downloaded. Every timing is a pair: an unreduced run interleaved with the
reduced one (:mod:`vtc.eval.speed`); speed-ups are medians of the pairs' ratios. The FLOP bound is the ratio of the FLOPs that torch
counts in both (:mod:`vtc.eval.flops`): of decoder and head for the prefill, of the whole model for the time to the first token. The
share says how much of it is reached; above 1 is possible, since attention does not run at the speed of the other products.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

import vtc
from vtc.errors import UnknownArgumentError, VtcError, did_you_mean
from vtc.eval.bench.kernels import write
from vtc.eval.env import commit, machine, versions
from vtc.eval.models import KNOWN
from vtc.inspect import visual_tokens
from vtc.registry import create, entries

TEXT = 60
"""Text tokens of the prompt."""

_SMALL = {"vocab_size": 32064, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 8}
_EYES = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
_EYES |= {"num_attention_heads": 4, "image_size": 336, "patch_size": 14, "projection_dim": 256}
_ROPE = {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
_QWEN = KNOWN["Qwen/Qwen2.5-VL-7B-Instruct"]  # sizes alone do not say how its positions are rotated; the key has two names
_QWEN = {**_QWEN, "text_config": {**_QWEN["text_config"], "rope_scaling": _ROPE, "rope_parameters": _ROPE}}


@dataclass(frozen=True)
class Shape:
    """A model's configuration and the picture it is shown.

    Attributes
    ----------
    config : dict
        As in :data:`vtc.eval.models.KNOWN`.
    picture : tuple of (int, int)
        Height and width in pixels.
    keep : tuple of int
        Budgets.
    """

    config: dict[str, Any]
    picture: tuple[int, int]
    keep: tuple[int, ...]


MODELS = {
    "llava-1.5-7b": Shape(KNOWN["llava-hf/llava-1.5-7b-hf"], (336, 336), (64, 128)),
    "llava-next-7b": Shape(KNOWN["llava-hf/llava-v1.6-vicuna-7b-hf"], (672, 672), (160, 320)),
    "qwen2.5-vl-7b": Shape(_QWEN, (1008, 1008), (130, 324)),
    "wide-and-flat": Shape(
        {"model_type": "llava", "text_config": {"model_type": "llama", **_SMALL}, "vision_config": _EYES}, (336, 336), (144, 64)
    ),
}
"""The last one is for CPUs: wide layers, but few of them."""


@dataclass(frozen=True)
class Preset:
    """What is measured on a kind of device: models, reducers, batch sizes, runs."""

    models: tuple[str, ...]
    reducers: tuple[str, ...]
    batches: tuple[int, ...]
    repeats: int
    decode_steps: int
    dtype: torch.dtype


PRESETS = {
    "cpu": Preset(
        ("wide-and-flat",), ("random", "fastervlm", "divprune", "visionzip", "cdpruner", "fastv"), (), 5, 3, torch.float32
    ),
    "gpu": Preset(
        ("llava-next-7b", "llava-1.5-7b", "qwen2.5-vl-7b"),
        ("random", "fastervlm", "divprune", "visionzip", "cdpruner", "todre", "hiprune", "fastv"),
        (2, 4, 8, 16, 32),
        5,
        8,
        torch.bfloat16,
    ),
}
BATCHED = "divprune"
"""The reducer whose throughput is measured over batch sizes."""


# ------------------------------------------------------------------------------------------------------------------ models
def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model with random weights, on the device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = dict(shape.config)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return model.to(device, dtype).eval()


def prompt(model: nn.Module, shape: Shape, batch: int) -> dict[str, Tensor]:
    """Return ``batch`` equal prompts with one picture each, as a processor would make them."""
    config, (height, width), generator = model.config, shape.picture, torch.Generator().manual_seed(0)
    pixels: dict[str, Tensor]
    if config.model_type == "qwen2_5_vl":
        eyes = config.vision_config
        grid = torch.tensor([[1, height // eyes.patch_size, width // eyes.patch_size]]).expand(batch, -1).contiguous()
        slots = int(grid[0].prod()) // eyes.spatial_merge_size**2
        patch = eyes.in_channels * eyes.temporal_patch_size * eyes.patch_size**2
        pixels = {"pixel_values": torch.randn(int(grid.prod(1).sum()), patch, generator=generator), "image_grid_thw": grid}
        around = ([config.vision_start_token_id], [config.vision_end_token_id])
    else:
        side, anyres = config.vision_config.image_size, config.model_type != "llava"
        from vtc.families import family_of

        slots, _ = visual_tokens(family_of(model), (width, height), {})
        views = (1 + (height // side) * (width // side),) if anyres else ()
        pixels = {"pixel_values": torch.randn(batch, *views, 3, side, side, generator=generator)}
        if anyres:
            pixels["image_sizes"] = torch.tensor([[height, width]]).expand(batch, -1).contiguous()
        around = ([], [])
    token = getattr(config, "image_token_id", None) or config.image_token_index
    words = torch.randint(1000, 20000, (TEXT,), generator=generator).tolist()
    ids = torch.tensor([words[:4] + around[0] + [token] * slots + around[1] + words[4:]]).expand(batch, -1).contiguous()
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        out["mm_token_type_ids"] = (ids == token).long()
    return out


# ------------------------------------------------------------------------------------------------------------ measurement
@dataclass
class Row:
    """One reducer at one budget; times in milliseconds, memory in 10^6 bytes, speed-ups and shares as ratios."""

    model: str
    reducer: str
    keep: int | None
    batch: int
    attention: str
    dtype: str
    prompt_tokens: int = 0
    visual_tokens: int = 0
    avg_tokens: float = math.nan
    unreduced_vision_ms: float = math.nan
    unreduced_prefill_ms: float = math.nan
    unreduced_ttft_ms: float = math.nan
    unreduced_decode_ms: float = math.nan
    vision_ms: float = math.nan
    prefill_ms: float = math.nan
    ttft_ms: float = math.nan
    decode_ms: float = math.nan
    reducer_ms: float = math.nan
    reducer_share: float = math.nan  # of the unreduced prefill
    speedup_prefill: float = math.nan
    speedup_ttft: float = math.nan
    speedup_decode: float = math.nan
    bound_prefill: float = math.nan  # by FLOPs
    bound_ttft: float = math.nan
    share_prefill: float = math.nan  # of the bound
    share_ttft: float = math.nan
    unreduced_tflop: float = math.nan
    tflop: float = math.nan
    unreduced_kv_mb: float = math.nan
    kv_mb: float = math.nan
    unreduced_peak_mb: float = math.nan
    peak_mb: float = math.nan
    unreduced_prompts_s: float = math.nan
    prompts_s: float = math.nan
    note: str = ""


class Bench:
    """All measurements on one model."""

    def __init__(self, name: str, preset: Preset, device: torch.device, repeats: int) -> None:
        from vtc.eval.flops import count  # needs transformers, which the command line imports only where it must

        self.name, self.preset, self.repeats = name, preset, repeats
        self.shape = MODELS[name]
        self.model = build(self.shape, device, preset.dtype)
        self.inputs = prompt(self.model, self.shape, 1)
        self.flops = count(self.model, self._moved(self.inputs), None).counted

    def _moved(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    def row(self, reducer: str, keep: int | None, batch: int = 1) -> Row:
        """Measure one reducer (``"none"``: the unreduced model against itself, the noise of all the other rows)."""
        attention = self.model.config.text_config._attn_implementation or "eager"
        out = Row(self.name, reducer, keep, batch, attention, str(self.model.dtype).removeprefix("torch."))
        try:
            self._fill(out)
        except (VtcError, torch.cuda.OutOfMemoryError) as error:
            out.note = f"not run: {str(error).splitlines()[0]}"
        return out

    def _fill(self, out: Row) -> None:
        from vtc.eval.flops import count
        from vtc.eval.speed import measure

        part = None if out.reducer == "none" else create(out.reducer, keep=out.keep)
        token = getattr(self.model.config, "image_token_id", None) or self.model.config.image_token_index
        out.prompt_tokens = int(self.inputs["input_ids"].shape[1])
        out.visual_tokens = int((self.inputs["input_ids"] == token).sum())
        flops = self.flops
        if part is not None:
            with vtc.patch(self.model, part) as handle:
                flops = count(self.model, self._moved(self.inputs), handle).counted
                out.avg_tokens = handle.stats.last.images[0].avg_tokens
        inputs = self.inputs if out.batch == 1 else prompt(self.model, self.shape, out.batch)
        found = measure(self.model, inputs, part, repeats=self.repeats, warmup=2, decode_steps=self.preset.decode_steps)
        plain, reduced = found["unreduced"], found["reduced"]
        for name in ("vision_ms", "prefill_ms", "ttft_ms", "decode_ms"):
            setattr(out, f"unreduced_{name}", plain[name]["value"])
            setattr(out, name, reduced[name]["value"])
        out.reducer_ms = reduced["reducer_ms"]["value"]
        out.reducer_share = out.reducer_ms / out.unreduced_prefill_ms
        out.speedup_prefill, out.speedup_ttft, out.speedup_decode = (
            found["speedup"][p]["value"] for p in ("prefill", "ttft", "decode")
        )
        out.bound_prefill = (self.flops.decoder + self.flops.head) / (flops.decoder + flops.head)
        out.bound_ttft = self.flops.model / flops.model
        out.share_prefill, out.share_ttft = out.speedup_prefill / out.bound_prefill, out.speedup_ttft / out.bound_ttft
        out.unreduced_tflop, out.tflop = self.flops.model / 1e12, flops.model / 1e12
        out.unreduced_kv_mb, out.kv_mb = plain["kv_bytes"] / 1e6, reduced["kv_bytes"] / 1e6
        if reduced["peak_bytes"] is not None:
            out.unreduced_peak_mb, out.peak_mb = plain["peak_bytes"] / 1e6, reduced["peak_bytes"] / 1e6
        out.unreduced_prompts_s, out.prompts_s = (1e3 * out.batch / t for t in (out.unreduced_ttft_ms, out.ttft_ms))
        out.note = f"{self.repeats} pairs"


def summary(rows: Sequence[Row]) -> list[str]:
    """A short table: speed-ups, the shares of their bounds, and what the reducer itself costs."""
    lines = [
        f"{'model':<15}{'reducer':<12}{'keep':>5}{'batch':>6}{'prefill ms':>18}{'speed-up':>9}{'bound':>7}{'share':>6}"
        f"{'TTFT':>7}{'share':>6}{'reducer':>9}"
    ]
    for r in rows:
        head = f"{r.model:<15}{r.reducer:<12}{r.keep or '':>5}{r.batch:>6}"
        if r.note.startswith("not run"):
            lines.append(f"{head}  {r.note[:90]}")
            continue
        lines.append(
            f"{head}{r.unreduced_prefill_ms:>9.1f}{r.prefill_ms:>9.1f}{r.speedup_prefill:>8.2f}x{r.bound_prefill:>6.2f}x"
            f"{r.share_prefill:>6.2f}{r.speedup_ttft:>6.2f}x{r.share_ttft:>6.2f}{100 * r.reducer_share:>8.2f}%"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------- command
def model(
    preset: Annotated[Literal["cpu", "gpu"] | None, typer.Option("--preset", help="By default what this machine has.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file; device and versions are in every row.")] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help=f"One or more of {', '.join(MODELS)}.")] = None,
    reducers: Annotated[list[str] | None, typer.Option("--reducer", help="Reducer to measure; may be repeated.")] = None,
    keep: Annotated[list[int] | None, typer.Option("--keep", help="Budget; may be repeated.")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Pairs of runs per row.")] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="Begin no further row after this time.")] = 9.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")] = False,
) -> None:
    """Prefill, first token, decode, memory and FLOPs of models of real shape, reduced and not, beside the FLOP bound."""
    chosen = PRESETS[preset or ("gpu" if torch.cuda.is_available() else "cpu")]
    device = torch.device("cuda" if chosen is PRESETS["gpu"] else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnknownArgumentError("--preset gpu needs a CUDA device, and there is none: use --preset cpu")
    for name in models or ():
        if name not in MODELS:
            raise UnknownArgumentError(
                f"there is no model '{name}'{did_you_mean(name, MODELS)}: use one of {', '.join(MODELS)}"
            )
    for name in reducers or ():
        if name not in entries():
            raise UnknownArgumentError(f"there is no reducer '{name}'{did_you_mean(name, list(entries()))}: see `vtc list`")
    began, rows, late = time.monotonic(), [], 0
    for name in models or chosen.models:
        budgets = keep or MODELS[name].keep
        wanted = [("none", None, 1)]
        wanted += [(r, k, 1) for k in budgets for r in reducers or chosen.reducers]
        if name == (models or chosen.models)[0]:  # throughput against batch, on the first model
            wanted += [(BATCHED, budgets[0], b) for b in chosen.batches]
        if time.monotonic() - began > 60 * minutes:
            late += len(wanted)
            continue
        bench = Bench(name, chosen, device, repeats or chosen.repeats)
        for reducer, k, batch in wanted:
            if time.monotonic() - began > 60 * minutes:
                late += 1
                continue
            rows.append(bench.row(reducer, k, batch))
            if not as_json:
                print(summary(rows)[-1], file=sys.stderr, flush=True)
        del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    origin = provenance(device)
    write(out, [asdict(row) | origin for row in rows])
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "left_out": late, **origin}, indent=2))
        return
    print("\n".join(summary(rows)))
    if late:
        print(f"{late} rows were left out after {minutes:g} minutes: raise --minutes, or name fewer models with --model")


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, the same in every row."""
    here, where = commit(), machine()
    return {
        "device": where["gpu"] if device.type == "cuda" else where["cpu"],
        "threads": where["torch_threads"],
        "commit": f"{here['id'][:12]}{'+' if here['dirty'] else ''}" if here["id"] else "",
        **versions(),
    }
