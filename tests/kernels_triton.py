"""Every Triton kernel against its torch twin.

Run by test_kernels.py in a process of its own, where ``VTC_KERNELS=triton`` makes a fall-back an error: under Triton's interpreter
on the CPU (``TRITON_INTERPRET=1``), and compiled where there is a GPU.

All memory the ops allocate is poisoned and has guard bands around it; inputs come with odd strides and offsets. The interpreter
runs the programs of a launch one after the other: a test of its own runs them backwards, too.
"""

from __future__ import annotations

import contextlib
import math
import os
import traceback

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtc.kernels as kernels
from vtc.kernels import use
from vtc.kernels.gpu import attention as gpu_attention
from vtc.kernels.gpu import common as gpu_common
from vtc.kernels.gpu import greedy as gpu_greedy

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
"""Of float32 results; the inputs are the same numbers for twin and kernel, whatever their type."""
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative, on top, of results that come in the inputs' type."""
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
BAND = 64


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, odd: bool = True) -> Tensor:
    """Standard normal numbers; ``odd``: in memory with gaps, at an odd offset."""
    value = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return strange(value) if odd else value


def strange(t: Tensor) -> Tensor:
    """The same values, every second element of larger memory; NaN (or -7) in between."""
    out = torch.full(
        (*t.shape[:-1], 2 * t.shape[-1] + 3), math.nan if t.is_floating_point() else -7, dtype=t.dtype, device=t.device
    )
    view = out[..., 1 : 1 + 2 * t.shape[-1] : 2]
    view.copy_(t)
    return view


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, whose dot products are exact in any order: the interpreter's do not round alike everywhere, a GPU's do."""
    return (3 * numbers(*shape, seed=seed, odd=False)).round()


@contextlib.contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch):
    """Poison what ``torch.empty`` returns, put guard bands around it, and look at the bands afterwards."""
    real, made = torch.empty, []

    def empty(*size, dtype=None, device=None, **_):
        shape = torch.Size(size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size)
        dtype = dtype or torch.float32
        poison = math.nan if dtype.is_floating_point else 77
        memory = real(shape.numel() + 2 * BAND, dtype=dtype, device=device).fill_(poison)
        made.append((memory, memory.clone(), shape.numel()))
        return memory[BAND : BAND + shape.numel()].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for memory, before, size in made:
        for band in (slice(0, BAND), slice(BAND + size, None)):
            assert torch.equal(memory[band].nan_to_num(-1.0), before[band].nan_to_num(-1.0)), "a kernel wrote out of bounds"


def both(monkeypatch: pytest.MonkeyPatch, name: str, *args, **kwargs):
    """Results of the twin and of the Triton version."""
    op = getattr(kernels, name)
    with use("torch"):
        wanted = op(*args, **kwargs)
    with guarded(monkeypatch):
        found = op(*args, **kwargs)
    return wanted, found


def assert_close(found: Tensor, wanted: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Equal up to a tolerance; the message gives the first mismatch with its indices."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (found.shape, wanted.shape, found.dtype, wanted.dtype)
    a, b = found.double().cpu(), wanted.double().cpu()
    bad = ~torch.isclose(a, b, atol=atol, rtol=rtol, equal_nan=True)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} differ, first at {at}: {a[at].item()} instead of {b[at].item()}"
        )


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert_close(found, wanted, 0.0)


# -------------------------------------------------------------------------------------------------------------- selection
@every_type
@pytest.mark.parametrize("b, n, k", [(1, 1, 1), (3, 17, 5), (2, 64, 64), (1, 300, 1), (2, 9, 0), (2, 515, 130)])
def test_topk_sorted(monkeypatch, dtype, b, n, k):
    scores = numbers(b, n, dtype=dtype, seed=n)
    if n > 10:  # ties, zeros of both signs, infinities
        scores[:, 2:9] = torch.tensor([0.0, -0.0, 0.5, 0.5, 0.5, -torch.inf, torch.inf], dtype=dtype)
    assert_equal(*reversed(both(monkeypatch, "topk_sorted", scores, k)))


@pytest.mark.parametrize("kind", ["equal", "falling", "two values"])
def test_topk_sorted_over_several_blocks_and_ties(monkeypatch, kind):
    n = 9001  # more than one block
    scores = {"equal": torch.zeros(n), "falling": -torch.arange(n) * 1.0, "two values": torch.arange(n) % 2 * 1.0}[kind]
    assert_equal(*reversed(both(monkeypatch, "topk_sorted", scores[None].to(DEVICE), 4700)))


@every_type
@pytest.mark.parametrize("count", [None, (5, 0, 2)], ids=["even", "ragged"])
def test_select_compact(monkeypatch, dtype, count):
    b, n, k = 3, 37, 5
    states = [
        numbers(b, n, 70, dtype=dtype),  # hidden states
        numbers(1, n, 8),  # RoPE rows, shared by the batch
        numbers(b, 2, n, 3, dtype=dtype),  # keys
        numbers(b, n) > 0,  # a mask
        numbers(b, 1, 4, n).mul(9).long(),  # columns of a 4-D mask
    ]
    given = None if count is None else torch.tensor(count, device=DEVICE)
    wanted, found = both(monkeypatch, "select_compact", numbers(b, n, seed=4), k, states, dims=(1, 1, 2, 1, 3), count=given)
    assert_equal(found[0], wanted[0])
    for f, w in zip(found[1], wanted[1], strict=True):
        assert_equal(f, w)


# ---------------------------------------------------------------------------------------------------------------- merging
@every_type
@pytest.mark.parametrize("b, n, d, groups", [(1, 1, 1, 1), (2, 65, 3, 7), (3, 40, 300, 4), (1, 70, 33, 70)])
@pytest.mark.parametrize("mean", [True, False])
def test_merge_scatter(monkeypatch, dtype, b, n, d, groups, mean):
    owner = torch.randint(-1, groups, (b, n), generator=torch.Generator().manual_seed(n)).to(DEVICE)
    weight = numbers(b, n, seed=3).abs() if d != 3 else None
    wanted, found = both(monkeypatch, "merge_scatter", numbers(b, n, d, dtype=dtype), owner, groups, weight=weight, mean=mean)
    assert_close(found, wanted, 4 * TOLERANCE[dtype], ROUNDING[dtype])


# --------------------------------------------------------------------------------------------------------- hidden states
@every_type
@pytest.mark.parametrize("b, s, d", [(1, 1, 1), (2, 37, 70), (3, 5, 1100)])
@pytest.mark.parametrize("shared", [True, False])
def test_transition_score(monkeypatch, dtype, b, s, d, shared):
    before, after = numbers(b, s, d, dtype=dtype), numbers(b, s, d, dtype=dtype, seed=1)
    before[0, 0] = 0  # no length: no ratio
    valid = numbers(b, s, seed=2) > -1
    valid[:, -1] = True
    wanted, found = both(monkeypatch, "transition_score", before, after, valid if b > 1 else None, shared=shared)
    assert_close(found, wanted, TOLERANCE[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("shared", [True, False])
def test_transition_score_of_more_tokens_than_one_program_weighs(monkeypatch, shared):
    before, after = numbers(2, 1030, 2), numbers(2, 1030, 2, seed=1)
    wanted, found = both(monkeypatch, "transition_score", before, after, shared=shared)
    assert_close(found, wanted, TOLERANCE[torch.float32], TOLERANCE[torch.float32])


# -------------------------------------------------------------------------------------------------------------- attention
HEADS = [(1, 1, 1, 1, 1, 64), (2, 4, 2, 3, 40, 72), (1, 3, 1, 18, 33, 80), (1, 2, 2, 1, 300, 5), (1, 2, 1, 65, 65, 130)]
"""Batch, heads, key heads, rows, keys, head width."""
heads = pytest.mark.parametrize("b, h, kv, r, n, d", HEADS)


def masks(kind: str, b: int, h: int, r: int, n: int) -> Tensor | None:
    causal = torch.arange(n) <= torch.arange(r)[:, None] + (n - r)
    if kind == "none":
        return None
    if kind == "causal":
        return causal[None, None].to(DEVICE)
    if kind == "padding":  # the first keys of every row, in a mask that all heads and queries share
        return (torch.arange(n) >= torch.arange(b)[:, None].clamp(max=n - 1))[:, None, None].to(DEVICE)
    return numbers(b, 1, r, n, seed=8).masked_fill(~causal.to(DEVICE), torch.finfo(torch.float32).min)


@heads
@pytest.mark.parametrize(
    "kind, dtype",
    [
        *((kind, dtype) for kind in ("none", "causal") for dtype in DTYPES),
        ("padding", torch.float32),
        ("additive", torch.float32),
    ],
)
def test_attention_rows(monkeypatch, dtype, b, h, kv, r, n, d, kind):
    query, key = numbers(b, h, r, d, dtype=dtype), numbers(b, kv, n, d, dtype=dtype, seed=1)
    wanted, found = both(monkeypatch, "attention_rows", query, key, mask=masks(kind, b, h, r, n))
    assert_close(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("reduce", ["none", "logits"])
@heads
def test_attention_rows_head_by_head(monkeypatch, reduce, b, h, kv, r, n, d):
    query, key = numbers(b, h, r, d), numbers(b, kv, n, d, seed=1)
    wanted, found = both(
        monkeypatch, "attention_rows", query, key, mask=masks("causal", b, h, r, n), reduce=reduce, scaling=0.3
    )
    assert_close(found, wanted, 5 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("filled, groups", [(2, 1), (4, 2), (8, 4), (99, 8)])
def test_programs_share_the_heads_of_an_average(monkeypatch, filled, groups):
    monkeypatch.setattr(gpu_attention, "FILLED", filled)
    query, key = numbers(2, 8, 3, 64), numbers(2, 2, 50, 64, seed=1)
    with monkeypatch.context() as patch:
        seen = []
        real = gpu_attention.add_up
        patch.setattr(gpu_attention, "add_up", lambda x, over: seen.append(x.shape[1]) or real(x, over))
        wanted, found = both(monkeypatch, "attention_rows", query, key)
    assert seen == ([groups] if groups > 1 else [])
    assert_close(found, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("split, parts", [(1, 3), (600, 1)])
def test_denominators_over_parts_of_the_keys(monkeypatch, dtype, split, parts):
    """Parts that are no whole tiles would count the keys between them twice."""
    monkeypatch.setattr(gpu_attention, "SPLIT", split)
    monkeypatch.setattr(gpu_attention, "MOST_PARTS", parts)
    query, key = numbers(1, 2, 3, 20, dtype=dtype), numbers(1, 2, 250, 20, dtype=dtype, seed=1)
    for op in ("attention_rows", "attention_colsum"):
        wanted, found = both(monkeypatch, op, query, key)
        assert_close(found, wanted, TOLERANCE[dtype])


def test_attention_rows_of_mixed_types_with_denominators_given(monkeypatch):
    query, key = numbers(2, 4, 3, 64), numbers(2, 2, 70, 64, dtype=torch.bfloat16, seed=1)
    logits = kernels.attention_rows(query, key, reduce="logits")
    wanted, found = both(monkeypatch, "attention_rows", query, key, lse=logits.logsumexp(-1))
    assert_close(found, wanted, TOLERANCE[torch.float32])
    with use("torch"):
        assert_close(found, kernels.attention_rows(query, key), TOLERANCE[torch.float32])


def test_a_row_that_may_attend_to_nothing_is_nan_as_in_the_twin(monkeypatch):
    mask = torch.ones(1, 1, 3, 70, dtype=torch.bool, device=DEVICE)
    mask[:, :, 1] = False
    query, key = numbers(1, 2, 3, 64), numbers(1, 2, 70, 64, seed=1)
    wanted, found = both(monkeypatch, "attention_rows", query, key, mask=mask)
    assert found[0, 1].isnan().all() and not found[0, 0].isnan().any()
    assert_close(found, wanted, TOLERANCE[torch.float32])
    weight = torch.tensor([[1.0, 0.0, 0.5]], device=DEVICE)  # and is left out of a weighted sum
    wanted, found = both(monkeypatch, "attention_colsum", query, key, mask=mask, weight=weight)
    assert not found.isnan().any()
    assert_close(found, wanted, TOLERANCE[torch.float32])


@every_type
@heads
@pytest.mark.parametrize("kind", ["none", "causal"])
def test_attention_colsum(monkeypatch, dtype, b, h, kv, r, n, d, kind):
    query, key = numbers(b, h, r, d, dtype=dtype), numbers(b, kv, n, d, dtype=dtype, seed=1)
    weight = numbers(b, r, seed=2).abs() if kind == "causal" else None
    wanted, found = both(monkeypatch, "attention_colsum", query, key, mask=masks(kind, b, h, r, n), weight=weight)
    assert_close(found, wanted, r * TOLERANCE[dtype])


# ------------------------------------------------------------------------------------------------------------- similarity
def unit(x: Tensor) -> Tensor:
    x = x.double().cpu()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def clumps(b: int, n: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Features with repeated rows and a zero row: ties everywhere."""
    x = numbers(b, n, d, dtype=dtype, seed=seed)
    if n > 8:
        x[:, n // 2 : n // 2 + 3] = x[:, :3].clone()
        x[:, n - 1] = x[:, 1].clone()
        x[:, 4] = 0
    return x


@every_type
@pytest.mark.parametrize("b, m, t, d", [(1, 1, 1, 1), (2, 65, 17, 72), (1, 20, 600, 5), (3, 7, 64, 130)])
def test_pairwise_top1(monkeypatch, dtype, b, m, t, d):
    source, target = clumps(b, m, d, dtype), clumps(b, t, d, dtype, seed=1)
    wanted, found = both(monkeypatch, "pairwise_top1", source, target)
    assert_close(found[0], wanted[0], TOLERANCE[dtype])
    cosine = unit(source) @ unit(target).mT
    reached = cosine.gather(2, found[1].cpu()[..., None])[..., 0]
    assert_close(reached, cosine.amax(-1), TOLERANCE[dtype])  # near-ties are judged by the cosine


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])
def test_many_rows_take_large_tiles(monkeypatch, dtype):
    monkeypatch.setattr(gpu_common, "LARGE", 130)
    assert gpu_common.tile(130, 130, "half")["M"] == 128
    source, target = clumps(1, 135, 70, dtype), clumps(1, 260, 70, dtype, seed=1)
    wanted, found = both(monkeypatch, "pairwise_top1", source, target)
    assert_close(found[0], wanted[0], TOLERANCE[dtype])
    _, picks = both(monkeypatch, "farthest_point", source, 5, torch.tensor([7], device=DEVICE))
    replay(source, picks, "far", 5 * TOLERANCE[dtype])


