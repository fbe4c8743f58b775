"""Test accuracy and sharpness against the batch size (Figure 4, section 3 of Keskar et al., 2017).

Trains a network with ADAM in batches of several sizes from one starting point, each for the same number of epochs, and
estimates the batch size after which the test accuracy falls, with its uncertainty. Trainings and measurements are kept
and reused, and several processes with one --run_dir share the work.

    python batch_size_sweep.py -n C1
    python batch_size_sweep.py -n F1 --epochs 20 --trials 3 --batch_sizes 64,256,1024,4096,16384
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from large_batch import cli, paper, store
from large_batch.cli import setting

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment

SMALLEST = 64


def default_sizes(samples: int) -> tuple[int, ...]:
    """Return the batch sizes for a training set of so many samples: doubling, and at last half of the set."""
    half = samples // 2
    sizes = [SMALLEST * 2**i for i in range(half.bit_length()) if SMALLEST * 2**i < half]
    return (*sizes, max(half, 1))


@dataclass(frozen=True, kw_only=True)
class Settings(cli.TrialSettings):
    """The flags."""

    batch_sizes: tuple[int, ...] | None = setting(
        None,
        f"Batch sizes, with commas; default: {SMALLEST}, 128, 256 and so on to half of the training set, "
        "as far as the memory suffices.",
        cli.sizes_word,
        whole=True,
    )

    def resolve(self, network: Any, samples: int) -> Settings:
        """Put the sizes in order, each once."""
        sizes = tuple(sorted(set(self.batch_sizes or default_sizes(samples))))
        return replace(super().resolve(network, samples), batch_sizes=sizes)


def fitting(experiment: Experiment) -> Experiment:
    """Return the experiment with those of the default sizes for which the machine has the memory; say what is left
    out."""
    sizes = experiment.settings.batch_sizes
    fit = tuple(size for size in sizes if experiment.minimizers.memory(experiment.recipe(size)).fits) or sizes[:1]
    if left_out := [f"{size:,}" for size in sizes if size not in fit]:
        store.log.warning("Left out: batches of %s, for which the memory does not suffice.", " and ".join(left_out))
    return replace(experiment, settings=replace(experiment.settings, batch_sizes=fit))


def main(settings: Settings) -> None:
    """Train, measure, print the claims, write the results and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import claims, figures, tables
    from large_batch.experiment import Experiment
    from large_batch.measurements import sharpness_array
    from large_batch.runner import Runner

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    if not settings.batch_sizes:
        experiment = fitting(experiment)
    settings, samples = experiment.settings, len(experiment.data.x_train)
    recipes = [experiment.recipe(size, seed) for size in settings.batch_sizes for seed in settings.seeds]
    names = {experiment.network.small_batch(samples): "SB", experiment.network.large_batch(samples): "LB"}
    regimes: dict[str, list] = {}
    for recipe in recipes:
        regimes.setdefault(names.get(recipe.batch_size, ""), []).append(recipe)
    # Run
    groups = Runner(experiment.minimizers, settings).solve(regimes, experiment.solution_requests)
    if groups is None:
        return
    # Claims
    solutions = sorted(
        (solution for group in groups.values() for solution in group), key=lambda solution: solution.batch_size
    )
    sizes = np.array([solution.batch_size for solution in solutions])
    accuracies = np.array([solution.test_accuracy for solution in solutions])
    published = paper.BATCH_SIZE_THRESHOLD.get(experiment.network.name) if experiment.as_published else None
    falling, threshold = claims.accuracy_threshold(sizes, accuracies, published)
    rising = [
        claims.sharpness_threshold(sizes, sharpness_array(solutions, epsilon), epsilon, threshold)
        for epsilon in paper.EPSILONS
    ]
    # Table and figure
    title = experiment.title(f"Batch sizes, {settings.epochs} epochs")
    drawn = {"": figures.batch_size_sweep(solutions, threshold, title)}
    text = f"{title}\n{tables.solution_table(solutions, experiment.published(solutions))}"
    experiment.report("batch_size_sweep", text, solutions, [falling, *rising], drawn)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
