import itertools

import numpy as np
import pytest
from scipy.optimize import fmin_l_bfgs_b

from large_batch import datasets
from large_batch.backend import keras
from large_batch.errors import UserError
from large_batch.layers import pixels
from large_batch.objective import Objective, flat_weights
from large_batch.sharpness_metric import MEASURES, half_widths, quadratic_bounds, sharpness
from large_batch.subspace import RandomSubspace

RNG = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("solver", ["lbfgsb", "vertex"])


class Quadratic:
    """f(w) = f0 + g'(w - x) + (w - x)'H(w - x)/2."""

    def __init__(self, x, hessian, slope=0.0, lowest=0.0):
        self.x, self.hessian, self.slope, self.lowest = x, hessian, np.broadcast_to(slope, x.shape), lowest

    def value_and_gradient(self, w):
        y = w - self.x
        curved = self.hessian @ y if self.hessian.ndim == 2 else self.hessian * y
        return self.lowest + self.slope @ y + y @ curved / 2, self.slope + curved


@BOTH
@pytest.mark.parametrize("slope", [0.0, 1e-6])
@pytest.mark.parametrize("eps", [1e-3, 5e-4])
def test_a_diagonal_hessian_in_closed_form(solver, slope, eps):
    """The maximum is at a vertex, both at the exact minimum and beside it."""
    x, h = RNG.normal(size=300), RNG.exponential(size=300) ** 3
    b = eps * (abs(x) + 1)
    expected = 100 * (slope * b.sum() + h @ b**2 / 2) / (1 + 0.25)
    result = sharpness(Quadratic(x, h, slope, lowest=0.25), x, eps, solver=solver)
    assert result.value == pytest.approx(expected, rel=1e-9 if solver == "vertex" else 1e-2)
    assert result.value <= expected * (1 + 1e-9)
    assert result.loss == 0.25
    assert result.largest_loss == pytest.approx(0.25 + result.value / 80)
    assert result.dimension == 300
    assert result.at_walls == 100 or solver == "lbfgsb"  # which leaves weights inside that hardly matter


@BOTH
def test_a_subspace_in_closed_form(solver):
    """With a Hessian of positive entries within the subspace, the maximum is where all coordinates agree."""
    x, subspace = RNG.normal(size=60), RandomSubspace(60, 5)
    matrix = np.stack([subspace @ unit for unit in np.eye(5)], axis=1)
    root = RNG.uniform(size=(5, 5))
    inner = root @ root.T
    inverse = np.linalg.pinv(matrix)
    b = 1e-3 * (abs(inverse @ x) + 1)
    result = sharpness(Quadratic(x, inverse.T @ inner @ inverse, 0.0), x, 1e-3, subspace=subspace, solver=solver)
    assert result.value == pytest.approx(50 * b @ inner @ b, rel=1e-4)
    assert result.dimension == 5


@BOTH
def test_a_convex_function_against_all_vertices(solver):
    x, root = RNG.normal(size=12), RNG.normal(size=(12, 3))
    function = Quadratic(x, root @ root.T, slope=1e-9)
    b = half_widths(x, 1e-2)
    vertices = (b * np.array(signs) for signs in itertools.product((-1, 1), repeat=12))
    largest = max(function.value_and_gradient(x + y)[0] for y in vertices)
    value = sharpness(function, x, 1e-2, solver=solver).value
    assert 0.8 * 100 * largest <= value <= 100 * largest * (1 + 1e-9)


@BOTH
def test_every_measure_of_a_quadratic_in_closed_form(solver):
    """A box has its largest loss at a vertex, a ball where the scaled Hessian's top eigenvector meets its surface."""
    x, h = RNG.normal(size=200), RNG.uniform(size=200)
    h[7] = 50  # far above the others: a ball's maximum is then found in few iterations
    found = {
        name: sharpness(Quadratic(x, h, 1e-7, lowest=0.25), x, 1e-2, measure=name, solver=solver, iterations=30)
        for name in MEASURES
    }
    expected = {
        "keskar": h @ (np.abs(x) + 1) ** 2,
        "relative": h @ x**2,
        "ball": h.max(),
        "adaptive": np.max(h * x**2),
    }
    assert {name: result.value for name, result in found.items()} == pytest.approx(
        {name: 100 * 1e-4 * number / 2 / 1.25 for name, number in expected.items()}, rel=1e-3
    )
    assert found["ball"].at_walls == found["adaptive"].at_walls == 100


