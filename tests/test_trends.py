import csv
from itertools import product

import numpy as np
import pytest
from scipy.stats import kendalltau
from small_network import NAME, SMALL

from large_batch.errors import UserError
from large_batch.trends import rank_correlation
from rank_measures import Settings


def sweep():
    """Minimizers of three batch sizes and three seeds each."""
    return [{"batch_size": size, "seed": seed} for size in (1, 2, 3) for seed in range(3)]


def test_a_measure_that_is_the_gap():
    gap = np.arange(9.0)
    found = rank_correlation((10**gap).tolist(), gap, sweep())
    assert (found.count, found.tau, found.low, found.high) == pytest.approx((9, 1, 1, 1))
    assert found.granulated == pytest.approx({"batch_size": 1, "seed": 1})
    assert str(rank_correlation(-gap, gap, sweep())) == "-1.00 (-1.00 to -1.00)"


def test_a_measure_that_only_follows_the_batch_size():
    """It looks good over all, and says nothing of trainings that differ in their seed only."""
    gap = np.arange(9.0)
    measure = [training["batch_size"] for training in sweep()]
    found = rank_correlation(measure, gap, sweep())
    assert found.tau == pytest.approx(kendalltau(measure, gap).statistic)
    assert 0.6 < found.tau < 1
    assert (found.granulated["batch_size"], found.granulated["seed"]) == (pytest.approx(1), None)
    assert found.mean_granulated == pytest.approx(1)


def test_noise_over_seeds_does_not_count_in_the_mean():
    """The measure rises with the batch size, as the gap does, and falls where only the seed makes the gap rise."""
    gap = np.arange(9.0)
    found = rank_correlation([10 * training["batch_size"] - training["seed"] for training in sweep()], gap, sweep())
    assert found.granulated == pytest.approx({"batch_size": 1, "seed": -1})
    assert found.mean_granulated == pytest.approx(1)


@pytest.mark.parametrize("iterates", [1, 3])
def test_the_interval_holds_the_truth_as_often_as_it_says(iterates):
    """For two normal numbers of correlation r, tau is 2 arcsin(r) / pi. Iterates of a training hardly differ here."""
    random, truth, held, widths, taus = np.random.default_rng(0), 2 * np.arcsin(0.6) / np.pi, [], [], []
    settings = [{"seed": seed, "epochs": epochs} for seed in range(40) for epochs in range(iterates)]
    for _ in range(60):
        pairs = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 40).repeat(iterates, axis=0)
        x, y = (pairs + random.normal(0, 1e-3, pairs.shape)).T
        found = rank_correlation(x, y, settings)
        held.append(found.low <= truth <= found.high)
        widths.append(found.high - found.low)
        taus.append(found.tau)
    assert np.mean(held) > 0.85  # 3 deviations of 60 draws below 95 %
    assert np.mean(widths) / (2 * 1.96) == pytest.approx(np.std(taus), rel=0.3)  # 3 deviations of that of 60 draws


def test_what_cannot_be_told():
    gap = [1.0, 2.0, 3.0]
    settings = [{"seed": i} for i in range(3)]
    found = rank_correlation([1.0, None, np.nan], gap, settings)
    assert (found.count, found.tau, str(found)) == (1, None, "-")
    assert rank_correlation([None] * 3, gap, settings).granulated.keys() == {"seed"}, "as those of other measures"
    assert rank_correlation([2.0, 2.0, 2.0], gap, settings).tau is None
    assert rank_correlation([1.0, None, 2.0], gap, settings).tau == 1
    assert rank_correlation([1.0, 2.0, 3.0], [*gap[:2], None], settings).count == 2
    iterates = [{"seed": 0, "epochs": epochs} for epochs in (1, 2, 3)]
    assert str(rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], iterates)) == "+1.00", "one training has no spread"
    with pytest.raises(UserError, match="for each minimizer"):
        rank_correlation([1.0], gap, settings)


def test_measures_of_a_sweep(run_script, tmp_path):
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result", "figure")]
    sweep = "--epochs=2", "--batch_sizes=750,1500", "--at=1,2", "--iterations=2", "--curvature_samples=100"
    sweep += ("--remedies=none,sam:radius=0.2",)
    done = run_script("rank_measures.py", "-n", NAME, *folders, *sweep, "--measure=keskar,ball,trace,eigenvalue")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "result").glob("small-measures-*.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    trainings = [(row["remedy"], row["batch_size"], row["epochs"]) for row in rows]
    assert trainings == list(product(("none", "sam:radius=0.2"), ("750", "1500"), ("1", "2")))
    assert len({row["keskar"] for row in rows}) == 8, "each is of a training of its own"
    taus = kendalltau([float(row["eigenvalue"]) for row in rows], [float(row["gap"]) for row in rows])
    assert f"{taus.statistic:+.2f} (" in done.stdout
    assert len(list((tmp_path / "figure").iterdir())) == 2
    settings = Settings(epochs=20, at=(10, 5), remedies="sam, none")
    assert settings.resolve(SMALL, 100).epochs == 10, "as long as is measured"
    assert settings.remedied() == {"sam": ("sam",), "none": ()}
    for mistake, words in (
        ("--remedies=none,smash", "There is no remedy 'smash'"),
        ("--at=101", "after the last epoch"),
        ("--remedy=sam --remedies=sam:radius=0.2", "The remedy sam would be taken twice"),
    ):
        mistaken = run_script("rank_measures.py", "-n", NAME, *folders, *mistake.split())
        assert mistaken.returncode == 2
        assert words in mistaken.stderr
