"""The checks of arguments where no kernels take the input: what csrc/torch/checks.cpp checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calls import Forward
from .layout import ACCUMULATE


def check_forward(call: Forward) -> None:
    """TypeError for a dtype, ValueError for a shape or value, RuntimeError for a device."""
    input = call.input
    check_input(input)
    _check_vector("weight", call.weight, input)
    _check_vector("bias", call.bias, input)
    _check_running(call.running_mean, call.running_var, input, call.training)
    if not 0 <= call.eps < math.inf:  # math.isfinite takes no symbol of a compiler
        raise ValueError(f"batch_norm: expected eps to be finite and not negative, got {call.eps}")
    check_residual(call.residual, input)
    _check_counter(call.num_batches_tracked, input)
    if call.gathered is not None:
        _check_gathered(call.gathered, input)


def check_input(input: Tensor) -> None:
    if input.layout is not torch.strided:
        raise TypeError(f"batch_norm: expected input to be a strided tensor, got {input.layout}")
    if input.dtype not in ACCUMULATE:
        raise TypeError(
            "batch_norm: expected input to have dtype torch.float16, torch.bfloat16, "
            f"torch.float32 or torch.float64, got {input.dtype}"
        )
    if input.dim() < 2:
        raise ValueError(
            "batch_norm: expected input to have at least 2 dimensions, "
            f"got shape {list(input.shape)}"
        )


def check_residual(residual: Tensor | None, input: Tensor) -> None:
    if residual is None:
        return
    _check_place("residual", residual, input)
    _check_dtype("residual", residual, input.dtype, note=", the dtype of input")
    _check_shape("residual", residual, list(input.shape))


def _check_counter(counter: Tensor | None, input: Tensor) -> None:
    if counter is None:
        return
    _check_place("num_batches_tracked", counter, input)
    _check_dtype("num_batches_tracked", counter, torch.int64)
    if counter.numel() != 1:
        raise ValueError(
            "batch_norm: expected num_batches_tracked to have one element, "
            f"got shape {list(counter.shape)}"
        )


def _check_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    if vector is None:
        return
    _check_place(name, vector, input)
    _check_dtype(name, vector, input.dtype, torch.float32)
    _check_shape(name, vector, [input.shape[1]])


def _check_place(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"batch_norm: expected {name} to be a strided tensor, got {tensor.layout}")
    if tensor.device != input.device:
        raise RuntimeError(
            f"batch_norm: expected {name} to be on {input.device}, the device of input, "
            f"got {tensor.device}"
        )


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype, note: str = "") -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(map(str, dict.fromkeys(allowed)))
        raise TypeError(
            f"batch_norm: expected {name} to have dtype {expected}{note}, got {tensor.dtype}"
        )


def _check_shape(name: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(
            f"batch_norm: expected {name} to have shape {expected}, got {list(tensor.shape)}"
        )


def _check_running(mean: Tensor | None, var: Tensor | None, input: Tensor, training: bool) -> None:
    if mean is None and var is not None:
        raise ValueError("batch_norm: expected running_mean to be given with running_var, got None")
    if var is None and mean is not None:
        raise ValueError("batch_norm: expected running_var to be given with running_mean, got None")
    if mean is None and not training:
        raise ValueError(
            "batch_norm: expected running_mean and running_var to be given when training=False, "
            "got None"
        )
    for name, vector in (("running_mean", mean), ("running_var", var)):
        _check_vector(name, vector, input)
        if vector is not None and vector.requires_grad:
            raise RuntimeError(
                f"batch_norm: expected {name} not to require grad, "
                "got a tensor with requires_grad=True"
            )


def _check_gathered(gathered: Tensor, input: Tensor) -> None:
    dtype = ACCUMULATE[input.dtype]
    values = 2 * input.shape[1] + torch.int64.itemsize // dtype.itemsize
    _check_dtype("gathered", gathered, dtype)
    if gathered.dim() != 2 or gathered.shape[0] == 0 or gathered.shape[1] != values:
        raise ValueError(
            f"batch_norm: expected gathered to hold one row of {values} values a rank, "
            f"got shape {list(gathered.shape)}"
        )
