"""Gradients that are kept while a measurement lasts, so that it goes on after its process was killed."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import quick
from conftest import StoppedError, run_python

from large_batch import gradients, store
from large_batch.cli import Settings
from large_batch.gradients import KeptGradients
from large_batch.measurements import SharpnessRequest
from large_batch.objective import Objective
from large_batch.places import Place
from large_batch.runner import Runner

KILLED = """
import json, os, signal, sys
from dataclasses import asdict
from pathlib import Path
import numpy as np
from large_batch import gradients, store
from large_batch.sharpness_metric import sharpness
from large_batch.subspace import RandomSubspace

gradients.SLOW = -1.0  # every one is slow
origin, x = store.provenance(), np.linspace(-1, 1, 300)

class Function:
    repeats, calls = True, 0

    def __init__(self, most):
        self.most = most

    def value_and_gradient(self, w):
        self.calls += 1
        if self.calls > self.most:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(np.sum(2 - np.cos(200 * (w - x)))), 200 * np.sin(200 * (w - x)).astype(np.float32)

def measured(name, most):
    function, kept = Function(most), gradients.KeptGradients(folder / name, origin)
    found = asdict(sharpness(kept.of(function), x, 1e-2, subspace=subspace))
    return function.calls, kept.seconds, {name: value for name, value in found.items() if "seconds" not in name}

for subspace in (None, RandomSubspace(300, 5)):
    folder = Path(sys.argv[1]) / str(subspace is None)
    calls, _, whole = measured("whole", 1000)
    deaths = 0
    while True:
        if not (child := os.fork()):
            measured("killed", 1)
            os._exit(0)
        if not (status := os.waitpid(child, 0)[1]):
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        deaths += 1
    again, seconds, found = measured("killed", 0)
    print(json.dumps([calls, deaths, again, seconds, found == whole]))
"""


def test_a_measurement_killed_at_every_gradient_is_that_of_one_process(tmp_path):
    """Each process computes one gradient and finds those before it; the last one finds them all."""
    done = run_python("-c", KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for calls, deaths, again, seconds, same in lines:
        assert deaths == calls - 1 > 5
        assert again == 0
        assert seconds > 0
        assert same


class Square:
    """f(w) = |w|^2, which counts how often it is asked."""

    calls = 0

    def value_and_gradient(self, w):
        self.calls += 1
        return float(w @ w), 2 * w


def test_what_is_damaged_or_of_another_processor_is_computed_anew(tmp_path, monkeypatch):
    square, w, origin = Square(), np.arange(3.0), store.provenance()
    KeptGradients(tmp_path / "kept", origin).at(square, w)
    assert not (tmp_path / "kept").exists(), "a quick one is not kept"
    monkeypatch.setattr(gradients, "SLOW", -1.0)

    def computed(point=w, by=origin):
        before = square.calls
        loss, gradient = KeptGradients(tmp_path / "kept", by).at(square, point)
        assert loss == point @ point
        np.testing.assert_array_equal(gradient, 2 * point)
        return square.calls - before

    assert [computed(), computed()] == [1, 0]
    assert [computed(w + 1), computed(w + 1), computed()] == [1, 0, 0]
    other = dataclasses.replace(origin, processor="another", command="another")
    assert [computed(by=other), computed(by=other), computed()] == [1, 0, 0]
    assert computed(by=dataclasses.replace(origin, command="another")) == 0
    twice = KeptGradients(tmp_path / "kept", origin)
    for _ in range(2):
        twice.at(square, w + 2)
    assert twice.seconds == 0, "what this process took is part of its own time"
    for damage in (
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:40] + b"?" + content[41:],
    ):
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(damage(path.read_bytes()))
        assert [computed(), computed()] == [1, 0]
    KeptGradients(tmp_path / "kept", origin).forget()
    assert not (tmp_path / "kept").exists()


def test_a_stopped_sharpness_goes_on_in_the_next_command(digits, tmp_path, monkeypatch):
    """Each gradient takes 100 s, by its clock."""
    monkeypatch.setattr(gradients, "time", SimpleNamespace(monotonic=itertools.count(0, 100).__next__))
    problem = {"network": "quick", "dataset": "digits", "data_digest": digits.digest, "definition": "repository"}
    box = SharpnessRequest(**problem, epsilon=1e-3, solver="lbfgsb", iterations=4)
    item, calls, gradient = (box, Place(quick.recipe(digits, epochs=1))), [], Objective.value_and_gradient

    def measured(run_dir, most=1000):
        """Measure with so many gradients, or stop; return the result and their number."""

        def counted(objective, w):
            calls.append(w)
            if len(calls) > most:
                raise StoppedError
            return gradient(objective, w)

        calls.clear()
        monkeypatch.setattr(Objective, "value_and_gradient", counted)
        (found,) = Runner(quick.minimizers(digits, run_dir), Settings()).run([], [item]).values()
        return found, len(calls)

    whole, number = measured(tmp_path / "whole")
    with pytest.raises(StoppedError):
        measured(tmp_path, most=3)
    (kept,) = tmp_path.glob("sharpness/*.gradients")
    assert len(list(kept.iterdir())) == 3
    resumed, rest = measured(tmp_path)
    assert rest == number - 3
    assert not kept.exists()
    assert resumed.provenance.wall_seconds >= 300 > whole.provenance.wall_seconds, "that of both processes"
    seconds = {"seconds": 0.0, "objective_seconds": 0.0}
    assert dataclasses.replace(resumed.result, **seconds) == dataclasses.replace(whole.result, **seconds)
