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

import re
from itertools import pairwise

import numpy as np
from absl import flags

import cli
import experiments
import paper
from errors import UserError
from experiments import Experiment, Row

EVERY = 10
Schedule = tuple[tuple[int, int], ...]  # as in `recipes.Recipe`


def define_flags() -> None:
    """Define this script's flags, in the order in which --help shows their groups."""
    experiments.define_flags()
    group = {"module_name": "Experiment"}
    flags.DEFINE_integer(
        "every",
        EVERY,
        "SB epochs from one warm start to the next; one more is after the first.",
        lower_bound=1,
        **group,
    )
    flags.DEFINE_integer(
        "large_batch_epochs", None, "Epochs of each LB training; default: --epochs.", lower_bound=1, **group
    )
    flags.DEFINE_string(
        "schedule",
        None,
        "Train once with a growing batch instead: epoch:batch,... says from which finished epoch on it has which size; "
        "double:k doubles the small batch every k epochs, up to the large one.",
        **group,
    )
    cli.define_machine_flags()
    cli.define_folder_flags()


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


def check(options: flags.FlagValues) -> None:
    """Raise `UserError` for flags that contradict each other."""
    if options.schedule:
        for name in ("every", "large_batch_epochs"):
            if options[name].present:
                raise UserError(f"--{name} is about warm starts, which --schedule replaces; leave one of them out.")
        schedule(options.schedule, options.epochs, 1, 2)  # a mistake shows before the data are loaded
    elif options.every > options.epochs:
        raise UserError(f"--every ({options.every}) must not be greater than --epochs ({options.epochs}).")


def grow(experiment: Experiment) -> None:
    """Compare a growing batch with small and large batches alone."""
    import claims
    import figures
    import training

    options, (small, large) = experiment.options, experiment.batch_sizes
    steps = schedule(options.schedule, options.epochs, small, large)
    regimes = {"SB": dict(batch_size=small), "LB": dict(batch_size=large)}
    regimes["growing"] = dict(batch_size=small, schedule=steps)
    recipes = {
        regime: [experiment.recipe(seed=seed, **settings) for seed in experiment.seeds]
        for regime, settings in regimes.items()
    }
    everything = [recipe for those in recipes.values() for recipe in those]
    solutions = experiment.solve(everything, tested=everything)
    if solutions is None:
        return
    rows = {regime: [Row.of(regime, solutions[recipe]) for recipe in those] for regime, those in recipes.items()}
    histories = {
        regime: [training.position(recipe, options.run_dir).history for recipe in those]
        for regime, those in recipes.items()
    }
    curves = [
        figures.Curve(
            regime,
            train=[[row.train_accuracy for row in history] for history in those],
            test=[[row.test_accuracy for row in history] for history in those],
        )
        for regime, those in histories.items()
    ]

    sharpness = {
        epsilon: {regime: float(experiments.sharpness(those, epsilon).mean()) for regime, those in rows.items()}
        for epsilon in paper.EPSILONS
    }
    judged = claims.switching(
        {curve.label: curve.test for curve in curves},
        {epsilon: values for epsilon, values in sharpness.items() if not np.isnan(list(values.values())).any()},
    )
    name = experiment.name("schedule", (re.sub("[:,]", "-", options.schedule), True))
    what = f"Growing batches ({options.schedule}), {options.epochs} epochs"
    experiment.report(
        name,
        experiment.title(what),
        list(solutions.values()),
        [row for those in rows.values() for row in those],
        [judged],
        {"": figures.training_curves(curves, experiment.title(what, sharpness=False), [epoch for epoch, _ in steps])},
    )


def piggyback(experiment: Experiment) -> None:
    """Train with large batches from iterates of small-batch training."""
    import claims
    import figures

    options, (small, large) = experiment.options, experiment.batch_sizes
    large_epochs = options.large_batch_epochs or options.epochs
    kept = sorted({1, *range(options.every, options.epochs + 1, options.every)})
    iterates, warm, alone, ends = [], [], [], []
    for seed in experiment.seeds:
        training = experiment.recipe(small, seed)
        iterates += [training.iterate(epoch) for epoch in kept]
        warm += [experiment.recipe(large, seed, large_epochs, warm_start=training.iterate(epoch)) for epoch in kept]
        alone.append(experiment.recipe(large, seed, large_epochs))
        ends.append(training)
    solutions = experiment.solve([*iterates, *ends, *alone, *warm], sharp=[*alone, *warm])
    if solutions is None:
        return

    rows = {
        "SB": [Row.of("SB", solutions[recipe]) for recipe in dict.fromkeys([*iterates, *ends])],
        "LB": [Row.of("LB", solutions[recipe]) for recipe in alone],
        "warm-started LB": [Row.of("warm-started LB", solutions[recipe]) for recipe in warm],
    }
    # A single iterate of SB may be a poor one.
    small_alone = float(np.mean([row.test_accuracy for row in rows["SB"] if row.epochs > 2 * options.epochs / 3]))
    started = rows["warm-started LB"]
    judged = claims.warm_starts(
        np.array([row.warm_start_epochs for row in started]),
        np.array([row.test_accuracy for row in started]),
        small_alone,
        float(np.mean([row.test_accuracy for row in rows["LB"]])),
        {epsilon: experiments.sharpness(started, epsilon) for epsilon in paper.EPSILONS},
    )
    title = experiment.title(f"Warm starts, {large_epochs} LB epochs")
    experiment.report(
        experiment.name(
            "warmstart",
            (f"every{options.every}", options.every != EVERY),
            (f"le{large_epochs}", large_epochs != options.epochs),
        ),
        title,
        list(solutions.values()),
        [row for those in rows.values() for row in those],
        [judged],
        {"": figures.warm_starts(rows["SB"], started, small_alone, rows["LB"], title)},
    )


def main(options: flags.FlagValues) -> None:
    """Train, measure, print the claim, write the results and draw the figure."""
    check(options)
    experiment = Experiment.begin(options)
    if options.schedule:
        grow(experiment)
    else:
        piggyback(experiment)


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
