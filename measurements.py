"""Measurements of sharpness that are kept: each is made once, and found again by everything that determines it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import runs
from metric import SCALE, Function, SharpnessResult, sharpness
from subspace import RandomSubspace


@dataclass(frozen=True)
class Measurement:
    """Everything that determines a value of Metric 2.1: the function, the minimizer, the box and the maximiser.

    `space` is "full", or "random" with the `dimension` and `manifold` of A and the `trial`, its seed.
    """

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

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        space = self.space if self.space == "full" else f"{self.manifold}{self.dimension}-t{self.trial}"
        return "-".join([self.network, self.weights_digest[:8], space, f"eps{self.epsilon:g}", self.solver])

    def subspace(self, size: int) -> RandomSubspace | None:
        """Return A for `size` weights; None in the full space."""
        return None if self.space == "full" else RandomSubspace(size, self.dimension, self.trial, self.manifold)


@dataclass(frozen=True)
class Measured:
    """A measurement, its result, and where that came from."""

    measurement: Measurement
    result: SharpnessResult
    provenance: runs.Provenance


def digest(w: np.ndarray) -> str:
    """Return what tells minimizers apart: the SHA-256 of the weights, shape (n,), in float32."""
    return hashlib.sha256(w.astype(np.float32).tobytes()).hexdigest()


def stored(run_dir: str | Path, measurement: Measurement) -> Measured | None:
    """Return the measurement if `run_dir` has it; raises `UserError` where it is damaged."""
    path = _path(run_dir, measurement)
    if not path.exists():
        return None
    with runs.reading(path, "delete it"):
        kept = json.loads(path.read_text())
        if kept["measurement"] != dataclasses.asdict(measurement):
            raise ValueError("it holds another measurement")
        return Measured(measurement, SharpnessResult(**kept["result"]), runs.Provenance(**kept["provenance"]))


def measure(
    objective: Function,
    w: np.ndarray,
    measurement: Measurement,
    subspace: RandomSubspace | None,
    run_dir: str | Path,
    origin: runs.Provenance,
    report: Callable[[str], None],
) -> Measured:
    """Make a measurement of the minimizer `w`, shape (n,), in `measurement.subspace(n)`, and keep it in `run_dir`.

    `origin` describes the process, as it was at its start.
    """
    began = time.monotonic()
    result = sharpness(
        objective,
        w,
        measurement.epsilon,
        subspace=subspace,
        solver=measurement.solver,
        iterations=measurement.iterations,
        scale=measurement.scale,
        report=report,
    )
    measured = Measured(measurement, result, origin.after(time.monotonic() - began))
    runs.write_json(_path(run_dir, measurement), measured)
    return measured


def _path(run_dir: str | Path, measurement: Measurement) -> Path:
    folder = runs.folder(Path(run_dir) / "sharpness", measurement)
    return folder.with_name(f"{folder.name}.json")
