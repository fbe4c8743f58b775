import dataclasses
import json
import os
import re
import subprocess

import pytest
from conftest import StoppedError, recipe

from large_batch import datasets, store, training
from large_batch.backend import keras
from large_batch.minimizers import Minimizers
from large_batch.networks import Network


def test_provenance(monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "7")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp")
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    origin = store.provenance("CPU").after(12.34)
    assert origin.device == "CPU"
    assert origin.packages["numpy"]
    assert origin.wall_seconds == 12.3
    assert origin.finished.endswith("Z")
    assert origin.commit == "unknown" or len(origin.commit.removesuffix("+changes")) == 40
    assert origin.processor.strip()
    assert origin.threads == 7
    assert origin.environment["XLA_FLAGS"] == "--xla_dump_to=/tmp"
    assert "TF_XLA_FLAGS" not in origin.environment
    assert store.Provenance(**json.loads(json.dumps(dataclasses.asdict(origin)))) == origin
    for unset in ("", "0", "many"):
        monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", unset)
        assert 1 <= store.provenance().threads <= os.cpu_count()


def test_what_differs_between_two_processes():
    packages, environment = {"numpy": "2.0", "scipy": "1.15"}, {"TF_ENABLE_ONEDNN_OPTS": "1"}
    before = store.Provenance(
        "a.py", "c0", "3.11", packages, "Linux", processor="A avx", threads=2, environment=environment
    )
    assert before.differences(before) == []
    elsewhere = dataclasses.replace(before, command="b.py", commit="c1", machine="Linux, 9 cores", wall_seconds=3.0)
    assert elsewhere.differences(before) == []
    now = dataclasses.replace(
        before,
        packages=packages | {"numpy": "2.1"},
        processor="B avx2",
        threads=4,
        environment={"TF_ENABLE_ONEDNN_OPTS": "0"},
    )
    assert now.differences(before) == [
        "processor B avx2 instead of A avx",
        "threads 4 instead of 2",
        "TF_ENABLE_ONEDNN_OPTS 0 instead of 1",
        "numpy 2.1 instead of 2.0",
    ]
    unknown = store.Provenance("a.py", "c0", "3.11", {}, "Linux")  # as it was noted once
    assert now.differences(unknown) == []


def test_a_training_that_another_number_of_threads_continues(tmp_path, monkeypatch, caplog):
    """It is said, since the bits depend on it, and both are in the provenance of the result."""

    def build(network, definition, classes, seed, precision):
        return keras.Sequential([keras.Input(network.input_shape), keras.layers.Dense(classes)])

    data = datasets.load_data("digits", "unused").reshape_to((64,))
    network = Network("linear", build, "digits", (64,), 10)
    monkeypatch.setattr(training, "COMPILED_BATCH", 0)  # which would take longer than these steps
    asked, origin = recipe(data, network="linear"), store.provenance()

    def stop(_, note):
        if "epoch 2/" in note:
            raise StoppedError

    def train_with(threads, **settings):
        there = Minimizers(network, data, tmp_path, origin=dataclasses.replace(origin, threads=threads))
        return there.train(asked, **settings)

    with pytest.raises(StoppedError):
        train_with(3, report=stop)
    assert caplog.text == ""
    found = train_with(5)
    assert "linear-digits-b150-e2-s0 was begun elsewhere and continues with threads 5 instead of 3" in caplog.text
    assert "will not end at the same bits" in caplog.text
    for provenance in (found.provenance, Minimizers(network, data, tmp_path).stored(asked).provenance):
        assert provenance.threads == 5
        assert [earlier["threads"] for earlier in provenance.earlier] == [3]


def test_the_commit_is_marked_when_the_code_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "__file__", str(tmp_path / "package" / "store.py"))

    def commit() -> str:
        return store.provenance().commit

    def git(*arguments: str) -> None:
        person = ["-c", "user.name=A Person", "-c", "user.email=person@example.org"]
        alone = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        subprocess.run(["git", *person, *arguments], cwd=tmp_path, env=alone, capture_output=True, check=True)

    git("init")
    for folder in ("package", "results", "Figures"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "C1").write_text("old")
    git("add", ".")
    git("commit", "-m", "Begin")
    assert re.fullmatch("[0-9a-f]{40}", commit())
    for folder in ("results", "Figures"):
        (tmp_path / folder / "C1").write_text("new")
    (tmp_path / "notes").touch()
    assert re.fullmatch("[0-9a-f]{40}", commit())
    (tmp_path / "package" / "C1").write_text("new")
    assert re.fullmatch("[0-9a-f]{40}[+]changes", commit())
    monkeypatch.setattr(store, "__file__", str(tmp_path.parent / "package" / "store.py"))
    assert commit() == "unknown"
