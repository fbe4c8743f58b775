import dataclasses
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import finetune
import report
from large_batch import claims, evidence, ledger, paper
from large_batch.errors import UserError
from large_batch.networks import NAMES
from large_batch.results import Result, read, trials

ROOT = Path(__file__).parent.parent


def test_how_long_a_result_took():
    """Trainings and measurements count once each, and not again where the command's own time has them."""

    def origin(command, finished, took):
        return {"command": command, "finished": f"2026-11-26T10:{finished}:00Z", "wall_seconds": took}

    def training(epochs, *where):
        return {"recipe": {"epochs": epochs, "seed": 0}, "training": origin(*where)}

    def measurement(name, *where):
        return {"measurement": {"epsilon": name}, "provenance": origin(*where)}

    own = origin("a", "30", 600)  # from 10:20 on
    before = [training(50, "b", "10", 100), training(100, "b", "15", 250), measurement(1, "b", "16", 7)]
    begun = training(10, "a", "22", 300) | {"seed": 1}  # of which 3 minutes were before
    begun["recipe"] = {"epochs": 10, "seed": 1}
    during = [measurement(2, "a", "29", 60), measurement(3, "a", "30", 60), measurement(3, "a", "30", 60)]
    beside = measurement(4, "b", "29", 11)  # by another command
    content = {"minimizers": {"SB": before[:2], "LB": begun}, "results": [before[2], *during, beside, before[2]]}
    assert report.seconds(content | {"provenance": own}) == (250 + 180, 7 + 11)
    own |= {"commit": f"{'0' * 40}+changes", "packages": {"keras": "3"}, "python": "3.11", "machine": "one"}
    told = report.origins([Result(Path("x.json"), content | {"provenance": own, "settings": {}}, [], [])], Path("R.md"))
    assert "10.0 min of its own, 0 min for measurements and 7 min for trainings that it found" in told
    assert "- at commit 000000000000 with changes; keras 3; Python 3.11\n" in told


def test_the_verdicts_in_short():
    def line(claim, network, verdict, found="", **settings):
        seeds = settings.pop("seeds", (0,))
        results = [
            Result(Path("a"), {"provenance": {"command": "a.py"}, "settings": settings | {"seed": seed}}, [], [])
            for seed in seeds
        ]
        return ledger.Line(claim, "Table 1", network, "", found, verdict, tuple(results) if settings else ())

    sizes = np.array([64.0, 256.0])
    thresholds = [claims.sharpness_threshold(sizes, sizes, epsilon, None) for epsilon in (1e-3, 5e-4)]
    thresholds[0] = dataclasses.replace(thresholds[0], verdict=evidence.HOLDS)
    lines = [
        line("a", "F1", evidence.HOLDS, "at epsilon 0.001: SB", epochs=100, trials=5),
        line("a", "F1", f"{evidence.OPEN}: why", "epsilon 0.0005: SB", epochs=100, trials=5),
        line("b", "C1", evidence.HOLDS, epochs=20, seeds=(0, 1)),
        line("c", "C2", ledger.NOT_RUN),
        line("d", "F1", evidence.HOLDS, "sam: 98 %", epochs=50, trials=2),
        line("d", "F1", evidence.HOLDS, "asam: 98 %", epochs=50, trials=2),
        *(
            line("f", "F1", verdict, f"{how}, epsilon 0.001: SB", epochs=50, trials=2)
            for how, verdict in (("sam", evidence.OPEN), ("asam", evidence.HOLDS), ("augment", evidence.HOLDS))
        ),
        *(line("e", "C1", one.verdict, one.found, epochs=20) for one in thresholds),
    ]
    rows = report.in_short(lines).splitlines()
    assert rows[0] == "| claim | F1, 50 - 100 epochs, 2 - 5 trials | C1, 20 epochs, 1 - 2 trials |"
    assert rows[2:] == [
        "| a (Table 1) | epsilon 0.001: holds; epsilon 0.0005: no verdict | - |",
        "| b (Table 1) | - | holds |",
        "| d (Table 1) | holds | - |",
        "| f (Table 1) | holds: 2 of 3; no verdict: 1 of 3 | - |",
        "| e (Table 1) | - | epsilon 0.001: holds; epsilon 0.0005: no verdict |",
    ]


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="There are no results in"):
        report.main(report.Settings(result_dir=f"{tmp_path}", report=f"{tmp_path}/REPORT.md"))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "merged.json").write_text("<<<<<<< HEAD")
    with pytest.raises(UserError, match="merged.json is damaged .*; restore it, or move it away"):
        report.main(report.Settings(result_dir=f"{tmp_path}", report=f"{tmp_path}/REPORT.md"))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """What git has of the results, whatever a user's own commands have written there since."""
    folder = tmp_path_factory.mktemp("committed")
    listed = ["git", "ls-files", "-z", "results", "Figures", "README.md", "REPORT.md"]
    try:
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    copied = ["git", "checkout-index", "-z", "--stdin", f"--prefix={folder}/"]
    subprocess.run(copied, cwd=ROOT, input=names, check=True)
    return folder


