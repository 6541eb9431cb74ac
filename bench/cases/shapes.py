"""The shapes that the benchmark runs, in named sets, each for a reason.

A shape is (N, C, ...) with the number of such batch norms in its network, so that a set can be
added up to a training step. Layout and dtype are chosen for a run; some sets fix the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

_FEWEST_SMS = 4


@dataclass(frozen=True)
class Shape:
    name: str
    sizes: tuple[int, ...]  # (N, C, ...)
    count: int = 1  # batch norms of this shape in the network
    layout: str | None = None  # nchw or nhwc; None leaves it to the run

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def text(self) -> str:
        return "x".join(map(str, self.sizes))


def _resnet50(batch: int) -> list[Shape]:
    """All 53 batch norms of ResNet-50 at 224 x 224."""
    layers = [
        (64, 112, 1),
        (64, 56, 6),
        (256, 56, 4),
        (128, 56, 1),
        (128, 28, 7),
        (512, 28, 5),
        (256, 28, 1),
        (256, 14, 11),
        (1024, 14, 7),
        (512, 14, 1),
        (512, 7, 5),
        (2048, 7, 4),
    ]
    return [Shape(f"resnet50/{batch}", (batch, c, s, s), n) for c, s, n in layers]


def _named(name: str, *sizes: tuple[int, ...], layout: str | None = None) -> list[Shape]:
    return [Shape(name, each, layout=layout) for each in sizes]


SETS: dict[str, list[Shape]] = {
    # Large and small channels in every layout class, in about a minute of a GPU.
    "short": [
        Shape("resnet50/32", (32, 64, 112, 112)),
        Shape("resnet50/32", (32, 256, 56, 56)),
        Shape("resnet50/32", (32, 512, 28, 28)),
        Shape("resnet50/32", (32, 1024, 14, 14)),
        Shape("resnet50/32", (32, 2048, 7, 7)),
        Shape("mobilenet", (64, 96, 56, 56)),
        Shape("unet2d", (4, 64, 256, 256)),
        Shape("unet3d", (1, 32, 64, 64, 64)),
        Shape("pointnet", (32, 128, 1024)),
        Shape("mlp", (8192, 1024)),
        Shape("convnext", (32, 384, 14, 14), layout="nhwc"),
        Shape("rgb", (32, 3, 224, 224)),
        Shape("odd", (33, 65, 27, 27)),
    ],
    "resnet50-32": _resnet50(32),
    "resnet50": _resnet50(256),
    "efficientnet": _named(
        "efficientnet",
        *((64, 32, 112, 112), (64, 96, 112, 112), (64, 144, 56, 56), (64, 240, 28, 28)),
        *((64, 480, 14, 14), (64, 672, 14, 14), (64, 1152, 7, 7), (64, 1280, 7, 7)),
    ),
    "mobilenet": _named(
        "mobilenet",
        *((64, 16, 112, 112), (64, 96, 56, 56), (64, 144, 28, 28), (64, 192, 14, 14)),
        *((64, 384, 14, 14), (64, 576, 14, 14), (64, 960, 7, 7)),
    ),
    "unet": [
        *_named("unet2d", (4, 64, 512, 512), (4, 128, 256, 256), (4, 512, 64, 64)),
        *_named("unet3d", (2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 256, 16, 16, 16)),
    ],
    "points": [
        *_named("pointnet", (32, 64, 2500), (32, 128, 2500), (32, 1024, 2500)),
        *_named("mlp", (1024, 512), (8192, 1024), (65536, 256), (256, 4096)),
    ],
    # Batch norm in place of the layer norms of a ConvNeXt, whose layout is channels-last.
    "convnext": _named(
        "convnext",
        *((64, 96, 56, 56), (64, 192, 28, 28), (64, 384, 14, 14), (64, 768, 7, 7)),
        layout="nhwc",
    ),
    # What starves an implementation: one channel, three, one position, odd sizes, 64-bit indices.
    "worst": [
        Shape("one channel", (64, 1, 512, 512)),
        Shape("three channels", (128, 3, 224, 224)),
        Shape("one position", (4096, 2048, 1, 1)),
        Shape("odd runs", (61, 131, 29, 31)),
        Shape("odd rows", (8191, 1027)),
        Shape("two samples", (2, 2048, 7, 7)),
        Shape("2^31 elements", (64, 64, 1024, 512)),
    ],
}

# Those of the report: every kind of network once, at sizes that do not fit the cache of a GPU.
README_SHAPES = [
    Shape("ResNet-50", (256, 64, 112, 112)),
    Shape("ResNet-50", (256, 256, 56, 56)),
    Shape("ResNet-50", (256, 512, 28, 28)),
    Shape("ResNet-50", (256, 1024, 14, 14)),
    Shape("ResNet-50", (256, 2048, 7, 7)),
    Shape("ResNet-50", (256, 256, 56, 56), layout="nhwc"),
    Shape("EfficientNet-B0", (256, 144, 56, 56)),
    Shape("MobileNet-V2", (256, 96, 112, 112), layout="nhwc"),
    Shape("U-Net 2-D", (8, 64, 512, 512)),
    Shape("U-Net 3-D", (4, 32, 128, 128, 128)),
    Shape("U-Net 3-D", (4, 64, 64, 64, 64), layout="nhwc"),
    Shape("PointNet", (256, 128, 2500)),
    Shape("MLP", (65536, 1024)),
    Shape("ConvNeXt-like", (256, 384, 14, 14), layout="nhwc"),
    Shape("RGB input", (256, 3, 224, 224)),
    Shape("odd sizes", (255, 131, 29, 31)),
]


def merge(shapes: Iterable[Shape]) -> list[Shape]:
    """Equal shapes become one, with the sum of their counts, in the order of the first."""
    found: dict[Shape, int] = {}
    for shape in shapes:
        key = replace(shape, count=1)
        found[key] = found.get(key, 0) + shape.count
    return [replace(shape, count=count) for shape, count in found.items()]


def cut(sizes: tuple[int, ...], sm_count: int, most: int) -> tuple[tuple[int, ...], int]:
    """`sizes` with a smaller batch, of at most about `most` elements, and SMs in proportion.

    Each SM keeps its share of the elements, and of the L2 cache. Of a large problem more than
    `most` is left: one sample at least, and a few SMs.
    """
    n, numel = sizes[0], math.prod(sizes)
    # A batch cannot be cut below one sample, nor a device so far that a team spans all of it.
    fewest = max(min(_FEWEST_SMS, sm_count), math.ceil(sm_count / n))
    sms = max(fewest, min(sm_count, sm_count * most // max(numel, 1)))
    batch = min(n, max(1, round(n * sms / sm_count)))
    return (batch, *sizes[1:]), sms
