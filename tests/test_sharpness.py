import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_python

import measurements
import network_zoo
import paper
import replicas
import runs
from errors import UserError
from measurements import Measured, SharpnessMeasurement
from metric import SharpnessResult
from objective import write_weights
from sharpness_tables import comparison, published, values

JOB = ("-n", "F1", "--dataset=digits", "--epochs=1", "--iterations=3", "--dimension=4", "--trials=2")
NAME = "F1-sharpness-digits-e1-d4-t2-i3"


def arguments(tmp_path, *given):
    return "sharpness.py", *(f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result")), *given


@pytest.fixture
def run_sharpness(tmp_path, run_script):
    """Run the script with all its folders in tmp_path."""
    return lambda *given: run_script(*arguments(tmp_path, *given))


def kept(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "sharpness").glob("F1*.json")}


def results(path):
    measured = json.loads(path.read_text())["results"]
    return {
        (label, *(each["measurement"][name] for name in ("space", "epsilon", "trial"))): each["result"]["value"]
        for label, those in measured.items()
        for each in those
    }


def test_the_whole_job_on_digits_killed_and_continued(run_sharpness, tmp_path):
    """A measurement that was made is not made again, whether the command ended or was killed."""
    process = subprocess.Popen(
        [sys.executable, *arguments(tmp_path, *JOB)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(kept(tmp_path)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = kept(tmp_path)
    assert not list((tmp_path / "result").glob("F1*")), "killed before the end"

    done = run_sharpness(*JOB)
    assert done.returncode == 0, done.stderr
    after = kept(tmp_path)
    assert len(before) >= 3
    assert len(after) == 2 * (2 + 2 * 2)  # two minimizers: two eps in the full space and in each of two subspaces
    assert before.items() <= after.items()
    found = results(tmp_path / "result" / f"{NAME}.json")
    assert len(found) == 12
    with open(tmp_path / "result" / f"{NAME}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        trials = [
            value for key, value in found.items() if key[:3] == (row["minimizer"], row["space"], float(row["epsilon"]))
        ]
        assert float(row["mean"]) == pytest.approx(np.mean(trials))
        assert row["trials"] == str(len(trials)) == ("1" if row["space"] == "full" else "2")
        assert row["paper_mean"] == ""  # of MNIST, not of the digits
        assert f"{float(row['mean']):.4g}" in done.stdout
    assert "rows that are resolved" in done.stdout
    assert "the limit of iterations" in done.stdout

    assert run_sharpness(*JOB).returncode == 0
    assert kept(tmp_path) == after
    assert results(tmp_path / "result" / f"{NAME}.json") == found


def test_a_given_minimizer_by_both_solvers(run_sharpness, tmp_path):
    write_weights(network_zoo.get("F1").build(seed=1), tmp_path / "mine.weights.h5")
    given = ("-n", "F1", "--dataset=digits", "--weights", tmp_path / "mine.weights.h5", "--eps=5e-4", "--space=full")
    done = run_sharpness(*given, "--solver=both", "--iterations=2")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "result").glob("F1-sharpness-digits-mine-*-eps0.0005-full-both-i2.json")
    summary = json.loads(path.read_text())
    assert list(summary["results"]) == ["given"]
    assert [each["result"]["solver"] for each in summary["results"]["given"]] == ["lbfgsb", "vertex"]
    assert summary["minimizers"]["given"]["weights_file"].endswith("mine.weights.h5")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["sharpness"], "nothing is trained"

    before = kept(tmp_path)
    damaged = next((tmp_path / "run" / "sharpness").glob("F1*lbfgsb*"))
    damaged.write_text(damaged.read_text().replace(""": "lbfgsb""", """: "lbfgsc"""))
    done = run_sharpness(*given, "--solver=both", "--iterations=2")
    assert done.returncode == 0, done.stderr
    assert f"{damaged} is damaged or holds another measurement; it was set aside as" in done.stderr
    changed = {name for name, time in kept(tmp_path).items() if before.get(name) != time}
    assert changed == {damaged.name}, "measured anew, the other one reused"
    assert results(path)["given", "full", 5e-4, None] == summary["results"]["given"][1]["result"]["value"]


def test_settings_of_one_experiment_in_another_order(run_sharpness, tmp_path):
    """The same minimizer as SB and LB, and settings in another order: no measurement is made twice."""
    same = ("-n", "F1", "--dataset=digits", "--epochs=1", "--iterations=1", "--small_batch=150", "--dimension=2")
    assert run_sharpness(*same, "--space=random,full,full", "--eps=5e-4", "--eps=1e-3", "--eps=5e-4").returncode == 0
    before = kept(tmp_path)
    assert len(before) == 4
    done = run_sharpness(*same)
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path) == before
    assert [path.name for path in sorted((tmp_path / "result").glob("F1*"))] == [
        f"F1-sharpness-digits-e1-sb150-d2-i1.{kind}" for kind in ("csv", "json")
    ]


def test_files_of_one_name_do_not_share_their_results(run_sharpness, tmp_path):
    for seed in (1, 2):
        path = tmp_path / str(seed) / "model.weights.h5"
        write_weights(network_zoo.get("F1").build(seed=seed), path)
        given = ("-n", "F1", "--dataset=digits", "--weights", path, "--eps=1e-3", "--space=full", "--iterations=1")
        assert run_sharpness(*given).returncode == 0
    assert len(list((tmp_path / "result").glob("F1-sharpness-digits-model-*.json"))) == 2


def keep(tmp_path, value, eps):
    result = measured(value, eps=eps)
    make = lambda: result.result  # noqa: E731
    return measurements.keep(tmp_path, result.measurement, make, runs.provenance(), replicas.ALONE)


def test_a_stored_measurement_of_something_else_is_not_believed(tmp_path, caplog):
    one = keep(tmp_path, 1.0, eps=1e-3)
    assert keep(tmp_path, 9.0, eps=1e-3) == one, "made once"
    (path,) = (tmp_path / "sharpness").glob("F1*")
    other = measured(2.0, eps=5e-4).measurement
    shutil.copy(path, measurements._path(tmp_path, other))
    assert measurements.stored(tmp_path, other) is None
    assert keep(tmp_path, 2.0, eps=5e-4).result.value == 2.0
    assert "is damaged or holds another measurement; it was set aside" in caplog.text
    assert measurements.stored(tmp_path, other).result.value == 2.0


def test_a_measurement_of_another_version_is_not_touched(tmp_path):
    at = keep(tmp_path, 1.0, eps=1e-3).measurement
    record = runs.read_record(measurements._path(tmp_path, at))
    runs.write_record(measurements._path(tmp_path, at), record | {"result": {"value": 1.0, "of": "a later version"}})
    with pytest.raises(UserError, match="is of another kind or version .*; move it away"):
        measurements.stored(tmp_path, at)


def test_curvature_on_digits(run_sharpness, tmp_path):
    job = ("-n", "F1", "--dataset=digits", "--epochs=1", "--curvature", "--dimension=3", "--eps=1e-3")
    done = run_sharpness(*job, "--curvature_samples=200")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "result" / "F1-curvature-digits-e1-d3-n200.json").read_text())
    assert summary["samples"] == 200
    for label in ("SB", "LB"):
        (only,) = summary["results"][label]
        curvature = only["result"]
        assert len(curvature["eigenvalues"]) == 5
        assert len(curvature["projection"]["ritz_values"]) == 3
        assert curvature["eigenvalues"][0] > max(curvature["projection"]["ritz_values"])
        assert f"{curvature['eigenvalues'][0]:.4g}" in done.stdout
    assert "about 5 % of the dimensions" in done.stdout

    first = (tmp_path / "result" / "F1-curvature-digits-e1-d3-n200.json").read_text()
    again = run_sharpness(*job, "--curvature_samples=200")
    assert again.stdout == done.stdout
    second = (tmp_path / "result" / "F1-curvature-digits-e1-d3-n200.json").read_text()
    assert json.loads(second)["results"] == json.loads(first)["results"], "kept, not measured again"


