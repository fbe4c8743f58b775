"""Batch sizes when MobileNetV2 is fine-tuned on CIFAR-10, as a reproduction by others says in its first version.

Trains all weights of Keras' MobileNetV2 with SGD in batches of several sizes: momentum 0.9, weight decay 1e-4, a
learning rate of 3e-4 x batch / 32 that falls along a cosine, 32 x 32 pixels, no augmentation. Prints the validation
accuracy at the end, of the 10,000 test samples, beside the published one, and judges that it is level up to 256
and falls at 1024. (Later versions of it say of the same accuracies that they are of training from scratch, at
0.0125 x batch / 32 with warm-up, and have others of fine-tuning, at 224 x 224 pixels.) Trainings and measurements are
kept and reused, and several processes with one --run_dir share the work.

    python finetune.py
    python finetune.py --weights=none --epochs=20 --batch_sizes=32,256,1024
    python finetune.py --weights=mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from large_batch import cli, paper
from large_batch.cli import setting
from large_batch.errors import MachineError, UserError

if TYPE_CHECKING:  # TensorFlow starts only after the command line is understood
    from large_batch.evidence import Claim
    from large_batch.measurements import Evaluated
    from large_batch.networks import Network
    from large_batch.recipes import Recipe

FILE = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
RATE, RATE_BATCH = 3e-4, 32  # the learning rate of this batch size
LEVEL, LARGEST = 256, 1024


def weights_word(weights: str) -> str:
    """Return the word of the weights: a name, or a file's name and digest."""
    return weights if weights in ("imagenet", "none") else cli.file_word(weights)


@dataclass(frozen=True, kw_only=True)
class Settings(cli.RepeatedSettings):
    """The flags."""

    network: str | None = setting("MobileNetV2", "MobileNetV2, or another, without --weights.", group="What to train")
    epochs: int = setting(200, "Epochs of each training.", "e{}", "What to train", least=1, most=10**6)
    optimizer: str = setting(
        "sgd",
        "sgd alone is the published one, with a rate for each batch size; or any other, as in adam:learning_rate=1e-4; "
        "see optimizers.py.",
        cli.named_word,
        "What to train",
    )
    weights: str = setting(
        "imagenet", "Where MobileNetV2 starts: imagenet, none, or a file of Keras' without its top.", weights_word
    )
    batch_sizes: tuple[int, ...] = setting(
        tuple(paper.FINE_TUNED), "Batch sizes, with commas.", cli.sizes_word, whole=True
    )

    def check(self) -> None:
        """Raise `UserError` for weights that are not there."""
        super().check()
        if self.weights in ("imagenet", "none"):
            return
        if not Path(self.weights).is_file():
            raise UserError(f"There is no weights file {self.weights}; give a file, imagenet or none.")
        if self.network != Settings.network:
            raise UserError(f"--weights is where {Settings.network} starts; {self.network} starts where the seed says.")

    def resolve(self, network: Any, samples: int) -> Settings:
        """Put the sizes in order, each once."""
        return replace(super().resolve(network, samples), batch_sizes=tuple(sorted(set(self.batch_sizes))))


def starting(get: Callable[[str], Network], weights: str) -> Callable[[str], Network]:
    """Return what gets a network as `get` does, with MobileNetV2 starting at these weights."""

    def get_starting(name: str) -> Network:
        import network_zoo

        network = get(name)
        if name != Settings.network or weights == "none":
            return network
        digest = weights if weights == "imagenet" else hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]
        network = replace(network, builder=network_zoo.mobilenet_v2(weights), architectures=(("repository", digest),))
        try:
            network.build()
        except Exception as error:  # Keras raises nearly anything
            if weights == "imagenet":
                raise MachineError(
                    f"Keras could not fetch MobileNetV2's ImageNet weights ({error}); put {FILE} into ~/.keras/models, "
                    "or name it with --weights."
                ) from error
            raise UserError(f"{weights} does not hold the weights of Keras' MobileNetV2 without its top.") from error
        return network

    return get_starting


@dataclass(frozen=True)
class Row:
    """A training: accuracies in percent."""

    batch_size: int
    seed: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float

    @classmethod
    def of(cls, recipe: Recipe, found: Evaluated) -> Row:
        """Return that of a recipe, evaluated at its minimizer."""
        return cls(recipe.batch_size, recipe.seed, found.train_loss, found.train_accuracy, found.test_accuracy)


def is_published(asked: str, chosen: str) -> bool:
    """Say whether the optimizer is the published one, as `sgd` alone asks for; `chosen` is it without its defaults.

    Raises `UserError` for SGD with its defaults spelled out, whose results would have the names of the published one's.
    """
    if chosen == Settings.optimizer != asked.strip():
        raise UserError(
            f"--optimizer={asked} is plain SGD, whose results would be named as the published one's; give "
            "another setting."
        )
    return chosen == Settings.optimizer


