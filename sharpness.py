"""Sharpness of minimizers (Tables 3 and 4, section 2.2.2 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM, or reuses what is trained, and measures Metric 2.1 of both
minimizers over the whole training set, in the full space and in random subspaces, beside the paper's values. With
--curvature it looks at the Hessian and the loss around instead, over the first 10,000 training samples unless told
otherwise. Each measurement is kept and reused, and several processes with one --run_dir share the work.

    python sharpness.py -n C2 --eps 5e-4
    python sharpness.py -n F1 --solver lbfgsb,vertex --trials 5
    python sharpness.py -n F1 --curvature
    python sharpness.py -n F1 --space=full --measure=keskar,relative,ball,adaptive --rescale=0.1,0.3,1,3,10
    python sharpness.py -n F1 --weights my.weights.h5
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from large_batch import cli, paper
from large_batch.cli import setting
from large_batch.errors import UserError
from large_batch.networks import STATISTICS
from large_batch.sharpness_metric import ITERATIONS, MEASURES, SCALE, SOLVERS
from large_batch.spectrum import HESSIAN_MEASURES
from large_batch.subspace import MANIFOLDS, check_dimension

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment
    from large_batch.measurements import Measured, Value
    from large_batch.objectives import Objectives, Request

SPACES = ("full", "random")  # as in the paper
GROUP = "Sharpness"


@dataclass(frozen=True, kw_only=True)
class Settings(cli.SpectrumSettings):
    """The flags."""

    eps: tuple[float, ...] = setting(
        paper.EPSILONS, "Half-widths of the box (equation 3), with commas.", cli.list_word("eps"), GROUP
    )
    space: tuple[str, ...] = setting(
        SPACES, "full (Table 3), random (Table 4), or both with a comma.", cli.list_word(""), GROUP, choices=SPACES
    )
    dimension: int = setting(paper.DIMENSION, "Dimension of the random subspaces.", "d{}", GROUP, least=1)
    manifold: str = setting(MANIFOLDS[0], "How the random subspaces are drawn.", "{}", GROUP, choices=MANIFOLDS)
    trials: int = setting(1, "Random subspaces to measure in.", "t{}", GROUP, least=1, most=10_000)
    solver: tuple[str, ...] = setting(
        tuple(SOLVERS)[:1], "lbfgsb, vertex, or both with a comma.", cli.list_word(""), GROUP, choices=tuple(SOLVERS)
    )
    scale: float = setting(
        SCALE, "Largest slope that L-BFGS-B sees at the start; see sharpness_metric.py.", "scale{:g}", GROUP
    )
    iterations: int = setting(ITERATIONS, "Iterations of the solver.", "i{}", GROUP, least=1, most=10**6)
    sharpness_samples: int | None = cli.samples_setting(GROUP)
    weights: str | None = setting(None, "A .weights.h5 file to measure instead of training.", cli.file_word, GROUP)
    measure: tuple[str, ...] = setting(
        ("keskar",),
        "Metric 2.1 (keskar), the same in a box of relative size (relative), SAM's ball (ball), ASAM's (adaptive); the "
        "Hessian's largest eigenvalue (eigenvalue), its trace (trace).",
        cli.list_word(""),
        GROUP,
        choices=(*MEASURES, *HESSIAN_MEASURES),
    )
    rho: float | None = setting(None, "Radius of the balls; default: 0.05 of ball, 0.5 of adaptive.", "rho{:g}", GROUP)
    rescale: tuple[float, ...] = setting(
        (1.0,), "Factors of the weights before a batch normalisation, with commas.", cli.list_word("x"), GROUP
    )
    products: int = setting(
        60, "Hessian-vector products of each estimate of a trace.", "products{}", GROUP, least=3, most=10**6
    )
    statistics: str = setting(
        STATISTICS[0],
        "Of ordinary batch normalisation; see large_batch/statistics.py.",
        "{}",
        GROUP,
        choices=STATISTICS,
    )
    curvature: bool = setting(
        False, "Look at the Hessian instead, over --curvature_samples; takes the largest eps only.", "", GROUP
    )
    curvature_samples: int = setting(
        10_000, "Training samples that the Hessian is taken over.", "hessian{}", GROUP, least=1
    )

    def check(self) -> None:
        """Raise `UserError` for a scale or radius that is none, and for what the curvature does not depend on."""
        super().check()
        ignored = ("space", "trials", "solver", "scale", "iterations", "sharpness_samples", "measure", "rho")
        for name in ignored if self.curvature else ():
            if getattr(self, name) != getattr(Settings(), name):
                raise UserError(
                    f"--curvature looks at the Hessian instead and takes no --{name}; leave one of them out."
                )
        for name in ("scale", "rho"):
            if (value := getattr(self, name)) is not None and not (np.isfinite(value) and value > 0):
                raise UserError(f"--{name} must be a number above 0, not {value:g}.")

    def resolve(self, network: Any, samples: int) -> Settings:
        """Put lists into the paper's order, and keep to the samples there are."""
        return replace(
            super().resolve(network, samples),
            eps=tuple(sorted(set(self.eps), reverse=True)),
            space=tuple(space for space in SPACES if space in self.space),
            measure=tuple(measure for measure in (*MEASURES, *HESSIAN_MEASURES) if measure in self.measure),
            rescale=tuple(sorted(set(self.rescale))),
            solver=tuple(solver for solver in SOLVERS if solver in self.solver),
            sharpness_samples=min(self.sharpness_samples or samples, samples),
            curvature_samples=min(self.curvature_samples, samples),
        )

    def sizes(self, measure: str) -> tuple[float, ...]:
        """Return the sizes of the regions of a measure."""
        radius = MEASURES[measure].radius
        return self.eps if radius is None else (self.rho or radius,)


