"""ToDRE: a spread-out subset before the language model, and an exit of all visual tokens late inside it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import (
    Facts,
    Kind,
    Need,
    Newlines,
    Positions,
    Reducer,
    Schedule,
    Selection,
    Signals,
    Stage,
    check_bounds,
)
from vtc.errors import UnknownArgumentError
from vtc.kernels import farthest_point, max_sum
from vtc.registry import register
from vtc.signals import cls_attn, modality_mass


def cls_pivot(signals: Signals) -> Tensor:
    """Return ``(B,)`` the patch the class token attends to most: within the thumbnail where there is one."""
    attention = signals.cls_attn
    patch = signals.of("kind") == Kind.PATCH
    if signals.layout.thumbnail:
        first = patch & (signals.of("view") == 0)
        patch = torch.where(first.any(1, keepdim=True), first, patch)  # an earlier stage may have dropped the thumbnail
    return attention.masked_fill(~patch, -torch.inf).argmax(1)


def random_pivot(signals: Signals, seed: int) -> Tensor:
    """Return ``(B,)`` a token drawn from the seed and the image's pixels: the same one in any batch."""
    batch, n = signals.shape
    picks = []
    for image in range(batch):
        mark = signals.fingerprint[image] if signals.fingerprint else 0
        generator = torch.Generator().manual_seed((seed * 1_000_003 + mark) & 0x7FFFFFFFFFFFFFFF)
        picks.append(torch.randint(n, (1,), generator=generator))
    return torch.cat(picks).to(signals.features.device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class ToDREDiversity(Reducer):
    """First stage of :class:`ToDRE`: greedy diversification of the projected tokens, starting at a pivot.

    Parameters
    ----------
    pivot : {"cls", "random"}
        Where to start.
    diversity : {"max_sum", "kcenter"}
        Which token comes next: smallest sum of cosines to the chosen ones, or farthest from its nearest chosen one.
    seed : int, default 0
        Seed of the random pivot.
    note : str
        What the statistics should say.
    """

    name: ClassVar[str] = "todre"
    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_newlines: ClassVar[Newlines] = "none"

    pivot: Literal["cls", "random"] = "cls"
    diversity: Literal["max_sum", "kcenter"] = "max_sum"
    seed: int = 0
    note: str = ""

    @property
    def wants_fingerprint(self) -> bool:  # type: ignore[override]
        """The random pivot depends on the image's pixels."""
        return self.pivot == "random"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Class-token attention of the tower's last layer."""
        return (cls_attn(-1, substitute=False),) if self.pivot == "cls" else ()

    def count(self, n: int, facts: Facts) -> int:
        """Return the number of tokens; a share is rounded down, to at least one token."""
        return self.budget.tokens(n, rounding=math.floor)

    def order(self, signals: Signals) -> Tensor:
        """Return the chosen tokens ``(B, K)`` in the order they are picked."""
        first = cls_pivot(signals) if self.pivot == "cls" else random_pivot(signals, self.seed)
        pick = max_sum if self.diversity == "max_sum" else farthest_point
        return pick(signals.features, signals.budget, first)

    def select(self, signals: Signals) -> Selection:
        """Keep the chosen tokens in sequence order; the others are thrown away."""
        with torch.no_grad():
            return Selection(self.order(signals).sort(dim=1).values, note=self.note)


@dataclass(frozen=True, kw_only=True)
class ToDREExit(Reducer):
    """Second stage of :class:`ToDRE`: all visual tokens leave once text and image hardly look at each other.

    Parameters
    ----------
    exit_layer : int
        Decoder layer whose attention decides; the layers after it run without visual tokens.
    tau : float
        Threshold of both shares of attention.
    """

    name: ClassVar[str] = "todre"
    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    decides_itself: ClassVar[bool] = True

    exit_layer: int
    tau: float = 0.10

    @property
    def layer(self) -> int:
        """First decoder layer that may run without visual tokens."""
        return self.exit_layer + 1

    @property
    def newline_policy(self) -> Newlines:
        """Newline tokens stay or leave with the others."""
        return "compete"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Shares of attention between text and visual tokens."""
        return (modality_mass(self.exit_layer),)

    def count(self, n: int, facts: Facts) -> int:
        """Return ``n``: there is no budget here."""
        return n

    def select(self, signals: Signals) -> Selection:
        """Keep all tokens of an image, or none."""
        everything = Selection.all(signals.shape[1], signals.shape[0], signals.features.device)
        stay = ~(signals.modality_mass < self.tau).all(1)
        return Selection(everything.index, valid=stay[:, None].expand_as(everything.index).contiguous())


@register(
    "todre",
    paper="arXiv:2505.18757",
    presets={
        "r25": {"keep": 0.25},
        "r10": {"keep": 0.10},
        "llavanext-720": {"keep": 720},
        "llavanext-288": {"keep": 288},
        "select-r25": {"keep": 0.25, "exit": False},
        "select-r10": {"keep": 0.10, "exit": False},
        "exit-only": {"keep": 1.0},
        "v1-r25": {"keep": 0.25, "diversity": "kcenter"},
        "v1-r10": {"keep": 0.10, "diversity": "kcenter"},
    },
)
@dataclass(frozen=True, kw_only=True)
class ToDRE(Schedule):
    """Keep a spread-out subset of the projected tokens, and drop them all late in the model once text no longer looks at them.

    **Before the language model.** Starting with the patch the class token attends to most (last tower layer; in the thumbnail
    of AnyRes images), tokens are added one by one: the one with the smallest sum of cosines to those already chosen
    (``diversity="max_sum"``, version 2 of the paper), or the one farthest from its nearest chosen token (``"kcenter"``, version
    1). Kept tokens stay in sequence order.

    **Inside.** In decoder layer ``exit_layer`` two shares of attention are measured over the prompt: of text rows on visual
    columns, and of visual rows on text columns. Where both are below ``tau``, all visual tokens of this sample are gone from
    the next layer on, in the KV cache too; otherwise nothing happens. Text keeps its positions.

    Deviates: no code is public, and these points of the paper are readings: attention of the pivot is averaged over heads; a
    share is rounded down; layer ``7L/8`` is rounded down, counts from 0, is at most the last but one, and takes effect in the
    layer after it (counting from 1 would be ``exit_layer`` one lower; which of the two is meant is unconfirmed); text is what
    follows the first visual token and keeps its positions; the distance of version 1 is one minus the cosine; newline tokens of
    AnyRes models are dropped. In version 2's own numbers newline tokens do not count (25 % are 720 of 2880), while a share here
    is one of all visual slots: presets ``llavanext-720`` and ``llavanext-288`` give the paper's counts. Batches decide per
    sample. Towers without a class token start at a random token (the authors' own fallback), which the statistics say. A prompt
    without any text after its first image never takes the exit: no text row could speak for it. With a causal mask visual rows
    never see later text, so that the second share is 0 unless text lies between images.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model. ``avg_tokens`` means the same: the exit comes on top.
    pivot : {"cls", "random"}
        First token chosen.
    diversity : {"max_sum", "kcenter"}
        Rule of version 2 or of version 1 of the paper.
    exit : bool, default True
        Whether visual tokens may leave inside the language model.
    exit_layer : int or float, default 0.875
        Decoder layer that decides: an index counted from 0, or a share of the layers.
    tau : float, default 0.10
        Threshold of both shares of attention.
    seed : int, default 0
        Seed of the random pivot.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.BOUNDARY, Stage.DECODER)

    pivot: Literal["cls", "random"] = "cls"
    diversity: Literal["max_sum", "kcenter"] = "max_sum"
    exit: bool = True
    exit_layer: int | float = 0.875
    tau: float = 0.10
    seed: int = 0
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse options that cannot mean anything on any model."""
        super().__post_init__()
        for option, known in (("pivot", ("cls", "random")), ("diversity", ("max_sum", "kcenter"))):
            if getattr(self, option) not in known:
                raise UnknownArgumentError(
                    f"'todre': {option}={getattr(self, option)!r} is not possible; use one of {', '.join(known)}"
                )
        if not 0.0 <= self.tau <= 1.0:
            raise UnknownArgumentError(f"'todre': tau={self.tau!r} is out of range, give a share of attention in [0, 1]")
        if isinstance(self.exit_layer, float) and not 0.0 <= self.exit_layer < 1.0:
            raise UnknownArgumentError(
                f"'todre': exit_layer={self.exit_layer!r} is out of range, give a layer (int) or a share of the layers in [0, 1)"
            )

    def bind(self, facts: Facts) -> ToDRE:
        """Resolve the pivot and the layer.

        Raises
        ------
        BudgetError
            A budget above the tokens there are.
        UnknownArgumentError
            ``exit_layer`` out of range.
        """
        check_bounds(self.budget, facts)
        shared: dict[str, Any] = {k: getattr(self, k) for k in ("keep", "avg_tokens", "per")}
        fallback = self.pivot == "cls" and not facts.has_cls
        parts: tuple[Reducer, ...] = (
            ToDREDiversity(
                **shared,
                positions=self.positions,
                newlines=self.newlines,
                pivot="random" if fallback else self.pivot,
                diversity=self.diversity,
                seed=self.seed,
                note="this tower has no class token: random pivot" if fallback else "",
            ),
        )
        bound = copy.copy(self)
        if self.exit:
            layer = self.exit_layer
            if isinstance(layer, float):
                layer = min(math.floor(layer * facts.layers), facts.layers - 2)
            if not facts.first_layer - 1 <= layer <= facts.layers - 2:
                raise UnknownArgumentError(
                    f"'todre': exit_layer={self.exit_layer} is out of range, use {facts.first_layer - 1}..{facts.layers - 2} (a "
                    "later layer must be left to run without visual tokens) or exit=False"
                )
            object.__setattr__(bound, "exit_layer", layer)
            parts += (ToDREExit(**shared, exit_layer=layer, tau=self.tau),)
        object.__setattr__(bound, "_parts", parts)
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """The two stages; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'todre' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
