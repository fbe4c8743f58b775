"""Densities and traces beside explicit matrices, among them examples that other libraries publish."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.sparse.linalg import aslinearoperator
from test_objective import dense

from large_batch import datasets, layers, spectrum
from large_batch.backend import keras
from large_batch.errors import UserError
from large_batch.hessian import TOLERANCE, hessian_operator, lowest_eigenvalues
from large_batch.objective import Objective, flat_weights
from large_batch.spectrum import Density, block, hutchinson_by_part, hutchpp, spectral_density

HIDDEN, CLASSES, INPUTS = 4, 10, 64


@pytest.fixture(scope="module")
def network():
    """The Hessian of a tanh network on real digits as an operator, and explicitly: written out anew in float64."""
    data = datasets.load_data("digits", "unused")
    x, y = data.x_train.reshape(-1, INPUTS)[:500], data.y_train[:500]
    model = dense(keras.layers.Dense(HIDDEN, "tanh", name="hidden"), keras.layers.Dense(CLASSES, name="output"))
    objective = Objective(model, x, y, prepare=layers.pixels)
    w = np.random.default_rng(0).normal(0, 0.5, objective.size)
    shapes = (INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)
    pixels, variable = tf.constant(x / 255), tf.Variable(w)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            flat = tf.split(variable, [np.prod(shape) for shape in shapes])
            a, b, c, d = (tf.reshape(part, shape) for part, shape in zip(flat, shapes, strict=True))
            logits = tf.tanh(pixels @ a + b) @ c + d
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        gradient = inner.gradient(loss, variable)
    return hessian_operator(objective, w), outer.jacobian(gradient, variable).numpy(), layers.parts(model)


def hutchinson(operator, probes, seed=0):
    """Return the estimate of all parts as one."""
    return hutchinson_by_part(operator, {"": slice(None)}, probes, seed)[""]


def bells(eigenvalues, x, width):
    """Return the density that is estimated, from all eigenvalues."""
    nodes = [np.asarray(eigenvalues).tolist()]
    return Density(len(eigenvalues), nodes, [[1 / len(eigenvalues)] * len(eigenvalues)]).at(x, width)[0]


def within(found, errors, expected, deviations=3.0):
    """Say at which share of the places an estimate is right within so many of its standard errors."""
    return np.mean(np.abs(found - expected) <= deviations * errors + 1e-3 * np.max(expected))


def test_density_of_a_network_against_its_histogram(network):
    operator, matrix, _ = network
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] < -0.05 < 0.5 < eigenvalues[-1], "both signs, or nothing is tested"
    density = spectral_density(operator, probes=20, steps=60)
    low, high = density.range
    assert low == pytest.approx(eigenvalues[0], rel=1e-3)
    assert high == pytest.approx(eigenvalues[-1], rel=1e-3)
    edges = np.linspace(low, high, 41)[1:-1]  # at the ends, which are nodes, rounding would decide
    above, errors = density.above(edges)
    exact = np.array([(eigenvalues > edge).sum() for edge in edges])
    assert within(above, errors, exact) >= 0.95
    found, errors = density.at(edges)
    expected = bells(eigenvalues, edges, density.width)
    assert within(found, errors, expected) >= 0.95
    assert np.median(errors / found) < 0.3, "errors that would allow anything"
    wide = np.linspace(low - 0.5, high + 0.5, 4001)
    assert np.trapezoid(density.at(wide)[0], wide) == pytest.approx(1, abs=1e-3)


def test_traces_of_a_network_and_of_its_layers(network):
    operator, matrix, parts = network
    assert list(parts) == ["hidden", "output"]
    exact = np.trace(matrix)
    for estimate in (hutchinson(operator, 60), hutchpp(operator, 60)):
        assert abs(estimate.value - exact) < 3 * estimate.standard_error < 0.5 * exact
    assert hutchpp(operator, 60).standard_error < hutchinson(operator, 60).standard_error / 2
    by_layer = hutchinson_by_part(operator, parts, 60)
    assert sum(each.value for each in by_layer.values()) == pytest.approx(hutchinson(operator, 60).value)
    for name, part in parts.items():
        inner = matrix[part, part]
        assert abs(by_layer[name].value - np.trace(inner)) < 3 * by_layer[name].standard_error
        own = block(operator, part)
        assert own.shape == inner.shape
        v = np.random.default_rng(1).normal(size=len(inner))
        np.testing.assert_allclose(own @ v, inner @ v, atol=1e-4 * np.abs(matrix).max() * np.linalg.norm(v))
        estimate = hutchpp(own, 60)
        assert abs(estimate.value - np.trace(inner)) < 3 * estimate.standard_error + 1e-4


def test_lowest_eigenvalues_of_a_network(network):
    operator, matrix, parts = network
    for hessian, explicit in ((operator, matrix), (block(operator, parts["hidden"]), matrix[:260, :260])):
        expected, directions = np.linalg.eigh(explicit)
        values, vectors = lowest_eigenvalues(hessian, 3)
        np.testing.assert_allclose(values, expected[:3], atol=TOLERANCE * (expected[-1] - expected[0]))
        assert vectors.shape == (len(explicit), 3)
        if hessian is operator:
            assert abs(vectors[:, 0] @ directions[:, 0]) == pytest.approx(1, abs=0.01)


def test_three_outliers_before_a_bulk():
    """Figure 15 (a) of Papyan (2020), with its 128 steps and 10 vectors, an example of curvlinops' documentation. With
    600 rows instead of 2000 it takes a tenth of the time."""
    z = np.random.default_rng(0).standard_normal((600, 600))
    matrix = np.diag([5.0, 4.0, 3.0] + [0.0] * 597) + z @ z.T / 600
    eigenvalues = np.linalg.eigvalsh(matrix)
    density = spectral_density(aslinearoperator(matrix), probes=10, steps=128)
    for nodes in density.nodes:
        np.testing.assert_allclose(nodes[-3:], eigenvalues[-3:], rtol=1e-6)
    x = np.linspace(0.1, 3.5, 100)
    found, errors = density.at(x, width=0.1)
    assert np.median(errors / found) < 0.1
    assert within(found, errors, bells(eigenvalues, x, 0.1)) >= 0.95
    outliers, error = density.above(np.array([4.5]))
    assert abs(outliers[0] - 3) < 3 * error[0]


def test_trace_of_a_random_square():
    """PyHessian's tutorial: Hutchinson's trace of A A' with 20 vectors, whose variance is known."""
    a = np.random.default_rng(0).standard_normal((1000, 1000))
    matrix = a @ a.T
    estimate = hutchinson(aslinearoperator(matrix), 20)
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    assert abs(estimate.value - np.trace(matrix)) < 3 * np.sqrt(variance / 20) < 0.05 * np.trace(matrix)
    assert estimate.standard_error == pytest.approx(np.sqrt(variance / 20), rel=0.5)  # 3 deviations of itself


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_traces_of_power_laws(power):
    """Figure 2 of Meyer et al. (2021), an example of curvlinops' documentation: the faster the eigenvalues fall, the
    more Hutch++ is better than Hutchinson's estimate. (The trace does not depend on the eigenvectors' basis as long as
    it is a random one.)"""
    n, products = 200, 60
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    eigenvalues = np.arange(1, n + 1) ** -power
    operator = aslinearoperator((basis * eigenvalues) @ basis.T)
    runs = [(hutchinson(operator, products, seed), hutchpp(operator, products, seed)) for seed in range(20)]
    errors = np.abs([[estimate.value - eigenvalues.sum() for estimate in run] for run in runs])
    stated = np.array([[estimate.standard_error for estimate in run] for run in runs])
    assert np.mean(errors < 3 * stated) > 0.95
    plain, better = np.median(errors, axis=0)
    assert better < plain / (20 if power == 2 else 1)


