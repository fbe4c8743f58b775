"""The paper's networks as Keras 3 models that output logits (Table 1, Appendix B), and VGG11 and MobileNetV2.

`python network_zoo.py` sets networks and data sets beside Tables 1 and 5. The paper's networks exist in two definitions
where the two differ:

- "repository", the code the authors released, as Keras 1 ran it with Theano: C1/C3 convolve with stride 1; C2/C4 drop
  30-40 % between convolutions and 50 % before and after the dense layer; all pool with a border of one pixel before the
  first row and column (and one after the last, where the window is of three).
- "paper", Appendix B: C1/C3 convolve with stride 2; C2/C4 drop only at the dense layer; all pool as TensorFlow does.

VGG11 is of the PyTorch folder of the authors' code only, MobileNetV2 of a reproduction by others (`finetune.py`).
"""

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import numpy as np

from large_batch import cli, datasets, distribution, files, paper, store
from large_batch.backend import keras
from large_batch.cli import setting
from large_batch.layers import BatchStatisticsNormalization, Dropout
from large_batch.networks import DEFINITIONS, PRECISIONS, Network, find, seeded

Layers = list[keras.layers.Layer]
Table = list[list[str]]  # cells; the first row is a header
Start = Callable[..., keras.initializers.Initializer]  # from a seed to how kernels start
IMAGES = {"data_format": "channels_last"}  # said to each layer, whatever a user's keras.json says, as its dtype is


@dataclass(frozen=True)
class Parts:
    """Makes the layers of one network: every layer with random numbers gets a seed of its own from the network's."""

    definition: str
    seeds: Iterator[int]
    dtype: keras.DTypePolicy
    start: Start = keras.initializers.GlorotUniform

    def _kernel(self, start: Start | None = None) -> dict:
        return {"kernel_initializer": (start or self.start)(seed=next(self.seeds)), "dtype": self.dtype}

    def _activation(self) -> Layers:
        return [BatchStatisticsNormalization(dtype=self.dtype), keras.layers.ReLU(dtype=self.dtype)]

    def dense(self, units: int) -> Layers:
        return [keras.layers.Dense(units, **self._kernel()), *self._activation()]

    def plain_dense(self, units: int) -> Layers:
        """A dense layer without batch normalisation."""
        return [keras.layers.Dense(units, activation="relu", **self._kernel())]

    def conv(self, filters: int, size: int, stride: int = 1, start: Start | None = None) -> Layers:
        convolution = keras.layers.Conv2D(
            filters, size, strides=stride, padding="same", **IMAGES, **self._kernel(start)
        )
        return [convolution, *self._activation()]

    def pool(self, size: int) -> Layers:
        """Pooling with stride 2 to half of the rows and columns, rounded up.

        Theano pads before the first row and column, too, so that windows begin at -1, and drops what is left over. The
        zeros stand for nothing, as all inputs are outputs of a ReLU.
        """
        if self.definition == "paper":
            return [keras.layers.MaxPooling2D(size, strides=2, padding="same", **IMAGES, dtype=self.dtype)]
        border = keras.layers.ZeroPadding2D(((1, size - 2),) * 2, **IMAGES, dtype=self.dtype)
        return [border, keras.layers.MaxPooling2D(size, strides=2, **IMAGES, dtype=self.dtype)]

    def drop(self, rate: float) -> Layers:
        return [Dropout(rate, next(self.seeds), dtype=self.dtype)]

    def flatten(self) -> Layers:
        return [keras.layers.Flatten(**IMAGES, dtype=self.dtype)]

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


def he_fan_out(seed: int) -> keras.initializers.Initializer:
    """Return how the authors' VGG11 starts convolutions: normal, variance 2 over what a channel feeds."""
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal", seed=seed)


def narrow(seed: int) -> keras.initializers.Initializer:
    """Return how the authors' VGG11 starts dense kernels: normal, deviation 0.01."""
    return keras.initializers.RandomNormal(stddev=0.01, seed=seed)


