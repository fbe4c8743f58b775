"""What the scripts share: flags and what they stand for, progress, tables, and how errors end a command."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

import interruption
import runs
import tasks
from errors import Interrupted, MachineError, UserError
from progress import Progress

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    import numpy as np

    from data_zoo import DataSet
    from network_zoo import Network
    from recipes import Recipe
    from replicas import Replicas
    from training import Minimizer

FLAGS = flags.FLAGS
EPOCHS = 100  # what the paper's figures need


@dataclass(frozen=True)
class Side:
    """One of the minimizers: the file that was given, or its recipe, the origin of its training and its distance from
    the starting point."""

    weights_file: str | None
    recipe: Recipe | None
    training: runs.Provenance | None
    distance_from_start: float | None


def define_recipe_flags(batch_sizes: bool = True, test_history: bool = True) -> None:
    """Define the flags that choose what is trained: network, data, length, seed, and batch sizes and the test history
    unless the script chooses them itself."""
    group = {"module_name": "What to train"}
    flags.DEFINE_string("network", None, "F1, F2, C1, C2, C3 or C4 (Table 1).", short_name="n", **group)
    flags.DEFINE_string("dataset", None, "mnist, cifar10, cifar100, timit or digits; default: the network's.", **group)
    flags.DEFINE_enum(
        "definition", "repository", ["repository", "paper"], "As in the authors' code, or as in Appendix B.", **group
    )
    flags.DEFINE_integer("epochs", EPOCHS, "Epochs of each training.", lower_bound=1, upper_bound=10**6, **group)
    if batch_sizes:
        flags.DEFINE_integer("small_batch", None, "Samples a small batch; default: 256.", lower_bound=1, **group)
        flags.DEFINE_integer(
            "large_batch", None, "Samples a large batch; default: 10 % of the training set.", lower_bound=1, **group
        )
    flags.DEFINE_integer(
        "seed", 0, "Seed of the starting point, the batches and dropout.", lower_bound=0, upper_bound=2**32 - 1, **group
    )
    flags.DEFINE_enum(
        "precision", "float32", ["float32", "bfloat16"], "Of training; measuring is always float32.", **group
    )
    if test_history:
        flags.DEFINE_boolean("test_history", False, "Evaluate the test set after each epoch.", **group)
    flags.DEFINE_boolean("retrain", False, "Train anew, whatever is stored.", **group)


def define_machine_flags() -> None:
    """Define the flags that say which devices, machines and tasks share the work."""
    group = {"module_name": "Machines"}
    flags.DEFINE_enum(
        "strategy",
        "auto",
        ["auto", "none", "mirrored", "multiworker"],
        "Devices that share each batch: several GPUs of this machine, or several machines by TF_CONFIG.",
        **group,
    )
    tasks = (("index", "This task's number, from 0", 0), ("count", "Tasks that share the list of work", 1))
    for name, meaning, least in tasks:
        flags.DEFINE_integer(
            f"task_{name}", None, f"{meaning}; default: of the job array, if any.", lower_bound=least, **group
        )


def define_folder_flags(figures: bool = True) -> None:
    """Define the flags that say where data, trained weights, results and, if there are any, figures live."""
    group = {"module_name": "Folders"}
    flags.DEFINE_string("data_dir", "data", "Data sets, as <name>.npz.", **group)
    flags.DEFINE_string("run_dir", "runs", "Trained minimizers, reused by the same recipe.", **group)
    if figures:
        flags.DEFINE_string("figure_dir", "Figures", "Figures, as .pdf and .png.", **group)
    flags.DEFINE_string("result_dir", "results", "Numbers, as .csv and .json.", **group)


def run(main: Callable[[flags.FlagValues], None], define_flags: Callable[[], None], description: str) -> None:
    """Parse the command line, run `main` and exit: 0, 2 after a user's mistake, 1 when the machine fails."""
    os.environ["MPLBACKEND"] = "agg"  # figures are files only, and a backend that does not exist stops the import
    define_flags()
    flags.DEFINE_boolean("help", False, "Show this help.", short_name="h", module_name="Help")
    try:
        if unexpected := _parse()[1:]:
            raise UserError(f"Unexpected argument '{unexpected[0]}'; every setting is a --flag (see --help).")
        if FLAGS.help:
            print(_help(description))
        else:
            with interruption.raised():
                _show_log()
                main(FLAGS)
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
            again = (
                "The same command, without --retrain, continues from what is kept; what it had not yet begun to train "
                "anew is the old one then."
            )
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
    import replicas

    return replicas.failure(error)


def _show_log() -> None:
    """Show the store's messages as plain lines, above a progress bar if there is one."""
    from tqdm import tqdm

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    runs.log.addHandler(Lines())
    runs.log.propagate = False


def _exit(code: int, message: str) -> None:
    print(" ".join(message.splitlines()), file=sys.stderr)  # what libraries say may have line breaks
    sys.exit(code)


