"""tome, skipspan and evs: examples by hand, the tower's hooks against plain loops, per-frame budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES
from models import build, image_features, make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.core import Facts, Kind, Layout, Signals, Stage
from vtc.engine.encoder import EncoderRun, EncoderStage
from vtc.engine.patch import usable
from vtc.errors import BudgetError, UnknownArgumentError, UnsupportedFeatureError
from vtc.families import family_of
from vtc.inspect import NOMINAL
from vtc.reducers.evs import NO_FRAME, media_positions, released_positions
from vtc.reducers.tome import match, merged_per_layer, next_step
from vtc.stats import Clock
from vtc.views import ask

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_next"])


def directions(*degrees: float) -> Tensor:
    """Keys ``(1, n, 2)`` in the plane."""
    angle = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


# ---------------------------------------------------------------------------------------------------------------- ToMe
def test_tome_by_hand_without_class_token() -> None:
    # first set: tokens 0 2 4 at 0, 50, 100 degrees; second set: 1 3 5 at 10, 55, 160. Nearest: 0-1 (10), 2-3 (5), 4-3 (45).
    key = directions(0, 10, 50, 55, 100, 160)
    valid = torch.ones(1, 6, dtype=torch.bool)
    owner, left = match(key, valid, torch.tensor([2]), has_cls=False)
    # the two closest pairs merge (2 into 3, 0 into 1); what stays of the first set (4) comes first, then 1 3 5
    assert owner.tolist() == [[1, 1, 2, 2, 0, 3]]
    assert left.tolist() == [4]
    owner, left = match(key, valid, torch.tensor([1]), has_cls=False)
    # only 2 merges; 0 (10 degrees away) and 4 (45 away) stay, the more similar first
    assert owner.tolist() == [[0, 2, 3, 3, 1, 4]]
    assert left.tolist() == [5]


def test_tome_by_hand_with_class_token() -> None:
    # the class token takes the first turn, so patches 1 3 5 are in its set: at 10, 55, 160; the others at 0, 50, 100
    key = directions(0, 10, 50, 55, 100, 160)
    owner, left = match(key, torch.ones(1, 6, dtype=torch.bool), torch.tensor([2]), has_cls=True)
    # 3 goes into 2 (5 degrees), 1 into 0 (10); 5 stays and comes first, then 0 2 4
    assert owner.tolist() == [[1, 1, 2, 2, 3, 0]]
    assert left.tolist() == [4]


def test_tome_ignores_padding() -> None:
    key, valid = directions(0, 10, 50, 55, 100, 160), torch.ones(2, 8, dtype=torch.bool)
    valid[0, 6:] = False
    full = torch.cat([torch.cat([key, directions(0, 10)], 1), torch.cat([key, directions(200, 205)], 1)])
    owner, left = match(full, valid, torch.tensor([2, 2]), has_cls=False)
    alone, count = match(key, valid[:1, :6], torch.tensor([2]), has_cls=False)
    assert owner[0].tolist() == [*alone[0].tolist(), -1, -1]
    assert left.tolist() == [int(count), 6]


def test_tome_equal_keys_merge_in_order() -> None:
    owner, left = match(torch.ones(1, 7, 3), torch.ones(1, 7, dtype=torch.bool), torch.tensor([2]), has_cls=False)
    assert owner.tolist() == [[2, 2, 2, 3, 0, 4, 1]], "ties: the lowest of the first set, into the lowest of the second"
    assert left.tolist() == [5]
    assert torch.isfinite(
        match(torch.zeros(1, 4, 3), torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]), has_cls=True)[0]
    ).all()


def test_tome_one_patch_stays() -> None:
    for has_cls in (True, False):
        owner, left = match(torch.ones(1, 1, 3), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]), has_cls=has_cls)
        assert (owner.tolist(), left.tolist()) == ([[0]], [1])


@pytest.mark.parametrize("tokens", [1, 2, 9, 24, 577])
@pytest.mark.parametrize("layers", [1, 2, 5, 23])
def test_tome_steps_reach_every_target(tokens: int, layers: int) -> None:
    for target in range(-(-tokens // 2**layers), tokens + 1, max(1, tokens // 20)):
        n, steps = tokens, []
        for left in range(layers, 0, -1):
            steps.append(next_step(n, target, left))
            assert 0 <= steps[-1] <= n // 2
            n -= steps[-1]
        assert n == target


def test_tome_spreads_merging_evenly_where_halving_allows_it() -> None:
    def steps(tokens: int, target: int, layers: int) -> list[int]:
        out = []
        for left in range(layers, 0, -1):
            out.append(next_step(tokens - sum(out), target, left))
        return out

    assert steps(576, 64, 23) == [23] * 6 + [22] * 17
    assert steps(10, 9, 4) == [1, 0, 0, 0]
    assert steps(24, 6, 2) == [12, 6], "9 and 9 would leave the second layer 15, of which it can merge 7"
    assert steps(24, 24, 3) == [0, 0, 0]


def test_tome_schedule_keeps_its_mean() -> None:
    assert merged_per_layer(8, 12) == [8] * 12
    assert merged_per_layer(8, 3, -1.0) == [16, 8, 0]
    assert merged_per_layer(8, 3, 1.0) == [0, 8, 16]
    assert merged_per_layer(8, 1, 0.0) == [8]


def merged_tower(
    model: nn.Module, pixels: Tensor, keep: list[int], proportional: bool
) -> tuple[list[Tensor], list[list[set[int]]]]:
    """Tower features of every view after ToMe, and the patches of each token: a plain loop over tokens and pairs, no hooks."""
    family = family_of(model)
    tower = getattr(family.tower, "vision_model", family.tower)
    used, head = family.facts.feature_layer + 1, int(family.facts.has_cls)
    features, groups = [], []
    for view, target in zip(pixels, keep, strict=True):
        x = tower.embeddings(view[None])
        x = getattr(tower, "pre_layrnorm", nn.Identity())(x)
        members = [set()] * head + [{p} for p in range(x.shape[1] - head)]
        for i, layer in enumerate(family.encoder_layers[:used]):
            normed = layer.layer_norm1(x)
            a = layer.self_attn
            heads = a.num_heads
            q, k, v = (f(normed)[0].view(len(members), heads, -1).transpose(0, 1) for f in (a.q_proj, a.k_proj, a.v_proj))
            logits = q @ k.transpose(1, 2) * a.head_dim**-0.5
            if proportional:
                logits = logits + torch.tensor([max(len(m), 1) for m in members]).to(logits).log()
            mixed = (logits.softmax(-1) @ v).transpose(0, 1).reshape(1, len(members), -1)
            x = x + a.out_proj(mixed)
            key = torch.nn.functional.normalize(k.mean(0), dim=-1)
            n = len(members) - head
            r = next_step(n, target, used - i)
            first, second = list(range(0, len(members), 2)), list(range(1, len(members), 2))
            pairs = []
            for s in first[head:] if head else first:
                if not second:
                    continue
                cosines = (key[s] @ key[second].T).tolist()
                best = max(range(len(second)), key=lambda j: (cosines[j], -j))
                pairs.append((cosines[best], s, second[best]))
            pairs.sort(key=lambda p: (-p[0], p[1]))
            into: dict[int, list[int]] = {}
            for _, s, t in pairs[:r]:
                into.setdefault(t, []).append(s)
            stay = [s for _, s, _ in pairs[r:]]
            stay = [0, *sorted(stay)] if head else stay
            order = (stay + second) if r else list(range(len(members)))
            new, together = [], []
            for t in order:
                parts = [t, *into.get(t, [])]
                weight = torch.tensor([max(len(members[p]), 1) for p in parts]).to(x)
                new.append((x[0, parts] * weight[:, None]).sum(0) / weight.sum())
                together.append(set().union(*(members[p] for p in parts)))
            x, members = torch.stack(new)[None], together
            x = x + layer.mlp(layer.layer_norm2(x))
        features.append(x[0, head:])
        groups.append(members[head:])
    return features, groups


@FAMILIES
@pytest.mark.parametrize("options", [{"keep": 10}, {"keep": 0.5, "proportional": False}, {"r": 3}], ids=str)
def test_tome_in_the_tower_equals_a_plain_loop(family: str, options: dict[str, Any]) -> None:
    model = shared(family)
    inputs = make_inputs(family, model, batch=2, seed=4)
    if family == "llava_siglip" and not recorded_by_hooks():
        with pytest.raises(UnsupportedFeatureError, match="'tome' merges tokens inside the layers.*upgrade transformers"):
            vtc.patch(model, "tome", **options)
        return
    reducer = vtc.create("tome", **options).bind(family_of(model).facts)
    family_facts = family_of(model).facts
    per = family_facts.grid[0] * family_facts.grid[1]
    seen: dict[str, Any] = {}
    with vtc.patch(model, "tome", **options) as handle, torch.no_grad():
        before = handle.family.projector.register_forward_pre_hook(lambda _m, args: seen.update(features=args[0]))
        try:
            model(**inputs)
        finally:
            before.remove()
        images = handle.stats.last.images
        kept = handle.stats.kept
    pixels = inputs["pixel_values"]
    calls = family_of(model).describe({"pixel_values": pixels, **{k: inputs[k] for k in ("image_sizes",) if k in inputs}})
    views = [
        p for image, count in zip(pixels, calls.views, strict=True) for p in (image[:count] if image.dim() == 4 else [image])
    ]
    budgets = [b for count in calls.views for b in reducer.view_budgets(count, per, family_facts)]
    if "r" in options:
        left = per
        for _ in range(family_facts.feature_layer + 1):
            left -= min(options["r"], left // 2)
        assert budgets == [left] * len(budgets)
        reducer = vtc.create("tome", keep=left)
    with torch.no_grad():
        want, groups = merged_tower(model, torch.stack(views), budgets, options.get("proportional", True))
    assert seen["features"].shape[1] == max(map(len, want))
    for got, expected in zip(seen["features"], want, strict=True):
        torch.testing.assert_close(got[: len(expected)], expected, atol=1e-9, rtol=1e-9)
    # where the tokens stand: at the first patch of each group that has a slot
    start = 0
    for image, (layout, count) in enumerate(zip(calls.patches, calls.views, strict=True)):
        slot = layout.slot.tolist()
        firsts = []
        for v in range(count):
            for group in groups[start + v]:
                real = sorted(slot[v * per + p] for p in group if slot[v * per + p] >= 0)
                order = [v * per + p for p in sorted(group)]
                place = next((slot[p] for p in order if slot[p] >= 0), None)
                firsts += [place] if real else []
        start += count
        assert kept[image].entries.tolist() == sorted(firsts)
        assert images[image].kept == len(firsts)


def recorded_by_hooks() -> bool:
    """Transformers 4.57 records the states of SigLIP's layers before any hook sees them: refused there, see below."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def test_tome_refuses_what_it_cannot_do() -> None:
    model = shared("llava")
    with pytest.raises(BudgetError, match="at most once in each of the 3 tower layers: keep at least 2 tokens"):
        vtc.patch(model, "tome", keep=1)
    with pytest.raises(BudgetError, match="exactly one of keep=, avg_tokens= and r="):
        vtc.patch(model, "tome", keep=8, r=2)
    with pytest.raises(BudgetError, match="exactly one"):
        vtc.patch(model, "tome")
    for r in (0, -1):
        with pytest.raises(BudgetError, match="r=.* makes no sense"):
            vtc.create("tome", r=r)
    for r in (2.5, True):
        with pytest.raises(UnknownArgumentError, match="r=.* is not possible; use a whole number"):
            vtc.create("tome", r=r)
    with pytest.raises(UnknownArgumentError, match="inflect"):
        vtc.create("tome", keep=8, inflect=0.5)
    with pytest.raises(UnknownArgumentError, match="inflect"):
        vtc.create("tome", r=8, inflect=2.0)
    assert vtc.create("tome.vit-b16", keep=9).r is None, "a budget of another form replaces the preset's"


