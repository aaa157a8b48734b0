"""CDPruner: a diverse subset of the tokens that matter to the question, by a determinantal point process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.kernels import greedy_dpp, mean_cosine, unit_rows
from vtc.registry import register
from vtc.views import each_view

TEXT_NOTE = "no CLIP text tower: relevance is the tokens' cosine with the prompt's text embeddings"
PLAIN_NOTE = "no text to compare with: all tokens count as equally relevant"


@register(
    "cdpruner",
    paper="arXiv:2506.10967",
    code="https://github.com/Theia-4869/CDPruner @ 9541616",
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
class CDPruner(Reducer):
    """Greedy MAP of a determinantal point process whose kernel is the tokens' similarity scaled by relevance to the question.

    The kernel of a view is ``r_i cos(f_i, f_j) r_j`` with projected tokens ``f`` and relevances ``r`` scaled to 0..1 over the whole
    image; every step adds the token that raises the determinant most. An image cut into views shares its budget among them.
    Survivors stay in raster order; newline tokens are dropped.

    The release loads CLIP's text tower and takes the *negative* cosine between patches and question as relevance. LLaVA models do
    not carry that tower: unless the caller provides the signal ``clip_cosine`` ``(B, N)``, which is then negated as in the release,
    relevance is the mean cosine of the projected tokens with the embeddings of the prompt's text tokens in the language model, and
    the statistics say so.

    Deviates: with text embeddings the cosine keeps its sign, as in the paper; the authors saw the need for the opposite sign with
    CLIP only, and ``negate`` is there for those who want to check (unconfirmed). The scaling to 0..1 never mixes images of a batch,
    and equal relevances count as 1, where the release divides by zero. Once the kernel's rank is used up, tokens are chosen by
    relevance, so that exactly ``keep`` distinct tokens stay. The release resizes AnyRes images to a square without padding or
    newlines; here padding has no slot and never competes.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering the language model, all its views together (the release counts per crop).
    negate : bool, default False
        Take the negative cosine with text embeddings.
    official : bool, default False
        As released: the scaling runs over all images of a batch that have one geometry, similarities are normalised in the model's
        dtype, nothing guards the recurrence (a token chosen twice counts once, so fewer than ``keep`` may stay), and every view
        keeps ``keep // views``.
    """

    stage: ClassVar[Stage] = Stage.BOUNDARY
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "none"
    wants_text: ClassVar[bool] = True

    negate: bool = False
    official: bool = False

    @staticmethod
    def clip_cosine(patches: Tensor, text: Tensor) -> Tensor:
        """Return the mean cosine ``(B, N)`` of CLIP patch embeddings ``(B, N, E)`` with text embeddings ``(M, E)``."""
        return (unit_rows(patches) @ unit_rows(text).T).mean(-1)

    def relevance(self, signals: Signals) -> tuple[Tensor, str]:
        """Return the relevances ``(B, N)``, scaled to 0..1, and what the statistics should say."""
        note = ""
        if "clip_cosine" in signals.taps:
            raw = -signals.clip_cosine
        elif signals.text is not None:
            note = TEXT_NOTE
            raw = mean_cosine(signals.features, signals.text, signals.text_mask)
            raw = -raw if self.negate else raw
        else:
            note, raw = PLAIN_NOTE, torch.zeros(signals.shape, device=signals.features.device)
        if self.official:
            return (raw - raw.min() + 1e-6) / (raw.max() - raw.min()), note
        low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
        flat = high <= low
        scaled = (raw - low + 1e-6) / torch.where(flat, torch.ones_like(high), high - low)
        return torch.where(flat, torch.ones_like(raw), scaled), note

    def pick(self, features: Tensor, relevance: Tensor, k: int) -> Tensor:
        """Return ``(B, k)`` tokens in the order they are chosen (``official``: possibly with repetitions)."""
        if self.official:
            features = features / features.norm(dim=-1, keepdim=True)
        return greedy_dpp(features, relevance, k, guard=not self.official)

    def choose(self, signals: Signals) -> Selection:
        """Keep the tokens of one view."""
        picks = self.pick(signals.features, signals.relevance, signals.budget)
        return Selection(picks.unique()[None] if self.official else picks.sort(1).values)

    def select(self, signals: Signals) -> Selection:
        """Keep the tokens of every view."""
        with torch.no_grad():
            relevance, note = self.relevance(signals)
            scored = dataclasses.replace(signals, taps={"relevance": relevance})
            return dataclasses.replace(each_view(scored, self.choose, floor=self.official), note=note)
