"""FasterVLM: keep the patches the vision tower's class token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Need, Newlines, Positions, Scorer, Selection, Signals, Stage
from vtc.kernels import compacted, topk_per_group
from vtc.registry import register
from vtc.signals import cls_attn
from vtc.views import members, shares_of_views


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
            if self.official and signals.budget >= views:
                quota = [[min(len(m), signals.budget // views) for m in own[:-1]] + [0] for own in members(signals)]
            else:
                quota = shares_of_views(signals)
            shares = torch.tensor(quota).to(group.device, non_blocking=True)
            chosen = topk_per_group(self.score(signals), group, shares)
            count = [sum(row) for row in quota]
            index, valid = compacted(chosen, count[0] if len(set(count)) == 1 else None)
            return Selection(index, valid=valid)
