import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import quick
from conftest import ROOT
from quick import run_code, stop_in_epoch

import network_zoo
from large_batch import datasets, store, training
from large_batch.backend import keras
from large_batch.errors import Interrupted, UserError
from large_batch.models import write_weights

# Trains in both precisions, killed before or after the 1st, 2nd, ... change of a file, and again, until it ends.
KILLED = """
import os, signal
import test_resuming

replace = os.replace

def killing(source, target):
    global left
    left -= 1
    if left == 0 and before:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

for recipe, found in test_resuming.jobs(*sys.argv[1:]):
    kills = 0
    while True:
        left, before = kills // 2 + 1, kills % 2 == 0
        child = os.fork()
        if child == 0:
            os.replace = killing
            found.train(recipe)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        kills += 1
    print(kills, os.WEXITSTATUS(status))
"""


def jobs(name, run_dir):
    """Return a network's recipes in both precisions, with their minimizers."""
    network = quick.QUICK if name == "quick" else network_zoo.get(name)
    data = datasets.load_data("digits", "unused").reshape_to(network.input_shape)
    settings = {"network": name, "definition": "paper", "batch_size": 600, "epochs": 3}
    found = quick.minimizers(data, run_dir, network)
    return [(quick.recipe(data, precision=precision, **settings), found) for precision in ("float32", "bfloat16")]


@pytest.mark.parametrize("name", ["quick", pytest.param("C1", marks=pytest.mark.slow)])
def test_a_training_killed_at_every_file_it_writes_ends_at_the_same_bits(run_script, tmp_path, name):
    done = run_code(run_script, tmp_path, KILLED, name, tmp_path / "killed")
    lines = done.stdout.splitlines()[-2:]
    for line, (asked, whole), (_, killed) in zip(
        lines, jobs(name, tmp_path / "whole"), jobs(name, tmp_path / "killed"), strict=True
    ):
        kills, status = map(int, line.split())
        assert status == 0, done.stderr
        assert kills >= 6
        alone, resumed = whole.train(asked), killed.stored(asked)
        np.testing.assert_array_equal(resumed.weights, alone.weights)
        assert resumed.history == alone.history
        left, expected = ({path.name for path in each.folder(asked).path.iterdir()} for each in (killed, whole))
        assert left == expected


@pytest.fixture(scope="module")
def asked(digits):
    """A recipe of three steps an epoch."""
    return quick.recipe(digits, batch_size=600, epochs=4)


@pytest.fixture(scope="module")
def whole(digits, asked, tmp_path_factory):
    """Its minimizer, trained in one go, and the store that has it."""
    run_dir = tmp_path_factory.mktemp("whole")
    return quick.minimizers(digits, run_dir).train(asked), run_dir


@pytest.fixture
def first(whole):
    """The minimizer."""
    return whole[0]


@pytest.fixture
def trained(digits, whole, tmp_path):
    """A store that has it."""
    return quick.minimizers(digits, shutil.copytree(whole[1], tmp_path / "run"))


@pytest.fixture(scope="module")
def stopped_run_dir(digits, asked, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("stopped")
    stop_in_epoch(4, quick.minimizers(digits, run_dir), asked)
    return run_dir


@pytest.fixture
def stopped(digits, stopped_run_dir, tmp_path):
    """A store in which the training was stopped in its last epoch."""
    return quick.minimizers(digits, shutil.copytree(stopped_run_dir, tmp_path / "run"))


def test_the_last_two_checkpoints_are_kept(stopped, asked):
    folder = stopped.folder(asked)
    kept = [path.name for path in sorted(folder.path.glob("checkpoint-*"))]
    assert kept == ["checkpoint-000000006.npz", "checkpoint-000000009.npz"]
    assert folder.whole(*kept)
    assert stopped.samples_to_train(asked) == 1500


def damage(path, how):
    """Change a file; return what it then holds."""
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:middle], "empty": b"", "bit": flipped}[how])
    return path.read_bytes()


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(stopped, asked, first, caplog, how):
    path = stopped.folder(asked).path / "checkpoint-000000009.npz"
    content = damage(path, how)
    assert stopped.samples_to_train(asked) == 2 * 1500
    resumed = stopped.train(asked)
    assert re.search(
        r"checkpoint-000000009.npz is damaged.* set aside as checkpoint-000000009.npz.damaged-1", caplog.text
    )
    np.testing.assert_array_equal(resumed.weights, first.weights)
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == content


