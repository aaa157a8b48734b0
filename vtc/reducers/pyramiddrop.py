"""PyramidDrop: drop a share of the visual tokens at the end of each of a few groups of decoder layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Schedule, Scorer, Signals, Stage, check_bounds
from vtc.registry import register
from vtc.schedule import check_ratios, checked, place_cuts, stage_counts
from vtc.signals import next_last_attn


@dataclass(frozen=True, kw_only=True)
class PyramidDropStage(Scorer):
    """One cut of :class:`PyramidDrop`, before decoder layer ``cuts[stage]``.

    Parameters
    ----------
    cuts : tuple of int
        Decoder layers of all cuts.
    ratios : tuple of float
        Shares the paper leaves after each.
    stage_index : int
        Which cut this is.
    """

    name: ClassVar[str] = "pyramiddrop"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "compete"

    cuts: tuple[int, ...]
    ratios: tuple[float, ...]
    stage_index: int

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.cuts[self.stage_index]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention of the last prompt token in the layer about to run."""
        return (next_last_attn(self.layer),)

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens left after this cut."""
        return stage_counts(self.budget, n, self.cuts, self.ratios, facts.layers)[self.stage_index]

    def score(self, signals: Signals) -> Tensor:
        """Return the previewed attention row."""
        return signals.next_last_attn


@register(
    "pyramiddrop",
    paper="arXiv:2410.17247",
    code="https://github.com/Cooperx521/PyramidDrop @ 6444f30",
    licence="MIT",
    presets={"llava15": {"keep": 0.125, "layers": (8, 16, 24)}, "llavanext": {"keep": 0.125, "layers": (8, 16, 24)}},
)
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Schedule):
    """Drop visual tokens in several steps: redundancy of an image grows with depth.

    Before each of the decoder layers ``layers``, the queries and keys this layer would have are computed for all tokens still
    there; visual tokens are ranked by the attention of the last prompt token (softmax over all tokens it may see, mean over
    heads) and the best stay, in order. Positions are renumbered after every cut.

    Deviates: the release ranks only with FlashAttention or without padding, stops on grouped-query models and on left padding,
    and knows one image per sample; here each image is ranked by its own row, in padded batches and grouped-query models too.
    Budgets other than the paper's bend its shares by one exponent, so that ``(1/2, 1/4, 1/8)`` becomes ``(x, x^2, x^3)``; the
    paper's own shares are rounded down. The authors give no setting for 192, 128 or 64 tokens; ``avg_tokens`` finds one. Layers
    8, 16, 24 of 32 are taken as a quarter, a half and three quarters of other depths. In a conversation over several turns the
    ranking sees the tokens of the turn that brings the image.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image left after the last cut (paper: 0.125). ``avg_tokens`` is met within 1 %.
    layers : tuple of int or float, default (0.25, 0.5, 0.75)
        Layers before which tokens are dropped: indices, or shares of the model's layers.
    ratios : tuple of float, default (0.5, 0.25, 0.125)
        Shape of the pyramid: shares of the image's tokens left after each cut.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.DECODER,)

    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse shares that are none, and another number of them than of layers."""
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "ratios", check_ratios("pyramiddrop", self.ratios, len(self.layers)))

    def bind(self, facts: Facts) -> PyramidDrop:
        """Place the cuts.

        Raises
        ------
        BudgetError
            A budget above the tokens there are, or an average these layers cannot meet.
        UnknownArgumentError
            Layers this model does not have.
        """
        check_bounds(self.budget, facts)
        cuts = place_cuts(self.layers, facts, "pyramiddrop")
        shared = {k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per", "ratios")}
        bound = copy.copy(self)
        parts = checked((PyramidDropStage(**shared, cuts=cuts, stage_index=i) for i in range(len(cuts))), facts)
        object.__setattr__(bound, "_parts", parts)
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """The cuts; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'pyramiddrop' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
