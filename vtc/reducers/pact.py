"""PACT: drop tokens of little weight, cluster the rest by their keys within a distance, and let attention count cluster sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import attention_rows, dot, merge_scatter, topk_sorted, unit_rows, widened
from vtc.registry import register
from vtc.schedule import place_cuts
from vtc.signals import AttentionTap, all_keys, turned_back
from vtc.views import complement

_WHOLE = 1 << 26
"""Distances of an image that are held at once; of a larger one only those of centres, and of a few rows at a time."""
_BLOCK = 1024
"""Rows of distances looked at in one go."""
_STEPS = 24
"""Halvings of the range in which a larger cutoff is looked for."""


def _mean_query_weight(tap: AttentionTap) -> Tensor:
    """Softmax of the mean query over all tokens up to the row's last visual one, without rotation, mean over heads, ``(B, Q)``."""
    query, key = (widened(turned_back(t, tap.rope)) for t in (tap.query, tap.key))
    at = torch.arange(key.shape[2], device=key.device)
    span = tap.valid & (at <= torch.where(tap.visual, at, -1).amax(1, keepdim=True))
    part = span[:, None, :, None].to(query.dtype)
    mean = (query * part).sum(2, keepdim=True) / part.sum(2, keepdim=True)
    return attention_rows(mean, key, scaling=tap.scaling, mask=span[:, None, None])[:, 0].nan_to_num(0.0)


@dataclass(frozen=True, eq=False)
class Clusters:
    """What becomes of the tokens of one image.

    Attributes
    ----------
    survivors : Tensor
        ``(n,)`` ascending tokens that were not dropped.
    centres : Tensor
        ``(C,)`` ascending tokens that stand for a cluster.
    owner : Tensor
        ``(N,)`` number of every token's cluster, -1 for those that are lost.
    """

    survivors: Tensor
    centres: Tensor
    owner: Tensor


