"""How commands end whose streams fail, and that are interrupted before their work has begun."""

import subprocess
import sys

import pytest
from conftest import ROOT, run_python

WRONG = "sharpness.py -n F1 --epochs=-2"  # refused before TensorFlow starts


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (f"{WRONG} 2>&-", 2, ""),
        (f"{WRONG} >&-", 2, "epochs"),
        (f"{WRONG} <&- >&- 2>&-", 2, ""),
        (f"{WRONG} 2>/dev/full", 2, ""),
        ("sharpness.py --help >&-", 0, ""),
        ("sharpness.py --help >/dev/full", 1, "Error: The system failed: No space left on device."),
    ],
)
def test_streams_that_are_closed_or_full(command, code, said):
    done = subprocess.run(f"{sys.executable} {command}", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert bool(done.stderr) == bool(said)


PLUS_MINUS = """
from dataclasses import dataclass
from large_batch import cli
@dataclass(frozen=True)
class Settings:
    pass
cli.run(lambda _: print("80 \\u00b1 1"), Settings, "")
"""


def test_characters_that_an_encoding_lacks_are_spelt_out(monkeypatch):
    for encoding, printed in (("ascii", r"80 \xb1 1"), ("utf-8", "80 ± 1")):
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        done = run_python("-c", PLUS_MINUS, encoding="utf-8")
        assert (done.stdout, done.stderr, done.returncode) == (f"{printed}\n", "", 0)


OUT_OF_MEMORY = """
from dataclasses import dataclass
from large_batch import cli
@dataclass(frozen=True)
class Settings:
    pass
def main(_):
    {fails}
cli.run(main, Settings, "")
"""


@pytest.mark.parametrize(
    "fails",
    [
        "raise MemoryError",
        "from large_batch.backend import tf; raise tf.errors.ResourceExhaustedError(None, None, 'OOM')",
    ],
    ids=["NumPy", "TensorFlow"],
)
def test_memory_that_does_not_suffice_is_the_machines_failure(fails):
    done = run_python("-c", OUT_OF_MEMORY.format(fails=fails))
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 1, 1)
    assert done.stderr.startswith("Error: ")
    assert "memory" in done.stderr


INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

_, interrupted, *sys.argv = sys.argv
sys.meta_path.insert(0, Finder())
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["dataclasses", "numpy", "absl", "scipy.optimize"])
def test_an_interruption_while_a_command_is_imported(module):
    done = run_python("-c", INTERRUPTED, module, "sharpness.py", "-n", "none")
    assert done.returncode == 130
    assert done.stderr.startswith("Stopped.")
    assert done.stderr.count("\n") == 1
