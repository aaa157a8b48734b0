"""ZOO-Prune: tokens the projector is sensitive to, and far from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import farthest_point_weighted
from vtc.registry import register
from vtc.signals import sensitivity
from vtc.views import each_view


@register(
    "zooprune",
    paper="arXiv:2509.24837",
    code="https://github.com/AIM-SKKU/ZOO-Prune @ 159f7f9",
    licence="none found",
    presets={
        "llava15-192": {"keep": 192},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llavanext-640": {"keep": 640, "rank": 128},
        "llavanext-320": {"keep": 320, "rank": 128},
        "llavanext-160": {"keep": 160, "rank": 128},
        "qwen-20": {"keep": 0.2},
        "qwen-10": {"keep": 0.1},
    },
)
@dataclass(frozen=True, kw_only=True)
class ZOOPrune(Reducer):
    """Greedy choice by sensitivity times distance to what is chosen already; forward passes of the projector only.

    Sensitivity of a token: the mean length of ``(M(x + h u) - M(x - h u)) / 2h`` over random unit directions ``u``, with the
    projector ``M`` and the tower's feature ``x``. Per view, sensitivities are scaled to 0..1; the first token is the most
    sensitive, every further one has the largest product of sensitivity and cosine distance of the projected token to the nearest
    chosen one. Survivors stay in raster order, and AnyRes newline tokens stay in addition to the budget, as in the release.

    The cost is ``2 * directions`` passes of the projector over all tokens.

    Deviates: the projector is evaluated in float32, since nudges this small drown in half precision, and as it is; the release's
    LLaVA-NeXT variant measures a low-rank copy made before the checkpoint is loaded, hence of a random projector (``rank`` gives
    the copy of the real one). Directions come from a seed, so that every call gives the same tokens. Equal sensitivities count as
    1 also in AnyRes images. Every image counts, wherever it starts. The budget is met exactly: what does not divide evenly among
    the views is shared out (``official=True``: ``keep // views`` each, and equal sensitivities count as 0 in AnyRes images).
    Merging projectors (several patches per token) are not covered; the release for them is not public (unconfirmed).

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model, newline tokens not counted.
    directions : int, default 64
        Random directions.
    step : float, default 0.01
        Length ``h`` of a nudge.
    rank : int or None, default None
        Measure sensitivity on a copy of the projector whose linear layers are cut down to this rank, as the paper does for
        LLaVA-NeXT (128); cheaper than the full one for wide models.
    seed : int, default 0
        Seed of the directions.
    official : bool, default False
        Budgets and equal sensitivities as released.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "all"

    directions: int = 64
    step: float = 0.01
    rank: int | None = None
    seed: int = 0
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        for name in ("directions", "rank"):
            value = getattr(self, name)
            if value is None and name == "rank":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UnknownArgumentError(f"zooprune: {name}={value!r} makes no sense; use an int of at least 1")
        if isinstance(self.step, bool) or not 0.0 < self.step < float("inf"):
            raise UnknownArgumentError(f"zooprune: step={self.step!r} makes no sense; use a positive number such as 0.01")

    @property
    def needs(self) -> tuple[Need, ...]:
        """The projector's sensitivity."""
        return (sensitivity(directions=self.directions, step=self.step, seed=self.seed, rank=self.rank),)

    def pick(self, signals: Signals) -> Tensor:
        """Return the tokens ``(B, K)`` of one view in the order they are chosen."""
        score = signals.sensitivity
        low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
        weight = (score - low) / (high - low + 1e-8)
        if not self.official or signals.layout.views == 1:
            weight = torch.where(high > low, weight, torch.ones_like(weight))
        return farthest_point_weighted(signals.features, weight, signals.budget)

    def choose(self, signals: Signals) -> Selection:
        """Keep the tokens of one view."""
        return Selection(self.pick(signals).sort(1).values)

    def select(self, signals: Signals) -> Selection:
        """Keep the tokens of every view."""
        with torch.no_grad():
            return each_view(signals, self.choose, floor=self.official)
