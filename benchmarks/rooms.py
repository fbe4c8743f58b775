"""What the benchmarks share: contestants in processes of their own, the machine's limit, where results are kept."""

import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import prod
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "results" / "benchmarks.json"
MATRIX = 2048


@dataclass(frozen=True)
class Contestant:
    """An implementation: a class `module.name` made from (network, task, samples, **settings), with `run() -> samples`,
    in a process that starts with additional environment variables."""

    label: str
    module: str
    name: str
    settings: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)


class Work:
    """A contestant at work; lives in a process of its own, and is called through a `Room`."""

    def __init__(self, contestant: Contestant, network: str, task: str, samples: int):
        implementation = getattr(import_module(contestant.module), contestant.name)
        self._work = implementation(network, task, samples, **contestant.settings)

    def rate(self) -> float:
        """Do the work once; return samples a second."""
        began = time.perf_counter()
        samples = self._work.run()
        return samples / (time.perf_counter() - began)

    def matmul_rate(self, dtype: str = "float32") -> float:
        """Return the best of five rates of tf.matmul on 2048 x 2048 matrices, in GFLOP/s."""
        return matmul_rate(dtype)

    def peak_gib(self) -> float:
        """Return the peak of this process's resident memory in GiB."""
        return peak_gib()


class Room(BaseManager):
    """A fresh process in which one contestant works: `room.work(contestant, network, task, samples)`."""

    def __init__(self):
        super().__init__(ctx=get_context("spawn"))

    def enter(self, contestant: Contestant) -> "Room":
        """Start the process with the contestant's environment."""
        before = dict(os.environ)
        os.environ.update(contestant.environment)
        try:
            self.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return self


Room.register("work", Work)


def matmul_rate(dtype: str = "float32") -> float:
    """Return the best of five rates of tf.matmul on 2048 x 2048 matrices, in GFLOP/s: the limit to compare with."""
    from large_batch.backend import tf

    a = tf.cast(tf.random.stateless_normal((MATRIX, MATRIX), (0, 0)), dtype)
    product = tf.function(lambda: tf.matmul(a, a))
    product()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(5):
            result = product()
        result.numpy()
        seconds.append((time.perf_counter() - began) / 5)
    return 2 * MATRIX**3 / min(seconds) / 1e9


def forward_flop(model) -> int:
    """Return the floating-point operations of one sample's forward pass in the convolutions and dense layers."""
    import keras

    return sum(
        2 * layer.kernel.numpy().size * (prod(layer.output.shape[1:3]) if isinstance(layer, keras.layers.Conv2D) else 1)
        for layer in model.layers
        if hasattr(layer, "kernel")
    )


def peak_gib() -> float:
    """Return the peak of this process's resident memory; not getrusage's, which a process inherits from its parent."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def data_of(network_name: str, samples: int | None = None):
    """Return a network's data set, its training set cut to the first `samples`."""
    import network_zoo
    from large_batch import datasets

    network = network_zoo.get(network_name)
    data = datasets.load_data(network.dataset, ROOT / "data").reshape_to(network.input_shape)
    return replace(data, x_train=data.x_train[:samples], y_train=data.y_train[:samples])


def recipe_of(network_name: str, data, batch_size: int, **settings):
    """Return the recipe of a training with seed 0, of one epoch unless told otherwise."""
    import network_zoo
    from large_batch.recipes import Recipe

    return Recipe(
        network=network_name,
        dataset=data.name,
        data_digest=data.digest,
        architecture=network_zoo.get(network_name).architecture("repository"),
        batch_size=batch_size,
        **({"epochs": 1, "seed": 0} | settings),
    )


def batch_of(network_name: str, task: str) -> int:
    """Return the batch size of a training task: that of the whole data set."""
    import network_zoo

    network = network_zoo.get(network_name)
    samples = {"mnist": 60_000, "cifar10": 50_000}[network.dataset]
    return network.large_batch(samples) if task == "large-batch training" else network.small_batch(samples)


def chosen(*kinds: Sequence[str]) -> list[list[str]]:
    """Return, for each kind of words, those that are on the command line; ends with a message where one is unknown."""
    if unknown := set(sys.argv[1:]) - {name for names in kinds for name in names}:
        there = ", ".join(itertools.chain(*kinds))
        raise SystemExit(f"There is no {', '.join(sorted(unknown))}; choose among {there}.")
    return [[name for name in names if name in sys.argv[1:]] for names in kinds]


def spread(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Return the median of the rounds, and between which values they lie."""
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


def keep(section: str, content: object, origin, began: float) -> None:
    """Write a section of results/benchmarks.json, leaving the others as they are."""
    from large_batch import store

    sections = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sections[section] = {"results": content, "provenance": origin.after(time.monotonic() - began)}
    store.write_json(RESULTS, sections)
