"""How close training and evaluation come to the machine's float32 matrix-product rate.

    python benchmarks/throughput.py            # C1 on CIFAR-10 and F1 on MNIST

For each network: small-batch training, large-batch training, the loss over a data set (a point of the parametric plot),
and loss with gradient; each in a process of its own, beside `tf.matmul` of 2048 x 2048 matrices in the same process.
A gradient counts as twice the forward pass. Prints ratios and peak memory, writes results/benchmarks.json.
"""

import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TASKS = ("small-batch training", "large-batch training", "loss", "loss and gradient")
SAMPLES = {"C1": 20_000, "F1": 60_000}
MATRIX = 2048


@dataclass(frozen=True)
class Measurement:
    """One task: samples a second, its share of the matmul rate (GFLOP/s), peak memory of the process (GiB)."""

    network: str
    task: str
    samples_per_second: float
    forward_mflop: float
    gflop_per_second: float
    matmul_gflop_per_second: float
    share_of_matmul: float
    peak_gib: float


def matmul_rate() -> float:
    """Return the best of five rates of tf.matmul on 2048 x 2048 float32 matrices, in GFLOP/s."""
    import tensorflow as tf

    a = tf.random.stateless_normal((MATRIX, MATRIX), (0, 0))
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


def training_rate(recipe, data) -> float:
    """Train two epochs; return samples a second of the second, between its first and its last report."""
    from training import train

    times = []

    def report(samples: int, note: str) -> None:
        if "epoch 2/" in note:
            times.append((time.perf_counter(), samples))

    with tempfile.TemporaryDirectory() as run_dir:
        train(recipe, data, run_dir, report=report)
    return sum(samples for _, samples in times[1:]) / (times[-1][0] - times[0][0])


def measuring_rate(recipe, data, task: str) -> float:
    """Return samples a second of the objective's value, or value and gradient, over the data set."""
    from objective import Objective, flat_weights

    model = recipe.build(data)
    objective = Objective(model, data.x_train, data.y_train)
    measure = objective.value if task == "loss" else objective.value_and_gradient
    w = flat_weights(model)
    measure(w)
    began = time.perf_counter()
    measure(w)
    return objective.samples / (time.perf_counter() - began)


def measure(network_name: str, task: str) -> Measurement:
    """Measure one task in this process."""
    import data_zoo
    import network_zoo
    from training import Recipe

    network = network_zoo.get(network_name)
    data = data_zoo.load(network.dataset, ROOT / "data").fit(network.input_shape)
    samples = len(data.x_train)
    batch = network.large_batch(samples) if task.startswith("large") else network.small_batch(samples)
    few = slice(SAMPLES[network_name])
    data = dataclasses.replace(data, x_train=data.x_train[few], y_train=data.y_train[few])
    recipe = Recipe(network.name, data.name, data.digest, batch, epochs=2, seed=0)

    before = matmul_rate()
    training = task.endswith("training")
    rate = training_rate(recipe, data) if training else measuring_rate(recipe, data, task)
    matmul = max(before, matmul_rate())
    flop = forward_flop(recipe.build(data))
    achieved = rate * flop * (1 if task == "loss" else 3) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Measurement(network_name, task, rate, flop / 1e6, achieved, matmul, achieved / matmul, peak)


def main() -> None:
    """Measure every task in a fresh process, print the table and write it."""
    import cli
    import runs

    origin, began = runs.provenance(), time.monotonic()
    measurements = []
    for network in SAMPLES:
        for task in TASKS:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                measurements.append(process.apply(measure, (network, task)))
    rows = [["", "samples/s", "GFLOP/s", "matmul", "share", "peak GiB"]]
    for m in measurements:
        rates = (f"{m.samples_per_second:,.0f}", f"{m.gflop_per_second:.0f}", f"{m.matmul_gflop_per_second:.0f}")
        rows.append([f"{m.network} {m.task}", *rates, f"{m.share_of_matmul:.0%}", f"{m.peak_gib:.1f}"])
    print(cli.table(rows))
    runs.write_json(
        ROOT / "results" / "benchmarks.json",
        {"measurements": measurements, "provenance": origin.after(time.monotonic() - began)},
    )


if __name__ == "__main__":
    main()
