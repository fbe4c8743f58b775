"""What a remedy does to a step, each against a few lines of NumPy, for softmax regression on the digits."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.ndimage
from conftest import recipe
from quick import run_code

from large_batch import datasets, layers, named, remedies, store, training
from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.minimizers import Minimizers
from large_batch.networks import Network
from large_batch.remedies import Augment, Conservative, Moment, Remedy

IMAGES = (8, 8, 1)


@dataclass(frozen=True)
class Line(Remedy):
    """Changes the loss, and the weights once more after each step."""

    factor: float = remedies.number(1.0)
    shift: float = remedies.number(0.0)
    shrink: float = remedies.number(1.0)

    def loss(self, loss, now):
        def changed(x, y, weights=None):
            losses, logits = loss(x, y, weights)
            return self.factor * losses + self.shift, logits

        return changed

    def step(self, step, now):
        def changed(loss, x, y):
            found = step(loss, x, y)
            for variable in now.model.trainable_variables:
                variable.assign(self.shrink * variable + self.shift)
            return found

        return changed


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, kind in {"nothing": Remedy, "line": Line}.items():
        monkeypatch.setitem(remedies.REMEDIES, name, kind)


@pytest.fixture
def uncompiled(monkeypatch):
    """XLA would take longer to compile than these steps take."""
    monkeypatch.setattr(training, "COMPILED_BATCH", 0)


def build(network, definition, classes, seed, precision):
    """Return softmax regression on images, with moving averages and dropout, which have a state."""
    layers = keras.layers
    extra = [layers.BatchNormalization(), layers.Dropout(0.2, seed=3)] if network.name == "state" else []
    dense = layers.Dense(classes, kernel_initializer=keras.initializers.RandomNormal(0, 0.1, seed=seed))
    return keras.Sequential([keras.Input(network.input_shape), layers.Flatten(), *extra, dense])


@functools.cache
def data():
    return datasets.load_data("digits", "unused").reshape_to(IMAGES)


def asked(*names, network="linear", **settings):
    """A recipe of that network with some remedies."""
    return recipe(data(), network=network, remedies=names, **settings)


def train(run_dir, *names, keep=(), **settings):
    chosen = asked(*names, **settings)
    return Minimizers(Network(chosen.network, build, "digits", IMAGES, 10), data(), run_dir).train(chosen, keep=keep)


# One step of each, by hand


class Softmax:
    """Softmax regression in float64: gradients of mean losses with respect to kernel and bias, in one row."""

    def __init__(self, x, y):
        self.x, self.targets = x, np.eye(10)[y]

    def probabilities(self, w, x=None):
        logits = (self.x if x is None else x) @ w[:-10].reshape(64, 10) + w[-10:]
        return scipy.special.softmax(logits, axis=1)

    def from_errors(self, errors, x=None):
        """The gradient from that of the losses with respect to the logits."""
        return np.append(((self.x if x is None else x).T @ errors).ravel(), errors.sum(axis=0)) / len(errors)

    def gradient(self, w, x=None):
        return self.from_errors(self.probabilities(w, x) - self.targets, x)


def plain(f, w):
    return -f.gradient(w)


def adversarial(f, w):
    slope = (f.probabilities(w) - f.targets) @ w[:-10].reshape(64, 10).T
    return -0.3 * f.gradient(w) - 0.7 * f.gradient(w, f.x + 0.1 * np.sign(slope))


def stability(f, w):
    key = remedies.key_of(0, tf.constant(0, tf.int64), 0)
    noisy = f.x + 0.5 * layers.normal(f.x.shape, key).numpy()
    p, q = f.probabilities(w), f.probabilities(w, noisy)
    surprise = -np.log(q) + (p * np.log(q)).sum(axis=1, keepdims=True)
    return -f.gradient(w) - 2 * (f.from_errors(p * surprise) + f.from_errors(q - p, noisy))


def sam(f, w):
    g = f.gradient(w)
    return -f.gradient(w + 0.5 * g / np.linalg.norm(g))


def asam(f, w):
    g, t = f.gradient(w), np.append(np.abs(w[:-10]) + 0.1, np.ones(10))
    return -f.gradient(w + 0.5 * t**2 * g / np.linalg.norm(t * g))


def conservative(f, w):
    moved = w
    for _ in range(3):
        moved = moved - f.gradient(moved) - 0.5 * (moved - w)
    return moved - w


def both(f, w):
    """SAM's steps on the proximal problem."""
    moved = w
    for _ in range(2):
        g = f.gradient(moved)
        near = moved + 0.5 * g / np.linalg.norm(g)
        moved = moved - f.gradient(near) - 0.5 * (moved - w)
    return moved - w