def test_the_example_of_the_readme():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "from sharpness import sharpness" in block)
    done = run_python("-c", example)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"Metric 2.1: \d\S* %, found in \d+ evaluations\n", done.stdout)


def measured(value, space="full", eps=1e-3, **settings):
    at = SharpnessMeasurement("F1", "repository", "mnist", "d", "w", eps, "lbfgsb", 10, space, **settings)
    return Measured(
        at, SharpnessResult(value, 0.0, 0.0, eps, 100, "lbfgsb", 1, 1, "", 0.0, 0.0, 0.0), runs.provenance()
    )


def test_rows_over_trials():
    drawn = [measured(value, "random", dimension=100, trial=trial) for trial, value in enumerate((1.0, 2.0, 6.0))]
    full, random = values([measured(7.0), *drawn], "LB", True)
    assert (full.trials, full.mean, full.deviation) == (1, 7.0, None)
    assert (full.paper_mean, full.paper_deviation) == (205.14, 69.52)
    assert (random.trials, random.mean, random.deviation) == (3, 3.0, np.std([1, 2, 6], ddof=1))
    assert random.paper_mean == 9.22
    assert str(random) == "3 ± 2.6"
    (unresolved,) = values([drawn[0], measured(None, "random", dimension=100, trial=9)], "LB", True)
    assert (unresolved.mean, str(unresolved)) == (None, "not resolved")


def test_the_claim_counts_rows_that_are_resolved():
    small = values([measured(1.0), measured(3.0, eps=5e-4), measured(None, "random", dimension=100)], "SB", True)
    large = values([measured(2.0), measured(2.0, eps=5e-4), measured(2.0, "random", dimension=100)], "LB", True)
    text = comparison(small, large)
    assert "LB is sharper than SB in 1 of the 2 rows that are resolved." in text
    assert "1.23 ± 0.83" in text
    assert "205.14 ± 69.52" in text
    assert "not resolved" in text


def test_the_paper_is_set_beside_what_it_measured_only():
    assert published(measured(1.0).measurement, "SB") == paper.TABLE_3["F1", 1e-3].small
    random = measured(1.0, "random", 5e-4, dimension=100, manifold="normal", trial=0).measurement
    assert published(random, "LB") == paper.TABLE_4["F1", 5e-4].large
    assert published(random, "given") is None
    assert published(measured(1.0, eps=2e-3).measurement, "SB") is None
    assert published(measured(1.0, "random", dimension=50).measurement, "SB") is None
    (elsewhere,) = values([measured(1.0)], "SB", comparable=False)
    assert (elsewhere.mean, elsewhere.paper_mean) == (1.0, None)


def test_records_from_before_a_setting_existed_are_found(tmp_path):
    wish = SharpnessMeasurement("F1", "repository", "digits", "d", "w", epsilon=1e-3, solver="lbfgsb", iterations=10)
    result = SharpnessResult(1.0, 0.1, 0.2, 1e-3, 3, "lbfgsb", 12, 10, "the limit of iterations", 50.0, 1.0, 0.9)
    measured = measurements.keep(tmp_path, wish, lambda: result, runs.provenance(), replicas.ALONE)
    (path,) = (tmp_path / "sharpness").glob("F1*.json")
    record = runs.read_record(path)
    assert record["measurement"].pop("samples") is None
    runs.write_record(path, record)
    assert measurements.stored(tmp_path, wish) == measured
    part = dataclasses.replace(wish, samples=100)
    assert measurements.stored(tmp_path, part) is None
