import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="session")
def digits():
    """The real 8x8 digits, fitted to F1."""
    import data_zoo

    return data_zoo.load("digits", "unused").fit((784,))


@pytest.fixture(scope="session")
def mnist():
    """The real MNIST, fitted to F1: from the project's cache, or fetched into it."""
    import data_zoo
    from errors import MachineError

    try:
        return data_zoo.load("mnist", ROOT / "data").fit((784,))
    except MachineError as error:
        pytest.skip(str(error))


def run_python(*arguments: str | Path, **settings) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, at the repository's root unless told otherwise."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], **({"cwd": ROOT, "capture_output": True, "text": True} | settings)
    )


def refused(done: subprocess.CompletedProcess, words: str, tmp_path: Path) -> None:
    """Check that a command ended as a user's mistake should: one sentence with `words`, and nothing done."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert done.stdout == ""
    assert not list(tmp_path.rglob("*.weights.h5")), "nothing is trained before the mistake is found"
