"""A network like F1 with dropout, but one that trains in a moment: for tests of what is the same for every network."""

import pytest
from conftest import StoppedError

from large_batch.minimizers import Minimizers
from large_batch.networks import Network
from large_batch.recipes import Recipe
from network_zoo import classifier

QUICK = Network("quick", classifier(lambda parts: [*parts.dense(16), *parts.drop(0.2)]), "digits", (784,), 10)


def recipe(data, **settings):
    """Return a short recipe: two steps an epoch, too large for XLA, which takes longer to compile than to train."""
    defaults = {"network": "quick", "batch_size": 750, "epochs": 2, "seed": 0}
    return Recipe(dataset=data.name, data_digest=data.digest, **(defaults | settings))


def minimizers(data, run_dir, network=QUICK):
    return Minimizers(network, data, run_dir)


def stop_in_epoch(number, found, asked, **settings):
    """Train up to the first steps of an epoch."""

    def stop(_, note):
        if f"epoch {number}/" in note:
            raise StoppedError

    with pytest.raises(StoppedError):
        found.train(asked, report=stop, **settings)


def run_code(run_script, folder, code, *arguments):
    """Run code with arguments in a process that has TensorFlow, but has not started it, so that it can fork."""
    (folder / "code.py").write_text(f"import sys; sys.path[:0] = ['tests', '.']\n{code}")
    return run_script(folder / "code.py", *arguments)
