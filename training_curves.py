"""Training curves and the sharpness of iterates (Figures 2 and 6, sections 2.2 and 3 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM from one starting point and draws training and test accuracy
by epoch (Figure 2) and, for the first trial, the sharpness of iterates against their loss (Figure 6). Says whether
stopping early would have closed the generalisation gap, how far both go from the start, and where they become sharp.
Trainings, iterates and measurements are kept and reused, and several processes with one --run_dir share the work.

    python training_curves.py -n C1
    python training_curves.py -n F1 --epochs 50 --every 10 --trials 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

import cli
import experiments
import paper
import runs
from experiments import Experiment, Row

EVERY = 10


@dataclass(frozen=True)
class EpochRow:
    """A row of the -epochs.csv file: an epoch of a training, the training set as seen while the weights moved."""

    regime: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def define_flags() -> None:
    """Define this script's flags, in the order in which --help shows their groups."""
    experiments.define_flags()
    flags.DEFINE_integer(
        "every", EVERY, "Epochs between iterates whose sharpness is measured.", lower_bound=1, module_name="Experiment"
    )
    cli.define_machine_flags()
    cli.define_folder_flags()


def main(options: flags.FlagValues) -> None:
    """Train, measure, print the claims, write the results and draw the figures."""
    experiment = Experiment.begin(options)
    import claims
    import figures
    import training

    pairs = [
        {
            regime: experiment.recipe(batch_size, seed)
            for regime, batch_size in zip(("SB", "LB"), experiment.batch_sizes, strict=True)
        }
        for seed in experiment.seeds
    ]
    ends = [recipe for pair in pairs for recipe in pair.values()]
    kept = sorted({*range(0, options.epochs, options.every), options.epochs})
    iterates = {regime: [recipe.iterate(epoch) for epoch in kept] for regime, recipe in pairs[0].items()}
    sharp = [recipe for those in iterates.values() for recipe in those]
    solutions = experiment.solve([*sharp, *ends], sharp, tested=ends)
    if solutions is None:
        return

    epochs = [
        EpochRow(regime, recipe.seed, row.epoch, row.train_loss, row.train_accuracy, row.test_loss, row.test_accuracy)
        for pair in pairs
        for regime, recipe in pair.items()
        for row in training.position(recipe, options.run_dir).history
    ]

    def curves(regime: str, column: str) -> list[list[float]]:
        return [
            [getattr(row, column) for row in epochs if (row.regime, row.seed) == (regime, seed)]
            for seed in experiment.seeds
        ]

    tests = [curves(regime, "test_accuracy") for regime in ("SB", "LB")]
    rows = {regime: [Row.of(regime, solutions[recipe]) for recipe in those] for regime, those in iterates.items()}
    others = [Row.of(regime, solutions[recipe]) for pair in pairs[1:] for regime, recipe in pair.items()]
    ratios = [solutions[pair["SB"]].distance_from_start / solutions[pair["LB"]].distance_from_start for pair in pairs]
    judged = [claims.early_stopping(*tests), claims.distances(ratios)]
    for epsilon in paper.EPSILONS:
        paths = [
            claims.Path(np.array([row.train_loss for row in those]), experiments.sharpness(those, epsilon))
            for those in rows.values()
        ]
        judged.append(claims.sharpness_paths(*paths, epsilon))

    name = experiment.name("training_curves", (f"every{options.every}", options.every != EVERY))
    runs.write_csv(Path(options.result_dir) / f"{name}-epochs.csv", epochs)
    accuracies = [
        figures.Curve(regime, curves(regime, "train_accuracy"), curves(regime, "test_accuracy")) for regime in rows
    ]
    title = experiment.title("Iterates")
    drawn = {
        "": figures.training_curves(accuracies, experiment.title("Training and testing accuracy", sharpness=False)),
        "-sharpness": figures.sharpness_by_loss(rows, title),
    }
    experiment.report(
        name,
        title,
        list(solutions.values()),
        [row for those in rows.values() for row in those] + others,
        judged,
        drawn,
    )


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
