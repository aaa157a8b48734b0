"""FastVID: in every scene of a clip, keep salient tokens of every frame and merge the rest into density peaks of a few frames."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Positions, Reducer, Selection, Signals
from vtc.errors import BudgetError
from vtc.kernels import apportion, compacted, merge_scatter, pairwise_top1, topk_sorted, widened
from vtc.registry import register
from vtc.signals import AttentionTap
from vtc.video import (
    ClipReducer,
    check_number,
    check_option,
    density_scores,
    frame_features,
    frame_similarity,
    segments,
    used_layer,
    whole_frames,
)

VERSIONS = ("onevision", "llavavideo", "qwen")


def probe_keys(tap: AttentionTap) -> Tensor:
    """Measure: every patch's keys beside the mean query of its frame, scaled as the logits, ``(V, K, 2, H, d)``."""
    query, key = widened(tap.query), widened(tap.key).transpose(1, 2)
    first = 1 if tap.cls else 0
    if tap.mask is None:
        mean = query[:, :, first:].mean(2)
    else:  # padded views: the mask is the same for every row, and padding has no say in the mean
        mask = tap.mask[:, 0, 0].expand(len(query), -1)
        real = (mask if mask.dtype == torch.bool else mask > -1).to(query.dtype)[:, None, first:, None]
        mean = (query[:, :, first:] * real).sum(2) / real.sum(2)
    key = tap.patches(key)
    return torch.stack([key, (tap.scaling * mean)[:, None].expand_as(key)], 2)


def probed(values: Tensor) -> Tensor:
    """Softmax over the tokens of one frame of their keys' products with the query, mean over heads, ``(n,)`` float64.

    Parameters
    ----------
    values : Tensor
        ``(n, 2, H, d)``: :func:`probe_keys` of the frame's tokens, means over the patches each is made of.
    """
    key, query = values.double().unbind(1)
    return torch.softmax((key * query).sum(-1), 0).mean(1)


@dataclass(frozen=True)
class Segment:
    """One scene, and how many tokens each of its frames keeps.

    Attributes
    ----------
    start, stop : int
        First frame, and the one behind the last.
    salient, anchors : tuple of int
        Per frame of the scene.
    """

    start: int
    stop: int
    salient: tuple[int, ...]
    anchors: tuple[int, ...]