def test_pairwise_top1_takes_the_lowest_of_equal_targets(monkeypatch):
    source = whole_numbers(1, 5, 40)
    target = source[:, torch.arange(5).repeat(30)]  # the same five rows again and again, over several blocks
    value, index = kernels.pairwise_top1(source, target)
    assert index.tolist() == [list(range(5))]


@every_type
@pytest.mark.parametrize("b, n, k, d", [(1, 1, 1, 1), (2, 130, 9, 33), (1, 65, 64, 72)])
def test_nearest_centre(monkeypatch, dtype, b, n, k, d):
    points = numbers(b, n, d, dtype=dtype)
    centres = points[:, :k].float() * 1.01
    _, found = both(monkeypatch, "nearest_centre", points, centres)
    distance = (points.double()[:, :, None] - centres.double()[:, None]).square().sum(-1).cpu()
    assert_close(distance.gather(2, found.cpu()[..., None])[..., 0], distance.amin(-1), 4 * d * TOLERANCE[dtype])


@every_type
@pytest.mark.parametrize("b, n, d", [(1, 1, 3), (1, 2, 3), (2, 90, 72)])
def test_most_isolated(monkeypatch, dtype, b, n, d):
    features = numbers(b, n, d, dtype=dtype)
    _, found = both(monkeypatch, "most_isolated", features)
    cosine = unit(features) @ unit(features).mT
    near = 1 - cosine.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf).amax(-1)
    assert_close(near.gather(1, found.cpu()[:, None])[:, 0], near.amax(-1), TOLERANCE[dtype])


