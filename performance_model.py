"""When large batches are faster (Appendix C of Keskar et al., 2017).

With P processors, a small-batch method (SB) of parallel efficiency f_S(P) needs I_S iterations to a test accuracy that
a perfectly parallel large-batch method (LB) reaches in I_L. LB is faster if

    I_L / I_S < (B_S / B_L) / f_S(P).

Prints and draws this bound. With a network it trains it with small and with large batches, or reuses what is trained,
counts the iterations to the accuracy from the test accuracies after each epoch, and says for which efficiencies LB is
faster.

    python performance_model.py --batch_ratio 0.1 --efficiency 0.2
    python performance_model.py -n F1 --trials 5
    python performance_model.py -n C1 --epochs 20 --accuracy 70
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from large_batch import cli, files
from large_batch.cli import setting
from large_batch.errors import UserError

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment
    from large_batch.recipes import Recipe
    from large_batch.training import Epoch

GROUP = "Performance model"


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings, cli.RepeatedSettings):
    """The flags; without --network only the bound is shown."""

    accuracy: float | None = setting(
        None, "Test accuracy to be reached (percent); default: the highest that both reach.", "to{:g}", GROUP, least=0
    )
    efficiency: float = setting(0.2, "Parallel efficiency of SB, the paper's f_S(P).", "f{:g}", GROUP)
    batch_ratio: float = setting(0.1, "B_S / B_L where no network is named.", "r{:g}", GROUP)

    def check(self) -> None:
        """Raise `UserError` for shares that are none."""
        for name in ("efficiency", "batch_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name} must be above 0 and at most 1, not {getattr(self, name):g}.")
        if self.accuracy is not None and not 0 <= self.accuracy <= 100:
            raise UserError(f"--accuracy is in percent, from 0 to 100, not {self.accuracy:g}.")
        if self.network:
            super().check()


def largest_ratio(batch_ratio: float, efficiency: float) -> float:
    """Return the I_L / I_S below which LB is faster (Appendix C).

    Args:
        batch_ratio: B_S / B_L.
        efficiency: The parallel efficiency of SB, f_S(P); that of LB is 1.
    """
    return batch_ratio / efficiency


def epochs_to(history: Sequence[Epoch], accuracy: float) -> int | None:
    """Return the first epoch after which the test accuracy (percent) is at least so high; None where it never is."""
    return next((row.epoch for row in history if row.test_accuracy >= accuracy), None)


@dataclass(frozen=True)
class Reached:
    """What SB and LB of a trial needed to a test accuracy (percent), and the I_L / I_S of it.

    LB is faster where the parallel efficiency of SB is below `efficiency`, (B_S / B_L) / (I_L / I_S), above 1 for any.
    """

    seed: int
    accuracy: float
    small_epochs: int
    large_epochs: int
    small_iterations: int
    large_iterations: int
    ratio: float
    efficiency: float


@dataclass(frozen=True)
class Pair:
    """The epochs of SB and LB of a trial, their batch sizes, and the size of the training set."""

    small: Sequence[Epoch]
    large: Sequence[Epoch]
    batches: tuple[int, int]
    samples: int


def reached(seed: int, pair: Pair, accuracy: float | None = None) -> Reached | None:
    """Return what SB and LB needed to a test accuracy, the highest that both reach unless told otherwise; None where
    one of them does not reach it."""
    histories = pair.small, pair.large
    if accuracy is None:
        accuracy = min(max(row.test_accuracy for row in history) for history in histories)
    epochs = [epochs_to(history, accuracy) for history in histories]
    if None in epochs:
        return None
    small, large = (epoch * -(-pair.samples // batch) for epoch, batch in zip(epochs, pair.batches, strict=True))
    efficiency = pair.batches[0] / pair.batches[1] / (large / small)
    return Reached(seed, accuracy, *epochs, small, large, large / small, efficiency)


def over_accuracies(pair: Pair) -> tuple[list[float], list[float]]:
    """Return the test accuracies (percent) after LB's epochs that SB reaches, too, ascending, and I_L / I_S to each."""
    levels = np.unique([row.test_accuracy for row in pair.large])
    found = [reached(0, pair, level) for level in levels]
    return [one.accuracy for one in found if one], [one.ratio for one in found if one]


def table(found: list[Reached]) -> str:
    """Lay out what each trial needed."""
    from large_batch import tables

    rows = [["seed", "test %", "SB epochs", "LB epochs", "SB iterations", "LB iterations", "I_L / I_S", "LB if f_S <"]]
    for one in found:
        counts = one.small_epochs, one.large_epochs, one.small_iterations, one.large_iterations
        numbers = [f"{one.accuracy:.2f}", *(f"{count:,}" for count in counts), f"{one.ratio:.3g}"]
        rows.append([str(one.seed), *numbers, f"{one.efficiency:.3g}" if one.efficiency <= 1 else "any"])
    return tables.lay_out(rows)


def bound(batch_ratio: float, efficiency: float) -> str:
    """Say the bound in words."""
    return (
        f"At B_S / B_L = {batch_ratio:.3g} and f_S(P) = {efficiency:g} LB is faster if it converges in less than "
        f"{largest_ratio(batch_ratio, efficiency):.3g} times as many iterations as SB."
    )


def report(experiment: Experiment) -> None:
    """Train, count iterations, print the table, write the numbers and draw the figure."""
    from large_batch import figures
    from large_batch.runner import Runner

    settings = experiment.settings
    batches = tuple(settings.batches.values())
    recipes: list[list[Recipe]] = [[experiment.recipe(batch, seed) for batch in batches] for seed in settings.seeds]
    every = [recipe for pair in recipes for recipe in pair]
    for recipe in () if settings.retrain else every:
        experiment.minimizers.check_tested(recipe)
    if Runner(experiment.minimizers, settings).run(every, []) is None:
        return
    pairs = [Pair(*map(experiment.history, pair), batches, len(experiment.data.x_train)) for pair in recipes]
    judged = [reached(seed, pair, settings.accuracy) for seed, pair in zip(settings.seeds, pairs, strict=True)]
    found = [one for one in judged if one]
    ratio = batches[0] / batches[1]
    title = experiment.title(f"Iterations to a test accuracy, {settings.epochs} epochs")
    print(f"\n{title}\n{table(found)}\n{bound(ratio, settings.efficiency)}")
    if len(found) < len(judged):
        print(f"In {len(judged) - len(found)} of {len(judged)} trials SB or LB does not reach this accuracy.")
    lines = [over_accuracies(pair) for pair in pairs]
    drawn = figures.performance_model(ratio, settings.efficiency, [one.ratio for one in found], lines, title)
    summary = {"batch_ratio": ratio, "largest_ratio": largest_ratio(ratio, settings.efficiency), "found": found}
    summary |= {"over_accuracies": lines, "minimizers": experiment.origins(every)}
    experiment.write("performance_model", found, summary, {"": drawn})


def main(settings: Settings) -> None:
    """Show the bound alone, or beside a network's trainings."""
    settings.check()
    if settings.network:
        import network_zoo
        from large_batch.experiment import Experiment

        report(Experiment.begin(settings, network_zoo.get))
        return
    from large_batch import figures

    files.check_writable(settings.figure_dir)
    print(bound(settings.batch_ratio, settings.efficiency))
    name = "-".join(["performance_model", *settings.words(Settings())])
    drawn = figures.performance_model(settings.batch_ratio, settings.efficiency, title="When large batches are faster")
    files.write_all(pictures := figures.drawn(drawn, Path(settings.figure_dir) / name))
    print("Figures:", ", ".join(map(str, pictures)))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
