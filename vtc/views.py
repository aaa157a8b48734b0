"""Working view by view: an image cut into crops shares its budget among them, and every view is judged by itself.

Methods released for one picture per image treat each crop as a picture of its own. :func:`each_view` does that for any of them:
it hands the method one view of one image at a time and puts the answers together again. One image at a time also means that no
rounding depends on the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vtc.core import Layout, Newlines, Positions, Reducer, Scorer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import absorb_neighbours, apportion, compacted, topk, topk_per_group

NO_CLS = "no class token in this tower: patches are scored by the attention they receive"
"""Note of a method that had to do without the class token."""


def per_layout(make: Callable[[Layout], Sequence[Tensor]]) -> Callable[[Layout, torch.device], list[Tensor]]:
    """Decorate a function of a layout: what it returns is made once per layout, on the CPU, and kept on every device asked for."""
    made: WeakKeyDictionary[Layout, dict[torch.device, list[Tensor]]] = WeakKeyDictionary()

    @functools.wraps(make)
    def kept(layout: Layout, device: torch.device) -> list[Tensor]:
        own = made.setdefault(layout, {})
        if device not in own:
            with torch.inference_mode(False):  # later calls may want gradients
                own[device] = [t.to(device, non_blocking=True) for t in make(layout)]
        return own[device]

    return kept


def _split(layout: Layout, known: Tensor) -> list[Tensor]:
    """Return the places of every view's entries among some ``known (N,)`` ones, and last those of newlines; padding has none."""
    view, real = layout.view[known], layout.slot[known] >= 0
    return [((view == v) & real).nonzero()[:, 0] for v in [*range(layout.views), -1]]


@per_layout
def entries_of_views(layout: Layout) -> list[Tensor]:
    """Return the ascending entries of every view that have a slot, and last the newlines, ``(n,)`` each."""
    return _split(layout, layout.every)


@per_layout
def patches_of_views(layout: Layout) -> list[Tensor]:
    """Return the same as places among the layout's patches: without newlines."""
    return _split(layout, layout.patches)


def _known_members(signals: Signals, device: torch.device) -> list[Tensor]:
    if len(signals.known) == len(signals.layout):
        return entries_of_views(signals.layout, device)
    if signals.known is signals.layout.patches:
        return patches_of_views(signals.layout, device)
    return [t.to(device, non_blocking=True) for t in _split(signals.layout, signals.known)]


_MEMBERS: WeakKeyDictionary[Signals, list[list[Tensor]]] = WeakKeyDictionary()


def members(signals: Signals) -> list[list[Tensor]]:
    """Return per image the ascending tokens ``(n,)`` of every view, and last the newlines; padding patches (no slot) are left out.

    The host waits for the device only where it does not know the entries, and once.
    """
    if signals not in _MEMBERS:
        _MEMBERS[signals] = _members(signals)
    return _MEMBERS[signals]


def _members(signals: Signals) -> list[list[Tensor]]:
    batch, device = signals.shape[0], signals.entries.device
    if signals.known is not None:
        return [_known_members(signals, device)] * batch
    views = signals.layout.views
    group = signals.of("view")
    group = torch.where(signals.of("slot") < 0, views + 1, torch.where(group < 0, views, group))
    size = torch.zeros(batch, views + 2, dtype=torch.long, device=device).scatter_add(1, group, torch.ones_like(group))
    order = torch.argsort(group, dim=1, stable=True)
    return [list(own.split(sizes)[:-1]) for own, sizes in zip(order, size.tolist(), strict=True)]


def on_host(signals: Signals, *attributes: str) -> list[Tensor]:
    """Return layout attributes of the tokens of the first image, ``(n,)`` each on the CPU.

    The host waits for the device only where it does not know the entries.
    """
    at = signals.entries[0].cpu() if signals.known is None else signals.known
    return [getattr(signals.layout, name)[at] for name in attributes]


def ask(part: Reducer, signals: Signals) -> Selection:
    """Ask a reducer for the survivors of images or clips, or of every frame of clips where its budget is one of frames.

    Frames share the budget evenly. A scorer's scores are those of the whole clip.
    """
    if part.per != "frame" or not signals.layout.video:
        return part.select(signals)
    chosen = part.select_frames(signals)
    if chosen is not None:
        return chosen
    if isinstance(part, Scorer) and type(part).select is Scorer.select:
        with torch.no_grad():
            frame, quota = frame_quotas(signals)
            return Selection(compacted(topk_per_group(part.score(signals), frame, quota), signals.budget)[0])
    return each_view(signals, part.select, rows=frozenset(n.name for n in part.needs if n.axis == "row"))