# ----------------------------------------------------------------------------------------------------------------- greedy
def replay(features: Tensor, picks: Tensor, rule: str, tolerance: float, weight: Tensor | None = None) -> None:
    """Assert that every pick was the best given those before it, up to a tolerance of its score, in float64."""
    for image, mine in enumerate(picks.tolist()):
        assert len(set(mine)) == len(mine) and min(mine) >= 0, mine
        cosine = unit(features[image]) @ unit(features[image]).T
        n = len(cosine)
        w = torch.ones(n, dtype=torch.double) if weight is None else weight[image].double().cpu()
        kernel = w[:, None] * cosine * w
        for step in range(weight is None, len(mine)):  # (without weights the first is given)
            before = mine[:step]
            if rule == "sum":
                score = -cosine[before].sum(0)
            elif rule == "dpp" and before:
                chosen = kernel[before][:, before]
                score = kernel.diagonal() - (kernel[before] * torch.linalg.lstsq(chosen, kernel[before]).solution).sum(0)
            elif rule == "dpp":
                score = kernel.diagonal()
            else:
                score = w * (1 - cosine[before].amax(0)) if before else w
            free = torch.ones(n, dtype=torch.bool)
            free[before] = False
            best = score[free].max()
            assert score[mine[step]] >= best - tolerance, (image, step, mine[step], score[mine[step]].item(), best.item())


