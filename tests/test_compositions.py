"""Compositions drawn at random, in conversations drawn at random, against the slow reference, their own rows alone, and no patch.

A case is a family, two or three reducers of different stages with their budgets and policies, rows with different numbers of
pictures (of different crops where the family has some), an earlier turn of text or pictures in the cache, a mask, a cache, and an
attention implementation. The suite draws the same ``CASES`` every time; ``make oracle N=5000`` draws others, remembers failures in
``.hypothesis`` and prints the smallest: it belongs into ``FOUND``.
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import CASES as FAMILIES
from models import DECODER_LAYERS, image_features, image_ids, make_inputs, shared, visual_of
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, ImagePicker, Picker, TwoLayerPicker, VisionPicker, marks_of
from reference import Plan, oracle_model, plan_of, suppressed
from test_generate import STATIC
from test_oracle import snapshot
from test_turns import mask_of, positions_of
from torch import Tensor, nn

import vtc
from vtc.core import Reducer
from vtc.engine import upstream
from vtc.families import family_of

CASES = 120
TOLERANCE = 1e-5
STEPS = 3
POOL = 12
"""Pictures of each family, of different size where it takes any: as many as the longest case shows."""
COUNT = int(os.environ.get("VTC_ORACLE", CASES))
NAMES = (
    "llava", "llava_siglip", "llava_next", "vipllava", "llava_next_video", "llava_onevision", "internvl", "idefics3", "mistral3",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row of a turn: how many pictures it has, and how many words stand before, between and behind them."""

    pictures: int
    words: int


@dataclass(frozen=True)
class Case:
    """One drawn case; what it prints as makes it again. ``first``: the pictures are those of the pool from there on."""

    family: str
    parts: tuple[Reducer, ...]
    turns: tuple[tuple[Row, ...], ...]
    mask: str
    impl: str
    static: bool = False
    first: int = 0


FOUND: tuple[Case, ...] = (
    # a part with compact positions that drops nothing behind one with original positions: alone it left the gaps, in a batch not
    Case(
        "llava",
        (BoundaryPicker(keep=0.5, positions="original"), DecoderPicker(keep=0.67, positions="compact", layer=1)),
        ((Row(1, 1), Row(1, 1)),),
        "2-D",
        "sdpa",
    ),
    Case(
        "llava_next",
        (BoundaryPicker(keep=12, positions="original"), DecoderPicker(keep=0.5, positions="compact", layer=1)),
        ((Row(1, 1), Row(2, 1)),),
        "2-D",
        "sdpa",
        first=1,
    ),
    # as many rows as pictures, but not one in each: where a model packs the tiles of a row together, it was refused
    Case(
        "idefics3",
        (BoundaryPicker(keep=4), DecoderPicker(keep=2)),
        ((Row(0, 1), Row(2, 1), Row(1, 1)),),
        "2-D",
        "sdpa",
    ),
)
"""Cases that failed once, as small as they were made."""


# --------------------------------------------------------------------------------------------------------------- drawing
@st.composite
def cases(draw: Any, family: str) -> Case:
    facts = FAMILIES[family]
    policy = st.sampled_from(["original", "compact"])
    newlines = st.sampled_from([None, "compete", "all", "with_row", "none"] if facts.anyres else [None])
    salts = st.integers(1, 50)
    any_budget = st.one_of(st.sampled_from([0.15, 0.33, 0.5, 0.67, 0.9]), st.integers(1, 12))

    def made(kind: type[Picker], **options: Any) -> Reducer:
        options |= {"positions": draw(policy), "newlines": draw(newlines)}
        if kind is not ImagePicker:
            options["ragged"] = draw(st.booleans())
        if kind not in (ImagePicker, EncoderPicker):
            options["merge"] = draw(st.booleans())
        if kind not in (ImagePicker, EncoderPicker, TwoLayerPicker):
            options["salt"] = draw(salts)
        return kind(**options)

    towers = tower_pickers(family)
    compositions = ["boundary decoder", "tower boundary", "tower decoder", "tower boundary decoder"]
    stages = draw(st.sampled_from(compositions if towers else compositions[:1])).split()
    parts = []
    if "tower" in stages:
        kind = draw(st.sampled_from(towers))
        parts.append(made(kind, keep=draw(st.sampled_from([0.4, 0.6, 0.9]))))
    if "boundary" in stages:
        parts.append(made(BoundaryPicker, keep=draw(any_budget)))
    if "decoder" in stages and draw(st.booleans()):
        parts.append(made(DecoderPicker, keep=draw(any_budget), layer=draw(st.integers(1, DECODER_LAYERS - 1))))
    elif "decoder" in stages:
        parts.append(made(TwoLayerPicker, keep=0.6))

    batch = draw(st.integers(1, 3))
    row = st.builds(Row, st.integers(0, 2), st.integers(1, 4))
    turn = st.lists(row, min_size=batch, max_size=batch).map(tuple)
    turns = (*draw(st.lists(turn, max_size=1)), draw(turn.filter(lambda rows: any(r.pictures for r in rows))))
    # the tower of 4.57's Idefics3 makes its mask by the name of the implementation, which the stand-in does not have
    # and Pixtral's, which packs pictures in one sequence, tells FlashAttention where they end by positions that ours does not read
    stands_in = (STATIC or not facts.tiles) and family != "mistral3"
    impl = draw(st.sampled_from(["sdpa", "eager64", *(["fake_flash"] if stands_in else [])]))
    static = STATIC and impl != "fake_flash" and len(turns) == 1 and draw(st.booleans())  # others are refused
    mask = draw(st.sampled_from(["2-D", "bool", "additive"] if impl == "sdpa" and not static else ["2-D"]))
    return Case(family, tuple(parts), turns, mask, impl, static, draw(st.integers(0, POOL - 1)))


