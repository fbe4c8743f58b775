"""Parametric plots (Figures 3 and 7 of Keskar et al., 2017).

Trains a network with small-batch and with large-batch ADAM from one starting point, evaluates loss and accuracy on
training and test set along a path through the two minimizers (alpha = 0: small batch, alpha = 1: large batch), and
draws the figure over the original's curves. Trained minimizers and evaluated points are kept and reused, and several
processes with one --run_dir share the work.

    python plot_parametric_plot.py -n C1
    python plot_parametric_plot.py -n F1 --epochs 20 --curve curvilinear
    python plot_parametric_plot.py -n MobileNetV2 --statistics=interpolate,batch,recalibrate
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from large_batch import cli, paper
from large_batch.cli import setting
from large_batch.errors import UserError
from large_batch.networks import STATISTICS

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment
    from large_batch.measurements import Evaluated

CURVES = {
    "linear": r"$\alpha\,x_L + (1-\alpha)\,x_S$",
    "curvilinear": r"$\sin(\alpha\pi/2)\,x_L + \cos(\alpha\pi/2)\,x_S$",
}
GROUP = "Parametric plot"


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings):
    """The flags; 25 points on [-1, 2] as in the original's figures."""

    curve: str = setting("linear", "Figure 3 or Figure 7.", "{}", GROUP, choices=tuple(CURVES))
    points: int = setting(25, "Points of the path.", "p{}", GROUP, least=2, most=10_000)
    alpha_min: float = setting(-1.0, "Where the path begins.", "from{:g}", GROUP, least=-100, most=100)
    alpha_max: float = setting(2.0, "Where the path ends.", "to{:g}", GROUP, least=-100, most=100)
    small_batch_weights: str | None = setting(
        None, "A .weights.h5 file to take as the small-batch minimizer.", partial(cli.file_word, side="SB-"), GROUP
    )
    large_batch_weights: str | None = setting(
        None, "A .weights.h5 file to take as the large-batch minimizer.", partial(cli.file_word, side="LB-"), GROUP
    )
    statistics: tuple[str, ...] = setting(
        STATISTICS[:1],
        f"Of ordinary batch normalisation: {', '.join(STATISTICS)}; several are drawn in one figure.",
        cli.list_word(""),
        GROUP,
        choices=STATISTICS,
    )

    def check(self) -> None:
        """Raise `UserError` for an empty path."""
        super().check()
        if not self.alpha_min < self.alpha_max:
            raise UserError(f"--alpha_min ({self.alpha_min}) must be less than --alpha_max ({self.alpha_max}).")


def original_curve(experiment: Experiment, curve: str) -> list[paper.CurvePoint]:
    """Return the original's points on a kind of path; empty for curvilinear ones, of which none were released."""
    if curve != "linear" or not experiment.batches_as_published:
        return []
    return paper.original_curve(experiment.network.name)


def rms_difference(alphas: list[float], points: list[Evaluated], original: list[paper.CurvePoint]) -> dict[str, float]:
    """Return the root-mean-square difference to the original's curves over our alphas within its range.

    Losses (nats) are compared clipped, as the original's are; accuracies in percent points.
    """
    if not original:
        return {}
    published = [point.alpha for point in original]
    low, high = published[0] - 1e-9, published[-1] + 1e-9
    inside = {alpha: one for alpha, one in zip(alphas, points, strict=True) if low <= alpha <= high and not one.note}
    differences = {}
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy") if inside else ():
        ours = [getattr(one, name.replace("_loss", "_clipped_loss")) for one in inside.values()]
        theirs = np.interp(list(inside), published, [getattr(point, name) for point in original])
        differences[name] = float(np.sqrt(np.mean(np.square(np.subtract(ours, theirs)))))
    return differences


def rows(alphas: list[float], curves: dict[str, list[Evaluated]]) -> list[dict]:
    """Return the rows of the .csv file, a point each, with policies and notes where there are some."""
    noted = any(point.note for points in curves.values() for point in points)
    left_out = (set() if noted else {"note"}) | (set() if len(curves) > 1 else {"statistics"})
    found = [
        {"statistics": policy, "alpha": alpha} | asdict(point)
        for policy, points in curves.items()
        for alpha, point in zip(alphas, points, strict=True)
    ]
    return [{name: value for name, value in row.items() if name not in left_out} for row in found]


