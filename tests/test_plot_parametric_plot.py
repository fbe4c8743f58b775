import csv
import json
import re
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import run_python
from small_network import NAME, SMALL

from large_batch import figures, paper
from large_batch.layers import pixels
from large_batch.measurements import Evaluated, EvaluationRequest
from large_batch.objective import Objective, flat_weights, write_weights
from large_batch.places import path_point
from plot_parametric_plot import original_curve, rms_difference


@pytest.fixture
def run_plot(tmp_path, run_script):
    """Run the script with all its folders in tmp_path, in a fork unless told otherwise."""

    def run(*arguments, by=run_script):
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
        done = by("plot_parametric_plot.py", *folders, *arguments)
        assert done.returncode == 0, done.stderr
        return done

    return run


def rows(path):
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    assert all(path.name.startswith(row.pop("network")) and row.pop("dataset") for row in found)
    return [{name: float(cell) for name, cell in row.items()} for row in found]


def test_the_whole_job_on_digits(run_plot, tmp_path):
    job = ("-n", "F1", "--dataset", "digits", "--epochs=3", "--points=4", "--alpha_min=-1", "--alpha_max=2")
    done = run_plot(*job, by=run_python)
    assert "2 trainings (0 stored, 0 resumed), 4 measurements (0 stored)" in done.stdout
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
    assert f"{small['distance_from_start'] / large['distance_from_start']:.2f}" in done.stdout
    assert summary["rms_difference_to_original"] == {}
    for column, point in (("SB", points[1]), ("LB", points[2])):
        assert column in done.stdout
        assert f"{point['test_accuracy']:.2f}" in done.stdout
    assert str(paper.TABLE_2["F1"].test_small) not in done.stdout  # of MNIST, not of the digits

    def kept(pattern):
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob(pattern)}

    trained, evaluated = kept("F1*/*"), kept("points/F1*")
    assert len(evaluated) == 4
    curved = run_plot(*job, "--curve=curvilinear")  # through both minimizers, too
    assert "2 trainings (2 stored, 0 resumed), 4 measurements (2 stored)" in curved.stdout
    assert trained == kept("F1*/*")
    assert len(kept("points/F1*")) == 6
    assert evaluated.items() <= kept("points/F1*").items()
    curved = rows(tmp_path / "result" / "F1-digits-e3-curvilinear-p4.csv")
    for here, there in ((1, 1), (2, 2)):
        assert curved[here]["train_loss"] == pytest.approx(points[there]["train_loss"], rel=1e-5)
    assert curved[3]["train_loss"] != pytest.approx(points[3]["train_loss"], rel=1e-3)


def noise(shape, size, classes, kind):
    """Return a data set without any structure: `size` samples in each half."""
    rng = np.random.default_rng(0)
    arrays = {}
    for half in ("train", "test"):
        pixels = rng.integers(0, 256, (size, *shape), np.uint8)
        arrays[f"x_{half}"] = pixels if kind is np.uint8 else pixels.astype(kind)
        arrays[f"y_{half}"] = rng.integers(0, classes, (size, 1))
    return arrays


@pytest.mark.parametrize(
    ("network", "dataset", "shape", "kind", "classes", "samples"),
    [
        ("C3", "cifar100", (32, 32, 3), np.uint8, 100, 20),
        pytest.param("C4", "cifar100", (32, 32, 3), np.uint8, 100, 20, marks=pytest.mark.slow),
        ("F2", "timit", (360,), np.float32, 1973, 600),
    ],
)
def test_networks_on_a_file_of_ones_own(run_plot, tmp_path, network, dataset, shape, kind, classes, samples):
    """Data in a file of a known name are the paper's, as far as anyone knows; other batches are not."""
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / f"{dataset}.npz", **noise(shape, samples, classes, kind))
    usual = network != "F2"  # for whose small batches XLA would compile
    batches = () if usual else ("--small_batch=590", "--large_batch=600")
    done = run_plot("-n", network, "--epochs=1", *batches, "--points=2")
    path = tmp_path / "result" / f"{network}-e1{'' if usual else '-sb590-lb600'}-p2.json"
    summary = json.loads(path.read_text())
    assert summary["problem"]["dataset"] == dataset
    assert summary["data_source"].endswith(f"{dataset}.npz")
    assert [point["alpha"] for point in rows(path.with_suffix(".csv"))] == [-1, 2]
    assert "alpha = 0  LB, alpha = 1" in done.stdout  # the minimizers, though the path's points leave them out
    assert (str(paper.TABLE_2[network].test_small) in done.stdout) == ("3 - 10" in done.stdout) == usual
    compared = {"train_loss", "train_accuracy", "test_loss", "test_accuracy"} if usual else set()
    assert set(summary["rms_difference_to_original"]) == compared
    assert done.stdout.count("RMS difference to the original figure, ") == len(compared)


