"""The attempts to repair large-batch training (Appendix E of the paper, and since): each a small piece of a step.

A remedy may change a batch, its loss, or the step. A recipe names any number of them, applied in their order; with none
it is plain training. All randomness of a remedy comes from the key that it is given, which depends on (seed, step,
place in the list) alone, so that a resumed training repeats it exactly.

The next remedy is a data class here, and its name in `REMEDIES` and in `named.REMEDIES`, which the flags read before
TensorFlow starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

from large_batch import named
from large_batch.backend import keras, tf
from large_batch.errors import UserError
from large_batch.layers import normal, pixels
from large_batch.named import number

__all__ = ["REMEDIES", "Loss", "Moment", "Remedy", "Step", "canonical", "key_of", "make"]

Weights = Sequence[tf.Tensor]
# Takes the loss and a shard of a batch, changes the model, and returns the losses and logits before the change.
Step = Callable[["Loss", tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class Loss(Protocol):
    """The loss of a shard of a batch as a function of the weights."""

    def __call__(self, x: tf.Tensor, y: tf.Tensor, weights: Weights | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the losses (m,) and logits (m, classes) of samples (m, ...) and labels (m,).

        They are those at the model's weights, or at others. Only a call without others leaves a trace, in moving
        averages for example; so a remedy makes one such call, and names `Moment.weights` in the rest. These have the
        masks of dropout of the call before them without others.
        """


@dataclass(frozen=True, eq=False)
class Moment:
    """What a remedy may use in one step, within one replica.

    Attributes:
        model: Whose weights change.
        key: (2,) integers, all that random numbers may depend on.
        samples: Their number in the whole batch.
        share: Returns the replica's part of a tensor that has a row for each sample of the whole batch.
        total: Returns the sums over all replicas of several tensors.
        restart: Gives the optimizer the state that it had before its first step.
    """

    model: keras.Model
    key: tf.Tensor
    samples: tf.Tensor
    share: Callable[[tf.Tensor], tf.Tensor]
    total: Callable[[list[tf.Tensor]], list[tf.Tensor]]
    restart: Callable[[], None]

    @property
    def weights(self) -> list[tf.Tensor]:
        """The trainable variables as they are now."""
        return [tf.convert_to_tensor(variable) for variable in self.model.trainable_variables]


@dataclass(frozen=True)
class Remedy:
    """Changes nothing: each remedy overrides what it changes. Its fields are numbers, with defaults.

    `cost` is about how many plain steps a step takes as long as, `held` how many forward passes the gradient of its
    loss keeps in memory.
    """

    cost: ClassVar[float] = 1.0
    held: ClassVar[int] = 1

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `UserError` where the remedy is not for samples of a shape."""

    def batch(self, x: tf.Tensor, y: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the whole batch as the loss shall see it, before it is split over replicas."""
        return x, y

    def loss(self, loss: Loss, now: Moment) -> Loss:
        """Return the loss that the step shall minimise."""
        return loss

    def step(self, step: Step, now: Moment) -> Step:
        """Return what changes the model."""
        return step


@dataclass(frozen=True)
class Augment(Remedy):
    """Data augmentation on the fly (section E.1): reflection, rotation and translation, anew in each step.

    By default as in the paper: every second image is reflected, rotations are up to 10 degrees, translations up to 0.2
    of the image's height and width. What comes into the picture repeats the pixels of its border, as in Keras 1.
    """

    reflect: int = number(1, most=1)
    angle: float = number(10.0, most=180)
    shift: float = number(0.2, most=1)

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise UserError(f"The remedy augment is for images, (height, width, channels), not samples of {shape}.")

    @cached_property
    def _layers(self) -> list[keras.layers.Layer]:
        layers, filled = keras.layers, {"fill_mode": "nearest", "dtype": "float32"}
        with tf.init_scope():  # their seeds are variables, and this may be called while a function is traced
            reflection = [layers.RandomFlip("horizontal", dtype="float32")] if self.reflect else []
            rotation = layers.RandomRotation(self.angle / 360, **filled)
            return [*reflection, rotation, layers.RandomTranslation(self.shift, self.shift, **filled)]

    def batch(self, x, y, key):
        x = pixels(x)
        for place, layer in enumerate(self._layers):
            layer.generator.state.assign(_fold_in(key, place))
            x = layer(x, training=True)
        return x, y


@dataclass(frozen=True)
class Conservative(Remedy):
    """Conservative training (equation 5, section E.2): each step solves a proximal problem on its batch.

    It takes `iterations` of the optimizer on f_B(x) + strength / 2 ||x - x_k||^2, from x_k on; by default 3, with
    strength 1e-3, as in the paper. The paper does not say what becomes of ADAM's moments from one problem to the next:
    by default they go on, as those of one training; with `fresh=1` each problem has an ADAM of its own.
    """

    strength: float = number(1e-3)
    iterations: int = number(3, least=1)
    fresh: int = number(0, most=1)

    @property
    def cost(self) -> float:
        """Each iteration is a plain step."""
        return self.iterations

    def step(self, step, now):
        def solve(loss, x, y):
            if self.fresh:
                now.restart()
            start = now.weights

            def proximal(x, y, weights=None):
                losses, logits = loss(x, y, weights)
                pairs = zip(weights or now.weights, start, strict=True)
                distance = tf.add_n([tf.reduce_sum(tf.square(w - before)) for w, before in pairs])
                return losses + self.strength / 2 * distance, logits

            found = step(proximal, x, y)
            for _ in range(self.iterations - 1):
                step(proximal, x, y)
            return found

        return solve


