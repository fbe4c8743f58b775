"""F2 on a Kaldi directory of the paper's size, which is made of random numbers: memory and time of loading, and of
one epoch in the paper's large batches.

    python benchmarks/timit_scale.py          # loading: seconds
    python benchmarks/timit_scale.py epoch    # and an epoch of batches of 72,132, which takes 5 GiB

Makes 721,329 training and 310,621 test frames of 40 numbers with 1973 classes, in 300 MB of a temporary folder. Writes
results/benchmarks.json.
"""

import sys
import tempfile
import time
from pathlib import Path

import kaldiio
import numpy as np
from rooms import keep, peak_gib, recipe_of

FRAMES = {"train": 721_329, "test": 310_621}
CLASSES, NUMBERS = 1973, 40


def write_half(folder: Path, frames: int, means: np.ndarray, random: np.random.Generator) -> None:
    """Write utterances of 150 to 449 frames, features around their class's mean, and the alignments as pdf ids."""
    folder.mkdir()
    with (
        kaldiio.WriteHelper(f"ark,scp:{folder}/feats.ark,{folder}/feats.scp") as features,
        kaldiio.WriteHelper(f"ark:{folder}/ali-pdf.ark") as alignments,
    ):
        for number in range(frames):
            length = min(frames, int(random.integers(150, 450)))
            states = np.repeat(random.integers(0, CLASSES, -(-length // 6)), 6)[:length].astype(np.int32)
            name = f"utterance{number:05d}"
            features(name, (means[states] + random.normal(size=(length, NUMBERS))).astype(np.float32))
            alignments(name, states)
            frames -= length
            if not frames:
                return


def write(folder: Path) -> None:
    """Write both halves."""
    random = np.random.default_rng(0)
    means = random.normal(size=(CLASSES, NUMBERS))
    for half, frames in FRAMES.items():
        write_half(folder / half, frames, means, random)


def measure(folder: Path, with_epoch: bool) -> dict:
    """Load the directory, train if that is asked for; return seconds and peaks of this process's memory (GiB)."""
    from large_batch import datasets

    began = time.perf_counter()
    data = datasets.load_data("timit", folder).reshape_to((9 * NUMBERS,))
    assert (len(data.x_train), len(data.x_test)) == tuple(FRAMES.values())
    found = {"load_seconds": time.perf_counter() - began, "load_peak_gib": peak_gib()}
    print(f"loaded in {found['load_seconds']:.1f} s, peak {found['load_peak_gib']:.2f} GiB", flush=True)
    if with_epoch:
        import network_zoo
        from large_batch.minimizers import Minimizers

        batch, network = network_zoo.get("F2").large_batch(len(data.x_train)), network_zoo.get("F2")
        recipe, began = recipe_of("F2", data, batch), time.perf_counter()
        trained = Minimizers(network, data, folder / "runs").train(recipe)
        found |= {"batch_size": batch, "loss": trained.history[-1].train_loss}
        found |= {"epoch_seconds": time.perf_counter() - began, "epoch_peak_gib": peak_gib()}
        seconds, peak = found["epoch_seconds"], found["epoch_peak_gib"]
        print(f"an epoch of batches of {batch:,}: {seconds:.0f} s, peak {peak:.2f} GiB, loss {found['loss']:.3f}")
    return found


def main() -> None:
    """Make the directory, measure and write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "timit"
        folder.mkdir()
        write(folder)
        from large_batch import store

        origin, began = store.provenance(), time.monotonic()
        keep("F2 on TIMIT's size", measure(folder, "epoch" in sys.argv[1:]), origin, began)


if __name__ == "__main__":
    main()
