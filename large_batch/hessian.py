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

from large_batch import functions
from large_batch.errors import MachineError, UserError
from large_batch.functions import Point, SmoothFunction
from large_batch.subspace import RandomSubspace

EIGENVALUES = 5  # how many to compute
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


def expected_products(eigenvalues: int) -> int:
    """Return about how many Hessian-vector products so many eigenvalues at one end take.

    They come in cycles of what is multiplied here, of which one mostly suffices: F1's minimizers took 21 products for
    1, 2 and 5 of the largest, and SB's 54 for the 5 lowest and, before, the largest.
    """
    return round(1.5 * max(20, 2 * eigenvalues + 1))


def hessian_operator(
    objective: SmoothFunction,
    w: np.ndarray | Point,
    report: Report = lambda passes, note: None,
    checked: bool = True,
) -> LinearOperator:
    """Return the Hessian of `objective` at `w` as SciPy's symmetric linear operator of shape (n, n).

    Args:
        objective: An `Objective`, or any twice differentiable function of n weights.
        w: The place, (n,).
        report: Receives the passes over the data that each product takes, and a note.
        checked: Whether one product is compared with differences of gradients first.

    Raises:
        UserError: As `functions.check` and `check_product` do where it is checked; by the operator, for a product that
            is not finite.
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
        functions.check_finite(product)
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
