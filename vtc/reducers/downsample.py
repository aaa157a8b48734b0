"""Downsample: shrink the picture itself. The floor every token reducer should beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vtc.core import Facts, ImageReducer, Reducer
from vtc.errors import BudgetError, InvalidSignalError
from vtc.kernels import coarse_grid
from vtc.registry import register


@register("downsample", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class Downsample(ImageReducer):
    """Resize the pixels, so that the vision tower itself runs on fewer patches.

    Every view is resized (bicubic, antialiased) to the most square patch grid with at most its share of the budget; the tower
    interpolates its position embeddings. The resulting tokens sit in the slots nearest to where they are in the picture.

    An image cut into views gets ``keep // max_views`` patches per view, where ``max_views`` is the most an image can have on this
    model: the result for one image must not depend on which others share the call. The count reached is therefore at most
    ``keep``, often below, and reported in the statistics.

    Deviates: nothing; this is our own baseline.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image (int), or the share of every view's patches (float).
    """

    def bind(self, facts: Facts) -> Reducer:
        """Refuse a budget that leaves a view without a patch."""
        amount = self.budget.amount
        if isinstance(amount, int) and amount < facts.max_views:
            raise BudgetError(
                f"'{self.name}': {amount} tokens cannot be shared by the {facts.max_views} views an image can have on this model: "
                f"use at least {facts.max_views}, or a share such as keep=0.1"
            )
        return super().bind(facts)

    def target_grid(self, grid: tuple[int, int], facts: Facts) -> tuple[int, int]:
        """Return the most square grid with at most one view's share of the budget."""
        patches = grid[0] * grid[1]
        amount = self.budget.amount
        share = self.budget.tokens(patches, rounding=int) if isinstance(amount, float) else amount // facts.max_views
        return coarse_grid(min(share, patches), *grid)

    def resize(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize in float32 and return the dtype given.

        Raises
        ------
        InvalidSignalError
            NaN or infinite pixels.
        """
        if not torch.isfinite(pixels).all():
            raise InvalidSignalError(
                f"signal 'pixels' at the image ('{self.name}') contains NaN or infinite values: check the input image"
            )
        wide = pixels if pixels.element_size() >= 4 else pixels.float()
        small = functional.interpolate(wide, size=size, mode="bicubic", antialias=True, align_corners=False)
        return small.to(pixels.dtype)
