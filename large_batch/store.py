"""The store: one folder a recipe, files with checksums, and where each result came from.

A recipe is any frozen dataclass with a `name`; its folder is `<run_dir>/<name>-<digest>`. The digest covers the fields
that differ from their defaults, so a field added to the recipe later leaves the folders of earlier runs where they are.

A file in such a folder counts once it is listed in SHA256SUMS, which `sha256sum -c` checks; a record, a single JSON
file, holds its own SHA-256. What does not match is set aside under another name, never overwritten or believed.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from large_batch import files
from large_batch.errors import MachineError, UserError
from large_batch.files import NOT_A_FILE, free_name, set_aside, temporary_folder, write_all

PACKAGES = ("tensorflow", "keras", "numpy", "scipy")
ENVIRONMENT = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "TF_XLA_FLAGS", "XLA_FLAGS")
INSTRUCTION_SETS = ("avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "sve2")
SUMS = "SHA256SUMS"
RECIPE = "recipe.json"  # says whose a folder is
START, END, HISTORY, PROVENANCE = "start.weights.h5", "minimizer.weights.h5", "history.csv", "provenance.json"
MINIMIZER = (RECIPE, END, START, HISTORY, PROVENANCE)  # the files of one
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a file of a run
LONGEST_NAME = 220  # of 255, for what is added to it

log = files.log


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a result came from: what computed it, from which commit, when (UTC) and in how many seconds.

    `threads` is the number that TensorFlow shares an operation among, `device` "CPU" or the names of the GPUs,
    `environment` what is set of the variables that choose the kernels. `earlier` are the processes that had
    the same training before, in their order and in the same terms.
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

    @property
    def first(self) -> "Provenance":
        """Who began the training."""
        return Provenance(**self.earlier[0]) if self.earlier else self

    @property
    def setting(self) -> dict[str, str | int]:
        """What the bits of a result depend on, beside its recipe, the code and the number of replicas."""
        computing = {"processor": self.processor, "threads": self.threads, "device": self.device or "CPU"}
        return computing | self.environment | self.packages

    def differences(self, other: "Provenance") -> list[str]:
        """Say what differs from another process, as far as it is known, of all that a training's bits depend on."""
        if not other.processor:  # of a version that did not say so
            return []
        ours, theirs = self.setting, other.setting
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

    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # a copy, perhaps within another project's checkout
        return "unknown"

    def git(*arguments: str) -> str:
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

    digest = _digest(json.dumps(chosen(recipe), sort_keys=True, default=chosen).encode())
    return Path(run_dir) / f"{files.shortened(recipe.name, LONGEST_NAME)}-{digest[:8]}"


def opened(run_dir: str | Path, recipe) -> "Folder":
    """Return the folder of a recipe; raises `UserError` where it holds what another recipe says."""
    found = Folder(folder(run_dir, recipe))
    told = found.content(RECIPE)
    with reading(found.path, "move it away"):
        same = told is None or describes(json.loads(told), recipe)
    if not same:
        raise UserError(
            f"{found.path} holds the run of another recipe, as its {RECIPE} says: it was renamed or copied. Give it "
            "back its name, or move it away."
        )
    return found


