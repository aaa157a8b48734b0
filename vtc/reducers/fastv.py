"""FastV: after a few decoder layers, keep the visual tokens the last prompt token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.core import Need, Newlines, Positions, Scorer, Signals, Stage, Usual
from vtc.registry import register
from vtc.signals import last_attn


@register(
    "fastv",
    paper="arXiv:2403.06764",
    code="https://github.com/pkunlp-icler/FastV @ d165972",
    licence="none found",
    presets={
        "paper": {"layer": 2, "keep": 0.5},
        "k2-r75": {"layer": 2, "keep": 0.25},
        "k3-r50": {"layer": 3, "keep": 0.5},
        "k3-r75": {"layer": 3, "keep": 0.25},
        "llava15-192": {"layer": 2, "keep": 192},
        "llava15-128": {"layer": 2, "keep": 128},
        "llava15-64": {"layer": 2, "keep": 64},
    },
)
@dataclass(frozen=True, kw_only=True)
class FastV(Scorer):
    """Drop the visual tokens the last prompt token attends to least, once, before decoder layer ``layer``.

    Score of a token: attention of the last real token of the row in layer ``layer - 1``, mean over heads, softmax over all
    positions it may see. Survivors keep their original RoPE positions; layers before ``layer`` keep the full KV cache.

    Deviates: the released code applies row 0's choice to the whole batch, ignores padding, hard-codes where the image starts
    and (in its cached variant) stores layer ``layer - 1``'s keys twice; here every image is judged by its own row, and nothing
    runs or is stored twice (``official=True`` restores the first of these, the others are errors of bookkeeping). 192, 128 and
    64 tokens are budgets of later comparisons, not of the authors. The paper describes the average attention a token receives
    from all others; the code, and this reducer, use the last row only.

    Parameters
    ----------
    keep : int or float
        Visual tokens per image entering decoder layer ``layer`` (the paper's R is the share *removed*).
    layer : int, default 2
        First decoder layer that runs on the shorter sequence (the paper's K). By default the first one possible where that is
        later: a Qwen3-VL feeds features of its vision tower to layers 0 to 2, which need all tokens, and ``layer`` is 3 there.
    official : bool, default False
        As released: the choice made for the first image counts for every image of the batch that has the same geometry.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "compete"

    layer: int = Usual(2)
    official: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """The last token's attention row of the layer before."""
        return (last_attn(self.layer - 1),)

    def score(self, signals: Signals) -> Tensor:
        """Return the tapped attention row."""
        return signals.last_attn[:1].expand_as(signals.last_attn) if self.official else signals.last_attn
