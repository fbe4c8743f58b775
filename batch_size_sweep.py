"""Test accuracy and sharpness against the batch size (Figure 4, section 3 of Keskar et al., 2017).

Trains a network with ADAM in batches of several sizes from one starting point, each for the same number of epochs, and
estimates the batch size after which the test accuracy falls, with its uncertainty. Trainings and measurements are kept
and reused, and several processes with one --run_dir share the work.

    python batch_size_sweep.py -n C1
    python batch_size_sweep.py -n F1 --epochs 20 --trials 3 --batch_sizes 64,256,1024,4096,16384
"""

from __future__ import annotations

import re

import numpy as np
from absl import flags

import cli
import experiments
import paper
from errors import UserError
from experiments import Experiment, Row

SMALLEST = 64


def define_flags() -> None:
    """Define this script's flags, in the order in which --help shows their groups."""
    experiments.define_flags(batch_sizes=False)
    flags.DEFINE_list(
        "batch_sizes",
        None,
        f"Batch sizes, with commas; default: {SMALLEST}, 128, 256 and so on to half of the training set.",
        module_name="Experiment",
    )
    cli.define_machine_flags()
    cli.define_folder_flags()


def default_sizes(samples: int) -> list[int]:
    """Return the batch sizes for a training set of so many samples: doubling, and at last half of the set."""
    half = samples // 2
    sizes = [SMALLEST * 2**i for i in range(half.bit_length()) if SMALLEST * 2**i < half]
    return [*sizes, max(half, 1)]


def batch_sizes(given: list[str] | None, samples: int) -> list[int]:
    """Return the batch sizes that the flag names, each once, ascending; raises `UserError` where they are none."""
    if given is None:
        return default_sizes(samples)
    if wrong := [size for size in given or [""] if not re.fullmatch(r"0*[1-9]\d{0,9}", size.strip())]:
        raise UserError(f"--batch_sizes needs whole numbers above 0, with commas between them, not '{wrong[0][:20]}'.")
    return sorted({int(size) for size in given})


def main(options: flags.FlagValues) -> None:
    """Train, measure, print the claims, write the results and draw the figure."""
    batch_sizes(options.batch_sizes, 1)  # a mistake shows before the data are loaded
    experiment = Experiment.begin(options)
    import claims
    import figures

    usual = default_sizes(len(experiment.data.x_train))
    sizes = batch_sizes(options.batch_sizes, len(experiment.data.x_train))
    recipes = [experiment.recipe(size, seed) for size in sizes for seed in experiment.seeds]
    solutions = experiment.solve(recipes)
    if solutions is None:
        return

    paper_regimes = {
        experiment.network.small_batch(len(experiment.data.x_train)): "SB",
        experiment.network.large_batch(len(experiment.data.x_train)): "LB",
    }
    rows = [Row.of(paper_regimes.get(recipe.batch_size, ""), solutions[recipe]) for recipe in recipes]
    trained = np.array([row.batch_size for row in rows])
    accuracies = np.array([row.test_accuracy for row in rows])
    comparable = experiment.data.name == experiment.network.dataset
    published = paper.BATCH_SIZE_THRESHOLD.get(experiment.network.name) if comparable else None
    falling, threshold = claims.accuracy_threshold(trained, accuracies, published)
    rising = [
        claims.sharpness_threshold(trained, experiments.sharpness(rows, epsilon), epsilon, threshold)
        for epsilon in paper.EPSILONS
    ]
    title = experiment.title(f"Batch sizes, {options.epochs} epochs")
    experiment.report(
        experiment.name("batch_size_sweep", (f"b{'-'.join(map(str, sizes))}", sizes != usual), batch_sizes=False),
        title,
        list(solutions.values()),
        rows,
        [falling, *rising],
        {"": figures.batch_size_sweep(rows, threshold, title)},
    )


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
