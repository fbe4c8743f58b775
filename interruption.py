"""SIGINT and SIGTERM: raised at once while nothing is at stake, or noted for work that stops where all is kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Noted:
    """The first of the signals that arrived, if any."""

    signum: int | None = None

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)  # asked twice: stop here and now, with what was last written
        self.signum = signum


def _raise(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


@contextmanager
def raised() -> Iterator[None]:
    """Within, either signal raises `Interrupted`."""
    with _handled_by(_raise):
        yield


@contextmanager
def noted() -> Iterator[Noted]:
    """Within, the first signal is only noted, for the caller to ask about; a second one raises `Interrupted`."""
    notes = Noted()
    with _handled_by(notes._handle):
        yield notes


@contextmanager
def _handled_by(handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return
    before = [signal.signal(signum, handler) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, previous in zip(SIGNALS, before, strict=True):
            signal.signal(signum, previous)
