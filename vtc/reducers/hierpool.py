"""Hierpool: token pooling of document retrievers, applied to projected visual tokens."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vtc.core import Facts, Layout, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import k_means, merge_scatter, seat_clusters, similarity_rows, ward, widened
from vtc.registry import register
from vtc.views import each_view

ROUNDS = 10
"""Most rounds of k-means."""


@register(
    "hierpool",
    paper="arXiv:2409.14683",
    code="https://github.com/illuin-tech/colpali @ 9be8f19",
    licence="MIT",
    presets={
        "factor2": {"keep": 1 / 2},
        "factor3": {"keep": 1 / 3},
        "factor4": {"keep": 1 / 4},
    },
)
@dataclass(frozen=True, kw_only=True)
class HierPool(Reducer):
    """Cluster the projected tokens and hand on the mean of each cluster.

    ``ward``: every token is described by its similarities to all tokens of the view, and these rows are clustered by Ward's method
    with Euclidean distance, as the release does (it hands a similarity matrix to a function that expects observations). ``kmeans``:
    Lloyd's algorithm on normalised tokens from evenly spaced ones. ``sequential``: consecutive runs of tokens, the baseline. A mean
    sits in the place of its cluster's first token (``kmeans``: of the token nearest to the centre).

    Deviates: the release pools a retriever's normalised vectors, in the order of the cluster tree; for a language model tokens stay
    in sequence order, similarities are cosines (of normalised copies), and means keep their length (``renormalize``). Views are
    pooled one by one, exactly ``keep`` tokens stay, and newline tokens are dropped. The paper's k-means and sequential pooling are
    known in outline only: start, rounds and the even lengths of the runs are ours (unconfirmed).

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model (the release's pool factor is the inverse share).
    method : {"ward", "kmeans", "sequential"}, default "ward"
        What makes the clusters.
    renormalize : bool or None, default None
        Scale means to length one; ``None``: only with ``official``.
    official : bool, default False
        As released: an image is one document, similarities are plain dot products, merges of equal height are applied together
        (fewer than ``keep`` tokens may stay), and means follow each other in the order of the cluster tree.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    kind: ClassVar[str] = "merge"

    method: Literal["ward", "kmeans", "sequential"] = "ward"
    renormalize: bool | None = None
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse methods that do not exist or have no release."""
        super().__post_init__()
        known = ("ward", "kmeans", "sequential")
        if self.method not in known:
            raise UnknownArgumentError(f"hierpool: method={self.method!r} is not possible; use one of {', '.join(known)}")
        if self.official and self.method != "ward":
            raise UnknownArgumentError("hierpool: official=True goes with method='ward' only, the others have no release")

    def count(self, n: int, facts: Facts) -> int:
        """Return how many tokens to keep; the release rounds down."""
        return self.budget.tokens(n, rounding=math.floor if self.official else round)

    def clusters(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Return the token every cluster sits in ``(K,)`` and each token's cluster ``(N,)``, of one view."""
        k, n, device = signals.budget, signals.shape[1], signals.features.device
        wide = widened(signals.features)
        if self.method == "sequential":
            owner = torch.arange(n, device=device) * k // n
        elif self.method == "kmeans":
            unit = nn.functional.normalize(wide, dim=-1)
            start = (2 * torch.arange(k, device=device) + 1) * n // (2 * k)
            centres, owner = k_means(unit, start[None], ROUNDS)
            return seat_clusters(unit[0], centres[0], owner[0])
        elif self.official:
            owner = ward(similarity_rows(wide), k, ties=True)[0]
            return torch.arange(int(owner.max()) + 1, device=device), owner
        else:
            owner = ward(similarity_rows(nn.functional.normalize(wide, dim=-1)), k)[0]
        first = torch.full((k,), n, device=device).scatter_reduce(0, owner, torch.arange(n, device=device), "amin")
        return first, owner

    def choose(self, signals: Signals) -> Selection:
        """Average the tokens of each cluster of one view."""
        with torch.no_grad():
            anchors, owner = self.clusters(signals)
            order = anchors.argsort()
            owner = order.argsort()[owner]
        pooled = merge_scatter(signals.features, owner[None], len(order))
        if self.official if self.renormalize is None else self.renormalize:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return Selection(anchors[order][None], pooled, owner[None])

    def select(self, signals: Signals) -> Selection:
        """Average the tokens of each cluster, view by view."""
        if self.official:
            signals = dataclasses.replace(signals, layout=Layout.flat(len(signals.layout)))
        return each_view(signals, self.choose)
