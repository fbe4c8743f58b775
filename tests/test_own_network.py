"""A user's own network and data, in every command."""

import itertools
import json
import re

import keras
import numpy as np
import pytest
from conftest import ROOT, run_python

import network_zoo
from large_batch import datasets, networks, remedies, store
from large_batch.backend import tf
from large_batch.cli import PairSettings
from large_batch.experiment import Experiment
from large_batch.networks import Network
from large_batch.remedies import Moment
from network_zoo import classifier

NETWORKS = '''
from __future__ import annotations

from dataclasses import dataclass

import keras

from large_batch.networks import Network


def wide(units=16):
    """With all that the paper's networks do not have: moving statistics, Keras' own dropout, a branch."""
    x = keras.Input((8,))
    h = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Dense(units)(x)))
    h = keras.layers.Add()([h, keras.layers.Dropout(0.2)(h)])
    return keras.Model(x, keras.layers.Dense(3)(h))


def softmax():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, "softmax")])


def build(network, definition, classes, seed, precision):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input(network.input_shape), keras.layers.Dense(classes)])


F1 = Network("F1", build, "digits", (64,), 10, definitions=("repository",))


def images():
    return keras.Sequential([keras.Input((8, 8)), keras.layers.Dense(3)])


def embedded():
    layers = keras.layers.Embedding(5, 2), keras.layers.Flatten(), keras.layers.Dense(3)
    return keras.Sequential([keras.Input((8,)), *layers])


def frozen():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model.trainable = False
    return model


def pair():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])


@dataclass
class Data:
    """As files of networks may have it."""

    classes: int = 3


class Twice(keras.layers.Layer):
    def call(self, x):
        return 2.0 * x


class Times(Twice):
    """A layer of one's own, upon another."""


def turned():
    """With a layer that XLA does not know, one of one's own, and a small one."""
    layers = [keras.layers.Reshape((2, 4, 1)), keras.layers.RandomRotation(0.0, seed=1), keras.layers.Flatten()]
    layers += [Times(), keras.layers.Dense(1, use_bias=False), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((8,)), *layers])


def nested():
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization()])
    return keras.Sequential([keras.Input((8,)), inner, keras.layers.Dense(3)])


def double():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, dtype="float64")])


def two_outputs():
    x = keras.Input((8,))
    return keras.Model(x, [keras.layers.Dense(3)(x), keras.layers.Dense(3)(x)])


def nothing():
    pass


def broken():
    raise RuntimeError("on purpose\\nin two lines")


number = 3
'''
COMMANDS = {
    "plot_parametric_plot.py": "--points=2",
    "sharpness.py": "--iterations=1 --dimension=2",
    "training_curves.py": "--iterations=1 --every=2",
    "batch_size_sweep.py": "--iterations=1 --batch_sizes=550,600",
    "warmstart.py": "--iterations=1",
    "paper_tables.py": "--iterations=1 --tables=2,3",
    "performance_model.py": "",
    "plot_surface.py": "--points=2",
    "plot_spectrum.py": "--probes=1 --steps=2",
    "edge_of_stability.py": "--track=eigenvalue:1",
    "rank_measures.py": "--iterations=1 --measure=keskar",
    "finetune.py": "--batch_sizes=600 --weights=none",
}
WITH_SIZES = "batch_size_sweep.py", "rank_measures.py", "finetune.py"


