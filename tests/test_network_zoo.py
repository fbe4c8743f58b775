import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_python

import network_zoo
from errors import UserError

TRAINABLE = {"F1": 1_462_794, "F2": 2_780_085, "C1": 1_757_834, "C2": 14_991_946, "C3": 1_775_204, "C4": 15_038_116}


def trainable(model: keras.Model) -> int:
    return sum(variable.numpy().size for variable in model.trainable_variables)


@pytest.mark.parametrize(("name", "count"), TRAINABLE.items())
def test_trainable_parameters_of_the_repository_definitions(name, count):
    assert trainable(network_zoo.get(name).build()) == count


@pytest.mark.parametrize("name", ["C1", "C3"])
def test_shallow_networks_by_definition(name):
    def shapes(definition):
        model = network_zoo.get(name).build(definition)
        convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        first_dense = next(layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
        return [layer.strides for layer in convolutions], first_dense.kernel.shape[0]

    # Two poolings halve 32 to 8 pixels, of 64 channels; two strided convolutions halve twice more.
    assert shapes("repository") == ([(1, 1)] * 2, 8 * 8 * 64)
    assert shapes("paper") == ([(2, 2)] * 2, 2 * 2 * 64)


@pytest.mark.parametrize("name", ["C2", "C4"])
def test_dropout_of_deep_networks_by_definition(name):
    def rates(definition):
        model = network_zoo.get(name).build(definition)
        return [layer.rate for layer in model.layers if isinstance(layer, network_zoo.Dropout)]

    assert rates("repository") == [0.3] + [0.4] * 7 + [0.5] * 2
    assert rates("paper") == [0.5]


def pooled(x: np.ndarray, size: int) -> np.ndarray:
    """Theano's pooling with stride 2: a border of one, ceil(n / 2) windows a side, the first of which begins at -1."""
    half = -(-x.shape[1] // 2)
    bordered = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [bordered[:, 2 * i : 2 * i + size].max(axis=1) for i in range(half)]
    columns = [[row[:, 2 * j : 2 * j + size].max(axis=1) for j in range(half)] for row in rows]
    return np.array(columns).transpose(2, 0, 1, 3)


@pytest.mark.parametrize(
    ("name", "size", "pixels"), [("C1", 3, 32), ("C1", 3, 7), ("C2", 2, 32), ("C2", 2, 5), ("C2", 2, 2)]
)
def test_the_repository_definition_pools_as_theano_does(name, size, pixels):
    x = np.maximum(0, np.random.default_rng(0).normal(size=(3, pixels, pixels, 4))).astype(np.float32)
    layers = network_zoo.get(name).build("repository").layers
    place = next(i for i, layer in enumerate(layers) if isinstance(layer, keras.layers.MaxPooling2D))
    np.testing.assert_array_equal(layers[place](layers[place - 1](x)), pooled(x, size))
    if (size, pixels) == (2, 2):
        np.testing.assert_array_equal(pooled(x, size)[:, 0, 0], x[:, 0, 0])
    (tensorflows,) = {
        type(layer): layer for layer in network_zoo.get(name).build("paper").layers if "pool" in layer.name
    }.values()
    assert not np.array_equal(tensorflows(x), pooled(x, size)) or pixels % 2


@pytest.mark.parametrize("name", ["F1", "C1", "C3"])
def test_output_is_logits(name):
    network = network_zoo.get(name)
    x = np.random.default_rng(0).random((5, *network.input_shape), np.float32)
    logits = network.build()(x).numpy()
    assert logits.shape == (5, network.classes)
    assert logits.min() < 0
    assert abs(logits.sum(axis=1) - 1).min() > 1e-3


def test_the_seed_determines_the_starting_point():
    def start(seed):
        return np.concatenate([v.numpy().ravel() for v in network_zoo.get("F1").build(seed=seed).trainable_variables])

    np.testing.assert_array_equal(start(3), start(3))
    assert np.mean(start(3) != start(4)) > 0.99  # all but biases, gammas and betas


def test_kernels_start_glorot_uniform_and_each_differs():
    kernels = [layer.kernel.numpy() for layer in network_zoo.get("F1").build().layers if hasattr(layer, "kernel")]
    for kernel in kernels:
        bound = np.sqrt(6 / sum(kernel.shape))
        assert 0.99 * bound < abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not np.array_equal(kernels[1], kernels[2])


@pytest.mark.parametrize("shape", [(64, 7), (16, 5, 3, 7)])
def test_normalisation_is_by_the_statistics_of_the_batch(shape):
    x = np.random.default_rng(1).normal(3, 2, shape).astype(np.float32)
    layer = network_zoo.BatchStatisticsNormalization()
    layer.build(shape)
    layer.gamma.assign(np.arange(7.0))
    layer.beta.assign(np.arange(7.0) / 7)
    axes = tuple(range(len(shape) - 1))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axes)) / np.sqrt(wide.var(axes) + 1e-6) * np.arange(7) + np.arange(7) / 7
    for training in (False, True):
        np.testing.assert_allclose(layer(x, training=training), expected, atol=3e-5)
    assert not layer.non_trainable_variables


