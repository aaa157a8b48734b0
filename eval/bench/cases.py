"""The ops of ``vtc bench kernels`` on their inputs, and the published algorithms on the same ones.

The plain algorithms are those of the papers' releases: full matrices, and loops that ask the device for every pick.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = {576: 64, 2880: 160, 7290: 640}
"""Tokens and the budget measured with."""


@dataclass(frozen=True)
class Preset:
    """What is measured on a kind of device.

    Attributes
    ----------
    sizes : tuple of int
        Tokens.
    width, heads, head_width : int
        Of features and attention.
    dtype : torch.dtype
        Of features, queries and keys.
    compile_at : tuple of int
        The sizes at which the compiled twin is measured: compiling takes long.
    seconds : float
        Time for the repeats of one provider.
    edge : int
        Edge of the matrices that the roofline is measured with.
    """

    sizes: tuple[int, ...]
    width: int
    heads: int
    head_width: int
    dtype: torch.dtype
    compile_at: tuple[int, ...]
    seconds: float
    edge: int


PRESETS = {
    "cpu": Preset((576, 2880), 1024, 16, 64, torch.float32, (576,), 1.0, 1024),
    "gpu": Preset((576, 2880, 7290), 4096, 16, 64, torch.bfloat16, (576, 2880, 7290), 0.4, 8192),
}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes
    ----------
    op, shape : str
        Name, and sizes for the table.
    args : tuple
        What the op is called with.
    plain : callable
        The published algorithm on the same inputs.
    moved, flops : float
        Bytes and FLOPs it cannot do without.
    """

    op: str
    shape: str
    args: tuple[Any, ...]
    plain: Callable[[], Any]
    moved: float
    flops: float

    def call(self, function: Callable[..., Any]) -> Any:
        """Run the op, or a function of the same signature, on the inputs."""
        return function(*self.args)


# ------------------------------------------------------------------------------------------------------- plain algorithms
def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True)


def _plain_rows(query: Tensor, key: Tensor, at: Tensor) -> Tensor:
    """The whole attention map, of which some rows are taken."""
    full = torch.softmax((query @ key.mT).float() * query.shape[-1] ** -0.5, -1)
    return full.mean(1)[:, at]


def _plain_colsum(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax((query @ key.mT).float() * query.shape[-1] ** -0.5, -1).mean(1).sum(1)


def _plain_far(x: Tensor, k: int, first: int, weight: Tensor | None = None) -> list[int]:
    """Full distance matrix; every step looks at the distances to all chosen tokens."""
    unit = _unit(x[0])
    distance = 1 - unit @ unit.T
    picks = [first if weight is None else int(weight[0].argmax())]
    while len(picks) < k:
        near = distance[picks].min(0).values
        near = near if weight is None else near * weight[0]
        near[picks] = -torch.inf
        picks.append(int(near.argmax()))
    return picks


def _plain_sum(x: Tensor, k: int, first: int) -> list[int]:
    unit = _unit(x[0])
    cosine, picks = unit @ unit.T, [first]
    while len(picks) < k:
        total = cosine[picks].sum(0)
        total[picks] = torch.inf
        picks.append(int(total.argmin()))
    return picks


def _plain_dpp(x: Tensor, weight: Tensor, k: int) -> list[int]:
    """Greedy MAP on the full kernel."""
    unit, w = _unit(x[0]), weight[0]
    kernel = w[:, None] * (unit @ unit.T) * w
    gain, rows, picks = kernel.diagonal().clone(), kernel.new_zeros(k, len(w)), []
    for t in range(k):
        pick = int(gain.argmax())
        rows[t] = (kernel[pick] - rows[:t, pick] @ rows[:t]) / gain[pick].sqrt()
        gain = gain - rows[t].square()
        gain[pick] = -torch.inf
        picks.append(pick)
    return picks


def _plain_isolated(x: Tensor) -> int:
    unit = _unit(x[0])
    return int((1 - unit @ unit.T).topk(2, dim=0, largest=False).values[1].argmax())


def _plain_means(x: Tensor, k: int, rounds: int) -> Tensor:
    points = x[0].float()
    centres = points[:k]
    for _ in range(rounds):
        owner = torch.cdist(points, centres).argmin(1)
        centres = torch.stack([points[owner == c].mean(0) if bool((owner == c).any()) else centres[c] for c in range(k)])
    return centres


def _plain_medoids(x: Tensor, k: int, rounds: int) -> Tensor:
    points = x[0].float()
    distance = torch.cdist(points, points)
    medoids = torch.arange(k, device=x.device)
    for _ in range(rounds):
        owner = distance[:, medoids].argmin(1)
        groups = [(owner == c).nonzero()[:, 0] for c in range(k)]
        medoids = torch.stack([g[distance[g][:, g].sum(1).argmin()] if len(g) else medoids[c] for c, g in enumerate(groups)])
    return medoids


def _plain_merge(x: Tensor, owner: Tensor, k: int) -> Tensor:
    """A product with the one-hot matrix of owners."""
    hot = torch.nn.functional.one_hot(owner, k).to(x.dtype)
    return hot.mT @ x / hot.sum(1)[..., None].clamp(min=1)


def _plain_transition(x: Tensor, y: Tensor) -> Tensor:
    turn = torch.softmax(1 - torch.cosine_similarity(x.float(), y.float(), dim=-1), 1)
    return y.float().norm(dim=-1) / x.float().norm(dim=-1) * turn


def _plain_compact(scores: Tensor, k: int, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    index = scores.topk(k).indices.sort().values
    return index, [s[torch.arange(len(s), device=s.device)[:, None], index] for s in states]


# ------------------------------------------------------------------------------------------------------------------ cases
def cases(n: int, preset: Preset, device: torch.device) -> Iterator[Case]:
    """Yield every op at ``n`` tokens."""
    k, d, dtype = SIZES[n], preset.width, preset.dtype
    size = torch.finfo(dtype).bits // 8
    generator = torch.Generator(device).manual_seed(n)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    x = draw(1, n, d) + draw(1, 1, d)
    y = x + draw(1, n, d)
    weight = draw(1, n, kind=torch.float32).abs()
    first, start = torch.zeros(1, dtype=torch.long, device=device), torch.arange(k, device=device)[None]
    owner = torch.randint(0, k, (1, n), generator=generator, device=device)
    query, key = draw(1, preset.heads, n, preset.head_width), draw(1, preset.heads, n, preset.head_width)
    some = torch.tensor([0], device=device)
    rows = query[:, :, :1].contiguous()
    features, dims = f"N={n} D={d}", f"H={preset.heads} d={preset.head_width} N={n}"
    attention, pairs = preset.heads * preset.head_width * n, float(n) * n
    read = size * n * d

    yield Case("topk_sorted", f"N={n} k={k}", (weight, k), lambda: weight.topk(k).indices.sort().values, 4 * n, 0)
    yield Case(
        "select_compact", f"{features} k={k}", (weight, k, [x, y]), lambda: _plain_compact(weight, k, [x, y]),
        4 * n + 4 * k * d * size, 0,
    )  # fmt: skip
    yield Case(
        "merge_scatter", f"{features} k={k}", (x, owner, k), lambda: _plain_merge(x, owner, k),
        read + k * d * size, 2.0 * n * d,
    )  # fmt: skip
    yield Case("transition_score", features, (x, y), lambda: _plain_transition(x, y), 2 * read, 6.0 * n * d)
    yield Case(
        "attention_rows", f"{dims} R=1", (rows, key), lambda: _plain_rows(query, key, some),
        size * attention, 2.0 * attention,
    )  # fmt: skip
    yield Case(
        "attention_colsum", dims, (query, key), lambda: _plain_colsum(query, key),
        2 * size * attention, 2.0 * attention * n,
    )  # fmt: skip
    yield Case(
        "pairwise_top1", f"{features} T={k}", (x, x[:, :k]), lambda: (_unit(x) @ _unit(x[:, :k]).mT).max(-1),
        read, 2.0 * n * k * d,
    )  # fmt: skip
    yield Case(
        "nearest_centre", f"{features} k={k}", (x, x[:, :k]),
        lambda: torch.cdist(x.float(), x[:, :k].float()).argmin(-1), read, 2.0 * n * k * d,
    )  # fmt: skip
    yield Case("most_isolated", features, (x,), lambda: _plain_isolated(x), read, pairs * d)
    one_pass = 2.0 * n * k * d  # the cosines of the picks with all tokens
    picks = f"{features} k={k}"
    yield Case("farthest_point", picks, (x, k, first), lambda: _plain_far(x, k, 0), read, one_pass)
    yield Case("farthest_point_weighted", picks, (x, weight, k), lambda: _plain_far(x, k, 0, weight), read, one_pass)
    yield Case("max_sum", picks, (x, k, first), lambda: _plain_sum(x, k, 0), read, one_pass)
    yield Case("greedy_dpp", picks, (x, weight, k), lambda: _plain_dpp(x, weight, k), read, one_pass + 1.0 * n * k * k)
    yield Case("k_means", picks + " 5 rounds", (x, start, 5), lambda: _plain_means(x, k, 5), read, 5 * one_pass)
    yield Case("k_medoids", picks + " 5 rounds", (x, start, 5), lambda: _plain_medoids(x, k, 5), read, 6 * one_pass)


def chosen(wanted: Sequence[tuple[int, Collection[str]]], preset: Preset, device: torch.device) -> Iterator[tuple[int, Case]]:
    """Yield the cases of sizes and names of ops, with their sizes, in this order."""
    for n, names in wanted:
        for case in cases(n, preset, device):
            if case.op in names:
                yield n, case
