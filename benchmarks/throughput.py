"""Training and measuring: ours beside the machine's limit, a plain Keras port and PyTorch.

    python benchmarks/throughput.py            # F1 on MNIST and C1 on CIFAR-10; needs the extra `bench`
    python benchmarks/throughput.py C2 loss    # a network, a task

For each task every implementation gets a process of its own and, after one run that compiles, works in turns with the
others (F1), so that all see the same machine, or after them (C1, C2: memory would not suffice). The limit is
`tf.matmul` of 2048 x 2048 matrices in our own process, before each turn; a gradient counts as three forward passes, a
Hessian-vector product as six. Prints medians and ranges of the turns, writes results/benchmarks.json.
"""

import statistics
import time
from contextlib import ExitStack
from ctypes.util import find_library
from dataclasses import dataclass

from rooms import Contestant, Room, chosen, forward_flop, keep, spread

# Samples of one turn (C1, F1, C2), and the forward passes that a sample counts as
TASKS = {
    "small-batch training": ({"C1": 2_560, "F1": 30_720, "C2": 512}, 3),
    "large-batch training": ({"C1": 5_000, "F1": 30_000, "C2": 5_000}, 3),
    "loss": ({"C1": 10_000, "F1": 60_000, "C2": 2_000}, 1),
    "loss and gradient": ({"C1": 5_000, "F1": 30_000, "C2": 1_000}, 3),
    "Hessian-vector product": ({"C1": 1_250, "F1": 10_000, "C2": 0}, 6),
}
TURNS = {"F1": 4, "C1": 2, "C2": 2}
IN_TURNS = {"F1"}


def contestants(task: str) -> list[Contestant]:
    """Return who works at a task; ours first."""
    everyone = [
        Contestant("ours", "ours", "Ours"),
        Contestant("ours, bfloat16", "ours", "Ours", {"precision": "bfloat16"}),
        Contestant("plain Keras", "plain_keras", "PlainKeras"),
        Contestant("plain Keras, no XLA", "plain_keras", "PlainKeras", {"jit_compile": False}),
        Contestant("PyTorch as it comes", "pytorch", "PyTorch", {"tuned": False}),
        Contestant("PyTorch tuned", "pytorch", "PyTorch", {"tuned": True}, allocator()),
        Contestant("PyTorch compiled", "pytorch", "PyTorch", {"tuned": True, "compiled": True}, allocator()),
    ]
    out = set()
    if not task.endswith("training"):
        out.add("ours, bfloat16")  # measuring is float32 always
    if task == "Hessian-vector product":
        out.add("PyTorch compiled")  # torch.compile has no second derivatives
    return [contestant for contestant in everyone if contestant.label not in out]


def allocator() -> dict[str, str]:
    """Return what PyTorch's tuning guide recommends: TCMalloc, or, where it is not installed, glibc told to keep freed
    memory."""
    for name in ("tcmalloc_minimal", "tcmalloc"):
        if library := find_library(name):
            return {"LD_PRELOAD": library}
    return {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclass(frozen=True)
class Result:
    """One implementation at one task: samples a second of each turn, peak memory of the process (GiB); for ours also
    GFLOP of a sample's forward pass, the limit (GFLOP/s), and the share of it (percent) in each turn."""

    network: str
    task: str
    implementation: str
    rates: list[float]
    peak_gib: float
    forward_gflop: float | None = None
    limits: list[float] | None = None
    shares: list[float] | None = None


def race(network: str, task: str, gflop: float) -> list[Result]:
    """Let all contestants do one task: in turns, or one after the other where memory would not hold them all."""
    samples, passes = TASKS[task][0][network], TASKS[task][1]
    everyone = contestants(task)
    results = []
    for group in [everyone] if network in IN_TURNS else [[contestant] for contestant in everyone]:
        with ExitStack() as rooms:
            works = {}
            for contestant in group:
                room = rooms.enter_context(Room().enter(contestant))
                works[contestant.label] = room.work(contestant, network, task, samples)
                works[contestant.label].rate()  # compiles
            rates, limits = {label: [] for label in works}, {label: [] for label in works}
            for _ in range(TURNS[network]):
                for label, work in works.items():
                    if label.startswith("ours"):
                        limits[label].append(work.matmul_rate("bfloat16" if "bfloat16" in label else "float32"))
                    rates[label].append(work.rate())
            for label, work in works.items():
                ours = {}
                if limits[label]:
                    turns = zip(rates[label], limits[label], strict=True)
                    shares = [100 * rate * gflop * passes / limit for rate, limit in turns]
                    ours = {"forward_gflop": gflop, "limits": limits[label], "shares": shares}
                results.append(Result(network, task, label, rates[label], work.peak_gib(), **ours))
                print_result(results[-1], results[0])
    return results


def print_result(result: Result, ours: Result) -> None:
    """Print a row: samples a second, the share of the limit, how many times faster ours is, peak memory."""
    share = f"{spread(result.shares, '{:.0f}')} % of {spread(result.limits)} GFLOP/s" if result.shares else ""
    ratio = statistics.median(a / b for a, b in zip(ours.rates, result.rates, strict=True))
    print(
        f"{result.network} {result.task:23} {result.implementation:20} {spread(result.rates):28} "
        f"ours {ratio:5.2f}x  {result.peak_gib:4.1f} GiB  {share}",
        flush=True,
    )


def main() -> None:
    """Run every task, print a table and write it."""
    import network_zoo
    from large_batch import store

    networks, tasks = chosen(TURNS, TASKS)
    for network in networks or ("F1", "C1"):
        gflop = forward_flop(network_zoo.get(network).build()) / 1e9
        for task in tasks or TASKS:
            if TASKS[task][0][network]:
                origin, began = store.provenance(), time.monotonic()
                keep(f"{network} {task}", race(network, task, gflop), origin, began)


if __name__ == "__main__":
    main()