def each_view(
    signals: Signals,
    choose: Callable[[Signals], Selection],
    *,
    floor: bool = False,
    always: bool = False,
    rows: frozenset[str] = frozenset(),
) -> Selection:
    """Ask ``choose`` about every view of every image and return one selection of the images' tokens.

    The budget is shared evenly; what a small view cannot use, and what does not divide evenly, goes to the other views (lowest
    first), so that exactly the budget is kept. Padding patches (no slot) are left out. Newline tokens, where they compete, form a
    group of their own that is served last. A view that may keep everything is kept as it is.

    Parameters
    ----------
    signals : Signals
        ``B`` images.
    choose : callable
        Gets the :class:`Signals` of one view of one image (batch 1) with ``0 < budget < N`` (``<= N`` with ``always``); returns
        its :class:`Selection` without ``valid``.
    floor : bool, default False
        Every view gets ``budget // views``, even where that leaves fewer than the budget in total: what releases with a budget per
        crop do. Budgets below one token per view are shared as otherwise.
    always : bool, default False
        Ask also about views that may keep everything: for methods that find their own number of tokens.
    rows : frozenset of str
        Taps with one entry per image instead of one per token.
    """
    return joined(signals, [_one_image(signals, b, own, choose, floor, always, rows) for b, own in enumerate(members(signals))])


def joined(signals: Signals, parts: list[Selection]) -> Selection:
    """Join the selections of single images (batch 1, without ``valid``), which may keep different numbers."""
    n, device = signals.shape[1], signals.features.device
    count = [len(p.index[0]) for p in parts]
    longest = max(count)
    valid = None
    if min(count) < longest:
        valid = torch.arange(longest, device=device) < torch.tensor(count).to(device, non_blocking=True)[:, None]

    def pad(t: Tensor) -> Tensor:
        return t if t.shape[1] == longest else torch.cat([t, t.new_zeros(1, longest - t.shape[1], *t.shape[2:])], 1)

    features = owner = None
    if any(p.features is not None for p in parts):
        features = torch.cat([pad(_own(p, signals.features[b : b + 1])) for b, p in enumerate(parts)])
        owner = torch.cat([_owners(p, n) for p in parts])
    notes = list(dict.fromkeys(p.note for p in parts if p.note))
    return Selection(torch.cat([pad(p.index) for p in parts]), features, owner, valid, "; ".join(notes), slotted=True)


