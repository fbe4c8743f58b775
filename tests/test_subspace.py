import tracemalloc

import numpy as np
import pytest

from large_batch.errors import UserError
from large_batch.subspace import CELL, MANIFOLDS, RandomSubspace

RNG = np.random.default_rng(0)
N, P = 2 * CELL + 100, 7
# Products are float32 within a cell: tolerances are some 1e-7 times a sum of CELL or P terms of order 1.


def matrix(subspace):
    return np.stack([subspace @ unit for unit in np.eye(subspace.shape[1])], axis=1)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_the_operator_is_one_matrix(manifold):
    subspace = RandomSubspace(N, P, seed=3, manifold=manifold)
    explicit = matrix(subspace)
    y, g = RNG.normal(size=P), RNG.normal(size=N)
    np.testing.assert_allclose(subspace @ y, explicit @ y, atol=1e-5)
    np.testing.assert_allclose(subspace.T @ g, explicit.T @ g, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(subspace.gram, explicit.T @ explicit, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(subspace.pseudo_inverse(g), np.linalg.pinv(explicit) @ g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_kept_or_generated_anew_it_is_the_same(manifold):
    kept, anew = (RandomSubspace(N, P, 1, manifold, kept_bytes=size) for size in (2**30, 0))
    y, g = RNG.normal(size=P), RNG.normal(size=N)
    np.testing.assert_array_equal(kept @ y, anew @ y)
    np.testing.assert_array_equal(kept.rmatvec(g), anew.rmatvec(g))
    np.testing.assert_array_equal(kept.pseudo_inverse(g), anew.pseudo_inverse(g))


def test_a_large_matrix_is_never_formed():
    """At most a few cells and vectors are in memory."""
    n, p = 30 * CELL, 50
    tracemalloc.start()
    subspace = RandomSubspace(n, p, kept_bytes=0)
    subspace.pseudo_inverse(subspace @ np.ones(p))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * n * p / 4


def test_distributions():
    normal, uniform = (matrix(RandomSubspace(N, 50, manifold=manifold)) for manifold in ("normal", "uniform"))
    entries = normal.size
    assert normal.mean() == pytest.approx(0, abs=5 / np.sqrt(entries))
    assert normal.var() == pytest.approx(1, abs=10 / np.sqrt(entries))
    assert np.abs(np.corrcoef(normal.T) - np.eye(50)).max() < 6 / np.sqrt(N)
    assert (uniform.min(), uniform.max()) == pytest.approx((0, 1), abs=1e-3)
    assert uniform.mean() == pytest.approx(0.5, abs=5 / np.sqrt(entries))


def test_seeds_and_cells_are_independent():
    one, other = (matrix(RandomSubspace(N, P, seed)) for seed in (0, 1))
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(N * P)
    assert abs(np.corrcoef(one[:CELL].ravel(), one[CELL : 2 * CELL].ravel())[0, 1]) < 5 / np.sqrt(CELL * P)


def test_orthonormal_columns_span_the_space_of_the_normal_ones():
    normal, orthonormal = (matrix(RandomSubspace(N, P, 2, manifold)) for manifold in ("normal", "orthonormal"))
    np.testing.assert_allclose(orthonormal.T @ orthonormal, np.eye(P), atol=1e-6)
    np.testing.assert_allclose(orthonormal @ (orthonormal.T @ normal), normal, atol=1e-5)


def test_a_subspace_that_is_the_whole_space():
    subspace = RandomSubspace(20, 20)
    x = RNG.normal(size=20)
    np.testing.assert_allclose(subspace @ subspace.pseudo_inverse(x), x, atol=1e-4)


@pytest.mark.parametrize("dimension", [0, -1, 21])
def test_impossible_dimensions(dimension):
    with pytest.raises(UserError, match=f"between 1 and 20 dimensions, not {dimension}"):
        RandomSubspace(20, dimension)


def test_an_unknown_manifold():
    with pytest.raises(UserError, match="no manifold 'sphere'"):
        RandomSubspace(20, 5, manifold="sphere")
