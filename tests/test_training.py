import dataclasses
import functools
import json

import numpy as np
import pytest
import quick
from conftest import build, recipe, train
from quick import QUICK, minimizers, stop_in_epoch
from small_network import SMOOTH, felt_weights

import network_zoo
from large_batch import layers, optimizers, store, training
from large_batch.backend import tf
from large_batch.errors import MachineError, UserError
from large_batch.networks import find
from large_batch.objective import Objective, flat_weights, read_weights
from large_batch.training import TrainingLoop

# Of a short training, here and there much of a gradient that is nearly 0; a wrong batch is an error of order one
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def train_c1(color_digits, tmp_path_factory):
    """Train C1, which drops out, with a precision, in a folder of its own; once for each."""

    @functools.cache
    def trained(precision):
        asked = recipe(color_digits, network="C1", definition="paper", precision=precision)
        return train(asked, color_digits, tmp_path_factory.mktemp("c1"))

    return trained


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_recipe_determines_the_bits(train_c1, color_digits, tmp_path, precision):
    first = train_c1(precision)
    second = train(first.recipe, color_digits, tmp_path)
    np.testing.assert_array_equal(first.weights, second.weights)
    np.testing.assert_array_equal(first.start, second.start)
    assert first.history == second.history
    assert (first.weights == train_c1("float32").weights).all() == (precision == "float32")


def test_the_recipe_determines_the_bits_of_compiled_steps(digits, tmp_path):
    asked = quick.recipe(digits, batch_size=500)
    first, second = (minimizers(digits, tmp_path / place).train(asked) for place in ("a", "b"))
    np.testing.assert_array_equal(first.weights, second.weights)


def test_a_real_minimizer(mnist, tmp_path):
    found = train(recipe(mnist, batch_size=300, epochs=1), mnist, tmp_path)
    assert found.history[0].train_accuracy > 90  # as seen from the first step on
    model = build(found.recipe, mnist)
    assert Objective(model, mnist.x_test, mnist.y_test, prepare=layers.pixels).evaluate(found.weights).accuracy > 95


@pytest.mark.slow
def test_real_minimizers_of_one_recipe_are_bit_identical(mnist, tmp_path):
    asked = recipe(mnist, batch_size=256, epochs=1)
    first, second = (train(asked, mnist, tmp_path / place) for place in ("a", "b"))
    np.testing.assert_array_equal(first.weights, second.weights)


def test_recomputing_in_large_batches_changes_no_bit(train_c1, color_digits, tmp_path, monkeypatch):
    kept = train_c1("float32")
    monkeypatch.setattr(layers, "RECOMPUTE_BYTES", 0)
    recomputed = train(kept.recipe, color_digits, tmp_path)
    np.testing.assert_array_equal(recomputed.weights, kept.weights)


def distance_from_adam_by_hand(found, data):
    """Return how far the weights of the smooth network are from those of ADAM in float64 NumPy, over batches formed as
    the recipe says, with TensorFlow's gradients; in units of the way from the start."""
    asked, w = found.recipe, found.start
    model = asked.build(SMOOTH, data)
    variables = model.trainable_variables
    ends = np.cumsum([np.prod(variable.shape) for variable in variables])[:-1]

    @tf.function
    def gradient(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(layers.pixels(x))))
        return tf.concat([tf.reshape(part, [-1]) for part in tape.gradient(loss, variables)], axis=0)

    m, v, t = np.zeros_like(w), np.zeros_like(w), 0
    for epoch in range(asked.epochs):
        order = np.random.default_rng([asked.seed, epoch]).permutation(len(data.x_train))
        size = asked.batch_size_in(epoch)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            for variable, part in zip(variables, np.split(w, ends), strict=True):
                variable.assign(part.reshape(variable.shape))
            g = gradient(tf.constant(data.x_train[batch]), tf.constant(data.y_train[batch])).numpy().astype(np.float64)
            t += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - 1e-3 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
    felt = felt_weights(SMOOTH)
    return np.linalg.norm((found.weights - w)[felt]) / np.linalg.norm((found.weights - found.start)[felt])