def vgg11(parts: Parts) -> Layers:
    """VGG11-BN as in the PyTorch folder of the authors' code, with the batch statistics of all networks here.

    PyTorch pools 2x2 windows that begin at 0, on 32, 16, 8, 4 and 2 pixels, as TensorFlow does.
    """
    layers = []
    for filters in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in filters:
            layers += parts.conv(width, 3, start=he_fan_out)
        layers += [keras.layers.MaxPooling2D(2, **IMAGES, dtype=parts.dtype)]
    layers += parts.flatten()
    for _ in range(2):
        layers += [*parts.drop(0.5), *parts.plain_dense(4096)]
    return layers


def classifier(
    hidden_layers: Callable[[Parts], Layers], start: Start = keras.initializers.GlorotUniform
) -> Callable[..., keras.Model]:
    """Return the builder of a network of these hidden layers and a dense layer of logits (see `Network`)."""

    def build(network: Network, definition: str, classes: int, seed: int, precision: str) -> keras.Model:
        seeds = iter(np.random.SeedSequence(seed).generate_state(256).tolist())
        parts = Parts(definition, seeds, keras.DTypePolicy(PRECISIONS[precision]), start)
        layers = [*hidden_layers(parts), *parts.logits(classes)]
        inputs = keras.Input(network.input_shape, dtype="float32")
        return keras.Sequential([inputs, *layers], name=network.name)

    return build


def mobilenet_v2(weights: str | None = None) -> Callable[..., keras.Model]:
    """Return the builder of Keras' own MobileNetV2 with a new layer of logits (see `Network`).

    `weights` are "imagenet", which Keras fetches, or a file of Keras' MobileNetV2 without its top; without them all
    starts at random. Pixels in [0, 1] are brought to the [-1, 1] that Keras' weights are for. The moving averages of
    its batch normalisation follow with momentum 0.9, as PyTorch's do, not with Keras' 0.999, which takes thousands of
    steps to forget where they began.
    """

    def build(network: Network, definition: str, classes: int, seed: int, precision: str) -> keras.Model:
        def make() -> keras.Model:
            x = keras.Input(network.input_shape)
            body = keras.applications.MobileNetV2(
                input_tensor=keras.layers.Rescaling(2, -1)(x), include_top=False, weights=weights, pooling="avg"
            )
            for layer in body.layers:
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.momentum = 0.9
            logits = keras.layers.Dense(classes)(body.output)
            return keras.Model(x, keras.layers.Activation("linear", dtype="float32")(logits), name=network.name)

        return seeded(make, seed, precision)

    return build


# What tells a definition from earlier ones of its name: with FIRST there was none; with POOLED it pooled as TensorFlow
# does, and now as Theano does. A network with neither is told by its layers (`networks.find`).
FIRST, POOLED = {"architectures": ()}, {"architectures": (("repository", "theano-pooling"),)}
NETWORKS = {
    network.name: network
    for network in (
        Network("F1", classifier(fully_connected(5)), "mnist", (784,), 10, **FIRST),
        Network("F2", classifier(fully_connected(7)), "timit", (360,), 1973, **FIRST),
        Network("C1", classifier(shallow_convolutional), "cifar10", (32, 32, 3), 10, **POOLED),
        Network("C2", classifier(deep_convolutional), "cifar10", (32, 32, 3), 10, **POOLED),
        Network("C3", classifier(shallow_convolutional), "cifar100", (32, 32, 3), 100, **POOLED),
        Network("C4", classifier(deep_convolutional), "cifar100", (32, 32, 3), 100, **POOLED),
        Network("VGG11", classifier(vgg11, narrow), "cifar10", (32, 32, 3), 10, definitions=DEFINITIONS[:1], **FIRST),
        Network("MobileNetV2", mobilenet_v2(), "cifar10", (32, 32, 3), 10, definitions=DEFINITIONS[:1], **FIRST),
    )
}


