import csv
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from small_network import NAME

import paper_tables
from large_batch import claims, paper, store
from large_batch.errors import UserError
from large_batch.measurements import Evaluated, EvaluationRequest, Measured, SharpnessRequest
from large_batch.paper import Spread
from large_batch.recipes import Recipe
from large_batch.sharpness_metric import SharpnessResult
from paper_tables import FULL, TABLES, TEST, Settings, cells, judged

PROBLEM = {"network": "F1", "dataset": "mnist", "data_digest": "d", "definition": "repository"}
JOB = "--epochs=1", "--trials=2", "--small_batch=750", "--large_batch=1500", "--iterations=1", "--sharpness_samples=60"


@pytest.fixture
def run(tmp_path, run_script):
    """Run the script with all its folders in tmp_path."""

    def run(*given, code=0):
        folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result")]
        done = run_script("paper_tables.py", *folders, *given)
        assert done.returncode == code, done.stderr
        return done

    return run


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def verdicts(printed):
    return [line.split("  ")[-1].strip() for line in printed.splitlines() if line[:3] in ("SB ", "LB ")]


def test_the_whole_job(run, tmp_path):
    """Two networks of one builder: each cell is measured once, in as many trials, and found again."""
    (tmp_path / "twin.py").write_text(
        "import dataclasses\nfrom tests.small_network import SMALL\nTWIN = dataclasses.replace(SMALL, name='twin')\n"
    )
    networks = "-n", f"{NAME},{tmp_path / 'twin.py'}:TWIN"
    printed = run(*networks, *JOB, "--tables=4,2,3").stdout
    assert printed.count("4 trainings (0 stored, 0 resumed), 20 measurements (0 stored)") == 2
    assert printed.count("Table 2: ") == printed.count("Table 3: ") == printed.count("Table 4: ") == 2
    assert printed.index("Table 2: ") < printed.index("Table 4: ")
    assert set(verdicts(printed)) == {"no verdict"}, "these networks are not in the paper"
    (path,) = (tmp_path / "result").glob("twin-paper_tables-*-tables-2-3-4.csv")
    found = rows(path)
    assert len(found) == 2 * 2 * (2 + 2 + 2)
    for row in found:
        sharp = row["quantity"] == "sharpness"
        assert (row["space"], row["solver"]) == ((row["space"], "lbfgsb") if sharp else ("", ""))
        assert row["trial"] == (row["seed"] if row["space"] == "random" else ""), "a subspace for each trial"
        assert float(row["value"]) > 0
    summary = json.loads(path.with_suffix(".json").read_text())
    first = summary["rows"][0]
    assert (first["table"], first["minimizer"], first["quantity"], first["paper"]) == (
        "2",
        "SB",
        "train_accuracy",
        None,
    )
    ours = [float(row["value"]) for row in found if row["minimizer"] == "SB" and row["quantity"] == "train_accuracy"]
    assert first["values"] == ours
    assert str(Spread.of(ours)) in printed

    again = run(*networks, *JOB, "--tables=2,3,4").stdout
    assert again.count("4 trainings (4 stored, 0 resumed), 20 measurements (20 stored)") == 2
    first, second = (re.sub("(Work|Memory): .*\n", "", text) for text in (printed, again))
    assert first == second

    more = [text if text != "--trials=2" else "--trials=3" for text in JOB]
    before = sorted((tmp_path / "result").iterdir())
    stored = run("-n", NAME, *more, "--tables=2", "--nocompute").stdout
    assert "trainings" not in stored
    assert stored.count("(2 of 3)") == 4, "what is missing is missing"
    assert sorted((tmp_path / "result").iterdir()) == before


def test_mistakes(run):
    assert "Name the network" in run("--tables=2", code=2).stderr
    assert (
        "There is no --tables '5'; choose one of 2, 3, 4, 6, 7, robust" in run("-n", "F1", "--tables=5", code=2).stderr
    )
    assert "leave one of them out" in run("-n", "F1", "--nocompute", "--retrain", code=2).stderr
    last = 2**32 - 1
    assert f"beyond the last seed, {last}" in run("-n", "F1", f"--seed={last}", "--trials=2", code=2).stderr
    two = run("-n", f"C1,{NAME}", "--dataset=digits", "--tables=6", code=2)
    assert "Table 6 is about images, which small does not take" in two.stderr
    assert "trainings" not in two.stdout, "nothing is begun"
    two = run("-n", f"C1,{NAME}", "--dataset=digits", "--tables=2", "--remedy=augment", code=2)
    assert "The remedy augment is for images" in two.stderr
    assert "trainings" not in two.stdout


