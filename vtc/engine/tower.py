"""Everything before the language model: recording signals in the vision tower and shortening it (IMAGE, ENCODER, VISION).

One :class:`TowerRun` lives for one call of ``get_image_features``. Whatever was dropped, the projector's output is scattered
back to full length, so that packing, placeholder checks and everything else of the model see what they expect; the record then
tells the text side which slots are real. The record travels with the returned features, since ``generate`` encodes images
before the first forward.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import EncoderReducer, ImageReducer, Kind, Layout, Need, Reducer, Selection, Signals, Stage, explained, settle
from vtc.engine import parallel, taps, upstream
from vtc.engine.encoder import EncoderRun, EncoderStage
from vtc.engine.packed import PackedRun, PackedStage
from vtc.engine.project import Projection
from vtc.engine.undo import Undo
from vtc.engine.upstream import Call, Names
from vtc.errors import UnsupportedFeatureError
from vtc.families.base import Family, VisionCall, by_length
from vtc.kernels import take
from vtc.signals import AttentionTap, PixelTap, ProjectionTap
from vtc.stats import SHORT, Clock, StageStats
from vtc.views import ask, per_layout

Key = tuple[str, str, int]
_RUN: contextvars.ContextVar[TowerRun | None] = contextvars.ContextVar("vtc_tower_run", default=None)
MADE: contextvars.ContextVar[list[VisionRecord] | None] = contextvars.ContextVar("vtc_made", default=None)
"""Records made since the running ``generate`` began: accelerate rebuilds the outputs a record rides on, and loses it."""


@dataclass(eq=False)
class VisionRecord:
    """What the tower hands to the text side.

    Attributes
    ----------
    slots : list of Layout
        Slot layout of each image.
    entries : list of Tensor
        Per image, ``(n,)`` ascending indices of the slots that hold a token.
    signals : dict
        Tapped vision signals by need key: per image ``(slots, ...)``; newline slots hold zeros.
    stages : list of list of StageStats
        Per image, what the tower-side reducer did.
    fired : set of int
        ``id`` of the tower-side parts that acted.
    fingerprint : list of int
        Per image, an exact function of its pixels.
    merges : list of list
        Per image, what the tower-side reducer merged (see :class:`vtc.stats.KeptTokens`), for pictures.
    clock : Clock
        Time spent on signals and selection.
    answers : list of (str, Tensor)
        Whether signals were finite, where a GPU has yet to tell (see :func:`vtc.core.settle`).
    video : bool
        Whether these are videos.
    """

    slots: list[Layout]
    entries: list[Tensor]
    signals: dict[Key, list[Tensor]]
    stages: list[list[StageStats]]
    fired: set[int]
    fingerprint: list[int]
    merges: list[list[tuple[Tensor, Tensor, Tensor]]]
    clock: Clock
    answers: list[tuple[str, Tensor]] = field(default_factory=list)
    video: bool = False

    @property
    def lengths(self) -> list[int]:
        """Visual slots of each image."""
        return [len(s) for s in self.slots]


@dataclass(eq=False)
class TowerRun:
    """State of one call of ``get_image_features``."""

    call: VisionCall
    encoder: EncoderRun | PackedRun
    recorded: dict[Key, Tensor] = field(default_factory=dict)  # need -> (views, patches, ...)
    packed: dict[Key, list[Tensor]] = field(default_factory=dict)  # the same, of the blocks of a packed sequence so far
    cls: Tensor | None = None
    small: tuple[int, int] | None = None  # IMAGE: the grid the tower ran on
    chosen: list[Selection] | None = None  # VISION: per image
    prints: list[int] = field(default_factory=list)  # fingerprint of each image
    fired: set[int] = field(default_factory=set)

    @property
    def clock(self) -> Clock:
        """Time spent on signals and selection."""
        return self.encoder.clock


class TowerSide:
    """Hooks on one model's vision side."""

    def __init__(self, family: Family, parts: tuple[Reducer, ...]) -> None:
        self.family, self.parts = family, parts
        self.fingerprint = any(p.wants_fingerprint for p in parts)
        self.part = next((p for p in parts if p.stage.in_tower), None)
        provides = family.facts.provides
        wanted = [n.resolve(provides) for p in parts for n in p.needs if n.source == "vision"]
        self.needs = [n for n in dict.fromkeys(wanted) if n.of == "attention"]
        self.projected = [n for n in dict.fromkeys(wanted) if n.of == "projection"]
        self.seen = [n for n in dict.fromkeys(wanted) if n.of == "pixels"]
        self.projection = Projection(family.projector) if self.projected else None
        self.on_record: Callable[[VisionRecord], bool] | None = None  # whether it will settle the record's answers

    # ----------------------------------------------------------------------------------------------------- installing
    def install(self, undo: Undo) -> None:
        """Put all hooks on."""
        base, part, family = self.family.base, self.part, self.family
        for video, describe in enumerate((family.describe, family.describe_video)):
            if describe is not None:
                name = upstream.ENCODE[bool(video)]
                original = getattr(base, name)
                wrapper = functools.wraps(original)(functools.partial(self.get_features, original, describe, bool(video)))
                undo.attribute(base, name, wrapper)
        by_layer: dict[int, list[Need]] = {}
        for need in self.needs:
            by_layer.setdefault(self.index(need.layer), []).append(need)
        stepping: dict[int, tuple[Need, ...]] = {}
        if isinstance(part, EncoderReducer):
            if family.merger is not None:
                stage = PackedStage(part, family.encoder_layers, family.merger, family.facts, current_encoder)
            else:
                layers, attention = family.encoder_layers, family.encoder_attention
                stage = EncoderStage(part, layers, attention, family.mlp_branch, family.facts, current_encoder)
            stepping = stage.wanted()
            stage.install(undo)
        for i in sorted({*by_layer, *(i for i, n in stepping.items() if n)}):
            observe = functools.partial(self.observe, by_layer.get(i, []), stepping.get(i, ()))
            taps.attach(undo, family.encoder_attention[i], observe)
        if self.projected:  # before the hook that may shorten what the projector is given
            undo.pre_hook(family.projector, self.observe_projector)
        if part is not None and family.projector is not None:
            if isinstance(part, ImageReducer):
                self.names = Names.of(family.tower).need("pixels", "interpolate")
                undo.pre_hook(family.tower, self.shrink_pixels, with_kwargs=True)
            if part.stage is Stage.VISION and part.wants_cls and family.facts.has_cls:
                undo.hook(family.encoder_layers[family.facts.feature_layer], self.remember_cls)
            undo.pre_hook(family.projector, self.before_projector)
            undo.hook(family.projector, self.after_projector)

    def index(self, layer: int) -> int:
        """Non-negative tower layer."""
        return layer if layer >= 0 else len(self.family.encoder_layers) + layer

    # -------------------------------------------------------------------------------------------------- one call
    def get_features(
        self, original: Callable[..., Any], describe: Callable[..., VisionCall], video: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the model's own method with a record open, and attach the record to what it returns.

        On a GPU the host does not wait in here for the answers whether signals were finite where a language model follows, in the
        same forward or in ``generate``: the text side raises for them. Called alone, this method waits once all is under way.
        """
        if _RUN.get() is not None:  # the model makes the features of videos as those of images
            return original(*args, **kwargs)
        described = describe(upstream.bound(original, args, kwargs))
        if described.refuses and self.part is not None:
            raise UnsupportedFeatureError(f"'{self.part.name}' acts before the projector, which {described.refuses}")
        if described.pieces is not None:
            run = TowerRun(described, PackedRun(described.views, described.pieces, Clock(), video))
        else:
            real = real_patches(described, self.family.facts.grid) if isinstance(self.part, EncoderReducer) else None
            run = TowerRun(described, EncoderRun(described.views, real, Clock(), video))
        if self.seen:
            with torch.no_grad(), run.clock.span(run.call.pixels.device):
                pixels = PixelTap(run.call.pixels, run.call.patches[0].grids[0])
                run.recorded = {need.key: need.measure(pixels) for need in self.seen}
        if self.fingerprint and not run.call.from_features:
            run.prints = fingerprints(run.call)  # now: a GPU that is to read them has nothing else to do yet
        token = _RUN.set(run)
        try:
            with explained(run.encoder.answers):
                out = original(*args, **kwargs)
        finally:
            _RUN.reset(token)
        features = upstream.features_of(out)
        if run.call.from_features:
            run.call = by_length([f.reshape(-1, f.shape[-1]) for f in features])
            run.prints = fingerprints(run.call) if self.fingerprint else []
        lengths = [f.reshape(-1, f.shape[-1]).shape[0] + run.call.appended for f in features]
        record = self.finish(run, features[0].device if len(features) else torch.device("cpu"))
        record.video = video
        if not agree(lengths, record.lengths):
            raise UnsupportedFeatureError(
                f"the model packed {lengths} visual tokens where its adapter expected {record.lengths}: this checkpoint's "
                "image settings are not supported"
            )
        if upstream.carries_record(out):
            out.vtc = record  # generate encodes images before the first forward: the record rides along
        made = MADE.get()
        if made is not None:
            made.append(record)
        taken = self.on_record is not None and self.on_record(record)
        if made is None and not taken:
            settle(record.answers)
        return out

    def observe(
        self,
        record: list[Need],
        stepping: tuple[Need, ...],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        _ctx: Any,
    ) -> None:
        """Compute the signals wanted of one tower layer."""
        run = _RUN.get()
        if run is None:
            return
        with torch.no_grad(), run.clock.span(query.device):
            query, key, value = parallel.whole_attention(self.family, self.parts, module, query, key, value)
            if run.call.pieces is not None:
                self.observe_packed(run, record, stepping, query, key, value, scaling)
                return
            cls = self.family.facts.has_cls
            key_mask = None
            if run.encoder.valid is not None:  # padded views: the same mask for every query row
                key_mask = run.encoder.valid
                if cls:
                    key_mask = torch.cat([torch.ones_like(key_mask[:, :1]), key_mask], 1)
                key_mask = key_mask[:, None, None, :]
            elif isinstance(mask, Tensor):  # a tower that pads views itself
                key_mask = mask[:, None, None] if mask.dim() == 2 else mask[:, :1, :1]
                key_mask = key_mask if key_mask.dtype == torch.bool else key_mask > -1 if mask.dim() == 4 else key_mask.bool()
            tap = AttentionTap(query, key, value, scaling, mask=key_mask, cls=cls)
            for need in record:
                run.recorded[need.key] = of_cells(run.call, self.spread(run, need.measure(tap)))
            run.encoder.taps = {need.name: need.measure(tap) for need in stepping}

    @staticmethod
    def observe_packed(
        run: TowerRun,
        record: list[Need],
        stepping: tuple[Need, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
    ) -> None:
        """The same for a tower that packs everything in one sequence: its blocks come one by one, or together."""
        pieces, total = run.encoder.pieces, sum(run.encoder.pieces)
        if query.shape[2] != total:
            pieces = [query.shape[2]]
        parts = zip(*(t.split(pieces, 2) for t in (query, key, value)), strict=True)
        taken = [AttentionTap(*part, scaling) for part in parts]
        for need in record:
            held = run.packed.setdefault(need.key, [])
            held += [need.measure(tap) for tap in taken]
            if sum(h.shape[1] for h in held) == total:
                run.recorded[need.key] = of_cells(run.call, run.encoder.spread(torch.cat(held, 1)))
                held.clear()
        run.encoder.observe(stepping, taken)

    def observe_projector(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Compute the signals wanted of the projector."""
        run = _RUN.get()
        if run is None:
            return
        parallel.check_projector(self.family, self.parts, module)
        with torch.no_grad(), run.clock.span(args[0].device):
            tap = ProjectionTap(args[0], self.projection.function, run.encoder.valid)
            for need in self.projected:
                run.recorded[need.key] = self.of_tokens(run.call, self.spread(run, need.measure(tap)))

    def of_tokens(self, call: VisionCall, values: Tensor) -> Tensor:
        """Turn values of what the projector is given into those of tokens, where it is given patches that are joined behind it."""
        given = self.family.facts.grid[0] * self.family.facts.grid[1]
        if call.cells is None or values.shape[1] == len(call.cells):
            return values
        if values.shape[1] != given:
            raise UnsupportedFeatureError(
                f"the projector was given {values.shape[1]} tokens per view where its adapter expected {given} or "
                f"{len(call.cells)}: this checkpoint's image settings are not supported"
            )
        return of_cells(call, values)

    def spread(self, run: TowerRun, values: Tensor) -> Tensor:
        """Put values of the patches alive back on the full grid, zeros elsewhere."""
        alive, valid = run.encoder.ids, run.encoder.valid
        if alive is None:
            return values
        per = self.family.facts.grid[0] * self.family.facts.grid[1]
        full = values.new_zeros(values.shape[0], per, *values.shape[2:])
        ids = alive.view(*alive.shape, *[1] * (values.dim() - 2)).expand_as(values)
        if valid is not None:  # padding may repeat a living id: let the real one win
            return full.scatter_add(1, ids, values * valid.view(*valid.shape, *[1] * (values.dim() - 2)))
        return full.scatter(1, ids, values)

    # ----------------------------------------------------------------------------------------------------- IMAGE
    def shrink_pixels(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the tower smaller pictures."""
        run, part = _RUN.get(), self.part
        if run is None or not isinstance(part, ImageReducer):
            return None
        call = Call(self.names, args, kwargs)
        pixels = call["pixels"]
        grid = self.family.facts.grid
        patch = pixels.shape[-2] // grid[0], pixels.shape[-1] // grid[1]
        with run.clock.span(pixels.device):
            run.fired.add(id(part))
            small = part.target_grid(grid, self.family.facts)
            if small == grid:
                return None
            run.small = small
            size = run.small[0] * patch[0], run.small[1] * patch[1]
            pixels = part.resize(pixels, size)
        call.set("pixels", pixels)
        call.set("interpolate", True)
        return call.result()

    # ---------------------------------------------------------------------------------------- VISION and the projector
    def remember_cls(self, _module: nn.Module, _args: Any, out: Any) -> None:
        """Keep the class token of the layer whose output feeds the projector."""
        run = _RUN.get()
        if run is not None:
            run.cls = (out[0] if isinstance(out, tuple) else out)[:, 0]

    def before_projector(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        """VISION: choose (and merge) before the projector, so that it runs on the survivors only."""
        run, part = _RUN.get(), self.part
        if run is None or part is None or part.stage is not Stage.VISION:
            return None
        features = args[0]
        run.chosen, packed = self.choose(run, part, features)
        return (packed, *args[1:])

    def choose(self, run: TowerRun, part: Reducer, features: Tensor) -> tuple[list[Selection], Tensor]:
        """Ask a VISION reducer, one batch per geometry; return selections per image and ``(images, K, D)`` features."""
        starts = [0]
        for v in run.call.views:
            starts.append(starts[-1] + v)
        groups: dict[int, list[int]] = {}
        for n, layout in enumerate(run.call.patches):
            groups.setdefault(id(layout), []).append(n)
        chosen: list[Selection | None] = [None] * len(run.call.views)
        tokens: list[Tensor | None] = [None] * len(run.call.views)
        for members in groups.values():
            views, layout = run.call.views[members[0]], run.call.patches[members[0]]
            asked = part.wanted(run.call.slots[members[0]], self.family.facts)
            whole = not part.decides_itself and asked >= len(run.call.slots[members[0]])
            rows = torch.tensor([starts[m] + v for m in members for v in range(views)]).to(features.device, non_blocking=True)
            mine = features[rows].reshape(len(members), -1, features.shape[-1])
            fits = (
                run.cls is not None and run.cls.shape[-1] == mine.shape[-1]
            )  # not beside several patches or layers in one token
            with run.clock.span(features.device):
                own = {}
                for need in part.needs:
                    value = run.recorded[need.key][rows]
                    own[need.name] = value.reshape(len(members), mine.shape[1], *value.shape[2:])
                slots = len(run.call.slots[members[0]])
                if whole:
                    selection = Selection.all(mine.shape[1], len(members), mine.device)
                signals = Signals(
                    features=mine,
                    layout=layout,
                    entries=torch.arange(mine.shape[1], device=mine.device).expand(len(members), -1),
                    budget=asked,
                    slots=slots,
                    taps=own,
                    cls=run.cls[rows].reshape(len(members), views, -1) if fits else None,
                    fingerprint=tuple(run.prints[m] for m in members) if part.wants_fingerprint else (),
                )
                if not whole:
                    selection = ask(part, signals.check(f"the vision tower's output ('{part.name}')", run.encoder.answers))
            merged = selection.features
            if merged is None:
                merged = take(mine, selection.index)
            valid = (
                None if selection.valid is None else selection.valid.cpu()
            )  # images keep different numbers: how many, decides
            for j, m in enumerate(members):
                at, own_tokens = selection.index[j : j + 1], merged[j]
                if valid is not None:
                    real = valid[j].nonzero()[:, 0].to(at.device, non_blocking=True)
                    at, own_tokens = at[:, real], own_tokens[real]
                owner = None if selection.owner is None else selection.owner[j : j + 1]
                chosen[m], tokens[m] = Selection(at, None, owner, note=selection.note, slotted=selection.slotted), own_tokens
        run.fired.add(id(part))
        longest = max(t.shape[0] for t in tokens)
        packed = features.new_zeros(len(tokens), longest, features.shape[-1])
        return (
            chosen,
            torch.stack(  # stack, not in-place writes: gradients flow to every merged token
                [t if len(t) == longest else torch.cat([t, packed[0, : longest - len(t)]]) for t in tokens]
            ),
        )

    def after_projector(self, _module: nn.Module, _args: Any, out: Tensor) -> Any:
        """Scatter short projector output back to ``(views, patches, D)``; slots without a token hold zeros."""
        run, part = _RUN.get(), self.part
        if run is None or part is None:
            return None
        rows, cols = self.family.facts.grid
        per, total = rows * cols, sum(run.call.views)
        if part.stage is Stage.VISION and run.chosen is not None:
            full = out.new_zeros(total * per, out.shape[-1])
            index, source, start = [], [], 0
            for image, selection in enumerate(run.chosen):
                at = selection.index[0]
                index.append(at + start * per)
                source.append(out[image, : len(at)])
                start += run.call.views[image]
            index_all = torch.cat(index)
            full = full.index_copy(0, index_all, torch.cat(source))
            return full.view(total, per, -1)
        if part.stage is Stage.IMAGE and run.small is not None:
            ids = nearest_cells(run.small, (rows, cols)).to(out.device, non_blocking=True).expand(total, -1)
        elif run.encoder.ids is not None:
            ids = run.encoder.ids
        else:
            return None
        if out.shape[1] != ids.shape[1]:
            raise UnsupportedFeatureError(
                f"the projector returned {out.shape[1]} tokens per view where {ids.shape[1]} survived: the features do not come "
                "from one tower layer, or this release of transformers records them before hooks can shorten them; upgrade "
                "transformers, or use a reducer behind the tower"
            )
        index = ids[..., None].expand(-1, -1, out.shape[-1])
        full = out.new_zeros(total, per, out.shape[-1])
        if run.encoder.valid is not None:
            return full.scatter_add(1, index, out * run.encoder.valid[..., None])
        return full.scatter(1, index, out)

    # ------------------------------------------------------------------------------------------------------- record
    def finish(self, run: TowerRun, device: torch.device) -> VisionRecord:
        """Translate what happened per view into slots of each image."""
        part, facts, encoder = self.part, self.family.facts, run.encoder
        if encoder.fired:
            run.fired.add(id(part))
        acted = part is not None and id(part) in run.fired
        images = list(zip(run.call.slots, run.call.patches, run.call.views, strict=True))
        found = [self.survivors(run, image) if acted else (None, "", []) for image in range(len(images))]
        short: dict[int, Tensor] = {}
        for image, ((slots, patches, _), (alive, _, _)) in enumerate(zip(images, found, strict=True)):
            whole = alive is None or len(alive) == len(patches)
            if acted and not isinstance(part, EncoderReducer):  # all patches are not yet the whole image: newlines count, too
                whole = not part.decides_itself and part.wanted(slots, facts) >= len(slots)
            if not whole:
                short[image] = torch.arange(len(patches)) if alive is None else alive
        slotted = [run.chosen is not None and run.chosen[i].slotted for i in short]
        kept = dict(zip(short, slots_of([(run.call.patches[i], a) for i, a in short.items()], slotted), strict=True))
        entries, stages = [], []
        for image, ((slots, patches, views), (_, note, _)) in enumerate(zip(images, found, strict=True)):
            if image in kept:
                own = add_newlines(slots, kept[image], None, part.newline_policy).to(device, non_blocking=True)
            else:
                own = torch.arange(len(slots), device=device)
            entries.append(own)
            row: list[StageStats] = []
            if acted:
                asked = part.wanted(slots, facts)
                if isinstance(part, EncoderReducer):  # its budget is one of views
                    per_view = len(patches) * facts.merge // views
                    budgets = part.patch_budgets(views, per_view, facts, video=encoder.video)
                    asked = min(len(slots), sum(budgets) // facts.merge)
                    note = part.note(asked, len(slots))
                note = "; ".join(x for x in (note, SHORT if part.budget.exceeds(len(slots)) else "") if x)
                asked = None if part.decides_itself else asked
                row.append(StageStats(part.name, part.stage.value, 0, len(slots), len(own), asked, note))
            stages.append(row)
        signals = {key: self.on_slots(run, value) for key, value in run.recorded.items()}
        merges = [merged for _, _, merged in found]
        return VisionRecord(
            run.call.slots, entries, signals, stages, set(run.fired), run.prints, merges, run.clock, encoder.answers
        )

    def survivors(self, run: TowerRun, image: int) -> tuple[Tensor | None, str, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return the patches of an image that are left (entries of its view layout; ``None``: all), a note, and what was merged."""
        encoder, patches, views = run.encoder, run.call.patches[image], run.call.views[image]
        rows, cols = self.family.facts.grid
        if run.chosen is not None:
            selection = run.chosen[image]
            alive, owner = selection.index[0], selection.owner
            return alive, selection.note, [] if owner is None else [(patches.slot, alive, owner[0])]
        if run.small is not None:
            cells = nearest_cells(run.small, (rows, cols))
            alive = (torch.arange(views)[:, None] * rows * cols + cells[None]).flatten()
            group = torch.arange(views)[:, None] * len(cells) + covering_cells(run.small, (rows, cols))[None]
            return alive, "", [(patches.slot, alive, group.flatten())]
        if isinstance(encoder, PackedRun):
            return None if encoder.tokens is None else encoder.tokens[image], "", []
        if encoder.ids is None:
            return None, "", []
        start = sum(run.call.views[:image])
        alive = torch.cat([encoder.patches(start + v) + v * rows * cols for v in range(views)])
        if encoder.owner is None:
            return alive, "", []
        before = torch.tensor([0, *encoder.counts[start : start + views]]).cumsum(0)[:-1, None]
        owner = encoder.owner[start : start + views] + before.to(alive.device, non_blocking=True)
        return alive, "", [(patches.slot, alive, owner.flatten())]

    def on_slots(self, run: TowerRun, values: Tensor) -> list[Tensor]:
        """Rearrange ``(views, patches, ...)`` into one ``(slots, ...)`` tensor per image."""
        out, start, total = [], 0, sum(map(len, run.call.patches))
        values = values.flatten(0, 1)
        if len(values) != total:
            raise UnsupportedFeatureError(
                f"a signal of the vision tower has {len(values)} values where the images have {total} patches: this checkpoint's "
                "image settings are not supported"
            )
        for slots, patches in zip(run.call.slots, run.call.patches, strict=True):
            there = sum(rows * cols for rows, cols in slots.grids)
            if there > len(patches):
                raise UnsupportedFeatureError(
                    f"the visual tokens of an image lie on grids of {there} patches where its views have {len(patches)}: this "
                    "checkpoint's image settings are not supported"
                )
            source, patch = sources(slots, values.device)
            mine = values[start + source]
            out.append(torch.where(patch.view(-1, *[1] * (values.dim() - 1)), mine, torch.zeros_like(mine)))
            start += len(patches)
        return out


@per_layout
def sources(slots: Layout) -> tuple[Tensor, Tensor]:
    """Return the patch of the image's views that each slot holds, and whether it holds one, ``(slots,)`` both."""
    grids = torch.tensor(slots.grids)
    first = grids.prod(1).cumsum(0) - grids.prod(1)  # of each view
    patch = slots.kind == Kind.PATCH
    view = slots.view.clamp(min=0)  # a choice: newlines are in no view, and what is found for them is not taken
    return torch.where(patch, first[view] + slots.row * grids[view, 1] + slots.col, 0), patch


def current_encoder() -> EncoderRun | PackedRun | None:
    """State of the tower pass under way, if any."""
    run = _RUN.get()
    return None if run is None else run.encoder


def real_patches(call: VisionCall, grid: tuple[int, int]) -> Tensor | None:
    """Return ``(views, patches)`` bool, the patches that have a slot, or None where all have one."""
    real = torch.cat([p.slot >= 0 for p in call.patches]).view(-1, grid[0] * grid[1])
    return None if bool(real.all()) else real


def of_cells(call: VisionCall, values: Tensor) -> Tensor:
    """Turn values of tower patches ``(views, patches, ...)`` into those of the projector's tokens: the mean of their patches."""
    return values if call.cells is None else values[:, call.cells.to(values.device, non_blocking=True)].mean(2)


def slots_of(alive: list[tuple[Layout, Tensor]], slotted: Sequence[bool] | None = None) -> list[Tensor]:
    """Return the slots of the patches alive (entries of the view layout), ascending, for each image; padding has none.

    ``slotted`` says of which images it is known that no padding is among them.
    """
    at = [patches.on(index.device).slot[index].sort().values for patches, index in alive]  # padding comes first
    some = [i for i, (patches, _) in enumerate(alive) if len(patches.patches) < len(patches)]
    padded = some if slotted is None else [i for i in some if not slotted[i]]
    if padded:  # the host waits once
        for i, count in zip(padded, torch.stack([(at[i] < 0).sum() for i in padded]).tolist(), strict=True):
            at[i] = at[i][count:]
    return at


def add_newlines(slots: Layout, kept: Tensor, alive: Tensor | None, policy: str) -> Tensor:
    """Return ascending patch slots ``kept`` together with the newline slots among ``alive`` (``None``: all) that the policy keeps.

    ``"compete"`` and ``"none"`` add nothing.
    """
    if policy not in ("all", "with_row") or not slots.has_newlines:
        return kept
    here = slots.on(kept.device)
    newline = here.newlines
    if alive is not None and len(alive) < len(slots):
        newline = alive[here.kind[alive] == Kind.NEWLINE]
    if policy == "with_row":
        last = int(slots.y.max()) + 1  # rows of no crop
        row = here.y[kept]
        row = torch.where(here.view[kept] > 0, row, last) if slots.thumbnail else row
        holds = torch.zeros(last + 1, dtype=torch.bool, device=kept.device).index_fill(0, row, True)
        newline = newline[holds[here.y[newline]]]
    return torch.cat([kept, newline]).sort().values


def nearest_cells(small: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Patch ids of ``grid`` closest to the cell centres of a coarser grid, ``(small rows * small cols,)``, ascending."""
    rows = ((torch.arange(small[0]) + 0.5) * grid[0] / small[0]).long()
    cols = ((torch.arange(small[1]) + 0.5) * grid[1] / small[1]).long()
    return (rows[:, None] * grid[1] + cols[None]).flatten()


def covering_cells(small: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cell of a coarser grid in which the centre of each patch of ``grid`` lies, ``(grid rows * grid cols,)``."""
    rows = (2 * torch.arange(grid[0]) + 1) * small[0] // (2 * grid[0])
    cols = (2 * torch.arange(grid[1]) + 1) * small[1] // (2 * grid[1])
    return (rows[:, None] * small[1] + cols[None]).flatten()


def agree(packed: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a model packed its images as expected: one by one, or several together (those of a row, the frames of a clip)."""
    ours, theirs = set(accumulate(expected)), {end for end in accumulate(packed) if end}
    return sum(packed) == sum(expected) and (theirs <= ours or ours <= theirs)


def fingerprints(call: VisionCall) -> list[int]:
    """Return an integer per image that depends on its pixels exactly, not on the batch: a wrapping sum of weighted bit patterns."""
    sums, start = [], 0
    for image, views in enumerate(call.views):
        own = call.pixels[image] if isinstance(call.pixels, list) else call.pixels[start : start + views]
        start += views
        pixels = own.detach().contiguous()
        size = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[pixels.element_size()]
        bits = pixels.view(size).flatten().long()
        weight = (torch.arange(bits.numel(), device=bits.device) * 2654435761 + 40503) % 2147483647
        sums.append((bits * weight).sum())
    return [int(s) & 0x7FFFFFFFFFFFFFFF for s in torch.stack(sums).tolist()] if sums else []
