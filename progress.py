"""A progress bar over a whole job."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """A progress bar over a whole job, in samples evaluated by a network.

    A trained sample counts as three: the forward and the twice as costly backward pass.
    """

    def __init__(self, work: int):
        from tqdm import tqdm

        self._bar = tqdm(
            total=work,
            disable=work == 0,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} elapsed, {remaining} left | {desc}",
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def evaluating(self, samples: int, note: str) -> None:
        """Report evaluated samples."""
        self._advance(samples, note)

    @contextmanager
    def job(self, samples: int, label: str) -> Iterator[Callable[[int, str], None]]:
        """Yield the report function of a job of about `samples` evaluations; the bar advances by just these."""
        left = samples

        def report(done: int, note: str) -> None:
            nonlocal left
            self._advance(min(done, left), f"{label} {note}")
            left -= min(done, left)

        yield report
        self._advance(left, label)

    def _advance(self, work: int, note: str) -> None:
        self._bar.set_description_str(note, refresh=False)
        self._bar.update(work)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
