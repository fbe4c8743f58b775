"""Large-batch training and sharp minima: what the scripts stand on, and tools for any model.

`Objective` is a model's loss over a data set as a function of one weight vector, `sharpness` is Metric 2.1 of Keskar et
al. (2017), `RandomSubspace` its matrix A, `curvature` the Hessian at a minimizer. `hessian_operator` is that Hessian as
SciPy takes it, `spectral_density` and `hutchpp` its spectrum and trace, `TrackEigenvalue` a Keras callback. TensorFlow
starts with `Objective` or the callback.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from large_batch.version import __version__ as __version__

if TYPE_CHECKING:
    from large_batch.hessian import hessian_operator
    from large_batch.objective import Objective
    from large_batch.sharpness_metric import curvature, sharpness
    from large_batch.spectrum import hutchpp, spectral_density
    from large_batch.subspace import RandomSubspace
    from large_batch.tracking import TrackEigenvalue

__all__ = [
    "Objective",
    "RandomSubspace",
    "TrackEigenvalue",
    "curvature",
    "hessian_operator",
    "hutchpp",
    "sharpness",
    "spectral_density",
]

_ROOMS = {
    "Objective": "objective",
    "RandomSubspace": "subspace",
    "TrackEigenvalue": "tracking",
    "curvature": "sharpness_metric",
    "hessian_operator": "hessian",
    "hutchpp": "spectrum",
    "sharpness": "sharpness_metric",
    "spectral_density": "spectrum",
}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
