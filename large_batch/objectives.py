"""The losses of a network over training and test set, with the state that belongs to a minimizer; and what is asked of
them, a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from large_batch import distribution, files, layers, memory, statistics
from large_batch.backend import keras, tf
from large_batch.datasets import DataSet
from large_batch.distribution import Replicas
from large_batch.errors import UserError
from large_batch.functions import Function, Point
from large_batch.gradients import KeptGradients
from large_batch.layers import pixels
from large_batch.models import read_weights
from large_batch.networks import STATISTICS, Network, Problem
from large_batch.objective import CHUNK, CHUNK_BYTES, Evaluation, Objective
from large_batch.progress import Report
from large_batch.statistics import Estimator
from large_batch.subspace import RandomSubspace


def preparation(data: DataSet) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return what a network receives of the samples of a data set: scaled pixels, or windows of frames."""
    return data.frames.splice if data.frames else pixels


class Recalibrated:
    """The loss of a set of samples with statistics that are estimated over the training set at each point.

    The gradient is that of the loss with the statistics of the batch, and goes through these: where chunks are large
    the two functions are nearly the same.
    """

    def __init__(self, own: Objective, of_batch: Objective, estimator: Estimator):
        """Take the objectives of the samples with given statistics and with those of the batch."""
        self._own, self._of_batch, self._estimator = own, of_batch, estimator
        self.samples = own.samples
        self.hessian_vector_product = of_batch.hessian_vector_product

    def evaluate(self, w: np.ndarray) -> Evaluation:
        """Return loss, clipped loss and accuracy at w."""
        return self._own.evaluate(Point(w, self._estimator.state(w)))

    def value(self, w: np.ndarray) -> float:
        """Return the loss at w."""
        return self.evaluate(w).loss

    def value_and_gradient(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss at w, and the gradient of that with the statistics of the batch."""
        return self.value(w), self._of_batch.value_and_gradient(w)[1]


class Objectives:
    """The losses of a network over one data set, each made when it is first asked for."""

    def __init__(self, network: Network, data: DataSet, definition: str, replicas: Replicas):
        self._network, self._data, self._replicas = network, data, replicas
        self._model = network.build(definition, data.classes)
        self._prepare = preparation(data)
        self._statistics = STATISTICS[0]
        self._made: dict[tuple[str, str, int], Objective | Recalibrated] = {}
        self._used: set[Objective | Recalibrated] = set()
        self._subspaces: dict[tuple[int, int, str], RandomSubspace] = {}  # the last one
        self.gradients: KeptGradients | None = None  # of the measurement that is being made

    @property
    def size(self) -> int:
        """Number of trainable weights."""
        return sum(int(np.prod(variable.shape)) for variable in self._model.trainable_variables)

    def check_statistics(self, *policies: str) -> None:
        """Raise `UserError` where policies for moving averages are asked for, and the network has none."""
        if set(policies) != {STATISTICS[0]} and not self.moving:
            raise UserError(
                f"{self._network.name} has no moving averages; --statistics is for networks that have them."
            )
        if set(policies) != {STATISTICS[0]}:
            _ = self._of_batch  # made now, as it may not be possible

    def check_rescale(self, *factors: float) -> None:
        """Raise `UserError` where weights are to be rescaled, and the network has none that can be."""
        if set(factors) != {1.0}:
            state = [np.asarray(variable) for variable in self._model.non_trainable_variables]
            layers.rescaled(self._model, np.zeros(self.size), state, factor=1)

    @property
    def parts(self) -> dict[str, slice]:
        """Where each layer's weights are; see `layers.parts`."""
        return layers.parts(self._model)

    def measuring_bytes(self, samples: int | None, twice: bool, policy: str = STATISTICS[0]) -> int:
        """Return about what a gradient over the training set, or its first samples, takes of a machine's memory, with
        moving averages by a policy.

        With `twice` it is that of a Hessian-vector product, which keeps four times the layers' outputs (C1 3.9, C2
        3.5 times, measured) and recomputes nothing; raises `UserError` where the machine has not so much.
        """
        at_once = _at_once(min(samples or len(self._data.x_train), len(self._data.x_train)))
        part = -(-at_once // self._replicas.memories)
        model = self._model if policy == STATISTICS[0] else self._of_batch
        recomputing = not twice and layers.recomputes(model, part)
        needed = round((4 if twice else 1.1) * layers.kept_bytes(model, part, recomputing))
        if not layers.sees_the_batch(model):  # it is evaluated in smaller chunks then
            return min(needed, CHUNK_BYTES * (2 if twice else 1))
        if twice and needed + memory.used_bytes() > memory.total_bytes() and distribution.device() == "CPU":
            raise UserError(
                f"A Hessian-vector product over {at_once:,} samples of {self._network.name} at once takes about "
                f"{needed / 2**30:.0f} GiB, and this machine has {memory.total_bytes() / 2**30:.0f} GiB; spread "
                "it over several machines, or give fewer samples, which makes another function where they are fewer "
                f"than {CHUNK:,}."
            )
        return needed

    def read(self, path: str) -> Point:
        """Return the minimizer in a file; raises `UserError` as `read_weights` does."""
        return read_weights(self._model, path)

    @property
    def moving(self) -> bool:
        """Whether the network has moving averages."""
        return bool(statistics.normalisations(self._model))

    @cached_property
    def _of_batch(self) -> keras.Model:
        return statistics.of_the_batch(self._model)

    @cached_property
    def _estimator(self) -> Estimator:
        return Estimator(self._model, self._of_batch, self._data.x_train, CHUNK, self._prepare)

    def take_state(self, state: list[np.ndarray], policy: str = STATISTICS[0]) -> None:
        """Evaluate with these values of what is not trainable from now on, moving averages by a policy."""
        self._statistics = policy
        for variable, array in zip(self._model.non_trainable_variables, state, strict=True):
            variable.assign(array)
        if policy != STATISTICS[0]:
            others = statistics.kept(self._model, state)
            for variable, array in zip(self._of_batch.non_trainable_variables, others, strict=True):
                variable.assign(array)
        for objective in self._made.values():
            if isinstance(objective, Objective):
                objective.take_state(objective.model)

    def first_use(self, objective: Objective | Recalibrated) -> bool:
        """Say whether an objective is asked about for the first time: its Hessian-vector products are checked then, and
        not again, since that they are right depends on its layers, not on the weights."""
        new = objective not in self._used
        self._used.add(objective)
        return new

    def subspace(self, dimension: int, seed: int, manifold: str) -> RandomSubspace:
        """Return a random subspace of the weights; the last one is kept, for measurements side by side."""
        if (key := (dimension, seed, manifold)) not in self._subspaces:
            self._subspaces.clear()  # frees the last one before the next is drawn
            self._subspaces[key] = RandomSubspace(self.size, *key)
        return self._subspaces[key]

    def rescaled(self, w: np.ndarray, state: list[np.ndarray], factor: float) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return weights and state of the same function (`layers.rescaled`), the given ones for a factor of 1."""
        return (w, state) if factor == 1 else layers.rescaled(self._model, w, state, factor)

    def train(self, samples: int | None = None) -> Objective | Recalibrated:
        """Return the loss over the training set, or over its first samples."""
        return self._objective("train", self._data.x_train, self._data.y_train, samples)

    def keeping(self, objective: Objective) -> Function:
        """Return an objective whose slow gradients are kept until its measurement is whole; on several machines, which
        compute a gradient together, the objective itself."""
        return self.gradients.of(objective) if self.gradients and self._replicas.machines == 1 else objective

    def test(self, samples: int | None = None) -> Objective | Recalibrated:
        """Return the loss over the test set, or over its first samples."""
        return self._objective("test", self._data.x_test, self._data.y_test, samples)

    def _objective(self, half: str, x: np.ndarray, y: np.ndarray, samples: int | None) -> Objective | Recalibrated:
        size = min(samples or len(x), len(x))

        def made(policy: str) -> Objective | Recalibrated:
            key = policy, half, size
            if key not in self._made and policy == "recalibrate":
                self._made[key] = Recalibrated(made("interpolate"), made("batch"), self._estimator)
            elif key not in self._made:
                model = self._of_batch if policy == "batch" else self._model
                settings = {"outputs": self._network.outputs, "replicas": self._replicas, "prepare": self._prepare}
                self._made[key] = Objective(model, x[:size], y[:size], **settings)
                ours, whole = _at_once(size), _at_once(len(x))
                if half == "train" and layers.sees_the_batch(model) and ours < whole:
                    files.log.warning(
                        "Batch normalisation takes its statistics from %s samples at once here, from %s over the whole "
                        "set: that is another function. Compare only what was measured over as many samples.",
                        f"{ours:,}",
                        f"{whole:,}",
                    )
            return self._made[key]

        return made(self._statistics)


def _at_once(samples: int) -> int:
    """Return how many samples, at most, are evaluated at once, of so many."""
    return -(-samples // -(-samples // CHUNK))


@dataclass(frozen=True, kw_only=True)
class Request(Problem):
    """What can be measured: all that determines a result but the weights. `kind` is the folder that its results share.

    `weights_digest` is that of the weights, empty until they are known. With a `rescale` other than 1 it is measured
    where the weights before a normalisation are multiplied by this factor. `statistics` is the policy for moving
    averages (statistics.py), the first one where the network has none; `of_hessian` says whether Hessian-vector
    products are taken.
    """

    kind: ClassVar[str]
    result_type: ClassVar[type]
    of_hessian: ClassVar[bool] = False

    definition: str = dataclasses.field()  # without a default, so that the digests of earlier versions stay
    weights_digest: str = ""
    rescale: float = 1.0
    statistics: str = STATISTICS[0]

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        return f"{self.network}-{self.weights_digest[:8]}"

    def cost(self, train: int, test: int) -> int:
        """Return about how many samples are evaluated, for sets of so many."""

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> object:
        """Measure at the weights w, shape (n,)."""
