"""Sharpness of minimizers (Tables 3 and 4, section 2.2.2 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM, or reuses what is trained, and measures Metric 2.1 of both
minimizers over the whole training set, in the full space and in random subspaces, beside the paper's values. With
--curvature it looks at the Hessian and the loss around instead, over the first 10,000 training samples unless told
otherwise. Each measurement is kept and reused, and several processes with one --run_dir share the work.

    python sharpness.py -n C2 --eps 5e-4
    python sharpness.py -n F1 --solver=both --trials=5
    python sharpness.py -n F1 --curvature
    python sharpness.py -n F1 --weights my.weights.h5
"""

from __future__ import annotations

import dataclasses
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
import tasks
from errors import UserError
from measurements import CurvatureMeasurement, Measured, Measurement, SharpnessMeasurement
from metric import ITERATIONS, SCALE, SOLVERS, SharpnessResult, sharpness
from progress import Progress
from sharpness_tables import DIMENSION, comparison, curvature_table, detail_table, values
from subspace import MANIFOLDS, RandomSubspace, check_dimension

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from data_zoo import DataSet
    from network_zoo import Network
    from objective import Objective
    from recipes import Recipe
    from replicas import Replicas

__all__ = ["SharpnessResult", "sharpness"]

SPACES = ("full", "random")  # as in the paper
CURVATURE_SAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """What the .json file holds: by minimizer, its origin and its measurements, over the first `samples` training
    samples. `weights` are the digests of the minimizers."""

    network: str
    dataset: str
    data_digest: str
    definition: str
    samples: int
    minimizers: dict[str, cli.Side]
    weights: dict[str, str]
    results: dict[str, list[Measured]]
    data_source: str
    provenance: runs.Provenance


def define_flags() -> None:
    """Define this script's flags, in the order in which --help shows their groups."""
    cli.define_recipe_flags()
    group = {"module_name": "Sharpness"}
    flags.DEFINE_multi_float(
        "eps", list(paper.EPSILONS), "Half-width of the box (equation 3); repeat for several.", **group
    )
    flags.DEFINE_list("space", list(SPACES), "full (Table 3), random (Table 4) or both.", **group)
    flags.DEFINE_integer("dimension", DIMENSION, "Dimension of the random subspaces.", lower_bound=1, **group)
    flags.DEFINE_enum("manifold", MANIFOLDS[0], MANIFOLDS, "How the random subspaces are drawn.", **group)
    flags.DEFINE_integer("trials", 1, "Random subspaces to measure in.", lower_bound=1, upper_bound=10_000, **group)
    flags.DEFINE_enum("solver", "lbfgsb", [*SOLVERS, "both"], "What maximises the loss over the box.", **group)
    flags.DEFINE_integer(
        "iterations", ITERATIONS, "Iterations of the solver.", lower_bound=1, upper_bound=10**6, **group
    )
    flags.DEFINE_float("scale", SCALE, "Largest slope that L-BFGS-B sees at the start; see metric.py.", **group)
    flags.DEFINE_string("weights", None, "A .weights.h5 file to measure instead of training.", **group)
    flags.DEFINE_boolean(
        "curvature", False, "Look at the Hessian instead; uses the largest eps, dimension and manifold only.", **group
    )
    flags.DEFINE_integer(
        "curvature_samples", CURVATURE_SAMPLES, "Training samples of --curvature.", lower_bound=1, **group
    )
    cli.define_machine_flags()
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
    used, usual = (epsilons(options), paper.EPSILONS) if measured else (epsilons(options)[:1], paper.EPSILONS[:1])
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
    options: flags.FlagValues, data: DataSet, recipes: tuple[Recipe, Recipe], labels: list[str], replicas: Replicas
) -> tuple[dict[str, np.ndarray], dict[str, cli.Side]]:
    """Return the weights (n,) of the minimizers of these labels, the given one or trained ones, and their origins."""
    from objective import read_weights

    if options.weights:
        weights = read_weights(recipes[0].build(data), options.weights)
        return {"given": weights}, {"given": cli.Side(options.weights, None, None, None)}
    asked = dict(zip(("SB", "LB"), recipes, strict=True))
    return cli.train({label: asked[label] for label in labels}, data, options, replicas)


