"""A GPU that isn't there: tensors that say ``cuda:0``, hold their numbers on the CPU, and obey a GPU's rules.

Two things go wrong on a GPU that no CPU run shows: tensors of different devices in one operation, and host synchronisations.
:class:`PretendGPU` shows both. Within its context a tensor made on, or moved to, "cuda" wraps a CPU tensor. Operations
compute as always, but

* an operation on tensors of both devices raises, with the exceptions a real GPU makes (copies, 0-dimensional numbers, indices);
* whatever makes the host wait for the device is counted by the line of vtc that did it: reading a value, results whose shape
  depends on values, copies between the devices that are not ``non_blocking``.

Ops of :mod:`vtc.kernels` that have a Triton version run their torch twin in the place of it, unobserved: that the Triton versions
read nothing back is seen in their source, which only launches.

Import it in a process of its own: it replaces torch's CUDA device guard (there is no way back).
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vtc.kernels import dispatch

ROOT = Path(__file__).parent.parent
HOME = torch.device("cpu")
CUDA = torch.device("cuda:0")
aten = torch.ops.aten

READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten._linalg_check_errors, aten.multinomial}
"""Operations that look at values."""
SHAPES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.bincount}
"""Operations whose result has a shape that depends on values: the host waits for it."""
MIXED = {aten._to_copy, aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.set_}
"""Operations that a GPU allows on tensors of both devices."""
AT_ONCE = (nn.functional.scaled_dot_product_attention, torch.sparse.mm)
"""Functions that run whole: what they are made of differs from device to device, and none of it waits on a GPU."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU; its numbers are in ``raw``."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnGPU:
        """Wrap a CPU tensor."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=CUDA
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, _args: Any = (), _kwargs: Any = None) -> Any:
        """All operations go through the mode."""
        raise RuntimeError(f"{func} on a pretended GPU tensor outside of PretendGPU")


class _Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs."""

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.at - self.at)


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher as it would on a GPU."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            if not isinstance(args[0], Tensor) and any(isinstance(t, OnGPU) for t in tree_leaves(args[0])):
                self.gpu.note("tensor")
                args = unwrapped(args)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func in (Tensor.tolist, Tensor.__format__, Tensor.__repr__) and isinstance(args[0], OnGPU):
            self.gpu.note(func.__name__)
            with self.gpu.paused():
                return func(*unwrapped(args), **unwrapped(kwargs))
        if func is Tensor.new_tensor and isinstance(args[0], OnGPU):
            made = torch.tensor(*args[1:], dtype=kwargs.get("dtype") or args[0].dtype)
            return made.to(kwargs.get("device") or CUDA)
        if func in AT_ONCE and isinstance(args[0], OnGPU):
            return self.gpu.at_once(func, args, kwargs)
        if (
            func is torch.repeat_interleave
            and kwargs.get("output_size") is None
            and any(isinstance(a, OnGPU) for a in args[1:])
        ):
            self.gpu.note("repeat_interleave")
        return func(*args, **kwargs)


class PretendGPU(TorchDispatchMode):
    """Context in which "cuda" works; see the module's text.

    Attributes
    ----------
    syncs : Counter
        Host synchronisations by the place in vtc that caused them; those of other libraries' code are not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.on = True
        self._functions = _Functions(self)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendGPU:
        """Enter both modes and stand in for the parts of torch.cuda that vtc uses."""
        torch._C._ensureCUDADeviceGuardSet()
        for owner, name, new in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "Event", _Event),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "device", lambda *_: contextlib.nullcontext()),
            (dispatch, "_triton", self._kernel),
        ):
            self._stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to: weights are no CPU tensors made over
        super().__enter__()
        self._stack.enter_context(self._functions)
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave everything as it was."""
        self._stack.close()
        super().__exit__(*error)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Compute on plain tensors, unobserved."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def _kernel(self, module: str, name: str, _tensors: list[Tensor]) -> Any:
        """The torch twin, unobserved, in the place of a Triton op."""
        twin = getattr(dispatch, name).__wrapped__
        return lambda *args, **kwargs: self.at_once(twin, args, kwargs)

    def at_once(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function of tensors on the GPU unobserved."""
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if devices != {CUDA}:
            raise RuntimeError(f"{function.__name__} was given tensors on {sorted(map(str, devices))}")
        with self.paused():
            return wrapped(function(*unwrapped(args), **unwrapped(kwargs)))

    def note(self, what: str) -> None:
        """Count a synchronisation, if vtc's code is what caused it."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if "transformers" in path.parts or ("site-packages" in path.parts and "torch" not in path.parts):
                return  # (the oldest transformers lie in a folder of their own)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("vtc", "kernels"):
                place = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
                while frame.f_code.co_name.startswith("<") and frame.f_back is not None:  # a comprehension: no frame since 3.12
                    frame = frame.f_back
                self.syncs[f"{place} {frame.f_code.co_name} ({what})"] += 1
                return
            frame = frame.f_back

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the raw tensors; the result is where a GPU would leave it."""
        kwargs = dict(kwargs or {})
        if not self.on:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        gpu = [t for t in tensors if isinstance(t, OnGPU)]
        host = [t for t in tensors if not isinstance(t, OnGPU)]
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = HOME
            if torch.device(device).type == "cpu":
                kwargs.pop("pin_memory", None)
        to_gpu = bool(gpu) if device is None else torch.device(device).type == "cuda"
        if packet is aten.copy_:
            to_gpu = isinstance(args[0], OnGPU)
        if gpu and host and packet not in MIXED and any(t.dim() for t in host):
            raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU in one operation")
        if packet in READS | SHAPES and gpu:
            self.note(packet.__name__)
        elif packet is aten.isin and gpu and tensors[-1].numel() >= 10 * tensors[0].numel() ** 0.145:  # then it sorts
            self.note("isin")
        elif packet in (aten._to_copy, aten.copy_):
            source = args[0] if packet is aten._to_copy else args[1]
            waits = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if isinstance(source, OnGPU) != to_gpu and not (waits and to_gpu):
                self.note("copy to the GPU" if to_gpu else "copy to the CPU")
        elif packet in MIXED and gpu:
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor)]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                self.note("boolean index")
            elif any(not isinstance(t, OnGPU) for t in indices):
                self.note("index from the CPU")
        known = {id(t.raw): t for t in gpu}
        out = func(*unwrapped(args), **unwrapped(kwargs))
        if not to_gpu:
            return out
        return tree_map(lambda t: known[id(t)] if id(t) in known else OnGPU(t) if isinstance(t, Tensor) else t, out)


def wrapped(values: Any) -> Any:
    """Put every tensor on the pretended GPU."""
    return tree_map(lambda t: OnGPU(t) if isinstance(t, Tensor) and not isinstance(t, OnGPU) else t, values)


def unwrapped(values: Any) -> Any:
    """Return the numbers."""
    return tree_map(lambda t: t.raw if isinstance(t, OnGPU) else t, values)


def move(model: nn.Module) -> nn.Module:
    """Put a model's weights and buffers on the pretended GPU, in place; call it within the context."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not isinstance(weight, OnGPU):
                module._parameters[name] = nn.Parameter(OnGPU(weight.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, OnGPU):
                module._buffers[name] = OnGPU(buffer)
    return model
