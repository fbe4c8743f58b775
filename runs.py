"""The store: one folder a recipe, files that are whole or absent, and where each result came from.

A recipe is any frozen dataclass with a `name`; its folder is `<run_dir>/<name>-<digest>`. The digest covers the fields
that differ from their defaults, so a field added to the recipe later leaves the folders of earlier runs where they are.
"""

import csv
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from errors import MachineError, UserError

PACKAGES = ("tensorflow", "keras", "numpy", "scipy")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a result came from: what computed it, from which commit, when (UTC) and in how many seconds."""

    command: str
    commit: str
    python: str
    packages: dict[str, str]
    machine: str
    finished: str = ""
    wall_seconds: float = 0.0

    def after(self, wall_seconds: float) -> "Provenance":
        """Return the provenance of a result that is finished now and took `wall_seconds`."""
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return dataclasses.replace(self, finished=finished, wall_seconds=round(wall_seconds, 1))


def provenance() -> Provenance:
    """Describe the running process; asked at its start, since the checkout may move on while it runs."""
    return Provenance(
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit=_commit(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """The checked-out commit of this file's repository, marked when tracked files differ from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def folder(run_dir: str | Path, recipe) -> Path:
    """Return the folder of a recipe, without creating it."""
    chosen = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.default is dataclasses.MISSING or getattr(recipe, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
    return Path(run_dir) / f"{recipe.name}-{digest[:8]}"


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` on success, and is removed on any failure.

    Raises `MachineError` where the file system refuses; `path` then still holds what it held before.
    """
    path = Path(path)
    # The process's own number keeps two writers apart, the full name keeps suffixes that libraries insist on.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MachineError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, content) -> None:
    """Write a dataclass, or a dictionary of them, as indented JSON."""
    text = json.dumps(content, default=dataclasses.asdict, indent=2)
    with writing(path) as temporary:
        temporary.write_text(text + "\n")


def write_csv(path: str | Path, rows: list) -> None:
    """Write a non-empty list of dataclass objects of one type as CSV with a header; None becomes an empty cell."""
    names = [field.name for field in dataclasses.fields(rows[0])]
    with writing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def read_csv(path: str | Path, row_type: type) -> list:
    """Read what `write_csv` wrote: every cell an int where the field is declared so, else a float or None."""
    types = {field.name: int if field.type is int else float for field in dataclasses.fields(row_type)}
    with open(path, newline="") as file:
        return [
            row_type(**{name: types[name](cell) if cell else None for name, cell in row.items()})
            for row in csv.DictReader(file)
        ]


@contextmanager
def reading(path: Path, remedy: str = "delete it, or train anew with --retrain") -> Iterator[None]:
    """Turn whatever goes wrong while a stored run is read into one `UserError` that says how to go on."""
    try:
        yield
    except Exception as error:  # damaged files make libraries raise nearly anything
        raise UserError(f"The stored {path} is damaged ({error}); {remedy}.") from error


def check_writable(*directories: str | Path) -> None:
    """Raise `UserError` unless files can be made in each directory (created if need be): asked before hours of work."""
    for directory in directories:
        probe = Path(directory) / f".{os.getpid()}.probe"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"The folder {directory} cannot be written to ({error.strerror}); name another.") from error
