"""STTM: a quadtree of every frame, and trees linked over time; large even areas become one token, and so does what stays."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from vtc.core import Newlines, Positions, Reducer, Selection, Signals, Stage
from vtc.kernels import merge_scatter, widened
from vtc.registry import register
from vtc.video import ClipReducer, check_number, cosines, whole_frames

STEPS, STEP = 384, 1 / 128
"""Thresholds tried for a budget: both shifted by -2 and up, in steps."""


# ------------------------------------------------------------------------------------------------------------------ geometry
def sizes_of(rows: int, cols: int) -> tuple[tuple[int, int], ...]:
    """Return the grids of a pyramid, the coarsest first: both sides are halved, rounded up, until one of them is at most 2."""
    found = [(rows, cols)]
    while min(found[0]) > 2:
        found.insert(0, (-(-found[0][0] // 2), -(-found[0][1] // 2)))
    return tuple(found)


def parents_of(side: int) -> Tensor:
    """Return the cell of the next coarser side that each of ``side`` cells belongs to; of an odd side the first stays alone."""
    return (torch.arange(side) + side % 2) // 2


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a pyramid; level 0 is the coarsest. On the CPU.

    Attributes
    ----------
    parent : list of Tensor
        Per level but the coarsest, the coarser cell of each cell.
    cell : list of Tensor
        ``(side,)`` per level, the cell that holds each finest one.
    first, stop : list of Tensor
        Per level, the first finest cell of each cell, and the one behind its last.
    weight : list of Tensor
        ``(side,)`` float64 per level, the weight of each finest cell in a mean of means.
    """

    parent: list[Tensor]
    cell: list[Tensor]
    first: list[Tensor]
    stop: list[Tensor]
    weight: list[Tensor]

    @staticmethod
    def of(sides: tuple[int, ...]) -> Axis:
        """Build the axis with these numbers of cells, the coarsest first."""
        fine = torch.arange(sides[-1])
        cell, weight = [fine], [torch.ones(sides[-1], dtype=torch.float64)]
        parent = [parents_of(side) for side in sides[1:]]
        for up in reversed(parent):
            size = up.bincount().double()
            weight.insert(0, weight[0] / size[up[cell[0]]])
            cell.insert(0, up[cell[0]])
        count = [c.bincount(minlength=side) for c, side in zip(cell, sides, strict=True)]
        stop = [c.cumsum(0) for c in count]
        return Axis(parent, cell, [s - c for s, c in zip(stop, count, strict=True)], stop, weight)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def pyramid(rows: int, cols: int) -> tuple[tuple[tuple[int, int], ...], Axis, Axis]:
    """Return the grids of a pyramid, and its two axes."""
    sizes = sizes_of(rows, cols)
    return sizes, Axis.of(tuple(h for h, _ in sizes)), Axis.of(tuple(w for _, w in sizes))


# ---------------------------------------------------------------------------------------------------------------------- tree
def likeness(frame: Tensor, grid: tuple[int, int], *, weighted: bool, official: bool) -> list[Tensor]:
    """Return, per level but the finest, the smallest cosine of each cell with its children, ``(h * w,)`` float64.

    Parameters
    ----------
    frame : Tensor
        ``(n, D)`` tokens of one frame, in raster order.
    weighted : bool
        Cells are sums of their patches; otherwise means of their children.
    official : bool
        A cell with fewer than four children is compared with the first cell of its children's level, too.
    """
    sizes, down, across = pyramid(*grid)
    child, found = frame.double().view(*grid, -1), []
    for level in range(len(sizes) - 2, -1, -1):
        up, left = (
            down.parent[level].to(frame.device, non_blocking=True),
            across.parent[level].to(frame.device, non_blocking=True),
        )
        rows, cols = sizes[level]
        tall, broad = (torch.zeros(k, dtype=torch.float64, device=frame.device).index_add_(0, p, torch.ones_like(p).double())
                       for k, p in ((rows, up), (cols, left)))  # fmt: skip
        mean = child.new_zeros(rows, *child.shape[1:]).index_add_(0, up, child)
        mean = child.new_zeros(rows, cols, child.shape[2]).index_add_(1, left, mean)
        if not weighted:
            mean = mean / (tall[:, None] * broad)[..., None]
        cosine = cosines(mean[up][:, left], child).flatten()
        place = (up[:, None] * cols + left).flatten()
        least = cosine.new_full((rows * cols,), torch.inf).scatter_reduce(0, place, cosine, "amin")
        if official:
            stranger = cosines(mean, child[0, 0].expand_as(mean))
            least = torch.where((tall[:, None] * broad < 4).flatten(), torch.minimum(least, stranger.flatten()), least)
        found.insert(0, least)
        child = mean
    return found


