"""A network like F1, but small: in the tests of whole commands L-BFGS-B then takes milliseconds instead of seconds."""

from large_batch.networks import Network
from network_zoo import classifier

SMALL = Network("small", classifier(lambda parts: parts.dense(16)), "digits", (64,), 10)
NAME = f"{__file__}:SMALL"  # as -n takes it
