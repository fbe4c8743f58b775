"""Parametric plots (Figures 3 and 7 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM from one starting point, evaluates loss and accuracy on
training and test set along a path through the two minimizers (alpha = 0: small batch, alpha = 1: large batch), and
draws the figure over the original's curves. Trained minimizers and evaluated points are kept and reused, and several
processes with one --run_dir share the work.

    python plot_parametric_plot.py -n C1
    python plot_parametric_plot.py -n F1 --epochs 20 --curve curvilinear
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from absl import flags

import cli
import measurements
import paper
import runs
import tasks
from errors import UserError
from progress import Progress

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from data_zoo import DataSet
    from network_zoo import Network
    from objective import Objective
    from recipes import Recipe

POINTS, ALPHAS = 25, (-1.0, 2.0)  # as in the original's figures
CURVES = {
    "linear": r"$\alpha\,x_L + (1-\alpha)\,x_S$",
    "curvilinear": r"$\sin(\alpha\pi/2)\,x_L + \cos(\alpha\pi/2)\,x_S$",
}


@dataclass(frozen=True)
class Point:
    """Loss (nats), the same with Keras 1's clipped softmax, and accuracy (percent) at one alpha of the path."""

    alpha: float
    train_loss: float
    train_clipped_loss: float
    train_accuracy: float
    test_loss: float
    test_clipped_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class PointMeasurement:
    """Everything that determines a `Point`: the function, the two minimizers, the path and the place on it."""

    kind: ClassVar[str] = "curves"
    result_type: ClassVar[type] = Point

    network: str
    definition: str
    dataset: str
    data_digest: str
    small_digest: str
    large_digest: str
    curve: str
    alpha: float
    architecture: str = ""

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        return "-".join([self.network, self.small_digest[:8], self.large_digest[:8], self.curve, f"{self.alpha:g}"])


@dataclass(frozen=True)
class Summary:
    """What the .json file holds. `rms_difference_to_original` compares clipped losses (nats) and accuracies (percent
    points) with the original's at our alphas, where a curve was published."""

    network: str
    dataset: str
    definition: str
    curve: str
    small_batch: cli.Side
    large_batch: cli.Side
    distance_ratio: float | None
    distance_between: float
    rms_difference_to_original: dict[str, float]
    data_source: str
    provenance: runs.Provenance


