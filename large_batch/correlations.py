"""Does a measure of sharpness predict the generalisation gap? Rank correlations over many minimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy.stats import kendalltau

from large_batch.errors import UserError

RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau of a measure and the gap over `count` minimizers, with a bootstrap interval.

    `granulated` has, for each setting of the trainings, the mean tau over groups that differ in this setting only
    (Jiang et al., 2020): a measure that only follows one setting looks good in `tau` and not there. None: no groups.
    """

    count: int
    tau: float | None
    low: float | None
    high: float | None
    granulated: dict[str, float | None]

    @property
    def mean_granulated(self) -> float | None:
        """The mean over the settings that have groups, without the seed, which nobody chooses."""
        known = [tau for name, tau in self.granulated.items() if tau is not None and name != "seed"]
        return float(np.mean(known)) if known else None

    def __str__(self) -> str:
        return "-" if self.tau is None else f"{self.tau:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def rank_correlation(
    measure: Sequence[float | None], gap: Sequence[float], settings: Sequence[dict], seed: int = 0
) -> RankCorrelation:
    """Return the rank correlation of a measure with the generalisation gap.

    The measure follows the gap where tau is near 1, and neither where its interval has 0. The interval is a percentile
    bootstrap over the minimizers (Efron, 1979) of 2000 resamples, 95 %.

    Args:
        measure: Of each minimizer, (k,); those with None or NaN, where it is not resolved, take no part.
        gap: Of each minimizer, (k,): training less test accuracy.
        settings: Of each minimizer's training, by name: batch size, epochs, seed, ...
        seed: Of the resamples.

    Raises:
        UserError: Where there are not as many of each.
    """
    if not len(measure) == len(gap) == len(settings):
        raise UserError("A rank correlation needs a measure, a gap and settings for each minimizer.")
    values = np.array(measure, float)
    known = np.flatnonzero(np.isfinite(values) & np.isfinite(np.array(gap, float)))
    x, y, settings = values[known], np.array(gap, float)[known], [settings[i] for i in known]
    tau, low, high = _tau(x, y), None, None
    if tau is not None:
        resampled = _resampled(x, y, np.random.default_rng(seed))
        tail = (1 - CONFIDENCE) / 2
        low, high = (float(np.quantile(resampled, share)) for share in (tail, 1 - tail))
    names = list(settings[0]) if settings else []
    return RankCorrelation(len(x), tau, low, high, {name: _granulated(x, y, settings, name) for name in names})


def _granulated(x: np.ndarray, y: np.ndarray, settings: list[dict], name: str) -> float | None:
    """Return the mean tau over the groups of minimizers whose settings differ in one only."""

    def others(i: int) -> str:
        return repr({key: value for key, value in settings[i].items() if key != name})

    groups = [list(group) for _, group in groupby(sorted(range(len(x)), key=others), key=others)]
    found = [_tau(x[group], y[group]) for group in groups if len({repr(settings[i][name]) for i in group}) > 1]
    found = [tau for tau in found if tau is not None]
    return float(np.mean(found)) if found else None


def _tau(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Kendall's tau-b; None where one of the two is the same for all."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(kendalltau(x, y).statistic)


def _resampled(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return tau-b of resamples, from how often each minimizer is in one; without those that are all of one value."""
    counts = random.multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLES)
    sx, sy = (np.sign(np.subtract.outer(values, values)) for values in (x, y))

    def summed(pairs: np.ndarray) -> np.ndarray:
        return ((counts @ pairs) * counts).sum(axis=1)

    length = np.sqrt(summed(sx**2) * summed(sy**2))
    return summed(sx * sy)[length > 0] / length[length > 0]
