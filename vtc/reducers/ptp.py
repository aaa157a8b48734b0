"""PTP: visual tokens pruned by the salience of their crop, their own salience, and the question's attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Kind, Layout, Need, Newlines, Positions, Reducer, Selection, Signals, Stage, Usual
from vtc.errors import UnknownArgumentError
from vtc.kernels import compacted, topk_per_group, topk_sorted, widened
from vtc.registry import register
from vtc.signals import cls_attn, peak_text_attn
from vtc.views import members, per_layout


@register("ptp", paper="arXiv:2509.15704", presets={"r50": {"keep": 0.5}})
@dataclass(frozen=True, kw_only=True)
class PTP(Reducer):
    """Share the budget among the crops by salience, and keep in each crop the patches that stand out or that the question asks for.

    After the first ``layer`` decoder layers, once per image:

    1. *Region.* Every view gets a share of the budget in proportion to its weight, rounded down, at least one token and at most
       all it has; what is left goes round the views in descending order of weight.
    2. *Token.* The salience of a patch is the class token's attention in the tower's penultimate layer, mean over heads.
    3. *Instruction.* The largest attention any text token pays to the patch in decoder layer ``layer - 1``, averaged over heads
       before the maximum, softmax over all keys the text token sees.

    Both are scaled to 0..1 over the image (lowest to highest); in each view the patches with the highest
    ``(1 - alpha) * salience + alpha * instruction`` stay, in sequence order and at their own positions. Layers before ``layer``
    run on all tokens and keep them in their caches. Towers without a class token are scored by the mean attention a patch
    receives. Plain images are one region.

    Deviates: no code is public and the paper's method section was read through others' notes, so these points are unconfirmed:
    the layer; the rounding; whether the instruction score is scaled too (``scale``; unscaled it is far smaller than the salience
    and decides next to nothing); which text counts (``rows``); and the weight of a view (``region``). Weights by mean salience, as
    reported, are all but uniform where the class token's softmax runs within each view, so the default is another: the share of
    the thumbnail's attention that falls on the crop's area. The thumbnail itself covers the whole picture and therefore gets half
    of the budget, as far as it can use that. Newline tokens, which have no score, stay where their row keeps a patch, on top of the
    budget.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image from ``layer`` on, all its views together; a share is rounded down. ``avg_tokens`` counts the
        layers before in.
    layer : int, default 2
        First decoder layer on the shorter sequence; by default the first one possible where that is later (Qwen3-VL).
    alpha : float, default 0.5
        Weight of the instruction.
    region : {"thumbnail", "mean"}
        Weight of a view: see above, or the mean salience of its patches. Without a thumbnail always the mean.
    scale : {"both", "salience"}
        Whether the instruction score is scaled to 0..1 as the salience is.
    rows : {"question", "text"}
        Text that counts as instruction: what follows the row's last visual token, or all text of the row.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "with_row"

    layer: int = Usual(2)
    alpha: float = 0.5
    region: Literal["thumbnail", "mean"] = "thumbnail"
    scale: Literal["both", "salience"] = "both"
    rows: Literal["question", "text"] = "question"

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        super().__post_init__()
        known = {"region": ("thumbnail", "mean"), "scale": ("both", "salience"), "rows": ("question", "text")}
        for option, values in known.items():
            if getattr(self, option) not in values:
                raise UnknownArgumentError(
                    f"ptp: {option}={getattr(self, option)!r} is not possible; use one of {', '.join(values)}"
                )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0.0 <= self.alpha <= 1.0:
            raise UnknownArgumentError(f"ptp: alpha={self.alpha!r} is not a weight; use a number from 0 to 1")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise UnknownArgumentError(f"ptp: layer={self.layer!r} is not a decoder layer; use an int such as 2")

    @property
    def needs(self) -> tuple[Need, ...]:
        """CLS attention of the tower, and the text's attention in the last layer that runs on all tokens."""
        return cls_attn(-2), peak_text_attn(self.layer - 1, question=self.rows == "question")

    def count(self, n: int, facts: Facts) -> int:
        """Return the number of tokens; a share is rounded down, to at least one token."""
        down = math.floor if self.keep is not None else round
        return self.budget.tokens(n, start=self.layer, layers=facts.layers, rounding=down)

    def score(self, signals: Signals) -> Tensor:
        """Return the fused scores ``(B, N)``; newline tokens have no salience."""
        patch = signals.of("kind") == Kind.PATCH
        instruction = signals.peak_text_attn
        if self.scale == "both":
            instruction = to_unit(instruction, torch.ones_like(patch))
        return (1 - self.alpha) * to_unit(signals.cls_attn, patch) + self.alpha * instruction

    def weights(self, signals: Signals, image: int) -> list[float]:
        """Return the weight of every view of one image; views without candidates weigh nothing."""
        layout, whole = signals.layout, members(signals)[image][:-1]
        salience = signals.cls_attn[image].double()
        mass = [salience[w].mean() if len(w) else salience.new_zeros(()) for w in whole]
        if self.region == "thumbnail" and layout.thumbnail and layout.views > 1:
            (covered,) = _covered(layout, salience.device)
            seen, area = salience[whole[0]], covered[signals.entries[image, whole[0]]]
            mass = [seen.sum(), *(torch.where(area == v, seen, 0.0).sum() for v in range(1, layout.views)), *mass]
        found = torch.stack(mass).tolist()  # the host shares the budget out
        found = found[: layout.views] if found[0] > 0 else found[-layout.views :]
        total = sum(found)
        return [m / total for m in found] if total > 0 else [float(len(w) > 0) for w in whole]

    def select(self, signals: Signals) -> Selection:
        """Keep the best of every view."""
        with torch.no_grad():
            batch, _ = signals.shape
            views = signals.layout.views
            if views == 1 and not signals.layout.has_newlines:
                return Selection(topk_sorted(self.score(signals), signals.budget))
            view = signals.of("view")
            group = torch.where(signals.of("kind") == Kind.PATCH, view, views)  # newlines come last
            quota = torch.zeros(batch, views + 1, dtype=torch.long)
            for image, own in enumerate(members(signals)):
                size = [len(m) for m in own[:-1]]
                patches = min(signals.budget, sum(size))
                shares = tile_budgets(patches, self.weights(signals, image), size)
                quota[image] = torch.tensor([*shares, signals.budget - patches])
            chosen = topk_per_group(self.score(signals), group, quota.to(group.device, non_blocking=True))
            return Selection(compacted(chosen, signals.budget)[0])


