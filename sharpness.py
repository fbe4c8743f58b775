"""Sharpness of minimizers (Tables 3 and 4, section 2.2.2 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM, or reuses what is trained, and measures Metric 2.1 of both
minimizers over the whole training set, in the full space and in random subspaces, beside the paper's values. Each
measurement is kept and reused. With --curvature it looks at the Hessian and the loss around instead, over the first
10,000 training samples unless told otherwise.

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
import runs
from errors import UserError
from measurements import Measured, Measurement
from metric import ITERATIONS, SCALE, SOLVERS, SharpnessResult, sharpness
from sharpness_tables import DIMENSION, comparison, curvature_table, detail_table, values
from subspace import MANIFOLDS, RandomSubspace, check_dimension

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from curvature import Curvature
    from data_zoo import DataSet
    from network_zoo import Network
    from objective import Objective
    from training import Recipe

__all__ = ["SharpnessResult", "sharpness"]

EPSILONS, SPACES = (1e-3, 5e-4), ("full", "random")  # as in the paper
CURVATURE_SAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """What the .json file holds: by minimizer, its origin and its measurements, or with --curvature its curvature, over
    the first `samples` training samples. `weights` are the digests of the minimizers."""

    network: str
    dataset: str
    data_digest: str
    definition: str
    samples: int
    minimizers: dict[str, cli.Side]
    weights: dict[str, str]
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
    flags.DEFINE_boolean(
        "curvature", False, "Look at the Hessian instead; uses the largest eps, dimension and manifold only.", **group
    )
    flags.DEFINE_integer(
        "curvature_samples", CURVATURE_SAMPLES, "Training samples of --curvature.", lower_bound=1, **group
    )
    cli.define_folder_flags(figures=False)


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


def epsilons(options: flags.FlagValues) -> tuple[float, ...]:
    """Return the epsilons that the flags name, each once, descending."""
    return tuple(sorted(set(options.eps), reverse=True))


def spaces(options: flags.FlagValues) -> tuple[str, ...]:
    """Return the spaces that the flags name, in the paper's order."""
    return tuple(space for space in SPACES if space in options.space)


def stem(options: flags.FlagValues, network: Network, data: DataSet, recipes: tuple[Recipe, Recipe]) -> str:
    """Return the name of the outputs: the network, and every setting that makes them another experiment's."""
    given = [options.weights] if options.weights else []
    minimizers = cli.experiment(network, data, recipes, given, trained=not given)
    measured, drawn = not options.curvature, options.curvature or "random" in options.space
    used, usual = (epsilons(options), EPSILONS) if measured else (epsilons(options)[:1], EPSILONS[:1])
    settings = (
        ("-".join(f"eps{eps}" for eps in used), used != usual),
        ("-".join(spaces(options)), measured and spaces(options) != SPACES),
        (f"d{options.dimension}", drawn and options.dimension != DIMENSION),
        (options.manifold, drawn and options.manifold != MANIFOLDS[0]),
        (f"t{options.trials}", measured and drawn and options.trials != 1),
        (options.solver, measured and options.solver != "lbfgsb"),
        (f"scale{options.scale:g}", measured and options.scale != SCALE),
        (f"i{options.iterations}", measured and options.iterations != ITERATIONS),
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
        for eps in epsilons(options)
        for solver in solvers
    ]


def measure(
    objective: Objective,
    minimizers: dict[str, np.ndarray],
    wishes: dict[str, list[Measurement]],
    run_dir: str,
    origin: runs.Provenance,
) -> dict[str, list[Measured]]:
    """Return all measurements that are wished for, by minimizer: the kept ones, and new ones."""
    # Each subspace is used at every minimizer before the next is drawn.
    in_order = [pair for same in zip(*wishes.values(), strict=True) for pair in zip(wishes, same, strict=True)]
    missing = {wish: label for label, wish in in_order if not measurements.stored(run_dir, wish)}
    # An iteration takes one evaluation, and now and then the line search another; a gradient costs two losses more.
    samples = {wish: 3 * objective.samples * (wish.iterations + 2) for wish in missing}
    subspace, drawn_for = None, None
    with cli.Progress(evaluated=sum(samples.values())) as progress:
        for wish, label in missing.items():
            if drawn_for != (place := (wish.dimension, wish.manifold, wish.trial)):
                subspace = None  # frees the last one before the next is drawn
                subspace, drawn_for = wish.subspace(objective.size), place
            note = f"{label} {wish.space} eps {wish.epsilon:g} {wish.solver}"
            with progress.job(samples[wish], note) as report:
                measurements.measure(
                    objective,
                    minimizers[label],
                    wish,
                    subspace,
                    run_dir,
                    origin,
                    report=functools.partial(report, 3 * objective.samples),
                )
    return {label: [measurements.stored(run_dir, wish) for wish in those] for label, those in wishes.items()}


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


def as_published(network: Network, data: DataSet, recipes: tuple[Recipe, Recipe]) -> bool:
    """Say whether the recipes are the paper's in what its tables hold for: the data and the batch sizes."""
    samples = len(data.x_train)
    usual = [network.small_batch(samples), network.large_batch(samples)]
    return data.name == network.dataset and [recipe.batch_size for recipe in recipes] == usual


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
        results = measure(objective, minimizers, wishes, options.run_dir, origin)
        comparable = as_published(network, data, recipes)
        rows = [values(measured, label, comparable) for label, measured in results.items()]
        runs.write_csv(result.with_name(f"{result.name}.csv"), [row for some in rows for row in some])
        title, text = "Metric 2.1 (percent)", detail_table(results)
        if len(rows) == 2:
            text = f"{comparison(*rows)}\n\n{text}"
    length = "" if options.weights else f", {options.epochs} epochs, seed {options.seed}"
    length += f", over the first {samples:,} training samples" if options.curvature else ""
    summary = Summary(
        network=network.name,
        dataset=data.name,
        data_digest=data.digest,
        definition=options.definition,
        samples=samples,
        minimizers=sides,
        weights={label: measurements.digest(w) for label, w in minimizers.items()},
        results=results,
        data_source=data.source,
        provenance=origin.after(time.monotonic() - began),
    )
    runs.write_json(result.with_name(f"{result.name}.json"), summary)
    print(f"\n{title} of {network.name} on {data.name} ({options.definition} definition){length}\n{text}")
    print(f"Numbers: {result}.json" + ("" if options.curvature else f", {result}.csv"))


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
