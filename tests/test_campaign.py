"""The long list of commands: what counts as done, and what happens where one fails."""

import json
import os

import pytest
from conftest import ROOT, run_python

import campaign
from large_batch.errors import MachineError


def planted(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(content)


def test_what_counts_as_done(tmp_path):
    whole = json.dumps({"provenance": {"command": "a.py -n F1", "wall_seconds": 90.0}})
    half = json.dumps({"provenance": {"command": "b.py"}})
    for number, content in enumerate((whole, half, "[1]", "{", '{"provenance": 3}')):
        planted(tmp_path, str(number), content)
    (tmp_path / "folder.json").mkdir()
    assert campaign.done(tmp_path) == {"a.py -n F1": 90.0}


def test_the_others_run_where_one_fails(tmp_path, monkeypatch, capfd):
    script = "import json, sys; print('ran', sys.argv[1]); sys.exit(sys.argv[1] == 'b')"
    (tmp_path / "one.py").write_text(script)
    monkeypatch.setattr(campaign, "ROOT", tmp_path)
    monkeypatch.setattr(campaign, "COMMANDS", ("one.py a", "one.py b", "one.py c", "one.py d"))
    planted(tmp_path / "results", "d", json.dumps({"provenance": {"command": "one.py d", "wall_seconds": 60.0}}))
    with pytest.raises(MachineError, match=r"These commands failed: one\.py b\.$"):
        campaign.main(campaign.Settings())
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("ran")] == ["ran a", "ran b", "ran c"]
    assert "1.0 min  one.py d" in out
    campaign.main(campaign.Settings(list=True))
    assert "ran" not in capfd.readouterr().out


def test_a_signal_is_passed_on(tmp_path):
    """To the command, which may have to keep what it is about."""
    (tmp_path / "one.py").write_text(
        "import pathlib, signal, time\n"
        "def end(*_):\n    pathlib.Path('ended').touch()\n    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path('began').touch()\nsignal.pause()\n"
    )
    code = (
        "import pathlib, sys, threading, time, os, signal, campaign\n"
        "from large_batch.errors import Interrupted, signals_raised\n"
        "campaign.ROOT = pathlib.Path.cwd()\n"
        "def kill():\n    while not pathlib.Path('began').exists():\n        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=kill).start()\n"
        "try:\n    with signals_raised():\n        campaign.run('one.py')\n"
        "except Interrupted:\n    print('interrupted')\n"
    )
    done = run_python("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done.stderr
    assert (tmp_path / "ended").exists()
