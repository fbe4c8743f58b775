import dataclasses
import io
import json
import re
import sys
from contextlib import ExitStack

import pytest
import quick
import small_network
from quick import run_code

from large_batch import files, memory, objectives, paper, runner
from large_batch import progress as progress_bar
from large_batch.cli import Settings
from large_batch.errors import BusyError, MachineError, UserError
from large_batch.layers import kept_bytes, pixels
from large_batch.measurements import EvaluationRequest, SharpnessRequest
from large_batch.minimizers import Minimizers, NoMinimizerError
from large_batch.models import digest
from large_batch.objective import Objective
from large_batch.places import Place
from large_batch.runner import Runner, leave_busy_for_last, trajectories
from large_batch.spectra import DensityRequest


def test_a_job_that_is_put_off_is_not_done(capsys):
    """Its share is neither counted as done nor twice."""
    with progress_bar.Progress(100) as bar:
        with pytest.raises(BusyError), bar.job(50, "put off") as report:
            report(30, "")
            raise BusyError
        for name in ("put off", "other"):
            with bar.job(50, name) as report:
                report(50, "")
        bar._shown = -1e9
        bar._show("all", "done", pause=0)
    assert "100%: all done" in capsys.readouterr().err


def test_what_others_do_is_left_to_the_end():
    asked = []

    def do(item, wait):
        asked.append((item, wait))
        if item in "bd" and not wait:
            raise BusyError
        return item.upper()

    assert leave_busy_for_last("abcd", do, wait=True) == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert asked == [("a", False), ("b", False), ("c", False), ("d", False), ("b", True), ("d", True)]
    asked.clear()
    with pytest.raises(BusyError):
        leave_busy_for_last("abcd", do, wait=False)
    assert asked[:4] == [("a", False), ("b", False), ("c", False), ("d", False)], "all else is done first"
    assert not any(wait for _, wait in asked)
    free = iter([False, False])  # c, at first and at the end

    def do_what_is_free(item, wait):
        if item == "b" or (item == "c" and not next(free, True)):
            raise BusyError
        asked.append(item)

    asked.clear()
    with pytest.raises(BusyError):
        leave_busy_for_last("abc", do_what_is_free, wait=False)
    assert asked == ["a"]
    free = iter([False, True])
    asked.clear()
    with pytest.raises(BusyError):
        leave_busy_for_last("abc", do_what_is_free, wait=False)
    assert asked == ["a", "c"], "what became free is done, though b is not"


def test_what_is_never_free_is_no_result():
    def do(item, wait):
        raise BusyError("taken")

    with pytest.raises(BusyError):
        leave_busy_for_last("a", do, wait=True)


def test_trajectories(digits):
    small, large = quick.recipe(digits, epochs=6), quick.recipe(digits, batch_size=1500, epochs=2)
    warm = [dataclasses.replace(large, warm_start=small.at_epoch(epoch)) for epoch in (4, 2)]
    assert list(trajectories([large, *warm, large.at_epoch(1), small.at_epoch(0)]).items()) == [
        (large, [large.at_epoch(1), large]),
        (small.at_epoch(4), [small.at_epoch(epoch) for epoch in (0, 2, 4)]),
        (warm[0], [warm[0]]),
        (warm[1], [warm[1]]),
    ]


@pytest.fixture
def make(digits, tmp_path):
    """Make a runner in the test's store, as another process would."""

    def make(**settings):
        return Runner(quick.minimizers(digits, tmp_path), Settings(**settings))

    return make


def test_the_others_go_on_without_what_diverges(make, digits, caplog):
    problem = {"network": "quick", "dataset": "digits", "data_digest": digits.digest, "definition": "repository"}
    evaluation = EvaluationRequest(**problem)
    wild = quick.recipe(digits, epochs=1, optimizer="adam:learning_rate=1e30")
    items = [(evaluation, Place(recipe)) for recipe in (wild, quick.recipe(digits, epochs=1))]
    with pytest.raises(NoMinimizerError):
        make().run([], items)
    far = SharpnessRequest(**problem, space="full", epsilon=1e38, solver="lbfgsb", iterations=1)
    items.insert(1, (far, items[1][1]))
    with pytest.raises(UserError, match="not finite within epsilon"):
        make().run([], items[1:])
    assert list(make().run([], items, leave_diverged=True)) == items[2:]
    diverged, infinite = [record.message for record in caplog.records]
    assert diverged.startswith("The training diverged")
    assert infinite.startswith(f"{items[1][1].name}: The loss is not finite within epsilon 1e+38")


