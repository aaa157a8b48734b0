"""HiPrune: anchors and their neighbours from a middle tower layer, registers from a deep one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import compacted, topk, topk_mask
from vtc.registry import register
from vtc.signals import received_attn
from vtc.views import each_view


@register(
    "hiprune",
    paper="arXiv:2508.00553",
    code="https://github.com/Danielement321/HiPrune @ 6e83a12",
    licence="MIT",
    presets={
        "llava15-192": {"keep": 192, "alpha": 0.1, "object_layer": 9},
        "llava15-128": {"keep": 128, "alpha": 0.1, "object_layer": 9},
        "llava15-64": {"keep": 64, "alpha": 0.1, "object_layer": 9},
        "llavanext-640": {"keep": 640, "alpha": 0.1, "object_layer": 9},
        "llavanext-320": {"keep": 320, "alpha": 0.1, "object_layer": 9},
        "llavanext-160": {"keep": 160, "alpha": 0.1, "object_layer": 9},
        "qwen-33": {"keep": 0.334, "alpha": 0.1, "object_layer": 16},
        "qwen-22": {"keep": 0.223, "alpha": 0.1, "object_layer": 16},
        "qwen-11": {"keep": 0.112, "alpha": 0.1, "object_layer": 16},
    },
)
@dataclass(frozen=True, kw_only=True)
class HiPrune(Reducer):
    """Keep the patches a middle tower layer attends to, their four neighbours, and the patches a deep layer attends to.

    Score of a patch in a layer: the attention it receives, mean over heads and over all queries (the class token's included), so
    towers without a class token need no substitute. Per view: the ``round(keep * alpha / 5)`` patches with the highest score in
    the object layer are *anchors*; their left, right, upper and lower neighbours are *buffers*; what is left of the budget goes to
    *registers*, the patches with the highest score in the penultimate layer. Survivors stay in raster order; newlines are dropped.

    Deviates: neighbours are those of the picture's grid, while the release adds and subtracts 1 and the row length, so that the
    left neighbour of a row's first patch is the end of the row above, and patches at the border count themselves; where anchors and
    buffers exceed the budget the anchors come first, then the buffers with the highest object score, and the release fails; a
    registered patch is never counted twice; the budget counts an image and is shared by its views so that exactly ``keep`` tokens
    stay. ``official=True`` restores the release's neighbours and gives every view ``keep // views``; an excess of buffers is cut
    in either case. The release lowers the deep score of anchors and buffers by 1 instead of leaving them out; where scores are
    sums over queries, as for Qwen2.5-VL, it may so choose one of them twice and keep fewer tokens (``official=True``). Padding
    patches never compete.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, all its views together.
    alpha : float, default 0.1
        Share of the budget meant for anchors and buffers (the true share is smaller where they overlap).
    object_layer : int or float, default 0.375
        Tower layer of the anchors: its number counted from 1, or the share of the tower's layers it stands at (rounded down; 0.375
        is layer 9 of CLIP-L's 24).
    official : bool, default False
        Neighbours without a test for row ends, and ``keep // views`` patches per view.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"

    alpha: float = 0.1
    object_layer: int | float = 0.375
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse shares and layers that make no sense on any model."""
        super().__post_init__()
        if isinstance(self.alpha, bool) or not 0.0 <= self.alpha <= 1.0:
            raise UnknownArgumentError(f"hiprune: alpha={self.alpha!r} is not a share; use a number from 0 to 1")
        layer = self.object_layer
        if isinstance(layer, bool) or layer <= 0 or (isinstance(layer, float) and not layer <= 1.0):
            raise UnknownArgumentError(
                f"hiprune: object_layer={layer!r} is not a layer; use its number from 1, or a share of the depth in (0, 1]"
            )

    def object_index(self, layers: int) -> int:
        """Return the index (from 0) of the object layer in a tower of ``layers`` layers."""
        layer = self.object_layer
        return max(1, int(layer * layers)) - 1 if isinstance(layer, float) else layer - 1

    def bind(self, facts: Facts) -> Reducer:
        """Resolve the object layer for the model's tower."""
        super().bind(facts)
        number = self.object_index(facts.encoder_layers) + 1
        if number > facts.encoder_layers:
            raise UnknownArgumentError(
                f"hiprune: object_layer={number} is out of range, the vision tower has {facts.encoder_layers} layers: use "
                f"1..{facts.encoder_layers}, or a share of the depth such as 0.375"
            )
        return dataclasses.replace(self, object_layer=number)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention received in the object layer (of a 24-layer tower until bound to a model) and in the penultimate one."""
        return received_attn(self.object_index(24), "object_attn"), received_attn(-2, "deep_attn")

    def groups(self, signals: Signals) -> tuple[Tensor, Tensor, Tensor]:
        """Mark anchors, buffers and registers of one view of one image, ``(1, N)`` bool each; no token twice."""
        k, score, deep = signals.budget, signals.object_attn, signals.deep_attn
        first = topk(score, round(k * self.alpha / 5))
        anchors = torch.zeros_like(score, dtype=torch.bool).scatter(1, first, True)
        around = self.around(signals, first[0]) & ~anchors
        room = around.sum(1).clamp(max=k - first.shape[1])
        buffers = topk_mask(score.masked_fill(~around, -torch.inf), room)
        union = anchors | buffers
        rest = deep - union.to(deep.dtype) if self.official else deep.masked_fill(union, -torch.inf)
        return anchors, buffers, topk_mask(rest, k - union.sum(1)) & ~union

    def around(self, signals: Signals, anchors: Tensor) -> Tensor:
        """Mark the neighbours ``(1, N)`` of the tokens ``anchors (n,)``."""
        layout = signals.layout
        (rows, cols), row, col = layout.grids[0], signals.of("row")[0], signals.of("col")[0]
        if not self.official:  # one empty column and row around the picture, so that nothing is beyond an edge
            cols, rows, row, col = cols + 2, rows + 2, row + 1, col + 1
        number = row * cols + col
        mine = number[anchors]
        wanted = torch.cat([mine - 1, mine + 1, mine - cols, mine + cols])
        if self.official:  # numbers of patches, clamped, whatever row they are in
            wanted = wanted.clamp(0, rows * cols - 1)
        cells = torch.zeros(rows * cols, dtype=torch.bool, device=anchors.device).index_fill(0, wanted, True)
        return cells[number][None]

    def choose(self, signals: Signals) -> Selection:
        """Keep the patches of one view."""
        anchors, buffers, registers = self.groups(signals)
        # as released: a token registered twice leaves one fewer
        return Selection(compacted(anchors | buffers | registers, None if self.official else signals.budget)[0])

    def select(self, signals: Signals) -> Selection:
        """Keep the patches of every view."""
        with torch.no_grad():
            return each_view(signals, self.choose, floor=self.official)
