"""A setting kept with a model: written, read back, and refused where it is not for this vtc or this model."""

from __future__ import annotations

import json

import pytest
import torch
from cases import CASES
from models import make_inputs, shared

import vtc
from vtc import saved
from vtc.errors import ConfigError, InputFileError, UnknownArgumentError, UnknownReducerError


@pytest.mark.parametrize("name", [n for n in vtc.list_reducers() if n in CASES])
def test_every_reducer_comes_back_as_it_was(name, tmp_path):
    model = shared("llava")
    handle = vtc.patch(model, name, **CASES[name].harsh)
    asked = handle.reducer
    assert handle.save_pretrained(tmp_path) == tmp_path / "vtc_config.json"
    vtc.unpatch(model)
    with vtc.patch_from(tmp_path, model) as again:
        assert again.reducer == asked and again.strict


def test_compositions_and_strictness_come_back_and_give_the_same_logits(tmp_path):
    model = shared("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, ["divprune", "fastv"], keep=6, strict=False) as handle:
        logits = model(**inputs).logits
        handle.save_pretrained(tmp_path / "a" / "b")
    for patched in (
        lambda: vtc.patch(model, str(tmp_path / "a/b")),
        lambda: vtc.patch_from(tmp_path / "a/b/vtc_config.json", model),
    ):
        with patched() as again:
            assert torch.equal(model(**inputs).logits, logits) and not again.strict
    data = json.loads((tmp_path / "a/b/vtc_config.json").read_text())
    assert data["model_type"] == "llava" and data["vtc_version"] == vtc.__version__
    assert [r["name"] for r in data["reducers"]] == ["divprune", "fastv"]


def test_a_folder_takes_no_options(tmp_path):
    model = shared("llava")
    with vtc.patch(model, "fastv", keep=5) as handle:
        handle.save_pretrained(tmp_path)
    with pytest.raises(UnknownArgumentError, match="came with the saved setting"):
        vtc.patch(model, str(tmp_path), keep=6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"format": 2, "vtc_version": "9.1"},
            ConfigError,
            "has format 2 .written by vtc '9.1'. and this is vtc .* reads format 1",
        ),
        ({"format": True}, ConfigError, "has format True"),
        ({"model_type": "qwen2_vl"}, ConfigError, "for models of type 'qwen2_vl' and this is one of 'llava'"),
        ({"reducers": []}, InputFileError, "does not name reducers and their options"),
        ({"reducers": [{"name": "fastv"}]}, InputFileError, "does not name reducers"),
        ({"strict": 1}, InputFileError, "does not name reducers"),
        ({"reducers": [{"name": "fastw", "options": {"keep": 5}}]}, UnknownReducerError, "did you mean 'fastv'"),
        ({"reducers": [{"name": "fastv", "options": {"keep": 5, "lyer": 1}}]}, UnknownArgumentError, "did you mean 'layer'"),
        ({"reducers": [{"name": "fastv", "options": {"keep": 0}}]}, vtc.BudgetError, "keep=0 is out of range"),
    ],
)
def test_what_is_not_for_this_vtc_or_this_model_is_refused(change, error, said, tmp_path):
    model = shared("llava")
    with vtc.patch(model, "fastv", keep=5) as handle:
        file = handle.save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(error, match=said):
        vtc.patch_from(tmp_path, model)
    assert not any(k.startswith("_vtc") for k in vars(model))


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "[" * 100_000])
def test_a_damaged_file_is_refused(text, tmp_path):
    (tmp_path / saved.FILE).write_text(text)
    with pytest.raises(InputFileError, match=saved.FILE):
        vtc.patch_from(tmp_path, shared("llava"))


def test_a_folder_without_a_setting_says_how_to_make_one(tmp_path):
    with pytest.raises(InputFileError, match=r"write one with handle.save_pretrained\(folder\)"):
        vtc.patch_from(tmp_path, shared("llava"))
    with pytest.raises(UnknownReducerError):
        vtc.patch(shared("llava"), str(tmp_path))


def test_a_reducer_that_nobody_registered_is_not_saved(tmp_path):
    from pickers import BoundaryPicker

    with (
        vtc.patch(shared("llava"), BoundaryPicker(keep=0.4)) as handle,
        pytest.raises(UnknownArgumentError, match="not a registered"),
    ):
        handle.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
