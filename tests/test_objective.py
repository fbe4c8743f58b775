import numpy as np
import pytest
from conftest import ROOT
from scipy.special import log_softmax, softmax

import network_zoo
from large_batch import datasets, layers, memory
from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.layers import BatchStatisticsNormalization, pixels
from large_batch.objective import Objective, flat_weights, read_weights, write_weights

RNG = np.random.default_rng(0)
FEW_ROUNDINGS = 1e-6  # of float32, each 6e-8 of a number; sums over samples and weights average most of them away


def dense(*layers, inputs=64):
    return keras.Sequential([keras.Input((inputs,)), *layers])


@pytest.fixture(scope="module")
def regression():
    """Softmax regression on the real digits: its loss, gradient and Hessian are known in closed form."""
    data = datasets.load_data("digits", "unused")
    x, y = data.x_train.reshape(-1, 64), data.y_train
    inputs = np.hstack([x / 255, np.ones((len(x), 1))])  # the bias is the weight of a constant input
    return dense(keras.layers.Dense(10)), x, y, RNG.normal(0, 0.3, 650), inputs


@pytest.fixture(scope="module")
def objective(regression):
    model, x, y, _, _ = regression
    return Objective(model, x, y, prepare=pixels)


def mean_loss(logits, y):
    return -log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()


def closed_form(w, inputs, y):
    logits = inputs @ w.reshape(65, 10)
    p = softmax(logits, axis=1)
    gradient = inputs.T @ (p - np.eye(10)[y]) / len(y)
    curvature = np.einsum("nc,cd->ncd", p, np.eye(10)) - np.einsum("nc,nd->ncd", p, p)
    pairs = np.einsum("ni,nj->nij", inputs, inputs).reshape(len(y), -1)
    hessian = (pairs.T @ curvature.reshape(len(y), -1) / len(y)).reshape(65, 65, 10, 10).transpose(0, 2, 1, 3)
    accuracy = 100 * (logits.argmax(axis=1) == y).mean()
    return mean_loss(logits, y), gradient.ravel(), hessian.reshape(650, 650), accuracy


def test_softmax_regression_in_closed_form(regression, objective):
    _, _, y, w, inputs = regression
    loss, gradient, hessian, accuracy = closed_form(w, inputs, y)
    evaluation = objective.evaluate(w)
    assert evaluation.loss == pytest.approx(loss, rel=FEW_ROUNDINGS)
    assert evaluation.accuracy == pytest.approx(accuracy)
    assert objective.value(w) == evaluation.loss
    value, slope = objective.value_and_gradient(w)
    assert value == pytest.approx(loss, rel=FEW_ROUNDINGS)
    assert slope.dtype == np.float64
    np.testing.assert_allclose(slope, gradient, atol=FEW_ROUNDINGS)
    for _ in range(3):
        v = RNG.normal(size=650)
        product = hessian @ v
        found = objective.hessian_vector_product(w, v)
        np.testing.assert_allclose(found, product, atol=10 * FEW_ROUNDINGS * np.abs(product).max())


@pytest.mark.parametrize("chunk", [1499, 700, 64])
def test_chunks_change_nothing_where_no_layer_sees_the_batch(regression, objective, chunk):
    model, x, y, w, _ = regression
    parts = Objective(model, x, y, chunk=chunk, prepare=pixels)
    sizes = [len(labels) for _, labels, _ in parts._chunks]
    assert sum(sizes) == 1500
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= chunk
    assert parts.value(w) == pytest.approx(objective.value(w), rel=FEW_ROUNDINGS)
    whole = objective.value_and_gradient(w)[1]
    np.testing.assert_allclose(parts.value_and_gradient(w)[1], whole, atol=FEW_ROUNDINGS)


def test_the_original_evaluates_in_chunks_of_5000(regression):
    data = RNG.integers(0, 256, (10_001, 64), np.uint8), RNG.integers(0, 10, 10_001)
    assert [len(y) for _, y, _ in Objective(regression[0], *data, prepare=pixels)._chunks] == [3334, 3334, 3333]


def loss_of_f1(w, x, y):
    """The loss of F1 by NumPy in float64, over one chunk."""
    h, at = x / 255, 0
    sizes = [784, *[512] * 5, 10]
    for i, (rows, columns) in enumerate(zip(sizes, sizes[1:], strict=False)):
        kernel, at = w[at : at + rows * columns].reshape(rows, columns), at + rows * columns
        bias, at = w[at : at + columns], at + columns
        h = h @ kernel + bias
        if i < 5:
            gamma, beta, at = w[at : at + columns], w[at + columns : at + 2 * columns], at + 2 * columns
            h = np.maximum(0, (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-6) * gamma + beta)
    assert at == len(w)
    return mean_loss(h, y)


