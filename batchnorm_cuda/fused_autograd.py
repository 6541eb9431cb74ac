"""Autograd of batch norm fused with a residual and ReLU.

`FusedBatchNormFunction` is what plain training goes through. Derivatives of derivatives, forward
mode and torch.func take the same in parts, each of which can do all of that: `unfused_forward` and
`unfused_backward`. With g the gradient of what the ReLU was applied to, grad_output but zero where
output is, grad_residual is g, and the other gradients are those of batch norm for g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _mask, fused_ops, ops
from ._composite import check_residual
from ._transforms import refused_update
from .derivatives import (
    BatchNormBackward,
    TransformableBatchNorm,
    forward_mode_active,
    is_recorded,
    transforms_active,
)

_not_differentiable = (None,) * 3  # the running statistics and their counter


class FusedBatchNormFunction(Function):
    """relu(bn(input) + residual) by the CUDA kernels, ReLU and residual optional.

    As `BatchNormFunction`, with residual and relu after num_batches_tracked. Between forward and
    backward it keeps the mask of what the ReLU did (`_mask`), and neither residual nor output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        output, *_ = _forward(
            ctx,
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            residual,
            relu,
            training,
            momentum,
            eps,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *of_input, grad_residual = _backward(ctx, grad_output)
        return *of_input, *_not_differentiable, grad_residual, *(None,) * 4


class _FusedOperator(Function):
    """The operator `fused_forward` as a Function: its arguments, its results."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *before, need_mask, training, momentum, eps = arguments
        output, save_mean, save_invstd, mask = _forward(ctx, *before, training, momentum, eps)
        if not need_mask:  # by the caller, who did not know that there would be a backward
            mask = fused_ops.fake_mask(output, False)
        ctx.mark_non_differentiable(save_mean, save_invstd, mask)
        return output, save_mean, save_invstd, mask

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *of_input, grad_residual = _backward(ctx, grad_output)
        return *of_input, *_not_differentiable, grad_residual, *(None,) * 5


def _forward(
    ctx: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    training: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    output, save_mean, save_invstd, mask = fused_ops.fused_forward(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        relu,
        relu and any(ctx.needs_input_grad),
        training,
        momentum,
        eps,
    )
    ctx.save_for_backward(input, weight, save_mean, save_invstd, mask)
    ctx.bias = bias  # for its dtype alone, so that it may be updated before the backward
    ctx.training = training
    return output, save_mean, save_invstd, mask


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, save_mean, save_invstd, mask = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_residual = ctx.needs_input_grad[6]
    fused = mask is not None and not is_recorded()
    return (fused_ops.fused_backward if fused else unfused_backward)(
        grad_output,
        input,
        weight,
        ctx.bias,
        save_mean,
        save_invstd,
        mask,
        ctx.training,
        need_input,
        need_weight,
        need_bias,
        need_residual,
    )


def unfused_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    need_mask: bool,
    training: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`fused_ops.fused_forward` in parts. Each of them rounds."""
    check_residual(residual, input)
    output, save_mean, save_invstd = TransformableBatchNorm.apply(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
    )
    if residual is not None:
        output = output + residual
    if relu:
        output = output.relu()
    mask = _mask.pack(output, input) if need_mask else None
    return output, save_mean, save_invstd, mask


def unfused_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    mask: Tensor | None,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`fused_ops.fused_backward` in parts; mask None where there was no ReLU."""
    if mask is not None:
        grad_output = _mask.masked(grad_output, mask, input)
    grads = (None, None, None)
    if need_input or need_weight or need_bias:
        grads = (BatchNormBackward.apply if is_recorded() else ops.backward)(
            grad_output,
            input,
            weight,
            bias,
            save_mean,
            save_invstd,
            training,
            need_input,
            need_weight,
            need_bias,
        )
    return *grads, grad_output if need_residual else None


# --- the rules of the operators -----------------------------------------------------------------


def _unfused_operator_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *results, mask = unfused_forward(*arguments)
    return *results, fused_ops.fake_mask(arguments[0], False) if mask is None else mask


def _unfused_operator_backward(*arguments: Any) -> list[Tensor]:
    return [grad for grad in unfused_backward(*arguments) if grad is not None]


def _one_by_one(
    operator: Callable, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Results under torch.func.vmap: a mask is one example's, so channels cannot be examples."""
    results = []
    for index in range(size):
        example = [
            value if dim is None else value.select(dim, index)
            for value, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(operator(*example))
    kind = type(results[0])
    stacked = kind(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, kind([0] * len(stacked))


def _vmapped_forward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple:
    operator = torch.ops.batchnorm_cuda.fused_forward
    *_, running_mean, _, counter = arguments[:6]
    *_, training, _, _ = arguments
    if training and running_mean is not None and None in in_dims[3:5]:
        raise refused_update()
    if counter is None or in_dims[5] is not None:
        return _one_by_one(operator, info.batch_size, in_dims, arguments)
    counters = counter.repeat(info.batch_size)  # all examples are one batch
    arguments = (*arguments[:5], counters, *arguments[6:])
    in_dims = (*in_dims[:5], 0, *in_dims[6:])
    results = _one_by_one(operator, info.batch_size, in_dims, arguments)
    counter.copy_(counters[0])
    return results


def _vmapped_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple:
    operator = torch.ops.batchnorm_cuda.fused_backward
    return _one_by_one(operator, info.batch_size, in_dims, arguments)


def _differentiable(name: str, apply: Callable, unfused: Callable) -> Callable:
    """Lets autograd differentiate the operator itself, as in a graph that torch.export has made."""
    operator = getattr(torch.ops.batchnorm_cuda, name).default

    def rule(keys: Any, *arguments: Any) -> Any:
        if forward_mode_active() or transforms_active():
            return unfused(*arguments)
        requires_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in arguments)
        if torch.is_grad_enabled() and requires_grad:
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    return rule


def _register(name: str, vmapped: Callable, apply: Callable, unfused: Callable) -> None:
    library = fused_ops._library
    torch.library.register_vmap(f"batchnorm_cuda::{name}", vmapped, lib=library)
    rule = _differentiable(name, apply, unfused)
    library.impl(name, rule, "Autograd", with_keyset=True)


_register("fused_forward", _vmapped_forward, _FusedOperator.apply, _unfused_operator_forward)
_register(
    "fused_backward", _vmapped_backward, _unfused_operator_backward, _unfused_operator_backward
)
# torch.autograd.grad(..., is_grads_batched=True) is an older vmap than torch.func's.
fused_ops._library.impl("fused_backward", _unfused_operator_backward, "Batched")