def test_training_is_adam_over_shuffled_batches_from_one_starting_point(digits, tmp_path, monkeypatch):
    """For a schedule of batch sizes see test_recipes.py."""
    monkeypatch.setattr(training, "PACE", 1e9)  # as many steps at once as there are
    start = flat_weights(SMOOTH.build(seed=3))
    for batch_size, epochs in ((1500, 2), (400, 2)):
        asked = quick.recipe(digits, network="smooth", batch_size=batch_size, epochs=epochs, seed=3)
        found = minimizers(digits, tmp_path, SMOOTH).train(asked)
        assert distance_from_adam_by_hand(found, digits) < ROUNDING
        assert found.distance == np.linalg.norm(found.weights - found.start)
        np.testing.assert_array_equal(found.start, start)


def test_a_stored_minimizer_is_reused_for_its_seed(digits, tmp_path):
    asked, found = quick.recipe(digits), minimizers(digits, tmp_path)
    assert found.stored(asked) is None
    assert found.samples_to_train(asked) == 2 * 1500
    first = found.train(asked)
    assert found.samples_to_train(asked) == 0

    def no_training(*_):
        pytest.fail("this recipe was trained before")

    again = found.train(asked, report=no_training)
    np.testing.assert_array_equal(again.weights, first.weights)
    np.testing.assert_array_equal(again.start, first.start)
    assert (again.history, again.provenance) == (first.history, first.provenance)

    seen = []
    anew = found.train(asked, retrain=True, report=lambda samples, _: seen.append(samples))
    assert sum(seen) == 2 * 1500
    np.testing.assert_array_equal(anew.weights, first.weights)

    other = found.train(dataclasses.replace(asked, seed=1))
    assert np.mean(other.weights != first.weights) > 0.99


