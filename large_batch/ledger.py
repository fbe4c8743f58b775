"""The ledger: each claim of the paper, and of what was written about it since, beside what results/ says of it.

Only files in results/ are read. Each line says which command its number came from.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from large_batch import claims, paper

NOT_RUN = "not run"
ORDER = 10  # "one to two orders of magnitude": at least this factor
USUAL = {  # settings under which numbers stand beside the paper's; scripts without one have it so
    "definition": "repository",
    "dataset": None,
    "precision": "float32",
    "solver": "lbfgsb",
    "iterations": 10,
    "scale": 100.0,
    "manifold": "normal",
    "dimension": 100,
    "remedy": (),
    "optimizer": "adam",
}


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
    def training(self) -> str:
        """How long was trained, and how often, in words."""
        trials = self.setting("trials") or 1
        seeds = f"seed {self.setting('seed', 0)}" if trials == 1 or self.script == "sharpness" else f"{trials} seeds"
        return f"{self.setting('epochs')} epochs, {seeds}"

    @property
    def usual(self) -> bool:
        """Whether its numbers may stand beside the paper's."""
        return all((self.setting(name, value) or value) == value for name, value in USUAL.items())

    def claims(self, words: str) -> list[claims.Claim]:
        """Return the claims judged by the command that have some words in them."""
        return [claims.Claim(**one) for one in self.content.get("claims", ()) if words in one["claim"]]


def read(results: Path, figures: Path) -> list[Result]:
    """Return what commands wrote, the longest trainings and those of most trials first."""
    found = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        if not {"provenance", "problem", "settings"} <= content.keys():
            continue  # a benchmark
        table = path.with_suffix(".csv")
        rows = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
        drawn = [figures / f"{path.stem}{suffix}.png" for suffix in ("", "-sharpness")]
        found.append(Result(path, content, rows, [figure for figure in drawn if figure.exists()]))
    return sorted(found, key=lambda one: (-one.setting("epochs", 0), -one.setting("trials", 1), one.path.name))


@dataclass(frozen=True)
class Line:
    """A line of the ledger: a claim, what was published, what was found for a network, and the verdict."""

    claim: str
    source: str
    network: str
    published: str
    found: str
    verdict: str
    result: Result | None = None


@dataclass(frozen=True)
class Trials:
    """The values of a quantity at the minimizers of the longest trainings, a seed each, and where they are."""

    values: list[float]
    epochs: int
    result: Result

    def __str__(self) -> str:
        return str(paper.Spread.of(self.values))


def trials(results: Sequence[Result], network: str, minimizer: str, quantity: str, **where: Any) -> Trials | None:
    """Return the values of a quantity over seeds, the mean over random subspaces; None where there is none.

    Args:
        results: What commands wrote.
        network: Its name.
        minimizer: "SB", "LB" or "LB sam" and so on.
        quantity: As in the .csv files.
        where: `space` and `epsilon` of a sharpness.
    """
    by_seed: dict[int, dict[int, list[float]]] = {}
    sources: dict[int, Result] = {}
    asked = {"minimizer": minimizer, "quantity": quantity, "warm_start_epochs": "", "rescale": "", **where}
    asked = {name: f"{value}" for name, value in asked.items()}
    for result in results:
        part = quantity == "sharpness" and result.setting("sharpness_samples", 10**9) < 50_000
        if result.network != network or not result.usual or part:
            continue
        for row in result.rows:
            if all(row.get(name, value) == value for name, value in asked.items()) and row.get("value"):
                epochs, seed = int(row["epochs"]), int(row["seed"])
                sources.setdefault(epochs, result)
                if seed not in by_seed.get(epochs, {}) or sources[epochs] is result:
                    by_seed.setdefault(epochs, {}).setdefault(seed, []).append(float(row["value"]))
    if not by_seed:
        return None
    epochs = max(by_seed)
    return Trials([float(np.mean(values)) for values in by_seed[epochs].values()], epochs, sources[epochs])


