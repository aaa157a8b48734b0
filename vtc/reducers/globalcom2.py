"""GlobalCom2: the thumbnail of an AnyRes image decides how many tokens each crop keeps, and helps to choose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Kind, Layout, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import apportion, compacted, topk, topk_per_group, topk_sorted, widened
from vtc.registry import register
from vtc.signals import cls_logits
from vtc.views import members

FLAT_NOTE = "no thumbnail: every view is ranked by its own scores only"


@register(
    "globalcom2",
    paper="arXiv:2501.05179",
    code="https://github.com/xuyang-liu16/GlobalCom2 @ 96b2d00",
    licence="Apache-2.0",
    presets={
        "r75": {"keep": 0.75},
        "r50": {"keep": 0.5},
        "r25": {"keep": 0.25},
        "r10": {"keep": 0.1},
        "llavanext-640": {"keep": 640},
        "llavanext-320": {"keep": 320},
        "llavanext-160": {"keep": 160},
    },
)
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Reducer):
    """Share an image's budget among its crops by the thumbnail's scores, and rank patches by local and global scores together.

    A patch's score is the attention logit of the class token in the tower's last layer, mean over heads, before the softmax. The
    thumbnail keeps its highest scores. Its grid is divided into as many regions as there are crops; a softmax over the regions'
    sums (divided by ``temperature``) makes the ratio of crop ``j`` of ``n`` proportional to ``1 + softmax_j - 1 / n``. Within a
    crop the score is the local one plus the thumbnail's, resized to the unpadded picture, each scaled to Euclidean length one
    over the crop. Images without crops keep their highest scores.

    Towers without a class token are scored as in the paper by the negative cosine with the mean of the view, taken from what the
    projector is given; the authors have released no code for these (unconfirmed).

    Deviates: thumbnail and crops share exactly ``keep`` patches in the proportions of the release, which rounds each of them down
    and gives up what a crop cannot take. Tokens stay where they were, the thumbnail's in raster order, and newline tokens are
    those of the model, on top of the budget; the release orders the thumbnail by score, takes places among the unpadded patches
    for places in the crop, and closes padding rows with a newline, too (``official=True``). A budget given as a share refers to
    all visual tokens, newlines included. The release handles one image per call and leaves images without crops as they are.

    Parameters
    ----------
    keep : int or float
        Patches per image entering the language model, all its views together.
    temperature : float, default 10.0
        Of the softmax over the sums of the thumbnail's regions.
    alpha : float, default 0.5
        Share of the global score in the sum, 0 to 1; the release has equal shares.
    official : bool, default False
        As released, with the same sets where its ratio ``R`` is ``keep`` (an int: ``keep`` per patches of all views): budgets
        rounded down, the order described above, and crop tokens rounded to float16. Needs ``newlines`` and ``positions`` unset.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "all"

    temperature: float = 10.0
    alpha: float = 0.5
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no temperature or share, and orders the release does not have."""
        super().__post_init__()
        if not self.temperature > 0:
            raise UnknownArgumentError(f"globalcom2: temperature={self.temperature!r} is not possible; use a positive number")
        if not 0 <= self.alpha <= 1:
            raise UnknownArgumentError(f"globalcom2: alpha={self.alpha!r} is not a share; use a number from 0 to 1")
        if self.official and (self.newlines is not None or self.positions not in (None, "compact")):
            raise UnknownArgumentError("globalcom2: official=True has its own newlines and positions; leave both unset")

    @property
    def newline_policy(self) -> Newlines:
        """The newline rule in force; as released the reducer lays newlines out itself."""
        return "compete" if self.official else super().newline_policy

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS logits of the last tower layer."""
        return (cls_logits(-1),)

    # ------------------------------------------------------------------------------------------------------- the method
    def shares(self, base: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what multiplies the ratio of every crop, ``(n,)`` float64 with mean one, row by row.

        Parameters
        ----------
        base : Tensor
            ``(rows, cols)`` scores of the thumbnail.
        grid : (int, int)
            Rows and columns of crops.
        """
        (rows, cols), (high, wide) = base.shape, grid
        y = (torch.arange(rows, device=base.device) // max(rows // high, 1)).clamp(max=high - 1)
        x = (torch.arange(cols, device=base.device) // max(cols // wide, 1)).clamp(max=wide - 1)
        region = (y[:, None] * wide + x).flatten()
        mass = torch.zeros(high * wide, dtype=torch.float64, device=base.device).index_add(0, region, base.double().flatten())
        part = ((mass - mass.max()) / self.temperature).exp()
        part = part / (part.sum() + 1e-8)
        return 1 + part - part.mean()

    @staticmethod
    def kept_shares(weight: Tensor, ratio: float) -> Tensor:
        """Return the share of its patches every view keeps in the release, given its ``weight`` (see :meth:`shares`)."""
        return (ratio * weight).clamp(max=1)  # the thumbnail's weight is one

    @classmethod
    def counts(cls, size: list[int], weight: Tensor, ratio: float) -> list[int]:
        """Return how many of its ``size`` patches every view keeps in the release; otherwise as :meth:`kept_shares`."""
        return [int(n * r) for n, r in zip(size, cls.kept_shares(weight, ratio).tolist(), strict=True)]

    def rank(self, local: Tensor, overall: Tensor) -> Tensor:
        """Return the scores ``(n,)`` of one crop's patches from its own scores and the thumbnail's at their places."""
        unit = torch.nn.functional.normalize
        return 2 * (1 - self.alpha) * unit(local, dim=0) + 2 * self.alpha * unit(overall, dim=0)

    def image(self, signals: Signals, image: int) -> Scored:
        """Score all tokens of one image."""
        layout, views = signals.layout, signals.layout.views
        own, score = members(signals)[image], widened(signals.cls_logits[image])
        if not layout.thumbnail or views == 1:
            weight = torch.ones(views, dtype=torch.float64, device=score.device)
            return Scored(own, score, weight, torch.zeros_like(score))
        base = thumbnail_scores(signals, image, score, own[0])
        overall = torch.zeros_like(score)
        crops = torch.cat(own[1:-1])
        y, x = signals.of("y")[image, crops], signals.of("x")[image, crops]
        (top, high), (left, wide) = unpadded(layout)
        resized = torch.nn.functional.interpolate(base[None, None], size=(high, wide), mode="bilinear", align_corners=False)
        overall[crops] = resized[0, 0, y - top, x - left]
        total = score.clone()
        for tokens in own[1:-1]:
            total[tokens] = self.rank(score[tokens], overall[tokens])
        weight = torch.cat([torch.ones(1, dtype=torch.float64, device=score.device), self.shares(base, crop_grid(layout))])
        return Scored(own, total, weight, overall)

    def quota(self, scored: Scored, budget: int) -> list[int]:
        """Return how many tokens each view keeps; competing newlines come last."""
        size = [len(m) for m in scored.members]
        weight = [w * n for w, n in zip(scored.weight.tolist(), size[:-1], strict=True)]
        return apportion(budget, [*weight, 0.0], size)

    # --------------------------------------------------------------------------------------------------- as released
    def official_picks(self, signals: Signals, scored: Scored) -> list[Tensor]:
        """Return the tokens each view of one image keeps in the release, in descending order of their scores."""
        amount, views = self.budget.amount, scored.members[:-1]
        patches = sum(rows * cols for rows, cols in signals.layout.grids)
        ratio = amount if isinstance(amount, float) else min(1.0, amount / patches)
        count = self.counts([len(m) for m in views], scored.weight, ratio)
        return [m[topk(scored.score[m][None], k)[0]] for m, k in zip(views, count, strict=True)]

    def official_order(self, signals: Signals, scored: Scored) -> tuple[Tensor, int]:
        """Return the sequence the release makes of one image, ``(K,)`` tokens with -1 for a newline; and the thumbnail's share."""
        layout, picks = signals.layout, self.official_picks(signals, scored)
        (rows, cols), (high, wide) = layout.grids[0], crop_grid(layout)
        canvas = torch.full((rows * high, cols * wide + 1), -2, device=signals.entries.device)
        canvas[:, -1] = -1
        for crop, (chosen, tokens) in enumerate(zip(picks[1:], scored.members[1:-1], strict=True)):
            place = torch.searchsorted(tokens, chosen)  # a number among the unpadded patches, read as one among all
            canvas[crop // wide * rows + place // cols, crop % wide * cols + place % cols] = chosen
        cells = canvas.flatten()
        return torch.cat([picks[0], cells[cells > -2]]), len(picks[0])

    def official_selection(self, signals: Signals, image: int) -> Selection:
        """Return the release's sequence of one image in its first slots."""
        n = signals.shape[1]
        order, thumbnail = self.official_order(signals, self.image(signals, image))
        if len(order) > n:
            raise BudgetError(
                f"globalcom2: official=True makes {len(order)} tokens of an image that has {n}, since padding rows get newlines, "
                "too: use a smaller keep"
            )
        newline = (signals.of("kind")[image] == Kind.NEWLINE).nonzero()[:, 0]
        if not len(newline):
            raise BudgetError("globalcom2: official=True needs the image's newline tokens, which an earlier reducer dropped")
        tokens = signals.features[image, torch.where(order >= 0, order, newline[0])]
        tokens = torch.cat([tokens[:thumbnail], tokens[thumbnail:].half().to(tokens.dtype)])
        place = torch.arange(len(order), device=order.device)
        owner = torch.full((n,), -1, device=order.device)
        owner[order[order >= 0]] = place[order >= 0]
        return Selection(place[None], tokens[None], owner[None])

    # -------------------------------------------------------------------------------------------------------- select
    def select(self, signals: Signals) -> Selection:
        """Keep the highest scores of every view."""
        batch, n = signals.shape
        layout, device = signals.layout, signals.features.device
        if self.official:
            if layout.views == 1 or not layout.thumbnail:
                return Selection.all(n, batch, device)
            return _stack([self.official_selection(signals, b) for b in range(batch)])
        if layout.views == 1 and not layout.has_newlines:
            return Selection(topk_sorted(signals.cls_logits.detach(), min(signals.budget, n)))
        with torch.no_grad():
            scored = [self.image(signals, b) for b in range(batch)]
            quota = torch.tensor([self.quota(s, min(signals.budget, n)) for s in scored]).to(device, non_blocking=True)
            view = signals.of("view")
            group = torch.where(view < 0, layout.views, view)
            chosen = topk_per_group(torch.stack([s.score for s in scored]), group, quota)
            index, _ = compacted(chosen, min(signals.budget, n))
        return Selection(index, note="" if layout.thumbnail or layout.views == 1 else FLAT_NOTE)


@dataclass(eq=False)
class Scored:
    """The tokens of one image, ready to be ranked.

    Attributes
    ----------
    members : list of Tensor
        Tokens of every view, ascending; last the newlines.
    score : Tensor
        ``(N,)`` what tokens of one view are ranked by.
    weight : Tensor
        ``(V,)`` float64 ratio of every view, relative to the thumbnail's.
    overall : Tensor
        ``(N,)`` the thumbnail's score at the place of a crop's patch.
    """

    members: list[Tensor]
    score: Tensor
    weight: Tensor
    overall: Tensor


def crop_grid(layout: Layout) -> tuple[int, int]:
    """Return rows and columns of crops of an AnyRes image, from the places of its patches."""
    crops = layout.views - 1
    rows, cols = layout.grids[0]
    patch = (layout.kind == Kind.PATCH) & (layout.view > 0)
    number = layout.view[patch] - 1
    y, x = (layout.y - layout.row)[patch] // rows, (layout.x - layout.col)[patch] // cols
    for wide in range(1, crops + 1):
        if crops % wide == 0 and bool((number == y * wide + x).all()) and bool((x < wide).all()):
            return crops // wide, wide
    raise ValueError("the crops of this layout are no grid")


def unpadded(layout: Layout) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ``(first row, rows)`` and ``(first column, columns)`` of the crops' patches that are not padding."""
    patch = layout.is_patch & (layout.view > 0)
    y, x = layout.y[patch], layout.x[patch]
    return (int(y.min()), int(y.max() - y.min()) + 1), (int(x.min()), int(x.max() - x.min()) + 1)


def thumbnail_scores(signals: Signals, image: int, score: Tensor, tokens: Tensor) -> Tensor:
    """Return the thumbnail's scores on its grid; cells an earlier reducer has emptied get the lowest score."""
    rows, cols = signals.layout.grids[0]
    base = score.new_zeros(rows * cols)
    if len(tokens):
        base += score[tokens].min()
        base[signals.of("row")[image, tokens] * cols + signals.of("col")[image, tokens]] = score[tokens]
    return base.view(rows, cols)


def _stack(parts: list[Selection]) -> Selection:
    """Join the selections of single images, which may keep different numbers."""
    count = [p.index.shape[1] for p in parts]
    most, device = max(count), parts[0].index.device

    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(1, most - t.shape[1], *t.shape[2:])], 1)

    valid = None
    if min(count) < most:
        valid = torch.arange(most, device=device) < torch.tensor(count, device=device)[:, None]
    return Selection(
        torch.cat([pad(p.index) for p in parts]),
        torch.cat([pad(p.features) for p in parts]),
        torch.cat([p.owner for p in parts]),
        valid,
    )
