"""Plain transcriptions of the published algorithms: the obvious loops and full matrices, to compare vtc's reducers with.

Each is one function of the same bound reducer (its options) and the same input as the product, for one image of one view, and
makes the same choice; ``tests/test_bench_reducers.py`` holds them to that. They are written for reading, not for use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from vtc.core import Selection, Signals


@dataclass(frozen=True)
class Plain:
    """One transcription.

    Attributes
    ----------
    run : callable
        ``run(part, given)`` returns what the product's part returns.
    matrices : float
        ``N x N`` float32 matrices it holds at once; decides where it does not fit.
    options : dict
        Options of the reducer the row is measured with.
    """

    run: Callable[[Any, Any], Any]
    matrices: float
    options: dict[str, Any] = field(default_factory=dict)


PLAIN: dict[tuple[str, str], Plain] = {}
"""By reducer and the options that differ from its defaults, as text."""


def plain(name: str, matrices: float = 0, **options: Any) -> Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]:
    """Register a transcription for a reducer with some options (none: its defaults)."""

    def add(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        PLAIN[name, " ".join(f"{k}={v}" for k, v in options.items())] = Plain(run, matrices, options)
        return run

    return add


def _best(score: Tensor, k: int) -> Selection:
    """The ``k`` highest of ``score (n,)``, the first among equals, in sequence order."""
    return Selection(score.sort(descending=True, stable=True).indices[:k].sort().values[None])


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _relevance(s: Signals) -> Tensor:
    """Mean cosine of every token with the prompt's text tokens, scaled to 0..1."""
    raw = (_unit(s.features[0]) @ _unit(s.text[0][s.text_mask[0]]).T).mean(1)
    return (raw - raw.min() + 1e-6) / (raw.max() - raw.min())


# ------------------------------------------------------------------------------------------------ one score, the best stay
@plain("fastv")
def fastv(part: Any, s: Signals) -> Selection:
    """Rank by the last token's attention."""
    return _best(s.last_attn[0], s.budget)


@plain("pyramiddrop")
def pyramiddrop(part: Any, s: Signals) -> Selection:
    """Rank by the last token's attention in the next layer."""
    return _best(s.next_last_attn[0], s.budget)


@plain("fastervlm")
def fastervlm(part: Any, s: Signals) -> Selection:
    """Rank by CLS attention."""
    return _best(s.cls_attn[0], s.budget)


@plain("globalcom2")
def globalcom2(part: Any, s: Signals) -> Selection:
    """Rank by CLS logits (one view)."""
    return _best(s.cls_logits[0], s.budget)


@plain("transprune")
def transprune(part: Any, s: Signals) -> Selection:
    """Rank by transitions and attention, each with sum one."""
    total = 0
    for name, value in s.taps.items():
        if name != "next_question_attn":
            total = total + value[0]
    asked = s.next_question_attn[0]
    return _best(total / total.sum() + asked / asked.sum(), s.budget)


@plain("ptp")
def ptp(part: Any, s: Signals) -> Selection:
    """Rank by salience and instruction, each scaled to 0..1 (one view)."""

    def scaled(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())

    return _best((1 - part.alpha) * scaled(s.cls_attn[0]) + part.alpha * scaled(s.peak_text_attn[0]), s.budget)


@plain("random")
def random(part: Any, s: Signals) -> Selection:
    """Rank by a number drawn for every token."""
    generator = torch.Generator().manual_seed((part.seed * 1_000_003 + s.fingerprint[0]) & 0x7FFFFFFFFFFFFFFF)
    return _best(torch.rand(s.shape[1], generator=generator), s.budget)


