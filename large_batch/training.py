"""One training: the state that it can be stopped and continued in, and its loop.

Batches depend on (seed, epoch), dropout on (seed, step, replica) and remedies on (seed, step) alone, so the state is
the variables, the number of steps taken, and the sums of the epoch that has begun.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from large_batch import distribution, files, layers, memory, optimizers, remedies, statistics, store
from large_batch.backend import keras, tf
from large_batch.datasets import DataSet
from large_batch.distribution import ALONE, Replicas
from large_batch.errors import UserError
from large_batch.layers import cross_entropy, flat_weights, pixels
from large_batch.networks import Network
from large_batch.recipes import Recipe
from large_batch.remedies import Moment

BLOCK = 4096  # samples trained at most between two looks at the clock and at signals
PACE = 1.0  # seconds that should not pass between them
WEIGHT_COPIES = 3  # in memory, besides the optimizer's: weights, gradient, and a copy on the way
COMPILED_BATCH = 512  # samples up to which a step without convolutions is about 10 % faster or more, compiled by XLA


@dataclass(frozen=True)
class Epoch:
    """A row of the history: mean loss (nats) and accuracy (percent), training as seen while the weights moved."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True)
class StepMemory:
    """What a training step of so many `samples` takes of a machine's memory: `bytes`, besides what the process has."""

    name: str
    samples: int
    bytes: int

    @classmethod
    def of(cls, recipe: Recipe, network: Network, data: DataSet, replicas: Replicas) -> StepMemory:
        """Return that of a recipe's largest batch."""
        samples = _held(recipe, replicas)
        model, optimizer = recipe.build(network, data, recipe.precision), optimizers.make(recipe.optimizer)
        kept = layers.kept_bytes(model, samples, layers.recomputes(model, samples))
        # At the end of a cycle adaQN's memories are read and changed as a whole
        copies = WEIGHT_COPIES + optimizer.kept * (4 if optimizer.cycle else 1)
        return cls(network.name, max(recipe.batch_sizes), round(1.1 * kept) + 4 * copies * model.count_params())

    @property
    def fits(self) -> bool:
        """Whether it would fit if the machine did nothing else; what a GPU has is not known."""
        return distribution.device() != "CPU" or self.bytes + memory.used_bytes() <= memory.total_bytes()

    def check(self) -> None:
        """Raise `UserError` where it cannot fit; say so where it is more than what is free now."""
        needed = f"{self.samples:,} samples of {self.name} needs about {self.bytes / 2**30:.1f} GiB"
        remedy = "spread it over several machines or halve it with --precision=bfloat16"
        if not self.fits:
            has = f"this machine has {memory.total_bytes() / 2**30:.1f} GiB"
            raise UserError(f"A training step of {needed}, and {has}; choose a smaller batch, {remedy}.")
        if self.bytes > (free := memory.free_bytes()) and distribution.device() == "CPU":
            store.log.warning(
                "A training step of %s, and %.1f GiB are free; if it fails, %s.", needed, free / 2**30, remedy
            )


class DivergedError(ArithmeticError):
    """Loss or weights are no longer finite; the message says since when."""


