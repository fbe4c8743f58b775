"""What an objective takes of a model's outputs: a cross-entropy of class numbers, or any loss that Keras knows."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from large_batch import layers
from large_batch.backend import keras, tf
from large_batch.errors import UserError, first_line
from large_batch.layers import Outputs, call, cross_entropy
from large_batch.samples import Samples, Tree

SPLITTABLE = ("sum_over_batch_size", "mean")  # reductions of a loss whose value is the mean of those of equal parts
KERAS_1_EPSILON = 1e-7  # Keras 1 clipped the softmax to [epsilon, 1 - epsilon] before taking the logarithm


class Scores(NamedTuple):
    """What a batch's outputs are worth: losses whose sum is that over the samples; the same with Keras 1's clipped
    softmax, and a number from 0 to 1 a sample that says how much of it is right, where there are such."""

    losses: tf.Tensor
    clipped: tf.Tensor | None = None
    correct: tf.Tensor | None = None


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """The cross-entropy of class numbers, in nats: exact from logits, finite from the probabilities of a softmax."""

    model: keras.Model
    outputs: Outputs

    splits = True  # the loss of a set is the mean of those of equal parts
    shards = True  # replicas can share it

    @property
    def trainer(self) -> keras.Model:
        """The model, as Keras would evaluate it."""
        return _Compiled(self.model, keras.losses.SparseCategoricalCrossentropy(from_logits=self.outputs == "logits"))

    def labels(self, y: Tree) -> np.ndarray:
        """Return labels, (m,) or (m, 1) class numbers or one-hot rows, as int32 of shape (m,)."""
        if isinstance(y, np.ndarray) and y.dtype.kind in "biuf" and y.ndim in (1, 2) and np.isfinite(y).all():
            if y.ndim == 2 and y.shape[1] > 1 and np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all():
                return y.argmax(axis=1).astype(np.int32)
            numbers = (y[:, 0] if y.shape[1:] == (1,) else y).astype(np.int32)
            if numbers.ndim == 1 and (numbers >= 0).all() and (numbers == y.reshape(numbers.shape)).all():
                return numbers
        raise UserError(
            "The labels must be one class number (0, 1, 2 and so on) for each of the samples, or one-hot rows; for "
            "others give the Keras loss that they are for."
        )

    def check(self, outputs: Tree, few: Samples, labels: np.ndarray) -> None:
        """Raise `UserError` where the outputs for a few samples, (m, classes), are evidently not what is stated, or do
        not go with all labels."""
        shape, (lowest, highest) = getattr(outputs, "shape", ()), (labels.min(), labels.max())
        if len(shape) != 2 or shape[1] < 2 or highest >= shape[1]:
            raise UserError(
                f"The labels run from {lowest} to {highest} and the outputs for {len(few)} samples have the shape "
                f"{tuple(shape)}; the model must have an output for each of several classes, or be given a Keras "
                "loss, such as loss=keras.losses.BinaryCrossentropy() for a single one."
            )
        if few.weights is not None and getattr(few.weights, "shape", ()) != (len(few),):
            raise UserError(f"The sample weights must have the shape ({len(labels)},).")
        values = np.asarray(outputs)
        within = bool((values >= 0).all() and (values <= 1).all() and values.any())
        adds_up = within and np.allclose(values.sum(axis=1), 1, atol=1e-3)
        remedy = f"state outputs='{'softmax' if adds_up else 'logits'}', or change the model"
        if self.outputs == "softmax" and np.isfinite(values).all() and not adds_up:
            raise UserError(f"The model's outputs are not probabilities that add up to 1; {remedy}.")
        if self.outputs == "logits" and adds_up:
            raise UserError(f"The model's outputs are probabilities that add up to 1; {remedy}.")
        if self.outputs == "logits" and within:
            raise UserError("The model's outputs are all from 0 to 1, so no logits; give the Keras loss they are for.")

    def score(self, x: Tree, outputs: tf.Tensor, y: tf.Tensor, weights: tf.Tensor | None) -> Scores:
        """Return losses, clipped losses and right answers, each (m,); `model.losses` are added to the mean."""
        losses, logits = cross_entropy(outputs, y, self.outputs)
        clipped = tf.clip_by_value(losses, -np.log1p(-KERAS_1_EPSILON), -np.log(KERAS_1_EPSILON))
        correct = tf.argmax(logits, axis=1, output_type=y.dtype) == y
        if weights is not None:
            losses, clipped = (values * tf.cast(weights, values.dtype) for values in (losses, clipped))
        penalty = layers.penalty(self.model.losses, losses.dtype)
        return Scores(losses + penalty, clipped + penalty, correct)


@dataclass(eq=False)
class KerasLoss:
    """The loss that Keras takes of a model, with `model.losses`: of its own `compile`, or another, given here.

    `splits` is found by `check`: whether the loss of a set is the mean of those of its parts.
    """

    trainer: keras.Model
    loss: Any
    splits: bool = False

    shards = False

    @classmethod
    def of(cls, model: keras.Model, loss: Any = None) -> KerasLoss:
        """Take the model's own loss, or whatever `compile(loss=...)` takes; the model stays as it is."""
        if loss is None:
            return cls(model, getattr(model, "loss", None))
        try:
            return cls(_Compiled(model, loss), loss)
        except (TypeError, ValueError) as error:
            raise UserError(f"{loss!r} is no loss that Keras knows: {first_line(error)}") from error

    def labels(self, y: Tree) -> Tree:
        """Return the labels as they are."""
        return y

    def check(self, outputs: Tree, few: Samples, labels: Tree) -> None:
        """Raise `UserError` where Keras cannot take the loss of a few samples' outputs, or it is not one number."""
        x, y, weights = few.tensors()
        try:
            loss = self._mean(x, outputs, y, weights)
        except Exception as error:  # Keras raises nearly anything for labels of another shape or type
            raise UserError(f"Keras cannot take this loss of the model's outputs: {first_line(error)}") from error
        if loss.shape.rank != 0:
            raise UserError(f"The loss must be one number, not of the shape {tuple(loss.shape)}; give it a reduction.")
        reductions = {getattr(each, "reduction", SPLITTABLE[0]) for each in keras.tree.flatten(self.loss)}
        self.splits = reductions <= set(SPLITTABLE) and self._adds_up(outputs, few, float(loss))

    def _adds_up(self, outputs: Tree, few: Samples, loss: float) -> bool:
        """Say whether the loss of a few samples is the mean of those of two parts, and nothing is masked."""
        leaves = [*keras.tree.flatten(outputs), *keras.tree.flatten(self.loss)]
        if any(getattr(leaf, name, None) is not None for leaf in leaves for name in ("_keras_mask", "ignore_class")):
            return False  # though nothing may be left out of the few
        total, cut = 0.0, len(few) // 3
        for first, last in ((0, cut), (cut, len(few))) if cut else ():
            x, y, weights = few.rows(first, last).tensors()
            part = keras.tree.map_structure(lambda leaf, rows=slice(first, last): leaf[rows], outputs)
            total += float(self._mean(x, part, y, weights)) * (last - first) / len(few)
        return not cut or bool(np.isclose(total, loss, rtol=1e-5, atol=1e-6, equal_nan=True))

    def _mean(self, x: Tree, outputs: Tree, y: Tree, weights: Tree) -> tf.Tensor:
        known = inspect.signature(self.trainer.compute_loss).parameters
        more = {"training": False} if "training" in known else {}
        return self.trainer.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weights, **more)

    def score(self, x: Tree, outputs: Tree, y: Tree, weights: Tree) -> Scores:
        """Return the sum of the losses, (), and the right answers, (m,), where the loss is of classes."""
        samples = tf.shape(keras.tree.flatten(outputs)[0])[0]
        losses = tf.cast(self._mean(x, outputs, y, weights), tf.float64) * tf.cast(samples, tf.float64)
        return Scores(losses, correct=self._correct(outputs, y))

    def _correct(self, outputs: Tree, y: Tree) -> tf.Tensor | None:
        loss = keras.losses.get(self.loss) if isinstance(self.loss, str) else self.loss
        name = loss.__name__ if inspect.isfunction(loss) else type(loss).__name__
        kind = re.fullmatch(
            r"(sparsecategorical|categorical|binary)(focal)?crossentropy", name.replace("_", "").lower()
        )
        if not kind or not (tf.is_tensor(outputs) and tf.is_tensor(y)):
            return None
        if kind[1] == "binary":
            positive = tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs)) > 0.5
            right = (outputs > (0 if getattr(loss, "from_logits", False) else 0.5)) == positive
        elif kind[1] == "categorical":
            right = tf.argmax(outputs, axis=-1) == tf.argmax(y, axis=-1)
        else:
            right = tf.argmax(outputs, axis=-1) == tf.reshape(tf.cast(y, tf.int64), tf.shape(outputs)[:-1])
        right = tf.cast(right, tf.float64)
        if (mask := getattr(outputs, "_keras_mask", None)) is not None:  # the share of what is not masked
            mask = tf.cast(mask, tf.float64)[(..., *[None] * (right.shape.rank - mask.shape.rank))]
            right *= mask / tf.reduce_mean(mask)
        return tf.reduce_mean(tf.reshape(right, [tf.shape(right)[0], -1]), axis=1)


class _Compiled(keras.Model):
    """A model, compiled with a loss; the model itself is left as it is."""

    def __init__(self, model: keras.Model, loss: Any):
        super().__init__(name="compiled")
        self.model = model
        if names := getattr(model, "output_names", None):
            self.output_names = list(names)
        self.compile(loss=loss, jit_compile=False)

    def call(self, x: Tree, training: bool | None = None) -> Tree:
        return call(self.model, x)


def criterion_of(model: keras.Model, loss: Any, outputs: str | None) -> CrossEntropy | KerasLoss:
    """Return what is taken of a model's outputs: a Keras loss that is given, the cross-entropy of stated outputs, the
    model's own compiled loss, or, of a model that is not compiled, the cross-entropy of logits."""
    if loss is not None and outputs is not None:
        raise UserError("Give a Keras loss, or state what the outputs are, not both.")
    if outputs is not None and outputs not in get_args(Outputs):
        raise UserError(f"A model's outputs are {' or '.join(get_args(Outputs))}, not '{outputs}'.")
    if loss is not None or (outputs is None and getattr(model, "compiled", False)):
        return KerasLoss.of(model, loss)
    return CrossEntropy(model, outputs or "logits")
