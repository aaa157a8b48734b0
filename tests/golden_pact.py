"""Golden cases of PACT (see :mod:`golden_cases` for the contract)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_boundary import mask_of, signals_of
from golden_vscan import decoder_tap
from torch import Tensor

import vtc
from vtc.reducers.pact import PACT

Tensors = dict[str, Tensor]


def pact(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Measure keys and weights as in a patched model, then cluster all visual tokens of the row as one image."""
    hidden, visual = inputs["hidden"], inputs["is_image"].bool()
    own, n = visual.nonzero()[:, 0], int(visual.sum())
    part: PACT = vtc.create(
        "pact",
        keep=1.0,
        layer=4,
        share=params["keep_share"],
        cutoff=params["cutoff"],
        coefficient=params["coef_pruned"],
        recover=params["include_pruned_in_mean"],
        mean=params["take_mean"],
    )
    tap = decoder_tap(inputs, params, ("norm_weight", "q_weight", "k_weight", "q_bias", "k_bias"), visual)
    taps = {need.name: need.measure(tap)[:, own] for need in part.needs}
    signals = signals_of(hidden[None, own], n, **taps)
    (found,), chosen = part.clusters(signals), part.select(signals)
    keep = ~visual
    keep[own[chosen.index[0]]] = True
    kept = keep.nonzero()[:, 0]
    states, counts = hidden.clone(), torch.ones(len(hidden), dtype=hidden.dtype)
    if chosen.features is not None:
        states[own[chosen.index[0]]] = chosen.features[0]
    counts[own[chosen.index[0]]] = chosen.weight[0].to(counts.dtype)
    rank = torch.searchsorted(found.survivors, found.centres)  # centres are numbered among the survivors
    label = torch.where(found.owner >= 0, rank[found.owner.clamp(min=0)], -1)
    survives = mask_of(found.survivors[None], n)[0].bool()
    labels = [label[survives], label[~survives]] if params["include_pruned_in_mean"] else [label[survives]]
    return {
        "scores": part.scores(signals)[0],
        "pruning_mask": survives.long(),
        "keys": signals.all_keys[0],
        "labels": torch.cat(labels),
        "keep_mask": keep.long(),
        "keep_index": kept,
        "position_ids": kept,
        "counts": counts[kept],
        "log_weights": counts[kept].log(),
        "hidden": states[kept],
    }


CASES: dict[str, Callable[[Tensors, dict[str, Any], str], Tensors]] = {"pact": pact}
