"""Golden files: tensors recorded from the official implementations, replayed through our code.

Every ``*.safetensors`` below the folders in ``VTC_GOLDEN`` (separated as in ``PATH``; default: ``golden`` and
``golden_transcribed`` beside this file) is one test. ``in.*`` goes in, every ``out.*`` is compared, by the limits of
:mod:`golden_limits`. A file nobody can run fails. ``python tests/test_golden.py`` prints how much of its limit each file takes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import golden_cases
import pytest
import torch
import transcribed
from golden_cases import Rows
from golden_limits import CAP, SPREAD, Limit, Tensors, jolted, limit_of, moved
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CASES = golden_cases.load_all()
HERE, TRANSCRIBED = Path(__file__).parent / "golden", transcribed.FOLDER
FOLDERS = [Path(p) for p in os.environ.get("VTC_GOLDEN", "").split(os.pathsep) if p] or [HERE, TRANSCRIBED]


def collect(folders: list[Path]) -> list[Path]:
    """All golden files below ``folders``; a folder that is missing or has none is a mistake."""
    found = []
    for folder in folders:
        files = sorted(folder.rglob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no golden files below {folder}: check VTC_GOLDEN")
        found += files
    return found


def load(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@dataclass
class Replay:
    """One file, what it asks for, and what our code makes of it in float64 and in float32."""

    path: Path
    method: str
    params: dict[str, Any]
    notes: str
    wanted: Tensors
    exact: dict[str, Any]
    single: dict[str, Any]
    run: Callable[[Tensors], dict[str, Any]]
    inputs: Tensors

    @classmethod
    def of(cls, path: Path) -> Replay:
        """Run a file; raise AssertionError where nobody can, or some output is not computed."""
        meta, tensors = load(path)
        method, params = meta.get("method", ""), json.loads(meta.get("params", "{}"))
        assert method in sorted(CASES), f"{path.name}: no golden case for method '{method}'"
        inputs = {k[3:]: v for k, v in tensors.items() if k.startswith("in.")}
        wanted = {k[4:]: v for k, v in tensors.items() if k.startswith("out.")}
        assert wanted, f"{path.name} holds no out.* tensor: nothing would be compared"

        def run(inputs: Tensors, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
            got = golden_cases.replay(CASES[method], inputs, params, meta.get("case", path.stem), dtype)
            missing = sorted(set(wanted) - set(got))
            assert not missing, f"{path.name}: not computed: {missing}"
            return {name: got[name] for name in wanted}

        notes = meta.get("notes", "")
        return cls(path, method, params, notes, wanted, run(inputs), run(inputs, torch.float32), run, inputs)

    @cached_property
    def moved(self) -> Tensors:
        """How far rounding the inputs moves each output; only worked out for a file that a plain tolerance does not pass."""
        wide = {name: t.double() if t.is_floating_point() else t for name, t in self.inputs.items()}
        return moved(lambda jolted: values(self.run(jolted)), wide, values(self.exact))

    def picks_agree(self, got: dict[str, Any], wanted: Tensors) -> bool:
        """Whether whole numbers and booleans are those recorded."""
        whole = {name: want for name, want in wanted.items() if not want.is_floating_point()}
        found = values({name: got[name] for name in whole})
        return all(found[name].shape == want.shape and bool((found[name] == want).all()) for name, want in whole.items())

    def compare(self, wanted: Tensors | None = None) -> dict[str, float]:
        """Return the largest error of every output as a share of its limit; raise AssertionError above one."""
        wanted = self.wanted if wanted is None else wanted
        exact = self.picks_agree(self.exact, wanted)  # else float32 decided between near ties, and float64 is no measure
        shares = {}
        for name, want in wanted.items():
            limit = limit_of(self.method, name, self.params, self.notes)
            precise, single = self.exact[name], self.single[name]
            if isinstance(single, Rows):
                shape, real = tuple(single.values.shape), single.real
                assert real.any(), f"{name}: every row is excluded"
                assert shape == tuple(want.shape), f"{name}: shape {shape}, recorded {tuple(want.shape)}"
                single, want = single.values[real], want[real]
                precise = precise.values[real] if exact else precise
            if not exact or not want.is_floating_point():
                twice = Limit(2 * limit.atol, 2 * limit.rtol, f"twice, as both are rounded: {limit.why}")
                shares[name] = self.error(name, single, want, twice, "float32 against the file")
            else:
                shares[name] = max(
                    self.error(name, precise, want, limit, "float64 against the file"),
                    self.error(name, single, precise, limit, "float32 against float64"),
                )
        return shares

    def error(self, name: str, got: Tensor, want: Tensor, limit: Limit, what: str) -> float:
        """The largest share of the limit; whole numbers and booleans, and what is not finite, are equal."""
        assert tuple(got.shape) == tuple(want.shape), f"{name}: shape {tuple(got.shape)}, recorded {tuple(want.shape)} ({what})"
        assert got.is_floating_point() == want.is_floating_point(), f"{name}: {got.dtype}, recorded {want.dtype} ({what})"
        if not want.is_floating_point():
            wrong = (got.long() != want.long()).sum().item()
            assert not wrong, f"{name}: {wrong} of {want.numel()} entries differ ({what})"
            return 0.0
        got, want = got.double(), want.double()
        finite = want.isfinite()
        assert torch.equal(got[~finite], want[~finite]) and got[finite].isfinite().all(), f"{name}: not finite ({what})"
        if not finite.any():
            return 0.0
        error, size = (got - want)[finite].abs(), want[finite].abs()
        allowed = limit.atol + limit.rtol * size
        if (error > allowed).any() and self.moved[name].shape == values(self.single)[name].shape:
            far = self.moved[name][self.single[name].real] if isinstance(self.single[name], Rows) else self.moved[name]
            allowed = torch.maximum(allowed, (SPREAD * far[finite]).clamp(max=CAP * (1 + size.max().item())))
        share = torch.where(error > 0, error / allowed, 0.0)
        worst = int(share.argmax())
        assert share[worst] <= 1, (
            f"{name}: {int((share > 1).sum())} of {share.numel()} values are too far off ({what}); the worst by "
            f"{error[worst]:.3g} of {size[worst]:.3g}, allowed {allowed[worst]:.3g} ({limit.why})"
        )
        return share[worst].item()


def values(outputs: dict[str, Any]) -> Tensors:
    """Plain tensors of outputs, excluded rows included."""
    return {name: out.values if isinstance(out, Rows) else out for name, out in outputs.items()}


def check(path: Path) -> dict[str, float]:
    """Run one file; raise AssertionError on any difference. Returns each output's largest error as a share of its limit."""
    return Replay.of(path).compare()


