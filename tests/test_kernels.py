"""Which implementation serves a call; the Triton versions themselves are tested in processes of their own, started here.

`kernels_triton.py` compares every kernel with its twin: under Triton's interpreter, which must be switched on before Triton is
imported, and compiled where there is a GPU. `kernels_compile.py` compiles every kernel for a Hopper GPU; that needs none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import vtc.kernels as kernels
from vtc import doctor
from vtc.kernels import KernelError, dispatch

HERE = Path(__file__).parent
FIRST = "topk or compact or merge or transition or attention or attend"
HALVES = {"selection and attention": FIRST, "similarity, greedy, clustering": f"not ({FIRST})"}
WAYS = {"interpreted": {"TRITON_INTERPRET": "1"}} | ({"compiled": {}} if torch.cuda.is_available() else {})
SHARED = 99 * 1024
"""Bytes of shared memory a block may have on every NVIDIA GPU since 2020."""


def in_a_process(*command: str, **environment: str) -> str:
    """Run Python with vtc's kernels set to Triton; return what it prints, or fail with it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"VTC_KERNELS": "triton"} | environment
    # -P: with the checkout on sys.path our kernels/ would be importable under Hugging Face's name
    run = subprocess.run([sys.executable, "-P", *command], cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("way", WAYS)
def test_triton_against_torch(half, way):
    said = in_a_process("-m", "pytest", str(HERE / "kernels_triton.py"), "-k", HALVES[half], **WAYS[way])
    assert "[100%]" in said and "skipped" not in said


def test_every_kernel_compiles_for_hopper_within_the_shared_memory_of_any_gpu(tmp_path):
    said = in_a_process(str(HERE / "kernels_compile.py"), TRITON_CACHE_DIR=str(tmp_path))
    used = [line.split() for line in said.splitlines() if re.fullmatch(r"_\w+ \d+", line)]
    assert {name for name, _ in used} == {
        name for path in HERE.parent.glob("kernels/gpu/*.py") for name in re.findall(r"(\w+)\[\(", path.read_text())
    }
    assert all(int(size) <= SHARED for _, size in used), used


# --------------------------------------------------------------------------------------------------------------- dispatch
X = torch.randn(1, 8, 4)


def test_on_the_cpu_the_automatic_choice_is_torch_and_no_fallback(monkeypatch):
    monkeypatch.delenv("VTC_KERNELS", raising=False)
    before = kernels.fallbacks()
    assert kernels.backend() == "auto"
    assert kernels.topk_sorted(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]
    assert kernels.fallbacks() == before
    assert "triton" not in sys.modules or not dispatch._interpreted()


def test_triton_where_it_cannot_run_is_an_error_that_names_the_way_out(monkeypatch):
    monkeypatch.setenv("VTC_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match=r"'topk_sorted' .* on the device 'cpu'.*VTC_KERNELS=auto"):
        kernels.topk_sorted(X[..., 0], 2)


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda: kernels.merge_scatter(X.double(), torch.zeros(1, 8).long(), 2), "float64 is not one of"),
        (lambda: kernels.merge_scatter(X.clone().requires_grad_(), torch.zeros(1, 8).long(), 2), "gradients"),
        (lambda: kernels.greedy_dpp(X, torch.ones(1, 8), 2, guard=False), "guard=False"),
        (lambda: kernels.topk_sorted(torch.zeros(1, 70000), 2), "70000 tokens"),
        (lambda: kernels.farthest_point(torch.zeros(1, 9000, 1), 2, torch.zeros(1).long()), "256 MiB"),
    ],
)
def test_what_triton_does_not_serve_is_said_and_left_to_torch(monkeypatch, call, why):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "unavailable", lambda: "")
    with kernels.use("triton"), pytest.raises(KernelError, match=why):
        call()


def test_the_automatic_choice_falls_back_on_a_gpu_and_counts_it(monkeypatch):
    class OnTheGpu(torch.Tensor):  # a tensor that says so
        device = torch.device("cuda")
        is_cuda = False

    monkeypatch.setattr(dispatch, "unavailable", lambda: "Triton is not installed (pip install triton)")
    scores = torch.tensor([[1.0, 3.0, 2.0]]).as_subclass(OnTheGpu)
    before = kernels.fallbacks()
    with kernels.use("auto"):
        assert kernels.topk_sorted(scores, 2).tolist() == [[1, 2]]
    new = {key: n for key, n in kernels.fallbacks().items() if before.get(key) != n}
    assert new == {("topk_sorted", "Triton is not installed (pip install triton)"): 1}


