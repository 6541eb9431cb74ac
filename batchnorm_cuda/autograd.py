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

# Records are made anew by position: by _replace it takes a microsecond more.
_NEED_MASK = Forward._fields.index("need_mask")
_PLAIN = Backward._fields.index("mask")  # the number of fields before what is beyond a plain call


def recorded(call: Forward) -> Tensor:
    """The output of the call, with a gradient."""
    if call.residual is None:
        return BatchNormFunction.apply(call.input, call.weight, call.bias, call)
    return BatchNormFunction.apply(call.input, call.weight, call.bias, call, call.residual)


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
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        # Of `recorded`: the record, and what beside these autograd has to see.
        call = rest[0] if type(rest[0]) is Forward else Forward(input, weight, bias, *rest)
        if call.relu and any(ctx.needs_input_grad):
            call = Forward(*call[:_NEED_MASK], True, *call[_NEED_MASK + 1 :])
        output, *saved = passes.forward(call)
        ctx.save_for_backward(input, weight, *saved)
        # Only the dtype of bias takes part in the backward, so it is not saved: an in-place update
        # of bias between forward and backward is no error.
        ctx.settings = bias, call.training, call.group, call.activation, call.parameter
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        saved = ctx.saved_tensors
        input, weight, mean, invstd = saved[:4]
        bias, training, group, activation, parameter = ctx.settings
        call = Backward(
            grad_output,
            input,
            weight,
            bias,
            mean,
            invstd,
            training,
            needed[0],
            needed[1],
            needed[2],
        )
        if len(saved) > 4:
            count, mask = saved[4:]
            need_residual = len(needed) == 5 and needed[4]
            beyond = (mask, need_residual, group, count, None, activation, parameter)
            call = Backward(*call[:_PLAIN], *beyond)
        grads = (backward_in_parts if is_recorded() else passes.backward)(call)
        if len(needed) == 4:
            return *grads[:3], None
        if len(needed) == 5:
            return *grads[:3], None, *(grads[3:] or (None,))
        return *grads[:3], *(None,) * (len(needed) - 3)
