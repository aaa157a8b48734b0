"""Bootstrap confidence intervals for accuracies, paired comparisons, and tests that stay honest when many are made.

Questions about one image are not independent, so whole images are drawn, not questions. Both runs of a pair see the same draws:
the interval of a difference is that of the difference, not of two accuracies side by side.

A table compares dozens of rows with one reference, and a few of them look different by luck alone. :func:`sign_flip` gives every
comparison a p-value and :func:`holm` corrects all of a table together; the intervals stay those of single comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vtc.errors import VtcError

Draws = NDArray[np.float64]

WEIGHTS = 4 * 2**30
"""Most draws times images of one bootstrap: each takes a byte."""

_CHUNK = 2_000_000  # weights multiplied at a time


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
    p : float
        Two-sided p-value of no difference, of :func:`sign_flip`, for this comparison alone.
    """

    difference: Interval
    ratio: Interval | None
    p: float = 1.0


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
    seed : int or tuple of int
        Seed of the draws.

    Raises
    ------
    VtcError
        If there is no question, or so many draws of so many images do not fit into memory.
    """

    def __init__(
        self, groups: Sequence[str], resamples: int = 2000, confidence: float = 0.95, seed: int | tuple[int, ...] = 0
    ) -> None:
        if not len(groups):
            raise VtcError("a confidence interval needs at least one question: the samples are empty")
        names, self.group = np.unique(np.asarray(groups), return_inverse=True)
        rng = np.random.default_rng(seed)
        n = len(names)
        if n * resamples > WEIGHTS:
            raise VtcError(f"{resamples} bootstrap resamples of {n} images take too much memory: lower `bootstrap.resamples`")
        # an image is drawn a handful of times, so a byte holds the count: tens of thousands of images stay in megabytes
        self.weights: NDArray[np.uint8] = np.empty((resamples, n), dtype=np.uint8)
        even, step = np.full(n, 1 / n), max(1, _CHUNK // n)
        for start in range(0, resamples, step):
            rows = slice(start, min(start + step, resamples))
            self.weights[rows] = rng.multinomial(n, even, size=rows.stop - rows.start)
        self.counts = np.bincount(self.group, minlength=n).astype(np.float64)
        self.totals = self._weigh(self.counts)
        tail = (1 - confidence) / 2
        self.quantiles = (tail, 1 - tail)

    def _weigh(self, values: Draws) -> Draws:
        step = max(1, _CHUNK // len(values))
        parts = [self.weights[at : at + step].astype(np.float64) @ values for at in range(0, len(self.weights), step)]
        return np.concatenate(parts)

    def draws(self, scores: ArrayLike) -> tuple[float, Draws]:
        """Return the mean score and its value in every draw; scores are 0..1, right and wrong answers are 1 and 0."""
        marks = np.asarray(scores, dtype=np.float64)
        if marks.shape != self.group.shape:
            raise VtcError(f"{len(marks)} answers do not match {len(self.group)} questions")
        return float(marks.mean()), self._weigh(self.sums(marks)) / self.totals

    def sums(self, scores: Draws) -> Draws:
        """Return the scores added up per image."""
        return np.bincount(self.group, weights=scores, minlength=len(self.counts))

    def interval(self, value: float, draws: Draws) -> Interval:
        """Return the percentile interval of draws."""
        low, high = np.quantile(draws, self.quantiles)
        return Interval(value, float(low), float(high))

    def accuracy(self, correct: Sequence[bool]) -> Interval:
        """Share of correct answers."""
        return self.interval(*self.draws(correct))

    def paired(self, correct: Sequence[bool], reference: Sequence[bool]) -> Paired:
        """Compare two runs on the same questions, in the same order."""
        apart = np.asarray(correct, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
        return compare(self, *self.draws(correct), *self.draws(reference), self.sums(apart))


def compare(boot: Bootstrap, mine: float, my_draws: Draws, base: float, base_draws: Draws, apart: Draws) -> Paired:
    """Compare two runs from their draws; ``apart`` holds the difference of every image, for the test."""
    ratio = None
    if base > 0:
        usable = base_draws > 0  # with very few questions a draw may hold no right answer of the reference
        ratio = boot.interval(mine / base, my_draws[usable] / base_draws[usable])
    return Paired(boot.interval(mine - base, my_draws - base_draws), ratio, sign_flip(apart))


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided p-value of the randomisation test on paired differences.

    Were the two runs alike, every difference would be as likely with the other sign. The p-value is the share of all sign patterns
    whose sum is at least as far from zero as the one seen. Whole numbers (right answers gained or lost per image) are counted
    exactly; with one question per image this is McNemar's exact test. Other numbers use the normal limit of that distribution.

    Parameters
    ----------
    differences : array_like
        ``(n,)`` one per independent unit (image).
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if not len(d):
        return 1.0
    seen = abs(d.sum())
    if not np.array_equal(d, np.round(d)):
        return math.erfc(seen / math.sqrt(2 * float((d * d).sum())))
    pmf = np.ones(1)
    for size, count in zip(*np.unique(np.abs(d).astype(np.int64), return_counts=True), strict=True):
        spaced = np.zeros(2 * int(size) * int(count) + 1)  # sums -size*count ... size*count in steps of 2*size
        spaced[:: 2 * int(size)] = _half_binomial(int(count))
        pmf = np.convolve(pmf, spaced)
    middle = len(pmf) // 2
    away = np.abs(np.arange(len(pmf)) - middle) >= round(float(seen))
    return float(min(1.0, pmf[away].sum()))


def _half_binomial(n: int) -> Draws:
    """Probabilities of 0..n heads in n tosses of a fair coin."""
    k = np.arange(n + 1)
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    return np.exp(logs[n] - logs[k] - logs[n - k] - n * math.log(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of one family by Holm's step-down method, in the order given.

    Calling those below a level different keeps the chance of even one false call in the family below that level, whatever depends
    on what.
    """
    order = np.argsort(np.asarray(p_values), kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def wilson(share: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a share of ``n`` independent trials; unlike a bootstrap it has a width at 0 and at 1."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def spread(values: Sequence[float]) -> Interval:
    """Median with the 20th and 80th percentile, for timings."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), (0.2, 0.5, 0.8))
    return Interval(float(middle), float(low), float(high))
