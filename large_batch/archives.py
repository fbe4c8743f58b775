"""The published files of known data sets as people have them on disk, taken as they are: CIFAR archives, MNIST's IDX.

An archive must have the published MD5 before anything in it is opened, above all unpickled. The Python and the binary
archives hold the same images in the same order. MNIST's files are checked as arrays (`datasets.KINDS`).
"""

import gzip
import hashlib
import math
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

Half = tuple[np.ndarray, np.ndarray]  # x and y
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LARGEST_IDX = 2**26  # bytes: MNIST's largest file has 47 million


class Archive(NamedTuple):
    """A published archive: its MD5, the files of its halves, and what reads one, an opened file of some bytes."""

    md5: str
    train: tuple[str, ...]
    test: str
    read: Callable[[IO[bytes]], Half]


def _pickled(file: IO[bytes]) -> Half:
    """A file of the Python version: a pickled dictionary. The archive's digest is known to be the published one."""
    content = pickle.load(file, encoding="bytes")
    return _images(content[b"data"]), np.array(content.get(b"fine_labels", content.get(b"labels")))


def _binary(file: IO[bytes], labels: int) -> Half:
    """A file of the binary version: rows of the labels, the fine one last, and 3 x 1024 pixels."""
    rows = np.frombuffer(file.read(), np.uint8).reshape(-1, labels + 3072)
    return _images(rows[:, labels:]), rows[:, labels - 1]


def _images(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


TENTHS = tuple(f"data_batch_{i}" for i in range(1, 6))
ARCHIVES = {
    "cifar10": {
        "cifar-10-binary.tar.gz": Archive(
            "c32a1d4ab5d03f1284b67883e8d87530",
            tuple(f"{name}.bin" for name in TENTHS),
            "test_batch.bin",
            partial(_binary, labels=1),
        ),
        "cifar-10-python.tar.gz": Archive("c58f30108f718f92721af3b95e74349a", TENTHS, "test_batch", _pickled),
    },
    "cifar100": {
        "cifar-100-binary.tar.gz": Archive(
            "03b5dce01913d631647c71ecec9e9cb8", ("train.bin",), "test.bin", partial(_binary, labels=2)
        ),
        "cifar-100-python.tar.gz": Archive("eb9058c3a382ffc7106e4002c42a8d85", ("train",), "test", _pickled),
    },
}


def find(name: str, folder: Path) -> tuple[Path, Callable[[], tuple[np.ndarray, ...]]] | None:
    """Return the published file of a data set in a folder, and what reads it, x_train, y_train, x_test and y_test; None
    where there is none.

    The file is a CIFAR archive or, where all four are there, plain or as .gz, the first of MNIST's. Reading raises
    ValueError with a clause that says what is wrong, or what the libraries raise.
    """
    for file, archive in ARCHIVES.get(name, {}).items():
        if (path := folder / file).is_file():
            return path, partial(_from_archive, path, archive)
    found = [_plain_or_packed(folder / file) for file in (IDX if name == "mnist" else ())]
    if found and all(found):
        return found[0], lambda: tuple(map(_idx, found))
    return None


def _from_archive(path: Path, archive: Archive) -> tuple[np.ndarray, ...]:
    with open(path, "rb") as file:
        if hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest() != archive.md5:
            raise ValueError("it is not the published archive (its MD5 differs)")
    with tarfile.open(path) as files:
        members = {Path(member.name).name: member for member in files if member.isfile()}
        *train, test = (archive.read(files.extractfile(members[name])) for name in (*archive.train, archive.test))
    return *(np.concatenate(parts) for parts in zip(*train, strict=True)), *test


def _plain_or_packed(path: Path) -> Path | None:
    return next((other for other in (path, path.with_name(f"{path.name}.gz")) if other.is_file()), None)


def _idx(path: Path) -> np.ndarray:
    """The array of bytes in an IDX file: two zeros, the type, the rank, the sizes, all big-endian, and the bytes."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read(LARGEST_IDX)
    start = 4 + 4 * int.from_bytes(content[3:4])  # of the values
    if content[:3] == b"\0\0\x08" and len(content) >= start > 4:
        shape = np.frombuffer(content[4:start], ">u4")
        if len(content) - start == math.prod(shape.tolist()):
            return np.frombuffer(content[start:], np.uint8).reshape(shape)
    raise ValueError(f"{path.name} is no whole IDX file of bytes")
