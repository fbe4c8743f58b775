import logging
import subprocess
import sys
from contextlib import contextmanager

import pytest
import quick
from conftest import ROOT, minimizers, recipe, train
from quick import run_code

from large_batch import files, store
from large_batch.errors import BusyError, MachineError

HOLDER = """
import sys
from pathlib import Path
from large_batch import files
with files.lock(sys.argv[1]):
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    with files.writing(Path(sys.argv[1]) / "half.npz") as temporary:
        temporary.touch()
        print("held", flush=True)
        sys.stdin.read()
"""


@contextmanager
def held_by_another(path):
    """Let another process hold a lock, until its input is closed, or to the end; yield it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], cwd=ROOT, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_a_dead_process_holds_no_lock_and_leaves_no_rubbish(digits, tmp_path, caplog):
    asked = quick.recipe(digits, batch_size=600)
    found = quick.minimizers(digits, tmp_path)
    folder = found.folder(asked).path
    with held_by_another(folder) as holder:
        with pytest.raises(BusyError, match=f"process {holder.pid} on "):
            found.train(asked, wait=False)
        assert [path.name for path in folder.glob(".writing-*/*")] == ["half.npz"]
        holder.kill()
    found.train(asked, wait=False)
    assert not list(folder.glob(".*"))
    assert caplog.text == ""


def test_waiting_is_announced(tmp_path, caplog):
    with held_by_another(tmp_path / "x") as holder:

        class Release(logging.Handler):
            def emit(self, record):
                holder.stdin.close()

        store.log.addHandler(release := Release())
        try:
            with files.lock(tmp_path / "x"):
                assert f"x is in the hands of process {holder.pid}" in caplog.text
                assert caplog.text.count("waiting for it") == 1
        finally:
            store.log.removeHandler(release)


LIMITED = """
import os, resource
import conftest
from large_batch import datasets
from large_batch.errors import MachineError

data = datasets.load("digits", "unused").reshape_to((784,))
for limit in sys.argv[2:]:
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
        try:
            conftest.train(conftest.recipe(data, batch_size=750), data, f"{sys.argv[1]}/{limit}")
        except MachineError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_disk_that_refuses_leaves_everything_as_it_was(run_script, digits, tmp_path):
    """A limit on the size of files stands for a full disk: the writes themselves fail, also those of HDF5."""
    expected = {"3000000": "start.weights.h5", "9000000": "checkpoint-000000002.npz"}
    done = run_code(run_script, tmp_path, LIMITED, tmp_path, *expected)
    messages = done.stdout.splitlines()[-2:]
    asked = recipe(digits, batch_size=750)
    for message, (limit, refused) in zip(messages, expected.items(), strict=True):
        assert message.endswith(f"{refused} could not be written: File too large."), done.stderr
        found = minimizers(asked, digits, tmp_path / limit)
        folder = found.folder(asked)
        assert refused not in {path.name for path in folder.path.iterdir()}
        assert not list(folder.path.glob(".*"))
        assert folder.whole(*folder.sums())
        assert found.samples_to_train(asked) == 2 * 1500


def test_a_disk_without_room_is_found_before_the_work(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(MachineError, match=r"has 10 MB left, but about 64 MB will be written"):
        train(recipe(digits), digits, tmp_path)
