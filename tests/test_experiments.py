import csv
import json
import re

import numpy as np
import pytest
from conftest import solution
from small_network import NAME, SMALL

import network_zoo
import training_curves
import warmstart
from batch_size_sweep import Settings as SweepSettings
from batch_size_sweep import default_sizes, fitting
from large_batch import claims, distribution, files, memory, paper, store, tables
from large_batch.backend import tf
from large_batch.errors import UserError
from large_batch.experiment import Experiment
from large_batch.progress import duration
from large_batch.runner import Runner
from large_batch.tables import cell
from warmstart import schedule

BATCHES = ("--small_batch=750", "--large_batch=1500")  # no batch that XLA compiles
FOLDERS = ("data", "run", "figure", "result")
COLUMNS = "network,dataset,minimizer,batch_size,epochs,warm_start_epochs,seed,quantity,space,epsilon,solver,trial,"
COLUMNS += "rescale,value"


@pytest.fixture
def run(tmp_path, run_script):
    """Run a script, or what comes before its name, on the small network with all its folders in tmp_path."""

    def run(*given, before=(), code=0):
        settings = "-n", NAME, "--sharpness_samples=60", "--iterations=1"
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in FOLDERS]
        done = run_script(*before, given[0], *folders, *settings, *given[1:])
        assert done.returncode == code, done.stderr
        assert not [line for line in done.stderr.splitlines() if "WARNING" in line or "Error" in line]
        return done.stdout

    return run


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def values(found, quantity, **place):
    """Of the rows in long form, those of a quantity."""
    place = {"quantity": quantity} | place
    return [row for row in found if place.items() <= row.items()]


def accuracy(found, **place):
    """Of the rows in long form, the one test accuracy there, as claims print it."""
    (row,) = values(found, "test_accuracy", **place)
    return f"{float(row['value']):.2f} %"


def places(found, *names):
    return [tuple(row[name] for name in names) for row in found]


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def drawn(tmp_path, name):
    paths = [tmp_path / "figure" / f"{name}.{kind}" for kind in ("pdf", "png")]
    assert paths[0].read_bytes().startswith(b"%PDF")
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def stored_files(tmp_path):
    """What is trained and measured, with times, and not who held it last."""
    paths = (tmp_path / "run").rglob("[!.]*")
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


HALVES = [(half, kind) for half in ("train", "test") for kind in ("loss", "accuracy")]


def rounded(number):
    return float(np.float32(number))


def board(tmp_path):
    """Step, tag and value of all that TensorBoard would show, no run having a tag twice at one step."""
    shown = []
    for run in (tmp_path / "board").iterdir():
        events = [event for path in run.iterdir() for event in tf.compat.v1.train.summary_iterator(str(path))]
        found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
        assert len({place[:2] for place in found}) == len(found)
        shown += found
    return set(shown)