class Layer(nn.Module):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden_states


def stage_of(part: Any, mlp_branch: Any, layers: int = 2, has_cls: bool = True) -> EncoderStage:
    facts = Facts(
        "test", 1, layers, layers - 1, None, None, (2, 4), has_cls, frozenset({"attention", "cls"}), dict.fromkeys(Stage, "")
    )
    attention = [nn.Module() for _ in range(layers)]
    run = EncoderRun([1], None, Clock())
    return EncoderStage(part.bind(facts), [Layer() for _ in range(layers)], attention, mlp_branch, facts, lambda: run)


def test_a_tower_without_a_known_mlp_branch_is_refused() -> None:
    model = shared("internvl")  # scales its branches by parameters
    with pytest.raises(
        UnsupportedFeatureError, match="'tome' merges tokens inside the layers.*between attention and MLP.*'hierpool'"
    ):
        vtc.patch(model, "tome", keep=4)


def test_flash_attention_cannot_weigh_sizes() -> None:
    for proportional in (True, False):
        stage = stage_of(vtc.create("tome", keep=4, proportional=proportional), lambda layer: (layer, layer))
        stage.attention[1].config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()
        run = stage.current()
        run.size = torch.ones(1, 8)
        if proportional:
            with pytest.raises(UnsupportedFeatureError, match="FlashAttention.*'sdpa'.*proportional=False"):
                stage.mask(run, 1, torch.zeros(1, 9, 4))
        else:
            assert stage.mask(run, 1, torch.zeros(1, 9, 4)) is None


