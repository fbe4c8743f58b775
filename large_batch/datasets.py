"""The data sets: five known ones and your own .npz files, checked and brought into the shape of a network's input.

A known set is looked for in `<data_dir>/<name>.npz`, which is the project's own cache and also how a user brings a
file, then as the published files in that folder, and then in the other `dataset_sources`. Whatever the source, the
arrays are the same bytes.
"""

import hashlib
import io
import math
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from large_batch import dataset_sources, files, memory, timit
from large_batch.dataset_sources import Arrays
from large_batch.errors import MachineError, UserError, no_such


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification data set in memory.

    x_*: uint8 pixels 0..255 or float32 features, (n, ...), or int32 windows of `frames`, (n, 9), whose numbers are the
    features; y_*: int32 labels 0..classes-1, (n,). digest: SHA-256 (hex) of the arrays as loaded, before any reshaping;
    source: where they came from, in a phrase.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    digest: str
    source: str
    frames: timit.Frames | None = None

    def reshape_to(self, input_shape: tuple[int, ...]) -> "DataSet":
        """Return the same data with samples of `input_shape`; the digest stays.

        Samples of as many elements are reshaped; the 8x8 digits are enlarged and framed with zeros.

        Args:
            input_shape: The shape of one sample, e.g. (784,) or (32, 32, 3).

        Raises:
            UserError: The samples do not match the network's input.
        """
        shape = (self.frames.width,) if self.frames else self.x_train.shape[1:]
        if self.frames and shape == tuple(input_shape):
            return self
        if not self.frames and math.prod(shape) == math.prod(input_shape):
            x_train, x_test = (x.reshape(-1, *input_shape) for x in (self.x_train, self.x_test))
        elif self.name == "digits" and shape == (8, 8) and len(input_shape) < 4 and min(_canvas(input_shape)) >= 8:
            x_train, x_test = (_enlarged(x, input_shape) for x in (self.x_train, self.x_test))
        else:
            raise UserError(
                f"{self.name} has samples of shape {shape}, which do not fit the network's input of shape "
                f"{tuple(input_shape)}; choose a data set and a network that go together."
            )
        return replace(self, x_train=x_train, x_test=x_test)


class _UnsuitableError(ValueError):
    """Arrays that are not of the kind they should be."""


class Kind(NamedTuple):
    """What is known of a data set beforehand: a sample's shape and type; where published, the digest of its arrays and
    the samples of its halves."""

    name: str
    shape: tuple[int, ...]
    dtype: type
    classes: int
    digest: str = ""
    samples: tuple[int, ...] = ()


LONGEST_HEADER = 16_384  # bytes of a .npy file; numpy itself refuses such of more than 10,000
MNIST = "4174aeaebcdbd197fae1faafb23a4f6b91d700a73237f197921c00d10963b453"
CIFAR10 = "e37b2909d96d83a3ae21207dbefe21206fba4154d597c77bd59a0b28cf5e8211"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("mnist", (28, 28), np.uint8, 10, MNIST, (60_000, 10_000)),
        Kind("cifar10", (32, 32, 3), np.uint8, 10, CIFAR10, (50_000, 10_000)),
        Kind("cifar100", (32, 32, 3), np.uint8, 100),
        Kind("timit", (360,), np.float32, 1973),
        Kind("digits", (8, 8), np.uint8, 10),
    )
}
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "timit": "TIMIT"}  # as they are written


def load_data(name: str, data_dir: str | Path) -> DataSet:
    """Load a data set; one line on stderr says which source was used.

    Args:
        name: One of KINDS: mnist with x (n, 28, 28) uint8, cifar10 and cifar100 (n, 32, 32, 3) uint8, timit (n, 360)
            float32, digits (n, 8, 8) uint8. Or the path of your own .npz file, with x_train and x_test (n, ...) of
            uint8 or floats, y_train and y_test (n,) or (n, 1) of integers from 0 on.
        data_dir: The folder of the known sets' files; one that had to be fetched is left there as `<name>.npz`.

    Raises:
        UserError: An unknown name, no such file, an unusable one, or the absent (licensed) timit.
        MachineError: No source answers, or the cache cannot be written.
    """
    kind, path = KINDS.get(name), Path(data_dir) / f"{name}.npz"
    check_name(name)
    if name.endswith(".npz"):
        data = _from_file(Path(name), None)
    elif name == "digits":
        data = _data_set(dataset_sources.scikit_digits(), kind, "scikit-learn's 8x8 digits")
    elif _exists(path):
        data = _from_file(path, kind)
    elif name == "timit":
        data = _from_kaldi(path, kind)
    elif published := dataset_sources.published(name, path.parent):
        data = _from_published(*published, kind)
    else:
        data = _fetched(path, kind)
    print(f"{data.name}: {data.source}", file=sys.stderr)
    return data


