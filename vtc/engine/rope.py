"""RoPE rows and positions of the tokens a decoder layer holds: gathered, or recomputed where positions are compacted."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from vtc.engine import upstream
from vtc.engine.context import Context
from vtc.engine.segment import Segment
from vtc.engine.upstream import Call
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import take


def rotate(
    text: nn.Module, ctx: Context, i: int, call: Call, hidden: Tensor, seg: Segment | None, before: Tensor | None
) -> None:
    """Give layer ``i`` the RoPE rows of its tokens: gathered, or recomputed where positions are compacted.

    ``before``: what is subtracted from positions for the tokens dropped in earlier forwards.
    """
    if all(call[role] is None for role in call.names.rotary):
        raise UnsupportedFeatureError(
            f"{call.names.kind.__name__} is given no rotary cosines and sines, which vtc would have to shorten: this text model is "
            "not supported"
        )
    delta = None if seg is None else seg.delta
    if before is None and delta is None:
        if seg is not None:
            for role in call.names.rotary:
                table = call[role]
                if table is not None:
                    rows = functools.partial(_rows, table, seg)
                    call.set(role, ctx.once(("rope", hidden.device), (table, seg), rows))
        return
    kind, positions = upstream.layer_type(text.config, i), call["positions"]
    if positions is None:
        positions = ctx.positions
    if positions is None:
        raise UnsupportedFeatureError(
            f"{call.names.kind.__name__} is given no positions, which vtc would have to compact: pass positions='original'"
        )

    def make(rotary: nn.Module) -> tuple[Tensor, Tensor]:
        pos = positions_of(positions.to(hidden.device), seg, before)
        return upstream.rotate_at(rotary, hidden, pos.expand(hidden.shape[0], -1), kind)

    for role in call.names.rotary:
        made = functools.partial(make, upstream.rotary_of(text, role))
        call.set(role, ctx.once(("compact", role, kind, hidden.device), (seg, before), made))


def positions_of(given: Tensor, seg: Segment | None, before: Tensor | None) -> Tensor:
    """Return positions ``(..., B or 1, q)`` at the tokens a layer holds; where they are compacted, less what was dropped earlier.

    ``before``: what is subtracted for the tokens dropped in earlier forwards.
    """
    if before is not None:
        given = given - before[:, None].to(given.device)
    if seg is not None:
        given = take(given, seg.rows, given.dim() - 1)
        if seg.delta is not None:
            given = given - seg.delta.to(given.device)
    compact = before is not None or (seg is not None and seg.delta is not None)
    return given.clamp(min=0) if compact else given  # a choice: only those of padding are negative, which nobody sees


def positions_for(
    text: nn.Module, ctx: Context, given: Tensor | None, seg: Segment | None, before: Tensor | None
) -> Tensor | None:
    """Return the position ids that belong to the tokens a layer holds, for attentions that read them (see :func:`positions_of`).

    FlashAttention is given none: transformers looks for packed prompts in them, and gaps would be their borders.
    """
    if given is None or upstream.is_flash(upstream.attention_of(text.config)):
        return None
    if seg is None and before is None:
        return given
    return ctx.once("positions", (given, seg, before), functools.partial(positions_of, given, seg, before))


def _rows(table: tuple[Tensor, ...], seg: Segment) -> tuple[Tensor, ...]:
    return tuple(take(t, seg.rows.to(t.device), t.dim() - 2) for t in table)


def rope_of(layer: nn.Module, call: Call) -> tuple[Tensor, Tensor] | None:
    """Return the cosines and sines ``(B or 1, q, d)`` that a decoder layer's queries and keys are rotated by."""
    roles = [role for role in call.names.rotary if call[role] is not None]
    if len(roles) > 1:  # 4.57's Gemma 3 hands both kinds to every layer
        roles = ["rotary_local" if getattr(layer.self_attn, "is_sliding", False) else "rotary"]
    return upstream.one_rotation(call[roles[0]], layer.self_attn) if roles else None