def test_training_curves(run, tmp_path):
    job = "training_curves.py", "--epochs=3", "--every=2", "--trials=2", f"--tensorboard={tmp_path / 'board'}", *BATCHES
    printed = run(*job)
    assert "4 trainings (0 stored, 0 resumed), 20 measurements (0 stored)" in printed
    path = only(tmp_path / "result", "small-training_curves-*-e3-t2-n60-i1-sb750-lb1500-every2.csv")
    drawn(tmp_path, path.stem)
    drawn(tmp_path, f"{path.stem}-sharpness")
    assert path.read_text().startswith(COLUMNS)
    found = rows(path)
    losses = values(found, "train_loss")
    assert places(losses, "minimizer", "epochs", "seed") == [
        *(("SB", *at) for at in (("0", "0"), ("2", "0"), ("3", "0"), ("3", "1"))),
        *(("LB", *at) for at in (("0", "0"), ("2", "0"), ("3", "0"), ("3", "1"))),
    ]
    assert losses[0]["value"] == losses[4]["value"], "one starting point"
    for epsilon in ("0.001", "0.0005"):
        sharp = values(found, "sharpness", epsilon=epsilon, space="full", solver="lbfgsb", trial="")
        assert places(sharp, "epochs", "seed") == [("0", "0"), ("2", "0"), ("3", "0")] * 2
        assert all(float(row["value"]) > 0 for row in sharp)
    epochs = rows(path.with_name(f"{path.stem}-epochs.csv"))
    assert places(epochs, "network", "dataset", "epoch") == [("small", "digits", epoch) for epoch in "123"] * 4
    assert epochs[2]["test_accuracy"] == values(found, "test_accuracy")[2]["value"]
    summary = json.loads(path.with_suffix(".json").read_text())
    assert summary["problem"]["network"] == "small"
    assert (summary["settings"]["epochs"], summary["settings"]["small_batch"]) == (3, 750)
    assert summary["data_source"] == "scikit-learn's 8x8 digits"
    assert len(summary["solutions"]) == 8
    assert summary["provenance"]["command"].startswith("training_curves.py ")
    assert summary["provenance"]["device"] == summary["solutions"][0]["training"]["device"] == distribution.device()
    shown = board(tmp_path)
    assert shown == {
        *(
            (int(row["epoch"]), f"{kind}/{half}", rounded(row[f"{half}_{kind}"]))
            for row in epochs
            for half, kind in HALVES
        ),
        *(
            (int(row["epochs"]), f"sharpness/full-eps{row['epsilon']}-lbfgsb-n60", rounded(row["value"]))
            for row in values(found, "sharpness")
        ),
    }
    lengths = [float(row["value"]) for row in values(found, "distance_from_start")]
    ratios = [lengths[i] / lengths[i + 4] for i in (2, 3)]
    assert summary["claims"][1]["found"] == str(paper.Spread.of(ratios))
    last = [float(row["test_accuracy"]) for row in epochs if row["epoch"] == "3"]
    small, large = np.mean(last[:2]), np.mean(last[2:])
    words = rf"at the end SB reaches {small:.2f} ± [\d.]+ %, LB {large:.2f} ± "
    assert re.match(words, summary["claims"][0]["found"])
    assert printed.count("Verdict: ") == len(summary["claims"]) == 4
    table = printed.split("\n\n")[1]
    assert "sharpness 0.001" in table
    assert "paper" not in table, "the small network is not in the paper"

    before = stored_files(tmp_path)
    again = run(*job)
    assert "4 trainings (4 stored, 0 resumed), 20 measurements (20 stored)" in again
    assert stored_files(tmp_path) == before
    assert again.partition("\n\n")[2] == printed.partition("\n\n")[2]
    assert board(tmp_path) == shown


def test_batch_size_sweep_shared_with_another_process(run, tmp_path):
    """What others have trained is reused, and what they are training is left to them with --nowait."""
    sweep = "batch_size_sweep.py", "--epochs=1"
    run(*sweep, "--batch_sizes=1500")
    before = stored_files(tmp_path)
    others = only(tmp_path / "run", "small-digits-b1500-e1-s0-*")
    aside = others.rename(tmp_path / "aside")
    job = *sweep, "--batch_sizes=1500,600,750,1000,600,1250"
    with files.lock(others):  # as if another process trained it
        printed = run(*job, "--nowait")
    assert "5 trainings (0 stored, 0 resumed), 15 measurements (0 stored)" in printed
    assert f"{others} is in the hands of process " in printed
    assert "What is left is in other hands; the same command without --nowait waits for the results." in printed
    assert not list((tmp_path / "result").glob("*b600*"))
    aside.rename(others)
    printed = run(*job)
    assert "5 trainings (5 stored, 0 resumed), 15 measurements (15 stored)" in printed
    assert before.items() <= stored_files(tmp_path).items()
    path = only(tmp_path / "result", "small-batch_size_sweep-*-e1-n60-i1-b600-750-1000-1250-1500.csv")
    drawn(tmp_path, path.stem)
    found = values(rows(path), "test_accuracy")
    assert places(found, "batch_size", "minimizer") == [(f"{n}", "") for n in (600, 750, 1000, 1250, 1500)]
    sizes, accuracies = (np.array([float(row[name]) for row in found]) for name in ("batch_size", "value"))
    assert claims.accuracy_threshold(sizes, accuracies, None)[0].found in printed
    assert printed.count("Verdict: ") == 3


