"""statistics: what moving averages are at weights that no training has passed."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from large_batch import statistics
from large_batch.errors import UserError
from large_batch.objective import Objective, flat_weights
from large_batch.objectives import Recalibrated
from large_batch.statistics import Estimator


def build(seed=0, dropout=0.5):
    """Convolutions and dense layers with moving averages, dropout, and a frozen layer."""
    keras.utils.set_random_seed(seed)
    x = keras.Input((8, 8, 1))
    h = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
    h = keras.layers.Dropout(dropout)(keras.layers.ReLU()(keras.layers.Flatten()(h)))
    h = keras.layers.Dense(12, "tanh", trainable=False)(h)
    h = keras.layers.BatchNormalization()(keras.layers.Dense(9)(h))
    return keras.Model(x, keras.layers.Dense(10)(keras.layers.ReLU()(h)))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (60, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 60)


@pytest.fixture
def of_batch(samples):
    model = build()
    return model, Objective(statistics.of_the_batch(model), *samples)


def loss_in_training(model, w, x, y):
    """Keras' own batch statistics: the loss of a model without dropout, called as in training."""
    sizes = [int(np.prod(variable.shape)) for variable in model.trainable_variables]
    for variable, part in zip(model.trainable_variables, np.split(w, np.cumsum(sizes)[:-1]), strict=True):
        variable.assign(part.reshape(variable.shape))
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
    return float(tf.reduce_mean(losses))


def test_of_the_batch(of_batch, samples):
    model, copied = of_batch
    w = flat_weights(model) + 0.1
    assert copied.size == len(w)
    assert copied.value(w) == pytest.approx(
        loss_in_training(build(dropout=1e-9), w, *samples), rel=1e-3
    )  # epsilon 1e-3
    assert not np.isclose(copied.value(w), Objective(model, *samples).value(w), rtol=0.01)


def test_recalibrated(of_batch, samples):
    """Over one chunk it is the function with statistics of the batch; over several, the first layer has all moments."""
    model, copied = of_batch
    x, w = samples[0], flat_weights(model) - 0.05
    estimator = Estimator(model, copied.model, x, 60, tf.identity)
    recalibrated = Recalibrated(Objective(model, *samples), copied, estimator)
    # The statistics are as exact as float32 squares; a kink of a ReLU may lie between.
    assert recalibrated.evaluate(w).loss == pytest.approx(copied.evaluate(w).loss, rel=1e-4)
    value, gradient = recalibrated.value_and_gradient(w)
    np.testing.assert_array_equal(gradient, copied.value_and_gradient(w)[1])
    assert value == recalibrated.evaluate(w).loss

    state = Estimator(model, copied.model, x, 25, tf.identity).state(w)
    kernel, bias = w[:36].reshape(3, 3, 4), w[36:40]
    windows = np.lib.stride_tricks.sliding_window_view(x[..., 0], (3, 3), axis=(1, 2))
    outputs = np.einsum("nijab,abc->nijc", windows.astype(np.float64), kernel) + bias
    np.testing.assert_allclose(state[0], outputs.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state[1], outputs.var(axis=(0, 1, 2)), rtol=1e-4)
    others = [np.asarray(v) for v in model.non_trainable_variables]
    frozen = [i for i, v in enumerate(model.non_trainable_variables) if "kernel" in v.path]
    assert frozen and all(np.array_equal(state[i], others[i]) for i in frozen)


def test_networks_that_cannot_be_copied():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.normalisation = keras.layers.BatchNormalization()

        def call(self, x):
            return self.normalisation(x)

    own = Own()
    own.build((None, 3))
    within = keras.Sequential([keras.Input((3,)), keras.Sequential([keras.layers.BatchNormalization()])])
    unscaled = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(scale=False)])
    block = keras.layers.TimeDistributed(keras.layers.BatchNormalization())
    hidden = keras.Sequential([keras.Input((2, 3)), block])
    for model in (own, within, hidden, unscaled):
        with pytest.raises(UserError, match="whose layers stand in a list or graph .*--statistics=interpolate"):
            statistics.of_the_batch(model)


NETWORK = """
import keras


def small():
    x = keras.Input((64,))
    h = keras.layers.BatchNormalization(momentum=0.8)(keras.layers.Dense(16)(x))
    return keras.Model(x, keras.layers.Dense(10)(keras.layers.ReLU()(h)))
"""


def test_three_policies_in_the_scripts(run_script, tmp_path):
    (tmp_path / "own.py").write_text(NETWORK)
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("run", "figure", "result")]
    batches = ["--small_batch=600", "--large_batch=750"]
    common = [*folders, "-n", f"{tmp_path}/own.py:small", "--dataset=digits", "--epochs=3", *batches]
    done = run_script("plot_parametric_plot.py", *common, "--points=4", "--statistics=interpolate,batch,recalibrate")
    assert done.returncode == 0, done.stderr
    assert "2 trainings (0 stored, 0 resumed), 12 measurements (0 stored)" in done.stdout
    (path,) = (tmp_path / "result").glob("small-*-interpolate-batch-recalibrate.csv")
    assert (tmp_path / "figure" / path.with_suffix(".png").name).exists()
    lines = [dict(zip(*pair, strict=True)) for pair in pairs(path)]
    assert [line["statistics"] for line in lines] == ["interpolate"] * 4 + ["batch"] * 4 + ["recalibrate"] * 4
    losses = np.array([float(line["train_loss"]) for line in lines]).reshape(3, 4)
    np.testing.assert_allclose(losses[1], losses[2], rtol=0.01)  # one chunk, but for epsilon
    assert (np.abs(losses[0] - losses[1]) > 0.01).all()  # of three epochs, in which the moving averages lag
    box = ["--space=full", "--eps=1e-3", "--iterations=2"]
    done = run_script("sharpness.py", *common, *box, "--statistics=recalibrate", "--rescale=1,2")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "result").glob("small-sharpness-*recalibrate.json")
    results = json.loads(path.read_text())["results"]
    for label, alpha in (("SB", 1), ("LB", 2)):
        assert results[label][0]["result"]["loss"] == pytest.approx(losses[2, alpha], rel=1e-6)
        assert results[label][0]["result"]["value"] > 0
    lines = [line.split() for line in done.stdout.splitlines() if re.match(r"(SB|LB) +[12]( +\d\S*){4}$", line)]
    assert [float(line[2]) for line in lines] == pytest.approx(np.repeat(losses[2, 1:3], 2), rel=2e-3), "epsilon"
    curved = ["--curvature", "--curvature_samples=300", "--dimension=2", "--probes=1", "--steps=2", "--products=3"]
    done = run_script("sharpness.py", *common, *curved, "--statistics=recalibrate")
    assert done.returncode == 0, done.stderr
    refused = run_script("sharpness.py", *folders, "-n", "F1", "--dataset=digits", "--statistics=batch")
    assert refused.returncode == 2 and "F1 has no moving averages" in refused.stderr


def pairs(path):
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    return ((header, line) for line in lines)
