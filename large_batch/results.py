"""What is in results/: the files that commands wrote, and the values of trials among them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from large_batch import evidence, paper
from large_batch.errors import UserError

USUAL = {  # settings under which numbers stand beside the paper's; scripts without one have it so
    "definition": "repository",
    "dataset": None,
    "precision": "float32",
    "iterations": 10,
    "scale": 100.0,
    "manifold": "normal",
    "dimension": paper.DIMENSION,
    "remedy": (),
    "optimizer": "adam",
    "efficiency": 0.2,
    "accuracy": None,
    "weights": None,
    "small_batch_weights": None,
    "large_batch_weights": None,
}
ACCURACIES = "train_accuracy", "test_accuracy"  # without a value where the training diverged
SOLVERS = "lbfgsb", "vertex"  # of sharpness
UNTIL_CONVERGED = " at most, until converged"


@dataclass(frozen=True)
class Result:
    """What a command wrote: a .json file, the rows of the .csv file beside it, and its figures."""

    path: Path
    content: dict[str, Any] = field(repr=False)
    rows: list[dict[str, str]] = field(repr=False)
    figures: list[Path]

    @property
    def command(self) -> str:
        """The command line, from the script on."""
        return self.content["provenance"]["command"]

    @property
    def script(self) -> str:
        """The script's name without .py."""
        return self.command.split()[0].removesuffix(".py")

    @property
    def network(self) -> str:
        """The network's name."""
        return self.content["problem"]["network"]

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a setting of the command."""
        return self.content["settings"].get(name, default)

    @property
    def seeds(self) -> range:
        """The seeds of the trainings; trials of `sharpness.py` are subspaces."""
        first, trials = self.setting("seed", 0), self.setting("trials") or 1
        return range(first, first + (1 if self.script == "sharpness" else trials))

    @property
    def training(self) -> str:
        """How long was trained, and how often, in words."""
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        return f"{self.setting('epochs')} epochs{UNTIL_CONVERGED if self.setting('until_converged') else ''}, {seeds}"

    @property
    def usual(self) -> bool:
        """Whether its numbers may stand beside the published ones."""
        usual = USUAL | {"network": self.network, "small_batch": paper.SMALL_BATCH}
        if self.network in paper.LARGE_BATCH:
            usual |= {"large_batch": paper.LARGE_BATCH[self.network]}
        if self.script == "finetune":
            usual |= {"optimizer": "sgd", "weights": self.setting("weights")}
        return all((self.setting(name, value) or value) == value for name, value in usual.items())

    @property
    def epochs(self) -> list[dict[str, str]]:
        """The rows of the -epochs.csv file: each of a regime, a seed and an epoch; none where there is no such file."""
        return _rows(self.path.with_name(f"{self.path.stem}-epochs.csv"))

    def claims(self, words: str) -> list[evidence.Claim]:
        """Return the claims judged by the command that have some words in them."""
        told = self.content.get("claims", [self.content["claim"]] if "claim" in self.content else [])
        return [evidence.Claim(**one) for one in told if words in one["claim"]]


def _rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text("utf-8").splitlines())) if table.exists() else []


def read(results: Path, figures: Path) -> list[Result]:
    """Return what commands wrote: the longest trainings first, of these the most trials, then by name.

    Raises `UserError` for a .json file that cannot be read.
    """
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); restore it, or move it away.") from error
        if not {"provenance", "problem", "settings"} <= set(content):
            continue  # a benchmark
        if "environment" not in content["provenance"]:
            continue  # from before version 0.2.0, in which C1's pooling changed
        drawn = [figures / f"{path.stem}{suffix}.png" for suffix in ("", "-sharpness", "-3d")]
        found.append(
            Result(path, content, _rows(path.with_suffix(".csv")), [figure for figure in drawn if figure.exists()])
        )
    return sorted(found, key=lambda one: (-one.setting("epochs", 0), -one.setting("trials", 1), one.path.stem))


@dataclass(frozen=True)
class Trials:
    """The values of a quantity at the minimizers of equally long trainings, a seed each, and where each is.

    The accuracy of a training that diverged is NaN.
    """

    values: list[float]
    epochs: int
    until_converged: bool
    results: list[Result]

    @property
    def length(self) -> str:
        """How long was trained, and how often, in words."""
        seeds = f"{len(self.values)} seeds" if len(self.values) > 1 else "one seed"
        return f"{self.epochs} epochs{UNTIL_CONVERGED if self.until_converged else ''}, {seeds}"

    def __str__(self) -> str:
        return paper.Spread.of(self.values).rounded()


def trials(
    results: Sequence[Result], network: str, minimizers: Sequence[str], quantity: str, **where: Any
) -> list[Trials]:
    """Return the values of a quantity over seeds, the mean over random subspaces, of each of several minimizers.

    They are those of the longest trainings that all of the minimizers have, of equally long ones those for a number of
    epochs rather than until converged; an empty list where there are none.

    Args:
        results: What commands wrote. Of a seed that several have, that of most subspaces counts, of these one that was
            asked for as many epochs, the first of them.
        network: Its name.
        minimizers: "SB", "LB" or "LB sam" and so on.
        quantity: As in the .csv files.
        where: `space` and `epsilon` of a sharpness, or `epochs`.
    """
    found = [_by_length(*_asked(results, network, one, quantity, where)) for one in minimizers]
    shared = set.intersection(*map(set, found))
    if not shared:
        return []
    length = max(shared, key=lambda of: (of[0], not of[1]))
    of_each = [list(of[length].values()) for of in found]
    return [
        Trials([float(np.mean(values)) for values, _ in seeds], *length, [result for _, result in seeds])
        for seeds in of_each
    ]


def largest_sharpness(results: Sequence[Result], network: str, minimizer: str, **where: Any) -> paper.Spread | None:
    """Return the largest sharpness that any solver found, over the seeds where all were tried; None where none was.

    Each solver finds a lower bound of the maximum, in the full space. `where` is the `epsilon`, and `epochs`.
    """
    full = {"space": "full"}
    whole = [one for one in results if not one.setting("until_converged")]
    found = [
        _by_length(*_asked(whole, network, minimizer, "sharpness", full | where | {"solver": one})) for one in SOLVERS
    ]
    lengths = set.intersection(*map(set, found))
    of_each = [of[max(lengths)] for of in found if lengths]
    seeds = set.intersection(*map(set, of_each)) if of_each else set()
    values = [max(of[seed][0][0] for of in of_each) for seed in sorted(seeds)]
    return paper.Spread.of(values) if values else None


def _asked(
    results: Sequence[Result], network: str, minimizer: str, quantity: str, where: dict[str, Any]
) -> tuple[list[Result], dict[str, str]]:
    """Return the results that count, and what the cells of their rows have, for a quantity of a minimizer."""
    usual = [one for one in results if one.network == network and one.usual]
    if quantity == "sharpness":
        where = {"solver": "lbfgsb", **where}
        usual = [one for one in usual if one.setting("sharpness_samples", 10**9) >= paper.SAMPLES.get(network, 0)]
    asked = {"quantity": quantity, "warm_start_epochs": "", "rescale": "", "minimizer": minimizer, **where}
    return usual, {name: f"{value}" for name, value in asked.items()}


def _by_length(results: Sequence[Result], asked: dict[str, str]) -> dict[tuple, dict[int, tuple[list[float], Result]]]:
    """Return the values of the rows that are as asked, and where they are, by (epochs, until converged) and seed."""
    found: dict[tuple, dict[int, dict[Path, tuple[list[float], Result]]]] = {}
    for result in results:
        for row in result.rows:
            known = row.get("seed")  # a given file of weights has none
            known = known and (row.get("value") or row.get("quantity") in ACCURACIES)  # sharpness may be unresolved
            if known and all(row.get(name, value) == value for name, value in asked.items()):
                length = int(row["epochs"]), bool(result.setting("until_converged"))
                sources = found.setdefault(length, {}).setdefault(int(row["seed"]), {})
                sources.setdefault(result.path, ([], result))[0].append(float(row["value"] or "nan"))

    def chosen(sources: dict[Path, tuple[list[float], Result]], epochs: int) -> tuple[list[float], Result]:
        return max(sources.values(), key=lambda one: (len(one[0]), one[1].setting("epochs") == epochs))

    return {
        length: {seed: chosen(sources, length[0]) for seed, sources in seeds.items()} for length, seeds in found.items()
    }
