"""What is answered at once, before TensorFlow starts: help, the version, and mistakes in flags."""

import re

import pytest
from conftest import run_python

from large_batch import __version__


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("training_curves.py", ("--every", "--figure_dir", "--trials", "Figure 2")),
        ("batch_size_sweep.py", ("--batch_sizes", "--figure_dir", "--trials", "Figure 4")),
        ("warmstart.py", ("--schedule", "--figure_dir", "--trials", "Figure 5")),
        ("sharpness.py", ("Sharpness:", "--eps", "--weights", "Table")),
        ("plot_parametric_plot.py", ("Parametric plot:", "--small_batch_weights", "--curve", "--points", "Figures 3")),
    ],
)
def test_help_comes_without_tensorflow_and_in_groups(script, flags):
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert 'tensorflow' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    order = [done.stdout.index(words) for words in ("What to train:", "--network", "Machines:", "Folders:", "Help:")]
    assert order == sorted(order)
    for words in ("-n,--network", "--epochs", "--seed", "--[no]retrain", "--[no]wait", "--run_dir", *flags):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--version", 0, f"{__version__}\n"),
        ("-n c1", 2, "no network 'c1' (did you mean C1?)"),
        ("-n F1 --dataset cifar-10", 2, "no data set 'cifar-10' (did you mean cifar10?)"),
        ("-n F1 --remedy sam,augmnt:angle=3", 2, "no remedy 'augmnt' (did you mean augment?)"),
        ("-n F1 --optimizer addam", 2, "no optimizer 'addam' (did you mean adam?)"),
        ("-n F1 --weights nowhere.weights.h5", 2, "no weights file nowhere.weights.h5"),
    ],
)
def test_what_is_answered_without_tensorflow(arguments, code, words):
    done = run_python("-X", "importtime", "sharpness.py", *arguments.split())
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert not re.search(r"\| +(tensorflow|keras|matplotlib)$", done.stderr, re.MULTILINE)
