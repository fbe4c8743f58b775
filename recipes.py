"""What determines a minimizer: a network, data, batch sizes, a length, a seed, and where the training starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import network_zoo
from errors import UserError

if TYPE_CHECKING:
    import keras

    from data_zoo import DataSet


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a minimizer: network, data, batch size, length, and the seed of start and batches.

    A training of k epochs is the beginning of every longer one, so the iterate after epoch k is the minimizer of the
    recipe with `epochs` k; with 0 epochs it is the starting point. `schedule` lists (finished epochs, batch size): from
    there on the batch size is another, in the same training. `warm_start` is the recipe at whose minimizer this
    training starts, with a fresh optimizer; by default it starts where the seed says. `architecture` is that of
    `network_zoo.Network`.
    """

    network: str
    dataset: str
    data_digest: str
    batch_size: int
    epochs: int
    seed: int
    definition: str = "repository"
    precision: str = "float32"
    learning_rate: float = 1e-3
    schedule: tuple[tuple[int, int], ...] = ()
    warm_start: Recipe | None = None
    architecture: str = ""

    def __post_init__(self):
        network_zoo.get(self.network)
        for kind, choices in (("definition", network_zoo.DEFINITIONS), ("precision", network_zoo.PRECISIONS)):
            if (chosen := getattr(self, kind)) not in choices:
                raise UserError(f"There is no {kind} '{chosen}'; choose one of {', '.join(choices)}.")
        if self.epochs < 0:
            raise UserError(f"A training needs 0 or more epochs, not {self.epochs}.")
        if min(self.batch_sizes) < 1:
            raise UserError(f"A batch needs at least 1 sample, not {min(self.batch_sizes)}.")
        if self.seed < 0:
            raise UserError(f"The seed must be 0 or greater, not {self.seed}.")
        switches = [epoch for epoch, _ in self.schedule]
        if switches != sorted(set(switches)) or min(switches, default=1) < 1:
            raise UserError(f"The epochs of a schedule must be above 0 and ascend, not {switches}.")
        if self.warm_start and any(
            getattr(self.warm_start, name) != getattr(self, name)
            for name in ("network", "definition", "architecture", "dataset", "data_digest")
        ):
            raise UserError("A training can start only at a minimizer of the same network and data.")

    @property
    def name(self) -> str:
        """What a person looks for in a listing of runs."""
        variant = [word for word in (self.definition, self.precision) if word not in ("repository", "float32")]
        batches = f"b{self.batch_size}" + (f"to{self.schedule[-1][1]}" if self.schedule else "")
        settings = [batches, f"e{self.epochs}", f"s{self.seed}"]
        if warm := self.warm_start:
            settings.append(f"from-b{warm.batch_size}-e{warm.epochs}")
        return "-".join([self.network, self.dataset, *variant, *settings])

    @property
    def batch_sizes(self) -> list[int]:
        """All batch sizes, in the order of their use."""
        return [self.batch_size, *(batch for _, batch in self.schedule)]

    def batch_size_in(self, epoch: int) -> int:
        """Return the batch size once `epoch` epochs are finished."""
        return [self.batch_size, *(batch for after, batch in self.schedule if after <= epoch)][-1]

    def iterate(self, epoch: int) -> Recipe:
        """Return the recipe of this training's iterate after `epoch` epochs."""
        return dataclasses.replace(self, epochs=epoch)

    def check(self, data: DataSet) -> Recipe:
        """Return the recipe; raise `UserError` if a batch is larger than the training set."""
        largest, samples = max(self.batch_sizes), len(data.x_train)
        if largest > samples:
            raise UserError(f"A batch of {largest:,} is larger than the training set of {samples:,} samples.")
        return self

    def build(self, data: DataSet, precision: str = "float32") -> keras.Model:
        """Return the recipe's network at the starting point of its seed."""
        return network_zoo.get(self.network).build(self.definition, data.classes, self.seed, precision)
