"""This project at the benchmarks' work."""

from rooms import batch_of, data_of

import network_zoo
from objective import Objective, flat_weights
from replicas import ALONE
from training import Recipe
from training_loop import TrainingLoop


class Ours:
    """Training by `TrainingLoop`, everything else by `Objective`."""

    def __init__(self, network: str, task: str, samples: int, precision: str = "float32"):
        data = data_of(network, samples)
        self._samples = samples
        if task.endswith("training"):
            recipe = Recipe(network, data.name, data.digest, batch_of(network, task), 1000, 0, precision=precision)
            self._loop = TrainingLoop(recipe, data, ALONE)
            self.run = self._train
        else:
            model = network_zoo.get(network).build()
            objective, self._w = Objective(model, data.x_train, data.y_train), flat_weights(model)
            self._measure = {
                "loss": objective.value,
                "loss and gradient": objective.value_and_gradient,
                "Hessian-vector product": lambda w: objective.hessian_vector_product(w, w),
            }[task]
            self.run = self._measured

    def _train(self) -> int:
        while self._loop.position.seen < self._samples:
            self._loop.advance(stop=False)
        self._loop.finish_epoch(None)
        return self._samples

    def _measured(self) -> int:
        self._measure(self._w)
        return self._samples