class Folder:
    """A recipe's folder. Only the process that holds its `lock` may change it.

    `before` is where its run stays that is being replaced, until there is a new one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.before = path.with_name(f"{path.name}.before-retraining")

    def sums(self) -> dict[str, str]:
        """Return the SHA-256 of every file that counts, by name."""
        listed, _ = self._read()
        return listed

    def _read(self) -> tuple[dict[str, str], bool]:
        """Return what is listed, and whether the list is as it was written: it ends with a checksum of its own."""
        try:
            text = (self.path / SUMS).read_text("utf-8", "replace")
        except NOT_A_FILE:
            return {}, False
        lines, _, own = text.rpartition("# ")
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}
        whole = own == f"{_digest(lines.encode())}\n" and all(re.fullmatch(PLAIN_NAME, name) for name in sums)
        return (sums, True) if whole else ({}, False)

    def whole(self, *names: str) -> bool:
        """Say whether the files count and are as they were written."""
        sums = self.sums()
        return all(name in sums and sums[name] == _file_digest(self.path / name) for name in names)

    def listed(self, pattern: str) -> list[str]:
        """Return the names of the files of a pattern that count, sorted."""
        return [name for name in sorted(self.sums()) if fnmatch(name, pattern)]

    def names(self, pattern: str) -> list[str]:
        """Return the names of those that are whole."""
        return [name for name in self.listed(pattern) if self.whole(name)]

    def content(self, name: str) -> bytes | None:
        """Return what a file holds, if it is whole."""
        with suppress(*NOT_A_FILE):
            found = (self.path / name).read_bytes()
            return found if self.sums().get(name) == _digest(found) else None

    def provenance(self) -> Provenance:
        """Return where the minimizer came from; raises `UserError` if it is of another version."""
        with reading(self.path / PROVENANCE):
            return Provenance(**json.loads((self.path / PROVENANCE).read_text()))

    def seal(self, *names: str, dropping: Iterable[str] = ()) -> None:
        """Make written files count, all at once, and delete others that no longer shall."""
        dropped = set(dropping)
        sums = {name: digest for name, digest in self.sums().items() if name not in dropped}
        sums |= {name: _file_digest(self.path / name) for name in names}
        if vanished := [name for name in names if sums[name] is None]:
            raise MachineError(f"{self.path / vanished[0]} vanished after it was written.")
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_all({self.path / SUMS: f"{lines}# {_digest(lines.encode())}\n".encode()})
        for name in dropped:
            (self.path / name).unlink(missing_ok=True)

    def sweep(self, pattern: str) -> None:
        """Delete the files of a pattern that do not count: a process was killed before or after they did."""
        for path in self.path.glob(pattern):
            if path.name not in self.sums():
                path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Set aside every file that is not as it was written, with a message; all of them where the list itself is not,
        or the recipe, which says whose they are. A run that a killed process was replacing comes back."""
        if self.before.exists() and not self.path.exists():
            os.replace(self.before, self.path)
        sums, listed = self._read()
        if listed and (not sums or self.whole(RECIPE)):
            damaged = {self.path / name: "is damaged: its checksum differs" for name in sums if not self.whole(name)}
        else:
            reason = f"is of an unknown state, since {RECIPE if listed else SUMS} is missing or damaged"
            found = sorted(self.path.iterdir()) if self.path.is_dir() else ()
            there = (path for path in found if path.is_file() or path.name in {SUMS, *sums})
            damaged = {path: reason for path in there if not re.search(r"\.damaged-\d+$", path.name)}
        if damaged and self.path.is_symlink():
            raise UserError(f"{self.path} leads to files that are no whole run; put a folder of its own in its place.")
        for path, reason in damaged.items():
            if path.exists():
                set_aside(path, reason)
        if damaged or not listed:  # files without a list are from then on a sign of damage
            self.seal(dropping=[path.name for path in damaged if path.name in sums])

    def retire(self) -> None:
        """Move the run to `before`."""
        files.check_lock(self.path)
        self.forget()
        os.replace(self.path, self.before)

    def forget(self) -> None:
        """Delete the run in `before`, but for what was set aside in it."""
        if self.before.exists():
            for path in self.before.glob("*.damaged-*"):
                os.replace(path, free_name(self.path / path.name.rpartition(".damaged-")[0]))
            with temporary_folder(self.path.parent) as folder:  # all at once: half a run must not come back
                os.replace(self.before, folder / self.path.name)

    @contextmanager
    def replacing(self) -> Iterator["Folder"]:
        """Yield an empty folder that takes the place of this one at the end, as a whole."""
        with temporary_folder(self.path.parent) as beside:
            new = Folder(beside / self.path.name)
            new.path.mkdir()
            yield new
            files.check_lock(self.path)
            if self.path.exists():
                self.retire()
            os.replace(new.path, self.path)
            self.forget()


def _file_digest(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except NOT_A_FILE:
        return None


def describes(content, recipe) -> bool:
    """Say whether `content`, read from JSON, is of a data class; what a version did not know yet had its default.

    What earlier versions knew besides, and the value that is meant today, is in `retired` of the class.
    """
    if not dataclasses.is_dataclass(recipe):
        return content == json.loads(json.dumps(recipe))
    fields = {field.name: field.default for field in dataclasses.fields(recipe)}
    if not isinstance(content, dict):
        return False
    old = {name: content[name] for name in content.keys() - fields.keys()}
    return old.items() <= getattr(recipe, "retired", {}).items() and all(
        describes(content[name], getattr(recipe, name)) if name in content else getattr(recipe, name) == default
        for name, default in fields.items()
    )


def write_record(path: str | Path, record) -> None:
    """Write a dataclass as JSON that holds its own checksum."""
    content = json.loads(json.dumps(record, default=dataclasses.asdict))
    write_json(path, content | {"sha256": _content_digest(content)})


def read_record(path: str | Path) -> dict | None:
    """Return what `write_record` wrote, as dictionaries; None where there is nothing, or nothing whole."""
    with suppress(*NOT_A_FILE, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        content = json.loads(Path(path).read_text("utf-8"))
        if content.pop("sha256") == _content_digest(content):
            return content


def _content_digest(content: dict) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_json(path: str | Path, content) -> None:
    """Write a dataclass, or a dictionary of them, as indented JSON; raises as `json_bytes` does."""
    write_all({path: json_bytes(content)})


def json_bytes(content) -> bytes:
    """Return what `write_json` writes; raises `UserError` for NaN, which JSON lacks."""
    try:
        return f"{json.dumps(content, default=dataclasses.asdict, indent=2, allow_nan=False)}\n".encode()
    except ValueError as error:
        raise UserError("Nothing is written, since a number in the results is not finite.") from error


def write_csv(path: str | Path, rows: list, row_type: type | None = None) -> None:
    """Write data classes of one type (named where there may be none), or dictionaries, as CSV with a header.

    None becomes an empty cell.
    """
    write_all({path: csv_bytes(rows, row_type)})


def csv_bytes(rows: list, row_type: type | None = None) -> bytes:
    """Return what `write_csv` writes."""
    cells = [row if isinstance(row, dict) else vars(row) for row in rows]
    names = [field.name for field in dataclasses.fields(row_type)] if row_type else list(cells[0])
    writer = csv.DictWriter(text := io.StringIO(newline=""), names, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue().encode()


def read_csv(path: str | Path, row_type: type) -> list:
    """Read what `write_csv` wrote: every cell an int where the field is declared so, else a float or None."""
    types = {field.name: int if field.type in (int, "int") else float for field in dataclasses.fields(row_type)}
    with open(path, newline="", encoding="utf-8") as file:
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
