"""The check that ``vtc.patch`` makes by itself: when, what it remembers, what it refuses and what it only warns of."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from models import make_inputs, shared
from pickers import BoundaryPicker, DecoderPicker

import vtc
from vtc.errors import UnknownArgumentError, UnsupportedModelError
from vtc.inspect import examine
from vtc.verify import Item, Verdict, check, memory

WRONG = Item("decoder, compact positions", "failed", "logits differ", "decoder", "compact", error=2.0, limit=1e-5)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stages that were checked, with a check that only says yes; an empty cache folder."""
    made = []

    def verify(model, *, stages):
        made.extend(stages)
        items = tuple(Item(f"{s}, {p} positions", "ok", "", s, p) for s in stages for p in ("original", "compact"))
        return Verdict(type(model).__name__, "t", "t", items, {"vtc": "0"}, 0.1)

    monkeypatch.setattr(check, "verify", verify)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VTC_VERIFY", "once")
    monkeypatch.setattr(memory, "_told", set())
    return made


def answer(monkeypatch, *items: Item) -> None:
    monkeypatch.setattr(check, "verify", lambda model, *, stages: Verdict("M", "t", "t", items))


def patch(name: str, *parts, quiet: bool = True) -> None:
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        with vtc.patch(shared(name), list(parts or [BoundaryPicker(keep=0.5)])):
            pass


def files(tmp_path) -> list:
    return sorted((tmp_path / "vtc" / "verify").glob("*"))


# ---------------------------------------------------------------------------------------------------------------- when
def test_a_known_family_in_the_window_is_trusted(calls):
    patch("llava")
    assert calls == []


def test_a_probed_model_is_checked_once_for_each_stage(calls, tmp_path):
    patch("unknown")
    patch("unknown", BoundaryPicker(keep=0.3, positions="original"))
    assert calls == ["boundary"]
    patch("unknown", BoundaryPicker(keep=0.5), DecoderPicker(keep=0.2))
    assert calls == ["boundary", "decoder"] and len(files(tmp_path)) == 2


@pytest.mark.filterwarnings("ignore:models of type")
def test_vtc_check_says_what_the_small_copy_of_a_probed_model_found(calls, monkeypatch, tmp_path):
    """Whoever describes a model has not run it: reducers that patching would refuse are not said to run."""
    shared("unknown").config.save_pretrained(tmp_path / "model")
    assert examine(str(tmp_path / "model")).reducers["fastv"] == "" and calls == ["boundary", "decoder"]
    examine(str(tmp_path / "model"))
    assert calls == ["boundary", "decoder"]
    for file in files(tmp_path):
        file.unlink()
    wrong = Item("decoder, original positions", "failed", "logits differ", "decoder", "original", error=2.0, limit=1e-5)
    answer(monkeypatch, Item("boundary, original positions", "ok", "", "boundary", "original"), wrong)
    found = examine(str(tmp_path / "model")).reducers
    assert "logits differ" in found["fastv"] and "no adapter" in found["fastv"] and found["uniform"] == ""
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        patch("unknown", DecoderPicker(keep=0.5, positions="original"))


def test_a_version_outside_the_window_is_checked(calls, monkeypatch):
    monkeypatch.setattr(memory, "outside", lambda name: f"{name} 9.1 is outside the tested window 4.57 to 5.24")
    patch("llava", BoundaryPicker(keep=0.5), DecoderPicker(keep=0.2))
    patch("llava", DecoderPicker(keep=0.2))
    assert calls == ["boundary", "decoder"]


def test_reducers_of_the_tower_ask_for_the_boundary(calls, monkeypatch):
    monkeypatch.setenv("VTC_VERIFY", "always")
    with vtc.patch(shared("llava"), "visionzip", keep=8):
        pass
    assert calls == ["boundary"]


@pytest.mark.parametrize(("value", "expected"), [("off", []), ("", ["boundary"]), ("always", ["boundary"] * 3)])
def test_values_of_the_variable(calls, monkeypatch, value, expected):
    monkeypatch.setenv("VTC_VERIFY", value)
    for name in ("unknown", "unknown", "llava"):
        patch(name)
    assert calls == expected


def test_another_value_is_refused_in_a_sentence(calls, monkeypatch):
    monkeypatch.setenv("VTC_VERIFY", "yes")
    with pytest.raises(UnknownArgumentError, match=r"VTC_VERIFY='yes' is not known: use one of off, once, always"):
        patch("llava")
    assert vtc.engine.patch.handle_of(shared("llava")) is None


