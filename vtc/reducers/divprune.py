"""DivPrune: keep the subset of visual tokens that is spread out most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.kernels import farthest_point, most_isolated
from vtc.registry import register


@register(
    "divprune",
    paper="arXiv:2503.02175",
    code="https://github.com/vbdi/divprune @ 799e2d9",
    licence="CC-BY-NC-4.0",
    presets={
        "paper": {"keep": 0.098},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llava15-32": {"keep": 32},
        "video": {"keep": 0.1},
    },
)
@dataclass(frozen=True, kw_only=True)
class DivPrune(Reducer):
    """Greedy max-min diversity of the projected tokens under cosine distance: no text, no attention.

    The first token is the one whose nearest other token is farthest away; every further one is the token farthest from the nearest
    token chosen so far. Survivors are put in raster order.

    Deviates: chosen tokens are masked and a token is never its own neighbour, so duplicates (plain areas, half precision) cannot
    be chosen twice and exactly ``keep`` tokens stay; distances are float32; newline tokens, which are all the same, do not
    compete; every image is judged by itself, where the release applies row 0's choice to the whole batch and fixes where the image
    starts. The paper's tables were made with the tokens in the order they were chosen; the release, and this reducer, sort them.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model (the release's subset ratio is a share).
    official : bool, default False
        As released: distances in the model's dtype, nothing masked (a token chosen twice counts once, so fewer than ``keep`` may
        stay), newline tokens compete, and the first image's choice counts for every image of the batch that has the same geometry.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"

    official: bool = False

    @property
    def newline_policy(self) -> Newlines:
        """Newlines compete in the release."""
        return self.newlines or ("compete" if self.official else self.default_newlines)

    def pick(self, signals: Signals) -> Tensor:
        """Return ``(B, K)`` tokens in the order they are chosen (``official``: possibly with repetitions)."""
        if self.official:
            return _official_picks(signals.features[:1], signals.budget).expand(signals.shape[0], -1)
        return farthest_point(signals.features, signals.budget, most_isolated(signals.features))

    def select(self, signals: Signals) -> Selection:
        """Sort what was picked."""
        with torch.no_grad():
            index = self.pick(signals).sort(-1).values
            if not self.official:
                return Selection(index)
            fresh = torch.ones_like(index, dtype=torch.bool)
            fresh[:, 1:] = index[:, 1:] != index[:, :-1]
            return Selection(index, valid=None if bool(fresh.all()) else fresh)


def _official_picks(features: Tensor, k: int) -> Tensor:
    """Picks of the release: the full distance matrix in the features' dtype, no mask on chosen tokens."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.transpose(1, 2)
    n = distance.shape[1]
    batch = torch.arange(distance.shape[0], device=distance.device)
    second = distance.topk(min(2, n), dim=-1, largest=False).values[..., -1]
    picks = [second.argmax(-1)]
    near = distance[batch, picks[0]]
    for _ in range(k - 1):
        picks.append(near.argmax(-1))
        near = torch.minimum(near, distance[batch, picks[-1]])
    return torch.stack(picks, 1)