def test_the_committed_report_is_that_of_the_committed_results(committed):
    results = read(committed / "results", committed / "Figures")
    lines = ledger.ledger(results, NAMES)
    text = report.text(results, lines, committed / "REPORT.md")
    assert text.replace(f"{committed}/", "") == (committed / "REPORT.md").read_text()
    readme = (committed / "README.md").read_text()
    assert f"\n{report.in_short(lines)}\n" in readme
    prose = re.sub("```.*?```", "", readme.replace(report.in_short(lines), ""), flags=re.DOTALL)
    assert re.findall(r"\d\.\d+ %|\d times", prose) == [], "results are in what report.py makes only"
    html = report.page((committed / "REPORT.md").read_text(), committed / "REPORT.md", committed / "Figures")
    images, tags = r'<img[^>]*alt="([^"]+)"[^>]*src="([^"]+)"', r"<[^>]+>|\s+"
    sources, kept = re.findall(images, html), (committed / "Figures" / "report.html").read_text()
    assert re.findall(images, kept) == sources
    assert re.sub(tags, " ", kept).split() == re.sub(tags, " ", html).split(), "whatever Markdown's version"
    assert sources
    assert all(source.startswith("data:image/png;base64,") for _, source in sources), "the page needs no other file"
    assert len(sources) == html.count("<img"), "each has an alternative text"
    for link in re.findall(r'href="#([^"]+)"', html):
        assert f'id="{link}"' in html


def test_our_spread_over_seeds_is_that_of_the_committed_results(committed):
    """And where it is the paper's, ours is not known, or is less."""
    for network in paper.TABLE_2:
        spreads = [paper.seed_spread(network)]
        for minimizer in ("SB", "LB"):
            found = trials(read(committed / "results", committed), network, [minimizer], "test_accuracy")
            spreads += [np.std(of.values, ddof=1) for of in found if len(of.values) > 2]
        assert spreads[0] == pytest.approx(max(spreads), abs=0.005), network


def test_the_committed_claims_are_judged_by_the_rules_of_today(committed):
    few, two = np.array([1.0, 2.0]), [[1.0], [1.0]]
    path = claims.Iterates(few, few)
    rules = {entry.rule for entry in ledger.CLAIMS} | {
        claims.early_stopping(two, two).rule,
        claims.distances([2.0, 3.0]).rule,
        claims.sharpness_paths(path, path, 1e-3, None).rule,
        claims.accuracy_threshold(few, few, None)[0].rule,
        claims.sharpness_threshold(few, few, 1e-3, None).rule,
        claims.warm_starts(few, few[None], few, few, {}).rule,
        claims.switching(dict.fromkeys(("SB", "LB", "growing"), two), {}).rule,
        finetune.level_then_falling([], 1).rule,
    }
    lines = ledger.ledger(read(committed / "results", committed / "Figures"), NAMES)
    assert {line.rule for line in lines if line.results} <= rules


def test_the_committed_results_name_no_folder_of_a_machine(committed):
    for path in (committed / "results").glob("*.json"):
        assert not re.search(r'"command": "[^"]*[ =]/', path.read_text()), path.name


@pytest.mark.parametrize("cell", ["a|b", ""])
def test_a_cell_does_not_break_a_table(cell):
    assert report.table([["h", "k"], [cell, "1"]]).splitlines()[2].count("|") == 3
