"""Minimizers that come with the repository, so that its results need no training first.

`minimizers/` holds folders of the store without their starting points, which the seeds give again.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from large_batch import files, store
from large_batch.minimizers import RESULT, START, Minimizers
from large_batch.models import write_weights
from large_batch.recipes import Recipe
from large_batch.store import Folder

HERE = Path(__file__).parent.parent / "minimizers"  # of a checkout
KEPT = [name for name in RESULT if name != START]


def take(minimizers: Minimizers, recipes: Iterable[Recipe], shipped: Path = HERE) -> None:
    """Copy those minimizers of `recipes` that the store does not have, not even begun, from `shipped`; say so."""
    replicas = minimizers.replicas
    for recipe in recipes:
        theirs, ours = Folder(store.folder(shipped, recipe)), minimizers.folder(recipe)
        if not replicas.broadcast(theirs.whole(*KEPT) and not ours.path.exists()):
            continue
        with replicas.lock(ours.path):
            if replicas.chief and not ours.path.exists():  # nobody was faster
                _copy(minimizers, recipe, theirs, ours)
            replicas.barrier()


def _copy(minimizers: Minimizers, recipe: Recipe, theirs: Folder, ours: Folder) -> None:
    for name in KEPT:
        with files.writing(ours.path / name) as temporary:
            shutil.copyfile(theirs.path / name, temporary)
    write_weights(minimizers.build(recipe), ours.path / START)
    ours.seal(*RESULT)
    origin = minimizers.stored(recipe).provenance
    store.log.warning(
        "%s: %d epochs, trained on %s in %.0f min, come with the repository; --retrain trains it here.",
        recipe.name,
        recipe.epochs,
        origin.processor or origin.machine,
        origin.wall_seconds / 60,
    )
