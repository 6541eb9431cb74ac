"""`Pending`: the output of a batch norm that waits for the add and the activation behind it.

It is a Tensor to every isinstance, has no data, and sees each torch function that is called with
it, attributes included. An add gives it a residual, an activation makes the fused result of it, and
anything else finds the batch norm's ordinary output in its place: the object's class is Tensor
from then on. A call in place makes the object itself the result, as it does with any tensor.

Waiting is only right while nothing that goes into the batch norm changes. What autograd's version
counters show is an error, as it would be in a backward. The gradient mode is that of the call.

All of this is on the path of every step, where a function more costs as much as what it does.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._ops.calls import Forward
from .._ops.choice import is_compiling, is_grad_enabled, is_tracing, transforms_active
from .activations import BY_FUNCTION, fields

# Dynamo of 2.6 cannot make a tensor subclass within a graph, and that of 2.9 exports what such an
# object holds instead of what it stands for: under them nothing waits.
_COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
_PLAIN = Forward._fields.index("residual")  # the number of fields before what is fused
_global_hooks = torch.nn.modules.module._global_forward_hooks
# Whoever reads a waiting object past torch's functions gets a tensor that fits nothing.
_NOTHING = torch.empty(0, device="meta")


class Call:
    """A call of a batch norm that waits. Several `Pending` can be of one, as y and y + residual."""

    __slots__ = ("grad_enabled", "module", "record", "updates", "version", "waits")

    def __init__(self, module: nn.Module, record: Forward, waits: bool) -> None:
        self.module = module
        self.record = record
        self.waits = waits
        self.grad_enabled = is_grad_enabled()
        self.updates = False
        self.version = 0 if is_compiling() else _version(record)

    def run(
        self, pending: Pending, relu: bool = False, activation: str = "relu", parameter: float = 0.0
    ) -> Tensor:
        """What `pending`, which is of this call, and the activation are."""
        record, residual = self.record, pending.residual
        if relu or residual is not None:  # by _replace it takes twice the time
            fused = (residual, relu, False, None, None, activation, parameter)
            record = Forward(*record[:_PLAIN], *fused)
        if record.training and not self.updates:
            record = record._replace(**_NO_STATISTICS)
        if not is_compiling() and (
            self.version != _version(record)
            or (residual is not None and pending.residual_version != _count(residual))
        ):
            raise RuntimeError(
                "batch_norm: expected what a batch norm with fuse=True is computed from to stay as "
                "it is until its output is used, got a change in place before: use the output "
                "before, or convert without fuse=True"
            )
        if not self.updates:
            return self.module._normalize(record)
        written = record.num_batches_tracked
        if written is None:
            written = record.running_mean
        before = _count(written)
        self.updates = False
        try:
            return self.module._normalize(record)
        except Exception:
            # What is refused has updated nothing: the batch norm by itself may still be right.
            fused = relu or residual is not None
            self.updates = fused and _count(written) == before
            raise


class Update(Call):
    """A call that updates running statistics, or counts.

    The first `Pending` of it that is computed does, or the last when it is gone.
    """

    __slots__ = ()

    def __init__(self, module: nn.Module, record: Forward, waits: bool) -> None:
        super().__init__(module, record, waits)
        self.updates = True  # is still to come

    def __del__(self) -> None:
        # Without the attribute it is an object that Dynamo made, past __init__. What is only found
        # later, in a cycle, may be found at any time: such as in the middle of a transform.
        if getattr(self, "updates", False) and not (sys.is_finalizing() or _is_watched()):
            with torch.no_grad():
                self.run(_pending(self))


_NO_STATISTICS = {
    "running_mean": None,
    "running_var": None,
    "num_batches_tracked": None,
    "momentum": 0.0,
}


def _version(record: Forward) -> int:
    """Grows with each change in place of what the result is computed from."""
    try:
        version = record.input._version
        if record.weight is not None:
            version += record.weight._version
        if record.bias is not None:
            version += record.bias._version
        if not record.training and record.running_mean is not None:
            version += record.running_mean._version
            if record.running_var is not None:
                version += record.running_var._version
    except RuntimeError:  # tensors of inference mode do not count
        return 0
    return version


def _count(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # as above
        return 0


class Pending(Tensor):
    """See above.

    Attributes:
        call: the batch norm's.
        residual: what has been added to its output so far.
        residual_version: of autograd's counter for it, where there is one.
        value: the ordinary tensor in place of an object that cannot become it.
    """

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        waited_for = _WAITED_FOR.get(function)
        if waited_for is not None:
            result = waited_for(*args, **kwargs)
            if result is not None:
                return result
        return function(*settled(args), **settled(kwargs))

    # The way by __torch_function__ takes a microsecond.

    def __add__(self, other: Any) -> Tensor:
        result = _add(self, other)
        return Tensor.__add__(self, other) if result is None else result

    def __radd__(self, other: Any) -> Tensor:
        result = _add(self, other)  # sums of two are the same in both orders
        return Tensor.__radd__(self, other) if result is None else result

    def __iadd__(self, other: Any) -> Tensor:
        result = _add_in_place(self, other)
        return Tensor.__iadd__(self, other) if result is None else result


def defer(module: nn.Module, record: Forward) -> Pending | None:
    """The output of this call to wait with; None where it has to be computed now.

    That is where nothing to wait for is expected, where hooks get it, which may keep it, and where
    somebody counts on what runs when.
    """
    fusion = module._fusion
    found = fusion.training if module.training else fusion.evaluation
    if type(found) is str or type(record.input) is not Tensor:
        return None
    if module._forward_hooks or _global_hooks:
        return None
    if is_compiling():
        if not _COMPILES:
            return None
    elif _is_watched():
        return None
    updates = record.training and (
        record.running_mean is not None or record.num_batches_tracked is not None
    )
    return _pending((Update if updates else Call)(module, record, found.waits))


def _is_watched() -> bool:
    """Whether somebody counts on what runs when: torch.func, forward mode, a tracer."""
    return transforms_active() or forward_ad._current_level >= 0 or is_tracing()


def _pending(call: Call) -> Pending:
    if is_compiling():  # the graph would have the global tensor as an input
        pending = Tensor._make_subclass(Pending, torch.empty(0, device="meta"))
    else:
        pending = _NOTHING.data
        # So that a gradient for a tensor that is none does not pass unnoticed.
        pending.requires_grad = call.grad_enabled
        pending.__class__ = Pending
    pending.call = call
    pending.residual = pending.value = None  # of the object: Dynamo does not look at the class
    return pending


def tell_dynamo() -> None:
    """What waits at the edge of a compiled region is settled there, not traced into."""
    import torch._dynamo.config as config  # seconds, which not every program has to pay

    if hasattr(config, "nontraceable_tensor_subclasses"):
        config.nontraceable_tensor_subclasses.add(Pending)


# --- what is waited for: the result, or None for what has to be done with ordinary tensors -------


def _activated(read: Callable, in_place: bool) -> Callable:
    def activate(*args: Any, **kwargs: Any) -> Tensor | None:
        pending = args[0] if args else None
        if not _waits(pending):
            return None
        activation, asked = read(*args, **kwargs)
        known = None if activation is None else fields(activation)
        if known is None:
            return None
        result = pending.call.run(pending, *known)
        return _become(pending, result) if in_place or asked else result

    return activate


def _add(first: Any = None, second: Any = None, **kwargs: Any) -> Tensor | None:
    if kwargs:
        return None
    if type(second) is int and second == 0 and _waits(first):  # as sum() begins
        same = _pending(first.call)
        if first.residual is not None:
            _give(same, first.residual)
        return same
    pending, residual = first, _residual_of(first, second)
    if residual is None:
        pending, residual = second, _residual_of(second, first)
    if residual is None:
        return None
    both = _pending(pending.call)
    _give(both, residual)
    return both if both.call.waits else both.call.run(both)


def _add_in_place(pending: Any = None, other: Any = None, **kwargs: Any) -> Tensor | None:
    if kwargs:
        return None
    residual = _residual_of(pending, other)
    if residual is None:
        if not (_waits(pending) and _waits(other)) or pending is other:
            return None
        # The sum that waits is the other's residual, in the object of the sum.
        residual = _residual_of(other, pending.call.run(pending))
        if residual is None:
            return None
        pending.call = other.call
    _give(pending, residual)
    return pending if pending.call.waits else _become(pending, pending.call.run(pending))


def _give(pending: Pending, residual: Tensor) -> None:
    pending.residual = residual
    if not is_compiling():
        pending.residual_version = _count(residual)


def _residual_of(pending: Any, other: Any) -> Tensor | None:
    """`other`, settled, if a batch norm that waits can add it."""
    if not _waits(pending) or pending.residual is not None or other is pending:
        return None
    kind = type(other)
    if kind is Pending:
        other = settled(other)
    elif kind is not Tensor and kind is not nn.Parameter:
        return None
    input = pending.call.record.input
    # A wrong device is an error with the batch norm as it is without.
    alike = other.dtype is input.dtype and other.shape == input.shape
    return other if alike and other.layout is input.layout else None


def _waits(value: Any) -> bool:
    """Whether it can take what is done to it now: in the gradient mode of the batch norm's call."""
    if type(value) is not Pending or value.value is not None:
        return False
    return value.call.grad_enabled == is_grad_enabled()


