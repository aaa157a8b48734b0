"""TokenCorrCompressor: document crops keep as many patches as they have different ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import apportion, compacted, count_similar, merge_scatter, pairwise_top1
from vtc.registry import register
from vtc.signals import all_keys, cls_attn
from vtc.views import NO_CLS, members


@register("tokencorr", paper="arXiv:2407.14439", presets={"paper": {"keep": 1.0}})
@dataclass(frozen=True, kw_only=True)
class TokenCorr(Reducer):
    """Keep in each crop the patches that stand out late in the tower, and of the others as many as do not repeat each other.

    Per view and before the projector, features of the tower's output:

    1. *Global.* Patches whose CLS attention in layer ``high`` lies above the third quartile by more than ``factor`` interquartile
       ranges.
    2. *Local.* In layer ``low`` a patch is redundant if the cosine of its key (all heads together) with that of at least ``beta``
       times all patches, itself not counted, exceeds ``alpha``. As many patches as are not redundant, at least one, are taken by
       their CLS attention in that layer: redundancy decides how many, not which.

    Both together stay, in raster order; with ``merge`` each other patch is averaged into the kept one of its view whose key in
    layer ``low`` is most similar. How many that is depends on the page; ``keep`` is the most. If there are more, views lose in
    proportion, and in each the local patches of least attention go first. Newline tokens stay where their row keeps a patch, on
    top of the budget. Towers without a class token are scored by the mean attention a patch receives.

    Deviates: no code is public and the description was read off the paper's figure and its reviews, so these points are
    unconfirmed: both layers, ``alpha``, ``beta`` and ``factor``; quartiles by linear interpolation and outliers on the upper
    side only; attention averaged over heads; whether dropped patches are merged into kept ones (``merge``, whose rule is ours);
    and how patches are sampled by attention (``sampling``: the highest, reproducible in itself, or drawn without replacement).
    The authors tune their model with the method; without that they report a visible loss. Their model merges neighbouring
    patches by a convolution after this step, which LLaVA-like models do not have.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image entering the projector, newline tokens not counted; 1.0: as many as the page needs.
    low : int or float, default 0.5
        Tower layer of the local step: an index, or a share of the layers (12 of 24).
    high : int, default -2
        Tower layer of the global step.
    alpha : float, default 0.9
        Cosine above which two patches are alike.
    beta : float, default 0.05
        Share of the patches that must be alike to make one redundant.
    factor : float, default 1.5
        Interquartile ranges between the third quartile and an outlier.
    sampling : {"top", "random"}
        Local patches: the highest attention, or drawn with probabilities in proportion to it.
    adaptive : bool, default True
        Let the page decide on the number of tokens; otherwise exactly ``keep`` stay, shared among the views in proportion to what
        they would keep.
    merge : bool, default False
        Whether dropped patches are averaged into kept ones.
    seed : int, default 0
        Of the random draw, which also depends on the image's pixels.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "with_row"
    wants_cls: ClassVar[bool] = True

    low: int | float = 0.5
    high: int = -2
    alpha: float = 0.9
    beta: float = 0.05
    factor: float = 1.5
    sampling: Literal["top", "random"] = "top"
    adaptive: bool = True
    merge: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        super().__post_init__()
        if self.sampling not in ("top", "random"):
            raise UnknownArgumentError(f"tokencorr: sampling={self.sampling!r} is not possible; use one of top, random")
        for option, least, most in (("alpha", -1.0, 1.0), ("beta", 0.0, 1.0), ("factor", 0.0, float("inf"))):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise UnknownArgumentError(f"tokencorr: {option}={value!r} is out of range; use a number in {least}..{most}")
        if isinstance(self.low, float) and not 0.0 <= self.low < 1.0:
            raise UnknownArgumentError(f"tokencorr: low={self.low!r} is out of range; give a layer (int) or a share in [0, 1)")

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the number of tokens follows from the page."""
        return self.adaptive

    @property
    def wants_fingerprint(self) -> bool:  # type: ignore[override]
        """The draw depends on the image's pixels."""
        return self.sampling == "random"

    def bind(self, facts: Facts) -> Reducer:
        """Place the layer of the local step."""
        bound = super().bind(facts)
        if isinstance(self.low, float):
            layer = min(round(self.low * facts.encoder_layers), facts.encoder_layers - 1)
            bound = dataclasses.replace(bound, low=layer)
        return bound

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of both layers, and the keys of the first."""
        low = self.low if isinstance(self.low, int) else 0  # a share has its layer once bound
        return (
            all_keys(low),
            dataclasses.replace(cls_attn(low), name="low_attn"),
            dataclasses.replace(cls_attn(self.high), name="high_attn"),
        )

    def outstanding(self, attention: Tensor) -> Tensor:
        """Mark the outliers of the attention ``(n,)`` of one view."""
        values = attention.double()
        low, high = values.quantile(0.25), values.quantile(0.75)
        return values > high + self.factor * (high - low)

    def different(self, keys: Tensor) -> Tensor:
        """Return how many patches of one view with ``keys (n, d)`` are not redundant, at least one, ``()``."""
        alike = count_similar(keys[None], self.alpha)[0]
        return (alike < self.beta * len(keys)).sum().clamp(min=1)

    def ranked(self, signals: Signals, image: int, view: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``tokens (n,)`` of one view, the most wanted first, and how many are wanted, ``()``."""
        attention = signals.low_attn[image, tokens].double()
        if self.sampling == "random":
            mark = signals.fingerprint[image] if signals.fingerprint else 0
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + mark * 31 + view) & 0x7FFFFFFFFFFFFFFF)
            noise = -torch.log(torch.empty(len(tokens), dtype=torch.float64).exponential_(generator=generator))
            # the highest of these: a draw without replacement
            attention = attention.log() + noise.to(attention.device, non_blocking=True)
        first = self.outstanding(signals.high_attn[image, tokens])
        order = torch.sort(attention, descending=True, stable=True).indices
        late = signals.high_attn[image, tokens].double()
        # outliers first, by their attention, then the others by theirs
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        front = torch.sort(torch.where(first, late, -torch.inf), descending=True, stable=True).indices
        place = torch.empty_like(order).scatter(0, front, torch.arange(len(order), device=order.device))
        turn = torch.where(first, place, len(order) + rank).argsort()
        return tokens[turn], (first | (rank < self.different(signals.all_keys[image, tokens]))).sum()

    def select(self, signals: Signals) -> Selection:
        """Keep what every view wants, within the budget."""
        with torch.no_grad():
            found = [
                [self.ranked(signals, image, v, m) if len(m) else (m, m.sum()) for v, m in enumerate(own[:-1])]
                for image, own in enumerate(members(signals))
            ]
            counts = torch.stack(
                [torch.stack([count for _, count in views]) for views in found]
            ).tolist()  # the host shares out
            kept = []
            for views, wanted in zip(found, counts, strict=True):
                quota = apportion(signals.budget, wanted, wanted if self.adaptive else [len(order) for order, _ in views])
                kept.append([(order[:share], order[share:]) for (order, _), share in zip(views, quota, strict=True)])
            chosen = [torch.cat([stay for stay, _ in views]) for views in kept]
            marked = torch.zeros(signals.shape, dtype=torch.bool, device=signals.entries.device)
            for row, at in zip(marked, chosen, strict=True):
                row.index_fill_(0, at, True)
            count = [len(at) for at in chosen]
            index, valid = compacted(marked, count[0] if len(set(count)) == 1 else None)
        note = "" if signals.cls is not None else NO_CLS
        if not self.merge:
            return Selection(index, valid=valid, note=note, slotted=True)
        with torch.no_grad():
            place = torch.where(marked, marked.cumsum(1) - 1, -1)
            owner = torch.stack([self.owners(signals.all_keys[b], place[b], views) for b, views in enumerate(kept)])
        return Selection(index, merge_scatter(signals.features, owner, index.shape[1]), owner, valid, note, slotted=True)

    @staticmethod
    def owners(keys: Tensor, place: Tensor, views: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return ``(N,)`` the kept token each token of an image is merged into, -1 where its view keeps none.

        Parameters
        ----------
        keys : Tensor
            ``(N, d)``.
        place : Tensor
            ``(N,)`` number of every kept token, -1 for the others.
        views : list of (Tensor, Tensor)
            Tokens of every view that stay, and that leave.
        """
        owner = place.clone()
        for stay, left in views:
            if len(left) and len(stay):
                stay = stay.sort().values  # the lowest among equals
                owner[left] = place[stay[pairwise_top1(keys[None, left], keys[None, stay])[1][0]]]
        return owner
