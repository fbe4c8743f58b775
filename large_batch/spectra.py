"""Kept measurements of the Hessian's spectrum at a minimizer, of the whole network or of one layer: see `spectrum`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from scipy.sparse.linalg import LinearOperator

from large_batch import hessian, spectrum
from large_batch.errors import UserError
from large_batch.hessian import PASSES
from large_batch.objectives import Objectives, Request
from large_batch.progress import Report
from large_batch.spectrum import HESSIAN_MEASURES, Density, Estimate


@dataclass(frozen=True)
class Eigenvalues:
    """Some at one end of the spectrum, from the outermost inwards."""

    values: list[float]

    @property
    def value(self) -> float:
        """The outermost one."""
        return self.values[0]


@dataclass(frozen=True)
class Traces:
    """The trace by both estimates; where it is that of the whole network, `by_layer` has the value and the standard
    error of each layer's part of it by Hutchinson's estimate."""

    hutchinson: Estimate
    hutchpp: Estimate
    by_layer: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The better one."""
        return self.hutchpp.value


@dataclass(frozen=True, kw_only=True)
class HessianRequest(Request):
    """What is measured of the Hessian over the first `samples` training samples; of its block of a `layer`, or of all.

    Each kind says its `words` in the name, and its `products`, how many Hessian-vector products it takes. Those that
    are a measure of sharpness say what `measurements.SharpnessRequest` says of another one, too: the Hessian knows no
    epsilon.
    """

    of_hessian: ClassVar[bool] = True
    space: ClassVar[str] = "full"
    epsilon: ClassVar[None] = None
    dimension: ClassVar[None] = None
    trial: ClassVar[None] = None

    samples: int
    layer: str = ""

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        more = [self.layer.replace("/", ".")] if self.layer else []
        more += [f"x{self.rescale:g}"] if self.rescale != 1 else []
        return "-".join([self.network, self.weights_digest[:8], *more, *self.words, f"n{self.samples}"])

    def cost(self, train: int, test: int) -> int:
        """Return about how many samples are evaluated."""
        return PASSES["product"] * self.products * self.samples

    def operator(self, objectives: Objectives, w: np.ndarray, report: Report) -> LinearOperator:
        """Return the Hessian, or the layer's block of it, at the weights w, shape (n,)."""
        objective = objectives.train(self.samples)

        def passed(passes: int, note: str) -> None:
            report(passes * objective.samples, note)

        whole = hessian.hessian_operator(objective, w, passed, checked=objectives.first_use(objective))
        return spectrum.block(whole, objectives.parts[self.layer]) if self.layer else whole


@dataclass(frozen=True, kw_only=True)
class EigenvaluesRequest(HessianRequest):
    """The `count` eigenvalues at one `end`: "largest" or "lowest"."""

    kind: ClassVar[str] = "eigenvalues"
    measure: ClassVar[str] = "eigenvalue"
    solver: ClassVar[str] = "lanczos"
    result_type: ClassVar[type] = Eigenvalues

    end: str
    count: int = hessian.EIGENVALUES

    @property
    def words(self) -> list[str]:
        """The end and the count."""
        return [self.end, str(self.count)]

    @property
    def products(self) -> int:
        """About as many."""
        return hessian.expected_products(self.count) + (hessian.expected_products(1) if self.end == "lowest" else 0)

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> Eigenvalues:
        """Measure at the minimizer w, shape (n,)."""
        operator = self.operator(objectives, w, report)
        if (size := operator.shape[0]) <= self.count:  # a layer of so few weights: too few for Lanczos iterations
            values = np.linalg.eigvalsh(operator @ np.eye(size))  # ascending
            return Eigenvalues((values[::-1] if self.end == "largest" else values).tolist())
        find = hessian.largest_eigenvalues if self.end == "largest" else hessian.lowest_eigenvalues
        return Eigenvalues(find(operator, self.count)[0].tolist())


@dataclass(frozen=True, kw_only=True)
class TraceRequest(HessianRequest):
    """The trace by both estimates, each with so many `products_each`."""

    kind: ClassVar[str] = "traces"
    measure: ClassVar[str] = "trace"
    solver: ClassVar[str] = "hutch++"
    result_type: ClassVar[type] = Traces

    products_each: int

    @property
    def words(self) -> list[str]:
        """The number of products."""
        return [f"products{self.products_each}"]

    @property
    def products(self) -> int:
        """So many."""
        return 2 * self.products_each

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> Traces:
        """Measure at the minimizer w, shape (n,)."""
        operator = self.operator(objectives, w, report)
        parts = {} if self.layer else objectives.parts
        found = spectrum.hutchinson_by_part(operator, {"": slice(None)} | parts, self.products_each)
        by_layer = {layer: [found[layer].value, found[layer].standard_error] for layer in parts}
        return Traces(found[""], spectrum.hutchpp(operator, self.products_each), by_layer)


@dataclass(frozen=True, kw_only=True)
class DensityRequest(HessianRequest):
    """The spectral density from so many `probes`, random vectors, and Lanczos `steps` of each."""

    kind: ClassVar[str] = "densities"
    result_type: ClassVar[type] = Density

    probes: int
    steps: int

    @property
    def words(self) -> list[str]:
        """The numbers of vectors and steps."""
        return [f"probes{self.probes}", f"steps{self.steps}"]

    @property
    def products(self) -> int:
        """So many."""
        return self.probes * self.steps

    def compute(self, objectives: Objectives, w: np.ndarray, report: Report) -> Density:
        """Measure at the minimizer w, shape (n,)."""
        return spectrum.spectral_density(self.operator(objectives, w, report), self.probes, self.steps)


@dataclass(frozen=True)
class Effort:
    """How much is put into spectra: samples of the training set, vectors and steps of a density, products of a trace.

    `request` of its methods returns a request of a kind for the problem, as `Experiment.request`; `place` are settings
    of all kinds, a `layer` or a factor, `rescale`.
    """

    samples: int
    probes: int = 10
    steps: int = 50
    products: int = 60

    def density(self, request: Callable, **place) -> DensityRequest:
        """Return the request of a density."""
        return request(DensityRequest, samples=self.samples, probes=self.probes, steps=self.steps, **place)

    def measure(self, measure: str, request: Callable, **place) -> TraceRequest | EigenvaluesRequest:
        """Return the request of a measure of sharpness: "trace" or "eigenvalue"."""
        if measure == "trace":
            return request(TraceRequest, samples=self.samples, products_each=self.products, **place)
        if measure == "eigenvalue":
            return request(EigenvaluesRequest, samples=self.samples, end="largest", **place)
        raise UserError(f"Effort.measure has no request of the measure '{measure}' yet; add one there.")

    def all(self, request: Callable, **place) -> list[HessianRequest]:
        """Return the requests of both ends, the trace and the density."""
        lowest = request(EigenvaluesRequest, samples=self.samples, end="lowest", **place)
        measures = [self.measure(measure, request, **place) for measure in HESSIAN_MEASURES]
        return [*measures, lowest, self.density(request, **place)]
