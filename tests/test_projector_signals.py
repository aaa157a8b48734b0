"""Signals of the projector where tokens are joined behind it: the mean of their patches, frame by frame, clip by clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import GRID, build, make_inputs, shared
from pickers import BoundaryPicker
from reference import given_to_projector
from torch import Tensor

import vtc
from vtc.core import Need, Selection, Signals
from vtc.errors import UnsupportedFeatureError
from vtc.signals import ProjectionTap, sensitivity

CLIPS = "llava_onevision:clips"


def twice(tap: ProjectionTap) -> Tensor:
    """Two numbers of what the projector is given and returns, ``(V, P, 2)``."""
    return torch.stack([tap.features.sum(-1), tap.function()(tap.features).abs().sum(-1)], -1)


@dataclass(frozen=True, kw_only=True)
class Spy(BoundaryPicker):
    seen: ClassVar[list[Tensor]] = []
    needs: ClassVar[tuple[Need, ...]] = (Need("twice", "vision", -1, twice, of="projection"),)

    def select(self, signals: Signals) -> Selection:
        self.seen.extend(signals.twice)
        return super().select(signals)


def by_hand(model, inputs: dict[str, Tensor]) -> Tensor:
    """The same per pooled token: the mean of 2 x 2 patches, ``(frames, tokens, 2)``."""
    patches = given_to_projector(model, inputs)
    with torch.no_grad():
        values = torch.stack([patches.sum(-1), model.model.multi_modal_projector(patches).abs().sum(-1)], 1)
    return F.avg_pool2d(values.unflatten(-1, (GRID, GRID)), 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("images", [[1], [2], [1, 1]], ids=str)
def test_a_pooled_token_has_the_mean_of_its_patches(images: list[int]) -> None:
    model = shared(CLIPS)
    inputs = make_inputs(CLIPS, model, images=images)
    Spy.seen.clear()
    with vtc.patch(model, Spy(keep=3)), torch.no_grad():
        model(**inputs)
    want = by_hand(model, inputs).reshape(sum(images), -1, 2)
    assert len(Spy.seen) == sum(images)
    for got, own in zip(Spy.seen, want, strict=True):
        torch.testing.assert_close(got[: len(own)], own, atol=1e-9, rtol=0)
        assert not got[len(own) :].any(), "a newline has no signal"


@pytest.mark.parametrize("reducer", ["zooprune", "globalcom2"])
def test_every_frame_is_ranked_by_its_own_patches(reducer: str) -> None:
    """Other frames behind the first two change what is kept of them; a clip keeps what it keeps alone."""
    model = build(CLIPS)
    pixels = torch.randn(2, 8, 3, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slots = 8 * 4 + 1

    def kept(clips: Tensor) -> list[list[int]]:
        ids = torch.cat(
            [torch.full((len(clips), 3), 5), torch.full((len(clips), slots), 101), torch.full((len(clips), 2), 7)], 1
        )
        with vtc.patch(model, reducer, keep=12) as handle, torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=clips)
            return [it.entries.tolist() for it in handle.stats.kept]

    other = pixels.clone()
    other[:, 2:] = torch.randn(other[:, 2:].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (first,), (changed,) = kept(pixels[:1]), kept(other[:1])
    assert first != changed
    assert kept(pixels) == [*kept(pixels[:1]), *kept(pixels[1:])]
    assert len({*map(tuple, kept(pixels))}) == 2


def test_zooprune_keeps_what_its_signal_ranks_first() -> None:
    model = shared(CLIPS)
    inputs = make_inputs(CLIPS, model)
    need = sensitivity(directions=8)
    patches = given_to_projector(model, inputs)
    with torch.no_grad():
        score = need.measure(ProjectionTap(patches, lambda rank=None: model.model.multi_modal_projector, None))
    score = F.avg_pool2d(score.unflatten(-1, (GRID, GRID))[:, None], 2).flatten()

    @dataclass(frozen=True, kw_only=True)
    class Highest(BoundaryPicker):
        needs: ClassVar[tuple[Need, ...]] = (need,)

        def select(self, signals: Signals) -> Selection:
            return Selection(signals.sensitivity.topk(signals.budget, -1).indices.sort(-1).values)

    with vtc.patch(model, Highest(keep=5, newlines="none")) as handle, torch.no_grad():
        model(**inputs)
    assert handle.stats.kept[0].entries.tolist() == score.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize("change", [lambda t: t[:, :-1], lambda t: t[:-1], lambda t: torch.cat([t, t])])
@pytest.mark.parametrize("name", ["llava", "llava_next", CLIPS])
def test_a_recorded_length_that_is_not_the_layouts_is_an_error(name: str, change) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(BoundaryPicker):
        needs: ClassVar[tuple[Need, ...]] = (Need("odd", "vision", -1, lambda tap: change(twice(tap)), of="projection"),)

    model = shared(name)
    inputs = make_inputs(name, model, 2)
    with vtc.patch(model, Odd(keep=3)), torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="image settings"):
        model(**inputs)