@dataclass(frozen=True)
class Adversarial(Remedy):
    """Adversarial training with the fast gradient sign method (Goodfellow et al., 2014, arXiv:1412.6572, section 6).

    The loss is share J(x) + (1 - share) J(x + radius sign(dJ/dx)), with the share 0.5 of that paper, and its radius for
    MNIST, 0.25 of the range of a pixel.
    """

    cost: ClassVar[float] = 7 / 3  # of two forward passes, one back to the samples, and two back to the weights
    held: ClassVar[int] = 2

    radius: float = number(0.25)
    share: float = number(0.5, most=1)

    def loss(self, loss, now):
        def mixed(x, y, weights=None):
            x = pixels(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                losses, logits = loss(x, y, weights)
            if (slope := tape.gradient(losses, x)) is None:
                raise UserError("Adversarial training needs a network with a gradient with respect to its samples.")
            moved = tf.stop_gradient(x + self.radius * tf.sign(slope))
            others, _ = loss(moved, y, weights or now.weights)
            return self.share * losses + (1 - self.share) * others, logits

        return mixed


@dataclass(frozen=True)
class Stability(Remedy):
    """Stability training (Zheng et al., 2016, arXiv:1604.04326): the outputs shall not depend on noise in the pixels.

    The loss is J(x) + strength H(p(x), p(x')), where x' = x + deviation N(0, 1) and H is the cross-entropy of the two
    predicted distributions. The defaults of both are ours; the paper of Keskar et al. names none.
    """

    cost: ClassVar[float] = 2.0
    held: ClassVar[int] = 2

    strength: float = number(0.01)
    deviation: float = number(0.2)

    def loss(self, loss, now):
        def stabilised(x, y, weights=None):
            x = pixels(x)
            losses, logits = loss(x, y, weights)
            whole = tf.concat([[now.samples], tf.shape(x)[1:]], axis=0)
            noise = tf.reshape(now.share(normal(whole, now.key)), tf.shape(x))
            _, noisy = loss(x + self.deviation * noise, y, weights or now.weights)
            unstable = tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(logits), noisy)
            return losses + self.strength * unstable, logits

        return stabilised


@dataclass(frozen=True)
class SharpnessAware(Remedy):
    """Sharpness-aware minimisation, SAM (Foret et al., 2021, arXiv:2010.01412), as equation 6 is tackled today.

    The gradient is taken at w + radius g / ||g||, where g is the gradient of the whole batch at w; the reported losses
    are those at w. The radius is that paper's default, 0.05.
    """

    cost: ClassVar[float] = 2.0

    radius: float = number(0.05)

    def scales(self, now: Moment, weights: Weights) -> list[tf.Tensor | float]:
        """Return T of each weight: the ball is that of ||e / T||."""
        return [1.0 for _ in weights]

    def loss(self, loss, now):
        def perturbed(x, y, weights=None):
            at = weights or now.model.trainable_variables
            with tf.GradientTape() as tape:
                tape.watch(weights or [])
                losses, logits = loss(x, y, weights)
            slopes = tape.gradient(losses, at, unconnected_gradients="zero")
            slopes = now.total([tf.convert_to_tensor(slope) for slope in slopes])  # those of embeddings are sparse
            at = weights or now.weights
            scales = self.scales(now, at)
            slopes = [scale * slope for scale, slope in zip(scales, slopes, strict=True)]
            length = tf.math.divide_no_nan(self.radius, tf.linalg.global_norm(slopes))
            moved = [
                w + tf.stop_gradient(length * scale * slope) for w, scale, slope in zip(at, scales, slopes, strict=True)
            ]
            others, _ = loss(x, y, moved)
            return others + tf.stop_gradient(losses - others), logits

        return perturbed


@dataclass(frozen=True)
class AdaptiveSharpnessAware(SharpnessAware):
    """Adaptive SAM, ASAM (Kwon et al., 2021, arXiv:2102.11600): SAM in a ball that scales with the weights.

    The gradient is taken at w + radius T^2 g / ||T g||, with T = |w| + eta for each weight and 1 for biases, as the
    authors' code has it. Radius 0.5 and eta 0.01 are theirs for CIFAR-10.
    """

    radius: float = number(0.5)
    eta: float = number(0.01)

    def scales(self, now, weights):
        names = [variable.name for variable in now.model.trainable_variables]
        return [
            1.0 if name in ("bias", "beta") else tf.abs(tf.stop_gradient(w)) + self.eta
            for name, w in zip(names, weights, strict=True)
        ]


REMEDIES: dict[str, type[Remedy]] = {
    "augment": Augment,
    "conservative": Conservative,
    "adversarial": Adversarial,
    "stability": Stability,
    "sam": SharpnessAware,
    "asam": AdaptiveSharpnessAware,
}


def make(text: str) -> Remedy:
    """Return the remedy of a text, `name` or `name:setting=1,...`; raises `UserError` where there is none."""
    return named.make(text, REMEDIES, "remedy")


def canonical(text: str) -> str:
    """Return the one text of all that make the same remedy; raises `UserError` as `make` does."""
    return named.canonical(text, REMEDIES, "remedy")


def key_of(seed: int, step: tf.Tensor, place: int) -> tf.Tensor:
    """Return the key, (2,) integers, of the remedy at a place in the list, in one step of the training of a seed."""
    return _fold_in(_fold_in(tf.constant([seed, 1], tf.int64), step), place)


def _fold_in(key: tf.Tensor, number: tf.Tensor | int) -> tf.Tensor:
    return tf.random.experimental.stateless_fold_in(key, number, alg="philox")
