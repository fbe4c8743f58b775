import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from scipy.special import log_softmax, softmax

import data_zoo
import network_zoo
import objective
from errors import UserError
from objective import Objective, flat_weights, read_weights, write_weights

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def regression():
    """Softmax regression on the real digits: its loss, gradient and Hessian are known in closed form."""
    data = data_zoo.load("digits", "unused")
    x, y = data.x_train.reshape(-1, 64), data.y_train
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    w = RNG.normal(0, 0.3, 650)
    inputs = np.hstack([x / 255, np.ones((len(x), 1))])  # the bias is the weight of a constant input
    return model, x, y, w, inputs


def closed_form(w, inputs, y):
    weights = w.reshape(65, 10)
    logits = inputs @ weights
    p = softmax(logits, axis=1)
    loss = -log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()
    gradient = inputs.T @ (p - np.eye(10)[y]) / len(y)
    curvature = np.einsum("nc,cd->ncd", p, np.eye(10)) - np.einsum("nc,nd->ncd", p, p)
    hessian = np.einsum("ni,nj,ncd->icjd", inputs, inputs, curvature, optimize=True) / len(y)
    accuracy = 100 * (logits.argmax(axis=1) == y).mean()
    return loss, gradient.ravel(), hessian.reshape(650, 650), accuracy


def test_softmax_regression_in_closed_form(regression):
    model, x, y, w, inputs = regression
    objective = Objective(model, x, y)
    loss, gradient, hessian, accuracy = closed_form(w, inputs, y)
    evaluation = objective.evaluate(w)
    assert evaluation.loss == pytest.approx(loss, rel=1e-6)
    assert evaluation.accuracy == pytest.approx(accuracy)
    assert objective.value(w) == evaluation.loss
    value, slope = objective.value_and_gradient(w)
    assert value == pytest.approx(loss, rel=1e-6)
    assert slope.dtype == np.float64
    np.testing.assert_allclose(slope, gradient, atol=1e-6)
    for _ in range(3):
        v = RNG.normal(size=650)
        np.testing.assert_allclose(objective.hessian_vector_product(w, v), hessian @ v, atol=2e-5)


@pytest.mark.parametrize("chunk", [1500, 1499, 700, 64])
def test_chunks_change_nothing_where_no_layer_sees_the_batch(regression, chunk):
    model, x, y, w, _ = regression
    whole, parts = Objective(model, x, y, chunk=1500), Objective(model, x, y, chunk=chunk)
    sizes = [len(labels) for _, labels in parts._chunks]
    assert sum(sizes) == 1500
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= chunk
    assert parts.value(w) == pytest.approx(whole.value(w), rel=1e-7)
    np.testing.assert_allclose(parts.value_and_gradient(w)[1], whole.value_and_gradient(w)[1], rtol=1e-6, atol=1e-6)


def test_the_original_evaluates_in_chunks_of_5000():
    data = RNG.integers(0, 256, (10_001, 64), np.uint8), RNG.integers(0, 10, 10_001)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    assert [len(y) for _, y in Objective(model, *data)._chunks] == [3334, 3334, 3333]


def test_a_network_with_batch_statistics_against_numpy(digits):
    model = network_zoo.get("F1").build(seed=2)
    objective = Objective(model, digits.x_test, digits.y_test)
    w = flat_weights(model) + RNG.normal(0, 0.01, objective.size)
    h, at = digits.x_test / 255, 0
    sizes = [784, *[512] * 5, 10]
    for i, (rows, columns) in enumerate(zip(sizes, sizes[1:], strict=False)):
        kernel, at = w[at : at + rows * columns].reshape(rows, columns), at + rows * columns
        bias, at = w[at : at + columns], at + columns
        h = h @ kernel + bias
        if i < 5:
            gamma, beta, at = w[at : at + columns], w[at + columns : at + 2 * columns], at + 2 * columns
            h = np.maximum(0, (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-6) * gamma + beta)
    assert at == objective.size == len(w)
    expected = -log_softmax(h, axis=1)[np.arange(len(h)), digits.y_test].mean()
    assert objective.value(w) == pytest.approx(expected, rel=1e-4)