def sgd(size: int, epochs: int) -> str:
    """Return the published optimizer for a batch size: momentum 0.9, a rate that falls to 0 along a cosine."""
    rate = f"learning_rate={RATE * size / RATE_BATCH:g}"
    return f"sgd:{rate},momentum=0.9,weight_decay=0.0001,cosine={epochs}"


def level_then_falling(rows: Sequence[Row], test: int, but: str = "") -> Claim:
    """Judge the claim from the trainings, whose accuracies are of so many test samples.

    `but` says why these are not the trainings of the claim; there is no verdict then.
    """
    from large_batch import evidence

    def of(size: int) -> list[float]:
        return [row.test_accuracy for row in rows if row.batch_size == size]

    level = {size: of(size) for size in {row.batch_size for row in rows} if size <= LEVEL}
    verdict, found = evidence.OPEN, "two sizes up to 256, and 1024, are needed"
    if None in (value for size in (*level, LARGEST) for value in of(size)):
        found = "a loss is not finite"
    elif len(level) > 1 and of(LARGEST):
        means = [float(np.mean(values)) for values in level.values()]
        together, large = [value for values in level.values() for value in values], of(LARGEST)
        spread, fall = max(means) - min(means), float(np.mean(together) - np.mean(large))
        found = f"up to {LEVEL} {min(means):.2f} to {max(means):.2f} %, at {LARGEST} {fall:.2f} points less"
        mean = float(np.mean(together))
        errors = (mean * (100 - mean) / test) ** 0.5
        verdict = evidence.clear_side([(1, together), (-1, large)], errors)
        if verdict == evidence.HOLDS and spread >= fall / 2:
            verdict = evidence.CONTRADICTED
        if but:
            verdict, found = evidence.OPEN, f"{found}, {but}"
    return evidence.Claim(
        f"The accuracy is level up to a batch of {LEVEL} and falls at {LARGEST} (table of the reproduction).",
        f"The means up to {LEVEL} differ by less than half of the fall from them to {LARGEST}, and the fall is clear "
        f"(over trials: Welch's t-test, {evidence.LEVEL:.0%}; with one trial: {evidence.FAR} binomial standard "
        "errors of the test set).",
        found,
        verdict,
    )


def table(rows: Sequence[Row], known: dict[int, float], published: bool) -> str:
    """Lay out the accuracies by batch size, trials as mean ± deviation, beside those that are known, and the learning
    rate of the published optimizer."""
    from large_batch import tables

    lines = [["batch", "learning rate", "train %", "validation %", "published %"]]
    for size in dict.fromkeys(row.batch_size for row in rows):
        trials = [row for row in rows if row.batch_size == size]
        cells = [tables.cell([getattr(row, f"{half}_accuracy") for row in trials]) for half in ("train", "test")]
        rate = f"{RATE * size / RATE_BATCH:.2g}" if published else "-"
        lines.append([str(size), rate, *cells, str(known.get(size, "-"))])
    return tables.lay_out(lines)


def main(settings: Settings) -> None:
    """Train, evaluate, print the table and the claim, write the results and draw the figure."""
    settings.check()
    import network_zoo
    from large_batch import figures
    from large_batch.experiment import Experiment
    from large_batch.measurements import EvaluationRequest
    from large_batch.places import Place
    from large_batch.runner import Runner

    # Recipes
    asked, experiment = settings.optimizer, Experiment.begin(settings, starting(network_zoo.get, settings.weights))
    settings = experiment.settings
    evaluation = experiment.request(EvaluationRequest)
    published = is_published(asked, settings.optimizer)
    recipes = [
        experiment.recipe(size, seed, optimizer=sgd(size, settings.epochs) if published else settings.optimizer)
        for size in settings.batch_sizes
        for seed in settings.seeds
    ]
    items = {recipe: (evaluation, Place(recipe)) for recipe in recipes}
    # Run
    results = Runner(experiment.minimizers, settings).run([], list(items.values()))
    if results is None:
        return
    rows = [Row.of(recipe, results[item].result) for recipe, item in items.items()]
    # Table, claim and figure
    comparable = published and experiment.known_data and experiment.data.name == "cifar10"
    known = paper.FINE_TUNED if comparable and settings.network == Settings.network else {}
    tuned = settings.weights != "none" and settings.network == Settings.network
    begun = f"Fine-tuning from {Path(settings.weights).name}" if tuned else "Training from random weights"
    title = experiment.title(f"{begun}, {settings.epochs} epochs")
    but = "" if published else "by another optimizer than the claim's"
    if not tuned:
        but = "from random weights, at the learning rates that the reproduction's first version gives for fine-tuning"
    claim = level_then_falling(rows, len(experiment.data.x_test), but)
    print(f"\n{title}\n{table(rows, known, published)}\n\n{claim}")
    summary = {"claim": claim, "minimizers": experiment.origins(recipes), "results": list(results.values())}
    experiment.write("finetune", rows, summary, {"": figures.fine_tuning(rows, known, title)})


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
