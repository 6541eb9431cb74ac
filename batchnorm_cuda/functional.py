"""`batch_norm`, the public function, and the choice of what computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._build.extension import has_kernels
from ._ops import composite, passes, rules  # noqa: F401 - rules registers itself
from ._ops.activations import Activation, with_activation
from ._ops.calls import Forward
from ._ops.checks import check_residual
from ._ops.choice import is_compiling, is_tracing, transforms_active, way_of
from ._ops.derivatives import forward_in_parts
from ._ops.transforms import check_update
from .autograd import recorded

Backend = Literal["cuda", "emulated", "aten"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    r"""Normalise each channel of `input`; a drop-in for :func:`torch.nn.functional.batch_norm`.

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \mathrm{eps}}} \cdot \mathrm{weight} + \mathrm{bias}

    from Ioffe and Szegedy, "Batch Normalization" (arXiv:1502.03167), algorithm 1. In training mode
    :math:`\mu` and :math:`\sigma^2` are mean and biased variance of the batch, over all dimensions
    but the second. In evaluation mode they are the running statistics. docs/math.md derives the
    gradients.

    With `residual` and `activation` the result is :math:`\mathrm{act}(y + \mathrm{residual})`, or
    what either of the two makes of :math:`y`: in the same pass over memory, and rounded once.

    Args:
        input: (N, C) or (N, C, \*), of two or more dimensions; float16, bfloat16, float32 or
            float64. Contiguous and channels-last inputs are read in place, any other strides are
            copied to one of the two first. Output and gradient have the input's memory format.
            As in torch, a one-dimensional input is given back if it is empty, and else refused.
        running_mean: (C,), the running mean; in the dtype of `input` or float32, as are all
            parameters, each by itself. None only together with `running_var`, and in training.
        running_var: (C,), the running variance.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.
        training: normalise by the statistics of the batch, and if running statistics are given
            update them in place:
            ``running = (1 - momentum) * running + momentum * statistic``, where the variance is the
            unbiased one. An empty batch leaves them as they are.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance; not negative. Zero is allowed in training mode too, where
            torch refuses it; a constant channel then gives NaN.
        residual: added to the result; shape, dtype and device of `input`, any strides, not
            broadcast. Its gradient has the memory format of `input`.
        activation: applied last. None, "relu", "relu6", "leaky_relu" with a slope of 0.01, or
            ("leaky_relu", slope) with one between 0 and 1. As in torch, NaN stays NaN. For the
            backward, a byte for every 16 bytes is kept, and neither residual nor output.

    Returns:
        A tensor with shape, dtype and memory format of `input`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape or a value is wrong, evaluation lacks running statistics, or training
            mode meets one value per channel.
        RuntimeError: tensors are on different devices, a running statistic requires grad, or one
            would be updated under a transform of torch.func; or the kernels cannot be built.

    Messages read "batch_norm: expected <argument> to be <what>, got <what came>". Nothing is
    written before all checks have passed.

    Statistics and sums are float32, or float64 for float64 input, whatever the dtype of `input`.
    Results are deterministic. The kernels have first and second derivatives, in forward and in
    reverse mode (docs/math.md), the composite those of any order. Under the transforms of
    torch.func, training mode takes running statistics only as arguments of the transformed
    function, batched like `input` under vmap. `backend_for` says what computes a given tensor.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    # Tensor subclasses, and the proxies of torch.fx.
    if has_torch_function_variadic(*tensors, residual):
        settings = (training, momentum, eps)
        extras = {"residual": residual, "activation": activation}
        relevant = (*tensors, residual)
        return handle_torch_function(batch_norm, relevant, *tensors, *settings, **extras)
    if momentum is None:
        raise TypeError("batch_norm: expected momentum to be a number, got None")
    parameters = (weight, bias, running_mean, running_var, None)
    call = Forward(input, *parameters, training, momentum, eps, residual)
    return normalize(call if activation is None else with_activation(call, activation))


def backend_for(tensor: Tensor) -> Backend:
    """What computes `batch_norm` of `tensor`; there is no silent fallback to another.

    - "cuda": the kernels, for a tensor on a GPU. An extension that cannot be built or loaded is an
      error.
    - "emulated": the same kernels run on the CPU by a model of CUDA, for a CPU tensor where the
      environment has BATCHNORM_CUDA_EMULATE=1. For tests; slow.
    - "aten": a composite of torch operators with the same semantics, for every other tensor.

    Args:
        tensor: of any shape and dtype; only its device counts. Nothing is loaded or compiled.

    Returns:
        One of these three words.
    """
    if not has_kernels(tensor):
        return "aten"
    return "cuda" if tensor.is_cuda else "emulated"


def normalize(call: Forward) -> Tensor:
    """`batch_norm` as the modules call it: in training mode num_batches_tracked counts the batch.

    momentum=None averages over all batches that it has counted, this one included.
    The backends check dtypes, shapes and devices. What is left is what torch checks in Python, too.
    """
    try:
        input = call.input
        dims = input.dim()
        if dims == 1 and input.numel() == 0:
            check_residual(call.residual, input)
            return input.clone()  # the one shape of fewer than two dimensions that torch takes
        if call.training:
            compiling = is_compiling()
            # torch.jit's sizes are tensors.
            sized = compiling or not is_tracing()
            if sized and dims > 1 and input.shape[0] == 1 and call.group is None:
                _check_count(input.shape)
            if not compiling and transforms_active() and call.running_mean is not None:
                check_update(input, call.running_mean)
        return _WAYS[way_of(call)](call)
    except (AttributeError, TypeError):
        # Types are looked at only once something has failed, to keep them off the usual path.
        _check_types(call)
        raise


# What `way_of` names.
_WAYS: dict[str, Callable[[Forward], Tensor]] = {
    "composite": composite.batch_norm,
    "in parts": lambda call: forward_in_parts(call).output,
    "recorded": recorded,
    "direct": lambda call: passes.forward(call)[0],
}


def _check_count(shape: torch.Size) -> None:
    """Of a single sample."""
    if math.prod(shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}"
        )


def _check_types(call: Forward) -> None:
    if not isinstance(call.input, Tensor):
        raise _wrong_type("input", "a torch.Tensor", call.input) from None
    for name in ("weight", "bias", "running_mean", "running_var", "residual"):
        value = getattr(call, name)
        if value is not None and not isinstance(value, Tensor):
            raise _wrong_type(name, "a torch.Tensor or None", value) from None
    if call.momentum is not None and not isinstance(call.momentum, Real):
        raise _wrong_type("momentum", "a number", call.momentum) from None
    if not isinstance(call.eps, Real):
        raise _wrong_type("eps", "a number", call.eps) from None


def _wrong_type(name: str, expected: str, value: object) -> TypeError:
    got = "None" if value is None else type(value).__name__
    return TypeError(f"batch_norm: expected {name} to be {expected}, got {got}")
