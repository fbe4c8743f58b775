import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_python
from hypothesis import given
from hypothesis import strategies as some

import network_zoo
import replicas
import runs
from errors import MachineError, UserError
from objective import read_weights


@given(some.integers(1, 10_000), some.integers(1, 64))
def test_every_sample_of_a_batch_counts_once_whatever_the_number_of_replicas(samples, count):
    shares = [replicas.share(samples, replica, count) for replica in range(count)]
    counts = np.zeros(samples)
    for mine in shares:
        assert mine.last > mine.first, "no replica is idle"
        counts[int(mine.first) : int(mine.last)] += float(mine.weight)
    np.testing.assert_allclose(counts, 1, rtol=1e-6)
    sizes = [int(mine.last - mine.first) for mine in shares]
    assert max(sizes) - min(sizes) <= 1


SPLIT = """
import json, sys
import quiet_tensorflow
import keras
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[2]))

import data_zoo, network_zoo, replicas
from metric import sharpness
from objective import Objective, flat_weights
from replicas import ALONE
from training import Recipe, train

count = int(sys.argv[2])
split = replicas.choose("mirrored")
assert [split.count, *(replicas.choose(name).count for name in ("auto", "none"))] == [count, 1, 1]
digits = data_zoo.load("digits", "unused")
flat, color = digits.fit((784,)), digits.fit((32, 32, 3))
found = {}

def relative(ours, theirs):
    return float(np.linalg.norm(np.subtract(ours, theirs)) / np.linalg.norm(theirs))

def measured(objective, w):
    v = np.random.default_rng(0).standard_normal(len(w))
    evaluation, (loss, gradient) = objective.evaluate(w), objective.value_and_gradient(w)
    return [loss, evaluation.loss, evaluation.accuracy], gradient, objective.hessian_vector_product(w, v)

layers, normalization = keras.layers, network_zoo.BatchStatisticsNormalization
keras.utils.set_random_seed(0)
smooth = keras.Sequential([
    keras.Input((32, 32, 3)), layers.Conv2D(8, 5, strides=2), normalization(), layers.Activation("tanh"),
    layers.Flatten(), layers.Dense(16), normalization(), layers.Activation("tanh"), layers.Dense(10),
])
for samples in (3, 202):  # fewer than the replicas may be; two chunks of 101, which no number of replicas divides
    x, y = color.x_test[:samples], color.y_test[:samples]
    pair = [Objective(smooth, x, y, chunk=101, replicas=each) for each in (split, ALONE)]
    found[f"objective {samples}"] = [
        relative(ours, theirs) for ours, theirs in zip(*(measured(each, flat_weights(smooth)) for each in pair))
    ]

def tanh_layers(parts, definition):
    units = [parts.dense(64)[:2] for _ in range(3)]
    return [layer for unit in units for layer in (*unit, layers.Activation("tanh"))]

network_zoo.NETWORKS["smooth"] = network_zoo.Network("smooth", tanh_layers, "digits", (784,), 10)

def trained(replicas, name, network="smooth", **settings):
    recipe = Recipe(network, "digits", flat.digest, **({"batch_size": 150, "epochs": 2, "seed": 0} | settings))
    return train(recipe, flat, f"{sys.argv[1]}/{name}", replicas=replicas)

found["machine"] = trained(split, "several", "F1").provenance.machine
one, several = trained(ALONE, "smooth1"), trained(split, "smooth")
model = network_zoo.get("smooth").build()
# A bias before batch normalisation has no gradient: ADAM makes steps of what rounding leaves of it.
biases = [v.name == "bias" for v in model.trainable_variables[:-1]] + [False]
felt = ~np.repeat(biases, [np.prod(v.shape) for v in model.trainable_variables])
found["training"] = relative((several.weights - one.start)[felt], (one.weights - one.start)[felt])
found["losses"] = [minimizer.history[-1].train_loss for minimizer in (several, one)]
found["sharpness"] = [
    sharpness(Objective(model, flat.x_train, flat.y_train, replicas=each), one.weights, 1e-3).value
    for each in (split, ALONE)
]
if count == 4:  # the last batch has 1 sample
    few = dict(batch_size=1499, epochs=1)
    found["last batch"] = [trained(each, f"last{each.count}", **few).history[-1].train_loss for each in (split, ALONE)]

layer = network_zoo.Dropout(0.5, seed=1)
layer(tf.ones((1, 1)))

def masks(step):
    layer.step.assign(step)
    results = split.strategy.run(lambda: layer(tf.ones((1, 64)), training=True))
    return [mask.numpy().tolist() for mask in split.strategy.experimental_local_results(results)]

found["dropout"] = [masks(1), masks(1), masks(2)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run_split(tmp_path_factory):
    """Run SPLIT once for a number of logical devices of this machine; return its folder and what it found."""

    @functools.cache
    def run(count):
        folder = tmp_path_factory.mktemp("split")
        done = run_python("-c", SPLIT, folder, str(count))
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(params=[2, 4])
def split(request, run_split):
    """What 2 or 4 replicas find, beside one."""
    return run_split(request.param)[1] | {"count": request.param}


@pytest.mark.parametrize("samples", [3, 202])
def test_value_gradient_and_curvature_of_split_chunks(split, samples):
    assert max(split[f"objective {samples}"]) < 1e-5


def test_twenty_steps_of_split_training(split):
    """In a smooth network, since rounding may put an activation on the other side of a ReLU's kink. Then only rounding
    differs, 6e-8 of a number, which twenty steps make larger."""
    assert split["training"] < 1e-4
    ours, theirs = split["losses"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert f"{split['count']} replicas" in split["machine"]


def test_sharpness_over_replicas(split):
    ours, theirs = split["sharpness"]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_last_batch_of_fewer_samples_than_replicas(run_split):
    ours, theirs = run_split(4)[1]["last batch"]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_dropout_differs_by_replica_and_is_reproducible(split):
    first, again, next_step = split["dropout"]
    assert first == again
    distinct = {str(mask) for mask in [*first, *next_step]}
    assert len(distinct) == 2 * split["count"]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start_workers(tmp_path, *arguments):
    """Start the two workers of a cluster on this machine."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
    part = ("--every=2", "--sharpness_samples=60", "--iterations=1")
    command = [sys.executable, "training_curves.py", "-n", "F1", "--dataset=digits", *part, *folders]
    return [
        subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ
            | {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def test_two_machines_end_where_two_replicas_of_one_do_also_after_one_died(tmp_path, run_split):
    """The survivor ends with a message; started again, both continue; the chief alone writes; the bits are the same."""
    job = ("--epochs=2", "--small_batch=150", "--large_batch=500")
    workers = start_workers(tmp_path, *job)
    while all(worker.poll() is None for worker in workers) and not list(
        (tmp_path / "run").glob("F1*/checkpoint-*.npz")
    ):
        time.sleep(0.02)
    workers[1].send_signal(signal.SIGKILL)
    _, errors = workers[0].communicate(timeout=120)
    workers[1].communicate()
    assert workers[0].returncode == 1, errors
    assert "Error: Another worker of TF_CONFIG has ended" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not list((tmp_path / "result").iterdir())

    workers = start_workers(tmp_path, *job)
    (out, chief_errors), (silence, errors) = (worker.communicate(timeout=240) for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], chief_errors + errors
    assert "Figures:" in out
    assert silence == ""
    assert len(list((tmp_path / "result").iterdir())) == 3
    assert len(list((tmp_path / "run" / "sharpness").glob("*.json"))) == 6, "of the start and both ends"

    model, name = network_zoo.get("F1").build(), "F1-digits-b150-e2-s0-*/minimizer.weights.h5"
    ours, theirs = (next(folder.glob(name)) for folder in (tmp_path / "run", run_split(2)[0] / "several"))
    np.testing.assert_array_equal(read_weights(model, ours), read_weights(model, theirs))


def test_a_machine_that_sees_another_store(monkeypatch, tmp_path):
    two = replicas.Replicas(replicas.ALONE.strategy, machines=2)
    assert two.agreed(7, tmp_path) == 7
    monkeypatch.setattr(replicas.Replicas, "chief_says", lambda self, number: number + 1)
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
        replicas.choose("auto")
    assert replicas.choose("none") is replicas.ALONE


def test_no_cluster(monkeypatch):
    for config in ("", "{}"):
        monkeypatch.setenv("TF_CONFIG", config)
        assert replicas.choose("auto") is replicas.ALONE
        with pytest.raises(UserError, match="--strategy=multiworker needs the environment variable TF_CONFIG"):
            replicas.choose("multiworker")
    with pytest.raises(UserError, match="no strategy 'many'"):
        replicas.choose("many")


def test_one_process_holds_its_own_lock(tmp_path):
    with replicas.ALONE.lock(tmp_path / "x"), pytest.raises(runs.BusyError), runs.lock(tmp_path / "x", wait=False):
        pass
