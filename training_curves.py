"""Training curves and the sharpness of iterates (Figures 2 and 6, sections 2.2 and 3 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM from one starting point and draws training and test accuracy
by epoch (Figure 2) and, for the first trial, the sharpness of iterates against their loss (Figure 6). Says whether
stopping early would have closed the generalisation gap, how far both go from the start, and where they become sharp.
Trainings, iterates and measurements are kept and reused, and several processes with one --run_dir share the work.

    python training_curves.py -n C1
    python training_curves.py -n F1 --epochs 50 --every 10 --trials 3
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from large_batch import cli, paper
from large_batch.cli import setting

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.evidence import Claim
    from large_batch.experiment import Experiment
    from large_batch.figures import Curve
    from large_batch.measurements import Solution
    from large_batch.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings, cli.TrialSettings):
    """The flags."""

    every: int = setting(10, "Epochs between iterates whose sharpness is measured.", "every{}", least=1)


def epoch_rows(experiment: Experiment, ends: dict[str, list[Recipe]]) -> list[dict]:
    """Return the rows of the -epochs.csv file: an epoch each, the training set as seen while the weights moved."""
    return [
        {"regime": regime, "seed": recipe.seed} | vars(epoch)
        for regime, recipes in ends.items()
        for recipe in recipes
        for epoch in experiment.history(recipe)
    ]


def judge(
    experiment: Experiment, curves: list[Curve], ends: list[list[Solution]], paths: list[list[Solution]]
) -> list[Claim]:
    """Judge what the paper says of early stopping, distances and the way to sharp minimizers.

    Args:
        experiment: What was run.
        curves: The training curves of SB and LB.
        ends: The minimizers of the trials of each.
        paths: The iterates of the first trial of each.
    """
    from large_batch import claims
    from large_batch.measurements import sharpness_array

    small, large = ([solution.distance_from_start for solution in group] for group in ends)
    judged = [
        claims.early_stopping(*(curve.test for curve in curves), experiment.seed_spread),
        claims.distances(np.divide(small, large).tolist()),
    ]
    for epsilon in paper.EPSILONS:
        losses = [np.array([solution.train_loss for solution in group]) for group in paths]
        sharpness = [sharpness_array(group, epsilon) for group in paths]
        judged.append(
            claims.sharpness_paths(*map(claims.Iterates, losses, sharpness), epsilon, experiment.sharpness_spread)
        )
    return judged


def main(settings: Settings) -> None:
    """Train, measure, print the claims, write the results and draw the figures."""
    settings.check()
    import network_zoo
    from large_batch import figures, tables
    from large_batch.experiment import Experiment
    from large_batch.runner import Runner

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings = experiment.settings
    ends = {
        regime: [experiment.recipe(size, seed) for seed in settings.seeds] for regime, size in settings.batches.items()
    }
    kept = sorted({*range(0, settings.epochs, settings.every), settings.epochs})
    iterates = {regime: [recipes[0].at_epoch(epoch) for epoch in kept] for regime, recipes in ends.items()}
    # Run
    sharp, tested = ([recipe for group in groups.values() for recipe in group] for groups in (iterates, ends))
    regimes = {regime: [*iterates[regime], *recipes[1:]] for regime, recipes in ends.items()}
    runner = Runner(experiment.minimizers, settings)
    solutions = runner.solve(regimes, experiment.solution_requests, sharp, tested)
    if solutions is None:
        return
    # Claims
    curves = [figures.Curve.of(regime, map(experiment.history, recipes)) for regime, recipes in ends.items()]
    paths = {regime: group[: len(kept)] for regime, group in solutions.items()}
    at_ends = [group[len(kept) - 1 :] for group in solutions.values()]
    judged = judge(experiment, curves, at_ends, list(paths.values()))
    # Table and figures
    title, accuracies = experiment.title("Iterates"), experiment.title("Training and testing accuracy", sharpness=False)
    every = [solution for group in solutions.values() for solution in group]
    text = f"{title}\n{tables.solution_table(every, experiment.published(every))}"
    drawn = {"": figures.training_curves(curves, accuracies), "-sharpness": figures.sharpness_by_loss(paths, title)}
    experiment.report("training_curves", text, every, judged, drawn, {"-epochs": epoch_rows(experiment, ends)})


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
