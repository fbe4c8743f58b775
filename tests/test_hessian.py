import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator
from test_objective import closed_form, dense
from test_sharpness_metric import Quadratic

from large_batch import datasets
from large_batch.backend import keras
from large_batch.errors import MachineError, UserError
from large_batch.hessian import TOLERANCE, expected_products, hessian_operator, largest_eigenvalues, project
from large_batch.layers import pixels
from large_batch.objective import Objective
from large_batch.sharpness_metric import curvature, half_widths, sharpness
from large_batch.spectrum import hutchpp, spectral_density
from large_batch.subspace import RandomSubspace

RNG = np.random.default_rng(0)


class Known(Quadratic):
    """A quadratic with all that a curvature needs."""

    def value(self, w):
        return self.value_and_gradient(w)[0]

    def hessian_vector_product(self, w, v):
        return self.hessian @ v


@pytest.fixture(scope="module")
def known():
    root = RNG.normal(size=(80, 80))
    return Known(RNG.normal(size=80), root @ root.T)


@pytest.fixture(scope="module")
def regression():
    """Softmax regression on the real digits, its minimizer's surroundings and its explicit Hessian there."""
    data = datasets.load_data("digits", "unused")
    x, y = data.x_train.reshape(-1, 64), data.y_train
    w = RNG.normal(0, 0.3, 650)
    objective = Objective(dense(keras.layers.Dense(10)), x, y, prepare=pixels)
    return objective, w, closed_form(w, np.hstack([x / 255, np.ones((len(x), 1))]), y)[2]


def test_eigenvalues_of_a_known_matrix(known):
    values, vectors = largest_eigenvalues(hessian_operator(known, known.x), 3)
    expected, directions = np.linalg.eigh(known.hessian)
    np.testing.assert_allclose(values, expected[::-1][:3], rtol=TOLERANCE)
    assert abs(vectors[:, 0] @ directions[:, -1]) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_what_eigenvalues_take_is_known_beforehand(count):
    """Of a spectrum like a network's: a few large eigenvalues, and a bulk near zero."""
    diagonal = np.concatenate([np.geomspace(1, 0.05, 30), np.linspace(-1e-3, 1e-3, 2000)])
    products = []
    known = LinearOperator((2030, 2030), matvec=lambda v: products.append(1) or diagonal * v.ravel(), dtype=float)
    largest_eigenvalues(known, count)
    assert 0.5 < len(products) / expected_products(count) < 2


def test_projection_of_a_known_matrix(known):
    subspace = RandomSubspace(80, 6, seed=1)
    found = project(hessian_operator(known, known.x), subspace)
    matrix = np.stack([subspace @ unit for unit in np.eye(6)], axis=1)
    basis = np.linalg.qr(matrix)[0]
    np.testing.assert_allclose(found.ritz_values, np.linalg.eigvalsh(basis.T @ known.hessian @ basis)[::-1], rtol=1e-4)
    along = [a @ known.hessian @ a / (a @ a) for a in matrix.T]
    np.testing.assert_allclose(found.directional, along, rtol=1e-4)
    # The same space with another basis has the same Ritz values, but its columns are no independent samples.
    other = project(hessian_operator(known, known.x), RandomSubspace(80, 6, seed=1, manifold="orthonormal"))
    np.testing.assert_allclose(other.ritz_values, found.ritz_values, rtol=1e-4)
    assert other.effective_dimensions is None


def test_effective_dimensions_of_a_flat_spectrum():
    n, curved = 2000, 100
    diagonal = np.where(np.arange(n) < curved, 3.0, 0.0)
    function = Known(np.zeros(n), diagonal)
    function.hessian_vector_product = lambda w, v: diagonal * v
    found = project(hessian_operator(function, function.x), RandomSubspace(n, 100))
    # The traces are means over 100 columns, with a standard error of 1.4 % each.
    assert found.trace == pytest.approx(300, rel=0.1)
    assert found.trace_of_square == pytest.approx(900, rel=0.1)
    assert found.effective_dimensions == pytest.approx(curved, rel=0.2)


