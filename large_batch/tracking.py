"""The largest eigenvalue of the Hessian during a training, and where the optimizer would cease to be stable.

Gradient descent with the learning rate r follows a direction of curvature h only while h < 2 / r, and full-batch
training drives the largest eigenvalue up to about there: the edge of stability (Cohen et al., 2021, arXiv:2103.00065).
ADAM's steps are along the gradient divided by a preconditioner P, so what counts there is the largest eigenvalue of
P^-1 H, beside (2 + 2 b) / ((1 - b) r) with its momentum b: 38 / r (Cohen et al., 2022, arXiv:2207.14484).

Following a training changes nothing of it. The iterations start at a random vector of (seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from large_batch.backend import keras
from large_batch.errors import MachineError, UserError
from large_batch.hessian import hessian_operator, largest_eigenvalues
from large_batch.models import point_of
from large_batch.objective import Objective


@dataclass(frozen=True)
class Tracked:
    """What was found after so many steps, over the samples of the objective.

    `eigenvalue` is the largest of H, `edge` where gradient descent of this learning rate, or SGD with its momentum,
    ceases to be stable; `preconditioned` and `preconditioned_edge` are those of P^-1 H and of ADAM. None where the
    weights or the iterations came to nothing, and where the optimizer has no preconditioner that is known, or none yet.
    """

    step: int
    loss: float
    eigenvalue: float | None
    edge: float
    preconditioned: float | None = None
    preconditioned_edge: float | None = None


def look(
    objective: Objective, model: keras.Model, optimizer: keras.optimizers.Optimizer, step: int, seed: int = 0
) -> Tracked:
    """Return the largest eigenvalues of `objective`, (n,) weights, where the model and its optimizer are."""
    point = point_of(model)
    w = point.weights
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of Keras' LossScaleOptimizer
    rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    found = {"edge": edge(optimizer, rate)}
    if not np.isfinite(w).all():
        return Tracked(step, np.nan, None, **found)
    hessian = hessian_operator(objective, point, checked=False)
    if (p := preconditioner(optimizer)) is not None:
        if len(p) != len(w):
            raise UserError(
                f"The optimizer is for {len(p):,} weights, and {len(w):,} are trained; compile the model again after "
                "layers are frozen."
            )
        root = aslinearoperator(diags_array(p**-0.5))
        found["preconditioned"] = _largest(root @ hessian @ root, [seed, step])
        found["preconditioned_edge"] = _over((2 + 2 * optimizer.beta_1) / (1 - optimizer.beta_1), rate)
    return Tracked(step, objective.value(point), _largest(hessian, [seed, step]), **found)


def _largest(operator: LinearOperator, seed: list[int]) -> float | None:
    try:
        return float(largest_eigenvalues(operator, 1, seed)[0][0])
    except (MachineError, UserError):  # where the loss is flat, or has no second derivatives
        return None


def _steps(optimizer: keras.optimizers.Optimizer) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))  # which a MirroredStrategy has on each device


def edge(optimizer: keras.optimizers.Optimizer, rate: float) -> float:
    """Return the largest curvature at which steps of this learning rate are stable, without a preconditioner.

    With the momentum m of SGD it is (2 + 2 m) / r, with Nesterov's (2 + 2 m) / ((1 + 2 m) r) (Cohen et al., 2021); of
    other optimizers it is that of gradient descent, 2 / r. Where a schedule has come to 0, there is no edge: infinity.
    """
    momentum = float(optimizer.momentum) if isinstance(optimizer, keras.optimizers.SGD) else 0.0
    nesterov = momentum and optimizer.nesterov
    return _over((2 + 2 * momentum) / (1 + 2 * momentum * nesterov), rate)


def _over(curvature: float, rate: float) -> float:
    return curvature / rate if rate else np.inf


def preconditioner(optimizer: keras.optimizers.Optimizer) -> np.ndarray | None:
    """Return what the last step divided the moving mean of the gradient by, shape (n,), up to the learning rate.

    That of ADAM, in Keras' order of the weights, after its first step; None of others.
    """
    steps = _steps(optimizer)
    if not isinstance(optimizer, keras.optimizers.Adam) or optimizer.amsgrad or steps == 0:
        return None
    squares = np.concatenate([np.ravel(keras.ops.convert_to_numpy(v)) for v in optimizer._velocities])
    correction = (1 - optimizer.beta_1**steps) / np.sqrt(1 - optimizer.beta_2**steps)
    return correction * (np.sqrt(squares.astype(np.float64)) + optimizer.epsilon)


class TrackEigenvalue(keras.callbacks.Callback):
    """Follows the largest eigenvalue in anyone's `model.fit`: `rows` has a `Tracked` every so many steps, the first one
    before training begins.

    Args:
        objective: An `Objective` of the model that is trained, over as many samples as there is time for: a look takes
            about 20 Hessian-vector products, and with ADAM twice as many. These are not checked during training: if the
            model has layers of your own, or resizes images bilinearly (where TensorFlow stops second derivatives), try
            `hessian_operator(objective, flat_weights(model))` once, which is.
        every: Steps from one look to the next.
        seed: Of the iterations' random start.
    """

    def __init__(self, objective: Objective, every: int = 1000, seed: int = 0):
        super().__init__()
        if every < 1:
            raise UserError(f"A training can be looked at every step, or more seldom, not every {every} steps.")
        self.objective, self.every, self.seed = objective, every, seed
        self.rows: list[Tracked] = []
        self._optimizer: keras.optimizers.Optimizer | None = None  # that of the last look

    def on_train_begin(self, logs=None):
        """Look at the start, unless this goes on from a training that was followed."""
        self._look_if_due()

    def on_train_batch_end(self, batch, logs=None):
        """Look where so many steps have gone by: Keras may take several at once."""
        self._look_if_due()

    def _look_if_due(self) -> None:
        step, anew = _steps(self.model.optimizer), self.model.optimizer is not self._optimizer
        if anew or step // self.every > self.rows[-1].step // self.every:
            self.rows.append(look(self.objective, self.model, self.model.optimizer, step, self.seed))
            self._optimizer = self.model.optimizer
