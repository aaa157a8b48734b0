"""Golden cases of VScan (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_boundary import mask_of, signals_of
from torch import Tensor

from vtc.core import Facts, Layout, Signals, Stage
from vtc.kernels import topk
from vtc.reducers.vscan import Course, VScanBoundary, VScanLate
from vtc.signals import AttentionTap

Tensors = dict[str, Tensor]


def vscan(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """A cut inside the language model, or the scans of a LLaVA or Qwen tower, by what the file brings."""
    if "hidden" in inputs:
        return _late(inputs, params)
    return _qwen(inputs, params) if "grid_thw" in inputs else _llava(inputs, params)


def _merged(part: VScanBoundary, signals: Signals) -> Tensors:
    """What one view keeps, its features, and the kept token that each other one joined."""
    chosen = part.select(signals)
    n, index = signals.shape[1], chosen.index
    if chosen.features is None:  # everything is kept
        return {"keep": index[0], "kept_features": signals.features[0], "nearest_kept": index[0, :0]}
    left = mask_of(index, n)[0] == 0
    return {"keep": index[0], "kept_features": chosen.features[0], "nearest_kept": chosen.owner[0, left]}


def _llava(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """Every image of the batch by itself, features behind the file's projector."""
    k, grid = params["token_num"], params["grid"]
    part = VScanBoundary(keep=k, window=params["window"], local_share=params["local_share"], official=True)
    features = inputs["features"] @ inputs["projector"]
    low, high = (inputs[f"cls_attention_layer{i}"].mean(1) for i in (5, 22))
    n, images = grid * grid, []
    for b in range(len(features)):
        at, k = slice(b, b + 1), min(k, n)
        view = signals_of(features[at], k, layout=Layout.grid(grid, grid), low_attn=low[at], high_attn=high[at])
        none = torch.zeros(1, n, dtype=torch.bool)
        local = part.local(view) if k < n else none
        out = _merged(part, view)
        images.append(
            out
            | {
                "local_mask": local[0].long(),
                "keep_mask": mask_of(out.pop("keep")[None], n)[0],
                "returned_attention": part.overall(view, local)[0],
            }
        )
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}


def _qwen(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """One image on the grid of merged tokens."""
    _, rows, cols = (inputs["grid_thw"][0] // torch.tensor([1, params["merge"], params["merge"]])).tolist()
    ratio, n = params["ratio"], rows * cols
    part = VScanBoundary(keep=float(ratio), scan="quota", window=params["window"], official=True)
    view = signals_of(
        inputs["features"][None],
        part.count(n, FACTS),
        layout=Layout.grid(rows, cols),
        low_attn=inputs["attention_local"][None],
        high_attn=inputs["attention_global"][None],
    )
    local, overall = part.scans(view)
    score = view.low_attn.masked_fill(~local, -torch.inf)
    return _merged(part, view) | {
        "local_in_order": topk(score, int(local.sum()))[0],
        "global_in_order": topk(part.overall(view, local), int(overall.sum()))[0],
    }


FACTS = Facts(
    family="golden",
    layers=32,
    encoder_layers=24,
    feature_layer=22,
    tokens=None,
    max_tokens=None,
    grid=(1, 1),
    has_cls=True,
    provides=frozenset({"attention", "cls"}),
    stages=dict.fromkeys(Stage, ""),
)


def decoder_tap(inputs: Tensors, params: dict[str, Any], weights: tuple[str, ...], visual: Tensor) -> AttentionTap:
    """Queries and keys of one row as a layer's attention gets them; ``weights`` name norm, projections and their biases."""
    hidden, width, length = inputs["hidden"], params["head_dim"], len(inputs["hidden"])
    norm, wq, wk, *biases = (inputs[name] for name in weights)
    normed = hidden * (hidden.square().mean(1, keepdim=True) + params["rms_eps"]).rsqrt() * norm
    frequency = params.get("rope_theta", params.get("rope_base")) ** -(torch.arange(0, width, 2, dtype=hidden.dtype) / width)
    angle = torch.arange(length, dtype=hidden.dtype)[:, None] * frequency
    cos, sin = (torch.cat([t, t], 1) for t in (angle.cos(), angle.sin()))

    def rotated(weight: Tensor, bias: Tensor | int) -> Tensor:
        t = (normed @ weight.T + bias).view(length, -1, width).transpose(0, 1)
        return (t * cos + torch.cat([-t[..., width // 2 :], t[..., : width // 2]], -1) * sin)[None]

    query, key = (rotated(w, b) for w, b in zip((wq, wk), biases or (0, 0), strict=True))
    last, valid = torch.tensor([length - 1]), torch.ones_like(visual)[None]
    return AttentionTap(query, key, key, width**-0.5, None, True, last, visual[None], valid, rope=(cos[None], sin[None]))


def _late(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """The measure on the file's queries and keys, and the selection."""
    hidden, start, n, length = inputs["hidden"], params["start"], params["n"], len(inputs["hidden"])
    part = VScanLate(keep=n, course=Course(cuts=(1,), late=(params["keep"],)), rotary=params["rotary"])
    at = torch.arange(length)
    tap = decoder_tap(inputs, params, ("norm_weight", "wq", "wk"), (at >= start) & (at < start + n))
    (need,) = part.needs
    scores = need.measure(tap)[:, start : start + n]
    index = part.select(signals_of(hidden[None, start : start + n], part.count(n, FACTS), **{need.name: scores})).index[0]
    rows = torch.cat([at[:start], index + start, at[start + n :]])
    return {"scores": scores[0], "keep": index, "rows": rows}


CASES: dict[str, Callable[[Tensors, dict[str, Any], str], Tensors]] = {"vscan": vscan}
