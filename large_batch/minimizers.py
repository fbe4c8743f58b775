"""The minimizers of a store: found, continued from the last kept state, or trained.

A recipe determines a minimizer, bit by bit. The state after each epoch is kept, so a killed training continues where it
was and ends at the same weights.
"""

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from large_batch import distribution, files, optimizers, shipped, store, tracking
from large_batch.backend import keras, tf
from large_batch.datasets import DataSet
from large_batch.distribution import ALONE, Replicas
from large_batch.errors import SIGNALS, BusyError, Interrupted, MachineError, UserError, signals_noted
from large_batch.models import point_of, read_weights, write_weights
from large_batch.networks import Network
from large_batch.objective import Objective
from large_batch.objectives import preparation
from large_batch.progress import Report
from large_batch.recipes import Recipe
from large_batch.store import END, HISTORY, MINIMIZER, PROVENANCE, RECIPE, START
from large_batch.tracking import Tracked
from large_batch.training import DivergedError, Epoch, StepMemory, TrainingLoop, TrainingState

TRACKED = "tracked.csv"
CHECKPOINTS = "checkpoint-*.npz"
KEPT_CHECKPOINTS = 2

Watch = Callable[[list[Epoch]], None]  # receives the history after an epoch


class NoMinimizerError(MachineError):
    """A training that diverges leads to no minimizer; the message says where, and where its last good weights are."""


@dataclass(frozen=True, eq=False)
class Minimizer:
    """Where a recipe leads: flat float64 weights (n,), where they started, and how they came about.

    `state` holds the values of variables that are not trainable, in Keras' order; the paper's networks have none.
    """

    recipe: Recipe
    weights: np.ndarray
    start: np.ndarray
    history: list[Epoch]
    provenance: store.Provenance
    state: list[np.ndarray] = field(default_factory=list)

    @property
    def distance(self) -> float:
        """Euclidean distance from the starting point (section 3 of the paper)."""
        return float(np.linalg.norm(self.weights - self.start))


