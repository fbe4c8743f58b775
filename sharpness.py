"""Sharpness of minimizers (Tables 3 and 4, section 2.2.2 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM, or reuses what is trained, and measures Metric 2.1 of both
minimizers over the whole training set, in the full space and in random subspaces, beside the paper's values. Each
measurement is kept and reused. With --curvature it looks at the Hessian instead.

    python sharpness.py -n C2 --eps 5e-4
    python sharpness.py -n F1 --solver=both --trials=5
    python sharpness.py -n F1 --curvature
    python sharpness.py -n F1 --weights my.weights.h5
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

import cli
import measurements
import paper
import runs
from errors import UserError
from measurements import Measured, Measurement
from metric import ITERATIONS, SCALE, SOLVERS, SharpnessResult, sharpness
from subspace import MANIFOLDS, RandomSubspace, check_dimension

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from curvature import Curvature
    from data_zoo import DataSet
    from network_zoo import Network
    from objective import Objective
    from training import Recipe

__all__ = ["SharpnessResult", "sharpness"]

EPSILONS, SPACES, DIMENSION = (1e-3, 5e-4), ("full", "random"), 100  # as in the paper
CURVATURE_SAMPLES = 10_000


@dataclass(frozen=True)
class Setting:
    """A row of the table: how Metric 2.1 is measured, apart from where and with which A."""

    space: str
    epsilon: float
    solver: str

    @classmethod
    def of(cls, measured: Measured) -> Setting:
        """Return the row that a measurement belongs to."""
        return cls(measured.measurement.space, measured.measurement.epsilon, measured.measurement.solver)


@dataclass(frozen=True)
class Value:
    """A row of the .csv file: Metric 2.1 (percent) of one minimizer, mean and sample deviation over the trials, and the
    paper's. None where a trial is not resolved in float32, where there is one trial, where nothing was published."""

    minimizer: str
    space: str
    epsilon: float
    solver: str
    trials: int
    mean: float | None
    deviation: float | None
    paper_mean: float | None
    paper_deviation: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return "not resolved"
        return f"{self.mean:.4g}" + ("" if self.deviation is None else f" ± {self.deviation:.2g}")


@dataclass(frozen=True)
class Summary:
    """What the .json file holds: by minimizer, its origin and its measurements, or with --curvature its curvature, over
    the first `samples` training samples."""

    network: str
    dataset: str
    definition: str
    samples: int
    minimizers: dict[str, cli.Side]
    results: dict[str, list[Measured]] | dict[str, Curvature]
    data_source: str
    provenance: runs.Provenance


def define_flags() -> None:
    """Define this script's flags, in the order in which --help shows their groups."""
    cli.define_recipe_flags()
    group = {"module_name": "Sharpness"}
    flags.DEFINE_multi_float("eps", list(EPSILONS), "Half-width of the box (equation 3); repeat for several.", **group)
    flags.DEFINE_list("space", list(SPACES), "full (Table 3), random (Table 4) or both.", **group)
    flags.DEFINE_integer("dimension", DIMENSION, "Dimension of the random subspaces.", lower_bound=1, **group)
    flags.DEFINE_enum("manifold", MANIFOLDS[0], MANIFOLDS, "How the random subspaces are drawn.", **group)
    flags.DEFINE_integer("trials", 1, "Random subspaces to measure in.", lower_bound=1, **group)
    flags.DEFINE_enum("solver", "lbfgsb", [*SOLVERS, "both"], "What maximises the loss over the box.", **group)
    flags.DEFINE_integer("iterations", ITERATIONS, "Iterations of the solver.", lower_bound=1, **group)
    flags.DEFINE_float("scale", SCALE, "Largest slope that L-BFGS-B sees at the start; see metric.py.", **group)
    flags.DEFINE_string("weights", None, "A .weights.h5 file to measure instead of training.", **group)
    flags.DEFINE_boolean("curvature", False, "Look at the Hessian, and the loss around, at the largest eps.", **group)
    flags.DEFINE_integer(
        "curvature_samples", CURVATURE_SAMPLES, "Training samples of --curvature.", lower_bound=1, **group
    )
    cli.define_folder_flags()


