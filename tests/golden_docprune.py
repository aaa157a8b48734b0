"""Golden files of docprune: ``CASES`` as in :mod:`golden_cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.reducers.docprune import PatchClassifier, kept_tokens, shorten_prompt, token_blocks, window_order

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, dict[str, Any], str], Tensors]


def docprune(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Classify the blocks of the pixels, or turn given logits into tokens, windows and positions."""
    grid, merge, temporal = inputs["grid_thw"], params["spatial_merge_size"], params["temporal_patch_size"]
    rule = {"threshold": params["threshold"], "merge": merge, "temporal": temporal, "official": True}
    if "pixel_values" in inputs:
        pixels, patch = inputs["pixel_values"], params["patch_size"]
        weight = {name.replace("_", "."): t for name, t in inputs.items() if name.split("_")[0] in ("norm", "conv", "fc")}
        classifier = PatchClassifier(len(weight["conv.bias"]), merge * patch, params["in_channels"], params["layernorm_eps"])
        classifier.load_state_dict(weight)
        with torch.no_grad():
            logits = classifier(token_blocks(pixels, patch, merge=merge, temporal=temporal))
        kept = kept_tokens(logits, grid, **rule)
        tokens = pixels.view(-1, merge**2, pixels.shape[1])
        return {"logits": logits, "keep_indices": kept, "pixel_values": tokens[kept].flatten(0, 1)}
    kept = kept_tokens(inputs["scores"], grid, **rule)
    window = params["window_size"] // (params["patch_size"] * merge)
    index, rank, bounds = window_order(kept, grid, merge=merge, window=window)
    ids, positions, delta, per_image = shorten_prompt(inputs["input_ids"], kept, grid, params["image_token_id"], merge=merge)
    return {
        "keep_indices": kept,
        "window_index": index,
        "hidden_states_index": rank,
        "cu_window_seqlens": bounds,
        "tokens_per_image": per_image,
        "input_ids": ids,
        "position_ids": positions,
        "rope_deltas": delta,
    }


CASES: dict[str, Run] = {"docprune": docprune}
