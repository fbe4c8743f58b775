"""The claims of section 3 of the paper as rules on numbers: what is claimed, what was found, and a verdict.

Each rule is stated in the claim. Accuracies are in percent, sharpness is Metric 2.1 in percent, and NaN where it is not
resolved.
"""

from dataclasses import dataclass

import numpy as np

from large_batch import breakpoints, paper
from large_batch.breakpoints import Breakpoint

CONFIRMED, REFUTED, OPEN = "confirmed", "not confirmed", "no verdict"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, the rule that decides it, what was found, and the verdict with its reason if need be."""

    claim: str
    rule: str
    found: str
    verdict: str

    def __str__(self) -> str:
        return f"Claim:   {self.claim}\nRule:    {self.rule}\nFound:   {self.found}\nVerdict: {self.verdict}"


def _verdict(holds: dict[str, bool | None]) -> str:
    """Return the verdict on a claim of several parts, None for those about which nothing is known."""
    wrong = [words for words, true in holds.items() if true is not None and not true]
    unknown = [words for words, true in holds.items() if true is None]
    if len(unknown) == len(holds):
        verdict = OPEN
    elif len(wrong) == len(holds) - len(unknown):
        verdict = REFUTED
    elif wrong:
        verdict = f"in part; not: {', '.join(wrong)}"
    else:
        verdict = "in part" if unknown else CONFIRMED
    return f"{verdict}; nothing is known of: {', '.join(unknown)}" if unknown else verdict


@dataclass(frozen=True)
class Final:
    """A test accuracy at the end of training, the mean of several epochs, since it goes up and down, and its error."""

    accuracy: float
    error: float

    @classmethod
    def of(cls, curves: list[list[float]]) -> "Final":
        """Return the mean over the last fifth of the epochs and over the trials, whose accuracies by epoch are given,
        and its standard error: over the trials, or over the epochs of a single one."""
        last = [curve[-max(2, -(-len(curve) // 5)) :] for curve in curves]
        values = np.array([np.mean(epochs) for epochs in last] if len(last) > 1 else last[0])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        return cls(float(values.mean()), error)

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} ± {self.error:.2f} %"


def _clear_gap(small: Final, large: Final) -> tuple[float, str]:
    """Return SB's advantage over LB in points, and why nothing can be said of it, if so."""
    gap, error = small.accuracy - large.accuracy, float(np.hypot(small.error, large.error))
    if gap <= 0:
        return gap, f"{OPEN}: LB does not generalise worse here"
    return gap, f"{OPEN}: the gap is within two standard errors" if gap <= 2 * error else ""


def early_stopping(small: list[list[float]], large: list[list[float]]) -> Claim:
    """Judge section 2.2 with Figure 2, from the test accuracies by epoch of each trial."""
    ends = Final.of(small), Final.of(large)
    gap, verdict = _clear_gap(*ends)
    lost_small, lost_large = (
        float(np.mean([max(curve) for curve in curves])) - end.accuracy
        for curves, end in zip((small, large), ends, strict=True)
    )
    found = (
        f"at the end SB reaches {ends[0]}, LB {ends[1]}, a gap of {gap:.2f} points; LB's best epoch is "
        f"{lost_large:.2f} points better than its end (SB's: {lost_small:.2f})"
    )
    if gap > 0:
        found += f", so that stopping LB early closes {100 * lost_large / gap:.0f} % of the gap at most"
    return Claim(
        "The test accuracy does not peak and decay, so early stopping would not close the generalisation gap (section "
        "2.2, Figure 2).",
        "LB, stopped at the epoch whose test accuracy is best, closes less than half of the gap at the end, the mean "
        "of the last fifth of the epochs; the gap exceeds two standard errors.",
        found,
        verdict or (CONFIRMED if lost_large < gap / 2 else REFUTED),
    )