def test_gradients_reach_every_merged_patch() -> None:
    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", model, seed=1)
    pixels = inputs.pop("pixel_values").requires_grad_()
    with vtc.patch(model, "tome", keep=5):
        model(**inputs, pixel_values=pixels, labels=inputs["input_ids"]).loss.backward()
    patch = pixels.grad.unfold(2, 7, 7).unfold(3, 7, 7).abs().sum((0, 1, 4, 5))
    assert (patch > 0).all(), "every patch is part of some token"


def test_checkpointing_a_merging_tower_is_refused() -> None:
    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", model, seed=1)
    model.gradient_checkpointing_enable()
    model.train()
    with vtc.patch(model, "tome", keep=5), pytest.raises(UnsupportedFeatureError, match="gradient checkpointing.*'tome'"):
        model(**inputs)


def test_all_patches_are_accounted_for() -> None:
    model = shared("llava")
    inputs = make_inputs("llava", model, batch=2, seed=3)
    with vtc.patch(model, "tome", keep=6) as handle, torch.no_grad():
        model(**inputs)
        for kept in handle.stats.kept:
            ((slots, anchors, owner),) = kept.merges
            assert torch.equal(slots[anchors].sort().values, kept.entries)
            assert (owner >= 0).all()
            assert owner.unique().tolist() == list(range(6))
            for group in range(6):  # a token stands at the first of its patches
                assert int(anchors[group]) == int((owner == group).nonzero()[0])


