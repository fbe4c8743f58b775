"""The paper's networks as Keras 3 models that output logits (Table 1, Appendix B).

`python network_zoo.py` prints the table of networks. Each exists in two definitions where the two differ:

- "repository", the code the authors released, as Keras 1 ran it with Theano: C1/C3 convolve with stride 1; C2/C4 drop
  30-40 % between convolutions and 50 % before and after the dense layer; all pool with a border of one pixel before the
  first row and column (and one after the last, where the window is of three).
- "paper", Appendix B: C1/C3 convolve with stride 2; C2/C4 drop only at the dense layer; all pool as TensorFlow does.
"""

import quiet_tensorflow  # noqa: F401

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import keras
import numpy as np
import tensorflow as tf

from errors import UserError

DEFINITIONS = ("repository", "paper")
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


@keras.saving.register_keras_serializable("large_batch_training")
class BatchStatisticsNormalization(keras.layers.Layer):
    """Batch normalisation over the current batch, in training and in evaluation alike (Keras 1's `mode=2`).

    No moving averages exist, so the trainable weights alone determine the network's function. Input and output are
    (n, c) or (n, height, width, c), normalised over all axes but the last. Under a distribution strategy the
    statistics are those of the global batch, whatever each replica's share of it.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")

    def call(self, x):
        replicas = tf.distribute.get_replica_context()  # None outside of any replica
        if replicas is None or replicas.num_replicas_in_sync == 1:
            return self._normalize_fused(x)
        axes = list(range(x.shape.rank - 1))
        wide = tf.cast(x, tf.float32)
        count = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), tf.float32)
        total, count = replicas.all_reduce("SUM", [tf.reduce_sum(wide, axes), count])
        centred = wide - total / count
        # Squares of centred values: the difference of raw moments would cancel in float32.
        variance = replicas.all_reduce("SUM", tf.reduce_sum(tf.square(centred), axes)) / count
        scale = tf.cast(self.gamma, tf.float32) * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast(centred * scale + tf.cast(self.beta, tf.float32), x.dtype)

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

    The training loop writes the number of the step into `step` before each step (`set_dropout_step`).
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
        keep = tf.random.stateless_uniform(tf.shape(x), key, alg="philox") >= self.rate
        return tf.where(keep, x / (1 - self.rate), tf.zeros([], x.dtype))

    def get_config(self):
        return super().get_config() | {"rate": self.rate, "seed": self.seed}


def set_dropout_step(model: keras.Model, step: int | tf.Tensor) -> None:
    """Select the dropout masks of training step `step` in every `Dropout` layer of the model."""
    for layer in model.layers:
        if isinstance(layer, Dropout):
            layer.step.assign(step)


def call_recomputing(model: keras.Sequential, x: tf.Tensor) -> tf.Tensor:
    """Return `model(x, training=True)`, keeping less of it for the gradient, which is the same to the bit.

    What lies between two kernels (normalisation, activation, dropout, pooling) is computed again in the backward pass
    instead of kept: it costs little beside the kernels, and holds most of the memory of a large batch.
    """

    def between_kernels(layers: list[keras.layers.Layer]) -> Callable[[tf.Tensor], tf.Tensor]:
        def call(h: tf.Tensor) -> tf.Tensor:
            for layer in layers:
                h = layer(h, training=True) if isinstance(layer, Dropout) else layer(h)
            return h

        return call

    for kernel, others in _from_kernel_to_kernel(model):
        x = tf.recompute_grad(between_kernels(others))(kernel(x) if kernel else x)
    return x


def stateless_call_recomputing(model: keras.Sequential, weights: list[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    """Return what `model.stateless_call(weights, ..., x)` does in inference, keeping as little as `call_recomputing`.

    For the networks of this file the gradient is the same to the bit; others may round otherwise. There are no second
    derivatives.
    """

    def between_kernels(layers: list[keras.layers.Layer]) -> Callable[..., tf.Tensor]:
        def call(h: tf.Tensor, *weights: tf.Tensor) -> tf.Tensor:
            for layer in layers:
                count = len(layer.trainable_variables)
                h, _ = layer.stateless_call(weights[:count], layer.non_trainable_variables, h)
                weights = weights[count:]
            return h

        return call

    for kernel, others in _from_kernel_to_kernel(model):
        if kernel:
            mine = len(kernel.trainable_variables)
            x, _ = kernel.stateless_call(weights[:mine], kernel.non_trainable_variables, x)
            weights = weights[mine:]
        count = sum(len(layer.trainable_variables) for layer in others)
        x = tf.recompute_grad(between_kernels(others))(x, *weights[:count])
        weights = weights[count:]
    return x


def _from_kernel_to_kernel(
    model: keras.Sequential,
) -> Iterator[tuple[keras.layers.Layer | None, list[keras.layers.Layer]]]:
    """Yield each layer with a kernel and those up to the next one; first None and those before any kernel, if any."""
    starts = [i for i, layer in enumerate(model.layers) if hasattr(layer, "kernel")]
    ends = [*starts[1:], len(model.layers)] if starts else []
    if before := model.layers[: starts[0]] if starts else model.layers:
        yield None, before
    for start, end in zip(starts, ends, strict=True):
        yield model.layers[start], model.layers[start + 1 : end]


@dataclass(frozen=True)
class _Parts:
    """Makes the layers of one network: every layer gets a seed of its own from the network's."""

    seeds: Iterator[int]
    dtype: keras.DTypePolicy

    def _kernel(self) -> dict:
        return {"kernel_initializer": keras.initializers.GlorotUniform(seed=next(self.seeds)), "dtype": self.dtype}

    def _activation(self) -> list[keras.layers.Layer]:
        return [BatchStatisticsNormalization(dtype=self.dtype), keras.layers.ReLU(dtype=self.dtype)]

    def dense(self, units: int) -> list[keras.layers.Layer]:
        return [keras.layers.Dense(units, **self._kernel()), *self._activation()]

    def conv(self, filters: int, size: int, stride: int = 1) -> list[keras.layers.Layer]:
        convolution = keras.layers.Conv2D(filters, size, strides=stride, padding="same", **self._kernel())
        return [convolution, *self._activation()]

    def pool(self, size: int, definition: str) -> list[keras.layers.Layer]:
        """Pooling with stride 2 to half of the rows and columns, rounded up.

        Theano pads before the first row and column, too, so that windows begin at -1, and drops what is left over. The
        zeros stand for nothing, as all inputs are outputs of a ReLU.
        """
        if definition == "paper":
            return [keras.layers.MaxPooling2D(size, strides=2, padding="same", dtype=self.dtype)]
        border = keras.layers.ZeroPadding2D(((1, size - 2),) * 2, dtype=self.dtype)
        return [border, keras.layers.MaxPooling2D(size, strides=2, dtype=self.dtype)]

    def drop(self, rate: float) -> list[keras.layers.Layer]:
        return [Dropout(rate, next(self.seeds), dtype=self.dtype)]

    def flatten(self) -> list[keras.layers.Layer]:
        return [keras.layers.Flatten(dtype=self.dtype)]

    def logits(self, classes: int) -> list[keras.layers.Layer]:
        return [keras.layers.Dense(classes, **self._kernel()), keras.layers.Activation("linear", dtype="float32")]


