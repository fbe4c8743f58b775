"""What a measurement of Metric 2.1 costs outside the loss and its gradient, how that grows, and its peak memory.

    python benchmarks/sharpness_cost.py            # F1 and C1, full space

- share: 10 iterations of L-BFGS-B at the starting point over 5000 samples, which are one full chunk, in a process of
  its own; the time within the objective is scaled up to the whole training set.
- samples: the loss and its gradient over three sizes of the data set, one after the other.
- weights: what is outside the objective, for as many weights as F1, C1 and C2 have, on a paraboloid.

Prints all of it, writes results/benchmarks.json.
"""

import multiprocessing
import sys
import time
from dataclasses import dataclass

from rooms import data_of, keep, peak_gib

CHUNK = 5000
SIZES = {"F1": (15_000, 30_000, 60_000), "C1": (5_000, 10_000, 20_000)}
WEIGHTS = {"F1": 1_462_794, "C1": 1_757_834, "C2": 14_991_946}


@dataclass(frozen=True)
class Share:
    """Of one network: weights, seconds of an evaluation over the whole training set, seconds outside the objective for
    each evaluation, the latter's share of both (percent), peak memory of the process (GiB)."""

    network: str
    weights: int
    evaluation_seconds: float
    outside_seconds: float
    outside_share: float
    peak_gib: float


@dataclass(frozen=True)
class Growth:
    """Of one network: numbers of samples or weights, and microseconds for each of them in an evaluation."""

    network: str
    of: str
    sizes: list[int]
    microseconds: list[float]


class Paraboloid:
    """f(w) = 1 - |w - 1|^2 / 2n, whose gradient costs next to nothing."""

    def value_and_gradient(self, w):
        """Return f and its gradient."""
        slope = (1 - w) / len(w)
        return 1 - float(slope @ slope) * len(w) / 2, slope


def share(network_name: str) -> Share:
    """Measure one network in this process."""
    import network_zoo
    from large_batch.layers import pixels
    from large_batch.objective import Objective, flat_weights
    from large_batch.sharpness_metric import sharpness

    samples = len(data_of(network_name).x_train)
    data = data_of(network_name, CHUNK)
    model = network_zoo.get(network_name).build()
    objective = Objective(model, data.x_train, data.y_train, prepare=pixels)
    w = flat_weights(model)
    objective.value_and_gradient(w)  # compiles
    result = sharpness(objective, w, 5e-4)
    whole = result.objective_seconds / result.evaluations * samples / CHUNK
    outside = (result.seconds - result.objective_seconds) / result.evaluations
    return Share(network_name, len(w), whole, outside, 100 * outside / (outside + whole), peak_gib())


def growth_with_samples(network_name: str) -> Growth:
    """Time the gradient over three sizes, twice in turns; the faster one counts."""
    import network_zoo
    from large_batch.layers import pixels
    from large_batch.objective import Objective, flat_weights

    model = network_zoo.get(network_name).build()
    w = flat_weights(model)
    data = data_of(network_name)
    objectives = [
        Objective(model, data.x_train[:size], data.y_train[:size], prepare=pixels) for size in SIZES[network_name]
    ]
    for objective in objectives:
        objective.value_and_gradient(w)  # compiles
    seconds = [[_seconds(lambda o=objective: o.value_and_gradient(w)) for objective in objectives] for _ in range(2)]
    fastest = [min(times) for times in zip(*seconds, strict=True)]
    each = [1e6 * time / size for time, size in zip(fastest, SIZES[network_name], strict=True)]
    return Growth(network_name, "samples", list(SIZES[network_name]), each)


def _seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def growth_with_weights() -> Growth:
    """Time what is outside the objective for three numbers of weights."""
    import numpy as np

    from large_batch.sharpness_metric import sharpness

    results = [sharpness(Paraboloid(), np.zeros(size), 5e-4) for size in WEIGHTS.values()]
    each = [1e6 * (r.seconds - r.objective_seconds) / r.evaluations / r.dimension for r in results]
    return Growth(", ".join(WEIGHTS), "weights", list(WEIGHTS.values()), each)


def main() -> None:
    """Measure everything in fresh processes, print it and write it."""
    from large_batch import store, tables

    origin, began, shares, growths = store.provenance(), time.monotonic(), [], []
    processes = multiprocessing.get_context("spawn")
    for network in sys.argv[1:] or SIZES:
        with processes.Pool(1) as process:
            shares.append(process.apply(share, (network,)))
        with processes.Pool(1) as process:
            growths.append(process.apply(growth_with_samples, (network,)))
    with processes.Pool(1) as process:
        growths.append(process.apply(growth_with_weights))
    rows = [["", "weights", "evaluation (s)", "outside (s)", "share", "peak GiB"]]
    for each in shares:
        seconds = f"{each.evaluation_seconds:.2f}", f"{each.outside_seconds:.2f}"
        rows.append([each.network, f"{each.weights:,}", *seconds, f"{each.outside_share:.1f}%", f"{each.peak_gib:.1f}"])
    print(tables.lay_out(rows))
    for growth in growths:
        sizes = ", ".join(f"{t:.3g} for {n:,}" for n, t in zip(growth.sizes, growth.microseconds, strict=True))
        print(f"{growth.network}: microseconds for each of the {growth.of}: {sizes}")
    keep("sharpness", {"shares": shares, "growth": growths}, origin, began)


if __name__ == "__main__":
    main()
