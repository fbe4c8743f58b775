"""What a remedy may change in the training of large batches: a batch, its loss, or the step.

A recipe names any number of remedies, applied in their order; with none it is plain training. All randomness of a
remedy comes from the key that it is given, which depends on (seed, step, place in the list) alone, so that a resumed
training repeats it exactly. Random numbers come from `layers.uniform`, which a compiled step does not change.
"""

from collections.abc import Callable
from dataclasses import dataclass

from large_batch.backend import keras, tf
from large_batch.errors import UserError

# From a batch, (m, ...) samples and (m,) labels, to the losses (m,) and logits (m, classes) of this replica's shard, at
# the weights that the model has when it is called.
Loss = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
# Takes the loss and a batch, changes the model, and returns the losses and logits before the change.
Step = Callable[[Loss, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


@dataclass(frozen=True)
class Remedy:
    """Changes nothing: each remedy overrides what it changes. Its fields are numbers, with defaults."""

    def batch(self, x: tf.Tensor, y: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the whole batch as the loss shall see it, the same on every replica."""
        return x, y

    def loss(self, loss: Loss, model: keras.Model, key: tf.Tensor) -> Loss:
        """Return the loss that the step shall minimise."""
        return loss

    def step(self, step: Step, model: keras.Model, key: tf.Tensor) -> Step:
        """Return what changes the model."""
        return step


REMEDIES: dict[str, type[Remedy]] = {}


def make(text: str) -> Remedy:
    """Return the remedy of a text, its name and settings other than the defaults: `name` or `name:setting=1,...`.

    Raises `UserError` where there is none.
    """
    name, _, settings = text.partition(":")
    if name not in REMEDIES:
        raise UserError(f"There is no remedy '{name}'; choose among {', '.join(REMEDIES) or 'none: none exists yet'}.")
    try:
        pairs = (setting.split("=") for setting in settings.split(",") if setting)
        return REMEDIES[name](**{key: float(value) for key, value in pairs})
    except (TypeError, ValueError) as error:
        raise UserError(f"The settings of the remedy '{text}' must be like {name}:setting=0.1 ({error}).") from error


def key_of(seed: int, step: tf.Tensor, place: int) -> tf.Tensor:
    """Return the key, (2,) integers, of the remedy at a place in the list, in one step of the training of a seed."""

    def fold_in(key: tf.Tensor, number: tf.Tensor | int) -> tf.Tensor:
        return tf.random.experimental.stateless_fold_in(key, number, alg="philox")

    return fold_in(fold_in(tf.constant([seed, 1], tf.int64), step), place)
