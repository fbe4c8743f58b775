"""What TensorFlow's choice of kernels is worth: oneDNN against TensorFlow's own, and F1's step with and without XLA.

    python benchmarks/kernels.py                                # everything
    python benchmarks/kernels.py XLA                            # one of the two
    python benchmarks/kernels.py --samples 1024 --turns 1       # a quick try, which is not kept

- oneDNN: training of C1 and F1 in two processes, started with TF_ENABLE_ONEDNN_OPTS=1 and 0, that work in turns.
- XLA: training of F1 in batches of several sizes in one process, with the step compiled and not, in turns.

The two rates of a turn are measured one right after the other, so that the median of their ratios depends less on other
work on the machine than the rates do. Prints both, writes results/benchmarks.json.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rooms import Contestant, Room, Work, batch_of, keep, spread

SAMPLES = {"C1": 5_000, "F1": 30_720}  # of one turn
TASKS = ("small-batch training", "large-batch training")
BATCHES = (64, 256, 512, 1024, 2048)
TURNS = 6


@dataclass(frozen=True)
class Comparison:
    """Of training in batches of one size: samples a second in each turn, with and without, and the median ratio."""

    network: str
    kernels: str
    batch_size: int
    rates_with: list[float]
    rates_without: list[float]
    median_ratio: float


def compare(network: str, kernels: str, batch: int, works: Sequence[Work], turns: int) -> Comparison:
    """Let two works, with and without, do their training in turns; print and return what is found."""
    for work in works:
        work.rate()  # compiles
    rates = [[work.rate() for work in works] for _ in range(turns)]
    ratio = statistics.median(one / other for one, other in rates)
    having, lacking = (list(column) for column in zip(*rates, strict=True))
    print(
        f"{network} batch {batch:5}  {kernels:6} {spread(having):26} without {spread(lacking):26} ratio {ratio:.2f}",
        flush=True,
    )
    return Comparison(network, kernels, batch, having, lacking, ratio)


def with_onednn(samples: dict[str, int], turns: int) -> list[Comparison]:
    """Compare the two processes at each network's tasks."""
    found = []
    for network, count in samples.items():
        for task in TASKS:
            with ExitStack() as rooms:
                works = []
                for on in ("1", "0"):
                    one = Contestant(f"oneDNN {on}", "ours", "Ours", environment={"TF_ENABLE_ONEDNN_OPTS": on})
                    room = rooms.enter_context(Room().enter(one))
                    works.append(room.work(one, network, task, count))
                found.append(compare(network, "oneDNN", batch_of(network, task), works, turns))
    return found


def with_xla(samples: int, turns: int) -> list[Comparison]:
    """Compare the two steps of F1 in one process for each batch size."""
    found = []
    for batch in BATCHES:
        everyone = [
            Contestant(f"compiled: {compiled}", "ours", "Ours", {"batch": batch, "compiled": compiled})
            for compiled in (True, False)
        ]
        with Room().enter(everyone[0]) as room:
            works = [room.work(one, "F1", TASKS[0], samples) for one in everyone]
            found.append(compare("F1", "XLA", batch, works, turns))
    return found


def main() -> None:
    """Compare, print a line for each and write them."""
    from large_batch import store

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="oneDNN|XLA", help="default: both")
    parser.add_argument("--samples", type=int, help="of a turn; nothing is written")
    parser.add_argument("--turns", type=int, default=TURNS)
    asked = parser.parse_args()
    samples = {network: asked.samples or count for network, count in SAMPLES.items()}
    parts = {
        "oneDNN": lambda: with_onednn(samples, asked.turns),
        "XLA": lambda: with_xla(samples["F1"], asked.turns),
    }
    if unknown := set(asked.parts) - set(parts):
        parser.error(f"there is no {', '.join(unknown)}; choose among {', '.join(parts)}")
    for name in asked.parts or parts:
        origin, began = store.provenance(), time.monotonic()
        found = parts[name]()
        if asked.samples is None:
            keep(f"kernels {name}", found, origin, began)


if __name__ == "__main__":
    main()
