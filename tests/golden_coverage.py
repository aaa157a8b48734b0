"""Golden cases of methods that spread the budget over the picture (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_boundary import signals_of
from torch import Tensor

import vtc
from vtc.core import Layout
from vtc.reducers.holov import crop_weights

Tensors = dict[str, Tensor]


def stitched_views(side: int, high: int, wide: int, views: int) -> Layout:
    """The views of an AnyRes image without newlines or padding: slots run through the thumbnail, then the stitched crops."""
    n = torch.arange(views * side * side)
    view, row, col = n // side**2, n % side**2 // side, n % side
    crop = (view - 1).clamp(min=0)
    y, x = row + crop // wide * side, col + crop % wide * side
    slot = torch.empty_like(n)
    slot[((view > 0) * side**2 * high * wide + y * wide * side * (view > 0) + y * side * (view == 0) + x).argsort()] = n
    return Layout(n * 0, view, row, col, y, x, slot, ((side, side),) * views, True)


def scope(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Cover each view by itself, or an AnyRes image whose views share the budget as released."""
    if "hidden_states" in inputs:
        hidden, rows = inputs["hidden_states"], inputs["cls_attention_rows"]
        views, length, dim = hidden.shape
        n, side = length - 1, round((length - 1) ** 0.5)
        reducer = vtc.create("scope", keep=params["num_token"], official=True)
        layout = stitched_views(side, params["grid_h"], params["grid_w"], views)
        flat, attention = hidden[:, 1:].reshape(1, views * n, dim), rows[:, :, 1:].sum(1)
        index = reducer.select(signals_of(flat, params["num_token"], layout=layout, cls_attn=attention.reshape(1, -1))).index[0]
        each = index.view(views, -1)  # as many in every view, view after view
        picks = reducer.pick(signals_of(hidden[:, 1:], each.shape[1], cls_attn=attention))
        return {
            "selected_in_order": picks,
            "features": flat[0, each],
            "assembled": flat[0, index[layout.slot[index].argsort()]],
        }
    features, k = inputs["features"], params["keep"]
    add, salience = params["combined"] == "add", "cls_attention_sum" in inputs
    rule = {"combine": "add" if add else "multiply", "alpha": params["alpha"], "salience": salience}
    reducer = vtc.create("scope", keep=k, **rule)
    taps = {"cls_attn_sum" if add else "cls_attn": inputs["cls_attention_sum"]} if salience else {}
    signals = signals_of(features, k, **taps)
    picks = reducer.pick(signals)
    before, after, picked = [], [], []
    for view, order in zip(reducer.coverage(signals), picks, strict=True):
        taken = torch.zeros(features.shape[1], dtype=torch.bool)
        for step, pick in enumerate(order):
            score = view.scores().masked_fill(taken, -1.0)
            before += [score] if step == 0 else []
            after += [score] if step == min(1, k - 1) else []
            picked.append(score[pick])
            taken[pick] = True
            view.add(pick[None])
    return {
        "cos_row0": torch.stack([view.rows(torch.tensor([0]))[0] for view in reducer.coverage(signals)]),
        "selected_in_order": picks,
        "selected_sorted": reducer.select(signals).index,
        "score_step0": torch.stack(before),
        "score_step1": torch.stack(after),
        "score_picked": torch.stack(picked).view_as(picks),
    }


def holov(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Share the budget out and list the tokens as released; where nothing overflows the default keeps the same ones."""
    tokens, k = inputs["tokens"], params["keep"]
    rule = {"crops": params["num_crops"], "beta": params["beta"]}
    reducer = vtc.create("holov", keep=k, official=True, **rule)
    signals = signals_of(tokens, k, cls_attn=inputs["attention"])
    score = reducer.scores(signals)
    budget = reducer.budgets(signals, score)
    order = reducer.released_order(signals, budget)
    if bool((order >= 0).all()) and tokens.shape[1] >= 2 * params["num_crops"]:
        assert torch.equal(vtc.create("holov", keep=k, **rule).select(signals).index, order.sort(1).values)
    out = {
        "crop_scores": score.to(tokens.dtype),
        "crop_weights": torch.stack([crop_weights(s) for s in score]).to(tokens.dtype),
        "crop_budget": budget,
        "positions": order,
        "tokens": reducer.select(signals).features,
    }
    if "position_ids" in inputs:  # M-RoPE: every row has its token's own, a row of zeros that of the last one
        ids, start, n = inputs["position_ids"], params["image_start"], tokens.shape[1]
        span = start + torch.where(order[0] >= 0, order[0], n - 1)
        at = torch.cat([torch.arange(start), span, torch.arange(start + n, ids.shape[2])])
        out["position_ids"] = ids[:, :, at]
    return out


CASES: dict[str, Callable[[Tensors, dict[str, Any], str], Tensors]] = {"holov": holov, "scope": scope}