def get(name: str) -> Network:
    """Return the network called `name`, one of NETWORKS, or a user's own (`large_batch.networks.find`)."""
    return find(name, NETWORKS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    data_dir: str = setting("data", "Where the data sets are that Table 5 counts; none is fetched.", group="Folders")
    result_dir: str = setting("results", "Where the numbers go.", group="Folders")


def layers(model: keras.Model) -> str:
    """Return a network's layers as Appendix B writes them: [filters, height, width, stride] of a convolution, the units
    of a dense layer. Batch normalisation, ReLU and dropout are left out; "" for what is no sequence of layers."""
    words = []
    for layer in model.layers if isinstance(model, keras.Sequential) else ():
        if isinstance(layer, keras.layers.Conv2D):
            words.append(f"[{layer.filters}, {layer.kernel_size[0]}, {layer.kernel_size[1]}, {layer.strides[0]}]")
        elif isinstance(layer, keras.layers.MaxPooling2D):
            words.append(f"MaxPool({layer.pool_size[0]})")
        elif isinstance(layer, keras.layers.Dense):
            words.append(f"{layer.units}")
    counted = ((word, len(list(group))) for word, group in groupby(words))
    return ", ".join(f"{count} x {word}" if count > 1 else word for word, count in counted)


def table_1() -> tuple[Table, Table]:
    """Return Table 1 with the trainable weights of each definition, and the layers beside those of Appendix B."""
    networks = [["network", "type", "data set", "input", "classes", *(f"weights ({name})" for name in DEFINITIONS)]]
    of_layers = [["network", "according to", "layers"]]
    for network in NETWORKS.values():
        row = paper.TABLE_1.get(network.name)
        told = {f"Appendix {row.section}": row.layers} if row else {}
        weights = dict.fromkeys(DEFINITIONS, "-")
        for definition in network.definitions:
            model = network.build(definition)
            told[f"definition {definition}"] = layers(model)
            weights[definition] = f"{sum(prod(variable.shape) for variable in model.trainable_variables):,}"
        shape = " x ".join(map(str, network.input_shape))
        data = datasets.TITLES.get(network.dataset, network.dataset)
        what = [row.kind if row else "-", data, shape, f"{network.classes:,}"]
        networks.append([network.name, *what, *weights.values()])
        for words in dict.fromkeys(filter(None, told.values())):
            of = ", ".join(name for name in told if told[name] == words)
            of = of.replace("definition repository, definition paper", "both definitions")
            of_layers.append([network.name, of, words])
    return networks, of_layers


def table_5(data_dir: str) -> Table:
    """Return Table 5, and below each row what the data set holds, where it is at hand."""
    rows = [["data set", "according to", "training samples", "test samples", "features", "classes"]]
    for name, published in paper.TABLE_5.items():
        rows.append([datasets.TITLES[name], "the paper", *published.cells()])
        if datasets.at_hand(name, data_dir):
            data = datasets.load_data(name, data_dir)
            features = (data.frames.width,) if data.frames else data.x_train.shape[1:]
            found = paper.DataRow(len(data.x_train), len(data.x_test), features, data.classes)
            rows.append([datasets.TITLES[name], data.source, *found.cells()])
        else:
            rows.append([datasets.TITLES[name], "not at hand", *"----"])
    return rows


def main(settings: Settings) -> None:
    """Print the networks and the data sets beside Tables 1 and 5, and write the numbers."""
    files.check_writable(Path(settings.result_dir))
    origin, began = store.provenance(distribution.device()), time.monotonic()
    networks, of_layers = table_1()
    shown = {
        "Table 1: networks": networks,
        "Layers, a convolution as [filters, height, width, stride]": of_layers,
        "Table 5: data sets": table_5(settings.data_dir),
    }
    for title, rows in shown.items():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(title, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), sep="\n", end="\n\n")
    print("small batch: 256 samples; large batch: 10 % of the training set")
    content = {"settings": settings, "tables": shown}
    content["provenance"] = origin.after(time.monotonic() - began)
    path = Path(settings.result_dir) / "network_zoo.json"
    files.write_all({path: store.json_bytes(content)})
    print(f"\nNumbers: {path}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
