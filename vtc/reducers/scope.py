"""SCOPE: tokens that cover the picture, each one's gain in coverage multiplied by its saliency, before the projector."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vtc.core import Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import dot, unit_rows, widened
from vtc.registry import register
from vtc.signals import AttentionTap, cls_attn, received_attn
from vtc.views import NO_CLS, each_view

_WHOLE = 1 << 26
"""Cosines of a view that are held at once; those of a larger one are made anew, a few rows at a time."""
_BLOCK = 512
"""Rows of cosines looked at in one go."""
_AHEAD = 8
"""Tokens whose gains are brought up to date together."""


class Coverage:
    """What the tokens of one view cover, and what each further one would add.

    Parameters
    ----------
    tokens : Tensor
        ``(N, D)``.
    weight : Tensor
        ``(N,)`` saliency.
    add : bool
        Add the saliency to the gain instead of multiplying.

    Attributes
    ----------
    covered : Tensor
        ``(N,)`` largest cosine of every token with a chosen one, at least 0: negative cosines cover nothing.
    """

    def __init__(self, tokens: Tensor, weight: Tensor, *, add: bool) -> None:
        self.unit = unit_rows(tokens.clone(memory_format=torch.contiguous_format))
        self.weight, self.adds, n = weight.to(self.unit.dtype), add, len(tokens)
        self.matrix = dot(self.unit, self.unit) if n * n <= _WHOLE else None
        self.covered = self.unit.new_zeros(n)

    def rows(self, at: Tensor | slice) -> Tensor:
        """Return the cosines ``(M, N)`` of some tokens with all."""
        return dot(self.unit[at], self.unit) if self.matrix is None else self.matrix[at]

    def scores(self, at: Tensor | None = None) -> Tensor:
        """Return ``(M,)``: how much some tokens ``at (M,)`` (``None``: all) would add, times or plus their saliency."""
        n = len(self.covered) if at is None else len(at)
        parts = [slice(lo, min(lo + _BLOCK, n)) for lo in range(0, n, _BLOCK)]
        gain = torch.cat([self._gain(self.rows(part if at is None else at[part])) for part in parts])
        weight = self.weight if at is None else self.weight[at]
        return gain + weight if self.adds else gain * weight

    def _gain(self, rows: Tensor) -> Tensor:
        if rows.device.type != "cpu":
            return (rows - self.covered).clamp_(min=0).sum(1)
        # NumPy sums a row alike in any company: no gain ever grows by a rounding while tokens are added
        more = rows.numpy() - self.covered.numpy()
        return torch.from_numpy(np.maximum(more, 0, out=more).sum(1))

    def add(self, pick: Tensor) -> None:
        """Choose a token, ``(1,)``."""
        self.covered = torch.maximum(self.covered, self.rows(pick)[0])

    def picks(self, k: int) -> Tensor:
        """Choose ``k`` tokens, each the best given those before, the lowest index among equals; ``(k,)`` in order."""
        return self.lazily(k) if self.covered.device.type == "cpu" else self.plainly(k)

    def plainly(self, k: int) -> Tensor:
        """All gains in every step: nothing for the host to wait for."""
        taken, out = torch.zeros_like(self.covered, dtype=torch.bool), []
        for _ in range(k):
            pick = self.scores().masked_fill(taken, -torch.inf).argmax()[None]
            self.add(pick)
            taken = taken.index_fill(0, pick, True)
            out.append(pick)
        return torch.cat(out)

    def lazily(self, k: int) -> Tensor:
        """The same with few gains: an old one bounds what is left of it from above, so only leaders are brought up to date."""
        bound, out = self.scores(), []
        stale = torch.zeros_like(bound, dtype=torch.bool)
        for _ in range(k):
            while stale[pick := bound.argmax()]:
                lead = bound.topk(min(_AHEAD, len(bound))).indices
                lead = torch.cat([pick[None], lead[stale[lead] & (lead != pick)]])
                bound[lead], stale[lead] = self.scores(lead), False
            self.add(pick[None])
            bound[pick] = -torch.inf
            stale = bound > -torch.inf
            out.append(pick)
        return torch.stack(out)


def _cls_attention_sum(tap: AttentionTap) -> Tensor:
    """CLS row of the softmax, summed over heads."""
    return cls_attn().measure(tap) * tap.query.shape[1]


def _received_attention_sum(tap: AttentionTap) -> Tensor:
    """Mean over all queries of the attention each key receives, summed over heads."""
    return received_attn(-2).measure(tap) * tap.query.shape[1]


def cls_attn_sum(layer: int) -> Need:
    """CLS attention of a tower layer, summed over heads, ``(B, N)``; on towers without a class token the attention received."""
    other = Need("cls_attn_sum", "vision", layer, _received_attention_sum)
    return Need("cls_attn_sum", "vision", layer, _cls_attention_sum, requires="cls", substitute=other)


@register(
    "scope",
    paper="arXiv:2510.24214",
    code="https://github.com/kinredon/SCOPE @ 6bf7306",
    licence="none found",
    presets={
        "llava15-192": {"keep": 192},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llavanext-640": {"keep": 640},
        "llavanext-320": {"keep": 320},
        "llavanext-160": {"keep": 160},
    },
)
@dataclass(frozen=True, kw_only=True)
class Scope(Reducer):
    """Greedy coverage of the picture by its patches, the gain of every candidate multiplied by its CLS attention.

    Per view and before the projector: a patch is covered as well as its most similar chosen one (cosine of the tower's features, at
    least 0). Every step adds the patch with the largest product of the coverage it adds, summed over all patches, and its attention
    from the class token in the tower's penultimate layer to the power of ``alpha``. So neither near-copies of salient patches nor
    lonely background win. Survivors stay in raster order; newline tokens are dropped.

    Towers without a class token are scored by the mean attention a patch receives.

    Deviates: similarities and sums are float32, in the release they have the model's dtype; a zero vector is similar to nothing,
    where in the release it makes every score NaN; equal scores go to the lowest index. The budget counts an image and is shared by
    its views so that exactly ``keep`` tokens stay; the release gives each view ``keep // views`` (``official=True``), fails below
    one token per view, and shares one number among the images of a batch. Padding of AnyRes crops may survive in the release, here
    it never competes, and the release closes an image of one view on a model with newlines by one newline token, which is dropped
    here. A summary of the paper places the method behind layer 2 of the language model, its release, and this reducer, before the
    projector (the paper's text unconfirmed). The budgets of the presets are those of the usual protocol.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, all its views together.
    alpha : float, default 1.0
        Power of the attention, at least 0; 0 makes all patches equally salient.
    combine : {"multiply", "add"}
        Multiply the gain by the saliency, or add it: the attention summed over heads, as the release gives it.
    salience : bool, default True
        Whether attention counts at all; without it every saliency is 1.
    official : bool, default False
        Every view keeps ``keep // views`` patches, even where that leaves fewer than ``keep`` in total.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    wants_cls: ClassVar[bool] = True

    alpha: float = 1.0
    combine: Literal["multiply", "add"] = "multiply"
    salience: bool = True
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse powers and rules that make no sense."""
        super().__post_init__()
        if isinstance(self.alpha, bool) or not 0 <= self.alpha < float("inf"):
            raise UnknownArgumentError(f"scope: alpha={self.alpha!r} is not possible; use a number of at least 0")
        if self.combine not in ("multiply", "add"):
            raise UnknownArgumentError(f"scope: combine={self.combine!r} is not possible; use one of multiply, add")

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of the penultimate layer; its scale matters only where it is added."""
        if not self.salience:
            return ()
        return (cls_attn(-2) if self.combine == "multiply" else cls_attn_sum(-2),)

    def coverage(self, signals: Signals) -> list[Coverage]:
        """Return what is covered, and may be, before the first pick: one view per entry of the batch."""
        add, tokens = self.combine == "add", signals.features.detach()
        if not self.salience:
            return [Coverage(t, torch.ones_like(t[:, 0]), add=add) for t in tokens]
        attention = widened(signals.cls_attn_sum if add else signals.cls_attn).detach()
        return [Coverage(t, a**self.alpha, add=add) for t, a in zip(tokens, attention, strict=True)]

    def pick(self, signals: Signals) -> Tensor:
        """Return ``(B, K)`` patches of one view each, in the order they are chosen."""
        return torch.stack([c.picks(signals.budget) for c in self.coverage(signals)])

    def choose(self, signals: Signals) -> Selection:
        """Keep the patches of one view."""
        return Selection(self.pick(signals).sort(1).values)

    def select(self, signals: Signals) -> Selection:
        """Keep the patches of every view."""
        with torch.no_grad():
            chosen = each_view(signals, self.choose, floor=self.official)
        return chosen if signals.cls is not None or not self.salience else dataclasses.replace(chosen, note=NO_CLS)
