"""Runs of every length about a few windows, beginning everywhere in a window.

A run's whole windows are walked over apart from what is left of it (csrc/kernels/traversal.cuh),
its head and its tail, up to three windows of which some lanes are foreign. Lanes left out would
leave poison in an output, lanes taken twice or of a neighbour would show in sums: other tests have
few lengths, here are all residues.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import harness
import pytest
import torch
from cases import fill_gradient, fill_parameters
from conftest import KERNELS
from parametrisations import every_dtype
from strategies import launched
from tolerances import assert_within
from torch import Tensor

from batchnorm_cuda._ops import operators as ops

CHANNELS = 5
GRADIENTS = ["grad_input", "grad_weight", "grad_bias"]


def check(s: int, dtype: torch.dtype) -> None:
    """A training step on runs of s elements, against float64."""
    torch.manual_seed(s)
    # Runs begin at all places of a window, where S is odd, of too few samples for a walk by rows.
    samples = 1 if dtype == torch.float64 else 3
    x = torch.randn(samples, CHANNELS, s, dtype=torch.float64).to(dtype).to(KERNELS.device)
    dy = fill_gradient(x, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    p = fill_parameters(CHANNELS, statistics, KERNELS.device)
    forward = harness.reference_forward(x, p, True)
    backward = harness.reference_backward(dy, x, p, True)
    results: dict[str, Tensor] = harness.forward(KERNELS, x, p, True)
    saved = results["save_mean"], results["save_invstd"]
    gradients = ops.backward(dy, x, p.weight, p.bias, *saved, True, True, True, True)
    results |= dict(zip(GRADIENTS, gradients, strict=True))
    for name, got in results.items():
        of = forward if name in forward.scales else backward
        assert_within(name, got, getattr(of, name), of.scales[name], dtype)


@pytest.mark.parametrize("strategy", ["two_pass", "team"])
@every_dtype
def test_runs_of_every_length(
    extension: ModuleType, plan_options: Callable, dtype: torch.dtype, strategy: str
) -> None:
    plan_options({"strategy": strategy})
    vec = 16 // dtype.itemsize

    def step() -> None:
        for s in range(2, 4 * vec + 1):
            check(s, dtype)

    kernel = "team_kernel" if strategy == "team" else "collect_statistics_kernel"
    assert any(kernel in name and "AlongRuns" in name for name in launched(extension, step))
