"""The operators of batch norm fused with a residual and ReLU: y = relu(bn(x) + residual).

As in `ops`, plain eager calls skip the dispatcher; what has to see operators goes through
`torch.ops.batchnorm_cuda`. `_mask` has the form of the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._mask import mask_bytes

_library = torch.library.Library("batchnorm_cuda", "FRAGMENT")
# A schema has no optional results: a mask that is not wanted has no bytes, and a backward gives the
# gradients that are needed.
_library.define(
    "fused_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, bool relu, "
    "bool need_mask, bool training, float? momentum, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "fused_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor save_mean, Tensor save_invstd, Tensor mask, bool training, bool need_input, "
    "bool need_weight, bool need_bias, bool need_residual) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def fused_forward(
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
    """`ops.forward` with what follows it, and the mask of the ReLU or None where not needed."""
    # What is no tensor at all, the extension refuses by a TypeError.
    others = (residual,) if isinstance(residual, Tensor) else ()
    output, save_mean, save_invstd, mask = ops.kernels_for(input, *others).fused_forward(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        relu,
        need_mask,
        training,
        momentum,
        eps,
    )
    return output, save_mean, save_invstd, mask if need_mask else None


def fused_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    save_mean: Tensor,
    save_invstd: Tensor,
    mask: Tensor,
    training: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """grad_input, grad_weight, grad_bias, grad_residual; None where not needed."""
    arguments = (
        grad_output,
        input,
        weight,
        bias,
        save_mean,
        save_invstd,
        mask,
        training,
        need_input,
        need_weight,
        need_bias,
        need_residual,
    )
    kernels = ops.kernels_for(input, grad_output)
    if kernels is not ops.operators:
        try:
            return kernels.fused_backward(*arguments)
        except RuntimeError:
            if not ops.batched_by_autograd(grad_output):
                raise
    grads = ops.operators.fused_backward(*arguments)
    return ops._in_place_of_needed(grads, need_input, need_weight, need_bias, need_residual)


def fake_mask(input: Tensor, need_mask: bool) -> Tensor:
    """A mask of the right size, of which only the size counts."""
    size = mask_bytes(input.numel(), input.dtype) if need_mask else 0
    return input.new_empty(size, dtype=torch.uint8)


def _forward_kernel(input: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *results, mask = ops.extension_for(input).fused_forward(input, *rest)
    return *results, fake_mask(input, False) if mask is None else mask


def _backward_needed(grad_output: Tensor, input: Tensor, *rest: object) -> list[Tensor]:
    grads = ops.extension_for(input).fused_backward(grad_output, input, *rest)
    return [grad for grad in grads if grad is not None]


def _fake_forward(input: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, need_mask, _training, _momentum, _eps = rest
    return *ops._fake_forward(input), fake_mask(input, need_mask)


def _fake_backward(*arguments: object) -> list[Tensor]:
    *of_batch_norm, need_residual = arguments[:6] + arguments[7:]
    grads = ops._fake_backward(*of_batch_norm)
    if need_residual:
        grads.append(torch.empty_like(ops.as_dense(arguments[1])))
    return grads


for _key in ("CUDA", "CPU"):
    _library.impl("fused_forward", _forward_kernel, _key)
    _library.impl("fused_backward", _backward_needed, _key)
torch.library.register_fake("batchnorm_cuda::fused_forward", _fake_forward, lib=_library)
torch.library.register_fake("batchnorm_cuda::fused_backward", _fake_backward, lib=_library)
