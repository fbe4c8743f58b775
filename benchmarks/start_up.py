"""What users wait for besides the computation: start-up, data, compilation, a checkpoint, a figure.

    python benchmarks/start_up.py

Every item is the median of three runs, in seconds; the first three and the steps start a process each. Checkpoints have
a script of their own, checkpoint_cost.py. Writes results/benchmarks.json.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from rooms import ROOT, keep

TIMES = 3
FIRST_STEP = """
import sys; sys.path[:0] = ["benchmarks", "."]
from rooms import data_of, recipe_of
import network_zoo
from large_batch.training import TrainingLoop
data = data_of("{network}")
TrainingLoop(recipe_of("{network}", data, 256), network_zoo.get("{network}"), data).advance(stop=False)
"""


def python(*arguments: str) -> Callable[[], object]:
    """Return the running of a Python command at the repository's root."""
    return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of three runs."""
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def drawing() -> Callable[[], object]:
    """Return the drawing of a parametric plot as PDF and PNG, from made-up curves of 25 points."""
    from large_batch import figures
    from large_batch.measurements import Evaluated

    alphas, points = [-1 + i / 8 for i in range(25)], [Evaluated(*([2.0, 2.0, 50.0] * 2))] * 25
    return lambda: figures.drawn(figures.parametric_plot(alphas, points, [], "C1", "linear path"), "drawn")


def main() -> None:
    """Measure every item, print a line for each and write them."""
    from large_batch import datasets, store

    origin, began = store.provenance(), time.monotonic()
    items = {
        "plot_parametric_plot.py --help": python("plot_parametric_plot.py", "--help"),
        "sharpness.py --help": python("sharpness.py", "--help"),
        "import of TensorFlow and Keras": python("-c", "import large_batch.backend"),
        "first training step of F1, from the start of the process": python("-c", FIRST_STEP.format(network="F1")),
        "first training step of C1, from the start of the process": python("-c", FIRST_STEP.format(network="C1")),
        "MNIST from the cache": lambda: datasets.load_data("mnist", ROOT / "data"),
        "CIFAR-10 from the cache": lambda: datasets.load_data("cifar10", ROOT / "data"),
        "drawing a parametric plot, PDF and PNG": drawing(),
    }
    results = {}
    for name, work in items.items():
        results[name] = seconds(work)
        print(f"{results[name]:6.2f} s  {name}", flush=True)
    keep("start-up", results, origin, began)


if __name__ == "__main__":
    main()
