"""IVC-Prune: keep tokens whose rotary positions carry the picture's coordinates, and the foreground that the text's values find."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import attention_colsum, compacted, topk, topk_mask
from vtc.registry import register
from vtc.schedule import place_cuts
from vtc.signals import AttentionTap, RotationTap, places

SKIPPED = 2
"""Tokens behind the image that do not count as text: the release takes them for the template's."""


def table_mean(table: Tensor) -> Tensor:
    """Return the mean ``(B, Q)`` float64 over all frequencies and axes of cosines or sines ``(A, B, Q, d)``.

    On a grid cells ``(a, b)`` and ``(b, a)`` have the same mean, and get the same number: their two axes are added first.
    """
    each = table.double().mean(-1)
    return (each[0] + each[1:].sum(0)) / len(each)


def _cos_mean(tap: RotationTap) -> Tensor:
    """Mean cosine of each token's rotation, ``(B, Q)``."""
    return table_mean(tap.cos)


def _sin_mean(tap: RotationTap) -> Tensor:
    """Mean sine of each token's rotation, ``(B, Q)``."""
    return table_mean(tap.sin)


def _image_values(tap: AttentionTap) -> Tensor:
    """Value vectors of all tokens, ``(B, K, Hkv, d)``."""
    return tap.value.transpose(1, 2)


def _word_values(tap: AttentionTap) -> Tensor:
    """Value vectors of the row's text tokens, ``(B, T, Hkv, d)``."""
    index, real = tap.listed(question=False)
    at = index + tap.value.shape[2] - tap.query.shape[2]
    values = tap.value.transpose(1, 2)
    found = values[torch.arange(len(at), device=at.device)[:, None], at]
    return torch.where(real[..., None, None], found, torch.zeros_like(found))


def _text_places(tap: AttentionTap) -> Tensor:
    """Index of the row's text tokens among its real tokens, ``(B, T)`` int64; -1 where there is none."""
    index, real = tap.listed(question=False)
    return torch.where(real, (tap.valid.cumsum(1) - 1).gather(1, index), -1)


