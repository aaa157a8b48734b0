"""Golden files of EVS: ``CASES`` as in :mod:`golden_cases`."""

from __future__ import annotations

import math
from typing import Any

import torch
from golden_decoder import FACTS
from torch import Tensor

import vtc
from vtc.core import Layout, Signals
from vtc.reducers.evs import media_positions, released_positions

Tensors = dict[str, Tensor]
FIRST = 255.0
"""What the release puts for a token with nothing to compare with, where the product puts infinity."""


def clip(frames: int, rows: int, cols: int) -> Layout:
    """Layout of whole frames."""
    n = torch.arange(frames * rows * cols)
    view, row, col = n // (rows * cols), n // cols % rows, n % cols
    return Layout(torch.zeros_like(n), view, row, col, row, col, n, ((rows, cols),) * frames, video=True)


def evs(inputs: Tensors, params: dict[str, Any], _case: str) -> Tensors:
    """Counts for many rates, one clip, or the numbering of a shortened prompt, by what the file brings."""
    if "input_ids" in inputs:
        return _numbered(inputs, params)
    if "features" not in inputs:
        table = zip(inputs["frames"].tolist(), inputs["tokens_per_frame"].tolist(), inputs["q_permille"].tolist(), strict=True)
        return {"count": torch.tensor([_counted(clip(frames, 1, n), q / 1000) for frames, n, q in table])}
    frames, high, wide = params["video_size_thw"]
    merge = params["spatial_merge_size"]
    layout, features = clip(frames, high // merge, wide // merge), inputs["features"][None]
    assert len(layout) == features.shape[1] == frames * params["tokens_per_frame"]
    count = _counted(layout, params["q"])
    signals = Signals(features, layout, torch.arange(len(layout))[None], count, len(layout))
    reducer = vtc.create("evs", keep=1 - params["q"], official=True)
    score = reducer.dissimilarity(signals)[0]
    return {
        "dissimilarity": torch.where(score == math.inf, FIRST, score),
        "count": torch.tensor(count),
        "indices": reducer.select(signals).index[0],
    }


def _counted(layout: Layout, q: float) -> int:
    return vtc.create("evs", keep=1 - q, official=True).wanted(layout, FACTS)


def _numbered(inputs: Tensors, params: dict[str, Any]) -> Tensors:
    """The positions of every medium's survivors follow from its grid; the file brings them, too."""
    media, merge = [], params["spatial_merge_size"]
    for kind, size in params["parts"]:
        if kind == "text":
            continue
        frames, high, wide = (1, *size[-2:]) if kind == "image" else size
        still = frames == 1 and kind == "image"
        place = media_positions(
            (frames, high // merge, wide // merge),
            inputs[f"media{len(media)}_kept"],
            seconds=0 if still else params["video_second_per_grid"],
            rate=params["tokens_per_second"],
        )
        assert torch.equal(place, inputs[f"media{len(media)}_positions"]), f"medium {len(media)}"
        media.append(place)
    positions, delta = released_positions(inputs["input_ids"], inputs["positions_before"], media, params["vision_start"])
    return {"positions": positions, "delta": delta}


CASES = {"evs": evs}
