"""Where in weight space something is measured: at a minimizer, on a path between two, on a plane through several.

A plane is measured row by row: each row is kept, and found again by what the plane is made of.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from large_batch import files, hessian, store, surface
from large_batch.distribution import Replicas
from large_batch.functions import Point
from large_batch.models import digest
from large_batch.objectives import Objectives, Request
from large_batch.progress import Report
from large_batch.recipes import Recipe
from large_batch.surface import Plane, Surface

KEPT = "eigenvectors.npz"


@dataclass(frozen=True)
class Place:
    """A point of weight space: the minimizer `first`, or the point at `alpha` of the path from it to `second`.

    A minimizer is given by its recipe, or by the path of a weights file. `curve` is "linear" (Figure 3) or
    "curvilinear" (Figure 7).
    """

    first: Recipe | str
    second: Recipe | str | None = None
    curve: str = "linear"
    alpha: float = 0.0

    @property
    def name(self) -> str:
        """What a person reads beside the progress."""
        if self.second is not None:
            return f"alpha {self.alpha:+.3f}"
        return self.first.name if isinstance(self.first, Recipe) else self.first

    @property
    def ends(self) -> list[Recipe | str]:
        """The minimizers that it depends on."""
        return [self.first] if self.second is None else [self.first, self.second]


@dataclass(frozen=True)
class Span:
    """Where a plane is: the minimizers that it is made of, each a recipe or the path of a weights file, the first of
    which is its origin."""

    ends: tuple[Recipe | str, ...]
    name: ClassVar[str] = "surface"


def path_point(curve: str, alpha: float, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Return the weights, shape (n,), at `alpha` of the linear (Figure 3) or curvilinear (Figure 7) path."""
    if curve == "linear":
        return alpha * large + (1 - alpha) * small
    return np.sin(alpha * np.pi / 2) * large + np.cos(alpha * np.pi / 2) * small


def state_between(alpha: float, small: list[np.ndarray], large: list[np.ndarray]) -> list[np.ndarray]:
    """Return the state that goes with a point of either path: mixed linearly between the minimizers, and beyond them
    that of the nearer one, since a variance that is extrapolated may be negative. What is no float is `small`'s."""
    share = min(max(alpha, 0.0), 1.0)
    return surface.mixed([1 - share, share], [small, large])


@dataclass(frozen=True)
class SurfaceRow:
    """Loss (nats) and accuracy (percent) over both sets at the coordinates `a` of one `b`, and the plane's `marks`,
    (k, d), and `axis_values` (`surface.Plane`)."""

    a: list[float]
    b: float
    train_loss: list[float]
    train_accuracy: list[float]
    test_loss: list[float]
    test_accuracy: list[float]
    marks: list[list[float]]
    axis_values: list[float]


@dataclass(frozen=True, kw_only=True)
class SurfaceRequest(Request):
    """Row number `row` of a grid of `points` each way on a plane, or a single point of a line.

    `directions` is "points" (through two or three minimizers), "random", "eigenvectors" or "pca" (of the iterates of a
    training); `normalisation`, `vectors` and `direction_seed` are those of random ones (`surface.random_plane`).
    `reach` is how far the grid goes (`surface.Plane.axes`). Loss and accuracy, and the eigenvectors, are over the first
    `samples` of each set. The digest is of all minimizers that the plane is made of.
    """

    kind: ClassVar[str] = "surfaces"
    result_type: ClassVar[type] = SurfaceRow

    directions: str
    dimensions: int
    points: int
    row: int
    reach: float
    samples: int
    normalisation: str = ""
    vectors: bool = False
    direction_seed: int = 0

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        row = f"row{self.row}" if self.points else "plane"
        return f"{self.network}-{self.weights_digest[:8]}-{self.directions}{self.dimensions}d-{row}"

    @property
    def plane(self) -> SurfaceRequest:
        """The same for all rows of a plane, whatever the grid."""
        return dataclasses.replace(self, points=0, row=0, reach=0.0)

    @property
    def of_hessian(self) -> bool:
        """Whether the plane takes Hessian-vector products."""
        return self.directions == "eigenvectors"

    def cost(self, train: int, test: int) -> int:
        """Return about how many samples are evaluated; with the first row, for the plane, too."""
        products = hessian.expected_products(self.dimensions) if self.of_hessian and self.row == 0 else 0
        train, test = min(self.samples, train), min(self.samples, test)
        return self.places * (train + test) + hessian.PASSES["product"] * products * train

    @property
    def places(self) -> int:
        """The number of points in the row."""
        return self.points if self.dimensions == 2 else 1

    def compute(self, objectives: Objectives, w: Plane, report: Report) -> SurfaceRow:
        """Evaluate the row."""
        a, *others = w.axes(self.points, self.reach)
        b = others[0][self.row] if others else 0.0
        places = [(x, b) for x in a] if others else [(a[self.row],)]
        columns = []
        for place in places:
            point = w.point(place)
            objectives.take_state(point.state)
            numbers = []
            for objective in (objectives.train(self.samples), objectives.test(self.samples)):
                found = objective.evaluate(point.weights)
                numbers += (found.loss, found.accuracy) if np.isfinite(found.loss) else (None, None)
                report(objective.samples, f"row {self.row + 1}/{self.points}")
            columns.append(numbers)
        values = [list(column) for column in zip(*columns, strict=True)]
        return SurfaceRow([p[0] for p in places], float(b), *values, w.marks.tolist(), w.axis_values.tolist())