@dataclass(frozen=True, eq=False)
class Minimizers:
    """The minimizers of one network on one data set, whose samples have the network's shape, in one store.

    `origin` describes this process.
    """

    network: Network
    data: DataSet
    run_dir: str | Path
    replicas: Replicas = ALONE
    origin: store.Provenance = field(default_factory=lambda: store.provenance(distribution.device()))

    def folder(self, recipe: Recipe) -> store.Folder:
        """Return the recipe's folder; raises `UserError` where it holds the run of another one."""
        return store.opened(self.run_dir, recipe)

    def build(self, recipe: Recipe) -> keras.Model:
        """Return the recipe's network, in float32, at the starting point of its seed."""
        return recipe.build(self.network, self.data)

    def is_stored(self, recipe: Recipe) -> bool:
        """Say whether the minimizer of the recipe is there whole."""
        return self.folder(recipe).whole(*_files(recipe))

    def take_shipped(self, recipes: Iterable[Recipe]) -> None:
        """Take those minimizers that come with the repository, and are not even begun here; say so."""
        for recipe in recipes:
            shipped.take(recipe, self.folder(recipe), self.build, self.replicas)

    def warn_of_two(self, iterates: Iterable[Recipe]) -> None:
        """Warn where iterates of one training, stored or to come, were begun on several processors or versions."""
        recipes = [recipe for recipe in iterates if recipe.epochs]  # the start is that of the seed
        origins = [self.folder(recipe).provenance().first for recipe in recipes if self.is_stored(recipe)]
        if missing := [recipe for recipe in recipes if not self.is_stored(recipe)]:
            origins += [(self.state(missing[-1]).origins or [self.origin])[0]]
        if changed := [of for one in origins[1:] for of in one.differences(origins[0])]:
            store.log.warning(
                "The iterates of %s are of several trainings, with %s; --retrain makes all of them here.",
                recipes[-1].name,
                ", ".join(dict.fromkeys(changed)),
            )

    def stored(self, recipe: Recipe) -> Minimizer | None:
        """Return the recipe's minimizer if it is there whole, and stays so; raises `UserError` for another version."""
        folder = self.folder(recipe)
        with _unless_changed(folder):
            if not folder.whole(*_files(recipe)):
                return None
            origin, model = folder.provenance(), self.build(recipe)
            with store.reading(folder.path):
                history = recipe.checked(store.read_csv(folder.path / HISTORY, Epoch))
                start, end = (read_weights(model, folder.path / name) for name in (START, END))
                return Minimizer(recipe, end.weights, start.weights, history, origin, end.state)
        return None

    def tracked(self, recipe: Recipe) -> list[Tracked]:
        """Return what was followed in a training that is stored; raises `UserError` where it is damaged."""
        folder = self.folder(recipe)
        with store.reading(folder.path / TRACKED):
            return store.read_csv(folder.path / TRACKED, Tracked)

    def state(self, recipe: Recipe) -> TrainingState:
        """Return how far the training is that is stored; raises as `stored` does."""
        folder = self.folder(recipe)
        with _unless_changed(folder):
            if folder.whole(*_files(recipe)):
                with store.reading(folder.path):
                    return TrainingState(history=recipe.checked(store.read_csv(folder.path / HISTORY, Epoch)))
            if checkpoints := folder.names(CHECKPOINTS):
                with store.reading(folder.path / checkpoints[-1]), np.load(folder.path / checkpoints[-1]) as saved:
                    return TrainingState.read(saved)
        return TrainingState()

    def samples_to_train(self, recipe: Recipe, retrain: bool = False) -> int:
        """Return how many samples `train` would pass through the network, without those of a warm start that is not
        there yet; raises as `stored` does."""
        at = TrainingState() if retrain else self.state(recipe)
        return (recipe.epochs - len(at.history)) * len(self.data.x_train) - at.seen

    def check_tested(self, recipe: Recipe) -> None:
        """Raise `UserError` where the run that is stored, ended or not, has no test history."""
        if not _tested(self.state(recipe).history):
            raise UserError(
                f"The run in {self.folder(recipe).path} was trained without a test history; train it anew with "
                "--retrain (the old minimizer stays until there is a new one)."
            )

    def memory(self, recipe: Recipe) -> StepMemory:
        """Return what a step of the training takes of this machine's memory."""
        return StepMemory.of(recipe, self.network, self.data, self.replicas)

    def train(
        self,
        recipe: Recipe,
        *,
        retrain: bool = False,
        test_history: bool = False,
        keep: Collection[int] = (),
        report: Report = lambda samples, note: None,
        watch: Watch = lambda history: None,
        wait: bool = True,
    ) -> Minimizer:
        """Return the recipe's minimizer: the stored one, or a new one, trained from the last kept state, if any.

        A warm start that is not stored is trained first. Damaged files are set aside, and the state before is used.

        Args:
            recipe: What to train.
            retrain: Replace what is stored. Until there is a new minimizer, the old one is in the folder beside, named
                *.before-retraining.
            test_history: Evaluate the test set after each epoch of a new training.
            keep: Epochs after which iterates are stored on the way, as minimizers of `recipe.at_epoch`.
            report: Is told the samples trained.
            watch: Is given the history after each epoch of a new training.
            wait: Of several processes with one store, one trains a recipe. Wait for it, or raise `BusyError`, also
                where a warm start is not there yet.

        Raises:
            UserError: For a batch larger than the training set, and as `stored`.
            NoMinimizerError: When the training diverges: the last good weights are left in the recipe's folder then.
            MachineError: When the disk is full, or another machine stops answering.
            Interrupted: On SIGINT or SIGTERM, once the present state is kept.
        """
        recipe.check(self.data)
        folder, replicas, first = self.folder(recipe), self.replicas, recipe.warm_start
        with replicas.lock(folder.path, wait):
            if replicas.chief:
                self._tidy(recipe, folder, retrain)
            replicas.barrier()
            begun = folder.whole(RECIPE, START)
            found = self.stored(recipe)
            if replicas.agreed(found is not None, folder.path):
                return found
            if first and not begun:
                if not wait and replicas.broadcast(not self.is_stored(first)):
                    raise BusyError(f"Another process trains {first.name}.")
                self.train(first, report=report, wait=wait)
            iterates = {epoch: self.folder(recipe.at_epoch(epoch)) for epoch in keep if epoch < recipe.epochs}
            if not retrain:
                iterates = {epoch: other for epoch, other in iterates.items() if not other.whole(*_files(recipe))}
            try:
                return self._train(recipe, folder, iterates, test_history, report, watch)
            except tf.errors.OpError as error:
                if meaning := distribution.failure(error):
                    raise MachineError(meaning) from error
                raise

    def _tidy(self, recipe: Recipe, folder: store.Folder, retrain: bool) -> None:
        """Clear away what is damaged or left over, and make room for a new training."""
        folder.tidy()
        folder.sweep(CHECKPOINTS)
        if retrain or not folder.sums():
            kept = 1 + optimizers.make(recipe.optimizer).kept  # in each checkpoint, for a weight
            numbers = 2 + kept * (KEPT_CHECKPOINTS + 1)  # with start and minimizer
            files.check_space(folder.path.parent, 4 * numbers * self.build(recipe).count_params())
        if folder.whole(*_files(recipe)):
            if retrain:
                folder.retire()
                folder.seal()
            else:
                folder.forget()
        elif retrain:
            folder.seal(dropping=[*folder.listed(CHECKPOINTS), START])

    def _train(
        self,
        recipe: Recipe,
        folder: store.Folder,
        iterates: dict[int, store.Folder],
        test_history: bool,
        report: Report,
        watch: Watch,
    ) -> Minimizer:
        """Train, as the only writer of the folder; store the iterates after some epochs in folders of their own."""
        origin, replicas, data = self.origin, self.replicas, self.data
        if replicas.count > 1:
            origin = dataclasses.replace(origin, machine=f"{origin.machine}, {replicas.count} replicas")
        # The last kept state, or the start
        loop = TrainingLoop(recipe, self.network, data, replicas, self._look(recipe) if recipe.track else None)
        self._begin(loop, folder)
        if loop.epoch:
            test_history = _tested(loop.state.history)
        start = read_weights(self.build(recipe), folder.path / START).weights
        _add_origin(loop, origin)
        test = self._objective(recipe, data.x_test, data.y_test) if test_history else None

        def evaluate(model: keras.Model) -> tuple[float, float]:
            found = test.evaluate(point_of(model))
            return found.loss, found.accuracy

        # Epoch by epoch
        with signals_noted() as signals:
            stop = False
            while not (loop.ended or stop):
                try:
                    samples, stop = loop.advance(signals.first is not None)
                    stop = stop or (signals.first is not None and replicas.machines == 1)  # others must hear first
                    report(samples, loop.where())
                    if loop.state.seen == len(data.x_train):
                        loop.finish_epoch(evaluate if test else None)
                        watch(loop.state.history)
                except DivergedError as error:
                    _leave_last_good(loop, folder, error)
                for epoch, other in iterates.items() if loop.between_epochs and replicas.chief else ():
                    if epoch == loop.epoch or (epoch > loop.epoch and loop.ended):
                        _keep_iterate(loop, folder, other, recipe.at_epoch(epoch), origin)
                if loop.between_epochs or stop:
                    _save(loop, folder)
            if stop:
                kept = f"The training is kept in {folder.path}, {loop.where()}."
                raise Interrupted(signals.first or SIGNALS[0], kept)
            # The minimizer
            origin = _provenance(loop, origin)
            if replicas.chief:
                _write_result(loop, folder, origin)
                folder.forget()
            if signals.first:
                raise Interrupted(signals.first, f"The minimizer is kept in {folder.path}.")
        end = point_of(loop.model)
        return Minimizer(recipe, end.weights, start, loop.state.history, origin, end.state)

    def _objective(self, recipe: Recipe, x: np.ndarray, y: np.ndarray) -> Objective:
        settings = {"outputs": self.network.outputs, "prepare": preparation(self.data)}
        return Objective(self.build(recipe), x, y, replicas=self.replicas, **settings)

    def _look(self, recipe: Recipe) -> Callable[[keras.Model, keras.optimizers.Optimizer, int], dict]:
        """Return what looks at a training on the way."""
        some = slice(recipe.followed.samples)
        followed = self._objective(recipe, self.data.x_train[some], self.data.y_train[some])
        return lambda *at: vars(tracking.look(followed, *at, recipe.seed))

    def _begin(self, loop: TrainingLoop, folder: store.Folder) -> None:
        """Restore the last kept state, if there is one; else keep the start, that of the seed or the warm one."""
        recipe, replicas = loop.recipe, loop.replicas
        if replicas.chief and not folder.whole(RECIPE, START):
            if warm := recipe.warm_start:
                read_weights(loop.model, self.folder(warm).path / END)
            store.write_json(folder.path / RECIPE, recipe)
            write_weights(loop.model, folder.path / START)
            folder.seal(RECIPE, START)
        replicas.barrier()
        read_weights(loop.model, folder.path / START)
        if checkpoints := folder.names(CHECKPOINTS):
            loop.restore(folder.path / checkpoints[-1])
        replicas.agreed(loop.state.steps, folder.path)


