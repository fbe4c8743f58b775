import csv
import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_python
from small_network import NAME, SMALL

from large_batch import distribution, measurements, paper, store
from large_batch.errors import UserError
from large_batch.measurements import Measured, SharpnessRequest
from large_batch.objective import write_weights
from large_batch.paper import Spread
from large_batch.sharpness_metric import MEASURES, SharpnessResult
from large_batch.tables import published, sharpness_comparison

SMALL_NETWORK = ("-n", NAME, "--epochs=1", "--iterations=2")
BATCHES = ("--small_batch=750", "--large_batch=1500")  # no batch that XLA compiles


@pytest.fixture
def run_sharpness(tmp_path, run_script):
    """Run the script with all its folders in tmp_path, or what comes before its name."""

    def run(*given, before=(), code=0):
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result")]
        done = run_script(*before, "sharpness.py", *folders, *given)
        assert done.returncode == code, done.stderr
        return done

    return run


def kept(tmp_path, kind="sharpness"):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / kind).glob("small-*.json")}


def only(tmp_path, pattern):
    (path,) = (tmp_path / "result").glob(pattern)
    return path


def results(path):
    measured = json.loads(path.read_text())["results"]
    return {
        (label, *(each["measurement"][name] for name in ("space", "epsilon", "trial"))): each["result"]["value"]
        for label, those in measured.items()
        for each in those
    }


def test_the_whole_job_killed_and_continued(run_sharpness, tmp_path):
    """A measurement that was made is not made again, whether the command ended or was killed."""
    job = *SMALL_NETWORK, *BATCHES, "--dimension=4", "--trials=2"
    run_sharpness(*job, before=("tests/killed.py", "small-*.json", 4), code=-9)
    before = kept(tmp_path)
    assert len(before) == 3
    assert not list((tmp_path / "result").iterdir()), "killed before the end"

    done = run_sharpness(*job)
    assert "2 trainings (2 stored, 0 resumed), 12 measurements (3 stored)" in done.stdout
    after = kept(tmp_path)
    assert len(after) == 2 * (2 + 2 * 2)  # two minimizers: two eps in the full space and in each of two subspaces
    assert before.items() <= after.items()
    found = results(path := only(tmp_path, "small-sharpness-*-e1-sb750-lb1500-d4-t2-i2.json"))
    assert len(found) == 12
    with open(path.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["dataset"], row["quantity"], row["solver"]) for row in rows] == [
        ("small", "digits", "sharpness", "lbfgsb")
    ] * 12
    batches = {"SB": ("750", "1", "", "0"), "LB": ("1500", "1", "", "0")}
    for row in rows:
        place = row["minimizer"], row["space"], float(row["epsilon"]), int(row["trial"]) if row["trial"] else None
        assert float(row["value"]) == found[place]
        training = tuple(row[name] for name in ("batch_size", "epochs", "warm_start_epochs", "seed"))
        assert training == batches[row["minimizer"]]
    for label in batches:
        for space, epsilon in (("full", 1e-3), ("full", 5e-4), ("random", 1e-3), ("random", 5e-4)):
            values = [value for key, value in found.items() if key[:3] == (label, space, epsilon)]
            assert len(set(values)) == (1 if space == "full" else 2), "each subspace is another one"
            assert str(Spread.of(values)) in done.stdout
    assert "rows that are resolved" in done.stdout
    assert "the limit of iterations" in done.stdout

    again = run_sharpness(*job)
    assert kept(tmp_path) == after
    assert results(path) == found
    assert again.stdout.partition("\n\n")[2] == done.stdout.partition("\n\n")[2]


