import dataclasses
import json

import numpy as np
import pytest
from conftest import StoppedError, recipe

import network_zoo
import runs
import training_loop
from errors import MachineError, UserError
from objective import Objective, flat_weights, read_weights
from solutions import Solver
from training import check_tested, samples_to_train, stored, train
from training_loop import TrainingLoop


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_recipe_determines_the_bits(color_digits, tmp_path, precision):
    asked = recipe(color_digits, network="C1", definition="paper", precision=precision)
    first, second = (train(asked, color_digits, tmp_path / place) for place in ("a", "b"))
    np.testing.assert_array_equal(first.weights, second.weights)
    np.testing.assert_array_equal(first.start, second.start)
    assert first.history == second.history
    other = train(dataclasses.replace(asked, seed=1), color_digits, tmp_path)
    assert np.mean(other.weights != first.weights) > 0.99


def test_real_minimizers_of_one_recipe_are_bit_identical(mnist, tmp_path):
    asked = recipe(mnist, batch_size=256, epochs=1)
    first, second = (train(asked, mnist, tmp_path / place) for place in ("a", "b"))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.history[0].train_accuracy > 90  # as seen from the first step on
    model = asked.build(mnist)
    assert Objective(model, mnist.x_test, mnist.y_test).evaluate(first.weights).accuracy > 95


def test_recomputing_in_large_batches_changes_no_bit(color_digits, tmp_path, monkeypatch):
    asked = recipe(color_digits, network="C1", definition="paper")
    kept = train(asked, color_digits, tmp_path / "kept")
    monkeypatch.setattr(training_loop, "RECOMPUTE_BYTES", 0)
    recomputed = train(asked, color_digits, tmp_path / "recomputed")
    np.testing.assert_array_equal(recomputed.weights, kept.weights)


def adam_by_hand(asked, data, w=None):
    """Adam in float64 NumPy over batches formed as the recipe says, with gradients of the tested objective."""
    model = asked.build(data)
    w = flat_weights(model) if w is None else w
    m, v, t = np.zeros_like(w), np.zeros_like(w), 0
    for epoch in range(asked.epochs):
        order = np.random.default_rng([asked.seed, epoch]).permutation(len(data.x_train))
        size = asked.batch_size_in(epoch)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            _, g = Objective(model, data.x_train[batch], data.y_train[batch]).value_and_gradient(w)
            t += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - 1e-3 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
    return w


@pytest.mark.parametrize(
    ("batch_size", "epochs", "tolerance"),
    # Rounding grows from step to step, faster in small batches; a wrong batch or moment would be an error of order one.
    [(1500, 2, 0.002), (1400, 1, 0.005), (700, 2, 0.05)],
)
def test_training_is_adam_over_shuffled_batches_the_last_one_partial(digits, tmp_path, batch_size, epochs, tolerance):
    asked = recipe(digits, batch_size=batch_size, epochs=epochs, seed=3)
    found = train(asked, digits, tmp_path)
    assert np.linalg.norm(found.weights - adam_by_hand(asked, digits)) < tolerance * found.distance
    assert found.distance == np.linalg.norm(found.weights - found.start)


def test_small_and_large_batch_share_the_starting_point(digits, tmp_path):
    small, large = (train(recipe(digits, batch_size=size, epochs=1), digits, tmp_path) for size in (300, 1500))
    np.testing.assert_array_equal(small.start, large.start)
    np.testing.assert_array_equal(small.start, flat_weights(network_zoo.get("F1").build(seed=0)))


def test_a_stored_minimizer_is_reused(digits, tmp_path):
    asked = recipe(digits)
    assert stored(asked, digits, tmp_path) is None
    assert samples_to_train(asked, digits, tmp_path) == 2 * 1500
    first = train(asked, digits, tmp_path)
    assert samples_to_train(asked, digits, tmp_path) == 0

    def no_training(*_):
        pytest.fail("this recipe was trained before")

    again = train(asked, digits, tmp_path, report=no_training)
    np.testing.assert_array_equal(again.weights, first.weights)
    np.testing.assert_array_equal(again.start, first.start)
    assert (again.history, again.provenance) == (first.history, first.provenance)

    seen = []
    anew = train(asked, digits, tmp_path, retrain=True, report=lambda samples, _: seen.append(samples))
    assert sum(seen) == 2 * 1500
    np.testing.assert_array_equal(anew.weights, first.weights)