def test_gradient_of_a_real_network_against_differences(digits):
    model = network_zoo.get("F1").build()
    objective = Objective(model, digits.x_train, digits.y_train, chunk=500)
    w = flat_weights(model)
    _, gradient = objective.value_and_gradient(w)
    v = gradient / np.linalg.norm(gradient)
    difference = (objective.value(w + 1e-3 * v) - objective.value(w - 1e-3 * v)) / 2e-3
    assert gradient @ v == pytest.approx(difference, rel=1e-3)


def test_curvature_through_batch_statistics_against_float64():
    """Beside the same network written by hand, whose float64 resolves the curvature to far below float32's rounding."""
    keras.utils.set_random_seed(0)
    data = data_zoo.load("digits", "unused").fit((32, 32, 3))
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(4, 5, strides=4),
            network_zoo.BatchStatisticsNormalization(),
            layers.Activation("tanh"),
            layers.Flatten(),
            layers.Dense(8),
            network_zoo.BatchStatisticsNormalization(),
            layers.Activation("tanh"),
            layers.Dense(10),
        ]
    )
    x, y = data.x_test[:150], data.y_test[:150]
    objective = Objective(model, x, y)
    w = flat_weights(model)

    def normalized(h, gamma, beta):
        axes = list(range(len(h.shape) - 1))
        centred = h - tf.reduce_mean(h, axes)
        return tf.tanh(centred / tf.sqrt(tf.reduce_mean(centred**2, axes) + 1e-6) * gamma + beta)

    def loss(w):
        parts = tf.split(w, objective.sizes)
        k1, b1, g1, o1, k2, b2, g2, o2, k3, b3 = map(tf.reshape, parts, objective.shapes)
        h = normalized(tf.nn.conv2d(tf.constant(x / 255), k1, 4, "VALID") + b1, g1, o1)
        h = normalized(tf.reshape(h, (len(x), -1)) @ k2 + b2, g2, o2)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, h @ k3 + b3))

    for _ in range(3):
        v, point = tf.constant(RNG.normal(size=objective.size)), tf.constant(w)
        with tf.GradientTape() as outer:
            outer.watch(point)
            with tf.GradientTape() as inner:
                inner.watch(point)
                value = loss(point)
            slope = tf.reduce_sum(inner.gradient(value, point) * v)
        exact = outer.gradient(slope, point).numpy()
        product = objective.hessian_vector_product(w, v.numpy())
        np.testing.assert_allclose(product, exact, atol=1e-4 * np.abs(exact).max())