def _files(recipe: Recipe) -> list[str]:
    """Return the files of the recipe's minimizer."""
    return [*MINIMIZER, *([TRACKED] if recipe.track else [])]


@contextmanager
def _unless_changed(folder: store.Folder) -> Iterator[None]:
    """Within, pass over an error where another process changed the files that were being read."""
    before = folder.sums()
    try:
        yield
    except UserError:
        if folder.sums() == before:
            raise


def _tested(history: list[Epoch]) -> bool:
    return all(row.test_loss is not None for row in history)


def _add_origin(loop: TrainingLoop, origin: store.Provenance) -> None:
    """Note who trains from here on; warn where the bits will not be those of one process from start to end."""
    origins = loop.state.origins
    if origins and (changed := origin.differences(origins[-1])):
        store.log.warning(
            "%s was begun elsewhere and continues with %s: it will not end at the same bits.",
            loop.recipe.name,
            ", ".join(changed),
        )
    if origin not in origins[-1:]:
        origins.append(origin)


def _provenance(loop: TrainingLoop, origin: store.Provenance) -> store.Provenance:
    earlier = [dataclasses.asdict(other) for other in loop.state.origins[:-1]]
    return dataclasses.replace(origin.after(loop.state.wall_seconds), earlier=earlier)


def _write_result(loop: TrainingLoop, folder: store.Folder, origin: store.Provenance) -> None:
    """Make the present state the folder's minimizer."""
    store.write_csv(folder.path / HISTORY, loop.state.history, Epoch)
    store.write_json(folder.path / PROVENANCE, origin)
    write_weights(loop.model, folder.path / END)
    written = [*MINIMIZER]
    if loop.recipe.track:
        store.write_csv(folder.path / TRACKED, [Tracked(**row) for row in loop.state.tracked], Tracked)
        written.append(TRACKED)
    folder.seal(*written, dropping=folder.listed(CHECKPOINTS))


