"""A test that may be looked at after every observation.

That a mean is at least some value is rejected by *betting* (a test martingale; Waudby-Smith and Ramdas, arXiv:2010.09686): if it is
true, the capital of a gambler who bets against it exceeds ``1 / alpha`` at *any* time with probability at most ``alpha``. So the
test may stop as soon as the answer is clear, which a test of fixed size may not; of the distribution it assumes the range only.
Alpha spending would need the number of looks in advance, and would gain nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BETS = np.array([0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95])  # shares of the largest stake; the capital is the mean over all of them


class Betting:
    """An anytime-valid test and upper bound for the mean of values in [-1, 1].

    Parameters
    ----------
    alpha : float
        Chance of ever rejecting what is true.
    target : float
        Candidate that must be on the grid, with its negative.

    Notes
    -----
    For every candidate mean on a grid the capital of betting that the true mean is *below* it is followed. A candidate is rejected
    once its capital has exceeded ``1 / alpha``.
    """

    def __init__(self, alpha: float, target: float = 0.0) -> None:
        self.alpha = alpha
        # fine where losses are
        self.means = np.unique(np.concatenate([np.linspace(-1, 1, 201), np.linspace(-0.1, 0.1, 201), [target, -target]]))
        # values x = (1 - d) / 2 in [0, 1]; the claim "mean of d >= candidate" is "mean of x <= middle"
        self.middle = (1 - self.means) / 2
        stakes = _BETS[:, None] / np.maximum(self.middle, 1e-9)[None, :]
        self.stakes = np.minimum(stakes, 1e6)
        self.logs = np.zeros_like(self.stakes)
        self.rejected = np.zeros(len(self.means), dtype=bool)

    def add(self, values: Sequence[float]) -> None:
        """Take further values, in order."""
        for d in values:
            gain = 1 + self.stakes * ((1 - d) / 2 - self.middle)[None, :]
            self.logs += np.log(np.maximum(gain, 1e-12))
            peak = self.logs.max(axis=0)
            capital = peak + np.log(np.exp(self.logs - peak).mean(axis=0))
            self.rejected |= capital >= -np.log(self.alpha)

    @property
    def bound(self) -> float:
        """Upper bound of the mean: it is below this with confidence ``1 - alpha``, at all times together."""
        kept = np.flatnonzero(~self.rejected)
        return float(self.means[min(kept[-1] + 1, len(self.means) - 1)]) if len(kept) else float(self.means[0])
