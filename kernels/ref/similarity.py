"""Who is near whom: nearest neighbours, distances, neighbourhoods; in blocks, so that no matrix of all pairs is kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.kernels.ref.linear import Cosines, along, dot, gram, lengths, own_images, unit_rows, widened


def cosine_distance(features: Tensor, row: Tensor) -> Tensor:
    """Distance ``1 - cos`` of every token to one token of its image.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    row : Tensor
        ``(B,)`` int64, the token measured from.

    Returns
    -------
    Tensor
        ``(B, N)``.
    """
    return torch.cat([1 - Cosines(x).rows(at) for x, at in zip(own_images(widened(features)), row.split(1), strict=True)])


def mean_cosine(features: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of every token with the rows of its image's text, ``(B, N)``; 0 without text. No host synchronisation.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    text : Tensor
        ``(B, T, D)``.
    mask : Tensor
        ``(B, T)`` bool: the rows that count.
    """
    unit = torch.where(mask[..., None], unit_rows(text), 0.0)
    # in float64: in float32 the rounding would depend on the padding, and so on the other texts of the batch
    mean = unit.sum(1, dtype=torch.float64) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.stack([along(f, m.to(unit.dtype)) for f, m in zip(features, mean, strict=True)])


def pairwise_top1(source: Tensor, target: Tensor, *, block: int = 512) -> tuple[Tensor, Tensor]:
    """Nearest neighbour by cosine of every ``source`` row among the ``target`` rows, in blocks (no full matrix).

    Parameters
    ----------
    source, target : Tensor
        ``(B, M, D)`` and ``(B, T, D)``.

    Returns
    -------
    value, index : Tensor
        ``(B, M)``; among equal cosines the lowest index.
    """
    values, indices = [], []
    for a, b in zip(own_images(widened(source)), own_images(unit_rows(target)), strict=True):
        found = [dot(rows, b).max(1) for rows in a.split(block)] if len(a) else []
        values.append(torch.cat([v for v, _ in found]) / lengths(a) if found else a.new_zeros(0))
        indices.append(torch.cat([i for _, i in found]) if found else torch.zeros(0, dtype=torch.long, device=a.device))
    return torch.stack(values), torch.stack(indices)


def nearest_centre(points: Tensor, centres: Tensor, *, block: int = 4096) -> Tensor:
    """Index of the Euclidean nearest centre of every point, in blocks; the lowest among equals.

    Parameters
    ----------
    points, centres : Tensor
        ``(B, N, D)`` and ``(B, K, D)``.

    Returns
    -------
    Tensor
        ``(B, N)`` int64.
    """
    out = []
    for p, c in zip(own_images(widened(points)), own_images(widened(centres)), strict=True):
        offset = c.square().sum(1)
        out.append(torch.cat([torch.sub(offset, dot(rows, c), alpha=2).argmin(1) for rows in p.split(block)]))
    return torch.stack(out)


def most_isolated(features: Tensor, *, block: int = 64) -> Tensor:
    """Return ``(B,)``: the token whose nearest other token (``1 - cos``) is farthest, the lowest among equals.

    Every row of cosines bounds all other tokens' nearest distance from above, and tokens that cannot win any more are never
    compared with all others. At worst somewhat more than half of the cosines are computed.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    block : int
        Tokens compared with the others at a time.
    """
    return torch.tensor([_most_isolated(x, block) for x in own_images(widened(features))], device=features.device)


def _most_isolated(x: Tensor, block: int) -> int:
    scale = 1 / lengths(x)
    token = torch.arange(len(x), device=x.device)  # whose rows x has: those not compared with all others yet, and some that are
    done = torch.zeros_like(token, dtype=torch.bool)
    near = x.new_full((len(x),), -torch.inf)  # largest cosine found so far
    farthest, winner = -torch.inf, len(x)
    some = token[:: -(-len(x) // block)]
    while len(some):
        cosine = dot(x, x[some]).mul_(scale[some]).mul_(scale[:, None])
        cosine[some, torch.arange(len(some), device=x.device)] = -torch.inf
        cosine[done] = -torch.inf  # counted when these were compared
        distance = 1 - torch.maximum(near[some], cosine.amax(0))
        best = float(distance.max())
        which = int(token[some[distance == best]].min())
        if best > farthest or (best == farthest and which < winner):
            farthest, winner = best, which
        torch.maximum(near, cosine.amax(1), out=near)
        done[some] = True
        if int(done.sum()) * 3 > len(done):  # their columns are no longer needed
            left = ~done
            x, scale, token, near, done = x[left], scale[left], token[left], near[left], done[left]
        open_ = (~done & (1 - near >= farthest)).nonzero()[:, 0]
        some = open_[near[open_].topk(min(block, len(open_)), largest=False).indices]
    return winner


def connectivity(features: Tensor, threshold: float, *, block: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbourhood of every token in the graph of cosines of at least ``threshold``, in blocks (no full matrix).

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    threshold : float
        Least cosine of neighbours; a token is compared with itself, too.
    block : int
        Rows and columns per block.

    Returns
    -------
    count, within, mean : Tensor
        ``(B, N)`` number of neighbours, sum of their cosines, and mean cosine with all tokens.
    """
    out = []
    for u in own_images(unit_rows(features)):
        count, within = u.new_zeros(2, len(u)).unbind()
        for at, other, cosine in _tiles(u, block):
            near = (cosine >= threshold).to(u.dtype)
            cosine *= near
            count[at] += near.sum(1)
            within[at] += cosine.sum(1)
            if other != at:
                count[other] += near.sum(0)
                within[other] += cosine.sum(0)
        out.append(torch.stack([count, within, u @ u.mean(0)]))
    count, within, mean = torch.stack(out, 1)
    return count, within, mean


def count_similar(features: Tensor, threshold: float, *, block: int = 1024) -> Tensor:
    """For every token, how many others have a cosine above ``threshold`` with it; in blocks (no full matrix).

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    threshold : float
        A cosine.
    block : int
        Rows per block.

    Returns
    -------
    Tensor
        ``(B, N)`` int64.
    """
    out = []
    for u in own_images(unit_rows(features)):
        count = torch.zeros(len(u), dtype=torch.long, device=u.device)
        for at, other, cosine in _tiles(u, block):
            if other == at:
                cosine.fill_diagonal_(-torch.inf)
            near = (cosine > threshold).to(u.dtype)
            count[at] += near.sum(1).long()
            if other != at:
                count[other] += near.sum(0).long()
        out.append(count)
    return torch.stack(out)


def _tiles(unit: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the matrix of cosines between unit rows ``(N, D)`` on and above the diagonal; the others are their transposes."""
    places = [slice(lo, lo + block) for lo in range(0, len(unit), block)]
    for i, at in enumerate(places):
        for other in places[i:]:
            yield at, other, dot(unit[at], unit[other])


def similarity_rows(features: Tensor) -> Tensor:
    """Points whose mutual distances are those of the rows of ``E E^T``, in at most ``min(N, D)`` dimensions, float64.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    """
    return torch.stack([_similarity_rows(x) for x in own_images(widened(features.detach()))])


def _similarity_rows(x: Tensor) -> Tensor:
    """:func:`similarity_rows` of one image; products have the precision of ``x (N, D)``."""
    if x.shape[0] <= x.shape[1]:
        return gram(x).double()
    inner = gram(x.T).double()
    factor, failed = torch.linalg.cholesky_ex(inner)
    if int(failed):  # of lower rank
        values, vectors = torch.linalg.eigh(inner)
        factor = vectors * values.clamp(min=0).sqrt()
    return dot(x, factor.T.to(x.dtype)).double()
