import dataclasses
import os
from contextlib import nullcontext

import numpy as np
import pytest
import quick
from conftest import minimizers, recipe, train
from quick import run_code, stop_in_epoch
from small_network import SMOOTH
from test_training import ROUNDING, distance_from_adam_by_hand

import network_zoo
from large_batch import layers, remedies, store
from large_batch.backend import tf
from large_batch.errors import UserError
from large_batch.objective import flat_weights
from large_batch.recipes import converged
from large_batch.subspace import RandomSubspace


def test_iterates_are_the_minimizers_of_shorter_trainings(color_digits, tmp_path):
    asked = recipe(color_digits, network="C1", definition="paper", epochs=3)
    long = minimizers(asked, color_digits, tmp_path / "long")
    long.train(asked, keep=(2, 9), test_history=True)
    kept = long.stored(asked.at_epoch(2))
    alone = train(asked.at_epoch(2), color_digits, tmp_path / "alone", test_history=True)
    np.testing.assert_array_equal(kept.weights, alone.weights)
    np.testing.assert_array_equal(kept.start, alone.start)
    assert kept.history == alone.history
    assert not long.is_stored(asked.at_epoch(1))
    assert long.is_stored(asked)


def test_a_stopped_training_keeps_all_its_iterates(digits, tmp_path):
    asked, found = quick.recipe(digits, epochs=4), quick.minimizers(digits, tmp_path)
    stop_in_epoch(3, found, asked, keep=(1, 2, 3))
    before = [found.stored(asked.at_epoch(epoch)) for epoch in (1, 2)]
    assert all(before)
    found.train(asked, keep=(1, 2, 3))
    after = [found.stored(asked.at_epoch(epoch)) for epoch in (1, 2, 3)]
    assert [each.provenance for each in after[:2]] == [each.provenance for each in before], "not written twice"
    for kept in (after[0], after[2]):
        alone = quick.minimizers(digits, tmp_path / "alone").train(kept.recipe)
        np.testing.assert_array_equal(kept.weights, alone.weights)
        assert kept.history == alone.history


def test_retraining_replaces_the_iterates_too(digits, tmp_path):
    asked, found = quick.recipe(digits), quick.minimizers(digits, tmp_path)
    found.train(asked, keep=(1,))
    sums = found.folder(asked.at_epoch(1)).path / "SHA256SUMS"
    os.utime(sums, (0, 0))
    found.train(asked, keep=(1,), retrain=True)
    assert sums.stat().st_mtime_ns != 0


def test_runs_of_a_network_that_was_built_otherwise_are_not_found(color_digits, tmp_path):
    """As those of the repository definition before it pooled as Theano does; F1, which does not pool, keeps its own."""
    for name in ("C1", "C2"):
        network = network_zoo.get(name)
        settings = {"network": name, "definition": "repository"}
        new = recipe(color_digits, **settings, architecture=network.architecture("repository"))
        assert store.folder(tmp_path, new) != store.folder(tmp_path, recipe(color_digits, **settings))
        assert network.architecture("paper") == ""
    assert network_zoo.get("F1").architecture("repository") == ""


def test_the_random_numbers_that_recipes_and_subspaces_mean():
    """As they were when results were made: with other streams of NumPy, TensorFlow or Keras the same names would mean
    something else."""
    assert np.random.default_rng([0, 0]).permutation(1500)[:8].tolist() == [804, 1000, 939, 859, 209, 44, 1364, 674]
    bits = layers.uniform([6], [1, 2]).numpy() * 2**23  # of dropout
    assert bits.tolist() == [7080492, 1610993, 8356926, 1345427, 2281619, 5447109]
    assert remedies.key_of(3, tf.constant(7, tf.int64), 1).numpy().tolist() == [-133042617, 1]
    ends = {
        "normal": [1.7291036, 0.11504825],
        "uniform": [0.47318864, 0.2800926],
        "orthonormal": [0.024276005, 0.0016152370],
    }
    for manifold, expected in ends.items():
        column = RandomSubspace(5000, 2, seed=1, manifold=manifold) @ np.array([1.0, 0.0])
        assert column[[0, -1]] == pytest.approx(expected, rel=1e-5)
    for name, seed, first, last in (("F1", 3, -0.018922798, 0.030739687), ("C2", 0, 0.022580817, -0.085224725)):
        variables = network_zoo.get(name).build(seed=seed).trainable_variables
        found = variables[0].numpy().flat[0], variables[-2].numpy().flat[-1]
        assert found == pytest.approx((first, last), rel=1e-6)


