"""Sharpness of a minimizer: Metric 2.1 of Keskar et al., 2017 (equations 3 and 4), and its kin in other regions.

Handed to L-BFGS-B unscaled, the metric may read far too little, down to 0: a small gradient is below the solver's
tolerance, and the first steps are minute (docs/design.md has numbers). So the box is searched in its own coordinates, u
in [-1, 1]^p, with the loss scaled so that the first step reaches the box's walls. In a ball, whose largest loss is on
its surface wherever the loss is convex, the search is over the directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import fmin_l_bfgs_b

from large_batch import functions, hessian
from large_batch.errors import NotFiniteError, UserError, no_such
from large_batch.functions import RESOLUTION, Function, Point
from large_batch.subspace import RandomSubspace

ITERATIONS = 10  # of L-BFGS-B, in the paper
SCALE = 100.0  # largest slope at the start: coordinates with a slope above 1 go to their wall in the first step
DIRECTIONS = 100  # random ones to sample around a minimizer
STEEP = 0.1  # a direction is steep where the loss rises by this share of the largest rise in the box
LINE_SEARCH_STEPS = 20  # SciPy's default


@dataclass(frozen=True)
class Measure:
    """The region that is searched, of points w + A y: at the size eps, the box |y_i| <= eps b_i, or the ball
    sum (y_i / b_i)^2 <= eps^2.

    `widths` returns b from x = A^+ w, both of shape (p,). `radius` is the usual size of a ball, None for a box.
    """

    widths: Callable[[np.ndarray], np.ndarray]
    radius: float | None = None


MEASURES = {
    "keskar": Measure(lambda x: np.abs(x) + 1),  # Metric 2.1
    "relative": Measure(np.abs),  # its box, of relative size only: it follows a weight that is rescaled
    "ball": Measure(np.ones_like, 0.05),  # of SAM (Foret et al., 2021)
    "adaptive": Measure(np.abs, 0.5),  # of ASAM (Kwon et al., 2021), which follows a weight that is rescaled, too
}

Report = Callable[[str], None]  # called after each evaluation with a note on the state


@dataclass(frozen=True)
class SharpnessResult:
    """A value of Metric 2.1, or of a measure like it, and how it was found.

    `value` is in percent, from the largest loss over all evaluated points; None where that loss exceeds f(x) by less
    than float32 resolves. `loss` and `largest_loss` are in nats, `at_walls` is the share (percent) of the best point's
    coordinates on a wall of the box (all of them on the surface of a ball), `seconds` is the wall time and
    `objective_seconds` its part within the objective.
    """

    value: float | None
    loss: float
    largest_loss: float
    epsilon: float
    dimension: int
    solver: str
    evaluations: int
    iterations: int
    stopped: str
    at_walls: float
    seconds: float
    objective_seconds: float

    def __str__(self) -> str:
        return f"< {100 * RESOLUTION:.1e}" if self.value is None else f"{self.value:.4g}"


def sharpness(
    objective: Function,
    w: np.ndarray | Point,
    eps: float,
    *,
    measure: str = "keskar",
    subspace: RandomSubspace | None = None,
    solver: str = "lbfgsb",
    iterations: int = ITERATIONS,
    scale: float = SCALE,
    report: Report = lambda note: None,
) -> SharpnessResult:
    """Return Metric 2.1 of `objective` at the minimizer `w`, shape (n,): 100 (max f(w + A y) - f(w)) / (1 + f(w)) over
    the box |y_i| <= eps (|(A^+ w)_i| + 1).

    Args:
        objective: An `Objective`, or any function of n weights that returns its gradient, too; it is checked at w first
            (`functions.check`). With a `Point`, it is taken with the state of that point.
        w: The minimizer, (n,).
        eps: The half-width of the box, or the size of another region.
        measure: The region: this box ("keskar"), |y_i| <= eps |(A^+ w)_i| ("relative"), the ball |y| <= eps ("ball", as
            in SAM) or |y / (A^+ w)| <= eps ("adaptive", as in ASAM). Relative and adaptive sharpness stay as they are
            where weights are rescaled without a change of the function (Dinh et al., 2017).
        subspace: A (Table 4); default: the full space, A = I (Table 3).
        solver: "lbfgsb" for SciPy's L-BFGS-B, or "vertex" for iterated ascent to where the linear model is largest: a
            vertex of the box.
        iterations: Of the solver, at most.
        scale: The largest slope that L-BFGS-B sees at the start. It hardly matters between 100 and 10,000 once the
            iterations suffice for convergence.
        report: Receives a note after each evaluation.

    Returns:
        The value (percent) and how it was found. At an exact minimizer, in the full space and for small eps, the loss
        is f(w) + y'Hy/2 with H its Hessian: the value grows with eps^2, and 100 / (1 + f(w)) times the
        `quadratic_bounds` of H's largest eigenvalue enclose it.

    Raises:
        UserError: For a bad setting, a minimizer that is not finite or of another size than A, a function that does not
            keep its word, and a loss that is not finite in the box, or not above -1 at its centre.
    """
    if isinstance(w, Point):
        objective, w = w.hold(objective), w.weights
    if not (np.isfinite(eps) and eps > 0):
        raise UserError(f"Epsilon, the half-width of the box, must be a number above 0, not {eps:g}.")
    if solver not in SOLVERS:
        raise no_such("solver", solver, SOLVERS)
    if measure not in MEASURES:
        raise no_such("measure of sharpness", measure, MEASURES)
    if iterations < 1 or not (np.isfinite(scale) and scale > 0):
        raise UserError("A maximisation needs at least 1 iteration and a scale above 0.")
    if np.ndim(w) != 1 or len(w) == 0 or not np.isfinite(w).all():
        raise UserError("A minimizer is one flat vector of finite weights; see large_batch.flat_weights.")
    if subspace is not None and subspace.shape[0] != len(w):
        raise UserError(f"The subspace is of {subspace.shape[0]:,} weights, the minimizer has {len(w):,}.")
    began = time.perf_counter()
    box = _Box(objective, np.asarray(w, np.float64), eps, measure, subspace, report)
    iterations, stopped = SOLVERS[solver](box, iterations, scale)
    rise = (box.best - box.loss) / (1 + box.loss)
    return SharpnessResult(
        value=100 * rise if rise > RESOLUTION else None,
        loss=box.loss,
        largest_loss=box.best,
        epsilon=eps,
        dimension=len(box.half_widths),
        solver=solver,
        evaluations=box.evaluations,
        iterations=iterations,
        stopped=stopped,
        at_walls=box.at_walls(),
        seconds=time.perf_counter() - began,
        objective_seconds=box.objective_seconds,
    )


def half_widths(
    w: np.ndarray, eps: float, subspace: RandomSubspace | None = None, measure: str = "keskar"
) -> np.ndarray:
    """Return the box of equation 3, float64 of shape (p,): eps (|(A^+ w)_i| + 1); or half of another region's axes."""
    return eps * MEASURES[measure].widths(w if subspace is None else subspace.pseudo_inverse(w))