@dataclass
class TrainingState:
    """How far a training is: steps taken in all, finished epochs, and the sums over the samples of the begun one."""

    steps: int = 0
    history: list[Epoch] = field(default_factory=list)
    loss: float = 0.0
    correct: float = 0.0
    seen: int = 0
    wall_seconds: float = 0.0
    origins: list[store.Provenance] = field(default_factory=list)
    tracked: list[dict] = field(default_factory=list)  # rows of `tracking.Tracked`

    @classmethod
    def read(cls, saved) -> TrainingState:
        """Return the state that an opened file of `TrainingLoop.save` holds."""
        content = json.loads(str(saved["position"]))
        content["history"] = [Epoch(**row) for row in content["history"]]
        content["origins"] = [store.Provenance(**origin) for origin in content["origins"]]
        return cls(**content)

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def _held(recipe: Recipe, replicas: Replicas) -> int:
    """Return how many samples of a recipe's largest batch a memory holds at once, with what remedies add to them."""
    return recipe.held * -(-max(recipe.batch_sizes) // replicas.memories)


class TrainingLoop:
    """A recipe's training, from its start or from a kept state on, over any number of replicas."""

    def __init__(
        self,
        recipe: Recipe,
        network: Network,
        data: DataSet,
        replicas: Replicas = ALONE,
        look: Callable[[keras.Model, keras.optimizers.Optimizer, int], dict] | None = None,
    ):
        """Build the network and the optimizer; `look` returns what is followed after so many steps, where any is."""
        self.recipe, self.data, self.replicas = recipe, data, replicas
        self.outputs = network.outputs
        self.state = TrainingState()
        with replicas.strategy.scope():
            self.model = recipe.build(network, data, recipe.precision)
            if replicas.count > 1:
                for layer in statistics.normalisations(self.model):
                    layer.synchronized = True  # the statistics of the whole batch, as on one device
            self._settings = optimizers.make(recipe.optimizer)
            self.optimizer = self._settings.build()
            self.optimizer.build(self.model.trainable_variables)
        self._fresh = [float(np.ravel(variable)[0]) for variable in self.optimizer.variables]  # all elements are equal
        self._cycle = self._settings.cycle
        self._remedies = [remedies.make(text) for text in recipe.remedies]
        self.x = tf.constant(data.x_train)
        self.y = tf.constant(data.y_train.astype(np.int32))
        self.recomputing = layers.recomputes(self.model, _held(recipe, replicas))
        convolves = any(isinstance(layer, keras.layers.Conv2D) for layer in self.model._flatten_layers())
        self._compilable = replicas.count == 1 and not (convolves or self.recomputing or self._cycle)
        # The monitoring set of adaQN
        monitored = np.random.default_rng([recipe.seed, 0, 1]).permutation(len(data.x_train))[: recipe.batch_size]
        self._monitored = tf.constant(np.sort(monitored).astype(np.int32)) if self._cycle else None
        self._compiled_step = tf.function(self._step, jit_compile=True, autograph=False)
        self._order = (-1, tf.zeros(0, tf.int32))  # of which epoch, and which
        self._block = 1
        self._track, self._look = recipe.followed, look

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.state.history)

    @property
    def ended(self) -> bool:
        """Say whether the training is at its end."""
        return self.recipe.ends([row.train_loss for row in self.state.history])

    @property
    def between_epochs(self) -> bool:
        """Say whether no epoch has begun that is not finished."""
        return self.state.seen == 0

    def where(self) -> str:
        """Say how far the training is, and how well it does."""
        at = self.state
        if not at.seen:
            return f"after epoch {self.epoch}"
        return f"epoch {self.epoch + 1}/{self.recipe.epochs} loss {at.loss / at.seen:.4f} {at.correct / at.seen:.2%}"

    def advance(self, stop: bool) -> tuple[int, bool]:
        """Take a few steps of the present epoch; return the samples trained, and whether any machine wants to stop.

        Raises `DivergedError`.
        """
        self._follow()
        self.optimizer.learning_rate = self._settings.rate(self.epoch)
        began, at = time.monotonic(), self.state
        samples, batch = len(self.data.x_train), self.recipe.batch_size_in(self.epoch)
        step, steps = at.seen // batch, -(-samples // batch)
        count = min(self._block, steps - step)
        if self._track:
            count = min(count, self._track.every - at.steps % self._track.every)
        if self._order[0] != self.epoch:
            order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(samples)
            self._order = self.epoch, tf.constant(order.astype(np.int32))
        numbers = [tf.constant(number, tf.int64) for number in (batch, step, count, at.steps)]
        compiled = self._compilable and batch <= COMPILED_BATCH
        asked = self._order[1], *numbers, tf.constant(float(stop))
        try:
            sums = self._steps(*asked, compiled).numpy()
        except tf.errors.InvalidArgumentError as error:
            if not compiled or "unsupported operations" not in str(error):
                raise
            self._compilable = False  # a user's layer is none of XLA's; no step has been taken yet
            sums = self._steps(*asked, False).numpy()
        except Exception as error:  # what a remedy raises comes within an error of TensorFlow's
            if said := re.search(r"UserError: (.*)", str(error)):
                raise UserError(said[1]) from error
            raise
        if not (finite := np.isfinite(sums).all(axis=1)).all():
            raise DivergedError(f"in epoch {self.epoch + 1}, step {step + int(np.argmin(finite)) + 1}")
        for loss, correct, _ in sums.tolist():  # one by one, so that they do not depend on the block
            at.loss, at.correct = at.loss + loss, at.correct + correct
        done = min(samples, (step + count) * batch) - step * batch
        at.steps, at.seen = at.steps + count, at.seen + done
        at.wall_seconds += time.monotonic() - began
        self._set_pace(count, batch, time.monotonic() - began)
        self._follow()
        return done, bool(sums[-1, 2])

    def _follow(self) -> None:
        """Look at what is followed, where that is due and not done."""
        began, at = time.monotonic(), self.state
        due = self._track and at.steps % self._track.every == 0
        if due and at.steps not in [row["step"] for row in at.tracked[-1:]]:
            at.tracked.append(self._look(self.model, self.optimizer, at.steps))
            at.wall_seconds += time.monotonic() - began

    def _set_pace(self, steps: int, batch: int, seconds: float) -> None:
        """Choose the next block; machines that go together cannot choose each by its own clock."""
        most = max(1, BLOCK // batch)
        self._block = most if self.replicas.machines > 1 else max(1, min(most, int(steps * PACE / seconds)))

    def finish_epoch(self, evaluate: Callable[[keras.Model], tuple[float, float]] | None) -> None:
        """Add the row of the epoch, all of which has been trained, to the history. Raises `DivergedError`.

        `evaluate` returns loss and accuracy of the model on the test set.
        """
        began, at = time.monotonic(), self.state
        if not np.isfinite(flat_weights(self.model)).all():
            raise DivergedError(f"in epoch {self.epoch + 1}, its last step")
        row = Epoch(self.epoch + 1, at.loss / at.seen, 100 * at.correct / at.seen)
        if evaluate:
            loss, accuracy = evaluate(self.model)
            row = dataclasses.replace(row, test_loss=loss, test_accuracy=accuracy)
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
            layers.set_dropout_step(self.model, steps_before + i)
            chosen = order[(first + i) * batch : (first + i + 1) * batch]
            # Gathered here, so that a replica's device receives a batch and not the whole data set.
            x, y = self._samples(chosen)
            keys = [remedies.key_of(self.recipe.seed, steps_before + i, place) for place in range(len(self._remedies))]
            for remedy, key in zip(self._remedies, keys, strict=True):
                x, y = remedy.batch(x, y, key)
            of_step = self.replicas.reduce_sum(step, x, y, stop, keys)
            sums = sums.write(tf.cast(i, tf.int32), of_step)
            if self._cycle is not None and (steps_before + i + 1) % self._cycle == 0:
                self.replicas.strategy.run(self._end_cycle, self._samples(self._monitored))
        return sums.stack()

    def _samples(self, chosen):
        """Return samples, frames of speech with those beside them, and their labels."""
        x = tf.gather(self.x, chosen)
        return self.data.frames.splice(x) if self.data.frames else x, tf.gather(self.y, chosen)

    def _step(self, x, y, stop, keys):
        """One step of one replica, on its shard of a batch."""
        replicas, whole = self.replicas, tf.shape(x)[0]
        (x, y), weight = replicas.shard(x, y)
        loss, step = partial(self._loss, self._fixed()), self._update(weight, tf.cast(whole, tf.float32))
        for remedy, key in zip(self._remedies, keys, strict=True):
            now = Moment(
                self.model, key, whole, lambda tensor: replicas.shard(tensor)[0][0], replicas.total, self._restart
            )
            loss, step = remedy.loss(loss, now), remedy.step(step, now)
        losses, logits = step(loss, x, y)
        correct = tf.argmax(logits, axis=1, output_type=y.dtype) == y
        return tf.stack([weight * tf.reduce_sum(losses), weight * tf.reduce_sum(tf.cast(correct, tf.float32)), stop])

    def _loss(self, state, x, y, weights=None, training=True):
        """Losses and logits of a shard, see `remedies.Loss`; `state` goes with `weights` that are not the model's."""
        x = pixels(x)
        if self.recomputing:
            weights = weights or [tf.convert_to_tensor(variable) for variable in self.model.trainable_variables]
            outputs, penalties = layers.call_recomputing(self.model, weights, x, training), []
        elif weights is None:
            state[:] = self._fixed()  # for the calls at other weights that follow: their masks shall be the same
            outputs, penalties = self.model(x, training=training), self.model.losses
        else:
            outputs, _, penalties = self.model.stateless_call(weights, state, x, training=training, return_losses=True)
        losses, logits = cross_entropy(outputs, y, self.outputs)
        return losses + layers.penalty(penalties, losses.dtype), logits

    def _fixed(self) -> list[tf.Tensor]:
        """Return the values of what is not trained."""
        return [tf.convert_to_tensor(variable) for variable in self.model.non_trainable_variables]

    def _update(self, weight, samples) -> remedies.Step:
        """Return the plain step: one of the optimizer along the gradient of the whole batch's mean loss."""

        def step(loss, x, y):
            with tf.GradientTape() as tape:
                losses, logits = loss(x, y)
                mean = tf.reduce_sum(losses) * weight / samples
            gradients = tape.gradient(mean, self.model.trainable_variables)
            # Those of embeddings are sparse, of another length on each replica, which cannot be added
            gradients = [slope if slope is None else tf.convert_to_tensor(slope) for slope in gradients]
            self.optimizer.apply(gradients, self.model.trainable_variables)
            return losses, logits

        return step

    def _restart(self) -> None:
        """Give the optimizer the state that it had before its first step, but for the learning rate of the epoch."""
        pairs = zip(self.optimizer.variables, self._fresh, strict=True)
        pairs = [(v, value) for v, value in pairs if v is not self.optimizer._learning_rate]  # no public name
        fresh = [tf.fill(v.shape, tf.cast(value, v.dtype)) for v, value in pairs]
        optimizers.assign([v for v, _ in pairs], fresh)

    def _end_cycle(self, x, y) -> None:
        """Let adaQN judge its last steps by the loss of the monitoring set, on one replica."""
        whole = tf.cast(tf.shape(x)[0], tf.float32)
        (x, y), weight = self.replicas.shard(x, y)
        state = self._fixed()

        def loss(weights):
            losses, _ = self._loss(state, x, y, weights, training=False)
            return self.replicas.total([tf.reduce_sum(losses) * weight / whole])[0]

        self.optimizer.end_cycle(loss)

    def _variables(self) -> list:
        return [*self.model.variables, *self.optimizer.variables]

    def save(self, path: Path) -> None:
        """Write the whole state."""
        arrays = {f"variable_{i:03}": np.asarray(variable) for i, variable in enumerate(self._variables())}
        with files.writing(path) as temporary:
            np.savez(temporary, position=str(self.state), **arrays)

    def restore(self, path: Path) -> None:
        """Continue from a state that `save` wrote."""
        with store.reading(path), np.load(path) as saved:
            values = [saved[f"variable_{i:03}"] for i in range(len(saved.files) - 1)]  # beside the position
            for variable, value in zip(self._variables(), values, strict=True):
                variable.assign(value)
            self.state = TrainingState.read(saved)
