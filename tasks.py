"""Lists of work: the part of one that this process does, and who does what when several processes share a store."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from errors import BusyError, UserError

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """The part number `index`, from 0, of `count` equal parts of any list."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(
                f"Of {self.count} tasks the indices are 0 to {self.count - 1}, not {self.index}; set --task_index and "
                "--task_count, or number the job array from 0."
            )

    def share(self, work: Sequence[Work]) -> list[Work]:
        """Return every `count`-th item, from item `index` on."""
        return list(work[self.index :: self.count])


def task(index: int | None, count: int | None, environment: Mapping[str, str] = os.environ) -> Task:
    """Return the task that is asked for, or the one that Slurm (job arrays) or Kubernetes (indexed jobs) started.

    Raises `UserError` where the number of tasks is not known, or the index is none of them.
    """

    def number(name: str) -> int | None:
        text = environment.get(name)
        if text is not None and not text.isdecimal():
            raise UserError(
                f"The environment variable {name} must be a whole number, not '{text}'; correct or unset it."
            )
        return None if text is None else int(text)

    if index is None and count == 1:
        return Task()
    if index is None:
        source = "SLURM_ARRAY_TASK_ID"
        if (slurm := number(source)) is not None:
            index = (slurm - (number("SLURM_ARRAY_TASK_MIN") or 0)) // (number("SLURM_ARRAY_TASK_STEP") or 1)
            count = count or number("SLURM_ARRAY_TASK_COUNT")
        else:
            source = "JOB_COMPLETION_INDEX"
            index = number(source)
    else:
        source = "--task_index"
    if index is None and count is None:
        return Task()
    if index is None:
        raise UserError(f"--task_count={count} needs to know which task this is; give --task_index, from 0.")
    if count is None:
        raise UserError(
            f"{source} says that this is task {index}, but not of how many; give --task_count (1: all work is its own)."
        )
    return Task(index, count)


def each(work: Sequence[Work], do: Callable[[Work, bool], Result]) -> dict[Work, Result]:
    """Return what `do(item, wait)` returns for each item.

    `do` raises `BusyError` for what another process does, unless told to wait: that is asked for again at the end.
    """
    done = {}
    for wait in (False, True):
        for item in work:
            if item not in done:
                try:
                    done[item] = do(item, wait)
                except BusyError:
                    if wait:
                        raise
    return {item: done[item] for item in work}
