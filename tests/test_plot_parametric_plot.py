import csv
import json

import keras
import numpy as np
import pytest
from conftest import run_python

import network_zoo
import paper
from objective import Objective, flat_weights, write_weights
from plot_parametric_plot import Point, evaluate, path_point, rms_difference


@pytest.fixture
def run_plot(tmp_path, run_script):
    """Run the script with all its folders in tmp_path, in a fork unless told otherwise."""

    def run(*arguments, by=run_script):
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
        return by("plot_parametric_plot.py", *folders, *arguments)

    return run


def rows(path):
    with open(path, newline="") as file:
        return [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def test_the_whole_job_on_digits(run_plot, tmp_path):
    job = ("-n", "F1", "--dataset", "digits", "--epochs=3", "--points=4", "--alpha_min=-1", "--alpha_max=2")
    done = run_plot(*job, by=run_python)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "oneDNN" not in done.stderr
    name = "F1-digits-e3-p4"
    assert (tmp_path / "figure" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "figure" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    points = rows(tmp_path / "result" / f"{name}.csv")
    assert [point["alpha"] for point in points] == [-1, 0, 1, 2]
    summary = json.loads((tmp_path / "result" / f"{name}.json").read_text())
    small, large = summary["small_batch"], summary["large_batch"]
    assert (small["recipe"]["batch_size"], large["recipe"]["batch_size"]) == (15, 150)
    assert summary["distance_ratio"] == small["distance_from_start"] / large["distance_from_start"]
    assert summary["rms_difference_to_original"] == {}
    for column, point in (("SB", points[1]), ("LB", points[2])):
        assert column in done.stdout
        assert f"{point['test_accuracy']:.2f}" in done.stdout
    assert "Table 2" not in done.stdout  # of MNIST, not of the digits

    def kept(pattern):
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob(pattern)}

    trained, evaluated = kept("F1*/*"), kept("curves/F1*")
    assert len(evaluated) == 4
    assert run_plot(*job, "--curve=curvilinear").returncode == 0
    assert trained == kept("F1*/*")
    assert len(kept("curves/F1*")) == 8
    assert evaluated.items() <= kept("curves/F1*").items()
    curved = rows(tmp_path / "result" / "F1-curvilinear-digits-e3-p4.csv")
    for here, there in ((1, 1), (2, 2)):  # both paths go through both minimizers
        assert curved[here]["train_loss"] == pytest.approx(points[there]["train_loss"], rel=1e-5)
    assert curved[3]["train_loss"] != pytest.approx(points[3]["train_loss"], rel=1e-3)


def test_cifar100_networks_on_a_file_of_ones_own(run_plot, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    arrays = {}
    for half, size in (("train", 60), ("test", 20)):
        arrays[f"x_{half}"] = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
        arrays[f"y_{half}"] = rng.integers(0, 100, (size, 1))
    np.savez(tmp_path / "data" / "cifar100.npz", **arrays)
    for network in ("C3", "C4"):
        done = run_plot("-n", network, "--epochs=1", "--small_batch=20", "--large_batch=60", "--points=2")
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "result" / f"{network}-e1-sb20-lb60-p2.json").read_text())
        assert summary["dataset"] == "cifar100"
        assert [point["alpha"] for point in rows(tmp_path / "result" / f"{network}-e1-sb20-lb60-p2.csv")] == [-1, 2]
        assert "alpha = 0  alpha = 1" in done.stdout  # the minimizers, though the path's points leave them out
        assert set(summary["rms_difference_to_original"]) >= {"train_loss", "test_accuracy"}
        assert str(paper.TABLE_2[network].test_small) in done.stdout


def test_given_minimizers_are_analysed_without_training(run_plot, tmp_path):
    files = {}
    for seed, side in ((1, "small"), (2, "large")):
        files[side] = tmp_path / f"{side}.weights.h5"
        write_weights(network_zoo.get("F1").build(seed=seed), files[side])
    done = run_plot(
        *("-n", "F1", "--dataset=digits", "--points=2", "--alpha_min=0", "--alpha_max=1"),
        *(f"--{side}_batch_weights={path}" for side, path in files.items()),
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["curves"], "nothing is trained"
    (result,) = (tmp_path / "result").glob("F1-digits-small-*-large-*-p2-alpha0to1.json")
    summary = json.loads(result.read_text())
    assert summary["small_batch"]["weights_file"] == str(files["small"])
    assert summary["distance_ratio"] is None


def test_paths():
    small, large = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    np.testing.assert_allclose(path_point("linear", -1, small, large), 2 * small - large)
    np.testing.assert_allclose(path_point("linear", 0.25, small, large), 0.75 * small + 0.25 * large)
    np.testing.assert_allclose(path_point("curvilinear", 0.5, small, large), (small + large) / np.sqrt(2))
    np.testing.assert_allclose(path_point("curvilinear", 2, small, large), -small, atol=1e-12)
    np.testing.assert_allclose(path_point("curvilinear", -1, small, large), -large, atol=1e-12)


def test_the_curve_of_a_convex_loss(digits):
    """Softmax regression: along a line its loss is convex, and between two ends below the chord."""
    model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])
    rng = np.random.default_rng(0)
    small, large = (flat_weights(model) + rng.normal(0, 0.1, 7850) for _ in range(2))
    train = Objective(model, digits.x_train, digits.y_train)
    test = Objective(model, digits.x_test, digits.y_test)
    points = [evaluate(train, test, alpha, path_point("linear", alpha, small, large)) for alpha in np.linspace(0, 1, 5)]
    assert points[0].train_loss == train.value(small)
    assert points[4].test_accuracy == test.evaluate(large).accuracy
    losses = np.array([point.train_loss for point in points])
    assert (np.diff(losses, 2) > 0).all()


def test_rms_difference():
    original = paper.original_curve("C1")
    published = [
        Point(p.alpha, 99, p.train_loss, p.train_accuracy - 3, 99, p.test_loss + 0.5, p.test_accuracy) for p in original
    ]
    differences = rms_difference(published, original)
    assert differences["train_loss"] == 0  # of the clipped loss, which is what the original shows
    assert differences["train_accuracy"] == pytest.approx(3)
    assert differences["test_loss"] == pytest.approx(0.5)
    between = [Point(0.0625, 0, np.mean([p.train_loss for p in original if p.alpha in (0, 0.125)]), 0, 0, 0, 0)]
    assert rms_difference(between, original)["train_loss"] == pytest.approx(0)
    beyond = [Point(5.0, 0, 0, 0, 0, 0, 0)]
    assert rms_difference(beyond, original) == {}
    assert rms_difference(published, []) == {}


def test_the_original_curves():
    for network in ("C1", "C2", "C3", "C4"):
        curve = paper.original_curve(network)
        np.testing.assert_allclose([point.alpha for point in curve], np.linspace(-1, 2, 25))
        at_small_batch = curve[8]
        assert abs(at_small_batch.test_accuracy - paper.TABLE_2[network].test_small.mean) < 2
    assert paper.original_curve("F1") == []


def test_help_comes_without_tensorflow_and_in_groups():
    code = (
        "import runpy, sys; sys.argv = ['plot_parametric_plot.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert 'tensorflow' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    places = [done.stdout.index(words) for words in ("What to train:", "--network", "Parametric plot:", "Folders:")]
    assert places == sorted(places)
    for flag in ("-n,--network", "--small_batch_weights", "--curve", "--points", "--[no]retrain", "--figure_dir"):
        assert flag in done.stdout