def check(options: flags.FlagValues) -> None:
    """Raise `UserError` for what the flags' own checks let through."""
    cli.check_network(options)
    for eps in options.eps:
        if not (np.isfinite(eps) and eps > 0):
            raise UserError(f"--eps, the half-width of the box, must be a number above 0, not {eps:g}.")
    if not (np.isfinite(options.scale) and options.scale > 0):
        raise UserError(f"--scale must be a number above 0, not {options.scale:g}.")
    for space in options.space or [""]:
        if space not in SPACES:
            raise UserError(f"There is no --space '{space}'; choose {' or '.join(SPACES)}, or both with a comma.")


def stem(options: flags.FlagValues, network: Network, data: DataSet, recipes: tuple[Recipe, Recipe]) -> str:
    """Return the name of the outputs: the network, and every setting that makes them another experiment's."""
    given = [options.weights] if options.weights else []
    minimizers = cli.experiment(network, data, recipes, given, trained=not given)
    settings = (
        ("-".join(f"eps{eps:g}" for eps in options.eps), tuple(options.eps) != EPSILONS),
        ("-".join(options.space), tuple(options.space) != SPACES and not options.curvature),
        (f"d{options.dimension}", options.dimension != DIMENSION),
        (options.manifold, options.manifold != MANIFOLDS[0]),
        (f"t{options.trials}", options.trials != 1 and not options.curvature),
        (options.solver, options.solver != "lbfgsb" and not options.curvature),
        (f"scale{options.scale:g}", options.scale != SCALE and not options.curvature),
        (f"i{options.iterations}", options.iterations != ITERATIONS and not options.curvature),
        (f"n{options.curvature_samples}", options.curvature and options.curvature_samples != CURVATURE_SAMPLES),
    )
    kind = "curvature" if options.curvature else "sharpness"
    return "-".join([network.name, kind, *minimizers, *(text for text, differs in settings if differs)])


def find_minimizers(
    options: flags.FlagValues, data: DataSet, recipes: tuple[Recipe, Recipe]
) -> tuple[dict[str, np.ndarray], dict[str, cli.Side]]:
    """Return the weights (n,) of the given minimizer, or of the small-batch and large-batch ones, and their origins."""
    from objective import read_weights
    from training import samples_to_train

    if options.weights:
        weights = read_weights(recipes[0].build(data), options.weights)
        return {"given": weights}, {"given": cli.Side(options.weights, None, None, None)}
    samples = [samples_to_train(each, data, options.run_dir, options.retrain, options.test_history) for each in recipes]
    found, sides = {}, {}
    with cli.Progress(trained=sum(samples)) as progress:
        for label, recipe in zip(("SB", "LB"), recipes, strict=True):
            minimizer, sides[label] = cli.train(recipe, data, options, progress.training(f"{recipe.network} {label}"))
            found[label] = minimizer.weights
    return found, sides


def wanted(options: flags.FlagValues, data: DataSet, recipe: Recipe, w: np.ndarray) -> list[Measurement]:
    """Return what the flags ask to measure at a minimizer, with those in one subspace side by side."""
    at = Measurement(
        network=recipe.network,
        definition=recipe.definition,
        dataset=data.name,
        data_digest=data.digest,
        weights_digest=measurements.digest(w),
        epsilon=0.0,
        solver="",
        iterations=options.iterations,
        scale=options.scale,
    )
    places = [at] if "full" in options.space else []
    if "random" in options.space:
        drawn = dataclasses.replace(at, space="random", dimension=options.dimension, manifold=options.manifold)
        places += [dataclasses.replace(drawn, trial=trial) for trial in range(options.trials)]
    solvers = list(SOLVERS) if options.solver == "both" else [options.solver]
    return [
        dataclasses.replace(place, epsilon=eps, solver=solver)
        for place in places
        for eps in dict.fromkeys(options.eps)
        for solver in solvers
    ]


