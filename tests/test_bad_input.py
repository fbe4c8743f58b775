"""What the commands say to bad input: one sentence on standard error, exit code 2 (1 where the machine fails), and
nothing done. All commands run in forks of one process, since starting TensorFlow for each would take minutes."""

import dataclasses
import json
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from bad_files import CHANNELS_FIRST, IMAGES, NOT_A_NUMBER, cifar10, cifar100, file, hdf5, mnist, npy, timit, weights
from conftest import ROOT
from forked import KILLED, Command

PLOT, SHARPNESS = "plot_parametric_plot.py", "sharpness.py"
CURVES, SWEEP, WARM = "training_curves.py", "batch_size_sweep.py", "warmstart.py"
FOLDERS = dict.fromkeys((PLOT, CURVES, SWEEP, WARM), ("data", "run", "figure", "result"))
FOLDERS[SHARPNESS] = "data", "run", "result"
DIGITS = "-n F1 --dataset=digits "
NOBODY = "http://127.0.0.1:9"  # where nothing answers: no case shall download anything
OFFLINE = {
    "PIP_INDEX_URL": NOBODY,
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_RETRIES": "0",
    "npm_config_registry": NOBODY,
    "no_proxy": None,
    "NO_PROXY": None,
}
OFFLINE |= {"http_proxy": NOBODY, "https_proxy": NOBODY, "HTTP_PROXY": NOBODY, "HTTPS_PROXY": NOBODY}
NO_TOOLS = {"PATH": "/nowhere", "HOME": "/nowhere", "TFDS_DATA_DIR": "/nowhere"}


@dataclass(frozen=True, eq=False)
class Case:
    """A command line and words of the message it leads to.

    In the arguments {tmp} is the case's own folder, which holds what `prepare` makes there and all folders of the
    command that are not named, and {root} is the repository's.
    """

    script: str
    arguments: str
    words: str
    prepare: Callable[[Path], None] = lambda folder: None
    about: str = ""  # what `prepare` makes
    code: int = 2
    environment: dict[str, str | None] = field(default_factory=dict)
    file_size_limit: int | None = None
    fresh: bool = False
    begun: bool = False  # the mistake shows after the line that says what there is to do

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}"[:40] for name, value in self.environment.items())
        words = [settings, self.script.split("_")[0].removesuffix(".py"), self.arguments, self.about]
        return " ".join(word for word in words if word)[:100]

    def command(self, folder: Path) -> Command:
        folders = [f"--{kind}_dir={folder / kind}" for kind in FOLDERS[self.script]]
        given = [word.format(tmp=folder, root=ROOT) for word in shlex.split(self.arguments)]
        return Command([self.script, *folders, *given], OFFLINE | self.environment, self.file_size_limit, self.fresh)


