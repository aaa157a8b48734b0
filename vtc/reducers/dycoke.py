"""DyCoke: in windows of four frames, drop the tokens that resemble the same place of an earlier frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Positions, Selection, Signals
from vtc.errors import UnknownArgumentError, UnsupportedFeatureError
from vtc.kernels import apportion, topk_sorted
from vtc.registry import register
from vtc.video import THINNED, ClipReducer, check_number, cosines, spread, thinned, whole_frames


@register(
    "dycoke",
    paper="arXiv:2411.15024",
    code="https://github.com/KD-TAO/DyCoke @ dd74634",
    licence="Apache-2.0",
    presets={
        "release-k70": {"keep": 1.0, "ratio": 0.7, "official": True},
    },
)
@dataclass(frozen=True, kw_only=True)
class DyCoke(ClipReducer):
    """Keep the first frame of every window of four whole, and of the others what resembles it least.

    The second and the fourth frame of a window are compared with the frame directly before, the third with the first, place by
    place, always with the whole frame. Of each of them the same number of tokens with the lowest cosines stays. Nothing is
    averaged, although the release speaks of merging. No text, no attention.

    The release knows the share that goes (``ratio``), not a number of tokens; here a budget is met exactly: what does not divide
    evenly goes to the least similar tokens of all. Below what the whole frames take, those are thinned evenly, which the
    statistics say; so is an image.

    Deviates: the release lists a reduced frame's tokens by similarity; here tokens stay in raster order (:func:`released_order`
    has the release's). It reduces no third frame in a clip's last window, drops the last frame of an odd number, and fails on
    clips of four frames or fewer; here all windows are treated alike (``official=True`` restores the release). Its second part,
    which at every decoding step lets the later layers attend only to the visual tokens the new token attends to most and keeps
    them all in memory, is not done in the model: it shortens no cache. :func:`decode_keys` is its rule, as a function.

    Parameters
    ----------
    keep : int or float
        Visual tokens per clip entering the language model; 1.0 with ``ratio``.
    ratio : float or None
        Share of every reduced frame that goes, instead of a budget; what is left of it is rounded down.
    official : bool, default False
        The release's windows, with ``ratio``; clips of at most four frames are refused, images stay whole.
    """

    default_positions: ClassVar[Positions] = "compact"

    ratio: float | None = None
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        super().__post_init__()
        if self.ratio is not None:
            check_number("dycoke", "ratio", self.ratio, 0, 1)
            if self.keep not in (None, 1.0) or self.avg_tokens is not None:
                raise UnknownArgumentError("dycoke: ratio= says how much goes; give keep=1.0 with it, or keep= without ratio")
        if self.official and self.ratio is None:
            raise UnknownArgumentError("dycoke: official=True goes with ratio=, such as 0.7, and keep=1.0")

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the number follows from ``ratio`` and the number of frames."""
        return self.ratio is not None

    def choose(self, signals: Signals) -> Selection:
        """Reduce one clip."""
        with torch.no_grad():
            tokens, _ = whole_frames(signals, "dycoke")
            frames, n = tokens.shape
            if not signals.layout.video and self.official:
                return Selection.all(signals.shape[1], 1, tokens.device)
            if self.official and frames <= 4:
                raise UnsupportedFeatureError(
                    f"dycoke: the release fails on a clip of {frames} frames: use official=False, or more than 4 frames"
                )
            if frames == 1:
                return thinned(signals, tokens[0]) if self.ratio is None else Selection(tokens)
            refs = references(frames, official=self.official)
            whole = [t for t, ref in refs.items() if ref is None]
            cut = [t for t, ref in refs.items() if ref is not None]
            if self.ratio is None and signals.budget < len(whole) * n:
                shares = apportion(signals.budget, [1.0] * len(whole), [n] * len(whole))
                parts = [spread(tokens[t], k) for t, k in zip(whole, shares, strict=True) if k]
                return Selection(torch.cat(parts)[None], note=THINNED)
            kept = torch.zeros(frames, n, dtype=torch.bool, device=tokens.device)
            kept[whole] = True
            if cut:
                likeness = similarities(signals.features[0], tokens, refs)
                left = None if self.ratio is not None else signals.budget - len(whole) * n
                kept[cut] = least(torch.stack([likeness[t] for t in cut]), left, int((1 - (self.ratio or 0)) * n))
            return Selection(tokens[kept].sort().values[None])


