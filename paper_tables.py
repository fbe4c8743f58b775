"""The paper's tables over trials, and the attempts to repair large-batch training (Tables 2, 3, 4, 6, 7, appendix E.3).

Trains each network with small (SB) and large batches (LB), plainly and with the remedies and optimizers that the tables
are about, and prints accuracy and sharpness, mean ± standard deviation over trials with starting points of their own,
beside the paper's. Trainings and measurements are kept and reused, and several processes with one --run_dir share the
work; with --nocompute what is stored is printed. The verdict of a row:

    agrees          the means differ by at most 3 times the wider standard deviation
    same direction  they differ by more, and it clearly lies on the paper's side of what it is compared with: SB of LB,
                    LB of SB, with augmentation or conservative training of without
    contradicts     it clearly lies on the other side
    no verdict      neither is clear, a trial is missing, the paper has no such number, or sharpness is over part of the
                    training set

    python paper_tables.py -n F1 --trials 5
    python paper_tables.py -n C1,C2 --tables=2,3,6 --epochs 20
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from large_batch import cli, named, networks, paper
from large_batch.cli import setting
from large_batch.errors import UserError
from large_batch.subspace import MANIFOLDS, check_dimension

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.experiment import Experiment
    from large_batch.measurements import Measured, Value
    from large_batch.places import Item
    from large_batch.recipes import Recipe
    from large_batch.runner import Runner


@dataclass(frozen=True)
class Quantity:
    """What a cell holds; sharpness is Metric 2.1 in a space at an epsilon."""

    name: str
    space: str | None = None
    epsilon: float | None = None

    def __str__(self) -> str:
        return self.name.replace("_", " ") if self.epsilon is None else f"{self.name} {self.epsilon:g}"


@dataclass(frozen=True)
class Table:
    """A table: which minimizers it has, as `paper.published` names them, and what is measured there."""

    title: str
    minimizers: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    note: str = ""
    images: bool = False


PLAIN = ("SB", "LB")
TRAIN, TEST = Quantity("train_accuracy"), Quantity("test_accuracy")
FULL, RANDOM = (tuple(Quantity("sharpness", space, eps) for eps in paper.EPSILONS) for space in ("full", "random"))
AS_PLAIN = 'The paper has no numbers for {}, only that they are as LB\'s, which stand under "paper".'
TABLES = {
    "2": Table("Table 2: accuracy (percent)", PLAIN, (TRAIN, TEST)),
    "3": Table("Table 3: Metric 2.1 (percent) in the full space", PLAIN, FULL),
    "4": Table(f"Table 4: Metric 2.1 (percent) in random subspaces of dimension {paper.DIMENSION}", PLAIN, RANDOM),
    "6": Table(
        "Table 6: data augmentation",
        (*PLAIN, "SB augment", "LB augment"),
        (TRAIN, TEST, *FULL),
        "Sharpness is that of the training loss without augmentation. The baseline of the paper's Table 6 is \"SB "
        'augment".',
        images=True,
    ),
    "7": Table("Table 7: conservative training", (*PLAIN, "LB conservative"), (TRAIN, TEST, *FULL)),
    "robust": Table(
        "Appendix E.3: robust training",
        (*PLAIN, "LB adversarial", "LB stability", "LB sam", "LB asam"),
        (TRAIN, TEST, *FULL),
        f"{AS_PLAIN.format('adversarial and stability training')} SAM and ASAM are younger than it.",
    ),
    "optimizers": Table(
        "Section 2.2: other optimizers",
        (*PLAIN, "LB adagrad", "LB sgd", "LB adaqn"),
        (TRAIN, TEST, *FULL),
        f"{AS_PLAIN.format('these three')} SGD has momentum 0.9 and a learning rate of 0.1, with which the few steps "
        "of large batches come to an end.",
    ),
}
SETTINGS = {"sgd": "sgd:learning_rate=0.1,momentum=0.9"}  # of optimizers, where not the default


@dataclass(frozen=True, kw_only=True)
class Settings(cli.PairSettings, cli.TrialSettings):
    """The flags."""

    network: tuple[str, ...] | None = setting(
        None,
        f"{', '.join(networks.NAMES)}, or your own as file.py:name; several with commas.",
        group="What to train",
    )
    tables: tuple[str, ...] = setting(
        tuple(TABLES),
        "Which of the tables, with commas.",
        lambda names: f"tables-{'-'.join(names)}",
        choices=tuple(TABLES),
    )
    manifold: str = setting(MANIFOLDS[0], "How the random subspaces are drawn.", "{}", choices=MANIFOLDS)
    compute: bool = setting(True, "Train and measure what is missing; --nocompute only prints what is stored.")

    def check(self) -> None:
        """Raise `UserError` for flags that contradict each other."""
        super().check()
        if self.retrain and not self.compute:
            raise UserError("--nocompute prints what is stored, and --retrain replaces it; leave one of them out.")

    def resolve(self, network: Any, samples: int) -> Settings:
        """Put the tables in order, without those of images for networks of other data.

        Raises `UserError` where none is left.
        """
        images = len(network.input_shape) == 3
        asked = tuple(name for name, table in TABLES.items() if name in self.tables and (images or not table.images))
        if not asked:
            raise UserError(f"Table 6 is about images, which {network.name} does not take; choose other --tables.")
        return replace(super().resolve(network, samples), tables=asked)


@dataclass(frozen=True)
class Row:
    """A row of a table: our trials, the paper's numbers and the verdict."""

    table: str
    minimizer: str
    quantity: str
    space: str | None
    epsilon: float | None
    values: list[float | None]
    paper: paper.Spread | None
    verdict: str


