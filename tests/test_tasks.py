import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_python
from hypothesis import given
from hypothesis import strategies as some

from errors import BusyError, UserError
from tasks import Task, each, task


@given(some.lists(some.integers()), some.integers(1, 20))
def test_tasks_split_any_list_once_and_evenly(work, count):
    shares = [Task(index, count).share(work) for index in range(count)]
    assert sorted(sum(shares, [])) == sorted(work)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize(
    ("index", "count", "environment", "expected"),
    [
        (None, None, {}, Task(0, 1)),
        (2, 4, {}, Task(2, 4)),
        (None, None, SLURM | {"SLURM_ARRAY_TASK_ID": "4"}, Task(3, 4)),
        (None, None, SLURM | {"SLURM_ARRAY_TASK_STEP": "2"}, Task(3, 4)),
        (None, 8, {"JOB_COMPLETION_INDEX": "5"}, Task(5, 8)),
        (1, 2, SLURM, Task(1, 2)),
        (None, 1, SLURM, Task(0, 1)),
    ],
)
def test_which_task_this_is(index, count, environment, expected):
    assert task(index, count, environment) == expected


@pytest.mark.parametrize(
    ("index", "count", "environment", "words"),
    [
        (4, 4, {}, "Of 4 tasks the indices are 0 to 3, not 4"),
        (-1, 4, {}, "not -1"),
        (None, None, SLURM, "not 6; set --task_index and --task_count, or number the job array from 0"),
        (
            None,
            None,
            {"JOB_COMPLETION_INDEX": "5"},
            "JOB_COMPLETION_INDEX says that this is task 5, but not of how many",
        ),
        (2, None, {}, "--task_index says that this is task 2, but not of how many; give --task_count"),
        (None, 3, {}, "--task_count=3 needs to know which task this is"),
        (None, None, {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID must be a whole number, not 'x'"),
    ],
)
def test_tasks_that_are_none(index, count, environment, words):
    with pytest.raises(UserError, match=words):
        task(index, count, environment)


def test_what_others_do_is_left_to_the_end():
    asked = []

    def do(item, wait):
        asked.append((item, wait))
        if item in "bd" and not wait:
            raise BusyError
        return item.upper()

    assert each("abcd", do) == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert asked == [("a", False), ("b", False), ("c", False), ("d", False), ("b", True), ("d", True)]


def test_what_is_never_free_is_no_result():
    def do(item, wait):
        raise BusyError("taken")

    with pytest.raises(BusyError):
        each("a", do)


def test_four_concurrent_tasks_of_a_job_array_share_a_store(tmp_path):
    """Each piece of work is done once, by whichever task, and the command itself collects the results."""
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("data", "run", "result")]
    job = ["sharpness.py", "-n", "F1", "--dataset=digits", "--epochs=1", "--small_batch=150", "--large_batch=500"]
    job += ["--iterations=1", "--dimension=2", "--trials=2", *folders]
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *job],
            cwd=ROOT,
            env=os.environ | array | {"SLURM_ARRAY_TASK_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for i, process in enumerate(tasks):
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        assert re.match(
            rf"Task {i} of 4: 3 measurements are kept in .*; when all tasks are done, the same command", out
        )
    assert not list((tmp_path / "result").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("F1*")}
    assert len([path for path in kept if path.parent.name == "sharpness"]) == 2 * (2 + 2 * 2)
    assert len([path for path in kept if path.parent.name == "run"]) == 2

    done = run_python(*job)
    assert done.returncode == 0, done.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("F1*")}, "nothing is done again"
    (result,) = (tmp_path / "result").glob("*.json")
    assert [len(those) for those in json.loads(result.read_text())["results"].values()] == [6, 6]
