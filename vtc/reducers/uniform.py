"""Uniform: evenly spaced tokens in sequence order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.core import Reducer, Selection, Signals, Stage
from vtc.registry import register


@register("uniform", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class Uniform(Reducer):
    """Keep evenly spaced visual tokens in sequence order, whatever they show.

    Token ``floor((i + 1/2) N / K)`` for ``i = 0..K-1``: the middle of each of ``K`` equal stretches of the raster.

    Deviates: nothing; this is our own baseline.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY

    def select(self, signals: Signals) -> Selection:
        """Take the middle of each stretch."""
        batch, n = signals.shape
        k = signals.budget
        index = ((2 * torch.arange(k, device=signals.features.device) + 1) * n) // (2 * k)
        return Selection(index.expand(batch, k).contiguous())