def to_unit(values: Tensor, which: Tensor) -> Tensor:
    """Scale the values ``(B, N)`` of the tokens in ``which`` to 0..1 per image; all others, and constant values, become 0."""
    wide = widened(values)
    low = wide.masked_fill(~which, torch.inf).min(1, keepdim=True).values
    span = wide.masked_fill(~which, -torch.inf).max(1, keepdim=True).values - low
    scaled = (wide - low) / torch.where(span > 0, span, torch.ones_like(span))
    return torch.where(which & (span > 0), scaled, torch.zeros_like(scaled))


def covered_by(layout: Layout) -> Tensor:
    """Return ``(N,)`` the crop that shows the centre of each thumbnail patch; -1 for everything else and where none does."""
    crop = layout.is_patch & (layout.view > 0)
    out = torch.full_like(layout.view, -1)
    if not bool(crop.any()):
        return out
    top, left = int(layout.y[crop].min()), int(layout.x[crop].min())
    high, wide = int(layout.y[crop].max()) + 1 - top, int(layout.x[crop].max()) + 1 - left
    owner = torch.full((high, wide), -1)
    owner[layout.y[crop] - top, layout.x[crop] - left] = layout.view[crop]
    mine = layout.is_patch & (layout.view == 0)
    rows, cols = layout.grids[0]
    at = (2 * layout.row[mine] + 1) * high // (2 * rows), (2 * layout.col[mine] + 1) * wide // (2 * cols)
    out[mine] = owner[at]
    return out


@per_layout
def _covered(layout: Layout) -> tuple[Tensor]:
    return (covered_by(layout),)


def tile_budgets(total: int, weight: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Share ``total`` tokens out among views by weight: rounded down, at least one each, the rest in turns by descending weight.

    Parameters
    ----------
    total : int
        Tokens to share out, at most the sum of the capacities.
    weight : sequence of float
        Share of each view.
    capacity : sequence of int
        Tokens each view has; views without any get none.
    """
    weight = [round(w, 6) for w in weight]  # weights that differ by rounding only are equal, the lowest view first
    order = sorted((v for v, most in enumerate(capacity) if most), key=lambda v: -weight[v])
    given = [0] * len(capacity)
    for v in order:
        given[v] = min(capacity[v], max(1, math.floor(total * weight[v] + 1e-6)))
    while sum(given) > total:  # the minimum of one each was too much: the richest give, then the lightest go without
        most = max(given)
        given[next(v for v in (order if most > 1 else reversed(order)) if given[v] == most)] -= 1
    while sum(given) < total:
        for v in order:
            if given[v] < capacity[v] and sum(given) < total:
                given[v] += 1
    return given
