"""Batch normalisation for PyTorch by custom CUDA kernels."""

from ._explain import Explanation, explain
from ._version import __version__
from .autograd import BatchNormFunction
from .functional import backend_for, batch_norm
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormFunction",
    "Explanation",
    "__version__",
    "backend_for",
    "batch_norm",
    "explain",
]
