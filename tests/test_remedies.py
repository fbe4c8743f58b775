import signal
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import recipe

from large_batch import datasets, remedies, store, training
from large_batch.backend import keras, tf
from large_batch.errors import Interrupted, UserError
from large_batch.layers import pixels
from large_batch.minimizers import Minimizers
from large_batch.networks import Network
from large_batch.remedies import Remedy


@dataclass(frozen=True)
class Noise(Remedy):
    """Changes the batch, with random numbers."""

    amount: float = 0.1

    def batch(self, x, y, key):
        x = pixels(x)
        return x + self.amount * tf.random.stateless_uniform(tf.shape(x), key, alg="philox"), y


@dataclass(frozen=True)
class Line(Remedy):
    """Changes the loss, and the weights once more after each step."""

    factor: float = 1.0
    shift: float = 0.0
    shrink: float = 1.0

    def loss(self, loss, model, key):
        def changed(x, y):
            losses, logits = loss(x, y)
            return self.factor * losses + self.shift, logits

        return changed

    def step(self, step, model, key):
        def changed(loss, x, y):
            found = step(loss, x, y)
            for variable in model.trainable_variables:
                variable.assign(self.shrink * variable + self.shift)
            return found

        return changed


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, kind in {"nothing": Remedy, "noise": Noise, "line": Line}.items():
        monkeypatch.setitem(remedies.REMEDIES, name, kind)


def build(network, definition, classes, seed, precision):
    """Return softmax regression from zero."""
    layer = keras.layers.Dense(classes, kernel_initializer="zeros")
    return keras.Sequential([keras.Input(network.input_shape), layer])


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits", "unused").reshape_to((64,))


@pytest.fixture
def asked(data):
    """A recipe of that network with some remedies."""
    return lambda *names, **settings: recipe(data, network="linear", **settings, remedies=names)


@pytest.fixture
def train(asked, data, tmp_path):
    """Train with some remedies, in a store that a test has for itself."""

    def train(*names, place="a", report=lambda samples, note: None, **settings):
        here = Minimizers(Network("linear", build, "digits", (64,), 10), data, tmp_path / place)
        return here.train(asked(*names, **settings), report=report)

    return train


def test_a_remedy_that_changes_nothing_changes_no_bit(train):
    plain, nothing = train(), train("nothing", "line", "noise:amount=0")
    np.testing.assert_array_equal(nothing.weights, plain.weights)
    assert nothing.history == plain.history
    assert plain.distance > 0


def test_remedies_act_in_their_order(train):
    """In one step with the whole training set, from the loss log 10."""

    def loss_and_last_bias(*names):
        found = train(*names, batch_size=1500, epochs=1)
        return found.history[0].train_loss, found.weights[-1]

    _, bias = loss_and_last_bias()
    for names, loss, weight in (
        (["line:factor=2", "line:shift=1"], 2 * np.log(10) + 1, bias + 1),
        (["line:shift=1", "line:factor=2"], 2 * (np.log(10) + 1), bias + 1),
        (["line:shift=1", "line:shrink=3"], np.log(10) + 1, 3 * (bias + 1)),
        (["line:shrink=3", "line:shift=1"], np.log(10) + 1, 3 * bias + 1),
    ):
        assert loss_and_last_bias(*names) == pytest.approx((loss, weight), rel=1e-6), names


def test_a_training_stopped_within_an_epoch_draws_the_same_random_numbers(train, monkeypatch):
    monkeypatch.setattr(training, "BLOCK", 1)  # one step at a time
    monkeypatch.setattr(training, "COMPILED_BATCH", 0)  # which would take longer than these steps
    names = ["noise", "line:shrink=0.99", "noise:amount=0.2"]
    whole = train(*names)
    stopped = []

    def stop(_, note):
        stopped.append(note)
        if len(stopped) == 13:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="epoch 2/2"):
        train(*names, place="b", report=stop)
    continued = train(*names, place="b")
    np.testing.assert_array_equal(continued.weights, whole.weights)
    assert continued.history == whole.history
    assert not np.array_equal(train(*names[::-1]).weights, whole.weights)


def test_keys_differ_by_seed_step_and_place():
    cases = [(seed, step, place) for seed in (0, 1) for step in (0, 1, 10**10) for place in (0, 1)]

    def keys():
        return [tuple(remedies.key_of(seed, tf.constant(step, tf.int64), place).numpy()) for seed, step, place in cases]

    assert len(set(keys())) == len(cases)
    assert keys() == keys()


def test_a_remedy_that_does_not_exist(asked):
    with pytest.raises(UserError, match="no remedy 'sam'; choose among .*noise"):
        asked("noise", "sam")


@pytest.mark.parametrize("text", ["noise:loud=1", "noise:amount=much", "noise:amount", "noise:0.3", "nothing:amount=1"])
def test_a_bad_setting(asked, text):
    with pytest.raises(UserError, match=f"settings of the remedy '{text}' must be like no.+:setting=0.1"):
        asked(text)


def test_remedies_have_folders_of_their_own(asked, data):
    cases = [(), ("noise",), ("noise:amount=0.2",), ("noise", "line"), ("line", "noise")]
    assert len({store.folder("runs", asked(*names)) for names in cases}) == len(cases)
    assert store.folder("runs", asked()) == store.folder("runs", recipe(data, network="linear"))
