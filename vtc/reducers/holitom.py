"""HoliTom: average what stays the same through a scene, keep the rest by attention, and merge once more inside the decoder."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Schedule, Selection, Signals, Stage, check_bounds
from vtc.errors import UnknownArgumentError
from vtc.kernels import apportion, merge_scatter, pairwise_top1, topk_sorted, widened
from vtc.registry import register
from vtc.schedule import checked, place_cuts
from vtc.signals import last_attn, received_attn
from vtc.video import ClipReducer, check_number, density_scores, distances, place_similarity, used_layer, whole_frames


# ------------------------------------------------------------------------------------------------------------- segmentation
@dataclass(frozen=True, eq=False)
class Windows:
    """How a clip is cut so that averaging static places saves most.

    Attributes
    ----------
    spans : list of (int, int)
        First and last frame of every window.
    gain : Tensor
        ``(T, T)`` float64 tokens saved by a window from one frame to another: its static places times its length less one.
    best : list of float
        Tokens saved up to each frame.
    """

    spans: list[tuple[int, int]]
    gain: Tensor
    best: list[float]


def windows_of(same: Tensor, longest: int) -> Windows:
    """Cut a clip into windows by dynamic programming; of equal savings the shorter window.

    Parameters
    ----------
    same : Tensor
        ``(T - 1, n)`` bool: the place looks the same in a frame and the next one.
    longest : int
        Most frames of a window.
    """
    frames, n = len(same) + 1, same.shape[1]
    alive = torch.ones(frames, n, dtype=torch.bool, device=same.device)  # static from each first frame to the present one
    gain = torch.zeros(frames, frames, dtype=torch.float64, device=same.device)
    for e in range(1, frames):
        alive[:e] &= same[e - 1]
        lengths = e - torch.arange(e, device=same.device)
        gain[:e, e] = (alive[:e].sum(1) * lengths).double()
    saved = gain.cpu().T.tolist()
    best, taken = [], []
    for i in range(frames):
        most, width = best[i - 1] if i else 0.0, 1
        for w in range(2, min(i + 1, longest) + 1):
            value = (best[i - w] if i >= w else 0.0) + saved[i][i - w + 1]
            if value > most:
                most, width = value, w
        best.append(most)
        taken.append(width)
    spans, end = [], frames - 1
    while end >= 0:
        spans.append((end - taken[end] + 1, end))
        end -= taken[end]
    return Windows(spans[::-1], gain, best)


def adjusted_ratio(share: float, tokens: int, saved: float) -> float:
    """Share of what averaging leaves that makes up ``share`` of all ``tokens``, at most 1."""
    return min(share / ((tokens - saved) / tokens), 1.0)


def cluster(points: Tensor, count: int, neighbours: int, beta: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``points (n, D)`` into ``count`` density peaks.

    Parameters
    ----------
    neighbours : int
        Of the density.
    beta : float or None
        Weight of a peak against the mean of its members; ``None``: the plain mean of all of them.

    Returns
    -------
    centres, owner, merged : Tensor
        ``(count,)`` ascending peaks, ``(n,)`` peak every point belongs to, ``(count, D)`` merged points.
    """
    with torch.no_grad():
        centres = topk_sorted(density_scores(points, min(neighbours, count))[1][None], count)[0]
        owner = distances(points, points[centres]).argmin(1)
        owner[centres] = torch.arange(count, device=points.device)
    wide = widened(points)
    if beta is None:
        return centres, owner, merge_scatter(wide[None], owner[None], count)[0]
    others = owner.index_fill(0, centres, -1)
    mean = merge_scatter(wide[None], others[None], count)[0]
    size = torch.zeros(count + 1, device=points.device).index_add_(
        0, torch.where(others < 0, count, others), torch.ones(len(points), device=points.device)
    )
    return centres, owner, torch.where(size[:-1, None] > 0, beta * wide[centres] + (1 - beta) * mean, wide[centres])


# -------------------------------------------------------------------------------------------------------------------- outer
@dataclass(eq=False)
class Piece:
    """What is made of the static places of one window, or of one frame's other places.

    Attributes
    ----------
    window : int
        Number of the window.
    frame : int
        Frame in whose slots the tokens are.
    index : Tensor
        ``(k,)`` tokens of the clip whose slots are taken.
    features : Tensor
        ``(k, D)`` at least float32.
    members, owner : Tensor
        ``(m,)`` tokens of the clip that went into them, and which of the ``k`` each belongs to.
    places : Tensor
        ``(p,)`` places of a frame the tokens were chosen from, ascending.
    """

    window: int
    frame: int
    index: Tensor
    features: Tensor
    members: Tensor
    owner: Tensor
    places: Tensor


