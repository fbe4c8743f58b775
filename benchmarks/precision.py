"""What training in bfloat16 costs in accuracy: same seeds, same epochs, float32 and bfloat16 side by side.

    python benchmarks/precision.py            # F1, 5 epochs, 2 seeds; C1, 3 epochs, 1 seed: twenty minutes
    python benchmarks/precision.py F1

Trains what runs/ does not have. Everything is evaluated in float32. Writes results/benchmarks.json.
"""

import sys
import time
from dataclasses import dataclass

from rooms import ROOT, data_of, keep, recipe_of

EPOCHS, SEEDS = {"F1": 5, "C1": 3}, {"F1": (0, 1), "C1": (0,)}


@dataclass(frozen=True)
class Trained:
    """A recipe's end: loss on the training set (nats), accuracies (percent), distance from the start."""

    network: str
    regime: str
    precision: str
    seed: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    distance: float


def main() -> None:
    """Train, evaluate, print the table and write it."""
    import network_zoo
    from large_batch import store, tables
    from large_batch.layers import pixels
    from large_batch.minimizers import Minimizers
    from large_batch.networks import PRECISIONS
    from large_batch.objective import Objective

    for name in sys.argv[1:] or EPOCHS:
        origin, began, results = store.provenance(), time.monotonic(), []
        network = network_zoo.get(name)
        data = data_of(name)
        model, samples = network.build(), len(data.x_train)
        on_train, on_test = (
            Objective(model, data.x_train, data.y_train, prepare=pixels),
            Objective(model, data.x_test, data.y_test, prepare=pixels),
        )
        rows = [["", "regime", "precision", "seed", "train loss", "train %", "test %", "distance"]]
        for regime, batch in (("SB", network.small_batch(samples)), ("LB", network.large_batch(samples))):
            for seed in SEEDS[name]:
                for precision in PRECISIONS:
                    recipe = recipe_of(name, data, batch, epochs=EPOCHS[name], seed=seed, precision=precision)
                    minimizer = Minimizers(network, data, ROOT / "runs").train(recipe)
                    train_end, test_end = (each.evaluate(minimizer.weights) for each in (on_train, on_test))
                    numbers = train_end.loss, train_end.accuracy, test_end.accuracy, minimizer.distance
                    results.append(Trained(name, regime, precision, seed, *numbers))
                    rows.append([name, regime, precision, str(seed), *(f"{number:.4g}" for number in numbers)])
                    print(*rows[-1], flush=True)
        print(tables.lay_out(rows))
        keep(f"precision {name}", results, origin, began)


if __name__ == "__main__":
    main()
