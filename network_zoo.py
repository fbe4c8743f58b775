"""The paper's networks as Keras 3 models that output logits (Table 1, Appendix B).

`python network_zoo.py` prints the table of networks. Each exists in two definitions where the two differ:

- "repository", the code the authors released, as Keras 1 ran it with Theano: C1/C3 convolve with stride 1; C2/C4 drop
  30-40 % between convolutions and 50 % before and after the dense layer; all pool with a border of one pixel before the
  first row and column (and one after the last, where the window is of three).
- "paper", Appendix B: C1/C3 convolve with stride 2; C2/C4 drop only at the dense layer; all pool as TensorFlow does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from large_batch.backend import keras
from large_batch.layers import BatchStatisticsNormalization, Dropout
from large_batch.networks import DEFINITIONS, PRECISIONS, Network, find

Layers = list[keras.layers.Layer]


@dataclass(frozen=True)
class Parts:
    """Makes the layers of one network: every layer with random numbers gets a seed of its own from the network's."""

    definition: str
    seeds: Iterator[int]
    dtype: keras.DTypePolicy

    def _kernel(self) -> dict:
        return {"kernel_initializer": keras.initializers.GlorotUniform(seed=next(self.seeds)), "dtype": self.dtype}

    def _activation(self) -> Layers:
        return [BatchStatisticsNormalization(dtype=self.dtype), keras.layers.ReLU(dtype=self.dtype)]

    def dense(self, units: int) -> Layers:
        return [keras.layers.Dense(units, **self._kernel()), *self._activation()]

    def conv(self, filters: int, size: int, stride: int = 1) -> Layers:
        convolution = keras.layers.Conv2D(filters, size, strides=stride, padding="same", **self._kernel())
        return [convolution, *self._activation()]

    def pool(self, size: int) -> Layers:
        """Pooling with stride 2 to half of the rows and columns, rounded up.

        Theano pads before the first row and column, too, so that windows begin at -1, and drops what is left over. The
        zeros stand for nothing, as all inputs are outputs of a ReLU.
        """
        if self.definition == "paper":
            return [keras.layers.MaxPooling2D(size, strides=2, padding="same", dtype=self.dtype)]
        border = keras.layers.ZeroPadding2D(((1, size - 2),) * 2, dtype=self.dtype)
        return [border, keras.layers.MaxPooling2D(size, strides=2, dtype=self.dtype)]

    def drop(self, rate: float) -> Layers:
        return [Dropout(rate, next(self.seeds), dtype=self.dtype)]

    def flatten(self) -> Layers:
        return [keras.layers.Flatten(dtype=self.dtype)]

    def logits(self, classes: int) -> Layers:
        return [keras.layers.Dense(classes, **self._kernel()), keras.layers.Activation("linear", dtype="float32")]


def fully_connected(hidden_layers: int) -> Callable[[Parts], Layers]:
    """F1 and F2: batch-normalised hidden layers of 512 units (Appendix B.1, B.2; not in the authors' repository)."""
    return lambda parts: [layer for _ in range(hidden_layers) for layer in parts.dense(512)]


def shallow_convolutional(parts: Parts) -> Layers:
    """C1 and C3, after AlexNet (Appendix B.3)."""
    stride = 1 if parts.definition == "repository" else 2
    return [
        *parts.conv(64, 5, stride),
        *parts.pool(3),
        *parts.conv(64, 5, stride),
        *parts.pool(3),
        *parts.flatten(),
        *parts.dense(384),
        *parts.drop(0.5),
        *parts.dense(192),
        *parts.drop(0.5),
    ]


def deep_convolutional(parts: Parts) -> Layers:
    """C2 and C4, after VGG (Appendix B.4)."""
    regularized = parts.definition == "repository"
    layers = []
    for convolutions, filters in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for i in range(convolutions):
            layers += parts.conv(filters, 3)
            if regularized and i < convolutions - 1:
                layers += parts.drop(0.3 if filters == 64 else 0.4)
        layers += parts.pool(2)
    layers += parts.flatten()
    if regularized:
        layers += parts.drop(0.5)
    return [*layers, *parts.dense(512), *parts.drop(0.5)]


def classifier(hidden_layers: Callable[[Parts], Layers]) -> Callable[..., keras.Model]:
    """Return the builder of a network of these hidden layers and a dense layer of logits (see `Network`)."""

    def build(network: Network, definition: str, classes: int, seed: int, precision: str) -> keras.Model:
        seeds = iter(np.random.SeedSequence(seed).generate_state(256).tolist())
        parts = Parts(definition, seeds, keras.DTypePolicy(PRECISIONS[precision]))
        layers = [*hidden_layers(parts), *parts.logits(classes)]
        return keras.Sequential([keras.Input(network.input_shape), *layers], name=network.name)

    return build


# The repository definition pooled as TensorFlow does before it pooled as Theano does.
POOLED = {"architectures": (("repository", "theano-pooling"),)}
NETWORKS = {
    network.name: network
    for network in (
        Network("F1", classifier(fully_connected(5)), "mnist", (784,), 10),
        Network("F2", classifier(fully_connected(7)), "timit", (360,), 1973),
        Network("C1", classifier(shallow_convolutional), "cifar10", (32, 32, 3), 10, **POOLED),
        Network("C2", classifier(deep_convolutional), "cifar10", (32, 32, 3), 10, **POOLED),
        Network("C3", classifier(shallow_convolutional), "cifar100", (32, 32, 3), 100, **POOLED),
        Network("C4", classifier(deep_convolutional), "cifar100", (32, 32, 3), 100, **POOLED),
    )
}


def get(name: str) -> Network:
    """Return the network called `name` (F1, F2, C1-C4), or a user's own (`large_batch.networks.find`)."""
    return find(name, NETWORKS)


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