def test_a_spectrum_of_few_values_is_found_exactly():
    """Lanczos iterations end once their vectors span all there is, and then nodes and weights are exact."""
    diagonal = np.repeat([-1.0, 0.0, 4.0], [10, 60, 30])
    density = spectral_density(aslinearoperator(np.diag(diagonal)), probes=1, steps=50)
    ((low, zero, high),) = density.nodes
    np.testing.assert_allclose([low, zero, high], [-1, 0, 4], atol=1e-6)
    np.testing.assert_allclose(density.weights, [[0.1, 0.6, 0.3]], atol=1e-6)
    assert np.isnan(density.above(np.zeros(1))[1]), "one vector has no scatter"
    assert [of(np.array([2.0]))[0][0] for of in (density.above, density.below)] == pytest.approx([30, 70])
    flat = spectral_density(aslinearoperator(np.zeros((30, 30))), probes=2, steps=5)
    assert flat.nodes == [[0.0], [0.0]]
    assert np.isfinite(flat.at(np.zeros(1))[0])


def test_without_room_for_the_vectors(monkeypatch):
    """Nodes may then come twice, but the distribution is the same."""
    eigenvalues = np.concatenate([np.linspace(0, 1, 480), np.linspace(20, 100, 20)])
    operator = aslinearoperator(np.diag(eigenvalues))
    kept = spectral_density(operator, probes=5, steps=80)
    monkeypatch.setattr(spectrum, "KEPT_BYTES", 0)
    other = spectral_density(operator, probes=5, steps=80)
    assert len({round(node, 3) for node in other.nodes[0]}) < len({round(node, 3) for node in kept.nodes[0]})
    x = np.linspace(-5, 105, 200)
    np.testing.assert_allclose(other.at(x)[0], kept.at(x)[0], atol=1e-3 * kept.at(x)[0].max())


def test_each_vector_is_its_own():
    """More vectors are the same ones and others."""
    root = np.random.default_rng(0).normal(size=(20, 20))
    matrix = root @ root.T
    few, many = (spectral_density(aslinearoperator(matrix), probes, 5, seed=3) for probes in (2, 4))
    assert many.nodes[:2] == few.nodes
    assert few.nodes != spectral_density(aslinearoperator(matrix), 2, 5, seed=4).nodes


def test_impossible_numbers():
    operator = aslinearoperator(np.eye(4))
    for attempt, message in (
        (lambda: spectral_density(operator, probes=0), "1 or more probes, not 0"),
        (lambda: spectral_density(operator, steps=0), "1 or more steps, not 0"),
        (lambda: hutchinson(operator, 0), "1 or more probes, not 0"),
        (lambda: hutchpp(operator, 2), "3 or more products, not 2"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
    assert hutchinson(operator, 1).standard_error is None
    assert hutchpp(operator, 30).value == pytest.approx(4), "no more columns than rows"


def nested():
    """A model with another one in it; only some layers are named."""
    inner = [keras.layers.Dense(2), keras.layers.Dense(2, name="mine_7")]
    inner = keras.Sequential([keras.Input((3,)), *inner], name="inner")
    return keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2), keras.layers.Dense(2)])


def test_parts_of_nested_models():
    for _ in range(2):  # the second one's layers have other names in Keras
        model = nested()
        found = layers.parts(model)
        assert [name.rpartition("/")[2] for name in found] == ["dense", "mine_7", "dense_1", "dense_2"]
        assert list(found.values()) == [slice(0, 8), slice(8, 14), slice(14, 20), slice(20, 26)]
        assert found[list(found)[-1]].stop == len(flat_weights(model))
