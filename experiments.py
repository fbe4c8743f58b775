"""What the scripts for section 3 share: their flags, names of outputs, rows, tables and reports."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

import cli
import paper
import runs
import tasks
from metric import ITERATIONS

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from claims import Claim
    from data_zoo import DataSet
    from network_zoo import Network
    from recipes import Recipe
    from replicas import Replicas
    from solutions import Solution


@dataclass(frozen=True)
class Row:
    """A row of the .csv file: a solution in numbers. `regime` is what its role in the experiment is called; losses are
    in nats, accuracies and sharpness (Metric 2.1) in percent; None where sharpness is not measured or not resolved."""

    regime: str
    batch_size: int
    epochs: int
    warm_start_epochs: int | None
    seed: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    sharpness_1e_3: float | None
    sharpness_5e_4: float | None
    distance_from_start: float

    @classmethod
    def of(cls, regime: str, solution: Solution) -> Row:
        """Return the row of a solution."""
        recipe = solution.recipe
        return cls(
            regime,
            recipe.batch_size,
            recipe.epochs,
            recipe.warm_start.epochs if recipe.warm_start else None,
            recipe.seed,
            *dataclasses.astuple(solution.evaluation.result),
            *([found.result.value for found in solution.sharpness] or (None, None)),
            distance_from_start=solution.distance_from_start,
        )

    def sharpness(self, epsilon: float) -> float | None:
        """Return the sharpness at one of `paper.EPSILONS`."""
        return dict(zip(paper.EPSILONS, (self.sharpness_1e_3, self.sharpness_5e_4), strict=True))[epsilon]


def sharpness(rows: Sequence[Row], epsilon: float) -> np.ndarray:
    """Return the sharpness of the rows, shape (k,), NaN where it is not measured or not resolved."""
    return np.array([row.sharpness(epsilon) for row in rows], float)


@dataclass(frozen=True)
class Summary:
    """What the .json file holds; sharpness is taken over the first `sharpness_samples` training samples."""

    network: str
    dataset: str
    definition: str
    sharpness_samples: int
    claims: list[Claim]
    solutions: list[Solution]
    data_source: str
    provenance: runs.Provenance


def define_flags(batch_sizes: bool = True) -> None:
    """Define the flags that all experiments share, but those of machines and folders, which come last."""
    cli.define_recipe_flags(batch_sizes, test_history=False)
    group = {"module_name": "Experiment"}
    flags.DEFINE_integer(
        "trials", 1, "Trainings of each kind, with seeds from --seed on.", lower_bound=1, upper_bound=10_000, **group
    )
    flags.DEFINE_integer(
        "sharpness_samples",
        None,
        "Training samples over which sharpness is measured, the first ones; default: all.",
        lower_bound=1,
        **group,
    )
    flags.DEFINE_integer(
        "iterations",
        ITERATIONS,
        "Iterations of L-BFGS-B for each sharpness.",
        lower_bound=1,
        upper_bound=10**6,
        **group,
    )


@dataclass(frozen=True)
class Experiment:
    """A command at work: what it was asked for, with which data and machines."""

    options: flags.FlagValues
    task: tasks.Task
    network: Network
    data: DataSet
    replicas: Replicas
    origin: runs.Provenance
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, options: flags.FlagValues) -> Experiment:
        """Check the flags that all experiments share, load the data and choose the devices."""
        cli.check_network(options)
        task = cli.task(options)
        import network_zoo
        import replicas

        origin = runs.provenance()
        network = network_zoo.get(options.network)
        runs.check_writable(options.figure_dir, options.result_dir, options.run_dir)
        devices = replicas.choose(options.strategy)
        return cls(options, task, network, cli.load_data(options, network), devices, origin)

    @property
    def seeds(self) -> range:
        """Of the trials."""
        return range(self.options.seed, self.options.seed + self.options.trials)

    @property
    def batch_sizes(self) -> tuple[int, int]:
        """The small and the large batch."""
        samples = len(self.data.x_train)
        return (
            self.options.small_batch or self.network.small_batch(samples),
            self.options.large_batch or self.network.large_batch(samples),
        )

    @property
    def sharpness_samples(self) -> int:
        """Number of training samples over which sharpness is measured."""
        return min(self.options.sharpness_samples or len(self.data.x_train), len(self.data.x_train))

    def recipe(self, batch_size: int, seed: int, epochs: int | None = None, **settings) -> Recipe:
        """Return a recipe with the settings that the flags name; raises `UserError` where the data are too few."""
        from recipes import Recipe

        return Recipe(
            network=self.network.name,
            dataset=self.data.name,
            data_digest=self.data.digest,
            batch_size=batch_size,
            epochs=self.options.epochs if epochs is None else epochs,
            seed=seed,
            definition=self.options.definition,
            architecture=self.network.architecture(self.options.definition),
            precision=self.options.precision,
            **settings,
        ).check(self.data)

    def solve(
        self, recipes: Sequence[Recipe], sharp: Collection[Recipe] | None = None, tested: Collection[Recipe] = ()
    ) -> dict[Recipe, Solution] | None:
        """Return the solutions of the recipes: stored, or trained and measured now, the sharpness of `sharp` only, by
        default of all. None where another process reports the results. What it costs is printed first.

        Raises `UserError` where one of `tested` was trained without a test history.
        """
        from solutions import Solver
        from training import check_tested

        options, task = self.options, self.task
        for recipe in () if options.retrain else tested:
            check_tested(recipe, options.run_dir)
        solver = Solver(
            self.data,
            options.run_dir,
            self.origin,
            sharpness_samples=self.sharpness_samples,
            iterations=options.iterations,
            retrain=options.retrain,
            replicas=self.replicas,
        )
        plan = solver.plan(recipes, sharp, task.share(list(dict.fromkeys(recipes))))
        who = f"Task {task.index} of {task.count}: " if task.count > 1 else ""
        cost = f"; the rest takes about {duration(solver.seconds(plan))} here" if plan.work else ""
        if self.replicas.chief:
            print(f"{who}{plan}{cost}.", flush=True)
        found = solver.solve(plan)
        if self.replicas.chief and task.count > 1:
            print(cli.collected_later(task, f"{len(found)} solutions", options.run_dir))
        return found if self.replicas.chief and task.count == 1 else None

    def name(self, kind: str, *settings: tuple[str, bool], batch_sizes: bool = True) -> str:
        """Return the name of the outputs: network, kind, and every setting that makes them another experiment's, which
        `settings` are if their second part says so."""
        options, samples = self.options, len(self.data.x_train)
        usual = [
            (self.data.name, self.data.name != self.network.dataset),
            (options.definition, options.definition != "repository"),
            (f"e{options.epochs}", options.epochs != cli.EPOCHS),
        ]
        if batch_sizes:
            small, large = self.batch_sizes
            usual.append((f"sb{small}", small != self.network.small_batch(samples)))
            usual.append((f"lb{large}", large != self.network.large_batch(samples)))
        last = [
            (f"s{options.seed}", options.seed != 0),
            (f"t{options.trials}", options.trials != 1),
            (options.precision, options.precision != "float32"),
            (f"n{self.sharpness_samples}", self.sharpness_samples < samples),
            (f"i{options.iterations}", options.iterations != ITERATIONS),
        ]
        words = [text for text, differs in (*usual, *settings, *last) if differs]
        return "-".join([self.network.name, kind, *map(shortened, words)])

    def title(self, what: str, sharpness: bool = True) -> str:
        """Return a heading of two lines for a figure or table, with or without sharpness in it."""
        options, part = self.options, self.sharpness_samples
        if sharpness and part < len(self.data.x_train):
            what += f", sharpness over the first {part:,} samples"
        trials = f"seed {options.seed}" if options.trials == 1 else f"{options.trials} trials"
        return f"{what}\n{self.network.name} on {self.data.name} ({options.definition} definition), {trials}"

    def report(
        self, name: str, title: str, solutions: list[Solution], rows: list[Row], claims: list[Claim], drawn: dict
    ) -> None:
        """Write numbers and figures (`drawn`, by what is added to the name), and print the table and the claims."""
        import figures

        result = Path(self.options.result_dir) / name
        summary = Summary(
            network=self.network.name,
            dataset=self.data.name,
            definition=self.options.definition,
            sharpness_samples=self.sharpness_samples,
            claims=claims,
            solutions=solutions,
            data_source=self.data.source,
            provenance=self.origin.after(time.monotonic() - self.began),
        )
        runs.write_csv(result.with_name(f"{name}.csv"), rows)
        runs.write_json(result.with_name(f"{name}.json"), summary)
        written: list[Path] = []
        for suffix, figure in drawn.items():
            written += figures.save(figure, Path(self.options.figure_dir) / f"{name}{suffix}")
        print(f"\n{title}\n{self.table(rows)}\n")
        print(*claims, sep="\n\n")
        print(f"\nFigures: {', '.join(map(str, written))}; numbers: {result}.csv, {result}.json")

    def table(self, rows: list[Row]) -> str:
        """Lay out the rows, trials as mean ± sample deviation, beside Tables 2 and 3 where they apply."""
        header = ["", "batch", "epochs", "from SB epoch", "train loss", "train %", "test %"]
        header += [f"sharpness {epsilon:g}" for epsilon in paper.EPSILONS]
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            groups.setdefault((row.regime, row.batch_size, row.epochs, row.warm_start_epochs), []).append(row)
        lines = [[*header, "distance", "paper test %", *(f"paper {epsilon:g}" for epsilon in paper.EPSILONS)]]
        last = max(row.epochs for row in rows)
        for (regime, batch, epochs, warm), same in groups.items():
            numbers = ["train_loss", "train_accuracy", "test_accuracy", "sharpness_1e_3", "sharpness_5e_4"]
            cells = [spread([getattr(row, number) for row in same]) for number in [*numbers, "distance_from_start"]]
            place = [regime, str(batch), str(epochs), "-" if warm is None else str(warm)]
            lines.append([*place, *cells, *self._published(regime if epochs == last else "", batch)])
        used = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
        return cli.table([list(line) for line in zip(*used, strict=True)])

    def _published(self, regime: str, batch: int) -> list[str]:
        """Return Table 2's test accuracy and Table 3's sharpness of the paper's SB or LB minimizer, as cells."""
        samples, name = len(self.data.x_train), self.network.name
        usual = {"SB": self.network.small_batch(samples), "LB": self.network.large_batch(samples)}
        if self.data.name != self.network.dataset or usual.get(regime) != batch:
            return ["-"] * (1 + len(paper.EPSILONS))
        side = "small" if regime == "SB" else "large"
        values = [getattr(paper.TABLE_2[name], f"test_{side}")]
        return [str(value) for value in (*values, *(getattr(paper.TABLE_3[name, eps], side) for eps in paper.EPSILONS))]


def shortened(text: str) -> str:
    """Return a part of a file's name, the end of a long one replaced by its digest."""
    return text if len(text) <= 60 else f"{text[:50]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± sample deviation as a cell, and of how many if not of all."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):.4g}" + (f" ± {np.std(known, ddof=1):.2g}" if len(known) > 1 else "")
    return mean if len(known) == len(values) else f"{mean} ({len(known)} of {len(values)})"


def duration(seconds: float) -> str:
    """Say how long something takes, roughly."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
