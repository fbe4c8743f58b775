"""What a measurement of Metric 2.1 costs outside the loss and its gradient, and how much memory it takes.

    python benchmarks/sharpness_cost.py            # F1, C1 and C2 (a quarter of an hour), full space
    python benchmarks/sharpness_cost.py F1 C1

Each network in a process of its own, at its starting point: 10 iterations of L-BFGS-B over 5000 samples, which are one
full chunk. The time within the objective is scaled up to the whole training set. Prints the share of the rest and the
peak memory, writes results/benchmarks-sharpness.json.
"""

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SAMPLES, ITERATIONS = 5000, 10


@dataclass(frozen=True)
class Cost:
    """Of one network: weights, seconds of an evaluation over the whole training set, seconds outside the objective for
    each evaluation, the latter's share of both (percent), peak memory of the process (GiB)."""

    network: str
    weights: int
    evaluation_seconds: float
    outside_seconds: float
    outside_share: float
    peak_gib: float


def measure(network_name: str) -> Cost:
    """Measure one network in this process."""
    import data_zoo
    import network_zoo
    from metric import sharpness
    from objective import Objective, flat_weights

    network = network_zoo.get(network_name)
    data = data_zoo.load(network.dataset, ROOT / "data").fit(network.input_shape)
    model = network.build()
    objective = Objective(model, data.x_train[:SAMPLES], data.y_train[:SAMPLES])
    w = flat_weights(model)
    objective.value_and_gradient(w)  # compiles
    result = sharpness(objective, w, 5e-4, iterations=ITERATIONS)
    whole = result.objective_seconds / result.evaluations * len(data.x_train) / SAMPLES
    outside = (result.seconds - result.objective_seconds) / result.evaluations
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Cost(network.name, len(w), whole, outside, 100 * outside / (outside + whole), peak)


def main() -> None:
    """Measure every network in a fresh process, print the table and write it."""
    import cli
    import runs

    origin, began = runs.provenance(), time.monotonic()
    costs = []
    for network in sys.argv[1:] or ("F1", "C1", "C2"):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            costs.append(process.apply(measure, (network,)))
    rows = [["", "weights", "evaluation (s)", "outside (s)", "share", "peak GiB"]]
    for cost in costs:
        seconds = f"{cost.evaluation_seconds:.2f}", f"{cost.outside_seconds:.2f}"
        rows.append([cost.network, f"{cost.weights:,}", *seconds, f"{cost.outside_share:.1f}%", f"{cost.peak_gib:.1f}"])
    print(cli.table(rows))
    content = {"costs": costs, "provenance": origin.after(time.monotonic() - began)}
    runs.write_json(ROOT / "results" / "benchmarks-sharpness.json", content)


if __name__ == "__main__":
    main()
