"""PruMerge: keep the outliers of the class token's attention, each absorbing its nearest neighbours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import absorb_neighbours
from vtc.registry import register
from vtc.signals import wide_cls_attn, wide_keys
from vtc.views import NO_CLS, each_view, in_first_slots

NEIGHBOURS = 32
"""Tokens each kept token absorbs."""


@register(
    "prumerge",
    paper="arXiv:2403.15388",
    code="https://github.com/42Shawn/LLaVA-PruMerge @ 097c041",
    licence="Apache-2.0",
    presets={
        "llava15-adaptive": {"keep": 1.0, "adaptive": True},
        "llava15-eighth": {"keep": 73},
        "llava15-32": {"keep": 32},
    },
)
@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """Keep the patches with the highest CLS attention, add their nearest neighbours to them, and the rest as one more token.

    Attention is that of the class token in the tower's *last* layer, as one head as wide as all of them; features are those handed
    to the projector. A kept patch becomes ``x_i + sum_j a_j x_j`` over the 32 other patches (kept or not) with the most similar
    keys (cosine), with attention ``a`` as it is, not normalised. One last token is the sum of all patches not kept, weighted
    likewise. The language model gets the kept patches in order of descending attention, then the last token, view by view in an
    AnyRes image; no newline tokens. The release was made for models tuned with it; using it without training is a harsher test.

    Adaptive: the number of kept patches is that of the outliers, attention above the third quartile plus one and a half
    interquartile ranges; ``keep`` is then only an upper limit.

    Towers without a class token: the attention a patch receives takes the place of CLS attention.

    Deviates: by default exactly ``keep`` tokens stay, so that methods compare at equal budgets; the release's call is adaptive.
    The outliers are counted view by view, where the release pools them over the batch, and there is at least one. Where the budget
    is one token it is the patch of highest attention with its neighbours, without the sum of the rest.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, the last one included.
    adaptive : bool, default False
        Let the outliers of attention decide on the number of tokens, at most ``keep``.
    official : bool, default False
        As released: outliers are pooled over all images of a batch that have one geometry and may be none; every view gets
        ``keep // views`` tokens.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    allowed_positions: ClassVar[tuple[Positions, ...]] = ("compact",)
    default_newlines: ClassVar[Newlines] = "none"
    wants_cls: ClassVar[bool] = True
    kind: ClassVar[str] = "merge"

    adaptive: bool = False
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse newline tokens, which have no place in this order of tokens."""
        super().__post_init__()
        if self.newlines not in (None, "none"):
            raise UnknownArgumentError(
                f"{self.name}: newlines={self.newlines!r} is not possible, since its tokens are not in rows; use 'none'"
            )

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the number of tokens follows from the picture."""
        return self.adaptive

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention and keys of the last layer, all heads taken as one."""
        return wide_cls_attn(-1), wide_keys(-1)

    def most_attended(self, signals: Signals, share: float | None) -> Tensor:
        """Return the patches of one view kept for their attention, ``(n,)`` in descending order.

        Parameters
        ----------
        signals : Signals
            Of one view.
        share : float or None
            Share of outliers, where it is not to be taken from this view.
        """
        attention, room = signals.wide_cls_attn[0], max(1, signals.budget - 1)
        if share is not None:
            room = min(room, int(len(attention) * share))
        elif self.adaptive:
            room = min(room, max(1, round(outliers(attention) * len(attention))))
        return torch.sort(attention, descending=True, stable=True).indices[:room]

    def kept(self, signals: Signals, share: float | None) -> tuple[Tensor, Tensor]:
        """Return the patches of one view that get a token, in order, and those that are summed up in the last one."""
        chosen = self.most_attended(signals, share)
        return chosen, complement(chosen, signals.shape[1])

    def choose(self, signals: Signals, share: float | None) -> Selection:
        """Merge one view into its first positions."""
        attention = signals.wide_cls_attn
        with torch.no_grad():
            chosen, rest = self.kept(signals, share)
        if self.official:  # neighbours come from this list: a patch kept twice is its own neighbour, one left out is nobody's
            pool = torch.cat([chosen, rest])
            own = torch.arange(len(chosen), device=pool.device)
            tokens = absorb_neighbours(
                signals.features[:, pool], signals.wide_keys[:, pool], attention[:, pool], own[None], NEIGHBOURS
            )
        else:
            tokens = absorb_neighbours(signals.features, signals.wide_keys, attention, chosen[None], NEIGHBOURS)
        owner = torch.full_like(attention[0], -1, dtype=torch.long)
        if len(chosen) < signals.budget:
            owner[rest] = len(chosen)
            tokens = torch.cat(
                [tokens, attention[:, None, rest].to(tokens.dtype) @ signals.features[:, rest].to(tokens.dtype)], 1
            )
        owner[chosen] = torch.arange(len(chosen), device=owner.device)
        index = torch.arange(tokens.shape[1], device=owner.device)[None]
        return Selection(index, tokens.to(signals.features.dtype), owner[None])

    def select(self, signals: Signals) -> Selection:
        """Merge every view."""
        share = None
        if self.official and self.adaptive:
            share = outliers(signals.wide_cls_attn[signals.of("slot") >= 0])
        chosen = each_view(signals, lambda s: self.choose(s, share), floor=self.official, always=self.adaptive)
        chosen = in_first_slots(signals, chosen)
        return chosen if signals.cls is not None else dataclasses.replace(chosen, note=NO_CLS)


def outliers(attention: Tensor) -> float:
    """Share of values above the third quartile plus one and a half interquartile ranges."""
    values = attention.double().flatten()
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device)).tolist()
    return float((values > high + 1.5 * (high - low)).double().mean())


def complement(chosen: Tensor, n: int) -> Tensor:
    """Return the ascending positions below ``n`` that are not ``chosen``."""
    rest = torch.ones(n, dtype=torch.bool, device=chosen.device)
    rest[chosen] = False
    return rest.nonzero()[:, 0]
