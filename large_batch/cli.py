"""The command line: data classes whose fields are flags, and how a command ends.

A setting is declared once, as a field of a script's settings: its flag, its default, its help, and its word in the
names of outputs (`words`). The data class itself is what a result file says of how it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from absl import flags

from large_batch import datasets, named, networks, store
from large_batch.errors import SIGNALS, Interrupted, MachineError, UserError, no_such, signals_raised
from large_batch.files import erased
from large_batch.version import __version__

FLAGS = flags.FLAGS
LAST_GROUPS = ("Machines", "Folders", "Help")
LAST_SEED = 2**32 - 1  # that NumPy and Keras take
SHORT_NAMES = {"network": "n"}


def setting(default: Any, help: str, word: str | Callable[[Any], str] = "", group: str = "Experiment", **limits) -> Any:
    """Declare a setting: a field of a data class and a flag.

    Args:
        default: Its value where the flag is not given; None where it depends on the network or the data.
        help: What --help says.
        word: The word in the names of outputs where it is not the default: "e{}" or a function of the value.
        group: The heading in --help.
        limits: least and most, of numbers; choices, of words; whole, of a list of numbers above 0.
    """
    return dataclasses.field(default=default, metadata={"help": help, "word": word, "group": group, **limits})


def samples_setting(group: str) -> Any:
    """Declare the number of samples of a sharpness."""
    return setting(
        None,
        "Training samples over which sharpness is measured, the first; default: all. Over fewer "
        "it is mostly larger, as their loss has a gradient where that of all has none; compare equal numbers only.",
        "n{}",
        group,
        least=1,
    )


def file_word(path: str, side: str = "") -> str:
    """Return the word of a weights file that is there: which it is, its name, and a digest of what it holds."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{side}{Path(path).name.removesuffix('.weights.h5')}-{digest[:8]}"


def list_word(prefix: str) -> Callable[[tuple], str]:
    """Return what makes the word of several values."""
    return lambda values: "-".join(f"{prefix}{value}" for value in values)


def sizes_word(sizes: tuple[int, ...]) -> str:
    """Return the word of batch sizes."""
    return f"b{'-'.join(map(str, sizes))}"