def test_augmentation_is_of_images():
    asked = Settings(network=("F1",), tables=("6", "2"))
    sizes = {"small_batch": lambda samples: 1, "large_batch": lambda samples: 10}
    flat, image = (SimpleNamespace(name="F1", input_shape=shape, **sizes) for shape in ((784,), (32, 32, 3)))
    assert (asked.resolve(flat, 100).tables, asked.resolve(image, 100).tables) == (("2",), ("2", "6"))
    with pytest.raises(UserError, match="Table 6 is about images, which F1 does not take"):
        Settings(network=("F1",), tables=("6",)).resolve(flat, 100)


def recipe(experiment, size, seed, **method):
    return Recipe(**PROBLEM, batch_size=size, epochs=1, seed=seed, **method)


def experiment_of_f1(*tables, trials=2):
    settings = Settings(network=("F1",), tables=tables, trials=trials, small_batch=256, large_batch=6000)
    made = SimpleNamespace(settings=settings, batches_as_published=True, network=SimpleNamespace(name="F1"))
    made.sharpness_samples = None
    made.recipe = lambda *given, **method: recipe(made, *given, **method)
    made.request = lambda kind, **given: kind(**PROBLEM, **given)
    made.value = lambda minimizer, recipe, quantity, number, **place: (minimizer, recipe.seed, quantity, place, number)
    return made


def test_verdicts_beside_the_paper():
    """Table 3 of F1: 1.23 ± 0.83 and 205.14 ± 69.52 at 1e-3, 0.61 ± 0.27 and 42.90 ± 17.14 at 5e-4."""
    experiment = experiment_of_f1("3")
    numbers = {("SB", 1e-3): (2, 3), ("LB", 1e-3): (900, 901), ("SB", 5e-4): (0.6, None), ("LB", 5e-4): (0.1, 0.2)}
    found = {}
    for minimizer, quantity in cells(["3"]):
        for seed, one in enumerate(paper_tables.recipes(experiment, minimizer)):
            value = numbers[minimizer, quantity.epsilon][seed]
            result = SharpnessResult(value, 0.1, 0.2, quantity.epsilon, 3, "lbfgsb", 1, 1, "", 0.0, 1.0, 1.0)
            asked = paper_tables.item(experiment, one, quantity)
            assert isinstance(asked[0], SharpnessRequest)
            found[asked] = Measured(asked[0], result, store.provenance())
    judged_rows, long = judged(experiment, found)
    assert {(row.minimizer, row.epsilon): row.verdict for row in judged_rows} == {
        ("SB", 1e-3): "agrees",  # 1.27 away, of 3 times 0.83
        ("LB", 1e-3): "same direction",  # 695 away, of 3 times 69.52, but greater than SB
        ("SB", 5e-4): "no verdict",  # a trial is missing
        ("LB", 5e-4): "agrees",  # 42.75 away, of 3 times 17.14
    }
    assert len(long) == 8
    experiment.sharpness_samples = 5000
    part = {(dataclasses.replace(asked, samples=5000), place): one for (asked, place), one in found.items()}
    assert {row.verdict for row in judged(experiment, part)[0]} == {"no verdict"}, "another function"
    assert long[0][:3] == ("SB", 0, "sharpness")


def test_a_minimizer_of_another_method_is_another_recipe():
    experiment = experiment_of_f1("2")
    plain = paper_tables.recipes(experiment, "LB")
    assert [(one.batch_size, one.seed, one.remedies, one.optimizer) for one in plain] == [
        (6000, 0, (), "adam"),
        (6000, 1, (), "adam"),
    ]
    conservative, adaqn = (paper_tables.recipes(experiment, f"LB {how}")[0] for how in ("conservative", "adaqn"))
    assert (conservative.remedies, conservative.optimizer) == (("conservative",), "adam")
    assert (adaqn.remedies, adaqn.optimizer) == ((), "adaqn")
    minimizers = {minimizer for table in TABLES.values() for minimizer in table.minimizers}
    made = [one for minimizer in minimizers for one in paper_tables.recipes(experiment, minimizer)]
    assert len(set(made)) == 2 * len(minimizers) == 24
    evaluated = {
        "SB": Evaluated(0.1, 0.1, 99.9, 0.2, 0.2, 97.0, *()),
        "LB": Evaluated(0.1, 0.1, 99.0, 0.2, 0.2, 97.8, *()),
    }
    found = {
        paper_tables.item(experiment, one, TEST): Measured(None, evaluated[minimizer], store.provenance())
        for minimizer in ("SB", "LB")
        for one in paper_tables.recipes(experiment, minimizer)
    }
    assert all(isinstance(request, EvaluationRequest) for request, _ in found)
    settings = dataclasses.replace(experiment.settings, remedy="asam:radius=0.1,eta=0,augment")
    also = paper_tables.recipes(SimpleNamespace(**vars(experiment) | {"settings": settings}), "LB sam")
    assert also[0].remedies == ("asam:radius=0.1,eta=0.0", "augment", "sam")
    judged_rows, _ = judged(experiment, found)
    found = {(row.minimizer, row.quantity): (row.values, row.verdict) for row in judged_rows}
    assert found["LB", "test_accuracy"] == ([97.8, 97.8], "agrees")
    assert found["SB", "test_accuracy"] == ([97.0, 97.0], "contradicts"), "not above LB"
    assert found["SB", "train_accuracy"] == ([99.9, 99.9], "contradicts"), "not below LB"