def requests(experiment: Experiment, objectives: Objectives) -> list[Request]:
    """Return what the settings ask to measure at any minimizer, with what is in one subspace side by side."""
    from large_batch.measurements import CurvatureRequest, SharpnessRequest
    from large_batch.spectra import Effort

    settings = experiment.settings
    effort = Effort(settings.curvature_samples, settings.probes, settings.steps, settings.products)
    drawn = {"dimension": settings.dimension, "manifold": settings.manifold}
    objectives.check_statistics(settings.statistics)
    objectives.check_rescale(*settings.rescale)
    if settings.curvature or "random" in settings.space:
        check_dimension(objectives.size, settings.dimension)
    if settings.curvature:
        where = {"epsilon": settings.eps[0], "samples": settings.curvature_samples}
        layers = ["", *(objectives.parts if settings.by_layer else ())]
        asked = []
        for factor in settings.rescale:
            how = {"rescale": factor, "statistics": settings.statistics}
            asked.append(experiment.request(CurvatureRequest, **where, **drawn, **how))
            for layer in layers:
                asked += effort.all(experiment.request, layer=layer, **how)
        return asked
    places = [{"space": "full"}] if "full" in settings.space else []
    if "random" in settings.space:
        places += [{"space": "random", "trial": trial, **drawn} for trial in range(settings.trials)]
    how = {"iterations": settings.iterations, "scale": settings.scale, "samples": experiment.sharpness_samples}
    how["statistics"] = settings.statistics
    of_hessian = [
        effort.measure(measure, experiment.request, rescale=factor, statistics=settings.statistics)
        for factor in settings.rescale
        for measure in settings.measure
        if measure in HESSIAN_MEASURES
    ]
    return of_hessian + [
        experiment.request(SharpnessRequest, epsilon=size, solver=name, rescale=factor, measure=measure, **how, **place)
        for place in places
        for factor in settings.rescale
        for measure in settings.measure
        if measure in MEASURES
        for size in settings.sizes(measure)
        for name in settings.solver
    ]


def main(settings: Settings) -> None:
    """Train or find the minimizers, measure them, print the tables, write the numbers and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import curvature_figures, tables
    from large_batch.experiment import Experiment
    from large_batch.measurements import EvaluationRequest
    from large_batch.places import Place
    from large_batch.runner import Runner

    # Recipes
    several = len(set(settings.rescale)) > 1 and not settings.curvature
    experiment = Experiment.begin(settings, network_zoo.get, figures=several)
    settings = experiment.settings
    runner, ends = Runner(experiment.minimizers, settings), {"given": settings.weights}
    if not settings.weights:
        ends = {label: experiment.recipe(batch) for label, batch in settings.batches.items()}
    factors = () if settings.rescale == (1.0,) else settings.rescale
    how = {"statistics": settings.statistics}
    same = [experiment.request(EvaluationRequest, rescale=factor, **how) for factor in factors]
    asked = requests(experiment, runner.objectives)
    # Run
    wanted = {label: [(request, Place(end)) for request in asked] for label, end in ends.items()}
    checks = {label: [(request, Place(end)) for request in same] for label, end in ends.items()}
    measured = runner.run([], [item for items in (*checks.values(), *wanted.values()) for item in items])
    if measured is None:
        return
    results = {label: [measured[item] for item in items] for label, items in wanted.items()}
    # Tables and figure
    what, text, rows = curved(settings, results) if settings.curvature else sharp(experiment, ends, results)
    if factors:
        evaluated = {label: [measured[item] for item in items] for label, items in checks.items()}
        text += f"\n\n{tables.rescaled_evaluations(evaluated)}"
    length = "given minimizer" if settings.weights else f"{settings.epochs} epochs"
    title = experiment.title(f"{what}, {length}")
    print(f"\n{title}\n{text}")
    drawn = {"": curvature_figures.rescaling(results, title)} if several else {}
    origins = {label: experiment.origin_of(end) for label, end in ends.items()}
    kind = "curvature" if settings.curvature else "sharpness"
    experiment.write(kind, rows, {"minimizers": origins, "results": results}, drawn)


def curved(settings: Settings, results: dict[str, list[Measured]]) -> tuple[str, str, list]:
    """Return what --curvature shows: its heading, its tables, and no rows."""
    from large_batch import tables
    from large_batch.sharpness_metric import Curvature

    around, spectra = {}, {}
    for label, group in results.items():
        for measured in group:
            factor = measured.measurement.rescale
            column = label if factor == 1 else f"{label} x {factor:g}"
            if isinstance(measured.result, Curvature):
                around[column] = measured.result
            else:
                spectra.setdefault(column, []).append(measured)
    text = f"{tables.curvature_table(around)}\n\n{tables.spectrum_table(spectra)}"
    return f"Curvature, over the first {settings.curvature_samples:,} training samples", text, []


def sharp(experiment: Experiment, ends: dict, results: dict[str, list[Measured]]) -> tuple[str, str, list[Value]]:
    """Return the heading, the tables and the rows of sharpness."""
    from large_batch import tables

    text = tables.sharpness_details(results)
    if len(ends) == 2:
        text = f"{tables.sharpness_comparison(results, experiment.batches_as_published)}\n\n{text}"
    rows = [
        experiment.sharpness_value(label, None if experiment.settings.weights else ends[label], measured)
        for label, group in results.items()
        for measured in group
    ]
    measures = set(experiment.settings.measure)
    what = "Metric 2.1" if measures == {"keskar"} else "Measures of sharpness"
    return f"{what} (percent)" if measures <= MEASURES.keys() else what, text, rows


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
