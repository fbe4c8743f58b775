"""Which measure of sharpness predicts the generalisation gap? Rank correlations over a sweep of trainings.

Trains a network in batches of several sizes, for several numbers of epochs, with several remedies and from several
seeds, or reuses what is trained, measures each minimizer by several measures, and prints Kendall's tau of each with the
generalisation gap (training less test accuracy), with a bootstrap interval, as Jiang et al. (2020) and Andriushchenko
et al. (2023) do: over all minimizers, and over groups that differ in one setting only. Trainings and measurements are
kept and reused, and several processes with one --run_dir share the work.

    python rank_measures.py -n F1 --batch_sizes=256,1024,6000 --at=20,50,100 --trials=3
    python rank_measures.py -n F1 --batch_sizes=256,6000 --measure=keskar,trace --curvature_samples=5000
    python rank_measures.py -n F1 --batch_sizes=6000 --remedies=none,conservative,sam,asam:radius=0.5
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from large_batch import cli, named
from large_batch.cli import setting
from large_batch.errors import UserError
from large_batch.sharpness_metric import MEASURES
from large_batch.spectrum import HESSIAN_MEASURES

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment
    from large_batch.objectives import Request

EPSILON = 1e-3  # of the boxes
ALL = (*MEASURES, *HESSIAN_MEASURES)


@dataclass(frozen=True, kw_only=True)
class Settings(cli.TrialSettings):
    """The flags."""

    batch_sizes: tuple[int, ...] | None = setting(
        None, "Batch sizes, with commas; default: small, four times as many, and large.", cli.sizes_word, whole=True
    )
    at: tuple[int, ...] | None = setting(
        None, "Epochs whose iterates are measured, with commas; default: the last.", cli.list_word("at"), whole=True
    )
    remedies: str = setting(
        "none", "Remedies, each in trainings of its own, with commas, as in none,sam:radius=0.1.", cli.named_word
    )
    measure: tuple[str, ...] = setting(ALL, "Measures, with commas.", cli.list_word(""), choices=ALL)
    curvature_samples: int = setting(
        10_000, "Training samples that the Hessian is taken over.", "hessian{}", "Spectrum", least=1
    )
    products: int = setting(60, "Products of the estimate of a trace.", "products{}", "Spectrum", least=3, most=10**6)

    def check(self) -> None:
        """Raise `UserError` for remedies that do not exist, and iterates beyond the end."""
        super().check()
        if self.at and max(self.at) > self.epochs:
            raise UserError(f"--at={max(self.at)} is after the last epoch; give --epochs={max(self.at)}, too.")
        for remedy in named.split(self.remedies):
            named.check_name(remedy, ("none", *named.REMEDIES), "remedy")

    def remedied(self) -> dict[str, tuple[str, ...]]:
        """Return the remedies of the trainings with each of --remedies, --remedy among them."""
        always = named.split(self.remedy) if self.remedy else ()
        return {one: always if one == "none" else (*always, one) for one in named.split(self.remedies)}

    def resolve(self, network: Any, samples: int) -> Settings:
        """Put lists in order, each value once, train as long as is measured, and keep to the samples there are."""
        at = tuple(sorted(set(self.at or (self.epochs,))))
        small, large = network.small_batch(samples), network.large_batch(samples)
        sizes = self.batch_sizes or (small, min(4 * small, large), large)
        return replace(
            super().resolve(network, samples),
            epochs=at[-1],
            batch_sizes=tuple(sorted(set(sizes))),
            at=at,
            measure=tuple(measure for measure in ALL if measure in self.measure),
            curvature_samples=min(self.curvature_samples, samples),
        )


def requests(experiment: Experiment) -> dict[str, Request]:
    """Return the request of each measure."""
    from large_batch.measurements import SharpnessRequest
    from large_batch.spectra import Effort

    settings = experiment.settings
    effort = Effort(settings.curvature_samples, products=settings.products)
    how = {"solver": "lbfgsb", "iterations": settings.iterations, "samples": experiment.sharpness_samples}
    asked = {}
    for measure in settings.measure:
        if measure in HESSIAN_MEASURES:
            asked[measure] = effort.measure(measure, experiment.request)
        else:
            size = MEASURES[measure].radius or EPSILON
            asked[measure] = experiment.request(SharpnessRequest, measure=measure, epsilon=size, **how)
    return asked


def main(settings: Settings) -> None:
    """Train, measure, print the correlations, write the numbers and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import curvature_figures, tables
    from large_batch.experiment import Experiment
    from large_batch.measurements import EvaluationRequest
    from large_batch.places import Place
    from large_batch.runner import Runner
    from large_batch.trends import rank_correlation

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings, evaluation = experiment.settings, experiment.request(EvaluationRequest)
    recipes = {
        experiment.recipe(size, seed, epochs, remedies=remedies): remedy
        for remedy, remedies in settings.remedied().items()
        for size in settings.batch_sizes
        for seed in settings.seeds
        for epochs in settings.at
    }
    measures = requests(experiment)
    asked = [(request, Place(recipe)) for recipe in recipes for request in (evaluation, *measures.values())]
    # Run
    found = Runner(experiment.minimizers, settings).run([], asked)
    if found is None:
        return
    trainings, rows = [], []
    for recipe, remedy in recipes.items():
        place, training = Place(recipe), {name: getattr(recipe, name) for name in ("batch_size", "epochs", "seed")}
        trainings.append(training | {"remedy": remedy})
        values = {name: found[request, place].result.value for name, request in measures.items()}
        rows.append(trainings[-1] | {"gap": found[evaluation, place].result.gap} | values)
    # Table and figure
    gaps = [row["gap"] for row in rows]
    ranks = {name: rank_correlation([row[name] for row in rows], gaps, trainings) for name in measures}
    title = experiment.title("Measures of sharpness and the generalisation gap")
    print(f"\n{title}\n{tables.rank_table(ranks)}")
    summary = {"correlations": ranks, "minimizers": experiment.origins(recipes), "results": list(found.values())}
    experiment.write("measures", rows, summary, {"": curvature_figures.measures_and_gap(rows, ranks, title)})


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