def write_data(path, seed=0, features=8):
    """Write 600 and 200 samples of three classes, which hardly overlap."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for half, samples in (("train", 600), ("test", 200)):
        arrays[f"y_{half}"] = rng.integers(0, 3, samples)
        arrays[f"x_{half}"] = rng.normal(arrays[f"y_{half}"][:, None], 0.5, (samples, features)).astype(np.float32)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user has my_networks.py and my_data.npz, and all results."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_networks.py").write_text(NETWORKS)
    write_data(folder / "my_data.npz")
    return folder


@pytest.fixture
def run(folder, run_script):
    """Run a command on a network of the file and, unless told otherwise, the data, for one epoch; return what it said:
    its output, or its errors where it shall fail."""

    def run(script, network, *more, data="my_data.npz", code=0):
        folders = [f"--{kind}_dir={folder / kind}" for kind in ("data", "run", "figure", "result")]
        given = ["-n", f"{folder}/my_networks.py:{network}", *([f"--dataset={folder / data}"] if data else [])]
        batches = [] if script in WITH_SIZES else ["--small_batch=550", "--large_batch=600"]
        usual = [] if "--curvature" in more else COMMANDS[script].split()
        done = run_script(script, *folders, *given, "--epochs=1", *batches, *usual, *more)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run


def summary(printed):
    """Read the .json file whose path was printed."""
    with open(re.search(r"umbers: (\S+\.json)", printed)[1]) as file:
        return json.load(file)


def names(folder):
    return {path.name for path in (folder / "run").glob("[!.]*-e[0-9]*")}


def test_every_command_on_wide(run, folder):
    """Each finds what the others have trained and measured."""
    done = {script: run(script, "wide") for script in COMMANDS}
    lines = [re.search(r"Work: +(.*)", printed)[1] for printed in done.values()]
    assert lines[:5] == [
        "2 trainings (0 stored, 0 resumed), 4 measurements (0 stored)",
        "2 trainings (2 stored, 0 resumed), 8 measurements (0 stored)",
        "2 trainings (0 stored, 0 resumed), 12 measurements (6 stored)",  # the starts are missing, as iterates
        "2 trainings (2 stored, 0 resumed), 6 measurements (6 stored)",
        "3 trainings (2 stored, 0 resumed), 7 measurements (4 stored)",
    ]
    assert [line.partition(",")[0] for line in lines[5:9]] == ["2 trainings (2 stored"] * 4
    for script, printed in done.items():
        found = summary(printed)
        assert (found["problem"]["network"], found["problem"]["dataset"]) == ("wide", "my_data"), script
        assert "wide on my_data" in printed
        assert re.search(r"/wide-(\w+-)?[0-9a-f]{8}-my_data-[0-9a-f]{8}-e1-", printed)
    assert "LB is sharper than SB in" in done["sharpness.py"]
    run("sharpness.py", "wide", "--curvature", "--dimension=2")


def test_a_minimizer_is_evaluated_with_its_own_moving_statistics(run, folder):
    """As Keras itself evaluates the stored weights."""
    found = summary(run("training_curves.py", "wide"))
    data = datasets.load_data(str(folder / "my_data.npz"), "unused")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    statistics = set()
    for one in found["solutions"]:
        recipes = (folder / "run").glob("wide-*/recipe.json")
        (path,) = (path.parent for path in recipes if json.loads(path.read_text()) == one["recipe"])
        model = network_zoo.get(f"{folder}/my_networks.py:wide").build()
        model.load_weights(path / "minimizer.weights.h5")
        model.compile(loss=loss, metrics=["accuracy"])
        moving = next(v for layer in model.layers for v in layer.variables if "moving_mean" in v.path)
        statistics.add(np.asarray(moving).tobytes())
        for half, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            result = one["evaluation"]["result"]
            expected = model.evaluate(x, y, batch_size=len(x), verbose=0)
            assert result[f"{half}_loss"] == pytest.approx(expected[0], rel=1e-5)
            assert result[f"{half}_accuracy"] == pytest.approx(100 * expected[1], rel=1e-5)
        if one["recipe"]["epochs"]:
            history = (path / "history.csv").read_text().splitlines()[-1].split(",")
            assert float(history[3]) == pytest.approx(expected[0], rel=1e-5), "its test loss"
    assert len(statistics) == 3, "of the start and of two minimizers"


def test_another_architecture_or_other_data_of_the_same_name_are_told_apart(tmp_path):
    def places(networks=NETWORKS, seed=0, name="wide"):
        """Where the minimizer and the results of a network on data of some seed are."""
        (tmp_path / "my_networks.py").write_text(networks)
        write_data(tmp_path / "my_data.npz", seed)
        chosen = {"network": f"{tmp_path}/my_networks.py:{name}", "dataset": f"{tmp_path}/my_data.npz"}
        folders = {f"{kind}_dir": str(tmp_path / kind) for kind in ("run", "figure", "result")}
        experiment = Experiment.begin(PairSettings(**chosen, **folders), network_zoo.get)
        return store.folder("", experiment.recipe(550)), experiment.name()

    assert places() == places()
    others = [
        places(NETWORKS.replace("units=16", "units=17")),
        places(NETWORKS.replace("momentum=0.5", "momentum=0.9")),  # of which the weights say nothing
        places(seed=1),
    ]
    assert len({*places(), *itertools.chain(*others)}) == 8
    assert places(name="turned") == places(name="turned")
    assert set(places(name="turned")).isdisjoint(places(NETWORKS.replace("2.0 * x", "3.0 * x"), name="turned"))


def test_a_head_of_probabilities_is_known_by_its_layer(run):
    found = summary(run("sharpness.py", "softmax", "--space=full"))
    assert all(one["result"]["value"] > 0 for some in found["results"].values() for one in some)


def test_a_network_that_is_unlike_the_papers(run, folder):
    """It trains in batches for which XLA compiles the others' steps, and has a layer of three weights."""
    small = "--small_batch=300", "--epochs=2"
    assert summary(
        run("sharpness.py", "turned", *small, "--curvature", "--dimension=2", "--by_layer", "--probes=1", "--steps=2")
    )
    before = names(folder)
    for mistake, words in (
        ("--rescale=1,2", "No kernel stands right before a batch normalisation"),
        ("--statistics=batch", "turned has no moving averages"),
    ):
        assert words in run("sharpness.py", "turned", mistake, "--seed=1", code=2)
        assert names(folder) == before, "nothing was trained for it"
    said = run("sharpness.py", "nested", "--statistics=batch", code=2)
    assert "Statistics of the batch are for networks whose layers stand in a list or graph" in said
    assert names(folder) == before