def test_a_check_does_not_check_itself(monkeypatch, tmp_path):
    """For real: what the check patches is not checked again, and the probed model passes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VTC_VERIFY", "always")
    real, seen = check.verify, []
    monkeypatch.setattr(check, "verify", lambda model, *, stages: seen.append(real(model, stages=stages)) or seen[-1])
    patch("unknown")
    assert len(seen) == 1 and seen[0].ok, str(seen[0])
    monkeypatch.setenv("VTC_VERIFY", "once")
    patch("unknown")
    assert len(seen) == 1


def test_a_refused_patch_leaves_the_model_and_its_old_patch_alone(calls, monkeypatch):
    model = shared("llava")
    inputs = make_inputs("llava", model)
    with vtc.patch(model, "uniform", keep=4) as handle, torch.no_grad():
        before = model(**inputs).logits
        monkeypatch.setenv("VTC_VERIFY", "always")
        answer(monkeypatch, Item("boundary, compact positions", "failed", "is wrong", "boundary", "compact"))
        with pytest.raises(UnsupportedModelError, match="is wrong"):
            patch("llava")
        assert handle.active and torch.equal(model(**inputs).logits, before)


# -------------------------------------------------------------------------------------------------------------- verdict
def test_a_failing_verdict_refuses_and_is_remembered(calls, monkeypatch, tmp_path):
    answer(monkeypatch, WRONG)
    for _ in range(2):
        with pytest.raises(
            UnsupportedModelError, match=r"decoder, compact positions: logits differ; error 2.0e\+00"
        ) as refusal:
            patch("unknown", DecoderPicker(keep=0.2))
        assert "have no adapter" in str(refusal.value) and "VTC_VERIFY=off" in str(refusal.value)
        monkeypatch.setattr(check, "verify", None)
    patch("unknown", DecoderPicker(keep=0.2, positions="original"))  # the policy that is not wrong


def test_what_is_wrong_with_clips_only_warns(calls, monkeypatch):
    answer(monkeypatch, Item("a", "ok"), Item("boundary, clips", "failed", "lost", "boundary", optional=True))
    with pytest.warns(
        UserWarning, match=r"wrong results with clips \(boundary, clips: lost\): use this patch with images only"
    ):
        patch("unknown", quiet=False)


def test_what_cannot_be_checked_warns_once_and_goes_on(calls, monkeypatch):
    answer(monkeypatch, Item("small copy", "not checked", "a small M cannot be built"))
    with pytest.warns(UserWarning, match=r"could not check .* stage 'boundary' .* \(small copy: a small M cannot be built\)"):
        patch("unknown", quiet=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch("unknown", quiet=False)
    assert not [w for w in caught if "could not check" in str(w.message)]


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"key": {}, "verdict": {}}', "null", " " * (1 << 21), "\x00"])
def test_an_unreadable_memory_is_made_again(calls, tmp_path, damage):
    patch("unknown")
    (file,) = files(tmp_path)
    whole = file.read_text()
    file.write_text(damage)
    patch("unknown")
    assert calls == ["boundary"] * 2 and json.loads(file.read_text()) == json.loads(whole)


def test_a_memory_of_something_else_is_none(calls, tmp_path):
    """The name of the file is a digest: what is inside decides."""
    patch("unknown")
    (file,) = files(tmp_path)
    data = json.loads(file.read_text())
    data["key"]["stage"] = "decoder"
    file.write_text(json.dumps(data))
    patch("unknown")
    assert calls == ["boundary"] * 2


@pytest.mark.parametrize("what", ["vtc", "transformers", "torch", "sources", "config"])
def test_another_version_or_structure_is_another_verdict(calls, monkeypatch, tmp_path, what):
    patch("unknown")
    if what == "sources":
        monkeypatch.setattr(memory, "_sources", lambda: "other")
    elif what == "config":
        monkeypatch.setattr(shared("unknown").config.text_config, "sliding_window", 7, raising=False)
    else:
        monkeypatch.setattr(check, "versions", lambda real=check.versions: real() | {what: "9.9"})
    patch("unknown")
    assert calls == ["boundary"] * 2 and len(files(tmp_path)) == 2


def test_widths_and_numbers_of_layers_are_no_other_structure(calls):
    """Checkpoints of one kind share a verdict: their small copies are the same."""
    from models import build

    for layers in (9, 12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vtc.patch(build("unknown", text={"num_hidden_layers": layers, "intermediate_size": 15 * layers}), "uniform", keep=4)
    assert calls == ["boundary"]


def test_files_are_written_aside_and_never_through_a_link(calls, tmp_path):
    patch("unknown")
    (file,) = files(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    file.unlink()
    file.symlink_to(victim)
    patch("unknown")
    assert victim.read_text() == "mine" and not file.is_symlink() and files(tmp_path) == [file]


def test_a_folder_that_cannot_be_written_costs_a_warning(calls, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(UserWarning, match="could not be kept"):
        patch("unknown", quiet=False)
    patch("unknown")
    assert calls == ["boundary"] * 2


def test_the_folder_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert memory.folder() == tmp_path / ".cache" / "vtc" / "verify"
