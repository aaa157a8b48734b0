"""Bootstrap confidence intervals for accuracies, and paired against the unreduced run.

Questions about one image are not independent, so whole images are drawn, not questions. Both runs of a pair see the same draws:
the interval of a difference is that of the difference, not of two accuracies side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from vtc.errors import VtcError


@dataclass(frozen=True)
class Interval:
    """A point estimate with a percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """One run against another on the same questions.

    Attributes
    ----------
    difference : Interval
        Accuracy minus the reference's accuracy.
    ratio : Interval or None
        Share of the reference's accuracy; ``None`` if the reference is never right.
    """

    difference: Interval
    ratio: Interval | None


class Bootstrap:
    """Draws shared by all comparisons of one set of questions.

    Parameters
    ----------
    groups : sequence of str
        Image of every question; images are drawn with replacement.
    resamples : int
        Number of draws.
    confidence : float
        Level of the two-sided intervals.
    seed : int
        Seed of the draws.

    Raises
    ------
    VtcError
        If there is no question.
    """

    def __init__(self, groups: Sequence[str], resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> None:
        if not len(groups):
            raise VtcError("a confidence interval needs at least one question: the samples are empty")
        names, self.group = np.unique(np.asarray(groups), return_inverse=True)
        rng = np.random.default_rng(seed)
        n = len(names)
        self.weights: NDArray[np.float64] = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        self.counts = np.bincount(self.group, minlength=n).astype(np.float64)
        self.totals = self.weights @ self.counts
        tail = (1 - confidence) / 2
        self.quantiles = (tail, 1 - tail)

    def _draws(self, correct: Sequence[bool]) -> tuple[float, NDArray[np.float64]]:
        marks = np.asarray(correct, dtype=np.float64)
        if marks.shape != self.group.shape:
            raise VtcError(f"{len(marks)} answers do not match {len(self.group)} questions")
        hits = np.bincount(self.group, weights=marks, minlength=len(self.counts))
        return float(marks.mean()), (self.weights @ hits) / self.totals

    def _interval(self, value: float, draws: NDArray[np.float64]) -> Interval:
        low, high = np.quantile(draws, self.quantiles)
        return Interval(value, float(low), float(high))

    def accuracy(self, correct: Sequence[bool]) -> Interval:
        """Share of correct answers."""
        return self._interval(*self._draws(correct))

    def paired(self, correct: Sequence[bool], reference: Sequence[bool]) -> Paired:
        """Compare two runs on the same questions, in the same order."""
        mine, my_draws = self._draws(correct)
        base, base_draws = self._draws(reference)
        difference = self._interval(mine - base, my_draws - base_draws)
        ratio = None
        if base > 0:
            usable = base_draws > 0  # with very few questions a draw may hold no right answer of the reference
            ratio = self._interval(mine / base, my_draws[usable] / base_draws[usable])
        return Paired(difference, ratio)


def spread(values: Sequence[float]) -> Interval:
    """Median with the 20th and 80th percentile, for timings."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.2, 0.5, 0.8))
    return Interval(float(middle), float(low), float(high))
