"""Files that are whole or not there, and one writer at a time.

A file is written in a temporary folder beside its place, and renamed into it. The folder's name says whose it is, so
that what a killed process leaves is known as such.
"""

import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from os.path import samestat
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from large_batch.errors import BusyError, MachineError, UserError

NOT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # raised where a file could be
CLOCK_SECONDS = 5  # within which the start of a process is known
FOREIGN_SECONDS = 86_400  # in which any file is written

log = logging.getLogger("large_batch_training")  # what a user should know and no result tells
_held: dict[Path, os.stat_result] = {}  # what this process has locked, and the file that it locked for it


def erased() -> str:
    """Return what erases the line of a terminal that says how far the work is; nothing elsewhere."""
    return "\r\033[K" if sys.stderr.isatty() else ""


def shortened(text: str, most: int) -> str:
    """Return a part of a file's name, the end of one longer than `most` replaced by its digest."""
    return text if len(text) <= most else f"{text[: most - 10]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` on success, and is removed on any failure.

    Raises `MachineError` where the file system refuses, or where a lock that this process holds on `path` or its folder
    is no longer its own; `path` then still holds what it held before.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as folder:  # in which the file has its name, as libraries insist on suffixes
            yield folder / path.name
            with open(folder / path.name, "rb") as file:
                os.fsync(file.fileno())
            check_lock(path, path.parent)
            os.replace(folder / path.name, path)
    except OSError as error:
        raise MachineError(f"{path} could not be written: {_reason(error)}.") from error


def write_all(contents: dict[str | Path, bytes]) -> None:
    """Put files in place, in their order, once all of them are written; raises as `writing` does."""
    with ExitStack() as stack:
        for path, content in reversed(contents.items()):
            stack.enter_context(writing(path)).write_bytes(content)


@contextmanager
def temporary_folder(within: Path) -> Iterator[Path]:
    """Make a folder whose name tells its writer's machine, process and start, so that a dead one's is known as such."""
    writer = f"{_node()}-{os.getpid()}-{psutil.Process().create_time():.0f}"
    with tempfile.TemporaryDirectory(prefix=f".writing-{writer}-", dir=within, ignore_cleanup_errors=True) as made:
        yield Path(made)


def _node() -> str:
    return re.sub(r"[^\w.-]", "_", platform.node())[:64]


def sweep(folder: Path) -> None:
    """Delete what killed writers left half written: those of this machine that are dead, and others after a day."""
    for path in folder.glob(".writing-*") if folder.is_dir() else ():
        with suppress(OSError):  # another process sweeps, too
            if (told := re.fullmatch(r"\.writing-(.*)-(\d+)-(\d+)-\w+", path.name)) and _dead(path, *told.groups()):
                shutil.rmtree(path)


def _dead(path: Path, node: str, number: str, began: str) -> bool:
    if node != _node():
        return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
    try:
        return abs(psutil.Process(int(number)).create_time() - int(began)) > CLOCK_SECONDS
    except (psutil.NoSuchProcess, OverflowError):
        return True


def _reason(error: OSError) -> str:
    """Say what the system says, which HDF5 wraps in words of its own."""
    number = error.errno or next(map(int, re.findall(r"errno = (\d+)", str(error))), None)
    return os.strerror(number) if number else str(error)


@contextmanager
def lock(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Be the only writer of `path`, a file or a folder; what killed writers left half written is cleared away.

    Another process that holds it is waited for, with a message, or `BusyError` is raised. The lock is the kernel's
    (flock) and free once its process is dead. On NFS it is the server's: that of a machine that died is free when its
    lease has run out. Where a file system has no flock, a file with the holder's name is the lock, and is known to be
    stale on the holder's own machine only. Raises `MachineError` where neither can be made.
    """
    path = Path(path)
    held = FileLock(note := _lock_file(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except Timeout as busy:
            holder = ""
            with suppress(FileNotFoundError):
                holder = " ".join(note.read_text(errors="replace").split())
            if not wait:
                raise BusyError(f"{path} is in the hands of {holder or 'another process'}.") from busy
            log.warning("%s is in the hands of %s; waiting for it.", path, holder or "another process")
            held.acquire(poll_interval=0.5)
        _held[path] = note.stat()
    except OSError as error:
        raise MachineError(f"{path} could not be locked: {_reason(error)}.") from error
    try:
        if not hasattr(held, "pid"):  # which it has where the file itself is the lock, and says so already
            with suppress(OSError):  # on a full disk others are not told who holds it
                note.write_text(f"process {os.getpid()} on {platform.node()}")
        sweep(path.parent)
        sweep(path)
        yield
    finally:
        del _held[path]
        held.release()


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def check_lock(*paths: Path) -> None:
    """Raise `MachineError` if what this process locked is no longer so: the lock's file is another, or gone."""
    for path in paths:
        if path in _held and not (_lock_file(path).exists() and samestat(_lock_file(path).stat(), _held[path])):
            raise MachineError(
                f"{_lock_file(path)} was deleted while this process held it, so another may be writing, and this one "
                "stops; start it again, and leave .lock files where they are."
            )


def set_aside(path: Path, reason: str) -> None:
    """Rename a file that cannot be used, instead of deleting it, and say so."""
    os.replace(path, aside := free_name(path))
    log.warning("%s %s; it was set aside as %s.", path, reason, aside.name)


def free_name(path: Path) -> Path:
    """Return the first name that is free for what is set aside."""
    return next(name for i in range(1, 10_000) if not (name := path.with_name(f"{path.name}.damaged-{i}")).exists())


def check_space(folder: str | Path, needed: int) -> None:
    """Raise `MachineError` unless the disk of a folder that exists has `needed` bytes: asked before hours of work."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MachineError(
            f"The disk of {folder} has {free / 1e6:,.0f} MB left, but about {needed / 1e6:,.0f} MB will be written."
        )


def check_writable(*directories: str | Path, name: str = "file") -> None:
    """Raise `UserError` unless a file of this name can be made in each directory, which is created if need be: asked
    before hours of work."""
    for directory in map(Path, directories):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)
            with temporary_folder(directory) as folder:
                (folder / name).touch()
        except OSError as error:
            raise UserError(f"The folder {directory} cannot be written to ({_reason(error)}); name another.") from error
