"""The loss on lines and planes of weight space (filter normalisation: Li et al., 2018).

Trains a network with small-batch and with large-batch ADAM, or reuses what is trained, and draws loss and accuracy over
the first samples of training and test set: on the line or plane through minimizers, or around each minimizer along
random directions, along the Hessian's steepest eigenvectors, or along the principal components of its training, whose
path is drawn. Rows of points are kept and reused, and several processes with one --run_dir share the work.

    python plot_surface.py -n F1
    python plot_surface.py -n C1 --directions random --points 51 --samples 2500
    python plot_surface.py -n F1 --directions pca
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from large_batch import cli
from large_batch.cli import setting
from large_batch.errors import UserError
from large_batch.surface import NORMALISATIONS, vtk

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment
    from large_batch.places import Span, SurfaceRequest
    from large_batch.surface_figures import Panel

DIRECTIONS = {"points": 0.3, "random": 1.0, "eigenvectors": 1.0, "pca": 0.3}  # and how far each reaches
NAMES = ("SB", "LB", "start")
GROUP = "Surface"


def minimizers_word(names: tuple[str, ...]) -> str:
    """Return the word of the minimizers in the names of outputs."""
    return "-".join(name if name in NAMES else cli.file_word(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings):
    """The flags."""

    minimizers: tuple[str, ...] | None = setting(
        None,
        "SB, LB, start or .weights.h5 files, with commas: two or three for one line or plane through them (default "
        "SB,LB,start), else any number, for a surface of each (default SB,LB).",
        minimizers_word,
        GROUP,
    )
    directions: str = setting(
        "points",
        "Through the minimizers, or around each: random, eigenvectors (of the Hessian), pca (of the training).",
        "{}",
        GROUP,
        choices=tuple(DIRECTIONS),
    )
    dimensions: int = setting(2, "1 for lines, 2 for planes, except through points.", "{}d", GROUP, least=1, most=2)
    points: int = setting(25, "Points of the grid each way.", "p{}", GROUP, least=2, most=1000)
    reach: float | None = setting(
        None,
        "How far the grid goes: beyond the points or the path, as a share of their extent (default 0.3), or in units "
        "of the directions (default 1).",
        "reach{:g}",
        GROUP,
        least=0,
    )
    samples: int = setting(5000, "Samples of each set, the first ones.", "n{}", GROUP, least=1)
    normalisation: str = setting(
        "filter", "What random directions have in common with the weights: norms.", "{}", GROUP, choices=NORMALISATIONS
    )
    vectors: bool = setting(False, "Let biases and normalisations move in random directions, too.", "vectors", GROUP)
    direction_seed: int = setting(0, "Of random directions.", "r{}", GROUP, least=0, most=2**32 - 1)
    every: int = setting(10, "Epochs between the iterates of pca.", "every{}", GROUP, least=1)

    def check(self) -> None:
        """Raise `UserError` for minimizers that make no surface."""
        super().check()
        for name in self.minimizers or ():
            if name not in NAMES and not name.endswith(".weights.h5"):
                raise UserError(f"There is no minimizer '{name}'; choose among SB, LB, start and .weights.h5 files.")
            if name not in NAMES and not Path(name).is_file():
                raise UserError(f"There is no weights file {name}.")
        if self.directions == "points" and len(self.chosen) not in (2, 3):
            raise UserError(
                "A line goes through 2 and a plane through 3 --minimizers; around one, choose --directions."
            )
        if self.directions == "pca" and not {*self.chosen} <= {"SB", "LB"}:
            raise UserError("The path of a training (--directions=pca) is that of SB or LB.")
        iterates = len(range(0, self.epochs, self.every)) + 1
        if self.directions == "pca" and iterates <= self.dimensions:
            raise UserError(
                f"{iterates} iterates do not have {self.dimensions} principal components; give a smaller --every than "
                f"{self.every}."
            )
        if self.reach is not None and not 0 < self.reach < 1e6:
            raise UserError(f"--reach must be a number above 0, not {self.reach:g}.")

    def resolve(self, network: Any, samples: int) -> Settings:
        """Keep to the samples there are."""
        return replace(super().resolve(network, samples), samples=min(self.samples, samples))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The minimizers, or their default."""
        return tuple(dict.fromkeys(self.minimizers or NAMES[: 3 if self.directions == "points" else 2]))

    @property
    def axes(self) -> int:
        """How many dimensions the surface has."""
        return len(self.chosen) - 1 if self.directions == "points" else self.dimensions


def spans(experiment: Experiment) -> dict[str, tuple[Span, tuple[str, ...]]]:
    """Return where each surface is, and the names of the points that it is made of, by its heading."""
    from large_batch.places import Span

    settings = experiment.settings
    known = {label: experiment.recipe(batch) for label, batch in settings.batches.items()}
    known["start"] = known["SB"].at_epoch(0)
    names = settings.chosen
    ends = {name: known.get(name, name) for name in names}
    if settings.directions == "points":
        if len(set(ends.values())) < len(ends):
            raise UserError("SB and LB are one training; give them batches of different sizes.")
        return {"": (Span(tuple(ends.values())), names)}
    if settings.directions == "pca":
        epochs = [settings.epochs, *reversed(range(0, settings.epochs, settings.every))]
        marks = tuple("start" if epoch == 0 else f"{epoch} epochs" for epoch in epochs)
        return {name: (Span(tuple(ends[name].at_epoch(epoch) for epoch in epochs)), marks) for name in names}
    return {name: (Span((end,)), (name,)) for name, end in ends.items()}


