"""Functions that do not keep their word, and the Hessians of layers that are not ours."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_foreign_models import L, X, Y, scaled, sequential

from large_batch import functions
from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.models import in_float64
from large_batch.objective import Objective, flat_weights
from large_batch.sharpness_metric import curvature, sharpness
from large_batch.subspace import RandomSubspace

RNG = np.random.default_rng(0)


def normalizing(layer):
    return scaled(L.Reshape((8, 8)), L.Dense(6), layer, L.Activation("tanh"), L.Flatten(), L.Dense(10))


@keras.saving.register_keras_serializable("tests")
class TrainingNormalization(L.BatchNormalization):
    """Batch statistics at inference, too."""

    def call(self, x, training=None, mask=None):
        return super().call(x, training=True)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.LayerNormalization(),
        lambda: L.LayerNormalization(axis=[1, 2]),
        lambda: L.GroupNormalization(2),
        lambda: L.GroupNormalization(-1),
        lambda: L.RMSNormalization(),
        lambda: L.UnitNormalization(),
        lambda: L.BatchNormalization(),
        lambda: TrainingNormalization(),
        lambda: L.Normalization(mean=0.5, variance=2.0),
        lambda: L.MultiHeadAttention(2, 3),
        lambda: L.LSTM(4, return_sequences=True),
        lambda: L.GRU(4, return_sequences=True),
        lambda: L.Conv1D(4, 3, activation="silu"),
        lambda: L.SpectralNormalization(L.Dense(6)),
    ],
    ids=[
        *("layer", "two axes", "group", "instance", "rms", "unit", "batch", "batch statistics", "fixed"),
        *("attention", "lstm", "gru", "conv", "spectral"),
    ],
)
def test_hessian_vector_products_through_layers(layer):
    """Against differences of gradients of a float64 copy."""
    layer = layer()
    if isinstance(layer, L.MultiHeadAttention):
        inner, h = layer, keras.Input((8, 6))
        layer = keras.Model(h, inner(h, h))
    model = normalizing(layer)
    objective = Objective(model, X, Y, outputs="logits")
    w, v = flat_weights(model), RNG.normal(size=objective.size)
    with in_float64(model, None) as (wide, _):
        exact = Objective(wide, X, Y, outputs="logits")
        slopes = [exact.value_and_gradient(w + step * v)[1] for step in (1e-5, -1e-5)]
    expected = (slopes[0] - slopes[1]) / 2e-5
    found = objective.hessian_vector_product(w, v)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    functions.check_product(objective, w)


@keras.saving.register_keras_serializable("tests")
class Stopping(L.Layer):
    """Centres its input, but lets no gradient through the mean."""

    def call(self, x):
        return x - tf.stop_gradient(tf.reduce_mean(x, axis=-1, keepdims=True))


class Unregistered(keras.Model):
    """A model that cannot be copied."""

    def __init__(self, layers):
        super().__init__()
        self.parts = layers

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_a_stopped_gradient_is_found(caplog):
    wrong = [L.Dense(12, "tanh"), Stopping(), L.Dense(10)]
    for model in (sequential(*wrong), Unregistered([L.Dense(12, "tanh"), Stopping(), L.Dense(10)])):
        objective = Objective(model, X / 16, Y)
        with pytest.raises(UserError, match="% away from the difference of two gradients: a layer or the loss stops"):
            curvature(objective, flat_weights(model), 1e-3, RandomSubspace(objective.size, 3))
    right = Unregistered([L.Dense(12, "tanh"), L.GroupNormalization(3), L.Dense(10)])
    objective = Objective(right, X / 16, Y)
    assert objective.exact(flat_weights(right)) is None
    functions.check_product(objective, flat_weights(right))
    assert caplog.text == ""


def test_kinks_do_not_mislead(caplog):
    model = scaled(L.Dense(300, "relu"), L.Dense(300, "relu"), L.Dense(10))
    functions.check_product(Objective(model, X, Y), flat_weights(model))
    assert caplog.text == "", "it is checked"


def test_a_product_that_no_difference_tells_anything_of_is_said_to_be_unchecked(caplog):
    class Rough:
        def value_and_gradient(self, w):
            return 0.0, np.sin(1e12 * w)

        def hessian_vector_product(self, w, v):
            return v

    functions.check_product(Rough(), np.ones(5))
    assert "cannot be checked" in caplog.text


def test_a_layer_without_second_derivatives():
    model = sequential(
        L.Reshape((8, 8, 1)), L.Conv2D(2, 3), L.UpSampling2D(interpolation="bicubic"), L.Flatten(), L.Dense(10)
    )
    objective = Objective(model, X / 16, Y)
    w = flat_weights(model)
    with pytest.raises(UserError, match="no second derivatives of Resize"):
        objective.hessian_vector_product(w, w)
    assert sharpness(objective, w, 1e-3).value > 0


def test_what_a_function_must_keep():
    class Given:
        def __init__(self, *answer):
            self.answer = answer

        def value_and_gradient(self, w):
            return self.answer

    class Noisy:
        def value_and_gradient(self, w):
            return RNG.normal(), w

    w = np.ones(5)
    for function, words in (
        (Given(1.0, w[:, None]), r"floats of the shape \(5,\), not float64 of the shape \(5, 1\)"),
        (Given(1.0, w.astype(int)), "not int64"),
        (Given(w, w), "one real number, not float64"),
        (Given(1j, w), "one real number, not complex128"),
        (Given(1.0), "does not return two things"),
        (Noisy(), "the next time; make it deterministic"),
    ):
        with pytest.raises(UserError, match=words):
            sharpness(function, w, 1e-3)
    assert sharpness(Given(np.float32(1), w.astype(np.float32)), w, 1e-3).value is None

    asked = SimpleNamespace(
        value=lambda at: at.state,
        value_and_gradient=lambda at: at.state,
        hessian_vector_product=lambda at, v: at.state,
    )
    held = functions.Point(w, ["state"]).hold(asked)
    assert [held.value(w), held.value_and_gradient(w), held.hessian_vector_product(w, w)] == [["state"]] * 3

    class Mistaken:
        def value_and_gradient(self, w):
            return np.ones((2, 3)) @ w, w

    with pytest.raises(ValueError, match="matmul"):  # its own
        sharpness(Mistaken(), w, 1e-3)