FILES = collect(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=[f"{p.parent.name}/{p.stem}" for p in FILES])
def test_golden(path: Path) -> None:
    assert check(path)


# ------------------------------------------------------------------------------------------------- the tests' own tests
def rewrite(path: Path, to: Path, meta: dict[str, str] | None = None, **changed: torch.Tensor) -> Path:
    own, tensors = load(path)
    save_file({**tensors, **changed}, to, {**own, **(meta or {})})
    return to


def one_file(method: str) -> Path:
    return next(p for p in collect([HERE]) if load(p)[0]["method"] == method)


def test_file_of_unmapped_method_fails(tmp_path: Path) -> None:
    path = rewrite(one_file("fastervlm"), tmp_path / "x.safetensors", {"method": "nobody_knows"})
    with pytest.raises(AssertionError, match="no golden case for method 'nobody_knows'"):
        check(path)


def test_output_nobody_computes_fails(tmp_path: Path) -> None:
    path = rewrite(one_file("fastervlm"), tmp_path / "x.safetensors", **{"out.surprise": torch.zeros(3)})
    with pytest.raises(AssertionError, match="not computed.*surprise"):
        check(path)


def test_file_without_outputs_fails(tmp_path: Path) -> None:
    own, tensors = load(one_file("fastervlm"))
    save_file({k: v for k, v in tensors.items() if k.startswith("in.")}, tmp_path / "x.safetensors", own)
    with pytest.raises(AssertionError, match="nothing would be compared"):
        check(tmp_path / "x.safetensors")


def test_empty_folder_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="VTC_GOLDEN"):
        collect([tmp_path])


OURS = collect([HERE, TRANSCRIBED])


@pytest.mark.parametrize("path", OURS, ids=[f"{p.parent.name}/{p.stem}" for p in OURS])
def test_every_perturbed_output_fails(path: Path) -> None:
    """One number off by a thousandth of the largest, or one whole number by one: no limit is so wide that it passes."""
    replay = Replay.of(path)
    assert set(replay.compare()) == set(replay.wanted)
    assert replay.picks_agree(replay.exact, replay.wanted)
    for name, want in replay.wanted.items():
        if not want.numel():
            continue
        off = want.clone()
        off.view(-1)[0] += 1 if not want.is_floating_point() else 1e-3 * (1 + want[want.isfinite()].abs().max())
        with pytest.raises(AssertionError, match=re.escape(name)):
            replay.compare({name: off})


@pytest.mark.parametrize("path", OURS, ids=[f"{p.parent.name}/{p.stem}" for p in OURS])
def test_no_pick_hangs_on_a_rounding(path: Path) -> None:
    """Inputs rounded once more, which changes every sum's last bits, lead to the same whole numbers."""
    replay = Replay.of(path)
    for seed in range(2):
        assert replay.picks_agree(replay.run(jolted(replay.inputs, seed), torch.float32), replay.wanted)