@register(
    "fastvid",
    paper="arXiv:2503.11187",
    code="https://github.com/LunarShen/FastVID @ a40a109",
    licence="MIT",
    presets={
        "onevision-r10": {"keep": 0.1},
        "llavavideo-r10": {"keep": 0.1, "version": "llavavideo"},
        "qwen-r27": {"keep": 0.27, "version": "qwen", "tau": 0.84},
        "release-r10": {"keep": 0.1, "official": True},
    },
)
@dataclass(frozen=True, kw_only=True)
class FastVid(ClipReducer):
    """Cut a clip into scenes; keep salient tokens of every frame, and merge the rest of a scene into peaks of a few frames.

    Scenes end between the neighbouring frames that are least alike (the ``scenes - 1`` lowest cosines of their mean tokens, and all
    below ``tau``), and share the budget by their length. Most of it goes to the tokens with the highest attention of each frame.
    The share ``context`` goes to every ``stride``-th frame, counted from the scene's last: its density peaks among the other
    tokens. Every token of the scene that is left joins, in each of these frames, the peak of highest cosine; a peak becomes ``w``
    times itself plus ``1 - w`` times the mean of its ``m`` tokens, ``w = max(1 / (m + 1), beta)``.

    The releases are three: ``onevision`` counts a peak among its own tokens; ``llavavideo`` does not, and gives odd tokens to
    the first (salient) and the last (peaks) frames; ``qwen`` lets only the last of a run of nearly equal frames (cosine of at least
    ``ignore``) keep tokens, and no frame more than half of its tokens as peaks.

    Deviates: budgets are met exactly, by the rule of ``llavavideo`` in all versions, or undercut where few frames may keep
    tokens; ``official=True`` has the releases' rounding, in which some of the budget is lost. The releases on SigLIP towers ask
    the pooling head of the original checkpoint, which models in transformers do not have (:func:`pooling_head` computes its
    signals); here a frame's attention is that of its mean query in the last used tower layer, and its feature the mean of its
    tokens, as the release on Qwen2.5-VL has it. Ties of density go to the lower token instead of to noise. Where a release fails
    (fewer frames than scenes, a frame with too few tokens) numbers are clamped. A picture counts as a clip of one frame.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip entering the language model.
    version : {"onevision", "llavavideo", "qwen"}, default "onevision"
        The release followed.
    scenes : int, default 8
        Fewest scenes of a clip with so many frames.
    tau : float, default 0.9
        Cosine of neighbouring frames below which a scene ends.
    context : float, default 0.4
        Share of the budget that goes to peaks.
    stride : int, default 4
        Frames from one with peaks to the next.
    beta : float, default 0.6
        Least weight of a peak against the mean of its tokens.
    neighbours : int, default 4
        Tokens the density looks at, the token itself included.
    ignore : float, default 0.95
        ``qwen``: cosine of neighbouring frames from which on they count as equal.
    layer_of_attention : int or None
        Tower layer asked; ``None``: the last used one.
    official : bool, default False
        The release's rounding.
    """

    default_positions: ClassVar[Positions] = "original"
    kind: ClassVar[str] = "merge"

    version: Literal["onevision", "llavavideo", "qwen"] = "onevision"
    scenes: int = 8
    tau: float = 0.9
    context: float = 0.4
    stride: int = 4
    beta: float = 0.6
    neighbours: int = 4
    ignore: float = 0.95
    layer_of_attention: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse options that do not exist."""
        super().__post_init__()
        check_option("fastvid", "version", self.version, VERSIONS)
        for name in ("scenes", "stride", "neighbours"):
            check_number("fastvid", name, getattr(self, name), 1, whole=True)
        for name, low in (("tau", -1), ("context", 0), ("beta", 0), ("ignore", -1)):
            check_number("fastvid", name, getattr(self, name), low, 1)

    def bind(self, facts: Facts) -> Reducer:
        """Name the tower layer."""
        super().bind(facts)
        return self if self.layer_of_attention is not None else dataclasses.replace(self, layer_of_attention=used_layer(facts))

    @property
    def needs(self) -> tuple[Need, ...]:
        """Keys and mean queries of the tower layer."""
        return (Need("probe_keys", "vision", -1 if self.layer_of_attention is None else self.layer_of_attention, probe_keys),)

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """The release's rounding gives a number of its own."""
        return self.official

    # ---------------------------------------------------------------------------------------------------------- planning
    def cut(self, similarity: Tensor) -> list[tuple[int, int]]:
        """Return the scenes of a clip whose neighbouring frames have these cosines ``(T - 1,)``."""
        if not len(similarity):
            return [(0, 1)]
        ends = similarity < self.tau
        few = min(self.scenes - 1, len(similarity))
        if few:
            ends = ends | torch.zeros_like(ends).index_fill(0, torch.sort(similarity, stable=True).indices[:few], True)
        return segments(ends)

    def plan(self, similarity: Tensor, n: int, budget: int) -> list[Segment]:
        """Return the scenes and what their frames keep.

        Parameters
        ----------
        similarity : Tensor
            ``(T - 1,)`` cosines of neighbouring frames.
        n : int
            Tokens of a frame.
        budget : int
            Of the clip.
        """
        spans = self.cut(similarity)
        lengths = [stop - start for start, stop in spans]
        alike = [False, *(similarity >= self.ignore).tolist()] if len(similarity) else [False]
        if self.official:
            amount = self.budget.amount
            each = int(n * (amount if isinstance(amount, float) else budget / (n * sum(lengths))))
            if each < 1:
                raise BudgetError(
                    f"fastvid: the release keeps nothing of a frame of {n} tokens at this budget: use a larger keep"
                )
            shares = [each * length for length in lengths]
        else:
            each = 0
            shares = apportion(budget, [float(x) for x in lengths], [n * x for x in lengths])
        found = []
        for (start, stop), share in zip(spans, shares, strict=True):
            frames = list(range(stop - start))
            if self.version == "qwen":  # the last frame of every run of equal ones
                frames = [t for t in frames if start + t + 1 == stop or not alike[start + t + 1]]
            if self.official and self.version == "onevision":
                salient, anchors = self.vectorised(len(frames), each, n)
            else:
                salient, anchors = self.divided(len(frames), share, n, single=stop - start == 1)
            if not self.official:
                salient = filled(salient, anchors, share, n)
            full = dict(zip(frames, zip(salient, anchors, strict=True), strict=True))
            kept = [full.get(t, (0, 0)) for t in range(stop - start)]
            found.append(Segment(start, stop, tuple(s for s, _ in kept), tuple(a for _, a in kept)))
        return found

    def seats(self, frames: int) -> list[int]:
        """Return which of a scene's frames have peaks, ascending: the last, and every ``stride``-th before it."""
        return list(range(frames - 1, -1, -self.stride))[::-1]

    def vectorised(self, frames: int, each: int, n: int) -> tuple[list[int], list[int]]:
        """Return salient tokens and peaks per frame as the release on LLaVA-OneVision counts them."""
        context = int(each * self.context)
        salient, seats = each - context, self.seats(frames)
        most = context * frames // len(seats)
        return [min(salient, n)] * frames, [min(most, n - min(salient, n)) if t in seats else 0 for t in range(frames)]

    def divided(self, frames: int, share: int, n: int, *, single: bool) -> tuple[list[int], list[int]]:
        """Return salient tokens and peaks per frame as the other two releases count them; what does not fit is lost."""
        context = int(share * self.context)
        context = max(context, 1) if self.version == "qwen" and self.official else context
        rest, seats = max(share - context, 0), self.seats(frames)
        salient = [rest // frames + (t < rest % frames) for t in range(frames)]
        extra = len(seats) - context % len(seats)
        anchors = [0] * frames
        for i, t in enumerate(seats):
            anchors[t] = context // len(seats) + (i >= extra)
        if self.version == "qwen" and self.official and not single:
            anchors = [min(a, n // 2) for a in anchors]
            return [min(s, n - a) for s, a in zip(salient, anchors, strict=True)], anchors
        salient = [min(s, n) for s in salient]
        return salient, [min(a, n - s) for a, s in zip(anchors, salient, strict=True)]

    # ---------------------------------------------------------------------------------------------------------- reducing
    def choose(self, signals: Signals) -> Selection:
        """Reduce one clip."""
        tokens, _ = whole_frames(signals, "fastvid")
        features = signals.features[0]
        with torch.no_grad():
            attention = torch.stack([probed(signals.probe_keys[0, own]) for own in tokens])
            glance = torch.stack([frame_features(features[own][None])[0] for own in tokens])
        return self.reduce(features, tokens, attention, glance, signals.budget)

    def reduce(self, features: Tensor, tokens: Tensor, attention: Tensor, glance: Tensor, budget: int) -> Selection:
        """Reduce one clip.

        Parameters
        ----------
        features : Tensor
            ``(N, D)``.
        tokens : Tensor
            ``(T, n)`` tokens of every frame.
        attention : Tensor
            ``(T, n)``.
        glance : Tensor
            ``(T, Dg)`` one feature per frame.
        """
        frames, n = tokens.shape
        plan = self.plan(frame_similarity(glance), n, budget)
        index, values = [], []
        owner = torch.full((len(features),), -1, device=tokens.device)
        taken = 0
        for seg in plan:
            with torch.no_grad():
                best = [top(attention[seg.start + t], k) for t, k in enumerate(seg.salient)]
                rest = [others(b, n) for b in best]
            for t, own in enumerate(best):
                kept = tokens[seg.start + t, own]
                index.append(kept)
                values.append(widened(features[kept]))
                owner[kept] = taken + torch.arange(len(kept), device=kept.device)
                taken += len(kept)
            loose = torch.cat([tokens[seg.start + t, r] for t, r in enumerate(rest)])
            for t in reversed(range(len(rest))):  # the last first: a token is said to be in the next frame with peaks
                if not seg.anchors[t]:
                    continue
                own = tokens[seg.start + t, rest[t]]
                with torch.no_grad():
                    peaks = own[self.peaks(features[own], seg.anchors[t])]
                merged, went = self.merged(features, loose, peaks)
                seen = loose[: sum(map(len, rest[: t + 1]))]
                owner[seen] = taken + went[: len(seen)]
                owner[peaks] = taken + torch.arange(len(peaks), device=peaks.device)
                index.append(peaks)
                values.append(merged)
                taken += len(peaks)
        at = torch.cat(index)
        order = at.argsort()
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        owner = torch.where(owner >= 0, rank[owner.clamp(min=0)], -1)
        owner[at[order]] = torch.arange(len(order), device=order.device)
        return Selection(at[order][None], torch.cat(values)[order][None].to(features.dtype), owner[None])

    def peaks(self, points: Tensor, count: int) -> Tensor:
        """Return the density peaks of one frame's ``points (m, D)``, ``(count,)`` ascending."""
        return topk_sorted(density_scores(points, self.neighbours)[1][None], count)[0]

    def merged(self, features: Tensor, loose: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the ``loose (m,)`` tokens of a scene into the ``peaks (k,)`` of one frame; return also which went where."""
        wide, count = widened(features), len(peaks)
        with torch.no_grad():
            went = pairwise_top1(features[loose][None], features[peaks][None])[1][0]
            owner = went
            if self.version != "onevision":  # a peak is none of its own tokens
                mine = torch.zeros(len(features), dtype=torch.bool, device=peaks.device).index_fill(0, peaks, True)
                owner = torch.where(mine[loose], -1, went)
            size = wide.new_zeros(count + 1).index_add_(0, torch.where(owner < 0, count, owner), wide.new_ones(len(owner)))[:-1]
            weight = torch.where(size > 0, (1 / (size + 1)).clamp(min=self.beta), 1.0)[:, None]
        mean = merge_scatter(wide[loose][None], owner[None], count)[0]
        return weight * wide[peaks] + (1 - weight) * mean, went


def top(scores: Tensor, k: int) -> Tensor:
    """The ``k`` highest of ``scores (n,)``, ascending by place."""
    return topk_sorted(scores[None], k)[0] if k else torch.zeros(0, dtype=torch.long, device=scores.device)


def others(chosen: Tensor, n: int) -> Tensor:
    """The places below ``n`` that are not ``chosen``, ascending."""
    left = torch.ones(1, n, dtype=torch.bool, device=chosen.device).index_fill(1, chosen, False)
    return compacted(left, n - len(chosen))[0][0]


def filled(salient: list[int], anchors: list[int], share: int, n: int) -> list[int]:
    """Return the salient tokens per frame with what is missing of a scene's ``share`` added where there is room, evenly."""
    room = [n - s - a for s, a in zip(salient, anchors, strict=True)]
    missing = share - sum(salient) - sum(anchors)
    if missing <= 0:
        return salient
    return [s + more for s, more in zip(salient, apportion(missing, [1.0] * len(room), room), strict=True)]


def pooling_head(tokens: Tensor, state: dict[str, Tensor], heads: int, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return the two signals the releases take from SigLIP's pooling head.

    Parameters
    ----------
    tokens : Tensor
        ``(T, n, D)`` hidden states of the last used tower layer.
    state : dict
        Weights of the original checkpoint: ``post_layernorm.*`` and ``head.*``.
    heads : int
        Heads of its attention.

    Returns
    -------
    feature, attention : Tensor
        ``(T, D)`` pooled feature of each frame, ``(T, n)`` attention of the learned probe, mean over heads.
    """
    functional, width = torch.nn.functional, tokens.shape[2]

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = norm(tokens, "post_layernorm")
    weight, bias = state["head.attention.in_proj_weight"].chunk(3), state["head.attention.in_proj_bias"].chunk(3)
    probe = state["head.probe"].expand(len(x), -1, -1)
    query, key, value = (
        functional.linear(t, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t, w, b in zip((probe, x, x), weight, bias, strict=True)
    )
    rows = torch.softmax(query @ key.transpose(2, 3) * (width // heads) ** -0.5, -1)
    pooled = linear((rows @ value).transpose(1, 2).flatten(2), "head.attention.out_proj")
    inner = functional.gelu(linear(norm(pooled, "head.layernorm"), "head.mlp.fc1"), approximate="tanh")
    return (pooled + linear(inner, "head.mlp.fc2"))[:, 0], rows.mean(1)[:, 0]


def pooled_attention(attention: Tensor, side: int, *, bilinear: bool) -> Tensor:
    """Shrink every frame's attention ``(T, side * side)`` as the model shrinks its features: bilinear, or the mean of 2 x 2."""
    grid = attention.view(len(attention), 1, side, side)
    if bilinear:
        half = -(-side // 2)
        return torch.nn.functional.interpolate(grid, size=(half, half), mode="bilinear", align_corners=False).flatten(1)
    return torch.nn.functional.avg_pool2d(grid, 2).flatten(1)
