"""The paper's networks as most people would port them to Keras 3: `fit` and `evaluate` on arrays, weights by
`set_weights`, the gradient by a GradientTape around each batch."""

import numpy as np
from rooms import batch_of, data_of

from large_batch.backend import keras, tf

layers = keras.layers

CHUNK = 5000


def convolutional(filters: int, size: int) -> list[keras.layers.Layer]:
    """A convolution and what follows it."""
    return [layers.Conv2D(filters, size, padding="same"), layers.BatchNormalization(), layers.ReLU()]


def dense(units: int) -> list[keras.layers.Layer]:
    """A dense layer and what follows it."""
    return [layers.Dense(units), layers.BatchNormalization(), layers.ReLU()]


def build(network: str) -> keras.Model:
    """Return F1, C1 or C2 with ordinary batch normalisation and dropout, ending in logits."""
    if network == "F1":
        shape, hidden = (784,), [layer for _ in range(5) for layer in dense(512)]
    elif network == "C1":
        blocks = [[*convolutional(64, 5), layers.MaxPooling2D(3, 2, "same")] for _ in range(2)]
        shape, hidden = (32, 32, 3), [*blocks[0], *blocks[1], layers.Flatten()]
        for units in (384, 192):
            hidden += [*dense(units), layers.Dropout(0.5)]
    else:
        shape, hidden = (32, 32, 3), []
        for count, filters in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for i in range(count):
                hidden += convolutional(filters, 3)
                if i < count - 1:
                    hidden.append(layers.Dropout(0.3 if filters == 64 else 0.4))
            hidden.append(layers.MaxPooling2D(2, 2, "same"))
        hidden += [layers.Flatten(), layers.Dropout(0.5), *dense(512), layers.Dropout(0.5)]
    return keras.Sequential([keras.Input(shape), *hidden, layers.Dense(10)])


class PlainKeras:
    """`jit_compile="auto"` is Keras' default."""

    def __init__(self, network: str, task: str, samples: int, jit_compile: bool | str = "auto"):
        data = data_of(network, samples)
        self._x, self._y = data.x_train.astype(np.float32) / 255, data.y_train
        self._model = build(network)
        self._loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        mean_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._model.compile("adam", mean_loss, metrics=["accuracy"], jit_compile=jit_compile)
        self._batch = batch_of(network, task) if task.endswith("training") else CHUNK
        self._compiled = jit_compile is not False
        self.run = {
            "loss": self._evaluate,
            "loss and gradient": self._gradient,
            "Hessian-vector product": self._product,
        }.get(task, self._train)
        self._weights = [variable.numpy() for variable in self._model.trainable_variables]
        self._slope_of, self._product_of = (
            tf.function(function, jit_compile=self._compiled) for function in (self._slope, self._curvature)
        )

    def _train(self) -> int:
        self._model.fit(self._x, self._y, batch_size=self._batch, verbose=0)
        return len(self._x)

    def _evaluate(self) -> int:
        self._model.set_weights(self._model.get_weights())
        self._model.evaluate(self._x, self._y, batch_size=self._batch, verbose=0)
        return len(self._x)

    def _slope(self, x, y):
        with tf.GradientTape() as tape:
            loss = self._loss(y, self._model(x, training=False))
        return loss, tape.gradient(loss, self._model.trainable_variables)

    def _curvature(self, x, y, v):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = self._loss(y, self._model(x, training=False))
            gradients = inner.gradient(loss, self._model.trainable_variables)
            slope = tf.add_n([tf.reduce_sum(g * part) for g, part in zip(gradients, v, strict=True)])
        return outer.gradient(slope, self._model.trainable_variables)

    def _batches(self):
        for first in range(0, len(self._x), CHUNK):
            yield tf.constant(self._x[first : first + CHUNK]), tf.constant(self._y[first : first + CHUNK])

    def _gradient(self) -> int:
        self._model.set_weights(self._model.get_weights())
        loss, total = 0.0, 0.0
        for x, y in self._batches():
            part, gradients = self._slope_of(x, y)
            loss, total = loss + float(part), total + np.concatenate([g.numpy().ravel() for g in gradients])
        return len(self._x)

    def _product(self) -> int:
        total = 0.0
        for x, y in self._batches():
            total = total + np.concatenate([g.numpy().ravel() for g in self._product_of(x, y, self._weights)])
        return len(self._x)
