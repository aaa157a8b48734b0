"""CoreMatching: keep the visual tokens that fire the same neurons as the question."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.core import Facts, Need, Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import compacted, topk_mask, topk_sorted
from vtc.registry import register
from vtc.schedule import place_cuts
from vtc.signals import StateTap

RELEASED = range(5, 19)
"""Layers (counted from 0) whose tokens the released code chooses, each anew."""


@dataclass(frozen=True)
class Overlap:
    """Measure: number of neurons that fire (are positive) at a token and at the reference, ``(B, Q)``.

    Parameters
    ----------
    reference : int
        Real token of the row the others are compared with, counted from the end (-1: the last one).
    """

    reference: int

    def __call__(self, tap: StateTap) -> Tensor:
        """Count in float32, which holds the numbers exactly."""
        real = tap.valid.sum(1)
        place = (real + self.reference).clamp(min=0)
        index = (tap.valid & (tap.valid.cumsum(1) - 1 == place[:, None])).int().argmax(1)
        fires = tap.hidden > 0
        wanted = fires[torch.arange(len(index), device=index.device), index]
        return (fires & wanted[:, None]).sum(2, dtype=torch.float32)


@dataclass(frozen=True)
class CoreNeurons:
    """Measure: the neurons that fire strongly at most tokens of the prompt, ``(B, M)`` ascending.

    At a token those neurons count whose activation is at least the ``active`` quantile of its positive activations; the neurons
    that count at most tokens are the core, the lowest index first among equals.

    Parameters
    ----------
    share : float
        Share of the layer's neurons that make the core.
    active : float
        Quantile in [0, 1].
    block : int
        Tokens sorted at a time.
    """

    share: float
    active: float
    block: int = 64

    def __call__(self, tap: StateTap) -> Tensor:
        """Count row by row over the real tokens, text and image alike."""
        size = tap.hidden.shape[2]
        # padding is set to zero, where nothing fires
        counts = torch.stack(
            [self.count(x.masked_fill(~real, 0)) for x, real in zip(tap.hidden, tap.valid[..., None], strict=True)]
        )
        return topk_sorted(counts, max(1, round(self.share * size)))

    def count(self, x: Tensor) -> Tensor:
        """Return in how many of the tokens ``(Q, I)`` each neuron counts, ``(I,)`` float32."""
        total = torch.zeros(x.shape[1], device=x.device)
        for part in x.float().split(self.block):
            order = part.clamp(min=0).sort(1).values  # zeros first
            fires = (part > 0).sum(1, keepdim=True)
            place = part.shape[1] - fires + self.active * (fires - 1).clamp(min=0)
            low = place.long().clamp(max=part.shape[1] - 1)
            high = (low + 1).clamp(max=part.shape[1] - 1)
            below, above = order.gather(1, low), order.gather(1, high)
            bound = below + (place - low) * (above - below)
            total += ((part > 0) & (part >= bound)).sum(0)
        return total


def knee(overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(B,)`` place and value of the knee of the descending overlap curve.

    The knee is the first point farthest from the straight line between the curve's ends.

    Parameters
    ----------
    overlap : Tensor
        ``(B, N)``.
    """
    curve = overlap.sort(dim=1, descending=True).values
    n = curve.shape[1]
    place = torch.arange(n, dtype=curve.dtype, device=curve.device)
    wide, fall = n - 1, curve[:, -1:] - curve[:, :1]
    distance = (fall * place - wide * (curve - curve[:, :1])).abs() / (wide**2 + fall**2).sqrt().clamp(min=1e-12)
    at = distance.argmax(1)
    return at, curve.gather(1, at[:, None])[:, 0]