def test_warm_starts_killed_and_continued(run, tmp_path):
    job = "warmstart.py", "--epochs=4", "--every=2", "--large_batch_epochs=2", *BATCHES
    run(*job, before=("tests/killed.py", "minimizer.weights.h5", 6), code=-9)
    ended = [path for path in (tmp_path / "run").glob("small-*") if store.Folder(path).whole(*store.MINIMIZER)]
    assert len(ended) == 5
    trained = {path: time for path, time in stored_files(tmp_path).items() if path.parent in ended}
    assert [path for path in trained if "-from-" in str(path)], "killed between the warm starts"
    printed = run(*job)
    assert "5 trainings (3 stored, 1 resumed), " in printed
    assert trained.items() <= stored_files(tmp_path).items()
    path = only(tmp_path / "result", "small-warmstart-*-e4-n60-i1-sb750-lb1500-every2-le2.csv")
    drawn(tmp_path, path.stem)
    found = rows(path)
    at = "minimizer", "epochs", "warm_start_epochs"
    started = [("LB", "2", ""), *(("warm-started LB", "2", str(epoch)) for epoch in (1, 2, 4))]
    assert places(values(found, "test_accuracy"), *at) == [*(("SB", str(epoch), "") for epoch in (1, 2, 4)), *started]
    assert places(values(found, "sharpness", epsilon="0.0005"), *at) == started
    small, large = accuracy(found, minimizer="SB", epochs="4"), accuracy(found, minimizer="LB")
    late = accuracy(found, minimizer="warm-started LB", warm_start_epochs="4")
    assert f"SB alone {small}, LB alone {large}, late ones {late}" in printed
    assert printed.count("Verdict: ") == 1


def test_growing_batches(run, tmp_path):
    printed = run("warmstart.py", "--epochs=3", *BATCHES, "--schedule=1:1000,2:1500")
    path = only(tmp_path / "result", "small-schedule-*-e3-n60-i1-sb750-lb1500-1-1000-2-1500.csv")
    drawn(tmp_path, path.stem)
    found = rows(path)
    assert places(values(found, "test_accuracy"), "minimizer") == [("SB",), ("LB",), ("growing",)]
    assert places(values(found, "sharpness"), "minimizer") == [("SB",)] * 2 + [("LB",)] * 2 + [("growing",)] * 2
    small, large, growing = (accuracy(found, minimizer=name) for name in ("SB", "LB", "growing"))
    assert f"SB {small}, LB {large}, growing {growing}" in printed
    grown = only(tmp_path / "run", "small-digits-b750to1500-e3-s0-*")
    assert json.loads((grown / "recipe.json").read_text())["schedule"] == [[1, 1000], [2, 1500]]
    assert "Growing batches (1:1000,2:1500), 3 epochs" in printed