@functools.cache
def tower_pickers(family: str) -> tuple[type[Picker], ...]:
    """Those of the tower that the family takes."""
    stages = family_of(shared(family)).facts.stages
    return tuple(k for k in (EncoderPicker, VisionPicker, ImagePicker) if not stages[k.stage])


# --------------------------------------------------------------------------------------------------------- conversations
@functools.cache
def picture(family: str, number: int) -> tuple[dict[str, Tensor], int]:
    """Pixel arguments of a picture of the pool alone, and its fingerprint."""
    model, case = shared(family), FAMILIES[family]
    sizes = [[40, 56], [56, 30], [28, 28], [56, 56], [30, 40]][number % 5] if case.anyres else None
    inputs = make_inputs(family, model, images=[1], seed=number, sizes=sizes and [sizes])
    return case.one(inputs, model, 0), marks_of(model, inputs)[0]


def collate(family: str, rows: list[list[int]]) -> dict[str, Tensor]:
    """Pixel arguments of the pictures of some rows, as processors pad them."""
    if not any(rows):
        return {}
    alone = [[picture(family, n)[0] for n in row] for row in rows]
    flat = [one for row in alone for one in row]
    joined = {k: torch.cat([one[k] for one in flat]) for k in flat[0] if k != "pixel_values"}
    pixels = [[one["pixel_values"] for one in row] for row in alone]
    if FAMILIES[family].tiles:  # (rows, pictures, ...): rows with fewer are filled up
        longest = max(map(len, pixels))
        shape = flat[0]["pixel_values"].shape
        padded = [torch.cat([*row, *[torch.zeros(shape, dtype=torch.float64)] * (longest - len(row))], 1) for row in pixels]
        return joined | {"pixel_values": torch.cat(padded)}
    every = [p for row in pixels for p in row]
    size = [max(p.shape[d] for p in every) for d in range(1, every[0].dim())]
    full = torch.zeros(len(every), *size, dtype=torch.float64)
    for target, one in zip(full, every, strict=True):
        target[tuple(slice(n) for n in one.shape[1:])] = one[0]
    return joined | {"pixel_values": full}


@dataclass
class Talk:
    """``ids`` and ``mask (B, q)`` and ``pixels`` of each turn; ``whole``: all of it as one prompt; ``marks`` of its pictures."""

    ids: list[Tensor]
    mask: list[Tensor]
    pixels: list[dict[str, Tensor]]
    whole: dict[str, Tensor]
    marks: list[int]


def talk(case: Case, of: int | None = None) -> Talk:
    """Say what the case says; ``of``: one row of it alone, without padding."""
    model, rows = shared(case.family), range(len(case.turns[0])) if of is None else [of]
    numbers = (n % POOL for n in itertools.count(case.first))
    shown = [[[next(numbers) for _ in range(row.pictures)] for row in turn] for turn in case.turns]
    ids, masks = [], []
    for number, turn in enumerate(case.turns):
        said = []
        for r in rows:
            words = torch.randint(3, 90, (4, 4), generator=torch.Generator().manual_seed(10 * number + r)).tolist()
            line = words[3][: turn[r].words]
            for place, n in enumerate(shown[number][r]):
                one, _ = picture(case.family, n)
                line += image_ids(model, 0, len(image_features(model, one)[0]), one) + words[place][: turn[r].words]
            said.append(line + words[2][: turn[r].words])
        longest = max(map(len, said))
        ids.append(torch.tensor([[0] * (longest - len(s)) + s for s in said]))
        masks.append(torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in said]))
    together = [[n for turn in shown for n in turn[r]] for r in rows]
    whole = {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(masks, 1), **collate(case.family, together)}
    marks = [picture(case.family, n)[1] for row in together for n in row]
    return Talk(ids, masks, [collate(case.family, [turn[r] for r in rows]) for turn in shown], whole, marks)