def test_a_network_with_batch_statistics_against_numpy(digits):
    """The statistics are those of a chunk."""
    model = network_zoo.get("F1").build(seed=2)
    objective = Objective(model, digits.x_test, digits.y_test, chunk=100, prepare=pixels)
    w = flat_weights(model) + RNG.normal(0, 0.01, objective.size)
    chunks = [np.array_split(half, 3) for half in (digits.x_test, digits.y_test)]

    def expected(w):
        return np.mean([loss_of_f1(w, x, y) for x, y in zip(*chunks, strict=True)])  # all of 99 samples

    value, gradient = objective.value_and_gradient(w)
    assert value == pytest.approx(expected(w), rel=FEW_ROUNDINGS)
    assert objective.value(w) == pytest.approx(value, rel=FEW_ROUNDINGS)
    length = np.linalg.norm(gradient)
    step = 1e-6 * gradient / length  # so small that hardly any activation passes the kink of its ReLU
    assert (expected(w + step) - expected(w - step)) / 2e-6 == pytest.approx(length, rel=1e-3)
    assert objective.exact(w) is not None, "second derivatives are checked in float64"


def products_by_hand(loss, w, vectors, dtype=np.float64):
    """The Hessian at w of a loss written by hand, times each of the vectors."""

    @tf.function
    def product(w, v):
        with tf.GradientTape() as outer:
            outer.watch(w)
            with tf.GradientTape() as inner:
                inner.watch(w)
                value = loss(w)
            slope = tf.reduce_sum(inner.gradient(value, w) * v)
        return outer.gradient(slope, w)

    return np.array([product(tf.constant(w, dtype), tf.constant(v, dtype)) for v in vectors])


