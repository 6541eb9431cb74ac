"""Batches that are spread over ranks, each for a reason. Data are a function of the case alone, so
that every process makes the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import channels_last, channels_last_slice, contiguous
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.3
BACKENDS = ("emulated", "aten")


@dataclass(frozen=True)
class SyncCase:
    """Parts of a batch, one a rank; `orders` say which rank holds which part."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    layout: Callable[[Tensor], Tensor] = contiguous
    affine: bool = True
    offset: float = 0.0
    spread: tuple[float, ...] = ()  # factor of each part

    @property
    def ranks(self) -> int:
        return len(self.shapes)

    def orders(self) -> list[tuple[int, ...]]:
        """Every order of the parts, or of four parts the given one and some others."""
        every = list(itertools.permutations(range(self.ranks)))
        return every if self.ranks < 4 else [every[0], *random.Random(0).sample(every[1:], 4)]

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """(input, grad_output) of every part."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        parts = []
        for shape, factor in zip(self.shapes, self.spread or [1.0] * self.ranks, strict=True):
            x = torch.randn(shape, generator=generator) * factor + self.offset
            dy = torch.randn(shape, generator=generator) * factor
            parts.append(tuple(self.layout(t.to(self.dtype)) for t in (x, dy)))
        return parts

    def parameters(self) -> list[Tensor]:
        """weight, bias, running_mean, running_var, float32 or wider."""
        generator = torch.Generator().manual_seed(1)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        channels = self.shapes[0][1]
        values = torch.rand(4, channels, generator=generator).to(dtype) + 0.5
        values[:2] *= torch.tensor([1.0, -1.0, 0.0])[torch.arange(channels) % 3]  # weight, bias
        return list(values)


CASES = [
    SyncCase("uneven", ((3, 5, 4, 3), (2, 5, 4, 3))),
    SyncCase(
        "channels last, bfloat16", ((3, 16, 4, 3), (2, 16, 2, 3)), torch.bfloat16, channels_last
    ),
    SyncCase("no length, half, no affine", ((7, 10), (2, 10)), torch.float16, affine=False),
    SyncCase("double", ((3, 6, 5), (4, 6, 2)), torch.float64),
    SyncCase("mean of 1000 standard deviations", ((9, 5, 4), (6, 5, 4)), offset=1000.0),
    SyncCase("empty rank", ((4, 5, 3), (0, 5, 3))),
    SyncCase("two values in all", ((1, 5), (1, 5))),
    SyncCase("strides with gaps", ((3, 8, 4, 2), (2, 8, 4, 2)), layout=channels_last_slice),
    SyncCase("uneven, one value, empty", ((3, 5, 4, 3), (1, 5, 1, 1), (0, 5, 4, 3))),
    SyncCase(
        "spread, channels last", ((3, 9, 4, 3),) * 3, layout=channels_last, spread=(1e-3, 1, 1e5)
    ),
    SyncCase("three doubles", ((5, 4), (3, 4), (6, 4)), torch.float64, spread=(1, 3, 10)),
    SyncCase("four", ((2, 8, 5, 5), (5, 8, 3, 3), (1, 8, 1, 1), (0, 8, 2, 2))),
    SyncCase("four halves", ((2, 8, 5), (3, 8, 3), (1, 8, 9), (4, 8, 2)), torch.float16),
]
