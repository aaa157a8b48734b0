"""Working view by view: an image cut into crops shares its budget among them, and every view is judged by itself.

Methods released for one picture per image treat each crop as a picture of its own. :func:`each_view` does that for any of them:
it hands the method one view of one image at a time and puts the answers together again. One image at a time also means that no
rounding depends on the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Newlines, Positions, Reducer, Scorer, Selection, Signals, Stage
from vtc.errors import UnknownArgumentError
from vtc.kernels import absorb_neighbours, apportion, topk_per_group

NO_CLS = "no class token in this tower: patches are scored by the attention they receive"
"""Note of a method that had to do without the class token."""


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
            marked = topk_per_group(part.score(signals), frame, quota)
            return Selection(marked.nonzero()[:, 1].view(signals.shape[0], -1))
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
    batch, n = signals.shape
    device = signals.features.device
    view, real = signals.of("view"), signals.of("slot") >= 0
    parts = [_one_image(signals, b, view[b], real[b], choose, floor, always, rows) for b in range(batch)]
    longest = max(len(p.index[0]) for p in parts)
    valid = None
    if any(len(p.index[0]) < longest for p in parts):
        count = torch.tensor([len(p.index[0]) for p in parts], device=device)
        valid = torch.arange(longest, device=device) < count[:, None]

    def pad(t: Tensor) -> Tensor:
        return t if t.shape[1] == longest else torch.cat([t, t.new_zeros(1, longest - t.shape[1], *t.shape[2:])], 1)

    features = owner = None
    if any(p.features is not None for p in parts):
        features = torch.cat([pad(_own(p, signals.features[b : b + 1])) for b, p in enumerate(parts)])
        owner = torch.cat([_owners(p, n) for p in parts])
    notes = list(dict.fromkeys(p.note for p in parts if p.note))
    return Selection(torch.cat([pad(p.index) for p in parts]), features, owner, valid, "; ".join(notes))


def _one_image(
    signals: Signals,
    image: int,
    view: Tensor,
    real: Tensor,
    choose: Callable[[Signals], Selection],
    floor: bool,
    always: bool,
    rows: frozenset[str],
) -> Selection:
    """Return the selection (batch 1) of one image."""
    views, n = signals.layout.views, signals.shape[1]
    if views == 1 and signals.budget < n and bool(((view == 0) & real).all()):  # one picture: nothing to share or put together
        part = choose(narrow(signals, image, view, signals.budget, 0, rows))
        if bool((part.index[0].diff() > 0).all()):
            return part
    members = [((view == v) & real).nonzero()[:, 0] for v in [*range(views), -1]]
    size = [len(m) for m in members]
    if floor and signals.budget >= views:
        quota = [min(s, signals.budget // views) for s in size[:-1]] + [0]
    else:
        quota = apportion(signals.budget, [1.0] * views + [0.0], size)
    index, features, owner, note, start = [], [], torch.full((1, n), -1, device=view.device), [], 0
    merged = False
    for v, (tokens, share) in enumerate(zip(members, quota, strict=True)):
        if share == 0:
            continue
        mine = narrow(signals, image, tokens, share, v, rows)
        whole = share == len(tokens) and not always
        part = Selection.all(len(tokens), 1, view.device) if whole else choose(mine)
        index.append(tokens[part.index])
        features.append((part, mine.features))
        own = _owners(part, len(tokens))
        owner[:, tokens] = torch.where(own >= 0, own + start, own)
        start += part.index.shape[1]
        merged = merged or part.features is not None
        note.append(part.note)
    order = torch.cat(index, 1).argsort(1)
    place = torch.empty_like(order).scatter(1, order, torch.arange(start, device=view.device)[None])
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
    size = torch.zeros(len(frame), views + 1, dtype=torch.long, device=frame.device).scatter_add(
        1, frame, torch.ones_like(frame)
    )
    quota = [apportion(signals.budget, [1.0] * views + [0.0], row) for row in size.tolist()]
    return frame, torch.tensor(quota, device=frame.device)


def in_first_slots(signals: Signals, chosen: Selection) -> Selection:
    """Move the merged tokens of each image into its first slots, view after view, in the order they are listed.

    For methods whose tokens are in no place of the picture: the language model then reads them in this order, while the slots of
    several crops alternate. A selection that merged nothing is returned as it is.
    """
    if chosen.features is None:
        return chosen
    slot = signals.layout.slot
    room = (slot >= 0).nonzero()[:, 0]
    room = room[slot[room].argsort()]  # entries of the view layout are not in slot order
    batch, most = chosen.index.shape
    count = [most] * batch if chosen.valid is None else chosen.valid.sum(1).tolist()
    index, features, owner = torch.zeros_like(chosen.index), [], []
    for b, k in enumerate(count):
        first = room[:k].to(chosen.index.device)
        turn = first.argsort()
        index[b, :k] = first[turn]
        features.append(torch.cat([chosen.features[b, turn], chosen.features[b, k:]]))
        place = torch.empty_like(turn).scatter(0, turn, torch.arange(k, device=turn.device))
        owner.append(torch.where(chosen.owner[b] >= 0, place[chosen.owner[b].clamp(min=0)], -1))
    return dataclasses.replace(chosen, index=index, features=torch.stack(features), owner=torch.stack(owner))


def narrow(signals: Signals, image: int, tokens: Tensor, budget: int, view: int, rows: frozenset[str] = frozenset()) -> Signals:
    """Return the signals of some ``tokens (n,)`` of one image (batch 1); taps named in ``rows`` belong to the whole image."""
    at = slice(image, image + 1)

    def of(t: Tensor) -> Tensor:
        return t[at] if len(tokens) == signals.shape[1] else t[at, tokens]  # all of them: nothing to copy

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
        attention, room = signals.wide_cls_attn[0], max(1, signals.budget - 1)
        if share is not None:
            room = min(room, int(len(attention) * share))
        elif self.adaptive:
            room = min(room, max(1, round(outliers(attention) * len(attention))))
        return torch.sort(attention, descending=True, stable=True).indices[:room]

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
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device)).tolist()
    return float((values > high + 1.5 * (high - low)).double().mean())


def complement(chosen: Tensor, n: int) -> Tensor:
    """Return the ascending positions below ``n`` that are not ``chosen``."""
    rest = torch.ones(n, dtype=torch.bool, device=chosen.device)
    rest[chosen] = False
    return rest.nonzero()[:, 0]
