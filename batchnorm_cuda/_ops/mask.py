"""The mask that a fused activation leaves for its backward: where its slope is 1.

A bit an element: of a ReLU where the output is positive, or NaN, where torch.relu's gradient
passes, too. Elements are
numbered in the memory order of the output, which is that of the input made dense. A byte holds
those of one window of 16 bytes, the first in its lowest bit; bits past the last element are zero.
The kernels write and read this form by themselves. What is here serves the composites, and
derivatives of derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import dense_strides

_WINDOW_BYTES = 16


def mask_bytes(numel: int, dtype: torch.dtype) -> int:
    """The size of the mask of so many elements."""
    elements = _elements_per_byte(dtype)
    return (numel + elements - 1) // elements


def pack(passed: Tensor, input: Tensor) -> Tensor:
    """The mask of bools of the shape of input."""
    window = _elements_per_byte(input.dtype)
    bits = passed.permute(_memory_order(input)).flatten()
    bits = pad(bits, (0, mask_bytes(input.numel(), input.dtype) * window - input.numel()))
    return (bits.unflatten(0, (-1, window)) * _bit_values(input)).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor, input: Tensor) -> Tensor:
    """The bits of the mask: a bool tensor of the shape and memory order of input made dense."""
    order = _memory_order(input)
    bits = (mask.unsqueeze(1) & _bit_values(input)) != 0
    values = bits.flatten()[: input.numel()].view([input.shape[dim] for dim in order])
    return values.permute([order.index(dim) for dim in range(input.dim())])


def _elements_per_byte(dtype: torch.dtype) -> int:
    return _WINDOW_BYTES // dtype.itemsize


def _bit_values(input: Tensor) -> Tensor:
    """1, 2, 4, ...: made on the device, so that nothing is copied there."""
    bits = torch.arange(_elements_per_byte(input.dtype), dtype=torch.uint8, device=input.device)
    return torch.ones_like(bits) << bits


def _memory_order(input: Tensor) -> list[int]:
    """The dimensions of the input made dense, from the outermost in memory to the innermost."""
    strides = dense_strides(input)
    return sorted(range(input.dim()), key=lambda dim: strides[dim], reverse=True)
