"""TensorFlow and Keras, started as this project needs them: `from large_batch.backend import keras, tf`.

Start-up messages are shown only if TensorFlow fails to start. Keras runs on TensorFlow, whatever a user has chosen for
other work; where it runs on another backend already, `layers` refuses it. oneDNN's kernels are on, which TensorFlow by
itself uses on some processors only. TensorFloat-32 is off: in it a GPU multiplies with 10 bits of mantissa, too coarse
for the perturbations that are measured here.
"""

import os
import sys
import tempfile


def _start() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ["KERAS_BACKEND"] = "tensorflow"
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

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

__all__ = ["keras", "tf"]

tf.config.experimental.enable_tensor_float_32_execution(False)
tf.get_logger().setLevel("ERROR")  # its hints on retracing are not for our users
