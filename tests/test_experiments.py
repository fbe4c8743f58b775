import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, recipe, run_python

import figures
import paper
import runs
import thresholds
import training
from batch_size_sweep import batch_sizes, default_sizes
from errors import BusyError, UserError
from experiments import Row, duration, shortened, spread
from objective import Objective
from solutions import Solver, trajectories
from warmstart import schedule

DIGITS = ("-n", "F1", "--dataset=digits", "--sharpness_samples=60", "--iterations=1")
SMALL = "--small_batch=100"
FILES = "F1-{}-digits-{}n60-i1"


def arguments(tmp_path, script, *given):
    return script, *(f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")), *DIGITS, *given


@pytest.fixture
def run(tmp_path, run_script):
    """Run a script on the digits with all its folders in tmp_path."""

    def run(*given):
        done = run_script(*arguments(tmp_path, *given))
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if "WARNING" in line or "Error" in line]
        return done.stdout

    return run


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def drawn(tmp_path, name):
    return all((tmp_path / "figure" / f"{name}.{kind}").stat().st_size > 5000 for kind in ("pdf", "png"))


def stored_files(tmp_path):
    """What is trained and measured, with times."""
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_training_curves(run, tmp_path):
    job = "training_curves.py", "--epochs=3", "--every=2", "--trials=2", SMALL
    printed = run(*job)
    assert "4 trainings (0 of them done), 20 measurements (0 of them done); the rest takes about" in printed
    name = FILES.format("training_curves", "e3-sb100-every2-t2-")
    assert drawn(tmp_path, name)
    assert drawn(tmp_path, f"{name}-sharpness")
    found = rows(tmp_path / "result" / f"{name}.csv")
    assert [(row["regime"], row["epochs"], row["seed"]) for row in found] == [
        *((regime, epochs, "0") for regime in ("SB", "LB") for epochs in ("0", "2", "3")),
        ("SB", "3", "1"),
        ("LB", "3", "1"),
    ]
    assert [bool(row["sharpness_1e_3"]) for row in found] == [True] * 6 + [False] * 2
    assert found[0]["train_loss"] == found[3]["train_loss"], "one starting point"
    epochs = rows(tmp_path / "result" / f"{name}-epochs.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"] * 4
    assert epochs[2]["test_accuracy"] == found[2]["test_accuracy"]
    summary = json.loads((tmp_path / "result" / f"{name}.json").read_text())
    ratios = [
        float(found[i]["distance_from_start"]) / float(found[i + k]["distance_from_start"]) for i, k in ((2, 3), (6, 1))
    ]
    assert summary["claims"][1]["found"] == f"{np.mean(ratios):.2f} ± {np.std(ratios, ddof=1):.2f}"
    assert printed.count("Verdict: ") == len(summary["claims"]) == 4
    assert "paper" not in printed.splitlines()[2], "the digits are not in the paper"

    before = stored_files(tmp_path)
    again = run(*job)
    assert "4 trainings (4 of them done), 20 measurements (20 of them done)." in again
    assert stored_files(tmp_path) == before
    assert again.partition("\n\n")[2] == printed.partition("\n\n")[2]


def test_batch_size_sweep_by_tasks(run, tmp_path):
    job = "batch_size_sweep.py", "--epochs=1", "--batch_sizes=50,100,200,400,800"
    printed = run(*job, "--task_index=1", "--task_count=2")
    assert "Task 1 of 2: 2 trainings (0 of them done), 6 measurements (0 of them done); the rest takes about" in printed
    assert "solutions are kept in" in printed
    assert not list((tmp_path / "result").glob("F1*"))
    before = stored_files(tmp_path)
    printed = run(*job)
    assert "5 trainings (2 of them done), 15 measurements (6 of them done); the rest" in printed
    assert before.items() <= stored_files(tmp_path).items()
    name = FILES.format("batch_size_sweep", "e1-b50-100-200-400-800-")
    assert drawn(tmp_path, name)
    assert [row["batch_size"] for row in rows(tmp_path / "result" / f"{name}.csv")] == [
        "50",
        "100",
        "200",
        "400",
        "800",
    ]
    assert printed.count("Verdict: ") == 3


