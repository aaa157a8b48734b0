"""Frames: fewer frames of a clip, each of them whole."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Positions, Selection, Signals
from vtc.registry import register
from vtc.video import ClipReducer, frames_of, spread, thinned


@register("frames", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class Frames(ClipReducer):
    """Keep as many whole frames as the budget holds, evenly spread over the clip.

    ``F = floor(keep / tokens per frame)`` frames, the centres of ``F`` equal stretches: frame ``floor((2 j + 1) T / (2 F))`` for
    ``j = 0 .. F - 1``. The tower has seen all frames; to save its work too, give the model fewer frames. On models that join
    source frames (Qwen2-VL) a frame is one joined step. Positions stay as they were, so that time stays visible. The count
    reached is at most ``keep`` and reported.

    An image, a clip whose budget is below one frame, and every frame with ``per="frame"`` is thinned evenly instead, which the
    statistics say.

    Deviates: nothing; this is our own baseline.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per clip entering the language model.
    ends : bool, default False
        Spread from the first frame to the last, both kept, as many loaders do: ``j (T - 1) / (F - 1)``, rounded (half to even).
    fill : bool, default False
        Spend what is left of the budget on evenly spread tokens of one more frame: the one behind the last kept, or else the last
        one that is not kept.
    """

    default_positions: ClassVar[Positions] = "original"

    ends: bool = False
    fill: bool = False

    def choose(self, signals: Signals) -> Selection:
        """Take whole frames of one clip."""
        frames = frames_of(signals)
        count = min(signals.budget // max(map(len, frames)), len(frames))
        if count == 0:
            middle = frames[(1 if not self.ends else 0) * len(frames) // 2]
            return thinned(signals, middle)
        taken = sampled(len(frames), count, ends=self.ends)
        kept = [frames[t] for t in taken]
        left = signals.budget - sum(map(len, kept))
        if self.fill and left and count < len(frames):
            rest = [t for t in range(len(frames)) if t not in taken]
            more = next((t for t in rest if t > taken[-1]), rest[-1])
            kept.append(spread(frames[more], min(left, len(frames[more]))))
        index: Tensor = torch.cat(kept).sort().values
        return Selection(index[None], note=f"{count} of {len(frames)} frames")


def sampled(frames: int, count: int, *, ends: bool = False) -> list[int]:
    """Return ``count`` of ``frames`` frames, ascending: the centres of equal stretches, or from end to end."""
    if not ends:
        return [(2 * j + 1) * frames // (2 * count) for j in range(count)]
    return [round(Fraction(j * (frames - 1), max(count - 1, 1))) for j in range(count)]
