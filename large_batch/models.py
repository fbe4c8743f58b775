"""Any Keras model as a function: called as it likes, at full precision, twice differentiable; its weights and files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from large_batch import files
from large_batch.backend import keras, tf
from large_batch.errors import UserError, first_line
from large_batch.functions import Point
from large_batch.layers import call, flat_weights, penalty, sees_the_batch
from large_batch.samples import Samples, Tree

HALF = {"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}


def call_twice(model: keras.Model, samples: Samples, prepare: Callable[[Tree], Tree]) -> Tree:
    """Return the outputs for a few samples; raises `UserError` unless the model takes them, in full precision, and has
    the same outputs for them a second time."""
    x = prepare(samples.tensors()[0])
    try:
        outputs = call(model, x)
    except Exception as error:  # Keras raises nearly anything for samples of another shape or type
        shapes = keras.tree.map_structure(lambda leaf: leaf.shape[1:], samples.x)
        raise UserError(f"The model does not take samples of the shape {shapes}: {first_line(error)}") from error
    types = {layer.compute_dtype for layer in model._flatten_layers()} | {each.dtype for each in model.variables}
    if half := sorted(types & HALF):
        raise UserError(f"The model must compute in float32 or float64; sharpness is finer than {half[0]} resolves.")
    if not model.trainable_variables:
        raise UserError("The model has no trainable weights.")
    with _state_kept(model):
        again = call(model, x)
    for one, other in zip(keras.tree.flatten(outputs), keras.tree.flatten(again), strict=True):
        if not np.allclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True):
            raise UserError(
                "The model gives other outputs each time it is called with training=False; take out the layer that "
                "draws random numbers at inference."
            )
    return outputs


@contextmanager
def _state_kept(model: keras.Model) -> Iterator[None]:
    """Within, calls of a model move what is not trained, such as the seeds of random layers; then it is as before."""
    before = [np.asarray(variable) for variable in model.non_trainable_variables]
    yield
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        if not np.array_equal(variable, value, equal_nan=value.dtype.kind == "f"):
            variable.assign(value)


def adds_means(model: keras.Model, samples: Samples, prepare: Callable[[Tree], Tree]) -> bool:
    """Say whether what the layers add to the loss (`add_loss`) is a mean over the samples, by trying a few of them.

    The mean over two parts is that over both; where the parts have other batch statistics, that over all samples twice.
    """
    constant = sum(variable.regularizer is not None for variable in model.trainable_variables)  # the last of losses
    cut = len(samples) // 3
    if not cut or len(model.losses) == constant:
        return True

    def added(part: Samples) -> float:
        call(model, prepare(part.tensors()[0]))
        return float(penalty(model.losses[: len(model.losses) - constant], tf.float64))

    with _state_kept(model):
        whole = added(samples)
        if sees_the_batch(model):
            mean = added(samples.twice())
        else:
            parts = [samples.rows(0, cut), samples.rows(cut, len(samples))]
            mean = sum(len(part) * added(part) for part in parts) / len(samples)
    return bool(np.isclose(mean, whole, rtol=1e-4, atol=1e-9, equal_nan=True))


def bytes_of(graph: tf.Graph, samples: int, time_steps: int, itemsize: int) -> float:
    """Return about what a sample takes in memory: all tensors of a graph, traced for so many samples, that hold any.

    What a loop computes counts `time_steps` times. A gradient was seen to take 0.6 of it, and a
    Hessian-vector product 1.8 times as much (two convolutions with normalisations, on the CPU).
    """
    definition = graph.as_graph_def(add_shapes=True)

    def size(nodes: Any) -> int:
        shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
        counts = [prod(dim.size for dim in shape.dim) for shape in shapes if not shape.unknown_rank]
        return sum(count for count in counts if count > 0 and count % samples == 0)

    loops = sum(size(function.node_def) for function in definition.library.function)
    return itemsize * (size(definition.node) + time_steps * loops) / samples


@contextmanager
def differentiable_moments() -> Iterator[None]:
    """Within, `tf.nn.moments`, which Keras' normalisation layers call, has second derivatives.

    TensorFlow's stops the gradient at the mean within the variance. That is right for a gradient, where it is zero,
    and wrong for the Hessian, where it is not.
    """

    def moments(x, axes, shift=None, keepdims=False, name=None):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
        return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))

    stopping = tf.nn.moments
    tf.nn.moments = moments
    try:
        yield
    finally:
        tf.nn.moments = stopping


@contextmanager
def in_float64(model: keras.Model, loss: Any) -> Iterator[tuple[keras.Model, Any]]:
    """Yield copies of a model and a loss that compute in float64; whatever is made within computes in float64, too."""

    def widened(node: Any) -> Any:
        if isinstance(node, dict):
            wide = {key: "float64" for key in ("dtype", "name") if node.get(key) == "float32"}  # of a layer, a policy
            return {key: widened(value) for key, value in node.items()} | wide
        return [widened(part) for part in node] if isinstance(node, list | tuple) else node

    def wide_loss(one: Any) -> Any:
        if not isinstance(one, keras.losses.Loss):
            return one
        return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(one))

    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        config = widened(keras.saving.serialize_keras_object(model))
        wide = keras.saving.deserialize_keras_object(config, safe_mode=False)
        for variable, value in zip(wide.variables, model.variables, strict=True):
            variable.assign(np.asarray(value))
        if any(layer.compute_dtype == "float32" for layer in wide._flatten_layers()):
            raise TypeError("a layer that insists on float32")
        yield wide, keras.tree.map_structure(wide_loss, loss)
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def read_weights(model: keras.Model, path: str | Path) -> Point:
    """Load a Keras `.weights.h5` file into the model and return the minimizer in it: weights and state.

    The model has these weights from then on. Raises `UserError` where the file is missing, damaged, of another network,
    or not finite, and where layers of the model have LoRA enabled.
    """
    if not os.path.isfile(path):  # unlike pathlib's, false for any name that cannot be one of a file
        raise UserError(f"There is no weights file {path}.")
    if str(path).endswith(".keras"):
        raise UserError(f"{path} holds a whole model; keras.models.load_model reads it, and point_of its weights.")
    if not str(path).endswith(".weights.h5"):
        raise UserError(f"{path} is not named as Keras names weights, *.weights.h5; rename it if it is such a file.")
    if any(getattr(layer, "lora_enabled", False) for layer in model._flatten_layers()):
        raise UserError(
            f"Keras merges LoRA's factors into the weights that it writes, so {path} has another point than the model "
            "had; measure the model in memory (point_of)."
        )
    try:
        model.load_weights(path)
    except (OSError, RuntimeError) as error:  # HDF5 raises either
        raise UserError(
            f"{path} cannot be read as a Keras .weights.h5 file: it is damaged or of another kind."
        ) from error
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} does not hold the weights of this {model.name}; give the file of such a network."
        ) from error
    more = _count(path) - sum(prod(variable.shape) for variable in [*model.variables, *model.metrics_variables])
    if more > 0:  # Keras takes what it looks for, and says nothing of the rest
        raise UserError(
            f"{path} holds {more:,} numbers more than this {model.name} has; give the file of such a network."
        )
    point = point_of(model)
    floats = [array for array in (point.weights, *point.state) if array.dtype.kind == "f"]
    if not all(np.isfinite(array).all() for array in floats):
        raise UserError(f"{path} holds weights that are not finite numbers.")
    return point


def _count(path: str | Path) -> int:
    """Return how many numbers a weights file holds, but for an optimizer's."""
    sizes = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, node: sizes.update({name: getattr(node, "size", 0)}))
    return sum(size for name, size in sizes.items() if "optimizer" not in name)


def point_of(model: keras.Model) -> Point:
    """Return where a model is: its trainable weights, and the state that goes with them."""
    return Point(flat_weights(model), [np.array(variable) for variable in model.non_trainable_variables])


def write_weights(model: keras.Model, path: str | Path) -> None:
    """Write the model's weights as a Keras `.weights.h5` file, whole or not at all."""
    with files.writing(path) as temporary:
        files.check_space(temporary.parent, 4 * model.count_params() + 2**18)  # HDF5 may crash where a disk is full
        model.save_weights(temporary)


def digest(weights: np.ndarray, state: Collection[np.ndarray] = ()) -> str:
    """Return what tells minimizers apart: the SHA-256 of the weights, (n,), in float32, and of the other state."""
    text = weights.astype(np.float32).tobytes() + b"".join(array.tobytes() for array in state)
    return hashlib.sha256(text).hexdigest()