@register(
    "corematching",
    paper="arXiv:2505.19235",
    code="https://github.com/wangqinsi1/2025-ICML-CoreMatching @ 046b24e",
    licence="Apache-2.0",
    presets={
        "llava15": {"keep": 1.0, "layer": 6},
        "llava15-64": {"keep": 64, "layer": 6, "rule": "topk"},
        **{f"neurons-{p}": {"keep": 1.0, "layer": 6, "neurons": p / 100} for p in (20, 40, 60, 80)},
    },
)
@dataclass(frozen=True, kw_only=True)
class CoreMatching(Reducer):
    """Keep the visual tokens that fire most of the neurons the question fires, as many as the knee of that curve says.

    In the MLP of the layer before ``layer``, a neuron fires at a token where ``act(gate) * up`` is positive. A token's overlap
    is the number of neurons that fire both there and at the reference token, the one right behind the question. The overlaps in
    descending order form a curve; tokens strictly above the value at its knee stay, in order and with their positions. No
    attention is needed.

    **Core neurons** (``neurons``, off by default). In every layer those neurons are taken that count at most tokens of the
    prompt, where a neuron counts at a token if its activation is among the upper ones that fire there (``active``); decode
    steps of this conversation run the MLPs on them alone, the prompt itself and forwards of several tokens on all. With several
    rows in a batch each has its own core, and the others' neurons are computed and set to zero: the same tokens as alone,
    without the speed. The released code has no such decoding; the paper's two percentiles are published without their numbers,
    so ``active`` and any ``neurons`` are unconfirmed.

    What that costs and saves, measured with ``python -m vtc.eval.neurons`` (batch 1, float32, one CPU core, medians of five
    alternations; ``results/corematching.md``): on a model 1,024 wide with random weights a decode step is 1.85 times as fast on
    20 % of the neurons, 1.53 times on 40 %, 1.28 times on 60 % and 1.13 times on 80 %, while choosing neurons and cutting the
    projections makes a prompt of 617 tokens a third to a half longer, which 17, 25, 47 and 82 steps earn back; on the embedded
    model, 128 wide, steps gain 3 to 9 %, and 69 to 261 of them are needed. The cut projections take as much memory again as
    that share of the MLPs, for every conversation. So it pays for long answers of wide models at batch 1 only, and not for the
    short answers most benchmarks ask for. The embedded model's greedy answers stayed the same in 144 of 150 cases on 20 % and
    in all on 40 % and more, but they are mostly one word, whose first token the prompt decides.

    Deviates: the released code shortens nothing: in every layer from 5 to 18 it chooses anew and overwrites the others' keys
    and values with zeros, which still take part in the softmax. Here tokens really leave, once, before ``layer`` (the paper's
    way; its layer is unconfirmed). The paper's definition by percentiles over the whole sentence is published without its
    numbers; the release compares with a single token, five from the end in its prompt, which is ``reference``. Where the knee
    keeps more than ``keep`` tokens, those with the largest overlap stay, the lowest index first among equals; where all
    overlaps are equal, so that none is above the knee, it says nothing and ``keep`` decides alone.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per image entering decoder layer ``layer``; exactly so many with ``rule="topk"``.
    layer : int or float, default 6/32
        First decoder layer that runs on the shorter sequence: an index, or a share of the layers.
    rule : {"knee", "topk"}
        What decides how many stay.
    reference : int, default -5
        Token compared with, counted from the end of the prompt: where the prompt ends in ``"{question} ASSISTANT:"``, -5 is the
        first piece of the last word with LLaMA's tokenizer. Prompts shorter than that use their first token.
    neurons : float or None, default None
        Share of every MLP's neurons that decode steps run on; ``None``: all.
    active : float, default 0.2
        With ``neurons``: quantile of a token's positive activations from which on a neuron counts at this token.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "original"
    default_newlines: ClassVar[Newlines] = "compete"

    layer: int | float = 6 / 32  # type: ignore[assignment]
    rule: Literal["knee", "topk"] = "knee"
    reference: int = -5
    neurons: float | None = None
    active: float = 0.2

    def __post_init__(self) -> None:
        """Refuse options that cannot mean anything."""
        super().__post_init__()
        if self.rule not in ("knee", "topk"):
            raise UnknownArgumentError(f"'corematching': rule={self.rule!r} is not possible; use one of knee, topk")
        if not isinstance(self.reference, int) or self.reference >= 0:
            raise UnknownArgumentError(
                f"'corematching': reference={self.reference!r} is out of range, give a negative int (-1 is the last token)"
            )

        for option, value in (("neurons", 1.0 if self.neurons is None else self.neurons), ("active", self.active)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1 or (option == "neurons" and value == 0):
                raise UnknownArgumentError(f"'corematching': {option}={value!r} is out of range, give a share such as 0.4")

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """The knee may keep fewer than asked for."""
        return self.rule == "knee"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Overlap in the layer before."""
        return (Need("overlap", "text", int(self.layer) - 1, Overlap(self.reference), of="neurons"),)

    def decode_neurons(self, facts: Facts) -> tuple[Need, ...]:
        """Core neurons of every layer."""
        if self.neurons is None:
            return ()
        measure = CoreNeurons(self.neurons, self.active)
        return tuple(Need("core_neurons", "text", i, measure, of="neurons", axis="row") for i in range(facts.layers))

    def bind(self, facts: Facts) -> CoreMatching:
        """Place the cut.

        Raises
        ------
        BudgetError
            A budget above the tokens there are.
        UnknownArgumentError
            A layer this model does not have.
        """
        super().bind(facts)
        (layer,) = place_cuts((self.layer,), facts, "corematching", "layer")
        return dataclasses.replace(self, layer=layer)

    def select(self, signals: Signals) -> Selection:
        """Apply the knee, then the budget."""
        with torch.no_grad():
            overlap = signals.overlap.float()
            if self.rule == "topk":
                return Selection(topk_sorted(overlap, signals.budget))
            above = overlap > knee(overlap)[1][:, None]
            above |= ~above.any(1, keepdim=True)
            index, valid = compacted(topk_mask(overlap, above.sum(1).clamp(max=signals.budget)))
        return Selection(index, valid=valid)