def least(likeness: Tensor, budget: int | None, each: int) -> Tensor:
    """Mark the least similar tokens of every frame ``(F, n)``: ``each`` of them, or ``budget`` in all, shared evenly.

    What of a budget does not divide evenly goes to the least similar tokens of all frames.
    """
    frames, n = likeness.shape
    each = each if budget is None else min(budget // frames, n)
    kept = torch.zeros_like(likeness, dtype=torch.bool)
    if each:
        kept.scatter_(1, topk_sorted(-likeness, each), True)
    more = 0 if budget is None else min(budget - each * frames, kept.numel() - each * frames)
    if more:
        rest = likeness.masked_fill(kept, torch.inf).flatten()
        kept.view(-1)[topk_sorted(-rest[None], more)[0]] = True
    return kept


def references(frames: int, *, official: bool = False) -> dict[int, int | None]:
    """Return the frame every frame is compared with, ``None`` for whole frames; frames the release loses are left out."""
    found: dict[int, int | None] = {}
    for t in range(frames - frames % 2 if official else frames):
        if t % 2:
            found[t] = t - 1
        else:
            found[t] = t - 2 if t % 4 == 2 and (t - 2 < frames - 4 or not official) else None
    return found


def similarities(features: Tensor, tokens: Tensor, refs: dict[int, int | None]) -> dict[int, Tensor]:
    """Return the cosines ``(n,)`` of every compared frame of ``features (N, D)`` with its reference; ``tokens (T, n)``."""
    return {t: cosines(features[tokens[t]], features[tokens[ref]]) for t, ref in refs.items() if ref is not None}


def released_order(kept: Tensor, tokens: Tensor, likeness: dict[int, Tensor]) -> Tensor:
    """Return the ``kept (K,)`` tokens as the release lists them: frame by frame, those of a reduced frame by similarity."""
    parts = []
    for t, own in enumerate(tokens):
        here = torch.isin(own, kept).nonzero()[:, 0]
        if t in likeness:
            here = here[torch.sort(likeness[t][here], stable=True).indices]
        parts.append(own[here])
    return torch.cat(parts)


def decode_keys(
    attention: Tensor, before: Tensor | None, start: int, length: int, *, prune: float = 0.8, threshold: float = 0.9
) -> tuple[Tensor, float, Tensor]:
    """Choose the keys the later layers of one decoding step attend to, as the release does.

    Parameters
    ----------
    attention : Tensor
        ``(H, S)`` softmax row of the new token in the layer before.
    before : Tensor or None
        ``(length,)`` the last step's visual attention; ``None`` in the first step.
    start, length : int
        Where the visual tokens are.
    prune : float, default 0.8
        Share of the visual tokens left out.
    threshold : float, default 0.9
        Cosine with the last step's attention from which on nothing is left out.

    Returns
    -------
    keys : Tensor
        ``(K,)`` ascending.
    similarity : float
        Cosine with the last step's attention; 0 in the first step.
    visual : Tensor
        ``(length,)`` attention of this step, for the next one.
    """
    row = attention.mean(0)
    visual, every = row[start : start + length], torch.arange(attention.shape[1], device=attention.device)
    similarity = 0.0 if before is None else float(torch.nn.functional.cosine_similarity(visual, before, dim=0))
    if similarity >= threshold:
        return every, similarity, visual
    count = int(length * (1 - prune))
    kept = topk_sorted(visual[None], count)[0] if count else every[:0]
    return torch.cat([every[:start], kept + start, every[start + length :]]), similarity, visual
