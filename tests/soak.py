"""Kills trainings at random moments, again and again, and compares where they end with one that was left alone.

    python tests/soak.py --kills 100

C1 with dropout on the digits, float32 and bfloat16 in turn, each training another seed. Every process is killed with
SIGKILL at a moment drawn uniformly from the first 60 % of the length of a whole training, and started again, until it
ends. Prints what was found; the exit code is 1 if a single bit, or a file, differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import network_zoo  # noqa: E402
from large_batch import datasets  # noqa: E402
from large_batch.minimizers import Minimizers  # noqa: E402
from large_batch.recipes import Recipe  # noqa: E402


def child(recipe: Recipe, found: Minimizers, seconds: float | None) -> bool:
    """Train in a fork, killed after some seconds; return whether it ended by itself."""
    process = os.fork()  # TensorFlow is imported, but has not started
    if process == 0:
        found.train(recipe)
        os._exit(0)
    timer = threading.Timer(seconds or 1e6, os.kill, (process, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(process, 0)
    timer.cancel()
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit(f"A training failed: {recipe}.")
    return not os.WIFSIGNALED(status)


def weights(folder: Path) -> list[bytes]:
    """Return the weights in a folder: HDF5 files themselves hold the time of writing."""
    import h5py

    found = []
    for name in ("start", "minimizer"):
        with h5py.File(folder / f"{name}.weights.h5") as file:
            file.visititems(
                lambda key, item: found.append(item[()].tobytes()) if isinstance(item, h5py.Dataset) else None
            )
    return found


def main() -> None:
    """Kill until there were enough kills, finishing the last training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    network = network_zoo.get("C1")
    data = datasets.load_data("digits", "unused").reshape_to(network.input_shape)
    settings = {"network": "C1", "dataset": data.name, "data_digest": data.digest, "definition": "paper"}
    kills, differing, began = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for seed in range(10**6):
            if kills >= options.kills:
                break
            precision = ("float32", "bfloat16")[seed % 2]
            recipe = Recipe(**settings, batch_size=100, epochs=30, seed=seed, precision=precision)
            whole, killed = (Minimizers(network, data, Path(root) / place) for place in ("whole", "killed"))
            started = time.monotonic()
            child(recipe, whole, None)
            length, before = time.monotonic() - started, kills
            while not child(recipe, killed, moments.uniform(0, 0.6 * length)):
                kills += 1
            one, other = whole.folder(recipe), killed.folder(recipe)
            same = weights(one.path) == weights(other.path)
            same &= (one.path / "history.csv").read_bytes() == (other.path / "history.csv").read_bytes()
            same &= {path.name for path in one.path.iterdir()} == {path.name for path in other.path.iterdir()}
            same &= other.whole(*one.sums())
            differing += not same
            print(
                f"seed {seed} {precision}: {kills - before} kills in trainings of {length:.1f} s, "
                f"{'the same to the bit' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{kills} kills, {differing} of {seed} trainings differ, {time.monotonic() - began:.0f} s")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
