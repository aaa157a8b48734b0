"""Gridpool: average the picture down to a coarser grid of tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Kind, Layout, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.kernels import apportion, coarse_grid, widened
from vtc.registry import register


@register("gridpool", paper="baseline")
@dataclass(frozen=True, kw_only=True)
class GridPool(Reducer):
    """Adaptive average pooling of every view's token grid to at most the budget.

    A view gets cells in proportion to its tokens (after unpadding), laid out as the most square grid with at most that many. Cells
    have equal size, cut through tokens where the sizes do not divide, and average by the exact area of each token inside them. A
    pooled value sits in the slot nearest to its cell's centre. The count reached is at most ``keep``, often a little below (7 makes
    2 x 3), and reported in the statistics.

    Deviates: nothing; this is our own baseline.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image entering the language model.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    kind: ClassVar[str] = "merge"

    def select(self, signals: Signals) -> Selection:
        """Average the tokens of each cell."""
        batch, n = signals.shape
        wide, device = widened(signals.features), signals.features.device
        if signals.known is not None:
            slots = [tuple(signals.known.tolist())] * batch
        else:
            slots = [tuple(row) for row in signals.entries.tolist()]  # the host plans
        plans = [_moved(signals.layout, own, signals.budget, device, wide.dtype) for own in slots]
        count = [len(anchors) for anchors, _, _ in plans]
        most = max(count)
        valid = None
        if min(count) < most:
            valid = torch.arange(most, device=device) < torch.tensor(count).to(device, non_blocking=True)[:, None]
        pad = torch.nn.functional.pad
        pooled = [
            pad(torch.sparse.mm(weight, x), (0, 0, 0, most - k)) for (*_, weight), x, k in zip(plans, wide, count, strict=True)
        ]
        return Selection(
            torch.stack([pad(anchors, (0, most - len(anchors))) for anchors, _, _ in plans]),
            torch.stack(pooled).to(signals.features.dtype),
            torch.stack([owner for _, owner, _ in plans]),
            valid,
        )


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # later calls may want gradients
def _moved(
    layout: Layout, slots: tuple[int, ...], budget: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_plan` on a device, the weights in ``dtype``."""
    anchors, owner, weight = _plan(layout, slots, budget)
    return anchors.to(device), owner.to(device), weight.to(device, dtype)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _plan(layout: Layout, slots: tuple[int, ...], budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plan the pooling of one image; the plan of the last few geometries is remembered.

    Parameters
    ----------
    layout : Layout
        Geometry of the image.
    slots : tuple of int
        Entry of every token, ``N`` of them.
    budget : int
        Most cells.

    Returns
    -------
    anchors, owner, weight : Tensor
        ``(K,)`` ascending token each cell sits in, ``(N,)`` cell that holds each token's centre (-1: none), sparse ``(K, N)``
        float64 share of each token in each cell.
    """
    entries = torch.tensor(slots)
    n = len(entries)
    row, col = layout.row[entries], layout.col[entries]
    view = torch.where(layout.kind[entries] == Kind.PATCH, layout.view[entries], -1)
    members = [(view == v).nonzero()[:, 0] for v in range(layout.views)]
    size = [len(m) for m in members]
    anchors, owned, weights = [], [], []
    for tokens, share in zip(members, apportion(budget, size, size), strict=True):
        if share == 0:
            continue
        i, j = row[tokens] - row[tokens].min(), col[tokens] - col[tokens].min()
        high, wide = int(i.max()) + 1, int(j.max()) + 1
        r, c = coarse_grid(share, high, wide)
        # doubled coordinates, so that centres stay whole numbers: token i is centred at (2 i + 1) / 2
        home = (2 * i + 1) * r // (2 * high) * c + (2 * j + 1) * c // (2 * wide)
        down_area, across_area = _overlap(high, r)[:, i], _overlap(wide, c)[:, j]
        for cell in range(r * c):
            mine = tokens[home == cell]
            if not len(mine):  # an earlier stage dropped all its tokens
                continue
            down = ((2 * (row[mine] - row[tokens].min()) + 1) * r - (2 * (cell // c) + 1) * high).double() / r
            across = ((2 * (col[mine] - col[tokens].min()) + 1) * c - (2 * (cell % c) + 1) * wide).double() / c
            anchors.append(mine[(down.square() + across.square()).argmin()])
            owned.append(mine)
            area = down_area[cell // c] * across_area[cell % c]
            inside = area.nonzero()[:, 0]
            weights.append((tokens[inside], area[inside] / area.sum()))
    order = torch.stack(anchors).argsort()
    owner = torch.full((n,), -1)
    for cell, at in enumerate(order.tolist()):
        owner[owned[at]] = cell
    rows = torch.cat([torch.full_like(weights[at][0], cell) for cell, at in enumerate(order.tolist())])
    columns, shares = (torch.cat([weights[at][i] for at in order.tolist()]) for i in (0, 1))
    at = torch.stack([rows, columns])
    weight = torch.sparse_coo_tensor(at, shares, (len(anchors), n), check_invariants=True).coalesce()
    return torch.stack(anchors)[order], owner, weight


def _overlap(size: int, cells: int) -> Tensor:
    """Length of every unit interval ``[i, i + 1]`` inside each of ``cells`` equal parts of ``[0, size]``, ``(cells, size)``."""
    low = torch.arange(cells, dtype=torch.float64)[:, None] * size / cells
    high = torch.arange(1, cells + 1, dtype=torch.float64)[:, None] * size / cells
    at = torch.arange(size, dtype=torch.float64)
    return (torch.minimum(high, at + 1) - torch.maximum(low, at)).clamp(min=0)
