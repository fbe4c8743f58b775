"""Models that are not ours, beside Keras' own evaluate and beside derivatives by differences in float64."""

import re

import numpy as np
import pytest
from conftest import ROOT, recipe, run_python, train
from sklearn.datasets import load_digits

import network_zoo
from large_batch import memory, surface
from large_batch import objective as objectives
from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.layers import pixels
from large_batch.minimizers import Minimizers
from large_batch.models import point_of
from large_batch.networks import Network
from large_batch.objective import Objective, Point, flat_weights, read_weights, write_weights
from large_batch.places import state_between
from large_batch.sharpness_metric import MEASURES, curvature, sharpness
from large_batch.subspace import RandomSubspace

RNG = np.random.default_rng(0)
X, Y = load_digits(return_X_y=True)
X, Y = X[:400].astype(np.float32), Y[:400]
ONE_HOT = np.eye(10)[Y]
L = keras.layers


def sequential(*layers, shape=(64,)):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), *layers])


def scaled(*layers):
    return sequential(L.Rescaling(1 / 16), *layers)


def raw_digits():
    """As issued: pixels as they are, scaled by the model itself."""
    return scaled(L.Dense(10, "softmax")), X.astype(np.uint8), Y, "sparse_categorical_crossentropy"


def ten_sigmoids():
    return scaled(L.Dense(10, "sigmoid")), X, ONE_HOT, "binary_crossentropy"


def one_sigmoid():
    return scaled(L.Dense(1, "sigmoid")), X, (Y > 4).astype(int), keras.losses.BinaryCrossentropy()


def one_logit_and_a_column_of_labels():
    return scaled(L.Dense(1)), X, (Y > 4).astype(int)[:, None], keras.losses.BinaryCrossentropy(from_logits=True)


def label_smoothing():
    return scaled(L.Dense(10, "softmax")), X, ONE_HOT, keras.losses.CategoricalCrossentropy(label_smoothing=0.1)


def regression():
    return scaled(L.Dense(8, "gelu"), L.Dense(1)), X, Y.astype(float), "mse"


def float64():
    keras.utils.set_random_seed(0)
    layers = [L.Dense(6, "tanh", dtype="float64"), L.Dense(10, dtype="float64")]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return keras.Sequential([keras.Input((64,), dtype="float64"), *layers]), X / 16.0, Y, loss


def regularized():
    settings = {"kernel_regularizer": keras.regularizers.L2(0.01), "activity_regularizer": "l2"}
    return scaled(L.Dense(8, "tanh", **settings), L.Dense(10, "softmax")), X, Y, "sparse_categorical_crossentropy"


def two_inputs_and_two_outputs():
    keras.utils.set_random_seed(0)
    image, row = keras.Input((64,), name="image"), keras.Input((8,), name="row")
    joined = L.Concatenate()([L.Dense(6, "relu")(image), L.Dense(4, "relu")(row)])
    outputs = {"digit": L.Dense(10, name="digit")(joined), "ink": L.Dense(1, name="ink")(joined)}
    model = keras.Model({"image": image, "row": row}, outputs)
    loss = {"digit": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "ink": "mae"}
    x = {"image": X / 16, "row": X[:, 24:32] / 16}
    return model, x, {"digit": Y, "ink": X.mean(axis=1)}, loss


def a_list_of_inputs():
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((32,)), keras.Input((32,))]
    model = keras.Model(inputs, L.Dense(10, "softmax")(L.Add()([L.Dense(9, "elu")(each) for each in inputs])))
    return model, [X[:, :32] / 16, X[:, 32:] / 16], Y, "sparse_categorical_crossentropy"


