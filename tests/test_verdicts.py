"""How often the ledger's rules err, and how often they find what is there, by simulation.

Of 400 made-up comparisons 5 % are 20; 33 or more come by chance in less than 1 % of cases.
"""

import numpy as np
import pytest
from test_claims import rates

import finetune
from large_batch import evidence, verdicts
from large_batch.evidence import CONTRADICTED, DIRECTION, HOLDS, OPEN

NUMBER, SEEDS = 400, 0.1  # comparisons; deviation of the test accuracy over seeds, points
TRIALS = pytest.mark.parametrize("trials", [1, 2, 5])


def accuracies(rng, end, trials):
    return rng.normal(end, SEEDS, (NUMBER, trials))


@TRIALS
def test_the_gap(trials):
    rng = np.random.default_rng(trials)

    def judged(gap):
        pairs = zip(accuracies(rng, 98, trials), accuracies(rng, 98 - gap, trials), strict=True)
        return rates(evidence.clear_side([(1, small), (-1, large)], SEEDS) for small, large in pairs)

    assert judged(0)[OPEN] >= 0.92
    assert judged(1.5)[HOLDS] >= 0.9
    assert judged(-1.5)[CONTRADICTED] >= 0.9
    if trials > 1:  # a known spread that is half the true one does not make chance a finding
        pairs = zip(accuracies(rng, 98, trials), accuracies(rng, 98, trials), strict=True)
        found = rates(evidence.clear_side([(1, small), (-1, large)], SEEDS / 2) for small, large in pairs)
        assert found[OPEN] >= 0.92


@TRIALS
def test_remedies(trials):
    """With a gap of 4 points, of which a remedy closes no part, half, 70 % or all, or which it doubles; without one."""
    rng = np.random.default_rng(trials)

    def judged(rule, gap, closed, of_small=()):
        """`of_small` is what SB gains by the remedy."""
        means = (98, 98 - gap, 98 - gap + closed * gap, *(98 + gain for gain in of_small))
        ends = (accuracies(rng, end, trials) for end in means)
        return rates(rule(*row, SEEDS) for row in zip(*ends, strict=True))

    for rule in (evidence.helps, evidence.does_not_help, evidence.is_alike):
        assert judged(rule, 0, 0)[OPEN] >= 0.92
    assert judged(evidence.helps, 4, 0)[OPEN] >= 0.92
    assert judged(evidence.helps, 4, 1)[HOLDS] >= 0.9
    assert judged(evidence.helps, 4, -1)[CONTRADICTED] >= 0.9
    assert judged(evidence.does_not_help, 4, 0)[HOLDS] >= 0.9
    assert judged(evidence.does_not_help, 4, 0)[CONTRADICTED] <= 0.05
    assert judged(evidence.does_not_help, 4, 0.3)[HOLDS] <= 0.05
    assert judged(evidence.does_not_help, 4, 0.3)[CONTRADICTED] <= 0.05, "in direction"
    assert judged(evidence.does_not_help, 4, 0.5)[HOLDS] <= 0.05
    assert judged(evidence.does_not_help, 4, 1)[CONTRADICTED] >= 0.9
    assert judged(evidence.is_alike, 4, 0)[HOLDS] >= 0.9
    for closed in (0.5, -0.5):
        assert judged(evidence.is_alike, 4, closed)[OPEN] >= 0.9
    for closed in (1, -1):
        assert judged(evidence.is_alike, 4, closed)[CONTRADICTED] >= 0.9
    assert judged(evidence.closes_the_gap, 4, 0.5, [0])[OPEN] >= 0.92
    assert judged(evidence.closes_the_gap, 4, 1, [2])[OPEN] >= 0.92, "SB gains, too, and half of the gap is left"
    assert judged(evidence.closes_the_gap, 4, 1, [0])[HOLDS] >= 0.9
    assert judged(evidence.closes_the_gap, 4, 0.5, [2])[CONTRADICTED] >= 0.9


@TRIALS
def test_sharper(trials):
    """Seeds differ as those of F1 at epsilon 1e-3."""
    rng = np.random.default_rng(trials)

    def judged(ratio):
        logs = (rng.normal(0, 0.67, (NUMBER, trials)), rng.normal(np.log(ratio), 0.26, (NUMBER, trials)))
        return rates(verdicts._sharper(*pair, 0.72, 10)[1] for pair in zip(*map(np.exp, logs), strict=True))

    assert judged(1)[OPEN] >= 0.92
    assert judged(100)[HOLDS] >= 0.9
    if trials == 5:
        assert judged(5)[DIRECTION] >= 0.8
        assert judged(1 / 100)[CONTRADICTED] >= 0.9


@TRIALS
def test_steeper(trials):
    """The logarithm of LB's rise per SB's differs by 0.24 between seeds."""
    rng = np.random.default_rng(trials)

    def judged(ratio):
        rises = np.exp(rng.normal(np.log(ratio), 0.24, (NUMBER, trials)))
        return rates(verdicts._steeper([(1, rise) for rise in row]) for row in rises)

    assert judged(1)[OPEN] >= 0.92
    power = 0.8 if trials == 2 else 0.9
    assert judged(30)[HOLDS] >= power
    assert judged(1 / 30)[CONTRADICTED] >= power


def test_steeper_where_the_loss_does_not_rise_or_is_not_finite():
    for rises in ((0, 0), (np.inf, np.inf), (-1, -0.5), (1, 1.01)):
        assert verdicts._steeper([rises]).startswith(OPEN)
        assert verdicts._steeper([rises] * 2) != CONTRADICTED
    assert verdicts._steeper([(1, np.inf)]) == verdicts._steeper([(-1, 1)]) == HOLDS
    assert verdicts._steeper([(np.inf, 1)]) == verdicts._steeper([(1, -1)]) == CONTRADICTED


@pytest.mark.parametrize("trials", [1, 5])
@pytest.mark.parametrize(
    ("far", "spread"), [(verdicts.FAR_RATIO, 0.37), (verdicts.FAR_CURVATURE, 0.55), (verdicts.FAR_RISE, 0.24)]
)
def test_ratios_to_a_bound(trials, far, spread):
    """Bounds that one trial must exceed, with the spreads that they are from; over trials the t-test needs none."""
    rng = np.random.default_rng(trials)

    def judged(ratio):
        return rates(evidence.beyond(row, far) for row in np.exp(rng.normal(np.log(ratio), spread, (NUMBER, trials))))

    assert judged(1)[OPEN] >= 0.92
    assert judged(far**2)[HOLDS] >= 0.9
    assert judged(far**-2)[CONTRADICTED] >= 0.9


@TRIALS
def test_fine_tuning(trials):
    """Three sizes up to 256 and one of 1,024, 10,000 test samples, of which 94 % are right."""
    rng = np.random.default_rng(trials)

    def judged(fall):
        ends = {32: 94.0, 128: 94.0, 256: 94.0, 1024: 94.0 - fall}
        samples = {size: rng.binomial(10_000, end / 100, (NUMBER, trials)) / 100 for size, end in ends.items()}
        rows = (
            [finetune.Row(size, seed, 0, 0, of[i, seed]) for size, of in samples.items() for seed in range(trials)]
            for i in range(NUMBER)
        )
        return rates(finetune.level_then_falling(row, 10_000).verdict for row in rows)

    assert judged(0.0)[OPEN] >= 0.92
    assert judged(2.5)[HOLDS] >= (0.6 if trials == 2 else 0.9)
