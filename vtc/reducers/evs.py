"""EVS: keep the tokens of a clip that changed most since the frame before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Layout, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.kernels import compacted, topk_per_group, topk_sorted
from vtc.registry import register
from vtc.video import similarity_before, spread
from vtc.views import frame_quotas, members, shares_of_views

NO_FRAME = "no earlier frame to compare with: tokens spread evenly"
"""Note of an image, or of a clip whose budget ends within its first frame."""


@register(
    "evs",
    paper="arXiv:2510.14624",
    code="https://github.com/vllm-project/vllm @ d750efb",
    licence="Apache-2.0 with an NVIDIA proprietary notice",
    presets={"rate70": {"keep": 0.3}, "rate75": {"keep": 0.25}},
)
@dataclass(frozen=True, kw_only=True)
class Evs(Reducer):
    """Efficient video sampling: keep the tokens that differ most from the same place of the frame before.

    A token's dissimilarity is one minus the cosine with the token at the same place one frame earlier, on projected features.
    The first frame stays whole; the most dissimilar tokens of the others fill the budget. Positions stay as they were, so that
    time stays visible.

    The release is vLLM's (an NVIDIA notice stands in its files); what it does was read, nothing taken over.

    Deviates: where the budget is smaller than the first frame, and for images, the release cannot go below one frame; here the
    first frame is thinned evenly and the budget is met (said in the statistics). ``official=True`` keeps the whole first frame,
    and rounds a share down: pruning at the rate ``q`` is ``keep=1 - q`` (as a Python float: ``1 - 0.9`` of 1,000 tokens is 99).
    A token whose earlier token is not there counts as entirely new; the release always sees whole frames. With ``per="frame"``
    every frame keeps the same number, the first one evenly spread. The release lets the text behind a clip go on from the width
    of its grid, below the last frames of a long clip; here it goes on behind them (:func:`released_positions` has the release's
    numbers). InternVL and SmolVLM take videos as tiles, each a picture of its own to the model: there the tokens of every frame are
    spread evenly, and :func:`vtc.patch` warns.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip (or image) entering the language model; with ``per="frame"`` those of each frame.
    official : bool, default False
        Never keep less than the first frame, and round a share down.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "all"
    wants_clips: ClassVar[bool] = True

    official: bool = False

    def wanted(self, layout: Layout, facts: Facts) -> int:
        """At least the first frame with ``official``."""
        if not self.official:
            return super().wanted(layout, facts)
        first = int(((layout.view == 0) & layout.is_patch).sum()) if layout.video else len(layout)
        return max(self.budget.tokens(len(layout), rounding=math.floor), first)

    def dissimilarity(self, signals: Signals) -> Tensor:
        """Return ``(B, N)``: one minus the cosine with the frame before, infinite where there is no token to compare with."""
        return 1 - similarity_before(signals)

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


def media_positions(grid: tuple[int, int, int], kept: Tensor, *, seconds: int = 1, rate: float = 2.0) -> Tensor:
    """Return the positions in time, height and width of a medium's ``kept`` tokens, and its width, as the release numbers them.

    Parameters
    ----------
    grid : (int, int, int)
        Frames, rows and columns of tokens, merged ones.
    kept : Tensor
        ``(K,)`` tokens of the whole grid, ascending.
    seconds : int
        Seconds between two frames of the grid; the release cuts off a fraction. 0 for an image.
    rate : float
        Positions per second.

    Returns
    -------
    Tensor
        ``(4, K)`` int64, from 0.
    """
    _, rows, cols = grid
    place = torch.stack([kept // (rows * cols), kept // cols % rows, kept % cols, torch.full_like(kept, cols)])
    place[0] = (place[0] * (rate * int(seconds))).long()
    return place


def released_positions(
    input_ids: Tensor, positions: Tensor, media: Sequence[Tensor], vision_start: int
) -> tuple[Tensor, Tensor]:
    """Number a shortened prompt as the release does (M-RoPE).

    Survivors stay where they were behind the token that starts their medium; the text behind them goes on from the *width* of
    the grid, whatever the medium's last position. The next medium starts from what its own start token got.

    Parameters
    ----------
    input_ids : Tensor
        ``(L,)`` prompt with one placeholder per survivor.
    positions : Tensor
        ``(3, L)`` positions of which those up to the first medium count.
    media : sequence of Tensor
        :func:`media_positions` of each, in the order of the prompt.
    vision_start : int
        Token in front of every medium.

    Returns
    -------
    positions : Tensor
        ``(3, L)``.
    delta : Tensor
        ``()`` what to add to the length to get the next position.
    """
    starts = (input_ids == vision_start).nonzero()[:, 0].tolist()
    if len(starts) != len(media):
        raise ValueError(f"the prompt starts {len(starts)} media, {len(media)} are given")
    out = positions.clone()
    for start, stop, own in zip(starts, [*starts[1:], len(input_ids) - 1], media, strict=True):
        base, text = out[-1, start] + 1, start + 1 + own.shape[1]
        if text > stop + 1:
            raise ValueError(f"a medium of {own.shape[1]} tokens does not fit behind place {start} of the prompt")
        out[:, start + 1 : text] = own[:3] + base
        if own.shape[1]:
            base = base + own[3, 0]
        out[:, text : stop + 1] = base + torch.arange(stop + 1 - text, device=out.device)
    return out, out.max() + 1 - len(input_ids)
