"""A recipe determines a minimizer, bit by bit.

The state after each epoch is kept, so a killed training continues where it was and ends at the same weights.
"""

import quiet_tensorflow  # noqa: F401

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import keras
import numpy as np
import tensorflow as tf

import interruption
import memory
import network_zoo
import runs
from data_zoo import DataSet
from errors import Interrupted, MachineError, UserError
from objective import Objective, flat_weights, read_weights, write_weights
from replicas import ALONE, Replicas, failure
from training_loop import DivergedError, Epoch, Position, TrainingLoop, read_position, recomputes

RESULT = ("minimizer.weights.h5", "start.weights.h5", "history.csv", "provenance.json")
CHECKPOINTS = "checkpoint-*.npz"
KEPT_CHECKPOINTS = 2
BYTES_A_WEIGHT = 4 * (2 + 3 * (KEPT_CHECKPOINTS + 1))  # start and minimizer, checkpoints with ADAM's two moments

Report = Callable[[int, str], None]  # receives the samples done since the last report, and a note on the state


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a minimizer: network, data, batch size, length, and the seed of start and batches."""

    network: str
    dataset: str
    data_digest: str
    batch_size: int
    epochs: int
    seed: int
    definition: str = "repository"
    precision: str = "float32"
    learning_rate: float = 1e-3

    def __post_init__(self):
        network_zoo.get(self.network)
        for kind, choices in (("definition", network_zoo.DEFINITIONS), ("precision", network_zoo.PRECISIONS)):
            if (chosen := getattr(self, kind)) not in choices:
                raise UserError(f"There is no {kind} '{chosen}'; choose one of {', '.join(choices)}.")
        if self.epochs < 1:
            raise UserError(f"A training needs at least 1 epoch, not {self.epochs}.")
        if self.batch_size < 1:
            raise UserError(f"A batch needs at least 1 sample, not {self.batch_size}.")
        if self.seed < 0:
            raise UserError(f"The seed must be 0 or greater, not {self.seed}.")

    @property
    def name(self) -> str:
        """What a person looks for in a listing of runs."""
        variant = [word for word in (self.definition, self.precision) if word not in ("repository", "float32")]
        settings = [f"b{self.batch_size}", f"e{self.epochs}", f"s{self.seed}"]
        return "-".join([self.network, self.dataset, *variant, *settings])

    def check(self, data: DataSet) -> "Recipe":
        """Return the recipe; raise `UserError` if its batch is larger than the training set."""
        if self.batch_size > len(data.x_train):
            raise UserError(
                f"A batch of {self.batch_size:,} is larger than the training set of {len(data.x_train):,} samples."
            )
        return self

    def build(self, data: DataSet, precision: str = "float32") -> keras.Model:
        """Return the recipe's network at its starting point."""
        return network_zoo.get(self.network).build(self.definition, data.classes, self.seed, precision)


@dataclass(frozen=True, eq=False)
class Minimizer:
    """Where a recipe leads: flat float64 weights of shape (n,), where they started, and how they came about."""

    recipe: Recipe
    weights: np.ndarray
    start: np.ndarray
    history: list[Epoch]
    provenance: runs.Provenance

    @property
    def distance(self) -> float:
        """Euclidean distance from the starting point (section 3 of the paper)."""
        return float(np.linalg.norm(self.weights - self.start))


def stored(recipe: Recipe, data: DataSet, run_dir: str | Path, test_history: bool = False) -> Minimizer | None:
    """Return the minimizer of the recipe if `run_dir` has it whole.

    Raises `UserError` where the stored run is of another version, or has no test history though one is asked for.
    """
    folder = runs.Folder(runs.folder(run_dir, recipe))
    if not folder.whole(*RESULT):
        return None
    with runs.reading(folder.path):
        model = recipe.build(data)
        found = Minimizer(
            recipe,
            weights=read_weights(model, folder.path / "minimizer.weights.h5"),
            start=read_weights(model, folder.path / "start.weights.h5"),
            history=runs.read_csv(folder.path / "history.csv", Epoch),
            provenance=runs.Provenance(**json.loads((folder.path / "provenance.json").read_text())),
        )
        if len(found.history) != recipe.epochs:
            raise ValueError(f"{len(found.history)} epochs in history.csv")
    _check_tested(found.history, folder.path, test_history)
    return found


