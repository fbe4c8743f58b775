"""The data of an objective: any arrays, trees of them, or a `tf.data.Dataset`, in memory and in pieces."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from large_batch.backend import keras, tf
from large_batch.errors import UserError

Tree = Any  # an array, or a dictionary, list or tuple of trees


@dataclass(frozen=True, eq=False)
class Samples:
    """Data in memory: x, labels y and sample weights are arrays, or trees of them, with one row a sample, or None."""

    x: Tree
    y: Tree
    weights: Tree

    @classmethod
    def read(cls, x: Tree | tf.data.Dataset, y: Tree = None, weights: Tree = None) -> Samples:
        """Return samples of arrays, or of all batches of a finite `tf.data.Dataset` of x, (x, y) or (x, y, weights)."""
        if isinstance(x, tf.data.Dataset):
            if y is not None or weights is not None:
                raise UserError("A tf.data.Dataset brings its labels and sample weights; give it alone.")
            x, y, weights = _all_batches(x)
        samples = cls(*(keras.tree.map_structure(_array, tree) for tree in (x, y, weights)))
        sizes = {len(leaf) if leaf.ndim else 0 for leaf in samples._leaves()}
        if len(sizes) != 1 or sizes == {0}:
            shapes = [str(leaf.shape) for leaf in samples._leaves()]
            more = ", and more: a list counts as several inputs" if len(shapes) > 6 else ""
            raise UserError(
                "Samples, labels and sample weights must be arrays with one row a sample, as many in each; they "
                f"have the shapes {', '.join(shapes[:6]) or 'none'}{more}."
            )
        numbers = [leaf for leaf in keras.tree.flatten((samples.x, samples.weights)) if _is_float(leaf)]
        if not all(np.isfinite(leaf).all() for leaf in numbers):  # a ReLU may make a NaN 0
            raise UserError("The samples hold NaN or infinite values; leave them out, or say what they shall be.")
        return samples

    def _leaves(self) -> list[np.ndarray]:
        return [leaf for leaf in keras.tree.flatten((self.x, self.y, self.weights)) if leaf is not None]

    def __len__(self) -> int:
        return len(keras.tree.flatten(self.x)[0])

    def rows(self, first: int, last: int) -> Samples:
        """Return some of them."""
        trees = (self.x, self.y, self.weights)
        return Samples(*keras.tree.map_structure(lambda leaf: None if leaf is None else leaf[first:last], trees))

    def twice(self) -> Samples:
        """Return them, and all of them again."""
        trees = (self.x, self.y, self.weights)
        return Samples(*keras.tree.map_structure(lambda leaf: _joined(leaf, leaf), trees))

    def pieces(self, count: int) -> list[Samples]:
        """Return them in near-equal pieces."""
        places = np.array_split(np.arange(len(self)), count)
        return [self.rows(int(piece[0]), int(piece[-1]) + 1) for piece in places]

    def tensors(self) -> tuple[Tree, Tree, Tree]:
        """Return x, y and weights as trees of tensors."""
        return keras.tree.map_structure(
            lambda leaf: None if leaf is None else tf.constant(leaf), (self.x, self.y, self.weights)
        )


def _is_float(leaf: np.ndarray | None) -> bool:
    return leaf is not None and leaf.dtype.kind == "f"


def _array(leaf: Any) -> np.ndarray | None:
    if leaf is None:
        return None
    try:
        return np.asarray(leaf)
    except Exception as error:  # ragged and sparse tensors, generators
        raise UserError(f"Samples must be arrays or a tf.data.Dataset of dense tensors: {error}.") from error


def _all_batches(dataset: tf.data.Dataset) -> tuple[Tree, Tree, Tree]:
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise UserError("The tf.data.Dataset has no end; give one that ends, as with take().")
    try:
        batches = [keras.utils.unpack_x_y_sample_weight(batch) for batch in dataset.as_numpy_iterator()]
        x, y, weights = keras.tree.map_structure(_joined, *batches) if batches else (None,) * 3
    except (TypeError, ValueError) as error:
        raise UserError(f"The tf.data.Dataset must have batches of dense tensors: {error}.") from error
    size = sum(leaf.nbytes for leaf in keras.tree.flatten((x, y, weights)) if leaf is not None)
    logging.getLogger("large_batch_training").info("The dataset is read into memory: %.0f MB.", size / 1e6)
    return x, y, weights


def _joined(*parts: np.ndarray | None) -> np.ndarray | None:
    return None if parts[0] is None else np.concatenate(parts)
