"""The autograd Function over the kernels: save, call, return.

The one that plain training goes through; derivatives.py has those for everything beyond.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from . import ops
from .derivatives import BatchNormBackward, is_recorded


class BatchNormFunction(Function):
    """Batch normalisation by the CUDA kernels. Twice differentiable.

    `apply` takes (input, weight, bias, running_mean, running_var, num_batches_tracked, training,
    momentum, eps) and returns the output. Shapes and dtypes are those of `batch_norm`, which is the
    checked way in; num_batches_tracked is an int64 scalar, read where momentum is None, or None.
    For tensors that have kernels only: not for those of which `backend_for` says "aten". The
    formulas, with their derivation, are in docs/math.md.

    Raises:
        TypeError: as `batch_norm`.
        ValueError: as `batch_norm`.
        RuntimeError: as `batch_norm`; the third derivative is asked for.
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
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        output, save_mean, save_invstd = ops.kernels_for(input).forward(
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
        ctx.save_for_backward(input, weight, save_mean, save_invstd)
        # Only the dtype of bias takes part in the backward, so it is not saved: an in-place update
        # of bias between forward and backward is no error.
        ctx.bias = bias
        ctx.training = training
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, save_mean, save_invstd = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        call = BatchNormBackward.apply if is_recorded() else ops.backward
        grad_input, grad_weight, grad_bias = call(
            grad_output,
            input,
            weight,
            ctx.bias,
            save_mean,
            save_invstd,
            ctx.training,
            need_input,
            need_weight,
            need_bias,
        )
        not_differentiable = (None,) * 6  # the running statistics and the settings after them
        return grad_input, grad_weight, grad_bias, *not_differentiable
