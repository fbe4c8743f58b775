"""Measurements of minimizers: each is made once, kept, and found again by everything that determines it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_type_hints

import numpy as np

from large_batch import files, store
from large_batch.distribution import Replicas
from large_batch.errors import UserError
from large_batch.gradients import KeptGradients
from large_batch.hessian import PASSES
from large_batch.objectives import Objectives, Request
from large_batch.progress import Report
from large_batch.recipes import Recipe
from large_batch.sharpness_metric import SCALE, Curvature, SharpnessResult, curvature, expected_passes, sharpness


@dataclass(frozen=True)
class Evaluated:
    """Loss (nats), the same with Keras 1's clipped softmax, and accuracy (percent), on training and test set.

    Where a loss is not finite, all three are None, and `note` says so.
    """

    train_loss: float | None
    train_clipped_loss: float | None
    train_accuracy: float | None
    test_loss: float | None
    test_clipped_loss: float | None
    test_accuracy: float | None
    note: str = ""

    @property
    def gap(self) -> float | None:
        """The generalisation gap, training less test accuracy (points)."""
        known = None not in (self.train_accuracy, self.test_accuracy)
        return self.train_accuracy - self.test_accuracy if known else None


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest(Request):
    """Loss and accuracy over both sets."""

    kind: ClassVar[str] = "points"
    result_type: ClassVar[type] = Evaluated

    def cost(self, train: int, test: int) -> int:
        """Return how many samples are evaluated."""
        return train + test

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> Evaluated:
        """Evaluate at the weights w, shape (n,)."""
        numbers, notes = [], []
        for half, objective in (("training", objectives.train()), ("test", objectives.test())):
            found = objective.evaluate(w)
            report(objective.samples, f"loss {found.loss:.4g}, accuracy {found.accuracy:.2f} %")
            if np.isfinite(found.loss):
                numbers += dataclasses.astuple(found)
            else:
                numbers += [None] * 3
                notes.append(f"loss not finite on the {half} set")
        return Evaluated(*numbers, note=", ".join(notes))


@dataclass(frozen=True, kw_only=True)
class SharpnessRequest(Request):
    """Metric 2.1, or a measure like it: the region and the maximiser.

    `epsilon` is the size of the region, which `measure` names. `space` is "full", or "random" with the `dimension` and
    `manifold` of A and the `trial`, its seed. The function is over the first `samples` training samples, or over all of
    them.
    """

    kind: ClassVar[str] = "sharpness"
    result_type: ClassVar[type] = SharpnessResult

    epsilon: float
    solver: str
    iterations: int
    space: str = "full"
    dimension: int | None = None
    manifold: str | None = None
    trial: int | None = None
    scale: float = SCALE
    samples: int | None = None
    measure: str = "keskar"

    @property
    def how(self) -> str:
        """How it is measured, with dashes."""
        space = self.space if self.space == "full" else f"{self.manifold}{self.dimension}-t{self.trial}"
        more = [f"n{self.samples}"] if self.samples else []
        more += [self.measure] if self.measure != "keskar" else []
        more += [f"x{self.rescale:g}"] if self.rescale != 1 else []
        return "-".join([space, f"eps{self.epsilon:g}", self.solver, *more])

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        return f"{super().name}-{self.how}"

    def cost(self, train: int, test: int) -> int:
        """Return about how many samples are evaluated: a gradient an iteration, now and then another."""
        return PASSES["gradient"] * (self.iterations + 2) * (self.samples or train)

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> SharpnessResult:
        """Measure at the minimizer w, shape (n,)."""
        objective, subspace = objectives.train(self.samples), None
        if self.space == "random":
            subspace = objectives.subspace(self.dimension, self.trial, self.manifold)
        return sharpness(
            objectives.keeping(objective),
            w,
            self.epsilon,
            measure=self.measure,
            subspace=subspace,
            solver=self.solver,
            iterations=self.iterations,
            scale=self.scale,
            report=lambda note: report(PASSES["gradient"] * objective.samples, f"epsilon {self.epsilon:g} {note}"),
        )


@dataclass(frozen=True, kw_only=True)
class CurvatureRequest(Request):
    """The curvature over the first `samples` training samples: the box, and A."""

    kind: ClassVar[str] = "curvature"
    result_type: ClassVar[type] = Curvature
    of_hessian: ClassVar[bool] = True
    trial: ClassVar[int] = 0  # the seed of A

    epsilon: float
    samples: int
    dimension: int
    manifold: str

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        return f"{super().name}-{self.manifold}{self.dimension}-eps{self.epsilon:g}-n{self.samples}"

    def cost(self, train: int, test: int) -> int:
        """Return about how many samples are evaluated."""
        return expected_passes(self.dimension) * self.samples

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> Curvature:
        """Measure at the minimizer w, shape (n,)."""
        objective = objectives.train(self.samples)
        subspace = objectives.subspace(self.dimension, self.trial, self.manifold)

        def passed(passes: int, note: str) -> None:
            report(passes * objective.samples, note)

        return curvature(objective, w, self.epsilon, subspace, report=passed)


@dataclass(frozen=True)
class Measured:
    """A request, its result, and where that came from."""

    measurement: Request
    result: object
    provenance: store.Provenance


@dataclass(frozen=True)
class Solution:
    """A minimizer and what was measured there.

    `minimizer` is its role: SB, LB, ...; `weights` is the digest of its weights; the distance is Euclidean, from where
    this training started; the result of `evaluation` is an `Evaluated`, of each of `sharpness` a `SharpnessResult`, one
    for each of `paper.EPSILONS`, or none.
    """

    minimizer: str
    recipe: Recipe
    training: store.Provenance
    weights: str
    distance_from_start: float
    evaluation: Measured
    sharpness: list[Measured]

    @property
    def batch_size(self) -> int:
        """Of the recipe."""
        return self.recipe.batch_size

    @property
    def epochs(self) -> int:
        """Of the recipe."""
        return self.recipe.epochs

    @property
    def warm_start_epochs(self) -> int | None:
        """Epochs of the training at whose minimizer this one started."""
        return self.recipe.warm_start.epochs if self.recipe.warm_start else None

    @property
    def train_loss(self) -> float:
        """In nats."""
        return self.evaluation.result.train_loss

    @property
    def train_accuracy(self) -> float:
        """In percent."""
        return self.evaluation.result.train_accuracy

    @property
    def test_accuracy(self) -> float:
        """In percent."""
        return self.evaluation.result.test_accuracy

    def sharpness_at(self, epsilon: float) -> float | None:
        """Return Metric 2.1 (percent); None where it is not measured or not resolved."""
        return next(
            (measured.result.value for measured in self.sharpness if measured.measurement.epsilon == epsilon), None
        )


@dataclass(frozen=True)
class Value:
    """A row of a .csv file in long form: one quantity of one minimizer.

    Losses are in nats, accuracies and sharpness (Metric 2.1) in percent; `trial` is the number of the random subspace,
    `rescale` the factor of the weights before a normalisation; empty where it does not apply or, for a value, where
    float32 does not resolve it.
    """

    network: str
    dataset: str
    minimizer: str
    batch_size: int | None
    epochs: int | None
    warm_start_epochs: int | None
    seed: int | None
    quantity: str
    space: str | None
    epsilon: float | None
    solver: str | None
    trial: int | None
    rescale: float | None
    value: float | None


def sharpness_array(solutions: Sequence[Solution], epsilon: float) -> np.ndarray:
    """Return the sharpness of each, shape (k,), NaN where it is not measured or not resolved."""
    return np.array([solution.sharpness_at(epsilon) for solution in solutions], float)


def stored(run_dir: str | Path, request: Request) -> Measured | None:
    """Return the measurement if `run_dir` has it whole; raises `UserError` where it is of another version."""
    path = _path(run_dir, request)
    kept = store.read_record(path)
    if kept is None or not store.describes(kept.get("measurement"), request):
        return None
    with store.reading(path, "move it away"):
        return Measured(
            request, _built(request.result_type, kept["result"]), _built(store.Provenance, kept["provenance"])
        )


def load_or_compute(
    run_dir: str | Path,
    request: Request,
    compute: Callable[[KeptGradients], object],
    origin: store.Provenance,
    replicas: Replicas,
    wait: bool = True,
) -> Measured:
    """Return the stored measurement, or compute its result and store it.

    Args:
        run_dir: The store.
        request: What is asked for.
        compute: Returns the result; what it keeps of slow gradients is there for the next process if this one is
            killed.
        origin: Describes the process, as it was at its start.
        replicas: The machines that look and compute together.
        wait: Wait for another process that makes this measurement, or raise `BusyError`.
    """
    path = _path(run_dir, request)
    if replicas.machines == 1 and (found := stored(run_dir, request)):  # several machines look together, below
        return found
    with replicas.lock(path, wait):
        found = stored(run_dir, request)
        if replicas.agreed(found is not None, path):
            return found
        if replicas.chief and path.exists():
            files.set_aside(path, "is damaged or holds another measurement")
        gradients, began = KeptGradients(path.with_suffix(".gradients"), origin), time.monotonic()
        try:
            result = compute(gradients)
        except UserError:  # it would be so again
            gradients.forget()
            raise
        measured = Measured(request, result, origin.after(time.monotonic() - began + gradients.seconds))
        if replicas.chief:
            store.write_record(path, measured)
            gradients.forget()
    return measured


def _path(run_dir: str | Path, request: Request) -> Path:
    folder = store.folder(Path(run_dir) / request.kind, request)
    return folder.with_name(f"{folder.name}.json")


def _built(kind: type, content: dict):
    """Return the data class, with data classes in its fields, of which `content` is the dictionary."""
    types = get_type_hints(kind)
    nested = {name: value for name, value in content.items() if dataclasses.is_dataclass(types.get(name))}
    return kind(**(content | {name: _built(types[name], value) for name, value in nested.items()}))
