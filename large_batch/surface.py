"""The loss on a line or a plane of weight space: through minimizers, along random or steep directions, or where a
training went.

Random directions are scaled as in Li et al., "Visualizing the loss landscape of neural nets" (NeurIPS 2018): a network
whose filters are larger is then not shown as flatter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from large_batch import hessian
from large_batch.errors import UserError, no_such
from large_batch.functions import Point, SmoothFunction

if TYPE_CHECKING:  # planes need no TensorFlow
    from large_batch.backend import keras

NORMALISATIONS = ("filter", "layer", "none")

Report = Callable[[str], None]  # receives a note after each point


class Evaluates(Protocol):
    """What is drawn: `objective.Objective`, or anything whose `evaluate(w)` has a loss and an accuracy; w is a `Point`
    where the plane is made of Points."""

    def evaluate(self, w: np.ndarray | Point): ...


@dataclass(frozen=True)
class Part:
    """One trainable variable in the flat vector of weights: its shape, and those of its axes that count its filters.

    A bias and the parameters of a normalisation have none.
    """

    shape: tuple[int, ...]
    filters: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plane:
    """The points `origin + c @ directions`, of coordinates c, (d,): a line or a plane, d being 1 or 2.

    `origin` has the shape (n,), `directions` (d, n). `marks`, (k, d), are the coordinates of the k points that it
    was made of, or of their projections, the first of which is the origin. `mixture`, (d, k), says how the directions
    are made of these points; it is 0 where they are not. `axis_values` are the shares of the variance (percent) or
    the eigenvalues that belong to the directions, (d,), or empty. `states` has the state of each point that the plane
    is made of, where these are `Point`s.
    """

    origin: np.ndarray
    directions: np.ndarray
    marks: np.ndarray
    mixture: np.ndarray
    axis_values: np.ndarray
    states: Sequence[list[np.ndarray]] = ()

    def at(self, coordinates: Sequence[float]) -> np.ndarray:
        """Return the weights, (n,), at coordinates, (d,)."""
        return self.origin + np.asarray(coordinates) @ self.directions

    def point(self, coordinates: Sequence[float]) -> Point:
        """Return the weights at coordinates, (d,), and the state with them, of a plane made of Points.

        States are mixed like the weights, but with no negative shares, since a variance that is extrapolated may be
        negative.
        """
        shares = np.asarray(coordinates) @ self.mixture
        shares[0] += 1
        return Point(self.at(coordinates), mixed(shares.clip(0) / shares.clip(0).sum(), self.states))

    def axes(self, points: int, reach: float) -> list[np.ndarray]:
        """Return d times the coordinates, (points,), of an even grid around the marks.

        `reach` is how far it goes beyond them, as a share of their extent; around a single mark, how far it goes. The
        extent of one axis counts as half of the other's at least.
        """
        low, high = self.marks.min(axis=0), self.marks.max(axis=0)
        extent = np.maximum(high - low, (high - low).max() / 2)
        half = (0.5 + reach) * extent if extent.max() else np.full(len(extent), reach)
        return [np.linspace(m - h, m + h, points) for m, h in zip((low + high) / 2, half, strict=True)]


@dataclass(frozen=True, eq=False)
class Surface:
    """Loss (nats) and accuracy (percent), each (B, A), at the coordinates a, (A,), and b, (B,), of a plane; B is 1 on a
    line. `marks` and `axis_values` are those of the `Plane`. All are arrays: `np.savez(file, **vars(surface))`."""

    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    marks: np.ndarray
    axis_values: np.ndarray


def mixed(shares: Sequence[float], states: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """Return the weighted sum of several states; what is no float is the first's."""
    found = []
    for group in zip(*states, strict=True):
        total = sum(share * array for share, array in zip(shares, group, strict=True))
        found.append(total.astype(group[0].dtype) if group[0].dtype.kind == "f" else group[0])
    return found


