"""The loss of a Keras model over a whole data set as a deterministic function of one flat weight vector.

Everything that needs tf.GradientTape on a full data set lives here; SciPy sees NumPy vectors only.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from large_batch import layers, store
from large_batch.backend import keras, tf
from large_batch.distribution import ALONE, Replicas
from large_batch.errors import UserError
from large_batch.layers import Outputs, cross_entropy, flat_weights, pixels
from large_batch.timit import Frames

__all__ = ["Evaluation", "Objective", "flat_weights", "read_weights", "write_weights"]

CHUNK = 5000  # samples evaluated at once, as the original does; batch statistics are those of a chunk
KERAS_1_EPSILON = 1e-7  # Keras 1 clipped the softmax to [epsilon, 1 - epsilon] before taking the logarithm


@dataclass(frozen=True)
class Evaluation:
    """Means over a data set: cross-entropy (nats), the same with Keras 1's clipped softmax, accuracy (percent)."""

    loss: float
    clipped_loss: float
    accuracy: float


class Objective:
    """Mean cross-entropy f(w) of a classifier over a data set (equation 1 of the paper).

    `w` is a float64 vector of shape (n,): the model's trainable variables, flattened and joined in Keras' order. The
    model serves as a function only: its own variables are neither read at evaluation nor changed.

    Its variables that are not trainable (moving statistics, frozen layers) take the values in `state`, a list of arrays
    in Keras' order: those that the model had when the objective was made, until others are assigned. Ordinary
    BatchNormalization thus works in inference mode, with the statistics of the minimizer that `state` belongs to.

    The value is deterministic: samples in their given order, in near-equal chunks of at most 5000, dropout off,
    computed in float32, summed in float64. Each chunk may be split over replicas, which changes no more than rounding.
    """

    def __init__(
        self,
        model: keras.Model,
        x: np.ndarray,
        y: np.ndarray,
        chunk: int = CHUNK,
        outputs: Outputs = "logits",
        replicas: Replicas = ALONE,
        frames: Frames | None = None,
    ):
        """Take a model from (m, ...) inputs to (m, classes) outputs, samples x and their labels y of shape (m,).

        `outputs` states what the model's outputs are: "logits", or the probabilities of a "softmax", of which the loss
        is finite too, but exact only as far as float32 holds a probability. Samples of type uint8 are taken as pixels
        and scaled to [0, 1], with `frames` as windows of these, which are spliced. Raises `UserError` where samples,
        labels and outputs do not fit together, or the outputs are evidently not what is stated.
        """
        self.model = model
        self.samples = len(x)
        self.outputs = outputs
        self.replicas = replicas
        self._inputs = frames.splice if frames else pixels
        self._check(x, y)
        self._recompute = layers.recomputes(model, -(-min(len(x), chunk) // replicas.count))
        self.take_state(model)
        self.shapes = [tuple(variable.shape) for variable in model.trainable_variables]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        pieces = -(-len(x) // chunk)
        self._chunks = [
            (tf.constant(xs), tf.constant(ys.astype(np.int32)))
            for xs, ys in zip(np.array_split(x, pieces), np.array_split(y, pieces), strict=True)
        ]

    def take_state(self, model: keras.Model) -> None:
        """Take over the present values of a model's variables that are not trainable."""
        self.state = [np.asarray(variable) for variable in model.non_trainable_variables]

    @property
    def size(self) -> int:
        """Number n of trainable weights."""
        return sum(self.sizes)

    def value(self, w: np.ndarray) -> float:
        """Return f(w)."""
        return self.evaluate(w).loss

    def evaluate(self, w: np.ndarray) -> Evaluation:
        """Return loss, clipped loss and accuracy at w."""
        w = self._tensor(w)
        sums = sum(self._sums(w, self.state, x, y).numpy() for x, y in self._chunks)
        loss, clipped_loss, correct = (sums / self.samples).tolist()
        return Evaluation(loss, clipped_loss, 100 * correct)

    def value_and_gradient(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        """Return f(w) and its gradient, float64 of shape (n,), in the form SciPy's minimizers take."""
        w = self._tensor(w)
        loss, gradient = 0.0, np.zeros(self.size)
        for x, y in self._chunks:
            chunk_loss, chunk_gradient = self._loss_and_gradient(w, self.state, x, y)
            loss += float(chunk_loss)
            gradient += chunk_gradient.numpy()
        return loss / self.samples, gradient / self.samples

    def hessian_vector_product(self, w: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the Hessian of f at w times v, float64 of shape (n,)."""
        w, v = self._tensor(w), self._tensor(v)
        return (
            sum(self._curvature(w, self.state, v, x, y).numpy().astype(np.float64) for x, y in self._chunks)
            / self.samples
        )

    def _tensor(self, w: np.ndarray) -> tf.Tensor:
        if np.shape(w) != (self.size,):
            raise UserError(f"The model has {self.size:,} trainable weights, the vector given has {np.size(w):,}.")
        with np.errstate(over="ignore"):  # too far is infinitely far, and makes a loss that is not finite
            return tf.constant(np.asarray(w, np.float32))

    def _check(self, x: np.ndarray, y: np.ndarray) -> None:
        """Raise `UserError` unless a few samples pass through the model as stated."""
        if self.outputs not in get_args(Outputs):
            raise UserError(f"A model's outputs are {' or '.join(get_args(Outputs))}, not '{self.outputs}'.")
        if len(x) == 0 or np.shape(y) != (len(x),):
            raise UserError(
                f"The labels must be one class number for each of the {len(x):,} samples, in the shape ({len(x)},), "
                f"not {np.shape(y)}."
            )
        if np.asarray(y).dtype.kind not in "iuf" or np.any(np.asarray(y).astype(np.int32) != y):
            raise UserError("The labels must be class numbers: 0, 1, 2 and so on.")
        if any(layer.compute_dtype not in ("float32", "float64") for layer in self.model.layers):
            raise UserError("The model must compute in float32: sharpness is finer than what half precision resolves.")
        try:
            few = np.asarray(self.model(self._inputs(tf.constant(x[:32])), training=False))
        except Exception as error:  # Keras raises nearly anything for samples of another shape or type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"The model does not take samples of the shape {np.shape(x)[1:]}: {reason}") from error
        if few.ndim != 2 or np.min(y) < 0 or np.max(y) >= few.shape[1]:
            raise UserError(
                f"The labels run from {np.min(y)} to {np.max(y)} and the outputs for {len(few)} samples have the shape "
                f"{few.shape}; the model must have an output for each class."
            )
        probabilities = bool((few >= 0).all() and np.allclose(few.sum(axis=1), 1, atol=1e-3))
        if np.isfinite(few).all() and probabilities != (self.outputs == "softmax"):
            seems, other = ("softmax", "are") if probabilities else ("logits", "are not")
            raise UserError(
                f"The model's outputs {other} probabilities that add up to 1; state outputs='{seems}', or change the "
                "model."
            )

    def _losses(self, w, state, x, y, recompute: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """Per-sample cross-entropy and logits of one chunk at the flat weights w."""
        weights = [tf.reshape(part, shape) for part, shape in zip(tf.split(w, self.sizes), self.shapes, strict=True)]
        if recompute:
            outputs = layers.call_recomputing(self.model, weights, self._inputs(x))
        else:
            outputs, _ = self.model.stateless_call(weights, state, self._inputs(x), training=False)
        return cross_entropy(outputs, y, self.outputs)

    @tf.function
    def _sums(self, w, state, x, y):
        def replica(w, x, y):
            (x, y), weight = self.replicas.shard(x, y)
            losses, logits = self._losses(w, state, x, y)
            clipped = tf.clip_by_value(losses, -np.log1p(-KERAS_1_EPSILON), -np.log(KERAS_1_EPSILON))
            correct = tf.argmax(logits, axis=1, output_type=y.dtype) == y
            sums = [tf.reduce_sum(tf.cast(values, tf.float64)) for values in (losses, clipped, correct)]
            return tf.stack(sums) * tf.cast(weight, tf.float64)

        return self.replicas.reduce_sum(replica, w, x, y)

    @tf.function
    def _loss_and_gradient(self, w, state, x, y):
        def replica(w, x, y):
            (x, y), weight = self.replicas.shard(x, y)
            with tf.GradientTape() as tape:
                tape.watch(w)
                losses, _ = self._losses(w, state, x, y, self._recompute)
                losses *= weight
            return tf.reduce_sum(tf.cast(losses, tf.float64)), tape.gradient(losses, w)

        return self.replicas.reduce_sum(replica, w, x, y)

    @tf.function
    def _curvature(self, w, state, v, x, y):
        def replica(w, v, x, y):
            (x, y), weight = self.replicas.shard(x, y)
            with tf.GradientTape() as outer:
                outer.watch(w)
                with tf.GradientTape() as inner:
                    inner.watch(w)
                    losses, _ = self._losses(w, state, x, y)
                    losses *= weight
                slope = tf.reduce_sum(inner.gradient(losses, w) * v)
            return outer.gradient(slope, w)

        return self.replicas.reduce_sum(replica, w, v, x, y)


def read_weights(model: keras.Model, path: str | Path) -> np.ndarray:
    """Load a Keras `.weights.h5` file into the model and return it as `flat_weights` does.

    Raises `UserError` where the file is missing, damaged, of another network, or not finite.
    """
    if not os.path.isfile(path):  # unlike pathlib's, false for any name that cannot be one of a file
        raise UserError(f"There is no weights file {path}.")
    if not str(path).endswith(".weights.h5"):
        raise UserError(f"{path} is not named as Keras names weights, *.weights.h5; rename it if it is such a file.")
    try:
        model.load_weights(path)
    except (OSError, RuntimeError) as error:  # HDF5 raises either
        raise UserError(
            f"{path} cannot be read as a Keras .weights.h5 file: it is damaged or of another kind."
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not hold the weights of this {model.name}; give the file of such a network."
        ) from error
    weights = flat_weights(model)
    if not np.isfinite(weights).all():
        raise UserError(f"{path} holds weights that are not finite numbers.")
    return weights


def write_weights(model: keras.Model, path: str | Path) -> None:
    """Write the model's weights as a Keras `.weights.h5` file, whole or not at all."""
    with store.writing(path) as temporary:
        store.check_space(temporary.parent, 4 * model.count_params() + 2**18)  # HDF5 may crash where a disk is full
        model.save_weights(temporary)
