"""Commands import this first: until `cli.run` takes over, Ctrl-C ends them at once.

It takes a while to import the rest, in which Python would answer with a traceback from the middle of a library.
"""

import os
import signal
from contextlib import suppress
from types import FrameType


def _end(signum: int, _: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"Stopped.\n")
    os._exit(128 + signum)


signal.signal(signal.SIGINT, _end)