def _check_tested(history: list[Epoch], folder: Path, test_history: bool) -> None:
    if test_history and not _tested(history):
        raise UserError(
            f"The run in {folder} was trained without a test history; leave out --test_history, or train it anew with "
            "--retrain."
        )


def _tested(history: list[Epoch]) -> bool:
    return all(row.test_loss is not None for row in history)


def samples_to_train(
    recipe: Recipe, data: DataSet, run_dir: str | Path, retrain: bool = False, test_history: bool = False
) -> int:
    """Return how many samples `train` would pass through the network, given what is stored; raises as `stored` does."""
    at = Position()
    folder = runs.Folder(runs.folder(run_dir, recipe))
    before = folder.sums()
    try:
        if not retrain:
            if stored(recipe, data, run_dir, test_history):
                return 0
            if checkpoints := _checkpoints(folder):
                with runs.reading(folder.path / checkpoints[-1]), np.load(folder.path / checkpoints[-1]) as saved:
                    at = read_position(saved)
            _check_tested(at.history, folder.path, test_history)
    except UserError:
        if folder.sums() == before:  # else another process changed the files that were being read
            raise
    return (recipe.epochs - len(at.history)) * len(data.x_train) - at.seen


def _checkpoints(folder: runs.Folder) -> list[str]:
    """Return the names of the whole checkpoints, the latest last."""
    return [name for name in sorted(folder.sums()) if fnmatch(name, CHECKPOINTS) and folder.whole(name)]


def train(
    recipe: Recipe,
    data: DataSet,
    run_dir: str | Path,
    *,
    retrain: bool = False,
    test_history: bool = False,
    report: Report = lambda samples, note: None,
    replicas: Replicas = ALONE,
    wait: bool = True,
) -> Minimizer:
    """Return the recipe's minimizer: the stored one, or a new one, trained from the last kept state if there is one.

    `data` must be fitted to the network's input shape; `test_history` evaluates the test set after each epoch;
    `retrain` replaces what is stored: until there is a new minimizer, the old one is in the folder beside, named
    *.before-retraining. Of processes with the same `run_dir` one trains a recipe: the others wait for it or, unless
    told to `wait`, raise `BusyError`. Damaged files are set aside, and the state before them is used.

    Raises `UserError` for a batch larger than the training set and as `stored` does; `MachineError` when the disk is
    full, when another machine stops answering, and when the training diverges: the last good weights are then left in
    the recipe's folder, and no minimizer; `Interrupted` on SIGINT or SIGTERM, once the present state is kept.
    """
    recipe.check(data)
    folder = runs.Folder(runs.folder(run_dir, recipe))
    with replicas.lock(folder.path, wait):
        if replicas.chief:
            folder.set_aside_damaged()
            folder.sweep(CHECKPOINTS)
            if retrain or not folder.sums():
                _check_space(recipe, data, folder)
            if retrain:
                _make_room(folder)
            if not folder.path.exists():
                folder.seal()  # files without a list are from then on a sign of damage
        replicas.together()
        found = stored(recipe, data, run_dir, test_history)
        if replicas.agreed(found is not None, folder.path):
            return found
        try:
            return _train(recipe, data, folder, test_history, report, replicas)
        except tf.errors.OpError as error:
            if meaning := failure(error):
                raise MachineError(meaning) from error
            raise