def _help(description: str) -> str:
    """Describe the command and its flags: ours in the order of definition, then absl's."""
    ours = [FLAGS.module_help(group) for group in FLAGS.flags_by_module_dict() if not group.startswith("absl")]
    _, heading, absls = FLAGS.get_help().partition("absl.flags:")
    return "\n".join([description.strip(), *ours, "\n" + heading + absls])


def table(rows: list[list[str]]) -> str:
    """Lay out rows of cells, the first row a header, the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def check_network(options: flags.FlagValues) -> None:
    """Raise `UserError` unless --network was given."""
    if options.network is None:
        raise UserError("Name the network: -n F1, F2, C1, C2, C3 or C4.")


def load_data(options: flags.FlagValues, network: Network) -> DataSet:
    """Load the data set that the flags name, or the network's own, in the shape of the network's input."""
    import data_zoo

    return data_zoo.load(options.dataset or network.dataset, options.data_dir).fit(network.input_shape)


def recipes(options: flags.FlagValues, network: Network, data: DataSet) -> tuple[Recipe, Recipe]:
    """Return the small-batch and the large-batch recipe that the flags describe."""
    from recipes import Recipe

    samples = len(data.x_train)
    small = options.small_batch or network.small_batch(samples)
    large = options.large_batch or network.large_batch(samples)
    return tuple(
        Recipe(
            network=network.name,
            dataset=data.name,
            data_digest=data.digest,
            batch_size=batch_size,
            epochs=options.epochs,
            seed=options.seed,
            definition=options.definition,
            architecture=network.architecture(options.definition),
            precision=options.precision,
        ).check(data)
        for batch_size in (small, large)
    )


def train(
    recipes: dict[str, Recipe], data: DataSet, options: flags.FlagValues, replicas: Replicas
) -> tuple[dict[str, np.ndarray], dict[str, Side]]:
    """Return the weights (n,) of the minimizers, stored or newly trained, and how they came about, by label.

    What another process trains is left to it, and waited for after everything else.
    """
    import training

    labels: dict[Recipe, str] = {}
    for label, recipe in recipes.items():  # one recipe may have two
        labels.setdefault(recipe, label)
    work = {recipe: 3 * training.samples_to_train(recipe, data, options.run_dir, options.retrain) for recipe in labels}
    if options.test_history and not options.retrain:
        for recipe in labels:
            training.check_tested(recipe, options.run_dir)
    for recipe in filter(work.get, labels):
        training.warn_of_memory(recipe, data, replicas)

    def minimizer(recipe: Recipe, wait: bool) -> Minimizer:
        with progress.job(work[recipe], f"{recipe.network} {labels[recipe]}") as report:
            return training.train(
                recipe,
                data,
                options.run_dir,
                retrain=options.retrain and not wait,  # what is waited for is new
                test_history=options.test_history,
                report=lambda samples, note: report(3 * samples, note),
                replicas=replicas,
                wait=wait,
            )

    with Progress(sum(work.values())) as progress:
        found = tasks.each(list(labels), minimizer)
    weights = {label: found[recipe].weights for label, recipe in recipes.items()}
    sides = {
        label: Side(None, recipe, found[recipe].provenance, found[recipe].distance) for label, recipe in recipes.items()
    }
    return weights, sides


def task(options: flags.FlagValues) -> tasks.Task:
    """Return the task that the flags or the environment name; raises `UserError` where it makes no sense."""
    found = tasks.task(options.task_index, options.task_count)
    if found.count > 1 and options.retrain:
        raise UserError("--retrain would train anew in every task; run the command once with it, or leave it out.")
    return found


def collected_later(task: tasks.Task, done: str, run_dir: str) -> str:
    """Return what a task says at its end in place of results."""
    return (
        f"Task {task.index} of {task.count}: {done} are kept in {run_dir}; when all tasks are done, the same command "
        "outside of them collects the results."
    )


def experiment(
    network: Network, data: DataSet, recipes: tuple[Recipe, Recipe], given: list[str], trained: bool
) -> list[str]:
    """Return the words that tell an experiment's minimizers from the network's usual ones, for the names of outputs.

    `given` are the weights files that stand for minimizers, `trained` says whether any is trained.
    """

    def label(file: str) -> str:
        return (
            f"{Path(file).name.removesuffix('.weights.h5')}-{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]}"
        )

    small, large = recipes
    settings = [
        (data.name, data.name != network.dataset),
        (small.definition, small.definition != "repository"),
        ("-".join(map(label, given)), given),
    ]
    if trained:
        settings += [
            (f"e{small.epochs}", small.epochs != EPOCHS),
            (f"sb{small.batch_size}", small.batch_size != network.small_batch(len(data.x_train))),
            (f"lb{large.batch_size}", large.batch_size != network.large_batch(len(data.x_train))),
            (f"s{small.seed}", small.seed != 0),
            (small.precision, small.precision != "float32"),
        ]
    return [text for text, differs in settings if differs]