def wanted(options: flags.FlagValues, data: DataSet, recipe: Recipe, samples: int) -> list[Measurement]:
    """Return what the flags ask to measure at any minimizer, with what is in one subspace side by side."""
    common = dict(
        network=recipe.network,
        definition=recipe.definition,
        architecture=recipe.architecture,
        dataset=data.name,
        data_digest=data.digest,
        weights_digest="",
    )
    drawn = dict(dimension=options.dimension, manifold=options.manifold)
    if options.curvature:
        return [CurvatureMeasurement(**common, samples=samples, epsilon=epsilons(options)[0], **drawn)]
    places = [{"space": "full"}] if "full" in options.space else []
    if "random" in options.space:
        places += [{"space": "random", "trial": trial, **drawn} for trial in range(options.trials)]
    solvers = list(SOLVERS) if options.solver == "both" else [options.solver]
    return [
        SharpnessMeasurement(
            **common, **place, epsilon=eps, solver=solver, iterations=options.iterations, scale=options.scale
        )
        for place in places
        for eps in epsilons(options)
        for solver in solvers
    ]


def measure(
    objective: Objective,
    minimizers: dict[str, np.ndarray],
    wishes: dict[Measurement, str],
    run_dir: str,
    origin: runs.Provenance,
    replicas: Replicas,
) -> dict[Measurement, Measured]:
    """Return all measurements that are wished for, each at the minimizer of its label: the kept ones, and new ones."""
    subspaces: dict[tuple, RandomSubspace | None] = {}  # the last one, for measurements side by side

    def subspace(wish: Measurement) -> RandomSubspace | None:
        place = wish.dimension, wish.manifold, wish.trial
        if place not in subspaces:
            subspaces.clear()  # frees the last one before the next is drawn
            subspaces[place] = wish.subspace(objective.size)
        return subspaces[place]

    samples = {wish: 0 if measurements.stored(run_dir, wish) else objective.samples * wish.passes for wish in wishes}

    def keep(wish: Measurement, wait: bool) -> Measured:
        with progress.job(samples[wish], f"{wishes[wish]} {wish.name}") as report:

            def make() -> object:
                def passed(passes: int, note: str) -> None:
                    report(passes * objective.samples, note)

                return wish.make(objective, minimizers[wishes[wish]], subspace(wish), passed)

            return measurements.keep(run_dir, wish, make, origin, replicas, wait)

    with Progress(sum(samples.values())) as progress:
        return tasks.each(list(wishes), keep)


def as_published(network: Network, data: DataSet, recipes: tuple[Recipe, Recipe]) -> bool:
    """Say whether the recipes are the paper's in what its tables hold for: the data and the batch sizes."""
    samples = len(data.x_train)
    usual = [network.small_batch(samples), network.large_batch(samples)]
    return data.name == network.dataset and [recipe.batch_size for recipe in recipes] == usual


def main(options: flags.FlagValues) -> None:
    """Train or find the minimizers, measure them, print the tables and write the numbers."""
    check(options)
    task = cli.task(options)
    import network_zoo
    import replicas as distribution
    from objective import Objective

    origin, began = runs.provenance(), time.monotonic()
    network = network_zoo.get(options.network)
    runs.check_writable(options.result_dir, options.run_dir)
    replicas = distribution.choose(options.strategy)
    data = cli.load_data(options, network)
    recipes = cli.recipes(options, network, data)
    model = recipes[0].build(data)
    samples = min(options.curvature_samples, len(data.x_train)) if options.curvature else len(data.x_train)
    objective = Objective(model, data.x_train[:samples], data.y_train[:samples], replicas=replicas)
    if "random" in options.space or options.curvature:
        check_dimension(objective.size, options.dimension)

    labels = ["given"] if options.weights else ["SB", "LB"]
    plan = [(label, wish) for wish in wanted(options, data, recipes[0], samples) for label in labels]
    plan = task.share(plan)  # with what is in one subspace side by side
    labels = [label for label in labels if label in dict(plan)]
    minimizers, sides = find_minimizers(options, data, recipes, labels, replicas)
    digests = {label: measurements.digest(w) for label, w in minimizers.items()}
    asked = [(label, dataclasses.replace(wish, weights_digest=digests[label])) for label, wish in plan]
    wishes = {wish: label for label, wish in asked}
    found = measure(objective, minimizers, wishes, options.run_dir, origin, replicas)
    if not replicas.chief:
        return
    if task.count > 1:
        print(cli.collected_later(task, f"{len(found)} measurements", options.run_dir))
        return
    results = {label: [found[wish] for of, wish in asked if of == label] for label in labels}

    result = Path(options.result_dir) / stem(options, network, data, recipes)
    if options.curvature:
        title, text = "Curvature", curvature_table({label: those[0].result for label, those in results.items()})
    else:
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
        weights=digests,
        results=results,
        data_source=data.source,
        provenance=origin.after(time.monotonic() - began),
    )
    runs.write_json(result.with_name(f"{result.name}.json"), summary)
    print(f"\n{title} of {network.name} on {data.name} ({options.definition} definition){length}\n{text}")
    print(f"Numbers: {result}.json" + ("" if options.curvature else f", {result}.csv"))


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
