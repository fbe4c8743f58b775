import csv
import dataclasses

import pytest
from small_network import NAME

from large_batch.training import Epoch
from performance_model import Pair, epochs_to, largest_ratio, over_accuracies, reached


def history(*accuracies):
    return [Epoch(number + 1, 0.0, 0.0, 0.0, accuracy) for number, accuracy in enumerate(accuracies)]


SMALL = history(50, 80, 79, 90)
PAIR = Pair(SMALL, history(10, 40, 60, 85, 70), (10, 100), 1000)


def test_the_example_of_the_paper():
    assert largest_ratio(batch_ratio=0.1, efficiency=0.2) == pytest.approx(0.5)


def test_iterations_to_an_accuracy():
    assert [epochs_to(SMALL, accuracy) for accuracy in (50, 79, 85, 91)] == [1, 2, 4, None]
    found = reached(3, PAIR)
    assert (found.seed, found.accuracy) == (3, 85), "the highest that both reach"
    assert (found.small_epochs, found.large_epochs) == (4, 4)
    assert (found.small_iterations, found.large_iterations, found.ratio) == (400, 40, 0.1)
    assert found.efficiency == 1, "of equal epochs, LB is faster whatever SB loses"
    sooner = reached(0, PAIR, accuracy=55)
    assert (sooner.small_epochs, sooner.large_epochs, sooner.ratio) == (2, 3, 0.15)
    # With these numbers of iterations the bound is at the batches' ratio over the efficiency.
    uneven = reached(0, dataclasses.replace(PAIR, batches=(15, 1000), samples=1500))
    assert (uneven.ratio, uneven.efficiency) == (pytest.approx(8 / 400), pytest.approx(0.75)), (
        "of iterations, not epochs"
    )
    for one in (sooner, uneven):
        ratio = 10 / 100 if one == sooner else 15 / 1000
        assert largest_ratio(ratio, one.efficiency) == pytest.approx(one.ratio)
    assert reached(0, PAIR, accuracy=88) is None
    assert over_accuracies(PAIR) == ([10, 40, 60, 70, 85], [0.1, 0.2, 0.15, 0.2, 0.1])


def test_the_commands(run_script, tmp_path):
    def run(*given, code=0):
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "figure", "result")]
        done = run_script("performance_model.py", *folders, *given)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "less than 0.5 times as many iterations" in run()
    assert "less than 1 times" in run("--efficiency=0.5", "--batch_ratio=0.5")
    names = {path.name for path in (tmp_path / "figure").iterdir()}
    assert {"performance_model.pdf", "performance_model-f0.5-r0.5.png"} <= names
    job = "-n", NAME, "--epochs=3", "--trials=2", "--small_batch=750", "--large_batch=1500"
    printed = run(*job)
    assert "4 trainings (0 stored" in printed
    assert "2 trials" in printed
    (table,) = (tmp_path / "result").glob("small-performance_model-*.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # 1500 samples: 2 steps an epoch, and 1
        small, large = int(row["small_epochs"]), int(row["large_epochs"])
        assert [int(row[f"{side}_iterations"]) for side in ("small", "large")] == [2 * small, large]
        assert float(row["ratio"]) == large / (2 * small)
        for size, epoch in ((750, small), (1500, large)):
            (path,) = (tmp_path / "run").glob(f"small-digits-b{size}-e3-s{row['seed']}-*/history.csv")
            lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
            assert next(int(line[0]) for line in lines if float(line[4]) >= float(row["accuracy"])) == epoch
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert (tmp_path / "figure" / f"{table.stem}.png").exists()
    assert "In 2 of 2 trials SB or LB does not reach this accuracy." in run(*job, "--accuracy=99.9")
    for value in ("0", "1.5", "nan"):
        assert "--efficiency must be above 0 and at most 1" in run(f"--efficiency={value}", code=2)
