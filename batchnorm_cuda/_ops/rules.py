"""How torch differentiates and vmaps the operators themselves, as in a graph of torch.export's.

torch.library.register_autograd would refuse it: the forward updates running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import operators, passes
from .calls import Backward, Gradients, Normalized
from .choice import dispatcher, forward_mode_active, is_recorded, transforms_active
from .derivatives import (
    BatchNormBackward,
    BatchNormDoubleBackward,
    TransformableBatchNorm,
    backward_in_parts,
    forward_in_parts,
)
from .operators import Operator
from .transforms import forward_over_channels, over_batch_of_autograd, over_channels, refused_update

_library = operators._library
_ARGUMENTS = operators.fused_forward.arguments
_COUNTER = _ARGUMENTS.index("num_batches_tracked")


class _FusedOperator(Function):
    """The operator `fused_forward` as a Function: its arguments, its results."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        asked = operators.fused_forward.bind(*arguments)
        # The caller may not have known that there would be a backward.
        call = asked._replace(need_mask=asked.relu and any(ctx.needs_input_grad))
        results = Normalized(*passes.forward(call))
        ctx.save_for_backward(call.input, call.weight, results.mean, results.invstd, results.mask)
        ctx.bias, ctx.training = call.bias, call.training  # bias for its dtype alone
        ctx.activation = call.activation, call.parameter
        returned = _returned(results if asked.need_mask else results._replace(mask=None), asked)
        ctx.mark_non_differentiable(*returned[1:])
        return returned

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        saved = (input, weight, ctx.bias, mean, invstd, ctx.training)
        need_residual = needed[_ARGUMENTS.index("residual")]
        call = Backward(grad_output, *saved, *needed[:3], mask, need_residual)
        call = call._replace(**dict(zip(("activation", "parameter"), ctx.activation, strict=True)))
        grads = Gradients(*(backward_in_parts if is_recorded() else passes.backward)(call))
        return tuple(getattr(grads, f"grad_{name}", None) for name in _ARGUMENTS[: len(needed)])


def _returned(results: Normalized, call: Any) -> tuple[Tensor, ...]:
    of_operator = (results.output, results.mean, results.invstd, results.mask)
    return operators.fused_forward.as_operator(of_operator, call)


def _forward_in_parts(*arguments: Any) -> tuple[Tensor, ...]:
    call = operators.fused_forward.bind(*arguments)
    return _returned(forward_in_parts(call), call)


def _backward_in_parts(*arguments: Any) -> list[Tensor]:
    call = operators.fused_backward.bind(*arguments)
    return [grad for grad in backward_in_parts(call) if grad is not None]


# ---- autograd


def _by_function(operator: Operator, function: type[Function]) -> Callable:
    def apply(*arguments: Any) -> Any:
        return operator.as_operator(function.apply(*arguments), operator.bind(*arguments))

    return apply


def _differentiable(operator: Operator, applied: Callable, in_parts: Callable | None) -> Callable:
    """Lets autograd differentiate the operator, by `applied`, or `in_parts` under transforms."""
    overload = getattr(dispatcher, operator.name).default

    def rule(keys: Any, *arguments: Any) -> Any:
        transformed = forward_mode_active() or (in_parts is not None and transforms_active())
        if transformed:
            return (in_parts or applied)(*arguments)
        requires_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in arguments)
        if torch.is_grad_enabled() and requires_grad:
            return applied(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    return rule


# ---- torch.func.vmap


def _over(rule: Callable, operator: Operator) -> Callable:
    def vmapped(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return rule(getattr(dispatcher, operator.name), info.batch_size, in_dims, arguments)

    return vmapped


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


def _forward_one_by_one(
    operator: Callable, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    call = operators.fused_forward.bind(*arguments)
    dims = operators.fused_forward.bind(*in_dims)
    if call.training and call.running_mean is not None and None in dims[3:5]:
        raise refused_update()
    counter = call.num_batches_tracked
    if counter is None or dims.num_batches_tracked is not None:
        return _one_by_one(operator, size, in_dims, arguments)
    counters = counter.repeat(size)  # all examples are one batch
    arguments = (*arguments[:_COUNTER], counters, *arguments[_COUNTER + 1 :])
    in_dims = (*in_dims[:_COUNTER], 0, *in_dims[_COUNTER + 1 :])
    results = _one_by_one(operator, size, in_dims, arguments)
    counter.copy_(counters[0])
    return results


# Each operator that is differentiated: by which Function, in parts if fused, and its vmap.
_RULES = (
    (operators.forward, TransformableBatchNorm, None, forward_over_channels),
    (operators.backward, BatchNormBackward, None, over_channels),
    (operators.double_backward, BatchNormDoubleBackward, None, over_channels),
    (operators.fused_forward, _FusedOperator, _forward_in_parts, _forward_one_by_one),
    (operators.fused_backward, None, _backward_in_parts, _one_by_one),
)
for _operator, _function, _in_parts, _vmap in _RULES:
    _applied = _by_function(_operator, _function) if _function else _in_parts
    _autograd = _differentiable(_operator, _applied, _in_parts)
    _library.impl(_operator.name, _autograd, "Autograd", with_keyset=True)
    _name = f"batchnorm_cuda::{_operator.name}"
    torch.library.register_vmap(_name, _over(_vmap, _operator), lib=_library)


# torch.autograd.grad(..., is_grads_batched=True) is an older vmap than torch.func's.


def _batched(operator: Operator) -> Callable:
    def rule(*arguments: Any) -> Any:
        return over_batch_of_autograd(getattr(dispatcher, operator.name), arguments)

    return rule


for _operator in (operators.backward, operators.double_backward):
    _library.impl(_operator.name, _batched(_operator), "Batched")
_library.impl("fused_backward", _backward_in_parts, "Batched")