@dataclass(frozen=True, eq=False)
class Forest:
    """The nodes of all frames' trees, by frame and then by their first patch in raster order. On the CPU.

    Attributes
    ----------
    owner : Tensor
        ``(T, n)`` node of every patch.
    first : Tensor
        ``(M,)`` first patch of every node, counted through all frames.
    weight : Tensor
        ``(T, n)`` float64 weight of every patch in its node's feature.
    size : Tensor
        ``(M,)`` patches of every node.
    boxes : Tensor
        ``(M, 5)`` frame, top, left, bottom, right; half open.
    """

    owner: Tensor
    first: Tensor
    weight: Tensor
    size: Tensor
    boxes: Tensor


def grow(least: list[Tensor], grid: tuple[int, int], frames: int, root: int, threshold: float, *, weighted: bool) -> Forest:
    """Stop at the coarsest cells, from level ``root`` on, whose children all resemble them.

    Parameters
    ----------
    least : list of Tensor
        ``(T, h * w)`` per level but the finest: :func:`likeness` of all frames, on the CPU.
    """
    sizes, down, across = pyramid(*grid)
    rows, cols = grid
    level = torch.full((frames, rows, cols), len(sizes) - 1)
    for at in range(len(sizes) - 2, min(root, len(sizes) - 1) - 1, -1):
        stop = (least[at] >= threshold).view(frames, *sizes[at])[:, down.cell[at]][:, :, across.cell[at]]
        level = torch.where(stop, at, level)
    r, c = torch.arange(rows)[:, None], torch.arange(cols)

    def pick(axis: list[Tensor], at: Tensor) -> Tensor:
        return torch.stack(axis)[level, at.expand_as(level)]

    def edge(ends: list[Tensor], cell: list[Tensor], at: Tensor) -> Tensor:
        return pick([e[i] for e, i in zip(ends, cell, strict=True)], at)

    top, left = edge(down.first, down.cell, r), edge(across.first, across.cell, c)
    frame = torch.arange(frames)[:, None, None]
    key = (frame * rows + top) * cols + left
    first, owner = torch.unique(key, return_inverse=True)
    size = torch.bincount(owner.flatten())
    bottom, right = edge(down.stop, down.cell, r), edge(across.stop, across.cell, c)
    boxes = torch.stack([frame.expand_as(top), top, left, bottom, right], -1).flatten(0, 2)[first]
    weight = pick(down.weight, r) * pick(across.weight, c)
    weight = 1 / size[owner].double() if weighted else weight
    return Forest(owner.flatten(1), first, weight.flatten(1), size, boxes)


# ---------------------------------------------------------------------------------------------------------------------- time
@dataclass(frozen=True, eq=False)
class Links:
    """Nodes of consecutive frames of which one contains the other.

    Attributes
    ----------
    pairs : Tensor
        ``(P, 2)`` the earlier and the later node, in order; on the CPU.
    cosine : Tensor
        ``(P,)`` float64 of their features, on the CPU.
    """

    pairs: Tensor
    cosine: Tensor


def node_features(features: Tensor, tokens: Tensor, forest: Forest, frame: int) -> tuple[int, Tensor]:
    """Return the number of the frame's first node, and the features ``(m, D)`` float64 of its nodes."""
    owner = forest.owner[frame]
    low, high = int(owner.min()), int(owner.max())
    x = features[tokens[frame]].double() * forest.weight[frame].to(features.device, non_blocking=True)[:, None]
    return low, x.new_zeros(high - low + 1, x.shape[1]).index_add_(0, (owner - low).to(x.device, non_blocking=True), x)