Builder = Callable[[_Parts, str], list[keras.layers.Layer]]


def fully_connected(hidden_layers: int) -> Builder:
    """F1 and F2: batch-normalised hidden layers of 512 units (Appendix B.1, B.2; not in the authors' repository)."""

    def layers(parts: _Parts, definition: str) -> list[keras.layers.Layer]:
        return [layer for _ in range(hidden_layers) for layer in parts.dense(512)]

    return layers


def shallow_convolutional(parts: _Parts, definition: str) -> list[keras.layers.Layer]:
    """C1 and C3, after AlexNet (Appendix B.3)."""
    stride = 1 if definition == "repository" else 2
    return [
        *parts.conv(64, 5, stride),
        *parts.pool(3, definition),
        *parts.conv(64, 5, stride),
        *parts.pool(3, definition),
        *parts.flatten(),
        *parts.dense(384),
        *parts.drop(0.5),
        *parts.dense(192),
        *parts.drop(0.5),
    ]


def deep_convolutional(parts: _Parts, definition: str) -> list[keras.layers.Layer]:
    """C2 and C4, after VGG (Appendix B.4)."""
    regularized = definition == "repository"
    layers = []
    for convolutions, filters in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for i in range(convolutions):
            layers += parts.conv(filters, 3)
            if regularized and i < convolutions - 1:
                layers += parts.drop(0.3 if filters == 64 else 0.4)
        layers += parts.pool(2, definition)
    layers += parts.flatten()
    if regularized:
        layers += parts.drop(0.5)
    return [*layers, *parts.dense(512), *parts.drop(0.5)]


