import numpy as np
import pytest

from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.optimizers import FusedAdam, make

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


# The fused operation rounds beta_1 and beta_2 to float32, 6e-8 of 1, before it takes 1 - beta: 0.001 of ADAM's beta_2
# is then wrong by 6e-5.
ROUNDED_BETA = 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-2, "epsilon": 1e-8},
        {"learning_rate": 0.03, "beta_1": 0.7, "beta_2": 0.95, "epsilon": 1e-3},
    ],
)
def test_the_fused_adam_is_keras_adam(settings):
    ours, theirs = (walk(kind(**settings)) for kind in (FusedAdam, keras.optimizers.Adam))
    assert np.linalg.norm(ours - theirs) < ROUNDED_BETA * np.linalg.norm(theirs)
    assert np.linalg.norm(theirs) > 1


def test_what_it_does_not_compute_is_refused():
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdam(amsgrad=True)


def test_optimizers_by_name():
    adam = make("adam", 0.5)
    assert isinstance(adam, FusedAdam)
    assert (float(adam.learning_rate), adam.epsilon) == (0.5, 1e-8)
    with pytest.raises(UserError, match="no optimizer 'lars'; choose one of adam"):
        make("lars", 0.1)
