"""How tensors lie in memory: in Python what csrc/torch/tensors.cpp is in C++."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The dtype of statistics and sums.
ACCUMULATE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def as_dense(tensor: Tensor) -> Tensor:
    """`tensor` itself if it has neither gaps nor overlaps, else a copy in its suggested format.

    Output and grad_input take their strides from it.
    """
    if _is_dense(tensor):
        return tensor
    return tensor.contiguous(memory_format=_suggest_memory_format(tensor))


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of `as_dense`, without making the copy."""
    if _is_dense(tensor):
        return tensor.stride()
    memory_format = _suggest_memory_format(tensor)
    return torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def _is_dense(tensor: Tensor) -> bool:
    if torch.compiler.is_dynamo_compiling():
        # Which sorts no symbols. empty_like keeps the strides of dense tensors, and of no others.
        return torch.empty_like(tensor).stride() == tensor.stride()
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


_CHANNELS_LAST = {
    4: ((1, 3, 2, 0), torch.channels_last),
    5: ((1, 4, 3, 2, 0), torch.channels_last_3d),
}


def _suggest_memory_format(tensor: Tensor) -> torch.memory_format:
    """ATen's suggest_memory_format, which has no public name in Python."""
    order, channels_last = _CHANNELS_LAST.get(tensor.dim(), ((), torch.contiguous_format))
    sizes, strides = tensor.shape, tensor.stride()
    least = 0 if strides[1] > 0 else math.inf
    for dim in order:
        # The last alternative: N x C x 1 x 1 fits both formats, and contiguous wins.
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[dim] * sizes[dim]
    return channels_last


def per_channel(vector: Tensor, input: Tensor) -> Tensor:
    """A view of the [C] values that broadcasts over the input."""
    return vector.view([1, -1] + [1] * (input.dim() - 2))


def all_but_channels(input: Tensor) -> list[int]:
    """The dimensions that sums and statistics of a channel go over."""
    return [0, *range(2, input.dim())]


def with_strides_of(dense: Tensor, values: Tensor | None) -> Tensor | None:
    """`values` in the memory order of `dense`."""
    return placed(dense.shape, dense.stride(), values)


def placed(shape: torch.Size, stride: tuple[int, ...], values: Tensor | None) -> Tensor | None:
    """`values`, or a copy, with these strides."""
    if values is None or values.stride() == stride:  # None: a gradient of zero
        return values
    if batched_by_autograd(values):  # a gradient of many: the strides of one are not seen
        return values
    return values.new_empty_strided(shape, stride).copy_(values)


def stands_for_others(value: object) -> bool:
    """Whether it is what torch.func made of a tensor, also after the end of the transform, or what
    `batched_by_autograd` says. As there, to be asked once something has failed.
    """
    if not isinstance(value, Tensor):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped or batched_by_autograd(value)


def batched_by_autograd(value: object) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) stands behind it.

    Its tensors look like any others and have no memory. To be asked once something has failed, to
    keep it off the usual path.
    """
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)
