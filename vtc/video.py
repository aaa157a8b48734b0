"""Clips: which tokens make up a frame, which token stood in the same place one frame earlier, and where scenes end.

The views of a clip's :class:`~vtc.core.Layout` are its frames, in the order of time. On models that join source frames (Qwen2-VL
joins two) a frame is one such step of the grid. Everything here is O(N D) in the tokens of a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Facts, Newlines, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.kernels import take, widened
from vtc.views import each_view, joined, members, narrow, on_host

THINNED = "fewer tokens than one frame has: spread evenly"
"""Note of an image, or of a clip whose budget is below one frame, given to a method that thins out time."""


@dataclass(frozen=True, kw_only=True)
class ClipReducer(Reducer):
    """Base of methods that look at one clip at a time, and at a picture as a clip of one frame."""

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_newlines: ClassVar[Newlines] = "all"

    def __post_init__(self) -> None:
        """Refuse newline tokens as candidates: they are in no frame."""
        super().__post_init__()
        if self.newline_policy == "compete":
            raise UnknownArgumentError(
                f"{self.name or type(self).__name__}: newlines='compete' is not possible, since newline tokens are in no frame; "
                "use one of all, with_row, none"
            )

    def choose(self, signals: Signals) -> Selection:
        """Choose the survivors of one clip, or of one view of an image (batch 1)."""
        raise TypeError(f"{type(self).__name__} does not implement choose()")

    def select(self, signals: Signals) -> Selection:
        """Choose the survivors of every clip."""
        return each_clip(signals, self.choose, always=self.decides_itself)


def check_option(name: str, option: str, value: object, known: tuple[str, ...]) -> None:
    """Raise :class:`UnknownArgumentError` unless an option has one of the ``known`` values."""
    if value not in known:
        raise UnknownArgumentError(f"{name}: {option}={value!r} is not possible; use one of {', '.join(map(repr, known))}")


def check_number(name: str, option: str, value: object, low: float, high: float = float("inf"), *, whole: bool = False) -> None:
    """Raise :class:`UnknownArgumentError` unless an option is a number (``whole``: an int) from ``low`` to ``high``."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an int" if whole else "a number"
        span = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise UnknownArgumentError(f"{name}: {option}={value!r} is not possible; use {kind} {span}")


def each_clip(signals: Signals, choose: Callable[[Signals], Selection], *, always: bool = False) -> Selection:
    """Ask ``choose`` about every clip of a batch by itself, and about every view of an image as a clip of one frame.

    Parameters
    ----------
    signals : Signals
        ``B`` clips, or images.
    choose : callable
        Gets the :class:`Signals` of one clip or view (batch 1); returns its :class:`Selection` without ``valid``.
    always : bool, default False
        Ask also about what may keep everything.
    """
    if not signals.layout.video:
        return each_view(signals, choose, always=always)
    batch, n = signals.shape
    if signals.budget >= n and not always:
        return Selection.all(n, batch, signals.features.device)
    every = torch.arange(n, device=signals.entries.device)
    return joined(signals, [choose(narrow(signals, b, every, signals.budget, 0)) for b in range(batch)])


def frames_of(signals: Signals) -> list[Tensor]:
    """Return the ascending tokens ``(n,)`` of every frame of one clip (batch 1) that has any left, in the order of time.

    Tokens that are in no frame (newlines shown by themselves) count as one frame.
    """
    found = [own for own in members(signals)[0][:-1] if len(own)]
    return found or [torch.arange(signals.shape[1], device=signals.entries.device)]


def whole_frames(signals: Signals, name: str) -> tuple[Tensor, tuple[int, int]]:
    """Return the tokens of every frame ``(T, n)`` in raster order (batch 1), and the grid of a frame.

    What is left of a picture that is no full grid counts as one row.

    Raises
    ------
    UnsupportedFeatureError
        Frames of which an earlier reducer dropped tokens: nothing then stands in the same place of two frames.
    """
    frames = frames_of(signals)
    n = len(frames[0])
    row, col = on_host(signals, "row", "col")
    if len(row) > n:  # in raster order, so that the first frame comes first
        row, col = row[:n], col[:n]
    rows, cols = int(row.max() - row.min()) + 1, int(col.max() - col.min()) + 1
    if len(frames) == 1:
        return frames[0][None], (rows, cols) if rows * cols == n else (1, n)
    full = signals.layout.grids[0]
    if any(len(f) != full[0] * full[1] for f in frames):
        raise UnsupportedFeatureError(
            f"'{name}' compares whole frames, and an earlier reducer dropped tokens of them: use '{name}' alone, or first"
        )
    return torch.stack(frames), full


def frame_features(features: Tensor) -> Tensor:
    """Return the mean token ``(T, D)`` of every frame of ``features (T, n, D)``, at least float32."""
    return widened(features).mean(1)


