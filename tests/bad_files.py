"""What the cases of test_bad_input.py find in their folders: each returned function makes a file in a folder."""

import functools
import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

import network_zoo
from large_batch.backend import keras
from large_batch.objective import write_weights


def file(name: str, content: bytes) -> Callable[[Path], None]:
    """Make a file, and the folders it lies in."""

    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return prepare


def npy(array: np.ndarray) -> bytes:
    """Return what a .npy file of the array holds."""
    np.save(content := io.BytesIO(), array)
    return content.getvalue()


def spoilt(
    name: str, shape: tuple[int, ...], dtype: type, cut: int | None = None, **changes: np.ndarray | None
) -> Callable[[Path], None]:
    """Make a data file, two samples a half, with changed arrays (None: left out), or only its first `cut` bytes."""
    x, y = np.zeros((2, *shape), dtype), np.array([0, 1])
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changes
    np.savez(content := io.BytesIO(), **{key: value for key, value in arrays.items() if value is not None})
    return file(f"data/{name}.npz", content.getvalue()[:cut])


cifar10 = functools.partial(spoilt, "cifar10", (32, 32, 3), np.uint8)
cifar100 = functools.partial(spoilt, "cifar100", (32, 32, 3), np.uint8)
mnist = functools.partial(spoilt, "mnist", (28, 28), np.uint8)
timit = functools.partial(spoilt, "timit", (360,), np.float32)
IMAGES, CHANNELS_FIRST = (2, 32, 32, 3), np.zeros((2, 3, 32, 32), np.uint8)
NOT_A_NUMBER = np.full((2, 360), np.nan, np.float32)


def weights(
    network: str = "F1", first: float | None = None, classes: int | None = None, cut: int | None = None
) -> Callable[[Path], None]:
    """Make mine.weights.h5: of a network, those of its first kernel all `first`, or only its first `cut` bytes."""

    def prepare(folder: Path) -> None:
        model = network_zoo.get(network).build(classes=classes)
        if first is not None:
            model.trainable_variables[0].assign(keras.ops.full_like(model.trainable_variables[0], first))
        path = folder / "mine.weights.h5"
        write_weights(model, path)
        path.write_bytes(path.read_bytes()[:cut])

    return prepare


def hdf5(content: dict[str, np.ndarray]) -> Callable[[Path], None]:
    """Make mine.weights.h5, an HDF5 file with the content."""

    def prepare(folder: Path) -> None:
        with h5py.File(folder / "mine.weights.h5", "w") as made:
            for name, array in content.items():
                made[name] = array

    return prepare
