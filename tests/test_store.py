import dataclasses
import hashlib
import json
import string
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from conftest import recipe, run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from large_batch import datasets, store
from large_batch.errors import MachineError, UserError


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


def test_csv_round_trip(tmp_path):
    rows = [Row(1, 0.1 + 0.2), Row(2, 1e-300, 3.0)]
    store.write_csv(tmp_path / "rows.csv", rows)
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == "epoch,loss,test"
    assert store.read_csv(tmp_path / "rows.csv", Row) == rows


NUMBERS = some.floats(allow_nan=False, allow_infinity=False)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


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
def test_a_folder_knows_its_files(tmp_path, contents, data):
    folder = store.Folder(tmp_path / "folder")
    folder.path.mkdir(exist_ok=True)
    (folder.path / "recipe.json").touch()
    for name, content in contents.items():
        (folder.path / name).write_bytes(content)
    folder.seal("recipe.json", *contents)
    assert folder.whole(*contents)
    victim = data.draw(some.sampled_from(sorted(contents)))
    (folder.path / victim).write_bytes(contents[victim] + b"!")
    assert not folder.whole(victim)
    assert folder.whole(*(set(contents) - {victim}))
    folder.tidy()
    assert set(folder.sums()) - {"recipe.json"} == set(contents) - {victim}
    folder.seal(dropping=["recipe.json", *contents])
    assert folder.sums() == {}


def test_checksums_are_those_of_the_usual_tool(tmp_path):
    folder = store.Folder(tmp_path)
    for name in ("b.npz", "a.csv"):
        (tmp_path / name).write_text(name)
    folder.seal("b.npz", "a.csv")
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout == "a.csv: OK\nb.npz: OK\n"


