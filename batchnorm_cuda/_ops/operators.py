"""The passes of batch norm as operators: `torch.ops.batchnorm_cuda`, and the extension's functions.

Their names and arguments are kept: programs that torch.export has saved call them. Fused passes add
a residual and a ReLU, y = relu(bn(x) + residual). The passes of synchronised batch norm end where
the ranks gather.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import composite
from .calls import Backward, DoubleBackward, Forward, Statistics, SumRanks
from .choice import computes, dispatcher
from .layout import ACCUMULATE, as_dense, stands_for_others
from .mask import mask_bytes

_library = torch.library.Library("batchnorm_cuda", "DEF")

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    float | None: "float?",
    str: "str",
}
_UPDATED = {"running_mean": "a", "running_var": "b", "num_batches_tracked": "c"}  # in place
# Arguments that came later, at the end: programs that were saved before lack them.
_ADDED = {"activation": '="relu"', "parameter": "=0."}
_GIVEN = ("gathered", "mask", "sums", "count")  # to every operator that has them
# Arguments that have another name in the record.
_FIELDS = {"mean": "save_mean", "invstd": "save_invstd"}
# Beside the input, what a subclass or a batch of autograd's may stand behind.
_LIKE_INPUT = (
    "residual",
    "grad_output",
    "grad_grad_input",
    "grad_grad_weight",
    "grad_grad_bias",
)


class Operator:
    """A pass under the name that torch and the extension know it by.

    Called with the operator's own arguments it takes the way of `choice.computes`; `run` takes the
    record. A schema has no optional results: an operator returns those gradients that are needed,
    in a list, and a mask without bytes where none is wanted. Here None stands for either.
    """

    def __init__(
        self, name: str, record: type, arguments: str, results: str, **fixed: bool | None
    ) -> None:
        self.name = name
        self.record = record
        self.arguments = tuple(arguments.split())
        self.results = tuple(results.split())
        self.fixed = fixed  # fields of the record that are no arguments
        renamed = [_FIELDS.get(each, each) for each in self.arguments]
        self.fields = tuple(
            own if own in record._fields else other
            for own, other in zip(self.arguments, renamed, strict=True)
        )
        plain = self.fields == record._fields[: len(self.fields)]
        self._values = itemgetter(slice(len(self.fields))) if plain else attrgetter(*self.fields)
        self._first = "input" if "input" in self.fields else "gathered"
        others = [each for each in self.fields if each in _LIKE_INPUT]
        # A slice, because one attribute alone would come without a tuple.
        one = itemgetter(slice(record._fields.index(self._first), 1))
        self.seen = attrgetter(self._first, *others) if others else one
        self.run = self._runner(self.seen, self._values)
        self._in_list = any(self._need(result) in self.arguments for result in self.results)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self.run(self.bind(*values, **named))

    def bind(self, *values: Any, **named: Any) -> NamedTuple:
        """The record of the operator's own arguments."""
        given = dict(zip(self.fields, values, strict=False))
        for name, value in named.items():
            given[self.fields[self.arguments.index(name)]] = value
        return self.record(**self.fixed, **given)

    def _runner(self, seen: Callable, values: Callable) -> Callable[[Any], Any]:
        """`run`: the results, in the order of `results`; a tuple, or a tensor where there is one.

        A closure, whose look-ups cost less than those of a method: this is on every step's path.
        """
        name, dispatch = self.name, self._dispatch

        def run(call: Any) -> Any:
            who = computes(call, seen)
            if who is dispatcher:
                return dispatch(call)
            if who is composite:
                return self._compose(call)
            try:
                return getattr(who, name)(*values(call))
            except RuntimeError:
                if not any(map(stands_for_others, call)):
                    raise
                return dispatch(call)

        return run

    def _dispatch(self, call: Any) -> Any:
        values = [getattr(call, field) for field in self.fields]
        results = getattr(dispatcher, self.name)(*values)
        if self._in_list:
            left = iter(results)
            return tuple(
                next(left) if self._is_needed(name, call) else None for name in self.results
            )
        if "mask" in self.results and not call.need_mask:
            return *results[:-1], None
        return results

    def _compose(self, call: Any) -> Any:
        results = _COMPOSITES[self.record, self.results[0]](call)
        if len(self.results) == 1 and not self._in_list:
            return results if isinstance(results, Tensor) else getattr(results, self.results[0])
        return tuple(getattr(results, name) for name in self.results)

    @staticmethod
    def _need(result: str) -> str:
        """The argument that says whether a gradient is needed."""
        return "need_" + result.removeprefix("grad_") if result.startswith("grad_") else ""

    def _is_needed(self, result: str, call: Any) -> bool:
        return getattr(call, self._need(result), True)

    # ---- for torch.library

    @property
    def schema(self) -> str:
        types = get_type_hints(self.record)
        arguments = []
        for name, field in zip(self.arguments, self.fields, strict=True):
            letter = _UPDATED.get(name)
            kind = f"Tensor({letter}!)?" if letter else _SCHEMA_TYPES[types[field]]
            arguments.append(f"{'Tensor' if name in _GIVEN else kind} {name}{_ADDED.get(name, '')}")
        tensors = ", ".join(["Tensor"] * len(self.results))
        returned = "Tensor[]" if self._in_list else f"({tensors})" if "," in tensors else tensors
        return f"{self.name}({', '.join(arguments)}) -> {returned}"

    def implementation(self, *values: Any) -> Any:
        """The operator on real tensors."""
        call = self.bind(*values)
        who = computes(call, self.seen, dispatched=True)
        results = self._compose(call) if who is composite else getattr(who, self.name)(*values)
        return self.as_operator(results, call)

    def as_operator(self, results: Any, call: Any) -> Any:
        """As the schema has them."""
        if self._in_list:
            return [result for result in results if result is not None]
        if "mask" in self.results and results[-1] is None:
            return *results[:-1], _LIKE["mask"](call)
        return results

    def fake(self, *values: Any) -> Any:
        """Results of which only shape, dtype and strides count."""
        call = self.bind(*values)
        needed = [name for name in self.results if self._is_needed(name, call)]
        results = [_LIKE[name](call) for name in needed]
        return results if self._in_list else results[0] if len(results) == 1 else tuple(results)


