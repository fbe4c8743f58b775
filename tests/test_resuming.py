import logging
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, StoppedError, recipe, run_python

import cli
import replicas
import runs
import training_loop
from errors import BusyError, Interrupted, MachineError, UserError
from training import samples_to_train, stored, train

# Kills a training before or after its 1st, 2nd, ... change of a file, starting it again each time, until it ends.
KILLED = """
import os, signal, sys
import data_zoo
from training import Recipe, train

run_dir, precision = sys.argv[1:]
data = data_zoo.load("digits", "unused").fit((32, 32, 3))
recipe = Recipe("C1", "digits", data.digest, 100, 3, 0, definition="paper", precision=precision)
replace, kills = os.replace, 0

def killing(source, target):
    global left
    left -= 1
    if left == 0 and before:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

while True:
    left, before = kills // 2 + 1, kills % 2 == 0
    child = os.fork()  # TensorFlow is imported, but has not started
    if child == 0:
        os.replace = killing
        train(recipe, data, run_dir)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
    kills += 1
print(kills, os.WEXITSTATUS(status))
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_killed_at_every_file_it_writes_ends_at_the_same_bits(color_digits, tmp_path, precision):
    asked = recipe(color_digits, network="C1", definition="paper", batch_size=100, epochs=3, precision=precision)
    whole = train(asked, color_digits, tmp_path / "whole")
    done = run_python("-c", KILLED, tmp_path / "killed", precision)
    kills, status = map(int, done.stdout.split())
    assert status == 0, done.stderr
    assert kills >= 6
    resumed = stored(asked, color_digits, tmp_path / "killed")
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert resumed.history == whole.history
    left = sorted(path.name for path in runs.folder(tmp_path / "killed", asked).iterdir())
    assert left == sorted(path.name for path in runs.folder(tmp_path / "whole", asked).iterdir())


def stop_in_epoch(number, asked, data, run_dir, **settings):
    """Train up to the beginning of an epoch."""

    def stop(_, note):
        if f"epoch {number}/" in note:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(asked, data, run_dir, report=stop, **settings)


def test_the_last_two_checkpoints_are_kept(digits, tmp_path):
    asked = recipe(digits, epochs=4)
    stop_in_epoch(4, asked, digits, tmp_path)
    folder = runs.Folder(runs.folder(tmp_path, asked))
    kept = [path.name for path in sorted(folder.path.glob("checkpoint-*"))]
    assert kept == ["checkpoint-000000020.npz", "checkpoint-000000030.npz"]
    assert folder.whole(*kept)
    assert samples_to_train(asked, digits, tmp_path) == 1500


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "bit": flipped(content)}[how])


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(digits, tmp_path, caplog, how):
    asked = recipe(digits, epochs=4)
    whole = train(asked, digits, tmp_path / "whole")
    stop_in_epoch(4, asked, digits, tmp_path)
    path = runs.folder(tmp_path, asked) / "checkpoint-000000030.npz"
    damage(path, how)
    content = path.read_bytes()
    assert samples_to_train(asked, digits, tmp_path) == 2 * 1500
    resumed = train(asked, digits, tmp_path)
    assert re.search(
        r"checkpoint-000000030.npz is damaged.* set aside as checkpoint-000000030.npz.damaged-1", caplog.text
    )
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == content


@pytest.mark.parametrize("name", ["minimizer.weights.h5", "start.weights.h5", "history.csv", "provenance.json"])
def test_a_damaged_minimizer_is_set_aside_and_trained_anew(digits, tmp_path, caplog, name):
    asked = recipe(digits, epochs=1)
    first = train(asked, digits, tmp_path)
    path = runs.folder(tmp_path, asked) / name
    damage(path, "bit")
    content = path.read_bytes()
    assert stored(asked, digits, tmp_path) is None
    assert path.read_bytes() == content, "looking changes nothing"
    again = train(asked, digits, tmp_path)
    np.testing.assert_array_equal(again.weights, first.weights)
    assert "is damaged" in caplog.text
    assert path.with_name(f"{name}.damaged-1").read_bytes() == content
    assert stored(asked, digits, tmp_path).history == first.history


def test_a_vanished_file_is_no_damage(digits, tmp_path, caplog):
    asked = recipe(digits, epochs=1)
    first = train(asked, digits, tmp_path)
    (runs.folder(tmp_path, asked) / "minimizer.weights.h5").unlink()
    np.testing.assert_array_equal(train(asked, digits, tmp_path).weights, first.weights)
    assert caplog.text == ""


def test_a_run_of_another_version_is_not_touched(digits, tmp_path):
    asked = recipe(digits, epochs=1)
    first = train(asked, digits, tmp_path)
    folder = runs.Folder(runs.folder(tmp_path, asked))
    runs.write_json(folder.path / "provenance.json", {"who": "a later version"})
    folder.seal("provenance.json")
    with pytest.raises(UserError, match=r"F1-digits-b150-e1-s0.* is of another kind or version .* --retrain"):
        train(asked, digits, tmp_path)
    np.testing.assert_array_equal(train(asked, digits, tmp_path, retrain=True).weights, first.weights)


def test_the_provenance_of_a_resumed_training_names_all_its_processes(digits, tmp_path, monkeypatch):
    asked = recipe(digits, epochs=3)
    monkeypatch.setattr(sys, "argv", ["first.py"])
    stop_in_epoch(2, asked, digits, tmp_path)
    monkeypatch.setattr(sys, "argv", ["second.py"])
    stop_in_epoch(3, asked, digits, tmp_path)
    found = train(asked, digits, tmp_path)
    assert found.provenance.command == "second.py"
    assert [other["command"] for other in found.provenance.earlier] == ["first.py"]
    assert found.provenance == stored(asked, digits, tmp_path).provenance


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_in_mid_epoch_at_no_loss(color_digits, tmp_path, monkeypatch, signum):
    asked = recipe(color_digits, network="C1", definition="paper", batch_size=100, epochs=2)
    whole = train(asked, color_digits, tmp_path / "whole")
    seen = []
    monkeypatch.setattr(training_loop, "PACE", 0.0)  # step by step

    def interrupt(samples, note):
        seen.append(samples)
        if "epoch 2/" in note and sum(seen) - samples == 1500:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=r"is kept in .*, epoch 2/2") as stopped:
        train(asked, color_digits, tmp_path, report=interrupt)
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) == before
    assert 1500 < sum(seen) < 3000
    assert samples_to_train(asked, color_digits, tmp_path) == 3000 - sum(seen)
    resumed = train(asked, color_digits, tmp_path)
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert resumed.history == whole.history


def test_a_signal_at_the_very_end_is_not_lost(digits, tmp_path, monkeypatch):
    asked = recipe(digits, epochs=1)
    write = runs.write_csv

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(runs, "write_csv", interrupt)
    with pytest.raises(Interrupted, match="The minimizer is kept in"):
        train(asked, digits, tmp_path)
    assert stored(asked, digits, tmp_path)


def command(tmp_path, *arguments):
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
    return [
        sys.executable,
        "plot_parametric_plot.py",
        "-n",
        "F1",
        "--dataset=digits",
        "--points=2",
        *folders,
        *arguments,
    ]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_to_continue(tmp_path, signum, code):
    process = subprocess.Popen(command(tmp_path, "--epochs=500"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "run").glob("*/checkpoint-*")):
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    last = errors.strip().splitlines()[-1]
    assert re.match(
        r"Stopped\. The training is kept in .*, (epoch \d+/500 .*|after epoch \d+)\. The same command", last
    )
    assert "Traceback" not in errors


HOLDER = """
import sys, time
from pathlib import Path
import runs
with runs.lock(sys.argv[1]):
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    (Path(sys.argv[1]) / ".0123abcd.half.npz").touch()
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_dead_process_holds_no_lock_and_leaves_no_rubbish(digits, tmp_path, caplog):
    asked = recipe(digits, epochs=1)
    folder = runs.folder(tmp_path, asked)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {holder.pid} on "):
        train(asked, digits, tmp_path, wait=False)
    assert [path.name for path in folder.iterdir()] == [".0123abcd.half.npz"]
    holder.kill()
    holder.wait()
    train(asked, digits, tmp_path, wait=False)
    assert not list(folder.glob(".*"))
    assert caplog.text == ""


