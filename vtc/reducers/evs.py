"""EVS: keep the tokens of a clip that changed most since the frame before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Layout, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.kernels import compacted, take, topk_per_group, topk_sorted, widened
from vtc.registry import register
from vtc.views import frame_quotas, members, shares_of_views

NO_FRAME = "no earlier frame to compare with: tokens spread evenly"
"""Note of an image, or of a clip whose budget ends within its first frame."""


@register(
    "evs",
    paper="arXiv:2510.14624",
    presets={"rate70": {"keep": 0.3}, "rate75": {"keep": 0.25}},
)
@dataclass(frozen=True, kw_only=True)
class Evs(Reducer):
    """Efficient video sampling: keep the tokens that differ most from the same place of the frame before.

    A token's dissimilarity is one minus the cosine with the token at the same place one frame earlier, on projected features.
    The first frame stays whole; the most dissimilar tokens of the others fill the budget. Positions stay as they were, so that
    time stays visible.

    Written from descriptions of the implementation in vLLM (pull request 22980: the first frame always wins, a stable sort, at
    least one frame); paper and golden files were not at hand. Unconfirmed: that a token whose earlier token is gone counts as
    entirely new.

    Deviates: where the budget is smaller than the first frame, and for images, the release cannot go below one frame; here the
    first frame is thinned evenly and the budget is met (said in the statistics). ``official=True`` keeps the whole first frame,
    and rounds a share down. With ``per="frame"`` every frame keeps the same number, the first one evenly spread.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip (or image) entering the language model; with ``per="frame"`` those of each frame.
    official : bool, default False
        Never keep less than the first frame.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "all"

    official: bool = False

    def wanted(self, layout: Layout, facts: Facts) -> int:
        """At least the first frame with ``official``."""
        if not self.official:
            return super().wanted(layout, facts)
        first = int(((layout.view == 0) & layout.is_patch).sum()) if layout.video else len(layout)
        return max(self.budget.tokens(len(layout), rounding=math.floor), first)

    def dissimilarity(self, signals: Signals) -> Tensor:
        """Return ``(B, N)``: one minus the cosine with the frame before, infinite where there is no token to compare with."""
        unit = torch.nn.functional.normalize(widened(signals.features), dim=-1)
        rows, cols = (max(size) for size in zip(*signals.layout.grids, strict=True))
        frame = signals.of("view")
        place = (frame * rows + signals.of("row")) * cols + signals.of("col")
        at = torch.where(frame >= 0, place, signals.layout.views * rows * cols)
        where = at.new_full((at.shape[0], signals.layout.views * rows * cols + 1), -1)
        where = where.scatter(1, at, torch.arange(at.shape[1], device=at.device).expand_as(at))
        before = where.gather(1, (place - rows * cols).clamp(min=0))
        known = (frame > 0) & (before >= 0)
        other = take(unit, before.clamp(min=0))
        return torch.where(known, 1 - (unit * other).sum(-1), torch.inf)

    def select(self, signals: Signals) -> Selection:
        """Keep the first frame and the most dissimilar tokens."""
        with torch.no_grad():
            if signals.layout.video:
                first = [own[0] for own in members(signals)]
            else:
                first = [torch.arange(signals.shape[1], device=signals.entries.device)] * signals.shape[0]
            if signals.budget < max(len(f) for f in first):
                return Selection(torch.stack([spread(f, signals.budget) for f in first]), note=NO_FRAME)
            return Selection(topk_sorted(self.dissimilarity(signals), signals.budget))

    def select_frames(self, signals: Signals) -> Selection:
        """Keep the same number of every frame."""
        with torch.no_grad():
            frame, quota = frame_quotas(signals)
            score = self.dissimilarity(signals)
            for row, (own, shares) in enumerate(zip(members(signals), shares_of_views(signals), strict=True)):
                score[row, own[0]] = 0.0
                score[row, spread(own[0], shares[0])] = 1.0
            return Selection(compacted(topk_per_group(score, frame, quota), signals.budget)[0])


def spread(tokens: Tensor, k: int) -> Tensor:
    """Return ``k`` of the ``tokens (n,)`` at even distances, in order."""
    return tokens[(2 * torch.arange(k, device=tokens.device) + 1) * len(tokens) // (2 * k)]