def recipes(experiment: Experiment, minimizer: str) -> list[Recipe]:
    """Return the recipes of a minimizer's trials; what --remedy names goes with each."""
    settings = experiment.settings
    side, _, how = minimizer.partition(" ")
    always, method = named.split(settings.remedy) if settings.remedy else (), {}
    if how in named.REMEDIES:
        method = {"remedies": (*always, how)}
    elif how:
        method = {"optimizer": SETTINGS.get(how, how)}
    batch = settings.batches[side]
    return [experiment.recipe(batch, seed, **method) for seed in settings.seeds]


def item(experiment: Experiment, recipe: Recipe, quantity: Quantity) -> Item:
    """Return what is measured for a cell; each trial has a random subspace of its own."""
    from large_batch.measurements import EvaluationRequest, SharpnessRequest
    from large_batch.places import Place

    if quantity.name != "sharpness":
        return experiment.request(EvaluationRequest), Place(recipe)
    settings, where = experiment.settings, {"space": quantity.space}
    if quantity.space == "random":
        where |= {"dimension": paper.DIMENSION, "manifold": settings.manifold, "trial": recipe.seed}
    box = {"epsilon": quantity.epsilon, "solver": "lbfgsb", "iterations": settings.iterations}
    box["samples"] = experiment.sharpness_samples
    return experiment.request(SharpnessRequest, **box, **where), Place(recipe)


