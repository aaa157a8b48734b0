"""``vtc bench model``: what reducers save on models of real shape with random weights, against what their FLOPs would allow.

Speed does not depend on the weights, so nothing is downloaded. Every timing is a pair: an unreduced run interleaved with the
reduced one (:mod:`vtc.eval.speed`); speed-ups are medians of the pairs' ratios. The FLOP bound is the ratio of the FLOPs that torch
counts in both (:mod:`vtc.eval.flops`): of decoder and head for the prefill, of the whole model for the time to the first token. The
share says how much of it is reached; above 1 is possible, since attention does not run at the speed of the other products.

``overhead_ms`` is everything patching adds where a reducer has done all its work before the decoder: signals, selection, gathering,
masks, and the Python of every hook. It is the time to the first token of the patched model minus that of an ideal run on as many
tokens: the unpatched model, whose language model is given the first so many embeddings of the prompt by a hook that does nothing
else. Both are timed by the wall clock between two synchronisations, at the ends of the call alone, in turns; reported is the median
of the differences. Where it is below the reducer's own recorded time (a tower that got fewer tokens hides it, and so does noise),
that time is reported instead.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import vtc
from vtc.core import Reducer
from vtc.counts import count
from vtc.engine import upstream
from vtc.errors import UnknownArgumentError, did_you_mean
from vtc.eval.bench.common import (
    CsvOption,
    JsonOption,
    MinutesOption,
    PresetOption,
    before,
    device_of,
    provenance,
    reason,
    settle,
    write,
)
from vtc.eval.models import KNOWN
from vtc.eval.stats import spread
from vtc.inspect import reason_against
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
    """What is measured on a kind of device: models, reducers, batch sizes, timed rounds, tokens decoded, type."""

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
WARMUP, FEW, PAIRS = 2, 3, 12
"""Rounds that do not count; most timed rounds of a batch; pairs of runs that the overhead is the median of."""
BUILT_S = 5.0
"""Seconds expected for making the first model."""

Wanted = tuple[str, int | None, int]
"""Reducer (``"none"``: the unreduced model against itself, the noise of all other rows), budget, batch size."""


def rows_of(name: str, preset: Preset, reducers: Sequence[str] = (), keep: Sequence[int] = ()) -> list[Wanted]:
    """Return what is measured on a model; throughput against batch on the preset's first one only."""
    budgets = keep or MODELS[name].keep
    wanted: list[Wanted] = [("none", None, 1)]
    wanted += [(r, k, 1) for k in budgets for r in reducers or preset.reducers]
    if name == preset.models[0]:
        wanted += [(BATCHED, budgets[0], b) for b in preset.batches]
    return wanted


def before_the_decoder() -> list[str]:
    """Return the registered reducers that have done all their work when the decoder starts."""
    return [name for name, entry in entries().items() if "decoder" not in entry.stages]


