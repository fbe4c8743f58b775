"""The devices and machines that share a batch: one, several of one machine, or several machines.

Whatever their number, the result is that of the whole batch: each replica takes its shard of the samples, batch
statistics are summed over all replicas (`layers.BatchStatisticsNormalization`, and Keras' own, synchronized in
training), and so are losses and gradients.
"""

import json
import os
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from large_batch import files, named
from large_batch.backend import tf
from large_batch.errors import BusyError, MachineError, UserError, no_such

TF_CONFIG_HELP = (
    'set it as in {"cluster": {"worker": ["host1:12345", "host2:12345"]}, "task": {"type": "worker", "index": 0}}'
)
START_SECONDS = 600  # for which the workers of a cluster wait for each other


@dataclass(frozen=True)
class Shard:
    """A replica's part of a batch: samples `first` to `last`, each counting `weight`."""

    first: tf.Tensor
    last: tf.Tensor
    weight: tf.Tensor


def shard(samples: tf.Tensor, replica: tf.Tensor, count: int) -> Shard:
    """Return what replica number `replica` of `count` takes of a batch of `samples`: equal parts, give or take one.

    A batch of fewer samples than replicas is computed whole by all of them, each sample counting 1/count: its batch
    statistics, loss and gradient are the same, and no replica is left with nothing to differentiate.
    """
    few = samples < count
    first = tf.where(few, 0, samples * replica // count)
    last = tf.where(few, samples, samples * (replica + 1) // count)
    return Shard(first, last, tf.where(few, 1 / count, 1.0))


@dataclass(frozen=True, eq=False)
class Replicas:
    """A distribution strategy, the number of machines (processes) in it, and whether this is the one that writes."""

    strategy: tf.distribute.Strategy
    machines: int = 1
    chief: bool = True

    @property
    def count(self) -> int:
        """Number of replicas, over all machines."""
        return self.strategy.num_replicas_in_sync

    @property
    def memories(self) -> int:
        """Number of memories that a batch is spread over: of GPUs, or of machines."""
        return self.count if tf.config.list_physical_devices("GPU") else self.machines

    def reduce_sum(self, function: Callable, *arguments) -> tf.Tensor:
        """Return the sum over all replicas of what `function(*arguments)` returns on each: a tensor, or several."""
        parts = self.strategy.run(function, arguments)
        # One by one: machines cannot add tensors of different types together.
        return tf.nest.map_structure(lambda part: self.strategy.reduce("SUM", part, axis=None), parts)

    def shard(self, *batch: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Within a replica: return its part of each tensor of a batch, and what its samples count."""
        if self.count == 1:
            return list(batch), tf.constant(1.0)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        mine = shard(tf.shape(batch[0])[0], tf.cast(replica, tf.int32), self.count)
        return [tensor[mine.first : mine.last] for tensor in batch], mine.weight

    def total(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """Within a replica: return the sums of tensors over all replicas."""
        return tensors if self.count == 1 else tf.distribute.get_replica_context().all_reduce("SUM", tensors)

    def broadcast(self, number: int) -> int:
        """Return the chief's number on every machine."""
        if self.machines == 1:
            return number

        def say() -> tf.Tensor:
            first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
            return tf.constant(int(number) if first else 0, tf.int64)

        return int(self.reduce_sum(say))

    def barrier(self) -> None:
        """Wait until all machines are here."""
        self.broadcast(0)

    def _equal(self, number: int) -> bool:
        """Say, on every machine, whether all have the same number."""
        differs = tf.constant(int(self.broadcast(number) != number), tf.int64)
        return self.machines == 1 or int(self.reduce_sum(lambda: tf.identity(differs))) == 0

    def agreed(self, seen: int, path: Path) -> int:
        """Return what was seen in `path`; raises `MachineError` on every machine where one sees something else."""
        if not self._equal(int(seen)):
            raise MachineError(f"The machines do not see the same {path}; give all of them one shared --run_dir.")
        return seen

    @contextmanager
    def lock(self, path: str | Path, wait: bool = True) -> Iterator[None]:
        """Hold `files.lock`, which the chief takes for all machines; raises `UserError` if they do not do the same."""
        if not self._equal(zlib.crc32(Path(path).name.encode())):
            raise UserError(
                "The workers of TF_CONFIG were started with different settings; give all of them the same command."
            )
        with ExitStack() as held:
            busy = None
            if self.chief:
                try:
                    held.enter_context(files.lock(path, wait))
                except BusyError as error:
                    busy = error
            if self.broadcast(busy is not None):
                raise busy or BusyError(f"Another process works on {path}.")
            yield


ALONE = Replicas(tf.distribute.get_strategy())


def choose(name: str) -> Replicas:
    """Return the replicas that a --strategy names; to be called before anything else makes TensorFlow work.

    `auto` is `multiworker` where TF_CONFIG names several machines, `mirrored` where this one has several GPUs, else
    `none`. Raises `UserError` where TF_CONFIG is asked for and does not tell which worker of which cluster this is, and
    `MachineError` where this worker cannot join it. Where the other workers do not come, SIGALRM ends the process.
    """
    if name not in named.STRATEGIES:
        raise no_such("strategy", name, named.STRATEGIES)
    gpus = tf.config.list_physical_devices("GPU")
    workers = _workers() if name in ("auto", "multiworker") else []
    if name == "auto":
        name = "multiworker" if len(workers) > 1 else "mirrored" if len(gpus) > 1 else "none"
    if name == "none":
        return ALONE
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU" if gpus else "CPU")
        return Replicas(tf.distribute.MirroredStrategy([device.name for device in devices]))
    if not workers:
        raise UserError(f"--strategy=multiworker needs the environment variable TF_CONFIG; {TF_CONFIG_HELP}.")
    return _several_machines(len(workers))


def _several_machines(machines: int) -> Replicas:
    """Join the cluster. No Python runs during the wait for others, so signals must end the process themselves."""
    files.log.warning(
        "Waiting for all %d workers of TF_CONFIG; without them this process ends after %d seconds.",
        machines,
        START_SECONDS,
    )
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.alarm(START_SECONDS)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        reason = error.message.splitlines()[0]
        raise MachineError(f"This worker could not join the cluster of TF_CONFIG: {reason}") from error
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return Replicas(strategy, machines, chief=strategy.extended.should_checkpoint)


def failure(error: Exception) -> str | None:
    """Return what one of TensorFlow's errors says about devices or machines, and the remedy; None for any other."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return (
            "The memory of a device does not suffice; spread the batch over more devices with --strategy=mirrored or "
            "multiworker, or train with --precision=bfloat16."
        )
    lost = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError)
    if isinstance(error, lost) and os.environ.get("TF_CONFIG"):  # kernels may raise these for reasons of their own
        return (
            "Another worker of TF_CONFIG has ended or does not answer, so this one ends too; start all of them again, "
            "and they continue from what is kept."
        )
    return None


def device() -> str:
    """Return what computes: "CPU", or the names of the GPUs."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
    return ", ".join(names) or "CPU"


def _workers() -> list[str]:
    """Return the addresses in TF_CONFIG, having checked that one of them is this process's."""
    try:
        content = json.loads(os.environ.get("TF_CONFIG") or "{}")
        cluster, task = content.get("cluster", {}), content.get("task", {})
        if not cluster:
            return []
        addresses = [address for kind in ("chief", "worker") for address in cluster.get(kind, [])]
        mine = cluster[task["type"]][int(task["index"])] if int(task["index"]) >= 0 else None
        if mine not in addresses or not all(re.fullmatch(r".+:\d+", address) for address in addresses):
            raise ValueError
        return addresses
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"TF_CONFIG does not say which worker of which cluster this is; {TF_CONFIG_HELP}.") from error