def test_an_error_of_a_kernel_is_not_taken_for_an_answer(monkeypatch):
    def broken(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(dispatch, "_triton", lambda *_: broken)
    with kernels.use("triton"), pytest.raises(ValueError, match="a defect"):
        kernels.topk_sorted(X[..., 0], 2)


@pytest.mark.parametrize("chosen", ["cuda", "Triton"])
def test_a_choice_that_does_not_exist_is_refused(monkeypatch, chosen):
    monkeypatch.setenv("VTC_KERNELS", chosen)
    with pytest.raises(KernelError, match="auto, torch, triton"):
        kernels.topk_sorted(X[..., 0], 2)
    with pytest.raises(KernelError, match="auto, torch, triton"), kernels.use(chosen):
        pass


@pytest.mark.parametrize(
    "chosen, gpu, broken, state, said",
    [
        ("auto", False, "", "ok", "torch \\(no GPU"),
        ("triton", False, "", "problem", "there is no GPU: unset it"),
        ("auto", True, "", "ok", "Triton for 15 ops"),
        ("torch", True, "", "note", "since VTC_KERNELS=torch"),
        ("auto", True, "Triton is not installed", "note", "torch on the GPU, too: Triton is not installed"),
        ("triton", True, "Triton is not installed", "problem", "Triton is not installed"),
    ],
)
def test_doctor_says_what_serves(monkeypatch, chosen, gpu, broken, state, said):
    monkeypatch.setenv("VTC_KERNELS", chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(kernels, "unavailable", lambda: broken)
    monkeypatch.setattr(kernels, "fallbacks", lambda: {("ward", "no reason"): 3})
    serves, fell_back = doctor._kernels()
    assert serves.state == state and re.search(said, serves.text)
    assert fell_back.state == "note" and fell_back.text == "'ward' ran in torch on the GPU 3 times: no reason"


def test_an_op_is_its_twin_to_the_eye_and_to_a_compiler():
    import inspect

    from vtc.kernels import ref

    for name in ("merge_scatter", "attention_rows"):
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(ref, name))
        assert getattr(kernels, name).__doc__ == getattr(ref, name).__doc__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(
            lambda x: kernels.merge_scatter(x, torch.zeros(1, 8).long(), 2), backend="eager", fullgraph=True
        )
        assert torch.equal(compiled(X.detach()), kernels.merge_scatter(X.detach(), torch.zeros(1, 8).long(), 2))


# ----------------------------------------------------------------------------------------------------- twins that are new
def test_select_compact_by_hand():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 0.0, 0.0, 1.0]])
    states = torch.arange(8.0).view(2, 4, 1)
    index, (taken,) = kernels.select_compact(scores, 2, [states])
    assert index.tolist() == [[1, 3], [0, 3]] and taken[..., 0].tolist() == [[1, 3], [4, 7]]
    index, (taken, keys) = kernels.select_compact(
        scores, 2, [states, states.view(2, 1, 4)], dims=(1, 2), count=torch.tensor([1, 0])
    )
    assert index.tolist() == [[-1, 1], [-1, -1]]
    assert taken[..., 0].tolist() == [[0, 1], [0, 0]] and torch.equal(keys[:, 0], taken[..., 0])


def test_transition_score_by_hand():
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]])
    after = torch.tensor([[[6.0, 8.0], [0.0, 1.0], [1.0, 0.0]]])
    weight = torch.tensor([1.0, torch.e, torch.e])  # cosines 1, 0 and (of nothing) 0
    wanted = torch.tensor([2.0, 1.0, 0.0]) * weight / weight.sum()
    assert torch.allclose(kernels.transition_score(before, after)[0], wanted)
    valid = torch.tensor([[True, False, True]])
    assert torch.allclose(kernels.transition_score(before, after, valid)[0], torch.tensor([2.0, 0.0, 0.0]) / (1 + torch.e))
