"""The claims of section 3 of the paper as rules on numbers: what is claimed, what was found, and a verdict.

Each rule is stated in the claim. Accuracies are in percent, sharpness is Metric 2.1 in percent, and NaN where it is not
resolved. tests/test_claims.py measures by simulation how often each rule errs, and how often it finds what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from large_batch import paper, trends
from large_batch.trends import Breakpoint

HOLDS, DIRECTION, CONTRADICTED, OPEN = "holds", "in direction", "contradicted", "no verdict"
LEVEL = 0.05  # of the tests over trials: one-sided where only one direction gives a verdict, else two-sided
FAR = 4  # with one trial, standard errors that a difference must exceed
FAR_SHARPER = 18  # the same of LB's sharpness per SB's, whose logarithm deviates by 0.72 over F1's five seeds (Table 3)
ONE_TRIAL = f"{OPEN}: one trial"
CLEAR = (
    f"the difference is clear (over trials: Welch's t-test, {LEVEL:.0%}; with one trial: {FAR} standard "
    "errors of the seeds' spread in Table 2)"
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


def unclear(high: Sequence[float], low: Sequence[float], spread: float | None) -> str:
    """Return why it is open whether the trials of `high` lie above those of `low`; empty if they clearly do.

    `spread` is the deviation over seeds that is known from other runs, for the comparison of single trials.
    """
    return _unclear([(1, high), (-1, low)], spread, LEVEL)


def clear_side(parts: Sequence[tuple[float, Sequence[float]]], spread: float | None) -> str:
    """Return the verdict on a weighted sum of means over trials that is to be above 0: it holds, is contradicted where
    the sum is clearly below 0, or is open. `parts` has the weight and the trials of each mean, `spread` is as above."""
    if not _unclear([(-weight, trials) for weight, trials in parts], spread, LEVEL / 2):
        return CONTRADICTED
    return _unclear(parts, spread, LEVEL / 2) or HOLDS


def beyond(ratios: Sequence[float], far: float) -> str:
    """Return the verdict on ratios, one of each trial, that are to be above 1: by their logarithms.

    A single one must be above `far`, or below 1 / `far`.
    """
    return clear_side([(1, np.log(ratios))], np.log(far) / FAR)


def _unclear(parts: Sequence[tuple[float, Sequence[float]]], spread: float | None, level: float) -> str:
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


def early_stopping(small: list[list[float]], large: list[list[float]], spread: float | None = None) -> Claim:
    """Judge section 2.2 with Figure 2.

    Args:
        small: SB's test accuracies by epoch, of each trial.
        large: LB's.
        spread: deviation of the test accuracy over seeds that is known from other runs, for single trials.
    """
    ends = {"SB": [trends.final(curve) for curve in small], "LB": [trends.final(curve) for curve in large]}
    gap = float(np.mean(ends["SB"]) - np.mean(ends["LB"]))
    lost = float(np.mean([trends.best(curve) for curve in large]) - np.mean(ends["LB"]))
    found = f"at the end SB reaches {_percent(ends['SB'])}, LB {_percent(ends['LB'])}, a gap of {gap:.2f} points"
    if gap > 0:
        found += f"; stopping LB at its best gains {lost:.2f} points, {100 * lost / gap:.0f} % of the gap"
    return Claim(
        "The test accuracy does not peak and decay, so early stopping would not close the generalisation gap (section "
        "2.2, Figure 2).",
        "LB's best accuracy, smoothed over a fifth of the epochs, exceeds that at the end, the mean of the last fifth, "
        f"by less than half of the gap between SB and LB, and {CLEAR}.",
        found,
        unclear(ends["SB"], ends["LB"], spread) or (HOLDS if lost < gap / 2 else CONTRADICTED),
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
class Path:
    """Iterates of a training in order of their epochs, arrays of shape (k,): cross-entropy (nats) and sharpness."""

    loss: np.ndarray
    sharpness: np.ndarray

    def sharpness_at(self, loss: float) -> float:
        """Interpolate the sharpness at a loss, on logarithmic scales."""
        order = np.argsort(self.loss)
        logs = np.interp(np.log(loss), np.log(self.loss[order]), np.log(self.sharpness[order]))
        return float(np.exp(logs))

    def resolved(self) -> "Path":
        """Return the iterates whose sharpness is known."""
        known = ~np.isnan(self.sharpness)
        return Path(self.loss[known], self.sharpness[known])

    @property
    def late_sharpness(self) -> float:
        """Geometric mean over the last third of the iterates."""
        return _geometric_mean(self.sharpness[-(-2 * len(self.sharpness) // 3) :])


def _geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(values))))


def sharpness_paths(small: Path, large: Path, epsilon: float) -> Claim:
    """Judge section 3 with Figure 6, from one training each; the first iterate of both is the starting point."""
    text = (
        "As the loss falls, LB iterates become sharper, while SB iterates stay as they are and then become flatter "
        "(section 3, Figure 6)."
    )
    rule = (
        "In the last third of the iterates (geometric mean) LB is more than twice as sharp as the starting point, SB "
        "less than half as sharp as at its own sharpest iterate, and at the lowest loss that both reach LB is, of one "
        f"training each, {FAR_SHARPER} times as sharp as SB."
    )
    left_out = int(np.isnan(small.sharpness).sum() + np.isnan(large.sharpness).sum())
    note = f"; {left_out} iterates are left out, whose sharpness is not resolved" if left_out else ""
    start_known = not np.isnan(large.sharpness[0])
    small, large = small.resolved(), large.resolved()
    if not start_known or min(len(small.loss), len(large.loss)) < 3:
        return Claim(
            text,
            rule,
            f"at epsilon {epsilon:g}: too few iterates{note}",
            f"{OPEN}: a start and two more iterates are needed",
        )
    level = max(small.loss[1:].min(), large.loss[1:].min())
    at_small, at_large = small.sharpness_at(level), large.sharpness_at(level)
    rise = large.late_sharpness / large.sharpness[0]
    fall = small.late_sharpness / small.sharpness.max()
    missing = [
        words
        for words, true in {"LB does not become twice as sharp": rise > 2, "SB not half as sharp": fall < 1 / 2}.items()
        if not true
    ]
    verdict = beyond([at_large / at_small], FAR_SHARPER)
    if verdict == HOLDS and missing:
        verdict = f"{DIRECTION}: {', '.join(missing)}"
    elif verdict == CONTRADICTED:
        verdict += ": at equal loss SB is the sharper one"
    found = (
        f"at epsilon {epsilon:g}: late LB has {rise:.3g} times the sharpness of the start, late SB {fall:.3g} of its "
        f"largest; at loss {level:.3g} LB is {at_large / at_small:.3g} times as sharp as SB, of one training each{note}"
    )
    return Claim(text, rule, found, verdict)


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
        epochs: of SB before each warm start, of shape (k,), all trials among them.
        accuracies: test accuracy of the LB minimizers from there, of shape (k,).
        small: test accuracy of SB alone, of each trial.
        large: that of LB alone.
        sharpness: by epsilon, of the warm-started minimizers, of shape (k,).
        spread: deviation of the test accuracy over seeds that is known from other runs, for single trials.
    """
    early, late = epochs <= epochs.max() / 10, epochs > 2 * epochs.max() / 3
    gap = float(np.mean(small) - np.mean(large))
    gain_early, gain_late = (
        float(np.mean(accuracies[group]) - np.mean(large)) if group.any() else np.nan for group in (early, late)
    )
    falls = {}
    for epsilon, values in sharpness.items():
        known = ~np.isnan(values)
        if (known & early).any() and (known & late).any():
            falls[epsilon] = _geometric_mean(values[known & late]) / _geometric_mean(values[known & early])
    # The claim is that late starts help where early ones do not; the sharpness goes with it
    if verdict := unclear(small, large, spread):
        pass
    elif not early.any():
        verdict = f"{OPEN}: there is no warm start in the first tenth of the SB epochs"
    elif gain_late <= gap / 2:
        verdict = f"{CONTRADICTED}: late ones do not help"
    elif open_still := unclear(accuracies[late], accuracies[early], spread):
        verdict = f"{CONTRADICTED}: early ones help as well" if gain_early > gap / 2 else open_still
    elif gain_early > gap / 2:
        verdict = f"{DIRECTION}: late ones help more, but early ones help, too"
    elif not falls:
        verdict = f"{DIRECTION}: nothing is known of the sharpness"
    else:
        verdict = HOLDS if max(falls.values()) < 1 else f"{DIRECTION}: late ones are not flatter"
    found = f"SB alone {_percent(small)}, LB alone {_percent(large)}"
    if early.any():
        found += f", early warm starts {_percent(accuracies[early])}"
    found += f", late ones {_percent(accuracies[late])}"
    if falls:
        flatter = " and ".join(f"{fall:.3g} times (epsilon {epsilon:g})" for epsilon, fall in falls.items())
        found += f"; late ones are {flatter} as sharp as early ones"
    return Claim(
        "Warm-started after a few epochs, LB does not generalise better; warm-started late, it does, and its "
        "minimizers are flatter (section 3, Figure 5).",
        "Warm starts in the last third of the SB epochs gain more than half of the gap between LB alone and SB alone, "
        "those in the first tenth less, and the late ones are flatter (geometric mean, at each epsilon). Both for the "
        f"gap and between late and early ones {CLEAR}.",
        found,
        verdict,
    )