WAYS = {
    "all cosines": {},
    "a launch per pick": {"WORKSPACE": 0},  # nothing fits
    "all cosines and a launch per pick": {"ALONE": 0},  # greedy_dpp alone
}
SPREAD = ["farthest_point", "max_sum", "farthest_point_weighted"]
GREEDY = [(1, 1, 1, 1), (2, 40, 6, 33), (1, 17, 17, 20), (1, 70, 3, 300)]
greedy = pytest.mark.parametrize("b, n, k, d", GREEDY)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """How the greedy ops work, decided by N: at the N of these tests as at larger ones."""
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(gpu_greedy, name, value)
    return request.param


either = pytest.mark.parametrize("way", list(WAYS)[:2], indirect=True)
STEPWISE = [(name, "a launch per pick") for name in (*SPREAD, "greedy_dpp")] + [("greedy_dpp", list(WAYS)[2])]
stepwise = pytest.mark.parametrize("name, way", STEPWISE, indirect=["way"])


@every_type
@greedy
@either
@pytest.mark.parametrize("name", ["farthest_point", "max_sum"])
def test_spread_out_subsets(monkeypatch, way, dtype, name, b, n, k, d):
    features, first = numbers(b, n, d, dtype=dtype), torch.arange(b, device=DEVICE) % n
    _, found = both(monkeypatch, name, features, k, first)
    assert torch.equal(found[:, 0], first)
    replay(features, found, "sum" if name == "max_sum" else "far", k * TOLERANCE[dtype])


