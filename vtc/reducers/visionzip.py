"""VisionZip: a few dominant patches, and the rest merged into a few contextual tokens, before the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Layout, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import apportion, compacted, merge_scatter, pairwise_top1, take, topk, widened
from vtc.registry import register
from vtc.signals import cls_attn, keys
from vtc.views import NO_CLS, complement, entries_of_views, in_slot_order, per_layout


@register(
    "visionzip",
    paper="arXiv:2412.04467",
    code="https://github.com/dvlab-research/VisionZip @ 3151f6d",
    licence="Apache-2.0",
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
class VisionZip(Reducer):
    """Keep the class token and the patches it attends to most, merge the other patches into evenly spaced contextual tokens.

    Per view: the patches with the highest CLS attention of the tower's penultimate layer are *dominant*. Of the others, in raster
    order, every ``R // contextual``-th of the ``R`` is a target; each of the rest joins the target whose head-averaged key is most
    similar (cosine). A contextual token is its target's feature plus the mean of the features that joined it. The language model
    gets the class token, the dominant patches in raster order, then the contextual tokens. AnyRes: the thumbnail's tokens in that
    order, then the dominant patches of all crops in raster order of the stitched picture, the class token of each crop, and the
    contextual tokens crop by crop; no newline tokens.

    Towers without a class token: the score is the mean attention a patch receives, and the class token's place goes to one more
    dominant patch.

    Deviates: the paper speaks of averaging, the release adds the mean to the target, and so does this reducer. The budget counts
    an image, not a crop, is shared evenly by the views, and is met exactly. Padding patches of AnyRes crops neither compete nor
    merge; in the release they do (``official=True``). Targets never run out, since the budget is at most the number of patches; the
    release fails where it asks for more contextual tokens than there are patches left. Its function
    defaults to 191 dominant and 30 contextual tokens, which no table uses: ``keep=221, contextual=30``.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image: class tokens, dominant and contextual together.
    contextual : int or None, default None
        How many of them are contextual, per image; ``None``: ten in 64, as in the paper's tables.
    official : bool, default False
        As released: padding patches compete and merge, every view gets ``keep // views`` tokens, and without a class token both
        parts of the budget are rounded down.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    allowed_positions: ClassVar[tuple[Positions, ...]] = ("compact",)
    default_newlines: ClassVar[Newlines] = "none"
    wants_cls: ClassVar[bool] = True
    kind: ClassVar[str] = "merge"

    contextual: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse a split that leaves nothing dominant, and newline tokens, which have no place in this order of tokens."""
        super().__post_init__()
        if self.newlines not in (None, "none"):
            raise UnknownArgumentError(
                f"visionzip: newlines={self.newlines!r} is not possible, since its tokens are not in rows; use 'none'"
            )
        count = self.contextual
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise UnknownArgumentError(f"visionzip: contextual={count!r} is not a number of tokens; use an int of at least 0")
        if count is not None and isinstance(self.keep, int) and not isinstance(self.keep, bool) and 0 < self.keep <= count:
            raise BudgetError(f"visionzip: contextual={count} leaves nothing of keep={self.keep}: use at most {self.keep - 1}")

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention and keys of the penultimate tower layer."""
        return cls_attn(-2), keys(-2)

    def split(self, budget: int, capacity: list[int], cls: bool) -> list[tuple[int, int]]:
        """Return ``(dominant, contextual)`` of every view; the class token counts as dominant.

        Parameters
        ----------
        budget : int
            Tokens of the image.
        capacity : list of int
            Most tokens each view can give.
        cls : bool
            Whether the views have a class token.
        """
        views = len(capacity)
        if self.official and budget >= views:
            share = [min(budget // views, most) for most in capacity]
        else:
            share = apportion(budget, [1.0] * views, capacity)
        if self.contextual is not None:
            context = apportion(self.contextual, share, [max(0, k - 1) for k in share])
        elif self.official and not cls:
            return [(max(1, int(k * 5.4 / 6.4)), int(k / 6.4)) for k in share]
        else:
            context = [min(round(k * 10 / 64), max(0, k - 1)) for k in share]
        return [(k - c, c) for k, c in zip(share, context, strict=True)]

    def views(self, signals: Signals) -> list[ZippedView]:
        """Zip every view that gets a share of the budget."""
        layout, cls = signals.layout, signals.cls
        room = int((layout.slot >= 0).sum())
        members = (with_padding if self.official else entries_of_views)(layout, signals.features.device)[: layout.views]
        head = int(cls is not None)
        capacity = [len(m) + head if len(m) else 0 for m in members]
        parts, merged = [], 0
        split = self.split(min(signals.budget, room), capacity, cls is not None)
        for v, (dominant, contextual) in enumerate(split):
            if dominant == 0:  # fewer tokens than views
                continue
            at = members[v]
            part = zip_view(signals.features[:, at], signals.cls_attn[:, at], signals.keys[:, at], dominant - head, contextual)
            part.view, part.entries, part.first = v, at, merged
            part.head = signals.features[:, :0] if cls is None else cls[:, v : v + 1]
            merged += contextual
            parts.append(part)
        return parts

    def select(self, signals: Signals) -> Selection:
        """Choose, merge, and lay the tokens out in the order of the release."""
        layout, device = signals.layout, signals.features.device
        batch, n = signals.shape
        parts = self.views(signals)
        tokens, labels = in_order(parts, layout)
        count = tokens.shape[1]
        first = in_slot_order(layout, device)[0][:count]  # the tokens fill the first slots
        turn = first.argsort()
        place = torch.empty_like(turn).scatter(0, turn, torch.arange(count, device=device))
        # where each patch went, by the labels of the tokens: a patch's entry, or n + its number for a contextual token
        total = n + sum(p.contextual.shape[1] for p in parts)
        where = torch.full((batch, total + 1), -1, device=device)  # the last column is for what has no label
        where.scatter_(1, torch.where(labels >= 0, labels, total), place.expand(batch, -1))
        where[:, -1] = -1
        home = torch.full((batch, n), total, device=device)
        for part in parts:
            home[:, part.entries] = torch.where(part.owner >= 0, n + part.first + part.owner, part.entries)
        return Selection(
            first[turn].expand(batch, -1).contiguous(),
            tokens[:, turn],
            where.gather(1, home),
            note="" if signals.cls is not None else NO_CLS,
            slotted=True,
        )


@per_layout
def with_padding(layout: Layout) -> list[Tensor]:
    """Return the ascending entries of every view, padding included, ``(n,)`` each."""
    return [(layout.view == v).nonzero()[:, 0] for v in range(layout.views)]


@dataclass(eq=False)
class ZippedView:
    """What is left of one view.

    Attributes
    ----------
    ranked, kept : Tensor
        ``(B, n)`` dominant patches (positions within the view's candidates) by descending score, and ascending.
    dominant, contextual : Tensor
        ``(B, n, D)`` and ``(B, c, D)`` features.
    owner : Tensor
        ``(B, P)`` contextual token each candidate went into, -1 for dominant ones.
    view : int
        Which view it is.
    entries : Tensor or None
        ``(P,)`` layout entry of every candidate; ``None``: 0..P-1.
    first : int
        Number of contextual tokens in the views before.
    head : Tensor or None
        ``(B, 0 or 1, D)`` the class token.
    """

    ranked: Tensor
    kept: Tensor
    dominant: Tensor
    contextual: Tensor
    owner: Tensor
    view: int = 0
    entries: Tensor | None = None
    first: int = 0
    head: Tensor | None = None


def zip_view(features: Tensor, score: Tensor, metric: Tensor, dominant: int, contextual: int) -> ZippedView:
    """Choose the dominant patches of one view and merge the others.

    Parameters
    ----------
    features : Tensor
        ``(B, P, D)`` tower features.
    score : Tensor
        ``(B, P)`` CLS attention.
    metric : Tensor
        ``(B, P, d)`` head-averaged keys.
    dominant, contextual : int
        Patches to keep (class token not counted) and tokens to make of the others.
    """
    patches, width = features.shape[1], features.shape[2]

    def take(t: Tensor, index: Tensor) -> Tensor:
        return t[torch.arange(len(t), device=t.device)[:, None], index]  # copies whole rows, which gather does not

    with torch.no_grad():
        ranked = topk(score, dominant)
        kept = ranked.sort(1).values
        rest, _ = compacted(torch.ones_like(score, dtype=torch.bool).scatter(1, ranked, False), patches - dominant)
    owner = torch.full_like(score, -1, dtype=torch.long)
    if contextual == 0:
        return ZippedView(ranked, kept, take(features, kept), features.new_zeros(len(features), 0, width), owner)
    left = patches - dominant
    step = max(1, left // contextual)
    target = torch.arange(contextual, device=features.device) * step
    with torch.no_grad():
        other = complement(target, left)
        targets, others = rest[:, target], rest[:, other]
        _, joined = pairwise_top1(take(metric, others), take(metric, targets))
        owner.scatter_(1, others, joined)
    wide = widened(features)
    made = take(wide, targets) + merge_scatter(wide, owner, contextual)
    owner.scatter_(1, targets, torch.arange(contextual, device=features.device).expand(len(features), -1))
    return ZippedView(ranked, kept, take(features, kept), made.to(features.dtype), owner)


def in_order(parts: list[ZippedView], layout: Layout) -> tuple[Tensor, Tensor]:
    """Return an image's tokens ``(B, K, D)`` in the order the language model gets them, and their labels ``(B, K)``.

    The label of a dominant patch is its layout entry, of a contextual token the number of entries plus its own number, of a class
    token -1.
    """
    n = len(layout)

    def heads(views: list[ZippedView]) -> list[tuple[Tensor, Tensor]]:
        return [(p.head, torch.full(p.head.shape[:2], -1, device=p.kept.device)) for p in views]

    def patches(views: list[ZippedView]) -> list[tuple[Tensor, Tensor]]:
        return [(p.dominant, p.kept if p.entries is None else p.entries[p.kept]) for p in views]

    def merged(views: list[ZippedView]) -> list[tuple[Tensor, Tensor]]:
        numbers = [torch.arange(p.contextual.shape[1], device=p.kept.device) + n + p.first for p in views]
        return [(p.contextual, m.expand(len(p.kept), -1)) for p, m in zip(views, numbers, strict=True)]

    whole = [p for p in parts if not (layout.thumbnail and p.view > 0)]
    crops = [p for p in parts if layout.thumbnail and p.view > 0]
    pieces = [piece for p in whole for piece in (*heads([p]), *patches([p]), *merged([p]))]
    if crops:
        tokens, entries = (torch.cat(t, 1) for t in zip(*patches(crops), strict=True))
        there = layout.on(entries.device)
        raster = (there.y[entries] * (int(layout.x.max()) + 1) + there.x[entries]).argsort(1)
        pieces.append((take(tokens, raster), entries.gather(1, raster)))
        pieces += heads(crops) + merged(crops)
    return torch.cat([t for t, _ in pieces], 1), torch.cat([label for _, label in pieces], 1)
