"""SparseVLM: words of the question that match the picture rate the visual tokens; some of the dropped ones are merged."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Schedule, Selection, Signals, Stage, check_bounds
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.kernels import attention_rows, compacted, dot, merge_scatter, smallest, take, topk, topk_sorted, widened
from vtc.registry import register
from vtc.schedule import check_ratios, checked, place_cuts, stage_counts
from vtc.signals import AttentionTap, StateTap

LISTS: dict[str, dict[int, tuple[int, ...]]] = {
    "1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens kept by score after each cut in the release, by the budget they are named after."""
RATIOS = {"1": (309 / 576, 204 / 576, 113 / 576), "2": (300 / 576, 200 / 576, 118 / 576)}
"""Shares of all tokens (merged ones included) the release's lists for 192 leave of 576."""
NOISE = 1e-6
"""Height of the noise the release adds to the densities of a clustering."""
MATRIX = 16384
"""Most tokens whose distances are all kept (1 GiB); with more of them they are made anew in each of three passes."""


# --------------------------------------------------------------------------------------------------------------- scores
def raters(tap: StateTap) -> Tensor:
    """Measure: ``(B, Q)`` bool, the question tokens whose share of the picture's attention is above average.

    Attention of visual tokens over question tokens is the softmax of plain dot products of embeddings, averaged over the visual
    tokens. Where no token is above the mean, all of the question counts.
    """
    out = torch.zeros_like(tap.valid)
    for row in range(len(out)):
        asked, seen = tap.question[row], tap.visual[row]
        text, image = widened(tap.hidden[row, asked]), widened(tap.hidden[row, seen])
        total = sum((torch.softmax(part @ text.T, -1).sum(0) for part in image.split(4096)), text.new_zeros(len(text)))
        weight = total / max(1, len(image))
        chosen = weight > weight.mean()
        out[row, asked] = chosen if bool(chosen.any()) else torch.ones_like(chosen)
    return out


