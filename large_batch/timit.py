"""TIMIT's frames from a Kaldi directory, which the user brings: the corpus is licensed.

The directory has `train/` and `test/`, each with `feats.scp` and the alignment as pdf ids, `ali-pdf*` (.gz, .ark or
plain), and, if the statistics of speakers are to be applied as `apply-cmvn` does, `cmvn.scp`, `utt2spk`, and the
options of a Kaldi model directory in `cmvn_opts` (`--norm-means`, `--norm-vars`). Archives may be text or binary, their
matrices compressed. Pipes are refused, and so is whatever kaldiio would read beside Kaldi's own formats (sound,
pickles).

A sample is a frame with its four neighbours on both sides, spliced as `splice-feats --left-context=4 --right-context=4`
does: at the edges of an utterance its first or last frame is repeated. Only the frames are stored, and for each sample
the numbers of its nine frames.
"""

import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

CONTEXT = 4  # frames on each side
NUMBERS = 40  # of a frame
NAMED = 3  # dropped utterances that are named
SMALLEST_VARIANCE = 1e-20  # as in Kaldi
CMVN_OPTIONS = {f"--norm-{what}{value}" for what in ("means", "vars") for value in ("", "=true", "=false")}
PLACE = re.compile(r"(.+?)(?::(\d+))?(?:\[(\d+):(\d+)\])?")  # file:offset[first row:last row] in an .scp


@dataclass(frozen=True, eq=False)
class Frames:
    """The numbers of all frames, float32 of shape (n, k), of which samples are windows: rows of frame numbers."""

    numbers: np.ndarray

    @property
    def width(self) -> int:
        """Numbers of a spliced sample."""
        return (2 * CONTEXT + 1) * self.numbers.shape[1]

    @cached_property
    def on_device(self):
        """The numbers as a tensor, made once."""
        from large_batch.backend import tf

        with tf.init_scope():  # an ordinary tensor, also when first asked for within a function that is traced
            return tf.constant(self.numbers)

    def splice(self, windows):
        """Return the samples of windows, (m, 9), as a tensor of shape (m, 9 k)."""
        from large_batch.backend import tf

        return tf.reshape(tf.gather(self.on_device, windows), [-1, self.width])


@dataclass(frozen=True, eq=False)
class Kaldi:
    """What a directory holds: frames of both halves, the windows (n, 9) and labels (n,) of each, and a summary."""

    frames: Frames
    windows: tuple[np.ndarray, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray]
    summary: str


def is_there(folder: Path) -> bool:
    """Say whether a folder seems to be such a directory."""
    return (folder / "train" / "feats.scp").is_file()


def load(folder: Path) -> Kaldi:
    """Read a directory; raises ValueError with a clause that says what is wrong, or OSError."""
    numbers, windows, labels, notes, first = [], [], [], [], 0
    for half in ("train", "test"):
        matrices, pdfs, dropped = _half(folder / half)
        lengths = np.array([len(matrix) for matrix in matrices])
        windows.append(_windows(lengths) + np.int32(first))
        first += int(lengths.sum())
        numbers += matrices
        labels.append(np.concatenate(pdfs))
        notes.append(f"{half}: {len(lengths):,} utterances, {lengths.sum():,} frames, {_said(dropped)}")
    return Kaldi(Frames(np.concatenate(numbers)), (*windows,), (*labels,), "; ".join(notes))


def _windows(lengths: np.ndarray) -> np.ndarray:
    """The frame numbers of each sample's window, int32 of shape (n, 9), for utterances of these lengths in a row."""
    ends = np.cumsum(lengths)
    first, last = (np.repeat(bound, lengths)[:, None] for bound in (ends - lengths, ends - 1))
    places = np.arange(ends[-1])[:, None] + np.arange(-CONTEXT, CONTEXT + 1)
    return np.clip(places, first, last).astype(np.int32)


def _said(dropped: dict[str, str]) -> str:
    if not dropped:
        return "none dropped"
    counts = [f"{count:,} {reason}" for reason, count in Counter(dropped.values()).items()]
    names = ", ".join(list(dropped)[:NAMED]) + (", ..." if len(dropped) > NAMED else "")
    return f"{len(dropped):,} dropped ({', '.join(counts)}: {names})"


