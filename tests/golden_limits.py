"""How far a replayed value may be from the recorded one, and why.

Files were recorded in float32 on some machine, and float32 sums differ in their last bits from one CPU to the next. So every file
is replayed twice. In float64 (its inputs are exact numbers) our result is the same on every CPU, and what is left is the rounding
of the recording. In float32, as users run it, it is compared with our own float64 result: what is left is our rounding. Each may
reach the limit of the output:

* a tolerance: what the file's notes state, else the method's line in :data:`RULES`, else :data:`PLAIN`;
* or, where that is less, :data:`SPREAD` times the output's conditioning: how far one rounding of the inputs alone moves the row
  (:func:`moved`, in float64). Whoever computes in float32 loses that much. Capped at :data:`CAP` of the largest value.

Whole numbers and booleans are equal, in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

PLAIN, DEEP = 1e-5, 1e-4
"""What the specifications call equal: values, and hidden states behind several layers of a network."""
ULP = 2.0**-23
PROBES = 4
SPREAD = 8.0
"""Errors of golden files, recorded or ours, reach 3.7 times what one rounding of the inputs moves."""
CAP = 1e-4


class Limit(NamedTuple):
    """``|difference| <= atol + rtol * |recorded|``, and the reason."""

    atol: float
    rtol: float
    why: str


class Rule(NamedTuple):
    """The limit of a method's outputs whose name matches; ``limit`` may depend on the file's parameters."""

    method: str
    output: str
    limit: Callable[[dict[str, Any]], Limit]


def alike(tolerance: float, why: str) -> Callable[[dict[str, Any]], Limit]:
    """The same tolerance for small values (absolute) and large ones (relative)."""
    return lambda _params: Limit(tolerance, tolerance, why)


def differences(params: dict[str, Any]) -> Limit:
    """ZOO-Prune divides the difference of two nearly equal float32 vectors by ``2 h``."""
    noise = max(PLAIN, 1e-4 * 0.01 / params["h"])
    return Limit(0.0, noise, "the specification: central differences, rtol 1e-4 at h = 0.01; noise grows as 1 / h")


RULES = (
    Rule("zooprune", "sensitivity", differences),
    Rule("flowcut", "merged", alike(DEEP, "what the last tower layer returns, merged two by two")),
    Rule("pact", "log_weights", alike(2e-3, "the release rounds them to float16")),
    Rule("", "hidden|feature|logits", alike(DEEP, "behind several layers of a network")),
    Rule("", "", alike(PLAIN, "float32 a few steps behind exact inputs")),
)
"""The first that matches counts."""
STATED = re.compile(r"(\w+?)s? (atol|rtol) (\d[.\d]*e-?\d+)")


def limit_of(method: str, output: str, params: dict[str, Any], notes: str = "") -> Limit:
    """Return the limit of one output: the file's own words first."""
    for name, kind, number in STATED.findall(notes):
        if output.startswith(name):
            tolerance = float(number)
            return Limit(tolerance * (kind == "atol"), tolerance * (kind == "rtol"), "stated in the file")
    return next(r for r in RULES if r.method in ("", method) and re.search(r.output, output)).limit(params)


def jolted(inputs: Tensors, seed: int) -> Tensors:
    """Every number as if it had been rounded to float32 once more: changed by about one unit in the last place, at random."""
    generator = torch.Generator().manual_seed(seed)

    def jolt(t: Tensor) -> Tensor:
        return t * (1 + ULP * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)

    return {name: jolt(t) if t.is_floating_point() else t for name, t in inputs.items()}


def moved(run: Callable[[Tensors], Tensors], inputs: Tensors, exact: Tensors) -> Tensors:
    """How far rounding the float64 ``inputs`` moves each output of ``run``: the largest change of a row (its last dimension)."""
    out = {name: torch.zeros_like(t) for name, t in exact.items() if t.is_floating_point()}
    for seed in range(PROBES):
        probe = run(jolted(inputs, seed))
        for name, far in out.items():
            if probe[name].shape == far.shape:  # else tokens were picked otherwise, which shows where indices are compared
                far.copy_(torch.maximum(far, (probe[name] - exact[name]).abs().nan_to_num(0)))
    return {name: far.amax(-1, keepdim=True).expand_as(far) if far.dim() and far.numel() else far for name, far in out.items()}
