"""Where a curve over the batch size changes, with a confidence interval and a test against no change.

Each fit is by least squares over log2(x); independent errors of one variance are assumed.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


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

    def overlaps(self, other: "Breakpoint") -> bool:
        """Say whether the intervals have something in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Fit:
    """A shape over log2(x), fitted by least squares: `before` and `after` tell it on both sides of where it changes.

    They are levels in units of y for `plateaus`, and slopes in y per doubling of x for `two_segments`. `p_value` is the
    probability of so much an improvement over one straight line by chance.
    """

    breakpoint: Breakpoint
    before: float
    after: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Say whether one straight line is excluded."""
        return self.p_value < 1 - CONFIDENCE


STEPS = 16  # a doubling of x, at which changes are tried


def _enough(x: np.ndarray) -> bool:
    return len(x) >= 5 and len(np.unique(x)) >= 4


def _grid(sizes: np.ndarray) -> np.ndarray:
    """Return the places that are tried, log2: the sizes themselves, and others between them."""
    return np.union1d(np.linspace(sizes[0], sizes[-1], 1 + round(STEPS * (sizes[-1] - sizes[0]))), sizes)


def _judged(x: np.ndarray, y: np.ndarray, places: np.ndarray, sums: np.ndarray, before: float, after: float) -> Fit:
    """Return the fit with four parameters whose change is at one of `places` (log2), where the least sum of squares is
    that of `sums`, both of shape (c,).

    The interval holds the places that an F-test does not reject: those whose sum of squares exceeds the least one by
    less than the F quantile with 1 and k - 4 degrees of freedom, in units of the residual variance.
    """
    freedom, least = len(x) - 4, float(sums.min())
    line = float(np.sum((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2))
    floor = len(y) * (8 * np.finfo(float).eps * float(np.abs(y).max())) ** 2  # what rounding leaves of a perfect fit
    variance = max(least, floor) / freedom
    inside = sums <= least + stats.f.ppf(CONFIDENCE, 1, freedom) * variance
    low = 0.0 if inside[0] else float(2 ** places[inside][0])
    high = np.inf if inside[-1] else float(2 ** places[inside][-1])
    improvement = max(line - least, 0.0) / 2
    p_value = 1.0 if line <= floor else float(stats.f.sf(improvement / variance, 2, freedom))
    return Fit(Breakpoint(float(2 ** places[np.argmin(sums)]), low, high), before, after, p_value)


def plateaus(x: np.ndarray, y: np.ndarray) -> Fit | None:
    """Fit two levels with a straight passage between them to y over log2(x), both of shape (k,); the place is where the
    first level ends. None for fewer than 5 points or 4 different x.

    Both a sudden step and a decline that goes on to the last point are such shapes, and so is one line. At least two
    different x lie beyond the place.
    """
    if not _enough(x):
        return None
    x, y = np.log2(np.asarray(x, float)), np.asarray(y, float)
    sizes = np.unique(x)
    grid = _grid(sizes)
    begins = grid[grid < sizes[-2] - 1e-9]

    def fits(begin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sums of squares, by the end of the passage, and the first levels and changes."""
        ends = grid[grid > begin]
        shapes = np.clip((x - begin) / (ends - begin)[:, None], 0, 1)
        centred = shapes - shapes.mean(axis=1, keepdims=True)
        changes = centred @ y / np.sum(centred**2, axis=1)
        levels = y.mean() - changes * shapes.mean(axis=1)
        return np.sum((y - levels[:, None] - changes[:, None] * shapes) ** 2, axis=1), levels, changes

    sums = np.array([fits(begin)[0].min() for begin in begins])
    of_ends, levels, changes = fits(begins[np.argmin(sums)])
    best = np.argmin(of_ends)
    return _judged(x, y, begins, sums, float(levels[best]), float(levels[best] + changes[best]))


def two_segments(x: np.ndarray, y: np.ndarray) -> Fit | None:
    """Fit a continuous line of two straight segments to y over log2(x), both of shape (k,); the place is where they
    meet. None for fewer than 5 points or 4 different x. Each segment has at least two different x."""
    if not _enough(x):
        return None
    x, y = np.log2(np.asarray(x, float)), np.asarray(y, float)
    sizes = np.unique(x)

    def fit(at: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones_like(x), np.minimum(x - at, 0), np.maximum(x - at, 0)], axis=1)
        coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
        return float(np.sum((y - columns @ coefficients) ** 2)), coefficients

    grid = _grid(sizes[1:-1])
    sums = np.array([fit(at)[0] for at in grid])
    _, (_, before, after) = fit(grid[np.argmin(sums)])
    return _judged(x, y, grid, sums, float(before), float(after))