def path_point(curve: str, alpha: float, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Return the weights, shape (n,), at `alpha` of the linear (Figure 3) or curvilinear (Figure 7) path."""
    if curve == "linear":
        return alpha * large + (1 - alpha) * small
    return np.sin(alpha * np.pi / 2) * large + np.cos(alpha * np.pi / 2) * small


def evaluate(train: Objective, test: Objective, alpha: float, w: np.ndarray) -> Point:
    """Evaluate the training and the test `Objective` at the weights `w`, shape (n,), which lie at `alpha`."""
    on_train, on_test = train.evaluate(w), test.evaluate(w)
    return Point(
        alpha,
        *(on_train.loss, on_train.clipped_loss, on_train.accuracy),
        *(on_test.loss, on_test.clipped_loss, on_test.accuracy),
    )


def rms_difference(points: list[Point], original: list[paper.CurvePoint]) -> dict[str, float]:
    """Return the root-mean-square difference to the original, per curve, over our alphas within its range."""
    if not original:
        return {}
    published_alphas = [point.alpha for point in original]
    inside = [point for point in points if published_alphas[0] - 1e-9 <= point.alpha <= published_alphas[-1] + 1e-9]
    if not inside:
        return {}
    differences = {}
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        ours = [getattr(point, name.replace("_loss", "_clipped_loss")) for point in inside]
        published = np.interp([point.alpha for point in inside], published_alphas, [getattr(p, name) for p in original])
        differences[name] = float(np.sqrt(np.mean(np.square(np.subtract(ours, published)))))
    return differences


def define_flags() -> None:
    """Define this script's flags, in the order in which --help shows their groups."""
    cli.define_recipe_flags()
    group = {"module_name": "Parametric plot"}
    flags.DEFINE_enum("curve", "linear", list(CURVES), "Figure 3 or Figure 7.", **group)
    flags.DEFINE_integer("points", POINTS, "Points of the path.", lower_bound=2, upper_bound=10_000, **group)
    for end, alpha in zip(("min", "max"), ALPHAS, strict=True):
        flags.DEFINE_float(f"alpha_{end}", alpha, "An end of the path.", lower_bound=-100, upper_bound=100, **group)
    for size in ("small", "large"):
        flags.DEFINE_string(
            f"{size}_batch_weights", None, f"A .weights.h5 file to take as the {size}-batch minimizer.", **group
        )
    cli.define_machine_flags()
    cli.define_folder_flags()


def stem(options: flags.FlagValues, network: Network, data: DataSet, recipes: tuple[Recipe, Recipe]) -> str:
    """Return the name of the outputs: the network, and every setting that makes them another experiment's."""
    path = (
        (f"p{options.points}", options.points != POINTS),
        (f"alpha{options.alpha_min:g}to{options.alpha_max:g}", (options.alpha_min, options.alpha_max) != ALPHAS),
    )
    curve = [options.curve] if options.curve != "linear" else []
    given = [file for file in weights_files(options) if file]
    minimizers = cli.experiment(network, data, recipes, given, trained=len(given) < 2)
    return "-".join([network.name, *curve, *minimizers, *(text for text, differs in path if differs)])


def weights_files(options: flags.FlagValues) -> tuple[str | None, str | None]:
    """Return the files given as small-batch and as large-batch minimizer."""
    return options.small_batch_weights, options.large_batch_weights


def report_table(ends: list[Point], summary: Summary, published: paper.Accuracy | None) -> str:
    """Lay out the two minimizers beside Table 2, where it applies, and the distances beside section 3's range."""
    distances = [side.distance_from_start for side in (summary.small_batch, summary.large_batch)]
    ratio = summary.distance_ratio
    rows = [
        ["", *(f"alpha = {point.alpha:g}" for point in ends)],
        ["train accuracy (%)", *(f"{point.train_accuracy:.2f}" for point in ends)],
        ["test accuracy (%)", *(f"{point.test_accuracy:.2f}" for point in ends)],
        ["train loss", *(f"{point.train_loss:.4g}" for point in ends)],
        ["test loss", *(f"{point.test_loss:.4g}" for point in ends)],
        ["distance from start", *("-" if distance is None else f"{distance:.2f}" for distance in distances)],
        ["ratio of distances SB/LB", "-" if ratio is None else f"{ratio:.2f}", ""],
    ]
    beside = [["", ""] for _ in rows]
    if published:
        beside[0] = ["Table 2", "Table 2"]
        beside[1] = [str(published.train_small), str(published.train_large)]
        beside[2] = [str(published.test_small), str(published.test_large)]
    beside[-1][0] = "{} - {}".format(*paper.DISTANCE_RATIO)
    header = ["", "SB", "LB", "paper SB", "paper LB"]
    text = cli.table([header, *(ours + theirs for ours, theirs in zip(rows, beside, strict=True))])
    if differences := summary.rms_difference_to_original:
        text += "\nRMS difference to the original figure: "
        text += ", ".join(f"{name} {difference:.3g}" for name, difference in differences.items())
    return text


def main(options: flags.FlagValues) -> None:
    """Train or find the two minimizers, evaluate the path, write the results and draw the figure."""
    cli.check_network(options)
    if not options.alpha_min < options.alpha_max:
        raise UserError(f"--alpha_min ({options.alpha_min}) must be less than --alpha_max ({options.alpha_max}).")
    task = cli.task(options)
    import figures
    import network_zoo
    import replicas as distribution
    from objective import Objective, read_weights

    origin, began = runs.provenance(), time.monotonic()
    network = network_zoo.get(options.network)
    runs.check_writable(options.figure_dir, options.result_dir, options.run_dir)
    replicas = distribution.choose(options.strategy)
    data = cli.load_data(options, network)
    recipes = cli.recipes(options, network, data)
    model = recipes[0].build(data)
    found, sides, to_train = {}, {}, {}
    for label, file, recipe in zip(("SB", "LB"), weights_files(options), recipes, strict=True):
        if file:
            found[label], sides[label] = read_weights(model, file), cli.Side(file, None, None, None)
        else:
            to_train[label] = recipe
    trained, origins = cli.train(to_train, data, options, replicas)
    found, sides = found | trained, sides | origins
    x_small, x_large, small, large = found["SB"], found["LB"], sides["SB"], sides["LB"]

    alphas = np.linspace(options.alpha_min, options.alpha_max, options.points)
    places = [
        PointMeasurement(
            network=network.name,
            definition=options.definition,
            architecture=network.architecture(options.definition),
            dataset=data.name,
            data_digest=data.digest,
            small_digest=measurements.digest(x_small),
            large_digest=measurements.digest(x_large),
            curve=options.curve,
            alpha=alpha,
        )
        # The two minimizers themselves are evaluated even where the path's points leave them out.
        for alpha in np.union1d(alphas, [0.0, 1.0]).tolist()
    ]
    train = Objective(model, data.x_train, data.y_train, replicas=replicas)
    test = Objective(model, data.x_test, data.y_test, replicas=replicas)

    def keep(place: PointMeasurement, wait: bool) -> Point:
        def make() -> Point:
            return evaluate(train, test, place.alpha, path_point(place.curve, place.alpha, x_small, x_large))

        point = measurements.keep(options.run_dir, place, make, origin, replicas, wait).result
        progress.evaluating(
            samples, f"alpha {point.alpha:+.3f} loss {point.train_loss:.4f} {point.train_accuracy:.2f}%"
        )
        return point

    share, samples = task.share(places), len(data.x_train) + len(data.x_test)
    with Progress(len(share) * samples) as progress:
        everything = list(tasks.each(share, keep).values())
    if not replicas.chief:
        return
    if task.count > 1:
        print(cli.collected_later(task, f"{len(share)} points", options.run_dir))
        return
    points = [point for point in everything if point.alpha in alphas]
    ends = [point for point in everything if point.alpha in (0, 1)]

    comparable = options.curve == "linear" and data.name == network.dataset
    original = paper.original_curve(network.name) if comparable else []
    summary = Summary(
        network=network.name,
        dataset=data.name,
        definition=options.definition,
        curve=options.curve,
        small_batch=small,
        large_batch=large,
        distance_ratio=small.distance_from_start / large.distance_from_start if len(trained) == 2 else None,
        distance_between=float(np.linalg.norm(x_small - x_large)),
        rms_difference_to_original=rms_difference(points, original),
        data_source=data.source,
        provenance=origin.after(time.monotonic() - began),
    )
    name = stem(options, network, data, recipes)
    result = Path(options.result_dir) / name
    runs.write_csv(result.with_name(f"{name}.csv"), points)
    runs.write_json(result.with_name(f"{name}.json"), summary)
    length = f"{options.epochs} epochs, seed {options.seed}" if trained else "given minimizers"
    title = f"{network.name} on {data.name} ({options.definition} definition), {length}"
    figure = figures.parametric_plot(points, original, title, CURVES[options.curve])
    written = figures.save(figure, Path(options.figure_dir) / name)
    published = paper.TABLE_2[network.name] if data.name == network.dataset else None
    print(f"\n{title}\n{report_table(ends, summary, published)}")
    print(f"Figure: {', '.join(map(str, written))}; numbers: {result}.csv, {result}.json")


if __name__ == "__main__":
    cli.run(main, define_flags, __doc__)
