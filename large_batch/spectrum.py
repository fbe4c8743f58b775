"""The whole spectrum of a symmetric matrix that is known by its products only: its density, and its trace.

What is a LinearOperator of SciPy serves: `hessian.hessian_operator` of any objective, a `block` of it, sums and
products of operators. All estimates are over random vectors of independent signs, whose number is an argument and
whose scatter gives the standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.linalg import eigh_tridiagonal, qr
from scipy.sparse.linalg import LinearOperator

from large_batch.errors import UserError

HESSIAN_MEASURES = ("eigenvalue", "trace")  # of sharpness: the largest eigenvalue, and the trace
RESOLUTION = 2.0**-23  # relative to the largest eigenvalue: what products in float32 resolve
KEPT_BYTES = 2 * 2**30  # a larger basis of Lanczos vectors is not kept
WIDTH = 0.003  # of the bell that is drawn for an eigenvalue, in units of the spectrum's


@dataclass(frozen=True)
class Estimate:
    """A mean over random vectors, and its standard error; None where there was one vector."""

    value: float
    standard_error: float | None

    @classmethod
    def of(cls, samples: np.ndarray, exact: float = 0.0) -> Estimate:
        """Return that of independent samples, shape (k,), on top of what is known exactly."""
        error = float(stats.sem(samples)) if len(samples) > 1 else None
        return cls(float(exact + np.mean(samples)), error)

    def __str__(self) -> str:
        error = self.standard_error or np.nan
        return f"{self.value:.4g}" + (f" ± {error:.2g}" if error > 1e-9 * abs(self.value) else "")


@dataclass(frozen=True)
class Density:
    """The distribution of the n eigenvalues: for each random vector, `nodes`, ascending, and `weights`, whose sum is 1.

    Each vector's nodes and weights are a Gauss quadrature of the distribution that this vector sees; their mean over
    the vectors is that of the eigenvalues.
    """

    size: int
    nodes: list[list[float]]
    weights: list[list[float]]

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest node."""
        return min(map(min, self.nodes)), max(map(max, self.nodes))

    @property
    def width(self) -> float:
        """The usual width of a bell, 0.3 % of the range."""
        low, high = self.range
        return WIDTH * (high - low) or WIDTH * (abs(high) or 1.0)

    def at(self, x: np.ndarray, width: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the density at the eigenvalues x and its standard error, shapes (k,): each node is a Gaussian bell of
        a standard deviation `width`, so that the integral is 1."""
        x, width = np.asarray(x), width or self.width

        def bells(nodes: np.ndarray) -> np.ndarray:
            return np.exp(-(((x[:, None] - nodes) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))

        return self._mean(bells)

    def above(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many of the n eigenvalues are above each x, and the standard error, shapes (k,)."""
        x = np.asarray(x)
        share, error = self._mean(lambda nodes: nodes > x[:, None])
        return self.size * share, self.size * error

    def below(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many of the n eigenvalues are below each x, and the standard error, shapes (k,)."""
        x = np.asarray(x)
        share, error = self._mean(lambda nodes: nodes < x[:, None])
        return self.size * share, self.size * error

    def _mean(self, function) -> tuple[np.ndarray, np.ndarray]:
        """Return the means over the spectrum of functions of an eigenvalue, (k, nodes) of (nodes,), with their errors;
        the errors of one vector are unknown, NaN."""
        pairs = zip(self.nodes, self.weights, strict=True)
        seen = np.array([function(np.array(nodes)) @ np.array(weights) for nodes, weights in pairs])
        error = np.std(seen, axis=0, ddof=1) / np.sqrt(len(seen)) if len(seen) > 1 else np.full(seen.shape[1], np.nan)
        return seen.mean(axis=0), error


def spectral_density(operator: LinearOperator, probes: int = 10, steps: int = 50, seed: int = 0) -> Density:
    """Return the spectral density of a symmetric operator by stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017;
    of networks, Ghorbani et al., 2019).

    With m steps the quadrature is exact for polynomials up to degree 2 m - 1, and eigenvalues that stand apart become
    nodes of their own. What is finer than about the spectrum's width divided by m is not resolved, which only more
    steps change and the standard errors do not tell. The Lanczos vectors are kept orthogonal to each other where they
    fit into 2 GiB; in a larger network a node may come twice, with its weight divided (Chen, Trogdon and Ubaru, 2021).

    Args:
        operator: Of shape (n, n).
        probes: Random vectors to begin at.
        steps: Products with the operator for each of them.
        seed: Of the vectors.

    Raises:
        UserError: For fewer than 1 probe or step.
    """
    _check(probes=probes, steps=steps)
    n = operator.shape[0]
    pairs = [_quadrature(operator, _signs(n, seed, probe) / np.sqrt(n), min(steps, n)) for probe in range(probes)]
    return Density(n, *(list(part) for part in zip(*pairs, strict=True)))


def _quadrature(operator: LinearOperator, v: np.ndarray, steps: int) -> tuple[list[float], list[float]]:
    """Return nodes and weights of the Gauss quadrature that Lanczos iterations from the unit vector v give."""
    n = len(v)
    basis = np.empty((steps, n), np.float32) if 4 * n * steps <= KEPT_BYTES else None
    diagonal, beside, before, largest = [], [0.0], np.zeros(n), 0.0
    for step in range(steps):
        u = operator.matvec(v) - beside[-1] * before
        diagonal.append(float(u @ v))
        u -= diagonal[-1] * v
        if basis is not None:
            basis[step] = v
            u -= basis[: step + 1].T @ (basis[: step + 1] @ u.astype(np.float32))
        beside.append(float(np.linalg.norm(u)))
        largest = max(largest, abs(diagonal[-1]) + beside[-1])
        if beside[-1] <= RESOLUTION * largest:  # the vectors so far span all that v has a part in
            break
        before, v = v, u / beside[-1]
    nodes, vectors = eigh_tridiagonal(diagonal, beside[1 : len(diagonal)])
    return nodes.tolist(), (vectors[0] ** 2).tolist()


def hutchinson_by_part(
    operator: LinearOperator, parts: Mapping[str, slice], probes: int, seed: int = 0
) -> dict[str, Estimate]:
    """Return the traces of the diagonal blocks of several `parts` of the coordinates, from the same `probes` products.

    Raises `UserError` for fewer than 1 probe.
    """
    _check(probes=probes)
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for probe in range(probes):
        v = _signs(operator.shape[0], seed, probe)
        product = operator.matvec(v)
        for name, part in parts.items():
            samples[name].append(v[part] @ product[part])
    return {name: Estimate.of(np.array(values)) for name, values in samples.items()}


def hutchpp(operator: LinearOperator, products: int, seed: int = 0) -> Estimate:
    """Return the trace of a symmetric operator, (n, n), by Hutch++ (Meyer, Musco, Musco and Woodruff, 2021).

    A third of the products finds the subspace of the largest eigenvalues, a third its exact part of the trace, and a
    third estimates the rest, from whose scatter the standard error is. Where few eigenvalues make up the trace this is
    far better than Hutchinson's estimate. A third of the products, as vectors of n float64, is in memory twice.

    Raises `UserError` for fewer than 3 products.
    """
    _check(least=3, products=products)
    n, third = operator.shape[0], products // 3
    sketch = np.stack([operator.matvec(_signs(n, seed, probe)) for probe in range(min(third, n))], axis=1)
    basis = qr(sketch, mode="economic", overwrite_a=True, check_finite=False)[0]
    exact = sum(float(column @ operator.matvec(column)) for column in basis.T)
    samples = []
    for probe in range(third, products - third):
        v = _signs(n, seed, probe)
        v -= basis @ (basis.T @ v)
        samples.append(v @ operator.matvec(v))
    return Estimate.of(np.array(samples), exact)


def block(operator: LinearOperator, part: slice) -> LinearOperator:
    """Return the diagonal block of a part of the coordinates of a symmetric operator (n, n), as an operator: with a
    layer's part (`layers.parts`), its own second derivatives."""
    n = operator.shape[0]
    size = len(range(*part.indices(n)))

    def multiply(v: np.ndarray) -> np.ndarray:
        whole = np.zeros(n)
        whole[part] = v.ravel()
        return operator.matvec(whole)[part]

    return LinearOperator((size, size), matvec=multiply, rmatvec=multiply, dtype=np.float64)


def _signs(n: int, seed: int, probe: int) -> np.ndarray:
    """Return the random vector of a number: independent signs, whatever the others are."""
    return np.random.default_rng([seed, probe]).choice([-1.0, 1.0], n)


def _check(least: int = 1, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise UserError(f"An estimate over random vectors needs {least} or more {name}, not {number}.")