@dataclass(frozen=True, kw_only=True)
class HoliTomOuter(ClipReducer):
    """The stage of :class:`HoliTom` in front of the language model; options as there."""

    name: ClassVar[str] = "holitom"
    kind: ClassVar[str] = "merge"
    default_positions: ClassVar[Positions] = "compact"

    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    longest: int = 1024
    contextual: float = 0.0
    attention: int = -1
    official: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """Attention received in the tower."""
        return (received_attn(self.attention),)

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """The release's rounding gives a number of its own."""
        return self.official

    def cut(self, signals: Signals, tokens: Tensor) -> tuple[Windows, Tensor]:
        """Cut one clip (batch 1) into windows; return also which places look the same in the next frame, ``(T - 1, n)`` bool."""
        same = place_similarity(signals.features[0], tokens) > self.tau
        return windows_of(same, self.longest), same

    def pieces(self, signals: Signals) -> list[Piece]:
        """Reduce one clip (batch 1)."""
        tokens, _ = whole_frames(signals, "holitom")
        frames, n = tokens.shape
        features, attention = signals.features[0], signals.received_attn[0]
        spans, saved, static = [(0, 0)], 0.0, [torch.zeros(n, dtype=torch.bool, device=tokens.device)]
        fixed = [0]
        if frames > 1:
            with torch.no_grad():
                found, same = self.cut(signals, tokens)
                spans, saved = found.spans, found.best[-1]
                static = [same[s:e].all(0) if e > s else torch.zeros_like(same[0]) for s, e in spans]
                fixed = torch.stack(static).sum(1).tolist()
        groups = [(w, None, fixed[w]) for w in range(len(fixed))]
        groups += [(w, t, n - fixed[w]) for w, (s, e) in enumerate(spans) for t in range(s, e + 1)]
        quota = self.quotas([g[2] for g in groups], [g[1] is None for g in groups], signals, frames * n, saved)
        out = []
        for (w, t, size), k in zip(groups, quota, strict=True):
            if not k:
                continue
            places = torch.arange(n, device=tokens.device) if size == n else (static[w] == (t is None)).nonzero()[:, 0]
            if t is None:
                out.append(self.static(features, tokens, spans[w], places, k, w))
            else:
                out.append(self.dynamic(features, attention, tokens[t], places, k, w, t))
        return out

    def quotas(self, size: list[int], static: list[bool], signals: Signals, total: int, saved: float) -> list[int]:
        """Return how many tokens are left of every group: exactly the budget, or what the release's rounding gives."""
        if not self.official:
            return apportion(signals.budget, [float(s) for s in size], size)
        amount = self.budget.amount
        ratio = adjusted_ratio(amount if isinstance(amount, float) else min(amount, total) / total, total, saved)
        return [round(s * ratio) if fixed else math.ceil(s * ratio) for s, fixed in zip(size, static, strict=True)]

    def static(self, features: Tensor, tokens: Tensor, span: tuple[int, int], places: Tensor, k: int, window: int) -> Piece:
        """Average static places over a window and cluster the means."""
        own = tokens[span[0] : span[1] + 1, places]  # (frames, places)
        mean = widened(features)[own].mean(0)
        centres, owner, merged = cluster(mean, k, self.neighbours, self.beta)
        return Piece(window, span[0], own[0, centres], merged, own.flatten(), owner.repeat(len(own)), places)

    def dynamic(
        self, features: Tensor, attention: Tensor, tokens: Tensor, places: Tensor, k: int, window: int, frame: int
    ) -> Piece:
        """Keep what most attention goes to, and cluster a share of the rest where asked for."""
        own = tokens[places]
        first = round(k * (1 - self.contextual))
        with torch.no_grad():
            chosen = topk_sorted(attention[own][None], first)[0] if first else places[:0]
        best = own[chosen]
        mine = torch.arange(first, device=own.device)
        if first == k:
            return Piece(window, frame, best, widened(features[best]), best, mine, places)
        left = torch.ones(len(own), dtype=torch.bool, device=own.device).index_fill(0, chosen, False).nonzero()[:, 0]
        rest = own[left]
        centres, owner, merged = cluster(features[rest], k - first, self.neighbours, self.beta)
        return Piece(
            window,
            frame,
            torch.cat([best, rest[centres]]),
            torch.cat([widened(features[best]), merged]),
            torch.cat([best, rest]),
            torch.cat([mine, owner + first]),
            places,
        )

    def choose(self, signals: Signals) -> Selection:
        """Put what is left of one clip into its slots."""
        pieces = self.pieces(signals)
        index = torch.cat([p.index for p in pieces])
        order = index.argsort()
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        owner = torch.full((signals.shape[1],), -1, device=order.device)
        start = 0
        for p in pieces:
            owner[p.members] = rank[p.owner + start]
            start += len(p.index)
        values = torch.cat([p.features for p in pieces])[order].to(signals.features.dtype)
        return Selection(index[order][None], values[None], owner[None])


