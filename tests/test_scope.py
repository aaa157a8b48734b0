"""SCOPE: coverage by hand, near ties, views that share the budget, the lazy and the plain order, what is refused."""

from __future__ import annotations

import pytest
import torch
from models import make_inputs, shared
from plain import check_batch_mates, check_inside_a_model, crops, signals
from torch import Tensor

import vtc
from vtc.errors import UnknownArgumentError
from vtc.reducers import scope
from vtc.reducers.scope import Coverage, cls_attn_sum
from vtc.signals import AttentionTap, cls_attn
from vtc.views import NO_CLS


def on_circle(*degrees: float) -> Tensor:
    """Unit vectors ``(1, n, 2)``."""
    angle = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


def drawn(n: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Tokens and weights; of copies and equal ones every cosine is a whole number, so that equal gains are equal in any sum."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "spread":
        return torch.randn(n, 6, generator=generator), torch.rand(n, generator=generator)
    axis = torch.randint(0, 6 if kind == "copies" else 1, (n,), generator=generator)
    return torch.eye(6)[axis], torch.randint(1, 4, (n,), generator=generator).float()


def test_by_hand() -> None:
    # cosines: 0-1 and 2-3 are 60 degrees apart (0.5), 0 and 1 are 120 or more from 2 and 3 (no coverage, not even a negative one)
    features, attention = on_circle(0, 60, 180, 240), torch.tensor([[1.0, 1.1, 1.2, 0.9]])
    reducer = vtc.create("scope", keep=3)
    s = signals(features, 4, cls_attn=attention)
    (view,) = reducer.coverage(s)
    torch.testing.assert_close(view.scores(), torch.tensor([1.5, 1.65, 1.8, 1.35]))
    view.add(torch.tensor([2]))
    # 3 is covered by half already: it adds 0.5 of its own, and 2 adds nothing
    torch.testing.assert_close(view.scores(), torch.tensor([1.5, 1.65, 0.0, 0.45]))
    assert reducer.pick(s).tolist() == [[2, 1, 0, 3]]  # then 0 adds 0.5 * 1.0, 3 adds 0.5 * 0.9
    assert reducer.select(signals(features, 3, cls_attn=attention)).index.tolist() == [[0, 1, 2]]


def test_attention_counts_to_the_power_of_alpha_or_not_at_all() -> None:
    # 0 covers three patches, 3 is alone with twice the attention: 3 * 1 against 1 * 2, and against 1 * 4
    features, attention = on_circle(0, 0, 0, 180), torch.tensor([[1.0, 0.5, 0.5, 2.0]])
    for options, first in (({}, 0), ({"alpha": 2.0}, 3), ({"alpha": 0.0}, 0), ({"salience": False}, 0)):
        taps = {} if "salience" in options else {"cls_attn": attention}
        assert vtc.create("scope", keep=2, **options).pick(signals(features, 1, **taps)).tolist() == [[first]], options
    for total, first in (
        (attention, 0),
        (2 * attention, 3),
    ):  # the scale of what is added matters: 3 + 1 against 1 + 2, 5 against 5
        picks = vtc.create("scope", keep=2, combine="add").pick(signals(features, 1, cls_attn_sum=total + (total > 3)))
        assert picks.tolist() == [[first]]


def test_copies_are_taken_last_and_the_lowest_of_equals_first() -> None:
    features, attention = torch.eye(3)[None, [0, 1, 0, 1, 2]], torch.tensor([[2.0, 2.0, 2.0, 2.0, 1.0]])
    assert vtc.create("scope", keep=5).pick(signals(features, 5, cls_attn=attention)).tolist() == [[0, 1, 4, 2, 3]]
    assert vtc.create("scope", keep=5).pick(signals(features, 5, cls_attn=0 * attention)).tolist() == [[0, 1, 2, 3, 4]]


def test_a_zero_vector_is_like_nothing() -> None:
    features = torch.cat([torch.zeros(1, 1, 2), torch.eye(2)[None, [0, 0, 1]]], 1)
    assert vtc.create("scope", keep=3).pick(signals(features, 4, cls_attn=torch.ones(1, 4))).tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("whole", [True, False], ids=["matrix", "rows"])
@pytest.mark.parametrize("add", [False, True], ids=["times", "plus"])
@pytest.mark.parametrize("kind", ["spread", "copies", "same"])
def test_old_gains_bound_new_ones(monkeypatch: pytest.MonkeyPatch, kind: str, add: bool, whole: bool) -> None:
    """Bringing only the leaders up to date gives the order that all gains in every step give."""
    monkeypatch.setattr(scope, "_WHOLE", 1 << 26 if whole else 0)
    monkeypatch.setattr(scope, "_BLOCK", 7)
    for n, seed in ((1, 0), (9, 1), (40, 2), (90, 3)):
        tokens, weight = drawn(n, seed, kind)
        lazily = Coverage(tokens, weight, add=add).lazily(n)
        assert torch.equal(lazily, Coverage(tokens, weight, add=add).plainly(n))
        assert sorted(lazily.tolist()) == list(range(n))


def test_few_gains_are_brought_up_to_date() -> None:
    tokens, weight = drawn(200, 0, "spread")
    view, asked = Coverage(tokens, weight, add=False), []
    scores = view.scores
    view.scores = lambda at=None: (asked.append(200 if at is None else len(at)), scores(at))[1]
    view.lazily(40)
    assert sum(asked) < 200 * 40 / 4


def test_views_share_the_budget() -> None:
    layout = crops(2, 3, 3, hidden=(7, 8))
    s = signals(torch.randn(1, 18, 4, generator=torch.Generator().manual_seed(0)), 8, layout, cls_attn=torch.rand(1, 18))
    index = vtc.create("scope", keep=8).select(s).index[0]
    assert torch.bincount(index // 6).tolist() == [3, 3, 2] and not {7, 8} & set(index.tolist())
    official = vtc.create("scope", keep=8, official=True).select(s).index[0]
    assert torch.bincount(official // 6).tolist() == [2, 2, 2]


def test_images_of_a_batch_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(1)
    s = signals(torch.randn(3, 30, 8, generator=generator), 9, cls_attn=torch.rand(3, 30, generator=generator))
    check_batch_mates(vtc.create("scope", keep=9), s)


@pytest.mark.parametrize("cls", [True, False])
def test_what_is_added_is_the_sum_over_heads(cls: bool) -> None:
    query, key = torch.randn(2, 2, 3, 7, 4, generator=torch.Generator().manual_seed(2)).unbind(0)
    tap = AttentionTap(query, key, key, 0.5, cls=cls)
    provides = frozenset({"attention", "cls"} if cls else {"attention"})
    mean, total = (need(-2).resolve(provides).measure(tap) for need in (cls_attn, cls_attn_sum))
    torch.testing.assert_close(total, 3 * mean)
    assert total.shape == (2, 6 if cls else 7)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_siglip"])
@pytest.mark.parametrize("options", [{}, {"combine": "add", "alpha": 0.5}, {"salience": False}])
def test_inside_a_model(family: str, options: dict) -> None:
    check_inside_a_model(family, "scope", 7, **options)


def test_a_tower_without_class_token_is_noted() -> None:
    model = shared("llava_siglip")
    for options, note in (({}, NO_CLS), ({"salience": False}, "")):
        with vtc.patch(model, "scope", keep=4, **options) as handle, torch.no_grad():
            model(**make_inputs("llava_siglip", model))
        assert handle.stats.last.images[0].stages[0].note == note


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"alpha": float("inf")}, {"alpha": True}, {"combine": "multi"}])
def test_senseless_options_are_refused(options: dict) -> None:
    (option,) = options
    with pytest.raises(UnknownArgumentError, match=f"scope: {option}"):
        vtc.create("scope", keep=4, **options)
