"""One thing to time: an operation on a shape in a layout and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import byte_model
from ..models.traffic_model import DTYPES
from ..rows.results import MEASURED, OK, Row
from .shapes import Shape

# Of float64 the tolerance and the kernels are tested elsewhere; nobody trains in it for speed.
DTYPE_NAMES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class BenchCase:
    shape: Shape
    layout: str  # nchw or nhwc
    dtype: str
    op: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Of x."""
        return self.shape.numel * self.torch_dtype.itemsize

    @property
    def compulsory_bytes(self) -> int:
        return byte_model.compulsory_bytes(self.op, self.nbytes)

    @property
    def title(self) -> str:
        return f"{self.shape.name} {self.shape.text} {self.layout} {self.dtype} {self.op}"

    def empty(self, device: str) -> Tensor:
        """A tensor of the shape in the layout's memory order."""
        n, c, *spatial = self.shape.sizes
        if self.layout == "nchw":
            return torch.empty(self.shape.sizes, dtype=self.torch_dtype, device=device)
        return torch.empty(n, *spatial, c, dtype=self.torch_dtype, device=device).movedim(-1, 1)

    def row(self, provider: str, device: str, **values: Any) -> Row:
        bytes_moved = {"compulsory_bytes": self.compulsory_bytes}
        return Row(**{**self.facts(provider, device), **bytes_moved, **values})

    def facts(self, provider: str, device: str) -> dict[str, Any]:
        """What a row says of a case in which nothing goes wrong, whatever else it says."""
        return {
            "kind": MEASURED,
            "device": device,
            "set": self.shape.name,
            "shape": self.shape.text,
            "layout": self.layout,
            "dtype": self.dtype,
            "op": self.op,
            "count": self.shape.count,
            "provider": provider,
            "status": OK,
        }


def cases(
    shapes: Iterable[Shape], layouts: Iterable[str], dtypes: Iterable[str], ops: Iterable[str]
) -> list[BenchCase]:
    """All combinations; a shape that fixes its layout, or has no positions, is there once."""
    layouts = list(layouts)
    found: dict[BenchCase, None] = {}
    for shape in shapes:
        if shape.layout is not None:
            own = [shape.layout]
        else:
            own = layouts if len(shape.sizes) > 2 else ["nchw"]  # (N, C) has one memory order
        for layout in own:
            for dtype in dtypes:
                found |= {BenchCase(shape, layout, dtype, op): None for op in ops}
    return list(found)