# -------------------------------------------------------------------------------------------------------------------- inner
@dataclass(frozen=True, kw_only=True)
class HoliTomInner(Reducer):
    """The stage of :class:`HoliTom` inside the language model.

    Parameters
    ----------
    before : int
        Decoder layer in front of which it acts.
    share : float
        Share of the visual tokens that are merged into the others.
    """

    name: ClassVar[str] = "holitom"
    stage: ClassVar[Stage] = Stage.DECODER
    kind: ClassVar[str] = "merge"
    decides_itself: ClassVar[bool] = True
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "all"

    before: int
    share: float = 0.5

    @property
    def layer(self) -> int:
        """First decoder layer that runs on the shorter sequence."""
        return self.before

    @property
    def needs(self) -> tuple[Need, ...]:
        """The last token's attention in the layer before."""
        return (last_attn(self.before - 1),)

    def select(self, signals: Signals) -> Selection:
        """Halve every other token into the kept one it resembles most, one after the other."""
        n = signals.shape[1]
        count = max(1, min(round(n * (1 - self.share)), signals.budget))
        if count >= n:
            return Selection.all(n, signals.shape[0], signals.features.device)
        with torch.no_grad():
            index = topk_sorted(signals.last_attn, count)
            owner, weight = halved(signals.features, index)
        merged = merge_scatter(widened(signals.features), owner, count, weight=weight, mean=False)
        return Selection(index, merged.to(signals.features.dtype), owner)


