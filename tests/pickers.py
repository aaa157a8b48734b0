"""Small reducers for the engine's tests: fixed pseudo-random choices that differ from image to image.

An image's *mark* is the fingerprint the engine gives for it when it is alone (:func:`marks_of`); the choice is a function of the
mark, a salt and the slot. So the references can make the same choice without the engine, and an engine that mixes up images is
caught.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from models import case_of, image_features, image_ids
from torch import Tensor, nn

import vtc
from vtc.core import EncoderReducer, EncoderState, ImageReducer, Need, Reducer, Schedule, Selection, Signals, Stage
from vtc.signals import keys


def draw(mark: int, salt: int, n: int) -> Tensor:
    """One random number per slot."""
    return torch.rand(n, generator=torch.Generator().manual_seed((mark + 7919 * salt) % (1 << 62)))


def pick(mark: int, salt: int, total: int, candidates: Tensor, k: int) -> Tensor:
    """Positions (ascending) of ``k`` of the ``candidates`` among ``total`` slots."""
    return draw(mark, salt, total)[candidates.cpu()].topk(k).indices.sort().values


def fewer(mark: int, salt: int, k: int) -> int:
    """``k``, or a little less: another number for another image."""
    return max(1, k - (mark + salt) % 3)


def merged(features: Tensor, kept: Tensor) -> Tensor:
    """New features of the kept tokens: every other token is added to one of them in turn."""
    rest = torch.ones(len(features), dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
    owner = torch.arange(len(rest)) % len(kept)
    total = features[kept].index_add(0, owner, features[rest])
    count = torch.ones(len(kept), dtype=features.dtype).index_add(0, owner, torch.ones(len(rest), dtype=features.dtype))
    return 1.2 * total / count[:, None]


@dataclass(frozen=True, kw_only=True)
class Picker(Reducer):
    """Keep ``keep`` tokens at random; ``ragged``: a number that differs between images; ``merge``: average the others in."""

    wants_fingerprint: ClassVar[bool] = True
    stage: ClassVar[Stage] = Stage.BOUNDARY
    name: ClassVar[str] = "picker"

    salt: int = 1
    ragged: bool = False
    merge: bool = False

    def select(self, signals: Signals) -> Selection:
        index, features = [], []
        for image, mark in enumerate(signals.fingerprint):
            k = fewer(mark, self.salt, signals.budget) if self.ragged else signals.budget
            total = len(signals.layout)
            index.append(pick(mark, self.salt, total, signals.entries[image], k))
            features.append(merged(signals.features[image], index[-1]) if self.merge else signals.features[image][index[-1]])
        longest = max(map(len, index))
        pad = [longest - len(i) for i in index]
        valid = torch.stack([torch.arange(longest) < len(i) for i in index])
        return Selection(
            torch.stack([torch.cat([i, i.new_zeros(p)]) for i, p in zip(index, pad, strict=True)]),
            torch.stack([torch.cat([f, f.new_zeros(p, f.shape[1])]) for f, p in zip(features, pad, strict=True)])
            if self.merge
            else None,
            valid=None if valid.all() else valid,
        )


@dataclass(frozen=True, kw_only=True)
class BoundaryPicker(Picker):
    name: ClassVar[str] = "boundary_picker"


@dataclass(frozen=True, kw_only=True)
class VisionPicker(Picker):
    stage: ClassVar[Stage] = Stage.VISION
    name: ClassVar[str] = "vision_picker"


@dataclass(frozen=True, kw_only=True)
class DecoderPicker(Picker):
    stage: ClassVar[Stage] = Stage.DECODER
    name: ClassVar[str] = "decoder_picker"

    layer: int = 2


@dataclass(frozen=True, kw_only=True)
class TwoLayerPicker(Schedule):
    """Two reductions inside the decoder."""

    stage: ClassVar[Stage] = Stage.DECODER  # (hypothesis prints every field that the class declares)
    name: ClassVar[str] = "two_layer_picker"

    ragged: bool = False
    merge: bool = False

    def parts(self) -> tuple[Reducer, ...]:
        shared = dict(ragged=self.ragged, merge=self.merge, positions=self.positions, newlines=self.newlines)
        return (
            DecoderPicker(keep=0.6, layer=2, salt=2, **shared),
            DecoderPicker(keep=0.3, layer=4, salt=3, **shared),
        )


@dataclass(frozen=True, kw_only=True)
class ImagePicker(ImageReducer):
    """Shrink every view to 2 x 3 patches."""

    name: ClassVar[str] = "image_picker"
    small: ClassVar[tuple[int, int]] = (2, 3)

    def target_grid(self, grid, facts):
        return self.small

    def resize(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        return nn.functional.interpolate(pixels.double(), size, mode="bilinear", antialias=True).to(pixels.dtype)


def best(score: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """``(V, n)`` bool: the ``count (V,)`` highest scores of each view."""
    order = score.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (rank < count[:, None]) & valid


@dataclass(frozen=True, kw_only=True)
class EncoderPicker(EncoderReducer):
    """Drop in two tower layers by the sum of the keys; ``ragged``: another number of patches for each view."""

    name: ClassVar[str] = "encoder_picker"

    ragged: bool = False

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        return (keys(layer),) if layer < 2 else ()

    def step(self, state: EncoderState):
        score = state.taps["keys"].sum(-1)
        if state.layer == 0:
            return {"before": score}, best(score, state.valid, state.target + 4)
        less = 3 * (score[:, 0] > score[:, 1]).long() if self.ragged else 0
        return {}, best(score + state.carry["before"], state.valid, state.target - less)


# --------------------------------------------------------------------------------------------------------------- marks
@dataclass(frozen=True, kw_only=True)
class _Spy(Picker):
    name: ClassVar[str] = "spy"
    seen: ClassVar[list[int]] = []

    def select(self, signals: Signals) -> Selection:
        self.seen.extend(signals.fingerprint)
        return super().select(signals)


def marks_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """Return every image's fingerprint, taken from a prompt with this image alone."""
    marks = []
    for i, features in enumerate(image_features(model, inputs)):
        one = case_of(model).one(inputs, model, i)
        ids = torch.tensor([[3, 4, *image_ids(model, 0, len(features), one), 5]])
        one |= {"input_ids": ids, **case_of(model).extra(ids, ids.shape[1])}
        with vtc.patch(model, _Spy(keep=1)), torch.no_grad():
            _Spy.seen.clear()
            model(**one)
        assert len(_Spy.seen) == 1
        marks += _Spy.seen
    return marks
