"""A recipe determines a minimizer, bit by bit.

The state after each epoch is kept, so a killed training continues where it was and ends at the same weights.
"""

import quiet_tensorflow  # noqa: F401

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import numpy as np
import tensorflow as tf

import interruption
import memory
import runs
from data_zoo import DataSet
from errors import BusyError, Interrupted, MachineError, UserError
from objective import Objective, flat_weights, read_weights, write_weights
from recipes import Recipe
from replicas import ALONE, Replicas, failure
from training_loop import DivergedError, Epoch, Position, TrainingLoop, read_position, recomputes

START = "start.weights.h5"
RESULT = ("minimizer.weights.h5", START, "history.csv", "provenance.json")
CHECKPOINTS = "checkpoint-*.npz"
KEPT_CHECKPOINTS = 2
BYTES_A_WEIGHT = 4 * (2 + 3 * (KEPT_CHECKPOINTS + 1))  # start and minimizer, checkpoints with ADAM's two moments

Report = Callable[[int, str], None]  # receives the samples done since the last report, and a note on the state


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


def stored(recipe: Recipe, data: DataSet, run_dir: str | Path) -> Minimizer | None:
    """Return the minimizer of the recipe if `run_dir` has it whole.

    Raises `UserError` where the stored run is of another version.
    """
    folder = runs.Folder(runs.folder(run_dir, recipe))
    if not folder.whole(*RESULT):
        return None
    history = _stored_history(recipe, folder)
    with runs.reading(folder.path):
        model = recipe.build(data)
        return Minimizer(
            recipe,
            weights=read_weights(model, folder.path / "minimizer.weights.h5"),
            start=read_weights(model, folder.path / START),
            history=history,
            provenance=runs.Provenance(**json.loads((folder.path / "provenance.json").read_text())),
        )


def is_stored(recipe: Recipe, run_dir: str | Path) -> bool:
    """Say whether `run_dir` has the minimizer of the recipe whole."""
    return runs.Folder(runs.folder(run_dir, recipe)).whole(*RESULT)


def _stored_history(recipe: Recipe, folder: runs.Folder) -> list[Epoch]:
    with runs.reading(folder.path):
        history = runs.read_csv(folder.path / "history.csv", Epoch)
        if len(history) != recipe.epochs:
            raise ValueError(f"{len(history)} epochs in history.csv")
    return history


def position(recipe: Recipe, run_dir: str | Path) -> Position:
    """Return how far the training is that is stored; raises as `stored` does."""
    folder = runs.Folder(runs.folder(run_dir, recipe))
    before = folder.sums()
    try:
        if folder.whole(*RESULT):
            return Position(history=_stored_history(recipe, folder))
        if checkpoints := _checkpoints(folder):
            with runs.reading(folder.path / checkpoints[-1]), np.load(folder.path / checkpoints[-1]) as saved:
                return read_position(saved)
    except UserError:
        if folder.sums() == before:  # else another process changed the files that were being read
            raise
    return Position()


def samples_to_train(recipe: Recipe, data: DataSet, run_dir: str | Path, retrain: bool = False) -> int:
    """Return how many samples `train` would pass through the network, given what is stored; raises as `stored` does.

    Those of a warm start that is not there yet come on top.
    """
    at = Position() if retrain else position(recipe, run_dir)
    return (recipe.epochs - len(at.history)) * len(data.x_train) - at.seen


def check_tested(recipe: Recipe, run_dir: str | Path) -> None:
    """Raise `UserError` where the run that is stored, ended or not, has no test history."""
    if not _tested(position(recipe, run_dir).history):
        raise UserError(
            f"The run in {runs.folder(run_dir, recipe)} was trained without a test history; train it anew with "
            "--retrain (the old minimizer stays until there is a new one)."
        )


