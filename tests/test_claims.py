import numpy as np
import pytest

import claims
from claims import CONFIRMED, OPEN, REFUTED, Path, two_segments

SIZES = np.array([64, 128, 256, 512, 1024, 2048, 4096, 8192])


def broken_line(sizes, threshold, before, after):
    doublings = np.log2(sizes / threshold)
    return 80 + np.where(doublings < 0, before, after) * doublings


@pytest.mark.parametrize("threshold", [128, 256, 512, 700, 1024, 2048])
@pytest.mark.parametrize("before", [0, 0.3, -0.1])
def test_a_planted_threshold_is_found_exactly(threshold, before):
    fit = two_segments(SIZES, broken_line(SIZES, threshold, before, -1.5))
    assert fit.threshold == pytest.approx(threshold, rel=1e-3)
    assert (fit.slope_before, fit.slope_after) == (pytest.approx(before, abs=1e-3), pytest.approx(-1.5, abs=1e-3))
    assert fit.low == pytest.approx(threshold, rel=0.01)
    assert fit.high == pytest.approx(threshold, rel=0.01)
    assert fit.p_value < 1e-6


def test_a_planted_threshold_is_found_in_noise_with_an_honest_interval():
    """Over 60 made-up sweeps with a threshold of 512, the 95 % interval holds it about 57 times."""
    rng = np.random.default_rng(0)
    clean = broken_line(SIZES, 512, 0, -1.5)
    fits = [two_segments(SIZES, clean + rng.normal(0, 0.2, len(SIZES))) for _ in range(60)]
    assert 52 <= sum(fit.low <= 512 <= fit.high for fit in fits) <= 60
    assert np.median([fit.threshold for fit in fits]) == pytest.approx(512, rel=0.05)
    more = np.repeat(SIZES, 5)  # trials
    sharper = two_segments(more, broken_line(more, 512, 0, -1.5) + rng.normal(0, 0.2, len(more)))
    assert np.log2(sharper.high / sharper.low) < np.median([np.log2(fit.high / fit.low) for fit in fits])


def test_one_line_has_no_threshold():
    rng = np.random.default_rng(1)
    tries = [two_segments(SIZES, 80 - np.log2(SIZES) + rng.normal(0, 0.2, len(SIZES))).p_value for _ in range(50)]
    assert sum(p < 0.05 for p in tries) <= 10  # the break is searched for, which makes the test somewhat liberal
    constant = two_segments(SIZES, np.full(len(SIZES), 80.0))
    assert constant.p_value == 1


def test_the_verdict_on_a_threshold():
    falling = claims.accuracy_threshold(SIZES, broken_line(SIZES, 512, 0, -1.5), 500)
    assert falling.verdict == CONFIRMED
    assert falling.found.startswith("threshold 512 (95% interval 512 - 512)")
    assert "the paper's: about 500" in falling.found
    assert claims.accuracy_threshold(SIZES, broken_line(SIZES, 512, -1.5, 0), None).verdict.startswith(REFUTED)
    assert claims.accuracy_threshold(SIZES, broken_line(SIZES, 512, -1.5, 1), None).verdict.startswith(REFUTED)
    wavy = broken_line(SIZES, 512, -1, -1.01) + 0.3 * np.cos(np.pi * np.arange(8))
    assert "do not fit significantly better" in claims.accuracy_threshold(SIZES, wavy, None).verdict
    assert claims.accuracy_threshold(SIZES[:4], SIZES[:4], None).verdict.startswith(OPEN)
    slower = claims.sharpness_threshold(SIZES, 10 ** broken_line(SIZES, 512, 0.8, 0.1), 1e-3)
    assert slower.verdict == CONFIRMED
    assert "in decades: 512" in slower.found
    assert claims.sharpness_threshold(SIZES, 10 ** broken_line(SIZES, 512, 0.1, 0.8), 1e-3).verdict.startswith(REFUTED)
    assert claims.sharpness_threshold(np.array([]), np.array([]), 1e-3).verdict.startswith(OPEN)


def test_early_stopping():
    small = [[70.0, 79.0, 80.0], [72.0, 78.0, 80.0]]
    steady = claims.early_stopping(small, [[70.0, 77.0, 76.8], [71.0, 77.2, 77.2]])
    assert steady.verdict == CONFIRMED
    assert "the best epoch of LB is 0.10 points above its last (SB: 0.00)" in steady.found
    assert "SB - LB is 3.00 points, of which stopping LB early closes 3 % at most" in steady.found
    assert claims.early_stopping(small, [[70.0, 79.0, 77.0]] * 2).verdict == REFUTED
    assert claims.early_stopping(small, [[70.0, 79.0, 81.0]] * 2).verdict.startswith(OPEN)


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


def test_warm_starts():
    epochs, epsilons = np.array([10, 20, 30, 40, 50, 60]), (1e-3, 5e-4)
    accuracies = np.array([76.0, 76.2, 77, 78, 79, 79.5])
    sharpness = {epsilon: np.array([400, 400, 200, 100, 50, 50.0]) for epsilon in epsilons}
    judged = claims.warm_starts(epochs, accuracies, 80.0, 76.0, sharpness)
    assert judged.verdict == CONFIRMED
    assert "the gap is 4.00 points; early warm starts gain +0.10, late ones +3.25" in judged.found
    assert "0.125 times (epsilon 0.001)" in judged.found
    early = claims.warm_starts(epochs, np.full(6, 79.0), 80.0, 76.0, sharpness)
    assert early.verdict == "in part; not: early warm starts do not help"
    backwards = claims.warm_starts(epochs, accuracies[::-1], 80.0, 76.0, {1e-3: sharpness[1e-3][::-1]})
    assert backwards.verdict == REFUTED
    assert claims.warm_starts(epochs, accuracies, 75.0, 76.0, sharpness).verdict.startswith(OPEN)
    assert "no warm start in the first third" in claims.warm_starts(epochs[5:], accuracies[5:], 80, 76, {}).verdict


def test_switching():
    def judged(small, large, growing, sharpness):
        return claims.switching({"SB": small, "LB": large, "growing": growing}, sharpness)

    good = judged(80.0, 76.0, 79.0, {1e-3: {"SB": 20.0, "LB": 400.0, "growing": 50.0}})
    assert good.verdict == CONFIRMED
    assert good.found == (
        "SB 80.00 %, LB 76.00 %, growing 79.00 %: the growing batch closes 75 % of the gap; sharpness at epsilon "
        "0.001: SB 20, LB 400, growing 50"
    )
    assert judged(80.0, 76.0, 77.0, {}).verdict == REFUTED
    assert judged(75.0, 76.0, 77.0, {}).verdict.startswith(OPEN)