@pytest.fixture
def work(monkeypatch):
    """The lengths of the progress bars: what each run expects to do."""
    lengths = []

    class Noted(runner.Progress):
        def __init__(self, work):
            lengths.append(work)
            super().__init__(work)

    monkeypatch.setattr(runner, "Progress", Noted)
    return lengths


def test_what_others_trained_and_measured_is_found(make, digits, tmp_path, work, capsys, monkeypatch):
    def request(kind, **settings):
        problem = {"network": "quick", "dataset": "digits", "data_digest": digits.digest, "definition": "repository"}
        return kind(**problem, **settings)

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    asked = quick.recipe(digits)
    half, box = asked.at_epoch(1), {"solver": "lbfgsb", "iterations": 2, "samples": 100}
    evaluation, boxes = (
        request(EvaluationRequest),
        [request(SharpnessRequest, epsilon=epsilon, **box) for epsilon in paper.EPSILONS],
    )
    items = [*((each, Place(asked)) for each in (evaluation, *boxes)), (evaluation, Place(half))]
    first = make()
    found = first.run([asked, half, asked], items)
    plan = capsys.readouterr().out.splitlines()
    assert plan[:3] == [
        f"Device:   CPU only, {first.minimizers.origin.threads} threads; for a GPU: pip install -e '.[gpu]'",
        "Batches:  750 samples",
        "Work:     1 trainings (0 stored, 0 resumed), 4 measurements (0 stored)",
    ]
    assert re.fullmatch(r"Memory:   about \d+\.\d GiB; \d+\.\d GiB are free", plan[3])
    assert plan[4:] == [f"Kept in:  {tmp_path}"]
    assert work == [3 * 3000 + 2 * (1500 + len(digits.x_test)) + 2 * 3 * 4 * 100]
    assert list(found) == items
    end, middle = map(first.minimizers.stored, (asked, half))
    assert middle.history == end.history[:1]
    model = first.minimizers.build(asked)
    on_test = Objective(model, digits.x_test, digits.y_test, prepare=pixels).evaluate(end.weights)
    evaluated, *sharp, evaluated_half = found.values()
    assert evaluated.result.test_accuracy == on_test.accuracy
    assert [each.result.epsilon for each in sharp] == list(paper.EPSILONS)
    assert sharp[0].result.loss == Objective(model, digits.x_train[:100], digits.y_train[:100], prepare=pixels).value(
        end.weights
    )
    assert max(each.result.iterations for each in sharp) <= box["iterations"]
    assert sharp[0].provenance.command == first.minimizers.origin.command
    assert evaluated.measurement.weights_digest == digest(end.weights)
    assert evaluated_half.measurement.weights_digest == digest(middle.weights)

    before = files()
    assert make().run([asked, half], items) == found
    assert work[1] == 0
    assert "1 trainings (1 stored, 0 resumed), 4 measurements (4 stored)" in capsys.readouterr().out
    assert files() == before

    more = request(SharpnessRequest, epsilon=1e-3, solver="lbfgsb", iterations=3), Place(asked)
    make().run([], [items[0], more])
    assert work[2] == 3 * 5 * 1500
    assert "1 trainings (1 stored, 0 resumed), 2 measurements (1 stored)" in capsys.readouterr().out
    assert before.items() <= files().items()

    (solution,) = first.solve({"LB": [asked]}, [evaluation])["LB"]
    assert (solution.distance_from_start, solution.train_loss) == (end.distance, evaluated.result.train_loss)
    for meanwhile in (None, dataclasses.replace(end, weights=end.weights + 1)):
        with monkeypatch.context() as patched, pytest.raises(MachineError, match="was trained anew meanwhile; run the"):
            patched.setattr(Minimizers, "stored", lambda self, recipe, given=meanwhile: given)
            patched.setattr(Runner, "run", lambda self, *_: {(evaluation, Place(asked)): evaluated})
            make().solve({"LB": [asked]}, [evaluation])

    make(retrain=True).run([asked, half])
    assert work[4] == 3 * 3000
    assert files().items().isdisjoint((path, when) for path, when in before.items() if path.name == "history.csv")


def test_fewer_samples_at_once_are_said_to_be_another_function(make, caplog):
    found = make().objectives
    for samples in (None, 1500, 300):
        assert not caplog.messages
        found.train(samples)
        found.test(samples)
    (said,) = caplog.messages
    assert said.startswith("Batch normalisation takes its statistics from 300 samples at once here, from 1,500 over")


