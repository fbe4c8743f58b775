"""The Hessian at a minimizer, which Metric 2.1 stands for (section 2.2.2 of Keskar et al., 2017).

Everything is made of Hessian-vector products and losses; no n x n matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh
from scipy.sparse import eye_array
from scipy.sparse.linalg import ArpackError, LinearOperator, aslinearoperator, eigsh

from large_batch import functions, sharpness_metric
from large_batch.errors import MachineError, UserError
from large_batch.functions import Point, SmoothFunction
from large_batch.subspace import RandomSubspace

EIGENVALUES, DIRECTIONS = 5, 100  # how many to compute, and to sample
STEEP = 0.1  # a direction is steep where the loss rises by this share of the largest rise in the box
TOLERANCE = 1e-3  # relative, of eigenvalues

PASSES = {"loss": 1, "gradient": 3, "product": 9}  # what each costs, in forward passes over the data
Report = Callable[[int, str], None]  # receives the passes since the last report, and a note


@dataclass(frozen=True)
class Projection:
    """The Hessian H seen from the p columns of A: Ritz values, descending, on the column space; curvature
    a'Ha / a'a along each column; and estimates, where the columns are independent and normal, of the traces of H and
    of H^2."""

    manifold: str
    ritz_values: list[float]
    directional: list[float]
    trace: float | None
    trace_of_square: float | None

    @property
    def effective_dimensions(self) -> float | None:
        """tr(H)^2 / tr(H^2): as many equal eigenvalues, and zeros else, would have these traces."""
        return self.trace**2 / self.trace_of_square if self.trace_of_square else None


@dataclass(frozen=True)
class Curvature:
    """The surroundings of a minimizer of n weights, with f(w) the loss (nats).

    `eigenvalues` are the largest of the Hessian, descending. `sharpness` is Metric 2.1 in the full space by vertex
    ascent, `sharpness_bounds` (percent) what the largest eigenvalue alone says of it for small eps. `rises` are
    100 (f(w + y) - f(w)) / (1 + f(w)) at random vertices y of the same box, `steep_share` the share (percent) of these
    that rise by more than a tenth of the sharpness; None where the sharpness is not resolved. Of the dimensions in
    which the loss is steep, `projection.effective_dimensions` tells more: a random vertex has a part in all of them.
    """

    size: int
    eigenvalues: list[float]
    projection: Projection
    sharpness: sharpness_metric.SharpnessResult
    sharpness_bounds: tuple[float, float]
    rises: list[float]
    steep_share: float | None


def curvature(
    objective: SmoothFunction,
    w: np.ndarray | Point,
    eps: float,
    subspace: RandomSubspace,
    *,
    eigenvalues: int = EIGENVALUES,
    directions: int = DIRECTIONS,
    report: Report = lambda passes, note: None,
) -> Curvature:
    """Return the curvature of `objective` at the minimizer `w`, shape (n,).

    `eps` is the half-width of the box that is searched and sampled, `subspace` the A of the Ritz values, `eigenvalues`
    how many to compute, `directions` how many random ones to sample. `objective` is an `Objective` or any twice
    differentiable function of n weights; one of its Hessian-vector products is compared with differences of gradients
    first. Raises as `sharpness_metric.sharpness`, `functions.check_product` and `largest_eigenvalues` do.
    """
    if isinstance(w, Point):
        objective, w = w.hold(objective), w.weights
    hessian = hessian_operator(objective, w, report)
    sharpness = sharpness_metric.sharpness(
        objective, w, eps, solver="vertex", report=lambda note: report(PASSES["gradient"], f"sharpness {note}")
    )
    values, vectors = largest_eigenvalues(hessian, eigenvalues)
    projection = project(hessian, subspace)
    half_widths = sharpness_metric.half_widths(w, eps)
    percent = 100 / (1 + sharpness.loss)
    lower, upper = sharpness_metric.quadratic_bounds(values[0], vectors[:, 0], half_widths)
    rises = []
    random = np.random.default_rng(0)
    for i in range(directions):
        vertex = half_widths * random.choice([-1.0, 1.0], len(w))
        rises.append(percent * (objective.value(w + vertex) - sharpness.loss))
        if not np.isfinite(rises[-1]):
            raise UserError(f"The loss is not finite within epsilon {eps:g} of the minimizer; give a smaller one.")
        report(PASSES["loss"], f"direction {i + 1}/{directions}")
    steep_share = None
    if sharpness.value is not None:
        steep_share = float(100 * np.mean(np.greater(rises, STEEP * sharpness.value)))
    bounds = percent * lower, percent * upper
    return Curvature(len(w), values.tolist(), projection, sharpness, bounds, rises, steep_share)


def expected_passes(dimension: int, eigenvalues: int = EIGENVALUES, directions: int = DIRECTIONS) -> int:
    """Return about how many forward passes over the data `curvature` takes in a subspace of `dimension`."""
    evaluations = PASSES["gradient"] * (sharpness_metric.ITERATIONS + 1) + PASSES["loss"] * directions
    return evaluations + PASSES["product"] * (expected_products(eigenvalues) + dimension)


def expected_products(eigenvalues: int) -> int:
    """Return about how many Hessian-vector products so many eigenvalues at one end take."""
    return 4 * max(20, 2 * eigenvalues + 1)


def hessian_operator(
    objective: SmoothFunction,
    w: np.ndarray | Point,
    report: Report = lambda passes, note: None,
    checked: bool = True,
) -> LinearOperator:
    """Return the Hessian of `objective` at `w`, shape (n,), as SciPy's symmetric linear operator of shape (n, n).

    Unless it is not to be `checked`, one product is compared with differences of gradients first; raises as
    `functions.check` and `check_product` do then.
    """
    if isinstance(w, Point):
        objective, w = w.hold(objective), w.weights
    if checked:
        functions.check(objective, w)
        functions.check_product(objective, w)
    products = 0

    def multiply(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        product = objective.hessian_vector_product(w, v.ravel())
        report(PASSES["product"], f"Hessian-vector product {products}")
        return product

    return LinearOperator((len(w), len(w)), matvec=multiply, rmatvec=multiply, dtype=np.float64)


def largest_eigenvalues(
    hessian: LinearOperator, count: int, seed: int | Sequence[int] = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` largest eigenvalues, descending, and their unit vectors, (n, count), by Lanczos iterations.

    The iterations start at a random vector of the `seed`. Raises `UserError` unless 1 <= count < n, and `MachineError`
    when the iterations come to nothing.
    """
    n = hessian.shape[0]
    if not 1 <= count < n:
        raise UserError(f"Of {n:,} weights between 1 and {n - 1:,} eigenvalues can be computed, not {count:,}.")
    start = np.random.default_rng(seed).standard_normal(n)
    try:
        values, vectors = eigsh(hessian, count, which="LA", v0=start, tol=TOLERANCE, maxiter=50)
    except ArpackError as error:
        raise MachineError(
            f"The Lanczos iterations for {count} eigenvalues failed; ask for fewer, or elsewhere than where the loss "
            f"is flat ({error})."
        ) from error
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def lowest_eigenvalues(hessian: LinearOperator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` lowest eigenvalues, ascending, and their unit vectors, (n, count); raises as
    `largest_eigenvalues` does.

    They are the largest of l - H, with l the largest of H: so they are found to `TOLERANCE` of the spectrum's width,
    where those near zero would never be found to a share of themselves.
    """
    (top,), _ = largest_eigenvalues(hessian, 1)
    n = hessian.shape[0]
    values, vectors = largest_eigenvalues(top * aslinearoperator(eye_array(n)) - hessian, count)
    return top - values, vectors


def project(hessian: LinearOperator, subspace: RandomSubspace) -> Projection:
    """Return the projection of the Hessian onto the columns of A; one Hessian-vector product a column."""
    p = subspace.shape[1]
    projected, squares = np.empty((p, p)), np.empty(p)
    for i, unit in enumerate(np.eye(p)):
        product = hessian @ (subspace @ unit)
        projected[:, i], squares[i] = subspace.rmatvec(product), product @ product
    symmetric = (projected + projected.T) / 2
    # The eigenvalues of (A'A)^-1 A'HA are those of H on an orthonormal basis of the column space.
    ritz = eigvalsh(symmetric, subspace.gram)[::-1]
    directional = np.diag(symmetric) / np.diag(subspace.gram)
    normal = subspace.manifold == "normal"
    return Projection(
        subspace.manifold,
        ritz.tolist(),
        directional.tolist(),
        trace=float(np.trace(symmetric) / p) if normal else None,
        trace_of_square=float(squares.mean()) if normal else None,
    )
