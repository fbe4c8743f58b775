import fcntl
import logging
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from filelock import FileLock

from large_batch import files
from large_batch.errors import BusyError, MachineError, UserError


def test_a_failed_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "result.txt"
    with files.writing(path) as temporary:
        temporary.write_text("good")
    with pytest.raises(RuntimeError), files.writing(path) as temporary:
        temporary.write_text("half of the")
        raise RuntimeError
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusing_file_system_is_the_machines_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="could not be written"), files.writing(tmp_path / "file" / "x"):
        pass
    with (
        pytest.raises(MachineError, match=r"x could not be written: No space left on device\."),
        files.writing(tmp_path / "x"),
    ):
        raise OSError(28, os.strerror(28))


def test_several_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "old.csv").write_text("old")
    with pytest.raises(MachineError, match="x.json could not be written"):
        files.write_all({tmp_path / "old.csv": b"new", tmp_path / "file" / "x.json": b"new"})
    assert (tmp_path / "old.csv").read_text() == "old"
    order, replace = [], os.replace

    def noted(source, target):
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    files.write_all({tmp_path / name: b"new" for name in ("old.csv", "x.json")})
    assert {path.name for path in tmp_path.iterdir()} == {"file", "old.csv", "x.json"}
    assert order == ["old.csv", "x.json"]


def test_long_names_are_shortened_and_told_apart():
    assert files.shortened("b64-128", 60) == "b64-128"
    long, other = (files.shortened("b" + "64-" * 50 + end, 60) for end in "12")
    assert len(long) < 60
    assert long != other


KILLED = """
import os, signal, sys
from pathlib import Path
from large_batch import files
with files.writing(Path(sys.argv[1]) / "x.npz") as temporary:
    temporary.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_what_dead_writers_left_is_swept(tmp_path):
    """By whoever locks the folder, or asks whether it can be written to."""
    began = f"{psutil.Process().create_time():.0f}"
    alive, again = (
        f".writing-{platform.node()}-{os.getpid()}-{began}-a",
        f".writing-{platform.node()}-{os.getpid()}-1-b",
    )
    elsewhere, long_ago = ".writing-another.host-1-1-c", ".writing-another.host-1-1-d"
    for sweeping in (files.lock(tmp_path / "run"), files.lock(tmp_path), None):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT)
        for name in (alive, again, elsewhere, long_ago):
            (tmp_path / name).mkdir(exist_ok=True)
        os.utime(tmp_path / long_ago, (0, time.time() - 2 * files.FOREIGN_SECONDS))
        assert len(list(tmp_path.glob(".writing-*"))) == 5
        if sweeping:
            with sweeping:
                pass
        else:
            files.check_writable(tmp_path)
        assert {path.name for path in tmp_path.glob(".writing-*")} == {alive, elsewhere}


def test_what_is_set_aside_displaces_nothing(tmp_path, caplog):
    for content in ("first", "second"):
        (tmp_path / "x").write_text(content)
        files.set_aside(tmp_path / "x", "is of no use")
    assert [(tmp_path / f"x.damaged-{i}").read_text() for i in (1, 2)] == ["first", "second"]
    assert "x is of no use; it was set aside as x.damaged-2." in caplog.text


def test_a_lock_is_held_by_one(tmp_path):
    taken = pytest.raises(BusyError, match=rf"process {os.getpid()} on ")
    with files.lock(tmp_path / "x"), taken, files.lock(tmp_path / "x", wait=False):
        pass
    with files.lock(tmp_path / "x", wait=False), files.lock(tmp_path / "y", wait=False):
        pass


def test_a_folder_that_cannot_be_locked_is_the_machines_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="could not be locked: File exists"), files.lock(tmp_path / "file" / "x"):
        pass


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


def test_a_dead_process_holds_no_lock_and_leaves_no_rubbish(tmp_path, caplog):
    run = tmp_path / "run"
    with held_by_another(run) as holder:
        with pytest.raises(BusyError, match=f"process {holder.pid} on "), files.lock(run, wait=False):
            pass
        assert [path.name for path in run.glob(".writing-*/*")] == ["half.npz"]
        holder.kill()
    with files.lock(run, wait=False):
        assert not list(run.iterdir())
    assert caplog.text == ""


def test_waiting_is_announced(tmp_path, caplog):
    with held_by_another(tmp_path / "x") as holder:

        class Release(logging.Handler):
            def emit(self, record):
                holder.stdin.close()

        files.log.addHandler(release := Release())
        try:
            with files.lock(tmp_path / "x"):
                assert f"x is in the hands of process {holder.pid}" in caplog.text
                assert caplog.text.count("waiting for it") == 1
        finally:
            files.log.removeHandler(release)


def test_a_lock_file_may_hold_anything(tmp_path):
    with files.lock(tmp_path / "x"):
        (tmp_path / ".x.lock").write_bytes(b"\xff\xfe nobody")
        with pytest.raises(BusyError, match="in the hands of .* nobody"), files.lock(tmp_path / "x", wait=False):
            pass


SECOND = """
import sys
from large_batch import files
with files.lock(sys.argv[1]), files.writing(f"{sys.argv[1]}/result") as temporary:
    temporary.write_text("of the second")
"""


def test_a_writer_whose_lock_file_was_deleted_publishes_nothing_more(tmp_path):
    run = tmp_path / "run"
    stopped = pytest.raises(MachineError, match=r".run.lock was deleted while this process held it")
    with files.lock(run), stopped, files.writing(run / "result") as temporary:
        temporary.write_text("of the first")
        (tmp_path / ".run.lock").unlink()
        subprocess.run([sys.executable, "-c", SECOND, run], cwd=ROOT, check=True)
        assert temporary.read_text() == "of the first", "the second one sweeps nothing that is being written"
    assert (run / "result").read_text() == "of the second"
    with files.lock(run), files.writing(run / "result") as temporary:
        temporary.write_text("of the first")
    assert (run / "result").read_text() == "of the first"


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_the_file_itself_is_the_lock_it_is_left_as_it_is(tmp_path, monkeypatch):
    """On a file system without flock; else another process would take it for damaged, and over."""

    def refuse(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FileLock(tmp_path / "other"):
        plain = (tmp_path / "other").read_text()
    with files.lock(tmp_path / "x"):
        assert (tmp_path / ".x.lock").read_text() == plain
        with files.writing(tmp_path / "x") as temporary:
            temporary.touch()
        with pytest.raises(BusyError, match=f"{os.getpid()}"), files.lock(tmp_path / "x", wait=False):
            pass
    assert not (tmp_path / ".x.lock").exists()


def test_the_room_that_is_needed(tmp_path):
    files.check_space(tmp_path, 1)
    with pytest.raises(MachineError, match="MB left, but about"):
        files.check_space(tmp_path, 2**62)


@pytest.mark.skipif(os.name != "posix", reason="a file is taken for a folder as on POSIX")
def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        files.check_writable(tmp_path / "file")
    files.check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_a_name_that_no_file_can_have_is_found_before_the_work(tmp_path):
    with pytest.raises(UserError, match="cannot be written to .*File name too long"):
        files.check_writable(tmp_path, name="x" * 256)