@pytest.mark.parametrize(
    ("texts", "by_hand"),
    [
        ([], plain),
        (["adversarial:radius=0.1,share=0.3"], adversarial),
        (["stability:strength=2,deviation=0.5"], stability),
        (["sam:radius=0.5"], sam),
        (["asam:radius=0.5,eta=0.1"], asam),
        (["conservative:strength=0.5"], conservative),
        (["sam:radius=0.5", "conservative:strength=0.5,iterations=2"], both),
    ],
)
def test_one_step(texts, by_hand, tmp_path, uncompiled):
    """Of the whole training set, with SGD of learning rate 1."""
    found = train(tmp_path, *texts, optimizer="sgd:learning_rate=1", batch_size=1500, epochs=1)
    digits, order = data(), np.random.default_rng([0, 0]).permutation(1500)
    f = Softmax(digits.x_train[order].reshape(-1, 64) / 255.0, digits.y_train[order])
    expected = by_hand(f, found.start)
    assert np.linalg.norm(found.weights - found.start - expected) < 1e-5 * np.linalg.norm(expected)
    loss = -np.log(f.probabilities(found.start)[f.targets == 1]).mean()
    if by_hand not in (adversarial, stability):  # whose losses are others
        assert found.history[0].train_loss == pytest.approx(loss, rel=1e-5)


def test_the_proximal_problem_of_a_quadratic_has_its_known_solution():
    """The minimizer of a/2 (w - c)^2 + strength/2 (w - w_k)^2 is (a c + strength w_k) / (a + strength)."""
    a, c, start = np.array([1.0, 4.0]), np.array([2.0, -1.0]), np.array([0.5, 3.0])
    w = keras.Variable(start.astype(np.float32))
    model = type("Model", (), {"trainable_variables": [w]})

    def loss(x, y, weights=None):
        return tf.reduce_sum(a.astype(np.float32) / 2 * tf.square(tf.convert_to_tensor(w) - c.astype(np.float32))), None

    def step(loss, x, y):
        with tf.GradientTape() as tape:
            value, _ = loss(x, y)
        w.assign_sub(0.2 * tape.gradient(value, w.value))
        return value, None

    now = Moment(model, None, None, None, None, None)
    Conservative(strength=2, iterations=50).step(step, now)(loss, None, None)
    np.testing.assert_allclose(w.numpy(), (a * c + 2 * start) / (a + 2), rtol=1e-6)


def test_augmented_images():
    """Reflected, rotated and shifted as SciPy does it by the same amounts, which keep to their bounds."""
    rng = np.random.default_rng(0)
    x = scipy.ndimage.gaussian_filter(rng.random((200, 20, 16, 1)), (0, 2, 2, 0)).astype(np.float32)
    remedy, key = Augment(), remedies.key_of(3, tf.constant(7, tf.int64), 0)
    ours = remedy.batch(tf.constant(x), None, key)[0].numpy()
    np.testing.assert_array_equal(ours, Augment().batch(tf.constant(x), None, key)[0])
    assert not np.allclose(ours, remedy.batch(tf.constant(x), None, key + 1)[0])
    drawn = []
    for place, layer in enumerate(remedy._layers):
        layer.generator.state.assign(remedies._fold_in(key, place))
        drawn.append(layer.get_random_transformation(tf.constant(x)))
    flips = drawn[0]["flips"].numpy().ravel()
    angles, shifts = drawn[1]["angle"].numpy(), drawn[2]["translations"].numpy()
    assert 70 < flips.sum() < 130
    for values, bound in ((angles, 10), (shifts[:, 0] / 16, 0.2), (shifts[:, 1] / 20, 0.2)):
        assert 0.95 * bound < np.abs(values).max() <= bound
        assert abs(values.mean()) < 0.2 * bound
    for image, found, flip, angle, (right, down) in zip(x, ours, flips, np.radians(angles), shifts, strict=True):
        image = image[:, ::-1, 0] if flip else image[..., 0]
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        middle = np.array([9.5, 7.5])
        for matrix, offset in ((turn, middle - turn @ middle), (np.eye(2), [-down, -right])):
            image = scipy.ndimage.affine_transform(image, matrix, offset, order=1, mode="nearest")
        np.testing.assert_allclose(found[..., 0], image, atol=1e-4)