# ------------------------------------------------------------------------------------------------------------ skip span
@FAMILIES
@pytest.mark.parametrize("keep", [6, 0.3])
def test_skipspan_equals_a_plain_loop(family: str, keep: float) -> None:
    model = build(family, vision={"num_hidden_layers": 6}, **({} if family == "llava_siglip" else {"vision_feature_layer": -2}))
    inputs = make_inputs(family, model, batch=2, seed=5)
    found = family_of(model)
    facts = found.facts
    per, head, used = facts.grid[0] * facts.grid[1], int(facts.has_cls), facts.feature_layer + 1
    start, stop = 2, 4
    reducer = vtc.create("skipspan", keep=keep, start=start, stop=stop).bind(facts)
    seen: dict[str, Any] = {}
    with vtc.patch(model, "skipspan", keep=keep, start=start, stop=stop) as handle, torch.no_grad():
        hook = handle.family.projector.register_forward_pre_hook(lambda _m, args: seen.update(features=args[0]))
        logits = model(**inputs).logits
        hook.remove()
        images = handle.stats.last.images
    pixels = inputs["pixel_values"]
    call = found.describe({"pixel_values": pixels, **{k: inputs[k] for k in ("image_sizes",) if k in inputs}})
    views = torch.stack(
        [p for image, n in zip(pixels, call.views, strict=True) for p in (image[:n] if image.dim() == 4 else [image])]
    )
    budgets = [b for count in call.views for b in reducer.view_budgets(count, per, facts)]
    tower = getattr(found.tower, "vision_model", found.tower)
    with torch.no_grad():
        for view, k, got in zip(views, budgets, seen["features"], strict=True):
            x, attention = getattr(tower, "pre_layrnorm", nn.Identity())(tower.embeddings(view[None])), torch.empty(0)
            for i, layer in enumerate(found.encoder_layers[:used]):
                if i == start:
                    chosen = attention[head:].sort(descending=True, stable=True).indices[:k].sort().values + head
                    chosen = torch.cat([torch.arange(head), chosen])
                    away, x = x, x[:, chosen]
                if i == stop:
                    x = away.index_copy(1, chosen, x)
                a, normed = layer.self_attn, layer.layer_norm1(x)
                q, key, v = (
                    f(normed)[0].view(x.shape[1], a.num_heads, -1).transpose(0, 1) for f in (a.q_proj, a.k_proj, a.v_proj)
                )
                weights = (q @ key.transpose(1, 2) * a.head_dim**-0.5).softmax(-1)
                attention = weights.mean(0)[0] if head else weights.mean((0, 1))
                x = x + a.out_proj((weights @ v).transpose(0, 1).reshape(1, x.shape[1], -1))
                x = x + layer.mlp(layer.layer_norm2(x))
            torch.testing.assert_close(got, x[0, head:], atol=1e-9, rtol=1e-9)
    assert all(i.kept == i.slots for i in images)
    assert all("ran through tower layers 2 to 3; all came back" in i.stages[0].note for i in images)
    with torch.no_grad():
        assert not torch.equal(logits, model(**inputs).logits)