def ledger(results: Sequence[Result], networks: Sequence[str]) -> list[Line]:
    """Return all lines, claim by claim; a claim about which a network has no result is not run there."""
    lines = []
    for claim in CLAIMS:
        for network in networks:
            own = [result for result in results if result.network == network and result.usual]
            lines += list(claim.judge(claim, own, network)) or [
                Line(claim.text, claim.source, network, claim.published(network), "", NOT_RUN)
            ]
    return lines


@dataclass(frozen=True)
class Entry:
    """A claim: its words, where it is made, what was published of a network, and how results are judged."""

    text: str
    source: str
    published: Callable[[str], str]
    judge: Callable[[Entry, Sequence[Result], str], Iterator[Line]]

    def line(self, network: str, found: str, verdict: str, result: Result) -> Line:
        """Return a line on a network."""
        return Line(self.text, self.source, network, self.published(network), found, verdict, result)


def _published(minimizers: Sequence[str], quantity: str, *where: Any) -> Callable[[str], str]:
    def text(network: str) -> str:
        numbers = {minimizer: paper.published(network, minimizer, quantity, *where) for minimizer in minimizers}
        return ", ".join(f"{minimizer} {number}" for minimizer, number in numbers.items() if number)

    return text


def _judged(script: str, words: str) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return what the first result of a script says of a claim with some words in it."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for result in results:
            if result.script == script and (judged := result.claims(words)):
                yield from (entry.line(network, one.found, one.verdict, result) for one in judged)
                return

    return judge


