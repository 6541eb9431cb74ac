"""The autograd Function that training goes through: save, call, return.

`_ops.derivatives` has the Functions for everything beyond.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ._ops import passes
from ._ops.calls import Backward, Forward
from ._ops.choice import is_recorded
from ._ops.derivatives import backward_in_parts

_RESIDUAL = Forward._fields.index("residual")
_UP_TO_RESIDUAL = (None,) * (_RESIDUAL - 3)
_AFTER_RESIDUAL = (None,) * (len(Forward._fields) - _RESIDUAL - 1)


class BatchNormFunction(Function):
    """Batch normalisation by the CUDA kernels, over one rank or several. Twice differentiable.

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
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = Forward(*arguments)
        if call.relu:
            call = call._replace(need_mask=any(ctx.needs_input_grad))
        results = passes.forward(call)
        ctx.save_for_backward(
            call.input, call.weight, results.mean, results.invstd, results.count, results.mask
        )
        # Only the dtype of bias takes part in the backward, so it is not saved: an in-place update
        # of bias between forward and backward is no error.
        ctx.bias = call.bias
        ctx.training, ctx.ranks, ctx.group_name = call.training, call.ranks, call.group_name
        return results.output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, count, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        call = Backward(
            grad_output,
            input,
            weight,
            ctx.bias,
            mean,
            invstd,
            ctx.training,
            *needed[:3],
            mask,
            len(needed) > _RESIDUAL and needed[_RESIDUAL],
            ctx.ranks,
            ctx.group_name,
            count,
        )
        *grads, grad_residual = (backward_in_parts if is_recorded() else passes.backward)(call)
        return (*grads, *_UP_TO_RESIDUAL, grad_residual, *_AFTER_RESIDUAL)[: len(needed)]
