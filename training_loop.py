"""One training in progress: steps of ADAM over shuffled batches, from a state that can be kept and restored exactly.

Batches depend on (seed, epoch) and dropout on (seed, step, replica) alone, so the state is the variables, the number of
steps taken, and the sums of the epoch that has begun.
"""

from __future__ import annotations

import quiet_tensorflow  # noqa: F401

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np
import tensorflow as tf

import memory
import network_zoo
import runs
from objective import RECOMPUTE_BYTES, Objective, flat_weights, pixels
from optimizers import FusedAdam
from replicas import Replicas

if TYPE_CHECKING:
    from data_zoo import DataSet
    from recipes import Recipe

BLOCK = 4096  # samples trained at most between two looks at the clock and at signals
PACE = 1.0  # seconds that should not pass between them
COMPILED_BATCH = 512  # samples up to which a step without convolutions is at least 10 % faster when compiled by XLA


@dataclass(frozen=True)
class Epoch:
    """A row of the history: mean loss (nats) and accuracy (percent), training as seen while the weights moved."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float | None = None
    test_accuracy: float | None = None


class DivergedError(ArithmeticError):
    """Loss or weights are no longer finite; the message says since when."""


@dataclass
class Position:
    """How far a training is: steps taken in all, finished epochs, and the sums over the samples of the begun one."""

    steps: int = 0
    history: list[Epoch] = field(default_factory=list)
    loss: float = 0.0
    correct: float = 0.0
    seen: int = 0
    wall_seconds: float = 0.0
    origins: list[runs.Provenance] = field(default_factory=list)

    @classmethod
    def read(cls, text: str) -> Position:
        """Return the position that `str` wrote."""
        content = json.loads(text)
        content["history"] = [Epoch(**row) for row in content["history"]]
        content["origins"] = [runs.Provenance(**origin) for origin in content["origins"]]
        return cls(**content)

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class TrainingLoop:
    """A recipe's training, from its start or from a kept state on, over any number of replicas."""

    def __init__(self, recipe: Recipe, data: DataSet, replicas: Replicas):
        self.recipe, self.data, self.replicas = recipe, data, replicas
        self.position = Position()
        with replicas.strategy.scope():
            self.model = recipe.build(data, recipe.precision)
            self.optimizer = FusedAdam(recipe.learning_rate, epsilon=1e-8)  # Keras 1's epsilon
            self.optimizer.build(self.model.trainable_variables)
        self.x = tf.constant(data.x_train)
        self.y = tf.constant(data.y_train.astype(np.int32))
        self._recomputing = recomputes(self.model, max(recipe.batch_sizes), replicas)
        convolves = any(isinstance(layer, keras.layers.Conv2D) for layer in self.model.layers)
        self._compilable = replicas.count == 1 and not convolves and not self._recomputing
        self._compiled_step = tf.function(self._step, jit_compile=True, autograph=False)
        self._order = (-1, tf.zeros(0, tf.int32))  # of which epoch, and which
        self._block = 1

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.position.history)

    @property
    def between_epochs(self) -> bool:
        """Say whether no epoch has begun that is not finished."""
        return self.position.seen == 0

    def where(self) -> str:
        """Say how far the training is, and how well it does."""
        at = self.position
        if not at.seen:
            return f"after epoch {self.epoch}"
        return f"epoch {self.epoch + 1}/{self.recipe.epochs} loss {at.loss / at.seen:.4f} {at.correct / at.seen:.2%}"

    def advance(self, stop: bool) -> tuple[int, bool]:
        """Take a few steps of the present epoch; return the samples trained, and whether any machine wants to stop.

        Raises `DivergedError`.
        """
        began, at = time.monotonic(), self.position
        samples, batch = len(self.data.x_train), self.recipe.batch_size_in(self.epoch)
        step, steps = at.seen // batch, -(-samples // batch)
        count = min(self._block, steps - step)
        if self._order[0] != self.epoch:
            order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(samples)
            self._order = self.epoch, tf.constant(order.astype(np.int32))
        numbers = (tf.constant(number, tf.int64) for number in (batch, step, count, at.steps))
        compiled = self._compilable and batch <= COMPILED_BATCH
        sums = self._steps(self._order[1], *numbers, tf.constant(float(stop)), compiled).numpy()
        if not (finite := np.isfinite(sums).all(axis=1)).all():
            raise DivergedError(f"in epoch {self.epoch + 1}, step {step + int(np.argmin(finite)) + 1}")
        for loss, correct, _ in sums.tolist():  # one by one, so that they do not depend on the block
            at.loss, at.correct = at.loss + loss, at.correct + correct
        done = min(samples, (step + count) * batch) - step * batch
        at.steps, at.seen = at.steps + count, at.seen + done
        at.wall_seconds += time.monotonic() - began
        self._set_pace(count, batch, time.monotonic() - began)
        return done, bool(sums[-1, 2])

    def _set_pace(self, steps: int, batch: int, seconds: float) -> None:
        """Choose the next block; machines that go together cannot choose each by its own clock."""
        most = max(1, BLOCK // batch)
        self._block = most if self.replicas.machines > 1 else max(1, min(most, int(steps * PACE / seconds)))

    def finish_epoch(self, test: Objective | None) -> None:
        """Add the row of the epoch, all of which has been trained, to the history. Raises `DivergedError`."""
        began, at = time.monotonic(), self.position
        weights = flat_weights(self.model)
        if not np.isfinite(weights).all():
            raise DivergedError(f"in epoch {self.epoch + 1}, its last step")
        row = Epoch(self.epoch + 1, at.loss / at.seen, 100 * at.correct / at.seen)
        if test:
            result = test.evaluate(weights)
            row = dataclasses.replace(row, test_loss=result.loss, test_accuracy=result.accuracy)
        at.history.append(row)
        at.loss, at.correct, at.seen = 0.0, 0.0, 0
        at.wall_seconds += time.monotonic() - began

    @tf.function
    def _steps(self, order, batch, first, count, steps_before, stop, compiled):
        """Take `count` steps from step `first` of an epoch on, whose samples are in `order`, after `steps_before`.

        Returns (count, 3) sums: of losses, of correct answers, and of what the machines say of stopping.
        """
        step = self._compiled_step if compiled else self._step
        sums = tf.TensorArray(tf.float32, size=tf.cast(count, tf.int32), element_shape=(3,))
        for i in tf.range(count):
            network_zoo.set_dropout_step(self.model, steps_before + i)
            chosen = order[(first + i) * batch : (first + i + 1) * batch]
            # Gathered here, so that a replica's device receives a batch and not the whole data set.
            x, y = tf.gather(self.x, chosen), tf.gather(self.y, chosen)
            sums = sums.write(tf.cast(i, tf.int32), self.replicas.total(step, x, y, stop))
        return sums.stack()

    def _step(self, x, y, stop):
        """One step of one replica, on its share of a batch."""
        samples = tf.cast(tf.shape(x)[0], tf.float32)
        (x, y), weight = self.replicas.split(x, y)
        with tf.GradientTape() as tape:
            if self._recomputing:
                logits = network_zoo.call_recomputing(self.model, pixels(x))
            else:
                logits = self.model(pixels(x), training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            loss = tf.reduce_sum(losses) * weight / samples
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        correct = tf.argmax(logits, axis=1, output_type=y.dtype) == y
        return tf.stack([weight * tf.reduce_sum(losses), weight * tf.reduce_sum(tf.cast(correct, tf.float32)), stop])

    def _variables(self) -> list:
        return [*self.model.variables, *self.optimizer.variables]

    def save(self, path: Path) -> None:
        """Write the whole state."""
        arrays = {f"variable_{i:03}": variable.numpy() for i, variable in enumerate(self._variables())}
        with runs.writing(path) as temporary:
            np.savez(temporary, position=str(self.position), **arrays)

    def restore(self, path: Path) -> None:
        """Continue from a state that `save` wrote."""
        with runs.reading(path), np.load(path) as saved:
            values = [saved[name] for name in sorted(saved.files) if name != "position"]
            for variable, value in zip(self._variables(), values, strict=True):
                variable.assign(value)
            self.position = read_position(saved)


def recomputes(model: keras.Model, batch_size: int, replicas: Replicas) -> bool:
    """Say whether a step's gradient would keep so much of a batch that it is better computed again."""
    return memory.kept_bytes(model, -(-batch_size // replicas.memories)) > RECOMPUTE_BYTES


def read_position(saved) -> Position:
    """Return the position that an opened file of `TrainingLoop.save` holds."""
    return Position.read(str(saved["position"]))