@pytest.mark.parametrize(
    "name", ["recipe.json", "minimizer.weights.h5", "start.weights.h5", "history.csv", "provenance.json"]
)
def test_a_damaged_minimizer_is_set_aside_and_trained_anew(trained, asked, first, caplog, name):
    path = trained.folder(asked).path / name
    content = damage(path, "bit")
    assert trained.stored(asked) is None
    assert path.read_bytes() == content, "looking changes nothing"
    again = trained.train(asked)
    np.testing.assert_array_equal(again.weights, first.weights)
    assert ("of an unknown state" if name == "recipe.json" else "is damaged") in caplog.text
    assert path.with_name(f"{name}.damaged-1").read_bytes() == content
    assert trained.stored(asked).history == first.history


def test_minimizers_that_changed_places_are_not_believed(trained, asked, digits):
    """Each is whole, checksums and all; but a folder is asked whose it is."""
    other = quick.recipe(digits, batch_size=600, epochs=1)
    trained.train(other)
    one, two = (trained.folder(recipe).path for recipe in (asked, other))
    for source, target in ((one, one.with_name("x")), (two, one), (one.with_name("x"), two)):
        source.rename(target)
    for each in (asked, other):
        ways = (trained.is_stored, trained.stored, trained.state, trained.train, trained.check_tested)
        for way in (*ways, functools.partial(trained.train, retrain=True)):
            with pytest.raises(UserError, match="holds the run of another recipe, as its recipe.json says"):
                way(each)
    shutil.rmtree(one)
    with pytest.raises(UserError, match="holds the run of another recipe"):
        trained.train(asked, keep=[1])  # which would store the iterate there
    assert store.Folder(two).whole("minimizer.weights.h5")


def test_a_minimizer_of_an_earlier_version_is_found(trained, asked, first):
    folder = trained.folder(asked)
    told = json.loads((folder.path / "recipe.json").read_text())
    told["learning_rate"] = 1e-3  # a field of its own then
    for later in ("architecture", "optimizer", "remedies"):
        del told[later]
    store.write_json(folder.path / "recipe.json", told)
    folder.seal("recipe.json")
    np.testing.assert_array_equal(trained.stored(asked).weights, first.weights)


# Trains anew, killed before an iterate's file, or its folder, takes its place; prints whether it is there, old or new.
RETRAINED = """
import os, signal
from pathlib import Path
import quick
from large_batch import datasets, files
from large_batch.store import MINIMIZER

data = datasets.load_data("digits", "unused").reshape_to((784,))
asked, found, replace = quick.recipe(data), quick.minimizers(data, sys.argv[1]), os.replace
iterate = found.folder(asked.at_epoch(1))

def killing(source, target):
    if Path(target).name == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

for victim in (None, "minimizer.weights.h5", iterate.path.name):
    if os.fork() == 0:
        os.replace = killing
        found.train(asked, keep=[1], retrain=bool(victim))
        os._exit(0)
    _, status = os.wait()
    with files.lock(iterate.path):
        iterate.tidy()
        print(os.waitstatus_to_exitcode(status), iterate.whole(*MINIMIZER), flush=True)
"""


def test_training_anew_never_loses_an_iterate(run_script, tmp_path):
    done = run_code(run_script, tmp_path, RETRAINED, tmp_path / "run")
    assert done.stdout.splitlines() == ["0 True", "-9 True", "-9 True"], done.stderr


def test_a_vanished_file_is_no_damage(trained, asked, first, caplog):
    (trained.folder(asked).path / "minimizer.weights.h5").unlink()
    np.testing.assert_array_equal(trained.train(asked).weights, first.weights)
    assert caplog.text == ""


def test_a_run_of_another_version_is_not_touched(trained, asked, first):
    folder, words = trained.folder(asked), r"quick-digits-b600-e4-s0.* is of another kind or version .* --retrain"
    whole = (folder.path / "minimizer.weights.h5").read_bytes()
    write_weights(keras.Sequential([keras.Input((64,)), keras.layers.Dense(3)]), folder.path / "minimizer.weights.h5")
    folder.seal("minimizer.weights.h5")
    with pytest.raises(UserError, match=words):
        trained.train(asked)
    (folder.path / "minimizer.weights.h5").write_bytes(whole)
    store.write_json(folder.path / "provenance.json", {"who": "a later version"})
    folder.seal("provenance.json", "minimizer.weights.h5")
    for use in (trained.train, lambda recipe: trained.warn_of_two([recipe])):
        with pytest.raises(UserError, match=words):
            use(asked)
    np.testing.assert_array_equal(trained.train(asked, retrain=True).weights, first.weights)


