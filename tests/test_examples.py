"""One example per reducer that can be checked by hand: six to ten tokens, the answer derived beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import make_inputs, shared, visual_of
from torch import Tensor
from torch.testing import assert_close

import vtc
from vtc.core import Kind, Layout, Signals
from vtc.errors import BudgetError, UnknownArgumentError
from vtc.reducers.visionzip import in_order
from vtc.signals import AttentionTap, cls_attn, last_attn


def signals(features: Tensor, budget: int, layout: Layout | None = None, **more: Any) -> Signals:
    """Signals of one image with these features ``(N, D)``."""
    n = len(features)
    taps = {k: v[None] for k, v in more.pop("taps", {}).items()}
    return Signals(features[None], layout or Layout.flat(n), torch.arange(n)[None], budget, n, taps, **more)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def attention_of(*weights: float, queries: int = 1, **more: Any) -> AttentionTap:
    """One head of width 1 whose every query gives key ``j`` attention ``weights[j] / sum(weights)``: q = 1, k = log(weight)."""
    key = torch.tensor(weights).log()[None, None, :, None]
    return AttentionTap(torch.ones(1, 1, queries, 1), key, torch.zeros_like(key), 1.0, **more)


# ----------------------------------------------------------------------------------------------------------- baselines
def test_uniform() -> None:
    # 10 tokens in 4 stretches of 2.5: their middles are 1.25, 3.75, 6.25, 8.75
    index = vtc.create("uniform", keep=4).select(signals(torch.zeros(10, 1), 4)).index
    assert index.tolist() == [[1, 3, 6, 8]]


def test_random() -> None:
    reducer = vtc.create("random", keep=3, seed=5)

    def ask(mark: int, seed: int = 5) -> list[int]:
        chosen = vtc.create("random", keep=3, seed=seed).select(signals(torch.zeros(8, 1), 3, fingerprint=(mark,)))
        return chosen.index[0].tolist()

    # one number per token, drawn from seed and picture; the three largest stay
    draw = reducer.score(signals(torch.zeros(8, 1), 3, fingerprint=(7,)))[0].tolist()
    assert ask(7) == sorted(sorted(range(8), key=lambda i: -draw[i])[:3])
    assert ask(7) == ask(7)
    assert len({tuple(ask(mark)) for mark in range(20)}) > 10, "every picture has its own subset"
    assert any(ask(mark, 5) != ask(mark, 6) for mark in range(5)), "and every seed"
    # no token is favoured: over 4000 pictures each stays in 3/8 of them (five standard deviations: 0.038)
    counts = torch.zeros(8)
    for mark in range(4000):
        counts[ask(mark)] += 1
    assert ((counts / 4000 - 3 / 8).abs() < 0.038).all()


def test_gridpool() -> None:
    # 3 x 3 tokens holding 0..8 become 2 x 2 cells of 1.5 x 1.5 tokens. A cell's mean row is (0 * 1 + 1 * 0.5) / 1.5 = 1/3 or
    # (1 * 0.5 + 2 * 1) / 1.5 = 5/3, its mean column likewise, and the value is 3 * row + column.
    values = column(*range(9))
    out = vtc.create("gridpool", keep=5).select(signals(values, 5, Layout.grid(3, 3)))
    assert_close(out.features[0], column(4 / 3, 8 / 3, 16 / 3, 20 / 3))
    # cell centres lie at 0.75 and 2.25, the nearest token centres are 0.5 and 2.5: the corners
    assert out.index.tolist() == [[0, 2, 6, 8]]
    # the middle token's centre, 1.5, opens the second half-open cell
    assert out.owner.tolist() == [[0, 1, 1, 2, 3, 3, 2, 3, 3]]


def test_gridpool_shares_the_budget_among_views() -> None:
    # thumbnail 2 x 2 and a crop of which padding left 1 x 4 in 2 x 4: four tokens each, so two cells each
    view, row, col = (
        torch.tensor([0] * 4 + [1] * 4),
        torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]),
        torch.tensor([0, 1, 0, 1, 0, 1, 2, 3]),
    )
    layout = Layout(view * 0, view, row, col, row, col, torch.arange(8), ((2, 2), (2, 4)), True)
    out = vtc.create("gridpool", keep=4).select(signals(column(0, 1, 2, 3, 10, 11, 12, 13), 4, layout))
    # each axis as fine as possible: 2 x 2 -> 1 x 2 (columns first), 1 x 4 -> 1 x 2
    assert_close(out.features[0], column(1, 2, 10.5, 12.5))
    assert out.owner.tolist() == [[0, 1, 0, 1, 2, 2, 3, 3]]


def test_downsample() -> None:
    plain, anyres = (_facts(name) for name in ("llava", "llava_next"))
    # at most 7 cells on 4 x 4: 2 x 3 keeps both axes at half or better; 7 = 1 x 7 is too wide
    assert vtc.create("downsample", keep=7).target_grid((4, 4), plain) == (2, 3)
    assert vtc.create("downsample", keep=9).target_grid((4, 4), plain) == (3, 3)
    assert vtc.create("downsample", keep=0.5).target_grid((4, 4), plain) == (2, 4)
    # five views share 22 tokens: 4 each
    assert vtc.create("downsample", keep=22).target_grid((4, 4), anyres) == (2, 2)
    with pytest.raises(BudgetError, match="at least 5"):
        vtc.create("downsample", keep=4).bind(anyres)
    # a symmetric filter keeps straight lines: 16 -> 8 pixels, the value at output pixel i is that at 2 i + 0.5
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    small = vtc.create("downsample", keep=4).resize(ramp, (8, 8))
    assert small.shape == (1, 3, 8, 8)
    assert_close(small[0, 0, 0, 2:6], torch.tensor([4.5, 6.5, 8.5, 10.5]), atol=1e-4, rtol=0)


def _facts(name: str) -> Any:
    from vtc.families import family_of

    return family_of(shared(name)).facts


# ------------------------------------------------------------------------------------------------------- by attention
def test_fastv() -> None:
    reducer = vtc.create("fastv", keep=3)
    # system token, six visual tokens, and the last text token, whose row decides: weights 1 4 2 4 3 2 of a total of 26
    tap = attention_of(5, 1, 4, 2, 4, 3, 2, 5, queries=8, causal=True, last=torch.tensor([7]))
    row = last_attn(1).measure(tap)[0]
    assert_close(row, torch.tensor([5.0, 1, 4, 2, 4, 3, 2, 5]) / 26)
    # the two fours and the three
    assert reducer.select(signals(torch.zeros(6, 1), 3, taps={"last_attn": row[1:7]})).index.tolist() == [[1, 3, 4]]
    # a tie for the last place goes to the lower index: 2 and 5 have weight 2
    assert vtc.create("fastv", keep=4).select(signals(torch.zeros(6, 1), 4, taps={"last_attn": row[1:7]})).index.tolist() == [
        [1, 2, 3, 4]
    ]


def test_fastervlm() -> None:
    # class token (weight 4) and eight patches, total 40: the class token takes part in the softmax and is then left out
    tap = attention_of(4, 1, 9, 2, 3, 8, 4, 3, 6, queries=9, cls=True)
    score = cls_attn().measure(tap)[0]
    assert_close(score, torch.tensor([1.0, 9, 2, 3, 8, 4, 3, 6]) / 40)
    plain = vtc.create("fastervlm", keep=3).select(signals(torch.zeros(8, 1), 3, taps={"cls_attn": score}))
    assert plain.index.tolist() == [[1, 4, 7]]
    # two views of four: five tokens are three and two (what is left over goes to the first view)
    two = Layout.grid(1, 8)
    view = torch.tensor([0] * 4 + [1] * 4)
    layout = Layout(two.kind, view, two.row, two.col % 4, two.y, two.x, two.slot, ((1, 4), (1, 4)), True)
    spread = vtc.create("fastervlm", keep=5).select(signals(torch.zeros(8, 1), 5, layout, taps={"cls_attn": score}))
    assert spread.index.tolist() == [[1, 2, 3, 4, 7]]
    # the release: two each
    official = vtc.create("fastervlm", keep=5, official=True).select(
        signals(torch.zeros(8, 1), 5, layout, taps={"cls_attn": score})
    )
    assert official.index.tolist() == [[1, 3, 4, 7]]


def test_visionzip() -> None:
    features = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [5, 0], [6, 0]])
    taps = {
        "cls_attn": torch.tensor([0.05, 0.30, 0.10, 0.25, 0.02, 0.08]),
        # unit vectors at these angles: of the patches that do not stay (0, 2, 4, 5), 2 is nearest to 4 and 5 to 0
        "keys": torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 9.0, 1.3, 9.0, 1.5, 0.2)]),
    }
    cls = torch.tensor([[[100.0, 1.0]]])
    # class token, two dominant patches (1 and 3), two contextual ones: every second of 0, 2, 4, 5 is a target, 0 and 4
    out = vtc.create("visionzip", keep=5, contextual=2).select(signals(features, 5, taps=taps, cls=cls))
    assert_close(out.features[0], torch.tensor([[100.0, 1], [2, 0], [4, 0], [1 + 6, 0], [5 + 3, 0]]))
    assert out.index.tolist() == [[0, 1, 2, 3, 4]]
    assert out.owner.tolist() == [[3, 1, 4, 2, 4, 3]]
    # one contextual token: the target 0 plus the mean of 2, 4 and 5
    out = vtc.create("visionzip", keep=4, contextual=1).select(signals(features, 4, taps=taps, cls=cls))
    assert_close(out.features[0, 3], torch.tensor([1 + (3 + 5 + 6) / 3, 0]))
    # without a class token its place goes to one more dominant patch: 2
    out = vtc.create("visionzip", keep=4, contextual=1).select(signals(features, 4, taps=taps))
    assert out.owner.tolist() == [[3, 0, 1, 2, 3, 3]]
    assert "no class token" in out.note
    # the papers' tables: 192 = 162 + 30, 128 = 108 + 20, 64 = 54 + 10; per crop 32 = 27 + 5
    assert [vtc.create("visionzip", keep=k).split(k, [577], True)[0] for k in (192, 128, 64, 32)] == [
        (162, 30),
        (108, 20),
        (54, 10),
        (27, 5),
    ]
    for preset in ("llavanext-640", "llavanext-320", "llavanext-160"):
        reducer = vtc.create(f"visionzip.{preset}")
        assert set(reducer.split(reducer.keep, [577] * 5, True)) == {
            {640: (108, 20), 320: (54, 10), 160: (27, 5)}[reducer.keep]
        }
    with pytest.raises(BudgetError, match="contextual=4"):
        vtc.create("visionzip", keep=4, contextual=4)
    with pytest.raises(UnknownArgumentError, match="newlines"):
        vtc.create("visionzip", keep=4, newlines="all")


def test_visionzip_orders_crops() -> None:
    # a thumbnail of two rows, and two crops of two rows side by side. Slots: the thumbnail, then the stitched picture row by row
    # with a newline after each row:
    #   slot   0  1 | 2       3       4        5       6       7
    #   entry  0  1 | 2 (A0)  4 (B0)  newline  3 (A1)  5 (B1)  newline
    view, row = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3)
    layout = Layout(
        kind=torch.full((6,), int(Kind.PATCH)),
        view=view,
        row=row,
        col=row * 0,
        y=row,
        x=(view == 2).long(),
        slot=torch.tensor([0, 1, 2, 5, 3, 6]),
        grids=((2, 1),) * 3,
        thumbnail=True,
    )
    taps = {"cls_attn": torch.tensor([1.0, 2, 1, 2, 2, 1]), "keys": torch.ones(6, 2)}
    cls = column(100, 101, 102)[None]
    # two tokens a view: its class token and its best patch, which are 1, A1 (entry 3) and B0 (entry 4). The model is to read:
    # class token, 1, then the crops' patches in raster order of the stitched picture (B0, A1), then the crops' class tokens.
    request = signals(column(10, 11, 12, 13, 14, 15), 6, layout, taps=taps, cls=cls)
    out = vtc.create("visionzip", keep=6, contextual=0).select(request)
    assert out.index.tolist() == [[0, 1, 2, 3, 4, 5]]
    by_slot = layout.slot[out.index[0]].argsort()
    assert out.features[0, by_slot, 0].tolist() == [100, 11, 14, 13, 101, 102]
    # ownership speaks of places in `index`: patch 1 is at place 1, A1 in slot 5 = place 3, B0 in slot 2 = place 2
    assert out.owner[0, [1, 4]].tolist() == [1, 2]
    assert out.features[0, out.owner[0, 3], 0] == 13
    assert out.owner[0, [0, 2, 5]].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_visionzip_reaches_the_language_model_in_order(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters the decoder is the projected sequence, in the sequence's order, whatever the slots in between."""
    from vtc.reducers.visionzip import VisionZip

    model, wanted, seen = shared(family), [], []
    inputs = make_inputs(family, model, 1)
    select = VisionZip.select

    def spy(self: VisionZip, request: Signals) -> Any:
        wanted.append(in_order(self.views(request), request.layout)[0][0])
        return select(self, request)

    monkeypatch.setattr(VisionZip, "select", spy)
    with vtc.patch(model, "visionzip", keep=9) as handle, torch.no_grad():
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        first = int(visual_of(inputs)[0].int().argmax())
        kept = handle.stats.last.images[0].kept
    with torch.no_grad():
        projected = model.model.multi_modal_projector(wanted[0][None])[0]
    assert kept == len(wanted[0]) == 9
    assert_close(seen[0][0, first : first + kept], projected)


