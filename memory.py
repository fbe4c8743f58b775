"""How much memory a gradient will need, and how much there is: asked before a run rather than found out in it."""

import quiet_tensorflow  # noqa: F401

import subprocess
from contextlib import suppress
from math import prod
from pathlib import Path

import keras
import psutil

import runs

SLACK = 1.1  # what the allocator and the library's buffers take besides, in what was measured
WEIGHT_COPIES = 5  # weights, gradient, two moments of ADAM, and a copy on the way


def kept_bytes(model: keras.Model, samples: int, recomputing: bool = False) -> int:
    """Return about what the gradient of a batch keeps of the layers' outputs.

    With `network_zoo.call_recomputing` that is the outputs of the kernels, and all of one section between two of them.
    """
    sizes = [samples * prod(layer.output.shape[1:]) * _item_bytes(layer) for layer in model.layers]
    if not recomputing:
        return sum(sizes)
    kernels = [i for i, layer in enumerate(model.layers) if hasattr(layer, "kernel")]
    sections = [sum(sizes[start:end]) for start, end in zip(kernels, [*kernels[1:], len(sizes)], strict=True)]
    return sum(sizes[i] for i in kernels) + max(sections)


def _item_bytes(layer: keras.Layer) -> int:
    return 2 if layer.compute_dtype in ("bfloat16", "float16") else 4


def step_bytes(model: keras.Model, samples: int, recomputing: bool) -> int:
    """Return about what a training step of so many samples takes, the variables included."""
    weights = sum(prod(variable.shape) for variable in model.trainable_variables)
    return int(SLACK * kept_bytes(model, samples, recomputing)) + 4 * WEIGHT_COPIES * weights


def free_bytes(gpus: int) -> int:
    """Return the memory that is free to this process: of the GPU that has least of it, or of the machine."""
    free = _free_gpu_bytes() if gpus else []
    return min(free) if free else _free_host_bytes()


def _free_host_bytes() -> int:
    """What the machine has left, or the container of this process where that is less."""
    free, used = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    for group in _control_groups():
        with suppress(OSError, ValueError):  # a group may have no limit: "max"
            free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def _control_groups() -> list[Path]:
    """Return the groups of processes, one within the other, whose limits hold for this one."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        inner = root / Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        return [inner, *(group for group in inner.parents if group.is_relative_to(root))]
    return []


def _free_gpu_bytes() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return [int(mebibytes) * 2**20 for mebibytes in printed.split()]
    except (OSError, ValueError, subprocess.CalledProcessError):
        return []


def warn(model: keras.Model, samples: int, recomputing: bool, gpus: int) -> None:
    """Say so, with the remedy, where a training step of so many samples a device seems to need more than there is."""
    needed, free = step_bytes(model, samples, recomputing), free_bytes(gpus)
    if needed > free:
        runs.log.warning(
            "A training step of %s samples of %s needs about %.1f GiB a device, and %.1f GiB are free; if it fails, "
            "spread it over more devices (--strategy=mirrored or multiworker) or halve it with --precision=bfloat16.",
            f"{samples:,}",
            model.name,
            needed / 2**30,
            free / 2**30,
        )
