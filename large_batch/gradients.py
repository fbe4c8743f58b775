"""Gradients that outlive their process: a measurement that was killed goes on at the evaluation where it was.

A maximiser that begins anew asks for the same points as before, bit for bit, and finds there what was kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from large_batch import files
from large_batch.functions import Function
from large_batch.store import Provenance

SLOW = 5.0  # seconds: what took less is sooner computed again than kept
SUM = 32  # bytes of a checksum


class KeptGradients:
    """The slow gradients of one function, each in a file of a folder that is named after its point.

    What was computed with another processor or other packages has other bits, and is not taken. `seconds` is what
    earlier processes spent on the gradients that were found. Only one process at a time may use a folder.
    """

    def __init__(self, folder: Path, origin: Provenance):
        self.seconds = 0.0
        self._own: set[Path] = set()  # whose time is counted
        self._folder, self._setting = folder, json.dumps(origin.setting, sort_keys=True).encode()

    def of(self, function: Function) -> Function:
        """Return the function, which finds its gradients here, and leaves new ones."""
        return _Kept(function, self)

    def at(self, function: Function, w: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the function's value and gradient at w, shape (n,)."""
        path = self._folder / hashlib.sha256(self._setting + w.tobytes()).hexdigest()
        if (found := _read(path)) is not None:
            if path not in self._own:
                self.seconds += found[0]
            self._own.add(path)
            return float(found[1]), found[2:]
        began = time.monotonic()
        loss, gradient = function.value_and_gradient(w)
        if (seconds := time.monotonic() - began) > SLOW:
            content = np.concatenate([[seconds, loss], gradient]).tobytes()
            files.write_all({path: hashlib.sha256(content).digest() + content})
            self._own.add(path)
        return loss, gradient

    def forget(self) -> None:
        """Delete them, once the measurement is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class _Kept:
    function: Function
    gradients: KeptGradients

    def value_and_gradient(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        return self.gradients.at(self.function, w)

    @property
    def repeats(self) -> bool:
        return getattr(self.function, "repeats", False)


def _read(path: Path) -> np.ndarray | None:
    """Return what was written, None where it is not there, or not whole."""
    with suppress(*files.NOT_A_FILE):
        content = path.read_bytes()
        if content[:SUM] == hashlib.sha256(content[SUM:]).digest():
            return np.frombuffer(content[SUM:])
