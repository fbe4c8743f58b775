"""Importing this module imports TensorFlow without its start-up messages, which are shown only if it fails to start.

It also turns on oneDNN's kernels, which TensorFlow by itself uses on some processors only, and turns off
TensorFloat-32, in which a GPU would multiply float32 matrices with 10 bits of mantissa: too coarse for the
perturbations that are measured here.
"""

import os
import sys
import tempfile


def _start() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever a user has chosen for other work
    try:
        terminal = os.dup(2)
    except OSError:  # standard error is closed, so nothing will be shown anyway
        return
    # Some messages come before TensorFlow reads its log level, so they are caught at the file descriptor.
    sys.stderr.flush()
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except Exception:
            messages.seek(0)
            os.write(terminal, messages.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


_start()

import tensorflow as tf  # noqa: E402

tf.config.experimental.enable_tensor_float_32_execution(False)
tf.get_logger().setLevel("ERROR")  # its hints on retracing are not for our users
