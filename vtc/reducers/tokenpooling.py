"""Token pooling: replace the patches by cluster centres, k-means or weighted k-medoids."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import k_means, k_medoids, merge_scatter, seat_clusters, topk, widened
from vtc.registry import register
from vtc.signals import received_attn
from vtc.views import each_view


@register(
    "tokenpooling",
    paper="arXiv:2110.03860",
    code="https://github.com/JoakimHaurum/TokenReduction @ 88fe07e (third-party)",
    licence="MIT",
)
@dataclass(frozen=True, kw_only=True)
class TokenPooling(Reducer):
    """Cluster the tower's patches and hand on one token per cluster, so that as little as possible is lost.

    A patch's significance is the attention it receives in the tower's penultimate layer, mean over heads and queries. Per view,
    the most significant patches are the first centres; a few rounds of Euclidean clustering follow. ``kmedoids``: a cluster's
    token is its most central patch, the one with the smallest sum of distances to the others, weighted by their significance;
    real tokens in their places. ``kmeans``: its token is the mean of the patches, weighted likewise, in the place of the patch
    nearest to it. Newline tokens are dropped. No class token is needed.

    The paper has no public code and was made for classifiers trained with it, with a schedule over all layers; here one step
    stands between tower and projector, and there is no setting to make a preset of. Unconfirmed: plain rather than squared
    distances in the medoid's sum, the first centres, and the number of rounds.

    Deviates: a mean that lost all its patches (repeated ones) becomes the lowest-numbered patch that is no other cluster's
    place, so that exactly ``keep`` tokens stay. ``compat="tokenreduction"`` follows the third-party code instead: a medoid is
    the member with the smallest product of its *own* significance and its distances to *all* patches, an empty cluster jumps to
    the first patch, and unweighted clustering starts at a random patch and goes on with the one whose *largest* distance to a
    centre is largest; a patch that is a medoid twice counts once.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the projector, shared evenly by its views.
    method : {"kmedoids", "kmeans"}, default "kmedoids"
        What stands for a cluster.
    weighted : bool, default True
        Weight by significance (the first centres are the most significant patches in any case).
    iterations : int, default 5
        Most rounds.
    compat : {"", "tokenreduction"}, default ""
        Medoids only: the rules of the third-party code.
    seed : int, default 0
        Seed of the random patch; only with ``compat`` and without weights.
    block : int or None
        Vision transformers without language model only: first block that runs on the pooled tokens, weighted by attention in
        the block before. ``None``: the middle one.
    """

    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    kind: ClassVar[str] = "merge"

    method: Literal["kmedoids", "kmeans"] = "kmedoids"
    weighted: bool = True
    iterations: int = 5
    compat: Literal["", "tokenreduction"] = ""
    seed: int = 0
    block: int | None = None

    def __post_init__(self) -> None:
        """Refuse options that do not exist or do not go together."""
        super().__post_init__()
        for name, known in (("method", ("kmedoids", "kmeans")), ("compat", ("", "tokenreduction"))):
            if getattr(self, name) not in known:
                raise UnknownArgumentError(
                    f"tokenpooling: {name}={getattr(self, name)!r} is not possible; use one of {', '.join(map(repr, known))}"
                )
        if self.compat and self.method != "kmedoids":
            raise UnknownArgumentError("tokenpooling: compat='tokenreduction' goes with method='kmedoids' only")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise UnknownArgumentError(f"tokenpooling: iterations={self.iterations!r} makes no sense; use an int of at least 1")

    @property
    def wants_fingerprint(self) -> bool:  # type: ignore[override]
        """The random start depends on the image's pixels."""
        return bool(self.compat) and not self.weighted

    def bind(self, facts: Facts) -> Reducer:
        """Place the pooling in a model without language model."""
        super().bind(facts)
        if facts.layers:
            if self.block is not None:
                raise UnknownArgumentError(
                    f"tokenpooling: block={self.block} is for vision transformers without language model; here the tokens are "
                    "pooled behind the tower: drop it"
                )
            return self
        block = facts.encoder_layers // 2 if self.block is None else self.block
        if not 1 <= block < facts.encoder_layers:
            raise UnknownArgumentError(f"tokenpooling: block={block} is out of range, use 1..{facts.encoder_layers - 1}")
        return dataclasses.replace(self, block=block)

    @property
    def tower_layer(self) -> int | None:
        """Block that runs on the pooled tokens, in a model without language model."""
        return self.block

    @property
    def needs(self) -> tuple[Need, ...]:
        """The attention patches receive in the penultimate layer, or in the block before the pooling."""
        layer = -2 if self.block is None else self.block - 1
        return () if self.wants_fingerprint else (received_attn(layer),)

    def medoids(self, features: Tensor, weight: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the medoids ``(B, K)`` in the order of ``start (B, K)`` and every token's cluster ``(B, N)``.

        Parameters
        ----------
        features : Tensor
            ``(B, N, D)``.
        weight : Tensor or None
            ``(B, N)`` significance.
        start : Tensor
            ``(B, K)`` first centres.
        """
        if not self.compat:
            return k_medoids(features, start, self.iterations, weight=weight)
        weights = [None] * len(features) if weight is None else list(weight)
        found = [_third_party(f, w, s, self.iterations) for f, w, s in zip(features, weights, start, strict=True)]
        return torch.stack([m for m, _ in found]), torch.stack([o for _, o in found])

    def choose(self, signals: Signals) -> Selection:
        """Cluster one view."""
        features, k = signals.features, signals.budget
        with torch.no_grad():
            if self.wants_fingerprint:
                mark = signals.fingerprint[0] if signals.fingerprint else 0
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + mark) & 0x7FFFFFFFFFFFFFFF)
                first = torch.randint(features.shape[1], (1,), generator=generator).to(features.device, non_blocking=True)
                weight, start = None, third_party_start(features[0], first, k)[None]
            else:
                significance = signals.received_attn
                weight = significance if self.weighted else None
                start = topk(significance, k)
            if self.method == "kmedoids":
                found = self.medoids(features, weight, start)[0]  # only the third-party code finds one twice
                return Selection(found.unique()[None] if self.compat else found.sort(1).values)
            centres, owner = k_means(features, start, self.iterations, weight=weight)
            anchors, owner = seat_clusters(features[0], centres[0], owner[0])
            order = anchors.argsort()
            turn = torch.empty_like(order).scatter(0, order, torch.arange(k, device=order.device))
            owner = turn[owner][None]
            if weight is not None:  # a cluster without any significance takes the plain mean, as in the clustering
                mass = weight.new_zeros(1, k).scatter_add(1, owner, weight)
                weight = torch.where(mass.gather(1, owner) > 0, weight, torch.ones_like(weight))
        return Selection(anchors[order][None], merge_scatter(features, owner, k, weight=weight), owner)

    def select(self, signals: Signals) -> Selection:
        """Cluster every view."""
        return each_view(signals, self.choose)


def third_party_start(features: Tensor, first: Tensor, k: int) -> Tensor:
    """Return the third-party code's first centres ``(k,)``: from ``first (1,)`` on the token whose largest distance is largest.

    Chosen tokens count as 0 away, so they come again only when nothing else is left.
    """
    wide = widened(features)
    picks = [first]
    far = torch.cdist(wide[first], wide)[0].index_fill(0, first, 0.0)
    for _ in range(k - 1):
        pick = far.argmax()[None]
        picks.append(pick)
        far = torch.maximum(far, torch.cdist(wide[pick], wide)[0]).index_fill(0, torch.cat(picks), 0.0)
    return torch.cat(picks)


def _third_party(
    features: Tensor, weight: Tensor | None, start: Tensor, iterations: int, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Medoids ``(K,)`` and clusters ``(N,)`` of one view by the rules of the third-party code."""
    wide = widened(features)
    cost = torch.cat([torch.cdist(part, wide).sum(1) for part in wide.split(block)])
    cost = cost if weight is None else cost * weight.to(cost.dtype)
    by_cost, medoids = torch.sort(cost, stable=True).indices, start
    rank = by_cost.argsort()

    def assign() -> Tensor:
        return torch.cat([torch.cdist(part, wide[medoids]).argmin(1) for part in wide.split(block)])

    for _ in range(iterations):
        owner = assign()
        best = torch.full_like(medoids, len(wide)).scatter_reduce(0, owner, rank, "amin")
        medoids = torch.where(best < len(wide), by_cost[best.clamp(max=len(wide) - 1)], 0)  # an empty cluster goes to token 0
    return medoids, assign()