def test_skipspan_refuses_spans_outside_the_tower() -> None:
    model = build("llava", vision={"num_hidden_layers": 6})
    for start, stop in ((0, 3), (3, 3), (2, 5), (4, 2)):
        with pytest.raises(UnknownArgumentError, match="use 1 <= start < stop <= 4"):
            vtc.patch(model, "skipspan", keep=8, start=start, stop=stop)
    with pytest.raises(UnsupportedFeatureError, match="this tower uses 2"):
        vtc.patch(build("llava", vision={"num_hidden_layers": 3}), "skipspan", keep=8)


def test_skipspan_default_span_is_the_one_of_clip() -> None:
    bound = vtc.create("skipspan", keep=0.45).bind(NOMINAL)
    assert (bound.start, bound.stop) == (6, 20)
    assert bound.view_budgets(1, 576, NOMINAL) == [259]


# ------------------------------------------------------------------------------------------------------------------ EVS
def clip(frames: int = 3, rows: int = 2, cols: int = 2, newline: bool = False) -> Layout:
    """Layout of a clip."""
    n = torch.arange(frames * rows * cols)
    view, row, col = n // (rows * cols), n // cols % rows, n % cols
    parts = {"kind": n * 0, "view": view, "row": row, "col": col, "y": row, "x": col}
    if newline:
        ends = {"kind": int(Kind.NEWLINE), "view": -1, "row": 0, "col": 0, "y": 0, "x": cols}
        parts = {k: torch.cat([t, torch.tensor([ends[k]])]) for k, t in parts.items()}
    slots = torch.arange(len(parts["kind"]))
    return Layout(**parts, slot=slots, grids=((rows, cols),) * frames, video=True)


