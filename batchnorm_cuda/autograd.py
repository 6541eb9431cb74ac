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
            call = call._replace(need_mask=True)
        results = passes.forward(call)
        ctx.save_for_backward(input, weight, *results[1:])
        # Only the dtype of bias takes part in the backward, so it is not saved: an in-place update
        # of bias between forward and backward is no error.
        ctx.bias = bias
        ctx.training = call.training
        if len(results) > 3:
            ctx.beyond = call.group, call.activation, call.parameter
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        saved = ctx.saved_tensors
        input, weight, mean, invstd = saved[:4]
        fused = ()
        if len(saved) > 4:
            count, mask = saved[4:]
            group, *activation = ctx.beyond
            fused = mask, len(needed) == 5 and needed[4], group, count, None, *activation
        call = Backward(
            grad_output,
            input,
            weight,
            ctx.bias,
            mean,
            invstd,
            ctx.training,
            needed[0],
            needed[1],
            needed[2],
            *fused,
        )
        grads = (backward_in_parts if is_recorded() else passes.backward)(call)
        if len(needed) == 5:
            return *grads[:3], None, grads[3]
        return *grads[:3], *(None,) * (len(needed) - 3)