@register(
    "ivcprune",
    paper="arXiv:2602.03060",
    code="https://github.com/FireRedTeam/IVC-Prune @ 03afd9c",
    licence="none found (a badge names MIT)",
    presets={
        "llava15": {"keep": 0.31, "layer": 16, "rule": "union"},
        "qwen25vl-7b": {"keep": 0.5, "layer": 16, "rule": "fill"},
        "qwen25vl-3b": {"keep": 0.5, "layer": 22, "rule": "fill"},
    },
)
@dataclass(frozen=True, kw_only=True)
class IVCPrune(Reducer):
    """Before one decoder layer keep tokens whose rotary position is a coordinate, and those the text's values are similar to.

    *Coordinates* are the visual tokens whose rotation is closest to none (largest mean cosine over all frequencies) and closest to
    a right angle (largest mean sine): chosen by position alone. *Foreground* comes from the value vectors of layer ``layer - 1``,
    which carry no position: a softmax over value products is averaged over the text behind the image, whose best image tokens are
    the *seeds*; then averaged over this text and the seeds together. Survivors keep their original positions.

    Two rules are released. ``"union"`` (LLaVA-1.5; softmax over text and image): the best 20 % by the second score, 1 % seeds and
    5 % of either kind of coordinates, overlaps counted once. ``"fill"`` (Qwen2.5-VL; softmax over the image alone): 1 % seeds and
    10 % of either kind of coordinates, filled up by the second score to 50 %. Other budgets scale these shares.

    Deviates: layers before ``layer`` keep their whole KV cache, as with all reducers inside the decoder here; the release cuts them
    to the survivors after the prompt (on LLaVA all but the first), so answers may differ from the first token generated with the
    cache on. Every image of a prompt is reduced, each as if it were alone with the text; the release takes the first one only. The
    two tokens behind an image do not count as text, as released, unless there are no others; without any text behind it the row's
    last text token stands in, where the release divides by zero. Cosines and sines are float32 in every model, equal ones go to the
    lowest index, which on square grids decides between mirrored cells. Coordinates and seeds above the budget are thinned by the
    second score. Budgets are rounded half to even, as released. Settings of InternVL2.5 and DeepSeek-VL2 are not included.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering decoder layer ``layer``; with ``"union"`` the most, since overlaps count once: 0.31 is the
        release's setting, and 0.5 that of ``"fill"``.
    layer : int or float, default 0.5
        First decoder layer that runs on the shorter sequence: an index, or a share of the model's layers.
    rule : {"union", "fill"} or None
        ``None``: ``"fill"`` on models with multi-dimensional positions, otherwise ``"union"``.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "compete"

    layer: int | float = 0.5  # type: ignore[assignment]
    rule: Literal["union", "fill"] | None = None

    def __post_init__(self) -> None:
        """Refuse rules that do not exist."""
        super().__post_init__()
        if self.rule not in (None, "union", "fill"):
            raise UnknownArgumentError(f"ivcprune: rule={self.rule!r} is not possible; use one of union, fill")

    def bind(self, facts: Facts) -> Reducer:
        """Place the layer and choose the rule of this kind of model."""
        super().bind(facts)
        (layer,) = place_cuts((self.layer,), facts, "ivcprune", "layer")
        return dataclasses.replace(self, layer=layer, rule=self.rule or ("fill" if facts.mrope else "union"))

    @property
    def needs(self) -> tuple[Need, ...]:
        """Values of the layer before (of layer 1 until bound to a model), and the rotations of this one."""
        layer = self.layer if isinstance(self.layer, int) else 2
        return (
            Need("image_values", "text", layer - 1, _image_values),
            Need("word_values", "text", layer - 1, _word_values, axis="row"),
            Need("text_places", "text", layer - 1, _text_places, axis="row"),
            places(layer),
            Need("cos_mean", "text", layer, _cos_mean, of="rotation"),
            Need("sin_mean", "text", layer, _sin_mean, of="rotation"),
        )

    # --------------------------------------------------------------------------------------------------------- counts
    def scale(self, budget: int, n: int) -> float:
        """Return what the release's shares are multiplied by when ``budget`` of ``n`` tokens are to stay."""
        whole = 0.31 if self.rule == "union" else 0.5
        return (self.keep if isinstance(self.keep, float) else budget / n) / whole

    def sizes(self, budget: int, n: int) -> tuple[int, int, int]:
        """Return how many seeds, coordinates of either kind, and foreground tokens there are (the last with ``"union"`` only)."""
        scale, union = self.scale(budget, n), self.rule == "union"
        counts = max(1, round(scale * 0.01 * n)), round(scale * (0.05 if union else 0.1) * n), round(scale * 0.2 * n) * union
        return tuple(min(count, n) for count in counts)  # type: ignore[return-value]

    def count(self, n: int, facts: Facts) -> int:
        """Return the tokens an image keeps, with ``"union"`` the most."""
        budget = super().count(n, facts) if self.keep is None else self.budget.tokens(n)
        if self.rule != "union" or not isinstance(self.keep, float) or budget == n:
            return budget
        seeds, coordinates, foreground = self.sizes(budget, n)
        return min(n, seeds + 2 * coordinates + foreground)

    # --------------------------------------------------------------------------------------------------------- scores
    @staticmethod
    def question(signals: Signals) -> Tensor:
        """Mark the text ``(B, T)`` whose values look for the foreground."""
        at, last = signals.text_places, signals.places.amax(1, keepdim=True)
        behind, far = at > last, at > last + SKIPPED
        found = torch.where(far.any(1, keepdim=True), far, behind)
        return torch.where(found.any(1, keepdim=True), found, at == at.amax(1, keepdim=True))

    def similarity(self, signals: Signals, image: int, query: Tensor, weight: Tensor | None) -> Tensor:
        """Return ``(N,)``: what some tokens' values ``(R, Hkv, d)`` give every image token, weighted and summed."""
        own, words = signals.image_values[image], signals.word_values[image]
        key, mask = own, None
        if self.rule == "union":
            key, real = torch.cat([own, words]), signals.text_places[image] >= 0
            mask = torch.cat([torch.ones(len(own), dtype=torch.bool, device=real.device), real])[None, None, None]
        rows, keys = (t.transpose(0, 1)[None] for t in (query, key))
        weight = None if weight is None else weight[None].to(query.dtype)
        return attention_colsum(rows, keys, mask=mask, weight=weight)[0, : len(own)]

    def scores(self, signals: Signals, seeds: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the score of every image token by the text ``(B, N)``, the seeds ``(B, M)``, and the score by both."""
        asked, first, chosen, second = self.question(signals), [], [], []
        for image, use in enumerate(asked):
            total, rows = self.similarity(signals, image, signals.word_values[image], use), use.sum()
            first.append(total / rows)
            chosen.append(topk(first[-1][None], seeds)[0])
            more = self.similarity(signals, image, signals.image_values[image, chosen[-1]], None)
            second.append((total + more) / (rows + seeds))
        return torch.stack(first), torch.stack(chosen), torch.stack(second)

    # --------------------------------------------------------------------------------------------------------- choice
    def sets(self, signals: Signals) -> dict[str, Tensor]:
        """Return the scores and the sets ``(B, N)`` bool that the choice is made of."""
        seeds, coordinates, foreground = self.sizes(signals.budget, signals.shape[1])
        first, chosen, second = self.scores(signals, seeds)

        def best(score: Tensor, count: int) -> Tensor:
            return topk_mask(score, torch.full((len(score),), count, device=score.device))

        return {
            "seed_scores": first,
            "refined_scores": second,
            "seeds": torch.zeros_like(second, dtype=torch.bool).scatter(1, chosen, True),
            "ivc_cos": best(signals.cos_mean.double(), coordinates),
            "ivc_sin": best(signals.sin_mean.double(), coordinates),
            "foreground": best(second, foreground),
        }

    def select(self, signals: Signals) -> Selection:
        """Unite the sets, or fill the coordinates and seeds up."""
        with torch.no_grad():
            found, whole = self.sets(signals), signals.budget
            score, prior = found["refined_scores"], found["seeds"] | found["ivc_cos"] | found["ivc_sin"]

            def best(among: Tensor, count: Tensor) -> Tensor:
                return topk_mask(score.masked_fill(~among, -torch.inf), count) & among

            prior = best(prior, torch.full((len(score),), whole, device=score.device))
            others = ~prior & (found["foreground"] if self.rule == "union" else torch.ones_like(prior))
            kept = prior | best(others, whole - prior.sum(1))
            index, valid = compacted(kept, whole if self.rule == "fill" else None)
            return Selection(index, valid=valid)