def through(points: Sequence[np.ndarray | Point]) -> Plane:
    """Return the line through two points, or the plane through three, each of shape (n,).

    The unit of both axes is the distance between the first two, at (0, 0) and (1, 0): on a line the coordinate is the
    alpha of Figure 3. The third point is where b is above 0, and the axes are at right angles.

    Raises `UserError` for another number of points, for points on one line, and for what are no weights of one model.
    """
    points, states = _checked(points)
    if len(points) not in (2, 3):
        raise UserError(f"A line goes through 2 points and a plane through 3, not {len(points)}.")
    first, second, *others = points
    along = second - first
    unit = np.linalg.norm(along)
    directions, marks, mixture = [along], [[0.0], [1.0]], [[-1.0, 1.0]]
    if unit and others:
        share = (others[0] - first) @ along / unit**2
        across = others[0] - first - share * along
        height = np.linalg.norm(across) / unit
        if height < 1e-6:
            unit = 0.0
        else:
            directions.append(across / height)
            marks = [[0.0, 0.0], [1.0, 0.0], [share, height]]
            mixture = [[-1.0, 1.0, 0.0], [(share - 1) / height, -share / height, 1 / height]]
    if not unit:
        raise UserError(
            f"The {len(points)} points do not determine a {'plane' if others else 'line'}: they are on one "
            f"{'line' if others else 'point'}."
        )
    return Plane(first, np.array(directions), np.array(marks), np.array(mixture), np.array([]), states)


def principal(points: Sequence[np.ndarray | Point], dimensions: int = 2) -> Plane:
    """Return the line or plane through the first point, along the principal components of all k, each of shape (n,).

    The components are those of the points about their mean; they are unit vectors, so the axes are Euclidean. Their
    signs are such that the last point has no coordinate below 0. The marks are projections; `axis_values` are the
    shares of the variance, in percent. In memory are twice the points.

    Raises `UserError` where the points have fewer than `dimensions` components, or are no weights of one model.
    """
    points, states = _checked(points, dimensions)
    centred = np.array(points, np.float64)
    centred -= centred.mean(axis=0)
    squares, vectors = np.linalg.eigh(centred @ centred.T)  # k x k, since k is small and n is not
    squares, vectors = squares[::-1], vectors[:, ::-1]
    if len(points) <= dimensions or squares[dimensions - 1] <= 1e-12 * squares[0]:
        raise UserError(f"{len(points)} points do not have {dimensions} principal components; take more iterates.")
    mixture = vectors[:, :dimensions].T / np.sqrt(squares[:dimensions, None])
    directions = mixture @ centred
    marks = centred @ directions.T
    marks -= marks[0]
    signs = np.where(marks[-1] < 0, -1.0, 1.0)
    shares = 100 * squares[:dimensions] / squares.sum()
    directions, mixture = signs[:, None] * directions, signs[:, None] * mixture
    return Plane(np.asarray(points[0], np.float64), directions, signs * marks, mixture, shares, states)


def random_plane(
    model: keras.Model,
    w: np.ndarray | Point,
    dimensions: int = 2,
    seed: int = 0,
    normalisation: str = "filter",
    vectors: bool = False,
) -> Plane:
    """Return the line or plane through a model's weights along random directions.

    Args:
        model: It tells which weights belong to one filter or layer.
        w: The weights, (n,).
        dimensions: 1 or 2.
        seed: A direction is a function of (seed, its number).
        normalisation: How directions are scaled, and
        vectors: whether biases and normalisations move, as in `normalised`.

    Raises:
        UserError: Where nothing would move: where all weights, or those that are no vectors, are 0 or none.
    """
    (w,), states = _checked([w], dimensions)
    drawn = [np.random.default_rng([seed, number]).standard_normal(len(w)) for number in range(dimensions)]
    parts = layout(model)
    directions = [normalised(direction, w, parts, normalisation, vectors) for direction in drawn]
    if not all(direction.any() for direction in directions):
        raise UserError(
            f"No weight moves in this random direction, since all that could are 0; {'' if vectors else 'let the '}"
            f"{'' if vectors else 'biases and normalisations move (vectors=True), or '}give the normalisation 'none'."
        )
    return _around(w, directions, states=states)


