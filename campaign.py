"""The long runs of the reproduction: the commands whose results are in results/, in the order of their importance.

Runs what is not done yet, one command after the other, and says what is done, running and left. A command is done when
results/ holds what it wrote. Each may be stopped or killed at any time and continues when this one is started again.

    nice -n 19 python campaign.py
    python campaign.py --list
"""

from __future__ import annotations

if __name__ == "__main__":  # first, so that Ctrl-C is answered while the others are imported
    import large_batch.ctrl_c  # noqa: F401

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from large_batch import cli
from large_batch.errors import Interrupted, MachineError

ROOT = Path(__file__).parent
COMMANDS = (
    # F1, five seeds: Tables 2, 3 and 4, Figures 2, 3, 6 and 7, distances
    "plot_parametric_plot.py -n F1",
    "plot_parametric_plot.py -n F1 --curve curvilinear",
    *(f"sharpness.py -n F1 --seed {seed} --trials 5" for seed in range(5)),
    "training_curves.py -n F1 --trials 5 --sharpness_samples 10000",
    "paper_tables.py -n F1 --trials 5 --tables 2,3,4",
    "performance_model.py -n F1 --trials 5",
    # The reproduction's systems
    "finetune.py --weights none --epochs 3 --batch_sizes 32,256,1024",
    "plot_parametric_plot.py -n MobileNetV2 --epochs 3 --points 13 --statistics interpolate,batch,recalibrate",
    "plot_parametric_plot.py -n VGG11 --epochs 2 --points 13",
    # F1: Table 4 while training goes on and with other A, and the largest sharpness that any solver finds
    *(f"sharpness.py -n F1 --space random --epochs {epochs}" for epochs in (7, 10, 20, 50)),
    *(f"sharpness.py -n F1 --space random --manifold {kind}" for kind in ("uniform", "orthonormal")),
    "sharpness.py -n F1 --space full --solver lbfgsb,vertex",
    *(f"sharpness.py -n F1 --space full --solver lbfgsb,vertex --seed {seed}" for seed in range(1, 5)),
    # F1: the landscape
    "plot_surface.py -n F1",
    "plot_surface.py -n F1 --directions pca --points 21",
    "sharpness.py -n F1 --curvature --probes 5 --steps 40",
    "sharpness.py -n F1 --space full --measure eigenvalue --curvature_samples 1000",
    "plot_spectrum.py -n F1 --probes 5 --steps 40",
    "sharpness.py -n F1 --space full --measure keskar,relative,ball,adaptive --rescale 0.1,0.3,1,3,10 --eps 1e-3 "
    "--sharpness_samples 5000",
    "edge_of_stability.py -n F1 --epochs 10 --track eigenvalue:235:5000,eigenvalue:5:5000",
    # F1: remedies and other optimizers
    *(f"paper_tables.py -n F1 --trials 2 --epochs 50 --tables {name}" for name in ("7", "robust", "optimizers")),
    "plot_parametric_plot.py -n F1 --epochs 10 --remedy conservative",
    "plot_parametric_plot.py -n F1 --epochs 10 --remedy conservative:fresh=1",
    # F1: measures of sharpness and the gap
    "rank_measures.py -n F1 --epochs 50 --batch_sizes 6000 --trials 2 --sharpness_samples 5000 "
    "--curvature_samples 5000 --remedies none,conservative,adversarial,stability,sam,asam",
    *(
        f"rank_measures.py -n F1 --trials 3{at} --sharpness_samples 5000 --curvature_samples 5000"
        for at in ("", " --at 10,100")
    ),
    # C1 after 20 epochs: surfaces, remedies
    "performance_model.py -n C1 --epochs 20",
    "plot_surface.py -n C1 --epochs 20 --directions random --points 51 --samples 1000",
    "paper_tables.py -n C1 --epochs 20 --tables 6,7",
    # C1, the same as F1 with one seed
    "training_curves.py -n C1 --sharpness_samples 5000",
    "plot_parametric_plot.py -n C1",
    "plot_parametric_plot.py -n C1 --curve curvilinear",
    "sharpness.py -n C1 --space full",
    "paper_tables.py -n C1 --tables 2,3",
    "sharpness.py -n C1 --space random",
    "paper_tables.py -n C1 --tables 4",
    "performance_model.py -n C1",
    # C1, two more seeds
    *(
        f"{script} --seed {seed}"
        for seed in (1, 2)
        for script in ("plot_parametric_plot.py -n C1", "sharpness.py -n C1 --space full")
    ),
    "paper_tables.py -n C1 --trials 3 --tables 2,3",
    "training_curves.py -n C1 --trials 3 --sharpness_samples 5000",
    # C1: Figures 4 and 5
    "batch_size_sweep.py -n C1 --epochs 20 --batch_sizes 64,256,512,1024,2048,5000 --sharpness_samples 5000",
    "warmstart.py -n C1 --epochs 20 --every 4 --sharpness_samples 5000",
    # C2
    "plot_parametric_plot.py -n C2 --epochs 40",
    "sharpness.py -n C2 --epochs 40 --space full --eps 5e-4",
    # F1: Figures 4 and 5, a batch that grows
    "batch_size_sweep.py -n F1 --epochs 50 --sharpness_samples 10000",
    "warmstart.py -n F1 --epochs 50",
    "batch_size_sweep.py -n F1 --trials 3",
    "warmstart.py -n F1",
    "warmstart.py -n F1 --schedule double:10",
    # C1 as in the text of Appendix B, beside the authors' code
    *(
        f"{script} -n C1 --epochs 20{definition}"
        for definition in (" --definition paper", "")
        for script in ("plot_parametric_plot.py", "sharpness.py --space full")
    ),
)


@dataclass(frozen=True)
class Settings:
    """The flag."""

    list: bool = cli.setting(False, "Only say what is done and what is left.", group="Campaign")


def done(results: Path) -> dict[str, float]:
    """Return the commands whose results are there, with the seconds that each took when it was last run."""
    origins = []
    for path in results.glob("*.json"):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):  # one that is damaged is made anew
            origin = json.loads(path.read_text())["provenance"]
            origins.append((origin["command"], origin["wall_seconds"]))
    return dict(origins)


def show(seconds: dict[str, float], running: str | None) -> None:
    """Print a line for each command: done and how long it took, running, or left."""
    for command in COMMANDS:
        state = "running" if command == running else "left"
        if command in seconds:
            state = f"{seconds[command] / 60:.1f} min"
        print(f"{state:>10}  {command}", flush=True)


def run(command: str) -> int:
    """Run a command to its end, and pass a signal on to it that ends this process; return its exit code."""
    # A group of its own, as the terminal's Ctrl-C shall reach it once; not a session, which would lose the niceness.
    process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, process_group=0)
    try:
        return process.wait()
    except Interrupted:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def main(settings: Settings) -> None:
    """Run what is left; raises `MachineError` for commands that fail, after all others."""
    failed = []
    for command in () if settings.list else COMMANDS:
        seconds = done(ROOT / "results")
        if command in seconds:
            continue
        show(seconds, command)
        print(f"\n{time.strftime('%F %T')}  python {command}", flush=True)
        if run(command):
            failed.append(command)
    show(done(ROOT / "results"), None)
    if failed:
        raise MachineError(f"These commands failed: {'; '.join(failed)}.")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
