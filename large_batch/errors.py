"""How work ends early: errors with a remedy, and signals (see `cli.run`)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(ValueError):
    """A request that cannot be met as asked; the message is one sentence with the remedy (exit code 2)."""


class MachineError(RuntimeError):
    """A machine that failed a sound request: no source answers, a full disk, a diverging training (exit code 1)."""


class BusyError(RuntimeError):
    """Another process is doing just this; the message says which."""


def first_line(error: Exception) -> str:
    """Return what an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Interrupted(KeyboardInterrupt):  # noqa: N818, after its parent
    """SIGINT or SIGTERM, noticed where everything is kept; the message says how to continue (exit code 130 or 143)."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


class Signals:
    """The first of the signals that arrived, if any."""

    first: int | None = None

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.first is not None:
            raise Interrupted(signum)  # asked twice: stop here and now, with what was last written
        self.first = signum


@contextmanager
def signals_raised() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise `Interrupted`: nothing is at stake."""

    def interrupt(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled_by(interrupt):
        yield


@contextmanager
def signals_noted() -> Iterator[Signals]:
    """Within, the first signal is only noted, for work that stops where all is kept; a second one raises."""
    signals = Signals()
    with _handled_by(signals._note):
        yield signals


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
