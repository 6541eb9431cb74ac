"""How training is recorded: by the extension, or by a Function of Python: save, call, return.

`_ops.derivatives` has the Functions for everything beyond.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ._ops import operators, passes
from ._ops.calls import Backward, Forward
from ._ops.choice import computes, dispatcher, is_recorded
from ._ops.derivatives import backward_in_parts
from ._ops.layout import stands_for_others

_RESIDUAL, _RELU = map(Forward._fields.index, ("residual", "relu"))
_PLAIN = Backward._fields.index("mask")  # the number of fields before what is beyond a plain call


def recorded(call: Forward) -> Tensor:
    """The output of the call, with a gradient.

    By a node of the extension's, whose backward takes no Python; by `BatchNormFunction` over
    several ranks, and where the dispatcher has to see what is done.
    """
    if call.group is None:
        fused = call.relu or call.residual is not None
        who = computes(call, operators.fused_forward.seen if fused else operators.forward.seen)
        if who is not dispatcher:
            try:
                if fused:
                    return who.recorded(*call[:_RELU], call.relu, call.activation, call.parameter)
                return who.recorded(*call[:_RESIDUAL])
            except RuntimeError:
                if not any(map(stands_for_others, call)):
                    raise
    if call.residual is None:
        return BatchNormFunction.apply(call.input, call.weight, call.bias, call)
    return BatchNormFunction.apply(call.input, call.weight, call.bias, call, call.residual)


def seen_backward(*given: Any) -> tuple[Tensor | None, ...]:
    """The gradients of a call that the extension has recorded, where Python has to see them."""
    plain, (mask, need_residual, activation, parameter) = given[:_PLAIN], given[_PLAIN:]
    call = Backward(*plain, mask, need_residual, activation=activation, parameter=parameter)
    grads = (backward_in_parts if is_recorded() else passes.backward)(call)
    return (*grads, *(None,) * (4 - len(grads)))


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
        output, *saved = passes.forward(call)
        # No gradient gives none; but ranks that have one wait for those that have not.
        ctx.set_materialize_grads(call.group is not None)
        ctx.save_for_backward(input, weight, *saved)
        # Only the dtype of bias takes part in the backward, so it is not saved: an in-place update
        # of bias between forward and backward is no error.
        ctx.settings = bias, call.training, call.group, call.activation, call.parameter
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad_output is None:  # what stands behind has none
            return (None,) * len(needed)
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
            call = call._replace(
                mask=mask,
                need_residual=len(needed) == 5 and needed[4],
                group=group,
                count=count,
                activation=activation,
                parameter=parameter,
            )
        grads = (backward_in_parts if is_recorded() else passes.backward)(call)
        if len(needed) == 4:
            return *grads[:3], None
        if len(needed) == 5:
            return *grads[:3], None, *(grads[3:] or (None,))
        return *grads[:3], *(None,) * (len(needed) - 3)
