"""DART: keep a few pivots, and of the other visual tokens those least like them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage, Usual
from vtc.errors import UnknownArgumentError
from vtc.kernels import compacted, take, topk, topk_mask, widened
from vtc.registry import register
from vtc.signals import StateTap, final_states, key_norm, places


def _best_text(tap: StateTap, count: int) -> tuple[Tensor, Tensor]:
    """Return indices ``(B, count)`` of the question tokens with the largest key norm, best first, and which of them exist."""
    norm = tap.given["key_norm"].masked_fill(~tap.question, -torch.inf)
    index = topk(norm, min(count, norm.shape[1]))
    there = tap.question.gather(1, index)
    if index.shape[1] < count:
        more = count - index.shape[1]
        index, there = torch.nn.functional.pad(index, (0, more)), torch.nn.functional.pad(there, (0, more))
    return index, there


@dataclass(frozen=True)
class TextPivots:
    """Measure: states of the ``count`` text pivots under the final norm, ``(B, count, D)``; zeros where there are fewer."""

    count: int

    def __call__(self, tap: StateTap) -> Tensor:
        """Gather, then normalise."""
        index, there = _best_text(tap, self.count)
        states = take(tap.hidden, index)
        return torch.where(there[..., None], tap.norm(states), 0.0)


@dataclass(frozen=True)
class TextPivotPlaces:
    """Measure: places of the text pivots in the sequence, ``(B, count)`` int64; -1 where there are fewer."""

    count: int

    def __call__(self, tap: StateTap) -> Tensor:
        """Gather the places."""
        index, there = _best_text(tap, self.count)
        return torch.where(there, (tap.valid.cumsum(1) - 1).gather(1, index), -1)


@register(
    "dart",
    paper="arXiv:2502.11494",
    code="https://github.com/Chenfei-Liao/VTC-Bench @ 983e443 (external/DART)",
    licence="Apache-2.0",
    presets={
        "llava15-128": {"keep": 128, "layer": 2, "official": True},
        "r778": {"keep": 1 - 0.778, "layer": 2, "official": True},
        "llavanext-320": {"keep": 320, "layer": 2, "official": True},
        "lightcompress": {"keep": 128, "layer": 5},
        "uniprunebench": {"keep": 128, "layer": 2, "image_pivots": 10, "text_pivots": 5},
    },
)
@dataclass(frozen=True, kw_only=True)
class DART(Reducer):
    """Keep a few pivots and the visual tokens least similar to them: duplication, not importance, decides.

    Pivots are the ``image_pivots`` visual tokens and the ``text_pivots`` tokens of the question whose keys in layer ``layer -
    1`` have the largest L1 norm over all heads. Pivot by pivot, the candidates with the lowest cosine to it are kept and leave
    the candidates. Cosines are taken between the states entering layer ``layer`` under the model's *final* norm. Kept are the
    image pivots and the tokens chosen, in sequence order and with their original positions; text is never dropped.

    Deviates: the release keeps ``image_pivots + pivots * floor(keep / pivots)`` tokens, which misses the budget by a few, and
    visits the pivots in the iteration order of a Python set of their positions, on which the result depends. Here exactly
    ``keep`` tokens are kept (what does not divide evenly goes to the first pivots), and pivots are visited in sequence order,
    image before text. ``official=True`` restores both. The question is the text behind the last visual token of the row; where
    it has fewer tokens than ``text_pivots`` the release fails and here fewer are used. Several images in a prompt, batches and
    padding, which the release does not handle, are judged per image. The release compares keys with states of different layers
    and uses the final norm in the middle of the model; both are kept. The original repository was not available: the copy in
    VTC-Bench was studied.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering decoder layer ``layer``.
    layer : int, default 2
        First decoder layer that runs on the shorter sequence; by default the first one possible where that is later (Qwen3-VL).
    image_pivots, text_pivots : int, default 4
        Number of pivots. A budget below ``image_pivots`` keeps only the best of them.
    official : bool, default False
        Number of tokens and order of pivots of the release.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "compete"

    layer: int = Usual(2)
    image_pivots: int = 4
    text_pivots: int = 4
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse a number of pivots that cannot mean anything."""
        super().__post_init__()
        for option, least in (("image_pivots", 1), ("text_pivots", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or value < least:
                raise UnknownArgumentError(f"'dart': {option}={value!r} is out of range, give an int of at least {least}")

    @property
    def needs(self) -> tuple[Need, ...]:
        """Key norms of the layer before, states entering this one, and the text pivots."""
        norm = key_norm(self.layer - 1)
        own = (norm, final_states(self.layer), places(self.layer))
        if not self.text_pivots:
            return own
        return (
            *own,
            Need("text_pivots", "text", self.layer, TextPivots(self.text_pivots), axis="row", of="hidden", uses=(norm,)),
            Need("text_places", "text", self.layer, TextPivotPlaces(self.text_pivots), axis="row", of="hidden", uses=(norm,)),
        )

    def count(self, n: int, facts: Facts) -> int:
        """Return the budget; the release rounds a share down."""
        rounding = math.floor if self.official else round
        return self.budget.tokens(n, start=self.layer, layers=facts.layers, rounding=rounding)

    def pivots(self, signals: Signals) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image pivots ``(B, p)``, best first, and states ``(B, P, D)`` and places ``(B, P)`` of all in visiting order.

        Places of missing pivots are -1; they come last.
        """
        p = min(self.image_pivots, signals.shape[1] if self.official else signals.budget)
        image = topk(signals.key_norm, p)
        states = take(signals.final_states, image)
        where = signals.places.gather(1, image)
        if self.text_pivots:
            states = torch.cat([states, signals.text_pivots.to(states.dtype)], 1)
            where = torch.cat([where, signals.text_places], 1)
        index = self.visit(where, p)
        return image, take(states, index), where.gather(1, index)

    def visit(self, where: Tensor, p: int) -> Tensor:
        """Return the order ``(B, P)`` of visits to pivots at the places ``where (B, P)``; the first ``p`` are the image's."""
        if self.official:
            return torch.tensor([_order_of_a_set(row) for row in where.tolist()], device=where.device)
        text = torch.arange(where.shape[1], device=where.device) >= p
        far = torch.iinfo(where.dtype).max // 2
        return torch.argsort(torch.where(where < 0, 2 * far, where + text * far), dim=1, stable=True)

    def select(self, signals: Signals) -> Selection:
        """Keep the image pivots; then each pivot adds the candidates least similar to it."""
        with torch.no_grad():
            image, states, where = self.pivots(signals)
            tokens = widened(signals.final_states)
            # divided afterwards: no second copy of all states
            cosine = torch.einsum("bnd,bpd->bpn", tokens, torch.nn.functional.normalize(widened(states), dim=-1))
            cosine = cosine / tokens.norm(dim=-1).clamp(min=1e-12)[:, None]
            kept = torch.zeros(signals.shape, dtype=torch.bool, device=image.device).scatter(1, image, True)
            there = where >= 0
            total = there.sum(1, keepdim=True)
            if self.official:
                quota = there * (signals.budget // (self.image_pivots + self.text_pivots))
            else:
                rest = signals.budget - image.shape[1]
                rank = torch.arange(where.shape[1], device=where.device)
                quota = there * (rest // total + (rank < rest % total))
            for pivot in range(where.shape[1]):
                kept |= topk_mask(-cosine[:, pivot].masked_fill(kept, torch.inf), quota[:, pivot])
            # as released: fewer where there are fewer pivots
            index, valid = compacted(kept, None if self.official else signals.budget)
        return Selection(index, valid=valid)


def _order_of_a_set(where: list[int]) -> list[int]:
    """Return the order of pivots at the places ``where`` in which a Python set lists the places; missing ones come last."""
    there = {place: i for i, place in reversed(list(enumerate(where))) if place >= 0}
    first = [there[place] for place in set([place for place in where if place >= 0])]  # noqa: C403  insertion order matters
    return first + [i for i in range(len(where)) if i not in first]
