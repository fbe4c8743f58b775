"""Importing this module imports TensorFlow without its start-up messages, which are shown only if it fails to start.

The messages come before TensorFlow reads its log level, so they are caught at the file descriptor.
"""

import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if sys.stderr is not None:
    sys.stderr.flush()
_terminal = os.dup(2)
with tempfile.TemporaryFile() as _messages:
    os.dup2(_messages.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    except BaseException:
        _messages.seek(0)
        os.write(_terminal, _messages.read())
        raise
    finally:
        os.dup2(_terminal, 2)
        os.close(_terminal)
