import functools
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import small_network
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as some

from large_batch import distribution, files
from large_batch.backend import tf
from large_batch.errors import BusyError, MachineError, UserError


@given(some.integers(1, 10_000), some.integers(1, 64))
def test_every_sample_of_a_batch_counts_once_whatever_the_number_of_replicas(samples, count):
    shards = [distribution.shard(samples, replica, count) for replica in range(count)]
    counts = np.zeros(samples)
    for mine in shards:
        assert mine.last > mine.first, "no replica is idle"
        counts[int(mine.first) : int(mine.last)] += float(mine.weight)
    np.testing.assert_allclose(counts, 1, rtol=1e-6)  # a weight is float32
    sizes = [int(mine.last - mine.first) for mine in shards]
    assert max(sizes) - min(sizes) <= 1


# What several replicas find on logical devices of this machine, as relative differences from one.
SPLIT = """
import json, sys
from pathlib import Path

import numpy as np

from large_batch.backend import keras, tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))

from large_batch import datasets, distribution
from large_batch.distribution import ALONE
from large_batch.layers import BatchStatisticsNormalization, Dropout, flat_weights, pixels
from large_batch.minimizers import Minimizers
from large_batch.models import digest
from large_batch.networks import Network, seeded
from large_batch.objective import Objective
from large_batch.sharpness_metric import sharpness
from large_batch.recipes import Recipe

sys.path.append("tests")
from small_network import SMOOTH, felt_weights

run_dir, felt = Path(sys.argv[2]), felt_weights(SMOOTH)
split = distribution.choose("mirrored")
assert [split.count, *(distribution.choose(name).count for name in ("auto", "none"))] == [int(sys.argv[1]), 1, 1]
digits = datasets.load_data("digits", "unused")
flat, color = digits.reshape_to((784,)), digits.reshape_to((32, 32, 3))

layers = keras.layers
keras.utils.set_random_seed(0)
model = keras.Sequential([
    keras.Input((32, 32, 3)), layers.Conv2D(8, 5, strides=2), BatchStatisticsNormalization(), layers.Activation("tanh"),
    layers.Flatten(), layers.Dense(16), BatchStatisticsNormalization(), layers.Activation("tanh"), layers.Dense(10),
])
w = flat_weights(model)
v = np.random.default_rng(0).standard_normal(len(w))

def measured(objective):
    evaluation, (loss, gradient) = objective.evaluate(w), objective.value_and_gradient(w)
    curved = objective.hessian_vector_product(w, v)
    return [loss, evaluation.accuracy], evaluation.loss, gradient, curved, sharpness(objective, w, 1e-3).value

def split_and_alone(samples):
    x, y = color.x_test[:samples], color.y_test[:samples]
    ours, theirs = (Objective(model, x, y, chunk=101, replicas=replicas, prepare=pixels) for replicas in (split, ALONE))
    return [relative(*pair) for pair in zip(measured(ours), measured(theirs))]

def trained(replicas, **settings):
    recipe = Recipe(network="smooth", dataset="digits", data_digest=flat.digest, seed=0, **settings)
    return Minimizers(SMOOTH, flat, run_dir / str(replicas.count), replicas).train(recipe)

def relative(ours, theirs):
    return float(np.linalg.norm(np.subtract(ours, theirs)) / np.linalg.norm(theirs))

def compared(ours, theirs):
    moved = [(minimizer.weights - minimizer.start)[felt] for minimizer in (ours, theirs)]
    return relative(*moved), relative(*([row.train_loss for row in each.history] for each in (ours, theirs)))

layer = Dropout(0.5, seed=1)
layer(tf.ones((1, 1)))

def masks(step):
    layer.step.assign(step)
    results = split.strategy.run(lambda: layer(tf.ones((1, 64)), training=True))
    return [str(mask.numpy().tolist()) for mask in split.strategy.experimental_local_results(results)]

# The sign that adversarial training takes of a gradient near 0 is that of rounding: of a pixel that is 0 in all samples
# nothing else is felt, which ADAM and adaQN, by weight, make much of, and SGD does not.
# Chunks of 101 cannot be split evenly; 3 samples, and the last one of an epoch, are fewer than 4 replicas.
few = {"batch_size": 500, "epochs": 1}
chunks, trainings = {
    2: ([202], {
        "steps": {"batch_size": 150, "epochs": 2},
        "adaqn": {"optimizer": "adaqn:cycle=1,pairs=2,gradients=3", **few},
        "asam": {"optimizer": "sgd", "remedies": ("adversarial:radius=0.01", "stability", "asam"), **few},
        "conservative": {"remedies": ("conservative:iterations=2,fresh=1,strength=1",), **few},
    }),
    4: ([202, 3], {"steps": {"batch_size": 1499, "epochs": 10}}),
}[split.count]
found = {"dropout": [masks(step) for step in (1, 1, 2)], "chunks": [split_and_alone(samples) for samples in chunks]}
for name, settings in trainings.items():
    ours, theirs = (trained(replicas, **settings) for replicas in (split, ALONE))
    found[name] = compared(ours, theirs)
    found[f"{name} weights"], found["machine"] = digest(ours.weights), ours.provenance.machine
if split.count == 2:
    def both(name, hidden, optimizer="adam"):
        def build(network, definition, classes, seed, precision):
            return seeded(lambda: keras.Sequential([keras.Input((784,)), *hidden(), layers.Dense(10)]), seed, precision)

        asked = {"batch_size": 151, "epochs": 2, "seed": 0, "optimizer": optimizer}
        asked = Recipe(network=name, dataset="digits", data_digest=flat.digest, **asked)
        network, folder = Network(name, build, "digits", (784,), 10), run_dir / name
        ends = [Minimizers(network, flat, folder / str(one.count), one).train(asked) for one in (split, ALONE)]
        states = zip(*(end.state for end in ends), strict=True)
        moved = relative(*(end.weights - end.start for end in ends))
        return moved, max((relative(*pair) for pair in states), default=0)

    found["ordinary"] = both("ordinary", lambda: [
        layers.Dense(64, use_bias=False), layers.BatchNormalization(momentum=0.5), layers.Activation("tanh")
    ])
    found["embedding"] = both("embedding", lambda: [layers.Embedding(2, 1), layers.Flatten()], "sgd")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def split_runs(tmp_path_factory):
    """Where SPLIT trains, in a folder named by the number of replicas."""
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def run_split(split_runs, run_script):
    """Run SPLIT, once for a number of replicas, and return what it found."""

    @functools.cache
    def run(count):
        (split_runs / "split.py").write_text(SPLIT)
        done = run_script(split_runs / "split.py", str(count), split_runs)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(params=[2, 4])
def split(request, run_split):
    """What 2 or 4 replicas find."""
    return run_split(request.param) | {"count": request.param}


# Several replicas normalise by another formula than one, which rounds otherwise, by 6e-8 of an activation; two layers
# and twenty steps make more of it. A share that counted wrongly would be an error of order 0.1.


def test_losses_gradient_curvature_and_sharpness_of_split_chunks(split):
    for means, loss, gradient, curvature, sharpness in split["chunks"]:
        assert max(means, loss, sharpness) < 1e-5
        assert gradient < 1e-4
        assert curvature < 1e-4


def test_twenty_steps_of_split_training(split):
    weights, losses = split["steps"]
    assert weights < 1e-4
    assert losses < 1e-5
    assert f"{split['count']} replicas" in split["machine"]


def test_ordinary_batch_normalisation_sees_the_whole_batch(run_split):
    """In training; it ends at the same weights and moving averages."""
    weights, averages = run_split(2)["ordinary"]
    assert weights < 1e-4  # 0.05 with the statistics of each half
    assert averages < 1e-4


def test_sparse_gradients_of_shares_of_different_size(run_split):
    assert run_split(2)["embedding"][0] < 1e-4


@pytest.mark.parametrize("name", ["adaqn", "asam", "conservative"])
def test_remedies_and_adaqn_see_the_whole_batch(run_split, name):
    """The norms of gradients in SAM are global, as are the noise, the proximal term and the monitoring set."""
    weights, losses = run_split(2)[name]
    assert weights < 1e-4
    assert losses < 1e-5


def test_dropout_differs_by_replica_and_is_reproducible(split):
    first, again, next_step = split["dropout"]
    assert first == again
    assert len({*first, *next_step}) == 2 * split["count"]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


# Runs a command; with a folder, in a process that dies as soon as a checkpoint is kept there.
WORKER = """
import os, runpy, signal, sys, threading, time
from pathlib import Path