def test_settings_of_one_experiment_in_another_order(run_sharpness, tmp_path):
    """The same minimizer as SB and LB, and settings in another order: no measurement is made twice."""
    same = *SMALL_NETWORK, "--small_batch=1500", "--large_batch=1500", "--dimension=2"
    run_sharpness(*same, "--space=random,full,full", "--eps=5e-4,1e-3,5e-4")
    before = kept(tmp_path)
    assert len(before) == 4
    run_sharpness(*same)
    assert kept(tmp_path) == before
    names = sorted(path.name for path in (tmp_path / "result").iterdir())
    assert len(names) == 2, "one name of both"
    for name, kind in zip(names, ("csv", "json"), strict=True):
        assert re.fullmatch(rf"small-sharpness-[0-9a-f]{{8}}-e1-sb1500-lb1500-d2-i2\.{kind}", name)


def test_given_minimizers_by_both_solvers(run_sharpness, tmp_path):
    """Two files of one name do not share their results, and a damaged measurement alone is made anew."""
    files = [tmp_path / str(seed) / "mine.weights.h5" for seed in (1, 2)]
    given = *SMALL_NETWORK, "--eps=5e-4", "--space=full", "--solver=vertex,lbfgsb"
    for seed, file in enumerate(files):
        write_weights(SMALL.build(seed=seed), file)
        run_sharpness(*given, "--weights", file)
    assert len(list((tmp_path / "result").glob("small-sharpness-*.json"))) == 2
    digest = hashlib.sha256(files[1].read_bytes()).hexdigest()[:8]
    path = only(tmp_path, f"small-sharpness-*-e1-eps0.0005-full-lbfgsb-vertex-i2-mine-{digest}.json")
    summary = json.loads(path.read_text())
    assert list(summary["results"]) == ["given"]
    assert [each["result"]["solver"] for each in summary["results"]["given"]] == ["lbfgsb", "vertex"]
    assert summary["minimizers"]["given"]["weights_file"] == str(files[1])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["sharpness"], "nothing is trained"

    before = kept(tmp_path)
    weights = summary["results"]["given"][0]["measurement"]["weights_digest"][:8]
    (damaged,) = (tmp_path / "run" / "sharpness").glob(f"small-{weights}*lbfgsb*")
    damaged.write_text(damaged.read_text().replace('"lbfgsb"', '"lbfgsc"'))
    done = run_sharpness(*given, "--weights", files[1])
    assert f"{damaged} is damaged or holds another measurement; it was set aside as" in done.stderr
    changed = {name for name, time in kept(tmp_path).items() if before.get(name) != time}
    assert changed == {damaged.name}, "measured anew, the other one reused"
    assert results(path)["given", "full", 5e-4, None] == summary["results"]["given"][1]["result"]["value"]


