"""The store: one folder a recipe, whole files with checksums, one writer at a time, and where each result came from.

A recipe is any frozen dataclass with a `name`; its folder is `<run_dir>/<name>-<digest>`. The digest covers the fields
that differ from their defaults, so a field added to the recipe later leaves the folders of earlier runs where they are.

A file in such a folder counts once it is listed in SHA256SUMS, which `sha256sum -c` checks; a record, a single JSON
file, holds its own SHA-256. What does not match is set aside under another name, never overwritten or believed.
"""

import csv
import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from large_batch.errors import BusyError, MachineError, UserError

PACKAGES = ("tensorflow", "keras", "numpy", "scipy")
ENVIRONMENT = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "TF_XLA_FLAGS", "XLA_FLAGS")
INSTRUCTION_SETS = ("avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "sve2")
SUMS = "SHA256SUMS"
TEMPORARY = r"\.[0-9a-f]{8}\."  # before the name of a file that is being written

log = logging.getLogger("large_batch_training")  # what a user should know and no result tells


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a result came from: what computed it, from which commit, when (UTC) and in how many seconds.

    `threads` is the number that TensorFlow shares an operation among, `device` "CPU" or the names of the GPUs,
    `environment` what is set of the variables that choose the kernels. `earlier` are other commands, commits or
    machines, in the same terms, that the same training was begun with.
    """

    command: str
    commit: str
    python: str
    packages: dict[str, str]
    machine: str
    finished: str = ""
    wall_seconds: float = 0.0
    earlier: list[dict] = dataclasses.field(default_factory=list)
    processor: str = ""
    threads: int = 0
    device: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def differences(self, other: "Provenance") -> list[str]:
        """Say what differs from another process, as far as it is known, of all that a training's bits depend on."""
        if not other.processor:  # of a version that did not say so
            return []
        ours, theirs = (
            {"processor": process.processor, "threads": process.threads, "device": process.device or "CPU"}
            | process.environment
            | process.packages
            for process in (self, other)
        )
        names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        return [f"{name} {ours.get(name)} instead of {theirs.get(name)}" for name in names]

    def after(self, wall_seconds: float) -> "Provenance":
        """Return the provenance of a result that is finished now and took `wall_seconds`."""
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return dataclasses.replace(self, finished=finished, wall_seconds=round(wall_seconds, 1))


def provenance(device: str = "") -> Provenance:
    """Describe the running process and the device that it computes on (`distribution.device`): at its start, as the
    checkout may move on, but after TensorFlow's."""
    return Provenance(
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit=_commit(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        processor=_processor(),
        threads=_threads(),
        device=device,
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def _processor() -> str:
    """The processor's model and those of its instruction sets that choose TensorFlow's kernels."""
    known = {}
    with suppress(OSError):  # Linux only
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        known = {name.strip(): value.strip() for name, _, value in lines}
    present = known.get("flags", known.get("Features", "")).split()
    model = known.get("model name") or platform.processor() or platform.machine()
    return " ".join([model, *(name for name in INSTRUCTION_SETS if name in present)])


def _threads() -> int:
    """The threads of TensorFlow's pool: as many as the cores that this process may use, unless the user chose."""
    if (chosen := os.environ.get("TF_NUM_INTRAOP_THREADS", "")).isdecimal() and int(chosen):
        return int(chosen)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """The commit of this checkout, marked when tracked files differ from it; results and figures, which every command
    changes, do not count."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", "--", ".", ":!results", ":!Figures")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def folder(run_dir: str | Path, recipe) -> Path:
    """Return the folder of a recipe, without creating it."""

    def chosen(recipe) -> dict:
        return {
            field.name: getattr(recipe, field.name)
            for field in dataclasses.fields(recipe)
            if field.default is dataclasses.MISSING or getattr(recipe, field.name) != field.default
        }

    digest = hashlib.sha256(json.dumps(chosen(recipe), sort_keys=True, default=chosen).encode()).hexdigest()
    return Path(run_dir) / f"{recipe.name}-{digest[:8]}"


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` on success, and is removed on any failure.

    Raises `MachineError` where the file system refuses; `path` then still holds what it held before.
    """
    path = Path(path)
    # Chance keeps writers apart, also those of other machines; the full name keeps suffixes that libraries insist on.
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MachineError(f"{path} could not be written: {_reason(error)}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


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
    stale on the holder's own machine only; elsewhere it must be deleted by hand. Raises `MachineError` where neither
    can be made.
    """
    path = Path(path)
    held = FileLock(path.with_name(f".{path.name}.lock"))
    note = Path(held.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except Timeout as busy:
            holder = " ".join(note.read_text().split()) or "another process"
            if not wait:
                raise BusyError(f"{path} is in the hands of {holder}.") from busy
            log.warning("%s is in the hands of %s; waiting for it.", path, holder)
            held.acquire(poll_interval=0.5)
    except OSError as error:
        raise MachineError(f"{path} could not be locked: {_reason(error)}.") from error
    try:
        if not isinstance(held, SoftFileLock):  # whose file says so already
            with suppress(OSError):  # on a full disk others are not told who holds it
                note.write_text(f"process {os.getpid()} on {platform.node()}")
        for folder, name in ((path.parent, re.escape(path.name)), (path, ".*")):
            for file in folder.iterdir() if folder.is_dir() else ():
                if re.fullmatch(TEMPORARY + name, file.name):
                    file.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def set_aside(path: Path, reason: str) -> None:
    """Rename a file that cannot be used, instead of deleting it, and say so."""
    aside = next(name for i in range(1, 10_000) if not (name := path.with_name(f"{path.name}.damaged-{i}")).exists())
    os.replace(path, aside)
    log.warning("%s %s; it was set aside as %s.", path, reason, aside.name)


class Folder:
    """A recipe's folder. Only the process that holds its `lock` may change it."""

    def __init__(self, path: Path):
        self.path = path

    def sums(self) -> dict[str, str]:
        """Return the SHA-256 of every file that counts, by name."""
        listed, _ = self._read()
        return dict(listed)

    def _read(self) -> tuple[dict[str, str], bool]:
        """Return what is listed, and whether the list is as it was written: it ends with a checksum of its own."""
        try:
            text = (self.path / SUMS).read_text(errors="replace")
        except FileNotFoundError:
            return {}, False
        lines, _, own = text.rpartition("# ")
        if own != f"{_text_digest(lines)}\n":
            return {}, False
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}, True

    def whole(self, *names: str) -> bool:
        """Say whether the files count and are as they were written."""
        sums = self.sums()
        return all(name in sums and sums[name] == _file_digest(self.path / name) for name in names)

    def seal(self, *names: str, dropping: Iterable[str] = ()) -> None:
        """Make written files count, all at once, and delete others that no longer shall."""
        dropped = set(dropping)
        sums = {name: digest for name, digest in self.sums().items() if name not in dropped}
        sums |= {name: _file_digest(self.path / name) for name in names}
        if vanished := [name for name in names if sums[name] is None]:
            raise MachineError(f"{self.path / vanished[0]} vanished after it was written.")
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        with writing(self.path / SUMS) as temporary:
            temporary.write_text(f"{lines}# {_text_digest(lines)}\n")
        for name in dropped:
            (self.path / name).unlink(missing_ok=True)

    def sweep(self, pattern: str) -> None:
        """Delete the files of a pattern that do not count: a process was killed before or after they did."""
        for path in self.path.glob(pattern):
            if path.name not in self.sums():
                path.unlink(missing_ok=True)

    def set_aside_damaged(self) -> None:
        """Set aside every file that is not as it was written, with a message; all of them if the list itself is not."""
        sums, whole = self._read()
        if not whole and self.path.is_dir():
            for path in sorted(self.path.iterdir()):
                if path.is_file() and not re.search(r"\.damaged-\d+$", path.name):
                    set_aside(path, f"is of an unknown state, since {SUMS} is missing or damaged")
            self.seal()
        for name in sums:
            if not self.whole(name):
                if (self.path / name).exists():
                    set_aside(self.path / name, "is damaged: its checksum differs")
                self.seal(dropping=[name])


def _file_digest(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def write_record(path: str | Path, record) -> None:
    """Write a dataclass as JSON that holds its own checksum."""
    content = json.loads(json.dumps(record, default=dataclasses.asdict))
    write_json(path, content | {"sha256": _content_digest(content)})


def read_record(path: str | Path) -> dict | None:
    """Return what `write_record` wrote, as dictionaries; None where there is nothing, or nothing whole."""
    try:
        content = json.loads(Path(path).read_text())
        digest = content.pop("sha256")
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return content if digest == _content_digest(content) else None


def _content_digest(content: dict) -> str:
    return _text_digest(json.dumps(content, sort_keys=True))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | Path, content) -> None:
    """Write a dataclass, or a dictionary of them, as indented JSON; raises `UserError` for NaN, which JSON lacks."""
    try:
        text = json.dumps(content, default=dataclasses.asdict, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path} is not written, since a number in it is not finite.") from error
    with writing(path) as temporary:
        temporary.write_text(text + "\n")


def write_csv(path: str | Path, rows: list, row_type: type | None = None) -> None:
    """Write data classes of one type (named where there may be none), or dictionaries, as CSV with a header.

    None becomes an empty cell.
    """
    cells = [row if isinstance(row, dict) else vars(row) for row in rows]
    names = [field.name for field in dataclasses.fields(row_type)] if row_type else list(cells[0])
    with writing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(cells)


def read_csv(path: str | Path, row_type: type) -> list:
    """Read what `write_csv` wrote: every cell an int where the field is declared so, else a float or None."""
    types = {field.name: int if field.type in (int, "int") else float for field in dataclasses.fields(row_type)}
    with open(path, newline="") as file:
        return [
            row_type(**{name: types[name](cell) if cell else None for name, cell in row.items()})
            for row in csv.DictReader(file)
        ]


@contextmanager
def reading(path: Path, remedy: str = "move it away, or train anew with --retrain") -> Iterator[None]:
    """Turn whatever goes wrong while a whole file is read into one `UserError` that says how to go on."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # files of another version make libraries raise nearly anything
        raise UserError(f"The stored {path} is of another kind or version ({error}); {remedy}.") from error


def check_space(folder: str | Path, needed: int) -> None:
    """Raise `MachineError` unless the disk of a folder that exists has `needed` bytes: asked before hours of work."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise MachineError(
            f"The disk of {folder} has {free / 1e6:,.0f} MB left, but about {needed / 1e6:,.0f} MB will be written."
        )


def check_writable(*directories: str | Path) -> None:
    """Raise `UserError` unless files can be made in each directory (created if need be): asked before hours of work."""
    for directory in directories:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise UserError(f"The folder {directory} cannot be written to ({_reason(error)}); name another.") from error
