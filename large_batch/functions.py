"""Functions of one weight vector: what is asked of them, where they are taken, and whether they keep their word.

Whatever is measured here, an `objective.Objective` or a user's own class, is checked once, before the work: a function
that is noisy, or whose derivatives are not what they are called, gives numbers that look like any other.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from large_batch.errors import UserError

RESOLUTION = 2.0**-23  # of float32: what the loss of a sample is resolved to, in units of 1 + loss
STEPS = 10.0 ** -np.arange(2, 9)  # of differences of gradients: which of them is resolved depends on the function
log = logging.getLogger("large_batch_training")
AGREEMENT = 0.02  # relative, of two differences that are trusted


class Function(Protocol):
    """What Metric 2.1 is taken of: f(w) and its gradient, at any w of shape (n,)."""

    def value_and_gradient(self, w: np.ndarray) -> tuple[float, np.ndarray]: ...


class SmoothFunction(Function, Protocol):
    """What a curvature is taken of: also f(w) alone, and the Hessian at w times v."""

    def value(self, w: np.ndarray) -> float: ...
    def hessian_vector_product(self, w: np.ndarray, v: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Point:
    """A minimizer of a Keras model: its trainable weights, (n,), and the `state` that they go with.

    `state` holds the arrays of all other variables in Keras' order: moving statistics, frozen layers.
    """

    weights: np.ndarray
    state: list[np.ndarray]

    def hold(self, objective: SmoothFunction) -> SmoothFunction:
        """Return the objective as a function of the weights alone, always with this state."""
        return _Held(objective, self)


@dataclass(frozen=True, eq=False)
class _Held:
    objective: SmoothFunction
    point: Point

    def _at(self, w: np.ndarray) -> Point:
        return Point(w, self.point.state)

    def value(self, w: np.ndarray) -> float:
        return self.objective.value(self._at(w))

    def value_and_gradient(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        return self.objective.value_and_gradient(self._at(w))

    def hessian_vector_product(self, w: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self.objective.hessian_vector_product(self._at(w), v)

    def exact(self, w: np.ndarray) -> SmoothFunction | None:
        exact = getattr(self.objective, "exact", None)
        return exact(self._at(w)) if exact else None

    @property
    def repeats(self) -> bool:
        return getattr(self.objective, "repeats", False)


def check(function: Function, w: np.ndarray) -> tuple[float, np.ndarray]:
    """Return f(w) and its gradient, float64 of shape (n,), having checked what `function` returns.

    Raises `UserError` where the shapes or types are others, or a second evaluation gives another value: it is left out
    where the function has an attribute `repeats` that is true.
    """
    returned = function.value_and_gradient(w)
    try:
        loss, gradient = returned
    except (TypeError, ValueError) as error:
        raise UserError(f"The function's value_and_gradient(w) does not return two things: {error}.") from error
    gradient = np.asarray(gradient)
    if np.ndim(loss) != 0 or np.asarray(loss).dtype.kind not in "fiu":
        raise UserError(f"A function's value must be one real number, not {_described(loss)}.")
    if gradient.shape != w.shape or gradient.dtype.kind != "f":
        raise UserError(f"A function's gradient must be floats of the shape {w.shape}, not {_described(gradient)}.")
    loss = float(loss)
    if np.isfinite(loss) and not getattr(function, "repeats", False):
        again = float(function.value_and_gradient(w)[0])
        if not abs(again - loss) <= RESOLUTION * (1 + abs(loss)):
            raise UserError(
                f"The function's value at the minimizer is {loss:.8g} once and {again:.8g} the next time; make it "
                "deterministic: no noise, no dropout, the same samples each time."
            )
    return loss, gradient.astype(np.float64, copy=False)


def _described(value: object) -> str:
    array = np.asarray(value)
    return f"{array.dtype} of the shape {array.shape}"


def check_product(function: SmoothFunction, w: np.ndarray) -> None:
    """Raise `UserError` unless a Hessian-vector product at w is what differences of gradients say it is.

    Differences of several steps are formed in one random direction; two that agree are trusted. Where none do, as in
    float32 beside the kinks of a ReLU, a warning says that the product is not checked. An `Objective` offers `exact`:
    itself over a few samples, in float64, where a difference passes no kink.
    """
    exact = getattr(function, "exact", None)
    function = (exact(w) if exact else None) or function
    v = np.random.default_rng(0).standard_normal(len(w)) * (np.sqrt(np.mean(w**2)) or 1.0)
    product = np.asarray(function.hessian_vector_product(w, v))
    if product.shape != w.shape or product.dtype.kind != "f":
        raise UserError(f"A Hessian-vector product must be floats of the shape {w.shape}, not {_described(product)}.")
    check_finite(product)

    def slope(step: float) -> np.ndarray:
        return np.asarray(function.value_and_gradient(w + step * v)[1], np.float64)

    differences = [(slope(step) - slope(-step)) / (2 * step) for step in STEPS]
    sizes = [np.linalg.norm(difference) for difference in differences]
    if not np.any(product) and not np.any(sizes):
        return
    apart = [
        np.linalg.norm(one - other) / (max(size, np.linalg.norm(product)) or 1.0)
        for one, other, size in zip(differences, differences[1:], sizes, strict=False)
    ]
    best = int(np.nanargmin(np.where(np.isfinite(apart), apart, np.inf)))
    if not apart[best] < AGREEMENT:
        log.warning("Whether the Hessian-vector products are right cannot be checked: differences of gradients vary.")
        return
    off = np.linalg.norm(product - differences[best]) / (max(sizes[best], np.linalg.norm(product)) or 1.0)
    if not off < 0.01 + 5 * apart[best]:
        raise UserError(
            f"The Hessian-vector product is {off:.0%} away from the difference of two gradients: a layer or the loss "
            "stops a gradient (tf.stop_gradient, tf.custom_gradient), so its curvature would be wrong; replace it."
        )


def check_finite(product: np.ndarray) -> None:
    """Raise `UserError` unless a Hessian-vector product is finite."""
    if not np.isfinite(product).all():
        raise UserError(
            "A Hessian-vector product is not finite: the loss has no second derivatives here, as where a root or norm "
            "is taken of 0, or its values are too large; add a small constant in the layer that does so."
        )
