"""Golden cases of methods that weigh views or the question (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.engine import taps
from vtc.engine.undo import Undo
from vtc.reducers.globalcom2 import GlobalCom2, Scored
from vtc.signals import AttentionTap, cls_logits

Tensors = dict[str, Tensor]


def anyres_layout(side: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Layout, Tensor]:
    """Return the slots of an unpadded picture of ``size`` (width, height) with newlines, and each slot's patch (-1: a newline).

    Parameters
    ----------
    side : int
        Rows and columns of a view's patches.
    grid : (int, int)
        Rows and columns of crops.
    """
    (high, wide), (width, height) = grid, size
    rows, cols = high * side, wide * side
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    if width / height > cols / rows:
        pad = (rows - int(height * (cols / width))) // 2
        y, x = y[pad : rows - pad], x[pad : rows - pad]
    else:
        pad = (cols - int(width * (rows / height))) // 2
        y, x = y[:, pad : cols - pad], x[:, pad : cols - pad]

    def line(patches: Tensor, newline: Tensor) -> Tensor:
        return torch.cat([patches, newline], 1).flatten()

    new = torch.full_like(y[:, :1], -1)
    at = torch.arange(side * side)
    view = torch.cat([at * 0, line(y // side * wide + x // side + 1, new)])
    row, col = torch.cat([at // side, line(y % side, new)]), torch.cat([at % side, line(x % side, new)])
    layout = Layout(
        kind=torch.where(view < 0, int(Kind.NEWLINE), int(Kind.PATCH)),
        view=view,
        row=row,
        col=col,
        y=torch.cat([at // side, line(y, y[:, :1])]),
        x=torch.cat([at % side, line(x, new + cols + 1)]),
        slot=torch.arange(len(view)),
        grids=((side, side),) * (high * wide + 1),
        thumbnail=True,
    )
    return layout, torch.where(view < 0, -1, view * side * side + row * side + col)


def on_slots(layout: Layout, patch: Tensor, features: Tensor, scores: Tensor, newline: Tensor) -> Signals:
    """Return the signals of one image whose views have ``features (V, P, D)`` and ``scores (V, P)``."""
    real, at = patch >= 0, patch.clamp(min=0)
    n = len(patch)
    return Signals(
        features=torch.where(real[:, None], features.flatten(0, 1)[at], newline)[None],
        layout=layout,
        entries=torch.arange(n)[None],
        budget=n,
        slots=n,
        taps={"cls_logits": torch.where(real, scores.flatten()[at], 0.0)[None]},
    )


def released(params: dict[str, Any], **more: Any) -> GlobalCom2:
    """Return the reducer as released with the file's settings."""
    if "temperature" in params:
        more["temperature"] = params["temperature"]
    return vtc.create("globalcom2", keep=float(params["ratio"]), official=True, **more)