def test_no_epochs_lead_to_the_starting_point(digits, tmp_path):
    asked, found = quick.recipe(digits, epochs=0), quick.minimizers(digits, tmp_path)
    trained = found.train(asked)
    np.testing.assert_array_equal(trained.weights, flat_weights(found.build(asked)))
    assert trained.history == []
    assert trained.distance == 0
    assert found.stored(asked).history == []


@pytest.mark.parametrize("changes", [False, True])
def test_a_minimizer_that_another_process_changes_while_it_is_read(digits, tmp_path, monkeypatch, changes):
    asked, found = quick.recipe(digits, epochs=0), quick.minimizers(digits, tmp_path)
    found.train(asked)

    def read(model, path):
        if changes:
            found.folder(asked).seal(dropping=["history.csv"])
        raise UserError("it is gone")

    monkeypatch.setattr("large_batch.minimizers.read_weights", read)
    with nullcontext() if changes else pytest.raises(UserError, match="it is gone"):
        assert found.stored(asked) is None


def test_a_warm_start_begins_at_the_minimizer_with_a_fresh_optimizer(digits, tmp_path):
    small = quick.recipe(digits, network="smooth")
    asked = quick.recipe(digits, network="smooth", batch_size=1500, warm_start=small)
    found = quick.minimizers(digits, tmp_path, SMOOTH)
    trained = found.train(asked)  # trains what it starts from, too
    first = found.stored(small)
    np.testing.assert_array_equal(trained.start, first.weights)
    assert distance_from_adam_by_hand(trained, digits) < ROUNDING
    assert found.folder(asked).path.name.startswith("smooth-digits-b1500-e2-s0-from-b750-e2-")


def test_a_killed_warm_start_continues_without_its_origin(digits, tmp_path):
    asked = quick.recipe(digits, epochs=3, warm_start=quick.recipe(digits, epochs=1))
    whole = quick.minimizers(digits, tmp_path / "whole").train(asked)
    killed = quick.minimizers(digits, tmp_path / "killed")
    for epoch in (1, 3):  # before the first checkpoint, and after it
        stop_in_epoch(epoch, killed, asked)
    assert killed.samples_to_train(asked) == 1500
    np.testing.assert_array_equal(killed.train(asked).weights, whole.weights)


def test_retraining_a_stopped_warm_start_begins_at_its_origin_as_it_is_now(digits, tmp_path):
    asked = quick.recipe(digits, epochs=1, warm_start=quick.recipe(digits, epochs=1))
    found = quick.minimizers(digits, tmp_path)
    found.train(asked.warm_start)
    stop_in_epoch(1, found, asked)
    start = found.folder(asked).path / "start.weights.h5"
    os.utime(start, (0, 0))
    found.train(asked, retrain=True)
    assert start.stat().st_mtime_ns != 0


def test_a_schedule_changes_the_batch_and_nothing_else(digits, tmp_path):
    """Steps that XLA compiles, then two batches and a part of one, then one of all samples."""
    schedule = ((1, 700), (2, 1500))
    asked = quick.recipe(digits, network="smooth", batch_size=500, epochs=3, schedule=schedule, seed=3)
    found = quick.minimizers(digits, tmp_path, SMOOTH).train(asked)
    assert distance_from_adam_by_hand(found, digits) < ROUNDING
    assert [asked.batch_size_in(epoch) for epoch in range(4)] == [500, 700, 1500, 1500]


def test_a_killed_schedule_continues_at_the_same_bits(digits, tmp_path):
    asked = quick.recipe(digits, batch_size=600, epochs=3, schedule=((1, 750), (2, 1500)))
    whole = quick.minimizers(digits, tmp_path / "whole").train(asked)
    killed = quick.minimizers(digits, tmp_path / "killed")
    stop_in_epoch(2, killed, asked)
    continued = killed.train(asked)
    np.testing.assert_array_equal(continued.weights, whole.weights)
    assert continued.history == whole.history
    prefix = killed.train(quick.recipe(digits, batch_size=600, epochs=1))
    assert whole.history[0] == prefix.history[0]


