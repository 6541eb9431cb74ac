"""The operators of synchronised batch norm: the parts of a pass between which ranks gather.

Each is computed by the kernels, or for CPU tensors without emulation by `_sync_composite`. As in
`ops`, plain eager calls skip the dispatcher; what has to see operators goes through
`torch.ops.batchnorm_cuda`. `gather` is the one collective of a pass, in the functional form that
torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _sync_composite, ops
from ._build import extension as _extension
from .fused_ops import fake_mask

_library = torch.library.Library("batchnorm_cuda", "FRAGMENT")
_SCHEMAS = (
    "sync_statistics(Tensor input) -> Tensor",
    "sync_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor gathered, float? momentum, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    # The sums, then gradients.
    "sync_backward_reduce(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor invstd, bool need_weight, bool need_bias) -> Tensor[]",
    "sync_sum(Tensor gathered) -> Tensor",
    "sync_backward_elementwise(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, "
    "Tensor invstd, Tensor sums, Tensor count) -> Tensor",
    # Fused, as in fused_ops.
    "sync_fused_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor gathered, Tensor? residual, "
    "bool relu, bool need_mask, float? momentum, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sync_fused_backward_reduce(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor invstd, Tensor mask, bool need_weight, bool need_bias) -> Tensor[]",
    "sync_fused_backward_elementwise(Tensor grad_output, Tensor input, Tensor? weight, "
    "Tensor mean, Tensor invstd, Tensor sums, Tensor count, Tensor mask, bool need_input, "
    "bool need_residual) -> Tensor[]",
)
# These return the gradients that are needed: a schema has no optional results.
_OF_NEEDED = (
    "sync_backward_reduce",
    "sync_fused_backward_reduce",
    "sync_fused_backward_elementwise",
)


def gather(values: Tensor, ranks: int, group_name: str) -> Tensor:
    """`values` of all ranks of the group, [ranks, *values.shape], in the order of the ranks.

    On a GPU the host does not wait for it. Raises a RuntimeError where the process group does: a
    rank has died, or did not come within the group's timeout.
    """
    collectives = torch.ops._c10d_functional
    gathered = collectives.all_gather_into_tensor(values, ranks, group_name)
    return collectives.wait_tensor(gathered).view(ranks, *values.shape)


def sync_statistics(input: Tensor) -> Tensor:
    """What the other ranks must know of this rank's part: count, mean and M2, packed in one row.

    The row has the statistics' dtype. It begins with the bits of the count, one int64; mean [C] and
    M2 [C], the sum of squared deviations from that mean, follow. An empty part gives zeros.
    """
    return _call("sync_statistics", input)


def sync_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    gathered: Tensor,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the gathered rows, [ranks, row], and normalise this rank's part by the result.

    Updates the running statistics in place, by the unbiased variance of all ranks' values; fewer
    than two values per channel leave them as they are. num_batches_tracked counts the batch in
    either case. Returns output, mean [C], invstd [C] and
    count [1], int64, of all ranks.
    """
    return _call(
        "sync_forward",
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        gathered,
        momentum,
        eps,
    )


def sync_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """This rank's sums [2, C], of dy and of dy times xhat, and its grad_weight and grad_bias."""
    sums, *grads = _call(
        "sync_backward_reduce",
        grad_output,
        input,
        weight,
        bias,
        mean,
        invstd,
        need_weight,
        need_bias,
    )
    return sums, *_in_place(grads, need_weight, need_bias)


def sync_sum(gathered: Tensor) -> Tensor:
    """The sum over the first dimension, the ranks; their order does not change a bit of it."""
    return _call("sync_sum", gathered)


