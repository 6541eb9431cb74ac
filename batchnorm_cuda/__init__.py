"""Batch normalisation for PyTorch by custom CUDA kernels."""

from ._build.extension import build_info
from ._explain.explain import explain
from ._explain.explanation import Explanation
from ._version import __version__
from .autograd import BatchNormFunction
from .convert import convert, revert
from .fold import fold, fold_report
from .functional import backend_for, batch_norm
from .fusion import FusedBatchNorm, FusionReport, fusion_report
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from .sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormFunction",
    "Explanation",
    "FusedBatchNorm",
    "FusionReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "__version__",
    "backend_for",
    "batch_norm",
    "build_info",
    "convert",
    "explain",
    "fold",
    "fold_report",
    "fusion_report",
    "revert",
]
