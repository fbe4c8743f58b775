"""Layers of the paper's networks, the loss of outputs, weights as one vector, gradients that keep less in memory."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from math import prod
from typing import Any, Literal

import numpy as np

from large_batch.backend import keras, tf
from large_batch.errors import UserError

if keras.config.backend() != "tensorflow":  # which is called by the layers here, without which there is no model
    raise UserError(
        f"Keras was imported with the backend {keras.config.backend()}, but TensorFlow is needed; import large_batch "
        "first, or set KERAS_BACKEND=tensorflow."
    )

Outputs = Literal["logits", "softmax"]  # of a network
RECOMPUTE_BYTES = 8 * 2**30  # what a gradient may keep of the layers' outputs


@keras.saving.register_keras_serializable("large_batch_training")
class BatchStatisticsNormalization(keras.layers.Layer):
    """Batch normalisation over the current batch, in training and in evaluation alike (Keras 1's `mode=2`).

    No moving averages exist, so the trainable weights alone determine the network's function. Input and output are
    (n, c) or (n, height, width, c), normalised over all axes but the last. Under a distribution strategy the
    statistics are those of the global batch, whatever each replica's share of it.
    """

    sees_the_batch = True

    def __init__(self, epsilon: float = 1e-6, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")

    def call(self, x):
        replicas = tf.distribute.get_replica_context()  # None outside of any replica
        alone = replicas is None or replicas.num_replicas_in_sync == 1
        if alone and x.dtype != tf.float64:  # which the fused operation does not take
            return self._normalize_fused(x)

        def total(parts):
            return parts if alone else replicas.all_reduce("SUM", parts)

        axes = list(range(x.shape.rank - 1))
        wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
        count = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), wide.dtype)
        sums, count = total([tf.reduce_sum(wide, axes), count])
        centred = wide - sums / count
        # Squares of centred values: the difference of raw moments would cancel in float32.
        variance = total(tf.reduce_sum(tf.square(centred), axes)) / count
        scale = tf.cast(self.gamma, wide.dtype) * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast(centred * scale + tf.cast(self.beta, wide.dtype), x.dtype)

    def _normalize_fused(self, x):
        # The raw operation, since tf.nn.fused_batch_norm silently raises epsilon to 1e-5.
        images = x if x.shape.rank == 4 else tf.reshape(x, [-1, 1, 1, x.shape[-1]])
        y = tf.raw_ops.FusedBatchNormV3(
            x=images,
            scale=tf.cast(self.gamma, tf.float32),
            offset=tf.cast(self.beta, tf.float32),
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=self.epsilon,
            is_training=True,
        ).y
        return tf.reshape(y, tf.shape(x))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"epsilon": self.epsilon}


@keras.saving.register_keras_serializable("large_batch_training")
class Dropout(keras.layers.Layer):
    """Dropout whose mask depends only on (seed, `step`, replica), so that a resumed training repeats it exactly.

    The training loop of this project writes the number of the step into `step` (`set_dropout_step`). In `model.fit`
    nobody does, and the mask stays the same: a callback's `on_train_batch_begin` may call it.
    """

    def __init__(self, rate: float, seed: int, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed

    def build(self, input_shape):
        # A TensorFlow variable, which Keras does not save: the position of a training is no part of the weights.
        self.step = tf.Variable(0, trainable=False, dtype=tf.int64)

    def call(self, x, training=False):
        if not training:
            return x
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        fold_in = partial(tf.random.experimental.stateless_fold_in, alg="philox")  # whatever the device or compiler
        key = fold_in(fold_in(tf.constant([self.seed, 0], tf.int64), self.step), replica)
        keep = uniform(tf.shape(x), key) >= np.float32(self.rate)
        return tf.where(keep, x / (1 - self.rate), tf.zeros([], x.dtype))

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "seed": self.seed}


def uniform(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Return float32 numbers in [0, 1) that depend on the key, (2,) integers, alone: whatever the device or compiler.

    TensorFlow and XLA make different floats of the same random bits, so the last 23 bits of integers are taken here.
    """
    bits = tf.random.stateless_uniform(shape, key, minval=None, maxval=None, dtype=tf.uint32, alg="philox")
    return tf.cast(tf.bitwise.bitwise_and(bits, 2**23 - 1), tf.float32) / 2**23


def normal(shape: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Return normally distributed float32 numbers, mean 0 and deviation 1, that depend on the key as `uniform` does."""
    return tf.math.ndtri(uniform(shape, key) + 2**-24)  # in the middle of each of its steps, never 0


def set_dropout_step(model: keras.Model, step: int | tf.Tensor) -> None:
    """Select the dropout masks of training step `step` in every `Dropout` layer of the model, nested ones too."""
    for layer in model._flatten_layers():
        if isinstance(layer, Dropout):
            layer.step.assign(step)


def sees_the_batch(model: keras.Model) -> bool:
    """Say whether the samples that are evaluated at once are part of a model's function.

    They are where a layer, here or of a user, has `sees_the_batch = True`.
    """
    return any(getattr(layer, "sees_the_batch", False) for layer in model._flatten_layers())


def call(model: keras.Model, x: Any) -> Any:
    """Return a model's outputs in inference mode, whether or not its `call` knows of `training`."""
    parameters = inspect.signature(model.call).parameters.values()
    knows = any(each.name == "training" or each.kind is each.VAR_KEYWORD for each in parameters)
    return model(x, training=False) if knows else model(x)


def call_recomputing(
    model: keras.Sequential, weights: Sequence[tf.Tensor], x: tf.Tensor, training: bool = False
) -> tf.Tensor:
    """Return the outputs of a model without non-trainable variables, keeping less of them for the gradient.

    What lies between two kernels (normalisation, activation, dropout, pooling) is computed again in the backward pass
    instead of kept: it costs little beside the kernels, and holds most of the memory of a large batch. For the paper's
    networks the gradient is the same to the bit. There are no second derivatives.

    Args:
        model: The network, a list of layers.
        weights: Tensors in place of its trainable variables.
        x: A batch, (m, ...).
        training: Whether dropout is on.
    """

    def through(layers: list[keras.layers.Layer]) -> Callable[..., tf.Tensor]:
        def call(h: tf.Tensor, *weights: tf.Tensor) -> tf.Tensor:
            for layer in layers:
                own = layer.trainable_variables
                settings = {"training": training} if isinstance(layer, Dropout) else {}
                with keras.StatelessScope(list(zip(own, weights[: len(own)], strict=True))):
                    h = layer(h, **settings)  # `stateless_call` would not cast h to the layer's precision
                weights = weights[len(own) :]
            return h

        return call

    weights = list(weights)
    for has_kernel, group in groupby(model.layers, lambda layer: hasattr(layer, "kernel")):
        section = list(group)
        run = through(section) if has_kernel else tf.recompute_grad(through(section))
        count = sum(len(layer.trainable_variables) for layer in section)
        x = run(x, *weights[:count])
        weights = weights[count:]
    return x


def recomputes(model: keras.Model, samples: int) -> bool:
    """Say whether the gradient of so many samples would keep too much, and the model allows `call_recomputing`."""
    plain = type(model) is keras.Sequential and not (model.non_trainable_variables or model.losses)
    plain = plain and all(map(_is_plain, model._flatten_layers(include_self=False)))
    return sees_the_batch(model) and plain and kept_bytes(model, samples) > RECOMPUTE_BYTES


def _is_plain(layer: keras.layers.Layer) -> bool:
    """Whether a layer is Keras' or ours, and does nothing beside passing on its outputs."""
    package = type(layer).__module__.partition(".")[0]
    other = isinstance(layer, (keras.Model, keras.layers.Lambda)) or layer.activity_regularizer
    return package in ("keras", "large_batch") and not other


def kept_bytes(model: keras.Model, samples: int, recomputing: bool = False) -> int:
    """Return about what the gradient of a batch keeps of the layers' outputs, in bytes.

    With `call_recomputing` that is the outputs of the kernels, and all of one section between two of them.
    """
    sizes = [samples * _output_bytes(layer) for layer in model.layers]
    if not recomputing:
        return sum(sizes)
    kernels = [i for i, layer in enumerate(model.layers) if hasattr(layer, "kernel")]
    sections = [sum(sizes[start:end]) for start, end in pairwise([0, *kernels, len(sizes)])]
    return sum(sizes[i] for i in kernels) + max(sections)


def _output_bytes(layer: keras.layers.Layer) -> int:
    """What a layer, or a model in place of one, puts out for one sample; 1 value where Keras does not know, as in a
    model that is no graph."""
    if isinstance(layer, keras.Model):
        return sum(map(_output_bytes, layer.layers))
    shape = getattr(getattr(layer, "output", None), "shape", (None,))
    return prod(size or 1 for size in shape[1:]) * (2 if layer.compute_dtype in ("bfloat16", "float16") else 4)


def cross_entropy(outputs: tf.Tensor, y: tf.Tensor, kind: Outputs) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the losses (nats) and the logits of a batch: (m,) and (m, classes), float32 or wider, from outputs of a
    kind."""
    logits = outputs if outputs.dtype == tf.float64 else tf.cast(outputs, tf.float32)
    if kind == "softmax":
        logits = tf.math.log(tf.maximum(logits, logits.dtype.as_numpy_dtype(np.finfo(np.float32).tiny)))
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits), logits


def penalty(losses: Sequence[tf.Tensor], dtype: tf.DType) -> tf.Tensor | int:
    """Return the sum of what a model adds to the mean loss (`model.losses`), 0 where it adds nothing."""
    return sum(tf.reduce_sum(tf.cast(loss, dtype)) for loss in losses)


def pixels(x: tf.Tensor) -> tf.Tensor:
    """Scale uint8 pixels to float32 in [0, 1]; the original's only preprocessing. Floats pass as they are."""
    return tf.cast(x, tf.float32) / 255 if x.dtype == tf.uint8 else x


def rescaled(
    model: keras.Model, w: np.ndarray, state: Sequence[np.ndarray], factor: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return weights of the same function: kernels and biases right before a batch normalisation times a factor.

    The normalisation divides what it is given by its size, so the factor has no effect beyond that of the
    normalisation's epsilon (Dinh et al., 2017). Moving averages follow, with which the function is the same exactly.

    Args:
        model: The network, whose layers stand in a list or graph; its own weights are not read.
        w: Its flat weights, (n,).
        state: Its variables that are not trainable, in Keras' order.
        factor: A number above 0; 1 returns the same bits.

    Raises:
        UserError: Where no layer with a kernel, linear or a ReLU, feeds a batch normalisation and nothing else.
    """
    pairs = list(_normalized(model))
    if not pairs:
        raise UserError(f"No kernel stands right before a batch normalisation in {model.name}; none can be rescaled.")
    values = {id(variable): array for variable, array in zip(model.non_trainable_variables, state, strict=True)}
    sizes = [prod(variable.shape) for variable in model.trainable_variables]
    values |= dict(zip(map(id, model.trainable_variables), np.split(w, np.cumsum(sizes)[:-1]), strict=True))
    for kernel, normalization in pairs:
        values |= {id(variable): factor * values[id(variable)] for variable in kernel.variables}
        if isinstance(normalization, keras.layers.BatchNormalization):
            mean, variance, epsilon = normalization.moving_mean, normalization.moving_variance, normalization.epsilon
            values[id(mean)] = factor * values[id(mean)]
            values[id(variance)] = factor**2 * (values[id(variance)] + epsilon) - epsilon
    pairs = zip(model.non_trainable_variables, state, strict=True)
    state = [values[id(variable)].astype(array.dtype) for variable, array in pairs]
    return np.concatenate([values[id(variable)] for variable in model.trainable_variables]), state


def _normalized(model: keras.Model) -> Iterator[tuple[keras.layers.Layer, keras.layers.Layer]]:
    """Yield each layer whose output grows with its kernel and goes to a batch normalisation only, and that one."""
    growing = (None, keras.activations.linear, keras.activations.relu)
    for layer in model.layers:
        if isinstance(layer, BatchStatisticsNormalization | keras.layers.BatchNormalization):
            # Keras has no public name for what a layer takes its input from.
            kernel = getattr(getattr(layer, "input", None), "_keras_history", [None])[0]
            once = hasattr(kernel, "kernel") and len(kernel._outbound_nodes) == len(kernel._inbound_nodes) == 1
            if once and getattr(kernel, "activation", None) in growing:
                yield kernel, layer


def flat_weights(model: keras.Model) -> np.ndarray:
    """Return the model's trainable variables as one float64 vector of shape (n,)."""
    return np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables]).astype(np.float64)


def parts(model: keras.Model) -> dict[str, slice]:
    """Return where each layer's trainable weights are in a flat vector of them, by the layer's name, in Keras' order.

    A nested layer's name is its path. The model's own name is left out where all layers have it. Keras numbers layers
    that are not named through all models of a process; here their numbers begin anew: dense, dense_1, dense_2.
    """
    owners = [variable.path.split("/")[:-1] for variable in model.trainable_variables]
    nested = all(len(owner) > 1 and owner[0] == model.name for owner in owners)
    classes = {*dir(keras.layers), *(type(layer).__name__ for layer in model.layers)}
    automatic = {re.sub("(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower() for name in classes}
    numbers = {}  # the lowest of each automatic name
    for base, number in (_numbered(word) for owner in owners for word in owner[nested:]):
        numbers[base] = min(number, numbers.get(base, number)) if base in automatic else 0
    found, begin = {}, 0
    for owner, variables in groupby(zip(owners, model.trainable_variables, strict=True), key=lambda pair: pair[0]):
        words = []
        for base, number in map(_numbered, owner[nested:]):
            words.append(f"{base}_{number - numbers[base]}" if number > numbers[base] else base)
        name, size = "/".join(words) or model.name, sum(prod(variable.shape) for _, variable in variables)
        while name in found:  # two layers that a user gave one name
            name += "'"
        found[name] = slice(begin, begin + size)
        begin += size
    return found


def _numbered(name: str) -> tuple[str, int]:
    """Return a layer's name without its number, and the number, 0 where it has none."""
    base, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name).groups()
    return base, int(number or 0)
