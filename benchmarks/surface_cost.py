"""A surface by `surface.evaluate`, and by a plain Keras model point by point: `set_weights`, then `evaluate`.

    python benchmarks/surface_cost.py            # F1 on MNIST and C1 on CIFAR-10
    python benchmarks/surface_cost.py F1

Both evaluate the same model on the same plane and samples in one process, in turns, after one that compiles; the losses
must agree. Prints medians and ranges of the turns and of the paired ratios, writes results/benchmarks.json.
"""

import statistics
import time

import numpy as np
from rooms import chosen, data_of, keep, spread

TASKS = {"F1": (5000, 4), "C1": (1000, 3)}  # samples, and points each way
TURNS = 5


def race(name: str) -> dict:
    """Let both evaluate one plane, in turns; return seconds a point, and how many times as long plain Keras takes."""
    import network_zoo
    from large_batch import surface
    from large_batch.backend import keras
    from large_batch.layers import pixels
    from large_batch.objective import Objective, flat_weights

    samples, points = TASKS[name]
    data, model = data_of(name, samples), network_zoo.get(name).build()
    shapes = [variable.shape for variable in model.trainable_variables]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    objective = Objective(model, data.x_train, data.y_train, outputs="logits", prepare=pixels)
    plane = surface.random_plane(model, flat_weights(model), seed=0)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = np.asarray(pixels(data.x_train)), data.y_train

    def ours() -> np.ndarray:
        return surface.evaluate(objective, plane, points).loss

    def plain() -> np.ndarray:
        a, b = plane.axes(points, 1.0)
        losses = []
        for place in [(first, second) for second in b for first in a]:
            parts = np.split(plane.at(place), ends)
            model.set_weights([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
            losses.append(model.evaluate(x, y, batch_size=samples, verbose=0)[0])
        return np.reshape(losses, (points, points))

    np.testing.assert_allclose(ours(), plain(), rtol=1e-4)
    seconds = {"ours": [], "plain Keras": []}
    for _ in range(TURNS):
        for label, work in (("ours", ours), ("plain Keras", plain)):
            began = time.perf_counter()
            work()
            seconds[label].append((time.perf_counter() - began) / points**2)
    ratios = [theirs / mine for mine, theirs in zip(*seconds.values(), strict=True)]
    for label, each in seconds.items():
        print(f"{name} {label:12} {spread([1000 * one for one in each])} ms a point of {samples:,} samples")
    print(f"{name} plain Keras takes {spread(ratios, '{:.2f}')} times as long, paired", flush=True)
    return {"seconds_a_point": seconds, "ratios": ratios, "median_ratio": statistics.median(ratios), "samples": samples}


def main() -> None:
    """Run, print and write."""
    from large_batch import store

    for name in chosen(TASKS)[0] or TASKS:
        origin, began = store.provenance(), time.monotonic()
        keep(f"{name} surface", race(name), origin, began)


if __name__ == "__main__":
    main()
