"""The largest eigenvalue during training: against explicit matrices, and without a trace in the training."""

import csv

import numpy as np
import pytest
import quick
from quick import minimizers, stop_in_epoch
from small_network import NAME, SMALL
from test_objective import closed_form, dense

from edge_of_stability import Settings
from large_batch import datasets
from large_batch.backend import keras, tf
from large_batch.curvature_figures import edge_of_stability
from large_batch.errors import UserError
from large_batch.hessian import TOLERANCE
from large_batch.layers import pixels
from large_batch.models import point_of
from large_batch.objective import Objective, flat_weights
from large_batch.optimizers import FusedAdam
from large_batch.recipes import Track
from large_batch.tracking import TrackEigenvalue, edge, look, preconditioner


@pytest.fixture(scope="module")
def samples():
    data = datasets.load_data("digits", "unused")
    return data.x_train.reshape(-1, 64) / np.float32(255), data.y_train


def fitted(samples, optimizer, *callbacks, epochs=3):
    """Return a softmax regression after a few epochs; the callbacks are made of it."""
    keras.utils.set_random_seed(0)
    model = dense(keras.layers.Dense(10))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    made = [make(model) for make in callbacks]
    model.fit(*samples, batch_size=500, epochs=epochs, verbose=0, callbacks=made)
    return model, made


@pytest.mark.parametrize("adam", [keras.optimizers.Adam, FusedAdam])
def test_the_preconditioner_is_what_a_step_divides_by(samples, adam):
    model, _ = fitted(samples, adam(0.01))
    optimizer, before = model.optimizer, flat_weights(model)
    assert preconditioner(adam(0.01)) is None, "nothing before the first step"
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(samples[1], model(samples[0]), True))
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    mean = np.concatenate([np.ravel(moment.numpy()) for moment in optimizer._momentums])
    step = -0.01 * mean / preconditioner(optimizer)
    np.testing.assert_allclose(flat_weights(model) - before, step, rtol=0.01, atol=1e-3 * np.abs(step).max())


def test_both_eigenvalues_against_the_explicit_hessian(samples):
    x, y = samples
    model, _ = fitted(samples, FusedAdam(0.01))
    found = look(Objective(model, x, y), model, model.optimizer, step=9)
    loss, _, hessian, _ = closed_form(flat_weights(model), np.hstack([x, np.ones((len(x), 1))]), y)
    root = preconditioner(model.optimizer) ** -0.5
    assert found.step == 9
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.eigenvalue == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=2 * TOLERANCE)
    expected = np.linalg.eigvalsh(root[:, None] * hessian * root)[-1]
    assert found.preconditioned == pytest.approx(expected, rel=2 * TOLERANCE)
    assert (found.edge, found.preconditioned_edge) == pytest.approx((2 / 0.01, 38 / 0.01), rel=1e-5)
    scaled = keras.optimizers.LossScaleOptimizer(model.optimizer)
    assert look(Objective(model, x, y), model, scaled, step=9) == found, "the optimizer within counts"
    model.set_weights([np.full_like(weights, np.nan) for weights in model.get_weights()])
    assert look(Objective(model, x, y), model, model.optimizer, step=9).eigenvalue is None


def test_a_look_takes_the_state_of_the_model_and_leaves_that_of_the_objective(samples):
    x, y = samples
    model = dense(keras.layers.BatchNormalization(), keras.layers.Dense(10))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    objective, before = Objective(model, x, y), point_of(model).state
    objective.check()
    model.fit(x, y, verbose=0)
    found = look(objective, model, model.optimizer, step=1)
    assert found.loss == objective.value(point_of(model)) != objective.value(flat_weights(model))
    for kept, first in zip(objective.state, before, strict=True):
        np.testing.assert_array_equal(kept, first)
    with pytest.raises(UserError, match="have changed since the objective took them; call take_state"):
        objective.check()
    objective.take_state(model)
    objective.check()
    assert found.loss == objective.value(w := flat_weights(model))
    model.layers[0].trainable = False
    with pytest.raises(UserError, match="Layers were frozen or set free since this objective was made"):
        objective.value(w)