def _tested(history: list[Epoch]) -> bool:
    return all(row.test_loss is not None for row in history)


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
    keep: Collection[int] = (),
    report: Report = lambda samples, note: None,
    replicas: Replicas = ALONE,
    wait: bool = True,
) -> Minimizer:
    """Return the recipe's minimizer: the stored one, or a new one, trained from the last kept state if there is one.

    `data` must be fitted to the network's input shape; `test_history` evaluates the test set after each epoch of a new
    training; iterates after the epochs `keep` are stored on the way, each as the minimizer of its own recipe
    (`Recipe.iterate`); a warm start that is not stored is trained first. `retrain` replaces what is stored: until there
    is a new minimizer, the old one is in the folder beside, named *.before-retraining. Of processes with the same
    `run_dir` one trains a recipe: the others wait for it or, unless told to `wait`, raise `BusyError`. Damaged files
    are set aside, and the state before them is used.

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
        begun = folder.whole(START)
        found = stored(recipe, data, run_dir)
        if replicas.agreed(found is not None, folder.path):
            return found
        if recipe.warm_start and not begun:
            train(recipe.warm_start, data, run_dir, report=report, replicas=replicas, wait=wait)
        iterates = {
            epoch: runs.Folder(runs.folder(run_dir, recipe.iterate(epoch))) for epoch in keep if epoch < recipe.epochs
        }
        if not retrain:
            iterates = {epoch: other for epoch, other in iterates.items() if not other.whole(*RESULT)}
        try:
            return _train(recipe, data, folder, iterates, test_history, report, replicas)
        except tf.errors.OpError as error:
            if meaning := failure(error):
                raise MachineError(meaning) from error
            raise


def _train(
    recipe: Recipe,
    data: DataSet,
    folder: runs.Folder,
    iterates: dict[int, runs.Folder],
    test_history: bool,
    report: Report,
    replicas: Replicas,
) -> Minimizer:
    """Train, as the only writer of the folder; store the iterates after some epochs in folders of their own."""
    origin = runs.provenance()
    if replicas.count > 1:
        origin = dataclasses.replace(origin, machine=f"{origin.machine}, {replicas.count} replicas")
    loop = TrainingLoop(recipe, data, replicas)
    _begin(loop, folder)
    if loop.epoch:
        test_history = _tested(loop.position.history)
    start = read_weights(recipe.build(data), folder.path / START)
    if loop.position.origins and (changed := origin.differences(loop.position.origins[-1])):
        runs.log.warning(
            "%s was begun elsewhere and continues with %s: it will not end at the same bits.",
            recipe.name,
            ", ".join(changed),
        )
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
            if loop.between_epochs and loop.epoch in iterates and replicas.chief:
                _keep_iterate(loop, folder, iterates[loop.epoch], origin)
            if loop.between_epochs or stop:
                _save(loop, folder)
        if stop:
            raise Interrupted(
                signal.signum or interruption.SIGNALS[0], f"The training is kept in {folder.path}, {loop.where()}."
            )

        origin = _provenance(loop, origin)
        if replicas.chief:
            _write_result(loop, folder, origin)
            shutil.rmtree(_backup(folder), ignore_errors=True)
        if signal.signum:
            raise Interrupted(signal.signum, f"The minimizer is kept in {folder.path}.")
    return Minimizer(recipe, flat_weights(loop.model), start, loop.position.history, origin)


def _provenance(loop: TrainingLoop, origin: runs.Provenance) -> runs.Provenance:
    earlier = [dataclasses.asdict(other) for other in loop.position.origins if other != origin]
    return dataclasses.replace(origin.after(loop.position.wall_seconds), earlier=earlier)


def _write_result(loop: TrainingLoop, folder: runs.Folder, origin: runs.Provenance) -> None:
    """Make the present state the folder's minimizer."""
    runs.write_csv(folder.path / "history.csv", loop.position.history, Epoch)
    runs.write_json(folder.path / "provenance.json", origin)
    write_weights(loop.model, folder.path / "minimizer.weights.h5")
    folder.seal(*RESULT, dropping=_checkpoints(folder))


def _keep_iterate(loop: TrainingLoop, folder: runs.Folder, other: runs.Folder, origin: runs.Provenance) -> None:
    """Store the present state as the minimizer of the recipe that ends here, in another folder."""
    with suppress(BusyError), runs.lock(other.path, wait=False):  # who holds it stores the same
        other.set_aside_damaged()
        runs.write_json(other.path / "recipe.json", loop.recipe.iterate(loop.epoch))
        with runs.writing(other.path / START) as temporary:
            shutil.copyfile(folder.path / START, temporary)
        other.seal("recipe.json", START)
        _write_result(loop, other, _provenance(loop, origin))


def warn_of_memory(recipe: Recipe, data: DataSet, replicas: Replicas = ALONE) -> None:
    """Say so where a training step seems to need more memory than there is."""
    largest = max(recipe.batch_sizes)
    model = recipe.build(data, recipe.precision)
    memory.warn(model, -(-largest // replicas.memories), recomputes(model, largest, replicas), replicas.gpus)


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
        folder.seal(dropping=[*_checkpoints(folder), START])


def _begin(loop: TrainingLoop, folder: runs.Folder) -> None:
    """Restore the last kept state, if there is one; else keep the start, that of the seed or the warm one."""
    recipe, replicas = loop.recipe, loop.replicas
    if replicas.chief and not folder.whole(START):
        if warm := recipe.warm_start:
            read_weights(loop.model, runs.folder(folder.path.parent, warm) / "minimizer.weights.h5")
        runs.write_json(folder.path / "recipe.json", recipe)
        write_weights(loop.model, folder.path / START)
        folder.seal("recipe.json", START)
    replicas.together()
    read_weights(loop.model, folder.path / START)
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
        read_weights(loop.model, folder.path / START)
    if loop.replicas.chief:
        write_weights(loop.model, path)
    raise MachineError(
        f"The training diverged (loss or weights are not finite) {error}: {loop.recipe}. No minimizer was written; the "
        f"weights {loop.where()} are in {path}."
    ) from error
