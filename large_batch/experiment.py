"""An experiment at work: from a script's settings to recipes, and from what was found to its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from large_batch import datasets, distribution, figures, files, optimizers, paper, remedies, store
from large_batch.cli import RepeatedSettings, Settings
from large_batch.datasets import DataSet
from large_batch.errors import MachineError, UserError
from large_batch.evidence import Claim
from large_batch.measurements import EvaluationRequest, Measured, SharpnessRequest, Solution, Value
from large_batch.minimizers import Minimizers
from large_batch.named import split
from large_batch.networks import Network, Problem
from large_batch.objectives import Request
from large_batch.recipes import Recipe
from large_batch.training import Epoch


@dataclass(frozen=True)
class Origin:
    """Where a minimizer came from: the file that was given, or the recipe, its training, and the distance it went."""

    weights_file: str | None
    recipe: Recipe | None = None
    training: store.Provenance | None = None
    distance_from_start: float | None = None


@dataclass(frozen=True, eq=False)
class Experiment:
    """A command at work: what it was asked for, with which network, data and devices.

    `settings` have their defaults for this network and data filled in; `usual` are these defaults alone.
    """

    settings: Any
    usual: Any
    minimizers: Minimizers
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls,
        settings: Settings,
        get: Callable[[str], Network],
        figures: bool = True,
        replicas: distribution.Replicas | None = None,
    ) -> Experiment:
        """Choose the devices, load network and data, and check all that can be checked before work.

        Args:
            settings: What the command line says.
            get: Returns the network of a name, as `network_zoo.get` does.
            figures: Whether figures will be written.
            replicas: The devices, where they have been chosen before.

        Raises:
            UserError: For a data set, definition, optimizer or remedy that does not exist or fit, and folders that
                cannot be written to.
        """
        chosen = ",".join(map(remedies.canonical, split(settings.remedy))) if settings.remedy else None
        settings = dataclasses.replace(settings, optimizer=optimizers.canonical(settings.optimizer), remedy=chosen)
        replicas = replicas or distribution.choose(settings.strategy)  # before TensorFlow does anything
        origin = store.provenance(distribution.device())
        network = get(settings.network)
        if settings.definition not in network.definitions:
            raise UserError(f"There is no definition '{settings.definition}' of {network.name}.")
        folders = [settings.figure_dir] if figures else []
        folders += [settings.tensorboard] if settings.tensorboard else []
        files.check_writable(*folders, settings.result_dir, settings.run_dir)
        if not (name := settings.dataset or network.dataset):
            raise UserError(f"Name the data set of {network.name}: --dataset=my_data.npz, mnist, cifar10, ...")
        data = datasets.load_data(name, settings.data_dir).reshape_to(network.input_shape)
        samples = len(data.x_train)
        usual = type(settings)().resolve(network, samples)
        minimizers = Minimizers(network, data, settings.run_dir, replicas, origin)
        experiment = cls(settings.resolve(network, samples), usual, minimizers)
        longest = f"{experiment.name('training_curves')}-sharpness.png"  # of any script
        files.check_writable(*folders, settings.result_dir, name=longest)
        return experiment

    @property
    def network(self) -> Network:
        """What is trained."""
        return self.minimizers.network

    @property
    def data(self) -> DataSet:
        """On what, in the shape of the network's input."""
        return self.minimizers.data

    @property
    def known_data(self) -> bool:
        """Whether the name of the data says which they are."""
        kind, name = datasets.KINDS.get(self.data.name), self.settings.dataset or self.network.dataset
        return not name.endswith(".npz") or (kind is not None and kind.digest == self.data.digest)

    @property
    def as_published(self) -> bool:
        """Whether network, data and training are those of the paper's main part."""
        plain = self.settings.optimizer == self.usual.optimizer and self.settings.remedy is None
        own = self.network.own or self.network.name not in paper.TABLE_2
        return plain and not own and self.known_data and self.data.name == self.network.dataset

    @property
    def seed_spread(self) -> float | None:
        """Deviation of the test accuracy over seeds that the paper found, in points; None for what it did not train."""
        return paper.seed_spread(self.network.name) if self.as_published else None

    @property
    def sharpness_spread(self) -> float | None:
        """Deviation of the logarithm of LB's sharpness per SB's over seeds in the paper; None for what it did not
        train."""
        return paper.sharpness_spread(self.network.name) if self.as_published else None

    @property
    def batches_as_published(self) -> bool:
        """Whether data and batch sizes are the paper's."""
        names = ("small_batch", "large_batch")
        return self.as_published and all(getattr(self.settings, n) == getattr(self.usual, n) for n in names)

    @property
    def sharpness_samples(self) -> int | None:
        """How many of the training samples sharpness is measured over; None for all of them."""
        part = getattr(self.settings, "sharpness_samples", None)
        return part if part and part < len(self.data.x_train) else None

    @cached_property
    def problem(self) -> Problem:
        """What is minimised and measured."""
        definition = self.settings.definition
        architecture = self.network.architecture(definition)
        return Problem(
            network=self.network.name,
            dataset=self.data.name,
            data_digest=self.data.digest,
            definition=definition,
            architecture=architecture,
        )

    def request(self, kind: type, **settings) -> Any:
        """Return a recipe or a request of a kind for this problem."""
        return kind(**dataclasses.asdict(self.problem), **settings)

    @property
    def solution_requests(self) -> list[Request]:
        """What is measured of a solution: loss and accuracy, then sharpness at both sizes of the box."""
        box = {"solver": "lbfgsb", "iterations": self.settings.iterations, "samples": self.sharpness_samples}
        boxes = [self.request(SharpnessRequest, epsilon=epsilon, **box) for epsilon in paper.EPSILONS]
        return [self.request(EvaluationRequest), *boxes]

    def recipe(self, batch_size: int, seed: int | None = None, epochs: int | None = None, **settings) -> Recipe:
        """Return a recipe as the settings say, unless told otherwise.

        Raises `UserError` where the data are too few, or not for a remedy, and where one would be taken twice.
        """
        asked = self.settings
        usual = {
            "epochs": asked.epochs if epochs is None else epochs,
            "seed": asked.seed if seed is None else seed,
            "precision": asked.precision,
            "optimizer": asked.optimizer,
            "remedies": split(asked.remedy) if asked.remedy else (),
            "until_converged": asked.until_converged,
        }
        recipe = self.request(Recipe, batch_size=batch_size, **(usual | settings)).check(self.data)
        names = [text.partition(":")[0] for text in recipe.remedies]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"The remedy {name} would be taken twice; leave out one, as that of --remedy.")
        return recipe

    def origin_of(self, end: Recipe | str) -> Origin:
        """Return where a stored minimizer, or one in a file, came from; raises `MachineError` where it is no longer
        there."""
        if not isinstance(end, Recipe):
            return Origin(end)
        if (minimizer := self.minimizers.stored(end)) is None:
            raise MachineError(f"{end.name} is trained anew by another process; run the command again.")
        return Origin(None, end, minimizer.provenance, minimizer.distance)

    def origins(self, recipes: Iterable[Recipe]) -> list[Origin]:
        """Return where the minimizers of recipes came from, of those that are stored, each once."""
        return [self.origin_of(one) for one in dict.fromkeys(recipes) if self.minimizers.is_stored(one)]

    def history(self, recipe: Recipe) -> list[Epoch]:
        """Return the epochs of a stored training."""
        return self.minimizers.state(recipe).history

    def name(self, kind: str = "") -> str:
        """Return the name of the outputs: network, kind, and every setting that makes them another experiment's."""
        own = [self.problem.architecture] if self.network.own else []
        if self.data.name != self.network.dataset or not self.known_data:
            own.append(self.data.name if self.known_data else f"{self.data.name}-{self.data.digest[:8]}")
        words = [
            self.network.name,
            kind,
            *own,
            *(files.shortened(word, 60) for word in self.settings.words(self.usual)),
        ]
        return files.shortened("-".join(word for word in words if word), store.LONGEST_NAME)

    def title(self, what: str, sharpness: bool = True) -> str:
        """Return a heading of two lines for a figure or table, with or without sharpness in it."""
        settings, several = self.settings, isinstance(self.settings, RepeatedSettings)
        if sharpness and self.sharpness_samples:
            what += f", sharpness over the first {self.sharpness_samples:,} samples"
        seeds = f"{settings.trials} trials" if several and settings.trials > 1 else f"seed {settings.seed}"
        data = datasets.TITLES.get(self.data.name, self.data.name) if self.known_data else self.data.name
        definition = f" ({settings.definition} definition)" if len(self.network.definitions) > 1 else ""
        optimizer = "" if settings.optimizer == self.usual.optimizer else settings.optimizer
        end = "until converged" if settings.until_converged else ""
        how = "".join(f", {text}" for text in (optimizer, settings.remedy, end) if text)
        return f"{what}\n{self.network.name} on {data}{definition}, {seeds}{how}"

    def published(self, solutions: Sequence[Solution]) -> dict[tuple[str, int], list[str]]:
        """Return the cells of Tables 2 and 3 to set beside solutions that are as the paper's, by regime and epochs."""
        samples, last = len(self.data.x_train), max(solution.epochs for solution in solutions)
        usual = {"SB": self.network.small_batch(samples), "LB": self.network.large_batch(samples)}
        return {
            (one.minimizer, last): paper.solution_cells(
                self.network.name, one.minimizer, self.sharpness_samples is None
            )
            for one in solutions
            if self.as_published and usual.get(one.minimizer) == one.batch_size and one.epochs == last
        }

    def solution_values(self, solutions: Sequence[Solution]) -> list[Value]:
        """Return the rows of solutions in long form."""
        rows = []
        for solution in solutions:
            numbers = dataclasses.asdict(solution.evaluation.result)
            del numbers["note"]  # there is none
            numbers["distance_from_start"] = solution.distance_from_start
            rows += [self.value(solution.minimizer, solution.recipe, *number) for number in numbers.items()]
            rows += [self.sharpness_value(solution.minimizer, solution.recipe, one) for one in solution.sharpness]
        return rows

    def report(
        self,
        kind: str,
        text: str,
        solutions: Sequence[Solution],
        claims: Sequence[Claim],
        drawn: dict[str, Any],
        more: dict[str, list] | None = None,
    ) -> None:
        """Print the table of solutions, given as text, and what was judged; write numbers and figures as `write`."""
        print(f"\n{text}", *claims, sep="\n\n")
        summary = {"claims": claims, "solutions": solutions}
        self.write(kind, self.solution_values(solutions), summary, drawn, more)

    def value(self, minimizer: str, recipe: Recipe | None, quantity: str, number: float | None, **place) -> Value:
        """Return a row in long form, of a recipe's minimizer or a given one."""
        warm = recipe.warm_start.epochs if recipe and recipe.warm_start else None
        training = (recipe.batch_size, recipe.epochs, warm, recipe.seed) if recipe else (None,) * 4
        place = dict.fromkeys(("space", "epsilon", "solver", "trial", "rescale")) | place
        return Value(self.network.name, self.data.name, minimizer, *training, quantity, **place, value=number)

    def sharpness_value(self, minimizer: str, recipe: Recipe | None, measured: Measured) -> Value:
        """Return the row of a measurement of Metric 2.1, or of a measure like it."""
        at = measured.measurement
        place = {name: getattr(at, name) for name in ("space", "epsilon", "solver", "trial")}
        place["rescale"] = at.rescale if at.rescale != 1 else None
        of_hessian = at.measure if at.epsilon is None else None
        quantity = of_hessian or ("sharpness" if at.measure == "keskar" else f"sharpness_{at.measure}")
        return self.value(minimizer, recipe, quantity, measured.result.value, **place)

    def write(
        self,
        kind: str,
        rows: list,
        summary: dict[str, Any],
        drawn: dict[str, Any],
        more: dict[str, list] | None = None,
        others: dict[str, bytes] | None = None,
    ) -> None:
        """Write rows as .csv, a summary with all settings as .json, other files by how their names end, and figures;
        print where."""
        figure_stem, result = (
            f"{Path(folder) / self.name(kind)}" for folder in (self.settings.figure_dir, self.settings.result_dir)
        )
        of = {"network": self.network.name, "dataset": self.data.name}
        content = {"problem": self.problem, "settings": self.settings, "data_source": self.data.source, **summary}
        content["provenance"] = self.minimizers.origin.after(time.monotonic() - self.began)
        pictures, numbers = {}, {}
        for part, figure in drawn.items():
            pictures |= figures.drawn(figure, f"{figure_stem}{part}")
        for part, table in {"": rows, **(more or {})}.items():
            if table:
                table = [of | (row if isinstance(row, dict) else vars(row)) for row in table]
                numbers[f"{result}{part}.csv"] = store.csv_bytes(table)
        numbers |= {f"{result}{end}": other for end, other in (others or {}).items()}
        # All or nothing, and the .json last: who finds it finds the others.
        files.write_all({**pictures, **numbers, f"{result}.json": store.json_bytes(content)})
        shown = f"Figures: {', '.join(map(str, pictures))}; numbers" if pictures else "Numbers"
        print(f"\n{shown}: {', '.join([f'{result}.json', *numbers])}")
