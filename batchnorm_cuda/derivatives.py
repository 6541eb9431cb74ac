"""Batch norm and its first derivatives as Functions that can be differentiated and transformed.

The Functions here serve gradients of gradients, forward-mode AD and torch.func. Plain eager
training does not pay for them: autograd.py has the Function that it uses.

Higher derivatives need no kernels beyond `double_backward`. With L = Σ grad_output·y as a function
of (grad_output, input, weight, bias), the four first derivatives of L are y and the results of the
backward; the Hessian of L is symmetric, so its products serve forward and reverse mode alike
(docs/math.md, "Forward mode").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import ops
from ._transforms import forward_over_channels, over_channels

# Aliases: the look-ups of their names would be paid on every step.
is_grad_enabled = torch.is_grad_enabled
# True under torch.func's transforms (grad, vmap, jvp, ...).
transforms_active = torch._C._are_functorch_transforms_active


def is_recorded() -> bool:
    """True where a backward must itself be a differentiable or transformable operation."""
    # As forward_mode_active, without its call: this is on the path of every step.
    active = is_grad_enabled() or forward_ad._current_level >= 0 or transforms_active()
    # Compilers differentiate once, by themselves.
    return active and not torch.compiler.is_compiling()


def forward_mode_active() -> bool:
    """True inside of `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


class TransformableBatchNorm(Function):
    """`BatchNormFunction` for forward-mode AD and torch.func: same arguments.

    Returns output, save_mean and save_invstd; the latter two are not differentiable.
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.forward(
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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, *_ = inputs
        _, save_mean, save_invstd = output
        ctx.training = inputs[6]
        _save(ctx, input, weight, bias, save_mean, save_invstd)
        ctx.mark_non_differentiable(save_mean, save_invstd)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads = (None, None, None)
        if grad_output is not None:
            needed = ctx.needs_input_grad[:3]
            grads = BatchNormBackward.apply(grad_output, *ctx.saved_tensors, ctx.training, *needed)
        not_differentiable = (None,) * 6  # the running statistics and the settings after them
        return *grads, *not_differentiable

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        if tangents[3] is not None or tangents[4] is not None:
            raise RuntimeError(
                "batch_norm: expected running_mean and running_var to have no tangents, "
                "got a dual tensor"
            )
        input, weight, _, save_mean, save_invstd = ctx.saved_tensors
        tangent, _, _ = BatchNormDoubleBackward.apply(
            *tangents[:3],
            None,
            input,
            weight,
            save_mean,
            save_invstd,
            ctx.training,
            True,
            False,
            False,
        )
        return tangent, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return forward_over_channels(TransformableBatchNorm.apply, info.batch_size, in_dims, args)


class BatchNormBackward(Function):
    """`ops.backward`, the first derivative, as a Function. Differentiable in both modes."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        save_mean: Tensor,
        save_invstd: Tensor,
        training: bool,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return ops.backward(
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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.training, *ctx.needed = inputs[6:]
        ctx.save_for_backward(*inputs[:3], *inputs[4:6])  # without bias, which may be updated
        ctx.save_for_forward(*inputs[:6])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (None, None, None)
        if any(grad is not None for grad in grad_grads):
            grad_output, input, weight, save_mean, save_invstd = ctx.saved_tensors
            need_grad_output, need_input, need_weight = ctx.needs_input_grad[:3]
            grads = BatchNormDoubleBackward.apply(
                *grad_grads,
                grad_output,
                input,
                weight,
                save_mean,
                save_invstd,
                ctx.training,
                need_grad_output,
                need_input,
                need_weight and grad_grads[0] is not None,  # else zero
            )
        not_differentiable = (None,) * 7  # bias, the statistics and the settings after them
        return *grads, *not_differentiable

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The rows of input, weight and bias of the Hessian of L, times the tangents."""
        grad_output, input, weight, bias, save_mean, save_invstd = ctx.saved_tensors
        statistics = (save_mean, save_invstd, ctx.training)
        need_input, need_weight, need_bias = ctx.needed
        of_grad_output = of_rest = (None, None, None)
        if tangents[0] is not None:
            of_grad_output = BatchNormBackward.apply(
                tangents[0], input, weight, bias, *statistics, *ctx.needed
            )
        if tangents[1] is not None or tangents[2] is not None:
            _, grad_input, grad_weight = BatchNormDoubleBackward.apply(
                *tangents[1:3],
                None,
                grad_output,
                input,
                weight,
                *statistics,
                False,
                need_input,
                need_weight,
            )
            # grad_bias depends on grad_output alone; autograd wants a zero by name.
            of_rest = (grad_input, grad_weight, torch.zeros_like(bias) if need_bias else None)
        return tuple(map(_sum, of_grad_output, of_rest))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return over_channels(BatchNormBackward.apply, info.batch_size, in_dims, args)


class BatchNormDoubleBackward(Function):
    """`ops.double_backward` as a Function: the second derivatives, and the tangent of the output.

    Its first result, in which grad_output does not occur, is differentiable; the others would be
    third derivatives.
    """

    @staticmethod
    def forward(
        grad_grad_input: Tensor | None,
        grad_grad_weight: Tensor | None,
        grad_grad_bias: Tensor | None,
        grad_output: Tensor | None,
        input: Tensor,
        weight: Tensor | None,
        save_mean: Tensor,
        save_invstd: Tensor,
        training: bool,
        need_grad_output: bool,
        need_input: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return ops.double_backward(
            grad_grad_input,
            grad_grad_weight,
            grad_grad_bias,
            grad_output,
            input,
            weight,
            save_mean,
            save_invstd,
            training,
            need_grad_output,
            need_input,
            need_weight,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.training = inputs[8]
        _save(ctx, *inputs[:3], *inputs[4:8])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *third: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the sum of grad * grad_grad_output, which is linear in grad as L is in grad_output."""
        if any(other is not None for other in third):
            raise _not_available()
        grads, grad_input, grad_weight = (None, None, None), None, None
        if grad is not None:
            *grad_grads, input, weight, save_mean, save_invstd = ctx.saved_tensors
            statistics = (save_mean, save_invstd, ctx.training)
            need_input, need_weight = ctx.needs_input_grad[4:6]
            grads = BatchNormBackward.apply(
                grad, input, weight, grad_grads[2], *statistics, *ctx.needs_input_grad[:3]
            )
            _, grad_input, grad_weight = BatchNormDoubleBackward.apply(
                *grad_grads,
                grad,
                input,
                weight,
                *statistics,
                False,
                need_input,
                need_weight and grad_grads[0] is not None,
            )
        not_differentiable = (None,) * 6  # the statistics and the settings after them
        return *grads, None, grad_input, grad_weight, *not_differentiable

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


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _not_available() -> RuntimeError:
    return RuntimeError(
        "batch_norm: third derivatives, and forward mode over forward mode, are not available "
        "through the kernels; the composite of torch operators, for CPU tensors, has them"
    )


def _register(name: str, function: type[Function]) -> None:
    """Lets autograd differentiate the operator itself, as in a graph that torch.export has made.

    torch.library.register_autograd would refuse it: the forward updates running statistics.
    """
    operator = getattr(torch.ops.batchnorm_cuda, name).default

    def differentiable(keys: Any, *args: Any) -> Any:
        requires_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if (torch.is_grad_enabled() and requires_grad) or forward_mode_active():
            results = function.apply(*args)
            return results if name == "forward" else [r for r in results if r is not None]
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    ops._library.impl(name, differentiable, "Autograd", with_keyset=True)


_register("forward", TransformableBatchNorm)
_register("backward", BatchNormBackward)
_register("double_backward", BatchNormDoubleBackward)
