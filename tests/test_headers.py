"""Files of data whose headers, which are read first, tell of wrong arrays, of more than fits, or of nothing."""

import zipfile

import numpy as np
import pytest
from test_datasets import own

from large_batch import datasets
from large_batch.dataset_sources import Arrays
from large_batch.errors import UserError


def add_headers(path, version, kind, **shapes):
    """Add arrays to an .npz file that consist of their headers alone."""
    for name, shape in shapes.items():
        with zipfile.ZipFile(path, "a") as file, file.open(f"{name}.npy", "w") as content:
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            getattr(np.lib.format, f"write_array_header_{version}_0")(content, header)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((10**9, 29, 28), "x_train has samples of shape"), ((3_000_000, 28, 28), "not the published mnist")],
)
def test_a_file_of_the_wrong_shape_is_refused_by_its_headers(tmp_path, shape, words):
    """Else a small file of zeros would be expanded to all of the memory first: here nothing follows the headers."""
    np.savez(path := tmp_path / "mnist.npz")
    add_headers(path, 1, "|u1", x_train=shape, x_test=shape)
    add_headers(path, 1, "<i8", y_train=shape[:1], y_test=shape[:1])
    with pytest.raises(UserError, match=words):
        datasets.load_data("mnist", tmp_path)


def test_a_header_that_never_ends_is_not_read(tmp_path):
    np.savez(path := tmp_path / "mnist.npz", x_test=0, y_train=0, y_test=0)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file, file.open("x_train.npy", "w") as content:
        content.write(b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little") + b" " * 10**7)
    with pytest.raises(UserError, match="not a readable .npz file"):
        datasets.load_data("mnist", tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_arrays_for_which_there_is_no_memory_are_not_read(tmp_path, version):
    labels = {key: array for key, array in own().items() if key.startswith("y")}
    np.savez(path := tmp_path / "own.npz", **labels)
    add_headers(path, version, "<f8", x_train=(2, 10**14), x_test=(1, 10**14))
    # With the copies of four bytes a value.
    with pytest.raises(UserError, match="own.npz need 3,600,000.0 GB"):
        datasets.load_data(str(path), tmp_path)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00\x06\x00{'a':1", b"\x93NUMPY\x09\x00"])
def test_a_member_without_a_header(tmp_path, content):
    with zipfile.ZipFile(path := tmp_path / "own.npz", "w") as file:
        for key in Arrays._fields:
            file.writestr(f"{key}.npy", content)
    with pytest.raises(UserError, match="own.npz is not a readable .npz file"):
        datasets.load_data(str(path), tmp_path)
