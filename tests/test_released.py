"""Released checkpoints, from their own configurations: what vtc says of them, and what a small copy of each does.

A sample here; ``make released`` works through all of them and renews the list that docs/families.md shows. ``VTC_RELEASED=all``
compares every checkpoint with that list.
"""

from __future__ import annotations

import json
import os
import random

import pytest
import released
import torch
import transformers as hf
from family_cases import CASES, TEXT, VISION
from models import make_inputs, where

import vtc
from vtc.families import family_of
from vtc.families.base import Family
from vtc.inspect import examine, skeleton
from vtc.verify.twin import shrink

pytestmark = pytest.mark.filterwarnings("ignore:models of type")
ALL = os.environ.get("VTC_RELEASED") == "all"
KNOWN = json.loads((released.RESULTS / "released.json").read_text())
NEWEST = max(KNOWN, key=lambda v: [int(p) for p in v.split(".")])
SERVED = [name for name, found in KNOWN[NEWEST].items() if "reducers" in found]


def sample(names: list[str], n: int) -> list[str]:
    """``n`` of the names, the same every time; all of them on demand."""
    return names if ALL else sorted(random.Random(23).sample(names, n))


def known(name: str) -> dict:
    """What is recorded for the installed release; of another one, what the newest recorded says."""
    return KNOWN.get(hf.__version__, KNOWN[NEWEST])[name]


def there(name: str) -> bool:
    """Whether the installed transformers knows this kind of model."""
    return released.checkpoints()[name]["config.json"]["model_type"] in hf.CONFIG_MAPPING


@pytest.mark.parametrize("name", sample(list(KNOWN[NEWEST]), 12))
def test_check_says_what_the_list_says(name, monkeypatch):
    monkeypatch.setenv("VTC_VERIFY", "off")
    found, wanted = released.structure(name), {k: v for k, v in known(name).items() if k != "reducers"}
    if hf.__version__ in KNOWN or wanted.get("retriever"):
        assert found == wanted
    elif "refused" in found or "refused" in wanted:
        assert "refused" in wanted or not there(name) or "not complete" in found["refused"]
    else:  # another release may lack the processor, or a stage
        assert found["family"] == wanted["family"] and (isinstance(found["counts"], str) or found["counts"] == wanted["counts"])


@pytest.mark.parametrize("name", sample(SERVED, 4))
def test_small_copies_equal_the_reference(name):
    if hf.__version__ not in KNOWN and "refused" in released.structure(name):
        return  # said above
    found, wanted = released.small_copy(name), known(name)["reducers"]
    for reducer, said in wanted.items():
        elsewhere = hf.__version__ not in KNOWN and found[reducer].startswith(("refused: ", "not checked: "))
        assert found[reducer] == said or elsewhere, (reducer, found[reducer])


def test_the_list_is_made_of_what_was_found():
    """``make released`` renews it, and wants to be run when a family, a checkpoint or a reason changes."""
    for run in KNOWN.values():
        assert set(run) == set(released.checkpoints())
    assert (released.RESULTS / "released.md").read_text() == released.table(KNOWN) + "\n"
    for found in KNOWN[NEWEST].values():
        for said in found.get("reducers", {}).values():
            assert said == "ok" or said.startswith("refused: ")


# ------------------------------------------------------------------------------------------------- models without a file here
def exaone() -> object:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    text = dict(model_type="exaone4", hidden_size=4096, num_hidden_layers=8, sliding_window=64, layer_types=kinds * 2)
    return hf.Exaone4_5_Config(text_config=text, vision_config=dict(out_hidden_size=4096))


@where(hasattr(hf, "Exaone4_5_Config"))
def test_exaone_is_served_by_the_adapter_of_its_tower():
    config = exaone()
    family = family_of(skeleton(shrink(config)))
    assert isinstance(family, Family) and not family.probed and not family.facts.mrope and family.facts.windowed
    assert set(released.compared(config).values()) >= {"ok"}


@where(hasattr(hf, "Glm46VConfig"))
def test_glm_takes_clips_with_the_placeholders_of_images():
    with released.folder_of("zai-org/GLM-4.1V-9B-Thinking") as folder:
        verdict = vtc.verify(folder, stages=("boundary",))
    assert verdict.ok, str(verdict)
    assert {i.name: i.state for i in verdict.items}["boundary, clips"] == "ok"


@where(hasattr(hf, "Llama4Config"))
def test_models_that_count_positions_themselves_are_refused_with_the_reason():
    with pytest.raises(vtc.errors.UnsupportedModelError, match="counts positions itself"):
        family_of(skeleton(shrink(hf.Llama4Config())))


@where(hasattr(hf, "Granite4VisionConfig"))
def test_features_that_only_enter_decoder_layers_are_refused(tmp_path, monkeypatch):
    """Granite 4 Vision: whoever describes it has not run it; the check that patching makes has."""
    tower = dict(model_type="clip_vision_model", num_hidden_layers=24, image_size=336, patch_size=14)
    options = dict(deepstack_layer_map=[[5, 0], [11, 3], [17, 6], [22, 9]], downsample_rate="1/2", vision_config=tower)
    config = hf.Granite4VisionConfig(text_config=dict(num_hidden_layers=24), **options)
    with pytest.raises(vtc.errors.UnsupportedModelError, match="returns features for decoder layers"):
        vtc.verify(config)
    config.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("VTC_VERIFY", "once")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(vtc.errors.UnsupportedModelError, match="returns features for decoder layers"):
        examine(str(tmp_path / "model"))


@where(hasattr(hf, "Qwen3VLConfig"))
def test_fastv_acts_at_the_first_layer_it_can_by_default():
    kind, config = CASES["qwen3_vl"].make(TEXT, VISION, {})
    config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    model = kind(config).eval()
    model.tiny_case = "qwen3_vl"
    with vtc.patch(model, "fastv", keep=0.5) as handle, torch.no_grad():
        model(**make_inputs("qwen3_vl", model))
    assert handle.reducer.layer == 3 and [s.layer for s in handle.stats.last.images[0].stages] == [3]
    with pytest.raises(vtc.errors.UnknownArgumentError, match=r"layer 2 is out of range, use 3\.\."):
        vtc.patch(model, "fastv", keep=0.5, layer=2)
    assert "Qwen3-VL" in vtc.info("fastv").cls.__doc__