MINE = DIGITS + "--weights={tmp}/mine.weights.h5 "
FLAGS = [
    Case(PLOT, "", "Name the network"),
    Case(PLOT, "-n C5", "no network 'C5'"),
    Case(PLOT, "-n F1 --dataset=mnits", "no data set 'mnits' (did you mean mnist?)"),
    Case(PLOT, "-n C1 --dataset=mnist --data_dir={root}/data", "do not fit the network"),
    Case(PLOT, "-n F2", "TIMIT is licensed"),
    Case(PLOT, DIGITS + "--epochs=-3", "--epochs=-3"),
    Case(PLOT, DIGITS + "--epochs=many", "--epochs=many"),
    Case(PLOT, DIGITS + "--large_batch=1501", "1,501 is larger than the training set of 1,500"),
    Case(PLOT, DIGITS + "--small_batch=0", "--small_batch=0"),
    Case(PLOT, DIGITS + "--points=1", "--points=1"),
    Case(PLOT, DIGITS + "--alpha_min=2 --alpha_max=2", "must be less than --alpha_max"),
    Case(PLOT, DIGITS + "--alpha_max=inf", "--alpha_max=inf"),
    Case(PLOT, DIGITS + "--alpha_min=nan", "must be less than --alpha_max"),
    Case(PLOT, DIGITS + "--definition=thesis", "repository|paper"),
    Case(PLOT, DIGITS + "--precision=float8", "float32|bfloat16"),
    Case(PLOT, "-n F1 --netwrok=F1", "netwrok"),
    Case(PLOT, "-n F1 digits", "Unexpected argument 'digits'"),
    Case(PLOT, "-n F1 --flagfile=nowhere.txt", "nowhere.txt"),
    Case(PLOT, "-n F1 --flagfile={root}/Figures/F1.png", "decode"),
    Case(PLOT, "-n f1 --dataset=digits", "no network 'f1' (did you mean F1?)"),
    Case(PLOT, "-nF1", "Unknown command line flag 'nF1'"),
    Case(PLOT, "-n F1 -n C5", "no network 'C5'"),
    Case(PLOT, "-n 'F1\nF2'", "no network 'F1"),
    Case(PLOT, "-n", "-n"),
    Case(PLOT, "-n --dataset=digits", "no network '--dataset=digits'"),
    Case(PLOT, "-n F1 --dataset=MNIST", "no data set 'MNIST'"),
    Case(PLOT, "-n F1 --dataset=timit", "TIMIT is licensed"),
    Case(PLOT, DIGITS + "--epochs=1e3", "--epochs=1e3"),
    Case(PLOT, DIGITS + "--epochs=", "--epochs"),
    Case(PLOT, DIGITS + "--epochs", "--epochs"),
    Case(PLOT, DIGITS + "--epochs=1.5", "--epochs=1.5"),
    Case(PLOT, DIGITS + "--epochs=1 --seed=-1", "--seed=-1"),
    Case(PLOT, DIGITS + "--epochs=" + 5000 * "9", "epochs"),
    Case(PLOT, DIGITS + "--epochs=1 --large_batch=0", "--large_batch=0"),
    Case(PLOT, DIGITS + "--small_batch=" + 30 * "9", "is larger than the training set of 1,500"),
    Case(PLOT, DIGITS + "--epochs=1 --points=" + 20 * "9", "--points=99"),
    Case(PLOT, DIGITS + "--alpha_min=", "--alpha_min"),
    Case(PLOT, DIGITS + "--alpha_max=1e3", "--alpha_max=1e3"),
    Case(PLOT, DIGITS + "--curve=", "linear|curvilinear"),
    Case(PLOT, DIGITS + "--curve=Linear", "linear|curvilinear"),
    Case(PLOT, DIGITS + "--retrain=maybe", "retrain"),
    Case(PLOT, DIGITS + "--x --y", "Unknown"),
    Case(PLOT, DIGITS + "--eps=1e-3", "eps"),
    Case(PLOT, DIGITS + "-e 3", "'e'"),
    Case(PLOT, DIGITS + "---epochs=3", "epochs"),
    Case(PLOT, DIGITS + "-- --epochs=3", "Unexpected argument '--epochs=3'"),
    Case(PLOT, "-n F1 --flagfile={tmp}", "flagfile"),
    Case(PLOT, "--flagfile={tmp}/flags.txt", "no network 'C9'", file("flags.txt", b"--network=C9\n"), "C9"),
    Case(PLOT, "-n \u00e9\u4e2d", "no network '\u00e9\u4e2d'"),
    Case(PLOT, DIGITS + "--epochs=1 --points=10001", "--points=10001"),
    Case(PLOT, DIGITS + "--epochs=" + 30 * "9", "--epochs=99"),
    Case(PLOT, DIGITS + "--epochs=1 --seed=" + 300 * "9", "--seed=99"),
    *(Case(PLOT, DIGITS + f"--{flag}=lars", f"no {flag} 'lars'; choose one of a") for flag in ("optimizer", "remedy")),
    Case(
        PLOT,
        DIGITS + "--optimizer=sgd:momentum=2",
        "setting momentum of the optimizer sgd must be a number from 0 to 1",
    ),
    Case(SHARPNESS, DIGITS + "--remedy=sam:rho=1", "'sam:rho=1' cannot have the setting 'rho'; sam has these"),
    Case(WARM, DIGITS + "--remedy=sam,asam:radius=x,eta=0", "The setting radius of the remedy asam must be a number"),
    Case(SWEEP, DIGITS + "--remedy=augment,", "no remedy ''"),
    Case(
        CURVES, DIGITS + "--remedy=augment", "augment is for images, (height, width, channels), not samples of (784,)"
    ),
    Case(PLOT, DIGITS + "--until_converged=5", "until_converged"),
    Case(CURVES, "", "Name the network"),
    Case(CURVES, DIGITS + "--every=0", "--every=0"),
    Case(CURVES, DIGITS + "--trials=0", "--trials=0"),
    Case(CURVES, DIGITS + "--sharpness_samples=-1", "--sharpness_samples=-1"),
    Case(CURVES, DIGITS + "--large_batch=1501", "1,501 is larger than the training set of 1,500"),
    Case(CURVES, "-n F2", "TIMIT is licensed"),
    Case(SWEEP, "", "Name the network"),
    Case(SWEEP, DIGITS + "--batch_sizes=64,many", "whole numbers above 0, with commas between them, not 'many'"),
    *(
        Case(SWEEP, DIGITS + f"--batch_sizes={wrong}", "--batch_sizes needs whole numbers above 0, with commas")
        for wrong in ("64,0", "-3", "1.5", "64,", "9" * 5000)
    ),
    Case(SWEEP, DIGITS + "--batch_sizes=", "--batch_sizes"),
    Case(SWEEP, DIGITS + "--batch_sizes=64,1501", "1,501 is larger than the training set of 1,500"),
    Case(SWEEP, DIGITS + "--small_batch=64", "small_batch"),
    Case(WARM, "", "Name the network"),
    Case(WARM, DIGITS + "--epochs=5 --every=6", "--every (6) must not be greater than --epochs (5)"),
    Case(WARM, DIGITS + "--large_batch_epochs=0", "--large_batch_epochs=0"),
    Case(WARM, DIGITS + "--schedule=fast", "must be like 20:1024,40:6000"),
    Case(WARM, DIGITS + "--schedule=double:100", "has no step"),
    Case(WARM, DIGITS + "--schedule=100:64", "does not lie within the 100 epochs"),
    Case(WARM, DIGITS + "--schedule=10:0", "must make the batch grow"),
    Case(WARM, DIGITS + "--schedule=20:64,10:128", "must be above 0 and ascend"),
    Case(WARM, DIGITS + "--schedule=10:9999", "9,999 is larger than the training set of 1,500"),
    Case(WARM, DIGITS + "--schedule=double:10 --every=5", "--every is about warm starts"),
    Case(SHARPNESS, "", "Name the network"),
    Case(SHARPNESS, DIGITS + "--eps=0", "must be a number above 0, not 0"),
    Case(SHARPNESS, DIGITS + "--eps=1e-3,-5e-4", "must be a number above 0, not -0.0005"),
    Case(SHARPNESS, DIGITS + "--eps=nan", "not nan"),
    Case(SHARPNESS, DIGITS + "--eps=small", "--eps needs numbers, with commas between them, not 'small'"),
    Case(SHARPNESS, DIGITS + "--scale=0", "--scale must be a number above 0"),
    Case(SHARPNESS, DIGITS + "--space=half", "no --space 'half'"),
    Case(SHARPNESS, DIGITS + "--space=", "--space is empty"),
    Case(
        SHARPNESS, DIGITS + "--solver=adam", "no --solver 'adam'; choose one of lbfgsb, vertex, or several with commas"
    ),
    Case(SHARPNESS, DIGITS + "--manifold=sphere", "normal|uniform|orthonormal"),
    Case(SHARPNESS, DIGITS + "--trials=0", "--trials=0"),
    Case(SHARPNESS, DIGITS + "--iterations=0", "--iterations=0"),
    Case(SHARPNESS, DIGITS + "--dimension=0", "--dimension=0"),
    Case(SHARPNESS, DIGITS + "--dimension=1462795", "1,462,794 weights may have between 1 and 10,000 dimensions, not"),
    Case(SHARPNESS, DIGITS + "--curvature --dimension=2000000", "between 1 and 10,000 dimensions"),
    *(
        Case(SHARPNESS, MINE + more, "not finite within epsilon 1e+38", weights(), "of F1", begun=True)
        for more in ("--space=random --dimension=1 --eps=1e38", "--curvature --eps=1e38 --dimension=1")
    ),
    Case(SHARPNESS, DIGITS + "--points=3", "points"),
    Case(SHARPNESS, DIGITS + "--eps=inf", "not inf"),
    Case(SHARPNESS, DIGITS + "--eps=", "--eps is empty"),
    Case(SHARPNESS, DIGITS + "--eps=1e-3,", "--eps needs numbers, with commas between them, not ''"),
    Case(SHARPNESS, DIGITS + "--scale=nan", "--scale must be a number above 0, not nan"),
    Case(SHARPNESS, DIGITS + "--space=full,half", "no --space 'half'"),
    Case(SHARPNESS, DIGITS + "--space=full,", "no --space ''"),
    Case(SHARPNESS, DIGITS + "--space=Full", "no --space 'Full'"),
    Case(SHARPNESS, DIGITS + "--solver=", "--solver is empty"),
    Case(SHARPNESS, DIGITS + "--trials=x", "--trials=x"),
    Case(SHARPNESS, DIGITS + "--trials=1000000000000", "--trials=1000000000000"),
    Case(SHARPNESS, DIGITS + "--iterations=" + 30 * "9", "--iterations=99"),
    Case(SHARPNESS, DIGITS + "--trials=-1", "--trials=-1"),
    Case(SHARPNESS, DIGITS + "--dimension=10001", "between 1 and 10,000 dimensions, not 10,001"),
    Case(SHARPNESS, DIGITS + "--dimension=1e2", "--dimension=1e2"),
    Case(SHARPNESS, DIGITS + "--iterations=ten", "--iterations=ten"),
    Case(SHARPNESS, DIGITS + "--curvature_samples=0", "--curvature_samples=0"),
    Case(SHARPNESS, DIGITS + "--curvature=perhaps", "curvature"),
    Case(SHARPNESS, DIGITS + "--curvature --sharpness_samples=100", "takes no --sharpness_samples"),
    Case(SHARPNESS, DIGITS + "--large_batch=1501", "1,501 is larger than the training set of 1,500"),
    Case(SHARPNESS, DIGITS + "F2", "Unexpected argument 'F2'"),
    Case(SHARPNESS, MINE + "--solver=vertex --eps=1e300", "within epsilon 1e+300", weights(), "of F1", begun=True),
]
EMPTY = [
    *(
        Case(PLOT, DIGITS + f"--epochs=1 --{flag}=", f"--{flag} is empty")
        for flag in ("network", "dataset", "optimizer", "remedy")
    ),
    *(Case(PLOT, DIGITS + f"--epochs=1 --{kind}_dir=", f"--{kind}_dir is empty") for kind in FOLDERS[PLOT]),
    *(Case(PLOT, DIGITS + f"--epochs=1 --{side}_batch_weights ''", f"--{side}_batch_w") for side in ("small", "large")),
    *(Case(SHARPNESS, DIGITS + f"--epochs=1 --{kind}_dir=", f"--{kind}_dir is empty") for kind in FOLDERS[SHARPNESS]),
    Case(SHARPNESS, DIGITS + "--epochs=1 --weights=", "--weights is empty"),
    Case(SHARPNESS, "-n ''", "--network is empty"),
]
FOLDERS_AND_WEIGHTS = [
    Case(PLOT, "-n F1 --data_dir=" + "x" * 300, "cannot be looked up"),
    Case(PLOT, DIGITS + "--figure_dir={root}/README.md", "cannot be written to"),
    Case(PLOT, DIGITS + "--result_dir={root}/README.md", "cannot be written to"),
    Case(PLOT, DIGITS + "--run_dir={root}/README.md", "cannot be written to"),
    Case(PLOT, DIGITS + "--small_batch_weights=nowhere.h5", "no weights file nowhere.h5"),
    Case(PLOT, DIGITS + "--large_batch_weights=nowhere.h5", "no weights file nowhere.h5"),
    Case(PLOT, DIGITS + "--large_batch_weights={root}/LICENSE", "not named as Keras names"),
    Case(SHARPNESS, DIGITS + "--result_dir={root}/README.md", "cannot be written to"),
    Case(SHARPNESS, DIGITS + "--weights=nowhere.weights.h5", "no weights file nowhere.weights.h5"),
    Case(SHARPNESS, DIGITS + "--weights={root}/LICENSE", "not named as Keras names"),
    Case(SHARPNESS, MINE, "does not hold the weights of this F1", weights("C1"), "of C1"),
    Case(SHARPNESS, MINE, "not finite", weights("F1", np.nan), "not finite"),
    Case(PLOT, "-n F1 --data_dir={tmp}/file", "cannot be written to", file("file", b""), "a file"),
    Case(PLOT, DIGITS + "--run_dir={tmp}/file/deeper", "cannot be written to", file("file", b""), "below a file"),
    Case(PLOT, DIGITS + "--result_dir=" + "x" * 300, "cannot be written to"),
    Case(PLOT, DIGITS + "--figure_dir={tmp}/" + "deeper/" * 1000, "cannot be written to"),
    Case(PLOT, DIGITS + "--large_batch_weights={tmp}", "no weights file"),
    Case(PLOT, DIGITS + "--large_batch_weights={tmp}/mine.weights.h5", "does not hold", weights("F2"), "of F2"),
    Case(PLOT, DIGITS + "--result_dir=/proc/no", "cannot be written to"),
    Case(SHARPNESS, DIGITS + "--run_dir={tmp}/file", "cannot be written to", file("file", b""), "a file"),
    Case(SHARPNESS, MINE, "no weights file"),
    Case(SHARPNESS, DIGITS + "--weights={tmp}", "no weights file"),
    Case(SHARPNESS, DIGITS + "--weights=" + "x" * 300 + ".weights.h5", "no weights file"),
    Case(SHARPNESS, MINE, "cannot be read as a Keras", file("mine.weights.h5", b"text\n" * 999), "text"),
    Case(SHARPNESS, MINE, "cannot be read as a Keras", weights(cut=3_000_000), "cut off"),
    Case(SHARPNESS, MINE, "does not hold the weights of this F1", weights(classes=11), "of 11 classes"),
    Case(SHARPNESS, MINE, "does not hold the weights of this F1", hdf5({"x": np.zeros(3)}), "other HDF5"),
    Case(SHARPNESS, MINE + "--definition=paper -n C1 ", "does not hold", weights("C1"), "of another definition"),
]
DATA_FILES = [
    Case(PLOT, "-n C3", "not a readable .npz file", file("data/cifar100.npz", b"PK\x03\x04 half a file"), "damaged"),
    Case(PLOT, "-n C3", "labels from 0 to 100 instead of 0 to 99", cifar100(y_train=np.array([0, 100])), "label 100"),
    Case(PLOT, "-n C3", "lacks x_train", cifar100(x_train=None), "without x_train"),
    Case(PLOT, "-n C3", "lacks y_test", cifar100(y_test=None, labels=np.array([0, 1])), "y_test of another name"),
    Case(PLOT, "-n C3", "labels from -1 to 1 instead of 0 to 99", cifar100(y_test=np.array([-1, 1])), "label -1"),
    Case(PLOT, "-n C3", "y_train holds float64", cifar100(y_train=np.array([0.0, 1.0])), "labels with a point"),
    Case(PLOT, "-n C3", "y_train has shape (3,)", cifar100(y_train=np.zeros(3, int)), "a label too many"),
    Case(PLOT, "-n C3", "y_train has shape (2, 100)", cifar100(y_train=np.zeros((2, 100), int)), "one-hot labels"),
    Case(PLOT, "-n C3", "y_train has shape ()", cifar100(y_train=np.array(1)), "one number"),
    Case(PLOT, "-n C3", "x_test has samples of shape (3, 32, 32)", cifar100(x_test=CHANNELS_FIRST), "channels first"),
    Case(PLOT, "-n C3", "x_test holds float64 instead of uint8", cifar100(x_test=np.zeros(IMAGES)), "floats"),
    Case(PLOT, "-n C3", "x_train is empty", cifar100(x_train=np.zeros((0, 32, 32, 3), np.uint8)), "no samples"),
    Case(PLOT, "-n C3", "x_train has samples of shape ()", cifar100(x_train=np.array(1, np.uint8)), "a number"),
    Case(PLOT, "-n C3", "not a readable .npz file", cifar100(x_train=np.array([{}, {}])), "pickled objects"),
    Case(PLOT, "-n C3", "not a readable .npz file", cifar100(cut=5000), "cut off"),
    Case(PLOT, "-n C3", "not a readable .npz file", file("data/cifar100.npz", b""), "empty"),
    Case(PLOT, "-n C3", "not a readable .npz file", file("data/cifar100.npz", b"a,b\n1,2\n"), "text"),
    Case(PLOT, "-n C3", "not a readable .npz file", file("data/cifar100.npz", npy(np.zeros(3))), "one array"),
    Case(PLOT, "-n C3", "not a readable .npz file", file("data/cifar100.npz", pickle.dumps({})), "a pickle"),
    Case(PLOT, "-n C3", "not a readable .npz file", file("data/cifar100.npz/inside", b""), "a folder"),
    Case(PLOT, "-n F1 --dataset=cifar100", "do not fit the network's input", cifar100(), "images for F1"),
    Case(PLOT, "-n F1", "not the published mnist data set", mnist(), "black images"),
    Case(PLOT, "-n F1", "x_train has samples of shape (784,)", mnist(x_train=np.zeros((2, 784), np.uint8)), "flat"),
    Case(PLOT, "-n C1", "not the published cifar10 data set", cifar10(), "black images"),
    Case(SHARPNESS, "-n F2", "x_test holds NaN or infinite values", timit(x_test=NOT_A_NUMBER), "NaN"),
    Case(SHARPNESS, "-n F2", "x_train holds NaN or infinite values", timit(x_train=np.full((2, 360), 1e300)), "1e300"),
    Case(SHARPNESS, "-n F2", "labels from 0 to 1973 instead of 0 to 1972", timit(y_train=np.array([0, 1973])), "label"),
    Case(SHARPNESS, "-n F2", "x_train holds int64 instead", timit(x_train=np.zeros((2, 360), int)), "integers"),
    Case(SHARPNESS, "-n F2", "x_train has samples of shape (440,)", timit(x_train=np.zeros((2, 440))), "440 features"),
    Case(PLOT, "-n C3 --large_batch=3", "A batch of 3 is larger than the training set of 2", cifar100(), "two samples"),
]
MACHINES = [
    Case(PLOT, DIGITS + "--strategy=horovod", "auto|none|mirrored|multiworker"),
    Case(PLOT, DIGITS + "--strategy=multiworker", "needs the environment variable TF_CONFIG"),
    Case(
        PLOT, DIGITS, "TF_CONFIG does not say which worker", environment={"TF_CONFIG": '{"cluster": {"worker": [1]}}'}
    ),
    *(
        Case(SHARPNESS, DIGITS, "TF_CONFIG does not say which worker", environment={"TF_CONFIG": config}, about=about)
        for about, config in {
            "text": "host0,host1",
            "nested": "[" * 100_000,
            "infinite": '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": Infinity}}',
            "a list": '{"cluster": ["a:1", "b:1"], "task": {"type": "worker", "index": 0}}',
        }.items()
    ),
]
ENVIRONMENT = [
    Case(PLOT, "-n C5", "no network", environment={"MPLBACKEND": "nonsense", "TF_CPP_MIN_LOG_LEVEL": "x"}, fresh=True),
    Case(SHARPNESS, "-n C5", "no network", environment={"KERAS_BACKEND": "jax", "HOME": None}, fresh=True),
]
MACHINE = [
    Case(
        PLOT,
        DIGITS + "--epochs=1 --small_batch=1500",
        "checkpoint-000000001.npz could",
        code=1,
        file_size_limit=8_000_000,
        begun=True,
    ),
    Case(PLOT, DIGITS + "--epochs=1", "File too large", code=1, file_size_limit=100_000, begun=True),
    Case(SHARPNESS, DIGITS + "--epochs=1", "File too large", code=1, file_size_limit=100_000, begun=True),
    Case(PLOT, "-n C1", "No source answers for cifar10", code=1, environment=NO_TOOLS),
    Case(PLOT, "-n F1", "No source answers for mnist", code=1, environment=NO_TOOLS),
    Case(
        PLOT,
        DIGITS + "--small_batch_weights={tmp}/mine.weights.h5 --large_batch_weights={tmp}/mine.weights.h5 --points=2",
        "File too large",
        weights(),
        code=1,
        file_size_limit=5000,
        begun=True,
    ),
]
CASES = FLAGS + EMPTY + FOLDERS_AND_WEIGHTS + DATA_FILES + MACHINES + ENVIRONMENT + MACHINE


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """What is in a folder, with size and time of change."""
    found = {path: path.stat() for path in folder.rglob("*") if not path.is_dir()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="module")