def _channels(call: Any, dtype: torch.dtype) -> Tensor:
    return call.input.new_empty(call.input.shape[1], dtype=dtype)


def _like_input(call: Any) -> Tensor:
    return torch.empty_like(as_dense(call.input))


def _statistic(call: Any) -> Tensor:
    return _channels(call, ACCUMULATE[call.input.dtype])


def _mask(call: Forward) -> Tensor:
    size = mask_bytes(call.input.numel(), call.input.dtype) if call.need_mask else 0
    return call.input.new_empty(size, dtype=torch.uint8)


def _row(call: Statistics) -> Tensor:
    dtype = ACCUMULATE[call.input.dtype]
    values = 2 * call.input.shape[1] + torch.int64.itemsize // dtype.itemsize
    return call.input.new_empty(values, dtype=dtype)


def _sums(call: Backward) -> Tensor:
    return call.save_mean.new_empty(2, call.input.shape[1])


# Each result, of which only shape, dtype and strides count.
_LIKE: dict[str, Callable[[Any], Tensor]] = {
    "output": _like_input,
    "mean": _statistic,
    "invstd": _statistic,
    "count": lambda call: call.input.new_empty(1, dtype=torch.int64),
    "mask": _mask,
    "row": _row,
    "sum": lambda call: call.gathered.new_empty(call.gathered.shape[1:]),
    "sums": _sums,
    "grad_grad_output": _like_input,
    "grad_input": _like_input,
    "grad_residual": _like_input,
    "grad_weight": lambda call: _channels(call, call.weight.dtype),
    "grad_bias": lambda call: _channels(call, call.bias.dtype),
}

