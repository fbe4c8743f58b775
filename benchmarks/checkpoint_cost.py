"""What a checkpoint costs: its bytes, and its time as a share of the epoch after which it is written.

    python benchmarks/checkpoint_cost.py            # F1 on MNIST and C1 on CIFAR-10, small and large batches

The length of an epoch is that of the steps of about 20 seconds, in the same process. Writing includes the checksum and
the wait until the disk has everything. Writes results/benchmarks.json.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rooms import ROOT, data_of, keep, recipe_of

SECONDS, TIMES = 20, 5


@dataclass(frozen=True)
class Cost:
    """Of one training: seconds of an epoch and of a checkpoint (the median), its size, and the ratio (percent)."""

    network: str
    batch_size: int
    epoch_seconds: float
    checkpoint_seconds: float
    checkpoint_megabytes: float
    share: float


def cost(recipe, data) -> Cost:
    """Measure one recipe."""
    import network_zoo
    from large_batch import store
    from large_batch.training import TrainingLoop

    loop = TrainingLoop(recipe, network_zoo.get(recipe.network), data)
    while loop.state.steps < 2:  # compiles
        loop.advance(stop=False)
    began, samples = time.perf_counter(), 0
    while time.perf_counter() < began + SECONDS and loop.state.seen < len(data.x_train):
        samples += loop.advance(stop=False)[0]
    epoch = (time.perf_counter() - began) * len(data.x_train) / samples
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        folder, path = store.Folder(Path(place)), Path(place) / "checkpoint.npz"
        times = []
        for _ in range(TIMES):
            began = time.perf_counter()
            loop.save(path)
            folder.seal(path.name)
            times.append(time.perf_counter() - began)
        size = path.stat().st_size / 1e6
    seconds = statistics.median(times)
    return Cost(recipe.network, recipe.batch_size, epoch, seconds, size, 100 * seconds / epoch)


def main() -> None:
    """Measure, print the table and write it."""
    import network_zoo
    from large_batch import store, tables

    origin, began, costs = store.provenance(), time.monotonic(), []
    for name in sys.argv[1:] or ("F1", "C1"):
        network = network_zoo.get(name)
        data = data_of(name)
        for batch in (network.small_batch(len(data.x_train)), network.large_batch(len(data.x_train))):
            costs.append(cost(recipe_of(name, data, batch), data))
    rows = [["", "epoch s", "checkpoint s", "MB", "share"]]
    for each in costs:
        times = f"{each.epoch_seconds:.1f}", f"{each.checkpoint_seconds:.3f}"
        rows.append(
            [f"{each.network} b{each.batch_size}", *times, f"{each.checkpoint_megabytes:.1f}", f"{each.share:.2f}%"]
        )
    print(tables.lay_out(rows))
    keep("checkpoints", costs, origin, began)


if __name__ == "__main__":
    main()