def link(features: Tensor, tokens: Tensor, forest: Forest) -> Links:
    """Find the pairs of nodes, and compare them."""
    total, pairs, cosine = len(forest.first), [], []
    low, before = node_features(features, tokens, forest, 0)
    for t in range(1, len(tokens)):
        both = torch.unique(forest.owner[t - 1] * total + forest.owner[t])  # boxes are nested or apart: a shared patch decides
        a, b = both // total, both % total
        start, now = node_features(features, tokens, forest, t)
        cosine.append(cosines(before[(a - low).to(before.device)], now[(b - start).to(now.device)]).cpu())
        pairs.append(torch.stack([a, b], 1))
        low, before = start, now
    if not pairs:
        return Links(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.float64))
    return Links(torch.cat(pairs), torch.cat(cosine))


def representatives(edges: Tensor, nodes: int, *, official: bool) -> Tensor:
    """Return the node ``(M,)`` that stands for each: the earliest it is linked to, directly or through others.

    Parameters
    ----------
    edges : Tensor
        ``(E, 2)``.
    official : bool
        Stop as the release does, once representatives stand for themselves, although edges may still disagree.
    """
    r = torch.arange(nodes)
    while len(edges):
        low = r[edges].amin(1)
        r = r.scatter_reduce(0, edges[:, 0], low, "amin").scatter_reduce(0, edges[:, 1], low, "amin")
        r = r[r]
        settled = torch.equal(r, r[r])
        if settled and (official or torch.equal(r[edges[:, 0]], r[edges[:, 1]])):
            break
    return r


