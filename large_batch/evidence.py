"""What trials show: whether a mean is clearly above another one, and the verdicts on claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Values = Sequence[float]  # of trials
Parts = Sequence[tuple[float, Values]]  # of a weighted sum of means: the weight and the trials of each

HOLDS, DIRECTION, CONTRADICTED, OPEN = "holds", "in direction", "contradicted", "no verdict"
LEVEL = 0.05  # of the tests over trials: one-sided where only one direction gives a verdict, else two-sided
FAR = 4  # with one trial, standard errors that a difference must exceed
ONE_TRIAL, NO_GAP = f"{OPEN}: one trial", f"{OPEN}: no clear gap"
CLEAR = (
    f"the difference is clear (over trials: Welch's t-test, {LEVEL:.0%}; with one trial: {FAR} standard "
    "errors of the seeds' spread, that in Table 2 or ours if it is wider)"
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, the rule that decides it, what was found, and the verdict with its reason if need be."""

    claim: str
    rule: str
    found: str
    verdict: str

    def __str__(self) -> str:
        return f"Claim:   {self.claim}\nRule:    {self.rule}\nFound:   {self.found}\nVerdict: {self.verdict}"


def unclear(high: Values, low: Values, spread: float | None) -> str:
    """Return why it is open whether the trials of `high` lie above those of `low`; empty if they clearly do.

    `spread` is the deviation over seeds that is known from other runs, for the comparison of single trials.
    """
    return _unclear([(1, high), (-1, low)], spread, LEVEL)


def clear_side(parts: Parts, spread: float | None) -> str:
    """Return the verdict on a weighted sum of means over trials that is to be above 0.

    It holds, is contradicted where the sum is clearly below 0, or is open. `spread` is as for `unclear`.
    """
    if not _unclear([(-weight, trials) for weight, trials in parts], spread, LEVEL / 2):
        return CONTRADICTED
    return _unclear(parts, spread, LEVEL / 2) or HOLDS


def beyond(ratios: Values, far: float) -> str:
    """Return the verdict on ratios, one of each trial, that are to be above 1: by their logarithms.

    A single one must be above `far`, or below 1 / `far`.
    """
    return clear_side([(1, np.log(ratios))], np.log(far) / FAR)


def _unclear(parts: Parts, spread: float | None, level: float) -> str:
    """Return why it is open whether a weighted sum of means over trials is above 0; empty if it clearly is.

    The one-sided test is Welch's, for any weights (Satterthwaite, 1946).
    """
    total = float(sum(weight * np.mean(trials) for weight, trials in parts))
    counts = np.array([len(trials) for _, trials in parts])
    if counts.min() > 1:
        if all(np.ptp(trials) == 0 for _, trials in parts):
            return "" if total > 0 else f"{OPEN}: there is no difference"
        variances = np.array([weight**2 * np.var(trials, ddof=1) for weight, trials in parts]) / counts
        freedom = variances.sum() ** 2 / np.sum(variances**2 / (counts - 1))
        p_value = stats.t.sf(total / np.sqrt(variances.sum()), freedom)
        return "" if p_value < level else f"{OPEN}: the difference is within the spread of the trials"
    errors = np.sqrt(sum(weight**2 / count for (weight, _), count in zip(parts, counts, strict=True)))
    return "" if spread is not None and total > FAR * spread * errors else ONE_TRIAL


def helps(small: Values, large: Values, other: Values, spread: float | None) -> str:
    """Return the verdict on LB with a remedy, that it is better than plain LB."""
    return clear_side([(1, other), (-1, large)], spread)


def does_not_help(small: Values, large: Values, other: Values, spread: float | None) -> str:
    """Return the verdict on LB with a remedy, that it is no better than plain LB: it closes less than half of the gap.

    It is contradicted where the remedy helps, as above, and in direction where it does harm by more than the gap.
    """
    if helps(small, large, other, spread) == HOLDS:
        return f"{CONTRADICTED}: it is better than plain LB"
    if verdict := _no_gap(small, large, spread):
        return verdict
    verdict = clear_side([(0.5, small), (0.5, large), (-1, other)], spread)
    lost, gap = (float(np.mean(one) - np.mean(large)) for one in (other, small))
    return f"{DIRECTION}: worse than plain LB" if verdict == HOLDS and -lost > gap else verdict


def is_alike(small: Values, large: Values, other: Values, spread: float | None) -> str:
    """Return the verdict on LB of another optimizer, that it is as LB with ADAM: to less than half of the gap."""
    if verdict := _no_gap(small, large, spread):
        return verdict
    better, worse = [(0.5, small), (0.5, large), (-1, other)], [(0.5, small), (-1.5, large), (1, other)]
    verdicts = [clear_side(parts, spread) for parts in (better, worse)]
    for verdict, word in zip(verdicts, ("better", "worse"), strict=True):
        if verdict == CONTRADICTED:
            return f"{verdict}: it is {word}"
    return next((verdict for verdict in verdicts if verdict != HOLDS), HOLDS)


def closes_the_gap(small: Values, large: Values, other: Values, small_too: Values, spread: float | None) -> str:
    """Return the verdict on a remedy of both, that between them less than half of the gap is left."""
    if verdict := _no_gap(small, large, spread):
        return verdict
    return clear_side([(0.5, small), (-0.5, large), (1, other), (-1, small_too)], spread)


def _no_gap(small: Values, large: Values, spread: float | None) -> str:
    """Return why SB is not clearly above LB; empty if it is."""
    why = unclear(small, large, spread)
    return NO_GAP if why and why != ONE_TRIAL else why
