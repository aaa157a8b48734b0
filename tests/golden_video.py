"""Golden files of the methods for clips: ``CASES`` as in :mod:`golden_cases`."""

from __future__ import annotations

import math
from typing import Any

import torch
from golden_decoder import FACTS
from golden_evs import clip
from torch import Tensor

import vtc
from vtc.core import Layout, Signals
from vtc.errors import BudgetError
from vtc.kernels import merge_scatter, topk_sorted
from vtc.reducers import dycoke as dc
from vtc.reducers import fastvid as fv
from vtc.reducers import framefusion as ff
from vtc.reducers import holitom as ht
from vtc.reducers import sttm as st
from vtc.reducers import vidcom2 as vc
from vtc.signals import AttentionTap
from vtc.video import density_scores, frame_similarity, place_similarity

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


def holitom(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Windows alone, one clip, or the stage inside the decoder, by what the file brings."""
    if "attn_last" in inputs:
        return _halved(inputs, params)
    if "tokens" not in inputs:
        cut = ht.windows_of(inputs["similarity"] > params["tau"], params["max_window"])
        return _cut(cut) | {"total": torch.tensor([cut.best[-1]])}
    x = inputs["tokens"]
    frames, n, width = x.shape
    side = math.isqrt(n)
    layout = clip(frames, side, side) if side * side == n else clip(frames, 1, n)
    stage = ht.HoliTomOuter(
        keep=float(params["r"]),
        tau=params["tau"],
        beta=None if params.get("no_beta") else params["beta"],
        neighbours=params["K"],
        longest=params["max_window"],
        contextual=params["D"],
        official=True,
    )
    signals = signals_of(x.flatten(0, 1), layout, len(layout), received_attn=inputs["attn"].flatten())
    places = torch.arange(len(layout)).view(frames, n)
    cut, same = stage.cut(signals, places)
    out = _cut(cut) | {"similarity": place_similarity(x.flatten(0, 1), places)}
    out["ratio"] = torch.tensor([ht.adjusted_ratio(params["r"], frames * n, cut.best[-1])])
    pieces = ht.released_order(stage.pieces(signals))
    for w, (s, e) in enumerate(cut.spans):
        static = same[s:e].all(0) if e > s else torch.zeros(n, dtype=torch.bool)
        own = static.nonzero()[:, 0]
        if len(own):
            mean = x[s : e + 1, own].mean(0)
            count = next((len(p.index) for p in pieces if p.window == w and torch.equal(p.places, own)), 0)
            out[f"static_all_pos.{w}"] = own
            out[f"density.{w}"], out[f"score.{w}"] = density_scores(mean, min(params["K"], max(count, 1)))
        mine = [p for p in pieces if p.window == w]
        still = mine[: len(mine) - (e - s + 1)] if len(own) < n else mine
        out[f"static_pos.{w}"] = torch.cat([p.index for p in still]) % n if still else own[:0]
        moving = mine[len(still) :]
        if moving:
            out[f"dynamic_pos.{w}"] = torch.stack([p.index % n for p in moving])
    if params["newline"] == "one_token":
        out["tokens"] = torch.cat([p.features for p in pieces])
        return out
    chosen = stage.select(signals)
    rows = chosen.index[0] // side  # of the whole clip
    parts = []
    for row in rows.unique():
        parts += [chosen.features[0, rows == row], inputs["newline"][None]]
    return out | {"tokens": torch.cat(parts)}


def _cut(cut: ht.Windows) -> Tensors:
    return {"windows": torch.tensor(cut.spans), "static_count": cut.gain, "dp": torch.tensor(cut.best)}


def _halved(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    start, n, hidden = params["start"], params["n"], inputs["hidden"]
    score = inputs["attn_last"].mean(0)[start : start + n]
    stage = ht.HoliTomInner(keep=1.0, before=1, share=params["r"])
    chosen = stage.select(signals_of(hidden[start : start + n], Layout.flat(n), n, last_attn=score))
    index, owner = chosen.index[0], chosen.owner[0]
    other = torch.ones(n, dtype=torch.bool).index_fill(0, index, False).nonzero()[:, 0]
    before, after = torch.arange(start), torch.arange(start + n, len(hidden))
    return {
        "score": score,
        "merged_from": other + start,
        "merged_into": index[owner[other]] + start,
        "keep": torch.cat([before, index + start, after]),
        "hidden": torch.cat([hidden[before], chosen.features[0], hidden[after]]),
    }


def fastvid(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """One of the signals, or one clip, by what the file brings."""
    if "tokens" in inputs:
        return _pooling_head(inputs, params)
    if "cos" in inputs:
        return _last_block(inputs, params)
    version = {"qwen25": "qwen"}.get(params["v"], params["v"])
    frames, n, start = params["F"], params["N"], params["start"]
    reducer = vtc.create(
        "fastvid",
        keep=float(params["r"]),
        version=version,
        scenes=params["c"],
        tau=params["tau"],
        context=params["d"],
        stride=params["p"],
        beta=params["beta"],
        ignore=params.get("ignore", 0.95),
        official=True,
    )
    length = len(inputs["hidden"])
    if version == "llavavideo":  # a newline ends every row
        side = params["side"]
        cell = torch.arange(frames * side * (side + 1)).view(frames, side, side + 1) + start
        video, newline = cell[..., :-1].reshape(frames, n), cell[..., -1].reshape(frames, side)
        last = int(cell.max()) + 1
    else:
        video, newline, last = torch.arange(frames * n).view(frames, n) + start, None, start + frames * n
    x = inputs["hidden"][video.flatten()]
    tokens = torch.arange(frames * n).view(frames, n)
    chosen = reducer.reduce(x, tokens, inputs["attn"], inputs["global"], frames * n)
    similarity = frame_similarity(inputs["global"])
    plan = reducer.plan(similarity, n, frames * n)
    salient = [k for seg in plan for k in seg.salient]
    anchors = [k for seg in plan for k in seg.anchors]
    out = {
        "similarity": similarity,
        "segment_sizes": torch.tensor([seg.stop - seg.start for seg in plan]),
        "salient_per_frame": torch.tensor(salient),
        "anchors_per_frame": torch.tensor(anchors),
    }
    best = [fv.top(inputs["attn"][t], k) for t, k in enumerate(salient)]
    rest = [fv.others(b, n) for b in best]
    scores = [density_scores(x[tokens[t, r]], reducer.neighbours) for t, r in enumerate(rest)]
    if len({len(r) for r in rest}) == 1:
        ordered = [a.argsort(descending=True, stable=True)[:k] for a, k in zip(inputs["attn"], salient, strict=True)]
        out |= {"salient": torch.stack(ordered), "rest": torch.stack(rest)}
        out |= {"density": torch.stack([d for d, _ in scores]), "score": torch.stack([s for _, s in scores])}
    for t, (density, score) in enumerate(scores):
        out |= {f"rest.{t}": rest[t], f"density.{t}": density, f"score.{t}": score}
    kept = video.flatten()[chosen.index[0]]
    rows = inputs["hidden"].clone()
    rows[kept] = chosen.features[0]
    here = torch.cat([torch.arange(start), kept, torch.arange(last, length)])
    if newline is not None:
        side = params["side"]
        row = torch.zeros(frames * side, dtype=torch.bool).index_fill(0, chosen.index[0] // side, True)
        here = torch.cat([here, newline.flatten()[row]])
    here = here.sort().values
    return out | {"keep": here, "hidden": rows[here]}


def _pooling_head(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    state = {name[2:]: t for name, t in inputs.items() if name.startswith("w.")}
    feature, attention = fv.pooling_head(inputs["tokens"], state, params["heads"], eps=params["eps"])
    return {
        "frame_global": feature,
        "frame_attn": attention,
        "attn_bilinear": fv.pooled_attention(attention, params["side"], bilinear=True),
        "attn_average": fv.pooled_attention(attention, params["side"], bilinear=False),
    }


def _last_block(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """The tap's keys and queries are rotated; tokens come in the tower's order."""
    frames, cells = params["F"], params["gh"] * params["gw"]

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * inputs["cos"][:, None] + torch.cat([-high, low], -1) * inputs["sin"][:, None]

    query, key = (rotated(inputs[name]).view(frames, -1, params["heads"], params["head_dim"]).transpose(1, 2) for name in "qk")
    values = fv.probe_keys(AttentionTap(query, key, key, params["head_dim"] ** -0.5))
    values = values.unflatten(1, (cells, -1)).mean(2)
    found = torch.stack([fv.probed(v) for v in values])
    order = inputs["window_index"].argsort()
    return {"attn_window_order": found, "attn": found.flatten()[order].view(frames, cells)}


def sttm(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Trees, links and tokens of one clip."""
    x = inputs["features"].permute(0, 2, 3, 1)
    frames, rows, cols = x.shape[:3]
    layout, features = clip(frames, rows, cols), x.reshape(frames * rows * cols, -1)
    weighted = params["weighted_average"]
    reducer = vtc.create(
        "sttm",
        keep=1.0,
        spatial=params["spatial_threshold"],
        temporal=params["temporal_threshold"],
        root=params["root_level"],
        weighted=weighted,
        adaptive=True,
        official=True,
    )
    tokens = torch.arange(len(layout)).view(frames, -1)
    least = reducer.measure(features, tokens, (rows, cols))
    forest = st.grow(least, (rows, cols), frames, reducer.root, reducer.spatial, weighted=weighted)
    links = st.link(features, tokens, forest)
    stands = reducer.linked(features, tokens, forest)
    chosen = reducer.select(signals_of(features, layout, len(layout)))
    index = chosen.index[0]
    rep = torch.unique(stands)
    return {
        "tree_boxes": forest.boxes,
        "tree_features": torch.cat([st.node_features(features, tokens, forest, t)[1] for t in range(frames)]),
        "tree_sizes": forest.size,
        "tree_per_frame": forest.boxes[:, 0].bincount(minlength=frames),
        "pairs_contained": links.pairs,
        "pair_similarity": links.cosine,
        "pairs_merged": links.pairs[links.cosine >= reducer.temporal],
        "representative": stands,
        "boxes": forest.boxes[rep],
        "features_out": chosen.features[0],
        "sizes": chosen.owner[0].bincount(minlength=len(index)),
        "position_index": index,
    }


def framefusion(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """The budget's table, one call, or the whole schedule, by what the file brings."""
    if "sparsity" in inputs:
        return {"ratio": torch.tensor([_sparsity(row, c, params) for row, c in zip(inputs["sparsity"], inputs["cost"])])}  # noqa: B905
    if "q" in inputs:
        return _pruned(inputs, params)
    if "w" in inputs:
        return _cascade(inputs, params)
    rule = ff.Rule(params["similarity_lower_bound"], params["ratio_lower_bound"], params["cost"], ff.RELEASED_LAYERS)
    before = tuple(params["sparsity_before"])
    at, patch = torch.arange(len(inputs["hidden"])), inputs["patch_type"]
    video = at[patch >= 0]
    order, similarity = ff.neighbours(inputs["hidden"][video], patch[video])
    _, share, allowed = ff.to_merge(similarity, rule, before)
    keep, hidden, state = _merge(inputs["hidden"], patch, rule, ff.State(before))
    return {
        "order": video[order],
        "similarity": similarity,
        "ratio": torch.tensor([share]),
        "upper": torch.tensor([allowed]),
        "keep": keep,
        "hidden": hidden,
        "patch_type": patch[keep],
        "finish": torch.tensor([int(state.merged), int(state.pruned)]),
        "sparsity": torch.tensor(state.shares),
    }


def _sparsity(row: Tensor, cost: Tensor, params: dict[str, Any]) -> float:
    try:
        return ff.sparsity([float(x) for x in row if x >= 0], float(cost), params["num_layers"], strict=True)
    except BudgetError:
        return -1.0


def _merge(hidden: Tensor, patch: Tensor, rule: ff.Rule, state: ff.State) -> tuple[Tensor, Tensor, ff.State]:
    """One merging call on a whole sequence: what is kept, its states, and how far the clip has come."""
    at = torch.arange(len(hidden))
    video = at[patch >= 0]
    x = hidden[video]
    order, similarity = ff.neighbours(x, patch[video])
    gone, share, allowed = ff.to_merge(similarity, rule, state.shares)
    left, owner = ff.runs(order, gone)
    rows = hidden.clone()
    rows[video[left]] = merge_scatter(x[None], owner[None], len(left))[0]
    keep = torch.cat([at[patch < 0], video[left]]).sort().values
    if share < allowed:
        return keep, rows[keep], ff.State((*state.shares, share), share < rule.dry, False)
    return keep, rows[keep], ff.State(state.shares, True, True)


def _attention(query: Tensor, key: Tensor, queries: int) -> Tensor:
    """The reducer's measure on ``(H, q, d)`` queries, the last of ``(H, S, d)`` keys."""
    last = torch.tensor([query.shape[1] - 1])
    tap = AttentionTap(query[None], key[None], key[None], query.shape[-1] ** -0.5, None, True, last)
    return ff.TailAttention(queries)(tap)[0]


def _pruned(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    start, n = params["start"], params["n"]
    rule = ff.Rule(0.6, 0.1, params["cost"], ff.RELEASED_LAYERS)
    score = _attention(inputs["q"], inputs["k"], params["num_queries"])[start : start + n]
    kept = topk_sorted(score[None], rule.kept(params["sparsity"], n))[0] + start
    return {
        "score": score,
        "ratio": torch.tensor([rule.allowed(params["sparsity"], n)]),
        "keep": torch.cat([torch.arange(start), kept, torch.arange(start + n, params["S"])]),
    }


def _cascade(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    depth = params["num_layers_in_cost"]
    rule = ff.Rule(params["similarity_lower_bound"], params["ratio_lower_bound"], params["cost"], depth)
    x, patch, at = inputs["hidden"], inputs["patch_type"], torch.arange(len(inputs["hidden"]))
    state, lens, out = ff.State(), [], {}
    for call in range(params["layers"] + 1):
        if call:
            x = x + params["step"] * torch.tanh(x @ inputs["w"][call - 1])
        if not state.merged:
            shown = int((patch >= 0).sum())
            keep, x, after = _merge(x, patch, rule, state)
            assert rule.after(state, shown, len(patch) - len(keep)) == after, "told from the numbers alone"
            state = after
        elif not state.pruned and call:
            heads = x.view(len(x), params["heads"], -1).transpose(0, 1)
            video = (patch >= 0).nonzero()[:, 0]
            score = _attention(heads, heads, params["num_queries"])[video]
            best = video[topk_sorted(score[None], rule.kept(state.shares, len(video)))[0]]
            keep = torch.cat([(patch < 0).nonzero()[:, 0], best]).sort().values
            x, state = x[keep], ff.State(state.shares, True, True)
        else:
            keep = torch.arange(len(x))
        patch, at = patch[keep], at[keep]
        lens.append(len(at))
        out[f"keep.{call}"] = at
    done = torch.tensor([int(state.merged), int(state.pruned)])
    return out | {"lens": torch.tensor(lens), "hidden": x, "sparsity": torch.tensor(state.shares), "finish": done}


CASES = {
    "vidcom2": vidcom2,
    "dycoke": dycoke,
    "holitom": holitom,
    "fastvid": fastvid,
    "sttm": sttm,
    "framefusion": framefusion,
}