def quadratic_bounds(eigenvalue: float, eigenvector: np.ndarray, half_widths: np.ndarray) -> tuple[float, float]:
    """Return bounds on max y'Hy/2 over the box |y_i| <= half_widths_i, all of shape (n,), from H's largest eigenvalue.

    From below, the way along its eigenvector to the wall; from above, the ball around the box; 0 where it is negative.
    """
    eigenvalue = max(eigenvalue, 0.0)
    lower = eigenvalue / 2 * np.min(half_widths / np.maximum(np.abs(eigenvector), np.finfo(float).tiny)) ** 2
    return float(lower * np.sum(eigenvector**2)), float(eigenvalue / 2 * np.sum(half_widths**2))


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
    projection: hessian.Projection
    sharpness: SharpnessResult
    sharpness_bounds: tuple[float, float]
    rises: list[float]
    steep_share: float | None


def curvature(
    objective: functions.SmoothFunction,
    w: np.ndarray | Point,
    eps: float,
    subspace: RandomSubspace,
    *,
    eigenvalues: int = hessian.EIGENVALUES,
    directions: int = DIRECTIONS,
    report: hessian.Report = lambda passes, note: None,
) -> Curvature:
    """Return the curvature of `objective` at the minimizer `w`.

    Args:
        objective: An `Objective`, or any twice differentiable function of n weights; one of its Hessian-vector products
            is compared with differences of gradients first (`functions.check_product`).
        w: The minimizer, (n,).
        eps: The half-width of the box of Metric 2.1, which is searched and sampled.
        subspace: A, in which the Hessian's Ritz values are taken.
        eigenvalues: How many of the largest to compute.
        directions: How many random vertices of the box to sample.
        report: Receives the passes over the data since it was last called, and a note.

    Raises:
        UserError: As `sharpness`, `functions.check_product` and `hessian.largest_eigenvalues` do.
    """
    if isinstance(w, Point):
        objective, w = w.hold(objective), w.weights
    operator = hessian.hessian_operator(objective, w, report)
    found = sharpness(
        objective, w, eps, solver="vertex", report=lambda note: report(hessian.PASSES["gradient"], f"sharpness {note}")
    )
    values, vectors = hessian.largest_eigenvalues(operator, eigenvalues)
    projection = hessian.project(operator, subspace)
    widths = half_widths(w, eps)
    percent = 100 / (1 + found.loss)
    lower, upper = quadratic_bounds(values[0], vectors[:, 0], widths)
    rises = []
    random = np.random.default_rng(0)
    for i in range(directions):
        vertex = widths * random.choice([-1.0, 1.0], len(w))
        rises.append(percent * (objective.value(w + vertex) - found.loss))
        if not np.isfinite(rises[-1]):
            raise NotFiniteError(f"The loss is not finite within epsilon {eps:g} of the minimizer; give a smaller one.")
        report(hessian.PASSES["loss"], f"direction {i + 1}/{directions}")
    steep_share = None
    if found.value is not None:
        steep_share = float(100 * np.mean(np.greater(rises, STEEP * found.value)))
    bounds = percent * lower, percent * upper
    return Curvature(len(w), values.tolist(), projection, found, bounds, rises, steep_share)


