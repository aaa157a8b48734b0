"""Schedules of reductions inside the decoder: where the cuts lie, and how many tokens each leaves, for a given budget.

Pure arithmetic on numbers: no tensors, no models. A schedule has a *shape*, the shares of the visual tokens its paper leaves
after each cut; a budget bends the shape by one exponent, so that a method keeps its character at any budget: shares ``(1/2,
1/4, 1/8)`` become ``(x, x^2, x^3)``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from vtc.core import Budget, Facts, Reducer
from vtc.errors import BudgetError, UnknownArgumentError

TOLERANCE = 0.01
"""Largest relative distance of a solved schedule from the layer average asked for."""


def place_cuts(layers: Sequence[int | float], facts: Facts, name: str, option: str = "layers") -> tuple[int, ...]:
    """Return the decoder layers before which the cuts are made, strictly ascending.

    Parameters
    ----------
    layers : sequence of int or float
        An int is a layer index; a float in (0, 1) a share of the model's layers, rounded to the nearest layer and moved up
        where two cuts would coincide.
    facts : Facts
        The model.
    name, option : str
        For messages.

    Raises
    ------
    UnknownArgumentError
        No layer, layers that do not ascend, or layers the model does not have.
    """
    placed: list[int] = []
    for layer in layers:
        if isinstance(layer, float):
            if not 0.0 < layer < 1.0:
                raise UnknownArgumentError(
                    f"'{name}': {option} has the share {layer!r}, give shares in (0, 1) or layer indices"
                )
            at = max(facts.first_layer, round(layer * facts.layers), placed[-1] + 1 if placed else 0)
        else:
            at = layer
        if placed and at <= placed[-1]:
            raise UnknownArgumentError(f"'{name}': {option}={tuple(layers)} must ascend")
        placed.append(at)
    if not placed or not facts.first_layer <= placed[0] <= placed[-1] < facts.layers:
        raise UnknownArgumentError(
            f"'{name}': {option}={tuple(layers)} does not fit this model, give layers in {facts.first_layer}..{facts.layers - 1}"
        )
    return tuple(placed)


def check_ratios(name: str, ratios: Sequence[float], cuts: int, option: str = "ratios") -> tuple[float, ...]:
    """Return the shares left after each cut as a tuple.

    Raises
    ------
    UnknownArgumentError
        Another number of shares than of cuts, shares outside (0, 1), or shares that grow.
    """
    shares = tuple(float(r) for r in ratios)
    if len(shares) != cuts or not all(0.0 < r < 1.0 for r in shares) or list(shares) != sorted(shares, reverse=True):
        raise UnknownArgumentError(
            f"'{name}': {option}={tuple(ratios)} is not possible, give one descending share in (0, 1) for each of the {cuts} cuts"
        )
    return shares


def checked(parts: Iterable[Reducer], facts: Facts) -> tuple[Reducer, ...]:
    """Return the parts of a schedule, having tried the budget where the number of visual tokens is known before any call.

    Raises
    ------
    BudgetError
        An average that the schedule cannot meet.
    """
    made = tuple(parts)
    if facts.tokens is not None:
        for part in made:
            part.count(facts.tokens, facts)
    return made


def layer_average(n: int, cuts: Sequence[int], counts: Sequence[int], layers: int) -> float:
    """Return the visual tokens averaged over the layers: ``n`` until the first cut, then what each cut leaves."""
    bounds = [*cuts, layers]
    left = sum(count * (end - start) for count, start, end in zip(counts, bounds, bounds[1:], strict=False))
    return (n * bounds[0] + left) / layers


def closest_count(wanted: float, n: int, average: Callable[[int], float]) -> int:
    """Return the number in ``1..n`` whose ``average``, which grows with it, is closest to the one wanted."""
    low, high = 1, n
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if average(middle) < wanted else (low, middle)
    return low - 1 if low > 1 and wanted - average(low - 1) <= average(low) - wanted else low


def bend(n: int, shape: Sequence[float], exponent: float) -> list[float]:
    """Return the tokens left after each cut, not rounded: ``n * share ** exponent``."""
    return [n * share**exponent for share in shape]


def stage_counts(budget: Budget, n: int, cuts: tuple[int, ...], shape: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """Return how many of an image's ``n`` visual tokens are left after each cut.

    ``keep`` counts the tokens after the last cut; ``avg_tokens`` is the average over all layers, which the result meets within
    1 %, or as closely as whole tokens can (a single cut of a small image moves the average in large steps). Where ``keep`` is
    the very share the shape ends with, the counts are the shape's own, rounded down as the releases do.

    Parameters
    ----------
    budget : Budget
        What is asked for.
    n : int
        Visual tokens of the unreduced image.
    cuts : tuple of int
        Decoder layers before which tokens leave, ascending.
    shape : tuple of float
        Shares in (0, 1) left after each cut, descending.
    layers : int
        Decoder layers.

    Raises
    ------
    BudgetError
        An average that these cuts cannot meet: below what the layers before the first cut already cost.
    """
    if budget.keep is not None:
        if budget.keep == shape[-1]:
            return _ordered(n, [int(n * share) for share in shape])
        last = budget.tokens(n)
        if last >= n:
            return (n,) * len(cuts)
        exponent = math.log(last / n) / math.log(shape[-1])
        return _ordered(n, [*(round(x) for x in bend(n, shape, exponent)[:-1]), last])
    amount = budget.avg_tokens
    wanted = amount * n if isinstance(amount, float) else amount
    if wanted >= n:
        return (n,) * len(cuts)
    least = layer_average(n, cuts, (1,) * len(cuts), layers)
    if wanted < least * (1 - TOLERANCE):
        raise BudgetError(
            f"avg_tokens={amount} cannot be met when the first {cuts[0]} of {layers} layers run on all {n} tokens: use at least "
            f"{math.ceil(least)} or earlier layers"
        )
    return _solve(wanted, n, cuts, shape, layers)


@functools.lru_cache(maxsize=4096)
def _solve(wanted: float, n: int, cuts: tuple[int, ...], shape: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """Find the exponent that meets the average, then the closest whole numbers."""
    low, high = 0.0, 1.0
    while layer_average(n, cuts, bend(n, shape, high), layers) > wanted and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if layer_average(n, cuts, bend(n, shape, middle), layers) > wanted else (low, middle)
    exact = [max(1.0, x) for x in bend(n, shape, high)]
    return _nearest(n, exact, wanted, cuts, layers)


def _nearest(n: int, exact: Sequence[float], wanted: float, cuts: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Return whole counts close to ``exact`` whose average is closest to the one wanted."""
    counts = list(_ordered(n, [round(x) for x in exact]))

    def error(c: Sequence[int]) -> float:
        return layer_average(n, cuts, c, layers) - wanted

    while True:  # single steps down or up, widest span first, as long as they help
        best = counts
        for i, step in itertools.product(range(len(counts)), (-1, 1)):
            moved = [*counts[:i], counts[i] + step, *counts[i + 1 :]]
            if list(_ordered(n, moved)) == moved and abs(error(moved)) < abs(error(best)) - 1e-12:
                best = moved
        if best is counts:
            return tuple(counts)
        counts = best


def _ordered(n: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Clamp counts to ``1..n`` and to what the cut before left."""
    out: list[int] = []
    for count in counts:
        out.append(max(1, min(count, out[-1] if out else n)))
    return tuple(out)
