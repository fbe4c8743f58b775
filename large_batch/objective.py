"""The loss of a Keras model over a whole data set as a deterministic function of one flat weight vector.

Everything that needs tf.GradientTape on a full data set lives here; SciPy sees NumPy vectors only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from large_batch import files, layers, memory, models
from large_batch.backend import keras, tf
from large_batch.distribution import ALONE, Replicas
from large_batch.errors import UserError
from large_batch.functions import Point
from large_batch.layers import Outputs, flat_weights
from large_batch.losses import Scores, criterion_of
from large_batch.models import read_weights, write_weights
from large_batch.samples import Samples, Tree

__all__ = ["Evaluation", "Objective", "Point", "flat_weights", "read_weights", "write_weights"]

CHUNK = 5000  # samples evaluated at once, as the original does; batch statistics are those of a chunk
CHUNK_BYTES = 8 * 2**30  # what a chunk may take of a model that does not see the batch
FEW = 32  # samples that a model is tried with
TRACED = 61  # samples that tell how large its tensors are: a prime, of which hardly any other size is a multiple


@dataclass(frozen=True)
class Evaluation:
    """Means over a data set: the loss (of classes in nats), that with Keras 1's clipped softmax, accuracy (percent).

    What does not apply is NaN: a Keras loss is not clipped, and a regression has no accuracy. Where the loss is not
    finite nothing else is told.
    """

    loss: float
    clipped_loss: float
    accuracy: float


class Objective:
    """Mean loss f(w) of a Keras model over a data set (equation 1 of the paper).

    `w` is a float64 vector of shape (n,): the model's trainable variables, flattened and joined in Keras' order. The
    model serves as a function only: its own variables are neither read at evaluation nor changed.

    Its variables that are not trainable (moving statistics, frozen layers) take the values in `state`, a list of arrays
    in Keras' order: those that the model had when the objective was made, until others are assigned. Ordinary
    BatchNormalization thus works in inference mode. Where w is a `Point`, as `read_weights` returns it, the state is
    the point's own.

    The value is deterministic: samples in their given order, in near-equal chunks of at most 5000 (fewer where these
    would take more than 8 GiB or half of the free memory), dropout off, computed in the model's precision and summed in
    float64. Where the loss, or what layers add to it, is no mean over the samples, all are taken at once. Each chunk
    may be split over replicas, which changes no more than rounding.
    """

    repeats = True  # the model is called twice, on a few samples, when the objective is made

    def __init__(
        self,
        model: keras.Model,
        x: Tree | tf.data.Dataset,
        y: Tree = None,
        sample_weight: Tree = None,
        *,
        loss: Any = None,
        outputs: Outputs | None = None,
        prepare: Callable[[Tree], Tree] = lambda x: x,
        chunk: int = CHUNK,
        replicas: Replicas = ALONE,
    ):
        """Take a model and the data that its loss is of.

        Args:
            model: Any Keras model in float32 or float64.
            x: Samples, an array (m, ...) or a dictionary or list of such; or a `tf.data.Dataset` of batches of x,
                (x, y) or (x, y, sample_weight), which is read into memory.
            y: Labels, likewise. For `outputs` class numbers, (m,) or (m, 1), or one-hot rows.
            sample_weight: What each sample's loss is multiplied with, (m,). The sum is divided by m, as Keras does.
            loss: Whatever `compile(loss=...)` takes. The value is then what `evaluate` says of all samples as one
                batch, `model.losses` (regularisation) included.
            outputs: Instead of a loss, what the outputs (m, classes) are: "logits", or the probabilities of a
                "softmax", of which the loss is finite too, but exact only as far as the type holds a probability. The
                loss is the cross-entropy, and `model.losses`. Without either it is the loss that the model is compiled
                with, or else that of logits.
            prepare: What makes of a chunk of x, on the device, what the model receives; default: x as it is.
            chunk: How many samples are evaluated at once, at most; without effect where the loss is no mean over them.
            replicas: The devices that share a chunk.

        Raises:
            UserError: Where samples, labels, outputs and loss do not fit together, the outputs are evidently not what
                is stated, or change from call to call.
        """
        self.model, self.replicas, self._prepare = model, replicas, prepare
        self._stated = {"loss": loss, "outputs": outputs}
        self._criterion = criterion_of(model, loss, outputs)
        data = Samples.read(x, y, sample_weight)
        self._data = Samples(data.x, self._criterion.labels(data.y), data.weights)
        self.samples = len(self._data)
        few = self._data.rows(0, FEW)
        self._criterion.check(models.call_twice(model, few, self._prepare), few, self._data.y)
        if replicas.count > 1 and not self._criterion.shards:
            raise UserError("A Keras loss is taken on one device; state what the outputs are instead.")
        self._splits = self._criterion.splits and models.adds_means(model, few, prepare)
        if replicas.count > 1 and not self._splits:
            raise UserError(
                "What the layers add to the loss is a sum over the batch, which one device takes; add means."
            )
        self.take_state(model)
        variables = model.trainable_variables
        self.shapes = [tuple(variable.shape) for variable in variables]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self._dtype = np.float64 if any(variable.dtype == "float64" for variable in variables) else np.float32
        chunk = self._fitting(min(chunk, self.samples))
        self._chunks = [piece.tensors() for piece in self._data.pieces(-(-self.samples // chunk))]

    def _fitting(self, chunk: int) -> int:
        """Return how many samples to evaluate at once, of `chunk` that are asked for; warn where these may not fit."""
        if not self._splits:
            chunk = self.samples
        per_replica, free = -(-chunk // self.replicas.count), memory.free_bytes()
        self._recompute = layers.recomputes(self.model, per_replica)
        if layers.sees_the_batch(self.model):
            needed = layers.kept_bytes(self.model, per_replica, self._recompute)  # a chunk is part of the function
        else:
            of_sample = self._bytes_of_sample()
            if self._splits:
                fits = min(CHUNK_BYTES, free / 2) // max(of_sample, 1)  # a Hessian-vector product takes twice as much
                chunk = max(1, min(chunk, int(fits)))
            needed = chunk * of_sample
        if needed > free and not tf.config.list_physical_devices("GPU"):
            files.log.warning(
                "A gradient over %s samples at once needs about %.1f GiB, and %.1f GiB are free; give fewer samples.",
                f"{chunk:,}",
                needed / 2**30,
                free / 2**30,
            )
        return chunk

    def _bytes_of_sample(self) -> float:
        """Return about what a gradient keeps of a sample, from the graph of the loss."""
        kinds = [
            tf.TensorSpec([self.size], self._dtype),
            [tf.TensorSpec(part.shape, part.dtype) for part in self.state],
        ]
        batch = keras.tree.map_structure(
            lambda leaf: None if leaf is None else tf.TensorSpec([TRACED, *leaf.shape[1:]], leaf.dtype),
            self._data.rows(0, 1).tensors(),
        )
        graph = tf.function(self._scores).get_concrete_function(*kinds, batch).graph
        steps = max(leaf.shape[1] if leaf.ndim > 1 else 1 for leaf in keras.tree.flatten(self._data.x))
        return models.bytes_of(graph, TRACED, steps, np.dtype(self._dtype).itemsize)

    def take_state(self, model: keras.Model) -> None:
        """Take over the present values of a model's variables that are not trainable, as after it was trained."""
        self.state = models.point_of(model).state

    @property
    def size(self) -> int:
        """Number n of trainable weights."""
        return sum(self.sizes)

    def value(self, w: np.ndarray | Point) -> float:
        """Return f(w)."""
        return self.evaluate(w).loss

    def evaluate(self, w: np.ndarray | Point) -> Evaluation:
        """Return loss, clipped loss and accuracy at w."""
        place = self._place(w)
        sums = sum(self._sums(*place, batch).numpy() for batch in self._chunks)
        loss, clipped_loss, correct = (sums / self.samples).tolist()
        if not np.isfinite(loss):  # the classes with the largest of outputs that are no numbers mean nothing
            return Evaluation(loss, np.nan, np.nan)
        return Evaluation(loss, clipped_loss, 100 * correct)

    def value_and_gradient(self, w: np.ndarray | Point) -> tuple[float, np.ndarray]:
        """Return f(w) and its gradient, float64 of shape (n,), in the form SciPy's minimizers take."""
        place = self._place(w)
        loss, gradient = 0.0, np.zeros(self.size)
        for batch in self._chunks:
            chunk_loss, chunk_gradient = self._loss_and_gradient(*place, batch)
            loss += float(chunk_loss)
            gradient += chunk_gradient.numpy()
        return loss / self.samples, gradient / self.samples

    def hessian_vector_product(self, w: np.ndarray | Point, v: np.ndarray) -> np.ndarray:
        """Return the Hessian of f at w times v, float64 of shape (n,)."""
        place, v, total = self._place(w), self._tensor(v), np.zeros(self.size)
        try:
            for batch in self._chunks:
                total += self._curvature(*place, v, batch).numpy()
        except Exception as error:
            if missing := re.search(r"gradient registry has no entry for: (\w+)", str(error)):
                raise UserError(
                    f"TensorFlow knows no second derivatives of {missing[1]}, which the model uses."
                ) from error
            raise
        return total / self.samples

    def check(self, tolerance: float = 1e-4) -> tuple[float, float]:
        """Return the value at the model's present weights, and what Keras' `evaluate` says of the same chunks.

        Raises `UserError` where they are apart by more than `tolerance`, in units of 1 + the value, and where the model
        has other moving statistics or frozen weights now than the objective.
        """
        present = models.point_of(self.model)
        found, total = self.evaluate(present), 0.0
        for ours, now in zip(self.state, present.state, strict=True):
            if now.dtype.kind == "f" and not np.array_equal(ours, now, equal_nan=True):
                raise UserError(
                    "The model's moving statistics or frozen weights have changed since the objective took them; call "
                    "take_state(model) on it, or give it a Point."
                )
        trainer = self._criterion.trainer
        for piece in self._data.pieces(len(self._chunks)):
            x, y, weights = piece.tensors()
            settings = {"batch_size": len(piece), "verbose": 0, "return_dict": True}
            of_keras = trainer.evaluate(self._prepare(x), y, sample_weight=weights, **settings)
            if "loss" not in of_keras:
                raise UserError(f"Keras' evaluate says nothing of a loss, only of {', '.join(of_keras) or 'nothing'}.")
            total += of_keras["loss"] * len(piece) / self.samples
        apart = np.nanmin(np.abs([found.loss - total, found.clipped_loss - total]))  # Keras may clip a softmax
        if not apart <= tolerance * (1 + abs(total)):
            raise UserError(f"The objective's value is {found.loss:.6g}, but Keras' evaluate says {total:.6g}.")
        return found.loss, total

    def exact(self, w: np.ndarray | Point) -> Objective | None:
        """Return the same function of a few samples, computed in float64; None where the model cannot be copied so."""
        few, place = self._data.rows(0, FEW), w if isinstance(w, Point) else Point(w, self.state)
        try:
            with models.in_float64(self.model, self._stated["loss"]) as (model, loss):
                stated = self._stated | {"loss": loss, "prepare": self._prepare}
                wide = Objective(model, few.x, few.y, few.weights, **stated)
                wide.state = [array.astype(taken.dtype) for array, taken in zip(place.state, wide.state, strict=True)]
                wide.value_and_gradient(place.weights)
                wide.hessian_vector_product(place.weights, place.weights)
        except Exception:  # Keras raises nearly anything for models of a user's own classes
            return None
        return wide

    def _place(self, w: np.ndarray | Point) -> tuple[tf.Tensor, list[np.ndarray]]:
        if len(self.model.trainable_variables) != len(self.sizes):
            raise UserError("Layers were frozen or set free since this objective was made; make a new one.")
        return (self._tensor(w.weights), w.state) if isinstance(w, Point) else (self._tensor(w), self.state)

    def _tensor(self, w: np.ndarray) -> tf.Tensor:
        if np.shape(w) != (self.size,):
            raise UserError(f"The model has {self.size:,} trainable weights, the vector given has {np.size(w):,}.")
        with np.errstate(over="ignore"):  # too far is infinitely far, and makes a loss that is not finite
            return tf.constant(np.asarray(w, self._dtype))

    def _scores(self, w, state, batch, recompute: bool = False) -> Scores:
        """What a batch's outputs are worth at the flat weights w."""
        x, y, weights = batch
        x, parts = self._prepare(x), zip(tf.split(w, self.sizes), self.shapes, strict=True)
        trainable = [tf.reshape(part, shape) for part, shape in parts]
        if recompute:
            return self._criterion.score(x, layers.call_recomputing(self.model, trainable, x), y, weights)
        variables = [*self.model.trainable_variables, *self.model.non_trainable_variables]
        values = [tf.cast(v, variable.dtype) for v, variable in zip([*trainable, *state], variables, strict=True)]
        with keras.StatelessScope(list(zip(variables, values, strict=True)), collect_losses=True):
            return self._criterion.score(x, layers.call(self.model, x), y, weights)

    def _shard(self, batch):
        """A replica's part of a batch, and what its samples count."""
        present = [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]
        parts, weight = self.replicas.shard(*present)
        parts = iter(parts)
        return keras.tree.map_structure(lambda leaf: None if leaf is None else next(parts), batch), weight

    @tf.function
    def _sums(self, w, state, batch):
        def replica(w, batch):
            batch, weight = self._shard(batch)
            scores = self._scores(w, state, batch)
            missing = tf.constant(np.nan, tf.float64)
            sums = [missing if part is None else tf.reduce_sum(tf.cast(part, tf.float64)) for part in scores]
            return tf.stack(sums) * tf.cast(weight, tf.float64)

        return self.replicas.reduce_sum(replica, w, batch)

    @tf.function
    def _loss_and_gradient(self, w, state, batch):
        def replica(w, batch):
            batch, weight = self._shard(batch)
            with tf.GradientTape() as tape:
                tape.watch(w)
                losses = self._scores(w, state, batch, self._recompute).losses
                losses *= tf.cast(weight, losses.dtype)
            gradient = tape.gradient(losses, w, unconnected_gradients="zero")
            return tf.reduce_sum(tf.cast(losses, tf.float64)), gradient

        return self.replicas.reduce_sum(replica, w, batch)

    @tf.function
    def _curvature(self, w, state, v, batch):
        def replica(w, v, batch):
            batch, weight = self._shard(batch)
            with models.differentiable_moments(), tf.GradientTape() as outer:
                outer.watch(w)
                with tf.GradientTape() as inner:
                    inner.watch(w)
                    losses = self._scores(w, state, batch).losses
                    losses *= tf.cast(weight, losses.dtype)
                slope = tf.reduce_sum(inner.gradient(losses, w, unconnected_gradients="zero") * v)
            return outer.gradient(slope, w, unconnected_gradients="zero")

        return self.replicas.reduce_sum(replica, w, v, batch)