def rope_prior(rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``(B, Q, d)`` vectors whose dot products are the prior of two places: rotated vectors of ones, scaled.

    ``prior(m, n) = 2 / sqrt(d) * sum_i cos((m - n) theta_i)``.
    """
    cos, sin = (widened(t) for t in rope)
    sign = torch.ones(cos.shape[-1], dtype=cos.dtype, device=cos.device)
    sign[: cos.shape[-1] // 2] = -1
    return (cos + sign * sin) * cos.shape[-1] ** -0.25


def rate(attention: Tensor, weight: Tensor, heads: int | None = None, visual: Tensor | None = None) -> Tensor:
    """Return the mean of attention rows over raters and heads, ``(B, K)``.

    Parameters
    ----------
    attention : Tensor
        ``(B, H, R, K)``.
    weight : Tensor
        ``(B, R)`` 1 for a rater, 0 for padding.
    heads : int or None
        Average only over the heads with the largest sum over raters and visual keys.
    visual : Tensor or None
        ``(B, K)`` bool: the visual keys.
    """
    padding = weight[:, None, :, None] == 0  # filled, not multiplied by zero: the row of a padded query may be NaN
    rows = attention.masked_fill(padding, 0).sum(2)  # (B, H, K)
    count = weight.sum(1)[:, None]
    if heads is None or heads >= rows.shape[1]:
        return rows.mean(1) / count
    strength = (rows if visual is None else rows * visual[:, None]).sum(-1)
    best = topk_sorted(strength, heads)
    return take(rows, best).mean(1) / count


@dataclass(frozen=True)
class RaterAttention:
    """Measure: attention of the raters, ``(B, K)``; ``heads`` set: divided by the RoPE prior, and over the strongest heads."""

    heads: int | None = None

    def __call__(self, tap: AttentionTap) -> Tensor:
        """Gather the raters' rows only."""
        chosen = tap.given["raters"]
        # no words behind the picture: its last token stood in, and an earlier cut may have dropped it
        at = torch.arange(chosen.shape[1], device=chosen.device)
        chosen = torch.where(chosen.any(1, keepdim=True), chosen, at == tap.last[:, None])
        count = chosen.sum(1)
        index, _ = compacted(chosen, None if tap.text is None else tap.text[1])  # no more than the question's tokens
        rows, mask = tap.rows(index)
        weight = (torch.arange(index.shape[1], device=count.device) < count[:, None]).to(widened(rows).dtype)
        attention = attention_rows(rows, tap.key, scaling=tap.scaling, mask=mask, reduce="none")
        if self.heads is None:
            return rate(attention, weight)
        q = tap.query.shape[2]
        vectors = rope_prior(tap.rope).expand(len(chosen), -1, -1)
        prior = take(vectors, index) @ vectors.transpose(1, 2)
        score = rate(attention[..., -q:] / _away_from_zero(prior)[:, None], weight, self.heads, tap.visual)
        return torch.nn.functional.pad(score, (tap.key.shape[2] - q, 0))  # keys of earlier forwards are nobody's candidates


def _away_from_zero(prior: Tensor) -> Tensor:
    """Replace exact zeros, by which nothing can be divided."""
    return torch.where(prior == 0, torch.finfo(prior.dtype).tiny ** 0.5, prior)


# --------------------------------------------------------------------------------------------------------------- merging
def clusters_of(dropped: int) -> tuple[int, int]:
    """Return how many of ``dropped`` tokens are recycled, and into how many merged tokens."""
    recycled = int(dropped * 0.3) + 1
    return recycled, int(recycled / 10) + 1


def split(total: int, n: int) -> tuple[int, int]:
    """Return how many of ``n`` tokens to keep and how many merged ones to add, so that ``total < n`` are left."""
    for kept in range(total, -1, -1):
        merged = clusters_of(n - kept)[1]
        if kept + merged <= total:
            return kept, merged
    return 0, total


def density_peaks(tokens: Tensor, clusters: int, noise: Tensor | None = None, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks: centres are dense and far from anything denser.

    Parameters
    ----------
    tokens : Tensor
        ``(n, D)``.
    clusters : int
        Number of clusters, at most ``n``.
    noise : Tensor or None
        ``(n,)`` added to the densities, scaled by ``NOISE``.
    block : int
        Rows of distances at a time.

    Returns
    -------
    centres, owner : Tensor
        ``(clusters,)`` tokens in descending order of density times distance, and ``(n,)`` the cluster of every token.
    """
    x = widened(tokens)
    n, scale = len(x), x.shape[1] ** 0.5

    square = torch.cat([dot(part, part).diagonal() for part in x.split(64)])  # made like the products: copies are 0 apart

    def measured(lo: int) -> Tensor:
        if n <= 25:  # few: no products, as torch.cdist decides
            return torch.cdist(x[lo : lo + block], x) / scale
        apart = torch.sub(square[lo : lo + block, None] + square, dot(x[lo : lo + block], x), alpha=2)
        return apart.clamp_(min=0).sqrt_().div_(scale)

    distances = measured
    if n <= MATRIX:
        whole = x.new_empty(n, n)
        for lo in range(0, n, block):
            whole[lo : lo + block] = measured(lo)

        def distances(lo: int) -> Tensor:
            return whole[lo : lo + block]

    near = [smallest(distances(lo), min(clusters, n)) for lo in range(0, n, block)]
    density = torch.exp(-(torch.cat(near) ** 2).mean(1))
    if noise is not None:
        density = density + noise.to(density.dtype) * NOISE
    gap, widest = [], density.new_zeros(())
    for lo in range(0, n, block):
        d = distances(lo)
        widest = torch.maximum(widest, d.max())
        gap.append(d.masked_fill(density[None] <= density[lo : lo + block, None], torch.inf).amin(1))
    gaps = torch.cat(gap)
    gaps = torch.where(torch.isinf(gaps), widest, gaps)
    centres = topk((density * gaps)[None], min(clusters, n))[0]
    owner = torch.cat([distances(lo)[:, centres].argmin(1) for lo in range(0, n, block)])  # ties: the earlier centre
    owner[centres] = torch.arange(clusters, device=owner.device)
    return centres, owner


def merge(tokens: Tensor, owner: Tensor, clusters: int) -> Tensor:
    """Return the mean of each cluster, ``(clusters, D)``, with the release's guard in the divisor."""
    x = widened(tokens)
    total, count = (merge_scatter(t[None], owner[None], clusters, mean=False)[0] for t in (x, torch.ones_like(x[:, :1])))
    return (total / (count + 1e-6)).to(tokens.dtype)


# ---------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True, kw_only=True)
class SparseVLMStage(Reducer):
    """One cut of :class:`SparseVLM`, before decoder layer ``cuts[stage_index]``; options as there.

    Parameters
    ----------
    cuts : tuple of int
        Decoder layers of all cuts.
    ratios : tuple of float
        Shares left after each.
    stage_index : int
        Which cut this is.
    version, heads, official, seed
        As in :class:`SparseVLM`.
    """

    name: ClassVar[str] = "sparsevlm"
    stage: ClassVar[Stage] = Stage.DECODER
    default_newlines: ClassVar[Newlines] = "compete"

    cuts: tuple[int, ...]
    ratios: tuple[float, ...]
    stage_index: int
    version: str = "1.5"
    heads: int = 14
    official: bool = False
    seed: int = 0

    @property
    def merges(self) -> bool:
        """Whether dropped tokens are recycled."""
        return self.version != "2"

    @property
    def kind(self) -> str:  # type: ignore[override]
        """What happens to dropped tokens."""
        return "merge" if self.merges else "select"

    @property
    def wants_fingerprint(self) -> bool:  # type: ignore[override]
        """The release's noise depends on the image."""
        return self.official and self.merges

    @property
    def position_policy(self) -> Positions:
        """Merging versions renumber; version 2 keeps the gaps."""
        return self.positions or ("compact" if self.merges else "original")

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.cuts[self.stage_index]

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention of the raters in the layer before; the raters come from the language model's input."""
        chosen = Need("raters", "text", 0, raters, of="hidden")
        measure = RaterAttention(None if self.merges else self.heads)
        return (Need("rater_attention", "text", self.layer - 1, measure, uses=(chosen,)),)

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens left after this cut, merged ones included."""
        if not self.official:
            return stage_counts(self.budget, n, self.cuts, self.ratios, facts.layers)[self.stage_index]
        for most in LISTS["1" if self.merges else "2"][self.keep][: self.stage_index + 1]:
            kept = min(most, n - 1)
            n = max(1, kept + (clusters_of(n - kept)[1] if self.merges else 0))
        return n

    def noise(self, signals: Signals, image: int, n: int) -> Tensor | None:
        """Return the noise on the densities of one image's recycled tokens: none, unless the release is followed."""
        if not self.official:
            return None
        mark = signals.fingerprint[image] if signals.fingerprint else 0
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + mark + self.stage_index) & 0x7FFFFFFFFFFFFFFF)
        return torch.rand(n, generator=generator).to(signals.features.device, non_blocking=True)

    def select(self, signals: Signals) -> Selection:
        """Keep the best; merge a part of the others into tokens that follow them."""
        score, total = widened(signals.rater_attention), signals.budget
        n = signals.shape[1]
        if not self.merges or total >= n:
            with torch.no_grad():
                return Selection(topk_sorted(score, total))
        kept, clusters = split(total, n)
        if self.official:  # several splits may give the same total
            kept = min(LISTS["1"][self.keep][self.stage_index], n - 1)  # type: ignore[index]
            clusters = clusters_of(n - kept)[1]
            total = kept + clusters
        recycled = max(clusters, clusters_of(n - kept)[0])
        index, values, owners = [], [], []
        for image in range(len(score)):
            tokens = signals.features[image]
            with torch.no_grad():
                order = topk(score[image : image + 1], min(kept + recycled, n))[0]
                stay, again = order[:kept].sort().values, order[kept:]
                centres, group = density_peaks(tokens[again], clusters, self.noise(signals, image, len(again)))
                slots = torch.cat([stay, again[centres]])
                if self.position_policy == "compact":  # merged tokens come last, as in the release
                    place = torch.arange(total, device=slots.device)
                else:  # each in the slot of its centre
                    place = slots.argsort().argsort()
                owner = torch.full((n,), -1, device=slots.device)
                owner[stay], owner[again] = place[:kept], place[kept + group]
            content = torch.cat([tokens[stay], merge(tokens[again], group, clusters)])
            index.append(slots.sort().values)
            values.append(content if self.position_policy == "compact" else content[place.argsort()])
            owners.append(owner)
        return Selection(torch.stack(index), torch.stack(values), torch.stack(owners))


