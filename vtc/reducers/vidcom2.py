"""VidCom2: keep the tokens of a clip that are least like the mean of the clip and of their frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Layout, Positions, Selection, Signals
from vtc.kernels import compacted, topk_per_group
from vtc.registry import register
from vtc.video import ClipReducer, check_option, frames_of

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01
CHANNELS = 0.5
BLOCK = 8192
"""Tokens widened to float64 at a time."""


@register(
    "vidcom2",
    paper="arXiv:2505.14454",
    code="https://github.com/xuyang-liu16/VidCom2 @ 944a17d",
    licence="Apache-2.0",
    presets={
        "r25": {"keep": 0.25},
        "r15": {"keep": 0.15},
        "release-r25": {"keep": 0.25, "rule": "release"},
    },
)
@dataclass(frozen=True, kw_only=True)
class VidCom2(ClipReducer):
    """Keep the tokens that are least like the mean of the clip and the mean of their frame; unusual frames keep more.

    Tokens are cut down to the half of their channels that varies least over the clip, and scaled to length one. A token's
    likeness to a mean is a sum of five Gaussian kernels of their distance. A frame's share grows with how unlike its tokens are to
    the clip's mean, by a softmax with temperature 0.01 that is nearly all or nothing on clips with one odd frame. In every frame
    the tokens with the smallest sum of both likenesses stay. No text, no attention.

    The release rounds each frame's share (half to even), keeps at least one token of every frame, and so meets a budget only
    roughly; ``rule="release"`` does so, with ``keep`` as base share, and reports the number. The port in vLLM corrects it to an
    exact number: what is too much is taken from, and what is missing given to, any frame by the same likeness. That is what
    happens here by default. Positions are renumbered, those with time, rows and columns stay.

    Deviates: scores are made in float64 and a frame's share in float32, where the release computes in the model's type, since the
    temperature amplifies rounding. A picture, which the release does not touch, counts as a clip of one frame (every view of
    several by itself). With ``per="frame"`` every frame keeps the same number. The release on LLaVA-Video puts the newline
    tokens of a frame's rows behind its kept patches (:func:`with_newlines`); here they stay in their places.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip entering the language model.
    rule : {"exact", "served", "release"}, default "exact"
        ``exact``: what ``keep`` says, a share rounded to the nearest. ``served``: a share rounded down and at least one token per
        frame, as in vLLM, whose pruning rate ``q`` is ``keep=1 - q``. ``release``: what the frames' shares add up to.
    """

    default_positions: ClassVar[Positions] = "compact"

    rule: Literal["exact", "served", "release"] = "exact"

    def __post_init__(self) -> None:
        """Refuse counts that do not exist."""
        super().__post_init__()
        check_option("vidcom2", "rule", self.rule, ("exact", "served", "release"))

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """The release's number follows from the clip."""
        return self.rule == "release"

    def wanted(self, layout: Layout, facts: Facts) -> int:
        """At least one token per frame, and a share rounded down, with ``rule="served"``."""
        if self.rule != "served":
            return super().wanted(layout, facts)
        n = len(layout.patches)
        least = layout.views if layout.video else 1
        return min(max(least, self.budget.tokens(n, rounding=math.floor)), n)

    def choose(self, signals: Signals) -> Selection:
        """Keep the least alike tokens of one clip."""
        with torch.no_grad():
            frames = frames_of(signals)
            found = likeness(signals.features[0], frames)
            amount = self.budget.amount
            total = sum(map(len, frames))
            share = amount if isinstance(amount, float) else signals.budget / total
            scale = scales(found.clip, frames, share)
            size = torch.tensor([len(f) for f in frames]).to(scale.device, non_blocking=True)
            quota = budgets(scale, size)
            score = found.clip + found.frame
            chosen = topk_per_group(-score[None], found.group[None], quota[None])[0]
            if self.decides_itself:
                index = chosen.nonzero()[:, 0]
                return Selection(index[None])
            # those above their frame's share first: what is too much goes, what is missing comes, by the same score
            order = torch.sort(score, stable=True).indices
            order = order[torch.sort((~chosen[order]).to(torch.int8), stable=True).indices]
            kept = torch.zeros_like(chosen).index_fill(0, order[: signals.budget], True)
            return Selection(compacted(kept[None], min(signals.budget, total))[0])