def test_what_is_stored(digits, tmp_path):
    asked = recipe(digits)
    found = train(asked, digits, tmp_path)
    folder = runs.folder(tmp_path, asked)
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "history.csv",
        "minimizer.weights.h5",
        "provenance.json",
        "recipe.json",
        "start.weights.h5",
    ]
    assert json.loads((folder / "recipe.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(asked)))
    model = network_zoo.get("F1").build(seed=9)
    model.load_weights(folder / "minimizer.weights.h5")  # as Keras itself loads it
    np.testing.assert_array_equal(flat_weights(model), found.weights)
    assert found.provenance.packages["keras"].startswith("3.")
    assert found.provenance.wall_seconds > 0


def test_history(digits, tmp_path):
    asked = recipe(digits, epochs=3)
    plain = train(asked, digits, tmp_path)
    assert [row.epoch for row in plain.history] == [1, 2, 3]
    assert plain.history[2].train_loss < plain.history[0].train_loss
    assert {row.test_loss for row in plain.history} == {None}
    with pytest.raises(UserError, match=r"without a test history; train it anew with --retrain"):
        check_tested(asked, tmp_path)
    tested = train(asked, digits, tmp_path, test_history=True, retrain=True)
    np.testing.assert_array_equal(tested.weights, plain.weights)
    evaluation = Objective(asked.build(digits), digits.x_test, digits.y_test).evaluate(tested.weights)
    assert tested.history[2].test_loss == evaluation.loss
    assert tested.history[2].test_accuracy == evaluation.accuracy
    check_tested(asked, tmp_path)
    assert stored(asked, digits, tmp_path).history == tested.history


def test_stopped_trainings_keep_their_test_history(digits, tmp_path):
    asked = recipe(digits, epochs=3)

    def stop(_, note):
        if "epoch 2" in note:
            raise StoppedError

    def stopped(**settings):
        with pytest.raises(StoppedError):
            train(asked, digits, tmp_path, report=stop, **settings)

    stopped(test_history=True)
    continued = train(asked, digits, tmp_path)  # tested to the end, though not asked again
    check_tested(asked, tmp_path)
    assert stored(asked, digits, tmp_path).history == continued.history

    stopped(retrain=True)
    with pytest.raises(UserError, match="without a test history"):
        check_tested(asked, tmp_path)
    assert samples_to_train(asked, digits, tmp_path) == 2 * 1500  # the kept epoch is still there


def test_retraining_keeps_the_old_minimizer_until_there_is_a_new_one(digits, tmp_path):
    asked = recipe(digits)
    first = train(asked, digits, tmp_path)

    def stop(_, note):
        raise StoppedError

    for _ in range(2):
        with pytest.raises(StoppedError):
            train(asked, digits, tmp_path, retrain=True, report=stop)
        assert stored(asked, digits, tmp_path) is None
        (old,) = tmp_path.glob("*.before-retraining")
        assert runs.Folder(old).whole("minimizer.weights.h5")
    again = train(asked, digits, tmp_path)  # the plain command continues the new training
    assert again.provenance != first.provenance
    np.testing.assert_array_equal(again.weights, first.weights)
    assert not old.exists()


def test_a_diverging_training_says_where_and_leaves_the_last_good_epoch(digits, tmp_path):
    asked = recipe(digits, learning_rate=1e30)
    with pytest.raises(MachineError, match=r"diverged .* in epoch 1, step \d+: Recipe\(network='F1'.*seed=0"):
        train(asked, digits, tmp_path)
    folder = runs.folder(tmp_path, asked)
    assert not (folder / "minimizer.weights.h5").exists()
    start = flat_weights(asked.build(digits))
    np.testing.assert_array_equal(read_weights(asked.build(digits), folder / "last_good.weights.h5"), start)
    assert stored(asked, digits, tmp_path) is None
    solver = Solver(digits, tmp_path, runs.provenance())
    assert solver.seconds(solver.plan([asked])) > 0, "the probe for the cost leaves the message to the training"


def test_divergence_after_a_good_epoch(digits, tmp_path, monkeypatch):
    asked = recipe(digits)
    good = []

    def poison(self, *_):
        """Give the optimizer an infinite learning rate once the first epoch is kept."""
        kept(self, *_)
        good.append(flat_weights(self.model))
        self.optimizer.learning_rate.assign(np.inf)

    kept = TrainingLoop.save
    monkeypatch.setattr(TrainingLoop, "save", poison)
    with pytest.raises(MachineError, match=r"in epoch 2, step 2: .* weights after epoch 1 are in"):
        train(asked, digits, tmp_path)
    last_good = runs.folder(tmp_path, asked) / "last_good.weights.h5"
    np.testing.assert_array_equal(read_weights(asked.build(digits), last_good), good[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": -3}, "0 or more epochs, not -3"),
        ({"schedule": ((1, 0),)}, "at least 1 sample, not 0"),
        ({"schedule": ((2, 30), (1, 60))}, r"must be above 0 and ascend, not \[2, 1\]"),
        ({"batch_size": 0}, "at least 1 sample"),
        ({"batch_size": 1501}, "1,501 is larger than the training set of 1,500"),
        ({"seed": -1}, "seed must be 0 or greater"),
        ({"network": "F3"}, "no network 'F3'"),
        ({"definition": "thesis"}, "no definition 'thesis'"),
        ({"precision": "float8"}, "no precision 'float8'"),
    ],
)
def test_bad_recipes(digits, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        train(recipe(digits, **settings), digits, tmp_path)
    assert not list(tmp_path.iterdir())