# Operators: as Dynamo calls them.
_WAITED_FOR = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__, operator.iadd), _add_in_place),
    **{function: _activated(*entry) for function, entry in BY_FUNCTION.items()},
}


# --- everything else -----------------------------------------------------------------------------


def settled(value: Any) -> Any:
    """`value` with ordinary tensors only: what it holds in lists, tuples and dicts, too."""
    kind = type(value)
    if kind is Pending:
        return _settle(value)
    if kind is tuple or kind is list:
        return kind([settled(item) for item in value])
    if kind is dict:
        return {key: settled(item) for key, item in value.items()}
    return value


def _settle(pending: Pending) -> Tensor:
    if pending.value is not None:
        return pending.value
    call = pending.call
    if call.grad_enabled == is_grad_enabled():
        return _become(pending, pending.call.run(pending))
    with torch._C.DisableTorchFunctionSubclass():
        if pending.grad_fn is not None:  # that of a Function, which gave it back as its result
            raise _taken()
    with torch.set_grad_enabled(call.grad_enabled):
        return _become(pending, pending.call.run(pending))


def _become(pending: Pending, value: Tensor) -> Tensor:
    """Makes the object that everybody holds the tensor `value`."""
    if is_compiling() or value._use_count() > 1:  # by what would lose it
        pending.value = value
        return value
    if pending._use_count() > 1:
        raise _taken()
    torch._C._swap_tensor_impl(pending, value)  # torch.utils.swap_tensors takes thrice the time
    pending.__class__ = Tensor
    pending.__dict__.clear()
    return pending


def _taken() -> RuntimeError:
    return RuntimeError(
        "batch_norm: expected the output of a batch norm that waits for its activation to be used "
        "by functions of torch, got a use past them, such as by torch.autograd.Function: convert "
        "this module without fuse=True"
    )
