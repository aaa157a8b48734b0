"""Golden files of the methods for clips: ``CASES`` as in :mod:`golden_cases`."""

from __future__ import annotations

from typing import Any

import torch
from golden_decoder import FACTS
from golden_evs import clip
from torch import Tensor

import vtc
from vtc.core import Layout, Signals
from vtc.reducers import dycoke as dc
from vtc.reducers import vidcom2 as vc

Tensors = dict[str, Tensor]


def signals_of(features: Tensor, layout: Layout, budget: int, **taps: Tensor) -> Signals:
    """Return the signals of one whole clip ``(N, D)``."""
    n = len(layout)
    assert features.shape[0] == n
    return Signals(features[None], layout, torch.arange(n)[None], budget, n, {name: t[None] for name, t in taps.items()})


def vidcom2(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Scores and choice of one clip, by the release's count or the served one."""
    if "video_size_thw" in params:
        t, high, wide = params["video_size_thw"]
        layout, keep = clip(t, high // params["spatial_merge_size"], wide // params["spatial_merge_size"]), 1.0 - params["q"]
        reducer = vtc.create("vidcom2", keep=keep, rule="served")
    else:
        layout, keep = clip(params["frames"], *params["grid"]), params["base_scale"]
        reducer = vtc.create("vidcom2", keep=float(keep), rule="release")
    features, frames = inputs["features"], layout.views
    tokens = list(torch.arange(len(layout)).view(frames, -1))
    found = vc.likeness(features, tokens)
    scale = vc.scales(found.clip, tokens, keep)
    wanted = reducer.wanted(layout, FACTS)
    index = reducer.select(signals_of(features, layout, wanted)).index[0]
    released = vtc.create("vidcom2", keep=float(keep), rule="release")
    out = {
        "channels": found.channels,
        "video_score": found.clip.view(frames, -1),
        "frame_score": found.frame.view(frames, -1),
        "frame_probs": vc.frame_shares(found.clip, tokens),
        "scales": scale,
        "frame_budget": vc.budgets(scale, torch.full((frames,), len(layout) // frames)),
        "indices": index,
        "indices_before_reconcile": released.select(signals_of(features, layout, wanted)).index[0],
    }
    if "newline" in inputs:
        out["indices_with_newlines"] = vc.with_newlines(index, frames, layout.grids[0])
    return out


def dycoke(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """One clip, or decoding steps, by what the file brings."""
    if "attention" in inputs:
        return _steps(inputs["attention"], params)
    frames, grid, features = params["frames"], params["grid"], inputs["features"]
    reducer = vtc.create("dycoke", keep=1.0, ratio=params["K"], official=True)
    layout = clip(frames, *grid)
    tokens = torch.arange(len(layout)).view(frames, -1)
    kept = reducer.select(signals_of(features, layout, len(layout))).index[0]
    likeness = dc.similarities(features, tokens, dc.references(frames, official=True))
    return {
        "frame_counts": layout.view[kept].bincount(minlength=frames),
        "order": dc.released_order(kept, tokens, likeness),
        "sorted": kept,
        "pair_similarity": torch.stack([likeness[t] for t in likeness if t % 2]),
        "window_similarity": torch.stack([likeness[t] for t in likeness if t % 2 == 0]),
    }


def _steps(attention: Tensor, params: dict[str, Any]) -> Tensors:
    start, length = params["image_start"], params["image_length"]
    kept, count, pruned, found, before = [], [], [], [], None
    for t, row in enumerate(attention):
        size = start + length + params["text_after"] + t + 1
        keys, similarity, before = dc.decode_keys(
            row[:, :size], before, start, length, prune=params["P"], threshold=params["threshold"]
        )
        kept.append(torch.nn.functional.pad(keys, (0, attention.shape[2] - len(keys)), value=-1))
        count.append(len(keys))
        pruned.append(int(similarity < params["threshold"]))
        found.append(similarity)
    return {
        "kept": torch.stack(kept),
        "kept_count": torch.tensor(count),
        "pruned": torch.tensor(pruned),
        "similarity": torch.tensor(found),
    }


CASES = {"vidcom2": vidcom2, "dycoke": dycoke}
