"""How one number follows another: the end and the best of a training, where a curve over the batch size changes, and
rank correlations over minimizers.

The last two have confidence intervals. Curves are fitted by least squares over log2(x), and a change is tested against
smooth curves; independent errors of one variance are assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from large_batch.errors import UserError

CONFIDENCE = 0.95
STEPS = 16  # a doubling of x, at which changes are tried
POWERS = np.concatenate([-np.geomspace(0.05, 3, 24), np.geomspace(0.05, 3, 24)])  # of x
RESAMPLES = 2000  # of the bootstrap


def _window(curve: Sequence[float]) -> int:
    """Return the epochs over which a test accuracy is averaged, since it goes up and down: a fifth of the training."""
    return max(1, -(-len(curve) // 5))


def final(curve: Sequence[float]) -> float:
    """Return the accuracy at the end of a training, the mean over its last fifth, from that after each epoch."""
    return float(np.mean(curve[-_window(curve) :]))


def best(curve: Sequence[float]) -> float:
    """Return the best accuracy of a training, smoothed as its end is: the largest mean over a fifth of the epochs."""
    window = _window(curve)
    return float(np.max(np.convolve(curve, np.ones(window) / window, "valid")))


@dataclass(frozen=True)
class Breakpoint:
    """Where a fitted line changes, in units of x, and the ends of its confidence interval.

    An end is 0 or infinite where the data exclude nothing on that side.
    """

    at: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == 0 and self.high == np.inf:
            interval = "interval not bounded"
        elif self.low == 0:
            interval = f"interval up to {self.high:,.0f}"
        elif self.high == np.inf:
            interval = f"interval from {self.low:,.0f} on"
        else:
            interval = f"interval {self.low:,.0f} - {self.high:,.0f}"
        return f"{self.at:,.0f} ({CONFIDENCE:.0%} {interval})"

    def overlaps(self, other: Breakpoint) -> bool:
        """Say whether the intervals have something in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Fit:
    """A shape over log2(x), fitted by least squares: `before` and `after` tell it on both sides of where it changes.

    They are levels in units of y for `plateaus`, and slopes in y per doubling of x for `two_segments`. `p_value` is the
    probability of so much an improvement over the best smooth curve by chance.
    """

    breakpoint: Breakpoint
    before: float
    after: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Say whether the smooth curves are excluded."""
        return self.p_value < 1 - CONFIDENCE


def plateaus(x: np.ndarray, y: np.ndarray) -> Fit | None:
    """Fit two levels with a straight passage between them to y over log2(x), both of shape (k,); the place is where the
    first level ends. None for fewer than 5 points or 4 different x.

    Both a sudden step and a decline that goes on to the last point are such shapes, and so is one line. At least two
    different x lie beyond the place.
    """
    if not _enough(x):
        return None
    x = np.log2(np.asarray(x, float))
    sizes = np.unique(x)
    grid = _grid(sizes)
    begins, ends = np.meshgrid(grid[grid < sizes[-2] - 1e-9], grid, indexing="ij")
    begins, ends = begins[ends > begins], ends[ends > begins]
    shapes = np.clip((x - begins[:, None]) / (ends - begins)[:, None], 0, 1)
    return _fit(x, np.asarray(y, float), begins, np.stack([1 - shapes, shapes], axis=2))


def two_segments(x: np.ndarray, y: np.ndarray) -> Fit | None:
    """Fit a continuous line of two straight segments to y over log2(x), both of shape (k,); the place is where they
    meet. None for fewer than 5 points or 4 different x. Each segment has at least two different x."""
    if not _enough(x):
        return None
    x = np.log2(np.asarray(x, float))
    grid = _grid(np.unique(x)[1:-1])
    beyond = x - grid[:, None]
    columns = np.stack([np.minimum(beyond, 0), np.maximum(beyond, 0), np.ones_like(beyond)], axis=2)
    return _fit(x, np.asarray(y, float), grid, columns)


def _enough(x: np.ndarray) -> bool:
    return len(x) >= 5 and len(np.unique(x)) >= 4


def _grid(sizes: np.ndarray) -> np.ndarray:
    """Return the places that are tried, log2: the sizes themselves, and others between them."""
    return np.union1d(np.linspace(sizes[0], sizes[-1], 1 + round(STEPS * (sizes[-1] - sizes[0]))), sizes)


def _sums(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the sums of squares that fits by the columns leave, of shape (c, k, q) for c fits of k points."""
    bases, _ = np.linalg.qr(columns)
    fitted = bases @ (bases.transpose(0, 2, 1) @ y[:, None])
    return np.sum((y - fitted[..., 0]) ** 2, axis=1)


def _smooth(x: np.ndarray, y: np.ndarray) -> float:
    """Return the least sum of squares of the smooth curves: a line and a parabola over log2(x), a + b x^c."""
    centred = x - x.mean()
    parabolas = np.vander(centred, 3)[None]
    powers = 2 ** (POWERS[:, None] * centred)
    least = _sums(np.stack([np.ones_like(powers), powers], axis=2), y).min()
    return float(min(least, _sums(parabolas, y)[0]))