def not_finite(alphas: list[float], points: list[Evaluated]) -> dict:
    """Say where the loss is not finite; return what the .json file has of it."""
    notes = {alpha: point.note for alpha, point in zip(alphas, points, strict=True) if point.note}
    if notes:
        print(f"Not finite at {len(notes)} of {len(points)} points, the first at alpha {next(iter(notes)):g}.")
    return {"not_finite": notes} if notes else {}


def number(value: float | None, style: str) -> str:
    """Return a cell of the table."""
    return "not finite" if value is None else format(value, style)


def table(
    ends: list[Evaluated],
    distances: list[float | None],
    published: paper.Accuracy | None,
    differences: dict[str, float],
) -> str:
    """Lay out the two minimizers beside Table 2, where it applies, the distances beside section 3's range, and how far
    the curves are from the original's (`rms_difference`)."""
    from large_batch import tables

    ratio = "-" if None in distances or not distances[1] else f"{distances[0] / distances[1]:.2f}"
    rows = [["", "SB, alpha = 0", "LB, alpha = 1", "paper SB", "paper LB"]]
    for half in ("train", "test"):
        ours = [number(getattr(end, f"{half}_accuracy"), ".2f") for end in ends]
        theirs = [str(getattr(published, f"{half}_{side}")) if published else "" for side in ("small", "large")]
        rows.append([f"{half} accuracy (%)", *ours, *theirs])
    rows += [
        [f"{half} loss", *(number(getattr(end, f"{half}_loss"), ".4g") for end in ends), "", ""]
        for half in ("train", "test")
    ]
    rows.append(["distance from start", *("-" if d is None else f"{d:.2f}" for d in distances), "", ""])
    range_of_ratios = "{} - {}".format(*paper.DISTANCE_RATIO) if published else ""
    rows.append(["ratio of distances SB/LB", ratio, "", range_of_ratios, ""])
    rms = [f"RMS difference to the original figure, {name}: {value:.3g}" for name, value in differences.items()]
    return "\n".join([tables.lay_out(rows), *rms])


def main(settings: Settings) -> None:
    """Train or find the two minimizers, evaluate the path, write the results and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import figures
    from large_batch.experiment import Experiment
    from large_batch.measurements import EvaluationRequest
    from large_batch.places import Place
    from large_batch.runner import Runner

    # Recipes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings, runner = experiment.settings, Runner(experiment.minimizers, settings)
    given = {"small_batch": settings.small_batch_weights, "large_batch": settings.large_batch_weights}
    ends = [file or experiment.recipe(getattr(settings, side)) for side, file in given.items()]
    alphas = np.linspace(settings.alpha_min, settings.alpha_max, settings.points).tolist()
    places = np.union1d(alphas, [0.0, 1.0]).tolist()  # the two minimizers even where the path leaves them out
    runner.objectives.check_statistics(*settings.statistics)
    wanted = {policy: experiment.request(EvaluationRequest, statistics=policy) for policy in settings.statistics}
    at = {alpha: Place(*ends, settings.curve, alpha) for alpha in places}
    # Run
    results = runner.run([], [(request, place) for request in wanted.values() for place in at.values()])
    if results is None:
        return
    curves = {name: [results[request, at[alpha]].result for alpha in alphas] for name, request in wanted.items()}
    points = next(iter(curves.values()))
    solutions = [results[next(iter(wanted.values())), at[alpha]].result for alpha in (0.0, 1.0)]
    # Table and figure
    sides = [experiment.origin_of(end) for end in ends]
    original = original_curve(experiment, settings.curve)
    differences = rms_difference(alphas, points, original)
    what = f"{settings.epochs} epochs" if None in given.values() else "given minimizers"
    title = experiment.title(f"{settings.curve.capitalize()} path, {what}")
    published = paper.TABLE_2[experiment.network.name] if experiment.batches_as_published else None
    distances = [side.distance_from_start for side in sides]
    print(f"\n{title}\n{table(solutions, distances, published, differences)}")
    summary = {"small_batch": sides[0], "large_batch": sides[1], "rms_difference_to_original": differences}
    summary |= not_finite(alphas, points)
    figure = figures.paths(alphas, curves, original, title, CURVES[settings.curve])
    experiment.write("", rows(alphas, curves), summary, {"": figure})


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