def shown(features: Tensor, layout: Layout, budget: int, entries: Tensor | None = None) -> Signals:
    batch, n = features.shape[:2]
    entries = torch.arange(n).expand(batch, n) if entries is None else entries
    return Signals(features, layout, entries, budget, len(layout))


def test_evs_by_hand() -> None:
    # one number per token: the angle. Frame 1 turns its tokens by 0, 60, 10, 0 degrees, frame 2 by 90, 0, 20, 0 more
    first = [0.0, 20.0, 40.0, 60.0]
    second = [0.0, 80.0, 50.0, 60.0]
    third = [90.0, 80.0, 70.0, 60.0]
    signals = shown(directions(*first, *second, *third), clip(), 6)
    score = vtc.create("evs", keep=6).dissimilarity(signals)[0]
    assert torch.isinf(score[:4]).all()
    want = 1 - torch.tensor([0.0, 60.0, 10.0, 0.0, 90.0, 0.0, 20.0, 0.0]).deg2rad().cos()
    torch.testing.assert_close(score[4:], want, atol=1e-6, rtol=0)
    assert vtc.create("evs", keep=6).select(signals).index.tolist() == [[0, 1, 2, 3, 5, 8]]
    frames = vtc.create("evs", keep=2, per="frame").select_frames(signals).index.tolist()
    assert frames == [[1, 3, 5, 6, 8, 10]], "the first frame evenly spread, the others by dissimilarity"


def test_evs_compares_with_the_same_place_only_if_it_is_there() -> None:
    features = directions(0, 20, 40, 60, 0, 20, 40, 60, 0, 20, 40, 60)
    entries = torch.tensor(
        [[0, 1, 2, 3, 4, 6, 7, 9, 11]]
    )  # the second frame lost its second token: token 9 has nothing before it
    signals = shown(features[:, entries[0]], clip(), 5, entries)
    score = vtc.create("evs", keep=5).dissimilarity(signals)[0]
    assert torch.isinf(score).tolist() == [True] * 4 + [False, False, False, True, False]
    torch.testing.assert_close(score[[4, 5, 6, 8]], torch.zeros(4), atol=1e-6, rtol=0)


def test_evs_below_one_frame_and_on_images_spreads_evenly() -> None:
    signals = shown(torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0)), clip(), 2)
    reducer = vtc.create("evs", keep=2)
    assert reducer.select(signals).index.tolist() == [[1, 3]] * 2
    assert reducer.select(signals).note == NO_FRAME
    image = shown(signals.features[:, :4], Layout.grid(2, 2), 2)
    assert reducer.select(image).index.tolist() == [[1, 3]] * 2


def test_evs_official_keeps_the_whole_first_frame() -> None:
    facts = family_of(shared("llava")).facts
    official = vtc.create("evs", keep=2, official=True)
    assert official.wanted(clip(), facts) == 4
    assert vtc.create("evs", keep=0.49, official=True).wanted(clip(), facts) == 5, "rounded down"
    assert vtc.create("evs", keep=0.49).wanted(clip(), facts) == 6
    assert vtc.create("evs", keep=2).wanted(clip(), facts) == 2


def test_evs_numbers_a_prompt_as_the_release_by_hand() -> None:
    """A clip of 3 frames, 2 s apart, and an image: text goes on from the width of the grid, below the clip's last frame."""
    film = media_positions((3, 2, 2), torch.tensor([0, 1, 2, 3, 6, 9]), seconds=2, rate=2.0)
    assert film.tolist() == [[0, 0, 0, 0, 4, 8], [0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1], [2] * 6]
    still = media_positions((1, 1, 3), torch.tensor([0, 2]), seconds=0)
    assert still.tolist() == [[0, 0], [0, 0], [0, 2], [3, 3]]
    start = 9
    ids = torch.tensor([1, start, *[5] * 6, 2, start, 5, 5, 3, 3])
    positions, delta = released_positions(ids, torch.arange(len(ids)).expand(3, -1), [film, still], start)
    # the clip starts at 2; behind it 4, 5 (its start token at 1: 1 + 1 + 2); the image at 6, the text behind it at 5 + 1 + 3
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 6, 10, 4, 5, 6, 6, 9, 10]
    assert positions[2].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 6, 8, 9, 10]
    assert int(delta) == 11 - len(ids)
    with pytest.raises(ValueError, match="starts 2 media, 1 are given"):
        released_positions(ids, torch.arange(len(ids)).expand(3, -1), [film], start)
    with pytest.raises(ValueError, match="6 tokens does not fit behind place 9"):
        released_positions(ids, torch.arange(len(ids)).expand(3, -1), [film, film], start)


