"""Kept measurements of the Hessian's spectrum at a minimizer, of the whole network or of one layer: see `spectrum`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.sparse.linalg import LinearOperator

from large_batch import hessian, spectrum
from large_batch.hessian import PASSES
from large_batch.measurements import Report, Request
from large_batch.spectrum import Density, Estimate

if TYPE_CHECKING:
    from large_batch.objectives import Objectives


@dataclass(frozen=True)
class Eigenvalues:
    """Some at one end of the spectrum, from the outermost inwards."""

    values: list[float]


@dataclass(frozen=True)
class Traces:
    """The trace by both estimates; where it is that of the whole network, `by_layer` has the value and the standard
    error of each layer's part of it by Hutchinson's estimate."""

    hutchinson: Estimate
    hutchpp: Estimate
    by_layer: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HessianRequest(Request):
    """What is measured of the Hessian over the first `samples` training samples; of its block of a `layer`, or of all.

    Each kind says its `products`, how many Hessian-vector products it takes.
    """

    samples: int
    layer: str = ""

    @property
    def words(self) -> list[str]:
        """The settings of the kind in the name."""
        return []

    @property
    def name(self) -> str:
        """What a person looks for in a listing."""
        layer = [self.layer.replace("/", ".")] if self.layer else []
        return "-".join([self.network, self.weights_digest[:8], *layer, *self.words, f"n{self.samples}"])

    def cost(self, train: int, test: int) -> int:
        """Return about how many samples are evaluated."""
        return PASSES["product"] * self.products * self.samples

    def operator(self, objectives: Objectives, w: np.ndarray, report: Report) -> LinearOperator:
        """Return the Hessian, or the layer's block of it, at the weights w, shape (n,)."""
        objective = objectives.train(self.samples)
        whole = hessian.hessian_operator(objective, w, lambda passes, note: report(passes * objective.samples, note))
        return spectrum.block(whole, objectives.parts[self.layer]) if self.layer else whole


@dataclass(frozen=True, kw_only=True)
class EigenvaluesRequest(HessianRequest):
    """The `count` eigenvalues at one `end`: "largest" or "lowest"."""

    kind: ClassVar[str] = "eigenvalues"
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

    def compute(self, objectives: Objectives, w: np.ndarray, subspace: None, report: Report) -> Eigenvalues:
        """Measure at the minimizer w, shape (n,)."""
        find = hessian.largest_eigenvalues if self.end == "largest" else hessian.lowest_eigenvalues
        return Eigenvalues(find(self.operator(objectives, w, report), self.count)[0].tolist())


@dataclass(frozen=True, kw_only=True)
class TraceRequest(HessianRequest):
    """The trace by both estimates, each with so many `products_each`."""

    kind: ClassVar[str] = "traces"
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

    def compute(self, objectives: Objectives, w: np.ndarray, subspace: None, report: Report) -> Traces:
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

    def compute(self, objectives: Objectives, w: np.ndarray, subspace: None, report: Report) -> Density:
        """Measure at the minimizer w, shape (n,)."""
        return spectrum.spectral_density(self.operator(objectives, w, report), self.probes, self.steps)


@dataclass(frozen=True)
class Effort:
    """How much is put into spectra; `request` returns a request of a kind for the problem, as `Experiment.request`."""

    samples: int
    probes: int
    steps: int
    products: int

    def density(self, request: Callable, layer: str = "") -> DensityRequest:
        """Return the request of a density."""
        return request(DensityRequest, samples=self.samples, layer=layer, probes=self.probes, steps=self.steps)

    def all(self, request: Callable, layer: str = "") -> list[HessianRequest]:
        """Return the requests of all that is measured, of the whole network or of a layer."""
        place = {"samples": self.samples, "layer": layer}
        ends = [request(EigenvaluesRequest, end=end, **place) for end in ("largest", "lowest")]
        return [*ends, request(TraceRequest, products_each=self.products, **place), self.density(request, layer)]