def globalcom2(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Share out, run one image's selection as released, or measure a CLIP layer first, by what the file brings."""
    if "hidden_in" in inputs:
        return _measured(inputs, params)
    if "crop_features" in inputs:
        return _crops(inputs, params)
    out: Tensors = {}
    side = params.get("side", 24)
    base = inputs["base_scores"]
    thumbnail = Scored([torch.arange(len(base)), torch.arange(0)], base, torch.ones(1, dtype=torch.float64), base)
    signals = Signals(
        inputs["base_feature"][None], Layout.grid(side, side), torch.arange(len(base))[None], len(base), len(base)
    )
    for number, ratio in enumerate(params["ratios"]):
        reducer = released({**params, "ratio": ratio})
        (chosen,) = reducer.official_picks(signals, thumbnail)
        out[f"thumb_idx_{number}"], out[f"thumb_feature_{number}"] = chosen, inputs["base_feature"][chosen]
        for wide, high in params["grids"]:
            weight = reducer.shares(base.view(side, side), (high, wide))
            name = f"{wide}x{high}_{number}"
            out[f"scales_{name}"] = reducer.kept_shares(weight, ratio).float()
            out[f"topk_{name}"] = torch.tensor(reducer.counts([side * side] * len(weight), weight, ratio))
    return out


def _crops(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """Lay the crops of one image out."""
    side, grid = params["side"], (params["num_patch_height"], params["num_patch_width"])
    layout, patch = anyres_layout(side, grid, params["original_size_wh"])
    features = torch.cat([torch.zeros_like(inputs["crop_features"][:1]), inputs["crop_features"]])
    scores = torch.cat([inputs["base_scores"][None], inputs["crop_scores"]])
    reducer = released(params)
    signals = on_slots(layout, patch, features, scores, inputs["newline"])
    scored = reducer.image(signals, 0)
    order, thumbnail = reducer.official_order(signals, scored)
    source = torch.where(order >= 0, patch[order], -1)[thumbnail:]
    out = {
        "scales": reducer.kept_shares(scored.weight[1:], params["ratio"]).float(),
        "tokens": reducer.select(signals).features[0, thumbnail:],
        "src_crop": torch.where(source >= 0, source // side**2 - 1, -1),
        "src_patch": torch.where(source >= 0, source % side**2, -1),
    }
    for crop, (chosen, tokens) in enumerate(
        zip(reducer.official_picks(signals, scored)[1:], scored.members[1:-1], strict=True)
    ):
        out[f"global_score.{crop}"] = scored.overall[tokens]
        out[f"sel.{crop}"] = torch.searchsorted(tokens, chosen)
    return out


def _measured(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """Tap a real CLIP layer that has the file's weights, then lay the image out."""
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    hidden, side = inputs["hidden_in"], params["side"]
    weights = {name.removeprefix("w.last."): t for name, t in inputs.items() if name.startswith("w.last.")}
    config = transformers.CLIPVisionConfig(
        hidden_size=hidden.shape[-1],
        intermediate_size=len(weights["mlp.fc1.bias"]),
        num_attention_heads=params["heads"],
        layer_norm_eps=params["eps"],
    )
    config._attn_implementation = "sdpa"
    layer = CLIPEncoderLayer(config).eval()
    layer.load_state_dict(weights)
    seen: list[AttentionTap] = []

    def observe(_module, query, key, value, mask, scaling, _ctx):
        seen.append(AttentionTap(query, key, value, scaling, mask, cls=True))

    undo = Undo()
    taps.attach(undo, layer.self_attn, observe)
    try:
        with torch.no_grad():
            layer.self_attn(layer.layer_norm1(hidden), attention_mask=None)
    finally:
        undo.run()
    scores = cls_logits().measure(seen[0])
    layout, patch = anyres_layout(side, (params["num_patch_height"], params["num_patch_width"]), params["original_size_wh"])
    reducer = released(params)
    signals = on_slots(layout, patch, hidden[:, 1:], scores, inputs["newline"])
    _, thumbnail = reducer.official_order(signals, reducer.image(signals, 0))
    return {"cls_scores": scores, "visual": reducer.select(signals).features[0], "n_thumb": torch.tensor([thumbnail])}


def script(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Merge by a mask, pick by the older code's process, or as released, by what the file brings."""
    if "keep_mask" in inputs:
        features, keep = inputs["features"], inputs["keep_mask"].bool()
        reducer = vtc.create("script", keep=1, merge=True, scaling=float(params["scaling"]))
        merged = [reducer.absorb(f[None], k.nonzero()[:, 0][None])[0][0] for f, k in zip(features, keep, strict=True)]
        return {"merged_features": torch.nn.utils.rnn.pad_sequence(merged, batch_first=True)}
    features, k = inputs["projected_features"], params["visual_token_num"]
    batch, n, dim = features.shape
    older = "scaling" in params
    more = dict(merge=True, scaling=float(params["scaling"])) if older else dict(official=True)
    if not older:
        more |= dict(threshold=params["sim_threshold"], hub=params["K"], gamma=params["gamma"])
    reducer = vtc.create("script", keep=k, **more)
    patches, text = inputs["image_embeds"], inputs["text_embeds"]
    signals = Signals(
        features, Layout.flat(n), torch.arange(n).expand(batch, n), k, n, {"clip_dot": reducer.clip_dot(patches, text)}
    )
    relevance, _ = reducer.relevance(signals)
    chosen = reducer.select(signals)
    exact = vtc.create("script", keep=k).pick(features, relevance, k)
    out = {"relevance": relevance, "keep_indices": chosen.index, "gs_order": exact}
    if older:
        return out | {"merged_features": chosen.features}
    score = reducer.redundancy(features)
    connected = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return out | {
        "selected_text": reducer.chosen_text(patches, text),
        "gsp_score": score,
        "gsp_indices": connected.sort(1).values,
        "dpp_order": reducer.pick(features, relevance, k),
    }


CASES = {"globalcom2": globalcom2, "script": script}
