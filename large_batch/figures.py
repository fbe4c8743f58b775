"""The paper's figures, in one style, drawn with matplotlib and written as .pdf and .png."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter

from large_batch.paper import EPSILONS, CurvePoint
from large_batch.trends import Breakpoint

# Blue, vermilion and black of Okabe and Ito's palette, which the colour-blind tell apart, too; lighter for the original
LOSS, ACCURACY, GROWING, LOSS_MUTED, ACCURACY_MUTED = "#0072b2", "#d55e00", "#000000", "#a9cfe5", "#f2c6a0"
REGIMES = (("o", LOSS), ("s", ACCURACY), ("^", GROWING))  # marker and colour of SB, LB and a growing batch
KINDS = "loss", "clipped_loss"
MARKERS = dict(zip(EPSILONS, ("o", "s"), strict=True))  # of sharpness


def drawn(figure: Figure, stem: str | Path) -> dict[Path, bytes]:
    """Return what the files `<stem>.pdf` and `<stem>.png` of the figure hold."""
    contents = {}
    for kind in ("pdf", "png"):
        content = io.BytesIO()
        # No date inside, so that the same curves give the same file.
        figure.savefig(content, dpi=150, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        contents[Path(f"{stem}.{kind}")] = content.getvalue()
    return contents


def parametric_plot(
    alphas: list[float], points: list, original: list[CurvePoint], title: str, path_label: str
) -> Figure:
    """Draw Figure 3 or 7: cross-entropy (left, blue) and accuracy (right, vermilion, with dots) against alpha, training
    set solid and test set dashed, with the original's curves behind in muted tones where there are any.

    `points` are `measurements.Evaluated`, one an alpha; the curves have a gap where the loss is not finite. Where Keras
    1's clipping of the softmax changes the loss visibly, the clipped loss, which is what the original shows, is drawn
    dotted.
    """
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    for places, curve, loss, accuracy, width in (
        ([point.alpha for point in original], original, LOSS_MUTED, ACCURACY_MUTED, 3.5),
        (alphas, points, LOSS, ACCURACY, 1.6),
    ):
        for half, line in (("train", "-"), ("test", "--")):
            left.plot(places, _numbers(curve, f"{half}_loss"), line, color=loss, lw=width)
            style = {"lw": width, "marker": "o" if curve is points else "", "ms": 3.5}
            right.plot(places, _numbers(curve, f"{half}_accuracy"), line, color=accuracy, **style)
    exact, clip = (np.array([_numbers(points, f"{half}_{kind}") for half in ("train", "test")]) for kind in KINDS)
    clipped = (exact > 1.01 * clip + 0.01).any()
    if clipped:
        left.plot(alphas, clip.T, ":", color=LOSS, lw=1.2)
    left.set_xlabel(rf"$\alpha$   (0: small batch, 1: large batch; {path_label})")
    left.set_ylabel("Cross Entropy", color=LOSS)
    right.set_ylabel("Accuracy (%)", color=ACCURACY)
    left.set_ylim(bottom=0)
    right.set_ylim(0, 105)
    left.set_title(title)
    grid(left)

    entries = [
        Line2D([], [], color=LOSS, label="loss"),
        Line2D([], [], color=ACCURACY, marker="o", ms=3.5, label="accuracy"),
        Line2D([], [], color="0.2", ls="-", label="train"),
        Line2D([], [], color="0.2", ls="--", label="test"),
    ]
    if clipped:
        entries.append(Line2D([], [], color=LOSS, ls=":", label="loss clipped as in Keras 1"))
    if original:
        entries.append(Line2D([], [], color="0.75", lw=3.5, label="original"))
    figure.legend(
        handles=entries, loc="outside lower center", ncols=len(entries) if len(entries) < 6 else 3, frameon=False
    )
    return figure


def paths(
    alphas: list[float], curves: dict[str, list], original: list[CurvePoint], title: str, path_label: str
) -> Figure:
    """Draw the points of a path under one policy for moving averages, or compare several."""
    if len(curves) == 1:
        return parametric_plot(alphas, next(iter(curves.values())), original, title, path_label)
    return statistics_policies(alphas, curves, title, path_label)


def statistics_policies(alphas: list[float], curves: dict[str, list], title: str, path_label: str) -> Figure:
    """Draw what becomes of one path under several policies for moving averages (statistics.py): above the cross-entropy
    on a logarithmic scale, below the accuracy; training set solid, test set dashed. `curves` holds the points, as of
    `parametric_plot`, by policy; where the loss is not finite there is a gap."""
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    styles = (ACCURACY, 1.6), (LOSS_MUTED, 4.0), (GROWING, 1.6)  # the second and third hardly differ
    for (policy, points), (color, width) in zip(curves.items(), styles, strict=False):
        for half, line in (("train", "-"), ("test", "--")):
            style = dict(color=color, lw=width, label=f"{policy}, {half}")
            above.plot(alphas, _numbers(points, f"{half}_loss"), line, **style)
            below.plot(alphas, _numbers(points, f"{half}_accuracy"), line, **style)
    above.set_ylabel("Cross Entropy")
    logarithmic(above)
    below.set_ylabel("Accuracy (%)")
    below.set_ylim(0, 105)
    below.set_xlabel(rf"$\alpha$   (0: small batch, 1: large batch; {path_label})")
    above.set_title(title)
    for axes in (above, below):
        grid(axes)
    handles, labels = below.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(curves), frameon=False)
    return figure


def _numbers(points: list, name: str) -> np.ndarray:
    """One quantity of all points, a gap where it is not finite."""
    return np.array([getattr(point, name) for point in points], float)


@dataclass(frozen=True)
class Curve:
    """Test (and training) accuracies in percent by epoch, from 1 on, of each trial; those that are trained until
    converged differ in their number of epochs."""

    label: str
    train: list[list[float]]
    test: list[list[float]]

    @classmethod
    def of(cls, label: str, histories: Iterable[list]) -> "Curve":
        """Return the accuracies of trainings, whose histories are lists of `training.Epoch`."""
        histories = list(histories)
        halves = [
            [[getattr(row, f"{half}_accuracy") for row in rows] for rows in histories] for half in ("train", "test")
        ]
        return cls(label, *halves)


def _by_epoch(trials: list[list[float]]) -> list[list[float]]:
    """Return the values at each epoch, of the trials that go so far."""
    return [[value for value in values if value is not None] for values in zip_longest(*trials)]


def training_curves(curves: list[Curve], title: str, switches: Sequence[int] = ()) -> Figure:
    """Draw Figure 2: training (solid) and testing (dashed) accuracy against epochs of SB (dots), LB (squares) and a
    growing batch (triangles), whose `switches` are marked. Of several trials it is the mean of those that go so far,
    within one sample deviation as far as all of them go."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (curve, (marker, color)) in enumerate(zip(curves, REGIMES, strict=False)):
        for half, line in (("train", "-"), ("test", "--")):
            trials = getattr(curve, half)
            mean = np.array([np.mean(of_epoch) for of_epoch in _by_epoch(trials)])
            epochs = np.arange(1, len(mean) + 1)
            every = max(1, len(epochs) // 10)
            style = {"marker": marker, "ms": 4.5, "markevery": (place * every // 3, every), "lw": 1.4}
            axes.plot(epochs, mean, line, color=color, label=f"{curve.label}, {half}", **style)
            if len(trials) > 1:
                deviation = np.std(list(zip(*trials, strict=False)), axis=1, ddof=1)
                low, high = mean[: len(deviation)] - deviation, mean[: len(deviation)] + deviation
                axes.fill_between(epochs[: len(deviation)], low, high, color=color, alpha=0.15, lw=0)
    for epoch in switches:
        axes.axvline(epoch + 0.5, color="0.7", lw=0.8, ls=":")
    # Else the first epoch of LB training would squeeze the rest
    worst = min(accuracy for curve in curves for trial in curve.test for accuracy in trial)
    axes.set_ylim(bottom=worst - 0.05 * (100 - worst))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("Epoch")
    axes.set_ylabel("Accuracy (%)")
    axes.set_title(title)
    grid(axes)
    figure.legend(loc="outside lower center", ncols=2 * len(curves) if len(curves) < 3 else 3, frameon=False)
    return figure


def sharpness_by_loss(iterates: dict[str, list], title: str) -> Figure:
    """Draw Figure 6, both axes logarithmic: sharpness at both epsilons against the cross-entropy of the iterates of SB
    (dashed, hollow) and LB (solid, filled), the starting point among them; `iterates` are `Solution`s by regime, by
    epoch. Arrows show the direction of time."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for (regime, rows), (_, color), line in zip(iterates.items(), REGIMES[:2], ("--", "-"), strict=True):
        for epsilon, marker in MARKERS.items():
            resolved = [row for row in rows if row.sharpness_at(epsilon) is not None]
            places = [(row.train_loss, row.sharpness_at(epsilon)) for row in resolved]
            style = {"marker": marker, "ms": 5, "lw": 0.7, "mfc": color if line == "-" else "white"}
            axes.plot(*np.reshape(places, (-1, 2)).T, line, color=color, label=_at(regime, epsilon), **style)
            for begin, end in list(pairwise(places))[:: max(1, len(places) // 6)]:
                arrow = {"arrowstyle": "-|>", "color": color, "lw": 0, "mutation_scale": 15}
                axes.annotate("", np.sqrt(np.multiply(begin, end)), begin, arrowprops=arrow)
    axes.set_xscale("log")
    logarithmic(axes)
    axes.set_xlabel("Cross Entropy (training set); arrows point to later epochs")
    axes.set_ylabel("Sharpness (%)")
    axes.set_title(title)
    grid(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def batch_size_sweep(rows: list, threshold: Breakpoint | None, title: str) -> Figure:
    """Draw Figure 4: testing accuracy (left, blue) and sharpness at both epsilons (right, vermilion) against the batch
    size; the `threshold` is marked, and its interval shaded. `rows` are `Solution`s. The paper's axes are linear, but
    batch sizes and sharpness span orders of magnitude."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    sizes = sorted({row.batch_size for row in rows})
    _with_trials(left, rows, lambda row: row.test_accuracy, color=LOSS, fmt="-D", label="test accuracy")
    for epsilon, marker in MARKERS.items():
        style = dict(color=ACCURACY, fmt=f"--{marker}", label=_at("sharpness", epsilon))
        _with_trials(right, rows, lambda row, epsilon=epsilon: row.sharpness_at(epsilon), **style)
    if threshold:
        left.axvspan(max(threshold.low, sizes[0]), min(threshold.high, sizes[-1]), color="0.92", zorder=0)
        left.axvline(threshold.at, color="0.5", lw=1, label="threshold")
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45, ha="right")
    left.minorticks_off()
    logarithmic(right)
    left.set_xlabel("Batch Size")
    left.set_ylabel("Testing Accuracy (%)", color=LOSS)
    right.set_ylabel("Sharpness (%)", color=ACCURACY)
    left.set_title(title)
    grid(left)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def fine_tuning(rows: list, published: dict[int, float], title: str) -> Figure:
    """Draw the test accuracy (percent) against the batch size, beside the published one, where `published` has any.
    `rows` have `batch_size` and `test_accuracy`, of one trial or several."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({row.batch_size for row in rows})
    _with_trials(axes, rows, lambda row: row.test_accuracy, color=LOSS, fmt="-o", label="here")
    if published:
        axes.plot(list(published), list(published.values()), "-s", color=LOSS_MUTED, lw=3, label="published")
    ticks = sorted({*sizes, *published})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.minorticks_off()
    axes.set_xlabel("Batch Size")
    axes.set_ylabel("Validation Accuracy (%)")
    axes.set_title(title)
    grid(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _grouped(rows: list, key: Callable, value: Callable) -> dict[int, list[float]]:
    """Return the values of the rows by their keys, ascending, but for keys where one is None."""
    groups = {at: [value(row) for row in rows if key(row) == at] for at in sorted({key(row) for row in rows})}
    return {at: group for at, group in groups.items() if None not in group}


def _with_trials(axes: Axes, rows: list, value: Callable, **style) -> None:
    """Plot the mean over the trials of each batch size, with the sample deviation where there are several."""
    groups = _grouped(rows, lambda row: row.batch_size, value)
    errors = [np.std(group, ddof=1) if len(group) > 1 else 0.0 for group in groups.values()]
    means = [np.mean(group) for group in groups.values()]
    axes.errorbar(list(groups), means, yerr=errors if any(errors) else None, ms=5, lw=1.4, capsize=3, **style)


def warm_starts(small: list, piggybacked: list, small_alone: float, large_alone: list, title: str) -> Figure:
    """Draw Figure 5 over the epochs of SB training: above the test accuracy of the SB iterates (dots) and of the LB
    solutions warm-started there (squares), below the sharpness of these solutions at both epsilons; beside SB and LB
    alone.

    The lists hold `measurements.Solution`s, of one trial or several; `small_alone` is the accuracy of late SB iterates.
    """
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)

    def over_epochs(rows: list, epoch: Callable, value: Callable) -> tuple[list, list]:
        groups = _grouped(rows, epoch, value)
        return list(groups), [float(np.mean(group)) for group in groups.values()]

    places = over_epochs(small, lambda row: row.epochs, lambda row: row.test_accuracy)
    above.plot(*places, "-o", color=LOSS, ms=5, lw=1.4, label="SB iterates")
    places = over_epochs(piggybacked, lambda row: row.warm_start_epochs, lambda row: row.test_accuracy)
    above.plot(*places, "-s", color=ACCURACY, ms=5, lw=1.4, label="warm-started LB")
    alone = float(np.mean([row.test_accuracy for row in large_alone]))
    above.axhline(alone, color=ACCURACY, ls="-.", lw=1.2, label="LB alone")
    above.axhline(small_alone, color=LOSS, ls=":", lw=1.2, label="SB alone, late")
    above.set_ylabel("Testing Accuracy (%)")
    for (epsilon, marker), line in zip(MARKERS.items(), ("-", "--"), strict=True):
        places = over_epochs(piggybacked, lambda row: row.warm_start_epochs, lambda row, e=epsilon: row.sharpness_at(e))
        below.plot(*places, line, marker=marker, color=ACCURACY, ms=5, lw=1.4, label=_at("sharpness", epsilon))
        values = [row.sharpness_at(epsilon) for row in large_alone]
        if None not in values:
            below.axhline(float(np.mean(values)), color="0.4", ls=line, lw=0.9, label=_at("of LB alone", epsilon))
    logarithmic(below)
    below.set_ylabel("Sharpness (%)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    below.set_xlabel("Epochs of SB training before LB training")
    above.set_title(title)
    for axes in (above, below):
        grid(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def performance_model(
    batch_ratio: float,
    efficiency: float,
    ratios: Sequence[float] = (),
    over_accuracies: Sequence[tuple[list, list]] = (),
    title: str = "",
) -> Figure:
    """Draw Appendix C: the I_L / I_S below which LB is faster against the parallel efficiency of SB.

    Args:
        batch_ratio: B_S / B_L.
        efficiency: The efficiency at which the bound is marked.
        ratios: Our own I_L / I_S, one a trial.
        over_accuracies: For a second panel, test accuracies (percent) and I_L / I_S to each, one pair a trial.
        title: Of the figure.
    """
    figure = Figure(figsize=(10.4 if over_accuracies else 6.4, 4.8), layout="constrained")
    left, *right = np.atleast_1d(figure.subplots(1, 2 if over_accuracies else 1))
    shares = np.linspace(0.02, 1, 200)
    left.plot(shares, batch_ratio / shares, color=LOSS, lw=1.6, label=f"bound, $B_S / B_L$ = {batch_ratio:.3g}")
    left.fill_between(shares, batch_ratio / shares, color=LOSS_MUTED, alpha=0.4, lw=0)
    left.plot([efficiency], [batch_ratio / efficiency], "o", color=LOSS, label=f"at $f_S(P)$ = {efficiency:g}")
    for number, ratio in enumerate(ratios):
        left.axhline(ratio, color=ACCURACY, lw=1, ls="--", label=None if number else "found")
    left.annotate("LB is faster", (0.04, 0.06), xycoords="axes fraction", color=LOSS)
    left.set_xlim(0, 1)
    left.set_ylim(bottom=0.8 * min([batch_ratio, *ratios]))
    left.set_xlabel("Parallel efficiency of SB, $f_S(P)$")
    for axes in right:
        for accuracies, found in over_accuracies:
            axes.plot(accuracies, found, "-o", color=ACCURACY, ms=3, lw=0.9)
        axes.axhline(batch_ratio / efficiency, color=LOSS, lw=1.2, label=f"bound at $f_S(P)$ = {efficiency:g}")
        axes.set_xlabel("Testing Accuracy (%)")
    for axes in (left, *right):
        axes.set_ylabel("$I_L / I_S$")
        logarithmic(axes)
        axes.legend(frameon=False, fontsize="small")
        grid(axes)
    figure.suptitle(title, fontsize="large")
    return figure


def _at(what: str, epsilon: float) -> str:
    return f"{what}, epsilon {epsilon:g}"


class _PlainNumbers(LogFormatter):
    """Labels the ticks that `LogFormatter` labels, as 0.06 instead of 6e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, its labels plain numbers; where nothing is resolved it has no scale."""
    if not any(len(line.get_ydata()) for line in axes.lines):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(_PlainNumbers(minor_thresholds=(1.5, 0.5)))


def grid(axes: Axes) -> None:
    """Draw a pale grid behind the curves."""
    axes.grid(True, color="0.85")
    axes.set_axisbelow(True)
