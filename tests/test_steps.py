"""What reducers inside the vision tower promise, on plain tensors: ``step`` and ``merge`` run through a tower made of numbers.

The engine's bookkeeping is replaced by lists here: a *place* is the list of the patches that a token stands for, so dropping takes
places out and merging joins them. The cases are the registry's reducers of the stage encoder; nobody adds one by hand.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.core import EncoderMerger, EncoderReducer, EncoderState, Facts, Stage
from vtc.reducers.tome import match

WIDE = {"keys": (4,), "values": (4,)}
"""What the signals of a token have behind the batch and the tokens, where that is more than one number."""

REDUCERS = [name for name in vtc.list_reducers() if Stage.ENCODER.value in vtc.info(name).stages]
FACTS = Facts(
    family="plain",
    layers=4,
    encoder_layers=0,
    feature_layer=0,
    tokens=None,
    max_tokens=None,
    grid=(1, 1),
    has_cls=True,
    provides=frozenset({"attention", "cls"}),
    stages=dict.fromkeys(Stage, ""),
)
Places = list[list[list[int]]]
"""For every view the places of its tokens, each the list of its patches."""


@dataclass
class Tower:
    """Signals of ``feature_layer + 1`` layers for every patch of the views of some images.

    Attributes
    ----------
    facts : Facts
        Of the model.
    views : tuple of int
        Views of each image.
    values : {"spread", "ties", "same"}
        Kind of numbers: normally distributed, a handful of whole ones, one for all.
    seed : int
        Of the numbers.
    """

    facts: Facts
    views: tuple[int, ...]
    values: str
    seed: int

    def numbers(self, image: int) -> range:
        """Of the views of an image."""
        start = sum(self.views[:image])
        return range(start, start + self.views[image])

    def signal(self, name: str, layer: int, view: int) -> Tensor:
        """One signal of a view's patches, ``(patches, ...)``: positive, and attention sums to one."""
        seed = random.Random(f"{name} {layer} {view} {self.seed}").getrandbits(40)
        generator = torch.Generator().manual_seed(seed)
        shape = (self.facts.grid[0] * self.facts.grid[1], *WIDE.get(name, ()))
        if self.values == "spread":
            drawn = torch.randn(shape, generator=generator).abs()
        elif self.values == "ties":
            drawn = torch.randint(1, 4, shape, generator=generator).float()
        else:
            drawn = torch.full(shape, 0.5)
        return drawn if name in WIDE else drawn / drawn.sum()


def walk(
    part: EncoderReducer, tower: Tower, images: Sequence[int] | None = None, *, padding: float = 7.0
) -> tuple[list[Places], list[int]]:
    """Run all layers on some of the images; return the places after each layer that changed something, and the views' targets."""
    images = range(len(tower.views)) if images is None else images
    facts, n = tower.facts, tower.facts.grid[0] * tower.facts.grid[1]
    numbers = [view for i in images for view in tower.numbers(i)]
    places: Places = [[[p] for p in range(n)] for _ in numbers]
    image = torch.tensor([k for k, i in enumerate(images) for _ in tower.numbers(i)])
    target = [k for i in images for k in part.patch_budgets(tower.views[i], n, facts, video=False)]
    carry: dict[str, Tensor] = {}
    history = []
    merges = isinstance(part, EncoderMerger)
    for layer in range(facts.feature_layer + merges):
        needs = [need.resolve(facts.provides) for need in part.encoder_needs(layer)]
        if not needs:
            continue
        longest = max(map(len, places))
        valid = torch.tensor([[i < len(view) for i in range(longest)] for view in places])
        first = torch.tensor([[place[0] for place in view] + [0] * (longest - len(view)) for view in places])
        taps = {}
        for need in needs:
            found = torch.stack([tower.signal(need.name, layer, v)[at] for v, at in zip(numbers, first, strict=True)])
            taps[need.name] = torch.where(valid.view(*valid.shape, *[1] * (found.dim() - 2)), found, padding)
        size = torch.tensor([[float(len(p)) for p in view] + [1.0] * (longest - len(view)) for view in places])
        state = EncoderState(layer, taps, valid, image, carry, torch.tensor(target), size if merges else None)
        if merges:
            found = part.merge(state)
            if found is None:
                continue
            places = merged(places, valid, *found)
        else:
            carry, alive = part.step(state)
            assert all(value.shape[:2] == valid.shape for value in carry.values()), "what is carried belongs to tokens"
            if alive is None:
                continue
            assert alive.dtype == torch.bool
            assert alive.shape == valid.shape
            assert not (alive & ~valid).any(), "nothing comes back, and padding does not survive"
            carry = {name: narrowed(value, alive, padding) for name, value in carry.items()}
            places = [
                [p for p, stays in zip(view, row, strict=False) if stays] for view, row in zip(places, alive, strict=True)
            ]
        history.append(places)
    return history, target


