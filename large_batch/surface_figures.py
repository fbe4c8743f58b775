"""Lines and planes of weight space drawn: contours, a view in three dimensions, curves; several at one scale."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from large_batch.figures import ACCURACY, LOSS
from large_batch.surface import Surface

LEVELS = 20  # of the loss, evenly spaced on its scale
SMALLEST = 1e-6  # loss (nats) below which nothing is told apart
PERCENTS = np.arange(0, 101, 5)
MARKERS = "os^Dv"
BLANK = "0.8"  # where the loss is not finite


@dataclass(frozen=True, eq=False)
class Panel:
    """A surface and its heading, over the training set and, where it is measured, over the test set.

    `axes` are what the axes say, `marks` the names of the surface's marks; those of a `trajectory` are its iterates,
    the last first, of which only the ends are named.
    """

    title: str
    train: Surface
    test: Surface | None = None
    axes: tuple[str, ...] = ("a", "b")
    marks: tuple[str, ...] = ()
    trajectory: bool = False


def contours(panels: Sequence[Panel], title: str = "") -> Figure:
    """Draw loss (logarithmic) and, below, accuracy of planes side by side at one scale: the training set filled, the
    test set as dashed lines at every fourth level. Grey is where the loss is not finite. Of functions that have no
    accuracy only the loss is drawn. Where losses are negative their scale is linear between about -1 and 1, and
    logarithmic beyond."""
    norm = _loss_norm(panels)
    kinds = [
        ("loss", "Loss", norm, _levels(norm), "viridis", "max"),
        ("accuracy", "Accuracy (%)", Normalize(0, 100), PERCENTS, "viridis_r", "neither"),
    ]
    if all(np.isnan(panel.train.accuracy).all() for panel in panels):
        kinds.pop()
    count = len(panels)
    high, wide = (len(kinds), count) if count > 1 else (1, len(kinds))  # of a single one they are side by side
    figure = Figure(figsize=(1.2 + 4.6 * wide, 0.6 + 3.9 * high), layout="constrained")
    rows = figure.subplots(high, wide, squeeze=False).reshape(len(kinds), count)
    for row, (name, label, scale, levels, colors, extend) in zip(rows, kinds, strict=True):
        for axes, panel in zip(row, panels, strict=True):
            train = panel.train
            style = {"levels": levels, "norm": scale, "extend": extend}
            values = _clipped(getattr(train, name), scale)
            axes.set_facecolor(BLANK)
            axes.contourf(train.a, train.b, values, cmap=colors, **style)
            axes.contour(train.a, train.b, values, colors="white", linewidths=0.4, **style)
            if panel.test:
                style["levels"] = levels[::4]
                values = _clipped(getattr(panel.test, name), scale)
                axes.contour(train.a, train.b, values, colors="black", linewidths=0.8, linestyles="--", **style)
            _mark(axes, panel)
            axes.set_xlabel(panel.axes[0])
            axes.set_ylabel(panel.axes[1])
            axes.set_title(panel.title)
        bar = figure.colorbar(ScalarMappable(scale, colors), ax=row.tolist(), label=label)
        if name == "loss":
            _plain(bar.ax, norm)
    entries = [Line2D([], [], color="black", lw=0.8, ls="--", label="test set")] if panels[0].test else []
    if not all(np.isfinite(panel.train.loss).all() for panel in panels):
        entries.append(Patch(color=BLANK, label="not finite"))
    _legend(figure, [*entries, *_mark_entries(panels)], title)
    return figure


def views(panels: Sequence[Panel], title: str = "") -> Figure:
    """Draw the training loss of planes upwards, on the scale of `contours`, in three dimensions side by side."""
    figure = Figure(figsize=(1.2 + 4.8 * len(panels), 4.8), layout="constrained")
    norm = _loss_norm(panels)
    height, loss = (np.log10, lambda h: 10**h) if isinstance(norm, LogNorm) else (np.arcsinh, np.sinh)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1, projection="3d")
        surface = panel.train
        values = _clipped(surface.loss, norm)
        colors = ScalarMappable(norm, "viridis").to_rgba(values)
        style = {"facecolors": colors, "shade": False, "rcount": 200, "ccount": 200}  # shade would darken the colours
        axes.plot_surface(*np.meshgrid(surface.a, surface.b), height(values), **style)
        axes.set_zlim(height(norm.vmin), height(norm.vmax))
        axes.zaxis.set_major_formatter(FuncFormatter(lambda h, _: f"{loss(h):.2g}"))
        for axis, label in zip((axes.xaxis, axes.yaxis), panel.axes, strict=True):
            axis.set_label_text(textwrap.fill(label, 24), size="small")
            axis.set_major_locator(MaxNLocator(4))
            axis.labelpad = 8
        axes.set_zlabel("Loss", size="small")
        axes.set_title(panel.title)
        axes.set_box_aspect(None, zoom=0.9)  # room for the labels
    figure.suptitle(title)
    return figure


def lines(panels: Sequence[Panel], title: str = "") -> Figure:
    """Draw loss (left, blue, logarithmic) and accuracy (right, vermilion) on lines side by side at one scale, training
    set solid and test set dashed; the marks are vertical lines."""
    figure = Figure(figsize=(1.2 + 5.4 * len(panels), 4.8), layout="constrained")
    norm = _loss_norm(panels)
    for left, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        right = left.twinx()
        for surface, style in ((panel.train, "-"), (panel.test, "--")):
            if surface:
                left.plot(surface.a, _clipped(surface.loss[0], norm), style, color=LOSS, lw=1.6)
                right.plot(surface.a, surface.accuracy[0], style, color=ACCURACY, lw=1.6)
        for (place,) in panel.train.marks:
            left.axvline(place, color="0.7", lw=0.8, ls=":")
        if isinstance(norm, LogNorm):
            left.set_yscale("log")
            left.set_ylim(norm.vmin / 1.1, norm.vmax * 1.1)
        else:
            left.set_yscale("asinh")
            left.set_ylim(*np.sinh(np.arcsinh([norm.vmin, norm.vmax]) + [-0.1, 0.1]))
        _plain(left, norm)
        right.set_ylim(0, 105)
        left.set_xlabel(panel.axes[0])
        left.set_ylabel("Loss", color=LOSS)
        right.set_ylabel("Accuracy (%)", color=ACCURACY)
        left.set_title(panel.title)
        left.grid(True, color="0.85")
    halves = (("train", "-"), ("test", "--"))[: 2 if panels[0].test else 1]
    _legend(figure, [Line2D([], [], color="0.2", ls=style, label=half) for half, style in halves], title)
    return figure


def _plain(axes: Axes, norm: LogNorm | AsinhNorm) -> None:
    """Label the vertical axis of losses with plain numbers, between the powers of ten, too, where these are few."""
    if isinstance(norm, LogNorm):
        few = norm.vmax / norm.vmin < 1e3
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.yaxis.set_major_locator(FixedLocator(_levels(norm)[::3]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _loss_norm(panels: Sequence[Panel]) -> LogNorm | AsinhNorm:
    """Return the scale that all losses share."""
    surfaces = [surface for panel in panels for surface in (panel.train, panel.test) if surface]
    losses = np.concatenate([surface.loss.ravel() for surface in surfaces])
    losses = losses[np.isfinite(losses)]
    if (losses < -SMALLEST).any():
        return AsinhNorm(1.0, losses.min(), max(losses.max(), losses.min() + SMALLEST))
    losses = losses[losses > SMALLEST]
    low, high = (losses.min(), losses.max()) if len(losses) else (SMALLEST, 1.0)
    return LogNorm(low, max(high, 1.01 * low))


def _levels(norm: LogNorm | AsinhNorm) -> np.ndarray:
    """Return the levels of the loss."""
    if isinstance(norm, LogNorm):
        return np.geomspace(norm.vmin, norm.vmax, LEVELS)
    levels = np.sinh(np.linspace(*np.arcsinh([norm.vmin, norm.vmax]), LEVELS))
    levels[[0, -1]] = norm.vmin, norm.vmax
    return levels


def _clipped(values: np.ndarray, norm: Normalize) -> np.ndarray:
    """Return the values within the scale, and NaN, which is left blank, for those that are not finite."""
    return np.clip(np.where(np.isfinite(values), values, np.nan), norm.vmin, norm.vmax)


def _mark(axes: Axes, panel: Panel) -> None:
    """Draw the marks of a plane, as a path where they are a training's iterates."""
    marks = panel.train.marks
    style = {"color": "red", "markeredgecolor": "white", "zorder": 3, "clip_on": False}
    if panel.trajectory:
        axes.plot(*marks.T, "-", marker="o", ms=4, lw=1.2, **style)
        marks = marks[[0, -1]]
    for place, marker in zip(marks, MARKERS, strict=False):
        axes.plot(*place, marker, ms=8, **style)


def _mark_entries(panels: Sequence[Panel]) -> list[Line2D]:
    """Return the entries of the legend, one for each name."""
    named = {}
    for panel in panels:
        names = (panel.marks[0], panel.marks[-1]) if panel.trajectory and panel.marks else panel.marks
        named |= {name: marker for name, marker in zip(names, MARKERS, strict=False) if name not in named}
    style = {"color": "red", "markeredgecolor": "white", "ls": ""}
    return [Line2D([], [], marker=marker, ms=8, label=name, **style) for name, marker in named.items()]


def _legend(figure: Figure, entries: list[Artist], title: str) -> None:
    figure.suptitle(title)
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)
