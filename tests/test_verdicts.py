"""How often the ledger's rules err, and how often they find what is there, by simulation.

Of 400 made-up comparisons 5 % are 20; 33 or more come by chance in less than 1 % of cases.
"""

import numpy as np
import pytest
from test_claims import rates

import finetune
from large_batch import claims, verdicts
from large_batch.claims import CONTRADICTED, DIRECTION, HOLDS, OPEN
from large_batch.results import Trials

NUMBER, SEEDS = 400, 0.1  # comparisons; deviation of the test accuracy over seeds, points
TRIALS = pytest.mark.parametrize("trials", [1, 2, 5])


def accuracies(rng, end, trials):
    return rng.normal(end, SEEDS, (NUMBER, trials))


@TRIALS
def test_the_gap(trials):
    rng = np.random.default_rng(trials)

    def judged(gap):
        pairs = zip(accuracies(rng, 98, trials), accuracies(rng, 98 - gap, trials), strict=True)
        return rates(claims.clear_side([(1, small), (-1, large)], SEEDS) for small, large in pairs)

    assert judged(0)[OPEN] >= 0.92
    assert judged(1.5)[HOLDS] >= 0.9
    assert judged(-1.5)[CONTRADICTED] >= 0.9


@TRIALS
@pytest.mark.parametrize("helps", [True, False])
def test_remedies(trials, helps):
    """With a gap of 4 points, of which a remedy closes no part, all, or half; and without a gap."""
    rng = np.random.default_rng(trials)

    def judged(gap, closed):
        ends = (accuracies(rng, end, trials) for end in (98, 98 - gap, 98 - gap + closed * gap))
        rows = (tuple(Trials(list(values), 100, False, []) for values in row) for row in zip(*ends, strict=True))
        return rates(verdicts._helped(*row, helps, SEEDS) for row in rows)

    assert judged(0, 0)[OPEN] >= 0.92
    if helps:
        assert judged(4, 0)[OPEN] >= 0.92
        assert judged(4, 1)[HOLDS] >= 0.9
        assert judged(4, -1)[CONTRADICTED] >= 0.9
    else:
        assert judged(4, 0.5)[OPEN] >= 0.92
        assert judged(4, 0.7)[HOLDS] <= 0.08
        assert judged(4, 0)[HOLDS] >= 0.9
        assert judged(4, 1)[CONTRADICTED] >= 0.9


@TRIALS
def test_sharper(trials):
    """Seeds differ as those of F1 at epsilon 1e-3."""
    rng = np.random.default_rng(trials)

    def judged(ratio):
        logs = (rng.normal(0, 0.67, (NUMBER, trials)), rng.normal(np.log(ratio), 0.26, (NUMBER, trials)))
        return rates(verdicts._sharper(*pair)[1] for pair in zip(*map(np.exp, logs), strict=True))

    assert judged(1)[OPEN] >= 0.92
    assert judged(100)[HOLDS] >= (0.6 if trials == 2 else 0.9), "a t-test of two trials sees less"
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

    assert judged(1)[HOLDS] <= 0.05
    assert judged(10)[HOLDS] >= 0.95
    assert judged(1 / 10)[CONTRADICTED] >= 0.95
    if trials == 1:
        assert judged(1)[OPEN] >= 0.99


@TRIALS
@pytest.mark.parametrize(
    ("far", "spread"), [(verdicts.FAR_RATIO, 0.37), (verdicts.FAR_CURVATURE, 0.55), (claims.FAR_SHARPER, 0.72)]
)
def test_ratios_to_a_bound(trials, far, spread):
    """When LB pays, curvature, and sharpness along a training, with the spreads that their bounds are from."""
    rng = np.random.default_rng(trials)

    def judged(ratio):
        return rates(claims.beyond(row, far) for row in np.exp(rng.normal(np.log(ratio), spread, (NUMBER, trials))))

    assert judged(1)[OPEN] >= 0.92
    if trials != 2:
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

    assert judged(0.0)[HOLDS] <= 0.08
    assert judged(2.0)[HOLDS] >= 0.9
