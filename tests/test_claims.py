import numpy as np
import pytest

from large_batch import claims
from large_batch.breakpoints import Breakpoint, plateaus, two_segments
from large_batch.claims import CONFIRMED, OPEN, REFUTED, Final, Path

SIZES = np.array([64, 128, 256, 512, 1024, 2048, 4096, 8192])


def broken_line(sizes, threshold, before, after):
    doublings = np.log2(sizes / threshold)
    return 80 + np.where(doublings < 0, before, after) * doublings


@pytest.mark.parametrize("threshold", [128, 256, 512, 724, 1024, 2048])
@pytest.mark.parametrize("before", [0, 0.3, -0.1])
def test_a_planted_bend_is_found(threshold, before):
    fit = two_segments(SIZES, broken_line(SIZES, threshold, before, -1.5))
    assert fit.breakpoint.at == pytest.approx(threshold, rel=1e-3)
    assert (fit.before, fit.after) == (pytest.approx(before, abs=1e-3), pytest.approx(-1.5, abs=1e-3))
    for end, edge in ((fit.breakpoint.low, SIZES[1]), (fit.breakpoint.high, SIZES[-2])):
        assert end == pytest.approx(threshold, rel=0.01) or edge == threshold
    assert fit.p_value < 1e-6


@pytest.mark.parametrize("threshold", [128, 256, 512, 724, 1024])
def test_a_planted_decline_or_step_is_found(threshold):
    decline = plateaus(SIZES, broken_line(SIZES, threshold, 0, -1.5))
    assert decline.breakpoint.at == pytest.approx(threshold, rel=0.05)
    assert decline.before == pytest.approx(80, abs=0.1)
    assert decline.p_value < 1e-3
    step = plateaus(SIZES, np.where(threshold >= SIZES, 80.0, 77.0))
    last = SIZES[threshold >= SIZES][-1]
    assert step.breakpoint.at == last
    ends = step.breakpoint.low, step.breakpoint.high
    assert ends == (last, pytest.approx(2 * last, rel=0.1)), "anywhere between two sizes"
    assert (step.before, step.after) == (pytest.approx(80), pytest.approx(77))
    assert step.p_value < 1e-6


@pytest.mark.parametrize(
    ("fitted", "clean"),
    [(two_segments, broken_line(SIZES, 512, 0, -1.5)), (plateaus, np.interp(np.log2(SIZES), [9, 12], [80, 76]))],
)
def test_a_planted_threshold_is_found_in_noise_with_an_honest_interval(fitted, clean):
    """Over 60 made-up sweeps with a threshold of 512, the 95 % interval holds it about 57 times."""
    rng = np.random.default_rng(0)
    found = [fitted(SIZES, clean + rng.normal(0, 0.2, len(SIZES))).breakpoint for _ in range(60)]
    assert 52 <= sum(one.low <= 512 <= one.high for one in found) <= 60
    assert np.median([one.at for one in found]) == pytest.approx(512, rel=0.1)
    widths = [np.log2(one.high / one.low) for one in found if one.low > 0 and one.high < np.inf]
    trials = fitted(np.repeat(SIZES, 5), np.repeat(clean, 5) + rng.normal(0, 0.2, 5 * len(SIZES))).breakpoint
    assert np.log2(trials.high / trials.low) < np.median(widths)


@pytest.mark.parametrize("fitted", [two_segments, plateaus])
def test_one_line_has_no_threshold(fitted):
    rng = np.random.default_rng(1)
    for slope in (0, -1):
        tries = [fitted(SIZES, slope * np.log2(SIZES) + rng.normal(0, 0.2, len(SIZES))).significant for _ in range(50)]
        assert sum(tries) <= 7
    for level in (80.0, 98.32, 95.29, 94.95, *rng.uniform(0, 100, 20)):
        constant = fitted(SIZES, np.full(len(SIZES), level))
        assert constant.p_value == 1
        assert "not bounded" in str(constant.breakpoint)