def test_curvature_through_batch_statistics_against_float64(color_digits):
    """Beside the same network written by hand: float64 resolves the curvature, float32 shows the rounding."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(4, 5, strides=4),
            BatchStatisticsNormalization(),
            keras.layers.Activation("tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(8),
            BatchStatisticsNormalization(),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(10),
        ]
    )
    x, y = color_digits.x_test[:150], color_digits.y_test[:150]
    objective = Objective(model, x, y, prepare=pixels)
    w = flat_weights(model)

    def normalized(h, gamma, beta):
        axes = list(range(len(h.shape) - 1))
        centred = h - tf.reduce_mean(h, axes)
        return tf.tanh(centred / tf.sqrt(tf.reduce_mean(centred**2, axes) + 1e-6) * gamma + beta)

    def loss(w):
        parts = tf.split(w, objective.sizes)
        k1, b1, g1, o1, k2, b2, g2, o2, k3, b3 = map(tf.reshape, parts, objective.shapes)
        h = normalized(tf.nn.conv2d(tf.constant(x / 255, w.dtype), k1, 4, "VALID") + b1, g1, o1)
        h = normalized(tf.reshape(h, (len(x), -1)) @ k2 + b2, g2, o2)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, h @ k3 + b3))

    vectors = RNG.normal(size=(3, objective.size))
    exact, rounded = (products_by_hand(loss, w, vectors, dtype) for dtype in (np.float64, np.float32))
    rounding = np.abs(rounded - exact).max()
    assert rounding < 1e-3 * np.abs(exact).max()
    products = [objective.hessian_vector_product(w, v) for v in vectors]
    np.testing.assert_allclose(products, exact, atol=10 * rounding)


def test_a_small_network_against_differences_and_an_explicit_hessian_in_float64():
    """A network of one smooth hidden layer, in three chunks, beside its loss written by hand."""
    data = datasets.load_data("digits", "unused")
    x, y = data.x_test.reshape(-1, 64)[:, 20:28], data.y_test
    objective = Objective(
        dense(keras.layers.Dense(5, "tanh"), keras.layers.Dense(10), inputs=8), x, y, chunk=100, prepare=pixels
    )
    w, units = RNG.normal(0, 0.5, 105), np.eye(105)

    def loss(w):
        hidden = tf.tanh(x / 255 @ tf.reshape(w[:40], (8, 5)) + w[40:45])
        logits = hidden @ tf.reshape(w[45:95], (5, 10)) + w[95:]
        return tf.reduce_mean(tf.reduce_logsumexp(logits, 1) - tf.gather(logits, y, batch_dims=1))

    differences = [(loss(w + 1e-6 * unit) - loss(w - 1e-6 * unit)) / 2e-6 for unit in units]  # exact to 1e-9
    value, gradient = objective.value_and_gradient(w)
    assert value == pytest.approx(float(loss(w)), rel=FEW_ROUNDINGS)
    np.testing.assert_allclose(gradient, differences, atol=FEW_ROUNDINGS)
    hessian = products_by_hand(loss, w, units)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    products = [objective.hessian_vector_product(w, unit) for unit in units]
    np.testing.assert_allclose(products, hessian, atol=FEW_ROUNDINGS)


def test_softmax_outputs_give_the_loss_of_their_logits(regression, objective):
    _, x, y, w, _ = regression
    found = Objective(dense(keras.layers.Dense(10, "softmax")), x, y, outputs="softmax", prepare=pixels)
    assert found.value(w) == pytest.approx(objective.value(w), rel=FEW_ROUNDINGS)
    gradients = [each.value_and_gradient(w)[1] for each in (found, objective)]
    np.testing.assert_allclose(*gradients, atol=FEW_ROUNDINGS)
    v = RNG.normal(size=650)
    one, other = (each.hessian_vector_product(w, v) for each in (found, objective))
    np.testing.assert_allclose(one, other, atol=10 * FEW_ROUNDINGS * np.abs(other).max())
    far, slope = found.value_and_gradient(1e4 * w)  # probabilities underflow to 0, where the gradient ends
    assert np.isfinite(far)
    assert np.isfinite(slope).all()


def test_what_does_not_fit_together(regression, objective):
    model, x, y, w, _ = regression
    softmax, half = (dense(keras.layers.Dense(10, **how)) for how in ({"activation": "softmax"}, {"dtype": "bfloat16"}))
    for arguments, settings, words in (
        ((softmax, x, y), {}, "are probabilities that add up to 1; state outputs='softmax'"),
        ((model, x, y), {"outputs": "softmax"}, "are not probabilities that add up to 1; state outputs='logits'"),
        ((model, x, y), {"outputs": "sigmoid"}, "logits or softmax, not 'sigmoid'"),
        ((model, x, y + 1), {}, "labels run from 1 to 10"),
        ((model, x, 0.9 * np.eye(10)[y]), {}, r"one class number \(0, 1, 2 and so on\) for each of the samples"),
        ((model, x[:-1], y), {}, r"one row a sample, as many in each; they have the shapes \(1499, 64\), \(1500,\)"),
        ((model, x[:0], y[:0]), {}, "one row a sample"),
        ((model, x, y, y[:, None]), {}, r"sample weights must have the shape \(1500,\)"),
        ((model, x, y + 0.5), {}, "labels must be one class number"),
        ((model, x, y.astype(str)), {}, "labels must be one class number"),
        ((model, x[:, :60], y), {}, r"does not take samples of the shape \(60,\)"),
        ((half, x, y), {}, "must compute in float32 or float64"),
    ):
        with pytest.raises(UserError, match=words):
            Objective(*arguments, **settings, prepare=pixels)
    with pytest.raises(UserError, match="650 trainable weights, the vector given has 649"):
        objective.value(w[:-1])


def test_a_chunk_too_large_for_memory_has_the_same_gradient(color_digits, monkeypatch):
    model, data = network_zoo.get("C1").build("paper"), (color_digits.x_test[:60], color_digits.y_test[:60])
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    plain = Objective(model, *data, prepare=pixels)
    assert len(plain._chunks) == 1, "smaller batches have other statistics"
    monkeypatch.setattr(layers, "RECOMPUTE_BYTES", 0)
    recomputing = Objective(model, *data, prepare=pixels)
    assert (plain._recompute, recomputing._recompute) == (False, True)
    w = flat_weights(model) + RNG.normal(0, 1e-3, plain.size)
    (loss, gradient), (same_loss, same_gradient) = (each.value_and_gradient(w) for each in (plain, recomputing))
    assert loss == same_loss
    np.testing.assert_array_equal(gradient, same_gradient)


def test_the_clipped_loss_is_keras_1s():
    # Logits (x, 0): right by far, wrong by far, and undecided.
    x, y = np.array([[100.0], [100.0], [0.0]], np.float32), np.array([0, 1, 0])
    evaluation = Objective(dense(keras.layers.Dense(2), inputs=1), x, y).evaluate(np.array([1.0, 0.0, 0.0, 0.0]))
    assert evaluation.loss == pytest.approx((0 + 100 + np.log(2)) / 3)
    assert evaluation.clipped_loss == pytest.approx((1e-7 - np.log(1e-7) + np.log(2)) / 3)


def test_the_loss_is_finite_however_far_the_weights(regression, objective):
    assert np.isfinite(objective.value(1e6 * regression[3]))


def test_variables_that_are_not_trained_have_the_values_of_the_state_and_the_model_is_left_alone(regression):
    """Ordinary batch normalisation works in inference mode, with the moving statistics that the objective took."""
    _, x, y, _, _ = regression
    model = dense(keras.layers.BatchNormalization(), keras.layers.Dense(10))

    def move():
        statistics = RNG.normal(size=64).astype(np.float32), RNG.uniform(1, 2, 64).astype(np.float32)
        for variable, value in zip(model.layers[0].non_trainable_variables, statistics, strict=True):
            variable.assign(value)
        return statistics

    def expected(mean, variance):
        normal = (x / 255 - mean) / np.sqrt(variance + 1e-3) * w[:64] + w[64:128]
        return pytest.approx(mean_loss(normal @ w[128:768].reshape(64, 10) + w[768:], y), rel=FEW_ROUNDINGS)

    first, w = move(), flat_weights(model) + 0.1
    objective = Objective(model, x, y, prepare=pixels)
    loss, gradient = objective.value_and_gradient(w)
    assert loss == expected(*first)
    second = move()
    before = [variable.numpy() for variable in model.variables]
    assert objective.value_and_gradient(w)[0] == loss
    objective.take_state(model)
    for found, taken in zip(objective.state, second, strict=True):
        np.testing.assert_array_equal(found, taken)
    assert objective.value_and_gradient(w)[0] == expected(*second)
    assert objective.value(w) == expected(*second)
    objective.state = [*first]
    np.testing.assert_array_equal(objective.value_and_gradient(w)[1], gradient)
    for variable, kept in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, kept)


def test_the_same_weights_give_the_same_bits(mnist):
    model = network_zoo.get("F1").build()
    objective = Objective(model, mnist.x_test[:6000], mnist.y_test[:6000], prepare=pixels)  # two chunks
    w = flat_weights(model)
    assert objective.evaluate(w) == objective.evaluate(w)
    np.testing.assert_array_equal(objective.value_and_gradient(w)[1], objective.value_and_gradient(w)[1])


@pytest.fixture(scope="module")
def deep_networks():
    """C2 in both definitions, from two starting points."""
    return [network_zoo.get("C2").build(definition, seed=i) for i, definition in enumerate(("paper", "repository"))]


def test_weights_of_one_definition_of_a_deep_network_fit_the_other(deep_networks, tmp_path):
    one, other = deep_networks
    write_weights(one, tmp_path / "c2.weights.h5")
    np.testing.assert_array_equal(read_weights(other, tmp_path / "c2.weights.h5").weights, flat_weights(one))
    one.trainable_variables[-1].assign(np.arange(10))
    write_weights(other, tmp_path / "c2.weights.h5")
    assert flat_weights(one)[-1] == 9
    np.testing.assert_array_equal(read_weights(one, tmp_path / "c2.weights.h5").weights, flat_weights(other))


def test_weights_file_round_trip(tmp_path):
    model, other = (network_zoo.get("F1").build(seed=seed) for seed in (1, 2))
    write_weights(model, tmp_path / "new" / "f1.weights.h5")
    np.testing.assert_array_equal(read_weights(other, tmp_path / "new" / "f1.weights.h5").weights, flat_weights(model))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f1.weights.h5"]


def test_unusable_weights_files(deep_networks, tmp_path):
    model = network_zoo.get("C1").build()
    path = tmp_path / "x.weights.h5"
    with pytest.raises(UserError, match=r"no weights file .*x\.weights\.h5"):
        read_weights(model, path)
    for other in (deep_networks[0], network_zoo.get("F1").build(), network_zoo.get("C3").build()):
        write_weights(other, path)
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
    (whole := tmp_path / "x.keras").touch()
    with pytest.raises(UserError, match="holds a whole model; keras.models.load_model reads it"):
        read_weights(model, whole)
    adapted = dense(keras.layers.Dense(10))
    adapted.layers[0].enable_lora(2)
    write_weights(adapted, path)
    with pytest.raises(UserError, match=r"Keras merges LoRA's factors .* has another point than the model had"):
        read_weights(adapted, path)


@pytest.mark.parametrize(
    ("said", "words"), [("loss", "but Keras' evaluate says"), ("x", "evaluate says nothing of a loss, only of x")]
)
def test_another_value_than_that_of_evaluate_is_refused(said, words):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(10)

        def call(self, x):
            return self.dense(x)

        def test_step(self, data):
            return {said: tf.constant(9.0)}  # Keras' own metrics of a loss have seen nothing

    model, x, y = Own(), RNG.normal(size=(20, 5)), np.arange(20) % 10
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(UserError, match=words):
        Objective(model, x, y).check()