def test_warm_starts_killed_and_continued(run, tmp_path):
    job = "warmstart.py", "--epochs=4", "--every=2", "--large_batch_epochs=2", SMALL
    process = subprocess.Popen(
        [sys.executable, *arguments(tmp_path, *job)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list((tmp_path / "run").glob("F1*from*/minimizer.weights.h5"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trained = {
        path: time
        for path, time in stored_files(tmp_path).items()
        if path.name == "minimizer.weights.h5" and runs.Folder(path.parent).whole(*training.RESULT)
    }
    printed = run(*job)
    assert len(trained) >= 5
    assert "5 trainings (" in printed
    assert trained.items() <= stored_files(tmp_path).items()
    name = FILES.format("warmstart", "e4-sb100-every2-le2-")
    assert drawn(tmp_path, name)
    found = rows(tmp_path / "result" / f"{name}.csv")
    assert [(row["regime"], row["epochs"], row["warm_start_epochs"]) for row in found] == [
        *(("SB", str(epoch), "") for epoch in (1, 2, 4)),
        ("LB", "2", ""),
        *(("warm-started LB", "2", str(epoch)) for epoch in (1, 2, 4)),
    ]
    assert [bool(row["sharpness_5e_4"]) for row in found] == [False] * 3 + [True] * 4
    assert printed.count("Verdict: ") == 1


def test_growing_batches_on_timit_once_the_data_is_there(tmp_path, run_script):
    """F2's licensed data as a user brings them: features and 1973 classes in data/timit.npz."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    arrays = {}
    for half, size in (("train", 60), ("test", 20)):
        arrays[f"x_{half}"] = rng.normal(size=(size, 360)).astype(np.float32)
        arrays[f"y_{half}"] = rng.integers(0, 1973, size)
    np.savez(tmp_path / "data" / "timit.npz", **arrays)
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
    settings = "--epochs=3", "--small_batch=10", "--schedule=1:15,2:60", "--iterations=1"
    done = run_script("warmstart.py", *folders, "-n", "F2", *settings)
    assert done.returncode == 0, done.stderr
    name = "F2-schedule-e3-sb10-1-15-2-60-i1"
    assert drawn(tmp_path, name)
    assert [row["regime"] for row in rows(tmp_path / "result" / f"{name}.csv")] == ["SB", "LB", "growing"]
    (grown,) = (tmp_path / "run").glob("F2-timit-b10to60-e3-s0-*")
    assert json.loads((grown / "recipe.json").read_text())["schedule"] == [[1, 15], [2, 60]]
    assert "Growing batches (1:15,2:60), 3 epochs" in done.stdout
    assert "59.45 ± 1.05" in done.stdout, "Table 2, of the large batch"
    assert "310.64 ± 38.46" in done.stdout, "Table 3"


@pytest.mark.parametrize("script", ["training_curves.py", "batch_size_sweep.py", "warmstart.py"])
def test_help_comes_without_tensorflow(script):
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert 'tensorflow' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    for words in ("--network", "--epochs", "--seed", "--trials", "--sharpness_samples", "--task_count", "Figure"):
        assert words in done.stdout


def test_trajectories(digits):
    small, large = recipe(digits, epochs=6), recipe(digits, batch_size=1500, epochs=2)
    warm = [recipe(digits, batch_size=1500, epochs=2, warm_start=small.iterate(epoch)) for epoch in (4, 2)]
    assert list(trajectories([large, *warm, large.iterate(1), small.iterate(0)]).items()) == [
        (large, [1, 2]),
        (small.iterate(4), [0, 2, 4]),
        (warm[0], [2]),
        (warm[1], [2]),
    ]


def test_a_solver_finds_what_others_measured_and_says_what_is_left(digits, tmp_path):
    asked = recipe(digits, epochs=2)
    solver = Solver(digits, tmp_path, runs.provenance(), sharpness_samples=100, iterations=2)
    plan = solver.plan([asked, asked.iterate(1), asked], sharp=[asked])
    assert plan.to_train == {asked: 2 * 1500}
    assert (plan.measurements, plan.measured) == (4, 0)
    assert plan.work == 3 * 3000 + 2 * len(digits.x_train) + 2 * len(digits.x_test) + 2 * 12 * 100
    assert 0 < solver.seconds(plan) < 3600
    found = solver.solve(plan)
    assert list(found) == [asked, asked.iterate(1)]
    end = training.stored(asked, digits, tmp_path)
    on_test = Objective(asked.build(digits), digits.x_test, digits.y_test).evaluate(end.weights)
    assert found[asked].evaluation.result.test_accuracy == on_test.accuracy
    assert [each.result.epsilon for each in found[asked].sharpness] == list(paper.EPSILONS)
    assert found[asked].sharpness[0].provenance.command == solver.origin.command
    part = Objective(asked.build(digits), digits.x_train[:100], digits.y_train[:100])
    assert found[asked].sharpness[0].result.loss == part.value(end.weights)
    assert found[asked.iterate(1)].sharpness == []

    plan = solver.plan([asked, asked.iterate(1)], sharp=[asked])
    assert plan.work == 0
    assert solver.seconds(plan) == 0
    assert solver.solve(plan) == found
    more = Solver(digits, tmp_path, runs.provenance(), iterations=3).plan([asked], sharp=[asked])
    assert (more.to_train, more.measured, more.measurements) == ({}, 1, 3)
    assert more.work == 2 * 15 * 1500
    assert Solver(digits, tmp_path, runs.provenance(), retrain=True).plan([asked]).to_train == {asked: 3000}


def test_tasks_share_trainings(digits, tmp_path):
    """Whatever recipes are a task's share, what leads to them is one training with all its iterates."""
    small, large = recipe(digits, epochs=4), recipe(digits, batch_size=1500, epochs=2)
    warm = dataclasses.replace(large, warm_start=small.iterate(1))
    everything = [small.iterate(1), small.iterate(3), small, large, warm]
    solver = Solver(digits, tmp_path, runs.provenance())
    for mine, trainings in (
        ([small.iterate(3)], {small: [1, 3, 4]}),
        ([large], {large: [2]}),
        ([warm], {small: [1, 3, 4], warm: [2]}),
        ([], {}),
    ):
        plan = solver.plan(everything, [large, small], mine)
        assert plan.trainings == trainings
        assert plan.to_train == {longest: longest.epochs * 1500 for longest in trainings}
        assert plan.measurements == len(mine) + 2 * (mine == [large])

    plan = solver.plan(everything, [], [warm])
    tried = []
    with runs.lock(runs.folder(tmp_path, small)), pytest.MonkeyPatch.context() as patch:  # as if another trained it

        def each(work, do):
            for longest in work:
                with pytest.raises(BusyError):
                    do(longest, False)
                tried.append(longest)
            return {}

        patch.setattr("solutions.tasks.each", each)
        solver.solve(dataclasses.replace(plan, asked=[]))
    assert tried == [small, warm]
    assert not training.is_stored(small.iterate(1), tmp_path)


def test_figures_show_what_is_resolved():
    def row(batch, sharpness, warm=None):
        return Row("", batch, 5, warm, 0, 1 / batch, 90.0, 0.3, 80 - batch / 100, sharpness, sharpness, 3.0)

    none, some = [row(size, None) for size in (64, 128, 256)], [row(64, None), row(128, 2.0), row(256, 20.0)]
    for rows in (none, some):
        for figure in (
            figures.batch_size_sweep(rows, thresholds.Place(128, 0, np.inf), "title"),
            figures.sharpness_by_loss({"SB": none, "LB": rows}, "title"),
            figures.warm_starts(rows, [row(128, None, 1), row(128, rows[1].sharpness(1e-3), 2)], 80.0, none, "title"),
        ):
            figure.draw_without_rendering()


def test_cells_of_several_trials():
    assert spread([1.0]) == "1"
    assert spread([1.0, 3.0]) == "2 ± 1.4"
    assert spread([1.0, None, 3.0]) == "2 ± 1.4 (2 of 3)"
    assert spread([None]) == "-"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("double:10", ((10, 512), (20, 1024), (30, 2048), (40, 4096))),
        ("double:8", ((8, 512), (16, 1024), (24, 2048), (32, 4096), (40, 6000))),
        ("20:1024,40:6000", ((20, 1024), (40, 6000))),
    ],
)
def test_schedules(text, expected):
    assert schedule(text, 50, 256, 6000) == expected


@pytest.mark.parametrize(
    "text",
    ["", "double", "double:0", "20", "20:", "20:64;30:128", "50:512", "60:512", "double:50", "20:256", "20:512,30:300"]
    + ["double:" + "9" * 5000, "9" * 5000 + ":512"],
    ids=range(13),
)
def test_schedules_that_are_none(text):
    with pytest.raises(UserError, match="--schedule"):
        schedule(text, 50, 256, 6000)


def test_batch_sizes():
    assert default_sizes(60_000) == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 30_000]
    assert default_sizes(50_000)[-2:] == [16384, 25_000]
    assert default_sizes(100) == [50]
    assert batch_sizes(["512", " 64", "512"], 1000) == [64, 512]
    for wrong in (["64", "many"], ["0"], ["-3"], ["1.5"], [""], ["9" * 5000]):
        with pytest.raises(UserError, match="--batch_sizes needs whole numbers above 0"):
            batch_sizes(wrong, 1000)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (25, "25 s"), (600, "10 min"), (7800, "2 h 10 min"), (200_000, "55 h 33 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_long_names_are_shortened_and_told_apart():
    assert shortened("b64-128") == "b64-128"
    long, other = shortened("b" + "64-" * 50 + "1"), shortened("b" + "64-" * 50 + "2")
    assert len(long) < 60
    assert long != other
