"""The activations that may follow batch norm: names, parameters, and formulas of torch's operators.

The kernels have the same formulas in csrc/activation.h and csrc/kernels/fused.cuh; docs/math.md has
the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, relu6

from . import mask as masks
from .calls import Backward, Forward

# As users name it: alone, or with its parameter.
Activation = Literal["relu", "relu6", "leaky_relu"] | tuple[str, float]


class Kind(NamedTuple):
    """An activation whose slope is 1 between 0 and `highest`, and elsewhere its parameter or 0."""

    apply: Callable[[Tensor, float], Tensor]
    highest: float = torch.nan  # none: nothing is above it
    parameter: float | None = None  # the usual one; None for activations that have none
    least: float = 0.0
    most: float = 0.0


KINDS = {
    "relu": Kind(lambda output, _: output.relu()),
    "relu6": Kind(lambda output, _: relu6(output), highest=6.0),
    "leaky_relu": Kind(leaky_relu, parameter=0.01, least=0.0, most=1.0),
}


_RELU, _NAME = map(Forward._fields.index, ("relu", "activation"))


def parse(activation: Activation | None) -> tuple[bool, str, float]:
    """The fields `relu`, `activation` and `parameter` of a record; refuses what is unknown."""
    if activation is None:
        return False, "relu", 0.0
    if type(activation) is str and activation in KINDS:  # the others take half a microsecond
        return True, activation, KINDS[activation].parameter or 0.0
    name, *given = activation if activation and isinstance(activation, tuple) else (activation,)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or len(given) > (kind.parameter is not None):
        raise _unknown(activation)
    (parameter,) = given or (kind.parameter or 0.0,)
    if not isinstance(parameter, (int, float)):
        raise _unknown(activation)
    if not kind.least <= parameter <= kind.most:
        raise ValueError(
            f"batch_norm: expected the parameter of {name!r} to lie between {kind.least} and "
            f"{kind.most}, got {parameter}"
        )
    if kind.parameter is not None and parameter == 0:  # then it is a ReLU, also of an infinity
        name = "relu"
    return True, name, float(parameter)


def with_activation(call: Forward, activation: Activation) -> Forward:
    relu, name, parameter = parse(activation)
    # By _replace it takes a microsecond more.
    return Forward(*call[:_RELU], relu, *call[_RELU + 1 : _NAME], name, parameter)


def _unknown(activation: Any) -> ValueError:
    forms = [f'"{name}"' for name in KINDS]
    forms += [f'("{name}", number)' for name, kind in KINDS.items() if kind.parameter is not None]
    *others, last = ["None", *forms]
    expected = f"{', '.join(others)} or {last}"
    return ValueError(f"batch_norm: expected activation to be {expected}, got {activation!r}")


def applied(call: Forward, output: Tensor) -> Tensor:
    """What the call's activation makes of the output of batch norm and residual."""
    return KINDS[call.activation].apply(output, call.parameter) if call.relu else output


def rounded(call: Forward, output: Tensor, dtype: torch.dtype) -> Tensor:
    """`applied` to what is in a wider dtype, and one rounding for both.

    The gradient is that of what is rounded: a ReLU has none where its output is zero.
    """
    values = output.to(dtype)
    if not call.relu or not call.parameter or values.dtype == output.dtype:
        return applied(call, values)
    below = applied(call, output).to(dtype)
    return torch.where(values <= 0, below, values)


def mask_of(call: Forward, output: Tensor) -> Tensor:
    """Where the slope is 1, also for NaN: of the rounded output."""
    return masks.pack(~(output <= 0) & ~(output >= KINDS[call.activation].highest), call.input)


def before(call: Backward) -> Tensor:
    """The gradient of what the activation was applied to, in grad_output's dtype.

    Where the slope is 0 it is zero, also for NaN.
    """
    if call.mask is None:
        return call.grad_output
    passed = masks.unpack(call.mask, call.input)
    below = call.grad_output * call.parameter if call.parameter else 0
    return torch.where(passed, call.grad_output, below)
