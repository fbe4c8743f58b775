"""finetune.py: the sweep over batch sizes, its table and its claim."""

import hashlib
import json
import re

import numpy as np
import pytest
import quick
from small_network import NAME

import finetune
import network_zoo
from finetune import Row, level_then_falling
from large_batch import cli, evidence, optimizers, paper
from large_batch.backend import keras
from large_batch.training import TrainingLoop


def rows(accuracies):
    return [
        Row(size, seed, 0.0, 100.0, value) for size, trials in accuracies.items() for seed, value in enumerate(trials)
    ]


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        # The published fall of 0.53 points is 2 of the 0.26 that binomial errors make of 10,000 samples.
        ({size: [value] for size, value in paper.FINE_TUNED.items()}, evidence.ONE_TRIAL),
        ({32: [94.3], 256: [94.2], 1024: [90.0]}, evidence.HOLDS),
        ({32: [94.3], 256: [91.0], 1024: [90.0]}, evidence.CONTRADICTED),
        ({32: [94.3], 256: [94.3], 1024: [94.4]}, evidence.ONE_TRIAL),
        ({32: [94.3], 256: [94.3], 1024: [97.0]}, evidence.CONTRADICTED),
        ({32: [94.3, 94.4], 256: [94.3, 94.2], 1024: [93.8, 93.7]}, evidence.HOLDS),
        ({32: [94.3], 1024: [90.0]}, evidence.OPEN),
        ({32: [94.3], 256: [94.2]}, evidence.OPEN),
    ],
)
def test_the_claim(accuracies, verdict):
    assert level_then_falling(rows(accuracies), 10_000).verdict == verdict
    assert level_then_falling(rows(accuracies), 10_000, "from random weights").verdict == evidence.OPEN


def test_the_published_settings():
    """Learning rates of the table, 3e-4 at 32 and 9.6e-3 at 1024, that fall to 0 along a cosine."""
    for size, rate in ((32, 3e-4), (1024, 9.6e-3)):
        chosen = optimizers.make(finetune.sgd(size, 200))
        assert (chosen.momentum, chosen.weight_decay) == (0.9, 1e-4)
        assert chosen.rate(0) == pytest.approx(rate)
        assert chosen.rate(100) == pytest.approx(rate / 2)
        assert chosen.rate(50) == pytest.approx(rate * (1 + np.sqrt(0.5)) / 2)
        assert chosen.rate(200) == pytest.approx(0, abs=1e-12)
    assert isinstance(finetune.Settings(), cli.RepeatedSettings), "whose titles say how many trials there are"


def job(run_script, tmp_path, *more):
    folders = [f"--{kind}_dir={tmp_path / kind}" for kind in ("run", "figure", "result")]
    done = run_script("finetune.py", "--weights=none", "--dataset=digits", *folders, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed, tmp_path, name):
    assert "3 trainings (0 stored, 0 resumed), 3 measurements (0 stored)" in printed
    assert re.search(r"^256 +0.0024 .* -$", printed, re.MULTILINE), "no published row beside the digits"
    assert "Claim:   The accuracy is level" in printed
    assert re.search(r"points less, from random weights, at the learning rates .* gives for fine-tuning", printed)
    assert "Training from random weights, " in printed
    (path,) = (tmp_path / "result").glob(f"{name}-finetune*.json")
    found = json.loads(path.read_text())
    assert [one["recipe"]["batch_size"] for one in found["minimizers"]] == [128, 256, 1024]
    assert (tmp_path / "figure" / path.with_suffix(".png").name).exists()


def test_the_rate_falls_from_epoch_to_epoch(digits):
    """As the loop sets it: in epoch 3 of 4, half of it."""
    chosen = "sgd:learning_rate=0.5,cosine=4"
    loop = TrainingLoop(quick.recipe(digits, epochs=4, optimizer=chosen), quick.QUICK, digits)
    rates = []
    while loop.epoch < 4:
        loop.advance(False)
        rates.append(float(loop.optimizer.learning_rate))
        if loop.state.seen == len(digits.x_train):
            loop.finish_epoch(None)
    assert list(dict.fromkeys(rates)) == pytest.approx([0.5 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)])


def test_the_whole_path_on_digits(run_script, tmp_path):
    sizes = ["--epochs=2", "--batch_sizes=1024,256,128"]
    check(job(run_script, tmp_path, "-n", NAME, *sizes), tmp_path, "small")
    again = job(run_script, tmp_path, "-n", NAME, *sizes)
    assert "3 trainings (3 stored, 0 resumed), 3 measurements (3 stored)" in again
    other = job(run_script, tmp_path, "-n", NAME, "--epochs=1", "--batch_sizes=750,1500", "--optimizer=adam")
    assert "seed 0, adam" in other
    assert re.search(r"^750 +- ", other, re.MULTILINE), "the rate is ADAM's own"


@pytest.mark.slow
def test_mobilenet_on_digits(run_script, tmp_path):
    check(job(run_script, tmp_path, "--epochs=1", "--batch_sizes=128,256,1024"), tmp_path, "MobileNetV2")


def test_fine_tuning_starts_at_the_weights_of_a_file(tmp_path):
    """Of Keras' network without its top, whose pixels are in [-1, 1]."""
    keras.utils.set_random_seed(0)
    top_less = {"include_top": False, "weights": None, "pooling": "avg", "input_shape": (32, 32, 3)}
    theirs, path = keras.applications.MobileNetV2(**top_less), tmp_path / "body.weights.h5"
    theirs.save_weights(path)
    network = finetune.starting(network_zoo.get, str(path))("MobileNetV2")
    assert network.architecture("repository") == hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    model, x = network.build(seed=3), np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    features = keras.Model(model.input, model.layers[-3].output)
    np.testing.assert_allclose(features(x), theirs(2 * x - 1), atol=1e-5)
    normalisations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {layer.momentum for layer in normalisations} == {0.9}
    untouched = finetune.starting(network_zoo.get, "none")("MobileNetV2")
    assert untouched is network_zoo.get("MobileNetV2")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--weights=missing.h5"], "There is no weights file missing.h5; give a file, imagenet or none."),
        (["--weights=setup.cfg"], "setup.cfg does not hold the weights of Keras' MobileNetV2 without its top."),
        (
            ["--optimizer=sgd:learning_rate=0.01", "--weights=none"],
            "--optimizer=sgd:learning_rate=0.01 is plain SGD, whose results would be named as the published one's; "
            "give another setting.",
        ),
        (["-n", "F1", "--weights=setup.cfg"], "--weights is where MobileNetV2 starts; F1 starts where the seed says."),
        (["--optimizer=smash"], "There is no optimizer 'smash'; choose one of adam, adagrad, sgd, adaqn."),
    ],
)
def test_mistakes(run_script, tmp_path, given, words):
    done = run_script("finetune.py", "--dataset=digits", f"--run_dir={tmp_path}", *given)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"Error: {words}")