@pytest.fixture(scope="module")
def small_network():
    """A network of one smooth hidden layer, its objective, and its loss written by hand in float64."""
    data = data_zoo.load("digits", "unused")
    x, y = data.x_test.reshape(-1, 64)[:, 20:28], data.y_test
    layers = [keras.Input((8,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(10)]
    objective = Objective(keras.Sequential(layers), x, y, chunk=100)
    inputs = x / 255

    def loss(w):
        hidden = tf.tanh(inputs @ tf.reshape(w[:40], (8, 5)) + w[40:45])
        logits = hidden @ tf.reshape(w[45:95], (5, 10)) + w[95:]
        return tf.reduce_mean(tf.reduce_logsumexp(logits, 1) - tf.gather(logits, y, batch_dims=1))

    return objective, loss, RNG.normal(0, 0.5, 105)


def test_gradient_of_a_small_network_against_differences_in_float64(small_network):
    objective, loss, w = small_network
    steps = 1e-6 * np.eye(len(w))
    differences = [(loss(w + step) - loss(w - step)) / 2e-6 for step in steps]
    value, gradient = objective.value_and_gradient(w)
    assert value == pytest.approx(float(loss(w)), rel=1e-6)
    np.testing.assert_allclose(gradient, differences, atol=1e-6)


def test_hessian_vector_products_of_a_small_network_against_its_explicit_hessian(small_network):
    objective, loss, w = small_network
    point = tf.constant(w)
    with tf.GradientTape() as outer:
        outer.watch(point)
        with tf.GradientTape() as inner:
            inner.watch(point)
            value = loss(point)
        gradient = inner.gradient(value, point)
    hessian = outer.jacobian(gradient, point).numpy()
    assert abs(hessian - hessian.T).max() < 1e-12
    products = [objective.hessian_vector_product(w, unit) for unit in np.eye(len(w))]
    np.testing.assert_allclose(products, hessian, atol=2e-6)


def test_softmax_outputs_give_the_loss_of_their_logits(regression):
    logits, x, y, w, _ = regression
    probabilities = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
    expected, found = Objective(logits, x, y), Objective(probabilities, x, y, outputs="softmax")
    assert found.value(w) == pytest.approx(expected.value(w), rel=1e-6)
    np.testing.assert_allclose(found.value_and_gradient(w)[1], expected.value_and_gradient(w)[1], atol=1e-6)
    v = RNG.normal(size=650)
    products = (each.hessian_vector_product(w, v) for each in (found, expected))
    np.testing.assert_allclose(*products, atol=1e-5)
    far, slope = found.value_and_gradient(1e4 * w)  # probabilities underflow to 0, where the gradient ends
    assert np.isfinite(far)
    assert np.isfinite(slope).all()


def test_what_does_not_fit_together(regression):
    model, x, y, _, _ = regression
    softmax = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
    half = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, dtype="mixed_bfloat16")])
    for arguments, settings, words in (
        ((softmax, x, y), {}, "are probabilities that add up to 1; state outputs='softmax'"),
        ((model, x, y), {"outputs": "softmax"}, "are not probabilities that add up to 1; state outputs='logits'"),
        ((model, x, y), {"outputs": "sigmoid"}, "logits or softmax, not 'sigmoid'"),
        ((model, x, y + 1), {}, "labels run from 1 to 10"),
        ((model, x, np.eye(10)[y]), {}, r"one class number for each of the 1,500 samples"),
        ((model, x[:-1], y), {}, r"one class number for each of the 1,499 samples"),
        ((model, x[:0], y[:0]), {}, "one class number"),
        ((model, x, y + 0.5), {}, "labels must be class numbers"),
        ((model, x, y.astype(str)), {}, "labels must be class numbers"),
        ((model, x[:, :60], y), {}, r"does not take samples of the shape \(60,\)"),
        ((half, x, y), {}, "must compute in float32"),
    ):
        with pytest.raises(UserError, match=words):
            Objective(*arguments, **settings)


def test_a_chunk_too_large_for_memory_has_the_same_gradient(monkeypatch):
    data = data_zoo.load("digits", "unused").fit((32, 32, 3))
    model = network_zoo.get("C1").build()
    plain = Objective(model, data.x_test[:60], data.y_test[:60])
    monkeypatch.setattr(objective, "RECOMPUTE_BYTES", 0)
    recomputing = Objective(model, data.x_test[:60], data.y_test[:60])
    assert (plain._recompute, recomputing._recompute) == (False, True)
    w = flat_weights(model) + RNG.normal(0, 1e-3, plain.size)
    (loss, gradient), (same_loss, same_gradient) = (each.value_and_gradient(w) for each in (plain, recomputing))
    assert loss == same_loss
    np.testing.assert_array_equal(gradient, same_gradient)