@keras.saving.register_keras_serializable("tests")
class Plain(keras.Model):
    """A model of a class of its own, whose call knows of no `training`."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.hidden, self.out = L.Dense(7, "tanh"), L.Dense(10, "softmax")

    def call(self, x):
        return self.out(self.hidden(x / 16))


def without_training():
    keras.utils.set_random_seed(0)
    return Plain(), X, Y, "sparse_categorical_crossentropy"


def tokens():
    """Token ids of type uint8 in sequences with padding, which is masked."""
    layers = [L.Embedding(17, 4, mask_zero=True), L.LSTM(5), L.Dense(10, "softmax")]
    return sequential(*layers, shape=(16,)), X[:, 16:32].astype(np.uint8), Y, "sparse_categorical_crossentropy"


def integers_and_strings():
    lookup = L.StringLookup(vocabulary=[str(i) for i in range(17)])
    layers = [lookup, L.Embedding(18, 3), L.Flatten(), L.Dense(10, "softmax")]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,), dtype="string"), *layers])
    return model, X[:, 8:16].astype(int).astype(str), Y, "sparse_categorical_crossentropy"


CASES = [
    *(raw_digits, ten_sigmoids, one_sigmoid, one_logit_and_a_column_of_labels, label_smoothing, regression, float64),
    *(regularized, two_inputs_and_two_outputs, a_list_of_inputs, without_training, tokens, integers_and_strings),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_value_is_what_keras_evaluate_says(case, weighted):
    """Also in chunks, with the accuracy where there is one, and its gradient is that of differences in float64."""
    model, x, y, loss = case()
    weights = RNG.uniform(0, 2, len(Y)) if weighted else None
    if weighted and isinstance(y, dict):
        weights = dict.fromkeys(y, weights)
    objective = Objective(model, x, y, weights, loss=loss, chunk=150)
    w = flat_weights(model)
    found = objective.evaluate(w)
    assert not getattr(model, "compiled", False), "it stays as it was"
    model.compile(loss=loss, metrics=["accuracy"] if case in (raw_digits, one_sigmoid, tokens) else [])
    x = tf.constant(x) if case is integers_and_strings else x  # NumPy's strings are none to Keras
    expected = model.evaluate(x, y, sample_weight=weights, batch_size=len(Y), verbose=0, return_dict=True)
    if case is not regularized:  # Keras takes the mean of an activity's penalty over a batch
        assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    if "accuracy" in expected:
        assert found.accuracy == pytest.approx(100 * expected["accuracy"], rel=1e-5)
    assert np.isnan(found.accuracy) == (case in (regression, two_inputs_and_two_outputs))
    assert Objective(model, x, y, weights).value(w) == pytest.approx(objective.value(w), rel=1e-6), "as compiled"
    value, of_keras = objective.check()
    assert (value, of_keras) == pytest.approx((found.loss, found.loss), rel=1e-5)
    exact = objective.exact(w)
    direction = RNG.normal(size=len(w))
    step = 1e-6
    rise = (exact.value(w + step * direction) - exact.value(w - step * direction)) / (2 * step)
    assert exact.value_and_gradient(w)[1] @ direction == pytest.approx(rise, rel=1e-4)


def test_a_dataset_is_read_into_memory():
    model, x, y, loss = label_smoothing()
    weights = RNG.uniform(0, 2, len(Y))
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(64)
    w = flat_weights(model)
    expected = Objective(model, x, y, weights, loss=loss).value(w)
    assert Objective(model, dataset, loss=loss).value(w) == pytest.approx(expected, rel=1e-6)
    for data, given, words in (
        (dataset.repeat(), (), "has no end"),
        (dataset, (y,), "give it alone"),
        (dataset.take(0), (), "one row a sample"),
        (dataset.unbatch(), (), "must have batches|one row a sample"),
    ):
        with pytest.raises(UserError, match=words):
            Objective(model, data, *given, loss=loss)


@pytest.mark.parametrize("labels", [Y, Y[:, None], ONE_HOT, Y.astype(float)])
def test_labels_of_stated_outputs(labels):
    model = scaled(L.Dense(10))
    w = flat_weights(model)
    assert Objective(model, X, labels).value(w) == Objective(model, X, Y).value(w)


def test_reductions():
    """Those that cannot be put together of chunks are taken of all samples at once."""
    model, x, y, _ = label_smoothing()
    weights, w = RNG.uniform(0, 2, len(Y)), flat_weights(model)
    for reduction in ("sum", "mean_with_sample_weight", "mean"):
        loss = keras.losses.CategoricalCrossentropy(reduction=reduction)
        model.compile(loss=loss)
        expected = model.evaluate(x, y, sample_weight=weights, batch_size=len(Y), verbose=0)
        objective = Objective(model, x, y, weights, chunk=100)
        assert objective.value(w) == pytest.approx(expected, rel=1e-5)
        assert len(objective._chunks) == (4 if reduction == "mean" else 1)
    with pytest.raises(UserError, match="must be one number"):
        Objective(model, x, y, loss=keras.losses.CategoricalCrossentropy(reduction="none"))
    # Neither are these the mean over samples, which their reduction does not tell
    masking = sequential(L.Embedding(17, 4, mask_zero=True), L.Dense(17, "softmax"), shape=(16,))
    tokens, ignoring = X[:, 16:32].astype(int), keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    for case in (
        (model, X, ONE_HOT, keras.losses.Dice()),
        (model, X, np.where(Y < 4, -1, Y), ignoring),
        (masking, tokens, tokens, "sparse_categorical_crossentropy"),
    ):
        network, x, y, loss = case
        network.compile(loss=loss, metrics=["accuracy"])
        expected = network.evaluate(x, y, batch_size=len(Y), verbose=0)
        found = Objective(network, x, y, chunk=100).evaluate(flat_weights(network))
        assert found.loss == pytest.approx(expected[0], rel=1e-5)
        assert np.isnan(found.accuracy) or found.accuracy == pytest.approx(100 * expected[1], rel=1e-5)


class Coder(keras.Model):
    """An autoencoder that adds its loss itself, and may train in a step of its own."""

    def __init__(self, adds):
        super().__init__()
        self.code, self.adds = L.Dense(64), adds

    def call(self, x):
        found = self.code(x)
        if self.adds:
            self.add_loss(tf.reduce_mean(tf.square(found - x)))
        return found


def test_compiled_without_a_loss():
    model = Coder(adds=True)
    model.compile("sgd")
    model.fit(X, epochs=1, verbose=0)
    objective = Objective(model, X, chunk=150)
    assert objective.check()[1] == pytest.approx(model.evaluate(X, batch_size=len(X), verbose=0), rel=1e-5)
    assert sharpness(objective, flat_weights(model), 1e-3).value > 0
    model = Coder(adds=False)
    model.compile("sgd")
    with pytest.raises(UserError, match="Keras cannot take this loss of the model's outputs: No loss to compute"):
        Objective(model, X, Y)
    assert Objective(model, X, Y, outputs="logits").value(flat_weights(model)) > 0


def test_half_precision_is_found_wherever_it_is():
    inner = keras.Sequential(
        [keras.Input((64,)), L.Dense(8, dtype="bfloat16"), L.Activation("linear", dtype="float32")]
    )
    for model in (sequential(inner, L.Dense(10)), sequential(L.Dense(10, dtype="mixed_float16"))):
        with pytest.raises(UserError, match="float32 or float64; sharpness is finer than b?float16 resolves"):
            Objective(model, X, Y)


class Noise(L.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def test_noise_is_found():
    for layer in (Noise(), L.Lambda(lambda x: keras.random.normal((1,), seed=GENERATOR) + x)):
        model = sequential(layer, L.Dense(10))
        with pytest.raises(UserError, match="draws random numbers at inference"):
            Objective(model, X, Y)


GENERATOR = keras.random.SeedGenerator(1)


def test_evident_mistakes():
    ten, one, logits = scaled(L.Dense(10, "sigmoid")), scaled(L.Dense(1)), scaled(L.Dense(10))
    for model, y, settings, words in (
        (ten, Y, {}, "all from 0 to 1, so no logits"),
        (one, np.zeros(len(Y), int), {}, "such as loss=keras.losses.BinaryCrossentropy"),
        (logits, Y, {"loss": "mse", "outputs": "logits"}, "not both"),
        (logits, Y, {"loss": "nonsense"}, "nonsense"),
        (logits, ONE_HOT[:, :7], {"loss": "categorical_crossentropy"}, "Keras cannot take this loss"),
        (logits, Y.tolist(), {}, "must be arrays with one row .*, and more: a list counts as several inputs"),
        (sequential(L.Dense(10), shape=(63,)), Y, {}, "shape .64,.: Input .* is incompatible with the layer"),
    ):
        with pytest.raises(UserError, match=words):
            Objective(model, X, y, **settings)


def test_a_minimizer_carries_its_state(tmp_path):
    """As in the issue: two files are read into one model, whose moving statistics are then those of the second."""
    model = scaled(L.Dense(8, "relu"), L.BatchNormalization(momentum=0.5), L.Dense(10, "softmax"))
    model.compile(loss="sparse_categorical_crossentropy", optimizer=keras.optimizers.Adam(0.03))
    expected, paths = [], [tmp_path / f"{name}.weights.h5" for name in "ab"]
    for path, data in zip(paths, (X, 16 - X), strict=True):
        model.fit(data, Y, epochs=4, verbose=0)
        expected.append(model.evaluate(X, Y, batch_size=len(X), verbose=0))
        write_weights(model, path)
    a, b = (read_weights(model, path) for path in paths)
    assert isinstance(a, Point)
    objective = Objective(model, X, Y)
    assert [objective.value(point) for point in (a, b)] == pytest.approx(expected, rel=1e-5)
    assert objective.value(a.weights) != pytest.approx(expected[0], rel=0.1), "with the statistics of b"
    assert sharpness(objective, a, 1e-3).loss == pytest.approx(expected[0], rel=1e-5)
    found = curvature(objective, a, 1e-3, RandomSubspace(objective.size, 2), eigenvalues=1, directions=2)
    assert found.sharpness.loss == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_array_equal(point_of(model).weights, b.weights)
    ends = surface.evaluate(objective, surface.through([a, b]), points=2, reach=0).loss[0]
    np.testing.assert_allclose(ends, expected, rtol=1e-5)
    # Keras leaves out, and says nothing of, what it does not look for
    with pytest.raises(UserError, match="holds 32 numbers more than this"):
        read_weights(scaled(L.Dense(8, "relu"), L.Dense(10, "softmax")), paths[0])


def test_what_is_not_finite_has_no_accuracy():
    model = scaled(L.Dense(8, "relu"), L.Dense(10))
    w = flat_weights(model)
    found = Objective(model, X, Y).evaluate(1e30 * w)
    assert not np.isfinite(found.loss)
    assert np.isnan(found.accuracy)
    with pytest.raises(UserError, match="samples hold NaN or infinite values"):  # which a ReLU would make a 0
        Objective(model, np.where(np.arange(len(X))[:, None] == 3, np.nan, X), Y)


def test_chunks_fit_the_memory(monkeypatch, caplog):
    """The graph tells what a sample takes; what does not fit in any number is announced."""
    model = sequential(L.Reshape((8, 8, 1)), L.Conv2D(50, 3, padding="same"), L.ReLU(), L.Flatten(), L.Dense(10))
    plain = Objective(model, X, Y)
    nested = Objective(sequential(keras.Sequential(model.layers), shape=(64,)), X, Y)
    kept = 4 * 8 * 8 * 50 * 2  # of the convolution and the ReLU
    for objective in (plain, nested):
        assert kept < objective._bytes_of_sample() < 2.5 * kept
        assert len(objective._chunks) == 1
    monkeypatch.setattr(objectives, "CHUNK_BYTES", 100 * plain._bytes_of_sample())
    small = Objective(model, X, Y)
    assert len(small._chunks) == 4
    w = flat_weights(model)
    assert small.value(w) == pytest.approx(plain.value(w), rel=1e-6)
    monkeypatch.setattr(memory, "free_bytes", lambda: 20 * plain._bytes_of_sample())
    assert len(Objective(model, X, Y)._chunks) == 40
    assert caplog.text == ""
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    Objective(model, X, Y)
    assert "A gradient over 1 samples at once needs about" in caplog.text


def test_the_examples_of_the_document(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("large_batch.sharpness_metric.MEASURES", dict(MEASURES))  # to which it adds one
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_models.md").read_text(), re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    assert re.search(r"Metric 2.1: \d", printed)
    assert f"loss={names['objective'].value(names['w'])!r}" in printed


def test_another_backend_is_refused():
    done = run_python("-c", "import keras; keras.config.backend = lambda: 'jax'\nfrom large_batch import Objective")
    assert "UserError: Keras was imported with the backend jax, but TensorFlow is needed" in done.stderr


def test_the_settings_of_keras_change_nothing(color_digits, tmp_path):
    """Neither network, nor training, nor objective: as with image_data_format and floatx in keras.json."""

    def run(name):
        asked = recipe(color_digits, network="C1", definition="paper", batch_size=750, epochs=1)
        end = train(asked, color_digits, tmp_path / name)
        model = network_zoo.get("C1").build("paper")
        objective = Objective(model, color_digits.x_test[:50], color_digits.y_test[:50], prepare=pixels)
        return end.weights, objective.value_and_gradient(end.weights)[1], network_zoo.get("C2").build().count_params()

    usual = run("usual")
    keras.config.set_floatx("float64")
    keras.config.set_image_data_format("channels_first")
    try:
        other = run("other")
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_image_data_format("channels_last")
    for one, same in zip(usual, other, strict=True):
        np.testing.assert_array_equal(one, same)


def test_the_state_between_two_minimizers():
    a, b = [np.float32([1, 4]), np.uint32([7])], [np.float32([3, 1]), np.uint32([9])]
    for alpha, expected in ((-1, [1, 4]), (0, [1, 4]), (0.5, [2, 2.5]), (1, [3, 1]), (2, [3, 1])):
        mixed, kept = state_between(alpha, a, b)
        np.testing.assert_array_equal(mixed, np.float32(expected))
        assert (mixed.dtype, kept) == (np.float32, 7)


def test_a_regularizer_is_in_training_as_in_the_objective(digits, tmp_path):
    """The loss of the first epoch of one step is the objective's at the start."""

    def build(network, definition, classes, seed, precision):
        keras.utils.set_random_seed(seed)
        return keras.Sequential([keras.Input((784,)), L.Dense(classes, kernel_regularizer=keras.regularizers.L2(0.3))])

    network = Network("quick", build, "digits", (784,), 10)
    asked = recipe(digits, network="quick", batch_size=1500, epochs=1)
    end = Minimizers(network, digits, tmp_path).train(asked)
    model = network.build()
    objective = Objective(model, digits.x_train, digits.y_train, prepare=pixels)
    plain = Objective(model, digits.x_train, digits.y_train, prepare=pixels, loss=None, outputs="logits")
    penalty = 0.3 * np.sum(end.start[:7840] ** 2)
    assert end.history[0].train_loss == pytest.approx(objective.value(end.start), rel=1e-5)
    assert plain.evaluate(end.start).loss > penalty > 1
