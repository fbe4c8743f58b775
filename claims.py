"""The claims of section 3 of the paper as rules on numbers: what is claimed, what was found, and a verdict.

Each rule is stated in the claim's text and was fixed before the results were known. Accuracies are in percent,
sharpness is Metric 2.1 in percent.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

import paper

CONFIDENCE = 0.95
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


def _verdict(holds: dict[str, bool]) -> str:
    """Return the verdict on a claim of several parts."""
    wrong = [words for words, true in holds.items() if not true]
    if len(wrong) == len(holds):
        return REFUTED
    return f"in part; not: {', '.join(wrong)}" if wrong else CONFIRMED


def early_stopping(small: list[list[float]], large: list[list[float]]) -> Claim:
    """Judge section 2.2 with Figure 2, from the test accuracies by epoch of each trial."""
    final_small, final_large = (float(np.mean([curve[-1] for curve in curves])) for curves in (small, large))
    gap = final_small - final_large
    lost_small, lost_large = (float(np.mean([max(curve) - curve[-1] for curve in curves])) for curves in (small, large))
    found = (
        f"the best epoch of LB is {lost_large:.2f} points above its last (SB: {lost_small:.2f}); at the end the gap "
        f"SB - LB is {gap:.2f} points"
    )
    if gap > 0:
        found += f", of which stopping LB early closes {100 * lost_large / gap:.0f} % at most"
        verdict = CONFIRMED if lost_large < gap / 2 else REFUTED
    else:
        verdict = f"{OPEN}: LB does not generalise worse here"
    return Claim(
        "The test accuracy does not peak and decay, so early stopping would not close the generalisation gap (section "
        "2.2, Figure 2).",
        "LB, stopped at the epoch whose test accuracy is best, closes less than half of the gap.",
        found,
        verdict,
    )


def distances(ratios: list[float]) -> Claim:
    """Judge section 3 from ||x_S - x_0|| / ||x_L - x_0|| of each trial."""
    low, high = paper.DISTANCE_RATIO
    mean = float(np.mean(ratios))
    spread = f" ± {np.std(ratios, ddof=1):.2f}" if len(ratios) > 1 else ""
    if mean <= 1:
        verdict = f"{REFUTED}: SB does not go further"
    elif mean < low:
        verdict = f"{REFUTED}: SB goes further, but less so"
    else:
        verdict = CONFIRMED if mean <= high else f"{REFUTED}: SB goes further, more so than in the paper"
    return Claim(
        f"SB goes {low} to {high} times as far from the starting point as LB (section 3).",
        f"||x_S - x_0|| / ||x_L - x_0||, the mean over the trials, lies between {low} and {high}.",
        f"{mean:.2f}{spread}",
        verdict,
    )


@dataclass(frozen=True)
class Path:
    """Iterates of trainings in order of their epochs, arrays of shape (k,): cross-entropy (nats) and sharpness."""

    loss: np.ndarray
    sharpness: np.ndarray

    def sharpness_at(self, loss: float) -> float:
        """Interpolate the sharpness at a loss, on logarithmic scales."""
        order = np.argsort(self.loss)
        logs = np.interp(np.log(loss), np.log(self.loss[order]), np.log(self.sharpness[order]))
        return float(np.exp(logs))


def sharpness_paths(small: Path, large: Path, epsilon: float) -> Claim:
    """Judge section 3 with Figure 6; the first iterate of each path is the starting point, which both share."""
    level = max(small.loss[1:].min(), large.loss[1:].min())
    at_small, at_large = small.sharpness_at(level), large.sharpness_at(level)
    rise = large.sharpness[-1] / large.sharpness[0]
    fall = small.sharpness[-1] / small.sharpness.max()
    holds = {
        "LB becomes sharper": rise > 2,
        "SB becomes flatter": fall < 1 / 2,
        "at equal loss LB is sharper": at_large > 2 * at_small,
    }
    return Claim(
        "As the loss falls, LB iterates become sharper, while SB iterates stay as they are and then become flatter "
        "(section 3, Figure 6).",
        "LB ends more than twice as sharp as the starting point, SB at less than half of its own largest sharpness, "
        "and at the lowest loss that both reach LB is more than twice as sharp as SB.",
        f"at epsilon {epsilon:g}: LB ends at {rise:.3g} times the sharpness of the start, SB at {fall:.3g} of its "
        f"largest; at loss {level:.3g} LB is {at_large / at_small:.3g} times as sharp as SB",
        _verdict(holds),
    )


@dataclass(frozen=True)
class TwoSegments:
    """A continuous line of two straight segments over log2(x), fitted by least squares.

    `threshold` is where they meet and `low` to `high` its confidence interval, all in units of x; the slopes are per
    doubling of x; `p_value` is the probability of so much an improvement over one straight line by chance.
    """

    threshold: float
    low: float
    high: float
    slope_before: float
    slope_after: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"{self.threshold:,.0f} ({CONFIDENCE:.0%} interval {self.low:,.0f} - {self.high:,.0f}), slopes per "
            f"doubling {self.slope_before:+.3g} and {self.slope_after:+.3g}, p = {self.p_value:.2g} against one line"
        )


def two_segments(x: np.ndarray, y: np.ndarray) -> TwoSegments | None:
    """Fit two segments to y over log2(x), both of shape (k,); None for fewer than 5 points or 4 different x.

    The interval holds the breaks that an F-test does not reject: those whose sum of squares exceeds the least one by
    less than the F quantile with 1 and k - 4 degrees of freedom, in units of the residual variance.
    """
    places, freedom = np.unique(np.log2(x)), len(x) - 4
    if len(places) < 4 or freedom < 1:
        return None
    x, y = np.log2(np.asarray(x, float)), np.asarray(y, float)

    def fit(at: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones_like(x), np.minimum(x - at, 0), np.maximum(x - at, 0)], axis=1)
        coefficients = np.linalg.lstsq(columns, y, rcond=None)[0]
        return float(np.sum((y - columns @ coefficients) ** 2)), coefficients

    # Each segment has at least two sizes, else it fits any one of them. Between two sizes the sum of squares is smooth.
    breaks = [
        float(optimize.minimize_scalar(lambda at: fit(at)[0], bounds=ends, method="bounded", options={"xatol": 1e-6}).x)
        for ends in zip(places[1:-2], places[2:-1], strict=True)
    ]
    breaks += places[1:-1].tolist()
    at = min(breaks, key=lambda at: fit(at)[0])
    least, coefficients = fit(at)
    line = float(np.sum((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2))
    floor = np.finfo(float).eps * float(np.sum((y - y.mean()) ** 2))  # of what rounding leaves of a perfect fit
    variance = max(least, floor) / freedom
    candidates = np.union1d(np.linspace(places[1], places[-2], 401), [at])
    sums = np.array([fit(candidate)[0] for candidate in candidates])
    inside = candidates[sums <= least + stats.f.ppf(CONFIDENCE, 1, freedom) * variance]
    improvement = max(line - least, 0.0) / 2
    return TwoSegments(
        *(float(2**place) for place in (at, inside[0], inside[-1])),
        slope_before=float(coefficients[1]),
        slope_after=float(coefficients[2]),
        p_value=float(stats.f.sf(improvement / variance, 2, freedom)) if variance > 0 else 1.0,
    )


def _bend(fit: TwoSegments) -> str:
    """Return the verdict on two segments that differ as claimed."""
    if fit.p_value < 1 - CONFIDENCE:
        return CONFIRMED
    return f"{OPEN}: two segments do not fit significantly better than one"


def accuracy_threshold(sizes: np.ndarray, accuracies: np.ndarray, published: int | None) -> Claim:
    """Judge section 3 with Figure 4, from the test accuracy at each batch size, trials among them."""
    fit = two_segments(sizes, accuracies)
    if fit is None:
        found, verdict = f"{len(sizes)} trainings", f"{OPEN}: at least 5 trainings with 4 batch sizes are needed"
    else:
        found = f"threshold {fit}" + (f"; the paper's: about {published:,}" if published else "")
        falls = fit.slope_after < min(fit.slope_before, 0)
        verdict = _bend(fit) if falls else f"{REFUTED}: the accuracy does not fall faster after it"
    return Claim(
        "There is a batch size after which the test accuracy falls (section 3, Figure 4).",
        "Two segments over log2(batch size) fit significantly better (F-test, 5 %) than one line, and the second "
        "falls, and faster than the first.",
        found,
        verdict,
    )


def sharpness_threshold(sizes: np.ndarray, sharpness: np.ndarray, epsilon: float) -> Claim:
    """Judge section 3 with Figure 4, from the sharpness at each batch size, trials among them."""
    fit = two_segments(sizes, np.log10(sharpness))
    if fit is None:
        found, verdict = f"{len(sizes)} values", f"{OPEN}: at least 5 trainings with 4 batch sizes are needed"
    else:
        found = f"at epsilon {epsilon:g}, in decades: {fit}"
        slower = fit.slope_before > max(fit.slope_after, 0)
        verdict = _bend(fit) if slower else f"{REFUTED}: the sharpness does not rise faster before it"
    return Claim(
        "The sharpness rises with the batch size, and around the threshold this rise becomes slower (section 3, Figure "
        "4).",
        "Two segments of log10(sharpness) over log2(batch size) fit significantly better (F-test, 5 %) than one line, "
        "and the first rises, and faster than the second.",
        found,
        verdict,
    )


def warm_starts(
    epochs: np.ndarray, accuracies: np.ndarray, small: float, large: float, sharpness: dict[float, np.ndarray]
) -> Claim:
    """Judge section 3 with Figure 5: test accuracy and, by epsilon, sharpness of LB solutions that were started after
    so many epochs of SB, arrays of shape (k,); `small` and `large` are the accuracies of SB alone and LB alone."""
    rule = (
        "Warm starts in the first third of the SB epochs gain less than half of the gap between LB alone and SB alone, "
        "those in the last third more than half, and are flatter (geometric mean, at each epsilon) than the first."
    )
    text = (
        "Warm-started early, LB does not generalise better; warm-started late, it does, and its minimizers are flatter "
        "(section 3, Figure 5)."
    )
    third = epochs.max() / 3
    early, late = epochs <= third, epochs > 2 * third
    gap = small - large
    if not early.any() or gap <= 0:
        found = f"SB alone {small:.2f} %, LB alone {large:.2f} %, {early.sum()} early warm starts"
        reason = "LB does not generalise worse here" if gap <= 0 else "no warm start in the first third"
        return Claim(text, rule, found, f"{OPEN}: {reason}")
    gains = [float(np.mean(accuracies[those]) - large) for those in (early, late)]
    falls = {eps: float(np.exp(np.mean(np.log(s[late])) - np.mean(np.log(s[early])))) for eps, s in sharpness.items()}
    holds = {
        "early warm starts do not help": gains[0] < gap / 2,
        "late ones do": gains[1] > gap / 2,
        "late ones are flatter": all(fall < 1 for fall in falls.values()),
    }
    flatter = " and ".join(f"{fall:.3g} times (epsilon {eps:g})" for eps, fall in falls.items())
    found = (
        f"the gap is {gap:.2f} points; early warm starts gain {gains[0]:+.2f}, late ones {gains[1]:+.2f}; late ones "
        f"are {flatter} as sharp as early ones"
    )
    return Claim(text, rule, found, _verdict(holds))


def switching(accuracies: dict[str, float], sharpness: dict[float, dict[str, float]]) -> Claim:
    """Judge section 4 from the test accuracy and, by epsilon, the sharpness of "SB" alone, "LB" alone and a "growing"
    batch, at equal epochs."""
    gap, gain = accuracies["SB"] - accuracies["LB"], accuracies["growing"] - accuracies["LB"]
    found = ", ".join(f"{regime} {accuracy:.2f} %" for regime, accuracy in accuracies.items())
    if gap > 0:
        found += f": the growing batch closes {100 * gain / gap:.0f} % of the gap"
        verdict = CONFIRMED if gain > gap / 2 else REFUTED
    else:
        verdict = f"{OPEN}: LB does not generalise worse here"
    for epsilon, values in sharpness.items():
        found += f"; sharpness at epsilon {epsilon:g}: "
        found += ", ".join(f"{regime} {value:.3g}" for regime, value in values.items())
    return Claim(
        "Starting with small batches and letting them grow may remedy the generalisation gap (section 4).",
        "At equal epochs a batch that grows closes more than half of the gap between LB alone and SB alone.",
        found,
        verdict,
    )