# ------------------------------------------------------------------------------------------------------------------ models
def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model with random weights, on the device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = dict(shape.config)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=upstream.SDPA, trust_remote_code=False)
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
        pixels = {upstream.PIXELS: torch.randn(int(grid.prod(1).sum()), patch, generator=generator), "image_grid_thw": grid}
        around = ([config.vision_start_token_id], [config.vision_end_token_id])
    else:
        side, anyres = config.vision_config.image_size, config.model_type != "llava"
        from vtc.families import family_of

        slots = count(family_of(model), (width, height)).tokens
        views = (1 + (height // side) * (width // side),) if anyres else ()
        pixels = {upstream.PIXELS: torch.randn(batch, *views, 3, side, side, generator=generator)}
        if anyres:
            pixels["image_sizes"] = torch.tensor([[height, width]]).expand(batch, -1).contiguous()
        around = ([], [])
    token = getattr(config, "image_token_id", None) or config.image_token_index
    words = torch.randint(1000, 20000, (TEXT,), generator=generator).tolist()
    ids = torch.tensor([words[:4] + around[0] + [token] * slots + around[1] + words[4:]]).expand(batch, -1).contiguous()
    out = {**upstream.prompt(ids), **pixels}
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
    ideal_ttft_ms: float = math.nan  # unpatched, on as many tokens
    overhead_ms: float = math.nan
    overhead_share: float = math.nan  # of the unreduced prefill
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
    """All measurements on one model.

    Parameters
    ----------
    name : str
        Of :data:`MODELS`.
    preset : Preset
        Type, timed rounds, tokens decoded.
    device : torch.device
        Where.
    """

    def __init__(self, name: str, preset: Preset, device: torch.device) -> None:
        from vtc.eval.flops import count  # needs transformers, which the command line imports only where it must
        from vtc.families import family_of

        self.name, self.preset = name, preset
        self.shape = MODELS[name]
        self.model = build(self.shape, device, preset.dtype)
        self.facts = family_of(self.model).facts
        self.inputs = self._moved(prompt(self.model, self.shape, 1))
        self.flops = count(self.model, self.inputs, None).counted

    def _moved(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    def row(self, wanted: Wanted) -> Row:
        """Measure one reducer at one budget; what cannot be measured is a row with the reason."""
        reducer, keep, batch = wanted
        attention = upstream.attention_of(self.model.config.text_config)
        out = Row(self.name, reducer, keep, batch, attention, str(self.model.dtype).removeprefix("torch."))
        try:
            part = None if reducer == "none" else create(reducer, keep=keep)
            why = "" if part is None else reason_against(part, self.facts)
            if why:
                out.note = f"does not apply: {why}"
                return out
            self._fill(out, part)
        except Exception as error:  # one reducer that fails must not cost the others their rows
            out.note = failure(error)
        if math.isnan(out.ttft_ms):
            settle(self.model.device)  # what a failed run held; not in the handler, where its frames are alive
        return out

    def _fill(self, out: Row, part: Reducer | None) -> None:
        from vtc.eval.flops import count
        from vtc.eval.speed import measure

        token = getattr(self.model.config, "image_token_id", None) or self.model.config.image_token_index
        out.prompt_tokens = int(self.inputs[upstream.IDS].shape[1])
        out.visual_tokens = int((self.inputs[upstream.IDS] == token).sum())
        flops, kept = self.flops, None
        if part is not None:
            with vtc.patch(self.model, part) as handle:
                flops = count(self.model, self.inputs, handle).counted
                image = handle.stats.last.images[0]
                out.avg_tokens = image.avg_tokens
                if len(set(image.tokens_per_layer)) == 1 and out.batch == 1:
                    kept = image.kept
        inputs = self.inputs if out.batch == 1 else prompt(self.model, self.shape, out.batch)
        repeats = self.preset.repeats if out.batch == 1 else min(FEW, self.preset.repeats)
        found = measure(self.model, inputs, part, repeats=repeats, warmup=WARMUP, decode_steps=self.preset.decode_steps)
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
        if part is not None and kept is not None:
            out.ideal_ttft_ms, added = overhead(self.model, inputs, part, out.prompt_tokens - out.visual_tokens + kept, PAIRS)
            out.overhead_ms = max(out.reducer_ms, added)
            out.overhead_share = out.overhead_ms / out.unreduced_prefill_ms
        out.note = f"{repeats} rounds"


def failure(error: Exception) -> str:
    """Return the note of a row that could not be measured."""
    return f"{'out of memory' if isinstance(error, torch.cuda.OutOfMemoryError) else 'failed'}: {reason(error)}"


@contextlib.contextmanager
def shortened(model: nn.Module, length: int) -> Iterator[None]:
    """Let the language model see the first ``length`` embeddings of a prompt only: what a reducer that costs nothing would do."""
    from vtc.families import family_of

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return upstream.first_tokens(family.text, args, kwargs, length)

    family = family_of(model)
    hook = family.text.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def overhead(
    model: nn.Module, inputs: Mapping[str, Tensor], reducer: Reducer, length: int, repeats: int
) -> tuple[float, float]:
    """Return the milliseconds to the first token of an ideal run on ``length`` tokens, and what the patched run takes longer."""
    ideal: list[float] = []
    added: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for i in range(WARMUP + repeats):
            took = {}
            for patched in (False, True) if i % 2 else (True, False):  # nobody always profits from the other's warm caches
                with vtc.patch(model, reducer) if patched else shortened(model, length):
                    took[patched] = first_token_ms(model, inputs)
            if i >= WARMUP:
                ideal.append(took[False])
                added.append(took[True] - took[False])
    finally:
        gc.enable()
    return spread(ideal).value, spread(added).value


def first_token_ms(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Milliseconds from processed inputs to the chosen first token; a GPU is waited for at both ends alone."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        upstream.prefill(model, inputs).logits[:, -1].argmax(-1).tolist()
    return 1e3 * (time.perf_counter() - start)


def run(plan: Sequence[tuple[str, Sequence[Wanted]]], preset: Preset, device: torch.device, end: float) -> Iterator[Row]:
    """Measure rows of models, one model after the other, before ``end`` (:func:`time.monotonic`); yield each when it is there."""
    longest = BUILT_S
    for name, wanted in plan:
        began = time.monotonic()
        if not wanted or began + 2 * longest >= end:
            continue
        bench, why = None, ""
        try:
            bench = Bench(name, preset, device)
        except Exception as error:  # such as a model that does not fit
            why = failure(error)
        longest = max(longest, time.monotonic() - began)
        dtype = str(preset.dtype).removeprefix("torch.")
        for item in before(end, wanted):
            yield bench.row(item) if bench is not None else Row(name, *item, "", dtype, note=why)
        del bench
        settle(device)


def summary(rows: Sequence[Row]) -> list[str]:
    """A short table: speed-ups, the shares of their bounds, and what the reducer itself costs."""
    lines = [
        f"{'model':<15}{'reducer':<12}{'keep':>5}{'batch':>6}{'prefill ms':>18}{'speed-up':>9}{'bound':>7}{'share':>6}"
        f"{'TTFT':>7}{'share':>6}{'reducer':>9}{'all added':>11}"
    ]
    for r in rows:
        head = f"{r.model:<15}{r.reducer:<12}{r.keep or '':>5}{r.batch:>6}"
        if math.isnan(r.ttft_ms):
            lines.append(f"{head}  {r.note[:90]}")
            continue
        lines.append(
            f"{head}{r.unreduced_prefill_ms:>9.1f}{r.prefill_ms:>9.1f}{r.speedup_prefill:>8.2f}x{r.bound_prefill:>6.2f}x"
            f"{r.share_prefill:>6.2f}{r.speedup_ttft:>6.2f}x{r.share_ttft:>6.2f}{100 * r.reducer_share:>8.2f}%"
            + (f"{'-':>11}" if math.isnan(r.overhead_share) else f"{100 * r.overhead_share:>10.2f}%")
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------- command
def model(
    preset: PresetOption = None,
    out: CsvOption = None,
    models: Annotated[list[str] | None, typer.Option("--model", help=f"One or more of {', '.join(MODELS)}.")] = None,
    reducers: Annotated[list[str] | None, typer.Option("--reducer", help="Reducer to measure; may be repeated.")] = None,
    keep: Annotated[list[int] | None, typer.Option("--keep", min=1, help="Budget; may be repeated.")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Timed rounds per row.")] = None,
    minutes: MinutesOption = 9.0,
    as_json: JsonOption = False,
) -> None:
    """Prefill, first token, decode, memory and FLOPs of models of real shape, reduced and not, beside the FLOP bound."""
    end = time.monotonic() + 60 * minutes
    device = device_of(preset)
    chosen = PRESETS["gpu" if device.type == "cuda" else "cpu"]
    if repeats is not None:
        chosen = replace(chosen, repeats=repeats)
    for name in models or ():
        if name not in MODELS:
            raise UnknownArgumentError(
                f"there is no model '{name}'{did_you_mean(name, MODELS)}: use one of {', '.join(MODELS)}"
            )
    for name in reducers or ():
        if name not in entries():
            raise UnknownArgumentError(f"there is no reducer '{name}'{did_you_mean(name, list(entries()))}: see `vtc list`")
    plan = [(name, rows_of(name, chosen, reducers or (), keep or ())) for name in models or chosen.models]
    rows, origin = [], provenance(device)
    for row in run(plan, chosen, device, end):
        rows.append(row)
        write(out, [asdict(row) | origin for row in rows])  # what is there stays if the rest is interrupted
        if not as_json:
            print(summary([row])[-1], file=sys.stderr, flush=True)
    late = sum(len(wanted) for _, wanted in plan) - len(rows)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "left_out": late, **origin}, indent=2))
        return
    print("\n".join(summary(rows)))
    if late:
        print(f"{late} rows were left out after {minutes:g} minutes: raise --minutes, or name fewer models with --model")