@BOTH
@pytest.mark.parametrize("measure", ["relative", "adaptive"])
def test_measures_that_follow_a_rescaled_weight(solver, measure):
    """f(c * w) at w / c is f(w), and the solvers take the same steps; in the paper's box they do not.

    The factors are powers of two, by which rounding does not change.
    """
    x, root, factors = RNG.normal(size=60), RNG.normal(size=(60, 60)), 2.0 ** RNG.integers(-3, 4, size=60)
    plain = Quadratic(x, root @ root.T)
    scaled = Quadratic(x / factors, factors[:, None] * plain.hessian * factors)
    start = x + 1e-3 * RNG.normal(size=60)
    one = sharpness(plain, start, 1e-2, measure=measure, solver=solver)
    other = sharpness(scaled, start / factors, 1e-2, measure=measure, solver=solver)
    assert other.value == pytest.approx(one.value, rel=1e-6)
    assert other.evaluations == one.evaluations
    for name in ("keskar", "ball"):
        one, other = (sharpness(f, w, 1e-2, measure=name) for f, w in ((plain, start), (scaled, start / factors)))
        assert other.value != pytest.approx(one.value, rel=0.1)


def test_a_ball_in_a_subspace():
    x, subspace = RNG.normal(size=50), RandomSubspace(50, 4)
    matrix = np.stack([subspace @ unit for unit in np.eye(4)], axis=1)
    h = RNG.exponential(size=50)
    found = sharpness(Quadratic(x, h), x, 0.3, measure="ball", subspace=subspace, iterations=40)
    largest = np.linalg.eigvalsh(matrix.T @ (h[:, None] * matrix))[-1]
    assert found.value == pytest.approx(100 * 0.3**2 * largest / 2, rel=1e-6)
    assert (found.dimension, found.at_walls) == (4, 100)


def test_for_small_eps_the_largest_eigenvalue_bounds_it():
    x, root = RNG.normal(size=40), RNG.normal(size=(40, 40))
    hessian = root @ root.T
    values, vectors = np.linalg.eigh(hessian)
    found = []
    for eps in (1e-2, 1e-3, 1e-4):
        found.append(sharpness(Quadratic(x, hessian), x, eps, solver="vertex", iterations=30).value)
        lower, upper = quadratic_bounds(values[-1], vectors[:, -1], half_widths(x, eps))
        assert 100 * lower <= found[-1] <= 100 * upper
    assert found[0] / found[1] == pytest.approx(100)
    assert found[1] / found[2] == pytest.approx(100)
    # A single eigenvalue whose vector points into a corner of the box: the bounds meet.
    b = half_widths(x, 1e-3)
    corner = b / np.linalg.norm(b)
    lower, upper = quadratic_bounds(7.0, corner, b)
    value = sharpness(Quadratic(x, 7 * np.outer(corner, corner)), x, 1e-3).value
    assert 100 * lower == pytest.approx(value) == pytest.approx(100 * upper)


def test_the_start_is_evaluated_once():
    """Also where it is not the centre, since the slope there gives no direction."""
    x, h, g = (draw(size=200) for draw in (RNG.normal, RNG.exponential, RNG.normal))

    class Wavy:
        repeats = True

        def __init__(self, slope):
            self.slope, self.seen = slope, []

        def value_and_gradient(self, w):
            y = w - x
            self.seen.append(w.tobytes())
            return self.slope @ y + np.sum(h * (1 - np.cos(40 * y))), self.slope + 40 * h * np.sin(40 * y)

    for slope in (g, 0 * g):
        wavy = Wavy(slope)
        result = sharpness(wavy, x, 0.05)
        assert wavy.seen[0] == x.tobytes()
        assert [wavy.seen.count(point) for point in wavy.seen[:2]] == [1, 1]
        assert len(wavy.seen) == result.evaluations > result.iterations == 10
        assert 0 < result.at_walls < 100


@pytest.fixture(scope="module")
def minimizer():
    """Softmax regression on the real digits and the minimizer that Newton's method finds: well trained, and smooth."""
    data = datasets.load_data("digits", "unused")
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    objective = Objective(model, data.x_train.reshape(-1, 64), data.y_train, prepare=pixels)
    w, _, _ = fmin_l_bfgs_b(objective.value_and_gradient, flat_weights(model), maxiter=300)
    return objective, w


def test_the_trap(minimizer):
    """Wrapped the obvious way the solver does not leave a minimizer; in box coordinates it does."""
    objective, w = minimizer
    b = half_widths(w, 1e-3)
    loss = objective.value(w)

    def negative(v):
        value, gradient = objective.value_and_gradient(v)
        return -value, -gradient

    _, lowest, _ = fmin_l_bfgs_b(negative, w, bounds=list(zip(w - b, w + b, strict=True)), maxiter=10)
    obvious = 100 * (-lowest - loss) / (1 + loss)
    assert obvious < 0.01 * sharpness(objective, w, 1e-3).value


