"""The speed pass: vision encode, reduction, prefill, first token, decode, KV-cache bytes, peak memory.

All parts are timed inside one ordinary forward of the model, by hooks that are taken off afterwards:

* **vision**: from entering the vision tower to leaving the projector; includes what a reducer does in there.
* **prefill**: from entering the language model with the prompt's embeddings to the logits of the last position; includes the
  reducers at the boundary and inside the decoder.
* **TTFT**: the whole forward on processed inputs, up to the chosen first token: vision, prefill and the glue between them.
* **decode**: one forward per further token, with the cache of the prefill.
* **reduction**: the reducer's own time (signals and selection), wherever it ran. It is part of vision or prefill, not on top.

A reduced run is always interleaved with an unreduced one, and the speed-up is the median of the pairs' ratios: whatever else the
machine does meanwhile hits both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vtc
from vtc.core import Reducer
from vtc.engine import upstream
from vtc.eval.stats import spread
from vtc.families import family_of

PARTS = ("vision_ms", "prefill_ms", "ttft_ms", "decode_ms")


@dataclass
class Run:
    """One timed run.

    Attributes
    ----------
    times : dict
        Milliseconds by name of :data:`PARTS`; ``decode_ms`` is the median of the run's steps.
    reducer_ms : float
        The reducer's own time, 0 for an unreduced run.
    kv_bytes : int
        KV cache after the prefill.
    peak_bytes : int or None
        Peak of allocated memory on CUDA, else None.
    """

    times: dict[str, float]
    reducer_ms: float
    kv_bytes: int
    peak_bytes: int | None


def kv_cache_bytes(cache: Any) -> int:
    """Bytes of the storage that the keys and values of all layers hold (not of the views onto it)."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _marks(model: nn.Module) -> Iterator[dict[str, float]]:
    """Note when tower, projector, language model and head are entered and left."""
    family = family_of(model)
    seen: dict[str, float] = {}

    def mark(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen[name] = _now(model.device)

        return hook

    # prepended: starts before a reducer's hook on the same module; appended: ends after it
    hooks = [
        family.tower.register_forward_pre_hook(mark("vision"), prepend=True),
        (family.projector or family.tower).register_forward_hook(mark("encoded")),
        family.text.register_forward_pre_hook(mark("prefill"), prepend=True),
        model.get_output_embeddings().register_forward_hook(mark("logits")),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _positions(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Return the position of the mask's last token where forward does not know it: under M-RoPE ``generate`` passes it."""
    family = family_of(model)
    if not family.facts.mrope:
        return {}
    return {upstream.POSITIONS: (family.base.rope_deltas + mask.shape[1] - 1).expand(3, -1, -1)}


def run_once(model: nn.Module, inputs: Mapping[str, Tensor], reducer: Reducer | None, decode_steps: int) -> Run:
    """Time one prefill and some decode steps; patching and un-patching are outside the timed parts."""
    device = model.device
    handle = vtc.patch(model, reducer) if reducer is not None else None
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad(), _marks(model) as seen:
            start = _now(device)
            out = upstream.prefill(model, inputs)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            end = _now(device)
        cache = upstream.cache_of(out)
        held = kv_cache_bytes(cache)
        mask, steps = inputs[upstream.MASK], []
        with torch.no_grad():
            for _ in range(decode_steps):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                begin = _now(device)
                out = upstream.decode(model, token, cache, mask, **_positions(model, mask))
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                steps.append(1e3 * (_now(device) - begin))
        times = {
            "vision_ms": 1e3 * (seen["encoded"] - seen["vision"]),
            "prefill_ms": 1e3 * (seen["logits"] - seen["prefill"]),
            "ttft_ms": 1e3 * (end - start),
            "decode_ms": spread(steps).value,
        }
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Run(times, handle.stats.last.reducer_ms if handle is not None else 0.0, held, peak)
    finally:
        if handle is not None:
            handle.remove()


def measure(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    reducer: Reducer | None,
    *,
    repeats: int,
    warmup: int,
    decode_steps: int,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Time a reducer against the unreduced model.

    Parameters
    ----------
    model : Module
        Unpatched.
    inputs : mapping
        Processed prompts, all alike, without padding.
    reducer : Reducer or None
        ``None`` times the unreduced model against itself: the noise floor of the speed-ups.
    repeats, warmup, decode_steps : int
        Timed pairs, discarded pairs, tokens decoded per run.
    progress : callable or None
        Called after every pair.

    Returns
    -------
    dict
        Plain data: medians with the 20th and 80th percentile, paired speed-ups, bytes.
    """
    device, dtype = model.device, model.dtype
    inputs = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
    pairs: list[tuple[Run, Run]] = []
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            if i % 2:  # alternate who goes first: neither always profits from the other's warm caches
                reduced = run_once(model, inputs, reducer, decode_steps)
                plain = run_once(model, inputs, None, decode_steps)
            else:
                plain = run_once(model, inputs, None, decode_steps)
                reduced = run_once(model, inputs, reducer, decode_steps)
            if i >= warmup:
                pairs.append((plain, reduced))
            if progress is not None:
                progress()
    finally:
        if enabled:
            gc.enable()
    result: dict[str, Any] = {
        "batch_size": int(inputs[upstream.IDS].shape[0]),
        "prompt_tokens": int(inputs[upstream.IDS].shape[1]),
        "unreduced": _summary([p for p, _ in pairs]),
        "reduced": _summary([r for _, r in pairs]),
    }
    result["speedup"] = {
        part.removesuffix("_ms"): spread([p.times[part] / r.times[part] for p, r in pairs]).to_dict() for part in PARTS
    }
    return result


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    out: dict[str, Any] = {part: spread([r.times[part] for r in runs]).to_dict() for part in PARTS}
    out["reducer_ms"] = spread([r.reducer_ms for r in runs]).to_dict()
    out["kv_bytes"] = runs[-1].kv_bytes
    out["peak_bytes"] = max((r.peak_bytes for r in runs if r.peak_bytes is not None), default=None)
    return out
