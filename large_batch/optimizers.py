"""The optimizers that a recipe may name: each a data class of its settings, which builds an optimizer of Keras.

The next optimizer is a data class here, an `Optimizer` whose settings are declared by `number`, and its name in
`OPTIMIZERS` and in `named.OPTIMIZERS`, which the flags read before TensorFlow starts. What its Keras optimizer keeps
must start at one number in each variable, since `conservative:fresh=1` sets it back so.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

from large_batch import named
from large_batch.backend import keras, tf
from large_batch.named import number


class FusedAdam(keras.optimizers.Adam):
    """Keras' ADAM in one pass over the memory for each variable, without `amsgrad`, for which it raises ValueError.

    Written as a formula, a step passes over weights, gradient and moments once for each operation, which took 4.6 ms of
    a small step of F1, instead of 1.4. The fused operation computes the same formula; it rounds beta to float32 before
    it takes 1 - beta, so steps differ from Keras' by less than 1e-4 of their length.
    """

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        if self.amsgrad:
            raise ValueError("FusedAdam has no amsgrad; use keras.optimizers.Adam.")

    def update_step(self, gradient, variable, learning_rate):
        """Update one variable and its moments; called by Keras on each device."""
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=tf.cast(learning_rate, tf.float32),  # kept in Keras' floatx
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


class QuasiNewton(keras.optimizers.Optimizer):
    """adaQN, a stochastic L-BFGS (Keskar & Berahas, 2016, arXiv:1511.01169, algorithm 1).

    A step goes along the gradient times an L-BFGS matrix that begins with ADAGRAD's diagonal. At the end of each cycle
    of steps, `end_cycle`, the mean w_n of the cycle's iterates is compared with the last good one, w_o, on a fixed
    monitoring set. Where the loss is more than `growth` times that of w_o, the weights go back to w_o, and pairs and
    gradients are forgotten. Else s = w_n - w_o and y = F s, with the mean F of the outer products of the last gradients
    (the accumulated Fisher matrix), are a new pair of the L-BFGS matrix if s'y > curvature s's, and w_n is the good one
    from then on.

    All vectors are the n weights in one row. What is not there yet is zero, and takes no part.
    """

    def __init__(
        self,
        learning_rate: float,
        pairs: int,
        gradients: int,
        growth: float,
        curvature: float,
        epsilon: float,
    ):
        super().__init__(learning_rate=learning_rate, name="adaqn")
        self.pairs, self.gradients = pairs, gradients
        self.growth, self.curvature, self.epsilon = growth, curvature, epsilon

    def build(self, variables):
        """Make the state, for a list of variables."""
        if self.built:
            return
        super().build(variables)
        size = sum(math.prod(variable.shape) for variable in variables)

        def state(name: str, *shape: int, dtype: str = "float32") -> keras.Variable:
            return self.add_variable(shape, initializer="zeros", dtype=dtype, name=name)

        self._squares, self._sum, self._good = state("squares", size), state("sum", size), state("good", size)
        self._s, self._y = state("s", self.pairs, size), state("y", self.pairs, size)
        self._inner = state("inner", self.pairs)  # s'y of each pair
        self._past = state("gradients", self.gradients, size)
        self._good_loss, self._summed = state("good_loss"), state("summed", dtype="int64")
        self._kept, self._cycles = state("kept", dtype="int64"), state("cycles", dtype="int64")

    def apply(self, grads, trainable_variables=None):
        """Take one step; called within a replica, with its part of the gradient."""
        variables = list(trainable_variables or self._trainable_variables)
        self.build(variables)
        pairs = zip(grads, variables, strict=True)
        gradient = _flat([tf.zeros(v.shape) if g is None else g for g, v in pairs])
        if context := tf.distribute.get_replica_context():
            gradient = context.all_reduce("SUM", gradient)
        squares = self._squares + tf.square(gradient)
        w = _flat(variables) - self.learning_rate * self._direction(gradient, squares)
        kept = tf.convert_to_tensor(self._kept)

        def keep(past, gradient):
            past.scatter_update(tf.IndexedSlices(gradient[None], (kept % self.gradients)[None]))

        _update(keep, [self._past], [gradient])
        changed = [self._squares, self._sum, self._summed, self._kept, *variables]
        parts = _like(w, variables)
        assign(changed, [squares, self._sum + w, self._summed + 1, kept + 1, *parts])
        assign([self.iterations], [self.iterations + 1])

    def _direction(self, gradient: tf.Tensor, squares: tf.Tensor) -> tf.Tensor:
        """Return the L-BFGS matrix times the gradient, by the two loops over the pairs."""
        factors = {}
        for i in reversed(range(self.pairs)):
            factors[i] = tf.math.divide_no_nan(_dot(self._s[i], gradient), self._inner[i])
            gradient = gradient - factors[i] * self._y[i]
        direction = gradient / tf.sqrt(squares + self.epsilon)
        for i in range(self.pairs):
            factor = tf.math.divide_no_nan(_dot(self._y[i], direction), self._inner[i])
            direction = direction + (factors[i] - factor) * self._s[i]
        return direction

    def end_cycle(self, loss: Callable[[list[tf.Tensor]], tf.Tensor]) -> None:
        """Compare and learn, within a replica; `loss` is that of the monitoring set at any weights."""
        variables = self._trainable_variables
        mean = self._sum / tf.cast(self._summed, tf.float32)
        found, good = loss(_like(mean, variables)), tf.convert_to_tensor(self._good)
        first = self._cycles == 0
        back = tf.logical_not(first | (found <= self.growth * self._good_loss))  # also where it is no number
        s = mean - good
        known = tf.cast(tf.minimum(self._kept, self.gradients), tf.float32)
        y = tf.linalg.matvec(self._past, tf.linalg.matvec(self._past, s), transpose_a=True) / known
        inner = _dot(s, y)
        new = tf.logical_not(first | back) & (inner > self.curvature * _dot(s, s))

        def with_new(memory, row):
            return tf.where(back, tf.zeros_like(memory), tf.where(new, tf.concat([memory[1:], row[None]], 0), memory))

        memories = zip((self._s, self._y, self._inner), (s, y, inner), strict=True)
        changes = [(memory, with_new(tf.convert_to_tensor(memory), row)) for memory, row in memories]
        changes += [
            (self._past, tf.where(back, 0.0, self._past)),
            (self._kept, tf.where(back, tf.zeros([], tf.int64), self._kept)),
            (self._good, tf.where(first | new, mean, good)),
            (self._good_loss, tf.where(first | new, found, self._good_loss)),
            (self._sum, tf.zeros_like(mean)),
            (self._summed, tf.zeros([], tf.int64)),
            (self._cycles, self._cycles + 1),
        ]
        w = tf.where(back, good, _flat(variables))
        changes += zip(variables, _like(w, variables), strict=True)
        assign(*zip(*changes, strict=True))


def _update(change: Callable, variables: list, values: list[tf.Tensor]) -> None:
    """Within a replica: call `change(variable, value)` for each pair; the values are the same on all replicas."""

    def on_all(strategy: tf.distribute.Strategy, values: list) -> None:
        for variable, value in zip(variables, values, strict=True):
            own = variable.value if isinstance(variable, keras.Variable) else variable
            strategy.extended.update(own, change, args=(value,), group=False)

    tf.distribute.get_replica_context().merge_call(on_all, args=(list(values),))


def assign(variables: list, values: list[tf.Tensor]) -> None:
    """Within a replica: give variables their values, which are the same on all replicas."""
    _update(lambda variable, value: variable.assign(value), variables, values)


def _flat(parts: list) -> tf.Tensor:
    return tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)


def _like(row: tf.Tensor, variables: list) -> list[tf.Tensor]:
    """Return the parts of a flat vector in the shapes of the variables."""
    parts = tf.split(row, [math.prod(variable.shape) for variable in variables])
    return [tf.reshape(part, variable.shape) for part, variable in zip(parts, variables, strict=True)]


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.tensordot(a, b, 1)


@dataclass(frozen=True)
class Optimizer:
    """The settings of an optimizer: `kept` is how many numbers it keeps for each weight, `cycle` after how many steps
    it looks at all of them, if it does."""

    kept: ClassVar[int] = 2
    cycle: ClassVar[int | None] = None

    learning_rate: float

    def build(self) -> keras.optimizers.Optimizer:
        """Return the optimizer."""
        raise NotImplementedError

    def rate(self, epoch: int) -> float:
        """Return the learning rate once `epoch` epochs are finished."""
        return self.learning_rate


@dataclass(frozen=True)
class Adam(Optimizer):
    """ADAM as the paper's own code has it, with the defaults of Keras 1."""

    learning_rate: float = number(1e-3)
    beta_1: float = number(0.9, most=1)
    beta_2: float = number(0.999, most=1)
    epsilon: float = number(1e-8)

    def build(self) -> keras.optimizers.Optimizer:
        """Return the optimizer."""
        return FusedAdam(**asdict(self))


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """ADAGRAD (Duchi et al., 2011), Keras' own, with the learning rate and zero start of Keras 1.

    Keras 1 added an epsilon of 1e-8 to the root of the sum of squares; Keras 3 adds it to the sum, so it is squared.
    """

    kept: ClassVar[int] = 1

    learning_rate: float = number(0.01)
    initial_accumulator_value: float = number(0.0)
    epsilon: float = number(1e-16)

    def build(self) -> keras.optimizers.Optimizer:
        """Return the optimizer."""
        return keras.optimizers.Adagrad(**asdict(self))


