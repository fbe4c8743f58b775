"""Small networks for tests, also for processes that a test starts: nothing of pytest is imported here."""

import numpy as np

from large_batch.backend import keras
from large_batch.networks import Network
from network_zoo import classifier

# Like F1, but L-BFGS-B takes milliseconds instead of seconds
SMALL = Network("small", classifier(lambda parts: parts.dense(16)), "digits", (64,), 10)
NAME = f"{__file__}:SMALL"  # as -n takes it


def _smooth(parts):
    return [layer for _ in range(3) for layer in (*parts.dense(64)[:2], keras.layers.Activation("tanh"))]


# Rounding may put an activation on the other side of a ReLU's kink, and has none here
SMOOTH = Network("smooth", classifier(_smooth), "digits", (784,), 10)


def felt_weights(network):
    """Say of each weight whether the loss depends on it: not of a bias before batch normalisation, whose gradient is
    rounding's, of which ADAM makes steps."""
    variables = network.build().trainable_variables
    biases = [variable.name == "bias" for variable in variables[:-1]] + [False]
    return ~np.repeat(biases, [np.prod(variable.shape) for variable in variables])
