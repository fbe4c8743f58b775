"""How far a list of jobs is, said while they are done."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from large_batch.errors import BusyError
from large_batch.files import erased, log

LOG_SECONDS = 30  # between two lines in a log file
SURE_SECONDS = 5  # of work, after which it is said how long the rest will take
LONG_SECONDS = 3600  # from which on the cheaper ways are named, too
LONG = "This takes long; cheaper: fewer --epochs, a GPU, or the same command on several machines that share --run_dir."

Report = Callable[[int, str], None]  # receives the samples evaluated since the last report, and a note


class Progress:
    """Says how far a list of jobs is, in samples evaluated by a network; one of plain training counts as three.

    A terminal has a line that changes, on which the note of the job is kept in view; elsewhere, as in a log file, there
    is a line at most every 30 seconds.
    """

    def __init__(self, work: int):
        self._total = self._left = work
        self._done, self._seconds = 0, 0.0  # of what tells the speed
        self._shown, self._long = -np.inf, False

    @contextmanager
    def job(self, samples: int, label: str) -> Iterator[Report]:
        """Yield the report function of a job of about `samples` evaluations; the share advances by just these, and not
        at all where the job is put off (`BusyError`)."""
        begun, end, last = self._left, self._left - samples, None
        self._show(label, "starts", pause=0)

        def report(done: int, note: str) -> None:
            nonlocal last
            done, now = min(done, self._left - end), time.monotonic()
            self._left -= done
            if last is not None:  # what is compiled before the first report is no measure of speed
                self._done, self._seconds = self._done + done, self._seconds + now - last
            last = now
            self._show(label, note, pause=0.5)

        try:
            yield report
        except BusyError:
            self._left = begun
            raise
        self._left = end

    def _show(self, label: str, note: str, pause: float) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not self._total or now - self._shown < (pause if terminal else LOG_SECONDS):
            return
        self._shown, head = now, f"{1 - self._left / self._total:4.0%}"
        if self._left and self._done and self._seconds > SURE_SECONDS:
            left = self._left * self._seconds / self._done
            head += f", {duration(left)} left"
            if left > LONG_SECONDS and not self._long:
                self._long = True
                log.warning(LONG)
        columns = shutil.get_terminal_size().columns - 1 if terminal else 1000
        room = columns - len(f"{head}:  {note}")
        label = label if len(label) <= room else f"{label[: max(room - 3, 0)]}..."
        line = f"{head}: {label} {note}"[:columns]
        print(f"{erased()}{line}", end="" if terminal else "\n", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        print(erased(), end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Say how long something takes, roughly."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
