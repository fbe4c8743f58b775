"""The claims that the commands judge (sections 2.2, 3 and 4 of the paper), and the cells of its tables, as rules.

A claim says what is claimed, by which rule it is judged, what was found, and the verdict. Accuracies are in percent,
sharpness is Metric 2.1 in percent, and NaN where it is not resolved. tests/test_claims.py measures by simulation how
often each rule errs, and how often it finds what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from large_batch import paper, trends
from large_batch.evidence import (
    CLEAR,
    CONTRADICTED,
    DIRECTION,
    FAR,
    HOLDS,
    LEVEL,
    OPEN,
    Claim,
    beyond,
    clear_side,
    unclear,
)
from large_batch.trends import Breakpoint


def early_stopping(small: list[list[float]], large: list[list[float]], spread: float | None = None) -> Claim:
    """Judge section 2.2 with Figure 2.

    Args:
        small: SB's test accuracies by epoch, of each trial.
        large: LB's.
        spread: deviation of the test accuracy over seeds that is known from other runs, for single trials.
    """
    ends = {"SB": [trends.final(curve) for curve in small], "LB": [trends.final(curve) for curve in large]}
    gains = [trends.best(curve) - end for curve, end in zip(large, ends["LB"], strict=True)]
    gap, gain = float(np.mean(ends["SB"]) - np.mean(ends["LB"])), float(np.mean(gains))
    found = f"at the end SB reaches {_percent(ends['SB'])}, LB {_percent(ends['LB'])}, a gap of {gap:.2f} points"
    if gap > 0:
        found += f"; stopping LB at its best gains {gain:.2f} points, {100 * gain / gap:.0f} % of the gap"
    # Less than half of the gap is gained where twice as much would not lift LB to SB
    lifted = [end + 2 * gained for end, gained in zip(ends["LB"], gains, strict=True)]
    return Claim(
        "The test accuracy does not peak and decay, so early stopping would not close the generalisation gap (section "
        "2.2, Figure 2).",
        "LB's best accuracy, smoothed over a fifth of the epochs, exceeds that at the end, the mean of the last fifth, "
        f"by less than half of the gap between SB and LB. For the gap, and between that gain and half of it, {CLEAR}.",
        found,
        unclear(ends["SB"], ends["LB"], spread) or clear_side([(1, ends["SB"]), (-1, lifted)], spread),
    )


def _percent(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation} %"


ONE_TRIAL_RATIO = 1.5  # with one trial, what a ratio of distances must exceed


def distances(ratios: list[float]) -> Claim:
    """Judge section 3 from ||x_S - x_0|| / ||x_L - x_0|| of each trial."""
    low, high = paper.DISTANCE_RATIO
    mean = float(np.mean(ratios))
    verdict = beyond(ratios, ONE_TRIAL_RATIO)
    if verdict == HOLDS and not low <= mean <= high:
        verdict = f"{DIRECTION}: {'less' if mean < low else 'more'} than in the paper"
    elif verdict == CONTRADICTED:
        verdict += ": SB does not go further"
    return Claim(
        f"SB goes {low} to {high} times as far from the starting point as LB (section 3).",
        f"||x_S - x_0|| / ||x_L - x_0||, the mean over the trials, lies between {low} and {high} and clearly "
        f"above 1 (t-test of the logarithm, two-sided, {LEVEL:.0%}; with one trial: above {ONE_TRIAL_RATIO}).",
        str(paper.Spread.of(ratios)),
        verdict,
    )


@dataclass(frozen=True)
class Iterates:
    """Iterates of a training in order of their epochs, arrays of shape (k,): cross-entropy (nats) and sharpness."""

    loss: np.ndarray
    sharpness: np.ndarray

    def sharpness_at(self, loss: float) -> float:
        """Interpolate the sharpness at a loss, on logarithmic scales."""
        order = np.argsort(self.loss)
        logs = np.interp(np.log(loss), np.log(self.loss[order]), np.log(self.sharpness[order]))
        return float(np.exp(logs))

    def resolved(self) -> "Iterates":
        """Return the iterates whose sharpness is known."""
        known = ~np.isnan(self.sharpness)
        return Iterates(self.loss[known], self.sharpness[known])

    @property
    def late_sharpness(self) -> float:
        """Geometric mean over the last third of the iterates."""
        return stats.gmean(self.sharpness[-(-2 * len(self.sharpness) // 3) :])


def sharpness_paths(small: Iterates, large: Iterates, epsilon: float, spread: float | None) -> Claim:
    """Judge section 3 with Figure 6, from one training each; the first iterate of both is the starting point.

    `spread` is the deviation over seeds of the logarithm of LB's sharpness per SB's that is known from other runs.
    """
    left_out = int(np.isnan(small.sharpness).sum() + np.isnan(large.sharpness).sum())
    note = f"; {left_out} iterates are left out, whose sharpness is not resolved" if left_out else ""
    start_known = not np.isnan(large.sharpness[0])
    small, large = small.resolved(), large.resolved()
    if start_known and min(len(small.loss), len(large.loss)) >= 3:
        found, verdict = _compared(small, large, spread)
    else:
        found, verdict = "too few iterates", f"{OPEN}: a start and two more iterates are needed"
    return Claim(
        "As the loss falls, LB iterates become sharper, while SB iterates stay as they are and then become flatter "
        "(section 3, Figure 6).",
        "In the last third of the iterates (geometric mean) LB is more than twice as sharp as the starting point, SB "
        "less than half as sharp as at its own sharpest iterate, and at the lowest loss that both reach LB is more "
        f"than twice as sharp as SB, and, as one training says little, by {FAR} deviations of the seeds in Table 3.",
        f"at epsilon {epsilon:g}: {found}{note}",
        verdict,
    )


def _compared(small: Iterates, large: Iterates, spread: float | None) -> tuple[str, str]:
    """Return what two paths show, in words, and the verdict."""
    level = max(small.loss[1:].min(), large.loss[1:].min())
    rise = large.late_sharpness / large.sharpness[0]
    fall = small.late_sharpness / small.sharpness.max()
    ratio = large.sharpness_at(level) / small.sharpness_at(level)
    parts = {
        "LB does not become twice as sharp": rise > 2,
        "SB not half as sharp": fall < 1 / 2,
        "at equal loss LB is not twice as sharp": ratio > 2,
    }
    missing = [words for words, true in parts.items() if not true]
    verdict = clear_side([(1, [np.log(ratio)])], spread)
    if verdict == HOLDS and missing:
        verdict = f"{DIRECTION}: {', '.join(missing)}"
    elif verdict == CONTRADICTED:
        verdict += ": at equal loss SB is the sharper one"
    return (
        f"late LB has {rise:.3g} times the sharpness of the start, late SB {fall:.3g} of its largest; at loss "
        f"{level:.3g} LB is {ratio:.3g} times as sharp as SB, of one training each",
        verdict,
    )


NOT_BETTER = f"{OPEN}: it does not fit significantly better than a smooth curve"
BETTER = f"significantly better (F-test, {LEVEL:.0%}) than any line, parabola or power of the batch size"
TOO_FEW = f"{OPEN}: at least 5 trainings with 4 batch sizes are needed"


def accuracy_threshold(
    sizes: np.ndarray, accuracies: np.ndarray, published: int | None
) -> tuple[Claim, Breakpoint | None]:
    """Judge section 3 with Figure 4, from the test accuracy at each batch size, trials among them; return the threshold
    too, if there is one."""
    fit = trends.plateaus(sizes, accuracies)
    if fit is None:
        found, verdict = f"{len(sizes)} trainings", TOO_FEW
    else:
        found = f"{fit.before:.2f} % up to {fit.breakpoint}, {fit.after:.2f} % in the end; p = {fit.p_value:.2g}"
        if published:
            inside = fit.breakpoint.low <= published <= fit.breakpoint.high
            found += f"; the paper's threshold, about {published:,}, lies {'in' if inside else 'out'}side the interval"
        trend = stats.linregress(np.log2(sizes), accuracies)
        if trend.slope > 0 and trend.pvalue < LEVEL:
            verdict = f"{CONTRADICTED}: the accuracy rises"
        elif not fit.significant:
            verdict = NOT_BETTER
        elif fit.after >= fit.before:
            verdict = f"{CONTRADICTED}: the accuracy does not fall"
        elif fit.breakpoint.at < 0.999 * np.unique(sizes)[1]:
            verdict = f"{CONTRADICTED}: the accuracy falls from the smallest batches on"
        else:
            verdict = HOLDS
    claim = Claim(
        "There is a batch size after which the test accuracy falls (section 3, Figure 4).",
        f"A level, a straight fall and another level over log2(batch size) fit {BETTER}, and the first level holds for "
        "more than the smallest size.",
        found,
        verdict,
    )
    return claim, fit.breakpoint if fit and verdict == HOLDS else None


def sharpness_threshold(
    sizes: np.ndarray, sharpness: np.ndarray, epsilon: float, threshold: Breakpoint | None
) -> Claim:
    """Judge section 3 with Figure 4, from the sharpness at each batch size, trials among them, and the threshold of the
    accuracy, if there is one."""
    known = ~np.isnan(sharpness)
    note = f"; {(~known).sum()} values are left out, which are not resolved" if not known.all() else ""
    fit = trends.two_segments(sizes[known], np.log10(sharpness[known]))
    if fit is None:
        found, verdict = f"at epsilon {epsilon:g}: {known.sum()} values", TOO_FEW
    else:
        found = (
            f"at epsilon {epsilon:g}: {fit.before:+.2g} decades a doubling up to {fit.breakpoint}, {fit.after:+.2g} "
            f"then; p = {fit.p_value:.2g}"
        )
        if not fit.significant:
            verdict = NOT_BETTER
        elif fit.before <= max(fit.after, 0):
            verdict = f"{CONTRADICTED}: the sharpness does not rise faster before it"
        elif threshold is None:
            verdict = f"{DIRECTION}: the rise becomes slower, but the accuracy has no threshold here"
        else:
            verdict = HOLDS if fit.breakpoint.overlaps(threshold) else f"{DIRECTION}: not around the threshold"
    return Claim(
        "The sharpness rises with the batch size, and around the threshold this rise becomes slower (section 3, Figure "
        "4).",
        f"Two segments of log10(sharpness) over log2(batch size) fit {BETTER}, the first rises, and faster than the "
        "second, and the interval of where they meet overlaps that of the accuracy's threshold.",
        found + note,
        verdict,
    )


def warm_starts(
    epochs: np.ndarray,
    accuracies: np.ndarray,
    small: Sequence[float],
    large: Sequence[float],
    sharpness: dict[float, np.ndarray],
    spread: float | None = None,
) -> Claim:
    """Judge section 3 with Figure 5.

    Args:
        epochs: of SB before each warm start, of shape (k,).
        accuracies: test accuracy of the LB minimizers from there, of shape (trials, k).
        small: test accuracy of SB alone, of each trial.
        large: that of LB alone.
        sharpness: by epsilon, of the warm-started minimizers, of shape (trials, k).
        spread: deviation of the test accuracy over seeds that is known from other runs, for single trials.
    """
    # One mean of each trial: the starts of a seed are alike, and tell no more of other seeds than one of them
    early, late = epochs <= epochs.max() / 10, epochs > 2 * epochs.max() / 3
    by_early, by_late = (accuracies[:, part].mean(axis=1) if part.any() else np.empty(0) for part in (early, late))
    falls = {}
    for epsilon, values in sharpness.items():
        known = ~np.isnan(values)
        if (known & early).any() and (known & late).any():
            falls[epsilon] = stats.gmean(values[known & late]) / stats.gmean(values[known & early])
    if not (verdict := unclear(small, large, spread)):
        verdict = _warm(by_early, by_late, small, large, list(falls.values()), spread)
    found = f"SB alone {_percent(small)}, LB alone {_percent(large)}"
    if len(by_early):
        found += f", early warm starts {_percent(by_early)}"
    found += f", late ones {_percent(by_late)}"
    if falls:
        flatter = " and ".join(f"{fall:.3g} times (epsilon {epsilon:g})" for epsilon, fall in falls.items())
        found += f"; late ones are {flatter} as sharp as early ones"
    return Claim(
        "Warm-started after a few epochs, LB does not generalise better; warm-started late, it does, and its "
        "minimizers are flatter (section 3, Figure 5).",
        "Warm starts in the last third of the SB epochs gain more than half of the gap between LB alone and SB alone, "
        "those in the first tenth less, and the late ones are flatter (geometric mean, at each epsilon). For the gap, "
        f"and between early and late ones and half of it, {CLEAR}.",
        found,
        verdict,
    )


def above_half(trials: Sequence[float], small: Sequence[float], large: Sequence[float], spread: float | None) -> str:
    """Return the verdict on LB of some kind, that it closes more than half of the gap between LB alone and SB alone."""
    return clear_side([(1, trials), (-0.5, small), (-0.5, large)], spread)


def _warm(
    early: Sequence[float],
    late: Sequence[float],
    small: Sequence[float],
    large: Sequence[float],
    falls: list[float],
    spread: float | None,
) -> str:
    """Return the verdict on each trial's accuracy from early and late warm starts: late ones help, early ones do not.

    The sharpness goes with it: `falls` has how many times as sharp late ones are, at each epsilon.
    """
    if not len(early):
        return f"{OPEN}: there is no warm start in the first tenth of the SB epochs"
    by_early, by_late = (above_half(trials, small, large, spread) for trials in (early, late))
    if by_late != HOLDS:
        return f"{CONTRADICTED}: late ones do not help" if by_late == CONTRADICTED else by_late
    if by_early == HOLDS:
        if unclear(late, early, spread):
            return f"{CONTRADICTED}: early ones help as well"
        return f"{DIRECTION}: late ones help more, but early ones help, too"
    if by_early != CONTRADICTED:
        return by_early
    if not falls:
        return f"{DIRECTION}: nothing is known of the sharpness"
    return HOLDS if max(falls) < 1 else f"{DIRECTION}: late ones are not flatter"


def switching(
    curves: dict[str, list[list[float]]], sharpness: dict[float, dict[str, float]], spread: float | None = None
) -> Claim:
    """Judge section 4 from the test accuracies by epoch of each trial and, by epsilon, the sharpness of "SB" alone,
    "LB" alone and a "growing" batch, at equal epochs.

    `spread` is the deviation of the test accuracy over seeds that is known from other runs, for single trials.
    """
    ends = {regime: [trends.final(curve) for curve in trials] for regime, trials in curves.items()}
    gap, gain = (float(np.mean(ends[regime]) - np.mean(ends["LB"])) for regime in ("SB", "growing"))
    verdict = unclear(ends["SB"], ends["LB"], spread) or above_half(ends["growing"], ends["SB"], ends["LB"], spread)
    found = ", ".join(f"{regime} {_percent(values)}" for regime, values in ends.items())
    if gap > 0:
        found += f": the growing batch closes {100 * gain / gap:.0f} % of the gap"
    for epsilon, values in sharpness.items():
        found += f"; sharpness at epsilon {epsilon:g}: "
        found += ", ".join(f"{regime} {value:.3g}" for regime, value in values.items())
    return Claim(
        "Starting with small batches and letting them grow may remedy the generalisation gap (section 4).",
        "At equal epochs a batch that grows closes more than half of the gap between LB alone and SB alone (means of "
        f"the last fifth of the epochs). For the gap, and between growing and half of it, {CLEAR}.",
        found,
        verdict,
    )


def agreement(
    ours: Sequence[float | None],
    theirs: paper.Spread | None,
    beside: Sequence[float | None] = (),
    theirs_beside: paper.Spread | None = None,
) -> str:
    """Judge a cell of the paper's tables.

    Args:
        ours: The values of our trials, None for one that is missing.
        theirs: The paper's mean and deviation.
        beside: The values of the minimizer that it is compared with for the direction: LB for SB, and so on.
        theirs_beside: The paper's of that one.

    Returns:
        "agrees" where the means differ by at most 3 times the wider of the two standard deviations; else "same
        direction" or "contradicts", by the side on which it lies of what it is compared with; "no verdict" where that
        is not clear (Welch's test; single trials by the paper's wider deviation), and where a trial, or what it would
        be compared with, is missing.
    """
    if theirs is None or not ours or _missing(ours):
        return OPEN
    found = paper.Spread.of(ours)
    widest = max(found.deviation or 0.0, theirs.deviation or 0.0)
    if abs(found.mean - theirs.mean) <= 3 * widest:
        return "agrees"
    if theirs_beside is None or not beside or _missing(beside):
        return OPEN
    as_theirs = 1 if theirs.mean > theirs_beside.mean else -1
    single = min(len(ours), len(beside)) == 1
    spread = max(theirs.deviation or 0.0, theirs_beside.deviation or 0.0) if single else None
    side = clear_side([(as_theirs, ours), (-as_theirs, beside)], spread)
    return {HOLDS: "same direction", CONTRADICTED: "contradicts"}.get(side, OPEN)


def _missing(values: Sequence[float | None]) -> bool:
    return any(value is None or np.isnan(value) for value in values)
