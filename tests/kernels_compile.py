"""Compile every Triton kernel for a Hopper GPU on a machine without one; run by test_kernels.py in a process of its own.

The kernels are called on CPU tensors of real sizes with a driver that claims a GPU; every launch compiles and does not run.
One line per kernel: name, shared memory in bytes.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vtc.kernels as kernels
from vtc.kernels import dispatch


class Hopper:
    """A driver for a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: JITFunction, *args, grid, warmup, real=JITFunction.run, **options):
    made = real(self, *args, grid=grid, warmup=True, **options)
    assert "cubin" in made.asm
    print(self.fn.__name__, made.metadata.shared)


def main() -> None:
    empty = torch.empty
    torch.empty = lambda *size, **how: empty(*size, **how).zero_()  # no kernel fills it, and it may be used as an index
    driver.set_active(Hopper())
    JITFunction.run = compile_only
    dispatch.unavailable = lambda: ""
    dispatch._interpreted = lambda: True  # takes CPU tensors
    n, d, k = 2880, 256, 160
    x, w, first = torch.randn(1, n, d), torch.rand(1, n), torch.zeros(1, dtype=torch.long)
    start = torch.arange(k)[None]
    query, key = torch.randn(1, 4, 577, 80), torch.randn(1, 2, 577, 80)
    causal = torch.ones(577, 577, dtype=torch.bool).tril()[None, None]
    with kernels.use("triton"):
        kernels.topk_sorted(w, k)
        kernels.topk_sorted(torch.rand(1, 65536), k)
        kernels.select_compact(w, k, [x], count=torch.tensor([5]))
        kernels.merge_scatter(x, first[:, None].expand(1, n), k, weight=w)
        kernels.transition_score(x, x)
        kernels.attention_rows(query[:, :, :1].bfloat16(), key.bfloat16())
        kernels.attention_rows(query, key, mask=causal)
        kernels.attention_colsum(query, key, mask=torch.zeros(1, 1, 577, 577), weight=w[:, :577])
        kernels.pairwise_top1(x, x[:, :k].contiguous())
        kernels.nearest_centre(x, x[:, :k].contiguous())
        kernels.most_isolated(x.bfloat16())
        kernels.farthest_point(x, k, first)
        kernels.max_sum(x, k, first)
        kernels.farthest_point_weighted(x, w, k)
        kernels.greedy_dpp(x, w, k)
        kernels.k_medoids(x, start, 1, weight=w)


main()
