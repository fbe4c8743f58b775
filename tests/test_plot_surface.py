"""The script on the digits: its rows are measurements, kept, resumed and shared."""

import csv
import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import run_python
from small_network import NAME, SMALL

from large_batch import datasets, files
from large_batch.objective import write_weights
from large_batch.surface import through


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all tests keep their runs."""
    return tmp_path_factory.mktemp("surface")


@pytest.fixture
def run(folder, run_script):
    """Run the script in a fork, or a process of its own, on an epoch and five points each way; return what it said."""

    def run(*more, by=run_script, before=(), code=0):
        folders = [f"--{kind}_dir={folder / kind}" for kind in ("data", "run", "figure", "result")]
        given = ("-n", NAME, "--epochs=1", "--points=5", "--samples=300", *more)
        done = by(*before, "plot_surface.py", *folders, *given)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run


def written(printed):
    """Return the summary, the rows and the arrays that were written; the first of the others has VTK's format."""
    path, vtk = re.search(r"umbers: (\S+)\.json.*, (\S+\.vtk)", printed).groups()
    assert Path(vtk).read_text().startswith("# vtk DataFile Version 3.0\n")
    with open(f"{path}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(f"{path}.json") as file, np.load(f"{path}.npz") as arrays:
        return json.load(file), rows, dict(arrays)


def rows_of(folder, kind):
    return {path: path.stat().st_mtime_ns for path in (folder / "run" / "surfaces").glob(f"small-*-{kind}-row*.json")}


def test_killed_continued_and_shared(run, folder):
    run(by=run_python, before=("tests/killed.py", "small-*-row*.json", 3), code=-9)
    assert len(before := rows_of(folder, "points2d")) == 2
    printed = run()
    assert "25 points in 5 measurements, as much work as 3.3 epochs of training.\n" in printed
    assert "5 measurements (2 stored)" in printed
    assert before.items() <= rows_of(folder, "points2d").items()
    summary, rows, arrays = written(printed)
    assert len(summary["made_of"][""]) == 3
    assert arrays["train_loss"].shape == (5, 5)
    assert [float(row["test_accuracy"]) for row in rows] == arrays["test_accuracy"].ravel().tolist()
    assert float(rows[1]["a"]) == arrays["a"][1]
    assert float(rows[5]["b"]) == arrays["b"][1]
    # What another process has in its hands is left to it, and found when it is done
    taken = min(before)
    content = taken.read_bytes()
    taken.unlink()
    with files.lock(taken):
        assert "is in the hands of" in run("--nowait")
        taken.write_bytes(content)
    printed = run()
    assert "5 measurements (5 stored)" in printed
    np.testing.assert_array_equal(written(printed)[2]["train_loss"], arrays["train_loss"])


def test_points_against_keras(run, folder):
    """A plane through three files, evaluated by Keras itself at one of its points."""
    models, files = [SMALL.build(seed=seed) for seed in (1, 2, 3)], []
    for number, model in enumerate(models):
        files.append(f"{folder}/{number}.weights.h5")
        write_weights(model, files[-1])
    printed = run(f"--minimizers={','.join(files)}", "--samples=200")  # of both sets, so that none is whole
    assert "Surfaces of given minimizers, 200 samples of each set" in printed
    summary, rows, arrays = written(printed)
    assert [origin["weights_file"] for origin in summary["made_of"][""]] == files
    flat = [np.concatenate([v.ravel() for v in model.get_weights()]).astype(np.float64) for model in models]
    plane = through(flat)
    np.testing.assert_allclose(arrays["marks"], plane.marks)
    at, shapes = plane.at((arrays["a"][1], arrays["b"][3])), [v.shape for v in models[0].get_weights()]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    models[0].set_weights([v.reshape(shape) for v, shape in zip(np.split(at, ends), shapes, strict=True)])
    models[0].compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    digits = datasets.load_data("digits", "unused").reshape_to((64,))
    for half in ("train", "test"):
        x, y = getattr(digits, f"x_{half}")[:200], getattr(digits, f"y_{half}")[:200]
        expected = models[0].evaluate(x.astype(np.float32) / 255, y, batch_size=200, verbose=0)
        assert arrays[f"{half}_loss"][3, 1] == pytest.approx(expected[0], rel=1e-5)
        assert arrays[f"{half}_accuracy"][3, 1] == pytest.approx(100 * expected[1], rel=1e-5)


def test_the_other_directions(run, folder):
    around = written(run("--directions=random", "--normalisation=layer", "--vectors"))
    assert set(around[0]["made_of"]) == {"SB", "LB"}
    assert {row["surface"] for row in around[1]} == {"SB", "LB"}
    center = around[2]["LB_train_loss"][2, 2]
    lines = written(run("--directions=random", "--dimensions=1"))[2]
    assert lines["LB_train_loss"].shape == (1, 5)
    assert lines["LB_train_loss"][0, 2] == pytest.approx(center, rel=1e-6), "the minimizer"
    assert lines["LB_train_loss"][0, 0] != pytest.approx(around[2]["LB_train_loss"][2, 0], rel=1e-6)
    printed = run("--directions=eigenvectors", "--minimizers=LB")
    # 25 points of 600 samples, and 30 products of 9 passes over 300, in epochs of 3 x 1500
    assert "25 points in 5 measurements, as much work as 21 epochs of training.\n" in printed
    steep = written(printed)[2]
    assert steep["LB_axis_values"][0] > steep["LB_axis_values"][1]
    (kept,) = (folder / "run" / "surfaces").glob("small-*-eigenvectors2d-plane-*/eigenvectors.npz")
    at = kept.stat().st_mtime_ns
    with files.lock(kept.parent):  # as if another process computed them
        assert "is in the hands of" in run("--directions=eigenvectors", "--minimizers=LB", "--points=3", "--nowait")
    again = run("--directions=eigenvectors", "--minimizers=LB", "--points=3")
    assert "3 measurements (0 stored)" in again
    assert kept.stat().st_mtime_ns == at, "they are found"
    assert written(again)[2]["LB_train_loss"][1, 1] == steep["LB_train_loss"][2, 2]
    path = written(run("--directions=pca", "--epochs=3", "--every=1", "--minimizers=SB"))[2]
    assert path["SB_marks"].shape == (4, 2)
    assert 50 < path["SB_axis_values"].sum() <= 100


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--minimizers=sb,LB", "There is no minimizer 'sb'; choose among SB, LB, start and .weights.h5 files."),
        (
            "--minimizers=SB",
            "A line goes through 2 and a plane through 3 --minimizers; around one, choose --directions.",
        ),
        ("--minimizers=SB,nowhere.weights.h5", "There is no weights file nowhere.weights.h5"),
        ("--small_batch=750 --large_batch=750", "SB and LB are one training; give them batches of different sizes."),
        ("--directions=pca --minimizers=start", "The path of a training (--directions=pca) is that of SB or LB."),
        ("--directions=pca", "2 iterates do not have 2 principal components; give a smaller --every than 10."),
        ("--reach=nan", "--reach must be a number above 0, not nan."),
    ],
)
def test_mistakes(run, given, words):
    said = run(*given.split(), code=2)
    assert words in said.splitlines()[-1]
    assert "Traceback" not in said
