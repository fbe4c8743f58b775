"""What determines a training: the recipe, and when it ends."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from large_batch import optimizers, remedies
from large_batch.backend import keras
from large_batch.datasets import DataSet
from large_batch.errors import UserError, no_such
from large_batch.networks import PRECISIONS, Network, Problem

PATIENCE, LEAST_GAIN = 10, 0.01  # epochs, and the relative improvement of the loss, of `converged`


@dataclass(frozen=True)
class Track:
    """What to follow: the largest eigenvalue, every so many steps, over the first `samples` training samples."""

    every: int
    samples: int = 5000  # what batch normalisation takes its statistics from in all measurements

    @classmethod
    def read(cls, text: str) -> Track:
        """Return what "eigenvalue:1000" or, with the number of samples, "eigenvalue:1000:5000" says.

        Raises `UserError` for anything else.
        """
        if not (found := re.fullmatch(r"eigenvalue:0*([1-9]\d{0,8})(?::0*([1-9]\d{0,8}))?", text)):
            raise UserError(
                f"What to follow must be like eigenvalue:1000, or eigenvalue:1000:{cls.samples} with a number of "
                f"samples, not '{text[:40]}'."
            )
        return cls(*(int(number) for number in found.groups() if number))


@dataclass(frozen=True, kw_only=True)
class Recipe(Problem):
    """Everything that determines a minimizer: the problem, batch size, length, optimizer, seed of start and batches.

    A training of k epochs is the beginning of every longer one, so the iterate after epoch k is the minimizer of the
    recipe with `epochs` k; with 0 epochs it is the starting point. `schedule` lists (finished epochs, batch size): from
    there on the batch size is another, in the same training. `warm_start` is the recipe at whose minimizer this
    training starts, with a fresh optimizer; by default it starts where the seed says. `optimizer` and `remedies` are
    texts, like "sgd:momentum=0.9" (`optimizers.make`, `remedies.make`). With `until_converged` the training ends after
    fewer epochs where its loss has ceased to improve (`converged`), and so do the iterates after that. `track` says
    what is followed on the way (`Track.read`): it does not change the minimizer, but is kept with it.
    """

    retired: ClassVar[dict] = {"learning_rate": 1e-3}  # which is a setting of the optimizer now

    batch_size: int
    epochs: int
    seed: int
    precision: str = "float32"
    optimizer: str = "adam"
    schedule: tuple[tuple[int, int], ...] = ()
    warm_start: Recipe | None = None
    remedies: tuple[str, ...] = ()
    until_converged: bool = False
    track: str = ""

    def __post_init__(self):
        if self.track:
            Track.read(self.track)  # or raise
        if self.precision not in PRECISIONS:
            raise no_such("precision", self.precision, PRECISIONS)
        if self.epochs < 0:
            raise UserError(f"A training needs 0 or more epochs, not {self.epochs}.")
        if min(self.batch_sizes) < 1:
            raise UserError(f"A batch needs at least 1 sample, not {min(self.batch_sizes)}.")
        if self.seed < 0:
            raise UserError(f"The seed must be 0 or greater, not {self.seed}.")
        switches = [epoch for epoch, _ in self.schedule]
        if switches != sorted(set(switches)) or min(switches, default=1) < 1:
            raise UserError(f"The epochs of a schedule must be above 0 and ascend, not {switches}.")
        for name, value in (
            ("optimizer", optimizers.canonical(self.optimizer)),
            ("remedies", tuple(map(remedies.canonical, self.remedies))),
        ):
            object.__setattr__(self, name, value)  # so that what is the same is found under one name
        if self.warm_start and self.warm_start.problem != self.problem:
            raise UserError("A training can start only at a minimizer of the same network and data.")

    @property
    def problem(self) -> Problem:
        """What is minimised."""
        return Problem(**{part.name: getattr(self, part.name) for part in dataclasses.fields(Problem)})

    @property
    def followed(self) -> Track | None:
        """What is followed on the way, if anything."""
        return Track.read(self.track) if self.track else None

    @property
    def name(self) -> str:
        """What a person looks for in a listing of runs."""
        variant = [word for word in (self.definition, self.precision) if word not in ("repository", "float32")]
        batches = f"b{self.batch_size}" + (f"to{self.schedule[-1][1]}" if self.schedule else "")
        settings = [batches, f"e{self.epochs}", f"s{self.seed}"]
        chosen = [text for text in (self.optimizer, *self.remedies) if text != "adam"]
        settings += [*(text.partition(":")[0] for text in chosen), *["converged"] * self.until_converged]
        if warm := self.warm_start:
            settings.append(f"from-b{warm.batch_size}-e{warm.epochs}")
        if self.track:
            settings.append(self.track.replace(":", "-"))
        return "-".join([self.network, self.dataset, *variant, *settings])

    @property
    def batch_sizes(self) -> list[int]:
        """All batch sizes, in the order of their use."""
        return [self.batch_size, *(batch for _, batch in self.schedule)]

    def batch_size_in(self, epoch: int) -> int:
        """Return the batch size once `epoch` epochs are finished."""
        return [self.batch_size, *(batch for after, batch in self.schedule if after <= epoch)][-1]

    @property
    def passes(self) -> int:
        """About how many forward passes an epoch takes for each sample; a gradient counts as three."""
        return round(3 * math.prod(remedies.make(text).cost for text in self.remedies))

    @property
    def held(self) -> int:
        """How many forward passes of a batch a gradient keeps in memory."""
        return math.prod(remedies.make(text).held for text in self.remedies)

    def at_epoch(self, epoch: int) -> Recipe:
        """Return the recipe of this training's iterate after `epoch` epochs."""
        return dataclasses.replace(self, epochs=epoch)

    def ends(self, losses: Sequence[float]) -> bool:
        """Say whether a training whose epochs had these mean losses is at its end."""
        return len(losses) >= self.epochs or (self.until_converged and converged(losses))

    def checked(self, history: Sequence[Any]) -> Sequence[Any]:
        """Return the epochs of a whole training, each with a `train_loss`; raise `ValueError` where it is not whole."""
        if len(history) > self.epochs or not self.ends([row.train_loss for row in history]):
            raise ValueError(f"{len(history)} epochs in its history")
        return history

    def check(self, data: DataSet) -> Recipe:
        """Return the recipe; raise `UserError` for a batch larger than the training set, or remedies of other data."""
        for text in self.remedies:
            remedies.make(text).check(data.x_train.shape[1:])
        largest, samples = max(self.batch_sizes), len(data.x_train)
        if largest > samples:
            raise UserError(f"A batch of {largest:,} is larger than the training set of {samples:,} samples.")
        return self

    def build(self, network: Network, data: DataSet, precision: str = "float32") -> keras.Model:
        """Return the recipe's network at the starting point of its seed."""
        return network.build(self.definition, data.classes, self.seed, precision)


def converged(losses: Sequence[float]) -> bool:
    """Say whether the mean training loss of the epochs has ceased to improve.

    So it has where the least loss of the last 10 epochs is not more than a relative 1 % below the least of all before.
    The paper's trainings ran "until the loss function ceased to improve" (section 2.2), without a rule.
    """
    before, last = losses[:-PATIENCE], losses[-PATIENCE:]
    return bool(before) and min(last) >= (1 - LEAST_GAIN) * min(before)