def _train(
    recipe: Recipe, data: DataSet, folder: runs.Folder, test_history: bool, report: Report, replicas: Replicas
) -> Minimizer:
    """Train, as the only writer of the folder."""
    origin = runs.provenance()
    if replicas.count > 1:
        origin = dataclasses.replace(origin, machine=f"{origin.machine}, {replicas.count} replicas")
    loop = TrainingLoop(recipe, data, replicas)
    _begin(loop, folder)
    if loop.epoch:
        _check_tested(loop.position.history, folder.path, test_history)
        test_history = _tested(loop.position.history)
    start = read_weights(recipe.build(data), folder.path / "start.weights.h5")
    if origin not in loop.position.origins:
        loop.position.origins.append(origin)

    test = Objective(recipe.build(data), data.x_test, data.y_test, replicas=replicas) if test_history else None
    with interruption.noted() as signal:
        stop = False
        while loop.epoch < recipe.epochs and not stop:
            try:
                samples, stop = loop.advance(signal.signum is not None)
                stop = stop or (replicas.machines == 1 and signal.signum is not None)  # others must hear of it first
                report(samples, loop.where())
                if loop.position.seen == len(data.x_train):
                    loop.finish_epoch(test)
            except DivergedError as error:
                _leave_last_good(loop, folder, error)
            if loop.between_epochs or stop:
                _save(loop, folder)
        if stop:
            raise Interrupted(
                signal.signum or interruption.SIGNALS[0], f"The training is kept in {folder.path}, {loop.where()}."
            )

        earlier = [dataclasses.asdict(other) for other in loop.position.origins if other != origin]
        origin = dataclasses.replace(origin.after(loop.position.wall_seconds), earlier=earlier)
        if replicas.chief:
            runs.write_csv(folder.path / "history.csv", loop.position.history)
            runs.write_json(folder.path / "provenance.json", origin)
            write_weights(loop.model, folder.path / "minimizer.weights.h5")
            folder.seal("history.csv", "provenance.json", "minimizer.weights.h5", dropping=_checkpoints(folder))
            shutil.rmtree(_backup(folder), ignore_errors=True)
        if signal.signum:
            raise Interrupted(signal.signum, f"The minimizer is kept in {folder.path}.")
    return Minimizer(recipe, flat_weights(loop.model), start, loop.position.history, origin)


def warn_of_memory(recipe: Recipe, data: DataSet, replicas: Replicas = ALONE) -> None:
    """Say so where a training step seems to need more memory than there is."""
    batch = -(-recipe.batch_size // replicas.memories)
    model = recipe.build(data, recipe.precision)
    memory.warn(model, batch, recomputes(model, recipe.batch_size, replicas), replicas.gpus)


def _check_space(recipe: Recipe, data: DataSet, folder: runs.Folder) -> None:
    runs.check_space(folder.path.parent, BYTES_A_WEIGHT * recipe.build(data).count_params())


def _backup(folder: runs.Folder) -> Path:
    """Where the minimizer stays that is being trained anew, until there is a new one."""
    return folder.path.with_name(f"{folder.path.name}.before-retraining")


def _make_room(folder: runs.Folder) -> None:
    """Move a whole minimizer out of the way of a new training, and drop an unfinished one."""
    if folder.whole(*RESULT):
        shutil.rmtree(_backup(folder), ignore_errors=True)
        folder.path.rename(_backup(folder))
    else:
        folder.seal(dropping=_checkpoints(folder))


def _begin(loop: TrainingLoop, folder: runs.Folder) -> None:
    """Restore the last kept state, if there is one; else keep the start."""
    recipe, replicas, weights = loop.recipe, loop.replicas, folder.path / "start.weights.h5"
    if replicas.chief and not folder.whole(weights.name):
        runs.write_json(folder.path / "recipe.json", recipe)
        write_weights(loop.model, weights)
        folder.seal("recipe.json", weights.name)
    replicas.together()
    if checkpoints := _checkpoints(folder):
        loop.restore(folder.path / checkpoints[-1])
    replicas.agreed(loop.position.steps, folder.path)


def _save(loop: TrainingLoop, folder: runs.Folder) -> None:
    """Keep the present state and the one before it, and no other."""
    if loop.replicas.chief:
        name = CHECKPOINTS.replace("*", f"{loop.position.steps:09}")
        loop.save(folder.path / name)
        before = [other for other in sorted(folder.sums()) if fnmatch(other, CHECKPOINTS) and other != name]
        folder.seal(name, dropping=before[: 1 - KEPT_CHECKPOINTS])


def _leave_last_good(loop: TrainingLoop, folder: runs.Folder, error: DivergedError) -> NoReturn:
    """Leave the weights of the last kept state in the folder, and raise."""
    path = folder.path / "last_good.weights.h5"
    loop.position = Position()
    if checkpoints := _checkpoints(folder):
        loop.restore(folder.path / checkpoints[-1])
    else:
        read_weights(loop.model, folder.path / "start.weights.h5")
    if loop.replicas.chief:
        write_weights(loop.model, path)
    raise MachineError(
        f"The training diverged (loss or weights are not finite) {error}: {loop.recipe}. No minimizer was written; the "
        f"weights {loop.where()} are in {path}."
    ) from error
