"""Asking reducers: which placeholder tokens belong to which image, which of them stay, and what merged tokens become."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.core import Reducer, Selection, Signals, Stage, explained
from vtc.engine.context import Context, Group, Instance
from vtc.engine.listen import TextTaps, tokens_of
from vtc.engine.tower import VisionRecord, add_newlines
from vtc.errors import UnsupportedFeatureError
from vtc.kernels import compacted, take
from vtc.stats import SHORT, StageStats
from vtc.views import ask


class Chooser:
    """Asks the BOUNDARY and DECODER reducers of one patched model."""

    def __init__(self, taps: TextTaps, parts: tuple[Reducer, ...]) -> None:
        self.taps, self.facts = taps, taps.facts
        self.notes: dict[int, str] = {}  # part -> substituted signals
        for part in parts:
            for need in part.needs:
                used = need.resolve(self.facts.provides)
                if used != need:
                    self.notes[id(part)] = (
                        f"{need.name}: this tower lacks '{need.requires}', {used.measure.__name__.strip('_')} used"
                    )

    def reduce(self, ctx: Context, part: Reducer, hidden: Tensor, layer: int) -> list[tuple[int, Tensor, Tensor]]:
        """Ask one reducer about all images, one batch per geometry and count; update the instances.

        Returns ``(row, physical positions, new values)`` for every merged image.
        """
        groups: dict[tuple[int, int], list[Instance]] = {}
        shown: dict[int, Tensor] = {}
        for it in ctx.instances:
            candidates = it.entries
            asked = part.wanted(it.layout, self.facts)
            if not part.decides_itself and asked >= len(candidates):  # newlines included: nothing to do
                n = len(candidates)
                note = SHORT if asked > n or part.budget.exceeds(n) else ""
                it.stages.append(StageStats(part.name, part.stage.value, layer, n, n, asked, note))
                it.history.append((part.name, n, n))
                continue
            if part.newline_policy != "compete":
                candidates = it.only_patches()
            shown[id(it)] = candidates
            groups.setdefault((id(it.layout), len(candidates)), []).append(it)
        writes = []
        for (_, n), members in groups.items():
            group = Group(members, [shown[id(it)] for it in members])
            wanted = part.wanted(group.layout, self.facts)
            every = group.layout.on(group.entries.device).patches
            text, mask = text_of(ctx, hidden) if part.wants_text else (None, None)
            signals = Signals(
                features=group.narrow(hidden, ctx.current),
                layout=group.layout,
                entries=group.entries,
                budget=min(n, wanted),
                slots=len(group.layout),
                taps=self.taps.signals_of(ctx, part, group),
                text=None if text is None else text[group.rows],
                text_mask=None if mask is None else mask[group.rows],
                fingerprint=tuple(it.record.fingerprint[it.image] for it in members) if part.wants_fingerprint else (),
                listed=group.layout.patches if all(shown[id(it)] is every for it in members) else None,
                history=tuple(tuple(h[1:] for h in it.history if h[0] == part.name) for it in members),
            )
            with explained(ctx.answers):
                signals.check(where_of(part, layer), ctx.answers)
                selection = ask(part, signals) if n else Selection(group.entries[:, :0])
            if ctx.peers is not None:
                selection = ctx.peers.share(selection)
            valid = None if selection.valid is None else selection.valid.cpu()
            for j, it in enumerate(members):
                at, values = selection.index[j], None if selection.features is None else selection.features[j]
                weight = None if selection.weight is None else selection.weight[j]
                if valid is not None:
                    real = valid[j].nonzero()[:, 0].to(at.device, non_blocking=True)
                    at, values = at[real], None if values is None else values[real]
                    weight = None if weight is None else weight[real]
                if weight is not None:
                    ctx.weigh(it.row, group.columns[j][at], weight, hidden)
                if values is not None:
                    writes.append((it.row, group.places(ctx.current)[j][at], values))
                if selection.owner is not None:
                    it.merges.append((shown[id(it)], selection.index[j], selection.owner[j]))
                it.history.append((part.name, n, len(at)))
                before, kept = len(it.entries), at if n == len(it.layout) else shown[id(it)][at]
                it.entries = add_newlines(it.layout, kept, it.entries, part.newline_policy) if len(at) else kept
                it.patches = kept if part.newline_policy != "compete" or not it.layout.has_newlines else None
                asked = None if part.decides_itself else wanted
                note = "; ".join(x for x in (self.notes.get(id(part), ""), selection.note) if x)
                it.stages.append(StageStats(part.name, part.stage.value, layer, before, len(it.entries), asked, note))
        ctx.fired.add(id(part))
        return writes


def find_instances(ctx: Context) -> None:
    """Match the images of the vision record with the runs of placeholder tokens."""
    for video, visual in ctx.places.items():
        if video not in ctx.records:
            if not visual.any():
                continue
            raise UnsupportedFeatureError(
                f"the {'video' if video else 'image'} features of this call were not made by the patched model (encoded before "
                "vtc.patch, or a prompt processed in chunks): pass the pixels, or encode after patching"
            )
        match(ctx, ctx.records[video], visual)


def match(ctx: Context, record: VisionRecord, visual: Tensor) -> None:
    """Give every image (or video) of a record its placeholders, in order."""
    total, found = sum(record.lengths), int(visual.sum())
    if not total or not found or found % total:
        raise UnsupportedFeatureError(
            f"the prompt has {found} visual tokens and the images {total}: padding must not hide image tokens"
        )
    repeat = found // total  # beams and num_return_sequences repeat rows
    device = ctx.visual.device
    rows, columns = visual[::repeat].nonzero(as_tuple=True)
    row_list, visual_columns, columns = rows.tolist(), columns.tolist(), columns.to(device, non_blocking=True)
    start = 0
    for image, layout in enumerate(record.slots):
        end = start + len(layout)
        if end == start:
            continue
        if row_list[start] != row_list[end - 1]:
            raise UnsupportedFeatureError("an image's placeholder tokens are spread over two batch rows: check the prompt")
        entries = record.entries[image].to(device)
        patches = layout.on(device).patches if len(entries) == len(layout) else None if layout.has_newlines else entries
        at = visual_columns[start:end]
        run = slice(at[0], at[-1] + 1) if at[-1] - at[0] == len(at) - 1 else None
        for r in range(repeat):
            ctx.instances.append(
                Instance(
                    row_list[start] * repeat + r,
                    image,
                    record,
                    columns[start:end],
                    run,
                    layout,
                    entries,
                    patches,
                    list(record.stages[image]),
                    list(record.merges[image]),
                )
            )
        start = end
    ctx.fired |= record.fired
    ctx.answers += record.answers
    ctx.clock.add(record.clock)


def keep_table(ctx: Context) -> Tensor:
    """Boolean ``(B, q)``: text, and the visual tokens still alive."""
    keep = ~ctx.visual
    for it in ctx.instances:
        keep[it.row, it.columns[it.entries]] = True
    return keep


def text_of(ctx: Context, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, T, D)`` hidden states of the prompt's text tokens at this place, left-aligned, and their validity."""

    def make() -> tuple[Tensor, Tensor]:
        visual, valid, _ = tokens_of(ctx, ctx.current)
        text = valid & ~visual
        order, _ = compacted(text, max(ctx.text))
        return take(hidden, order, 1), torch.arange(order.shape[1], device=text.device) < text.sum(1, keepdim=True)

    return ctx.once("text", (hidden, ctx.current), make)


def write(hidden: Tensor, writes: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Return ``hidden`` with merged values at their places (out of place: gradients flow to both)."""
    if not writes:
        return hidden
    rows = torch.cat([torch.full_like(at, row) for row, at, _ in writes])
    at = torch.cat([at for _, at, _ in writes])
    values = torch.cat([v for _, _, v in writes]).to(hidden.dtype)
    return hidden.index_put((rows, at), values)


def where_of(part: Reducer, layer: int) -> str:
    """Name a place for an error message."""
    return (
        f"decoder layer {layer} ('{part.name}')" if part.stage is Stage.DECODER else f"the {part.stage.value} ('{part.name}')"
    )
