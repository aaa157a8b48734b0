"""Golden files: tensors recorded from the official implementations, replayed through our code.

Every ``*.safetensors`` below the folders in ``VTC_GOLDEN`` (separated as in ``PATH``; default: ``golden`` beside this file) is one
test. ``in.*`` goes in, every ``out.*`` is compared. A file nobody can run fails.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import golden_cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

CASES = golden_cases.load_all()
HERE = Path(__file__).parent / "golden"
FOLDERS = [Path(p) for p in os.environ.get("VTC_GOLDEN", "").split(os.pathsep) if p] or [HERE]
TOLERANCE, DEEP_TOLERANCE = 1e-5, 1e-4
DEEP = re.compile(r"hidden|feature|logits")
"""Outputs behind several layers of a network."""
ALSO_DEEP = {"flowcut": re.compile(r"merged")}
"""Further ones, by method: FlowCut's ``merged`` is what the last tower layer returns, merged two by two."""


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


def check(path: Path) -> int:
    """Run one file; raise AssertionError on any difference. Returns the number of tensors compared."""
    meta, tensors = load(path)
    method = meta.get("method", "")
    assert method in sorted(CASES), f"{path.name}: no golden case for method '{method}'"
    inputs = {k[3:]: v for k, v in tensors.items() if k.startswith("in.")}
    wanted = {k[4:]: v for k, v in tensors.items() if k.startswith("out.")}
    assert wanted, f"{path.name} holds no out.* tensor: nothing would be compared"
    params = json.loads(meta.get("params", "{}"))
    got = CASES[method](inputs, params, meta.get("case", path.stem))
    missing = sorted(set(wanted) - set(got))
    assert not missing, f"{path.name}: not computed: {missing}"
    for name, want in wanted.items():
        deep = DEEP.search(name) or (method in ALSO_DEEP and ALSO_DEEP[method].search(name))
        compare(name, got[name], want, DEEP_TOLERANCE if deep else TOLERANCE)
    return len(wanted)


def compare(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Whole numbers and booleans exactly, floats to the tolerance."""
    assert tuple(got.shape) == tuple(want.shape), f"{name}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}"
    if not want.is_floating_point():
        assert not got.is_floating_point(), f"{name}: {got.dtype}, recorded {want.dtype}"
        wrong = (got.long() != want.long()).sum().item()
        assert not wrong, f"{name}: {wrong} of {want.numel()} entries differ"
        return
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")


FILES = collect(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=[f"{p.parent.name}/{p.stem}" for p in FILES])
def test_golden(path: Path) -> None:
    assert check(path) >= 1


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


@pytest.mark.parametrize("method", sorted({load(p)[0]["method"] for p in collect([HERE])}))
def test_every_perturbed_output_fails(tmp_path: Path, method: str) -> None:
    source = one_file(method)
    names = [k for k in load(source)[1] if k.startswith("out.")]
    outputs, run = {}, CASES[method]

    def once(inputs, params, case):
        if not outputs:
            outputs.update(run(inputs, params, case))
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, method, once)
        assert check(source) == len(names)
        for n, name in enumerate(names):
            tensor = load(source)[1][name].clone()
            tensor.view(-1)[0] += 1 if not tensor.is_floating_point() else 1e-3 * (1 + tensor.view(-1)[0].abs())
            path = rewrite(source, tmp_path / f"{n}.safetensors", **{name: tensor})
            with pytest.raises(AssertionError, match=re.escape(name[4:])):
                check(path)


@pytest.mark.parametrize("method", ["fastv", "fastervlm", "divprune"])
def test_perturbed_input_fails(tmp_path: Path, method: str) -> None:
    path = one_file(method)
    name = {"fastv": "in.inputs_embeds", "fastervlm": "in.cls_attention", "divprune": "in.image_features"}[method]
    tensor = load(path)[1][name]
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * tensor.std()
    changed = rewrite(path, tmp_path / "x.safetensors", **{name: tensor + noise})
    with pytest.raises(AssertionError):
        check(changed)