def measure(
    objective: Objective, minimizers: dict[str, np.ndarray], wishes: dict[str, list[Measurement]], run_dir: str
) -> dict[str, list[Measured]]:
    """Return all measurements that are wished for, by minimizer: the kept ones, and new ones."""
    # Each subspace is used at every minimizer before the next is drawn.
    in_order = [pair for same in zip(*wishes.values(), strict=True) for pair in zip(wishes, same, strict=True)]
    missing = [(label, wish) for label, wish in in_order if not measurements.stored(run_dir, wish)]
    # An iteration takes one evaluation, and now and then the line search another; a gradient costs two losses more.
    samples = {wish: 3 * objective.samples * (wish.iterations + 2) for _, wish in missing}
    subspace, drawn_for = None, None
    with cli.Progress(evaluated=sum(samples.values())) as progress:
        for label, wish in missing:
            if drawn_for != (place := (wish.dimension, wish.manifold, wish.trial)):
                subspace, drawn_for = wish.subspace(objective.size), place
            note = f"{label} {wish.space} eps {wish.epsilon:g} {wish.solver}"
            with progress.job(samples[wish], note) as report:
                measurements.measure(
                    objective,
                    minimizers[label],
                    wish,
                    subspace,
                    run_dir,
                    report=functools.partial(report, 3 * objective.samples),
                )
    return {label: [measurements.stored(run_dir, wish) for wish in those] for label, those in wishes.items()}


def published(measurement: Measurement, label: str, network: Network) -> paper.Published | None:
    """Return the value of Table 3 or 4 to set beside a measurement of the minimizer called `label`, if there is one."""
    table = paper.TABLE_3 if measurement.space == "full" else paper.TABLE_4
    comparable = measurement.dataset == network.dataset and measurement.dimension in (None, DIMENSION)
    row = table.get((network.name, measurement.epsilon)) if comparable else None
    return {"SB": row.small, "LB": row.large}.get(label) if row else None


def values(measured: list[Measured], label: str, network: Network) -> list[Value]:
    """Return a row for each setting in which the minimizer called `label` was measured, over its trials."""
    rows = []
    for setting in dict.fromkeys(map(Setting.of, measured)):
        same = [each for each in measured if Setting.of(each) == setting]
        trials = [each.result.value for each in same]
        resolved = None not in trials
        theirs = published(same[0].measurement, label, network)
        rows.append(
            Value(
                label,
                *dataclasses.astuple(setting),
                trials=len(trials),
                mean=float(np.mean(trials)) if resolved else None,
                deviation=float(np.std(trials, ddof=1)) if resolved and len(trials) > 1 else None,
                paper_mean=theirs.mean if theirs else None,
                paper_deviation=theirs.deviation if theirs else None,
            )
        )
    return rows


def ratio(small: float | None, large: float | None) -> str:
    """Return LB/SB as a cell."""
    return f"{large / small:.3g}" if small and large else "-"


def comparison(small: list[Value], large: list[Value]) -> str:
    """Lay out both minimizers beside the paper's, a line for each setting, and say in how many LB is the sharper."""
    rows = [["space", "epsilon", "solver", "SB", "LB", "LB/SB", "paper SB", "paper LB", "paper LB/SB"]]
    for sb, lb in zip(small, large, strict=True):
        theirs = [f"{v.paper_mean:g} ± {v.paper_deviation:g}" if v.paper_mean is not None else "-" for v in (sb, lb)]
        ratios = ratio(sb.mean, lb.mean), ratio(sb.paper_mean, lb.paper_mean)
        rows.append([sb.space, f"{sb.epsilon:g}", sb.solver, str(sb), str(lb), ratios[0], *theirs, ratios[1]])
    resolved = [(sb, lb) for sb, lb in zip(small, large, strict=True) if None not in (sb.mean, lb.mean)]
    sharper = sum(lb.mean > sb.mean for sb, lb in resolved)
    return f"{cli.table(rows)}\nLB is sharper than SB in {sharper} of the {len(resolved)} rows that are resolved."


def detail_table(measured: dict[str, list[Measured]]) -> str:
    """Lay out how each value was found."""
    header = "minimizer, space, epsilon, solver, value, f(x), max f, evaluations, iterations, stopped by"
    rows = [header.split(", ")]
    for label, those in measured.items():
        for each in those:
            at, result = each.measurement, each.result
            space = at.space if at.trial is None else f"{at.space} {at.trial}"
            losses = f"{result.loss:.4g}", f"{result.largest_loss:.4g}"
            counts = str(result.evaluations), str(result.iterations)
            rows.append([label, space, f"{at.epsilon:g}", at.solver, str(result), *losses, *counts, result.stopped])
    return cli.table(rows)


