"""VisPruner: some patches for the class token's attention, the rest by removing duplicates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import drop_duplicates
from vtc.registry import register
from vtc.signals import cls_attn
from vtc.views import NO_CLS, each_view


@register(
    "vispruner",
    paper="arXiv:2412.01818",
    code="https://github.com/Theia-4869/VisPruner @ aefa01a",
    licence="Apache-2.0",
    presets={
        "llava15-192": {"keep": 192},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llava15-32": {"keep": 32},
        "llavanext-640": {"keep": 640},
        "llavanext-320": {"keep": 320},
        "llavanext-160": {"keep": 160},
    },
)
@dataclass(frozen=True, kw_only=True)
class VisPruner(Reducer):
    """Keep the patches with the highest CLS attention, and of the others those that survive repeated removal of duplicates.

    Per view and before the projector: the ``int(keep * important)`` patches with the highest CLS attention of the tower's
    penultimate layer stay. The others, by descending attention, are thinned until the rest of the budget is left: each round
    compares the patches at even places of the list with those at odd places (cosine of the tower's features), drops the up to eight
    even ones most similar to an odd one, and goes on with the remaining even ones in order of descending similarity, followed by
    the odd ones. Survivors stay in raster order; newline tokens are dropped.

    Towers without a class token are scored by the mean attention a patch receives.

    Deviates: a list of odd length simply has one more even place, where the release fails; similarities are float32; the budget
    counts an image and is shared by its views so that exactly ``keep`` tokens stay (``official=True``: ``keep // views`` each).
    The release resizes every AnyRes image to a square so that there is no padding; here padding patches never compete.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, all its views together (the release counts per crop).
    important : float, default 0.5
        Share of them chosen by attention, rounded down.
    official : bool, default False
        Every view keeps ``keep // views`` patches, even where that leaves fewer than ``keep`` in total.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    wants_cls: ClassVar[bool] = True

    important: float = 0.5
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        super().__post_init__()
        if isinstance(self.important, bool) or not 0.0 <= self.important <= 1.0:
            raise UnknownArgumentError(f"vispruner: important={self.important!r} is not a share; use a number from 0 to 1")

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of the penultimate layer."""
        return (cls_attn(-2),)

    def split(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Return the patches ``(B, n)`` chosen by attention, most important first, and those that outlived the duplicates."""
        count = int(signals.budget * self.important)
        order = torch.sort(signals.cls_attn, dim=1, descending=True, stable=True).indices
        rest = order[:, count:]
        return order[:, :count], drop_duplicates(signals.features, rest, signals.budget - count)

    def choose(self, signals: Signals) -> Selection:
        """Keep the patches of one view."""
        return Selection(torch.cat(self.split(signals), 1).sort(1).values)

    def select(self, signals: Signals) -> Selection:
        """Keep the patches of every view."""
        with torch.no_grad():
            chosen = each_view(signals, self.choose, floor=self.official)
        return chosen if signals.cls is not None else dataclasses.replace(chosen, note=NO_CLS)
