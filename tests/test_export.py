"""The keep mask of every image, as a serving engine reads it."""

from __future__ import annotations

import json

import pytest
import torch
from models import build, make_inputs
from safetensors.torch import load_file

import vtc


def test_an_export_says_what_survived(tmp_path):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    with vtc.patch(model, "divprune", keep=5) as handle, torch.no_grad():
        model(**inputs)
        model(input_ids=torch.tensor([[5, 6, 7]]))  # a later prompt without images changes nothing
        file = handle.export(tmp_path / "new" / "masks.bin")
    assert file == tmp_path / "new" / "masks.safetensors"
    tensors, told = load_file(file), json.loads(file.with_suffix(".json").read_text())
    assert sorted(tensors) == [f"image.{i}.keep" for i in range(3)]
    assert [image["row"] for image in told["images"]] == [0, 1, 1]
    for i, (image, kept) in enumerate(zip(told["images"], handle.stats.kept, strict=True)):
        mask = tensors[f"image.{i}.keep"]
        assert mask.dtype == torch.bool and mask.nonzero()[:, 0].tolist() == kept.entries.tolist()
        assert image["kept"] == int(mask.sum()) == 5 and image["slots"] == len(mask) and not image["merged"]
    assert "divprune" in told["reducer"].lower() and told["positions"] == ["compact"]


def test_the_exported_mask_is_all_an_engine_needs(tmp_path):
    """Handing over the marked embeddings alone gives the patched model's logits (positions are renumbered here)."""
    model = build("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, "divprune", keep=5) as handle, torch.no_grad():
        wanted = model(**inputs).logits[:, -1]
        keep = load_file(handle.export(tmp_path / "mask"))["image.0.keep"]
    with torch.no_grad():
        ids = inputs["input_ids"]
        image = model.get_image_features(inputs["pixel_values"])
        image = getattr(image, "pooler_output", image)
        visual = ids[0] == model.config.image_token_id
        stays = torch.ones_like(visual)
        stays[visual] = keep
        embeds = model.get_input_embeddings()(ids)
        embeds[0, visual] = torch.cat(list(image)).to(embeds.dtype)
        at = stays.nonzero()[:, 0]
        out = model(inputs_embeds=embeds[:, at])
    torch.testing.assert_close(out.logits[:, -1], wanted)


def test_a_merge_is_exported_with_its_owners(tmp_path):
    model = build("llava")
    with vtc.patch(model, "visionzip", keep=6) as handle, torch.no_grad():
        model(**make_inputs("llava", model))
        file = handle.export(tmp_path / "merged")
    tensors = load_file(file)
    owner, keep = tensors["image.0.owner"], tensors["image.0.keep"]
    assert set(owner[owner >= 0].tolist()) <= set(keep.nonzero()[:, 0].tolist())
    assert json.loads(file.with_suffix(".json").read_text())["images"][0]["merged"]


def test_an_export_needs_a_call_with_images(tmp_path):
    model = build("llava")
    with vtc.patch(model, "divprune", keep=5) as handle:
        with pytest.raises(vtc.errors.VtcError, match="run the patched model on an image first"):
            handle.export(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