@every_type
@greedy
@either
def test_farthest_point_weighted(monkeypatch, way, dtype, b, n, k, d):
    features, weight = numbers(b, n, d, dtype=dtype), numbers(b, n, seed=5).abs()
    _, found = both(monkeypatch, "farthest_point_weighted", features, weight, k)
    replay(features, found, "far", k * TOLERANCE[dtype], weight)


@every_type
@pytest.mark.parametrize("b, n, k, d", [(1, 1, 1, 1), (2, 40, 6, 33), (1, 70, 5, 140)])
def test_greedy_dpp(monkeypatch, way, dtype, b, n, k, d):
    features, weight = numbers(b, n, d, dtype=dtype), numbers(b, n, seed=5).abs() + 0.1
    _, found = both(monkeypatch, "greedy_dpp", features, weight, k)
    replay(features, found, "dpp", 20 * TOLERANCE[dtype], weight)


def test_greedy_dpp_past_the_rank_goes_on_by_weight_and_never_repeats(monkeypatch, way):
    features = numbers(1, 70, 4)
    weight = numbers(1, 70, seed=5).abs() + 0.1
    weight[0, 40:43] = weight.amax()  # in a later block, and equal
    _, found = both(monkeypatch, "greedy_dpp", features, weight, 20)
    mine = found[0].tolist()
    assert len(set(mine)) == 20
    rest = [i for i in weight[0].argsort(descending=True, stable=True).tolist() if i not in mine[:8]]
    assert [i for i in mine[8:]] == rest[:12]