def requests(experiment: Experiment) -> list[SurfaceRequest]:
    """Return the rows of a surface."""
    from large_batch.places import SurfaceRequest

    settings = experiment.settings
    reach = settings.reach or DIRECTIONS[settings.directions]
    random = ("normalisation", "vectors", "direction_seed") if settings.directions == "random" else ()
    asked = {name: getattr(settings, name) for name in ("directions", "points", "samples", *random)}
    asked |= {"dimensions": settings.axes, "reach": reach}
    return [experiment.request(SurfaceRequest, row=row, **asked) for row in range(settings.points)]


def axis_labels(settings: Settings, marks: tuple[str, ...], values: np.ndarray) -> tuple[str, ...]:
    """Return what the axes say."""
    numbers = range(1, settings.axes + 1)
    if settings.directions == "points":
        first, second, *third = marks
        return (f"{first} (0) to {second} (1)", *(f"to {name}, in the same unit" for name in third))
    if settings.directions == "random":
        how = "as drawn" if settings.normalisation == "none" else f"by {settings.normalisation}"
        return tuple(f"random direction {number}, {how}" for number in numbers)
    kind = {"pca": "component {} ({:.1f} % of the variance)", "eigenvectors": "eigenvector {} (of {:.3g})"}
    return tuple(map(kind[settings.directions].format, numbers, values))


def table(panels: list[Panel]) -> str:
    """Lay out the ranges of loss and accuracy on each surface."""
    from large_batch import tables

    rows = [["surface", "set", "least loss", "greatest loss", "accuracy (%)"]]
    for panel in panels:
        for half in ("train", "test"):
            found = getattr(panel, half)
            known = np.isfinite(found.loss)
            loss, accuracy = found.loss[known], found.accuracy[known]
            cells = ["-"] * 3
            if known.any():
                greatest = f"{loss.max():.4g}" if known.all() else "not finite"
                cells = [f"{loss.min():.4g}", greatest, f"{accuracy.min():.2f} - {accuracy.max():.2f}"]
            rows.append([panel.title, half, *cells])
    return tables.lay_out(rows)


def numbers(panels: list[Panel]) -> tuple[list[dict], dict[str, bytes]]:
    """Return the rows of the .csv file, a point each, and the other files by how their names end: an .npz with the
    arrays by surface and name, and for each surface a .vtk."""
    rows, arrays, others = [], {}, {}
    for panel in panels:
        train, test = panel.train, panel.test
        values = {f"train_{name}": getattr(train, name) for name in ("loss", "accuracy")}
        values |= {f"test_{name}": getattr(test, name) for name in ("loss", "accuracy")}
        prefix = f"{panel.title}_" if panel.title else ""
        shared = {name: getattr(train, name) for name in ("a", "b", "marks", "axis_values")}
        arrays |= {prefix + name: array for name, array in (shared | values).items()}
        word = f"-{minimizers_word((panel.title,))}" if panel.title else ""
        others[f"{word}.vtk"] = vtk(train.a, train.b, values).encode()
        for (i, j), _ in np.ndenumerate(train.loss):
            place = {"surface": panel.title, "a": float(train.a[j]), "b": float(train.b[i])}
            rows.append(place | {name: float(array[i, j]) for name, array in values.items()})
    np.savez(packed := io.BytesIO(), **arrays)
    return rows, {".npz": packed.getvalue(), **others}


def main(settings: Settings) -> None:
    """Train or find the minimizers, evaluate the surfaces, draw them and write the numbers."""
    settings.check()
    import network_zoo
    from large_batch import places, surface_figures
    from large_batch.experiment import Experiment
    from large_batch.runner import Runner
    from large_batch.surface_figures import Panel

    # Planes
    experiment = Experiment.begin(settings, network_zoo.get)
    settings, rows = experiment.settings, requests(experiment)
    where = spans(experiment)
    asked = [(request, span) for span, _ in where.values() for request in rows]
    train, test = len(experiment.data.x_train), len(experiment.data.x_test)
    cost = len(where) * sum(request.cost(train, test) for request in rows)
    points = len(where) * sum(request.places for request in rows)
    work = f"as much work as {cost / (3 * train):.2g} epochs of training"
    print(f"{points:,} points in {len(asked)} measurements, {work}.", flush=True)
    # Run
    results = Runner(experiment.minimizers, settings).run([], asked)
    if results is None:
        return
    panels = []
    for title, (span, marks) in where.items():
        halves = places.assembled([results[request, span].result for request in rows])
        labels = axis_labels(settings, marks, halves[0].axis_values)
        panels.append(Panel(title, *halves, labels, marks, trajectory=settings.directions == "pca"))
    # Table and figures
    trained = any(name in NAMES for name in settings.chosen)
    when = f"after {settings.epochs} epochs" if trained else "of given minimizers"
    title = experiment.title(f"Surfaces {when}, {settings.samples:,} samples of each set")
    print(f"\n{title}\n{table(panels)}")
    draw = {"": surface_figures.contours, "-3d": surface_figures.views}
    if settings.axes == 1:
        draw = {"": surface_figures.lines}
    cells, others = numbers(panels)
    origins = {title: [experiment.origin_of(end) for end in span.ends] for title, (span, _) in where.items()}
    figures = {suffix: figure(panels, title) for suffix, figure in draw.items()}
    experiment.write("surface", cells, {"made_of": origins}, figures, others=others)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
