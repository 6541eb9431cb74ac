"""The batching rule of the kernels' Functions: a vmapped dimension becomes more channels.

Batch norm treats every channel by itself, so B problems with C channels are one with B*C. That
holds for each of its derivatives too, and for parameters that are batched or shared alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def over_channels(
    function: type[Function], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """Outputs of `function` and where their vmapped dimension is, for `Function.vmap` to return.

    Arguments and outputs are activations (N, C, ...), vectors (C,) or no tensors; they are told
    apart by their number of dimensions.
    """
    folded = [_fold(arg, dim, size) for arg, dim in zip(args, in_dims, strict=True)]
    outputs = function.apply(*folded)
    unfolded = [None if out is None else _unfold(out, size) for out in outputs]
    return tuple(unfolded), tuple(None if out is None else _channel_dim(out) for out in outputs)


def _channel_dim(tensor: Tensor) -> int:
    return 1 if tensor.dim() > 1 else 0


def _fold(arg: Any, dim: int | None, size: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    if dim is None:
        at = _channel_dim(arg)
        arg = arg.unsqueeze(at)
        arg = arg.expand(*arg.shape[:at], size, *arg.shape[at + 1 :])
    else:
        at = 1 if arg.dim() > 2 else 0
        arg = arg.movedim(dim, at)
    return arg.flatten(at, at + 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    at = _channel_dim(tensor)
    return tensor.unflatten(at, (size, tensor.shape[at] // size))
