"""The operators behind the autograd Functions, and their registration with torch.

In plain eager mode a call goes straight to the extension. Everything that has to see operators
instead (torch.compile, fake tensors, tensor subclasses, dispatch modes, tracing) goes through
`torch.ops.batchnorm_cuda`, which adds a fake kernel and a declared set of mutated arguments but
costs the dispatcher's boxing of every argument, several times the price of the direct call.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._build import extension as _extension

# Aliases: the look-ups of their names would be paid on every call. Of compilers only Dynamo works
# on tensors that look like any others; torch.compiler.is_compiling, of every one, takes two calls.
is_compiling = torch.compiler.is_dynamo_compiling
is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack

_library = torch.library.Library("batchnorm_cuda", "DEF")
_library.define(
    "forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# A list, because an operator's schema has no optional results: the gradients that are needed.
_library.define(
    "backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor save_mean, "
    "Tensor save_invstd, bool training, bool need_input, bool need_weight, bool need_bias)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
    "Tensor? grad_output, Tensor input, Tensor? weight, Tensor save_mean, Tensor save_invstd, "
    "bool training, bool need_grad_output, bool need_input, bool need_weight) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


operators = torch.ops.batchnorm_cuda


def extension_for(tensor: Tensor) -> ModuleType:
    """The compiled module whose kernels take `tensor`: CUDA's, or its emulation on the CPU."""
    return _extension.load_cuda() if tensor.is_cuda else _extension.load_emulated()


def kernels_for(tensor: Tensor, *others: Tensor, composite: Any = None) -> Any:
    """Where `forward` and the others are to be called with these tensors.

    Either the extension, in plain eager mode, or the operators, where something has to see one.
    Both take the same arguments; an operator has no optional results, see `_in_place_of_needed`.
    `composite`, if given, stands in for the extension where there are no kernels.
    """
    if is_compiling() or _dispatch_modes() or is_tracing() or type(tensor) is not Tensor:
        return operators
    for other in others:
        if type(other) is not Tensor:
            return operators
    if composite is not None and not _extension.has_kernels(tensor):
        return composite
    if tensor.is_cuda:
        return _extension._cuda or _extension.load_cuda()
    return _extension._emulated or _extension.load_emulated()


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
    """Normalise, and in training mode update the running statistics in place and count the batch.

    momentum None is 1 / the number of this batch, which the kernel takes from num_batches_tracked:
    the host does not wait for it, and a CUDA graph counts on with each replay.
    Returns output, save_mean and save_invstd; the latter two are [C] in the accumulation dtype and
    are what was used to normalise, in either mode.
    """
    return kernels_for(input).forward(
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


def backward(
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
    """grad_input, grad_weight, grad_bias; None where not needed. bias lends only its dtype."""
    arguments = (
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
    kernels = kernels_for(input, grad_output)
    if kernels is not operators:
        try:
            return kernels.backward(*arguments)
        except RuntimeError:
            if not batched_by_autograd(grad_output):
                raise
    grads = operators.backward(*arguments)
    return _in_place_of_needed(grads, need_input, need_weight, need_bias)


def double_backward(
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
    """grad_grad_output, grad_input, grad_weight: the gradients of `backward`; None if not needed.

    The incoming gradients of grad_input, grad_weight and grad_bias are zero where None.
    grad_grad_output does not depend on grad_output, which may then be None.
    """
    arguments = (
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
    tensors = [tensor for tensor in arguments[:4] if tensor is not None]
    kernels = kernels_for(input, *tensors)
    if kernels is not operators:
        try:
            return kernels.double_backward(*arguments)
        except RuntimeError:
            if not any(map(batched_by_autograd, tensors)):
                raise
    grads = operators.double_backward(*arguments)
    return _in_place_of_needed(grads, need_grad_output, need_input, need_weight)


def as_dense(tensor: Tensor) -> Tensor:
    """`tensor` itself if it has neither gaps nor overlaps, else a copy in its suggested format.

    Output and grad_input take their strides from it.
    """
    if _is_dense(tensor):
        return tensor
    return tensor.contiguous(memory_format=_suggest_memory_format(tensor))


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of `as_dense`, without making the copy."""
    if _is_dense(tensor):
        return tensor.stride()
    memory_format = _suggest_memory_format(tensor)
    return torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def _is_dense(tensor: Tensor) -> bool:
    if torch.compiler.is_dynamo_compiling():
        # Which sorts no symbols. empty_like keeps the strides of dense tensors, and of no others.
        return torch.empty_like(tensor).stride() == tensor.stride()
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


_CHANNELS_LAST = {
    4: ((1, 3, 2, 0), torch.channels_last),
    5: ((1, 4, 3, 2, 0), torch.channels_last_3d),
}


def _suggest_memory_format(tensor: Tensor) -> torch.memory_format:
    """ATen's suggest_memory_format, which has no public name in Python."""
    order, channels_last = _CHANNELS_LAST.get(tensor.dim(), ((), torch.contiguous_format))
    sizes, strides = tensor.shape, tensor.stride()
    least = 0 if strides[1] > 0 else math.inf
    for dim in order:
        # The last alternative: N x C x 1 x 1 fits both formats, and contiguous wins.
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[dim] * sizes[dim]
    return channels_last


def batched_by_autograd(value: object) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) stands behind it.

    Its tensors look like any others and have no memory. To be asked once something has failed, to
    keep it off the usual path.
    """
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def _in_place_of_needed(grads: list[Tensor], *needed: bool) -> tuple[Tensor | None, ...]:
    """The results of an operator that returns those needed only, with None for the others."""
    left = iter(grads)
    return tuple(next(left) if need else None for need in needed)


def _backward_needed(grad_output: Tensor, input: Tensor, *rest: object) -> list[Tensor]:
    grads = extension_for(input).backward(grad_output, input, *rest)
    return [grad for grad in grads if grad is not None]


def _double_backward_needed(*arguments: Tensor | None) -> list[Tensor]:
    grads = extension_for(arguments[4]).double_backward(*arguments)
    return [grad for grad in grads if grad is not None]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(input: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    stats = input.new_empty(input.shape[1], dtype=_accumulation_dtype(input.dtype))
    return torch.empty_like(as_dense(input)), stats, torch.empty_like(stats)


def _fake_backward(
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
) -> list[Tensor]:
    grads = []
    if need_input:
        grads.append(torch.empty_like(as_dense(input)))
    if need_weight:
        grads.append(input.new_empty(input.shape[1], dtype=weight.dtype))
    if need_bias:
        grads.append(input.new_empty(input.shape[1], dtype=bias.dtype))
    return grads


def _fake_double_backward(
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
) -> list[Tensor]:
    grads = [torch.empty_like(as_dense(input)) for need in (need_grad_output, need_input) if need]
    if need_weight:
        grads.append(input.new_empty(input.shape[1], dtype=weight.dtype))
    return grads


def _forward_kernel(input: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return extension_for(input).forward(input, *rest)


for _key in ("CUDA", "CPU"):
    _library.impl("forward", _forward_kernel, _key)
    _library.impl("backward", _backward_needed, _key)
    _library.impl("double_backward", _double_backward_needed, _key)
torch.library.register_fake("batchnorm_cuda::forward", _fake_forward, lib=_library)
torch.library.register_fake("batchnorm_cuda::backward", _fake_backward, lib=_library)
torch.library.register_fake("batchnorm_cuda::double_backward", _fake_double_backward, lib=_library)