@dataclass(frozen=True)
class Network:
    """A row of Table 1: what to build, for which data set, trained with which batch sizes."""

    name: str
    hidden_layers: Builder
    dataset: str
    input_shape: tuple[int, ...]
    classes: int

    def small_batch(self, train_size: int) -> int:
        """The paper's 256 samples, or 1 % of a training set too small for that."""
        return min(256, max(1, train_size // 100))

    def large_batch(self, train_size: int) -> int:
        """10 % of the training set (section 2.2)."""
        return max(1, train_size // 10)

    def architecture(self, definition: str) -> str:
        """Return what tells this network from others that had its name and definition, "" for the first of them.

        The repository definition pooled as TensorFlow does before it pooled as Theano does.
        """
        return "theano-pooling" if definition == "repository" and len(self.input_shape) == 3 else ""

    def build(
        self, definition: str = "repository", classes: int | None = None, seed: int = 0, precision: str = "float32"
    ) -> keras.Model:
        """Return the network at the starting point that `seed` determines (Glorot-uniform kernels, zero biases).

        The model maps (n, *input_shape) floats to (n, classes) float32 logits; `classes` defaults to those of the
        network's own data set. `precision` is float32, or bfloat16 for layers that compute in bfloat16 with float32
        weights.
        """
        seeds = iter(np.random.SeedSequence(seed).generate_state(256).tolist())
        parts = _Parts(seeds, keras.DTypePolicy(PRECISIONS[precision]))
        layers = [*self.hidden_layers(parts, definition), *parts.logits(classes or self.classes)]
        return keras.Sequential([keras.Input(self.input_shape), *layers], name=self.name)


NETWORKS = {
    network.name: network
    for network in (
        Network("F1", fully_connected(5), "mnist", (784,), 10),
        Network("F2", fully_connected(7), "timit", (360,), 1973),
        Network("C1", shallow_convolutional, "cifar10", (32, 32, 3), 10),
        Network("C2", deep_convolutional, "cifar10", (32, 32, 3), 10),
        Network("C3", shallow_convolutional, "cifar100", (32, 32, 3), 100),
        Network("C4", deep_convolutional, "cifar100", (32, 32, 3), 100),
    )
}


def get(name: str) -> Network:
    """Return the network called `name` (F1, F2, C1-C4); raises `UserError` for any other name."""
    if name not in NETWORKS:
        raise UserError(f"There is no network '{name}'; choose one of {', '.join(NETWORKS)}.")
    return NETWORKS[name]


def main() -> None:
    """Print the table of networks: data set, input shape, trainable weights of both definitions."""
    row = "{:8} {:9} {:12} {:>7} {:>21} {:>16}".format
    print(row("network", "data set", "input", "classes", *(f"weights ({name})" for name in DEFINITIONS)))
    for network in NETWORKS.values():
        models = [network.build(definition) for definition in DEFINITIONS]
        weights = [sum(prod(variable.shape) for variable in model.trainable_variables) for model in models]
        shape = " x ".join(map(str, network.input_shape))
        print(row(network.name, network.dataset, shape, network.classes, *(f"{count:,}" for count in weights)))
    print("small batch: 256 samples; large batch: 10 % of the training set")


if __name__ == "__main__":
    main()
