import dataclasses
import json
import os
import re
import string
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from conftest import StoppedError, recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from large_batch import datasets, store, training
from large_batch.backend import keras
from large_batch.errors import BusyError, MachineError, UserError
from large_batch.minimizers import Minimizers
from large_batch.networks import Network


@dataclass(frozen=True)
class Plain:
    batch: int
    rate: float = 0.1
    name = "net-b1"


@dataclass(frozen=True)
class Grown:
    batch: int
    rate: float = 0.1
    remedy: str = "none"
    name = "net-b1"


@dataclass(frozen=True)
class Row:
    epoch: int
    loss: float
    test: float | None = None


def test_a_recipe_has_a_folder_of_its_own(tmp_path):
    folders = {store.folder(tmp_path, one) for one in (Plain(1), Plain(2), Plain(1, 0.2))}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path and folder.name.startswith("net-b1-") for folder in folders)
    assert not any(folder.exists() for folder in folders)


def test_a_field_added_later_leaves_the_folders_where_they_are(tmp_path):
    assert store.folder(tmp_path, Grown(1, 0.3)) == store.folder(tmp_path, Plain(1, 0.3))
    assert store.folder(tmp_path, Grown(1, 0.3, "data augmentation")) != store.folder(tmp_path, Plain(1, 0.3))


def test_names_of_folders_never_change(digits, color_digits):
    """Else nobody's stored runs would be found again."""
    mnist = SimpleNamespace(name="mnist", digest=datasets.KINDS["mnist"].digest)
    growing = {"epochs": 3, "schedule": ((1, 300), (2, 1500))}
    halves = {"network": "C1", "definition": "paper", "precision": "bfloat16"}
    names = {
        "F1-mnist-b256-e100-s0-cc3080b7": recipe(mnist, batch_size=256, epochs=100),
        "F1-mnist-b6000-e100-s0-33644c2f": recipe(mnist, batch_size=6000, epochs=100),
        "F1-digits-b150-e2-s0-1428856b": recipe(digits),
        "C1-digits-paper-bfloat16-b150-e2-s0-616f4ac3": recipe(color_digits, **halves),
        "F1-digits-b150to1500-e3-s0-387dc170": recipe(digits, **growing),
        "F1-digits-b750-e2-s0-from-b150-e1-33803f0b": recipe(
            digits, batch_size=750, warm_start=recipe(digits, epochs=1)
        ),
    }
    assert {name: store.folder("runs", asked).name for name, asked in names.items()} == {name: name for name in names}


def test_a_failed_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "result.txt"
    with store.writing(path) as temporary:
        temporary.write_text("good")
    with pytest.raises(RuntimeError), store.writing(path) as temporary:
        temporary.write_text("half of the")
        raise RuntimeError
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusing_file_system_is_the_machines_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="could not be written"), store.writing(tmp_path / "file" / "x"):
        pass
    with (
        pytest.raises(MachineError, match=r"x could not be written: No space left on device\."),
        store.writing(tmp_path / "x"),
    ):
        raise OSError(28, os.strerror(28))


def test_csv_round_trip(tmp_path):
    rows = [Row(1, 0.1 + 0.2), Row(2, 1e-300, 3.0)]
    store.write_csv(tmp_path / "rows.csv", rows)
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == "epoch,loss,test"
    assert store.read_csv(tmp_path / "rows.csv", Row) == rows


NUMBERS = some.floats(allow_nan=False, allow_infinity=False)
in_one_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_one_folder
@given(some.lists(some.builds(Row, some.integers(), NUMBERS, some.none() | NUMBERS), min_size=1))
def test_any_csv_comes_back_to_the_bit(tmp_path, rows):
    store.write_csv(tmp_path / "rows.csv", rows)
    assert store.read_csv(tmp_path / "rows.csv", Row) == rows


@dataclass(frozen=True)
class Record:
    text: str
    numbers: list[float]
    inner: Row


RECORDS = some.builds(Record, some.text(), some.lists(NUMBERS), some.builds(Row, some.integers(), NUMBERS))


@in_one_folder
@given(RECORDS)
def test_any_record_comes_back_to_the_bit(tmp_path, record):
    store.write_record(tmp_path / "record.json", record)
    assert store.read_record(tmp_path / "record.json") == dataclasses.asdict(record)


@in_one_folder
@given(RECORDS, some.data())
def test_no_change_of_a_record_passes_for_it(tmp_path, record, data):
    """Whatever byte is changed or cut off, what is read is nothing, or what was written."""
    path = tmp_path / "record.json"
    store.write_record(path, record)
    content = path.read_bytes()
    place = data.draw(some.integers(0, len(content) - 1))
    if data.draw(some.booleans()):
        path.write_bytes(content[:place])
    else:
        changed = data.draw(some.integers(0, 255))
        path.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
    assert store.read_record(path) in (None, dataclasses.asdict(record))


