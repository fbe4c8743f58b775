"""Figures of curvature: the spectrum of the Hessian at minimizers, what was followed during trainings, and measures of
sharpness side by side."""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from large_batch.figures import REGIMES, grid, logarithmic
from large_batch.sharpness_metric import MEASURES
from large_batch.spectrum import Density
from large_batch.tracking import Tracked
from large_batch.trends import RankCorrelation

# Which colour-blind people tell apart: SB, LB, ...
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#f0e442")

MEASURE_TITLES = {
    "keskar": r"Metric 2.1: $|y_i| \leq \epsilon\,(|x_i| + 1)$",
    "relative": r"relative box: $|y_i| \leq \epsilon\,|x_i|$",
    "ball": r"SAM's ball: $\|y\| \leq \rho$",
    "adaptive": r"ASAM's ball: $\|y / x\| \leq \rho$",
    "eigenvalue": "largest eigenvalue of the Hessian",
    "trace": "trace of the Hessian",
}


def spectral_densities(densities: dict[str, dict[str, Density]], title: str) -> Figure:
    """Draw the spectrum of the Hessian at each minimizer, a row for the whole network (named "") and for each layer.

    Left the density, with bells of one width for all of a row, on a logarithmic scale; right how many eigenvalues are
    above a value, both axes logarithmic; dotted, how many are below minus this value. The bands are two standard errors
    over the random vectors. `densities` are by layer, then by the minimizers' labels.
    """
    figure = Figure(figsize=(10, 0.6 + 3.6 * len(densities)), layout="constrained")
    rows = figure.subplots(len(densities), 2, squeeze=False)
    for (layer, group), (left, right) in zip(densities.items(), rows, strict=True):
        lows, highs = zip(*(density.range for density in group.values()), strict=True)
        low, high = min(lows), max(highs)
        width = max(density.width for density in group.values())
        eigenvalues = np.linspace(low - 5 * width, high + 5 * width, 4000)
        counted = np.geomspace(high * 1e-4, high, 400) if high > 0 else []
        for (label, density), color, line in zip(group.items(), COLORS, ("-", "--"), strict=False):
            _band(left, eigenvalues, *density.at(eigenvalues, width), color, line, label)
            if high > 0:
                _band(right, counted, *density.above(counted), color, line, label)
                _band(right, counted, *density.below(-counted), color, ":", None)
        floor = 0.1 / (max(density.size for density in group.values()) * width)  # a quarter of one eigenvalue's bell
        left.set_yscale("log")
        left.set_ylim(floor, 3 * max(density.at(eigenvalues, width)[0].max() for density in group.values()))
        left.set_ylabel(f"{layer}: density" if layer else "Density")
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_ylim(bottom=0.5)
        right.set_ylabel("Eigenvalues above (dotted: below minus)")
        for axes in (left, right):
            grid(axes)
    for axes in (left, right):
        axes.set_xlabel("Eigenvalue of the Hessian")
    figure.suptitle(title)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def edge_of_stability(tracked: dict[str, list[Tracked]], steps: dict[str, int], title: str) -> Figure:
    """Draw the largest eigenvalue against the epochs: above that of the Hessian, below the preconditioned one, if any.

    Dashed is the edge of stability of each. `tracked` and `steps`, how many an epoch has, are by minimizer.
    """
    panels = [("eigenvalue", "edge", "Largest eigenvalue of $H$")]
    if any(row.preconditioned is not None for rows in tracked.values() for row in rows):
        panels.append(("preconditioned", "preconditioned_edge", "Largest eigenvalue of $P^{-1}H$"))
    figure = Figure(figsize=(7.2, 0.8 + 3.2 * len(panels)), layout="constrained")
    several = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, edge, words) in zip(several, panels, strict=True):
        for (label, rows), color, marker in zip(tracked.items(), COLORS, ("o", "s"), strict=False):
            known = [row for row in rows if getattr(row, name) is not None]
            epochs = [row.step / steps[label] for row in known]
            axes.plot(
                epochs, [getattr(row, name) for row in known], color=color, marker=marker, ms=3, lw=1, label=label
            )
        edges = [(row.step / steps[label], getattr(row, edge)) for label, rows in tracked.items() for row in rows]
        edges = sorted(pair for pair in edges if pair[1] is not None and np.isfinite(pair[1]))
        axes.plot(*zip(*edges, strict=True), "--", color="0.3", lw=1.2, label="edge of stability")
        axes.set_yscale("log")
        axes.set_ylabel(words)
        grid(axes)
    several[-1].set_xlabel("Epoch")
    figure.suptitle(title)
    handles, labels = several[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def measures_and_gap(rows: list[dict], ranks: dict[str, RankCorrelation], title: str) -> Figure:
    """Draw the generalisation gap (percent points) against each measure, a panel and its rank correlation for each.

    `rows` are the minimizers, with `gap`, `batch_size`, `remedy` and the measures; the colour says the batch size, the
    marker the remedy.
    """
    columns = min(3, len(ranks))
    lines = -(-len(ranks) // columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 1.2 + 2.8 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    sizes, remedies = (list(dict.fromkeys(row[name] for row in rows)) for name in ("batch_size", "remedy"))
    for axes, (measure, rank) in zip(panels, ranks.items(), strict=False):
        for (i, size), (j, remedy) in product(enumerate(sizes), enumerate(remedies)):
            group = [row for row in rows if (row["batch_size"], row["remedy"]) == (size, remedy)]
            group = [row for row in group if None not in (row[measure], row["gap"])]
            style = {"color": COLORS[i % len(COLORS)], "marker": "osD^vP*X"[j % 8], "ls": "", "ms": 5}
            label = f"{size:,}" if remedy == "none" else f"{size:,}, {remedy}"
            axes.plot([row[measure] for row in group], [row["gap"] for row in group], label=label, **style)
        known = [row[measure] for row in rows if row[measure] is not None]
        if known and 0 < 10 * min(known) < max(known):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(known) < 100 * min(known) else (1,)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{measure}: {rank}", fontsize="medium")
        grid(axes)
    for axes in panels[len(ranks) :]:
        axes.set_visible(False)
    figure.supylabel("Training less test accuracy (points)")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, title="batch size")
    return figure


def rescaling(results: dict[str, list], title: str) -> Figure:
    """Draw the sharpness of SB (dots) and LB (squares) against the factor of the weights before a batch normalisation.

    The factor does not change the function. There is a panel for each measure, with logarithmic axes. `results` holds
    `measurements.Measured` sharpness by minimizer; trials are drawn as their mean.
    """
    first = next(iter(results.values()))
    measures = list(dict.fromkeys(measured.measurement.measure for measured in first))
    figure = Figure(figsize=(7.2, 2.6 + 2.6 * -(-len(measures) // 2)), layout="constrained")
    panels = list(figure.subplots(-(-len(measures) // 2), min(2, len(measures)), sharex=True, squeeze=False).flat)
    for axes in panels[len(measures) :]:
        axes.set_visible(False)
    for axes, measure in zip(panels, measures, strict=False):
        for (label, group), (marker, color) in zip(results.items(), REGIMES, strict=False):
            lines: dict[tuple, dict[float, list]] = {}
            for at, value in ((measured.measurement, measured.result.value) for measured in group):
                if at.measure == measure:
                    places = lines.setdefault((at.epsilon, at.space, at.solver), {})
                    places.setdefault(at.rescale, []).append(np.nan if value is None else value)
            for number, ((size, *_), places) in enumerate(lines.items()):
                means = [float(np.mean(values)) for values in places.values()]
                style = {"ls": ("-", "--", ":")[min(number, 2)], "marker": marker, "ms": 4, "lw": 1.4}
                words = label
                if size is not None:
                    words += f", {'epsilon' if MEASURES[measure].radius is None else 'rho'} {size:g}"
                axes.plot(list(places), means, color=color, label=words, **style)
        axes.set_xscale("log")
        logarithmic(axes)
        axes.set_title(MEASURE_TITLES[measure], fontsize="medium")
        if measure in MEASURES:
            axes.set_ylabel("Sharpness (%)")
        grid(axes)
        axes.legend(frameon=False, fontsize="small")
    figure.supxlabel("Factor of the weights before each batch normalisation", fontsize="medium")
    figure.suptitle(title, fontsize="large")
    return figure


def _band(
    axes: Axes, x: np.ndarray, mean: np.ndarray, error: np.ndarray, color: str, line: str, label: str | None
) -> None:
    axes.plot(x, mean, line, color=color, lw=1.4, label=label)
    if np.isfinite(error).all():
        axes.fill_between(x, np.maximum(mean - 2 * error, 0), mean + 2 * error, color=color, alpha=0.2, lw=0)
