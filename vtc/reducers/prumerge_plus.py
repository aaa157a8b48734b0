"""PruMerge+: PruMerge with as many evenly spaced patches on top of the most attended ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core import Need, Signals
from vtc.errors import BudgetError
from vtc.registry import register
from vtc.signals import wide_cls_attn, wide_keys
from vtc.views import AbsorbingReducer, complement


@register(
    "prumerge_plus",
    paper="arXiv:2403.15388",
    code="https://github.com/42Shawn/LLaVA-PruMerge @ 097c041",
    licence="Apache-2.0",
    presets={
        "llava15-adaptive": {"keep": 1.0, "adaptive": True},
        "llava15-quarter": {"keep": 145},
        "llava15-144": {"keep": 144},
    },
)
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(AbsorbingReducer):
    """Keep the patches with the highest CLS attention and evenly spaced ones, each with its nearest neighbours added.

    As ``prumerge``, but half of the kept patches are spread over those that attention did not choose:
    they follow the others in raster order, absorb neighbours like them, and the last token sums up what remains.

    Adaptive: with a share ``r`` of outliers every ``int(int(1 / r) / 3)``-th patch that is no outlier is added; ``keep`` is an
    upper limit.

    Deviates: the spaced patches are taken at even distances from those left over, so that none is kept twice and exactly ``keep``
    tokens stay; the release takes every ``int(1 / r)``-th of all patches, keeps patches twice (each is then a neighbour of the
    other), forgets as many of the lowest-numbered others altogether, never reaches the last patch, and works for few budgets only.
    Outliers are counted view by view and are at least one; the release pools them over the batch.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, the last one included.
    adaptive : bool, default False
        Let the outliers of attention decide on the number of tokens, at most ``keep``.
    official : bool, default False
        As released; ``keep`` must be one that the release can meet.
    """

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention and keys of the last layer, all heads taken as one."""
        return wide_cls_attn(-1), wide_keys(-1)

    def kept(self, signals: Signals, share: float | None) -> tuple[Tensor, Tensor]:
        """Return the patches of one view that get a token, in order, and those that are summed up in the last one."""
        n, room = signals.shape[1], max(1, signals.budget - 1)
        top = self.most_attended(signals, share)
        if not self.adaptive:
            top = top[: room // 2 if self.official else (room + 1) // 2]
        left = complement(top, n)
        if self.adaptive:
            every = max(1, int(int(n / max(1, len(top))) / 3)) if share is None else max(1, int(int(1 / share) / 3))
            grid = torch.arange(0, n - 1 if self.official else n, every, device=left.device)
            spaced = grid[torch.isin(grid, left)]
        elif self.official:
            spaced = released_samples(n, len(top)).to(left.device)
        else:
            spaced = left
        if self.adaptive or not self.official:
            count = min(room - len(top), len(spaced))
            at = (2 * torch.arange(count, device=left.device) + 1) * len(spaced) // max(1, 2 * count)
            spaced = spaced[at]
        chosen = torch.cat([top, spaced])
        if not self.official:
            return chosen, complement(chosen, n)
        once = chosen.unique()  # a patch kept twice costs the lowest of the others
        return chosen, complement(once, n)[len(chosen) - len(once) :]


def released_samples(n: int, count: int) -> Tensor:
    """Return the ``count`` patches that the release samples at a fixed ratio; raise where it would fail.

    It starts at half a step, and a step is the inverse of the ratio rounded down; ``count`` is the ratio times ``n`` rounded down,
    which leaves few candidates for the step.
    """
    for step in (n // max(1, count), n // max(1, count) - 1):
        if count and step > 0:
            samples = torch.arange(step // 2, n - 1, step)
            if len(samples) == count:
                return samples
    raise BudgetError(
        f"prumerge_plus: the release cannot sample {count} of {n} patches at even distances: use official=False, or "
        f"a keep such as {2 * (n // 8) + 1}"
    )
