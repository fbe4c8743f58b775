"""Measurements of minimizers that are kept: each is made once, and found again by everything that determines it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, get_type_hints

import numpy as np

import runs
from curvature import PASSES, Curvature, Function, Report, curvature, expected_passes
from metric import SCALE, SharpnessResult, sharpness
from subspace import RandomSubspace

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from objective import Objective
    from replicas import Replicas


class Measurement(Protocol):
    """A frozen data class of all that determines a result; `kind` is the folder that results of its type share."""

    kind: ClassVar[str]
    result_type: ClassVar[type]

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class SharpnessMeasurement:
    """Everything that determines a value of Metric 2.1: the function, the minimizer, the box and the maximiser.

    `space` is "full", or "random" with the `dimension` and `manifold` of A and the `trial`, its seed. The function is
    over the first `samples` training samples, or over all of them.
    """

    kind: ClassVar[str] = "sharpness"
    result_type: ClassVar[type] = SharpnessResult

    network: str
    definition: str
    dataset: str
    data_digest: str
    weights_digest: str
    epsilon: float
    solver: str
    iterations: int
    space: str = "full"
    dimension: int | None = None
    manifold: str | None = None
    trial: int | None = None
    scale: float = SCALE
    samples: int | None = None
    architecture: str = ""

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        space = self.space if self.space == "full" else f"{self.manifold}{self.dimension}-t{self.trial}"
        samples = [f"n{self.samples}"] if self.samples else []
        return "-".join([self.network, self.weights_digest[:8], space, f"eps{self.epsilon:g}", self.solver, *samples])

    @property
    def passes(self) -> int:
        """About how many forward passes over the data it takes: an evaluation an iteration, now and then another."""
        return PASSES["gradient"] * (self.iterations + 2)

    def subspace(self, size: int) -> RandomSubspace | None:
        """Return A for `size` weights; None in the full space."""
        return None if self.space == "full" else RandomSubspace(size, self.dimension, self.trial, self.manifold)

    def make(
        self, objective: Function, w: np.ndarray, subspace: RandomSubspace | None, report: Report
    ) -> SharpnessResult:
        """Measure at the minimizer `w`, shape (n,), with `subspace(n)`, which several measurements may share."""
        return sharpness(
            objective,
            w,
            self.epsilon,
            subspace=subspace,
            solver=self.solver,
            iterations=self.iterations,
            scale=self.scale,
            report=lambda note: report(PASSES["gradient"], note),
        )


@dataclass(frozen=True)
class Evaluated:
    """Loss (nats) and accuracy (percent) on the training and on the test set."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class EvaluationMeasurement:
    """Everything that determines loss and accuracy: the function and the weights."""

    kind: ClassVar[str] = "evaluations"
    result_type: ClassVar[type] = Evaluated

    network: str
    definition: str
    dataset: str
    data_digest: str
    weights_digest: str
    architecture: str = ""

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        return f"{self.network}-{self.weights_digest[:8]}"

    def make(self, train: Objective, test: Objective, w: np.ndarray) -> Evaluated:
        """Evaluate both objectives at the weights w, shape (n,)."""
        on_train, on_test = train.evaluate(w), test.evaluate(w)
        return Evaluated(on_train.loss, on_train.accuracy, on_test.loss, on_test.accuracy)


@dataclass(frozen=True)
class CurvatureMeasurement:
    """Everything that determines the curvature: the first `samples` training samples, the minimizer, box and A."""

    kind: ClassVar[str] = "curvature"
    result_type: ClassVar[type] = Curvature
    trial: ClassVar[int] = 0  # the seed of A

    network: str
    definition: str
    dataset: str
    data_digest: str
    weights_digest: str
    epsilon: float
    samples: int
    dimension: int
    manifold: str
    architecture: str = ""

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        subspace = f"{self.manifold}{self.dimension}"
        return "-".join([self.network, self.weights_digest[:8], subspace, f"eps{self.epsilon:g}", f"n{self.samples}"])

    @property
    def passes(self) -> int:
        """About how many forward passes over the data it takes."""
        return expected_passes(self.dimension)

    def subspace(self, size: int) -> RandomSubspace:
        """Return A for `size` weights."""
        return RandomSubspace(size, self.dimension, self.trial, self.manifold)

    def make(self, objective: Function, w: np.ndarray, subspace: RandomSubspace, report: Report) -> Curvature:
        """Measure at the minimizer `w`, shape (n,), with `subspace(n)`."""
        return curvature(objective, w, self.epsilon, subspace, report=report)


@dataclass(frozen=True)
class Measured:
    """A measurement, its result, and where that came from."""

    measurement: Measurement
    result: object
    provenance: runs.Provenance


def digest(w: np.ndarray) -> str:
    """Return what tells minimizers apart: the SHA-256 of the weights, shape (n,), in float32."""
    return hashlib.sha256(w.astype(np.float32).tobytes()).hexdigest()


def stored(run_dir: str | Path, measurement: Measurement) -> Measured | None:
    """Return the measurement if `run_dir` has it whole; raises `UserError` where it is of another version."""
    path = _path(run_dir, measurement)
    kept = runs.read_record(path)
    # What a measurement says today and did not say when it was made had its default then.
    defaults = {field.name: field.default for field in dataclasses.fields(measurement)}
    if kept is None or defaults | kept.get("measurement", {}) != dataclasses.asdict(measurement):
        return None
    with runs.reading(path, "move it away"):
        return Measured(
            measurement, _built(measurement.result_type, kept["result"]), _built(runs.Provenance, kept["provenance"])
        )


def keep(
    run_dir: str | Path,
    measurement: Measurement,
    make: Callable[[], object],
    origin: runs.Provenance,
    replicas: Replicas,
    wait: bool = True,
) -> Measured:
    """Return the stored measurement, or `make()` its result and store it.

    `origin` describes the process, as it was at its start. Raises `BusyError` where another process makes this
    measurement, unless told to `wait` for it.
    """
    path = _path(run_dir, measurement)
    if replicas.machines == 1 and (found := stored(run_dir, measurement)):  # several machines look together, below
        return found
    with replicas.lock(path, wait):
        found = stored(run_dir, measurement)
        if replicas.agreed(found is not None, path):
            return found
        if replicas.chief and path.exists():
            runs.set_aside(path, "is damaged or holds another measurement")
        began = time.monotonic()
        result = make()
        measured = Measured(measurement, result, origin.after(time.monotonic() - began))
        if replicas.chief:
            runs.write_record(path, measured)
    return measured


def _path(run_dir: str | Path, measurement: Measurement) -> Path:
    folder = runs.folder(Path(run_dir) / measurement.kind, measurement)
    return folder.with_name(f"{folder.name}.json")


def _built(kind: type, content: dict):
    """Return the data class, with data classes in its fields, of which `content` is the dictionary."""
    types = get_type_hints(kind)
    nested = {name: value for name, value in content.items() if dataclasses.is_dataclass(types.get(name))}
    return kind(**(content | {name: _built(types[name], value) for name, value in nested.items()}))
