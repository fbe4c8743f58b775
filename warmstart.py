"""Warm starts and growing batches (Figure 5, sections 3 and 4 of Keskar et al., 2017).

Trains a network with small batches, keeps the iterates after the first and every few epochs, trains from each of them
with large batches and a fresh optimizer, and measures test accuracy and sharpness of these solutions ("piggybacking").
With --schedule it trains once with a batch that grows instead, the optimizer going on, and compares that with small
and large batches alone at equal epochs. Trainings, iterates and measurements are kept and reused, and several processes
with one --run_dir share the work.

    python warmstart.py -n C1
    python warmstart.py -n F1 --epochs 50 --every 10 --large_batch_epochs 20
    python warmstart.py -n F1 --epochs 50 --schedule double:10
    python warmstart.py -n F1 --epochs 50 --schedule 20:1024,40:6000
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from large_batch import cli, paper
from large_batch.cli import setting
from large_batch.errors import UserError

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment

Schedule = tuple[tuple[int, int], ...]  # as in `recipes.Recipe`


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings, cli.TrialSettings):
    """The flags."""

    every: int | None = setting(
        None, "SB epochs from one warm start to the next, default 10; one more is after the first.", "every{}", least=1
    )
    large_batch_epochs: int | None = setting(None, "Epochs of each LB training; default: --epochs.", "le{}", least=1)
    schedule: str | None = setting(
        None,
        "Train once with a growing batch instead: epoch:batch,... says from which finished epoch on it has which size; "
        "double:k doubles the small batch every k epochs, up to the large one.",
        lambda text: re.sub("[:,]", "-", text),
    )

    def check(self) -> None:
        """Raise `UserError` for flags that contradict each other."""
        super().check()
        if self.schedule:
            for name in ("every", "large_batch_epochs"):
                if getattr(self, name):
                    raise UserError(f"--{name} is about warm starts, which --schedule replaces; leave one of them out.")
            schedule(self.schedule, self.epochs, 1, 2)  # a mistake shows before the data are loaded
        elif self.every and self.every > self.epochs:
            raise UserError(f"--every ({self.every}) must not be greater than --epochs ({self.epochs}).")


def schedule(text: str, epochs: int, small: int, large: int) -> Schedule:
    """Return the schedule that the flag describes; raises `UserError` where it does not describe one."""
    if doubling := re.fullmatch(r"double:([1-9]\d{0,9})", text):
        every = int(doubling[1])
        sizes = [min(small * 2**i, large) for i in range(1, 1 + (epochs - 1) // every)]
        steps = [((i + 1) * every, size) for i, size in enumerate(sizes) if size != (small, *sizes)[i]]
    elif re.fullmatch(r"\d{1,9}:\d{1,9}(,\d{1,9}:\d{1,9})*", text):
        steps = [tuple(map(int, step.split(":"))) for step in text.split(",")]
    else:
        raise UserError(
            f"--schedule must be like 20:1024,40:6000 (epoch:batch) or double:10 (every so many epochs), not '{text}'."
        )
    if not steps or max(epoch for epoch, _ in steps) >= epochs:
        raise UserError(f"--schedule {text} has no step, or one that does not lie within the {epochs} epochs.")
    sizes = [small, *(size for _, size in steps)]
    if any(size >= later for size, later in pairwise(sizes)):
        raise UserError(f"--schedule {text} must make the batch grow with each step, beyond the small batch.")
    return tuple(steps)


def grow(experiment: Experiment) -> None:
    """Compare a growing batch with small and large batches alone."""
    from large_batch import claims, figures, tables
    from large_batch.measurements import sharpness_array
    from large_batch.runner import Runner

    # Recipes
    settings = experiment.settings
    small, large = settings.small_batch, settings.large_batch
    steps = schedule(settings.schedule, settings.epochs, small, large)
    regimes = {
        "SB": [experiment.recipe(small, seed) for seed in settings.seeds],
        "LB": [experiment.recipe(large, seed) for seed in settings.seeds],
        "growing": [experiment.recipe(small, seed, schedule=steps) for seed in settings.seeds],
    }
    # Run
    solutions = Runner(experiment.minimizers, settings).solve(
        regimes, experiment.solution_requests, tested=[recipe for group in regimes.values() for recipe in group]
    )
    if solutions is None:
        return
    # Claim
    curves = [figures.Curve.of(regime, map(experiment.history, recipes)) for regime, recipes in regimes.items()]
    sharpness = {
        epsilon: {regime: float(sharpness_array(group, epsilon).mean()) for regime, group in solutions.items()}
        for epsilon in paper.EPSILONS
    }
    known = {epsilon: values for epsilon, values in sharpness.items() if not np.isnan(list(values.values())).any()}
    judged = claims.switching({curve.label: curve.test for curve in curves}, known, experiment.seed_spread)
    # Table and figure
    what = f"Growing batches ({settings.schedule}), {settings.epochs} epochs"
    switches = [epoch for epoch, _ in steps]
    drawn = {"": figures.training_curves(curves, experiment.title(what, sharpness=False), switches)}
    every = [solution for group in solutions.values() for solution in group]
    text = f"{experiment.title(what)}\n{tables.solution_table(every, experiment.published(every))}"
    experiment.report("schedule", text, every, [judged], drawn)


def piggyback(experiment: Experiment) -> None:
    """Train with large batches from iterates of small-batch training."""
    from large_batch import claims, figures, tables
    from large_batch.measurements import sharpness_array
    from large_batch.runner import Runner

    # Recipes
    settings = experiment.settings
    epochs, every = settings.large_batch_epochs or settings.epochs, settings.every or 10
    kept = sorted({1, *range(every, settings.epochs + 1, every)})
    small = [experiment.recipe(settings.small_batch, seed) for seed in settings.seeds]
    iterates = [recipe.at_epoch(epoch) for recipe in small for epoch in kept]
    regimes = {
        "SB": list(dict.fromkeys([*iterates, *small])),
        "LB": [experiment.recipe(settings.large_batch, seed, epochs) for seed in settings.seeds],
        "warm-started LB": [
            experiment.recipe(settings.large_batch, start.seed, epochs, warm_start=start) for start in iterates
        ],
    }
    # Run
    solutions = Runner(experiment.minimizers, settings).solve(
        regimes, experiment.solution_requests, sharp=[*regimes["LB"], *regimes["warm-started LB"]]
    )
    if solutions is None:
        return
    # Claim; a single iterate of SB may be a poor one
    late = [solution for solution in solutions["SB"] if solution.epochs > 2 * settings.epochs / 3]
    small_alone = [
        float(np.mean([solution.test_accuracy for solution in late if solution.recipe.seed == seed]))
        for seed in settings.seeds
    ]
    started, by_seed = solutions["warm-started LB"], (len(settings.seeds), len(kept))
    judged = claims.warm_starts(
        np.array(kept),
        np.reshape([solution.test_accuracy for solution in started], by_seed),
        small_alone,
        [solution.test_accuracy for solution in solutions["LB"]],
        {epsilon: sharpness_array(started, epsilon).reshape(by_seed) for epsilon in paper.EPSILONS},
        experiment.seed_spread,
    )
    # Table and figure
    title = experiment.title(f"Warm starts, {epochs} LB epochs")
    drawn = {"": figures.warm_starts(solutions["SB"], started, float(np.mean(small_alone)), solutions["LB"], title)}
    every = [solution for group in solutions.values() for solution in group]
    text = f"{title}\n{tables.solution_table(every, experiment.published(every))}"
    experiment.report("warmstart", text, every, [judged], drawn)


def main(settings: Settings) -> None:
    """Train, measure, print the claim, write the results and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch.experiment import Experiment

    experiment = Experiment.begin(settings, network_zoo.get)
    if settings.schedule:
        grow(experiment)
    else:
        piggyback(experiment)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