@register(
    "sparsevlm",
    paper="arXiv:2410.04417",
    code="https://github.com/Gumpest/SparseVLMs @ 26a5f48",
    licence="Apache-2.0",
    presets={
        **{f"llava15-{k}": {"keep": k, "layers": (3, 7, 16), "official": True} for k in LISTS["1"]},
        **{f"plus-{k}": {"keep": k, "layers": (3, 7, 16), "version": "2", "official": True} for k in LISTS["2"]},
    },
)
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Schedule):
    """Let the words that match the picture rate the visual tokens in a few layers; drop the rest, recycling a part of it.

    **Raters.** Once, on the language model's input: visual tokens attend to the text behind the last of them (softmax of plain
    dot products); words with more than the mean share rate.

    **Cuts.** Before each layer of ``layers``, a visual token's score is the raters' attention to it in the layer before, mean
    over raters and heads. The best stay in order. Versions 1 and 1.5: of the dropped tokens the best 30 % (plus one) are
    clustered by density peaks into a tenth as many groups (plus one); the means of these follow the kept tokens, and positions
    are renumbered. Version 2 ("SparseVLM+"): nothing is merged, positions stay, attention is divided by what RoPE alone would
    give two vectors of ones, and only the ``heads`` heads that look most at the picture count.

    Deviates: the release knows four budgets (lists of tokens to keep, named after the layer average they give when the layer
    that decides is counted as reduced, although it runs on all tokens); here any budget works: the shape of its list for 192 is
    bent by one exponent, counts include the merged tokens, and averages are those really run. ``official=True`` takes the
    release's lists for ``keep`` = 192, 128, 96 or 64, whatever the image's size, and adds its noise of 1e-6 to the densities,
    seeded here. The very first commit's adaptive number (rank of the attention, tuned per benchmark), which the paper
    describes, is not offered, nor is the video branch, whose one cut uses that number, too; versions 1 and 1.5 differ in how
    attention is obtained, not in what is kept. A question without any word above the mean uses all words; the release has no
    rater then. Without any word behind the picture the prompt's last token that is left rates. Batches, padding and
    grouped-query models, which the release refuses, work; with several images in a row the raters, and in version 2 the heads,
    are those of the whole row.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image left after the last cut; with ``official`` the name of a list. ``avg_tokens`` is met within 1 %.
    version : {"1", "1.5", "2"}
        Which release.
    layers : tuple of int or float, default (3/32, 7/32, 16/32)
        First decoder layers that run on fewer tokens: indices, or shares of the model's layers (the release names the layers
        before, 2, 6, 15, whose attention decides).
    ratios : tuple of float or None
        Shape of the schedule: shares left after each cut. ``None``: those of the release's list for 192 tokens.
    heads : int, default 14
        Version 2: number of heads (models with fewer use all).
    official : bool, default False
        The release's lists and noise.
    seed : int, default 0
        Of the noise.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.DECODER,)

    version: Literal["1", "1.5", "2"] = "1.5"
    layers: tuple[int | float, ...] = (3 / 32, 7 / 32, 16 / 32)
    ratios: tuple[float, ...] | None = None
    heads: int = 14
    official: bool = False
    seed: int = 0
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse unknown versions, shares that are none, and budgets without a list."""
        super().__post_init__()
        if self.version not in ("1", "1.5", "2"):
            raise UnknownArgumentError(f"'sparsevlm': version={self.version!r} is not possible; use one of 1, 1.5, 2")
        if not isinstance(self.heads, int) or self.heads < 1:
            raise UnknownArgumentError(f"'sparsevlm': heads={self.heads!r} is out of range, give an int of at least 1")
        family = "2" if self.version == "2" else "1"
        object.__setattr__(self, "layers", tuple(self.layers))
        ratios = RATIOS[family][: len(self.layers)] if self.ratios is None else self.ratios
        object.__setattr__(self, "ratios", check_ratios("sparsevlm", ratios, len(self.layers)))
        if self.official and (isinstance(self.keep, float) or self.keep not in LISTS[family] or len(self.layers) > 3):
            raise BudgetError(
                f"'sparsevlm': official=True has lists for keep={', '.join(map(str, LISTS[family]))} and three layers only, not "
                f"for keep={self.keep}: choose one of them or drop official"
            )

    def bind(self, facts: Facts) -> SparseVLM:
        """Place the cuts.

        Raises
        ------
        BudgetError
            A budget above the tokens there are, or an average these layers cannot meet.
        UnknownArgumentError
            Layers this model does not have.
        """
        if not self.official:
            check_bounds(self.budget, facts)
        cuts = place_cuts(self.layers, facts, "sparsevlm")
        names = ("keep", "avg_tokens", "positions", "newlines", "per", "ratios", "version", "heads", "official", "seed")
        shared: dict[str, Any] = {k: getattr(self, k) for k in names}
        bound = copy.copy(self)
        parts = checked((SparseVLMStage(**shared, cuts=cuts, stage_index=i) for i in range(len(cuts))), facts)
        object.__setattr__(bound, "_parts", parts)
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """The cuts; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'sparsevlm' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts
