"""Is every Triton op, compiled on this GPU, what its torch twin says? On the inputs the benches measure with.

The whole comparison, over ugly shapes and all types, is in the tests; this one needs neither pytest nor a checkout, and runs
in front of a measurement, whose numbers mean nothing where it fails. Numbers are compared up to rounding. Choices are judged by
their scores in float64, since two tokens may be as good as each other up to rounding: every pick of a greedy subset must be
(nearly) the best after the picks before it, every neighbour (nearly) the nearest, a clustering (nearly) as tight as the twin's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc import kernels as ops
from vtc.eval.bench.cases import Case, Preset, chosen
from vtc.eval.bench.common import before, reason, settle

NEAR = 1e-4
"""Of the largest value: how far sums in another order may be apart. In steps of the type more where the result is rounded to it."""


@dataclass
class Row:
    """One op at one size.

    Attributes
    ----------
    op, shape, dtype : str
        Name, sizes, type of the features.
    n, checked, mismatches : int
        Tokens, numbers and choices compared, those that are wrong.
    seconds : float
        Time taken, compiling included.
    note : str
        The first mismatch, or the error.
    """

    op: str
    n: int
    shape: str
    dtype: str
    checked: int = 0
    mismatches: int | None = None
    seconds: float = 0.0
    note: str = ""


def possible(device: torch.device) -> bool:
    """Whether Triton runs there: on a GPU, and on the CPU under its interpreter (``TRITON_INTERPRET=1``)."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def check(wanted: Sequence[tuple[int, Collection[str]]], preset: Preset, device: torch.device, end: float) -> Iterator[Row]:
    """Compare ops at sizes before ``end`` (:func:`time.monotonic`); yield a row for each."""
    dtype = str(preset.dtype).removeprefix("torch.")
    for n, case in before(end, chosen(wanted, preset, device)):
        row, begin = Row(case.op, n, case.shape, dtype), time.monotonic()
        try:
            with torch.no_grad():
                twin = case.call(getattr(ops, case.op).__wrapped__)
                with ops.use("triton"):
                    mine = case.call(getattr(ops, case.op))
                row.checked, row.mismatches, row.note = judge(case, mine, twin)
        except Exception as error:  # an op that does not run is a result, too
            row.note = f"failed: {reason(error)}"
        if row.mismatches is None:
            settle(device)
        row.seconds = round(time.monotonic() - begin, 2)
        yield row


def judge(case: Case, mine: Any, twin: Any) -> tuple[int, int, str]:
    """Compare an op's result with its twin's.

    Returns
    -------
    checked, mismatches : int
        Numbers and choices.
    first : str
        Where the first mismatch is, and what stands there; empty if there is none.
    """
    got, want = flat(mine), flat(twin)
    kinds = [[(tuple(t.shape), t.dtype) for t in tensors] for tensors in (got, want)]
    if kinds[0] != kinds[1]:
        return 1, 1, f"{kinds[0]} instead of {kinds[1]}"
    checked, wrong, first = 0, 0, ""
    for part, right in enumerate(_JUDGES.get(case.op, _numbers)(case.args, got, want)):
        checked += right.numel()
        bad = (~right).nonzero()
        if len(bad) and not first:
            at = tuple(bad[0].tolist())
            values = [t[part][at].item() if part < len(t) and t[part].shape == right.shape else None for t in (got, want)]
            first = f"result {part} at {at}" + (f": {values[0]} instead of {values[1]}" if values[0] is not None else "")
        wrong += len(bad)
    return checked, wrong, first


def flat(value: Any) -> list[Tensor]:
    """Return all tensors of a nested result."""
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


# ----------------------------------------------------------------------------------------------------------------- judges
def _near(a: Tensor, b: Tensor) -> Tensor:
    """Whether numbers are alike up to rounding."""
    x, y = a.double(), b.double()
    step = torch.finfo(a.dtype).eps if a.dtype in (torch.float16, torch.bfloat16) else 0.0
    return ((x - y).abs() <= NEAR * y.abs().amax() + step * y.abs()) | (x.isnan() & y.isnan())


def _numbers(_: tuple[Any, ...], got: list[Tensor], want: list[Tensor]) -> list[Tensor]:
    return [_near(a, b) for a, b in zip(got, want, strict=True)]


def _equal(_: tuple[Any, ...], got: list[Tensor], want: list[Tensor]) -> list[Tensor]:
    return [a == b for a, b in zip(got, want, strict=True)]


def _unit(x: Tensor) -> Tensor:
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True)


def _reached(score: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
    """Whether the scores ``(B, M, T)`` at the indices ``(B, M)`` are (nearly) the largest."""
    return score.gather(-1, index[..., None])[..., 0] >= score.amax(-1) - NEAR * scale


def _neighbours(args: tuple[Any, ...], got: list[Tensor], want: list[Tensor]) -> list[Tensor]:
    return [_near(got[0], want[0]), _reached(_unit(args[0]) @ _unit(args[1]).mT, got[1])]


def _centres(args: tuple[Any, ...], got: list[Tensor], _: list[Tensor]) -> list[Tensor]:
    distance = torch.cdist(args[0].double(), args[1].double()).square()
    return [_reached(-distance, got[0], float(distance.mean()))]


def _isolated(args: tuple[Any, ...], got: list[Tensor], _: list[Tensor]) -> list[Tensor]:
    unit = _unit(args[0])
    cosine = unit @ unit.mT
    cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return [_reached(-cosine.amax(-1)[:, None], got[0][:, None])[:, 0]]


def _replayed(rule: str, weighted: bool) -> Callable[[tuple[Any, ...], list[Tensor], list[Tensor]], list[Tensor]]:
    """Judge greedy subsets: every pick is the best given those before it."""

    def judged(args: tuple[Any, ...], got: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        weights = args[1].double() if weighted else torch.ones_like(args[0][..., 0], dtype=torch.float64)
        images = zip(args[0], weights, got[0], strict=True)
        return [torch.stack([replay(_unit(x), w, picks, rule, given=not weighted) for x, w, picks in images])]

    return judged


def replay(unit: Tensor, weight: Tensor, picks: Tensor, rule: str, given: bool) -> Tensor:
    """Follow the picks of one image and return which of them were (nearly) the best of those left.

    Parameters
    ----------
    unit, weight : Tensor
        ``(N, D)`` features of length one and ``(N,)`` weights, float64.
    picks : Tensor
        ``(k,)``, in pick order.
    rule : {"far", "sum", "dpp"}
        Largest weighted distance to the nearest pick; smallest sum of cosines with the picks; largest gain of the determinant.
    given : bool
        The first pick is not a choice.
    """
    cosine = unit @ unit.T
    score = weight.clone() if rule != "dpp" else weight.square()
    free = torch.ones_like(weight, dtype=torch.bool)
    near, total = torch.full_like(weight, torch.inf), torch.zeros_like(weight)
    factor, short = weight.new_zeros(len(picks), len(weight)), []
    for step, pick in enumerate(picks.tolist()):
        best = score.masked_fill(~free, -torch.inf).amax()
        tolerance = (
            NEAR * (step + 1 if rule == "sum" else 1) * (10 if rule == "dpp" else 1) * weight.amax().square().clamp(min=1)
        )
        short.append(free[pick] & ((score[pick] >= best - tolerance) | (given and step == 0)))
        free[pick] = False
        if rule == "dpp":
            row = weight[pick] * cosine[pick] * weight - factor[:step, pick] @ factor[:step]
            factor[step] = row / score[pick].clamp(min=1e-12).sqrt()
            score = score - factor[step].square()
        elif rule == "sum":
            total = total + cosine[pick]
            score = -total
        else:
            near = torch.minimum(near, 1 - cosine[pick])
            score = weight * near
    return torch.stack(short)


def _means(args: tuple[Any, ...], got: list[Tensor], want: list[Tensor]) -> list[Tensor]:
    points, right = args[0].double(), []
    for x, mine, owner, centres, twin in zip(points, got[0].double(), got[1], want[0].double(), want[1], strict=True):
        hot = torch.nn.functional.one_hot(owner, len(mine)).double()
        size = hot.sum(0)[:, None]
        right.append(_near(torch.where(size > 0, hot.T @ x / size.clamp(min=1), mine), mine).all(1))
        right.append(_as_tight((x - mine[owner]).square().sum(), (x - centres[twin]).square().sum()))
    return right


def _medoids(args: tuple[Any, ...], got: list[Tensor], want: list[Tensor]) -> list[Tensor]:
    points, right = args[0].double(), []
    for x, mine, owner, medoids, twin in zip(points, *got, *want, strict=True):
        right.append(owner[mine] == torch.arange(len(mine), device=mine.device))
        right.append(_as_tight((x - x[mine[owner]]).norm(dim=1).sum(), (x - x[medoids[twin]]).norm(dim=1).sum()))
    return right


def _as_tight(mine: Tensor, twin: Tensor) -> Tensor:
    """Whether the cost of a clustering is (nearly) the twin's; a token between two clusters may have gone either way."""
    return ((mine - twin).abs() <= 10 * NEAR * twin)[None]


_JUDGES: dict[str, Callable[[tuple[Any, ...], list[Tensor], list[Tensor]], list[Tensor]]] = {
    "topk_sorted": _equal,
    "select_compact": _equal,
    "pairwise_top1": _neighbours,
    "nearest_centre": _centres,
    "most_isolated": _isolated,
    "farthest_point": _replayed("far", weighted=False),
    "farthest_point_weighted": _replayed("far", weighted=True),
    "max_sum": _replayed("sum", weighted=False),
    "greedy_dpp": _replayed("dpp", weighted=True),
    "k_means": _means,
    "k_medoids": _medoids,
}
"""How an op's result is judged; all others by their numbers."""
