"""TransPrune: keep the visual tokens that the language model's modules transform most and the question looks at."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Schedule, Scorer, Signals, Stage, check_bounds
from vtc.errors import UnknownArgumentError
from vtc.kernels import transition_score
from vtc.registry import register
from vtc.schedule import check_ratios, checked, place_cuts, stage_counts
from vtc.signals import StateTap, next_question_attn

EPS = 1e-8
"""Added to the sums that the two scores are divided by."""


def combine(moved: Tensor, looked: Tensor | None) -> Tensor:
    """Return ``(B, N)`` the sum of both scores, each with sum one over the image's tokens.

    Parameters
    ----------
    moved : Tensor
        ``(L, B, N)`` transitions so far.
    looked : Tensor or None
        ``(B, N)`` attention of the question.
    """
    total = moved.sum(0)
    score = total / (total.sum(1, keepdim=True) + EPS)
    return score if looked is None else score + looked / (looked.sum(1, keepdim=True) + EPS)


def _transition(tap: StateTap) -> Tensor:
    return transition_score(tap.before, tap.hidden, tap.valid)


def transitions(layer: int) -> tuple[Need, Need]:
    """Transitions of every token in the attention and in the MLP of a decoder layer, each ``(B, N)``."""
    return (
        Need(f"attention_transition_{layer}", "text", layer, _transition, of="attention_update"),
        Need(f"mlp_transition_{layer}", "text", layer, _transition, of="mlp_update"),
    )


@dataclass(frozen=True, kw_only=True)
class TransPruneStage(Scorer):
    """One cut of :class:`TransPrune`, before decoder layer ``cuts[stage_index]``.

    Parameters
    ----------
    cuts : tuple of int
        Decoder layers of all cuts.
    ratios : tuple of float
        Shares the paper leaves after each.
    watched : tuple of int
        Decoder layers whose transitions are summed.
    stage_index : int
        Which cut this is.
    iga : bool
        Whether attention of the question is added.
    """

    name: ClassVar[str] = "transprune"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "compete"

    cuts: tuple[int, ...]
    ratios: tuple[float, ...]
    watched: tuple[int, ...]
    stage_index: int
    iga: bool = True

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.cuts[self.stage_index]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Transitions of the watched layers that have run, and the question's attention in the layer about to run."""
        found = tuple(need for layer in self.watched if layer < self.layer for need in transitions(layer))
        return (*found, next_question_attn(self.layer)) if self.iga else found

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens left after this cut."""
        return stage_counts(self.budget, n, self.cuts, self.ratios, facts.layers)[self.stage_index]

    def score(self, signals: Signals) -> Tensor:
        """Return transitions and attention combined."""
        moved = [signals.taps[need.name] for need in self.needs if need.of != "preview"]
        return combine(torch.stack(moved), signals.next_question_attn if self.iga else None)


@register(
    "transprune",
    paper="arXiv:2507.20630",
    code="https://github.com/liaolea/TransPrune @ c9e8284",
    licence="not stated",
    presets={
        "high": {"keep": 0.125, "ratios": (0.875, 0.625, 0.125)},
        "low": {"keep": 0.0625, "ratios": (0.625, 0.1875, 0.0625)},
        "ttv": {"keep": 0.125, "ratios": (0.875, 0.625, 0.125), "iga": False},
    },
)
@dataclass(frozen=True, kw_only=True)
class TransPrune(Schedule):
    """Keep the tokens that the model's own modules change most (TTV), and those the question looks at (IGA).

    In each layer of ``watch``, a token's transition is taken in the attention and in the MLP: length of the module's output
    over that of its normalised input, times the softmax over the whole sequence of one minus their cosine. Before each layer of
    ``layers`` the transitions so far are summed per token and added to the attention that all text behind the image pays to it
    in the layer about to run (mean over heads and text tokens), each divided by its sum over the image's tokens. The best
    tokens stay in order; positions are renumbered.

    Deviates: the release handles one sample and one image without padding and with as many key as query heads; here every image
    is judged by its own row. The softmax of the transitions runs over one sample, where the release's runs over the batch (the
    same at batch size one). The paper describes one minus the *absolute* cosine and a weighted sum; the code, and this reducer,
    use the signed cosine and a plain sum. The paper's layers are those of a model with 32; other depths use the same shares of
    the depth, and other budgets bend the paper's shares by one exponent. Preset ``low`` matches the paper's numbers for its
    smaller setting, whose layers and shares are not published: unconfirmed. Its settings for Qwen2.5-VL are not published at all;
    that with VisionZip in front is ``["visionzip", "transprune"]``. In a conversation over several turns the attention
    covers the tokens of the turn that brings the image.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image left after the last cut (paper: 0.125). ``avg_tokens`` is met within 1 %.
    layers : tuple of int or float, default (7/32, 9/32, 12/32)
        Decoder layers before which tokens are dropped: indices, or shares of the model's layers.
    ratios : tuple of float, default (0.875, 0.625, 0.125)
        Shape of the schedule: shares of the image's tokens left after each cut.
    watch : tuple of int or None
        Decoder layers whose transitions are summed, as indices. ``None``: from the one before the first cut to the one before
        the last.
    iga : bool, default True
        Add the question's attention; ``False`` leaves the transitions alone.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.DECODER,)

    layers: tuple[int | float, ...] = (7 / 32, 9 / 32, 12 / 32)
    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    watch: tuple[int, ...] | None = None
    iga: bool = True
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse shares that are none, and another number of them than of layers."""
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "ratios", check_ratios("transprune", self.ratios, len(self.layers)))

    def bind(self, facts: Facts) -> TransPrune:
        """Place the cuts and the layers watched.

        Raises
        ------
        BudgetError
            A budget above the tokens there are, or an average these layers cannot meet.
        UnknownArgumentError
            Layers this model does not have, or none watched before the first cut.
        """
        check_bounds(self.budget, facts)
        cuts = place_cuts(self.layers, facts, "transprune")
        watched = tuple(range(cuts[0] - 1, cuts[-1])) if self.watch is None else tuple(sorted(set(self.watch)))
        if not watched or not 0 <= watched[0] < cuts[0] or watched[-1] >= cuts[-1]:
            raise UnknownArgumentError(
                f"'transprune': watch={self.watch} is not possible, give layers below {cuts[-1]}, at least one of them below "
                f"{cuts[0]}"
            )
        shared = {k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per", "ratios", "iga")}
        bound = copy.copy(self)
        parts = checked((TransPruneStage(**shared, cuts=cuts, watched=watched, stage_index=i) for i in range(len(cuts))), facts)
        object.__setattr__(bound, "_parts", parts)
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """The cuts; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'transprune' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