def test_the_provenance_of_a_resumed_training_names_all_its_processes(digits, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first.py"])
    stop_in_epoch(2, quick.minimizers(digits, tmp_path), asked)
    monkeypatch.setattr(sys, "argv", ["second.py"])
    found = quick.minimizers(digits, tmp_path)
    stop_in_epoch(3, found, asked)
    trained = found.train(asked)
    assert trained.provenance.command == "second.py"
    assert [other["command"] for other in trained.provenance.earlier] == ["first.py"]
    assert trained.provenance == found.stored(asked).provenance
    # Who began it is known also where the first one comes back
    places = iter(["first.py", "second.py", "first.py"])
    for epoch in (2, 3, None):
        monkeypatch.setattr(sys, "argv", [next(places)])
        again = quick.minimizers(digits, tmp_path / "again")
        trained = stop_in_epoch(epoch, again, asked) if epoch else again.train(asked)
    assert (trained.provenance.command, trained.provenance.first.command) == ("first.py", "first.py")
    assert [other["command"] for other in trained.provenance.earlier] == ["first.py", "second.py"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_in_mid_epoch_at_no_loss(digits, asked, first, tmp_path, monkeypatch, signum):
    found, seen = quick.minimizers(digits, tmp_path), []
    monkeypatch.setattr(training, "PACE", 0.0)  # step by step

    def interrupt(samples, note):
        seen.append(samples)
        if "epoch 2/" in note and sum(seen) - samples == 1500:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)  # an impatient second one changes nothing

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=r"is kept in .*, epoch 2/4") as stopped:
        found.train(asked, report=interrupt)
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) == before
    assert 1500 < sum(seen) < 3000
    assert found.samples_to_train(asked) == 6000 - sum(seen)
    resumed = found.train(asked)
    np.testing.assert_array_equal(resumed.weights, first.weights)
    assert resumed.history == first.history


def test_a_signal_at_the_very_end_is_not_lost(digits, asked, tmp_path, monkeypatch):
    found, write = quick.minimizers(digits, tmp_path), store.write_csv

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(store, "write_csv", interrupt)
    with pytest.raises(Interrupted, match="The minimizer is kept in"):
        found.train(asked)
    assert found.stored(asked)


# Runs two commands, both stopped in their training, by the two signals; prints how they end.
STOPPED = """
import os, signal, time
from pathlib import Path
import forked

for signum in (signal.SIGINT, signal.SIGTERM):
    folder = Path(sys.argv[1]) / str(signum.value)
    folder.mkdir()
    folders = [f"--{kind}_dir={folder / kind}" for kind in ("data", "run", "figure", "result")]
    settings = ["-n", "F1", "--dataset=digits", "--points=2", "--epochs=100000", "--small_batch=750"]
    command = forked.Command(["plot_parametric_plot.py", *settings, *folders], {}, seconds=300)
    process = forked.start(command, [folder / "out", folder / "err"])
    while not list(folder.glob("run/*/checkpoint-*")) and not os.waitid(
        os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.02)
    os.kill(process, signum)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_stopped_command_says_how_to_continue(run_script, tmp_path):
    done = run_code(run_script, tmp_path, STOPPED, tmp_path)
    assert done.stdout.split() == ["130", "143"], done.stderr
    for signum in (signal.SIGINT, signal.SIGTERM):
        errors = (tmp_path / str(signum.value) / "err").read_text()
        words = r"Stopped\. The training is kept in .*, (epoch \d+/100000 .*|after epoch \d+)\. The same command"
        assert re.match(words, errors.strip().splitlines()[-1])
        assert "Stopping: what is in hand" in errors
        assert "Traceback" not in errors


COMPUTING = """
import hashlib, threading, time
from large_batch.errors import signals_raised

def say_when_it_computes():
    clock = time.pthread_getcpuclockid(threading.main_thread().ident)
    while time.clock_gettime(clock) < before + 0.2:  # far more than what leads to the computation takes
        time.sleep(0.01)
    print("begun", flush=True)

with signals_raised():
    before = time.thread_time()
    threading.Thread(target=say_when_it_computes, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as TensorFlow's, takes long and lets no handler run
"""


def test_a_signal_is_acknowledged_while_something_computes():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", COMPUTING], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "Stopping: what is in hand comes to its end or is kept first.\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "Stopping already.\n"
        process.kill()