@register(
    "sttm",
    paper="arXiv:2507.07990",
    code="https://github.com/HYUNJS/STTM @ 00736c7",
    licence="none found",
    presets={
        "llavavideo-half": {"keep": 1.0, "adaptive": True, "spatial": 0.85, "temporal": 0.55},
        "llavavideo-third": {"keep": 1.0, "adaptive": True, "spatial": 0.8, "temporal": 0.5},
        "qwen2vl-half": {"keep": 1.0, "adaptive": True, "spatial": 0.85, "temporal": 0.6},
        "qwen2vl-third": {"keep": 1.0, "adaptive": True, "spatial": 0.8, "temporal": 0.6},
    },
)
@dataclass(frozen=True, kw_only=True)
class Sttm(ClipReducer):
    """Turn every frame into a quadtree and link the trees over time; even areas and what stays the same become one token.

    **Space.** From a coarse grid down, a cell becomes one token if it resembles all its (up to four) children, cosine of at least
    ``spatial``; otherwise its children are looked at. A cell is the mean of its children. **Time.** Where one of two cells of
    neighbouring frames contains the other and their cosine is at least ``temporal``, they are linked, and all that are linked
    become one token: the mean of the cells, in the place of the earliest one's top left patch. The question plays no part, so a
    prompt's cache serves several. It acts on the states in front of decoder layer ``layer``.

    The release has no budget: its thresholds, tuned for every benchmark, decide. ``adaptive=True`` does so, with ``keep`` as the
    most; the presets are its settings for Video-MME at about a half and 30 % of the tokens. By default both thresholds are
    shifted together until the budget is just met. Where even the coarsest cells are too many, those with the fewest patches go.

    Deviates: the release also compares a border cell of fewer than four children with the first cell of the whole frame, and
    leaves some linked cells apart (``official=True`` does both; counts change). Where a side has no two halvings it fails; here
    trees then start at the coarsest level there is. It renumbers positions from ``layer`` on and leaves a gap before the first
    answer token; here later positions follow. Models with M-RoPE keep a token's time, row and column, as in the release. A
    picture counts as a clip of one frame.

    Parameters
    ----------
    keep : int or float
        Most visual tokens per clip entering decoder layer ``layer``.
    layer : int, default 2
        First decoder layer that runs on the shorter sequence; 0: before the language model.
    spatial : float, default 0.85
        Cosine from which on a cell stands for its children.
    temporal : float, default 0.55
        Cosine from which on cells of neighbouring frames are linked; 0 and below: trees are not linked.
    root : int, default 1
        Level of the pyramid the trees start from, counted from the coarsest.
    weighted : bool, default False
        Means weigh every patch alike, not every cell.
    adaptive : bool, default False
        The thresholds decide.
    official : bool, default False
        The release's comparisons and links.
    """

    stage: ClassVar[Stage] = Stage.DECODER
    default_positions: ClassVar[Positions] = "compact"
    default_newlines: ClassVar[Newlines] = "all"
    kind: ClassVar[str] = "merge"

    layer: int = 2  # type: ignore[assignment]
    spatial: float = 0.85
    temporal: float = 0.55
    root: int = 1
    weighted: bool = False
    adaptive: bool = False
    official: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        super().__post_init__()
        for name in ("spatial", "temporal"):
            check_number("sttm", name, getattr(self, name), -1, 1)
        for name in ("root", "layer"):
            check_number("sttm", name, getattr(self, name), 0, whole=True)

    def parts(self) -> tuple[Reducer, ...]:
        """Return the reducer itself, or the same in front of the language model."""
        if self.layer or self.stage is Stage.BOUNDARY:
            return (self,)
        return (SttmInput(**{f.name: getattr(self, f.name) for f in fields(self)}),)

    @property
    def decides_itself(self) -> bool:  # type: ignore[override]
        """Whether the thresholds decide."""
        return self.adaptive

    def measure(self, features: Tensor, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Return :func:`likeness` of all frames, ``(T, h * w)`` per level, on the CPU: the trees are built there."""
        found = [likeness(features[own], grid, weighted=self.weighted, official=self.official) for own in tokens]
        return [torch.stack(level).cpu() for level in zip(*found, strict=True)]

    def choose(self, signals: Signals) -> Selection:
        """Merge one clip."""
        tokens, grid = whole_frames(signals, "sttm")
        features, budget = signals.features[0], signals.budget
        with torch.no_grad():
            least = self.measure(features, tokens, grid)

            def build(root: int, shift: float) -> tuple[Forest, Tensor]:
                forest = grow(least, grid, len(tokens), root, self.spatial + shift, weighted=self.weighted)
                return forest, self.linked(features, tokens, forest, shift)

            def count(found: tuple[Forest, Tensor]) -> int:
                return len(torch.unique(found[1]))

            best = build(self.root, 0.0) if self.adaptive else None
            if best is None or count(best) > budget:
                best, low, high = None, 0, STEPS
                while low <= high:
                    middle = (low + high) // 2
                    found = build(self.root, middle * STEP - 2)
                    if count(found) <= budget:
                        best, low = found, middle + 1
                    else:
                        high = middle - 1
            if best is None:
                best = build(0, -2.0)
            return self.merged(signals, tokens, *best)

    def linked(self, features: Tensor, tokens: Tensor, forest: Forest, shift: float = 0.0) -> Tensor:
        """Return the node that stands for each, ``(M,)``."""
        nodes = len(forest.first)
        if self.temporal <= 0 or len(tokens) == 1:
            return torch.arange(nodes)
        links = link(features, tokens, forest)
        return representatives(links.pairs[links.cosine >= self.temporal + shift], nodes, official=self.official)

    def merged(self, signals: Signals, tokens: Tensor, forest: Forest, stands: Tensor) -> Selection:
        """Average what is linked, at most ``signals.budget`` tokens: those with the fewest patches go."""
        rep, group = torch.unique(stands, return_inverse=True)
        patches = torch.zeros_like(rep).index_add_(0, group, forest.size)
        kept = torch.sort(patches, descending=True, stable=True).indices[: signals.budget].sort().values
        rank = torch.full_like(rep, -1)
        rank[kept] = torch.arange(len(kept))
        nodes = torch.bincount(group)
        mine = group[forest.owner]
        if self.weighted:
            weight = 1 / patches[mine].double()
        else:
            weight = forest.weight / nodes[mine]
        device = tokens.device
        owner = torch.full((signals.shape[1],), -1, device=device)
        owner[tokens.flatten()] = rank[mine].flatten().to(device, non_blocking=True)
        share = torch.zeros(signals.shape[1], dtype=torch.float64, device=device)
        share[tokens.flatten()] = weight.flatten().to(device, non_blocking=True)
        wide = widened(signals.features)
        merged = merge_scatter(wide, owner[None], len(kept), weight=share[None].to(wide.dtype), mean=False)
        index = tokens.flatten()[forest.first[rep[kept]].to(device, non_blocking=True)]
        return Selection(index[None], merged.to(signals.features.dtype), owner[None])


@dataclass(frozen=True, kw_only=True)
class SttmInput(Sttm):
    """:class:`Sttm` in front of the language model."""

    name: ClassVar[str] = "sttm"
    stage: ClassVar[Stage] = Stage.BOUNDARY