def distances(ratios: list[float]) -> Claim:
    """Judge section 3 from ||x_S - x_0|| / ||x_L - x_0|| of each trial."""
    low, high = paper.DISTANCE_RATIO
    mean = float(np.mean(ratios))
    if mean <= 1:
        verdict = f"{REFUTED}: SB does not go further"
    elif mean < low:
        verdict = f"{REFUTED}: SB goes further, but less so"
    else:
        verdict = CONFIRMED if mean <= high else f"{REFUTED}: SB goes further, more so than in the paper"
    return Claim(
        f"SB goes {low} to {high} times as far from the starting point as LB (section 3).",
        f"||x_S - x_0|| / ||x_L - x_0||, the mean over the trials, lies between {low} and {high}.",
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
    """Judge section 3 with Figure 6; the first iterate of each path is the starting point, which both share."""
    text = (
        "As the loss falls, LB iterates become sharper, while SB iterates stay as they are and then become flatter "
        "(section 3, Figure 6)."
    )
    rule = (
        "In the last third of the iterates (geometric mean) LB is more than twice as sharp as the starting point, SB "
        "less than half as sharp as at its own sharpest iterate, and at the lowest loss that both reach LB is more "
        "than twice as sharp as SB."
    )
    left_out = int(np.isnan(small.sharpness).sum() + np.isnan(large.sharpness).sum())
    note = f"; {left_out} iterates are left out, whose sharpness is not resolved" if left_out else ""
    start_known = not np.isnan(large.sharpness[0])
    small, large = small.resolved(), large.resolved()
    if not start_known or min(len(small.loss), len(large.loss)) < 3:
        return Claim(text, rule, f"at epsilon {epsilon:g}{note}", f"{OPEN}: a start and two more iterates are needed")
    level = max(small.loss[1:].min(), large.loss[1:].min())
    at_small, at_large = small.sharpness_at(level), large.sharpness_at(level)
    rise = large.late_sharpness / large.sharpness[0]
    fall = small.late_sharpness / small.sharpness.max()
    holds = {
        "LB becomes sharper": rise > 2,
        "SB becomes flatter": fall < 1 / 2,
        "at equal loss LB is sharper": at_large > 2 * at_small,
    }
    found = (
        f"at epsilon {epsilon:g}: late LB has {rise:.3g} times the sharpness of the start, late SB {fall:.3g} of its "
        f"largest; at loss {level:.3g} LB is {at_large / at_small:.3g} times as sharp as SB{note}"
    )
    return Claim(text, rule, found, _verdict(holds))


NOT_BETTER = f"{OPEN}: it does not fit significantly better than one line"
TOO_FEW = f"{OPEN}: at least 5 trainings with 4 batch sizes are needed"


def accuracy_threshold(
    sizes: np.ndarray, accuracies: np.ndarray, published: int | None
) -> tuple[Claim, Breakpoint | None]:
    """Judge section 3 with Figure 4, from the test accuracy at each batch size, trials among them; return the threshold
    too, if there is one."""
    fit = breakpoints.plateaus(sizes, accuracies)
    if fit is None:
        found, verdict = f"{len(sizes)} trainings", TOO_FEW
    else:
        found = f"{fit.before:.2f} % up to {fit.breakpoint}, {fit.after:.2f} % in the end; p = {fit.p_value:.2g}"
        if published:
            inside = fit.breakpoint.low <= published <= fit.breakpoint.high
            found += f"; the paper's threshold, about {published:,}, lies {'in' if inside else 'out'}side the interval"
        if fit.after >= fit.before:
            verdict = f"{REFUTED}: the accuracy does not fall"
        elif not fit.significant:
            verdict = NOT_BETTER
        elif fit.breakpoint.at < 0.999 * np.unique(sizes)[1]:
            verdict = f"{REFUTED}: the accuracy falls from the smallest batches on"
        else:
            verdict = CONFIRMED
    claim = Claim(
        "There is a batch size after which the test accuracy falls (section 3, Figure 4).",
        "A level, a straight fall and another level over log2(batch size) fit significantly better (F-test, 5 %) than "
        "one line, and the first level holds for more than the smallest size.",
        found,
        verdict,
    )
    return claim, fit.breakpoint if fit and verdict == CONFIRMED else None


def sharpness_threshold(
    sizes: np.ndarray, sharpness: np.ndarray, epsilon: float, threshold: Breakpoint | None
) -> Claim:
    """Judge section 3 with Figure 4, from the sharpness at each batch size, trials among them, and the threshold of the
    accuracy, if there is one."""
    known = ~np.isnan(sharpness)
    note = f"; {(~known).sum()} values are left out, which are not resolved" if not known.all() else ""
    fit = breakpoints.two_segments(sizes[known], np.log10(sharpness[known]))
    if fit is None:
        found, verdict = f"{known.sum()} values", TOO_FEW
    else:
        found = (
            f"at epsilon {epsilon:g} {fit.before:+.2g} decades a doubling up to {fit.breakpoint}, {fit.after:+.2g} "
            f"then; p = {fit.p_value:.2g}"
        )
        if fit.before <= max(fit.after, 0):
            verdict = f"{REFUTED}: the sharpness does not rise faster before it"
        elif not fit.significant:
            verdict = NOT_BETTER
        elif threshold is None:
            verdict = "in part: the rise becomes slower, but the accuracy has no threshold here"
        else:
            verdict = CONFIRMED if fit.breakpoint.overlaps(threshold) else "in part; not: around the threshold"
    return Claim(
        "The sharpness rises with the batch size, and around the threshold this rise becomes slower (section 3, Figure "
        "4).",
        "Two segments of log10(sharpness) over log2(batch size) fit significantly better (F-test, 5 %) than one line, "
        "the first rises, and faster than the second, and the interval of where they meet overlaps that of the "
        "accuracy's threshold.",
        found + note,
        verdict,
    )


def warm_starts(
    epochs: np.ndarray, accuracies: np.ndarray, small: float, large: float, sharpness: dict[float, np.ndarray]
) -> Claim:
    """Judge section 3 with Figure 5: test accuracy and, by epsilon, sharpness of LB solutions that were started after
    so many epochs of SB, arrays of shape (k,); `small` and `large` are the accuracies of SB alone and LB alone."""
    rule = (
        "Warm starts in the first tenth of the SB epochs gain less than half of the gap between LB alone and SB alone "
        "(its iterates in the last third), those in the last third more than half, and these are flatter (geometric "
        "mean, at each epsilon)."
    )
    text = (
        "Warm-started after a few epochs, LB does not generalise better; warm-started late, it does, and its "
        "minimizers are flatter (section 3, Figure 5)."
    )
    early, late = epochs <= epochs.max() / 10, epochs > 2 * epochs.max() / 3
    gap = small - large
    found = f"SB alone {small:.2f} %, LB alone {large:.2f} %"
    if gap <= 0:
        return Claim(text, rule, found, f"{OPEN}: LB does not generalise worse here")

    def gain(those: np.ndarray) -> float:
        return float(np.mean(accuracies[those]) - large)

    falls = {}
    for epsilon, values in sharpness.items():
        known = ~np.isnan(values)
        if (known & early).any() and (known & late).any():
            falls[epsilon] = _geometric_mean(values[known & late]) / _geometric_mean(values[known & early])
    holds = {
        "early warm starts do not help": gain(early) < gap / 2 if early.any() else None,
        "late ones do": gain(late) > gap / 2,
        "late ones are flatter": all(fall < 1 for fall in falls.values()) if falls else None,
    }
    if early.any():
        found += f", early warm starts {gain(early) + large:.2f} %"
    found += f", late ones {gain(late) + large:.2f} %"
    if falls:
        flatter = " and ".join(f"{fall:.3g} times (epsilon {epsilon:g})" for epsilon, fall in falls.items())
        found += f"; late ones are {flatter} as sharp as early ones"
    return Claim(text, rule, found, _verdict(holds))


def switching(curves: dict[str, list[list[float]]], sharpness: dict[float, dict[str, float]]) -> Claim:
    """Judge section 4 from the test accuracies by epoch of each trial and, by epsilon, the sharpness of "SB" alone,
    "LB" alone and a "growing" batch, at equal epochs."""
    ends = {regime: Final.of(trials) for regime, trials in curves.items()}
    gap, verdict = _clear_gap(ends["SB"], ends["LB"])
    gain = ends["growing"].accuracy - ends["LB"].accuracy
    found = ", ".join(f"{regime} {end}" for regime, end in ends.items())
    if gap > 0:
        found += f": the growing batch closes {100 * gain / gap:.0f} % of the gap"
    for epsilon, values in sharpness.items():
        found += f"; sharpness at epsilon {epsilon:g}: "
        found += ", ".join(f"{regime} {value:.3g}" for regime, value in values.items())
    return Claim(
        "Starting with small batches and letting them grow may remedy the generalisation gap (section 4).",
        "At equal epochs a batch that grows closes more than half of the gap between LB alone and SB alone (means of "
        "the last fifth of the epochs), which exceeds two standard errors.",
        found,
        verdict or (CONFIRMED if gain > gap / 2 else REFUTED),
    )