@settings(in_one_folder, max_examples=40)  # each waits for the disk several times
@given(some.dictionaries(some.text(string.ascii_letters, min_size=1), some.binary(), min_size=1), some.data())
def test_a_folder_knows_its_files(tmp_path, files, data):
    folder = store.Folder(tmp_path / "folder")
    folder.path.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder.path / name).write_bytes(content)
    folder.seal(*files)
    assert folder.whole(*files)
    victim = data.draw(some.sampled_from(sorted(files)))
    (folder.path / victim).write_bytes(files[victim] + b"!")
    assert not folder.whole(victim)
    assert folder.whole(*(set(files) - {victim}))
    folder.set_aside_damaged()
    assert set(folder.sums()) == set(files) - {victim}
    folder.seal(dropping=files)
    assert folder.sums() == {}


def test_checksums_are_those_of_the_usual_tool(tmp_path):
    folder = store.Folder(tmp_path)
    for name in ("b.npz", "a.csv"):
        (tmp_path / name).write_text(name)
    folder.seal("b.npz", "a.csv")
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout == "a.csv: OK\nb.npz: OK\n"


@pytest.mark.parametrize("how", ["cut", "empty", "changed", "missing"])
def test_a_damaged_list_makes_nothing_vanish(tmp_path, caplog, how):
    folder = store.Folder(tmp_path / "folder")
    folder.seal()
    (folder.path / "minimizer").write_text("hours of work")
    folder.seal("minimizer")
    path = folder.path / "SHA256SUMS"
    text = path.read_text()
    path.write_text({"cut": text[:-30], "empty": "", "changed": text.replace("minim", "maxim"), "missing": ""}[how])
    if how == "missing":
        path.unlink()
    assert not folder.whole("minimizer")
    folder.set_aside_damaged()
    assert (folder.path / "minimizer.damaged-1").read_text() == "hours of work"
    assert "minimizer is of an unknown state, since SHA256SUMS is missing or damaged" in caplog.text
    assert folder.sums() == {}
    caplog.clear()
    folder.set_aside_damaged()
    assert caplog.text == ""


def test_a_file_that_vanished_is_not_sealed(tmp_path):
    with pytest.raises(MachineError, match="x vanished after it was written"):
        store.Folder(tmp_path).seal("x")


def test_what_is_set_aside_displaces_nothing(tmp_path, caplog):
    for content in ("first", "second"):
        (tmp_path / "x").write_text(content)
        store.set_aside(tmp_path / "x", "is of no use")
    assert [(tmp_path / f"x.damaged-{i}").read_text() for i in (1, 2)] == ["first", "second"]
    assert "x is of no use; it was set aside as x.damaged-2." in caplog.text


def test_a_lock_is_held_by_one(tmp_path):
    taken = pytest.raises(BusyError, match=rf"process {os.getpid()} on ")
    with store.lock(tmp_path / "x"), taken, store.lock(tmp_path / "x", wait=False):
        pass
    with store.lock(tmp_path / "x", wait=False), store.lock(tmp_path / "y", wait=False):
        pass


def test_a_folder_that_cannot_be_locked_is_the_machines_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="could not be locked: File exists"), store.lock(tmp_path / "file" / "x"):
        pass


def test_the_room_that_is_needed(tmp_path):
    store.check_space(tmp_path, 1)
    with pytest.raises(MachineError, match="MB left, but about"):
        store.check_space(tmp_path, 2**62)


def test_json_holds_data_classes(tmp_path):
    store.write_json(tmp_path / "x.json", {"rows": [Row(1, 2.0)], "best": Row(1, 2.0)})
    assert '"test": null' in (tmp_path / "x.json").read_text()


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

    data = datasets.load("digits", "unused").reshape_to((64,))
    here = Minimizers(Network("linear", build, "digits", (64,), 10), data, tmp_path)
    monkeypatch.setattr(training, "COMPILED_BATCH", 0)  # which would take longer than these steps
    asked, origin = recipe(data, network="linear"), store.provenance()

    def stop(_, note):
        if "epoch 2/" in note:
            raise StoppedError

    def train_with(threads, **settings):
        monkeypatch.setattr(store, "provenance", lambda: dataclasses.replace(origin, threads=threads))
        return here.train(asked, **settings)

    with pytest.raises(StoppedError):
        train_with(3, report=stop)
    assert caplog.text == ""
    found = train_with(5)
    assert "linear-digits-b150-e2-s0 was begun elsewhere and continues with threads 5 instead of 3" in caplog.text
    assert "will not end at the same bits" in caplog.text
    for provenance in (found.provenance, here.stored(asked).provenance):
        assert provenance.threads == 5
        assert [earlier["threads"] for earlier in provenance.earlier] == [3]


def test_the_commit_is_marked_when_the_code_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "__file__", str(tmp_path / "package" / "store.py"))

    def commit() -> str:
        return store.provenance().commit

    def git(*arguments: str) -> None:
        person = ["-c", "user.name=A Person", "-c", "user.email=person@example.org"]
        subprocess.run(["git", *person, *arguments], cwd=tmp_path, capture_output=True, check=True)

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


@pytest.mark.skipif(os.name != "posix", reason="a file is taken for a folder as on POSIX")
def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        store.check_writable(tmp_path / "file")
    store.check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
