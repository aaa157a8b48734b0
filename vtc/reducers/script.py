"""Script: diverse tokens that matter to the question, optionally agreed on with a graph that marks redundant ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import (
    connectivity,
    greedy_dpp,
    mean_cosine,
    merge_scatter,
    pairwise_top1,
    shrinking_picks,
    take,
    topk,
    topk_mask,
    topk_sorted,
    widened,
)
from vtc.registry import register
from vtc.views import each_view

TEXT_NOTE = "no CLIP text tower: relevance is the tokens' cosine with the prompt's text embeddings"
PLAIN_NOTE = "no text to compare with: all tokens count as equally relevant"


@register(
    "script",
    paper="arXiv:2512.01949",
    code="https://github.com/01yzzyu/script.github.io @ 7e5e2f3",
    licence="Apache-2.0",
    presets={
        "llava15-192": {"keep": 192},
        "llava15-128": {"keep": 128},
        "llava15-64": {"keep": 64},
        "llava15-32": {"keep": 32},
        "llavanext-640": {"keep": 640},
        "llavanext-320": {"keep": 320},
        "llavanext-160": {"keep": 160},
    },
)
@dataclass(frozen=True, kw_only=True)
class Script(Reducer):
    """Greedy MAP of a determinantal point process over tokens weighted by the question, with or without a redundancy graph.

    The kernel of a view is ``r_i cos(f_i, f_j) r_j`` with projected tokens ``f`` and relevances ``r`` scaled to 0..1; every step
    adds the token that raises the determinant most. The graph connects tokens whose cosine is at least ``threshold``; a token with
    many and close neighbours is redundant. With ``rule="joint"`` the ``2 k`` tokens the process picks first are intersected with
    the ``2 k`` least redundant ones; of these the most relevant ``k`` stay, and if they are fewer, picks of the process follow in
    order. An image cut into views shares its budget among them. Survivors stay in raster order; newline tokens are dropped.

    The release loads CLIP's text tower, embeds the question in segments, keeps the better half of them, and takes the *negative*
    dot product with the patches as relevance. LLaVA models do not carry that tower: unless the caller provides the signal
    ``clip_dot`` ``(B, N)`` (see :meth:`clip_dot`), which is then negated as in the release, relevance is the mean cosine of the
    projected tokens with the embeddings of the prompt's text tokens in the language model, and the statistics say so.

    Deviates: the released loop subtracts a token's squared similarity without making it orthogonal to earlier picks, so it is no
    determinantal process, and its graph keeps the *most* connected tokens but never changes the result; the paper, read in
    abstract and second hand only, prunes by both. Here the process is the exact one of the authors' older code, and ``"joint"``
    is this library's reading of the paper (unconfirmed). ``official=True`` does what the release does. Equal relevances count as
    1, where the release keeps the first tokens. Once the kernel's rank is used up, tokens are chosen by relevance. Padding of
    AnyRes crops has no slot and never competes, which it does in the release.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model, all its views together (the release counts per crop).
    rule : {"dpp", "joint"}, default "dpp"
        The process alone, or its picks that the graph does not call redundant.
    threshold : float, default 0.2
        Least cosine of neighbours in the graph.
    hub : int, default 4
        Neighbours (itself included) from which on a token counts by its neighbourhood alone; others are averaged with their mean
        cosine to all tokens.
    gamma : float, default 1.0
        Weight of the neighbours' closeness.
    merge : bool, default False
        Average every dropped token into the kept one with the highest cosine, as the older code does.
    scaling : float, default 1.0
        Weight of a kept token in its average; the others have 1.
    official : bool, default False
        As released: the loop described above, relevance scaled with the release's constants, ``keep // views`` tokens per view.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    wants_text: ClassVar[bool] = True

    rule: Literal["dpp", "joint"] = "dpp"
    threshold: float = 0.2
    hub: int = 4
    gamma: float = 1.0
    merge: bool = False
    scaling: float = 1.0
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown rules, and what the release does not do."""
        super().__post_init__()
        if self.rule not in ("dpp", "joint"):
            raise UnknownArgumentError(f"script: rule={self.rule!r} is not possible; use 'dpp' or 'joint'")
        if not self.scaling > 0:
            raise UnknownArgumentError(f"script: scaling={self.scaling!r} is not possible; use a positive number")
        if self.official and self.rule != "dpp":
            raise UnknownArgumentError("script: the release's graph has no influence; use official=True with rule='dpp'")

    # ---------------------------------------------------------------------------------------------------- relevance
    @staticmethod
    def chosen_text(patches: Tensor, text: Tensor) -> Tensor:
        """Return the better half (at least one) of the text segments of each image, ``(B, T)`` ascending.

        Parameters
        ----------
        patches : Tensor
            ``(B, N, E)`` patches in CLIP's joint space, not normalised.
        text : Tensor
            ``(M, E)`` text embeddings, not normalised.
        """
        fit = _scaled((widened(patches) @ widened(text).T).mean(1))
        return topk_sorted(fit, max(1, len(text) // 2))

    @classmethod
    def clip_dot(cls, patches: Tensor, text: Tensor) -> Tensor:
        """Return the mean dot product ``(B, N)`` of each patch with the chosen segments; see :meth:`chosen_text`."""
        chosen = widened(text)[cls.chosen_text(patches, text)]
        return (widened(patches) @ chosen.transpose(1, 2)).mean(-1)

    def relevance(self, signals: Signals) -> tuple[Tensor, str]:
        """Return the relevances ``(B, N)``, scaled to 0..1, and what the statistics should say."""
        note = ""
        if "clip_dot" in signals.taps:
            raw = -widened(signals.clip_dot)
        elif signals.text is not None:
            note = TEXT_NOTE
            raw = mean_cosine(signals.features, signals.text, signals.text_mask)
        else:
            note, raw = PLAIN_NOTE, torch.zeros(signals.shape, device=signals.features.device)
        if self.official:
            return _scaled(raw), note
        low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
        flat = high <= low
        return torch.where(flat, torch.ones_like(raw), (raw - low) / torch.where(flat, torch.ones_like(high), high - low)), note

    # ---------------------------------------------------------------------------------------------------- selection
    def redundancy(self, features: Tensor) -> Tensor:
        """Return how connected each token is in the graph, ``(B, N)``."""
        count, within, mean = connectivity(features, self.threshold)
        closeness = within / count.clamp(min=1)
        inner = count * (self.gamma * (closeness - self.threshold)).exp()
        return torch.where(count >= self.hub, inner, (inner + mean) / 2)

    def pick(self, features: Tensor, relevance: Tensor, k: int) -> Tensor:
        """Return ``(B, k)`` tokens in the order the process (``official``: the released loop) picks them."""
        return (shrinking_picks if self.official else greedy_dpp)(features, relevance, k)

    def joint(self, features: Tensor, relevance: Tensor, k: int) -> Tensor:
        """Return ``(B, k)`` tokens on which process and graph agree, filled up by the process."""
        n = features.shape[1]
        wide = min(n, 2 * k)
        order = self.pick(features, relevance, wide)
        unlike = topk_mask(-self.redundancy(features), torch.full_like(order[:, 0], wide))
        # those both agree on by relevance, then the others as they were picked
        rank = torch.where(unlike.gather(1, order), relevance.gather(1, order), -torch.inf)
        return order.gather(1, topk(rank, k))

    def choose(self, signals: Signals) -> Selection:
        """Keep the tokens of one view."""
        rule = self.joint if self.rule == "joint" else self.pick
        index = rule(signals.features, signals.relevance, signals.budget).sort(1).values
        if not self.merge:
            return Selection(index)
        tokens, owner = self.absorb(signals.features, index)
        return Selection(index, tokens, owner)

    def absorb(self, features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Average the dropped tokens into the kept ones; return ``(B, K, D)`` and the kept token each went into, ``(B, N)``."""
        with torch.no_grad():
            kept = take(features, index)
            _, owner = pairwise_top1(features, kept)
            places = torch.arange(index.shape[1], device=index.device).expand_as(index)
            owner = owner.scatter(1, index, places)
        weight = widened(features).new_ones(owner.shape).scatter(1, index, self.scaling)
        return merge_scatter(features, owner, index.shape[1], weight=weight), owner

    def select(self, signals: Signals) -> Selection:
        """Keep the tokens of every view."""
        with torch.no_grad():
            relevance, note = self.relevance(signals)
        scored = dataclasses.replace(signals, taps={"relevance": relevance})
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.merge):
            return dataclasses.replace(each_view(scored, self.choose, floor=self.official), note=note)


def _scaled(raw: Tensor) -> Tensor:
    """Rows scaled to 0..1 as in the release, whose constant keeps equal entries finite."""
    low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
    return (raw - low) / (high - low + 1e-6)
