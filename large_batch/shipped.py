"""Minimizers that come with the repository, so that its results need no training first.

`minimizers/` holds folders of the store without their starting points, which the seeds give again.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from large_batch import files, store
from large_batch.backend import keras
from large_batch.distribution import Replicas
from large_batch.models import write_weights
from large_batch.progress import duration
from large_batch.recipes import Recipe
from large_batch.store import MINIMIZER, START, Folder

HERE = Path(__file__).parent.parent / "minimizers"  # of a checkout
KEPT = [name for name in MINIMIZER if name != START]


def take(recipe: Recipe, ours: Folder, build: Callable[[Recipe], keras.Model], replicas: Replicas) -> None:
    """Copy a recipe's minimizer into our folder if it comes with the repository and is not even begun; say so.

    `build` returns the recipe's network at its starting point.
    """
    theirs = Folder(store.folder(HERE, recipe))
    if not replicas.broadcast(not ours.path.exists() and theirs.whole(*KEPT)):
        return
    with replicas.lock(ours.path):
        if replicas.chief and not ours.path.exists():  # nobody was faster
            with ours.replacing() as new:
                for name in KEPT:
                    with files.writing(new.path / name) as temporary:
                        shutil.copyfile(theirs.path / name, temporary)
                write_weights(build(recipe), new.path / START)
                new.seal(*MINIMIZER)
            origin = ours.provenance()
            store.log.warning(
                "%s in batches of %d: %d epochs, trained on %s in %s, come with the repository; "
                "--retrain trains it here.",
                recipe.network,
                recipe.batch_size,
                recipe.epochs,
                (origin.processor or origin.machine).partition(" avx")[0],
                duration(origin.wall_seconds),
            )
        replicas.barrier()
