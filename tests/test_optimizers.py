from dataclasses import dataclass

import numpy as np
import pytest
import scipy.optimize
from sklearn.datasets import load_digits

from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.optimizers import FusedAdam, canonical, make

SHAPES = (40, 30), (7,), (3, 3, 2, 4)


def walk(optimizer, steps=50):
    """Variables after some steps along random gradients of very different sizes."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype(np.float32)) for shape in SHAPES]
    before = [variable.numpy() for variable in variables]
    optimizer.build(variables)
    step = tf.function(lambda gradients: optimizer.apply(gradients, variables))
    for _ in range(steps):
        size = 10.0 ** rng.uniform(-6, 1)
        step([tf.constant(size * rng.normal(size=shape), tf.float32) for shape in SHAPES])
    return np.concatenate([(v.numpy() - b).ravel() for v, b in zip(variables, before, strict=True)])


# The fused operation rounds beta_1 and beta_2 to float32, 6e-8 of 1, before it takes 1 - beta: 0.001 of ADAM's beta_2
# is then wrong by 6e-5.
ROUNDED_BETA = 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-2, "epsilon": 1e-8},
        {"learning_rate": 0.03, "beta_1": 0.7, "beta_2": 0.95, "epsilon": 1e-3},
    ],
)
def test_the_fused_adam_is_keras_adam(settings):
    ours, theirs = (walk(kind(**settings)) for kind in (FusedAdam, keras.optimizers.Adam))
    assert np.linalg.norm(ours - theirs) < ROUNDED_BETA * np.linalg.norm(theirs)
    assert np.linalg.norm(theirs) > 1


def test_what_it_does_not_compute_is_refused():
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdam(amsgrad=True)


def test_optimizers_by_name():
    adam = make("adam").build()
    assert isinstance(adam, FusedAdam)
    assert [float(adam.learning_rate), adam.beta_1, adam.beta_2, adam.epsilon] == pytest.approx(
        [1e-3, 0.9, 0.999, 1e-8]
    )
    sgd = make("sgd:momentum=0.9,learning_rate=0.5,nesterov=1").build()
    assert (type(sgd), float(sgd.learning_rate), sgd.momentum, sgd.nesterov) == (keras.optimizers.SGD, 0.5, 0.9, True)
    adagrad = make("adagrad").build()
    assert (type(adagrad), adagrad.initial_accumulator_value) == (keras.optimizers.Adagrad, 0)
    v, gradient = keras.Variable([1.0, 2.0]), np.array([1e-3, 1e-5])
    adagrad.apply([tf.constant(gradient, "float32")], [v])
    keras_1 = 0.01 * gradient / (np.sqrt(gradient**2) + 1e-8)
    np.testing.assert_allclose([1.0, 2.0] - keras_1, v, atol=2e-5)
    assert canonical("adaqn:learning_rate=1e-2,pairs=5,cycle=20") == "adaqn:pairs=5"
    assert canonical("adam:epsilon=1e-8") == "adam"
    defaults = {"learning_rate": 0.01, "cycle": 20, "pairs": 10, "gradients": 100, "growth": 1.01, "curvature": 1e-4}
    assert vars(make("adaqn")) == defaults | {"epsilon": 1e-8}, "names leave them out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lars", "no optimizer 'lars'; choose one of adam, adagrad, sgd, adaqn"),
        ("sgd:speed=1", "'sgd:speed=1' cannot have the setting 'speed'; sgd has these, each once: learning_rate, mom"),
        ("sgd:momentum=0,momentum=1", "cannot have the setting 'momentum'"),
        ("sgd:momentum=1.5", "setting momentum of the optimizer sgd must be a number from 0 to 1, not '1.5'"),
        ("adam:learning_rate=-1", "must be a number of at least 0, not '-1'"),
        ("adam:learning_rate=inf", "not 'inf'"),
        ("adam:learning_rate", "not ''"),
        (
            "sgd:cosine=" + 400 * "9",
            "cosine of the optimizer sgd must be a whole number of at least 0, not '99",
        ),
        ("adaqn:cycle=2.5", "must be a whole number of at least 1, not '2.5'"),
    ],
)
def test_a_bad_text(text, message):
    with pytest.raises(UserError, match=message):
        make(text)


def test_what_they_keep_for_each_weight():
    for text in ("adam", "adagrad", "sgd:momentum=0.9", "adaqn:pairs=3,gradients=5"):
        optimizer = make(text).build()
        optimizer.build([keras.Variable(np.zeros((50, 40), np.float32))])
        assert sum(np.size(variable) for variable in optimizer.variables) // 2000 == make(text).kept


# adaQN


@dataclass
class Logistic:
    """Logistic regression on 300 of the digits, 0 to 4 against the others, a convex problem."""

    x: np.ndarray
    y: np.ndarray
    penalty: float = 1e-2

    def loss(self, w, rows=slice(None)):
        margin = self.y[rows] * (self.x[rows] @ w)
        return np.logaddexp(0, -margin).mean() + self.penalty / 2 * w @ w

    def gradient(self, w, rows=slice(None)):
        margin = self.y[rows] * (self.x[rows] @ w)
        return -(self.y[rows] / (1 + np.exp(margin))) @ self.x[rows] / len(self.y[rows]) + self.penalty * w


@pytest.fixture(scope="module")
def problem():
    x, y = load_digits(return_X_y=True)
    return Logistic(x[:300] / 16, np.where(y[:300] < 5, 1.0, -1.0))


def batches(steps, size):
    rng = np.random.default_rng(0)
    return [np.sort(rng.choice(300, size, replace=False)) for _ in range(steps)]


def adaqn_by_keras(problem, rows_of, monitored, text):
    """The weights after each step, in two variables."""
    settings = make(text)
    optimizer = settings.build()
    variables = [keras.Variable(np.zeros((4, 8), np.float32)), keras.Variable(np.zeros(32, np.float32))]
    optimizer.build(variables)
    x, y = tf.constant(problem.x[monitored], tf.float32), tf.constant(problem.y[monitored], tf.float32)

    def loss(weights):
        w = tf.concat([tf.reshape(part, [-1]) for part in weights], axis=0)
        return tf.reduce_mean(tf.nn.softplus(-y * tf.linalg.matvec(x, w))) + problem.penalty / 2 * tf.reduce_sum(w * w)

    apply = tf.function(lambda a, b: optimizer.apply([a, b], variables))
    end_cycle = tf.function(lambda: optimizer.end_cycle(loss))
    found = []
    for step, rows in enumerate(rows_of, start=1):
        w = np.concatenate([variable.numpy().ravel() for variable in variables]).astype(np.float64)
        g = problem.gradient(w, rows).astype(np.float32)
        apply(g[:32].reshape(4, 8), g[32:])
        if step % settings.cycle == 0:
            end_cycle()
        found.append(np.concatenate([variable.numpy().ravel() for variable in variables]))
    return np.array(found)


def adaqn_by_hand(problem, rows_of, monitored, text):
    """Algorithm 1 in NumPy, with lists: the weights after each step, and how often it went back."""
    o = make(text)
    w, total, good, squares = np.zeros(64), np.zeros(64), None, np.zeros(64)
    pairs, past, found, back = [], [], [], 0
    for step, rows in enumerate(rows_of, start=1):
        g = problem.gradient(w, rows)
        past, squares = [*past, g][-o.gradients :], squares + g**2
        # The matrix itself, built up by the formula of BFGS
        h = np.diag(1 / np.sqrt(squares + o.epsilon))
        for s, y in pairs:
            v = np.eye(64) - np.outer(y, s) / (s @ y)
            h = v.T @ h @ v + np.outer(s, s) / (s @ y)
        w = w - o.learning_rate * h @ g
        total += w
        if step % o.cycle == 0:
            mean, total = total / o.cycle, np.zeros(64)
            if good is None:
                good = mean
            elif problem.loss(mean, monitored) > o.growth * problem.loss(good, monitored):
                pairs, past, w, back = [], [], good, back + 1
            else:
                s = mean - good
                y = np.mean([g * (g @ s) for g in past], axis=0)
                if s @ y > o.curvature * s @ s:
                    pairs, good = [*pairs, (s, y)][-o.pairs :], mean
        found.append(w)
    return np.array(found), back


@pytest.mark.parametrize("growth", [1.01, 1e9])
def test_adaqn_is_its_algorithm(problem, growth):
    """With memories that overflow, and steps so long that some lead back to where it was good."""
    text = f"adaqn:learning_rate=0.5,cycle=3,pairs=2,gradients=5,growth={growth}"
    case = problem, batches(40, 30), np.arange(40), text
    ours, (theirs, back) = adaqn_by_keras(*case), adaqn_by_hand(*case)
    assert (back > 0) == (growth < 2)
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)  # float32 against float64


def test_adaqn_finds_the_minimum_of_a_convex_problem_that_lbfgs_finds(problem):
    """Its pairs bring it there sooner than ADAGRAD's diagonal alone."""
    best = scipy.optimize.minimize(problem.loss, np.zeros(64), jac=problem.gradient, method="L-BFGS-B").fun
    case = problem, batches(400, 300), np.arange(300)
    found = problem.loss(adaqn_by_keras(*case, "adaqn:cycle=5")[-1].astype(float))
    alone = problem.loss(adaqn_by_hand(*case, "adaqn:cycle=5,curvature=1e9")[0][-1])
    start = problem.loss(np.zeros(64))
    assert found - best < 0.01 * (start - best) < alone - best


def test_weight_decay_is_part_of_the_gradient():
    """As in PyTorch: in the momentum, too."""
    optimizer = make("sgd:learning_rate=0.1,momentum=0.9,weight_decay=0.5").build()
    w, buffer = np.array([1.0, -2.0]), np.zeros(2)
    variable = keras.Variable(w.astype(np.float32))
    optimizer.build([variable])
    for gradient in ([0.3, 0.1], [-0.2, 0.4], [1.0, 0.0]):
        optimizer.apply([tf.constant(gradient)], [variable])
        buffer = 0.9 * buffer + np.array(gradient) + 0.5 * w
        w = w - 0.1 * buffer
    np.testing.assert_allclose(variable.numpy(), w, rtol=1e-5)