def measure_curvature(
    objective: Objective, minimizers: dict[str, np.ndarray], options: flags.FlagValues
) -> dict[str, Curvature]:
    """Return the curvature at each minimizer, with the largest box and the first A that the flags name."""
    from curvature import curvature, expected_passes

    subspace = RandomSubspace(objective.size, options.dimension, 0, options.manifold)
    expected = expected_passes(options.dimension) * objective.samples
    found = {}
    with cli.Progress(evaluated=expected * len(minimizers)) as progress:
        for label, w in minimizers.items():
            with progress.job(expected, label) as report:
                found[label] = curvature(
                    objective,
                    w,
                    max(options.eps),
                    subspace,
                    report=lambda passes, note: report(passes * objective.samples, note),
                )
    return found


def curvature_table(found: dict[str, Curvature]) -> str:
    """Lay out the curvature of each minimizer in a column."""

    def spread(numbers: list[float]) -> str:
        return " / ".join(f"{number:.3g}" for number in np.percentile(numbers, (0, 50, 100)))

    def share(c: Curvature) -> str:
        effective = c.projection.effective_dimensions
        return "-" if effective is None else f"{100 * effective / c.size:.2g}"

    some = next(iter(found.values()))
    eps, p, directions = some.sharpness.epsilon, len(some.projection.ritz_values), len(some.rises)
    lines = {
        "loss": lambda c: f"{c.sharpness.loss:.4g}",
        "largest eigenvalues of the Hessian": lambda c: ", ".join(f"{value:.4g}" for value in c.eigenvalues),
        f"Ritz values on {p} random directions: min / median / max": lambda c: spread(c.projection.ritz_values),
        "curvature along each of them: min / median / max": lambda c: spread(c.projection.directional),
        "share of the space that is curved, tr(H)^2 / (n tr(H^2)) (%)": share,
        f"Metric 2.1 at eps {eps:g} by vertex ascent (%)": lambda c: str(c.sharpness),
        "  the same, bounded by the largest eigenvalue, were f quadratic": lambda c: "{:.3g} - {:.3g}".format(
            *c.sharpness_bounds
        ),
        f"rise at {directions} random vertices of the box (%): min / median / max": lambda c: spread(c.rises),
        "share of them that rise steeply (%)": lambda c: "-" if c.steep_share is None else f"{c.steep_share:g}",
    }
    rows = [["", *found], *([line, *map(cell, found.values())] for line, cell in lines.items())]
    return (
        f"{cli.table(rows)}\nSteeply: by more than a tenth of the largest rise. The paper finds the loss around LB "
        f"minimizers steep in about {paper.STEEP_SHARE:g} % of the space."
    )


def main(options: flags.FlagValues) -> None:
    """Train or find the minimizers, measure them, print the tables and write the numbers."""
    check(options)
    import network_zoo
    from objective import Objective

    origin, began = runs.provenance(), time.monotonic()
    network = network_zoo.get(options.network)
    runs.check_writable(options.result_dir, options.run_dir)
    data = cli.load_data(options, network)
    recipes = cli.recipes(options, network, data)
    model = recipes[0].build(data)
    samples = min(options.curvature_samples, len(data.x_train)) if options.curvature else len(data.x_train)
    objective = Objective(model, data.x_train[:samples], data.y_train[:samples])
    if "random" in options.space or options.curvature:
        check_dimension(objective.size, options.dimension)
    minimizers, sides = find_minimizers(options, data, recipes)

    result = Path(options.result_dir) / stem(options, network, data, recipes)
    if options.curvature:
        results = measure_curvature(objective, minimizers, options)
        title, text = "Curvature", curvature_table(results)
    else:
        wishes = {label: wanted(options, data, recipes[0], w) for label, w in minimizers.items()}
        results = measure(objective, minimizers, wishes, options.run_dir)
        rows = [values(measured, label, network) for label, measured in results.items()]
        runs.write_csv(result.with_name(f"{result.name}.csv"), [row for some in rows for row in some])
        title, text = "Metric 2.1 (percent)", detail_table(results)
        if len(rows) == 2:
            text = f"{comparison(*rows)}\n\n{text}"
    length = "" if options.weights else f", {options.epochs} epochs, seed {options.seed}"
    summary = Summary(
        network=network.name,
        dataset=data.name,
        definition=options.definition,
        samples=samples,
        minimizers=sides,
        results=results,
        data_source=data.source,
        provenance=origin.after(time.monotonic() - began),
    )
    runs.write_json(result.with_name(f"{result.name}.json"), summary)
    print(f"\n{title} of {network.name} on {data.name} ({options.definition} definition){length}\n{text}")
    print(f"Numbers: {result}.json" + ("" if options.curvature else f", {result}.csv"))


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
