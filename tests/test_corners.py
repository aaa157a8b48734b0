"""Corners of the engine that only odd inputs reach: rows of several whole pictures, newlines between reducers, views of different
length, wrappers of others, adapters that are wrong, pictures with the same pixels in another order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from family_cases import IMAGE_TOKEN
from models import DECODER_LAYERS, GRID, build, image_features, make_inputs, shared, view_count, visual_of
from pickers import BoundaryPicker, DecoderPicker, EncoderPicker, best, marks_of
from reference import Plan, given_to_projector, hidden_reference, oracle_model, plan_of, slot_sources, tower_layers
from torch import Tensor, nn

import vtc
from vtc import families
from vtc.core import EncoderState, Kind, Layout, Need
from vtc.errors import UnsupportedFeatureError
from vtc.families import llava
from vtc.signals import keys

TOLERANCE = 1e-5


# --------------------------------------------------------------------------------- LLaVA-OneVision: rows of several pictures
def several(images: list[int], seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Rows of one picture, which is cut into crops, and of several, which stay whole; left padded, as the processor passes them."""
    model = shared("llava_onevision")
    generator = torch.Generator().manual_seed(seed)
    sizes = [[40, 56], [56, 30], [28, 56], [56, 56], [30, 40], [50, 28]][: sum(images)]
    crops = [view_count(model, s) for s in sizes]
    whole = [n != 1 for n in images for _ in range(n)]
    views = [1 if w else n for w, n in zip(whole, crops, strict=True)]
    pixels = torch.zeros(len(sizes), max(views), 3, 28, 28, dtype=torch.float64)
    for i, n in enumerate(views):
        pixels[i, :n] = torch.randn(n, 3, 28, 28, generator=generator, dtype=torch.float64)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes), "batch_num_images": torch.tensor(images)}
    lengths = iter([len(f) for f in features(model, inputs)])
    rows = []
    for n in images:
        ids = torch.randint(3, 90, (4,), generator=generator).tolist()
        for _ in range(n):
            ids += [IMAGE_TOKEN] * next(lengths) + torch.randint(3, 90, (2,), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    inputs["attention_mask"] = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return model, inputs


def features(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Features of every picture by the unpatched model, told how many each row has."""
    config = model.config
    told = {"vision_feature_layer": config.vision_feature_layer, "vision_feature_select_strategy": "full"}
    with torch.no_grad():
        out = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"], **told
        )
    return [f.reshape(-1, f.shape[-1]) for f in getattr(out, "pooler_output", out)]


CUTS = {
    "boundary": BoundaryPicker(keep=0.4, newlines="all", positions="original"),
    "decoder": DecoderPicker(keep=0.4, layer=2, newlines="with_row", positions="original"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("images", [[1, 2, 3], [2, 1], [1, 1], [3]], ids=str)
def test_pictures_of_a_row_with_several_stay_whole(images, cut):
    """Slots, newlines and views of every picture, and what is generated from the shortened prompt, against the slow reference."""
    (model, inputs), reducer = several(images), CUTS[cut]
    made, newline = features(model, inputs), model.model.image_newline
    with vtc.patch(model, reducer) as handle, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        kept, stats = handle.stats.kept, handle.stats.last.images
    assert [len(k.layout) for k in kept] == [i.slots for i in stats] == [len(f) for f in made]
    for k, f, whole in zip(kept, made, [n != 1 for n in images for _ in range(n)], strict=True):
        assert torch.equal(k.layout.kind == Kind.NEWLINE, (f == newline).all(1))
        assert (k.layout.views == 1) == whole and (not whole or len(f) == GRID * GRID + 1)
        assert len(k.entries) < len(f)
    gone = visual_of(inputs)
    columns = gone.nonzero()[:, 1].split([len(f) for f in made])
    rows = [row for row, n in enumerate(images) for _ in range(n)]
    for row, own, k in zip(rows, columns, kept, strict=True):
        gone[row, own[k.entries]] = False
    tokens, logits, _ = hidden_reference(model, inputs, Plan(hide={i: gone for i in range(reducer.layer, DECODER_LAYERS)}), 3)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < TOLERANCE


def test_a_changed_pixel_of_a_whole_picture_changes_its_own_slot():
    """Without attention in the tower: the layout's place of every slot is where the pixel is."""
    model, inputs = several([1, 2])
    twin = build("llava_onevision")
    for layer in tower_layers(twin):
        nn.init.zeros_(layer.self_attn.out_proj.weight), nn.init.zeros_(layer.self_attn.out_proj.bias)
    before = features(twin, inputs)
    with vtc.patch(model, "uniform", keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        layouts = [k.layout for k in handle.stats.kept]
    for image, y, x in ((1, 3, 20), (2, 27, 1), (2, 8, 8)):  # the two pictures of the second row: 4 x 4 patches of 7 pixels
        pixels = inputs["pixel_values"].clone()
        pixels[image, 0, :, y, x] += 5
        after = features(twin, {**inputs, "pixel_values": pixels})
        moved = [(a - b).abs().amax(1).gt(1e-9).nonzero()[:, 0].tolist() for a, b in zip(after, before, strict=True)]
        assert [len(m) for m in moved] == [int(i == image) for i in range(3)]
        (slot,) = moved[image]
        assert (int(layouts[image].row[slot]), int(layouts[image].col[slot])) == (y // 7, x // 7)


# ------------------------------------------------------------------------------------------------- newlines in compositions
@pytest.mark.parametrize("second", ["none", "all", "with_row", "compete"])
@pytest.mark.parametrize("first", ["compete", "all", "with_row"])
def test_newlines_that_survived_are_no_patches_of_the_next_stage(first, second):
    """They count as candidates only where the second reducer lets newlines compete."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 2)
    parts = [
        BoundaryPicker(keep=0.7, newlines=first, positions="original"),
        DecoderPicker(keep=0.5, layer=2, salt=3, newlines=second, positions="original"),
    ]
    plan = plan_of(model, inputs, parts, marks_of(model, inputs))
    _, logits, prompt = hidden_reference(model, inputs, plan, 1)
    sources = [source for _, source in slot_sources(model, inputs)]
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with vtc.patch(model, parts) as handle, torch.no_grad():
        got = model(**inputs, position_ids=positions).logits
        kept = handle.stats.kept
    assert (got[:, -1] - logits[:, 0]).abs().max() < TOLERANCE
    keep = inputs["attention_mask"].bool() & ~plan.hide[DECODER_LAYERS - 1]
    assert (got - prompt)[keep].abs().max() < TOLERANCE
    newlines = sum(int((source[k.entries] < 0).sum()) for k, source in zip(kept, sources, strict=True))
    assert (newlines == 0) == (second == "none")


def test_registered_methods_in_a_composition_see_patches_only():
    """`random` lets newlines compete; `fastv` behind it drops them, and its budget is one of patches."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, 2)
    pair = [vtc.create("random", keep=0.8, newlines="compete"), vtc.create("fastv", keep=0.4, layer=2, newlines="none")]
    with vtc.patch(model, pair) as handle, torch.no_grad():
        model(**inputs)
        kept, images = handle.stats.kept, handle.stats.last.images
    for k, image in zip(kept, images, strict=True):
        assert (k.layout.kind[k.entries] == Kind.PATCH).all()
        first, second = image.stages
        assert second.before == first.after == round(0.8 * image.slots) and second.after == round(0.4 * image.slots) == len(
            k.entries
        )


# ---------------------------------------------------------------------------------------------- views of different length
@dataclass(frozen=True, kw_only=True)
class ThereAndBack(EncoderPicker):
    """Another number of patches of every view leaves behind layer 0, and comes back in front of layer 2."""

    name: ClassVar[str] = "there_and_back"

    @property
    def returns(self) -> int:
        return 2

    def encoder_needs(self, layer: int) -> tuple[Need, ...]:
        return (keys(layer),) if layer == 0 else ()

    def step(self, state: EncoderState):
        score = state.taps["keys"].sum(-1)
        less = 3 * (score[:, 0] > score[:, 1]).long() + 2 * (score[:, 2] > score[:, 3]).long()
        return {}, best(score, state.valid, state.target - less)


@pytest.mark.parametrize("name", ["llava", "llava_siglip", "llava_next"])
def test_patches_of_views_of_different_length_come_back_as_they_left(name):
    model = shared(name)
    sizes = [[40, 56], [56, 30], [28, 56]] if name == "llava_next" else None
    inputs = make_inputs(name, model, images=[2, 1], sizes=sizes)
    caught: list[Tensor] = []
    with vtc.patch(model, ThereAndBack(keep=0.6)) as handle, torch.no_grad():
        hook = handle.family.projector.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
        model(**inputs)
        hook.remove()
    (got,) = caught
    # by hand: hide in layer 1, then put back what was there before it
    seen, head = {}, int(handle.family.facts.has_cls)
    layers = tower_layers(model)
    hooks = [
        layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.update(keys=out)),
        layers[1].register_forward_pre_hook(
            lambda m, a, k: seen.update(left=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    given_to_projector(model, inputs)
    for h in hooks:
        h.remove()
    score = seen["keys"].unflatten(-1, (layers[0].self_attn.num_heads, -1)).mean(2).sum(-1)[:, head:]
    gone = torch.ones(len(score), head + 16, dtype=torch.bool)
    for view, mine in enumerate(score):
        count = round(0.6 * 16) - 3 * int(mine[0] > mine[1]) - 2 * int(mine[2] > mine[3])
        gone[view, torch.cat([torch.arange(head), head + mine.topk(count).indices])] = False
    assert len(set(gone.sum(1).tolist())) > 1, "the views must differ"

    def put_back(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.where(gone[..., None], seen["left"], hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    with oracle_model(model, Plan(tower={1: gone})) as twin:
        hook = tower_layers(twin)[2].register_forward_pre_hook(put_back, with_kwargs=True)
        want = given_to_projector(twin, inputs)
        hook.remove()
    assert (got - want).abs().max() < 1e-9 and (got - given_to_projector(model, inputs)).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- others' wrappers
def test_a_wrapper_put_on_after_us_stays_and_works():
    """Un-patching leaves what somebody else set on the instance since, and what it calls is the model's own method again."""
    model = build("llava")
    inputs = make_inputs("llava", model)
    with torch.no_grad():
        plain = model(**inputs).logits
    vtc.patch(model, "uniform", keep=4)
    ours, calls = model.model.get_image_features, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    object.__setattr__(model.model, "get_image_features", wrapper)
    with torch.no_grad():
        short = model(**inputs).logits
        assert (short - plain)[:, -1].abs().max() > 1e-3 and len(calls) == 1
        vtc.unpatch(model)
        assert vars(model.model)["get_image_features"] is wrapper
        assert torch.equal(model(**inputs).logits, plain) and len(calls) == 2
        object.__delattr__(model.model, "get_image_features")
        assert torch.equal(model(**inputs).logits, plain) and "get_image_features" not in vars(model.model)


def test_a_wrapper_put_on_before_us_is_back_afterwards():
    model = build("llava")
    inputs = make_inputs("llava", model)
    own, calls = model.model.get_image_features, []
    object.__setattr__(model.model, "get_image_features", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    mine = vars(model.model)["get_image_features"]
    with vtc.patch(model, "uniform", keep=4), torch.no_grad():
        model(**inputs)
        assert vars(model.model)["get_image_features"] is not mine and len(calls) == 1
    assert vars(model.model)["get_image_features"] is mine


# -------------------------------------------------------------------------------------------------------------- wrong adapters
@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("reducer", ["uniform", "fastv", "visionzip"])
def test_an_adapter_that_is_off_by_one_is_found_out(monkeypatch, off, reducer):
    """What the model packs is compared with what its adapter expected, before anything is dropped by it."""
    model = build("llava")
    inputs = make_inputs("llava", model, 2)
    right = llava.build

    def wrong(model):
        family = right(model)
        describe = family.describe

        def describe_wrong(call):
            made = describe(call)
            layout = Layout.flat(GRID * GRID + off)
            return dataclasses.replace(made, slots=[layout] * len(made.slots))

        family.describe = describe_wrong
        return family

    monkeypatch.setattr(families.adapters()["llava"], "build", wrong)
    with (
        vtc.patch(model, reducer, keep=4),
        pytest.raises(UnsupportedFeatureError, match=r"packed \[16, 16, 16\] visual tokens|on grids of 17 patches where"),
    ):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)


def test_an_adapter_that_mixes_up_two_pictures_is_found_out(monkeypatch):
    """The sum is right, the pictures are not."""
    model = build("llava_next")
    inputs = make_inputs("llava_next", model, images=[1, 1], sizes=[[40, 56], [28, 56]])
    module = families.adapters()["llava_next"]
    right = module.build

    def wrong(model):
        family = right(model)
        describe = family.describe

        def swapped(call):
            made = describe(call)
            return dataclasses.replace(made, views=made.views[::-1], slots=made.slots[::-1], patches=made.patches[::-1])

        family.describe = swapped
        return family

    monkeypatch.setattr(module, "build", wrong)
    lengths = [len(f) for f in image_features(model, inputs)]
    with vtc.patch(model, "uniform", keep=4), pytest.raises(UnsupportedFeatureError, match="this checkpoint's image settings"):
        model(**inputs)
    assert lengths[0] != lengths[1]


# ---------------------------------------------------------------------------------------------------------------- fingerprints
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_picture_s_fingerprint_is_of_its_pixels_in_their_places(name, dtype):
    """Flipped, turned, with two pixels swapped, scaled by the least there is: another one; alone or in a batch: the same."""
    model = shared(name, "sdpa", dtype)
    inputs = make_inputs(name, model, images=[1])
    pixels = inputs["pixel_values"]
    swapped = pixels.clone().flatten()
    swapped[[0, 1]] = swapped[[1, 0]]
    nudged = pixels.clone().flatten()
    nudged[7] = (
        torch.nextafter(nudged[7], torch.tensor(torch.inf, dtype=dtype)) if dtype != torch.bfloat16 else nudged[7] * 1.01
    )
    others = [pixels.flip(-1), pixels.flip(-2), swapped.view_as(pixels), nudged.view_as(pixels)]
    marks = [marks_of(model, {**inputs, "pixel_values": p})[0] for p in [pixels, *others]]
    assert len(set(marks)) == len(marks)
    two = make_inputs(name, model, images=[1, 1])
    assert marks_of(model, inputs) == marks[:1] and len(set(marks_of(model, two))) == 2
