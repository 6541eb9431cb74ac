"""Bytes in flight: every kernel asks for enough at once to cover latency times bandwidth."""

from __future__ import annotations

import pytest
import torch

from batchnorm_cuda import explain
from batchnorm_cuda.devices import DEVICES, bytes_to_cover_latency

# Activations of ResNet-50 at batch 256, and of a 3-D U-Net.
RESNET = [
    (256, 64, 112, 112),
    (256, 64, 56, 56),
    (256, 256, 56, 56),
    (256, 128, 28, 28),
    (256, 512, 28, 28),
    (256, 256, 14, 14),
    (256, 1024, 14, 14),
    (256, 512, 7, 7),
    (256, 2048, 7, 7),
]
UNET = [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (2, 128, 32, 32, 32), (2, 256, 16, 16, 16)]
# Where a figure is known that is larger than latency times bandwidth by the model.
FIGURES = {"h100": 30 * 1024}
FORMATS = {
    "contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format},
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d},
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "float"])
@pytest.mark.parametrize("name", DEVICES)
def test_large_layers_cover_the_latency(name: str, dtype: torch.dtype, layout: str) -> None:
    """As the planner chooses, and through the stage kernels, which serve what no team takes."""
    latency = bytes_to_cover_latency(DEVICES[name])
    assert latency is not None
    needed = max(latency, FIGURES.get(name, 0))
    short = []
    for shape in RESNET + UNET:
        for op in ("forward", "backward", "eval"):
            for strategy in ("auto", "two_pass"):
                plan = explain(
                    shape,
                    dtype=dtype,
                    memory_format=FORMATS[layout][len(shape)],
                    device=name,
                    op=op,
                    strategy=strategy,
                )
                short += [
                    f"{kernel.name} for {op} of {shape}: {kernel.in_flight_bytes} of {needed}"
                    for kernel in plan.kernels
                    if kernel.in_flight_bytes is not None and kernel.in_flight_bytes < needed
                ]
    assert short == []
