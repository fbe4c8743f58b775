"""This project at the benchmarks' work."""

from unittest import mock

from rooms import batch_of, data_of, recipe_of

import network_zoo
from large_batch import training
from large_batch.layers import pixels
from large_batch.objective import Objective, flat_weights


class Ours:
    """Training by `TrainingLoop`, everything else by `Objective`.

    `batch` is the batch size of a training, by default that of the task. `compiled` says whether XLA compiles its step,
    which by default depends on the batch size (`training.COMPILED_BATCH`).
    """

    def __init__(
        self,
        network: str,
        task: str,
        samples: int,
        precision: str = "float32",
        batch: int | None = None,
        compiled: bool | None = None,
    ):
        data, known = data_of(network, samples), network_zoo.get(network)
        self._samples = samples
        self._compiled_batch = {None: training.COMPILED_BATCH, True: samples, False: 0}[compiled]
        if task.endswith("training"):
            batch = batch or batch_of(network, task)
            recipe = recipe_of(network, data, batch, epochs=1000, precision=precision)
            self._loop = training.TrainingLoop(recipe, known, data)
            self.run = self._train
        else:
            model = known.build()
            objective, self._w = Objective(model, data.x_train, data.y_train, prepare=pixels), flat_weights(model)
            self._measure = {
                "loss": objective.value,
                "loss and gradient": objective.value_and_gradient,
                "Hessian-vector product": lambda w: objective.hessian_vector_product(w, w),
            }[task]
            self.run = self._measured

    def _train(self) -> int:
        with mock.patch.object(training, "COMPILED_BATCH", self._compiled_batch):
            while self._loop.state.seen < self._samples:
                self._loop.advance(stop=False)
        self._loop.finish_epoch(None)
        return self._samples

    def _measured(self) -> int:
        self._measure(self._w)
        return self._samples
