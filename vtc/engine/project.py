"""The projector as a function: in float32, without hooks, on tokens of the caller's choice, and if wanted in low rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Projection:
    """A model's projector, callable on any tokens.

    Nothing of the model is touched: calls run on a copy of the module's shell that shares the weights where they are float32 or
    float64 already, and holds float32 versions where they are not.

    Parameters
    ----------
    projector : Module
        Maps ``(..., D_v)`` to ``(..., D)``, token by token.
    """

    def __init__(self, projector: nn.Module) -> None:
        self.projector = projector
        self._factors: dict[tuple[str, int], tuple[Any, Tensor, Tensor]] = {}

    def function(self, rank: int | None = None) -> nn.Module:
        """Return the projector in float32 (float64 stays float64) as it is now.

        Parameters
        ----------
        rank : int or None
            Replace every linear layer of a higher rank by the two factors of its truncated singular value decomposition; they are
            made once and again when the weights change.
        """
        return self._copy(self.projector, "", rank)

    def _copy(self, module: nn.Module, name: str, rank: int | None) -> nn.Module:
        with _present(module):
            return self._copy_here(module, name, rank)

    def _copy_here(self, module: nn.Module, name: str, rank: int | None) -> nn.Module:
        if rank is not None and isinstance(module, nn.Linear) and rank < min(module.weight.shape):
            return self._low_rank(module, name, rank)
        shell = object.__new__(type(module))
        # hooks would record and shorten once more, a wrapped forward belongs to the original
        shell.__dict__.update({k: v for k, v in vars(module).items() if k not in ("forward", "_old_forward", "_hf_hook")})
        for key, value in vars(module).items():
            if "hook" in key and isinstance(value, dict):
                shell.__dict__[key] = type(value)()
        shell.__dict__["_parameters"] = {k: _wide(p) for k, p in module._parameters.items()}
        shell.__dict__["_buffers"] = {k: _wide(b) for k, b in module._buffers.items()}
        shell.__dict__["_modules"] = {
            k: None if m is None else self._copy(m, f"{name}.{k}", rank) for k, m in module._modules.items()
        }
        return shell

    def _low_rank(self, linear: nn.Linear, name: str, rank: int) -> nn.Module:
        weight = linear.weight
        mark = (weight.data_ptr(), weight._version, weight.device)
        known = self._factors.get((name, rank))
        if known is None or known[0] != mark:
            left, values, right = torch.linalg.svd(_wide(weight), full_matrices=False)
            known = mark, right[:rank].contiguous(), left[:, :rank] * values[:rank]
            self._factors[name, rank] = known
        return _Factors(known[1], known[2], None if linear.bias is None else _wide(linear.bias))


class _Factors(nn.Module):
    """A linear layer as two thin ones."""

    def __init__(self, first: Tensor, second: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.first, self.second, self.bias = first, second, bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return nn.functional.linear(nn.functional.linear(x, self.first), self.second, self.bias)


def _present(module: nn.Module) -> AbstractContextManager[None]:
    """Bring back, for as long as it lasts, the weights of a module that accelerate keeps elsewhere between its calls."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _wide(t: Tensor | None) -> Tensor | None:
    """At least float32, without gradient, put together from the ranks that share it; whole numbers as they are."""
    if hasattr(t, "full_tensor"):
        t = t.detach().full_tensor()
    if t is None or not t.is_floating_point():
        return t
    return t.detach() if t.dtype == torch.float64 else t.detach().float()