def at_hand(name: str, data_dir: str | Path) -> bool:
    """Return whether a known data set is there without fetching it."""
    path = Path(data_dir) / f"{name}.npz"
    kaldi = name == "timit" and timit.is_there(path.parent)
    return name == "digits" or _exists(path) or kaldi or bool(dataset_sources.published(name, path.parent))


def check_name(name: str) -> None:
    """Raise `UserError` unless there is a data set of that name, or such a file."""
    if not name.endswith(".npz") and name not in KINDS:
        raise no_such("data set", name, KINDS, ", or give an .npz file")
    if name.endswith(".npz") and not _exists(Path(name)):
        raise UserError(f"There is no data file {name}.")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path} cannot be looked up ({error.strerror}); name another.") from error


def _from_file(path: Path, kind: Kind | None) -> DataSet:
    """The data set in a file; without a kind, a user's own, which is of the kind that its arrays make it."""
    try:
        with zipfile.ZipFile(path) as file:
            if missing := [key for key in Arrays._fields if f"{key}.npy" not in file.namelist()]:
                raise UserError(f"{path} lacks {missing[0]}; it should be {_wanted(kind)}.")
            promised = Arrays(*(_promised(file.open(f"{key}.npy")) for key in Arrays._fields))
            kind_of_file = kind or _own_kind(path, promised)
            _check(promised, kind_of_file)
            # What is neither pixels nor float32 is copied into four bytes a value.
            sizes = [array.itemsize + (0 if array.dtype in (np.uint8, np.float32) else 4) for array in promised]
            needed = sum(array.size * size for array, size in zip(promised, sizes, strict=True))
            if needed > (free := memory.free_bytes()):
                raise UserError(
                    f"The arrays of {path} need {needed / 1e9:,.1f} GB of memory, of which {free / 1e9:,.1f} GB are "
                    "free; use fewer samples or a larger machine."
                )
            arrays = Arrays(*(np.lib.format.read_array(file.open(f"{key}.npy")) for key in Arrays._fields))
        return _data_set(arrays, kind_of_file, f"file {path}")
    except _UnsuitableError as error:
        remedy = "delete it or put the right file there" if kind else f"it should be {_wanted(kind)}"
        raise UserError(f"{path} cannot be used: {error}; {remedy}.") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        raise UserError(f"{path} is not a readable .npz file ({_short(error)}); delete or replace it.") from error


def _from_kaldi(path: Path, kind: Kind) -> DataSet:
    if not timit.is_there(path.parent):
        raise UserError(
            f"TIMIT is licensed and cannot be fetched; name a Kaldi directory with train/feats.scp and so on with "
            f"--data_dir (see large_batch/timit.py), or put your own at {path}: {_wanted(kind)}."
        )
    try:
        found = timit.load(path.parent)
        classes = 1 + max(int(ids.max()) for ids in found.labels)
        kind = kind._replace(shape=found.windows[0].shape[1:], dtype=np.int32, classes=classes)
        pairs = zip(found.windows, found.labels, strict=True)
        data = _data_set(Arrays(*(array for pair in pairs for array in pair)), kind, "")
        digest = hashlib.sha256(data.digest.encode() + found.frames.numbers.tobytes()).hexdigest()
        if not np.isfinite(found.frames.numbers).all():
            raise ValueError("its features hold NaN or infinite values")
    except (ValueError, OSError) as error:
        raise UserError(f"The Kaldi directory {path.parent} cannot be used: {error}.") from error
    source = f"Kaldi directory {path.parent}, {found.summary}; {classes:,} classes"
    return replace(data, digest=digest, source=source, frames=found.frames)


def _from_published(path: Path, read: Callable[[], Arrays], kind: Kind) -> DataSet:
    try:
        return _data_set(read(), kind, f"file {path}", archive=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        raise UserError(f"{path} cannot be used: {_short(error)}; delete it or put the right file there.") from error


def _promised(content: IO[bytes]) -> np.ndarray:
    """The array that the header at the start of a file tells of, without its values, and so without their memory."""
    start = io.BytesIO(content.read(LONGEST_HEADER))
    old = np.lib.format.read_magic(start) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(start)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return np.broadcast_to(np.zeros((), dtype), shape)


def _own_kind(path: Path, arrays: Arrays) -> Kind:
    """What a user's arrays say they are, but for the number of classes; whether that is sound is left to the checks."""
    return Kind(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem),
        shape=arrays.x_train.shape[1:],
        dtype=np.uint8 if arrays.x_train.dtype == np.uint8 else np.float32,
        classes=0,
    )


