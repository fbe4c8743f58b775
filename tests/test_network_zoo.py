import functools
import json
import re
from itertools import product

import numpy as np
import pytest
from conftest import ROOT, run_python

import network_zoo
from large_batch import named, networks, optimizers, paper, remedies
from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.layers import Dropout, pixels
from large_batch.networks import Network, _architecture
from large_batch.objective import Objective, flat_weights

# Trainable weights of the repository and of the paper definition.
TRAINABLE = {
    "F1": (1_462_794, 1_462_794),
    "F2": (2_780_085, 2_780_085),
    "C1": (1_757_834, 283_274),
    "C2": (14_991_946, 14_991_946),
    "C3": (1_775_204, 300_644),
    "C4": (15_038_116, 15_038_116),
    "VGG11": (28_149_514, None),
    "MobileNetV2": (2_236_682, None),
}
BUILD = Network.build


@functools.cache
def built(name: str, definition: str = "repository") -> keras.Model:
    """A network that several tests look at, and none changes."""
    return BUILD(network_zoo.get(name), definition)


def test_tables_1_and_5_as_printed_and_as_kept_for_the_report(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Network, "build", lambda network, definition: built(network.name, definition))
    frames, labels = np.zeros((3, 360), np.float32), np.array([0, 7, 1972])
    np.savez(tmp_path / "timit.npz", x_train=frames, y_train=labels, x_test=frames[:2], y_test=labels[:2])
    network_zoo.main(network_zoo.Settings(data_dir=str(tmp_path), result_dir=str(tmp_path)))
    out, err = capsys.readouterr()
    assert err == f"timit: file {tmp_path / 'timit.npz'}\n"
    assert tuple(network_zoo.NETWORKS) == networks.NAMES, "as they are known before TensorFlow starts"
    assert (tuple(optimizers.OPTIMIZERS), tuple(remedies.REMEDIES)) == (named.OPTIMIZERS, named.REMEDIES)
    for name, counts in TRAINABLE.items():
        (line,) = [line for line in out.partition("Layers")[0].splitlines() if line.startswith(f"{name} ")]
        assert line.split()[-2:] == [f"{count:,}" if count else "-" for count in counts]
        assert f" {network_zoo.get(name).classes:,} " in line
    tables = json.loads((tmp_path / "network_zoo.json").read_text())["tables"]
    assert all(cell in out for rows in tables.values() for row in rows[1:] for cell in row)
    ours = {row[0]: row[2:] for row in tables["Table 5: data sets"] if row[1] != "the paper"}
    assert ours["TIMIT"] == ["3", "2", "360", "1,973"]
    assert ours["CIFAR-100"] == ["-"] * 4
    added = Network("added", None, "my_data.npz", (64,), 10)
    monkeypatch.setattr(network_zoo, "NETWORKS", {"added": added})
    monkeypatch.setattr(Network, "build", lambda network, definition: built("F1", definition))
    assert network_zoo.table_1()[0][1][:4] == ["added", "-", "my_data.npz", "64"]


def test_the_help_has_our_flags_only():
    done = run_python("network_zoo.py", "--help")
    flags = re.findall(r"^ +(?:-\w,)?--(?:\[no\])?(\w+)", done.stdout, re.MULTILINE)
    assert (done.returncode, sorted(flags)) == (0, ["data_dir", "flagfile", "help", "result_dir", "undefok", "version"])


def test_networks_and_data_sets_are_those_of_the_paper(mnist):
    """In the paper definition; the repository definition differs by the stride of C1 and C3."""
    for name, row in paper.TABLE_1.items():
        network = network_zoo.get(name)
        assert network_zoo.layers(built(name, "paper")) == row.layers
        same = network_zoo.layers(built(name)) == row.layers
        assert same == (row.kind != "shallow convolutional")
        assert (network.dataset, network.classes) == (row.dataset, paper.TABLE_5[row.dataset].classes)
    theirs, ours, *_ = network_zoo.table_5(ROOT / "data")[1:]
    assert (ours[0], ours[2:]) == (theirs[0], theirs[2:]) == ("MNIST", ["60,000", "10,000", "28 x 28", "10"])


@pytest.mark.parametrize("name", ["C1", "C3"])
def test_shallow_networks_by_definition(name):
    def shapes(definition):
        layers = built(name, definition).layers
        convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
        first_dense = next(layer for layer in layers if isinstance(layer, keras.layers.Dense))
        return [layer.strides for layer in convolutions], first_dense.kernel.shape[0]

    # Two poolings halve 32 to 8 pixels, of 64 channels; two strided convolutions halve twice more.
    assert shapes("repository") == ([(1, 1)] * 2, 8 * 8 * 64)
    assert shapes("paper") == ([(2, 2)] * 2, 2 * 2 * 64)


@pytest.mark.parametrize("name", ["C2", "C4"])
def test_dropout_of_deep_networks_by_definition(name):
    def rates(definition):
        return [layer.rate for layer in built(name, definition).layers if isinstance(layer, Dropout)]

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
    layers = built(name).layers
    place = next(i for i, layer in enumerate(layers) if isinstance(layer, keras.layers.MaxPooling2D))
    np.testing.assert_array_equal(layers[place](layers[place - 1](x)), pooled(x, size))
    if (size, pixels) == (2, 2):
        np.testing.assert_array_equal(pooled(x, size)[:, 0, 0], x[:, 0, 0])
    tensorflows = [layer for layer in built(name, "paper").layers if "pool" in layer.name]
    assert {type(layer) for layer in tensorflows} == {keras.layers.MaxPooling2D}
    assert not np.array_equal(tensorflows[-1](x), pooled(x, size)) or pixels % 2