def steepest_plane(function: SmoothFunction, w: np.ndarray | Point, dimensions: int = 2) -> Plane:
    """Return the line or plane at the weights w, (n,), along the unit eigenvectors of the Hessian's largest
    eigenvalues, which are the `axis_values`. Raises as `hessian.largest_eigenvalues` does."""
    (weights,), states = _checked([w], dimensions)
    values, vectors = hessian.largest_eigenvalues(hessian.hessian_operator(function, w), dimensions)
    return _around(weights, vectors.T, values, states)


def _checked(
    points: Sequence[np.ndarray | Point], dimensions: int = 1
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Return the weights of each point, and the states where they are Points.

    Raises `UserError` unless each is a vector of weights, finite and as long as the first, and all or none are Points.
    """
    states = [point.state for point in points if isinstance(point, Point)]
    if 0 < len(states) < len(points):
        raise UserError("A plane is made of Points, each with its state, or of bare weights, but not of both.")
    points = [point.weights if isinstance(point, Point) else point for point in points]
    if dimensions not in (1, 2):
        raise UserError(f"There are lines, of 1 dimension, and planes, of 2, but none of {dimensions}.")
    if not all(np.ndim(w) == 1 and np.asarray(w).dtype.kind == "f" for w in points):
        raise UserError("A plane is made of flat vectors of weights, or of Points.")
    if len(sizes := {len(w) for w in points}) > 1:
        raise UserError(f"The points must be weights of one model; they have {sorted(sizes)} weights.")
    if not all(np.isfinite(w).all() for w in points):
        raise UserError("A plane is made of finite weights; a point has others, as after a training that diverged.")
    return points, states


def _around(
    w: np.ndarray,
    directions: Sequence[np.ndarray],
    axis_values: Sequence[float] = (),
    states: Sequence[list[np.ndarray]] = (),
) -> Plane:
    d = len(directions)
    return Plane(w, np.array(directions), np.zeros((1, d)), np.zeros((d, 1)), np.array(axis_values), states)


def layout(model: keras.Model) -> list[Part]:
    """Return the parts of a model's flat weights.

    A filter is what makes one output of a layer: a column of a dense kernel, (inputs, outputs), and [..., i] of a
    convolution's, (height, width, inputs, outputs). A depthwise convolution has one for each input and multiple, and an
    attention's projection one for each head and place in it. Biases have none, whatever their shape.
    """
    filters = {}
    for layer in model._flatten_layers():
        for variable in getattr(layer, "trainable_variables", []):
            if hasattr(layer, "depth_multiplier") and "pointwise" not in variable.name:
                filters[variable.path] = (-2, -1)
            elif type(layer).__name__.endswith("Transpose"):  # (height, width, outputs, inputs)
                filters[variable.path] = (-2,)
            elif equation := getattr(layer, "equation", None):  # of an EinsumDense, such as abc,cde->abde
                kernel, outputs = re.split("->|,", equation)[1:]
                filters[variable.path] = tuple(i for i, letter in enumerate(kernel) if letter in outputs)
    biases = ("bias", "gamma", "beta")  # of an attention, a GRU, a normalisation over several axes: no vectors
    return [
        Part(shape, filters.get(variable.path, (-1,)) if len(shape) > 1 and variable.name not in biases else ())
        for variable, shape in ((variable, tuple(variable.shape)) for variable in model.trainable_variables)
    ]


def normalised(
    direction: np.ndarray,
    w: np.ndarray,
    parts: Sequence[Part],
    normalisation: str = "filter",
    vectors: bool = False,
) -> np.ndarray:
    """Return a direction, (n,), on the scale of the weights w, (n,), of a model with these parts.

    Args:
        direction: What is scaled.
        w: The weights at which it is drawn.
        parts: What `layout` returns.
        normalisation: "filter": each filter has the norm of the weights' filter (Li et al. 2018); "layer": each
            variable has that of the weights' variable; "none": as it is.
        vectors: Whether biases and the parameters of normalisations take part, each vector scaled as a whole. By
            default the direction is 0 there, as Li et al. draw it.

    Raises:
        UserError: For a normalisation that does not exist, and parts of another size.
    """
    if normalisation not in NORMALISATIONS:
        raise no_such("normalisation", normalisation, NORMALISATIONS)
    ends = np.cumsum([int(np.prod(part.shape)) for part in parts])
    if ends[-1] != len(w):
        raise UserError(f"The model has {ends[-1]:,} trainable weights, the vector given has {len(w):,}.")
    scaled = []
    for part, ours, theirs in zip(parts, np.split(direction, ends[:-1]), np.split(w, ends[:-1]), strict=True):
        ours, theirs = ours.reshape(part.shape), theirs.reshape(part.shape)
        if not part.filters and not vectors:
            ours = np.zeros(part.shape)
        elif normalisation != "none":
            outer = {axis % len(part.shape) for axis in part.filters} if normalisation == "filter" else set()
            within = tuple(axis for axis in range(len(part.shape)) if axis not in outer)
            have, want = (np.sqrt(np.sum(np.square(x), axis=within, keepdims=True)) for x in (ours, theirs))
            ours = ours * np.divide(want, have, out=np.zeros_like(want), where=have > 0)
        scaled.append(ours.ravel())
    return np.concatenate(scaled)


def evaluate(
    function: Evaluates,
    plane: Plane,
    points: int = 25,
    reach: float = 1.0,
    report: Report = lambda note: None,
) -> Surface:
    """Return loss and accuracy on an even grid of `points` each way (see `Plane.axes`).

    Each point is one forward pass over the function's samples; the data and the plane, 8 (d + 1) n bytes, stay in
    memory. On a plane made of Points an `Objective` takes moving statistics and frozen layers that go with each point
    (`Plane.point`), else those that it has.
    Accuracies are NaN where the function has none. Raises `UserError` for fewer than 2 points.
    """
    if points < 2:
        raise UserError(f"A grid has 2 or more points each way, not {points}.")
    a, *others = plane.axes(points, reach)
    b = others[0] if others else np.zeros(1)
    found = []
    for i, place in enumerate([(x, y)[: 1 + len(others)] for y in b for x in a]):
        found.append(function.evaluate(plane.point(place) if plane.states else plane.at(place)))
        report(f"point {i + 1}/{len(a) * len(b)}, loss {found[-1].loss:.4g}")
    values = ([getattr(point, name) for point in found] for name in ("loss", "accuracy"))
    return Surface(a, b, *(np.reshape(value, (len(b), len(a))) for value in values), plane.marks, plane.axis_values)


def vtk(a: np.ndarray, b: np.ndarray, values: dict[str, np.ndarray]) -> str:
    """Return a grid as a file of VTK's legacy format (version 3.0), which ParaView, VisIt and meshio read.

    Args:
        a: The first coordinate, (A,), evenly spaced.
        b: The second, (B,), evenly spaced; on a line B is 1.
        values: Names without spaces, and the values at the points, (B, A) each.
    """
    spacing = [float(axis[1] - axis[0]) if len(axis) > 1 else 1.0 for axis in (a, b)]
    lines = ["# vtk DataFile Version 3.0", "a surface", "ASCII", "DATASET STRUCTURED_POINTS"]
    lines += [f"DIMENSIONS {len(a)} {len(b)} 1", f"ORIGIN {a[0]} {b[0]} 0", "SPACING {} {} 1".format(*spacing)]
    lines += [f"POINT_DATA {len(a) * len(b)}"]
    for name, grid in values.items():
        lines += [f"SCALARS {name} double 1", "LOOKUP_TABLE default"]
        lines += [" ".join(str(float(value)) for value in row) for row in grid]
    return "\n".join(lines) + "\n"