def test_the_rule():
    def judge(*numbers, beside=(0, 0)):
        return claims.agreement(numbers, Spread(10, 1), beside, Spread(2, 1))

    assert judge(12.9, 13.1) == "agrees"
    assert judge(13.1, 13.2) == "same direction"
    assert judge(13.1, 13.2, beside=(20,)) == judge(13.1, 13.2, beside=(14, 14.2)) == "contradicts"
    assert judge(13.1, 13.2, beside=(14,)) == judge(13.1, 13.2, beside=(13, 13.2)) == "no verdict", "it is not clear"
    assert judge(13.1, 13.2, beside=()) == judge(13.1, 13.2, beside=(0, None)) == "no verdict"
    assert judge(10, None) == judge() == judge(10, float("nan")) == "no verdict"
    assert judge(13.1, 13.2, beside=(0, float("nan"))) == "no verdict"
    assert judge(16.0) == "same direction", "of one trial only the paper's deviation is known"
    assert judge(0, 30) == "agrees", "three times 21, the wider one"
    assert claims.agreement([1.0], None) == "no verdict"


@pytest.mark.parametrize("trials", [2, 5])
def test_errors_and_power_of_the_rule(trials):
    """Our SB and LB are alike, or far apart, and both far from the paper's."""
    rng, theirs = np.random.default_rng(trials), (Spread(10, 0.1), Spread(8, 0.1))

    def judge(apart):
        draws = rng.normal(0, 0.3, (400, 2, trials)) + np.array([[20 + apart], [20]])
        verdicts = [claims.agreement(ours, theirs[0], beside, theirs[1]) for ours, beside in draws.tolist()]
        return {verdict: verdicts.count(verdict) / 400 for verdict in ("no verdict", "same direction", "contradicts")}

    assert judge(0)["no verdict"] >= 0.93
    assert judge(6)["same direction"] >= 0.9
    assert judge(-6)["contradicts"] >= 0.9


def test_the_published_numbers():
    assert paper.published("F1", "LB", "train_accuracy") == Spread(99.92, 0.01)
    assert paper.published("C1", "LB augment", "sharpness", "full", 5e-4) == Spread(45.89, 3.83)
    assert paper.published("C4", "SB augment", "test_accuracy") == Spread(63.05, 0.5)
    assert paper.published("F2", "LB conservative", "sharpness", "full", 1e-3) == Spread(928.40, 51.63)
    assert paper.published("C1", "LB sgd", "test_accuracy") == paper.TABLE_2["C1"].test_large
    for nothing in (
        ("F1", "LB augment", "test_accuracy"),
        ("C1", "LB sam", "test_accuracy"),
        ("", "SB", "test_accuracy"),
    ):
        assert paper.published(*nothing) is None
    assert paper.published("C1", "SB augment", "sharpness", "full", 1e-3) is None
    for row in (*paper.TABLE_6.values(), *paper.TABLE_7.values()):
        assert list(row.sharpness) == list(paper.EPSILONS)
    assert all(paper.TABLE_7[name].test_small.mean == row.test_small.mean for name, row in paper.TABLE_2.items())


def test_what_each_minimizer_is_compared_with():
    for minimizer, other in {
        "SB": "LB",
        "LB": "SB",
        "SB augment": "SB",
        "LB conservative": "LB",
        "LB sgd": "SB",
    }.items():
        assert paper.compared_with(minimizer) == other
    for name, table in TABLES.items():
        assert {(paper.compared_with(m), q) for m, q in cells([name])} <= set(cells([name])), "in the same table"
        assert table.quantities[-1] in (*FULL, *paper_tables.RANDOM, TEST)
