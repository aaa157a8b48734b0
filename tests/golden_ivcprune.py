"""Golden cases of IVC-Prune (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_boundary import signals_of
from torch import Tensor

import vtc
from vtc.reducers.ivcprune import IVCPrune
from vtc.signals import AttentionTap, RotationTap

Tensors = dict[str, Tensor]


def ivcprune(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Measure values and rotations as in a patched model, then choose."""
    values, start, n = inputs["values"], params["image_start"], params["N"]
    length = values.shape[1]
    qwen, at = params["variant"] == "qwen", torch.arange(length)
    reducer: IVCPrune = vtc.create(
        "ivcprune", keep=params["keep_share"] if qwen else 0.31, layer=2, rule="fill" if qwen else "union"
    )
    visual, own = ((at >= start) & (at < start + n))[None], slice(start, start + n)
    last, valid = torch.tensor([length - 1]), torch.ones_like(visual)
    tap = AttentionTap(values[None], values[None], values[None], 1.0, None, True, last, visual, valid)
    tables = (t if qwen else t[None] for t in (inputs["cos"], inputs["sin"]))
    rotation = RotationTap(*(t[:, None] for t in tables))
    taps = {"places": at[None, own]}
    for need in reducer.needs:
        if need.name not in taps:
            measured = need.measure(rotation if need.of == "rotation" else tap)
            taps[need.name] = measured if need.axis == "row" else measured[:, own]
    signals = signals_of(values[:, own].mean(0)[None], reducer.count(n, None), **taps)  # type: ignore[arg-type]
    found, chosen = reducer.sets(signals), reducer.select(signals)
    keep = ~visual[0]
    keep[chosen.index[0] + start] = True
    kept = keep.nonzero()[:, 0]
    out = {name: t[0] for name, t in found.items() if t.is_floating_point()}
    out |= {name: t[0].nonzero()[:, 0] + start for name, t in found.items() if not t.is_floating_point()}
    prior = found["seeds"] | found["ivc_cos"] | found["ivc_sin"]
    return out | {
        "priority": prior[0].nonzero()[:, 0] + start,
        "cos_mean": signals.cos_mean[0].to(values.dtype),
        "sin_mean": signals.sin_mean[0].to(values.dtype),
        "keep_index": kept,
        "position_ids": inputs["position_ids"][:, kept] if qwen else kept,
    }


CASES: dict[str, Callable[[Tensors, dict[str, Any], str], Tensors]] = {"ivcprune": ivcprune}
