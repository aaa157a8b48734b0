"""Flexpool: adaptive average pooling of the picture to any grid, before or after the projector."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import widened
from vtc.registry import register
from vtc.views import each_view, on_host


@register(
    "flexpool",
    paper="arXiv:2504.03154",
    presets={
        "256": {"keep": 256},
        "144": {"keep": 144},
        "64": {"keep": 64},
    },
)
@dataclass(frozen=True, kw_only=True)
class FlexPool(Reducer):
    """Pool every view's grid of tokens to a coarser one, with overlapping cells where the sizes do not divide.

    The target for a budget of ``N`` tokens and a grid of ``H x W`` is ``round(sqrt(N * H / W))`` rows and as many columns as still
    fit. Cell ``i`` of ``n`` covers the rows ``floor(i * H / n)`` to ``ceil((i + 1) * H / n) - 1``, and likewise columns; its token
    is the plain mean, taken in float32, and sits in the token at the cell's centre. The count reached is at most ``keep``, often a
    little below (7 tokens of a square make 3 x 2), and reported in the statistics. AnyRes: views are pooled one by one and share
    the budget evenly, and a row's newline token stays in addition where a pooled token sits in it.

    Deviates: the paper trains one model with 64, 144 and 256 tokens and pools before its projector; this is inference only, on
    models trained with all tokens. After the projector (default) means stay among what the language model has seen;
    ``place="tower"`` pools where the paper does. The paper's own projector is not part of this.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image entering the stage, newline tokens not counted.
    place : {"projected", "tower"}, default "projected"
        Pool what the projector returns, or what it is given.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "with_row"
    kind: ClassVar[str] = "merge"

    place: Literal["projected", "tower"] = "projected"

    def __post_init__(self) -> None:
        """Refuse places that do not exist."""
        super().__post_init__()
        if self.place not in ("projected", "tower"):
            raise UnknownArgumentError(f"flexpool: place={self.place!r} is not possible; use 'projected' or 'tower'")

    def parts(self) -> tuple[Reducer, ...]:
        """Return the reducer itself, or the same before the projector."""
        if self.place == "projected" or self.stage is Stage.VISION:
            return (self,)
        return (FlexPoolTower(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}),)

    def choose(self, signals: Signals) -> Selection:
        """Pool one view; cells without any token (an earlier stage dropped them) are left out."""
        device, wide = signals.features.device, widened(signals.features[0])
        row, col = on_host(signals, "row", "col")
        row, col = row - row.min(), col - col.min()
        high, across = int(row.max()) + 1, int(col.max()) + 1
        rows, cols = target_grid(signals.budget, high, across)
        number, full = row * across + col, high * across
        at, plain = number.to(device, non_blocking=True), torch.equal(number, torch.arange(full))
        grid = wide if plain else wide.new_zeros(full, wide.shape[1]).index_copy(0, at, wide)
        pooled = adaptive_mean(grid, high, across, (rows, cols))
        token = torch.full((full,), -1).index_copy(0, number, torch.arange(len(number)))
        y = (2 * torch.arange(rows) + 1) * high // (2 * rows)
        x = (2 * torch.arange(cols) + 1) * across // (2 * cols)
        seat = token[(y[:, None] * across + x).flatten()]
        owner = (2 * row + 1) * rows // (2 * high) * cols + (2 * col + 1) * cols // (2 * across)
        if len(number) < full:
            there = adaptive_mean(wide.new_zeros(full, 1).index_fill(0, at, 1.0), high, across, (rows, cols))
            pooled = pooled / there.clamp(min=torch.finfo(wide.dtype).tiny)
            seat = nearest_seats(row, col, (high, across), (rows, cols))
            left = seat >= 0
            place = torch.where(left, left.cumsum(0) - 1, -1)
            kept = left.nonzero()[:, 0].to(device, non_blocking=True)
            pooled, owner, seat = pooled[kept], place[owner], seat[left]
            owner[seat] = torch.arange(len(seat))
        order = seat.argsort()
        owner = torch.where(owner >= 0, order.argsort()[owner.clamp(min=0)], -1)
        index, order, owner = (t.to(device, non_blocking=True) for t in (seat[order], order, owner))
        return Selection(index[None], pooled[order][None].to(signals.features.dtype), owner[None])

    def select(self, signals: Signals) -> Selection:
        """Pool every view."""
        return each_view(signals, self.choose)


@dataclass(frozen=True, kw_only=True)
class FlexPoolTower(FlexPool):
    """:class:`FlexPool` before the projector."""

    name: ClassVar[str] = "flexpool"
    stage: ClassVar[Stage] = Stage.VISION


def target_grid(budget: int, rows: int, cols: int) -> tuple[int, int]:
    """Return the rows and columns of at most ``budget`` cells over a grid of ``rows x cols``, in about its proportions."""
    high = max(1, min(rows, budget, round(math.sqrt(budget * rows / cols))))
    return high, max(1, min(cols, budget // high))


def adaptive_mean(features: Tensor, rows: int, cols: int, target: tuple[int, int]) -> Tensor:
    """Average pooling of a full grid ``(N, D)`` in raster order, ``(n, D)``."""
    grid = features.reshape(rows, cols, -1)
    down = torch.stack([grid[lo:hi].sum(0) for lo, hi in _spans(rows, target[0])])  # rows first: every token is read about once
    both = torch.stack([down[:, lo:hi].sum(1) for lo, hi in _spans(cols, target[1])], 1)
    size = [[(b - a) * (d - c) for c, d in _spans(cols, target[1])] for a, b in _spans(rows, target[0])]
    return (both / torch.tensor(size, dtype=both.dtype).to(both.device, non_blocking=True)[..., None]).flatten(0, 1)


def _spans(size: int, cells: int) -> list[tuple[int, int]]:
    """First and last-but-one place of every cell along one axis."""
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


def nearest_seats(row: Tensor, col: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Return the token nearest to each cell's centre that no other cell took, ``(n,)``; -1 for cells without one.

    For grids with holes; ``row`` and ``col`` are those of the tokens there are.
    """
    taken = torch.zeros(len(row), dtype=torch.bool)
    seats = torch.full((target[0] * target[1],), -1)
    for cell in range(len(seats)):
        i, j = divmod(cell, target[1])
        inside = (row >= i * grid[0] // target[0]) & (row < -(-(i + 1) * grid[0] // target[0])) & ~taken
        inside &= (col >= j * grid[1] // target[1]) & (col < -(-(j + 1) * grid[1] // target[1]))
        if bool(inside.any()):
            down = row + 0.5 - (i + 0.5) * grid[0] / target[0]
            right = col + 0.5 - (j + 0.5) * grid[1] / target[1]
            seats[cell] = (down.square() + right.square()).masked_fill(~inside, torch.inf).argmin()
            taken[seats[cell]] = True
    return seats