def test_two_commands_share_the_work_and_write_the_same(tmp_path):
    """Each of the two minimizers is trained once, by either; both commands end with the result."""
    both = [
        subprocess.Popen(
            command(tmp_path, "--epochs=8", "--small_batch=75"),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    tables = [out.partition("Figure:")[0] for out, _ in outputs]
    assert tables[0] == tables[1]
    messages = "".join(errors for _, errors in outputs)
    assert "is in the hands of process" in messages
    assert "Traceback" not in messages
    assert not list((tmp_path / "run").rglob("*damaged*"))


def test_what_another_process_trained_anew_is_not_trained_again(digits, tmp_path, monkeypatch):
    options = SimpleNamespace(run_dir=tmp_path, retrain=True, test_history=False)
    asked = {"SB": recipe(digits), "LB": recipe(digits)}
    calls = []

    def train_once(*_, retrain, wait, **settings):
        calls.append((retrain, wait))
        if not wait:
            raise BusyError
        return train(*_, retrain=retrain, wait=wait, **settings)

    monkeypatch.setattr("training.train", train_once)
    weights, sides = cli.train(asked, digits, options, replicas.ALONE)
    assert calls == [(True, False), (False, True)], "one recipe, of two labels"
    assert list(weights) == list(sides) == ["SB", "LB"]


def test_waiting_is_announced(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER.replace("600", "1"), tmp_path / "x"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        holder.stdout.readline()
        with runs.lock(tmp_path / "x"):
            assert f"x is in the hands of process {holder.pid}" in caplog.text
            assert caplog.text.count("waiting for it") == 1
    holder.wait()


LIMITED = """
import resource, sys
import data_zoo
from errors import MachineError
from training import Recipe, train

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
data = data_zoo.load("digits", "unused").fit((784,))
try:
    train(Recipe("F1", "digits", data.digest, 150, 2, 0), data, sys.argv[1])
except MachineError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "refused"), [(3_000_000, "start.weights.h5"), (9_000_000, "checkpoint-000000010.npz")]
)
def test_a_disk_that_refuses_leaves_everything_as_it_was(digits, tmp_path, limit, refused):
    """A limit on the size of files stands for a full disk: the writes themselves fail, also those of HDF5."""
    done = run_python("-c", LIMITED, tmp_path, limit)
    assert re.fullmatch(rf".*{refused} could not be written: File too large\.\n", done.stdout), done.stderr
    folder = runs.folder(tmp_path, recipe(digits))
    assert refused not in {path.name for path in folder.iterdir()}
    assert not list(folder.glob(".*"))
    assert runs.Folder(folder).whole(*runs.Folder(folder).sums())
    assert samples_to_train(recipe(digits), digits, tmp_path) == 2 * 1500


def test_a_disk_without_room_is_found_before_the_work(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(MachineError, match=r"has 10 MB left, but about 64 MB will be written"):
        train(recipe(digits), digits, tmp_path)
