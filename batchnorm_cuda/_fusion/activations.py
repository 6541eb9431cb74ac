"""The ways in which people write activations, for all of the package that has to know them.

A row a kind, also of kinds that batch norm cannot apply yet: which it can, `_ops/activations.py`
says. The reader of a row has the parameters of the functional form, under the names that are also
those of the module's attributes; it gives batch_norm's `activation`, and whether the argument is
overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._ops.activations import Activation, parse

Reader = Callable[..., tuple[Activation | None, bool]]


class Read(NamedTuple):
    """An activation that a call applies, and whether the result is in its argument's place."""

    activation: Activation
    in_place: bool


@dataclass(frozen=True)
class Row:
    """One kind of activation.

    Attributes:
        name: batch_norm's.
        module: of torch.nn, exactly this class.
        reader: see above; what it is called with, it may also refuse with a TypeError.
        functions: functions and methods that leave their argument alone, but for `inplace`.
        in_place: functions and methods that overwrite it.
        parameter: the argument, and attribute, that is the parameter.
    """

    name: str
    module: type[nn.Module]
    reader: Reader
    functions: tuple[Callable, ...]
    in_place: tuple[Callable, ...] = ()
    parameter: str | None = None

    def of_module(self, module: nn.Module) -> Read | None:
        code = self.reader.__code__
        names = code.co_varnames[1 : code.co_argcount]
        activation, in_place = self.reader(None, **{name: getattr(module, name) for name in names})
        return None if activation is None else Read(activation, in_place)

    def made(self, parameter: float) -> nn.Module:
        """A module that overwrites its argument with this activation of it."""
        named = {} if self.parameter is None else {self.parameter: parameter}
        return self.module(**named, inplace=True)


def _plain(name: str) -> Reader:
    return lambda input, inplace=False: (name, inplace)


def _leaky(
    input: Any, negative_slope: float = 0.01, inplace: bool = False
) -> tuple[Activation | None, bool]:
    return ("leaky_relu", negative_slope), inplace


def _clipped(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Activation | None, bool]:
    """As the module of ReLU6 calls it, too."""
    return ("relu6" if (min_val, max_val) == (0, 6) else None), inplace


# Not torch.relu_ and its like: Dynamo does not ask a tensor subclass about them.
TABLE = (
    Row("relu", nn.ReLU, _plain("relu"), (F.relu, torch.relu, Tensor.relu), (Tensor.relu_,)),
    Row("leaky_relu", nn.LeakyReLU, _leaky, (F.leaky_relu,), parameter="negative_slope"),
    Row("relu6", nn.ReLU6, _plain("relu6"), (F.relu6,)),
    Row("relu6", nn.Hardtanh, _clipped, (F.hardtanh,)),
)

BY_MODULE = {row.module: row for row in TABLE}
BY_NAME = {row.name: row for row in reversed(TABLE)}
# The reader of each function, and whether it overwrites its argument in any case.
BY_FUNCTION: dict[Callable, tuple[Reader, bool]] = {
    function: (row.reader, function in row.in_place)
    for row in TABLE
    for function in (*row.functions, *row.in_place)
}


def read(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Read | None:
    """None for any other call."""
    entry = BY_FUNCTION.get(function)
    if entry is None or not args:
        return None
    reader, in_place = entry
    activation, asked = reader(*args, **kwargs)
    return None if activation is None else Read(activation, in_place or asked)


def fields(activation: Activation) -> tuple[bool, str, float] | None:
    """Those of a record, as `parse` gives them; None where batch norm cannot apply it."""
    try:
        return parse(activation)
    except ValueError:
        return None


def has_module(activation: Activation) -> bool:
    """Whether batch norm can apply it, and a module of torch.nn, too."""
    known = fields(activation)
    return known is not None and known[1] in BY_NAME


def in_words(activation: Activation) -> str:
    return activation if isinstance(activation, str) else "{}({})".format(*activation)