# What is true of all


LIMITS = [
    ("nothing", "line", "conservative:iterations=1", "augment:reflect=0,angle=0,shift=0"),
    ("adversarial:radius=0",),
    ("adversarial:share=1", "stability:strength=0"),
    ("sam:radius=0",),
    ("asam:radius=0",),
]


def test_in_their_limits_they_are_plain_training_to_the_bit(tmp_path, uncompiled):
    """Also where the network has moving averages, and masks of dropout that are drawn one after the other."""
    expected = train(tmp_path, network="state")
    assert expected.distance > 0
    for texts in LIMITS:
        found = train(tmp_path, *texts, network="state")
        np.testing.assert_array_equal(found.weights, expected.weights, str(texts))
        assert found.history == expected.history, texts
        for ours, theirs in zip(found.state, expected.state, strict=True):
            np.testing.assert_array_equal(ours, theirs, str(texts))


def test_so_they_are_in_each_iteration_of_a_proximal_problem(tmp_path, uncompiled):
    """Keras' own dropout draws a mask for each; both gradients of SAM are to see the same."""
    alone, both = (
        train(tmp_path, *names, "conservative:iterations=2", network="state") for names in ((), ("sam:radius=0",))
    )
    np.testing.assert_array_equal(both.weights, alone.weights)


def test_also_where_xla_compiles_the_steps(tmp_path):
    found = train(tmp_path, "adversarial:radius=0", "asam:radius=0")
    np.testing.assert_array_equal(found.weights, train(tmp_path).weights)


def test_three_steps_without_a_proximal_term_are_three_steps(tmp_path, uncompiled):
    """Also with `fresh` in the first problem, but not in the second, where ADAM's moments begin anew."""
    three = train(tmp_path, batch_size=1500, epochs=3)
    solved = [f"conservative:strength=0,fresh={fresh}" for fresh in (0, 1)]
    second = [train(tmp_path, text, batch_size=1500, epochs=2, keep=[1]).weights for text in solved]
    first = [train(tmp_path, text, batch_size=1500, epochs=1).weights for text in solved]
    np.testing.assert_allclose(first[0], three.weights, rtol=0, atol=1e-5 * np.abs(three.weights).max())
    np.testing.assert_array_equal(*first)
    assert not np.allclose(*second, atol=1e-4)


def test_a_fresh_optimizer_keeps_the_learning_rate_of_its_epoch(tmp_path, uncompiled):
    """SGD without momentum has nothing else to forget."""
    texts = [f"conservative:fresh={fresh}" for fresh in (0, 1)]
    found = [train(tmp_path, text, optimizer="sgd:cosine=2,learning_rate=0.5") for text in texts]
    np.testing.assert_array_equal(*(one.weights for one in found))


def test_they_act_in_their_order(tmp_path, uncompiled):
    """In one step with the whole training set."""

    def loss_and_last_bias(*names):
        found = train(tmp_path, *names, batch_size=1500, epochs=1)
        return found.history[0].train_loss, found.weights[-1]

    before, bias = loss_and_last_bias()
    scale, shift = "line:factor=2,shrink=3", "line:shift=1"
    assert loss_and_last_bias(scale, shift) == pytest.approx((2 * before + 1, 3 * bias + 1), rel=1e-5)
    assert loss_and_last_bias(shift, scale) == pytest.approx((2 * (before + 1), 3 * (bias + 1)), rel=1e-5)


