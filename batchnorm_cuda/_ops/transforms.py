"""torch.func: the kernels' Functions and operators under `vmap`, and what no transform can do.

A vmapped dimension becomes more channels. Batch norm treats every channel by itself, so B problems
with C channels are one with B*C. That holds for each of its derivatives too, and for parameters
and statistics that are batched or shared alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls import Forward
from .layout import batched_by_autograd

_functorch = torch._C._functorch

# Places among the arguments of the forward, as a Function and as an operator.
_RUNNING_MEAN, _RUNNING_VAR, _NUM_BATCHES_TRACKED, _TRAINING, _MOMENTUM = map(
    Forward._fields.index,
    ("running_mean", "running_var", "num_batches_tracked", "training", "momentum"),
)


def check_update(input: Tensor, running: Tensor) -> None:
    """Refuse to update a running statistic that the innermost transform does not own.

    The update is in place. Under grad and jvp that is possible for an argument of the transformed
    function only; under vmap of the input each example would have to write the same vector.
    """
    interpreter = _functorch.peek_interpreter_stack()
    level = interpreter.level()
    if interpreter.key() == _functorch.TransformType.Vmap:
        needed = _functorch.maybe_get_level(input) == level
    else:
        needed = True
    if needed and _functorch.maybe_get_level(running) != level:
        raise refused_update()


def refused_update() -> RuntimeError:
    return RuntimeError(
        "batch_norm: expected running_mean and running_var to be None, or training to be False, "
        "under a transform of torch.func, got running statistics that the transform does not own "
        "and would have to update: use eval() or track_running_stats=False, or hand the buffers to "
        "the transformed function as arguments, which vmap must batch like input"
    )


def over_channels(
    call: Callable,
    size: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    updated: tuple[int, ...] = (),
) -> tuple[Any, Any]:
    """Outputs of `call` and where their vmapped dimension is, for a batching rule to return.

    Arguments and outputs are activations (N, C, ...), vectors (C,) or no tensors; they are told
    apart by their number of dimensions. `updated` are the places of the arguments that `call`
    writes to, all of them batched.
    """
    folded = [_fold(arg, dim, size) for arg, dim in zip(args, in_dims, strict=True)]
    outputs = call(*folded)
    for place in updated:  # folding has copied them where their examples are not in front
        args[place].movedim(in_dims[place], 0).copy_(folded[place].unflatten(0, (size, -1)))
    unfolded = [None if out is None else _unfold(out, size) for out in outputs]
    dims = [None if out is None else _channel_dim(out) for out in outputs]
    kind = type(outputs)  # a tuple, or the list of an operator
    return kind(unfolded), kind(dims)


def over_batch_of_autograd(call: Callable, args: tuple[Any, ...]) -> list[Tensor]:
    """`over_channels` for torch.autograd.grad(..., is_grads_batched=True).

    That is an older vmap than torch.func's, with tensors of its own and no rules for a Function.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    in_dims = tuple(0 if batched_by_autograd(arg) else None for arg in args)
    args = tuple(
        arg if dim is None else torch._remove_batch_dim(arg, level, 1, 0)
        for arg, dim in zip(args, in_dims, strict=True)
    )
    size = next(len(arg) for arg, dim in zip(args, in_dims, strict=True) if dim is not None)
    outputs, out_dims = over_channels(call, size, in_dims, args)
    return [torch._add_batch_dim(*output, level) for output in zip(outputs, out_dims, strict=True)]


def forward_over_channels(
    call: Callable, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """`over_channels` of the forward, which in training mode updates running statistics.

    The kernels count one batch. Examples with counters of their own are counted here.
    """
    updates = args[_TRAINING] and args[_RUNNING_MEAN] is not None
    updated = (_RUNNING_MEAN, _RUNNING_VAR) if updates else ()
    if any(in_dims[place] is None for place in updated):
        raise refused_update()
    counters = None
    if in_dims[_NUM_BATCHES_TRACKED] is not None:
        if args[_MOMENTUM] is None:
            raise NotImplementedError(
                "batch_norm: expected momentum to be a number under vmap with batched "
                "num_batches_tracked, got None"
            )
        counters = args[_NUM_BATCHES_TRACKED]
        args = (*args[:_NUM_BATCHES_TRACKED], None, *args[_NUM_BATCHES_TRACKED + 1 :])
        in_dims = (*in_dims[:_NUM_BATCHES_TRACKED], None, *in_dims[_NUM_BATCHES_TRACKED + 1 :])
    results = over_channels(call, size, in_dims, args, updated)
    if counters is not None and args[_TRAINING]:
        counters.add_(1)
    return results


def _channel_dim(tensor: Tensor) -> int:
    return 1 if tensor.dim() > 1 else 0


def _fold(arg: Any, dim: int | None, size: int) -> Any:
    if not isinstance(arg, Tensor) or (dim is None and arg.dim() == 0):
        return arg
    if dim is None:
        at = _channel_dim(arg)
        arg = arg.unsqueeze(at)
        arg = arg.expand(*arg.shape[:at], size, *arg.shape[at + 1 :])
    else:
        at = 1 if arg.dim() > 2 else 0
        arg = arg.movedim(dim, at)
    return arg.flatten(at, at + 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    at = _channel_dim(tensor)
    return tensor.unflatten(at, (size, tensor.shape[at] // size))