def _gap(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
    small, large = (trials(results, network, minimizer, "test_accuracy") for minimizer in ("SB", "LB"))
    if small and large:
        verdict = claims.unclear(small.values, large.values, paper.seed_spread(network)) or claims.HOLDS
        if claims.unclear(large.values, small.values, paper.seed_spread(network)) == "":
            verdict = claims.CONTRADICTED
        yield entry.line(network, f"SB {small} %, LB {large} % after {small.epochs} epochs", verdict, large.result)


def _sharper(space: str) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return the rule on Metric 2.1: LB is at least ten times as sharp as SB, in the mean of the logarithms."""

    def published(network: str, epsilon: float) -> str:
        return _published(("SB", "LB"), "sharpness", space, epsilon)(network)

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for epsilon in paper.EPSILONS:
            where = {"space": space, "epsilon": epsilon}
            small, large = (trials(results, network, end, "sharpness", **where) for end in ("SB", "LB"))
            if small and large:
                logs = [np.log(one.values) for one in (small, large)]
                ratio = float(np.exp(logs[1].mean() - logs[0].mean()))
                unclear = claims.unclear(logs[1], logs[0], None)
                if ratio >= ORDER:  # with one trial, too: seeds differ by far less in Table 3
                    verdict = claims.HOLDS
                elif ratio < 1:
                    verdict = claims.CONTRADICTED if not claims.unclear(logs[0], logs[1], None) else unclear
                else:
                    verdict = unclear or f"{claims.DIRECTION}: less than {ORDER} times"
                found = f"epsilon {epsilon:g}: SB {small}, LB {large}, {ratio:.3g} times, after {small.epochs} epochs"
                yield replace(entry.line(network, found, verdict, large.result), published=published(network, epsilon))

    return judge


def _steeper(curve: str) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return the rule on a parametric plot: from LB's end the training loss rises more than twice as much as from SB's,
    the mean over both sides, an eighth of the way between them."""

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        for result in results:
            if result.script != "plot_parametric_plot" or result.setting("curve") != curve or not result.rows:
                continue
            alphas, losses = (np.array([float(row[name]) for row in result.rows]) for name in ("alpha", "train_loss"))
            small, large = (
                float(np.interp([end - 1 / 8, end + 1 / 8], alphas, losses).mean() - np.interp(end, alphas, losses))
                for end in (0, 1)
            )
            found = f"the loss rises by {small:.3g} around SB and by {large:.3g} around LB"
            steeper = claims.HOLDS if large > 2 * small else claims.CONTRADICTED
            yield entry.line(network, found, steeper, result)
            return

    return judge


def _remedied(hows: Sequence[str], helps: bool) -> Callable[[Entry, Sequence[Result], str], Iterator[Line]]:
    """Return the rule on large batches with a remedy: whether they close more than half of the gap to SB.

    Where the paper says that a remedy helps, its minimizers are to stay ten times as sharp as SB's, too.
    """

    def judge(entry: Entry, results: Sequence[Result], network: str) -> Iterator[Line]:
        spread = paper.seed_spread(network)
        for how in hows:
            ends = {end: trials(results, network, end, "test_accuracy") for end in ("SB", "LB", f"LB {how}")}
            if None in ends.values():
                continue
            small, large, remedied = ends.values()
            gain = float(np.mean(remedied.values) - np.mean(large.values))
            gap = float(np.mean(small.values) - np.mean(large.values))
            better = not claims.unclear(remedied.values, large.values, spread)
            if gap <= 0 or claims.unclear(small.values, large.values, spread):
                verdict = f"{claims.OPEN}: no clear gap"
            elif helps:
                verdict = claims.HOLDS if better else f"{claims.OPEN}: no clear gain"
            else:
                verdict = claims.CONTRADICTED if better and gain > gap / 2 else claims.HOLDS
            found = f"{how}: {remedied} %, plain LB {large} %, SB {small} % after {small.epochs} epochs"
            yield entry.line(network, found, verdict, remedied.result)

    return judge


CLAIMS = (
    Entry("Small batches generalise better.", "Table 2", _published(("SB", "LB"), "test_accuracy"), _gap),
    Entry(
        "The gap is no over-fitting: stopping early would not close it.",
        "Section 2.2, Figure 2",
        lambda network: "no peak in any curve",
        _judged("training_curves", "early stopping"),
    ),
    Entry(
        "On the line between the minimizers the loss is steeper around LB.",
        "Figure 3",
        lambda network: "steeper at LB",
        _steeper("linear"),
    ),
    Entry("On a curve between them, too.", "Figure 7", lambda network: "steeper at LB", _steeper("curvilinear")),
    Entry(
        "LB minimizers are one to two orders of magnitude sharper (full space).",
        "Table 3",
        _published(("SB", "LB"), "sharpness", "full", 1e-3),
        _sharper("full"),
    ),
    Entry(
        "In random subspaces, too.",
        "Table 4",
        _published(("SB", "LB"), "sharpness", "random", 1e-3),
        _sharper("random"),
    ),
    Entry(
        "Small batches go further from the start.",
        "Section 3",
        lambda network: "{} to {} times as far".format(*paper.DISTANCE_RATIO),
        _judged("training_curves", "as far from the starting point"),
    ),
    Entry(
        "As the loss falls, LB iterates become sharper, SB ones flatter.",
        "Figure 6",
        lambda network: "",
        _judged("training_curves", "As the loss falls"),
    ),
    Entry(
        "Beyond a batch size the test accuracy falls.",
        "Figure 4",
        lambda network: (
            f"about {paper.BATCH_SIZE_THRESHOLD[network]:,}" if network in paper.BATCH_SIZE_THRESHOLD else ""
        ),
        _judged("batch_size_sweep", "There is a batch size"),
    ),
    Entry(
        "The sharpness rises up to there, and less beyond.",
        "Figure 4",
        lambda network: "",
        _judged("batch_size_sweep", "The sharpness rises"),
    ),
    Entry(
        "Warm-started late, LB generalises and is flat; early, it is not.",
        "Figure 5",
        lambda network: "",
        _judged("warmstart", "Warm-started"),
    ),
    Entry(
        "A batch that grows may remedy the gap.", "Section 4", lambda network: "", _judged("warmstart", "Starting with")
    ),
    Entry(
        "Data augmentation helps LB.",
        "Table 6",
        _published(("SB augment", "LB augment"), "test_accuracy"),
        _remedied(("augment",), helps=True),
    ),
    Entry(
        "Conservative training helps LB.",
        "Table 7",
        _published(("LB conservative",), "test_accuracy"),
        _remedied(("conservative",), helps=True),
    ),
    Entry(
        "Adversarial and stability training do not.",
        "Appendix E.3",
        lambda network: "no improvement",
        _remedied(("adversarial", "stability"), helps=False),
    ),
    Entry(
        "Other optimizers do not.",
        "Section 2.2",
        lambda network: "the same gap",
        _remedied(("adagrad", "sgd", "adaqn"), helps=False),
    ),
)
