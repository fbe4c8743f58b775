import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent

# Whatever the machine: on the CPU, with TensorFlow's own choices, the same examples each time, as long as they take
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
for name in ("TF_CONFIG", "TF_XLA_FLAGS", "XLA_FLAGS", "TF_NUM_INTRAOP_THREADS"):
    os.environ.pop(name, None)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def digits():
    """The real 8x8 digits, fitted to F1."""
    from large_batch import datasets

    return datasets.load_data("digits", "unused").reshape_to((784,))


@pytest.fixture(scope="session")
def mnist():
    """The real MNIST, fitted to F1: from the project's cache, or fetched into it."""
    from large_batch import datasets
    from large_batch.errors import MachineError

    try:
        return datasets.load_data("mnist", ROOT / "data").reshape_to((784,))
    except MachineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def color_digits():
    """The digits as images for the small "paper" definition of C1, which has dropout."""
    from large_batch import datasets

    return datasets.load_data("digits", "unused").reshape_to((32, 32, 3))


class StoppedError(Exception):
    """Ends a training from its report."""


def recipe(data, **settings):
    """Return a short recipe, of F1 unless told otherwise."""
    from large_batch.recipes import Recipe

    defaults = {"network": "F1", "batch_size": 150, "epochs": 2, "seed": 0}
    return Recipe(dataset=data.name, data_digest=data.digest, **(defaults | settings))


def minimizers(asked, data, run_dir, **settings):
    """Return the minimizers of a recipe's network on the data, in a store."""
    import network_zoo
    from large_batch.minimizers import Minimizers

    return Minimizers(network_zoo.get(asked.network), data, run_dir, **settings)


def train(asked, data, run_dir, **settings):
    """Return a recipe's minimizer, trained or found."""
    return minimizers(asked, data, run_dir).train(asked, **settings)


def build(asked, data):
    """Return a recipe's network at its starting point."""
    import network_zoo

    return asked.build(network_zoo.get(asked.network), data)


def solution(minimizer, at, sharpness, result=None):
    """Return the solution of a recipe whose sharpness has a value at each epsilon, or is not resolved."""
    from large_batch import paper, store
    from large_batch.measurements import Evaluated, EvaluationRequest, Measured, SharpnessRequest, Solution
    from large_batch.sharpness_metric import SharpnessResult

    problem = {name: getattr(at, name) for name in ("network", "dataset", "data_digest", "definition")}
    of = store.provenance()
    evaluation = Measured(EvaluationRequest(**problem), result or Evaluated(*[1 / at.batch_size] * 3, *[80.0] * 3), of)
    measured = [
        Measured(
            SharpnessRequest(**problem, epsilon=epsilon, solver="lbfgsb", iterations=1),
            SharpnessResult(sharpness, 0.1, 0.2, epsilon, 3, "lbfgsb", 1, 1, "", 0.0, 0.0, 0.0),
            of,
        )
        for epsilon in paper.EPSILONS
    ]
    return Solution(minimizer, at, of, "w", 3.0, evaluation, measured)


def run_python(*arguments: str | Path, **settings) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, at the repository's root unless told otherwise."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], **({"cwd": ROOT, "capture_output": True, "text": True} | settings)
    )


@pytest.fixture(scope="session")
def run_script():
    """Run a script of the repository as `run_python` does, but in a fork of a process that has TensorFlow already."""
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forked.py", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def run(*arguments: str | Path) -> subprocess.CompletedProcess:
        given = [str(argument) for argument in arguments]
        print(json.dumps({"arguments": given, "environment": {}}), file=server.stdin, flush=True)
        return subprocess.CompletedProcess(given, *json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()
    server.wait()