def write_timit(folder):
    """F2's licensed data as a user brings them: features and 1973 classes in data/timit.npz."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    arrays = {}
    for half, size in (("train", 60), ("test", 20)):
        arrays[f"x_{half}"] = rng.normal(size=(size, 360)).astype(np.float32)
        arrays[f"y_{half}"] = rng.integers(0, 1973, size)
    np.savez(folder / "timit.npz", **arrays)


@pytest.mark.slow
def test_growing_batches_on_timit_once_the_data_is_there(tmp_path, run_script):
    write_timit(tmp_path / "data")
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in FOLDERS]
    settings = "--epochs=3", "--small_batch=10", "--schedule=1:15,2:60", "--iterations=1"
    done = run_script("warmstart.py", *folders, "-n", "F2", *settings)
    assert done.returncode == 0, done.stderr
    name = "F2-schedule-e3-i1-sb10-1-15-2-60"
    drawn(tmp_path, name)
    found = values(rows(tmp_path / "result" / f"{name}.csv"), "test_loss")
    assert places(found, "minimizer", "batch_size") == [("SB", "10"), ("LB", "6"), ("growing", "10")]
    grown = only(tmp_path / "run", "F2-timit-b10to60-e3-s0-*")
    assert json.loads((grown / "recipe.json").read_text())["schedule"] == [[1, 15], [2, 60]]
    assert "Growing batches (1:15,2:60), 3 epochs" in done.stdout
    assert "59.45 ± 1.05" in done.stdout, "Table 2, of the large batch"
    assert "310.64 ± 38.46" in done.stdout, "Table 3"


def begin(tmp_path, settings, **chosen):
    folders = {f"{kind}_dir": str(tmp_path / kind) for kind in FOLDERS}
    return Experiment.begin(settings(**folders, **chosen), network_zoo.get)


def test_the_paper_is_set_beside_its_own_data_batches_and_last_epoch_only(tmp_path, capsys):
    write_timit(tmp_path / "data")
    experiment = begin(tmp_path, warmstart.Settings, network="F2", epochs=3, small_batch=1)
    assert experiment.as_published
    assert "F2 on TIMIT" in experiment.title("")
    assert not begin(tmp_path / "other", warmstart.Settings, network="F1", dataset="digits").as_published
    assert not begin(tmp_path, warmstart.Settings, network="F2", optimizer="sgd").as_published
    assert experiment.batches_as_published
    assert not begin(tmp_path, warmstart.Settings, network="F2", large_batch=7).batches_as_published
    assert (experiment.network.small_batch(60), experiment.network.large_batch(60)) == (1, 6)
    regimes = {"SB": [(1, 3), (1, 2)], "LB": [(6, 3)], "growing": [(1, 3)]}
    solutions = {
        regime: [solution(regime, experiment.recipe(batch, epochs=epochs), 1.0) for batch, epochs in some]
        for regime, some in regimes.items()
    }
    every = [one for group in solutions.values() for one in group]
    table = tables.solution_table(every, experiment.published(every))
    experiment.report("schedule", f"title\n{table}", every, [], {})
    part = begin(tmp_path, warmstart.Settings, network="F2", epochs=3, small_batch=1, sharpness_samples=3)
    assert part.published(every)["SB", 3] == ["64.02 ± 0.2", "-", "-"], "over a part it is another function's"
    small, early, large, growing = (re.split("  +", line)[-3:] for line in capsys.readouterr().out.splitlines()[3:7])
    assert small == ["64.02 ± 0.2", "1.39 ± 0.02", "0.9 ± 0.05"], "Tables 2 and 3"
    assert large == ["59.45 ± 1.05", "310.64 ± 38.46", "93.15 ± 6.81"]
    assert early == growing == ["-"] * 3
    assert (tmp_path / "result" / "F2-schedule-e3.json").exists()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "F1-training_curves-digits"),
        (
            {"epochs": 3, "every": 2, "trials": 2, "sharpness_samples": 60, "iterations": 1, "small_batch": 100},
            "F1-training_curves-digits-e3-t2-n60-i1-sb100-every2",
        ),
        ({"small_batch": 15, "sharpness_samples": 9999, "every": 10}, "F1-training_curves-digits"),
        (
            {"definition": "paper", "precision": "bfloat16", "seed": 3, "large_batch": 7, "wait": False}
            | {"optimizer": "sgd", "until_converged": True},
            "F1-training_curves-digits-paper-s3-bfloat16-sgd-converged-lb7",
        ),
    ],
    ids=range(4),
)
def test_names_of_outputs_say_what_differs_from_the_defaults(tmp_path, settings, name):
    experiment = begin(tmp_path, training_curves.Settings, network="F1", dataset="digits", **settings)
    assert experiment.name("training_curves") == name
    recipe = experiment.recipe(10)
    for each in ("definition", "seed", "epochs", "precision", "optimizer", "until_converged"):
        assert getattr(recipe, each) == getattr(experiment.settings, each), "the name does not promise too much"


def test_cells_of_several_trials():
    assert cell([1.0]) == "1"
    assert cell([1.0, 3.0]) == "2 ± 1.414"
    assert cell([1.0, None, 3.0]) == "2 ± 1.414 (2 of 3)"
    assert cell([None]) == "-"


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


def test_default_batch_sizes_that_cannot_fit_are_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "used_bytes", lambda: 0)
    experiment = begin(tmp_path, SweepSettings, network="F1", dataset="digits")
    needed = experiment.minimizers.memory(experiment.recipe(256)).bytes
    monkeypatch.setattr(memory, "total_bytes", lambda: needed)
    fitted = fitting(experiment)
    assert fitted.settings.batch_sizes == (64, 128, 256)
    assert "Left out: batches of 512 and 750, for which the memory does not suffice." in caplog.text
    assert fitted.name("batch_size_sweep") == "F1-batch_size_sweep-digits-b64-128-256"
    with pytest.raises(UserError, match="A training step of 512 samples of F1 needs about"):
        Runner(fitted.minimizers, fitted.settings).run([fitted.recipe(64), fitted.recipe(512)], [])
    assert not list((tmp_path / "run").glob("F1*")), "found out before the work"


def test_batch_sizes():
    assert default_sizes(60_000) == (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 30_000)
    assert default_sizes(50_000)[-2:] == (16384, 25_000)
    assert default_sizes(100) == (50,)
    assert default_sizes(1) == (1,)
    assert SweepSettings(batch_sizes=(512, 64, 512)).resolve(SMALL, 1000).batch_sizes == (64, 512)
    assert SweepSettings().resolve(SMALL, 100).batch_sizes == (50,)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (25, "25 s"), (600, "10 min"), (7800, "2 h 10 min"), (200_000, "55 h 33 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
