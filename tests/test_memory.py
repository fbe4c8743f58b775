import json
from pathlib import Path

import keras
import pytest
from conftest import run_python

import memory
import network_zoo

PEAK = r"""
import json, re, sys
from pathlib import Path
import data_zoo, memory, training_loop
from replicas import ALONE
from training import Recipe
from training_loop import TrainingLoop

data = data_zoo.load("digits", "unused").fit((32, 32, 3))
batch, recomputing = int(sys.argv[1]), sys.argv[2] == "True"
training_loop.RECOMPUTE_BYTES = 0 if recomputing else 2**50
loop = TrainingLoop(Recipe("C1", "digits", data.digest, batch, 1, 0), data, ALONE)

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
loop.advance(stop=False)
print(json.dumps([peak() - before, memory.step_bytes(loop.model, batch, recomputing)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is known on Linux only")
@pytest.mark.parametrize(("batch", "recomputing"), [(750, False), (1500, True)])
def test_the_estimate_is_about_what_a_step_takes(batch, recomputing):
    done = run_python("-c", PEAK, str(batch), str(recomputing))
    used, estimated = json.loads(done.stdout.splitlines()[-1])
    assert 0.7 < used / estimated < 1.4


def test_what_is_kept():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.ReLU(), keras.layers.Dense(2)])
    assert memory.kept_bytes(model, 10) == 4 * 10 * (8 + 8 + 2)
    assert memory.kept_bytes(model, 10, recomputing=True) == 4 * 10 * (8 + 2) + 4 * 10 * (8 + 8)
    half = network_zoo.get("C1").build(precision="bfloat16")
    whole = network_zoo.get("C1").build()
    assert memory.kept_bytes(half, 100) == pytest.approx(memory.kept_bytes(whole, 100) / 2, rel=1e-3)


def test_a_step_that_may_not_fit_is_announced_with_the_remedy(monkeypatch, caplog):
    model = network_zoo.get("C1").build()
    monkeypatch.setattr(memory, "free_bytes", lambda gpus: 2**40)
    memory.warn(model, 5000, True, 0)
    assert caplog.text == ""
    monkeypatch.setattr(memory, "free_bytes", lambda gpus: 2**30)
    memory.warn(model, 5000, True, 0)
    assert "A training step of 5,000 samples of C1 needs about 6.1 GiB a device, and 1.0 GiB are free" in caplog.text
    assert "--strategy=mirrored or multiworker" in caplog.text
    assert "--precision=bfloat16" in caplog.text


def test_free_memory(monkeypatch, tmp_path):
    assert 0 < memory.free_bytes(gpus=0) < 2**50
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 2048\necho 1024\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert memory.free_bytes(gpus=2) == 2**30
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert memory.free_bytes(gpus=2) == pytest.approx(memory.free_bytes(gpus=0), rel=0.2)
