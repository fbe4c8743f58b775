"""Large-batch training and sharp minima: what the scripts stand on, and tools for any model.

`Objective` is a model's loss over a data set as a function of one weight vector, `sharpness` is Metric 2.1 of Keskar et
al. (2017), `RandomSubspace` its matrix A, `curvature` the Hessian at a minimizer. `hessian_operator` is that Hessian as
SciPy takes it, `spectral_density` and `hutchpp` its spectrum and trace, `TrackEigenvalue` a Keras callback.
`flat_weights` returns a model's weights as that vector, `point_of` as a `Point`, with what is not trained;
`read_weights` and `write_weights` know files of them.
TensorFlow starts with what needs a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from large_batch.version import __version__ as __version__

if TYPE_CHECKING:
    from large_batch.functions import Point
    from large_batch.hessian import hessian_operator
    from large_batch.layers import flat_weights
    from large_batch.models import point_of, read_weights, write_weights
    from large_batch.objective import Objective
    from large_batch.sharpness_metric import curvature, sharpness
    from large_batch.spectrum import hutchpp, spectral_density
    from large_batch.subspace import RandomSubspace
    from large_batch.tracking import TrackEigenvalue

__all__ = [
    "Objective",
    "Point",
    "RandomSubspace",
    "TrackEigenvalue",
    "curvature",
    "flat_weights",
    "hessian_operator",
    "hutchpp",
    "point_of",
    "read_weights",
    "sharpness",
    "spectral_density",
    "write_weights",
]

_ROOMS = {
    "Objective": "objective",
    "Point": "functions",
    "RandomSubspace": "subspace",
    "TrackEigenvalue": "tracking",
    "curvature": "sharpness_metric",
    "flat_weights": "layers",
    "hessian_operator": "hessian",
    "hutchpp": "spectrum",
    "point_of": "models",
    "read_weights": "models",
    "sharpness": "sharpness_metric",
    "spectral_density": "spectrum",
    "write_weights": "models",
}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