def test_what_is_stored(digits, tmp_path):
    asked, found = quick.recipe(digits), minimizers(digits, tmp_path)
    trained = found.train(asked)
    folder = found.folder(asked).path
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "history.csv",
        "minimizer.weights.h5",
        "provenance.json",
        "recipe.json",
        "start.weights.h5",
    ]
    assert json.loads((folder / "recipe.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(asked)))
    model = QUICK.build(seed=9)
    model.load_weights(folder / "minimizer.weights.h5")  # as Keras itself loads it
    np.testing.assert_array_equal(flat_weights(model), trained.weights)
    assert trained.provenance.packages["keras"].startswith("3.")
    assert trained.provenance.wall_seconds > 0


def test_a_checkpoint_of_more_than_a_thousand_variables(digits, tmp_path):
    loop = TrainingLoop(quick.recipe(digits), QUICK, digits)
    variables = [tf.Variable(float(i)) for i in range(1001)]
    loop._variables = lambda: variables
    loop.save(tmp_path / "checkpoint.npz")
    for variable in variables:
        variable.assign(-1.0)
    loop.restore(tmp_path / "checkpoint.npz")
    assert [float(variable) for variable in variables] == list(range(1001))


def test_history(digits, tmp_path):
    asked, found = quick.recipe(digits, epochs=3), minimizers(digits, tmp_path)
    plain = found.train(asked)
    assert [row.epoch for row in plain.history] == [1, 2, 3]
    assert plain.history[2].train_loss < plain.history[0].train_loss
    assert {row.test_loss for row in plain.history} == {None}
    with pytest.raises(UserError, match=r"without a test history; train it anew with --retrain"):
        found.check_tested(asked)
    tested = found.train(asked, test_history=True, retrain=True)
    np.testing.assert_array_equal(tested.weights, plain.weights)
    evaluation = Objective(found.build(asked), digits.x_test, digits.y_test, prepare=layers.pixels).evaluate(
        tested.weights
    )
    assert tested.history[2].test_loss == evaluation.loss
    assert tested.history[2].test_accuracy == evaluation.accuracy
    found.check_tested(asked)
    assert found.stored(asked).history == tested.history


def test_stopped_trainings_keep_their_test_history(digits, tmp_path):
    asked, found = quick.recipe(digits, epochs=3), minimizers(digits, tmp_path)
    stop_in_epoch(2, found, asked, test_history=True)
    continued = found.train(asked)  # tested to the end, though not asked again
    found.check_tested(asked)
    assert found.stored(asked).history == continued.history

    stop_in_epoch(2, found, asked, retrain=True)
    with pytest.raises(UserError, match="without a test history"):
        found.check_tested(asked)
    assert found.samples_to_train(asked) == 2 * 1500  # the kept epoch is still there


def test_retraining_keeps_the_old_minimizer_until_there_is_a_new_one(digits, tmp_path):
    asked, found = quick.recipe(digits), minimizers(digits, tmp_path)
    first = found.train(asked)
    for _ in range(2):
        stop_in_epoch(1, found, asked, retrain=True)
        assert found.stored(asked) is None
        (old,) = tmp_path.glob("*.before-retraining")
        assert store.Folder(old).whole("minimizer.weights.h5")
    again = found.train(asked)  # the plain command continues the new training
    assert again.provenance != first.provenance
    np.testing.assert_array_equal(again.weights, first.weights)
    assert not old.exists()


def test_a_diverging_training_says_where_and_leaves_the_last_good_epoch(digits, tmp_path):
    asked, found = quick.recipe(digits, optimizer="adam:learning_rate=1e30"), minimizers(digits, tmp_path)
    with pytest.raises(MachineError, match=r"diverged .* in epoch 1, step \d+: Recipe\(network='quick'.*seed=0"):
        found.train(asked)
    folder = found.folder(asked).path
    assert not (folder / "minimizer.weights.h5").exists()
    last_good = read_weights(found.build(asked), folder / "last_good.weights.h5").weights
    np.testing.assert_array_equal(last_good, flat_weights(found.build(asked)))
    assert found.stored(asked) is None


def test_divergence_after_a_good_epoch(digits, tmp_path, monkeypatch):
    asked, found = quick.recipe(digits), minimizers(digits, tmp_path)
    good = []

    def save(self, *_):
        kept(self, *_)
        good.append(flat_weights(self.model))

    kept = TrainingLoop.save
    monkeypatch.setattr(TrainingLoop, "save", save)
    monkeypatch.setattr(optimizers.Adam, "rate", lambda self, epoch: np.inf if epoch else self.learning_rate)
    with pytest.raises(MachineError, match=r"in epoch 2, step 2: .* weights after epoch 1 are in"):
        found.train(asked)
    last_good = found.folder(asked).path / "last_good.weights.h5"
    np.testing.assert_array_equal(read_weights(found.build(asked), last_good).weights, good[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": -3}, "0 or more epochs, not -3"),
        ({"schedule": ((1, 0),)}, "at least 1 sample, not 0"),
        ({"schedule": ((2, 30), (1, 60))}, r"must be above 0 and ascend, not \[2, 1\]"),
        ({"batch_size": 0}, "at least 1 sample"),
        ({"batch_size": 1501}, "1,501 is larger than the training set of 1,500"),
        ({"seed": -1}, "seed must be 0 or greater"),
        ({"precision": "float8"}, "no precision 'float8'"),
    ],
)
def test_bad_recipes(digits, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        train(recipe(digits, **settings), digits, tmp_path)
    assert not list(tmp_path.iterdir())


def test_networks_that_are_none():
    with pytest.raises(UserError, match="no network 'F3'"):
        find("F3", network_zoo.NETWORKS)
    with pytest.raises(UserError, match="no definition 'thesis'"):
        find("F1", network_zoo.NETWORKS).build("thesis")
