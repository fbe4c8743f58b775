"""How work ends early: errors with a remedy, and signals (see `cli.run`)."""

import difflib
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(ValueError):
    """A request that cannot be met as asked; the message is one sentence with the remedy (exit code 2)."""


class NotFiniteError(UserError):
    """A loss that is no finite number at a minimizer, or near it."""


def no_such(kind: str, name: str, choices: Iterable[str], more: str = "") -> UserError:
    """Return the error of a name that does not exist, with the one that it resembles and what may be chosen."""
    by_word = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(name.casefold(), by_word, n=1)
    meant = f" (did you mean {by_word[near[0]]}?)" if near else ""
    return UserError(f"There is no {kind} '{name}'{meant}; choose one of {', '.join(by_word.values())}{more}.")


class MachineError(RuntimeError):
    """A machine that failed a sound request: no source answers, a full disk, a diverging training (exit code 1)."""


class BusyError(RuntimeError):
    """Another process is doing just this; the message says which."""


def first_line(error: Exception) -> str:
    """Return what an error says, in short: of Keras' the line after that which names the layer."""
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if line and not line.startswith("Exception encountered")), lines[0])


class Interrupted(KeyboardInterrupt):  # noqa: N818, after its parent
    """SIGINT or SIGTERM, noticed where everything is kept; the message says how to continue (exit code 130 or 143)."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


class Signals:
    """The first of the signals that arrived, if any."""

    first: int | None = None

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.first = self.first or signum  # a second one shall not lose what is about to be kept


@contextmanager
def signals_raised() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise `Interrupted`: nothing is at stake. They are acknowledged at once."""

    def interrupt(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled_by(interrupt), _acknowledged():
        yield


@contextmanager
def signals_noted() -> Iterator[Signals]:
    """Within, signals are only noted, for work that stops where all is kept."""
    signals = Signals()
    with _handled_by(signals._note):
        yield signals


@contextmanager
def _acknowledged() -> Iterator[None]:
    """Within, a thread says that a signal has arrived, also while TensorFlow computes and no handler can run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def say() -> None:
        words = b"\nStopping: what is in hand comes to its end or is kept first.\n"
        while arrived := os.read(reading, 1):
            if arrived[0] in SIGNALS:
                with suppress(OSError):  # standard error may be closed
                    os.write(2, words)
                words = b"\nStopping already.\n"

    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # ends the thread
        thread.join()
        os.close(reading)


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