def test_given_minimizers_are_analysed_without_training(run_plot, tmp_path):
    files = {}
    for seed, side in ((1, "small"), (2, "large")):
        files[side] = tmp_path / f"{side}.weights.h5"
        write_weights(SMALL.build(seed=seed), files[side])
    done = run_plot(
        *("-n", NAME, "--points=2", "--alpha_min=0", "--alpha_max=1"),
        *(f"--{side}_batch_weights={path}" for side, path in files.items()),
    )
    assert "0 trainings (0 stored, 0 resumed), 2 measurements (0 stored)" in done.stdout
    assert "\nLinear path, given minimizers\n" in done.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["points"], "nothing is trained"
    (result,) = (tmp_path / "result").glob("small-*-p2-from0-to1-SB-small-*-LB-large-*.json")
    summary = json.loads(result.read_text())
    assert summary["small_batch"]["weights_file"] == str(files["small"])
    assert summary["large_batch"]["distance_from_start"] is None


def test_what_is_not_finite_is_marked_as_such(run_plot, tmp_path):
    """Also where the classes of outputs that are no numbers have an accuracy: in print, .csv and .json."""
    model, files = SMALL.build(), {side: tmp_path / f"{side}.weights.h5" for side in ("small", "large")}
    write_weights(model, files["small"])
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 3e38))  # finite still, but no sum of two
    write_weights(model, files["large"])
    given = (f"--{side}_batch_weights={path}" for side, path in files.items())
    done = run_plot("-n", NAME, "--points=2", "--alpha_min=0", "--alpha_max=1", *given)
    assert "Not finite at 1 of 2 points, the first at alpha 1." in done.stdout
    assert re.search(r"^train accuracy \(%\) +\d+\.\d+ +not finite", done.stdout, re.MULTILINE)
    (result,) = (tmp_path / "result").glob("*.json")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for path in (result, *(tmp_path / "run" / "points").glob("*.json")):
        json.loads(path.read_text(), parse_constant=refuse)
    note = "loss not finite on the training set, loss not finite on the test set"
    assert json.loads(result.read_text())["not_finite"] == {"1.0": note}
    with open(result.with_suffix(".csv"), newline="") as file:
        finite, other = csv.DictReader(file)
    assert (finite["note"], other["note"], other["train_loss"], other["train_accuracy"]) == ("", note, "", "")
    assert float(finite["train_loss"]) > 0


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
    train = Objective(model, digits.x_train, digits.y_train, prepare=pixels)
    test = Objective(model, digits.x_test, digits.y_test, prepare=pixels)
    both, reported = SimpleNamespace(train=lambda: train, test=lambda: test), []
    request = EvaluationRequest(network="", dataset="digits", data_digest=digits.digest, definition="")
    points = [
        request.compute(both, path_point("linear", alpha, small, large), lambda n, note: reported.append(n))
        for alpha in np.linspace(0, 1, 5)
    ]
    assert points[0].train_loss == train.value(small)
    assert points[0].gap == points[0].train_accuracy - points[0].test_accuracy
    assert points[4].test_accuracy == test.evaluate(large).accuracy
    assert sum(reported) == 5 * request.cost(len(digits.x_train), len(digits.x_test))
    losses = np.array([point.train_loss for point in points])
    assert (np.diff(losses, 2) > 0).all()


def test_rms_difference():
    original = paper.original_curve("C1")
    alphas = [p.alpha for p in original]
    published = [
        Evaluated(99, p.train_loss, p.train_accuracy - 3, 99, p.test_loss + 0.5, p.test_accuracy) for p in original
    ]
    differences = rms_difference(alphas, published, original)
    assert differences["train_loss"] == 0  # of the clipped loss, which is what the original shows
    assert differences["train_accuracy"] == pytest.approx(3)
    assert differences["test_loss"] == pytest.approx(0.5)
    halfway = np.mean([p.train_loss for p in original if p.alpha in (0, 0.125)])
    between = [Evaluated(0, halfway, 0, 0, 0, 0)]
    assert rms_difference([0.0625], between, original)["train_loss"] == pytest.approx(0)
    assert rms_difference([5.0], between, original) == {}
    assert rms_difference(alphas, published, []) == {}


def test_the_original_curves():
    published = SimpleNamespace(batches_as_published=True, network=SimpleNamespace(name="C1"))
    assert original_curve(published, "linear") == paper.original_curve("C1")
    assert original_curve(published, "curvilinear") == [], "the released curves are of Figure 3"
    assert original_curve(SimpleNamespace(batches_as_published=False), "linear") == []
    for network in ("C1", "C2", "C3", "C4"):
        curve = paper.original_curve(network)
        np.testing.assert_allclose([point.alpha for point in curve], np.linspace(-1, 2, 25))
        at_small_batch = curve[8]
        assert abs(at_small_batch.test_accuracy - paper.TABLE_2[network].test_small.mean) < 2
    assert paper.original_curve("F1") == []


def test_the_figure_shows_the_clipped_loss_where_it_differs():
    alphas, original = [-1.0, 0.0, 1.0], paper.original_curve("C1")
    same, clipped = ([Evaluated(loss, 10.0, 50.0, loss, 10.0, 40.0)] * 3 for loss in (10.0, 20.0))
    for points, lines in ((same, 4), (clipped, 6)):
        figure = figures.parametric_plot(alphas, points, original, "title", "path")
        figure.draw_without_rendering()
        assert len(figure.axes[0].lines) == lines, "losses of both sets, the original's, and those that are clipped"
        assert len(figure.axes[1].lines) == 4