def judged(experiment: Experiment, found: dict[Item, Measured]) -> tuple[list[Row], list[Value]]:
    """Return the rows of the tables, and all values in long form."""
    from large_batch import claims

    name = experiment.network.name if experiment.batches_as_published else ""
    values: dict[tuple, list[float | None]] = {}
    rows, long = [], {}
    for minimizer, quantity in cells(experiment.settings.tables):
        trials = values[minimizer, quantity] = []
        for recipe in recipes(experiment, minimizer):
            asked = item(experiment, recipe, quantity)
            result = found[asked].result if asked in found else None
            trials.append(result and getattr(result, "value" if quantity.epsilon else quantity.name))
            place = {"space": quantity.space, "epsilon": quantity.epsilon, "trial": getattr(asked[0], "trial", None)}
            place["solver"] = getattr(asked[0], "solver", None)
            long[minimizer, quantity, recipe] = experiment.value(minimizer, recipe, quantity.name, trials[-1], **place)
    for table in experiment.settings.tables:
        for minimizer, quantity in cells([table]):
            partner, at = paper.compared_with(minimizer), (quantity.name, quantity.space, quantity.epsilon)
            comparable = "" if quantity.epsilon and experiment.sharpness_samples else name  # of part it is another
            ours, theirs = values[minimizer, quantity], paper.published(comparable, minimizer, *at)
            beside = values[partner, quantity], paper.published(comparable, partner, *at)
            rows.append(Row(table, minimizer, *at, ours, theirs, claims.agreement(ours, theirs, *beside)))
    return rows, list(long.values())


def cells(tables: Sequence[str]) -> list[tuple[str, Quantity]]:
    """Return the cells of some tables, each once."""
    chosen = [TABLES[name] for name in tables]
    return list(dict.fromkeys((m, q) for table in chosen for q in table.quantities for m in table.minimizers))


def text(experiment: Experiment, rows: list[Row]) -> str:
    """Lay out the tables."""
    from large_batch import tables

    parts = []
    for name in experiment.settings.tables:
        lines = [["minimizer", "quantity", "ours", "paper", "verdict"]]
        for row in (row for row in rows if row.table == name):
            quantity = Quantity(row.quantity, row.space, row.epsilon)
            lines.append([row.minimizer, str(quantity), tables.cell(row.values), str(row.paper or "-"), row.verdict])
        parts.append("\n".join(filter(None, [TABLES[name].title, tables.lay_out(lines), TABLES[name].note])))
    return "\n\n".join(parts)


def plan(experiment: Experiment) -> tuple[Runner, list[Item]]:
    """Return what will train and measure, and what it is asked for; raises `UserError` where that cannot be."""
    from large_batch.runner import Runner

    settings = experiment.settings
    runner = Runner(experiment.minimizers, settings)
    if "4" in settings.tables:
        check_dimension(runner.objectives.size, paper.DIMENSION)
    wanted = cells(settings.tables)
    asked = [item(experiment, recipe, quantity) for m, quantity in wanted for recipe in recipes(experiment, m)]
    return runner, list(dict.fromkeys(asked))  # train and test accuracy are one measurement


def report(experiment: Experiment, runner: Runner, asked: list[Item]) -> None:
    """Train and measure, print the tables of a network and write the numbers."""
    settings = experiment.settings
    found = runner.run([], asked, leave_diverged=True) if settings.compute else runner.stored(asked)
    if found is None:
        return
    rows, values = judged(experiment, found)
    title = experiment.title(f"The paper's tables, {settings.epochs} epochs")
    print(f"\n{title}\n\n{text(experiment, rows)}")
    if not settings.compute:
        return  # files that have more are left as they are
    told = {name: {"title": TABLES[name].title, "note": TABLES[name].note} for name in settings.tables}
    origins = experiment.origins(recipe for m, _ in cells(settings.tables) for recipe in recipes(experiment, m))
    summary = {"tables": told, "rows": rows, "minimizers": origins, "results": list(found.values())}
    experiment.write("paper_tables", values, summary, {})


def main(settings: Settings) -> None:
    """Report on each network."""
    settings.check()
    import network_zoo
    from large_batch.experiment import Experiment

    experiments, replicas = [], None
    for name in dict.fromkeys(settings.network):
        one = replace(settings, network=name)
        experiments.append(Experiment.begin(one, network_zoo.get, figures=False, replicas=replicas))
        replicas = experiments[0].minimizers.replicas
    plans = [plan(experiment) for experiment in experiments]
    for experiment, (runner, asked) in zip(experiments, plans, strict=True):
        report(replace(experiment, began=time.monotonic()), runner, asked)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
