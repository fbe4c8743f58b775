"""What is trained and measured: networks, of the zoo or a user's own, and the problem that one is on a data set."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from large_batch.errors import UserError, first_line, no_such

if TYPE_CHECKING:  # the names of networks are known before TensorFlow starts
    from large_batch.backend import keras

NAMES = ("F1", "F2", "C1", "C2", "C3", "C4", "VGG11", "MobileNetV2")  # of the zoo, known before TensorFlow starts
DEFINITIONS = ("repository", "paper")
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
STATISTICS = ("interpolate", "batch", "recalibrate")  # of ordinary batch normalisation; see statistics.py


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Which function is minimised and measured: the loss of a network, in one of its definitions, on a data set.

    `architecture` tells the network from others that had its name and definition (`Network.architecture`),
    `data_digest` is the SHA-256 of the data (`datasets.DataSet`).
    """

    network: str
    dataset: str
    data_digest: str
    definition: str = "repository"
    architecture: str = ""


@dataclass(frozen=True)
class Network:
    """A network and how it is used by default: a row of Table 1, or a user's own.

    `builder(network, definition, classes, seed, precision)` returns a whole Keras model, whatever its layers and its
    head, at the starting point of the seed. Its outputs are `outputs`: "logits", or the probabilities of a "softmax".
    `architectures` holds what tells each definition from what had its name before, "" where it is not listed; where it
    is None, `find` takes digests of the layers. `own` tells a user's network from the zoo's.
    """

    name: str
    builder: Callable[..., keras.Model]
    dataset: str | None
    input_shape: tuple[int, ...]
    classes: int
    outputs: str = "logits"
    definitions: tuple[str, ...] = DEFINITIONS
    architectures: tuple[tuple[str, str], ...] | None = None
    own: bool = False

    def architecture(self, definition: str) -> str:
        """Return what tells this network from others that had its name and definition, "" for the first of them."""
        return dict(self.architectures or ()).get(definition, "")

    def small_batch(self, train_size: int) -> int:
        """Return the paper's 256 samples, or 1 % of a training set too small for that."""
        return min(256, max(1, train_size // 100))

    def large_batch(self, train_size: int) -> int:
        """Return 10 % of the training set (section 2.2)."""
        return max(1, train_size // 10)

    def build(
        self, definition: str = "repository", classes: int | None = None, seed: int = 0, precision: str = "float32"
    ) -> keras.Model:
        """Return the network at a starting point.

        Args:
            definition: "repository" (the authors' code) or "paper" (Appendix B).
            classes: Number of outputs; default: those of the network's own data set.
            seed: Determines the starting point.
            precision: "float32", or "bfloat16" for layers that compute in bfloat16 with float32 weights.

        Returns:
            A model from (m, *input_shape) floats to (m, classes) outputs.

        Raises:
            UserError: For a definition or precision that does not exist.
        """
        for kind, chosen, choices in (
            ("definition", definition, self.definitions),
            ("precision", precision, PRECISIONS),
        ):
            if chosen not in choices:
                raise UserError(f"There is no {kind} '{chosen}' of {self.name}; choose one of {', '.join(choices)}.")
        return self.builder(self, definition, classes or self.classes, seed, precision)


def find(name: str, zoo: Mapping[str, Network]) -> Network:
    """Return the network of the zoo that has a name, or a user's own, given as `file.py:name`.

    What has that name in the file is a `Network`, or a function without arguments that returns a Keras model with an
    output for each class. Such a model is trained on the data set that the user names; its starting point comes from
    Keras' global seed.

    Raises:
        UserError: Where there is no such network, or it is of no use here.
    """
    check_name(name, zoo)
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _own(path, attribute)
    return zoo[name] if zoo[name].architectures is not None else _told_apart(zoo[name])


def check_name(name: str, zoo: Iterable[str]) -> None:
    """Raise `UserError` unless `find` can look for the network."""
    path = name.rpartition(":")[0]
    if not path.endswith(".py") and name not in zoo:
        raise no_such("network", name, zoo, ", or your own as file.py:name")
    if path.endswith(".py") and not Path(path).is_file():
        raise UserError(f"There is no file {path} with a network.")


def _told_apart(network: Network) -> Network:
    """Return a network with digests of its layers, so that another of its name is not taken for it."""
    models = {name: network.build(name) for name in network.definitions}
    for model in models.values():
        _check_trainable(model)
    told = {name: network.architecture(name) or _architecture(model) for name, model in models.items()}
    return replace(network, architectures=tuple(told.items()))


def _own(path: str, attribute: str) -> Network:
    try:
        if (given := getattr(_imported(path), attribute, None)) is None:
            raise UserError(f"{path} has no {attribute}.")
        if isinstance(given, Network):
            return replace(_told_apart(given), own=True)
        return _of_function(attribute, given)
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        why = first_line(error)[:200].rstrip(".")
        raise UserError(
            f"{path}:{attribute} is no network: {why}; it must be a Network, or a function without arguments that "
            "returns a Keras model with an output for each class."
        ) from error


def _imported(path: str) -> ModuleType:
    place = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]  # other files may have that name
    specification = importlib.util.spec_from_file_location(f"{Path(path).stem}_{place}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # where data classes look for their annotations
    specification.loader.exec_module(module)
    return module


def _of_function(name: str, given: Callable[[], keras.Model]) -> Network:
    """Return the network of a user's function; raises `TypeError` where its model is none."""
    model = seeded(given, 0, "float32")
    if not len(model.inputs) == len(model.outputs) == 1:
        raise TypeError(f"it has {len(model.inputs)} inputs and {len(model.outputs)} outputs")
    _check_trainable(model)
    if others := {variable.dtype for variable in model.trainable_variables} - {"float32"}:
        raise TypeError(f"its weights are {', '.join(others)} instead of float32")
    shape, outputs = model.input_shape[1:], model.output_shape
    if len(outputs) != 2 or None in (*shape, outputs[1]):
        raise TypeError(f"its inputs have the shape {model.input_shape} and its outputs {outputs}")

    def build(network: Network, definition: str, classes: int, seed: int, precision: str) -> keras.Model:
        if classes > network.classes:
            raise UserError(
                f"The data have {classes} classes, for which {network.name} has only {network.classes} outputs."
            )
        return seeded(given, seed, precision)

    return Network(
        name=name,
        builder=build,
        dataset=None,
        input_shape=tuple(shape),
        classes=outputs[1],
        outputs="softmax" if _ends_in_softmax(model) else "logits",
        definitions=DEFINITIONS[:1],
        architectures=((DEFINITIONS[0], _architecture(model)),),
        own=True,
    )


def _check_trainable(model: keras.Model) -> None:
    if not model.trainable_variables:
        raise TypeError("it has no trainable weights")


def seeded(function: Callable[[], keras.Model], seed: int, precision: str) -> keras.Model:
    """Return a function's model, with all of Keras' global settings as they are for every call."""
    from large_batch.backend import keras

    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(PRECISIONS[precision])
    try:
        return function()
    finally:
        keras.config.set_dtype_policy(before)


def _ends_in_softmax(model: keras.Model) -> bool:
    """Say whether the last layer is declared to be a softmax."""
    from large_batch.backend import keras

    last = model.layers[-1]
    return isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax


def _architecture(model: keras.Model) -> str:
    """Return a digest of the layers, their settings and the code of those that are a user's, whatever Keras has called
    them in this process."""
    names = {layer.name: str(number) for number, layer in enumerate(model.layers)}

    def nameless(node: Any) -> Any:
        """Drop names, and replace those that stand in lists, where Keras says what a layer takes its inputs from."""
        if isinstance(node, dict):
            named = {"name"} if _known(node.get("module") or "keras") else {"name", "module"}
            return {key: nameless(value) for key, value in node.items() if key not in named}
        if isinstance(node, list):
            return [names.get(part, part) if isinstance(part, str) else nameless(part) for part in node]
        return node

    try:
        text = json.dumps(nameless(json.loads(model.to_json())), sort_keys=True)
    except Exception:  # a model that cannot be written down is told by its weights alone
        text = ""
    kinds = {kind for layer in model._flatten_layers() for kind in type(layer).__mro__}
    text += "".join(map(_code, sorted(kinds, key=lambda kind: kind.__qualname__)))
    shapes = [tuple(variable.shape) for variable in model.variables]
    return hashlib.sha256(f"{text} {shapes}".encode()).hexdigest()[:8]


def _code(kind: type) -> str:
    """Return the code of a user's own kind of layer; empty for others, and where it is not known."""
    with suppress(OSError, TypeError):
        return "" if _known(kind.__module__) else inspect.getsource(kind)
    return ""


def _known(module: str) -> bool:
    """Say whether a module is no user's."""
    return module.partition(".")[0] in ("builtins", "keras", "large_batch", "tensorflow")
