"""Which implementation serves a call: Triton for tensors on a GPU, torch for all others.

The environment variable ``VTC_KERNELS`` (or :func:`use`, for a block of code) decides:

* ``auto`` (default): Triton where the tensors are on a CUDA or ROCm device and the op serves them, torch otherwise. What a GPU call
  did not get from Triton is counted with its reason, see :func:`fallbacks`.
* ``torch``: the torch twins.
* ``triton``: Triton, or :class:`KernelError` with the reason. Also serves CPU tensors under Triton's interpreter
  (``TRITON_INTERPRET=1``, set before the first call), which is how the kernels are tested without a GPU.

Gradients and ``torch.compile`` are the twins' business: they are differentiable, and a compiler fuses them itself. Ops without a
Triton version (everything that is not wrapped here) always run in torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from vtc.kernels import ref

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "VTC_KERNELS"
ACCELERATED: list[str] = []
"""Names of the ops that have a Triton version."""

_CHOSEN: ContextVar[str | None] = ContextVar("vtc_kernels", default=None)
_FELL_BACK: Counter[tuple[str, str]] = Counter()

P = ParamSpec("P")
R = TypeVar("R")


class KernelError(RuntimeError):
    """An implementation was asked for that cannot serve the call."""


class Unsupported(Exception):  # noqa: N818  an answer, not a mishap
    """The Triton version of an op does not serve these arguments."""


def backend() -> str:
    """Return the choice in force: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises
    ------
    KernelError
        If ``VTC_KERNELS`` is none of them.
    """
    chosen = _CHOSEN.get() or os.environ.get(VARIABLE) or "auto"
    if chosen not in BACKENDS:
        raise KernelError(f"{VARIABLE}={chosen!r} is not a choice: set it to one of {', '.join(BACKENDS)}")
    return chosen


@contextlib.contextmanager
def use(chosen: str) -> Iterator[None]:
    """Make a choice for the body of a ``with`` block, whatever the environment says."""
    if chosen not in BACKENDS:
        raise KernelError(f"there are no {chosen!r} kernels: use one of {', '.join(BACKENDS)}")
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def fallbacks() -> dict[tuple[str, str], int]:
    """Return how often the automatic choice took torch for tensors on a GPU, by op and reason, in this process."""
    return dict(_FELL_BACK)


@functools.cache
def unavailable() -> str:
    """Return why Triton cannot be used in this process at all, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        from vtc.kernels.gpu.common import row_squares

        if torch.cuda.is_available():  # kernels are compiled here and need a C compiler on the machine: better known early
            row_squares(torch.ones(1, 1, 16, device="cuda"))
    except Exception as error:
        return f"Triton does not work here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton(module: str, name: str, tensors: list[Tensor]) -> Callable[..., object]:
    """Return an op's Triton version; raise :class:`Unsupported` where it cannot run on these tensors."""
    device = tensors[0].device
    if any(t.device != device for t in tensors):
        raise Unsupported("the tensors are on different devices")
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        raise Unsupported(f"the tensors are on the device '{device}': Triton needs a GPU (or TRITON_INTERPRET=1)")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise Unsupported("gradients are wanted: the Triton version has none")
    why = unavailable()
    if why:
        raise Unsupported(why)
    found: ModuleType = importlib.import_module(f"vtc.kernels.gpu.{module}")
    return getattr(found, name)


def _op(twin: Callable[P, R]) -> Callable[P, R]:
    """Return the public op, documented as its twin: ``twin`` or the Triton version, which lies in the module of the same name."""
    name, module = twin.__name__, twin.__module__.rpartition(".")[2]
    ACCELERATED.append(name)

    @functools.wraps(twin)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return twin(*args, **kwargs)
        chosen = backend()
        given = [a for b in (*args, *kwargs.values()) for a in (b if isinstance(b, (list, tuple)) else (b,))]
        tensors = [a for a in given if isinstance(a, Tensor)]
        if chosen == "torch" or (chosen == "auto" and not any(t.device.type == "cuda" for t in tensors)):
            return twin(*args, **kwargs)
        try:
            with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else contextlib.nullcontext():
                return _triton(module, name, tensors)(*args, **kwargs)  # type: ignore[return-value]
        except Exception as error:
            # (out of resources: a GPU with little shared memory)
            if not isinstance(error, Unsupported) and type(error).__name__ != "OutOfResources":
                raise
            if chosen == "triton":
                raise KernelError(
                    f"'{name}' cannot run in Triton, which {VARIABLE}=triton asks for: {error}; use {VARIABLE}=auto"
                ) from None
            _FELL_BACK[name, str(error)] += 1
            return twin(*args, **kwargs)

    return op


attention_colsum = _op(ref.attention_colsum)
attention_rows = _op(ref.attention_rows)
farthest_point = _op(ref.farthest_point)
farthest_point_weighted = _op(ref.farthest_point_weighted)
greedy_dpp = _op(ref.greedy_dpp)
k_means = _op(ref.k_means)
k_medoids = _op(ref.k_medoids)
max_sum = _op(ref.max_sum)
merge_scatter = _op(ref.merge_scatter)
most_isolated = _op(ref.most_isolated)
nearest_centre = _op(ref.nearest_centre)
pairwise_top1 = _op(ref.pairwise_top1)
select_compact = _op(ref.select_compact)
topk_sorted = _op(ref.topk_sorted)
transition_score = _op(ref.transition_score)
