"""IVC-Prune: scores, seeds and counts by hand, coordinates from the positions a model really uses, mirrored cells, odd prompts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import make_inputs, shared
from plain import check_inside_a_model, signals
from torch import Tensor, nn

import vtc
from vtc.core import Facts, Signals
from vtc.engine.patch import handle_of
from vtc.errors import UnknownArgumentError
from vtc.families import family_of
from vtc.reducers.ivcprune import IVCPrune, table_mean


def facts(**other: object) -> Facts:
    return dataclasses.replace(family_of(shared("llava")).facts, tokens=None, max_tokens=None, **other)


def asked(n: int, budget: int, *, text_places: list[list[int]], batch: int = 1, heads: int = 2, seed: int = 0) -> Signals:
    """Images at the places 2 .. n + 1."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, n, heads, 4, generator=generator)
    taps = {
        "image_values": values,
        "word_values": torch.randn(batch, len(text_places[0]), heads, 4, generator=generator),
        "text_places": torch.tensor(text_places),
        "places": (2 + torch.arange(n)).expand(batch, n),
        "cos_mean": torch.rand(batch, n, generator=generator),
        "sin_mean": torch.rand(batch, n, generator=generator),
    }
    return signals(values.flatten(2), budget, **taps)


# -------------------------------------------------------------------------------------------------------------- counts
def test_counts_of_the_release_are_rounded_half_to_even() -> None:
    union, fill = IVCPrune(keep=0.31, layer=2, rule="union"), IVCPrune(keep=0.5, layer=2, rule="fill")
    assert union.sizes(179, 576) == (6, 29, 115) and union.count(576, facts()) == 6 + 58 + 115
    assert union.sizes(9, 30) == (1, 2, 6) and union.count(30, facts()) == 11  # 1.5 and 0.3
    assert fill.sizes(42, 85) == (1, 8, 0) and fill.count(85, facts()) == 42  # 8.5 and 42.5
    assert fill.count(91, facts()) == 46 and fill.count(1, facts()) == 1


def test_other_budgets_scale_the_shares() -> None:
    assert IVCPrune(keep=0.155, layer=2, rule="union").sizes(0, 576) == (3, 14, 58)
    assert IVCPrune(keep=100, layer=2, rule="fill").sizes(100, 1000) == (2, 20, 0)
    assert IVCPrune(avg_tokens=100, layer=2, rule="fill").sizes(100, 1000) == (2, 20, 0)
    assert IVCPrune(keep=1.0, layer=2, rule="fill").sizes(4, 4)[0] == 1
    assert IVCPrune(keep=1.0, layer=2, rule="union").count(88, facts()) == 88


@pytest.mark.parametrize("rule", ["union", "fill"])
@pytest.mark.parametrize("budget", [1, 2, 5, 17, 59])
def test_no_more_than_the_budget_and_with_fill_exactly(rule: str, budget: int) -> None:
    s = asked(60, budget, text_places=[[0, 1, 62, 63, 64, 65]] * 3, batch=3)
    chosen = IVCPrune(keep=budget, layer=2, rule=rule).select(s)
    kept = [len(row) if chosen.valid is None else int(chosen.valid[b].sum()) for b, row in enumerate(chosen.index)]
    assert kept == [budget] * 3 if rule == "fill" else all(1 <= k <= budget for k in kept)


# -------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("rule", ["union", "fill"])
def test_scores_are_those_of_full_matrices(rule: str) -> None:
    s = asked(12, 6, text_places=[[0, 1, 14, 15, 16, 17, -1]])
    part = IVCPrune(keep=6, layer=2, rule=rule)
    first, seeds, second = part.scores(s, 2)
    order = torch.cat([s.image_values[0], s.word_values[0, :6]])  # the last one is padding
    logits = torch.einsum("ihd,jhd->hij", order, order) / 2
    weight = torch.softmax(logits if rule == "union" else logits[..., :12], 2).mean(0)[:, :12]
    question = weight[[16, 17]]  # places 16 and 17: two behind the image are skipped
    torch.testing.assert_close(first[0], question.mean(0))
    assert seeds[0].tolist() == question.mean(0).topk(2).indices.tolist()
    torch.testing.assert_close(second[0], torch.cat([question, weight[seeds[0]]]).mean(0))


@pytest.mark.parametrize(
    ("text_places", "want"),
    [
        ([0, 1, 14, 15, 16, 17], [4, 5]),
        ([0, 1, 14, 15], [2, 3]),  # nothing but the two: they count
        ([0, 1, -1, -1], [1]),  # an image at the end
        ([0, 1, 14, 15, 16, -1], [4]),
    ],
)
def test_what_asks(text_places: list[int], want: list[int]) -> None:
    s = asked(12, 6, text_places=[text_places])
    assert IVCPrune.question(s)[0].nonzero()[:, 0].tolist() == want
    for rule in ("union", "fill"):
        assert all(torch.isfinite(t).all() for t in IVCPrune(keep=6, layer=2, rule=rule).scores(s, 1))