@plain("uniform")
def uniform(part: Any, s: Signals) -> Selection:
    """Take the middle of every stretch."""
    return Selection(((2 * torch.arange(s.budget) + 1) * s.shape[1] // (2 * s.budget))[None])


@plain("evs")
def evs(part: Any, s: Signals) -> Selection:
    """Spread evenly, for want of an earlier frame."""
    return uniform(part, s)


@plain("frames")
def frames(part: Any, s: Signals) -> Selection:
    """Thin the one frame evenly."""
    return uniform(part, s)


@plain("dycoke")
def dycoke(part: Any, s: Signals) -> Selection:
    """Thin the one frame evenly."""
    return uniform(part, s)


@plain("temporalpool")
def temporalpool(part: Any, s: Signals) -> Selection:
    """Thin the one frame evenly."""
    return uniform(part, s)


@plain("holitom", matrices=1)
def holitom(part: Any, s: Signals) -> Selection:
    """Keep what receives most attention; inside, halve the rest into the most similar ones, one by one."""
    x = s.features[0]
    if hasattr(part, "tau"):
        index = _best(s.received_attn[0], s.budget).index
        return Selection(index, x[index])
    index = _best(s.last_attn[0], round(len(x) * (1 - part.share))).index
    unit, out = _unit(x), x.clone()
    for i in range(len(x)):
        if i not in index:
            to = index[0, (unit[index[0]] @ unit[i]).argmax()]
            out[to] = (out[to] + out[i]) / 2
    return Selection(index, out[index])


@plain("fastvid", matrices=4)
def fastvid(part: Any, s: Signals) -> Selection:
    """Keep the salient tokens of the one frame; merge the rest, and the peaks themselves, into density peaks."""
    x = s.features[0]
    key, query = s.probe_keys[0].double().unbind(1)
    salient = _best(torch.softmax((key * query).sum(-1), 0).mean(1), s.budget - int(s.budget * part.context)).index[0]
    rest = torch.tensor([i for i in range(len(x)) if i not in salient])
    apart = torch.cdist(x[rest].double(), x[rest].double()) / x.shape[1] ** 0.5
    density = torch.exp(-apart.sort(1).values[:, :4].square().mean(1))
    peak = torch.where(density[None] > density[:, None], apart, apart.max()).amin(1)
    peaks = rest[_best(density * peak, s.budget - len(salient)).index[0]]
    to, out = (_unit(x[rest]) @ _unit(x[peaks]).T).argmax(1), x.clone()
    for i, p in enumerate(peaks):
        own = x[rest[to == i]]
        weight = max(1 / (len(own) + 1), part.beta)
        out[p] = weight * x[p] + (1 - weight) * own.mean(0)
    index = torch.cat([salient, peaks]).sort().values[None]
    return Selection(index, out[index])


@plain("framefusion")
def framefusion(part: Any, s: Signals) -> Selection:
    """Merge nothing of one frame; prune once by the last token's attention."""
    if part.number != 1:
        return Selection(torch.arange(s.shape[1])[None])
    return _best(s.tail_attn[0], part.budget.tokens(s.slots))


@plain("sttm")
def sttm(part: Any, s: Signals) -> Selection:
    """Grow the quadtree of the one frame top-down, with the highest threshold that leaves few enough leaves."""
    rows, cols = s.layout.grids[0]
    grids = [s.features[0].double().view(rows, cols, -1)]
    spans = [([(i, i + 1) for i in range(rows)], [(i, i + 1) for i in range(cols)])]
    children = []

    def pairs(n: int) -> list[list[int]]:
        return [[i, i + 1] for i in range(0, n, 2)] if n % 2 == 0 else [[0], *([i, i + 1] for i in range(1, n, 2))]

    while min(grids[0].shape[:2]) > 2:
        fine = grids[0]
        down, across = pairs(fine.shape[0]), pairs(fine.shape[1])
        grids.insert(0, torch.stack([torch.stack([fine[y][:, x].mean((0, 1)) for x in across]) for y in down]))
        children.insert(0, (down, across))
        spans.insert(0, tuple([(own[k[0]][0], own[k[-1]][1]) for k in ks] for own, ks in zip(spans[0], (down, across))))  # noqa: B905

    def leaves(level: int, i: int, j: int, bound: float) -> list[tuple[int, int, int]]:
        if level == len(grids) - 1:
            return [(level, i, j)]
        below = [(y, x) for y in children[level][0][i] for x in children[level][1][j]]
        cosine = [torch.cosine_similarity(grids[level][i, j], grids[level + 1][y, x], dim=0) for y, x in below]
        if min(cosine) >= bound:
            return [(level, i, j)]
        return [leaf for y, x in below for leaf in leaves(level + 1, y, x, bound)]

    root = min(part.root, len(grids) - 1)
    for step in range(384, -1, -1):
        bound = part.spatial + step / 128 - 2
        found = [n for i in range(len(spans[root][0])) for j in range(len(spans[root][1])) for n in leaves(root, i, j, bound)]
        if len(found) <= s.budget:
            break
    index = torch.tensor([spans[level][0][i][0] * cols + spans[level][1][j][0] for level, i, j in found])
    order = index.argsort()
    values = torch.stack([grids[level][i, j] for level, i, j in found])[order]
    return Selection(index[order][None], values[None].to(s.features.dtype))


@plain("vidcom2")
def vidcom2(part: Any, s: Signals) -> Selection:
    """Keep what is least like the mean of the one frame, which is the clip's, too."""
    x = s.features[0].double()
    x = normalize(x[:, x.var(0).argsort()[: x.shape[1] // 2]], dim=1)
    square = (x - x.mean(0)).square().sum(1)
    return _best(-2 * sum(torch.exp(-square / (2 * w)) for w in (0.125, 0.25, 0.5, 1, 2)), s.budget)


@plain("skipspan")
def skipspan(part: Any, state: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Rank by CLS attention, once."""
    alive = torch.zeros(state.valid.shape, dtype=torch.bool)
    alive[0, state.taps["cls_attn"][0].sort(descending=True, stable=True).indices[: int(state.target)]] = True
    return {}, alive


@plain("corematching")
def corematching(part: Any, s: Signals) -> Selection:
    """Keep what lies above the knee of the sorted overlaps."""
    overlap = s.overlap[0]
    curve, order = overlap.sort(descending=True, stable=True)
    n = len(curve)
    rise = curve[-1] - curve[0]
    distance = (rise * torch.arange(n) - (n - 1) * (curve - curve[0])).abs() / ((n - 1) ** 2 + rise**2).sqrt()
    above = curve[distance.argmax()]
    return Selection(order[: s.budget][curve[: s.budget] > above].sort().values[None])


@plain("docprune")
def docprune(part: Any, s: Signals) -> Selection:
    """Keep the blocks that show text."""
    own, near = s.text_blocks[0].unbind(1)
    hit = (near > part.threshold).nonzero()[:, 0]
    return Selection(hit[own[hit].sort(descending=True, stable=True).indices[: s.budget]].sort().values[None])


@plain("flowcut")
def flowcut(part: Any, state: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """Average the scores over the layers, and drop after every second one."""
    attention, affinity = state.taps["cls_attn"][0], state.taps["cls_value_affinity"][0]
    score = (attention / attention.sum() + affinity / affinity.sum()) * state.taps["values"][0].abs().sum(1)
    n, target, left = len(score), int(state.target), part.last_layer - state.layer
    if n <= target:
        return dict(state.carry), None
    cum = 0.5 * state.carry["cum"][0] + 0.5 * score if "cum" in state.carry else score
    if left % 2:
        return {"cum": cum[None]}, None
    if left > 0:
        p = attention / attention.sum()
        entropy = -(p * p.log()).sum() / torch.log(torch.tensor(float(n)))
        target = max(target, n - int(torch.round((n - target) / left**0.5 * (1 - entropy**2))))
    alive = torch.zeros(n, dtype=torch.bool)
    alive[cum.sort(descending=True, stable=True).indices[:target]] = True
    return {"cum": cum[None]}, alive[None]


# ------------------------------------------------------------------------------------------------------ spread-out subsets
@plain("divprune", matrices=2)
def divprune(part: Any, s: Signals) -> Selection:
    """Full distance matrix; every step looks at the distances to all chosen tokens."""
    unit = _unit(s.features[0])
    distance = 1 - unit @ unit.T
    picks = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    for _ in range(s.budget - 1):
        picks.append(int(distance[picks].min(0).values.argmax()))
    return Selection(torch.tensor([sorted(picks)]))


def _exit(s: Signals, tau: float) -> Selection:
    """All tokens stay, or none."""
    stay = not bool((s.modality_mass[0] < tau).all())
    return Selection(torch.arange(s.shape[1])[None], valid=torch.full((1, s.shape[1]), stay))


@plain("todre", matrices=1)
def todre(part: Any, s: Signals) -> Selection:
    """Full similarity matrix; smallest sum of similarities to the chosen tokens."""
    if "modality_mass" in s.taps:
        return _exit(s, part.tau)
    unit = _unit(s.features[0])
    cosine = unit @ unit.T
    picks = [int(s.cls_attn[0].argmax())]
    for _ in range(s.budget - 1):
        total = cosine[picks].sum(0)
        total[picks] = torch.inf
        picks.append(int(total.argmin()))
    return Selection(torch.tensor([sorted(picks)]))


@plain("todre", matrices=1, diversity="kcenter")
def todre_kcenter(part: Any, s: Signals) -> Selection:
    """Full distance matrix; farthest from the nearest chosen token."""
    if "modality_mass" in s.taps:
        return _exit(s, part.tau)
    unit = _unit(s.features[0])
    distance = 1 - unit @ unit.T
    picks = [int(s.cls_attn[0].argmax())]
    for _ in range(s.budget - 1):
        near = distance[picks].min(0).values
        near[picks] = -torch.inf
        picks.append(int(near.argmax()))
    return Selection(torch.tensor([sorted(picks)]))


@plain("zooprune", matrices=1)
def zooprune(part: Any, s: Signals) -> Selection:
    """Full distance matrix; sensitivity times distance to the nearest chosen token."""
    score = s.sensitivity[0]
    weight = (score - score.min()) / (score.max() - score.min() + 1e-8)
    unit = _unit(s.features[0])
    distance = 1 - unit @ unit.T
    picks = [int(weight.argmax())]
    for _ in range(s.budget - 1):
        gain = weight * distance[picks].min(0).values
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
    return Selection(torch.tensor([sorted(picks)]))


def _dpp(kernel: Tensor, k: int) -> list[int]:
    """Greedy MAP on a full kernel."""
    gain, rows, picks = kernel.diagonal().clone(), torch.zeros(k, len(kernel)), []
    for t in range(k):
        pick = int(gain.argmax())
        row = (kernel[pick] - rows[:t, pick] @ rows[:t]) / gain[pick].sqrt()
        rows[t] = row
        gain = gain - row.square()
        gain[pick] = -torch.inf
        picks.append(pick)
    return picks


@plain("cdpruner", matrices=2)
def cdpruner(part: Any, s: Signals) -> Selection:
    """Full kernel of similarities scaled by relevance."""
    unit, relevance = _unit(s.features[0]), _relevance(s)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    return Selection(torch.tensor([sorted(_dpp(kernel, s.budget))]))


def _script_kernel(s: Signals) -> tuple[Tensor, Tensor]:
    unit = _unit(s.features[0])
    raw = (unit @ _unit(s.text[0][s.text_mask[0]]).T).mean(1)
    relevance = (raw - raw.min()) / (raw.max() - raw.min())
    return unit @ unit.T, relevance


@plain("script", matrices=2)
def script(part: Any, s: Signals) -> Selection:
    """Full kernel of similarities scaled by relevance."""
    cosine, relevance = _script_kernel(s)
    return Selection(torch.tensor([sorted(_dpp(relevance[:, None] * cosine * relevance, s.budget))]))


@plain("script", matrices=3, rule="joint")
def script_joint(part: Any, s: Signals) -> Selection:
    """The process's picks that a full similarity graph does not call redundant."""
    cosine, relevance = _script_kernel(s)
    wide = min(s.shape[1], 2 * s.budget)
    picks = torch.tensor(_dpp(relevance[:, None] * cosine * relevance, wide))
    graph = cosine >= part.threshold
    count = graph.sum(1)
    closeness = (cosine * graph).sum(1) / count.clamp(min=1)
    inner = count * (part.gamma * (closeness - part.threshold)).exp()
    redundancy = torch.where(count >= part.hub, inner, (inner + cosine.mean(1)) / 2)
    agreed = torch.isin(picks, redundancy.sort(stable=True).indices[:wide])
    both = picks[agreed][relevance[picks[agreed]].sort(descending=True, stable=True).indices]
    return Selection(torch.cat([both, picks[~agreed]])[: s.budget].sort().values[None])


@plain("dart")
def dart(part: Any, s: Signals) -> Selection:
    """Pivot by pivot, the least similar of those left."""
    tokens, places = s.final_states[0], s.places[0]
    best = s.key_norm[0].topk(part.image_pivots).indices
    pivots = [tokens[i] for i in sorted(best.tolist(), key=lambda i: int(places[i]))]
    text = [(int(p), x) for p, x in zip(s.text_places[0], s.text_pivots[0], strict=True) if int(p) >= 0]
    pivots += [x for _, x in sorted(text, key=lambda pair: pair[0])]
    kept = torch.zeros(len(tokens), dtype=torch.bool)
    kept[best] = True
    rest = s.budget - len(best)
    for turn, pivot in enumerate(pivots):
        left = (~kept).nonzero()[:, 0]
        cosine = normalize(tokens[left], dim=1) @ normalize(pivot, dim=0)
        kept[left[cosine.topk(rest // len(pivots) + (turn < rest % len(pivots)), largest=False).indices]] = True
    return Selection(kept.nonzero()[:, 0][None])


@plain("vispruner", matrices=0.75)
def vispruner(part: Any, s: Signals) -> Selection:
    """Rounds of even against odd places, each with its full similarity matrix."""
    count = int(s.budget * part.important)
    order = s.cls_attn[0].sort(descending=True, stable=True).indices
    important, rest = order[:count], order[count:]
    unit = _unit(s.features[0])
    while len(rest) > s.budget - count:
        even, odd = rest[0::2], rest[1::2]
        best = (unit[even] @ unit[odd].T).max(1).values
        gone = min(8, len(rest) - (s.budget - count))
        rest = torch.cat([even[best.sort(descending=True, stable=True).indices[gone:]], odd])
    return Selection(torch.cat([important, rest]).sort().values[None])


@plain("holov", matrices=0.1)
def holov(part: Any, s: Signals) -> Selection:
    """Score crop by crop with its full matrix, then hand out: shares, what is left, what does not fit."""
    n, score, bands = s.shape[1], [], []
    for crop in range(min(n, part.crops)):
        size = n // part.crops + (crop < n % part.crops)
        at = torch.arange(size) + (bands[-1][-1] + 1 if bands else 0)
        unit, attention = _unit(s.features[0][at]), 1000 * s.cls_attn[0][at].double()
        alike = (unit @ unit.T).double() * (1 - torch.eye(size))
        if size > 1:
            mean = alike.sum(1, keepdim=True) / (size - 1)
            variance = (alike - mean).square().sum(1) / (size - 1)
            attention = attention + part.beta * attention.mean() / (variance.mean() + 1e-6) * variance
        score.append(float(attention.mean()))
        bands.append(at)
    order = sorted(range(len(bands)), key=lambda c: -score[c])
    budget = [int(x / (sum(score) + 1e-6) * s.budget) for x in score]
    for crop in order[: s.budget - sum(budget)]:
        budget[crop] += 1
    budget = [min(k, len(at)) for k, at in zip(budget, bands, strict=True)]
    while sum(budget) < s.budget:
        for crop in order:
            budget[crop] += sum(budget) < s.budget and budget[crop] < len(bands[crop])
    kept = [at[_best(s.cls_attn[0][at], k).index[0]] for at, k in zip(bands, budget, strict=True)]
    return Selection(torch.cat(kept)[None])


@plain("vscan", matrices=0.5)
def vscan(part: Any, s: Signals) -> Selection:
    """The best of every window, the best of the others, and each patch left out into its most similar one; later the best."""
    if "next_last_attn" in s.taps:
        return _best(s.next_last_attn[0], s.budget)
    (rows, cols), side = s.layout.grids[0], part.window
    down, across = max(1, rows // side), max(1, cols // side)
    windows: dict[tuple[int, int], list[int]] = {}
    for token in range(rows * cols):
        place = min(token // cols // side, down - 1), min(token % cols // side, across - 1)
        windows.setdefault(place, []).append(token)
    each = int(s.budget * part.local_share) // (down * across)
    kept: set[int] = set()
    for tokens in windows.values():
        kept |= set(sorted(tokens, key=lambda t: -float(s.low_attn[0, t]))[:each])
    rest = sorted(set(range(rows * cols)) - kept, key=lambda t: -float(s.high_attn[0, t]))
    index = torch.tensor(sorted(kept | set(rest[: s.budget - len(kept)])))
    x = s.features[0]
    owner = (_unit(x) @ _unit(x[index]).T).argmax(1)
    owner[index] = torch.arange(len(index))
    return Selection(index[None], _grouped(x, owner, len(index))[None])


@plain("pact", matrices=2)
def pact(part: Any, s: Signals) -> Selection:
    """Full matrix of distances; survivors one by one, densest first; a larger cutoff where too many would be centres."""
    x, key, n = s.features[0], _unit(s.all_keys[0]), s.shape[1]
    alive = _best(s.importance[0] * x.norm(dim=1), max(1, int(part.share * n))).index[0]
    distance = (1 - key[alive] @ key[alive].T).clamp(min=0).fill_diagonal_(0)
    order = (-(distance.double() / 2).square()).exp().sum(1).sort(descending=True, stable=True).indices.tolist()

    def centres(cutoff: float) -> list[int]:
        found: list[int] = []
        for token in order:
            if all(float(distance[token, c]) > cutoff for c in found):
                found.append(token)
        return sorted(found)

    low, cutoff = part.cutoff, part.cutoff
    if len(centres(cutoff)) > s.budget:
        cutoff = 2.0
        for _ in range(24):
            middle = (low + cutoff) / 2
            low, cutoff = (low, middle) if len(centres(middle)) <= s.budget else (middle, cutoff)
    found = alive[centres(cutoff)]
    far, owner = (1 - key @ key[found].T).min(1)
    lost = far > part.coefficient * cutoff
    lost[alive] = False
    owner[found] = torch.arange(len(found))
    return Selection(found[None], _grouped(x, owner.masked_fill(lost, -1), len(found))[None])


@plain("ivcprune", matrices=0.1)
def ivcprune(part: Any, s: Signals) -> Selection:
    """Union of tokens chosen by position, by the text's values, and by those of the seeds as well."""
    n, own, words, at = s.shape[1], s.image_values[0], s.word_values[0], s.text_places[0]
    scale = s.budget / n / 0.31
    seeds, coordinates, foreground = max(1, round(scale * 0.01 * n)), round(scale * 0.05 * n), round(scale * 0.2 * n)
    behind = at > s.places[0].max()
    asked = at > s.places[0].max() + 2
    asked = asked if asked.any() else behind if behind.any() else at == at.max()

    def rows(query: Tensor) -> Tensor:
        logits = torch.einsum("rhd,nhd->hrn", query, torch.cat([own, words])) * own.shape[2] ** -0.5
        return torch.softmax(logits, 2).mean(0)[:, :n]

    def best(score: Tensor, count: int) -> set[int]:
        return set(score.sort(descending=True, stable=True).indices[:count].tolist())

    text = rows(words[asked])
    seed = sorted(best(text.mean(0), seeds))
    score = torch.cat([text, rows(own[seed])]).mean(0)
    prior = best(s.cos_mean[0], coordinates) | best(s.sin_mean[0], coordinates) | set(seed)
    ranked = score.sort(descending=True, stable=True).indices.tolist()
    prior = set([i for i in ranked if i in prior][: s.budget])
    more = [i for i in ranked[:foreground] if i not in prior]
    return Selection(torch.tensor([sorted(prior | set(more[: s.budget - len(prior)]))]))


@plain("scope", matrices=2)
def scope(part: Any, s: Signals) -> Selection:
    """Full matrix of cosines; every step sums up what each patch would add to the coverage."""
    unit = _unit(s.features[0])
    cosine, covered, picks = unit @ unit.T, torch.zeros(s.shape[1]), []
    for _ in range(s.budget):
        gain = (cosine - covered).clamp(min=0).sum(1) * s.cls_attn[0]
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
        covered = torch.maximum(covered, cosine[picks[-1]])
    return Selection(torch.tensor([sorted(picks)]))


@plain("hiprune")
def hiprune(part: Any, s: Signals) -> Selection:
    """Anchors, their neighbours one by one, then registers."""
    (rows, cols), k = s.layout.grids[0], s.budget
    ranked = s.object_attn[0].sort(descending=True, stable=True).indices.tolist()
    anchors = ranked[: round(k * part.alpha / 5)]
    chosen = set(anchors)
    around = set()
    for a in anchors:
        for y, x in (
            (a // cols, a % cols - 1),
            (a // cols, a % cols + 1),
            (a // cols - 1, a % cols),
            (a // cols + 1, a % cols),
        ):
            if 0 <= y < rows and 0 <= x < cols:
                around.add(y * cols + x)
    chosen |= set([i for i in ranked if i in around - chosen][: k - len(anchors)])
    deep = s.deep_attn[0].clone()
    deep[list(chosen)] = -torch.inf
    chosen |= set(deep.topk(k - len(chosen)).indices.tolist())
    return Selection(torch.tensor([sorted(chosen)]))


@plain("tokencorr", matrices=2)
def tokencorr(part: Any, s: Signals) -> Selection:
    """Outliers of the late attention; of the early one as many patches as the full matrix of key cosines finds different."""
    low, high = s.low_attn[0], s.high_attn[0]
    key = _unit(s.all_keys[0])
    alike = (key @ key.T > part.alpha).sum(1) - 1
    different = max(1, int((alike < part.beta * len(low)).sum()))
    first, third = torch.quantile(high.double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    out = (high.double() > third + part.factor * (third - first)).nonzero()[:, 0]
    out = out[high[out].sort(descending=True, stable=True).indices].tolist()
    ranked = out + [i for i in low.topk(different).indices.tolist() if i not in set(out)]
    return Selection(torch.tensor([sorted(ranked[: s.budget])]))


# ------------------------------------------------------------------------------------------------------------- merging
def _grouped(features: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Mean of every group, one by one."""
    return torch.stack([features[owner == g].mean(0) for g in range(groups)])


@plain("aim", matrices=0.25)
def aim(part: Any, s: Signals) -> Selection:
    """Rounds of even against odd places with their full similarity matrix; inside, the best by importance."""
    if "importance" in s.taps:
        return _best(s.importance[0], s.budget)
    metric, tokens, slot = s.all_keys[0], s.features[0], torch.arange(s.shape[1])
    while len(metric) > s.budget:
        unit = _unit(metric)
        best, target = (unit[::2] @ unit[1::2].T).max(1)
        gone = best.sort(descending=True, stable=True).indices[: min(len(metric) - s.budget, len(metric) // 2)]
        into = 2 * target[gone] + 1
        count = torch.ones(len(metric)).index_add(0, into, torch.ones(len(gone)))[:, None]
        stay = torch.ones(len(metric), dtype=torch.bool)
        stay[2 * gone] = False
        metric = (metric.index_add(0, into, metric[2 * gone]) / count)[stay]
        tokens = (tokens.index_add(0, into, tokens[2 * gone]) / count)[stay]
        slot = slot[stay]
    return Selection(slot[None], tokens[None])


@plain("tome", matrices=0.25)
def tome(part: Any, state: Any) -> tuple[Tensor, Tensor] | None:
    """Match every other patch with the ones between, on their full similarity matrix."""
    key, n, target, left = _unit(state.taps["keys"][0]), state.valid.shape[1], int(state.target), part._layers - state.layer
    count = max(0, min(n // 2, max(-(-(n - target) // left), n - target * 2 ** (left - 1))))
    if not count:
        return None
    best, partner = (key[1::2] @ key[0::2].T).max(1)
    gone = best.sort(descending=True, stable=True).indices[:count]
    stays = torch.ones(n // 2, dtype=torch.bool)
    stays[gone] = False
    owner, unmerged = torch.zeros(n, dtype=torch.long), n // 2 - count
    owner[0::2] = unmerged + torch.arange((n + 1) // 2)
    owner[1::2] = torch.where(stays, stays.cumsum(0) - 1, unmerged + partner)
    return owner[None], torch.tensor([n - count])


@plain("visionzip", matrices=0.25)
def visionzip(part: Any, s: Signals) -> Selection:
    """Dominant patches, and the others merged into evenly spaced ones; features in the order of the release."""
    contextual = min(round(s.budget * 10 / 64), s.budget - 1)
    dominant = s.budget - contextual - 1
    kept = s.cls_attn[0].topk(dominant).indices.sort().values
    rest = torch.ones(s.shape[1], dtype=torch.bool)
    rest[kept] = False
    x, key = s.features[0][rest], normalize(s.keys[0][rest], dim=1)
    target = torch.arange(contextual) * max(1, len(x) // contextual)
    other = torch.ones(len(x), dtype=torch.bool)
    other[target] = False
    joined = torch.nn.functional.one_hot((key[other] @ key[target].T).argmax(1), contextual).to(x.dtype)
    merged = x[target] + joined.T @ x[other] / joined.sum(0).clamp(min=1)[:, None]
    tokens = torch.cat([s.cls[0], s.features[0][kept], merged])
    return Selection(torch.arange(s.budget)[None], tokens[None])


def _absorbed(s: Signals, chosen: Tensor) -> Selection:
    """Every kept patch plus its 32 weighted neighbours; the weighted sum of the others."""
    x, attention = s.features[0], s.wide_cls_attn[0]
    key = normalize(s.wide_keys[0], dim=1)
    cosine = key @ key.T
    tokens = []
    for i in chosen.tolist():
        row = cosine[i].clone()
        row[i] = -torch.inf
        near = row.topk(min(32, len(x) - 1)).indices
        tokens.append(x[i] + attention[near] @ x[near])
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[chosen] = False
    tokens.append(attention[rest] @ x[rest])
    return Selection(torch.arange(len(tokens))[None], torch.stack(tokens)[None])


@plain("prumerge", matrices=1)
def prumerge(part: Any, s: Signals) -> Selection:
    """Full matrix of key cosines."""
    return _absorbed(s, s.wide_cls_attn[0].topk(s.budget - 1).indices)


@plain("prumerge_plus", matrices=1)
def prumerge_plus(part: Any, s: Signals) -> Selection:
    """The same with as many evenly spaced patches."""
    room = s.budget - 1
    top = s.wide_cls_attn[0].topk((room + 1) // 2).indices
    left = torch.ones(s.shape[1], dtype=torch.bool)
    left[top] = False
    left = left.nonzero()[:, 0]
    count = room - len(top)
    spaced = left[(2 * torch.arange(count) + 1) * len(left) // (2 * count)]
    return _absorbed(s, torch.cat([top, spaced]))


@plain("hierpool", matrices=6)
def hierpool(part: Any, s: Signals) -> Selection:
    """SciPy's Ward linkage of the rows of the full similarity matrix, as released."""
    from scipy.cluster.hierarchy import fcluster, linkage

    x = s.features[0]
    unit = _unit(x).double()
    label = torch.from_numpy(fcluster(linkage((1 - unit @ unit.T).numpy(), "ward"), s.budget, "maxclust")).long() - 1
    return _by_first(x, label, s.budget)


def _by_first(x: Tensor, label: Tensor, groups: int) -> Selection:
    first = torch.tensor([int((label == g).nonzero()[0]) for g in range(groups)])
    order = first.argsort()
    return Selection(first[order][None], _grouped(x, label, groups)[order][None])


@plain("tokenpooling", matrices=2)
def tokenpooling(part: Any, s: Signals) -> Selection:
    """Weighted k-medoids on the full distance matrix."""
    weight = s.received_attn[0]
    distance = torch.cdist(s.features[0], s.features[0], compute_mode="donot_use_mm_for_euclid_dist")
    medoids = weight.sort(descending=True, stable=True).indices[: s.budget]
    for _ in range(part.iterations):
        owner = distance[:, medoids].argmin(1)
        owner[medoids] = torch.arange(s.budget)
        moved = []
        for g in range(s.budget):
            members = (owner == g).nonzero()[:, 0]
            moved.append(members[(distance[members][:, members] @ weight[members]).argmin()])
        moved = torch.stack(moved)
        if torch.equal(moved, medoids):
            break
        medoids = moved
    return Selection(medoids.sort().values[None])


@plain("tokenpooling", method="kmeans")
def tokenpooling_kmeans(part: Any, s: Signals) -> Selection:
    """Lloyd's algorithm, cluster by cluster."""
    x, weight = s.features[0], s.received_attn[0]
    centres, before = x[weight.sort(descending=True, stable=True).indices[: s.budget]], None
    for _ in range(part.iterations):
        owner = torch.cdist(x, centres).argmin(1)
        if before is not None and torch.equal(owner, before):
            break
        before = owner
        for g in range(s.budget):
            mine = owner == g
            if bool(mine.any()):
                centres[g] = (weight[mine, None] * x[mine]).sum(0) / weight[mine].sum()
    seat = []
    for g in range(s.budget):
        members = (before == g).nonzero()[:, 0]
        seat.append(members[(x[members] - centres[g]).square().sum(1).argmin()])
    seat = torch.stack(seat)
    order = seat.argsort()
    return Selection(seat[order][None], centres[order][None])


@plain("sparsevlm", matrices=0.3)
def sparsevlm(part: Any, s: Signals) -> Selection:
    """The best stay; a part of the others is clustered on its full distance matrix."""
    n, total = s.shape[1], s.budget
    kept, merged = next((k, m) for k in range(total, -1, -1) if k + (m := int((int((n - k) * 0.3) + 1) / 10) + 1) <= total)
    order = s.rater_attention[0].sort(descending=True, stable=True).indices
    stay, again = order[:kept].sort().values, order[kept : kept + max(merged, int((n - kept) * 0.3) + 1)]
    x = s.features[0][again]
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = torch.exp(-(distance.topk(min(merged, len(x)), largest=False).values ** 2).mean(1))
    gap = torch.where(density[None] > density[:, None], distance, distance.max()).min(1).values
    centres = (density * gap).sort(descending=True, stable=True).indices[:merged]
    owner = distance[:, centres].argmin(1)
    owner[centres] = torch.arange(merged)
    tokens = torch.cat([s.features[0][stay], _grouped(x, owner, merged)])
    return Selection(torch.cat([stay, again[centres]]).sort().values[None], tokens[None])


@plain("flexpool")
def flexpool(part: Any, s: Signals) -> Selection:
    """Adaptive average pooling of the grid."""
    rows, cols = s.layout.grids[0]
    high = max(1, min(rows, s.budget, round((s.budget * rows / cols) ** 0.5)))
    wide = max(1, min(cols, s.budget // high))
    pooled = adaptive_avg_pool2d(s.features[0].view(rows, cols, -1).permute(2, 0, 1), (high, wide)).flatten(1).T
    y, x = (2 * torch.arange(high) + 1) * rows // (2 * high), (2 * torch.arange(wide) + 1) * cols // (2 * wide)
    return Selection((y[:, None] * cols + x).flatten()[None], pooled[None])


@plain("gridpool")
def gridpool(part: Any, s: Signals) -> Selection:
    """Cell by cell, the mean of the tokens by their areas inside it."""
    rows, cols = s.layout.grids[0]
    high, wide = max(
        ((r, min(cols, s.budget // r)) for r in range(1, min(rows, s.budget) + 1)),
        key=lambda g: (min(g[0] / rows, g[1] / cols), g[0] * g[1], -g[0]),
    )
    grid = s.features[0].view(rows, cols, -1)

    def inside(cell: int, cells: int, size: int) -> Tensor:
        at = torch.arange(size, dtype=torch.float64)
        return (torch.clamp(at + 1, max=(cell + 1) * size / cells) - torch.clamp(at, min=cell * size / cells)).clamp(min=0)

    index, tokens = [], []
    for i in range(high):
        for j in range(wide):
            y, x = inside(i, high, rows), inside(j, wide, cols)
            area = (y[:, None] * x).float()
            within = area > 0
            tokens.append((area[within] / area.sum()) @ grid[within])
            centre_y, centre_x = (i + 0.5) * rows / high - 0.5, (j + 0.5) * cols / wide - 0.5
            apart = (torch.arange(rows)[:, None] - centre_y) ** 2 + (torch.arange(cols) - centre_x) ** 2
            index.append(int(apart.round(decimals=6).argmin()))
    index = torch.tensor(index)
    order = index.argsort()
    return Selection(index[order][None], torch.stack(tokens)[order][None])


@plain("downsample")
def downsample(part: Any, given: Any) -> Tensor:
    """Bicubic resizing."""
    pixels, size = given
    return interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