@pytest.mark.parametrize("how", ["cut", "empty", "changed", "missing", "folder"])
def test_a_damaged_list_makes_nothing_vanish(tmp_path, caplog, how):
    folder = store.Folder(tmp_path / "folder")
    folder.seal()
    (folder.path / "minimizer").write_text("hours of work")
    folder.seal("minimizer")
    path = folder.path / "SHA256SUMS"
    text = path.read_text()
    path.write_text(
        {"cut": text[:-30], "empty": "", "changed": text.replace("minim", "maxim"), "missing": "", "folder": ""}[how]
    )
    if how in ("missing", "folder"):
        path.unlink()
    if how == "folder":
        path.mkdir()
    assert not folder.whole("minimizer")
    folder.tidy()
    assert (folder.path / "minimizer.damaged-1").read_text() == "hours of work"
    assert "minimizer is of an unknown state, since SHA256SUMS is missing or damaged" in caplog.text
    assert folder.sums() == {}
    caplog.clear()
    folder.tidy()
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["../../precious.txt", "/precious.txt", ".hidden", "a/b", "..", ""])
def test_a_list_that_names_what_is_elsewhere_is_damaged(tmp_path, caplog, name):
    """Whoever wrote it: nothing outside of the folder is read, renamed or deleted."""
    (tmp_path / "precious.txt").write_text("precious")
    folder = store.Folder(tmp_path / "run" / "folder")
    folder.seal()
    (folder.path / "recipe.json").touch()
    folder.seal("recipe.json")
    lines = (folder.path / "SHA256SUMS").read_text().rpartition("# ")[0] + f"{64 * '0'}  {name}\n"
    (folder.path / "SHA256SUMS").write_text(f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")
    assert folder.sums() == {}
    folder.tidy()
    assert (folder.path / "recipe.json.damaged-1").exists()
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_what_a_link_leads_to_is_not_set_aside(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious.txt").write_text("precious")
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(UserError, match="link leads to files that are no whole run"):
        store.Folder(tmp_path / "link").tidy()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["precious.txt"]


def test_a_folder_that_does_not_say_whose_it_is_is_set_aside(tmp_path, caplog):
    folder = store.Folder(tmp_path)
    for name in ("recipe.json", "minimizer"):
        (tmp_path / name).write_text(name)
    folder.seal("recipe.json", "minimizer")
    assert folder.content("recipe.json") == b"recipe.json"
    (tmp_path / "recipe.json").write_text("changed")
    assert folder.content("recipe.json") is None
    folder.tidy()
    assert (tmp_path / "minimizer.damaged-1").read_text() == "minimizer"
    assert "minimizer is of an unknown state, since recipe.json is missing or damaged" in caplog.text
    assert folder.sums() == {}


@pytest.mark.parametrize("name", ["minimizer", "recipe.json", "SHA256SUMS"])
def test_a_folder_in_place_of_a_file_is_set_aside(tmp_path, name):
    folder = store.Folder(tmp_path / "run")
    folder.seal()
    for file in ("recipe.json", "minimizer"):
        (folder.path / file).touch()
    folder.seal("recipe.json", "minimizer")
    (folder.path / name).unlink()
    (folder.path / name).mkdir()
    assert not folder.whole("recipe.json", "minimizer")
    folder.tidy()
    assert (folder.path / f"{name}.damaged-1").is_dir()


REPLACING = """
import os, signal, sys
from pathlib import Path
from large_batch import files, store

def fill(folder, content):
    folder.path.mkdir(exist_ok=True)
    for name in ("recipe.json", "minimizer"):
        with files.writing(folder.path / name) as temporary:
            temporary.write_text(content)
    folder.seal("recipe.json", "minimizer")

replace, kills = os.replace, 0

def killing(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

while True:
    folder = store.Folder(Path(sys.argv[1]) / f"killed-{kills}" / "run")
    with files.lock(folder.path):
        fill(folder, "old")
        (folder.path / "x.damaged-1").touch()
    if os.fork() == 0:
        os.replace, left = killing, kills + 1
        with files.lock(folder.path), folder.replacing() as new:
            fill(new, "new")
        os._exit(0)
    _, status = os.wait()
    with files.lock(folder.path):
        folder.tidy()
        assert folder.whole("recipe.json", "minimizer")
        folder.forget()
    assert sorted(path.name for path in folder.path.parent.iterdir()) == [".run.lock", "run"]
    assert (folder.path / "x.damaged-1").exists()
    print((folder.path / "minimizer").read_text())
    if not os.WIFSIGNALED(status):
        break
    kills += 1
"""


def test_a_folder_is_replaced_as_a_whole_whenever_it_is_killed(tmp_path):
    done = run_python("-c", REPLACING, tmp_path)
    assert done.stderr == ""
    found = done.stdout.split()
    assert set(found[:4]) == {"old"}, "while the new one is being written"
    assert found[-1] == "new"
    assert sorted(found, reverse=True) == found, "first old, then new"


def test_a_recipe_is_told_by_what_was_written_of_it():
    written = json.loads(json.dumps(dataclasses.asdict(Grown(1, 0.3))))
    assert store.describes(written, Grown(1, 0.3))
    assert not store.describes(written, Grown(2, 0.3))
    del written["remedy"]  # as a version wrote that had none
    assert store.describes(written, Grown(1, 0.3))
    assert not store.describes(written, Grown(1, 0.3, "data augmentation"))
    assert not store.describes(written | {"later": 1}, Grown(1, 0.3))
    assert not store.describes({}, Grown(1))
    assert not any(store.describes(wrong, Grown(1)) for wrong in ([], None, "x", 3))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"sha256": 1e999}', None])
def test_a_record_may_be_anything(tmp_path, content):
    path = tmp_path / "record.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert store.read_record(path) is None
    assert store.read_record(path / "below") is None


def test_a_file_that_vanished_is_not_sealed(tmp_path):
    with pytest.raises(MachineError, match="x vanished after it was written"):
        store.Folder(tmp_path).seal("x")


def test_json_holds_data_classes(tmp_path):
    store.write_json(tmp_path / "x.json", {"rows": [Row(1, 2.0)], "best": Row(1, 2.0)})
    assert '"test": null' in (tmp_path / "x.json").read_text()
