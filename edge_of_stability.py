"""The largest eigenvalue of the Hessian during training, beside the edge of stability (Cohen et al., 2021 and 2022).

Trains a network with small-batch and with large-batch ADAM from one starting point, follows the largest eigenvalue of
the Hessian every so many steps, and draws both in one figure: the eigenvalue beside 2 / learning rate, which is where
gradient descent ceases to be stable, and that of the preconditioned Hessian, which is what counts for ADAM, beside
38 / learning rate. What is followed changes nothing of a training; it is kept with it, and a training that was killed
continues. Several processes with one --run_dir share the work.

    python edge_of_stability.py -n F1 --epochs 10 --track=eigenvalue:47,eigenvalue:2
    python edge_of_stability.py -n C1 --epochs 20 --track=eigenvalue:2000:5000,eigenvalue:100:5000
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass, replace
from typing import Any

from large_batch import cli
from large_batch.cli import setting
from large_batch.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings):
    """The flags."""

    track: tuple[str, ...] = setting(
        ("eigenvalue:1000",),
        "What to follow, as eigenvalue:STEPS or eigenvalue:STEPS:SAMPLES; with a comma, SB's and LB's.",
        lambda texts: "-".join(texts).replace(":", "-"),
    )

    def resolve(self, network: Any, samples: int) -> Settings:
        """Name what to follow for both."""
        if len(self.track) > 2:
            raise UserError("--track says what to follow once for both trainings, or for small and for large batches.")
        return replace(super().resolve(network, samples), track=(self.track[0], self.track[-1]))


def main(settings: Settings) -> None:
    """Train, print what was found last, write the numbers and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import curvature_figures, tables
    from large_batch.experiment import Experiment

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings = experiment.settings
    batches = {"SB": settings.small_batch, "LB": settings.large_batch}
    recipes = {
        label: experiment.recipe(batch, track=track)
        for (label, batch), track in zip(batches.items(), settings.track, strict=True)
    }
    # Run
    if experiment.run(list(recipes.values()), []) is None:
        return
    tracked = {label: experiment.minimizers.tracked(recipe) for label, recipe in recipes.items()}
    # Table and figure
    steps = {label: -(-len(experiment.data.x_train) // batch) for label, batch in batches.items()}
    title = experiment.title(f"Largest eigenvalue of the Hessian, {settings.epochs} epochs")
    print(f"\n{title}\n{tables.tracked_table(tracked)}")
    rows = [
        {"minimizer": label, "epoch": row.step / steps[label]} | vars(row)
        for label, group in tracked.items()
        for row in group
    ]
    origins = {label: experiment.origin_of(recipe) for label, recipe in recipes.items()}
    drawn = {"": curvature_figures.edge_of_stability(tracked, steps, title)}
    experiment.write("edge", rows, {"minimizers": origins, "tracked": tracked}, drawn)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