def test_an_optimizer_leaves_a_valley_beyond_its_edge(samples):
    """On h x^2 / 2 it comes down where h is just below the edge, and goes up just above."""
    for make in (
        lambda: keras.optimizers.SGD(0.5),
        lambda: keras.optimizers.SGD(0.5, 0.9),
        lambda: keras.optimizers.SGD(0.5, 0.9, nesterov=True),
    ):
        for share, down in ((0.97, True), (1.03, False)):
            optimizer, x = make(), keras.Variable(1.0)
            curvature = share * edge(optimizer, 0.5)
            path = []
            for _ in range(300):
                optimizer.apply([curvature * x], [x])
                path.append(abs(float(x)))
            assert (max(path[-30:]) < 0.1) == down
    momentum, rate = 0.9, 1e-3  # ADAM with a preconditioner of 1 that stays
    for share, down in ((0.99, True), (1.01, False)):
        x, mean = 1.0, 0.0
        for _ in range(3000):
            mean = momentum * mean + (1 - momentum) * share * 38 / rate * x
            x -= rate * mean
        assert (abs(x) < 0.1) == down


def test_the_callback_leaves_no_trace(samples):
    x, y = samples
    plain, _ = fitted(samples, "sgd")
    followed, (track,) = fitted(samples, "sgd", lambda m: TrackEigenvalue(Objective(m, x[:200], y[:200]), every=4))
    np.testing.assert_array_equal(flat_weights(followed), flat_weights(plain))
    steps = -(-len(x) // 500) * 3
    assert [row.step for row in track.rows] == list(range(0, steps + 1, 4))
    assert all(row.preconditioned is None for row in track.rows), "SGD has none"
    again = look(Objective(followed, x[:200], y[:200]), followed, followed.optimizer, steps)
    assert track.rows[-1].loss > again.loss > 0
    with pytest.raises(UserError, match="not every 0 steps"):
        TrackEigenvalue(Objective(followed, x, y), every=0)


def test_several_steps_at_once_and_a_training_that_goes_on(samples):
    x, y = samples
    model = dense(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, steps_per_execution=4)
    track = TrackEigenvalue(Objective(model, x[:200], y[:200]), every=3)
    for seen in ([0, 4, 8, 10], [0, 4, 8, 10, 14, 18]):  # 10 steps an epoch, 4, 4 and 2 of them; 20 is in 18's three
        model.fit(x[:1000], y[:1000], batch_size=100, epochs=1, verbose=0, callbacks=[track])
        assert [row.step for row in track.rows] == seen
    for samples, more in ((1000, [0, 4, 8, 10]), (200, [0]), (200, [0])):
        seen += more
        model.compile("sgd", loss, steps_per_execution=4)
        model.fit(x[:samples], y[:samples], batch_size=100, epochs=1, verbose=0, callbacks=[track])
        assert [row.step for row in track.rows] == seen, "compiled anew, it counts from 0"


def test_a_rate_that_falls_to_nothing(samples):
    """A cosine ends at 0, where no curvature is too large; the training goes on."""
    x, y = samples
    rate = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=4)
    for optimizer in (keras.optimizers.SGD(rate), keras.optimizers.Adam(rate)):
        _, (track,) = fitted(samples, optimizer, lambda m: TrackEigenvalue(Objective(m, x[:200], y[:200]), every=4))
        assert [row.edge for row in track.rows] == [pytest.approx(2 / 0.1), np.inf, np.inf]
    assert track.rows[-1].preconditioned_edge == np.inf
    rows = {"SB": track.rows}
    figure = edge_of_stability(rows, {"SB": 4}, "")
    figure.draw_without_rendering()
    assert figure.axes[0].get_ylim()[1] < 1e3