TOGETHER = {  # what keeps a state, with what draws random numbers
    "adam": ("stability", "conservative:iterations=2"),
    "adaqn:cycle=4,pairs=2": ("adversarial", "asam"),
    "sgd:momentum=0.9": ("sam", "augment"),
}
KILLED = """
import os, signal
from pathlib import Path
from large_batch import training
import test_remedies

training.COMPILED_BATCH = 0
replace = os.replace

def killing(source, target):
    if Path(target).name == "checkpoint-000000020.npz":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

for optimizer, names in test_remedies.TOGETHER.items():
    child = os.fork()
    if child == 0:
        os.replace = killing
        test_remedies.train(sys.argv[1], *names, network="state", optimizer=optimizer)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_killed_trainings_continue_with_the_same_random_numbers_and_state(run_script, tmp_path, uncompiled):
    done = run_code(run_script, tmp_path, KILLED, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    for optimizer, names in TOGETHER.items():
        settings = {"network": "state", "optimizer": optimizer}
        whole, continued = (train(tmp_path / place, *names, **settings) for place in ("whole", "killed"))
        np.testing.assert_array_equal(continued.weights, whole.weights, optimizer)
        assert continued.history == whole.history
        assert len(continued.provenance.earlier) == 1, "it was killed after the first epoch"


def test_keys_differ_by_seed_step_and_place():
    cases = list(itertools.product((0, 1), (0, 1, 10**10), (0, 1)))

    def keys():
        return [tuple(remedies.key_of(seed, tf.constant(step, tf.int64), place).numpy()) for seed, step, place in cases]

    assert len(set(keys())) == len(cases)
    assert keys() == keys()


def test_their_cost():
    """Passes of each sample through the network, 3 in plain training, and how many are kept at a time."""
    cases = {(): (3, 1), ("augment",): (3, 1), ("conservative",): (9, 1), ("adversarial",): (7, 2)}
    cases |= {("stability", "conservative:iterations=2"): (12, 2), ("sam",): (6, 1), ("asam", "adversarial"): (14, 2)}
    assert {names: (asked(*names).passes, asked(*names).held) for names in cases} == cases


def test_normal_numbers():
    found = layers.normal([100_000], tf.constant([1, 2], tf.int64)).numpy()
    assert np.isfinite(found).all()
    assert scipy.stats.kstest(found, "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutout", "no remedy 'cutout'; choose one of augment, conservative, adversarial, stability, sam, asam"),
        ("sam:rho=1", "The remedy 'sam:rho=1' cannot have the setting 'rho'; sam has these, each once: radius"),
        ("sam:radius=much", "The setting radius of the remedy sam must be a number of at least 0, not 'much'"),
        ("sam:radius", "not ''"),
        ("asam:0.3", "cannot have the setting '0.3'"),
        ("stability:strength=-1", "not '-1'"),
        ("adversarial:share=1.1", "share of the remedy adversarial must be a number from 0 to 1, not '1.1'"),
        ("conservative:iterations=0", "must be a whole number of at least 1, not '0'"),
        ("augment:reflect=0.5", "must be a whole number from 0 to 1, not '0.5'"),
        ("nothing:amount=1", "nothing has none"),
    ],
)
def test_a_bad_text(text, message):
    with pytest.raises(UserError, match=message):
        asked(text)


def test_images_only():
    with pytest.raises(UserError, match=r"augment is for images, \(height, width, channels\), not samples of \(64,\)"):
        asked("augment").check(data().reshape_to((64,)))


def test_remedies_have_folders_of_their_own():
    cases = [(), ("sam",), ("sam:radius=0.2",), ("sam", "augment"), ("augment", "sam")]
    assert len({store.folder("runs", asked(*names)) for names in cases}) == len(cases)
    assert store.folder("runs", asked()) == store.folder("runs", recipe(data(), network="linear"))
    defaults = {"conservative": [1e-3, 3, 0], "adversarial": [0.25, 0.5], "stability": [0.01, 0.2], "sam": [0.05]}
    for name, values in defaults.items():
        assert list(vars(remedies.make(name)).values()) == values, "texts and folders leave them out"
    same = [("asam:radius=0.5,eta=0.1",), (" asam:eta=1e-1",), ("asam:eta=0.10,radius=5e-1",)]
    assert {store.folder("runs", asked(*names)).name for names in same} == {store.folder("", asked(*same[0])).name}
    assert store.folder("runs", asked("sam", optimizer="sgd:momentum=0.9")).name.startswith(
        "linear-digits-b150-e2-s0-sgd-sam-"
    )


def test_a_list_of_texts():
    assert named.split("augment,asam:radius=1,eta=0,sam") == ("augment", "asam:radius=1,eta=0", "sam")
