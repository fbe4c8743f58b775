"""The minimizers that come with the repository."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import quick
from conftest import ROOT

import network_zoo
from large_batch import datasets, shipped, store
from large_batch.cli import Settings
from large_batch.errors import MachineError
from large_batch.minimizers import Minimizers
from large_batch.objective import flat_weights
from large_batch.objectives import Objectives
from large_batch.recipes import Recipe
from large_batch.runner import Runner

FOLDERS = sorted(path.parent for path in (ROOT / "minimizers").glob("*/recipe.json"))


def recipe_of(folder):
    content = json.loads((folder / "recipe.json").read_text())
    for old in Recipe.retired:
        content.pop(old, None)
    recipe = Recipe(**content | {"schedule": tuple(content["schedule"])})
    assert store.folder(ROOT / "minimizers", recipe) == folder
    return recipe


def history_of(folder):
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_minimizer_is_what_it_says(tmp_path, folder, caplog):
    """Loss and accuracy over the test set are those after its last epoch, on another processor but for rounding; and
    F1's training begins as it did."""
    assert all((folder / name).exists() for name in store.Folder(folder).sums()), "as `sha256sum -c` wants it"
    recipe = recipe_of(folder)
    network = network_zoo.get(recipe.network)
    try:
        data = datasets.load_data(recipe.dataset, ROOT / "data").reshape_to(network.input_shape)
    except MachineError as error:
        pytest.skip(str(error))
    here = Minimizers(network, data, tmp_path / "run")
    here.take_shipped([recipe])
    by = store.Folder(folder).provenance().processor.partition(" avx")[0]
    said = f"{recipe.network} in batches of {recipe.batch_size}: 100 epochs, trained on {by} in "
    assert caplog.text.count(said) == 1
    assert "come with the repository; --retrain trains it here" in caplog.text
    found, history = here.stored(recipe), history_of(folder)
    tested = Objectives(network, data, recipe.definition, here.replicas).test()
    result = tested.evaluate(found.weights)
    assert result.loss == pytest.approx(float(history[-1]["test_loss"]), rel=1e-3)
    assert result.accuracy == pytest.approx(float(history[-1]["test_accuracy"]), abs=0.03)
    # From the start that the seed gives: the distance is that of the training
    summary = ROOT / "results" / f"{recipe.network}{f'-s{recipe.seed}' if recipe.seed else ''}.json"
    if summary.exists():  # where both minimizers are there
        told = json.loads(summary.read_text())["small_batch" if recipe.batch_size == 256 else "large_batch"]
        assert found.distance == pytest.approx(told["distance_from_start"], rel=1e-5)
    here.take_shipped([recipe, recipe.at_epoch(1)])
    assert caplog.text.count("come with the repository") == 1, "nothing is taken twice, or that is not there"
    if recipe.network != "F1":
        return  # an epoch takes minutes
    if recipe.batch_size == 256:  # docs/design.md, of random subspaces
        _, gradient = (
            Objectives(network, data, recipe.definition, here.replicas).train().value_and_gradient(found.weights)
        )
        assert np.linalg.norm(gradient) == pytest.approx(0.00804, rel=0.02)
    # Rounding grows within an epoch, but far less than the 2 - 10 % by which seeds differ in this loss
    first = here.train(recipe.at_epoch(1), test_history=True).history[0]
    assert first.train_loss == pytest.approx(float(history[0]["train_loss"]), rel=0.02)
    assert first.test_accuracy == pytest.approx(float(history[0]["test_accuracy"]), abs=1.0)


def test_what_is_taken(digits, tmp_path, monkeypatch):
    """A whole folder, once, with the start that the seed gives; never over what is begun, or where all is made anew."""
    asked = quick.recipe(digits)
    trained = quick.minimizers(digits, tmp_path / "theirs").train(asked)
    theirs = store.folder(tmp_path / "theirs", asked)
    (theirs / "start.weights.h5").unlink()
    monkeypatch.setattr(shipped, "HERE", tmp_path / "theirs")

    def taken(place):
        here = quick.minimizers(digits, tmp_path / place)
        here.take_shipped([asked])
        return here.stored(asked)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shipped, "write_weights", interrupted)
        taken("a")
    found = taken("a")  # as a whole or not at all
    np.testing.assert_array_equal(found.start, trained.start)
    np.testing.assert_array_equal(found.weights, trained.weights)
    begun = quick.minimizers(digits, tmp_path / "begun")
    quick.stop_in_epoch(2, begun, asked)
    before = sorted(path.name for path in begun.folder(asked).path.iterdir())
    assert taken("begun") is None
    assert sorted(path.name for path in begun.folder(asked).path.iterdir()) == before
    end = theirs / "minimizer.weights.h5"
    whole = end.read_bytes()
    end.write_bytes(whole[:-1])
    assert taken("damaged") is None
    end.write_bytes(whole)


def test_iterates_are_of_one_training(digits, tmp_path, monkeypatch, caplog):
    """A shipped minimizer is not taken where iterates before it are wanted; where it has been, this is said."""
    asked, elsewhere = quick.recipe(digits), store.provenance("CPU")
    monkeypatch.setattr(shipped, "HERE", tmp_path / "theirs")
    theirs = dataclasses.replace(elsewhere, processor="another one")
    Minimizers(quick.QUICK, digits, shipped.HERE, origin=theirs).train(asked, test_history=True)

    def run(place, *recipes):
        caplog.clear()
        here = Minimizers(quick.QUICK, digits, tmp_path / place, origin=elsewhere)
        Runner(here, Settings()).run(recipes)
        return [here.stored(recipe).provenance.processor for recipe in recipes]

    ours, other = elsewhere.processor, "another one"
    assert run("together", asked.at_epoch(0), asked.at_epoch(1), asked) == [ours] * 3
    assert "come with the repository" not in caplog.text
    assert run("one after the other", asked.at_epoch(0), asked) == [ours, other]
    assert "several trainings" not in caplog.text
    for _ in range(2):  # also where all of them are stored
        assert run("one after the other", asked.at_epoch(1), asked) == [ours, other]
        assert caplog.text.count("of several trainings, with processor ") == 1


def test_the_example_of_their_readme(monkeypatch):
    assert FOLDERS
    monkeypatch.chdir(ROOT)
    names = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "minimizers" / "README.md").read_text(), re.DOTALL)[1], names)
    assert names["small_batch"].weights.shape == flat_weights(names["model"]).shape