def test_curvature_and_spectrum(run_sharpness, run_script, tmp_path):
    """Both ends, traces and densities beside the rest; `plot_spectrum.py` draws what is measured already."""
    effort = "--curvature_samples=200", "--probes=2", "--steps=10", "--by_layer"
    job = *SMALL_NETWORK[:3], *BATCHES, "--curvature", "--dimension=3", "--eps=1e-3", "--products=6", *effort
    done = run_sharpness(*job)
    path = only(
        tmp_path, "small-curvature-*-e1-sb750-lb1500-probes2-steps10-layers-eps0.001-d3-products6-hessian200.json"
    )
    summary = json.loads(path.read_text())
    layers = ["dense", "batch_statistics_normalization", "dense_1"]
    for label in ("SB", "LB"):
        one, *spectra = summary["results"][label]
        assert one["measurement"]["samples"] == 200
        curvature = one["result"]
        assert len(curvature["eigenvalues"]) == 5
        assert len(curvature["projection"]["ritz_values"]) == 3
        assert curvature["eigenvalues"][0] > max(curvature["projection"]["ritz_values"])
        assert f"{curvature['eigenvalues'][0]:.4g}" in done.stdout
        assert [each["measurement"]["layer"] for each in spectra] == [
            layer for layer in ["", *layers] for _ in range(4)
        ]
        largest, traces, lowest, density = (each["result"] for each in spectra[:4])
        assert largest["values"] == curvature["eigenvalues"]
        ends = lowest["values"][0], largest["values"][0]
        assert ends[0] < 0 < ends[1]
        width = 0.01 * (ends[1] - ends[0])
        assert all(ends[0] - width < node < ends[1] + width for nodes in density["nodes"] for node in nodes)
        assert list(traces["by_layer"]) == layers
        assert [len(nodes) for nodes in density["nodes"]] == [10, 10]
        assert f"{traces['hutchpp']['value']:.4g} ± " in done.stdout
    assert "about 5 % of the dimensions" in done.stdout

    before = kept(tmp_path, "curvature"), kept(tmp_path, "densities")
    again = run_sharpness(*job)
    assert again.stdout.partition("\n\n")[2] == done.stdout.partition("\n\n")[2]
    assert json.loads(path.read_text())["results"] == summary["results"]
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result", "figure")]
    drawn = run_script("plot_spectrum.py", *folders, *SMALL_NETWORK[:3], *BATCHES, *effort)
    assert drawn.returncode == 0, drawn.stderr
    assert "8 measurements (8 stored)" in drawn.stdout
    assert "dense_1: eigenvalues above 10 % of the largest" in drawn.stdout
    assert (kept(tmp_path, "curvature"), kept(tmp_path, "densities")) == before, "kept, not measured again"
    name = "small-spectrum-*-e1-sb750-lb1500-probes2-steps10-layers-n200"
    with open(only(tmp_path, f"{name}.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for place in [(label, layer) for label in ("SB", "LB") for layer in ("", *layers)]:
        group = [row for row in rows if (row["minimizer"], row["layer"]) == place]
        x, y = ([float(row[name]) for row in group] for name in ("eigenvalue", "density"))
        assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
    for layer in ("", *layers):
        assert len({row["width"] for row in rows if row["layer"] == layer}) == 1, "as they are drawn"
    assert {path.suffix for path in (tmp_path / "figure").glob(f"{name}.*")} == {".pdf", ".png"}


def test_measures_of_the_hessian_beside_others(run_sharpness, tmp_path):
    """They follow a rescaling of weights that Metric 2.1 follows, too, and are rows of their own."""
    asked = (
        "--space=full",
        "--eps=1e-3",
        "--measure=keskar,trace,eigenvalue",
        "--rescale=1,2",
        "--curvature_samples=200",
    )
    done = run_sharpness(*SMALL_NETWORK, *BATCHES, *asked, f"--figure_dir={tmp_path / 'figure'}")
    with open(only(tmp_path, "small-sharpness-*.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["minimizer"], row["quantity"], row["rescale"]): float(row["value"]) for row in rows}
    assert len(found) == len(rows) == 2 * 3 * 2
    for label in ("SB", "LB"):
        for quantity in ("sharpness", "trace", "eigenvalue"):
            assert found[label, quantity, "2.0"] < found[label, quantity, ""]
    assert re.search(r"2 +eigenvalue +full +- +lanczos", done.stdout)
    assert "of the 6 rows that are resolved" in done.stdout and "largest" not in done.stdout, "each has one solver"
    weights = next((tmp_path / "run").glob("small-*-b750-*/minimizer.weights.h5"))
    alone = run_sharpness(*SMALL_NETWORK, f"--weights={weights}", "--measure=trace", "--curvature_samples=200")
    (value,) = (line.split()[-6] for line in alone.stdout.splitlines() if line.startswith("given"))
    assert float(value) == pytest.approx(found["SB", "trace", ""], rel=1e-3)
    assert "Measures of sharpness, given minimizer" in alone.stdout
    assert list((tmp_path / "figure").glob("*.png"))


def test_measures_where_weights_are_rescaled(run_sharpness, tmp_path):
    """Loss and accuracy stay, and so do the measures that follow the weights; Metric 2.1 and SAM's ball do not."""
    job = *SMALL_NETWORK, *BATCHES, "--space=full", "--eps=1e-3", "--sharpness_samples=200", "--rescale=2,0.5,1"
    figures = f"--figure_dir={tmp_path / 'figure'}"
    done = run_sharpness(*job, figures, "--measure=adaptive,keskar,relative,ball", "--rho=0.3")
    assert "2 trainings (0 stored, 0 resumed), 30 measurements (0 stored)" in done.stdout
    path = only(tmp_path, "small-sharpness-*-n200-*-rho0.3-x0.5-x1.0-x2.0.json")
    found = {}
    for label, group in json.loads(path.read_text())["results"].items():
        for at, result in ((each["measurement"], each["result"]) for each in group):
            assert at["epsilon"] == (0.3 if at["measure"] in ("ball", "adaptive") else 1e-3)
            found[label, at["measure"], at["rescale"]] = result
    assert len(found) == 2 * 4 * 3
    for (label, measure, factor), result in found.items():
        plain = found[label, measure, 1.0]
        assert result["loss"] == pytest.approx(plain["loss"], rel=1e-4)  # what the normalisation's epsilon does
        if factor != 1:
            moves = measure in ("keskar", "ball")
            assert moves == (result["value"] != pytest.approx(plain["value"], rel=1e-2))
            assert (result["value"] > plain["value"]) == (factor < 1) or not moves
    with open(path.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["rescale"] for row in rows} == {"0.5", "", "2.0"}
    assert {row["quantity"] for row in rows} == {"sharpness", *(f"sharpness_{name}" for name in list(MEASURES)[1:])}
    assert (tmp_path / "figure" / f"{path.stem}.png").exists()
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("SB ", "LB "))][-6:]
    assert [line[:2] for line in table] == [[end, factor] for end in ("SB", "LB") for factor in ("0.5", "1", "2")]
    assert len({line[3] for line in table[:3]}) == 1, "one accuracy"
    assert "--rho must be a number above 0" in run_sharpness(*job, "--rho=0", code=2).stderr


def test_the_example_of_the_readme():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = run_python("-c", next(block for block in blocks if "sharpness(" in block))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"Metric 2.1: \d\S* %, found in \d+ evaluations\n", done.stdout)


def request(epsilon=1e-3, network="F1", space="full", **settings):
    problem = {"network": network, "definition": "repository", "dataset": "mnist", "data_digest": "d"}
    where = {"weights_digest": "w", "solver": "lbfgsb", "iterations": 10, "space": space}
    return SharpnessRequest(epsilon=epsilon, **problem, **(where | settings))


def result(value):
    return SharpnessResult(value, 0.1, 0.2, 1e-3, 3, "lbfgsb", 12, 10, "the limit of iterations", 50.0, 1.0, 0.9)


def measured(value, epsilon=1e-3, **settings):
    return Measured(request(epsilon, **settings), result(value), store.provenance())


def keep(tmp_path, value, wish):
    """Ask for a measurement that would have a value if it was made now."""
    return measurements.load_or_compute(tmp_path, wish, lambda _: result(value), store.provenance(), distribution.ALONE)


def test_a_stored_measurement_of_something_else_is_not_believed(tmp_path, caplog):
    one, other = request(1e-3), request(5e-4)
    first = keep(tmp_path, 1.0, one)
    assert keep(tmp_path, 9.0, one) == first, "made once"
    (path,) = (tmp_path / "sharpness").glob("F1*")
    shutil.copy(path, measurements._path(tmp_path, other))
    assert measurements.stored(tmp_path, other) is None
    assert keep(tmp_path, 2.0, other).result.value == 2.0
    assert "is damaged or holds another measurement; it was set aside" in caplog.text
    assert measurements.stored(tmp_path, other).result.value == 2.0


def test_a_measurement_of_another_version_is_not_touched(tmp_path):
    keep(tmp_path, 1.0, request())
    (path,) = (tmp_path / "sharpness").glob("F1*.json")
    store.write_record(path, store.read_record(path) | {"result": {"value": 1.0, "of": "a later version"}})
    before = path.read_bytes()
    for ask in (lambda: measurements.stored(tmp_path, request()), lambda: keep(tmp_path, 2.0, request())):
        with pytest.raises(UserError, match="is of another kind or version .*; move it away"):
            ask()
    assert path.read_bytes() == before


def test_records_from_before_a_setting_existed_are_found(tmp_path):
    kept = keep(tmp_path, 1.0, request())
    (path,) = (tmp_path / "sharpness").glob("F1*.json")
    record = store.read_record(path)
    assert record["measurement"].pop("samples") is None
    store.write_record(path, record)
    assert measurements.stored(tmp_path, request()) == kept
    assert measurements.stored(tmp_path, dataclasses.replace(request(), samples=100)) is None


def lines(found, comparable=True):
    """Return the cells of `sharpness_comparison` without its header, and what it says below."""
    *rows, below = sharpness_comparison(found, comparable).splitlines()
    return [re.split("  +", row.strip()) for row in rows[1:]], below


def test_rows_over_trials():
    drawn = [measured(value, space="random", dimension=100, trial=i) for i, value in enumerate((1.0, 2.0, 6.0))]
    found = {"SB": [measured(7.0), *drawn], "LB": [measured(14.0), *drawn]}
    (full, random), _ = lines(found)
    assert full == ["full", "0.001", "lbfgsb", "7", "14", "2", "1.23 ± 0.83", "205.14 ± 69.52", "167"]
    assert random[:6] == ["random", "0.001", "lbfgsb", "3 ± 2.646", "3 ± 2.646", "1"]
    assert random[6:] == ["0.11 ± 0", "9.22 ± 0.56", "83.8"]
    (elsewhere, _), _ = lines(found, comparable=False)
    assert elsewhere == ["full", "0.001", "lbfgsb", "7", "14", "2", "-", "-", "-"]
    solvers = {
        label: [
            measured(value, space="random", dimension=100, trial=i, solver=solver)
            for solver, values in (("lbfgsb", (1.0, 3.0)), ("vertex", (2.0, 2.0)))
            for i, value in enumerate(values)
        ]
        for label in ("SB", "LB")
    }
    *_, largest = lines(solvers)[0]
    assert largest[:4] == ["random", "0.001", "largest", str(paper.Spread.of([2.0, 3.0]))], "of each trial"


def test_the_claim_counts_rows_that_are_resolved():
    unresolved = {"space": "random", "dimension": 100, "trial": 0}
    small = [measured(1.0), measured(3.0, 5e-4), measured(None, **unresolved)]
    large = [measured(2.0), measured(2.0, 5e-4), measured(2.0, **unresolved)]
    rows, below = lines({"SB": small, "LB": large})
    assert below == "LB is sharper than SB in 1 of the 2 rows that are resolved."
    assert rows[2][3:6] == ["not resolved", "2", "-"]
    trials = [measured(1.0, **unresolved), measured(None, **(unresolved | {"trial": 1}))]
    ((row,), below) = lines({"SB": trials, "LB": trials})
    assert row[3:6] == ["not resolved", "not resolved", "-"]
    assert below == "LB is sharper than SB in 0 of the 0 rows that are resolved."


def test_the_paper_is_set_beside_what_it_measured_only():
    assert published(measured(1.0), "SB") == paper.TABLE_3["F1", 1e-3].small
    random = measured(1.0, 5e-4, space="random", dimension=100, manifold="normal", trial=0)
    assert published(random, "LB") == paper.TABLE_4["F1", 5e-4].large
    assert published(random, "given") is None
    assert published(measured(1.0, 2e-3), "SB") is None
    assert published(measured(1.0, space="random", dimension=50), "SB") is None
    assert published(measured(1.0, samples=1000), "SB") is None, "the sharpness of a part is another function's"
