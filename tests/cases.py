"""Shapes and memory layouts, each for a reason, and tensors filled for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPE_IDS = ["half", "bfloat16", "float", "double"]


def contiguous(data: Tensor) -> Tensor:
    return data.contiguous()


def channels_last(data: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return data.contiguous(memory_format=formats[data.dim()])


def odd_offset(data: Tensor) -> Tensor:
    """Contiguous, but one element past the start of its storage."""
    storage = data.new_empty(data.numel() + 1)
    return storage[1:].view(data.shape).copy_(data)


def channels_last_odd_offset(data: Tensor) -> Tensor:
    """Channels last, three elements past the start of its storage."""
    n, c, *spatial = data.shape
    storage = data.new_empty(data.numel() + 3)
    return storage[3:].view(n, *spatial, c).movedim(-1, 1).copy_(data)


def channel_slice(data: Tensor) -> Tensor:
    """Channels cut out of a wider tensor: runs of S are whole, samples are apart."""
    n, c, *spatial = data.shape
    return data.new_empty(n, c + 3, *spatial)[:, 2 : 2 + c].copy_(data)


def channels_last_slice(data: Tensor) -> Tensor:
    """Every second column of a channels-last tensor."""
    *rest, width = data.shape
    return channels_last(data.new_empty(*rest, 2 * width))[..., ::2].copy_(data)


def spatial_slice(data: Tensor) -> Tensor:
    """Every second element along the last dimension."""
    *rest, width = data.shape
    return data.new_empty(*rest, 2 * width)[..., ::2].copy_(data)


def transposed(data: Tensor) -> Tensor:
    """The last two dimensions swapped in memory."""
    return data.transpose(-1, -2).contiguous().transpose(-1, -2)


def permuted(data: Tensor) -> Tensor:
    """Dense, with the dimensions in memory in the reverse order."""
    reverse = tuple(reversed(range(data.dim())))
    return data.permute(reverse).contiguous().permute(reverse)


def expanded(data: Tensor) -> Tensor:
    """One row of memory behind every row: stride 0 along the last dimension."""
    return data[..., :1].contiguous().expand(data.shape)


# Whose strides results keep, and those whose gaps, or shared elements, they do not.
DENSE = [contiguous, channels_last, odd_offset, channels_last_odd_offset, transposed, permuted]
NOT_DENSE = [channel_slice, spatial_slice, channels_last_slice, expanded]
# One of each kind, for tests of something else than memory.
LAYOUTS = [contiguous, channels_last, permuted, spatial_slice, expanded]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    reason: str
    layout: Callable[[Tensor], Tensor] = contiguous

    @property
    def id(self) -> str:
        return "x".join(map(str, self.shape)) + "-" + self.layout.__name__

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def geometry(self) -> tuple[int, int, int]:
        """[N, C, S] in memory, of a dense layout of the two that have names."""
        n, c, *spatial = self.shape
        positions = math.prod(spatial)
        return (n * positions, c, 1) if self.layout is channels_last else (n, c, positions)


CASES = [
    # (N, C): along C, one row per sample
    Case((6, 3), "fewer channels than lanes of a window"),
    Case((2, 2048), "the smallest batch, many channels"),
    Case((300, 1), "one channel: all samples are one run"),
    Case((33, 10), "C no multiple of a window, odd N"),
    Case((21, 257), "a prime C just past 256"),
    Case((19, 96), "C = 96, where other libraries' grids skip channels", odd_offset),
    Case((40, 32), "rows read across memory", transposed),
    # (N, C, L)
    Case((4, 3, 7), "runs shorter than a window of any dtype"),
    Case((3, 10, 1), "three dimensions and one position"),
    Case((1, 1, 301), "one sample, one channel, an odd run"),
    Case((2, 32, 49), "runs of 49 are no multiple of a window"),
    Case((5, 10, 24), "position before channel in memory", transposed),
    # (N, C, H, W), along S
    Case((2, 3, 56, 56), "3136 positions, three channels: channels must be split"),
    Case((2, 96, 5, 5), "odd runs, many channels"),
    Case((4, 10, 8, 8), "whole windows only"),
    Case((2, 257, 3, 3), "runs of 9, a prime number of channels"),
    Case((16, 3, 7, 7), "samples that are whole windows only together"),
    Case((19, 11, 7, 7), "samples of whole windows in no number that a block is wide"),
    Case((3, 1, 9, 11), "one channel, odd everywhere"),
    Case((5, 1, 7), "one channel, odd everywhere, unaligned start", odd_offset),
    Case((2, 2048, 1, 1), "one position: along C though there are four dimensions"),
    Case((1, 2, 131, 77), "one sample, a long odd run"),
    Case((1, 1, 256, 256), "the largest count, one channel"),
    Case((2, 3, 7, 7), "unaligned start", odd_offset),
    Case((3, 10, 8, 8), "whole windows, none on its boundary", odd_offset),
    Case((2, 3, 6, 7), "samples apart in memory", channel_slice),
    Case((2, 3, 6, 5), "elements apart in memory", spatial_slice),
    Case((3, 10, 4, 5), "dimensions in the reverse order", permuted),
    Case((2, 3, 4, 5), "elements that share memory", expanded),
    # (N, C, H, W), channels last
    Case((2, 3, 9, 7), "three channels, a window spans rows", channels_last),
    Case((4, 10, 6, 6), "C no multiple of a window", channels_last),
    Case((2, 32, 7, 7), "a row is whole windows", channels_last),
    Case((2, 96, 5, 5), "C = 96 again", channels_last),
    Case((1, 257, 3, 5), "more channels than a block is wide", channels_last),
    Case((1, 1, 50, 61), "channels last and one channel is contiguous as well", channels_last),
    Case((2, 32, 5, 5), "whole windows, none on its boundary", channels_last_odd_offset),
    Case((2, 3, 5, 5), "channels-last strides with gaps", channels_last_slice),
    Case((1, 32, 40, 40), "many rows: channels must be split", channels_last),
    # (N, C, D, H, W)
    Case((2, 3, 3, 4, 5), "five dimensions"),
    Case((2, 10, 3, 4, 5), "five dimensions, channels last", channels_last),
]

# One case of each access pattern and alignment, for tests of something else than geometry.
FEW_CASES = [
    case
    for case in CASES
    if (case.shape, case.layout)
    in {
        ((33, 10), contiguous),
        ((2, 32, 49), contiguous),
        ((4, 10, 8, 8), contiguous),
        ((2, 3, 7, 7), odd_offset),
        ((2, 3, 9, 7), channels_last),
        ((2, 32, 7, 7), channels_last),
    }
]

# No values at all, or no channels.
EMPTY_SHAPES = [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4), (2, 3, 4, 0), (0, 3, 2, 2, 2)]
CHANNELLESS_SHAPES = [(2, 0), (2, 0, 4), (2, 0, 3, 3), (0, 0)]


def fill(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """Values of the case, with mean and deviation of their own in each channel."""
    c = case.channels
    per_channel = (1, c) + (1,) * (len(case.shape) - 2)
    channel = torch.arange(c).view(per_channel)
    data = torch.randn(case.shape) * (0.5 + channel % 4) + 0.7 * (channel % 3) - 0.4
    return case.layout(data.to(device=device, dtype=dtype))


def fill_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient whose mean and correlation with x are large, so that no term of it can hide."""
    values = x.detach().double()
    reduced = [0, *range(2, x.dim())]
    centred = values - values.mean(reduced, keepdim=True)
    xhat = centred / (centred.square().mean(reduced, keepdim=True) + 1e-5).sqrt()
    noise = torch.randn(x.shape, dtype=torch.float64).to(x.device)
    gradient = torch.empty_like(x, dtype=dtype)
    return gradient.copy_(noise + 0.25 + 0.3 * xhat)


@dataclass
class Parameters:
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def clone(self) -> Parameters:
        copies = [None if p is None else p.detach().clone() for p in vars(self).values()]
        return Parameters(*copies)


def fill_parameters(
    c: int,
    dtype: torch.dtype,
    device: str,
    *,
    weight: bool = True,
    bias: bool = True,
    running: bool = True,
) -> Parameters:
    def place(values: Tensor, wanted: bool) -> Tensor | None:
        return values.to(device=device, dtype=dtype) if wanted else None

    # Of both signs, and zero: |weight| must not pass for weight.
    signs = torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0])[torch.arange(c) % 5]
    return Parameters(
        place((torch.rand(c) + 0.5) * signs, weight),
        place(torch.randn(c), bias),
        place(torch.randn(c) * 0.5, running),
        place(torch.rand(c) + 0.5, running),
    )