@either
@pytest.mark.parametrize("name", SPREAD)
def test_of_equal_tokens_the_lowest_is_picked_first_in_any_batch(way, name):
    base = whole_numbers(1, 12, 40)
    features = base[:, torch.arange(12).repeat(5)]  # the same again in a later block
    op = getattr(kernels, name)

    def run(x: Tensor) -> Tensor:
        if name == "farthest_point_weighted":
            return op(x, torch.ones(x.shape[:2], device=DEVICE), 14)
        return op(x, 14, torch.zeros(len(x), dtype=torch.long, device=DEVICE))

    alone = run(features)
    for token in range(12):
        copies = [i for i in alone[0].tolist() if i % 12 == token]
        assert copies == list(range(token, 60, 12))[: len(copies)]
    together = run(torch.cat([whole_numbers(1, 60, 40, seed=9), features]))
    assert torch.equal(together[1], alone[0])


def test_greedy_dpp_takes_the_lowest_of_equal_tokens_in_any_batch(way):
    features = whole_numbers(1, 12, 40)[:, torch.arange(12).repeat(5)]
    weight = torch.ones(2, 60, device=DEVICE)
    alone = kernels.greedy_dpp(features, weight[:1], 12)
    assert sorted(alone[0].tolist()) == list(range(12))
    together = kernels.greedy_dpp(torch.cat([whole_numbers(1, 60, 40, seed=9), features]), weight, 12)
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("name, way", STEPWISE + [(name, "all cosines") for name in (*SPREAD, "greedy_dpp")], indirect=["way"])
def test_greedy_picks_among_features_that_are_not_numbers_stay_within_bounds(monkeypatch, way, name):
    """The largest of numbers that are not comparable is anything on a GPU; in the interpreter it is the first."""
    features, weight = numbers(1, 40, 8), numbers(1, 40, seed=5).abs()
    features[:, 3:35] = math.nan
    last = (weight, 6) if name in ("farthest_point_weighted", "greedy_dpp") else (6, torch.tensor([5], device=DEVICE))
    with guarded(monkeypatch):
        found = getattr(kernels, name)(features, *last)
    assert found.shape == (1, 6) and 0 <= int(found.min()) and int(found.max()) < 40


