"""Batch norm as a composite of torch operators: CPU tensors, and any device without kernels.

The semantics of the kernels, so that code written for the GPU runs on a laptop: statistics and sums
in float32 (float64 for float64), parameters in the input's dtype or float32, the input's memory
format kept, and the same errors. Autograd differentiates it, as often as wanted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ops import as_dense, batched_by_autograd

ACCUMULATE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`functional.normalize` for tensors that no kernel takes; checks what ops.cpp checks there."""
    traced = is_traced_by_jit()
    if not traced:
        check_arguments(input, weight, bias, running_mean, running_var, training, eps)
        check_residual(residual, input)
        check_counter(num_batches_tracked, input)
    acc = ACCUMULATE[input.dtype]
    dense = input if traced else as_dense(input)
    x = dense.to(acc)
    reduced = [0, *range(2, x.dim())]
    if training:
        # Statistics of nothing are 0; they are not used, but take part in gradients.
        count = max(x.numel() // max(x.shape[1], 1), 1)
        # A sum of large values rounds; what is left beyond it does not, and is nothing where all
        # values are equal.
        about = x.detach().sum(reduced, keepdim=True) / count
        shifted = x - about
        beyond = shifted.sum(reduced, keepdim=True) / count
        centred = shifted - beyond
        mean = about + beyond
        var = centred.square().sum(reduced, keepdim=True) / count
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and x.numel() > 0:
            factor = 1 / num_batches_tracked.to(acc) if momentum is None else momentum
            _update(running_mean, mean, factor)
            _update(running_var, var * (count / (count - 1)), factor)
    else:
        centred = x - per_channel(running_mean.to(acc), x)
        var = running_var.to(acc)
    output = transform(dense, centred, (var + eps).rsqrt(), weight, bias, residual, relu)
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        # grad_input then has the input's strides, too, whatever those of grad_output. A compiler
        # chooses strides by itself, and traces no hook that looks at them. The hook is the node's,
        # because a tensor with hooks warns when it is saved, and holds no tensor.
        place = dense.shape, dense.stride()
        output.grad_fn.register_prehook(lambda grads: (_placed(*place, grads[0]), *grads[1:]))
    return output


def transform(
    dense: Tensor,
    centred: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """centred * invstd * weight + bias + residual, rounded once to the dtype of the dense input.

    The result has its strides, too. ReLU comes last: what is rounded to zero has no gradient.
    """
    scale = per_channel(invstd, dense)
    if weight is not None:
        scale = scale * per_channel(weight.to(invstd.dtype), dense)
    output = centred * scale
    if bias is not None:
        output = output + per_channel(bias.to(invstd.dtype), dense)
    if residual is not None:
        output = output + residual.to(invstd.dtype)
    output = output.to(dense.dtype)
    if relu:
        output = output.relu()
    return output if is_traced_by_jit() else with_strides_of(dense, output)


def is_traced_by_jit() -> bool:
    """Sizes are tensors there, and what is decided by them holds for the traced input only."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def per_channel(vector: Tensor, input: Tensor) -> Tensor:
    """A view of the [C] values that broadcasts over the input."""
    return vector.view([1, -1] + [1] * (input.dim() - 2))


def with_strides_of(dense: Tensor, values: Tensor | None) -> Tensor | None:
    return _placed(dense.shape, dense.stride(), values)


def _placed(shape: torch.Size, stride: tuple[int, ...], values: Tensor | None) -> Tensor | None:
    if values is None or values.stride() == stride:  # None: a gradient of zero
        return values
    if batched_by_autograd(values):  # a gradient of many: the strides of one are not seen
        return values
    return values.new_empty_strided(shape, stride).copy_(values)


def _update(running: Tensor, statistic: Tensor, factor: float | Tensor) -> None:
    # detach, not no_grad: a mode would become a region of its own in an exported graph.
    running.copy_(updated(running, statistic.detach().flatten(), factor))


def updated(running: Tensor, statistic: Tensor, factor: float | Tensor) -> Tensor:
    """The running statistic after a batch, in the dtype of `statistic`."""
    return running.to(statistic.dtype) * (1 - factor) + factor * statistic


def check_arguments(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    check_input(input)
    _check_vector("weight", weight, input)
    _check_vector("bias", bias, input)
    _check_running(running_mean, running_var, input, training)
    if not 0 <= eps < math.inf:  # math.isfinite takes no symbol of a compiler
        raise ValueError(f"batch_norm: expected eps to be finite and not negative, got {eps}")


def check_input(input: Tensor) -> None:
    if input.layout is not torch.strided:
        raise TypeError(f"batch_norm: expected input to be a strided tensor, got {input.layout}")
    if input.dtype not in ACCUMULATE:
        raise TypeError(
            "batch_norm: expected input to have dtype torch.float16, torch.bfloat16, "
            f"torch.float32 or torch.float64, got {input.dtype}"
        )
    if input.dim() < 2:
        raise ValueError(
            "batch_norm: expected input to have at least 2 dimensions, "
            f"got shape {list(input.shape)}"
        )


def check_residual(residual: Tensor | None, input: Tensor) -> None:
    if residual is None:
        return
    _check_place("residual", residual, input)
    if residual.dtype != input.dtype:
        raise TypeError(
            f"batch_norm: expected residual to have dtype {input.dtype}, the dtype of input, "
            f"got {residual.dtype}"
        )
    if residual.shape != input.shape:
        raise ValueError(
            f"batch_norm: expected residual to have shape {list(input.shape)}, "
            f"got {list(residual.shape)}"
        )


def check_counter(counter: Tensor | None, input: Tensor) -> None:
    if counter is None:
        return
    if counter.device != input.device:
        raise RuntimeError(
            f"batch_norm: expected num_batches_tracked to be on {input.device}, the device of "
            f"input, got {counter.device}"
        )
    if counter.dtype != torch.int64:
        raise TypeError(
            "batch_norm: expected num_batches_tracked to have dtype torch.int64, "
            f"got {counter.dtype}"
        )
    if counter.numel() != 1:
        raise ValueError(
            "batch_norm: expected num_batches_tracked to have one element, "
            f"got shape {list(counter.shape)}"
        )


def _check_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    if vector is None:
        return
    _check_place(name, vector, input)
    if vector.dtype not in (input.dtype, torch.float32):
        allowed = str(input.dtype)
        if input.dtype != torch.float32:
            allowed += " or torch.float32"
        raise TypeError(f"batch_norm: expected {name} to have dtype {allowed}, got {vector.dtype}")
    if list(vector.shape) != [input.shape[1]]:
        raise ValueError(
            f"batch_norm: expected {name} to have shape [{input.shape[1]}], "
            f"got {list(vector.shape)}"
        )


def _check_place(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"batch_norm: expected {name} to be a strided tensor, got {tensor.layout}")
    if tensor.device != input.device:
        raise RuntimeError(
            f"batch_norm: expected {name} to be on {input.device}, the device of input, "
            f"got {tensor.device}"
        )


def _check_running(mean: Tensor | None, var: Tensor | None, input: Tensor, training: bool) -> None:
    if mean is None and var is not None:
        raise ValueError("batch_norm: expected running_mean to be given with running_var, got None")
    if var is None and mean is not None:
        raise ValueError("batch_norm: expected running_var to be given with running_mean, got None")
    if mean is None and not training:
        raise ValueError(
            "batch_norm: expected running_mean and running_var to be given when training=False, "
            "got None"
        )
    for name, vector in (("running_mean", mean), ("running_var", var)):
        _check_vector(name, vector, input)
        if vector is not None and vector.requires_grad:
            raise RuntimeError(
                f"batch_norm: expected {name} not to require grad, "
                "got a tensor with requires_grad=True"
            )