def expected_passes(dimension: int) -> int:
    """Return about how many forward passes over the data `curvature` takes in a subspace of `dimension`."""
    evaluations = hessian.PASSES["gradient"] * (ITERATIONS + 1) + hessian.PASSES["loss"] * DIRECTIONS
    return evaluations + hessian.PASSES["product"] * (hessian.expected_products(hessian.EIGENVALUES) + dimension)


class _Box:
    """The loss over the region, phi(u) = f(w + A (b * u)) for |u_i| <= 1, or for |u| <= 1 where it is `round`.

    Remembers the best point it has seen.
    """

    def __init__(
        self,
        objective: Function,
        w: np.ndarray,
        eps: float,
        measure: str,
        subspace: RandomSubspace | None,
        report: Report,
    ):
        self._objective = objective
        self._w = w
        self._subspace = subspace
        self._report = report
        self.half_widths = half_widths(w, eps, subspace, measure)
        self.round = MEASURES[measure].radius is not None
        self.eps = eps
        self.evaluations = 0
        self.objective_seconds = 0.0
        self.best = -np.inf
        centre = np.zeros(len(self.half_widths))
        began = time.perf_counter()
        checked = functions.check(objective, w)
        self.objective_seconds += time.perf_counter() - began
        self.loss, slope = self._noted(centre, *checked)
        if not self.loss > -1:
            raise UserError(f"Metric 2.1 needs a loss above -1 at the minimizer, not {self.loss:g}.")
        self.start = centre, self.loss, slope
        if not slope.any():  # the slope gives no direction, so start from a random point instead
            point = np.random.default_rng(0).uniform(-1, 1, len(centre))
            point /= np.linalg.norm(point) if self.round else 1
            self.start = point, *self.value_and_gradient(point)

    def value_and_gradient(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        """Return phi(u) and its gradient, float64 of shape (p,)."""
        y = self.half_widths * u
        w = self._w + (y if self._subspace is None else self._subspace @ y)
        began = time.perf_counter()
        loss, gradient = self._objective.value_and_gradient(w)
        self.objective_seconds += time.perf_counter() - began
        return self._noted(u, float(loss), np.asarray(gradient, np.float64))

    def _noted(self, u: np.ndarray, loss: float, gradient: np.ndarray) -> tuple[float, np.ndarray]:
        """Remember an evaluation; return the loss and its slope in the box's coordinates."""
        self.evaluations += 1
        if not (np.isfinite(loss) and np.isfinite(gradient).all()):
            remedy = "give a smaller one" if self.evaluations > 1 else "it is not so at the minimizer itself either"
            raise NotFiniteError(f"The loss is not finite within epsilon {self.eps:g} of the minimizer; {remedy}.")
        if loss > self.best:
            self.best, self.best_u = loss, u.copy()
        self._report(f"loss {loss:.4g}, largest {self.best:.4g}")
        return loss, self.half_widths * (gradient if self._subspace is None else self._subspace.rmatvec(gradient))

    def farthest(self, u: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Return where the linear model of a slope is largest; u's coordinates where it has none."""
        if self.round:
            length = np.linalg.norm(slope)
            return slope / length if length else u
        return np.where(slope == 0, u, np.sign(slope))

    def at_walls(self) -> float:
        """Return the share (percent) of the best point's coordinates on a wall, or all on the surface of a ball."""
        if self.round:
            return 100.0 if np.linalg.norm(self.best_u) > 1 - 1e-9 else 0.0
        return float(100 * np.mean(np.abs(self.best_u) == 1))


def _lbfgsb(box: _Box, iterations: int, scale: float) -> tuple[int, str]:
    """Maximise by SciPy's L-BFGS-B without tolerances; return the number of iterations and why it stopped.

    SciPy loops over the bounds in Python, about 3.5 microseconds a weight: 5 s of a measurement of F1. In a ball there
    are none: the loss is a function of the direction, from that of the slope at the centre on.
    """
    u, loss, slope = box.start
    steepest = np.abs(slope).max()
    if steepest == 0:
        return 0, "the loss has no slope"
    factor, known, bounds = scale / steepest, [(loss, slope)], [(-1.0, 1.0)] * len(u)
    if box.round:
        u, known, bounds = box.farthest(u, slope), [], None

    def descend(v: np.ndarray) -> tuple[float, np.ndarray]:
        length = np.linalg.norm(v) if box.round else 1.0
        u = v / length
        loss, slope = known.pop() if known else box.value_and_gradient(u)  # the start is evaluated already
        if box.round:
            slope = (slope - (slope @ u) * u) / length
        return -factor * loss, -factor * slope

    limits = {"maxiter": iterations, "maxfun": 1 + iterations * (1 + LINE_SEARCH_STEPS), "maxls": LINE_SEARCH_STEPS}
    *_, end = fmin_l_bfgs_b(descend, u, bounds=bounds, factr=0.0, pgtol=0.0, **limits)
    reasons = ("no further rise", "the limit of iterations", "the line search found no rise")
    return end["nit"], reasons[end["warnflag"]]


def _vertex_ascent(box: _Box, iterations: int, scale: float) -> tuple[int, str]:
    """Maximise by going, again and again, to where the linear model is largest: a vertex of the box, or a point of the
    ball's surface. A convex function never decreases on the way. Return the number of iterations and why it stopped."""
    u, _, slope = box.start
    for iteration in range(iterations):
        vertex = box.farthest(u, slope)
        if np.array_equal(vertex, u):
            return iteration, "the vertex is its own best neighbour"
        u = vertex
        _, slope = box.value_and_gradient(u)
    return iterations, "the limit of iterations"


SOLVERS = {"lbfgsb": _lbfgsb, "vertex": _vertex_ascent}