def sync_backward_elementwise(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """grad_input of this rank's part; sums [2, C] and count [1] are those of all ranks."""
    return _call("sync_backward_elementwise", grad_output, input, weight, mean, invstd, sums, count)


def sync_fused_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    gathered: Tensor,
    residual: Tensor | None,
    relu: bool,
    need_mask: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`sync_forward` with what follows it, and the mask of the ReLU or None where not needed."""
    *results, mask = _call(
        "sync_fused_forward",
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        gathered,
        residual,
        relu,
        need_mask,
        momentum,
        eps,
    )
    return *results, mask if need_mask else None


def sync_fused_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`sync_backward_reduce` of the gradient that the ReLU lets through."""
    sums, *grads = _call(
        "sync_fused_backward_reduce",
        grad_output,
        input,
        weight,
        bias,
        mean,
        invstd,
        mask,
        need_weight,
        need_bias,
    )
    return sums, *_in_place(grads, need_weight, need_bias)


def sync_fused_backward_elementwise(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    count: Tensor,
    mask: Tensor,
    need_input: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad_input and grad_residual, None where not needed; sums and count serve grad_input only."""
    grads = _call(
        "sync_fused_backward_elementwise",
        grad_output,
        input,
        weight,
        mean,
        invstd,
        sums,
        count,
        mask,
        need_input,
        need_residual,
    )
    return _in_place(grads, need_input, need_residual)


def _in_place(grads: Sequence[Tensor | None], *needed: bool) -> tuple[Tensor | None, ...]:
    """Of a direct call or of an operator, which leaves out what is not needed."""
    return ops._in_place_of_needed([grad for grad in grads if grad is not None], *needed)


def _call(name: str, tensor: Tensor, *rest: Any) -> Any:
    return getattr(ops.kernels_for(tensor, composite=_sync_composite), name)(tensor, *rest)


def _implementation(name: str, tensor: Tensor) -> Callable:
    kernels = _extension.has_kernels(tensor)
    return getattr(ops.extension_for(tensor) if kernels else _sync_composite, name)


def _kernel(name: str) -> Callable:
    def kernel(tensor: Tensor, *rest: Any) -> Any:
        results = _implementation(name, tensor)(tensor, *rest)
        if name == "sync_fused_forward":
            *results, mask = results
            return *results, fake_mask(tensor, False) if mask is None else mask
        if name in _OF_NEEDED:
            return [result for result in results if result is not None]
        return results

    return kernel


def _fake_statistics(input: Tensor) -> Tensor:
    dtype = ops._accumulation_dtype(input.dtype)
    values = 2 * input.shape[1] + torch.int64.itemsize // dtype.itemsize
    return input.new_empty(values, dtype=dtype)


def _fake_forward(input: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, mean, invstd = ops._fake_forward(input)
    return output, mean, invstd, input.new_empty(1, dtype=torch.int64)


def _fake_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    grads = ops._fake_backward(
        grad_output, input, weight, bias, mean, invstd, True, False, need_weight, need_bias
    )
    return [mean.new_empty(2, input.shape[1]), *grads]


def _fake_sum(gathered: Tensor) -> Tensor:
    return gathered.new_empty(gathered.shape[1:])


def _fake_backward_elementwise(grad_output: Tensor, input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(ops.as_dense(input))


def _fake_fused_forward(input: Tensor, *rest: object) -> tuple[Tensor, ...]:
    *_, need_mask, _momentum, _eps = rest
    return *_fake_forward(input), fake_mask(input, need_mask)


def _fake_fused_backward_reduce(*arguments: object) -> list[Tensor]:
    *tensors, _mask, need_weight, need_bias = arguments
    return _fake_backward_reduce(*tensors, need_weight, need_bias)


def _fake_fused_backward_elementwise(
    grad_output: Tensor, input: Tensor, *rest: object
) -> list[Tensor]:
    *_, need_input, need_residual = rest
    needed = [need for need in (need_input, need_residual) if need]
    return [_fake_backward_elementwise(grad_output, input) for _ in needed]


_FAKES = (
    _fake_statistics,
    _fake_forward,
    _fake_backward_reduce,
    _fake_sum,
    _fake_backward_elementwise,
    _fake_fused_forward,
    _fake_fused_backward_reduce,
    _fake_fused_backward_elementwise,
)
for _schema, _fake in zip(_SCHEMAS, _FAKES, strict=True):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _name = _schema.partition("(")[0]
    for _key in ("CUDA", "CPU"):
        _library.impl(_name, _kernel(_name), _key)
    torch.library.register_fake(f"batchnorm_cuda::{_name}", _fake, lib=_library)