def test_a_network_with_all_settings(run, folder):
    """It has a data set of its own, and is not the paper's, whatever it is called."""
    printed = run("plot_parametric_plot.py", "F1", data=None)
    found = summary(printed)
    assert (found["problem"]["network"], found["problem"]["dataset"]) == ("F1", "digits")
    assert found["problem"]["architecture"]
    assert re.search(r"/F1-[0-9a-f]{8}-e1-", printed)
    assert "98.03" not in printed, "Table 2"


def test_an_architecture_is_told_by_its_layers(folder):
    """Whatever the names and numbers that Keras gives to layers in this process."""
    for name in ("wide", "F1"):
        first, again = (network_zoo.get(f"{folder}/my_networks.py:{name}") for _ in range(2))
        assert isinstance(first, Network)
        assert first.architecture("repository") == again.architecture("repository") != ""
        starts = [first.build(seed=seed).get_weights()[0] for seed in (1, 1, 2)]
        np.testing.assert_array_equal(starts[0], starts[1])
        assert (starts[0] != starts[2]).any()
    told = []
    for units in (16, 16, 17):  # of one that was added to the zoo
        added = Network("added", classifier(lambda parts, units=units: parts.dense(units)), "digits", (64,), 10)
        told.append(networks.find("added", {"added": added}).architecture("repository"))
    assert "" != told[0] == told[1] != told[2]
    known = [network_zoo.get(name).architecture("repository") for name in networks.NAMES]
    assert known == ["", "", *["theano-pooling"] * 4, "", ""], "else what is stored would not be found"
    assert not any(network_zoo.get(name).architecture("paper") for name in networks.NAMES)


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_remedies_of_a_network_with_an_embedding(name):
    """Whose gradient with respect to its weights is sparse."""
    layers = keras.layers.Embedding(5, 3), keras.layers.Flatten(), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *layers])
    now = Moment(model, tf.zeros(2, tf.int64), 1, tf.identity, list, lambda: None)

    def loss(x, y, weights=None):
        x = tf.cast(x, tf.int32)
        logits = model.stateless_call(weights, [], x)[0] if weights else model(x)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits), logits

    changed, batch = remedies.make(name).loss(loss, now), (tf.constant([[0, 1, 1, 4]]), tf.constant([1]))
    with tf.GradientTape() as tape:
        losses, _ = changed(*batch)
    np.testing.assert_allclose(losses, loss(*batch)[0])
    assert all(np.abs(tf.convert_to_tensor(one)).any() for one in tape.gradient(losses, model.trainable_variables))


