import pytest
from conftest import minimizers, recipe, train
from quick import run_code

from large_batch.errors import MachineError

LIMITED = """
import os, resource
import conftest
from large_batch import datasets
from large_batch.errors import MachineError

data = datasets.load_data("digits", "unused").reshape_to((784,))
for limit in sys.argv[2:]:
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), -1))
        try:
            conftest.train(conftest.recipe(data, batch_size=750), data, f"{sys.argv[1]}/{limit}")
        except MachineError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_disk_that_refuses_leaves_everything_as_it_was(run_script, digits, tmp_path):
    """A limit on the size of files stands for a full disk: the writes themselves fail, also those of HDF5."""
    expected = {"3000000": "start.weights.h5", "9000000": "checkpoint-000000002.npz"}
    done = run_code(run_script, tmp_path, LIMITED, tmp_path, *expected)
    messages = done.stdout.splitlines()[-2:]
    asked = recipe(digits, batch_size=750)
    for message, (limit, refused) in zip(messages, expected.items(), strict=True):
        assert message.endswith(f"{refused} could not be written: File too large."), done.stderr
        found = minimizers(asked, digits, tmp_path / limit)
        folder = found.folder(asked)
        assert refused not in {path.name for path in folder.path.iterdir()}
        assert not list(folder.path.glob(".*"))
        assert folder.whole(*folder.sums())
        assert found.samples_to_train(asked) == 2 * 1500


def test_a_disk_without_room_is_found_before_the_work(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000_000}))
    with pytest.raises(MachineError, match=r"has 10 MB left, but about 64 MB will be written"):
        train(recipe(digits), digits, tmp_path)