def test_our_training_leaves_no_trace_and_repeats_what_it_saw(digits, tmp_path):
    """Killed within an epoch and continued, it sees the same, and the minimizer is that of the plain recipe."""
    plain = minimizers(digits, tmp_path / "plain").train(quick.recipe(digits, batch_size=200, epochs=3))
    asked = quick.recipe(digits, batch_size=200, epochs=3, track="eigenvalue:5:300")
    found = minimizers(digits, tmp_path / "followed")
    np.testing.assert_array_equal(found.train(asked, keep=[1]).weights, plain.weights)
    rows = found.tracked(asked)
    assert [row.step for row in rows] == [0, 5, 10, 15, 20]
    seen = Objective(found.build(asked), digits.x_train[:300], digits.y_train[:300], prepare=pixels)
    assert rows[0].loss == pytest.approx(seen.value(flat_weights(found.build(asked))), rel=1e-5)
    assert [row.step for row in found.tracked(asked.at_epoch(1))] == [0, 5]
    assert [row.preconditioned is None for row in rows] == [True] + 4 * [False]
    stopped = minimizers(digits, tmp_path / "stopped")
    stop_in_epoch(2, stopped, asked)
    stopped.train(asked)
    assert stopped.tracked(asked) == rows
    path = stopped.folder(asked).path / "tracked.csv"
    path.write_text(path.read_text().replace("20", "21"))
    assert stopped.stored(asked) is None
    stopped.train(asked)  # it is a part of the minimizer
    assert stopped.tracked(asked) == rows


def test_what_can_be_followed():
    assert Track.read("eigenvalue:1000") == Track(1000, 5000)
    assert Track.read("eigenvalue:5:300") == Track(5, 300)
    for text in ("eigenvalue", "eigenvalue:0", "trace:5", "eigenvalue:5:", "eigenvalue:-1"):
        with pytest.raises(UserError, match="like eigenvalue:1000"):
            Track.read(text)


def test_small_and_large_batches_in_one_figure(run_script, tmp_path):
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result", "figure")]
    job = "-n", NAME, "--epochs=2", "--small_batch=750", "--large_batch=1500", *folders
    done = run_script("edge_of_stability.py", *job, "--track=eigenvalue:2:100,eigenvalue:1:100")
    assert done.returncode == 0, done.stderr
    assert "P^-1 H" in done.stdout
    (path,) = (tmp_path / "result").glob("small-edge-*-eigenvalue-2-100-eigenvalue-1-100.csv")
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    rows = [(row["minimizer"], row["step"], row["epoch"]) for row in found]
    starts = [row["eigenvalue"] for row in found if row["step"] == "0"]
    small = [("SB", "0", "0.0"), ("SB", "2", "1.0"), ("SB", "4", "2.0")]
    assert rows == small + [("LB", "0", "0.0"), ("LB", "1", "1.0"), ("LB", "2", "2.0")]
    assert "Largest eigenvalue of the Hessian over 100 training samples" in done.stdout
    assert float(starts[0]) == pytest.approx(float(starts[1])), "they start at the same point"
    assert len(list((tmp_path / "figure").iterdir())) == 2
    assert Settings(track=("eigenvalue:7",)).resolve(SMALL, 60_000).track == ("eigenvalue:7:5000",) * 2
    assert Settings(track=("eigenvalue:7:99999",)).resolve(SMALL, 60_000).track == ("eigenvalue:7:60000",) * 2
    for track, words in (
        ("loss:1", "like eigenvalue:1000"),
        ("eigenvalue:2,", "like eigenvalue:1000"),
        ("eigenvalue:2:100,eigenvalue:1:200", "one number of samples for both trainings"),
        ("eigenvalue:2,eigenvalue:3", "LB takes 2 steps, and would be followed at its start only"),
    ):
        done = run_script("edge_of_stability.py", *job, f"--track={track}")
        assert done.returncode == 2
        assert words in done.stderr