def switching(
    curves: dict[str, list[list[float]]], sharpness: dict[float, dict[str, float]], spread: float | None = None
) -> Claim:
    """Judge section 4 from the test accuracies by epoch of each trial and, by epsilon, the sharpness of "SB" alone,
    "LB" alone and a "growing" batch, at equal epochs.

    `spread` is the deviation of the test accuracy over seeds that is known from other runs, for single trials.
    """
    ends = {regime: [trends.final(curve) for curve in trials] for regime, trials in curves.items()}
    gap, gain = (float(np.mean(ends[regime]) - np.mean(ends["LB"])) for regime in ("SB", "growing"))
    if not (verdict := unclear(ends["SB"], ends["LB"], spread)):
        verdict = CONTRADICTED if gain <= gap / 2 else unclear(ends["growing"], ends["LB"], spread) or HOLDS
    found = ", ".join(f"{regime} {_percent(values)}" for regime, values in ends.items())
    if gap > 0:
        found += f": the growing batch closes {100 * gain / gap:.0f} % of the gap"
    for epsilon, values in sharpness.items():
        found += f"; sharpness at epsilon {epsilon:g}: "
        found += ", ".join(f"{regime} {value:.3g}" for regime, value in values.items())
    return Claim(
        "Starting with small batches and letting them grow may remedy the generalisation gap (section 4).",
        "At equal epochs a batch that grows closes more than half of the gap between LB alone and SB alone (means of "
        f"the last fifth of the epochs). Both for the gap and between growing and LB alone {CLEAR}.",
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
        is not clear (`unclear`, single trials by the paper's wider deviation), and where a trial, or what it would be
        compared with, is missing.
    """
    if theirs is None or not ours or _missing(ours):
        return OPEN
    found = paper.Spread.of(ours)
    widest = max(found.deviation or 0.0, theirs.deviation or 0.0)
    if abs(found.mean - theirs.mean) <= 3 * widest:
        return "agrees"
    if theirs_beside is None or not beside or _missing(beside):
        return OPEN
    above, theirs_above = found.mean > np.mean(beside), theirs.mean > theirs_beside.mean
    spread = max(theirs.deviation or 0.0, theirs_beside.deviation or 0.0)
    if unclear(*((ours, beside) if above else (beside, ours)), spread):
        return OPEN
    return "same direction" if above == theirs_above else "contradicts"


def _missing(values: Sequence[float | None]) -> bool:
    return any(value is None or np.isnan(value) for value in values)