def test_folders_tell_recipes_apart_and_stay_where_they_were(digits, tmp_path):
    plain = recipe(digits)
    different = [
        plain,
        dataclasses.replace(plain, schedule=((1, 300),)),
        dataclasses.replace(plain, warm_start=recipe(digits, epochs=1)),
        dataclasses.replace(plain, warm_start=recipe(digits, epochs=1, seed=1)),
    ]
    assert len({store.folder(tmp_path, each) for each in different}) == 4
    # As it was when recipes had neither schedules nor warm starts.
    assert store.folder(tmp_path, dataclasses.replace(plain, data_digest="d")).name == "F1-digits-b150-e2-s0-737b1c0f"


def test_a_warm_start_must_fit(digits, color_digits):
    for other in (recipe(digits, network="F2"), recipe(color_digits, definition="paper")):
        with pytest.raises(UserError, match="same network and data"):
            recipe(digits, warm_start=other)


CURVES = {  # losses, and after which epoch they have converged
    "flat": ([1.0] * 30, 11),
    "never": ([0.98**epoch for epoch in range(30)], None),
    "slow, but 1 % in 10 epochs": ([0.998**epoch for epoch in range(60)], None),
    "slower": ([0.9995**epoch for epoch in range(60)], 11),
    "a minimum, then noise": ([3, 2, 1, *[1.2, 1.1, 0.995] * 10], 13),
    "a plateau, then a fall in time": ([1, *[1.0] * 9, 0.5, *[0.6] * 20], 21),
    "zero": ([1.0, *[0.0] * 20], 12),
    "too short": ([1.0] * 10, None),
}


@pytest.mark.parametrize("name", CURVES)
def test_when_a_training_has_converged(name):
    losses, expected = CURVES[name]
    ends = [epoch for epoch in range(len(losses) + 1) if converged(losses[:epoch])]
    assert (ends[0] if ends else None) == expected


def test_a_training_until_converged_ends_early_also_when_it_is_killed(digits, run_script, tmp_path):
    """Where its loss says, at the iterate of the plain training; a bound that comes first ends it, too."""
    settings = {"optimizer": "adam:learning_rate=0.05", "batch_size": 1500}
    asked = quick.recipe(digits, epochs=200, until_converged=True, **settings)
    found = quick.minimizers(digits, tmp_path / "whole").train(asked, keep=[5, 150])
    losses, epochs = [row.train_loss for row in found.history], len(found.history)
    assert 11 < epochs < 200
    assert max(row.train_accuracy for row in found.history) <= 100, "of one epoch each"
    assert [converged(losses[:epoch]) for epoch in range(epochs + 1)] == [False] * epochs + [True]
    plain = quick.minimizers(digits, tmp_path / "plain").train(quick.recipe(digits, epochs=epochs, **settings))
    np.testing.assert_array_equal(found.weights, plain.weights)
    assert found.history == plain.history
    for epoch in (5, 150):  # iterates after its end are its end
        kept = quick.minimizers(digits, tmp_path / "whole").stored(asked.at_epoch(epoch))
        assert kept.history == found.history[:epoch]

    code = f"""
import os, signal
from pathlib import Path
import quick
from large_batch import datasets

replace = os.replace

def killing(source, target):
    if Path(target).name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

data = datasets.load_data("digits", "unused").reshape_to((784,))
os.replace = killing
quick.minimizers(data, sys.argv[1]).train(quick.recipe(data, epochs=200, until_converged=True, **{settings}))
"""
    for killed_at in (
        f"checkpoint-{epochs:09}.npz",
        "minimizer.weights.h5",
    ):  # before its last epoch is kept, and after
        assert run_code(run_script, tmp_path, code, tmp_path / "killed", killed_at).returncode == -9
    killed = quick.minimizers(digits, tmp_path / "killed")
    assert killed.stored(asked) is None
    again = killed.train(asked, report=lambda samples, note: pytest.fail("nothing was left to train"))
    np.testing.assert_array_equal(again.weights, found.weights)
    assert again.history == found.history
    assert quick.minimizers(digits, tmp_path).train(quick.recipe(digits, until_converged=True)).history[1].epoch == 2