def test_softmax_regression_against_its_explicit_hessian(regression):
    objective, w, hessian = regression
    operator = hessian_operator(objective, w)
    values, _ = largest_eigenvalues(operator, 4)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(hessian)[::-1][:4], rtol=2 * TOLERANCE)  # and float32
    subspace = RandomSubspace(650, 10)
    basis = np.linalg.qr(np.stack([subspace @ unit for unit in np.eye(10)], axis=1))[0]
    expected = np.linalg.eigvalsh(basis.T @ hessian @ basis)[::-1]
    np.testing.assert_allclose(project(operator, subspace).ritz_values, expected, rtol=1e-3)


def test_the_whole(regression):
    objective, w, _ = regression
    passes = []
    found = curvature(objective, w, 1e-3, RandomSubspace(650, 5), directions=20, report=lambda n, _: passes.append(n))
    assert found.sharpness.value == sharpness(objective, w, 1e-3, solver="vertex").value
    assert found.eigenvalues == sorted(found.eigenvalues, reverse=True)
    assert len(found.eigenvalues) == 5
    assert len(found.projection.ritz_values) == 5
    assert len(found.rises) == 20
    assert max(found.rises) <= found.sharpness.value
    assert found.size == 650
    assert sum(passes) > 9 * (5 + 5)


def test_steep_shares_of_known_functions():
    """Steep everywhere: the loss depends on one weight's distance. Steep hardly anywhere: on one direction in many."""
    n = 400
    one_weight = Known(np.zeros(n), np.diag(np.eye(n)[0]))
    one_direction = Known(np.zeros(n), np.ones((n, n)) / n)
    subspace = RandomSubspace(n, 3)
    everywhere = curvature(one_weight, one_weight.x, 1e-2, subspace, eigenvalues=1)
    np.testing.assert_allclose(everywhere.rises, 100 * 1e-4 / 2)
    assert everywhere.steep_share == 100
    nowhere = curvature(one_direction, one_direction.x, 1e-2, subspace, eigenvalues=1)
    assert nowhere.sharpness.value == pytest.approx(100 * 1e-4 * n / 2)
    assert np.mean(nowhere.rises) == pytest.approx(100 * 1e-4 / 2, rel=0.5)
    assert nowhere.steep_share == 0
    lower, upper = nowhere.sharpness_bounds
    assert lower == pytest.approx(nowhere.sharpness.value, rel=1e-3) == pytest.approx(upper, rel=1e-3)
    # Eight weights together, above a loss that is not 0: 37 % of the directions reach a tenth of the sharpness
    block = np.zeros((n, n))
    block[:8, :8] = 1 / 8
    together = Known(np.zeros(n), block, lowest=0.25)
    some = curvature(together, together.x, 1e-2, subspace, eigenvalues=1)
    assert some.steep_share == 37
    assert some.sharpness_bounds[0] == pytest.approx(some.sharpness.value, rel=1e-3)
    b = half_widths(one_weight.x, 1e-2)
    assert everywhere.sharpness_bounds == pytest.approx((100 * b[0] ** 2 / 2, 100 * b @ b / 2))


def test_a_loss_without_curvature():
    flat = Known(np.zeros(30), np.zeros((30, 30)))
    operator = hessian_operator(flat, flat.x)
    assert project(operator, RandomSubspace(30, 3)).effective_dimensions is None
    with pytest.raises(MachineError, match="Lanczos iterations for 2 eigenvalues failed"):
        largest_eigenvalues(operator, 2)


class Kink(Known):
    """The sum of |x - c|: its slopes are constants, and those of the box's corners have no curvature."""

    def value_and_gradient(self, w):
        return float(np.abs(w - self.x).sum()), np.sign(w - self.x)


def test_a_loss_of_pieces_that_are_flat_or_without_second_derivatives():
    kink = Kink(np.zeros(30), np.zeros((30, 30)))
    assert not np.any(hessian_operator(kink, np.ones(30)) @ np.ones(30)), "no stopped gradient"
    kink.hessian = np.full((30, 30), np.nan)
    with pytest.raises(UserError, match="A Hessian-vector product is not finite"):
        hessian_operator(kink, np.ones(30))
    for estimate in (spectral_density, hutchpp):
        with pytest.raises(UserError, match="A Hessian-vector product is not finite"):
            estimate(hessian_operator(kink, np.ones(30), checked=False), 3)


@pytest.mark.parametrize("count", [0, 80])
def test_impossible_numbers_of_eigenvalues(known, count):
    with pytest.raises(UserError, match=f"between 1 and 79 eigenvalues can be computed, not {count}"):
        largest_eigenvalues(hessian_operator(known, known.x), count)
