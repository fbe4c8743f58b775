import dataclasses
import os
from dataclasses import dataclass

import pytest

import runs
from errors import MachineError, UserError


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


@pytest.mark.skipif(os.name != "posix", reason="a file is taken for a folder as on POSIX")
def test_an_unwritable_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        runs.check_writable(tmp_path / "file")
    runs.check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