def _half(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, str]]:
    """The matrices and pdf ids of the utterances in their order, and why others are dropped."""
    alignments: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("ali-pdf*")):
        alignments |= dict(_archive(path))
    if not alignments:
        raise ValueError(f"{folder} has no alignment ali-pdf.*.gz or ali-pdf.ark; make one with Kaldi's ali-to-pdf")
    normalise = _normalisation(folder)
    matrices, pdfs, dropped = [], [], {}
    for utterance, matrix in _scp(folder / "feats.scp"):
        if matrix.ndim != 2 or matrix.shape[1] != NUMBERS:
            raise ValueError(f"{utterance} in {folder} has the shape {matrix.shape} instead of (frames, {NUMBERS})")
        ids, matrix = alignments.get(utterance), normalise(utterance, matrix.astype(np.float32))
        if ids is None:
            dropped[utterance] = "without an alignment"
        elif matrix is None:
            dropped[utterance] = "without CMVN statistics"
        elif len(ids) != len(matrix):
            dropped[utterance] = "with an alignment of another length"
        else:
            matrices.append(matrix)
            pdfs.append(ids)
    if not matrices:
        raise ValueError(f"{folder} has no utterance to use: {_said(dropped)}")
    return matrices, pdfs, dropped


def _normalisation(folder: Path) -> Callable[[str, np.ndarray], np.ndarray | None]:
    """What `apply-cmvn` does to an utterance's matrix; None of it where there are no statistics for the utterance."""
    if not (folder / "cmvn.scp").is_file():
        return lambda utterance, matrix: matrix
    statistics, speakers = dict(_scp(folder / "cmvn.scp")), folder / "utt2spk"
    speaker = dict(line.split() for line in speakers.read_text().splitlines()) if speakers.is_file() else {}
    options = (folder / "cmvn_opts").read_text().split() if (folder / "cmvn_opts").is_file() else []
    if unknown := set(options) - CMVN_OPTIONS:
        raise ValueError(f"{folder / 'cmvn_opts'} has {min(unknown)}; known are {', '.join(sorted(CMVN_OPTIONS))}")

    def normalise(utterance: str, matrix: np.ndarray) -> np.ndarray | None:
        sums = statistics.get(speaker.get(utterance, utterance))
        if sums is None:
            return None
        if sums.shape != (2, NUMBERS + 1):
            raise ValueError(f"the CMVN statistics of {utterance} have the shape {sums.shape}, not (2, {NUMBERS + 1})")
        if "--norm-means=false" in options:
            return matrix
        mean, square = sums[:, :-1].astype(np.float64) / sums[0, -1]
        if {"--norm-vars=true", "--norm-vars"} & {*options}:
            return ((matrix - mean) / np.sqrt(np.maximum(square - mean**2, SMALLEST_VARIANCE))).astype(np.float32)
        return (matrix - mean).astype(np.float32)

    return normalise


def _archive(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The utterances and pdf ids of an archive, which may be packed."""
    from kaldiio import matio

    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    file = io.BytesIO(content)
    while utterance := matio.read_token(file):
        ids = _object(file, f"{utterance} in {path}")
        if ids.ndim != 1 or ids.dtype.kind != "i":
            raise ValueError(f"{utterance} in {path} has no vector of pdf ids")
        yield utterance, ids


def _scp(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The utterances and matrices that a script file lists; its paths are relative to here, or else to its folder."""
    with ExitStack() as closing:
        files: dict[str, BinaryIO] = {}
        for line in filter(str.strip, path.read_text().splitlines()):
            utterance, *places = line.split(maxsplit=1)
            place = "".join(places).strip()
            if not place:
                raise ValueError(f"{utterance} in {path} has no place of its matrix")
            if "|" in place or place == "-":
                raise ValueError(
                    f"{utterance} in {path} is a pipe; write its matrices to a file with Kaldi's copy-feats"
                )
            name, offset, first, last = PLACE.fullmatch(place).groups()
            if name not in files:
                found = Path(name) if Path(name).is_file() else path.parent / name
                files[name] = closing.enter_context(open(found, "rb"))
            files[name].seek(int(offset or 0))
            matrix = _object(files[name], f"{utterance} in {path}")
            yield utterance, matrix if first is None else matrix[int(first) : int(last) + 1]


def _object(file: BinaryIO, what: str) -> np.ndarray:
    """The matrix or vector that begins here, in one of Kaldi's own formats."""
    from kaldiio import matio

    at = file.tell()
    head = file.read(5)
    file.seek(at)
    if not (head.startswith(b"\0B") or re.match(rb"\s*[\[\d-]", head)):
        raise ValueError(f"{what} is no matrix or vector of Kaldi")
    try:
        return matio.read_kaldi(file)
    except Exception as error:  # a damaged file makes it raise nearly anything
        raise ValueError(f"{what} cannot be read ({error or type(error).__name__})") from error