def _data_set(arrays: Arrays, kind: Kind, source: str, archive: bool = False) -> DataSet:
    """The arrays in their loaded types; raises `_UnsuitableError` with a clause that says what is wrong with them.

    A published `archive` has had its own digest checked.
    """
    _check(arrays, kind)
    highest = min(max(0, *(int(y.max()) for y in (arrays.y_train, arrays.y_test))), np.iinfo(np.int32).max - 1)
    classes = kind.classes or highest + 1
    train = _converted_half("train", arrays.x_train, arrays.y_train, kind, classes)
    test = _converted_half("test", arrays.x_test, arrays.y_test, kind, classes)
    loaded = Arrays(*train, *test)
    digest = _digest(loaded)
    published = kind.digest in ("", digest)
    if kind is KINDS["cifar100"] and len(train[0]) == 50_000 and not archive:  # a part of it is taken as it is
        published = dataset_sources.is_cifar100(loaded)
    if not published:
        raise _UnsuitableError(f"it is not the published {kind.name} data set (its digest differs)")
    return DataSet(kind.name, *train, *test, classes, digest, source)


def _check(arrays: Arrays, kind: Kind) -> None:
    """Raise `_UnsuitableError` for shapes and types that are not of the kind; the values are not looked at."""
    for half, x, y in (("train", arrays.x_train, arrays.y_train), ("test", arrays.x_test, arrays.y_test)):
        if x.shape[1:] != kind.shape:
            raise _UnsuitableError(f"x_{half} has samples of shape {x.shape[1:]} instead of {kind.shape}")
        if x.dtype != kind.dtype and not (kind.dtype is np.float32 and x.dtype.kind == "f"):
            raise _UnsuitableError(f"x_{half} holds {x.dtype} instead of {kind.dtype.__name__}")
        if x.ndim == 0 or x.size == 0:
            raise _UnsuitableError(f"x_{half} is {'empty' if x.ndim else 'a single number'}")
        if y.shape not in ((len(x),), (len(x), 1)):
            raise _UnsuitableError(f"y_{half} has shape {y.shape} where x_{half} has {len(x)} samples")
        if y.dtype.kind not in "iu":
            raise _UnsuitableError(f"y_{half} holds {y.dtype} instead of integer labels")
    if kind.samples and kind.samples != (len(arrays.x_train), len(arrays.x_test)):
        raise _UnsuitableError(f"it is not the published {kind.name} data set (which has {kind.samples} samples)")


def _converted_half(half: str, x: np.ndarray, y: np.ndarray, kind: Kind, classes: int) -> tuple[np.ndarray, np.ndarray]:
    if y.min() < 0 or y.max() >= classes:
        raise _UnsuitableError(f"y_{half} has labels from {y.min()} to {y.max()} instead of 0 to {classes - 1}")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, kind.dtype)
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise _UnsuitableError(f"x_{half} holds NaN or infinite values")
    return x, y.reshape(-1).astype(np.int32)


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for key, array in arrays._asdict().items():
        digest.update(f"{key} {array.shape} {array.dtype.str} ".encode())
        digest.update(array.data.cast("B"))
    return digest.hexdigest()


def _fetched(path: Path, kind: Kind) -> DataSet:
    files.check_writable(path.parent)
    failures = []
    for source, fetch in dataset_sources.sources(kind.name, kind.shape):
        try:
            data = _data_set(fetch(), kind, f"{source}, cached in {path}")
        except Exception as error:  # whatever goes wrong in one source, the next may have the data
            failures.append(f"{source}: {_short(error)}")
            print(f"{kind.name}: no data from {failures[-1]}", file=sys.stderr)
        else:
            with files.writing(path) as temporary:
                np.savez(temporary, **{key: getattr(data, key) for key in Arrays._fields})
            return data
    raise MachineError(
        f"No source answers for {kind.name} ({'; '.join(failures)}); put a file by hand at {path}: {_wanted(kind)}, "
        "or try scikit-learn's small digits with --dataset digits."
    )


def _wanted(kind: Kind | None) -> str:
    x, y = "uint8 or float samples of one shape", "0 on"
    if kind:
        x, y = f"{kind.dtype.__name__} samples of shape {kind.shape}", f"0 to {kind.classes - 1}"
    return f"an .npz file with x_train and x_test ({x}), y_train and y_test (for each sample an integer label from {y})"


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


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
    return images if len(input_shape) == 2 else images[..., np.newaxis].repeat(input_shape[2], axis=3)


def _framed(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    margins = [size - had for size, had in zip(shape, x.shape[1:], strict=True)]
    return np.pad(x, [(0, 0), *((margin // 2, margin - margin // 2) for margin in margins)])