def frame_similarity(frames: Tensor) -> Tensor:
    """Return the cosine of every frame's feature with the next one's, ``(T - 1,)`` float64, for ``frames (T, D)``."""
    return cosines(frames[:-1], frames[1:])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row of ``a (n, D)`` with the same row of ``b``, ``(n,)`` float64; 0 for zero rows.

    Made in float64 and rounded to 12 decimals, so that equal pairs have equal cosines on every CPU: repeated frames tie exactly.
    """
    a, b = a.double(), b.double()
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return ((a * b).sum(-1) / torch.where(size > 0, size, 1.0)).round(decimals=12)


def segments(cuts: Tensor) -> list[tuple[int, int]]:
    """Return ``(first, last + 1)`` of the runs of frames between ``cuts (T - 1,)`` bool: True where a frame is a run's last."""
    ends = [int(t) + 1 for t in cuts.nonzero()[:, 0]] + [len(cuts) + 1]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def place_similarity(features: Tensor, tokens: Tensor) -> Tensor:
    """Return the cosine of every token with the one in its place in the next frame, ``(T - 1, n)`` float64 (:func:`cosines`).

    Parameters
    ----------
    features : Tensor
        ``(N, D)`` of one clip.
    tokens : Tensor
        ``(T, n)`` tokens of every frame.
    """
    pairs = [cosines(features[a], features[b]) for a, b in zip(tokens[:-1], tokens[1:], strict=True)]
    return torch.stack(pairs) if pairs else features.new_zeros(0, tokens.shape[1], dtype=torch.float64)


def previous(signals: Signals) -> Tensor:
    """Return the token in the same place of the frame directly before, ``(B, N)``; -1 where there is none (left)."""
    rows, cols = (max(size) for size in zip(*signals.layout.grids, strict=True))
    frame = signals.of("view")
    place = (frame * rows + signals.of("row")) * cols + signals.of("col")
    at = torch.where(frame >= 0, place, signals.layout.views * rows * cols)
    where = at.new_full((at.shape[0], signals.layout.views * rows * cols + 1), -1)
    where = where.scatter(1, at, torch.arange(at.shape[1], device=at.device).expand_as(at))
    before = where.gather(1, (place - rows * cols).clamp(min=0))
    return torch.where(frame > 0, before, -1)


def spread(tokens: Tensor, k: int) -> Tensor:
    """Return ``k`` of the ``tokens (n,)`` at even distances, in order."""
    return tokens[(2 * torch.arange(k, device=tokens.device) + 1) * len(tokens) // (2 * k)]


def thinned(signals: Signals, tokens: Tensor) -> Selection:
    """Return ``signals.budget`` of a frame's ``tokens (n,)`` (batch 1), spread evenly, and say so."""
    return Selection(spread(tokens, min(signals.budget, len(tokens)))[None], note=THINNED)


def similarity_before(signals: Signals) -> Tensor:
    """Return the cosine with the same place of the frame before, ``(B, N)``, minus infinity where there is no token."""
    unit = torch.nn.functional.normalize(widened(signals.features), dim=-1)
    before = previous(signals)
    cosine = (unit * take(unit, before.clamp(min=0))).sum(-1)
    return torch.where(before >= 0, cosine, -torch.inf)


def density_scores(points: Tensor, neighbours: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Return density and density-peak score of every point, ``(n,)`` float64 each.

    Distances are Euclidean over the root of the width. The density is ``exp(-m)``, ``m`` the mean of the squares of the
    ``neighbours`` smallest distances, the point's own 0 among them. The score is the density times the distance to the nearest
    denser point; the densest one gets the largest distance of all. Of equally dense points the lower-numbered counts as denser.

    Parameters
    ----------
    points : Tensor
        ``(n, D)``: of one frame, since all pairs are compared.
    neighbours : int
        At most ``n``.
    block : int
        Rows of distances held at a time.
    """
    parts = points.split(block)
    held = distances(points, points) if len(parts) == 1 else None  # else made twice: all pairs may not fit
    near, largest = [], []
    for part in parts:
        apart = held if held is not None else distances(part, points)
        near.append(apart.sort(1).values[:, : max(1, min(neighbours, len(points)))])
        largest.append(apart.amax())
    density = torch.exp(-torch.cat(near).square().mean(1)).round(decimals=12)
    n, far, peak = torch.arange(len(points), device=points.device), torch.stack(largest).amax(), []
    for part, mine, own in zip(parts, density.split(block), n.split(block), strict=True):
        apart = held if held is not None else distances(part, points)
        denser = (density[None] > mine[:, None]) | ((density[None] == mine[:, None]) & (n[None] < own[:, None]))
        peak.append(torch.where(denser, apart, far).amin(1))
    return density, (density * torch.cat(peak)).round(decimals=12)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances of ``a (n, D)`` and ``b (m, D)`` over the root of the width, ``(n, m)`` float64."""
    exact = "donot_use_mm_for_euclid_dist"  # products lose what near neighbours differ by
    return torch.cdist(a.double(), b.double(), compute_mode=exact) / a.shape[1] ** 0.5


def used_layer(facts: Facts) -> int:
    """Return the last used tower layer, or where it sees only windows the last one that does not."""
    if facts.feature_layer not in facts.windowed:
        return facts.feature_layer
    return max((i for i in range(facts.encoder_layers) if i not in facts.windowed), default=facts.feature_layer)