def test_the_verdict_on_a_threshold():
    def judged(accuracies, published=None):
        return claims.accuracy_threshold(SIZES, accuracies, published)

    decline, place = judged(broken_line(SIZES, 512, 0, -1.5), 500)
    assert decline.verdict == CONFIRMED
    assert place.at == 512
    assert decline.found.startswith("80.00 % up to 512 (95% interval 512 - 512), 74.00 % in the end; p = ")
    step, place = judged(np.where(SIZES <= 512, 80, 77.3) + 0.01 * np.cos(np.arange(8)), 600)
    assert step.verdict == CONFIRMED
    assert place.at == 512
    assert place.overlaps(Breakpoint(900, 700, np.inf))
    assert not place.overlaps(Breakpoint(256, 0, 300))
    assert "about 600, lies inside the interval" in step.found
    assert "about 5,000, lies outside the interval" in judged(np.where(SIZES <= 512, 80, 77.3), 5000)[0].found
    for other in (80 + np.log2(SIZES), broken_line(SIZES, 512, 0, 1)):
        claim, place = judged(other)
        assert (claim.verdict, place) == (f"{REFUTED}: the accuracy does not fall", None)
    assert judged(broken_line(SIZES, 512, -1.5, 0))[0].verdict == (
        f"{REFUTED}: the accuracy falls from the smallest batches on"
    )
    wavy = broken_line(SIZES, 512, -1, -1.01) + 0.3 * np.cos(np.pi * np.arange(8))
    assert judged(wavy)[0].verdict == claims.NOT_BETTER
    assert claims.accuracy_threshold(SIZES[:4], SIZES[:4], None)[0].verdict == claims.TOO_FEW


def test_the_verdict_on_the_rise_of_sharpness():
    def judged(sharpness, threshold=None):
        return claims.sharpness_threshold(SIZES, sharpness, 1e-3, threshold)

    slower = 10 ** broken_line(SIZES, 512, 0.8, 0.1)
    assert judged(slower, Breakpoint(600, 400, 900)).verdict == CONFIRMED
    assert "+0.8 decades a doubling up to 512 (95% interval 512 - 512), +0.1 then" in judged(slower).found
    assert judged(slower, Breakpoint(2048, 1500, np.inf)).verdict == "in part; not: around the threshold"
    assert "the accuracy has no threshold" in judged(slower).verdict
    assert judged(10 ** broken_line(SIZES, 512, 0.1, 0.8)).verdict.startswith(REFUTED)
    assert "; 1 values are left out" in judged(np.where(SIZES == 64, np.nan, slower)).found
    assert judged(np.full(8, np.nan)).verdict == claims.TOO_FEW


def test_early_stopping():
    small = [[70.0, 79.0, 79.9, 80.1], [72.0, 78.0, 80.1, 79.9]]
    steady = claims.early_stopping(small, [[70.0, 77.1, 76.9, 77.1], [71.0, 77.2, 77.0, 77.0]])
    assert steady.verdict == CONFIRMED
    assert steady.found == (
        "at the end SB reaches 80.00 ± 0.00 %, LB 77.00 ± 0.00 %, a gap of 3.00 points; LB's best epoch is 0.15 points "
        "better than its end (SB's: 0.10), so that stopping LB early closes 5 % of the gap at most"
    )
    assert claims.early_stopping(small, [[70.0, 79.0, 77.0, 77.0]] * 2).verdict == REFUTED
    assert claims.early_stopping(small, [[70.0, 79.0, 81.0, 81.0]] * 2).verdict == (
        f"{OPEN}: LB does not generalise worse here"
    )
    noisy = claims.early_stopping([[78, 80.5, 79.0, 80.0]], [[78, 78.8, 80.5, 78.0]])
    assert noisy.verdict == f"{OPEN}: the gap is within two standard errors"
    claims.early_stopping([[80.0]], [[70.0]])  # a single epoch is no error


def test_the_end_of_a_training_is_a_mean_with_an_error():
    curve = [50.0] * 16 + [80.0, 81.0, 80.0, 81.0]
    one = Final.of([curve])
    assert (one.accuracy, one.error) == (80.5, pytest.approx(np.std([80, 81, 80, 81], ddof=1) / 2))
    several = Final.of([curve, [value + 1 for value in curve]])
    assert (several.accuracy, several.error) == (81, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([4.0], CONFIRMED),
        ([2.0, 5.0], CONFIRMED),
        ([12.0], f"{REFUTED}: SB goes further, more so than in the paper"),
        ([1.5], f"{REFUTED}: SB goes further, but less so"),
        ([0.5], f"{REFUTED}: SB does not go further"),
    ],
)
def test_distances(ratios, verdict):
    assert claims.distances(ratios).verdict == verdict


def test_sharpness_paths():
    falling_loss = np.array([2.0, 0.5, 0.1, 0.01])
    small = Path(falling_loss, np.array([50, 60, 20, 5.0]))
    large = Path(falling_loss * [1, 1, 1, 2], np.array([50, 80, 200, 400.0]))
    judged = claims.sharpness_paths(small, large, 1e-3)
    assert judged.verdict == CONFIRMED
    at_level = np.exp(np.interp(np.log(0.02), np.log([0.01, 0.1]), np.log([5, 20])))
    assert f"at loss 0.02 LB is {400 / at_level:.3g} times as sharp as SB" in judged.found
    assert claims.sharpness_paths(large, small, 1e-3).verdict == REFUTED
    assert claims.sharpness_paths(large, large, 1e-3).verdict == (
        "in part; not: SB becomes flatter, at equal loss LB is sharper"
    )