def named_word(text: str) -> str:
    """Return the word of things chosen by name (`named.split`)."""
    return re.sub("[:,]", "-", text).replace("=", "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of every script that trains."""

    network: str | None = setting(
        None, f"{', '.join(networks.NAMES)}, or your own as file.py:name.", group="What to train"
    )
    dataset: str | None = setting(
        None,
        "mnist, cifar10, cifar100, timit, digits, or your own .npz file; default: the network's.",
        group="What to train",
    )
    definition: str = setting(
        "repository",
        "As in the authors' code, or as in Appendix B.",
        "{}",
        "What to train",
        choices=networks.DEFINITIONS,
    )
    epochs: int = setting(100, "Epochs of each training.", "e{}", "What to train", least=1, most=10**6)
    seed: int = setting(
        0, "Seed of the starting point, the batches and dropout.", "s{}", "What to train", least=0, most=LAST_SEED
    )
    precision: str = setting(
        "float32",
        "Of training; measuring is always float32.",
        "{}",
        "What to train",
        choices=tuple(networks.PRECISIONS),
    )
    optimizer: str = setting(
        "adam",
        f"{', '.join(named.OPTIMIZERS)}, with settings as in sgd:momentum=0.9,learning_rate=0.1; see optimizers.py.",
        named_word,
        "What to train",
    )
    remedy: str | None = setting(
        None,
        f"What changes the training, with commas: {', '.join(named.REMEDIES)}; with "
        "settings as in augment,sam:radius=0.1; see remedies.py.",
        named_word,
        "What to train",
    )
    until_converged: bool = setting(
        False,
        "End each training, after --epochs at the latest, once the loss of 10 epochs is not 1 % below all before.",
        "converged",
        "What to train",
    )
    retrain: bool = setting(False, "Train anew, whatever is stored.", group="What to train")
    strategy: str = setting(
        "auto",
        "Devices that share each batch: several GPUs of this machine, or several machines by TF_CONFIG.",
        group="Machines",
        choices=named.STRATEGIES,
    )
    wait: bool = setting(True, "Wait for what other processes have taken, then print the results.", group="Machines")
    data_dir: str = setting("data", "Data sets, as <name>.npz.", group="Folders")
    run_dir: str = setting("runs", "Trained minimizers and measurements, reused.", group="Folders")
    tensorboard: str | None = setting(
        None, "Also write losses, accuracies and sharpness by epoch here, for TensorBoard.", group="Folders"
    )
    figure_dir: str = setting("Figures", "Figures, as .pdf and .png.", group="Folders")
    result_dir: str = setting("results", "Numbers, as .csv and .json.", group="Folders")

    def check(self) -> None:
        """Raise `UserError` for what can be known to be wrong before anything is loaded."""
        if self.network is None:
            raise UserError(f"Name the network: -n {', '.join(networks.NAMES)}, or your own as file.py:name.")
        for name in (self.network,) if isinstance(self.network, str) else self.network:
            networks.check_name(name, networks.NAMES)
        if self.dataset:
            datasets.check_name(self.dataset)
        named.check_name(self.optimizer, named.OPTIMIZERS, "optimizer")
        for remedy in named.split(self.remedy) if self.remedy else ():
            named.check_name(remedy, named.REMEDIES, "remedy")
        for part in dataclasses.fields(self):
            path, word = getattr(self, part.name), part.metadata["word"]
            if getattr(word, "func", word) is file_word and path and not os.path.isfile(path):
                raise UserError(f"There is no weights file {path}.")

    def resolve(self, network: Any, samples: int) -> Settings:
        """Return the settings with their defaults for a network and a training set of so many samples."""
        return self

    def words(self, usual: Settings) -> list[str]:
        """Return the words of the settings that differ from the usual ones, for the names of outputs."""
        words = []
        for part in dataclasses.fields(self):
            value, word = getattr(self, part.name), part.metadata["word"]
            if word and value != getattr(usual, part.name):
                words.append(word(value) if callable(word) else word.format(value))
        return words


@dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    """Those of a script that compares small and large batches."""

    small_batch: int | None = setting(
        None, "Samples a small batch; default: 256, or 1 % of a small set.", "sb{}", "What to train", least=1
    )
    large_batch: int | None = setting(
        None, "Samples a large batch; default: 10 % of the training set.", "lb{}", "What to train", least=1
    )

    @property
    def batches(self) -> dict[str, int]:
        """The batch sizes by the role of the minimizer."""
        return {"SB": self.small_batch, "LB": self.large_batch}

    def resolve(self, network: Any, samples: int) -> PairSettings:
        """Fill in the batch sizes."""
        small = self.small_batch or network.small_batch(samples)
        large = self.large_batch or network.large_batch(samples)
        return dataclasses.replace(super().resolve(network, samples), small_batch=small, large_batch=large)


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(PairSettings):
    """Those of a script that looks at the spectrum of the Hessian."""

    probes: int = setting(10, "Random vectors of a spectral density.", "probes{}", "Spectrum", least=1, most=1000)
    steps: int = setting(50, "Lanczos steps of each vector.", "steps{}", "Spectrum", least=1, most=1000)
    by_layer: bool = setting(False, "Each layer's own spectrum, too.", "layers", "Spectrum")


@dataclass(frozen=True, kw_only=True)
class RepeatedSettings(Settings):
    """Those of a script that repeats trainings."""

    trials: int = setting(1, "Trainings of each kind, with seeds from --seed on.", "t{}", least=1, most=10_000)

    def check(self) -> None:
        """Raise `UserError` for seeds beyond the last there is."""
        super().check()
        if self.seeds[-1] > LAST_SEED:
            raise UserError(f"--seed={self.seed} with --trials={self.trials} goes beyond the last seed, {LAST_SEED}.")

    @property
    def seeds(self) -> range:
        """Of the trials."""
        return range(self.seed, self.seed + self.trials)


@dataclass(frozen=True, kw_only=True)
class TrialSettings(RepeatedSettings):
    """Those of a script that measures the sharpness of each minimizer, too."""

    sharpness_samples: int | None = samples_setting("Experiment")
    iterations: int = setting(10, "Iterations of L-BFGS-B for each sharpness.", "i{}", least=1, most=10**6)

    def resolve(self, network: Any, samples: int) -> TrialSettings:
        """Fill in the samples of sharpness."""
        part = min(self.sharpness_samples or samples, samples)
        return dataclasses.replace(super().resolve(network, samples), sharpness_samples=part)


def define_flags(settings: type[Settings]) -> None:
    """Define a flag for each field."""
    types = get_type_hints(settings)
    for part in dataclasses.fields(settings):
        name, data, (kind, several) = part.name, part.metadata, _kind(types[part.name])
        common = {"module_name": data["group"], "short_name": SHORT_NAMES.get(name)}
        if several:
            default = None if part.default is None else ",".join(f"{value}" for value in part.default)
            flags.DEFINE_string(name, default, data["help"], **common)
        elif "choices" in data:
            flags.DEFINE_enum(name, part.default, data["choices"], data["help"], **common)
        elif kind in (int, float):
            define = flags.DEFINE_integer if kind is int else flags.DEFINE_float
            limits = {"lower_bound": data.get("least"), "upper_bound": data.get("most")}
            define(name, part.default, data["help"], **limits, **common)
        else:
            define = flags.DEFINE_boolean if kind is bool else flags.DEFINE_string
            define(name, part.default, data["help"], **common)


def _kind(hint: Any) -> tuple[type, bool]:
    """Return the type of a setting's values, and whether it has several; it may be None, too."""
    if isinstance(hint, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)


def read(settings: type[Settings]) -> Settings:
    """Return the settings that the command line names; raises `UserError` for lists that cannot be read."""
    types, values = get_type_hints(settings), {}
    for part in dataclasses.fields(settings):
        value, (kind, several) = FLAGS[part.name].value, _kind(types[part.name])
        values[part.name] = _listed(part, value, kind) if several and value is not None else value
    return settings(**values)


def _listed(part: dataclasses.Field, text: str, kind: type) -> tuple:
    """Return the values of a list flag, with commas between them."""
    choices, whole = part.metadata.get("choices"), part.metadata.get("whole")
    values = []
    for word in (word.strip() for word in text.split(",")):
        if choices and word not in choices:
            raise no_such(f"--{part.name}", word, choices, ", or several with commas")
        if whole and not re.fullmatch(r"0*[1-9]\d{0,9}", word):
            raise UserError(f"--{part.name} needs whole numbers above 0, with commas between them, not '{word[:20]}'.")
        try:
            values.append(kind(word))
        except ValueError as error:
            raise UserError(f"--{part.name} needs numbers, with commas between them, not '{word[:20]}'.") from error
        if kind is float and not (math.isfinite(values[-1]) and values[-1] > 0):
            raise UserError(f"--{part.name} must be a number above 0, not {values[-1]:g}.")
    return tuple(values)


def run(main: Callable[[Any], None], settings: type, description: str) -> None:
    """Parse the command line, run `main` and exit: 0, 2 after a user's mistake, 1 when the machine fails."""
    _mend_streams()
    os.environ["MPLBACKEND"] = "agg"  # figures are files only, and a backend that does not exist stops the import
    define_flags(settings)
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", module_name="Help")
    flags.DEFINE_boolean("version", False, "Show the version.", module_name="Help")
    try:
        if unexpected := _parse()[1:]:
            raise UserError(f"Unexpected argument '{unexpected[0]}'; every setting is a --flag (see --help).")
        if FLAGS.help:
            print(_help(description), flush=True)
        elif FLAGS.version:
            print(__version__, flush=True)
        else:
            with signals_raised():
                _show_log()
                main(read(settings))
            sys.stdout.flush()  # here, where it can still be said that it failed
    except UserError as error:
        _exit(2, f"Error: {error}")
    except MachineError as error:
        _exit(1, f"Error: {error}")
    except MemoryError:
        _exit(1, "Error: The memory does not suffice; use another machine, or smaller batches or subspaces.")
    except OSError as error:  # of a disk or a network, wherever it is met
        _exit(1, f"Error: {error.filename or 'The system'} failed: {error.strerror or error}.")
    except Exception as error:
        if "tensorflow" not in sys.modules or not (failure := _device_failure(error)):
            raise
        _exit(1, f"Error: {failure}")
    except Interrupted as error:
        kept = f"{error} " if str(error) else ""
        again = "The same command continues from what is kept."
        if "retrain" in FLAGS and FLAGS.retrain:
            again = "The same command without --retrain continues; a training that had not begun anew keeps its result."
        _exit(128 + error.signum, f"Stopped. {kept}{again}")


def _parse() -> list[str]:
    """Parse the command line; return what is not a flag."""
    try:
        rest = FLAGS(sys.argv)
    except (flags.Error, OSError, UnicodeError) as error:  # a --flagfile may be anything
        raise UserError(str(error)) from error
    for flag in map(FLAGS.__getitem__, FLAGS):
        if flag.present and flag.value == "":  # as from a shell's variable that is not set
            raise UserError(f"--{flag.name} is empty; give it a value, or leave it out.")
    return rest


def _device_failure(error: Exception) -> str | None:
    from large_batch import distribution

    return distribution.failure(error)


def _show_log() -> None:
    """Show what is logged (`files.log`) as plain lines, in place of how far the work is."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(f"{erased()}{self.format(record)}", file=sys.stderr, flush=True)

    store.log.addHandler(Lines())
    store.log.propagate = False


def _mend_streams() -> None:
    """Let what is printed go nowhere where a stream is closed, and spell out characters that its encoding lacks."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which no other file shall have
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit(code: int, message: str) -> None:
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # the end has come already
    for stream, text in ((sys.stdout, ""), (sys.stderr, " ".join(message.splitlines()) + "\n")):  # of a library's lines
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # a full disk, or nobody reads; Python shall not fail over it again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _help(description: str) -> str:
    """Describe the command and its flags: ours in the order of definition, then absl's."""
    groups = [group for group in FLAGS.flags_by_module_dict() if not group.startswith(("absl", "tensorflow"))]
    groups.sort(key=lambda group: LAST_GROUPS.index(group) if group in LAST_GROUPS else -1)
    _, heading, absls = FLAGS.get_help().partition("absl.flags:")
    return "\n".join([description.strip(), *map(FLAGS.module_help, groups), "\n" + heading + absls])