def test_epsilon_is_keras_1s_and_not_raised():
    x = np.full((4, 1), 1e-3, np.float32) * np.array([[-1], [1], [-1], [1]], np.float32)
    layer = network_zoo.BatchStatisticsNormalization()
    # The variance equals epsilon, so the normalised values are 1/sqrt(2); with 1e-5 they would be 0.30.
    np.testing.assert_allclose(layer(x).numpy().ravel(), np.array([-1, 1, -1, 1]) / np.sqrt(2), rtol=1e-4)


def test_dropout_depends_on_seed_and_step_alone():
    x = tf.ones((1000, 20))

    def drop(step, seed=5):
        layer = network_zoo.Dropout(0.3, seed)
        layer.build(x.shape)
        layer.step.assign(step)
        return layer(x, training=True).numpy()

    np.testing.assert_array_equal(drop(2), drop(2))
    assert np.mean((drop(2) > 0) == (drop(3) > 0)) == pytest.approx(0.7**2 + 0.3**2, abs=0.02)
    assert np.mean((drop(2) > 0) == (drop(2, seed=6) > 0)) == pytest.approx(0.7**2 + 0.3**2, abs=0.02)
    assert np.mean(drop(2) == 0) == pytest.approx(0.3, abs=0.01)
    assert drop(2).max() == pytest.approx(1 / 0.7)
    np.testing.assert_array_equal(network_zoo.Dropout(0.3, 5)(x, training=False), x)


@pytest.mark.parametrize("name", ["F1", "C1", "C2"])
def test_recomputing_changes_no_bit_of_the_gradient(name):
    network = network_zoo.get(name)
    model = network.build()
    x = tf.constant(np.random.default_rng(0).random((6, *network.input_shape), np.float32))

    @tf.function
    def gradient(call):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(tf.nn.log_softmax(call(x))[:, 0])
        return value, tape.gradient(value, model.trainable_variables)

    kept = gradient(lambda x: model(x, training=True))
    recomputed = gradient(lambda x: network_zoo.call_recomputing(model, x))
    for a, b in zip(tf.nest.flatten(kept), tf.nest.flatten(recomputed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_network_is_the_same_network(tmp_path):
    network = network_zoo.get("C1")
    model = network.build(seed=1)
    model.save(tmp_path / "c1.keras")
    x = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "c1.keras")(x), model(x))


def test_bfloat16_keeps_float32_weights_and_logits():
    model = network_zoo.get("C1").build(precision="bfloat16")
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    x = np.random.default_rng(0).random((16, 32, 32, 3), np.float32)
    logits = model(x)
    assert logits.dtype == tf.float32
    exact = network_zoo.get("C1").build()(x)
    assert 1e-5 < np.abs(logits - exact).max() < 0.3


def test_batch_sizes_of_the_paper():
    network = network_zoo.get("C1")
    assert (network.small_batch(50_000), network.large_batch(50_000)) == (256, 5000)
    assert (network.small_batch(1500), network.large_batch(1500)) == (15, 150)


def test_unknown_network():
    with pytest.raises(UserError, match=r"no network 'C5'; choose one of F1, F2, C1"):
        network_zoo.get("C5")


def test_the_table_is_printed():
    printed = run_python("network_zoo.py")
    assert printed.returncode == 0
    for name, count in TRAINABLE.items():
        (line,) = [line for line in printed.stdout.splitlines() if line.startswith(name)]
        assert f"{count:,}" in line
    assert printed.stderr == ""


REPLICAS = """
import numpy as np
import tensorflow as tf
import network_zoo

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
rng = np.random.default_rng(0)
x, y = rng.random((10, 32, 32, 3), np.float32), rng.integers(0, 10, 10)

def logits_and_gradients(strategy, shares):
    with strategy.scope():
        model = network_zoo.get("C1").build("paper")
    def replica():
        i = tf.distribute.get_replica_context().replica_id_in_sync_group
        first, last = tf.constant(shares)[i], tf.constant(shares)[i + 1]
        with tf.GradientTape() as tape:
            logits = model(tf.constant(x)[first:last])
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.constant(y)[first:last], logits)
            loss = tf.reduce_sum(losses) / 10
        return logits, tape.gradient(loss, model.trainable_variables)
    logits, gradients = tf.function(lambda: strategy.run(replica))()
    logits = np.concatenate([v.numpy() for v in strategy.experimental_local_results(logits)])
    return logits, [strategy.reduce("SUM", g, axis=None).numpy() for g in gradients]

one = logits_and_gradients(tf.distribute.get_strategy(), [0, 10])
# Shares that do not divide evenly: the statistics are those of the ten samples all the same.
two = logits_and_gradients(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), [0, 7, 10])
np.testing.assert_allclose(two[0], one[0], rtol=1e-4, atol=1e-5)
for a, b in zip(two[1], one[1]):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
alone = network_zoo.get("C1").build("paper")(x[:7])
assert np.abs(alone - one[0][:7]).max() > 0.01, "statistics of a part differ from those of the whole"
print("equal")
"""


def test_statistics_are_those_of_the_global_batch_under_a_strategy():
    done = run_python("-c", REPLICAS)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