# --------------------------------------------------------------------------------------------------------- by geometry
def test_divprune() -> None:
    # directions in the plane, in degrees: the distances are those of the angles
    angles = torch.tensor([0.0, 10, 70, 75, 150, 250]).deg2rad()
    request = signals(torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1.0, 5, 2, 3, 1, 4])[:, None], 4)
    # nearest neighbours at 10, 10, 5, 5, 75 and 100 degrees: 250 starts. Farthest from it is 70 (180 degrees). Then nearest chosen
    # at 70 (of 0), 60 (10), 5 (75), 80 (150): 150. Then 0.
    reducer = vtc.create("divprune", keep=4)
    assert reducer.pick(request).tolist() == [[5, 2, 4, 0]]
    assert reducer.select(request).index.tolist() == [[0, 2, 4, 5]]
    assert vtc.create("divprune", keep=4, official=True).pick(request).tolist() == [[5, 2, 4, 0]]


def test_divprune_never_picks_twice() -> None:
    # four copies of one token, and another: the third pick is at distance 0 in any case
    copies = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [1, 0], [1, 0]])
    default = vtc.create("divprune", keep=4).select(signals(copies, 4))
    assert default.index.tolist() == [[0, 1, 2, 3]]
    assert default.valid is None
    # the release picks token 0 again and again, and two distinct tokens stay
    official = vtc.create("divprune", keep=4, official=True)
    assert official.pick(signals(copies, 4)).tolist() == [[2, 0, 0, 0]]
    chosen = official.select(signals(copies, 4))
    assert chosen.index[chosen.valid].tolist() == [0, 2]
    assert official.newline_policy == "compete"