class DecayedSGD(keras.optimizers.SGD):
    """Keras' SGD with weight decay as PyTorch's has it: `decay` times the weights is part of every gradient."""

    def __init__(self, learning_rate: float, momentum: float, nesterov: bool, decay: float):
        super().__init__(learning_rate, momentum, nesterov)
        self.decay = decay

    def update_step(self, gradient, variable, learning_rate):
        """Update one variable; called by Keras on each device."""
        super().update_step(gradient + self.decay * variable, variable, learning_rate)


@dataclass(frozen=True)
class Sgd(Optimizer):
    """SGD (Sutskever et al., 2013), Keras' own, with the learning rate of Keras 1.

    If asked for, it has momentum, the weight decay of `DecayedSGD`, and a learning rate that falls to 0 over `cosine`
    epochs (Loshchilov & Hutter, 2017, without restarts).
    """

    kept: ClassVar[int] = 1

    learning_rate: float = number(0.01)
    momentum: float = number(0.0, most=1)
    nesterov: int = number(0, most=1)
    weight_decay: float = number(0.0)
    cosine: int = number(0)

    def build(self) -> keras.optimizers.Optimizer:
        """Return the optimizer."""
        settings = self.learning_rate, self.momentum, bool(self.nesterov)
        return DecayedSGD(*settings, self.weight_decay) if self.weight_decay else keras.optimizers.SGD(*settings)

    def rate(self, epoch: int) -> float:
        """Return the learning rate once `epoch` epochs are finished."""
        done = min(epoch / self.cosine, 1) if self.cosine else 0
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class AdaQN(Optimizer):
    """adaQN (Keskar & Berahas, 2016), see `QuasiNewton`, which keeps 2 pairs + gradients + 3 numbers for each weight.

    The cycle of 20 steps, 10 pairs, 100 gradients, the growth 1.01 and the curvature 1e-4 are the defaults of the
    public implementation stochQN; the learning rate is that of ADAGRAD here, whose diagonal it begins with. The
    monitoring set is as large as a batch.
    """

    learning_rate: float = number(0.01)
    cycle: int = number(20, least=1)
    pairs: int = number(10, least=1)
    gradients: int = number(100, least=1)
    growth: float = number(1.01)
    curvature: float = number(1e-4)
    epsilon: float = number(1e-8)

    @property
    def kept(self) -> int:
        """How many numbers it keeps for each weight."""
        return 2 * self.pairs + self.gradients + 3

    def build(self) -> keras.optimizers.Optimizer:
        """Return the optimizer."""
        settings = asdict(self)
        del settings["cycle"]
        return QuasiNewton(**settings)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adagrad": Adagrad, "sgd": Sgd, "adaqn": AdaQN}


def make(text: str) -> Optimizer:
    """Return the optimizer's settings of a text, `name` or `name:setting=1,...`; raises `UserError` where there is
    none."""
    return named.make(text, OPTIMIZERS, "optimizer")


def canonical(text: str) -> str:
    """Return the one text of all that make the same optimizer; raises `UserError` as `make` does."""
    return named.canonical(text, OPTIMIZERS, "optimizer")