def test_the_memory_of_second_derivatives_is_known_beforehand(make, digits, monkeypatch):
    first = make()
    kept = kept_bytes(first.minimizers.build(quick.recipe(digits)), 100)
    assert first.objectives.measuring_bytes(100, twice=False) == round(1.1 * kept)
    assert first.objectives.measuring_bytes(100, twice=True) == 4 * kept
    monkeypatch.setattr(objectives, "CHUNK", 100)
    assert first.objectives.measuring_bytes(150, twice=True) == pytest.approx(3 * kept), "75 at once"
    problem = {"network": "quick", "dataset": "digits", "data_digest": digits.digest, "definition": "repository"}
    density = DensityRequest(**problem, samples=100, probes=1, steps=1), Place(quick.recipe(digits))
    monkeypatch.setattr(memory, "used_bytes", lambda: 0)
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 * kept - 1)
    with pytest.raises(UserError, match="product over 100 samples of quick at once takes about"):
        first.run([], [density])
    tracked = quick.recipe(digits, track="eigenvalue:1:100")
    with pytest.raises(UserError, match="product over 100 samples of quick at once takes about"):
        first.run([tracked])
    assert not first.minimizers.is_stored(tracked), "nothing was done first"


def test_a_training_that_was_stopped_is_said_to_be_resumed(make, digits, capsys):
    asked = quick.recipe(digits)
    quick.stop_in_epoch(2, make().minimizers, asked)
    make().run([asked])
    assert "Work:     1 trainings (0 stored, 1 resumed), 0 measurements" in capsys.readouterr().out


def progress(monkeypatch, terminal):
    """Run two jobs of 1000 samples each, whose first 100 take a minute to compile and the others 0.1 s each; return
    what is said of them."""
    now, said = [0.0], io.StringIO()
    said.isatty = lambda: terminal
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv("COLUMNS", "80")
    with progress_bar.Progress(2000) as bar:
        for name in ("C1-cifar10-b5000-e100-s0-from-b256-e100", "sharp"):
            with bar.job(1000, name) as report:
                for i in range(1, 11):
                    now[0] += 60 if i == 1 else 10
                    report(100, f"epoch {i}/100 loss 0.1234 99.87%")
    return said.getvalue()


def test_progress_in_a_log_file(monkeypatch):
    """A line at most every 30 seconds, and no time left that counts what was compiled."""
    lines = progress(monkeypatch, terminal=False).splitlines()
    assert lines[:3] == [
        "  0%: C1-cifar10-b5000-e100-s0-from-b256-e100 starts",
        "  5%: C1-cifar10-b5000-e100-s0-from-b256-e100 epoch 1/100 loss 0.1234 99.87%",
        " 20%, 3 min left: C1-cifar10-b5000-e100-s0-from-b256-e100 epoch 4/100 loss 0.1234 99.87%",
    ]
    assert lines[-1] == "100%: sharp epoch 10/100 loss 0.1234 99.87%"
    assert len(lines) == 9


def test_progress_in_a_terminal(monkeypatch):
    """One line that changes, the loss always in view in 80 columns; at last it is gone."""
    *lines, last = progress(monkeypatch, terminal=True).split("\r\033[K")[1:]
    assert last == ""
    assert len(lines) == 22
    assert max(map(len, lines)) < 80
    assert all(line.endswith(("99.87%", "starts")) for line in lines)
    assert lines[2] == " 10%, 3 min left: C1-cifar10-b5000-e100-s0-fr... epoch 2/100 loss 0.1234 99.87%"


def test_what_another_process_trains_is_left_for_last(make, digits, monkeypatch, capsys):
    """And with it what starts at its minimizer; all else is done before."""
    small, large = quick.recipe(digits), quick.recipe(digits, batch_size=1500, epochs=1)
    warm, other = dataclasses.replace(large, warm_start=small.at_epoch(1)), dataclasses.replace(large, seed=1)
    found, calls, train = make().minimizers, [], Minimizers.train

    def noted(self, recipe, *, wait, **settings):
        calls.append((recipe, wait))
        if wait:
            another.close()  # it ends
        return train(self, recipe, wait=wait, **settings)

    monkeypatch.setattr(Minimizers, "train", noted)
    with ExitStack() as another:
        another.enter_context(files.lock(found.folder(small).path))
        assert make(wait=False).run([small, warm, large]) is None
        said = capsys.readouterr().out.splitlines()[-1]
        assert "quick-digits-b750-e2-s0" in said
        assert said.endswith("the same command without --nowait waits for the results.")
        assert [found.is_stored(each) for each in (small.at_epoch(1), small, warm, large)] == [
            False,
            False,
            False,
            True,
        ]
        calls.clear()
        make().run([small, warm, other])
    assert calls[:3] == [(small, False), (warm, False), (other, False)]
    assert calls[3:6] == [(small, True), (small.at_epoch(1), True), (warm, True)]
    assert all(map(found.is_stored, (small.at_epoch(1), small, warm, other)))


