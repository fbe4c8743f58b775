"""The one training loop: a recipe determines a minimizer, bit by bit.

Batches depend on (seed, epoch) and dropout on (seed, step) alone, and the state after each epoch is kept, so a killed
training continues where it was and ends at the same weights.
"""

import quiet_tensorflow  # noqa: F401

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import network_zoo
import runs
from data_zoo import DataSet
from errors import MachineError, UserError
from objective import Objective, flat_weights, pixels, read_weights, write_weights

BLOCK = 4096  # samples trained between two reports of progress
RECOMPUTE_FROM = 1000  # samples of a batch whose memory counts for more than a little time

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


@dataclass(frozen=True)
class Epoch:
    """A row of the history: mean loss (nats) and accuracy (percent), training as seen while the weights moved."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float | None = None
    test_accuracy: float | None = None


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
    """Return the minimizer of the recipe if `run_dir` has it.

    Raises `UserError` where the stored run is damaged, or has no test history though one is asked for.
    """
    folder = runs.folder(run_dir, recipe)
    if not (folder / "minimizer.weights.h5").exists():
        return None
    with runs.reading(folder):
        model = recipe.build(data)
        found = Minimizer(
            recipe,
            weights=read_weights(model, folder / "minimizer.weights.h5"),
            start=read_weights(model, folder / "start.weights.h5"),
            history=runs.read_csv(folder / "history.csv", Epoch),
            provenance=runs.Provenance(**json.loads((folder / "provenance.json").read_text())),
        )
        if len(found.history) != recipe.epochs:
            raise ValueError(f"{len(found.history)} epochs in history.csv")
    _check_tested(found.history, folder, test_history)
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
    history = []
    if not retrain:
        if stored(recipe, data, run_dir, test_history):
            return 0
        folder = runs.folder(run_dir, recipe)
        history = _Kept.read(folder / "checkpoint.npz").history
        _check_tested(history, folder, test_history)
    return (recipe.epochs - len(history)) * len(data.x_train)


def train(
    recipe: Recipe,
    data: DataSet,
    run_dir: str | Path,
    *,
    retrain: bool = False,
    test_history: bool = False,
    report: Report = lambda samples, note: None,
) -> Minimizer:
    """Return the recipe's minimizer: the stored one, or a new one, trained from the last kept epoch if there is one.

    `data` must be fitted to the network's input shape; `retrain` discards what is stored; `test_history` evaluates
    the test set after each epoch. Raises `UserError` for a batch larger than the training set and as `stored` does,
    and `MachineError` when the training diverges: the last good epoch is then left in the recipe's folder, and no
    minimizer.
    """
    recipe.check(data)
    folder = runs.folder(run_dir, recipe)
    checkpoint = folder / "checkpoint.npz"
    if retrain:
        for path in (folder / "minimizer.weights.h5", checkpoint):
            path.unlink(missing_ok=True)
    elif found := stored(recipe, data, run_dir, test_history):
        return found
    origin = runs.provenance()
    training = _Training(recipe, data)
    runs.write_json(folder / "recipe.json", recipe)
    if training.restore(checkpoint):
        _check_tested(training.history, folder, test_history)
        test_history = _tested(training.history)
    else:
        write_weights(training.model, folder / "start.weights.h5")
    start = read_weights(recipe.build(data), folder / "start.weights.h5")

    test = Objective(recipe.build(data), data.x_test, data.y_test) if test_history else None
    while training.epoch < recipe.epochs:
        training.run_epoch(folder, report, test)
        training.save(checkpoint)

    runs.write_csv(folder / "history.csv", training.history)
    origin = origin.after(training.wall_seconds)
    runs.write_json(folder / "provenance.json", origin)
    write_weights(training.model, folder / "minimizer.weights.h5")  # last: its presence says the rest is there
    checkpoint.unlink(missing_ok=True)
    return Minimizer(recipe, flat_weights(training.model), start, training.history, origin)


@dataclass(eq=False)
class _Training:
    """A training in progress: its state is all that a checkpoint holds."""

    recipe: Recipe
    data: DataSet
    wall_seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    def __post_init__(self):
        self.strategy = tf.distribute.get_strategy()
        with self.strategy.scope():
            self.model = self.recipe.build(self.data, self.recipe.precision)
            self.optimizer = keras.optimizers.Adam(self.recipe.learning_rate, epsilon=1e-8)  # Keras 1's epsilon
            self.optimizer.build(self.model.trainable_variables)
        self.x = tf.constant(self.data.x_train)
        self.y = tf.constant(self.data.y_train.astype(np.int32))

    def run_epoch(self, folder: Path, report: Report, test: Objective | None) -> None:
        """Train one epoch and add its row to the history."""
        began = time.monotonic()
        samples, batch = len(self.data.x_train), self.recipe.batch_size
        steps, block = -(-samples // batch), max(1, BLOCK // batch)
        order = tf.constant(np.random.default_rng([self.recipe.seed, self.epoch]).permutation(samples).astype(np.int32))
        loss = correct = seen = 0.0
        for first in range(0, steps, block):
            count = min(block, steps - first)
            sums = self._steps(order, *(tf.constant(n, tf.int64) for n in (first, count, self.epoch * steps))).numpy()
            if not np.isfinite(sums).all():
                self._diverged(folder, first + int(np.argmin(np.isfinite(sums).all(axis=1))) + 1)
            done = min(samples, (first + count) * batch) - seen
            seen += done
            loss, correct = loss + sums[:, 0].sum(), correct + sums[:, 1].sum()
            report(
                int(done), f"epoch {self.epoch + 1}/{self.recipe.epochs} loss {loss / seen:.4f} {correct / seen:.2%}"
            )
        if not np.isfinite(flat_weights(self.model)).all():
            self._diverged(folder, steps)
        row = Epoch(self.epoch + 1, float(loss / samples), float(100 * correct / samples))
        if test:
            result = test.evaluate(flat_weights(self.model))
            row = dataclasses.replace(row, test_loss=result.loss, test_accuracy=result.accuracy)
        self.history.append(row)
        self.wall_seconds += time.monotonic() - began

    @tf.function
    def _steps(self, order, first, count, steps_before):
        """Take `count` steps from step `first` of the epoch; return (count, 2) sums of losses and correct answers."""
        batch = self.recipe.batch_size
        sums = tf.TensorArray(tf.float32, size=tf.cast(count, tf.int32), element_shape=(2,))
        for i in tf.range(count):
            step = first + i
            network_zoo.set_dropout_step(self.model, steps_before + step)
            chosen = order[step * batch : (step + 1) * batch]
            replica_sums = self.strategy.run(self._step, args=(chosen,))
            sums = sums.write(tf.cast(i, tf.int32), self.strategy.reduce("SUM", replica_sums, axis=None))
        return sums.stack()

    def _step(self, chosen):
        """One step of one replica, on its share of the chosen samples."""
        replicas = tf.distribute.get_replica_context()
        total, share = tf.shape(chosen)[0], replicas.replica_id_in_sync_group
        parts = replicas.num_replicas_in_sync
        mine = chosen[total * share // parts : total * (share + 1) // parts]
        x, y = pixels(tf.gather(self.x, mine)), tf.gather(self.y, mine)
        with tf.GradientTape() as tape:
            if self.recipe.batch_size < RECOMPUTE_FROM:
                logits = self.model(x, training=True)
            else:
                logits = network_zoo.call_recomputing(self.model, x)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            loss = tf.reduce_sum(losses) / tf.cast(total, tf.float32)
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        correct = tf.argmax(logits, axis=1, output_type=y.dtype) == y
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(tf.cast(correct, tf.float32))])

    def _diverged(self, folder: Path, step: int) -> None:
        """Leave the last good epoch's weights in the folder, and raise."""
        epoch = self.epoch
        if not self.restore(folder / "checkpoint.npz"):
            read_weights(self.model, folder / "start.weights.h5")
        write_weights(self.model, folder / "last_good.weights.h5")
        raise MachineError(
            f"The training diverged (loss or weights are not finite) in epoch {epoch + 1}, step {step}: {self.recipe}. "
            f"No minimizer was written; the weights after epoch {self.epoch} are in {folder / 'last_good.weights.h5'}."
        )

    def _variables(self) -> list:
        return [*self.model.variables, *self.optimizer.variables]

    def save(self, path: Path) -> None:
        """Write the state after an epoch."""
        state = {"wall_seconds": self.wall_seconds, "history": [dataclasses.asdict(row) for row in self.history]}
        arrays = {f"variable_{i:03}": variable.numpy() for i, variable in enumerate(self._variables())}
        with runs.writing(path) as temporary:
            np.savez(temporary, state=json.dumps(state), **arrays)

    def restore(self, path: Path) -> bool:
        """Continue from the state that `save` wrote, if there is one; say whether there was."""
        kept = _Kept.read(path)
        with runs.reading(path):
            for variable, values in zip(self._variables(), kept.values, strict=bool(kept.history)):
                variable.assign(values)
        self.wall_seconds, self.history = kept.wall_seconds, kept.history
        return bool(kept.history)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What a checkpoint holds: nothing, and no epoch in the history, if there is none."""

    wall_seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "_Kept":
        if not path.exists():
            return cls()
        with runs.reading(path), np.load(path) as saved:
            state = json.loads(str(saved["state"]))
            values = [saved[name] for name in sorted(saved.files) if name != "state"]
            return cls(state["wall_seconds"], [Epoch(**row) for row in state["history"]], values)
