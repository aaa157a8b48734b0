"""Whole numbers shared out: tokens among groups, cells along the two axes of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def apportion(total: int, weight: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Share a whole number of tokens out in proportion to ``weight`` by the largest remainder, no group above its capacity.

    What a full group cannot take goes to the others, again in proportion; groups of weight 0 get tokens only when all others are
    full. Equal remainders: the lowest index first. Exact arithmetic.

    Parameters
    ----------
    total : int
        Tokens to share out.
    weight : sequence of float
        Non-negative weight of each group.
    capacity : sequence of int
        Most each group can take.

    Returns
    -------
    list of int
        Sums to ``min(total, sum(capacity))``.
    """
    given = [0] * len(capacity)
    left = min(total, sum(capacity))
    while left > 0:
        room = [g for g, most in enumerate(capacity) if given[g] < most]
        if any(weight[g] > 0 for g in room):
            room = [g for g in room if weight[g] > 0]
            shares = {g: Fraction(weight[g]) for g in room}
        else:
            shares = {g: Fraction(1) for g in room}
        whole = sum(shares.values())
        ideal = {g: left * shares[g] / whole for g in room}
        full = [g for g in room if ideal[g] >= capacity[g] - given[g]]
        if full:  # fill these, then share the rest out anew
            for g in full:
                left -= capacity[g] - given[g]
                given[g] = capacity[g]
            continue
        for g in room:
            given[g] += int(ideal[g])
            left -= int(ideal[g])
        for g in sorted(room, key=lambda g: int(ideal[g]) - ideal[g])[:left]:
            given[g] += 1
        left = 0
    return given


def coarse_grid(budget: int, rows: int, cols: int) -> tuple[int, int]:
    """Return the grid of at most ``budget`` cells over a ``rows x cols`` grid whose cells are the most alike in both directions.

    The axis that is coarsened most stays as fine as possible; then as many cells as fit; then more columns than rows.

    Parameters
    ----------
    budget : int
        Most cells, at least 1.
    rows, cols : int
        The fine grid; the result never exceeds it.
    """
    best = (Fraction(0), 0, 0), (1, 1)
    for r in range(1, min(rows, budget) + 1):
        c = min(cols, budget // r)
        best = max(best, ((min(Fraction(r, rows), Fraction(c, cols)), r * c, -r), (r, c)))
    return best[1]
