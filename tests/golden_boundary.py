"""Golden cases of the methods that prune or pool before the language model (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.engine.project import Projection
from vtc.engine.segment import cut
from vtc.engine.tower import add_newlines
from vtc.kernels import k_means, nearest_centre, take
from vtc.reducers.tokenpooling import third_party_start
from vtc.signals import AttentionTap, wide_cls_attn, wide_keys, zeroth_order_sensitivity
from vtc.views import narrow

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
    seg, _ = cut(keep, keep.sum(1).tolist(), torch.ones_like(keep), None, compact=False)
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


def zooprune(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Measure the sensitivity of the file's projector, then pick in the file's tokens."""
    w1, w2 = inputs["w1"], inputs["w2"]
    projector = nn.Sequential(nn.Linear(*w1.shape[::-1]), nn.GELU(), nn.Linear(*w2.shape[::-1]))
    projector.load_state_dict({"0.weight": w1, "0.bias": inputs["b1"], "2.weight": w2, "2.bias": inputs["b2"]})
    project = Projection(projector).function(params.get("rank"))
    measured = zeroth_order_sensitivity(inputs["features"], project, inputs["directions"], params["h"])
    if "sequence" not in inputs:
        projected = project(inputs["features"])
        reducer = vtc.create("zooprune", keep=params["k"], official=True)
        signals = signals_of(projected[None], params["k"], sensitivity=measured[None])
        return {
            "projected": projected,
            "sensitivity": measured,
            "order": reducer.pick(signals)[0],
            "keep_indices": reducer.select(signals).index[0],
        }
    label, n = inputs["frame_label"], len(inputs["frame_label"])
    patch, frames = label != params["newline_label"], int(label.max()) + 1
    zero, entry = torch.zeros(n, dtype=torch.long), torch.arange(n)
    kind = torch.where(patch, int(Kind.PATCH), int(Kind.NEWLINE))
    layout = Layout(kind, torch.where(patch, label, -1), zero, zero, zero, zero, entry, ((1, n),) * frames, True)
    shown = entry[patch]
    reducer = vtc.create("zooprune", keep=params["total_budget"], official=True)
    signals = Signals(
        features=inputs["sequence"][None, shown],
        layout=layout,
        entries=shown[None],
        budget=params["total_budget"],
        slots=n,
        taps={"sensitivity": inputs["sequence_score"][None, shown]},
    )
    kept = shown[reducer.select(signals).index[0]]
    frame = [(label[shown] == f).nonzero()[:, 0] for f in range(frames)]
    order = [shown[t[reducer.pick(narrow(signals, 0, t, params["per_frame"], f))[0]]] for f, t in enumerate(frame)]
    return {
        "sensitivity_lowrank": measured,
        "order": torch.cat(order),
        "keep_indices": add_newlines(layout, kept, entry, reducer.newline_policy),
    }


def tokenpooling(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """K-means from given starts, or medoids by the third-party rules."""
    tokens, k, rounds = inputs["tokens"], params["clusters"], params["iterations"]
    weighted = params["weighted"]
    if "init_indices" in inputs:
        weight = inputs["token_weight"][None] if weighted else None
        centres, _ = k_means(tokens[None], inputs["init_indices"][None], rounds, weight=weight)
        return {"centers": centres[0], "assignment": nearest_centre(tokens[None], centres)[0]}
    reducer = vtc.create("tokenpooling", keep=k, weighted=weighted, iterations=rounds, compat="tokenreduction")
    if weighted:
        weight = inputs["token_weight"]
        start = torch.sort(weight, dim=1, descending=True, stable=True).indices[:, :k]
        index = reducer.select(signals_of(tokens, k, received_attn=weight)).index
    else:
        weight, index = None, None
        first = inputs["first_index"].expand(len(tokens)).split(1)
        start = torch.stack([third_party_start(t, f, k) for t, f in zip(tokens, first, strict=True)])
    medoids, owner = reducer.medoids(tokens, weight, start)
    if index is not None and all(len(m.unique()) == k for m in medoids):
        assert torch.equal(index, medoids.sort(1).values)
    return {
        "center_indices": medoids,
        "centers": tokens.gather(1, medoids[..., None].expand(-1, -1, tokens.shape[2])),
        "assignment": owner,
    }


def hierpool(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Pool one document after the other, as released; padding and shuffling are what the callers of the release do around it."""
    factor = params["pool_factor"]

    def pool(document: Tensor, count: int, **more: Any) -> tuple[Tensor, Tensor]:
        keep = max(1, count // factor)
        if keep == len(document):  # nothing is pooled, and the release calls it one cluster
            return document, torch.zeros(len(document), dtype=torch.long)
        chosen = vtc.create("hierpool", keep=keep, official=True, **more).select(signals_of(document[None], keep))
        return chosen.features[0], chosen.owner[0]

    if "lengths" in inputs:  # the first ones after a shuffle are left alone, and means keep their length
        protected, parts = params["protected_tokens"], []
        lengths = inputs["lengths"].tolist()
        for document, shuffle in zip(inputs["embs"].split(lengths), inputs["shuffle"].split(lengths), strict=True):
            mixed = document[shuffle]
            parts.append(torch.cat([pool(mixed[protected:], len(mixed), renormalize=False)[0], mixed[:protected]]))
        return {"pooled": torch.cat(parts), "lengths": torch.tensor([len(p) for p in parts])}
    if "embs" in inputs:
        parts, left = [], params["padding_side"] == "left"
        for row in inputs["embs"]:
            real = (row != 0).any(1).nonzero()[:, 0]
            document = row[int(real[0]) :] if left else row[: int(real[-1]) + 1]
            parts.append(pool(document, len(document))[0])
        longest = max(map(len, parts))
        pad = [(0, 0, longest - len(p), 0) if left else (0, 0, 0, longest - len(p)) for p in parts]
        return {"pooled": torch.stack([nn.functional.pad(p, q) for p, q in zip(parts, pad, strict=True)])}
    out = {}
    for i in range(len(inputs)):
        document = inputs[f"emb{i}"]
        out[f"pooled{i}"], out[f"label{i}"] = pool(document, len(document))
    return out


CASES: dict[str, Callable[[Tensors, dict[str, Any], str], Tensors]] = {
    "vispruner": vispruner,
    "hiprune": hiprune,
    "cdpruner": cdpruner,
    "prumerge": prumerge,
    "zooprune": zooprune,
    "tokenpooling": tokenpooling,
    "hierpool": hierpool,
}
