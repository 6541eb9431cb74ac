"""One fused problem by the extension's functions, called directly, against its reference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import harness
import pytest
import reference
import torch
from cases import (
    Case,
    channels_last,
    channels_last_odd_offset,
    fill,
    fill_gradient,
    fill_parameters,
    odd_offset,
    permuted,
    spatial_slice,
)
from conftest import KERNELS
from harness import EPS, MOMENTUM
from tolerances import assert_within
from torch import Tensor

CASES = [
    Case((4, 10, 8, 8), "whole windows along S"),
    Case((2, 32, 49), "odd runs: two threads share a byte of the mask"),
    Case((1, 8, 11, 11), "one sample"),
    Case((1, 2, 131, 77), "a long odd run: several blocks a channel"),
    Case((2, 3, 56, 56), "channels shared by several blocks, whole windows"),
    Case((16, 3, 7, 7), "samples that are whole windows only together"),
    Case((19, 11, 7, 7), "samples of whole windows in no number that a block is wide"),
    Case((300, 1), "one channel: all samples are one run"),
    Case((40, 32), "along C, whole windows"),
    Case((33, 10), "along C, no multiple of a window, odd N"),
    Case((6, 3), "fewer channels than lanes of a window"),
    Case((2, 32, 7, 7), "channels last, whole windows", channels_last),
    Case((4, 10, 6, 6), "channels last, no multiple of a window", channels_last),
    Case((1, 257, 3, 5), "more channels than a block is wide", channels_last),
    Case((2, 3, 7, 7), "unaligned start", odd_offset),
    Case((3, 10, 8, 8), "whole windows, none on its boundary", odd_offset),
    Case((2, 32, 5, 5), "the same along C", channels_last_odd_offset),
    Case((3, 10, 4, 5), "dimensions in the reverse order", permuted),
    Case((2, 3, 6, 5), "elements apart in memory", spatial_slice),
]
FEW_CASES = [
    case
    for case in CASES
    if case.shape in {(4, 10, 8, 8), (2, 32, 49), (33, 10), (2, 32, 7, 7), (3, 10, 4, 5)}
]
NEEDS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.id)


def lanes_of(x: Tensor) -> int:
    return 16 // x.element_size()


def mask_bytes(x: Tensor) -> int:
    """A byte for each 16 bytes."""
    return -(-x.numel() // lanes_of(x))


def in_memory(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their addresses."""
    return dense.as_strided((dense.numel(),), (1,))


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of a mask, one for each element of `like` in memory order."""
    places = torch.arange(lanes_of(like), device=mask.device)
    bits = (mask.int().unsqueeze(1) >> places) & 1
    return bits.flatten()[: like.numel()].bool()


class Fused:
    """One problem: its tensors, and calls of the extension's functions on them."""

    def __init__(
        self,
        extension: ModuleType,
        case: Case,
        dtype: torch.dtype,
        *,
        training: bool = True,
        residual: bool = True,
        relu: bool = True,
        affine: bool = True,
        residual_layout: Callable[[Tensor], Tensor] | None = None,
        gradient_layout: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.extension, self.training, self.relu = extension, training, relu
        self.x = fill(case, dtype, KERNELS.device)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.p = fill_parameters(case.channels, exact, KERNELS.device, weight=affine, bias=affine)
        self.before = self.p.clone()
        other = Case(case.shape, case.reason, residual_layout or case.layout)
        self.residual = fill(other, dtype, KERNELS.device) if residual else None
        dy = fill_gradient(self.x, dtype)
        self.dy = gradient_layout(dy) if gradient_layout else dy

    def forward(self, *, need_mask: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        p = self.p
        return self.extension.fused_forward(
            *(self.x, p.weight, p.bias, p.running_mean, p.running_var, None),
            *(self.residual, self.relu, need_mask, self.training, MOMENTUM, EPS),
        )

    def backward(
        self, saved: tuple[Tensor, Tensor], mask: Tensor, needed: tuple[bool, ...] | None = None
    ) -> dict[str, Tensor]:
        affine = self.p.weight is not None
        needed = needed or (True, affine, affine, True)
        gradients = self.extension.fused_backward(
            *(self.dy, self.x, self.p.weight, self.p.bias, *saved, mask, self.training), *needed
        )
        return dict(zip(NEEDS, gradients, strict=True))

    def expected(self) -> reference.Forward:
        """As of batch norm, with what is fused to its output."""
        result = harness.reference_forward(self.x, self.before, self.training)
        if self.residual is not None:
            added = self.residual.detach().cpu().double()
            result.output = result.output + added
            result.scales["output"] = result.scales["output"] + added.abs()
        if self.relu:
            result.output = result.output.relu()
        return result

    def filtered(self, output: Tensor) -> Tensor:
        """The gradient that the ReLU lets through, in the memory order of the output."""
        return torch.empty_like(output).copy_(torch.where(output <= 0, 0.0, self.dy))

    def check(self) -> None:
        """A forward and a backward pass against the reference."""
        output, mean, invstd, mask = self.forward()
        results = {"output": output, "save_mean": mean, "save_invstd": invstd}
        if self.training:
            results |= {"running_mean": self.p.running_mean, "running_var": self.p.running_var}
        want = self.expected()
        for name, got in results.items():
            assert_within(name, got, getattr(want, name), want.scales[name], self.x.dtype)
        assert output.stride() == torch.empty_like(self.x).stride()
        if not self.relu:
            assert mask is None
            return
        assert mask.dtype == torch.uint8 and mask.shape == (mask_bytes(self.x),)
        assert torch.equal(unpacked(mask, output), in_memory(~(output <= 0)))
        g = self.filtered(output)
        gradients = self.backward((mean, invstd), mask)
        assert torch.equal(gradients.pop("grad_residual"), g)
        assert gradients["grad_input"].stride() == output.stride()
        wanted = {name: got for name, got in gradients.items() if got is not None}
        assert len(wanted) == (1 if self.p.weight is None else 3)
        harness.assert_matches(
            wanted, harness.reference_backward(g, self.x, self.before, self.training), self.x
        )