@pytest.mark.parametrize("ended", [False, True])
def test_what_another_process_trains_anew_is_not_trained_again(make, digits, monkeypatch, ended):
    asked, calls, train = quick.recipe(digits, epochs=1), [], Minimizers.train

    def noted(self, recipe, *, retrain, wait, **settings):
        calls.append((retrain, wait))
        if not wait:
            if ended:
                train(self, recipe)
            raise BusyError
        return train(self, recipe, retrain=retrain, wait=wait, **settings)

    monkeypatch.setattr(Minimizers, "train", noted)
    make(retrain=True).run([asked, asked])
    assert calls == [(True, False), (False, True)], "what is waited for is new"
    assert make().minimizers.is_stored(asked)


# Runs a command four times at once, noting every file that is put in its place; then in another store with --nowait,
# while one of its trainings is taken.
AT_ONCE = """
import json, os
from pathlib import Path
import forked
from large_batch import files

command, shared, held = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
replace, written = os.replace, os.open(shared / "written", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def noting(source, target):
    replace(source, target)
    os.write(written, f"{target}\\n".encode())

os.replace = noting
forked.AT_ONCE = 4

def job(root, *flags):
    folders = [f"--{kind}_dir={root / kind}" for kind in ("data", "run", "result")]
    return forked.Command([*command, *folders, *flags], {})

done = forked.results([job(shared)] * 4)
(trained,) = shared.glob("run/small-digits-b750-e1-s0-*")
with files.lock(held / "run" / trained.name):
    done += forked.results([job(held, "--nowait")])
print(json.dumps(done))
"""


def test_the_same_command_four_times_at_once_and_without_waiting(tmp_path, run_script):
    """Each piece of work is done once, by whichever of four, and all report; one that does not wait does the rest."""
    command = ["sharpness.py", "-n", small_network.NAME, "--epochs=1", "--small_batch=750", "--large_batch=1500"]
    command += ["--iterations=1", "--dimension=2", "--trials=2"]
    shared, held = tmp_path / "shared", tmp_path / "held"
    shared.mkdir()
    done = run_code(run_script, tmp_path, AT_ONCE, json.dumps(command), shared, held)
    assert done.returncode == 0, done.stderr
    *four, (code, out, errors) = json.loads(done.stdout.splitlines()[-1])

    assert [code for code, _, _ in four] == [0] * 4, four
    assert "Traceback" not in str(four)
    reports = {out.partition("\n\n")[2] for _, out, _ in four}
    assert len(reports) == 1
    assert "Metric 2.1" in reports.pop()
    written = [line for line in (shared / "written").read_text().splitlines() if line.startswith(f"{shared}/run/")]
    once = [line for line in written if not line.endswith("SHA256SUMS")]
    assert len(once) == len(set(once))
    assert len([line for line in once if "/run/sharpness/" in line]) == 2 * (2 + 2 * 2)
    assert len([line for line in once if line.endswith("minimizer.weights.h5")]) == 2
    assert not list(shared.rglob("*damaged*"))
    (result,) = shared.glob("result/*.json")
    assert [len(those) for those in json.loads(result.read_text())["results"].values()] == [6, 6]

    assert code == 0, errors
    words = r"\S+/small-digits-b750-e1-s0-\w+ is in the hands of process .*; the same command without --nowait waits"
    assert re.match(words, out.splitlines()[-1])
    assert "Traceback" not in errors
    assert not list(held.glob("run/small-digits-b750-*/minimizer.weights.h5"))
    assert len(list(held.glob("run/small-digits-b1500-*/minimizer.weights.h5"))) == 1
    assert len(list(held.glob("run/sharpness/*.json"))) == 2 + 2 * 2, "of the other minimizer"
    assert not list(held.glob("result/*"))