def halved(features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept token ``(B, N)`` every token goes to, the one of highest cosine, and its weight in it ``(B, N)``.

    Going through the others in order, each takes half of what the kept token is by then: of ``m`` the last one weighs 1/2, the
    first and the kept token itself ``2 ** -m``.

    Parameters
    ----------
    features : Tensor
        ``(B, N, D)``.
    index : Tensor
        ``(B, K)`` ascending, the kept tokens.
    """
    owners, weights = [], []
    for x, kept in zip(widened(features), index, strict=True):
        owner = pairwise_top1(x[None].double(), x[kept][None].double())[1][0]
        owner[kept] = torch.arange(len(kept), device=kept.device)
        other = torch.ones_like(owner).index_fill(0, kept, 0)
        order = torch.sort(owner, stable=True).indices  # kept token by kept token, each in the order of the sequence
        size = torch.zeros_like(kept).index_add(0, owner, other)
        run = other[order].cumsum(0)
        before = (size.cumsum(0) - size)[owner[order]]
        rank = torch.empty_like(order).scatter(0, order, run - before)  # 1 for the first that joins
        power = torch.where(other > 0, size[owner] - rank + 1, size[owner])
        owners.append(owner)
        weights.append(torch.ldexp(torch.ones_like(x[:, 0]), -power))
    return torch.stack(owners), torch.stack(weights)


@register(
    "holitom",
    paper="arXiv:2505.21334",
    code="https://github.com/cokeshao/HoliTom @ e9b2972",
    licence="Apache-2.0",
    presets={
        **{f"r{p}": {"keep": p / 100} for p in (25, 20, 15)},
        "r10": {"keep": 0.1, "tau": 0.65},
        "outer-r10": {"keep": 0.1, "tau": 0.65, "inner": 0.0},
        "release-r25": {"keep": 0.25, "official": True},
    },
)
@dataclass(frozen=True, kw_only=True)
class HoliTom(Schedule):
    """Cut a clip so that averaging its static places saves most, thin out the rest, and merge once more inside the decoder.

    **Before the model.** A place is static through a window of frames if it looks the same (cosine above ``tau``) from every
    frame to the next. The windows that save most tokens are found by dynamic programming. Static places are averaged over their
    window and clustered by density peaks, and each peak is mixed with the mean of its members; of the other places of a frame
    those stay that receive most attention in the last used tower layer. An averaged token is in its window's first frame.

    **Inside.** Before decoder layer ``layer``, the share ``inner`` of the visual tokens that the last token attends to least is
    merged: one after the other, each halves into the kept token of highest cosine. ``inner=0`` leaves this out.

    Deviates: the release gives every frame and window its share rounded by itself (up, and to the nearest), and so meets a
    budget only roughly (``official=True``); here the budget is shared out by the largest remainder and met, or undercut where
    averaging alone leaves less. The release lists a window's averaged tokens first (:func:`released_order`); here all are in
    raster order. It breaks ties of density by noise; here the lower-numbered token counts as denser. Its clustering of moving
    places (``contextual``) raises; here it does what it is meant to. Its inner part lets layer ``layer - 1`` see the future
    under SDPA; here it stays causal, and newline tokens, which the release may merge away, stay. Where the model has no 28
    layers, ``layer`` is the same share of its depth. A picture counts as a clip of one frame, with nothing static in it. In a
    tower whose last layer attends within windows the attention is that of the last layer without.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip entering the language model. ``avg_tokens`` counts the inner part, too.
    tau : float, default 0.8
        Cosine above which a place looks the same.
    beta : float or None, default 0.6
        Weight of a peak against its members; ``None``: the plain mean of all.
    neighbours : int, default 7
        Tokens the density looks at.
    longest : int, default 1024
        Most frames of a window.
    contextual : float, default 0.0
        Share of a frame's tokens that are clusters of moving places instead of the most attended ones.
    attention : int or None
        Tower layer whose attention counts; ``None``: the last used one.
    inner : float, default 0.5
        Share of the visual tokens merged inside the decoder.
    layer : int or float, default 18/28
        Decoder layer before which they are; a float is a share of the depth.
    official : bool, default False
        The release's rounding.
    """

    stages: ClassVar[tuple[Stage, ...]] = (Stage.BOUNDARY, Stage.DECODER)

    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    longest: int = 1024
    contextual: float = 0.0
    attention: int | None = None
    inner: float = 0.5
    layer: int | float = 18 / 28  # type: ignore[assignment]
    official: bool = False
    _parts: tuple[Reducer, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        check_number("holitom", "tau", self.tau, -1, 1)
        check_number("holitom", "contextual", self.contextual, 0, 1)
        check_number("holitom", "inner", self.inner, 0, 1)
        check_number("holitom", "neighbours", self.neighbours, 1, whole=True)
        check_number("holitom", "longest", self.longest, 1, whole=True)
        if self.beta is not None:
            check_number("holitom", "beta", self.beta, 0, 1)
        if self.newlines == "compete":
            raise UnknownArgumentError(
                "holitom: newlines='compete' is not possible, since newline tokens are in no frame; use all"
            )

    def bind(self, facts: Facts) -> HoliTom:
        """Choose the layers, and the number of tokens for a layer average."""
        check_bounds(self.budget, facts)
        (layer,) = place_cuts((self.layer,), facts, "holitom", "layer") if self.inner else (facts.layers,)
        used = used_layer(facts) if self.attention is None else self.attention
        shared: dict[str, Any] = {k: getattr(self, k) for k in ("keep", "avg_tokens", "positions", "newlines", "per")}
        if self.avg_tokens is not None:
            weight = (layer + (facts.layers - layer) * (1 - self.inner)) / facts.layers
            amount = self.avg_tokens / weight
            shared["keep"] = min(1.0, amount) if isinstance(self.avg_tokens, float) else int(amount)
            shared["avg_tokens"] = None
        names = ("tau", "beta", "neighbours", "longest", "contextual", "official")
        parts: tuple[Reducer, ...] = (HoliTomOuter(**shared, **{k: getattr(self, k) for k in names}, attention=used),)
        if self.inner:
            parts += (HoliTomInner(keep=1.0, positions=self.positions, before=layer, share=self.inner),)
        bound = copy.copy(self)
        object.__setattr__(bound, "_parts", checked(parts, facts))
        return bound

    def parts(self) -> tuple[Reducer, ...]:
        """Both stages; known once :meth:`bind` has run."""
        if not self._parts:
            raise TypeError("the stages of 'holitom' depend on the model: call bind(facts) first (vtc.patch does)")
        return self._parts


def released_order(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces as the release lists them: window by window, first the static tokens, then its frames."""
    return sorted(pieces, key=lambda p: p.window)  # they come static ones first, and in the order of time