@dataclass(frozen=True, eq=False)
class Likeness:
    """What the tokens of one clip are ranked by.

    Attributes
    ----------
    channels : Tensor
        ``(C,)`` ascending, the channels looked at.
    clip, frame : Tensor
        ``(N,)`` float64 likeness to the mean of the clip and of the token's frame, each in (0, 5]; infinite for tokens in no frame.
    group : Tensor
        ``(N,)`` number of each token's frame; one more frame for tokens in none.
    """

    channels: Tensor
    clip: Tensor
    frame: Tensor
    group: Tensor


def likeness(features: Tensor, frames: list[Tensor]) -> Likeness:
    """Compare the tokens of one clip ``(N, D)`` with its mean and with their frame's; O(N D) memory."""
    n, width = features.shape
    group = torch.full((n,), len(frames), device=features.device)
    for t, tokens in enumerate(frames):
        group[tokens] = t
    inside = torch.cat(frames)
    blocks = [features[at].double() for at in inside.split(BLOCK)] if len(inside) <= BLOCK else None

    def parts() -> list[Tensor]:
        return blocks if blocks is not None else (features[at].double() for at in inside.split(BLOCK))

    mean = sum(b.sum(0) for b in parts()) / len(inside)
    variance = sum((b - mean).square().sum(0) for b in parts())
    channels = torch.sort(variance, stable=True).indices[: max(1, int(width * CHANNELS))].sort().values
    unit = features.new_zeros(n, len(channels), dtype=torch.float64)
    for at in inside.split(BLOCK):
        unit[at] = torch.nn.functional.normalize(features[at][:, channels].double(), dim=-1, eps=1e-12)
    centres = unit.new_zeros(len(frames) + 1, len(channels)).index_add_(0, group, unit)
    size = torch.tensor([*map(len, frames), 1], dtype=torch.float64).to(features.device, non_blocking=True)
    whole = centres[:-1].sum(0) / len(inside)
    centres = centres / size[:, None]
    far = unit.new_full((n,), torch.inf)
    clip, frame = far.clone(), far
    for tokens, centre in zip(frames, centres, strict=False):
        clip[tokens] = kernels_of(unit[tokens], whole)
        frame[tokens] = kernels_of(unit[tokens], centre)
    return Likeness(channels, clip, frame, group)


def kernels_of(rows: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussian kernels of the distance of ``rows (n, C)`` to ``centre (C,)``, ``(n,)``."""
    square = (rows - centre).square().sum(-1)
    return sum(torch.exp(-square / (2 * width)) for width in WIDTHS)


def frame_shares(clip: Tensor, frames: list[Tensor]) -> Tensor:
    """Softmax over frames of how unlike their tokens are to the clip's mean, ``(T,)`` float64."""
    unlike = torch.stack([-clip[tokens].mean() for tokens in frames])
    return torch.softmax((unlike - unlike.max()) / TEMPERATURE, 0)


def scales(clip: Tensor, frames: list[Tensor], share: float) -> Tensor:
    """Share of its tokens every frame keeps, ``(T,)`` float32: the base ``share``, more for unusual frames, at most all."""
    p = frame_shares(clip, frames).float()
    return (share * (1 + p - p.mean())).clamp(max=1.0)


def budgets(scale: Tensor, size: Tensor) -> Tensor:
    """Tokens every frame keeps, ``(T,)``: rounded half to even, at least one and at most all of its ``size``."""
    return torch.minimum((scale * size).round().long().clamp(min=1), size)


def with_newlines(kept: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
    """Return the sequence the release makes where a newline ends every row: per frame the kept patches, then all newlines.

    Parameters
    ----------
    kept : Tensor
        ``(K,)`` ascending tokens of a clip without newlines.
    grid : (int, int)
        Rows and columns of a frame.

    Returns
    -------
    Tensor
        ``(K + frames * rows,)`` places in the sequence of rows, each with its newline.
    """
    rows, cols = grid
    place = kept // cols * (cols + 1) + kept % cols
    frame = kept // (rows * cols)
    ends = (torch.arange(rows, device=kept.device) + 1) * (cols + 1) - 1
    return torch.cat([part for t in range(frames) for part in (place[frame == t], t * rows * (cols + 1) + ends)])