def test_scales_and_solvers_agree_on_a_real_minimizer(minimizer):
    objective, w = minimizer
    for eps in (1e-3, 5e-4):
        values = [sharpness(objective, w, eps, scale=scale).value for scale in (100, 1000, 10_000)]
        values.append(sharpness(objective, w, eps, solver="vertex").value)
        assert max(values) < 1.05 * min(values)


def test_vertex_ascent_never_decreases_a_convex_loss(minimizer):
    objective, w = minimizer

    class Recording:
        repeats = True

        def __init__(self):
            self.losses = []

        def value_and_gradient(self, v):
            value, gradient = objective.value_and_gradient(v)
            self.losses.append(value)
            return value, gradient

    recording, reports = Recording(), []
    result = sharpness(recording, w, 1e-2, solver="vertex", report=reports.append)
    assert (np.diff(recording.losses) > -1e-6).all()
    assert len(recording.losses) == len(reports) == result.evaluations
    assert result.iterations == result.evaluations - 1
    assert result.at_walls > 80  # pixels that are always black have no slope


def test_the_best_of_all_points_counts_not_the_last():
    class UpAndDown:
        repeats = True
        losses = iter([1.0, 5.0, 3.0, 2.0])

        def value_and_gradient(self, w):
            loss = next(self.losses)
            return loss, np.full(4, (-1.0) ** loss)

    result = sharpness(UpAndDown(), np.zeros(4), 0.1, solver="vertex", iterations=3)
    assert (result.largest_loss, result.value) == (5, 200)


@BOTH
def test_what_float32_cannot_resolve_is_no_number(solver):
    flat = sharpness(Quadratic(np.zeros(5), np.zeros(5), lowest=1.0), np.zeros(5), 1e-3, solver=solver)
    assert (flat.value, str(flat)) == (None, "< 1.2e-05")
    assert flat.stopped
    barely = sharpness(Quadratic(np.zeros(5), np.zeros(5), slope=2e-5, lowest=1.0), np.zeros(5), 1e-3, solver=solver)
    assert barely.value is None
    assert barely.largest_loss > barely.loss
    enough = sharpness(Quadratic(np.zeros(5), np.zeros(5), slope=1e-3, lowest=1.0), np.zeros(5), 1e-3, solver=solver)
    assert enough.value == pytest.approx(100 * 5e-6 / 2)


def test_mistakes():
    function, w = Quadratic(np.zeros(5), np.ones(5)), np.zeros(5)
    for eps in (0, -1e-3, np.nan, np.inf):
        with pytest.raises(UserError, match="must be a number above 0"):
            sharpness(function, w, eps)
    with pytest.raises(UserError, match="no solver 'adam'"):
        sharpness(function, w, 1e-3, solver="adam")
    with pytest.raises(
        UserError, match="no measure of sharpness 'flat'; choose one of keskar, relative, ball, adaptive"
    ):
        sharpness(function, w, 1e-3, measure="flat")
    with pytest.raises(UserError, match="at least 1 iteration"):
        sharpness(function, w, 1e-3, iterations=0)
    with pytest.raises(UserError, match="flat vector of finite weights"):
        sharpness(function, np.array([1, np.nan, 0, 0, 0]), 1e-3)
    with pytest.raises(UserError, match="subspace is of 6 weights, the minimizer has 5"):
        sharpness(function, w, 1e-3, subspace=RandomSubspace(6, 2))

    with pytest.raises(UserError, match="flat vector of finite weights"):
        sharpness(function, np.zeros(0), 1e-3)
    with pytest.raises(UserError, match="a loss above -1 at the minimizer, not -1"):
        sharpness(Quadratic(w, w, lowest=-1.0), w, 1e-3)

    class Explodes:
        def __init__(self, at_centre):
            self.at_centre = at_centre

        def value_and_gradient(self, w):
            return (np.inf if w.any() else self.at_centre), np.ones(5)

    with pytest.raises(UserError, match=r"not finite within epsilon 0\.001 of the minimizer; give a smaller one"):
        sharpness(Explodes(0.0), w, 1e-3)
    with pytest.raises(UserError, match="not so at the minimizer itself"):
        sharpness(Explodes(np.nan), w, 1e-3)


def test_bounds_where_the_loss_curves_downwards_only():
    assert quadratic_bounds(-3.0, np.eye(4)[0], np.ones(4)) == (0, 0)
