"""timm's `BatchNormAct2d`, a batch norm with an activation of its own, on this package's kernels.

timm is imported by the one who made such a module, or by who unpickles one.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..modules import _KernelForward

_LAYERS = "timm.layers.norm_act"


def theirs() -> type[nn.Module]:
    return sys.modules[_LAYERS].BatchNormAct2d


def is_theirs(kind: type) -> bool:
    return kind.__module__ == _LAYERS and kind.__qualname__ == "BatchNormAct2d"


def is_ours(kind: type) -> bool:
    return kind.__module__ == __name__


def ours() -> type[nn.Module]:
    """The class in place of theirs; made at the first use, and found again by pickle."""
    if "BatchNormAct2d" not in globals():
        import timm.layers

        class BatchNormAct2d(_KernelForward, timm.layers.BatchNormAct2d):
            """timm's, with the batch norm of this package; `drop` and `act` are its modules."""

            traced_into = True  # by the finder, unlike other batch norms

            def forward(self, input: Tensor) -> Tensor:
                return self.act(self.drop(super().forward(input)))

        BatchNormAct2d.__qualname__ = "BatchNormAct2d"
        globals()["BatchNormAct2d"] = BatchNormAct2d
    return globals()["BatchNormAct2d"]


def __getattr__(name: str) -> Any:
    if name == "BatchNormAct2d":
        return ours()
    raise AttributeError(name)
