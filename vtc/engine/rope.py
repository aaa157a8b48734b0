"""RoPE rows of the tokens a decoder layer holds: gathered, or recomputed where positions are compacted."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from vtc import compat
from vtc.engine.context import Context
from vtc.engine.segment import Segment
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import take


def rotate(
    text: nn.Module, ctx: Context, i: int, kwargs: dict[str, Any], hidden: Tensor, seg: Segment | None, before: Tensor | None
) -> None:
    """Give the layer the RoPE rows of its tokens: gathered, or recomputed where positions are compacted."""
    tables = [k for k in kwargs if k.startswith("position_embeddings") and kwargs[k] is not None]
    if not tables:
        raise UnsupportedFeatureError("the decoder layers take no position_embeddings: this text model is not supported")
    delta = None if seg is None else seg.delta
    if before is None and delta is None:
        if seg is not None:
            for k in tables:
                table = kwargs[k]
                kwargs[k] = ctx.once(
                    ("rope", hidden.device),
                    (table, seg),
                    lambda table=table: tuple(take(t, seg.rows.to(t.device), t.dim() - 2) for t in table),
                )
        return
    kind = (getattr(text.config, "layer_types", None) or [None] * (i + 1))[i]
    extra = (kind,) if "layer_type" in _rope_parameters(type(text.rotary_emb)) else ()
    positions = kwargs["position_ids"]

    def make(rotary: nn.Module) -> tuple[Tensor, Tensor]:
        pos = positions.expand(hidden.shape[0], -1).to(hidden.device)
        if before is not None:  # tokens dropped in earlier forwards
            pos = pos - before[:, None].to(pos.device)
        if seg is not None:
            pos = pos.gather(1, seg.rows.to(pos.device))
            if delta is not None:
                pos = pos - delta.to(pos.device)
        return rotary(hidden, pos.clamp(min=0), *extra)

    for k in tables:  # 4.57's Gemma 3 has two
        rotary = text.rotary_emb_local if k.endswith("_local") else text.rotary_emb
        kwargs[k] = ctx.once(("compact", k, kind, hidden.device), (seg, before), functools.partial(make, rotary))


def rope_of(layer: nn.Module, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the cosines and sines ``(B or 1, q, d)`` that a decoder layer's queries and keys are rotated by."""
    tables = {k: v for k, v in kwargs.items() if k.startswith("position_embeddings") and v is not None}
    if len(tables) > 1:  # 4.57's Gemma 3 hands both kinds to every layer
        local = getattr(layer.self_attn, "is_sliding", False)
        tables = {k: v for k, v in tables.items() if k.endswith("_local") == local}
    table = next(iter(tables.values()), None)
    return None if table is None else compat.one_rotation(table, layer.self_attn)


@functools.cache
def _rope_parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)
