"""Skip span: unimportant patches skip a span of the vision tower's layers and come back behind it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import EncoderReducer, EncoderState, Facts, Need, check_bounds
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.kernels import topk_mask
from vtc.registry import register
from vtc.signals import cls_attn

SPAN = (6 / 23, 20 / 23)
"""Default first layer of the span and first layer behind it, as shares of the layers used: 6 and 20 of CLIP-L's 23."""


@register(
    "skipspan",
    paper="arXiv:2401.15293",
    presets={"clip-l": {"keep": 0.45, "start": 6, "stop": 20}},
)
@dataclass(frozen=True, kw_only=True)
class SkipSpan(EncoderReducer):
    """Run the layers of a span on the patches the class token attends to most; the others skip it and come back unchanged.

    Attention of the class token in layer ``start - 1``, mean over heads, ranks the patches of a view; layers ``start`` to
    ``stop - 1`` run on the class token and the best ``keep`` of them. Before layer ``stop`` every patch is back in its place,
    the skipped ones with the state they had. The number of visual tokens stays as it is: the tower gets cheaper, the language
    model does not. Without a class token the attention a patch receives stands in (said in the statistics).

    Deviates: the paper (SkipViT, no public code) trains with the skip; layers and schedule are not stated in what could be read
    of it and stay unconfirmed. Here nothing is trained, so states that skipped many layers are younger than the features the
    projector knows.

    Parameters
    ----------
    keep : int or float
        Patches per image that run through the span, shared evenly by its views, rounded down. ``avg_tokens`` means the same.
    start, stop : int or None
        First tower layer of the span, and first layer that sees all patches again. ``None``: 6/23 and 20/23 of the layers used.
    """

    decides_itself: ClassVar[bool] = True
    kind: ClassVar[str] = "score"

    start: int | None = None
    stop: int | None = None

    def bind(self, facts: Facts) -> SkipSpan:
        """Fix the span.

        Raises
        ------
        BudgetError
            More tokens than there are.
        UnsupportedFeatureError
            A tower of fewer than three layers up to the features: nothing lies between the first and the last.
        UnknownArgumentError
            A span that is not inside the tower.
        """
        check_bounds(self.budget, facts)
        last = facts.feature_layer
        if last < 2:
            raise UnsupportedFeatureError(
                f"'skipspan' needs a tower layer before, in and behind the span, and this tower uses {last + 1}: use a reducer "
                "behind the tower"
            )
        start = self.start if self.start is not None else max(1, min(last - 1, round(SPAN[0] * (last + 1))))
        stop = self.stop if self.stop is not None else max(start + 1, min(last, round(SPAN[1] * (last + 1))))
        if not 1 <= start < stop <= last:
            raise UnknownArgumentError(
                f"skipspan: start={start}, stop={stop} is not a span of this tower: use 1 <= start < stop <= {last}"
            )
        return dataclasses.replace(self, start=start, stop=stop)

    @property
    def returns(self) -> int | None:
        """First layer behind the span."""
        return self.stop

    def view_budgets(self, views: int, patches: int, facts: Facts) -> list[int]:
        """Share an image's budget evenly, rounded down."""
        total = self.budget.tokens(views * patches, rounding=math.floor)
        return [max(1, min(patches, total // views))] * views

    def note(self, asked: int, slots: int) -> str:
        """Say what ran."""
        return (
            "" if asked == slots else f"{asked} patches ran through tower layers {self.start} to {self.stop - 1}; all came back"
        )

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        """Attention in the layer before the span."""
        return (cls_attn(layer),) if layer == self.start - 1 else ()

    def step(self, state: EncoderState) -> tuple[dict[str, Tensor], Tensor | None]:
        """Rank the patches of every view."""
        score = state.taps["cls_attn"].masked_fill(~state.valid, -torch.inf)
        return {}, topk_mask(score, state.target)
