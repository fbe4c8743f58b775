"""The largest eigenvalue of the Hessian during training, beside the edge of stability (Cohen et al., 2021 and 2022).

Trains a network with small-batch and with large-batch ADAM from one starting point, follows the largest eigenvalue of
the Hessian every so many steps, and draws both in one figure: the eigenvalue beside 2 / learning rate, which is where
gradient descent ceases to be stable, and that of the preconditioned Hessian, which is what counts for ADAM, beside
38 / learning rate. What is followed changes nothing of a training; it is kept with it, and a training that was killed
continues. Several processes with one --run_dir share the work.

    python edge_of_stability.py -n F1 --epochs 10 --track=eigenvalue:235,eigenvalue:10
    python edge_of_stability.py -n C1 --epochs 20 --track=eigenvalue:2000:1000,eigenvalue:100:1000
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from large_batch import cli
from large_batch.cli import setting
from large_batch.errors import UserError

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings):
    """The flags."""

    track: tuple[str, ...] = setting(
        ("eigenvalue:1000",),
        "What to follow, as eigenvalue:STEPS or eigenvalue:STEPS:SAMPLES (default: the first 5,000 training samples, "
        "which batch normalisation takes at once); with a comma, SB's and LB's.",
        lambda texts: "-".join(texts).replace(":", "-"),
    )

    def check(self) -> None:
        """Raise `UserError` for what cannot be followed."""
        from large_batch.recipes import Track

        super().check()
        if len(self.track) > 2:
            raise UserError("--track says what to follow once for both trainings, or for small and for large batches.")
        for text in self.track:
            Track.read(text)

    def resolve(self, network: Any, samples: int) -> Settings:
        """Name what to follow for both, with the number of samples."""
        from large_batch.recipes import Track

        both = Track.read(self.track[0]), Track.read(self.track[-1])
        texts = tuple(f"eigenvalue:{track.every}:{min(track.samples, samples)}" for track in both)
        return replace(super().resolve(network, samples), track=texts)


def check(recipes: dict[str, Recipe], steps: dict[str, int]) -> int:
    """Return over how many samples both trainings are followed, with so many `steps` an epoch.

    Raises `UserError` where it is not the same for both, or where a training is looked at at its start only.
    """
    samples = {recipe.followed.samples for recipe in recipes.values()}
    if len(samples) > 1:
        raise UserError("--track must give one number of samples for both trainings, since fewer are another function.")
    for label, recipe in recipes.items():
        if (taken := recipe.epochs * steps[label]) < recipe.followed.every:
            raise UserError(
                f"{label} takes {taken:,} steps, and would be followed at its start only; give it a look every fewer "
                "steps, as in --track=eigenvalue:235,eigenvalue:10."
            )
    return samples.pop()


def main(settings: Settings) -> None:
    """Train, print what was found last, write the numbers and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import curvature_figures, tables
    from large_batch.experiment import Experiment
    from large_batch.runner import Runner

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings = experiment.settings
    recipes = {
        label: experiment.recipe(batch, track=track)
        for (label, batch), track in zip(settings.batches.items(), settings.track, strict=True)
    }
    steps = {label: -(-len(experiment.data.x_train) // batch) for label, batch in settings.batches.items()}
    samples = check(recipes, steps)
    # Run
    if Runner(experiment.minimizers, settings).run(list(recipes.values()), []) is None:
        return
    tracked = {label: experiment.minimizers.tracked(recipe) for label, recipe in recipes.items()}
    # Table and figure
    what = f"Largest eigenvalue of the Hessian over {samples:,} training samples"
    title = experiment.title(f"{what}, {settings.epochs} epochs")
    print(f"\n{title}\n{tables.tracked_table(tracked)}")
    rows = [
        {"minimizer": label, "epoch": row.step / steps[label]} | vars(row)
        for label, group in tracked.items()
        for row in group
    ]
    origins = {label: experiment.origin_of(recipe) for label, recipe in recipes.items()}
    drawn = {"": curvature_figures.edge_of_stability(tracked, steps, title)}
    experiment.write("edge", rows, {"minimizers": origins}, drawn)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
