"""Reducers on the output of multi-vector retrievers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine import parallel, upstream
from vtc.engine.handle import BaseHandle
from vtc.families.base import Retriever
from vtc.retrieval import pool_vectors
from vtc.stats import CallStats, Clock, ImageStats, StageStats


class RetrieverHandle(BaseHandle):
    """One patch on one retriever: documents come out with fewer vectors, queries as they are."""

    family: Retriever

    def attach(self, model: nn.Module) -> None:
        """Hook the model's output."""
        self._undo.pre_hook(model, self.begin)
        self._undo.hook(model, self.end, with_kwargs=True, always_call=True)

    def begin(self, module: nn.Module, _args: Any) -> None:
        """Note that a call is running."""
        parallel.check_original(module, self._model())
        with self._lock:
            self._running += 1

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Pool each document's vectors; pad with zeros on the side the batch was padded on."""
        with self._lock:
            self._running -= 1
        if out is None:  # the call raised
            return None
        call = upstream.bound(module.forward, args, kwargs)
        if call.get(self.family.pixels) is None:
            self.stats.append(CallStats(text_only=True))
            return None
        name = self.family.vectors
        vectors: Tensor = getattr(out, name)
        mask = call.get(upstream.MASK)
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
        clock = Clock()
        with clock.span(vectors.device):
            there = [row.nonzero()[:, 0].to(vectors.device, non_blocking=True) for row in mask]
            pooled = pool_vectors([own[at] for own, at in zip(vectors, there, strict=True)], self.reducer)
        self.account(mask, pooled, clock)
        longest, left = max(map(len, pooled)), not bool(mask[:, 0].all())
        padded = [nn.functional.pad(p, (0, 0, longest - len(p), 0) if left else (0, 0, 0, longest - len(p))) for p in pooled]
        setattr(out, name, torch.stack(padded))
        return out

    def account(self, mask: Tensor, pooled: list[Tensor], clock: Clock) -> None:
        """Write the statistics: a document is one image whose slots are its vectors."""
        call, part = CallStats(_clock=clock), self.reducer
        for row, (n, vectors) in enumerate(zip(mask.sum(1).tolist(), pooled, strict=True)):
            stage = StageStats(part.name, part.stage.value, 0, n, len(vectors), min(n, part.budget.tokens(n)))
            call.images.append(ImageStats(row, n, len(vectors), [len(vectors)], [stage]))
        self.stats.append(call)
