import keras
import numpy as np
import pytest
import tensorflow as tf

from optimizers import FusedAdam

SHAPES = (40, 30), (7,), (3, 3, 2, 4)


def walk(optimizer, steps=50):
    """Variables after some steps along random gradients of very different sizes."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype(np.float32)) for shape in SHAPES]
    before = [variable.numpy() for variable in variables]
    optimizer.build(variables)
    step = tf.function(lambda gradients: optimizer.apply(gradients, variables))
    for _ in range(steps):
        size = 10.0 ** rng.uniform(-6, 1)
        step([tf.constant(size * rng.normal(size=shape), tf.float32) for shape in SHAPES])
    return np.concatenate([(v.numpy() - b).ravel() for v, b in zip(variables, before, strict=True)])


def test_the_fused_adam_is_keras_adam():
    ours, theirs = (walk(kind(1e-2, epsilon=1e-8)) for kind in (FusedAdam, keras.optimizers.Adam))
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
    assert np.linalg.norm(theirs) > 1


def test_settings_reach_the_fused_adam():
    settings = {"learning_rate": 0.03, "beta_1": 0.7, "beta_2": 0.95, "epsilon": 1e-3}
    ours, theirs = (walk(kind(**settings)) for kind in (FusedAdam, keras.optimizers.Adam))
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("variant", [{"amsgrad": True}])
def test_a_variant_that_it_does_not_compute_is_refused(variant):
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdam(**variant)
