import dataclasses
import os
import re
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import runs
from errors import BusyError, MachineError, UserError


@dataclass(frozen=True)
class Recipe:
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
    folders = {runs.folder(tmp_path, recipe) for recipe in (Recipe(1), Recipe(2), Recipe(1, 0.2))}
    assert len(folders) == 3
    assert all(folder.parent == tmp_path and folder.name.startswith("net-b1-") for folder in folders)
    assert not any(folder.exists() for folder in folders)


def test_a_field_added_later_leaves_the_folders_where_they_are(tmp_path):
    assert runs.folder(tmp_path, Grown(1, 0.3)) == runs.folder(tmp_path, Recipe(1, 0.3))
    assert runs.folder(tmp_path, Grown(1, 0.3, "data augmentation")) != runs.folder(tmp_path, Recipe(1, 0.3))


def test_a_failed_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "result.txt"
    with runs.writing(path) as temporary:
        temporary.write_text("good")
    with pytest.raises(RuntimeError), runs.writing(path) as temporary:
        temporary.write_text("half of the")
        raise RuntimeError
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusing_file_system_is_the_machines_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="could not be written"), runs.writing(tmp_path / "file" / "x"):
        pass
    with (
        pytest.raises(MachineError, match=r"x could not be written: No space left on device\."),
        runs.writing(tmp_path / "x"),
    ):
        raise OSError(28, os.strerror(28))


def test_csv_round_trip(tmp_path):
    rows = [Row(1, 0.1 + 0.2), Row(2, 1e-300, 3.0)]
    runs.write_csv(tmp_path / "rows.csv", rows)
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == "epoch,loss,test"
    assert runs.read_csv(tmp_path / "rows.csv", Row) == rows


NUMBERS = some.floats(allow_nan=False, allow_infinity=False)
in_one_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_one_folder
@given(some.lists(some.builds(Row, some.integers(), NUMBERS, some.none() | NUMBERS), min_size=1))
def test_any_csv_comes_back_to_the_bit(tmp_path, rows):
    runs.write_csv(tmp_path / "rows.csv", rows)
    assert runs.read_csv(tmp_path / "rows.csv", Row) == rows


@dataclass(frozen=True)
class Record:
    text: str
    numbers: list[float]
    inner: Row


RECORDS = some.builds(Record, some.text(), some.lists(NUMBERS), some.builds(Row, some.integers(), NUMBERS))


@in_one_folder
@given(RECORDS)
def test_any_record_comes_back_to_the_bit(tmp_path, record):
    runs.write_record(tmp_path / "record.json", record)
    assert runs.read_record(tmp_path / "record.json") == dataclasses.asdict(record)


@in_one_folder
@given(RECORDS, some.data())
def test_no_change_of_a_record_passes_for_it(tmp_path, record, data):
    """Whatever byte is changed or cut off, what is read is nothing, or what was written."""
    path = tmp_path / "record.json"
    runs.write_record(path, record)
    content = path.read_bytes()
    place = data.draw(some.integers(0, len(content) - 1))
    if data.draw(some.booleans()):
        path.write_bytes(content[:place])
    else:
        changed = data.draw(some.integers(0, 255))
        path.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
    assert runs.read_record(path) in (None, dataclasses.asdict(record))


@in_one_folder
@given(some.dictionaries(some.text(string.ascii_letters, min_size=1), some.binary(), min_size=1), some.data())
def test_a_folder_knows_its_files(tmp_path, files, data):
    folder = runs.Folder(tmp_path / "folder")
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
    folder = runs.Folder(tmp_path)
    for name in ("b.npz", "a.csv"):
        (tmp_path / name).write_text(name)
    folder.seal("b.npz", "a.csv")
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout == "a.csv: OK\nb.npz: OK\n"


@pytest.mark.parametrize("how", ["cut", "empty", "changed", "missing"])
def test_a_damaged_list_makes_nothing_vanish(tmp_path, caplog, how):
    folder = runs.Folder(tmp_path / "folder")
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
        runs.Folder(tmp_path).seal("x")


def test_what_is_set_aside_displaces_nothing(tmp_path, caplog):
    for content in ("first", "second"):
        (tmp_path / "x").write_text(content)
        runs.set_aside(tmp_path / "x", "is of no use")
    assert [(tmp_path / f"x.damaged-{i}").read_text() for i in (1, 2)] == ["first", "second"]
    assert "x is of no use; it was set aside as x.damaged-2." in caplog.text


def test_a_lock_is_held_by_one(tmp_path):
    taken = pytest.raises(BusyError, match=rf"process {os.getpid()} on ")
    with runs.lock(tmp_path / "x"), taken, runs.lock(tmp_path / "x", wait=False):
        pass
    with runs.lock(tmp_path / "x", wait=False), runs.lock(tmp_path / "y", wait=False):
        pass


def test_a_folder_that_cannot_be_locked_is_the_machines_failure(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="could not be locked: File exists"), runs.lock(tmp_path / "file" / "x"):
        pass


def test_the_room_that_is_needed(tmp_path):
    runs.check_space(tmp_path, 1)
    with pytest.raises(MachineError, match="MB left, but about"):
        runs.check_space(tmp_path, 2**62)


def test_json_holds_data_classes(tmp_path):
    runs.write_json(tmp_path / "x.json", {"rows": [Row(1, 2.0)], "best": Row(1, 2.0)})
    assert '"test": null' in (tmp_path / "x.json").read_text()


def test_provenance():
    origin = runs.provenance().after(12.34)
    assert origin.packages["numpy"]
    assert origin.wall_seconds == 12.3
    assert origin.finished.endswith("Z")
    assert origin.commit == "unknown" or len(origin.commit.removesuffix("+changes")) == 40
    assert dataclasses.asdict(origin)


def test_the_commit_is_marked_when_the_code_differs(tmp_path):
    def commit() -> str:
        ask = [sys.executable, "-c", "import runs; print(runs.provenance().commit)"]
        return subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def git(*arguments: str) -> None:
        person = ["-c", "user.name=A Person", "-c", "user.email=person@example.org"]
        subprocess.run(["git", *person, *arguments], cwd=tmp_path, capture_output=True, check=True)

    git("init")
    for file in ("runs.py", "errors.py"):
        shutil.copy(Path(runs.__file__).with_name(file), tmp_path)
    for folder in ("results", "Figures"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "C1").write_text("old")
    git("add", ".")
    git("commit", "-m", "Begin")
    assert re.fullmatch("[0-9a-f]{40}", commit())
    for folder in ("results", "Figures"):
        (tmp_path / folder / "C1").write_text("new")
    (tmp_path / "notes").touch()
    assert re.fullmatch("[0-9a-f]{40}", commit())
    (tmp_path / "errors.py").write_text((tmp_path / "errors.py").read_text() + "\n")
    assert re.fullmatch("[0-9a-f]{40}[+]changes", commit())


@pytest.mark.skipif(os.name != "posix", reason="a file is taken for a folder as on POSIX")
def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        runs.check_writable(tmp_path / "file")
    runs.check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