def test_where_float32_decides_between_ties_float64_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose picks float64 would not make is compared in float32 alone, and still fails if that differs."""
    path = one_file("fastervlm")
    run = CASES["fastervlm"]

    def other_in(dtype: torch.dtype) -> Callable[..., Tensors]:
        def case(inputs: Tensors, params: dict[str, Any], name: str) -> Tensors:
            out = run(inputs, params, name)
            return {**out, "keep_mask": 1 - out["keep_mask"]} if out["score"].dtype == dtype else out

        return case

    monkeypatch.setitem(CASES, "fastervlm", other_in(torch.float64))
    assert check(path)
    monkeypatch.setitem(CASES, "fastervlm", other_in(torch.float32))
    with pytest.raises(AssertionError, match="keep_mask"):
        check(path)


def test_what_a_file_states_goes_before_the_rules() -> None:
    notes = "Indices exact; dissimilarity atol 1e-6. Exact; scores rtol 2e-4."
    assert limit_of("evs", "dissimilarity", {}, notes)[:2] == (1e-6, 0.0)
    assert limit_of("vidcom2", "score.0", {}, notes)[:2] == (0.0, 2e-4)
    assert limit_of("evs", "positions", {}, notes)[:2] == limit_of("evs", "positions", {})[:2] == (1e-5, 1e-5)
    assert limit_of("aim", "last_hidden", {})[:2] == (1e-4, 1e-4)
    assert limit_of("zooprune", "sensitivity_lowrank", {"h": 0.01})[:2] == pytest.approx((0.0, 1e-4), abs=1e-12)
    assert limit_of("zooprune", "sensitivity", {"h": 0.5})[:2] == (0.0, 1e-5)
    assert limit_of("zooprune", "projected", {"h": 0.01})[:2] == (1e-5, 1e-5)


@pytest.mark.parametrize("path", collect([TRANSCRIBED]), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_transcription_is_what_its_files_hold(path: Path) -> None:
    same_as_transcribed(path)


@pytest.mark.parametrize("name", ["aim/e2e_llama_32l", "aim/e2e_qwen2_28l", "flowcut/llm_stage_b2_t12"])
def test_transcription_makes_what_the_release_recorded(name: str) -> None:
    same_as_transcribed(HERE / f"{name}.safetensors")


def same_as_transcribed(path: Path) -> None:
    meta, tensors = load(path)
    inputs = {k[3:]: t.double() if t.is_floating_point() else t for k, t in tensors.items() if k.startswith("in.")}
    got, gap = transcribed.TRANSCRIPTIONS[meta["method"]](inputs, json.loads(meta["params"]))
    assert gap > transcribed.GAP
    wanted = {k[4:]: t for k, t in tensors.items() if k.startswith("out.")}
    assert set(got) == set(wanted)
    for key, want in wanted.items():
        torch.testing.assert_close(
            got[key], want.to(got[key].dtype), atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_excluded_rows_are_padding_and_nothing_else(tmp_path: Path) -> None:
    """Padding of a FlowCut stage may hold anything; one real row that differs fails."""
    path = TRANSCRIBED / "flowcut" / "llm_stage_b4_t10_gqa_padded.safetensors"
    hidden, lens = (load(path)[1][f"out.{name}"] for name in ("last_hidden", "lens"))
    short = int(lens.argmin())
    assert lens[short] < hidden.shape[1]
    assert hidden[short, lens[short] :].abs().min() > 0, "nothing that a zero would equal"
    hidden[short, lens[short] :] = 1e3
    check(rewrite(path, tmp_path / "padding.safetensors", **{"out.last_hidden": hidden}))
    hidden[short, lens[short] - 1] += 1e-2
    with pytest.raises(AssertionError, match="last_hidden"):
        check(rewrite(path, tmp_path / "real.safetensors", **{"out.last_hidden": hidden}))


def test_every_sample_of_a_recording_is_run(tmp_path: Path) -> None:
    """AIM end to end: a difference in the last sample alone fails."""
    path = TRANSCRIBED / "aim" / "e2e_qwen2_28l_b3.safetensors"
    for name, last in (("importance", (-1, -1, 0)), ("last_hidden", (-1, -1, 0)), ("decode_hidden", (-1, -1, 0))):
        tensor = load(path)[1][f"out.{name}"]
        tensor[last] += 1e-2
        with pytest.raises(AssertionError, match=name):
            check(rewrite(path, tmp_path / f"{name}.safetensors", **{f"out.{name}": tensor}))


@pytest.mark.parametrize("method", ["fastv", "fastervlm", "divprune"])
def test_perturbed_input_fails(tmp_path: Path, method: str) -> None:
    path = one_file(method)
    name = {"fastv": "in.inputs_embeds", "fastervlm": "in.cls_attention", "divprune": "in.image_features"}[method]
    tensor = load(path)[1][name]
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * tensor.std()
    changed = rewrite(path, tmp_path / "x.safetensors", **{name: tensor + noise})
    with pytest.raises(AssertionError):
        check(changed)


if __name__ == "__main__":
    for file in FILES:
        shares = check(file)
        name = max(shares, key=shares.__getitem__)
        print(f"{shares[name]:.3f}  {file.parent.name}/{file.stem}  {name}")