def _keep_iterate(
    loop: TrainingLoop, folder: store.Folder, other: store.Folder, recipe: Recipe, origin: store.Provenance
) -> None:
    """Store the present state as the minimizer of a recipe that ends here, in another folder."""
    with suppress(BusyError), files.lock(other.path, wait=False):  # who holds it stores the same
        other.tidy()
        if other.whole(*_files(recipe)):
            other.forget()
        if other.before.exists():
            return  # it is being trained anew by itself
        with other.replacing() as new:
            store.write_json(new.path / RECIPE, recipe)
            shutil.copyfile(folder.path / START, new.path / START)
            new.seal(RECIPE, START)
            _write_result(loop, new, _provenance(loop, origin))


def _save(loop: TrainingLoop, folder: store.Folder) -> None:
    """Keep the present state and the one before it, and no other."""
    if loop.replicas.chief:
        name = CHECKPOINTS.replace("*", f"{loop.state.steps:09}")
        loop.save(folder.path / name)
        before = [other for other in folder.listed(CHECKPOINTS) if other != name]
        folder.seal(name, dropping=before[: 1 - KEPT_CHECKPOINTS])


def _leave_last_good(loop: TrainingLoop, folder: store.Folder, error: DivergedError) -> NoReturn:
    """Leave the weights of the last kept state in the folder, and raise."""
    path = folder.path / "last_good.weights.h5"
    loop.state = TrainingState()
    if checkpoints := folder.names(CHECKPOINTS):
        loop.restore(folder.path / checkpoints[-1])
    else:
        read_weights(loop.model, folder.path / START)
    if loop.replicas.chief:
        write_weights(loop.model, path)
    raise NoMinimizerError(
        f"The training diverged (loss or weights are not finite) {error}: {loop.recipe}. No minimizer was written; the "
        f"weights {loop.where()} are in {path}."
    ) from error
