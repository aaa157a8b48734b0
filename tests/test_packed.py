"""Dropping patches inside Qwen2-VL's vision tower, which packs images of any size in one sequence."""

from __future__ import annotations

from typing import Any

import golden_flowcut
import pytest
import torch
from models import build, image_features, make_inputs, shared
from torch import Tensor, nn

import vtc
from vtc.core import Stage
from vtc.errors import UnsupportedFeatureError
from vtc.families import family_of

MERGE = 4


def inputs_of(batch: int = 1, name: str = "qwen2_vl") -> dict[str, Tensor]:
    return make_inputs(name, shared(name), batch, seed=3)


def pieces(inputs: dict[str, Tensor]) -> list[int]:
    """Patches of each image."""
    return inputs["image_grid_thw"].prod(-1).tolist()


def tower_alone(model: nn.Module, pixels: Tensor, grid: Tensor, tokens: int) -> dict[str, Tensor]:
    """What the release makes of one image: the golden files' own blocks, with this model's weights."""
    tower, seen = model.model.visual, {}

    def look(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(embeds=args[0] if args else kwargs["hidden_states"], turn=kwargs["position_embeddings"])

    hook = tower.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        tower(pixels, grid_thw=grid)
        hook.remove()
        cos, sin = seen["turn"]
        half = cos.shape[-1] // 2
        weights = {f"w.{k.removeprefix('blocks.')}": v.double() for k, v in tower.state_dict().items()}
        inputs = {"embeds": seen["embeds"], "rotary": torch.atan2(sin, cos)[:, :half].double(), **weights}
        params = {"heads": tower.config.num_heads, "depth": len(tower.blocks), "spatial_merge": 2, "target_num": tokens}
        return golden_flowcut.qwen_vision(inputs, params)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_flowcut_makes_the_release_s_tokens(official: bool, tokens: int) -> None:
    model, inputs = shared("qwen2_vl"), inputs_of(2)
    with vtc.patch(model, "flowcut", keep=tokens, official=official) as handle, torch.no_grad():
        features = torch.cat(image_features(model, inputs))
        model(**inputs)
        images = handle.stats.last.images
        kept = [k.entries for k in handle.stats.kept]
    start = 0
    for n, pixels, grid, image, left in zip(
        pieces(inputs), inputs["pixel_values"].split(pieces(inputs)), inputs["image_grid_thw"], images, kept, strict=True
    ):
        want = tower_alone(model, pixels, grid[None], tokens)
        survivors = want[max((k for k in want if k.startswith("keep.")), key=lambda k: int(k[5:]))]
        assert len(survivors) == min(n, 2 * MERGE * tokens)
        place = torch.arange(2 * tokens) if official else survivors[::MERGE] // MERGE
        mine = features[start : start + n // MERGE]
        torch.testing.assert_close(mine[place], want["merged"].to(mine.dtype), atol=2e-5, rtol=2e-5)
        empty = torch.ones(n // MERGE, dtype=torch.bool).index_fill(0, place, False)
        assert (mine[empty] == 0).all()
        assert [s.stage for s in image.stages] == ["encoder", "decoder"]
        assert (image.stages[0].after, image.kept) == (2 * tokens, tokens)
        assert image.tokens_per_layer == [2 * tokens] * 2 + [tokens] * 3
        assert torch.isin(left, place).all()
        start += n // MERGE


def test_images_do_not_depend_on_each_other() -> None:
    model, inputs = shared("qwen2_vl"), inputs_of(2)
    with vtc.patch(model, "flowcut", keep=2), torch.no_grad():
        together = image_features(model, inputs)
        for i, pixels in enumerate(inputs["pixel_values"].split(pieces(inputs))):
            (alone,) = image_features(model, {"pixel_values": pixels, "image_grid_thw": inputs["image_grid_thw"][i : i + 1]})
            torch.testing.assert_close(alone, together[i], atol=2e-6, rtol=2e-6)


def test_keeping_everything_and_unpatching() -> None:
    model, inputs = build("qwen2_vl"), inputs_of(2)
    with torch.no_grad():
        want = model(**inputs).logits
        with vtc.patch(model, "flowcut", keep=1.0):
            torch.testing.assert_close(model(**inputs).logits, want, atol=1e-9, rtol=0)
        with vtc.patch(model, "flowcut", keep=1):
            assert not torch.allclose(model(**inputs).logits, want, atol=1e-3)
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        assert torch.equal(model(**inputs).logits, want)
    for module in model.model.visual.modules():
        assert not module._forward_pre_hooks


def test_gradients_pass() -> None:
    model, inputs = build("qwen2_vl", dtype=torch.float32), make_inputs("qwen2_vl", shared("qwen2_vl"), 1, seed=3)
    pixels = inputs.pop("pixel_values").float().requires_grad_()
    with vtc.patch(model, "flowcut", keep=1):
        model(**inputs, pixel_values=pixels, labels=inputs["input_ids"]).loss.backward()
    assert pixels.grad.abs().sum() > 0


def test_skipspan_brings_every_patch_back() -> None:
    model, inputs = shared("qwen2_vl"), inputs_of(2)
    seen: list[int] = []
    with vtc.patch(model, "skipspan", keep=0.5, start=1, stop=3) as handle, torch.no_grad():
        hooks = [
            b.register_forward_pre_hook(
                lambda _m, a, k: seen.append((a[0] if a else k["hidden_states"]).shape[0]), with_kwargs=True
            )
            for b in model.model.visual.blocks
        ]
        logits = model(**inputs).logits
        for hook in hooks:
            hook.remove()
    total, half = sum(pieces(inputs)), sum(n // 2 for n in pieces(inputs))
    assert seen == [total, half, half, total]
    assert all(i.kept == i.slots for i in handle.stats.last.images)
    with torch.no_grad():
        assert not torch.allclose(logits, model(**inputs).logits, atol=1e-4)


def test_clips_share_the_budget_among_their_frames() -> None:
    model = shared("qwen2_vl:clips")
    inputs = make_inputs("qwen2_vl:clips", model, 1, seed=3)
    with vtc.patch(model, "flowcut", keep=4) as handle, torch.no_grad():
        model(**inputs)
        (image,) = handle.stats.last.images
        (kept,) = handle.stats.kept
    frames = int(inputs["video_grid_thw"][0, 0])
    assert image.stages[0].after == min(image.slots, frames * max(1, 8 // frames))
    assert image.kept == 4
    assert len(kept.entries) == 4
    with vtc.patch(model, "flowcut", keep=1, per="frame") as handle, torch.no_grad():
        model(**inputs)
        (image,) = handle.stats.last.images
        (kept,) = handle.stats.kept
    assert image.stages[0].after == 2 * frames
    assert image.kept == frames


def test_other_towers_refuse_with_a_reason() -> None:
    for name, why in (("qwen2_5_vl", "windows"), ("qwen3_vl", "features of several layers")):
        assert why in family_of(shared(name)).facts.stages[Stage.ENCODER]
        with pytest.raises(UnsupportedFeatureError, match=why):
            vtc.patch(shared(name), "flowcut", keep=2)
    with pytest.raises(UnsupportedFeatureError, match="no place to be rotated by"):
        vtc.patch(shared("qwen2_vl"), "tome", keep=0.5)