def narrowed(value: Tensor, alive: Tensor, padding: float) -> Tensor:
    """What is left of a carried tensor."""
    rows = [row[stays] for row, stays in zip(value, alive, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def merged(places: Places, valid: Tensor, owner: Tensor, left: Tensor) -> Places:
    """Join the places with one owner; every promise about ``owner`` and ``left`` is checked on the way."""
    assert owner.shape == valid.shape
    assert (owner[~valid] == -1).all(), "padding belongs to nothing"
    out: Places = []
    for view, row, count in zip(places, owner.tolist(), left.tolist(), strict=True):
        assert set(row[: len(view)]) == set(range(count)), "each token has one place, and no place is empty"
        assert 2 * count >= len(view), "a layer joins pairs of sets"
        out.append([[p for place, to in zip(view, row, strict=False) if to == at for p in place] for at in range(count)])
    return out


towers = st.builds(
    lambda rows, cols, depth, views, has_cls, values, seed: Tower(
        dataclasses.replace(
            FACTS,
            grid=(rows, cols),
            feature_layer=depth,
            encoder_layers=depth + 2,
            has_cls=has_cls,
            provides=frozenset({"attention", "cls"} if has_cls else {"attention"}),
            anyres=max(views) > 1,
            max_views=max(views),
        ),
        views,
        values,
        seed,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(2, 6),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from(["spread", "spread", "ties", "same"]),
    st.integers(0, 2**16),
)
shares = st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)
in_tower = pytest.mark.parametrize("name", REDUCERS)
drawn = settings(max_examples=40, deadline=None, derandomize=True)


def made(name: str, tower: Tower, share: float, **options: object) -> EncoderReducer:
    """The part inside the tower; a share that its layers can reach."""
    patches = tower.facts.grid[0] * tower.facts.grid[1]
    least = (
        -(-patches // 2**tower.facts.feature_layer) + 1
    )  # of reducers that halve; a few patches more than one for the others
    reducer = vtc.create(name, keep=min(1.0, max(share, least / patches)), **options)
    return next(p for p in reducer.bind(tower.facts).parts() if p.stage is Stage.ENCODER)


@in_tower
@drawn
@given(tower=towers, share=shares)
def test_the_budget_is_met_on_the_way_down(name: str, tower: Tower, share: float) -> None:
    part = made(name, tower, share)
    patches = tower.facts.grid[0] * tower.facts.grid[1]
    history, target = walk(part, tower)
    last: Places = [[[p] for p in range(patches)] for _ in target]
    for places in history:
        for before, now in zip(last, places, strict=True):
            assert len(now) <= len(before), "never more tokens than before"
            held = sorted(p for place in now for p in place)
            assert len(set(held)) == len(held), "no patch stands in two places"
            if isinstance(part, EncoderMerger):
                assert held == list(range(patches)), "sizes add up to all patches"
            else:
                assert [place for place in before if place in now] == now, "survivors keep their order"
        last = places
    assert [len(view) for view in last] == target, "exactly the target is left at the end"


@in_tower
@drawn
@given(tower=towers, share=shares)
def test_an_image_does_not_depend_on_the_others(name: str, tower: Tower, share: float) -> None:
    part = made(name, tower, share)
    together, _ = walk(part, tower)
    assert together == walk(part, tower, padding=0.25)[0], "deterministic, and blind to padding"
    untouched = [[p] for p in range(tower.facts.grid[0] * tower.facts.grid[1])]
    for image, views in enumerate(tower.views):
        alone, _ = walk(part, tower, [image])
        mine = [together[-1][v] for v in tower.numbers(image)] if together else [untouched] * views
        assert mine == (alone[-1] if alone else [untouched] * views)


@pytest.mark.parametrize("name", [n for n in REDUCERS if "r" in vtc.info(n).options])
@drawn
@given(tower=towers, r=st.integers(1, 8), inflect=st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
def test_a_rate_per_layer_is_kept(name: str, tower: Tower, r: int, inflect: float) -> None:
    """With ``r`` every layer merges what the line from layer to layer says, at most half of its tokens."""
    layers = tower.facts.feature_layer + 1
    low = int(r * (1 - inflect))
    line = [int(low + i * 2 * (r - low) / max(layers - 1, 1)) for i in range(layers)]
    left, expected = tower.facts.grid[0] * tower.facts.grid[1], []
    for rate in line:
        taken = min(rate, left // 2)
        left -= taken
        expected += [left] if taken else []
    part = next(iter(vtc.create(name, r=r, inflect=inflect).bind(tower.facts).parts()))
    history, _ = walk(part, tower)
    assert [[len(view) for view in places] for places in history] == [[n] * sum(tower.views) for n in expected]


@pytest.mark.parametrize("has_cls", [True, False])
def test_tome_leaves_a_view_as_it_is_that_merges_nothing(has_cls: bool) -> None:
    """Whatever the other views of the call merge: the order decides which tokens the next layer compares."""
    key = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    owner, left = match(key, torch.ones(2, 6, dtype=torch.bool), torch.tensor([0, 2]), has_cls=has_cls)
    assert owner[0].tolist() == list(range(6))
    assert sorted(set(owner[1].tolist())) == list(range(4))
    assert left.tolist() == [6, 4]


def test_every_reducer_inside_the_tower_is_asked() -> None:
    assert {"flowcut", "skipspan", "tome"} <= set(REDUCERS) <= set(CASES)
