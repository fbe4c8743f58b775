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
    f"the difference is clear (over trials: Welch's t-test, {LEVEL:.0%}; with one trial, or where that says more: "
    f"{FAR} standard errors of the seeds' spread, the widest of that in Table 2, ours, and that of these trials)"
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

    `spread` is the deviation over seeds that is known from other runs, without which single trials tell nothing.
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
    return clear_side([(1, np.log(ratios))], np.log(far) / FAR if len(ratios) == 1 else None)


def _unclear(parts: Parts, spread: float | None, level: float) -> str:
    """Return why it is open whether a weighted sum of means over trials is above 0; empty if it clearly is.

    The one-sided test is Welch's, for any weights (Satterthwaite, 1946). As it sees little in a few trials, the spread
    that is known from other runs counts, too, unless these trials differ by more.
    """
    total = float(sum(weight * np.mean(trials) for weight, trials in parts))
    counts, why = np.array([len(trials) for _, trials in parts]), ONE_TRIAL
    if counts.min() > 1:
        if all(np.ptp(trials) == 0 for _, trials in parts):
            return "" if total > 0 else f"{OPEN}: there is no difference"
        each = np.array([np.var(trials, ddof=1) for _, trials in parts])
        variances = np.array([weight**2 for weight, _ in parts]) * each / counts
        freedom = variances.sum() ** 2 / np.sum(variances**2 / (counts - 1))
        if stats.t.sf(total / np.sqrt(variances.sum()), freedom) < level:
            return ""
        spread = spread and max(spread, np.sqrt(each.mean()))
        why = f"{OPEN}: the difference is within the spread of the trials"
    errors = np.sqrt(sum(weight**2 / count for (weight, _), count in zip(parts, counts, strict=True)))
    return "" if spread is not None and total > FAR * spread * errors else why


def helps(small: Values, large: Values, other: Values, spread: float | None) -> str:
    """Return the verdict on LB with a remedy, that it is better than plain LB."""
    return clear_side([(1, other), (-1, large)], spread)


def does_not_help(small: Values, large: Values, other: Values, spread: float | None) -> str:
    """Return the verdict on LB with a remedy, that it is no better than plain LB: it closes less than half of the gap.

    It is contradicted where the remedy helps, as above. It is in direction where that is by less than half of the gap,
    and where the remedy does harm by more than the gap.
    """
    better, gap = helps(small, large, other, spread) == HOLDS, _no_gap(small, large, spread)
    by_half = gap or clear_side([(0.5, small), (0.5, large), (-1, other)], spread)
    if better:
        small_gain = f"{DIRECTION}: it helps, but by less than half of the gap"
        return small_gain if by_half == HOLDS else f"{CONTRADICTED}: it is better than plain LB"
    harm = np.mean(large) - np.mean(other) > np.mean(small) - np.mean(large)
    return f"{DIRECTION}: worse than plain LB" if by_half == HOLDS and harm else by_half


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