def test_sharpness_paths_are_judged_by_several_late_iterates():
    loss = 2.0 ** -np.arange(9)
    jumping = Path(loss, np.array([50, 100, 200, 400, 50, 400, 400, 400, 50.0]))
    assert jumping.late_sharpness == pytest.approx(200)
    assert "late LB has 4 times the sharpness of the start" in claims.sharpness_paths(jumping, jumping, 1e-3).found


def test_sharpness_paths_without_unresolved_iterates():
    loss = np.array([2.0, 0.5, 0.1, 0.01])
    small, large = Path(loss, np.array([50, 60, 10, np.nan])), Path(loss, np.array([50, 80, 200, 400.0]))
    judged = claims.sharpness_paths(small, large, 1e-3)
    assert judged.verdict == CONFIRMED
    assert judged.found.endswith("; 1 iterates are left out, whose sharpness is not resolved")
    nothing = Path(loss, np.full(4, np.nan))
    assert claims.sharpness_paths(small, nothing, 1e-3).verdict.startswith(OPEN)
    assert claims.sharpness_paths(nothing, large, 1e-3).verdict.startswith(OPEN)


def test_warm_starts():
    epochs, epsilons = np.array([5, 10, 20, 30, 40, 50]), (1e-3, 5e-4)
    accuracies = np.array([76.2, 77, 78, 78.5, 79, 79.5])
    sharpness = {epsilon: np.array([400, 400, 200, 100, 50, 50.0]) for epsilon in epsilons}
    judged = claims.warm_starts(epochs, accuracies, 80.0, 76.0, sharpness)
    assert judged.verdict == CONFIRMED
    assert judged.found.startswith(
        "SB alone 80.00 %, LB alone 76.00 %, early warm starts 76.20 %, late ones 79.25 %; late ones are 0.125 times "
        "(epsilon 0.001) and"
    )
    helpful = claims.warm_starts(epochs, np.full(6, 79.0), 80.0, 76.0, sharpness)
    assert helpful.verdict == "in part; not: early warm starts do not help"
    backwards = claims.warm_starts(epochs, accuracies[::-1], 80.0, 76.0, {1e-3: sharpness[1e-3][::-1]})
    assert backwards.verdict == REFUTED
    assert claims.warm_starts(epochs, accuracies, 75.0, 76.0, sharpness).verdict.startswith(OPEN)


def test_warm_starts_of_which_not_all_is_known():
    epochs, accuracies = np.array([5, 10, 20, 30, 40, 50]), np.array([76.2, 77, 78, 78.5, 79, 79.5])
    sharpness = np.array([np.nan, 400, 200, 100, 50, np.nan])
    judged = claims.warm_starts(epochs, accuracies, 80.0, 76.0, {1e-3: sharpness})
    assert judged.verdict == "in part; nothing is known of: late ones are flatter"
    judged = claims.warm_starts(epochs, accuracies, 80.0, 76.0, {1e-3: sharpness, 5e-4: np.array([9, 8, 7, 6, 5, 4.0])})
    assert judged.verdict == CONFIRMED
    assert "late ones are 0.497 times (epsilon 0.0005) as sharp" in judged.found
    late = claims.warm_starts(epochs[1:], accuracies[1:] - 3, 80.0, 76.0, {1e-3: sharpness[1:]})
    assert late.verdict == (f"{REFUTED}; nothing is known of: early warm starts do not help, late ones are flatter")


def test_switching():
    def judged(small, large, growing, sharpness):
        curves = {"SB": [[70.0, small, small]], "LB": [[60.0, large, large]], "growing": [[70.0, growing, growing]]}
        return claims.switching(curves, sharpness)

    good = judged(80.0, 76.0, 79.0, {1e-3: {"SB": 20.0, "LB": 400.0, "growing": 50.0}})
    assert good.verdict == CONFIRMED
    assert good.found == (
        "SB 80.00 ± 0.00 %, LB 76.00 ± 0.00 %, growing 79.00 ± 0.00 %: the growing batch closes 75 % of the gap; "
        "sharpness at epsilon 0.001: SB 20, LB 400, growing 50"
    )
    assert judged(80.0, 76.0, 77.0, {}).verdict == REFUTED
    assert judged(75.0, 76.0, 77.0, {}).verdict.startswith(OPEN)
