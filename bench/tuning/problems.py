"""The problems on which plans are timed, those worth most first: a time limit cuts the tail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest

from ..cases.case import BenchCase
from ..cases.shapes import SETS, Shape

OPS = ("forward", "backward")

# Activations that stay in the L2 cache of a large GPU, where launches and waits are most of a call.
_SMALL = [
    Shape("small", (8, 256, 14, 14)),
    Shape("small", (4, 64, 28, 28)),
    Shape("small", (16, 512, 7, 7)),
    Shape("small", (256, 1024)),
    Shape("small", (1024, 256)),
    Shape("small", (2, 2048, 7, 7)),
]

# A few elements each, for the model of CUDA: every part of the command once, in seconds.
_TINY = [
    (Shape("tiny", (4, 8, 8, 8)), "nchw", "fp16"),
    (Shape("tiny", (4, 16, 6, 6)), "nhwc", "bf16"),
    (Shape("tiny", (64, 32)), "nchw", "fp32"),
    (Shape("tiny", (4, 3, 7, 7)), "nchw", "fp16"),
]


def _resnet50(batch: int) -> list[Shape]:
    """By the share of a step that the shape's batch norms have."""
    shapes = [Shape(f"resnet50/{batch}", (batch, *s.sizes[1:]), s.count) for s in SETS["resnet50"]]
    return sorted(shapes, key=lambda shape: -shape.numel * shape.count)


def _with_ops(shapes: Iterable[Shape], layout: str, dtype: str) -> list[BenchCase]:
    return [BenchCase(s, s.layout or layout, dtype, op) for s in shapes for op in OPS]


def _in_turns(*tiers: list[BenchCase]) -> Iterator[BenchCase]:
    """One of each tier in turn, so that what a limit leaves is of every kind."""
    return (case for case in chain(*zip_longest(*tiers)) if case is not None)


def problems() -> list[BenchCase]:
    large, middle = _resnet50(128), _resnet50(32)
    others = [shape for shape in SETS["short"] if not shape.name.startswith("resnet50")]
    first = _in_turns(
        _with_ops(large[:6], "nhwc", "bf16"),
        _with_ops(others, "nchw", "fp16"),
        _with_ops(large[:4], "nchw", "fp16"),
        _with_ops(_SMALL[:4], "nhwc", "fp16"),
        _with_ops(middle[2:5], "nhwc", "fp16"),
        _with_ops(middle[1:3], "nchw", "fp32"),
    )
    then = _in_turns(
        _with_ops(large[6:], "nhwc", "bf16"),
        _with_ops(large[4:], "nchw", "fp16"),
        _with_ops(middle, "nchw", "fp16"),
        _with_ops(middle, "nhwc", "bf16"),
        _with_ops(large[:6], "nhwc", "fp32"),
        _with_ops(_SMALL, "nchw", "fp32"),
    )
    return list(dict.fromkeys([*first, *then]))


def tiny_problems() -> list[BenchCase]:
    return [BenchCase(*fixed, op) for fixed in _TINY for op in OPS]
