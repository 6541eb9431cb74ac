"""Correctness before speed: results against a float64 reference, by the tests' own tolerances.

The bound of every element and the reference it belongs to have one home, tests/tolerances.py and
tests/reference.py; this module takes them from there. The error it reports is the largest of
|got - expected| / bound over all results of a call: at most 1 is what the test suite would pass.

Channels are independent of each other. Of a tensor that a CPU would work on for minutes, channels
are drawn evenly, the first and the last among them, and the row says how many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loading import load
from .providers import EPS, MOMENTUM, Tensors

MOST_ELEMENTS = 2**22  # of float64 on the CPU: a fraction of a second


cases = load("tests", "cases")
reference = load("tests", "reference")
tolerances = load("tests", "tolerances")


@dataclass
class Expected:
    """Values and bounds by the name of a result, of the channels that are checked."""

    channels: Tensor  # their indices
    of: int
    values: dict[str, Tensor]
    scales: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def note(self) -> str:
        drawn = len(self.channels)
        return "" if drawn == self.of else f"checked on {drawn} of {self.of} channels"


def draw_channels(c: int, per_channel: int, most: int = MOST_ELEMENTS) -> Tensor:
    """As many channels as `most` elements allow, evenly; two at least, if there are two."""
    wanted = min(c, max(2, most // max(per_channel, 1)))
    return torch.linspace(0, c - 1, wanted, dtype=torch.float64).round().long().unique()


def expect(t: Tensors, most: int = MOST_ELEMENTS) -> Expected:
    """Of a training step on `t`; its running statistics are as before the step."""
    c = t.x.shape[1]
    channels = draw_channels(c, t.x.numel() // c, most)

    def some(tensor: Tensor, dim: int = 0) -> Tensor:
        return _select(tensor, channels, dim).cpu()

    x, dy = some(t.x, 1), some(t.dy, 1)
    p = cases.Parameters(*map(some, (t.weight, t.bias, t.running_mean, t.running_var)))
    forward = reference.forward(x, p, True, MOMENTUM, EPS)
    backward = reference.backward(dy, x, p, True, EPS)
    values = {name: getattr(forward, name) for name in ("output", "running_mean", "running_var")}
    values |= {name: getattr(backward, name) for name in ("grad_input", "grad_weight", "grad_bias")}
    return Expected(channels, c, values, forward.scales | backward.scales, t.x.dtype)


def error(results: Mapping[str, Tensor], expected: Expected) -> float:
    """The largest error in units of its tolerance; infinite for a NaN or a wrong shape."""
    worst = 0.0
    for name, got in results.items():
        dim = 1 if got.dim() > 1 else 0
        part = _select(got.detach(), expected.channels, dim).cpu()
        want, scale = expected.values[name], expected.scales[name]
        if got.shape[dim] != expected.of or part.shape != want.shape:
            return math.inf
        limit = tolerances.bound(name, want, scale, got.dtype, expected.dtype)
        off = (part.double() - want).abs() / limit.clamp_min(torch.finfo(torch.float64).tiny)
        largest = off.max().item() if off.numel() else 0.0
        worst = max(worst, math.inf if math.isnan(largest) else largest)
    return worst


def _select(tensor: Tensor, channels: Tensor, dim: int) -> Tensor:
    tensor = tensor.detach()
    if len(channels) == tensor.shape[dim]:
        return tensor
    return tensor.index_select(dim, channels.clamp_max(tensor.shape[dim] - 1).to(tensor.device))