def die():
    while not list(Path(run_dir).glob("smooth*/checkpoint-*.npz")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)

_, run_dir, *sys.argv = sys.argv
if run_dir:
    threading.Thread(target=die, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_machines_end_where_two_replicas_of_one_do_also_after_one_died(tmp_path, run_split):
    """The survivor ends with a message; started again, both continue; the chief alone writes; the bits are the same."""
    (tmp_path / "worker.py").write_text(WORKER)
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure")]
    sizes = ("--epochs=2", "--small_batch=150", "--large_batch=500", "--every=2", "--sharpness_samples=60")
    network = ("-n", f"{small_network.__file__}:SMOOTH", "--dataset=digits")
    job = ["training_curves.py", *network, "--iterations=1", *sizes, *folders]

    def workers(results, *dying):
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
        return [
            {
                "arguments": [str(tmp_path / "worker.py"), folder, *job, f"--result_dir={tmp_path / results}"],
                "environment": {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})},
                "seconds": 1200,
            }
            for i, folder in enumerate(dying)
        ]

    # The second two start as the first two end.
    commands = [*workers("first", "", str(tmp_path / "run")), *workers("second", "", "")]
    forked, given = [sys.executable, ROOT / "tests" / "forked.py"], json.dumps(commands)
    done = subprocess.run(forked, input=given, capture_output=True, text=True)
    (code, _, errors), (killed, *_), *both = json.loads(done.stdout)
    (chief, out, chief_errors), (other, silence, other_errors) = both
    assert (code, killed) == (1, -9), errors
    assert "Error: Another worker of TF_CONFIG has ended" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not list((tmp_path / "first").iterdir())

    assert (chief, other) == (0, 0), chief_errors + other_errors
    assert "Figures:" in out
    assert silence == ""
    assert len(list((tmp_path / "second").iterdir())) == 3
    assert len(list((tmp_path / "run" / "sharpness").glob("*.json"))) == 6, "of the start and both ends"
    (report,) = (tmp_path / "second").glob("*.json")
    assert f'"weights": "{run_split(2)["steps weights"]}"' in report.read_text()


