"""dataset_sources: the published files of data sets, as people have them on disk; rewritten here from the arrays."""

import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from conftest import ROOT

from large_batch import dataset_sources, datasets
from large_batch.errors import MachineError, UserError


@pytest.fixture(scope="module")
def real():
    """The real MNIST and CIFAR-10."""
    try:
        return {name: datasets.load_data(name, ROOT / "data") for name in ("mnist", "cifar10")}
    except MachineError as error:
        pytest.skip(str(error))


def write_tar(path, folder, files):
    """Write a .tar file, which Python reads whatever its name is, without the time that packing takes."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def rows(x):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)


def binary(x, *labels):
    return np.column_stack([*labels, rows(x)]).astype(np.uint8).tobytes()


def accept(monkeypatch, path, name):
    """Publish the file that was written."""
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    archives = dataset_sources.ARCHIVES[name]
    monkeypatch.setitem(archives, path.name, archives[path.name]._replace(md5=md5))


def test_all_of_cifar10(tmp_path, monkeypatch, real):
    """It ends at the published digest."""
    data, path, tenth = real["cifar10"], tmp_path / "cifar-10-binary.tar.gz", 10_000
    files = {
        f"data_batch_{i + 1}.bin": binary(
            *(array[i * tenth : (i + 1) * tenth] for array in (data.x_train, data.y_train))
        )
        for i in range(5)
    }
    write_tar(path, "cifar-10-batches-bin", files | {"test_batch.bin": binary(data.x_test, data.y_test)})
    accept(monkeypatch, path, "cifar10")
    loaded = datasets.load_data("cifar10", tmp_path)
    assert (loaded.digest, loaded.source) == (data.digest, f"file {path}")


def test_cifar10_in_pickles(tmp_path, monkeypatch):
    x, path = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8), tmp_path / "cifar-10-python.tar.gz"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    content = {
        name: pickle.dumps({b"data": rows(x[2 * i : 2 * i + 2]), b"labels": [i, 9]}) for i, name in enumerate(names)
    }
    write_tar(path, "cifar-10-batches-py", content)
    accept(monkeypatch, path, "cifar10")
    found, read = dataset_sources.published("cifar10", tmp_path)
    arrays = read()
    assert found == path
    np.testing.assert_array_equal(arrays.x_train, x[:10])
    np.testing.assert_array_equal(arrays.y_train, [0, 9, 1, 9, 2, 9, 3, 9, 4, 9])
    np.testing.assert_array_equal(arrays.x_test, x[10:])


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x, fine, coarse = rng.integers(0, 256, (9, 32, 32, 3), np.uint8), rng.integers(0, 100, 9), rng.integers(0, 20, 9)
    binaries = {"train.bin": binary(x, coarse, fine), "test.bin": binary(x[:4], coarse[:4], fine[:4])}
    pickles = {
        name: pickle.dumps(
            {b"data": rows(x)[:n], b"fine_labels": fine[:n].tolist(), b"coarse_labels": coarse[:n].tolist()}
        )
        for name, n in (("train", 9), ("test", 4))
    }
    for version, content in (("python", pickles), ("binary", binaries)):
        path = tmp_path / f"cifar-100-{version}.tar.gz"
        write_tar(path, f"cifar-100-{version}", content)
        accept(monkeypatch, path, "cifar100")
        data = datasets.load_data("cifar100", tmp_path)
        assert path.name in data.source
        np.testing.assert_array_equal(data.x_train, x)
        np.testing.assert_array_equal(data.y_train, fine)
        np.testing.assert_array_equal(data.x_test, x[:4])
        np.testing.assert_array_equal(data.y_test, fine[:4])


def test_cifar100_of_ones_own_is_the_published_one(tmp_path, monkeypatch):
    """In the order of the binary version, whose coarse labels follow from the fine ones; a part of it is taken."""
    rng = np.random.default_rng(0)
    x, y = np.zeros((60_000, 32, 32, 3), np.uint8), rng.integers(0, 100, 60_000)
    x[:, 3, 5, 2] = rng.integers(0, 256, 60_000)
    coarse = np.array([ord(letter) - ord("A") for letter in dataset_sources.SUPERCLASSES])
    assert np.bincount(coarse).tolist() == [5] * 20
    # Apple, aquarium fish, baby, bear, beaver; wolf, woman and worm (large carnivores, people, invertebrates)
    assert coarse[:5].tolist() == [4, 1, 14, 8, 0] and coarse[-3:].tolist() == [8, 14, 13]
    halves = [(x[:50_000], y[:50_000]), (x[50_000:], y[50_000:])]
    digests = [hashlib.sha1(binary(x, coarse[y], y), usedforsecurity=False).hexdigest() for x, y in halves]
    arrays = dict(x_train=x[:50_000], y_train=y[:50_000], x_test=x[50_000:], y_test=y[50_000:])
    np.savez(tmp_path / "cifar100.npz", **arrays)
    with pytest.raises(UserError, match="it is not the published cifar100 data set"):
        datasets.load_data("cifar100", tmp_path)
    monkeypatch.setattr(dataset_sources, "CIFAR100", tuple(digests))
    assert datasets.load_data("cifar100", tmp_path).classes == 100
    arrays["y_test"][0] = 99 - arrays["y_test"][0]
    np.savez(tmp_path / "cifar100.npz", **arrays)
    with pytest.raises(UserError, match="it is not the published cifar100 data set"):
        datasets.load_data("cifar100", tmp_path)
    np.savez(tmp_path / "cifar100.npz", **{key: array[:100] for key, array in arrays.items()})
    assert len(datasets.load_data("cifar100", tmp_path).x_train) == 100


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(("name", "number"), [("cifar10", 10), ("cifar100", 100)])
def test_nothing_is_opened_without_the_published_digest(tmp_path, name, number):
    for version in ("binary", "python"):
        path = tmp_path / f"cifar-{number}-{version}.tar.gz"
        write_tar(path, "any", {file: pickle.dumps(Trap()) for file in ("train", "data_batch_1")})
        with pytest.raises(UserError, match=rf"{path.name} cannot be used: it is not the published archive .*MD5"):
            datasets.load_data(name, tmp_path)
        path.unlink()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder, data, packed):
    arrays = data.x_train, data.y_train, data.x_test, data.y_test
    for i, (name, array) in enumerate(zip(dataset_sources.IDX, arrays, strict=True)):
        content = idx(array)
        if i in packed:
            name, content = f"{name}.gz", gzip.compress(content, 1)
        (folder / name).write_bytes(content)


def test_the_four_files_of_mnist(tmp_path, real):
    write_mnist(tmp_path, real["mnist"], packed={1, 2, 3})
    loaded = datasets.load_data("mnist", tmp_path)
    assert (loaded.digest, loaded.source) == (real["mnist"].digest, f"file {tmp_path / dataset_sources.IDX[0]}")


def test_damaged_files_of_mnist(tmp_path, digits):
    write_mnist(tmp_path, digits, packed=())
    images = tmp_path / dataset_sources.IDX[0]
    whole = images.read_bytes()
    for content in (
        b"",
        whole[:3],
        whole[:9],
        whole[:-1],
        whole + b"1",
        b"\1" + whole,
        b"\0\0\x08\xff" + 1020 * b"\xff",
    ):
        images.write_bytes(content)
        with pytest.raises(UserError, match=f"{images.name} cannot be used: {images.name} is no whole IDX file"):
            datasets.load_data("mnist", tmp_path)
    images.write_bytes(whole)
    with pytest.raises(UserError, match=r"x_train has samples of shape \(784,\) instead of \(28, 28\)"):
        datasets.load_data("mnist", tmp_path)
    images.rename(images.with_suffix(".gz"))
    with pytest.raises(UserError, match="Not a gzipped file"):
        datasets.load_data("mnist", tmp_path)
