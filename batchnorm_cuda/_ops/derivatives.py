"""Batch norm and its first derivatives as Functions that can be differentiated and transformed.

The Functions here serve gradients of gradients, forward-mode AD and torch.func. Plain eager
training does not pay for them: autograd.py has the Function that it uses. What is fused to batch
norm is taken apart here, into operators of torch's own that have all of these derivatives.

Higher derivatives need no kernels beyond `double_backward`. With L = Σ grad_output·y as a function
of (grad_output, input, weight, bias), the four first derivatives of L are y and the results of the
backward; the Hessian of L is symmetric, so its products serve forward and reverse mode alike
(docs/math.md, "Forward mode").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import activations, passes
from .calls import Backward, DoubleBackward, Forward, Gradients, Normalized
from .checks import check_residual
from .choice import is_recorded
from .transforms import forward_over_channels, over_channels

# The arguments of batch norm itself, without what is fused to it.
PLAIN = slice(Forward._fields.index("residual"))


def forward_in_parts(call: Forward) -> Normalized:
    """`passes.forward` in parts. Each of them rounds."""
    check_residual(call.residual, call.input)
    output, mean, invstd = TransformableBatchNorm.apply(*call[PLAIN])
    if call.residual is not None:
        output = output + call.residual
    output = activations.applied(call, output)
    mask = activations.mask_of(call, output) if call.need_mask else None
    return Normalized(output, mean, invstd, None, mask)


def backward_in_parts(call: Backward) -> Gradients:
    """`passes.backward` in parts. With g the gradient of what the activation was applied to,
    grad_residual is g, and the others are those of batch norm for g.
    """
    g = activations.before(call)
    plain = call._replace(grad_output=g, mask=None, need_residual=False)
    grads = (None, None, None)
    if call.need_input or call.need_weight or call.need_bias:
        grads = BatchNormBackward.apply(*plain) if is_recorded() else passes.backward(plain)[:3]
    return Gradients(*grads, g if call.need_residual else None)


class TransformableBatchNorm(Function):
    """`BatchNormFunction` for forward-mode AD and torch.func: same arguments, nothing fused.

    Returns output, mean and invstd; the latter two are not differentiable.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return passes.forward(Forward(*arguments))[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = Forward(*inputs)
        _, mean, invstd = output
        ctx.training = call.training
        _save(ctx, call.input, call.weight, call.bias, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads = (None, None, None)
        if grad_output is not None:
            needed = ctx.needs_input_grad[:3]
            grads = BatchNormBackward.apply(grad_output, *ctx.saved_tensors, ctx.training, *needed)
        return _for_all_arguments(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        of = Forward(*tangents)
        if of.running_mean is not None or of.running_var is not None:
            raise RuntimeError(
                "batch_norm: expected running_mean and running_var to have no tangents, "
                "got a dual tensor"
            )
        input, weight, _, mean, invstd = ctx.saved_tensors
        saved = (input, weight, mean, invstd, ctx.training)
        tangent, _, _ = BatchNormDoubleBackward.apply(
            of.input, of.weight, of.bias, None, *saved, True, False, False
        )
        return tangent, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return forward_over_channels(TransformableBatchNorm.apply, info.batch_size, in_dims, args)


class BatchNormBackward(Function):
    """`passes.backward` without fusion as a Function of its record's fields.

    Differentiable in both modes, over several ranks in reverse mode alone.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return passes.backward(Backward(*arguments))[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        call = Backward(*inputs)
        ctx.training, ctx.group = call.training, call.group
        ctx.needed = call.need_input, call.need_weight, call.need_bias
        statistics = (call.save_mean, call.save_invstd)
        # Without bias, which may be updated.
        ctx.save_for_backward(call.grad_output, call.input, call.weight, *statistics, call.count)
        ctx.save_for_forward(call.grad_output, call.input, call.weight, call.bias, *statistics)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (None, None, None)
        if any(grad is not None for grad in grad_grads):
            *saved, count = ctx.saved_tensors
            need_grad_output, need_input, need_weight = ctx.needs_input_grad[:3]
            grads = BatchNormDoubleBackward.apply(
                *grad_grads,
                *saved,
                ctx.training,
                need_grad_output,
                need_input,
                need_weight and grad_grads[0] is not None,  # else zero
                ctx.group,
                count,
            )
        return _for_all_arguments(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The rows of input, weight and bias of the Hessian of L, times the tangents."""
        grad_output, input, weight, bias, mean, invstd = ctx.saved_tensors
        statistics = (mean, invstd, ctx.training)
        need_input, need_weight, need_bias = ctx.needed
        of_grad_output = of_rest = (None, None, None)
        if tangents[0] is not None:
            of_grad_output = BatchNormBackward.apply(
                tangents[0], input, weight, bias, *statistics, *ctx.needed
            )
        if tangents[1] is not None or tangents[2] is not None:
            read = (grad_output, input, weight, *statistics)
            _, grad_input, grad_weight = BatchNormDoubleBackward.apply(
                *tangents[1:3], None, *read, False, need_input, need_weight
            )
            # grad_bias depends on grad_output alone; autograd wants a zero by name.
            of_rest = (grad_input, grad_weight, torch.zeros_like(bias) if need_bias else None)
        return tuple(map(_sum, of_grad_output, of_rest))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return over_channels(BatchNormBackward.apply, info.batch_size, in_dims, args)


class BatchNormDoubleBackward(Function):
    """`passes.double_backward` as a Function of its record's fields: the second derivatives, and
    the tangent of the output.

    Its first result, in which grad_output does not occur, is differentiable; the others would be
    third derivatives.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return tuple(passes.double_backward(DoubleBackward(*arguments)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        call = DoubleBackward(*inputs)
        ctx.training, ctx.group = call.training, call.group
        _save(ctx, *call[:3], call.input, call.weight, call.save_mean, call.save_invstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *third: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the sum of grad * grad_grad_output, which is linear in grad as L is in grad_output."""
        if ctx.group is not None or any(other is not None for other in third):
            raise _not_available()
        grads, grad_input, grad_weight = (None, None, None), None, None
        if grad is not None:
            *grad_grads, input, weight, mean, invstd = ctx.saved_tensors
            statistics = (mean, invstd, ctx.training)
            need_input, need_weight = ctx.needs_input_grad[4:6]
            grads = BatchNormBackward.apply(
                grad, input, weight, grad_grads[2], *statistics, *ctx.needs_input_grad[:3]
            )
            needed = (False, need_input, need_weight and grad_grads[0] is not None)
            _, grad_input, grad_weight = BatchNormDoubleBackward.apply(
                *grad_grads, grad, input, weight, *statistics, *needed
            )
        return _for_all_arguments(ctx, *grads, None, grad_input, grad_weight)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        raise _not_available()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return over_channels(BatchNormDoubleBackward.apply, info.batch_size, in_dims, args)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)  # an absent gradient is not computed with


def _for_all_arguments(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the first arguments, and None for those after them."""
    return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _not_available() -> RuntimeError:
    return RuntimeError(
        "batch_norm: third derivatives, and forward mode over forward mode, are not available "
        "through the kernels; the composite of torch operators, for CPU tensors, has them"
    )