_PARAMETERS = "input weight bias running_mean running_var num_batches_tracked"
_SAVED = "grad_output input weight bias save_mean save_invstd"
_NEEDS = "need_input need_weight need_bias"
_ACTIVATION = "activation parameter"
_OF_RANKS = "grad_output input weight bias mean invstd"
_FORM = "grad_output input weight mean invstd sums count"

forward = Operator("forward", Forward, f"{_PARAMETERS} training momentum eps", "output mean invstd")
backward = Operator(
    "backward", Backward, f"{_SAVED} training {_NEEDS}", "grad_input grad_weight grad_bias"
)
double_backward = Operator(
    "double_backward",
    DoubleBackward,
    "grad_grad_input grad_grad_weight grad_grad_bias grad_output input weight save_mean "
    "save_invstd training need_grad_output need_input need_weight",
    "grad_grad_output grad_input grad_weight",
)
fused_forward = Operator(
    "fused_forward",
    Forward,
    f"{_PARAMETERS} residual relu need_mask training momentum eps {_ACTIVATION}",
    "output mean invstd mask",
)
fused_backward = Operator(
    "fused_backward",
    Backward,
    f"{_SAVED} mask training {_NEEDS} need_residual {_ACTIVATION}",
    "grad_input grad_weight grad_bias grad_residual",
)
sync_statistics = Operator("sync_statistics", Statistics, "input", "row")
sync_forward = Operator(
    "sync_forward",
    Forward,
    f"{_PARAMETERS} gathered momentum eps",
    "output mean invstd count",
    training=True,
)
sync_fused_forward = Operator(
    "sync_fused_forward",
    Forward,
    f"{_PARAMETERS} gathered residual relu need_mask momentum eps {_ACTIVATION}",
    "output mean invstd count mask",
    training=True,
)
sync_backward_reduce = Operator(
    "sync_backward_reduce",
    Backward,
    f"{_OF_RANKS} need_weight need_bias",
    "sums grad_weight grad_bias",
    training=True,
    need_input=True,
)
sync_fused_backward_reduce = Operator(
    "sync_fused_backward_reduce",
    Backward,
    f"{_OF_RANKS} mask need_weight need_bias {_ACTIVATION}",
    "sums grad_weight grad_bias",
    training=True,
    need_input=True,
)
sync_sum = Operator("sync_sum", SumRanks, "gathered", "sum")
sync_backward_elementwise = Operator(
    "sync_backward_elementwise",
    Backward,
    _FORM,
    "grad_input",
    bias=None,
    training=True,
    need_input=True,
    need_weight=False,
    need_bias=False,
)
sync_fused_backward_elementwise = Operator(
    "sync_fused_backward_elementwise",
    Backward,
    f"{_FORM} mask need_input need_residual {_ACTIVATION}",
    "grad_input grad_residual",
    bias=None,
    training=True,
    need_weight=False,
    need_bias=False,
)

OPERATORS = {each.name: each for each in list(globals().values()) if isinstance(each, Operator)}

# What computes a pass without kernels, by what it takes and what it gives first.
_COMPOSITES: dict[tuple[type, str], Callable] = {
    (Forward, "output"): composite.forward,
    (Backward, "sums"): composite.backward_reduce,
    (Backward, "grad_input"): composite.backward,
    (DoubleBackward, "grad_grad_output"): composite.double_backward,
    (Statistics, "row"): composite.statistics,
    (SumRanks, "sum"): composite.sum_ranks,
}

for _each in OPERATORS.values():
    _library.define(_each.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CUDA", "CPU"):
        _library.impl(_each.name, _each.implementation, _key)
    torch.library.register_fake(f"batchnorm_cuda::{_each.name}", _each.fake, lib=_library)
