"""FasterVLM: keep the patches the vision tower's class token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Need, Newlines, Positions, Scorer, Selection, Signals, Stage
from vtc.kernels import apportion, topk_per_group
from vtc.registry import register
from vtc.signals import cls_attn


@register(
    "fastervlm",
    paper="arXiv:2412.01818",
    code="https://github.com/Theia-4869/FasterVLM @ f5d5f12",
    licence="Apache-2.0",
    presets={
        "llava15-288": {"keep": 288},
        "llava15-192": {"keep": 192},
        "llava15-144": {"keep": 144},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llava15-58": {"keep": 58},
        "llava15-29": {"keep": 29},
        "llavanext-640": {"keep": 640},
        "llavanext-320": {"keep": 320},
        "llavanext-160": {"keep": 160},
    },
)
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer):
    """Keep the patches with the highest CLS attention in the tower's penultimate layer, before the language model.

    Score of a patch: attention of the class token, mean over heads, softmax over class token and patches. An image cut into
    several views shares its budget evenly among them, each view ranks its own patches, and the survivors stay in the order of the
    stitched picture. Towers without a class token are scored by the mean attention a patch receives.

    Deviates: what a small view (after unpadding) cannot use, and what does not divide evenly, goes to the other views, so that
    exactly ``keep`` tokens stay; the release gives every crop the same number (``official=True``). Padding patches, which the
    release lets compete, have no slot in the language model here and are never kept. Newline tokens are dropped, as in the
    release.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model, all its views together (the release counts per crop).
    official : bool, default False
        Every view keeps ``keep // views`` patches, even where that leaves fewer than ``keep`` in total.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"

    official: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of the penultimate tower layer."""
        return (cls_attn(-2),)

    def score(self, signals: Signals) -> Tensor:
        """Return the tapped CLS attention."""
        return signals.cls_attn

    def select(self, signals: Signals) -> Selection:
        """Keep the highest scores of every view."""
        views = signals.layout.views
        if views == 1:
            return super().select(signals)
        with torch.no_grad():
            view = signals.of("view")
            group = torch.where(view < 0, views, view)  # competing newlines: a group of their own, served last
            size = group.new_zeros(group.shape[0], views + 1).scatter_add(1, group, torch.ones_like(group))
            weight = [1.0] * views + [0.0]
            if self.official and signals.budget >= views:
                quota = [[min(n, signals.budget // views) for n in row[:-1]] + [0] for row in size.tolist()]
            else:
                quota = [apportion(signals.budget, weight, row) for row in size.tolist()]
            chosen = topk_per_group(self.score(signals), group, torch.tensor(quota, device=group.device))
            count = [sum(row) for row in quota]
            index = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, : max(count)]
            valid = None
            if min(count) < max(count):
                valid = torch.arange(max(count), device=group.device) < torch.tensor(count, device=group.device)[:, None]
            return Selection(index, valid=valid)
