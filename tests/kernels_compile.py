"""Compile every Triton kernel for GPUs this machine need not have, and list what each takes; run by test_kernels.py.

The kernels are called on CPU tensors of real sizes with a driver that claims a GPU; every launch compiles and does not run. As a
script it prints a table: kernel, call, architecture, registers per thread, bytes of stack per thread (what does not fit the
registers is spilled there), bytes of shared memory, warps, the share of a multiprocessor's warps that fit it, tensor-core
instructions. Its arguments are architectures (90: H100, 80: A100).
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vtc.kernels as kernels
from vtc.kernels import dispatch

SHARED = {90: 227, 80: 163}
"""KiB of shared memory a program may have, by architecture: H100 and A100."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Row:
    """One compiled kernel."""

    kernel: str
    call: str
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    occupancy: int
    tensor_cores: str


class Claimed:
    """A driver for a GPU that is not there."""

    arch, call = 90, ""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Per cent of a multiprocessor's 64 warps; registers are given out by 256 to a warp, and a program takes 1 KiB itself."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = (SHARED[arch] + 1) * 1024 // (shared + 1024)
    return 100 * min(by_registers, by_shared, 64 // warps, 32) * warps // 64


def read(made, call: str, arch: int) -> Row:
    """Return the resources of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK"))
    cores = next((kind for kind in ("wgmma", "mma.sync") if kind in made.asm["ptx"]), "-")
    shared, warps = made.metadata.shared, made.metadata.num_warps
    share = occupancy(arch, registers, shared, warps)
    return Row(made.metadata.name, call, arch, registers, stack, shared, warps, share, cores)


def calls() -> dict[str, Callable[[], object]]:
    """Every op at the sizes of LLaVA-1.5 (576 tokens), LLaVA-NeXT (2,880), Qwen2.5-VL's tower (7,290), and where ways change."""
    half = torch.bfloat16

    def zeros(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)  # (never touched, so that size costs nothing)

    first = torch.zeros(1, dtype=torch.long)
    weights = {n: zeros(1, n, dtype=torch.float32) for n in (576, 577, 2048, 2880, 8192, 16384, 65536)}
    out: dict[str, Callable[[], object]] = {}
    for n, k, d, kind in [
        (576, 64, 4096, half),
        (2048, 128, 1024, half),
        (2880, 160, 4096, half),
        (8192, 512, 1024, half),
        (2880, 160, 1024, torch.float32),
        (16384, 16, 1024, half),
        (65536, 16, 1024, half),
    ]:
        x, w, start = zeros(1, n, d, dtype=kind), weights[n], torch.arange(k)[None]
        part = x[:, :k].contiguous()
        some = {
            "farthest_point_weighted": lambda x=x, w=w, k=k: kernels.farthest_point_weighted(x, w, k),
            "greedy_dpp": lambda x=x, w=w, k=k: kernels.greedy_dpp(x, w, min(k, 16)),
            "select_compact": lambda x=x, w=w, k=k: kernels.select_compact(w, k, [x], count=torch.tensor([5])),
        }
        if n < 5000:
            some["most_isolated"] = lambda x=x: kernels.most_isolated(x)
        if n in (2880, 16384) and kind == half:
            some |= {
                "farthest_point": lambda x=x, k=k: kernels.farthest_point(x, k, first),
                "max_sum": lambda x=x, k=k: kernels.max_sum(x, k, first),
            }
        if n == 2880:
            some |= {
                "topk_sorted": lambda w=w, k=k: kernels.topk_sorted(w, k),
                "merge_scatter": lambda x=x, w=w, k=k: kernels.merge_scatter(
                    x, first[:, None].expand(1, w.shape[1]), k, weight=w
                ),
                "transition_score": lambda x=x, w=w: kernels.transition_score(x, x, w > 0),
                "pairwise_top1": lambda x=x, part=part: kernels.pairwise_top1(x, part),
                "nearest_centre": lambda x=x, part=part: kernels.nearest_centre(x, part),
                "k_medoids": lambda x=x, w=w, start=start: kernels.k_medoids(x, start, 1, weight=w),
            }
        out |= {f"{name} {n} {str(kind)[6:]}": call for name, call in some.items()}
    for heads, n, d, kind in [(16, 577, 64, half), (32, 2880, 128, half), (16, 7290, 80, half), (4, 577, 80, torch.float32)]:
        query, key = zeros(1, heads, n, d, dtype=kind), zeros(1, heads, n, d, dtype=kind)
        causal, added = torch.zeros(1, 1, n, n, dtype=torch.bool), torch.zeros(1, 1, n, n)
        size = f"{n}x{d} {str(kind)[6:]}"
        out |= {
            f"attention_rows 1 of {size}": lambda q=query, k=key: kernels.attention_rows(q[:, :, :1], k),
            f"attention_colsum {size}": lambda q=query, k=key: kernels.attention_colsum(q, k),
        }
        if n == 577:
            out |= {
                f"attention_rows {size}, masked": lambda q=query, k=key, m=causal: kernels.attention_rows(q, k, mask=m),
                f"attention_colsum {size}, added": lambda q=query, k=key, m=added: kernels.attention_colsum(
                    q, k, mask=m, weight=weights[577]
                ),
            }
    return out


def compiled(architectures: list[int]) -> list[Row]:
    """Compile all for some architectures; return every kernel once per architecture, with the first call that needed it."""
    rows: dict[tuple[int, str], Row] = {}
    gpu = Claimed()

    def compile_only(self: JITFunction, *args, grid, warmup, real=JITFunction.run, **options):
        made = real(self, *args, grid=grid, warmup=True, **options)
        if (gpu.arch, made.hash) not in rows:
            rows[gpu.arch, made.hash] = read(made, gpu.call, gpu.arch)

    torch.empty = torch.zeros  # no kernel fills it, and it may be used as an index
    driver.set_active(gpu)
    JITFunction.run = compile_only
    dispatch.unavailable = lambda: ""
    dispatch._interpreted = lambda: True  # takes CPU tensors
    with kernels.use("triton"):
        for gpu.arch in architectures:
            for gpu.call, make in calls().items():
                make()
    return list(rows.values())


def main() -> None:
    print(*(field.name for field in dataclasses.fields(Row)), sep=" | ")
    for row in compiled([int(name) for name in sys.argv[1:]] or list(SHARED)):
        print(*dataclasses.astuple(row), sep=" | ")


if __name__ == "__main__":
    main()