def converse(model: nn.Module, said: Talk, mask: str, static: bool, steps: int = STEPS) -> tuple[Tensor, Tensor, list[Any]]:
    """Logits of the last turn ``(B, q, V)`` and of the greedy steps behind it ``(B, steps, V)``; the cache's layers."""
    cache, out = None, None
    seen, name = said.mask[0][:, :0], upstream.cache_argument(model)
    if static:
        from transformers import StaticCache

        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=said.whole["input_ids"].shape[1] + steps)
    with torch.no_grad():
        for ids, own, pixels in zip(said.ids, said.mask, said.pixels, strict=True):
            seen, q = torch.cat([seen, own], 1), ids.shape[1]
            given = {"input_ids": ids, "attention_mask": mask_of(mask, seen, q, model.dtype), **pixels}
            out = model(**given, position_ids=positions_of(seen)[:, -q:], use_cache=True, **{name: cache})
            cache = upstream.cache_of(out)
        last, after = out.logits, []
        logits = last[:, -1]
        for _ in range(steps):
            token = suppressed(logits).argmax(-1, keepdim=True)
            seen = torch.cat([seen, torch.ones_like(token)], 1)
            given = {"input_ids": token, "attention_mask": mask_of(mask, seen, 1, model.dtype)}
            out = model(**given, position_ids=positions_of(seen)[:, -1:], use_cache=True, **{name: cache})
            logits = out.logits[:, -1]
            after.append(logits)
    return last, torch.stack(after, 1) if after else last[:, :0], cache.layers


def reference(model: nn.Module, said: Talk, plan: Plan) -> tuple[Tensor, Tensor]:
    """The same from the slow reference, which sees everything at once and hides what is gone."""
    given, q, after = dict(said.whole), said.ids[-1].shape[1], []
    last = None
    with oracle_model(model, plan) as twin, torch.no_grad():
        for _ in range(STEPS + 1):
            logits = twin(**given, position_ids=positions_of(given["attention_mask"]), use_cache=False).logits
            last = logits[:, -q:] if last is None else last
            after.append(logits[:, -1])
            token = suppressed(after[-1]).argmax(-1, keepdim=True)
            given["input_ids"] = torch.cat([given["input_ids"], token], 1)
            given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(token)], 1)
    return last, torch.stack(after[1:], 1)


# ----------------------------------------------------------------------------------------------------------------- tests
drawn = settings(
    max_examples=-(-COUNT // len(NAMES)),
    deadline=None,
    derandomize="VTC_ORACLE" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[p for p in Phase if "VTC_ORACLE" in os.environ or p is not Phase.shrink],  # (which takes minutes)
)


@pytest.mark.parametrize("family", NAMES)
def test_compositions_in_conversations(family):
    drawn(given(cases(family))(check))()


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_compositions_that_failed_once(case):
    check(case)


def check(case: Case) -> None:
    model, parts = shared(case.family, case.impl), list(case.parts)
    said = talk(case)
    reducer = vtc.registry.resolve(parts)
    plan = plan_of(shared(case.family), said.whole, reducer.parts(), said.marks)
    want, want_after = reference(shared(case.family), said, plan)
    plain, before = converse(model, said, case.mask, case.static, 0)[0], snapshot(model)
    handle = vtc.patch(model, parts)
    try:
        got, got_after, layers = converse(model, said, case.mask, case.static)
        alone = [converse(model, talk(case, of=r), case.mask, case.static) for r in range(len(got))]
    finally:
        handle.remove()
    assert snapshot(model) == before
    assert torch.equal(converse(model, said, case.mask, case.static, 0)[0], plain), "unpatch is exact"

    q, real = said.ids[-1].shape[1], said.whole["attention_mask"].bool()
    kept = real[:, -q:] & ~plan.hide[DECODER_LAYERS - 1][:, -q:]
    close(got[kept], want[kept], "the prompt, beside the reference")
    close(got_after, want_after, "the steps, beside the reference")
    for r, (own, own_after, _) in enumerate(alone):
        close(own[0], got[r, -own.shape[1] :], f"row {r} alone: the prompt")
        close(own_after[0], got_after[r], f"row {r} alone: the steps")
    for i, layer in enumerate(layers if not case.static else []):  # of every turn, as many as its longest row has left
        held, start = 0, 0
        for ids in said.ids:
            at = slice(start, start + ids.shape[1])
            fewer = visual_of({"input_ids": ids}).any() and i in plan.hide
            held += int((real & ~plan.hide[i])[:, at].sum(1).max()) if fewer else ids.shape[1]
            start = at.stop
        assert layer.keys.shape[-2] == held + STEPS, f"layer {i} holds too much, or too little"


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    error = (got - want).abs().max().item()
    assert error < TOLERANCE, f"{what}: {error:.1e}"