def test_a_machine_that_sees_another_store(monkeypatch, tmp_path):
    two = distribution.Replicas(distribution.ALONE.strategy, machines=2)
    assert two.agreed(7, tmp_path) == 7
    monkeypatch.setattr(distribution.Replicas, "broadcast", lambda self, number: number + 1)
    with pytest.raises(MachineError, match="do not see the same .*; give all of them one shared --run_dir"):
        two.agreed(7, tmp_path)
    with pytest.raises(UserError, match="started with different settings"), two.lock(tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    "config",
    [
        "not JSON",
        "[1]",
        '{"cluster": {"worker": ["a:1", "b:2"]}}',
        '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": -1}}',
        '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_a_cluster_that_is_none(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG does not say which worker of which cluster this is; set it as in {"):
        distribution.choose("auto")
    assert distribution.choose("none") is distribution.ALONE


def test_no_cluster(monkeypatch):
    for config in ("", "{}"):
        monkeypatch.setenv("TF_CONFIG", config)
        assert distribution.choose("auto") is distribution.ALONE
        with pytest.raises(UserError, match="--strategy=multiworker needs the environment variable TF_CONFIG"):
            distribution.choose("multiworker")
    with pytest.raises(UserError, match="no strategy 'many'"):
        distribution.choose("many")


def test_one_process_holds_its_own_lock(tmp_path):
    with distribution.ALONE.lock(tmp_path / "x"), pytest.raises(BusyError), files.lock(tmp_path / "x", wait=False):
        pass


def test_an_error_of_a_kernel_is_no_lost_machine(monkeypatch):
    error = tf.errors.AbortedError(None, None, "could not create a primitive")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert distribution.failure(error) is None
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert "Another worker" in distribution.failure(error)