def test_a_remedy_that_is_not_for_a_network(run):
    said = run("plot_parametric_plot.py", "embedded", "--remedy=adversarial", code=2)
    words = "Adversarial training needs a network with a gradient with respect to its samples."
    assert said.splitlines()[-1] == f"Error: {words}"


@pytest.mark.parametrize(
    ("network", "data", "words"),
    [
        ("missing", "my_data.npz", "my_networks.py has no missing."),
        ("nothing", "my_data.npz", "my_networks.py:nothing is no network: 'NoneType' object has no attribute"),
        ("two_outputs", "my_data.npz", ":two_outputs is no network: it has 1 inputs and 2 outputs; it must be a"),
        ("double", "my_data.npz", ":double is no network: its weights are float64 instead of float32; it must be a"),
        ("frozen", "my_data.npz", ":frozen is no network: it has no trainable weights; it must be a"),
        ("number", "my_data.npz", "my_networks.py:number is no network: 'int' object is not callable; it must be a"),
        ("broken", "my_data.npz", "my_networks.py:broken is no network: on purpose; it must be a"),
        ("images", "my_data.npz", "is no network: its inputs have the shape (None, 8, 8) and its outputs (None, 8, 3)"),
        ("pair", "my_data.npz", "The data have 3 classes, for which pair has only 2 outputs."),
        ("wide", None, "Name the data set of wide: --dataset=my_data.npz, mnist, cifar10, ..."),
        ("wide", "nowhere.npz", "There is no data file "),
        ("wide", "my_networks.py", "There is no data set "),
        ("wide", "nine.npz", "nine has samples of shape (9,), which do not fit the network's input of shape (8,)"),
        ("wide --definition=paper", "my_data.npz", "There is no definition 'paper' of wide."),
    ],
)
def test_mistakes(run, folder, network, data, words):
    write_data(folder / "nine.npz", features=9)
    before = names(folder)
    said = run("plot_parametric_plot.py", *network.split(), data=data, code=2)
    last = said.splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert "Traceback" not in said
    assert names(folder) == before


def test_no_such_file(run_script):
    for name in ("nowhere.py:wide", "nowhere.py:", "/:.py:wide"):
        done = run_script("sharpness.py", "-n", name, "--dataset=digits")
        assert done.returncode == 2
        assert done.stderr.startswith("Error: There is no file ")
    done = run_script("sharpness.py", "-n", "my_networks.py", "--dataset=digits")
    assert (done.returncode, "or your own as file.py:name" in done.stderr) == (2, True)


def test_the_example_of_the_readme(tmp_path, run_script):
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    \S*python (\w+\.py .*my_networks\.py.*)$", text, re.MULTILINE)
    assert commands
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_networks.py").write_text(next(block for block in blocks if "\ndef wide" in block))
    made = run_python("-c", next(block for block in blocks if '"my_data.npz"' in block), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    for command in commands:
        script, *given = re.sub(r"my_\w+\.\w+", lambda name: str(tmp_path / name[0]), command).split()
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
        done = run_script(script, *folders, *given, "--epochs=1", *COMMANDS[script].split())
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "result").glob("wide*.json"))
