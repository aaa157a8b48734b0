"""Which implementation serves a call; the Triton versions themselves are tested in processes of their own, started here.

`kernels_triton.py` compares every kernel with its twin: under Triton's interpreter, which must be switched on before Triton is
imported, and compiled where there is a GPU. `kernels_compile.py` compiles every kernel for GPUs; that needs none.
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


@pytest.mark.parametrize("arch, tensor_cores, spilled", [(90, "wgmma", {}), (80, "mma.sync", {})], ids=["H100", "A100"])
def test_every_kernel_compiles_within_the_resources_of_a_gpu(tmp_path, arch, tensor_cores, spilled):
    """``spilled``: bytes of stack that a kernel may take; every kernel not named there keeps all it needs in registers."""
    said = in_a_process(str(HERE / "kernels_compile.py"), str(arch), TRITON_CACHE_DIR=str(tmp_path))
    header, *rows = [line.split(" | ") for line in said.splitlines() if line.count(" | ") == 8]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])
    print(table)
    used = [dict(zip(header, row, strict=True)) for row in rows]
    assert {row["kernel"] for row in used} == launched()
    for row in used:
        assert int(row["shared"]) <= SHARED, row
        assert int(row["stack"]) <= spilled.get(row["kernel"], 0), f"{row}: fewer numbers per thread, or more warps"
        assert int(row["occupancy"]) > 0, row
        multiplies = row["kernel"] in ("_cosines", "_nearest", "_denominators", "_rows", "_columns")
        assert (row["tensor_cores"] != "-") == multiplies, row
    assert all(
        any(row["tensor_cores"] == tensor_cores and row["kernel"] == name for row in used) for name in ("_cosines", "_columns")
    )


def test_nothing_on_the_way_to_a_launch_waits_for_the_gpu_or_copies_to_it():
    for path in HERE.parent.glob("kernels/gpu/*.py"):
        waits = re.findall(
            r"\.(?:item|tolist|cpu|numpy|nonzero)\(|torch\.(?:tensor|as_tensor)\(|\b(?:int|bool)\(", path.read_text()
        )
        assert not waits, (path.name, waits)


def launched() -> set[str]:
    """Names of the kernels that the Triton versions launch."""
    found = (re.findall(r"(\w+)\[\(", path.read_text()) for path in HERE.parent.glob("kernels/gpu/*.py"))
    return {name for names in found for name in names}


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
        (lambda: kernels.farthest_point(torch.zeros(1, 4, 1), 5, torch.zeros(1).long()), "5 of 4 tokens"),
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


def ranked(row: list[float]) -> list[int]:
    """The definition of all selections: the largest first, among equals the lowest index first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


@pytest.mark.parametrize("distinct", [2, 5, 10_000], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize("rows, n", [(1, 1), (1, 7), (3, 64), (2, 1500)])
def test_selections_break_ties_by_the_lowest_index(distinct, rows, n):
    generator = torch.Generator().manual_seed(n + distinct)
    scores = torch.randint(distinct, (rows, n), generator=generator).float() - distinct // 2
    want = [ranked(row) for row in scores.tolist()]
    for k in {0, 1, n // 10, n // 2, n - 1, n}:
        assert kernels.topk_sorted(scores, k).tolist() == [sorted(w[:k]) for w in want]
        assert kernels.topk(scores, k).tolist() == [w[:k] for w in want]
    count = torch.randint(n + 2, (rows,), generator=generator)
    mask = kernels.topk_mask(scores, count)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [sorted(w[:c]) for w, c in zip(want, count.tolist(), strict=True)]


def test_topk_sorted_takes_a_nan_for_the_largest():
    assert kernels.topk_sorted(torch.tensor([[1.0, torch.nan, 3.0, 2.0, 3.0]]), 2).tolist() == [[1, 2]]


def test_compacted_by_hand():
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    index, valid = kernels.compacted(mask)
    assert index.tolist() == [[0, 2], [3, 0]] and valid.tolist() == [[True, True], [True, False]]
    index, valid = kernels.compacted(mask[:1])
    assert index.tolist() == [[0, 2]] and valid is None
    index, valid = kernels.compacted(~mask[:1], 2)
    assert index.tolist() == [[1, 3]] and valid is None
    assert kernels.compacted(torch.zeros(2, 3, dtype=torch.bool))[0].shape == (2, 0)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "causal"])
def test_attention_one_head_after_the_other_is_that_of_all_at_once(monkeypatch, kind):
    from vtc.kernels.ref import attention

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 90, 16, generator=generator) for h in (4, 2))
    start = torch.rand(2, 90, generator=generator)
    weight = (start > 0.5).float()
    mask = {
        "none": None,
        "boolean": torch.rand(2, 1, 90, 90, generator=generator) > 0.3,
        "additive": torch.randn(1, 4, 1, 90, generator=generator),
        "causal": torch.ones(90, 90, dtype=torch.bool).tril()[None, None],
    }[kind]
    found = []
    for small in (0, 1 << 60):
        monkeypatch.setattr(attention, "_SMALL", small)
        given = {"mask": None, "causal": True} if kind == "causal" else {"mask": mask}
        found.append(
            [kernels.attention_colsum(query, key, mask=mask, weight=w, block=32) for w in (None, weight)]
            + [kernels.attention_walk(query, key, start, steps=2, block=32, **given)]
        )
    for one_by_one, at_once in zip(*found, strict=True):
        torch.testing.assert_close(one_by_one, at_once, rtol=1e-5, atol=1e-5)
    query.requires_grad_()
    assert torch.autograd.grad(kernels.attention_colsum(query, key).square().sum(), query)[0].abs().max() > 0


def test_guessing_ahead_has_no_influence_on_greedy_picks(monkeypatch):
    from vtc.kernels.ref import greedy

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 24, generator=generator)
    x[:, 200:] = x[:, :100]  # repeated tokens: ties
    weight, first = torch.rand(2, 300, generator=generator), torch.tensor([7, 250])
    found = []
    for whole in (0, 1 << 60):
        monkeypatch.setattr(greedy, "_WHOLE", whole)
        found.append(
            [
                kernels.farthest_point(x, 120, first),
                kernels.farthest_point_weighted(x, weight, 120),
                kernels.max_sum(x, 120, first),
                kernels.greedy_dpp(x, weight, 40),
            ]
        )
    for guessed, made_at_once in zip(*found, strict=True):
        assert torch.equal(guessed, made_at_once)


@pytest.mark.parametrize("n", [1, 5, 129, 300])
def test_half_a_gram_matrix_and_its_reflection_are_the_whole(n):
    from vtc.kernels.ref.linear import dot, gram

    rows = torch.randn(n, 256, generator=torch.Generator().manual_seed(n))
    assert torch.equal(gram(rows), gram(rows).T)
    torch.testing.assert_close(gram(rows), dot(rows, rows), rtol=1e-6, atol=1e-4)


def test_mean_cosine_does_not_depend_on_padding():
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 9, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    mask = torch.tensor([[True] * 3 + [False] * 4, [False] * 7])
    found = kernels.mean_cosine(x, text, mask)
    want = torch.cosine_similarity(x[0, :, None], text[0, None, :3], dim=-1).mean(1)
    torch.testing.assert_close(found[0], want)
    assert not found[1].any()
    assert torch.equal(found[:1], kernels.mean_cosine(x[:1], text[:1, :3], mask[:1, :3]))