def test_layers_before_the_first_kernel_are_recomputed_too(regression, monkeypatch):
    _, x, y, _, _ = regression
    layers = [keras.layers.Rescaling(3.0), network_zoo.BatchStatisticsNormalization(), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    plain = Objective(model, x, y)
    monkeypatch.setattr(objective, "RECOMPUTE_BYTES", 0)
    recomputing = Objective(model, x, y)
    assert recomputing._recompute
    w = RNG.normal(size=plain.size)
    (loss, gradient), (same_loss, same_gradient) = (each.value_and_gradient(w) for each in (plain, recomputing))
    assert loss == pytest.approx(same_loss, rel=1e-6)  # the graph optimiser merges the two scalings
    np.testing.assert_allclose(gradient, same_gradient, atol=1e-5)


def test_the_clipped_loss_is_keras_1s():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    # Logits (x, 0): right by far, wrong by far, and undecided.
    x, y = np.array([[100.0], [100.0], [0.0]], np.float32), np.array([0, 1, 0])
    objective = Objective(model, x, y)
    evaluation = objective.evaluate(np.array([1.0, 0.0, 0.0, 0.0]))
    assert evaluation.loss == pytest.approx((0 + 100 + np.log(2)) / 3)
    assert evaluation.clipped_loss == pytest.approx((1e-7 - np.log(1e-7) + np.log(2)) / 3)


def test_the_loss_is_finite_however_far_the_weights(regression):
    model, x, y, w, _ = regression
    assert np.isfinite(Objective(model, x, y).value(1e6 * w))


def test_ordinary_batch_normalization_is_in_inference_mode_and_the_model_is_left_alone(regression):
    _, x, y, _, _ = regression
    model = keras.Sequential([keras.Input((64,)), keras.layers.BatchNormalization(), keras.layers.Dense(10)])
    moving_mean, moving_variance = model.layers[0].non_trainable_variables
    moving_mean.assign(RNG.normal(size=64))
    moving_variance.assign(RNG.uniform(1, 2, 64))
    before = [variable.numpy() for variable in model.variables]
    mean, variance = moving_mean.numpy(), moving_variance.numpy()
    w = flat_weights(model) + 0.1
    objective = Objective(model, x, y)
    loss = objective.value_and_gradient(w)[0]
    for variable, kept in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, kept)
    normal = (x / 255 - mean) / np.sqrt(variance + 1e-3) * w[:64] + w[64:128]
    logits = normal @ w[128:768].reshape(64, 10) + w[768:]
    assert loss == pytest.approx(-log_softmax(logits, axis=1)[np.arange(len(y)), y].mean(), rel=1e-5)


def test_the_same_weights_give_the_same_bits(mnist):
    model = network_zoo.get("F1").build()
    objective = Objective(model, mnist.x_test, mnist.y_test)
    w = flat_weights(model)
    assert objective.evaluate(w) == objective.evaluate(w)
    np.testing.assert_array_equal(objective.value_and_gradient(w)[1], objective.value_and_gradient(w)[1])


def test_weights_of_one_definition_of_a_deep_network_fit_the_other(tmp_path):
    path = tmp_path / "c2.weights.h5"
    for one, other in (("paper", "repository"), ("repository", "paper")):
        model = network_zoo.get("C2").build(one, seed=1)
        write_weights(model, path)
        np.testing.assert_array_equal(read_weights(network_zoo.get("C2").build(other), path), flat_weights(model))


def test_a_vector_of_another_length(regression):
    model, x, y, w, _ = regression
    with pytest.raises(UserError, match="650 trainable weights, the vector given has 649"):
        Objective(model, x, y).value(w[:-1])


def test_weights_file_round_trip(tmp_path):
    model, other = (network_zoo.get("F1").build(seed=seed) for seed in (1, 2))
    write_weights(model, tmp_path / "new" / "f1.weights.h5")
    np.testing.assert_array_equal(read_weights(other, tmp_path / "new" / "f1.weights.h5"), flat_weights(model))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f1.weights.h5"]


def test_unusable_weights_files(tmp_path):
    model = network_zoo.get("C1").build()
    path = tmp_path / "x.weights.h5"
    with pytest.raises(UserError, match=r"no weights file .*x\.weights\.h5"):
        read_weights(model, path)
    for network in ("F1", "C3", "C2"):
        write_weights(network_zoo.get(network).build(), path)
        with pytest.raises(UserError, match="does not hold the weights of this C1"):
            read_weights(model, path)
    with pytest.raises(UserError, match=r"not named as Keras names weights, \*\.weights\.h5"):
        read_weights(model, ROOT / "LICENSE")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="damaged"):
        read_weights(model, path)
    path.write_bytes((ROOT / "LICENSE").read_bytes())
    with pytest.raises(UserError, match="damaged"):
        read_weights(model, path)
    model.trainable_variables[3].assign(np.full(64, np.nan))
    write_weights(model, path)
    with pytest.raises(UserError, match="not finite"):
        read_weights(model, path)