class Distances:
    """Distances ``max(0, 1 - cos)`` between the keys of the survivors of one image, for the host: row by row, all of few tokens.

    Parameters
    ----------
    keys : Tensor
        ``(n, d)``.
    """

    def __init__(self, keys: Tensor) -> None:
        self.unit, n = unit_rows(keys.clone(memory_format=torch.contiguous_format)), len(keys)
        self.kept: dict[int, np.ndarray] = {}
        if n * n <= _WHOLE:
            self.kept.update(enumerate(self.rows(0, n)))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the distances ``(stop - start, n)`` of some survivors to all; none to itself."""
        at = torch.arange(start, stop, device=self.unit.device)
        far = (1 - dot(self.unit[start:stop], self.unit)).clamp_(min=0)
        far[at - start, at] = 0
        return far.cpu().numpy()

    def __getitem__(self, token: int) -> np.ndarray:
        """Return the distances of one survivor to all, ``(n,)``."""
        if token not in self.kept:
            self.kept[token] = self.rows(token, token + 1)[0]
        return self.kept[token]

    def densest_first(self) -> np.ndarray:
        """Return the survivors by falling density, ``(n,)``; among equals, up to the rounding of float32, the lowest index."""
        n, density = len(self.unit), []
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            rows = np.stack([self.kept[i] for i in range(start, stop)]) if len(self.kept) == n else self.rows(start, stop)
            density.append(np.exp(-((rows.astype(np.float64) / 2) ** 2)).sum(1))
        return np.argsort(-np.round(np.concatenate(density), 6), kind="stable")


def centres_of(
    distance: np.ndarray | Distances, order: np.ndarray, cutoff: float, most: int | None = None
) -> np.ndarray | None:
    """Return the ascending centres: in ``order``, whoever is farther than ``cutoff`` from all before. ``None``: over ``most``."""
    found, left = [], np.ones(len(order), dtype=bool)
    for token in order:
        if not left[token]:
            continue
        if most is not None and len(found) == most:
            return None
        found.append(token)
        left &= distance[token] > cutoff
    return np.sort(np.array(found))


@register(
    "pact",
    paper="arXiv:2504.08966",
    code="https://github.com/orailix/PACT @ cf9a0c9",
    licence="MIT",
    presets={"paper": {"keep": 1.0, "layer": 4}},
)
@dataclass(frozen=True, kw_only=True)
class PACT(Reducer):
    """Before an early decoder layer drop unimportant tokens, and merge the others with all that lie within a distance of a centre.

    *Pruning.* A token's weight is the attention that the mean query gives its key (both without rotation, over all tokens up to
    the last visual one) times the norm of its hidden state. The best ``share`` survive. *Clustering.* Survivors are taken by the
    density of their rotated keys; one becomes a centre if it is farther than ``cutoff`` (one minus the cosine) from all centres
    so far. Then each survivor joins its nearest centre, and so does each dropped token within ``coefficient`` times the cutoff. A
    centre becomes the mean of its members and keeps its position. *Proportional attention.* From this layer on the logarithm of
    the number of members is added to the attention logits of its key.

    The number of tokens follows from the picture. ``keep`` is the most: where there would be more centres, the cutoff is raised to
    the smallest one found that gives no more.

    Deviates: images and clips of a prompt are clustered each by itself, where the release makes one pool of them; batches and
    padded rows work, at least one token survives, equal densities and weights go to the lowest index, and the logarithms are not
    rounded to float16. AnyRes newline tokens stay, as in the release; the one that ends the prompt's last image counts as visual in
    the mean query. The layer of other depths is a seventh of the model's, as in the release's 28. The alternatives of the release's
    configuration (other pruning scores, other clusterings) are not included. FlashAttention takes no such bias: refused unless
    ``proportional=False``.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image entering decoder layer ``layer``; 1.0: as many as the cutoff leaves.
    layer : int or float, default 1/7
        First decoder layer that runs on the shorter sequence: an index, or a share of the model's layers.
    share : float, default 0.55
        Share of the tokens that survive pruning, rounded down.
    cutoff : float, default 0.21
        Largest distance of a token to the centre that keeps it from becoming one.
    recover : bool, default True
        Whether dropped tokens join a centre.
    coefficient : float, default 1.5
        How many cutoffs a dropped token may be away from its centre.
    mean : bool, default True
        Whether a centre becomes the mean of its members; otherwise it keeps its own state.
    proportional : bool, default True
        Whether attention counts the members.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "all"
    kind: ClassVar[str] = "merge"

    layer: int | float = 1 / 7  # type: ignore[assignment]
    share: float = 0.55
    cutoff: float = 0.21
    recover: bool = True
    coefficient: float = 1.5
    mean: bool = True
    proportional: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        super().__post_init__()
        for option, least, most in (("share", 0.0, 1.0), ("cutoff", 0.0, 2.0), ("coefficient", 0.0, float("inf"))):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise UnknownArgumentError(f"pact: {option}={value!r} is out of range; use a number in {least}..{most}")

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the number of tokens follows from the picture: it does where tokens are pruned, or merged for being close."""
        return self.share < 1 or self.cutoff > 0

    def bind(self, facts: Facts) -> Reducer:
        """Place the layer."""
        super().bind(facts)
        return dataclasses.replace(self, layer=place_cuts((self.layer,), facts, "pact", "layer")[0])

    @property
    def needs(self) -> tuple[Need, ...]:
        """Rotated keys, and what the mean query gives them, in the layer about to run (layer 4 until bound to a model)."""
        layer = self.layer if isinstance(self.layer, int) else 4
        return (
            dataclasses.replace(all_keys(layer), source="text", of="preview"),
            Need("importance", "text", layer, _mean_query_weight, of="preview"),
        )

    def scores(self, signals: Signals) -> Tensor:
        """Return the weight of every token, ``(B, N)``."""
        hidden = widened(signals.features.detach())
        return signals.importance.to(hidden.dtype) * hidden.norm(dim=-1)

    def cluster(self, keys: Tensor, score: Tensor, most: int) -> Clusters:
        """Drop and cluster the tokens of one image.

        Parameters
        ----------
        keys, score : Tensor
            ``(N, d)`` and ``(N,)``.
        most : int
            Centres there may be.
        """
        n, device = len(keys), keys.device
        survivors = topk_sorted(score[None], max(1, int(self.share * n)))[0]
        distance, cutoff = Distances(keys[survivors]), self.cutoff
        order = distance.densest_first()
        found = centres_of(distance, order, cutoff, most)
        if found is None:
            low, cutoff = cutoff, 2.0  # nothing is farther away than that
            found = centres_of(distance, order, cutoff)
            for _ in range(_STEPS):
                middle = (low + cutoff) / 2
                fewer = centres_of(distance, order, middle, most)
                low, cutoff, found = (middle, cutoff, found) if fewer is None else (low, middle, fewer)
        centres = torch.from_numpy(found).to(device, non_blocking=True)
        owner = torch.full((n,), -1, device=device)
        owner[survivors] = torch.from_numpy(np.stack([distance[c] for c in found]).argmin(0)).to(device, non_blocking=True)
        if self.recover and len(survivors) < n:
            dropped = complement(survivors, n)
            far, joined = (1 - dot(unit_rows(keys[dropped]), distance.unit[centres])).min(1)
            owner[dropped] = torch.where(far <= self.coefficient * cutoff, joined, -1)
        return Clusters(survivors, survivors[centres], owner)

    def clusters(self, signals: Signals) -> list[Clusters]:
        """Drop and cluster the tokens of every image."""
        pairs = zip(widened(signals.all_keys.detach()), self.scores(signals), strict=True)
        return [self.cluster(keys, score, signals.budget) for keys, score in pairs]

    def select(self, signals: Signals) -> Selection:
        """Merge every image's clusters."""
        with torch.no_grad():
            found = self.clusters(signals)
        count, owner = [len(c.centres) for c in found], torch.stack([c.owner for c in found])
        most, device = max(count), owner.device
        index = torch.stack([torch.nn.functional.pad(c.centres, (0, most - len(c.centres))) for c in found])
        valid = None
        if min(count) < most:
            valid = torch.arange(most, device=device) < torch.tensor(count).to(device, non_blocking=True)[:, None]
        size = merge_scatter(torch.ones_like(owner, dtype=torch.float32)[..., None], owner, most, mean=False)[..., 0]
        merged = merge_scatter(signals.features, owner, most) if self.mean else None
        weight = size.clamp(min=1) if self.proportional else None
        return Selection(index, merged, owner, valid, weight=weight)