def _one_image(
    signals: Signals,
    image: int,
    members: list[Tensor],
    choose: Callable[[Signals], Selection],
    floor: bool,
    always: bool,
    rows: frozenset[str],
) -> Selection:
    """Return the selection (batch 1) of one image; ``members`` are the tokens of its views and its newlines."""
    views, n, device = signals.layout.views, signals.shape[1], signals.features.device
    size = [len(m) for m in members]
    if views == 1 and signals.budget < n == size[0]:  # one picture: nothing to share or put together
        return choose(narrow(signals, image, members[0], signals.budget, 0, rows))
    if floor and signals.budget >= views:
        quota = [min(s, signals.budget // views) for s in size[:-1]] + [0]
    else:
        quota = apportion(signals.budget, [1.0] * views + [0.0], size)
    index, features, owner, note, start = [], [], torch.full((1, n), -1, device=device), [], 0
    merged = False
    for v, (tokens, share) in enumerate(zip(members, quota, strict=True)):
        if share == 0:
            continue
        mine = narrow(signals, image, tokens, share, v, rows)
        whole = share == len(tokens) and not always
        part = Selection.all(len(tokens), 1, device) if whole else choose(mine)
        index.append(tokens[part.index])
        features.append((part, mine.features))
        own = _owners(part, len(tokens))
        owner[:, tokens] = torch.where(own >= 0, own + start, own)
        start += part.index.shape[1]
        merged = merged or part.features is not None
        note.append(part.note)
    order = torch.cat(index, 1).argsort(1)
    place = torch.empty_like(order).scatter(1, order, torch.arange(start, device=device)[None])
    chosen = torch.cat(index, 1).gather(1, order)
    notes = "; ".join(dict.fromkeys(x for x in note if x))
    if not merged:
        return Selection(chosen, note=notes)
    tokens = torch.cat([_own(part, own) for part, own in features], 1)[:, order[0]]
    return Selection(chosen, tokens, torch.where(owner >= 0, place[0][owner.clamp(min=0)], owner), note=notes)


def frame_quotas(signals: Signals) -> tuple[Tensor, Tensor]:
    """Return the frame of every token ``(B, N)`` and the tokens each frame keeps ``(B, frames + 1)``, the budget shared evenly.

    Newline tokens are the last group, served when all frames are whole.
    """
    views = signals.layout.views
    frame = signals.of("view")
    frame = torch.where(frame < 0, views, frame)
    return frame, torch.tensor(shares_of_views(signals)).to(frame.device, non_blocking=True)


def shares_of_views(signals: Signals) -> list[list[int]]:
    """Return per image how many tokens each view keeps, the budget shared evenly, and last how many newlines."""
    weight = [1.0] * signals.layout.views + [0.0]
    return [apportion(signals.budget, weight, [len(m) for m in own]) for own in members(signals)]


def in_first_slots(signals: Signals, chosen: Selection) -> Selection:
    """Move the merged tokens of each image into its first slots, view after view, in the order they are listed.

    For methods whose tokens are in no place of the picture: the language model then reads them in this order, while the slots of
    several crops alternate. A selection that merged nothing is returned as it is.
    """
    if chosen.features is None:
        return chosen
    (room,) = in_slot_order(signals.layout, chosen.index.device)
    batch, most = chosen.index.shape
    count = [most] * batch if chosen.valid is None else chosen.valid.sum(1).tolist()
    index, features, owner = torch.zeros_like(chosen.index), [], []
    for b, k in enumerate(count):
        first = room[:k]
        turn = first.argsort()
        index[b, :k] = first[turn]
        features.append(torch.cat([chosen.features[b, turn], chosen.features[b, k:]]))
        place = torch.empty_like(turn).scatter(0, turn, torch.arange(k, device=turn.device))
        owner.append(torch.where(chosen.owner[b] >= 0, place[chosen.owner[b].clamp(min=0)], -1))
    return dataclasses.replace(chosen, index=index, features=torch.stack(features), owner=torch.stack(owner), slotted=True)


@per_layout
def in_slot_order(layout: Layout) -> tuple[Tensor]:
    """Return the entries that have a slot, ``(n,)``, the first slot first: entries of a view layout are not in slot order."""
    room = (layout.slot >= 0).nonzero()[:, 0]
    return (room[layout.slot[room].argsort()],)


def narrow(signals: Signals, image: int, tokens: Tensor, budget: int, view: int, rows: frozenset[str] = frozenset()) -> Signals:
    """Return the signals of some ``tokens (n,)`` of one image (batch 1); taps named in ``rows`` belong to the whole image."""
    at, whole = slice(image, image + 1), len(tokens) == signals.shape[1]

    def of(t: Tensor) -> Tensor:
        return t[at] if whole else t[at, tokens]  # all of them: nothing to copy

    known = signals.known
    if known is not None and not whole:
        known = known[_known_members(signals, known.device)[view]]
    return dataclasses.replace(
        signals,
        features=of(signals.features),
        entries=of(signals.entries),
        budget=budget,
        taps={name: t[at] if name in rows else of(t) for name, t in signals.taps.items()},
        cls=signals.cls[at, view : view + 1] if signals.cls is not None else None,
        text=signals.text[at] if signals.text is not None else None,
        text_mask=signals.text_mask[at] if signals.text_mask is not None else None,
        fingerprint=signals.fingerprint[at] if signals.fingerprint else (),
        listed=known,
        history=signals.history[at] if signals.history else (),
    )


def _own(part: Selection, features: Tensor) -> Tensor:
    """Features of the survivors: the new ones, or their own."""
    if part.features is not None:
        return part.features
    return features[torch.arange(len(features), device=features.device)[:, None], part.index]


def _owners(part: Selection, n: int) -> Tensor:
    """``(1, n)`` survivor each token went into; without merging every survivor holds itself alone."""
    if part.owner is not None:
        return part.owner
    places = torch.arange(part.index.shape[1], device=part.index.device)
    return torch.full((1, n), -1, device=part.index.device).scatter(1, part.index, places[None])


@dataclass(frozen=True, kw_only=True)
class AbsorbingReducer(Reducer):
    """Base of methods that keep some patches of every view, add their neighbours to them, and sum the rest up in one more token.

    Needs the signals ``wide_cls_attn`` and ``wide_keys``.

    Parameters
    ----------
    adaptive : bool, default False
        Let the outliers of attention decide on the number of tokens, at most ``keep``.
    official : bool, default False
        Outliers are pooled over all images of a batch that have one geometry and may be none; every view gets ``keep // views``
        tokens; neighbours come from the list of kept and other patches, where a patch may stand twice or not at all.
    neighbours : ClassVar[int]
        Tokens each kept token absorbs.
    """

    neighbours: ClassVar[int] = 32
    stage: ClassVar[Stage] = Stage.VISION
    default_positions: ClassVar[Positions] = "compact"
    allowed_positions: ClassVar[tuple[Positions, ...]] = ("compact",)
    default_newlines: ClassVar[Newlines] = "none"
    wants_cls: ClassVar[bool] = True
    kind: ClassVar[str] = "merge"

    adaptive: bool = False
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse newline tokens, which have no place in this order of tokens."""
        super().__post_init__()
        if self.newlines not in (None, "none"):
            raise UnknownArgumentError(
                f"{self.name}: newlines={self.newlines!r} is not possible, since its tokens are not in rows; use 'none'"
            )

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the number of tokens follows from the picture."""
        return self.adaptive

    def most_attended(self, signals: Signals, share: float | None) -> Tensor:
        """Return the patches of one view kept for their attention, ``(n,)`` in descending order.

        Parameters
        ----------
        signals : Signals
            Of one view.
        share : float or None
            Share of outliers, where it is not to be taken from this view.
        """
        attention, room = signals.wide_cls_attn, max(1, signals.budget - 1)
        if share is not None:
            room = min(room, int(attention.shape[1] * share))
        elif self.adaptive:
            room = min(room, max(1, round(outliers(attention) * attention.shape[1])))
        return topk(attention, min(room, attention.shape[1]))[0]

    def kept(self, signals: Signals, share: float | None) -> tuple[Tensor, Tensor]:
        """Return the patches of one view that get a token, in order, and those that are summed up in the last one."""
        chosen = self.most_attended(signals, share)
        return chosen, complement(chosen, signals.shape[1])

    def choose(self, signals: Signals, share: float | None) -> Selection:
        """Merge one view into its first positions."""
        attention = signals.wide_cls_attn
        with torch.no_grad():
            chosen, rest = self.kept(signals, share)
        if self.official:  # neighbours come from this list: a patch kept twice is its own neighbour, one left out is nobody's
            pool = torch.cat([chosen, rest])
            own = torch.arange(len(chosen), device=pool.device)
            tokens = absorb_neighbours(
                signals.features[:, pool], signals.wide_keys[:, pool], attention[:, pool], own[None], self.neighbours
            )
        else:
            tokens = absorb_neighbours(signals.features, signals.wide_keys, attention, chosen[None], self.neighbours)
        owner = torch.full_like(attention[0], -1, dtype=torch.long)
        if len(chosen) < signals.budget:
            owner[rest] = len(chosen)
            tokens = torch.cat(
                [tokens, attention[:, None, rest].to(tokens.dtype) @ signals.features[:, rest].to(tokens.dtype)], 1
            )
        owner[chosen] = torch.arange(len(chosen), device=owner.device)
        index = torch.arange(tokens.shape[1], device=owner.device)[None]
        return Selection(index, tokens.to(signals.features.dtype), owner[None])

    def select(self, signals: Signals) -> Selection:
        """Merge every view."""
        share = None
        if self.official and self.adaptive:
            share = outliers(signals.wide_cls_attn[signals.of("slot") >= 0])
        chosen = each_view(signals, lambda s: self.choose(s, share), floor=self.official, always=self.adaptive)
        chosen = in_first_slots(signals, chosen)
        return chosen if signals.cls is not None else dataclasses.replace(chosen, note=NO_CLS)


def outliers(attention: Tensor) -> float:
    """Share of values above the third quartile plus one and a half interquartile ranges."""
    values = attention.double().flatten()
    low, high = values.quantile(0.25), values.quantile(0.75)
    return float((values > high + 1.5 * (high - low)).double().mean())


def complement(chosen: Tensor, n: int) -> Tensor:
    """Return the ascending positions below ``n`` that are not ``chosen``, which are all different."""
    rest = torch.ones(1, n, dtype=torch.bool, device=chosen.device).index_fill(1, chosen, False)
    return compacted(rest, n - len(chosen))[0][0]