Item = tuple[Request, Place] | tuple[SurfaceRequest, Span]


def spanned_digest(points: Iterable[Point]) -> str:
    """Return what tells the minimizers that a plane is made of from others."""
    return hashlib.sha256("".join(digest(point.weights, point.state) for point in points).encode()).hexdigest()


def plane_of(
    request: SurfaceRequest,
    points: Sequence[Point],
    objectives: Objectives,
    run_dir: str | Path,
    replicas: Replicas,
    wait: bool,
) -> Plane:
    """Return the plane of a request on the minimizers.

    Eigenvectors are kept, since other processors would find them with other rounding, and a plane is one plane. Raises
    `BusyError`, unless told to `wait`, where another process computes them.
    """
    first, dimensions = points[0], request.dimensions
    if request.directions == "points":
        return surface.through(points)
    if request.directions == "pca":
        return surface.principal(points, dimensions)
    objectives.take_state(first.state)
    objective = objectives.train(request.samples)
    if request.directions == "random":
        how = request.direction_seed, request.normalisation, request.vectors
        return surface.random_plane(objective.model, first, dimensions, *how)
    folder = store.opened(Path(run_dir) / request.kind, request.plane)
    with replicas.lock(folder.path, wait):
        if replicas.agreed(folder.whole(store.RECIPE, KEPT), folder.path):
            with store.reading(folder.path / KEPT, "move it away"), np.load(folder.path / KEPT) as kept:
                return Plane(first.weights, **kept, states=[first.state])
        store.log.warning("Computing %d eigenvectors over %s samples.", dimensions, f"{objective.samples:,}")
        plane = surface.steepest_plane(objective, first, dimensions)
        if replicas.chief:
            store.write_json(folder.path / store.RECIPE, request.plane)
            kept = {name: value for name, value in vars(plane).items() if name not in ("origin", "states")}
            with files.writing(folder.path / KEPT) as temporary:
                np.savez(temporary, **kept)
            folder.seal(store.RECIPE, KEPT)
    return plane


def assembled(rows: Sequence[SurfaceRow]) -> tuple[Surface, Surface]:
    """Return the surfaces over training and test set that the rows of a plane, or the points of a line, make up."""
    line = len(rows[0].marks[0]) == 1

    def values(name: str) -> np.ndarray:
        found = np.array([getattr(row, name) for row in rows], float)  # NaN where it was not finite
        return found.reshape(1, -1) if line else found

    a = values("a")[0]
    b = np.zeros(1) if line else np.array([row.b for row in rows])
    marks, axis_values = np.array(rows[0].marks), np.array(rows[0].axis_values)
    train, test = (
        Surface(a, b, values(f"{half}_loss"), values(f"{half}_accuracy"), marks, axis_values)
        for half in ("train", "test")
    )
    return train, test