def test_vgg11_is_that_of_the_authors_pytorch_folder():
    layers = built("VGG11").layers
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert [layer.pool_size for layer in layers if isinstance(layer, keras.layers.MaxPooling2D)] == [(2, 2)] * 5
    dense = [layer for layer in layers if isinstance(layer, keras.layers.Dense)]
    assert [layer.kernel.shape for layer in dense] == [(512, 4096), (4096, 4096), (4096, 10)]
    assert [layer.rate for layer in layers if isinstance(layer, Dropout)] == [0.5] * 2
    for layer in (*convolutions, *dense):
        deviation = 0.01 if layer in dense else np.sqrt(2 / (9 * layer.filters))
        # The deviation of n normal numbers has a relative standard error of sqrt(1 / 2n).
        assert np.std(layer.kernel) == pytest.approx(deviation, rel=5 / np.sqrt(2 * layer.kernel.numpy().size))
    with pytest.raises(UserError, match="no definition 'paper' of VGG11"):
        network_zoo.get("VGG11").build("paper")


def test_vgg11_is_finite_far_beyond_the_minimizers(color_digits):
    """Where moving statistics, extrapolated like weights as in the PyTorch folder, have negative variances."""
    rng, model = np.random.default_rng(0), built("VGG11")
    objective = Objective(model, color_digits.x_test[:20], color_digits.y_test[:20], prepare=pixels)
    w = flat_weights(model)
    for alpha, scale in product((-1, 2, 5), (1e-3, 1e2)):
        there = w + alpha * scale * rng.normal(size=len(w))
        found = objective.evaluate(there)
        assert np.isfinite([found.loss, found.clipped_loss, found.accuracy]).all()
        assert found.clipped_loss <= -np.log(1e-7)
        loss, gradient = objective.value_and_gradient(there)
        assert loss == pytest.approx(found.loss) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["F1", "C1", "C3"])
def test_output_is_logits(name):
    network = network_zoo.get(name)
    x = np.random.default_rng(0).random((5, *network.input_shape), np.float32)
    logits = built(name)(x).numpy()
    assert logits.shape == (5, network.classes)
    assert logits.min() < 0
    assert abs(logits.sum(axis=1) - 1).min() > 1e-3


def test_the_seed_determines_the_starting_point():
    def start(seed):
        return np.concatenate([v.numpy().ravel() for v in network_zoo.get("F1").build(seed=seed).trainable_variables])

    np.testing.assert_array_equal(start(3), start(3))
    assert np.mean(start(3) != start(4)) > 0.99  # all but biases, gammas and betas


def test_kernels_start_glorot_uniform_and_each_differs():
    kernels = [layer.kernel.numpy() for layer in built("F1").layers if hasattr(layer, "kernel")]
    for kernel in kernels:
        bound = np.sqrt(6 / sum(kernel.shape))
        # The least of these kernels has 5120 entries: its largest is within 1 % but for a chance of 0.99^5120.
        assert 0.99 * bound < abs(kernel).max() <= bound
        # A variance has a relative standard error of sqrt(0.8 / entries), a deviation of half of it.
        error = np.sqrt(0.2 / kernel.size)
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=5 * error)
    assert not np.array_equal(kernels[1], kernels[2])


def test_a_dropout_mask_is_the_same_however_it_is_compiled():
    layer = Dropout(0.3, seed=5)
    x = tf.ones((40, 50))

    def drop(x):
        return layer(x, training=True)

    drop(x)  # makes its variable
    compiled = [tf.function(drop, jit_compile=by_xla) for by_xla in (False, True)]
    for step in (0, 7):
        layer.step.assign(step)
        for call in compiled:
            np.testing.assert_array_equal(call(x), drop(x))


def test_a_saved_network_is_the_same_network(tmp_path):
    model = network_zoo.get("C1").build(seed=1)
    model.save(tmp_path / "c1.keras")
    x = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "c1.keras")(x), model(x))


def test_bfloat16_keeps_float32_weights_and_logits():
    model = network_zoo.get("C1").build(precision="bfloat16")
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    x = np.random.default_rng(0).random((16, 32, 32, 3), np.float32)
    logits = model(x)
    assert logits.dtype == tf.float32
    # Each layer's output, of order 1, is rounded to 2^-9 of it; a network with other weights would differ by order 1.
    assert 1e-5 < np.abs(logits - built("C1")(x)).max() < 0.3


def test_batch_sizes_of_the_paper():
    network = network_zoo.get("C1")
    assert (network.small_batch(50_000), network.large_batch(50_000)) == (256, 5000)
    assert (network.small_batch(1500), network.large_batch(1500)) == (15, 150)


def test_what_does_not_exist():
    with pytest.raises(UserError, match=r"no network 'C5'; choose one of F1, F2, C1"):
        network_zoo.get("C5")
    for kind in ("definition", "precision"):
        with pytest.raises(UserError, match=f"no {kind} 'other' of C1; choose one of"):
            network_zoo.get("C1").build(**{kind: "other"})


def test_an_architecture_is_told_whatever_was_built_before():
    def build():
        hidden = [keras.layers.Dense(4), keras.layers.Activation("tanh"), keras.layers.Softmax()]
        return keras.Sequential([keras.Input((3,)), *hidden])

    keras.backend.clear_session()
    first, again = (_architecture(build()) for _ in range(2))
    assert first == again
    assert _architecture(keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])) != first