# ------------------------------------------------------------------------------------------------------ per-frame budgets
def test_a_budget_per_frame_counts_frames() -> None:
    facts = family_of(shared("llava")).facts
    for keep, want in ((2, 6), (0.5, 6), (1.0, 12), (9, 12)):
        assert vtc.create("divprune", keep=keep, per="frame").wanted(clip(), facts) == want
    assert vtc.create("divprune", keep=2, per="frame").wanted(Layout.grid(3, 4), facts) == 2, "an image is one frame"
    with pytest.raises(UnknownArgumentError, match="per='clip' is not possible; use one of image, frame"):
        vtc.create("divprune", keep=2, per="clip")


@pytest.mark.parametrize("name", ["random", "uniform", "divprune", "gridpool", "zooprune", "hierpool"])
@pytest.mark.parametrize("newline", [False, True])
def test_every_frame_keeps_its_share(name: str, newline: bool) -> None:
    layout = clip(frames=3, rows=3, cols=4, newline=newline)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, len(layout), 8, generator=generator)
    reducer = vtc.create(name, keep=4, per="frame")
    needs = {n.name: torch.rand(2, len(layout), generator=generator) for n in reducer.needs}
    signals = Signals(features, layout, torch.arange(len(layout)).expand(2, -1), 12, len(layout), needs, fingerprint=(1, 2))
    chosen = ask(reducer, signals).index
    assert chosen.shape == (2, 12)
    for row in chosen:
        assert layout.view[row].bincount(minlength=3).tolist() == [4, 4, 4]
        assert row.tolist() == sorted(set(row.tolist()))
    alone = ask(
        reducer,
        Signals(
            features[1:], layout, signals.entries[1:], 12, len(layout), {k: t[1:] for k, t in needs.items()}, fingerprint=(2,)
        ),
    )
    assert torch.equal(alone.index[0], chosen[1])


def test_models_features_are_there() -> None:
    """The plain loops above start from the model's own features when nothing is merged."""
    model = shared("llava")
    inputs = make_inputs("llava", model, seed=1)
    with torch.no_grad():
        want, _ = merged_tower(model, inputs["pixel_values"], [16], True)
        torch.testing.assert_close(family_of(model).projector(want[0]), image_features(model, inputs)[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["llava_next_video:clips", "qwen2_vl:clips"])
def test_per_frame_budgets_of_all_reducers(family: str) -> None:
    model = shared(family)
    inputs = make_inputs(family, model, batch=2, seed=1)
    served = []
    for name in usable(family_of(model).facts):
        options = {k: v for k, v in CASES[name].harsh.items() if k not in ("avg_tokens", "place")} | {"keep": 2, "per": "frame"}
        if vtc.info(name).stages[0] in ("image", "encoder", "vision") and family != "qwen2_vl:clips":
            continue  # refused: this family's videos are pooled behind the tower
        with vtc.patch(model, name, **options) as handle, torch.no_grad():
            model(**inputs)
        for image, kept in zip(handle.stats.last.images, handle.stats.kept, strict=True):
            counts = kept.layout.view[kept.entries].bincount(minlength=kept.layout.views).tolist()
            if CASES[name].count == "exact" and name != "aim":  # which prunes on, behind the budget
                assert counts == [2] * kept.layout.views, name
            elif CASES[name].count == "all":
                assert image.kept == image.slots
            else:
                assert max(counts) <= 2, name
        served.append(name)
    assert len(served) >= 15
