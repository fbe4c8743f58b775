"""What ordinary batch normalisation, with its moving averages, is at weights that no training has passed.

The statistics belong to weights: those that training has gathered fit its minimizer only. Three policies:

- "interpolate": the minimizer's own; between two minimizers they are mixed like the weights, beyond them those of the
  nearer one.
- "batch": those of the current batch, as in the paper's networks, so that the weights alone determine the function.
- "recalibrate": estimated anew at each point, over the whole training set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.layers import BatchStatisticsNormalization


def normalisations(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Return the layers with moving averages, in their order."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def kept(model: keras.Model, state: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return what of a state is no moving average: all that a model `of_the_batch` has."""
    moving = {id(v) for layer in normalisations(model) for v in (layer.moving_mean, layer.moving_variance)}
    pairs = zip(model.non_trainable_variables, state, strict=True)
    return [array for variable, array in pairs if id(variable) not in moving]


class _OfTheBatch(BatchStatisticsNormalization):
    """Takes whatever Keras' layer is called with."""

    def call(self, x, training=None, mask=None):
        return super().call(x)


def of_the_batch(model: keras.Model) -> keras.Model:
    """Return a copy that normalises by the batch's statistics, its trainable variables in the same order.

    Raises `UserError` where the layers do not stand in a list or graph, or normalise in another way.
    """

    def copied(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, keras.layers.BatchNormalization):
            if normalisations(layer):
                raise ValueError(f"{layer.name} has a normalisation within it")
            return layer.__class__.from_config(layer.get_config())
        if not (layer.scale and layer.center and layer.axis in (-1, len(layer.input.shape) - 1) and layer.trainable):
            raise ValueError(f"{layer.name} is not trained with scale and centre over the last axis")
        return _OfTheBatch(layer.epsilon, name=layer.name, dtype=layer.dtype_policy)

    try:
        copy = keras.models.clone_model(model, clone_function=copied)
    except (ValueError, AttributeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"Statistics of the batch are for networks whose layers stand in a list or graph ({error}); use "
            "--statistics=interpolate."
        ) from error
    others = kept(model, [np.asarray(variable) for variable in model.non_trainable_variables])
    for variable, array in zip(copy.non_trainable_variables, others, strict=True):
        variable.assign(array)
    return copy


class Estimator:
    """Estimates moving averages at any weights: mean and variance over a whole set, which is passed in chunks.

    What comes before a layer is normalised by the statistics of the chunk.
    """

    def __init__(
        self,
        model: keras.Model,
        copy: keras.Model,
        x: np.ndarray,
        chunk: int,
        prepare: Callable[[tf.Tensor], tf.Tensor],
    ):
        """Take a model, its copy `of_the_batch`, the samples of a set, how many of them to pass at once, and what makes
        of such a tensor what the model receives."""
        self._model, self._copy = model, copy
        self._pieces = np.array_split(x, -(-len(x) // chunk))
        self._prepare = prepare
        layers = [self._copy.get_layer(layer.name) for layer in normalisations(model)]
        self._before = keras.Model(self._copy.inputs, [layer.input for layer in layers])
        self._last: tuple[np.ndarray, list[np.ndarray]] | None = None

    def state(self, w: np.ndarray) -> list[np.ndarray]:
        """Return the state at the flat weights w, (n,): the model's own, but for the moving averages."""
        if self._last is None or not np.array_equal(self._last[0], w):
            self._last = w.copy(), self._estimated(w)
        return self._last[1]

    def _estimated(self, w: np.ndarray) -> list[np.ndarray]:
        # From the moments of the chunks to those of the set, in float64
        count, values = 0, {}
        sums = [[0.0, 0.0] for _ in normalisations(self._model)]
        for piece in self._pieces:
            count += len(piece)
            moments = self._moments(tf.constant(w, tf.float32), tf.constant(piece))
            for of_layer, (mean, variance) in zip(sums, moments, strict=True):
                mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
                of_layer[0] += len(piece) * mean
                of_layer[1] += len(piece) * (variance + mean**2)
        for layer, (first, second) in zip(normalisations(self._model), sums, strict=True):
            values[id(layer.moving_mean)] = first / count
            values[id(layer.moving_variance)] = np.maximum(second / count - (first / count) ** 2, 0)
        variables = self._model.non_trainable_variables
        return [np.asarray(values.get(id(v), v)).astype(v.dtype) for v in variables]

    @tf.function
    def _moments(self, w, x):
        variables = self._copy.trainable_variables
        parts = tf.split(w, [int(np.prod(variable.shape)) for variable in variables])
        values = [(v, tf.reshape(part, v.shape)) for v, part in zip(variables, parts, strict=True)]
        with keras.StatelessScope(values):
            before = self._before(self._prepare(x), training=False)
        return [tf.nn.moments(tensor, list(range(tensor.shape.rank - 1))) for tensor in keras.tree.flatten(before)]