def test_images_of_a_batch_do_not_meet() -> None:
    s = asked(20, 8, text_places=[[0, 1, 22, 23, 24, 25], [0, 1, 22, 23, -1, -1]], batch=2)
    for rule in ("union", "fill"):
        part = IVCPrune(keep=8, layer=2, rule=rule)
        together = part.select(s)
        for b in range(2):
            at = slice(b, b + 1)
            one = dataclasses.replace(
                s, features=s.features[at], entries=s.entries[at], taps={k: v[at] for k, v in s.taps.items()}
            )
            real = slice(None) if together.valid is None else together.valid[b]
            assert torch.equal(part.select(one).index[0], together.index[b, real])


# --------------------------------------------------------------------------------------------------------- coordinates
def test_mirrored_cells_are_equal_and_the_lower_one_wins() -> None:
    frequency = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    side = 5
    row, col = torch.arange(side * side) // side + 7, torch.arange(side * side) % side + 7
    angle = torch.stack([torch.full_like(row, 7), row, col])[:, None, :, None] * frequency
    mean = table_mean(torch.cat([angle, angle], -1).cos())
    assert torch.equal(mean.view(side, side), mean.view(side, side).T) and len(mean.unique()) == 15
    s = asked(25, 12, text_places=[[0, 1, 27, 28, 29]])
    s = dataclasses.replace(s, taps={**s.taps, "cos_mean": mean, "sin_mean": mean})
    found = IVCPrune(keep=0.5, layer=2, rule="fill").sets(s)["ivc_cos"]
    assert found[0].nonzero()[:, 0].tolist() == mean[0].sort(descending=True, stable=True).indices[:2].sort().values.tolist()


def seen_by(model: nn.Module, inputs: dict[str, Tensor], reducer: object, **options: object) -> list[Signals]:
    """What the reducer inside the decoder is shown in a forward, one entry per group of images."""
    shown, select = [], IVCPrune.select
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(IVCPrune, "select", lambda self, s: (shown.append(s), select(self, s))[1])
        with vtc.patch(model, reducer, **options):
            model(**inputs)
    assert handle_of(model) is None
    return shown


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cosines_are_those_of_the_positions(dtype: torch.dtype) -> None:
    """In float32 whatever the model's type: in a plain row, in a padded one, and where an earlier stage has renumbered."""
    model = shared("llava", "sdpa", dtype)
    inputs = make_inputs("llava", model, 2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    rotary = model.model.language_model.rotary_emb
    for before, given in (([], None), ([], inputs["attention_mask"].cumsum(1) - 1), (["uniform"], None)):
        reducer = [*(vtc.create(name, keep=12) for name in before), vtc.create("ivcprune", keep=6, layer=2)]
        more = {} if given is None else {"position_ids": given.clamp(min=0)}
        for s in seen_by(model, inputs | more, reducer):
            for image, at in enumerate(
                s.places
            ):  # places do not count padding, which the model numbers if it is told no positions
                table = rotary(torch.zeros(1, 1, 1), at[None])[0].double().mean(-1)[0]
                torch.testing.assert_close(s.cos_mean[image], table, atol=1e-7, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_three_axes_count_alike(family: str) -> None:
    model = shared(family)
    inputs = make_inputs(family, model, 1)
    layer = family_of(model).facts.first_layer
    (s,) = seen_by(model, inputs, "ivcprune", keep=3, layer=layer)[:1]
    first, (rows, cols) = int(s.places[0, 0]), s.layout.grids[0]
    config = model.model.language_model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = model.model.language_model.rotary_emb.inv_freq.double()
    assert len(frequency) == width // 2

    def mean(position: Tensor, function: object) -> Tensor:
        return function(position[:, None] * frequency).mean(1)

    at = torch.arange(rows * cols)
    for function, got in ((torch.cos, s.cos_mean), (torch.sin, s.sin_mean)):
        axes = [mean(first + offset, function) for offset in (0 * at, at // cols, at % cols)]
        torch.testing.assert_close(got[0], sum(axes) / 3, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("rule", ["union", "fill"])
def test_inside_a_model(family: str, rule: str) -> None:
    check_inside_a_model(family, "ivcprune", 3, exact=False, rule=rule)


def test_rules_and_layers_follow_the_model() -> None:
    bound = vtc.create("ivcprune", keep=9).bind(facts(layers=32))
    assert (bound.layer, bound.rule) == (16, "union")
    assert vtc.create("ivcprune", keep=9).bind(facts(layers=28, mrope=True)).rule == "fill"
    with pytest.raises(UnknownArgumentError, match="layer"):
        vtc.create("ivcprune", keep=9, layer=40).bind(facts(layers=32))
    with pytest.raises(UnknownArgumentError, match="ivcprune: rule"):
        vtc.create("ivcprune", keep=9, rule="both")
