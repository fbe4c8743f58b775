import dataclasses

import numpy as np
import pytest
from conftest import StoppedError, recipe
from test_training import adam_by_hand

import network_zoo
import runs
from errors import UserError
from objective import flat_weights
from training import is_stored, samples_to_train, stored, train


def test_iterates_are_the_minimizers_of_shorter_trainings(color_digits, tmp_path):
    asked = recipe(color_digits, network="C1", definition="paper", epochs=4)
    train(asked, color_digits, tmp_path / "long", keep=(1, 3, 9), test_history=True)
    for epoch in (1, 3):
        kept = stored(asked.iterate(epoch), color_digits, tmp_path / "long")
        alone = train(asked.iterate(epoch), color_digits, tmp_path / "alone", test_history=True)
        np.testing.assert_array_equal(kept.weights, alone.weights)
        np.testing.assert_array_equal(kept.start, alone.start)
        assert kept.history == alone.history
    assert not is_stored(asked.iterate(2), tmp_path / "long")
    assert runs.Folder(runs.folder(tmp_path / "long", asked)).whole("minimizer.weights.h5")


def test_a_stopped_training_keeps_all_its_iterates(digits, tmp_path):
    asked = recipe(digits, epochs=4)

    def stop(_, note):
        if "epoch 3" in note:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(asked, digits, tmp_path, keep=(1, 2, 3), report=stop)
    before = [stored(asked.iterate(epoch), digits, tmp_path) for epoch in (1, 2)]
    assert all(before)
    train(asked, digits, tmp_path, keep=(1, 2, 3))
    after = [stored(asked.iterate(epoch), digits, tmp_path) for epoch in (1, 2, 3)]
    assert [each.provenance for each in after[:2]] == [each.provenance for each in before], "not written twice"
    alone = train(asked.iterate(3), digits, tmp_path / "alone")
    np.testing.assert_array_equal(after[2].weights, alone.weights)


def test_retraining_replaces_the_iterates_too(digits, tmp_path):
    asked = recipe(digits)
    train(asked, digits, tmp_path, keep=(1,))
    folder = runs.folder(tmp_path, asked.iterate(1))
    before = (folder / "SHA256SUMS").stat().st_mtime_ns
    train(asked, digits, tmp_path, keep=(1,), retrain=True)
    assert (folder / "SHA256SUMS").stat().st_mtime_ns > before


def test_runs_of_a_network_that_was_built_otherwise_are_not_found(color_digits, tmp_path):
    """As those of the repository definition before it pooled as Theano does; F1, which does not pool, keeps its own."""
    for name in ("C1", "C2"):
        network = network_zoo.get(name)
        settings = {"network": name, "definition": "repository"}
        new = recipe(color_digits, **settings, architecture=network.architecture("repository"))
        assert runs.folder(tmp_path, new) != runs.folder(tmp_path, recipe(color_digits, **settings))
        assert network.architecture("paper") == ""
    assert network_zoo.get("F1").architecture("repository") == ""


def test_no_epochs_lead_to_the_starting_point(digits, tmp_path):
    found = train(recipe(digits, epochs=0), digits, tmp_path)
    np.testing.assert_array_equal(found.weights, flat_weights(found.recipe.build(digits)))
    assert found.history == []
    assert found.distance == 0
    assert stored(found.recipe, digits, tmp_path).history == []


def test_a_warm_start_begins_at_the_minimizer_with_a_fresh_optimizer(digits, tmp_path):
    small = recipe(digits, batch_size=300, epochs=2)
    asked = recipe(digits, batch_size=1500, epochs=2, warm_start=small)
    found = train(asked, digits, tmp_path)  # trains what it starts from, too
    first = stored(small, digits, tmp_path)
    np.testing.assert_array_equal(found.start, first.weights)
    by_hand = adam_by_hand(asked, digits, first.weights)
    assert np.linalg.norm(found.weights - by_hand) < 0.005 * found.distance
    assert runs.folder(tmp_path, asked).name.startswith("F1-digits-b1500-e2-s0-from-b300-e2-")


def test_a_killed_warm_start_continues_without_its_origin(digits, tmp_path):
    asked = recipe(digits, epochs=3, warm_start=recipe(digits, epochs=1))
    whole = train(asked, digits, tmp_path / "whole")

    def stop(at):
        def report(_, note):
            if at in note:
                raise StoppedError

        return report

    for at in ("epoch 1/3", "epoch 3/3"):  # before the first checkpoint, and after it
        with pytest.raises(StoppedError):
            train(asked, digits, tmp_path / "killed", report=stop(at))
    assert samples_to_train(asked, digits, tmp_path / "killed") == 1500
    np.testing.assert_array_equal(train(asked, digits, tmp_path / "killed").weights, whole.weights)


def test_retraining_a_stopped_warm_start_begins_at_its_origin_as_it_is_now(digits, tmp_path):
    asked = recipe(digits, epochs=1, warm_start=recipe(digits, epochs=1))

    def stop(_, note):
        raise StoppedError

    train(asked.warm_start, digits, tmp_path)
    with pytest.raises(StoppedError):
        train(asked, digits, tmp_path, report=stop)
    start = runs.folder(tmp_path, asked) / "start.weights.h5"
    before = start.stat().st_mtime_ns
    train(asked, digits, tmp_path, retrain=True)
    assert start.stat().st_mtime_ns > before


def test_a_schedule_changes_the_batch_and_nothing_else(digits, tmp_path):
    asked = recipe(digits, batch_size=700, epochs=3, schedule=((1, 1400), (2, 1500)), seed=3)
    found = train(asked, digits, tmp_path)
    assert np.linalg.norm(found.weights - adam_by_hand(asked, digits)) < 0.05 * found.distance
    assert [asked.batch_size_in(epoch) for epoch in range(4)] == [700, 1400, 1500, 1500]
    prefix = train(recipe(digits, batch_size=700, epochs=1, seed=3), digits, tmp_path)
    assert found.history[0] == prefix.history[0]


def test_a_killed_schedule_continues_at_the_same_bits(digits, tmp_path):
    asked = recipe(digits, batch_size=100, epochs=3, schedule=((1, 400), (2, 1500)))
    whole = train(asked, digits, tmp_path / "whole")

    def stop(_, note):
        if "epoch 2" in note:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(asked, digits, tmp_path / "killed", report=stop)
    continued = train(asked, digits, tmp_path / "killed")
    np.testing.assert_array_equal(continued.weights, whole.weights)
    assert continued.history == whole.history


def test_folders_tell_recipes_apart_and_stay_where_they_were(digits, tmp_path):
    plain = recipe(digits)
    different = [
        plain,
        dataclasses.replace(plain, schedule=((1, 300),)),
        dataclasses.replace(plain, warm_start=recipe(digits, epochs=1)),
        dataclasses.replace(plain, warm_start=recipe(digits, epochs=1, seed=1)),
    ]
    assert len({runs.folder(tmp_path, each) for each in different}) == 4
    # As it was when recipes had neither schedules nor warm starts.
    assert runs.folder(tmp_path, dataclasses.replace(plain, data_digest="d")).name == "F1-digits-b150-e2-s0-737b1c0f"


def test_a_warm_start_must_fit(digits, color_digits):
    for other in (recipe(digits, network="F2"), recipe(color_digits, definition="paper")):
        with pytest.raises(UserError, match="same network and data"):
            recipe(digits, warm_start=other)
