"""Losses, accuracies and sharpness by epoch as event files, which TensorBoard shows: a run a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from large_batch.backend import tf
from large_batch.training import Epoch


class Scalars:
    """Writes below a folder. Made by hand, since `tf.summary.scalar` needs TensorBoard to be installed."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._epochs: dict[str, tuple[Any, int]] = {}  # by run: the writer, and how many epochs it has written

    def epochs(self, run: str, history: list[Epoch]) -> None:
        """Write the epochs that this process has not written yet, and delete what another began to write of the run."""
        if run not in self._epochs:
            for path in (self._folder / run).glob("*.epochs"):
                path.unlink(missing_ok=True)
            self._epochs[run] = self._writer(run, ".epochs"), 0
        writer, written = self._epochs[run]
        for row in history[written:]:
            for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
                if (value := getattr(row, name)) is not None:
                    _write(writer, "/".join(reversed(name.split("_"))), row.epoch, value)
        writer.flush()
        self._epochs[run] = writer, len(history)

    def sharpness(self, run: str, epoch: int, name: str, how: str, value: float | None) -> None:
        """Write a measurement at the iterate after an epoch, in percent, unless that is written or not resolved.

        `name` is that of the request, and `how` it measures.
        """
        if value is None or list((self._folder / run).glob(f"*.{name}")):
            return
        writer = self._writer(run, f".{name}")
        _write(writer, f"sharpness/{how}", epoch, value)
        writer.close()

    def _writer(self, run: str, suffix: str) -> Any:
        return tf.summary.create_file_writer(str(self._folder / run), filename_suffix=suffix)


def _write(writer: Any, tag: str, step: int, value: float) -> None:
    with writer.as_default():
        tf.raw_ops.WriteScalarSummary(writer=writer._resource, step=step, tag=tag, value=value)
