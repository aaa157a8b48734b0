"""Golden files: tensors recorded from the official implementations, replayed through our code.

Every ``*.safetensors`` below the folders in ``VTC_GOLDEN`` (separated as in ``PATH``; default: ``golden`` beside this file) is one
test. ``in.*`` goes in, every ``out.*`` is compared. A file nobody can run fails.
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
from golden_cases import Rows
from golden_limits import CAP, SPREAD, Limit, Tensors, limit_of, moved
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CASES = golden_cases.load_all()
HERE = Path(__file__).parent / "golden"
FOLDERS = [Path(p) for p in os.environ.get("VTC_GOLDEN", "").split(os.pathsep) if p] or [HERE]


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

    def compare(self, wanted: Tensors | None = None) -> dict[str, float]:
        """Return the largest error of every output as a share of its limit; raise AssertionError above one."""
        shares = {}
        for name, want in (self.wanted if wanted is None else wanted).items():
            limit = limit_of(self.method, name, self.params, self.notes)
            exact, single = self.exact[name], self.single[name]
            if isinstance(exact, Rows):
                assert exact.real.any(), f"{name}: every row is excluded"
                assert tuple(exact.values.shape) == tuple(want.shape), (
                    f"{name}: {tuple(exact.values.shape)}, recorded {want.shape}"
                )
                exact, single, want = exact.values[exact.real], single.values[exact.real], want[exact.real]
            shares[name] = max(
                self.error(name, exact, want, limit, "float64 against the file"),
                self.error(name, single, exact if want.is_floating_point() else want, limit, "float32"),
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
        if (error > allowed).any():
            far = self.moved[name][self.exact[name].real] if isinstance(self.exact[name], Rows) else self.moved[name]
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


OURS = collect([HERE])


@pytest.mark.parametrize("path", OURS, ids=[f"{p.parent.name}/{p.stem}" for p in OURS])
def test_every_perturbed_output_fails(path: Path) -> None:
    """One number off by a thousandth of the largest, or one whole number by one: no limit is so wide that it passes."""
    replay = Replay.of(path)
    assert set(replay.compare()) == set(replay.wanted)
    for name, want in replay.wanted.items():
        if not want.numel():
            continue
        off = want.clone()
        off.view(-1)[0] += 1 if not want.is_floating_point() else 1e-3 * (1 + want[want.isfinite()].abs().max())
        with pytest.raises(AssertionError, match=re.escape(name)):
            replay.compare({name: off})


@pytest.mark.parametrize("method", ["fastv", "fastervlm", "divprune"])
def test_perturbed_input_fails(tmp_path: Path, method: str) -> None:
    path = one_file(method)
    name = {"fastv": "in.inputs_embeds", "fastervlm": "in.cls_attention", "divprune": "in.image_features"}[method]
    tensor = load(path)[1][name]
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * tensor.std()
    changed = rewrite(path, tmp_path / "x.safetensors", **{name: tensor + noise})
    with pytest.raises(AssertionError):
        check(changed)
