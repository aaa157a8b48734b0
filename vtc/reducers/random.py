"""Random: the floor a method must clear before it can claim to select anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Scorer, Signals, Stage
from vtc.registry import register


@register("random", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """Keep a random subset of the visual tokens.

    Every image gets its own subset, drawn from the seed and an exact fingerprint of its pixels: the same image gives the same
    subset in any batch, on any run.

    Deviates: nothing; this is our own baseline.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model.
    seed : int, default 0
        Seed of the draw.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    wants_fingerprint: ClassVar[bool] = True

    seed: int = 0

    def score(self, signals: Signals) -> Tensor:
        """Draw one uniform number per token."""
        batch, n = signals.shape
        rows = []
        for image in range(batch):
            mark = signals.fingerprint[image] if signals.fingerprint else 0
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + mark) & 0x7FFFFFFFFFFFFFFF)
            rows.append(torch.rand(n, generator=generator))
        return torch.stack(rows).to(signals.features.device, non_blocking=True)
