"""Temporalpool: average the same place over windows of frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Positions, Selection, Signals
from vtc.kernels import merge_scatter, widened
from vtc.registry import register
from vtc.video import THINNED, ClipReducer, check_option, spread, thinned, whole_frames


@register("temporalpool", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class TemporalPool(ClipReducer):
    """Average every place of the picture over windows of consecutive frames, as few windows as the budget asks for.

    ``even`` windows: as many as the budget holds frames, with borders ``floor(g T / G)``. ``fixed`` ones: the smallest length
    that meets the budget, the last window shorter and averaged over its own length. A mean is in the slot, and at the position,
    of its window's first frame. Means are made in float32 and not brought back to the length of their members, which averaging
    shrinks. The count reached is at most ``keep`` and reported.

    Below one frame the whole clip is one window, and its places are thinned evenly; so is an image, and every frame with
    ``per="frame"``. The statistics say so.

    Deviates: nothing; this is our own baseline.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per clip entering the language model.
    windows : {"even", "fixed"}, default "even"
        How the clip is cut.
    norm : bool, default False
        Scale a mean to the mean length of its members.
    seat : {"first", "middle"}, default "first"
        Frame of the window in whose slot a mean is.
    """

    default_positions: ClassVar[Positions] = "original"
    kind: ClassVar[str] = "merge"

    windows: Literal["even", "fixed"] = "even"
    norm: bool = False
    seat: Literal["first", "middle"] = "first"

    def __post_init__(self) -> None:
        """Refuse options that do not exist."""
        super().__post_init__()
        check_option("temporalpool", "windows", self.windows, ("even", "fixed"))
        check_option("temporalpool", "seat", self.seat, ("first", "middle"))

    def choose(self, signals: Signals) -> Selection:
        """Average one clip."""
        tokens, _ = whole_frames(signals, "temporalpool")
        frames, n = tokens.shape
        if frames == 1:
            return thinned(signals, tokens[0])
        starts = borders(frames, n, signals.budget, even=self.windows == "even")
        stops, device = [*starts[1:], frames], tokens.device
        places = torch.arange(n, device=device)
        if signals.budget < n:
            places = spread(places, signals.budget)
        group = torch.full((frames, n), -1, device=device)
        for g, (lo, hi) in enumerate(zip(starts, stops, strict=True)):
            group[lo:hi, places] = g * len(places) + torch.arange(len(places), device=device)
        owner = torch.full((signals.shape[1],), -1, device=device)
        owner[tokens.flatten()] = group.flatten()
        count = len(starts) * len(places)
        merged = merge_scatter(widened(signals.features), owner[None], count)
        if self.norm:
            length = merge_scatter(widened(signals.features).norm(dim=-1, keepdim=True), owner[None], count)
            merged = merged * (length / merged.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(merged.dtype).tiny))
        seats = [lo if self.seat == "first" else (lo + hi - 1) // 2 for lo, hi in zip(starts, stops, strict=True)]
        index: Tensor = torch.cat([tokens[t, places] for t in seats])
        note = f"{len(starts)} windows of {frames} frames" if len(places) == n else THINNED
        return Selection(index[None], merged.to(signals.features.dtype), owner[None], note=note)


def borders(frames: int, tokens: int, budget: int, *, even: bool) -> list[int]:
    """Return the first frame of every window: at most ``budget`` tokens in all, of ``tokens`` per frame; one window at least."""
    if even:
        count = min(max(1, budget // tokens), frames)
        return [g * frames // count for g in range(count)]
    length = min(-(-frames * tokens // budget), frames)
    return list(range(0, frames, length))