def ended(request, tmp_path_factory) -> dict[Case, tuple[int, str, str, set[Path]]]:
    """Of every case that is selected: exit code, standard output, standard error, and files that changed."""
    selected = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]
    if any("{root}/data" in case.arguments for case in selected):
        with suppress(pytest.skip.Exception):  # the cases that need the file see to that
            request.getfixturevalue("mnist")
    folders = {case: tmp_path_factory.mktemp("case") for case in selected}
    for case, folder in folders.items():
        case.prepare(folder)
    before = {case: files(folder) for case, folder in folders.items()}
    commands = [dataclasses.asdict(case.command(folder)) for case, folder in folders.items()]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "forked.py"], input=json.dumps(commands), stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0
    return {
        case: (
            *result,
            {path.relative_to(folders[case]) for path, _ in before[case].items() ^ files(folders[case]).items()},
        )
        for case, result in zip(selected, json.loads(done.stdout), strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(ended, case):
    if "{root}/data" in case.arguments and not (ROOT / "data" / "mnist.npz").exists():
        pytest.skip("MNIST is not at hand")
    code, stdout, stderr, changed = ended[case]
    assert code != KILLED, f"no end: {stderr}"
    assert code == case.code, stderr
    assert "Traceback" not in stderr
    last = stderr.removesuffix("\n").split("\n")[-1]
    assert last.startswith("Error: "), stderr
    assert case.words in last
    assert bool(stdout) == case.begun
    changed = {path for path in changed if path.suffix != ".lock"}  # which is empty, but for who holds it
    if case.code == 1:  # whole files of work that was done are kept, but nothing half written
        changed = {path for path in changed if path.name.startswith(".")}
    assert not changed