def _fit(x: np.ndarray, y: np.ndarray, places: np.ndarray, columns: np.ndarray) -> Fit:
    """Return the best of the shapes with four parameters that have their change at one of `places` (log2), of shape
    (c,), and are spanned by `columns`, of shape (c, k, q), the first two for both sides of it.

    The interval holds the places that an F-test does not reject: those whose sum of squares exceeds the least one by
    less than the F quantile with 1 and k - 4 degrees of freedom, in units of the residual variance. The improvement
    over the smooth curves is judged with 2 and k - 4 degrees, as for the line, which lies within the shapes; the tests
    find by simulation that this keeps to 5 % for the other curves as well.
    """
    sums, freedom = _sums(columns, y), len(x) - 4
    best, least, smooth = int(np.argmin(sums)), float(sums.min()), _smooth(x, y)
    floor = len(y) * (64 * np.finfo(float).eps * float(np.abs(y).max())) ** 2  # what rounding leaves of a perfect fit
    variance = max(least, floor) / freedom
    inside = places[sums <= least + stats.f.ppf(CONFIDENCE, 1, freedom) * variance]
    low = 0.0 if inside.min() == places.min() else float(2 ** inside.min())
    high = np.inf if inside.max() == places.max() else float(2 ** inside.max())
    improvement = max(smooth - least, 0.0) / 2
    p_value = 1.0 if smooth <= floor else float(stats.f.sf(improvement / variance, 2, freedom))
    before, after = np.linalg.lstsq(columns[best], y, rcond=None)[0][:2]
    return Fit(Breakpoint(float(2 ** places[best]), low, high), float(before), float(after), p_value)


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
        interval = "" if self.low is None else f" ({self.low:+.2f} to {self.high:+.2f})"
        return "-" if self.tau is None else f"{self.tau:+.2f}{interval}"


def rank_correlation(
    measure: Sequence[float | None], gap: Sequence[float | None], settings: Sequence[dict]
) -> RankCorrelation:
    """Return the rank correlation of a measure with the generalisation gap.

    The measure follows the gap where tau is near 1, and neither where its interval has 0. The interval is a percentile
    bootstrap (Efron, 1979) of 2000 resamples, 95 %. What is drawn are trainings, each with all of its iterates, which
    are not independent: minimizers whose settings differ in `epochs` alone are of one.

    Args:
        measure: Of each minimizer, (k,); those with None or NaN, where it is not resolved, take no part.
        gap: Of each minimizer, (k,), likewise: training less test accuracy.
        settings: Of each minimizer's training, by name: batch size, epochs, seed, ...

    Raises:
        UserError: Where there are not as many of each.
    """
    if not len(measure) == len(gap) == len(settings):
        raise UserError("A rank correlation needs a measure, a gap and settings for each minimizer.")
    names = list(settings[0]) if settings else []
    values = np.array(measure, float)
    known = np.flatnonzero(np.isfinite(values) & np.isfinite(np.array(gap, float)))
    x, y, settings = values[known], np.array(gap, float)[known], [settings[i] for i in known]
    tau, low, high = _tau(x, y), None, None
    if tau is not None:
        trainings = [repr({name: one for name, one in each.items() if name != "epochs"}) for each in settings]
        if len(set(trainings)) > 1:  # one tells nothing of others
            resampled = _resampled(x, y, trainings, np.random.default_rng(0))
            tail = (1 - CONFIDENCE) / 2
            low, high = (float(np.quantile(resampled, share)) for share in (tail, 1 - tail))
    return RankCorrelation(len(x), tau, low, high, {name: _granulated(x, y, settings, name) for name in names})


def _granulated(x: np.ndarray, y: np.ndarray, settings: list[dict], name: str) -> float | None:
    """Return the mean tau over the groups of minimizers whose settings differ in one only."""

    def others(i: int) -> str:
        return repr({key: value for key, value in settings[i].items() if key != name})

    groups: dict[str, list[int]] = {}
    for i in range(len(x)):
        groups.setdefault(others(i), []).append(i)
    varied = [group for group in groups.values() if len({repr(settings[i][name]) for i in group}) > 1]
    found = [_tau(x[group], y[group]) for group in varied]
    found = [tau for tau in found if tau is not None]
    return float(np.mean(found)) if found else None


def _tau(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Kendall's tau-b; None where one of the two is the same for all."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(stats.kendalltau(x, y).statistic)


def _resampled(x: np.ndarray, y: np.ndarray, trainings: list[str], random: np.random.Generator) -> np.ndarray:
    """Return tau-b of resamples of the trainings, from how often each is in one; without those of one value only."""
    names, places = np.unique(trainings, return_inverse=True)
    counts = random.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)[:, places]
    sx, sy = (np.sign(np.subtract.outer(values, values)) for values in (x, y))

    def summed(pairs: np.ndarray) -> np.ndarray:
        return ((counts @ pairs) * counts).sum(axis=1)

    length = np.sqrt(summed(sx**2) * summed(sy**2))
    return summed(sx * sy)[length > 0] / length[length > 0]