def test_greedy_picks_of_more_tokens_than_whose_cosines_fit(monkeypatch):
    n = math.isqrt(gpu_greedy.WORKSPACE // 4) + 9
    features, first = numbers(1, n, 3, dtype=torch.bfloat16), torch.tensor([n - 1], device=DEVICE)
    wanted, found = both(monkeypatch, "farthest_point", features, 2, first)
    assert_equal(found, wanted)


# -------------------------------------------------------------------------------------------------------------- clustering
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("b, n, k, d", [(1, 1, 1, 1), (2, 40, 5, 20), (1, 12, 12, 7)])
def test_k_means(monkeypatch, weighted, b, n, k, d):
    points = numbers(b, n, d) + 4 * (torch.arange(n, device=DEVICE) % k)[None, :, None]
    weight = numbers(b, n, seed=2).clamp(min=0) if weighted else None
    start = torch.arange(k, device=DEVICE).expand(b, -1)
    wanted, found = both(monkeypatch, "k_means", points, start, 4, weight=weight)
    assert_equal(found[1], wanted[1])
    assert_close(found[0], wanted[0], 10 * TOLERANCE[torch.float32], 1e-5)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("b, n, k, d", [(1, 1, 1, 1), (2, 30, 5, 20), (1, 12, 12, 300)])
def test_k_medoids(monkeypatch, weighted, b, n, k, d):
    points = numbers(b, n, d) + 4 * (torch.arange(n, device=DEVICE) % k)[None, :, None]
    weight = numbers(b, n, seed=2).abs() if weighted else None
    start = torch.arange(k, device=DEVICE).expand(b, -1)
    wanted, found = both(monkeypatch, "k_medoids", points, start, 3, weight=weight)
    assert_equal(found[0], wanted[0])
    assert_equal(found[1], wanted[1])


# ------------------------------------------------------------------------------------------------------- synchronisations
class Syncs(TorchDispatchMode):
    """Notes every operation that makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "_unique2", "equal", "bincount", "masked_select", "is_nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def calls(images: slice = slice(None)):
    """One call of every op with a Triton version, of some of two images."""
    x, w = numbers(2, 40, 6)[images], numbers(2, 40, seed=1).abs()[images]
    first = torch.zeros(len(x), dtype=torch.long, device=DEVICE)
    start = torch.arange(3, device=DEVICE).expand(len(x), -1)
    q, k = numbers(2, 2, 5, 20)[images], numbers(2, 1, 70, 20, seed=1)[images]
    return {
        "attention_colsum": lambda: kernels.attention_colsum(q, k),
        "attention_rows": lambda: kernels.attention_rows(q, k),
        "farthest_point": lambda: kernels.farthest_point(x, 8, first),
        "farthest_point_weighted": lambda: kernels.farthest_point_weighted(x, w, 8),
        "greedy_dpp": lambda: kernels.greedy_dpp(x, w, 8),
        "k_means": lambda: kernels.k_means(x, start, 2, weight=w),
        "k_medoids": lambda: kernels.k_medoids(x, start, 2, weight=w),
        "max_sum": lambda: kernels.max_sum(x, 8, first),
        "merge_scatter": lambda: kernels.merge_scatter(x, w.long().clamp(max=2), 3),
        "most_isolated": lambda: kernels.most_isolated(x),
        "nearest_centre": lambda: kernels.nearest_centre(x, x[:, :3]),
        "pairwise_top1": lambda: kernels.pairwise_top1(x, x[:, :3]),
        "select_compact": lambda: kernels.select_compact(w, 4, [x], count=torch.tensor([2, 4], device=DEVICE)[images]),
        "topk_sorted": lambda: kernels.topk_sorted(w, 4),
        "transition_score": lambda: kernels.transition_score(x, x),
    }


def test_every_op_with_a_triton_version_is_tested():
    assert sorted(calls()) == sorted(kernels.ACCELERATED)


def flat(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


@contextlib.contextmanager
def backwards():
    """Run the programs of every launch from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    real = builder.set_grid_idx
    builder.set_grid_idx = lambda *at: real(*(size - 1 - i for size, i in zip(builder.grid_dim, at, strict=True)))
    try:
        yield
    finally:
        builder.set_grid_idx = real


def sound(name: str) -> None:
    """Assert that a call does not make the host wait, and gives the same bits in a second run and without the other image.

    In the interpreter, the second run has the programs in another order.
    """
    call = calls()[name]
    with Syncs() as counter:
        wanted = flat(call())
    assert not counter.seen
    with backwards() if DEVICE == "cpu" else contextlib.nullcontext():
        again = flat(call())
    alone = flat(calls(slice(1, 2))[name]())
    for a, b, c in zip(wanted, again, alone, strict=True):
        assert_equal(b, a)
        assert_equal(c, a[1:])


@pytest.mark.parametrize("name", sorted(calls()))
def test_no_op_makes_the_host_wait_and_bits_depend_on_neither_batch_nor_order_of_programs(name):
    sound(name)


@stepwise
def test_the_same_of_a_launch_per_pick(monkeypatch, way, name):
    monkeypatch.setattr(gpu_greedy, "ROWS", 16)  # more programs that could get in each other's way
    sound(name)


class Waits(Syncs):
    """Notes the places in vtc that make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.seen)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.seen) > before:
            places = [f.filename.replace(os.sep, "/") for f in traceback.extract_stack()]
            ours = [p for p in places if "/vtc/" in p or "/kernels/" in p]
            self.seen[before:] = ours[-1:]  # the model's own are its own business
        return out


@pytest.mark.parametrize("reducer", ["divprune", "fastervlm", "todre", "fastv"])
def test_a_fixed_budget_is_chosen_without_waiting_and_as_in_torch(reducer):
    """The engine itself waits a handful of times per prompt: to find the placeholders, to check signals, to size the cut."""
    from models import build, make_inputs

    import vtc

    model = build("llava", dtype=torch.float32).to(DEVICE)
    inputs = {k: v.to(DEVICE) for k, v in make_inputs("llava", model).items()}
    with vtc.patch(model, reducer, keep=5) as handle, torch.no_grad():
        with use("torch"):
            model(**inputs)
        wanted = handle.stats.kept[0].entries
        with Waits() as waits:
            model(**inputs)
    assert torch.equal(handle.stats.kept[0].entries, wanted)
    assert not [place for place in waits.seen if "/kernels/" in place or "/reducers/" in place]
    assert 0 < len(waits.seen) <= 12
