"""Golden cases of the methods that prune or pool before the language model (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.core import Layout, Signals
from vtc.engine.segment import cut, take
from vtc.signals import AttentionTap, wide_cls_attn, wide_keys

Tensors = dict[str, Tensor]


def signals_of(features: Tensor, budget: int, **more: Any) -> Signals:
    """Signals of plain images; imported late, since the map of all cases imports this module."""
    from golden_cases import signals_of

    return signals_of(features, budget, **more)


def mask_of(index: Tensor, n: int) -> Tensor:
    """``(B, N)`` 1 where a token is kept."""
    return torch.zeros(len(index), n, dtype=torch.long).scatter(1, index, 1)


def vispruner(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Select per image."""
    features = inputs["features"]
    reducer = vtc.create("vispruner", keep=params["n_keep"], important=params["important_ratio"])
    signals = signals_of(features, params["n_keep"], cls_attn=inputs["cls_attention"].mean(1))
    return {
        "important_indices": reducer.split(signals)[0],
        "keep_mask": mask_of(reducer.select(signals).index, features.shape[1]),
    }


def hiprune(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Select per crop, or on a Qwen grid, whose sequence the engine then shortens."""
    options = dict(alpha=params["alpha"], object_layer=params["object_layer_1based"], official=True)
    if "object_layer_attn" in inputs:
        crops, n, grid = params["crops"], params["N"], params["grid"]
        reducer = vtc.create("hiprune", keep=params["retention_total"], **options)
        entry = torch.arange(crops * n)
        view, row, col = entry // n, entry % n // grid, entry % n % grid
        layout = Layout(entry * 0, view, row, col, row, col, entry, ((grid, n // grid),) * crops)
        flat = {
            "object_attn": inputs["object_layer_attn"][:, :, 1:].mean(1).reshape(1, -1),
            "deep_attn": inputs["deep_layer_attn"][:, :, 1:].mean(1).reshape(1, -1),
        }
        features = inputs["features"].reshape(1, crops * n, -1)
        chosen = reducer.select(signals_of(features, params["retention_total"], layout=layout, **flat))
        return {"keep_mask": mask_of(chosen.index, crops * n).reshape(crops, n)}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    visual = ids == params["image_token"]
    reducer = vtc.create("hiprune", keep=params["retain_ratio"], **options)
    n = int(visual.sum())
    signals = signals_of(
        embeds[visual][None],
        reducer.budget.tokens(n),
        layout=Layout.grid(params["grid_h"], params["grid_w"]),
        object_attn=inputs["object_layer_score"][None],
        deep_attn=inputs["deep_layer_score"][None],
    )
    index = reducer.select(signals).index
    keep = ~visual
    keep[0, visual[0].nonzero()[:, 0][index[0]]] = True
    # M-RoPE positions cannot be compacted: what stays keeps its own
    seg, _ = cut(keep, torch.ones_like(keep), None, compact=False)
    return {
        "kept_in_image": mask_of(index, n)[0],
        "inputs_embeds": take(embeds, seg.rows, 1),
        "position_ids": take(inputs["position_ids"], seg.rows, 2),
        "attention_mask": torch.ones_like(seg.rows) if seg.valid is None else seg.valid.long(),
    }


def cdpruner(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Score and select the crops of one image, as released; without repetitions the guarded choice is the same."""
    features, k = inputs["features"], params["n_keep"]
    crops, n, dim = features.shape
    reducer = vtc.create("cdpruner", keep=crops * k, official=True)
    entry = torch.arange(crops * n)
    layout = Layout(entry * 0, entry // n, entry * 0, entry % n, entry * 0, entry % n, entry, ((1, n),) * crops)
    cosine = reducer.clip_cosine(inputs["image_embeds"], inputs["text_embeds"]).reshape(1, -1)
    signals = signals_of(features.reshape(1, crops * n, dim), crops * k, layout=layout, clip_cosine=cosine)
    relevance = reducer.relevance(signals)[0].reshape(crops, n)
    picks = reducer.pick(features, relevance, k)
    index = reducer.select(signals).index
    if index.shape[1] == crops * k:
        assert torch.equal(vtc.create("cdpruner", keep=crops * k).select(signals).index, index)
    return {
        "relevance": relevance,
        "selected_in_order": picks,
        "keep_mask": mask_of(index, crops * n).reshape(crops, n),
    }


def prumerge(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Measure the last layer's attention and keys, then merge, as released."""
    query, key = inputs["last_layer_q"], inputs["last_layer_k"]
    batch, length, width = query.shape
    heads = math.gcd(width, 4)  # the recorded projections are not split in heads; the number has no influence
    query, key = (t.view(batch, length, heads, -1).transpose(1, 2) for t in (query, key))
    tap = AttentionTap(query, key, key, (width // heads) ** -0.5, cls=True)
    attention, keys = wide_cls_attn().measure(tap), wide_keys().measure(tap)
    n = length - 1
    name = "prumerge_plus" if params["plus"] else "prumerge"
    keep = 1.0 if params["adaptive"] else (1 + params["plus"]) * int(n * params["ratio"]) + 1
    reducer = vtc.create(name, keep=keep, adaptive=params["adaptive"], official=True)
    hidden = inputs["hidden_states"]
    signals = signals_of(hidden[:, 1:], reducer.budget.tokens(n), cls=hidden[:, :1], wide_cls_attn=attention, wide_keys=keys)
    return {"cls_attention": attention, "tokens": reducer.select(signals).features}


CASES: dict[str, Callable[[Tensors, dict[str, Any], str], Tensors]] = {
    "vispruner": vispruner,
    "hiprune": hiprune,
    "cdpruner": cdpruner,
    "prumerge": prumerge,
}
